"""`ddm frames`: whole commands on a small RGBD folder."""

import errno
import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from preparation import forget_what_was_asked, report

from ddm_training.errors import InputError
from ddm_training.frames import open_scene, open_store
from ddm_training.prepare import FramesConfig


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """40 frames of 32 x 24, named so that text order is not their order; depth 1 m + 1 cm per frame, sloped."""
    root = tmp_path / "office"
    (root / "rgb").mkdir(parents=True)
    (root / "depth").mkdir()
    add_frames(root, range(40))
    np.savetxt(root / "K.txt", [[30.0, 0, 15.5], [0, 30.0, 11.5], [0, 0, 1]])
    return root


def add_frames(root: Path, numbers: range) -> None:
    rng = np.random.default_rng(numbers.start)
    for i in numbers:
        Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(root / "rgb" / f"{i}.png")
        depth = 1000 + 10 * i + 20 * np.arange(32, dtype=np.uint16)[None, :].repeat(24, axis=0)
        depth[0, :5], depth[1, :5] = 0, 65535
        Image.fromarray(depth.astype(np.uint16)).save(root / "depth" / f"{i}.png")


def frames_config(folder: Path, **changes) -> FramesConfig:
    return FramesConfig(**({"data": folder, "output": folder.parent / "store"} | changes))


def test_a_folder_becomes_train_and_a_held_out_end_with_a_gap_between(folder: Path) -> None:
    frames_config(folder, val_gap=4).main()
    val, train = sorted(open_store(folder.parent / "store"), key=len)
    assert (train.info.name, train.info.split, len(train)) == ("office_train", "train", 30)
    assert (val.info.name, val.info.split, len(val)) == ("office_val", "val", 6)
    assert train.info.frames == tuple(map(str, range(30)))
    assert val.info.frames == tuple(map(str, range(34, 40)))
    assert report(folder)["rejected"] == {"gap between train and val": 4}
    np.testing.assert_allclose(train.depth[7, 5], 1.07 + 0.02 * np.arange(32), rtol=1e-3)
    assert not train.mask[:, :2, :5].any()
    assert train.mask[:, 2:].all()
    np.testing.assert_array_equal(train.color[7], np.asarray(Image.open(folder / "rgb" / "7.png")))
    assert train.info.intrinsics[0] == (30.0, 30.0, 16.0, 12.0)  # from "first centre at 0" to "at 0.5"


@pytest.mark.parametrize("older", [False, True])
def test_the_held_out_end_of_a_capture_that_grew_is_made_anew_also_where_it_has_as_many_frames(
    folder: Path, older: bool
) -> None:
    changes = {"val_gap": 4, "val_fraction": 0.05}
    store = folder.parent / "store"
    frames_config(folder, **changes).main()
    assert open_scene(store / "office_val").info.frames == ("38", "39")
    if older:
        forget_what_was_asked(store)
    add_frames(folder, range(40, 48))
    frames_config(folder, **changes).main()
    assert open_scene(store / "office_val").info.frames == ("46", "47")
    assert open_scene(store / "office_train").info.frames == tuple(map(str, range(42)))
    frames_config(folder, **changes).main()
    assert report(folder)["scenes_skipped"] == 2


def test_a_scene_is_made_anew_when_a_frame_that_was_rejected_gave_way_to_another(folder: Path) -> None:
    os.truncate(folder / "rgb" / "0.png", 500)
    frames_config(folder, val_fraction=0.0).main()
    for kind in ("rgb", "depth"):
        (folder / kind / "0.png").unlink()
    add_frames(folder, range(40, 41))
    frames_config(folder, val_fraction=0.0).main()
    assert open_scene(folder.parent / "store" / "office_train").info.frames == tuple(map(str, range(1, 41)))


def test_a_folder_can_be_stored_smaller(folder: Path) -> None:
    frames_config(folder, size=(16, 12), pixel_centre="0.5").main()
    scene = open_store(folder.parent / "store", "val")[0]
    assert scene.color.shape[1:] == (12, 16, 3)
    assert scene.info.intrinsics[0] == (15.0, 15.0, 7.75, 5.75)


def test_bad_files_of_a_folder_are_counted_by_reason(folder: Path) -> None:
    (folder / "rgb" / "0.png").unlink()
    (folder / "depth" / "1.png").unlink()
    os.truncate(folder / "rgb" / "2.png", 500)
    (folder / "depth" / "3.png").write_text("no image")
    Image.new("I;16", (16, 12), 900).save(folder / "depth" / "4.png")
    Image.new("L", (32, 24), 90).save(folder / "depth" / "5.png")
    Image.new("RGB", (16, 12)).save(folder / "rgb" / "6.png")
    Image.new("I;16", (32, 24), 0).save(folder / "depth" / "7.png")
    frames_config(folder, val_fraction=0.0).main()
    assert report(folder)["rejected"] == {
        "no depth file": 1,
        "no colour file": 1,
        "colour file damaged": 1,
        "depth file damaged": 1,
        "depth and colour of different sizes": 1,
        "depth is not 16-bit grey (PIL mode L)": 1,
        "colour image of another size than the first": 1,
        "no valid depth at all": 1,
    }
    assert report(folder)["frames"] == 32


def bad_images() -> dict[str, bytes]:
    """Images of which PIL raises neither OSError nor SyntaxError."""
    file = io.BytesIO()
    Image.new("RGB", (32, 24)).save(file, "PNG")
    return {
        "header.ppm": b"P6\nwide 24\n255\n",
        "short.png": file.getvalue()[:8] + b"\0\0\0\x05IHDR" + file.getvalue()[16:],
        "bomb.ppm": b"P6\n60000 60000\n255\n",
    }


@pytest.mark.parametrize("name", bad_images())
def test_a_damaged_image_is_one_rejected_frame_whatever_pil_raises(folder: Path, name: str) -> None:
    (folder / "rgb" / "0.png").unlink()
    (folder / "rgb" / f"0{Path(name).suffix}").write_bytes(bad_images()[name])
    with (
        pytest.raises((ValueError, Image.DecompressionBombError)),
        Image.open(folder / "rgb" / f"0{name[-4:]}") as image,
    ):
        image.load()
    frames_config(folder, val_fraction=0.0).main()
    assert report(folder)["rejected"] == {"colour file damaged": 1}
    assert report(folder)["frames"] == 39


def test_depth_in_wrong_units_is_an_error_that_says_so(folder: Path) -> None:
    with pytest.raises(InputError, match="wrong units"):
        frames_config(folder, metres_per_unit=1.0).main()


def test_intrinsics_for_another_size_or_of_another_shape_are_refused(folder: Path) -> None:
    for matrix, complaint in (
        ([[300.0, 0, 155], [0, 300, 115], [0, 0, 1]], "images of another size"),
        ([[30.0, 0, 15.5], [0, -30, 11.5], [0, 0, 1]], "no pinhole matrix"),
        ([[30.0, 2, 15.5], [0, 30, 11.5], [0, 0, 1]], "no pinhole matrix"),
        ([[30.0, 0, 15.5, 0]], "expected 3 x 3"),
    ):
        np.savetxt(folder / "K.txt", matrix)
        with pytest.raises(InputError, match=complaint):
            frames_config(folder).main()
    (folder / "K.txt").write_text("focal length: 30")
    with pytest.raises(InputError, match="cannot be read"):
        frames_config(folder).main()


def test_folders_without_pairs_or_with_too_few_frames_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="--color-dir"):
        frames_config(folder, color_dir="images").main()
    with pytest.raises(InputError, match="too few"):
        frames_config(folder, val_fraction=0.9).main()
    for path in (folder / "depth").iterdir():
        path.rename(path.with_name(f"depth_{path.name}"))
    with pytest.raises(InputError, match=r"no pair .* \(40 depth images, e.g. 'depth_"):
        frames_config(folder).main()


@pytest.mark.parametrize("output", ["taken", "taken/store"])
def test_a_store_that_cannot_be_made_is_named(folder: Path, output: str) -> None:
    (folder / "taken").write_text("a file")
    with pytest.raises(InputError, match=rf"--output .*{output} cannot be made: .*Give another folder"):
        frames_config(folder, output=folder / output).main()


@pytest.mark.parametrize("file", ["frames-office.options.json", "report.json"])
def test_a_file_of_the_store_that_cannot_be_written_is_named(folder: Path, monkeypatch, file: str) -> None:
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if target.name == file:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr("ddm_training.files.os.replace", full)
    with pytest.raises(InputError, match=rf"{file} could not be written .*No space left"):
        frames_config(folder).main()


@pytest.mark.parametrize(
    "bad",
    [{"val_fraction": 1.0}, {"val_gap": -1}, {"metres_per_unit": 0.0}, {"name": "office/kitchen"}, {"name": ""}],
)
def test_flags_of_frames_out_of_range_are_refused(bad: dict) -> None:
    with pytest.raises(InputError, match="found"):
        FramesConfig(data=Path(), output=Path(), **bad)


def test_the_hololens_folder_is_read_whole(real_data, tmp_path: Path) -> None:
    FramesConfig(data=real_data("rgbd/hololens"), output=tmp_path / "store").main()
    train, val = open_store(tmp_path / "store")
    assert (len(train), len(val)) == (307, 56)
    assert abs(train.info.intrinsics[0][2] - 135) < 1
    assert 1.0 < np.median(train.depth[::20][train.mask[::20]]) < 5.0
    assert 0.6 < train.mask.mean() < 0.9

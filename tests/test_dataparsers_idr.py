"""Own captures in IDR's layout: which cameras, images and masks belong together; what makes them no scan of DTU's."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ddm_training.errors import InputError
from diffusionerf_ns.dataparsers.dtu import DTUFewViewDataParserConfig
from diffusionerf_ns.dataparsers.few_view import FewViewDataParserConfig
from diffusionerf_ns.dataset import FewViewDataset

IDR = "dtu/rs_dtu_4/scan24"


def parse(data: Path, split: str = "train", **flags):
    return DTUFewViewDataParserConfig(data=data, **flags).setup().get_dataparser_outputs(split)


@pytest.fixture
def own(real_data, tmp_path, monkeypatch):
    """A function that makes an own capture in IDR's layout of scan24's first cameras, as NeuS has them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = real_data(IDR)

    def make(count: int = 8, name: str = "my_object", cameras: str = "cameras_sphere.npz") -> Path:
        folder = tmp_path / name
        for part, digits in (("image", 6), ("mask", 3)):
            (folder / part).mkdir(parents=True)
            for i in range(count):
                (folder / part / f"{i:03d}.png").symlink_to(source / part / f"{i:0{digits}d}.png")
        archive = np.load(source / "cameras.npz")
        keys = [f"{kind}_mat_{i}" for kind in ("world", "scale") for i in range(count)]
        np.savez(folder / cameras, **{key: archive[key] for key in keys})
        return folder

    return make


def same_but_for_scale(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether cameras [n, 3, 4] have the same distances to each other, in parts of the largest, and relative turns."""
    far = [(c[:, None, :, 3] - c[None, :, :, 3]).norm(dim=-1) for c in (a, b)]
    far = [distances / distances.max() for distances in far]
    turns = [torch.einsum("nji,mjk->nmik", c[:, :, :3], c[:, :, :3]) for c in (a, b)]
    return all(torch.allclose(c, d, atol=1e-4) for c, d in (far, turns))


@pytest.mark.parametrize(("name", "cameras"), [("my_object", "cameras_sphere.npz"), ("scan3", "cameras.npz")])
def test_an_own_capture_in_this_layout_has_the_cameras_that_are_there(own, real_data, name, cameras):
    data = own(8, name, cameras)
    outputs = FewViewDataParserConfig(data=data).setup().get_dataparser_outputs("train")
    assert (outputs.metadata["source"], outputs.metadata["protocol"]) == ("idr", "nerfstudio")
    assert [entry["id"] for entry in outputs.metadata["split"]["train"]] == list(range(8))
    assert [path.name for path in outputs.image_filenames] == [f"{i:03d}.png" for i in range(8)]
    assert "near" not in outputs.metadata
    assert "scene_units_per_metre" not in outputs.metadata
    truth = parse(real_data(IDR), train_ids=tuple(range(8)), test_ids=(9,))
    assert same_but_for_scale(outputs.cameras.camera_to_worlds, truth.cameras.camera_to_worlds)
    for key in ("fx", "fy", "cx", "cy"):
        assert torch.allclose(getattr(outputs.cameras, key), getattr(truth.cameras, key), atol=1e-2), key
    fewer = parse(data, "test", num_views=3)
    assert [entry["id"] for entry in fewer.metadata["split"]["train"]] == [0, 4, 7]
    assert len(fewer.image_filenames) == 5


def test_of_a_large_own_capture_every_eighth_image_is_held_out(own):
    split = parse(own(17)).metadata["split"]
    assert [entry["id"] for entry in split["test"]] == [0, 8, 16]
    assert len(split["train"]) == 14


def test_as_many_cameras_as_a_scan_has_make_no_scan_of_a_capture_of_another_name(own, capsys):
    assert parse(own(49)).metadata["protocol"] == "nerfstudio"
    assert "call the folder scanN" in " ".join(capsys.readouterr().out.split())
    outputs = parse(own(49, "dtu_scan24"), "test")  # NeuS's name for a scan
    assert (outputs.metadata["source"], outputs.metadata["protocol"]) == ("dtu", "dtu-regnerf")
    assert len(outputs.image_filenames) == 25


def test_masks_of_an_own_capture_are_used_when_asked(own, capsys):
    data = own(6, "my[red]statue")
    assert "mask" not in FewViewDataset(parse(data))[0]
    said = "".join(capsys.readouterr().out.split())
    assert "--masked-training" in said
    assert "my[red]statuearenotused" in said
    with pytest.raises(InputError, match=r"--mask-folder .* would not be used.*--masked-training"):
        parse(data, mask_folder=data / "mask")
    inside = FewViewDataset(parse(data, masked_training=True))[2]["mask"]
    assert 0.05 < inside.double().mean() < 0.95
    (data / "mask" / "003.png").unlink()
    with pytest.raises(InputError, match=r"masks of cameras \[3\] are missing"):
        parse(data, masked_training=True)
    shutil.rmtree(data / "mask")
    with pytest.raises(InputError, match=r"no masks were found .*--mask-folder"):
        parse(data, masked_training=True)


@pytest.mark.parametrize("place", [".", "mask", "my_object", "my_object/mask"])
def test_masks_of_an_own_capture_may_lie_in_a_folder_of_masks_of_several(own, tmp_path, place):
    data, folder = own(6), tmp_path / "masks"
    (folder / place).parent.mkdir(parents=True, exist_ok=True)
    (data / "mask").rename(folder / place)
    found = parse(data, masked_training=True, mask_folder=folder).mask_filenames
    assert found == [folder / place / f"{i:03d}.png" for i in range(6)]


def test_images_of_an_own_capture_belong_to_cameras_by_number_or_else_by_order(own):
    data = own(6)
    (data / "image" / "002.png").unlink()
    outputs = parse(data)
    assert [path.stem for path in outputs.image_filenames] == ["000", "001", "003", "004", "005"]
    for path in sorted((data / "image").iterdir()):
        path.rename(path.with_name(f"photo_{path.name}"))
    with pytest.raises(InputError, match=r"has 5 files and cameras_sphere\.npz 6 cameras: which belong together"):
        parse(data)
    shutil.copy(data / "mask" / "002.png", data / "image" / "photo_002.png")
    ordered = parse(data)
    assert [path.stem for path in ordered.image_filenames] == [f"photo_{i:03d}" for i in range(6)]
    kept = ordered.cameras.camera_to_worlds[[0, 1, 3, 4, 5]]
    assert same_but_for_scale(kept, outputs.cameras.camera_to_worlds)


def test_cameras_of_an_own_capture_that_are_for_images_of_another_size_are_refused(own):
    data = own(6)
    archive = dict(np.load(data / "cameras_sphere.npz"))
    for times in (2.0, 4.0, 0.25):
        scaled = {key: np.diag([times, times, 1.0, 1.0]) @ value for key, value in archive.items()}
        np.savez(data / "cameras_sphere.npz", **scaled)
        with pytest.raises(InputError, match=r"principal point is \(\d+, \d+\) .* images of 400 x 300 pixels"):
            parse(data)

"""The frame store: what is written comes back, and what is not whole is never taken for whole."""

import errno
import io
import json
import os
import pickle
import resource
from pathlib import Path

import numpy as np
import pytest

from ddm_training.errors import InputError
from ddm_training.frames import SceneInfo, SceneWriter, open_scene, open_store, read_scene_info

K = (20.0, 21.0, 8.0, 6.0)


def frame(seed: int, height: int = 12, width: int = 16) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    color = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    depth = rng.uniform(0.5, 8.0, (height, width)).astype(np.float32)
    return color, depth, rng.random((height, width)) < 0.8


def write(root: Path, name: str = "room", count: int = 3, max_frames: int = 5, split: str = "train") -> SceneInfo:
    writer = SceneWriter(root, name, split=split, source="test", max_frames=max_frames, height=12, width=16)
    for i in range(count):
        writer.add(*frame(i), intrinsics=(K[0] + i, *K[1:]), name=f"f{i}")
    writer.reject("too dark", 2)
    writer.reject("too dark")
    return writer.close()


@pytest.mark.parametrize("max_frames", [3, 5])
def test_frames_come_back_in_half_precision_with_their_masks_and_cameras(tmp_path: Path, max_frames: int) -> None:
    info = write(tmp_path, max_frames=max_frames)
    scene = open_scene(tmp_path / "room")
    assert scene.info == info == read_scene_info(tmp_path / "room")
    assert len(scene) == 3
    for i in range(3):
        color, depth, mask = frame(i)
        np.testing.assert_array_equal(scene.color[i], color)
        np.testing.assert_array_equal(scene.mask[i], mask)
        np.testing.assert_array_equal(scene.depth[i], np.where(mask, depth, 0).astype(np.float16))
        assert scene.info.intrinsics[i] == (20.0 + i, 21.0, 8.0, 6.0)
    assert scene.info.frames == ("f0", "f1", "f2")
    assert scene.info.rejected == {"too dark": 3}


def test_arrays_are_mapped_from_disk_and_not_loaded(tmp_path: Path) -> None:
    write(tmp_path)
    scene = open_scene(tmp_path / "room")
    for name in ("color", "depth", "mask"):
        array = getattr(scene, name)
        assert not array.flags.writeable
        with (tmp_path / "room" / f"{name}.npy").open("r+b") as file:
            file.seek(128)
            first = file.read(1)[0]
            file.seek(128)
            file.write(bytes([1 - first if name == "mask" else first ^ 1]))
        assert array.reshape(-1).view(np.uint8)[0] != first


def test_a_store_may_have_more_scenes_than_a_process_may_have_open_files(tmp_path: Path) -> None:
    for index in range(12):
        write(tmp_path, f"room{index:02d}")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = os.dup(0)  # the lowest number that is free
    os.close(used)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 12, hard))
        scenes = open_store(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(scenes) == 12
    for scene in scenes:
        np.testing.assert_array_equal(scene.color[1], frame(1)[0])


def test_a_scene_is_mapped_anew_in_another_process_and_not_copied(tmp_path: Path) -> None:
    """Loader processes that are not forked get the scenes pickled."""
    writer = SceneWriter(tmp_path, "large", split="train", source="test", max_frames=4, height=120, width=160)
    for i in range(4):
        writer.add(*frame(i, 120, 160), intrinsics=K, name=f"f{i}")
    writer.close()
    scene = open_scene(tmp_path / "large")
    content = pickle.dumps(scene)
    assert len(content) < scene.mask.nbytes / 10
    again = pickle.loads(content)
    assert again.info == scene.info
    for name in ("color", "depth", "mask"):
        np.testing.assert_array_equal(getattr(again, name), getattr(scene, name))
        assert not getattr(again, name).flags.writeable


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES, errno.EIO])
def test_a_failure_of_the_machine_is_not_a_reason_to_delete_a_scene(tmp_path: Path, monkeypatch, number: int) -> None:
    write(tmp_path)

    def fails(*arguments: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    for place, name in ((np, "load"), (Path, "read_text")):
        with monkeypatch.context() as patched:
            patched.setattr(place, name, fails)
            with pytest.raises(InputError, match=os.strerror(number)) as failed:
                open_store(tmp_path)
        assert "delete" not in str(failed.value)
        assert "the scene can stay" in str(failed.value)
    assert len(open_store(tmp_path)) == 1


def test_arrays_of_other_splits_are_not_opened(tmp_path: Path) -> None:
    write(tmp_path, "one")
    write(tmp_path, "two", split="val")
    (tmp_path / "two" / "color.npy").unlink()
    assert [scene.info.name for scene in open_store(tmp_path, "train")] == ["one"]
    with pytest.raises(InputError, match=r"color.npy cannot be read"):
        open_store(tmp_path, "val")


def test_no_space_is_kept_for_frames_that_were_not_added(tmp_path: Path) -> None:
    write(tmp_path, "short", count=2, max_frames=50)
    write(tmp_path, "exact", count=2, max_frames=2)
    for name in ("color", "depth", "mask"):
        sizes = {(tmp_path / scene / f"{name}.npy").stat().st_size for scene in ("short", "exact")}
        assert len(sizes) == 1
    assert {p.name for p in (tmp_path / "short").iterdir()} == {"color.npy", "depth.npy", "mask.npy", "scene.json"}


def test_depth_that_is_not_positive_and_finite_is_masked_whatever_the_mask_says(tmp_path: Path) -> None:
    color, depth, _ = frame(0)
    depth[0, :4] = [np.nan, np.inf, 0.0, -2.0]
    writer = SceneWriter(tmp_path, "room", split="val", source="test", max_frames=1, height=12, width=16)
    writer.add(color, depth, np.ones_like(depth, bool), intrinsics=K, name="f")
    writer.close()
    scene = open_scene(tmp_path / "room")
    assert not scene.mask[0, 0, :4].any()
    assert np.all(scene.depth[0, 0, :4] == 0)
    assert scene.mask.sum() == 12 * 16 - 4


def test_a_scene_is_invisible_until_it_is_closed(tmp_path: Path) -> None:
    writer = SceneWriter(tmp_path, "room", split="train", source="test", max_frames=2, height=12, width=16)
    writer.add(*frame(0), intrinsics=K, name="f0")
    assert not (tmp_path / "room").exists()
    with pytest.raises(InputError, match="no frames"):
        open_store(tmp_path)
    writer.close()
    assert len(open_store(tmp_path)) == 1
    assert not (tmp_path / "room.part").exists()


def test_writing_a_scene_again_replaces_it_and_what_a_killed_run_left(tmp_path: Path) -> None:
    write(tmp_path, count=3)
    (tmp_path / "room.part").mkdir()
    (tmp_path / "room.part" / "rubbish.npy").write_text("x")
    write(tmp_path, count=1)
    assert len(open_scene(tmp_path / "room")) == 1
    assert not (tmp_path / "room" / "rubbish.npy").exists()


def test_a_scene_without_frames_can_be_written_and_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path, "empty", count=0, max_frames=4)
    write(tmp_path, "none", count=0, max_frames=0)
    assert len(open_scene(tmp_path / "empty")) == len(open_scene(tmp_path / "none")) == 0
    write(tmp_path, "room")
    assert [scene.info.name for scene in open_store(tmp_path)] == ["room"]


def test_several_stores_open_as_one_by_split(tmp_path: Path) -> None:
    write(tmp_path / "a", "one")
    write(tmp_path / "a", "two", split="val")
    write(tmp_path / "b", "three", split="val")
    roots = [tmp_path / "b", tmp_path / "a"]
    assert [s.info.name for s in open_store(roots)] == ["three", "one", "two"]
    assert [s.info.name for s in open_store(roots, "val")] == ["three", "two"]
    with pytest.raises(InputError, match=r"split 'test'.*'val': 2"):
        open_store(roots, "test")


def test_a_path_that_is_no_store_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a folder"):
        open_store(tmp_path / "nowhere")
    with pytest.raises(InputError, match="none"):
        open_store(tmp_path)
    (tmp_path / "photos").mkdir()
    with pytest.raises(InputError, match=r"no frames.* none"):
        open_store(tmp_path)
    (tmp_path / "photos" / "color.npy").touch()
    with pytest.raises(InputError, match=r"scene.json cannot be read.* delete .*photos and prepare"):
        open_store(tmp_path)


def test_folders_of_the_machine_or_of_an_editor_in_a_store_are_passed_over(tmp_path: Path, monkeypatch) -> None:
    write(tmp_path)
    for name in ("lost+found", ".ipynb_checkpoints", "@eaDir/room"):
        (tmp_path / name).mkdir(parents=True)
    is_file = Path.is_file

    def is_file_where_allowed(path: Path) -> bool:  # as for all but root
        if path.parent.name in ("lost+found", "secret"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", is_file_where_allowed)
    assert [scene.info.name for scene in open_store(tmp_path)] == ["room"]
    (tmp_path / "lost+found").rename(tmp_path / "secret")
    with pytest.raises(InputError, match=r"secret/scene.json .*a permission is to blame"):
        open_store(tmp_path)


def test_the_folder_of_several_stores_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    for store in ("s1", "s2"):
        write(tmp_path / "big" / store)
    with pytest.raises(InputError, match=r"big is a folder of stores: give --data \S+big/s1 \S+big/s2\.$"):
        open_store(tmp_path / "big")
    write(tmp_path / "big", "own")
    with pytest.warns(UserWarning, match="left out what is in the stores s1, s2"):
        assert [scene.info.name for scene in open_store(tmp_path / "big")] == ["own"]


@pytest.mark.parametrize("name", ["color", "depth", "mask"])
def test_a_missing_truncated_or_foreign_array_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    write(tmp_path)
    path = tmp_path / "room" / f"{name}.npy"
    content = path.read_bytes()
    for spoiled in (content[:-7], content[:40], b"not an array at all, but long enough to be read as one"):
        path.write_bytes(spoiled)
        with pytest.raises(InputError, match=rf"{name}.npy cannot be read .* delete"):
            open_store(tmp_path)
    whole = np.load(io.BytesIO(content))
    np.save(path, np.asfortranarray(whole))
    with pytest.raises(InputError, match=rf"{name}.npy holds .* by columns"):
        open_store(tmp_path)
    np.save(path, np.zeros((2, 12, 16), np.float64))
    with pytest.raises(InputError, match=rf"{name}.npy holds float64 \(2, 12, 16\)"):
        open_store(tmp_path)
    path.unlink()
    with pytest.raises(InputError, match=rf"{name}.npy cannot be read"):
        open_store(tmp_path)


def test_an_array_file_of_no_bytes_is_an_error_that_names_it(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "room" / "depth.npy").write_bytes(b"")
    with pytest.raises(InputError, match=r"depth.npy cannot be read"):
        open_store(tmp_path)


def test_a_damaged_or_foreign_scene_file_is_an_error(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "room" / "scene.json"
    whole = json.loads(path.read_text())
    for content, complaint in (
        (path.read_text()[:50], "cannot be read"),
        ("[1, 2]", "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
        (json.dumps(whole | {"format": "rgbd-frames-9"}), "this version reads 'rgbd-frames-1'"),
        (json.dumps({k: v for k, v in whole.items() if k != "intrinsics"}), "intrinsics"),
        (json.dumps(whole | {"mood": "good"}), "mood"),
    ):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(InputError, match=complaint):
            read_scene_info(tmp_path / "room")


def test_a_frame_of_another_size_is_refused_by_the_writer(tmp_path: Path) -> None:
    writer = SceneWriter(tmp_path, "room", split="train", source="test", max_frames=2, height=12, width=16)
    with pytest.raises(ValueError, match="shape"):
        writer.add(*frame(0, height=10), intrinsics=K, name="f0")

"""`ddm hypersim prepare` on bad input: frames that are counted with their reason, and trees that are errors."""

import os
from pathlib import Path

import numpy as np
import preparation
import pytest
from hypersim_tree import PLAIN_CAMERA, ray_lengths, write_frame, write_hdf5, write_tree
from preparation import config, files, report

from ddm_training.errors import InputError
from ddm_training.frames import open_scene, open_store
from ddm_training.hypersim import CAMERA_FILE, SPLIT_FILE
from ddm_training.rejection import FrameRejected, RejectionLimits, check_frame

tree = preparation.tree  # a fixture


# Bad frames


def spoil_nan(tree: Path) -> None:
    write_hdf5(files(tree)["depth"], np.full((48, 64), np.nan, np.float16))


def spoil_units(tree: Path) -> None:
    write_hdf5(files(tree)["depth"], (2540.0 * ray_lengths(64, 48)).astype(np.float16))


def spoil_holes(tree: Path) -> None:
    depth = (3.0 * ray_lengths(64, 48)).astype(np.float16)
    depth[:8] = 0.0
    write_hdf5(files(tree)["depth"], depth)


def spoil_flat(tree: Path) -> None:
    write_hdf5(files(tree)["depth"], (3.0 * ray_lengths(64, 48)).astype(np.float16))


def spoil_black(tree: Path) -> None:
    write_hdf5(files(tree)["colour"], np.zeros((48, 64, 3), np.float16))


def spoil_truncate(tree: Path) -> None:
    os.truncate(files(tree)["colour"], 900)


def spoil_size(tree: Path) -> None:
    write_frame(tree / "ai_001_001" / "images", "cam_00", 0, size=(32, 24))


def spoil_pair(tree: Path) -> None:
    files(tree)["colour"].unlink()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (spoil_nan, "no valid depth at all"),
        (spoil_units, "median depth over 100 m (wrong units?)"),
        (spoil_holes, "more than 3 % of the pixels without depth"),
        (spoil_flat, "depth range under 0.5 m"),
        (spoil_black, "colour range under 10 of 255"),
        (spoil_truncate, "colour file damaged"),
        (spoil_size, "depth of another size than the camera"),
        (spoil_pair, "no colour file"),
    ],
)
def test_a_bad_frame_is_counted_with_its_reason_and_the_others_are_kept(tree: Path, spoil, reason: str) -> None:
    spoil(tree)
    config(tree).main()
    assert report(tree)["rejected"] == {reason: 1}
    assert report(tree)["frames"] == 5
    assert open_scene(tree.parent / "store" / "ai_001_001_cam_00").info.frames == ("frame.0001",)


def test_known_bad_cameras_are_counted_and_not_read(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "raw", {"ai_003_001": "train", "ai_003_002": "train"})
    config(tree).main()
    assert report(tree)["rejected"] == {"known bad camera": 2}
    assert [s.info.name for s in open_store(tmp_path / "store")] == ["ai_003_002_cam_00"]
    config(tree).main()
    assert report(tree)["scenes_skipped"] == 2


def test_a_sheared_camera_and_one_without_a_row_are_counted(tree: Path) -> None:
    path = tree / CAMERA_FILE
    head, first, *_, last = path.read_text().splitlines()
    values = first.split(",")
    values[4] = str(0.05 * PLAIN_CAMERA[1][1] * -1)  # M_01: x leans with y
    path.write_text("\n".join([head, ",".join(values), last]) + "\n")
    config(tree).main()
    assert report(tree)["rejected"] == {"camera sheared by more than 2 %": 2, "scene not in the table of cameras": 2}


def test_a_frame_at_the_limits_passes_and_one_beyond_does_not() -> None:
    limits = RejectionLimits(max_invalid=0.25, min_depth_range=0.5, min_color_range=10.0)
    color = np.zeros((2, 2, 3), np.uint8)
    color[0, 0, 0] = 10
    depth, mask = np.array([[1.0, 1.5], [1.0, 9.0]], np.float32), np.array([[True, True], [True, False]])
    check_frame(color, depth, mask, limits)
    with pytest.raises(FrameRejected, match="colour range"):
        check_frame(color // 2, depth, mask, limits)
    with pytest.raises(FrameRejected, match="depth range"):
        check_frame(color, np.float32(0.9) * depth, mask, limits)
    with pytest.raises(FrameRejected, match="without depth"):
        check_frame(color, depth, mask & [[True, False]], limits)
    with pytest.raises(InputError, match=r"share of the pixels"):
        RejectionLimits(max_invalid=3.0)


# Bad trees


def test_a_tree_without_any_good_frame_is_an_error(tree: Path) -> None:
    with pytest.raises(InputError, match=r"no frame was kept.*depth range under 9 m': 6"):
        config(tree, limits=RejectionLimits(min_depth_range=9.0)).main()


def test_an_empty_split_and_unknown_scenes_are_errors_that_say_what_is_there(tree: Path) -> None:
    with pytest.raises(InputError, match=r"of the 3 scenes on disk.*'test': 0"):
        config(tree, splits=("test",)).main()
    with pytest.raises(InputError, match="ai_009_009"):
        config(tree, scenes=("ai_009_009",)).main()
    with pytest.raises(InputError, match="not a folder"):
        config(tree, data=tree / "nowhere").main()


def test_folders_that_the_split_file_does_not_know_are_named(tree: Path, capsys) -> None:
    (tree / "my_scene" / "images").mkdir(parents=True)
    config(tree).main()
    assert "1 folders that the split file does not know, e.g. my_scene" in capsys.readouterr().out


def test_missing_tables_are_errors_and_the_plain_camera_needs_none(tree: Path) -> None:
    (tree / CAMERA_FILE).rename(tree / "away.csv")
    with pytest.raises(InputError, match="metadata_camera_parameters"):
        config(tree).main()
    config(tree, camera_csv=tree / "away.csv").main()
    (tree / SPLIT_FILE).unlink()
    with pytest.raises(InputError, match="metadata_images_split_scene_v1"):
        config(tree).main()


def test_a_stretched_size_is_refused_before_anything_is_written(tree: Path) -> None:
    with pytest.raises(InputError, match="stretch"):
        config(tree, width=16, height=16).main()
    assert not (tree.parent / "store").exists()


def test_the_plain_camera_is_for_frames_of_the_published_size(tree: Path) -> None:
    with pytest.raises(InputError, match=r"no frame was kept.*depth of another size than the camera"):
        config(tree, camera="plain").main()

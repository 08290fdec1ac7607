"""Bad input to nerfstudio's commands: refused in one line before anything has begun."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import box_room
import pytest
import train_commands
from commands import Commands
from train_commands import digest, run_folder, train_arguments

folder, commands = train_commands.folder, train_commands.commands  # fixtures
capture, llff, prior = train_commands.capture, train_commands.llff, train_commands.prior  # fixtures


def refused(commands: Commands, *arguments: object) -> str:
    """The message of a mistake: one line, after which nothing has begun."""
    done = commands.run(*arguments)
    message = done.message()
    assert message.startswith("Error: "), message
    assert len(message.splitlines()) == 1, message
    assert "Traceback" not in done.stdout + done.stderr
    assert "Training Finished" not in done.stdout
    return message


# Captures


def no_such_folder(data: Path) -> None:
    shutil.rmtree(data)


def empty_folder(data: Path) -> None:
    shutil.rmtree(data)
    data.mkdir()


def truncated_image(data: Path) -> None:
    path = data / "images" / "004.png"
    path.write_bytes(path.read_bytes()[:2000])


def nan_pose(data: Path) -> None:
    content = json.loads((data / "transforms.json").read_text())
    content["frames"][2]["transform_matrix"][0][3] = math.nan
    (data / "transforms.json").write_text(json.dumps(content))


def unchanged(data: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("damage", "flags", "expected"),
    [
        (no_such_folder, (), "there is no such folder"),
        (empty_folder, (), "the folder is empty"),
        (truncated_image, (), "004.png"),
        (nan_pose, (), "002.png"),
        (unchanged, ("--num-views", 30), "30"),
        (unchanged, ("--train-ids", 0, 1, "--test-ids", 1, 2), "1"),
        (unchanged, ("--train-ids", 0, 99), "99"),
    ],
    ids=["no-folder", "empty-folder", "truncated-image", "nan-pose", "too-many-views", "overlap", "no-such-id"],
)
def test_a_capture_that_cannot_be_used_is_refused_in_one_line(
    commands, capture, prior, tmp_path, damage: Callable[[Path], None], flags, expected
):
    data = Path(shutil.copytree(capture, tmp_path / "capture"))
    damage(data)
    before = digest(tmp_path)
    message = refused(commands, *train_arguments(data, prior, "bad", parser=("few-view-data", *flags)))
    assert expected in message
    assert digest(tmp_path) == before


def llff_nan_pose(data: Path) -> None:
    box_room.spoil_pose(data, row=3, column=7)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [(box_room.drop_last_pose, "9 rows, but images_8 holds 10"), (llff_nan_pose, "rows [3] hold NaN")],
)
def test_a_table_of_poses_that_does_not_fit_is_refused_in_one_line(commands, llff, prior, tmp_path, damage, expected):
    data = Path(shutil.copytree(llff, tmp_path / "capture"))
    damage(data)
    before = digest(tmp_path)
    assert expected in refused(commands, *train_arguments(data, prior, "bad"))
    assert digest(tmp_path) == before


def test_a_run_that_never_began_leaves_no_checkpoint(commands, capture, prior, folder):
    refused(commands, *train_arguments(capture, prior, "never", parser=("few-view-data", "--num-views", 30)))
    assert not list(run_folder(folder, "never").rglob("*.ckpt"))


# Priors


def without_spec(folder: Path) -> None:
    (folder / "rgbd.json").unlink()


def with_three_channels(folder: Path) -> None:
    shutil.rmtree(folder)
    box_room.write_prior(folder, in_channels=3, out_channels=3)


def with_other_widths(folder: Path) -> None:
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"block_out_channels": [8, 16]}))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (without_spec, "has no rgbd.json"),
        (with_three_channels, "3 from 3 channels"),
        (with_other_widths, "do not fit"),
    ],
)
def test_a_prior_that_cannot_be_used_is_refused_before_the_first_step(
    commands, capture, prior, tmp_path, damage, expected
):
    bad = Path(shutil.copytree(prior, tmp_path / "prior"))
    damage(bad)
    flags = ("--logging.local-writer.enable", "True")
    message = refused(commands, *train_arguments(capture, bad, "bad-prior", *flags))
    assert expected in message


def test_a_hub_id_without_network_is_refused_in_one_line(commands, capture):
    message = refused(commands, *train_arguments(capture, Path("someone/no-such-prior"), "hub"))
    assert "no folder 'someone/no-such-prior' here" in message
    assert "Check the name and the network" in message

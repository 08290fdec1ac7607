"""Depth export: metres that agree with the cameras beside them, and runs that open again after an upgrade."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import box_room
import numpy as np
import pytest
import torch
import yaml
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.engine.trainer import TrainerConfig
from PIL import Image

from ddm_training.errors import InputError
from diffusionerf_ns import export

METRES = 4.0
DATA = Path(__file__).parent / "data"


class ExactModel:
    """Renders the box itself: cameras are in units of `METRES`, the left column of every image is empty."""

    metric_scale = torch.tensor(METRES)

    def get_outputs_for_camera(self, camera: Cameras) -> dict[str, torch.Tensor]:
        pose = camera.camera_to_worlds[0].double().numpy().copy()
        pose[:, 3] *= METRES
        height, width = int(camera.height[0]), int(camera.width[0])
        pinhole = box_room.Pinhole(c2w=pose, width=width, height=height, focal=float(camera.fx[0]))
        u, v = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
        z = torch.from_numpy(box_room.planar_depth(pinhole, u, v) / METRES).float()[..., None]
        norm = camera.generate_rays(camera_indices=0, keep_shape=True).metadata["directions_norm"]
        accumulation = torch.ones_like(z)
        accumulation[:, 0] = 0.2
        return {"depth": z * norm, "expected_depth": 1.1 * z * norm, "accumulation": accumulation}


def dataset(count: int, prefix: str = "view", **metadata: float) -> SimpleNamespace:
    views = box_room.cameras(count)
    poses = torch.tensor(np.stack([v.c2w for v in views]), dtype=torch.float32)
    poses[:, :, 3] /= METRES
    cameras = Cameras(poses, fx=66.0, fy=66.0, cx=48.0, cy=36.0, width=96, height=72)
    names = [Path(f"photos/{prefix}{i}.jpg") for i in range(count)]
    return SimpleNamespace(cameras=cameras, image_filenames=names, metadata=metadata)


def pipeline(tests: str = "test", **metadata: float) -> SimpleNamespace:
    world = SimpleNamespace(dataparser_transform=torch.eye(3, 4), dataparser_scale=1 / METRES)
    datamanager = SimpleNamespace(
        train_dataset=dataset(3, **metadata), eval_dataset=dataset(2, tests), train_dataparser_outputs=world
    )
    return SimpleNamespace(model=ExactModel(), datamanager=datamanager, device="cpu")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the command on a finished run of the exact model; gives the folder it wrote."""
    config = tmp_path / "config.yml"
    shutil.copy(DATA / "run_config.yml", config)

    def go(*arguments: str, tests: str = "test", kind: CameraType = CameraType.PERSPECTIVE, **metadata: float) -> Path:
        opened = pipeline(tests, **metadata)
        opened.datamanager.eval_dataset.cameras.camera_type[1] = kind.value
        made = (None, opened, Path("step-000000007.ckpt"), 7)
        monkeypatch.setattr("nerfstudio.utils.eval_utils.eval_setup", lambda *_, **__: made)
        export.main(["--load-config", str(config), "--output-dir", str(tmp_path / "out"), *arguments])
        return tmp_path / "out"

    return go


def test_points_formed_from_exported_depth_and_cameras_lie_on_the_walls_in_metres(run):
    folder = run()
    content = json.loads((folder / "transforms.json").read_text())
    assert [f["split"] for f in content["frames"]] == ["train"] * 3 + ["test"] * 2
    for frame in content["frames"]:
        z = np.load(folder / frame["depth_npy_path"])
        assert z.shape == (frame["h"], frame["w"]) == (72, 96)
        u = (np.arange(96) + 0.5 - frame["cx"]) / frame["fl_x"]
        v = (np.arange(72) + 0.5 - frame["cy"]) / frame["fl_y"]
        local = np.stack([u[None] * z, -v[:, None] * z, -z, np.ones_like(z)], -1)
        points = (local @ np.array(frame["transform_matrix"]).T)[:, 1:, :3]
        np.testing.assert_allclose((np.abs(points) / box_room.HALF).max(-1), 1.0, atol=1e-3)


def test_the_images_of_an_export_are_found_from_anywhere_each_once(run, monkeypatch):
    """Captures of few images are tested on the same; `--data` is often relative."""
    frames = json.loads((run(tests="view") / "transforms.json").read_text())["frames"]
    photos = [str(Path.cwd() / "photos" / f"view{i}.jpg") for i in range(3)]
    assert [frame["file_path"] for frame in frames] == photos
    assert [frame["split"] for frame in frames] == ["train"] * 3
    frames = json.loads((run("--split", "test", tests="view") / "transforms.json").read_text())["frames"]
    assert [frame["file_path"] for frame in frames] == photos[:2]


def test_the_png_holds_whole_millimetres_of_the_same_depth(run):
    folder = run()
    for frame in json.loads((folder / "transforms.json").read_text())["frames"]:
        with Image.open(folder / frame["depth_file_path"]) as file:
            stored = np.array(file)
        assert stored.dtype == np.uint16
        np.testing.assert_allclose(stored / 1000.0, np.load(folder / frame["depth_npy_path"]), atol=5.1e-4)


def test_depth_is_unknown_where_little_light_is_stopped(run):
    folder = run("--split", "test")
    for path in sorted((folder / "depth").glob("*.npy")):
        z = np.load(path)
        assert (z[:, 0] == 0).all()
        assert (z[:, 1:] > 0).all()


def test_expected_depth_can_be_chosen(run, tmp_path):
    median = {p.name: np.load(p) for p in (run() / "depth").glob("*.npy")}
    expected = {p.name: np.load(p) for p in (run("--depth", "expected") / "depth").glob("*.npy")}
    assert len(median) == 5
    for name, z in median.items():
        np.testing.assert_allclose(expected[name], 1.1 * z, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "metadata", "scale", "source"),
    [
        ((), {}, METRES, "prior"),
        ((), {"scene_units_per_metre": 0.5}, 2.0, "capture"),
        (("--metres-per-unit", "3"), {"scene_units_per_metre": 0.5}, 3.0, "by hand"),
    ],
)
def test_the_scale_is_the_captures_own_before_the_priors_and_the_users_before_both(
    run, arguments, metadata, scale, source
):
    content = json.loads((run(*arguments, **metadata) / "transforms.json").read_text())
    assert content["metres_per_scene_unit"] == scale
    assert content["metres_from"] == source


def test_half_the_size_has_half_the_focal_length(run):
    frame = json.loads((run("--downscale", "2") / "transforms.json").read_text())["frames"][0]
    assert (frame["w"], frame["h"], frame["fl_x"], frame["cx"]) == (48, 36, 33.0, 24.0)


@pytest.mark.parametrize(("divisor", "size"), [("5", (19, 14)), ("2.5", (38, 28)), ("0.7", (137, 102))])
def test_a_size_that_does_not_divide_shows_the_whole_image(run, divisor, size):
    frame = json.loads((run("--downscale", divisor) / "transforms.json").read_text())["frames"][0]
    width, height = size
    expected = (width, height, 66.0 * width / 96, 66.0 * height / 72, width / 2, height / 2)
    assert tuple(frame[key] for key in ("w", "h", "fl_x", "fl_y", "cx", "cy")) == pytest.approx(expected)


def test_a_reduction_to_nothing_is_refused(run, capsys):
    with pytest.raises(SystemExit) as stop:
        run("--downscale", "80")
    assert stop.value.code == 2
    assert "--downscale 80: images of 96 x 72 pixels" in capsys.readouterr().err


@pytest.mark.parametrize("known", [True, False])
def test_a_run_without_a_scale_asks_for_one(run, monkeypatch, capsys, known):
    """nerfacto of the benchmark has not even an unknown one."""
    monkeypatch.setattr(ExactModel, "metric_scale", torch.tensor(float("nan")))
    if not known:
        monkeypatch.delattr(ExactModel, "metric_scale")
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == 2
    assert "--metres-per-unit" in capsys.readouterr().err


def test_a_config_that_is_not_there_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        export.main(["--load-config", str(tmp_path / "no.yml"), "--output-dir", str(tmp_path)])
    assert stop.value.code == 2
    assert "no.yml" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{}", "a: [", "!!python/object:no.such.module.Config {}", "\0"])
def test_a_file_that_is_no_runs_config_is_refused_before_anything_is_made(tmp_path, capsys, content):
    (tmp_path / "transforms.json").write_text(content)
    with pytest.raises(SystemExit) as stop:
        export.main(["--load-config", str(tmp_path / "transforms.json"), "--output-dir", str(tmp_path / "out")])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "transforms.json" in message
    assert "expected the config.yml" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("below", ["", "folder"])
def test_a_file_in_the_place_of_the_output_is_refused_before_the_run_is_opened(tmp_path, monkeypatch, capsys, below):
    monkeypatch.setattr("nerfstudio.utils.eval_utils.eval_setup", lambda *_, **__: pytest.fail("opened"))
    (tmp_path / "file").write_text("")
    config, output = str(DATA / "run_config.yml"), str(tmp_path / "file" / below)
    with pytest.raises(SystemExit) as stop:
        export.main(["--load-config", config, "--output-dir", output])
    assert stop.value.code == 2
    assert f"--output-dir {output.rstrip('/')} cannot be made" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [CameraType.FISHEYE, CameraType.EQUIRECTANGULAR])
def test_cameras_without_planar_depth_are_refused(run, capsys, kind):
    with pytest.raises(SystemExit) as stop:
        run(kind=kind)
    assert stop.value.code == 2
    assert "the test images of this run are not all of perspective cameras" in capsys.readouterr().err
    assert len(json.loads((run("--split", "train", kind=kind) / "transforms.json").read_text())["frames"]) == 3


def test_pixels_too_far_for_the_png_are_counted_and_kept_in_the_npy(tmp_path):
    z = np.array([[1.0, 100.0, 0.0]], np.float32)
    assert export.write_depth(tmp_path, "a", z) == 1
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), z)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"metres_per_unit": -1.0}, "--metres-per-unit must be positive"),
        ({"metres_per_unit": float("inf")}, "--metres-per-unit must be positive and finite"),
        ({"downscale": 0.0}, "--downscale must be positive"),
        ({"min_accumulation": float("nan")}, r"--min-accumulation must be in \[0, 1\], found nan"),
        ({"min_accumulation": 1.1}, "--min-accumulation must be in"),
    ],
)
def test_sizes_scales_and_shares_that_cannot_be_are_refused(tmp_path, wrong, words):
    with pytest.raises(InputError, match=words):
        export.ExportDepthConfig(load_config=tmp_path, output_dir=tmp_path, **wrong)


def test_a_stored_run_opens_again(tmp_path):
    """`data/run_config.yml` and the names of its checkpoint's tensors were written by an earlier version.

    A class that moved or was renamed, and a tensor that an old checkpoint does not have, break users' runs.
    """
    config = yaml.load((DATA / "run_config.yml").read_text(), Loader=yaml.Loader)
    assert isinstance(config, TrainerConfig)
    config.pipeline.datamanager.data = box_room.write_transforms(tmp_path / "box")
    config.pipeline.model.prior = str(box_room.write_prior(tmp_path / "prior"))
    made = config.pipeline.setup(device="cpu", test_mode="inference")
    stored = json.loads((DATA / "run_tensors.json").read_text())
    assert {name: list(value.shape) for name, value in made.state_dict().items()} == stored

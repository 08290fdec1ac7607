"""nerfstudio's commands on a small capture without network: train, resume, evaluate, render, view; bad input."""

import copy
import hashlib
import json
import math
import random
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import box_room
import numpy as np
import pytest
import torch
import yaml
from commands import Commands, Finished, environment, script
from nerfstudio.configs.method_configs import all_methods
from nerfstudio.engine.trainer import Trainer, TrainerConfig
from PIL import Image

from diffusionerf_ns import regularizers
from diffusionerf_ns.errors import NonFiniteLossError

STEPS = 4
WIDTH, HEIGHT = 96, 72


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("commands")


@pytest.fixture(scope="module")
def commands(folder) -> Iterator[Commands]:
    server = Commands(folder)
    yield server
    server.close()


@pytest.fixture(scope="module")
def capture(folder) -> Path:
    """transforms.json with true depth; train 0 2 4 5, test 1 3."""
    return box_room.write_transforms(folder / "box")


@pytest.fixture(scope="module")
def llff(folder) -> Path:
    return box_room.write_llff(folder / "llff")


@pytest.fixture(scope="module")
def prior(folder) -> Path:
    return box_room.write_prior(folder / "prior")


def train_arguments(
    data: Path, prior: Path, name: str, *flags: object, method: str = "diffusionerf-tiny", parser: tuple = ()
) -> list[object]:
    """``ns-train`` for few rays and `STEPS` steps, with a checkpoint in the middle; ``flags`` win."""
    # fmt: off
    return [
        "ns-train", method, "--data", data, "--output-dir", "out", "--experiment-name", "box", "--timestamp", name,
        "--vis", "tensorboard", "--max-num-iterations", STEPS, "--steps-per-save", 2,
        "--save-only-latest-checkpoint", "False", "--logging.local-writer.enable", "False",
        "--pipeline.datamanager.train-num-rays-per-batch", 128, "--pipeline.datamanager.stereo-rays-per-batch", 16,
        "--pipeline.model.prior", prior, "--pipeline.model.patch-size", "None",
        "--pipeline.model.score-weight", 1, "--pipeline.model.metric-scale-warmup", 0.0,
        *flags, *(parser or ("few-view-data", "--num-views", 3)),
    ]
    # fmt: on


def run_folder(folder: Path, name: str, method: str = "diffusionerf-tiny") -> Path:
    return folder / "out" / "box" / method / name


def checkpoint(run: Path, step: int) -> dict[str, Any]:
    return torch.load(run / "nerfstudio_models" / f"step-{step:09d}.ckpt", weights_only=True, map_location="cpu")


def checkpoints(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "nerfstudio_models").iterdir())


def digest(root: Path) -> dict[str, str]:
    """What every file below a folder holds."""
    files = (p for p in sorted(root.rglob("*")) if p.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def trained(folder, capture, prior) -> tuple[Path, Finished]:
    """A finished run, made by the installed script itself."""
    done = script(*train_arguments(capture, prior, "first"), folder=folder).ok()
    return run_folder(folder, "first"), done


# Training


def test_training_finds_its_device_and_leaves_config_split_and_checkpoints(trained):
    run, done = trained
    assert checkpoints(run) == ["step-000000002.ckpt", "step-000000003.ckpt"]
    config = yaml.load((run / "config.yml").read_text(), Loader=yaml.Loader)
    assert config.machine.device_type == "cpu"
    split = json.loads((run / "split.json").read_text())
    assert [image["id"] for image in split["train"]] == [0, 4, 5]  # 3 of 0 2 4 5: positions 0, 1.5 -> 2, 3
    assert [image["id"] for image in split["test"]] == [1, 3]
    assert "which images are used" in done.stdout
    assert "matched pixels" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_checkpoints_load_without_pickles(trained):
    run, _ = trained
    for step in (2, 3):
        assert checkpoint(run, step)["step"] == step


def test_a_checkpoint_holds_nothing_of_the_prior(trained, commands, capture, prior, folder):
    run, _ = trained
    flags = ("--pipeline.model.score-weight", 0, "--pipeline.datamanager.stereo-rays-per-batch", 0)
    commands.run(*train_arguments(capture, prior, "no-prior", *flags)).ok()
    without = checkpoint(run_folder(folder, "no-prior"), 3)
    held = checkpoint(run, 3)
    shapes = [{key: value.shape for key, value in c["pipeline"].items()} for c in (held, without)]
    assert shapes[0] == shapes[1]
    assert not [key for key in held["pipeline"] if "prior" in key or "unet" in key or "denoiser" in key]
    assert held["optimizers"].keys() == without["optimizers"].keys()
    sizes = [(r / "nerfstudio_models" / "step-000000003.ckpt").stat().st_size for r in (run, run.parent / "no-prior")]
    assert sizes[0] == pytest.approx(sizes[1], abs=2000)


@pytest.mark.slow
def test_the_full_size_preset_takes_its_steps_without_a_gpu(commands, capture, prior, folder):
    arguments = train_arguments(
        capture, prior, "full", "--pipeline.datamanager.train-num-rays-per-batch", 64, method="diffusionerf"
    )
    arguments[arguments.index("--max-num-iterations") + 1] = 2
    done = commands.run(*arguments).ok()
    assert checkpoints(run_folder(folder, "full", "diffusionerf")) == ["step-000000001.ckpt"]
    assert done.stdout.count("Hash grids run in plain torch") == 1


# Resuming


def counters(state: dict[str, Any]) -> dict[str, Any]:
    """What of optimisers and schedulers does not depend on the drawn rays."""
    return {
        name: (
            {float(entry["step"]) for entry in optimizer["state"].values()},
            [group["lr"] for group in optimizer["param_groups"]],
            state["schedulers"][name]["last_epoch"],
        )
        for name, optimizer in state["optimizers"].items()
    }


def test_a_resumed_run_ends_at_the_step_and_rate_of_an_uninterrupted_one(trained, commands, capture, prior, folder):
    run, _ = trained
    before = digest(run)
    arguments = train_arguments(capture, prior, "resumed", "--load-dir", run / "nerfstudio_models", "--load-step", 2)
    arguments[arguments.index("--max-num-iterations") + 1] = STEPS - 3
    commands.run(*arguments).ok()
    assert checkpoints(run_folder(folder, "resumed")) == ["step-000000003.ckpt"]
    resumed, whole = checkpoint(run_folder(folder, "resumed"), 3), checkpoint(run, 3)
    assert counters(resumed) == counters(whole)
    assert counters(whole)["fields"][0] == {float(STEPS)}
    assert resumed["pipeline"]["_model.metric_scale"] == whole["pipeline"]["_model.metric_scale"]
    assert digest(run) == before, "the first run's folder is not touched"


def make_trainer(folder: Path, capture: Path, prior: Path, steps: int, load: Path | None = None) -> Trainer:
    """A trainer in this process, set up but not started."""
    config: TrainerConfig = copy.deepcopy(all_methods["diffusionerf-tiny"])
    config.output_dir, config.data, config.timestamp = folder, capture, "run"
    config.max_num_iterations, config.steps_per_save, config.save_only_latest_checkpoint = steps, 2, False
    config.vis, config.load_dir = "tensorboard", load
    config.logging.local_writer.enable = False
    config.pipeline.datamanager.data = capture
    config.pipeline.datamanager.train_num_rays_per_batch = 128
    config.pipeline.model.prior, config.pipeline.model.patch_size = str(prior), None
    config.machine.device_type = "cpu"
    config.set_timestamp()
    torch.manual_seed(0)
    random.seed(0)  # the order in which nerfstudio keeps the images
    trainer = config.setup(local_rank=0, world_size=1)
    trainer.setup()
    return trainer


def seed_every_step(monkeypatch) -> None:
    """nerfstudio does not save the state of the random numbers: let each step begin with its own seed."""
    plain = Trainer.train_iteration

    def seeded(self: Trainer, step: int) -> Any:
        torch.manual_seed(step)
        random.seed(step)
        np.random.seed(step)  # noqa: NPY002 - nerfstudio's samplers draw from the global state
        return plain(self, step)

    monkeypatch.setattr(Trainer, "train_iteration", seeded)


def flat(state: object, path: str = "") -> dict[str, object]:
    """A nested state as one dictionary."""
    if isinstance(state, dict | list | tuple):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {k: v for name, value in items for k, v in flat(value, f"{path}/{name}").items()}
    return {path: state}


def test_n_steps_are_k_steps_a_restart_and_the_rest_to_the_bit(tmp_path, capture, prior, monkeypatch):
    seed_every_step(monkeypatch)
    box_room.remember_stereo(monkeypatch)
    n, k = 6, 3
    make_trainer(tmp_path / "whole", capture, prior, n).train()
    # Stopped as a user stops it, after a checkpoint; it was meant to have n steps.
    first = make_trainer(tmp_path / "first", capture, prior, n)
    plain = first.train_iteration

    def interrupted(step: int) -> Any:
        if step == k:
            raise KeyboardInterrupt
        return plain(step)

    first.train_iteration = interrupted  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(KeyboardInterrupt):
        first.train()
    models = first.checkpoint_dir
    assert [p.name for p in models.iterdir()] == [f"step-{k - 1:09d}.ckpt"]
    second = make_trainer(tmp_path / "second", capture, prior, n - k, load=models)
    assert second.pipeline.model.total_steps == n
    second.train()
    whole, resumed = (
        flat(torch.load(p, weights_only=True))
        for p in (
            next((tmp_path / "whole").rglob("step-000000005.ckpt")),
            next((tmp_path / "second").rglob("step-000000005.ckpt")),
        )
    )
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        equal = torch.equal(value, resumed[name]) if isinstance(value, torch.Tensor) else value == resumed[name]
        assert equal, name


# A loss that is not finite


def test_a_loss_that_is_not_finite_stops_training_and_leaves_the_last_checkpoint(tmp_path, capture, prior, monkeypatch):
    trainer = make_trainer(tmp_path, capture, prior, 10)
    plain = regularizers.foreground
    monkeypatch.setattr(regularizers, "foreground", lambda w: plain(w) * (math.nan if trainer.step == 3 else 1.0))
    with pytest.raises(NonFiniteLossError, match="stopped at step 3: foreground_loss is nan"):
        trainer.train()
    assert sorted(p.name for p in trainer.checkpoint_dir.iterdir()) == ["step-000000002.ckpt"]
    saved = torch.load(trainer.checkpoint_dir / "step-000000002.ckpt", weights_only=True)["pipeline"]
    assert all(bool(v.isfinite().all()) for v in saved.values())
    for name, value in trainer.pipeline.named_parameters():
        assert torch.equal(value, saved[name]), f"{name}: the step that failed has not reached the weights"


def test_the_command_says_which_term_is_not_finite_and_keeps_checkpoints(trained, commands, capture, prior, folder):
    run, _ = trained
    before = digest(run)
    # 1e39 is more than float32 can hold.
    flags = ("--load-dir", run / "nerfstudio_models", "--pipeline.model.foreground-weight", 1e39)
    done = commands.run(*train_arguments(capture, prior, "infinite", *flags))
    assert done.message().startswith("Error: training stopped at step 4: foreground_loss is inf.")
    assert "Traceback" not in done.stdout + done.stderr
    assert digest(run) == before
    assert not (run_folder(folder, "infinite") / "nerfstudio_models").exists()


# Evaluation, rendering, viewing, exporting


def test_ns_eval_writes_means_and_the_values_of_each_image(trained, folder):
    run, _ = trained
    done = script("ns-eval", "--load-config", run / "config.yml", "--output-path", "eval.json", folder=folder).ok()
    content = json.loads((folder / "eval.json").read_text())
    results = content["results"]
    images = results["per_image"]
    assert [image["name"] for image in images] == ["images/001.png", "images/003.png"]
    for name in ("psnr", "ssim", "depth_abs_rel", "depth_abs_rel_aligned"):
        assert results[name] == pytest.approx(sum(image[name] for image in images) / 2, rel=1e-4), name
    assert 0.0 < results["psnr"] < 60.0
    assert -1.0 <= results["ssim"] <= 1.0
    assert content["checkpoint"].endswith("step-000000003.ckpt")
    if "lpips" not in results:  # its weights cannot be had: said once, and left out of every image
        assert done.stderr.count("LPIPS with alex is left out of the results") == 1
        assert not any("lpips" in image for image in images)


def test_ns_render_dataset_writes_colour_and_depth_of_every_test_image(trained, commands, folder):
    run, _ = trained
    names = ("rgb", "depth", "gt-rgb", "planar_depth")
    commands.run(
        "ns-render", "dataset", "--load-config", run / "config.yml", "--output-path", "renders", "--split", "test",
        "--rendered-output-names", *names, "--image-format", "png",
    ).ok()  # fmt: skip
    for name in names:
        for image in ("001.png", "003.png"):
            with Image.open(folder / "renders" / "test" / name / image) as picture:
                assert picture.size == (WIDTH, HEIGHT), name
    true = np.asarray(Image.open(folder / "box" / "images" / "001.png"), np.int16)
    assert np.abs(np.asarray(Image.open(folder / "renders" / "test" / "gt-rgb" / "001.png")) - true).max() <= 1


def test_ns_render_interpolates_between_the_test_images(trained, commands, folder):
    run, _ = trained
    commands.run(
        "ns-render", "interpolate", "--load-config", run / "config.yml", "--output-path", folder / "path",
        "--rendered-output-names", "rgb", "depth", "--output-format", "images", "--image-format", "png",
        "--interpolation-steps", 2, "--render-nearest-camera", "True",
    ).ok()  # fmt: skip
    pictures = sorted((folder / "path").glob("*.png"))
    assert len(pictures) >= 2
    with Image.open(pictures[0]) as picture:
        assert picture.size == (3 * WIDTH, HEIGHT), "colour, depth and the nearest training image side by side"


def test_ns_render_goes_round_a_test_camera_in_a_spiral(trained, commands, folder):
    run, _ = trained
    commands.run(
        "ns-render", "spiral", "--load-config", run / "config.yml", "--output-path", folder / "spiral",
        "--rendered-output-names", "rgb", "MedianDepth", "--output-format", "images", "--image-format", "png",
        "--seconds", 0.1,
    ).ok()  # fmt: skip
    pictures = sorted((folder / "spiral").glob("*.png"))
    assert len(pictures) == 2
    with Image.open(pictures[0]) as picture:
        assert picture.size == (2 * WIDTH, HEIGHT)


def test_a_finished_run_is_evaluated_but_not_resumed_when_its_prior_is_gone(commands, llff, prior, folder):
    """The bounds of LLFF give the metric scale through the prior: a finished run has it in its checkpoint."""
    gone = Path(shutil.copytree(prior, folder / "gone"))
    arguments = train_arguments(llff, gone, "llff", parser=("llff-few-view-data", "--num-views", 3))
    commands.run(*arguments).ok()
    shutil.rmtree(gone)
    run = run_folder(folder, "llff")
    assert checkpoint(run, 3)["pipeline"]["_model.metric_scale"].isfinite()
    commands.run("ns-eval", "--load-config", run / "config.yml", "--output-path", "llff.json").ok()
    results = json.loads((folder / "llff.json").read_text())["results"]
    assert {"psnr", "ssim", "llff-regnerf/psnr", "llff-regnerf/ssim"} <= results.keys()
    assert [image["id"] for image in results["per_image"]] == [0, 8]
    resumed = train_arguments(
        llff, gone, "llff-2", "--load-dir", run / "nerfstudio_models", parser=("llff-few-view-data",)
    )
    assert f"no prior '{gone}'" in commands.run(*resumed).message()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_ns_viewer_opens_a_finished_run_and_answers(trained, folder):
    run, _ = trained
    port = free_port()
    command = ["ns-viewer", "--load-config", run / "config.yml", "--viewer.websocket-port", port]
    with (folder / "viewer.log").open("w") as log:
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / command[0]), *map(str, command[1:])],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment(folder),
            cwd=folder,
        )
        try:
            page = b""
            end = time.monotonic() + 600
            while not page and process.poll() is None and time.monotonic() < end:
                time.sleep(0.5)
                try:
                    page = urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=30).read()
                except OSError:
                    continue
            time.sleep(1.0)
            assert process.poll() is None, (folder / "viewer.log").read_text()[-3000:]
            assert b"<html" in page, (folder / "viewer.log").read_text()[-3000:]
        finally:
            process.terminate()
            process.wait(60)
    assert "Traceback" not in (folder / "viewer.log").read_text()


@pytest.mark.slow
def test_ns_export_writes_a_point_cloud(trained, commands, folder):
    run, _ = trained
    commands.run(
        "ns-export", "pointcloud", "--load-config", run / "config.yml", "--output-dir", "cloud", "--num-points", 500,
        "--num-rays-per-batch", 256, "--normal-method", "open3d", "--remove-outliers", "False",
    ).ok()  # fmt: skip
    assert (folder / "cloud" / "point_cloud.ply").stat().st_size > 1000


@pytest.mark.slow
def test_ns_export_writes_a_textured_mesh(trained, commands, folder):
    run, _ = trained
    commands.run(
        "ns-export", "tsdf", "--load-config", run / "config.yml", "--output-dir", "mesh", "--resolution", 24, 24, 24,
        "--target-num-faces", 500, "--num-pixels-per-side", 32,
    ).ok()  # fmt: skip
    assert (folder / "mesh" / "tsdf_mesh.ply").stat().st_size > 1000
    assert "\nf " in (folder / "mesh" / "mesh.obj").read_text(), "faces"
    with Image.open(folder / "mesh" / "material_0.png") as texture:
        assert np.asarray(texture).std() > 0, "a texture that is not blank"


# Bad input


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


def refused(commands: Commands, *arguments: object) -> str:
    """The message of a mistake: one line, after which nothing has begun."""
    done = commands.run(*arguments)
    message = done.message()
    assert message.startswith("Error: "), message
    assert len(message.splitlines()) == 1, message
    assert "Traceback" not in done.stdout + done.stderr
    assert "Training Finished" not in done.stdout
    return message


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


def llff_row_missing(data: Path) -> None:
    np.save(data / "poses_bounds.npy", np.load(data / "poses_bounds.npy")[:-1])


def llff_nan_pose(data: Path) -> None:
    table = np.load(data / "poses_bounds.npy")
    table[3, 7] = np.nan
    np.save(data / "poses_bounds.npy", table)


@pytest.mark.parametrize(
    ("damage", "expected"), [(llff_row_missing, "9 rows, but images_8 holds 10"), (llff_nan_pose, "rows [3] hold NaN")]
)
def test_a_table_of_poses_that_does_not_fit_is_refused_in_one_line(commands, llff, prior, tmp_path, damage, expected):
    data = Path(shutil.copytree(llff, tmp_path / "capture"))
    damage(data)
    before = digest(tmp_path)
    assert expected in refused(commands, *train_arguments(data, prior, "bad"))
    assert digest(tmp_path) == before


def without_spec(folder: Path) -> None:
    (folder / "rgbd.json").unlink()


def with_three_channels(folder: Path) -> None:
    shutil.rmtree(folder)
    box_room.write_prior(folder, in_channels=3, out_channels=3)


def with_other_widths(folder: Path) -> None:
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"block_out_channels": [8, 16]}))


def with_large_patches(folder: Path) -> None:
    shutil.rmtree(folder)
    box_room.write_prior(folder, patch_size=80)  # images are 72 pixels high, at the prior's focal length


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (without_spec, "has no rgbd.json"),
        (with_three_channels, "3 from 3 channels"),
        (with_other_widths, "do not fit"),
        (with_large_patches, "which has only 96 x 72"),
    ],
)
def test_a_prior_that_cannot_be_used_is_refused_before_the_first_step(
    commands, capture, prior, tmp_path, damage, expected
):
    bad = Path(shutil.copytree(prior, tmp_path / "prior"))
    damage(bad)
    # An image patch is rare enough that the first steps would often do without one.
    flags = ("--pipeline.datamanager.image-patch-share", 0.001, "--logging.local-writer.enable", "True")
    message = refused(commands, *train_arguments(capture, bad, "bad-prior", *flags))
    assert expected in message


def test_a_hub_id_without_network_is_refused_in_one_line(commands, capture):
    message = refused(commands, *train_arguments(capture, Path("someone/no-such-prior"), "hub"))
    assert "no folder 'someone/no-such-prior' here" in message
    assert "Check the name and the network" in message


def test_a_run_that_never_began_leaves_no_checkpoint(commands, capture, prior, folder):
    refused(commands, *train_arguments(capture, prior, "never", parser=("few-view-data", "--num-views", 30)))
    assert not list(run_folder(folder, "never").rglob("*.ckpt"))

"""nerfstudio's commands on a small capture without network: train, resume, evaluate, render, view, export."""

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import train_commands
import yaml
from commands import Finished, environment, script
from PIL import Image
from train_commands import STEPS, digest, run_folder, train_arguments

folder, commands = train_commands.folder, train_commands.commands  # fixtures
capture, llff, prior = train_commands.capture, train_commands.llff, train_commands.prior  # fixtures

WIDTH, HEIGHT = 96, 72


def checkpoint(run: Path, step: int) -> dict[str, Any]:
    return torch.load(run / "nerfstudio_models" / f"step-{step:09d}.ckpt", weights_only=True, map_location="cpu")


def checkpoints(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "nerfstudio_models").iterdir())


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

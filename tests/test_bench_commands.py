"""The benchmark as it is run: real trainings and evaluations, and mistakes of its user."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_runs import ENVIRONMENT, fake_result, folder_of_results, make_job, small_prior, wall_capture
from PIL import Image
from torch import nn

from diffusionerf_ns import export
from diffusionerf_ns.bench import cli, results
from diffusionerf_ns.bench.job import git_revision, run
from diffusionerf_ns.bench.jobs import configure, training_hash


def bench(*args: str, timeout: float = 1800) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "diffusionerf_ns.bench.cli", *args]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout)


def real_flags(tmp_path: Path) -> list[str]:
    wall_capture(tmp_path / "wall")
    small_prior(tmp_path / "prior")
    return [
        *("--output", str(tmp_path / "out"), "--data", str(tmp_path / "wall"), "--steps", "6", "--override"),
        f"pipeline.model.prior={tmp_path / 'prior'}",
        "pipeline.datamanager.train-num-rays-per-batch=64",
    ]


@pytest.mark.heavy
def test_a_bench_trains_evaluates_tabulates_and_plots(tmp_path: Path) -> None:
    flags = real_flags(tmp_path)
    done = bench("run", *flags, "--variants", "full", "nerfacto", "--views", "3", "40", "--pictures", "2")
    # 40 views are more than there are: those two jobs fail, with the data parser's own words
    assert done.returncode == 1, done.stdout + done.stderr
    assert "2 of 4 jobs failed" in done.stdout
    failed = json.loads((tmp_path / "out/wall/40-views/full/seed-0/failed.json").read_text())
    assert "40" in failed["message"]
    assert failed["traceback"] is None

    folder = tmp_path / "out/wall/3-views/full/seed-0"
    result = json.loads((folder / "result.json").read_text())
    assert result["protocol"] == "nerfstudio"
    assert len(result["images"]) == 2
    assert {"psnr", "ssim", "depth_abs_rel"} <= set(result["metrics"])
    assert result["metrics"]["psnr"] == pytest.approx(np.mean([i["metrics"]["psnr"] for i in result["images"]]))
    assert [point["step"] for point in result["curve"]] == list(range(6))
    assert any("score_loss" in point for point in result["curve"])
    assert set(result["seconds"]) == {"setup", "train", "evaluate"}
    assert result["peak_memory"]["ram_gb"] > 0.1
    assert result["versions"]["torch"]
    assert (folder / result["config_file"]).is_file()
    with Image.open(folder / result["pictures"][0]["render"]) as image:
        assert image.size == (40, 32)

    assert bench("table", "--results", str(tmp_path / "out")).returncode == 0
    assert "nerfacto" in (tmp_path / "out/table.md").read_text()
    assert bench("plot", "--results", str(tmp_path / "out")).returncode == 0
    with Image.open(tmp_path / "out/plots/sheet-wall-3-views-seed-0.png") as sheet:
        assert sheet.width > 600


@pytest.mark.heavy
def test_variants_that_differ_after_training_only_are_trained_once_and_end_as_if_trained_alone(tmp_path: Path) -> None:
    first, second = "full", "no-refinement"
    if (git_revision() or "").endswith("+changes"):
        pytest.skip("the checkout has changes: trainings are not shared, as nothing says that their code is the same")
    flags = real_flags(tmp_path)
    assert bench("run", *flags, "--variants", first, second).returncode == 0
    whole, shared = (
        json.loads((tmp_path / f"out/wall/3-views/{name}/seed-0/result.json").read_text()) for name in (first, second)
    )
    assert shared["trained_by"] == f"../../{first}/seed-0"
    assert shared["seconds"]["train"] == whole["seconds"]["train"]
    (tmp_path / "out").rename(tmp_path / "both")
    assert bench("run", *flags, "--variants", second).returncode == 0
    alone = json.loads((tmp_path / f"out/wall/3-views/{second}/seed-0/result.json").read_text())
    assert "trained_by" not in alone
    assert alone["images"] == shared["images"]
    assert alone["hash"] == shared["hash"]
    tau = {r["config"]["pipeline"]["model"]["refine_tau"] for r in (whole, shared)}
    assert len(tau) == 2, "each is evaluated as its own configuration says"


def test_only_a_whole_training_of_the_same_weights_is_taken_over(tmp_path: Path) -> None:
    small_prior(tmp_path / "prior")
    full, other = (make_job(tmp_path, variant=name) for name in ("full", "no-refinement"))
    digests = [
        training_hash(configure(job, tmp_path)) for job in (full, other, make_job(tmp_path, variant="geometric"))
    ]
    assert digests[0] == digests[1] != digests[2]
    folder = tmp_path / full.name
    wanted = {"training_hash": digests[0], "git_revision": "abc"}
    content = fake_result(full, "h") | wanted | {"config_file": "run/config.yml"}

    def found(**changes: Any) -> bool:
        results.write_json(folder / results.RESULT_FILE, content | changes)
        return results.same_training(tmp_path / other.name, wanted) is not None

    assert not found(), "there is no checkpoint"
    (folder / "run" / results.CHECKPOINTS).mkdir(parents=True)
    (folder / "run" / results.CHECKPOINTS / "step-000000499.ckpt").touch()
    assert found()
    assert not found(training_hash="another")
    assert not found(git_revision="abd"), "other code"
    assert not found(trained_by="../../a/seed-0")
    assert not found(config_file=None), "the weights there are of another run"


@pytest.mark.heavy
def test_a_bench_killed_at_any_moment_ends_with_the_same_table(tmp_path: Path) -> None:
    """Eight jobs, killed three times at random moments."""
    flags = [*real_flags(tmp_path), "--variants", "photometric", "geometric", "--seeds", "0", "1", "2", "3"]
    assert bench("run", *flags).returncode == 0
    bench("table", "--results", str(tmp_path / "out"))
    expected = (tmp_path / "out/table.md").read_text()
    (tmp_path / "out").rename(tmp_path / "whole")
    for moment in (random.uniform(0.0, 25.0) for _ in range(3)):  # seconds after the first job has begun
        print(f"killed after {moment:.2f} s")
        command = [sys.executable, "-m", "diffusionerf_ns.bench.cli", "run", *flags]
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not list((tmp_path / "out").rglob("log.txt")) and process.poll() is None:
            time.sleep(0.05)
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.wait()
        print(f"{len(list((tmp_path / 'out').rglob('result.json')))} of 8 jobs were done")
    assert bench("run", *flags).returncode == 0
    bench("table", "--results", str(tmp_path / "out"))
    assert (tmp_path / "out/table.md").read_text() == expected


@pytest.mark.heavy
def test_the_cluster_path_gives_the_same_results_with_submitits_local_executor(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    flags = [*real_flags(tmp_path), "--variants", "photometric", "--engine.engine", "submitit-local"]
    done = bench("run", *flags, "--views", "3", "40")
    assert done.returncode == 1, done.stdout + done.stderr
    assert (tmp_path / "out/wall/3-views/photometric/seed-0/result.json").is_file()
    assert "40" in json.loads((tmp_path / "out/wall/40-views/photometric/seed-0/failed.json").read_text())["message"]


def test_a_run_of_nerfacto_opens_as_those_of_ours_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nerfstudio opens it with our data manager, and with an LPIPS network that it was trained without."""
    monkeypatch.setattr("diffusionerf_ns.lpips.LpipsNetworks.distance", lambda *_: None)
    wall_capture(tmp_path / "wall")
    small = {"pipeline.datamanager.train_num_rays_per_batch": 16, "pipeline.model.log2_hashmap_size": 8}
    job = make_job(tmp_path, variant="nerfacto", steps=2, overrides=small)
    result = run(configure(job, tmp_path / "out"), tmp_path / "out", pictures=0)
    monkeypatch.setattr("torchmetrics.image.lpip.LearnedPerceptualImagePatchSimilarity", lambda **_: nn.Linear(1, 1))
    config, output = tmp_path / "out" / result["config_file"], tmp_path / "depth"
    export.main(["--load-config", str(config), "--output-dir", str(output), "--split", "test"])
    frames = json.loads((output / "transforms.json").read_text())["frames"]
    assert len(frames) == len(result["images"])


@pytest.mark.parametrize("command", ["run", "table", "plot"])
def test_a_file_in_the_place_of_an_output_folder_ends_with_a_message_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    (tmp_path / "file").write_text("")
    if command == "run":
        small_prior(tmp_path / "prior")
        flags = ["--data", str(tmp_path / "wall"), "--override", f"pipeline.model.prior={tmp_path / 'prior'}"]
    else:
        flags = ["--results", str(folder_of_results(tmp_path / "out", [make_job(tmp_path)], lambda _: 20.0))]
    with pytest.raises(SystemExit) as stop:
        cli.main([command, *flags, "--output", str(tmp_path / "file" / "folder")])
    assert stop.value.code == 2
    assert f"error: --output {tmp_path / 'file' / 'folder'} cannot be made" in capsys.readouterr().err


def test_mistakes_on_the_command_line_end_with_a_message_and_status_2(tmp_path: Path) -> None:
    done = bench("run", "--output", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "error: nothing to do: give --data" in done.stderr
    assert "Traceback" not in done.stderr

"""The benchmark: jobs as data, what counts as done, failures, locks, tables and plots."""

import csv
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image

from ddm_training.errors import InputError
from diffusionerf_ns.bench import engines, pictures, results, table, variants, worker
from diffusionerf_ns.bench.engines import EngineConfig, worker_environments
from diffusionerf_ns.bench.job import git_revision
from diffusionerf_ns.bench.jobs import Job, config_hash, configure, describe, make_jobs, read_jobs, training_hash
from diffusionerf_ns.bench.plot import draw_plots
from diffusionerf_ns.bench.run import RunConfig, VariantName, parse_overrides, run_benchmark

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def wall_capture(folder: Path, count: int = 10) -> Path:
    """A textured wall 3 m in front of a row of cameras, 40 x 32 pixels, with true depth."""
    width, height, focal = 40, 32, 36.0
    (folder / "images").mkdir(parents=True)
    (folder / "depth").mkdir()
    frames = []
    u, v = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    for i in range(count):
        center = 0.15 * (i - (count - 1) / 2)
        x, y = (u - width / 2) / focal * 3 + center, (v - height / 2) / focal * 3
        color = np.stack([0.5 + 0.4 * np.sin(4 * x), 0.5 + 0.4 * np.sin(5 * y + x), 0.5 + 0.4 * np.cos(3 * x * y)], -1)
        Image.fromarray((255 * color).astype(np.uint8)).save(folder / f"images/{i:03d}.png")
        Image.fromarray(np.full((height, width), 3000, np.uint16)).save(folder / f"depth/{i:03d}.png")
        pose = np.eye(4)
        pose[0, 3] = center
        frame = {"file_path": f"images/{i:03d}.png", "depth_file_path": f"depth/{i:03d}.png"}
        frames.append(frame | {"transform_matrix": pose.tolist()})
    intrinsics = {"fl_x": focal, "fl_y": focal, "cx": width / 2, "cy": height / 2, "w": width, "h": height}
    (folder / "transforms.json").write_text(json.dumps({"camera_model": "OPENCV", **intrinsics, "frames": frames}))
    return folder


def small_prior(folder: Path) -> Path:
    """A prior folder with an untrained network of 16 x 16 patches."""
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    from ddm_training.rgbd import RgbdSpec

    folder.mkdir(parents=True)
    UNet2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).save_pretrained(folder / "unet")
    DDPMScheduler(beta_schedule="squaredcos_cap_v2").save_pretrained(folder / "scheduler")
    RgbdSpec(patch_size=16, focal=36.0, focal_range=(30.0, 40.0), image_size=(40, 32)).save(folder)
    return folder


def fake_result(job: Job, digest: str, **metrics: float) -> dict[str, Any]:
    """A whole result as a job writes it."""
    return {
        "format": results.FORMAT,
        "hash": digest,
        "job": job.to_dict(),
        "dataset": "llff",
        "protocol": "llff-regnerf",
        "image_size": [504, 378],
        "metrics": metrics,
        "images": [{"name": "a.png", "metrics": metrics}],
        "depth_unit": "scene units",
        "pictures": [],
        "steps": 100,
        "seconds": {"setup": 1.0, "train": 5.0, "evaluate": 2.0},
        "peak_memory": {"ram_gb": 1.5},
        "device": "CPU",
        "git_revision": "abc",
        "curve": [{"step": s, "loss": 1.0 / (s + 1), "rgb_loss": 1.0 / (s + 1), "psnr": 10.0 + s} for s in range(5)],
    }


def folder_of_results(root: Path, jobs: list[Job], psnr: Callable[[Job], float | None]) -> Path:
    """A results folder whose jobs have the PSNR that ``psnr`` says; None leaves a job undone."""
    entries = [results.Entry(job=job, hash="h", folder=root / job.name) for job in jobs]
    results.merge_entries(root, entries)
    for entry in entries:
        if (value := psnr(entry.job)) is not None:
            content = fake_result(entry.job, "h", psnr=value, ssim=0.5, lpips_vgg=0.3)
            results.write_json(entry.folder / results.RESULT_FILE, content)
    return root


# Jobs and configurations


def test_the_job_list_is_all_scenes_times_views_times_variants_times_seeds(tmp_path: Path) -> None:
    jobs = make_jobs(
        [tmp_path / "a", tmp_path / "b"], views=[3, "all"], seeds=[0, 1, 2], variant_names=["full", "nerfacto"]
    )
    assert len({job.name for job in jobs}) == len(jobs) == 2 * 2 * 3 * 2
    path = tmp_path / "jobs.json"
    path.write_text(json.dumps([job.to_dict() for job in jobs]))
    assert read_jobs(path) == jobs


def test_bad_job_lists_are_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="different names"):
        make_jobs([tmp_path / "x/fern", tmp_path / "y/fern"], views=[3], seeds=[0], variant_names=["full"])
    with pytest.raises(InputError, match=r"'fast' is unknown; known are photometric.*nerfacto"):
        make_jobs([tmp_path / "a"], views=[3], seeds=[0], variant_names=["fast"])
    path = tmp_path / "jobs.json"
    path.write_text('[{"scene": "a", "colour": 3}]')
    with pytest.raises(InputError, match="known entries"):
        read_jobs(path)
    path.write_text("[")
    with pytest.raises(InputError, match="cannot be read"):
        read_jobs(path)


def make_job(tmp_path: Path, **changes: Any) -> Job:
    overrides = {"pipeline.model.prior": str(tmp_path / "prior"), **changes.pop("overrides", {})}
    content = {"scene": "wall", "data": str(tmp_path / "wall"), "views": 3, "variant": "full", "steps": 500}
    return Job(**(content | changes), overrides=overrides)


def test_variants_change_what_their_names_say_and_nothing_of_the_preset(tmp_path: Path) -> None:
    from diffusionerf_ns.config import diffusionerf_tiny

    before = describe(diffusionerf_tiny.config)
    models = {name: configure(make_job(tmp_path, variant=name), tmp_path).pipeline.model for name in variants.VARIANTS}
    manager = configure(make_job(tmp_path, variant="no-image-patches"), tmp_path).pipeline.datamanager
    weights = ("score_weight", "frustum_weight", "foreground_weight", "distortion_weight")
    assert [getattr(models["photometric"], w) for w in weights] == [0.0] * 4
    assert models["geometric"].score_weight == 0.0
    assert all(getattr(models["geometric"], w) == getattr(models["full"], w) > 0 for w in weights[1:])
    assert models["full"].score_weight > 0
    assert [models[name].refine_tau for name in ("photometric", "geometric", "no-refinement")] == [0.0] * 3
    assert models["full"].refine_tau == models["refinement-only"].refine_tau > 0
    assert models["photometric"].eval_samples_factor == 1
    preset: Any = diffusionerf_tiny.config.pipeline.model
    for name in (*weights, "refine_tau", "eval_samples_factor", "stereo_depth_weight"):
        assert getattr(models["default"], name) == getattr(preset, name)
    scored = ("full", "no-image-patches", "tau-zero", "no-refinement", "no-stereo")
    assert all(models[name].score_weight == 1.0 for name in scored)
    assert models["refinement-only"].score_weight == 0.0
    assert manager.image_patch_share == 0.0
    assert (models["tau-zero"].tau_start, models["tau-zero"].tau_end) == (0.0, 0.0)
    assert describe(diffusionerf_tiny.config) == before


def test_every_variant_can_be_asked_for_on_the_command_line() -> None:
    assert set(get_args(VariantName)) == set(variants.VARIANTS)


def test_nerfacto_has_the_sizes_of_ours_and_neither_prior_nor_camera_optimiser(tmp_path: Path) -> None:
    from nerfstudio.models.nerfacto import NerfactoModel

    changed = {"pipeline.model.num_levels": 7, "pipeline.datamanager.train_num_rays_per_batch": 99}
    ours = configure(make_job(tmp_path, overrides=changed), tmp_path)
    theirs = configure(make_job(tmp_path, overrides=changed, variant="nerfacto"), tmp_path)
    assert theirs.pipeline.model._target is NerfactoModel
    assert theirs.pipeline.model.camera_optimizer.mode == "off"
    for name in ("num_levels", "log2_hashmap_size", "num_nerf_samples_per_ray", "proposal_net_args_list"):
        assert getattr(theirs.pipeline.model, name) == getattr(ours.pipeline.model, name)
    assert theirs.pipeline.model.num_levels == 7
    assert theirs.pipeline.datamanager.train_num_rays_per_batch == 99
    assert theirs.pipeline.datamanager.dataparser == ours.pipeline.datamanager.dataparser
    assert describe(theirs.optimizers) == describe(ours.optimizers)


def test_the_number_of_steps_stretches_every_schedule(tmp_path: Path) -> None:
    config = configure(make_job(tmp_path, steps=200), tmp_path)
    whole = variants.base_config("diffusionerf-tiny")
    ratio = 200 / whole.max_num_iterations
    assert config.max_num_iterations == 200
    assert config.pipeline.model.proposal_warmup == round(whole.pipeline.model.proposal_warmup * ratio)
    for name, group in config.optimizers.items():
        assert group["scheduler"].max_steps == round(whole.optimizers[name]["scheduler"].max_steps * ratio)


def test_the_hash_sees_what_decides_the_result_and_nothing_else(tmp_path: Path) -> None:
    small_prior(tmp_path / "prior")

    def digest(folder: str = "a", **changes: Any) -> str:
        return config_hash(configure(make_job(tmp_path, **changes), tmp_path / folder))

    base = digest()
    assert digest(folder="b") == base
    moved = configure(make_job(tmp_path), tmp_path)
    moved.machine.device_type, moved.vis = "cuda", "viewer"
    assert config_hash(moved) == base
    others = [
        digest(steps=501),
        digest(seed=1),
        digest(views=6),
        digest(variant="geometric"),
        digest(variant="nerfacto"),
        digest(downscale_factor=2),
        digest(overrides={"pipeline.model.score_weight": 2.0}),
    ]
    assert len({base, *others}) == len(others) + 1


def test_the_hash_changes_with_the_content_of_the_prior(tmp_path: Path) -> None:
    from diffusionerf_ns.bench.jobs import prior_hash

    folder = small_prior(tmp_path / "prior")
    before = prior_hash(str(folder), None)
    prior_hash.cache_clear()
    spec = (folder / "rgbd.json").read_text()
    (folder / "rgbd.json").write_text(spec.replace('"steps": 0', '"steps": 1'))
    assert prior_hash(str(folder), None) != before


def test_overrides_are_read_as_json_or_text_and_unknown_ones_are_refused(tmp_path: Path) -> None:
    assert parse_overrides(("pipeline.model.score-weight=2", "a.b=x/y", "c=[1, 2]")) == {
        "pipeline.model.score_weight": 2,
        "a.b": "x/y",
        "c": [1, 2],
    }
    with pytest.raises(InputError, match="PATH=VALUE"):
        parse_overrides(("score",))
    with pytest.raises(InputError, match="no such field"):
        configure(make_job(tmp_path, overrides={"pipeline.model.scroe_weight": 1}), tmp_path)


# Results folders


def test_a_job_is_done_when_its_result_is_whole_and_of_its_hash(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    entry = results.Entry(job=job, hash="h", folder=tmp_path / "job")
    path = entry.folder / results.RESULT_FILE
    assert entry.status() == "missing"
    results.write_json(path, fake_result(job, "h"))
    assert entry.status() == "done"
    path.write_text(path.read_text()[:-20])
    assert entry.status() == "missing"
    worker.write_failure(entry.folder, "no views")
    assert entry.status() == "failed"
    results.write_json(path, fake_result(job, "other"))
    assert entry.status() == "failed"
    assert entry.set_aside()
    assert json.loads((entry.folder / "result.other.json").read_text())["hash"] == "other"
    assert not path.exists()


def test_a_folder_of_another_version_or_of_other_things_is_refused(tmp_path: Path) -> None:
    results.write_json(tmp_path / "old/jobs.json", {"format": "diffusionerf-bench-0", "jobs": []})
    with pytest.raises(InputError, match=r"diffusionerf-bench-0.*reads and writes 'diffusionerf-bench-1'"):
        results.read_entries(tmp_path / "old")
    with pytest.raises(InputError, match="diffusionerf-bench-0"):
        results.merge_entries(tmp_path / "old", [])
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").touch()
    with pytest.raises(InputError, match="other things than results"):
        results.merge_entries(tmp_path / "photos", [])
    with pytest.raises(InputError, match="no results folder"):
        results.read_entries(tmp_path / "photos")
    assert sorted(p.name for p in (tmp_path / "photos").iterdir()) == ["a.jpg"]


def test_two_runs_cannot_write_the_same_folder_and_a_dead_one_leaves_no_lock(tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from diffusionerf_ns.bench.results import lock\n"
    code += "with lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=rf"being written by process {holder.pid} on"), results.lock(tmp_path):
        pass
    holder.kill()
    holder.wait()
    holder.stdout.close()
    with results.lock(tmp_path):
        pass


def test_merging_keeps_jobs_of_earlier_runs_and_renews_those_of_the_same_name(tmp_path: Path) -> None:
    def entry(seed: int, digest: str) -> results.Entry:
        job = make_job(tmp_path, seed=seed)
        return results.Entry(job=job, hash=digest, folder=tmp_path / "out" / job.name)

    results.merge_entries(tmp_path / "out", [entry(0, "a"), entry(1, "a")])
    results.merge_entries(tmp_path / "out", [entry(1, "b"), entry(2, "b")])
    assert [(e.job.seed, e.hash) for e in results.read_entries(tmp_path / "out")] == [(0, "a"), (1, "b"), (2, "b")]


# Engines, with a worker that only pretends

PRETENDER = """
import json, os, sys, time
from pathlib import Path
from diffusionerf_ns.bench import results, worker
worker._end_with_parent()
folder = Path(sys.argv[1])
task = json.loads((folder / worker.TASK_FILE).read_text())
seed = task["job"]["seed"]
(folder / "tries").open("a").write(f"{os.environ.get('OMP_NUM_THREADS')} {os.environ.get('CUDA_VISIBLE_DEVICES')}\\n")
if seed == 13:
    print("about to die"); sys.stdout.flush(); os.kill(os.getpid(), 9)
if seed == 14:
    worker.write_failure(folder, "no views"); sys.exit(1)
time.sleep(0.2)
results.write_json(folder / "result.json", json.loads(sys.argv[2]) | {"hash": task["hash"], "job": task["job"]})
"""


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[int]], list[results.Entry]]:
    """Makes jobs of the given seeds whose worker is `PRETENDER`."""
    script = tmp_path / "pretender.py"
    content = json.dumps(fake_result(make_job(tmp_path), "h", psnr=20.0, ssim=0.5))
    script.write_text(PRETENDER.replace("sys.argv[2]", repr(content)))
    monkeypatch.setattr(engines, "WORKER", (sys.executable, str(script)))

    def make(seeds: list[int]) -> list[results.Entry]:
        jobs = [make_job(tmp_path, seed=seed) for seed in seeds]
        entries = [results.Entry(job=job, hash="h", folder=tmp_path / "out" / job.name) for job in jobs]
        for entry in entries:
            worker.write_task(entry.folder, entry.job, entry.hash, pictures=1)
        return entries

    return make


def test_a_failing_and_a_killed_job_are_recorded_and_the_others_go_on(
    pretend: Callable[[list[int]], list[results.Entry]], tmp_path: Path
) -> None:
    entries = pretend([0, 13, 14, 1])
    ended = {
        e.job.seed: well for e, well in engines.run_entries(entries, EngineConfig(workers=2), tmp_path, lambda: None)
    }
    assert ended == {0: True, 13: False, 14: False, 1: True}
    killed, failed = (json.loads((entries[i].folder / results.FAILED_FILE).read_text()) for i in (1, 2))
    assert "signal 9" in killed["message"]
    assert "about to die" in killed["traceback"]
    assert failed["message"] == "no views"
    assert [e.status() for e in entries] == ["done", "failed", "failed", "done"]


def test_a_worker_ends_when_the_run_that_started_it_is_gone() -> None:
    code = "import time; from diffusionerf_ns.bench.worker import _end_with_parent\n"
    code += "_end_with_parent(); print('on', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "on\n"
    assert process.poll() is None
    process.stdin.close()
    assert process.wait(timeout=20) == 3
    process.stdout.close()


def test_each_gpu_gets_its_worker_and_cpu_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert worker_environments(None, gpus=["2", "5"]) == [{"CUDA_VISIBLE_DEVICES": "2"}, {"CUDA_VISIBLE_DEVICES": "5"}]
    names = [e["CUDA_VISIBLE_DEVICES"] for e in worker_environments(4, gpus=["2", "5"])]
    assert names == ["2", "5", "2", "5"]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(engines, "_cores", lambda: 6)
    assert worker_environments(None, gpus=[]) == [{"OMP_NUM_THREADS": "6"}]
    assert worker_environments(4, gpus=[]) == [{"OMP_NUM_THREADS": "1"}] * 4


def test_running_again_does_only_what_is_missing(
    pretend: Callable[[list[int]], list[results.Entry]], tmp_path: Path
) -> None:
    pretend([])
    small_prior(tmp_path / "prior")
    jobs = [make_job(tmp_path, seed=seed) for seed in (0, 1, 14)]
    failed = run_benchmark(jobs, tmp_path / "out", EngineConfig(workers=2))
    assert [entry.job.seed for entry in failed] == [14]
    tries = {job.seed: tmp_path / "out" / job.name / "tries" for job in jobs}
    (tmp_path / "out" / jobs[1].name / results.RESULT_FILE).unlink()
    run_benchmark(jobs, tmp_path / "out", EngineConfig())
    assert {seed: len(path.read_text().splitlines()) for seed, path in tries.items()} == {0: 1, 1: 2, 14: 2}


def test_a_missing_prior_stops_a_run_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no prior"):
        run_benchmark([make_job(tmp_path)], tmp_path / "out", EngineConfig())
    assert not (tmp_path / "out").exists()


def test_a_dry_run_prints_a_job_list_that_can_be_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RunConfig(output=tmp_path / "out", data=(tmp_path / "a",), seeds=(0, 1), dry_run=True).main()
    path = tmp_path / "jobs.json"
    path.write_text(capsys.readouterr().out)
    assert [job.seed for job in read_jobs(path)] == [0, 1]
    assert not (tmp_path / "out").exists()


# Tables and plots


def test_scenes_weigh_equally_and_the_deviation_is_over_seeds(tmp_path: Path) -> None:
    values = {("fern", 0): 10.0, ("fern", 1): 14.0, ("room", 0): 20.0, ("room", 1): 22.0}
    jobs = make_jobs([Path("fern"), Path("room")], views=[3], seeds=[0, 1], variant_names=["full"])
    rows = [fake_result(job, "h", psnr=values[job.scene, job.seed], ssim=0.5) for job in jobs]
    ((_, (row,)),) = table.summarise_runs(rows).items()
    assert row.means["psnr"].value == pytest.approx((12.0 + 21.0) / 2)
    assert row.means["psnr"].deviation == pytest.approx(math.sqrt(((15.0 - 16.5) ** 2 + (18.0 - 16.5) ** 2) / 1))
    # A seed that only one scene has must not shift the weights of the scenes, nor count in the deviation.
    more = fake_result(Job(scene="fern", data="fern", views=3, variant="full", seed=2), "h", psnr=18.0, ssim=0.5)
    ((_, (row,)),) = table.summarise_runs([*rows, more]).items()
    assert row.means["psnr"].value == pytest.approx((14.0 + 21.0) / 2)
    assert row.means["psnr"].deviation == pytest.approx(math.sqrt(4.5))


def test_runs_of_other_protocols_sizes_or_lengths_are_never_averaged(tmp_path: Path) -> None:
    job = Job(scene="fern", data="fern", views=3, variant="full")
    base = fake_result(job, "h", psnr=10.0, ssim=0.5)
    changed = [base | {"protocol": "nerfstudio"}, base | {"image_size": [252, 189]}, base | {"steps": 50}]
    assert len(table.summarise_runs([base, *changed])) == 4


def test_tables_put_published_numbers_beside_ours_and_name_what_is_missing(tmp_path: Path) -> None:
    jobs = make_jobs([Path("fern"), Path("room")], views=[3], seeds=[0], variant_names=["photometric", "full"])
    missing = jobs[-1]
    root = folder_of_results(tmp_path, jobs, lambda job: None if job == missing else 20.125)
    text = table.write_tables(root, root)
    assert text == (root / "table.md").read_text()
    assert "| **photometric only** | 20.12 | 0.500 | 0.300 | 2 | 1 |" in text
    assert "| DiffusioNeRF (published) | 19.79 | 0.568 | 0.338 |" in text
    assert "Protocol `llff-regnerf`" in text
    assert f"1 of 4 jobs are not in these means: {missing.name} (missing)" in text
    assert "| diffusionerf-tiny | 100 | photometric only | 2 | 5 | 0.05 |" in (root / "times.md").read_text()
    with (root / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["origin"] for row in rows} == {"ours", "published"}
    assert all(row["source"] for row in rows if row["origin"] == "published")
    with (root / "jobs.csv").open() as file:
        assert [row["seconds_train"] for row in csv.DictReader(file)] == ["5.0"] * 3


def test_published_numbers_stand_only_beside_their_own_protocol() -> None:
    job = Job(scene="fern", data="fern", views=3, variant="full")
    setting = next(iter(table.summarise_runs([fake_result(job, "h", psnr=1.0, ssim=0.5)])))
    assert table._peers_of(setting, table.read_peers())
    other = table.Setting(**(vars(setting) | {"protocol": "nerfstudio"}))
    assert table._peers_of(other, table.read_peers()) == []


def test_the_peers_file_holds_every_published_row_with_a_source() -> None:
    peers = table.read_peers()
    assert all(peer.source and peer.metrics for peer in peers)
    found = {(p.method, p.dataset, p.views): p.metrics for p in peers}
    assert found["CAT3D", "dtu", "9"] == {"psnr": 25.92, "ssim": 0.928, "lpips_vgg": 0.073}
    assert found["DiffusioNeRF, tau = 0", "llff", "3"] == {"average": 0.137}
    complete = {p.method for p in peers if "psnr" in p.metrics}
    assert all((m, d, v) in found for m in complete for d in ("llff", "dtu") for v in "369")
    assert {v.ablation for v in variants.VARIANTS.values()} - {None} <= {p.method for p in peers}


def test_a_table_of_nothing_is_refused(tmp_path: Path) -> None:
    root = folder_of_results(tmp_path, [Job(scene="a", data="a", views=3, variant="full")], lambda _: None)
    with pytest.raises(InputError, match="none of its 1 jobs is done"):
        table.write_tables(root, root)


def test_depth_colours_keep_one_range_and_show_unknown_depth_as_black() -> None:
    z = np.array([[1.0, 2.0, 4.0, 0.0]])
    colors = pictures.color_depth(z, (1.0, 4.0))
    assert tuple(colors[0, 3]) == (0, 0, 0)
    assert len({tuple(c) for c in colors[0]}) == 4
    assert (pictures.color_depth(z * 2, (2.0, 8.0)) == colors).all()
    low, high = pictures.depth_limits([np.linspace(1, 5, 101)[None], np.zeros((3, 4))])
    assert (low, high) == pytest.approx((1.08, 4.92))


def test_plots_are_drawn_for_every_scene_and_data_set(tmp_path: Path) -> None:
    jobs = make_jobs([Path("fern")], views=[3, 6], seeds=[0, 1], variant_names=["full", "nerfacto"])
    root = folder_of_results(tmp_path, jobs, lambda job: float(job.views) + job.seed)
    names = [path.name for path in draw_plots(root, root / "plots")]
    assert names == ["psnr-llff.png", "curves-fern-3-views.png", "curves-fern-6-views.png"]
    for name in names:
        with Image.open(root / "plots" / name) as image:
            assert np.asarray(image).std() > 5


# The real commands


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
@pytest.mark.parametrize(("first", "second"), [("full", "no-refinement"), ("geometric", "refinement-only")])
def test_variants_that_differ_after_training_only_are_trained_once_and_end_as_if_trained_alone(
    tmp_path: Path, first: str, second: str
) -> None:
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


def test_mistakes_on_the_command_line_end_with_a_message_and_status_2(tmp_path: Path) -> None:
    done = bench("run", "--output", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "error: nothing to do: give --data" in done.stderr
    assert "Traceback" not in done.stderr

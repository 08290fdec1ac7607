"""Captures, priors, jobs and results of benchmarks, for their tests."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import box_room
import numpy as np
from PIL import Image

from diffusionerf_ns.bench import results
from diffusionerf_ns.bench.jobs import Job

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
    from ddm_training.rgbd import RgbdSpec

    box_room.write_prior(folder, 16, block_out_channels=(8, 16))
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


def make_job(tmp_path: Path, **changes: Any) -> Job:
    overrides = {"pipeline.model.prior": str(tmp_path / "prior"), **changes.pop("overrides", {})}
    content = {"scene": "wall", "data": str(tmp_path / "wall"), "views": 3, "variant": "full", "steps": 500}
    return Job(**(content | changes), overrides=overrides)

"""One training run and its evaluation, in this process: what `diffusionerf-bench` and `make demo` both call.

A job's folder holds::

    result.json          whole or absent: written at the end, in one step
    pictures/NNN_*       of some test images: true image, render, error, depth (colours and values)
    <scene>/<method>/run nerfstudio's own folder: config.yml, checkpoint, TensorBoard events
"""

import os
import platform
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from nerfstudio.engine.trainer import Trainer
from nerfstudio.utils import writer
from torch import Tensor

from ddm_training.errors import InputError
from diffusionerf_ns.bench.jobs import config_hash, describe, prior_hash, training_hash
from diffusionerf_ns.bench.pictures import save_pictures
from diffusionerf_ns.bench.results import CHECKPOINTS, FORMAT, RESULT_FILE, same_training, write_json
from diffusionerf_ns.lpips import LpipsNetworks, no_lpips_download
from diffusionerf_ns.metrics import ProtocolName, evaluate_depth, evaluate_image, has_known_depth, summarise

if TYPE_CHECKING:
    from nerfstudio.engine.trainer import TrainerConfig

OnProgress = Callable[[str, int, int], None]
"""Called with the phase ("train" or "evaluate"), what is done of it, and how much it is."""
LOSS_POINTS = 200  # of a loss curve in a result file


@dataclass(frozen=True)
class TestImage:
    """One test image with what was rendered for it. Depth is planar, in metres where the capture is metric.

    The rendered one is the median along the ray, and so are `depth_abs_rel` and its like in result files.
    """

    name: str
    true: Float[Tensor, "h w 3"]
    rgb: Float[Tensor, "h w 3"]
    depth: Float[Tensor, "h w"]
    true_depth: Float[Tensor, "h w"] | None
    mask: Tensor | None


class RecordingTrainer(Trainer):
    """nerfstudio's trainer, which also keeps the loss curve and says how far it is."""

    def __init__(self, config: "TrainerConfig", on_step: Callable[[int], None]) -> None:
        super().__init__(config)
        self.on_step = on_step
        self.record_every = max(1, config.max_num_iterations // LOSS_POINTS)
        self.curve: list[dict[str, float]] = []

    def train_iteration(self, step: int) -> Any:
        """One step; every some steps the loss terms and the training PSNR go into `curve`."""
        loss, losses, metrics = super().train_iteration(step)
        if step % self.record_every == 0 or step == self.config.max_num_iterations - 1:
            terms = {"loss": loss, **losses, "psnr": metrics["psnr"]}
            self.curve.append({"step": step} | {name: float(value.detach()) for name, value in terms.items()})
        self.on_step(step + 1)
        return loss, losses, metrics


def run(
    config: "TrainerConfig",
    folder: Path,
    *,
    job: dict[str, Any] | None = None,
    pictures: int = 4,
    reuse: bool = False,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Train, evaluate all test images under the capture's protocol, and write ``folder/result.json``.

    Args:
        config: whole configuration; `config.output_dir` says where nerfstudio writes. Its viewer, logging and saving
            settings are changed.
        folder: of the job.
        job: goes into the result as it is.
        pictures: how many test images are saved as pictures, spread evenly.
        reuse: where another job of the same results folder was trained the same to the last bit, take its weights and
            its training time; "trained_by" in the result names it.
        on_progress: called often.

    Returns:
        The content of `result.json`.

    Raises:
        InputError: the capture, the configuration or the prior is not what it should be, or a loss is not finite.
    """
    report = on_progress or (lambda *_: None)
    digest, description = config_hash(config), describe(config)
    device = config.machine.device_type
    made_with = {
        "training_hash": training_hash(config),
        "prior_hash": _prior_hash(config),  # also decides the metric scale of a run that does without a prior
        "device": device_name(device),
        "versions": versions(),
        "git_revision": git_revision(),
    }
    unchanged = not (made_with["git_revision"] or "").endswith("+changes")
    earlier = same_training(folder, made_with) if reuse and unchanged else None
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    clock = _Clock(device)
    trainer = make_trainer(
        config,
        lambda step: report("train", step, config.max_num_iterations),
        None if earlier is None else earlier["checkpoints"],
    )
    clock.lap("setup")
    if earlier is None:
        trainer.train()
    else:  # as training does when it begins
        manager: Any = trainer.pipeline.datamanager
        manager.train_dataparser_outputs.save_dataparser_transform(trainer.base_dir / "dataparser_transforms.json")
    clock.lap("train")
    metadata = trainer.pipeline.datamanager.eval_dataset.metadata  # pyright: ignore[reportOptionalMemberAccess]
    protocol: ProtocolName = metadata.get("protocol", "nerfstudio")
    rows, saved = _evaluate(trainer, protocol, folder, pictures, report)
    clock.lap("evaluate")
    curve, memory = trainer.curve, peak_memory(device)
    if earlier is not None:
        clock.seconds["train"], curve = earlier["seconds"]["train"], earlier["curve"]
        memory = {name: max(value, earlier["peak_memory"].get(name, 0.0)) for name, value in memory.items()}
    result = {
        "format": FORMAT,
        "hash": digest,
        **made_with,
        **({} if earlier is None else {"trained_by": os.path.relpath(earlier["folder"], folder)}),
        "job": job,
        "dataset": metadata.get("source", "unknown"),
        "protocol": protocol,
        "image_size": list(saved["size"]),
        "metrics": summarise([row["metrics"] for row in rows]),
        "images": rows,
        "depth_unit": "metres" if "scene_units_per_metre" in metadata else "scene units",
        "pictures": saved["pictures"],
        "split": metadata.get("split"),
        "steps": config.max_num_iterations,
        "seed": config.machine.seed,
        "seconds": clock.seconds,
        "peak_memory": memory,
        "config_file": os.path.relpath(trainer.base_dir / "config.yml", folder),
        "config": description,
        "curve": curve,
    }
    write_json(folder / RESULT_FILE, result)
    return result


def _prior_hash(config: "TrainerConfig") -> str | None:
    """Of the prior that a configuration names, used or not; None where it names none or it is not there."""
    model: Any = config.pipeline.model
    if not hasattr(model, "prior"):
        return None
    try:
        return prior_hash(model.prior, model.prior_revision)
    except InputError:
        return None


def make_trainer(
    config: "TrainerConfig", on_step: Callable[[int], None] = lambda _: None, weights: Path | None = None
) -> RecordingTrainer:
    """A trainer that is ready to train, seeded, without viewer and evaluation in between; changes ``config``.

    Args:
        config: of the run.
        on_step: called with the number of steps that are done.
        weights: folder of a checkpoint that the trainer takes over, and has in its own folder from then on.
    """
    seed_everything(config.machine.seed)
    _quieten(config)
    trainer = RecordingTrainer(config, on_step)
    config.save_config()
    if weights is not None:
        config.load_dir = trainer.base_dir / CHECKPOINTS
        shutil.copytree(weights, config.load_dir)
    with no_lpips_download():  # also of nerfacto itself
        trainer.setup(test_mode="val")
    return trainer


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch, as `ns-train` does."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  nerfstudio draws from the global generator
    torch.manual_seed(seed)


def _quieten(config: "TrainerConfig") -> None:
    """No viewer, no console table, no evaluation in between, one checkpoint at the end. In place."""
    config.vis = "tensorboard"
    config.logging.local_writer.enable = False
    config.viewer.quit_on_train_completion = True
    never = config.max_num_iterations + 1
    config.steps_per_save = never
    config.steps_per_eval_batch = config.steps_per_eval_image = config.steps_per_eval_all_images = never
    # nerfstudio keeps its writers in module globals: those of an earlier run would get this run's events as well.
    writer.EVENT_WRITERS.clear()
    writer.EVENT_STORAGE.clear()
    writer.GLOBAL_BUFFER.clear()


def _evaluate(
    trainer: Trainer, protocol: ProtocolName, folder: Path, pictures: int, report: OnProgress
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Metrics of each test image; pictures of some."""
    pipeline: Any = trainer.pipeline
    pipeline.eval()
    # As where a checkpoint is evaluated: it does not hold the state of the proposal networks' warm-up. Our own model
    # sees to that itself; nerfacto does not.
    pipeline.model.proposal_sampler.set_anneal(1.0)
    dataset = pipeline.datamanager.eval_dataset
    count = len(dataset)
    chosen = set(np.unique(np.linspace(0, count - 1, min(pictures, count)).round().astype(int)).tolist())
    networks = LpipsNetworks(pipeline.device)
    rows, kept, size = [], [], (0, 0)
    for index in range(count):
        image = render_test_image(pipeline, index)
        size = image.rgb.shape[1], image.rgb.shape[0]
        values = evaluate_image(protocol, image.rgb, image.true, image.mask, networks)
        if image.true_depth is not None and has_known_depth(image.true_depth):
            values |= evaluate_depth(image.depth, image.true_depth)
        rows.append({"name": image.name, "metrics": values})
        if index in chosen:
            kept.append((index, image))
        report("evaluate", index + 1, count)
    return rows, {"size": size, "pictures": save_pictures(folder / "pictures", kept)}


@torch.no_grad()
def render_test_image(pipeline: Any, index: int) -> TestImage:
    """Render the view of a test image.

    Depth is the median depth along the ray, taken to planar depth, and to metres where the capture knows them. Metrics
    of depth in results are of it, for our model and nerfacto alike. True depth is where the data set gives it:
    inside of masks that are trained by, and not where images are transparent.
    """
    dataset = pipeline.datamanager.eval_dataset
    data = dataset[index]
    camera = dataset.cameras[index : index + 1].to(pipeline.device)
    rays = camera.generate_rays(camera_indices=0, keep_shape=True)
    outputs = pipeline.model.get_outputs_for_camera(camera)
    units_per_metre = dataset.metadata.get("scene_units_per_metre", 1.0)
    depth = outputs["depth"] / rays.metadata["directions_norm"] / units_per_metre
    true_depth = data.get("depth_image")
    mask = data.get("mask")
    return TestImage(
        name=Path(dataset.image_filenames[index]).name,
        true=pipeline.model.renderer_rgb.blend_background(data["image"].to(pipeline.device)).cpu(),
        rgb=outputs["rgb"].cpu(),
        depth=depth[..., 0].cpu(),
        true_depth=None if true_depth is None else true_depth[..., 0],
        mask=None if mask is None else mask[..., 0].bool(),
    )


class _Clock:
    """Seconds of each phase."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, phase: str) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[phase] = round(now - self.last, 3)
        self.last = now


def peak_memory(device: str) -> dict[str, float]:
    """Peak memory in GB: of this process, and on the GPU what torch allocated."""
    scale = 1e9 if sys.platform == "darwin" else 1e6  # bytes there, kilobytes elsewhere
    memory = {"ram_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale, 3)}
    if device == "cuda":
        memory["gpu_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
    return memory


def device_name(device: str) -> str:
    """The GPU's name, or the kind of CPU and the number of threads."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Versions of what decides a number."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("diffusionerf-ns", "torch", "nerfstudio", "nerfacc", "tinycudann", "diffusers", "torchmetrics"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_revision() -> str | None:
    """Revision of the checkout that this code runs from, with "+changes" where files differ; None if it is none."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None

"""Everything of the project that runs on CUDA, against the CPU where that is the reference: what, error, time.

Run it through `scripts/gpu_check.sh`. It exits 0 with a plain message where there is no CUDA, and 1 if a check fails.
"""

import contextlib
import gc
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from gpu_compare import compare, losses_and_gradients, relative_error, synchronise, timed, to_device

PRESETS = ("diffusionerf-tiny", "diffusionerf")
# fp32 on both sides; sums run in another order, and a sample can fall into the neighbouring bin of the proposal's CDF.
MAX_LOSS_ERROR = 1e-3
SMALL_TERM = 1e-3  # of the whole loss: errors of smaller terms are relative to this, as one ray's bin is seen in them
MAX_GRADIENT_ERROR = 5e-2
# Convolutions may run in TensorFloat-32: .003 off, emulated on a CPU. In bfloat16 a score at tau = 0 is .3 off.
MAX_SCORE_ERROR = 0.02
LOSS_SCALES = (2.0**12, 2.0**14)  # far from what float16 rounds to 0, and from where it ends
WARM_UP = 10


@dataclass(frozen=True, kw_only=True)
class Check:
    """A line of the table."""

    what: str
    against: str = ""
    error: str = ""
    time: str = ""
    passed: bool = True


@dataclass(frozen=True, kw_only=True)
class GpuCheckConfig:
    """Run both presets on CUDA, compare a step with the CPU's, time steps and the prior."""

    data: Path | None = None
    """Capture to run on; unset: a procedural room is made."""
    prior: str | None = None
    """Prior; unset: the presets' own."""
    steps: int = 300
    """Training steps of each preset."""
    timed_steps: int = 50
    """Steps over which a step is timed."""
    num_views: int | Literal["all"] = 3
    """Training images."""
    output: Path | None = None
    """Keep the runs in this folder; unset: a temporary one."""


class Checks:
    """The checks, on ``device``; the CPU is the reference."""

    def __init__(self, config: GpuCheckConfig, device: str, folder: Path) -> None:
        self.config = config
        self.device = device
        self.folder = folder
        self.data = config.data or self._make_room()

    def _make_room(self) -> Path:
        from ddm_training.rooms import RoomsConfig

        RoomsConfig(output="capture", folder=self.folder / "room", seed=7).main()
        return self.folder / "room"

    def trainer_config(self, preset: str, device: str, name: str, **overrides: Any) -> Any:
        """Configuration of a preset that writes below the folder of the checks."""
        from diffusionerf_ns.bench.jobs import Job, configure

        values = {f"pipeline.model.{key}": value for key, value in overrides.items()}
        if self.config.prior is not None:
            values["pipeline.model.prior"] = self.config.prior
        job = Job(
            scene="scene",
            data=str(self.data),
            views=self.config.num_views,
            variant="full",
            method=preset,
            steps=self.config.steps,
            overrides=values,
        )
        config: Any = configure(job, self.folder / name)
        config.machine.device_type = device
        return config

    def one_step(self, preset: str) -> Check:
        """Loss terms and gradients of one step: same weights, same rays, no jitter, hash grids in plain torch."""
        import torch

        def prepare(device: str) -> Any:
            from diffusionerf_ns.bench.job import make_trainer

            # A given metric scale: the prior is on from the first step.
            config = self.trainer_config(preset, device, f"{preset}-step", implementation="torch", metric_scale=1.0)
            trainer = make_trainer(config)
            model: Any = trainer.pipeline.model
            model.prior.autocast = False
            for sampler in (model.proposal_sampler.initial_sampler, model.proposal_sampler.pdf_sampler):
                sampler.train_stratified = False
            return trainer

        reference, other = prepare("cpu"), prepare(self.device)
        other.pipeline.load_state_dict(reference.pipeline.state_dict())
        bundle, batch = reference.pipeline.datamanager.next_train(0)
        start = time.perf_counter()
        expected = losses_and_gradients(reference.pipeline.model, bundle, batch)
        seconds = time.perf_counter() - start
        bundle = bundle.to(torch.device(self.device))
        # The prior's convolutions shall be float32 too. Unless it is told, `flags` would switch cuDNN off as a whole.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            found = losses_and_gradients(other.pipeline.model, bundle, to_device(batch, self.device))
        floor = SMALL_TERM * float(sum(expected[0].values()))
        loss_error, gradient_error = compare(expected[0], found[0], floor), compare(expected[1], found[1])
        worst = max(gradient_error, key=gradient_error.__getitem__)
        worst_loss = max(loss_error, key=loss_error.__getitem__)
        return Check(
            what=f"{preset}: loss and gradients of a step ({len(expected[0])} terms)",
            against="CPU",
            error=f"{worst_loss} {loss_error[worst_loss]:.1e}, gradient {gradient_error[worst]:.1e} ({worst})",
            time=f"CPU {seconds:.2f} s",
            passed=loss_error[worst_loss] <= MAX_LOSS_ERROR and gradient_error[worst] <= MAX_GRADIENT_ERROR,
        )

    def half_gradients(self, preset: str) -> Check:
        """What float16, in which tinycudann goes back, loses of a step's gradient without a scale of the loss."""
        from diffusionerf_ns.bench.job import make_trainer

        trainer = make_trainer(self.trainer_config(preset, self.device, f"{preset}-half", metric_scale=1.0))
        model: Any = trainer.pipeline.model
        for sampler in (model.proposal_sampler.initial_sampler, model.proposal_sampler.pdf_sampler):
            sampler.train_stratified = False
        bundle, batch = trainer.pipeline.datamanager.next_train(0)
        plain, reference, other = (
            losses_and_gradients(model, bundle, batch, scale)[1] for scale in (1.0, *LOSS_SCALES)
        )
        lost, left = compare(reference, plain), compare(reference, other)
        worst = max(lost, key=lost.__getitem__)
        return Check(
            what=f"{preset}: gradients in {model.config.implementation} with the loss as it is",
            against=f"loss x {LOSS_SCALES[0]:g}",
            error=f"{lost[worst]:.1e} ({worst}); x {LOSS_SCALES[1]:g} {max(left.values()):.1e}",
            time=f"training scales: {trainer.grad_scaler.is_enabled()}",
            passed=max(left.values()) <= MAX_GRADIENT_ERROR
            and trainer.grad_scaler.is_enabled() == (model.config.implementation == "tcnn"),
        )

    def training(self, preset: str) -> Check:
        """A whole run with its evaluation."""
        import torch

        from diffusionerf_ns.bench.job import run

        name = f"{preset}-run"
        gc.collect()  # trainers of earlier checks: the memory shown shall be this one's
        torch.cuda.empty_cache()
        result = run(self.trainer_config(preset, self.device, name), self.folder / name, pictures=1)
        psnr = [point["psnr"] for point in result["curve"]]
        return Check(
            what=f"{preset}: {result['steps']} steps, {len(result['images'])} test images",
            against="its own start",
            error=f"training PSNR {psnr[0]:.1f} -> {psnr[-1]:.1f}, test {result['metrics']['psnr']:.2f} dB",
            time=f"{result['seconds']['train']:.0f} s, {result['peak_memory'].get('gpu_gb', 0):.2f} GB",
            passed=psnr[-1] > psnr[0],
        )

    def step_times(self, preset: str) -> Check:
        """Mean time of a step with and without the prior."""
        without = self._step_seconds(preset, score_weight=0.0)
        with_prior = self._step_seconds(preset, metric_scale=1.0)
        return Check(
            what=f"{preset}: a step with and without the prior",
            error=f"x {with_prior / without:.2f}",
            time=f"{1e3 * with_prior:.1f} and {1e3 * without:.1f} ms",
        )

    def _step_seconds(self, preset: str, **overrides: Any) -> float:
        from nerfstudio.engine.callbacks import TrainingCallbackLocation

        from diffusionerf_ns.bench.job import make_trainer

        trainer = make_trainer(self.trainer_config(preset, self.device, f"{preset}-time", **overrides))
        trainer.pipeline.train()
        start = 0.0
        for step in range(WARM_UP + self.config.timed_steps):
            if step == WARM_UP:
                synchronise(self.device)
                start = time.perf_counter()
            for callback in trainer.callbacks:
                callback.run_callback_at_location(step, TrainingCallbackLocation.BEFORE_TRAIN_ITERATION)
            trainer.train_iteration(step)
            for callback in trainer.callbacks:
                callback.run_callback_at_location(step, TrainingCallbackLocation.AFTER_TRAIN_ITERATION)
        synchronise(self.device)
        return (time.perf_counter() - start) / self.config.timed_steps

    def prior(self) -> list[Check]:
        """The prior's network against the CPU's, at the noise levels with which a run begins and ends."""
        import torch

        from diffusionerf_ns.prior import PatchPrior

        source = self.trainer_config(PRESETS[0], self.device, "prior").pipeline.model.prior
        reference, other = PatchPrior.load(source, device="cpu"), PatchPrior.load(source, device=self.device)
        reference.autocast = False
        size = reference.spec.patch_size
        # A smooth patch: its noise at tau = 0 is small, and lost where a network rounds much.
        ramp = torch.linspace(-0.8, 0.8, size)
        x = torch.stack([ramp.expand(size, size), ramp[:, None].expand(size, size)] * 2)[None].contiguous()
        there = x.to(self.device)
        checks = []
        for tau in (0.1, 0.0):
            expected = reference.score(x, tau)
            for _ in range(WARM_UP):  # until the calls are replayed from a CUDA graph
                other.score(torch.randn_like(there), tau, replay=True)
            error = relative_error(expected, other.score(there, tau, replay=True))
            plain = timed(partial(other.score, there, tau), self.device, self.config.timed_steps)
            seconds = timed(partial(other.score, there, tau, replay=True), self.device, self.config.timed_steps)
            recorded = len(other.graph) == 1 or not there.is_cuda
            checks.append(
                Check(
                    what=f"prior {source!r}: score at tau = {tau:g}, one {size} x {size} patch",
                    against="CPU float32",
                    error=f"{error:.1e}",
                    time=f"{1e3 * seconds:.2f} ms replayed, {1e3 * plain:.2f} called",
                    passed=error <= MAX_SCORE_ERROR and recorded,
                )
            )
        return checks

    def completion(self) -> Check:
        """Samples for the completion network: membranes against the CPU's, and a batch with made-up matches."""
        import torch

        from ddm_training.completion_data import make_samples
        from ddm_training.membrane import interpolate_batch

        g = torch.Generator().manual_seed(0)
        rgb = torch.nn.functional.interpolate(torch.rand(64, 3, 12, 16, generator=g), scale_factor=4, mode="bilinear")
        depth = 1.0 + torch.nn.functional.interpolate(torch.rand(64, 1, 3, 4, generator=g), size=(48, 64))[:, 0]
        known = torch.where(torch.rand(64, 48, 64, generator=g) < 0.2, depth, 0.0)
        error = relative_error(
            interpolate_batch(rgb, known), interpolate_batch(rgb.to(self.device), known.to(self.device))
        )
        cut = {
            "color": (255 * torch.rand(64, 96, 128, 3, generator=g)).byte(),
            "depth": torch.nn.functional.interpolate(depth[:, None], size=(96, 128))[:, 0].half(),
            "mask": torch.rand(64, 96, 128, generator=g) < 0.9,
            "focal": torch.full((64,), 88.0),
        }
        cut = to_device(cut, self.device)
        generator = torch.Generator(self.device).manual_seed(0)
        samples = make_samples(generator, cut, augment=True)
        whole = all(bool(samples[name].isfinite().all()) for name in ("rgb", "known", "base", "z"))
        share = float((samples["known"] > 0).float().mean())
        seconds = timed(lambda: make_samples(generator, cut, augment=True), self.device, 5)
        return Check(
            what=f"samples for the completion network: membranes; 64 with made-up matches ({share:.2f} of the pixels)",
            against="CPU",
            error=f"{error:.1e}",
            time=f"{1e3 * seconds:.1f} ms",
            passed=error <= MAX_LOSS_ERROR and whole and 0.01 < share < 0.99,
        )

    def denoiser(self) -> Check:
        """`ddm train` with its validation, and its patches against the CPU's."""
        from ddm_training.frames import open_store
        from ddm_training.patches import PatchConfig, PatchSampler, Stream, make_patches
        from ddm_training.rooms import RoomsConfig
        from ddm_training.train import TrainConfig, train
        from ddm_training.unet import load_unet

        store = self.folder / "store"
        RoomsConfig(folder=store, seed=7, num_rooms=2, num_views=2, val_every=2, width=128).main()
        sampler = PatchSampler([open_store(store)], PatchConfig(focal_range=(70.0, 130.0)))
        windows = sampler.windows(seed=0, stream=Stream.STATISTICS, step=0, first=0, count=192)
        on_device = to_device(windows, self.device)
        expected, found = make_patches(windows, 48, sampler.canvas), make_patches(on_device, 48, sampler.canvas)
        error = max(compare(expected, found).values())
        seconds = timed(lambda: make_patches(on_device, 48, sampler.canvas), self.device, 5)
        output = Path(tempfile.mkdtemp(prefix="denoiser-", dir=self.folder))  # an earlier one would be gone on with
        train(
            TrainConfig(
                data=(store,),
                output_dir=output,
                focal=88.0,
                focal_range=(70.0, 130.0),
                max_train_steps=4,
                train_batch_size=8,
                validation_patches=4,
                num_validation_samples=2,
                validation_steps=2,
                device="cpu" if self.device == "cpu" else "auto",
            )
        )
        whole = all(bool(p.isfinite().all()) for p in load_unet(output / "prior").parameters())
        return Check(
            what="ddm train: 192 patches; 4 steps with validation and export",
            against="CPU",
            error=f"{error:.1e}",
            time=f"{1e3 * seconds:.1f} ms",
            passed=error <= MAX_LOSS_ERROR and whole,
        )


def run_checks(config: GpuCheckConfig, device: str, folder: Path) -> list[Check]:
    """All checks; one that raises is a failed line, and the others go on. Their own output goes to log.txt."""
    checks = Checks(config, device, folder)
    todo: list[tuple[str, Callable[[], Check | list[Check]]]] = [
        ("prior", checks.prior),
        ("completion", checks.completion),
        ("denoiser", checks.denoiser),
    ]
    for preset in PRESETS:
        todo.append((f"{preset}: one step", lambda preset=preset: checks.one_step(preset)))
        todo.append((f"{preset}: gradients in half", lambda preset=preset: checks.half_gradients(preset)))
        todo.append((f"{preset}: time of a step", lambda preset=preset: checks.step_times(preset)))
        todo.append((f"{preset}: training", lambda preset=preset: checks.training(preset)))
    lines: list[Check] = []
    for what, check in todo:
        print(f"{what} ...", flush=True)
        with (folder / "log.txt").open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            try:
                done = check()
            except Exception as error:
                traceback.print_exc()
                summary = str(error).splitlines()[0] if str(error) else ""
                done = Check(what=what, error=f"{type(error).__name__}: {summary}"[:160], passed=False)
        lines += done if isinstance(done, list) else [done]
    return lines


def show(checks: list[Check], title: str) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", "against", "error", "time", "", title=title)
    for check in checks:
        table.add_row(check.what, check.against, check.error, check.time, "ok" if check.passed else "[red]FAILED")
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def main() -> int:
    """Entry point; the exit status."""
    try:
        import torch
    except ImportError as error:
        print(f"torch cannot be imported ({error}): nothing was checked.")
        return 1
    import tyro

    config = tyro.cli(GpuCheckConfig)
    if not torch.cuda.is_available():
        print("There is no CUDA device here: nothing to check.")
        return 0
    from nerfstudio.utils.external import TCNN_EXISTS

    tcnn = "with tinycudann" if TCNN_EXISTS else "without tinycudann"
    title = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {tcnn}"
    with contextlib.ExitStack() as stack:
        if config.output is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            folder = config.output
            folder.mkdir(parents=True, exist_ok=True)
        checks = run_checks(config, "cuda", folder)
        show(checks, title)
        failed = [check for check in checks if not check.passed]
        if failed:
            print((folder / "log.txt").read_text()[-6000:])
            print(f"{len(failed)} of {len(checks)} checks failed.")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())

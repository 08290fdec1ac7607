"""The training loop, whatever is trained. Running the same command again goes on where the last run ended.

The state of a training is tensors and one integer: samples, noise and learning rate are functions of the step alone.
`train` (the denoiser of patches) and `train_completion` say what is trained: a `Task`.
"""

import copy
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ddm_training.errors import InputError
from ddm_training.loop_config import LoopConfig, settings
from ddm_training.objective import learning_rate, update_average

Config = TypeVar("Config", bound=LoopConfig)


@runtime_checkable
class Validation(Protocol):
    """What is measured, and exported, of the averaged weights."""

    @property
    def folder(self) -> Path:
        """Where it exports to."""
        ...

    def run(self, average: Any, step: int) -> dict[str, Any]:
        """Export; "val_loss", "val" (name -> measure -> value) and perhaps a picture "sheet"."""
        ...


@runtime_checkable
class Task(Protocol):
    """What is trained."""

    identity: Mapping[str, Any]
    """Settings without which saved weights mean nothing, see `checkpoints.load_checkpoint`."""
    frames: int
    """Frames of the training data."""
    unit: str
    """What a sample is called, in the plural."""

    def make_network(self) -> nn.Module:
        """Freshly initialised; called with the seed set."""
        ...

    def wrap(self, network: Any) -> nn.Module:
        """The network as `loss` calls it, with its precision."""
        ...

    def draw(self, *, step: int, first: int, count: int) -> dict[str, Tensor]:
        """Training samples ``first`` ... ``first + count - 1`` of a step: a pure function of these and the seed.

        Called in the loader's processes.
        """
        ...

    def prepare(self, batch: dict[str, Tensor], *, step: int, first: int) -> dict[str, Tensor]:
        """What of the drawing is better done for a whole batch on the device of the model, as pure as `draw`."""
        ...

    def loss(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """Of one batch, on the device of the model."""
        ...

    def validation(self, device: torch.device, world: int) -> Validation:
        """Made once, by the process that validates."""
        ...

    def finish(self, validation: Any) -> None:
        """After the last step, in the process that validates."""
        ...


class StepBatches(Dataset):
    """The batches of one process as a map from step to batch, for a DataLoader whose sampler is a range of steps.

    Args:
        draw: gives samples ``first`` ... ``first + count - 1`` of a step, called with these three by name.
        steps: in all.
        batch_size: of each process.
        rank: of this process.
    """

    def __init__(self, draw: Callable[..., dict[str, Tensor]], *, steps: int, batch_size: int, rank: int = 0) -> None:
        self.draw, self.steps, self.batch_size = draw, steps, batch_size
        self.first = rank * batch_size

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        return self.draw(step=step, first=self.first, count=self.batch_size)


class StopRequest:
    """True once the time is over or the process was asked to end (SIGTERM, SIGINT, as clusters and people do)."""

    def __init__(self, minutes: float | None) -> None:
        self._end = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self._signal = False
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
        else:
            self._previous = {}

    def _on_signal(self, number: int, frame: object) -> None:
        if self._signal:  # asked twice: do not wait for the step to end
            raise KeyboardInterrupt
        self._signal = True

    def __bool__(self) -> bool:
        return self._signal or time.monotonic() > self._end

    @property
    def seconds_left(self) -> float:
        return self._end - time.monotonic()

    def restore(self) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def _ignore_signals(worker: int) -> None:
    """The training process alone decides when to end; its workers go with it."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def make_loader(config: LoopConfig, batches: Dataset, start: int) -> Iterator[Any]:
    """Batches from step ``start`` on, prepared ahead by worker processes."""
    from torch.utils.data import DataLoader

    workers = config.dataloader_num_workers
    return iter(
        DataLoader(
            batches,
            batch_size=None,
            sampler=range(start, config.max_train_steps),
            num_workers=workers,
            prefetch_factor=2 if workers else None,
            worker_init_fn=_ignore_signals,
            pin_memory=torch.cuda.is_available() and config.device == "auto",
        )
    )


def make_accelerator(config: LoopConfig) -> Any:
    """The devices that the training was started on.

    The loop has its own mixed precision, see `Task.wrap`, and one optimiser step a batch: what a saved configuration of
    accelerate says of these must not change a training behind its flags.

    Raises:
        InputError: that configuration asks for gradient accumulation.
    """
    from accelerate import Accelerator

    if (count := os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")) != "1":
        raise InputError(
            f"accelerate is configured for {count} gradient accumulation steps, this training makes 1: set that in its "
            "configuration or by accelerate launch --gradient_accumulation_steps 1, and raise --train-batch-size."
        )
    return Accelerator(cpu=config.device == "cpu" or not torch.cuda.is_available(), mixed_precision="no")


def emulates_bf16(device: torch.device) -> bool:
    """Whether bf16 is there but slow: on NVIDIA GPUs before Ampere."""
    return device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)


def run_loop(config: Config, open_task: Callable[[Config], Task]) -> None:
    """Train, validate, checkpoint and export as ``config`` says.

    Args:
        config: of the training.
        open_task: opens the data; called once the device is chosen, with the settings that are right for it.

    Raises:
        InputError: bad stores, flags or settings of accelerate, a checkpoint that does not fit, a full disk, or a loss
            that is not finite.
    """
    from ddm_training.checkpoints import (
        find_checkpoint,
        load_checkpoint,
        remove_leftovers,
        save_checkpoint,
        set_aside_later,
    )
    from ddm_training.plots import CURVES_FILE, plot_training
    from ddm_training.progress import LOG_FILE, Journal, writing

    accelerator = make_accelerator(config)
    device, chief, world = accelerator.device, accelerator.is_main_process, accelerator.num_processes
    notes = []
    if config.mixed_precision == "bf16" and emulates_bf16(device):
        config = replace(config, mixed_precision="no")
        notes.append("this GPU has no bf16 of its own and would emulate it slowly: --mixed-precision no is used")
    task = open_task(config)
    validation = task.validation(device, world) if chief else None

    torch.manual_seed(config.seed)
    network = task.make_network().to(device)
    average = copy.deepcopy(network).requires_grad_(False)
    adam: Any = {"betas": (config.adam_beta1, config.adam_beta2), "weight_decay": config.adam_weight_decay}
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, **adam, fused=True)
    start, notes = 0, [f"{task.frames:,} frames, {world} process(es) on {device.type}", *notes]
    if chief:
        with writing(config.output_dir):
            config.output_dir.mkdir(parents=True, exist_ok=True)
            remove_leftovers(config.output_dir)
    if found := find_checkpoint(config.output_dir, config.resume_from_checkpoint):
        state, differing = load_checkpoint(found, settings(config), task.identity)
        try:
            network.load_state_dict(state["model"])
            average.load_state_dict(state["ema"])
            optimizer.load_state_dict(state["optimizer"])
            for group in optimizer.param_groups:  # which the saved ones have replaced
                group |= adam
        except (RuntimeError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            newer = [f"--{k.replace('_', '-')}" for k in task.identity if differing.get(k, (True, None))[0] is None]
            hint = f"give {', '.join(newer)}, which its settings lack, as it was made, or " if newer else ""
            raise InputError(
                f"{found} holds the weights of another network ({reason}): {hint}use another --output-dir."
            ) from error
        start = int(state["step"])
        notes.append(f"resuming from {found.name}")
        notes += [f"--{k.replace('_', '-')} is {now}, was {was}" for k, (was, now) in sorted(differing.items())]
        if chief and (aside := set_aside_later(config.output_dir, start, config.output_dir / LOG_FILE)):
            notes.append(f"{', '.join(path.name for path in aside)} set aside, with the log so far: {aside[0].parent}")

    forward: Any = torch.compile(network) if config.torch_compile else network
    model = accelerator.prepare(task.wrap(forward))
    journal = (
        Journal(config, start=start, unit=task.unit, samples_per_step=config.train_batch_size * world)
        if chief
        else None
    )
    for note in notes if journal else []:
        journal.say(note)  # pyright: ignore[reportOptionalMemberAccess]

    def save(step: int) -> None:
        if not all(p.isfinite().all() for p in network.parameters()):
            raise InputError(f"weights are not finite after step {step}: training stopped, nothing was saved.")
        if chief:
            state = {"model": network.state_dict(), "ema": average.state_dict(), "optimizer": optimizer.state_dict()}
            limit = config.checkpoints_total_limit
            save_checkpoint(config.output_dir, step, state, settings(config), limit=limit)
        accelerator.wait_for_everyone()

    def validate_now(step: int) -> None:
        if validation and journal:
            journal.validation(step, validation.run(average, step))
            with writing(curves := validation.folder / CURVES_FILE):
                plot_training(curves, journal.path)

    stop = StopRequest(config.max_train_minutes)
    step, saved, rate = start, start, 0.0
    pending: list[Tensor] = []
    loader: Any = None

    def end_loading() -> None:
        nonlocal loader
        loader = None  # ends its workers, but for one that misses the word
        end_workers()

    with ExitStack() as ends_with:  # the last one first, and each of them whatever happens in another
        ends_with.callback(accelerator.end_training)
        if journal:
            ends_with.enter_context(journal)
        ends_with.callback(end_loading)
        ends_with.callback(stop.restore)
        batches = StepBatches(
            task.draw,
            steps=config.max_train_steps,
            batch_size=config.train_batch_size,
            rank=accelerator.process_index,
        )
        loader = make_loader(config, batches, start)
        waited = 0.0
        while step < config.max_train_steps:
            before = time.perf_counter()
            batch = {k: v.to(device, non_blocking=True) for k, v in next(loader).items()}
            waited += time.perf_counter() - before
            batch = task.prepare(batch, step=step, first=batches.first)

            for group in optimizer.param_groups:
                group["lr"] = rate = learning_rate(
                    step,
                    peak=config.learning_rate,
                    warmup=config.lr_warmup_steps,
                    total=config.max_train_steps if config.lr_scheduler == "cosine" else None,
                )
            loss = task.loss(model, batch)
            accelerator.backward(loss)
            norm = nn.utils.clip_grad_norm_(network.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            update_average(average, network, step, config.ema_decay)
            pending.append(torch.stack([loss.detach(), norm]))
            step += 1

            ends = step == config.max_train_steps or agreed(stop, step, accelerator)
            checkpoint = ends or step % config.checkpointing_steps == 0
            validate = step % config.validation_steps == 0 or step == config.max_train_steps
            if checkpoint or validate or step % config.logging_steps == 0:
                statistics = reduce_statistics(pending, step, accelerator)
                if journal:
                    journal.tick(step, **statistics, lr=rate, waited=waited, stop=stop)
                pending, waited = [], 0.0
            if checkpoint:
                save(step)
                saved = step
            if validate:
                validate_now(step)
                accelerator.wait_for_everyone()
            if ends:
                break
        if validation and journal:
            if step == start or (step % config.validation_steps and step < config.max_train_steps):
                validate_now(step)
            done = step >= config.max_train_steps
            journal.say(
                f"{'finished' if done else 'stopped'} at step {step}, checkpoint-{saved}, "
                f"exported to {validation.folder}" + ("" if done else f"; run {again(config)} to go on")
            )
            if done:
                task.finish(validation)


def again(config: LoopConfig) -> str:
    """What to run to go on: a named checkpoint would begin at that one once more."""
    named = config.resume_from_checkpoint != "latest"
    return "the same command again" + (", but without --resume-from-checkpoint," if named else "")


def end_workers() -> None:
    """Kill what is left of the loader's workers: they ignore SIGTERM, and Python would wait for them for ever."""
    for worker in multiprocessing.active_children():
        worker.join(timeout=1.0)
        worker.kill()


def agreed(stop: StopRequest, step: int, accelerator: Any) -> bool:
    """Whether to end after this step, the same answer in every process; several of them ask each other seldom."""
    if accelerator.num_processes == 1:
        return bool(stop)
    if step % 10:
        return False
    return bool(accelerator.reduce(torch.tensor(float(bool(stop)), device=accelerator.device), "sum") > 0)


def reduce_statistics(pending: list[Tensor], step: int, accelerator: Any) -> dict[str, float]:
    """Mean loss and gradient norm of the steps since the last call, over all processes.

    Raises:
        InputError: one of them is not finite; called before each checkpoint, so that none holds such weights.
    """
    rows = torch.stack(pending).float()
    if accelerator.num_processes > 1:
        rows = accelerator.reduce(rows, "mean")
    finite = torch.isfinite(rows).all(dim=1)
    if not finite.all():
        bad = step - len(pending) + int((~finite).nonzero()[0])
        raise InputError(
            f"loss {rows[bad - step, 0]:g}, gradient norm {rows[bad - step, 1]:g} at step {bad + 1}: training stopped; "
            "the last checkpoint is from before it. Lower --learning-rate or use --mixed-precision no, and run again."
        )
    loss, norm = rows.mean(dim=0).tolist()
    return {"loss": loss, "grad_norm": norm}

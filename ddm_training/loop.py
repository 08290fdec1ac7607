"""The training loop, whatever is trained. Running the same command again goes on where the last run ended.

The state of a training is tensors and one integer: samples, noise and learning rate are functions of the step alone.
`train` (the denoiser of patches) and `train_completion` say what is trained: a `Task`.
"""

import copy
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ddm_training.errors import InputError
from ddm_training.files import exclusive
from ddm_training.loading import Loader, StepBatches, WorkerKilledError
from ddm_training.loop_config import LoopConfig, settings
from ddm_training.objective import learning_rate, update_average
from ddm_training.stopping import StopRequest

if TYPE_CHECKING:
    from ddm_training.progress import Journal

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

    command: str
    """What `ddm` calls the training."""
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


def make_accelerator(config: LoopConfig) -> Any:
    """The devices that the training was started on.

    The loop has its own mixed precision, see `Task.wrap`, and one optimiser step a batch: what a saved configuration of
    accelerate says of these must not change a training behind its flags.

    Raises:
        InputError: that configuration asks for gradient accumulation, or to spread the weights over devices.
    """
    from accelerate import Accelerator

    for name, what in _SPREADING.items():
        if os.environ.get(name, "").lower() in ("1", "true", "t", "yes", "y", "on"):
            raise InputError(
                f"accelerate is configured for {what} ({name}), this training knows one device, or several with all "
                "weights on each: choose that in its configuration (accelerate config), or unset the variable."
            )
    if (count := os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")) != "1":
        raise InputError(
            f"accelerate is configured for {count} gradient accumulation steps, this training makes 1: set that in its "
            "configuration or by accelerate launch --gradient_accumulation_steps 1, and raise --train-batch-size."
        )
    accelerator = Accelerator(cpu=config.device == "cpu" or not torch.cuda.is_available(), mixed_precision="no")
    if (kind := accelerator.distributed_type.value) not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise InputError(
            f"accelerate is configured for {kind}, this training knows NO, MULTI_CPU and MULTI_GPU: choose one of "
            "those in its configuration (accelerate config)."
        )
    return accelerator


_SPREADING = {  # variables by which accelerate's launcher asks for it
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism of its own",
}


def emulates_bf16(device: torch.device) -> bool:
    """Whether bf16 is there but slow: on NVIDIA GPUs before Ampere."""
    return device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)


@dataclass(frozen=True)
class Weights:
    """What a training changes, and its checkpoints hold."""

    network: nn.Module
    average: nn.Module
    """Moving average of the network's weights."""
    optimizer: torch.optim.Optimizer

    def state_dict(self) -> dict[str, Any]:
        """Of all three."""
        return {
            "model": self.network.state_dict(),
            "ema": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Of all three; the optimiser's settings become the saved ones.

        Raises:
            RuntimeError, ValueError, KeyError: it is of another network.
        """
        self.network.load_state_dict(state["model"])
        self.average.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])


def adam_settings(config: LoopConfig) -> dict[str, Any]:
    """Those of AdamW that a resumed training takes from its flags."""
    return {"betas": (config.adam_beta1, config.adam_beta2), "weight_decay": config.adam_weight_decay}


def make_weights(config: LoopConfig, task: Task, device: torch.device) -> Weights:
    """Freshly initialised ones, by the seed."""
    torch.manual_seed(config.seed)
    network = task.make_network().to(device)
    average = copy.deepcopy(network).requires_grad_(False)
    adam = adam_settings(config)
    return Weights(
        network, average, torch.optim.AdamW(network.parameters(), lr=config.learning_rate, **adam, fused=True)
    )


def saved_settings(config: LoopConfig, task: Task) -> dict[str, Any]:
    """What a checkpoint tells of the training, plain JSON values."""
    return {"command": task.command, **settings(config)}


def resume(config: LoopConfig, task: Task, weights: Weights, *, chief: bool) -> tuple[int, list[str]]:
    """Load the checkpoint to go on from, if there is one; the chief process sets later ones aside.

    Returns:
        Its step, or 0, and what to tell of it.

    Raises:
        InputError: it does not fit, is damaged, or is not there although it was named.
    """
    from ddm_training.checkpoints import find_checkpoint, load_checkpoint, set_aside_later
    from ddm_training.progress import LOG_FILE

    found = find_checkpoint(config.output_dir, config.resume_from_checkpoint)
    if found is None:
        return 0, []
    state, differing = load_checkpoint(found, saved_settings(config, task), task.identity)
    try:
        weights.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        newer = [f"--{k.replace('_', '-')}" for k in task.identity if differing.get(k, (True, None))[0] is None]
        hint = f"give {', '.join(newer)}, which its settings lack, as it was made, or " if newer else ""
        raise InputError(
            f"{found} holds the weights of another network ({reason}): {hint}use another --output-dir."
        ) from error
    for group in weights.optimizer.param_groups:
        group |= adam_settings(config)
    start = int(state["step"])
    notes = [f"resuming from {found.name}"]
    notes += [f"--{k.replace('_', '-')} is {now}, was {was}" for k, (was, now) in sorted(differing.items())]
    if chief and (aside := set_aside_later(config.output_dir, start, config.output_dir / LOG_FILE)):
        notes.append(f"{', '.join(path.name for path in aside)} set aside, with the log so far: {aside[0].parent}")
    return start, notes


def save(config: LoopConfig, task: Task, weights: Weights, step: int, *, chief: bool) -> None:
    """Write the checkpoint of a step, in the chief process.

    Raises:
        InputError: weights are not finite, or the disk is full.
    """
    from ddm_training.checkpoints import save_checkpoint

    if not all(p.isfinite().all() for p in weights.network.parameters()):
        raise InputError(f"weights are not finite after step {step}: training stopped, nothing was saved.")
    if chief:
        limit = config.checkpoints_total_limit
        save_checkpoint(config.output_dir, step, weights.state_dict(), saved_settings(config, task), limit=limit)


def validate(validation: Validation, journal: "Journal", average: nn.Module, step: int) -> None:
    """Validate, export, and plot the training so far."""
    from ddm_training.plots import CURVES_FILE, plot_training
    from ddm_training.progress import writing

    journal.validation(step, validation.run(average, step))
    curves = validation.folder / CURVES_FILE
    try:
        with writing(curves):
            plot_training(curves, journal.path)
    except InputError:
        raise
    except Exception as error:  # no picture is worth a training
        journal.say(f"{curves} could not be drawn ({type(error).__name__}: {error})")


def train_step(
    config: LoopConfig, task: Task, weights: Weights, model: Any, batch: dict[str, Tensor], step: int, accelerator: Any
) -> tuple[Float[Tensor, "2"], float]:
    """One optimiser step, and one of the moving average.

    Returns:
        Loss and norm of the gradient before clipping, and the learning rate.
    """
    rate = learning_rate(
        step,
        peak=config.learning_rate,
        warmup=config.lr_warmup_steps,
        total=config.max_train_steps if config.lr_scheduler == "cosine" else None,
    )
    for group in weights.optimizer.param_groups:
        group["lr"] = rate
    loss = task.loss(model, batch)
    accelerator.backward(loss)
    norm = nn.utils.clip_grad_norm_(weights.network.parameters(), config.max_grad_norm or math.inf)
    weights.optimizer.step()
    weights.optimizer.zero_grad()
    update_average(weights.average, weights.network, step, config.ema_decay)
    return torch.stack([loss.detach(), norm]), rate


def run_loop(config: Config, open_task: Callable[[Config], Task]) -> None:
    """Train, validate, checkpoint and export as ``config`` says.

    Args:
        config: of the training.
        open_task: opens the data; called once the device is chosen, with the settings that are right for it.

    Raises:
        InputError: bad stores, flags or settings of accelerate, a checkpoint that does not fit, another training in
            the output folder (raised in the first process; torchrun and accelerate end the others), a full disk, a
            killed loader process, or a loss that is not finite.
    """
    from ddm_training.checkpoints import remove_leftovers
    from ddm_training.progress import Journal, writing

    accelerator = make_accelerator(config)
    device, chief, world = accelerator.device, accelerator.is_main_process, accelerator.num_processes
    notes = []
    if config.mixed_precision == "bf16" and emulates_bf16(device):
        config = replace(config, mixed_precision="no")
        notes.append("this GPU has no bf16 of its own and would emulate it slowly: --mixed-precision no is used")
    task = open_task(config)
    validation = task.validation(device, world) if chief else None
    weights = make_weights(config, task, device)

    with ExitStack() as ends_with:  # the last one first, and each of them whatever happens in another
        if chief:
            with writing(config.output_dir):
                config.output_dir.mkdir(parents=True, exist_ok=True)
            ends_with.enter_context(exclusive(config.output_dir, "training", "--output-dir"))
            with writing(config.output_dir):
                remove_leftovers(config.output_dir)
        start, resumed = resume(config, task, weights, chief=chief)
        forward: Any = torch.compile(weights.network) if config.torch_compile else weights.network
        model = accelerator.prepare(task.wrap(forward))
        journal = None
        if chief:
            samples = config.train_batch_size * world
            journal = Journal(config, start=start, unit=task.unit, samples_per_step=samples)
            for note in (f"{task.frames:,} frames, {world} process(es) on {device.type}", *notes, *resumed):
                journal.say(note)
        ends_with.callback(accelerator.end_training)
        if journal:
            ends_with.enter_context(journal)
        stop = StopRequest(config.max_train_minutes)
        ends_with.callback(stop.restore)
        batches = StepBatches(
            task.draw,
            steps=config.max_train_steps,
            batch_size=config.train_batch_size,
            rank=accelerator.process_index,
        )
        loader = ends_with.enter_context(Loader(config, batches, start))
        ends_with.callback(stop.restore)  # also before the loader ends: what it waits for may be interrupted

        step, saved, rate = start, start, 0.0
        pending: list[Tensor] = []
        waited = 0.0
        while step < config.max_train_steps:
            before = time.perf_counter()
            try:
                batch = next(loader)
            except WorkerKilledError:
                if step > saved:  # without the others, which may be in the next step already
                    save(config, task, weights, step, chief=chief)
                raise
            batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
            waited += time.perf_counter() - before
            batch = task.prepare(batch, step=step, first=batches.first)
            measured, rate = train_step(config, task, weights, model, batch, step, accelerator)
            pending.append(measured)
            step += 1

            ends = step == config.max_train_steps or agreed(stop, step, accelerator)
            checkpoint = ends or step % config.checkpointing_steps == 0
            validates = step % config.validation_steps == 0 or step == config.max_train_steps
            if checkpoint or validates or step % config.logging_steps == 0:
                statistics = reduce_statistics(pending, step, accelerator)
                if journal:
                    journal.tick(step, **statistics, lr=rate, waited=waited, stop=stop)
                pending, waited = [], 0.0
            if checkpoint:
                save(config, task, weights, step, chief=chief)
                accelerator.wait_for_everyone()
                saved = step
            if validates:
                if validation and journal:
                    validate(validation, journal, weights.average, step)
                accelerator.wait_for_everyone()
            if ends:
                break
        if validation and journal:
            if step == start or (step % config.validation_steps and step < config.max_train_steps):
                validate(validation, journal, weights.average, step)
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

"""The training loop, whatever is trained. Running the same command again goes on where the last run ended.

The state of a training is tensors and one integer: samples, noise and learning rate are functions of the step alone.
`train` (the denoiser of patches) and `train_completion` say what is trained: a `task.Task`.
"""

import math
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ddm_training.devices import emulates_bf16, make_accelerator
from ddm_training.errors import InputError
from ddm_training.files import exclusive
from ddm_training.loading import Loader, StepBatches, WorkerKilledError
from ddm_training.loop_config import LoopConfig
from ddm_training.objective import learning_rate, update_average
from ddm_training.pretrained import keep_origin
from ddm_training.stopping import StopRequest
from ddm_training.task import Task, Validation
from ddm_training.weights import Weights, make_weights, resume, save

if TYPE_CHECKING:
    from ddm_training.progress import Journal

Config = TypeVar("Config", bound=LoopConfig)


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


def find_gradient(
    config: LoopConfig, task: Task, weights: Weights, model: Any, batch: dict[str, Tensor], accelerator: Any
) -> Float[Tensor, "2"]:
    """The gradient of one optimiser step, of all processes; the weights stay as they are.

    Returns:
        Loss and norm of the gradient before clipping.
    """
    loss = task.loss(model, batch)
    accelerator.backward(loss)
    norm = nn.utils.clip_grad_norm_(weights.network.parameters(), config.max_grad_norm or math.inf)
    return torch.stack([loss.detach(), norm])


def make_step(config: LoopConfig, weights: Weights, step: int) -> float:
    """One optimiser step, and one of the moving average. Returns the learning rate."""
    rate = learning_rate(
        step,
        peak=config.learning_rate,
        warmup=config.lr_warmup_steps,
        total=config.max_train_steps if config.lr_scheduler == "cosine" else None,
    )
    for group in weights.optimizer.param_groups:
        group["lr"] = rate
    weights.optimizer.step()
    weights.optimizer.zero_grad()
    update_average(weights.average, weights.network, step, config.ema_decay)
    return rate


def run_loop(config: Config, open_task: Callable[[Config], Task]) -> None:
    """Train, validate, checkpoint and export as ``config`` says.

    Args:
        config: of the training.
        open_task: opens the data; called once the device is chosen, with the settings that are right for it.

    Raises:
        InputError: bad stores, flags or settings of accelerate, a checkpoint that does not fit, another training in
            the output folder (raised in the first process; torchrun and accelerate end the others), an output folder
            that processes do not share, a full disk, a killed loader process, or a loss that is not finite.
        RuntimeError: of PyTorch, as where another process is gone; the steps so far are saved first if that can be.
    """
    from ddm_training.checkpoints import remove_leftovers
    from ddm_training.progress import Journal, writing

    accelerator = make_accelerator(config)
    device, chief, world = accelerator.device, accelerator.is_main_process, accelerator.num_processes
    notes = []
    if config.mixed_precision == "bf16" and emulates_bf16(device):
        config = replace(config, mixed_precision="no")
        notes.append(
            f"this {device.type.upper()} has no bf16 and would emulate it slowly: --mixed-precision no is used"
        )
    task = open_task(config)
    validation = task.validation(device, world) if chief else None
    weights = make_weights(config, task, device)

    with ExitStack() as ends_with:  # the last one first, and each of them whatever happens in another
        if chief:
            ends_with.enter_context(exclusive(config.output_dir, "training", "--output-dir"))
            with writing(config.output_dir):
                remove_leftovers(config.output_dir)
        start, resumed = resume(config, task, weights, chief=chief)
        forward: Any = torch.compile(weights.network) if config.torch_compile else weights.network
        model = accelerator.prepare(task.wrap(forward))
        require_same_start(start, accelerator)
        journal = None
        if chief:
            with writing(config.output_dir):
                keep_origin(config, task.origin)
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
                batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
                waited += time.perf_counter() - before
                batch = task.prepare(batch, step=step, first=batches.first)
                pending.append(find_gradient(config, task, weights, model, batch, accelerator))
            except WorkerKilledError:
                if step > saved:  # without the others, which may be in the next step already
                    save(config, task, weights, step, chief=chief)
                raise
            except RuntimeError:
                if world > 1 and step > saved:  # another process is gone, likely by the above; this step was not made
                    with suppress(InputError, RuntimeError):
                        save(config, task, weights, step, chief=chief)
                raise
            rate = make_step(config, weights, step)
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
            own = f"checkpoint-{saved}"  # or of another folder
            held = own if (config.output_dir / own).is_dir() else "no step was left to make"
            journal.say(
                f"{'finished' if done else 'stopped'} at step {step}, {held}, "
                f"exported to {validation.folder}" + ("" if done else f"; run {again(config)} to go on")
            )
            if done:
                task.finish(validation)


def again(config: LoopConfig) -> str:
    """What to run to go on: a named checkpoint would begin at that one once more."""
    named = config.resume_from_checkpoint != "latest"
    return "the same command again" + (", but without --resume-from-checkpoint," if named else "")


def require_same_start(start: int, accelerator: Any) -> None:
    """Refuse processes that would begin at different steps, as where each machine has an output folder of its own.

    Raises:
        InputError: in all of them.
    """
    if accelerator.num_processes == 1:
        return
    starts = accelerator.gather(torch.tensor([start], device=accelerator.device)).tolist()
    if len(set(starts)) > 1:
        raise InputError(
            f"the processes would begin at steps {starts}: --output-dir must be the same folder for all of them, on a "
            "disk that their machines share."
        )


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

"""What a training tells: one JSON line per tick, TensorBoard, a progress bar where a person watches."""

import json
import sys
import threading
import time
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddm_training import files
from ddm_training.errors import InputError
from ddm_training.files import write_whole

if TYPE_CHECKING:
    from typing_extensions import Self

    from ddm_training.loop_config import LoopConfig
    from ddm_training.stopping import StopRequest

LOG_FILE = "log.jsonl"


def writing(path: Path) -> AbstractContextManager[None]:
    """Tell plainly of what keeps a training from writing to ``path``; see `files.writing`."""
    return files.writing(path, "Checkpoints are untouched: make room and run the same command again.")


def truncate_log(path: Path, step: int) -> None:
    """Drop lines after ``step``, and a last line cut short: what a killed run logged beyond its checkpoint."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    write_whole(path, "".join(f"{line}\n" for line in kept))


class Journal:
    """Writes `log.jsonl` and TensorBoard events of a run, from step ``start`` on; ends with its `with`.

    Raises:
        InputError: the disk is full; any of its methods may.
    """

    def __init__(self, config: "LoopConfig", *, start: int, unit: str, samples_per_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path, self._events = config.output_dir / LOG_FILE, config.output_dir / "tensorboard"
        self._total, self._unit, self._samples = config.max_train_steps, unit, samples_per_step
        with writing(self.path):
            truncate_log(self.path, start)
        with writing(self._events):
            self._board = SummaryWriter(str(self._events), purge_step=start + 1)
        self._report, threading.excepthook = threading.excepthook, self._report_thread
        self._last, self._time, self._pause = start, time.perf_counter(), 0.0
        self._bar = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("training", total=self._total, completed=start, text="")
            self._bar.start()

    def say(self, text: str) -> None:
        """One line for people."""
        with suppress(OSError):  # of a terminal that hung up, whose SIGHUP ends the training, or a pipe without reader
            if self._bar is None:
                print(text, file=sys.stderr, flush=True)
            else:
                self._bar.console.print(text, markup=False)

    def _write(self, line: dict[str, Any]) -> None:
        with writing(self.path), self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def tick(self, step: int, *, loss: float, grad_norm: float, lr: float, waited: float, stop: "StopRequest") -> None:
        """Statistics of the steps since the last tick; ``waited`` is the time in seconds that data was waited for."""
        now = time.perf_counter()
        seconds = max(now - self._time, 1e-9)
        rate = (step - self._last) / seconds
        left = min((self._total - step) / max(rate, 1e-9), max(stop.seconds_left, 0.0))
        line = {
            "step": step,
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            f"{self._unit}_per_s": round(rate * self._samples, 2),
            "data_wait": round(waited / seconds, 4),
            "seconds_left": round(left, 1),
        }
        self._write(line)
        with writing(self._events):
            for key in ("loss", "lr", "grad_norm", f"{self._unit}_per_s", "data_wait"):
                self._board.add_scalar(f"train/{key}", line[key], step)
        text = f"loss {loss:.4f}  {rate * self._samples:.0f} {self._unit}/s  {left / 60:.0f} min left"
        if self._bar is None:
            self.say(f"step {step}/{self._total}  {text}")
        else:
            self._bar.update(self._task, completed=step, text=text)
        self._last, self._time = step, time.perf_counter()

    def validation(self, step: int, measured: dict[str, Any]) -> None:
        """Validation losses and the sample sheet, as `Validation.run` gives them."""
        sheet = measured.pop("sheet", None)
        self._write({"step": step, **measured})
        with writing(self._events):
            for name, losses in measured["val"].items():
                for key, value in losses.items():
                    self._board.add_scalar(f"val_{key}/{'t=' * name.isdigit()}{name}", value, step)
            self._board.add_scalar("val/mean", measured["val_loss"], step)
            if sheet is not None:
                self._board.add_image("samples", sheet, step, dataformats="HWC")
        depth = "  ".join(
            f"{'t=' * name.isdigit()}{name} {losses['depth']:.4f}" for name, losses in measured["val"].items()
        )
        self.say(f"step {step}  validation {measured['val_loss']:.4f}  depth: {depth}")
        self._time = time.perf_counter()  # validation is not training time

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Flush and end. What already ends the training is told, not what then goes wrong here as well."""
        if self._bar is not None:
            with suppress(OSError):  # see `say`
                self._bar.stop()
        try:
            with writing(self._events):
                self._board.close()
        except InputError:
            if kind is None:
                raise
        finally:
            threading.excepthook = self._report

    def _report_thread(self, failed: threading.ExceptHookArgs) -> None:
        """Report the end of a thread, but not of TensorBoard's: the next call to its writer raises that error."""
        if not type(failed.thread).__module__.startswith("tensorboard."):
            self._report(failed)

"""What a training tells: one JSON line per tick, TensorBoard, a progress bar where a person watches."""

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddm_training.loop import StopRequest
    from ddm_training.loop_config import LoopConfig

LOG_FILE = "log.jsonl"


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
    part = path.with_suffix(".part")
    part.write_text("".join(f"{line}\n" for line in kept))
    os.replace(part, path)


class Journal:
    """Writes `log.jsonl` and TensorBoard events of a run, from step ``start`` on."""

    def __init__(self, config: "LoopConfig", *, start: int, unit: str, samples_per_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = config.output_dir / LOG_FILE
        truncate_log(self.path, start)
        self._total, self._unit, self._samples = config.max_train_steps, unit, samples_per_step
        self._board = SummaryWriter(str(config.output_dir / "tensorboard"), purge_step=start + 1)
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
        print(text, file=sys.stderr, flush=True) if self._bar is None else self._bar.console.print(text)

    def _write(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
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

    def close(self) -> None:
        """Flush and end."""
        self._board.close()
        if self._bar is not None:
            self._bar.stop()

"""`make demo`: a capture of few images, trained without and with the prior; a table and a picture sheet.

python -m diffusionerf_ns.demo [--data FOLDER] [--steps N] [--num-views 3] [--downscale-factor K]
"""

import contextlib
import itertools
import os
import shlex
import shutil
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ddm_training.errors import InputError, ends_plainly
from ddm_training.files import write_whole

ROOM_SEED = 7
TITLES = {"photometric": "without regularisation (photometric)", "default": "as it is meant to be"}
# Name in result files -> heading and decimals.
SHOWN: dict[str, tuple[str, int]] = {
    "psnr": ("PSNR, dB", 2),
    "ssim": ("SSIM", 3),
    "lpips": ("LPIPS-Alex", 3),
    "lpips_vgg": ("LPIPS-VGG", 3),
    "lpips_alex": ("LPIPS-Alex", 3),
    "depth_abs_rel": ("depth AbsRel", 3),
    "depth_rmse": ("depth RMSE", 3),
    "depth_delta": ("depth < 1.25", 3),
}


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Train a few-view NeRF without and with the regularisation, and compare them on held-out images."""

    data: Path | None = None
    """Folder of a capture, or of photographs alone; unset: a made room, whose true depth is known."""
    steps: int | None = None
    """Length of each of the two runs; unset: as the method has it."""
    num_views: int | Literal["all"] = 3
    """Number of training images."""
    downscale_factor: int | None = None
    """Reduce images by this factor; unset: as the data parser chooses."""
    method: Literal["diffusionerf", "diffusionerf-tiny"] = "diffusionerf-tiny"
    """Preset."""
    output: Path = Path("demo")
    """Where everything is written."""
    seed: int = 0
    """Seed of both runs."""
    prior: str | None = None
    """Another prior than the built-in one."""

    def main(self) -> None:
        """Do it.

        Raises:
            InputError: the capture, the photographs, the prior or the output folder is not what it should be.
        """
        from diffusionerf_ns.bench.jobs import Job
        from diffusionerf_ns.bench.pictures import SheetRow, contact_sheet

        if self.data is None:
            data = make_room(self.output / "room")
        else:
            data = find_capture(self.data, self.output / "capture")
        rows = []
        for number, (variant, title) in enumerate(TITLES.items(), start=1):
            job = Job(
                scene=data.resolve().name,
                data=str(data.resolve()),
                views=self.num_views,
                variant=variant,
                seed=self.seed,
                method=self.method,
                steps=self.steps,
                downscale_factor=self.downscale_factor,
                overrides={} if self.prior is None else {"pipeline.model.prior": self.prior},
            )
            folder = self.output / variant
            result = train(job, folder, f"run {number} of {len(TITLES)}: {title}")
            rows.append(SheetRow(title=title, folder=folder, result=result))
        sheet = self.output / "sheet.png"
        name = "a made room" if self.data is None else self.data.resolve().name
        contact_sheet(sheet, rows, title=f"{name}, {self.num_views} training images, {rows[0].result['steps']} steps")
        write_markdown(self.output / "table.md", rows)
        show(rows, sheet)


def make_room(folder: Path) -> Path:
    """Make a capture of a procedural room with true depth: 9 training and 8 test images."""
    from ddm_training.rooms import RoomsConfig

    RoomsConfig(output="capture", folder=folder, seed=ROOM_SEED).main()
    return folder


def find_capture(data: Path, folder: Path) -> Path:
    """The capture itself; of photographs alone one that is made in ``folder``, or was made there of the same ones.

    A capture that was made there of other photographs is kept under another name beside it.

    Raises:
        InputError: photographs that cannot be read or placed, or a folder that holds something else.
    """
    from ddm_training.transforms import is_made_here
    from diffusionerf_ns.dataparsers.few_view import is_photographs
    from diffusionerf_ns.pose_search import find_poses, holds_something, was_made_of

    if not is_photographs(data):
        return data
    if was_made_of(folder, data):
        print(f"The poses in {folder} are used again; remove it to find them anew.")
    elif not holds_something(folder):
        print(find_poses(data, folder).summary())
    elif is_made_here(folder):
        with _set_aside(folder) as aside:
            found = find_poses(data, folder)
        print(f"{folder} was not made of the photographs that {data} has now: it is kept as {aside}.")
        print(found.summary())
    else:
        raise InputError(
            f"{folder} holds something that diffusionerf-poses did not make; expected its capture of {data}, or "
            "nothing. Give another OUTPUT (without make: --output), or move that folder."
        )
    return folder


@contextlib.contextmanager
def _set_aside(folder: Path) -> Iterator[Path]:
    """Give a folder another name, which is yielded. It gets its own back where what follows fails."""
    names = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(1))
    aside = next(path for path in names if not os.path.lexists(path))
    try:
        folder.rename(aside)
    except OSError as error:
        raise InputError(f"{folder} cannot be renamed: {error.strerror}. Give another OUTPUT.") from error
    try:
        yield aside
    except BaseException:
        aside.rename(folder)
        raise


def train(job: Any, folder: Path, title: str) -> dict[str, Any]:
    """One run with a progress bar; replaces what was in ``folder``. nerfstudio's own output goes to log.txt."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from diffusionerf_ns.bench.job import run
    from diffusionerf_ns.bench.jobs import configure

    for old in (folder / "pictures", folder / job.scene):
        shutil.rmtree(old, ignore_errors=True)
    (folder / "result.json").unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    config = configure(job, folder)
    console = Console(file=sys.stdout)
    console.print(f"\n{title}", highlight=False)
    progress = Progress(
        *columns, console=console, speed_estimate_period=60, redirect_stdout=False, redirect_stderr=False
    )
    bars = {
        "train": progress.add_task("training  ", total=config.max_num_iterations),
        "evaluate": progress.add_task("evaluating", total=None, start=False),
    }

    def on_progress(phase: str, done: int, total: int) -> None:
        if done == 1:
            progress.start_task(bars[phase])
        progress.update(bars[phase], completed=done, total=total)
        if not console.is_terminal and done * 5 // total > (done - 1) * 5 // total:
            console.print(f"  {phase}: {done} of {total}", highlight=False)

    with (
        (folder / "log.txt").open("w") as log,
        progress,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        return run(config, folder, job=job.to_dict(), pictures=3, on_progress=on_progress)


def images_judged(result: dict[str, Any]) -> str:
    """What the metrics are of, for a heading."""
    from diffusionerf_ns.bench.results import none_held_out

    count = len(result["images"])
    if none_held_out(result):
        return f"the {count} training images themselves (none was held out, so nothing is said about new views)"
    return f"{count} held-out images"


def table_rows(rows: list[Any]) -> list[list[str]]:
    """Heading and one cell per run for each metric that all runs have, then the minutes of training."""
    first = rows[0].result
    cells = []
    for name, (heading, decimals) in SHOWN.items():
        if all(name in row.result["metrics"] for row in rows):
            unit = f", {first['depth_unit']}" if name == "depth_rmse" else ""
            cells.append([heading + unit, *(f"{row.result['metrics'][name]:.{decimals}f}" for row in rows)])
    cells.append(["minutes of training", *(f"{row.result['seconds']['train'] / 60:.1f}" for row in rows)])
    return cells


def write_markdown(path: Path, rows: list[Any]) -> None:
    """The table as Markdown, with what it was measured on."""
    first = rows[0].result
    width, height = first["image_size"]
    lines = [
        f"{images_judged(first)}, {width} x {height} pixels, {len(first['split']['train'])} training images, "
        f"{first['steps']:,} steps, protocol `{first['protocol']}`, on {first['device']}:",
        "",
        "| | " + " | ".join(row.title for row in rows) + " |",
        "|---" * (len(rows) + 1) + "|",
        *("| " + " | ".join(cells) + " |" for cells in table_rows(rows)),
    ]
    write_whole(path, "\n".join(lines) + "\n")


def show(rows: list[Any], sheet: Path) -> None:
    """Print the table, and where things are."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    first = rows[0].result
    table = Table(title=f"{images_judged(first)}, protocol {first['protocol']}, {first['device']}")
    table.add_column("")
    for row in rows:
        table.add_column(row.title, justify="right")
    for cells in table_rows(rows):
        table.add_row(*cells)
    console.print()
    console.print(table)
    if "depth_abs_rel" in first["metrics"]:
        print("Depth is judged against the true one, in its own unit and without alignment.")
    if not any("lpips" in name for name in first["metrics"]):
        print(f"LPIPS is left out: its network's weights are not here and could not be had ({rows[0].folder}/log.txt).")
    config = os.path.relpath(rows[-1].folder / rows[-1].result["config_file"])
    print(f"\nPicture sheet:  {sheet}")
    print(f"All pictures:   {', '.join(str(row.folder / 'pictures') for row in rows)}")
    print(f"Walk through it: ns-viewer --load-config {shlex.quote(config)}")


def main(args: list[str] | None = None) -> None:
    """Entry point."""
    import tyro

    warnings.filterwarnings("ignore", category=FutureWarning)  # of torch, about nerfstudio's decorators
    with ends_plainly():
        tyro.cli(DemoConfig, args=args).main()


if __name__ == "__main__":
    main()

"""`diffusionerf-bench run`: do all jobs of a benchmark that are not done yet."""

import json
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from ddm_training.errors import InputError, require_at_least
from ddm_training.files import make_folder
from diffusionerf_ns.bench.engines import EngineConfig

VariantName = Literal[
    "default", "photometric", "paper-geometric", "geometric", "refinement-only", "no-completion", "full",
    "no-image-patches", "tau-zero", "no-refinement", "no-stereo", "nerfacto",
]  # fmt: skip

PYTHON_WORDS = {"True": True, "False": False, "None": None}
OF_MADE_JOBS = ("data", "views", "seeds", "variants", "method", "steps", "downscale_factor", "override")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Train and evaluate scenes x views x seeds x variants; a job that is done is not done again.

    Running the same command again does what is missing, and tries again what failed.
    """

    output: Path
    """Results folder. Scene, views, variant and seed tell its jobs apart: other settings than these replace a job."""
    data: tuple[Path, ...] = ()
    """Folders of the captures; a scene is called as its folder."""
    views: tuple[int | Literal["all"], ...] = (3,)
    """Numbers of training images."""
    seeds: tuple[int, ...] = (0,)
    """Seeds."""
    variants: tuple[VariantName, ...] = ("default",)
    """Variants of the method."""
    method: Literal["diffusionerf", "diffusionerf-tiny"] = "diffusionerf-tiny"
    """Method that the variants are variants of."""
    steps: int | None = None
    """Length of a run, with all schedules; unset: as the method has it."""
    downscale_factor: int | None = None
    """Reduce the images by this; unset: as the data parser chooses."""
    override: tuple[str, ...] = ()
    """Further settings as PATH=VALUE, e.g. pipeline.model.prior=my-prior. They win over the variants' own;
    `nerfacto` takes those that it knows. What has a flag here is refused."""
    jobs: Path | None = None
    """A job list (JSON) instead of the flags above; `--dry-run` shows what one looks like."""
    pictures: int = 4
    """Test images of each job that are saved as pictures."""
    dry_run: bool = False
    """Print the job list and do nothing."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Where the jobs run."""

    def __post_init__(self) -> None:
        require_at_least(self, pictures=0)
        if self.seeds and min(self.seeds) < 0:
            raise InputError(f"--seeds must be 0 or more, found {min(self.seeds)}.")

    def main(self) -> None:
        """Do it.

        Raises:
            InputError: nothing to do, unknown names, another run writes here, a results folder of another version, or a
                file that cannot be written: the disk is full, say.
            SystemExit: 1, if jobs failed.
        """
        jobs = self._jobs()
        if self.dry_run:
            print(json.dumps([job.to_dict() for job in jobs], indent=1))
            return
        failed = run_benchmark(jobs, self.output, self.engine, pictures=self.pictures)
        if failed:
            raise SystemExit(1)

    def _jobs(self) -> list[Any]:
        from diffusionerf_ns.bench import jobs

        if self.jobs is not None:
            default = {f.name: f.default for f in fields(self)}
            given = [name for name in OF_MADE_JOBS if getattr(self, name) != default[name]]
            if given:
                flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
                raise InputError(f"--jobs and {flags} exclude each other: a job list says that of each job itself.")
            return jobs.read_jobs(self.jobs)
        if not self.data:
            raise InputError("nothing to do: give --data FOLDER... or --jobs FILE.")
        return jobs.make_jobs(
            self.data,
            views=self.views,
            seeds=self.seeds,
            variant_names=self.variants,
            method=self.method,
            steps=self.steps,
            downscale_factor=self.downscale_factor,
            overrides=parse_overrides(self.override),
        )


def parse_overrides(settings: tuple[str, ...]) -> dict[str, Any]:
    """PATH=VALUE -> {PATH: VALUE}; a value is read as JSON or a word of `PYTHON_WORDS` where it is one, else as text.

    Raises:
        InputError: there is no "=".
    """
    parsed = {}
    for setting in settings:
        path, sign, text = setting.partition("=")
        if not sign or not path:
            raise InputError(f"--override {setting!r}: expected PATH=VALUE, e.g. pipeline.model.score-weight=2.0.")
        try:
            value = json.loads(text)
        except ValueError:
            value = PYTHON_WORDS.get(text, text)
        parsed[path.replace("-", "_")] = value
    return parsed


def run_benchmark(jobs: list[Any], output: Path, engine: EngineConfig, *, pictures: int = 4) -> list[Any]:
    """Do those of ``jobs`` that are not done, and show what failed.

    Returns:
        The entries that failed.

    Raises:
        InputError: see `RunConfig.main`.
    """
    from rich.console import Console
    from rich.markup import escape

    from diffusionerf_ns.bench import results, worker
    from diffusionerf_ns.bench.jobs import config_hash, configure, training_hash

    console = Console()
    plain: dict[str, Any] = {"markup": False, "highlight": False}
    entries = []
    for job in jobs:
        folder = output / job.name
        config = configure(job, folder)
        entries.append(results.Entry(job=job, hash=config_hash(config), folder=folder, training=training_hash(config)))
    make_folder(output, "--output")
    with results.lock(output):
        results.merge_entries(output, entries)
        taken = [entry for entry in entries if entry.take_back()]
        todo = [entry for entry in entries if entry.status() != "done"]
        again = sum(entry.status() == "failed" for entry in todo)
        console.print(
            f"{len(entries)} jobs: {len(entries) - len(todo)} done, {len(todo)} to do"
            + (f", {again} of them failed before" if again else "")
        )
        if taken:
            console.print(
                f"{len(taken)} of those done were set aside before and are taken back, without pictures and weights, "
                f"which were replaced; delete result.json to do one again: {_some(taken)}",
                **plain,
            )
        if changed := [entry for entry in todo if entry.has_another()]:
            console.print(
                f"{len(changed)} of those to do were done with other settings; as it begins, each result is set aside "
                f"as result.<hash>.json, its pictures and weights are replaced: {_some(changed)}",
                **plain,
            )
        for entry in todo:
            worker.write_task(entry.folder, entry.job, entry.hash, pictures)
        failed = _run_with_progress(todo, engine, output, console)
    for entry in failed:
        reason = json.loads((entry.folder / results.FAILED_FILE).read_text())["message"]
        console.print(f"[red]failed:[/red] {escape(entry.job.name)}: ", end="")
        console.print(reason, **plain)
        console.print(f"        {os.path.relpath(entry.folder / results.LOG_FILE)}", **plain)
    if failed:
        console.print(f"{len(failed)} of {len(entries)} jobs failed; run the same command again to try them again.")
    return failed


def _some(entries: list[Any]) -> str:
    """Names of jobs, not of very many."""
    return ", ".join(entry.job.name for entry in entries[:10]) + (", ..." if len(entries) > 10 else "")


def _run_with_progress(todo: list[Any], engine: EngineConfig, output: Path, console: Any) -> list[Any]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from diffusionerf_ns.bench import engines, worker

    columns = (
        TextColumn("{task.fields[ended]}/{task.fields[jobs]} jobs"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[failed]}"),
    )
    failed, ended = [], set()
    with Progress(*columns, console=console, speed_estimate_period=600, disable=not todo) as progress:
        task = progress.add_task("jobs", total=len(todo), jobs=len(todo), ended=0, failed="")

        def tick() -> None:
            parts = sum(worker.read_progress(e.folder) for e in todo if e.job.name not in ended)
            note = f"[red]{len(failed)} failed" if failed else ""
            progress.update(task, completed=len(ended) + parts, ended=len(ended), failed=note)

        for entry, well in engines.run_entries(todo, engine, output / "submitit", tick):
            ended.add(entry.job.name)
            if not well:
                failed.append(entry)
            tick()
    return failed

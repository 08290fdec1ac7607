"""Write docs/results.md, docs/figures/bench.md and the contact sheets from the results folder of a benchmark.

python scripts/write_results.py RESULTS [NOTE]     after `diffusionerf-bench table` and `plot` of the same folder

NOTE is a sentence that readers of the figures must know.
"""

import sys
from pathlib import Path
from statistics import mean
from typing import Any

from PIL import Image

from ddm_training.errors import InputError
from ddm_training.files import write_whole
from diffusionerf_ns.bench.results import none_held_out, read_entries
from diffusionerf_ns.bench.summary import Mean, Setting, all_have, over_scenes, setting_of
from diffusionerf_ns.bench.variants import VARIANTS

ROOT = Path(__file__).resolve().parents[1]
VIEWS = 3
SHEET_WIDTH = 900  # pixels
ROOMS = "room-"  # how the names of made rooms begin; LLFF has a scene `room`
OURS = ("default", "full")  # the method as it is meant to be: the first of these that was run
METRICS = {"psnr": ("PSNR", 2), "ssim": ("SSIM", 3), "lpips": ("LPIPS-Alex", 3), "depth_abs_rel": ("depth AbsRel", 3)}
Runs = dict[str, dict[tuple[str, int], dict[str, Any]]]


def read_runs(folder: Path, views: int | str = VIEWS) -> Runs:
    """Variant -> (scene, seed) -> result, of the jobs of so many views that are done.

    Runs without held-out images are left out: their metrics are of training images. The table's notes name them.
    """
    runs: Runs = {}
    for entry in read_entries(folder):
        result = entry.result()
        if result is not None and entry.job.views == views and not none_held_out(result):
            metrics = result["metrics"]
            if "lpips" not in metrics and "lpips_alex" in metrics:
                metrics["lpips"] = metrics["lpips_alex"]
            runs.setdefault(entry.job.variant, {})[entry.job.scene, entry.job.seed] = result
    order = list(VARIANTS)
    return dict(sorted(runs.items(), key=lambda item: order.index(item[0])))


def check_comparable(folder: Path) -> None:
    """The finished jobs of a results folder are of one method and length, those of a scene of one image size as well.

    Raises:
        InputError: they are not, or none is done.
    """
    settings: dict[tuple[str, int | str], set[Setting]] = {}
    for entry in read_entries(folder):
        if (result := entry.result()) is not None:
            settings.setdefault((entry.job.scene, entry.job.views), set()).add(setting_of(result))
    methods = sorted({setting.method for found in settings.values() for setting in found})
    if len(methods) != 1:
        found = f"finished jobs of the methods {', '.join(methods)}" if methods else "no finished jobs"
        raise InputError(f"{folder} has {found}; expected those of one method: give each method a folder of its own.")
    steps = sorted({setting.steps for found in settings.values() for setting in found})
    if len(steps) != 1:
        found = ", ".join(f"{n:,}" for n in steps)
        raise InputError(
            f"{folder} has finished jobs of {found} steps; expected one length: give each length a folder of its own."
        )
    for (scene, views), found in settings.items():
        if len(found) != 1:
            raise InputError(
                f"{folder}: {scene}, {views} views, has finished jobs of other image sizes or protocols "
                f"({'; '.join(f'{s.image_size}, {s.protocol}' for s in sorted(found))}); expected one of each: give "
                "each a folder of its own."
            )


def scenes_of(runs: Runs, metric: str) -> set[str]:
    """The scenes that a metric is about: depth those with true depth, any other all."""
    return {
        scene
        for found in runs.values()
        for (scene, _), run in found.items()
        if metric in run["metrics"] or not metric.startswith("depth")
    }


def mean_of(runs: dict[tuple[str, int], dict[str, Any]], metric: str, scenes: set[str]) -> Mean | None:
    """A metric over the runs of these scenes; None where there are none, or some of them lack it."""
    found = {key: run["metrics"] for key, run in runs.items() if key[0] in scenes}
    if not found or not all_have(metric, found.values()):
        return None
    return over_scenes({key: metrics[metric] for key, metrics in found.items()})


def summary(runs: Runs) -> str:
    """One row a variant that was run on all scenes: metrics, depth over scenes with true depth, the time of a step.

    A metric that some of a variant's runs lack is left empty, and said to be.
    """
    scenes = {scene for found in runs.values() for scene, _ in found}
    first = next(iter(next(iter(runs.values())).values()))
    views, steps, method = first["job"]["views"], first["steps"], first["job"]["method"]
    lines = [
        f"{len(scenes)} scenes, {views} views, {steps:,} steps of `{method}`, or of nerfacto at the same "
        "sizes; +- is the deviation over the seeds that have all scenes. Variants that were not run on all scenes are "
        "left out.",
        "",
        f"| | {' | '.join(title for title, _ in METRICS.values())} | a step, s | seeds |",
        f"|---|{'---:|' * (len(METRICS) + 2)}",
    ]
    empty = False
    for name, found in runs.items():
        if {scene for scene, _ in found} != scenes:
            continue
        cells = []
        for metric, (_, decimals) in METRICS.items():
            value = mean_of(found, metric, scenes_of(runs, metric))
            if value is None:
                cells.append("")
                empty = True
                continue
            deviation = "" if value.deviation is None else f" +- {value.deviation:.{decimals}f}"
            cells.append(f"{value.value:.{decimals}f}{deviation}")
        step = mean(r["seconds"]["train"] / r["steps"] for r in found.values())
        seeds = sorted({k for _, k in found})
        cells += [f"{step:.2f}", ", ".join(f"{k}: {sum(s == k for _, s in found)} scenes" for k in seeds)]
        lines.append(f"| {VARIANTS[name].title} | {' | '.join(cells)} |")
    if empty:
        lines += ["", "Cells are empty where some of a variant's runs lack the metric."]
    return "\n".join(lines) + "\n"


def targets(runs: Runs) -> str:
    """The targets at 3 views, each with what was measured on the scenes and seeds that both variants have."""

    ours = next(name for name in OURS if name in runs)

    def paired(metric: str, other: str, scenes: str = "") -> tuple[float, float] | None:
        """Means over scenes of our default and of another variant, over the scenes and seeds that both have.

        None where there are none, or some of these runs lack the metric. ``scenes``: how names of scenes begin.
        """
        both = {key for key in runs[ours].keys() & runs.get(other, {}).keys() if key[0].startswith(scenes)}
        a, b = (mean_of({k: runs[name][k] for k in both}, metric, scenes_of(runs, metric)) for name in (ours, other))
        return None if a is None or b is None else (a.value, b.value)

    rows: list[tuple[str, str, bool]] = []
    for metric, other, least, unit in (
        ("psnr", "nerfacto", 1.5, "dB"),
        ("psnr", "geometric", 0.3, "dB"),
        ("psnr", "paper-geometric", 0.3, "dB"),
    ):
        if pair := paired(metric, other):
            gain = pair[0] - pair[1]
            rows.append(
                (f"PSNR at least {least} {unit} above {VARIANTS[other].title}", f"{gain:+.2f} dB", gain >= least)
            )
    for other in ("nerfacto", "geometric", "paper-geometric"):
        if pair := paired("lpips", other):
            text = f"{pair[0]:.3f} against {pair[1]:.3f}"
            rows.append((f"LPIPS-Alex lower than {VARIANTS[other].title}", text, pair[0] < pair[1]))
    if pair := paired("depth_abs_rel", "geometric", ROOMS):
        rows.append(("depth AbsRel on rooms below .15", f"{pair[0]:.3f}", pair[0] < 0.15))
    for other in ("geometric", "paper-geometric"):
        if pair := paired("depth_abs_rel", other):
            text = f"depth AbsRel at most half of that of {VARIANTS[other].title}"
            rows.append((text, f"{pair[0] / pair[1]:.2f} of it", pair[0] <= 0.5 * pair[1]))
    lines = ["| target | measured | |", "|---|---:|---|"]
    lines += [f"| {text} | {value} | {'met' if met else 'missed'} |" for text, value, met in rows]
    return "\n".join(lines) + "\n"


def sheets(folder: Path) -> list[str]:
    """The contact sheets of 3 views and seed 0, made small enough for the repository; returns lines that show them."""
    target = ROOT / "docs" / "figures"
    lines = []
    for path in sorted((folder / "plots").glob(f"sheet-*-{VIEWS}-views-seed-0.png")):
        with Image.open(path) as image:
            image = image.convert("RGB")
            height = round(image.height * SHEET_WIDTH / image.width)
            image.resize((SHEET_WIDTH, height), Image.Resampling.LANCZOS).save(target / f"{path.stem}.jpg", quality=80)
        lines += [f"![{path.stem}](figures/{path.stem}.jpg)", ""]
    return lines


def main() -> None:
    """Write the files."""
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    try:
        check_comparable(folder)
    except InputError as error:
        sys.exit(str(error))
    runs = read_runs(folder)
    if not runs.keys() & set(OURS):
        sys.exit(
            f"{folder} has no runs with held-out images of {' or '.join(OURS)}, which the targets are about; "
            f"it has {', '.join(runs) or 'none'}."
        )
    short = summary(runs) + "".join(f"\n{note}\n" for note in sys.argv[2:])
    others = sorted(
        {entry.job.views for entry in read_entries(folder)} - {VIEWS}, key=lambda v: (isinstance(v, str), v)
    )
    more = [summary(found) for views in others if (found := read_runs(folder, views))]
    if more:
        more = ["Other numbers of views:", "", *more]
    write_whole(ROOT / "docs" / "figures" / "bench.md", short)
    tables = (folder / "table.md").read_text().removeprefix("# Results\n").strip()
    text = [
        "# Results",
        "",
        "Written by `diffusionerf-bench run`, `table`, `plot` and `scripts/write_results.py`. Means over all scenes:",
        "",
        short,
        "What was aimed at for 3 views, and what came out (scenes and seeds that both variants have):",
        "",
        targets(runs),
        *more,
        "Levers, failures and what they mean are in [findings.md](findings.md).",
        "",
        tables,
        "",
        "## Times",
        "",
        (folder / "times.md").read_text().strip(),
        "",
        "## Pictures",
        "",
        "Ground truth, render, depth and error of held-out views, seed 0.",
        "",
        *sheets(folder),
    ]
    write_whole(ROOT / "docs" / "results.md", "\n".join(text).rstrip() + "\n")


if __name__ == "__main__":
    main()

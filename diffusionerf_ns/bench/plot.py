"""`diffusionerf-bench plot`: PSNR against views, loss curves, and a contact sheet per scene."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nerfstudio.utils.rich_utils import CONSOLE

from ddm_training.errors import InputError
from ddm_training.files import make_folder
from diffusionerf_ns.bench.peers import PEER_SCENES, read_peers
from diffusionerf_ns.bench.results import Entry, none_held_out, read_entries
from diffusionerf_ns.bench.summary import DATASETS, rank_of, summarise_runs, title_of
from diffusionerf_ns.bench.variants import VARIANTS


@dataclass(frozen=True, kw_only=True)
class PlotConfig:
    """Draw the plots and contact sheets of a results folder into its folder `plots`."""

    results: Path
    """Results folder."""
    output: Path | None = None
    """Folder for the pictures; unset: `plots` in the results folder."""

    def main(self) -> None:
        """Do it.

        Raises:
            InputError: no results folder, one of another version, no job in it is done, or no place to write.
        """
        for path in draw_plots(self.results, self.output or self.results / "plots"):
            print(path)


def draw_plots(results: Path, output: Path) -> list[Path]:
    """Draw all; returns what was written.

    Raises:
        InputError: no results folder, one of another version, no job in it is done, or no place to write.
    """
    entries = read_entries(results)
    done = [(entry, result) for entry in entries if (result := entry.result()) is not None]
    if not done:
        raise InputError(f"{results}: none of its {len(entries)} jobs is done; `diffusionerf-bench run` does them.")
    make_folder(output, "--output")
    return [
        *_draw_psnr([result for _, result in done], output),
        *_draw_curves([result for _, result in done], output),
        *_draw_sheets(done, output),
    ]


def _draw_psnr(results: Sequence[dict[str, Any]], output: Path) -> list[Path]:
    """PSNR against the number of views, a picture per data set; published methods as dashed lines.

    Runs without held-out images have no place there. A line is of one set of scenes.
    """
    from matplotlib.figure import Figure

    held_out = [result for result in results if not none_held_out(result)]
    if left_out := len(results) - len(held_out):
        CONSOLE.print(
            f"[yellow]{left_out} of {len(results)} runs had no image held out: they are left out of the plot of PSNR "
            "against views, which is of test images."
        )
    summary = summarise_runs(held_out)
    written = []
    for dataset in sorted({setting.dataset for setting in summary}):
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        settings = {s: rows for s, rows in summary.items() if s.dataset == dataset and s.views.isdigit()}
        # Points of different scenes are not joined: their means cannot be compared.
        lines: dict[tuple[str, tuple[str, ...]], list[tuple[int, float, float]]] = {}
        for setting, rows in settings.items():
            for row in rows:
                psnr = row.means["psnr"]
                scenes = row.scenes[0] if len(row.scenes) == 1 else f"{len(row.scenes)} scenes"
                name = f"{row.title} ({setting.method}, {setting.steps:,} steps, {setting.image_size}, {scenes})"
                lines.setdefault((name, row.scenes), []).append((int(setting.views), psnr.value, psnr.deviation or 0.0))
        if not lines:
            continue
        for (name, _), points in lines.items():
            x, y, error = zip(*sorted(points))
            axes.errorbar(x, y, yerr=error, marker="o", capsize=3, label=name)
        if any(s.protocol == PEER_SCENES.get(dataset, ("", ""))[1] for s in settings):
            peers = [p for p in read_peers() if p.dataset == dataset and "psnr" in p.metrics]
            for name in dict.fromkeys(p.method for p in peers):
                points = sorted((int(p.views), p.metrics["psnr"]) for p in peers if p.method == name)
                axes.plot(*zip(*points), "--", linewidth=1, alpha=0.7, label=f"{name}, published")
        axes.set(xlabel="training views", ylabel="PSNR, dB", title=f"{DATASETS.get(dataset, dataset)}, test images")
        axes.set_xticks(sorted({int(s.views) for s in settings} | {3, 6, 9}))
        axes.grid(alpha=0.3)
        figure.legend(loc="outside right center", fontsize=6)
        path = output / f"psnr-{dataset}.png"
        figure.savefig(path, dpi=150)
        written.append(path)
    return written


def _draw_curves(results: Sequence[dict[str, Any]], output: Path) -> list[Path]:
    """Training PSNR and each loss term against steps, a picture per scene and number of views."""
    from matplotlib.figure import Figure

    written = []
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["job"]["scene"], str(result["job"]["views"])), []).append(result)
    colors = {name: f"C{i}" for i, name in enumerate(VARIANTS)}
    for (scene, views), runs in sorted(groups.items()):
        found = dict.fromkeys(name for run in runs for point in run["curve"] for name in point)
        terms = ["psnr", *(name for name in found if name.endswith("_loss"))]
        figure = Figure(figsize=(4 * len(terms), 3.2), layout="constrained")
        panels = figure.subplots(1, len(terms), squeeze=False)[0]
        for axes, term in zip(panels, terms):
            for run in runs:
                variant = run["job"]["variant"]
                points = [(p["step"], p[term]) for p in run["curve"] if term in p]
                if points:
                    x, y = zip(*points)
                    label = f"{variant}, seed {run['job']['seed']}"
                    axes.plot(x, y, color=colors.get(variant, "grey"), linewidth=0.8, label=label)
            signed = term == "psnr" or any(p.get(term, 1.0) <= 0 for run in runs for p in run["curve"])
            axes.set(xlabel="step", title="training PSNR, dB" if term == "psnr" else term)
            axes.set_yscale("linear" if signed else "log")
            axes.grid(alpha=0.3)
        panels[0].legend(fontsize=6)
        figure.suptitle(f"{scene}, {views} views")
        path = output / f"curves-{scene}-{views}-views.png"
        figure.savefig(path, dpi=110)
        written.append(path)
    return written


def _draw_sheets(done: Sequence[tuple[Entry, dict[str, Any]]], output: Path) -> list[Path]:
    """Ground truth, and render, depth and error of each variant: a sheet per scene, views and seed."""
    from diffusionerf_ns.bench.pictures import SheetRow, contact_sheet

    groups: dict[tuple[str, str, int], list[SheetRow]] = {}
    for entry, result in sorted(done, key=lambda pair: rank_of(pair[0].job.variant)):
        if result["pictures"]:
            job = entry.job
            row = SheetRow(title=title_of(job.variant), folder=entry.folder, result=result)
            groups.setdefault((job.scene, str(job.views), job.seed), []).append(row)
    written = []
    for (scene, views, seed), rows in sorted(groups.items()):
        path = output / f"sheet-{scene}-{views}-views-seed-{seed}.png"
        contact_sheet(path, rows, title=f"{scene}, {views} views, seed {seed}")
        written.append(path)
    return written

"""`diffusionerf-bench table`: Markdown and CSV of a results folder, ours beside the published numbers."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from ddm_training.errors import InputError
from ddm_training.files import make_folder, replacing, write_whole
from diffusionerf_ns.bench.peers import PEER_SCENES, Peer, read_peers
from diffusionerf_ns.bench.results import Entry, none_held_out, read_entries, taken_overrides
from diffusionerf_ns.bench.summary import DATASETS, METRICS, Mean, Row, Setting, rank_of, summarise_runs, title_of
from diffusionerf_ns.bench.variants import VARIANTS


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    """Write table.md, times.md, table.csv and jobs.csv of a results folder, and print the table."""

    results: Path
    """Results folder."""
    output: Path | None = None
    """Folder for the tables; unset: the results folder."""

    def main(self) -> None:
        """Do it.

        Raises:
            InputError: no results folder, one of another version, no job in it is done, or no place to write.
        """
        text = write_tables(self.results, self.output or self.results)
        print(text)


def write_tables(results: Path, output: Path) -> str:
    """Write `table.md`, `times.md`, `table.csv` and `jobs.csv`; returns the table.

    Raises:
        InputError: no results folder, one of another version, no job in it is done, or no place to write.
    """
    entries = read_entries(results)
    done = [(entry, result) for entry in entries if (result := entry.result()) is not None]
    if not done:
        raise InputError(f"{results}: none of its {len(entries)} jobs is done; `diffusionerf-bench run` does them.")
    settings = summarise_runs([result for _, result in done])
    peers = read_peers()
    text = _markdown(settings, peers, entries, [result for _, result in done])
    make_folder(output, "--output")
    write_whole(output / "table.md", text)
    write_whole(output / "times.md", _times([result for _, result in done]))
    _write_csv(output / "table.csv", _table_rows(settings, peers))
    _write_csv(output / "jobs.csv", _job_rows(done))
    return text


def _peers_of(setting: Setting, peers: Iterable[Peer]) -> list[Peer]:
    if PEER_SCENES.get(setting.dataset, ("", ""))[1] != setting.protocol:
        return []
    return [p for p in peers if (p.dataset, p.views) == (setting.dataset, setting.views)]


def _markdown(
    settings: dict[Setting, list[Row]], peers: list[Peer], entries: Sequence[Entry], results: Sequence[dict[str, Any]]
) -> str:
    lines = ["# Results", ""]
    for setting, rows in settings.items():
        lines += [
            f"## {DATASETS.get(setting.dataset, setting.dataset)}, {setting.views} views",
            "",
            f"Protocol `{setting.protocol}`, images of {setting.image_size}, method `{setting.method}`, "
            f"{setting.steps:,} steps. Means over scenes of equal weight; +- is the deviation over seeds.",
            "",
        ]
        published = _peers_of(setting, peers)
        lines += [*_summary_table(setting, rows, published), "", *_scene_table(rows), ""]
        lines += _ablation_table(rows, published)
    lines += _notes(entries, results)
    return "\n".join(lines).rstrip() + "\n"


def _summary_table(setting: Setting, rows: list[Row], published: list[Peer]) -> list[str]:
    names = [name for name in METRICS if any(name in row.means for row in rows)]
    cells = [["", *(METRICS[n][0] for n in names), "scenes", "seeds"]]
    cells.append(["---", *("---:" for _ in names), "---:", "---:"])
    for row in rows:
        cells.append(
            [
                f"**{row.title}**",
                *(_cell(row.means.get(name), METRICS[name][1]) for name in names),
                str(len(row.scenes)),
                str(len(row.seeds)),
            ]
        )
    published = [peer for peer in published if set(peer.metrics) & set(names)]
    for peer in published:
        figures = [f"{peer.metrics[n]:.{METRICS[n][1]}f}" if n in peer.metrics else "" for n in names]
        cells.append([f"{peer.method} (published)", *figures, "", ""])
    lines = _markdown_rows(cells)
    if len({row.scenes for row in rows}) > 1:
        lines += ["", "Not all rows have the same scenes: compare such rows scene by scene, below, not by their means."]
    if published:
        scenes = PEER_SCENES[setting.dataset][0]
        lines += ["", f"Published rows are means over {scenes}; ours over the scenes below. Their sources:"]
        sources = dict.fromkeys(f"{p.method.split(',')[0]}: {p.source.split(';')[0]}" for p in published)
        by_method: dict[str, str] = {}
        for line in sources:
            by_method.setdefault(line.split(": ")[0], line)
        lines += ["; ".join(by_method.values()) + "."]
    return lines


def _markdown_rows(cells: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in cells]


def _cell(value: Mean | None, decimals: int) -> str:
    if value is None:
        return ""
    deviation = "" if value.deviation is None else f" +- {value.deviation:.{decimals}f}"
    return f"{value.value:.{decimals}f}{deviation}"


def _scene_table(rows: list[Row]) -> list[str]:
    scenes = sorted({scene for row in rows for scene in row.scenes})
    has = set.intersection(*(set(row.means) for row in rows))
    names = [name for name in ("psnr", "ssim", "lpips_alex", "lpips", "depth_abs_rel") if name in has]
    lines = [
        f"| {' / '.join(METRICS[name][0] for name in names)} | {' | '.join(scenes)} |",
        f"| --- |{' ---: |' * len(scenes)}",
    ]
    for row in rows:
        figures = [
            " / ".join(f"{row.by_scene[scene][name]:.{METRICS[name][1]}f}" for name in names)
            if scene in row.by_scene
            else ""
            for scene in scenes
        ]
        lines.append(f"| {row.title} | {' | '.join(figures)} |")
    return lines


def _ablation_table(rows: list[Row], published: list[Peer]) -> list[str]:
    """What each part is worth, in the shape of the paper's ablation: over the scenes that all its rows have.

    Empty without at least two variants that have a row there, or without a scene that all of these have.
    """
    theirs = {peer.method: peer.metrics["average"] for peer in published if "average" in peer.metrics}
    names_there = {v.name: v.ablation for v in VARIANTS.values() if v.ablation in theirs}
    rows = [row for row in rows if row.variant in names_there or row.variant == "default"]
    parts = [set(row.scenes) for row in rows if row.variant in names_there]
    scenes = sorted(set.intersection(*parts)) if len(parts) > 1 else []
    if not scenes:
        return []
    rows = [row for row in rows if set(scenes) <= set(row.scenes)]  # the preset, where it was run on them
    shown = ("psnr", "ssim", "lpips_vgg", "lpips_alex", "average", "average_alex")
    names = [n for n in shown if all(n in row.means for row in rows)]
    cells = [["", *(METRICS[n][0] for n in names), "seeds", "the paper's row", "its Average"]]
    cells.append(["---", *("---:" for _ in names), "---:", "---", "---:"])
    for row in rows:
        figures = [f"{mean(row.by_scene[s][n] for s in scenes):.{METRICS[n][1]}f}" for n in names]
        name = names_there.get(row.variant) or ""
        seeds = str(len(row.seeds))
        cells.append([row.title, *figures, seeds, name, f"{theirs[name]:.3f}" if name else ""])
    return [
        f"Ablation, means over {', '.join(scenes)} (the paper's over all scenes, with LPIPS-VGG):",
        "",
        *_markdown_rows(cells),
        "",
    ]


def _notes(entries: Sequence[Entry], results: Sequence[dict[str, Any]]) -> list[str]:
    """What a reader must know: jobs that are missing or tested nothing new, runs of different code or devices."""
    notes = []
    statuses = {entry.job.name: entry.status() for entry in entries}
    absent = [f"{name} ({status})" for name, status in statuses.items() if status != "done"]
    if absent:
        notes.append(
            f"{len(absent)} of {len(entries)} jobs are not in these means: {', '.join(absent[:10])}"
            f"{', ...' if len(absent) > 10 else ''}."
        )
    if trained_on := [r for r in results if none_held_out(r)]:
        which = dict.fromkeys(f"{r['job']['scene']}, {r['job']['views']} views" for r in trained_on)
        notes.append(
            f"In {len(trained_on)} of {len(results)} runs no image was held out: their metrics are of the training "
            f"images themselves and say nothing about new views ({'; '.join(which)})."
        )
    revisions = sorted({str(r["git_revision"]) for r in results})
    if len(revisions) > 1:
        notes.append(f"The runs are of {len(revisions)} revisions of the code: {', '.join(r[:20] for r in revisions)}.")
    devices = sorted({r["device"] for r in results})
    notes.append(f"Devices: {', '.join(devices)}.")
    settings = {str(sorted(taken.items())) for r in results if (taken := taken_overrides(r))}
    if settings:
        notes.append(f"Overrides beside the variants': {'; '.join(sorted(settings))}.")
    left: dict[str, set[str]] = {}
    for r in results:
        if missing := r["job"]["overrides"].keys() - taken_overrides(r).keys():
            left.setdefault(r["job"]["variant"], set()).update(missing)
    notes += [f"Overrides that {title_of(of)} did not take: {', '.join(sorted(paths))}." for of, paths in left.items()]
    return ["Notes:", "", *(f"* {note}" for note in notes)]


def _times(results: Sequence[dict[str, Any]]) -> str:
    """Mean seconds and highest memory per variant; a file of its own, as no two benchmarks take the same time."""
    lines = [
        "| method | steps | variant | runs | training, s | a step, s | evaluation, s | peak RAM, GB | peak GPU, GB |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    groups: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for result in results:
        key = (result["job"]["method"], result["steps"], result["job"]["variant"])
        groups.setdefault(key, []).append(result)
    for (method, steps, variant), runs in sorted(groups.items(), key=lambda g: (g[0][:2], rank_of(g[0][2]))):
        train, evaluate = (mean(r["seconds"][phase] for r in runs) for phase in ("train", "evaluate"))
        ram, gpu = (max(r["peak_memory"].get(kind, 0.0) for r in runs) for kind in ("ram_gb", "gpu_gb"))
        lines.append(
            f"| {method} | {steps:,} | {title_of(variant)} | {len(runs)} | {train:.0f} | {train / steps:.2f} | "
            f"{evaluate:.0f} | {ram:.1f} | {f'{gpu:.1f}' if gpu else ''} |"
        )
    return "\n".join(lines) + "\n"


def _table_rows(settings: dict[Setting, list[Row]], peers: list[Peer]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for setting, variants in settings.items():
        common = vars(setting)
        for row in variants:
            record = {
                "origin": "ours",
                "name": row.variant,
                **common,
                "scenes": len(row.scenes),
                "seeds": len(row.seeds),
            }
            for name, value in row.means.items():
                record |= {name: value.value, f"{name}_deviation": value.deviation}
            rows.append(record)
        for peer in _peers_of(setting, peers):
            place = {"dataset": setting.dataset, "views": setting.views, "protocol": setting.protocol}
            rows.append({"origin": "published", "name": peer.method, **place, **peer.metrics, "source": peer.source})
    return rows


def _job_rows(done: Sequence[tuple[Entry, dict[str, Any]]]) -> list[dict[str, Any]]:
    return [
        {
            **{k: entry.job.to_dict()[k] for k in ("scene", "views", "variant", "seed", "method")},
            "dataset": result["dataset"],
            "protocol": result["protocol"],
            "image_size": "x".join(map(str, result["image_size"])),
            "steps": result["steps"],
            "test_images": len(result["images"]),
            "test_is_train": none_held_out(result),
            **{name: result["metrics"].get(name) for name in METRICS},
            **{f"seconds_{phase}": seconds for phase, seconds in result["seconds"].items()},
            **{f"peak_{kind}": amount for kind, amount in result["peak_memory"].items()},
            "device": result["device"],
            "git_revision": result["git_revision"],
        }
        for entry, result in done
    ]


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with replacing(path) as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)

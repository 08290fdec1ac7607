"""Means of a benchmark's runs: over seeds within a scene, then over scenes; only what may be compared is averaged."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from diffusionerf_ns.bench.variants import VARIANTS

# Name in result files -> heading and decimals; the order is that of the columns.
METRICS: dict[str, tuple[str, int]] = {
    "psnr": ("PSNR", 2),
    "ssim": ("SSIM", 3),
    "lpips_vgg": ("LPIPS-VGG", 3),
    "lpips_alex": ("LPIPS-Alex", 3),
    "lpips": ("LPIPS-Alex", 3),
    "average": ("Average", 3),
    "average_alex": ("Average-Alex", 3),
    "depth_abs_rel": ("depth AbsRel", 3),
    "depth_rmse": ("depth RMSE", 3),
    "depth_delta": ("depth < 1.25", 3),
    "depth_abs_rel_aligned": ("depth AbsRel, aligned", 3),
    "depth_rmse_aligned": ("depth RMSE, aligned", 3),
    "depth_delta_aligned": ("depth < 1.25, aligned", 3),
}
DATASETS = {
    "llff": "LLFF",
    "dtu": "DTU",
    "idr": "IDR captures",
    "transforms": "nerfstudio captures",
    "colmap": "COLMAP captures",
}


@dataclass(frozen=True, order=True)
class Setting:
    """What rows of one table have in common: only numbers with all of this equal may be compared."""

    dataset: str
    views: str
    protocol: str
    method: str
    steps: int
    image_size: str


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A metric of a variant: mean over scenes (each of them the mean over its seeds), deviation over seeds."""

    value: float
    deviation: float | None
    """Sample deviation, over seeds, of the mean over scenes; None with fewer than two seeds that have all scenes."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A variant in a table."""

    variant: str
    title: str
    means: dict[str, Mean]
    by_scene: dict[str, dict[str, float]]
    """Scene -> metric -> mean over seeds."""
    seeds: tuple[int, ...]
    scenes: tuple[str, ...]


def setting_of(result: Mapping[str, Any]) -> Setting:
    return Setting(
        dataset=result["dataset"],
        views=str(result["job"]["views"]),
        protocol=result["protocol"],
        method=result["job"]["method"],
        steps=result["steps"],
        image_size=f"{result['image_size'][0]} x {result['image_size'][1]}",
    )


def summarise_runs(results: Sequence[dict[str, Any]]) -> dict[Setting, list[Row]]:
    """Group results into comparable settings, and average them: over seeds within a scene, then over scenes."""
    groups: dict[Setting, dict[str, list[dict[str, Any]]]] = {}
    for result in results:
        groups.setdefault(setting_of(result), {}).setdefault(result["job"]["variant"], []).append(result)
    return {
        setting: [_row(name, groups[setting][name]) for name in sorted(groups[setting], key=rank_of)]
        for setting in sorted(groups)
    }


def title_of(variant: str) -> str:
    return VARIANTS[variant].title if variant in VARIANTS else variant


def rank_of(variant: str) -> int:
    """Place among the rows: that of the list of variants, unknown ones last."""
    return list(VARIANTS).index(variant) if variant in VARIANTS else len(VARIANTS)


def over_scenes(values: Mapping[tuple[str, int], float]) -> Mean:
    """Mean over scenes, each the mean over its seeds; the deviation is over the seeds that have all scenes.

    Args:
        values: (scene, seed) -> a metric.
    """
    scenes, seeds = sorted({scene for scene, _ in values}), sorted({seed for _, seed in values})
    whole = [seed for seed in seeds if all((scene, seed) in values for scene in scenes)]
    per_seed = [mean(values[scene, seed] for scene in scenes) for seed in whole]
    finite = all(math.isfinite(v) for v in per_seed)
    return Mean(
        value=mean(mean(v for (of, _), v in values.items() if of == scene) for scene in scenes),
        deviation=stdev(per_seed) if len(per_seed) > 1 and finite else None,
    )


def all_have(metric: str, runs: Iterable[Mapping[str, float]]) -> bool:
    """Whether runs have a metric: one that some lack (LPIPS without its weights) would be a mean over other runs."""
    return all(metric in metrics for metrics in runs)


def _row(variant: str, results: list[dict[str, Any]]) -> Row:
    found = {(r["job"]["scene"], r["job"]["seed"]): r["metrics"] for r in results}
    scenes, seeds = sorted({scene for scene, _ in found}), sorted({seed for _, seed in found})
    names = [name for name in METRICS if all_have(name, found.values())]
    by_scene = {
        scene: {name: mean(m[name] for (of, _), m in found.items() if of == scene) for name in names}
        for scene in scenes
    }
    means = {name: over_scenes({key: metrics[name] for key, metrics in found.items()}) for name in names}
    return Row(
        variant=variant,
        title=title_of(variant),
        means=means,
        by_scene=by_scene,
        seeds=tuple(seeds),
        scenes=tuple(scenes),
    )

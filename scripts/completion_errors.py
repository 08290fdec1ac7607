"""How far completed depth is off: by the prior's network, images together or each alone, and by interpolation.

python scripts/completion_errors.py [--prior PRIOR] CAPTURE ...      writes docs/figures/completion.md

Where a capture has true depth: mean relative error of all pixels that are not matched. Everywhere: the matches of half
of the scene are left out, in all images alike, and compared with what is completed there from the others.
"""

import contextlib
import io
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddm_training.files import write_whole
from diffusionerf_ns import completion, stereo
from diffusionerf_ns.agreement import complete_together
from diffusionerf_ns.datamanager import DiffusioNeRFDataManagerConfig
from diffusionerf_ns.dataparsers.few_view import FewViewDataParserConfig
from diffusionerf_ns.dataset import FewViewDataset
from diffusionerf_ns.views import MatchedView

ROOT = Path(__file__).resolve().parents[1]
VIEWS = 3
TEST_SIZES = {"fern": 16, "flower": 16, "scan24": 2}  # as in the benchmark


def matched_views(capture: Path, guess: completion.Completer) -> tuple[list[MatchedView], list[Any], float]:
    """The training images with what is matched, of each the true depth [h, w] in scene units or None, and the share of
    pixels that are matched without a guess."""
    found: list[MatchedView] = []

    def record(views: Sequence[MatchedView]) -> list[completion.Completed]:
        found.extend(views)
        return completion.BY_MEMBRANE(views)

    factor = TEST_SIZES.get(capture.name)
    with contextlib.redirect_stdout(io.StringIO()):
        parser = FewViewDataParserConfig(data=capture, num_views=VIEWS, downscale_factor=factor).setup()
        outputs = parser.get_dataparser_outputs("train")
    dataset = FewViewDataset(outputs)
    images = [dataset.get_numpy_image(i)[..., :3] for i in range(len(dataset))]
    masks: list[Any] = [None] * len(images)
    if outputs.mask_filenames is not None:
        masks = [dataset[i]["mask"][..., 0] for i in range(len(dataset))]
    share = stereo.match(outputs.cameras, images, masks, record, guess).share
    if not found or not all(view.is_matched for view in found):
        sys.exit(f"{capture}: of some images nothing is matched, so nothing can be said.")
    units = dataset.metadata.get("scene_units_per_metre")
    truth: list[Any] = []
    for index, view in enumerate(found):
        item = dataset[index]
        true = None
        if "depth_image" in item and units is not None:
            full = item["depth_image"][..., 0] * units
            row, column = (((torch.arange(n) + 0.5) * m / n).long() for n, m in zip(view.depth.shape, full.shape))
            true = full[row][:, column]
        truth.append(true)
    return found, truth, share


def without_cubes(views: list[MatchedView]) -> list[MatchedView]:
    """The views without the matches in half of the cubes of space, an eighth of an image wide: none knows them then."""
    points = [view.view.position + view.view.directions() * view.depth[..., None] for view in views]
    middle = torch.cat([view.depth[view.depth > 0] for view in views]).median()
    side = middle * max(views[0].depth.shape) / 8 / views[0].view.focal[0]
    cubes = torch.cat([(p / side).floor().reshape(-1, 3) for p in points]).long().numpy()
    _, cube = np.unique(cubes, axis=0, return_inverse=True)
    hidden = torch.from_numpy((np.random.default_rng(0).random(cube.max() + 1) < 0.5)[cube.ravel()])
    parts = hidden.split([view.depth.numel() for view in views])
    return [
        replace(view, depth=torch.where(part.reshape(view.depth.shape), 0.0, view.depth))
        for view, part in zip(views, parts)
    ]


def wrong_share(views: list[MatchedView], truth: list[Any]) -> str:
    """Of the matched pixels, those that are off by more than a tenth."""
    if truth[0] is None:
        return "no true depth"
    matched = [(view.depth > 0) & (true > 0) for view, true in zip(views, truth)]
    off = [(view.depth / true - 1.0).abs()[known] > 0.1 for view, true, known in zip(views, truth, matched)]
    return f"{float(torch.cat(off).float().mean()):.3f}"


def errors(views: list[MatchedView], truth: list[Any], complete: completion.Completer) -> tuple[float | None, float]:
    """Mean relative error where nothing is matched, and mean |log error| of matches that were left out."""
    unknown, left_out = [], []
    if truth[0] is not None:
        for view, true, completed in zip(views, truth, complete(views)):
            unknown.append((completed.depth / true.clamp_min(1e-6) - 1.0).abs()[(view.depth == 0) & (true > 0)])
    fewer = without_cubes(views)
    for view, less, completed in zip(views, fewer, complete(fewer)):
        if less.is_matched:
            out = (view.depth > 0) & (less.depth == 0)
            left_out.append((completed.depth / view.depth.clamp_min(1e-6)).log().abs()[out])
    return float(torch.cat(unknown).mean()) if unknown else None, float(torch.cat(left_out).mean())


def main() -> None:
    """Write the table."""
    words = sys.argv[1:]
    prior = words.pop(words.index("--prior") + 1) if "--prior" in words else "builtin"
    captures = [Path(word) for word in words if word != "--prior"]
    network = completion.find_network(prior)
    if network is None or not captures:
        sys.exit(__doc__ if captures == [] else f"prior {prior} has no network that completes depth.")
    lines = [
        f"Depth of the 3 training images, real matches: completed by the prior `{Path(prior).name}`, images together / "
        "the same, each image alone / interpolated.",
        "",
        "| capture | matched pixels, without a guess -> along completed depth | of them off by more than 10 % | "
        "AbsRel where nothing is matched | error of matches that were left out |",
        "|---|---:|---:|---:|---:|",
    ]
    completers = (
        partial(complete_together, network, steps=DiffusioNeRFDataManagerConfig().completion_steps),
        completion.alone(network.complete),
        completion.BY_MEMBRANE,
    )
    for capture in captures:
        views, truth, before = matched_views(capture, completers[1])
        share = float(torch.cat([(view.depth > 0).flatten().float() for view in views]).mean())
        unknown, left_out = zip(*(errors(views, truth, complete) for complete in completers))
        absrel = "no true depth" if unknown[0] is None else " / ".join(f"{x:.3f}" for x in unknown)
        left = " / ".join(f"{x:.3f}" for x in left_out)
        lines.append(
            f"| {capture.name} | {before:.2f} -> {share:.2f} | {wrong_share(views, truth)} | {absrel} | {left} |"
        )
        print(lines[-1])
    write_whole(ROOT / "docs" / "figures" / "completion.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

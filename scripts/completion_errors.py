"""How far completed depth is off: by the prior's network and by interpolation, on real matches of captures.

python scripts/completion_errors.py [--prior PRIOR] CAPTURE ...      writes docs/figures/completion.md

Where a capture has true depth: mean relative error of all pixels that are not matched. Everywhere: matches are left out
in half of the squares of an eighth of the image, and compared with what is completed there from the others.
"""

import contextlib
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusionerf_ns import completion, stereo
from diffusionerf_ns.dataparsers.few_view import FewViewDataParserConfig
from diffusionerf_ns.dataset import FewViewDataset

ROOT = Path(__file__).resolve().parents[1]
VIEWS = 3
TEST_SIZES = {"fern": 16, "flower": 16, "scan24": 2}  # as in the benchmark


def matched_images(capture: Path) -> list[tuple[Any, Any, Any]]:
    """Of each training image: colours [h, w, 3], matched depth [h, w], and true depth or None, scene units."""
    found: list[tuple[Any, Any]] = []

    def record(rgb: Any, depth: Any) -> tuple[Any, Any]:
        found.append((rgb, depth))
        return completion.by_membrane(rgb, depth)

    factor = TEST_SIZES.get(capture.name)
    with contextlib.redirect_stdout(io.StringIO()):
        parser = FewViewDataParserConfig(data=capture, num_views=VIEWS, downscale_factor=factor).setup()
        outputs = parser.get_dataparser_outputs("train")
    dataset = FewViewDataset(outputs)
    images = [dataset.get_numpy_image(i)[..., :3] for i in range(len(dataset))]
    masks = None
    if outputs.mask_filenames is not None:
        masks = [dataset[i]["mask"][..., 0] for i in range(len(dataset))]
    stereo.match(outputs.cameras, images, masks, record)
    if len(found) < len(images):
        sys.exit(f"{capture}: of {len(images) - len(found)} images nothing is matched, so nothing can be said.")
    units = dataset.metadata.get("scene_units_per_metre")
    rows = []
    for index, (rgb, depth) in enumerate(found):
        item = dataset[index]
        true = None
        if "depth_image" in item and units is not None:
            full = item["depth_image"][..., 0] * units
            row, column = (((torch.arange(n) + 0.5) * m / n).long() for n, m in zip(depth.shape, full.shape))
            true = full[row][:, column]
        rows.append((rgb, depth, true))
    return rows


def errors(images: list[tuple[Any, Any, Any]], complete: completion.Completer) -> tuple[float | None, float]:
    """Mean relative error where nothing is matched, and mean |log error| of matches that were left out."""
    unknown, left_out = [], []
    rng = np.random.default_rng(0)
    for rgb, depth, true in images:
        if true is not None:
            free = (depth == 0) & (true > 0)
            unknown.append((complete(rgb, depth)[0] / true.clamp_min(1e-6) - 1.0).abs()[free])
        height, width = depth.shape
        side = max(height, width) // 8
        squares = rng.random((height // side + 1, width // side + 1)) < 0.5
        hidden = torch.from_numpy(squares.repeat(side, 0).repeat(side, 1)[:height, :width])
        out = hidden & (depth > 0)
        if not bool((~hidden & (depth > 0)).any()):
            continue
        completed, _ = complete(rgb, torch.where(hidden, 0.0, depth))
        left_out.append((completed / depth.clamp_min(1e-6)).log().abs()[out])
    return float(torch.cat(unknown).mean()) if unknown else None, float(torch.cat(left_out).mean())


def main() -> None:
    """Write the table."""
    words = sys.argv[1:]
    prior = words.pop(words.index("--prior") + 1) if "--prior" in words else "builtin"
    captures = [Path(word) for word in words if word != "--prior"]
    network = completion.find_completer(prior)
    if network is None or not captures:
        sys.exit(__doc__ if captures == [] else f"prior {prior} has no network that completes depth.")
    lines = [
        f"Depth of the 3 training images, real matches: completed by the prior `{Path(prior).name}` / interpolated.",
        "",
        "| capture | pixels that are matched | AbsRel where nothing is matched | error of matches that were left out |",
        "|---|---:|---:|---:|",
    ]
    for capture in captures:
        images = matched_images(capture)
        share = float(torch.cat([(depth > 0).flatten().float() for _, depth, _ in images]).mean())
        (a, b), (c, d) = errors(images, network), errors(images, completion.by_membrane)
        absrel = "no true depth" if a is None or c is None else f"{a:.3f} / {c:.3f}"
        lines.append(f"| {capture.name} | {share:.2f} | {absrel} | {b:.3f} / {d:.3f} |")
        print(lines[-1])
    (ROOT / "docs" / "figures" / "completion.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

"""Pictures of a job, and contact sheets of several jobs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont, ImageOps

from ddm_training.files import replacing

if TYPE_CHECKING:
    from diffusionerf_ns.bench.job import TestImage

ERROR_SHOWN = 0.3  # mean absolute colour error that has the last colour of the map
CELL_WIDTH = 320
MARGIN = 4
TEXT_HEIGHT = 22


@dataclass(frozen=True, kw_only=True)
class SheetRow:
    """A row of a contact sheet: what one job rendered."""

    title: str
    folder: Path
    result: dict[str, Any]


def save_pictures(folder: Path, images: Sequence[tuple[int, "TestImage"]]) -> list[dict[str, Any]]:
    """Write true image, render, error and depth of some test images; depth colours have one range for all.

    Returns:
        For each image its name and the file names, relative to the folder above ``folder``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    depths = [image.depth.numpy() for _, image in images]
    true_depths = [image.true_depth.numpy() for _, image in images if image.true_depth is not None]
    limits = depth_limits(true_depths or depths)
    written = []
    for index, image in images:
        true, rgb = image.true.numpy(), image.rgb.numpy()
        files: dict[str, str] = {}

        def save(kind: str, picture: np.ndarray, index: int = index, files: dict[str, str] = files) -> None:
            path = folder / f"{index:03d}_{kind}.png"
            Image.fromarray(picture).save(path)
            files[kind] = f"{folder.name}/{path.name}"

        save("true", to_8bit(true))
        save("render", to_8bit(rgb))
        save("error", color_error(rgb, true))
        save("depth", color_depth(image.depth.numpy(), limits))
        arrays = {"depth": image.depth.numpy().astype(np.float32)}
        if image.true_depth is not None:
            save("true_depth", color_depth(image.true_depth.numpy(), limits))
            arrays["true_depth"] = image.true_depth.numpy().astype(np.float32)
        path = folder / f"{index:03d}_depth.npz"
        np.savez_compressed(path, **arrays)
        files["depth_values"] = f"{folder.name}/{path.name}"
        written.append({"name": image.name, **files})
    return written


def to_8bit(rgb: Float[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """Colours in [0, 1] as bytes; what is outside is held in the range."""
    return (np.clip(rgb, 0.0, 1.0) * 255.0).round().astype(np.uint8)


def color_error(rgb: Float[np.ndarray, "h w 3"], true: Float[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """Mean absolute error over channels: black is 0, bright is `ERROR_SHOWN` or more."""
    from matplotlib import colormaps

    error = np.abs(np.clip(rgb, 0, 1) - true).mean(axis=-1) / ERROR_SHOWN
    return (colormaps["inferno"](np.clip(error, 0.0, 1.0))[..., :3] * 255).round().astype(np.uint8)


def depth_limits(depths: Sequence[Float[np.ndarray, "_h _w"]]) -> tuple[float, float]:
    """Depth of the first and the last colour of a sheet: the 2nd and 98th percentile of all known depths."""
    known = [d[np.isfinite(d) & (d > 0)].ravel() for d in depths]
    values = np.concatenate(known) if known else np.empty(0)
    if values.size == 0:
        return 1.0, 2.0
    low, high = (float(v) for v in np.percentile(values, (2, 98)))
    return low, max(high, 1.01 * low)


def color_depth(z: Float[np.ndarray, "h w"], limits: tuple[float, float]) -> UInt8[np.ndarray, "h w 3"]:
    """Depth as colours, linear in 1/depth between ``limits``: near is red, far is blue, unknown is black."""
    from matplotlib import colormaps

    known = np.isfinite(z) & (z > 0)
    near, far = 1.0 / limits[0], 1.0 / limits[1]
    nearness = (1.0 / np.where(known, z, 1.0) - far) / (near - far)
    colors = colormaps["turbo"](np.clip(nearness, 0.0, 1.0))[..., :3]
    return (np.where(known[..., None], colors, 0.0) * 255).round().astype(np.uint8)


def contact_sheet(path: Path, rows: Sequence[SheetRow], *, title: str) -> None:
    """Write a sheet: a block of columns (image, depth, error) per test image, a row for the truth and for each job.

    Depth has one range of colours over the whole sheet: that of the true depth where it is known, else of all renders.
    """
    count = min(len(row.result["pictures"]) for row in rows)
    values = [[_depth_values(row, i) for i in range(count)] for row in rows]
    true_depths = [v["true_depth"] for v in values[0] if "true_depth" in v]
    limits = depth_limits(true_depths or [v["depth"] for row in values for v in row])
    lines: list[tuple[str, list[Image.Image | None]]] = []
    truth: list[Image.Image | None] = []
    for i in range(count):
        depth = values[0][i].get("true_depth")
        truth += [
            _open(rows[0], i, "true"),
            None if depth is None else Image.fromarray(color_depth(depth, limits)),
            None,
        ]
    lines.append(("ground truth", truth))
    for row, depths in zip(rows, values):
        cells: list[Image.Image | None] = []
        for i in range(count):
            depth = Image.fromarray(color_depth(depths[i]["depth"], limits))
            cells += [_open(row, i, "render"), depth, _open(row, i, "error")]
        lines.append((f"{row.title}   {_figures(row.result)}", cells))
    unit = rows[0].result["depth_unit"]
    caption = (
        f"{title}   |   per test image: image, depth ({limits[0]:.2g} red to {limits[1]:.2g} blue, {unit}), "
        f"error (black 0, bright {ERROR_SHOWN:g})"
    )
    _draw(path, caption, lines)


def _depth_values(row: SheetRow, index: int) -> dict[str, np.ndarray]:
    with np.load(row.folder / row.result["pictures"][index]["depth_values"], allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _open(row: SheetRow, index: int, kind: str) -> Image.Image:
    with Image.open(row.folder / row.result["pictures"][index][kind]) as image:
        return image.convert("RGB")


def _figures(result: dict[str, Any]) -> str:
    """The figures beside a row's title."""
    names = {"psnr": "PSNR {:.2f}", "ssim": "SSIM {:.3f}", "depth_abs_rel": "depth AbsRel {:.3f}"}
    found = [text.format(result["metrics"][name]) for name, text in names.items() if name in result["metrics"]]
    return "  ".join(found)


def _draw(path: Path, caption: str, lines: list[tuple[str, list[Image.Image | None]]]) -> None:
    first = next(cell for _, cells in lines for cell in cells if cell is not None)
    height = round(CELL_WIDTH * first.height / first.width)
    columns = max(len(cells) for _, cells in lines)
    size = (
        columns * (CELL_WIDTH + MARGIN) + MARGIN,
        TEXT_HEIGHT + len(lines) * (TEXT_HEIGHT + height + MARGIN) + MARGIN,
    )
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=15)
    draw.text((MARGIN, 3), caption, fill="black", font=font)
    for number, (title, cells) in enumerate(lines):
        top = TEXT_HEIGHT + number * (TEXT_HEIGHT + height + MARGIN)
        draw.text((MARGIN, top + 3), title, fill="black", font=font)
        for column, cell in enumerate(cells):
            if cell is not None:
                resized = ImageOps.pad(cell, (CELL_WIDTH, height), Image.Resampling.LANCZOS, color="white")
                sheet.paste(resized, (MARGIN + column * (CELL_WIDTH + MARGIN), top + TEXT_HEIGHT))
    with replacing(path) as part:
        sheet.save(part, format="PNG")

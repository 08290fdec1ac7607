"""A few photographs of a user: found in a folder, read, and written as a capture's images, all of one size."""

import contextlib
import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from jaxtyping import Float
from nerfstudio.utils.rich_utils import CONSOLE
from PIL import Image, ImageOps
from rich.markup import escape

from ddm_training.errors import InputError
from diffusionerf_ns.dataparsers.images import (
    PHOTOGRAPH_SUFFIXES,
    UNREADABLE,
    decoded,
    has_alpha,
    image_size,
    in_8_bits,
    list_images,
    same_shape,
)

JPEG = (".jpg", ".jpeg", ".jfif")
COPIED = {".png": ("PNG",), **dict.fromkeys(JPEG, ("JPEG", "MPO"))}  # suffix -> formats of its content
RAW = (".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".jxl")
ORIENTATION, EXIF_IFD, FOCAL_35MM = 0x0112, 0x8769, 0xA405  # EXIF tags
FOCAL_RANGE = (8.0, 400.0)  # millimetres as on 35 mm film, of lenses that people have
SAME_FOCAL = 1.05  # ratio of EXIF's focal lengths up to which they are one
LEAST_IMAGES = 3  # COLMAP does not build on points that two images alone see
THUMBNAIL = (32, 32)
# Mean difference of two thumbnails in parts of their contrast, up to which they are of one shot. Measured: .025 at most
# where a photograph was saved as JPEG, HEIC or WebP of quality 50 and down to a third of its size; .12 and more between
# the images of fern, of flower and of DTU's scan24.
SAME_SHOT = 0.03
SAME_GREY = 2.0  # of 255


def find_photographs(data: Path) -> list[Path]:
    """The photographs of a folder, each wholly readable and none a copy of another; see `without_copies`.

    Raises:
        InputError: no such folder, fewer than `LEAST_IMAGES` photographs without the copies, a damaged one, or some of
            a kind that cannot be read.
    """
    if not data.is_dir():
        raise InputError(f"--data {data} is no folder; expected one with photographs.")
    files = sorted(p for p in data.iterdir() if not p.name.startswith("."))
    if unknown := [p.name for p in files if p.name.encode(errors="replace").decode() != p.name]:
        raise InputError(f"--data {data} has a file whose name is no UTF-8, {unknown[0]!a}: rename it.")
    if raw := [p.name for p in files if p.suffix.lower() in RAW]:
        raise InputError(
            f"--data {data} has photographs of kinds that cannot be read here: {_some(raw)}. Save them as JPEG, and "
            "take these files out."
        )
    _read_heic()
    sources = list_images(data, PHOTOGRAPH_SUFFIXES)
    if others := [p.name for p in files if p not in sources]:
        CONSOLE.print(f"[yellow]Not taken for photographs: {escape(_some(others))}.")
    different, copies = without_copies(sources, or_else=f"take it out of {data}")
    if copies:
        named = ", ".join(f"{name} (of {of})" for name, of in copies.items())
        CONSOLE.print(f"[yellow]Copies are left out: {escape(named)}.")
    if len(different) < LEAST_IMAGES:
        without = f" without the copies among them ({_some(list(copies))})" if copies else ""
        raise InputError(
            f"--data {data} has {len(different)} photographs ({', '.join(PHOTOGRAPH_SUFFIXES)}){without}; "
            f"expected {LEAST_IMAGES} or more."
        )
    return different


def without_copies(sources: Sequence[Path], or_else: str = "take it out") -> tuple[list[Path], dict[str, str]]:
    """The photographs that differ, in their order; and the name of each copy of one of them -> the name of that one.

    A copy says nothing new of the scene, but COLMAP would take it for a photograph from the same place. Copies are told
    by how they look, so that the same shot as HEIC and as JPEG, or smaller, is one too. Of several the one with the
    most pixels stays, then one whose EXIF has the focal length, then that of the shortest name.

    Args:
        sources: photographs; all are decoded wholly, one at a time.
        or_else: what there is to do where one is not to be had in another form.

    Raises:
        InputError: one, or its EXIF, cannot be read.
    """
    _read_heic()
    thumbnails, ranks = {}, {}
    for source in sources:
        with decoded(source, or_else) as image, _reading(source):
            pixels, focal = image.width * image.height, _focal_of(image.getexif())
            thumbnails[source] = _thumbnail(image)
        ranks[source] = (-pixels, focal is None, len(source.name), source.name)
    originals: list[Path] = []
    copies: dict[str, str] = {}
    for source in sorted(sources, key=ranks.__getitem__):
        of = next((o for o in originals if _difference(thumbnails[o], thumbnails[source]) <= SAME_SHOT), None)
        if of is None:
            originals.append(source)
        else:
            copies[source.name] = of.name
    return sorted(originals, key=list(sources).index), dict(sorted(copies.items()))


def _thumbnail(image: Image.Image) -> Float[np.ndarray, "h w"]:
    """Small, grey, turned as its EXIF says; what is transparent is black."""
    if has_alpha(image):
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
    grey = image.convert("F" if image.mode[0] in "IF" else "L").convert("F")
    small = ImageOps.exif_transpose(grey).resize(THUMBNAIL, Image.Resampling.BILINEAR)
    return np.asarray(small, dtype=np.float64)


def _difference(a: Float[np.ndarray, "h w"], b: Float[np.ndarray, "h w"]) -> float:
    """Mean |a - b| in parts of the contrast, the mean distance from the mean; 0 where both are one colour.

    Of what is not as the edges of ``a`` are: before a flat background two sides of an object differ by little else.
    """
    edge = np.median(np.concatenate([a[0], a[-1], a[1:-1, 0], a[1:-1, -1]]))
    seen = np.maximum(np.abs(a - edge), np.abs(b - edge)) > SAME_GREY
    if not seen.any():
        return 0.0
    difference = np.abs(a - b)[seen].mean()
    contrast = fmean(float(np.abs(image[seen] - image[seen].mean()).mean()) for image in (a, b))
    return float(difference / contrast) if contrast > 0.0 else float(difference > 0.0)


def _read_heic() -> None:
    """Teach Pillow the format of phones; it comes to know their EXIF and turns their pixels as that says."""
    from pillow_heif import register_heif_opener

    register_heif_opener()


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def fingerprints(sources: Sequence[Path]) -> dict[str, dict[str, int | str]]:
    """Name of each photograph -> its size ("bytes") and the hash of what it holds ("sha256").

    Raises:
        InputError: one cannot be read.
    """
    found: dict[str, dict[str, int | str]] = {}
    for source in sources:
        with _reading(source):
            content = source.read_bytes()
        found[source.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return found


def write_images(sources: Sequence[Path], folder: Path) -> dict[str, float | None]:
    """Copies of the photographs as RGB, or as RGBA where a pixel is transparent, turned as their EXIF says.

    A JPEG or PNG that is so already is copied to the byte; of HEIC, as of all other formats, the copy is PNG.

    Returns:
        Name of each copy -> EXIF's focal length in millimetres as on 35 mm film, None where it says none.

    Raises:
        InputError: two would have the same name, one cannot be read, or its pixels are floating point numbers.
        OSError: ``folder`` cannot be written.
    """
    _read_heic()
    folder.mkdir(parents=True)
    focals: dict[str, float | None] = {}
    for source in sources:
        with _reading(source):
            image = Image.open(source)
        with image:  # open until it is written: some formats read their EXIF when it is asked for
            with _reading(source):
                exif = image.getexif()
                focal = _focal_of(exif)
                mode = "RGBA" if _is_transparent(image) else "RGB"
                kept = image.mode == mode and image.format in COPIED.get(source.suffix.lower(), ())
                as_it_is = kept and exif.get(ORIENTATION, 1) not in range(2, 9)
                copy = source.read_bytes() if as_it_is else _upright(source, image).convert(mode)
            name = source.name if kept else f"{source.stem}.png"
            if name in focals:
                raise InputError(f"two photographs would be written as {name}, {source.name} is one: rename it.")
            if isinstance(copy, bytes):
                (folder / name).write_bytes(copy)
            else:
                exif.pop(ORIENTATION, None)
                _save(copy, folder / name, exif)
        focals[name] = focal
    return focals


@contextlib.contextmanager
def _reading(source: Path) -> Iterator[None]:
    """Tell plainly of a photograph that cannot be read, or whose EXIF cannot.

    Raises:
        InputError: that.
    """
    try:
        yield
    except InputError:  # a ValueError, which Pillow raises as well
        raise
    except (*UNREADABLE, TypeError) as error:
        raise InputError(f"{source} cannot be read: {error}. Save it as JPEG anew, or take it out.") from error


def _upright(source: Path, image: Image.Image) -> Image.Image:
    """Turned as its EXIF says, in 8 bits."""
    try:
        return in_8_bits(ImageOps.exif_transpose(image))
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def _is_transparent(image: Image.Image) -> bool:
    """Whether a pixel is, in part or wholly."""
    if not has_alpha(image) and "transparency" not in image.info:
        return False
    return image.convert("RGBA").getchannel("A").getextrema() != (255, 255)


def _focal_of(exif: Image.Exif) -> float | None:
    """EXIF's focal length in millimetres as on 35 mm film; None where it says none that a lens has."""
    try:
        focal = float(exif.get_ifd(EXIF_IFD).get(FOCAL_35MM) or 0.0)
    except (TypeError, ValueError):
        return None
    return focal if FOCAL_RANGE[0] <= focal <= FOCAL_RANGE[1] else None


def _save(image: Image.Image, path: Path, exif: Image.Exif) -> None:
    """With the EXIF as far as it can be written. A JPEG loses little."""
    options: dict[str, Any] = {"quality": 95, "subsampling": 0} if path.suffix.lower() in JPEG else {}
    try:
        options["exif"] = exif.tobytes()
    except Exception:  # whatever Pillow raises at tags of wrong types, struct.error among them
        CONSOLE.print(f"[yellow]EXIF of {escape(path.name)} is left out: it cannot be written again.")
    image.save(path, **options)


def one_focal(focals: dict[str, float | None]) -> float | None:
    """EXIF's focal length, in millimetres as on 35 mm film; None where no photograph says it.

    Raises:
        InputError: several.
    """
    known = {name: focal for name, focal in focals.items() if focal is not None}
    if not known:
        return None
    if max(known.values()) > SAME_FOCAL * min(known.values()):
        said = ", ".join(f"{name} {focal:g} mm" for name, focal in known.items())
        raise InputError(
            f"the photographs were taken with different lenses or zooms ({said}); expected one. Take those of the "
            "others out; or --cameras each, which needs many photographs."
        )
    return fmean(known.values())


def one_size(folder: Path, names: Sequence[str]) -> tuple[tuple[int, int], tuple[str, ...]]:
    """Width and height of all images, once they have one: of some that lie and some that are upright the latter are
    turned to the left, and of one lens with 12 and 24 megapixels the larger ones are reduced.

    Returns:
        That size, and the names of those that were turned.

    Raises:
        InputError: they are of different shapes: cropped, or of several lenses, of which few photographs tell little.
    """
    sizes = {name: image_size(folder / name) for name in names}
    if len(set(sizes.values())) == 1:
        return next(iter(sizes.values())), ()
    mixed = len({height > width for width, height in sizes.values()}) > 1
    turned = tuple(name for name, (width, height) in sizes.items() if mixed and height > width)
    stand = {name: (max(size), min(size)) if mixed else size for name, size in sizes.items()}
    least = min(stand.values(), key=math.prod)
    if not all(same_shape(size, least) for size in stand.values()):
        found = ", ".join(f"{name} {width} x {height}" for name, (width, height) in sizes.items())
        raise InputError(f"the photographs are of different shapes ({found}); expected one: do not crop them.")
    reduced = [name for name, size in stand.items() if size != least]
    for name in {*turned, *reduced}:
        with Image.open(folder / name) as image:
            changed = image.transpose(Image.Transpose.ROTATE_90) if name in turned else image
            if name in reduced:
                changed = changed.resize(least, Image.Resampling.BOX)
            _save(changed, folder / name, image.getexif())
    if turned:
        CONSOLE.print(f"Turned to lie as the others: {escape(', '.join(turned))}.")
    if reduced:
        CONSOLE.print(f"Reduced to {least[0]} x {least[1]} as the smallest: {escape(', '.join(reduced))}.")
    return least, turned

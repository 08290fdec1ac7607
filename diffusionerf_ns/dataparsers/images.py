"""Image files: listing, checking, and a cache of downscaled copies.

A cache folder is written under another name and renamed when it is whole, so a killed run leaves nothing that is later
trusted, and two runs at once do no harm. It holds `cache.json`, which says what it was made from; a folder without that
file belongs to the user and is never written to.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from pathlib import Path

import numpy as np
from nerfstudio.utils.rich_utils import CONSOLE
from PIL import Image
from rich.markup import escape

from ddm_training.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff")
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises
PHOTOGRAPH_SUFFIXES = (*SUFFIXES, ".heic", ".heif", ".avif")  # of what people have; captures are of the above
CACHE_FILE = "cache.json"
OTHER_IMAGES = "choose other images with --train-ids and --test-ids"
ROUNDING = 1.0  # pixels: a side that is rounded, up or down, is off by less
STALE_SECONDS = 6 * 3600  # unfinished folders older than this are what killed runs left behind


def absolute(path: Path) -> Path:
    """Without "." and "..", but not through links: what is linked belongs where the link is."""
    return Path(os.path.abspath(path))  # Path.absolute keeps ".."


def list_images(folder: Path, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """Image files of a folder, sorted by name; hidden files, other kinds and folders are left out."""
    if not folder.is_dir():
        return []
    named = (p for p in folder.iterdir() if p.suffix.lower() in suffixes and not p.name.startswith("."))
    return sorted(p for p in named if not p.is_dir())  # a link to nothing is kept, to be named when it is read


def image_size(path: Path) -> tuple[int, int]:
    """Width and height as the file's header says them.

    Raises:
        InputError: no such file, or not an image.
    """
    try:
        with Image.open(path) as image:
            return image.size
    except UNREADABLE as error:
        raise InputError(f"{path} cannot be read as an image: {error}.") from error


def check_readable(paths: Sequence[Path], or_else: str = OTHER_IMAGES) -> list[tuple[int, int]]:
    """Decode every image wholly and give their sizes (width, height).

    Args:
        paths: of the images.
        or_else: what there is to do where a file is not to be had in another form.

    Raises:
        InputError: a file is missing, truncated, or not an image.
    """
    sizes = []
    for path in paths:
        with decoded(path, or_else) as image:
            sizes.append(image.size)
    return sizes


@contextlib.contextmanager
def decoded(path: Path, or_else: str = OTHER_IMAGES) -> Iterator[Image.Image]:
    """An image, wholly decoded; see `check_readable`."""
    with contextlib.ExitStack() as opened:
        try:
            image = opened.enter_context(Image.open(path))
            image.load()
        except UNREADABLE as error:
            raise _unreadable(path, error, or_else) from error
        yield image


def _unreadable(path: Path, error: BaseException, or_else: str = OTHER_IMAGES) -> InputError:
    return InputError(f"{path} cannot be read as an image: {error}. {_remedy(path, error)}, or {or_else}.")


def _remedy(path: Path, error: BaseException) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return "It has more pixels than are read here: save it with half of them a side"
    try:
        with path.open("rb") as file:
            container = file.read(8)[4:]
    except OSError:
        container = b""
    if container == b"ftyp":
        return "It is a HEIC, AVIF or film file: save it as JPEG"
    return "The file is damaged or cut short: fetch it again"


def check_mask_size(path: Path, size: tuple[int, int]) -> None:
    """Raises InputError where a mask is smaller than its image, or of another shape."""
    found = image_size(path)
    if found[0] < size[0] or not same_shape(found, size):
        raise InputError(
            f"mask {path} is {found[0]} x {found[1]}, the images are {size[0]} x {size[1]}: expected masks of that "
            "size, or larger ones of that shape."
        )


def same_shape(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether the larger of two sizes (width, height), reduced by some factor, is the smaller but for `ROUNDING`.

    Sides are compared in pixels, not by their ratio: of a wide image one pixel of the height is several of the width.
    """
    (w, h), (width, height) = sorted((size, other), key=math.prod)
    return abs(w / width - h / height) <= ROUNDING * (1.0 / width + 1.0 / height)


def has_alpha(image: Image.Image) -> bool:
    """Whether an image says how transparent it is, by a channel or by colours that stand for it."""
    return image.mode in ("RGBA", "LA", "PA") or (image.mode in ("L", "P") and "transparency" in image.info)


def in_8_bits(image: Image.Image) -> Image.Image:
    """An image as L, RGB or RGBA. 16-bit grey is divided by 257, where Pillow's own conversion would cut at 255.

    Raises:
        InputError: its pixels are floating point numbers, whose range nobody knows.
    """
    if image.mode == "F":
        raise InputError("an image has floating point numbers for pixels; save it with 8 or 16 bits a colour.")
    if image.mode[0] == "I":
        grey = (np.asarray(image).astype(np.int64) + 128) // 257
        return Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    if has_alpha(image):
        return image.convert("RGBA")
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def shrink(image: Image.Image, factor: int) -> Image.Image:
    """Area average over factor x factor pixels; the size is rounded down where it does not divide."""
    image = in_8_bits(image)
    width, height = image.size
    size = (width // factor, height // factor)
    if min(size) < 1:
        raise InputError(f"an image of {width} x {height} pixels cannot be reduced by {factor}.")
    if width % factor == 0 and height % factor == 0:
        return image.reduce(factor)  # the exact mean of each block; resize rounds rows and columns one after the other
    return image.resize(size, Image.Resampling.BOX)


def user_cache() -> Path:
    """`$XDG_CACHE_HOME/diffusionerf_ns`, by default `~/.cache/diffusionerf_ns`."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if root and Path(root).is_absolute() else Path.home() / ".cache") / "diffusionerf_ns"


def downscaled(sources: Sequence[Path], factor: int, folder: Path, needed: Container[Path] | None = None) -> list[Path]:
    """Copies of ``sources`` reduced by ``factor``, made once.

    Args:
        sources: images, each name once.
        factor: area average over factor x factor pixels; 1 gives the sources themselves.
        folder: where the copies go, e.g. `images_8` beside `images`; where that cannot be written, or holds files
            that this function has not made, a folder of the user's cache is taken instead.
        needed: sources of which there shall be copies; None: all.

    Returns:
        The path of each copy, in the order of ``sources``: PNG, so nothing is lost.

    Raises:
        InputError: a source that is needed is damaged, or nowhere can be written.
    """
    if factor == 1:
        return list(sources)
    names, needed = _names(sources), sources if needed is None else needed
    origin = {
        "made_by": "diffusionerf-ns",
        "factor": factor,
        "sources": [[str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for p in sources],
        "names": names,
    }
    digest = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    places = [folder, user_cache() / "images" / f"{folder.parent.name}-{folder.name}-{digest}"]
    problems = []
    for place in places:
        if place.exists() and not (place / CACHE_FILE).is_file():
            problems.append(f"{place} exists and was not made here")
            continue
        try:
            wanted = [(source, name) for source, name in zip(sources, names) if source in needed]
            if not _is_made_from(place, origin):
                _make(place, wanted, factor, origin)
            missing = [(source, place / name) for source, name in wanted if not (place / name).is_file()]
            if missing:
                CONSOLE.print(f"reducing {len(missing)} more images by {factor} into {escape(str(place))} (once)")
            for source, copy in missing:
                copy.parent.mkdir(parents=True, exist_ok=True)
                part = copy.with_name(f".{copy.name}.{os.getpid()}.part")
                _write_copy(source, factor, part)
                part.replace(copy)
            return [place / name for name in names]
        except OSError as error:
            problems.append(f"{place}: {error.strerror or error}")
    raise InputError(
        f"the images must be reduced by {factor}, but there is nowhere to write them: {'; '.join(problems)}. "
        "Set XDG_CACHE_HOME to a folder that can be written, or give images of the wanted size."
    )


def _names(sources: Sequence[Path]) -> list[str]:
    """A PNG name for each source, with the folders below the one that all share, and never "..".

    The old suffix is kept in it where two sources differ in nothing else.
    """
    files = [absolute(p) for p in sources]  # with "..", names would lead out of the cache
    shared = Path(os.path.commonpath([p.parent for p in files]))
    paths = [p.relative_to(shared) for p in files]
    times = Counter(p.with_suffix("") for p in paths)
    names = [f"{p.with_suffix('') if times[p.with_suffix('')] == 1 else p}.png" for p in paths]
    if doubles := sorted(name for name, count in Counter(names).items() if count > 1):
        raise InputError(f"images have the same path: {', '.join(doubles[:5])}.")
    return names


def _is_made_from(place: Path, origin: dict) -> bool:
    try:
        return json.loads((place / CACHE_FILE).read_text()) == origin
    except (OSError, ValueError):
        return False


def _make(place: Path, wanted: Sequence[tuple[Path, str]], factor: int, origin: dict) -> None:
    """Write a cache folder under another name and rename it into place. OSError where that is not possible.

    Args:
        wanted: sources and the names of their copies; those of others may be added later.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    _sweep(place)
    part = Path(tempfile.mkdtemp(prefix=f".{place.name}.part-", dir=place.parent))
    try:
        part.chmod(0o755)  # mkdtemp gives 0700; others who share the data may read the copies
        CONSOLE.print(f"reducing {len(wanted)} images by {factor} into {escape(str(place))} (once)")
        for source, name in wanted:
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            _write_copy(source, factor, part / name)
        (part / CACHE_FILE).write_text(json.dumps(origin))
        _move_into_place(part, place, origin)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write_copy(source: Path, factor: int, copy: Path) -> None:
    try:
        with Image.open(source) as image:
            small = shrink(image, factor)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    except UNREADABLE as error:
        raise _unreadable(source, error) from error
    small.save(copy, format="PNG", compress_level=4)


def _move_into_place(part: Path, place: Path, origin: dict) -> None:
    """Rename; an older cache is moved aside first. The second of two runs at once keeps the first's copies."""
    if (place / CACHE_FILE).is_file() and not _is_made_from(place, origin):
        old = Path(tempfile.mkdtemp(prefix=f".{place.name}.old-", dir=place.parent))
        place.rename(old / place.name)
        shutil.rmtree(old, ignore_errors=True)
    try:
        part.rename(place)
    except OSError:
        if not _is_made_from(place, origin):
            raise


def _sweep(place: Path) -> None:
    """Remove what killed runs left beside a cache folder."""
    for kind in ("part", "old"):
        for left in place.parent.glob(f".{place.name}.{kind}-*"):
            with contextlib.suppress(FileNotFoundError):  # the run that it belongs to has ended meanwhile
                if time.time() - left.stat().st_mtime > STALE_SECONDS:
                    shutil.rmtree(left, ignore_errors=True)

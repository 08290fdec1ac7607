"""The frame store: RGBD frames as flat arrays of physical values, one folder per scene.

Layout of a store::

    <root>/<scene>/color.npy    uint8    [n, h, w, 3]   sRGB
                   depth.npy    float16  [n, h, w]      planar depth in metres, 0 where invalid
                   mask.npy     bool     [n, h, w]      True where depth is valid
                   scene.json   intrinsics [n][fx, fy, cx, cy] in pixels, frame names, split, source, rejections,
                                digest of the names of all frames that were asked for

Arrays are memory-mapped when read, so a random crop touches only its own pages and a store may be far larger than
memory. A map keeps no file open: a store may have many more scenes than a process may have open files.

A scene is written into ``<scene>.part`` and renamed when it is whole: a folder without the suffix is complete, and one
with it is what a killed run left behind (ignored when reading, replaced when written again).
"""

import hashlib
import io
import json
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, UInt8

from ddm_training.errors import InputError
from ddm_training.rejection import MACHINE_ERRORS

FORMAT = "rgbd-frames-1"
SCENE_FILE = "scene.json"
Split = Literal["train", "val", "test"]


@dataclass(frozen=True, kw_only=True)
class SceneInfo:
    """What `scene.json` says."""

    name: str
    split: Split
    height: int
    width: int
    frames: tuple[str, ...]
    """Name of each frame, for error messages and provenance."""
    intrinsics: tuple[tuple[float, float, float, float], ...]
    """fx, fy, cx, cy of each frame, in pixels of the stored size, the centre of the first pixel at (0.5, 0.5)."""
    source: str
    """Data set that the scene comes from, e.g. "hypersim", "rooms", "hololens"."""
    rejected: dict[str, int] = field(default_factory=dict)
    """Number of frames left out, by reason."""
    asked: str = ""
    """`names_digest` of all frames that were to be read, kept or not; not written where it is empty."""
    format: str = FORMAT


def names_digest(names: Sequence[str]) -> str:
    """Tells whether a scene was made of the same frames in the same order."""
    return hashlib.sha256(json.dumps(list(names)).encode()).hexdigest()


class SceneWriter:
    """Writes one scene frame by frame, in memory that does not grow with the number of frames.

    Arrays are appended to plain files, not to memory maps: on a full disk a write raises OSError, while a store into a
    map ends the process with SIGBUS, and the pages of a map count as memory of the process.

    Args:
        root: the store; made when absent.
        name: the scene; an existing scene of that name is replaced on `close`.
        split: which split it belongs to.
        source: data set it comes from.
        max_frames: upper bound of the number of frames.
        height, width: frame size in pixels.
        asked: `names_digest` of the frames that it is made of, where it may be made of others later.
    """

    def __init__(
        self,
        root: Path,
        name: str,
        *,
        split: Split,
        source: str,
        max_frames: int,
        height: int,
        width: int,
        asked: str = "",
    ) -> None:
        self.final = root / name
        self.part = root / f"{name}.part"
        self._meta = {"name": name, "split": split, "source": source, "height": height, "width": width}
        self._max_frames, self._asked = max_frames, asked
        self._names: list[str] = []
        self._intrinsics: list[tuple[float, float, float, float]] = []
        self._rejected: dict[str, int] = {}
        if self.part.exists():
            shutil.rmtree(self.part)
        self.part.mkdir(parents=True)
        self._files = {}
        for array, (dtype, tail) in _LAYOUT.items():
            self._files[array] = (self.part / f"{array}.npy").open("wb", buffering=0)
            self._files[array].write(_npy_header(dtype, (0, height, width, *tail)))

    def add(
        self,
        color: UInt8[np.ndarray, "h w 3"],
        depth: Float[np.ndarray, "h w"],
        mask: Bool[np.ndarray, "h w"],
        *,
        intrinsics: tuple[float, float, float, float],
        name: str,
    ) -> None:
        """Append a frame: sRGB colour, planar depth in metres, validity; intrinsics fx, fy, cx, cy in pixels."""
        expected = (self._meta["height"], self._meta["width"])
        if depth.shape != expected:
            raise ValueError(f"frame {name!r} has the shape {depth.shape}, the scene is made for {expected}")
        if len(self._names) >= self._max_frames:
            raise IndexError(f"frame {name!r} is one more than max_frames = {self._max_frames}")
        valid = mask & np.isfinite(depth) & (depth > 0)
        content = {"color": color, "depth": np.where(valid, depth, 0.0), "mask": valid}
        for array, (dtype, _) in _LAYOUT.items():
            _write_all(self._files[array], np.ascontiguousarray(content[array], dtype))
        self._names.append(name)
        self._intrinsics.append(intrinsics)

    def reject(self, reason: str, count: int = 1) -> None:
        """Count frames that were left out, by reason."""
        self._rejected[reason] = self._rejected.get(reason, 0) + count

    def close(self) -> SceneInfo:
        """Write the number of frames into the arrays, write `scene.json`, and rename the folder into place."""
        height, width = self._meta["height"], self._meta["width"]
        for array, file in self._files.items():
            dtype, tail = _LAYOUT[array]
            file.seek(0)
            file.write(_npy_header(dtype, (len(self._names), height, width, *tail)))
            os.fsync(file.fileno())
            file.close()
        info = SceneInfo(
            **self._meta,  # pyright: ignore[reportArgumentType]
            frames=tuple(self._names),
            intrinsics=tuple(self._intrinsics),
            rejected=self._rejected,
            asked=self._asked,
        )
        content = {key: value for key, value in asdict(info).items() if key != "asked" or value}
        (self.part / SCENE_FILE).write_text(json.dumps(content))
        if self.final.exists():
            shutil.rmtree(self.final)
        self.part.rename(self.final)
        return info


_LAYOUT: dict[str, tuple[type, tuple[int, ...]]] = {
    "color": (np.uint8, (3,)),
    "depth": (np.float16, ()),
    "mask": (np.bool_, ()),
}


def _npy_header(dtype: type, shape: tuple[int, ...]) -> bytes:
    """Header of an .npy file, of one length whatever the number of rows, so that it can be written over."""
    buffer = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": shape})
    header = buffer.getvalue()
    assert len(header) == 128  # numpy pads for a first axis that grows
    return header


def _write_all(file: io.FileIO, array: np.ndarray) -> None:
    """Write all bytes: an unbuffered file may take a part of them, on a disk that is getting full."""
    rest = array.data.cast("B")
    while rest:
        rest = rest[file.write(rest) :]


@dataclass(frozen=True)
class Scene:
    """A scene of a store, its arrays memory-mapped. Pickled as its folder: another process maps it anew."""

    folder: Path
    info: SceneInfo
    color: UInt8[np.ndarray, "n h w 3"]
    depth: Float[np.ndarray, "n h w"]
    mask: Bool[np.ndarray, "n h w"]

    def __len__(self) -> int:
        return len(self.info.frames)

    def __reduce__(self) -> tuple[Callable[[Path], "Scene"], tuple[Path]]:
        return open_scene, (self.folder,)


def _unreadable(path: Path, folder: Path, error: Exception) -> InputError:
    """What to say of a file of the scene in ``folder``: to delete it only where the file is to blame."""
    if isinstance(error, OSError) and error.errno in MACHINE_ERRORS:
        return InputError(
            f"{path} cannot be read ({error}): the machine or a permission is to blame, not the scene. Mend that and "
            "run the same command again; the scene can stay."
        )
    return InputError(f"{path} cannot be read ({error}): delete {folder} and prepare the scene again.")


def read_scene_info(folder: Path) -> SceneInfo:
    """Read and check `scene.json`.

    Raises:
        InputError: missing, unreadable, or of another format.
    """
    path = folder / SCENE_FILE
    try:
        content = json.loads(path.read_text())
        found = content.get("format")
        if found != FORMAT:
            raise InputError(f"{path} has format {found!r}, this version reads {FORMAT!r}: prepare the scene again.")
        content["frames"] = tuple(content["frames"])
        content["intrinsics"] = tuple(tuple(row) for row in content["intrinsics"])
        return SceneInfo(**content)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(path, folder, error) from error


def open_scene(folder: Path) -> Scene:
    """Open one scene, memory-mapped.

    Raises:
        InputError: `scene.json` or an array is missing, damaged, or of another size than `scene.json` says.
    """
    return _open_arrays(folder, read_scene_info(folder))


def _open_arrays(folder: Path, info: SceneInfo) -> Scene:
    """The scene that ``info``, read from ``folder``, tells of."""
    shape = (len(info.frames), info.height, info.width)
    arrays = []
    for name, (kind, tail) in _LAYOUT.items():
        path, expected, dtype = folder / f"{name}.npy", (*shape, *tail), np.dtype(kind)
        try:
            array = np.load(path, mmap_mode="r" if shape[0] else None)
        except (OSError, ValueError, EOFError) as error:
            raise _unreadable(path, folder, error) from error
        if array.shape != expected or array.dtype != dtype or not array.flags.c_contiguous:
            order = "" if array.flags.c_contiguous else " by columns"
            raise InputError(
                f"{path} holds {array.dtype} {array.shape}{order}, {SCENE_FILE} says {dtype} {expected}: "
                f"delete {folder} and prepare it again."
            )
        arrays.append(_map(path, array) if isinstance(array, np.memmap) else array)
    return Scene(folder, info, *arrays)


def _map(path: Path, array: np.memmap) -> np.ndarray:
    """The same map without an open file, of which numpy's hold one each as long as they live.

    It is private to the process; where the machine does not give memory for what could be written into it, which
    nobody does, numpy's is kept.
    """
    import torch  # not above: what writes stores does without

    offset, size = array.offset, array.nbytes
    try:
        whole = torch.from_file(str(path), size=offset + size, dtype=torch.uint8).numpy()
    except RuntimeError:
        return array
    mapped = whole[offset:].view(array.dtype).reshape(array.shape)
    mapped.flags.writeable = False
    return mapped


def open_store(roots: Path | Sequence[Path], split: Split | None = None) -> list[Scene]:
    """Open all whole scenes of one or several stores, sorted by path, those of ``split`` only if it is given.

    Of scenes of another split only `scene.json` is read. Folders that hold no file of a scene are passed over.

    Raises:
        InputError: a root is no folder, or holds stores in place of scenes; a scene is damaged or cannot be read now;
            or nothing is left.
    """
    roots = [roots] if isinstance(roots, Path) else list(roots)
    scenes: list[Scene] = []
    seen: dict[str, int] = {}
    for root in roots:
        if not root.is_dir():
            raise InputError(
                f"{root} is not a folder; expected a frame store as `ddm rooms` or `ddm frames` writes it."
            )
        for folder in _scene_folders(root):
            info = read_scene_info(folder)
            seen[info.split] = seen.get(info.split, 0) + 1
            if info.frames and split in (None, info.split):
                scenes.append(_open_arrays(folder, info))
    if not scenes:
        raise InputError(
            f"no frames of split {split!r} in {', '.join(map(str, roots))}; scenes found by split: {seen or 'none'}."
        )
    return scenes


def _scene_folders(root: Path) -> list[Path]:
    """The folders of a store that hold a file of a scene, sorted.

    Raises:
        InputError: none does, but some hold scenes themselves; or one cannot be looked into.
    """
    scenes, stores = [], []
    for folder in _subfolders(root):
        try:
            if any((folder / name).is_file() for name in (SCENE_FILE, *(f"{array}.npy" for array in _LAYOUT))):
                scenes.append(folder)
            elif any((inner / SCENE_FILE).is_file() for inner in _subfolders(folder)):
                stores.append(folder)
        except OSError as error:
            if folder.name != "lost+found":  # of a file system's own, for its administrator alone
                raise _unreadable(folder / SCENE_FILE, folder, error) from error
    if stores and not scenes:
        raise InputError(f"{root} is a folder of stores: give --data {' '.join(map(str, stores))}.")
    if stores:
        warnings.warn(f"{root}: left out what is in the stores {', '.join(p.name for p in stores)} in it", stacklevel=3)
    return scenes


def _subfolders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and p.suffix != ".part")

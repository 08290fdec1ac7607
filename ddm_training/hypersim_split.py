"""Hypersim's official split: which frames are public, and which scenes to take."""

import csv
import operator
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ddm_training.errors import InputError

COLUMNS = ("scene_name", "camera_name", "frame_id", "included_in_public_release", "split_partition_name")
NAME = r"[A-Za-z0-9_-]+"
SPLITS = ("train", "val", "test")
_EXPECTED = (
    "expected metadata_images_split_scene_v1.csv of the repository apple/ml-hypersim, where it is in "
    "evermotion_dataset/analysis: say by --split-csv where it is here"
)


@dataclass(frozen=True)
class PublicScene:
    """The frames of a scene that were released. All frames of a scene are in the same split."""

    name: str
    split: str
    """"train", "val" or "test"; empty where no frame is public."""
    frames: tuple[tuple[str, int], ...]
    """Camera name and frame number, sorted."""


def read_split_csv(path: Path) -> dict[str, PublicScene]:
    """Read `metadata_images_split_scene_v1.csv`: all scenes by name, also those without public frames.

    Raises:
        InputError: the file is missing, has other columns, a row makes no sense, or a scene is in two splits.
    """
    frames: dict[str, set[tuple[str, int]]] = {}
    splits: dict[str, str] = {}
    try:
        with open(path, newline="") as file:
            rows = csv.reader(file)
            header = next(rows, [])
            if missing := set(COLUMNS) - set(header):
                raise InputError(f"{path} lacks the columns {sorted(missing)}; {_EXPECTED}.")
            columns = operator.itemgetter(*map(header.index, COLUMNS))
            for row in rows:
                scene, camera, number, public, split = columns(row) if len(row) == len(header) else ("",) * 5
                if scene not in frames and not re.fullmatch(NAME, scene):  # it becomes a folder and a part of a URL
                    public = ""
                known = frames.setdefault(scene, set())
                if public == "False":
                    continue
                consistent = public == "True" and split in SPLITS and splits.setdefault(scene, split) == split
                if not consistent or not number.isdecimal() or not re.fullmatch(NAME, camera):
                    raise InputError(f"{path} line {rows.line_num}: {row} is no row {COLUMNS} that this reads.")
                known.add((camera, int(number)))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read ({error}); {_EXPECTED}.") from error
    return {name: PublicScene(name, splits.get(name, ""), tuple(sorted(known))) for name, known in frames.items()}


def select_scenes(
    scenes: Mapping[str, PublicScene],
    *,
    split: Literal["train", "val", "test", "all"] = "all",
    ids: Sequence[str] = (),
    count: int | None = None,
    seed: int = 0,
    frames_per_scene: int | None = None,
) -> list[PublicScene]:
    """Scenes with public frames, by split and ids; of these ``count`` drawn by ``seed``; sorted by name.

    The draw is the beginning of a shuffle, so that a larger count includes a smaller one's scenes.

    Raises:
        InputError: an id is unknown, has no public frame or is in another split, or there are too few scenes.
    """
    for name in ids:
        if name not in scenes:
            raise InputError(f"scene {name!r} is not in the split file, which has {len(scenes)} scenes.")
        if not scenes[name].frames:
            raise InputError(f"scene {name} has no public frame: it was left out of the release.")
        if split not in ("all", scenes[name].split):
            raise InputError(f"scene {name} is in split {scenes[name].split!r}, --split asks for {split!r}.")
    chosen = [scenes[name] for name in sorted(set(ids) or scenes)]
    chosen = [scene for scene in chosen if scene.frames and split in ("all", scene.split)]
    if len(chosen) < (count or 1):
        raise InputError(f"{count or 1} scenes of split {split!r} asked for, the split file has {len(chosen)}.")
    if count is not None:
        random.Random(seed).shuffle(chosen)
        chosen = sorted(chosen[:count], key=lambda scene: scene.name)
    if frames_per_scene is not None:
        chosen = [replace(scene, frames=_spread(scene.frames, frames_per_scene)) for scene in chosen]
    return chosen


def _spread(frames: tuple[tuple[str, int], ...], count: int) -> tuple[tuple[str, int], ...]:
    """At most ``count`` frames, evenly spread: the middle of each of ``count`` equal parts."""
    if len(frames) <= count:
        return frames
    return tuple(frames[(2 * k + 1) * len(frames) // (2 * count)] for k in range(count))

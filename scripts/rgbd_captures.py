"""Cut few-view captures with true depth out of a hand-held RGBD video.

python scripts/rgbd_captures.py DATA OUTPUT [COUNT]

DATA holds `rgb`, `depth` (16-bit millimetres), `K.txt`, and `poses.txt` with a camera-to-world matrix a line (OpenCV
axes, metres); all of it is held in memory. OUTPUT gets folders `capture-1` to `capture-COUNT` (default 4), each with
three training images and six test images in nerfstudio's format. Geometry alone chooses them, and no frame is in two of
them: sharp frames; training views that share about .7 of what they see, as those of a person with a plan do; test views
of which they show .85.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, UInt8
from scipy.ndimage import laplace

from ddm_training.errors import InputError
from ddm_training.rgbd_folder import image_size, list_pairs, read_intrinsics, read_pair
from ddm_training.transforms import write_views

NUM_TEST = 6
SHARED = (0.4, 0.7, 0.9)  # what a training view shows of another's surfaces: at least, at best, at most
TEST_SHOWN = 0.85  # what training views show of a test view's surfaces, at least
APART = 0.1  # distance of two training cameras, at least, of the median depth
TEST_APART = 0.03  # distance of a test camera from each training camera, likewise
SAME_SURFACE = 0.05  # relative difference of depth
STRIDE = 4  # pixels: enough to judge what two frames share
AROUND = 5  # frames before and after, of which a sharp one is sharper than half
OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])


@dataclass(frozen=True)
class Video:
    """Frames of an RGBD video."""

    names: list[str]
    color: list[UInt8[np.ndarray, "h w 3"]]
    depth: list[Float[np.ndarray, "h w"]]
    """Planar, metres, 0 where unknown."""
    poses: Float[np.ndarray, "frames 4 4"]
    """Camera to world, OpenCV axes, metres."""
    intrinsics: tuple[float, float, float, float]
    """fx, fy, cx, cy in pixels, the centre of the first pixel at (0.5, 0.5)."""

    @classmethod
    def read(cls, folder: Path) -> "Video":
        """A folder as this script's docstring says it.

        Raises:
            InputError: files are missing, or there are not as many poses as frames.
        """
        pairs, _ = list_pairs(folder / "rgb", folder / "depth")
        try:
            poses = np.loadtxt(folder / "poses.txt", ndmin=2)
        except (OSError, ValueError) as error:
            raise InputError(f"{folder / 'poses.txt'} cannot be read ({error}).") from error
        if poses.shape != (len(pairs), 16):
            raise InputError(
                f"{folder / 'poses.txt'} holds {poses.shape[0]} lines of {poses.shape[1]} numbers; expected 16 numbers "
                f"for each of the {len(pairs)} frames."
            )
        width, height = image_size(pairs)
        frames = [read_pair(pair, width, height, metres_per_unit=1e-3) for pair in pairs]
        return cls(
            [pair.name for pair in pairs],
            [color for color, _, _ in frames],
            [np.where(valid, depth, 0.0) for _, depth, valid in frames],
            poses.reshape(-1, 4, 4),
            read_intrinsics(folder / "K.txt", width, height, pixel_centre=0.0),
        )

    def __len__(self) -> int:
        return len(self.names)

    def shown(self, frame: int, other: int) -> Bool[np.ndarray, "_h _w"]:
        """Which surfaces of a frame (every `STRIDE`-th pixel of a side) another frame shows; none where unknown."""
        fx, fy, cx, cy = self.intrinsics
        z = self.depth[frame][::STRIDE, ::STRIDE]
        v, u = (STRIDE * np.mgrid[: z.shape[0], : z.shape[1]]) + 0.5
        points = np.stack([(u - cx) / fx * z, (v - cy) / fy * z, z], axis=-1)
        world = points @ self.poses[frame][:3, :3].T + self.poses[frame][:3, 3]
        local = (world - self.poses[other][:3, 3]) @ self.poses[other][:3, :3]
        ahead = np.maximum(local[..., 2], 1e-6)
        column = np.floor(local[..., 0] / ahead * fx + cx).astype(int)
        row = np.floor(local[..., 1] / ahead * fy + cy).astype(int)
        height, width = self.depth[other].shape
        inside = (z > 0) & (local[..., 2] > 0) & (column >= 0) & (column < width) & (row >= 0) & (row < height)
        there = self.depth[other][row.clip(0, height - 1), column.clip(0, width - 1)]
        return inside & (there > 0) & (np.abs(there - ahead) < SAME_SURFACE * ahead)

    def share_shown(self, frame: int, others: Sequence[int]) -> float:
        """Share of a frame's known surfaces that at least one of the others shows."""
        known = (self.depth[frame][::STRIDE, ::STRIDE] > 0).sum()
        return float(np.any([self.shown(frame, other) for other in others], axis=0).sum() / max(known, 1))

    def distances(self) -> Float[np.ndarray, "frames frames"]:
        """Between cameras, divided by the row's median depth."""
        centres = self.poses[:, :3, 3]
        median = np.array([np.median(depth[depth > 0]) if (depth > 0).any() else np.inf for depth in self.depth])
        return np.linalg.norm(centres[:, None] - centres[None], axis=-1) / median[:, None]

    def sharp(self) -> Bool[np.ndarray, " frames"]:
        """Frames with more fine detail than half of those around them."""
        values = [laplace(color.mean(axis=-1)).var() for color in self.color]
        around = [np.median(values[max(i - AROUND, 0) : i + AROUND + 1]) for i in range(len(values))]
        return np.array(values) >= np.array(around)


def training_views(
    video: Video, anchor: int, free: Sequence[int], distance: Float[np.ndarray, "frames frames"]
) -> tuple[float, tuple[int, int, int]] | None:
    """An anchor frame with two others on either side of it, and how far what they share is from the best.

    None where no two others do.
    """
    low, best, high = SHARED

    def share(frame: int, other: int) -> float:
        return min(video.share_shown(frame, [other]), video.share_shown(other, [frame]))

    near = [other for other in free if distance[anchor, other] >= APART]
    shares = {other: share(anchor, other) for other in near}
    near = sorted((o for o in near if low <= shares[o] <= high), key=lambda o: abs(shares[o] - best))[:20]
    triples = []
    for first, second in combinations(near, 2):
        between = distance[first, second] > max(distance[first, anchor], distance[second, anchor])
        if between and low <= (third := share(first, second)) <= high:
            off = sum(abs(x - best) for x in (shares[first], shares[second], third))
            triples.append((off, (first, anchor, second)))
    return min(triples, default=None)


def test_views(
    video: Video, train: Sequence[int], free: Sequence[int], distance: Float[np.ndarray, "frames frames"]
) -> list[int]:
    """`NUM_TEST` frames, spread over those that the training views show; fewer where there are not as many."""
    usable = [
        frame
        for frame in free
        if frame not in train
        and distance[frame, list(train)].min() >= TEST_APART
        and distance[frame, list(train)].max() <= 2.0
        and video.share_shown(frame, train) >= TEST_SHOWN
    ]
    places = np.linspace(0, len(usable) - 1, min(NUM_TEST, len(usable))).round().astype(int)
    return [usable[place] for place in places]


def choose(video: Video, count: int) -> list[tuple[tuple[int, int, int], list[int]]]:
    """Training and test frames of captures, those first whose training views share what is best."""
    distance, sharp = video.distances(), np.flatnonzero(video.sharp()).tolist()
    found = []
    for anchor in sharp:
        triple = training_views(video, anchor, sharp, distance)
        if triple is not None:
            found.append(triple)
    chosen: list[tuple[tuple[int, int, int], list[int]]] = []
    taken: set[int] = set()
    for _, train in sorted(found):
        free = [frame for frame in sharp if frame not in taken]
        if taken.intersection(train) or len(test := test_views(video, train, free, distance)) < NUM_TEST:
            continue
        chosen.append((train, test))
        # Nor their neighbours, which look the same: captures shall be of different places and moments.
        taken.update(k for frame in (*train, *test) for k in range(frame - 2, frame + 3))
        if len(chosen) == count:
            break
    return chosen


def write(video: Video, train: Sequence[int], test: Sequence[int], folder: Path) -> None:
    """A capture in nerfstudio's format; images in their own size."""
    height, width = video.depth[0].shape
    chosen = [("train", frame) for frame in train] + [("test", frame) for frame in test]
    views = ((kind, video.names[i], video.color[i], video.depth[i], video.poses[i] @ OPENGL) for kind, i in chosen)
    write_views(folder, views, video.intrinsics, (width, height), {})


def main() -> None:
    """Write the captures, and print what each holds."""
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    data, output, count = Path(sys.argv[1]), Path(sys.argv[2]), int((sys.argv[3:] or ["4"])[0])
    try:
        video = Video.read(data)
    except InputError as error:
        sys.exit(str(error))
    captures = choose(video, count)
    for number, (train, test) in enumerate(captures, start=1):
        folder = output / f"capture-{number}"
        if folder.exists():
            sys.exit(f"{folder} exists already: delete it, or give another OUTPUT.")
        write(video, train, test, folder)
        shown = np.mean([video.share_shown(frame, train) for frame in test])
        print(f"capture-{number}: training {[video.names[i] for i in train]}, test {[video.names[i] for i in test]}, "
              f"of which training views show {shown:.2f}")  # fmt: skip
    if len(captures) < count:
        sys.exit(f"only {len(captures)} of {count} captures were found in {len(video)} frames.")


if __name__ == "__main__":
    main()

"""Patches for training: windows of stored frames, resampled to a drawn focal length, augmented and encoded.

Notation
    P      side of a patch in pixels
    f      focal length in pixels that the patch is brought to, log-uniform in `focal_range`
    s      stored pixels per patch pixel, f_stored / f; a window is P s stored pixels wide
    z      planar depth in metres                              [P, P]
    m      1 where depth was measured, 0 where it was filled   [P, P]
    x      encoded patch, see `ddm_training.rgbd`              [4, P, P]

A sample is a pure function of (seed, stream, step, index): neither the number of loader processes nor that of training
processes changes it, and a resumed run goes on with exactly the samples that it would have seen. Loader processes only
cut windows out of frames and draw what is random; `make_patches` does the rest for whole batches on the device of the
training, and draws nothing.

Invalid depth is filled with valid depth from nearby, so that the network never sees values that a NeRF cannot render,
and has m = 0, so that it contributes nothing to the loss.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from ddm_training import rgbd
from ddm_training.colors import BALANCE, EXPOSURE, GAMMA, GREY, SATURATION, adjust_colors
from ddm_training.errors import InputError
from ddm_training.frames import Scene, Split, open_store
from ddm_training.resampling import area_weights, fill_from_nearby, resample_color, resample_depth, window_pixels

PORTION = 64  # patches made at a time outside of a training
MAX_DRAWS = 30  # windows tried for one sample before the most valid of them is taken


class Stream(IntEnum):
    """Which sequence of random numbers a sample belongs to."""

    TRAIN = 0
    VALIDATION = 1
    STATISTICS = 2


@dataclass(frozen=True, kw_only=True)
class PatchConfig:
    """How patches are cut and augmented."""

    patch_size: int = 48
    focal_range: tuple[float, float] = (120.0, 260.0)
    depth_scale_jitter: float = 1.5
    min_valid: float = 0.7
    """Smallest share of pixels with valid depth; windows with less are drawn again."""
    augment: bool = True
    """Flip and change colours; depth is scaled by `depth_scale_jitter` whatever this says."""

    def __post_init__(self) -> None:
        low, high = self.focal_range
        if not 0 < low <= high < math.inf:
            raise InputError(f"--focal-range must be two rising positive numbers, found {low} {high}.")
        if not 1 <= self.depth_scale_jitter < math.inf:
            raise InputError(f"--depth-scale-jitter must be at least 1 (no jitter), found {self.depth_scale_jitter}.")
        if not 0 < self.min_valid <= 1:
            raise InputError(f"--min-valid must lie in (0, 1], found {self.min_valid}.")
        if self.patch_size < 8 or self.patch_size % 8:
            raise InputError(f"--patch-size must be a positive multiple of 8, found {self.patch_size}.")


def sample_rng(seed: int, stream: Stream, step: int, index: int) -> np.random.Generator:
    """The random numbers of one sample, whoever draws it."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, stream, step, index))))


def check_weights(weights: Sequence[float] | None, stores: int) -> None:
    """Refuse shares of the stores that are none.

    Raises:
        InputError: not one number >= 0 a store, or all 0.
    """
    if weights is not None and not (
        len(weights) == stores and all(0 <= weight < math.inf for weight in weights) and sum(weights) > 0
    ):
        raise InputError(f"--data-weights needs one number >= 0 per store ({stores}), found {list(weights)}.")


def with_weight(
    roots: Sequence[Path], weights: Sequence[float] | None
) -> tuple[Sequence[Path], Sequence[float] | None]:
    """The stores that have a share of the samples, and their shares: those of weight 0 are not trained on.

    Raises:
        InputError: see `check_weights`.
    """
    check_weights(weights, len(roots))
    if weights is None:
        return roots, None
    return [root for root, weight in zip(roots, weights) if weight], [weight for weight in weights if weight]


class PatchSampler:
    """Draws patches from frame stores.

    Args:
        stores: one list of scenes per store.
        weights: share of samples from each store; by default each frame is equally likely.

    Raises:
        InputError: no frame is large enough for a patch at any focal length of the range.
    """

    def __init__(
        self, stores: Sequence[Sequence[Scene]], config: PatchConfig, *, weights: Sequence[float] | None = None
    ) -> None:
        self.config = config
        self.scenes = [scene for store in stores for scene in store]
        check_weights(weights, len(stores))
        store_of_scene = [index for index, store in enumerate(stores) for _ in store]

        scene_of_frame, frame_of_scene, store_of_frame = [], [], []
        total = 0
        self.canvas = (0, 0)
        """Height and width, stored pixels, that no window exceeds."""
        for index, scene in enumerate(self.scenes):
            lowest = self._lowest_focal(scene)
            usable = np.flatnonzero(lowest <= config.focal_range[1])
            self.canvas = self._canvas_with(scene, usable, lowest[usable])
            total += len(scene)
            scene_of_frame.append(np.full(len(usable), index, np.int32))
            frame_of_scene.append(usable.astype(np.int32))
            store_of_frame.append(np.full(len(usable), store_of_scene[index]))
        self._scene = np.concatenate(scene_of_frame)
        self._frame = np.concatenate(frame_of_scene)
        if not len(self._scene):
            raise InputError(
                f"none of the {total} frames is large enough for a {config.patch_size} x {config.patch_size} patch at "
                f"focal length {config.focal_range[1]:g} px: store larger frames or raise --focal-range."
            )
        if len(self._scene) < total:
            warnings.warn(
                f"{total - len(self._scene)} of {total} frames are too small for a patch and are not used.",
                stacklevel=2,
            )
        owner, share = np.concatenate(store_of_frame), np.ones(len(self._scene))
        self.counts = np.bincount(owner, minlength=len(stores))
        """Frames in use of each store."""
        if weights is not None:
            share = np.asarray(weights, float)[owner] / self.counts[owner]
        self._cumulative = np.cumsum(share) / share.sum()

    def __len__(self) -> int:
        """Number of frames in use."""
        return len(self._scene)

    def _lowest_focal(self, scene: Scene) -> Float[np.ndarray, " n"]:
        """Smallest focal length whose window still fits into each frame."""
        fx, fy = np.asarray(scene.info.intrinsics)[:, :2].T
        return self.config.patch_size * np.maximum(fx / scene.info.width, fy / scene.info.height)

    def _canvas_with(
        self, scene: Scene, frames: Int[np.ndarray, " n"], lowest: Float[np.ndarray, " n"]
    ) -> tuple[int, int]:
        """The canvas, enlarged to hold the windows of some frames of a scene as well."""
        if not len(frames):
            return self.canvas
        fx, fy = np.asarray(scene.info.intrinsics)[frames, :2].T
        low = np.maximum(lowest, self.config.focal_range[0])
        # A window begins up to 2 pixels before its patch and ends up to 2 behind it.
        height, width = (int(self.config.patch_size * np.max(f / low)) + 4 for f in (fy, fx))
        return max(self.canvas[0], min(height, scene.info.height)), max(self.canvas[1], min(width, scene.info.width))

    def _window(self, rng: np.random.Generator) -> "Window":
        """One window of one frame."""
        size = self.config.patch_size
        choice = min(int(np.searchsorted(self._cumulative, rng.random(), side="right")), len(self._scene) - 1)
        scene, frame = self.scenes[self._scene[choice]], int(self._frame[choice])
        fx, fy = scene.info.intrinsics[frame][:2]
        height, width = scene.info.height, scene.info.width
        low, high = self.config.focal_range
        low = max(low, size * fx / width, size * fy / height)
        f = math.exp(rng.uniform(math.log(low), math.log(max(high, low))))
        sx, sy = min(fx / f, width / size), min(fy / f, height / size)
        left, top = rng.uniform(0, width - size * sx), rng.uniform(0, height - size * sy)
        y, x = max(math.floor(top) - 1, 0), max(math.floor(left) - 1, 0)
        rows = slice(y, min(math.ceil(top + size * sy) + 1, height))
        columns = slice(x, min(math.ceil(left + size * sx) + 1, width))
        return Window(
            scene.color[frame, rows, columns],
            scene.depth[frame, rows, columns],
            scene.mask[frame, rows, columns],
            (top - y, left - x),
            (sy, sx),
        )

    def _draw(self, rng: np.random.Generator) -> "Window":
        """A window with enough valid depth.

        Raises:
            InputError: no valid depth was found in `MAX_DRAWS` windows.
        """
        best, most = None, 0.0
        for _ in range(MAX_DRAWS):
            window = self._window(rng)
            share = window.valid_share(self.config.patch_size)
            if share > most:
                best, most = window, share
            if share >= self.config.min_valid:
                break
        if best is None:
            raise InputError(f"{MAX_DRAWS} windows in a row hold no valid depth: check the masks of the frame stores.")
        return best

    def windows(
        self, *, seed: int, stream: Stream, step: int, first: int, count: int, bias: float = 0.0
    ) -> dict[str, Tensor]:
        """What samples first ... first + count - 1 of a step are made of, see `make_patches`; ``bias`` as of
        `draw_timestep`.

        Returns:
            "color" [n, 3] uint8 and "depth" [n] float16 in metres, 0 where there is none: the pixels of all windows,
            row by row, one window after the other; "extent" [b, 2] of each in rows and columns, "start" and "scale"
            [b, 2] of its patch in stored pixels, "change" [b, 7]: factors of depth and the three colours, gamma,
            saturation, and 1 or -1 for a mirrored patch; and "noise" [b, 4, P, P] and "t" [b] int64, that belong to
            the samples.
        """
        size, augment = self.config.patch_size, self.config.augment
        noise, change = np.empty((count, 4, size, size), np.float32), np.ones((count, 7), np.float32)
        t = np.empty(count, np.int64)
        jitter = math.log(self.config.depth_scale_jitter)
        drawn: list[Window] = []
        for i in range(count):
            rng = sample_rng(seed, stream, step, first + i)
            drawn.append(self._draw(rng))
            change[i, 0] = math.exp(rng.uniform(-jitter, jitter))
            if augment:
                change[i, 1:4] = np.exp(rng.uniform(-EXPOSURE, EXPOSURE) + rng.uniform(-BALANCE, BALANCE, 3))
                change[i, 4] = math.exp(rng.uniform(-GAMMA, GAMMA))
                change[i, 5] = 0.0 if rng.random() < GREY else rng.uniform(*SATURATION)
                change[i, 6] = -1.0 if rng.random() < 0.5 else 1.0
            rng.standard_normal(dtype=np.float32, out=noise[i])
            t[i] = draw_timestep(rng, bias)

        arrays = {
            "color": np.concatenate([window.color.reshape(-1, 3) for window in drawn]),
            "depth": np.concatenate([(window.depth * window.mask).ravel() for window in drawn]),
            "extent": np.array([window.color.shape[:2] for window in drawn]),
            "start": np.array([window.start for window in drawn], np.float32),
            "scale": np.array([window.scale for window in drawn], np.float32),
            "change": change,
            "noise": noise,
            "t": t,
        }
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def patches(
        self, *, seed: int, stream: Stream, step: int, first: int, count: int, bias: float = 0.0
    ) -> dict[str, Tensor]:
        """`make_patches` of `windows`, in portions."""
        portions = [
            make_patches(
                self.windows(
                    seed=seed, stream=stream, step=step, first=first + done, count=min(PORTION, count - done), bias=bias
                ),
                self.config.patch_size,
            )
            for done in range(0, count, PORTION)
        ]
        return {name: torch.cat([portion[name] for portion in portions]) for name in portions[0]}


@dataclass(frozen=True)
class Window:
    """A part of a frame, and where in it a patch is, in stored pixels."""

    color: UInt8[np.ndarray, "h w 3"]
    depth: Float[np.ndarray, "h w"]
    mask: Bool[np.ndarray, "h w"]
    start: tuple[float, float]
    """Top and left."""
    scale: tuple[float, float]
    """Stored pixels per patch pixel, vertically and horizontally."""

    def valid_share(self, size: int) -> float:
        """Share of the patch's pixels with valid depth."""
        rows, columns = (
            np.minimum((start + scale * (np.arange(size) + 0.5)).astype(np.intp), stored - 1)
            for start, scale, stored in zip(self.start, self.scale, self.mask.shape)
        )
        return float(self.mask[rows][:, columns].mean())


@torch.no_grad()
def make_patches(windows: dict[str, Tensor], size: int, canvas: tuple[int, int] | None = None) -> dict[str, Tensor]:
    """Resample, augment and encode, on the device of the windows.

    Args:
        windows: of `PatchSampler.windows`.
        size: P.
        canvas: height and width that none of the windows exceeds, as `PatchSampler.canvas`, with which a GPU need not
            be waited for; None: those of the largest of these windows.

    Returns:
        x [b, 4, P, P] float32, mask [b, P, P] bool, noise [b, 4, P, P] float32, t [b] int64.
    """
    extent, start, scale, change = (windows[name] for name in ("extent", "start", "scale", "change"))
    if canvas is None:
        height, width = extent.amax(dim=0).tolist()
        canvas = height, width
    pixels = window_pixels(extent, canvas)
    wy, wx = (area_weights(start[:, axis], scale[:, axis], size, canvas[axis], extent[:, axis]) for axis in (0, 1))
    steps = torch.arange(size, device=start.device) + 0.5
    y, x = (start[:, axis, None] + scale[:, axis, None] * steps for axis in (0, 1))
    z = resample_depth(windows["depth"][pixels].float(), y, x, extent)
    mask = z > 0
    z = change[:, 0, None, None] * fill_from_nearby(z, mask)
    rgb = resample_color(windows["color"][pixels], wy, wx)
    rgb = adjust_colors(rgb, gain=change[:, 1:4], gamma=change[:, 4], saturation=change[:, 5])
    patch = rgbd.encode(rgb, z)
    mirrored = change[:, 6] < 0
    patch = torch.where(mirrored[:, None, None, None], patch.flip(3), patch)
    mask = torch.where(mirrored[:, None, None], mask.flip(2), mask)
    return {"x": patch, "mask": mask, "noise": windows["noise"], "t": windows["t"]}


def draw_timestep(rng: np.random.Generator, bias: float) -> int:
    """With probability ``bias`` log-uniform in [3, 199), else uniform over the 1000.

    A NeRF asks for the score at t = 3 ... 99 only (tau = 0 ... 0.1), and most often at t = 3; uniform timesteps would
    spend a tenth of the training there.
    """
    if rng.random() < bias:
        return int(math.exp(rng.uniform(math.log(4.0), math.log(200.0)))) - 1
    return int(rng.integers(1000))


def open_sampler(
    roots: Sequence[Path], split: Split, config: PatchConfig, *, weights: Sequence[float] | None = None
) -> PatchSampler:
    """A sampler over the scenes of one split of several stores.

    Raises:
        InputError: see `open_store`; a store without the split, or with a weight and no frame that is large enough for
            a patch, is named.
    """
    roots, weights = with_weight(roots, weights)
    sampler = PatchSampler([open_store(root, split) for root in roots], config, weights=weights)
    if weights and (unused := [str(root) for root, count in zip(roots, sampler.counts) if not count]):
        raise InputError(
            f"no frame of {', '.join(unused)} is large enough for a {config.patch_size} x {config.patch_size} patch at "
            f"focal length {config.focal_range[1]:g} px, so that it cannot have a share of the samples: store larger "
            "frames, or leave it out."
        )
    return sampler


def disparity_quantiles(sampler: PatchSampler, *, seed: int = 0, patches: int = 512) -> dict[str, float]:
    """Quantiles of 1/z in 1/metres over augmented training patches, measured pixels only; keys "0.05" to "0.95"."""
    drawn = sampler.patches(seed=seed, stream=Stream.STATISTICS, step=0, first=0, count=patches)
    inverse = 1.0 / rgbd.decode_depth(drawn["x"][:, 3][drawn["mask"]])
    levels = (0.05, 0.25, 0.5, 0.75, 0.95)
    return {f"{q:.2f}": float(v) for q, v in zip(levels, np.quantile(inverse[::7].numpy(), levels))}  # plenty

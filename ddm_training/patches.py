"""Patches for training: windows of stored frames, resampled to a drawn focal length, augmented and encoded.

Notation
    P      side of a patch in pixels
    f      focal length in pixels that the patch is brought to, log-uniform in `focal_range`
    s      stored pixels per patch pixel, f_stored / f; a window is P s stored pixels wide
    z      planar depth in metres                              [P, P]
    m      1 where depth was measured, 0 where it was filled   [P, P]
    x      encoded patch, see `ddm_training.rgbd`              [4, P, P]

A sample is a pure function of (seed, stream, step, index): neither the number of loader processes nor that of training
processes changes it, and a resumed run goes on with exactly the samples that it would have seen.

Invalid depth is filled with the nearest valid depth of the patch, so that the network never sees values that a NeRF
cannot render, and has m = 0, so that it contributes nothing to the loss.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from ddm_training import rgbd
from ddm_training.errors import InputError
from ddm_training.frames import Scene, Split, open_store

CONTINUOUS = 1.1  # ratio of inverse depths of neighbouring pixels below which they are taken for one surface
EXPOSURE, BALANCE, GAMMA = 0.25, 0.06, 0.25  # colour changes: largest logarithms of factors and exponents
SATURATION, GREY = (0.7, 1.25), 0.05  # range of the factor, and the share of samples without any
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
        if not 0 < low <= high:
            raise InputError(f"--focal-range must be two rising positive numbers, found {low} {high}.")
        if not self.depth_scale_jitter >= 1:
            raise InputError(f"--depth-scale-jitter must be at least 1 (no jitter), found {self.depth_scale_jitter}.")
        if not 0 < self.min_valid <= 1:
            raise InputError(f"--min-valid must lie in (0, 1], found {self.min_valid}.")
        if self.patch_size < 8 or self.patch_size % 8:
            raise InputError(f"--patch-size must be a positive multiple of 8, found {self.patch_size}.")


def area_weights(start: float, s: float, count: int, low: int, high: int) -> Float[np.ndarray, "count n"]:
    """Resampling matrix of one axis: output j covers [start + j s, start + (j + 1) s] of the input pixels low..high-1.

    Area average where s >= 1, linear interpolation where s < 1; at s = 1 the two are the same.
    """
    pixels = np.arange(low, high)[None, :]
    if s >= 1:
        left = start + s * np.arange(count)[:, None]
        weights = np.clip(np.minimum(left + s, pixels + 1) - np.maximum(left, pixels), 0, None)
    else:
        centres = start + s * (np.arange(count)[:, None] + 0.5)
        weights = np.clip(1 - np.abs(pixels + 0.5 - centres), 0, None)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def resample_color(
    color: UInt8[np.ndarray, "h w 3"],
    wy: Float[np.ndarray, "p h"],
    wx: Float[np.ndarray, "p w"],
) -> Float[np.ndarray, "3 p p"]:
    """Apply `area_weights` of both axes; result in [0, 1]."""
    height, width, _ = color.shape
    size = len(wy)
    rows = (wy / np.float32(255)) @ color.reshape(height, width * 3).astype(np.float32)
    planes = np.ascontiguousarray(rows.reshape(size, width, 3).transpose(2, 0, 1)).reshape(3 * size, width)
    return (planes @ wx.T).reshape(3, size, size)  # two plain matrix products: three times as fast as a stacked one


def resample_depth(
    depth: Float[np.ndarray, "h w"],
    mask: Bool[np.ndarray, "h w"],
    y: Float[np.ndarray, " p"],
    x: Float[np.ndarray, " p"],
) -> tuple[Float[np.ndarray, "p p"], Bool[np.ndarray, "p p"]]:
    """Depth at points (y, x), pixel centres at .5: no value lies between two surfaces.

    Bilinear in inverse depth (exact on planes) where the four neighbours are valid and continuous, else the nearest
    pixel; validity is that of the nearest pixel.
    """
    height, width = depth.shape
    inverse = np.where(mask, 1.0 / np.where(mask, depth, 1).astype(np.float32), np.float32(np.nan))
    row, column = (np.clip(np.floor(v).astype(int), 0, n - 1) for v, n in ((y, height), (x, width)))
    nearest = inverse[np.ix_(row, column)]

    y0, x0 = (np.clip(np.floor(v - 0.5).astype(int), 0, max(n - 2, 0)) for v, n in ((y, height), (x, width)))
    v = np.clip(y - 0.5 - y0, 0, 1).astype(np.float32)[:, None]
    u = np.clip(x - 0.5 - x0, 0, 1).astype(np.float32)[None, :]
    y1, x1 = np.minimum(y0 + 1, height - 1), np.minimum(x0 + 1, width - 1)
    a, b = inverse[np.ix_(y0, x0)], inverse[np.ix_(y0, x1)]
    c, d = inverse[np.ix_(y1, x0)], inverse[np.ix_(y1, x1)]
    smooth = (a * (1 - u) + b * u) * (1 - v) + (c * (1 - u) + d * u) * v
    largest = np.maximum(np.maximum(a, b), np.maximum(c, d))  # NaN when any is invalid, which then compares false
    smallest = np.minimum(np.minimum(a, b), np.minimum(c, d))
    disparity = np.where(largest <= CONTINUOUS * smallest, smooth, nearest)
    valid = np.isfinite(nearest)
    return np.where(valid, 1.0 / np.where(valid, disparity, 1), 0).astype(np.float32), valid


def fill_invalid(z: Float[np.ndarray, "h w"], valid: Bool[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
    """Invalid depth replaced by that of the nearest valid pixel."""
    if valid.all():
        return z
    rows, columns = distance_transform_edt(~valid, return_distances=False, return_indices=True)  # pyright: ignore
    return z[rows, columns]


def change_color(rgb: Float[np.ndarray, "3 h w"], rng: np.random.Generator) -> Float[np.ndarray, "3 h w"]:
    """Small changes of exposure, gamma, white balance and saturation; one in twenty becomes grey."""
    gain = np.exp(rng.uniform(-EXPOSURE, EXPOSURE) + rng.uniform(-BALANCE, BALANCE, (3, 1, 1))).astype(np.float32)
    gamma = np.float32(np.exp(rng.uniform(-GAMMA, GAMMA)))
    saturation = np.float32(0.0 if rng.random() < GREY else rng.uniform(*SATURATION))
    rgb = np.clip(rgb * gain, 0, 1) ** gamma
    grey = rgb.mean(axis=0, keepdims=True)
    return np.clip(grey + saturation * (rgb - grey), 0, 1)


def sample_rng(seed: int, stream: Stream, step: int, index: int) -> np.random.Generator:
    """The random numbers of one sample, whoever draws it."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, stream, step, index))))


def check_weights(weights: Sequence[float] | None, stores: int) -> None:
    """Refuse shares of the stores that are none.

    Raises:
        InputError: not one number >= 0 a store, or all 0.
    """
    if weights is not None and (len(weights) != stores or min(weights) < 0 or sum(weights) <= 0):
        raise InputError(f"--data-weights needs one number >= 0 per store ({stores}), found {list(weights)}.")


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
        for index, scene in enumerate(self.scenes):
            usable = np.flatnonzero(self._lowest_focal(scene) <= config.focal_range[1])
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
        share = np.ones(len(self._scene))
        if weights is not None:
            owner = np.concatenate(store_of_frame)
            counts = np.bincount(owner, minlength=len(stores))
            share = np.asarray(weights, float)[owner] / counts[owner]
        self._cumulative = np.cumsum(share) / share.sum()

    def __len__(self) -> int:
        """Number of frames in use."""
        return len(self._scene)

    def _lowest_focal(self, scene: Scene) -> Float[np.ndarray, " n"]:
        """Smallest focal length whose window still fits into each frame."""
        fx, fy = np.asarray(scene.info.intrinsics)[:, :2].T
        return self.config.patch_size * np.maximum(fx / scene.info.width, fy / scene.info.height)

    def _window(
        self, rng: np.random.Generator
    ) -> tuple[Float[np.ndarray, "3 p p"], Float[np.ndarray, "p p"], Bool[np.ndarray, "p p"]]:
        """One window of one frame: colour, depth in metres, validity."""
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

        rows = slice(max(math.floor(top) - 1, 0), min(math.ceil(top + size * sy) + 1, height))
        columns = slice(max(math.floor(left) - 1, 0), min(math.ceil(left + size * sx) + 1, width))
        top, left = top - rows.start, left - columns.start
        color = resample_color(
            np.asarray(scene.color[frame, rows, columns]),
            area_weights(top, sy, size, 0, rows.stop - rows.start),
            area_weights(left, sx, size, 0, columns.stop - columns.start),
        )
        z, valid = resample_depth(
            np.asarray(scene.depth[frame, rows, columns], np.float32),
            np.asarray(scene.mask[frame, rows, columns]),
            top + sy * (np.arange(size) + 0.5),
            left + sx * (np.arange(size) + 0.5),
        )
        return color, z, valid

    def sample(
        self, rng: np.random.Generator
    ) -> tuple[Float[np.ndarray, "3 p p"], Float[np.ndarray, "p p"], Bool[np.ndarray, "p p"]]:
        """One augmented patch: colour in [0, 1], filled depth in metres, validity.

        Raises:
            InputError: no valid depth was found in `MAX_DRAWS` windows.
        """
        best = None
        for _ in range(MAX_DRAWS):
            drawn = self._window(rng)
            if best is None or drawn[2].sum() > best[2].sum():
                best = drawn
            if drawn[2].mean() >= self.config.min_valid:
                break
        assert best is not None
        rgb, z, valid = best
        if not valid.any():
            raise InputError(f"{MAX_DRAWS} windows in a row hold no valid depth: check the masks of the frame stores.")
        z = fill_invalid(z, valid)
        jitter = math.log(self.config.depth_scale_jitter)
        z = z * np.float32(math.exp(rng.uniform(-jitter, jitter)))
        if self.config.augment:
            rgb = change_color(rgb, rng)
            if rng.random() < 0.5:
                rgb, z, valid = rgb[:, :, ::-1], z[:, ::-1], valid[:, ::-1]
        return rgb, z, valid

    def batch(
        self, *, seed: int, stream: Stream, step: int, first: int, count: int, bias: float = 0.0
    ) -> dict[str, Tensor]:
        """Samples first ... first + count - 1 of a step, with the noise and timesteps that belong to them.

        Returns:
            x [b, 4, P, P] float32, mask [b, P, P] bool, noise [b, 4, P, P] float32, t [b] int64.
        """
        size = self.config.patch_size
        rgb = np.empty((count, 3, size, size), np.float32)
        z = np.empty((count, size, size), np.float32)
        mask = np.empty((count, size, size), np.bool_)
        noise = np.empty((count, 4, size, size), np.float32)
        t = np.empty(count, np.int64)
        for i in range(count):
            rng = sample_rng(seed, stream, step, first + i)
            rgb[i], z[i], mask[i] = self.sample(rng)
            noise[i] = rng.standard_normal(noise.shape[1:], np.float32)
            t[i] = draw_timestep(rng, bias)
        x = rgbd.encode(torch.from_numpy(rgb), torch.from_numpy(z))
        return {"x": x, "mask": torch.from_numpy(mask), "noise": torch.from_numpy(noise), "t": torch.from_numpy(t)}


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
        InputError: see `open_store`; a store without the split is named.
    """
    return PatchSampler([open_store(root, split) for root in roots], config, weights=weights)


def disparity_quantiles(sampler: PatchSampler, *, seed: int = 0, patches: int = 512) -> dict[str, float]:
    """Quantiles of 1/z in 1/metres over augmented training patches, measured pixels only; keys "0.05" to "0.95"."""
    values = []
    for index in range(patches):
        rng = sample_rng(seed, Stream.STATISTICS, 0, index)
        _, z, valid = sampler.sample(rng)
        values.append(1.0 / z[valid][::7])  # a seventh of the pixels is plenty
    levels = (0.05, 0.25, 0.5, 0.75, 0.95)
    return {f"{q:.2f}": float(v) for q, v in zip(levels, np.quantile(np.concatenate(values), levels))}

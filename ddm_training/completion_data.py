"""Samples for the network that completes depth: stored frames in few pixels, with made-up matches.

A sample is a pure function of (seed, stream, step, index), as those of `patches` are.

Notation
    W, H     pixels that the network sees; frames are cut and matched at twice that, `2 W` x `2 H`
    zoom     stored pixels per pixel of the cut frame
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from ddm_training import membrane
from ddm_training.completion import shrink_known
from ddm_training.errors import InputError
from ddm_training.frames import Scene
from ddm_training.matches import draw_matches
from ddm_training.patches import Stream, change_color, check_weights, fill_invalid, sample_rng

WHOLE = 0.4  # share of samples that show as much of the frame as fits; the others a part of it
CLOSEST = 2.0  # by which a part may be enlarged
LEAST_KNOWN = 20  # pixels
MAX_DRAWS = 20  # frames tried for one sample
GRAIN = 0.02  # largest deviation of the noise that colours get


class CompletionSampler:
    """Draws samples from frame stores.

    Args:
        stores: one list of scenes per store.
        size: W and H.
        weights: share of samples from each store; by default each frame is equally likely.
        augment: flip, change colours and cut parts.

    Raises:
        InputError: weights that are not one number >= 0 a store.
    """

    def __init__(
        self,
        stores: Sequence[Sequence[Scene]],
        size: tuple[int, int],
        *,
        weights: Sequence[float] | None = None,
        augment: bool = True,
    ) -> None:
        check_weights(weights, len(stores))
        self.size, self.augment = size, augment
        self.scenes = [scene for store in stores for scene in store]
        self._frames = [[(scene, index) for scene in store for index in range(len(scene))] for store in stores]
        share = [len(frames) for frames in self._frames] if weights is None else weights
        self._cumulative = np.cumsum(share) / np.sum(share)

    def __len__(self) -> int:
        """Number of frames in use."""
        return sum(map(len, self._frames))

    def _cut(
        self, rng: np.random.Generator
    ) -> tuple[Float[np.ndarray, "3 h w"], Float[np.ndarray, "h w"], Bool[np.ndarray, "h w"], float]:
        """A part of a frame at 2 W x 2 H: colours, depth in metres, validity, and the focal length in pixels."""
        store = min(int(np.searchsorted(self._cumulative, rng.random(), side="right")), len(self._frames) - 1)
        frames = self._frames[store]
        scene, index = frames[rng.integers(len(frames))]
        width, height = 2 * self.size[0], 2 * self.size[1]
        zoom = min(scene.info.width / width, scene.info.height / height)
        if self.augment and rng.random() > WHOLE:
            zoom *= math.exp(rng.uniform(-math.log(CLOSEST), 0.0))
        room = max(scene.info.width - width * zoom, 0.0), max(scene.info.height - height * zoom, 0.0)
        left, top = (rng.uniform(0.0, side) if self.augment else 0.5 * side for side in room)
        column, row = (
            np.minimum((start + (np.arange(count) + 0.5) * zoom).astype(int), limit - 1)
            for start, count, limit in ((left, width, scene.info.width), (top, height, scene.info.height))
        )
        picture = Image.fromarray(np.asarray(scene.color[index]))
        how = Image.Resampling.BOX if zoom > 1.2 else Image.Resampling.BILINEAR
        box = left, top, min(left + width * zoom, scene.info.width), min(top + height * zoom, scene.info.height)
        part = picture.resize((width, height), how, box=box)
        rgb = np.asarray(part, np.float32).transpose(2, 0, 1) / 255.0
        z = np.asarray(scene.depth[index], np.float32)[np.ix_(row, column)]
        valid = np.asarray(scene.mask[index])[np.ix_(row, column)]
        return rgb, z, valid, scene.info.intrinsics[index][0] / zoom

    def sample(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """One sample: "rgb" [3, H, W] in [0, 1], "known", "base" and "z" [H, W] in metres, "valid" [H, W].

        Raises:
            InputError: no frame has matches in `MAX_DRAWS` tries.
        """
        for _ in range(MAX_DRAWS):
            rgb, z, valid, focal = self._cut(rng)
            if not valid.any():
                continue
            z = fill_invalid(z, valid)
            if self.augment:
                rgb = change_color(rgb, rng)
                if rng.random() < 0.5:
                    rgb, z, valid = rgb[:, :, ::-1], z[:, ::-1], valid[:, ::-1]
                noise = rng.uniform(0.0, GRAIN) * rng.standard_normal(rgb.shape, np.float32)
                rgb = np.clip(rgb + noise, 0.0, 1.0).astype(np.float32)
            matches = draw_matches(rng, rgb, z, valid, focal)
            width, height = self.size
            known = shrink_known(matches, (height, width))
            if (known > 0).sum() < LEAST_KNOWN:
                continue
            small = rgb.reshape(3, height, 2, width, 2).mean(axis=(2, 4))
            base = membrane.interpolate(small.transpose(1, 2, 0), known)
            z, valid = (
                np.ascontiguousarray(x[1::2, ::2]) for x in (z, valid)
            )  # one of the four: none lies between surfaces
            return {"rgb": small, "known": known, "base": base, "z": z, "valid": valid}
        raise InputError(f"{MAX_DRAWS} frames in a row have next to no texture or valid depth: check the frame stores.")

    def batch(self, *, seed: int, stream: Stream, step: int, first: int, count: int) -> dict[str, Tensor]:
        """Samples first ... first + count - 1 of a step, stacked."""
        rows = [self.sample(sample_rng(seed, stream, step, first + i)) for i in range(count)]
        return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}

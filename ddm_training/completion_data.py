"""Samples for the network that completes depth: stored frames in few pixels, with made-up matches.

Loader processes only cut frames: a `CompletionSampler` gives what is as small and as quick as can be. All the rest is
done for whole batches on the device of the training: `make_samples`. A cut is a pure function of (seed, stream, step,
index), as the samples of `patches` are; what is made of a batch follows from (seed, stream, step, first index).

Notation
    W, H     pixels that the network sees; frames are cut and matched at twice that, `2 W` x `2 H`
    zoom     stored pixels per pixel of the cut frame
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from torch import Generator, Tensor
from torch.nn import functional as F

from ddm_training import membrane
from ddm_training.colors import BALANCE, EXPOSURE, GAMMA, GREY, SATURATION, adjust_colors
from ddm_training.completion import shrink_known
from ddm_training.errors import InputError
from ddm_training.frames import Scene
from ddm_training.matches import draw_matches, happens, normal, uniform
from ddm_training.patches import Stream, check_weights, sample_rng
from ddm_training.resampling import fill_from_nearby

WHOLE = 0.4  # share of samples that show as much of the frame as fits; the others a part of it
CLOSEST = 2.0  # by which a part may be enlarged
LEAST_KNOWN = 20  # pixels; samples with fewer have no weight
MAX_DRAWS = 20  # frames tried for one sample
GRAIN = 0.02  # largest deviation of the noise that colours get


class CompletionSampler:
    """Cuts samples from frame stores.

    Args:
        stores: one list of scenes per store.
        size: W and H.
        weights: share of samples from each store; by default each frame is equally likely.
        augment: flip and cut parts.

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

    def cut(
        self, rng: np.random.Generator
    ) -> tuple[UInt8[np.ndarray, "h w 3"], Float[np.ndarray, "h w"], Bool[np.ndarray, "h w"], float]:
        """A part of a frame at 2 W x 2 H: colours, depth in metres, validity, and the focal length in pixels.

        Raises:
            InputError: no frame has valid depth in `MAX_DRAWS` tries.
        """
        for _ in range(MAX_DRAWS):
            found = self._cut(rng)
            if found[2].any():
                return found
        raise InputError(f"{MAX_DRAWS} frames in a row have no valid depth: check the masks of the frame stores.")

    def _cut(
        self, rng: np.random.Generator
    ) -> tuple[UInt8[np.ndarray, "h w 3"], Float[np.ndarray, "h w"], Bool[np.ndarray, "h w"], float]:
        store = min(int(np.searchsorted(self._cumulative, rng.random(), side="right")), len(self._frames) - 1)
        frames = self._frames[store]
        scene, index = frames[rng.integers(len(frames))]
        info = scene.info
        width, height = 2 * self.size[0], 2 * self.size[1]
        zoom = min(info.width / width, info.height / height)
        if self.augment and rng.random() > WHOLE:
            zoom *= math.exp(rng.uniform(-math.log(CLOSEST), 0.0))
        room = max(info.width - width * zoom, 0.0), max(info.height - height * zoom, 0.0)
        left, top = (rng.uniform(0.0, side) if self.augment else 0.5 * side for side in room)
        flip = -1 if self.augment and rng.random() < 0.5 else 1

        right, bottom = min(left + width * zoom, info.width), min(top + height * zoom, info.height)
        x, y = max(int(left) - 2, 0), max(int(top) - 2, 0)  # bilinear filters look beyond the border
        rows = np.asarray(scene.color[index, y : math.ceil(bottom) + 2]).reshape(-1, 3 * info.width)
        part = np.ascontiguousarray(rows[:, 3 * x : 3 * (math.ceil(right) + 2)])  # by lines, not by pixels: much faster
        how = Image.Resampling.BOX if zoom > 1.2 else Image.Resampling.BILINEAR
        picture = Image.fromarray(part.reshape(len(part), -1, 3))
        rgb = np.asarray(picture.resize((width, height), how, box=(left - x, top - y, right - x, bottom - y)))
        column, row = (
            np.minimum((start + (np.arange(count) + 0.5) * zoom).astype(np.intp), limit - 1)
            for start, count, limit in ((left, width, info.width), (top, height, info.height))
        )
        z, valid = (
            np.asarray(array[index, row[0] : row[-1] + 1])[row - row[0]][:, column[::flip]]
            for array in (scene.depth, scene.mask)
        )
        return rgb[:, ::flip], z, valid, info.intrinsics[index][0] / zoom

    def batch(self, *, seed: int, stream: Stream, step: int, first: int, count: int) -> dict[str, Tensor]:
        """Cuts first ... first + count - 1 of a step.

        Returns:
            "color" [b, 2H, 2W, 3] uint8, "depth" [b, 2H, 2W] float16 in metres, "mask" [b, 2H, 2W] bool, and "focal"
            [b] in pixels.
        """
        shape = count, 2 * self.size[1], 2 * self.size[0]
        color, depth = np.empty((*shape, 3), np.uint8), np.empty(shape, np.float16)
        mask, focal = np.empty(shape, np.bool_), np.empty(count, np.float32)
        for i in range(count):
            color[i], depth[i], mask[i], focal[i] = self.cut(sample_rng(seed, stream, step, first + i))
        arrays = {"color": color, "depth": depth, "mask": mask, "focal": focal}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def batch_generator(device: torch.device, *, seed: int, stream: Stream, step: int, first: int) -> Generator:
    """The random numbers of a batch on its device."""
    state = np.random.SeedSequence((seed, stream, step, first)).generate_state(1, np.uint64)
    return Generator(device).manual_seed(int(state[0] >> np.uint64(1)))


def change_colors(g: Generator, rgb: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """Small changes of exposure, gamma, white balance and saturation; one in twenty becomes grey; and grain."""
    count = len(rgb)
    rgb = adjust_colors(
        rgb,
        gain=(uniform(g, -EXPOSURE, EXPOSURE, count, 1) + uniform(g, -BALANCE, BALANCE, count, 3)).exp(),
        gamma=uniform(g, -GAMMA, GAMMA, count).exp(),
        saturation=torch.where(happens(g, GREY, count), 0.0, uniform(g, *SATURATION, count)),
    )
    return (rgb + uniform(g, 0.0, GRAIN, count, 1, 1, 1) * normal(g, 1.0, *rgb.shape)).clamp(0, 1)


@torch.no_grad()
def make_samples(g: Generator, cut: dict[str, Tensor], *, augment: bool) -> dict[str, Tensor]:
    """Samples of a batch of cut frames, on their device.

    Args:
        g: all that is random, on that device.
        cut: of `CompletionSampler.batch`.
        augment: change colours.

    Returns:
        "rgb" [b, 3, H, W] in [0, 1], "known", "base" and "z" [b, H, W] in metres, "valid" [b, H, W], which is False all
        over a sample with fewer matches than `LEAST_KNOWN`, and "enough" [b], False for those.
    """
    rgb = cut["color"].permute(0, 3, 1, 2).float() / 255.0
    valid = cut["mask"]
    z = fill_from_nearby(cut["depth"].float(), valid)
    if augment:
        rgb = change_colors(g, rgb)
    matches = draw_matches(g, rgb, z, valid, cut["focal"])
    known = shrink_known(matches, (z.shape[1] // 2, z.shape[2] // 2))
    small = F.avg_pool2d(rgb, 2)
    enough = (known > 0).flatten(1).sum(dim=1) >= LEAST_KNOWN
    z, valid = (x[:, 1::2, ::2].contiguous() for x in (z, valid))  # one of the four: none lies between surfaces
    return {
        "rgb": small,
        "known": known,
        "base": membrane.interpolate_batch(small, known),
        "z": z,
        "valid": valid & enough[:, None, None],
        "enough": enough,
    }

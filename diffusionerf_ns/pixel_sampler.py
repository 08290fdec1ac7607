"""Pixels of training images inside their masks, whatever the number of images and the size of the masks."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from nerfstudio.data.pixel_samplers import PixelSampler, PixelSamplerConfig
from torch import Tensor

from ddm_training.errors import InputError

KEPT_BYTES = 1 << 29  # of small masks
ALL_BLACK = "the masks of all images are black; expected white where the scene is."


class MaskedPixelSampler(PixelSampler):
    """nerfstudio's sampler, which knows masks of two images or more that have more pixels than are drawn.

    Where masks are black altogether, an evaluation draws from all pixels; a training has nothing to learn from.
    """

    _small: dict[tuple[int, torch.Size], tuple[Tensor, Tensor]]
    """Masks of which few pixels are inside, and these, by where they lie in memory: a step has the same masks as the
    one before, and images of several sizes bring theirs one by one."""
    _kept: tuple[tuple[Tensor, ...], list[int]] = ((), [])
    """Masks of images of several sizes, and which of them are not black."""

    def __init__(self, config: PixelSamplerConfig, *, in_training: bool = True, **kwargs: Any) -> None:
        self._small = {}
        self._in_training = in_training
        super().__init__(config, **kwargs)

    def sample_method(
        self,
        batch_size: int,
        num_images: int,
        image_height: int,
        image_width: int,
        mask: Bool[Tensor, "images h w 1"] | None = None,
        device: torch.device | str = "cpu",
    ) -> Int[Tensor, "batch 3"]:
        """Image, row and column of pixels, drawn with equal chance from all or from those inside the masks.

        Raises:
            InputError: there is no pixel inside to train on.
        """
        if mask is None or self.config.ignore_mask:
            return super().sample_method(batch_size, num_images, image_height, image_width, device=device)
        place = mask.data_ptr(), mask.shape
        if place in self._small:
            return self._any_of(self._small[place][1], batch_size)
        inside = mask[..., 0]
        size = torch.tensor(inside.shape, device=device)
        drawn = (torch.rand((batch_size, 3), device=device) * size).long()
        for _ in range(self.config.max_num_iterations if self.config.rejection_sample_mask else 0):
            looked_up = inside[drawn.to(inside.device).unbind(-1)]  # where the masks are: they may be large
            outside = torch.nonzero(~looked_up)[:, 0].to(device)
            if len(outside) == 0:
                return drawn
            drawn[outside] = (torch.rand((len(outside), 3), device=device) * size).long()
        pixels = torch.nonzero(inside).to(device)
        if len(pixels) == 0 and not self._in_training:
            return super().sample_method(batch_size, num_images, image_height, image_width, device=device)
        if len(pixels) == 0:
            raise InputError(ALL_BLACK)
        if sum(a.nbytes + b.nbytes for a, b in self._small.values()) > KEPT_BYTES:  # of batches that are gone
            self._small.clear()
        self._small[place] = mask, pixels  # held, so that nothing else comes to lie there
        return self._any_of(pixels, batch_size)

    def collate_image_dataset_batch_list(
        self, batch: dict[str, Any], num_rays_per_batch: int, keep_full_image: bool = False
    ) -> dict[str, Any]:
        """nerfstudio's, of images of several sizes, without those whose mask is black."""
        if "mask" in batch and not self.config.ignore_mask:
            kept = self._with_pixels(batch["mask"])
            per_image = ("image", "mask", "depth_image")
            batch = batch | {key: [batch[key][i] for i in kept] for key in per_image if key in batch}
            batch["image_idx"] = batch["image_idx"][kept]
        return super().collate_image_dataset_batch_list(batch, num_rays_per_batch, keep_full_image)

    def _with_pixels(self, masks: Sequence[Bool[Tensor, "_h _w 1"]]) -> list[int]:
        """Those of the masks that have a pixel inside, looked for once: a step has the same masks as the one before."""
        if list(map(id, self._kept[0])) != list(map(id, masks)):
            self._kept = tuple(masks), [i for i, mask in enumerate(masks) if bool(mask.any())]
        if not self._kept[1] and not self._in_training:
            return list(range(len(masks)))
        if not self._kept[1]:
            raise InputError(ALL_BLACK)
        return self._kept[1]

    @staticmethod
    def _any_of(pixels: Int[Tensor, "n 3"], count: int) -> Int[Tensor, "{count} 3"]:
        return pixels[torch.randint(len(pixels), (count,), device=pixels.device)]

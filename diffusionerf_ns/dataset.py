"""Images of a few-view capture, with planar depth and masks where the capture has them."""

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
import torch
from jaxtyping import Bool, Float
from nerfstudio.data.datasets.base_dataset import InputDataset
from PIL import Image
from torch import Tensor

from ddm_training.errors import InputError
from diffusionerf_ns import cut_out
from diffusionerf_ns.dataparsers.images import UNREADABLE, has_alpha, in_8_bits, same_shape

KEPT_BYTES = 1 << 28  # of decoded images


class FewViewDataset(InputDataset):
    """nerfstudio's dataset, and in each item:

    * "depth_image" [h, w, 1], planar depth in metres, 0 where unknown: where the data parser knows depth files.
      Times ``metadata["scene_units_per_metre"]`` it is in scene units. It is unknown outside of masks that are trained
      by and where images are transparent: a model is not asked for what was there, and rays may well meet nothing.
    * "mask" [h, w, 1], bool: from ``mask_filenames`` (training pixels are drawn by it too), else from
      ``metadata["eval_mask_filenames"]`` (which data parsers give for test images only).
    """

    exclude_batch_keys_from_device: list[str] = [  # noqa: RUF012 - nerfstudio reads it as a class attribute
        *InputDataset.exclude_batch_keys_from_device,
        "depth_image",
    ]

    background: Float[Tensor, "3"] | None = None
    """Of cut-outs the colour to show them on, in [0, 1], where it is known; see `find_cut_outs`."""
    _opaque: list[Bool[np.ndarray, "_h _w"]] | None = None
    _on_background = False
    _by_masks = False

    @property
    def has_masks(self) -> bool:
        """Whether what is outside of masks is not trained on."""
        return bool(self._dataparser_outputs.mask_filenames)

    def cut_out_by_masks(self, *, judge_inside: bool = False) -> None:
        """Take what is outside of the masks for empty, as if it were transparent; they are no masks from here on.

        Args:
            judge_inside: keep them as masks for evaluation only.
        """
        opaque = []
        for index, path in enumerate(self._dataparser_outputs.mask_filenames or ()):
            pixels = self._read(index)
            inside = load_mask(path, *pixels.shape[:2])[..., 0].numpy()
            opaque.append(inside & (pixels[..., 3] >= cut_out.OPAQUE) if self._any_alpha else inside)
        if judge_inside:
            self.metadata["eval_mask_filenames"] = self._dataparser_outputs.mask_filenames
        self._dataparser_outputs = replace(self._dataparser_outputs, mask_filenames=None)
        self._by_masks = True
        self._cut_out(opaque, None)

    def find_cut_outs(self, *, flat: bool) -> None:
        """Find out what of the images is empty, by their alpha or by a flat colour around an object.

        Where something is, images have alpha from here on. Their background is the flat colour, the data parser's
        `alpha_color`, or unknown.

        Args:
            flat: whether a flat colour counts.
        """
        count, alpha_color = len(self), self._dataparser_outputs.alpha_color
        if self._any_alpha:
            opaque = [self._read(i)[..., 3] >= cut_out.OPAQUE for i in range(count)]
            if not all(mask.all() for mask in opaque):
                return self._cut_out(opaque, alpha_color)
        if flat and not self._dataparser_outputs.mask_filenames:
            found = cut_out.flat_background(self._read(i)[..., :3] for i in range(count))
            if found is not None:
                colour, empty = found
                self._cut_out([~part for part in empty], torch.from_numpy(colour.astype(np.float32) / 255.0))

    def _cut_out(self, opaque: list[Bool[np.ndarray, "_h _w"]], background: Float[Tensor, "3"] | None) -> None:
        self._opaque, self.background = opaque, background
        # nerfstudio would lay images with alpha on that colour, and the alpha be lost
        self._dataparser_outputs = replace(self._dataparser_outputs, alpha_color=None)

    def show_on(self, colour: Float[Tensor, "3"] | None) -> None:
        """Give images as RGB from here on: where they have alpha, on that colour; None: the data parser's, or black."""
        self.background = self._dataparser_outputs.alpha_color if colour is None else colour
        self._on_background = True

    @property
    def has_cut_outs(self) -> bool:
        """Whether `find_cut_outs` found something empty."""
        return self._opaque is not None

    def opaque(self, image_idx: int) -> Bool[Tensor, "h w"] | None:
        """Pixels of an image that are not empty; None: all of all images."""
        return None if self._opaque is None else torch.from_numpy(self._opaque[image_idx])

    def inside_mask(self, image_idx: int) -> Bool[Tensor, "h w"] | None:
        """Pixels of an image that its mask lets be trained on; the image is not read. None: the set has no masks."""
        paths = self._dataparser_outputs.mask_filenames
        if not paths:
            return None
        size = int(self.cameras.height[image_idx]), int(self.cameras.width[image_idx])
        return load_mask(paths[image_idx], *size)[..., 0]

    def belongs(self, image_idx: int) -> Bool[Tensor, "h w"] | None:
        """Pixels of an image that are of the scene, by its mask and by what is empty; None: all."""
        inside, opaque = self.inside_mask(image_idx), self.opaque(image_idx)
        return opaque if inside is None else inside if opaque is None else inside & opaque

    def image_on(self, image_idx: int, colour: Float[Tensor, "3"] | None) -> Float[Tensor, "h w 3"]:
        """The image in [0, 1] on a background of that colour, else on black."""
        image = torch.from_numpy(self._with_alpha(image_idx).astype(np.float32) / 255.0)
        if image.shape[2] == 3:
            return image
        rgb, alpha = image[..., :3], image[..., 3:]
        return rgb * alpha if colour is None else rgb * alpha + colour * (1.0 - alpha)

    def get_numpy_image(self, image_idx: int) -> np.ndarray:
        """The image as uint8 [h, w, 3], of palettes, grey and 16 bits too; [h, w, 4] if any of the set has alpha."""
        if self._on_background and (self._opaque is not None or self._any_alpha):
            return (255.0 * self.image_on(image_idx, self.background)).round().to(torch.uint8).numpy()
        return self._with_alpha(image_idx).copy()

    def _with_alpha(self, image_idx: int) -> np.ndarray:
        pixels = self._read(image_idx)
        if self._opaque is None or (not self._by_masks and self._any_alpha and pixels[..., 3].min() < 255):
            return pixels
        return np.dstack([pixels[..., :3], np.uint8(255) * self._opaque[image_idx]])

    def _read(self, image_idx: int) -> np.ndarray:
        """The file's pixels, not to be written to; kept while they are not too many, as much looks at them."""
        if image_idx in self._kept:
            return self._kept[image_idx]
        pixels = self._decode(image_idx)
        if sum(kept.nbytes for kept in list(self._kept.values())) + pixels.nbytes <= KEPT_BYTES:
            self._kept[image_idx] = pixels
        return pixels

    @cached_property
    def _kept(self) -> dict[int, np.ndarray]:
        return {}

    def _decode(self, image_idx: int) -> np.ndarray:
        with Image.open(self._dataparser_outputs.image_filenames[image_idx]) as image:
            try:
                image = in_8_bits(image).convert("RGBA" if self._any_alpha else "RGB")
            except InputError as error:
                raise InputError(f"{image.filename}: {error}") from error
            if self.scale_factor != 1.0:
                width, height = image.size
                size = (int(width * self.scale_factor), int(height * self.scale_factor))
                image = image.resize(size, Image.Resampling.BOX)
            return np.array(image, dtype=np.uint8)

    @cached_property
    def _any_alpha(self) -> bool:
        """Batches stack images: all have as many channels as one of them needs."""
        for path in self._dataparser_outputs.image_filenames:
            with Image.open(path) as image:
                if has_alpha(image):
                    return True
        return False

    def get_data(self, image_idx: int, image_type: Literal["uint8", "float32"] = "float32") -> dict[str, Any]:
        """Item ``image_idx``: "image_idx", "image" and, where known, "mask" and "depth_image"."""
        image = self.get_image_float32(image_idx) if image_type == "float32" else self.get_image_uint8(image_idx)
        height, width = image.shape[:2]
        data: dict[str, Any] = {"image_idx": image_idx, "image": image}
        masks = self._dataparser_outputs.mask_filenames or self.metadata.get("eval_mask_filenames")
        if masks:
            data["mask"] = load_mask(masks[image_idx], height, width)
        depths = self.metadata.get("depth_filenames")
        if depths and any(depth is not None for depth in depths):
            path = depths[image_idx]
            depth = (
                torch.zeros(height, width, 1)
                if path is None
                else load_depth(path, height, width, float(self.metadata["depth_unit_scale_factor"]))
            )
            if self.has_masks:
                depth[~data["mask"]] = 0.0
            if self._opaque is not None or self._any_alpha:
                depth[torch.from_numpy(self._with_alpha(image_idx)[..., 3] < cut_out.OPAQUE)] = 0.0
            data["depth_image"] = depth
        data.update(self.get_metadata(data))
        return data


def load_mask(path: Path, height: int, width: int) -> Bool[Tensor, "{height} {width} 1"]:
    """A mask at image size: True where the area average of the file is at least one half.

    White is True, or what is opaque where the file has transparent pixels; in a file without a value of 128 or more, as
    segmentations of 0 and 1, all that is not 0 is (not so in a JPEG, whose black is not quite 0).

    Raises:
        InputError: not an image, or its shape is not that of the image.
    """
    try:
        with Image.open(path) as file:
            mask, lossy = file.convert("L"), file.format == "JPEG"
            if has_alpha(file) and (alpha := file.convert("RGBA").getchannel("A")).getextrema() != (255, 255):
                mask = alpha
    except UNREADABLE as error:
        raise InputError(f"mask {path} cannot be read: {error}.") from error
    _check_shape("mask", path, mask.size, height, width)
    if not lossy and np.asarray(mask).max() < 128:
        mask = mask.point(lambda value: 255 if value else 0)
    if mask.size != (width, height):
        mask = mask.resize((width, height), Image.Resampling.BOX)
    return torch.from_numpy(np.asarray(mask) >= 128)[..., None]


def load_depth(path: Path, height: int, width: int, unit: float) -> Float[Tensor, "{height} {width} 1"]:
    """Planar depth in metres at image size (nearest pixel, so that edges stay sharp), 0 where unknown.

    Args:
        path: 16-bit or 32-bit image, or `.npy`.
        unit: metres per stored unit.

    Raises:
        InputError: not readable, not numbers, or its shape is not that of the image.
    """
    try:
        if path.suffix == ".npy":
            stored = np.load(path, allow_pickle=False)
        else:
            with Image.open(path) as file:
                stored = np.array(file)
    except (*UNREADABLE, EOFError, BadZipFile) as error:
        raise InputError(f"depth {path} cannot be read: {error}.") from error
    if not isinstance(stored, np.ndarray):
        stored.close()
        raise InputError(f"depth {path} is an archive of arrays (.npz) by its content; expected one array.")
    if stored.dtype.kind not in "biuf":
        raise InputError(f"depth {path} holds values of type {stored.dtype}; expected numbers.")
    stored = stored.squeeze() if path.suffix == ".npy" else stored
    if stored.ndim != 2:
        raise InputError(f"depth {path} has shape {stored.shape}; expected one channel.")
    _check_shape("depth", path, (stored.shape[1], stored.shape[0]), height, width)
    depth = np.nan_to_num(stored.astype(np.float32) * unit, nan=0.0, posinf=0.0, neginf=0.0)
    rows = ((np.arange(height) + 0.5) * stored.shape[0] / height).astype(np.int64)
    columns = ((np.arange(width) + 0.5) * stored.shape[1] / width).astype(np.int64)
    return torch.from_numpy(np.ascontiguousarray(depth[rows][:, columns, None]))


def _check_shape(kind: str, path: Path, size: tuple[int, int], height: int, width: int) -> None:
    """A file may be of another size than the image, but must have its shape but for rounding."""
    if not same_shape(size, (width, height)):
        raise InputError(f"{kind} {path} is {size[0]} x {size[1]}, its image is {width} x {height}: another shape.")

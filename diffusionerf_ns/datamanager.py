"""One training step is one ray bundle: N pixel rays of the training views, then the rays of the patches."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import UInt8
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.data.datamanagers.base_datamanager import (
    VanillaDataManager,
    VanillaDataManagerConfig,
    variable_res_collate,
)
from nerfstudio.data.pixel_samplers import PixelSampler
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackAttributes
from nerfstudio.utils.rich_utils import CONSOLE
from rich.markup import escape
from torch import Tensor

from ddm_training.errors import InputError
from ddm_training.files import write_whole
from ddm_training.rgbd import RgbdSpec
from diffusionerf_ns import patches, refine
from diffusionerf_ns.bounds import StereoBounds
from diffusionerf_ns.contract import FACTS, PatchBatch, PatchRequest, StereoRequest, TrainingFacts
from diffusionerf_ns.dataset import FewViewDataset
from diffusionerf_ns.errors import show_input_errors_plainly
from diffusionerf_ns.image_matching import match_images
from diffusionerf_ns.pixel_sampler import MaskedPixelSampler
from diffusionerf_ns.stereo_rays import StereoRays
from diffusionerf_ns.visibility import are_perspective

NO_IMAGE_PATCHES = "No patches of training images: they have masks or are not perspective."


@dataclass
class DiffusioNeRFDataManagerConfig(VanillaDataManagerConfig):
    """Pixel rays as nerfstudio draws them, plus patches for the prior."""

    _target: type = field(default_factory=lambda: DiffusioNeRFDataManager)
    image_patch_share: float = 0.25
    """Share of patches whose colours come from a training image; the others are rendered from perturbed training poses.
    The paper's value. None where images have masks or are not perspective, or all are too narrow for a patch."""
    center_jitter: float = 0.2
    """Perturbed poses: the camera centre moves by up to this many metres along each axis. The paper's value; turned
    into scene units by the metric scale."""
    max_rotation: float = 0.1 * math.pi
    """Perturbed poses: largest rotation about a random axis, radians. The value of the authors' code."""

    stereo_rays_per_batch: int = 128
    """Rays per step through pixels of the training images whose depth stereo knows, for the stereo depth term; 0
    leaves stereo out, and with it completed depth and what stereo tells of the scene's bounds and scale. Not in the
    paper."""
    completion: Literal["prior", "membrane"] = "prior"
    """How depth is completed between the pixels that stereo knows. prior: by the depth completion network of the prior;
    a prior without one interpolates. membrane: interpolated along the image. Not in the paper."""
    completion_prior: str | None = None
    """Prior whose depth completion network is used. None: that of --pipeline.model.prior."""
    completion_revision: str | None = None
    """Branch, tag or commit of that prior, if it is a Hugging Face id."""
    completion_steps: int = 60
    """Steps in which the depth completion network is trained on the capture, so that its images' depths contradict one
    another less (`agreement.py`). 0, or more than 12 images: each image is completed alone. Not in the paper."""

    outside_masks: Literal["ignored", "empty"] = "ignored"
    """What masks leave out. "ignored": it is not trained on, as people who walked by. "empty": nothing is there, as
    where images are transparent; for objects that are cut out of their background by masks."""
    cut_out_flat_background: bool = True
    """Where all training images show an object before one flat colour, that colour counts as empty, as transparent
    pixels do; False takes it for a surface. Not in the paper."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.image_patch_share <= 1.0:
            raise InputError(
                f"--pipeline.datamanager.image-patch-share must be in [0, 1], found {self.image_patch_share}."
            )
        if self.completion_steps < 0:
            raise InputError(
                f"--pipeline.datamanager.completion-steps must be 0 or more, found {self.completion_steps}."
            )


class DiffusioNeRFDataManager(VanillaDataManager[FewViewDataset]):
    """See `DiffusioNeRFDataManagerConfig`.

    nerfstudio opens the benchmark's runs of nerfacto with it as well, and with the config of its own data manager:
    these have no stereo, and their images are as they are.

    The trainer's callbacks tie it to the model, which says before each step how many patches it wants: none while the
    prior is off, and then none are drawn.
    """

    config: DiffusioNeRFDataManagerConfig
    train_dataset: FewViewDataset
    eval_dataset: FewViewDataset

    def __init__(
        self,
        config: VanillaDataManagerConfig,
        device: torch.device | str = "cpu",
        test_mode: Literal["test", "val", "inference"] = "val",
        world_size: int = 1,
        local_rank: int = 0,
        **kwargs: Any,
    ) -> None:
        show_input_errors_plainly()
        self._request: Callable[[], PatchRequest | None] = lambda: None
        self._stereo_request: Callable[[], StereoRequest | None] = lambda: None
        self._sources: tuple[list[UInt8[Tensor, "_h _w 3"]], list[int]] | None = None
        super().__init__(config, device, test_mode, world_size, local_rank, **kwargs)
        if test_mode == "val":
            self._warn_of_black_masks()
        data = self.train_dataset
        # Views are compared with the photographs when they are rendered, also long after the training.
        detail = refine.detail_by_scale(
            (data.image_on(i, data.background), data.opaque(i), float(data.cameras.fx[i])) for i in range(len(data))
        )
        self.stereo_rays: StereoRays | None = None
        bounds: StereoBounds | None = None
        if test_mode == "val" and getattr(config, "stereo_rays_per_batch", 0) > 0 and len(data) > 1:
            found = match_images(data, self.config, self.device)
            if found is not None:
                bounds, self.stereo_rays = found
        data.metadata[FACTS] = TrainingFacts(data.cameras, data.has_cut_outs, data.background, detail, bounds)

    @property
    def dataset_type(self) -> type[FewViewDataset]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Data set class, also when the data parser is nerfstudio's own."""
        return FewViewDataset

    def create_train_dataset(self) -> FewViewDataset:
        """nerfstudio's; before it is read, what is empty of its images is found."""
        data = super().create_train_dataset()
        flat = getattr(self.config, "cut_out_flat_background", None)
        if flat is None:
            return data
        if self.config.outside_masks == "empty":
            if not data.has_masks:
                raise InputError(
                    "--pipeline.datamanager.outside-masks empty: the training images have no masks. Give them (see "
                    "--masked-training and mask_path in docs/captures.md), or leave the flag out."
                )
            data.cut_out_by_masks()
            if self.test_mode == "val":
                CONSOLE.print("What lies outside the masks counts as empty.")
            return data
        data.find_cut_outs(flat=flat)
        if self.test_mode == "val" and data.has_cut_outs and data.background is not None:
            colour = tuple((255.0 * data.background).round().int().tolist())
            CONSOLE.print(
                f"The training images show objects cut out, before one flat colour, {colour}: it counts as empty "
                "(where images have no alpha, --pipeline.datamanager.cut-out-flat-background False takes it for a "
                "surface)."
            )
        return data

    def create_eval_dataset(self) -> FewViewDataset:
        """nerfstudio's; beside a finished run, images are shown as its views are, for `ns-render` to write them.

        What is empty of views of objects cut out by their masks is empty of the images that they are compared with.
        """
        data = super().create_eval_dataset()
        if getattr(self.config, "outside_masks", "ignored") == "empty" and data.has_masks:
            data.cut_out_by_masks(judge_inside=True)
        if self.test_mode != "val" and hasattr(self.config, "cut_out_flat_background"):
            for photographs in (self.train_dataset, data):
                photographs.show_on(self.train_dataset.background)
        # nerfstudio looks at the sizes of training images alone.
        cameras = (self.train_dataset.cameras, data.cameras)
        if len(torch.cat([torch.cat([c.height, c.width], dim=-1) for c in cameras]).unique(dim=0)) > 1:
            self.config.collate_fn = variable_res_collate
        return data

    def _warn_of_black_masks(self) -> None:
        """Say which masks leave out a whole training image."""
        data = self.train_dataset
        for i, path in enumerate(self.train_dataparser_outputs.mask_filenames or ()):
            inside = data.inside_mask(i)
            if inside is not None and not inside.any():
                CONSOLE.print(
                    f"[yellow]Mask {escape(str(path))} is black: nothing of that training image is used. Masks are "
                    "white where the scene is."
                )

    def _get_pixel_sampler(self, dataset: FewViewDataset, num_rays_per_batch: int) -> PixelSampler:
        """nerfstudio's, or where it would be its plain one, ours."""
        sampler = super()._get_pixel_sampler(dataset, num_rays_per_batch)
        if type(sampler) is not PixelSampler:
            return sampler
        return MaskedPixelSampler(sampler.config, in_training=dataset is self.train_dataset, **sampler.kwargs)

    def set_ray_wishes(
        self, patches: Callable[[], PatchRequest | None], stereo: Callable[[], StereoRequest | None]
    ) -> None:
        """Say what the next steps shall bring beside pixel rays; both are called once a step.

        Args:
            patches: which patches; None for none.
            stereo: what of stereo; None for nothing.
        """
        self._request, self._stereo_request = patches, stereo

    def get_training_callbacks(
        self, training_callback_attributes: TrainingCallbackAttributes
    ) -> list[TrainingCallback]:
        """Tie the model's wish for patches to this data manager, and leave the split in the run's folder."""
        attributes = training_callback_attributes
        pipeline, trainer = attributes.pipeline, attributes.trainer
        if pipeline is not None:
            model: Any = pipeline.model
            self.set_ray_wishes(model.patch_request, model.stereo_request)
            if self.config.image_patch_share > 0.0 and not self._has_image_patches:
                if model.config.score_weight != 0.0:
                    CONSOLE.print(f"[yellow]{NO_IMAGE_PATCHES}")
                self.config.image_patch_share = 0.0  # the viewer shows it
            if model.config.score_weight != 0.0 and self.config.image_patch_share > 0.0:
                spec = model.patch_spec()
                try:
                    fitting = self.images_with_patches(spec)  # now, not at the first patch, which may come late
                except InputError as error:
                    CONSOLE.print(f"[yellow]No patches of training images: {escape(str(error))}")
                    self.config.image_patch_share = 0.0
                else:
                    if len(fitting) < (count := len(self.train_dataset)):
                        CONSOLE.print(f"{count - len(fitting)} of {count} training images are too small for patches.")

        split = self.train_dataset.metadata.get("split")
        if trainer is not None and split is not None:
            write_whole(Path(trainer.base_dir) / "split.json", json.dumps(split, indent=2) + "\n")
        return []

    def next_train(self, step: int) -> tuple[RayBundle, dict[str, Any]]:
        """Pixel rays, coloured by ``batch["image"]``; patch rays behind them, described by ``batch["patches"]``.

        The batch's "image" and "indices" have one row a pixel ray, fewer than the bundle has rays.
        """
        rays, batch = super().next_train(step)
        bundles = [rays]
        wanted = None if self.stereo_rays is None else self._stereo_request()
        if self.stereo_rays is not None and wanted is not None:
            matched, batch["stereo"] = self.stereo_rays.draw(rays, batch["indices"], matched_rays=wanted.matched_rays)
            if matched is not None:
                bundles.append(matched)
        request = self._request()
        if request is None or request.count == 0:
            return (rays if len(bundles) == 1 else patches.concatenate_rays(bundles)), batch
        drawn = [self._draw(request) for _ in range(request.count)]
        batch["patches"] = PatchBatch(
            first_ray=sum(len(b) for b in bundles),
            size=request.spec.patch_size,
            rgb=[None if p.rgb is None else p.rgb.to(self.device) for p in drawn],
            cameras=[p.camera for p in drawn],
            poses=[p.pose for p in drawn],
        )
        return patches.concatenate_rays([*bundles, *(p.rays.to(self.device) for p in drawn)]), batch

    @property
    def _has_image_patches(self) -> bool:
        """Images of other than perspective cameras have no patches as the prior knows them, and those of images with
        masks would show what is not to be trained on."""
        return are_perspective(self.train_dataset.cameras) and not self.train_dataset.has_masks

    def images_with_patches(self, spec: RgbdSpec) -> list[int]:
        """The training images that have patches as a prior knows them.

        Raises:
            InputError: none has: they are masked, not perspective, or too small.
        """
        if not self._has_image_patches:
            raise InputError(NO_IMAGE_PATCHES)
        return patches.images_with_patches(self.train_dataset.cameras, spec)

    def _draw(self, request: PatchRequest) -> patches.Patch:
        """On the CPU, where the images are: what is cut is little, and a GPU would be asked for many small numbers."""
        cameras = self.train_dataset.cameras
        if torch.rand(()) < self.config.image_patch_share:
            images, among = self._patch_sources(request.spec)
            return patches.sample_image_patch(cameras, images, request.spec, among=among)
        return patches.sample_rendered_patch(
            cameras,
            request.spec,
            jitter=self.config.center_jitter / request.metric_scale,
            max_angle=self.config.max_rotation,
        )

    def _patch_sources(self, spec: RgbdSpec) -> tuple[list[UInt8[Tensor, "_h _w 3"]], list[int]]:
        """All training images in the order of the cameras, and those of them that have patches; found out once."""
        if self._sources is None:
            among = self.images_with_patches(spec)
            # On black, as rays are rendered in training that meet nothing.
            images = (self.train_dataset.image_on(i, None) for i in range(len(self.train_dataset)))
            self._sources = [(255.0 * image).round().to(torch.uint8) for image in images], among
        return self._sources

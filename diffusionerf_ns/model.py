"""DiffusioNeRFModel: nerfacto plus the score of an RGBD prior and the paper's geometric terms.

Start reading at `get_loss_dict`. The maths is in `regularizers`, the shape of the schedules in `schedules`.
"""

import math
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.data.scene_box import OrientedBox
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackAttributes, TrainingCallbackLocation
from nerfstudio.model_components.losses import interlevel_loss
from nerfstudio.models.nerfacto import NerfactoModel
from nerfstudio.utils import colormaps
from nerfstudio.utils.colors import COLORS_DICT
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

from ddm_training import rgbd
from diffusionerf_ns import backbone, inspection, metrics, regularizers, schedules
from diffusionerf_ns.bounds import BoundsCollider, first_metric_scale, metric_scale_from_disparity
from diffusionerf_ns.contract import FACTS, PatchBatch, PatchRequest, StereoRequest, TrainingFacts
from diffusionerf_ns.evaluation import judge_view
from diffusionerf_ns.geometric_losses import geometric_losses, normals_losses, stereo_losses
from diffusionerf_ns.gradients import check_finite
from diffusionerf_ns.hash_grid import speed_up_hash_grids
from diffusionerf_ns.lpips import LpipsNetworks, no_lpips_download
from diffusionerf_ns.model_config import DiffusioNeRFModelConfig
from diffusionerf_ns.patches import hold_patches
from diffusionerf_ns.prior import PatchPrior
from diffusionerf_ns.score_loss import JudgedPatch, score_loss
from diffusionerf_ns.stereo_rays import StereoBatch
from diffusionerf_ns.view_renderer import ViewRenderer
from diffusionerf_ns.viewer import InspectionPanel, draw_small_on_cpu
from diffusionerf_ns.visibility import TrainingFrusta, are_perspective, largest_slant

LOOK_AT_COLOURS_EVERY = 50  # steps


class DiffusioNeRFModel(NerfactoModel):
    """See `DiffusioNeRFModelConfig`."""

    config: DiffusioNeRFModelConfig
    metric_scale: Float[Tensor, ""]

    def populate_modules(self) -> None:
        """nerfacto's modules, the training frusta, the bounds, and (outside the module tree) the prior."""
        on_cuda = torch.device(self.kwargs.get("device", "cpu")).type == "cuda"
        self.config.implementation = backbone.choose_implementation(self.config.implementation, on_cuda)
        with no_lpips_download():
            super().populate_modules()
        self.metadata: dict[str, Any] = self.kwargs.get("metadata") or {}
        facts: TrainingFacts | None = self.metadata.get(FACTS)  # None: a data manager that is not ours
        self._stereo = None if facts is None else facts.stereo
        self._adapt_backbone()
        self.background = None if facts is None or not facts.has_cut_outs else self._shown_on(facts.background)
        """[3]; of cut-outs the colour that their views are shown on, in [0, 1]."""
        self.protocol: metrics.ProtocolName = self.metadata.get("protocol", "nerfstudio")
        self._lpips: LpipsNetworks | None = None
        self.image_metrics: list[dict[str, float]] = []
        near, far = self.metadata.get("near"), self.metadata.get("far")
        cameras = None if facts is None else facts.cameras
        slant = 1.0 if cameras is None else largest_slant(cameras)
        self.collider = BoundsCollider(*self.config.ray_bounds(near, far, self._stereo, slant))
        self.frusta = TrainingFrusta(cameras) if cameras is not None and are_perspective(cameras) else None
        self._colours_died = False
        self.total_steps = 1
        self.in_training_run = False
        scale = self.config.metric_scale
        if scale is None:
            scale = first_metric_scale(near, far, self._stereo, self.prior_spec)
        self.register_buffer("metric_scale", torch.tensor(float(scale)))
        self._known_scale = float(self.metric_scale)
        self.register_load_state_dict_post_hook(_take_metric_scale)
        self.last_patch: JudgedPatch | None = None
        self.views = ViewRenderer(self, facts)
        self.inspection_panel = InspectionPanel(self)

    def _shown_on(self, own: Float[Tensor, "3"] | None) -> Float[Tensor, "3"]:
        """The images' own background; else that which the configuration names, or black as of nerfacto."""
        return COLORS_DICT.get(self.config.background_color, COLORS_DICT["black"]) if own is None else own

    @property
    def photographs_on(self) -> Float[Tensor, "3"] | None:
        """The colour that photographs with alpha are compared on; None where none is named: as their files say."""
        return COLORS_DICT.get(self.config.background_color) if self.background is None else self.background

    def _adapt_backbone(self) -> None:
        """Changes to nerfacto's fields, see `backbone`, and to when its proposal networks are updated."""
        c, found = self.config, self._stereo
        self.proposal_sampler.update_sched = self.proposal_interval
        if c.center_grid and not c.disable_scene_contraction:
            centre, radius = ((0.0, 0.0, 0.0), 1.0) if found is None else (found.centre, found.radius)
            contraction = backbone.ContentContraction(centre, radius * c.grid_margin)
            backbone.use_contraction([self.field, *self.proposal_networks], contraction)
        backbone.limit_view_dependence(self.field, c.view_degrees)
        self.level_mask = backbone.insert_level_mask(self.field, c)
        backbone.draw_weights(self.field)
        if not c.predict_normals and c.camera_optimizer.mode == "off":
            speed_up_hash_grids(self)
        if c.camera_optimizer.mode != "off":  # which has moved the rays when they are sampled
            self.proposal_sampler.register_forward_pre_hook(lambda _, args: hold_patches(args[0]))

    # The prior

    @property
    def metres_per_unit(self) -> float:
        """`metric_scale`, without waiting for the device; 1 until it is found."""
        return 1.0 if math.isnan(self._known_scale) else self._known_scale

    def set_metric_scale(self, scale: float) -> None:
        """Metres per scene unit from here on; NaN: not known yet."""
        self.metric_scale.fill_(scale)
        self._known_scale = float(self.metric_scale)

    def prior_spec(self) -> rgbd.RgbdSpec:
        """What the prior's folder says of its patches, without loading its network."""
        from diffusionerf_ns.prior import find_prior

        if "prior" in self.__dict__:
            return self.prior.spec
        return rgbd.RgbdSpec.load(find_prior(self.config.prior, self.config.prior_revision))

    @cached_property  # not a property: nerfstudio's viewer reads every property of a model when it opens
    def prior(self) -> PatchPrior:
        """The prior, loaded when it is first used."""
        return PatchPrior.load(self.config.prior, revision=self.config.prior_revision, device=self.device)

    def set_prior(self, prior: PatchPrior) -> None:
        """Use this prior instead of the one that the configuration names."""
        self.prior = prior

    @property
    def score_factor(self) -> float:
        """Weight of the score term at this step; 0 while the prior is off."""
        c = self.config
        if c.score_weight == 0.0 or schedules.fraction(self.step, self.total_steps) < c.score_start:
            return 0.0
        fade = schedules.fade_out(self.step, self.total_steps, start=c.score_fade_start, end=1.0, final=c.score_final)
        return c.score_weight * c.patch_every * fade

    @property
    def tau(self) -> float:
        """Noise level of the prior at this step."""
        c = self.config
        if c.tau_fixed is not None:
            return c.tau_fixed
        return schedules.tau(self.step, self.total_steps, start=c.tau_start, end=c.tau_end, until=c.tau_until)

    @property
    def active_levels(self) -> float:
        """Hash levels that are switched on at this step, not whole while one is fading in."""
        c = self.config
        x = schedules.fraction(self.step, self.total_steps)
        return schedules.linear(x, 0.0, c.levels_until, c.levels_start * c.num_levels, float(c.num_levels))

    def proposal_interval(self, step: int) -> float:
        """Steps between two updates of the proposal networks: nerfacto's, but the warm-up may follow the run."""
        c = self.config
        warmup, every = float(c.proposal_warmup_steps(self.total_steps)), float(c.proposal_update_every)
        return min(max(schedules.linear(float(step), 0.0, warmup, 0.0, every), 1.0), every)

    def patch_request(self) -> PatchRequest | None:
        """Which patches the next step needs; None while the prior is off."""
        if self.score_factor == 0.0:
            return None
        if self.step % self.config.patch_every != 0 or math.isnan(self._known_scale):
            return None
        return PatchRequest(self.patch_spec(), self.config.patches_per_step, self._known_scale)

    def patch_spec(self) -> rgbd.RgbdSpec:
        """The prior's, with patches no larger than the configuration asks for."""
        spec, size = self.prior.spec, self.config.patch_size
        return spec if size is None or size >= spec.patch_size else replace(spec, patch_size=size)

    def stereo_request(self) -> StereoRequest | None:
        """What the next step needs of stereo; None while no term of it is on."""
        matched = self.config.stereo_depth_weight > 0.0
        return StereoRequest(matched) if matched or self.config.completed_depth_weight > 0.0 else None

    # Evaluation

    def get_image_metrics_and_images(
        self, outputs: dict[str, Any], batch: dict[str, Any]
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Metrics of one image under the capture's protocol, and pictures of it.

        Metrics are called as `evaluation.judge_view` says. Depth is judged where true depth exists: the median in
        metres by the capture's own scale, so that the metric scale found for the prior does not enter. Depth pictures
        keep one range, the scene's.
        """
        true, pred = self.renderer_rgb.blend_background(batch["image"].to(self.device)), outputs["rgb"]
        if self._lpips is None:
            self._lpips = LpipsNetworks(self.device)
        units_per_metre = self.metadata.get("scene_units_per_metre")
        z = None
        if "depth_image" in batch and units_per_metre is not None:
            z = self._planar_median(outputs) / units_per_metre
        values = judge_view(
            outputs,
            true,
            z,
            batch,
            self._lpips,
            protocol=self.protocol,
            colour_corrected=self.config.color_corrected_metrics,
        )
        self.image_metrics.append(dict(values))
        # nerfstudio wants the same names of every image; the pipeline takes their means
        wanted = (*(metrics.DEPTH_METRICS if z is not None else ()), *(("masked_psnr",) if "mask" in batch else ()))
        values = dict.fromkeys(wanted, math.nan) | values
        images = {
            "img": torch.cat([true, pred, outputs["MedianDepth"].to(pred)], dim=1),
            "accumulation": colormaps.apply_colormap(outputs["accumulation"]),
        }
        return values, images | inspection.cheap_pictures(outputs)

    def _planar_median(self, outputs: dict[str, Any]) -> Float[Tensor, "h w"]:
        """Of a view, scene units; the median is given along rays, and `planar_depth` of the expected depth."""
        return (outputs["depth"] / outputs["expected_depth"] * outputs["planar_depth"] / self.metres_per_unit)[..., 0]

    def get_outputs_for_camera(self, camera: Cameras, obb_box: OrientedBox | None = None) -> inspection.ViewOutputs:
        """nerfacto's outputs of a view, and on demand those of `inspection`.

        `rgb` is refined by the prior (`refine_tau`) and filled where no training image shows anything (`fill_unseen`),
        `rgb_rendered` as it was rendered.
        """
        return self.views.render(camera, obb_box)

    def get_rgba_image(self, outputs: dict[str, Any], output_name: str = "rgb") -> Tensor:
        """nerfstudio's, which exports and `ns-render` ask for; cut-outs are transparent where nothing is."""
        if self.background is None:
            return super().get_rgba_image(outputs, output_name)
        rgb, alpha = outputs[output_name], outputs[output_name.replace("rgb", "accumulation")]
        own = (rgb - self.background.to(rgb) * (1.0 - alpha)) / alpha.clamp_min(1e-10)
        return torch.cat([own.clamp(0.0, 1.0), alpha], dim=-1)

    # Training

    def get_training_callbacks(
        self, training_callback_attributes: TrainingCallbackAttributes
    ) -> list[TrainingCallback]:
        """nerfacto's, and keeping the step and the length of the run."""
        self.in_training_run = True
        # ns-train switches it on: views beside the training are of ever other sizes, and each would be timed anew.
        torch.backends.cudnn.benchmark = False
        trainer = training_callback_attributes.trainer
        if trainer is not None:
            # A resumed run goes on for that many steps: it ends where the whole run would have, and so do schedules.
            self.total_steps = getattr(trainer, "_start_step", 0) + trainer.config.max_num_iterations
            draw_small_on_cpu(trainer, self.device)

        def set_step(step: int) -> None:
            self.step = step
            self.views.surfaces.forget()
            self.level_mask.set_active(self.active_levels)
            if self._colours_died:
                CONSOLE.print("[yellow]All colours had become black: the colour network begins anew.")
                backbone.restart(self.field.mlp_head)
                self._colours_died = False

        if self.config.score_weight != 0.0:
            self.patch_spec()  # a bad prior shall be found before the first step
        elif self.config.refine_tau != 0.0:
            self.prior_spec()  # the same, without loading its network
        return [
            *super().get_training_callbacks(training_callback_attributes),
            TrainingCallback([TrainingCallbackLocation.BEFORE_TRAIN_ITERATION], set_step, update_every_num_iters=1),
            TrainingCallback([TrainingCallbackLocation.AFTER_TRAIN], self._end_of_training),
            TrainingCallback(
                [TrainingCallbackLocation.AFTER_TRAIN_ITERATION],
                self.inspection_panel.after_step,
                update_every_num_iters=1,
            ),
        ]

    def _end_of_training(self, step: int) -> None:
        self.in_training_run = False

    def get_outputs(self, ray_bundle: RayBundle) -> dict[str, Any]:
        """nerfacto's outputs and `planar_depth` in metres: differentiable, along the optical axis.

        `depth` is the median, for people; `expected_depth` its differentiable sibling. Both are distances along the ray
        in scene units.
        """
        c = self.config
        # A viewer beside a training shall be quick: its views are seen for moments only, and training waits for them.
        quick = self.training or (self.in_training_run and inspection.in_viewer())
        factor = 1 if quick else c.eval_samples_factor
        if not self.training:
            # The same after a short run as when it is loaded again: a checkpoint does not hold the warm-up's state.
            self.proposal_sampler.set_anneal(1.0)
        if self.background is not None:  # random colours tell what is empty from what has its background's colour
            self.renderer_rgb.background_color = "random" if self.training else self.background
        self.proposal_sampler.num_nerf_samples_per_ray = factor * c.num_nerf_samples_per_ray
        outputs = super().get_outputs(ray_bundle)
        # nerfstudio's --render-nearest-camera asks for single rays without an optical axis.
        norm = ray_bundle.metadata.get("directions_norm", 1.0)
        outputs["planar_depth"] = outputs["expected_depth"] / norm * self.metres_per_unit
        return outputs

    def get_metrics_dict(self, outputs: dict[str, Any], batch: dict[str, Any]) -> dict[str, Tensor]:
        """PSNR of the pixel rays; `get_loss_dict` adds the unweighted terms in training."""
        image = self.renderer_rgb.blend_background(batch["image"].to(self.device))
        values = {"psnr": self.psnr(outputs["rgb"][: image.shape[0]], image)}
        self.camera_optimizer.get_metrics_dict(values)
        return values

    def get_loss_dict(
        self, outputs: dict[str, Any], batch: dict[str, Any], metrics_dict: dict[str, Any] | None = None
    ) -> dict[str, Tensor]:
        """All loss terms, weighted. Rays up to ``batch["image"]``'s length are pixel rays, the others patches.

        Raises:
            NonFiniteLossError: names the step and the terms. Nothing of that step reaches the weights.
        """
        log = {} if metrics_dict is None else metrics_dict
        image = batch["image"].to(self.device)
        count = image.shape[0]
        rgb, image = self.renderer_rgb.blend_background_for_loss_computation(
            pred_image=outputs["rgb"][:count], pred_accumulation=outputs["accumulation"][:count], gt_image=image
        )
        losses = {"rgb_loss": self.rgb_loss(image, rgb)}
        if self.training:
            if self.step % LOOK_AT_COLOURS_EVERY == LOOK_AT_COLOURS_EVERY - 1:
                died = backbone.colours_died(
                    outputs["rgb"][:count].detach(), image, outputs["accumulation"][:count].detach()
                )
                self._colours_died = backbone.in_any_process(died, self.device)
            if self.config.chroma_weight > 0.0:
                losses["chroma_loss"] = self.config.chroma_weight * regularizers.chroma(rgb - image)
            losses["interlevel_loss"] = self.config.interlevel_loss_mult * interlevel_loss(
                outputs["weights_list"], outputs["ray_samples_list"]
            )
            patches: PatchBatch | None = batch.get("patches")
            losses.update(
                geometric_losses(
                    self.config,
                    outputs,
                    step=self.step,
                    total_steps=self.total_steps,
                    bounds=self.collider.bounds,
                    frusta=self.frusta,
                    pixel_rays=count,
                    first_patch_ray=None if patches is None else patches.first_ray,
                    opaque=self._opaque(batch, len(outputs["rgb"])),
                    log=log,
                )
            )
            stereo: StereoBatch | None = batch.get("stereo")
            if stereo is not None:
                losses.update(stereo_losses(self.config, outputs, stereo, log))
            if patches is not None:
                losses["score_loss"], self.last_patch = score_loss(
                    self.config, outputs, patches, self.prior, tau=self.tau, factor=self.score_factor, log=log
                )
                log["metric_scale"] = self.metric_scale.clone()
            losses.update(normals_losses(self.config, outputs))
            self._find_metric_scale(outputs)
            log |= inspection.depth_quantiles(outputs["depth"][:count, 0])
            self.camera_optimizer.get_loss_dict(losses)
        check_finite(losses, self.step)
        return losses

    def _opaque(self, batch: dict[str, Any], rays: int) -> Bool[Tensor, " rays"] | None:
        """Rays that are known to meet a surface; None where all do: nothing is cut out."""
        if self.background is None:
            return None
        opaque = torch.zeros(rays, dtype=torch.bool, device=self.device)
        opaque[: len(batch["image"])] = batch["image"][:, 3].to(self.device) >= 0.5
        if (stereo := batch.get("stereo")) is not None:
            opaque[stereo.rays] = True
        return opaque

    @torch.no_grad()
    def _find_metric_scale(self, outputs: dict[str, Any]) -> None:
        """At the end of the warm-up, put the median disparity of the rendered rays on the prior's."""
        if not math.isnan(self._known_scale) or (self.config.score_weight == 0.0 and self.config.refine_tau == 0.0):
            return
        if schedules.fraction(self.step, self.total_steps) >= self.config.metric_scale_warmup:
            disparity = float((1.0 / outputs["depth"].clamp_min(1e-6)).median())
            scale = torch.tensor(metric_scale_from_disparity(disparity, self.prior_spec()), device=self.device)
            if torch.distributed.is_initialized():  # each process has rays of its own
                torch.distributed.broadcast(scale, src=0)
            self.set_metric_scale(float(scale))
            CONSOLE.print(f"Metric scale: {self._known_scale:.4g} metres per scene unit, from rendered depth.")


def _take_metric_scale(model: DiffusioNeRFModel, _: object) -> None:
    """After a checkpoint was loaded."""
    model.set_metric_scale(float(model.metric_scale))

"""Validation within a training: losses per noise level on held-out patches, samples, and the exported prior."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ddm_training.errors import InputError
from ddm_training.export import export_prior, model_card, open_repository, parameter_count, push_prior
from ddm_training.frames import Scene, open_store
from ddm_training.patches import PatchConfig, PatchSampler, Stream, disparity_quantiles
from ddm_training.pretrained import Origin, data_names
from ddm_training.rgbd import RgbdSpec, pseudo_image
from ddm_training.sample import sample_prior
from ddm_training.unet import NoisePredictor, add_noise, make_scheduler

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d import UNet2DModel

    from ddm_training.train import TrainConfig

LEVELS = (3, 20, 49, 99, 250, 500, 900)  # timesteps of validation; a NeRF uses 3 ... 99
BATCH = 32
SAMPLING_STEPS = 50


@torch.no_grad()
def noise_losses(
    denoise: Callable[[Tensor, Tensor], Tensor],
    x: Float[Tensor, "n 4 h w"],
    mask: Bool[Tensor, "n h w"],
    noise: Float[Tensor, "n 4 h w"],
    *,
    levels: Sequence[int],
    abar: Float[Tensor, " t"],
    batch: int = BATCH,
) -> dict[str, dict[str, float]]:
    """Mean squared error of the predicted noise per timestep: of all channels and of depth, valid pixels only.

    Predicting zero gives 1.0 (up to the draw of the noise).
    """
    result = {}
    for level in levels:
        color, depth = 0.0, 0.0
        for part in torch.arange(len(x)).split(batch):
            t = torch.full((len(part),), level, device=x.device)
            eps = noise[part]
            error = (denoise(add_noise(x[part], eps, abar[t]), t) - eps).square()
            color += error[:, :3].double().sum().item()
            depth += (error[:, 3] * mask[part]).double().sum().item()
        colors, depths = 3 * mask.numel(), int(mask.sum())
        result[str(level)] = {"all": (color + depth) / (colors + depths), "depth": depth / max(depths, 1)}
    return result


def held_out_stores(roots: Sequence[Path]) -> list[tuple[Path, list[Scene]]]:
    """The held-out scenes of each store that has some; a store without is warned of.

    Raises:
        InputError: none of the stores has frames of split val.
    """
    stores = []
    for root in roots:
        try:
            stores.append((root, open_store(root, "val")))
        except InputError as error:
            warnings.warn(f"not validated on {root}: {error}", stacklevel=2)
    if not stores:
        raise InputError(f"none of {', '.join(map(str, roots))} has scenes of split 'val': add held-out scenes.")
    return stores


def held_out(config: "TrainConfig") -> PatchSampler:
    """Sampler of held-out patches: the training's focal lengths, no other augmentation.

    Raises:
        InputError: none of the stores has frames of split val.
    """
    stores = [scenes for _, scenes in held_out_stores(config.data)]
    patches = PatchConfig(
        patch_size=config.patch_size,
        focal_range=config.focal_range,
        depth_scale_jitter=1.0,
        min_valid=config.min_valid,
        augment=False,
    )
    return PatchSampler(stores, patches, weights=[1.0] * len(stores))


class PatchValidation:
    """Held-out patches and the facts about the training data, prepared once.

    The pseudo image of the exported prior has the paper's field of view, whatever the focal length.
    """

    def __init__(
        self,
        config: "TrainConfig",
        sampler: PatchSampler,
        origin: Origin | None = None,
        *,
        device: torch.device,
        world: int,
    ) -> None:
        self.config, self.origin, self.device = config, origin, device
        if config.push_to_hub:
            assert config.hub_model_id is not None
            open_repository(config.hub_model_id, private=config.hub_private)
        data = held_out(config).patches(
            seed=config.seed, stream=Stream.VALIDATION, step=0, first=0, count=config.validation_patches
        )
        self.x, self.mask, self.noise = (data[key].to(device) for key in ("x", "mask", "noise"))
        self.scheduler = make_scheduler(config.prediction_type)
        self.abar = self.scheduler.alphas_cumprod.to(device)
        self._global_batch = config.train_batch_size * world
        self._frames = len(sampler)
        self._spec: dict[str, Any] = {
            "patch_size": config.patch_size,
            "focal": config.focal,
            "focal_range": config.focal_range,
            "image_size": pseudo_image(config.focal),
            "disparity_quantiles": disparity_quantiles(sampler, seed=config.seed),
            "depth_scale_jitter": config.depth_scale_jitter,
            "trained_on": data_names(sampler.scenes, origin),
            "license": config.license,
        }

    @property
    def folder(self):
        """The exported prior."""
        return self.config.output_dir / "prior"

    def run(self, average: "UNet2DModel", step: int) -> dict[str, Any]:
        """Validate the averaged weights and export them; returns losses and the sheet of samples."""
        from ddm_training.sheets import patch_sheet

        bf16 = self.config.mixed_precision == "bf16"
        model = NoisePredictor(average, self.scheduler, bf16=bf16).to(self.device).eval()
        losses = noise_losses(model, self.x, self.mask, self.noise, levels=LEVELS, abar=self.abar)
        spec = RgbdSpec(steps=step, **self._spec)
        count, sheet = self.config.num_validation_samples, None
        if count:
            drawn = sample_prior(
                model,
                self.scheduler,
                spec.patch_size,
                count,
                device=self.device,
                seed=self.config.seed,
                batch_size=count,
                steps=SAMPLING_STEPS,
            )
            sheet = patch_sheet(drawn, columns=min(count, 8))
        measured = {
            "val_loss": sum(level["all"] for level in losses.values()) / len(losses),
            "val": losses,
            "frames": self._frames,
            "global_batch": self._global_batch,
        }
        card = model_card(
            spec,
            config=vars(self.config),
            parameters=parameter_count(average),
            measured=measured,
            sheet=sheet is not None,
            origin=self.origin,
        )
        export_prior(
            self.folder,
            unet=average,
            scheduler=self.scheduler,
            spec=spec,
            card=card,
            sheet=sheet,
            dtype=self.config.export_dtype,
        )
        return {**measured, "sheet": sheet}

    def push(self) -> None:
        """Upload the prior folder."""
        assert self.config.hub_model_id is not None
        push_prior(self.folder, self.config.hub_model_id)

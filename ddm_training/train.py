"""`ddm train`: training of the denoiser of patches.

Notation
    x, mask    patches [b, 4, P, P] in [-1, 1] and their depth validity [b, P, P]
    noise, t   noise [b, 4, P, P] and timesteps [b]
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ddm_training.errors import InputError, require_at_least
from ddm_training.loop import run_loop
from ddm_training.loop_config import LoopConfig
from ddm_training.objective import LossType, masked_loss
from ddm_training.pretrained import begin_with, find_origin, goes_on
from ddm_training.unet import Prediction, Preset

if TYPE_CHECKING:
    from ddm_training.patches import PatchConfig
    from ddm_training.validation import PatchValidation


@dataclass(frozen=True, kw_only=True)
class TrainConfig(LoopConfig):
    """Train an RGBD patch diffusion model on frame stores. Run the same command again to go on.

    On several devices: `accelerate launch -m ddm_training.cli train ...` or `torchrun -m ddm_training.cli train ...`.
    """

    preset: Preset = "tiny"
    """Network: prototype 1.8 M, tiny (ships in the wheel), small 22 M, paper 38 M parameters (the
    paper's own: 36 M)."""
    prediction_type: Prediction = "v_prediction"
    """What the network gives. Noise is the paper's; velocity is nearly the same at the low levels that a NeRF uses, and
    at the high ones, which decide what an unconditional sample shows, nearly the clean patch."""
    patch_size: int = 48
    """Side of a patch in pixels, a multiple of 8."""
    focal: float = 175.0
    """Nominal focal length in pixels: patches are 48 x 48 windows of a 256 x 192 image with f = 175 in the paper. With
    another one the size of that image changes as much: a NeRF's patches lie in the same field of view."""
    focal_range: tuple[float, float] = (120.0, 260.0)
    """Patches are brought to a focal length drawn log-uniformly from this range (not published by the paper)."""
    depth_scale_jitter: float = 1.5
    """Depth is multiplied by a log-uniform factor in [1 / this, this], so that metres need not be known exactly."""
    min_valid: float = 0.7
    """Smallest share of valid depth in a patch."""

    loss_type: LossType = "l2"
    """L1 in the authors' code; L2 by default, because the score is the mean of the noise, not its median."""
    depth_loss_weight: float = 3.0
    """Weight of the depth channel's loss; 1 in the paper. At 3, depth counts as much as the three colours together:
    a NeRF follows the depth score almost alone."""
    timestep_bias: float = 0.5
    """Share of samples with t log-uniform in [3, 199), the range a NeRF uses; the rest is uniform over 1000."""

    validation_patches: int = 64
    """Held-out patches, the same every time."""
    num_validation_samples: int = 16
    """Unconditional samples on the sheet; 0 for none."""
    push_to_hub: bool = False
    """Upload the prior folder at the end; the repository is made at the start."""
    hub_model_id: str | None = None
    """Where to upload it, e.g. name/rgbd-prior."""
    hub_private: bool = False
    """Make the uploaded repository private."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, validation_patches=1, num_validation_samples=0)
        self.require_amounts("depth_loss_weight")
        if not 0 <= self.timestep_bias <= 1:
            raise InputError(f"--timestep-bias must lie in [0, 1], found {self.timestep_bias}.")
        if not self.focal_range[0] <= self.focal <= self.focal_range[1]:
            raise InputError(f"--focal {self.focal:g} must lie within --focal-range {self.focal_range}.")
        if self.push_to_hub and not self.hub_model_id:
            raise InputError("--push-to-hub needs --hub-model-id, e.g. name/rgbd-prior.")
        self.patch_config()

    def patch_config(self) -> "PatchConfig":
        """How training patches are cut."""
        from ddm_training.patches import PatchConfig

        return PatchConfig(
            patch_size=self.patch_size,
            focal_range=self.focal_range,
            depth_scale_jitter=self.depth_scale_jitter,
            min_valid=self.min_valid,
        )

    def main(self) -> None:
        """Train."""
        train(self)


def train(config: TrainConfig) -> None:
    """Train as ``config`` says; see `run_loop`."""
    run_loop(config, PatchTask)


class PatchTask:
    """The denoiser of patches, as `run_loop` trains it."""

    command = "train"
    identity: Mapping[str, Any] = {"preset": None, "patch_size": None, "prediction_type": "epsilon"}
    unit = "patches"

    def __init__(self, config: TrainConfig) -> None:
        from ddm_training.patches import open_sampler
        from ddm_training.rgbd import RgbdSpec
        from ddm_training.unet import make_scheduler

        self.config = config
        self.origin = find_origin(config, RgbdSpec.load)
        self.sampler = open_sampler(config.data, "train", config.patch_config(), weights=config.data_weights)
        self.frames = len(self.sampler)
        self._abar = make_scheduler().alphas_cumprod

    def make_network(self) -> nn.Module:
        """Of the preset, with the weights to begin with, if there are any.

        Raises:
            InputError: those cannot be read, or do not fit.
        """
        from ddm_training.rgbd import RgbdSpec
        from ddm_training.unet import load_scheduler, load_unet, make_unet

        network, folder = make_unet(self.config.preset, patch_size=self.config.patch_size), self.config.pretrained
        if folder is None or goes_on(self.config):
            return network
        trained: Any = load_unet(folder)
        found = RgbdSpec.load(folder).near, load_scheduler(folder).config["prediction_type"]
        if found != (wanted := (RgbdSpec.near, self.config.prediction_type)):
            raise InputError(
                f"--pretrained {folder} has (near, --prediction-type) {found}, wanted {wanted}: its weights mean "
                "something else."
            )
        return begin_with(network, trained.unet, folder, f"--preset {self.config.preset}")

    def wrap(self, network: Any) -> nn.Module:
        """As (x_t, t) -> noise or velocity."""
        from ddm_training.unet import Predictor

        return Predictor(network, bf16=self.config.mixed_precision == "bf16")

    def draw(self, *, step: int, first: int, count: int) -> dict[str, Tensor]:
        """Windows of frames, and the noise and timesteps of their patches."""
        from ddm_training.patches import Stream

        seed, bias = self.config.seed, self.config.timestep_bias
        return self.sampler.windows(seed=seed, stream=Stream.TRAIN, step=step, first=first, count=count, bias=bias)

    def prepare(self, batch: dict[str, Tensor], *, step: int, first: int) -> dict[str, Tensor]:
        """Patches of the windows."""
        from ddm_training.patches import make_patches

        # On a CPU there is nothing to wait for, and the largest window of the batch is less work.
        canvas = self.sampler.canvas if batch["t"].is_cuda else None
        return make_patches(batch, self.config.patch_size, canvas)

    def loss(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """Of the predicted noise or velocity."""
        from ddm_training.unet import add_noise, velocity

        self._abar = self._abar.to(batch["x"].device)
        x, noise, abar = batch["x"], batch["noise"], self._abar[batch["t"]]
        return masked_loss(
            model(add_noise(x, noise, abar), batch["t"]),
            velocity(x, noise, abar) if self.config.prediction_type == "v_prediction" else noise,
            batch["mask"],
            kind=self.config.loss_type,
            depth_weight=self.config.depth_loss_weight,
        )

    def validation(self, device: torch.device, world: int) -> "PatchValidation":
        """Losses per noise level, samples, and the prior folder."""
        from ddm_training.validation import PatchValidation

        return PatchValidation(self.config, self.sampler, self.origin, device=device, world=world)

    def finish(self, validation: "PatchValidation") -> None:
        """Upload, if so asked."""
        if self.config.push_to_hub:
            validation.push()

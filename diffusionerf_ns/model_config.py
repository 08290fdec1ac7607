"""All options of the model, in one place; `model` reads them at every step, so the viewer may change them."""

from dataclasses import dataclass, field
from typing import Literal

from nerfstudio.cameras.camera_optimizers import CameraOptimizerConfig
from nerfstudio.models.nerfacto import NerfactoModelConfig

from ddm_training.errors import InputError, require_positive
from diffusionerf_ns.bounds import StereoBounds

NEAR_PLANE, FAR_PLANE = 0.05, 1000.0  # nerfacto's, scene units


def _model_class() -> type:
    from diffusionerf_ns.model import DiffusioNeRFModel  # `model` imports this module

    return DiffusioNeRFModel


@dataclass
class DiffusioNeRFModelConfig(NerfactoModelConfig):
    """nerfacto's options, and those of the prior and the geometric terms.

    A term whose weight is 0 is not computed. Weights are for means over rays; the paper sums over 1,024 rays, so its
    weights are given multiplied by 1,024. Only the score is a sum over the pixels of a patch. Moments of schedules are
    fractions of the run; `frustum_boost_steps` and `proposal_warmup` alone count steps.
    """

    _target: type = field(default_factory=_model_class)

    # The prior
    prior: str = "builtin"
    """RGBD prior: a built-in name, a prior folder, or a Hugging Face hub id."""
    prior_revision: str | None = None
    """Branch, tag or commit of the prior, if it is a Hugging Face id."""
    score_weight: float = 1.0
    """Factor of the prior's score in the loss, the paper's term. 0 switches the score off and renders no patches: so in
    diffusionerf-tiny. The prior's other uses are `refine_tau` and the datamanager's `completion`."""
    score_scaling: Literal["variance", "none"] = "none"
    """"none" is the paper's: the score as it is, whose pull grows as the noise level falls. "variance" multiplies it by
    the variance of the noise level and divides by the pixels of a patch: the pull is then that of the mean squared
    distance between a patch and its clean estimate, equally strong at all noise levels and patch sizes."""
    score_depth_weight: float = 4e-7
    """Weight of the depth channel of the score, which is also multiplied by depth in metres. Authors': 0.2 x 2e-6."""
    score_rgb_weight: float = 2e-10
    """Weight of the colour channels of the score. The authors' 0.2 x 1e-9."""
    score_rgb_norm: float | None = 3000.0
    """The colour score of a patch is rescaled to this norm (authors' code); None leaves it as it is."""
    score_max_depth: float = 20.0
    """Depth in metres at which the factor of the depth score stops growing. The paper, with bounded scenes, has no such
    limit."""
    score_start: float = 0.0
    """Fraction of the run before which the prior is off. The paper's value."""
    score_fade_start: float = 1.0
    """Fraction of the run from which the prior's weight falls, to reach `score_final` at the end; 1 keeps it, as the
    paper does."""
    score_final: float = 0.0
    """Factor of the prior's weight at the end of the run, where it is faded."""
    patches_per_step: int = 1
    """Patches a step. The paper's value."""
    patch_every: int = 1
    """Steps from one with patches to the next; the weight is multiplied by it. 1 in the paper."""
    patch_size: int | None = None
    """Largest side of a patch in pixels, a multiple of 8. None: as large as the prior's own. Half the side needs a
    quarter of the rays; in the paper's ablation 24 pixels are as good as 48."""
    tau_start: float = 0.1
    """Noise level tau of the prior at the start: a fraction of its noise schedule, 0 (hardly any noise) to 1 (pure
    noise). The paper's value."""
    tau_end: float = 0.0
    """Noise level tau of the prior at the end: a fraction of its noise schedule, 0 (hardly any noise) to 1 (pure
    noise). The paper's value."""
    tau_until: float = 0.25
    """Fraction of the run at which `tau_end` is reached. The paper: step 2,500 of 10,000."""
    tau_fixed: float | None = None
    """Noise level tau of the prior for the whole run, in place of the schedule: a fraction of its noise schedule, 0
    (hardly any noise) to 1 (pure noise). The viewer's control sets it."""
    metric_scale: float | None = None
    """Metres per scene unit; None finds it from stereo, else from the capture's bounds, else from the depth of the
    first steps."""
    metric_scale_warmup: float = 0.05
    """Where the scene's bounds are unknown: fraction of the run without prior, after which the scale is read off the
    rendered depth."""

    refine_tau: float = 0.03
    """Highest noise level tau at which the prior removes noise from rendered views: a fraction of its noise schedule, 0
    to 1. Only views with more fine detail than the photographs are changed, and no more than needed: one and two
    thirds of tau are tried as well (one to three passes of the network). 0 leaves views as rendered. Not in the
    paper."""

    fill_unseen: bool = True
    """Pixels of a rendered view whose surface no training image shows (by the rendered depth) get smooth colours that
    continue those around them: nothing was learnt there. Masks are not considered. Off with more than 32 training
    images. Not in the paper."""

    # The geometric terms
    frustum_weight: float = 0.01
    """Weight of density that no training view sees on patch rays, and that fewer than `frustum_views` see on pixel
    rays. After `frustum_boost_steps` it is multiplied by `frustum_after`. The paper's 1e-5 x 1024."""
    frustum_views: int = 1
    """Training views that must see density on pixel rays. 1 asks nothing of them: their own view does, and without
    patches there is no frustum term. The paper's 2 moves what one view alone shows to where others look as well, which
    is before the scene (docs/findings.md, eleventh round)."""
    frustum_boost_steps: int = 100
    """Steps with the full frustum weight, before `frustum_after`. The authors' value."""
    frustum_after: float = 1.0
    """Factor of the frustum weight after `frustum_boost_steps`; 1 keeps it for the whole run. 0.01 in the authors'
    code, whose grid is bounded by a sphere."""
    foreground_weight: float = 0.01
    """Weight of rays that meet no surface; 1e-3 x 1024 in the paper. With that, and the paper's frustum schedule and
    distortion weight, fern loses 0.8 dB and 0.07 SSIM (252 x 189, 3 views, 400 steps) against these weights."""
    distortion_weight: float = 0.01
    """Weight of the distortion term divided by depth; 1.5e-5 x 1024 in the paper."""
    distortion_start: float = 0.3
    """Fraction of the run at which the distortion term sets in. The paper: step 3,000 of 10,000."""
    distortion_full: float = 0.8
    """Fraction of the run at which it has its full weight. The paper: step 8,000."""
    distortion_loss_mult: float = 0.0
    """nerfacto's own distortion term, off: `distortion_weight` takes its place."""

    chroma_weight: float = 4.0
    """Weight of errors of hue and saturation, which the photometric term counts already: brightness varies more and is
    learnt first, and a short run ends before the colours are. Not in the paper."""

    stereo_depth_weight: float = 0.1
    """Weight of what lies before or behind the depth that stereo of the training images knows, by the logarithm of
    the distance ratio. Not in the paper."""

    completed_depth_weight: float = 0.1
    """The same for all pixel rays and stereo depth completed between the matched pixels, as far as it exceeds
    `completed_depth_margin` or `confirmed_depth_margin`; where another image sees farther, nothing is asked. Keeps
    untextured walls from ending up before the cameras. Not in the paper."""
    completed_depth_margin: float = 0.3
    """Relative error that costs nothing, as completed depth is rough; behind the surface, 1.5 times as much."""
    confirmed_depth_margin: float = 0.1
    """Relative error that costs nothing where the completed depth of another image agrees; there it replaces
    `completed_depth_margin`. Why .1 and not .05 or .2: docs/findings.md."""

    completed_error_factor: float = 1.0
    """The network that completes depth also predicts its own error. This times the predicted error costs nothing, where
    that is less than the margins. inf: the margins alone."""
    completed_sure_error: float = 0.05
    """Predicted relative error up to which completed depth counts in full. Where the network predicts a larger error,
    the weight is this divided by it, so that the photographs decide. inf: full weight everywhere."""

    # Where the rays begin and end
    near_margin: float = 0.75
    """Rays begin at this times the capture's near bound, or at `stereo_near_margin` times the nearest depth
    (`StereoBounds.near`) that stereo finds, whichever is farther; where neither is known, at `near_plane`. A
    `near_plane` other than nerfacto's .05 is a lower limit in training, and a `far_plane` other than its 1,000 an
    upper one. After training, views that are nearer to the scene than all training images begin nearer in proportion
    (with up to 32 perspective training images)."""
    stereo_near_margin: float = 0.6
    """See `near_margin`. Not all surfaces can be matched: room is left in front of the nearest match."""
    far_margin: float = 1.25
    """Where the scene's far bound is known, rays end at this times it, or where it lies in the corners of the training
    images if that is farther: it is planar depth."""
    stereo_far_margin: float = 3.0
    """Where it is not, rays end at this times the farthest depth (98 % quantile) that stereo finds; without stereo at
    `far_plane`. What no training view shows is then a little behind the scene, not at the end of the world."""

    # Changes to the backbone, none of them in the paper
    center_grid: bool = True
    """Put the uncontracted part of the hash grid where stereo finds the scene, not where the cameras are."""
    grid_margin: float = 1.0
    """Half side of that part, as a multiple of what holds most of the scene."""
    levels_start: float = 0.3
    """Share of the hash levels that are switched on at the start; 1 switches coarse-to-fine off."""
    levels_until: float = 0.5
    """Fraction of the run at which all hash levels are switched on."""
    view_degrees: int = 2
    """Degrees of spherical harmonics through which colour depends on the view, 1 (not at all) to 4 (nerfacto's)."""

    eval_samples_factor: int = 2
    """After training, rays get this many times the samples of training: with a laptop's few samples, neighbouring
    rays hit and miss thin surfaces, which is noise in the image. The viewer of a run that is under way does without."""

    color_corrected_metrics: bool = False
    """Evaluation gives cc_psnr, cc_ssim and cc_lpips as well: of renders whose colours are fitted to each test image's
    exposure and white balance. For captures whose cameras changed them; as in nerfstudio's splatfacto."""

    # Deviations of the backbone from nerfacto's defaults
    camera_optimizer: CameraOptimizerConfig = field(default_factory=lambda: CameraOptimizerConfig(mode="off"))
    """Off: three views do not determine poses and a scene at once."""
    use_appearance_embedding: bool = False
    """Off: patches at new poses have no image, and three images do not tell appearance from geometry."""
    average_init_density: float = 0.01
    """As nerfstudio's own nerfacto preset has it."""
    proposal_warmup: int | None = None  # pyright: ignore[reportIncompatibleVariableOverride]  # nerfacto's is a number
    """Steps over which the updates of the proposal networks become rarer, from each step to one of
    `proposal_update_every`. None: half of the run."""

    def __post_init__(self) -> None:
        require_positive(self, "metric_scale", "grid_margin", below="pipeline.model.")
        if self.patch_size is not None and (self.patch_size < 8 or self.patch_size % 8):
            raise InputError(f"--pipeline.model.patch-size must be a multiple of 8, found {self.patch_size}.")
        if not 1 <= self.view_degrees <= 4:
            raise InputError(f"--pipeline.model.view-degrees must be 1, 2, 3 or 4, found {self.view_degrees}.")
        if self.patch_every < 1:
            raise InputError(f"--pipeline.model.patch-every must be at least 1, found {self.patch_every}.")
        for name in ("completed_depth_margin", "confirmed_depth_margin"):
            margin = getattr(self, name)
            if not 0.0 <= margin < 1.0:
                raise InputError(f"--pipeline.model.{name.replace('_', '-')} must be in [0, 1), found {margin}.")
        for name in ("completed_error_factor", "completed_sure_error"):
            if not (value := getattr(self, name)) > 0.0:
                raise InputError(
                    f"--pipeline.model.{name.replace('_', '-')} must be positive, found {value}; `inf` leaves the "
                    "network's own expectation out."
                )

    def proposal_warmup_steps(self, run_steps: int) -> int:
        """`proposal_warmup` in a run of ``run_steps`` steps."""
        return round(0.5 * run_steps) if self.proposal_warmup is None else self.proposal_warmup

    def ray_bounds(
        self, near: float | None, far: float | None, found: StereoBounds | None, slant: float = 1.0
    ) -> tuple[float, float]:
        """Where rays begin and end, scene units; see `near_margin`.

        Args:
            near: of the capture, scene units; None where it has no bounds.
            far: likewise.
            found: by stereo; None without it. It says more than nerfacto's `near_plane` and `far_plane`, which are
                lengths in units that may be anything; others than nerfacto's are kept to.
            slant: largest distance along a training ray per planar depth.

        Raises:
            InputError: rays would end before they begin.
        """
        end = max(self.far_margin, slant) * far if far is not None else self.far_plane
        if far is None and found is not None:
            end = self.stereo_far_margin * found.far
        begin = self.near_plane if near is None else self.near_margin * near
        if found is not None and found.near < end:
            begin = max(0.0 if near is None else begin, self.stereo_near_margin * found.near)
        begin = begin if self.near_plane == NEAR_PLANE else max(begin, self.near_plane)
        end = end if self.far_plane == FAR_PLANE else min(end, self.far_plane)
        if begin >= end:
            raise InputError(
                f"rays would begin at {begin:g} and end at {end:g} scene units; expected near before far. Correct the "
                "capture's bounds, or --pipeline.model.near-plane and far-plane."
            )
        return begin, end

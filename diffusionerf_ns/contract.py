"""What the data manager and the model tell each other: of the training images once, of the rays in each step."""

from dataclasses import dataclass

from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from ddm_training.rgbd import RgbdSpec
from diffusionerf_ns.bounds import StereoBounds

FACTS = "diffusionerf"
"""The key of `TrainingFacts`: the pipeline hands the model the data set's metadata and nothing else."""


@dataclass(frozen=True)
class TrainingFacts:
    """What the model is told of the training images: ``metadata[FACTS]`` of their data set."""

    cameras: Cameras
    has_cut_outs: bool
    """Whether part of the images is empty, see `FewViewDataset.find_cut_outs`."""
    background: Float[Tensor, "3"] | None
    """Of cut-outs the colour to show them on, in [0, 1]; None where it is not known."""
    fine_detail: list[tuple[float, float]]
    """Focal length and detail of the photographs, see `refine.detail_by_scale`."""
    stereo: StereoBounds | None
    """Where stereo finds the scene; None where it is off, in vain, or nothing is trained."""


@dataclass(frozen=True)
class PatchRequest:
    """What the model wants of the next step's patches."""

    spec: RgbdSpec
    count: int
    metric_scale: float
    """Metres per scene unit."""


@dataclass(frozen=True)
class StereoRequest:
    """What the model wants of stereo in the next step: completed depth of the pixel rays, and perhaps own rays."""

    matched_rays: bool
    """Whether rays through matched pixels are wanted."""


@dataclass(frozen=True)
class PatchBatch:
    """What the model needs to know of the patches at the end of a ray bundle."""

    first_ray: int
    """Rays before this one are pixel rays."""
    size: int
    """P: each patch has P * P rays, row by row."""
    rgb: list[Float[Tensor, "p p 3"] | None]
    """Per patch, the colours in [0, 1] of a training image, or None where the patch's colours are rendered."""
    cameras: list[int]
    """Per patch, the training camera that it comes from or is near to."""
    poses: list[Float[Tensor, "3 4"]]
    """Per patch, camera-to-world of its camera."""

    def __len__(self) -> int:
        return len(self.rgb)

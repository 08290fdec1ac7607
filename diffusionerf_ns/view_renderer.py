"""Views of a model as people see them: refined by the prior, filled where nothing was seen, depth in colours."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.scene_box import OrientedBox
from torch import Tensor

from diffusionerf_ns import inspection, refine, unseen
from diffusionerf_ns.surfaces import FieldSurfaces

if TYPE_CHECKING:
    from diffusionerf_ns.contract import TrainingFacts
    from diffusionerf_ns.model import DiffusioNeRFModel


class ViewRenderer:
    """Renders views of a model; what it needs of the training images it finds when it is first asked.

    Args:
        model: whose field it is.
        facts: of the training images; None where they are not known.
    """

    def __init__(self, model: "DiffusioNeRFModel", facts: "TrainingFacts | None") -> None:
        self._model = model
        self._stereo = None if facts is None else facts.stereo
        self.surfaces = FieldSurfaces(model, None if facts is None else facts.cameras, self._depth_of)
        self.refiner = None if facts is None else refine.ViewRefiner(lambda: model.prior, facts.fine_detail)
        self.depth_colours = inspection.DepthRange()
        self.verdict_tau = model.config.tau_start
        """Noise level at which pictures show what the prior says of a view."""

    def render(self, camera: Cameras, obb_box: OrientedBox | None) -> inspection.ViewOutputs:
        """nerfacto's outputs of a view, and on demand those of `inspection`.

        Args:
            camera: one camera.
            obb_box: what is outside is left out; None: nothing.
        """
        model, config = self._model, self._model.config
        rays = camera.generate_rays(camera_indices=0, keep_shape=True, obb_box=obb_box)
        shown = self._surfaces_of_views()
        nearer = 1.0 if shown is None else shown.nearer(camera)  # than any training image
        outputs = model.get_outputs_for_camera_ray_bundle(model.collider.bound(rays, nearer))
        near, far = self.depth_colour_range(outputs)
        frusta, begin = model.frusta, model.collider.bounds[0]
        tau, refiner = config.refine_tau, self.refiner
        inside = None if model.background is None else outputs["accumulation"][..., 0] >= inspection.EMPTY
        context = inspection.ViewContext(
            near=near,
            far=far,
            metric_scale=model.metres_per_unit,
            spec=model.prior_spec,
            prior=lambda: model.prior,
            count=None if frusta is None else self._of_points(lambda points: frusta.count(points, near=begin)),
            tau=self.verdict_tau,
            refined=None if tau <= 0.0 or refiner is None else lambda rgb, z, view: refiner(rgb, z, view, tau, inside),
            hidden=self._of_points(shown.hide) if config.fill_unseen and shown is not None else None,
            fill_empty=obb_box is None and model.renderer_rgb.background_color == "last_sample",
        )
        return inspection.view_outputs(outputs, camera, context)

    def depth_colour_range(self, outputs: dict[str, Any] | None = None) -> tuple[float, float]:
        """Near and far of depth's colours, scene units: the same in every view."""
        known = self._stereo is not None or float(self._model.collider.bounds[1]) != self._model.config.far_plane
        return self.depth_colours.get(known, lambda: self.depth_range(outputs), self._model.step)

    def depth_range(self, outputs: dict[str, Any] | None = None) -> tuple[float, float]:
        """Near and far for colouring depth, scene units: of the surfaces that stereo found, a little wider.

        Without stereo (off, in vain, or a finished run) the scene's bounds; without a far bound, up to the quantile .95
        of a render.
        """
        (near, far), found = self._model.collider.bounds.tolist(), self._stereo
        if found is not None and found.near < far and near < found.far:
            near, far = max(near, found.near / 1.2), min(far, 1.2 * found.far)
        elif far == self._model.config.far_plane and outputs is not None:
            far = float(outputs["depth"].flatten()[:: max(outputs["depth"].numel() // 10_000, 1)].quantile(0.95))
        return near, max(far, near * 1.01)

    def _surfaces_of_views(self) -> unseen.ShownSurfaces | None:
        """What the training images show, for views to use; None while a training waits for its viewer as well."""
        training = self._model.in_training_run
        if not self.surfaces.can_be_found or (training and inspection.in_viewer()):
            return None
        return self.surfaces.get(announce=not training)

    def _of_points(self, judge: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """``judge``, wherever the points are."""
        return lambda points: judge(points.to(self._model.device)).to(points.device)

    def _depth_of(self, camera: Cameras) -> Float[Tensor, "h w"]:
        """Planar depth of a training view, scene units; infinite where it meets nothing before the rays' end."""
        model = self._model
        outputs = model.get_outputs_for_camera_ray_bundle(camera.generate_rays(camera_indices=0, keep_shape=True))
        empty = (outputs["accumulation"] < inspection.EMPTY) | (
            outputs["expected_depth"] > unseen.FAR * model.collider.bounds[1]
        )
        z = outputs["planar_depth"] / model.metres_per_unit
        return torch.where(empty, torch.inf, z)[..., 0]

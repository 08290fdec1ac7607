"""What the training images show by a field's own depth: rendered small, and kept until the field changes."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.models.base_model import Model
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

from diffusionerf_ns.unseen import MAX_VIEWS, ShownSurfaces, small_cameras
from diffusionerf_ns.visibility import are_perspective


class FieldSurfaces:
    """The `ShownSurfaces` of a model, made when they are first wanted.

    Args:
        model: whose field it is. Loading a checkpoint into it forgets them.
        cameras: of the training images; None where they are not known.
        depth_of: planar depth of a view by the field, scene units; infinite where it meets nothing.
    """

    def __init__(
        self, model: Model, cameras: Cameras | None, depth_of: Callable[[Cameras], Float[Tensor, "_h _w"]]
    ) -> None:
        self._model = model
        self._cameras = cameras
        self._depth_of = depth_of
        self._kept: ShownSurfaces | None = None
        model.register_load_state_dict_post_hook(lambda *_: self.forget())

    @property
    def can_be_found(self) -> bool:
        """Whether the training cameras are known, perspective and few enough."""
        return self._cameras is not None and len(self._cameras) <= MAX_VIEWS and are_perspective(self._cameras)

    @torch.no_grad()
    def get(self, announce: bool = False) -> ShownSurfaces:
        """The surfaces; call it only where they `can_be_found`.

        Args:
            announce: whether to say that they are rendered, which takes seconds.
        """
        if self._kept is None:
            assert self._cameras is not None
            cameras = small_cameras(self._cameras.to(self._model.device))
            if announce:
                CONSOLE.print("Before the first view: depth of the training views, small.")
            training = self._model.training
            self._model.eval()
            try:
                self._kept = ShownSurfaces(cameras, [self._depth_of(cameras[i : i + 1]) for i in range(len(cameras))])
            finally:
                self._model.train(training)
        return self._kept

    def forget(self) -> None:
        """The field has changed."""
        self._kept = None

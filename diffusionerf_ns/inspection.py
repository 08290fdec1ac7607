"""What can be looked at in a view: numbers and ready pictures, most of them computed only when they are looked at.

Names tell what an output is. `snake_case` is a number per pixel; `CamelCase` is a picture whose colours mean the same
in every frame, so that nothing flickers while the camera moves. (nerfstudio colours numbers by the smallest and largest
value of each frame, and every output with "depth" in its name, pictures too; hence the pictures' spelling.)

Notation
    x       the view as the prior sees it, `ddm_training.rgbd`      [4, h, w]
    s       score, grad log p(x)                                    [4, h, w]
    sigma   standard deviation of the noise at tau; sigma |s| is 1 per channel where the prior takes x for noise
"""

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.utils import colormaps
from nerfstudio.utils.rich_utils import CONSOLE
from rich.markup import escape
from torch import Tensor
from torch.nn import functional

from ddm_training import rgbd
from ddm_training.errors import InputError
from diffusionerf_ns import unseen
from diffusionerf_ns.patches import image_patch_focal
from diffusionerf_ns.prior import PatchPrior
from diffusionerf_ns.tiles import over_tiles
from diffusionerf_ns.visibility import are_perspective

COUNT_COLOURS = ((0.35, 0.07, 0.10), (0.90, 0.45, 0.10), (0.95, 0.85, 0.25), (0.20, 0.65, 0.35))
"""Colours of 0, 1, 2 and 3 or more training cameras."""
PICTURES = (
    "MedianDepth",
    "ExpectedDepth",
    "PlanarDepth",
    "Disparity",
    "TrainingCameras",
    "Unseen",
    "PriorScoreColour",
    "PriorScoreDepth",
    "PriorCleanDepth",
)
EMPTY = 0.5
"""Share of the light that is stopped, below which a ray meets nothing."""
_POINTS_PER_CHUNK = 1 << 18


class ViewOutputs(dict[str, Any]):
    """Outputs of one view. Those on demand are computed when they are first read, and kept.

    Args:
        ready: outputs that exist.
        on_demand: name -> function that computes it.
        listed: the names that `keys` gives and iteration visits; all if None. The others can still be read.
    """

    def __init__(
        self,
        ready: dict[str, Tensor],
        on_demand: dict[str, Callable[[], Tensor]],
        listed: Iterable[str] | None = None,
    ) -> None:
        super().__init__(ready | dict.fromkeys(on_demand))
        self._on_demand = on_demand
        self._listed = None if listed is None else list(listed)

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        if value is None and name in self._on_demand:
            with torch.no_grad():
                value = self._on_demand[name]()
            self[name] = value
        return value

    def get(self, name: str, default: Any = None) -> Any:
        """As of a dict."""
        return self[name] if name in self else default  # noqa: SIM401

    def __iter__(self) -> Any:
        return iter(self.keys())

    def keys(self) -> Any:
        """Names, computing nothing."""
        return super().keys() if self._listed is None else dict.fromkeys(self._listed).keys()

    def values(self) -> Any:
        """All listed outputs, computed."""
        return [self[name] for name in self.keys()]

    def items(self) -> Any:
        """All listed names and outputs, computed."""
        return [(name, self[name]) for name in self.keys()]


@dataclass
class DepthRange:
    """Near and far of depth's colours, in scene units: set by hand, or else found and then held."""

    by_hand: tuple[float, float] | None = None
    """Near and far; None leaves them to the scene."""
    _held: tuple[float, float] | None = None
    _held_at: int = 0

    def get(self, known: bool, find: Callable[[], tuple[float, float]], step: int) -> tuple[float, float]:
        """The range for a picture at this step.

        Args:
            known: whether bounds or stereo tell it, so that what ``find`` gives does not depend on the view.
            find: gives near and far.
            step: of the training; a range that was read off a view is found anew once the step has doubled.
        """
        if self.by_hand is not None:
            return self.by_hand
        if known or self._held is None or step > 2 * self._held_at + 100:
            self._held, self._held_at = find(), step
        return self._held


@dataclass(frozen=True, kw_only=True)
class ViewContext:
    """What the outputs of a view are computed with."""

    near: float
    """Of depth's colours, scene units."""
    far: float
    """Of depth's colours, scene units."""
    metric_scale: float
    """Metres per scene unit."""
    spec: Callable[[], rgbd.RgbdSpec]
    """The prior's; called when first needed, as the two below."""
    prior: Callable[[], PatchPrior]
    count: Callable[[Float[Tensor, "n 3"]], Int[Tensor, " n"]] | None
    """Number of training cameras that see a point; None where they are unknown."""
    tau: float
    """Noise level for the prior's verdict."""
    refined: Callable[[Float[Tensor, "h w 3"], Float[Tensor, "h w"], Cameras], Float[Tensor, "h w 3"]] | None = None
    """Colours of a view without their grain, from those rendered, planar depth in metres and the camera; None: as they
    are rendered."""
    hidden: Callable[[Float[Tensor, "n 3"]], Bool[Tensor, " n"]] | None = None
    """Whether no training image shows a point, for such pixels to be filled; None fills none."""
    fill_empty: bool = True
    """Whether that goes for rays that meet nothing too; not where there is a background that shall be seen, from which
    nothing is filled either."""


def in_viewer() -> bool:
    """Whether this thread renders for nerfstudio's viewer."""
    from nerfstudio.viewer.render_state_machine import RenderStateMachine  # brings viser

    return isinstance(threading.current_thread(), RenderStateMachine)


def view_outputs(ready: dict[str, Tensor], camera: Cameras, context: ViewContext) -> ViewOutputs:
    """The outputs of a view, with everything of this module on demand.

    In the viewer, names of numbers are not listed: its colours would be those of each frame. A prior that cannot be
    used gives a grey picture and a message there, where an exception would silently end the render thread.

    Args:
        ready: of the model, each [h, w, c]; "rgb", "accumulation", "depth", "expected_depth", "planar_depth".
        camera: one camera.
        context: see there.
    """
    live = in_viewer()
    view = _View(ready, camera, context)
    ready = ready | {"rgb_rendered": ready["rgb"]}
    on_demand: dict[str, Callable[[], Tensor]] = {
        "z_metres": lambda: view.z[..., None],
        "disparity": lambda: 0.5 * (view.x()[3] + 1.0)[..., None],
        "prior_score_colour": lambda: view.score()[:3].norm(dim=0)[..., None],
        "prior_score_depth": lambda: view.score()[3].abs()[..., None],
        "prior_clean_depth": lambda: view.clean_z()[..., None],
        "MedianDepth": lambda: view.depth_picture(view.ready["depth"], 1.0),
        "ExpectedDepth": lambda: view.depth_picture(view.ready["expected_depth"], 1.0),
        "PlanarDepth": lambda: view.depth_picture(view.z[..., None], context.metric_scale),
        "Disparity": lambda: view.disparity_picture(),
        "PriorScoreColour": lambda: score_picture(view.score()[:3], view.sigma()),
        "PriorScoreDepth": lambda: score_picture(view.score()[3:], view.sigma()),
        "PriorCleanDepth": lambda: view.depth_picture(view.clean_z()[..., None], context.metric_scale),
    }
    if context.refined is not None or context.hidden is not None:
        on_demand["rgb"] = view.colours
    if context.hidden is not None:
        on_demand["unseen"] = lambda: view.unseen()[..., None].float()
        on_demand["Unseen"] = lambda: unseen_picture(view.rgb, view.unseen())
    if context.count is not None:
        on_demand["training_cameras"] = lambda: view.training_cameras()[..., None].float()
        on_demand["TrainingCameras"] = lambda: count_picture(view.training_cameras())
    if live:
        on_demand = {name: _grey_on_error(compute, ready["rgb"]) for name, compute in on_demand.items()}
    pictures = ["rgb", "rgb_rendered", "accumulation", *(name for name in PICTURES if name in on_demand)]
    return ViewOutputs(ready, on_demand, pictures if live else None)


class _View:
    """Intermediate results of one view, each computed once."""

    def __init__(self, ready: dict[str, Tensor], camera: Cameras, context: ViewContext) -> None:
        # Copies: ns-render divides whatever it writes raw and has "depth" in its name, in place.
        self.ready = {name: ready[name].clone() for name in ("depth", "expected_depth")}
        self.rgb, self.accumulation = ready["rgb"], ready["accumulation"]
        self.z: Tensor = ready["planar_depth"][..., 0].clone()
        self._camera, self._context = camera, context
        self._kept: dict[str, Tensor] = {}

    def _once(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        if name not in self._kept:
            self._kept[name] = compute()
        return self._kept[name]

    def x(self) -> Float[Tensor, "4 h w"]:
        return self._once("x", lambda: rgbd.encode(self.rgb.permute(2, 0, 1), self.z, self._context.spec().near))

    def score(self) -> Float[Tensor, "4 h w"]:
        if not are_perspective(self._camera):
            raise InputError("the prior knows perspective cameras only; choose another camera type, or another output.")
        focal = float(self._camera.fx.reshape(-1)[0])
        return self._once("score", lambda: tiled_score(self.x(), self._context.prior(), self._context.tau, focal))

    def sigma(self) -> float:
        return self._context.prior().sigma(self._context.tau)

    def clean_z(self) -> Float[Tensor, "h w"]:
        """Planar depth of the clean estimate, metres: x + sigma^2 s, decoded."""
        x = self.x()[3] + self.sigma() ** 2 * self.score()[3]
        return rgbd.decode_depth(x, self._context.spec().near)

    def colours(self) -> Float[Tensor, "h w 3"]:
        """As they are shown: without grain where the prior can judge the view, and filled where nothing was seen."""
        rgb, refined = self.rgb, self._context.refined
        if refined is not None and are_perspective(self._camera):
            rgb = refined(rgb, self.z, self._camera)
        if self._context.hidden is None:
            return rgb
        return unseen.fill(rgb, self.unseen(), None if self._context.fill_empty else self._empty())

    def training_cameras(self) -> Int[Tensor, "h w"]:
        count = self._context.count
        assert count is not None
        return self._once("cameras", lambda: self._of_surfaces(self.ready["depth"], count))

    def unseen(self) -> Bool[Tensor, "h w"]:
        return self._once("unseen", self._unseen)

    def _unseen(self) -> Bool[Tensor, "h w"]:
        hidden = self._context.hidden
        assert hidden is not None
        nowhere = self._of_surfaces(self.ready["expected_depth"], hidden)
        return nowhere if self._context.fill_empty else nowhere & ~self._empty().to(nowhere.device)

    def _empty(self) -> Bool[Tensor, "h w"]:
        return ~(self.accumulation[..., 0] > EMPTY)

    def _of_surfaces(self, depth: Float[Tensor, "h w 1"], judge: Callable[[Tensor], Tensor]) -> Tensor:
        """What is said of the points at that distance along the rays, [h, w]."""
        rays = self._camera.flatten()[0].generate_rays(camera_indices=0, keep_shape=True)
        points = (rays.origins + rays.directions * depth.to(rays.origins)).reshape(-1, 3)
        return torch.cat([judge(chunk) for chunk in points.split(_POINTS_PER_CHUNK)]).reshape(self.z.shape)

    def depth_picture(self, depth: Float[Tensor, "h w 1"], unit: float) -> Float[Tensor, "h w 3"]:
        """Depth in scene units times ``unit``, in the colours of the range; white where nothing is."""
        return colormaps.apply_depth_colormap(
            depth, self.accumulation, near_plane=self._context.near * unit, far_plane=self._context.far * unit
        )

    def disparity_picture(self) -> Float[Tensor, "h w 3"]:
        """Black is infinitely far, the brightest colour is the near bound."""
        nearest = self._context.near * self._context.metric_scale
        top = self._context.spec().near / max(nearest, self._context.spec().near)
        return fixed_colours(0.5 * (self.x()[3] + 1.0), top, "inferno")


def tiled_score(x: Float[Tensor, "4 h w"], prior: PatchPrior, tau: float, focal: float) -> Float[Tensor, "4 h w"]:
    """Score of a whole view: overlapping patches at the prior's pixel scale, blended smoothly, resized to the view.

    Args:
        x: the view as the prior sees it.
        prior: judges P x P patches.
        tau: noise level.
        focal: of the view, pixels. A view finer than the prior's training patches is reduced first, so the work depends
            on the field of view and not on the number of pixels.
    """
    spec, size = prior.spec, prior.spec.patch_size
    height, width = x.shape[1:]
    factor = image_patch_focal(spec, focal) / focal
    small = (max(round(height * factor), 1), max(round(width * factor), 1))
    score = over_tiles(_resize(x, small), size, size, lambda tiles: prior.score(tiles, tau))
    return _resize(score, (height, width))


def _resize(x: Float[Tensor, "c _h _w"], size: tuple[int, int]) -> Float[Tensor, "c _i _j"]:
    if tuple(x.shape[1:]) == size:
        return x
    return functional.interpolate(x[None], size=size, mode="bilinear", align_corners=False, antialias=True)[0]


def fixed_colours(values: Float[Tensor, "h w"], top: float, name: colormaps.Colormaps) -> Float[Tensor, "h w 3"]:
    """Colours of values from 0 to ``top``, the same in every frame."""
    return colormaps.apply_float_colormap((values / top).nan_to_num(0.0).clamp(0.0, 1.0)[..., None], name)


def score_picture(score: Float[Tensor, "c h w"], sigma: float) -> Float[Tensor, "h w 3"]:
    """sigma |s| over sqrt(c): black where the prior agrees, brightest where it takes what it sees for noise."""
    return fixed_colours(sigma * score.norm(dim=0) / score.shape[0] ** 0.5, 1.0, "magma")


def count_picture(count: Int[Tensor, "h w"]) -> Float[Tensor, "h w 3"]:
    """The colours of `COUNT_COLOURS`, with a legend where there is room for it."""
    palette = torch.tensor(COUNT_COLOURS, device=count.device)
    picture = palette[count.clamp(0, len(COUNT_COLOURS) - 1)]
    height, width = count.shape
    if height >= 48 and width >= 128:
        picture[:16, : 24 * len(COUNT_COLOURS)] = _legend().to(picture)
    return picture


def unseen_picture(rgb: Float[Tensor, "h w 3"], hidden: Bool[Tensor, "h w"]) -> Float[Tensor, "h w 3"]:
    """The view in dark grey, and in the colour of "no camera" where no training image shows it."""
    grey = 0.6 * rgb.mean(dim=-1, keepdim=True).expand_as(rgb)
    return torch.where(hidden[..., None], torch.tensor(COUNT_COLOURS[0], device=rgb.device) * 2.0, grey).clamp(0.0, 1.0)


def _legend() -> Float[Tensor, "h w 3"]:
    """One box of 24 x 16 pixels for each colour, with its number."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (24 * len(COUNT_COLOURS), 16))
    draw = ImageDraw.Draw(image)
    for i, colour in enumerate(COUNT_COLOURS):
        last = i == len(COUNT_COLOURS) - 1
        fill = tuple(round(255 * c) for c in colour)
        draw.rectangle((24 * i, 0, 24 * i + 23, 15), fill=fill, outline="white")
        draw.text((24 * i + 6, 2), f"{i}+" if last else str(i), fill="white" if i in (0, 3) else "black")
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255.0)


def cheap_pictures(outputs: dict[str, Any]) -> dict[str, Tensor]:
    """The pictures that cost next to nothing beside the rendering: all but the prior's verdict.

    Evaluation must not fail because the prior has gone: a picture that needs its folder is then left out, and said.
    """
    pictures: dict[str, Tensor] = {}
    for name in PICTURES:
        if name in outputs and not name.startswith("Prior"):
            try:
                pictures[name] = outputs[name]
            except InputError as error:
                _say_once(f"Picture {name} is left out: {error}")
    return pictures


_said: set[str] = set()


def depth_quantiles(depth: Float[Tensor, " rays"]) -> dict[str, Tensor]:
    """Curves that tell a scene from fog and from a wall in front of the camera: quantiles of depth, scene units."""
    values = depth.detach().quantile(torch.tensor([0.05, 0.5, 0.95], device=depth.device))
    return {f"depth_q{percent:02d}": value for percent, value in zip((5, 50, 95), values)}


def _say_once(line: str) -> None:
    if line not in _said:
        _said.add(line)
        CONSOLE.print(f"[yellow]{escape(line)}")


def _grey_on_error(compute: Callable[[], Tensor], rgb: Float[Tensor, "h w 3"]) -> Callable[[], Tensor]:
    """The same, but grey with a message (once) where the user's prior or camera does not do."""

    def safely() -> Tensor:
        try:
            return compute()
        except InputError as error:
            _say_once(f"This output cannot be shown: {error}")
            return torch.full_like(rgb, 0.5)

    return safely

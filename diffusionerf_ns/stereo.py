"""Depth of the training images by plane-sweep stereo (`sweep`), kept only where several views agree.

A coarse sweep finds where the scene lies, and a fine one what can be matched there. What it leaves is completed
(`completion`), which tells roughly where a surface is and how it slants; so the images are matched again along the
completed depth, a few times, and much more of them is found. Where that stays silent, completed depth remains.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.cameras.rays import RayBundle
from torch import Tensor
from torch.nn import functional as F

from diffusionerf_ns import completion, overlap
from diffusionerf_ns.cross_check import check_completed
from diffusionerf_ns.sweep import agreed_depth
from diffusionerf_ns.views import MatchedView, View
from diffusionerf_ns.visibility import Projections

COARSE_WIDTH, COARSE_STEP = 160, 2.5  # pixels: the sweep that finds where the scene lies
WIDTH, STEP = 256, 0.5  # pixels: the sweep whose depth is used
DISTANT = (10.0, 400.0)  # largest distances of the cameras: where a scene is looked for that is not found nearer
DISTANT_STEP = 0.25  # pixels of images of `WIDTH`: they tell such movements apart, if not well
COARSE_VIEWS, FINE_VIEWS = 12, 32  # of more, those that are far from one another; the others' depth stays unknown
ENOUGH_AGREE = 0.25  # of the pixels: where the coarse sweep finds less, it is tried from nearer by as well
CLEARLY_MORE = 1.25  # times as many: where both see the scene the nearer sweep finds less
SCENE_QUANTILES = (0.03, 0.5, 0.97)  # of depth, between which the fine sweep looks, with some room around them
MIN_MATCHES = 200  # pixels of all views: nothing can be made of less
CHANCE = 0.02  # of the pixels: unrelated photographs had up to .013 "matched", captures with sound poses .06 and more
AGAIN = 2  # times that the images are matched along completed depth
AROUND = (0.7, 1.45)  # of completed depth, between which it is looked for


@dataclass(frozen=True)
class MatchedDepth:
    """Pixels of the training images whose depth several views agree on."""

    view: Int[Tensor, " n"]
    """Index of the image."""
    pixel: Float[Tensor, "n 2"]
    """Continuous (u, v) in the image, the centre of its first pixel at (0.5, 0.5)."""
    depth: Float[Tensor, " n"]
    """Planar depth, scene units."""
    completed: completion.DepthMaps | None = None
    """Planar depth of all pixels of each image, completed where it is not matched, scene units; 0 where another
    image contradicts it, together or each completed alone, outside masks, and in images of which nothing is matched."""
    share: float = 0.0
    """Of the pixels that were tried, inside masks, those that are matched without a guess of their depth."""

    @classmethod
    def nothing(cls) -> "MatchedDepth":
        """Of images that agree on nothing, or on so little that it may be chance."""
        return cls(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 2), torch.zeros(0))

    def __len__(self) -> int:
        return len(self.depth)

    def near_far(self, cameras: Cameras) -> tuple[float, float]:
        """Quantiles .02 and .98 of depth, scene units; what they would leave out, as a close-up or a small near object
        (`overlap.near_end`), counts as well."""
        near, far = map(float, np.quantile(self.depth.numpy(), [0.02, 0.98]))
        near = overlap.near_end(near, self.depth)
        points = self._some_points(cameras).cpu()
        frusta = Projections(cameras.to("cpu"))
        own: list[list[float] | None] = []
        for index in range(len(frusta)):
            _, z, inside = frusta(index, points)
            z = z[inside].numpy()
            own.append(np.quantile(z, [0.02, 0.98]).tolist() if len(z) >= MIN_MATCHES else None)
        ranges = overlap.widened(near, far, own)
        return min(low for low, _ in ranges), max(high for _, high in ranges)

    def median_disparity(self) -> float:
        """1 / median depth, in 1 / scene units."""
        return float(1.0 / self.depth.median())

    def rays(self, cameras: Cameras, chosen: Int[Tensor, " k"]) -> tuple[RayBundle, Float[Tensor, " k"]]:
        """Rays through some of the pixels, and the distance along each to its surface in scene units."""
        bundle = cameras.generate_rays(
            camera_indices=self.view[chosen][:, None].to(cameras.device),
            coords=self.pixel[chosen].flip(-1).to(cameras.device),
        )
        bundle.metadata = {"directions_norm": bundle.metadata["directions_norm"]}
        return bundle, self.depth[chosen].to(cameras.device) * bundle.metadata["directions_norm"][:, 0]

    def _some_points(self, cameras: Cameras) -> Float[Tensor, "k 3"]:
        """Up to 20,000 of the surface points, spread evenly over the pixels."""
        bundle, distance = self.rays(cameras, torch.linspace(0, len(self) - 1, min(len(self), 20_000)).long())
        return bundle.origins + bundle.directions * distance[:, None]

    def content_cube(self, cameras: Cameras, share: float = 0.8) -> tuple[tuple[float, float, float], float]:
        """Centre and half side, scene units, of the cube about the median point that holds ``share`` of the points."""
        points = self._some_points(cameras)
        centre = points.median(dim=0).values
        radius = (points - centre).abs().amax(dim=1).quantile(share)
        return (float(centre[0]), float(centre[1]), float(centre[2])), max(float(radius), 1e-6)


@dataclass(frozen=True)
class _Scene:
    """Where a scene lies, as the coarse sweep found it."""

    points: Float[Tensor, "k 3"]
    """Of its surfaces, in the world."""
    step: float
    """Pixels of the sweep that can tell its depths apart."""
    near: float
    middle: float
    far: float
    """Quantiles `SCENE_QUANTILES` of planar depth in all views, scene units; near by `overlap.near_end`."""


@torch.no_grad()
def match(
    cameras: Cameras,
    images: Sequence[UInt8[np.ndarray, "_h _w 3"]],
    masks: Sequence[Bool[Tensor, "_h _w"] | None],
    complete: completion.Completer = completion.BY_MEMBRANE,
    guess: completion.Completer | None = None,
) -> MatchedDepth:
    """Depth of all training images as far as they tell it, with no bounds given.

    A coarse sweep over all depths that the baseline can tell apart finds where the scene lies; a fine one sweeps there,
    and others along the depth that is completed from what was found so far. Of more than `FINE_VIEWS` images, so many
    that are far from one another are matched.

    Args:
        cameras: of the images, perspective, in scene units.
        images: RGB.
        masks: of each image, the pixels that belong to the scene; None: all.
        complete: gives the depth of all pixels from that of those that are matched.
        guess: the same, as it is used in between: quickly, each view for itself. None: as ``complete``.
    """
    centres = cameras.camera_to_worlds[:, :, 3].float().cpu()
    distance = torch.cdist(centres, centres)
    if float(distance.max()) <= 0.0:
        return MatchedDepth.nothing()
    scene = _locate_scene(cameras, images, masks, distance, overlap.farthest_point_sampling(centres, COARSE_VIEWS))
    if scene is None:
        return MatchedDepth.nothing()
    chosen = overlap.farthest_point_sampling(centres, FINE_VIEWS)
    matched = _match_fine(cameras, images, masks, scene, distance, chosen)
    count = sum(int((view.depth > 0).sum()) for view in matched)
    if count < MIN_MATCHES:
        return MatchedDepth.nothing()
    share = _share_inside([m.depth for m in matched], [m.mask for m in matched])
    for _ in range(AGAIN if share >= CHANCE else 0):
        matched = _match_along(guess or complete, matched)
    parts = []
    for index, depth in zip(chosen, (view.depth for view in matched)):
        v, u = torch.nonzero(depth > 0, as_tuple=True)
        height, width = images[index].shape[:2]
        ratio = torch.tensor([width / depth.shape[1], height / depth.shape[0]])
        pixel = (torch.stack([u, v], dim=-1) + 0.5) * ratio
        parts.append((torch.full_like(u, index), pixel, depth[v, u]))
    view, pixel, z = (torch.cat(column) for column in zip(*parts))
    return MatchedDepth(view, pixel, z, _complete_and_check(matched, chosen, len(images), complete), share)


def _locate_scene(
    cameras: Cameras,
    images: Sequence[UInt8[np.ndarray, "_h _w 3"]],
    masks: Sequence[Bool[Tensor, "_h _w"] | None],
    distance: Float[Tensor, "n n"],
    chosen: Sequence[int],
) -> _Scene | None:
    """What the coarse sweep of the chosen images finds, inside the masks if that is enough; None for next to nothing.

    Args:
        distance: of the cameras of all images.
    """
    distance, step = distance[chosen][:, chosen], STEP
    views = [View.taken_by(cameras, i, images[i], COARSE_WIDTH) for i in chosen]
    depths = _coarse_depth(views, distance)
    small = [_small_mask(masks[i], d.shape) for i, d in zip(chosen, depths)]
    if _share_inside(depths, small) < CHANCE:
        large = [View.taken_by(cameras, i, images[i], WIDTH) for i in chosen]
        distant = _distant_depth(large, distance)
        small_of_large = [_small_mask(masks[i], d.shape) for i, d in zip(chosen, distant)]
        if _share_inside(distant, small_of_large) >= CHANCE:
            views, depths, small, step = large, distant, small_of_large, 0.5 * DISTANT_STEP
    inside = [_inside(d, mask) for d, mask in zip(depths, small)]
    if sum(int((d > 0).sum()) for d in inside) >= MIN_MATCHES:
        depths = inside
    found = torch.cat([d[d > 0] for d in depths])
    if len(found) < MIN_MATCHES:
        return None
    near, middle, far = map(float, np.quantile(found.numpy(), SCENE_QUANTILES))
    islands = [completion.without_speckle(d) for d in depths]
    near = overlap.near_end(near, torch.cat([d[d > 0] for d in islands]))
    return _Scene(overlap.points_of(views, depths), step, near, middle, far)


def _match_fine(
    cameras: Cameras,
    images: Sequence[UInt8[np.ndarray, "_h _w 3"]],
    masks: Sequence[Bool[Tensor, "_h _w"] | None],
    scene: _Scene,
    distance: Float[Tensor, "n n"],
    chosen: Sequence[int],
) -> list[MatchedView]:
    """The chosen images with the depth that the fine sweep finds of them, inside their masks and without speckle.

    Args:
        distance: of the cameras of all images.
    """
    views = [View.taken_by(cameras, i, images[i], WIDTH) for i in chosen]
    own = overlap.depth_quantiles(views, scene.points, SCENE_QUANTILES)
    ranges = overlap.widened(scene.near, scene.far, own)
    same_place = overlap.SAME_PLACE * float(distance.max())
    least = [max(same_place, overlap.LEAST_BASELINE * (q[1] if q else scene.middle)) for q in own]
    nearest = overlap.neighbours(distance[chosen][:, chosen], least)
    ends = [(overlap.BEFORE * low, overlap.BEHIND * high) for low, high in ranges]
    depths = agreed_depth(views, nearest, ends, scene.step)
    matched = []
    for index, view, depth, others in zip(chosen, views, depths, nearest):
        mask = _small_mask(masks[index], depth.shape)
        depth = completion.without_speckle(_inside(depth, mask))
        rgb = _small_rgb(images[index], depth.shape)
        matched.append(MatchedView(view=view, rgb=rgb, depth=depth, mask=mask, nearest=others))
    return matched


def _match_along(guess: completion.Completer, matched: list[MatchedView]) -> list[MatchedView]:
    """The views with what is found of them along guessed depth, beside what was."""
    guesses = [found.alone for found in guess(matched)]
    known = [view.depth for view in matched]
    nearest = [list(view.nearest) for view in matched]
    depths = agreed_depth([v.view for v in matched], nearest, [AROUND] * len(matched), STEP, guesses, known)
    more = []
    for view, depth in zip(matched, depths):
        found = completion.without_speckle(_inside(depth, view.mask))
        more.append(replace(view, depth=torch.where(view.depth > 0, view.depth, found)))
    return more


def _complete_and_check(
    matched: list[MatchedView], chosen: Sequence[int], count: int, complete: completion.Completer
) -> completion.DepthMaps:
    """Completed depth without what another image contradicts, of so many images; unknown of those not chosen."""
    completed = complete(matched)
    views, nearest = [view.view for view in matched], [list(view.nearest) for view in matched]
    kept, sure = check_completed(views, nearest, [_inside(c.depth, view.mask) for c, view in zip(completed, matched)])
    kept_first, sure_first = check_completed(
        views, nearest, [_inside(c.alone, view.mask) for c, view in zip(completed, matched)]
    )
    # What was contradicted at first was brought to agree, and is often wrong all the same.
    kept = [torch.where(before > 0, now, 0.0) for now, before in zip(kept, kept_first)]
    sure = [now & before for now, before in zip(sure, sure_first)]
    maps = {i: (kept[k], sure[k], completed[k].error) for k, i in enumerate(chosen)}
    unknown = torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.bool), torch.full((1, 1), torch.inf)
    columns = zip(*(maps.get(i, unknown) for i in range(count)))
    return completion.DepthMaps.of(*map(list, columns))


def _coarse_depth(views: list[View], distance: Float[Tensor, "n n"]) -> list[Float[Tensor, "_h _w"]]:
    """Agreed depth of a sweep over all depths that the cameras' distances can tell apart.

    It begins at half of the largest distance, before which cameras that look the same way see different things. On a
    ring about an object that is its centre, and a single distant camera moves it behind everything: where little is
    found, each view is swept from half of the distance to its nearest neighbour as well, and what finds more wins.
    """
    baseline = float(distance.max())
    nearest = overlap.neighbours(distance, [overlap.SAME_PLACE * baseline] * len(views))
    depths = agreed_depth(views, nearest, [(0.5 * baseline, 50.0 * baseline)] * len(views), COARSE_STEP)
    if _share_known(depths) >= ENOUGH_AGREE:
        return depths
    begins = [0.5 * min(float(distance[i, j]) for j in others) for i, others in enumerate(nearest)]
    if min(begins) > 0.4 * baseline:
        return depths
    nearer = agreed_depth(views, nearest, [(begin, 50.0 * baseline) for begin in begins], COARSE_STEP)
    return nearer if _share_known(nearer) > CLEARLY_MORE * _share_known(depths) else depths


def _distant_depth(views: list[View], distance: Float[Tensor, "n n"]) -> list[Float[Tensor, "_h _w"]]:
    """Agreed depth of a sweep over depths at which the scene hardly moves from camera to camera."""
    baseline = float(distance.max())
    nearest = overlap.neighbours(distance, [overlap.SAME_PLACE * baseline] * len(views))
    near, far = DISTANT
    return agreed_depth(views, nearest, [(near * baseline, far * baseline)] * len(views), DISTANT_STEP)


def _share_known(depths: Sequence[Float[Tensor, "_h _w"]]) -> float:
    return sum(int((depth > 0).sum()) for depth in depths) / sum(depth.numel() for depth in depths)


def _share_inside(depths: Sequence[Float[Tensor, "_h _w"]], masks: Sequence[Bool[Tensor, "_h _w"] | None]) -> float:
    """Share of the pixels inside masks whose depth is known."""
    known = sum(int((_inside(depth, mask) > 0).sum()) for depth, mask in zip(depths, masks))
    return known / max(sum(d.numel() if m is None else int(m.sum()) for d, m in zip(depths, masks)), 1)


def _small_mask(mask: Bool[Tensor, "_h _w"] | None, size: torch.Size) -> Bool[Tensor, "h w"] | None:
    if mask is None:
        return None
    return F.interpolate(mask[None, None].float(), size=size, mode="nearest")[0, 0] > 0


def _inside(depth: Float[Tensor, "h w"], mask: Bool[Tensor, "h w"] | None) -> Float[Tensor, "h w"]:
    """Depth inside the mask; 0 elsewhere."""
    return depth if mask is None else torch.where(mask, depth, 0.0)


def _small_rgb(image: UInt8[np.ndarray, "_h _w 3"], size: torch.Size) -> Float[Tensor, "h w 3"]:
    rgb = torch.from_numpy(image).float().permute(2, 0, 1)[None] / 255.0
    return F.interpolate(rgb, size=size, mode="area")[0].permute(1, 2, 0)

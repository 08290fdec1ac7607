"""Sparse points of a capture: features matched between views whose poses are known, and triangulated.

A few hundred points are enough to say where the scene begins and how deep it lies, on any capture, without a structure
from motion file. Feature detection and matching are OpenCV's (a dependency of nerfstudio).

Notation
    c2w     camera-to-world, OpenGL convention      [3, 4]
    ray     unit direction of a feature, world      [n, 3]
    z       planar depth in a view, scene units     [n]
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.cameras.rays import RayBundle
from torch import Tensor

MAX_FEATURES = 4000  # per image; matching is quadratic in it
RATIO = 0.8  # Lowe's ratio test
NEIGHBOURS = 6  # views that a view is matched with, the nearest ones: work stays linear in the number of views
MAX_ERROR = 2.0  # pixels of an image 1,000 pixels wide: reprojection error of a kept point
MIN_POINTS = 20  # fewer are too few for a quantile
MIN_ANGLE = 0.02  # radians between the two rays: with less, depth is noise


@dataclass(frozen=True)
class SparsePoints:
    """Triangulated points, each with the two observations that it comes from."""

    xyz: Float[np.ndarray, "n 3"]
    """Positions in scene units."""
    views: Int[np.ndarray, "n 2"]
    """Indices of the two views."""
    depth: Float[np.ndarray, "n 2"]
    """Planar depth in each of the two views, scene units."""
    pixels: Float[np.ndarray, "n 2 2"]
    """Continuous (u, v) of the feature in each of the two views, the centre of the first pixel at (0.5, 0.5)."""

    def __len__(self) -> int:
        return len(self.xyz)


def triangulate(cameras: Cameras, images: list[UInt8[np.ndarray, "_h _w 3"]]) -> SparsePoints:
    """Match features between all pairs of views and keep what agrees with the poses.

    Args:
        cameras: of the images, in scene units.
        images: RGB.
    """
    features = [_features(image) for image in images]
    parts = []
    for first, second in _pairs(cameras.camera_to_worlds[..., 3].cpu().numpy()):
        pairs = _match(features[first][1], features[second][1])
        if len(pairs) == 0:
            continue
        pixels = np.stack([features[first][0][pairs[:, 0]], features[second][0][pairs[:, 1]]], axis=1)
        parts.append(_triangulate_pair(cameras, (first, second), pixels))
    if not parts:
        return SparsePoints(np.zeros((0, 3)), np.zeros((0, 2), np.int64), np.zeros((0, 2)), np.zeros((0, 2, 2)))
    xyz, views, depth, pixels = (np.concatenate([part[i] for part in parts]) for i in range(4))
    return SparsePoints(xyz, views, depth, pixels)


def _pairs(centres: Float[np.ndarray, "n 3"]) -> list[tuple[int, int]]:
    """Each view with its nearest others, each pair once."""
    distance = np.linalg.norm(centres[:, None] - centres[None], axis=-1)
    nearest = distance.argsort(axis=1, kind="stable")[:, 1 : NEIGHBOURS + 1]
    return sorted({(min(i, j), max(i, j)) for i, row in enumerate(nearest.tolist()) for j in row if i != j})


def _features(image: UInt8[np.ndarray, "h w 3"]) -> tuple[Float[np.ndarray, "n 2"], Float[np.ndarray, "n d"]]:
    """Positions (u, v) and root-SIFT descriptors."""
    import cv2  # slow to import

    detector = cv2.SIFT_create(nfeatures=MAX_FEATURES, contrastThreshold=0.02)  # pyright: ignore
    keypoints, descriptors = detector.detectAndCompute(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), None)
    if descriptors is None or len(keypoints) == 0:
        return np.zeros((0, 2)), np.zeros((0, 128), np.float32)
    descriptors = np.sqrt(descriptors / np.maximum(descriptors.sum(1, keepdims=True), 1e-9))
    # OpenCV counts from the centre of the first pixel.
    return np.array([k.pt for k in keypoints]) + 0.5, descriptors.astype(np.float32)


def _match(first: Float[np.ndarray, "n d"], second: Float[np.ndarray, "m d"]) -> Int[np.ndarray, "k 2"]:
    """Mutual nearest neighbours that pass the ratio test."""
    if len(first) < 2 or len(second) < 2:
        return np.zeros((0, 2), np.int64)
    similarity = torch.from_numpy(first) @ torch.from_numpy(second).T  # root-SIFT has unit length
    best = similarity.topk(2, dim=1)
    distance = (2.0 - 2.0 * best.values).clamp_min(0.0).sqrt()
    back = similarity.argmax(dim=0)
    index = torch.arange(len(first))
    keep = (distance[:, 0] < RATIO * distance[:, 1]) & (back[best.indices[:, 0]] == index)
    return torch.stack([index[keep], best.indices[keep, 0]], dim=1).numpy()


def _triangulate_pair(
    cameras: Cameras, views: tuple[int, int], pixels: Float[np.ndarray, "n 2 2"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Midpoint of the two rays where they nearly meet in front of both cameras at a large enough angle."""
    origins, rays = zip(*(_rays(cameras, view, pixels[:, i]) for i, view in enumerate(views)))
    cosine = (rays[0] * rays[1]).sum(-1)
    baseline = origins[1] - origins[0]
    # Nearest points of two lines: with unit directions d0, d1 and c = d0.d1, a = d0.b, e = d1.b.
    a, e = (rays[0] * baseline).sum(-1), (rays[1] * baseline).sum(-1)
    denominator = np.maximum(1.0 - cosine**2, 1e-12)
    t0, t1 = (a - cosine * e) / denominator, (cosine * a - e) / denominator
    points = 0.5 * (origins[0] + t0[:, None] * rays[0] + origins[1] + t1[:, None] * rays[1])
    depth, error = [], []
    for i, view in enumerate(views):
        z, projected = _project(cameras, view, points)
        depth.append(z)
        width = float(cameras.width[view])
        direction_pixels = _project(cameras, view, origins[i] + rays[i])[1]  # undistorted position of the feature
        error.append(np.linalg.norm(projected - direction_pixels, axis=-1) * 1000.0 / width)
    keep = (
        (t0 > 0)
        & (t1 > 0)
        & (np.minimum(*depth) > 0)
        & (np.maximum(*error) < MAX_ERROR)
        & (np.arccos(np.clip(cosine, -1.0, 1.0)) > MIN_ANGLE)
    )
    count = int(keep.sum())
    return points[keep], np.tile(np.array(views), (count, 1)), np.stack(depth, -1)[keep], pixels[keep]


def _rays(
    cameras: Cameras, view: int, pixels: Float[np.ndarray, "n 2"]
) -> tuple[Float[np.ndarray, "3"], Float[np.ndarray, "n 3"]]:
    """Camera centre and unit world directions, lens distortion undone as nerfstudio does it."""
    coords = torch.from_numpy(pixels[:, ::-1].copy()).float().to(cameras.device)
    bundle = cameras.generate_rays(
        camera_indices=torch.full((len(pixels), 1), view, device=cameras.device, dtype=torch.int64), coords=coords
    )
    centre = cameras.camera_to_worlds[view, :, 3].double().cpu().numpy()
    return centre, bundle.directions.double().cpu().numpy()


def _project(
    cameras: Cameras, view: int, points: Float[np.ndarray, "n 3"]
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, "n 2"]]:
    """Planar depth and undistorted pixel position of world points."""
    c2w = cameras.camera_to_worlds[view].double().cpu().numpy()
    local = (points - c2w[:, 3]) @ c2w[:, :3]
    z = -local[:, 2]
    focal = np.array([float(cameras.fx[view]), -float(cameras.fy[view])])
    centre = np.array([float(cameras.cx[view]), float(cameras.cy[view])])
    safe = np.where(np.abs(z) < 1e-9, 1e-9, z)[:, None]
    return z, local[:, :2] / safe * focal + centre


@dataclass(frozen=True)
class SparseRays:
    """The rays of all observations of sparse points."""

    bundle: RayBundle
    """[2 n] rays through the features; ``metadata["directions_norm"]`` is 1 / cosine to the optical axis."""
    distance: Float[Tensor, " rays"]
    """Distance along each ray to its point, scene units."""


def rays_of(points: SparsePoints, cameras: Cameras) -> SparseRays:
    """One ray for each of the two observations of each point."""
    views = torch.from_numpy(points.views.reshape(-1))
    coords = torch.from_numpy(points.pixels.reshape(-1, 2)[:, ::-1].copy()).float()
    bundle = cameras.generate_rays(camera_indices=views[:, None].to(cameras.device), coords=coords.to(cameras.device))
    bundle.metadata = {"directions_norm": bundle.metadata["directions_norm"]}
    xyz = torch.from_numpy(points.xyz).float().repeat_interleave(2, dim=0).to(bundle.origins)
    return SparseRays(bundle, (xyz - bundle.origins).norm(dim=-1))


def depth_statistics(points: SparsePoints) -> tuple[float, float, float]:
    """Near bound, far bound and median disparity of the points: quantiles .02 and .98 of depth, and 1 / median depth.

    Raises:
        ValueError: fewer than `MIN_POINTS` points.
    """
    if len(points) < MIN_POINTS:
        raise ValueError(f"{len(points)} points are too few for depth statistics; at least {MIN_POINTS} are needed.")
    depth = points.depth.reshape(-1)
    near, far = np.quantile(depth, [0.02, 0.98])
    return float(near), float(far), float(1.0 / np.median(depth))

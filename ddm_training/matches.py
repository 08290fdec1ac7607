"""Made-up stereo matches of a stored frame: what few views would know of its depth, mistakes included.

A network that completes depth (`completion`) has to know what stereo tells and what it does not. Matching real images
for each training sample would need several views of every scene and seconds of time; this takes milliseconds and any
RGBD frame. Known is what has texture along the baseline, is seen by another camera, and is not in one of the holes that
real matching has for no visible reason; wrong are the borders of near objects, which windows fatten, and a few patches.

Notation
    z      planar depth, metres                                          [h, w]
    q      inverse depth 1/z                                             [h, w]
    phi    direction of the baseline in the image, mostly horizontal
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage

LEAST_PIXELS = 8  # of an island of matches that is believed; `diffusionerf_ns.completion` asks for 30 at twice the size


@dataclass(frozen=True, kw_only=True)
class MatchConfig:
    """Ranges of what is drawn for each frame. Two numbers are the ends of a range."""

    baseline: tuple[float, float] = (0.06, 0.6)
    """Distance of the other camera as a share of the median depth; log-uniform."""
    second_view: float = 0.6
    """Share of frames with a second other camera."""
    contrast: tuple[float, float] = (5e-5, 3e-3)
    """Squared change of grey, in [0, 1], from pixel to pixel that is matched in half of the cases; log-uniform."""
    holes: float = 0.6
    """Largest share of the matches that is lost to holes."""
    pixel_noise: float = 0.012
    """Largest relative deviation of depth from pixel to pixel."""
    smooth_noise: float = 0.02
    """Largest relative deviation of depth that changes slowly."""
    fattening: float = 0.8
    """Share of frames whose near surfaces are up to two pixels too wide."""
    wrong_patches: tuple[float, ...] = (0.0, 1.5, 5.0)
    """Mean number of patches that are matched wrongly; one of these."""


def smooth_field(rng: np.random.Generator, height: int, width: int, cells: int) -> Float[np.ndarray, "h w"]:
    """Random values of deviation about 1 that change over `width / cells` pixels."""
    rows = max(2, round(cells * height / width))
    small = rng.standard_normal((rows, cells)).astype(np.float32)
    return np.asarray(ndimage.zoom(small, (height / rows, width / cells), order=1, grid_mode=True, mode="nearest"))


def seen_from(
    z: Float[np.ndarray, "h w"], focal: float, position: Float[np.ndarray, " 3"], target: Float[np.ndarray, " 3"]
) -> Bool[np.ndarray, "h w"]:
    """Which pixels' points a second camera sees too: inside its image, and not hidden there by others of them.

    Args:
        z: planar depth, metres.
        focal: of both cameras, pixels.
        position: of the second camera, metres, in the axes of the first (right, down, forward).
        target: point that the second camera looks at.
    """
    height, width = z.shape
    forward = target - position
    forward = forward / np.linalg.norm(forward)
    right = np.cross([0.0, 1.0, 0.0], forward)
    right = right / np.linalg.norm(right)
    rotation = np.stack([right, np.cross(forward, right), forward]).astype(np.float32)
    v, u = np.mgrid[:height, :width].astype(np.float32) + np.float32(0.5)
    points = np.stack([(u - width / 2) / focal * z, (v - height / 2) / focal * z, z], axis=-1)
    local = (points - position.astype(np.float32)) @ rotation.T
    depth = local[..., 2]
    visible = depth > 0.05 * np.median(z)
    safe = np.where(visible, depth, 1.0)
    column = np.floor(local[..., 0] / safe * focal + width / 2).astype(int)
    row = np.floor(local[..., 1] / safe * focal + height / 2).astype(int)
    visible &= (column >= 0) & (column < width) & (row >= 0) & (row < height)
    pixel, reached = (row * width + column)[visible], depth[visible]
    nearest = np.full(height * width, np.inf, np.float32)
    np.minimum.at(nearest, pixel, reached)
    nearest = ndimage.minimum_filter(nearest.reshape(height, width), 2).ravel()  # points are less dense than pixels
    seen = np.zeros((height, width), bool)
    seen[visible] = reached < 1.05 * nearest[pixel]
    return seen


def _other_view(rng: np.random.Generator, z: Float[np.ndarray, "h w"], focal: float, phi: float, config: MatchConfig):
    """What a random second camera to the side `phi` sees."""
    middle = float(np.median(z))
    low, high = np.log(config.baseline)
    length = middle * np.exp(rng.uniform(low, high))
    position = length * np.array([np.cos(phi), np.sin(phi), rng.normal(0.0, 0.15)])
    return seen_from(z, focal, position, np.array([0.0, 0.0, middle * np.exp(rng.normal(0.0, 0.2))]))


def _textured(
    rng: np.random.Generator, grey: Float[np.ndarray, "h w"], phi: float, config: MatchConfig
) -> Bool[np.ndarray, "h w"]:
    """Where the image changes along the baseline; edges along it tell nothing of depth, as is true of real ones."""
    height, width = grey.shape
    down, right = np.gradient(grey)
    isotropy = rng.uniform(0.0, 0.3)
    along = np.cos(phi) * right + np.sin(phi) * down
    energy = (1.0 - isotropy) * along**2 + isotropy * (right**2 + down**2)
    energy = ndimage.uniform_filter(energy, 3 if width <= 160 else 5)
    low, high = np.log(config.contrast)
    chance = energy / (energy + np.exp(rng.uniform(low, high)))
    chance = ndimage.gaussian_filter(chance, rng.uniform(0.5, 1.5))
    chance += 0.25 * smooth_field(rng, height, width, 40) + 0.15 * smooth_field(rng, height, width, 8)
    return chance > 0.5


def _add_wrong_patches(
    rng: np.random.Generator,
    q: Float[np.ndarray, "h w"],
    known: Bool[np.ndarray, "h w"],
    valid: Bool[np.ndarray, "h w"],
    config: MatchConfig,
) -> tuple[Float[np.ndarray, "h w"], Bool[np.ndarray, "h w"]]:
    """Ellipses near matches at a depth that is not theirs: a neighbour's, or any."""
    height, width = q.shape
    rows, columns = np.nonzero(known)
    v, u = np.mgrid[:height, :width]
    for _ in range(rng.poisson(rng.choice(config.wrong_patches)) if len(rows) else 0):
        near = rng.integers(len(rows))
        y, x = rows[near] + rng.normal(0, 8) - v, columns[near] + rng.normal(0, 8) - u
        a, b = np.exp(rng.uniform(np.log(1.5), np.log(6.0), 2))
        angle = rng.uniform(0, np.pi)
        cos, sin = np.cos(angle), np.sin(angle)
        patch = ((x * cos + y * sin) / a) ** 2 + ((y * cos - x * sin) / b) ** 2 < 1
        if not patch.any():
            continue
        neighbour = rng.random() < 0.6
        value = q[rows[near], columns[near]] if neighbour else np.median(q[patch]) * np.exp(rng.normal(0, 0.4))
        q = np.where(patch, value * np.exp(0.01 * rng.standard_normal(q.shape)), q)
        known = known | (patch & valid & (rng.random(q.shape) < 0.9))
    return q, known


def without_islands(known: Bool[np.ndarray, "h w"], least: int = LEAST_PIXELS) -> Bool[np.ndarray, "h w"]:
    """Connected matches that are at least so many."""
    islands: np.ndarray = ndimage.label(known, np.ones((3, 3)))[0]  # pyright: ignore
    return known & (np.bincount(islands.ravel())[islands] >= least)


def draw_matches(
    rng: np.random.Generator,
    rgb: Float[np.ndarray, "3 h w"],
    z: Float[np.ndarray, "h w"],
    valid: Bool[np.ndarray, "h w"],
    focal: float,
    config: MatchConfig = MatchConfig(),
) -> Float[np.ndarray, "h w"]:
    """Depth that stereo of this frame and one or two others might find, metres; 0 where it would find none.

    Args:
        rng: all that is random.
        rgb: colours in [0, 1].
        z: planar depth, metres, filled where it is not valid.
        valid: where depth was measured.
        focal: in pixels.
        config: ranges of what is drawn.
    """
    height, width = z.shape
    phi = rng.normal(0.0, 0.35) + np.pi * (rng.random() < 0.5)
    known = _textured(rng, rgb.mean(axis=0), phi, config)
    seen = _other_view(rng, z, focal, phi, config)
    if rng.random() < config.second_view:
        seen |= _other_view(rng, z, focal, phi + np.pi * (rng.random() < 0.7) + rng.normal(0.0, 0.3), config)
    known &= seen & valid
    field = smooth_field(rng, height, width, int(rng.integers(3, 12)))
    known &= field > np.quantile(field, rng.uniform(0.0, config.holes))

    q = 1.0 / z
    if rng.random() < config.fattening:
        q = ndimage.maximum_filter(q, int(rng.integers(1, 4)))
    noise = rng.uniform(0.0, config.pixel_noise) * rng.standard_normal(q.shape)
    noise += rng.uniform(0.0, config.smooth_noise) * smooth_field(rng, height, width, 12)
    q, known = _add_wrong_patches(rng, q * np.exp(noise), known, valid, config)
    return np.where(without_islands(known), 1.0 / q, 0.0).astype(np.float32)

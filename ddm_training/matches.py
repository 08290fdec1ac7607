"""Made-up stereo matches of stored frames: what few views would know of their depth, mistakes included.

A network that completes depth (`completion`) has to know what stereo tells and what it does not. Matching real images
for each training sample would need several views of every scene and seconds of time; this takes a batch of RGBD frames
on the device of the training. Known is what has texture along the baseline, is seen by another camera, and is not in
one of the holes that real matching has for no visible reason; wrong are the borders of near objects, which windows
fatten, and a few patches.

All that is random comes from one generator of the device. Nothing waits for the device.

Notation
    z      planar depth, metres                                          [b, h, w]
    q      inverse depth 1/z                                             [b, h, w]
    phi    direction of the baseline in the image, mostly horizontal     [b, 1, 1]
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor
from torch.nn import functional as F

LEAST_PIXELS = 8  # of an island of matches that is believed; `diffusionerf_ns.completion` asks for 30 at twice the size
MOST_PATCHES = 16  # that are matched wrongly in one frame: one in 150,000 would have more
PATCH_AXES = (1.5, 6.0)  # pixels from their centre to their border


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


def uniform(g: Generator, low: float, high: float, *shape: int) -> Float[Tensor, "..."]:
    """Uniform in [low, high)."""
    return low + (high - low) * torch.rand(shape, generator=g, device=g.device)


def log_uniform(g: Generator, low: float, high: float, *shape: int) -> Float[Tensor, "..."]:
    """Between low and high, each factor as likely."""
    return uniform(g, math.log(low), math.log(high), *shape).exp()


def normal(g: Generator, deviation: float, *shape: int) -> Float[Tensor, "..."]:
    """Normal about 0."""
    return deviation * torch.randn(shape, generator=g, device=g.device)


def happens(g: Generator, probability: float, *shape: int) -> Bool[Tensor, "..."]:
    """True with this probability."""
    return torch.rand(shape, generator=g, device=g.device) < probability


def smooth_field(g: Generator, count: int, height: int, width: int, cells: int) -> Float[Tensor, "count height width"]:
    """Random values of deviation about 1 that change over `width / cells` pixels."""
    small = normal(g, 1.0, count, 1, max(2, round(cells * height / width)), cells)
    return F.interpolate(small, size=(height, width), mode="bilinear", align_corners=False)[:, 0]


def mixed_field(
    g: Generator, count: int, height: int, width: int, cells: tuple[int, int]
) -> Float[Tensor, "count height width"]:
    """Smooth fields with a number of cells of their own each, low ... high - 1."""
    low, high = cells
    columns = torch.randint(low, high, (count, 1), generator=g, device=g.device).float()
    rows = (columns * height / width).round().clamp_min(2.0)
    size = max(2, round((high - 1) * height / width)), high - 1
    small = normal(g, 1.0, count, 1, *size)
    x, y = (
        (((torch.arange(side, device=g.device) + 0.5) / side * n - 0.5).clamp_min(0.0).minimum(n - 1)) * 2 / (most - 1)
        - 1
        for side, n, most in ((width, columns, size[1]), (height, rows, size[0]))
    )
    grid = torch.stack([x[:, None].expand(count, height, width), y[:, :, None].expand(count, height, width)], dim=-1)
    return F.grid_sample(small, grid, mode="bilinear", padding_mode="border", align_corners=True)[:, 0]


def largest_of_two(x: Float[Tensor, "b h w"]) -> Float[Tensor, "b h w"]:
    """Largest of each pixel and those left of, above, and left above it."""
    across = torch.cat([x[..., :1], torch.maximum(x[..., 1:], x[..., :-1])], dim=-1)
    return torch.cat([across[:, :1], torch.maximum(across[:, 1:], across[:, :-1])], dim=1)


def largest_of_three(x: Float[Tensor, "b h w"]) -> Float[Tensor, "b h w"]:
    """Largest of the 3 x 3 pixels about each."""  # on the CPU ten times as fast as `max_pool2d`
    x = F.pad(x, (1, 1, 1, 1), value=-torch.inf)
    x = torch.maximum(torch.maximum(x[..., :-2], x[..., 1:-1]), x[..., 2:])
    return torch.maximum(torch.maximum(x[..., :-2, :], x[..., 1:-1, :]), x[..., 2:, :])


def seen_from(
    z: Float[Tensor, "b h w"], focal: Float[Tensor, " b"], position: Float[Tensor, "b 3"], target: Float[Tensor, "b 3"]
) -> Bool[Tensor, "b h w"]:
    """Which pixels' points a second camera sees too: inside its image, and not hidden there by others of them.

    Args:
        z: planar depth, metres.
        focal: of both cameras, pixels.
        position: of the second camera, metres, in the axes of the first (right, down, forward).
        target: point that the second camera looks at.
    """
    count, height, width = z.shape
    forward = F.normalize(target - position, dim=1)
    right = F.normalize(torch.stack([forward[:, 2], torch.zeros_like(focal), -forward[:, 0]], dim=1), dim=1)
    rotation = torch.stack([right, torch.linalg.cross(forward, right), forward], dim=1)
    shift = (rotation @ position[:, :, None])[..., None]  # [b, 3, 1, 1]
    u = (torch.arange(width, device=z.device) + 0.5 - width / 2) / focal[:, None]
    v = (torch.arange(height, device=z.device) + 0.5 - height / 2) / focal[:, None]
    a, b, c = rotation[..., None].unbind(2)  # [b, 3, 1] each
    rays = (a * u[:, None])[:, :, None, :] + (b * v[:, None] + c)[..., None]
    x, y, depth = (rays * z[:, None] - shift).unbind(1)
    visible = depth > 0.05 * _median(z)
    scale = focal[:, None, None] / torch.where(visible, depth, 1.0)
    column, row = (x * scale + width / 2).floor(), (y * scale + height / 2).floor()
    visible &= (column >= 0) & (column < width) & (row >= 0) & (row < height)
    pixel = torch.where(visible, row * width + column, 0.0).long().flatten(1)
    reached = torch.where(visible, depth, torch.inf).flatten(1)
    nearest = z.new_full((count, height * width), torch.inf).scatter_reduce(1, pixel, reached, "amin")
    nearest = -largest_of_two(-nearest.view_as(z))  # points are less dense than pixels
    return visible & (reached < 1.05 * nearest.flatten(1).gather(1, pixel)).view_as(visible)


def _median(x: Float[Tensor, "b h w"]) -> Float[Tensor, "b 1 1"]:
    """Of every fourth pixel."""
    return x[:, ::2, ::2].flatten(1).median(dim=1).values[:, None, None]


def _other_view(
    g: Generator,
    z: Float[Tensor, "b h w"],
    focal: Float[Tensor, " b"],
    phi: Float[Tensor, "b 1 1"],
    config: MatchConfig,
) -> Bool[Tensor, "b h w"]:
    """What random second cameras to the side `phi` see."""
    count, middle, phi = len(z), _median(z).flatten(), phi.flatten()
    length = middle * log_uniform(g, *config.baseline, count)
    position = length[:, None] * torch.stack([phi.cos(), phi.sin(), normal(g, 0.15, count)], dim=1)
    ahead, beside = middle * normal(g, 0.2, count).exp(), torch.zeros_like(middle)
    return seen_from(z, focal, position, torch.stack([beside, beside, ahead], dim=1))


def _blurred(x: Float[Tensor, "b h w"], sigma: Float[Tensor, " b"]) -> Float[Tensor, "b h w"]:
    """Gaussian filter, of its own deviation up to 1.5 pixels for each image."""
    radius = 5
    weights = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=x.device) / sigma[:, None]).square())
    weights = (weights / weights.sum(dim=1, keepdim=True))[:, None, None]  # [b, 1, 1, n]
    x = F.pad(x[None], (radius, radius, radius, radius), mode="replicate")
    return F.conv2d(F.conv2d(x, weights, groups=len(sigma)), weights.transpose(2, 3), groups=len(sigma))[0]


def _textured(
    g: Generator, grey: Float[Tensor, "b h w"], phi: Float[Tensor, "b 1 1"], config: MatchConfig
) -> Bool[Tensor, "b h w"]:
    """Where the image changes along the baseline; edges along it tell nothing of depth, as is true of real ones."""
    count, height, width = grey.shape
    down, right = torch.gradient(grey, dim=(1, 2))
    isotropy = uniform(g, 0.0, 0.3, count, 1, 1)
    along = phi.cos() * right + phi.sin() * down
    energy = (1.0 - isotropy) * along.square() + isotropy * (right.square() + down.square())
    side = 1 if width <= 160 else 2
    energy = F.avg_pool2d(F.pad(energy[:, None], (side,) * 4, mode="replicate"), 2 * side + 1, stride=1)[:, 0]
    chance = energy / (energy + log_uniform(g, *config.contrast, count, 1, 1))
    chance = _blurred(chance, uniform(g, 0.5, 1.5, count))
    chance += 0.25 * smooth_field(g, count, height, width, 40) + 0.15 * smooth_field(g, count, height, width, 8)
    return chance > 0.5


def _without_holes(g: Generator, count: int, height: int, width: int, config: MatchConfig) -> Bool[Tensor, "b h w"]:
    """All but random areas of a random share."""
    field = mixed_field(g, count, height, width, (3, 12))
    ranked = field[:, ::4, ::4].flatten(1).sort(dim=1).values
    place = uniform(g, 0.0, config.holes, count, 1) * (ranked.shape[1] - 1)
    below, above = (ranked.gather(1, i.long()) for i in (place.floor(), place.ceil()))
    level = torch.where(place > 0, below + place.frac() * (above - below), -torch.inf)
    return field > level[..., None]


def _add_wrong_patches(
    g: Generator,
    q: Float[Tensor, "b h w"],
    known: Bool[Tensor, "b h w"],
    valid: Bool[Tensor, "b h w"],
    config: MatchConfig,
) -> tuple[Float[Tensor, "b h w"], Bool[Tensor, "b h w"]]:
    """Ellipses near matches at a depth that is not theirs: a neighbour's, or any. A later one covers those before."""
    (count, height, width), n = q.shape, MOST_PATCHES
    flat, pixels = q.flatten(1), height * width
    means = torch.tensor(config.wrong_patches, device=q.device)
    mean = means[torch.randint(len(means), (count, 1), generator=g, device=q.device)]
    order = torch.arange(1, n + 1, device=q.device)
    wanted = order <= torch.poisson(mean, generator=g)

    so_many = known.flatten(1).long().cumsum(1)  # the k-th match is where this becomes k
    k = (uniform(g, 0.0, 1.0, count, n) * so_many[:, -1:]).long() + 1
    near = torch.searchsorted(so_many, k).clamp_max(pixels - 1)
    wanted &= so_many[:, -1:] > 0

    y, x = near // width + normal(g, 8.0, count, n), near % width + normal(g, 8.0, count, n)
    reach = math.ceil(PATCH_AXES[1])
    v, u = torch.meshgrid(*[torch.arange(-reach, reach + 1, device=q.device)] * 2, indexing="ij")
    row, column = (c.round().long()[..., None] + d.flatten() for c, d in ((y, v), (x, u)))  # [b, n, window]
    a, b = log_uniform(g, *PATCH_AXES, count, n, 1), log_uniform(g, *PATCH_AXES, count, n, 1)
    angle = uniform(g, 0.0, math.pi, count, n, 1)
    dy, dx, cos, sin = y[..., None] - row, x[..., None] - column, angle.cos(), angle.sin()
    inside = ((dx * cos + dy * sin) / a).square() + ((dy * cos - dx * sin) / b).square() < 1
    inside &= (row >= 0) & (row < height) & (column >= 0) & (column < width) & wanted[..., None]
    index = torch.where(inside, row * width + column, pixels).flatten(1)  # one more pixel takes what lies outside

    under = torch.cat([flat, flat[:, :1]], dim=1).gather(1, index).view_as(inside)
    median = torch.where(inside, under, torch.nan).nanmedian(dim=2).values
    value = torch.where(happens(g, 0.6, count, n), flat.gather(1, near), median * normal(g, 0.4, count, n).exp())
    value = value[..., None] * normal(g, 0.01, *inside.shape).exp()
    found = inside & happens(g, 0.9, *inside.shape)

    order = order[None, :, None].expand_as(inside).flatten(1)
    last = order.new_zeros(count, pixels + 1).scatter_reduce(1, index, order, "amax")
    index_of_last = torch.where(last.gather(1, index) == order, index, pixels)
    q = torch.cat([flat, flat[:, :1]], dim=1).scatter(1, index_of_last, value.flatten(1))[:, :-1].view_as(q)
    matched = torch.zeros_like(last).scatter_reduce(1, index, found.flatten(1).long(), "amax")[:, :-1] > 0
    return q, known | (matched.view_as(valid) & valid)


def without_islands(known: Bool[Tensor, "b h w"], least: int = LEAST_PIXELS) -> Bool[Tensor, "b h w"]:
    """Connected matches, diagonals included, that are at least so many.

    Each takes the largest number among its neighbours `least` - 2 times, after which all of a smaller island have the
    same. Where few share a number and others are beside them, the island is larger.
    """
    count, pixels = len(known), known[0].numel()
    own = torch.arange(1, pixels + 1, device=known.device, dtype=torch.float32).view(1, *known.shape[1:]) * known
    label = own
    for _ in range(least - 2):
        label = largest_of_three(label) * known
    # The smallest number beside a match, itself included, is the largest of the negative ones.
    lowest = -largest_of_three(torch.where(known, -label, -torch.inf))
    border = known & ((largest_of_three(label) > label) | (lowest < label))
    index = label.long().flatten(1)
    size = index.new_zeros(count, pixels + 1).scatter_add(1, index, known.flatten(1).long())
    size = size.scatter_reduce(1, index, border.flatten(1).long() * least, "amax")
    return known & (size.gather(1, index) >= least).view_as(known)


def draw_matches(
    g: Generator,
    rgb: Float[Tensor, "b 3 h w"],
    z: Float[Tensor, "b h w"],
    valid: Bool[Tensor, "b h w"],
    focal: Float[Tensor, " b"],
    config: MatchConfig = MatchConfig(),
) -> Float[Tensor, "b h w"]:
    """Depth that stereo of each frame and one or two others might find, metres; 0 where it would find none.

    Args:
        g: all that is random, on the device of the frames.
        rgb: colours in [0, 1].
        z: planar depth, metres, filled where it is not valid.
        valid: where depth was measured.
        focal: in pixels.
        config: ranges of what is drawn.
    """
    count, height, width = z.shape
    one = (count, 1, 1)
    phi = normal(g, 0.35, *one) + math.pi * happens(g, 0.5, *one)
    known = _textured(g, rgb.mean(dim=1), phi, config)
    seen = _other_view(g, z, focal, phi, config)
    beside = phi + math.pi * happens(g, 0.7, *one) + normal(g, 0.3, *one)
    seen |= _other_view(g, z, focal, beside, config) & happens(g, config.second_view, *one)
    known &= seen & valid & _without_holes(g, count, height, width, config)

    q = 1.0 / z
    wider = torch.randint(1, 4, one, generator=g, device=z.device) * happens(g, config.fattening, *one)
    q = torch.where(wider == 2, largest_of_two(q), torch.where(wider == 3, largest_of_three(q), q))
    noise = uniform(g, 0.0, config.pixel_noise, *one) * normal(g, 1.0, *z.shape)
    noise += uniform(g, 0.0, config.smooth_noise, *one) * smooth_field(g, count, height, width, 12)
    q, known = _add_wrong_patches(g, q * noise.exp(), known, valid, config)
    return torch.where(without_islands(known), 1.0 / q, 0.0)

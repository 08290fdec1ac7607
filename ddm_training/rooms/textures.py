"""A bank of tiling textures. Each texel holds weights of three palette colours, so that one texture serves many looks.

Notation
    w      weights of a texel                            [3], in [0, 1]
    C      palette of a surface, linear RGB              [3, 3], one colour a row
    colour of a texel = w C; pictures and spines have (nearly) the primaries as their palette, all else two or three
    colours
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import scipy.fft
from jaxtyping import Float, Int, UInt8

SIZE = 256  # texels a side of a texture, a power of two
SEED = 7  # of the bank


class TextureBank:
    """All textures with their mip levels in one flat array, each made when it is first wanted.

    Texel (v, u) of level l of texture k is row ``start[l] + (k * (SIZE >> l) + v) * (SIZE >> l) + u``. The bank is the
    same in every process.
    """

    def __init__(self) -> None:
        counts = [kind.count for kind in KINDS.values()]
        count, sides = sum(counts), [SIZE >> level for level in range(SIZE.bit_length())]
        start = np.cumsum([0] + [count * side * side for side in sides[:-1]])
        self.start: Int[np.ndarray, " levels"] = start.astype(np.int32)
        # Memory that is not written to is not taken.
        self.texels: UInt8[np.ndarray, "texels 3"] = np.empty((sum(count * side * side for side in sides), 3), np.uint8)
        self.kinds = np.repeat(list(KINDS), counts)
        self._made = np.zeros(count, bool)

    def of_kind(self, kind: str) -> Int[np.ndarray, " textures"]:
        """Numbers of the textures of a kind."""
        return np.flatnonzero(self.kinds == kind)

    def prepare(self, textures: Int[np.ndarray, " n"]) -> None:
        """Make those of the textures that are not there yet; `sample` may then be asked for them."""
        for number in np.unique(textures[~self._made[textures]]).tolist():
            kind = KINDS[str(self.kinds[number])]
            level = np.clip(kind.make(np.random.default_rng([SEED, number])), 0.0, 1.0)
            for start in self.start.tolist():
                side = len(level)
                first = start + number * side * side
                self.texels[first : first + side * side] = level.reshape(-1, 3) * 255 + 0.5
                if side > 1:
                    level = level.reshape(side // 2, 2, side // 2, 2, 3).mean((1, 3))
            self._made[number] = True

    def sample(
        self,
        texture: Int[np.ndarray, " n"],
        u: Float[np.ndarray, " n"],
        v: Float[np.ndarray, " n"],
        footprint: Float[np.ndarray, " n"],
    ) -> Float[np.ndarray, "n 3"]:
        """Weights by bilinear look-up in the mip level whose texels are about as large as a pixel.

        Args:
            texture: which texture.
            u, v: coordinates in tiles; the fractional part counts.
            footprint: width of a pixel in tiles.
        """
        level = np.log2(np.maximum(footprint * SIZE, 1.0)).astype(np.int32)
        np.minimum(level, len(self.start) - 1, out=level)
        side = np.right_shift(SIZE, level)
        u0, u1, fu = _neighbours(u, side)
        v0, v1, fv = _neighbours(v, side)
        base = self.start.take(level) + texture * (side * side)
        row0, row1 = base + v0 * side, base + v1 * side
        upper = _mix(self.texels.take(row0 + u0, axis=0), self.texels.take(row0 + u1, axis=0), fu)
        lower = _mix(self.texels.take(row1 + u0, axis=0), self.texels.take(row1 + u1, axis=0), fu)
        return _mix(upper, lower, fv) * np.float32(1 / 255)


def _neighbours(u: np.ndarray, side: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two texels around a coordinate, wrapped, and the weight of the second."""
    position = (u - np.floor(u)) * side - np.float32(0.5)
    below = np.floor(position)
    first = below.astype(np.int32)
    return first & (side - 1), (first + 1) & (side - 1), (position - below).astype(np.float32)[:, None]


def _mix(a: np.ndarray, b: np.ndarray, weight: np.ndarray) -> np.ndarray:
    first = a.astype(np.float32)
    mixed = b.astype(np.float32)
    mixed -= first
    mixed *= weight
    mixed += first
    return mixed


@lru_cache(maxsize=1)
def texture_bank() -> TextureBank:
    """The bank of this process."""
    return TextureBank()


# Fields in [0, 1] over one tile.


def _grid() -> tuple[np.ndarray, np.ndarray]:
    axis = (np.arange(SIZE) + 0.5) / SIZE
    u, v = np.meshgrid(axis, axis)
    return u, v


def _noise(rng: np.random.Generator, slope: float, stretch: float = 1.0) -> np.ndarray:
    """Periodic noise with amplitude 1 / frequency^slope, ``stretch`` times longer along u, spread over [0, 1]."""
    fy = np.fft.fftfreq(SIZE, 1 / SIZE)[:, None]
    fx = np.fft.rfftfreq(SIZE, 1 / SIZE) * stretch
    amplitude = np.maximum(np.hypot(fx, fy), 1.0) ** -slope
    amplitude[0, 0] = 0
    spectrum = rng.standard_normal((2, *amplitude.shape), np.float32)
    field = np.asarray(
        scipy.fft.irfft2((spectrum[0] + 1j * spectrum[1]) * amplitude.astype(np.float32), s=(SIZE, SIZE))
    )
    return np.clip(0.5 + field / (4 * field.std() + 1e-9), 0, 1)


def _weights(a: np.ndarray, b: np.ndarray | float = 0.0) -> np.ndarray:
    """First colour where a = b = 0, second by a, third by b (b over a)."""
    a, b = np.broadcast_arrays(a, b)
    return np.stack([(1 - a) * (1 - b), a * (1 - b), b], -1)


def _cells(
    rng: np.random.Generator, rows: int | np.integer, columns: int | np.integer, shift: float, gap: float
) -> tuple[np.ndarray, np.ndarray]:
    """A random value per cell, and 1 in the joints between cells, which take ``gap`` of the texture's side from each.

    Each row is shifted by ``shift`` cells more than the one before; by a random amount where ``shift`` is negative.
    """
    u, v = _grid()
    row = np.floor(v * rows).astype(int)
    shifts = np.arange(rows) * shift if shift >= 0 else rng.uniform(size=rows)
    along = u * columns + shifts[row]
    column = np.floor(along).astype(int) % columns
    value = rng.uniform(size=(rows, columns))[row, column]
    edge_u = np.minimum(along % 1, 1 - along % 1) / columns
    edge_v = np.minimum(v * rows % 1, 1 - v * rows % 1) / rows
    return value, (np.minimum(edge_u, edge_v) < gap).astype(float)


# The kinds: each gives the weights of one texture, [SIZE, SIZE, 3].


def _plain(rng: np.random.Generator) -> np.ndarray:
    return _weights(0.35 * _noise(rng, rng.uniform(0.3, 1.8)))


def _grain(rng: np.random.Generator) -> np.ndarray:
    return _weights(_noise(rng, rng.uniform(0.0, 1.2)), 0.4 * _noise(rng, 1.5))


def _marble(rng: np.random.Generator) -> np.ndarray:
    u, v = _grid()
    warp = rng.uniform(1, 5) * _noise(rng, 1.8)
    veins = 0.5 + 0.5 * np.sin(2 * np.pi * (rng.integers(0, 4) * u + rng.integers(1, 4) * v + warp))
    return _weights(veins ** rng.uniform(0.7, 5), 0.3 * _noise(rng, 1.4))


def _checker(rng: np.random.Generator) -> np.ndarray:
    u, v = _grid()
    n = 2 * rng.integers(1, 5)
    return _weights(((np.floor(u * n) + np.floor(v * n)) % 2) * rng.uniform(0.5, 1), 0.25 * _noise(rng, 1.0))


def _tiles(rng: np.random.Generator) -> np.ndarray:
    n, m = rng.integers(2, 7, size=2)
    value, joint = _cells(rng, n, m if rng.uniform() < 0.5 else n, 0.0, rng.uniform(0.003, 0.012))
    return _weights(np.clip(rng.uniform(0.1, 1) * value + 0.3 * _noise(rng, 1.3) - 0.1, 0, 1), joint)


def _bricks(rng: np.random.Generator) -> np.ndarray:
    value, joint = _cells(rng, 2 * rng.integers(3, 6), rng.integers(3, 5), 0.5, rng.uniform(0.006, 0.012))
    return _weights(np.clip(0.7 * value + 0.6 * _noise(rng, 0.7) - 0.15, 0, 1), joint)


def _planks(rng: np.random.Generator) -> np.ndarray:
    value, joint = _cells(rng, rng.integers(3, 12), rng.integers(1, 3), -1.0, rng.uniform(0.0, 0.005))
    grain = _noise(rng, rng.uniform(0.6, 1.3), stretch=rng.uniform(6, 25))
    return _weights(np.clip(rng.uniform(0.2, 0.8) * value + 0.6 * grain - 0.1, 0, 1), joint * rng.uniform(0.5, 1))


def _stripes(rng: np.random.Generator) -> np.ndarray:
    u, _ = _grid()
    edges = np.sort(rng.uniform(size=2 * rng.integers(1, 5)))
    repeat = rng.integers(1, 7)
    band = np.searchsorted(edges, (u * repeat) % 1)
    return _weights((band % 2) * 1.0, (band % 4 == 2) * rng.uniform() + 0.15 * _noise(rng, 1.0))


def _spines(rng: np.random.Generator) -> np.ndarray:
    """Book spines, or clothes on a rail: bands of random width, each of a random colour with a label."""
    u, v = _grid()
    edges = np.sort(rng.uniform(size=rng.integers(8, 22)))
    band = np.searchsorted(edges, u)
    colours = rng.uniform(size=(len(edges) + 1, 3)) ** 1.5
    colours[-1] = colours[0]
    label = rng.uniform(0.2, 0.8, size=len(edges) + 1)[band]
    colour = colours[band]
    colour[np.abs(v - label) < 0.06] = rng.uniform(0.5, 1.0, 3)
    nearest = np.abs(u[..., None] - edges).min(-1)
    return colour * np.where(nearest < 0.006, 0.15, 1.0)[..., None]


def _plaid(rng: np.random.Generator) -> np.ndarray:
    a = _stripes(rng)[..., 1]
    b = _stripes(rng)[..., 1].T
    return _weights(0.5 * (a + b), 0.5 * a * b)


def _dots(rng: np.random.Generator) -> np.ndarray:
    u, v = _grid()
    n = rng.integers(3, 10)
    shift = (np.floor(v * n * 2) % 2) * 0.5 if rng.uniform() < 0.5 else 0.0
    rows = n * 2 if np.ndim(shift) else n
    radius = np.hypot(((u * n + shift) % 1 - 0.5) / n, ((v * rows) % 1 - 0.5) / rows)
    return _weights(radius < rng.uniform(0.15, 0.4) / n, 0.2 * _noise(rng, 0.8))


def _weave(rng: np.random.Generator) -> np.ndarray:
    u, v = _grid()
    n = rng.integers(16, 40)
    threads = np.where(
        (np.floor(u * n) + np.floor(v * n)) % 2, np.abs(np.sin(np.pi * u * n)), np.abs(np.sin(np.pi * v * n))
    )
    return _weights(rng.uniform(0.4, 1) * threads, 0.5 * _noise(rng, 1.6))


def _picture(rng: np.random.Generator) -> np.ndarray:
    """A poster: a gradient or noise, and over it random rectangles, ellipses, stripes and waves, sometimes a border."""
    u, v = _grid()
    ramp = (v if rng.uniform() < 0.6 else _noise(rng, rng.uniform(1.2, 2.2)))[..., None]
    image = rng.uniform(size=3) * (1 - ramp) + rng.uniform(size=3) * ramp
    cloud = 0.25 * (_noise(rng, 1.2)[..., None] - 0.5)
    for _ in range(rng.integers(2, 16)):
        x, y = rng.uniform(size=2)
        a, b = rng.uniform(0.03, 0.3, size=2)
        angle = rng.choice([0.0, rng.uniform(0, np.pi)])
        p = (u - x) * np.cos(angle) + (v - y) * np.sin(angle)
        q = (v - y) * np.cos(angle) - (u - x) * np.sin(angle)
        shape = rng.integers(4)
        if shape == 0:
            inside = np.maximum(np.abs(p) / a, np.abs(q) / b) < 1
        elif shape == 1:
            inside = np.hypot(p / a, q / (a if rng.uniform() < 0.6 else b)) < 1
        elif shape == 2:
            inside = np.abs(p) < 0.1 * a
        else:
            inside = q > 0.4 * b * np.sin(p / a * 3) + 0.2
        image[inside] = rng.uniform(size=3) + rng.choice([0.0, 1.0, 2.0]) * cloud[inside]
    if rng.uniform() < 0.4:
        border = np.minimum(np.minimum(u, 1 - u), np.minimum(v, 1 - v)) < rng.uniform(0.03, 0.12)
        image[border] = rng.choice([0.05, 0.9]) + 0.0 * image[border]
    return image


@dataclass(frozen=True)
class TextureKind:
    """How a kind of texture is made, and how many of it the bank holds."""

    make: Callable[[np.random.Generator], np.ndarray]
    count: int


KINDS = {
    "plain": TextureKind(_plain, 14),
    "grain": TextureKind(_grain, 16),
    "marble": TextureKind(_marble, 12),
    "checker": TextureKind(_checker, 8),
    "tiles": TextureKind(_tiles, 12),
    "bricks": TextureKind(_bricks, 8),
    "planks": TextureKind(_planks, 18),
    "stripes": TextureKind(_stripes, 12),
    "spines": TextureKind(_spines, 12),
    "plaid": TextureKind(_plaid, 10),
    "dots": TextureKind(_dots, 8),
    "weave": TextureKind(_weave, 8),
    "picture": TextureKind(_picture, 48),
}
"""Kinds of texture by name. Their order and counts number the textures of the bank, and the number seeds a texture."""

"""Scenes as flat arrays of primitives, and the builder that furniture is made with.

Notation
    A      world to unit space, [3, 3]: y = A (x - c), A = diag(1 / half) R^T with R the primitive's axes as columns
    yaw    rotation about the world's z axis in radians
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int

Number = float | int | np.floating | np.integer
Point = Sequence[Number] | np.ndarray

BOX, ELLIPSOID, CYLINDER = 0, 1, 2
CORNERS = np.array([[i, j, k] for i in (-1, 1) for j in (-1, 1) for k in (-1, 1)], np.float64)
VOXEL = 0.12  # metres; grid of the ambient occlusion


@dataclass(frozen=True)
class Skin:
    """How a surface looks: a texture of the bank, three linear colours for it, and its size."""

    texture: int
    palette: Float[np.ndarray, "3 3"]
    tile: tuple[Number, Number] = (1.0, 1.0)
    """Width and height in metres of one repeat of the texture; (0, 0): stretched once over the largest face."""
    turned: bool = False
    """Swap the texture's axes."""
    specular: Number = 0.0
    """Strength of highlights."""
    emission: Number = 0.0
    """What the surface shines with itself, in units of its first colour."""


@dataclass(frozen=True)
class Light:
    """A lamp that shines all around, or, with a ``target``, daylight from one side."""

    position: Float[np.ndarray, " 3"]
    color: Float[np.ndarray, " 3"]
    target: Float[np.ndarray, " 3"] | None = None
    tangent: float = 1.0
    """Half the width of daylight's cone at distance 1."""
    softness: Number = 1.5
    """Blur of the shadow map: standard deviation in its pixels."""
    reach: Number = 14.0
    """Metres; what is farther is not lit."""

    def falloff(self, distance: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Inverse square with a floor for lamps (a real lamp has a size); daylight does not fall off."""
        return np.ones_like(distance) if self.target is not None else 1.0 / (0.3 + distance * distance)

    def importance(self, size: Float[np.ndarray, " 3"]) -> float:
        """How much the light does for a room of this size: its strength in the middle."""
        distance = np.linalg.norm(size / 2 - self.position)
        return float(self.color.max() * self.falloff(np.array([distance]))[0])


@dataclass(frozen=True)
class Faces:
    """Tables over surfaces (6 primitive + face), one array a coordinate so that look-ups are contiguous."""

    normal: Float[np.ndarray, "3 s"]
    u: Float[np.ndarray, "4 s"]
    """Texture coordinate in tiles = row . (point, 1)."""
    v: Float[np.ndarray, "4 s"]
    size: Float[np.ndarray, " s"]
    """Size of a tile in metres, the smaller of the two."""
    round: Bool[np.ndarray, " s"]
    """Not of a box: normal, u and v do not hold."""


_U_AXIS, _V_AXIS = (1, 0, 0), (2, 2, 1)  # axes of the texture on faces across x, y, z: v is upright on walls


@dataclass(frozen=True)
class Scene:
    """Primitives as arrays (one row each, `_ROWS`), lights, and the light that has no direction."""

    kind: Int[np.ndarray, " p"]
    centre: Float[np.ndarray, "p 3"]
    to_unit: Float[np.ndarray, "p 3 3"]
    half: Float[np.ndarray, "p 3"]
    taper: Float[np.ndarray, " p"]
    """k of a cylinder whose radius in unit space is 1 - |k| + k y_2."""
    entity: Int[np.ndarray, " p"]
    texture: Int[np.ndarray, " p"]
    palette: Float[np.ndarray, "p 3 3"]
    tile: Float[np.ndarray, "p 2"]
    shift: Float[np.ndarray, "p 2"]
    turned: Bool[np.ndarray, " p"]
    specular: Float[np.ndarray, " p"]
    emission: Float[np.ndarray, " p"]
    lights: tuple[Light, ...] = ()
    sky: Float[np.ndarray, " 3"] = field(default_factory=lambda: np.ones(3, np.float32))
    ambient_above: Float[np.ndarray, " 3"] = field(default_factory=lambda: np.full(3, 0.4, np.float32))
    ambient_below: Float[np.ndarray, " 3"] = field(default_factory=lambda: np.full(3, 0.3, np.float32))
    size: Float[np.ndarray, " 3"] = field(default_factory=lambda: np.full(3, 4.0))
    """Extent of the room; what lies outside is seen through openings."""

    @cached_property
    def from_unit(self) -> Float[np.ndarray, "p 3 3"]:
        # A^-1 = R diag(half) = A^T diag(half^2)
        return self.to_unit.transpose(0, 2, 1) * self.half[:, None].astype(np.float64) ** 2

    @cached_property
    def corners(self) -> Float[np.ndarray, "corners 3"]:
        """Corners of the primitives' (oriented) bounding boxes in the world; corner 4 i + 2 j + k has signs i, j, k."""
        return (np.einsum("pjk,ck->pcj", self.from_unit, CORNERS) + self.centre[:, None]).reshape(-1, 3)

    @cached_property
    def to_unit32(self) -> Float[np.ndarray, "p 3 3"]:
        return self.to_unit.astype(np.float32)

    @cached_property
    def centre32(self) -> Float[np.ndarray, "p 3"]:
        return self.centre.astype(np.float32)

    @cached_property
    def casters(self) -> "Scene":
        """What casts shadows: all but lamps, which would shade their own light."""
        return self.select(self.emission == 0)

    @cached_property
    def faces(self) -> Faces:
        """Normals and texture coordinates of all box faces as affine functions of the point."""
        axes = self.to_unit * self.half[:, :, None]  # rows: a primitive's axes in the world
        tile, shift = self.tile.astype(np.float64), self.shift
        normal, coordinates = [], []
        for face in range(6):
            axis = face // 2
            normal.append(axes[:, axis] * (1 - 2 * (face % 2)))
            pair = [axes[:, _U_AXIS[axis]], axes[:, _V_AXIS[axis]]]
            pair = [np.where(self.turned[:, None], pair[1 - i], pair[i]) / tile[:, i, None] for i in range(2)]
            offset = [shift[:, i] - (pair[i] * self.centre).sum(1) for i in range(2)]
            coordinates.append([np.concatenate([pair[i], offset[i][:, None]], 1) for i in range(2)])
        rows = np.array(coordinates).transpose(1, 3, 2, 0).reshape(2, 4, -1).astype(np.float32)
        return Faces(
            normal=np.array(normal).transpose(2, 1, 0).reshape(3, -1).astype(np.float32),
            u=rows[0],
            v=rows[1],
            size=np.repeat(self.tile.min(1), 6),
            round=np.repeat(self.kind != BOX, 6),
        )

    def select(self, rows: Bool[np.ndarray, " p"]) -> "Scene":
        """The scene with some of its primitives only."""
        return replace(self, **{name: getattr(self, name)[rows] for name in _ROWS})

    @cached_property
    def bounds(self) -> tuple[Float[np.ndarray, "p 3"], Float[np.ndarray, "p 3"]]:
        """Axis-aligned bounding boxes."""
        extent = np.abs(self.from_unit).sum(2)
        return self.centre - extent, self.centre + extent

    @cached_property
    def _occupancy(self) -> tuple[Float[np.ndarray, "x y z"], Float[np.ndarray, " 3"]]:
        """Blurred share of each voxel that is filled, and the corner of the grid, which ends 1.2 m outside the room."""
        from scipy.ndimage import gaussian_filter

        low, high = self.bounds
        corner, end = np.full(3, -1.2), self.size + 1.2
        size = np.ceil((end - corner) / VOXEL).astype(int)
        grid = np.zeros(size, np.float32)
        start = np.clip(np.floor((low - corner) / VOXEL).astype(int), 0, size)
        stop = np.clip(np.floor((high - corner) / VOXEL).astype(int) + 1, 0, size)
        thickness = np.clip(2 * self.half.min(1) / VOXEL, 0.0, 1.0)
        upright = (self.kind == BOX) & (np.abs(np.abs(self.to_unit32 * self.half[:, :, None]).max(2) - 1).max(1) < 1e-3)
        for p in range(len(self.kind)):
            x, y, z = (slice(a, b) for a, b in zip(start[p], stop[p]))
            part = grid[x, y, z]
            share = thickness[p] if upright[p] else 0.7 * thickness[p]
            if not upright[p]:
                index = np.stack(np.meshgrid(*(np.arange(s.start, s.stop) for s in (x, y, z)), indexing="ij"), -1)
                unit = ((index + 0.5) * VOXEL + corner - self.centre[p]) @ self.to_unit[p].T
                inside = (np.abs(unit) <= 1 + 0.5 * VOXEL / self.half[p]).all(-1)
                share = share * inside
            np.maximum(part, share, out=part)
        return 0.5 * gaussian_filter(grid, 1.0, truncate=2.5) + 0.5 * gaussian_filter(grid, 3.0, truncate=2.5), corner

    def openness(self, point: Float[np.ndarray, "3 n"], normal: Float[np.ndarray, "3 n"]) -> Float[np.ndarray, " n"]:
        """Ambient occlusion: how empty the room is just in front of a surface, in [0.25, 1]; about 1 on a bare wall."""
        from scipy.ndimage import map_coordinates

        grid, corner = self._occupancy
        index = (point + np.float32(0.2) * normal - corner[:, None].astype(np.float32)) / np.float32(VOXEL)
        filled = map_coordinates(grid, index - np.float32(0.5), order=1, mode="nearest", output=np.float32)
        return np.clip(1.12 - 1.9 * filled, 0.25, 1.0)


_ROWS = (
    "kind", "centre", "to_unit", "half", "taper", "entity", "texture", "palette", "tile", "shift", "turned", "specular",
    "emission",
)  # fmt: skip


def rotation_z(yaw: Number) -> Float[np.ndarray, "3 3"]:
    """Axes turned by ``yaw`` about z, as columns."""
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


class SceneBuilder:
    """Collects primitives; `Place` gives furniture its own coordinates."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.rows: list[dict] = []
        self.lights: list[Light] = []
        self.entities = 0

    def new_entity(self) -> int:
        """Number of the next object."""
        self.entities += 1
        return self.entities

    def add(
        self,
        kind: int,
        centre: Point,
        half: Point,
        axes: Float[np.ndarray, "3 3"],
        skin: Skin,
        entity: int,
        taper: Number = 0.0,
        world: bool = False,
    ) -> None:
        """Add a primitive.

        Args:
            kind: BOX, ELLIPSOID or CYLINDER.
            centre: in the world.
            half: half its size along its axes, metres.
            axes: its axes in the world, as columns.
            skin: how it looks.
            entity: number of the object it belongs to.
            taper: see `Scene.taper`.
            world: the texture runs on over neighbours with unturned axes (walls in panels).
        """
        half = np.maximum(np.asarray(half, np.float64), 1e-3)
        tile, shift = np.array(skin.tile), self.rng.uniform(size=2)
        if not tile.all():
            flat = int(half.argmin())
            u, v = [a for a in (0, 1, 2) if a != flat]
            tile, shift = np.array([2 * half[u], 2 * half[v]]), np.array([0.5, 0.5])
        elif world:
            along = 1 if half[0] < half[1] else 0
            uv = [centre[along], centre[2]] if half[2] > 0.1 else [centre[0], centre[1]]
            shift = np.array(uv[::-1] if skin.turned else uv) / tile
        self.rows.append(
            {
                "kind": kind, "centre": np.asarray(centre, np.float64), "to_unit": np.asarray(axes).T / half[:, None],
                "half": half, "taper": taper, "entity": entity, "texture": skin.texture, "palette": skin.palette,
                "tile": tile, "shift": shift, "turned": skin.turned, "specular": skin.specular,
                "emission": skin.emission,
            }
        )  # fmt: skip

    def wall(self, low: Point, high: Point, skin: Skin, entity: int) -> None:
        """An unturned box between two corners whose texture is anchored in the world; nothing where it is flat."""
        low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
        if (high - low > 1e-3).all():
            self.add(BOX, (low + high) / 2, (high - low) / 2, np.eye(3), skin, entity, world=True)

    def build(self, **others: Float[np.ndarray, " 3"]) -> Scene:
        """Stack everything into a `Scene`; ``others`` are its sky, ambient light and size."""
        columns = {key: np.array([row[key] for row in self.rows]) for key in self.rows[0]}
        for key in ("half", "taper", "palette", "tile", "shift", "specular", "emission"):
            columns[key] = columns[key].astype(np.float32)
        return Scene(**columns, lights=tuple(self.lights), **others)


@dataclass(frozen=True)
class Place:
    """A spot for an object: origin (on the floor, a board, the ceiling) and yaw; its back is towards its own +y."""

    builder: SceneBuilder
    origin: Float[np.ndarray, " 3"]
    yaw: Number
    entity: int

    @property
    def axes(self) -> Float[np.ndarray, "3 3"]:
        return rotation_z(self.yaw)

    def point(self, at: Point) -> Float[np.ndarray, " 3"]:
        """World position of a point of the object."""
        return self.origin + self.axes @ np.asarray(at, np.float64)

    def inner(self, at: Point, yaw: Number = 0.0) -> "Place":
        """A place on or in this one, for another object."""
        return Place(self.builder, self.point(at), self.yaw + yaw, self.builder.new_entity())

    def box(self, low: Point, high: Point, skin: Skin, tilt: Number = 0.0) -> None:
        """A box between two corners, leaned by ``tilt`` radians about its own x axis."""
        low_, high_ = np.asarray(low, np.float64), np.asarray(high, np.float64)
        c, s = np.cos(tilt), np.sin(tilt)
        axes = self.axes @ np.array([[1.0, 0, 0], [0, c, -s], [0, s, c]])
        self.builder.add(BOX, self.point((low_ + high_) / 2), (high_ - low_) / 2, axes, skin, self.entity)

    def cylinder(self, base: Point, radius: Number, height: Number, skin: Skin, taper: Number = 0.0, axes=None) -> None:
        """A cylinder whose mean radius is ``radius``; taper in (-1, 1) widens it upwards, ``axes`` lean it."""
        axes = self.axes if axes is None else self.axes @ axes
        centre = self.point(base) + axes @ np.array([0, 0, height / 2])
        self.builder.add(CYLINDER, centre, (radius * (1 + abs(taper)),) * 2 + (height / 2,), axes, skin, self.entity,
                         taper=taper / (1 + abs(taper)))  # fmt: skip

    def ball(self, centre: Point, radii: Point, skin: Skin, axes=None) -> None:
        """An ellipsoid; ``axes`` turn it."""
        axes = self.axes if axes is None else self.axes @ axes
        self.builder.add(ELLIPSOID, self.point(centre), radii, axes, skin, self.entity)

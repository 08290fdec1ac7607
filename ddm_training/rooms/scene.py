"""A random room: shell with openings, what lies behind them, furniture, lights.

Everything is a function of (seed, room); no state is shared between rooms, so rooms may be made in any order and by any
number of processes.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from ddm_training.rooms.furniture import ABOVE_CEILINGS, FURNITURE, Looks
from ddm_training.rooms.shading import ShadowMap, shadow_map
from ddm_training.rooms.shapes import Light, Number, Place, Scene, SceneBuilder

WALL = 0.16  # metres
MAX_LIGHTS = 4  # dimmer ones are left out: a shadow map costs as much as a tenth of a frame


@dataclass(frozen=True)
class Footprint:
    """Where furniture stands: a rectangle on the floor with a height above the floor."""

    low: Float[np.ndarray, " 2"]
    high: Float[np.ndarray, " 2"]
    height: Number

    def near(self, low: np.ndarray, high: np.ndarray, gap: Number) -> bool:
        """Whether another rectangle overlaps this one or comes closer than ``gap`` along both axes."""
        return bool((self.low < high + gap).all() and (low < self.high + gap).all())


@dataclass(frozen=True)
class Room:
    """A scene with its shadow maps, and what cameras have to know."""

    scene: Scene
    shadows: list[ShadowMap]
    size: Float[np.ndarray, " 3"]
    footprints: tuple[Footprint, ...]
    seed: tuple[int, int, int]
    """Seed, number of the room, attempt."""

    def rng(self, purpose: int) -> np.random.Generator:
        """Random numbers for one purpose, independent of those for others.

        1: cameras of a store or of Hypersim's layout; 2: exposure and noise of a store; 3: cameras of a capture.
        (0: the room itself, see `make_room`; 4: a still itself, see `stills.make_still`.)
        """
        return np.random.default_rng([*self.seed, purpose])


def make_room(seed: int, index: int, attempt: int = 0) -> Room:
    """Room number ``index`` of ``seed``; another one for each ``attempt``, where no camera found a view."""
    rng = np.random.default_rng([seed, index, attempt, 0])
    builder, looks = SceneBuilder(rng), Looks(rng)
    size = np.array([rng.uniform(3.0, 7.5), rng.uniform(3.0, 6.5), rng.uniform(2.3, 3.2)])
    openings = _shell(builder, looks, size)
    footprints = _furnish(builder, looks, size, openings)
    _pictures(builder, looks, size, openings)
    _lamps(builder, looks, size)
    warmth = np.array([1.0, rng.uniform(0.85, 1.0), rng.uniform(0.7, 1.0)])
    level = rng.uniform(0.25, 0.8)
    scene = builder.build(
        size=size,
        sky=(rng.uniform(1.0, 4.0) * np.array([0.8, 0.9, 1.0])).astype(np.float32),
        ambient_above=(level * warmth).astype(np.float32),
        ambient_below=(level * rng.uniform(0.6, 1.0) * warmth * [1.0, 0.95, 0.9]).astype(np.float32),
    )
    brightest = sorted(scene.lights, key=lambda light: -light.importance(size))[:MAX_LIGHTS]
    return Room(
        scene, [shadow_map(scene, light) for light in brightest], size, tuple(footprints), (seed, index, attempt)
    )


@dataclass(frozen=True)
class Opening:
    """A hole in wall ``side`` (0: x = 0, 1: x = width, 2: y = 0, 3: y = depth); ``low``, ``high`` = (along, z)."""

    side: int
    low: tuple[Number, Number]
    high: tuple[Number, Number]
    door: bool


def _wall_box(
    size: np.ndarray, side: int, a0: Number, a1: Number, z0: Number, z1: Number, near: Number, far: Number
) -> tuple[np.ndarray, np.ndarray]:
    """Corners of a box along wall ``side``, between distances ``near`` and ``far`` outside its inner face."""
    axis = side // 2
    out = (size[axis] + near, size[axis] + far) if side % 2 else (-far, -near)
    low, high = np.array([a0, a0, z0]), np.array([a1, a1, z1])
    low[axis], high[axis] = out
    return low, high


def _shell(builder: SceneBuilder, looks: Looks, size: np.ndarray) -> list[Opening]:
    """Floor, ceiling, walls with skirting, and their openings with what lies behind; returns the openings."""
    rng = looks.rng
    paint, floor, ceiling = looks.wall(), looks.floor(), looks.paint((0.75, 1.0))
    accent = looks.wall() if rng.uniform() < 0.35 else paint
    builder.wall((-WALL, -WALL, -0.2), (size[0] + WALL, size[1] + WALL, 0), floor, builder.new_entity())
    builder.wall(
        (-WALL, -WALL, size[2]), (size[0] + WALL, size[1] + WALL, size[2] + 0.2), ceiling, builder.new_entity()
    )
    openings, skirting, trim = [], looks.surface(), looks.surface()
    accented = rng.integers(4)
    for side in range(4):
        length = size[1 - side // 2]
        opening = _random_opening(rng, side, length, size[2]) if rng.uniform() < 0.5 else None
        skin, entity = accent if side == accented else paint, builder.new_entity()

        def panel(a0, a1, z0, z1, near=0.0, far=WALL, skin=skin, entity=entity, side=side):
            builder.wall(*_wall_box(size, side, a0, a1, z0, z1, near, far), skin, entity)

        if opening is None:
            panel(-WALL, length + WALL, 0, size[2])
        else:
            (a0, z0), (a1, z1) = opening.low, opening.high
            panel(-WALL, a0, 0, size[2])
            panel(a1, length + WALL, 0, size[2])
            panel(a0, a1, 0, z0)
            panel(a0, a1, z1, size[2])
            openings.append(opening)
            _frame(builder, looks, size, opening, trim)
            (_next_room if opening.door or rng.uniform() < 0.3 else _outside)(builder, looks, size, opening)
        if rng.uniform() < 0.6:
            ends = [(0.0, length)]
            if opening is not None and opening.door:
                ends = [(0.0, opening.low[0] - 0.06), (opening.high[0] + 0.06, length)]
            for a0, a1 in ends:
                panel(a0, a1, 0.0, 0.08, -0.015, 0.0, skirting)
    return openings


def _random_opening(rng: np.random.Generator, side: int, length: Number, height: Number) -> Opening:
    door = bool(rng.uniform() < 0.5)
    wide = rng.uniform(0.8, 1.0) if door and rng.uniform() < 0.7 else rng.uniform(0.7, min(2.4, length - 1.0))
    start = rng.uniform(0.3, length - wide - 0.3)
    low, high = (0.0, rng.uniform(1.95, 2.15)) if door else (rng.uniform(0.3, 1.1), rng.uniform(1.7, height - 0.15))
    return Opening(side, (start, low), (start + wide, high), door)


def _frame(builder: SceneBuilder, looks: Looks, size: np.ndarray, o: Opening, skin) -> None:
    """A frame; for a door sometimes its leaf; for a window a sill, glazing bars and sometimes curtains."""
    rng, entity = looks.rng, builder.new_entity()
    (a0, z0), (a1, z1) = o.low, o.high

    def bar(b0, b1, y0, y1, near, far, skin=skin, entity=entity):
        builder.wall(*_wall_box(size, o.side, b0, b1, y0, y1, near, far), skin, entity)

    bar(a0 - 0.06, a0, max(z0 - 0.06, 0), z1 + 0.06, -0.02, 0.0)
    bar(a1, a1 + 0.06, max(z0 - 0.06, 0), z1 + 0.06, -0.02, 0.0)
    bar(a0 - 0.06, a1 + 0.06, z1, z1 + 0.06, -0.02, 0.0)
    if o.door:
        if rng.uniform() < 0.35:  # the door's leaf, standing open into the next room
            leaf = builder.new_entity()
            bar(a0 - 0.02, a0 + 0.03, 0, z1, WALL, WALL + 0.8, looks.surface(), leaf)
        return
    bar(a0 - 0.1, a1 + 0.1, z0 - 0.04, z0, -rng.uniform(0.03, 0.2), 0.1)
    for x in np.linspace(a0, a1, rng.integers(2, 5)):
        bar(x - 0.025, x + 0.025, z0, z1, 0.06, 0.1)
    for z in np.linspace(z0, z1, rng.integers(2, 4)):
        bar(a0, a1, z - 0.025, z + 0.025, 0.06, 0.1)
    if rng.uniform() < 0.4:
        cloth, entity, wide = looks.fabric(), builder.new_entity(), rng.uniform(0.2, 0.5)
        for b in (a0 - wide * 0.6, a1 - wide * 0.4):
            folds = np.linspace(b, b + wide, 6)
            for i in range(5):
                bar(folds[i], folds[i + 1], 0.05, z1 + 0.15, -0.1 - 0.03 * (i % 2), -0.07, cloth, entity)


def _next_room(builder: SceneBuilder, looks: Looks, size: np.ndarray, o: Opening) -> None:
    """A corridor or room behind the opening, with a piece of furniture at its far end and a lamp."""
    rng, entity = looks.rng, builder.new_entity()
    middle, reach = (o.low[0] + o.high[0]) / 2, rng.uniform(1.2, 5.0)
    a0, a1, top = middle - rng.uniform(0.8, 3.0), middle + rng.uniform(0.8, 3.0), size[2]
    paint, floor = looks.wall(), looks.floor()

    def box(b0, b1, y0, y1, near, far, skin):
        builder.wall(*_wall_box(size, o.side, b0, b1, y0, y1, near, far), skin, entity)

    box(a0, a1, -0.2, 0, WALL, reach, floor)
    box(a0, a1, top, top + 0.2, WALL, reach, paint)
    box(a0 - 0.1, a1 + 0.1, 0, top, reach, reach + 0.1, paint)
    box(a0 - 0.1, a0, 0, top, WALL, reach, paint)
    box(a1, a1 + 0.1, 0, top, WALL, reach, paint)
    kind = FURNITURE[str(rng.choice(["shelf", "cupboard", "plant", "table"]))]
    low, _ = _wall_box(size, o.side, middle, middle, 0, 0, reach - 0.35, reach - 0.35)
    place = Place(builder, np.array([low[0], low[1], 0.0]), _yaw_of(o.side), builder.new_entity())
    kind.make(place, looks, rng.uniform(*kind.width), min(rng.uniform(*kind.depth), 0.6), rng.uniform(*kind.height))
    at = np.array(_wall_box(size, o.side, middle, middle, top - 0.3, top - 0.3, reach / 2, reach / 2)[0])
    builder.lights.append(Light(at, np.array([1.0, 0.9, 0.75]) * rng.uniform(1, 5)))


def _outside(builder: SceneBuilder, looks: Looks, size: np.ndarray, o: Opening) -> None:
    """Behind a window: ground with a fence or house across it, or only the sky; mostly daylight that comes in."""
    rng, entity = looks.rng, builder.new_entity()
    middle, reach = (o.low[0] + o.high[0]) / 2, rng.uniform(2.5, 9.0)
    if rng.uniform() < 0.7:
        ground = rng.choice([-0.3, -3.0])
        skin = looks.skin("grain", looks.shades(looks.color((0.2, 0.6)), 0.5), (1.0, 3.0))
        builder.wall(
            *_wall_box(size, o.side, middle - 15, middle + 15, ground - 0.1, ground, WALL, reach), skin, entity
        )
        top = rng.choice([rng.uniform(1.0, 3.0), 12.0])
        skin = looks.skin("bricks tiles grain planks", looks.shades(looks.color((0.3, 0.9)), 0.5), (1.0, 4.0))
        builder.wall(*_wall_box(size, o.side, middle - 15, middle + 15, ground, top, reach, reach + 0.2), skin, entity)
    if rng.uniform() < 0.8:
        z = (o.low[1] + o.high[1]) / 2
        window = np.array(_wall_box(size, o.side, middle, middle, z, z, 0, 0)[0])
        away = 2.2
        swing, rise = rng.uniform(-1.2, 1.2), rng.uniform(0.5, 2.2)
        sun = np.array(_wall_box(size, o.side, middle + swing, middle + swing, z + rise, z + rise, away, away)[0])
        color = np.array([1.0, 0.93, 0.82]) * rng.uniform(0.6, 3.0)
        wide = np.hypot(o.high[0] - o.low[0], o.high[1] - o.low[1]) / 2 / np.hypot(away, rise) * 1.3
        builder.lights.append(Light(sun, color, window, float(np.clip(wide, 0.3, 1.2)), softness=1.8))


def _yaw_of(side: int) -> float:
    """Yaw of an object whose back (+y) is towards wall ``side``."""
    return {0: np.pi / 2, 1: -np.pi / 2, 2: np.pi, 3: 0.0}[side]


def _furnish(builder: SceneBuilder, looks: Looks, size: np.ndarray, openings: list[Opening]) -> list[Footprint]:
    """A rug, and furniture where there is room for it; returns where the furniture stands."""
    rng = looks.rng
    placed: list[Footprint] = []
    names, frequency = list(FURNITURE), np.array([kind.frequency for kind in FURNITURE.values()])
    area = size[0] * size[1]
    if rng.uniform() < 0.5:
        w, d = rng.uniform(0.4, 0.8, 2) * size[:2]
        rug = Place(builder, np.append(rng.uniform(0.35, 0.65, 2) * size[:2], 0), 0.0, builder.new_entity())
        rug.box((-w / 2, -d / 2, 0), (w / 2, d / 2, 0.012), looks.picture() if rng.uniform() < 0.3 else looks.fabric())
    for _ in range(rng.poisson(4 + 0.45 * area)):
        kind = FURNITURE[str(rng.choice(names, p=frequency / frequency.sum()))]
        w, d = rng.uniform(*kind.width), rng.uniform(*kind.depth)
        h = min(rng.uniform(*kind.height), size[2] - 0.1)
        for _ in range(6):
            if kind.against_wall and rng.uniform() < 0.9:
                side = int(rng.integers(4))
                yaw, axis = _yaw_of(side), side // 2
                half = np.array([d, w] if axis == 0 else [w, d]) / 2
                along = rng.uniform(half[1 - axis], max(size[1 - axis] - half[1 - axis], half[1 - axis] + 0.01))
                centre = np.empty(2)
                gap = d / 2 + rng.uniform(0.01, 0.06)
                centre[1 - axis], centre[axis] = along, size[axis] - gap if side % 2 else gap
                blocked = any(
                    o.side == side and (o.door or h > o.low[1])
                    and o.low[0] < along + w / 2 and along - w / 2 < o.high[0]
                    for o in openings
                )  # fmt: skip
            else:
                yaw = rng.choice([0, 0.5, 1, 1.5]) * np.pi + (rng.normal(0, 0.3) if rng.uniform() < 0.4 else 0.0)
                c, s = abs(np.cos(yaw)), abs(np.sin(yaw))
                half = np.array([c * w + s * d, s * w + c * d]) / 2
                centre = rng.uniform(half, np.maximum(size[:2] - half, half + 0.01))
                blocked = False
            low, high = centre - half, centre + half
            inside = (low > 0).all() and (high < size[:2]).all()
            if inside and not blocked and not any(f.near(low, high, 0.04) for f in placed):
                kind.make(Place(builder, np.append(centre, 0.0), float(yaw), builder.new_entity()), looks, w, d, h)
                # 0.3 m for what stands on it.
                placed.append(Footprint(low, high, ABOVE_CEILINGS if kind.to_ceiling else h + 0.3))
                break
    return placed


def _pictures(builder: SceneBuilder, looks: Looks, size: np.ndarray, openings: list[Opening]) -> None:
    """Pictures on the walls, most of them framed."""
    rng = looks.rng
    hung: list[tuple[int, Footprint]] = []  # side, and (along, z) in place of the floor's (x, y)
    for _ in range(rng.integers(2, 9)):
        side = int(rng.integers(4))
        length = size[1 - side // 2]
        w, h = rng.uniform(0.2, 1.2), rng.uniform(0.2, 0.9)
        a, z = rng.uniform(w / 2 + 0.1, length - w / 2 - 0.1), rng.uniform(1.2, 1.8)
        if z + h / 2 > size[2] - 0.1 or any(
            o.side == side and o.low[0] - 0.1 < a + w / 2 and a - w / 2 < o.high[0] + 0.1 for o in openings
        ):
            continue
        low, high = np.array([a - w / 2, z - h / 2]), np.array([a + w / 2, z + h / 2])
        if any(other == side and place.near(low, high, 0.1) for other, place in hung):
            continue
        hung.append((side, Footprint(low, high, 0.0)))
        entity, thick, rim = builder.new_entity(), rng.uniform(0.01, 0.04), rng.choice([0.0, 0.015, 0.04])
        if rim:
            box = _wall_box(size, side, a - w / 2 - rim, a + w / 2 + rim, z - h / 2 - rim, z + h / 2 + rim, -thick, 0)
            builder.wall(*box, looks.surface(), entity)
        low, high = _wall_box(size, side, a - w / 2, a + w / 2, z - h / 2, z + h / 2, -thick - 0.004, 0)
        builder.wall(low, high, looks.picture(), entity)


def _lamps(builder: SceneBuilder, looks: Looks, size: np.ndarray) -> None:
    """One or two lamps under the ceiling, hanging or flat."""
    rng = looks.rng
    count = rng.integers(1, 3)
    warm = np.array([1.0, rng.uniform(0.7, 1.0), rng.uniform(0.45, 1.05)])
    for _ in range(count):
        xy = rng.uniform(0.25, 0.75, 2) * size[:2]
        place = Place(builder, np.append(xy, size[2]), 0.0, builder.new_entity())
        if rng.uniform() < 0.5:
            drop = rng.uniform(0.25, 0.8)
            place.cylinder((0, 0, -drop), 0.006, drop, looks.metal())
            if rng.uniform() < 0.5:
                place.ball((0, 0, -drop), (0.12,) * 3, looks.glow(3.0))
            else:
                place.cylinder((0, 0, -drop - 0.1), 0.17, 0.2, looks.glow(2.0), taper=-rng.uniform(0.1, 0.6))
            at = place.point((0, 0, -drop - 0.05))
        else:
            place.box((-0.25, -0.12, -0.05), (0.25, 0.12, 0), looks.glow(3.0))
            at = place.point((0, 0, -0.15))
        builder.lights.append(
            Light(at, warm * rng.uniform(2.0, 6.0) * _area_factor(size) / count, softness=rng.uniform(1, 2.5))
        )


def _area_factor(size: np.ndarray) -> float:
    """Strength of a room's lamps, relative to that in a room of 15 square metres."""
    return float(size[0] * size[1] / 15.0)

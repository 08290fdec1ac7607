"""A random still: what people photograph from close by, on a table or on the ground, before a bare, dark or crowded
background.

In rooms cameras look at walls and furniture; here at one subject with little around it, often without texture. As with
rooms, all is a function of (seed, still); sizes are metres, though a still could as well be of another size.
"""

from colorsys import hsv_to_rgb
from dataclasses import dataclass

import numpy as np

from ddm_training.rooms.furniture import FURNITURE, Looks, put_thing
from ddm_training.rooms.scene import Room
from ddm_training.rooms.shading import shadow_map
from ddm_training.rooms.shapes import Light, Number, Place, SceneBuilder, Skin, rotation_z
from ddm_training.rooms.subjects import PLANTS, SUBJECTS, any_axes, leaf_skin, leaning

SIZE = np.array([10.0, 10.0, 4.0])  # metres, of what is around the subject
MIDDLE = np.array([5.0, 5.0])  # where the subject stands


@dataclass(frozen=True)
class Still(Room):
    """A room with a subject in the middle."""

    base: float
    """Height of what the subject stands on, metres."""
    extent: float
    """About how high and wide the subject is, metres."""


def make_still(seed: int, index: int, attempt: int = 0) -> Still:
    """Still number ``index`` of ``seed``; another one for each ``attempt``, where no camera found a view."""
    rng = np.random.default_rng([seed, index, attempt, 4])
    builder, looks = SceneBuilder(rng), Looks(rng)
    frequency = np.array([subject.frequency for subject in SUBJECTS.values()])
    subject = SUBJECTS[str(rng.choice(list(SUBJECTS), p=frequency / frequency.sum()))]
    outdoors = rng.uniform() < subject.outdoors
    size, height = rng.uniform(0.6, 1.6), 0.0
    if outdoors:
        _ground(builder, looks)
        _surroundings(builder, looks)
    else:
        height = _table(builder, looks, size)
        _backdrop(builder, looks, size)
    place = Place(builder, np.array([*MIDDLE, height]), rng.uniform(0, 2 * np.pi), builder.new_entity())
    subject.make(place, looks, size)
    for _ in range(rng.integers(0, 5)):  # smaller things around it
        turn, away = rng.uniform(0, 2 * np.pi), size * rng.uniform(0.6, 1.3)
        at = (away * np.cos(turn), away * np.sin(turn), 0.0)
        if outdoors and rng.uniform() < 0.7:
            PLANTS[rng.integers(3)](place.inner(at), looks, size * rng.uniform(0.2, 0.7))
        elif away < 0.9 * size:
            put_thing(place, looks, at, size * rng.uniform(0.1, 0.4))
    (_daylight if outdoors else _lamps)(builder, looks, height)
    warmth = np.array([1.0, rng.uniform(0.85, 1.0), rng.uniform(0.7, 1.0)])
    level = rng.uniform(0.15, 0.8)
    scene = builder.build(
        size=SIZE,
        sky=(rng.choice([0.0, rng.uniform(0.0, 3.0)]) * rng.uniform(0.8, 1.0, 3)).astype(np.float32),
        ambient_above=(level * warmth).astype(np.float32),
        ambient_below=(level * rng.uniform(0.5, 1.0) * warmth).astype(np.float32),
    )
    shadows = [shadow_map(scene, light) for light in scene.lights]
    return Still(scene, shadows, SIZE, (), (seed, index, attempt), height, size)


def _in_the_middle(builder: SceneBuilder, yaw: Number) -> Place:
    return Place(builder, np.array([*MIDDLE, 0.0]), yaw, builder.new_entity())


def _cloth(looks: Looks) -> Skin:
    """White, black or coloured, mostly without texture."""
    rng, kind = looks.rng, looks.rng.uniform()
    if kind < 0.25:
        base = np.full(3, rng.uniform(0.75, 0.97))
    elif kind < 0.5:
        base = np.full(3, rng.uniform(0.001, 0.04))
    else:
        base = looks.color((0.05, 0.95), 0.7)
    return looks.skin("plain plain plain weave grain", [*looks.shades(base, 0.1)[:2], base], (0.5, 2.0))


def _table(builder: SceneBuilder, looks: Looks, size: Number) -> float:
    """Floor, and mostly a table; returns the height of what the subject stands on."""
    rng = looks.rng
    floor = looks.floor() if rng.uniform() < 0.7 else _cloth(looks)
    builder.wall((-1, -1, -0.2), (SIZE[0] + 1, SIZE[1] + 1, 0), floor, builder.new_entity())
    if rng.uniform() < 0.25:
        return 0.0
    height, top = rng.uniform(0.5, 1.0), _cloth(looks) if rng.uniform() < 0.5 else looks.surface()
    place = _in_the_middle(builder, rng.uniform(0, 2 * np.pi))
    w, d = size * rng.uniform(0.6, 1.6, 2)
    if rng.uniform() < 0.3:
        place.cylinder((0, 0, height - 0.05), w, 0.05, top)
        place.cylinder((0, 0, 0), 0.1, height - 0.05, looks.surface())
    else:
        place.box((-w, -d, height - rng.choice([0.05, height])), (w, d, height), top)
    return float(height)


def _backdrop(builder: SceneBuilder, looks: Looks, size: Number) -> None:
    """What is behind: the walls of a room with some furniture, a hung cloth on some sides, or nothing at all."""
    rng = looks.rng
    if rng.uniform() < 0.2:
        return
    near = rng.uniform() < 0.4
    skin = _cloth(looks) if near or rng.uniform() < 0.3 else looks.wall()
    for side in range(4):
        if near and rng.uniform() < 0.3:
            continue
        away = rng.uniform(1.0, 2.0) * size if near else rng.uniform(2.0, 5.0)
        wall = _in_the_middle(builder, side * np.pi / 2)
        wall.box((-6, away, 0), (6, away + 0.1, 4.0), skin)
        if near:
            continue
        for _ in range(rng.integers(0, 3)):
            kind = FURNITURE[str(rng.choice(["shelf", "cupboard", "plant", "desk", "chair", "sofa"]))]
            w, d, h = (rng.uniform(*limits) for limits in (kind.width, kind.depth, kind.height))
            if away - d > 1.8:
                kind.make(wall.inner((rng.uniform(-2, 2), away - d / 2 - 0.05, 0)), looks, w, d, h)
        if rng.uniform() < 0.5:
            x, w, h = rng.uniform(-2, 2), rng.uniform(0.3, 1.0), rng.uniform(0.3, 1.0)
            wall.box((x, away - 0.03, 1.3), (x + w, away, 1.3 + h), looks.picture())


def _ground(builder: SceneBuilder, looks: Looks) -> None:
    """Earth, grass or paving, with stones."""
    rng = looks.rng
    if rng.uniform() < 0.6:
        base = looks.color((0.1, 0.7), 0.8)
    else:
        base = np.array(hsv_to_rgb(rng.uniform(0.05, 0.35), rng.uniform(0.1, 0.7), rng.uniform(0.1, 0.6))) ** 2.2
    skin = looks.skin("grain grain marble tiles bricks", looks.shades(base, 0.7), (0.5, 3.0))
    builder.wall((-20, -20, -0.3), (30, 30, 0), skin, builder.new_entity())
    for _ in range(rng.integers(0, 40)):
        xy, r = MIDDLE + rng.normal(0, 1.6, 2), rng.uniform(0.02, 0.15)
        stone = Place(builder, np.array([*xy, 0.0]), 0.0, builder.new_entity())
        radii, look = r * rng.uniform(0.5, 1.2, 3), looks.thing() if rng.uniform() < 0.3 else skin
        stone.ball((0, 0, 0.3 * r), radii, look, axes=rotation_z(rng.uniform(0, 3)))


def _surroundings(builder: SceneBuilder, looks: Looks) -> None:
    """Hedges, trees, fences and fronts of houses around a garden, each on some sides."""
    rng = looks.rng
    for side in range(4):
        away = rng.uniform(2.0, 8.0)
        wall, kind = _in_the_middle(builder, side * np.pi / 2 + rng.normal(0, 0.2)), rng.uniform()
        if kind < 0.35:
            top = rng.choice([rng.uniform(0.8, 2.5), 7.0])
            base = looks.color((0.2, 0.9), 0.5)
            front = looks.skin("bricks grain planks plain tiles", looks.shades(base, 0.5), (0.6, 3.0))
            wall.box((-8, away, 0), (8, away + 0.3, top), front)
            if top > 3:
                for x in np.arange(-5, 5, rng.uniform(1.2, 2.5)):
                    wall.box((x, away - 0.08, 0.8), (x + 0.8, away + 0.05, 2.0), looks.metal())
        elif kind < 0.8:
            skins = [leaf_skin(looks) for _ in range(3)]
            tall, deep = rng.uniform(0.6, 3.5), rng.uniform(0.3, 1.2)
            for _ in range(rng.integers(40, 120)):
                at = (rng.uniform(-5, 5), away + deep * rng.uniform(-1, 1), tall * rng.uniform(0, 1) ** 0.7)
                radii = rng.uniform(0.1, 0.5) * rng.uniform([0.5, 0.3, 0.1], [1.2, 1.0, 0.6])
                wall.ball(at, radii, skins[rng.integers(3)], axes=any_axes(rng))
        for _ in range(rng.integers(0, 3)):  # trunks and posts
            foot = (rng.uniform(-3, 3), away - rng.uniform(0, 1.5), 0)
            wall.cylinder(foot, rng.uniform(0.03, 0.25), rng.uniform(1, 5), looks.wood(), taper=-0.1)


def _daylight(builder: SceneBuilder, looks: Looks, height: Number) -> None:
    """The sun from one side, or an overcast sky."""
    rng = looks.rng
    middle, sun = np.array([*MIDDLE, height + 0.4]), leaning(rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 1.3))[:, 0]
    if rng.uniform() < 0.7:
        color = np.array([1.0, 0.95, 0.85]) * rng.uniform(0.5, 3.0)
        builder.lights.append(Light(middle + 8 * sun, color, middle, 0.45, softness=1.5))


def _lamps(builder: SceneBuilder, looks: Looks, height: Number) -> None:
    """Up to two, above the subject."""
    rng = looks.rng
    middle = np.array([*MIDDLE, height + 0.4])
    for _ in range(rng.integers(0, 3)):
        color = np.array([1.0, rng.uniform(0.8, 1.0), rng.uniform(0.6, 1.0)]) * rng.uniform(1.0, 6.0)
        at = middle + rng.uniform(1.5, 3.0) * leaning(rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 1.4))[:, 0]
        builder.lights.append(Light(at, color, softness=rng.uniform(1, 3)))

"""What a still shows: models of houses, figures, plants, things on a table. Every maker draws a subject into a `Place`,
about ``size`` metres wide and high."""

from collections.abc import Callable
from colorsys import hsv_to_rgb
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from ddm_training.rooms.furniture import FURNITURE, Looks, put_thing
from ddm_training.rooms.shapes import BOX, Number, Place, Skin, rotation_z

UPRIGHT = np.array([[0.0, 0, 1], [0, 1, 0], [-1, 0, 0]])  # turns a cylinder's z axis into the first of other axes


def leaning(yaw: Number, pitch: Number) -> Float[np.ndarray, "3 3"]:
    """Axes whose first one points ``pitch`` radians up into the direction ``yaw``, as columns."""
    c, s = np.cos(pitch), np.sin(pitch)
    return rotation_z(yaw) @ np.array([[c, 0, -s], [0, 1, 0], [s, 0, c]])


def rolled(angle: Number) -> Float[np.ndarray, "3 3"]:
    """Axes turned about the first one, as columns."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[1.0, 0, 0], [0, c, -s], [0, s, c]])


def any_axes(rng: np.random.Generator) -> Float[np.ndarray, "3 3"]:
    """Axes in any direction, as columns."""
    return leaning(rng.uniform(0, 2 * np.pi), rng.uniform(-1.4, 1.4))


def leaf_skin(looks: Looks) -> Skin:
    """Mostly green."""
    rng = looks.rng
    hue = rng.uniform(0.17, 0.42) if rng.uniform() < 0.8 else rng.uniform()
    color = np.array(hsv_to_rgb(hue, rng.uniform(0.2, 0.8), rng.uniform(0.15, 0.8))) ** 2.2
    shades = [color, color * rng.uniform(0.4, 0.9), np.clip(color * 1.4, 0, 0.95)]
    return looks.skin("marble grain plain", shades, (0.1, 0.5), specular=rng.uniform(0, 0.3))


# The subjects.


def house(place: Place, looks: Looks, size: Number) -> None:
    """A model of a house: one to three bodies with windows, roofs and chimneys."""
    rng = looks.rng
    walls, roof, frame, glass = looks.wall(), looks.surface(), looks.paint(), looks.metal()
    t = 0.01 * size
    for _ in range(rng.integers(1, 4)):
        w, d, h = size * rng.uniform([0.3, 0.25, 0.25], [0.7, 0.5, 0.8])
        part = place.inner((*(0.25 * size * rng.uniform(-1, 1, 2)), 0), rng.choice([0.0, np.pi / 2]))
        part.box((-w / 2, -d / 2, 0), (w / 2, d / 2, h), walls)
        _roof(part, w, d, h, rng.uniform(0.3, 0.9), t, roof, walls)
        columns, rows = rng.integers(2, 6), rng.integers(1, 5)
        for i in range(columns):
            for j in range(rows):
                x, z = w * ((i + 0.5) / columns - 0.5), h * (j + 0.55) / rows
                a, b = 0.28 * w / columns, 0.3 * h / rows
                for y in (-d / 2, d / 2):
                    part.box((x - a, y - 1.2 * t, z - b), (x + a, y + 1.2 * t, z + b), frame)
                    part.box((x - 0.8 * a, y - 1.4 * t, z - 0.8 * b), (x + 0.8 * a, y + 1.4 * t, z + 0.8 * b), glass)
        if rng.uniform() < 0.5:
            x = 0.3 * w * rng.uniform(-1, 1)
            top = h + 0.4 * size * rng.uniform(0.5, 1)
            part.box((x - 4 * t, 0, h), (x + 4 * t, 8 * t, top), walls)


def _roof(part: Place, w: Number, d: Number, h: Number, slope: Number, t: Number, roof: Skin, walls: Skin) -> None:
    """Two boards on a body of w x d x h that lean against each other, over a low wall at each end."""
    half = 0.56 * d / np.cos(slope)
    for side in (-1, 1):
        centre = (0.0, side * 0.28 * d, h + 0.28 * d * np.tan(slope) * 0.9)
        axes = part.axes @ rolled(-side * slope)
        part.builder.add(BOX, part.point(centre), (0.54 * w, half / 2, 1.2 * t), axes, roof, part.entity)
    for end in (-(w / 2 - t), w / 2 - t):
        part.box((end - t, -d / 4, h), (end + t, d / 4, h + 0.2 * d * np.tan(slope)), walls)


def figure(place: Place, looks: Looks, size: Number) -> None:
    """A statue, toy or animal: a body of one material with limbs, sometimes on a plinth."""
    rng = looks.rng
    if rng.uniform() < 0.2:
        skin = looks.metal()
    else:
        shades = looks.shades(looks.color(), 0.3)
        skin = looks.skin("plain plain grain marble", shades, (0.2, 1.0), specular=rng.uniform(0, 0.4))
    base = 0.0
    if rng.uniform() < 0.5:
        base = size * rng.uniform(0.1, 0.4)
        a = size * rng.uniform(0.2, 0.4)
        if rng.uniform() < 0.5:
            place.box((-a, -a, 0), (a, a, base), looks.wall())
        else:
            place.cylinder((0, 0, 0), a, base, looks.surface(), taper=rng.uniform(-0.2, 0.1))
    tall = size - 0.6 * base
    at = np.array([0.0, 0.0, base + 0.3 * tall])
    radius = tall * rng.uniform(0.14, 0.25)
    for _ in range(rng.integers(3, 8)):  # the trunk, from below
        radii = radius * rng.uniform(0.6, 1.3, 3)
        place.ball(at, radii, skin, axes=any_axes(rng))
        for _ in range(rng.integers(0, 3)):
            axes, length = leaning(rng.uniform(0, 2 * np.pi), rng.uniform(-1.3, 0.8)), tall * rng.uniform(0.1, 0.28)
            limb = at + axes @ [0.8 * length + 0.5 * radius, 0, 0]
            place.ball(limb, (length, 0.35 * radius, 0.35 * radius), skin, axes=axes)
        at = at + radius * rng.normal(0, [0.35, 0.35, 0.1]) + [0, 0, 0.6 * radius]
        radius *= rng.uniform(0.75, 1.0)
    place.cylinder((0, 0, base), 0.8 * radius, 0.35 * tall, skin)


def shrub(place: Place, looks: Looks, size: Number) -> None:
    """Leaves in all directions about twigs, sometimes with flowers."""
    rng = looks.rng
    skins = [leaf_skin(looks) for _ in range(rng.integers(1, 4))]
    petals, wood = looks.thing(), looks.wood()
    length = size * rng.uniform(0.05, 0.16)
    wide, flowers = rng.uniform(0.25, 0.7), rng.uniform(0, 0.25) if rng.uniform() < 0.5 else 0.0
    for _ in range(rng.integers(4, 14)):
        yaw, pitch, reach = rng.uniform(0, 2 * np.pi), rng.uniform(0.3, 1.5), size * rng.uniform(0.4, 1.0)
        axes = leaning(yaw, pitch)
        place.cylinder((0, 0, 0), 0.008 * size, reach, wood, axes=axes @ UPRIGHT)
        for _ in range(rng.integers(6, 24)):
            root = axes @ [reach * rng.uniform(0.25, 1.0), 0, 0]
            if rng.uniform() < flowers:
                face = any_axes(rng)
                for turn in np.arange(5) * 2 * np.pi / 5:
                    petal = face @ rotation_z(turn)
                    radii = (0.4 * length, 0.25 * length, 0.05 * length)
                    place.ball(root + petal @ [0.4 * length, 0, 0], radii, petals, axes=petal)
                continue
            leaf = leaning(rng.uniform(0, 2 * np.pi), rng.uniform(-0.8, 1.2)) @ rolled(rng.normal(0, 0.5))
            skin = skins[rng.integers(len(skins))]
            place.ball(root + leaf @ [length, 0, 0], (length, wide * length, 0.04 * length), skin, axes=leaf)


def fronds(place: Place, looks: Looks, size: Number) -> None:
    """Arched stalks with leaves on both sides, as of a fern or a palm; or blades of grass."""
    rng = looks.rng
    skin, grass = leaf_skin(looks), rng.uniform() < 0.3
    thin, wide = 0.006 * size, (0.04 if grass else 0.02) * size
    for _ in range(rng.integers(5, 14)):
        yaw, pitch = rng.uniform(0, 2 * np.pi), rng.uniform(0.8, 1.5)
        at, step, bend = np.zeros(3), size * rng.uniform(0.06, 0.12), rng.uniform(0.05, 0.22)
        count = rng.integers(8, 16)
        for i in range(count):
            axes = leaning(yaw, pitch)
            place.ball(at + axes @ [0.5 * step, 0, 0], (0.6 * step, wide, thin), skin, axes=axes)
            leaf = size * 0.16 * np.sin(np.pi * (i + 1) / (count + 1)) + 0.02 * size
            for side in () if grass else (-1, 1):
                twist = axes @ rotation_z(side * rng.uniform(1.0, 1.4))
                place.ball(at + twist @ [leaf / 2, 0, 0], (leaf / 2, 0.18 * leaf, thin), skin, axes=twist)
            at = at + axes @ [step, 0, 0]
            pitch -= bend


def bouquet(place: Place, looks: Looks, size: Number) -> None:
    """A large flower or a few, in a vase or from the ground."""
    rng = looks.rng
    vase = 0.0
    if rng.uniform() < 0.6:
        vase = size * rng.uniform(0.2, 0.4)
        place.cylinder((0, 0, 0), 0.4 * vase, vase, looks.thing(), taper=rng.uniform(-0.4, 0.4))
    root = np.array([0, 0, vase])
    stem, leaf, heart = leaf_skin(looks), leaf_skin(looks), looks.thing()
    for _ in range(rng.integers(1, 8)):
        yaw, pitch, reach = rng.uniform(0, 2 * np.pi), rng.uniform(0.7, 1.55), (size - vase) * rng.uniform(0.6, 1.0)
        axes, petals = leaning(yaw, pitch), looks.thing()
        place.cylinder(root, 0.01 * size, reach, stem, axes=axes @ UPRIGHT)
        head, radius, count = root + axes @ [reach, 0, 0], size * rng.uniform(0.08, 0.25), rng.integers(5, 14)
        for ring in range(rng.integers(1, 4)):
            for turn in np.arange(count) * 2 * np.pi / count + ring:
                petal = axes @ UPRIGHT @ leaning(turn, 0.15 + 0.35 * ring)
                r = radius * (1 - 0.2 * ring)
                place.ball(head + petal @ [0.55 * r, 0, 0], (0.5 * r, 1.8 * r / count, 0.03 * r), petals, axes=petal)
        place.ball(head, (0.25 * radius,) * 3, heart)
        for _ in range(rng.integers(0, 4)):
            blade, length = leaning(rng.uniform(0, 2 * np.pi), rng.uniform(0, 1)), size * rng.uniform(0.1, 0.25)
            at = root + axes @ [reach * rng.uniform(0.1, 0.8), 0, 0] + blade @ [length, 0, 0]
            place.ball(at, (length, 0.35 * length, 0.02 * length), leaf, axes=blade)


def things(place: Place, looks: Looks, size: Number) -> None:
    """Boxes, cans, bottles, books and balls beside each other."""
    rng = looks.rng
    for _ in range(rng.integers(2, 9)):
        at = (*(0.45 * size * rng.uniform(-1, 1, 2)), 0.0)
        if rng.uniform() < 0.4:
            w, d, h = size * rng.uniform(0.1, [0.35, 0.25, 0.6])
            skin = looks.picture() if rng.uniform() < 0.6 else looks.thing()
            place.inner(at, rng.uniform(-np.pi, np.pi)).box((-w / 2, -d / 2, 0), (w / 2, d / 2, h), skin)
        elif rng.uniform() < 0.4:
            radius, height = size * rng.uniform(0.05, 0.15), size * rng.uniform(0.15, 0.5)
            place.inner(at).cylinder((0, 0, 0), radius, height, looks.picture(), taper=rng.uniform(-0.2, 0.2))
        else:
            put_thing(place, looks, at, size * rng.uniform(0.3, 0.9))


def heap(place: Place, looks: Looks, size: Number) -> None:
    """Fruit, stones or bricks in a heap."""
    rng = looks.rng
    skins, radius = [looks.thing() for _ in range(rng.integers(1, 4))], size * rng.uniform(0.06, 0.16)
    boxes = rng.uniform() < 0.3
    for _ in range(rng.integers(8, 45)):
        r, turn = 0.45 * size * np.sqrt(rng.uniform()), rng.uniform(0, 2 * np.pi)
        top = max(0.6 * size * (1 - r / (0.5 * size)) * rng.uniform(0.3, 1), radius)
        radii, axes = radius * rng.uniform(0.7, 1.2, 3), any_axes(rng)
        at = (r * np.cos(turn), r * np.sin(turn), top)
        skin = skins[rng.integers(len(skins))]
        if boxes:
            place.builder.add(BOX, place.point(at), radii, place.axes @ axes, skin, place.entity)
        else:
            place.ball(at, radii, skin, axes=axes)


def piece(place: Place, looks: Looks, size: Number) -> None:
    """A piece of furniture, of its own size."""
    rng = looks.rng
    names = ["chair", "stool", "shelf", "cupboard", "stack", "plant", "desk", "sofa", "table"]
    kind = FURNITURE[str(rng.choice(names))]
    kind.make(place, looks, rng.uniform(*kind.width), rng.uniform(*kind.depth), rng.uniform(*kind.height))


@dataclass(frozen=True)
class Subject:
    """A kind of subject."""

    make: Callable[[Place, Looks, Number], None]
    """Draws one of a given size."""
    frequency: float
    """How common it is, relative to the others."""
    outdoors: float = 0.3
    """Share of those that are outdoors."""


PLANTS = (shrub, fronds, bouquet)

SUBJECTS = {
    "house": Subject(house, 1.5),
    "figure": Subject(figure, 3.0),
    "shrub": Subject(shrub, 2.5, outdoors=0.6),
    "fronds": Subject(fronds, 1.5, outdoors=0.6),
    "bouquet": Subject(bouquet, 1.5, outdoors=0.6),
    "things": Subject(things, 3.0),
    "heap": Subject(heap, 1.5),
    "piece": Subject(piece, 1.5, outdoors=0.6),
}

"""Surfaces and objects of a room. Every maker draws an object into a `Place`: x is its width, y its depth (back at
+depth / 2), z up from the floor; sizes are metres of real furniture."""

from collections.abc import Callable
from colorsys import hsv_to_rgb
from dataclasses import dataclass

import numpy as np

from ddm_training.rooms.shapes import Light, Number, Place, Point, Skin, rotation_z
from ddm_training.rooms.textures import texture_bank

ABOVE_CEILINGS = 4.0  # metres; no room is that high


class Looks:
    """Materials of one room: colours share a few hues, as in furnished rooms."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.hues = rng.uniform(size=3)
        self.muted = rng.uniform(0.15, 1.0)
        self.wood_hue = rng.uniform(0.03, 0.11)

    def color(self, value: tuple[Number, Number] = (0.05, 0.95), saturation: Number = 1.0) -> np.ndarray:
        """A linear colour, mostly near one of the room's hues."""
        rng = self.rng
        hue = (rng.choice(self.hues) + rng.normal(0, 0.03)) % 1 if rng.uniform() < 0.8 else rng.uniform()
        sat = float(min(rng.beta(1.2, 2.0) * saturation * self.muted, 1.0))
        return np.array(hsv_to_rgb(hue, sat, rng.uniform(*value))) ** 2.2

    def skin(
        self,
        kinds: str,
        colors: list[np.ndarray],
        tile: tuple[float, float],
        *,
        specular: Number = 0.0,
        emission: Number = 0.0,
    ) -> Skin:
        """A surface with a random texture.

        Args:
            kinds: kinds of texture to choose from, apart by blanks; one that is named twice is twice as likely.
            colors: three linear colours.
            tile: least and most metres after which the texture repeats, both ways alike.
            specular: strength of highlights.
            emission: what the surface shines with itself, in units of its first colour.
        """
        rng = self.rng
        size = float(np.exp(rng.uniform(*np.log(tile))))
        texture = int(rng.choice(texture_bank().of_kind(str(rng.choice(kinds.split())))))
        palette = np.stack(colors).astype(np.float32)
        return Skin(texture, palette, (size, size), bool(rng.uniform() < 0.5), specular, emission)

    def shades(self, base: np.ndarray, spread: Number) -> list[np.ndarray]:
        """A colour, one lighter or darker by a factor of up to exp(``spread``), and its mean with another colour."""
        factor = np.exp(self.rng.uniform(-spread, spread))
        return [base, np.clip(base * factor, 0, 0.95), np.clip(0.5 * base + 0.5 * self.color(), 0, 0.95)]

    def paint(self, value: tuple[Number, Number] = (0.5, 0.95)) -> Skin:
        return self.skin("plain plain grain", self.shades(self.color(value, 0.6), 0.2), (0.5, 3.0))

    def wall(self) -> Skin:
        rng, kind = self.rng, self.rng.uniform()
        base = self.color((0.45, 0.97), 0.5)
        if kind < 0.6:
            return self.skin("plain plain grain", self.shades(base, 0.15), (0.8, 4.0))
        if kind < 0.72:
            return self.skin("bricks", [base, base * 0.6, self.color((0.4, 0.9), 0.2)], (0.7, 1.4))
        if kind < 0.82:
            return self.skin("tiles", [base, base * 0.85, self.color((0.3, 0.95), 0.2)], (0.5, 1.5), specular=0.2)
        skin = self.skin("stripes dots plaid", self.shades(base, 0.5), (0.25, 1.2))
        return Skin(skin.texture, skin.palette, skin.tile, False, specular=0.03 * rng.uniform())

    def floor(self) -> Skin:
        kind = self.rng.uniform()
        if kind < 0.5:
            return self.wood(tile=(0.6, 1.6), specular=self.rng.uniform(0, 0.25), planks=True)
        if kind < 0.75:
            shades = [*self.shades(self.color((0.2, 0.9), 0.5), 0.8)[:2], self.color((0.1, 0.8), 0.2)]
            return self.skin("tiles checker marble", shades, (0.8, 2.2), specular=self.rng.uniform(0, 0.4))
        return self.skin("grain grain plain weave dots", self.shades(self.color((0.2, 0.8)), 0.4), (0.3, 1.5))

    def wood(
        self, tile: tuple[float, float] = (0.5, 2.0), specular: Number | None = None, planks: bool = False
    ) -> Skin:
        rng = self.rng
        base = np.array(hsv_to_rgb(self.wood_hue + rng.normal(0, 0.01), rng.uniform(0.25, 0.7), rng.uniform(0.2, 0.85)))
        base = base**2.2
        dark = base * rng.uniform(0.35, 0.8)
        shine = rng.uniform(0, 0.15) if specular is None else specular
        kinds = "planks" if planks else "planks planks plain marble"
        return self.skin(kinds, [base, dark, dark * 0.4], tile, specular=shine)

    def surface(self) -> Skin:
        """Painted or wooden."""
        return self.wood() if self.rng.uniform() < 0.55 else self.paint((0.15, 0.95))

    def fabric(self) -> Skin:
        kinds = "plain grain weave weave stripes plaid dots"
        return self.skin(kinds, self.shades(self.color((0.1, 0.9)), 0.7), (0.15, 1.0))

    def metal(self) -> Skin:
        grey = np.full(3, self.rng.uniform(0.02, 0.6))
        return self.skin("plain", [grey, grey * 0.9, grey], (1.0, 2.0), specular=self.rng.uniform(0.2, 0.8))

    def thing(self) -> Skin:
        """Any small object: any colour."""
        base = self.color((0.1, 1.0), 2.0)
        kinds = "plain plain grain marble stripes checker dots"
        return self.skin(kinds, self.shades(base, 1.0), (0.08, 0.5), specular=self.rng.uniform(0, 0.5))

    def picture(self) -> Skin:
        """A poster stretched over the largest face; the palette mixes the picture's channels."""
        mix = np.eye(3) * 0.8 + self.rng.uniform(0, 0.2, size=(3, 3))
        skin = self.skin("picture", list(mix), (1.0, 1.0), specular=0.1 * self.rng.uniform())
        return Skin(skin.texture, skin.palette, (0.0, 0.0), False, skin.specular)

    def spines(self, width: float) -> Skin:
        """Book spines, or clothes on a rail, that repeat after ``width`` metres."""
        mix = np.eye(3) * 0.6 + self.rng.uniform(0, 0.25, size=(3, 3))
        skin = self.skin("spines", list(mix), (width, width))
        return Skin(skin.texture, skin.palette, (width, 0.3), False)

    def glow(self, strength: Number) -> Skin:
        warm = np.array([1.0, self.rng.uniform(0.75, 1.0), self.rng.uniform(0.5, 1.0)])
        return self.skin("plain", [warm, warm, warm], (1.0, 1.0), emission=strength)


# Small things, standing at (x, y, z) of a place.


def put_thing(place: Place, looks: Looks, at: Point, size: Number) -> None:
    """A box, ball, vase, bottle, egg or plant of about ``size`` metres, or a pile of books."""
    rng = looks.rng
    inner = place.inner(at, rng.uniform(-np.pi, np.pi))
    skin, a, b = looks.thing(), size * rng.uniform(0.2, 0.5), size * rng.uniform(0.4, 1.0)
    kind = rng.integers(7)
    if kind == 0:
        inner.box((-a, -a * rng.uniform(0.4, 1), 0), (a, a * 0.7, b), skin)
    elif kind == 1:
        inner.ball((0, 0, a), (a, a, a), skin)
    elif kind == 2:
        inner.cylinder((0, 0, 0), 0.6 * a, b, skin, taper=rng.uniform(-0.5, 0.5))
    elif kind == 3:
        inner.cylinder((0, 0, 0), 0.5 * a, 0.6 * b, skin)
        inner.cylinder((0, 0, 0.6 * b), 0.2 * a, 0.4 * b, skin)
    elif kind == 4:
        put_plant(inner, looks, size)
    elif kind == 5:
        inner.ball((0, 0, b / 2), (0.6 * a, 0.6 * a, b / 2), skin)
    else:
        height = 0.0
        for _ in range(rng.integers(1, 5)):
            w, thick = rng.uniform(0.08, 0.14), rng.uniform(0.015, 0.05)
            inner.inner((0, 0, height), rng.uniform(-0.3, 0.3)).box(
                (-w, -0.7 * w, 0), (w, 0.7 * w, thick), looks.thing()
            )
            height += thick


def put_plant(place: Place, looks: Looks, size: Number, reach: Number = 1.0) -> None:
    """A pot with a few leaves, flat ellipsoids in all directions that stay within ``reach`` metres of the middle."""
    rng = looks.rng
    pot = rng.uniform(0.2, 0.35) * size
    place.cylinder((0, 0, 0), 0.55 * pot, pot, looks.thing(), taper=0.2)
    green = np.array(hsv_to_rgb(rng.uniform(0.2, 0.4), rng.uniform(0.3, 0.75), rng.uniform(0.2, 0.6))) ** 2.2
    leaf = looks.skin("marble grain", [green, green * 0.5, green * 1.2], (0.1, 0.5))
    for _ in range(rng.integers(5, 12)):
        yaw, pitch, length = rng.uniform(0, 2 * np.pi), rng.uniform(0.2, 1.4), rng.uniform(0.2, 0.45) * size
        length = min(length, reach / (2 * np.cos(pitch)))
        c, s = np.cos(pitch), np.sin(pitch)
        axes = rotation_z(yaw) @ np.array([[c, 0, -s], [0, 1, 0], [s, 0, c]])
        middle = axes @ np.array([length, 0, 0])
        place.ball(middle + np.array([0, 0, pot]), (length, 0.3 * length, 0.015 * size + 0.004), leaf, axes=axes)


def scatter(
    place: Place, looks: Looks, width: Number, depth: Number, z: Number, count: int | np.integer, size: Number
) -> None:
    """Things of about ``size`` metres on a board of width x depth at height z."""
    rng = looks.rng
    for _ in range(count):
        at = (rng.uniform(-0.4, 0.4) * width, rng.uniform(-0.35, 0.35) * depth, z)
        put_thing(place, looks, at, size * rng.uniform(0.5, 1.2))


# Furniture, of a width w, depth d and height h that are drawn before, see `FURNITURE`; what stands on it comes on top.


def table(place: Place, looks: Looks, w: Number, d: Number, h: Number) -> None:
    rng, top, legs = looks.rng, looks.surface(), looks.surface()
    thick, leg = rng.uniform(0.02, 0.06), rng.uniform(0.02, 0.05)
    if rng.uniform() < 0.2:
        place.cylinder((0, 0, h - thick), min(w, d) / 2, thick, top)
        place.cylinder((0, 0, 0), 0.04, h - thick, legs)
        place.cylinder((0, 0, 0), 0.25, 0.03, legs)
    else:
        place.box((-w / 2, -d / 2, h - thick), (w / 2, d / 2, h), top)
        for x in (-w / 2 + leg, w / 2 - leg):
            for y in (-d / 2 + leg, d / 2 - leg):
                place.box((x - leg, y - leg, 0), (x + leg, y + leg, h - thick), legs)
    scatter(place, looks, w, d, h, rng.integers(0, 6), 0.3)


def desk(place: Place, looks: Looks, w: Number, d: Number, h: Number) -> None:
    rng = looks.rng
    table(place, looks, w, d, h)
    side, drawers = rng.choice([-1, 1]), looks.surface()
    x = side * (w / 2 - 0.22)
    place.box((x - 0.18, -d / 2 + 0.05, 0.05), (x + 0.18, d / 2 - 0.05, h - 0.06), drawers)
    screen, wide = place.inner((rng.uniform(-0.2, 0.2), d / 4, h), rng.uniform(-0.3, 0.3)), rng.uniform(0.22, 0.4)
    screen.box((-0.1, -0.08, 0), (0.1, 0.08, 0.015), looks.metal())
    screen.box((-0.02, -0.01, 0), (0.02, 0.01, 0.15), looks.metal())
    screen.box((-wide, -0.02, 0.1), (wide, 0.02, 0.12 + 1.2 * wide), looks.metal())
    screen.box((-wide + 0.015, -0.023, 0.115), (wide - 0.015, -0.02, 0.105 + 1.2 * wide), looks.picture())


def chair(place: Place, looks: Looks, w: Number, d: Number, h: Number) -> None:
    rng, wood, seat = looks.rng, looks.surface(), looks.fabric()
    z, leg = 0.45, 0.02
    place.box((-w / 2, -d / 2, z - 0.04), (w / 2, d / 2, z), seat)
    for x in (-w / 2 + leg, w / 2 - leg):
        place.box((x - leg, -d / 2, 0), (x + leg, -d / 2 + 2 * leg, z - 0.04), wood)
        place.box((x - leg, d / 2 - 2 * leg, 0), (x + leg, d / 2, h), wood)
    if rng.uniform() < 0.5:
        place.box((-w / 2, d / 2 - 0.04, z + 0.12), (w / 2, d / 2, h), seat, tilt=-0.06)
    else:
        for bar in np.arange(z + 0.15, h, rng.uniform(0.1, 0.18)):
            place.box((-w / 2, d / 2 - 0.03, bar), (w / 2, d / 2 - 0.01, bar + 0.05), wood)


def sofa(place: Place, looks: Looks, w: Number, d: Number, h: Number) -> None:
    rng, cloth = looks.rng, looks.fabric()
    seat, arm = rng.uniform(0.38, 0.46), rng.uniform(0.1, 0.25)
    place.box((-w / 2, -d / 2, 0.08), (w / 2, d / 2, seat - 0.12), cloth)
    place.box((-w / 2, d / 2 - 0.22, 0.1), (w / 2, d / 2, h), cloth)
    for side in (-1, 1):
        x = side * (w / 2 - arm / 2)
        place.box((x - arm / 2, -d / 2, 0.1), (x + arm / 2, d / 2 - 0.1, seat + 0.18), cloth)
    count = max(1, round((w - 2 * arm) / 0.7))
    step = (w - 2 * arm) / count
    for i in range(count):
        x = -w / 2 + arm + i * step
        place.box((x + 0.01, -d / 2 - 0.02, seat - 0.12), (x + step - 0.01, d / 2 - 0.2, seat), cloth)
        if rng.uniform() < 0.6:
            at = (x + step / 2, d / 2 - 0.32, seat + 0.2)
            place.ball(at, (0.22, 0.11, 0.2), looks.fabric(), axes=rotation_z(rng.uniform(-0.4, 0.4)))


def bed(place: Place, looks: Looks, w: Number, d: Number, h: Number) -> None:
    rng, wood, cloth = looks.rng, looks.surface(), looks.fabric()
    place.box((-w / 2, -d / 2, 0.12), (w / 2, d / 2, 0.32), wood)
    place.box((-w / 2 + 0.03, -d / 2 + 0.03, 0.32), (w / 2 - 0.03, d / 2 - 0.05, 0.5), looks.paint((0.7, 1.0)))
    place.box((-w / 2 - 0.02, -d / 2 - 0.02, 0.35), (w / 2 + 0.02, d / 2 - rng.uniform(0.5, 1.0), 0.55), cloth)
    place.box((-w / 2, d / 2 - 0.06, 0), (w / 2, d / 2, h), wood)
    for x in (-w / 4, w / 4) if w > 1.3 else (0,):
        place.ball((x, d / 2 - 0.3, 0.56), (0.33, 0.2, 0.1), looks.fabric())


def shelf(place: Place, looks: Looks, w: Number, d: Number, h: Number) -> None:
    rng, wood = looks.rng, looks.surface()
    t = rng.uniform(0.015, 0.035)
    for x in (-w / 2, w / 2 - t):
        place.box((x, -d / 2, 0), (x + t, d / 2, h), wood)
    if rng.uniform() < 0.75:
        place.box((-w / 2, d / 2 - 0.01, 0), (w / 2, d / 2, h), looks.surface())
    boards = max(2, round(h / rng.uniform(0.3, 0.45)))
    gap = (h - t) / boards
    for i in range(boards + 1):
        z = i * gap
        place.box((-w / 2, -d / 2, z), (w / 2, d / 2, z + t), wood)
        if i == boards:
            break
        x, end = -w / 2 + t + 0.01, w / 2 - t - 0.01
        while x < end - 0.05 and rng.uniform() < 0.9:
            kind, room = rng.uniform(), end - x
            if kind < 0.45:
                wide = min(rng.uniform(0.15, 0.6), room)
                tall = gap * rng.uniform(0.55, 0.85)
                place.inner((x, 0, z + t)).box(
                    (0, -d / 2 + 0.03, 0), (wide, d / 2 - 0.04, tall), looks.spines(float(wide))
                )
                x += wide
            elif kind < 0.6:
                for _ in range(rng.integers(2, 5)):
                    wide = rng.uniform(0.02, 0.06)
                    if x + wide < end:
                        tall = gap * rng.uniform(0.5, 0.85)
                        place.box((x, -d / 2 + rng.uniform(0.02, 0.06), z + t), (x + wide, d / 2 - 0.04, z + t + tall),
                                  looks.thing())  # fmt: skip
                        x += wide
            elif kind < 0.85:
                size = min(gap * 0.8, room, 0.3)
                put_thing(place, looks, (x + size / 2, 0, z + t), size)
                x += size
            x += rng.uniform(0, 0.25)


def cupboard(place: Place, looks: Looks, w: Number, d: Number, h: Number) -> None:
    """A closed body with doors or drawers, knobs, and things on top."""
    rng, body, front, knob = looks.rng, looks.surface(), looks.surface(), looks.metal()
    place.box((-w / 2, -d / 2, rng.choice([0.0, 0.1])), (w / 2, d / 2, h), body)
    columns, rows = max(1, round(w / rng.uniform(0.4, 0.6))), 1 if h > 1.4 else rng.integers(1, 4)
    for i in range(columns):
        for j in range(rows):
            x0, x1 = -w / 2 + i * w / columns + 0.015, -w / 2 + (i + 1) * w / columns - 0.015
            z0, z1 = 0.12 + j * (h - 0.14) / rows, 0.12 + (j + 1) * (h - 0.14) / rows - 0.02
            place.box((x0, -d / 2 - 0.02, z0), (x1, -d / 2, z1), front)
            middle = (x0 + x1) / 2 if rows > 1 else (x1 - 0.05 if i % 2 == 0 else x0 + 0.05)
            if rng.uniform() < 0.9:
                place.ball((middle, -d / 2 - 0.035, (z0 + z1) / 2), (0.018, 0.018, 0.018), knob)
    if h < 1.6:
        scatter(place, looks, w, d, h, rng.integers(0, 5), 0.35)


def floor_lamp(place: Place, looks: Looks, w: Number, d: Number, h: Number) -> None:
    rng, metal = looks.rng, looks.metal()
    place.cylinder((0, 0, 0), 0.14, 0.02, metal)
    place.cylinder((0, 0, 0), rng.uniform(0.008, 0.018), h - 0.1, metal)
    skin = looks.glow(rng.uniform(1.0, 3.0)) if rng.uniform() < 0.5 else looks.fabric()
    place.cylinder((0, 0, h - 0.3), rng.uniform(0.12, 0.2), 0.3, skin, taper=-rng.uniform(0.0, 0.4))
    if skin.emission:
        place.builder.lights.append(Light(place.point((0, 0, h - 0.15)), skin.palette[0] * rng.uniform(1, 3)))


def plant(place: Place, looks: Looks, w: Number, d: Number, h: Number) -> None:
    put_plant(place, looks, h, reach=w / 2)


def column(place: Place, looks: Looks, w: Number, d: Number, h: Number) -> None:
    """A pillar or a pole."""
    if looks.rng.uniform() < 0.5:
        place.cylinder((0, 0, 0), w / 2, ABOVE_CEILINGS, looks.paint())
    else:
        place.box((-w / 2, -w / 2, 0), (w / 2, w / 2, ABOVE_CEILINGS), looks.wall())


def stack(place: Place, looks: Looks, w: Number, d: Number, h: Number) -> None:
    """Boxes on top of each other, each turned a little."""
    z, rng = 0.0, looks.rng
    while z < h:
        size, tall = rng.uniform(0.5, 0.95) * min(w, d) / 2, rng.uniform(0.15, 0.45)
        skin = looks.surface() if rng.uniform() < 0.5 else looks.thing()
        place.inner((0, 0, z), rng.uniform(-0.5, 0.5)).box((-size, -0.8 * size, 0), (size, 0.8 * size, tall), skin)
        z += tall


def stool(place: Place, looks: Looks, w: Number, d: Number, h: Number) -> None:
    """A round seat on three legs, or a pouffe."""
    rng, skin = looks.rng, looks.fabric()
    if rng.uniform() < 0.4:
        place.ball((0, 0, 0.22), (0.3, 0.3, 0.22), skin)
        return
    place.cylinder((0, 0, h - 0.05), w / 2, 0.05, skin)
    wood = looks.surface()
    for turn in np.arange(3) * 2.1 + rng.uniform(0, 2):
        c, s = np.cos(0.15), np.sin(0.15)
        axes = rotation_z(turn) @ np.array([[c, 0, -s], [0, 1, 0], [s, 0, c]])
        place.cylinder((0.45 * w * np.cos(turn), 0.45 * w * np.sin(turn), 0), 0.015, (h - 0.05) / c, wood, axes=axes)


@dataclass(frozen=True)
class Furniture:
    """A kind of furniture: how it is drawn, how large, where, and how often."""

    make: Callable[[Place, Looks, Number, Number, Number], None]
    """Draws one of a given width, depth and height."""
    width: tuple[float, float]
    """Least and most, metres; so are depth and height."""
    depth: tuple[float, float]
    height: tuple[float, float]
    against_wall: bool
    """Mostly stands with its back to a wall."""
    frequency: float
    """How common it is, relative to the others."""
    to_ceiling: bool = False
    """Goes through the ceiling, whatever height is drawn."""


FURNITURE = {
    "table": Furniture(table, (0.8, 2.0), (0.6, 1.0), (0.4, 0.8), False, 3.0),
    "desk": Furniture(desk, (1.0, 1.7), (0.6, 0.8), (0.7, 0.78), True, 2.0),
    "chair": Furniture(chair, (0.4, 0.5), (0.4, 0.5), (0.8, 1.1), False, 5.0),
    "sofa": Furniture(sofa, (0.9, 2.4), (0.8, 1.0), (0.7, 0.95), True, 3.0),
    "bed": Furniture(bed, (0.9, 1.8), (1.9, 2.1), (0.6, 1.2), True, 1.5),
    "shelf": Furniture(shelf, (0.6, 1.6), (0.25, 0.4), (0.8, 2.3), True, 4.0),
    "cupboard": Furniture(cupboard, (0.5, 2.0), (0.35, 0.6), (0.5, 2.2), True, 4.0),
    "floor_lamp": Furniture(floor_lamp, (0.35, 0.4), (0.35, 0.4), (1.3, 1.9), False, 2.0),
    "plant": Furniture(plant, (0.6, 0.9), (0.6, 0.9), (0.5, 1.5), False, 1.6),
    "column": Furniture(column, (0.1, 0.45), (0.1, 0.45), (2.5, 2.6), False, 0.6, to_ceiling=True),
    "stack": Furniture(stack, (0.4, 0.8), (0.4, 0.8), (0.3, 1.4), False, 1.5),
    "stool": Furniture(stool, (0.32, 0.4), (0.32, 0.4), (0.4, 0.75), False, 1.5),
}

"""Light on surfaces: textures, lamps and daylight with soft shadows, occluded ambient light; and the finished picture.

Notation
    p, n, v    point, unit normal, unit view direction (from the camera), as tuples of three arrays of one value a ray
    k          sharpness of exponential shadow maps, 1 / metres
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.ndimage import gaussian_filter

from ddm_training.rooms.render import Camera, look_at, trace
from ddm_training.rooms.shapes import ELLIPSOID, Light, Scene
from ddm_training.rooms.textures import texture_bank

SHADOW_SIZE = 112  # pixels a side of a shadow map of a lamp; daylight, with one map only, has twice as many
SHADOW_MARGIN = 1.06  # shadow maps see a little more than their face, so that blurring does not show seams
SHARPNESS = 25.0  # k; larger is crisper where caster and receiver touch, and needs more range of numbers
DARK = 0.004  # light below this is not worth a shadow look-up; ambient light is about 0.5

Value = np.ndarray | np.floating
Vector = tuple[Value, Value, Value]


def dot(a: Vector, b: Vector) -> Any:
    """Scalar product, ray by ray."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


@dataclass(frozen=True)
class ShadowMap:
    """Blurred exp(k (distance - reach)) on the faces of a cube around a lamp, or on one face for daylight.

    ``axes`` has the rows right, down, forward of each face; ``tangent`` is half a face's width at distance 1.
    """

    light: Light
    axes: Float[np.ndarray, "faces 3 3"]
    tangent: float
    moments: Float[np.ndarray, "faces s s"]


# Face 2 a looks along +a, face 2 a + 1 along -a; right and down are the axes a + 1 and a + 2 (mod 3) for both.
_CUBE = np.array([np.eye(3)[[(a + 1) % 3, (a + 2) % 3, a]] * [[1], [1], [s]] for a in range(3) for s in (1, -1)])


def shadow_map(scene: Scene, light: Light) -> ShadowMap:
    """Render the distance to the light and blur its exponential (exponential shadow maps, Annen et al. 2008)."""
    if light.target is None:
        axes, tangent, size = _CUBE, SHADOW_MARGIN, SHADOW_SIZE
    else:
        axes = look_at(light.position, light.target, focal=1.0, width=1, height=1).rotation[None]
        tangent, size = light.tangent * SHADOW_MARGIN, 2 * SHADOW_SIZE
    casters = scene.casters
    moments = np.empty((len(axes), size, size))
    for face, rotation in enumerate(axes):
        hits = trace(casters, Camera(light.position, rotation, float(size / 2 / tangent), size, size))
        with np.errstate(divide="ignore"):
            distance = np.sqrt(hits.x**2 + hits.y[:, None] ** 2 + 1.0) / hits.inverse_depth
        distance = np.minimum(distance, light.reach)
        moments[face] = gaussian_filter(np.exp(SHARPNESS * (distance - light.reach)), light.softness, truncate=2.5)
    return ShadowMap(light, axes, tangent, moments)


def visibility(shadow: ShadowMap, offset: Vector, distance: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Share of the light that reaches points at ``offset`` and ``distance`` from it, in [0, 1]."""
    size, lit = shadow.moments.shape[-1], 1.0
    if shadow.light.target is None:
        stacked = np.stack(offset)
        axis = np.abs(stacked).argmax(0)
        rows = np.arange(len(axis))
        major = stacked[axis, rows]
        face = 2 * axis + (major < 0)
        scale = 1.0 / np.abs(major)
        u = stacked[(axis + 1) % 3, rows] * scale
        v = stacked[(axis + 2) % 3, rows] * scale
    else:
        right, down, forward = shadow.axes[0].astype(np.float32)
        z = np.maximum(dot(tuple(forward), offset), 1e-3)
        u, v = dot(tuple(right), offset) / z, dot(tuple(down), offset) / z
        # Daylight fades out towards the rim of its cone, which the window's frame should have cut before.
        lit, face = np.clip(8.0 * (1.0 - np.maximum(np.abs(u), np.abs(v)) / shadow.tangent), 0.0, 1.0), 0
    u = np.clip((u / shadow.tangent + 1) * (size / 2) - 0.5, 0, size - 1.001)
    v = np.clip((v / shadow.tangent + 1) * (size / 2) - 0.5, 0, size - 1.001)
    iu, iv = u.astype(np.int32), v.astype(np.int32)
    u, v = u - iu, v - iv
    moments, base = shadow.moments.reshape(-1), (face * size + iv) * size + iu
    upper = moments.take(base) * (1 - u) + moments.take(base + 1) * u
    lower = moments.take(base + size) * (1 - u) + moments.take(base + size + 1) * u
    expected = np.exp(SHARPNESS * (shadow.light.reach - distance.astype(np.float64)))
    return (np.minimum((upper * (1 - v) + lower * v) * expected, 1.0) * lit).astype(np.float32)


def shade(
    scene: Scene,
    shadows: list[ShadowMap],
    camera: Camera,
    surface: Int[np.ndarray, " n"],
    inverse_depth: Float[np.ndarray, " n"],
    x: Float[np.ndarray, " n"],
    y: Float[np.ndarray, " n"],
) -> Float[np.ndarray, "n 3"]:
    """Linear RGB of what rays through the normalised image positions (x, y) hit: texture, Lambert, Blinn highlights,
    soft shadows, and ambient light that is occluded where the room is crowded."""
    seen = surface >= 0
    if not seen.all():
        color = np.empty((len(surface), 3), np.float32)
        color[~seen] = scene.sky
        if seen.any():
            color[seen] = shade(scene, shadows, camera, surface[seen], inverse_depth[seen], x[seen], y[seen])
        return color
    x, y, z = x.astype(np.float32), y.astype(np.float32), (1.0 / inverse_depth).astype(np.float32)
    right, down, forward = camera.rotation.astype(np.float32)
    ray = _vector(right[a] * x + down[a] * y + forward[a] for a in range(3))
    p = _vector(ray[a] * z + np.float32(camera.position[a]) for a in range(3))
    shrink = 1.0 / np.sqrt(x * x + y * y + 1.0)
    view = _vector(ray[a] * shrink for a in range(3))

    n, u, v, size = _surface_frame(scene, surface, p)
    primitive = surface // 6
    footprint = z / (camera.focal * size * np.sqrt(np.maximum(np.abs(dot(n, view)), 0.15)))
    texture_bank().prepare(scene.texture)
    weights = texture_bank().sample(scene.texture.take(primitive), u, v, footprint)
    light = _received_light(scene, shadows, primitive, p, n, view)
    palette = scene.palette.transpose(2, 1, 0).copy()  # [channel, weight, primitive]
    emission = scene.emission.take(primitive)
    color = np.empty((len(surface), 3), np.float32)
    for channel in range(3):
        base = [palette[channel, i].take(primitive) for i in range(3)]
        albedo = weights[:, 0] * base[0] + weights[:, 1] * base[1] + weights[:, 2] * base[2]
        diffuse, gloss = light[channel]
        color[:, channel] = albedo * diffuse + gloss + emission * base[0]
    return color


def _vector(parts) -> Vector:
    a, b, c = parts
    return a, b, c


def _received_light(
    scene: Scene, shadows: list[ShadowMap], primitive: np.ndarray, p: Vector, n: Vector, view: Vector
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each colour channel the light to be multiplied by the albedo, and the highlights."""
    open_share = scene.openness(np.stack(p), np.stack(n))
    up = 0.5 + 0.5 * n[2]
    diffuse = [
        (scene.ambient_below[c] + (scene.ambient_above[c] - scene.ambient_below[c]) * up) * open_share for c in range(3)
    ]
    gloss = [np.zeros_like(up) for _ in range(3)]
    specular = scene.specular.take(primitive)
    for shadow in shadows:
        lamp = shadow.light
        offset = _vector(p[a] - np.float32(lamp.position[a]) for a in range(3))
        distance = np.sqrt(dot(offset, offset))
        strength = lamp.falloff(distance)
        lambert = -dot(n, offset) / distance
        bright = float(lamp.color.max())
        some = np.flatnonzero(lambert * strength > DARK / bright)
        if not len(some):
            continue
        offset, distance, strength = _vector(o.take(some) for o in offset), distance.take(some), strength.take(some)
        strength *= visibility(shadow, offset, distance)
        received = lambert.take(some) * strength * (0.4 + 0.6 * open_share.take(some))
        for c in range(3):
            diffuse[c][some] += received * np.float32(lamp.color[c])
        shiny = np.flatnonzero(specular.take(some) * strength > DARK / bright)
        if len(shiny):
            rows = some.take(shiny)
            inverse = -1.0 / distance.take(shiny)
            half = _vector(offset[a].take(shiny) * inverse - view[a].take(rows) for a in range(3))
            normal = _vector(n[a].take(rows) for a in range(3))
            cosine = np.maximum(dot(normal, half) / np.sqrt(dot(half, half) + 1e-12), 0.0)
            highlight = cosine**40 * strength.take(shiny) * specular.take(rows)
            for c in range(3):
                gloss[c][rows] += highlight * np.float32(lamp.color[c])
    return list(zip(diffuse, gloss))


def _surface_frame(scene: Scene, surface: np.ndarray, p: Vector) -> tuple[Vector, np.ndarray, np.ndarray, np.ndarray]:
    """Unit normal, texture coordinates in tiles, and the size of a tile in metres."""
    faces = scene.faces
    n = [faces.normal[a].take(surface) for a in range(3)]
    u, v = (
        row[0].take(surface) * p[0] + row[1].take(surface) * p[1] + row[2].take(surface) * p[2] + row[3].take(surface)
        for row in (faces.u, faces.v)
    )
    round_ = np.flatnonzero(faces.round.take(surface))
    if len(round_):
        which = surface.take(round_) // 6
        point = np.stack([a.take(round_) for a in p], -1)
        to_unit = scene.to_unit32[which]
        unit = np.einsum("nij,nj->ni", to_unit, point - scene.centre32[which])
        normal, uv = _round_frame(scene, which, unit)
        normal = np.einsum("nij,ni->nj", to_unit, normal)
        normal /= np.sqrt(np.einsum("ni,ni->n", normal, normal))[:, None]
        for a in range(3):
            n[a][round_] = normal[:, a]
        u[round_], v[round_] = (uv / scene.tile[which] + scene.shift[which]).T
    return _vector(n), u, v, faces.size.take(surface)


def _round_frame(scene: Scene, which: np.ndarray, unit: Float[np.ndarray, "n 3"]) -> tuple[np.ndarray, np.ndarray]:
    """Normals in unit space and texture coordinates in metres (arc length and height) on spheres and cylinders."""
    k, half = scene.taper[which], scene.half[which]
    ball: Bool[np.ndarray, " n"] = scene.kind[which] == ELLIPSOID
    cap = ~ball & (np.abs(unit[:, 2]) > 0.9999)
    slope = -k * (1 - np.abs(k) + k * unit[:, 2])
    normal = unit.copy()
    normal[:, 2] = np.where(ball, unit[:, 2], np.where(cap, np.sign(unit[:, 2]), slope))
    normal[cap, :2] = 0
    arc = np.arctan2(unit[:, 1], unit[:, 0]) * half[:, 0]
    across, along = unit[:, 1] * half[:, 1], np.where(cap, unit[:, 0] * half[:, 0], unit[:, 2] * half[:, 2])
    return normal, np.stack([np.where(cap, across, arc), along], -1)


def render(
    scene: Scene, shadows: list[ShadowMap], camera: Camera, samples: int = 2
) -> tuple[Float[np.ndarray, "h w 3"], Float[np.ndarray, "h w"], Int[np.ndarray, "h w"]]:
    """Linear colour (antialiased), planar depth in metres at pixel centres (inf: nothing), and entity (-1: nothing).

    Textures are filtered by their mip levels, so a pixel whose ``samples`` x ``samples`` rays and centre meet one face
    is shaded once, at its centre; only pixels on an outline are shaded at every ray.
    """
    centre = trace(scene, camera)
    h, w = centre.surface.shape
    surface, q = centre.surface, centre.inverse_depth
    x, y = np.broadcast_to(centre.x, (h, w)), np.broadcast_to(centre.y[:, None], (h, w))
    fine = trace(scene, camera, samples)
    edge = np.zeros((h, w), bool)
    for i in range(samples):
        for j in range(samples):
            edge |= fine.surface[i::samples, j::samples] != surface
    inner = ~edge
    rows, columns = np.nonzero(edge)
    grid_rows, grid_columns = np.divmod(np.arange(samples * samples), samples)
    rows = (rows[:, None] * samples + grid_rows).ravel()
    columns = (columns[:, None] * samples + grid_columns).ravel()
    color = shade(
        scene,
        shadows,
        camera,
        np.concatenate([surface[inner], fine.surface[rows, columns]]),
        np.concatenate([q[inner], fine.inverse_depth[rows, columns]]),
        np.concatenate([x[inner], fine.x[columns]]),
        np.concatenate([y[inner], fine.y[rows]]),
    )
    image = np.empty((h, w, 3), np.float32)
    count = int(inner.sum())
    image[inner] = color[:count]
    image[edge] = color[count:].reshape(-1, samples * samples, 3).mean(1)
    with np.errstate(divide="ignore"):
        depth = 1.0 / q
    return image, depth, np.where(surface >= 0, scene.entity[surface // 6], -1)

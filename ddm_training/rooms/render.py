"""Cameras, visibility and shading of scenes made of boxes, ellipsoids and tapered cylinders.

Notation
    x      a point in world coordinates, metres, z up                     [3]
    y      the same in a primitive's unit space, y = A (x - c)            [3]; the box is [-1, 1]^3
    z      planar depth of a pixel (along the optical axis), metres
    q      1 / z; over a plane q is affine in the pixel position, so a face needs no division: see `trace`

Every face is drawn into the rectangle of pixels that its clipped outline covers, keeping the largest q; that is exact
ray casting (a ray through each pixel centre against each surface), only not spent where it cannot hit.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from ddm_training.rooms.shapes import BOX, ELLIPSOID, Light, Scene
from ddm_training.rooms.textures import texture_bank

NEAR = 0.02  # metres; outlines are clipped here
SHADOW_SIZE = 112  # pixels a side of a shadow map
SHADOW_MARGIN = 1.06  # shadow maps see a little more than their face, so that blurring does not show seams
SHADOW_SHARPNESS = 25.0  # 1 / metres: exponent of the exponential shadow maps


@dataclass(frozen=True)
class Camera:
    """A pinhole camera without distortion; the principal point is the image centre.

    ``rotation`` has the rows right, down, forward (world to OpenCV camera axes).
    """

    position: Float[np.ndarray, " 3"]
    rotation: Float[np.ndarray, "3 3"]
    focal: float
    width: int
    height: int

    @property
    def intrinsics(self) -> tuple[float, float, float, float]:
        """fx, fy, cx, cy in pixels, the centre of the first pixel at (0.5, 0.5)."""
        return self.focal, self.focal, self.width / 2, self.height / 2

    @property
    def camera_to_world(self) -> Float[np.ndarray, "4 4"]:
        """OpenGL (nerfstudio) pose: columns right, up, backward, position."""
        pose = np.eye(4)
        pose[:3, :3] = self.rotation.T * np.array([1.0, -1.0, -1.0])
        pose[:3, 3] = self.position
        return pose

    def scaled(self, width: int, height: int) -> "Camera":
        """The same view with another number of pixels; the focal length follows the width."""
        return Camera(self.position, self.rotation, self.focal * width / self.width, width, height)


def look_at(
    position: Float[np.ndarray, " 3"],
    target: Float[np.ndarray, " 3"],
    *,
    focal: float,
    width: int,
    height: int,
    roll: float = 0.0,
) -> Camera:
    """A camera that looks at ``target`` with the world's z upwards, then rolled by ``roll`` radians."""
    forward = (target - position) / np.linalg.norm(target - position)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    down = np.cross(forward, right)
    c, s = np.cos(roll), np.sin(roll)
    rotation = np.stack([c * right + s * down, c * down - s * right, forward])
    return Camera(np.asarray(position, np.float64), rotation, focal, width, height)


@dataclass(frozen=True)
class Hits:
    """What is seen: ``surface`` = 6 * primitive + face (-1: nothing), ``inverse_depth`` = 1 / planar z (0: nothing)."""

    surface: Int[np.ndarray, "h w"]
    inverse_depth: Float[np.ndarray, "h w"]
    x: Float[np.ndarray, " w"]
    y: Float[np.ndarray, " h"]


_CORNERS = np.array([[[-1, -1], [1, -1], [1, 1], [-1, 1]]], np.float64)


def _face_corners() -> np.ndarray:
    corners = np.empty((6, 4, 3))
    for face in range(6):
        axis, sign = face // 2, 1 - 2 * (face % 2)
        corners[face, :, axis] = sign
        corners[face][:, [(axis + 1) % 3, (axis + 2) % 3]] = _CORNERS
    return corners


_FACES = _face_corners()


def _outlines(
    scene: Scene, camera: Camera, x: np.ndarray, y: np.ndarray
) -> tuple[Int[np.ndarray, "p 6 4"], Float[np.ndarray, "p 3 3"], Float[np.ndarray, "p 3"]]:
    """Pixel rectangle [x0, x1, y0, y1) of every face of every primitive's bounding box, clipped at NEAR.

    Also G = A R^T (camera axes to unit space) and the camera centre in unit space.
    """
    to_unit = scene.to_unit @ camera.rotation.T
    eye = np.einsum("pij,pj->pi", scene.to_unit, camera.position - scene.centre)
    in_camera = np.einsum("ij,pjk,fck->pfci", camera.rotation, scene.from_unit, _FACES)
    in_camera += ((scene.centre - camera.position) @ camera.rotation.T)[:, None, None]
    following = np.roll(in_camera, -1, axis=2)
    z, z_next = in_camera[..., 2], following[..., 2]
    crossing = (z < NEAR) != (z_next < NEAR)
    with np.errstate(divide="ignore", invalid="ignore"):
        step = np.where(crossing, (NEAR - z) / (z_next - z), 0.0)
    clipped = in_camera + step[..., None] * (following - in_camera)
    points = np.concatenate([in_camera, clipped], axis=2)
    valid = np.concatenate([z >= NEAR, crossing], axis=2)
    depth = np.where(valid, points[..., 2], 1.0)
    rectangles = np.empty((*valid.shape[:2], 4), np.int64)
    for axis, positions in enumerate((x, y)):
        projected = points[..., axis] / depth
        low = np.where(valid, projected, np.inf).min(-1)
        high = np.where(valid, projected, -np.inf).max(-1)
        rectangles[..., 2 * axis] = np.searchsorted(positions, low)
        rectangles[..., 2 * axis + 1] = np.searchsorted(positions, high, side="right")
    return rectangles, to_unit, eye


def trace(scene: Scene, camera: Camera, samples: int = 1) -> Hits:
    """Nearest surface along the rays through a regular grid of ``samples`` x ``samples`` points a pixel."""
    width, height = camera.width * samples, camera.height * samples
    x = ((np.arange(width) + 0.5) / samples - camera.width / 2) / camera.focal
    y = ((np.arange(height) + 0.5) / samples - camera.height / 2) / camera.focal
    rectangles, to_unit, eye = _outlines(scene, camera, x, y)
    hits = Hits(np.full((height, width), -1, np.int32), np.zeros((height, width), np.float32), x, y)

    boxes = scene.kind == BOX
    signs = np.array([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    facing = signs * np.repeat(eye, 2, axis=1) > 1.0
    filled = (rectangles[..., 1] > rectangles[..., 0]) & (rectangles[..., 3] > rectangles[..., 2])
    x32, y32 = x.astype(np.float32), y.astype(np.float32)
    for p, face in np.argwhere(filled & facing & boxes[:, None]).tolist():
        _draw_face(hits, x32, y32, rectangles[p, face], to_unit[p], eye[p], 6 * p + face, face)
    for p in np.flatnonzero(~boxes & filled.any(1)).tolist():
        some = rectangles[p][filled[p]]
        union = np.array([some[:, 0].min(), some[:, 1].max(), some[:, 2].min(), some[:, 3].max()])
        _draw_quadric(hits, x32, y32, union, to_unit[p], eye[p], 6 * p, scene.kind[p], float(scene.taper[p]))
    return hits


def _draw_face(hits: Hits, x, y, rectangle, to_unit, eye, surface: int, face: int) -> None:
    """One face of a box, the plane y_a = s: with the ray y = e + z g(pixel), q = g_a / (s - e_a), and the ray is inside
    the face where |e_b q + g_b| <= q for the two other axes b. All are affine in the pixel position."""
    x0, x1, y0, y1 = rectangle.tolist()
    x, y = x[x0:x1], y[y0:y1, None]
    axis, sign = face // 2, 1 - 2 * (face % 2)
    row = to_unit[axis] / (sign - eye[axis])
    q = (np.float32(row[0]) * x) + (np.float32(row[1]) * y + np.float32(row[2]))
    hit = q > hits.inverse_depth[y0:y1, x0:x1]
    for other in ((axis + 1) % 3, (axis + 2) % 3):
        side = to_unit[other] + eye[other] * row
        distance = (np.float32(side[0]) * x) + (np.float32(side[1]) * y + np.float32(side[2]))
        np.abs(distance, out=distance)
        hit &= distance <= q
    np.copyto(hits.inverse_depth[y0:y1, x0:x1], q, where=hit)
    np.copyto(hits.surface[y0:y1, x0:x1], surface, where=hit)


def _draw_quadric(hits: Hits, x, y, rectangle, to_unit, eye, surface: int, kind: int, taper: float) -> None:
    """The unit sphere |y| = 1, or the capped cylinder y_0^2 + y_1^2 = (1 - |k| + k y_2)^2 with the taper k, |y_2| <= 1."""
    x0, x1, y0, y1 = rectangle.tolist()
    x, y = x[x0:x1].astype(np.float64), y[y0:y1, None].astype(np.float64)
    d = [to_unit[a, 0] * x + (to_unit[a, 1] * y + to_unit[a, 2]) for a in range(3)]
    e = eye
    with np.errstate(divide="ignore", invalid="ignore"):
        if kind == ELLIPSOID:
            a = d[0] * d[0] + d[1] * d[1] + d[2] * d[2]
            b = e[0] * d[0] + e[1] * d[1] + e[2] * d[2]
            root = np.sqrt(b * b - a * (e @ e - 1.0))
            near = (-b - root) / a
            near[~(near > NEAR)] = np.inf
        else:
            slope, offset = taper * d[2], 1.0 - abs(taper) + taper * e[2]
            a = d[0] * d[0] + d[1] * d[1] - slope * slope
            b = e[0] * d[0] + e[1] * d[1] - offset * slope
            root = np.sqrt(b * b - a * (e[0] ** 2 + e[1] ** 2 - offset**2))
            near = np.full(a.shape, np.inf)
            for t in ((-b - root) / a, (-b + root) / a):
                inside = (t > NEAR) & (t < near) & (np.abs(e[2] + t * d[2]) <= 1.0)
                np.copyto(near, t, where=inside)
            for sign in (1.0, -1.0):
                t = (sign - e[2]) / d[2]
                inside = (e[0] + t * d[0]) ** 2 + (e[1] + t * d[1]) ** 2 <= (1.0 - abs(taper) + sign * taper) ** 2
                inside &= (t > NEAR) & (t < near)
                np.copyto(near, t, where=inside)
    q = (1.0 / near).astype(np.float32)
    hit = q > hits.inverse_depth[y0:y1, x0:x1]
    np.copyto(hits.inverse_depth[y0:y1, x0:x1], q, where=hit)
    np.copyto(hits.surface[y0:y1, x0:x1], surface, where=hit)


# Light


@dataclass(frozen=True)
class ShadowMap:
    """Blurred exp(k distance) on the faces of a cube around a light, or on one face for a light from outside."""

    light: Light
    axes: Float[np.ndarray, "faces 3 3"]
    tangent: float
    moments: Float[np.ndarray, "faces s s"]


_CUBE = np.stack(
    [np.roll(np.eye(3), a, axis=1)[[1, 2, 0]] * np.array([[1], [1], [s]]) for a in range(3) for s in (1, -1)]
)


def shadow_map(scene: Scene, light: Light) -> ShadowMap:
    """Render the distance to the light and blur its exponential (exponential shadow maps, Annen et al. 2008)."""
    from scipy.ndimage import gaussian_filter

    if light.target is None:
        axes, tangent = _CUBE, 1.0
    else:
        axes = look_at(light.position, light.target, focal=1.0, width=1, height=1).rotation[None]
        tangent = light.tangent
    focal = SHADOW_SIZE / 2 / (tangent * SHADOW_MARGIN)
    casters = scene.select(scene.casts_shadow)
    moments = np.empty((len(axes), SHADOW_SIZE, SHADOW_SIZE))
    for face, rotation in enumerate(axes):
        hits = trace(casters, Camera(light.position, rotation, focal, SHADOW_SIZE, SHADOW_SIZE))
        with np.errstate(divide="ignore"):
            distance = np.sqrt(hits.x**2 + hits.y[:, None] ** 2 + 1.0) / hits.inverse_depth
        distance = np.minimum(distance, light.reach)
        moments[face] = gaussian_filter(np.exp(SHADOW_SHARPNESS * (distance - light.reach)), light.softness)
    return ShadowMap(light, axes, tangent * SHADOW_MARGIN, moments)


def visibility(shadow: ShadowMap, offset: Float[np.ndarray, "n 3"], distance: Float[np.ndarray, " n"]) -> np.ndarray:
    """Share of the light that reaches points at ``offset`` from it, in [0, 1]."""
    rows = np.arange(len(offset))
    if len(shadow.axes) == 6:
        axis = np.abs(offset).argmax(1)
        major = offset[rows, axis]
        face = 2 * axis + (major < 0)
        u = offset[rows, (axis + 1) % 3] / np.abs(major)
        v = offset[rows, (axis + 2) % 3] / np.abs(major)
        lit = 1.0
    else:
        local = offset @ shadow.axes[0].T.astype(np.float32)
        z = np.maximum(local[:, 2], 1e-3)
        u, v = local[:, 0] / z, local[:, 1] / z
        face = 0
        lit = (local[:, 2] > 0) & (np.maximum(np.abs(u), np.abs(v)) < shadow.tangent)
    size = SHADOW_SIZE
    u = np.clip((u / shadow.tangent + 1) * (size / 2) - 0.5, 0, size - 1.001)
    v = np.clip((v / shadow.tangent + 1) * (size / 2) - 0.5, 0, size - 1.001)
    iu, iv = u.astype(np.int32), v.astype(np.int32)
    u, v = u - iu, v - iv
    flat, base = shadow.moments.ravel(), (face * size + iv) * size + iu
    upper = flat[base] * (1 - u) + flat[base + 1] * u
    lower = flat[base + size] * (1 - u) + flat[base + size + 1] * u
    moment = upper * (1 - v) + lower * v
    return np.minimum(moment * np.exp(SHADOW_SHARPNESS * (shadow.light.reach - distance.astype(np.float64))), 1.0) * lit


_U_AXIS = np.array([1, 0, 0])
_V_AXIS = np.array([2, 2, 1])


def shade(
    scene: Scene,
    shadows: list[ShadowMap],
    camera: Camera,
    surface: Int[np.ndarray, " n"],
    inverse_depth: Float[np.ndarray, " n"],
    x: Float[np.ndarray, " n"],
    y: Float[np.ndarray, " n"],
) -> Float[np.ndarray, "n 3"]:
    """Linear RGB of the hits at normalised image positions (x, y): texture, Lambert, Blinn highlights, soft shadows and
    ambient light that is occluded where the room is crowded."""
    seen = surface >= 0
    color = np.empty((len(surface), 3), np.float32)
    color[~seen] = scene.sky
    if not seen.any():
        return color
    surface = surface[seen]
    z = (1.0 / inverse_depth[seen]).astype(np.float32)
    rotation = camera.rotation.astype(np.float32)
    ray = np.stack([x[seen], y[seen], np.ones_like(z)], -1).astype(np.float32) @ rotation
    point = ray * z[:, None] + camera.position.astype(np.float32)
    ray /= np.linalg.norm(ray, axis=1, keepdims=True)
    primitive, face = surface // 6, surface % 6

    local, normal = _local_frame(scene, primitive, face, point)
    rows = np.arange(len(point))
    axis = face // 2
    uv = np.stack([local[rows, _U_AXIS[axis]], local[rows, _V_AXIS[axis]]], -1)
    turned = scene.turned[primitive]
    uv[turned] = uv[turned][:, ::-1]
    tile = scene.tile[primitive]
    facing = np.abs((normal * ray).sum(1))
    footprint = z / (camera.focal * np.maximum(facing, 0.15) ** 0.5 * tile.min(1))
    weights = texture_bank().sample(scene.texture[primitive], uv / tile + scene.shift[primitive], footprint)
    palette = scene.palette[primitive]
    albedo = weights[:, :1] * palette[:, 0] + weights[:, 1:2] * palette[:, 1] + weights[:, 2:] * palette[:, 2]

    open_share = scene.openness(point, normal)
    up = 0.5 + 0.5 * normal[:, 2:]
    light = (scene.ambient_below * (1 - up) + scene.ambient_above * up) * open_share[:, None]
    gloss = np.zeros_like(light)
    specular = scene.specular[primitive]
    for shadow in shadows:
        offset = point - shadow.light.position.astype(np.float32)
        distance = np.sqrt((offset * offset).sum(1))
        towards = offset / -distance[:, None]
        lambert = np.maximum((normal * towards).sum(1), 0.0)
        amount = visibility(shadow, offset, distance) * shadow.light.falloff(distance)
        amount = amount.astype(np.float32)
        light += (lambert * amount * (0.4 + 0.6 * open_share))[:, None] * shadow.light.color
        half = towards - ray
        half /= np.linalg.norm(half, axis=1, keepdims=True)
        highlight = np.maximum((normal * half).sum(1), 0.0) ** 40
        gloss += (highlight * amount * specular)[:, None] * shadow.light.color
    color[seen] = albedo * light + gloss + scene.emission[primitive][:, None] * palette[:, 0]
    return color


def _local_frame(scene: Scene, primitive, face, point) -> tuple[np.ndarray, np.ndarray]:
    """Position in metres along a primitive's own axes (unrolled on round ones), and the unit normal."""
    to_unit = scene.to_unit32[primitive]
    unit = (to_unit * (point - scene.centre32[primitive])[:, None]).sum(2)
    half = scene.half[primitive]
    local = unit * half
    axis = face // 2
    rows = np.arange(len(point))
    normal = to_unit[rows, axis] * ((1 - 2 * (face % 2)) * half[rows, axis])[:, None]
    round_ = np.flatnonzero(scene.kind[primitive] != BOX)
    if len(round_):
        y, which = unit[round_], primitive[round_]
        taper = scene.taper[which]
        ball = scene.kind[which] == ELLIPSOID
        cap = ~ball & (np.abs(y[:, 2]) > 0.9999)
        outward = y.copy()
        outward[:, 2] = np.where(ball, y[:, 2], np.where(cap, np.sign(y[:, 2]), -taper * (1 - np.abs(taper) + taper * y[:, 2])))
        outward[cap, :2] = 0
        bent = (to_unit[round_] * outward[:, :, None]).sum(1)
        normal[round_] = bent / np.linalg.norm(bent, axis=1, keepdims=True)
        # Face 0 maps (local y, local z) to the texture: put the arc length there.
        local[round_, 1] = np.where(cap, local[round_, 1], np.arctan2(y[:, 1], y[:, 0]) * half[round_, 0])
        local[round_, 2] = np.where(cap, local[round_, 0], local[round_, 2])
    return local, normal


def render(
    scene: Scene, shadows: list[ShadowMap], camera: Camera, samples: int = 2
) -> tuple[Float[np.ndarray, "h w 3"], Float[np.ndarray, "h w"], Int[np.ndarray, "h w"]]:
    """Linear colour (antialiased), planar depth in metres at pixel centres (inf: nothing hit), and entity (-1: nothing).

    Textures are filtered by their mip levels, so a pixel whose ``samples`` x ``samples`` rays and centre meet one face
    is shaded once, at its centre; only pixels on an outline are shaded at every ray.
    """
    centre = trace(scene, camera)
    h, w = centre.surface.shape
    surface, q = centre.surface, centre.inverse_depth
    x, y = np.broadcast_to(centre.x, (h, w)), np.broadcast_to(centre.y[:, None], (h, w))
    if samples > 1:
        fine = trace(scene, camera, samples)
        blocks = fine.surface.reshape(h, samples, w, samples)
        edge = (blocks != surface[:, None, :, None]).any((1, 3))
        rows, columns = np.nonzero(edge)
        sub_rows = (rows[:, None, None] * samples + np.arange(samples)[:, None]) + np.zeros((1, samples), int)
        sub_columns = (columns[:, None, None] * samples + np.arange(samples)) + np.zeros((samples, 1), int)
        sub_rows, sub_columns = sub_rows.ravel(), sub_columns.ravel()
        inner = ~edge
        color = shade(
            scene,
            shadows,
            camera,
            np.concatenate([surface[inner], fine.surface[sub_rows, sub_columns]]),
            np.concatenate([q[inner], fine.inverse_depth[sub_rows, sub_columns]]),
            np.concatenate([x[inner], fine.x[sub_columns]]),
            np.concatenate([y[inner], fine.y[sub_rows]]),
        )
        image = np.empty((h, w, 3), np.float32)
        count = int(inner.sum())
        image[inner] = color[:count]
        image[edge] = color[count:].reshape(-1, samples * samples, 3).mean(1)
    else:
        image = shade(scene, shadows, camera, *(a.ravel() for a in (surface, q, x, y))).reshape(h, w, 3)
    with np.errstate(divide="ignore"):
        depth = 1.0 / q
    entity = np.where(surface >= 0, scene.entity[surface // 6], -1)
    return image, depth, entity

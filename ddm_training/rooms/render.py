"""Cameras and visibility of scenes made of boxes, ellipsoids and tapered cylinders.

Notation
    x      a point in world coordinates, metres, z up                     [3]
    y      the same in a primitive's unit space, y = A (x - c)            [3]; the box is [-1, 1]^3
    z      planar depth of a pixel (along the optical axis), metres
    q      1 / z; over a plane q is affine in the pixel position, so a face needs no division: see `_draw_face`

Every face is drawn into the rectangle of pixels that its clipped outline covers, keeping the largest q; that is exact
ray casting (a ray through each pixel centre against each surface), only not spent where it cannot hit.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from ddm_training.rooms.shapes import BOX, CORNERS, ELLIPSOID, Scene

NEAR = 0.02  # metres; outlines are clipped here, and round surfaces are not seen from nearer


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
    """What is seen: ``surface`` = 6 * primitive + face (-1: nothing), ``inverse_depth`` = 1 / planar z (0: nothing).

    ``x`` and ``y`` are the columns' and rows' positions in the image plane at z = 1.
    """

    surface: Int[np.ndarray, "h w"]
    inverse_depth: Float[np.ndarray, "h w"]
    x: Float[np.ndarray, " w"]
    y: Float[np.ndarray, " h"]


def _face_outlines() -> np.ndarray:
    """Corner numbers around each face: face 2 a is at +1 on axis a, face 2 a + 1 at -1."""
    around = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    outlines = np.empty((6, 4), int)
    for face in range(6):
        corners = np.empty((4, 3))
        corners[:, face // 2] = 1 - 2 * (face % 2)
        corners[:, [(face // 2 + 1) % 3, (face // 2 + 2) % 3]] = around
        outlines[face] = ((corners[:, None] == CORNERS).all(-1)).argmax(1)
    return outlines


_OUTLINES = _face_outlines()


def _outlines(
    scene: Scene, camera: Camera, x: np.ndarray, y: np.ndarray
) -> tuple[Int[np.ndarray, "p 6 4"], Float[np.ndarray, "p 3 3"], Float[np.ndarray, "p 3"]]:
    """Pixel rectangle [x0, x1, y0, y1) of every face of every primitive's bounding box, clipped at NEAR.

    Also G = A R^T (camera axes to unit space) and the camera centre in unit space.
    """
    to_unit = scene.to_unit @ camera.rotation.T
    eye = (scene.to_unit * (camera.position - scene.centre)[:, None]).sum(2)
    corners = ((scene.corners - camera.position) @ camera.rotation.T).reshape(-1, 8, 3)
    in_camera = corners[:, _OUTLINES]
    z = in_camera[..., 2]
    valid, points = z >= NEAR, in_camera
    cut = valid.any(-1) & ~valid.all(-1)
    if cut.any():  # a few primitives around the camera only
        valid, points = np.repeat(valid, 2, -1), np.repeat(points, 2, -2)
        valid[..., 1::2] = False
        polygon = in_camera[cut]
        following = np.roll(polygon, -1, axis=1)
        crossing = (polygon[..., 2] < NEAR) != (following[..., 2] < NEAR)
        rise = np.where(crossing, following[..., 2] - polygon[..., 2], 1.0)
        step = (NEAR - polygon[..., 2]) / rise
        interleaved, kept = points[cut], valid[cut]
        interleaved[:, 1::2] = polygon + step[..., None] * (following - polygon)
        kept[:, 1::2] = crossing
        points[cut], valid[cut] = interleaved, kept
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
        _draw_quadric(hits, x32, y32, union, to_unit[p], eye[p], 6 * p, int(scene.kind[p]), float(scene.taper[p]))
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
    """The unit sphere |y| = 1, or the capped cylinder y_0^2 + y_1^2 = (1 - |k| + k y_2)^2, |y_2| <= 1 (k: taper)."""
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

"""Made scenes looked at without shortcuts: a plain ray caster, and points of one view in another."""

import numpy as np

from ddm_training.rooms.render import Camera, trace
from ddm_training.rooms.shapes import BOX, ELLIPSOID, Scene


def slow_cast(scene: Scene, camera: Camera, column: float, row: float) -> tuple[float, int]:
    """Planar depth and primitive at an image position: plain slab tests and quadratics, no shortcuts."""
    ray = np.array([(column - camera.width / 2) / camera.focal, (row - camera.height / 2) / camera.focal, 1.0])
    ray = ray @ camera.rotation
    best, which = np.inf, -1
    for p in range(len(scene.kind)):
        e, d = scene.to_unit[p] @ (camera.position - scene.centre[p]), scene.to_unit[p] @ ray
        found: list[float] = []
        if scene.kind[p] == BOX:
            a, b = (-1 - e) / d, (1 - e) / d
            enter, leave = np.minimum(a, b).max(), np.maximum(a, b).min()
            if enter < leave and enter > 0:
                found = [float(enter)]
        elif scene.kind[p] == ELLIPSOID:
            found = [t.real for t in np.roots([d @ d, 2 * e @ d, e @ e - 1]) if abs(t.imag) < 1e-12]
        else:
            k = float(scene.taper[p])
            m = 1 - abs(k)
            a = d[0] ** 2 + d[1] ** 2 - (k * d[2]) ** 2
            b = 2 * (e[0] * d[0] + e[1] * d[1] - (m + k * e[2]) * k * d[2])
            c = e[0] ** 2 + e[1] ** 2 - (m + k * e[2]) ** 2
            sides = [t.real for t in np.roots([a, b, c]) if abs(t.imag) < 1e-12]
            found = [t for t in sides if abs(e[2] + t * d[2]) <= 1]
            for s in (-1, 1):
                t = (s - e[2]) / d[2]
                if np.hypot(e[0] + t * d[0], e[1] + t * d[1]) <= m + k * s:
                    found.append(t)
        for t in found:
            if 0 < t < best:
                best, which = t, p
    return best, which


def agreeing_rays(scene: Scene, camera: Camera, rng: np.random.Generator, count: int = 60) -> int:
    """Of so many random pixels those where `trace` and `slow_cast` find the same primitive at the same depth."""
    hits, agree = trace(scene, camera), 0
    for _ in range(count):
        row, column = rng.integers(camera.height), rng.integers(camera.width)
        depth, primitive = slow_cast(scene, camera, column + 0.5, row + 0.5)
        same = hits.surface[row, column] // 6 == primitive if primitive >= 0 else hits.surface[row, column] == -1
        agree += bool(same and np.isclose(hits.inverse_depth[row, column], 1 / depth, rtol=2e-5))
    return agree


def reprojection(depth_a, pose_a, depth_b, pose_b, intrinsics, pixels) -> tuple[int, float, float]:
    """Of points seen by camera a that fall into image b: how many, the share at b's depth, and the share nearer than
    what b sees there, which no true pair of depths has.

    Poses are OpenGL camera-to-world; intrinsics fx, fy, cx, cy."""
    fx, fy, cx, cy = intrinsics
    inside = equal = nearer = 0
    for row, column in pixels:
        z = depth_a[row, column]
        if not (np.isfinite(z) and z > 0):
            continue
        point = pose_a @ [(column + 0.5 - cx) / fx * z, -(row + 0.5 - cy) / fy * z, -z, 1.0]
        local = np.linalg.inv(pose_b) @ point
        z_b = -local[2]
        if z_b <= 0.1:
            continue
        u, v = fx * local[0] / z_b + cx, -fy * local[1] / z_b + cy
        if not (1 <= u < depth_b.shape[1] - 1 and 1 <= v < depth_b.shape[0] - 1):
            continue
        seen = depth_b[int(v) - 1 : int(v) + 2, int(u) - 1 : int(u) + 2]
        inside += 1
        # The point lies between pixel centres: compare with the range of the 3 x 3 pixels around it (0: no depth).
        low, high = np.where(seen > 0, seen, np.inf).min(), np.where(seen > 0, seen, np.inf).max()
        equal += bool(low * 0.99 - 0.01 <= z_b <= high * 1.01 + 0.01)
        nearer += bool(z_b < low * 0.99 - 0.01)
    return inside, equal / max(inside, 1), nearer / max(inside, 1)

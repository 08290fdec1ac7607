"""Where cameras stand: in a room, free of furniture, at plausible heights, looking at something; around a still.

A camera's quality is judged on a probe, the same view `PROBE` pixels wide, before the real one is rendered.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
from jaxtyping import Float

from ddm_training.rooms.render import Camera, Hits, look_at, trace
from ddm_training.rooms.scene import Room, make_room
from ddm_training.rooms.shading import shade
from ddm_training.rooms.shapes import rotation_z
from ddm_training.rooms.stills import MIDDLE, Still, make_still
from ddm_training.rooms.subjects import leaning

PROBE = 48  # pixels
CLEARANCE = 0.25  # metres from a camera to furniture
BRIGHTNESS = 0.6  # linear, before gamma; see `exposure`
T = TypeVar("T")
Kind = Literal["room", "still"]


class NoView(RuntimeError):
    """A room or still in which no camera finds a view; `room_with_views` takes another."""


def room_with_views(seed: int, index: int, find: Callable[[Room], T], kind: Kind = "room") -> tuple[Room, T]:
    """The first attempt at room or still ``index`` in which ``find`` succeeds, and what it found.

    Raises:
        NoView: none of 20 attempts has a view.
    """
    for attempt in range(20):
        room = KINDS[kind].make(seed, index, attempt)
        try:
            return room, find(room)
        except NoView:
            continue
    raise NoView(f"no view in 20 attempts at {kind} {index} of seed {seed}")


def is_free(room: Room, position: Float[np.ndarray, " 3"]) -> bool:
    """Whether a camera may stand there: inside the room, not in or close to furniture."""
    if not ((position > 0.35).all() and (position < room.size - [0.35, 0.35, 0.2]).all()):
        return False
    xy = position[:2]
    return not any(position[2] < f.height + CLEARANCE and f.near(xy, xy, CLEARANCE) for f in room.footprints)


def probe(room: Room, camera: Camera) -> tuple[Camera, Hits]:
    """The same view in few pixels."""
    small = camera.scaled(PROBE, max(round(PROBE * camera.height / camera.width), 1))
    return small, trace(room.scene, small)


def shows_a_room(room: Room, hits: Hits) -> bool:
    """Nothing very close, not one bare wall, not only far away, not much sky, several objects."""
    q = hits.inverse_depth
    nearest, near, median, far = np.quantile(q, [1.0, 0.9, 0.5, 0.05])
    entities, counts = np.unique(room.scene.entity[hits.surface[hits.surface >= 0] // 6], return_counts=True)
    return bool(
        nearest < 1 / 0.4
        and near < 1 / 0.7
        and 1 / 6.0 < median < 1 / 1.1
        and np.quantile(q, 0.95) > 1.3 * far
        and (hits.surface < 0).mean() < 0.2
        and len(entities) >= 5
        and counts.max() < 0.8 * q.size
    )


def random_camera(room: Room, rng: np.random.Generator, *, focal: float, width: int, height: int) -> Camera:
    """A camera at eye, hand or tripod height that looks at furniture or across the room.

    Raises:
        NoView: none was found.
    """
    for _ in range(60):
        xy = rng.uniform(0.4, np.maximum(room.size[:2] - 0.4, 0.5))
        position = np.append(xy, np.clip(rng.normal(1.4, 0.3), 0.6, min(1.9, room.size[2] - 0.3)))
        if room.footprints and rng.uniform() < 0.7:
            f = room.footprints[rng.integers(len(room.footprints))]
            target = np.append(rng.uniform(f.low, f.high), rng.uniform(0.2, 1.3))
        else:
            target = rng.uniform([0.0, 0.0, 0.3], room.size * [1, 1, 0.7])
        offset = target - position
        flat = np.hypot(offset[0], offset[1])
        if flat < 0.8 or abs(offset[2]) > 0.7 * flat or not is_free(room, position):
            continue
        camera = look_at(position, target, focal=focal, width=width, height=height, roll=rng.normal(0, 0.03))
        if shows_a_room(room, probe(room, camera)[1]):
            return camera
    raise NoView(f"room {room.seed} has no place for a camera after 60 tries")


def is_beside(still: Still, position: Float[np.ndarray, " 3"]) -> bool:
    """Whether a camera may stand there: not in the subject, nor lower than what that stands on."""
    return bool(
        position[2] > still.base + 0.1 * still.extent and np.hypot(*(position[:2] - MIDDLE)) > 0.5 * still.extent
    )


def shows_a_subject(still: Still, hits: Hits) -> bool:
    """Nothing very close, not one surface, something before something else, and depth in half of the image."""
    q = hits.inverse_depth
    seen = q[q > 0]
    if len(seen) < 0.5 * q.size:
        return False
    near, far = np.quantile(seen, [0.97, 0.03])
    entities, counts = np.unique(still.scene.entity[hits.surface[hits.surface >= 0] // 6], return_counts=True)
    return bool(
        seen.max() < 1 / (0.3 * still.extent)
        and near > 1.2 * far
        and len(entities) >= 2
        and counts.max() < 0.85 * q.size
    )


def random_still_camera(still: Still, rng: np.random.Generator, *, focal: float, width: int, height: int) -> Camera:
    """A camera that looks at the subject, from any side and up to 57 degrees from above.

    Raises:
        NoView: none was found.
    """
    for _ in range(60):
        away, rise = still.extent * np.exp(rng.uniform(0.0, np.log(3.5))), rng.uniform(0.0, 1.0)
        target = np.array([*MIDDLE, still.base + still.extent * rng.uniform(0.1, 0.7)])
        target += 0.15 * still.extent * rng.normal(size=3)
        position = target + away * leaning(rng.uniform(0, 2 * np.pi), rise)[:, 0]
        if not is_beside(still, position):
            continue
        camera = look_at(position, target, focal=focal, width=width, height=height, roll=rng.normal(0, 0.06))
        if shows_a_subject(still, probe(still, camera)[1]):
            return camera
    raise NoView(f"still {still.seed} has no place for a camera after 60 tries")


@dataclass(frozen=True)
class Views:
    """How scenes of a kind are made and looked at."""

    make: Callable[[int, int, int], Room]
    """Of seed, number and attempt."""
    camera: Callable[..., Camera]
    """A random one, see `random_camera`."""
    is_free: Callable[[Any, Any], bool]
    """Whether a camera may stand at a position."""
    shows_enough: Callable[[Any, Hits], bool]
    """Whether a view is worth taking."""
    reach: tuple[float, float]
    """Least and most metres from the cameras of a capture to what they look at."""


KINDS: dict[Kind, Views] = {
    "room": Views(make_room, random_camera, is_free, shows_a_room, (1.6, 3.8)),
    "still": Views(make_still, random_still_camera, is_beside, shows_a_subject, (0.6, 3.8)),
}


def room_with_random_cameras(
    seed: int, index: int, count: int, *, focal: float, width: int, height: int, kind: Kind = "room"
) -> tuple[Room, list[Camera]]:
    """Room or still ``index`` and ``count`` cameras in it, see `random_camera` and `random_still_camera`.

    Raises:
        NoView: none of 20 attempts at it has that many.
    """

    def find(room: Room) -> list[Camera]:
        rng = room.rng(1)
        return [KINDS[kind].camera(room, rng, focal=focal, width=width, height=height) for _ in range(count)]

    return room_with_views(seed, index, find, kind)


def capture_cameras(
    room: Room,
    rng: np.random.Generator,
    *,
    num_train: int,
    num_test: int,
    focal: float,
    width: int,
    height: int,
    kind: Kind = "room",
) -> tuple[list[Camera], list[Camera]]:
    """Cameras of a few-view capture: on an arc around common content, the test cameras between and a little outside.

    Training cameras are in order along the arc, so that an evenly spaced choice of a few of them spreads over it. They
    span 36 to 60 degrees at 1.5 to 4 m from what they look at (.6 m and more of a still); down to half of that angle
    where no wider arc is found.

    Raises:
        NoView: no arc was found whose cameras are all free and see common content.
    """
    views = KINDS[kind]
    for attempt in range(40):
        middle = views.camera(room, rng, focal=focal, width=width, height=height)
        _, hits = probe(room, middle)
        reach = float(np.clip(1.0 / max(np.median(hits.inverse_depth), 1e-3), *views.reach))
        target = middle.position + reach * middle.rotation[2]
        angle = np.radians(rng.uniform(18, 30)) * (1 - attempt / 80)
        heights = 0.12 * np.where(np.arange(num_train) % 2, 1.0, -1.0) + rng.uniform(-0.06, 0.06, num_train)
        train_at = list(zip(np.linspace(-1.0, 1.0, num_train) if num_train > 1 else [0.0], heights))
        test_at = list(
            zip(np.linspace(-1.08, 1.08, num_test) if num_test > 1 else [0.1], rng.uniform(-0.1, 0.1, num_test))
        )
        cameras: list[Camera] = []
        for along, rise in train_at + test_at:
            arm = rotation_z(angle * along) @ (middle.position - target) * rng.uniform(0.96, 1.04)
            position = target + arm + [0.0, 0.0, rise]
            aim = target + rng.uniform(-0.08, 0.08, 3)
            camera = look_at(position, aim, focal=focal, width=width, height=height, roll=rng.normal(0, 0.01))
            if not views.is_free(room, position):
                break
            small, seen = probe(room, camera)
            if not views.shows_enough(room, seen) or overlap(room, small, seen, middle) < 0.4:
                break
            cameras.append(camera)
        else:
            return cameras[:num_train], cameras[num_train:]
    raise NoView(f"{kind} {room.seed} has no arc of {num_train} + {num_test} cameras after 40 tries")


def overlap(room: Room, small: Camera, seen: Hits, other: Camera) -> float:
    """Share of a probe's pixels whose points another camera sees too (in its image and not hidden)."""
    small_other, other_hits = probe(room, other)
    valid = seen.surface >= 0
    x, y = np.meshgrid(seen.x, seen.y)
    rays = np.stack([x[valid], y[valid], np.ones(valid.sum())], -1) / seen.inverse_depth[valid][:, None]
    local = (rays @ small.rotation + small.position - small_other.position) @ small_other.rotation.T
    z = np.maximum(local[:, 2], 1e-6)
    column = np.floor(local[:, 0] / z * small_other.focal + small_other.width / 2).astype(int)
    row = np.floor(local[:, 1] / z * small_other.focal + small_other.height / 2).astype(int)
    inside = (local[:, 2] > 0) & (column >= 0) & (column < small_other.width) & (row >= 0) & (row < small_other.height)
    q = other_hits.inverse_depth[row[inside], column[inside]]
    return float((q * z[inside] < 1.1).sum() / valid.size)


def exposure(room: Room, cameras: list[Camera]) -> float:
    """Factor for linear colour such that the 80th percentile of brightness over all views becomes `BRIGHTNESS`."""
    values = []
    for camera in cameras:
        small, hits = probe(room, camera)
        x, y = (a.ravel() for a in np.meshgrid(hits.x, hits.y))
        color = shade(room.scene, room.shadows, small, hits.surface.ravel(), hits.inverse_depth.ravel(), x, y)
        values.append(color @ np.array([0.3, 0.59, 0.11], np.float32))
    return float(BRIGHTNESS / max(np.quantile(np.concatenate(values), 0.8), 1e-4))

"""Photographs of a corner of three textured planes, by ray casting: structure from motion can place them."""

from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from script_modules import load_script

from diffusionerf_ns.structure_from_motion import Placed

WIDTH, HEIGHT, FOCAL = 480, 360, 420.0
PLANES = (np.array([0.0, 0.0, 1.0, 6.0]), np.array([0.0, 1.0, 0.0, 1.4]), np.array([-1.0, 0.0, 0.0, 2.2]))  # n x = d


def poses(count: int) -> Float[np.ndarray, "n 3 4"]:
    """World-to-camera in OpenCV axes (right, down, forward), of cameras a step apart on a bow."""
    found = []
    for angle in np.linspace(-0.25, 0.3, count):
        center = np.array([6.0 * np.sin(angle) * 0.9, -0.5 - 0.3 * angle, 6.0 - 6.0 * np.cos(angle)])
        forward = np.array([-0.4, 0.5, 5.5]) - center
        forward /= np.linalg.norm(forward)
        right = np.cross([0.0, 1.0, 0.0], forward)
        right /= np.linalg.norm(right)
        rotation = np.stack([right, np.cross(forward, right), forward])
        found.append(np.concatenate([rotation, -rotation @ center[:, None]], axis=1))
    return np.stack(found)


def render(
    pose: Float[np.ndarray, "3 4"], contrast: float = 55.0, size: tuple[int, int] = (WIDTH, HEIGHT)
) -> UInt8[np.ndarray, "h w 3"]:
    """What a camera sees; two by two rays a pixel."""
    width, height = size
    rng = np.random.default_rng(5)
    textures = [np.sum([_noise(rng, n) / n**0.3 for n in (16, 48, 128, 320)], axis=0) for _ in PLANES]
    x, y = np.meshgrid((np.arange(2 * width) + 0.5) / 2, (np.arange(2 * height) + 0.5) / 2)
    rays = np.stack([(x - width / 2) / FOCAL, (y - height / 2) / FOCAL, np.ones_like(x)], axis=-1) @ pose[:, :3]
    center = -pose[:, :3].T @ pose[:, 3]
    distance, value = np.full(x.shape, np.inf), np.zeros(x.shape)
    for plane, texture in zip(PLANES, textures):
        t = (plane[3] - center @ plane[:3]) / (rays @ plane[:3])
        points = center + t[..., None] * rays
        u, v = np.moveaxis(points[..., np.abs(plane[:3]) < 0.5], -1, 0)
        row, column = ((np.floor(w * 64) % 640).astype(int) for w in (u, v))
        nearer = (t > 0) & (t < distance)
        distance, value = np.where(nearer, t, distance), np.where(nearer, texture[row, column], value)
    value = value.reshape(height, 2, width, 2).mean(axis=(1, 3))
    return np.repeat((127.0 + contrast * value).clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)


def _noise(rng: np.random.Generator, cells: int) -> Float[np.ndarray, "640 640"]:
    coarse = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((640, 640), Image.Resampling.BICUBIC))


def photographs(folder: Path, count: int = 3, contrast: float = 55.0) -> Float[np.ndarray, "n 3 4"]:
    """Write photographs `0.png` ... and give their true poses."""
    folder.mkdir(parents=True, exist_ok=True)
    given = poses(count)
    for number, pose in enumerate(given):
        Image.fromarray(render(pose, contrast)).save(folder / f"{number}.png")
    return given


def save_with_exif(source: Path, target: Path, focal: int | None, orientation: int | None = None) -> None:
    """An image as a JPEG whose EXIF has a focal length in millimetres as on 35 mm film, and an orientation."""
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    if focal is not None:
        exif[0x8769] = {0xA405: focal}
    Image.open(source).save(target, quality=97, exif=exif)


def placed(
    name: str, rotation: tuple[tuple[float, float, float], ...] = tuple(map(tuple, np.eye(3))), points: int = 99
) -> Placed:
    """An image at the origin, with that rotation from the world to the camera."""
    return Placed(
        name=name,
        rotation=rotation,
        center=(0.0, 0.0, 0.0),
        focal=FOCAL,
        principal=(WIDTH / 2, HEIGHT / 2),
        distortion=0.0,
        size=(WIDTH, HEIGHT),
        known_focal=None,
        points=points,
    )


def noise(path: Path, seed: int = 0) -> None:
    """Write a photograph that has nothing in common with those."""
    pixels = np.random.default_rng(seed).integers(0, 255, (HEIGHT // 12, WIDTH // 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((WIDTH, HEIGHT)).save(path)


def errors_of(frames: list[dict], truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Degrees, and distances in parts of the cameras' spread.

    Args:
        frames: of `transforms.json`.
        truth: world-to-camera [n, 3, 4] in OpenCV axes.
    """
    rotations = truth[:, :, :3].transpose(0, 2, 1)
    centers = -(rotations @ truth[:, :, 3:])
    found = np.array([frame["transform_matrix"] for frame in frames])[:, :3]
    return load_script("pose_errors").pose_errors(
        found, np.concatenate([rotations * [1.0, -1.0, -1.0], centers], axis=2)
    )

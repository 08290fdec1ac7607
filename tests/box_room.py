"""A textured box seen from inside: few-view captures and priors for tests, made in a moment, exact in depth.

Notation
    half    half sides of the box, which is centred at the origin     [3], metres
    c2w     camera-to-world, OpenGL convention                        [3, 4]
    z       planar depth                                              [h, w], metres
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter, map_coordinates

HALF = np.array([2.0, 1.5, 1.3])
TEXELS = 120  # per metre, of the texture


@dataclass(frozen=True, kw_only=True)
class Pinhole:
    """A camera without distortion, principal point in the middle."""

    c2w: np.ndarray
    width: int = 96
    height: int = 72
    focal: float = 66.0

    def directions(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """World directions whose length along the optical axis is 1, of continuous pixel positions."""
        local = np.stack([(u - self.width / 2) / self.focal, -(v - self.height / 2) / self.focal, -np.ones_like(u)], -1)
        return local @ self.c2w[:, :3].T


def look_at(centre: tuple[float, float, float], target: tuple[float, float, float]) -> np.ndarray:
    """Camera-to-world with z up."""
    back = np.subtract(centre, target)
    back = back / np.linalg.norm(back)
    right = np.cross([0.0, 0.0, 1.0], back)
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(back, right), back, np.asarray(centre, float)], axis=1)


def cameras(count: int, **options: float) -> list[Pinhole]:
    """Cameras side by side that look at one corner of the box; the first and last are 1 metre apart."""
    shifts = np.linspace(-0.5, 0.5, count) if count > 1 else [0.0]
    return [
        Pinhole(c2w=look_at((s, -0.9 + 0.1 * (i % 2), 0.15 * (i % 3)), (1.2 + 0.3 * s, 1.5, -0.4)), **options)
        for i, s in enumerate(shifts)
    ]


def planar_depth(camera: Pinhole, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Depth along the optical axis at continuous pixel positions."""
    directions = camera.directions(u, v)
    with np.errstate(divide="ignore"):
        return ((np.sign(directions) * HALF - camera.c2w[:, 3]) / directions).min(-1)


def _textures() -> np.ndarray:
    """One picture of coloured blobs for each pair of opposite walls, [3, n, n, 3] in [0, 1]."""
    rng = np.random.default_rng(0)
    n = 2 * int(TEXELS * HALF.max()) + 8
    noise = gaussian_filter(rng.normal(size=(3, n, n, 3)), sigma=(0, 6.0, 6.0, 0), mode="wrap")
    return np.clip(0.5 + 0.25 * noise / noise.std(), 0.0, 1.0)


_TEXTURES = _textures()


def render(camera: Pinhole) -> tuple[np.ndarray, np.ndarray]:
    """Image [h, w, 3] uint8, the mean of 3 x 3 rays a pixel, and depth [h, w] at pixel centres."""
    fine = (np.arange(3 * camera.width) + 0.5) / 3, (np.arange(3 * camera.height) + 0.5) / 3
    u, v = np.meshgrid(*fine)
    points = camera.c2w[:, 3] + planar_depth(camera, u, v)[..., None] * camera.directions(u, v)
    wall = np.abs(np.abs(points) - HALF).argmin(-1)
    colour = np.zeros_like(points)
    for axis in range(3):
        on = wall == axis
        a, b = (points[on][:, k] for k in range(3) if k != axis)
        flip = np.where(points[on][:, axis] > 0, 1.0, -1.0)  # opposite walls look different
        at = np.stack([(a * flip + HALF.max()) * TEXELS, (b + HALF.max()) * TEXELS])
        colour[on] = np.stack([map_coordinates(_TEXTURES[axis, ..., c], at, order=1) for c in range(3)], -1)
    image = colour.reshape(camera.height, 3, camera.width, 3, 3).mean(axis=(1, 3))
    centres = np.meshgrid(np.arange(camera.width) + 0.5, np.arange(camera.height) + 0.5)
    return np.rint(255 * image).astype(np.uint8), planar_depth(camera, *centres)


def write_transforms(folder: Path, count: int = 6, *, depth: bool = True, **options: float) -> Path:
    """A capture as nerfstudio's transforms.json, true depth in millimetres; images 1 and 3 are for testing."""
    for sub in ("images", "depth"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    frames, lists = [], {"train": [], "test": []}
    for i, camera in enumerate(cameras(count, **options)):
        image, z = render(camera)
        Image.fromarray(image).save(folder / "images" / f"{i:03d}.png")
        Image.fromarray(np.rint(1000 * z).astype(np.uint16)).save(folder / "depth" / f"{i:03d}.png")
        pose = np.vstack([camera.c2w, [0.0, 0.0, 0.0, 1.0]])
        frame = {"file_path": f"images/{i:03d}.png", "transform_matrix": pose.tolist()}
        frames.append(frame | ({"depth_file_path": f"depth/{i:03d}.png"} if depth else {}))
        lists["test" if i in (1, 3) else "train"].append(frame["file_path"])
    content = {
        "w": camera.width,
        "h": camera.height,
        "fl_x": camera.focal,
        "fl_y": camera.focal,
        "cx": camera.width / 2,
        "cy": camera.height / 2,
        "train_filenames": lists["train"],
        "val_filenames": lists["test"],
        "test_filenames": lists["test"],
        "frames": frames,
    }
    (folder / "transforms.json").write_text(json.dumps(content))
    return folder


def write_llff(folder: Path, count: int = 10, **options: float) -> Path:
    """The same views as an LLFF capture (poses_bounds.npy and images_8); ids 0 and 8 are held out."""
    (folder / "images_8").mkdir(parents=True)
    rows = []
    for i, camera in enumerate(cameras(count, **options)):
        image, z = render(camera)
        Image.fromarray(image).save(folder / "images_8" / f"{i:03d}.png")
        right, up, back, centre = camera.c2w.T
        size = [8 * camera.height, 8 * camera.width, 8 * camera.focal]
        matrix = np.stack([-up, right, back, centre, size], axis=1)  # columns: down, right, backwards
        rows.append([*matrix.reshape(-1), z.min(), z.max()])
    np.save(folder / "poses_bounds.npy", np.array(rows))
    return folder


def drop_last_pose(folder: Path) -> None:
    """Damage an LLFF capture: its table of poses is a row short."""
    np.save(folder / "poses_bounds.npy", np.load(folder / "poses_bounds.npy")[:-1])


def spoil_pose(folder: Path, row: int, column: int) -> None:
    """Damage an LLFF capture: a number of its table of poses is none."""
    table = np.load(folder / "poses_bounds.npy")
    table[row, column] = np.nan
    np.save(folder / "poses_bounds.npy", table)


def remember_stereo(monkeypatch: Any) -> None:
    """Match the same images at the same poses once only in this process: many tests begin with it."""
    from diffusionerf_ns import stereo

    plain = stereo.match

    def match(cameras: Any, images: list[np.ndarray], masks: list[Any], complete: Any, guess: Any) -> Any:
        shapes = [None if mask is None else mask.numpy().tobytes() for mask in masks]
        arguments = getattr(complete, "args", ()), getattr(complete, "keywords", {})  # of a partial
        weights = tuple(p.numpy().tobytes() for network in arguments[0] for p in network.parameters())
        key = (
            getattr(complete, "func", complete).__qualname__,
            guess is complete,
            tuple(arguments[1].items()),
            weights,
            cameras.camera_to_worlds.numpy().tobytes(),
            *(image.tobytes() for image in images),
            *shapes,
        )
        if key not in _MATCHED:
            _MATCHED[key] = plain(cameras, images, masks, complete, guess)
        return _MATCHED[key]

    monkeypatch.setattr(stereo, "match", match)


_MATCHED: dict[tuple, Any] = {}


def write_prior(folder: Path, patch_size: int = 16, **unet: object) -> Path:
    """A prior folder with an untrained network of some thousand parameters, for patches of some pixels."""
    import torch
    from diffusers.models.unets.unet_2d import UNet2DModel

    from ddm_training.rgbd import RgbdSpec
    from ddm_training.unet import make_scheduler

    torch.manual_seed(0)
    arguments = {
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 8),
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
    }
    network = UNet2DModel(sample_size=patch_size, layers_per_block=1, norm_num_groups=4, **(arguments | unet))
    network.save_pretrained(folder / "unet")
    make_scheduler().save_pretrained(folder / "scheduler")
    quantiles = {"0.05": 0.2, "0.50": 0.45, "0.95": 1.0}
    spec = RgbdSpec(
        patch_size=patch_size,
        focal=66.0,
        focal_range=(50.0, 80.0),
        image_size=(96, 72),
        disparity_quantiles=quantiles,
        trained_on=("nothing",),
    )
    spec.save(folder)
    return folder

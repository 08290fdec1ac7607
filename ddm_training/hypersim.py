"""Hypersim (Roberts et al., ICCV 2021): cameras, tone map, and reading a frame.

Notation
    u, v       image coordinates in [-1, 1]; u to the right, v UP; pixel centres at u = 2 (i + .5) / W - 1
    M          M_cam_from_uv of the scene: M (u, v, 1) is the direction of a pixel's ray in camera axes
    dist       `depth_meters`: Euclidean distance to the camera centre in metres
    z          planar depth in metres: distance along the normal of the image plane

Tilt-shift. In most scenes M is not diagonal: the renderer keeps vertical lines upright by turning the image plane. Its
normal is then not the camera's own z axis. M = R U with a rotation R and an upper triangular U separates the two:
U (u, v, 1) is the same ray in axes aligned with the image plane, where the camera is an ordinary pinhole with an
off-centre principal point. Of the 482 published matrices all give fx = fy to .02 % this way, and a shear of 1.9 % at
most, which is what shows that these are the axes in which planar depth belongs together with the pixels. For the plain
matrix, R is the identity up to signs and z = dist f / sqrt(x^2 + y^2 + f^2) with f = 886.81.
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Shaped, UInt8
from PIL import Image

from ddm_training.errors import InputError
from ddm_training.rejection import IMAGE_ERRORS, FrameRejected, rejected_file

SPLIT_FILE = "metadata_images_split_scene_v1.csv"
CAMERA_FILE = "metadata_camera_parameters.csv"
WIDTH, HEIGHT = 1024, 768
WIDTH_HEIGHT = ("settings_output_img_width", "settings_output_img_height")
PLAIN_CAMERA = ((0.5773502886169104, 0.0, 0.0), (0.0, 0.4330127164626828, 0.0), (0.0, 0.0, -1.0))
# Users of the data set leave these out of training.
KNOWN_BAD_CAMERAS = frozenset(
    {
        ("ai_003_001", "cam_00"),
        ("ai_004_009", "cam_01"),
        ("ai_038_007", "cam_00"),
        ("ai_031_004", "cam_00"),
        ("ai_052_002", "cam_01"),
    }
)
Matrix = tuple[tuple[float, float, float], tuple[float, float, float], tuple[float, float, float]]
ColorSource = Literal["hdr", "preview"]


@dataclass(frozen=True, kw_only=True)
class SceneCamera:
    """What `metadata_camera_parameters.csv` says of a scene that is needed here."""

    matrix: Matrix = PLAIN_CAMERA
    """M_cam_from_uv."""
    width: int = WIDTH
    height: int = HEIGHT
    """Image size in pixels."""


def read_camera_file(path: Path) -> dict[str, SceneCamera]:
    """Camera by scene.

    Raises:
        InputError: missing, or not that table.
    """
    names = [[f"M_cam_from_uv_{i}{j}" for j in range(3)] for i in range(3)]
    columns = {"scene_name", *WIDTH_HEIGHT, *(name for line in names for name in line)}
    cameras: dict[str, SceneCamera] = {}
    try:
        with path.open(newline="") as file:
            rows = csv.DictReader(file)
            if missing := columns - set(rows.fieldnames or ()):
                raise InputError(f"{path} lacks the columns {sorted(missing)}; expected {CAMERA_FILE} of Hypersim.")
            for row in rows:
                matrix = tuple(tuple(float(row[name]) for name in line) for line in names)
                width, height = (int(float(row[name])) for name in WIDTH_HEIGHT)
                cameras[row["scene_name"]] = SceneCamera(
                    matrix=matrix,  # pyright: ignore[reportArgumentType]
                    width=width,
                    height=height,
                )
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error}); expected {CAMERA_FILE}, which Hypersim's authors publish in the "
            "repository apple/ml-hypersim (contrib/mikeroberts3000). --camera plain does without it, and gives wrong "
            "depth in the scenes with tilt-shift cameras."
        ) from error
    except (TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} has a damaged row after {next(reversed(cameras), 'its head')}: {error}.") from error
    return cameras


def frame_files(images: Path, camera: str, frame: int, color: ColorSource) -> dict[str, Path]:
    """Files that a frame needs, by what they hold, in ``images`` = `<scene>/images`."""
    stem = f"frame.{frame:04d}"
    geometry = images / f"scene_{camera}_geometry_hdf5"
    depth = {"depth": geometry / f"{stem}.depth_meters.hdf5"}
    if color == "preview":
        return depth | {"colour": images / f"scene_{camera}_final_preview" / f"{stem}.tonemap.jpg"}
    return depth | {
        "entity id": geometry / f"{stem}.render_entity_id.hdf5",
        "colour": images / f"scene_{camera}_final_hdf5" / f"{stem}.color.hdf5",
    }


@dataclass(frozen=True)
class Pinhole:
    """The pinhole camera in axes aligned with the image plane (x right, y down, z into the scene)."""

    intrinsics: tuple[float, float, float, float]
    """fx, fy, cx, cy in pixels, the centre of the first pixel at (0.5, 0.5)."""
    shear: float
    """s / fx of x = fx X + s Y + cx; 0.019 at most in the published scenes, and not modelled elsewhere."""
    cosine: Float[np.ndarray, "h w"]
    """z / dist of each pixel."""


def pinhole_from_uv(camera: SceneCamera) -> Pinhole:
    """M = R U; see the top of this file.

    Raises:
        FrameRejected: the matrix is singular or not finite.
    """
    matrix = np.asarray(camera.matrix, dtype=np.float64)
    if not np.isfinite(matrix).all() or abs(np.linalg.det(matrix)) < 1e-9:
        raise FrameRejected("camera matrix is singular")
    upper = np.linalg.qr(matrix, mode="r")
    upper *= (np.array([1.0, -1.0, 1.0]) * np.sign(np.diag(upper)))[:, None]  # x with u, y against v, z ahead
    w, h = camera.width, camera.height
    u = 2.0 * (np.arange(w) + 0.5) / w - 1.0
    v = 1.0 - 2.0 * (np.arange(h) + 0.5) / h
    rays = np.stack(np.broadcast_arrays(u[None, :], v[:, None], 1.0), axis=-1) @ upper.T  # [h, w, 3]
    inverse = np.linalg.inv(upper / upper[2, 2])  # u = K00 X + K01 Y + K02, v = K11 Y + K12
    fx, fy = inverse[0, 0] * w / 2, -inverse[1, 1] * h / 2
    cx, cy = (inverse[0, 2] + 1) * w / 2, (1 - inverse[1, 2]) * h / 2
    return Pinhole(
        (float(fx), float(fy), float(cx), float(cy)),
        float(inverse[0, 1] * w / 2 / fx),
        (rays[..., 2] / np.linalg.norm(rays, axis=-1)).astype(np.float32),
    )


def tone_map(rgb: Float[np.ndarray, "h w 3"], valid: Bool[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """clip((scale rgb)^(1/2.2)) with the scale that puts the 90th percentile of brightness at 0.8.

    Brightness is .3 R + .59 G + .11 B over ``valid`` pixels, p its percentile; scale = .8^2.2 / p, 0 where p < 1e-4, 1
    where no pixel is valid (as the data set's own tool does it).
    """
    scale = 1.0
    if valid.any():
        brightness = rgb[valid].astype(np.float32) @ np.array([0.3, 0.59, 0.11], np.float32)
        p = float(np.percentile(brightness, 90))
        scale = 0.8**2.2 / p if p >= 1e-4 else 0.0
    if rgb.dtype == np.float16:  # a table of all 65,536 half-precision values in place of 2.4 million powers
        table = _encode(np.arange(65536, dtype=np.uint16).view(np.float16), scale)
        return table[np.ascontiguousarray(rgb).view(np.uint16)]
    return _encode(rgb, scale)


def _encode(rgb: Float[np.ndarray, "*shape"], scale: float) -> UInt8[np.ndarray, "*shape"]:
    linear = np.nan_to_num(rgb.astype(np.float32), nan=0.0, posinf=65504.0, neginf=0.0)
    return np.rint(255.0 * np.clip(scale * linear, 0.0, 1.0) ** (1 / 2.2)).astype(np.uint8)


def read_frame(
    files: dict[str, Path], pinhole: Pinhole
) -> tuple[UInt8[np.ndarray, "h w 3"], Float[np.ndarray, "h w"], Bool[np.ndarray, "h w"]]:
    """sRGB colour, planar depth in metres and its validity (where something was hit, at a positive distance).

    Raises:
        FrameRejected: a file is damaged, of another size than the camera, or colour has NaN.
    """
    shape = pinhole.cosine.shape
    distance = _read_hdf5(files["depth"], "depth", shape)
    if not np.issubdtype(distance.dtype, np.floating):
        raise FrameRejected("depth is not floating point")
    depth = distance.astype(np.float32) * pinhole.cosine
    mask = np.isfinite(depth) & (depth > 0)
    if "entity id" not in files:
        return _read_preview(files["colour"], shape), depth, mask
    entity = _read_hdf5(files["entity id"], "entity id", shape)
    rgb = _read_hdf5(files["colour"], "colour", (*shape, 3))
    if not np.issubdtype(rgb.dtype, np.floating):
        raise FrameRejected("colour is not floating point")
    if np.isnan(rgb).any():
        raise FrameRejected("colour has NaN")
    return tone_map(rgb, entity != -1), depth, mask


def _read_hdf5(path: Path, what: str, shape: tuple[int, ...]) -> Shaped[np.ndarray, "..."]:
    import h5py

    try:
        with h5py.File(path, "r") as file:
            dataset = file["dataset"]
            if not isinstance(dataset, h5py.Dataset):
                raise FrameRejected(f"{what} file damaged")
            if dataset.shape != shape:
                raise FrameRejected(f"{what} of another size than the camera")
            return dataset[()]
    except (OSError, KeyError, RuntimeError) as error:  # truncated, no HDF5, broken chunk
        raise rejected_file(what, error) from error


def _read_preview(path: Path, shape: tuple[int, ...]) -> UInt8[np.ndarray, "h w 3"]:
    try:
        with Image.open(path) as image:
            if image.size != shape[::-1]:
                raise FrameRejected("colour of another size than the camera")
            return np.asarray(image.convert("RGB"))
    except IMAGE_ERRORS as error:
        raise rejected_file("colour", error) from error

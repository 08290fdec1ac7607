"""Patches for the prior: rays of a P x P window, from a perturbed training pose or from a training image.

Notation
    P       side of a patch in pixels
    f       focal length of the patch's camera, pixels: the prior's pixel scale
    u, v    continuous pixel coordinates, right and down, the centre of the first pixel at (0.5, 0.5)
    c2w     camera-to-world, OpenGL convention: x right, y up, z backwards     [3, 4]
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.cameras.rays import RayBundle
from torch import Tensor

from ddm_training.errors import InputError
from ddm_training.resampling import area_weights
from ddm_training.rgbd import RgbdSpec

Colours = Float[Tensor, "_h _w 3"] | UInt8[Tensor, "_h _w 3"]
"""In [0, 1], or of 255."""
OF_PATCH = "of_patch"
"""Metadata of rays, [n, 1]: whether they are a patch's. Where the key is missing, none are."""
ROUNDING = 1.0 + 1e-6
"""By which a patch that is made to fit may come out larger."""


@dataclass(frozen=True)
class Patch:
    """One patch: its rays in row-major order, and its colours where they are known."""

    rays: RayBundle
    """[P * P] rays; ``metadata["directions_norm"]`` is 1 / cosine to the optical axis, ``metadata[OF_PATCH]`` True."""
    rgb: Float[Tensor, "p p 3"] | None
    """Colours in [0, 1] of a patch of a training image; None for a patch that is rendered whole."""
    camera: int
    """Index of the training camera that the patch comes from or is near to."""
    pose: Float[Tensor, "3 4"]
    """Camera-to-world of the patch's camera."""


def window_directions(
    size: int,
    focal: float,
    offset: tuple[float, float],
    image_size: tuple[int, int],
    device: torch.device | str = "cpu",
) -> Float[Tensor, "p p 3"]:
    """Directions (x, y, -1) in camera space of a P x P window of a pinhole image, principal point at its centre.

    Args:
        size: P.
        focal: pixels.
        offset: u, v of the window's upper left corner, pixels; may be negative or run over the edge.
        image_size: width and height of the whole image, pixels.
        device: of the result.
    """
    steps = torch.arange(size, device=device, dtype=torch.float32) + 0.5
    u, v = steps + offset[0], steps + offset[1]
    y, x = torch.meshgrid(-(v - image_size[1] / 2) / focal, (u - image_size[0] / 2) / focal, indexing="ij")
    return torch.stack([x, y, -torch.ones_like(x)], dim=-1)


def camera_rays(directions: Float[Tensor, "p p 3"], pose: Float[Tensor, "3 4"], focal: float, camera: int) -> RayBundle:
    """Rays of a patch: camera-space directions (x, y, -1) seen from a pose, flattened row by row."""
    flat = directions.reshape(-1, 3).to(pose)
    norm = flat.norm(dim=-1, keepdim=True)
    return RayBundle(
        origins=pose[:, 3].expand_as(flat),
        directions=(flat / norm) @ pose[:, :3].T,
        pixel_area=torch.full_like(norm, 1.0 / focal**2),
        camera_indices=torch.full_like(norm, camera, dtype=torch.int64),
        metadata={"directions_norm": norm, OF_PATCH: torch.ones_like(norm, dtype=torch.bool)},
    )


def random_rotation(max_angle: float, generator: torch.Generator | None = None) -> Float[Tensor, "3 3"]:
    """Rotation by a uniform angle of up to ``max_angle`` radians about a uniformly random axis (Rodrigues)."""
    axis = torch.nn.functional.normalize(torch.randn(3, generator=generator), dim=0)
    angle = max_angle * torch.rand((), generator=generator)
    k = torch.tensor([[0.0, -axis[2], axis[1]], [axis[2], 0.0, -axis[0]], [-axis[1], axis[0], 0.0]])
    return torch.eye(3) + angle.sin() * k + (1.0 - angle.cos()) * (k @ k)


def perturb_pose(
    pose: Float[Tensor, "3 4"], jitter: float, max_angle: float, generator: torch.Generator | None = None
) -> Float[Tensor, "3 4"]:
    """Move the centre by a uniform +-jitter per axis (scene units) and turn by up to ``max_angle`` radians."""
    rotation = random_rotation(max_angle, generator).to(pose)
    shift = ((2.0 * torch.rand(3, generator=generator) - 1.0) * jitter).to(pose)
    return torch.cat([rotation @ pose[:, :3], (pose[:, 3] + shift)[:, None]], dim=1)


def sample_rendered_patch(
    cameras: Cameras,
    spec: RgbdSpec,
    *,
    jitter: float,
    max_angle: float,
    generator: torch.Generator | None = None,
) -> Patch:
    """A patch seen from near a training camera (paper section 3.4).

    The window lies anywhere in the prior's pseudo image and may run half a patch over its edge (authors' code).

    Args:
        cameras: training cameras.
        spec: the prior's; gives P, the focal length and the size of the pseudo image.
        jitter: of the camera centre per axis, scene units.
        max_angle: of the rotation, radians.
        generator: on the CPU; torch's global one if None.
    """
    camera = int(torch.randint(len(cameras), (1,), generator=generator))
    pose = perturb_pose(cameras.camera_to_worlds[camera], jitter, max_angle, generator)
    half = spec.patch_size / 2
    low = torch.tensor([-half, -half])
    high = torch.tensor(spec.image_size, dtype=torch.float32) - half
    u, v = (low + torch.rand(2, generator=generator) * (high - low)).tolist()
    directions = window_directions(spec.patch_size, spec.focal, (u, v), spec.image_size)
    return Patch(camera_rays(directions.to(pose), pose, spec.focal, camera), None, camera, pose)


def image_patch_focal(spec: RgbdSpec, image_focal: float) -> float:
    """Focal length of a patch cut from an image of that focal length, pixels.

    The prior's own, unless the image is coarser: an upsampled image is blurred as no training patch is, so the patch is
    then cut at the image's scale, as far as the prior knows that scale.
    """
    return min(max(image_focal, spec.focal_range[0]), spec.focal)


def images_with_patches(cameras: Cameras, spec: RgbdSpec) -> list[int]:
    """The training images inside which a patch of one of the pixel scales that the prior knows lies wholly.

    Returns:
        Their indices; at least one.

    Raises:
        InputError: there is none; names the first image's size, the patch's size in its pixels, and what to do.
    """
    sides = [_window_side(cameras, index, spec) for index in range(len(cameras))]
    sizes = [(int(width), int(height)) for width, height in zip(cameras.width, cameras.height)]
    fitting = [
        index
        for index, (side, size) in enumerate(zip(sides, sizes))
        if side[0] <= size[0] * ROUNDING and side[1] <= size[1] * ROUNDING
    ]
    if not fitting:
        (across, down), (width, height) = sides[0], sizes[0]
        focal = spec.patch_size * float(cameras.fx[0]) / across
        raise InputError(
            f"a patch of the prior ({spec.patch_size} pixels at a focal length of {focal:g}) covers {across:.0f} x "
            f"{down:.0f} pixels of training image 0, which has only {width} x {height}, and no other image has room "
            "for one: give a wider field of view, a prior with smaller patches, or switch patches of images off with "
            "--pipeline.datamanager.image-patch-share 0."
        )
    return fitting


def _window_side(cameras: Cameras, index: int, spec: RgbdSpec) -> tuple[float, float]:
    """Width and height in image pixels of a patch cut from that image.

    Where a patch of `image_patch_focal` is larger than the image, its focal length is longer, by as much as makes it
    fit, but not longer than the prior knows, nor than the image's.
    """
    fx, fy = float(cameras.fx[index]), float(cameras.fy[index])
    focal = image_patch_focal(spec, fx)
    fitting = spec.patch_size * max(fx / int(cameras.width[index]), fy / int(cameras.height[index]))
    focal = max(focal, min(fitting, spec.focal_range[1], fx))
    return spec.patch_size * fx / focal, spec.patch_size * fy / focal


def sample_image_patch(
    cameras: Cameras,
    images: Sequence[Colours] | Tensor,
    spec: RgbdSpec,
    *,
    among: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
) -> Patch:
    """A patch of a training image at the prior's pixel scale, wholly inside the image.

    Args:
        cameras: training cameras, in the order of ``images``.
        images: each [h, w, 3] of its camera's size.
        spec: the prior's.
        among: `images_with_patches`; None: all are.
        generator: on the CPU; torch's global one if None.
    """
    among = range(len(cameras)) if among is None else among
    camera = among[int(torch.randint(len(among), (1,), generator=generator))]
    side = torch.tensor(_window_side(cameras, camera, spec))
    size = torch.tensor([float(cameras.width[camera]), float(cameras.height[camera])])
    corner = torch.rand(2, generator=generator) * (size - side).clamp_min(0.0)
    return cut_image_patch(cameras, images[camera], camera, spec, (float(corner[0]), float(corner[1])))


def cut_image_patch(
    cameras: Cameras, image: Colours, camera: int, spec: RgbdSpec, corner: tuple[float, float]
) -> Patch:
    """The patch of an image whose upper left corner lies at ``corner`` (u, v in the image's pixels).

    Its colours are averages of areas where the image is finer, as those of the prior's data are.
    """
    size = spec.patch_size
    side = _window_side(cameras, camera, spec)
    steps = (torch.arange(size, dtype=torch.float32) + 0.5) / size
    v, u = torch.meshgrid(corner[1] + steps * side[1], corner[0] + steps * side[0], indexing="ij")
    rays = cameras.generate_rays(
        camera_indices=torch.full((size * size, 1), camera, device=cameras.device, dtype=torch.int64),
        coords=torch.stack([v, u], dim=-1).reshape(-1, 2).to(cameras.device),
    )
    norm = rays.metadata["directions_norm"]
    rays.metadata = {"directions_norm": norm, OF_PATCH: torch.ones_like(norm, dtype=torch.bool)}
    rows, wy = _window(corner[1], side[1], size, image.shape[0])
    columns, wx = _window(corner[0], side[0], size, image.shape[1])
    window = image[rows, columns]
    window = window if window.is_floating_point() else window.float() / 255.0
    rgb = torch.einsum("ph,hwc,qw->pqc", wy, window, wx)
    return Patch(rays, rgb, camera, cameras.camera_to_worlds[camera])


def _window(start: float, length: float, count: int, pixels: int) -> tuple[slice, Float[Tensor, "{count} _n"]]:
    """Of one axis: the pixels that a window needs, and what each output takes of them."""
    first, last = max(math.floor(start) - 1, 0), min(math.ceil(start + length) + 1, pixels)
    step, extent = torch.tensor([length / count]), torch.tensor([last - first])
    return slice(first, last), area_weights(torch.tensor([start - first]), step, count, last - first, extent)[0]


def concatenate_rays(bundles: list[RayBundle]) -> RayBundle:
    """One bundle of several flat ones; of the metadata ``directions_norm`` is kept, which all of ours have, and
    `OF_PATCH` where there is one."""
    norms = [b.metadata["directions_norm"] for b in bundles]
    metadata = {"directions_norm": torch.cat(norms)}
    if any(OF_PATCH in b.metadata for b in bundles):
        none = (torch.zeros_like(norm, dtype=torch.bool) for norm in norms)
        metadata[OF_PATCH] = torch.cat([b.metadata.get(OF_PATCH, default) for b, default in zip(bundles, none)])
    return RayBundle(
        origins=torch.cat([b.origins for b in bundles]),
        directions=torch.cat([b.directions for b in bundles]),
        pixel_area=torch.cat([b.pixel_area for b in bundles]),
        camera_indices=torch.cat([b.camera_indices for b in bundles]),  # pyright: ignore[reportArgumentType]
        metadata=metadata,
    )


def hold_patches(rays: RayBundle) -> None:
    """Keep gradients of patches from the poses of cameras, which the prior knows nothing of. In place."""
    of_patch = rays.metadata.get(OF_PATCH)
    if of_patch is not None:
        rays.origins = torch.where(of_patch, rays.origins.detach(), rays.origins)
        rays.directions = torch.where(of_patch, rays.directions.detach(), rays.directions)

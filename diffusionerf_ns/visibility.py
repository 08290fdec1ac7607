"""Where points lie in the images of cameras, lens included, and how many training frusta see a point."""

import torch
from jaxtyping import Bool, Float, Int
from nerfstudio.cameras.cameras import Cameras, CameraType
from torch import Tensor, nn

_SLACK = 1e-4  # of a slope: nerfstudio undistorts the border to about that


def are_perspective(cameras: Cameras) -> bool:
    """Whether all cameras are of nerfstudio's perspective type."""
    return bool((cameras.camera_type == CameraType.PERSPECTIVE.value).all())


class Projections(nn.Module):
    """Projections of points into images, one a camera.

    Args:
        cameras: OpenGL convention (looking along -z), in scene units. Those that are not perspective count as pinhole
            cameras without a lens.
    """

    rotation: Float[Tensor, "cameras 3 3"]
    position: Float[Tensor, "cameras 3"]
    focal: Float[Tensor, "cameras 2"]
    centre: Float[Tensor, "cameras 2"]
    size: Float[Tensor, "cameras 2"]
    lens: Float[Tensor, "cameras 6"] | None
    low: Float[Tensor, "cameras 2"] | None
    high: Float[Tensor, "cameras 2"] | None

    def __init__(self, cameras: Cameras) -> None:
        super().__init__()
        pose = cameras.camera_to_worlds.reshape(-1, 3, 4).float()
        pair = lambda x, y: torch.cat([x.reshape(-1, 1), y.reshape(-1, 1)], dim=1).float()  # noqa: E731
        lens, low, high = cameras.distortion_params, None, None
        if lens is None or not bool(lens.any()) or not are_perspective(cameras):
            lens = None
        else:
            lens = lens.reshape(-1, 6).float()
            borders = [_border(cameras.flatten()[index : index + 1]) for index in range(len(pose))]
            low, high = (torch.stack(ends) for ends in zip(*borders))
        buffers = {
            "rotation": pose[:, :, :3],
            "position": pose[:, :, 3],
            "focal": pair(cameras.fx, cameras.fy),
            "centre": pair(cameras.cx, cameras.cy),
            "size": pair(cameras.width, cameras.height),
            "lens": lens,
            "low": low,
            "high": high,
        }
        for name, value in buffers.items():
            # Rebuilt from the data set with every start: nothing to keep in a checkpoint.
            self.register_buffer(name, value, persistent=False)

    def __len__(self) -> int:
        return len(self.position)

    @torch.no_grad()
    def forward(
        self, index: int, points: Float[Tensor, "*batch 3"]
    ) -> tuple[Float[Tensor, "*batch 2"], Float[Tensor, "*batch"], Bool[Tensor, "*batch"]]:
        """Project points into the image of a camera.

        Args:
            index: of the camera.
            points: scene units.

        Returns:
            pixel (u, v), the centre of the first at (.5, .5); planar depth, scene units; and whether the point is ahead
            and in the image. Pixels of points that are not ahead mean nothing.
        """
        local = (points - self.position[index]) @ self.rotation[index]
        z = -local[..., 2]
        slope = torch.stack([local[..., 0], -local[..., 1]], dim=-1) / z.clamp_min(1e-9)[..., None]
        inside = z > 0
        if self.lens is not None and self.low is not None and self.high is not None:
            # Beyond what the image shows, a lens's polynomial means nothing.
            inside = inside & ((slope >= self.low[index]) & (slope <= self.high[index])).all(dim=-1)
            slope = distort(slope, self.lens[index])
        pixel = slope * self.focal[index] + self.centre[index]
        return pixel, z, inside & ((pixel >= 0) & (pixel <= self.size[index])).all(dim=-1)


def distort(slope: Float[Tensor, "*batch 2"], lens: Float[Tensor, "6"]) -> Float[Tensor, "*batch 2"]:
    """x / z and y / z (y down) as a lens bends them: nerfstudio's k1, k2, k3, k4, p1, p2 (OpenCV's model)."""
    k1, k2, k3, k4, p1, p2 = lens.unbind()
    x, y = slope.unbind(dim=-1)
    square = x.square() + y.square()
    radial = 1.0 + square * (k1 + square * (k2 + square * (k3 + square * k4)))
    return torch.stack(
        [
            radial * x + 2.0 * p1 * x * y + p2 * (square + 2.0 * x.square()),
            radial * y + 2.0 * p2 * x * y + p1 * (square + 2.0 * y.square()),
        ],
        dim=-1,
    )


def _border(camera: Cameras) -> tuple[Float[Tensor, "2"], Float[Tensor, "2"]]:
    """Least and largest x / z and y / z (y down) of what a camera's image shows."""
    steps = torch.linspace(0.0, 1.0, 9)
    sides = [torch.stack([edge, steps], -1) for edge in (torch.zeros(9), torch.ones(9))]
    share = torch.cat([*sides, *(side.flip(-1) for side in sides)]).to(camera.device)
    border = share * torch.cat([camera.height, camera.width], dim=-1)
    directions = camera.generate_rays(camera_indices=0, coords=border).directions @ camera.camera_to_worlds[0, :, :3]
    slope = torch.stack([directions[:, 0], -directions[:, 1]], dim=-1) / -directions[:, 2:]
    return slope.amin(dim=0) - _SLACK, slope.amax(dim=0) + _SLACK


class TrainingFrusta(Projections):
    """The view frusta of training cameras.

    Args:
        cameras: the training cameras, see `Projections`.
        near: points closer to a camera than this (planar depth, scene units) count as unseen by it.
    """

    def __init__(self, cameras: Cameras, near: float) -> None:
        super().__init__(cameras)
        self.near = near

    @torch.no_grad()
    def count(self, points: Float[Tensor, "*batch 3"]) -> Int[Tensor, "*batch"]:
        """Number of frusta that hold each point."""
        # One camera at a time: memory stays that of the points, and there are few cameras.
        total = torch.zeros(points.shape[:-1], dtype=torch.int64, device=points.device)
        for index in range(len(self)):
            _, z, inside = self(index, points)
            total += inside & (z >= self.near)
        return total

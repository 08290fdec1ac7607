"""The membrane of many images at once is that of each, nearly."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ddm_training import membrane

pytestmark = pytest.mark.usefixtures("one_thread")


def images(count: int, height: int, width: int, share: float) -> tuple[Tensor, Tensor]:
    """Areas of one colour, some grained, with depth known in patches of a share of the pixels, some of it wrong."""
    g = torch.Generator().manual_seed(0)
    areas = F.interpolate(torch.rand(count, 3, height // 8, width // 8, generator=g), size=(height, width))
    grain = F.interpolate(torch.rand(count, 1, 3, 4, generator=g), size=(height, width)).square() * 0.1
    rgb = (areas + grain * torch.randn(areas.shape, generator=g)).clamp(0, 1)
    z = F.interpolate(1.0 + 4.0 * torch.rand(count, 1, 4, 5, generator=g), size=(height, width), mode="bilinear")[:, 0]
    z = z * torch.randn(z.shape, generator=g).mul(0.02).exp()
    where = F.interpolate(torch.rand(count, 1, height // 3, width // 3, generator=g), size=(height, width))[:, 0]
    where[:, 0, 0] = 0.0
    return rgb, torch.where(where < share, z, 0.0)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.7])
@pytest.mark.parametrize("size", [(48, 64), (40, 24), (88, 64), (16, 16)])
def test_a_batch_is_interpolated_as_each_image_is(size, share) -> None:
    rgb, depth = images(12, *size, share)
    found = membrane.interpolate_batch(rgb, depth).numpy()
    expected = np.stack([membrane.interpolate(a.permute(1, 2, 0).numpy(), b.numpy()) for a, b in zip(rgb, depth)])
    error = np.abs(found / expected - 1.0)
    assert np.median(error) < 1e-3
    assert np.quantile(error, 0.99) < 2e-2


def test_an_image_does_not_depend_on_the_others_and_one_without_depth_is_1_all_over() -> None:
    rgb, depth = images(3, 24, 32, 0.3)
    depth[1] = 0.0
    whole = membrane.interpolate_batch(rgb, depth)
    assert bool((whole[1] == 1.0).all())
    torch.testing.assert_close(membrane.interpolate_batch(rgb[2:], depth[2:]), whole[2:], rtol=1e-4, atol=0.0)
    assert float(whole[0].amax()) <= float(depth[0].amax()) * (1 + 1e-6)


def test_another_unit_gives_the_same_depth_in_that_unit() -> None:
    rgb, depth = images(2, 24, 32, 0.3)
    millimetres = membrane.interpolate_batch(rgb, 1000.0 * depth)
    torch.testing.assert_close(millimetres, 1000.0 * membrane.interpolate_batch(rgb, depth), rtol=1e-3, atol=0.0)


@pytest.mark.parametrize(("height", "width"), [(8, 256), (1, 200), (200, 3)])
def test_narrow_images_are_interpolated_too(height: int, width: int) -> None:
    g = torch.Generator().manual_seed(0)
    rgb = torch.rand(2, 3, height, width, generator=g)
    depth = torch.where(
        torch.rand(2, height, width, generator=g) < 0.3, 1.0 + torch.rand(2, height, width, generator=g), 0.0
    )
    for image, known, found in zip(rgb, depth, membrane.interpolate_batch(rgb, depth)):
        expected = membrane.interpolate(image.permute(1, 2, 0).numpy(), known.numpy())
        torch.testing.assert_close(found, torch.from_numpy(expected), rtol=2e-2, atol=0.0)

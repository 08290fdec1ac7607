"""Exposures of training images: found from surfaces whose colours are known, and from a matched box."""

import box_room
import numpy as np
import pytest
import torch

from diffusionerf_ns import exposure, stereo


def surfaces(count: int = 400, seed: int = 0) -> torch.Tensor:
    return 0.2 + 0.4 * torch.rand(count, 3, generator=torch.Generator().manual_seed(seed))


def seen_at(colours: torch.Tensor, exposures: torch.Tensor) -> list[exposure.Pair]:
    """Pairs of consecutive images of the same surfaces."""
    return [
        (i, i + 1, colours * exposures[i].exp(), colours * exposures[i + 1].exp()) for i in range(len(exposures) - 1)
    ]


def test_exposures_are_those_that_the_colours_were_made_with():
    e = torch.tensor([[0.1, 0.0, -0.05], [-0.2, 0.05, 0.1], [0.1, -0.05, -0.05]])
    torch.testing.assert_close(exposure.from_pairs(3, seen_at(surfaces(), e)), e, atol=1e-5, rtol=0.0)


def test_wrong_matches_and_burnt_out_pixels_do_not_count():
    e = torch.tensor([[0.1, 0.0, -0.1], [-0.1, 0.0, 0.1]])
    ((i, j, a, b),) = seen_at(surfaces(), e)
    b[:100] = surfaces(100, seed=1)
    a, b = torch.cat([a, torch.ones(900, 3)]), torch.cat([b, torch.full((900, 3), 0.9)])
    torch.testing.assert_close(exposure.from_pairs(2, [(i, j, a, b)]), e, atol=0.02, rtol=0.0)


def test_images_that_nothing_links_have_the_mean_exposure():
    e = torch.tensor([[0.2, 0.2, 0.2], [-0.2, -0.2, -0.2]])
    found = exposure.from_pairs(4, seen_at(surfaces(), e))
    torch.testing.assert_close(found[:2], e, atol=1e-5, rtol=0.0)
    assert (found[2:].abs() < 1e-6).all()
    assert torch.equal(exposure.from_pairs(2, seen_at(surfaces(exposure.LEAST_PIXELS - 1), e)), torch.zeros(2, 3))


def test_a_few_per_cent_are_no_difference():
    assert not exposure.differ(torch.tensor([[0.04, 0.0, 0.0], [-0.04, 0.0, 0.0]]))
    assert exposure.differ(torch.tensor([[0.06, 0.0, 0.0], [-0.06, 0.0, 0.0]]))


@pytest.mark.parametrize("gains", [(1.0, 1.0, 1.0), (1.15, 0.9, 1.0)])
def test_stereo_finds_the_exposures_of_a_boxs_photographs(gains):
    cameras = box_room.cameras(3, width=160, height=120, focal=110.0)
    images = []
    for camera, gain in zip(cameras, gains):
        image, _ = box_room.render(camera)
        images.append(np.rint(image * 0.8 * np.array([gain, 1.0, 1.0])).clip(0, 255).astype(np.uint8))
    found = stereo.match(box_room.ns_cameras(cameras), images).exposures
    expected = torch.zeros(3, 3)
    expected[:, 0] = torch.tensor(gains).log() - torch.tensor(gains).log().mean()
    torch.testing.assert_close(found, expected, atol=0.01, rtol=0.0)

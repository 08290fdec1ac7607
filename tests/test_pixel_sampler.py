"""Pixels inside masks: of one image, of masks smaller than a batch, and of all pixels alike."""

import pytest
import torch
from nerfstudio.data.pixel_samplers import PixelSamplerConfig

from ddm_training.errors import InputError
from diffusionerf_ns.pixel_sampler import MaskedPixelSampler

H, W = 12, 20


def sampler(rejection: bool = True) -> MaskedPixelSampler:
    return MaskedPixelSampler(PixelSamplerConfig(rejection_sample_mask=rejection))


@pytest.mark.parametrize("rejection", [True, False])
@pytest.mark.parametrize("images", [1, 2])
def test_pixels_lie_inside_and_each_is_as_likely(images, rejection):
    torch.manual_seed(0)
    mask = torch.zeros(images, H, W, 1, dtype=torch.bool)
    mask[-1, 3:7, 5:15] = True
    drawn = sampler(rejection).sample_method(8000, images, H, W, mask=mask)
    assert mask[..., 0][drawn.unbind(-1)].all()
    counts = torch.zeros(images, H, W).index_put(drawn.unbind(-1), torch.ones(8000), accumulate=True)
    inside = counts[-1, 3:7, 5:15]  # 40 pixels, 200 times each
    assert inside.sum() == 8000
    assert inside.min() > 130
    assert inside.max() < 270


def test_a_mask_of_fewer_pixels_than_are_drawn_gives_them_several_times():
    mask = torch.zeros(3, H, W, 1, dtype=torch.bool)
    mask[1, 4, 6] = mask[2, 0, 0] = True
    draws = sampler()
    for _ in range(3):
        drawn = draws.sample_method(64, 3, H, W, mask=mask)
        assert {tuple(row) for row in drawn.tolist()} == {(1, 4, 6), (2, 0, 0)}
    other = torch.ones(3, H, W, 1, dtype=torch.bool)
    assert len(draws.sample_method(64, 3, H, W, mask=other).unique(dim=0)) > 30


def test_small_masks_of_images_of_several_sizes_are_looked_through_once(monkeypatch):
    """nerfstudio gives each of them as a new view of the mask that it keeps."""
    masks = [torch.zeros(H + i, W, 1, dtype=torch.bool) for i in range(3)]
    for i, mask in enumerate(masks):
        mask[4, i] = True
    looked, nonzero = [], torch.nonzero
    monkeypatch.setattr(torch, "nonzero", lambda x: looked.append(x.ndim) or nonzero(x))
    draws = sampler()
    for _ in range(2):
        for i, mask in enumerate(masks):
            drawn = draws.sample_method(16, 1, H + i, W, mask=mask.unsqueeze(0))
            assert drawn.unique(dim=0).tolist() == [[0, 4, i]]
    assert looked.count(3) == 3


def test_masks_without_a_pixel_are_refused():
    with pytest.raises(InputError, match="masks of all images are black"):
        sampler().sample_method(64, 1, H, W, mask=torch.zeros(1, H, W, 1, dtype=torch.bool))


def test_an_evaluation_draws_from_all_pixels_where_masks_are_black():
    judged = MaskedPixelSampler(PixelSamplerConfig(), in_training=False)
    drawn = judged.sample_method(500, 2, H, W, mask=torch.zeros(2, H, W, 1, dtype=torch.bool))
    assert drawn.max(dim=0).values.tolist() == [1, H - 1, W - 1]


def test_without_masks_it_is_nerfstudios():
    torch.manual_seed(1)
    drawn = sampler().sample_method(500, 2, H, W)
    assert drawn.min(dim=0).values.tolist() == [0, 0, 0]
    assert drawn.max(dim=0).values.tolist() == [1, H - 1, W - 1]

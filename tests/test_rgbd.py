"""The RGBD encoding and `rgbd.json`."""

import json
import math
from pathlib import Path

import pytest
import torch

from ddm_training.errors import InputError
from ddm_training.rgbd import NEAR, RgbdSpec, decode, decode_depth, encode, encode_depth, pseudo_image


def test_depth_is_encoded_as_inverse_depth_in_minus_one_to_one() -> None:
    z = torch.tensor([0.01, 0.2, 0.4, 2.0, 1e9], dtype=torch.float64)
    expected = [1.0, 1.0, 0.0, -0.8, -1.0]
    assert encode_depth(z).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("near", [0.2, 1.0])
def test_decoding_undoes_encoding_between_near_and_far(near: float) -> None:
    z = torch.logspace(math.log10(near), 2.9, 100, dtype=torch.float64)
    torch.testing.assert_close(decode_depth(encode_depth(z, near), near), z)


def test_encoding_undoes_decoding_inside_the_range() -> None:
    x = torch.linspace(-0.999, 1.0, 50, dtype=torch.float64)
    torch.testing.assert_close(encode_depth(decode_depth(x)), x)


def test_noisy_values_decode_to_near_or_far() -> None:
    assert decode_depth(torch.tensor([1.7, -1.0, -1.4]), far=500.0).tolist() == pytest.approx([NEAR, 500.0, 500.0])


def test_encoding_of_depth_scaled_with_near_is_the_same() -> None:
    z = torch.rand(3, 4, 5, dtype=torch.float64) * 10
    torch.testing.assert_close(encode_depth(7.0 * z, 7.0 * NEAR), encode_depth(z))


def test_the_gradient_of_encoding_is_minus_two_near_over_z_squared_and_zero_before_near() -> None:
    z = torch.tensor([0.1, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    encode_depth(z).sum().backward()
    assert z.grad is not None
    assert z.grad.tolist() == pytest.approx([0.0, -2 * 0.2 / 0.25, -2 * 0.2 / 9.0])


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_patches_of_any_batch_shape_go_there_and_back_with_depth_as_the_last_channel(batch: tuple[int, ...]) -> None:
    rgb, z = torch.rand(*batch, 3, 6, 5), torch.rand(*batch, 6, 5) * 5 + 0.3
    x = encode(rgb, z)
    assert x.shape == (*batch, 4, 6, 5)
    assert x.abs().max() <= 1
    torch.testing.assert_close(x[..., 3, :, :], encode_depth(z))
    back_rgb, back_z = decode(x)
    torch.testing.assert_close(back_rgb, rgb)
    torch.testing.assert_close(back_z, z)


def test_colour_beyond_the_range_is_held() -> None:
    x = torch.zeros(4, 2, 2)
    x[0], x[1] = 3.0, -3.0
    rgb, _ = decode(x)
    assert rgb[:, 0, 0].tolist() == [1.0, 0.0, 0.5]


SPEC = RgbdSpec(
    patch_size=24,
    focal=150.0,
    focal_range=(120.0, 180.0),
    disparity_quantiles={"0.50": 0.4},
    depth_scale_jitter=1.5,
    trained_on=("rooms", "hololens"),
    steps=1000,
    license="Apache-2.0",
)


@pytest.mark.parametrize("focal", [175.0, 350.0, 87.5, 120.0])
def test_the_pseudo_image_keeps_its_field_of_view(focal: float) -> None:
    width, height = pseudo_image(focal)
    assert width / focal == pytest.approx(256 / 175, abs=0.5 / focal)
    assert height / focal == pytest.approx(192 / 175, abs=0.5 / focal)


def test_a_specification_comes_back_as_it_was(tmp_path: Path) -> None:
    SPEC.save(tmp_path)
    assert RgbdSpec.load(tmp_path) == SPEC


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        # of these two, the run-time type check of the tests speaks before the class does
        ({"encoding": "log-depth"}, r"(?s)rgbd\.json.*'log-depth'(?i:.*expected.*)'inverse-depth'"),
        ({"units": "feet"}, r"(?s)rgbd\.json.*'feet'(?i:.*expected.*)'metres'"),
        ({"near": 0.0}, r"near must be positive metres, found 0\.0"),
        ({"near": -1.0}, "near must be positive"),
        ({"near": math.nan}, "near must be positive"),
        ({"patch_size": 20}, "multiple of 8, found 20"),
        ({"patch_size": 0}, "multiple of 8, found 0"),
        ({"focal": 500.0}, r"0 < low <= focal <= high, found 120\.0, 500\.0, 180\.0"),
        ({"focal_range": [0.0, 180.0]}, "0 < low"),
        ({"focal_range": [180.0, 120.0]}, "0 < low"),
        ({"focal_range": 3}, r"rgbd\.json: focal_range must be a list of two numbers, found 3"),
        ({"focal_range": [1]}, r"focal_range must be a list of two numbers, found \[1\]"),
        ({"image_size": [256]}, "image_size must be a list of two numbers"),
        ({"trained_on": None}, "trained_on must be a list of names, found None"),
        ({"trained_on": "toy"}, "trained_on must be a list of names, found 'toy'"),
        ({"colour_space": "sRGB"}, r"unknown entries \['colour_space'\]"),
    ],
)
def test_a_file_that_says_something_impossible_or_unknown_is_refused(
    tmp_path: Path, change: dict, complaint: str
) -> None:
    SPEC.save(tmp_path)
    path = tmp_path / "rgbd.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=complaint):
        RgbdSpec.load(tmp_path)


def test_a_folder_without_the_file_is_no_prior_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"not a prior folder: it has no rgbd\.json"):
        RgbdSpec.load(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "\x00\x01", '"text"', "[1]"])
def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path, content: str) -> None:
    (tmp_path / "rgbd.json").write_text(content)
    with pytest.raises(InputError, match=r"rgbd\.json"):
        RgbdSpec.load(tmp_path)


def test_entries_that_are_not_given_have_the_values_of_the_paper(tmp_path: Path) -> None:
    (tmp_path / "rgbd.json").write_text("{}")
    spec = RgbdSpec.load(tmp_path)
    assert (spec.near, spec.patch_size, spec.focal, spec.image_size) == (0.2, 48, 175.0, (256, 192))

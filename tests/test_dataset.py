"""Images, masks and depth as the data set gives them: of all modes, and refused where they do not fit."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_capture import make_capture, parse

from ddm_training.errors import InputError
from diffusionerf_ns import dataset as data_module
from diffusionerf_ns.dataset import FewViewDataset, load_depth, load_mask
from diffusionerf_ns.metrics import evaluate_depth


def test_masks_and_depth_of_another_shape_are_refused(tmp_path):
    make_capture(tmp_path, 3, mask=True, depth=True)
    Image.new("L", (40, 40)).save(tmp_path / "masks" / "f01.png")
    with pytest.raises(InputError, match=r"mask .*f01\.png is 40 x 40"):
        FewViewDataset(parse(tmp_path))[1]
    Image.fromarray(np.ones((20, 40), dtype=np.uint16)).save(tmp_path / "depths" / "f02.png")
    with pytest.raises(InputError, match=r"depth .*f02\.png is 40 x 20"):
        FewViewDataset(parse(tmp_path))[2]


def test_images_of_other_modes_become_rgb(tmp_path):
    make_capture(tmp_path, 3)
    Image.new("L", (40, 30), 77).save(tmp_path / "images" / "f01.png")
    palette = Image.new("RGB", (40, 30), (200, 10, 30)).convert("P", palette=Image.Palette.ADAPTIVE)
    palette.save(tmp_path / "images" / "f02.png")
    dataset = FewViewDataset(parse(tmp_path))
    assert dataset.get_numpy_image(1)[0, 0].tolist() == [77, 77, 77]
    assert dataset.get_numpy_image(2)[0, 0].tolist() == [200, 10, 30]


@pytest.mark.parametrize("factor", [1, 2])
def test_16_bit_grey_keeps_its_shades(tmp_path, factor):
    make_capture(tmp_path, 3)
    for name in ("f00", "f01", "f02"):
        ramp = np.linspace(0, 65535, 1200).reshape(30, 40).astype(np.uint16)
        Image.fromarray(ramp).save(tmp_path / "images" / f"{name}.png")
    image = FewViewDataset(parse(tmp_path, downscale_factor=factor)).get_numpy_image(1)
    size = (30 // factor, 40 // factor)
    expected = np.linspace(0, 255, 1200).reshape(size[0], factor, size[1], factor).mean(axis=(1, 3))
    assert image.shape == (*size, 3)
    assert np.abs(image[..., 0] - expected).max() < 1.1


def test_floating_point_images_are_refused(tmp_path):
    make_capture(tmp_path, 3)
    Image.fromarray(np.ones((30, 40), dtype=np.float32)).save(tmp_path / "images" / "f01.tiff")
    (tmp_path / "images" / "f01.tiff").rename(tmp_path / "images" / "f01.png")
    dataset = FewViewDataset(parse(tmp_path))
    with pytest.raises(InputError, match=r"f01\.png: .*floating point numbers"):
        dataset.get_numpy_image(1)


def test_one_image_with_alpha_gives_all_of_them_a_channel_for_it(tmp_path):
    make_capture(tmp_path, 3)
    Image.new("RGBA", (40, 30), (10, 20, 30, 128)).save(tmp_path / "images" / "f01.png")
    dataset = FewViewDataset(parse(tmp_path))
    assert [dataset.get_numpy_image(i)[0, 0].shape for i in range(3)] == [(4,)] * 3
    assert dataset.get_numpy_image(1)[0, 0].tolist() == [10, 20, 30, 128]
    assert dataset.get_numpy_image(2)[..., 3].min() == 255
    torch.stack([dataset[i]["image"] for i in range(3)])


def test_depth_is_not_judged_where_a_model_is_not_asked_for_it(tmp_path):
    """Outside of masks that are trained by, and where images are transparent; beside a finished run too."""
    make_capture(tmp_path / "masked", 3, mask=True, depth=True)
    make_capture(tmp_path / "alpha", 3, depth=True)
    make_capture(tmp_path / "plain", 3, depth=True)
    masked, alpha, plain = (parse(tmp_path / name) for name in ("masked", "alpha", "plain"))
    half = Image.open(tmp_path / "masked" / "masks" / "f00.png")
    for path in alpha.image_filenames:
        image = Image.open(path)
        image.putalpha(half)
        image.save(path)
    shown, cut = FewViewDataset(alpha), FewViewDataset(masked)
    shown.show_on(torch.ones(3))
    cut.cut_out_by_masks(judge_inside=True)
    inside = load_mask(tmp_path / "masked" / "masks" / "f00.png", 30, 40)
    for data in (FewViewDataset(masked), FewViewDataset(alpha), shown, cut):
        depth = data[0]["depth_image"]
        assert torch.equal(depth > 0.0, inside)
        wrong = torch.where(inside, depth, 99.0)[..., 0]
        assert evaluate_depth(wrong, depth[..., 0])["depth_rmse"] == 0.0
    whole = FewViewDataset(plain)
    whole.metadata["eval_mask_filenames"] = masked.mask_filenames
    assert "mask" in whole[0]
    assert (whole[0]["depth_image"] == 1.0).all(), "masks for evaluation only are not trained by"


@pytest.mark.parametrize(("room", "once"), [(3 * 40 * 30 * 3, True), (1, False)])
def test_few_images_are_decoded_once_whoever_looks_at_them(tmp_path, monkeypatch, room, once):
    make_capture(tmp_path, count=3)
    monkeypatch.setattr(data_module, "KEPT_BYTES", room)
    decoded = []
    monkeypatch.setattr(data_module, "in_8_bits", lambda image: decoded.append(image.filename) or image)
    data = FewViewDataset(parse(tmp_path))
    data.find_cut_outs(flat=True)
    first = data.get_numpy_image(0)
    first[:] = 0  # what is given away may be written to
    assert data.image_on(0, None).max() > 0
    assert (data.get_numpy_image(0) > 0).any()
    for index in range(len(data)):
        data.get_image_float32(index)
    assert len(set(decoded)) == len(data)
    assert (len(decoded) == len(data)) is once


@pytest.mark.parametrize(
    ("values", "true"),
    [([0, 1], [False, True]), ([0, 3], [False, True]), ([0, 255], [False, True]), ([100, 200], [False, True])],
)
def test_masks_of_few_values_are_read_as_people_mean_them(tmp_path, values, true):
    Image.fromarray(np.uint8([values] * 2)).save(tmp_path / "mask.png")
    assert load_mask(tmp_path / "mask.png", 2, 2)[..., 0].tolist() == [true] * 2
    assert load_mask(tmp_path / "mask.png", 1, 1).all()
    Image.fromarray(np.zeros((2, 2), dtype=np.uint8)).save(tmp_path / "mask.png")
    assert not load_mask(tmp_path / "mask.png", 2, 2).any()


def test_the_black_of_a_jpeg_is_black(tmp_path):
    noise = np.random.default_rng(0).integers(0, 3, (16, 16), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "mask.jpg", quality=100)
    assert not load_mask(tmp_path / "mask.jpg", 16, 16).any()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def archive(path: Path) -> None:
    np.savez(path.with_suffix(".npz"), depth=np.ones((4, 4)))
    path.with_suffix(".npz").rename(path)


def cut_archive(path: Path) -> None:
    archive(path)
    path.write_bytes(path.read_bytes()[:100])


def words(path: Path) -> None:
    np.save(path, np.full((4, 4), "far"))


def complex_numbers(path: Path) -> None:
    np.save(path, np.full((4, 4), 1j))


@pytest.mark.parametrize(
    ("write", "why"),
    [
        (empty, "cannot be read"),
        (cut_archive, "cannot be read"),
        (archive, "is an archive of arrays"),
        (words, "holds values of type <U3; expected numbers"),
        (complex_numbers, "holds values of type complex128; expected numbers"),
    ],
)
def test_a_depth_file_that_holds_no_depth_is_named(tmp_path, write, why):
    write(tmp_path / "depth.npy")
    with pytest.raises(InputError, match=rf"^depth .*depth\.npy {why}"):
        load_depth(tmp_path / "depth.npy", 4, 4, 1.0)


def test_depth_of_an_array_with_a_channel_is_read(tmp_path):
    np.save(tmp_path / "depth.npy", np.full((4, 4, 1), 3, dtype=np.uint16))
    assert torch.equal(load_depth(tmp_path / "depth.npy", 4, 4, 0.5), torch.full((4, 4, 1), 1.5))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_in_a_mask_is_outside(tmp_path, mode):
    mask = Image.new(mode, (2, 1), "white")
    mask.putalpha(Image.fromarray(np.uint8([[255, 0]])))
    mask.save(tmp_path / "mask.png")
    assert load_mask(tmp_path / "mask.png", 1, 2)[..., 0].tolist() == [[True, False]]


def test_a_damaged_mask_is_named(tmp_path):
    Image.new("L", (64, 64), 255).save(tmp_path / "mask.png")
    content = bytearray((tmp_path / "mask.png").read_bytes())
    content[content.index(b"IDAT") - 4 : content.index(b"IDAT")] = b"\0\0\0\1"  # the chunk's length
    (tmp_path / "mask.png").write_bytes(content)
    with pytest.raises(InputError, match=r"mask\.png cannot be read"):
        load_mask(tmp_path / "mask.png", 64, 64)

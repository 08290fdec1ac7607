"""Objects cut out of their photographs: by alpha, or before one flat colour, which counts as empty."""

import copy
import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Literal

import box_room
import model_steps
import numpy as np
import pytest
import torch
from model_steps import build
from nerfstudio.configs.method_configs import all_methods
from nerfstudio.data.scene_box import OrientedBox
from PIL import Image

from ddm_training.errors import InputError
from diffusionerf_ns import cut_out, geometric_losses
from diffusionerf_ns.datamanager import DiffusioNeRFDataManager
from diffusionerf_ns.dataset import FewViewDataset

folders, stereo_once = model_steps.folders, model_steps.stereo_once


def cup(jpeg: bool = False) -> np.ndarray:
    """A red cup before white: a white label in it, and a white hole in its handle."""
    image = np.full((128, 160, 3), 255, dtype=np.uint8)
    image[40:100, 40:100] = (200, 30, 40)
    image[55:85, 100:120] = (200, 30, 40)
    image[62:78, 102:112] = image[60:70, 50:80] = 255
    if not jpeg:
        return image
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=90)
    return np.array(Image.open(file))


def framed(width: int) -> np.ndarray:
    """A room in a black frame so wide."""
    room = np.random.default_rng(0).integers(60, 255, (128, 160, 3), dtype=np.uint8)
    return np.pad(room[width:-width, width:-width], ((width, width), (width, width), (0, 0)))


def opaque_parts(image: np.ndarray, colour: tuple[int, int, int] | None) -> np.ndarray:
    """The nearest third of a picture of the box as it is; the rest transparent, or of that colour."""
    column = np.arange(image.shape[1])
    inside = np.broadcast_to(abs(column - image.shape[1] / 2) < image.shape[1] / 4, image.shape[:2]).copy()
    inside[:4] = inside[-4:] = False
    inside[: image.shape[0] // 3, : image.shape[1] // 2] = False
    if colour is None:
        return np.dstack([image, np.uint8(255) * inside])
    return np.where(inside[..., None], image, np.uint8(colour))


def write_cut_outs(folder: Path, colour: tuple[int, int, int] | None) -> Path:
    """The box's capture, cut out of its background: what is left is in the middle of each image."""
    box_room.write_transforms(folder, depth=False)
    for path in (folder / "images").iterdir():
        Image.fromarray(opaque_parts(np.array(Image.open(path)), colour)).save(path)
    return folder


@pytest.fixture(scope="module")
def transparent(tmp_path_factory) -> Path:
    return write_cut_outs(tmp_path_factory.mktemp("transparent"), None)


@pytest.fixture(scope="module")
def white(tmp_path_factory) -> Path:
    return write_cut_outs(tmp_path_factory.mktemp("white"), (255, 255, 255))


@pytest.fixture(params=["transparent", "white"])
def capture(request) -> Path:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("jpeg", [False, True])
def test_a_flat_background_is_found_and_ends_at_the_object(jpeg):
    image = cup(jpeg)
    background = cut_out.flat_background([image, np.roll(image, 7, axis=1)])
    assert background is not None
    colour, (found, _) = background
    assert colour.tolist() == [255, 255, 255]
    assert not found[42:98, 42:98].any(), "white within the object is of the object"
    around = np.ones(found.shape, dtype=bool)
    around[40:100, 40:100] = around[55:85, 100:120] = False
    assert (around & ~found).sum() < 0.02 * around.sum(), "hardly a halo of what JPEG made of white"


@pytest.mark.parametrize(
    "images",
    [
        [cup(), np.random.default_rng(0).integers(0, 255, (128, 160, 3), dtype=np.uint8)],
        [cup(), 255 - cup()],
        [cup()[50:]],  # it reaches over a tenth of the edge
        [framed(2), framed(2)],
        [framed(30), framed(30)],
    ],
    ids=["one of them before a wall", "another colour each", "cut at the edge", "a rim", "pictures in frames"],
)
def test_other_images_have_no_flat_background(images):
    assert cut_out.flat_background(images) is None


def test_training_images_become_transparent_and_test_images_stay_as_they_are(folders, capture):
    pipeline = build(folders, data=capture)
    manager = pipeline.datamanager
    train, test = manager.train_dataset, manager.eval_dataset
    for index in range(len(train)):
        image = train.get_numpy_image(index)
        assert (image[:, :2, 3] == 0).all()
        assert image[image.shape[0] // 2, image.shape[1] // 2, 3] == 255
        assert torch.equal(train.opaque(index), torch.from_numpy(image[..., 3] == 255))
        colour = torch.tensor([0.1, 0.2, 0.3])
        assert torch.equal(train.image_on(index, colour)[0, 0], colour)
        assert (train.image_on(index, None)[0, 0] == 0.0).all()
    white = Image.open(capture / "images" / "000.png").mode == "RGB"
    assert test.get_numpy_image(0).shape[2] == (3 if white else 4)
    assert pipeline.model.background.tolist() == [float(white)] * 3


def test_what_is_transparent_has_no_depth(folders, capture):
    manager = build(folders, data=capture).datamanager
    for view, (column, row) in zip(manager.stereo_rays.matched.view, manager.stereo_rays.matched.pixel):
        assert manager.train_dataset.get_numpy_image(int(view))[int(row), int(column), 3] == 255


def test_images_are_shown_on_their_background_where_nothing_is_trained(folders, capture):
    """ns-render writes the photographs beside its views."""
    config = copy.deepcopy(all_methods["diffusionerf-tiny"].pipeline.datamanager)
    config.data = capture
    manager = config.setup(device="cpu", test_mode="inference")
    white = Image.open(capture / "images" / "000.png").mode == "RGB"
    for data in (manager.train_dataset, manager.eval_dataset):
        image = data.get_numpy_image(0)
        assert image.shape[2] == 3
        assert (image[:, :2] == 255 * white).all()
    assert not manager.train_dataset.opaque(0)[:, :2].any()


@pytest.mark.parametrize("named", ["white", "last_sample"])
def test_photographs_have_the_same_colours_in_evaluation_beside_a_training_and_after_it(folders, capture, named):
    config = copy.deepcopy(all_methods["diffusionerf-tiny"].pipeline)
    config.datamanager.data, config.datamanager.stereo_rays_per_batch = capture, 0
    config.model.background_color = named
    seen = []
    for mode in ("val", "test"):
        pipeline = config.setup(device="cpu", test_mode=mode).eval()
        camera, batch = next(iter(pipeline.datamanager.fixed_indices_eval_dataloader))
        render = pipeline.model.get_outputs_for_camera(camera)
        true = pipeline.model.renderer_rgb.blend_background(batch["image"])
        empty = render["rgb_rendered"][0, 0] if mode == "val" else seen[0][1]
        seen.append((true, empty))
    torch.testing.assert_close(seen[0][0], seen[1][0], atol=1.0 / 255, rtol=0)
    flat = Image.open(capture / "images" / "000.png").mode == "RGB"
    assert seen[1][0][0, 0].tolist() == [float(flat or named == "white")] * 3


def test_a_flat_colour_can_be_left_as_a_wall(folders, white):
    config = copy.deepcopy(all_methods["diffusionerf-tiny"].pipeline.datamanager)
    config.data, config.cut_out_flat_background, config.stereo_rays_per_batch = white, False, 0
    assert not config.setup(device="cpu", test_mode="val").train_dataset.has_cut_outs


def test_masks_say_it_themselves(folders, white):
    outputs = build(folders, data=white).datamanager.train_dataparser_outputs
    outputs = dataclasses.replace(outputs, mask_filenames=outputs.image_filenames)
    dataset = FewViewDataset(outputs)
    dataset.find_cut_outs(flat=True)
    assert not dataset.has_cut_outs


def test_alpha_that_hides_nothing_is_no_reason_not_to_look_for_a_flat_colour(folders, white, tmp_path):
    shutil.copytree(white, tmp_path / "box")
    for path in (tmp_path / "box" / "images").iterdir():
        Image.open(path).convert("RGBA").save(path)
    assert build(folders, data=tmp_path / "box").model.background.tolist() == [1.0] * 3


@pytest.mark.parametrize(("named", "colour"), [("last_sample", 0.0), ("random", 0.0), ("white", 1.0)])
def test_images_with_alpha_are_shown_on_the_colour_that_is_asked_for(folders, transparent, named, colour):
    model = build(folders, data=transparent, background_color=named).model
    assert model.background.tolist() == [colour] * 3


def test_other_parsers_may_name_a_colour_for_what_is_transparent(folders, transparent):
    outputs = build(folders, data=transparent).datamanager.train_dataparser_outputs
    dataset = FewViewDataset(dataclasses.replace(outputs, alpha_color=torch.ones(3)))
    dataset.find_cut_outs(flat=True)
    assert dataset.background.tolist() == [1.0] * 3
    assert dataset[0]["image"].shape[2] == 4, "the model blends in training"


def test_a_flat_background_counts_where_the_parser_names_a_colour_too(folders, white):
    """As ours does of `transforms_train.json`: nerfstudio would lay the alpha that is new on it, and it be lost."""
    outputs = build(folders, data=white).datamanager.train_dataparser_outputs
    dataset = FewViewDataset(dataclasses.replace(outputs, alpha_color=torch.ones(3)))
    dataset.find_cut_outs(flat=True)
    assert dataset.has_cut_outs
    assert dataset[0]["image"].shape[2] == 4


@pytest.fixture(scope="module")
def masked(tmp_path_factory) -> Path:
    """The box's capture, whose masks show what is left of it in the other two."""
    folder = box_room.write_transforms(tmp_path_factory.mktemp("masked"), depth=False)
    content = json.loads((folder / "transforms.json").read_text())
    (folder / "masks").mkdir()
    for frame in content["frames"]:
        path = folder / frame["file_path"]
        alpha = opaque_parts(np.array(Image.open(path)), None)[..., 3]
        Image.fromarray(alpha).save(folder / "masks" / f"{path.stem}.png")
        frame["mask_path"] = f"masks/{path.stem}.png"
    (folder / "transforms.json").write_text(json.dumps(content))
    return folder


def test_what_is_outside_of_masks_may_be_empty_as_transparent_pixels_are(folders, masked, transparent):
    def parts(data: Path, **options: object) -> DiffusioNeRFDataManager:
        config = copy.deepcopy(all_methods["diffusionerf-tiny"].pipeline.datamanager)
        config.data, config.stereo_rays_per_batch = data, 0
        return dataclasses.replace(config, **options).setup(device="cpu", test_mode="val")

    cut, alpha = parts(masked, outside_masks="empty").train_dataset, parts(transparent).train_dataset
    assert cut.has_cut_outs
    assert not cut.has_masks
    for i in range(len(cut)):
        assert "mask" not in cut[i]
        assert torch.equal(cut.opaque(i), alpha.opaque(i))
        assert torch.equal(cut[i]["image"][..., 3], alpha[i]["image"][..., 3])
    ignored = parts(masked).train_dataset
    assert ignored.has_masks
    assert not ignored.has_cut_outs
    with pytest.raises(InputError, match="outside-masks empty: the training images have no masks"):
        parts(transparent, outside_masks="empty")


@pytest.mark.parametrize("colour", ["white", "black"])
def test_test_images_are_cut_out_by_their_masks_too(folders, masked, transparent, colour):
    """In evaluation beside a training and after it, as those with alpha; and judged inside their masks as well."""

    def photographs(data: Path, mode: Literal["val", "test"], **options: object) -> list[torch.Tensor]:
        config = copy.deepcopy(all_methods["diffusionerf-tiny"].pipeline)
        config.datamanager = dataclasses.replace(config.datamanager, data=data, stereo_rays_per_batch=0, **options)
        config.model.background_color = colour
        pipeline = config.setup(device="cpu", test_mode=mode).eval()
        model, found = pipeline.model, pipeline.datamanager.eval_dataset
        model.renderer_rgb.background_color = model.background
        assert ("mask" in found[0]) == (data == masked)
        return [model.renderer_rgb.blend_background(found[i]["image"]) for i in range(len(found))]

    modes: tuple[Literal["val", "test"], ...] = ("val", "test")
    for mode in modes:
        by_masks, by_alpha = photographs(masked, mode, outside_masks="empty"), photographs(transparent, mode)
        assert by_masks[0][0, 0].tolist() == [float(colour == "white")] * 3
        for mine, alpha in zip(by_masks, by_alpha):
            torch.testing.assert_close(mine, alpha, atol=1.0 / 255, rtol=0.0)


def test_an_alpha_channel_that_hides_nothing_is_no_cut_out(folders, tmp_path):
    folder = box_room.write_transforms(tmp_path / "box", depth=False)
    for path in (folder / "images").iterdir():
        Image.open(path).convert("RGBA").save(path)
    assert build(folders, data=folder).model.background is None


def test_a_wall_of_the_backgrounds_colour_costs_and_nothing_there_does_not(folders, capture):
    pipeline = build(folders, data=capture, **model_steps.TERMS_OFF)
    rays, batch = pipeline.datamanager.next_train(0)
    outputs = pipeline.model(rays)
    batch["image"][:, 3] = 0.0
    colour = pipeline.model.background
    wall = outputs | {"rgb": colour.expand_as(outputs["rgb"]), "accumulation": torch.ones_like(outputs["accumulation"])}
    empty = outputs | {name: torch.zeros_like(outputs[name]) for name in ("rgb", "accumulation")}
    assert pipeline.model.get_loss_dict(wall, batch)["rgb_loss"] > 0.1
    assert pipeline.model.get_loss_dict(empty, batch)["rgb_loss"] == 0.0


def test_no_surface_is_asked_of_rays_that_meet_none(folders, capture, monkeypatch):
    asked = []
    foreground = geometric_losses.regularizers.foreground
    monkeypatch.setattr(
        geometric_losses.regularizers, "foreground", lambda w, opaque: asked.append(opaque) or foreground(w, opaque)
    )
    pipeline = build(folders, data=capture)
    _, batch, _, _ = model_steps.step(pipeline)
    (opaque,) = asked
    rays = batch["stereo"].rays
    assert opaque[: model_steps.RAYS].tolist() == (batch["image"][:, 3] == 1.0).tolist()
    assert 0 < opaque[: model_steps.RAYS].sum() < model_steps.RAYS
    assert opaque[rays].all()
    assert not opaque[batch["patches"].first_ray :].any()


def test_a_view_of_nothing_has_the_colour_of_the_background(folders, capture):
    pipeline = build(folders, data=capture).eval()
    nowhere = OrientedBox.from_params((50.0, 50.0, 50.0), (0.0, 0.0, 0.0), (0.1, 0.1, 0.1))
    outputs = pipeline.model.get_outputs_for_camera(pipeline.datamanager.eval_dataset.cameras[:1], obb_box=nowhere)
    colour = pipeline.model.background.expand_as(outputs["rgb_rendered"])
    torch.testing.assert_close(outputs["rgb_rendered"], colour, atol=1e-3, rtol=0.0)
    assert (pipeline.model.get_rgba_image(outputs)[..., 3] < 1e-3).all()


def test_exported_colours_are_those_of_the_object_without_its_background(folders, capture):
    model = build(folders, data=capture).model
    own, alpha = torch.tensor([[0.2, 0.4, 0.6], [0.9, 0.1, 0.5]]), torch.tensor([[0.25], [1.0]])
    shown = own * alpha + model.background * (1.0 - alpha)
    rgba = model.get_rgba_image({"rgb": shown, "accumulation": alpha})
    torch.testing.assert_close(rgba, torch.cat([own, alpha], dim=-1))


def test_what_is_empty_is_not_filled_and_does_not_count_as_detail(folders, capture, monkeypatch):
    pipeline = build(folders, data=capture).eval()
    model, asked = pipeline.model, []
    monkeypatch.setattr(model.views, "refiner", lambda rgb, z, view, tau, inside: asked.append(inside) or rgb)
    aside = copy.deepcopy(pipeline.datamanager.eval_dataset.cameras[:1])
    aside.camera_to_worlds[0, :, 3] += 3.0 * aside.camera_to_worlds[0, :, 0]
    render = model.get_outputs_for_camera_ray_bundle

    def half_empty(rays):
        outputs = render(rays)
        outputs["accumulation"][:, ::2] = 0.0
        return outputs

    monkeypatch.setattr(model, "get_outputs_for_camera_ray_bundle", half_empty)
    outputs = model.get_outputs_for_camera(aside)
    assert (outputs["unseen"][:, ::2] == 0.0).all()
    outputs["rgb"]
    assert torch.equal(asked[0], outputs["accumulation"][..., 0] >= 0.5)

"""Objects cut out of their photographs: by alpha, or before one flat colour, which counts as empty."""

import io
import shutil
from pathlib import Path

import box_room
import model_steps
import numpy as np
import pytest
import torch
from model_steps import build
from nerfstudio.data.scene_box import OrientedBox
from PIL import Image

from diffusionerf_ns import cut_out, geometric_losses
from diffusionerf_ns.dataset import FewViewDataset

WHITE = np.full(3, 255, dtype=np.uint8)
folders, stereo_once = model_steps.folders, model_steps.stereo_once


def cup(jpeg: bool = False) -> np.ndarray:
    """A red cup before white: a white label in it, and a white hole in its handle."""
    image = np.full((128, 160, 3), 255, dtype=np.uint8)
    image[40:100, 40:100] = (200, 30, 40)
    image[60:70, 50:80] = 255
    if not jpeg:
        return image
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=90)
    return np.array(Image.open(file))


def opaque_parts(image: np.ndarray, colour: tuple[int, int, int] | None) -> np.ndarray:
    """The nearest third of a picture of the box as it is; the rest transparent, or of that colour."""
    column = np.arange(image.shape[1])
    inside = np.broadcast_to(abs(column - image.shape[1] / 2) < image.shape[1] / 4, image.shape[:2]).copy()
    inside[:4] = inside[-4:] = False
    if colour is None:
        return np.dstack([image, np.uint8(255) * inside])
    return np.where(inside[..., None], image, np.uint8(colour))


@pytest.fixture(scope="module", params=["transparent", "white"])
def capture(request, tmp_path_factory) -> Path:
    """The box's capture, cut out of its background: what is left is in the middle of each image."""
    folder = box_room.write_transforms(tmp_path_factory.mktemp("cut") / "box", depth=False)
    for path in (folder / "images").iterdir():
        colour = None if request.param == "transparent" else (255, 255, 255)
        Image.fromarray(opaque_parts(np.array(Image.open(path)), colour)).save(path)
    return folder


@pytest.mark.parametrize("jpeg", [False, True])
def test_a_flat_background_is_found_and_ends_at_the_object(jpeg):
    image = cup(jpeg)
    colour = cut_out.flat_background([image, np.roll(image, 7, axis=1)])
    assert colour is not None
    assert colour.tolist() == [255, 255, 255]
    found = cut_out.background(image, colour)
    assert found[:32].all()
    assert not found[42:98, 42:98].any(), "white within the object is of the object"


@pytest.mark.parametrize(
    "images",
    [
        [cup(), np.random.default_rng(0).integers(0, 255, (128, 160, 3), dtype=np.uint8)],
        [cup(), 255 - cup()],
        [cup()[50:]],  # it reaches over a tenth of the edge
    ],
    ids=["one of them before a wall", "another colour each", "cut at the edge"],
)
def test_other_images_have_no_flat_background(images):
    assert cut_out.flat_background(images) is None


def test_training_images_become_transparent_and_test_images_stay_as_they_are(folders, capture):
    manager = build(folders, data=capture).datamanager
    train, test = manager.train_dataset, manager.eval_dataset
    for index in range(len(train)):
        image = train.get_numpy_image(index)
        assert (image[:, :2, 3] == 0).all()
        assert (image[10, image.shape[1] // 2, 3] == 255).all()
        assert (train.image_on(index, torch.tensor([0.1, 0.2, 0.3]))[0, 0] == torch.tensor([0.1, 0.2, 0.3])).all()
    white = Image.open(capture / "images" / "000.png").mode == "RGB"
    assert test.get_numpy_image(0).shape[2] == (3 if white else 4)
    assert train.metadata["background"].tolist() == [float(white)] * 3


def test_what_is_transparent_has_no_depth(folders, capture):
    manager = build(folders, data=capture).datamanager
    assert manager._matched is not None
    for view, (column, row) in zip(manager._matched.view, manager._matched.pixel):
        assert manager.train_dataset.get_numpy_image(int(view))[int(row), int(column), 3] == 255


def test_it_can_be_left_as_a_wall(folders, capture, monkeypatch):
    monkeypatch.setattr(FewViewDataset, "cut_out_flat_background", lambda _: pytest.fail("looked for it"))
    config = model_steps.all_methods["diffusionerf-tiny"].pipeline.datamanager
    monkeypatch.setattr(config, "cut_out_flat_background", False)
    build(folders, data=capture)


def test_masks_say_it_themselves(folders, capture, tmp_path):
    manager = build(folders, data=capture).datamanager
    outputs = manager.train_dataparser_outputs
    shutil.copytree(capture / "images", tmp_path / "images")
    for path in (tmp_path / "images").iterdir():
        Image.open(path).convert("RGB").save(path)
    names = [tmp_path / "images" / path.name for path in outputs.image_filenames]
    dataset = FewViewDataset(model_steps.copy.copy(outputs))
    dataset._dataparser_outputs.image_filenames = names
    dataset._dataparser_outputs.mask_filenames = names
    dataset.cut_out_flat_background()
    assert dataset.background is None


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
    assert (outputs["unseen"] == 0.0).all()
    assert (pipeline.model.get_rgba_image(outputs)[..., 3] < 1e-3).all()


def test_exported_colours_are_those_of_the_object_without_its_background(folders, capture):
    model = build(folders, data=capture).model
    own, alpha = torch.tensor([[0.2, 0.4, 0.6], [0.9, 0.1, 0.5]]), torch.tensor([[0.25], [1.0]])
    shown = own * alpha + model.background * (1.0 - alpha)
    rgba = model.get_rgba_image({"rgb": shown, "accumulation": alpha})
    torch.testing.assert_close(rgba, torch.cat([own, alpha], dim=-1))

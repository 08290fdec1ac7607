"""Captures whose images differ in size: training, evaluation, masks."""

import copy
import json
from pathlib import Path

import box_room
import model_steps
import pytest
import torch
from model_steps import RAYS, build, step
from nerfstudio.configs.method_configs import all_methods
from PIL import Image

from ddm_training.errors import InputError

folders, stereo_once = model_steps.folders, model_steps.stereo_once  # fixtures


def enlarge(data: Path, index: int) -> Path:
    """One image of the box of twice the size, with the intrinsics that go with it."""
    content = json.loads((data / "transforms.json").read_text())
    frame = next(f for f in content["frames"] if Path(f["file_path"]).stem == f"{index:03d}")
    own = {**content, **frame}
    with Image.open(data / frame["file_path"]) as image:
        large = image.resize((2 * image.width, 2 * image.height))
    large.save(data / frame["file_path"])
    frame |= {key: 2 * own[key] for key in ("w", "h", "fl_x", "fl_y", "cx", "cy")}
    (data / "transforms.json").write_text(json.dumps(content))
    return data


@pytest.fixture
def box(tmp_path) -> Path:
    return box_room.write_transforms(tmp_path / "box")


@pytest.mark.parametrize("index", [1, 0], ids=["a training image", "a test image"])
def test_a_step_and_an_evaluation(folders, box, index):
    pipeline = build(folders, data=enlarge(box, index), score_weight=0.0)
    manager = pipeline.datamanager
    sizes = [set(d.cameras.width[:, 0].tolist()) for d in (manager.train_dataset, manager.eval_dataset)]
    assert len(sizes[0] | sizes[1]) == 2
    assert len(step(pipeline)[0]["rgb"]) >= RAYS
    means = pipeline.eval().get_average_eval_image_metrics()
    assert torch.isfinite(torch.tensor(means["psnr"]))
    assert means["depth_abs_rel"] > 0.0


def mask(data: Path, black: set[int]) -> Path:
    """Masks that leave nothing of some images and the left half of the others."""
    content = json.loads((data / "transforms.json").read_text())
    (data / "masks").mkdir()
    for frame in content["frames"]:
        with Image.open(data / frame["file_path"]) as image:
            made = Image.new("L", image.size, 0)
        number = int(Path(frame["file_path"]).stem)
        if number not in black:
            made.paste(255, (0, 0, made.width // 2, made.height))
        frame["mask_path"] = f"masks/{number:03d}.png"
        made.save(data / frame["mask_path"])
    (data / "transforms.json").write_text(json.dumps(content))
    return data


def test_nothing_is_drawn_of_an_image_whose_mask_is_black(folders, box):
    pipeline = build(folders, data=mask(enlarge(box, 1), {2}), score_weight=0.0)
    names = [path.stem for path in pipeline.datamanager.train_dataset.image_filenames]
    _, batch = pipeline.datamanager.next_train(0)
    drawn = {names[i] for i in batch["indices"][:, 0].tolist()}
    assert drawn == set(names) - {"002"}
    for number, _, column in batch["indices"].tolist():
        assert column < int(pipeline.datamanager.train_dataset.cameras.width[number]) // 2


def test_black_masks_of_all_images_are_refused(folders, box):
    config = copy.deepcopy(all_methods["diffusionerf-tiny"].pipeline.datamanager)
    config.data, config.stereo_rays_per_batch = mask(enlarge(box, 1), set(range(20))), 0
    with pytest.raises(InputError, match="masks of all images are black"):
        config.setup(device="cpu", test_mode="val").next_train(0)


@pytest.mark.parametrize("enlarged", [False, True], ids=["of one size", "of several sizes"])
def test_black_masks_of_all_test_images_do_not_end_the_training(folders, box, enlarged):
    test = {int(f.stem) for f in build(folders, data=box).datamanager.eval_dataset.image_filenames}
    data = mask(enlarge(box, min(test)) if enlarged else box, test)
    manager = build(folders, data=data, score_weight=0.0).datamanager
    _, batch = manager.next_eval(0)
    assert set(batch["indices"][:, 0].tolist()) == set(range(len(test)))
    assert len(batch["image"]) == manager.get_eval_rays_per_batch()
    assert len(manager.next_train(0)[1]["image"]) == RAYS

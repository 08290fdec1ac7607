"""One step is one ray bundle: pixel rays, rays whose depth stereo knows, patches; what is off is not drawn."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import box_room
import numpy as np
import pytest
import torch
from nerfstudio.cameras.cameras import CameraType
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.engine.callbacks import TrainingCallbackAttributes
from PIL import Image

from ddm_training.errors import InputError
from ddm_training.rgbd import RgbdSpec
from diffusionerf_ns import patches
from diffusionerf_ns.contract import FACTS, PatchRequest, StereoRequest
from diffusionerf_ns.datamanager import DiffusioNeRFDataManager, DiffusioNeRFDataManagerConfig
from diffusionerf_ns.dataparsers.few_view import FewViewDataParserConfig
from diffusionerf_ns.dataset import FewViewDataset

RAYS, P = 32, 16
SPEC = RgbdSpec(patch_size=P, focal=66.0, focal_range=(50.0, 80.0), image_size=(96, 72))


@pytest.fixture(scope="module")
def capture(tmp_path_factory) -> Path:
    """Train 0 2 4 5, test 1 3; 96 x 72."""
    return box_room.write_transforms(tmp_path_factory.mktemp("data") / "box")


@pytest.fixture(scope="module")
def make(capture) -> Callable[..., DiffusioNeRFDataManager]:
    def build(data: Path = capture, mode: str = "val", **options: object) -> DiffusioNeRFDataManager:
        options = {"dataparser": FewViewDataParserConfig(data=data), "train_num_rays_per_batch": RAYS} | options
        config = DiffusioNeRFDataManagerConfig(**options)
        config.data = data
        return config.setup(device="cpu", test_mode=mode)

    return build


ALL_OF_STEREO = StereoRequest(matched_rays=True)


@pytest.fixture(scope="module")
def manager(make) -> DiffusioNeRFDataManager:
    return make(stereo_rays_per_batch=24)


def wish(
    manager: DiffusioNeRFDataManager, count: int, *, stereo: StereoRequest | None = None, scale: float = 1.0
) -> None:
    manager.set_ray_wishes(lambda: PatchRequest(SPEC, count, scale), lambda: stereo)


def test_without_wishes_a_step_is_the_pixel_rays_alone(manager):
    manager.set_ray_wishes(lambda: None, lambda: None)
    rays, batch = manager.next_train(0)
    assert len(rays) == RAYS
    assert batch["image"].shape == (RAYS, 3)
    assert "patches" not in batch
    assert "stereo" not in batch


def test_a_wish_for_no_patches_draws_none(manager, monkeypatch):
    monkeypatch.setattr(patches, "sample_rendered_patch", lambda *a, **k: pytest.fail("drawn"))
    monkeypatch.setattr(patches, "sample_image_patch", lambda *a, **k: pytest.fail("drawn"))
    wish(manager, 0)
    rays, batch = manager.next_train(0)
    assert len(rays) == RAYS
    assert "patches" not in batch


def test_stereo_rays_and_patches_follow_the_pixel_rays_in_one_bundle(manager):
    wish(manager, 2, stereo=ALL_OF_STEREO)
    rays, batch = manager.next_train(0)
    assert len(rays) == RAYS + 24 + 2 * P * P
    assert batch["image"].shape == (RAYS, 3)
    assert batch["stereo"].rays == slice(RAYS, RAYS + 24)
    assert batch["stereo"].distance.shape == (24,)
    described = batch["patches"]
    assert (described.first_ray, described.size, len(described)) == (RAYS + 24, P, 2)
    assert rays.metadata["directions_norm"].shape == (len(rays), 1)
    for i, (camera, pose) in enumerate(zip(described.cameras, described.poses)):
        first = RAYS + 24 + i * P * P
        assert torch.equal(rays.origins[first : first + P * P], pose[:, 3].expand(P * P, 3))
        assert rays.camera_indices[first : first + P * P].unique().tolist() == [camera]
        assert 0 <= camera < len(manager.train_dataset)


def test_every_ray_is_a_unit_vector_whose_norm_gives_its_cosine(manager):
    wish(manager, 2, stereo=ALL_OF_STEREO)
    rays, batch = manager.next_train(0)
    torch.testing.assert_close(rays.directions.norm(dim=-1), torch.ones(len(rays)))
    poses = manager.train_dataset.cameras.camera_to_worlds[rays.camera_indices[:, 0]]
    described = batch["patches"]
    for i, pose in enumerate(described.poses):
        first = described.first_ray + i * P * P
        poses[first : first + P * P] = pose
    cosine = -(rays.directions * poses[:, :, 2]).sum(-1)
    torch.testing.assert_close(1.0 / rays.metadata["directions_norm"][:, 0], cosine, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("share", "known"), [(0.0, 0), (1.0, 30)])
def test_the_share_of_image_patches_can_be_none_or_all(make, share, known):
    manager = make(image_patch_share=share, stereo_rays_per_batch=0)
    wish(manager, 30)
    drawn = manager.next_train(0)[1]["patches"].rgb
    assert sum(rgb is not None for rgb in drawn) == known


def test_a_quarter_of_the_patches_come_from_images(manager):
    torch.manual_seed(0)
    wish(manager, 400)
    drawn = manager.next_train(0)[1]["patches"].rgb
    # Binomial with p = .25: the standard deviation is 8.7.
    assert abs(sum(rgb is not None for rgb in drawn) - 100) < 35


def test_image_patches_are_seen_from_training_poses_and_show_what_nerfstudio_samples_there(make, capture):
    manager = make(image_patch_share=1.0, stereo_rays_per_batch=0)
    wish(manager, 4)
    rays, batch = manager.next_train(0)
    described = batch["patches"]
    for i, (rgb, camera, pose) in enumerate(zip(described.rgb, described.cameras, described.poses)):
        cameras = manager.train_dataset.cameras
        assert torch.equal(pose, cameras.camera_to_worlds[camera])
        image = manager.train_dataset.get_image_float32(camera)[..., :3]
        first = described.first_ray + i * P * P
        local = rays.directions[first : first + P * P] @ pose[:, :3]
        u = cameras.cx[camera] + cameras.fx[camera] * local[:, 0] / -local[:, 2]
        v = cameras.cy[camera] - cameras.fy[camera] * local[:, 1] / -local[:, 2]
        grid = torch.stack([u / 96, v / 72], dim=-1) * 2 - 1
        sampled = torch.nn.functional.grid_sample(
            image.permute(2, 0, 1)[None], grid[None, None], align_corners=False, padding_mode="border"
        )
        torch.testing.assert_close(rgb.reshape(-1, 3), sampled[0, :, 0].T, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0])
def test_the_jitter_of_rendered_patches_is_in_metres(make, scale):
    manager = make(image_patch_share=0.0, stereo_rays_per_batch=0, center_jitter=0.3)
    wish(manager, 60, scale=scale)
    described = manager.next_train(0)[1]["patches"]
    centres = manager.train_dataset.cameras.camera_to_worlds[described.cameras, :, 3]
    metres = (torch.stack(described.poses)[:, :, 3] - centres).abs() * scale
    assert 0.25 < metres.max() <= 0.3 * (1 + 1e-4)


def test_wishes_are_asked_for_at_every_step(manager):
    counts = iter([1, 0, 2])
    manager.set_ray_wishes(lambda: PatchRequest(SPEC, next(counts), 1.0), lambda: None)
    assert [len(manager.next_train(step)[0]) for step in range(3)] == [RAYS + P * P, RAYS, RAYS + 2 * P * P]


# Depth from stereo


def test_stereo_rays_are_those_of_the_cameras_through_matched_pixels(manager):
    """They are made once, in pieces, and drawn from."""
    matched, cameras = manager.stereo_rays.matched, manager.train_dataset.cameras
    wish(manager, 0, stereo=ALL_OF_STEREO)
    torch.manual_seed(3)
    bundle, batch = manager.next_train(0)
    torch.manual_seed(3)
    DiffusioNeRFDataManager.__mro__[1].next_train(manager, 0)  # the pixel rays before them
    expected, distance = matched.rays(cameras, torch.randint(len(matched), (24,)))
    drawn = bundle[batch["stereo"].rays]
    for name in ("origins", "directions", "pixel_area", "camera_indices"):
        assert torch.equal(getattr(drawn, name), getattr(expected, name)), name
    assert torch.equal(drawn.metadata["directions_norm"], expected.metadata["directions_norm"])
    assert torch.equal(batch["stereo"].distance, distance)


def test_stereo_rays_end_on_the_walls_of_the_scene(manager):
    wish(manager, 0, stereo=ALL_OF_STEREO)
    rays, batch = manager.next_train(0)
    found = batch["stereo"]
    ends = rays.origins[found.rays] + found.distance[:, None] * rays.directions[found.rays]
    outputs = manager.train_dataparser_outputs
    transform = torch.cat([outputs.dataparser_transform, torch.tensor([[0.0, 0.0, 0.0, 1.0]])]).double()
    world = torch.cat([ends.double() / outputs.dataparser_scale, torch.ones(len(ends), 1)], dim=1)
    metres = (world @ torch.linalg.inv(transform).T)[:, :3]
    off = (metres.abs() - torch.from_numpy(box_room.HALF)).abs().min(dim=1).values
    assert off.median() < 0.04
    assert off.quantile(0.8) < 0.15


def test_pixel_rays_are_told_about_where_their_walls_are(make):
    torch.manual_seed(0)
    manager = make(stereo_rays_per_batch=24, train_num_rays_per_batch=4000)
    wish(manager, 0, stereo=ALL_OF_STEREO)
    rays, batch = manager.next_train(0)
    roughly = batch["stereo"].completed
    assert roughly.shape == (4000,)
    data, indices = manager.train_dataset, batch["indices"].cpu()
    images = [data[i]["depth_image"][..., 0] * data.metadata["scene_units_per_metre"] for i in range(len(data))]
    true = torch.stack([images[i][row, column] for i, row, column in indices.tolist()])
    true = true * rays.metadata["directions_norm"][:4000, 0]
    told, sure = roughly > 0, batch["stereo"].confirmed
    assert float(told.float().mean()) > 0.9
    assert float(sure.float().mean()) > 0.5
    assert float((roughly / true - 1.0)[told].abs().median()) < 0.05
    assert float(((roughly / true - 1.0)[told].abs() > 0.3).float().mean()) < 0.1
    assert float(((roughly / true - 1.0)[sure].abs() > 0.2).float().mean()) < 0.02


def test_rays_through_matched_pixels_are_made_only_where_they_are_wanted(manager):
    wish(manager, 1, stereo=StereoRequest(matched_rays=False))
    rays, batch = manager.next_train(0)
    assert len(rays) == RAYS + P * P
    assert len(rays[batch["stereo"].rays]) == len(batch["stereo"].distance) == 0
    assert batch["stereo"].completed.shape == (RAYS,)
    assert batch["patches"].first_ray == RAYS


def test_the_model_is_told_how_much_fine_detail_the_photographs_have(manager):
    from diffusionerf_ns.refine import fine_detail

    data = manager.train_dataset
    focal, detail = data.metadata[FACTS].fine_detail[0]
    assert focal == pytest.approx(float(data.cameras.fx.mean()))
    images = [data.get_image_float32(i)[..., :3] for i in range(len(data))]
    assert detail > 0.0
    assert detail == pytest.approx(sum(map(fine_detail, images)) / len(images))


def test_stereo_that_nobody_wants_is_not_made(make, monkeypatch):
    monkeypatch.setattr("diffusionerf_ns.stereo.match", lambda *a: pytest.fail("matched"))
    make(stereo_rays_per_batch=0)
    make(mode="test")
    make(mode="inference")


def test_a_capture_without_texture_trains_without_stereo_and_says_so(make, tmp_path, capsys):
    data = box_room.write_transforms(tmp_path / "plain", count=4)
    for path in (data / "images").iterdir():
        Image.new("RGB", (96, 72), (90, 120, 150)).save(path)
    manager = make(data, stereo_rays_per_batch=24)
    assert "training goes on without it" in " ".join(capsys.readouterr().out.split())
    assert manager.train_dataset.metadata[FACTS].stereo is None
    wish(manager, 0, stereo=ALL_OF_STEREO)
    rays, batch = manager.next_train(0)
    assert len(rays) == RAYS
    assert "stereo" not in batch


# What it is tied to


def ties(manager: DiffusioNeRFDataManager, folder: Path, *, score_weight: float = 1.0, spec: RgbdSpec = SPEC):
    model = SimpleNamespace(
        patch_request=lambda: PatchRequest(spec, 1, 1.0),
        stereo_request=lambda: None,
        config=SimpleNamespace(score_weight=score_weight),
        patch_spec=lambda: spec,
    )
    pipeline, trainer = SimpleNamespace(model=model), SimpleNamespace(base_dir=folder)
    manager.get_training_callbacks(TrainingCallbackAttributes(None, None, pipeline, trainer))


def test_the_callbacks_tie_the_models_wishes_and_leave_the_split_in_the_runs_folder(make, tmp_path):
    manager = make(stereo_rays_per_batch=0)
    ties(manager, tmp_path)
    assert len(manager.next_train(0)[0]) == RAYS + P * P
    split = json.loads((tmp_path / "split.json").read_text())
    assert [image["name"] for image in split["test"]] == ["images/001.png", "images/003.png"]


def test_patches_larger_than_an_image_are_told_of_and_left_out_before_the_first_step(make, tmp_path, capsys):
    large = RgbdSpec(patch_size=80, focal=66.0, focal_range=(60.0, 70.0))
    told = lambda: "80 x 80 pixels of training image 0" in " ".join(capsys.readouterr().out.split())  # noqa: E731
    manager = make(stereo_rays_per_batch=0, image_patch_share=1.0)
    ties(manager, tmp_path, spec=large)
    assert told()
    assert manager.config.image_patch_share == 0.0
    assert manager.next_train(0)[1]["patches"].rgb == [None]
    with pytest.raises(InputError, match="which has only 96 x 72"):  # the viewer asks
        manager.images_with_patches(large)
    ties(make(stereo_rays_per_batch=0, image_patch_share=0.0), tmp_path, spec=large)
    ties(make(stereo_rays_per_batch=0), tmp_path, spec=large, score_weight=0.0)
    assert not told()


def test_patches_are_cut_from_the_images_that_have_room_for_one(make, tmp_path, capsys):
    manager = make(stereo_rays_per_batch=0, image_patch_share=1.0)
    cameras = manager.train_dataset.cameras
    cameras.fx[1], cameras.fy[1] = 5.0 * cameras.fx[1], 5.0 * cameras.fy[1]  # a detail, taken with a long lens
    narrow = RgbdSpec(patch_size=P, focal=20.0, focal_range=(20.0, 20.0))
    assert manager.images_with_patches(narrow) == [0, 2, 3]
    ties(manager, tmp_path, spec=narrow)
    assert "1 of 4 training images are too small for patches" in " ".join(capsys.readouterr().out.split())
    torch.manual_seed(0)
    drawn = [manager.next_train(0)[1]["patches"] for _ in range(20)]
    assert {batch.cameras[0] for batch in drawn} == {0, 2, 3}
    assert all(batch.rgb[0] is not None for batch in drawn)


@pytest.mark.parametrize("reason", ["fisheye", "masks"])
def test_images_that_are_not_perspective_or_have_masks_give_no_patches(make, tmp_path, monkeypatch, reason, capsys):
    manager = make(stereo_rays_per_batch=0, image_patch_share=1.0)
    wish(manager, 1)
    assert manager.next_train(0)[1]["patches"].rgb[0] is not None
    if reason == "fisheye":
        cameras = manager.train_dataset.cameras
        cameras.camera_type = torch.full_like(cameras.camera_type, CameraType.FISHEYE.value)
    else:
        monkeypatch.setattr(FewViewDataset, "has_masks", True)
    capsys.readouterr()
    ties(manager, tmp_path)
    assert "have masks or are not perspective" in " ".join(capsys.readouterr().out.split())
    assert manager.next_train(1)[1]["patches"].rgb[0] is None
    with pytest.raises(InputError, match="have masks or are not perspective"):  # the viewer asks
        manager.images_with_patches(SPEC)


@pytest.fixture
def masked(tmp_path) -> Path:
    """Train 0 2 4 5, test 1 3; the right half of every image belongs to the scene."""
    folder = box_room.write_transforms(tmp_path / "masked")
    content = json.loads((folder / "transforms.json").read_text())
    (folder / "masks").mkdir()
    for frame in content["frames"]:
        frame["mask_path"] = frame["file_path"].replace("images", "masks")
        Image.fromarray(np.uint8([[0, 1]]).repeat(72, 0).repeat(48, 1)).save(folder / frame["mask_path"])
    (folder / "transforms.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("flags", [{"test_ids": (1,)}, {"num_views": 1}])
def test_masks_of_a_single_image_are_kept_to(make, masked, flags):
    manager = make(masked, dataparser=FewViewDataParserConfig(data=masked, **flags), stereo_rays_per_batch=0)
    for _, batch in (manager.next_train(0), manager.next_eval(0)):
        assert batch["indices"][:, 2].min() >= 48
        assert batch["mask"].all()


def test_a_training_image_that_a_mask_leaves_out_wholly_is_named(make, masked, capsys):
    Image.new("L", (96, 72)).save(masked / "masks" / "004.png")
    make(masked, dataparser=FewViewDataParserConfig(data=masked), stereo_rays_per_batch=0)
    assert "004.png is black" in capsys.readouterr().out.replace("\n", "")
    make(masked, dataparser=FewViewDataParserConfig(data=masked, train_ids=(0, 2)), stereo_rays_per_batch=0)
    assert "is black" not in capsys.readouterr().out


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(InputError, match=r"image-patch-share must be in \[0, 1\]"):
        DiffusioNeRFDataManagerConfig(image_patch_share=share)


def test_a_negative_number_of_completion_steps_is_refused():
    with pytest.raises(InputError, match=r"completion-steps must be 0 or more, found -1"):
        DiffusioNeRFDataManagerConfig(completion_steps=-1)


def test_nerfstudios_own_data_parsers_work_too(make, capture):
    parser = NerfstudioDataParserConfig(data=capture, downscale_factor=1, load_3D_points=False)
    manager = make(dataparser=parser, stereo_rays_per_batch=0)
    assert isinstance(manager.train_dataset, FewViewDataset)
    wish(manager, 1)
    assert len(manager.next_train(0)[0]) == RAYS + P * P
    assert len(manager.train_dataset.metadata[FACTS].cameras) == len(manager.train_dataset)

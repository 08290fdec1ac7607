"""DTU: both layouts give the same cameras and pixels, RegNeRF's units, masks, bad input."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddm_training.errors import InputError
from diffusionerf_ns.dataparsers.dtu import (
    FULL_SIZE,
    DTUFewViewDataParserConfig,
    calibrated_size,
    decompose,
    read_calibration,
    read_idr_cameras,
)
from diffusionerf_ns.dataparsers.few_view import FewViewDataParserConfig
from diffusionerf_ns.dataset import FewViewDataset

HELD = (1, 14, 33)  # test images that both copies of scan24 hold
IDR, RECTIFIED = "dtu/rs_dtu_4/scan24", "dtu/regnerf"


def parse(data: Path, split: str = "train", **flags):
    return DTUFewViewDataParserConfig(data=data, **flags).setup().get_dataparser_outputs(split)


@pytest.fixture
def linked(real_data, tmp_path, monkeypatch):
    """Either copy of scan24 in a folder of its own, image files linked, so that a test may write and delete there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def link(name: str) -> Path:
        source, target = real_data(name), tmp_path / Path(name).name
        for path in source.rglob("*"):
            if path.is_file():
                (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
                (target / path.relative_to(source)).symlink_to(path)
        return target

    return link


def test_both_layouts_give_the_same_cameras(linked):
    flags = {"num_views": 3, "test_ids": HELD}
    idr, rectified = linked(IDR), linked(RECTIFIED)
    for split in ("train", "test"):
        a, b = parse(idr, split, **flags), parse(rectified, split, **flags)
        assert torch.allclose(a.cameras.camera_to_worlds, b.cameras.camera_to_worlds, atol=1e-5)
        for key in ("fx", "fy", "cx", "cy"):
            assert torch.allclose(getattr(a.cameras, key), getattr(b.cameras, key), atol=1e-3), key
        assert (a.cameras.width[0], a.cameras.height[0]) == (b.cameras.width[0], b.cameras.height[0]) == (400, 300)
        assert a.dataparser_scale == pytest.approx(b.dataparser_scale, rel=1e-6)
        assert a.metadata["near"] == pytest.approx(0.5)
        assert b.metadata["far"] == pytest.approx(3.5)


def test_both_layouts_give_the_same_pixels_and_masks(linked):
    flags = {"num_views": 3, "test_ids": HELD}
    idr, rectified = linked(IDR), linked(RECTIFIED)
    for split in ("train", "test"):
        a, b = (FewViewDataset(parse(folder, split, **flags)) for folder in (idr, rectified))
        for i in range(3):
            difference = np.abs(a.get_numpy_image(i).astype(int) - b.get_numpy_image(i))
            assert difference.max() <= 1
            if split == "test":  # the masks were reduced differently: they may differ along the outline
                assert (a[i]["mask"] != b[i]["mask"]).double().mean() < 0.004
                assert a[i]["mask"].double().mean() > 0.3
            else:
                assert "mask" not in a[i]


def test_scale_matrices_only_move_and_scale_the_world(real_data):
    """World coordinates times scale_mat: the same cameras but for a shift and a scale, as the parser assumes."""
    archive = np.load(real_data(IDR) / "cameras.npz")
    world = read_idr_cameras(real_data(IDR))
    scaled = np.stack([(archive[f"world_mat_{i}"] @ archive[f"scale_mat_{i}"])[:3] for i in range(49)])
    (k1, p1), (k2, p2) = decompose(world), decompose(scaled)
    np.testing.assert_allclose(k1, k2, rtol=1e-6)
    np.testing.assert_allclose(p1[:, :, :3], p2[:, :, :3], atol=1e-6)
    spread = [c - c.mean(axis=0) for c in (p1[:, :, 3], p2[:, :, 3])]
    ratio = np.linalg.norm(spread[0]) / np.linalg.norm(spread[1])
    np.testing.assert_allclose(spread[0], spread[1] * ratio, atol=1e-2)  # millimetres


def test_decomposition_recovers_camera_rotation_and_centre():
    rng = np.random.default_rng(0)
    for sign in (1.0, -1.0, 3.7):
        q, _ = np.linalg.qr(rng.normal(size=(3, 3)))
        rotation = q * np.sign(np.linalg.det(q))
        centre, k = rng.normal(size=3), np.array([[700.0, 0, 200], [0, 720.0, 150], [0, 0, 1]])
        projection = sign * k @ np.concatenate([rotation, -(rotation @ centre)[:, None]], axis=1)
        intrinsics, poses = decompose(projection[None])
        np.testing.assert_allclose(intrinsics[0], [700, 720, 200, 150], rtol=1e-9)
        np.testing.assert_allclose(poses[0], np.concatenate([rotation.T, centre[:, None]], axis=1), atol=1e-9)


def test_a_point_is_seen_where_the_calibration_file_projects_it(linked):
    data = linked(RECTIFIED)
    outputs = parse(data, num_views=3, test_ids=HELD)
    projections = read_calibration(data / "Rectified" / "scan24")
    point = np.array([-28.0, -13.0, 641.0])  # mm, about the middle of the object
    scene = outputs.dataparser_scale * (
        outputs.dataparser_transform[:, :3] @ torch.from_numpy(point).float() + outputs.dataparser_transform[:, 3]
    )
    for row, index in enumerate((25, 22, 28)):
        x, y, w = projections[index] @ np.append(point, 1.0)
        ray = outputs.cameras.generate_rays(row, coords=torch.tensor([[y / w / 4, x / w / 4]]).float())
        towards = scene - ray.origins[0]
        assert torch.nn.functional.cosine_similarity(towards, ray.directions[0], dim=0) > 1 - 1e-6
        assert 0.5 < float(towards.norm()) < 3.5  # between near and far
        millimetres = 1000 * float(towards.norm()) / outputs.metadata["scene_units_per_metre"]
        assert 400 < millimetres < 900  # the rig's arm


def test_unit_is_the_largest_coordinate_in_the_frame_of_the_mean_camera(linked):
    """RegNeRF: poses recentred by the mean pose, then divided by their largest coordinate. Orientation turns only."""
    data = linked(IDR)
    cameras = [parse(data, test_ids=HELD, orientation_method=m).cameras.camera_to_worlds for m in ("up", "none")]
    lengths = [(c[:, None, :, 3] - c[None, :, :, 3]).norm(dim=-1) for c in cameras]
    assert torch.allclose(lengths[0], lengths[1], atol=1e-5)
    _, opencv = decompose(read_idr_cameras(data))
    z = opencv[:, :, 2].mean(axis=0) / np.linalg.norm(opencv[:, :, 2].mean(axis=0))
    x = np.cross(opencv[:, :, 1].mean(axis=0), z)
    x /= np.linalg.norm(x)
    mean = np.eye(4)
    mean[:3] = np.stack([x, np.cross(z, x), z, opencv[:, :, 3].mean(axis=0)], axis=1)
    centres = (np.linalg.inv(mean) @ np.concatenate([opencv[:, :, 3], np.ones((49, 1))], axis=1).T).T[:, :3]
    assert parse(data, test_ids=HELD).dataparser_scale == pytest.approx(1 / np.abs(centres).max(), rel=1e-6)


@pytest.mark.parametrize("flags", [{"num_views": 3}, {"num_views": 6}, {"train_ids": (0, 48)}])
def test_test_cameras_do_not_depend_on_the_views_trained_on(real_data, flags):
    every, few = parse(real_data(IDR), "test"), parse(real_data(IDR), "test", **flags)
    assert torch.equal(every.cameras.camera_to_worlds, few.cameras.camera_to_worlds)
    assert len(few.image_filenames) == 25


def test_the_layout_and_the_scan_are_found_from_any_folder_above(linked):
    rectified, idr = linked(RECTIFIED), linked(IDR)
    flags = {"num_views": 3, "test_ids": HELD}
    for data in (rectified, rectified / "Rectified", rectified / "Rectified" / "scan24", idr, idr.parent):
        found = FewViewDataParserConfig(data=data, **flags).setup().get_dataparser_outputs("test")
        assert found.metadata["source"] == "dtu"
        assert found.metadata["protocol"] == "dtu-regnerf"
        assert found.cameras.width[0] == 400
    assert parse(rectified, scan=24, **flags).metadata["split"]["train"][0] == {
        "id": 25,
        "name": "rect_026_3_r5000.png",
    }
    with pytest.raises(InputError, match="scan24: scan30 is not there"):
        parse(rectified, scan=30, **flags)
    (rectified / "Rectified" / "scan24").rename(rectified / "Rectified" / "scan30")
    shutil.copytree(rectified / "Rectified" / "scan30", rectified / "Rectified" / "scan31", symlinks=True)
    with pytest.raises(InputError, match="scan30, scan31: which one"):
        parse(rectified, **flags)


def test_masks_in_a_folder_of_their_own_are_found(linked):
    data = linked(RECTIFIED)
    (data / "idrmasks" / "scan24").rename(data / "mask")
    (data / "idrmasks" / "scan24").mkdir()
    (data / "mask").rename(data / "idrmasks" / "scan24" / "mask")
    flags = {"num_views": 3, "test_ids": HELD}
    found = parse(data, "test", **flags).metadata["eval_mask_filenames"]
    assert [p.name for p in found] == ["001.png", "014.png", "033.png"]
    (data / "idrmasks").rename(data / "elsewhere")
    assert parse(data, "test", **flags).metadata["protocol"] == "nerfstudio"  # no masks: not the protocol
    assert parse(data, "test", mask_folder=data / "elsewhere", **flags).metadata["protocol"] == "dtu-regnerf"
    with pytest.raises(InputError, match="no masks"):
        parse(data, "test", mask_folder=data / "Rectified", **flags)
    with pytest.raises(InputError, match="--masked-training"):
        parse(data, masked_training=True, **flags)


def test_training_pixels_are_masked_only_when_asked(real_data):
    assert "mask" not in FewViewDataset(parse(real_data(IDR), num_views=3))[0]
    assert FewViewDataset(parse(real_data(IDR), num_views=3, masked_training=True))[0]["mask"].any()


def test_images_are_reduced_into_a_folder_that_is_no_scan(linked):
    data = linked(RECTIFIED)
    outputs = parse(data, num_views=3, test_ids=HELD)
    assert outputs.image_filenames[0].parent == data / "Rectified" / "scan24_4"
    assert outputs.metadata["downscale_factor"] == 4
    half = parse(data, num_views=3, test_ids=HELD, downscale_factor=2)
    assert (half.cameras.width[0], half.cameras.height[0]) == (800, 600)
    assert half.cameras.fx[0].item() == pytest.approx(2 * outputs.cameras.fx[0].item())


def test_the_calibrated_size_is_read_off_the_principal_point(real_data):
    cameras = read_idr_cameras(real_data(IDR))
    for halvings in range(3):
        scaled = cameras * np.array([4 / 2**halvings, 4 / 2**halvings, 1.0])[:, None]
        assert calibrated_size(scaled) == (FULL_SIZE[0] >> halvings, FULL_SIZE[1] >> halvings)


def test_scans_lacking_views_say_which_and_which_there_are(linked):
    with pytest.raises(InputError, match=r"ids \[2, 9, .*found are \[1, 14, 22, 25, 28, 33\]"):
        parse(linked(RECTIFIED), num_views=3)
    with pytest.raises(InputError, match="at most 9"):
        parse(linked(IDR), num_views=10)


def test_missing_or_damaged_calibration_is_named(linked):
    flags = {"num_views": 3, "test_ids": HELD}
    data = linked(RECTIFIED)
    calibration = data / "Calibration" / "cal18"
    (calibration / "pos_007.txt").unlink()
    with pytest.raises(InputError, match=r"pos_007\.txt is missing"):
        parse(data, **flags)
    (calibration / "pos_007.txt").write_text("1 2 3\n4 5 6\n")
    with pytest.raises(InputError, match=r"pos_007\.txt.*3 x 4"):
        parse(data, **flags)
    (calibration / "pos_007.txt").write_text("one two")
    with pytest.raises(InputError, match=r"pos_007\.txt"):
        parse(data, **flags)
    shutil.rmtree(data / "Calibration")
    with pytest.raises(InputError, match="no calibration"):
        parse(data, **flags)

    data = linked(IDR)
    archive = dict(np.load(data / "cameras.npz"))
    (data / "cameras.npz").unlink()
    with pytest.raises(InputError, match=r"cameras\.npz is missing"):
        parse(data, num_views=3)
    np.savez(data / "cameras.npz", **{k: v for k, v in archive.items() if k != "world_mat_4"})
    with pytest.raises(InputError, match=r"ids \[4\]"):
        parse(data, num_views=3)
    (data / "cameras.npz").write_bytes(b"no archive")
    with pytest.raises(InputError, match="cannot be read"):
        parse(data, num_views=3)


def test_masks_of_another_size_or_missing_are_named(linked):
    data = linked(IDR)
    (data / "mask" / "009.png").unlink()
    with pytest.raises(InputError, match=r"ids \[9\] are missing"):
        parse(data, "test", num_views=3)
    Image.new("L", (300, 200)).save(data / "mask" / "009.png")
    with pytest.raises(InputError, match=r"009\.png is 300 x 200, the images are 400 x 300"):
        parse(data, "test", num_views=3)
    Image.new("L", (200, 150)).save(data / "mask" / "009.png")  # smaller than the images
    with pytest.raises(InputError, match="or larger ones of that shape"):
        parse(data, "test", num_views=3)
    Image.new("L", (1000, 750), 255).save(data / "mask" / "009.png")  # no whole multiple
    assert bool(FewViewDataset(parse(data, "test", num_views=3, test_ids=(9,)))[0]["mask"].all())


def test_a_truncated_image_is_named(linked):
    data = linked(IDR)
    path = data / "image" / "000022.png"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"000022\.png"):
        parse(data, num_views=3)


def test_folders_without_a_scan_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match="holds no DTU scan"):
        parse(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        parse(tmp_path / "absent")

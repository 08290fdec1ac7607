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
    with pytest.raises(InputError, match="whole multiple"):
        parse(data, "test", num_views=3)


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


@pytest.fixture
def own(real_data, tmp_path, monkeypatch):
    """A function that makes an own capture in IDR's layout of scan24's first cameras, as NeuS has them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = real_data(IDR)

    def make(count: int = 8, name: str = "my_object", cameras: str = "cameras_sphere.npz") -> Path:
        folder = tmp_path / name
        for part, digits in (("image", 6), ("mask", 3)):
            (folder / part).mkdir(parents=True)
            for i in range(count):
                (folder / part / f"{i:03d}.png").symlink_to(source / part / f"{i:0{digits}d}.png")
        archive = np.load(source / "cameras.npz")
        keys = [f"{kind}_mat_{i}" for kind in ("world", "scale") for i in range(count)]
        np.savez(folder / cameras, **{key: archive[key] for key in keys})
        return folder

    return make


def same_but_for_scale(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether cameras [n, 3, 4] have the same distances to each other, in parts of the largest, and relative turns."""
    far = [(c[:, None, :, 3] - c[None, :, :, 3]).norm(dim=-1) for c in (a, b)]
    far = [distances / distances.max() for distances in far]
    turns = [torch.einsum("nji,mjk->nmik", c[:, :, :3], c[:, :, :3]) for c in (a, b)]
    return all(torch.allclose(c, d, atol=1e-4) for c, d in (far, turns))


@pytest.mark.parametrize(("name", "cameras"), [("my_object", "cameras_sphere.npz"), ("scan3", "cameras.npz")])
def test_an_own_capture_in_this_layout_has_the_cameras_that_are_there(own, real_data, name, cameras):
    data = own(8, name, cameras)
    outputs = FewViewDataParserConfig(data=data).setup().get_dataparser_outputs("train")
    assert outputs.metadata["protocol"] == "nerfstudio"
    assert [entry["id"] for entry in outputs.metadata["split"]["train"]] == list(range(8))
    assert [path.name for path in outputs.image_filenames] == [f"{i:03d}.png" for i in range(8)]
    assert "near" not in outputs.metadata
    assert "scene_units_per_metre" not in outputs.metadata
    truth = parse(real_data(IDR), train_ids=tuple(range(8)), test_ids=(9,))
    assert same_but_for_scale(outputs.cameras.camera_to_worlds, truth.cameras.camera_to_worlds)
    for key in ("fx", "fy", "cx", "cy"):
        assert torch.allclose(getattr(outputs.cameras, key), getattr(truth.cameras, key), atol=1e-2), key
    fewer = parse(data, "test", num_views=3)
    assert [entry["id"] for entry in fewer.metadata["split"]["train"]] == [0, 4, 7]
    assert len(fewer.image_filenames) == 5


def test_of_a_large_own_capture_every_eighth_image_is_held_out(own):
    split = parse(own(17)).metadata["split"]
    assert [entry["id"] for entry in split["test"]] == [0, 8, 16]
    assert len(split["train"]) == 14


def test_as_many_cameras_as_a_scan_has_make_no_scan_of_a_capture_of_another_name(own, capsys):
    assert parse(own(49)).metadata["protocol"] == "nerfstudio"
    assert "call the folder scanN" in " ".join(capsys.readouterr().out.split())
    outputs = parse(own(49, "dtu_scan24"), "test")  # NeuS's name for a scan
    assert outputs.metadata["protocol"] == "dtu-regnerf"
    assert len(outputs.image_filenames) == 25


def test_masks_of_an_own_capture_are_used_when_asked(own, capsys):
    data = own(6)
    assert "mask" not in FewViewDataset(parse(data))[0]
    assert "--masked-training" in capsys.readouterr().out
    inside = FewViewDataset(parse(data, masked_training=True))[2]["mask"]
    assert 0.05 < inside.double().mean() < 0.95
    (data / "mask" / "003.png").unlink()
    with pytest.raises(InputError, match=r"masks of cameras \[3\] are missing"):
        parse(data, masked_training=True)
    shutil.rmtree(data / "mask")
    with pytest.raises(InputError, match=r"no masks were found .*--mask-folder"):
        parse(data, masked_training=True)


def test_images_of_an_own_capture_belong_to_cameras_by_number_or_else_by_order(own):
    data = own(6)
    (data / "image" / "002.png").unlink()
    outputs = parse(data)
    assert [path.stem for path in outputs.image_filenames] == ["000", "001", "003", "004", "005"]
    for path in sorted((data / "image").iterdir()):
        path.rename(path.with_name(f"photo_{path.name}"))
    with pytest.raises(InputError, match=r"has 5 files and cameras_sphere\.npz 6 cameras: which belong together"):
        parse(data)
    shutil.copy(data / "mask" / "002.png", data / "image" / "photo_002.png")
    ordered = parse(data)
    assert [path.stem for path in ordered.image_filenames] == [f"photo_{i:03d}" for i in range(6)]
    kept = ordered.cameras.camera_to_worlds[[0, 1, 3, 4, 5]]
    assert same_but_for_scale(kept, outputs.cameras.camera_to_worlds)


def test_cameras_of_an_own_capture_that_are_for_images_of_another_size_are_refused(own):
    data = own(6)
    archive = dict(np.load(data / "cameras_sphere.npz"))
    for times in (2.0, 4.0, 0.25):
        scaled = {key: np.diag([times, times, 1.0, 1.0]) @ value for key, value in archive.items()}
        np.savez(data / "cameras_sphere.npz", **scaled)
        with pytest.raises(InputError, match=r"principal point is \(\d+, \d+\) .* images of 400 x 300 pixels"):
            parse(data)

"""LLFF folders: cameras against COLMAP's maths and against real images, image folders, bad input."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import box_room
import numpy as np
import pytest
import torch
from PIL import Image
from test_dataparsers_splits import LLFF

from ddm_training.errors import InputError
from diffusionerf_ns.dataparsers.base import automatic_factor
from diffusionerf_ns.dataparsers.few_view import FewViewDataParserConfig
from diffusionerf_ns.dataparsers.images import CACHE_FILE
from diffusionerf_ns.dataparsers.llff import LLFFFewViewDataParserConfig, LLFFFewViewParser


def random_rotation(rng) -> np.ndarray:
    q, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    return q * np.sign(np.linalg.det(q))


def colmap_cameras(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """World-to-camera R [n, 3, 3] and t [n, 3] with COLMAP's axes (x right, y down, z forward)."""
    rng = np.random.default_rng(seed)
    base = random_rotation(rng)
    rotations, shifts = [], []
    for _ in range(count):
        w = 0.1 * rng.normal(size=3)
        skew = np.array([[0, -w[2], w[1]], [w[2], 0, -w[0]], [-w[1], w[0], 0]])
        small, _ = np.linalg.qr(np.eye(3) + skew)
        small = small * np.sign(np.diag(small))
        rotation = small @ base
        centre = base.T @ (0.5 * rng.normal(size=3)) + np.array([5.0, -3.0, 2.0])
        rotations.append(rotation)
        shifts.append(-rotation @ centre)
    return np.stack(rotations), np.stack(shifts)


def poses_bounds(rotations, shifts, height, width, focal) -> np.ndarray:
    """LLFF's file, written by hand: columns of the camera-to-world rotation are (down, right, backwards)."""
    rows = []
    for rotation, shift in zip(rotations, shifts):
        right, down, forward = rotation  # rows of world-to-camera are the camera axes in the world
        matrix = np.stack([down, right, -forward, -rotation.T @ shift, [height, width, focal]], axis=1)
        rows.append([*matrix.ravel(), 2.0, 30.0])
    return np.array(rows)


def make_scene(folder: Path, count: int = 9, size=(64, 48), full=(64, 48), name: str = "images") -> np.ndarray:
    """A folder with random images of ``size`` and cameras for ``full``; returns the poses_bounds table."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(
            folder / name / f"{i:02d}.png"
        )
    table = poses_bounds(*colmap_cameras(count), full[1], full[0], 1.2 * full[0])
    np.save(folder / "poses_bounds.npy", table)
    return table


def parse(data: Path, split: str = "train", **flags):
    return LLFFFewViewDataParserConfig(data=data, **flags).setup().get_dataparser_outputs(split)


@pytest.mark.parametrize("scene", sorted(LLFF))
def test_the_parser_uses_the_images_of_the_published_table(real_data, tmp_path, scene):
    count, *rows = LLFF[scene]
    shutil.copy(real_data("llff_poses_only") / scene / "poses_bounds.npy", tmp_path)
    (tmp_path / "images_8").mkdir()
    for i in range(count):
        Image.new("RGB", (8, 6)).save(tmp_path / "images_8" / f"image{i:03d}.png")
    for views, row in zip((3, 6, 9), rows):
        parser = LLFFFewViewDataParserConfig(data=tmp_path, num_views=views).setup()
        train, test = parser.get_dataparser_outputs("train"), parser.get_dataparser_outputs("test")
        expected = [int(i) for i in row.split()]
        assert [p.name for p in train.image_filenames] == [f"image{i:03d}.png" for i in expected]
        assert [entry["id"] for entry in train.metadata["split"]["train"]] == expected
        assert [p.name for p in test.image_filenames] == [f"image{i:03d}.png" for i in range(0, count, 8)]
        assert parser.get_dataparser_outputs("val").image_filenames == test.image_filenames


@pytest.mark.parametrize("orientation", ["up", "none", "vertical"])
def test_points_reproject_to_where_colmap_maths_puts_them(tmp_path, orientation):
    make_scene(tmp_path, size=(32, 24), full=(64, 48))
    rotations, shifts = colmap_cameras(9)
    outputs = parse(tmp_path, train_ids=tuple(range(9)), orientation_method=orientation, downscale_factor=1)
    transform, scale = outputs.dataparser_transform.double(), outputs.dataparser_scale
    rng = np.random.default_rng(2)
    for index in range(9):
        in_camera = np.array([*rng.uniform(-1, 1, 2), rng.uniform(4, 9)])
        world = rotations[index].T @ (in_camera - shifts[index])
        focal, centre = 1.2 * 64, np.array([32.0, 24.0])
        pixel = (focal * in_camera[:2] / in_camera[2] + centre) / 2  # COLMAP at 64 x 48, then at half the size
        ray = outputs.cameras.generate_rays(index, coords=torch.tensor([[pixel[1], pixel[0]]]).float())
        scene = scale * (transform[:, :3] @ torch.from_numpy(world) + transform[:, 3])
        towards = scene.float() - ray.origins[0]
        assert torch.nn.functional.cosine_similarity(towards, ray.directions[0], dim=0) > 1 - 1e-6
        # planar depth in the scene is the capture's times the scale
        planar = float(towards.norm()) / float(ray.metadata["directions_norm"][0])
        assert planar == pytest.approx(in_camera[2] * scale, rel=1e-4)


def test_cameras_go_back_to_the_capture_through_nerfstudios_own_inverse(tmp_path):
    make_scene(tmp_path)
    outputs = parse(tmp_path, train_ids=tuple(range(9)))
    rotations, shifts = colmap_cameras(9)
    back = outputs.transform_poses_to_original_space(outputs.cameras.camera_to_worlds, "opencv")
    expected = np.concatenate([rotations.transpose(0, 2, 1), -(rotations.transpose(0, 2, 1) @ shifts[..., None])], 2)
    np.testing.assert_allclose(back.numpy(), expected, atol=2e-5)


def test_scene_is_centred_upright_and_scaled_over_all_cameras(tmp_path):
    make_scene(tmp_path)
    c2w = parse(tmp_path, train_ids=tuple(range(9))).cameras.camera_to_worlds
    centres = c2w[:, :, 3]
    assert torch.allclose(centres.mean(dim=0), torch.zeros(3), atol=1e-5)
    assert float(centres.abs().max()) == pytest.approx(1.0, abs=1e-5)
    up = c2w[:, :, 1].mean(dim=0)
    assert torch.allclose(up / up.norm(), torch.tensor([0.0, 0.0, 1.0]), atol=1e-4)


@pytest.mark.parametrize("flags", [{"num_views": 3}, {"num_views": 5}, {"train_ids": (2, 3)}])
def test_test_cameras_do_not_depend_on_the_views_trained_on(tmp_path, flags):
    make_scene(tmp_path)
    every, few = parse(tmp_path, "test"), parse(tmp_path, "test", **flags)
    assert torch.equal(every.cameras.camera_to_worlds, few.cameras.camera_to_worlds)
    assert every.dataparser_scale == few.dataparser_scale


def test_near_and_far_are_the_extremes_of_the_training_images_in_scene_units(tmp_path):
    table = make_scene(tmp_path)
    table[:, 15] = 2.0 + np.arange(9) * 0.1
    table[:, 16] = 30.0 - np.arange(9)
    np.save(tmp_path / "poses_bounds.npy", table)
    for split in ("train", "test"):
        outputs = parse(tmp_path, split, train_ids=(3, 5))
        assert outputs.metadata["near"] == pytest.approx(2.3 * outputs.dataparser_scale)
        assert outputs.metadata["far"] == pytest.approx(27.0 * outputs.dataparser_scale)
    assert parse(tmp_path, scale_factor=3.0).metadata["near"] == pytest.approx(3 * parse(tmp_path).metadata["near"])


def test_intrinsics_follow_the_image_size_found(tmp_path):
    make_scene(tmp_path, size=(32, 24), full=(4032, 3024), name="images_126")
    cameras = parse(tmp_path).cameras
    assert cameras.fx[0].item() == pytest.approx(1.2 * 32)
    assert cameras.cx[0].item() == 16
    assert cameras.cy[0].item() == 12
    assert (cameras.width[0].item(), cameras.height[0].item()) == (32, 24)


def test_the_factor_picks_an_existing_folder_before_it_reduces(tmp_path):
    make_scene(tmp_path, size=(64, 48))
    make_scene(tmp_path, size=(16, 12), name="images_4")
    wanted = ((1, 64, "images"), (4, 16, "images_4"), (2, 32, "images_2"), (8, 8, "images_8"))
    for factor, width, folder in wanted:
        outputs = parse(tmp_path, downscale_factor=factor)
        assert outputs.image_filenames[0].parent == tmp_path / folder
        assert outputs.cameras.width[0].item() == width
        assert outputs.metadata["downscale_factor"] == factor
    assert (tmp_path / "images_8" / CACHE_FILE).exists()
    assert not (tmp_path / "images_4" / CACHE_FILE).exists()


def test_ns_render_may_set_the_factor_to_a_float(tmp_path):
    make_scene(tmp_path, size=(64, 48))
    config = LLFFFewViewDataParserConfig(data=tmp_path)
    config.downscale_factor = 2.0  # as `ns-render dataset --downscale-factor 2` does
    outputs = config.setup().get_dataparser_outputs("train")
    assert outputs.image_filenames[0].parent.name == "images_2"
    config.downscale_factor = 2.5
    with pytest.raises(InputError, match=r"2\.5.*whole number"):
        config.setup().get_dataparser_outputs("train")


def test_images_8_made_from_images_4_equals_the_mean_of_the_blocks(tmp_path):
    make_scene(tmp_path, size=(16, 12), name="images_4")
    path = parse(tmp_path, downscale_factor=8).image_filenames[0]
    full = np.asarray(Image.open(tmp_path / "images_4" / path.name), dtype=np.float64)
    mean = full.reshape(6, 2, 8, 2, 3).mean(axis=(1, 3))
    assert np.abs(np.asarray(Image.open(path), dtype=np.float64) - mean).max() <= 0.5


def test_without_a_factor_images_8_are_used_where_they_exist(tmp_path):
    make_scene(tmp_path, size=(64, 48))
    make_scene(tmp_path, size=(16, 12), name="images_4")
    assert parse(tmp_path).image_filenames[0].parent.name == "images"  # the largest that is at most 1008 wide
    make_scene(tmp_path, size=(8, 6), name="images_8")
    assert parse(tmp_path).image_filenames[0].parent.name == "images_8"


def test_masks_have_the_names_of_the_original_images(tmp_path):
    make_scene(tmp_path, name="images_8")
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    for i in range(9):
        Image.new("RGB", (512, 384)).save(tmp_path / "images" / f"IMG_{i}.jpg")
        Image.new("L", (64, 48), 255).save(tmp_path / "masks" / f"IMG_{i}.png")
    outputs = parse(tmp_path, num_views=3, masked_training=True)
    assert {p.parent.name for p in outputs.image_filenames} == {"images_8"}
    numbers = [int(p.stem) for p in outputs.image_filenames]
    assert [p.name for p in outputs.mask_filenames] == [f"IMG_{i}.png" for i in numbers]


def test_without_a_factor_large_images_are_reduced_to_at_most_1008():
    assert automatic_factor(4032, 3024) == 4
    assert automatic_factor(1008, 756) == 1
    assert automatic_factor(756, 1009) == 2


def test_the_capture_is_found_by_what_the_folder_holds(tmp_path):
    make_scene(tmp_path)
    found = FewViewDataParserConfig(data=tmp_path, num_views=3, scale_factor=2.0).setup().get_dataparser_outputs()
    direct = parse(tmp_path, num_views=3, scale_factor=2.0)
    assert torch.equal(found.cameras.camera_to_worlds, direct.cameras.camera_to_worlds)
    assert found.metadata == direct.metadata
    assert found.metadata["source"] == "llff"


def test_flags_of_another_layout_are_refused(tmp_path):
    make_scene(tmp_path)
    with pytest.raises(InputError, match=r"--scan means nothing .* llff"):
        FewViewDataParserConfig(data=tmp_path, scan=8).setup().get_dataparser_outputs()


def test_the_table_of_images_is_printed_once_and_for_training_only(tmp_path, capsys):
    make_scene(tmp_path)
    parser = LLFFFewViewDataParserConfig(data=tmp_path, num_views=3).setup()
    parser.get_dataparser_outputs("test")
    assert "train" not in capsys.readouterr().out
    parser.get_dataparser_outputs("train")
    assert "1 4 7" in capsys.readouterr().out
    parser.get_dataparser_outputs("train")
    assert capsys.readouterr().out == ""


def _matches(path_a: Path, path_b: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pixel positions of features that two images have in common (SIFT, ratio test), corner of the image at 0."""
    cv2 = pytest.importorskip("cv2")
    sift = cv2.SIFT_create(nfeatures=1500)
    points, features = zip(*(sift.detectAndCompute(cv2.imread(str(p), 0), None) for p in (path_a, path_b)))
    pairs = cv2.BFMatcher().knnMatch(features[0], features[1], k=2)
    good = [m for m, n in pairs if m.distance < 0.7 * n.distance]
    at = [np.array([points[k][getattr(m, index)].pt for m in good]) for k, index in ((0, "queryIdx"), (1, "trainIdx"))]
    return at[0] + 0.5, at[1] + 0.5


def _triangulate(cameras, i: int, j: int, a: np.ndarray, b: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Gap between matched rays in pixels of camera i, and distance along its ray, both at the closest approach."""
    rays = [cameras.generate_rays(k, coords=torch.from_numpy(xy[:, ::-1].copy()).float()) for k, xy in ((i, a), (j, b))]
    o1, d1, o2, d2 = (x.double() for r in rays for x in (r.origins, r.directions))
    n = torch.linalg.cross(d1, d2)
    between = o2 - o1
    along = (torch.linalg.cross(between, d2) * n).sum(-1) / (n * n).sum(-1)
    gap = (between * n).sum(-1).abs() / n.norm(dim=-1)
    return gap / along.abs() * cameras.fx[i].double(), along


def test_rays_of_matched_features_of_fern_meet_between_near_and_far(real_data):
    outputs = parse(real_data("llff/fern"), train_ids=(1, 2))
    files = outputs.image_filenames
    a, b = _matches(files[0], files[1])
    assert len(a) > 100
    gap, along = _triangulate(outputs.cameras, 0, 1, a, b)
    assert gap.median() < 0.6  # pixels
    near, far = outputs.metadata["near"], outputs.metadata["far"]
    inside = (along > 0.8 * near) & (along < 1.2 * far)
    assert inside.double().mean() > 0.95
    # the check must be able to fail: with LLFF's columns taken as they are
    wrong = outputs.cameras
    wrong.camera_to_worlds = wrong.camera_to_worlds[:, :, [1, 0, 2, 3]] * torch.tensor([-1.0, 1.0, 1.0, 1.0])
    assert _triangulate(wrong, 0, 1, a, b)[0].median() > 5.0


def break_nan(folder: Path) -> None:
    box_room.spoil_pose(folder, row=4, column=3)


def break_shape(folder: Path) -> None:
    np.save(folder / "poses_bounds.npy", np.load(folder / "poses_bounds.npy")[:, :16])


def break_pickle(folder: Path) -> None:
    np.save(folder / "poses_bounds.npy", np.array([{"a": 1}]), allow_pickle=True)


def break_bounds(folder: Path) -> None:
    table = np.load(folder / "poses_bounds.npy")
    table[2, 15:] = 9.0, 3.0
    np.save(folder / "poses_bounds.npy", table)


def break_rotation(folder: Path) -> None:
    table = np.load(folder / "poses_bounds.npy")
    table[2, :3] *= 2.0
    np.save(folder / "poses_bounds.npy", table)


def break_image(folder: Path) -> None:
    path = folder / "images" / "01.png"
    path.write_bytes(path.read_bytes()[:900])


def break_crop(folder: Path) -> None:
    for path in (folder / "images").iterdir():
        Image.new("RGB", (48, 48)).save(path)


def break_images(folder: Path) -> None:
    shutil.rmtree(folder / "images")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (box_room.drop_last_pose, "8 rows, but images holds 9"),
        (break_nan, r"rows \[4\] hold NaN"),
        (break_shape, r"\[n, 17\]"),
        (break_pickle, "cannot be read"),
        (break_bounds, "row 2 has near 9.0 and far 3.0"),
        (break_rotation, "02.png are not rotations"),
        (break_image, "01.png"),
        (break_crop, "another shape"),
        (break_images, "no images"),
    ],
)
def test_bad_folders_are_refused_with_what_is_wrong(tmp_path, damage, words):
    make_scene(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=words):
        parse(tmp_path)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"num_views": 8}, "at most 7"),
        ({"train_ids": (1, 2), "test_ids": (2,)}, "trained on or tested on"),
        ({"test_ids": (9,)}, "ids 0 to 8"),
        ({"downscale_factor": 0}, "at least 1"),
        ({"downscale_factor": 100}, "cannot be reduced by 100"),
    ],
)
def test_flags_that_cannot_be_met_are_refused(tmp_path, flags, words):
    make_scene(tmp_path)
    with pytest.raises(InputError, match=words):
        parse(tmp_path, **flags)


def test_a_factor_out_of_reach_lists_what_there_is(tmp_path):
    make_scene(tmp_path, name="images_4")
    with pytest.raises(InputError, match=r"needs images_6, .* found images_4"):
        parse(tmp_path, downscale_factor=6)


@pytest.mark.parametrize("config", [LLFFFewViewDataParserConfig, FewViewDataParserConfig])
def test_folders_that_are_not_there_or_hold_nothing_are_refused(tmp_path, config):
    def outputs(data: Path):
        return config(data=data).setup().get_dataparser_outputs()

    with pytest.raises(InputError, match="no such folder"):
        outputs(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty"):
        outputs(tmp_path / "empty")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=r"poses_bounds\.npy"):
        outputs(tmp_path / "other")


def test_parsing_bad_input_writes_nothing(tmp_path):
    make_scene(tmp_path)
    break_nan(tmp_path)
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    with pytest.raises(InputError):
        parse(tmp_path, downscale_factor=2)
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before


def test_a_wrong_shape_at_the_public_boundary_raises():
    from diffusionerf_ns.dataparsers.poses import opengl_from_llff

    with pytest.raises(Exception, match=r"n 3 4|type"):
        opengl_from_llff(np.zeros((2, 4, 4)))


def test_parser_class_is_what_nerfstudio_instantiates(tmp_path):
    assert isinstance(LLFFFewViewDataParserConfig(data=tmp_path).setup(), LLFFFewViewParser)


def test_flags_of_the_command_line_become_the_config():
    import tyro

    config = tyro.cli(FewViewDataParserConfig, args=["--num-views", "3", "--train-ids", "1", "2", "--scan", "8"])
    assert (config.num_views, config.train_ids, config.test_ids, config.scan) == (3, (1, 2), None, 8)
    assert tyro.cli(FewViewDataParserConfig, args=["--num-views", "all"]).num_views == "all"


def test_the_config_modules_import_nothing_heavy_beyond_nerfstudio():
    code = (
        "import sys, nerfstudio.data.dataparsers.base_dataparser, nerfstudio.utils.rich_utils;"
        "before = set(sys.modules);"
        "import diffusionerf_ns.dataparsers.few_view; new = {m.split('.')[0] for m in set(sys.modules) - before};"
        "print(sorted(new - set(sys.stdlib_module_names)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(ast.literal_eval(run.stdout)) <= {"PIL", "ddm_training", "diffusionerf_ns"}

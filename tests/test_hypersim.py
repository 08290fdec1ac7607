"""Hypersim: cameras, planar depth, tone map, and what is done about damaged files."""

from pathlib import Path

import h5py
import numpy as np
import pytest
from hypersim_tree import write_frame, write_hdf5
from PIL import Image

from ddm_training.errors import InputError
from ddm_training.hypersim import (
    PLAIN_CAMERA,
    Pinhole,
    SceneCamera,
    frame_files,
    pinhole_from_uv,
    read_camera_file,
    read_frame,
    tone_map,
)
from ddm_training.rejection import FrameRejected


def tilted(degrees: float, shift: float = 0.0) -> SceneCamera:
    """The plain camera, its image plane turned about the x axis and shifted upwards: M = R U."""
    a = np.radians(degrees)
    rotation = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    upper = np.array(PLAIN_CAMERA)
    upper[1, 2] = shift
    return SceneCamera(matrix=tuple(tuple(row) for row in (rotation @ upper).tolist()))


def test_the_plain_matrix_gives_the_focal_formula_at_pixel_centres() -> None:
    camera = pinhole_from_uv(SceneCamera())
    focal = 886.81
    x = np.arange(1024) + 0.5 - 512
    y = np.arange(768) + 0.5 - 384
    expected = focal / np.sqrt(x[None, :] ** 2 + y[:, None] ** 2 + focal**2)
    np.testing.assert_allclose(camera.cosine, expected, atol=2e-7)
    np.testing.assert_allclose(camera.intrinsics, (focal, focal, 512, 384), atol=1e-3)
    assert camera.shear == 0.0


def test_turning_the_camera_axes_changes_neither_depth_nor_intrinsics() -> None:
    plain, turned = pinhole_from_uv(SceneCamera()), pinhole_from_uv(tilted(20.0))
    np.testing.assert_allclose(turned.cosine, plain.cosine, atol=1e-6)
    np.testing.assert_allclose(turned.intrinsics, plain.intrinsics, atol=1e-6)


@pytest.mark.parametrize("degrees", [0.0, 15.0, 40.0])
def test_points_unprojected_with_the_effective_pinhole_lie_at_the_distance_and_angles_of_the_matrix(
    degrees: float,
) -> None:
    scene = tilted(degrees, shift=0.2)
    camera = pinhole_from_uv(scene)
    fx, fy, cx, cy = camera.intrinsics
    rng = np.random.default_rng(0)
    i, j = rng.integers(0, 1024, 50), rng.integers(0, 768, 50)
    distance = rng.uniform(1.0, 9.0, 50)
    z = distance * camera.cosine[j, i]
    points = np.stack([z * (i + 0.5 - cx) / fx, z * (j + 0.5 - cy) / fy, z], axis=1)
    uv1 = np.stack([2 * (i + 0.5) / 1024 - 1, 1 - 2 * (j + 0.5) / 768, np.ones(50)], axis=1)
    rays = uv1 @ np.array(scene.matrix).T
    truth = distance[:, None] * rays / np.linalg.norm(rays, axis=1, keepdims=True)
    # the same points but for a rotation: all mutual inner products agree
    np.testing.assert_allclose(points @ points.T, truth @ truth.T, rtol=1e-5, atol=1e-5)
    assert abs(cy - 384) > 50  # the shift is in the principal point


def test_all_published_cameras_are_square_pinholes_in_the_axes_of_their_image_plane(real_data) -> None:
    cameras = read_camera_file(real_data("hypersim") / "metadata_camera_parameters.csv")
    assert len(cameras) == 482
    plain = 0
    for camera in cameras.values():
        pinhole = pinhole_from_uv(SceneCamera(matrix=camera.matrix, width=16, height=12))
        fx, fy = pinhole.intrinsics[:2]
        assert abs(fx / fy - 1) < 5e-4
        assert abs(pinhole.shear) < 0.02
        plain += np.allclose(np.array(camera.matrix), np.array(PLAIN_CAMERA), atol=1e-4)
    assert plain < 250  # so the others matter


def test_real_walls_are_planes_in_planar_depth_and_not_in_distance(real_data) -> None:
    path = real_data("hypersim/jupyter/ai_037_002/images/scene_cam_00_geometry_hdf5/frame.0000.depth_meters.hdf5")
    cameras = read_camera_file(real_data("hypersim") / "metadata_camera_parameters.csv")
    pinhole = pinhole_from_uv(cameras["ai_037_002"])
    with h5py.File(path) as file:
        distance = np.asarray(file["dataset"]).astype(np.float64)

    def curvature(depth: np.ndarray) -> float:
        """Over a plane 1/z is linear in pixels: median |second difference| of 1/z over 64-pixel steps, relative."""
        inverse = 1.0 / depth
        second = inverse[:, :-128:16] - 2 * inverse[:, 64:-64:16] + inverse[:, 128::16]
        relative = np.abs(second / inverse[:, 64:-64:16])
        return float(np.quantile(relative, 0.2))  # the flat fifth of the picture

    assert curvature(distance * pinhole.cosine) < 0.4 * curvature(distance)


def test_a_singular_camera_matrix_is_rejected() -> None:
    with pytest.raises(FrameRejected, match="singular"):
        pinhole_from_uv(SceneCamera(matrix=((1.0, 0.0, 0.0), (2.0, 0.0, 0.0), (0.0, 0.0, -1.0))))


def test_tone_map_follows_its_formula_pixel_by_pixel() -> None:
    rng = np.random.default_rng(1)
    rgb = rng.gamma(1.0, 2.0, (12, 16, 3)).astype(np.float16)
    valid = rng.random((12, 16)) < 0.7
    shine = sorted(0.3 * r + 0.59 * g + 0.11 * b for r, g, b in rgb[valid].astype(float))
    position = 0.9 * (len(shine) - 1)
    low = int(position)
    p = shine[low] + (position - low) * (shine[low + 1] - shine[low])
    expected = [
        [[min(max(0.8**2.2 / p * c, 0), 1) ** (1 / 2.2) * 255 for c in px] for px in row] for row in rgb.tolist()
    ]
    assert np.abs(tone_map(rgb, valid).astype(float) - np.array(expected)).max() <= 0.51
    np.testing.assert_array_equal(tone_map(rgb, valid), tone_map(rgb.astype(np.float32), valid))


def test_tone_map_puts_the_brightness_percentile_at_eight_tenths_whatever_the_exposure() -> None:
    rgb = np.random.default_rng(2).uniform(0.0, 1.0, (40, 40, 1)).astype(np.float32).repeat(3, axis=2)
    valid = np.ones((40, 40), bool)
    mapped = tone_map(rgb, valid)
    assert abs(np.percentile(mapped, 90) - 0.8 * 255) < 1
    np.testing.assert_array_equal(tone_map(np.float32(64.0) * rgb, valid), mapped)


def test_tone_map_of_black_is_black_and_without_valid_pixels_is_unscaled() -> None:
    rgb = np.full((4, 4, 3), 5e-5, np.float32)
    assert tone_map(rgb, np.ones((4, 4), bool)).max() == 0
    half = np.full((4, 4, 3), 0.5, np.float32)
    assert np.all(tone_map(half, np.zeros((4, 4), bool)) == round(255 * 0.5 ** (1 / 2.2)))


def test_tone_map_clips_infinite_and_negative_light() -> None:
    rgb = np.full((10, 10, 3), 0.5, np.float16)
    rgb[0, 0], rgb[0, 1] = np.inf, -1.0
    mapped = tone_map(rgb, np.ones((10, 10), bool))
    assert mapped[0, 0].tolist() == [255] * 3
    assert mapped[0, 1].tolist() == [0] * 3


@pytest.fixture
def frame(tmp_path: Path) -> tuple[dict[str, Path], Pinhole]:
    write_frame(tmp_path, "cam_00", 7)
    return frame_files(tmp_path, "cam_00", 7, "hdr"), pinhole_from_uv(SceneCamera(width=64, height=48))


def test_a_frame_comes_back_with_planar_depth(frame) -> None:
    color, depth, mask = read_frame(*frame)
    assert color.shape == (48, 64, 3)
    assert mask.all()
    np.testing.assert_allclose(depth[:, :32], 2.0, rtol=1e-3)
    np.testing.assert_allclose(depth[:, 32:], 4.0, rtol=1e-3)


def test_nan_zero_negative_and_infinite_depth_is_masked_and_nothing_else(frame) -> None:
    files, pinhole = frame
    with h5py.File(files["depth"], "r+") as file:
        file["dataset"][0, :4] = [np.nan, 0.0, -1.0, np.inf]
    _, _, mask = read_frame(files, pinhole)
    assert not mask[0, :4].any()
    assert mask.sum() == mask.size - 4


def test_the_preview_stands_in_for_hdr_colour(tmp_path: Path, frame) -> None:
    files = frame_files(tmp_path, "cam_00", 7, "preview")
    files["colour"].parent.mkdir()
    Image.new("RGB", (64, 48), (200, 100, 50)).save(files["colour"], quality=100)
    color, _, _ = read_frame(files, frame[1])
    assert np.abs(color.astype(int) - [200, 100, 50]).max() < 4


@pytest.mark.parametrize("content", [b"P6\nwide 24\n255\n", b"P6\n60000 60000\n255\n"])
def test_a_preview_with_a_broken_header_is_a_rejection(tmp_path: Path, frame, content: bytes) -> None:
    files = frame_files(tmp_path, "cam_00", 7, "preview")
    files["colour"].parent.mkdir()
    files["colour"].write_bytes(content)
    with pytest.raises(FrameRejected, match=r"^colour file damaged$"):
        read_frame(files, frame[1])


@pytest.mark.parametrize("what", ["depth", "entity id", "colour"])
def test_a_truncated_file_is_a_rejection_that_names_what_it_held(frame, what: str) -> None:
    files, pinhole = frame
    content = files[what].read_bytes()
    for length in (0, 100, len(content) // 2, len(content) - 40):
        files[what].write_bytes(content[:length])
        with pytest.raises(FrameRejected, match=f"^{what} file damaged$"):
            read_frame(files, pinhole)


def test_a_chunk_of_garbage_is_a_rejection(frame) -> None:
    files, pinhole = frame
    with h5py.File(files["depth"]) as file:
        chunk = file["dataset"].id.get_chunk_info(0)
    content = bytearray(files["depth"].read_bytes())
    content[chunk.byte_offset : chunk.byte_offset + chunk.size] = b"\x55" * chunk.size
    files["depth"].write_bytes(bytes(content))
    with pytest.raises(FrameRejected, match="depth file damaged"):
        read_frame(files, pinhole)


@pytest.mark.parametrize("what", ["depth", "entity id", "colour"])
def test_a_missing_file_is_a_rejection_of_its_own(frame, what: str) -> None:
    files, pinhole = frame
    files[what].unlink()
    with pytest.raises(FrameRejected, match=f"^no {what} file$"):
        read_frame(files, pinhole)


def test_another_size_another_type_and_nan_colour_are_rejections(frame) -> None:
    files, pinhole = frame
    color = np.zeros((48, 64, 3), np.float16)
    color[3, 4, 0] = np.nan
    for what, array, reason in (
        ("colour", color, "colour has NaN"),
        ("colour", np.zeros((48, 64, 3), np.uint8), "colour is not floating point"),
        ("entity id", np.zeros((24, 32), np.int32), "entity id of another size than the camera"),
        ("depth", np.zeros((24, 32), np.float16), "depth of another size than the camera"),
    ):
        write_hdf5(files[what], array)
        with pytest.raises(FrameRejected, match=reason):
            read_frame(files, pinhole)


def test_an_hdf5_file_without_the_expected_key_is_damaged(frame) -> None:
    files, pinhole = frame
    with h5py.File(files["depth"], "w") as file:
        file.create_group("dataset")
    with pytest.raises(FrameRejected, match="depth file damaged"):
        read_frame(files, pinhole)
    with h5py.File(files["depth"], "w") as file:
        file["other"] = np.zeros(3)
    with pytest.raises(FrameRejected, match="depth file damaged"):
        read_frame(files, pinhole)


def test_a_file_that_may_not_be_read_is_an_error_of_the_machine_not_of_the_frame(frame, monkeypatch) -> None:
    def denied(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(h5py, "File", denied)
    with pytest.raises(PermissionError):
        read_frame(*frame)


def test_a_table_that_is_not_the_camera_table_says_what_it_lacks(tmp_path: Path) -> None:
    path = tmp_path / "cameras.csv"
    with pytest.raises(InputError, match="expected metadata_camera_parameters"):
        read_camera_file(path)
    path.write_text("scene_name,other\nai_001_001,3\n")
    with pytest.raises(InputError, match="M_cam_from_uv_00"):
        read_camera_file(path)

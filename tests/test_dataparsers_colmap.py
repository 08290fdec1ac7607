"""COLMAP models: the same cameras as in transforms.json, the model that is read, what is refused."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from nerfstudio.data.utils import colmap_parsing_utils as colmap
from PIL import Image
from scipy.spatial.transform import Rotation
from small_capture import make_capture, names, parse

from ddm_training.errors import InputError

LENS = {"k1": 0.1, "k2": -0.02, "p1": 0.001, "p2": -0.002}


def poses(count: int) -> np.ndarray:
    """Camera to world, OpenGL axes, turned by all three angles."""
    if count == 0:
        return np.zeros((0, 3, 4))
    turns = Rotation.from_euler("xyz", [[0.1 * i, -0.05 * i, 0.2 * i] for i in range(count)]).as_matrix()
    centres = np.array([[0.3 * i, 0.1 * (i % 3), 1.0] for i in range(count)])
    return np.concatenate([turns, centres[..., None]], axis=2)


def write_model(
    folder: Path,
    count: int,
    *,
    kind: str = "bin",
    model: str = "OPENCV",
    params: tuple[float, ...] | None = None,
    renamed: dict[str, str] | None = None,
) -> None:
    """A model of the images of `small_capture`, written by the module that nerfstudio has from COLMAP."""
    folder.mkdir(parents=True, exist_ok=True)
    given = (36.0, 37.0, 19.0, 15.5, *LENS.values()) if params is None else params
    cameras = {3: colmap.Camera(id=3, model=model, width=40, height=30, params=np.array(given))}
    images = {}
    for i, pose in reversed(list(enumerate(poses(count)))):
        rotation = (pose[:, :3] * [1, -1, -1]).T
        images[i + 1] = colmap.Image(
            id=i + 1,
            qvec=colmap.rotmat2qvec(rotation),
            tvec=-rotation @ pose[:, 3],
            camera_id=3,
            name=(renamed or {}).get(f"f{i:02d}.png", f"f{i:02d}.png"),
            xys=np.zeros((1, 2)),
            point3D_ids=np.array([-1]),
        )
    if kind == "bin":
        colmap.write_cameras_binary(cameras, folder / "cameras.bin")
        colmap.write_images_binary(images, folder / "images.bin")
    else:
        colmap.write_cameras_text(cameras, folder / "cameras.txt")
        colmap.write_images_text(images, folder / "images.txt")


@pytest.fixture
def capture(tmp_path) -> Path:
    """Ten images and no cameras."""
    make_capture(tmp_path, 10)
    (tmp_path / "transforms.json").unlink()
    return tmp_path


@pytest.mark.parametrize("place", ["sparse/0", "sparse", "colmap/sparse/0", "."])
@pytest.mark.parametrize("kind", ["bin", "txt"])
def test_cameras_equal_those_of_transforms_json(tmp_path, capture, place, kind):
    content = make_capture(tmp_path / "other", 10, **LENS)
    for frame, pose in zip(sorted(content["frames"], key=lambda f: f["file_path"]), poses(10)):
        frame["transform_matrix"] = pose.tolist()
    (tmp_path / "other" / "transforms.json").write_text(json.dumps(content))
    write_model(capture / place, 10, kind=kind)
    for split in ("train", "test"):
        ours, theirs = parse(capture, split, num_views=3), parse(tmp_path / "other", split, num_views=3)
        assert names(ours) == names(theirs)
        torch.testing.assert_close(ours.cameras.camera_to_worlds, theirs.cameras.camera_to_worlds, atol=1e-5, rtol=0)
        for name in ("fx", "fy", "cx", "cy", "width", "height", "distortion_params"):
            torch.testing.assert_close(getattr(ours.cameras, name), getattr(theirs.cameras, name))
    assert ours.metadata["source"] == "colmap"


@pytest.mark.parametrize(
    ("model", "params", "lens"),
    [
        ("SIMPLE_PINHOLE", (36.0, 19.0, 15.5), 0.0),
        ("PINHOLE", (36.0, 37.0, 19.0, 15.5), 0.0),
        ("SIMPLE_RADIAL", (36.0, 19.0, 15.5, 0.05), 0.05),
    ],
)
def test_simpler_lenses(capture, model, params, lens):
    write_model(capture / "sparse" / "0", 10, model=model, params=params)
    cameras = parse(capture).cameras
    assert float(cameras.fx[0]) == 36.0
    assert float(cameras.cx[0]) == 19.0
    distortion = cameras.distortion_params
    assert (0.0 if distortion is None else float(distortion[0, 0])) == pytest.approx(lens)


def test_the_largest_of_several_models_is_read(capture):
    write_model(capture / "sparse" / "0", 3)
    write_model(capture / "sparse" / "1", 10)
    assert len(names(parse(capture))) == 8  # two are held out


def test_images_without_a_pose_are_left_out_and_named(capture, capsys):
    for name in ("f10.png", "f11.png"):
        Image.new("RGB", (40, 30)).save(capture / "images" / name)
    write_model(capture / "sparse" / "0", 10)
    assert len(names(parse(capture))) == 8
    assert "2 of the images" in (said := " ".join(capsys.readouterr().out.split()))
    assert "f10.png, f11.png" in said


def test_reduced_copies_that_lie_beside_the_images_are_used(capture):
    write_model(capture / "sparse" / "0", 10)
    (capture / "images_2").mkdir()
    for path in (capture / "images").iterdir():
        Image.open(path).resize((20, 15)).save(capture / "images_2" / path.name)
    outputs = parse(capture, downscale_factor=2)
    assert {path.parent.name for path in outputs.image_filenames} == {"images_2"}
    assert float(outputs.cameras.fx[0]) == 18.0
    assert int(outputs.cameras.width[0]) == 20


@pytest.mark.parametrize("kind", ["bin", "txt"])
def test_names_with_spaces_and_images_in_folders(capture, kind):
    (capture / "images" / "left").mkdir()
    (capture / "images" / "f03.png").rename(capture / "images" / "left" / "IMG 3.png")
    write_model(capture / "sparse" / "0", 10, kind=kind, renamed={"f03.png": "left/IMG 3.png"})
    outputs = parse(capture)
    assert "IMG 3" in names(outputs)
    assert len(names(outputs)) == 8


def test_a_camera_for_each_image(capture):
    write_model(capture / "sparse" / "0", 10)
    cameras = colmap.read_cameras_binary(capture / "sparse" / "0" / "cameras.bin")
    images = colmap.read_images_binary(capture / "sparse" / "0" / "images.bin")
    params = np.array((72.0, 70.0, 40.0, 25.0))
    cameras[9] = colmap.Camera(id=9, model="PINHOLE", width=80, height=50, params=params)
    images[3] = images[3]._replace(camera_id=9)
    colmap.write_cameras_binary(cameras, capture / "sparse" / "0" / "cameras.bin")
    colmap.write_images_binary(images, capture / "sparse" / "0" / "images.bin")
    Image.new("RGB", (80, 50)).save(capture / "images" / images[3].name)
    found = parse(capture)
    other = names(found).index(Path(images[3].name).stem)
    assert (int(found.cameras.width[other]), float(found.cameras.fx[other])) == (80, 72.0)
    assert (int(found.cameras.width[other - 1]), float(found.cameras.fx[other - 1])) == (40, 36.0)


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:90])


@pytest.mark.parametrize("name", ["cameras.bin", "images.bin"])
def test_damaged_models_are_named(capture, name):
    write_model(capture / "sparse" / "0", 10)
    damage(capture / "sparse" / "0" / name)
    if name == "cameras.bin":
        (capture / "sparse" / "0" / name).write_bytes(b"\x01")
    with pytest.raises(InputError, match=rf"{re.escape(name)} cannot be read.*Expected a model of COLMAP"):
        parse(capture)


@pytest.mark.parametrize(
    ("model", "params", "words"),
    [
        (
            "OPENCV_FISHEYE",
            (36.0, 37.0, 19.0, 15.5, 0.1, 0.0, 0.0, 0.0),
            "OPENCV_FISHEYE is not supported",
        ),
        ("FOV", (36.0, 37.0, 19.0, 15.5, 0.1), "FOV is not supported"),
    ],
)
def test_lenses_that_bend_otherwise_are_refused(capture, model, params, words):
    write_model(capture / "sparse" / "0", 10, model=model, params=params)
    with pytest.raises(InputError, match=words):
        parse(capture)


def test_images_that_are_gone_are_named(capture):
    write_model(capture / "sparse" / "0", 10)
    (capture / "images" / "f01.png").unlink()
    with pytest.raises(InputError, match=r"image files are missing: images/f01\.png"):
        parse(capture, num_views=3)


def test_a_model_where_nothing_was_placed_is_refused(capture):
    write_model(capture / "sparse" / "0", 0)
    with pytest.raises(InputError, match="without images"):
        parse(capture)


@pytest.mark.parametrize("suffix", [".png.png", ".jpg"], ids=["as COLMAP names them", "by the image's stem"])
def test_masks_beside_the_images_are_used_when_asked(capture, capsys, suffix):
    write_model(capture / "sparse" / "0", 10)
    (capture / "masks").mkdir(exist_ok=True)
    for i in range(10):
        Image.new("L", (40, 30), 255).save(capture / "masks" / f"f{i:02d}{suffix}")
    assert parse(capture, num_views=3).mask_filenames is None
    assert "--masked-training" in capsys.readouterr().out
    outputs = parse(capture, num_views=3, masked_training=True)
    assert [p.name for p in outputs.mask_filenames] == [f"{name}{suffix}" for name in names(outputs)]
    (capture / "masks").rename(capture / "elsewhere")
    with pytest.raises(InputError, match=r"no masks were found in .*masks; give --mask-folder"):
        parse(capture, masked_training=True)
    with pytest.raises(InputError, match="--masked-training True as well"):
        parse(capture, mask_folder=capture / "elsewhere")
    (capture / "elsewhere" / f"{names(outputs)[1]}{suffix}").unlink()
    with pytest.raises(InputError, match=rf"the masks of {names(outputs)[1]}\.png are missing"):
        parse(capture, num_views=3, masked_training=True, mask_folder=capture / "elsewhere")


def test_a_camera_model_that_nerfstudio_does_not_know_is_told_to_be_undistorted(capture):
    write_model(capture / "sparse" / "0", 10)
    file = capture / "sparse" / "0" / "cameras.bin"
    content = bytearray(file.read_bytes())
    content[12:16] = (17).to_bytes(4, "little")  # after the number of cameras and the first one's
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"camera model .*17.*image_undistorter"):
        parse(capture)

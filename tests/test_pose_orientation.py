"""Photographs that were taken upright among others that lie, and which way is up in the scene."""

import json
import shutil

import corner
import numpy as np
import pytest
from PIL import Image

from diffusionerf_ns import pose_search, structure_from_motion
from diffusionerf_ns.dataparsers.few_view import FewViewDataParserConfig
from diffusionerf_ns.pose_search import find_poses


def test_upright_photographs_are_turned_where_others_lie(taken, placed, tmp_path, capsys):
    mixed = tmp_path / "mixed"
    shutil.copytree(taken[0], mixed)
    Image.open(mixed / "1.png").transpose(Image.Transpose.ROTATE_270).save(mixed / "1.png")  # turned back below
    assert find_poses(mixed, tmp_path / "capture") == placed[1]
    assert "Turned to lie as the others: 1.png" in capsys.readouterr().out
    turned, lying = (Image.open(p / "images" / "1.png") for p in (tmp_path / "capture", placed[0]))
    assert np.array_equal(np.asarray(turned), np.asarray(lying))


def test_a_turned_photograph_does_not_tilt_the_scene(taken, tmp_path):
    """Two that lie and one that was taken upright: its picture is turned, and its left counts as up."""
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for number in (0, 2):
        shutil.copy(taken[0] / f"{number}.png", mixed)
    Image.fromarray(corner.render(taken[1][1], size=(corner.HEIGHT, corner.WIDTH))).save(mixed / "1.png")
    assert find_poses(mixed, tmp_path / "capture").missing == ()
    outputs = FewViewDataParserConfig(data=tmp_path / "capture").setup().get_dataparser_outputs("train")
    found = outputs.cameras.camera_to_worlds.double().numpy()
    true_up = np.array([0.0, -1.0, 0.0])  # of the corner
    for number in (0, 2):
        camera_up = taken[1][number][:, :3] @ true_up  # right, down, forward
        up = found[number][:, :3] @ (camera_up * [1.0, -1.0, -1.0])
        assert np.degrees(np.arccos(up[2])) < 20  # cameras look down by about 10 degrees
    ups = np.stack([found[0][:, 1], -found[1][:, 0], found[2][:, 1]])  # of the turned one the left
    mean_up = ups.mean(axis=0) / np.linalg.norm(ups.mean(axis=0))
    assert np.degrees(np.arccos(mean_up[2])) < 0.1


def test_a_scene_of_turned_photographs_alone_stands_upright():
    rotation = ((0.0, 1.0, 0.0), (-1.0, 0.0, 0.0), (0.0, 0.0, 1.0))  # right is down in the world
    image = corner.placed("a.png", rotation)
    model = structure_from_motion.Reconstruction(images=(image,), points=99, error=0.1)
    frames, oriented = pose_search.frames_of(model, turned=["a.png"])
    assert oriented == {"orientation_override": "none"}
    pose = np.array(frames[0]["transform_matrix"])
    assert pose[:3, 0] == pytest.approx([0.0, 0.0, -1.0])  # its right is down
    assert pose_search.frames_of(model)[1] == {}


def test_turn_to_z_is_the_smallest_rotation():
    for up in (*np.random.default_rng(1).standard_normal((4, 3)), np.array([0.0, 0.0, -2.0])):
        turn = pose_search.turn_to_z(up)
        unit = up / np.linalg.norm(up)
        assert turn @ unit == pytest.approx([0.0, 0.0, 1.0], abs=1e-12)
        assert np.linalg.det(turn) == pytest.approx(1.0)
        assert (np.trace(turn) - 1.0) / 2.0 == pytest.approx(unit[2], abs=1e-12)


def test_upright_photographs_alone_stay_upright(taken, tmp_path):
    upright = tmp_path / "upright"
    upright.mkdir()
    for source in taken[0].iterdir():
        Image.open(source).transpose(Image.Transpose.ROTATE_270).save(upright / source.name)
    find_poses(upright, tmp_path / "capture")
    frames = json.loads((tmp_path / "capture" / "transforms.json").read_text())["frames"]
    assert {(frame["w"], frame["h"]) for frame in frames} == {(corner.HEIGHT, corner.WIDTH)}
    truth = taken[1].copy()
    truth[:, 0], truth[:, 1] = -taken[1][:, 1], taken[1][:, 0]  # what was up is right
    assert corner.errors_of(frames, truth)[0].max() < 0.3

"""COLMAP in a process of its own: what it is given, and how it fails."""

import corner
import numpy as np
import pytest
from PIL import Image, ImageDraw

from ddm_training.errors import InputError
from diffusionerf_ns import structure_from_motion


def test_a_focal_length_is_kept_unless_no_lens_has_it(taken):
    how = structure_from_motion.SEARCHES[0]
    names = ["0.png", "1.png", "2.png"]
    models, matches = structure_from_motion.search(taken[0], names, how, "one", 422.0)  # it is 420
    assert [image.known_focal for image in models[0].images] == [422.0] * 3
    assert [image.focal for image in models[0].images] == [422.0] * 3
    assert matches > 100
    lost, _ = structure_from_motion.search(taken[0], names, how, "one", 4.0)
    assert not lost or lost[0].images[0].focal > 5.0


def test_a_failure_of_colmap_is_told(taken, monkeypatch):
    monkeypatch.setattr(structure_from_motion, "__name__", "diffusionerf_ns.no_such_module")
    how = structure_from_motion.SEARCHES[0]
    with pytest.raises(InputError, match=r"COLMAP failed .*exit status 1.*no_such_module"):
        structure_from_motion.search(taken[0], ["0.png"], how, "one", None)


def test_an_image_that_colmap_cannot_read_is_named(tmp_path):
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"COLMAP cannot read b\.png"):
        structure_from_motion.search(tmp_path, ["a.png", "b.png"], structure_from_motion.SEARCHES[0], "one", None)


def test_transparent_parts_give_no_features(taken, tmp_path):
    """A turntable before a background that stands still: features of it say that the camera does so too."""
    background = Image.fromarray(corner.render(taken[1][1])[::-1])
    inside = Image.new("L", background.size)
    ImageDraw.Draw(inside).ellipse((60, 40, 420, 330), fill=255)
    names = ["0.png", "1.png", "2.png"]
    for name in names:
        image = Image.composite(Image.open(taken[0] / name), background, inside)
        image.putalpha(inside)
        image.save(tmp_path / name)
    models, _ = structure_from_motion.search(tmp_path, names, structure_from_motion.SEARCHES[0], "one", corner.FOCAL)
    placed = {image.name: np.array(image.rotation) for image in models[0].images}
    assert sorted(placed) == names
    for first, second in ((0, 1), (1, 2)):
        turn = placed[names[second]] @ placed[names[first]].T
        truth = taken[1][second][:, :3] @ taken[1][first][:, :3].T
        assert np.degrees(np.arccos((np.trace(turn @ truth.T) - 1.0) / 2.0)) < 0.5


def test_masks_are_white_where_images_are_opaque(tmp_path):
    assert not structure_from_motion.write_masks(tmp_path, ["absent.png"], tmp_path / "masks")
    Image.new("RGB", (4, 2)).save(tmp_path / "a.png")
    assert not structure_from_motion.write_masks(tmp_path, ["a.png"], tmp_path / "masks")
    alpha = np.array([[0, 127, 128, 255]], dtype=np.uint8)
    Image.fromarray(np.concatenate([np.zeros((1, 4, 3), dtype=np.uint8), alpha[..., None]], axis=2)).save(
        tmp_path / "b.png"
    )
    assert structure_from_motion.write_masks(tmp_path, ["a.png", "b.png"], tmp_path / "masks")
    assert np.asarray(Image.open(tmp_path / "masks" / "a.png.png")).tolist() == [[255] * 4] * 2
    assert np.asarray(Image.open(tmp_path / "masks" / "b.png.png")).tolist() == [[0, 0, 255, 255]]


def model(name: str, images: int = 3, points: int = 99, error: float = 0.4) -> structure_from_motion.Reconstruction:
    placed = (corner.placed(name, points=points),) * images
    return structure_from_motion.Reconstruction(images=placed, points=points, error=error)


def test_an_unknown_must_be_worth_it():
    few, more, most = [model("few")], [model("more", error=0.39)], [model("most", error=0.2)]
    assert structure_from_motion.select_lens_model([(0, few), (1, more)]) == few
    assert structure_from_motion.select_lens_model([(0, few), (1, more), (2, most)]) == most
    assert structure_from_motion.select_lens_model([(0, []), (1, more)]) == more
    assert structure_from_motion.select_lens_model([(0, []), (1, [])]) == []


def test_of_lenses_with_as_many_unknowns_the_better_is_taken():
    worse, better = [model("worse", error=0.202)], [model("better", error=0.2)]
    assert structure_from_motion.select_lens_model([(1, worse), (1, better), (2, worse)]) == better


def test_images_that_are_placed_count_before_errors():
    two, three, other = model("two", 2, error=0.1), model("three", error=0.5), model("other", 1, error=0.1)
    assert structure_from_motion.select_lens_model([(0, [two]), (1, [other, three]), (2, [two])]) == [other, three]


def test_an_error_that_is_lower_because_points_were_lost_is_no_reason():
    many, few = [model("many", points=400, error=0.5)], [model("few", points=12, error=0.0)]
    assert structure_from_motion.select_lens_model([(0, many), (1, few)]) == many
    assert structure_from_motion.select_lens_model([(0, few), (1, many)]) == many

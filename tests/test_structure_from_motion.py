"""COLMAP in a process of its own: what it is given, and how it fails."""

import corner
import pytest
from PIL import Image

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


def model(name: str, images: int = 3, points: int = 99, error: float = 0.4) -> structure_from_motion.Model:
    placed = (corner.placed(name, points=points),) * images
    return structure_from_motion.Model(images=placed, points=points, error=error)


def test_an_unknown_must_be_worth_it():
    few, more, most = [model("few")], [model("more", error=0.39)], [model("most", error=0.2)]
    assert structure_from_motion.simplest([(0, few), (1, more)]) == few
    assert structure_from_motion.simplest([(0, few), (1, more), (2, most)]) == most
    assert structure_from_motion.simplest([(0, []), (1, more)]) == more
    assert structure_from_motion.simplest([(0, []), (1, [])]) == []


def test_of_lenses_with_as_many_unknowns_the_better_is_taken():
    worse, better = [model("worse", error=0.202)], [model("better", error=0.2)]
    assert structure_from_motion.simplest([(1, worse), (1, better), (2, worse)]) == better


def test_images_that_are_placed_count_before_errors():
    two, three, other = model("two", 2, error=0.1), model("three", error=0.5), model("other", 1, error=0.1)
    assert structure_from_motion.simplest([(0, [two]), (1, [other, three]), (2, [two])]) == [other, three]


def test_an_error_that_is_lower_because_points_were_lost_is_no_reason():
    many, few = [model("many", points=400, error=0.5)], [model("few", points=12, error=0.0)]
    assert structure_from_motion.simplest([(0, many), (1, few)]) == many
    assert structure_from_motion.simplest([(0, few), (1, many)]) == many

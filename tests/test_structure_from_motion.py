"""COLMAP in a process of its own: what it is given, and how it fails."""

import corner
import pytest
from PIL import Image

from ddm_training.errors import InputError
from diffusionerf_ns import structure_from_motion


def test_a_search_begins_with_the_focal_length_it_is_given(taken):
    """And from one that no lens has it does not come to the right one: so it is used."""
    how = structure_from_motion.SEARCHES[0]
    names = ["0.png", "1.png", "2.png"]
    models, matches = structure_from_motion.search(taken[0], names, how, "one", 420.0)
    assert [image.known_focal for image in models[0].images] == [420.0] * 3
    assert models[0].images[0].focal == pytest.approx(420.0, rel=0.02)
    assert matches > 100
    lost, _ = structure_from_motion.search(taken[0], names, how, "one", 4.0)
    assert not lost or lost[0].images[0].focal != pytest.approx(420.0, rel=0.1)


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


def model(name: str, images: int, error: float) -> structure_from_motion.Model:
    return structure_from_motion.Model(images=(corner.placed(name),) * images, points=99, error=error)


def test_an_unknown_must_be_worth_it():
    few, more, most = model("few", 3, 0.4), model("more", 3, 0.39), model("most", 3, 0.2)
    assert structure_from_motion.simplest([[few], [more]]) == [few]
    assert structure_from_motion.simplest([[few], [more], [most]]) == [most]
    assert structure_from_motion.simplest([[], [more]]) == [more]
    assert structure_from_motion.simplest([[], []]) == []


def test_images_that_are_placed_count_before_errors():
    two, three, other = model("two", 2, 0.1), model("three", 3, 0.5), model("other", 1, 0.1)
    assert structure_from_motion.simplest([[two], [other, three], [two]]) == [other, three]

"""Splits: the protocol's table, its closed form, and what explicit ids do."""

import io
from fractions import Fraction

import pytest
from rich.console import Console

from ddm_training.errors import InputError
from diffusionerf_ns.dataparsers import dtu
from diffusionerf_ns.dataparsers.splits import Split, choose, hold_out, split_table, spread, take, without_lists

# number of images and 0-based training ids for 3, 6 and 9 views, as published for the LLFF scenes
LLFF = {
    "fern": (20, "1 10 19", "1 4 7 12 15 19", "1 3 5 7 10 12 14 17 19"),
    "flower": (34, "1 17 33", "1 7 13 20 26 33", "1 5 9 12 17 21 25 28 33"),
    "fortress": (42, "1 21 41", "1 9 17 25 33 41", "1 5 11 15 21 26 30 36 41"),
    "horns": (62, "1 30 61", "1 13 25 37 49 61", "1 9 15 23 30 38 46 53 61"),
    "leaves": (26, "1 12 25", "1 5 10 15 20 25", "1 4 6 10 12 15 19 21 25"),
    "orchids": (25, "1 12 23", "1 5 10 14 19 23", "1 3 6 10 12 14 18 21 23"),
    "room": (41, "1 20 39", "1 9 17 23 31 39", "1 5 10 15 20 25 30 35 39"),
    "trex": (55, "1 28 54", "1 11 22 33 44 54", "1 7 14 21 28 34 41 47 54"),
}


@pytest.mark.parametrize("scene", sorted(LLFF))
@pytest.mark.parametrize("views", [3, 6, 9])
def test_llff_views_are_those_of_the_published_table(scene, views):
    count, *rows = LLFF[scene]
    split = choose(count, *hold_out(count), num_views=views)
    assert split.train == tuple(map(int, rows[views // 3 - 1].split()))
    assert split.test == tuple(i for i in range(count) if i % 8 == 0)


@pytest.mark.parametrize("count", [9, 17, 25, 62])
@pytest.mark.parametrize("views", [2, 3, 5, 6])
def test_positions_are_exact_fractions_rounded_half_to_even(count, views):
    pool = [i for i in range(count) if i % 8]
    exact = [round(Fraction(k * (len(pool) - 1), views - 1)) for k in range(views)]  # Python rounds half to even
    assert spread(pool, views) == tuple(pool[i] for i in exact)


def test_a_half_is_rounded_to_the_even_position():
    assert spread(range(8), 3) == (0, 4, 7)  # 3.5 -> 4
    assert spread(range(6), 3) == (0, 2, 5)  # 2.5 -> 2


def test_all_views_and_one_view():
    assert take(range(5), "all") == (0, 1, 2, 3, 4)
    assert take((3, 5, 9), 1) == (3,)


def test_dtu_takes_the_first_of_its_list_in_order():
    split = choose(dtu.VIEWS, dtu.TRAIN_IDS, dtu.TEST_IDS, num_views=3, how="first")
    assert split.train == (25, 22, 28)
    assert choose(dtu.VIEWS, dtu.TRAIN_IDS, dtu.TEST_IDS, how="first").train == (25, 22, 28, 40, 44, 48, 0, 8, 13)
    listed = "1 2 9 10 11 12 14 15 23 24 26 27 29 30 31 32 33 34 35 41 42 43 45 46 47"
    assert split.test == tuple(map(int, listed.split()))


def test_train_test_and_excluded_ids_of_dtu_cover_the_scan_once():
    everything = [*dtu.TRAIN_IDS, *dtu.TEST_IDS, *dtu.EXCLUDED_IDS]
    assert sorted(everything) == list(range(49))


def test_explicit_training_ids_are_no_longer_tested_on():
    split = choose(20, *hold_out(20), num_views=3, train_ids=(8, 2))
    assert split.train == (8, 2)
    assert split.test == (0, 16)


def test_explicit_test_ids_leave_the_training_pool():
    split = choose(20, *hold_out(20), test_ids=(1, 19))
    assert split.test == (1, 19)
    assert 1 not in split.train
    assert 19 not in split.train
    assert len(split.train) == 15  # of the 17 in the pool


def test_where_nothing_is_left_to_test_on_the_split_says_so():
    split = choose(3, *hold_out(3), train_ids=(0, 1, 2))
    assert split.test == (0, 1, 2)
    assert split.test_is_train
    assert "training images" in str(split_table(split, ["a", "b", "c"], "t").caption)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"num_views": 18}, "at most 17"),
        ({"num_views": 0}, "at least 1"),
        ({"train_ids": (1, 2), "test_ids": (2, 3)}, r"\[2\]"),
        ({"train_ids": (1, 20)}, "ids 0 to 19"),
        ({"test_ids": (-1,)}, r"\[-1\]"),
        ({"train_ids": (4, 4)}, "more than once"),
        ({"train_ids": ()}, "empty"),
    ],
)
def test_impossible_choices_are_refused_with_what_is_possible(flags, words):
    with pytest.raises(InputError, match=words):
        choose(20, *hold_out(20), **flags)


@pytest.mark.parametrize(
    ("count", "flags", "train", "test"),
    [
        (3, {}, (0, 1, 2), (0, 1, 2)),  # nothing is left to test on
        (3, {"num_views": 3}, (0, 1, 2), (0, 1, 2)),
        (9, {"num_views": 3}, (0, 4, 8), (1, 2, 3, 5, 6, 7)),
        (5, {"test_ids": (2,)}, (0, 1, 3, 4), (2,)),
        (10, {}, (1, 2, 3, 4, 5, 6, 7, 9), (0, 8)),
        (10, {"test_ids": (4, 5)}, (0, 1, 2, 3, 6, 7, 8, 9), (4, 5)),
        (10, {"test_ids": (4, 5), "num_views": 3}, (0, 6, 9), (4, 5)),
    ],
)
def test_a_capture_without_lists_trains_on_all_images_that_nobody_holds_out(count, flags, train, test):
    split = choose(count, *without_lists(count, "test_ids" in flags), **flags)
    assert (split.train, split.test, split.test_is_train) == (train, test, train == test)


def test_one_image_alone_cannot_be_trained_on():
    with pytest.raises(InputError, match="held out"):
        choose(1, *hold_out(1))


@pytest.mark.parametrize(
    ("count", "test_ids", "why"), [(1, None, "testing. Add"), (3, (0, 1, 2), "by --test-ids. Add")]
)
def test_a_capture_without_a_training_image_is_refused_with_the_reason(count, test_ids, why):
    train, test = (tuple(range(count)), ()) if test_ids else hold_out(count)
    with pytest.raises(InputError, match=why):
        choose(count, train, test, test_ids=test_ids)


def test_square_brackets_in_names_are_shown_as_they_are():
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(split_table(Split(train=(0,), test=(1,)), ["a[red].png", "[/b].png"], "my [holiday]"))
    shown = console.export_text()
    assert all(name in shown for name in ("a[red].png", "[/b].png", "my [holiday]"))

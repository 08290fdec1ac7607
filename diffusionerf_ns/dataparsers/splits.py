"""Which images train and which are held out: pure functions, and the table that shows the choice.

An id is the 0-based index of an image among all images of the capture, sorted by name.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ddm_training.errors import InputError

HOLD_OUT_EVERY = 8
"""Every 8th image is a test image: the protocol of NeRF, RegNeRF and all who followed on LLFF."""

SMALL_CAPTURE = 9
"""Images up to which somebody's own capture is taken for few views already: none is held out beforehand."""

NumViews = int | Literal["all"]


@dataclass(frozen=True, kw_only=True)
class Split:
    """Ids of the training and of the test images, in the order in which they are used."""

    train: tuple[int, ...]
    test: tuple[int, ...]
    test_is_train: bool = False
    """No image was left to hold out, so `test` repeats `train`: metrics then say nothing about new views."""


def hold_out(count: int, every: int = HOLD_OUT_EVERY) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids ``(pool, test)`` of ``count`` images: id % every == 0 is held out, the rest is the training pool."""
    test = tuple(range(0, count, every))
    return tuple(i for i in range(count) if i % every), test


def without_lists(count: int, test_named: bool = False) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids ``(pool, test)`` of somebody's own capture that has no lists of training and test images.

    Of at most 9 images all may train, and those that ``--num-views`` leaves over are tested on; else `hold_out`.
    Where ``--test-ids`` names the test images, all others may train: nobody asked for more to be held out.
    """
    everything = tuple(range(count))
    return (everything, everything) if count <= SMALL_CAPTURE or test_named else hold_out(count)


def spread(pool: Sequence[int], views: int) -> tuple[int, ...]:
    """``views`` ids of ``pool``, evenly: positions linspace(0, n - 1, views), rounded half to even (RegNeRF)."""
    return tuple(pool[int(i)] for i in np.round(np.linspace(0, len(pool) - 1, views)))


def take(pool: Sequence[int], num_views: NumViews, how: Literal["spread", "first"] = "spread") -> tuple[int, ...]:
    """The training ids that ``num_views`` asks for.

    Raises:
        InputError: fewer than one view, or more than the pool holds.
    """
    if num_views == "all":
        return tuple(pool)
    if num_views < 1:
        raise InputError(f"--num-views {num_views}: expected a number of at least 1, or 'all'.")
    if num_views > len(pool):
        raise InputError(
            f"--num-views {num_views}: the capture has {len(pool)} images to train on {_brief(pool)}, its test images "
            f"left out. Ask for at most {len(pool)}, or name the images yourself with --train-ids "
            "(test images named there are no longer held out)."
        )
    return spread(pool, num_views) if how == "spread" else tuple(pool[:num_views])


def choose(
    count: int,
    pool: Sequence[int],
    test: Sequence[int],
    *,
    num_views: NumViews = "all",
    train_ids: Sequence[int] | None = None,
    test_ids: Sequence[int] | None = None,
    how: Literal["spread", "first"] = "spread",
) -> Split:
    """Training and test ids. Explicit ids win over the capture's own ``pool`` and ``test``.

    An image that is trained on leaves the default test images, one named in ``test_ids`` leaves the training pool.
    Where nothing is left to test on, the training images are tested on, and `Split.test_is_train` says so.

    Raises:
        InputError: ids that do not exist, are repeated, or are in both lists; too many views.
    """
    for flag, ids in (("--train-ids", train_ids), ("--test-ids", test_ids)):
        if ids is not None:
            _check_ids(flag, ids, count)
    if train_ids is not None and test_ids is not None and (both := sorted(set(train_ids) & set(test_ids))):
        raise InputError(f"ids {both} are in --train-ids and in --test-ids: an image is trained on or tested on.")

    if train_ids is not None:
        train = tuple(train_ids)
    else:
        held = set(test_ids or ())
        train = take([i for i in pool if i not in held], num_views, how)
    if not train:
        raise InputError(
            f"no training image is left of {count}: all are held out for testing"
            f"{' by --test-ids' if test_ids else ''}. Add images, or name the training images with --train-ids."
        )
    chosen = tuple(test_ids) if test_ids is not None else tuple(i for i in test if i not in set(train))
    return Split(train=train, test=chosen or train, test_is_train=not chosen)


def _check_ids(flag: str, ids: Sequence[int], count: int) -> None:
    if not ids:
        raise InputError(f"{flag} is empty: name at least one image, or leave the flag out.")
    if unknown := [i for i in ids if not 0 <= i < count]:
        raise InputError(f"{flag}: ids {unknown} do not exist; the capture has {count} images, ids 0 to {count - 1}.")
    if len(set(ids)) < len(ids):
        raise InputError(f"{flag}: ids {sorted({i for i in ids if list(ids).count(i) > 1})} are named more than once.")


def _brief(ids: Sequence[int], most: int = 12) -> str:
    """Ids for a message, cut in the middle where there are many."""
    words = [str(i) for i in ids]
    if len(words) > most:
        words = [*words[: most - 2], "...", words[-1]]
    return f"(ids {' '.join(words)})"


def split_table(split: Split, names: Sequence[str], title: str):
    """A `rich.table.Table` with a row for train and one for test: number of images, ids, names."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left", show_lines=False)
    for head in ("split", "images", "ids", "names"):
        table.add_column(head, overflow="fold")
    for row, ids in (("train", split.train), ("test", split.test)):
        shown = [names[i] for i in ids]
        if len(shown) > 9:
            shown = [*shown[:8], "...", shown[-1]]
        table.add_row(row, str(len(ids)), " ".join(map(str, ids)), escape(" ".join(shown)))
    if split.test_is_train:
        table.caption = "no image is held out: test metrics are those of the training images"
    return table

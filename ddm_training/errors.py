"""The one exception for mistakes in what a user gives: files, folders, flags; limits of flags; how a command ends."""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Bad input. The message says what was found, what was expected and what to do; command lines show only it."""


def require_at_least(config: object, **least: int | float) -> None:
    """Refuse settings that are too small; None, which leaves a setting to its default, is not.

    Args:
        config: whose fields they are.
        least: the least value of each, by the field's name.

    Raises:
        InputError: names the flag.
    """
    for name, low in least.items():
        value = getattr(config, name)
        if value is not None and not value >= low:
            raise InputError(f"--{name.replace('_', '-')} must be at least {low}, found {value}.")


def require_some(config: object, *names: str) -> None:
    """Refuse lists of folders that are empty.

    Args:
        config: whose fields they are.
        names: of the fields.

    Raises:
        InputError: names the flag.
    """
    for name in names:
        if not getattr(config, name):
            raise InputError(f"--{name.replace('_', '-')} needs at least one folder.")


def require_positive(config: object, *names: str, below: str = "") -> None:
    """Refuse settings that are not positive and finite; None, which leaves a setting to its default, is not.

    Args:
        config: whose fields they are.
        names: of the fields.
        below: what the flags begin with, e.g. "pipeline.model.".

    Raises:
        InputError: names the flag.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise InputError(f"--{below}{name.replace('_', '-')} must be positive and finite, found {value}.")


@contextmanager
def ends_plainly(*, at_ctrl_c: str | None = None) -> Iterator[None]:
    """Let a command end without a traceback: at an `InputError` with its message and status 2, at Ctrl-C with 130.

    The exit status at Ctrl-C is that of shells.

    Args:
        at_ctrl_c: what to say then.
    """
    try:
        yield
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        if at_ctrl_c is not None:
            print(at_ctrl_c, file=sys.stderr)
        raise SystemExit(130) from None

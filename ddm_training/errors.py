"""The one exception for mistakes in what a user gives: files, folders, flags; and how a command ends with it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Bad input. The message says what was found, what was expected and what to do; command lines show only it."""


@contextmanager
def ends_plainly() -> Iterator[None]:
    """Let a command end without a traceback: at an `InputError` with its message and status 2, at Ctrl-C with 130.

    The exit status at Ctrl-C is that of shells.
    """
    try:
        yield
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None

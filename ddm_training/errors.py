"""The one exception for mistakes in what a user gives: files, folders, flags; and how a command ends with it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Bad input. The message says what was found, what was expected and what to do; command lines show only it."""


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

"""How a nerfstudio command shows mistakes of the user, `ddm_training.errors.InputError`."""

import sys
from types import TracebackType

from ddm_training.errors import InputError


def show_input_errors_plainly() -> None:
    """Let an uncaught `InputError` end the process with its message alone, without a traceback.

    nerfstudio's commands do not catch exceptions, so this sets `sys.excepthook`; everything that is not an
    `InputError` goes to the hook that was there before. It is called when one of our components is built, not on
    import: a user of another method never meets it. Calling it again does nothing.
    """
    previous = sys.excepthook
    if getattr(previous, "shows_input_errors", False):
        return

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if isinstance(error, InputError):
            sys.stdout.flush()
            print(f"\nError: {error}", file=sys.stderr)
        else:
            previous(kind, error, traceback)

    hook.shows_input_errors = True  # pyright: ignore[reportFunctionMemberAccess]
    sys.excepthook = hook

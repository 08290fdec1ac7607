"""Mistakes of the user: the exception, and how a nerfstudio command shows it."""

import sys
from collections.abc import Mapping
from types import TracebackType

import torch
from torch import Tensor

from ddm_training.errors import InputError

__all__ = ["InputError", "NonFiniteLossError", "check_finite", "show_input_errors_plainly"]


class NonFiniteLossError(InputError):
    """A loss term became NaN or infinite; names the step and the term."""


def check_finite(losses: Mapping[str, Tensor], step: int) -> None:
    """Raise `NonFiniteLossError` where a term is NaN or infinite; one synchronisation with the device for all terms."""
    if not bool(torch.stack([v.detach().reshape(()) for v in losses.values()]).isfinite().all()):
        bad = {name: float(v.detach()) for name, v in losses.items() if not bool(v.isfinite())}
        raise NonFiniteLossError(
            f"training stopped at step {step}: {', '.join(f'{k} is {v}' for k, v in bad.items())}. The last checkpoint "
            "is untouched. Lower the learning rate or that term's weight, then resume with --load-dir."
        )


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

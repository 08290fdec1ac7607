"""The command `ddm`: one subcommand per config class; each module is imported only when its command is asked for."""

import importlib
import sys
from typing import Any

from ddm_training.errors import InputError

# Subcommand -> module and config class (a frozen dataclass with a method `main`).
COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("ddm_training.train", "TrainConfig"),
    "sample": ("ddm_training.sample", "SampleConfig"),
    "eval": ("ddm_training.evaluate", "EvalConfig"),
    "convert": ("ddm_training.convert", "ConvertConfig"),
}


def _load(name: str) -> type:
    module, attribute = COMMANDS[name]
    return getattr(importlib.import_module(module), attribute)


def main(args: list[str] | None = None) -> None:
    """Entry point. Mistakes in what the user gives end with a message and exit status 2, without a traceback."""
    import tyro

    args = sys.argv[1:] if args is None else args
    try:
        # A known first word needs only its own module; anything else (--help, a typo) shows them all.
        names = [args[0]] if args and args[0] in COMMANDS else list(COMMANDS)
        config: Any = tyro.extras.subcommand_cli_from_dict({n: _load(n) for n in COMMANDS if n in names}, args=args)
        config.main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()

"""The command `ddm`: one subcommand per config class; each module is imported only when its command is asked for."""

import importlib
import sys
from dataclasses import make_dataclass
from typing import Any

from ddm_training.errors import ends_plainly

# Subcommand -> module and config class (a frozen dataclass with a method `main`). Two words: a command within a group.
COMMANDS: dict[str, tuple[str, str]] = {
    "hypersim download": ("ddm_training.download", "HypersimDownloadConfig"),
    "hypersim prepare": ("ddm_training.prepare", "HypersimPrepareConfig"),
    "frames": ("ddm_training.prepare", "FramesConfig"),
    "rooms": ("ddm_training.rooms", "RoomsConfig"),
    "train": ("ddm_training.train", "TrainConfig"),
    "train-completion": ("ddm_training.train_completion", "TrainCompletionConfig"),
    "sample": ("ddm_training.sample", "SampleConfig"),
    "eval": ("ddm_training.evaluate", "EvalConfig"),
    "convert": ("ddm_training.convert", "ConvertConfig"),
}


def _load(name: str) -> type:
    module, attribute = COMMANDS[name]
    return getattr(importlib.import_module(module), attribute)


def _group(name: str) -> type:
    """Stands for a group of commands on the page of `ddm --help`."""
    group = make_dataclass(name, [])
    group.__doc__ = f"See `ddm {name} --help`: {', '.join(c.split()[1] for c in COMMANDS if c.startswith(name + ' '))}."
    return group


def parse(args: list[str]) -> Any:
    """The config that a command line describes; usage errors and --help end the program, as argparse does."""
    import tyro

    group = args[0] if args and any(name.startswith(args[0] + " ") for name in COMMANDS) else None
    prefix, rest = (f"{group} ", args[1:]) if group else ("", args)
    names = [name for name in COMMANDS if name.startswith(prefix)]
    if rest and prefix + rest[0] in COMMANDS:  # a known command needs only its own module
        names = [prefix + rest[0]]
    kinds: dict[str, Any] = {}
    for name in names:
        word, _, inner = name.removeprefix(prefix).partition(" ")
        kinds[word] = _group(word) if inner else _load(name)
    return tyro.extras.subcommand_cli_from_dict(kinds, args=rest, prog=f"ddm {prefix}".strip())


def main(args: list[str] | None = None) -> None:
    """Entry point. Mistakes in what the user gives end with a message and exit status 2, without a traceback."""
    with ends_plainly():
        parse(sys.argv[1:] if args is None else args).main()


if __name__ == "__main__":
    main()

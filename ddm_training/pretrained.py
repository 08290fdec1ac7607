"""Trained weights that a training begins with (fine-tuning): `--pretrained`.

They are read once. What the model card has to tell of them is kept in the output folder, so that a training goes on
without them, and tells the truth.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ddm_training.checkpoints import list_checkpoints
from ddm_training.errors import InputError
from ddm_training.files import write_whole
from ddm_training.frames import Scene
from ddm_training.loop_config import LoopConfig

ORIGIN_FILE = "origin.json"
_SAME = (
    "block_out_channels", "layers_per_block", "down_block_types", "up_block_types", "norm_num_groups",
    "attention_head_dim",
)  # fmt: skip


@dataclass(frozen=True)
class Origin:
    """The trained weights that a training began with."""

    trained_on: tuple[str, ...]
    """Names of their training data."""
    steps: int
    license: str

    def __str__(self) -> str:
        of = f"{', '.join(self.trained_on) or 'unknown data'}, {self.steps:,} steps, licence {self.license}"
        return f", begun with weights of an earlier training ({of})"


def find_origin(config: LoopConfig, read: Callable[[Path], Any]) -> Origin | None:
    """What a training begins with, or began with if it goes on; None: random weights.

    Args:
        config: of the training.
        read: gives the spec of the folder of ``--pretrained``, with "trained_on", "steps" and "license".

    Raises:
        InputError: of ``read``, or what was kept of it is damaged.
    """
    if config.pretrained is None:
        return None
    path = config.output_dir / ORIGIN_FILE
    if goes_on(config) and path.is_file():
        try:
            content = json.loads(path.read_text())
            return Origin(tuple(content["trained_on"]), content["steps"], content["license"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} cannot be read ({error}): delete it, then --pretrained is read again.") from error
    spec = read(config.pretrained)
    return Origin(tuple(spec.trained_on), spec.steps, spec.license)


def keep_origin(config: LoopConfig, origin: Origin | None) -> None:
    """Write what a training begins with into its output folder, which must be there.

    Raises:
        OSError: it cannot be written.
    """
    if origin is not None:
        write_whole(config.output_dir / ORIGIN_FILE, json.dumps(asdict(origin), indent=2) + "\n")


def data_names(scenes: Iterable[Scene], origin: Origin | None) -> tuple[str, ...]:
    """Names of all data that the weights have seen: of these scenes, and of what they began with."""
    return tuple(sorted({scene.info.source for scene in scenes}.union(origin.trained_on if origin else ())))


def goes_on(config: LoopConfig) -> bool:
    """Whether the training has a checkpoint already, which has its weights."""
    return bool(list_checkpoints(config.output_dir))


def begin_with(network: Any, trained: Any, folder: Path, flags: str) -> nn.Module:
    """The network, with the weights of a trained one.

    Args:
        network: diffusers', of what ``flags`` ask for.
        trained: what ``folder`` holds.
        folder: of ``--pretrained``, for messages.
        flags: that decide the network, for messages.

    Raises:
        InputError: the networks are not the same.
    """
    config = getattr(trained, "config", {})
    different = [name for name in _SAME if _plain(config.get(name)) != _plain(network.config[name])]
    if different:
        found = ", ".join(f"{name} {config.get(name)}" for name in different)
        raise InputError(
            f"--pretrained {folder} holds another network than {flags} asks for ({found}): give that flag as it was "
            "trained. Only networks that this command has trained can be begun with."
        )
    network.load_state_dict(trained.state_dict())
    return network


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value

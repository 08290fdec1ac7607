"""What the training loop asks of whatever it trains: a `Task`, and its `Validation`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ddm_training.pretrained import Origin


@runtime_checkable
class Validation(Protocol):
    """What is measured, and exported, of the averaged weights."""

    @property
    def folder(self) -> Path:
        """Where it exports to."""
        ...

    def run(self, average: Any, step: int) -> dict[str, Any]:
        """Export; "val_loss", "val" (name -> measure -> value) and perhaps a picture "sheet"."""
        ...


@runtime_checkable
class Task(Protocol):
    """What is trained."""

    command: str
    """What `ddm` calls the training."""
    identity: Mapping[str, Any]
    """Settings without which saved weights mean nothing, see `checkpoints.load_checkpoint`."""
    frames: int
    """Frames of the training data."""
    unit: str
    """What a sample is called, in the plural."""
    origin: Origin | None
    """Trained weights that it begins, or began, with."""

    def make_network(self) -> nn.Module:
        """Freshly initialised, or with the trained weights to begin with; called with the seed set."""
        ...

    def wrap(self, network: Any) -> nn.Module:
        """The network as `loss` calls it, with its precision."""
        ...

    def draw(self, *, step: int, first: int, count: int) -> dict[str, Tensor]:
        """Training samples ``first`` ... ``first + count - 1`` of a step: a pure function of these and the seed.

        Called in the loader's processes.
        """
        ...

    def prepare(self, batch: dict[str, Tensor], *, step: int, first: int) -> dict[str, Tensor]:
        """What of the drawing is better done for a whole batch on the device of the model, as pure as `draw`."""
        ...

    def loss(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """Of one batch, on the device of the model."""
        ...

    def validation(self, device: torch.device, world: int) -> Validation:
        """Made once, by the process that validates."""
        ...

    def finish(self, validation: Any) -> None:
        """After the last step, in the process that validates."""
        ...

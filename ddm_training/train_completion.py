"""`ddm train-completion`: training of the network that completes depth, on the frame stores of the denoiser.

Errors are of log depth, that is relative ones, on held-out frames with made-up matches.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ddm_training import completion
from ddm_training.completion import FOLDER, CompletionSpec, DepthCompleter, completion_loss
from ddm_training.errors import InputError, require_at_least
from ddm_training.loop import run_loop
from ddm_training.loop_config import LoopConfig
from ddm_training.patches import Stream, with_weight
from ddm_training.pretrained import Origin, begin_with, data_names, find_origin, goes_on

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d import UNet2DModel


BATCH = 32  # of validation


@dataclass(frozen=True, kw_only=True)
class TrainCompletionConfig(LoopConfig):
    """Train the network that completes the depth that stereo knows. Run the same command again to go on.

    Move the folder `completion` that it writes into a prior folder: priors with one complete depth by it.
    """

    size: tuple[int, int] = (64, 48)
    """Width and height in pixels of what the network sees of an image, multiples of 8."""
    widths: tuple[int, int, int] = completion.WIDTHS
    """Channels of the network's levels, from fine to coarse: multiples of 8, the last one of 32."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    ema_decay: float = 0.998
    """Decay per step of the weights' moving average, reached by (1 + n) / (10 + n)."""
    spread_weight: float = 0.025
    """Weight of the likelihood that teaches how far off the depth may be."""
    validation_samples: int = 256
    """Held-out samples, the same every time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, validation_samples=1)
        self.require_amounts("spread_weight")
        if any(side < completion.MULTIPLE or side % completion.MULTIPLE for side in self.size):
            raise InputError(f"--size must be positive multiples of {completion.MULTIPLE}, found {self.size}.")
        completion.check_widths(self.widths)

    def main(self) -> None:
        """Train."""
        run_loop(self, CompletionTask)


class CompletionTask:
    """The completing network, as `run_loop` trains it."""

    command = "train-completion"
    identity: Mapping[str, Any] = {"widths": None}
    unit = "images"

    def __init__(self, config: TrainCompletionConfig) -> None:
        from ddm_training.completion_data import CompletionSampler
        from ddm_training.frames import open_store

        self.config = config
        roots, weights = with_weight(config.data, config.data_weights)
        self.sampler = CompletionSampler([open_store(root, "train") for root in roots], config.size, weights=weights)
        self.frames = len(self.sampler)
        self.origin = find_origin(config, lambda folder: _load(folder).spec)
        self.spec = CompletionSpec(
            size=config.size,
            trained_on=data_names(self.sampler.scenes, self.origin),
            license=config.license,
        )
        self._unmatched = torch.zeros(())  # samples so far, on their device, that had next to no matches
        self._samples = 0

    def make_network(self) -> nn.Module:
        """Of the widths asked for, with the weights to begin with, if there are any.

        Raises:
            InputError: those cannot be read, or do not fit.
        """
        network, folder = completion.make_network(self.config.widths), self.config.pretrained
        if folder is None or goes_on(self.config):
            return network
        widths = " ".join(map(str, self.config.widths))
        return begin_with(network, _load(folder).unet, folder, f"--widths {widths}")

    def wrap(self, network: Any) -> nn.Module:
        """As (rgb, known, base) -> depth and its spread."""
        return DepthCompleter(network, self.spec, bf16=self.config.mixed_precision == "bf16")

    def draw(self, *, step: int, first: int, count: int) -> dict[str, Tensor]:
        """Parts of frames."""
        seed = self.config.seed
        return self.sampler.batch(seed=seed, stream=Stream.TRAIN, step=step, first=first, count=count)

    def prepare(self, batch: dict[str, Tensor], *, step: int, first: int) -> dict[str, Tensor]:
        """Samples with made-up matches."""
        from ddm_training.completion_data import batch_generator, make_samples

        device = batch["color"].device
        g = batch_generator(device, seed=self.config.seed, stream=Stream.TRAIN, step=step, first=first)
        samples = make_samples(g, batch, augment=True)
        self._unmatched = self._unmatched.to(device) + (~samples["enough"]).sum()
        self._samples += len(samples["enough"])
        return samples

    def unmatched(self) -> float:
        """Share of this process's samples so far that had no weight, as they had next to no matches.

        Raises:
            InputError: all of them.
        """
        share = float(self._unmatched) / max(self._samples, 1)
        if share == 1.0:
            raise InputError(
                f"all of {self._samples} samples have next to no texture or valid depth: check the frame stores."
            )
        return share

    def loss(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """Of the completed depth and its spread."""
        log_z, log_b = model(batch["rgb"], batch["known"], batch["base"])
        return completion_loss(log_z, log_b, batch["z"], batch["valid"], spread_weight=self.config.spread_weight)

    def validation(self, device: torch.device, world: int) -> "CompletionValidation":
        """Errors on held-out frames, and the exported network."""
        return CompletionValidation(self.config, self.spec, self.origin, device=device, unmatched=self.unmatched)

    def finish(self, validation: Any) -> None:
        """Nothing is left to do."""


def _load(folder: Path) -> DepthCompleter:
    """The network of a completion folder, or of that in a prior folder."""
    inner = folder / FOLDER
    return completion.load_completer(inner if inner.is_dir() else folder)


class CompletionValidation:
    """Held-out samples of each store, prepared once.

    Args:
        config: of the training.
        spec: what the network is trained on.
        origin: what it began with.
        device: of the network.
        unmatched: gives the share of training samples that had no weight, for the log.

    Raises:
        InputError: a store whose held-out samples have no depth to complete.
    """

    def __init__(
        self,
        config: TrainCompletionConfig,
        spec: CompletionSpec,
        origin: Origin | None = None,
        *,
        device: torch.device,
        unmatched: Callable[[], float],
    ) -> None:
        self.config, self.spec, self.origin, self.unmatched = config, spec, origin, unmatched
        self.stores: dict[str, dict[str, Tensor]] = {}
        for root, batch in self._held_out(device):
            if not bool((batch["valid"] & (batch["known"] == 0)).any()):
                raise InputError(
                    f"held-out frames of {root} have no depth to complete: all that is valid is matched, or next to "
                    "nothing is."
                )
            name = root.name if root.name not in ("", *self.stores) else str(root)
            self.stores[name] = batch

    def _held_out(self, device: torch.device) -> Iterator[tuple[Path, dict[str, Tensor]]]:
        from ddm_training.completion_data import CompletionSampler, batch_generator, make_samples
        from ddm_training.validation import held_out_stores

        found = held_out_stores(self.config.data)
        for root, scenes in found:
            sampler: CompletionSampler = CompletionSampler([scenes], self.config.size, augment=False)
            count = max(self.config.validation_samples // len(found), 1)
            parts = []
            for first in range(0, count, BATCH):  # on the CPU: the same samples on every device
                place = {"seed": self.config.seed, "stream": Stream.VALIDATION, "step": 0, "first": first}
                cut = sampler.batch(**place, count=min(BATCH, count - first))
                parts.append(make_samples(batch_generator(torch.device("cpu"), **place), cut, augment=False))
            yield root, {name: torch.cat([part[name] for part in parts]).to(device) for name in parts[0]}

    @property
    def folder(self) -> Path:
        """The exported network."""
        return self.config.output_dir / FOLDER

    @torch.no_grad()
    def run(self, average: "UNet2DModel", step: int) -> dict[str, Any]:
        """Mean |log error| where depth was not known, of the network ("depth") and of the membrane ("membrane")."""
        model = DepthCompleter(average, self.spec, bf16=self.config.mixed_precision == "bf16").eval()
        rows: dict[str, dict[str, float]] = {}
        for name, data in self.stores.items():
            unknown = data["valid"] & (data["known"] == 0)
            parts = [
                model(data["rgb"][i], data["known"][i], data["base"][i])
                for i in torch.arange(len(unknown)).split(BATCH)
            ]
            log_z, log_b = (torch.cat(column) for column in zip(*parts))
            truth = data["z"].clamp_min(1e-12).log()
            error = (log_z - truth).abs()[unknown]
            rows[name] = {
                "depth": float(error.mean()),
                "membrane": float((data["base"].log() - truth).abs()[unknown].mean()),
                "expected": float(log_b.exp()[unknown].mean()),
            }
        loss = sum(row["depth"] for row in rows.values()) / len(rows)
        measured = {"val_loss": loss, "val": rows, "unmatched": round(self.unmatched(), 4)}
        self._export(average, step, measured)
        return measured

    def _export(self, average: "UNet2DModel", step: int, measured: dict[str, Any]) -> None:
        from ddm_training.export import parameter_count, replace_folder

        spec = replace(self.spec, steps=step)
        network = nn.Module.to(
            copy.deepcopy(average), torch.float16 if self.config.export_dtype == "fp16" else torch.float32
        )
        card = model_card(spec, self.config, self.origin, parameters=parameter_count(average), measured=measured)

        def write(folder: Path) -> None:
            completion.save_completer(folder, network, spec)  # pyright: ignore[reportArgumentType]
            (folder / "README.md").write_text(card)

        replace_folder(self.folder, write)


def model_card(
    spec: CompletionSpec,
    config: TrainCompletionConfig,
    origin: Origin | None = None,
    *,
    parameters: int,
    measured: dict[str, Any],
) -> str:
    """The README.md of a completion folder; all figures come from the arguments."""
    from ddm_training.export import card_license

    widths = " / ".join(map(str, config.widths))
    rows = "\n".join(
        f"| {name} | {row['membrane']:.4f} | {row['depth']:.4f} | {row['expected']:.4f} |"
        for name, row in measured["val"].items()
    )
    return f"""---
{card_license(spec.license)}
library_name: diffusers
tags: [depth-completion, rgbd, nerf]
---
# Depth completion network of a prior

Completes what stereo knows of an image's depth, made with `ddm train-completion`.

| | |
|---|---|
| network | diffusers `UNet2DModel`, {widths} channels, {parameters:,} parameters, EMA weights |
| sees | images of {spec.size[0]} x {spec.size[1]} pixels: colours, known depth, and its membrane interpolation |
| gives | a correction of the membrane's log depth, and the log of the error to expect |
| trained on | {", ".join(spec.trained_on)}, with made-up matches |
| training | {spec.steps:,} steps of {config.train_batch_size} images per process{origin or ""} |
| licence of the weights | {spec.license} |

Mean |log error| where no depth is given, on held-out frames with made-up matches:

| store | membrane | network | network's own expectation |
|---|---|---|---|
{rows}

`curves.png` shows the losses over the training.
"""

"""What `gpu_check` compares: a step's losses and gradients, tensors of two devices, times."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any


def losses_and_gradients(
    model: Any, bundle: Any, batch: dict[str, Any], scale: float = 1.0
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weighted loss terms, and the gradient of their sum with respect to each parameter, on the CPU.

    Args:
        model: of a pipeline.
        bundle: rays of a step.
        batch: what belongs to them.
        scale: of the loss on its way back; the gradients are divided by it.
    """
    import torch

    model.train()
    model.zero_grad(set_to_none=True)
    outputs = model(dataclasses.replace(bundle))
    metrics = model.get_metrics_dict(outputs, batch)
    losses = model.get_loss_dict(outputs, batch, metrics)
    (scale * torch.stack(list(losses.values())).sum()).backward()
    gradients = {n: p.grad.detach().cpu() / scale for n, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach().cpu() for name, value in losses.items()}, gradients


def to_device(value: Any, device: str) -> Any:
    """The same data with every tensor in it on ``device``."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: to_device(v, device) for name, v in value.items()}
    if isinstance(value, list):
        return [to_device(v, device) for v in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value)]
        return dataclasses.replace(value, **{name: to_device(getattr(value, name), device) for name in names})
    return value


def relative_error(expected: Any, found: Any, floor: float = 0.0) -> float:
    """|found - expected| / max(|expected|, floor), Euclidean norms in float64; infinite where one is not finite."""
    expected, found = expected.double().cpu(), found.double().cpu()
    difference, size = float((found - expected).norm()), max(float(expected.norm()), floor)
    error = difference / size if size > 0 else difference
    return error if math.isfinite(error) else math.inf


def compare(expected: dict[str, Any], found: dict[str, Any], floor: float = 0.0) -> dict[str, float]:
    """`relative_error` of each entry; infinite for one that only one side has."""
    return {
        name: relative_error(expected[name], found[name], floor) if name in expected and name in found else float("inf")
        for name in {**expected, **found}
    }


def synchronise(device: str) -> None:
    """Wait until the device has done what it was given."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()


def timed(call: Callable[[], Any], device: str, count: int) -> float:
    """Mean seconds of a call, after a few that are not counted."""
    for _ in range(3):
        call()
    synchronise(device)
    start = time.perf_counter()
    for _ in range(count):
        call()
    synchronise(device)
    return (time.perf_counter() - start) / count

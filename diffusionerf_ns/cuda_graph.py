"""A frozen network as a CUDA graph: one launch in place of hundreds.

A denoiser of a few million parameters and one 48 x 48 patch keep a GPU busy for a fraction of the time that launching
the kernels one by one takes.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CALLS_BEFORE_CAPTURE = 3  # of one shape: what is asked for again and again is worth a graph
MAX_GRAPHS = 4  # shapes that have one; each keeps the network's activations
MAX_VALUES = 1 << 17  # of an input: with more the kernels take the time, not their launches


class Graphed:
    """``call`` on CUDA tensors, replayed from a graph once the same shapes were asked for `CALLS_BEFORE_CAPTURE` times.

    For one thread: a graph has one place for its inputs and one for its result. ``call`` must be a pure function of its
    arguments: without gradient, random numbers, or a look at values from the host. Where it cannot be captured, which
    is said once, and for tensors that are not on CUDA, it is called plainly.

    Args:
        call: (tensors) -> tensor.
        name: for the message.
    """

    def __init__(self, call: Callable[..., Tensor], name: str = "the network") -> None:
        self.call, self.name = call, name
        self._works = True
        # Of the last capture, for good: what a failed one had taken of the memory must not be given to others.
        self._attempt: Any = None
        self.clear()

    def clear(self) -> None:
        """Forget all graphs; needed when the network's weights have moved or changed their type."""
        self._calls: dict[tuple, int] = {}
        self._graphs: dict[tuple, tuple[Any, tuple[Tensor, ...], Tensor]] = {}

    def __len__(self) -> int:
        """Number of graphs."""
        return len(self._graphs)

    def __call__(self, *tensors: Tensor) -> Tensor:
        """What ``call`` gives, in memory of its own."""
        if not (self._works and all(x.is_cuda and x.numel() <= MAX_VALUES for x in tensors)):
            return self.call(*tensors)
        key = tuple((x.shape, x.dtype, x.device) for x in tensors)
        if key not in self._graphs:
            self._calls[key] = self._calls.get(key, 0) + 1
            if self._calls[key] <= CALLS_BEFORE_CAPTURE or len(self._graphs) >= MAX_GRAPHS:
                return self.call(*tensors)
            try:
                self._graphs[key] = self._capture(tensors)
            except RuntimeError as error:  # a network that copies to the host, say, or no memory left
                self._works = False
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                warnings.warn(f"{self.name} cannot be recorded as a CUDA graph ({reason}): slower.", stacklevel=2)
                return self.call(*tensors)
        graph, inputs, output = self._graphs[key]
        for own, given in zip(inputs, tensors):
            own.copy_(given)
        graph.replay()
        return output.clone()

    def _capture(self, tensors: tuple[Tensor, ...]) -> tuple[Any, tuple[Tensor, ...], Tensor]:
        inputs = tuple(x.clone() for x in tensors)
        device = inputs[0].device
        side = torch.cuda.Stream(device)  # of the tensors' device, which need not be the current one
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):  # libraries choose their kernels before anything is recorded
            self.call(*inputs)
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        self._attempt = graph
        # What other threads do meanwhile, a viewer's say, is not looked at. A failed capture leaves its thread on the
        # side stream (torch 2.14); the outer block brings it back.
        with (
            torch.cuda.stream(torch.cuda.current_stream(device)),
            torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"),
        ):
            output = self.call(*inputs)
        return graph, inputs, output

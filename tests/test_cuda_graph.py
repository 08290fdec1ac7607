"""A network replayed from a CUDA graph gives what it gives when it is called."""

import pytest
import torch
from torch import nn

from diffusionerf_ns import cuda_graph
from diffusionerf_ns.cuda_graph import CALLS_BEFORE_CAPTURE, Graphed


class Counting(nn.Module):
    """A small network that counts how often Python calls it."""

    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Linear(4, 4), 0

    def forward(self, x, t):
        self.calls += 1
        return self.layer(x) + t[:, None]


def test_on_the_cpu_every_call_is_a_plain_one():
    network = Counting()
    graphed = Graphed(network)
    with torch.no_grad():
        for i in range(CALLS_BEFORE_CAPTURE + 3):
            x, t = torch.randn(2, 4), torch.full((2,), float(i))
            torch.testing.assert_close(graphed(x, t), network.layer(x) + i)
    assert network.calls == CALLS_BEFORE_CAPTURE + 3


@pytest.fixture
def on_cuda(monkeypatch):
    """Tensors that say they are on CUDA, with recording replaced by a counter: what is recorded, and when."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    captured = []

    class Replayed:
        def __init__(self, graphed, tensors):
            self.call, self.inputs, self.output = graphed.call, tuple(x.clone() for x in tensors), None
            self.output = torch.zeros_like(self.call(*self.inputs))

        def replay(self):
            self.output.copy_(self.call(*self.inputs))

    def capture(self, tensors):
        graph = Replayed(self, tensors)
        captured.append(tuple(x.shape for x in tensors))
        return graph, graph.inputs, graph.output

    monkeypatch.setattr(Graphed, "_capture", capture)
    return captured


@torch.no_grad()
def test_a_shape_is_recorded_once_and_then_fed_with_new_values(on_cuda):
    network = Counting()
    graphed, results = Graphed(network), []
    inputs = [(torch.randn(2, 4), torch.full((2,), float(i))) for i in range(CALLS_BEFORE_CAPTURE + 4)]
    for x, t in inputs:
        results.append(graphed(x, t))
    assert len(on_cuda) == 1
    for (x, t), result in zip(inputs, results):  # all of them: a result must not change with a later replay
        torch.testing.assert_close(result, network.layer(x) + t[:, None])


@torch.no_grad()
def test_shapes_seen_now_and_then_and_large_ones_are_not_recorded(on_cuda, monkeypatch):
    graphed = Graphed(Counting())
    for n in range(1, 12):
        graphed(torch.zeros(n, 4), torch.zeros(n))
    assert not on_cuda
    monkeypatch.setattr(cuda_graph, "MAX_VALUES", 7)
    for _ in range(2 * CALLS_BEFORE_CAPTURE):
        graphed(torch.zeros(2, 4), torch.zeros(2))
    assert not on_cuda


@torch.no_grad()
def test_what_cannot_be_recorded_is_called(on_cuda, monkeypatch):
    def refuse(self, tensors):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Graphed, "_capture", refuse)
    network = Counting()
    graphed = Graphed(network)
    for i in range(2 * CALLS_BEFORE_CAPTURE):
        x, t = torch.randn(2, 4), torch.full((2,), float(i))
        torch.testing.assert_close(graphed(x, t), network.layer(x) + i)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@torch.no_grad()
def test_on_cuda_a_replay_equals_a_call():
    network = Counting().cuda()
    graphed = Graphed(network)
    for i in range(CALLS_BEFORE_CAPTURE + 5):
        x, t = torch.randn(2, 4, device="cuda"), torch.full((2,), float(i), device="cuda")
        torch.testing.assert_close(graphed(x, t), network.layer(x) + i)
    assert network.calls < CALLS_BEFORE_CAPTURE + 5

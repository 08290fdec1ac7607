"""A network replayed from a CUDA graph gives what it gives when it is called."""

import pytest
import torch
from torch import nn

from diffusionerf_ns import cuda_graph
from diffusionerf_ns.cuda_graph import CALLS_BEFORE_CAPTURE, Graphed
from diffusionerf_ns.prior import PatchPrior


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
def builtin_prior():
    """The built-in prior in float32."""
    prior = PatchPrior.load("builtin")
    prior.autocast = False
    return prior


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
def test_only_so_many_shapes_are_recorded_until_they_are_forgotten(on_cuda):
    graphed = Graphed(Counting())
    for _ in range(CALLS_BEFORE_CAPTURE + 2):
        for n in range(1, cuda_graph.MAX_GRAPHS + 3):
            graphed(torch.zeros(n, 4), torch.zeros(n))
    assert len(graphed) == len(on_cuda) == cuda_graph.MAX_GRAPHS
    graphed.clear()
    assert len(graphed) == 0


@torch.no_grad()
def test_what_cannot_be_recorded_is_called_and_said_once(on_cuda, monkeypatch):
    tries = []

    def refuse(self, tensors):
        tries.append(tensors)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Graphed, "_capture", refuse)
    network = Counting()
    graphed = Graphed(network, "the prior")
    inputs = [(torch.randn(2, 4), torch.full((2,), float(i))) for i in range(2 * CALLS_BEFORE_CAPTURE)]
    for x, t in inputs[:CALLS_BEFORE_CAPTURE]:
        graphed(x, t)
    with pytest.warns(UserWarning, match=r"the prior cannot be recorded as a CUDA graph \(operation not permitted"):
        graphed(*inputs[0])
    for x, t in inputs:
        torch.testing.assert_close(graphed(x, t), network.layer(x) + t[:, None])
    assert len(tries) == 1


@torch.no_grad()
def test_a_prior_replays_only_where_it_is_asked_to(on_cuda, builtin_prior):
    x, t = torch.randn(1, 4, 16, 16), torch.tensor([99])
    for _ in range(2 * CALLS_BEFORE_CAPTURE):
        expected = builtin_prior.predict_noise(x, t)  # as a viewer asks, from a thread of its own
        builtin_prior.score(x, 0.1)
    assert not on_cuda
    for _ in range(2 * CALLS_BEFORE_CAPTURE):
        replayed = builtin_prior.predict_noise(x, t, replay=True)
    torch.testing.assert_close(replayed, expected)
    assert len(builtin_prior.graph) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@torch.no_grad()
def test_on_cuda_a_replay_equals_a_call():
    network = Counting().cuda()
    graphed = Graphed(network)
    for i in range(CALLS_BEFORE_CAPTURE + 5):
        x, t = torch.randn(2, 4, device="cuda"), torch.full((2,), float(i), device="cuda")
        torch.testing.assert_close(graphed(x, t), network.layer(x) + i)
    assert network.calls < CALLS_BEFORE_CAPTURE + 5

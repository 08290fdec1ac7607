"""Fixtures for all tests: where the real data lies, and a skip with the reason where it does not."""

import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusionerf_ns import pose_search
from diffusionerf_ns.lpips import LpipsNetworks

DATA_ROOT = Path(os.environ.get("DIFFUSIONERF_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """Path of a real data set below the data root, e.g. ``real_data("llff/fern")``; skips where it is absent."""

    def find(name: str) -> Path:
        path = DATA_ROOT / name
        if not path.exists():
            pytest.skip(f"real data {name!r} not found below {DATA_ROOT} (set DIFFUSIONERF_TEST_DATA)")
        return path

    return find


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Networks of tests gain nothing from threads, and waiting for them is slow on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def taken(tmp_path_factory) -> tuple[Path, np.ndarray]:
    """A folder of three photographs that structure from motion can place, and their true poses."""
    import corner

    folder = tmp_path_factory.mktemp("taken") / "photographs"
    return folder, corner.photographs(folder)


@pytest.fixture(scope="session")
def placed(taken, tmp_path_factory) -> tuple[Path, pose_search.Posed]:
    """The capture that was made of them, not to be changed, and what was found."""
    capture = tmp_path_factory.mktemp("placed") / "capture"
    return capture, pose_search.find_poses(taken[0], capture)


@pytest.fixture
def offline(monkeypatch, tmp_path) -> Path:
    """An empty torch hub and no connection; returns the checkpoint folder of the hub."""

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no connection")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def alexnet(offline, real_data) -> LpipsNetworks:
    """Networks for LPIPS that have AlexNet's weights and no others."""
    (offline / "alexnet-owt-7be5be79.pth").symlink_to(real_data("lpips/alexnet-owt-7be5be79.pth"))
    return LpipsNetworks()

"""The GPU check: what it says without CUDA, and that its comparison finds what differs (with the CPU on both sides)."""

import math
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from bench_runs import small_prior, wall_capture
from script_modules import SCRIPTS, load_script


@pytest.fixture(scope="module")
def gpu_check() -> ModuleType:
    """`scripts/gpu_check.py` as a module."""
    return load_script("gpu_check")


def test_without_cuda_it_says_so_and_exits_0() -> None:
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([SCRIPTS / "gpu_check.sh"], env=environment, capture_output=True, text=True, cwd="/")
    assert (done.returncode, done.stdout) == (0, "There is no CUDA device here: nothing to check.\n"), done.stderr


def test_errors_are_relative_and_a_missing_term_is_infinite(gpu_check: ModuleType) -> None:
    expected = {"a": torch.tensor([3.0, 4.0]), "zero": torch.zeros(2), "gone": torch.ones(1)}
    found = {"a": torch.tensor([3.0, 4.5]), "zero": torch.tensor([0.0, 0.25])}
    assert gpu_check.compare(expected, found) == pytest.approx({"a": 0.1, "zero": 0.25, "gone": float("inf")})


def test_small_terms_are_compared_with_the_floor_and_large_ones_with_themselves(gpu_check: ModuleType) -> None:
    expected = {"small": torch.tensor(1e-5), "large": torch.tensor(2.0)}
    found = {"small": torch.tensor(2e-5), "large": torch.tensor(2.5)}
    assert gpu_check.compare(expected, found, 1e-3) == pytest.approx({"small": 1e-2, "large": 0.25})


def test_a_check_that_raises_is_a_failed_line_and_the_others_go_on(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("no kernel image")

    passing = gpu_check.Check(what="fine")
    stand_in = SimpleNamespace(
        prior=lambda: [passing],
        completion=lambda: passing,
        denoiser=lambda: passing,
        one_step=fail,
        half_gradients=lambda _: passing,
        step_times=lambda _: passing,
        training=fail,
    )
    monkeypatch.setattr(gpu_check, "Checks", lambda *_: stand_in)
    lines = gpu_check.run_checks(gpu_check.GpuCheckConfig(), "cpu", tmp_path)
    assert [line.passed for line in lines] == [True, True, True, False, True, True, False, False, True, True, False]
    assert "no kernel image" in lines[3].error
    assert "no kernel image" in (tmp_path / "log.txt").read_text()


@pytest.mark.slow
def test_all_checks_run_with_the_cpu_in_place_of_the_gpu(gpu_check: ModuleType, tmp_path: Path) -> None:
    config = gpu_check.GpuCheckConfig(
        data=wall_capture(tmp_path / "wall"), prior=str(small_prior(tmp_path / "prior")), steps=4, timed_steps=1
    )
    checks = gpu_check.Checks(config, "cpu", tmp_path)
    lines = [
        checks.one_step("diffusionerf-tiny"),
        checks.step_times("diffusionerf-tiny"),
        checks.half_gradients("diffusionerf-tiny"),
        *checks.prior(),
        checks.completion(),
        checks.denoiser(),
    ]
    # Not zero: with several threads the hash grid's gradients are summed in another order each time.
    errors = [float(number) for number in re.findall(r"\d\.\de[+-]\d\d", lines[0].error)]
    assert len(errors) == 2
    assert max(errors) < 1e-4
    assert "8 terms" in lines[0].what  # photometric, chroma, interlevel, frustum, foreground, stereo twice, the prior
    assert all(line.passed for line in lines)


@pytest.mark.parametrize(
    ("expected", "found"), [(1.0, float("nan")), (float("inf"), float("inf")), (0.0, float("inf"))]
)
def test_gradients_that_are_not_finite_pass_no_limit(expected: float, found: float) -> None:
    compare = load_script("gpu_compare")
    both = {"a": torch.ones(2)}, {"a": torch.ones(2)}
    both[0]["b"], both[1]["b"] = torch.tensor([expected]), torch.tensor([found])
    assert compare.compare(*both) == {"a": 0.0, "b": math.inf}
    assert max(compare.compare(*both).values()) == math.inf

"""The pages that are written of a benchmark's results."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
from bench_runs import folder_of_results
from script_modules import load_script

from diffusionerf_ns.bench import table
from diffusionerf_ns.bench.jobs import Job


@pytest.fixture
def pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, which writes into a new folder."""
    script = load_script("write_results")
    monkeypatch.setattr(script, "ROOT", tmp_path)
    (tmp_path / "docs" / "figures").mkdir(parents=True)
    return script


def results_of(folder: Path, *methods: str) -> Path:
    """A scene for each method."""
    jobs = [Job(scene=f"scene-{i}", data="x", views=3, variant="full", method=m) for i, m in enumerate(methods)]
    root = folder_of_results(folder, jobs, lambda _: 20.0)
    table.write_tables(root, root)
    return root


@pytest.mark.parametrize("method", ["diffusionerf", "diffusionerf-tiny"])
def test_the_pages_name_the_method_of_the_results(
    pages: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["write_results.py", str(results_of(tmp_path / "results", method, method))])
    pages.main()
    text = (tmp_path / "docs" / "figures" / "bench.md").read_text()
    assert text.startswith(f"2 scenes, 3 views, 100 steps of `{method}`, or of nerfacto")
    assert text in (tmp_path / "docs" / "results.md").read_text()


def test_results_of_several_methods_are_refused_and_nothing_is_written(
    pages: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = results_of(tmp_path / "results", "diffusionerf-tiny", "diffusionerf")
    monkeypatch.setattr(sys, "argv", ["write_results.py", str(folder)])
    with pytest.raises(SystemExit, match="methods diffusionerf, diffusionerf-tiny; expected those of one method"):
        pages.main()
    assert list((tmp_path / "docs").rglob("*.md")) == []

"""The pages that are written of a benchmark's results."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from bench_runs import folder_of_results
from script_modules import load_script

from ddm_training.errors import InputError
from diffusionerf_ns.bench import table
from diffusionerf_ns.bench.jobs import Job
from diffusionerf_ns.bench.results import RESULT_FILE, read_entries, write_json


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
    return with_tables(folder_of_results(folder, jobs, lambda _: 20.0))


def with_tables(root: Path) -> Path:
    table.write_tables(root, root)
    return root


def change(root: Path, which: Callable[[Job], bool], **entries: Any) -> None:
    """Change the results of some jobs; metrics are added to theirs."""
    for entry in read_entries(root):
        content = entry.result()
        assert content is not None
        if which(entry.job):
            content |= entries | {"metrics": content["metrics"] | entries.get("metrics", {})}
            write_json(entry.folder / RESULT_FILE, content)


def jobs_of(scenes: Sequence[str], variants: Sequence[str]) -> list[Job]:
    return [Job(scene=scene, data="x", views=3, variant=name) for scene in scenes for name in variants]


def row_of(text: str, title: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {title} |"))
    return [cell.strip() for cell in line.split("|")[2:-1]]


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


def test_a_metric_that_some_runs_lack_is_left_empty_but_for_depth_of_scenes_without_it(
    pages: ModuleType, tmp_path: Path
) -> None:
    root = folder_of_results(
        tmp_path / "results", jobs_of(["fern", "room-1"], ["geometric", "default"]), lambda _: 20.0
    )
    change(root, lambda job: job.scene == "room-1", metrics={"depth_abs_rel": 0.1})
    change(root, lambda job: (job.scene, job.variant) != ("fern", "default"), metrics={"lpips": 0.2})
    text = pages.summary(pages.read_runs(root))
    assert row_of(text, "geometric baseline")[:4] == ["20.00", "0.500", "0.200", "0.100"]
    assert row_of(text, "as the preset has it")[:4] == ["20.00", "0.500", "", "0.100"]
    assert text.endswith("Cells are empty where some of a variant's runs lack the metric.\n")
    aimed = pages.targets(pages.read_runs(root))
    assert "LPIPS" not in aimed, "no pair of means over other runs"
    assert row_of(aimed, "depth AbsRel at most half of that of geometric baseline") == ["1.00 of it", "missed"]


def test_runs_whose_test_images_are_training_images_do_not_count(pages: ModuleType, tmp_path: Path) -> None:
    root = folder_of_results(
        tmp_path / "results", jobs_of(["fern", "desk"], ["default"]), lambda job: 40.0 if job.scene == "desk" else 20.0
    )
    same = [{"id": 0, "name": "a.png"}]
    change(root, lambda job: job.scene == "desk", split={"train": same, "test": same})
    text = pages.summary(pages.read_runs(root))
    assert text.startswith("1 scenes, 3 views")
    assert row_of(text, "as the preset has it")[0] == "20.00"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 50}, "finished jobs of 50, 100 steps; expected one length"),
        ({"image_size": [252, 189]}, r"fern, 3 views, has .* other image sizes .*\(252 x 189, .*; 504 x 378, .*\)"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(
    pages: ModuleType, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    root = folder_of_results(tmp_path / "results", jobs_of(["fern"], ["geometric", "default"]), lambda _: 20.0)
    pages.check_comparable(root)
    change(root, lambda job: job.variant == "default", **changed)
    with pytest.raises(InputError, match=message):
        pages.check_comparable(root)


def test_the_target_of_rooms_is_measured_on_rooms(pages: ModuleType, tmp_path: Path) -> None:
    scenes = ["room", "office-1", "room-1", "room-2"]
    root = folder_of_results(tmp_path / "results", jobs_of(scenes, ["geometric", "default"]), lambda _: 20.0)
    for scene, error in {"office-1": 0.9, "room": 0.8, "room-1": 0.1, "room-2": 0.12}.items():
        change(root, lambda job, scene=scene: job.scene == scene, metrics={"depth_abs_rel": error})
    rooms = "depth AbsRel on rooms below .15"
    assert row_of(pages.targets(pages.read_runs(root)), rooms) == ["0.110", "met"]
    other = folder_of_results(tmp_path / "other", jobs_of(["office-1"], ["geometric", "default"]), lambda _: 20.0)
    change(other, lambda _: True, metrics={"depth_abs_rel": 0.1})
    assert rooms not in pages.targets(pages.read_runs(other))

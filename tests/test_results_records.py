"""Keeping a benchmark's figures as one text file."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from bench_runs import folder_of_results
from script_modules import load_script

from ddm_training.errors import InputError
from diffusionerf_ns.bench import table
from diffusionerf_ns.bench.jobs import Job, make_jobs
from diffusionerf_ns.bench.results import read_entries


@pytest.fixture(scope="module")
def records() -> ModuleType:
    return load_script("results_records")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Two jobs, one of them done."""
    jobs = make_jobs([tmp_path / "fern"], views=[3], seeds=[0, 1], variant_names=["full"])
    return folder_of_results(tmp_path / "results", jobs, lambda job: 20.0 if job.seed == 0 else None)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_tables_of_an_unpacked_folder_are_those_of_the_packed_one(
    records: ModuleType, results: Path, tmp_path: Path
) -> None:
    file, again = tmp_path / "records.jsonl", tmp_path / "again"
    assert records.pack(results, file) == 1
    assert records.unpack(file, again) == 1
    assert [entry.status() for entry in read_entries(again)] == ["done"]
    for name, folder in (("ours", again), ("theirs", results)):
        table.write_tables(folder, tmp_path / name)
    for name in ("table.csv", "jobs.csv", "times.md"):
        assert (tmp_path / "ours" / name).read_text() == (tmp_path / "theirs" / name).read_text()


def test_a_record_tells_no_path_of_the_machine(records: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    overrides = {"pipeline.model.prior": str(tmp_path / "priors/mine"), "pipeline.model.refine_tau": 0.1}
    job = Job(scene="fern", data=str(tmp_path / "fern"), views=3, variant="full", overrides=overrides)
    records.pack(folder_of_results(tmp_path / "results", [job], lambda job: 20.0), file)
    assert str(tmp_path) not in file.read_text()
    (kept,) = (record["job"] for record in lines(file))
    assert kept["data"] == "fern"
    assert kept["overrides"] == {"pipeline.model.prior": "mine", "pipeline.model.refine_tau": 0.1}


def test_results_that_a_folder_has_are_kept(records: ModuleType, results: Path, tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    records.pack(results, file)
    (entry,) = (entry for entry in read_entries(results) if entry.status() == "done")
    result = entry.folder / "result.json"
    before = result.read_text()
    records.unpack(file, results)
    assert result.read_text() == before
    file.write_text(file.read_text().replace('"hash": "h"', '"hash": "other"'))
    records.unpack(file, results)
    assert (entry.folder / "result.h.json").read_text() == before
    assert json.loads(result.read_text())["hash"] == "other"


def test_jobs_that_a_file_has_stay_there_unless_they_were_run_again(
    records: ModuleType, results: Path, tmp_path: Path
) -> None:
    file = tmp_path / "records.jsonl"
    records.pack(results, file)
    job = Job(scene="room", data="room", views=3, variant="full")
    same = Job(scene="fern", data="fern", views=3, variant="full")
    records.pack(folder_of_results(tmp_path / "more", [job, same], lambda job: 30.0), file)
    assert [(r["job"]["scene"], r["metrics"]["psnr"]) for r in lines(file)] == [("fern", 30.0), ("room", 30.0)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nothing\n", "line 1, is no record of a job"),
        ('{"format": "diffusionerf-bench-1"}\n', "line 1, is no record of a job"),
        (
            '{"format": "diffusionerf-bench-1", "job": {"scene": "a", "data": "a", "views": 3, "variant": "full"}}\n',
            "line 1, is no record of a job: KeyError 'hash'",
        ),
        (
            '{"hash": "h", "format": "other", "job": {"scene": "a", "data": "a", "views": 3, "variant": "full"}}\n',
            "'other'",
        ),
    ],
)
def test_what_is_no_record_is_refused(records: ModuleType, tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "records.jsonl"
    file.write_text(content)
    with pytest.raises(InputError, match=message):
        records.unpack(file, tmp_path / "again")
    assert not (tmp_path / "again").exists()

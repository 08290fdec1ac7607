"""Keep the figures of a benchmark as one text file, and make a results folder of it again.

python scripts/results_records.py pack RESULTS FILE       one line of JSON a finished job; jobs that FILE has stay there
python scripts/results_records.py unpack FILE RESULTS     then `diffusionerf-bench table`, or `run` for other jobs

Left out: pictures, the curves of training, the configuration (its hash stays), and in which folders capture and prior
lay. A `run` of a job that was unpacked does it again: its configuration says where its capture lies.
"""

import json
import sys
from pathlib import Path
from typing import Any

from ddm_training.errors import InputError
from ddm_training.files import write_whole
from diffusionerf_ns.bench.jobs import Job
from diffusionerf_ns.bench.results import (
    FORMAT,
    RESULT_FILE,
    Entry,
    lock,
    merge_entries,
    read_entries,
    write_json,
)

LEFT_OUT: dict[str, Any] = {"pictures": [], "curve": [], "config": {}}


def record_of(result: dict[str, Any]) -> dict[str, Any]:
    """What is kept of the content of a `result.json`."""
    job = result["job"]
    overrides = {k: _without_folder(v) for k, v in job["overrides"].items()}
    job = job | {"data": Path(job["data"]).name, "overrides": overrides}
    return {k: v for k, v in result.items() if k not in LEFT_OUT} | {"job": job}


def _without_folder(value: Any) -> Any:
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def read_records(file: Path) -> dict[str, dict[str, Any]]:
    """Name of the job -> its record.

    Raises:
        InputError: a line is none, or of another version.
    """
    records = {}
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        try:
            record = json.loads(line)
            found, name, _ = record["format"], Job.from_dict(record["job"]).name, record["hash"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{file}, line {number}, is no record of a job: {type(error).__name__} {error}."
            ) from error
        if found != FORMAT:
            raise InputError(f"{file}, line {number}, has the format {found!r}; this version reads {FORMAT!r}.")
        records[name] = record
    return records


def pack(folder: Path, file: Path) -> int:
    """Write the records of a results folder into a file, in place of those of the same jobs. Returns how many."""
    found = {entry.job.name: record_of(result) for entry in read_entries(folder) if (result := entry.result())}
    records = (read_records(file) if file.is_file() else {}) | found
    write_whole(file, "".join(json.dumps(records[name]) + "\n" for name in sorted(records)))
    return len(found)


def unpack(file: Path, folder: Path) -> int:
    """Put records into a results folder, a new one or with what it has; returns how many.

    A result of the same configuration stays as it is, one of another is set aside as `diffusionerf-bench run` does it.
    """
    records = read_records(file)
    entries = [
        Entry(job=Job.from_dict(record["job"]), hash=record["hash"], folder=folder / name)
        for name, record in records.items()
    ]
    with lock(folder):
        merge_entries(folder, entries)
        for entry, record in zip(entries, records.values()):
            entry.set_aside()
            if entry.result() is None:
                write_json(entry.folder / RESULT_FILE, record | LEFT_OUT)
    return len(records)


def main() -> None:
    """One of the two."""
    commands = {"pack": pack, "unpack": unpack}
    if len(sys.argv) != 4 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    try:
        count = commands[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
    except (InputError, OSError) as error:
        sys.exit(str(error))
    print(f"{count} jobs: {sys.argv[3]}")


if __name__ == "__main__":
    main()

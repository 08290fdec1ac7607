"""What a preparation did: counts by scene, as a table and as `report.json`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ddm_training.frames import read_scene_info

REPORT_FILE = "report.json"


@dataclass(frozen=True, kw_only=True)
class SceneResult:
    """What a job did; `skipped` when the scene was whole already (its counts then come from the store)."""

    name: str
    split: str
    frames: int
    rejected: dict[str, int]
    bytes: int
    seconds: float = 0.0
    skipped: bool = False


def folder_bytes(folder: Path) -> int:
    """Bytes of the files directly in a folder."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def scene_result(folder: Path, *, seconds: float = 0.0, skipped: bool = False) -> SceneResult:
    """Counts of a whole scene of the store."""
    info = read_scene_info(folder)
    return SceneResult(
        name=info.name,
        split=info.split,
        frames=len(info.frames),
        rejected=dict(info.rejected),
        bytes=folder_bytes(folder),
        seconds=seconds,
        skipped=skipped,
    )


def make_report(command: str, results: Sequence[SceneResult], failed: dict[str, str], seconds: float) -> dict[str, Any]:
    """Totals over scenes; `frames_per_second` is of this run alone and counts read frames, kept or not."""
    rejected: dict[str, int] = {}
    splits: dict[str, int] = {}
    for result in results:
        splits[result.split] = splits.get(result.split, 0) + result.frames
        for reason, count in result.rejected.items():
            rejected[reason] = rejected.get(reason, 0) + count
    read = sum(r.frames + sum(r.rejected.values()) for r in results if not r.skipped)
    return {
        "command": command,
        "scenes": len(results),
        "scenes_skipped": sum(r.skipped for r in results),
        "frames": sum(r.frames for r in results),
        "frames_by_split": splits,
        "rejected": dict(sorted(rejected.items(), key=lambda item: -item[1])),
        "bytes": sum(r.bytes for r in results),
        "seconds": round(seconds, 3),
        "frames_per_second": round(read / seconds, 2) if seconds > 0 else 0.0,
        "failed": failed,
        "by_scene": [asdict(r) for r in sorted(results, key=lambda r: r.name)],
    }


def show_report(report: dict[str, Any], store: Path) -> None:
    """Print the report as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{report['command']}: {store}", show_header=False)
    table.add_row("scenes", f"{report['scenes']} ({report['scenes_skipped']} were there already)")
    for split, count in report["frames_by_split"].items():
        table.add_row(f"frames kept, {split}", str(count))
    for reason, count in report["rejected"].items():
        table.add_row(f"rejected: {reason}", str(count))
    for name, why in report["failed"].items():
        table.add_row(f"[red]failed: {name}[/red]", why)
    table.add_row("frames/s (this run)", f"{report['frames_per_second']:.1f}")
    table.add_row("size", f"{report['bytes'] / 1e9:.3f} GB")
    Console().print(table)

"""Scene archives in Hypersim's layout on a server of their own, and what a download leaves of them."""

import json
import random
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from range_server import RangeServer, serve

from ddm_training.download import HypersimDownloadConfig
from ddm_training.http_ranges import RetryPolicy

SCENES = ("ai_001_001", "ai_001_002", "ai_002_001")
KINDS = {
    "color": "final_hdf5/frame.{:04d}.color.hdf5",
    "depth": "geometry_hdf5/frame.{:04d}.depth_meters.hdf5",
    "entity": "geometry_hdf5/frame.{:04d}.render_entity_id.hdf5",
    "preview": "final_preview/frame.{:04d}.tonemap.jpg",
    "normal": "geometry_hdf5/frame.{:04d}.normal_cam.hdf5",
}
FAST = RetryPolicy(retries=2, backoff=0.0, timeout=5.0)


def name_of(kind: str, frame: int, camera: str = "cam_00") -> str:
    return f"images/scene_{camera}_" + KINDS[kind].format(frame)


def content(scene: str, name: str) -> bytes:
    """Half of it compressible, half not."""
    noise = random.Random(f"{scene}/{name}")
    return noise.randbytes(20_000 + noise.randrange(1000)) + b"surface " * 2_000


def write_archive(path: Path, scene: str, frames: int, leave_out: tuple[str, ...] = ()) -> None:
    """A scene archive: stored and deflated members, all kinds, the unwanted normals being the largest."""
    with zipfile.ZipFile(path, "w") as archive:
        for frame in range(frames):
            for number, kind in enumerate(KINDS):
                name = name_of(kind, frame)
                if name in leave_out:
                    continue
                method = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)[(number + frame) % 2]
                data = content(scene, name) * (20 if kind == "normal" else 1)
                archive.writestr(f"{scene}/{name}", data, compress_type=method)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RangeServer]:
    """Three scenes of four frames, of which frame 3 is not public."""
    root = tmp_path / "server"
    root.mkdir()
    rows = ["scene_name,camera_name,frame_id,included_in_public_release,exclude_reason,split_partition_name"]
    for scene, split in zip(SCENES, ("train", "train", "val")):
        write_archive(root / f"{scene}.zip", scene, 4)
        rows += [f"{scene},cam_00,{frame},True,,{split}" for frame in range(3)]
        rows += [f"{scene},cam_00,3,False,CONTENT FLAGGED FOR REMOVAL,"]
    rows += ["ai_009_009,cam_00,0,False,CONTENT FLAGGED FOR REMOVAL,"]
    (tmp_path / "split.csv").write_text("\n".join(rows) + "\n")
    with serve(root) as running:
        yield running


@pytest.fixture
def config(server: RangeServer, tmp_path: Path) -> HypersimDownloadConfig:
    return HypersimDownloadConfig(
        output=tmp_path / "out",
        split_csv=tmp_path / "split.csv",
        base_url=server.url,
        connections=3,
        retries=3,
        backoff=0.001,
        timeout=5.0,
    )


def expected(scenes: tuple[str, ...] = SCENES, kinds: tuple[str, ...] = ("color", "depth", "entity")) -> set[str]:
    return {f"{scene}/{name_of(kind, frame)}" for scene in scenes for kind in kinds for frame in range(3)}


def found(config: HypersimDownloadConfig) -> set[str]:
    return {str(p.relative_to(config.output)) for p in config.output.rglob("*") if p.is_file() and "images" in p.parts}


def assert_whole(config: HypersimDownloadConfig, names: set[str]) -> None:
    """Exactly these files, each with the right content."""
    assert found(config) == names, found(config) ^ names
    for name in names:
        assert (config.output / name).read_bytes() == content(*name.split("/", 1)), name


def report(config: HypersimDownloadConfig) -> dict:
    return json.loads((config.output / "download.json").read_text())

"""`ddm hypersim download` against a real server on the loopback interface that serves real ZIP files and misbehaves."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from range_server import Fault, RangeServer, serve, wait_until

from ddm_training import remote_zip
from ddm_training.download import HypersimDownloadConfig
from ddm_training.errors import InputError
from ddm_training.http_ranges import CHUNK, RangeClient, RetryPolicy
from ddm_training.hypersim_split import PublicScene, read_split_csv, select_scenes
from ddm_training.remote_zip import open_archive, save_member

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
    assert found(config) == names
    for name in names:
        assert (config.output / name).read_bytes() == content(*name.split("/", 1)), name


def report(config: HypersimDownloadConfig) -> dict:
    return json.loads((config.output / "download.json").read_text())


# --- what is fetched


def test_only_the_wanted_members_of_public_frames_cross_the_wire(config: HypersimDownloadConfig, server: RangeServer):
    config.main()
    assert_whole(config, expected())
    size = sum(path.stat().st_size for path in server.root.iterdir())
    assert server.sent() < size / 4
    with zipfile.ZipFile(server.root / f"{SCENES[0]}.zip") as archive:  # no byte of a member that nobody asked for
        unwanted = [info for info in archive.infolist() if "normal" in info.filename]
        end = archive.start_dir
    data = [r for r in server.requests if r.path == f"/{SCENES[0]}.zip" and r.end <= end and r.end - r.start > 1]
    assert data
    assert not [r for r in data for info in unwanted if r.start <= info.header_offset < r.end]
    assert report(config)["members_fetched"] == 27
    assert report(config)["failed_scenes"] == {}


def test_preview_takes_the_jpeg_and_the_depth(config: HypersimDownloadConfig):
    replace(config, preview=True, split="val").main()
    assert_whole(config, expected(("ai_002_001",), ("preview", "depth")))


def test_connections_are_kept_alive(config: HypersimDownloadConfig, server: RangeServer):
    config.main()
    assert len(server.requests) > 30
    assert server.connections <= 2 * config.connections  # one each for planning and for fetching


def test_dry_run_says_the_bytes_and_writes_nothing(
    config: HypersimDownloadConfig, server: RangeServer, capsys: pytest.CaptureFixture[str]
):
    replace(config, dry_run=True).main()
    assert not config.output.exists()
    with zipfile.ZipFile(server.root / "ai_002_001.zip") as archive:
        size = sum(archive.getinfo(name).compress_size for name in expected(("ai_002_001",)))
    capsys.readouterr()
    replace(config, dry_run=True, split="val").main()
    output = capsys.readouterr().out
    assert f"would fetch 9 members of 1 scenes: {size} bytes" in output
    assert "ai_002_001" in output


def test_a_frame_without_depth_is_left_out_and_said(config: HypersimDownloadConfig, server: RangeServer):
    write_archive(server.root / "ai_001_001.zip", "ai_001_001", 4, leave_out=(name_of("depth", 1),))
    config.main()
    assert_whole(config, {name for name in expected() if not ("ai_001_001" in name and "0001" in name)})
    assert report(config)["incomplete_frames"] == {"ai_001_001": ["cam_00 frame 0001"]}


# --- running again


def test_running_again_asks_the_server_for_nothing(config: HypersimDownloadConfig, server: RangeServer):
    config.main()
    server.forget()
    config.main()
    assert server.requests == []
    assert_whole(config, expected())


def test_only_what_is_missing_or_cut_short_is_fetched_again(config: HypersimDownloadConfig, server: RangeServer):
    config.main()
    (config.output / "ai_001_001" / name_of("color", 0)).unlink()
    (config.output / "ai_001_002" / name_of("depth", 2)).write_bytes(b"short")
    config.main()
    assert_whole(config, expected())
    assert report(config)["members_fetched"] == 2
    assert report(config)["members_there_before"] == 25


def test_verify_finds_a_file_of_the_right_size_with_wrong_bytes(config: HypersimDownloadConfig):
    config.main()
    path = config.output / "ai_001_001" / name_of("color", 0)
    path.write_bytes(b"\0" * path.stat().st_size)
    replace(config, verify=True).main()
    assert_whole(config, expected())
    assert report(config)["members_fetched"] == 1


def test_a_whole_file_that_was_not_noted_is_taken_over_and_a_damaged_one_is_not(config: HypersimDownloadConfig):
    config.main()
    (config.output / "ai_001_001" / "manifest.jsonl").unlink()
    path = config.output / "ai_001_001" / name_of("color", 0)
    path.write_bytes(b"\0" * path.stat().st_size)
    config.main()
    assert_whole(config, expected())
    assert report(config)["members_fetched"] == 1


def test_a_torn_manifest_line_costs_no_other_line(config: HypersimDownloadConfig, server: RangeServer):
    config.main()
    manifest = config.output / "ai_001_001" / "manifest.jsonl"
    manifest.write_bytes(manifest.read_bytes()[:-20])
    (config.output / "ai_001_001" / name_of("depth", 1)).unlink()
    config.main()
    assert report(config)["members_fetched"] == 1
    server.forget()
    config.main()
    assert server.requests == []


def test_the_split_file_is_kept_beside_the_scenes_and_then_needs_no_flag(
    config: HypersimDownloadConfig, server: RangeServer
):
    replace(config, scenes=("ai_001_001",)).main()
    replace(config, split_csv=None).main()
    assert_whole(config, expected())
    with pytest.raises(InputError, match=r"out/nowhere/metadata_images_split_scene_v1.csv cannot be read"):
        replace(config, split_csv=None, output=config.output / "nowhere").main()


# --- bad connections and servers


@pytest.mark.parametrize("kind", ["drop", "short", "shift", "total", "length", "encode"])
def test_passing_faults_are_outlived(config: HypersimDownloadConfig, server: RangeServer, kind: str):
    server.faults = [Fault(kind, times=3)]  # pyright: ignore[reportArgumentType]
    config.main()
    assert server.faults[0].times == 0
    assert_whole(config, expected())


def test_a_broken_transfer_goes_on_where_it_broke(tmp_path: Path):
    data = random.Random(3).randbytes(2_000_000)
    (tmp_path / "a").write_bytes(data)
    with serve(tmp_path) as server:
        server.faults = [Fault("drop", min_bytes=200_000)]  # every transfer of that size, for ever
        assert RangeClient(FAST).read(f"{server.url}/a", 0, len(data), size=len(data)) == data
        starts = [request.start for request in server.requests]
        assert starts == sorted(set(starts))
        assert len(starts) > 3
        assert server.sent() < len(data) + len(starts) * CHUNK


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("shift", "the server answered 'bytes"),
        ("total", "the server answered 'bytes"),
        ("length", "contradicts its own Content-Range"),
        ("encode", "re-encoded"),
        ("ignore", "ignores range requests"),
    ],
)
def test_a_lying_server_is_named_and_other_scenes_go_on(
    config: HypersimDownloadConfig, server: RangeServer, kind: str, message: str
):
    server.faults = [Fault(kind, name="ai_001_002")]  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match=r"1 of 3 scenes failed[\s\S]*ai_001_002") as error:
        config.main()
    assert message in str(error.value)
    assert_whole(config, expected(("ai_001_001", "ai_002_001")))
    assert message in report(config)["failed_scenes"]["ai_001_002"]


def test_a_server_that_ignores_ranges_does_not_get_to_send_the_archive(tmp_path: Path):
    (tmp_path / "big.zip").write_bytes(b"\0" * 50_000_000)
    with serve(tmp_path) as server:
        server.faults = [Fault("ignore", min_bytes=1)]
        with pytest.raises(remote_zip.RemoteError, match=r"answered 200 with 50000000 bytes .* expected 206"):
            open_archive(RangeClient(FAST), f"{server.url}/big.zip")
        wait_until(lambda: server.connections == 1)
        assert len(server.requests) == 1
        assert server.sent() < 20_000_000  # what fits into socket buffers


def test_404_is_final_for_that_scene_only(config: HypersimDownloadConfig, server: RangeServer):
    (server.root / "ai_001_002.zip").unlink()
    with pytest.raises(InputError, match=r"1 of 3 scenes failed[\s\S]*ai_001_002.*not found \(HTTP 404\)"):
        config.main()
    assert len([r for r in server.requests if "ai_001_002" in r.path]) == 1
    assert_whole(config, expected(("ai_001_001", "ai_002_001")))
    write_archive(server.root / "ai_001_002.zip", "ai_001_002", 4)
    config.main()
    assert_whole(config, expected())


def test_503_waits_as_long_as_the_server_asks(config: HypersimDownloadConfig, server: RangeServer):
    server.faults = [Fault("status", times=1, status=503, headers={"Retry-After": "1"})]
    replace(config, split="val", connections=1).main()
    refused = next(i for i, r in enumerate(server.requests) if r.status == 503)
    assert server.requests[refused + 1].at - server.requests[refused].at >= 1.0
    assert_whole(config, expected(("ai_002_001",)))


def test_a_server_that_stays_broken_is_given_up_with_the_work_done(config: HypersimDownloadConfig, server: RangeServer):
    server.faults = [Fault("status", name="ai_002_001", min_bytes=5000, max_bytes=120_000, status=500)]
    replace(config, scenes=("ai_001_001",)).main()
    server.faults[0].name = ""
    with pytest.raises(InputError, match=r"10 failures in a row.*HTTP 500.*Given up after 4 tries"):
        config.main()
    assert_whole(config, expected(("ai_001_001",)))


def test_nobody_listening_is_an_error_that_names_the_address(config: HypersimDownloadConfig):
    with pytest.raises(InputError, match=r"http://127.0.0.1:9/ai_001_001.zip: no connection"):
        replace(config, base_url="http://127.0.0.1:9").main()


def test_back_off_doubles_is_jittered_and_bounded():
    policy = RetryPolicy(backoff=1.0, longest=60.0, longest_retry_after=300.0)
    for attempt, top in ((1, 1.0), (2, 2.0), (4, 8.0), (20, 60.0), (10_000, 60.0)):
        delays = [policy.delay(attempt) for _ in range(50)]
        assert top / 2 <= min(delays) < max(delays) <= top
    assert policy.delay(1, retry_after=7.0) == 7.0
    assert policy.delay(1, retry_after=1e9) == 300.0


# --- damaged archives


def test_a_flipped_byte_is_fetched_again(config: HypersimDownloadConfig, server: RangeServer):
    server.faults = [Fault("flip", times=2, min_bytes=10_000)]
    config.main()
    assert server.faults[0].times == 0
    assert_whole(config, expected())


def test_a_member_that_stays_corrupt_is_named_and_leaves_no_file(config: HypersimDownloadConfig, server: RangeServer):
    path = server.root / "ai_001_001.zip"
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo(f"ai_001_001/{name_of('color', 0)}").header_offset
    data = bytearray(path.read_bytes())
    data[offset + 500] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"frame.0000.color.hdf5 has \d+ bytes and CRC \w+, the directory says"):
        config.main()
    assert_whole(config, expected() - {f"ai_001_001/{name_of('color', 0)}"})


def test_a_member_larger_than_the_directory_says_is_cut_off(tmp_path: Path):
    """A few kilobytes that inflate to 100 MB: not written, and not held in memory."""
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", b"\0" * 100_000_000)
        directory = archive.infolist()[0]
    data = path.read_bytes()
    size = directory.file_size.to_bytes(4, "little")
    assert data.count(size) == 2
    path.write_bytes(data.replace(size, (1000).to_bytes(4, "little")))
    with serve(tmp_path) as server:
        client = RangeClient(FAST)
        archive = open_archive(client, f"{server.url}/bomb.zip")
        tracemalloc.start()
        with pytest.raises(remote_zip.CorruptMemberError, match="holds more than the 1000 bytes"):
            save_member(client, archive, archive.members["a"], tmp_path / "a")
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
        tracemalloc.stop()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bomb.zip"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) // 2], "no whole ZIP archive"),
        (lambda data: b"<html>Please log in</html>", "no whole ZIP archive .*starting with b'<html>"),
        (lambda data: b"", "HTTP 416.*empty"),
        (lambda data: data[:-22] + data[-22:].replace(b"PK\x05\x06", b"PK\x05\x07"), "no whole ZIP archive"),
        (lambda data: b"\0" * 100 + data[100:], "no header of this member"),
    ],
)
def test_what_is_no_whole_archive_is_said(
    config: HypersimDownloadConfig, server: RangeServer, damage: Callable[[bytes], bytes], message: str
):
    path = server.root / "ai_001_002.zip"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=rf"1 of 3 scenes failed[\s\S]*{message}"):
        config.main()
    assert expected(("ai_001_001", "ai_002_001")) <= found(config)


def test_other_compression_is_refused(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a", b"x" * 100)
    with serve(tmp_path) as server, pytest.raises(InputError, match="method 12; expected stored"):
        open_archive(RangeClient(FAST), f"{server.url}/a.zip")


# --- large archives


def test_zip64_archives_beyond_four_gigabytes_are_read(tmp_path: Path):
    """A real one: the members lie behind a hole of 5 GB that takes no disk, so offsets need 64 bits."""
    path = tmp_path / "large.zip"
    with open(path, "wb") as file:
        file.truncate(5_000_000_000)
    wanted = {"stored": random.Random(1).randbytes(300_000), "deflated": b"wall " * 300_000}
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("stored", wanted["stored"], compress_type=zipfile.ZIP_STORED)
        with archive.open(zipfile.ZipInfo("deflated"), "w", force_zip64=True) as file:
            file.write(wanted["deflated"])
        assert archive.getinfo("deflated").header_offset > 1 << 32
    with serve(tmp_path) as server:
        client = RangeClient(FAST)
        remote = open_archive(client, f"{server.url}/large.zip")
        for name, data in wanted.items():
            save_member(client, remote, remote.members[name], tmp_path / name)
            assert (tmp_path / name).read_bytes() == data
        assert server.sent() < 3_000_000


def test_members_of_any_size_pass_through_bounded_memory(tmp_path: Path):
    noise = random.Random(2).randbytes(1 << 20)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, method in (("stored", zipfile.ZIP_STORED), ("deflated", zipfile.ZIP_DEFLATED)):
            info = zipfile.ZipInfo(name)
            info.compress_type = method
            with archive.open(info, "w") as file:
                for _ in range(16):
                    file.write(noise)
    with serve(tmp_path) as server:
        client = RangeClient(FAST)
        remote = open_archive(client, f"{server.url}/a.zip")
        tracemalloc.start()
        for name in ("stored", "deflated"):
            save_member(client, remote, remote.members[name], tmp_path / name)
            assert (tmp_path / name).stat().st_size == 16 << 20
        assert tracemalloc.get_traced_memory()[1] < 6_000_000
        tracemalloc.stop()


# --- full disks and kills


def test_a_full_disk_costs_the_member_in_flight_and_nothing_else(config: HypersimDownloadConfig):
    """The kernel's own "no space left on device": one part file leads to /dev/full."""
    config = replace(config, connections=1)
    victim = config.output / "ai_001_002" / name_of("depth", 1)
    victim.parent.mkdir(parents=True)
    victim.with_name(victim.name + ".part").symlink_to("/dev/full")
    with pytest.raises(InputError, match=r"the disk is full below .*run the same command again"):
        config.main()
    done = found(config)
    assert expected(("ai_001_001",)) <= done < expected()
    assert_whole(config, done)
    config.main()
    assert_whole(config, expected())
    assert report(config)["members_there_before"] == len(done)


def test_a_disk_that_fills_while_the_manifest_is_written_loses_no_member(
    config: HypersimDownloadConfig, monkeypatch: pytest.MonkeyPatch
):
    config = replace(config, connections=1, scenes=("ai_001_001",))
    real, calls = os.fsync, []

    def full(file: int) -> None:
        calls.append(file)
        if len(calls) == 6:  # each member flushes its file, then the manifest
            raise OSError(28, "No space left on device")
        real(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="the disk is full"):
        config.main()
    assert len(found(config)) == 3
    config.main()
    assert_whole(config, expected(("ai_001_001",)))
    assert report(config)["members_there_before"] == 3


def test_too_little_space_is_said_before_anything_is_fetched(
    config: HypersimDownloadConfig, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match=r"has 1\.0 kB free, this download needs [0-9.]+ kB"):
        config.main()
    assert found(config) == set()


def test_sigkill_loses_at_most_the_members_in_flight(config: HypersimDownloadConfig, server: RangeServer):
    server.faults = [Fault("slow", min_bytes=10_000, pause=0.005)]
    code = "from tyro import cli; from ddm_training.download import HypersimDownloadConfig as C; cli(C).main()"
    flags = ["--output", config.output, "--split-csv", config.split_csv, "--base-url", server.url, "--connections", "2"]
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, flags)], stdout=subprocess.DEVNULL)
    wait_until(lambda: len([name for name in found(config) if not name.endswith(".part")]) >= 6)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = {name for name in found(config) if not name.endswith(".part")}
    assert len(found(config)) - len(done) <= 2
    assert 6 <= len(done) < len(expected())
    for name in done:
        assert (config.output / name).read_bytes() == content(*name.split("/", 1))
    server.forget()
    config.main()
    assert_whole(config, expected())
    assert report(config)["members_fetched"] == len(expected()) - len(done)


def test_two_downloads_do_not_share_a_folder(config: HypersimDownloadConfig):
    import fcntl

    config.output.mkdir()
    with open(config.output / ".download.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another download is writing"):
            config.main()
    config.main()
    assert_whole(config, expected())


# --- which scenes


@pytest.fixture(scope="module")
def official(real_data: Callable[[str], Path]) -> dict[str, PublicScene]:
    return read_split_csv(real_data("hypersim/metadata_images_split_scene_v1.csv"))


def test_the_official_split_has_the_known_counts(official: dict[str, PublicScene]):
    assert len(select_scenes(official)) == 457
    for split, frames in (("train", 59_543), ("val", 7_386), ("test", 7_690)):
        assert sum(len(scene.frames) for scene in select_scenes(official, split=split)) == frames


def test_a_larger_count_with_the_same_seed_adds_scenes(official: dict[str, PublicScene]):
    draws = [select_scenes(official, split="train", count=n, seed=3) for n in (5, 20, 100)]
    names = [[scene.name for scene in draw] for draw in draws]
    assert [len(draw) for draw in names] == [5, 20, 100]
    assert set(names[0]) < set(names[1]) < set(names[2])
    assert names[1] == sorted(names[1])
    assert names[1] != [scene.name for scene in select_scenes(official, split="train", count=20, seed=4)]


def test_frames_of_a_scene_are_spread_evenly(official: dict[str, PublicScene]):
    (scene,) = select_scenes(official, ids=["ai_037_002"], frames_per_scene=5)
    everything = official["ai_037_002"].frames
    places = [everything.index(frame) for frame in scene.frames]
    gaps = [b - a for a, b in itertools.pairwise(places)]
    assert len(places) == 5
    assert max(gaps) - min(gaps) <= 1
    assert max(gaps) == pytest.approx(len(everything) / 5, abs=1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"scenes": ("ai_999_999",)}, "'ai_999_999' is not in the split file, which has 4 scenes"),
        ({"scenes": ("ai_009_009",)}, "no public frame"),
        ({"scenes": ("ai_002_001",), "split": "train"}, "in split 'val', --split asks for 'train'"),
        ({"split": "test"}, "1 scenes of split 'test' asked for, the split file has 0"),
        ({"count": 4}, "4 scenes of split 'all' asked for, the split file has 3"),
        ({"count": 0}, "--count must be at least 1, found 0"),
        ({"connections": 0}, "--connections must be at least 1"),
        ({"base_url": "ftp://x"}, "no http"),
        ({"split_csv": Path("/nowhere.csv")}, "cannot be read"),
    ],
)
def test_flags_that_make_no_sense_are_refused(config: HypersimDownloadConfig, flags: dict, message: str):
    with pytest.raises(InputError, match=message):
        replace(config, **flags).main()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "lacks the columns"),
        ("", "lacks the columns"),
        ("{header}\n../up,cam_00,0,True,,train\n", "line 2"),
        ("{header}\nai_1,cam_00,x,True,,train\n", "line 2"),
        ("{header}\nai_1,cam_00,0,True,,train\nai_1,cam_00,1,True,,val\n", "line 3"),
        ("{header}\nai_1,cam_00,0,True,,\n", "line 2"),
    ],
)
def test_a_split_file_with_other_content_is_refused(tmp_path: Path, text: str, message: str):
    header = "scene_name,camera_name,frame_id,included_in_public_release,exclude_reason,split_partition_name"
    (tmp_path / "split.csv").write_text(text.replace("{header}", header))
    with pytest.raises(InputError, match=message):
        read_split_csv(tmp_path / "split.csv")

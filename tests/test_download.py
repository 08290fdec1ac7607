"""`ddm hypersim download` from a real server on the loopback interface: which files and scenes, again, full disks."""

import itertools
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import hypersim_archives
import pytest
from hypersim_archives import SCENES, assert_whole, content, expected, found, name_of, report, write_archive
from range_server import Fault, RangeServer, wait_until

from ddm_training.download import HypersimDownloadConfig
from ddm_training.errors import InputError
from ddm_training.hypersim_split import PublicScene, read_split_csv, select_scenes

server, config = hypersim_archives.server, hypersim_archives.config  # fixtures


# --- what is fetched


def test_only_the_wanted_members_of_public_frames_cross_the_wire(
    config: HypersimDownloadConfig, server: RangeServer, capsys: pytest.CaptureFixture[str]
):
    config.main()
    assert "`ddm hypersim prepare` needs metadata_camera_parameters.csv too" in capsys.readouterr().out
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
    with pytest.raises(
        InputError, match=r"nowhere/.*_v1.csv cannot be read .*evermotion_dataset/analysis.*--split-csv"
    ):
        replace(config, split_csv=None, output=config.output / "nowhere").main()


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
        if len(calls) == 7:  # after the split file each member flushes its file, then the manifest
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

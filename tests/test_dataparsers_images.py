"""The cache of reduced images: right pixels, whole or absent, never over the user's files."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddm_training.errors import InputError
from diffusionerf_ns.dataparsers import images
from diffusionerf_ns.dataparsers.images import CACHE_FILE, check_readable, downscaled, list_images, same_shape, shrink


def make_images(folder: Path, count: int, width: int = 32, height: int = 24, suffix: str = ".png") -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    paths = [folder / f"im{i:03d}{suffix}" for i in range(count)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return paths


def test_reduction_is_the_mean_of_each_block(tmp_path):
    (path,) = make_images(tmp_path, 1)
    full = np.asarray(Image.open(path), dtype=np.float64)
    mean = full.reshape(6, 4, 8, 4, 3).mean(axis=(1, 3))
    small = np.asarray(shrink(Image.open(path), 4), dtype=np.float64)
    assert np.abs(small - mean).max() <= 0.5 + 1e-9  # rounding only


def test_sizes_that_do_not_divide_are_rounded_down():
    assert shrink(Image.new("RGB", (35, 26)), 4).size == (8, 6)
    with pytest.raises(InputError, match="reduced by 40"):
        shrink(Image.new("RGB", (35, 26)), 40)


def test_palette_images_become_colours_not_indices():
    palette = Image.new("RGB", (8, 8), (200, 10, 30)).convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.asarray(shrink(palette, 2))[0, 0].tolist() == [200, 10, 30]


def test_copies_are_made_once(tmp_path):
    paths = make_images(tmp_path / "images", 3, suffix=".jpg")
    first = downscaled(paths, 2, tmp_path / "images_2")
    stamps = [p.stat().st_mtime_ns for p in first]
    assert [p.name for p in first] == ["im000.png", "im001.png", "im002.png"]
    assert [p.stat().st_mtime_ns for p in downscaled(paths, 2, tmp_path / "images_2")] == stamps
    assert {p.name for p in tmp_path.iterdir()} == {"images", "images_2"}  # nothing unfinished is left


def test_changed_sources_are_reduced_again(tmp_path):
    paths = make_images(tmp_path / "images", 2)
    downscaled(paths, 2, tmp_path / "images_2")
    Image.new("RGB", (32, 24), (9, 9, 9)).save(paths[0])
    again = downscaled(paths, 2, tmp_path / "images_2")
    assert np.asarray(Image.open(again[0])).max() == 9
    assert {p.name for p in tmp_path.iterdir()} == {"images", "images_2"}


def test_a_folder_of_the_user_is_not_written_to(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    paths = make_images(tmp_path / "scene" / "images", 2)
    (mine,) = make_images(tmp_path / "scene" / "images_2", 1, 16, 12)
    before = mine.read_bytes()
    made = downscaled(paths, 2, tmp_path / "scene" / "images_2")
    assert all(p.is_relative_to(tmp_path / "cache" / "diffusionerf_ns") for p in made)
    assert mine.read_bytes() == before
    assert len(list(mine.parent.iterdir())) == 1


def test_names_that_differ_in_the_suffix_only_stay_apart(tmp_path):
    paths = [*make_images(tmp_path / "images", 1), *make_images(tmp_path / "images", 1, suffix=".jpg")]
    assert len(set(downscaled(paths, 2, tmp_path / "images_2"))) == 2


def test_images_of_several_folders_keep_their_folders(tmp_path):
    paths = [*make_images(tmp_path / "images" / "cam0", 2), *make_images(tmp_path / "images" / "cam1", 2)]
    made = downscaled(paths, 2, tmp_path / "images_2")
    assert [str(p.relative_to(tmp_path / "images_2")) for p in made] == [
        "cam0/im000.png", "cam0/im001.png", "cam1/im000.png", "cam1/im001.png",
    ]  # fmt: skip
    assert len(check_readable(made)) == 4


def test_images_beside_the_capture_are_reduced_into_the_cache_and_over_nothing(tmp_path):
    capture = tmp_path / "capture"
    make_images(tmp_path / "photos", 1)
    (mine,) = make_images(capture / "photos", 1)
    before = mine.read_bytes()
    paths = [*make_images(capture / "images", 1), capture / ".." / "photos" / "im000.png"]
    made = downscaled(paths, 2, capture / "images_2")
    assert mine.read_bytes() == before
    assert sorted(p.relative_to(capture / "images_2").as_posix() for p in made) == [
        "capture/images/im000.png", "photos/im000.png",
    ]  # fmt: skip
    assert all(".." not in p.parts for p in made)
    assert len(check_readable(made)) == 2


def test_the_folder_of_the_copies_is_named_as_it_is_called(tmp_path, capsys):
    downscaled(make_images(tmp_path / "my [red] room", 1), 2, tmp_path / "my [red] room_2")
    assert "my[red]room_2" in "".join(capsys.readouterr().out.split())


def test_copies_are_made_of_what_is_needed_when_it_is(tmp_path, capsys):
    paths = make_images(tmp_path / "images", 3)
    paths[1].write_bytes(paths[1].read_bytes()[:-200])
    made = downscaled(paths, 2, tmp_path / "images_2", {paths[0], paths[2]})
    assert [p.is_file() for p in made] == [True, False, True]
    assert "reducing 2 images" in capsys.readouterr().out
    assert downscaled(paths, 2, tmp_path / "images_2", {paths[0]}) == made
    with pytest.raises(InputError, match=r"im001\.png cannot be read"):
        downscaled(paths, 2, tmp_path / "images_2", set(paths))
    make_images(tmp_path / "images", 2)
    copies = downscaled(paths, 2, tmp_path / "images_2", {paths[0], paths[1]})
    assert check_readable(copies[:2]) == [(16, 12)] * 2


def test_copies_of_other_names_are_made_again(tmp_path):
    paths = make_images(tmp_path / "images", 2)
    downscaled(paths, 2, tmp_path / "images_2")
    file = tmp_path / "images_2" / CACHE_FILE
    content = json.loads(file.read_text())
    content["names"] = ["other.png", "names.png"]
    file.write_text(json.dumps(content))
    for copy in (tmp_path / "images_2").glob("*.png"):
        copy.unlink()
    assert len(check_readable(downscaled(paths, 2, tmp_path / "images_2"))) == 2


def test_what_an_image_cannot_be_is_said_of_it_not_that_it_is_damaged(tmp_path):
    (path,) = make_images(tmp_path / "images", 1, 8, 8)
    with pytest.raises(InputError, match=r"im000\.png: an image of 8 x 8 pixels cannot be reduced by 9"):
        downscaled([path], 9, tmp_path / "images_9")


def test_an_interrupted_run_leaves_no_cache(tmp_path, monkeypatch):
    paths = make_images(tmp_path / "images", 3)
    real, seen = images.shrink, []

    def second_fails(image, factor):
        seen.append(1)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(image, factor)

    monkeypatch.setattr(images, "shrink", second_fails)
    with pytest.raises(KeyboardInterrupt):
        downscaled(paths, 2, tmp_path / "images_2")
    assert {p.name for p in tmp_path.iterdir()} == {"images"}


def test_what_a_killed_run_leaves_is_not_trusted(tmp_path):
    paths = make_images(tmp_path / "images", 30, 400, 300)
    code = (
        "import sys, pathlib; from diffusionerf_ns.dataparsers.images import downscaled, list_images; "
        "p = pathlib.Path(sys.argv[1]); downscaled(list_images(p / 'images'), 2, p / 'images_2')"
    )
    run = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.DEVNULL)
    deadline = time.time() + 60
    while time.time() < deadline and not any(tmp_path.glob(".images_2.part-*/*.png")):
        time.sleep(0.005)
    run.send_signal(signal.SIGKILL)
    run.wait()
    (part,) = tmp_path.glob(".images_2.part-*")
    assert not (tmp_path / "images_2").exists()
    assert len(downscaled(paths, 2, tmp_path / "images_2")) == 30
    check_readable(list_images(tmp_path / "images_2"))
    assert part.exists()  # it could belong to a run that goes on
    old = time.time() - 2 * images.STALE_SECONDS
    os.utime(part, (old, old))
    downscaled(paths[:5], 2, tmp_path / "images_2")
    assert not part.exists()


def test_two_runs_at_once_end_with_one_whole_cache(tmp_path):
    paths = make_images(tmp_path / "images", 6)
    results: list[list[Path]] = []
    threads = [
        threading.Thread(target=lambda: results.append(downscaled(paths, 2, tmp_path / "images_2"))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(r == results[0] for r in results)
    assert len(check_readable(results[0])) == 6
    assert {p.name for p in tmp_path.iterdir()} == {"images", "images_2"}


def test_what_another_run_removes_meanwhile_is_no_reason_to_write_elsewhere(tmp_path):
    paths = make_images(tmp_path / "images", 2)
    (tmp_path / ".images_2.part-gone").symlink_to(tmp_path / "nothing")  # is listed, and then not there
    assert [p.parent for p in downscaled(paths, 2, tmp_path / "images_2")] == [tmp_path / "images_2"] * 2


@contextlib.contextmanager
def ordinary_user():
    """Root may write anywhere: act as another user for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_read_only_data_is_reduced_into_the_user_cache(monkeypatch):
    root = Path(tempfile.mkdtemp(dir="/tmp"))  # pytest's own folder is closed to other users
    try:
        root.chmod(0o755)
        paths = make_images(root / "scene" / "images", 2)
        cache = root / "cache"
        cache.mkdir()
        cache.chmod(0o777)
        (root / "scene").chmod(0o555)
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        with ordinary_user():
            made = downscaled(paths, 2, root / "scene" / "images_2")
            again = downscaled(paths, 2, root / "scene" / "images_2")
        assert made == again
        assert all(p.is_relative_to(cache / "diffusionerf_ns" / "images") for p in made)
        assert [p.name for p in (root / "scene").iterdir()] == ["images"]
        (root / "nowhere").mkdir(mode=0o555)
        monkeypatch.setenv("XDG_CACHE_HOME", str(root / "nowhere"))
        with ordinary_user(), pytest.raises(InputError, match="XDG_CACHE_HOME"):
            downscaled(paths, 2, root / "scene" / "images_2")
    finally:
        (root / "scene").chmod(0o755)
        shutil.rmtree(root)


def test_a_truncated_image_is_named(tmp_path):
    (path,) = make_images(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"im000\.png"):
        check_readable([path])
    with pytest.raises(InputError, match=r"im000\.png"):
        downscaled([path], 2, tmp_path / "images_2")
    assert not (tmp_path / "images_2").exists()


def test_hidden_and_other_files_are_not_images(tmp_path):
    make_images(tmp_path, 2)
    for name in ("._im000.png", ".DS_Store", "notes.txt", CACHE_FILE):
        (tmp_path / name).write_bytes(b"x")
    assert [p.name for p in list_images(tmp_path)] == ["im000.png", "im001.png"]


def test_folders_are_not_images_whatever_their_name(tmp_path):
    make_images(tmp_path, 1)
    (tmp_path / "album.jpg").mkdir()
    (tmp_path / "lost.jpg").symlink_to(tmp_path / "moved.jpg")
    assert [p.name for p in list_images(tmp_path)] == ["im000.png", "lost.jpg"], "a link to nothing is not passed over"


def test_jpegs_as_some_browsers_name_them_are_images(tmp_path):
    paths = make_images(tmp_path, 2, suffix=".jfif")
    assert list_images(tmp_path) == list_images(tmp_path, images.PHOTOGRAPH_SUFFIXES) == paths
    assert len(check_readable(downscaled(paths, 2, tmp_path / "small"))) == 2


@pytest.mark.parametrize(
    ("size", "other", "same"),
    [
        ((1008, 335), (3024, 1007), True),
        ((3024, 1007), (1008, 335), True),
        ((335, 1008), (1007, 3024), True),
        ((100, 8), (400, 35), True),
        ((504, 378), (4032, 3024), True),
        ((1920, 1080), (1920, 1088), False),  # the rows that some films have more
        ((480, 270), (1920, 1088), False),
        ((30, 40), (40, 30), False),
        ((48, 48), (64, 48), False),
    ],
)
def test_shapes_are_the_same_but_for_rounding_of_each_side(size, other, same):
    assert same_shape(size, other) is same

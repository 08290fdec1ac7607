"""What `make demo` says of what it measured."""

import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

from diffusionerf_ns.demo import images_judged, show


@pytest.mark.parametrize(
    ("train", "test", "said"),
    [([1, 2, 3], [0, 4], "2 held-out images"), ([1, 2, 3], [1, 2, 3], "3 training images themselves")],
)
def test_the_heading_says_whether_images_were_held_out(train, test, said):
    split = {kind: [{"id": i, "name": str(i)} for i in ids] for kind, ids in (("train", train), ("test", test))}
    assert said in images_judged({"images": test, "split": split})


def test_the_command_that_is_printed_holds_in_folders_of_any_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    split = {kind: [{"id": i, "name": str(i)}] for i, kind in enumerate(("train", "test"))}
    result = {
        "images": [1],
        "split": split,
        "metrics": {"psnr": 20.0},
        "seconds": {"train": 60.0},
        "protocol": "nerfstudio",
        "device": "cpu",
        "config_file": "run/config.yml",
    }
    folder = Path("it's my demo") / "default"
    show([SimpleNamespace(title="one", folder=folder, result=result)], folder.parent / "sheet.png")
    printed = capsys.readouterr().out
    command = printed[printed.index("ns-viewer") :].strip()
    assert shlex.split(command) == ["ns-viewer", "--load-config", str(folder / "run" / "config.yml")]

"""The README is true: its figures are those of the files that commands wrote, and what it points to exists."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_figures_are_those_of_the_files() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "update_readme.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_module_is_named_in_the_architecture() -> None:
    lines = (ROOT / "docs" / "architecture.md").read_text().splitlines()
    for package in ("diffusionerf_ns", "ddm_training"):
        for path in sorted((ROOT / package).rglob("[!_]*.py")):
            folder = path.parent.relative_to(ROOT).as_posix()
            of_folder = [line for line in lines if re.match(rf"\* `{folder}/\w+\.py`", line)]  # one folder a line
            names = {name for line in of_folder for name in re.findall(r"`(?:[\w/]+/)?(\w+\.py)`", line)}
            assert path.name in names, f"{folder}/{path.name} is not named in docs/architecture.md"


def test_the_architecture_names_no_module_that_is_not_there() -> None:
    for line in (ROOT / "docs" / "architecture.md").read_text().splitlines():
        if begins := re.match(r"\* `((?:diffusionerf_ns|ddm_training)[\w/]*)/\w+\.py`", line):
            missing = [name for name in re.findall(r"`(\w+\.py)`", line) if not (ROOT / begins[1] / name).exists()]
            assert not missing, line


def test_links_and_named_files_exist() -> None:
    for document in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = document.read_text()
        links = re.findall(r"\]\(((?!http)[^)#]+)\)", text)
        files = re.findall(r"`((?:diffusionerf_ns|ddm_training)/[\w/]+(?:\.py|/))`", text)
        if document.name == "README.md":
            assert len(links) >= 4
        if document.name == "architecture.md":
            assert len(files) >= 4
        missing = [name for name in links if not (document.parent / name).exists()]
        missing += [name for name in files if not (ROOT / name).exists()]
        assert not missing, document.name

"""The package: light entry points, and a wheel that is whole and works where nothing else of the project lies."""

import os
import resource
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
METHODS = PROJECT["entry-points"]["nerfstudio.method_configs"]
PARSERS = PROJECT["entry-points"]["nerfstudio.dataparser_configs"]
HEAVY = {"diffusers", "accelerate", "transformers", "cv2", "h5py", "matplotlib", "scipy", "skimage", "lpips", "pandas"}

# nerfstudio first, without our entry points, then ours: prints our CPU seconds and the modules that only we bring.
MEASURE = """
import importlib.metadata as metadata, sys, time
every = metadata.entry_points
def without_ours(**which):
    found = every(**which)
    if not which.get("group", "").startswith("nerfstudio"):
        return found
    return metadata.EntryPoints(e for e in found if not e.value.startswith("diffusionerf_ns"))
metadata.entry_points = without_ours
import nerfstudio.configs.method_configs
assert "diffusionerf_ns" not in sys.modules
before, start = set(sys.modules), time.process_time()
import diffusionerf_ns.dataparsers.specifications, diffusionerf_ns.config
seconds = time.process_time() - start
print(seconds, *sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""


def environment(**more: str) -> dict[str, str]:
    # Type checks of the tests must not follow into the measured process.
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"} | more


def run(command: list[str], cwd: Path, **more: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=environment(**more), cwd=cwd, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.slow
def test_the_entry_points_add_little_to_nerfstudios_own_import_and_nothing_heavy(tmp_path):
    seconds = []
    for _ in range(3):  # the least of several: noise only ever adds
        took, *brought = run([sys.executable, "-c", MEASURE], tmp_path).split()
        assert not HEAVY & set(brought), "imported by us alone"
        seconds.append(float(took))
        if seconds[-1] < 0.2:
            break
    assert min(seconds) < 0.2, seconds


@pytest.mark.parametrize("group", ["nerfstudio.method_configs", "nerfstudio.dataparser_configs"])
def test_every_entry_point_names_a_specification_of_nerfstudio(group):
    from nerfstudio.plugins.registry_dataparser import DataParserSpecification
    from nerfstudio.plugins.types import MethodSpecification

    ours = {e.name: e for e in entry_points(group=group) if e.value.startswith("diffusionerf_ns")}
    assert ours.keys() == PROJECT["entry-points"][group].keys(), "install the project again: pip install -e ."
    kind = MethodSpecification if group.endswith("method_configs") else DataParserSpecification
    for name, entry in ours.items():
        spec = entry.load()
        assert isinstance(spec, kind), name
        assert spec.description, name
        if isinstance(spec, MethodSpecification):
            assert spec.config.method_name == name, "saved configs find their method by this name"


def test_presets_share_no_part_that_a_command_line_changes():
    from nerfstudio.configs.method_configs import all_methods

    full, tiny = (all_methods[name].pipeline for name in ("diffusionerf", "diffusionerf-tiny"))
    assert full.model is not tiny.model
    assert full.datamanager is not tiny.datamanager


def test_schedules_and_optimisers_of_every_preset_survive_a_checkpoint():
    """numpy's numbers in an optimiser's state cannot be loaded again (torch >= 2.6)."""
    import io

    import torch
    from nerfstudio.configs.method_configs import all_methods

    for name in METHODS:
        for group in all_methods[name].optimizers.values():
            parameter = torch.nn.Parameter(torch.ones(3))
            optimizer = group["optimizer"].setup([parameter])
            scheduler = group["scheduler"].setup().get_scheduler(optimizer, group["optimizer"].lr)
            parameter.sum().backward()
            for _ in range(3):
                optimizer.step()
                scheduler.step()
            file = io.BytesIO()
            torch.save({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, file)
            file.seek(0)
            torch.load(file, weights_only=True)


def test_the_help_of_ddm_is_quick_and_imports_nothing_heavy(tmp_path):
    code = (
        "import sys\nfrom ddm_training import cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        f"heavy = {HEAVY - {'scipy'} | {'nerfstudio'}!r} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    page = run([sys.executable, "-c", code], tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "hypersim" in page
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5.0


# The wheel


def tracked() -> list[Path]:
    """Files of the two packages as git knows them, and new ones that it does not ignore."""
    listed = run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "diffusionerf_ns", "ddm_training"], ROOT
    )
    return [Path(line) for line in listed.splitlines() if (ROOT / line).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of the sources, so that nothing is left in them."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    extra = [Path(name) for name in ("pyproject.toml", "README.md", "LICENSE") if (ROOT / name).is_file()]
    for path in [*tracked(), *extra, Path("tests/conftest.py"), Path("tests/test_package.py")]:
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_bytes((ROOT / path).read_bytes())
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)], folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_the_priors_and_no_tests(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {str(p) for p in tracked() if p.suffix == ".py" or "priors" in p.parts}
    assert not wanted - held
    tops = {name.partition("/")[0] for name in held}
    assert tops == {"diffusionerf_ns", "ddm_training", f"diffusionerf_ns-{PROJECT['version']}.dist-info"}


@pytest.mark.slow
def test_a_clean_environment_with_the_wheel_lists_the_methods(wheel, tmp_path):
    """Third-party packages are those of this environment; the project itself must come from the wheel."""
    clean = tmp_path / "clean"
    venv.create(clean, with_pip=False, symlinks=True)
    python = clean / "bin" / "python"
    # Before the other packages are in sight, so that pip finds no older copy of the project to remove.
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    run([*pip, str(wheel)], tmp_path)
    packages = Path(
        run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], tmp_path).strip()
    )
    (packages / "third_party.pth").write_text(sysconfig.get_path("purelib") + "\n")

    code = (
        "import ddm_training, diffusionerf_ns, diffusionerf_ns.prior as p\n"
        "print(ddm_training.__file__, diffusionerf_ns.__file__, *p.builtin_priors().values(), sep='\\n')"
    )
    for line in run([str(python), "-c", code], tmp_path).splitlines():
        assert line.startswith(str(packages)), line
    page = run([str(python), "-m", "nerfstudio.scripts.train", "--help"], tmp_path, COLUMNS="200")
    for name in METHODS:
        assert f" {name} " in page, name
    assert (clean / "bin" / "ddm").is_file()
    assert (clean / "bin" / "diffusionerf-bench").is_file()
    parsers: Callable[[str], str] = lambda method: run(  # noqa: E731
        [str(python), "-m", "nerfstudio.scripts.train", method, "--help"], tmp_path, COLUMNS="200"
    )
    listed = parsers("diffusionerf-tiny")
    for name in PARSERS:
        assert name in listed, name

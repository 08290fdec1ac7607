"""nerfstudio's commands as processes of their own, without paying for their imports each time.

`Commands` starts one Python process that imports nerfstudio once and then forks: each child is a process of its own
that runs the entry point of a command with the arguments it is given, and ends as Python ends.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "COLUMNS": "200",
    "MPLBACKEND": "Agg",
    "TORCHDYNAMO_DISABLE": "1",  # nothing here runs long enough to pay for a compilation
}


@dataclass(frozen=True)
class Finished:
    """What a command leaves behind."""

    status: int
    stdout: str
    stderr: str

    def __post_init__(self) -> None:
        assert self.status != 124, f"took too long\n{self.stdout[-2000:]}\n{self.stderr[-2000:]}"

    def ok(self) -> "Finished":
        """Itself; fails with all the command's output where its status is not 0."""
        assert self.status == 0, f"status {self.status}\n{self.stdout[-4000:]}\n{self.stderr[-4000:]}"
        return self

    def message(self) -> str:
        """What a user sees of a mistake: all of stderr; fails unless status is 1."""
        assert self.status == 1, f"status {self.status}\n{self.stdout[-4000:]}\n{self.stderr[-4000:]}"
        return self.stderr.strip()


def environment(folder: Path) -> dict[str, str]:
    """Of a command that has no network, no GPU and no cache of the user; with an `ffmpeg` that is never run."""
    bin = folder / "bin"
    bin.mkdir(exist_ok=True)
    (bin / "ffmpeg").write_text("#!/bin/sh\nexit 1\n")  # nerfstudio wants to see one, also where it writes images
    (bin / "ffmpeg").chmod(0o755)
    caches = {name: str(folder / name.lower()) for name in ("HF_HOME", "TORCH_HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR")}
    path = f"{Path(sys.executable).parent}:{bin}:{os.environ['PATH']}"
    return os.environ | ENVIRONMENT | caches | {"CUDA_VISIBLE_DEVICES": "", "PATH": path, "HOME": str(folder)}


class Commands:
    """Runs console scripts by name in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Without Python's warnings, of which nerfstudio on a new torch has many: stderr is then what the command says.
        self.environment = environment(folder) | {"PYTHONWARNINGS": "ignore"}
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self.environment,
            cwd=folder,
        )
        self._count = 0

    def run(self, *arguments: object, timeout: float = 600.0) -> Finished:
        """Run a command to its end.

        Args:
            arguments: the script's name, then what it is given.
            timeout: seconds of wall time after which it is stopped.
        """
        self._count += 1
        files = [self.folder / f"{self._count}.{name}" for name in ("stdout", "stderr")]
        job = {"argv": [str(a) for a in arguments], "files": [str(f) for f in files], "timeout": timeout}
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        status = int(self._server.stdout.readline())
        return Finished(status, *(f.read_text() for f in files))

    def close(self) -> None:
        """End the process that waits for commands."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(60)


def script(*arguments: object, folder: Path, timeout: float = 900.0) -> Finished:
    """Run an installed console script itself, imports and all."""
    name, *rest = map(str, arguments)
    command = [str(Path(sys.executable).parent / name), *rest]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(folder), cwd=folder, timeout=timeout, check=False
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def _child(job: dict[str, Any]) -> None:
    """Be the command: never returns."""
    for number, name in enumerate(job["files"], start=1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = job["argv"]
    status = 0
    try:
        importlib.metadata.entry_points(group="console_scripts")[sys.argv[0]].load()()
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _serve() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print is not an answer
    import diffusers.models.unets.unet_2d
    import diffusers.schedulers.scheduling_ddpm  # noqa: F401
    import nerfstudio.scripts.eval
    import nerfstudio.scripts.render
    import nerfstudio.scripts.train  # noqa: F401

    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            _child(job)
        end = time.monotonic() + job["timeout"]
        while (done := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < end:
            time.sleep(0.02)
        if done[0] == 0:
            os.kill(child, 9)
            os.waitpid(child, 0)
        print(124 if done[0] == 0 else os.waitstatus_to_exitcode(done[1]), file=out, flush=True)


if __name__ == "__main__":
    _serve()

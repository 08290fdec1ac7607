"""What a user sees of an error at the end of a command."""

import subprocess
import sys

import pytest

PREAMBLE = """
from ddm_training.errors import InputError
from diffusionerf_ns.errors import show_input_errors_plainly
from diffusionerf_ns.gradients import NonFiniteLossError
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", PREAMBLE + code], capture_output=True, text=True, check=False)


def test_an_input_error_shows_its_message_alone_and_ends_with_status_one():
    result = run(
        "show_input_errors_plainly()\nshow_input_errors_plainly()\nprint('before')\nraise InputError('no folder x')"
    )
    assert result.returncode == 1
    assert result.stdout == "before\n"
    assert result.stderr == "\nError: no folder x\n"


def test_subclasses_show_plainly_too():
    result = run("show_input_errors_plainly()\nraise NonFiniteLossError('rgb_loss is nan')")
    assert (result.returncode, result.stderr) == (1, "\nError: rgb_loss is nan\n")


def test_every_other_error_keeps_its_traceback():
    result = run("show_input_errors_plainly()\nraise ValueError('a bug')")
    assert result.returncode == 1
    assert "Traceback (most recent call last)" in result.stderr
    assert "ValueError: a bug" in result.stderr


def test_importing_changes_nothing():
    result = run("raise InputError('no folder x')")
    assert "Traceback (most recent call last)" in result.stderr


def test_the_hook_that_was_there_before_is_kept_for_other_errors():
    result = run(
        "import sys\nsys.excepthook = lambda kind, error, traceback: print('earlier hook:', error)\n"
        "show_input_errors_plainly()\nraise KeyError('k')"
    )
    assert result.stdout == "earlier hook: 'k'\n"
    assert result.stderr == ""


def test_asking_again_does_not_stack_hooks():
    result = run(
        "import sys\nshow_input_errors_plainly()\nhook = sys.excepthook\n"
        "show_input_errors_plainly()\nassert sys.excepthook is hook"
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("wrong", "status", "said"), [("InputError('no x')", 2, "error: no x\n"), ("KeyboardInterrupt", 130, "")]
)
def test_commands_end_plainly(wrong, status, said):
    code = "from ddm_training.errors import ends_plainly\nwith ends_plainly({}):\n    raise " + wrong
    for given, more in (("", ""), ("at_ctrl_c='run it again'", "run it again\n" if status == 130 else "")):
        result = run(code.format(given))
        assert (result.returncode, result.stderr) == (status, said + more)

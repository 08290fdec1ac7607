"""What a user sees of an error at the end of a command."""

import math
import subprocess
import sys
from types import SimpleNamespace

import pytest

from ddm_training.errors import InputError, require_at_least, require_positive

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


@pytest.mark.parametrize("value", [0, 1.5, math.nan])
def test_a_setting_that_is_too_small_is_refused_by_its_flag(value):
    require_at_least(SimpleNamespace(some_count=2, other=None), some_count=2, other=1)
    with pytest.raises(InputError, match=f"^--some-count must be at least 2, found {value}.$"):
        require_at_least(SimpleNamespace(some_count=value), some_count=2)


@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan])
def test_a_setting_that_is_not_positive_is_refused_by_its_flag(value):
    require_positive(SimpleNamespace(scale=1e-9, other=None), "scale", "other")
    with pytest.raises(InputError, match=f"^--a.the-scale must be positive and finite, found {value}.$"):
        require_positive(SimpleNamespace(the_scale=value), "the_scale", below="a.")

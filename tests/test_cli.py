"""The command `ddm`: every subcommand exists, is light to name, and ends user mistakes with a message and status 2."""

import subprocess
import sys

import pytest

from ddm_training import cli
from ddm_training.errors import InputError


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_shows_its_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*name.split(), "--help"])
    assert stop.value.code == 0
    assert f"usage: ddm {name}" in capsys.readouterr().out


def test_the_first_page_names_all_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    page = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert name.split()[0] in page


def test_configs_parse_with_the_flag_names_of_diffusers_scripts():
    config = cli.parse(
        ["train", "--data", "a", "b", "--data-weights", "3", "1", "--output-dir", "out", "--train-batch-size", "8",
         "--max-train-steps", "5", "--learning-rate", "1e-4", "--mixed-precision", "no", "--checkpointing-steps", "2",
         "--checkpoints-total-limit", "3", "--resume-from-checkpoint", "latest", "--validation-steps", "4", "--seed",
         "1", "--torch-compile", "--push-to-hub", "--hub-model-id", "me/prior", "--focal-range", "100", "200"]
    )  # fmt: skip
    assert [str(path) for path in config.data] == ["a", "b"]
    assert config.data_weights == (3.0, 1.0)
    assert (config.train_batch_size, config.focal_range, config.push_to_hub) == (8, (100.0, 200.0), True)


def test_user_mistakes_end_with_a_message_and_status_2(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--data", str(tmp_path / "nowhere"), "--output-dir", str(tmp_path / "out")])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "nowhere is not a folder" in message
    assert "Traceback" not in message


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["hypersim"], ["train", "--no-such-flag"]])
def test_usage_errors_end_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2


def test_programming_errors_keep_their_traceback(monkeypatch):
    class Broken:
        def main(self):
            raise KeyError("bug")

    monkeypatch.setattr(cli, "parse", lambda args: Broken())
    with pytest.raises(KeyError):
        cli.main([])
    assert not issubclass(KeyError, InputError)


def test_naming_a_command_imports_no_heavy_library():
    code = (
        "import sys; from ddm_training.cli import parse\n"
        "parse(['train', '--data', 'a', '--output-dir', 'b'])\n"
        "heavy = {'diffusers', 'accelerate', 'matplotlib', 'h5py', 'nerfstudio'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

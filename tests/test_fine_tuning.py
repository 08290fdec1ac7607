"""`--pretrained`: trainings that begin with the weights of a prior, and what their cards tell of it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import toy_training
from toy_training import config, make_store

from ddm_training.errors import InputError
from ddm_training.rgbd import RgbdSpec
from ddm_training.unet import load_unet

pytestmark = pytest.mark.usefixtures("one_thread")
store = toy_training.store  # a fixture
BEGUN = "begun with weights of an earlier training (toy, 2 steps, licence MIT)"


@pytest.fixture(scope="module")
def prior(store, tmp_path_factory):
    """A prior, trained on "toy"."""
    folder = tmp_path_factory.mktemp("prior")
    config(store, folder, max_train_steps=2, license="MIT").main()
    return folder / "prior"


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A store of another source."""
    return make_store(tmp_path_factory.mktemp("other"), "garden")


def test_a_training_begins_with_the_weights_of_a_prior(other, prior, tmp_path):
    one = {"seed": 5, "learning_rate": 1e-9, "max_train_steps": 1}
    config(other, tmp_path / "tuned", pretrained=prior, **one).main()
    config(other, tmp_path / "fresh", **one).main()
    before, after, fresh = (
        load_unet(folder).state_dict() for folder in (prior, tmp_path / "tuned" / "prior", tmp_path / "fresh" / "prior")
    )
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-6)
    assert any(not torch.allclose(fresh[name], value, atol=1e-3) for name, value in before.items())
    assert BEGUN in (tmp_path / "tuned" / "prior" / "README.md").read_text()
    assert RgbdSpec.load(tmp_path / "tuned" / "prior").trained_on == ("garden", "toy")
    assert "begun with" not in (tmp_path / "fresh" / "prior" / "README.md").read_text()
    assert RgbdSpec.load(tmp_path / "fresh" / "prior").trained_on == ("garden",)


def test_a_training_goes_on_without_the_weights_it_began_with_and_still_tells_of_them(other, prior, tmp_path):
    moved = shutil.copytree(prior, tmp_path / "moved")
    config(other, tmp_path / "parts", pretrained=moved, max_train_steps=2, lr_scheduler="constant").main()
    shutil.rmtree(moved)
    config(other, tmp_path / "parts", pretrained=moved, max_train_steps=4, lr_scheduler="constant").main()
    config(other, tmp_path / "whole", pretrained=prior, max_train_steps=4, lr_scheduler="constant").main()
    toy_training.assert_same_weights(*(toy_training.state(tmp_path / name, 4) for name in ("parts", "whole")))
    assert BEGUN in (tmp_path / "parts" / "prior" / "README.md").read_text()
    assert RgbdSpec.load(tmp_path / "parts" / "prior").trained_on == ("garden", "toy")


def test_what_a_training_began_with_cannot_be_changed(other, prior, tmp_path):
    config(other, tmp_path / "random", max_train_steps=2).main()
    with pytest.raises(InputError, match=r"checkpoint-2 began with random weights, not with --pretrained .*/prior"):
        config(other, tmp_path / "random", pretrained=prior).main()
    assert not (tmp_path / "random" / "origin.json").exists()
    config(other, tmp_path / "random").main()
    assert RgbdSpec.load(tmp_path / "random" / "prior").trained_on == ("garden",)
    config(other, tmp_path / "tuned", pretrained=prior, max_train_steps=2).main()
    with pytest.raises(InputError, match=r"checkpoint-2 began with --pretrained .*/prior, not with random weights"):
        config(other, tmp_path / "tuned").main()


def test_the_weights_that_a_training_began_with_may_be_typed_otherwise(other, prior, tmp_path, monkeypatch):
    config(other, tmp_path / "tuned", pretrained=prior, max_train_steps=1).main()
    monkeypatch.chdir(prior.parent)
    config(other, tmp_path / "tuned", pretrained=Path("prior"), max_train_steps=2).main()
    assert toy_training.state(tmp_path / "tuned", 2)["step"] == 2
    (tmp_path / "tuned" / "origin.json").write_text("{")
    with pytest.raises(InputError, match=r"origin\.json cannot be read .*delete it"):
        config(other, tmp_path / "tuned", pretrained=prior, max_train_steps=3).main()


def test_weights_that_do_not_fit_are_refused(other, prior, tmp_path):
    def begin(folder, **changed) -> None:
        config(other, tmp_path / "out", pretrained=folder, **changed).main()

    with pytest.raises(InputError, match=r"--pretrained .* holds another network than --preset tiny asks for"):
        begin(prior, preset="tiny")
    with pytest.raises(InputError, match=r"v_prediction.*wanted .*epsilon"):
        begin(prior, prediction_type="epsilon")
    with pytest.raises(InputError, match="is not a prior folder"):
        begin(tmp_path)
    for file, name, value, message in (
        ("unet/config.json", "norm_num_groups", 16, r"prototype asks for \(norm_num_groups 16\)"),
        ("rgbd.json", "near", 0.5, r"\(0\.5, 'v_prediction'\)"),
    ):
        folder = shutil.copytree(prior, tmp_path / name)
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, name: value}))
        with pytest.raises(InputError, match=message):
            begin(folder)
    assert not list((tmp_path / "out").glob("checkpoint-*"))

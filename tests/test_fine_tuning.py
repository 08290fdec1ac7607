"""`ddm train --pretrained`: a training that begins with the weights of a prior."""

import pytest
import torch
import toy_training
from toy_training import config

from ddm_training.errors import InputError
from ddm_training.rgbd import RgbdSpec
from ddm_training.unet import load_unet

pytestmark = pytest.mark.usefixtures("one_thread")
store = toy_training.store  # a fixture


def test_a_training_begins_with_the_weights_of_a_prior(store, tmp_path):
    config(store, tmp_path / "first").main()
    first, second = tmp_path / "first" / "prior", tmp_path / "second" / "prior"
    config(store, tmp_path / "second", pretrained=first, seed=5, learning_rate=1e-9, max_train_steps=1).main()
    before, after = (load_unet(folder).state_dict() for folder in (first, second))
    config(store, tmp_path / "fresh", seed=5, learning_rate=1e-9, max_train_steps=1).main()
    fresh = load_unet(tmp_path / "fresh" / "prior").state_dict()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-6)
    assert any(not torch.allclose(fresh[name], value, atol=1e-3) for name, value in before.items())
    assert "begun from trained weights (prior)" in (second / "README.md").read_text()
    assert "begun from" not in (first / "README.md").read_text()
    assert RgbdSpec.load(second).trained_on == ("toy",)


def test_weights_of_another_network_are_refused_with_the_flag_to_change(store, tmp_path):
    config(store, tmp_path / "first", max_train_steps=1).main()
    first = tmp_path / "first" / "prior"
    with pytest.raises(InputError, match=r"--pretrained .* holds another network than --preset tiny asks for"):
        config(store, tmp_path / "second", pretrained=first, preset="tiny").main()
    with pytest.raises(InputError, match=r"was trained with --prediction-type v_prediction"):
        config(store, tmp_path / "second", pretrained=first, prediction_type="epsilon").main()
    with pytest.raises(InputError, match="is not a prior folder"):
        config(store, tmp_path / "second", pretrained=tmp_path).main()

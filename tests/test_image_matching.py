"""The training images are matched as a run's settings say, and the user is told what was found."""

from pathlib import Path

import box_room
import numpy as np
import pytest
import torch
from PIL import Image

from ddm_training.completion import FOLDER, CompletionSpec, make_network, save_completer
from ddm_training.errors import InputError
from diffusionerf_ns import completion
from diffusionerf_ns.bounds import StereoBounds
from diffusionerf_ns.datamanager import DiffusioNeRFDataManagerConfig
from diffusionerf_ns.dataparsers.few_view import FewViewDataParserConfig
from diffusionerf_ns.dataset import FewViewDataset
from diffusionerf_ns.image_matching import match_images
from diffusionerf_ns.stereo_rays import StereoRays


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> FewViewDataset:
    """Training images 0 2 4 5 of a room, 96 x 72."""
    capture = box_room.write_transforms(tmp_path_factory.mktemp("data") / "box")
    return FewViewDataset(FewViewDataParserConfig(data=capture).setup().get_dataparser_outputs("train"))


def found(data: FewViewDataset, **settings: object) -> tuple[StereoBounds, StereoRays]:
    result = match_images(data, DiffusioNeRFDataManagerConfig(**settings), "cpu")
    assert result is not None
    return result


def told(capsys) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_where_the_scene_lies_is_found(data, capsys):
    bounds, _ = found(data)
    depths = [Path(path) for path in data.metadata["depth_filenames"]]
    metres = np.concatenate([np.asarray(Image.open(path)).ravel() / 1000 for path in depths])
    low, high = np.quantile(metres, [0.01, 0.99]) * data.metadata["scene_units_per_metre"]
    assert low * 0.9 < bounds.near < 1 / bounds.median_disparity < bounds.far < high * 1.1
    assert f"at depths of {bounds.near:.3g} to {bounds.far:.3g} scene units" in told(capsys)


def test_depth_is_completed_by_the_network_of_a_prior_that_has_one(data, tmp_path, capsys):
    torch.manual_seed(0)
    network = make_network()
    torch.nn.init.constant_(network.conv_out.bias, 0.0)
    save_completer(tmp_path / FOLDER, network, CompletionSpec(size=(32, 24)))
    completed = found(data, completion_prior=str(tmp_path), completion_steps=2)[1].completed
    assert f"completed by the prior {tmp_path}" in told(capsys).replace("/ ", "/")
    interpolated = found(data, completion="membrane", completion_prior=str(tmp_path))[1].completed
    assert "interpolated between them" in told(capsys)
    # Its correction is nought, so it gives the membrane of few pixels, and an error of e^0 and what enlarging adds.
    assert bool((completed.error >= 1.0).all())
    assert float(completed.error.median()) < 1.1
    assert bool(interpolated.error.isinf().all())
    both = (completed.values > 0) & (interpolated.values > 0)
    assert both.float().mean() > 0.8
    assert 0.0 < (completed.values / interpolated.values - 1.0)[both].abs().median() < 0.03


def test_a_prior_without_a_network_interpolates_and_says_so(data, tmp_path, capsys):
    _, rays = found(data, completion_prior=str(tmp_path))
    assert "has no network that completes depth" in told(capsys)
    assert bool(rays.completed.error.isinf().all())


def test_a_damaged_network_is_refused(data, tmp_path):
    (tmp_path / FOLDER).mkdir()
    with pytest.raises(InputError, match="is no completion network"):
        found(data, completion_prior=str(tmp_path))


@pytest.mark.parametrize("steps", [0, 7])
def test_the_images_are_completed_together_in_as_many_steps_as_are_asked_for(data, tmp_path, monkeypatch, steps):
    asked = []

    def complete(network, views, steps):
        asked.append((len(views), steps))
        return completion.alone(network.complete)(views)

    monkeypatch.setattr("diffusionerf_ns.image_matching.complete_together", complete)
    save_completer(tmp_path / FOLDER, make_network(), CompletionSpec(size=(32, 24)))
    found(data, completion_prior=str(tmp_path), completion_steps=steps)
    assert asked == [(len(data), steps)]

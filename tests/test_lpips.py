"""LPIPS: the official figures and package, and what happens where its weights are not to be had."""

import math
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from noisy_image import images
from PIL import Image
from torch import Tensor
from torchvision.models import alexnet as alexnet_of
from torchvision.models import vgg16

from diffusionerf_ns import lpips as lpips_module
from diffusionerf_ns.lpips import LpipsNetworks
from diffusionerf_ns.metrics import average_error, evaluate_image


def read_png(path: Path) -> Tensor:
    return torch.from_numpy(np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) / 255)


@pytest.mark.parametrize(("name", "distance"), [("ex_p0", 0.7219), ("ex_p1", 0.1376)])
def test_lpips_of_the_official_images_is_the_official_figure(alexnet, real_data, name, distance):
    folder = real_data("lpips/imgs")
    found = alexnet.distance("alex", read_png(folder / f"{name}.png"), read_png(folder / "ex_ref.png"))
    assert found == pytest.approx(distance, abs=5e-5)


@pytest.mark.slow
def test_lpips_with_vgg_is_the_one_of_the_lpips_package(offline, recwarn):
    """The true VGG-16 weights are not needed to see that both build the same network from the same file."""
    import lpips

    with torch.device("meta"):
        shapes = vgg16(weights=None).state_dict()
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.zeros(1).expand(value.shape)  # one stored number: the classifier is not used
        if name.startswith("classifier") or value.ndim == 1
        else torch.randn(value.shape, generator=generator) * math.sqrt(2 / value[0].numel())
        for name, value in shapes.items()
    }
    torch.save(weights, offline / "vgg16-397923af.pth")
    pred, true = images(h=48, w=56)
    with torch.no_grad():
        a, b = (image.permute(2, 0, 1)[None] for image in (pred, true))
        expected = float(lpips.LPIPS(net="vgg", verbose=False)(a, b, normalize=True))
    assert expected > 0.01
    assert LpipsNetworks().distance("vgg", pred, true) == pytest.approx(expected, abs=1e-5)


def test_lpips_without_weights_is_left_out_and_said_once(offline):
    networks = LpipsNetworks()
    with pytest.warns(UserWarning, match=r"left out.*cannot be had") as record:
        first, second = (evaluate_image("llff-regnerf", *images(), lpips=networks) for _ in range(2))
    said = [str(w.message) for w in record if "left out" in str(w.message)]
    assert len(said) == 2, "once for VGG and once for AlexNet, not again for the second image"
    assert "vgg16-397923af.pth" in said[0]
    assert list(first) == list(second) == ["psnr", "ssim"]


def test_with_alexnet_alone_its_average_is_given_and_the_other_left_out(alexnet):
    pred, true = images(h=64, w=64)
    with pytest.warns(UserWarning, match="LPIPS with vgg is left out"):
        values = evaluate_image("llff-regnerf", pred, true, lpips=alexnet)
    assert list(values) == ["psnr", "ssim", "lpips_alex", "average_alex"]
    expected = average_error(values["psnr"], values["ssim"], values["lpips_alex"])
    assert values["average_alex"] == expected


def test_lpips_of_images_too_small_for_a_network_is_left_out_and_said_once(offline):
    """Tried without weights, which would be the next thing to be said."""
    networks = LpipsNetworks()
    with pytest.warns(UserWarning, match="left out") as record:
        found = [
            networks.distance(backbone, *images(h=h, w=w)) for backbone, h, w in 2 * [("alex", 40, 30), ("vgg", 15, 40)]
        ]
    assert found == [None] * 4
    said = [str(w.message) for w in record if "left out" in str(w.message)]
    assert len(said) == 2
    assert "alex is left out of the results: an image is 30 x 40, and it needs 31 pixels a side" in said[0]
    assert "vgg is left out of the results: an image is 40 x 15, and it needs 16 pixels a side" in said[1]


@pytest.mark.parametrize("backbone", ["alex", "vgg"])
def test_the_least_side_is_that_of_which_the_layers_leave_something(backbone):
    """LPIPS compares what the convolutions give, the last of the pooling left out."""
    with torch.device("meta"):
        layers = {"alex": alexnet_of, "vgg": vgg16}[backbone](weights=None).features[:-1]
        least = lpips_module.LEAST_SIDE[backbone]
        assert layers(torch.empty(1, 3, least, 64)).numel() > 0
        with pytest.raises(RuntimeError, match="too small"):
            layers(torch.empty(1, 3, least - 1, 64))


def test_networks_are_made_when_first_wanted(offline, recwarn):
    LpipsNetworks()
    evaluate_image("llff-regnerf", *images())
    assert not [w for w in recwarn if "LPIPS" in str(w.message)]


def test_damaged_weights_are_said_and_left_out(offline):
    (offline / "alexnet-owt-7be5be79.pth").write_bytes(b"half a file")
    with pytest.warns(UserWarning, match="LPIPS with alex is left out"):
        assert LpipsNetworks().distance("alex", *images()) is None


def test_nothing_is_asked_of_the_network_when_fetching_is_off(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(lpips_module, "probe", lambda url: pytest.fail("asked the network"))
    with pytest.warns(UserWarning, match="fetching is turned off"):
        assert LpipsNetworks(download=False).distance("alex", *images()) is None


def test_a_connection_that_hangs_is_given_up(monkeypatch):
    def hang(*args, **kwargs):
        time.sleep(2)
        raise urllib.error.URLError("too late")

    monkeypatch.setattr(urllib.request, "urlopen", hang)
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="no answer"):
        lpips_module.probe("http://localhost/weights", seconds=0.2)
    assert time.monotonic() - start < 1.5

"""LPIPS (Zhang et al., CVPR 2018, arXiv 1801.03924), made when it is first wanted, and its absence said once.

The linear layers come with torchmetrics; the AlexNet and VGG-16 weights below them are torchvision's and lie in the
checkpoint folder of torch hub (``$TORCH_HOME/hub/checkpoints``). Where they are not there, one attempt is made to fetch
them; without a connection LPIPS is left out of the results, never replaced by something else.
"""

import contextlib
import pickle
import threading
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from unittest import mock

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

Backbone = Literal["vgg", "alex"]
LEAST_SIDE: dict[Backbone, int] = {"vgg": 16, "alex": 31}  # pixels; of less their pooling leaves nothing
PROBE_SECONDS = 5.0  # a machine without a connection must not hang; name look-up has no time limit of its own


@contextlib.contextmanager
def no_lpips_download() -> Iterator[None]:
    """While nerfacto is built, which makes an LPIPS network, and fetches its weights, whether it is wanted or not."""
    with mock.patch("torchmetrics.image.lpip.LearnedPerceptualImagePatchSimilarity", return_value=None):
        yield


class LpipsNetworks:
    """The LPIPS networks of one process, each made at most once, when first wanted.

    Not an ``nn.Module`` on purpose: networks inside a model would end up in its checkpoints.

    Args:
        device: where the networks run.
        download: whether weights that are not on disk may be fetched.

    Example:
        >>> networks = LpipsNetworks()
        >>> networks.distance("vgg", pred, true)  # None where the VGG-16 weights cannot be had
    """

    def __init__(self, device: torch.device | str = "cpu", *, download: bool = True) -> None:
        self.device = torch.device(device)
        self.download = download
        self._networks: dict[Backbone, LearnedPerceptualImagePatchSimilarity | None] = {}
        self._found_small: set[Backbone] = set()

    def distance(self, backbone: Backbone, pred: Float[Tensor, "h w 3"], true: Float[Tensor, "h w 3"]) -> float | None:
        """LPIPS of two images with colours in [0, 1], taken to [-1, 1] at their own size; 0 is equal.

        Returns:
            The distance; NaN where an image holds values that are not finite; None where the network is not to be had,
            or an image has a side below `LEAST_SIDE`.
        """
        height, width = pred.shape[:2]
        if min(height, width) < LEAST_SIDE[backbone]:
            if backbone not in self._found_small:
                self._found_small.add(backbone)
                warnings.warn(
                    f"LPIPS with {backbone} is left out of the results: an image is {width} x {height}, and it needs "
                    f"{LEAST_SIDE[backbone]} pixels a side. Reduce the images less.",
                    stacklevel=3,
                )
            return None
        if backbone not in self._networks:
            self._networks[backbone] = self._make(backbone)
        network = self._networks[backbone]
        if network is None:
            return None
        if not (pred.isfinite().all() and true.isfinite().all()):
            return float("nan")
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            a, b = (
                image.detach().to(self.device, torch.float32).clamp(0.0, 1.0).permute(2, 0, 1)[None]
                for image in (pred, true)
            )
            value = float(network(a, b))
        network.reset()  # torchmetrics would keep every image's value
        return value

    def _make(self, backbone: Backbone) -> "LearnedPerceptualImagePatchSimilarity | None":
        url = weights_url(backbone)
        path = weights_path(backbone)
        try:
            if not path.is_file():
                if not self.download:
                    raise OSError("fetching is turned off")
                probe(url)
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

            return LearnedPerceptualImagePatchSimilarity(backbone, normalize=True).to(self.device)
        except (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            warnings.warn(
                f"LPIPS with {backbone} is left out of the results: its weights {path} cannot be had ({reason}). "
                f"Put the file of {url} there.",
                stacklevel=4,
            )
            return None


def weights_url(backbone: Backbone) -> str:
    """Where torchvision publishes the weights of a backbone."""
    from torchvision.models import AlexNet_Weights, VGG16_Weights

    return {"vgg": VGG16_Weights, "alex": AlexNet_Weights}[backbone].DEFAULT.url


def weights_path(backbone: Backbone) -> Path:
    """Where torchvision looks for the weights of a backbone before it fetches them."""
    return Path(torch.hub.get_dir()) / "checkpoints" / weights_url(backbone).rsplit("/", 1)[-1]


def probe(url: str, seconds: float = PROBE_SECONDS) -> None:
    """Ask for the head of ``url``.

    Raises:
        OSError: no answer within ``seconds``, or an error.
    """
    outcome: list[OSError | None] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
            outcome.append(None)
        except OSError as error:
            outcome.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:g} s")
    if outcome[0] is not None:
        raise outcome[0]

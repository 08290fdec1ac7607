"""The diffusion prior at NeRF time: a prior folder in, the score of a patch out.

Notation
    x       RGBD patch, see `ddm_training.rgbd`             [b, 4, P, P]
    tau     noise level asked for                           [0, 1]
    t       timestep of the noise schedule                  0 .. 999
    abar    cumulative product of (1 - beta)                (0, 1]
    eps     noise that the network predicts for (x, t)      as x
    score   grad log p(x) = -eps / sqrt(1 - abar_t)         as x
"""

import importlib.resources
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddm_training.errors import InputError
from ddm_training.rgbd import SPEC_FILE, RgbdSpec
from ddm_training.unet import load_scheduler, load_unet, tau_to_timestep
from diffusionerf_ns.cuda_graph import Graphed

Denoiser = Callable[[Tensor, Tensor], Tensor]


class PatchPrior:
    """A frozen denoiser of RGBD patches. Not an `nn.Module`, so that no checkpoint of a NeRF ever holds it.

    Args:
        denoiser: ``(x [b, 4, P, P], t [b]) -> eps``.
        alphas_cumprod: abar for every timestep.
        spec: what the prior was trained on.
        name: for messages.
        autocast: run the network in bfloat16. It halves the time on processors that know bfloat16; on a GPU, where
            it gains nothing in so small a network, `load` leaves it out.
        any_size: the network can be shown more than a patch at once. Not so the authors', whose attention is divided
            by the number of pixels.
        multiple: sides of what it is shown are multiples of this.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        alphas_cumprod: Float[Tensor, " timesteps"],
        spec: RgbdSpec,
        *,
        name: str = "prior",
        autocast: bool = False,
        any_size: bool = True,
        multiple: int = 8,
    ) -> None:
        self.denoiser = denoiser
        self.alphas_cumprod = alphas_cumprod.float()
        self.spec = spec
        self.name = name
        self.autocast = autocast
        self.any_size, self.multiple = any_size, multiple
        self.graph = Graphed(self._denoise, f"the prior {name}")

    @classmethod
    def load(
        cls, source: str | Path, *, revision: str | None = None, device: torch.device | str = "cpu"
    ) -> "PatchPrior":
        """Load a prior: a built-in name, a prior folder, or a Hugging Face hub id.

        Args:
            source: e.g. ``builtin``, ``./my-prior``, ``someone/rgbd-prior``.
            revision: of a hub id.
            device: where the network runs.

        Raises:
            InputError: no such prior, no network for a hub id, or a folder that is not whole.
        """
        folder = find_prior(str(source), revision)
        spec = RgbdSpec.load(folder)
        unet, scheduler = load_unet(folder), load_scheduler(folder)
        config = getattr(getattr(unet, "unet", None), "config", None)  # of diffusers' network
        device = torch.device(device)
        unet = unet.to(device).eval().requires_grad_(False)
        return cls(
            unet,
            scheduler.alphas_cumprod.to(device),
            spec,
            name=str(source),
            autocast=_bfloat16_pays(device),
            any_size=config is not None,
            multiple=8 if config is None else 2 ** (len(config["block_out_channels"]) - 1),
        )

    def sigma(self, tau: float) -> float:
        """sqrt(1 - abar_t), the standard deviation of the noise at tau."""
        return float((1.0 - self.alphas_cumprod[tau_to_timestep(tau, len(self.alphas_cumprod))]).sqrt())

    @torch.no_grad()
    def predict_noise(
        self, x: Float[Tensor, "b 4 h w"], t: Int[Tensor, " b"], *, replay: bool = False
    ) -> Float[Tensor, "b 4 h w"]:
        """eps for patches, or whole views, at timesteps t; in and out float32 whatever the network computes in.

        Args:
            x: patches or views.
            t: timesteps.
            replay: on CUDA, from a CUDA graph, which is faster; for one thread and inputs of few shapes, as a
                training's.
        """
        if replay and not self.autocast and isinstance(self.denoiser, torch.nn.Module):
            return self.graph(x, t)
        return self._denoise(x, t)

    def _denoise(self, x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            return self.denoiser(x, t).float()

    def score(self, x: Float[Tensor, "b 4 h w"], tau: float, *, replay: bool = False) -> Float[Tensor, "b 4 h w"]:
        """grad log p(x) at noise level tau; no noise is added to x (paper section 3.3). See `predict_noise`."""
        t = tau_to_timestep(tau, len(self.alphas_cumprod))
        times = torch.full((x.shape[0],), t, device=x.device, dtype=torch.int64)
        return -self.predict_noise(x.detach(), times, replay=replay) / (1.0 - self.alphas_cumprod[t]).sqrt()

    def clean_estimate(self, x: Float[Tensor, "b 4 h w"], tau: float) -> Float[Tensor, "b 4 h w"]:
        """x + (1 - abar) score, the patch that the prior would rather see (Tweedie's formula, x taken as abar = 1)."""
        return x.detach() + self.sigma(tau) ** 2 * self.score(x, tau)


def builtin_priors() -> dict[str, Path]:
    """Names and folders of the priors inside the package."""
    root = Path(str(importlib.resources.files("diffusionerf_ns"))) / "priors"
    return {p.name: p for p in sorted(root.iterdir()) if (p / SPEC_FILE).is_file()} if root.is_dir() else {}


def find_prior(source: str, revision: str | None = None) -> Path:
    """Folder of a prior, downloading a hub id where needed.

    Raises:
        InputError: nothing of that name here, and the hub has none or cannot be reached.
    """
    builtin = builtin_priors()
    if source in builtin:
        return builtin[source]
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if source.count("/") != 1 or folder.is_absolute() or source.startswith("."):
        raise InputError(
            f"no prior {source!r}: it is neither a built-in name ({', '.join(builtin) or 'none here'}), nor a folder, "
            "nor a Hugging Face hub id (owner/name)."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                source,
                revision=revision,
                allow_patterns=["*.json", "*.safetensors", "*.md"],  # never a pickle
            )
        )
    except Exception as error:  # the hub client raises many kinds, from no network to no such repository
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"no folder {source!r} here, and the Hugging Face hub gave no prior of that id ({reason}). "
            f"Check the name and the network, or use a built-in prior: {', '.join(builtin) or 'none here'}."
        ) from error


def _bfloat16_pays(device: torch.device) -> bool:
    """bfloat16 is the faster type on CPUs with AVX-512 BF16 or AMX.

    Not on CUDA: one patch took an H100 2.95 ms in bfloat16 and 2.38 in float32, and of a clean patch's small score at
    tau = 0 it loses a third.
    """
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512" and _cpu_has_bfloat16()


def _cpu_has_bfloat16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags

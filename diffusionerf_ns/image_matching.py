"""Stereo of the training images, with what a run's settings say of it and what its user is told."""

import time
from functools import partial
from typing import Literal, Protocol, runtime_checkable

import torch
from nerfstudio.utils.rich_utils import CONSOLE
from rich.markup import escape

from diffusionerf_ns import completion, stereo
from diffusionerf_ns.agreement import can_complete_together, complete_together
from diffusionerf_ns.bounds import StereoBounds
from diffusionerf_ns.dataset import FewViewDataset
from diffusionerf_ns.stereo_rays import StereoRays
from diffusionerf_ns.visibility import are_perspective


@runtime_checkable
class MatchingSettings(Protocol):
    """What a run says of it, see `DiffusioNeRFDataManagerConfig`."""

    stereo_rays_per_batch: int
    completion: Literal["prior", "membrane"]
    completion_prior: str | None
    completion_revision: str | None
    completion_steps: int


def match_images(
    data: FewViewDataset, settings: MatchingSettings, device: torch.device | str
) -> tuple[StereoBounds, StereoRays] | None:
    """Match the training images and complete their depth; says on the console what was found.

    Args:
        data: the training images.
        settings: of the run.
        device: of the rays that are drawn later.

    Returns:
        Where the scene lies, and its depth along the training rays; None where next to nothing is found, or the cameras
        are not perspective.

    Raises:
        InputError: the network that completes depth is damaged.
    """
    cameras = data.cameras
    if not are_perspective(cameras):
        CONSOLE.print("[yellow]Stereo is left out: it is made for perspective cameras.")
        return None
    by, complete, guess = _completers(settings, len(data))
    started = time.perf_counter()
    images = [data.get_numpy_image(i)[..., :3] for i in range(len(data))]
    masks = [data.belongs(i) for i in range(len(data))]
    count = min(len(images), stereo.FINE_VIEWS)
    with CONSOLE.status(f"Matching {count} of {len(images)} training images and completing their depth..."):
        matched = stereo.match(cameras, images, masks, complete, guess)
    seconds = time.perf_counter() - started
    if matched.completed is None:
        CONSOLE.print(
            "[yellow]Stereo found next to nothing that the training images agree on (poses, overlap or texture may be "
            "the reason; or the cameras are too close to one another for so distant a scene: then few-view-data "
            "--scale-factor 0.1 at the end of the command brings it nearer): training goes on without it."
        )
        return None
    near, far = matched.near_far(cameras)
    CONSOLE.print(
        f"Stereo: {len(matched):,} matched pixels at depths of {near:.3g} to {far:.3g} scene units, {escape(by)} "
        f"between them, in {seconds:.1f} s."
    )
    if matched.share < stereo.CHANCE:
        CONSOLE.print(
            f"[yellow]These are {100 * matched.share:.1f} % of the pixels, no more than photographs of different "
            "places have by chance: if views turn out wrong, check that the poses are right and that the training "
            "images show the same things."
        )
    centre, radius = matched.content_cube(cameras)
    low, high = ([f"{c + sign * radius:.2f}" for c in centre] for sign in (-1.0, 1.0))
    CONSOLE.print(f"Most of it lies between ({', '.join(low)}) and ({', '.join(high)}), scene units.")
    rays = StereoRays(matched, matched.completed, cameras, settings.stereo_rays_per_batch, device)
    return StereoBounds(near, far, matched.median_disparity(), centre, radius), rays


def _completers(settings: MatchingSettings, count: int) -> tuple[str, completion.Completer, completion.Completer]:
    """What completes the depth of so many images: in words, as a function, and as a quicker one for guesses."""
    prior = settings.completion_prior
    if settings.completion == "prior" and prior is not None:
        network = completion.find_network(prior, settings.completion_revision)
        if network is not None:
            steps = settings.completion_steps
            how = "images together" if can_complete_together(count, steps) else "each image alone"
            words = f"completed by the prior {prior} ({how})"
            return words, partial(complete_together, network, steps=steps), completion.alone(network.complete)
        CONSOLE.print(f"The prior {escape(prior)} has no network that completes depth.")
    return "interpolated", completion.BY_MEMBRANE, completion.BY_MEMBRANE

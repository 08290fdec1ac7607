"""Images matched along depth that is roughly known: slanted and faintly textured surfaces are found, and no others."""

import numpy as np
import pytest
import torch
from test_stereo import CENTRES, HEIGHT, WIDTH, make_cameras, plane_view

from diffusionerf_ns import stereo
from diffusionerf_ns.sweep import agreed_depth
from diffusionerf_ns.views import View

DEPTH, SLOPE = 4.0, 0.9
RANGES = [stereo.AROUND] * 3
NEAREST = [[1, 2], [0, 2], [1, 0]]


def plane(contrast: float) -> tuple[list[View], list[torch.Tensor]]:
    """Three views of a slanted plane, with its texture's contrast reduced to whole grey levels, and its true depth."""
    cameras = make_cameras(CENTRES)
    pictures = [plane_view(centre, DEPTH, SLOPE) for centre in CENTRES]
    faint = [np.round(128 + contrast * (image.astype(float) - 128)).astype(np.uint8) for image, _ in pictures]
    views = [View.taken_by(cameras, i, image, WIDTH) for i, image in enumerate(faint)]
    return views, [torch.from_numpy(z).float() for _, z in pictures]


def share_and_error(found: list[torch.Tensor], true: list[torch.Tensor]) -> tuple[float, torch.Tensor]:
    depth, z = torch.stack(found), torch.stack(true)
    known = depth > 0
    return float(known.float().mean()), (depth / z - 1.0).abs()[known]


def test_faint_texture_of_a_slanted_surface_is_matched_along_a_rough_guess_of_it() -> None:
    views, true = plane(0.04)
    distance = [(0.5 * float(z.min()), 2.0 * float(z.max())) for z in true]
    before, _ = share_and_error(agreed_depth(views, NEAREST, distance, stereo.STEP), true)
    rough = [1.15 * z for z in true]
    share, error = share_and_error(agreed_depth(views, NEAREST, RANGES, stereo.STEP, rough), true)
    assert share > 2.0 * before

    assert float(error.median()) < 0.01
    assert float((error > 0.05).float().mean()) < 0.02


def test_no_guess_finds_nothing_and_what_is_known_stands() -> None:
    views, true = plane(1.0)
    nothing = torch.zeros(HEIGHT, WIDTH)
    left = torch.where(torch.arange(WIDTH) < WIDTH // 2, 1.0, 0.0)
    guesses = [true[0] * left, nothing, true[2]]
    known = [nothing, true[1], nothing]
    found = agreed_depth(views, NEAREST, RANGES, stereo.STEP, guesses, known)
    assert not found[0][:, WIDTH // 2 :].any()
    assert float((found[0] > 0)[:, : WIDTH // 2].float().mean()) > 0.4
    kept = found[1][5:-5, 15:-15]
    assert torch.equal(kept, true[1][5:-5, 15:-15]), "of what the others see too, all"


def test_all_images_matched_again_find_more_of_the_same_surface(monkeypatch: pytest.MonkeyPatch) -> None:
    views = [plane_view(c, DEPTH, SLOPE) for c in CENTRES]
    images = [image for image, _ in views]
    for image in images:  # the lower part of the plane is next to plain
        image[30:] = np.round(128 + 0.06 * (image[30:].astype(float) - 128)).astype(np.uint8)
    counts = {}
    for times in (0, stereo.AGAIN):
        monkeypatch.setattr(stereo, "AGAIN", times)
        found = stereo.match(make_cameras(CENTRES), images, [None] * 3)
        row, column = found.pixel[:, 1].long().numpy(), found.pixel[:, 0].long().numpy()
        true = np.stack([z for _, z in views])[found.view.numpy(), row, column]
        assert float(np.median(np.abs(found.depth.numpy() / true - 1.0))) < 0.01
        counts[times] = int((row >= 34).sum())
        assert float((np.abs(found.depth.numpy() / true - 1.0) > 0.05).mean()) < 0.02
    assert counts[stereo.AGAIN] > 1.4 * counts[0]

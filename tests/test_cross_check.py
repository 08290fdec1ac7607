"""What one view's depth says of another's: that it has the same surface, or that it sees through it."""

import numpy as np
import pytest
import torch
from test_stereo import HEIGHT, WIDTH, make_cameras

from diffusionerf_ns.cross_check import check_completed, confirmed, contradicted
from diffusionerf_ns.views import View


def blank_views(count: int) -> list[View]:
    cameras = make_cameras([(0.1 * i, 0.0, 0.0) for i in range(count)])
    return [View.taken_by(cameras, i, np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8), WIDTH) for i in range(count)]


def test_depth_that_another_view_sees_through_is_contradicted() -> None:
    views = blank_views(2)
    near, far = torch.full((HEIGHT, WIDTH), 2.0), torch.full((HEIGHT, WIDTH), 4.0)
    middle = (slice(20, 40), slice(20, 60))
    assert contradicted(0, views, [1], [near, far], 0.05)[middle].all()
    assert not contradicted(1, views, [0], [near, far], 0.05)[middle].any(), "hidden there, perhaps"
    assert not contradicted(0, views, [1], [near, torch.zeros_like(far)], 0.05).any(), "silence says nothing"


def test_a_camera_that_faces_away_contradicts_and_confirms_nothing() -> None:
    cameras = make_cameras([(0.0, 0.0, 0.0), (0.0, 0.0, -1.0)])
    cameras.camera_to_worlds[1, :, :3] = torch.diag(torch.tensor([-1.0, 1.0, -1.0]))
    views = [View.taken_by(cameras, i, np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8), WIDTH) for i in range(2)]
    depths = [torch.full((HEIGHT, WIDTH), 4.0)] * 2
    assert not contradicted(0, views, [1], depths, 0.05).any()
    assert not confirmed(0, views, [1], depths, 0.05).any()


@pytest.mark.parametrize(
    ("here", "others", "kept", "sure"),
    [
        (4.0, [4.1], 4.0, True),
        (4.0, [4.3], 4.0, False),
        (4.0, [4.6], 0.0, False),
        (4.0, [3.0], 4.0, False),  # perhaps hidden
        (4.0, [0.0], 4.0, False),
        (0.0, [4.0], 0.0, False),
        (4.0, [4.1, 3.0], 4.0, True),
        (4.0, [4.1, 5.0], 0.0, False),  # one confirms and one contradicts
    ],
)
def test_completed_depth_is_kept_confirmed_or_dropped_by_what_others_have(here, others, kept, sure) -> None:
    depths = [torch.full((HEIGHT, WIDTH), z) for z in (here, *others)]
    nearest = [[j for j in range(len(depths)) if j != i] for i in range(len(depths))]
    middle = (slice(20, 40), slice(20, 50))
    left, is_sure = check_completed(blank_views(len(depths)), nearest, depths)
    assert (left[0][middle] == kept).all()
    assert (is_sure[0][middle] == sure).all()

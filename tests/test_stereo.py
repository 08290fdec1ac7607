"""Stereo of the training images finds true depth where there is texture, is silent elsewhere, and needs no bounds."""

import numpy as np
import pytest
import torch
from nerfstudio.cameras.cameras import Cameras, CameraType

from diffusionerf_ns import completion, stereo
from diffusionerf_ns.views import View
from diffusionerf_ns.visibility import distort

HEIGHT, WIDTH, FOCAL = 60, 80, 90.0


def make_cameras(centres: list[tuple[float, float, float]], lens: torch.Tensor | None = None) -> Cameras:
    """Cameras that all look along -z."""
    poses = torch.eye(3, 4).repeat(len(centres), 1, 1)
    poses[:, :, 3] = torch.tensor(centres)
    return Cameras(
        camera_to_worlds=poses,
        fx=FOCAL,
        fy=FOCAL,
        cx=WIDTH / 2,
        cy=HEIGHT / 2,
        width=WIDTH,
        height=HEIGHT,
        distortion_params=None if lens is None else lens.repeat(len(centres), 1),
        camera_type=CameraType.PERSPECTIVE,
    )


def texture(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Smooth noise of fixed waves, in [0, 1]."""
    rng = np.random.default_rng(0)
    waves = [(rng.normal(size=2) * 7.0, rng.uniform(0, 6.3)) for _ in range(30)]
    value = sum(np.sin(k[0] * x + k[1] * y + phase) for k, phase in waves)
    return 0.5 + 0.5 * np.tanh(value / 4.0)


def plane_view(
    centre: tuple[float, float, float],
    depth: float,
    slope: float,
    plain: bool = False,
    lens: torch.Tensor | None = None,
) -> tuple:
    """Image and true planar depth of the plane z = -(depth + slope x)."""
    v, u = np.meshgrid(np.arange(HEIGHT) + 0.5, np.arange(WIDTH) + 0.5, indexing="ij")
    bent = torch.from_numpy(np.stack([(u - WIDTH / 2) / FOCAL, (v - HEIGHT / 2) / FOCAL], axis=-1))
    straight = bent
    for _ in range(0 if lens is None else 50):
        straight = straight - (distort(straight, lens) - bent)
    x, y = straight[..., 0].numpy(), -straight[..., 1].numpy()
    # centre + z (x, y, -1) on the plane: cz - z = -(depth + slope (cx + z x)).
    z = (centre[2] + depth + slope * centre[0]) / (1.0 - slope * x)
    grey = texture(centre[0] + z * x, centre[1] + z * y)
    if plain:
        grey = np.full_like(grey, 0.5)
    return (np.repeat(grey[..., None], 3, -1) * 255).astype(np.uint8), z


def match(cameras: Cameras, images: list[np.ndarray]) -> stereo.MatchedDepth:
    """Of images without masks, their depth interpolated between the matches."""
    return stereo.match(cameras, images, [None] * len(images))


CENTRES = [(-0.4, 0.0, 0.0), (0.0, 0.1, 0.1), (0.4, 0.0, 0.0)]


@pytest.mark.parametrize(("depth", "slope"), [(3.0, 0.0), (6.0, 0.0), (4.0, 0.5)])
def test_depth_of_a_textured_plane_is_found_without_bounds(depth: float, slope: float) -> None:
    views = [plane_view(c, depth, slope) for c in CENTRES]
    matched = match(make_cameras(CENTRES), [image for image, _ in views])
    assert len(matched) > 0.3 * 3 * HEIGHT * WIDTH
    true = torch.tensor(
        np.array([views[i][1][int(p[1]), int(p[0])] for i, p in zip(matched.view.tolist(), matched.pixel.tolist())])
    )
    error = (matched.depth - true).abs() / true
    assert float(error.median()) < 0.01
    assert float((error > 0.05).float().mean()) < 0.02
    near, far = matched.near_far(make_cameras(CENTRES))
    assert 0.9 * true.min() < near < far < 1.1 * true.max()


@pytest.mark.parametrize("lens", [(-0.4, 0.1, 0.0, 0.0, 0.004, -0.003), (0.3, -0.1, 0.0, 0.0, 0.0, 0.0)])
def test_depth_is_that_of_the_rays_that_the_lens_bends(lens: tuple[float, ...]) -> None:
    """Of a pinhole camera the corners of the first lens would be 20 % off."""
    bending = torch.tensor(lens)
    views = [plane_view(c, 4.0, 0.5, lens=bending) for c in CENTRES]
    cameras = make_cameras(CENTRES, bending)
    matched = match(cameras, [image for image, _ in views])
    off_axis = (matched.pixel - torch.tensor([WIDTH / 2, HEIGHT / 2])).norm(dim=1) / FOCAL
    corners = torch.nonzero(off_axis > 0.35)[:, 0]
    assert len(corners) > 500
    rays, distance = matched.rays(cameras, corners)
    points = rays.origins + rays.directions * distance[:, None]
    off = (points[:, 2] + 4.0 + 0.5 * points[:, 0]) / 4.0
    assert float(off.abs().median()) < 0.01
    assert float((off.abs() > 0.05).float().mean()) < 0.03
    true = torch.tensor(np.stack([z for _, z in views]))
    assert matched.completed is not None
    completed = matched.completed.values.reshape(true.shape)
    assert float((completed / true - 1.0)[completed > 0].abs().median()) < 0.01


def test_a_point_that_the_lens_would_fold_back_into_the_image_is_outside() -> None:
    view = View(
        torch.zeros(1, 1, HEIGHT, WIDTH),
        torch.tensor([FOCAL, FOCAL]),
        torch.tensor([WIDTH / 2, HEIGHT / 2]),
        torch.eye(3),
        torch.zeros(3),
        torch.tensor([-0.3, 0.0, 0.0, 0.0, 0.0, 0.0]),  # slopes beyond 1.05 come back, those of 1.82 to the middle
    )
    grid, z = view.project(torch.tensor([[0.2, 0.0, -1.0], [1.8, 0.0, -1.0]]))
    assert grid[0].tolist() == pytest.approx([2.0 * FOCAL * (0.2 - 0.3 * 0.2**3) / WIDTH, 0.0], abs=1e-5)
    assert float(grid[1].abs().min()) > 1.0
    assert z.tolist() == [1.0, 1.0]
    grid, _ = view.project(2.0 * view.directions())
    u = (torch.arange(WIDTH) + 0.5) * 2.0 / WIDTH - 1.0
    torch.testing.assert_close(grid[..., 0], u.expand(HEIGHT, WIDTH), atol=1e-4, rtol=0.0)


def test_rays_end_on_the_surface() -> None:
    views = [plane_view(c, 4.0, 0.0) for c in CENTRES]
    cameras = make_cameras(CENTRES)
    matched = match(cameras, [image for image, _ in views])
    rays, distance = matched.rays(cameras, torch.arange(0, len(matched), 37))
    z = (rays.origins + rays.directions * distance[:, None])[:, 2]
    assert float((z + 4.0).abs().median()) < 0.04
    centre, radius = matched.content_cube(cameras)
    assert centre[2] == pytest.approx(-4.0, abs=0.1)
    assert 0.5 < radius < 3.0


def test_there_is_nothing_to_find_without_texture() -> None:
    images = [plane_view(c, 4.0, 0.0, plain=True)[0] for c in CENTRES]
    assert len(match(make_cameras(CENTRES), images)) == 0


def test_there_is_nothing_to_find_without_a_baseline() -> None:
    images = [plane_view(CENTRES[0], 4.0, 0.0)[0]] * 3
    assert len(match(make_cameras([CENTRES[0]] * 3), images)) == 0


def test_from_cameras_close_together_it_is_found_roughly_how_far_the_scene_is() -> None:
    """A sixtieth of its distance apart they see its points move by 1.5 pixels, nearly as at an infinite distance."""
    centres = [(0.085 * x, 0.085 * y, 0.085 * z) for x, y, z in CENTRES]
    found = match(make_cameras(centres), [plane_view(c, 4.0, 0.0)[0] for c in centres])
    assert found.share > stereo.CHANCE
    assert float(found.depth.median()) == pytest.approx(4.0, rel=0.1)


def test_unrelated_images_give_next_to_nothing() -> None:
    rng = np.random.default_rng(1)
    images = [rng.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8) for _ in CENTRES]
    found = match(make_cameras(CENTRES), images)
    assert len(found) < stereo.CHANCE * 3 * HEIGHT * WIDTH
    assert found.share < stereo.CHANCE


def square_before_a_wall(centre: tuple[float, float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Image of a textured square 1.5 units away before a wall 6 units away, and the pixels that show the square."""
    wall, _ = plane_view(centre, 6.0, 0.0)
    square, z = plane_view(centre, 1.5, 0.0)
    x = centre[0] + z * (np.arange(WIDTH) + 0.5 - WIDTH / 2) / FOCAL
    y = centre[1] - z * (np.arange(HEIGHT) + 0.5 - HEIGHT / 2)[:, None] / FOCAL
    shown = (np.abs(x) < 0.08) & (np.abs(y) < 0.08)
    return np.where(shown[..., None], square, wall), shown


def test_a_small_object_within_masks_is_looked_for_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stereo, "MIN_MATCHES", 20)
    images, masks = zip(*map(square_before_a_wall, CENTRES))
    assert 0.01 < np.mean(masks) < 0.03
    found = stereo.match(make_cameras(CENTRES), images, list(map(torch.from_numpy, masks)))
    assert float(found.depth.median()) == pytest.approx(1.5, rel=0.03)
    assert found.share > 0.3, "of the pixels inside"


def test_what_lies_far_away_outside_masks_does_not_hide_a_small_object_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all pixels fewer are matched than by chance, of those inside nearly all: there is no need to look far away."""
    monkeypatch.setattr(stereo, "MIN_MATCHES", 20)
    monkeypatch.setattr(stereo, "_distant_depth", lambda *a: pytest.fail("looked far away"))
    images, masks = zip(*map(square_before_a_wall, CENTRES))
    plain = [np.where(mask[..., None], image, 128).astype(np.uint8) for image, mask in zip(images, masks)]
    found = stereo.match(make_cameras(CENTRES), plain, list(map(torch.from_numpy, masks)))
    assert len(found) < stereo.CHANCE * 3 * HEIGHT * WIDTH
    assert float(found.depth.median()) == pytest.approx(1.5, rel=0.05)


def test_a_small_object_before_everything_else_is_matched_and_depth_begins_with_it() -> None:
    """Fewer pixels show it than the quantiles leave out that say where a scene lies."""
    images, shown = zip(*map(square_before_a_wall, CENTRES))
    assert np.mean(shown) < stereo.SCENE_QUANTILES[0]
    found = match(make_cameras(CENTRES), list(images))
    assert found.near_far(make_cameras(CENTRES))[0] == pytest.approx(1.5, rel=0.03)
    inside = [shown[i][int(p[1]), int(p[0])] for i, p in zip(found.view.tolist(), found.pixel.tolist())]
    depth = found.depth[torch.tensor(inside)]
    assert len(depth) > 0.3 * np.sum(shown)
    assert float(depth.median()) == pytest.approx(1.5, rel=0.03), "windows at its borders match the wall"


def test_depth_between_the_matches_is_about_that_of_the_surface_around() -> None:
    views = []
    for centre in CENTRES:
        image, z = plane_view(centre, 4.0, 0.0)
        image[20:40, 30:50] = 128  # no texture there
        views.append((image, z))
    matched = match(make_cameras(CENTRES), [image for image, _ in views])
    pixels = torch.tensor([[i, row, column] for i in range(3) for row in range(HEIGHT) for column in range(WIDTH)])
    assert matched.completed is not None
    depth, confirmed, _ = matched.completed.at(pixels, torch.tensor([[HEIGHT, WIDTH]] * 3))
    depth = depth.reshape(3, HEIGHT, WIDTH)
    plain = depth[:, 22:38, 32:48]
    known = matched.pixel[(matched.view == 1)].long()
    inside = (known[:, 0] >= 34) & (known[:, 0] < 46) & (known[:, 1] >= 24) & (known[:, 1] < 36)
    assert not bool(inside.any()), "nothing is matched where there is no texture"
    told, sure = plain > 0, confirmed.reshape(3, HEIGHT, WIDTH)[:, 22:38, 32:48]
    assert float(told.float().mean()) > 0.5, "most of it; the square is no surface, and the images disagree about it"
    assert float((plain[told] / 4.0 - 1.0).abs().max()) < 0.15
    assert float((plain[sure] / 4.0 - 1.0).abs().max()) < 0.1
    assert float(sure.float().mean()) > 0.25
    # Of matched pixels it is what was matched.
    at = torch.stack([matched.view, matched.pixel[:, 1].long(), matched.pixel[:, 0].long()], dim=-1)
    again, _, _ = matched.completed.at(at, torch.tensor([[HEIGHT, WIDTH]] * 3))
    assert float((again / matched.depth - 1.0).abs().median()) < 0.01


def test_what_images_say_together_counts_only_where_it_was_not_contradicted_when_each_was_alone() -> None:
    views = [plane_view(c, 4.0, 0.0) for c in CENTRES]
    masks = [torch.ones(HEIGHT, WIDTH, dtype=torch.bool) for _ in CENTRES]
    masks[1][:10] = False
    blob, unsure = (slice(20, 30), slice(30, 40)), (slice(35, 45), slice(30, 40))

    def complete(found):
        assert [tuple(view.rgb.shape) for view in found] == [(HEIGHT, WIDTH, 3)] * 3
        assert [list(view.nearest) for view in found] == [[1, 2], [0, 2], [1, 0]]
        assert [int(view.mask.sum()) for view in found] == [int(mask.sum()) for mask in masks]
        plane = torch.full((HEIGHT, WIDTH), 4.0)
        alone = [plane.clone() for _ in found]
        alone[1][blob] = 2.0  # others see through it
        for image in (0, 2):
            alone[image][:] = 3.7  # before the plane, as far as the plane's image is asked, and no confirmation of it
            alone[image][:30] = 4.0
        error = torch.full((HEIGHT, WIDTH), 0.1)
        return [completion.Completed(plane, error, first) for first in alone]

    matched = stereo.match(make_cameras(CENTRES), [image for image, _ in views], masks, complete)
    assert matched.completed is not None
    depth, sure, error = (
        x.reshape(3, HEIGHT, WIDTH)[1]
        for x in (getattr(matched.completed, n) for n in ("values", "confirmed", "error"))
    )
    assert not depth[blob].any()
    assert (depth[unsure] == 4.0).all()
    assert not sure[blob].any()
    assert not sure[unsure].any()
    assert sure[12:18, 30:50].all()
    assert not depth[:10].any()
    assert (error == 0.1).all()


def test_a_second_picture_from_the_same_place_takes_nothing_away() -> None:
    centres = [CENTRES[0], *CENTRES]
    views = [plane_view(c, 4.0, 0.0) for c in centres]
    matched = match(make_cameras(centres), [image for image, _ in views])
    assert set(matched.view.tolist()) == {0, 1, 2, 3}


def test_an_image_of_which_nothing_is_matched_and_what_a_mask_leaves_out_stay_unknown() -> None:
    views = [plane_view(c, 4.0, 0.0) for c in CENTRES]
    images = [image for image, _ in views]
    masks = [torch.ones(HEIGHT, WIDTH, dtype=torch.bool) for _ in CENTRES]
    masks[0][:, :40] = False
    masks[2][:] = False
    matched = stereo.match(make_cameras(CENTRES), images, masks)
    assert set(matched.view.tolist()) == {0, 1}
    assert float(matched.pixel[matched.view == 0][:, 0].min()) > 40.0
    assert matched.completed is not None
    sizes = torch.tensor([[HEIGHT, WIDTH]] * 3)
    depth, _, _ = matched.completed.at(torch.tensor([[2, 30, 40], [0, 30, 20], [0, 30, 60]]), sizes)
    assert depth[:2].tolist() == [0.0, 0.0]
    assert float(depth[2]) == pytest.approx(4.0, rel=0.05)

"""Depth that is completed for the images of a capture together."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from ddm_training.completion import CompletionInput, CompletionSpec, DepthCompleter, make_network
from diffusionerf_ns import agreement
from diffusionerf_ns.completion import alone
from diffusionerf_ns.views import MatchedView, View

HEIGHT, WIDTH = 48, 64


def make_view(x: float = 0.0, *, depth: Tensor | None = None, nearest: Sequence[int] = (0, 1)) -> MatchedView:
    """Looking along -z from (x, 0, 0); nothing is matched unless said."""
    view = View(
        torch.zeros(1, 1, HEIGHT, WIDTH),
        torch.tensor([60.0, 60.0]),
        torch.tensor([WIDTH / 2, HEIGHT / 2]),
        torch.eye(3),
        torch.tensor([x, 0.0, 0.0]),
    )
    rgb = torch.full((HEIGHT, WIDTH, 3), 0.5)
    return MatchedView(
        view=view, rgb=rgb, depth=torch.zeros(HEIGHT, WIDTH) if depth is None else depth, nearest=nearest
    )


@pytest.fixture
def network() -> DepthCompleter:
    """Untrained, so that it gives the membrane, and an expected error of e^0."""
    torch.manual_seed(0)
    unet = make_network((8, 8, 32))
    nn.init.zeros_(unet.conv_out.bias)  # pyright: ignore[reportArgumentType]
    return DepthCompleter(unet, CompletionSpec()).requires_grad_(False)


def two_planes(near: float = 2.0, far: float = 3.0, *, b: float = 1.0, matched: Sequence[int] = ()) -> dict:
    """Two cameras in one place; one sees a wall at ``near``, the other one at ``far``; some of them have matches."""
    images = {}
    for place, z in enumerate((near, far)):
        known = torch.full((1, HEIGHT, WIDTH), z) if place in matched else torch.zeros(1, HEIGHT, WIDTH)
        given = CompletionInput(torch.zeros(1, 3, HEIGHT, WIDTH), known, torch.full((1, HEIGHT, WIDTH), z))
        first = torch.full((HEIGHT, WIDTH), math.log(z))
        log_b = torch.full_like(first, math.log(b - agreement.MORE_B))
        images[place] = agreement._Image(make_view(nearest=[1 - place]), given, first, log_b)
    return images


def test_a_surface_before_another_costs_what_lies_between_them_in_errors_to_expect() -> None:
    images = two_planes(2.0, 3.0, b=0.5)
    cost = agreement.disagreement(images, {k: image.first for k, image in images.items()})
    # Of the two pairs one is a contradiction; the far wall seen from the near one's image is merely hidden.
    between = math.log(3.0 / 2.0) - agreement.TOLERANCE
    assert float(cost) == pytest.approx(between / (0.5 + 0.5) / 2, rel=1e-4)


def test_each_of_two_depths_gives_way_by_its_share_of_the_error() -> None:
    images = two_planes()
    images[0].b = torch.full_like(images[0].b, 0.3)
    images[1].b = torch.full_like(images[1].b, 0.1)
    log_z = {k: image.first.clone().requires_grad_(True) for k, image in images.items()}
    agreement.disagreement(images, log_z).backward()
    near, far = (float(log_z[k].grad.sum()) for k in (0, 1))  # pyright: ignore[reportOptionalMemberAccess]
    assert near < 0.0 < far
    assert near / far == pytest.approx(-3.0, rel=1e-3)


def test_matches_do_not_give_way() -> None:
    images = two_planes(matched=[1])
    log_z = {k: image.first.clone().requires_grad_(True) for k, image in images.items()}
    agreement.disagreement(images, log_z).backward()
    assert float(log_z[0].grad.abs().sum()) > 0.0  # pyright: ignore[reportOptionalMemberAccess]
    assert not log_z[1].grad.any()  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize("masked", [0, 1])
def test_what_does_not_belong_to_the_scene_contradicts_nothing(masked: int) -> None:
    images = two_planes()
    half = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    half[:, : WIDTH // 2] = True
    whole = agreement.disagreement(images, {k: image.first for k, image in images.items()})
    image = images[masked]
    images[masked] = agreement._Image(replace(image.source, mask=half), image.given, image.first, image.log_b)
    part = agreement.disagreement(images, {k: image.first for k, image in images.items()})
    assert float(part) == pytest.approx(float(whole) / 2, rel=0.02)


def test_what_is_out_of_the_other_image_contradicts_nothing() -> None:
    images = two_planes()
    images[1].source = make_view(100.0, nearest=[0])
    assert float(agreement.disagreement(images, {k: image.first for k, image in images.items()})) == 0.0


def wall_and_guess() -> list[MatchedView]:
    """A wall 3 away that one view knows; the other knows a stripe of it, and a thing 1.5 away at its border."""
    wall = torch.full((HEIGHT, WIDTH), 3.0)
    depth = torch.zeros(HEIGHT, WIDTH)
    depth[:, 4:8] = 3.0
    depth[:, 60:] = 1.5
    return [make_view(0.0, depth=wall, nearest=[1]), make_view(0.05, depth=depth, nearest=[0])]


def test_an_image_gives_up_what_another_one_sees_through(
    network: DepthCompleter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement, "LEARNING_RATE", 5e-3)  # the network has learnt nothing yet
    views = wall_and_guess()
    free = (views[1].depth == 0) & (torch.arange(WIDTH) < 50)
    before, after = alone(network.complete)(views)[1], agreement.complete_together(network, views, steps=200)[1]
    wrong = (before.depth / 3.0 - 1.0).abs()[free].mean()
    assert float(wrong) > 0.15
    assert float((after.depth / 3.0 - 1.0).abs()[free].mean()) < 0.7 * float(wrong)
    assert torch.equal(after.alone, before.depth)


def test_images_that_agree_stay_as_they_are(network: DepthCompleter, monkeypatch: pytest.MonkeyPatch) -> None:
    stripe = torch.zeros(HEIGHT, WIDTH)
    stripe[:, 20:30] = 3.0
    views = [make_view(0.1 * k, depth=stripe, nearest=[1 - k]) for k in range(2)]
    monkeypatch.setattr(agreement, "LEARNING_RATE", 5e-3)
    for completed in agreement.complete_together(network, views, steps=30):
        assert float((completed.depth / 3.0 - 1.0).abs().max()) < 0.01
    # The same steps change them where surfaces that are one are held to be two.
    monkeypatch.setattr(agreement, "TOLERANCE", -0.5)
    changed = agreement.complete_together(network, views, steps=30)
    assert max(float((c.depth / 3.0 - 1.0).abs().max()) for c in changed) > 0.01


def test_depth_that_was_changed_may_at_least_be_off_by_as_much(
    network: DepthCompleter, monkeypatch: pytest.MonkeyPatch
) -> None:
    views = wall_and_guess()
    plain = DepthCompleter.forward

    def changed(self: DepthCompleter, *x: Tensor) -> tuple[Tensor, Tensor]:
        log_z, log_b = plain(self, *x)
        return log_z + (self is not network), log_b - 3.0

    monkeypatch.setattr(DepthCompleter, "forward", changed)
    for together, by_itself in zip(agreement.complete_together(network, views, 1), alone(network.complete)(views)):
        assert torch.allclose(together.depth, math.e * by_itself.depth, rtol=0.02)
        assert float(by_itself.error.median()) < 0.1
        assert float((together.error - by_itself.error.clamp_min(1.0)).abs().max()) < 0.02


def test_the_network_itself_is_left_as_it_is(network: DepthCompleter) -> None:
    before = [p.clone() for p in network.parameters()]
    agreement.complete_together(network, wall_and_guess(), steps=3)
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters()))
    assert not any(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize(("count", "steps"), [(2, 0), (agreement.MAX_VIEWS + 1, 5)])
def test_without_steps_and_with_many_images_each_is_completed_alone(
    network: DepthCompleter, count: int, steps: int
) -> None:
    views = [*wall_and_guess(), *[wall_and_guess()[1]] * (count - 2)]
    together, by_itself = agreement.complete_together(network, views, steps), alone(network.complete)(views)
    for a, b in zip(together, by_itself):
        assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("depth", "error", "alone"))


def test_images_of_which_nothing_is_matched_stay_unknown_and_hinder_nobody(network: DepthCompleter) -> None:
    blank = make_view(0.1, nearest=[1, 2])
    views = [blank, *(replace(view, nearest=[0, 3 - k]) for k, view in enumerate(wall_and_guess(), start=1))]
    with_blank = agreement.complete_together(network, views, steps=5)
    without = agreement.complete_together(network, wall_and_guess(), steps=5)
    assert not with_blank[0].depth.any()
    assert bool(with_blank[0].error.isinf().all())
    for found, expected in zip(with_blank[1:], without):
        assert torch.equal(found.depth, expected.depth)


def test_images_that_are_compared_with_no_other_are_completed_alone(network: DepthCompleter) -> None:
    wall, guess = wall_and_guess()
    for views in ([wall, make_view(0.1, nearest=[0])], [replace(wall, nearest=[]), replace(guess, nearest=[])]):
        together, by_itself = agreement.complete_together(network, views, 5), alone(network.complete)(views)
        assert all(torch.equal(a.depth, b.depth) for a, b in zip(together, by_itself))


def test_depth_that_is_not_finite_is_given_up(
    network: DepthCompleter, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    views = wall_and_guess()
    plain = DepthCompleter.forward
    spoilt = lambda self, *x: tuple(y + (0.0 if self is network else math.nan) for y in plain(self, *x))  # noqa: E731
    monkeypatch.setattr(DepthCompleter, "forward", spoilt)
    together, by_itself = agreement.complete_together(network, views, 2), alone(network.complete)(views)
    assert all(torch.equal(a.depth, b.depth) for a, b in zip(together, by_itself))
    assert "not finite" in capsys.readouterr().out


def tilted_plane(view: View, height: int, width: int) -> Tensor:
    """Planar depth, in so many pixels of a view, of the plane z + .3 x = -4."""
    normal = torch.tensor([0.3, 0.0, 1.0])
    return (-4.0 - view.position @ normal) / (view.directions((height, width)) @ normal)


def test_views_from_anywhere_agree_on_a_plane_and_not_if_one_has_it_nearer() -> None:
    images = {}
    for place, (angle, x, shape) in enumerate([(0.15, -0.3, (48, 64)), (-0.2, 0.4, (60, 40))]):
        cos, sin = math.cos(angle), math.sin(angle)
        rotation = torch.tensor([[cos, 0.0, sin], [0.0, 1.0, 0.0], [-sin, 0.0, cos]])
        view = View(
            torch.zeros(1, 1, *shape),
            torch.tensor([60.0, 55.0]),
            torch.tensor([shape[1] / 2 + 2.0, shape[0] / 2 - 1.0]),
            rotation,
            torch.tensor([x, 0.1 * place, 0.0]),
        )
        z = tilted_plane(view, *shape)
        source = MatchedView(view=view, rgb=torch.zeros(*shape, 3), depth=z, nearest=[1 - place])
        given = CompletionInput(torch.zeros(1, 3, *shape), torch.zeros(1, *shape), z[None])
        images[place] = agreement._Image(source, given, z.log(), torch.zeros(shape))
    right = {k: image.first for k, image in images.items()}
    assert float(agreement.disagreement(images, right)) == 0.0
    for place in images:
        nearer = right | {place: right[place] - math.log(1.2)}
        assert float(agreement.disagreement(images, nearer)) > 0.001


def test_images_of_other_shapes_agree_as_well(network: DepthCompleter) -> None:
    wall, guess = wall_and_guess()
    view = wall.view
    tall = View(torch.zeros(1, 1, 80, 40), view.focal, torch.tensor([20.0, 40.0]), view.rotation, view.position)
    portrait = MatchedView(view=tall, rgb=torch.full((80, 40, 3), 0.5), depth=torch.full((80, 40), 3.0), nearest=[1])
    completed = agreement.complete_together(network, [portrait, guess], steps=5)
    assert [tuple(c.depth.shape) for c in completed] == [(80, 40), (HEIGHT, WIDTH)]


@pytest.mark.parametrize("size", [None, (24, 32)])
def test_directions_lead_to_the_pixels_that_they_belong_to(size: tuple[int, int] | None) -> None:
    view = make_view(0.3).view
    directions = view.directions(size)
    height, width = directions.shape[:2]
    grid, z = view.project(view.position + 2.0 * directions)
    assert torch.allclose(z, torch.full_like(z, 2.0))
    v, u = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    expected = torch.stack([2 * u / width - 1, 2 * v / height - 1], dim=-1)
    assert torch.allclose(grid, expected, atol=1e-5)

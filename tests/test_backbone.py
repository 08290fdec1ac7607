"""The changes to nerfacto's fields do what they say and nothing else."""

from pathlib import Path

import pytest
import torch
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.field_components.spatial_distortions import SceneContraction
from nerfstudio.fields.nerfacto_field import NerfactoField
from torch.multiprocessing.spawn import spawn

from diffusionerf_ns import backbone


def test_contraction_is_nerfstudios_for_the_unit_cube() -> None:
    x = 5.0 * torch.randn(200, 3)
    torch.testing.assert_close(backbone.ContentContraction()(x), SceneContraction(order=float("inf"))(x))


def test_contraction_moves_with_the_content() -> None:
    contraction = backbone.ContentContraction((1.0, -2.0, 3.0), 4.0)
    inside = torch.tensor([1.0, -2.0, 3.0]) + 4.0 * (2 * torch.rand(100, 3) - 1)
    torch.testing.assert_close(contraction(inside), (inside - torch.tensor([1.0, -2.0, 3.0])) / 4.0)
    assert float(contraction(torch.tensor([[1e6, 0.0, 0.0]])).abs().max()) < 2.0


def test_contraction_is_kept_in_the_state_dict() -> None:
    saved = backbone.ContentContraction((1.0, 2.0, 3.0), 4.0).state_dict()
    fresh = backbone.ContentContraction()
    fresh.load_state_dict(saved)
    x = torch.randn(10, 3)
    torch.testing.assert_close(fresh(x), backbone.ContentContraction((1.0, 2.0, 3.0), 4.0)(x))


def test_level_mask_fades_levels_in_one_after_the_other() -> None:
    mask = backbone.LevelMask(levels=4, features=2)
    ones = torch.ones(1, 8)
    assert torch.equal(mask(ones), ones)
    mask.set_active(2.25)
    assert mask(ones)[0].tolist() == [1.0, 1.0, 1.0, 1.0, 0.25, 0.25, 0.0, 0.0]
    mask.set_active(4.0)
    assert torch.equal(mask(ones), ones)


def make_field() -> NerfactoField:
    torch.manual_seed(0)
    return NerfactoField(
        SceneBox(aabb=torch.tensor([[-1.0, -1, -1], [1, 1, 1]])).aabb,
        num_images=3,
        num_levels=4,
        log2_hashmap_size=8,
        max_res=64,
        appearance_embedding_dim=0,
        implementation="torch",
    )


def test_colour_cannot_see_higher_harmonics_than_allowed() -> None:
    directions = torch.nn.functional.normalize(torch.randn(50, 3), dim=-1)
    full = make_field().direction_encoding(directions)
    for degrees in (1, 2, 3):
        field = make_field()
        backbone.limit_view_dependence(field, degrees)
        limited = field.direction_encoding(directions)
        torch.testing.assert_close(limited[:, : degrees**2], full[:, : degrees**2])
        assert float(limited[:, degrees**2 :].abs().max()) == 0.0
        assert float(full[:, degrees**2 :].abs().max()) > 0.1


def test_networks_are_drawn_as_tinycudann_draws_its_own() -> None:
    """Uniform in +- sqrt(6 / (in + out)), without biases."""
    field = make_field()
    backbone.draw_weights(field)
    layers = [module for module in field.modules() if isinstance(module, torch.nn.Linear)]
    assert len(layers) == 5
    for layer in layers:
        bound = (6 / (layer.in_features + layer.out_features)) ** 0.5
        assert 0.9 * bound < float(layer.weight.detach().abs().max()) <= bound
        assert float(layer.weight.std()) == pytest.approx(bound / 3**0.5, rel=0.15)
        assert not layer.bias.any()


def test_more_hue_comes_out_of_networks_that_are_drawn_so() -> None:
    """The deviation over points of what is not grey in a colour, at the start."""

    def hue(field: NerfactoField) -> float:
        x = torch.randn(2000, field.mlp_head.layers[0].in_features, generator=torch.Generator().manual_seed(1))
        rgb = field.mlp_head(x)
        return float((rgb - rgb.mean(dim=1, keepdim=True)).std(dim=0).mean())

    field = make_field()
    before = hue(field)
    backbone.draw_weights(field)
    assert hue(field) > 4 * before


@pytest.mark.parametrize(
    ("rendered", "true", "accumulation", "died"),
    [(1e-6, 0.5, 1.0, True), (1e-6, 0.1, 1.0, False), (0.02, 0.5, 1.0, False), (1e-6, 0.5, 0.1, False)],
    ids=["all black", "so is the scene", "only dark", "nothing is opaque yet"],
)
def test_colours_that_no_gradient_reaches_any_more_are_told(rendered, true, accumulation, died):
    rays = [torch.full((4, n), value) for n, value in ((3, rendered), (3, true), (1, accumulation))]
    assert backbone.colours_died(*rays) is died


class Native(torch.nn.Module):
    """As tinycudann's."""

    def initial_params(self, seed: int) -> torch.Tensor:
        return torch.randn(6, generator=torch.Generator().manual_seed(seed))


def test_a_network_of_tinycudann_begins_anew_with_its_own_weights() -> None:
    network = torch.nn.Module()
    network.native_tcnn_module = Native()
    network.params = torch.nn.Parameter(torch.full((6,), -50.0))
    outer = torch.nn.Sequential(network)
    drawn = []
    for _ in range(2):
        backbone.restart(outer)
        drawn.append(network.params.detach().clone())
        assert float(drawn[-1].abs().max()) < 10.0
    assert not torch.equal(*drawn)
    assert network.params.requires_grad


def _restart_in(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2)
    torch.manual_seed(rank)
    network = torch.nn.Linear(4, 3)
    told = backbone.in_any_process(rank == 1, torch.device("cpu"))
    silent = backbone.in_any_process(False, torch.device("cpu"))
    backbone.restart(network)
    torch.save((told, silent, network.weight), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_all_processes_begin_anew_together_and_with_the_same_weights(tmp_path: Path) -> None:
    spawn(_restart_in, (tmp_path,), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert [(told, silent) for told, silent, _ in found] == [(True, False)] * 2
    assert torch.equal(found[0][2], found[1][2])

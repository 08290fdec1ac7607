"""Patches: geometry, no mixing across depth edges, masks, augmentation, and samples as a function of (seed, step)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ddm_training import patches, resampling, rgbd
from ddm_training.errors import InputError
from ddm_training.frames import SceneWriter, open_store
from ddm_training.loading import StepBatches
from ddm_training.patches import PatchConfig, PatchSampler, Stream, make_patches, open_sampler

H, W, FX, FY = 96, 128, 140.0, 120.0
PLAIN = PatchConfig(patch_size=24, focal_range=(80.0, 80.0), depth_scale_jitter=1.0, augment=False)


def write_scene(root: Path, depth, *, name="scene", split="train", mask=None, color=None, frames=1, source="toy"):
    height, width = depth.shape
    writer = SceneWriter(root, name, split=split, source=source, max_frames=frames, height=height, width=width)
    color = np.full((height, width, 3), 100, np.uint8) if color is None else color
    mask = np.ones(depth.shape, bool) if mask is None else mask
    for index in range(frames):
        writer.add(color, depth, mask, intrinsics=(FX, FY, width / 2, height / 2), name=f"{index}")
    writer.close()
    return root


def draw(root: Path, config: PatchConfig, index: int = 0, step: int = 0):
    sampler = open_sampler([root], "train", config)
    return sampler.patches(seed=1, stream=Stream.TRAIN, step=step, first=index, count=1)


def test_a_patch_covers_the_angle_of_its_target_focal_length(tmp_path):
    """A colour ramp over the frame rises by P / f_target of its value per focal length, on both axes."""
    y, x = np.mgrid[:H, :W]
    color = np.stack([x, y, 0 * x], axis=-1).astype(np.uint8)
    write_scene(tmp_path, np.full((H, W), 2.0, np.float32), color=color)
    rgb = 255 * 0.5 * (draw(tmp_path, PLAIN)["x"][0, :3] + 1)
    for channel, axis, step in ((0, 1, FX / 80), (1, 0, FY / 80)):
        difference = rgb[channel].diff(dim=axis)
        assert torch.allclose(difference.mean(), torch.tensor(step), rtol=0.01)
        assert torch.allclose(difference, torch.tensor(step), atol=0.25)  # areas of constant pixels: not quite even
    assert torch.allclose(rgb[2], torch.tensor(0.0), atol=1e-4)


def test_depth_of_a_slanted_plane_is_exact(tmp_path):
    """Inverse depth of a plane is linear in the image, so the resampled encoding is, too."""
    x = np.arange(W) + 0.5
    inverse = np.broadcast_to((0.2 + 0.004 * x).astype(np.float32), (H, W))
    write_scene(tmp_path, (1 / inverse).astype(np.float32))
    encoded = draw(tmp_path, PLAIN)["x"][0, 3]
    slope = 2 * rgbd.NEAR * 0.004 * FX / 80
    assert torch.allclose(encoded.diff(dim=1), torch.tensor(slope, dtype=torch.float32), atol=4e-4)  # float16 store


@pytest.mark.parametrize("focal", [80.0, 250.0])
def test_no_depth_lies_between_two_surfaces(tmp_path, focal):
    depth = np.where(np.arange(W)[None, :] % 20 < 10, 1.0, 3.0).repeat(H, axis=0).astype(np.float32)
    write_scene(tmp_path, depth)
    config = PatchConfig(patch_size=24, focal_range=(focal, focal), depth_scale_jitter=1.0, augment=False)
    _, z = rgbd.decode(draw(tmp_path, config)["x"])
    assert set(z.unique().round(decimals=4).tolist()) == {1.0, 3.0}


def weights(start: float, scale: float, count: int, stored: int, extent: int | None = None) -> torch.Tensor:
    """`area_weights` of one window."""
    a, s = torch.tensor([start]), torch.tensor([scale])
    return resampling.area_weights(a, s, count, stored, torch.tensor([extent or stored]))[0]


def test_area_weights_average_when_shrinking_and_interpolate_when_enlarging():
    np.testing.assert_allclose(weights(0.0, 2.0, 3, 6), np.kron(np.eye(3), [[0.5, 0.5]]))
    np.testing.assert_allclose(weights(1.0, 0.5, 2, 4), [[0.25, 0.75, 0, 0], [0, 0.75, 0.25, 0]])
    np.testing.assert_allclose(weights(0.3, 1.0, 3, 5), weights(0.3, 1.0 - 1e-6, 3, 5), atol=1e-5)


@pytest.mark.parametrize("scale", [0.6, 1.7])
def test_what_lies_beyond_a_window_has_no_weight(scale):
    """In a batch all have the canvas of the largest: the weights of smaller ones are those of the window alone."""
    alone = weights(0.2, scale, 4, 7)
    larger = weights(0.2, scale, 4, 11, extent=7)
    assert torch.equal(larger[:, :7], alone)
    assert not larger[:, 7:].any()


def test_windows_that_lie_one_after_the_other_are_found_and_repeat_their_borders():
    images = [torch.arange(6).reshape(2, 3), 6 + torch.arange(4).reshape(4, 1)]
    flat, extent = torch.cat([image.flatten() for image in images]), torch.tensor([[2, 3], [4, 1]])
    found = flat[resampling.window_pixels(extent, (5, 4))]
    for canvas, image in zip(found, images):
        rows, columns = (torch.arange(n).clamp_max(last - 1) for n, last in zip((5, 4), image.shape))
        assert torch.equal(canvas, image[rows][:, columns])


def test_color_resampling_agrees_with_a_plain_double_loop():
    rng = np.random.default_rng(0)
    color = rng.integers(0, 256, (9, 11, 3)).astype(np.uint8)
    wy, wx = weights(0.7, 1.6, 5, 9), weights(1.1, 1.9, 5, 11)
    expected = np.einsum("ay,bx,yxc->cab", wy, wx, color / 255)
    found = resampling.resample_color(torch.from_numpy(color)[None], wy[None], wx[None])[0]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_invalid_depth_is_masked_and_filled_from_nearby(tmp_path):
    depth = np.where(np.arange(W)[None, :] < W // 2, 1.0, 2.0).repeat(H, axis=0).astype(np.float32)
    mask = np.random.default_rng(0).random((H, W)) > 0.2
    depth[~mask] = np.nan
    write_scene(tmp_path, depth, mask=mask)
    batch = draw(tmp_path, PLAIN)
    _, z = rgbd.decode(batch["x"])
    assert 0.6 < batch["mask"].float().mean() < 0.95
    assert set(z.unique().round(decimals=4).tolist()) <= {1.0, 2.0}


def test_windows_with_too_little_valid_depth_are_drawn_again(tmp_path):
    mask = np.zeros((H, W), bool)
    mask[:, W // 2 :] = True
    write_scene(tmp_path, np.full((H, W), 2.0, np.float32), mask=mask)
    batch = open_sampler([tmp_path], "train", PLAIN).patches(seed=0, stream=Stream.TRAIN, step=0, first=0, count=40)
    assert batch["mask"].float().mean(dim=(1, 2)).min() >= PLAIN.min_valid


def test_a_store_without_any_valid_depth_is_an_error(tmp_path):
    write_scene(tmp_path, np.full((H, W), 2.0, np.float32), mask=np.zeros((H, W), bool))
    with pytest.raises(InputError, match="no valid depth"):
        draw(tmp_path, PLAIN)


def textured(root: Path, frames: int = 3) -> Path:
    rng = np.random.default_rng(0)
    color = rng.integers(0, 256, (H, W, 3)).astype(np.uint8)
    return write_scene(root, rng.uniform(1, 4, (H, W)).astype(np.float32), color=color, frames=frames)


def test_a_sample_depends_on_seed_step_and_index_alone(tmp_path):
    """However many processes share a batch, and whoever prepares it, its samples are the same to the bit."""
    sampler = open_sampler([textured(tmp_path)], "train", PatchConfig(patch_size=24, focal_range=(80.0, 160.0)))

    def draw(**place: int) -> dict[str, torch.Tensor]:
        return make_patches(sampler.windows(seed=3, stream=Stream.TRAIN, bias=0.5, **place), 24)

    whole = StepBatches(draw, steps=9, batch_size=4)
    halves = [StepBatches(draw, steps=9, batch_size=2, rank=rank) for rank in (0, 1)]
    loader = torch.utils.data.DataLoader(whole, batch_size=None, sampler=range(5, 9), num_workers=2)
    for step, batch in zip(range(5, 9), loader):
        for key, value in batch.items():
            assert torch.equal(value, whole[step][key])
            assert torch.equal(value, torch.cat([half[step][key] for half in halves]))
    assert not torch.equal(whole[5]["x"], whole[6]["x"])
    assert not torch.equal(whole[5]["noise"][0], whole[5]["noise"][1])


def test_patches_do_not_depend_on_the_canvas(tmp_path):
    sampler = open_sampler([textured(tmp_path)], "train", PatchConfig(patch_size=24, focal_range=(80.0, 160.0)))
    windows = sampler.windows(seed=0, stream=Stream.TRAIN, step=0, first=0, count=8)
    own, larger = make_patches(windows, 24), make_patches(windows, 24, (H + 9, W + 5))
    assert all(torch.equal(own[name], larger[name]) for name in own)


def test_no_window_exceeds_the_canvas(tmp_path):
    write_scene(tmp_path, np.full((H, W), 2.0, np.float32))
    for focal in ((80.0, 80.0), (57.0, 160.0), (10.0, 60.0)):
        sampler = open_sampler([tmp_path], "train", PatchConfig(patch_size=24, focal_range=focal))
        extent = sampler.windows(seed=0, stream=Stream.TRAIN, step=0, first=0, count=400)["extent"]
        slack = torch.tensor(sampler.canvas) - extent.amax(dim=0)
        assert int(slack.min()) >= 0
        assert int(slack.max()) <= 4


def test_depth_jitter_scales_depth_by_one_factor_per_patch_within_its_range(tmp_path):
    write_scene(tmp_path, np.full((H, W), 2.0, np.float32))
    config = PatchConfig(patch_size=24, focal_range=(80.0, 80.0), depth_scale_jitter=2.0, augment=False)
    batch = open_sampler([tmp_path], "train", config).patches(seed=0, stream=Stream.TRAIN, step=0, first=0, count=200)
    _, z = rgbd.decode(batch["x"])
    assert torch.allclose(z.amax(dim=(1, 2)), z.amin(dim=(1, 2)))
    factor = z[:, 0, 0] / 2.0
    assert 0.5 - 1e-3 <= factor.min() < 0.55
    assert 1.8 < factor.max() <= 2.0 + 1e-3
    assert abs(factor.log().mean()) < 0.1


def test_augmentation_flips_half_of_the_patches_with_their_depth(tmp_path):
    x = np.arange(W)
    color = np.repeat((x[None, :, None] + 60).astype(np.uint8), H, axis=0).repeat(3, axis=2)
    depth = np.broadcast_to(1 / (0.2 + 0.004 * x), (H, W)).astype(np.float32)
    write_scene(tmp_path, depth, color=color)
    config = PatchConfig(patch_size=24, focal_range=(80.0, 80.0))
    x = open_sampler([tmp_path], "train", config).patches(seed=0, stream=Stream.TRAIN, step=0, first=0, count=100)["x"]
    direction = (x[:, :, 12, -1] - x[:, :, 12, 0]).sign()
    assert (direction == direction[:, :1]).all()  # colour and depth rise or fall together
    assert 30 <= (direction[:, 3] < 0).sum() <= 70
    assert x.min() >= -1
    assert x.max() <= 1


def test_half_of_the_timesteps_are_those_that_a_nerf_uses():
    rng = np.random.default_rng(0)
    biased = np.array([patches.draw_timestep(rng, 1.0) for _ in range(4000)])
    uniform = np.array([patches.draw_timestep(rng, 0.0) for _ in range(4000)])
    assert (biased.min(), biased.max()) == (3, 198)
    # log-uniform in t + 1 from 4 to 200
    np.testing.assert_allclose(np.median(biased) + 1, np.sqrt(4 * 200), rtol=0.1)
    assert abs(uniform.mean() - 499.5) < 20


def test_weights_set_the_share_of_each_store(tmp_path):
    write_scene(tmp_path / "a", np.full((H, W), 1.0, np.float32), frames=9)
    write_scene(tmp_path / "b", np.full((H, W), 3.0, np.float32), frames=1)
    for given, share in ((None, 0.9), ((1.0, 3.0), 0.25)):
        sampler = open_sampler([tmp_path / "a", tmp_path / "b"], "train", PLAIN, weights=given)
        x = sampler.patches(seed=0, stream=Stream.TRAIN, step=0, first=0, count=300)["x"]
        _, z = rgbd.decode(x)
        assert abs((z[:, 0, 0] < 2).float().mean() - share) < 0.08
    with pytest.raises(InputError, match="one number >= 0 per store"):
        open_sampler([tmp_path / "a"], "train", PLAIN, weights=(1.0, 2.0))


def test_a_store_of_weight_zero_is_not_trained_on(tmp_path):
    for name, frames in (("a", 2), ("b", 1)):
        write_scene(tmp_path / name, np.full((H, W), 1.0, np.float32), frames=frames, source=name)
    sampler = open_sampler([tmp_path / "a", tmp_path / "b"], "train", PLAIN, weights=(0.0, 1.0))
    assert [scene.info.source for scene in sampler.scenes] == ["b"]
    assert len(sampler) == 1


def test_a_store_that_has_a_weight_and_no_frame_for_it_is_refused(tmp_path):
    write_scene(tmp_path / "small", np.full((20, 30), 1.0, np.float32))
    write_scene(tmp_path / "large", np.full((H, W), 1.0, np.float32))
    roots = [tmp_path / "small", tmp_path / "large"]
    with (
        pytest.warns(UserWarning, match="too small"),
        pytest.raises(InputError, match=r"no frame of .*small is large enough .* share of the samples"),
    ):
        open_sampler(roots, "train", PLAIN, weights=(0.5, 0.5))
    sampler = open_sampler(roots, "train", PLAIN, weights=(0.0, 1.0))
    assert sampler.patches(seed=0, stream=Stream.TRAIN, step=0, first=0, count=1)["mask"].any()
    with pytest.warns(UserWarning, match="too small"):
        assert len(open_sampler(roots, "train", PLAIN)) == 1


def test_frames_too_small_for_the_focal_range_are_counted_or_refused(tmp_path):
    write_scene(tmp_path, np.full((20, 30), 1.0, np.float32), name="small")
    with pytest.raises(InputError, match="none of the 1 frames is large enough"):
        PatchSampler([open_store(tmp_path)], PLAIN)
    write_scene(tmp_path, np.full((H, W), 1.0, np.float32), name="large")
    with pytest.warns(UserWarning, match="1 of 2 frames are too small"):
        sampler = PatchSampler([open_store(tmp_path)], PLAIN)
    assert len(sampler) == 1


def test_disparity_quantiles_are_those_of_the_data_after_jitter(tmp_path):
    depth = np.where(np.arange(W)[None, :] % 2, 1.0, 4.0).repeat(H, axis=0).astype(np.float32)
    write_scene(tmp_path, depth)
    found = patches.disparity_quantiles(open_sampler([tmp_path], "train", PLAIN), patches=32)
    assert list(found) == ["0.05", "0.25", "0.50", "0.75", "0.95"]
    np.testing.assert_allclose([found["0.05"], found["0.95"]], [0.25, 1.0], rtol=1e-3)
    json.dumps(found)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"focal_range": (200.0, 100.0)}, "--focal-range"),
        ({"depth_scale_jitter": 0.5}, "--depth-scale-jitter"),
        ({"min_valid": 0.0}, "--min-valid"),
        ({"patch_size": 20}, "--patch-size"),
    ],
)
def test_settings_out_of_range_name_their_flag(changed, message):
    with pytest.raises(InputError, match=message):
        PatchConfig(**changed)

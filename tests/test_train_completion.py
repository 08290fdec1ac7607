"""The network that completes depth: units, sizes, samples, training, resume to the bit, and what is exported."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_training import make_store

from ddm_training import completion, membrane
from ddm_training.checkpoints import save_checkpoint
from ddm_training.colors import adjust_colors
from ddm_training.completion import CompletionSpec, DepthCompleter, completion_loss, load_completer, save_completer
from ddm_training.completion_data import CompletionSampler, batch_generator, change_colors, make_samples
from ddm_training.errors import InputError
from ddm_training.frames import SceneWriter, open_store
from ddm_training.patches import PatchConfig, PatchSampler, Stream
from ddm_training.resampling import fill_from_nearby
from ddm_training.train_completion import CompletionTask, TrainCompletionConfig

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """Slanted textured planes with a plain box before them."""
    root = tmp_path_factory.mktemp("store")
    rng = np.random.default_rng(0)
    for name, split in (("a", "train"), ("b", "val")):
        writer = SceneWriter(root, name, split=split, source="toy", max_frames=4, height=72, width=96)
        for index in range(4):
            depth = np.linspace(2.0, 4.0, 96, dtype=np.float32)[None].repeat(72, 0) * rng.uniform(0.8, 1.3)
            color = rng.integers(0, 256, (72, 96, 3)).astype(np.uint8)
            depth[20:50, 30:60] = 1.5
            color[20:50, 30:60] = 90
            mask = rng.random((72, 96)) > 0.02
            writer.add(color, depth, mask, intrinsics=(80.0, 80.0, 48.0, 36.0), name=f"{index}")
        writer.close()
    return root


def config(store: Path, output: Path, **changed) -> TrainCompletionConfig:
    small = {
        "size": (32, 24),
        "train_batch_size": 4,
        "max_train_steps": 6,
        "checkpointing_steps": 2,
        "validation_steps": 100,
        "validation_samples": 4,
        "logging_steps": 2,
        "dataloader_num_workers": 0,
        "mixed_precision": "no",
        "device": "cpu",
        "lr_warmup_steps": 1,
    }
    return TrainCompletionConfig(**{"data": (store,), "output_dir": output, **small, **changed})


def scene(height: int = 24, width: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Colours and a tenth of the pixels' depth."""
    generator = torch.Generator().manual_seed(0)
    rgb = torch.rand(height, width, 3, generator=generator)
    depth = 1.0 + torch.rand(height, width, generator=generator)
    return rgb, torch.where(torch.rand(height, width, generator=generator) < 0.1, depth, 0.0)


def untrained(**spec) -> DepthCompleter:
    torch.manual_seed(0)
    return DepthCompleter(completion.make_network(), CompletionSpec(size=(32, 24), **spec)).eval()


def test_an_untrained_network_gives_the_membrane() -> None:
    rgb, depth = scene()
    completed, _ = untrained().complete(rgb, depth)
    expected = membrane.interpolate(rgb.numpy(), depth.numpy())
    bias = untrained().unet.conv_out.bias  # the last layer's weights are zero, its bias is not
    assert float(bias.abs().max()) < 0.1
    np.testing.assert_allclose(completed, expected, rtol=0.15)


def test_depth_in_another_unit_gives_the_same_depth_in_that_unit() -> None:
    rgb, depth = scene()
    network = untrained()
    torch.nn.init.normal_(network.unet.conv_out.weight, std=0.1)
    (metres, error), (millimetres, same_error) = network.complete(rgb, depth), network.complete(rgb, 1000.0 * depth)
    torch.testing.assert_close(millimetres, 1000.0 * metres, rtol=1e-3, atol=0.0)
    torch.testing.assert_close(same_error, error, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("size", [(24, 32), (189, 252), (378, 504), (300, 200), (5, 7), (17, 200)])
def test_images_of_any_size_are_completed_at_their_size(size) -> None:
    rgb, depth = scene(*size)
    depth[2, 3] = 1.5
    completed, error = untrained().complete(rgb, depth)
    assert completed.shape == error.shape == size
    assert bool((completed > 0).all())
    assert bool(error.isfinite().all())
    height, width = completion.working_size(*size, (32, 24))
    assert height % completion.MULTIPLE == width % completion.MULTIPLE == 0


def test_of_known_depth_under_a_pixel_the_nearest_stays() -> None:
    depth = torch.zeros(1, 4, 6)
    depth[0, 0, 0], depth[0, 1, 1], depth[0, 3, 5] = 3.0, 2.0, 5.0
    torch.testing.assert_close(completion.shrink_known(depth, (2, 3)), torch.tensor([[[2.0, 0, 0], [0, 0, 5.0]]]))


def test_the_loss_is_a_mean_over_valid_pixels_and_its_spread_part_moves_the_spread_alone() -> None:
    z = torch.full((1, 2, 2), 2.0)
    log_z = (z.log() + 0.3).requires_grad_()
    log_b = torch.full((1, 2, 2), math.log(0.1), requires_grad=True)
    valid = torch.tensor([[[True, False], [False, False]]])
    loss = completion_loss(log_z, log_b, z, valid, spread_weight=0.5)
    assert float(loss) == pytest.approx(0.3 + 0.5 * (3.0 + math.log(0.1)), rel=1e-5)
    loss.backward()
    assert log_z.grad is not None
    assert log_b.grad is not None
    assert log_z.grad[0, 0, 0] == pytest.approx(1.0)
    assert log_b.grad[0, 0, 0] == pytest.approx(0.5 * (1.0 - 3.0))
    assert not log_z.grad.flatten()[1:].any()
    # The spread is right where it equals the error.
    log_b = torch.full((1, 2, 2), math.log(0.3), requires_grad=True)
    completion_loss(log_z.detach(), log_b, z, valid, spread_weight=0.5).backward()
    assert log_b.grad is not None
    assert float(log_b.grad.abs().max()) < 1e-5


def samples(sampler: CompletionSampler, *, step: int = 0, first: int = 0, count: int = 8) -> dict[str, torch.Tensor]:
    """As a training makes them."""
    place = {"seed": 1, "stream": Stream.TRAIN, "step": step, "first": first}
    generator = batch_generator(torch.device("cpu"), **place)
    return make_samples(generator, sampler.batch(**place, count=count), augment=sampler.augment)


def test_cuts_follow_from_seed_step_and_index_alone(store) -> None:
    sampler = CompletionSampler([open_store(store, "train")], (32, 24))
    whole = sampler.batch(seed=1, stream=Stream.TRAIN, step=5, first=0, count=4)
    part = sampler.batch(seed=1, stream=Stream.TRAIN, step=5, first=2, count=2)
    for name, values in part.items():
        assert torch.equal(values, whole[name][2:])
    assert not torch.equal(whole["color"][0], whole["color"][1])
    assert whole["color"].shape == (4, 48, 64, 3)
    assert whole["depth"].shape == whole["mask"].shape == (4, 48, 64)


def test_samples_follow_from_seed_step_and_first_index(store) -> None:
    sampler = CompletionSampler([open_store(store, "train")], (32, 24))
    one, again, later, beside = (
        samples(sampler, step=step, first=first, count=4) for step, first in ((5, 4), (5, 4), (6, 4), (5, 8))
    )
    for name, values in one.items():
        assert torch.equal(values, again[name]), name
    for other in (later, beside):
        assert not torch.equal(one["known"], other["known"])
    assert one["rgb"].shape == (4, 3, 24, 32)
    assert one["z"].shape == one["known"].shape == one["base"].shape == one["valid"].shape == (4, 24, 32)
    assert 0.0 <= float(one["rgb"].min()) < float(one["rgb"].max()) <= 1.0


def test_a_sample_knows_true_depth_where_it_knows_any(store) -> None:
    batch = samples(CompletionSampler([open_store(store, "train")], (32, 24), augment=False))
    known = (batch["known"] > 0) & batch["valid"]
    off = (batch["known"] / batch["z"] - 1.0).abs()[known]
    assert 0.02 < known.float().mean() < 0.9
    assert off.median() < 0.05
    assert bool((batch["base"] > 0).all())
    assert bool(batch["enough"].all())


def test_a_sample_with_next_to_no_matches_has_no_weight(store) -> None:
    sampler = CompletionSampler([open_store(store, "train")], (32, 24), augment=False)
    cut = sampler.batch(seed=0, stream=Stream.TRAIN, step=0, first=0, count=3)
    cut["mask"][1] = False
    cut["mask"][1, :4, :4] = True
    batch = make_samples(torch.Generator().manual_seed(0), cut, augment=True)
    assert batch["enough"].tolist() == [True, False, True]
    assert batch["valid"].flatten(1).any(dim=1).tolist() == [True, False, True]
    assert all(bool(values.isfinite().all()) for values in batch.values())
    loss = completion_loss(*untrained()(batch["rgb"], batch["known"], batch["base"]), batch["z"],
                           batch["valid"], spread_weight=0.1)  # fmt: skip
    assert bool(loss.isfinite())


def test_invalid_depth_is_filled_with_a_valid_one_from_nearby() -> None:
    g = torch.Generator().manual_seed(0)
    z = torch.linspace(1.0, 2.0, 45).expand(2, 31, 45) + torch.rand(2, 31, 45, generator=g) * 0.01
    valid = torch.rand(2, 31, 45, generator=g) < 0.2
    valid[1] = False
    valid[1, 30, 44] = True
    filled = fill_from_nearby(torch.where(valid, z, 0.0), valid)
    assert torch.equal(filled[valid], z[valid])
    assert bool((filled[1] == z[1, 30, 44]).all())
    assert bool(torch.isin(filled[0], z[0][valid[0]]).all())
    assert float((filled[0] - z[0]).abs().median()) < 3 / 45


def test_colours_change_as_those_of_the_denoiser_do(store) -> None:
    """Moments over many draws, here and of the changes that patches are drawn with."""
    g = torch.Generator().manual_seed(0)
    rgb = torch.rand(3, 6, 8, generator=g)
    ours = change_colors(g, rgb.expand(3000, 3, 6, 8))
    sampler = PatchSampler([open_store(store)], PatchConfig(patch_size=8, focal_range=(80.0, 80.0)))
    change = sampler.windows(seed=0, stream=Stream.TRAIN, step=0, first=0, count=3000)["change"]
    factors = {"gain": change[:, 1:4], "gamma": change[:, 4], "saturation": change[:, 5]}
    theirs = adjust_colors(rgb.expand(3000, 3, 6, 8), **factors)
    grey = (ours.std(dim=1).amax(dim=(1, 2)) < 0.05).float().mean()
    assert 0.03 < float(grey) < 0.08
    assert float((ours.mean(dim=0) - theirs.mean(dim=0)).abs().max()) < 0.015
    assert float((ours.std(dim=0) - theirs.std(dim=0)).abs().max()) < 0.015


def test_training_resumes_to_the_bit_and_exports(store, tmp_path) -> None:
    config(store, tmp_path / "whole").main()
    for steps in (2, 4, 6):
        config(store, tmp_path / "parts", max_train_steps=steps, lr_scheduler="constant").main()
    config(store, tmp_path / "constant", lr_scheduler="constant").main()
    a, b = (
        torch.load(tmp_path / name / "checkpoint-6" / "state.pt", weights_only=True) for name in ("parts", "constant")
    )
    for part in ("model", "ema"):
        for name, value in a[part].items():
            assert torch.equal(value, b[part][name]), name
    folder = tmp_path / "whole" / completion.FOLDER
    assert {p.name for p in folder.iterdir()} == {
        "README.md", "completion.json", "config.json", "curves.png", "diffusion_pytorch_model.safetensors",
    }  # fmt: skip
    spec = load_completer(folder).spec
    assert spec == CompletionSpec(size=(32, 24), trained_on=("toy",), steps=6)
    rows = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert all(row["images_per_s"] > 0 for row in rows if "loss" in row)
    measured = rows[-1]["val"][store.name]
    assert set(measured) == {"depth", "membrane", "expected"}
    card = (folder / "README.md").read_text()
    assert f"{measured['depth']:.4f}" in card
    assert "toy, with made-up matches" in card


def test_a_training_begins_with_the_weights_of_another(store, tmp_path) -> None:
    config(store, tmp_path / "prior").main()
    first = tmp_path / "prior" / completion.FOLDER
    other = make_store(tmp_path / "other", "garden")
    for given in (first, first.parent):
        out = tmp_path / f"from-{given.name}"
        config(other, out, pretrained=given, seed=5, learning_rate=1e-9, max_train_steps=1).main()
        before, after = load_completer(first), load_completer(out / completion.FOLDER)
        for name, value in before.unet.state_dict().items():
            torch.testing.assert_close(after.unet.state_dict()[name], value, rtol=0, atol=1e-6)
        assert after.spec.trained_on == ("garden", "toy")
        card = (out / completion.FOLDER / "README.md").read_text()
        assert "begun with weights of an earlier training (toy, 6 steps, licence unknown)" in card
    with pytest.raises(InputError, match=r"--pretrained .* holds another network than --widths 16 32 32 asks for"):
        config(store, tmp_path / "third", pretrained=first, widths=(16, 32, 32)).main()
    with pytest.raises(InputError, match="is no completion network"):
        config(store, tmp_path / "third", pretrained=tmp_path / "other").main()


def test_the_checkpoint_of_another_network_is_refused(store, tmp_path) -> None:
    state = {"model": {"weight": torch.ones(3)}, "ema": {}, "optimizer": {}}
    save_checkpoint(tmp_path, 2, state, {}, limit=1)
    with pytest.raises(InputError, match="checkpoint-2 holds the weights of another network"):
        config(store, tmp_path).main()


def test_two_stores_of_one_name_are_both_validated(store, tmp_path) -> None:
    again = tmp_path / "other" / store.name
    shutil.copytree(store, again)
    config(store, tmp_path / "out", data=(store, again), max_train_steps=1).main()
    rows = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert set(rows[-1]["val"]) == {store.name, str(again)}


@pytest.mark.parametrize(
    ("frame", "size"), [((756, 567), (88, 64)), ((504, 378), (184, 136)), ((480, 360), (232, 176))]
)
def test_frames_whose_size_does_not_divide_evenly_can_be_cut(frame, size, tmp_path) -> None:
    width, height = frame
    writer = SceneWriter(tmp_path, "a", split="train", source="toy", max_frames=1, height=height, width=width)
    rng = np.random.default_rng(0)
    color = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    writer.add(color, np.full((height, width), 2.0, np.float32), np.ones((height, width), bool),
               intrinsics=(400.0, 400.0, width / 2, height / 2), name="0")  # fmt: skip
    writer.close()
    sampler = CompletionSampler([open_store(tmp_path, "train")], size)
    for seed in range(6):
        rgb, z, valid, _ = sampler.cut(np.random.default_rng(seed))
        assert rgb.shape == (2 * size[1], 2 * size[0], 3)
        assert valid.all()
        np.testing.assert_allclose(z, 2.0)


def test_between_two_surfaces_the_enlarged_depth_is_not_sure() -> None:
    network = untrained()
    torch.nn.init.constant_(network.unet.conv_out.bias, -8.0)  # as sure as it can be
    torch.nn.init.constant_(network.unet.conv_out.bias[: completion.STEM**2], 0.0)
    rgb = torch.zeros(96, 128, 3)
    rgb[:, 64:] = 1.0
    depth = torch.full((96, 128), 2.0)
    depth[:, 64:] = 4.0
    completed, error = network.complete(rgb, depth)
    between = (completed > 2.05) & (completed < 3.9)
    assert between.any()
    off = torch.minimum((completed / 2.0).log().abs(), (completed / 4.0).log().abs())
    assert bool((2.0 * error[between] > off[between]).all())
    assert float(error[:, :50].max()) < 0.01


@pytest.mark.slow
def test_a_little_training_beats_the_membrane_on_what_it_saw(store, tmp_path) -> None:
    config(store, tmp_path, max_train_steps=60, train_batch_size=8, learning_rate=2e-3, ema_decay=0.9,
           validation_samples=64).main()  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    measured = next(row["val"] for row in reversed(rows) if "val" in row)[store.name]
    assert measured["depth"] < 0.97 * measured["membrane"]


def test_a_saved_network_completes_the_same(tmp_path) -> None:
    network = untrained(trained_on=("rooms",), steps=3)
    torch.nn.init.normal_(network.unet.conv_out.weight, std=0.1)
    save_completer(tmp_path, network.unet, network.spec)  # pyright: ignore[reportArgumentType]
    loaded = load_completer(tmp_path)
    assert loaded.spec == network.spec
    rgb, depth = scene()
    torch.testing.assert_close(loaded.complete(rgb, depth), network.complete(rgb, depth))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "completion.json").unlink(), "is no completion network"),
        (lambda folder: (folder / "completion.json").write_text('{"colour": 1}'), "is no completion network"),
        (lambda folder: (folder / "completion.json").write_text('{"size": [0, 0]}'), "found .0, 0."),
        (lambda folder: (folder / "completion.json").write_text('{"size": [64]}'), "is no completion network"),
        (lambda folder: (folder / "config.json").write_text("[]"), "is no completion network"),
        (
            lambda folder: (folder / "config.json").write_text('{"in_channels": 4, "out_channels": 4}'),
            "from 4 channels",
        ),
        (
            lambda folder: (folder / "config.json").write_text(
                '{"in_channels": 24, "out_channels": 8, "block_out_channels": [32, 32]}'
            ),
            "has a network of 2 levels",
        ),
        (lambda folder: (folder / "diffusion_pytorch_model.safetensors").unlink(), "is missing"),
        (lambda folder: (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"x" * 50), "cannot be read"),
    ],
)
def test_a_damaged_network_is_refused_by_name(damage, message, tmp_path) -> None:
    network = untrained()
    save_completer(tmp_path, network.unet, network.spec)  # pyright: ignore[reportArgumentType]
    damage(tmp_path)
    with pytest.raises(InputError, match=message):
        load_completer(tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"size": (30, 24)}, "--size must be positive multiples of 8"),
        ({"size": (0, 24)}, "--size must be positive multiples of 8"),
        ({"widths": (48, 60, 96)}, "--widths must be positive multiples of 8, the last one of 32, found 48 60 96"),
        ({"widths": (48, 64, 80)}, "--widths must be positive multiples of 8, the last one of 32, found 48 64 80"),
        ({"validation_samples": 0}, "--validation-samples must be at least 1"),
        ({"spread_weight": -1.0}, "--spread-weight must be a number >= 0, found -1.0"),
        ({"train_batch_size": 0}, "--train-batch-size must be at least 1"),
    ],
)
def test_settings_out_of_range_name_their_flag(changed, message, store, tmp_path) -> None:
    with pytest.raises(InputError, match=message):
        config(store, tmp_path, **changed)


def plain_store(root: Path, *, valid: bool) -> Path:
    """One grey frame to train on and one held out, their depth valid or not."""
    for split in ("train", "val"):
        writer = SceneWriter(root, split, split=split, source="toy", max_frames=1, height=48, width=64)
        frame = np.full((48, 64, 3), 99, np.uint8), np.full((48, 64), 2.0, np.float32), np.full((48, 64), valid)
        writer.add(*frame, intrinsics=(60.0, 60.0, 32.0, 24.0), name="0")
        writer.close()
    return root


def test_bad_data_weights_and_frames_without_depth_are_refused(store, tmp_path) -> None:
    with pytest.raises(InputError, match="--data-weights needs one number"):
        CompletionSampler([open_store(store, "train")], (32, 24), weights=[0.5, 0.5])
    with pytest.raises(InputError, match=r"--data-weights needs one number .* found \[nan\]"):
        CompletionSampler([open_store(store, "train")], (32, 24), weights=[math.nan])
    sampler = CompletionSampler([open_store(plain_store(tmp_path, valid=False), "train")], (32, 24))
    with pytest.raises(InputError, match="have no valid depth"):
        sampler.batch(seed=0, stream=Stream.TRAIN, step=0, first=0, count=1)


def test_samples_without_weight_are_counted_and_a_training_of_nothing_else_is_refused(store, tmp_path) -> None:
    task = CompletionTask(config(store, tmp_path))
    batch = task.draw(step=0, first=0, count=4)
    assert bool(task.prepare(dict(batch), step=0, first=0)["enough"].all())
    assert task.unmatched() == 0.0
    dark = batch | {"mask": torch.zeros_like(batch["mask"])}
    dark["mask"][:, 0, :8] = True
    assert not task.prepare(dark, step=1, first=0)["enough"].any()
    assert task.unmatched() == 0.5
    alone = CompletionTask(config(store, tmp_path))
    alone.prepare(dark, step=0, first=0)
    with pytest.raises(InputError, match="all of 4 samples have next to no texture"):
        alone.unmatched()


def test_a_larger_network_is_trained_kept_apart_and_loaded(store, tmp_path) -> None:
    widths = (16, 24, 64)
    config(store, tmp_path, widths=widths, max_train_steps=2).main()
    loaded = load_completer(tmp_path / completion.FOLDER)
    assert tuple(loaded.unet.config.block_out_channels) == widths  # pyright: ignore
    assert "16 / 24 / 64 channels" in (tmp_path / completion.FOLDER / "README.md").read_text()
    rgb, depth = scene()
    assert bool((loaded.complete(rgb, depth)[0] > 0).all())
    with pytest.raises(
        InputError, match=rf"--widths \[16, 24, 64\] \(now \[{', '.join(map(str, completion.WIDTHS))}\]\)"
    ):
        config(store, tmp_path).main()

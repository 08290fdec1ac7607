"""Plots of a training and of an evaluation."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from ddm_training.plausibility import DEPTH_BINS, GRADIENT_BINS, gradient_size, histogram

CURVES_FILE = "curves.png"  # of a training, beside what it exports


def plot_training(path: Path, log: Path) -> None:
    """Loss, and held-out measures, over the steps of a `log.jsonl`: of a denoiser depth's loss per noise level."""
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in log.read_text().splitlines() if line]
    trained = {row["step"]: row["loss"] for row in rows if "loss" in row}  # of steps done twice, the last
    held_out = {row["step"]: row["val"] for row in rows if "val" in row}
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(sorted(trained), [trained[step] for step in sorted(trained)])
    left.set(
        xlabel="step", ylabel="training loss", yscale="log" if min(trained.values(), default=1.0) > 0 else "linear"
    )
    for name in dict.fromkeys(name for step in sorted(held_out) for name in held_out[step]):
        label = f"t = {name}" if name.isdigit() else name
        steps = [step for step in sorted(held_out) if name in held_out[step]]  # a resumed run may have other stores
        right.plot(steps, [held_out[step][name]["depth"] for step in steps], "o-", markersize=3, label=label)
    right.set(xlabel="step", ylabel="held-out error of depth", yscale="log")
    if held_out:
        right.legend(fontsize="small", ncols=2)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=80)


def plot_denoising(path: Path, result: dict[str, Any]) -> None:
    """Depth error before and after denoising over the noise level, one panel per store."""
    from matplotlib.figure import Figure

    stores = list(next(iter(result["priors"].values()))["stores"])
    figure = Figure(figsize=(4.5 * len(stores), 3.8), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(stores), sharey=True))
    for axis, store in zip(axes, stores):
        for index, (name, prior) in enumerate(result["priors"].items()):
            rmse = prior["stores"][store]["depth_rmse"]
            t = sorted(rmse, key=int)
            noisy = [rmse[k]["noisy"] for k in t]
            if index == 0:
                axis.plot(noisy, noisy, "k--", label="noisy input")
            axis.plot(noisy, [rmse[k]["clean"] for k in t], "o-", label=f"{name} ({prior['steps']:,} steps)")
        axis.set(xscale="log", yscale="log", title=store, xlabel="RMSE of the noisy depth channel at timestep t")
        axis.set_xticks(noisy, [f"t = {k}\n{value:.4f}" for k, value in zip(t, noisy)])
        axis.minorticks_off()
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("RMSE after one step of denoising")
    axes[0].legend()
    figure.savefig(path, dpi=110)


def plot_histograms(path: Path, samples: Float[Tensor, "n 4 h w"], data: Float[Tensor, "m 4 h w"]) -> None:
    """Histograms of the depth channel and of its gradient, samples against data."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, x in (("data", data), ("samples", samples)):
        left.stairs(histogram(x[:, 3], DEPTH_BINS), DEPTH_BINS, label=name)
        right.stairs(histogram(gradient_size(x[:, 3]), GRADIENT_BINS), GRADIENT_BINS, label=name)
    left.set(xlabel="depth channel (far is -1)", ylabel="share of pixels", yscale="log")
    left.set_xticks([-1, -0.5, 0, 0.5, 1])
    right.set(xlabel="size of its gradient per pixel")
    right.set_xscale("symlog", linthresh=1e-4)
    left.legend()
    figure.savefig(path, dpi=110)

"""Compare the metric scale that is found by itself with the authors' hand-set factors on the 8 LLFF scenes.

python scripts/metric_scales.py FOLDER [OUTPUT.md]     FOLDER/SCENE/poses_bounds.npy; scenes with images also by stereo

The authors scale poses so that the cameras' mean distance from the point where the optical axes nearly meet is 4, then
multiply by a factor per scene: metres per original unit are 4 factor / distance.
"""

import contextlib
import io
import math
import sys
from pathlib import Path

import numpy as np
import torch

from ddm_training.rgbd import RgbdSpec
from diffusionerf_ns import bounds, stereo
from diffusionerf_ns.dataparsers.llff import read_poses_bounds
from diffusionerf_ns.dataparsers.poses import opengl_from_llff
from diffusionerf_ns.prior import find_prior

AUTHORS = {  # Wynn and Turmukhambetov, CVPR 2023, released code
    "fern": 1.0, "flower": 0.01, "fortress": 0.15, "horns": 1.5,
    "leaves": 0.007, "orchids": 0.3, "room": 1.5, "trex": 1.5,
}  # fmt: skip


def distance_of_attention(poses: np.ndarray) -> float:
    """Mean distance of the cameras from the point nearest to all optical axes (least squares), in the poses' units."""
    centres, axes = poses[:, :3, 3], -poses[:, :3, 2]
    axes = axes / np.linalg.norm(axes, axis=1, keepdims=True)
    across = np.eye(3) - axes[:, :, None] * axes[:, None, :]
    point = np.linalg.solve(across.sum(axis=0), (across @ centres[:, :, None]).sum(axis=0))[:, 0]
    return float(np.linalg.norm(centres - point, axis=1).mean())


def stereo_scale(scene: Path, spec: RgbdSpec) -> float | None:
    """Metres per original unit by stereo of the three training images, or None without images."""
    if not any(scene.glob("images*")):
        return None
    from diffusionerf_ns.dataparsers.few_view import FewViewDataParserConfig
    from diffusionerf_ns.dataset import FewViewDataset

    with contextlib.redirect_stdout(io.StringIO()):
        outputs = FewViewDataParserConfig(data=scene, num_views=3).setup().get_dataparser_outputs("train")
    dataset = FewViewDataset(outputs)
    images = [dataset.get_numpy_image(i)[..., :3] for i in range(len(dataset))]
    matched = stereo.match(outputs.cameras, images, [None] * len(images))
    if not len(matched):
        return None
    per_scene_unit = bounds.metric_scale_from_disparity(matched.median_disparity(), spec)
    return per_scene_unit * outputs.dataparser_scale


def main() -> None:
    """Print the table, and write it where asked."""
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    spec = RgbdSpec.load(find_prior("builtin"))
    torch.set_num_threads(1)
    lines = [
        "Metres per unit of `poses_bounds.npy`: ours over the authors' hand-set value.",
        "",
        "| scene | authors' factor | from the bounds of the 3 training views | from stereo of their images |",
        "|---|---:|---:|---:|",
    ]
    logs = []
    for name, factor in AUTHORS.items():
        table = read_poses_bounds(folder / name / "poses_bounds.npy")
        poses = opengl_from_llff(table[:, :15].reshape(-1, 3, 5)[:, :, :4])
        theirs = 4.0 * factor / distance_of_attention(poses)
        train = [i for i in range(len(table)) if i % 8]
        chosen = table[[train[round(k)] for k in np.linspace(0, len(train) - 1, 3)]]  # the protocol's 3 views
        near, far = float(chosen[:, 15].min()), float(chosen[:, 16].max())
        ours = bounds.metric_scale_from_bounds(near, far, spec) / theirs
        by_stereo = stereo_scale(folder / name, spec)
        shown = "no images here" if by_stereo is None else f"{by_stereo / theirs:.2f}"
        logs.append(math.log(ours))
        lines.append(f"| {name} | {factor:g} | {ours:.2f} | {shown} |")
    spread = float(np.exp(np.std(logs)))
    lines += ["", f"From the bounds: geometric mean {np.exp(np.mean(logs)):.2f}, spread a factor of {spread:.2f}."]
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(text)


if __name__ == "__main__":
    main()

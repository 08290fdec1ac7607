"""The published numbers of `peers.csv`, and what they are means over."""

import csv
import importlib.resources
from dataclasses import dataclass, field

PEER_METRICS = ("psnr", "ssim", "lpips_vgg", "average")
# What the published numbers are means over, and the protocol of ours that they can stand beside.
PEER_SCENES = {"llff": ("all 8 scenes, 504 x 378", "llff-regnerf"), "dtu": ("all 15 scans, 400 x 300", "dtu-regnerf")}


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A published row."""

    method: str
    dataset: str
    views: str
    metrics: dict[str, float] = field(default_factory=dict)
    source: str = ""


def read_peers() -> list[Peer]:
    """All of them, with their sources."""
    text = importlib.resources.files("diffusionerf_ns.bench").joinpath("peers.csv").read_text()
    return [
        Peer(
            method=row["method"],
            dataset=row["dataset"],
            views=row["views"],
            metrics={name: float(row[name]) for name in PEER_METRICS if row[name]},
            source=row["source"],
        )
        for row in csv.DictReader(text.splitlines())
    ]

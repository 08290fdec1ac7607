"""Method specifications: what the entry points of the methods name.

nerfstudio loads this module in every one of its commands, so it must stay light and must not fail: nothing here imports
diffusers, and a prior is only looked for when a model is built.
"""

from dataclasses import replace

import torch
from nerfstudio.configs.base_config import MachineConfig, ViewerConfig
from nerfstudio.engine.trainer import TrainerConfig
from nerfstudio.plugins.types import MethodSpecification

from diffusionerf_ns.datamanager import DiffusioNeRFDataManagerConfig
from diffusionerf_ns.dataparsers.few_view import FewViewDataParserConfig
from diffusionerf_ns.model_config import DiffusioNeRFModelConfig
from diffusionerf_ns.optimizers import ExponentialDecayConfig, FusedAdamConfig
from diffusionerf_ns.pipeline import DiffusioNeRFPipelineConfig


def _optimizers() -> dict:
    """Adam from 1e-2 to 1e-3 over the run (the paper's), after a short warm-up; poses, if asked for, as nerfacto's."""
    rates = {"proposal_networks": (1e-2, 1e-3), "fields": (1e-2, 1e-3), "camera_opt": (1e-3, 1e-4)}
    return {
        name: {"optimizer": FusedAdamConfig(lr=first), "scheduler": ExponentialDecayConfig(lr_final=last)}
        for name, (first, last) in rates.items()
    }


def _viewer(rays_per_chunk: int) -> ViewerConfig:
    """With its port named: where it is in use the next free one is taken, else nerfstudio would take any."""
    return ViewerConfig(num_rays_per_chunk=rays_per_chunk, websocket_port=7007)


# A fifth of the paper's, as few views are fitted soon: scan24 of DTU has 33 dB in training then (docs/findings.md).
_FULL_STEPS = 2000

diffusionerf = MethodSpecification(
    config=TrainerConfig(
        method_name="diffusionerf",
        max_num_iterations=_FULL_STEPS,
        steps_per_save=500,
        steps_per_eval_batch=500,
        steps_per_eval_image=_FULL_STEPS // 2,
        steps_per_eval_all_images=_FULL_STEPS,
        # Off: float32 throughout. tinycudann works in float16 all the same, and gets a scaled loss (`optimizers`).
        mixed_precision=False,
        machine=MachineConfig(device_type="cuda" if torch.cuda.is_available() else "cpu"),
        pipeline=DiffusioNeRFPipelineConfig(
            datamanager=DiffusioNeRFDataManagerConfig(
                dataparser=FewViewDataParserConfig(), train_num_rays_per_batch=1024, eval_num_rays_per_batch=1024
            ),
            model=DiffusioNeRFModelConfig(eval_num_rays_per_chunk=1 << 14),
        ),
        optimizers=_optimizers(),
        viewer=_viewer(1 << 14),
        vis="viewer+tensorboard",
    ),
    description="DiffusioNeRF: few-view NeRF with a diffusion prior of RGBD patches.",
)

_TINY_STEPS = 1000

diffusionerf_tiny = MethodSpecification(
    config=replace(
        diffusionerf.config,
        method_name="diffusionerf-tiny",
        max_num_iterations=_TINY_STEPS,
        steps_per_save=500,
        steps_per_eval_image=_TINY_STEPS,
        steps_per_eval_all_images=10 * _TINY_STEPS,
        pipeline=replace(
            diffusionerf.config.pipeline,
            datamanager=replace(diffusionerf.config.pipeline.datamanager),
            model=replace(
                diffusionerf.config.pipeline.model,
                num_levels=12,
                log2_hashmap_size=17,
                num_proposal_iterations=1,
                num_proposal_samples_per_ray=(64,),
                num_nerf_samples_per_ray=32,
                proposal_net_args_list=[
                    {"hidden_dim": 16, "log2_hashmap_size": 15, "num_levels": 5, "max_res": 128, "use_linear": False}
                ],
                implementation="torch",
                patch_size=24,
                # In runs of hundreds of steps the score costs more than it gives, images and time (docs/findings.md):
                # here the prior completes depth and refines views. --pipeline.model.score-weight 1 is the paper's.
                score_weight=0.0,
                eval_num_rays_per_chunk=1 << 10,  # more leave the caches of a CPU
            ),
        ),
        optimizers=_optimizers(),
        viewer=_viewer(1 << 10),
    ),
    description="DiffusioNeRF with small tables and few samples: laptops, CI, a first look in minutes without a GPU.",
)

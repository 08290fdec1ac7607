"""Variants of a method that a benchmark compares: named sets of overrides of a nerfstudio configuration."""

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ddm_training.errors import InputError

if TYPE_CHECKING:
    from nerfstudio.engine.trainer import TrainerConfig

Method = Literal["diffusionerf", "diffusionerf-tiny"]
SCORE = {"pipeline.model.score_weight": 1.0}
NO_PRIOR = {
    "pipeline.model.score_weight": 0.0,
    "pipeline.model.refine_tau": 0.0,
    "pipeline.datamanager.completion": "membrane",
}
NO_STEREO = {
    "pipeline.model.stereo_depth_weight": 0.0,
    "pipeline.model.completed_depth_weight": 0.0,
    "pipeline.datamanager.stereo_rays_per_batch": 0,
    "pipeline.datamanager.cut_out_flat_background": False,
}
# Nothing that this project adds to the photometric loss, but that images with alpha train before random colours, nor to
# nerfacto's fields but for how the weights of torch networks are drawn.
NO_GEOMETRY = {
    "pipeline.model.frustum_weight": 0.0,
    "pipeline.model.foreground_weight": 0.0,
    "pipeline.model.distortion_weight": 0.0,
    "pipeline.model.chroma_weight": 0.0,
    **NO_STEREO,
    "pipeline.model.levels_start": 1.0,
    "pipeline.model.view_degrees": 4,
    "pipeline.model.eval_samples_factor": 1,
    "pipeline.model.fill_unseen": False,
}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A named set of overrides."""

    name: str
    title: str
    """What tables and sheets call it."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Dotted path in the trainer's configuration -> value."""
    model: Literal["diffusionerf", "nerfacto"] = "diffusionerf"
    """`nerfacto`: nerfstudio's own model with the same tables, steps and rays in place of ours."""
    ablation: str | None = None
    """Name of the paper's row that it corresponds to, in `peers.csv`."""


VARIANTS: dict[str, Variant] = {
    v.name: v
    for v in (
        Variant(
            name="photometric",
            title="photometric only",
            overrides=NO_PRIOR | NO_GEOMETRY,
            ablation="DiffusioNeRF, photometric only",
        ),
        Variant(
            name="paper-geometric",
            title="the paper's geometric terms, no stereo",
            overrides=NO_PRIOR | NO_STEREO | {"pipeline.model.chroma_weight": 0.0, "pipeline.model.frustum_views": 2},
            ablation="DiffusioNeRF, geometric baseline",
        ),
        Variant(name="geometric", title="geometric baseline", overrides=NO_PRIOR),
        Variant(name="default", title="as the preset has it"),
        Variant(
            name="refinement-only",
            title="prior completes depth and refines views, no score in training",
            overrides={"pipeline.model.score_weight": 0.0},
        ),
        Variant(
            name="no-completion",
            title="prior refines views, does not complete depth",
            overrides={"pipeline.model.score_weight": 0.0, "pipeline.datamanager.completion": "membrane"},
        ),
        Variant(name="full", title="full: score in training as well", overrides=SCORE, ablation="DiffusioNeRF"),
        Variant(
            name="no-image-patches",
            title="no image patches",
            overrides=SCORE | {"pipeline.datamanager.image_patch_share": 0.0},
            ablation="DiffusioNeRF, no image patches",
        ),
        Variant(
            name="tau-zero",
            title="tau = 0 throughout",
            overrides=SCORE | {"pipeline.model.tau_start": 0.0, "pipeline.model.tau_end": 0.0},
            ablation="DiffusioNeRF, tau = 0",
        ),
        Variant(
            name="no-refinement",
            title="no refinement of views",
            overrides=SCORE | {"pipeline.model.refine_tau": 0.0},
        ),
        Variant(
            name="no-stereo",
            title="no stereo",
            overrides=SCORE | NO_STEREO,
        ),
        Variant(name="nerfacto", title="nerfacto", model="nerfacto"),
    )
}


def find_variant(name: str) -> Variant:
    """The variant of that name.

    Raises:
        InputError: there is none.
    """
    if name not in VARIANTS:
        raise InputError(f"variant {name!r} is unknown; known are {', '.join(VARIANTS)}.")
    return VARIANTS[name]


def base_config(method: str, steps: int | None = None) -> "TrainerConfig":
    """A copy of a method's configuration, shared with nothing.

    What follows the run's length stands there as numbers: for results to tell, and for nerfacto, which knows no other.

    Args:
        method: its name.
        steps: length of the run; None: the method's.

    Raises:
        InputError: no method of ours has that name, or a run cannot have that length.
    """
    from nerfstudio.plugins.types import MethodSpecification

    from diffusionerf_ns import config

    specifications = [value for value in vars(config).values() if isinstance(value, MethodSpecification)]
    methods = {specification.config.method_name: specification.config for specification in specifications}
    if method not in methods:
        raise InputError(f"method {method!r} is unknown; known are {', '.join(map(str, methods))}.")
    config = copy.deepcopy(methods[method])
    if steps is not None:
        if steps < 1:
            raise InputError(f"steps must be at least 1, found {steps}.")
        config.max_num_iterations = steps
    model: Any = config.pipeline.model
    model.proposal_warmup = model.proposal_warmup_steps(config.max_num_iterations)
    for group in config.optimizers.values():
        scheduler = group["scheduler"]
        scheduler.warmup_steps, scheduler.max_steps = scheduler.corners(config.max_num_iterations)
    return config


def apply(config: "TrainerConfig", variant: Variant) -> None:
    """Turn a method's configuration into that of a variant, in place."""
    if variant.model == "nerfacto":
        _use_nerfacto(config)
    override(config, variant.overrides)


def _owner(config: Any, path: str) -> Any:
    """What has the field of a dotted path; None where there is no such field."""
    *parents, name = path.split(".")
    for parent in parents:
        config = config.get(parent) if isinstance(config, dict) else getattr(config, parent, None)
    return config if dataclasses.is_dataclass(config) and name in {f.name for f in dataclasses.fields(config)} else None


def override(config: Any, values: Mapping[str, Any]) -> None:
    """Set fields by dotted path, in place.

    Raises:
        InputError: a path names no field, or a value is a text or none where a number, true or false stands.
    """
    for path, value in values.items():
        owner, name = _owner(config, path), path.split(".")[-1]
        if owner is None:
            raise InputError(f"override {path!r}: the configuration has no such field.")
        current = getattr(owner, name)
        if isinstance(current, tuple) and isinstance(value, list):  # JSON has no tuples
            value = tuple(value)
        if isinstance(current, bool | int | float) and (value is None or isinstance(value, str)):
            expected = "true or false" if isinstance(current, bool) else "a number"
            found = "none" if value is None else f"the text {value!r}"
            raise InputError(f"override {path!r}: expected {expected}, found {found}.")
        setattr(owner, name, value)


def override_known(config: Any, values: Mapping[str, Any]) -> None:
    """`override`, but for paths that name no field."""
    override(config, {path: value for path, value in values.items() if _owner(config, path) is not None})


def _use_nerfacto(config: "TrainerConfig") -> None:
    """nerfstudio's own model and data manager; the sizes of ours, its own losses and bounds, no camera optimiser.

    The optimisers stay ours, so that the learning rates are the same.
    """
    from nerfstudio.cameras.camera_optimizers import CameraOptimizerConfig
    from nerfstudio.data.datamanagers.base_datamanager import VanillaDataManager, VanillaDataManagerConfig
    from nerfstudio.models.nerfacto import NerfactoModelConfig

    from diffusionerf_ns.dataset import FewViewDataset

    ours: Any = config.pipeline.model
    sizes = (
        "num_levels",
        "base_res",
        "max_res",
        "log2_hashmap_size",
        "features_per_level",
        "hidden_dim",
        "hidden_dim_color",
        "num_proposal_iterations",
        "num_proposal_samples_per_ray",
        "num_nerf_samples_per_ray",
        "proposal_net_args_list",
        "proposal_warmup",
        "average_init_density",
        "implementation",
        "eval_num_rays_per_chunk",
    )
    config.pipeline.model = NerfactoModelConfig(
        camera_optimizer=CameraOptimizerConfig(mode="off"), **{name: getattr(ours, name) for name in sizes}
    )
    manager: Any = config.pipeline.datamanager
    config.pipeline.datamanager = VanillaDataManagerConfig(
        _target=VanillaDataManager[FewViewDataset],
        **{
            f.name: getattr(manager, f.name)
            for f in dataclasses.fields(VanillaDataManagerConfig)
            if f.init and f.name not in ("_target", "collate_fn")
        },
    )

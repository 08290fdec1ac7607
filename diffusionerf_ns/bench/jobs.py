"""The job list as data: which training runs a benchmark consists of, and the hash that says whether one is done."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ddm_training.errors import InputError
from diffusionerf_ns.bench import variants

if TYPE_CHECKING:
    from nerfstudio.engine.trainer import TrainerConfig

# What does not change a result: where it is written, what is shown, the device, what a benchmark does not measure.
_NOT_HASHED = (
    "output_dir",
    "experiment_name",
    "project_name",
    "timestamp",
    "viewer",
    "logging",
    "vis",
    "relative_model_dir",
    "steps_per_save",
    "machine.device_type",
    "machine.num_devices",
    "machine.num_machines",
    "machine.dist_url",
    "pipeline.model.eval_num_rays_per_chunk",
    "pipeline.model.color_corrected_metrics",  # further metrics of ns-eval; a benchmark has its own
)
# Fields that a job has of its own, and the flag of `diffusionerf-bench run` for each: not to be overridden.
_FLAGS = {
    "max_num_iterations": "--steps",  # with the schedules
    "data": "--data",
    "pipeline.datamanager.data": "--data",
    "pipeline.datamanager.dataparser.data": "--data",
    "pipeline.datamanager.dataparser.num_views": "--views",
    "pipeline.datamanager.dataparser.downscale_factor": "--downscale-factor",
    "machine.seed": "--seeds",
    "output_dir": "--output",
}
# What changes views only, not the weights that training gives.
_AFTER_TRAINING = tuple(f"pipeline.model.{name}" for name in ("refine_tau", "eval_samples_factor", "fill_unseen"))


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training run and its evaluation."""

    scene: str
    """Name in tables and paths."""
    data: str
    """Folder of the capture."""
    views: int | Literal["all"]
    """Number of training images."""
    variant: str
    seed: int = 0
    method: str = "diffusionerf-tiny"
    steps: int | None = None
    """None: as the method has it."""
    downscale_factor: int | None = None
    """None: as the data parser chooses."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Further settings by dotted path, e.g. `pipeline.model.prior`; they win over the variant's. `nerfacto` takes those
    of them that it knows."""

    @property
    def name(self) -> str:
        """Unique in a results folder, and the job's folder below it."""
        return f"{self.scene}/{self.views}-views/{self.variant}/seed-{self.seed}"

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Job":
        """Read a job of a job list.

        Raises:
            InputError: it has an unknown entry, lacks one, or one is of the wrong kind.
        """
        for name, (kind, fits) in _KINDS.items():
            if name in content and not fits(content[name]):
                raise InputError(f"job {dict(content)}: {name!r} is {content[name]!r}; expected {kind}.")
        try:
            job = cls(**content)
        except TypeError as error:
            known = [f.name for f in dataclasses.fields(cls)]
            raise InputError(f"job {dict(content)} cannot be read ({error}); known entries: {known}.") from error
        if "/" in job.scene or job.scene in ("", ".", ".."):
            raise InputError(f"scene {job.scene!r} is not a name; give one without '/'.")
        return job

    def to_dict(self) -> dict[str, Any]:
        """As it stands in a job list."""
        return dataclasses.asdict(self)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number_or_none(value: Any) -> bool:
    return value is None or _is_number(value)


_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "scene": ("text", _is_text),
    "data": ("the path of a folder as text", _is_text),
    "views": ('a whole number or "all"', lambda value: _is_number(value) or value == "all"),
    "variant": ("text", _is_text),
    "seed": ("a whole number of 0 or more", lambda value: _is_number(value) and value >= 0),
    "method": ("text", _is_text),
    "steps": ("a whole number or null", _is_number_or_none),
    "downscale_factor": ("a whole number or null", _is_number_or_none),
    "overrides": ('an object, e.g. {"pipeline.model.score_weight": 2.0}', lambda value: isinstance(value, Mapping)),
}
"""Entries of a job in a job list: what is expected, and whether a value is that."""


def make_jobs(
    data: Sequence[Path],
    *,
    views: Sequence[int | Literal["all"]],
    seeds: Sequence[int],
    variant_names: Sequence[str],
    **common: Any,
) -> list[Job]:
    """All scenes x views x variants x seeds; `common` goes to each job.

    Raises:
        InputError: an unknown variant, two folders with the same name, or a value that is given twice.
    """
    names = [folder.resolve().name for folder in data]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(
            f"several folders are called {', '.join(doubled)}; scenes need different names. Write the job list by hand "
            "(--jobs FILE) to name them."
        )
    for flag, values in (("--views", views), ("--seeds", seeds), ("--variants", variant_names)):
        if doubled := [value for value in dict.fromkeys(values) if list(values).count(value) > 1]:
            raise InputError(f"{flag} has {', '.join(map(str, doubled))} several times: give each value once.")
    for name in variant_names:
        variants.find_variant(name)
    return [
        Job(scene=name, data=str(folder.resolve()), views=n, variant=variant, seed=seed, **common)
        for name, folder in zip(names, data)
        for n in views
        for variant in variant_names
        for seed in seeds
    ]


def read_jobs(path: Path) -> list[Job]:
    """Jobs of a JSON file: a list, or an object with a list under "jobs".

    Raises:
        InputError: not readable, not a list of jobs, or two jobs of one name.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"job list {path} cannot be read: {error}.") from error
    content = content.get("jobs") if isinstance(content, dict) else content
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise InputError(f"job list {path} must hold a list of jobs.")
    jobs = [Job.from_dict(entry) for entry in content]
    names = [job.name for job in jobs]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"job list {path} has several jobs called {doubled[0]}: give them other scene names or seeds.")
    return jobs


def configure(job: Job, folder: Path) -> "TrainerConfig":
    """nerfstudio's configuration of a job that writes into ``folder``.

    Raises:
        InputError: unknown method, variant or override, a number of steps below 1, or an override of what a flag sets.
    """
    if own := sorted(set(_FLAGS) & set(job.overrides)):
        raise InputError(f"override {own[0]!r} would not do what it says: give {_FLAGS[own[0]]} instead.")
    config = variants.base_config(job.method, job.steps)
    variant = variants.find_variant(job.variant)
    variants.override(config, job.overrides)  # before the variant: nerfacto takes its sizes and rays from ours
    variants.apply(config, variant)
    variants.override_known(config, job.overrides)  # all but what nerfacto lacks, where it is that
    data = Path(job.data)
    parser: Any = config.pipeline.datamanager.dataparser  # pyright: ignore[reportAttributeAccessIssue]
    parser.data = data
    parser.num_views = job.views
    parser.downscale_factor = job.downscale_factor
    config.data = data
    config.pipeline.datamanager.data = data
    config.machine.seed = job.seed
    config.output_dir = folder.resolve()
    config.experiment_name = job.scene
    config.timestamp = "run"
    return config


def describe(value: Any) -> Any:
    """A configuration as plain JSON data: dataclasses as objects, classes and functions by name, paths as text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): describe(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [describe(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if getattr(value, "__origin__", None) is None and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return str(value)


def config_hash(config: "TrainerConfig") -> str:
    """Hash of everything in a configuration that decides the result, the content of the prior included."""
    return _hash(config, _NOT_HASHED, prior=True)


def training_hash(config: "TrainerConfig") -> str:
    """Hash of everything in a configuration that decides the weights at the end of training.

    Variants that differ in how views are rendered have the same, unless one alone has a use for the metric scale, which
    is found in training and kept with the weights.
    """
    model: Any = config.pipeline.model
    scored, refined = (getattr(model, name, 0.0) != 0.0 for name in ("score_weight", "refine_tau"))
    more = {"metric_scale": True} if refined and not scored else {}  # of the score it is known already
    return _hash(config, (*_NOT_HASHED, *_AFTER_TRAINING), prior=False, **more)


def _hash(config: "TrainerConfig", left_out: Sequence[str], *, prior: bool, **more: bool) -> str:
    content = describe(config) | more
    for path in left_out:
        owner = content
        *parents, name = path.split(".")
        for parent in parents:
            owner = owner[parent]
        owner.pop(name, None)
    model: Any = config.pipeline.model
    if completing := completing_prior(config):
        content["completion"] = prior_hash(*completing)
    else:
        content["pipeline"]["datamanager"].pop("completion_steps", None)
    if prior and (getattr(model, "score_weight", 0.0) or getattr(model, "refine_tau", 0.0)):
        content["prior"] = prior_hash(model.prior, model.prior_revision)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def completing_prior(config: "TrainerConfig") -> tuple[str, str | None] | None:
    """Name and revision of the prior whose network completes depth in a run; None where none does."""
    manager: Any = config.pipeline.datamanager
    model: Any = config.pipeline.model
    if getattr(manager, "completion", None) != "prior" or manager.stereo_rays_per_batch == 0:
        return None
    if getattr(model, "completed_depth_weight", 0.0) == 0.0:
        return None
    if manager.completion_prior is not None:
        return manager.completion_prior, manager.completion_revision
    return model.prior, model.prior_revision


@functools.cache
def prior_hash(prior: str, revision: str | None) -> str:
    """Hash of the files of a prior folder that decide its scores.

    Raises:
        InputError: no such prior.
    """
    from diffusionerf_ns.prior import find_prior

    folder = find_prior(prior, revision)
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".json", ".safetensors")):
        digest.update(str(path.relative_to(folder)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]

"""nerfstudio's pipeline: the data manager learns of the model's prior, and evaluation keeps each image's values."""

import math
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackAttributes, TrainingCallbackLocation
from nerfstudio.pipelines.base_pipeline import VanillaPipeline, VanillaPipelineConfig

from ddm_training.errors import InputError
from diffusionerf_ns import metrics
from diffusionerf_ns.datamanager import DiffusioNeRFDataManagerConfig
from diffusionerf_ns.dataset import FewViewDataset
from diffusionerf_ns.gradients import check_gradients, scale_small_gradients
from diffusionerf_ns.optimizers import follow_run

TCNN = "tcnn_encoding"  # in the names of tinycudann's parameters
POSES = "camera_optimizer.pose_adjustment"
NEW = ("camera_optimizer.", "field.mlp_pred_normals.")  # a run may begin to learn these when it is resumed
LPIPS = "lpips."  # nerfacto's network for metrics, which is not learnt; the benchmark trains nerfacto without it
OTHER_IMAGES = (
    "Give --num-views, --train-ids and --test-ids as in the run, whose split.json names its images, or train anew "
    "without --load-dir."
)


@dataclass
class DiffusioNeRFPipelineConfig(VanillaPipelineConfig):
    """See `DiffusioNeRFPipeline`."""

    _target: type = field(default_factory=lambda: DiffusioNeRFPipeline)


class DiffusioNeRFPipeline(VanillaPipeline):
    """The model's prior completes depth in the data manager; `ns-eval` writes the metrics of every image."""

    def __init__(self, config: VanillaPipelineConfig, *args: Any, **kwargs: Any) -> None:
        manager, model = config.datamanager, config.model
        if isinstance(manager, DiffusioNeRFDataManagerConfig) and manager.completion_prior is None:
            if manager.completion_revision is not None:
                raise InputError(
                    f"--pipeline.datamanager.completion-revision is {manager.completion_revision}: name the prior that "
                    "it is of with --pipeline.datamanager.completion-prior, or give the model's with "
                    "--pipeline.model.prior-revision."
                )
            named = {"completion_prior": getattr(model, "prior", None)}
            named["completion_revision"] = getattr(model, "prior_revision", None)
            config = replace(config, datamanager=replace(manager, **named))
        super().__init__(config, *args, **kwargs)
        built: Any = self.model
        for data in (self.datamanager.train_dataset, self.datamanager.eval_dataset):
            # Where nerfacto is evaluated, it blends photographs with alpha itself.
            if self.test_mode != "val" and isinstance(data, FewViewDataset) and hasattr(built, "photographs_on"):
                data.show_on(built.photographs_on)

    def load_pipeline(self, loaded_state: dict[str, Any], step: int) -> None:
        """nerfstudio's, which takes a checkpoint of other modules and leaves what it lacks as it was drawn.

        Raises:
            InputError: the checkpoint lacks parameters of the model or has them in another shape, or its camera
                optimiser is of another number of images or has no place in the training that it is to go on with.
        """
        held = {
            name.removeprefix("module.").removeprefix("_model.").removeprefix("module."): value
            for name, value in loaded_state.items()
        }
        wanted = dict(self.model.named_parameters())
        lacking = [name for name in wanted if name not in held and not name.startswith((*NEW, LPIPS))]
        if lacking:
            here, there = (any(TCNN in name for name in names) for names in (lacking, held))
            raise InputError(_other_modules(here, there, lacking))
        if POSES in held:
            self._check_poses(len(held[POSES]), len(wanted[POSES]) if POSES in wanted else None)
        self._check_shapes(held)
        super().load_pipeline(loaded_state, step)
        model: Any = self.model
        if getattr(model.config, "metric_scale", None) is not None:  # given by hand, which wins when resumed too
            model.set_metric_scale(model.config.metric_scale)

    def _check_poses(self, images: int, here: int | None) -> None:
        """``images`` is of the checkpoint's camera optimiser, ``here`` of this run's, None where that is off."""
        if here is None and self.test_mode == "val":  # training; nerfstudio resumes the optimiser of the poses too
            raise InputError(
                f"the checkpoint's camera optimiser has the poses of {images} images, but here it is off. Give "
                "--pipeline.model.camera-optimizer.mode as in the run's config.yml, or train anew without --load-dir."
            )
        if here is not None and here != images:
            raise InputError(
                f"the checkpoint's camera optimiser has the poses of {images} images, but here are {here} to train "
                f"on. {OTHER_IMAGES}"
            )

    def _check_shapes(self, held: dict[str, Any]) -> None:
        """``held`` is what the checkpoint has, by the model's own names."""
        for name, value in self.model.state_dict().items():
            if name not in held or held[name].shape == value.shape:
                continue
            if "embedding_appearance" in name:
                raise InputError(
                    f"the checkpoint has appearance embeddings of {len(held[name])} images, but here are {len(value)} "
                    f"to train on. {OTHER_IMAGES}"
                )
            raise InputError(
                f"{name} is {list(held[name].shape)} in the checkpoint and {list(value.shape)} here: the options are "
                "not those of the run. Give them as in its config.yml, or train anew without --load-dir."
            )

    def get_training_callbacks(
        self, training_callback_attributes: TrainingCallbackAttributes
    ) -> list[TrainingCallback]:
        """nerfstudio's; a checkpoint is loaded already, and optimisers learn here what they need to know of the run."""
        optimizers, trainer = training_callback_attributes.optimizers, training_callback_attributes.trainer
        if optimizers is not None and trainer is not None:
            follow_run(optimizers, trainer.config.max_num_iterations)
        callbacks = super().get_training_callbacks(training_callback_attributes)
        if trainer is not None and getattr(self.model.config, "implementation", None) == "tcnn":
            if not trainer.grad_scaler.is_enabled():
                scale_small_gradients(trainer)
            after = [TrainingCallbackLocation.AFTER_TRAIN_ITERATION]
            check = partial(check_gradients, trainer.grad_scaler)
            callbacks.append(TrainingCallback(after, check, update_every_num_iters=1))
        return callbacks

    def get_eval_image_metrics_and_images(self, step: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """nerfstudio's, without the metrics of an image that has nothing to judge them by: true depth, a mask."""
        values, images = super().get_eval_image_metrics_and_images(step)
        unknown = {name for name in metrics.NOT_OF_ALL if math.isnan(values.get(name, 0.0))}
        return {name: value for name, value in values.items() if name not in unknown}, images

    def get_average_eval_image_metrics(
        self, step: int | None = None, output_path: Path | None = None, get_std: bool = False
    ) -> dict[str, Any]:
        """Means over the test images; "per_image" beside them when asked outside of training (``step`` is None).

        Depth is judged where there is true depth, within masks that are trained by and not where images are
        transparent: the means are over the images that have some. Deviations of a single image are 0.
        """
        model: Any = self.model
        model.image_metrics = []
        means: dict[str, Any] = super().get_average_eval_image_metrics(step, output_path, get_std)
        for name in [name for name in metrics.NOT_OF_ALL if name in means]:
            known = torch.tensor([image[name] for image in model.image_metrics if name in image])
            if len(known) == 0:
                del means[name]
                means.pop(f"{name}_std", None)
            elif len(known) < len(model.image_metrics):
                means[name] = float(known.mean())
                if get_std:
                    means[f"{name}_std"] = float(known.std()) if len(known) > 1 else 0.0
        dataset: Any = self.datamanager.eval_dataset
        if len(dataset) == 1:  # torch's deviation of one number is NaN, which is no JSON
            means |= {name: 0.0 for name in means if name.endswith("_std")}
        if step is None:  # in training the trainer's writers take scalars only
            split = (getattr(dataset, "metadata", None) or {}).get("split")
            images = split["test"] if split else [{} for _ in model.image_metrics]
            means["per_image"] = [image | values for image, values in zip(images, model.image_metrics)]
        model.image_metrics = []
        return means


def _other_modules(wants_tcnn: bool, has_tcnn: bool, lacking: list[str]) -> str:
    """Why a checkpoint does not fit."""
    if has_tcnn and not wants_tcnn:
        return (
            "this run was trained with tinycudann, which is not used here (it must be installed, and needs a CUDA "
            "device); its tables have another order in plain torch. Use the run where it was trained, or install "
            "tinycudann."
        )
    if wants_tcnn and not has_tcnn:
        return (
            "this run was trained without tinycudann, which is used here: set `implementation: torch` of the model in "
            "the run's config.yml (tcnn is there)."
        )
    return (
        f"the checkpoint lacks {len(lacking)} of the model's parameters, {lacking[0]} among them: it is of another "
        "method or of another version of this one."
    )

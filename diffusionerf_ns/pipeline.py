"""nerfstudio's pipeline: the data manager learns of the model's prior, and evaluation keeps each image's values."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackAttributes
from nerfstudio.pipelines.base_pipeline import VanillaPipeline, VanillaPipelineConfig

from ddm_training.errors import InputError
from diffusionerf_ns.datamanager import DiffusioNeRFDataManagerConfig
from diffusionerf_ns.optimizers import follow_run


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

    def get_training_callbacks(
        self, training_callback_attributes: TrainingCallbackAttributes
    ) -> list[TrainingCallback]:
        """nerfstudio's; the learning rates learn the run's length here, where a checkpoint is loaded already."""
        optimizers, trainer = training_callback_attributes.optimizers, training_callback_attributes.trainer
        if optimizers is not None and trainer is not None:
            follow_run(optimizers, trainer.config.max_num_iterations)
        return super().get_training_callbacks(training_callback_attributes)

    def get_average_eval_image_metrics(
        self, step: int | None = None, output_path: Path | None = None, get_std: bool = False
    ) -> dict[str, Any]:
        """Means over the test images; "per_image" beside them when asked outside of training (``step`` is None)."""
        model: Any = self.model
        model.image_metrics = []
        means: dict[str, Any] = super().get_average_eval_image_metrics(step, output_path, get_std)
        if step is None:  # in training the trainer's writers take scalars only
            split = (getattr(self.datamanager.eval_dataset, "metadata", None) or {}).get("split")
            images = split["test"] if split else [{} for _ in model.image_metrics]
            means["per_image"] = [image | values for image, values in zip(images, model.image_metrics)]
        model.image_metrics = []
        return means

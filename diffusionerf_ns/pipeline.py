"""nerfstudio's pipeline, and the values of each image beside their means."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nerfstudio.pipelines.base_pipeline import VanillaPipeline, VanillaPipelineConfig


@dataclass
class DiffusioNeRFPipelineConfig(VanillaPipelineConfig):
    """See `DiffusioNeRFPipeline`."""

    _target: type = field(default_factory=lambda: DiffusioNeRFPipeline)


class DiffusioNeRFPipeline(VanillaPipeline):
    """Lets `ns-eval` write the metrics of every image, under "per_image", and not only their means."""

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

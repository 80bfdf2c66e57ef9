"""The command ``adv-classify``: LightningCLI around :class:`RobustClassifier`, thresholds, and evaluation under attack.

``adv-classify fit|validate|test|predict --config FILE`` are LightningCLI's own; ``thresholds`` and ``evaluate`` ours.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from advmed.cli.options import Option
from advmed.integrations.lightning.cli import LightningCommand


class Classify(LightningCommand):
    """The command of the classifiers."""

    name = "adv-classify"
    extra = "classify"
    description = "Robust image classification: timm networks, trained with AMAT, DPAAT and others."
    example = "--data MedMNIST --data.file images.npz --model.network.name resnet18"
    monitor = ("val/mAP", "max")
    links = ("num_classes", "channels", "class_counts", "class_names", "image_size", "image_bits")
    norms = (2, "inf")
    evaluate_options = (Option("gradcam", bool, "compare Grad-CAM of clean and attacked images", True),)

    def classes(self) -> Any:
        """See :meth:`LightningCommand.classes`."""
        from adv_classify.data import ClassificationData
        from adv_classify.module import RobustClassifier

        return RobustClassifier, ClassificationData

    def write_predictions(self, folder: Path, batches: Sequence[Any], model: Any, data: Any) -> Path:
        """See :meth:`LightningCommand.write_predictions`."""
        from adv_classify.module import PREDICTIONS, write_predictions

        write_predictions(folder / PREDICTIONS, batches, data.class_names)
        return folder / PREDICTIONS

    @property
    def rule(self) -> str:
        """See :attr:`LightningCommand.rule`."""
        from advmed.thresholds import DEFAULT_RULE

        return DEFAULT_RULE

    def evaluation(self) -> Any:
        """See :meth:`LightningCommand.evaluation`."""
        from adv_classify.evaluate import ClassifierEvaluation

        return ClassifierEvaluation


main = Classify().main


if __name__ == "__main__":
    sys.exit(main())

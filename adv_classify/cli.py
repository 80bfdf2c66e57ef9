"""The command ``adv-classify``: LightningCLI around :class:`RobustClassifier`, thresholds, and evaluation under attack.

``adv-classify fit|validate|test|predict --config FILE`` are LightningCLI's own; ``thresholds`` and ``evaluate`` ours.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from advmed.integrations.lightning.cli import Study, Tool


class Classify(Tool):
    """The command of the classifiers."""

    name = "adv-classify"
    monitor = ("val/mAP", "max")
    links = ("num_classes", "channels", "class_counts")
    norms = (2, "inf")

    def classes(self) -> Any:
        """See :meth:`Tool.classes`."""
        from adv_classify.data import ClassificationData
        from adv_classify.module import RobustClassifier

        return RobustClassifier, ClassificationData

    def write_predictions(self, folder: Path, batches: Sequence[Any], model: Any, data: Any) -> Path:
        """See :meth:`Tool.write_predictions`."""
        from adv_classify.module import PREDICTIONS, write_predictions

        write_predictions(folder / PREDICTIONS, batches, data.class_names)
        return folder / PREDICTIONS

    @property
    def rule(self) -> str:
        """See :attr:`Tool.rule`."""
        from advmed.thresholds import DEFAULT_RULE

        return DEFAULT_RULE

    def measure(self, path: str, data: Any, **how: Any) -> Any:
        """See :meth:`Tool.measure`."""
        from adv_classify.module import RobustClassifier
        from advmed.integrations.lightning.calibration import measure

        return measure(RobustClassifier.standard(path, data), path, data, **how)

    def default_levels(self, norm: float, data: Any, split: str) -> list[float]:
        """The same noise in every value whatever the norm: 0, 2, 4 and 8 / 255."""
        scale = 1.0 if norm == float("inf") else data.dataset(split)[0]["image"].numel() ** 0.5
        return [round(level / 255 * scale, 4 if scale > 1 else 8) for level in (0, 2, 4, 8)]

    def parse_attacks(self, names: Sequence[str], norm: float) -> Any:
        """See :meth:`Tool.parse_attacks`; with those of torchattacks."""
        from adv_classify.evaluate import parse

        return parse(names, norm)

    def add_evaluate_arguments(self, parser: Any) -> None:
        """See :meth:`Tool.add_evaluate_arguments`."""
        parser.add_argument("--gradcam", type=bool, default=True, help="compare Grad-CAM of clean and attacked images")

    def study(self, given: Any, names: Sequence[str], data: Any, device: Any) -> Study:
        """See :meth:`Tool.study`."""
        from adv_classify import evaluate as host
        from advmed.evaluation.subjects import Subject

        models = [
            host.load_model(name, path, data, given.split, device, gradcam=given.gradcam)
            for name, path in zip(names, given.checkpoints, strict=True)
        ]
        values = data.dataset(given.split)[0]["image"].numel()
        return Study(
            subjects=[
                Subject(m.name, m.path, batches(), m.margins, few=batches)
                for m in models
                for batches in [partial(host.make_batches, m, given.samples)]
            ],
            metrics=host.metrics(given.gradcam),
            examples=partial(host.make_examples, models, data.class_names),
            bounds=host.BOUNDS,
            input=f"the image in [0, 1] ({values} values)",
            settings={},
            fingerprint={"cam": given.gradcam},
        )


main = Classify().main


if __name__ == "__main__":
    sys.exit(main())

"""The command ``adv-landmark``: LightningCLI around :class:`RobustLandmarks`, thresholds, and evaluation under attack.

``adv-landmark fit|validate|test|predict --config FILE`` are LightningCLI's own; ``thresholds`` and ``evaluate`` ours.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from advmed.cli.options import Option
from advmed.integrations.lightning.cli import LightningCommand


class Landmark(LightningCommand):
    """The command of the landmark detectors."""

    name = "adv-landmark"
    extra = "landmark"
    description = "Robust landmark detection: a multi-task U-Net, trained with AMAT and others."
    example = "--data LandmarkTable --data.root radiographs --data.size '[400,320]'"
    monitor = ("val/MRE", "min")
    links = ("landmark_names", "channels", "size", "unit")
    norms = (2,)
    evaluate_options = (Option("radii", list[float], "of SDR, in the data's unit", [2, 2.5, 3, 4]),)

    def classes(self) -> Any:
        """See :meth:`LightningCommand.classes`."""
        from adv_landmark.data import LandmarkData
        from adv_landmark.module import RobustLandmarks

        return RobustLandmarks, LandmarkData

    def write_predictions(self, folder: Path, batches: Sequence[Any], model: Any, data: Any) -> Path:
        """See :meth:`LightningCommand.write_predictions`."""
        from adv_landmark.module import write_predictions

        return write_predictions(folder, batches, data)

    @property
    def rule(self) -> str:
        """See :attr:`LightningCommand.rule`."""
        from adv_landmark.module import RULE

        return RULE

    def evaluation(self) -> Any:
        """See :meth:`LightningCommand.evaluation`."""
        from adv_landmark.evaluate import LandmarkEvaluation

        return LandmarkEvaluation


main = Landmark().main


if __name__ == "__main__":
    sys.exit(main())

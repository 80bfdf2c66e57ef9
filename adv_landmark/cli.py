"""The command ``adv-landmark``: LightningCLI around :class:`RobustLandmarks`, thresholds, and evaluation under attack.

``adv-landmark fit|validate|test|predict --config FILE`` are LightningCLI's own; ``thresholds`` and ``evaluate`` ours.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from advmed.integrations.lightning.cli import Study, Tool


class Landmark(Tool):
    """The command of the landmark detectors."""

    name = "adv-landmark"
    monitor = ("val/MRE", "min")
    links = ("landmark_names", "channels", "size", "unit")
    norms = (2,)

    def classes(self) -> Any:
        """See :meth:`Tool.classes`."""
        from adv_landmark.data import LandmarkData
        from adv_landmark.module import RobustLandmarks

        return RobustLandmarks, LandmarkData

    def write_predictions(self, folder: Path, batches: Sequence[Any], model: Any, data: Any) -> Path:
        """See :meth:`Tool.write_predictions`."""
        from adv_landmark.module import write_predictions

        return write_predictions(folder, batches, data)

    @property
    def rule(self) -> str:
        """See :attr:`Tool.rule`."""
        from adv_landmark.module import RULE

        return RULE

    def measure(self, path: str, data: Any, **how: Any) -> Any:
        """See :meth:`Tool.measure`."""
        from adv_landmark.module import RobustLandmarks
        from advmed.integrations.lightning.calibration import measure

        return measure(RobustLandmarks.standard(path, data), path, data, **how)

    def default_levels(self, norm: float, data: Any, split: str) -> list[float]:
        """The paper's levels, 0, 0.5, 1 and 2 in L2 for 3 x 200 x 160 values, and as much for every value of others."""
        if norm == float("inf"):
            return [0, 1 / 255, 2 / 255, 4 / 255]
        scale = (data.channels * data.size[0] * data.size[1] / (3 * 200 * 160)) ** 0.5
        return [round(level * scale, 4) for level in (0, 0.5, 1, 2)]

    def add_evaluate_arguments(self, parser: Any) -> None:
        """See :meth:`Tool.add_evaluate_arguments`."""
        parser.add_argument("--radii", type=list[float], default=[2, 2.5, 3, 4], help="of SDR, in the data's unit")

    def study(self, given: Any, names: Sequence[str], data: Any, device: Any) -> Study:
        """See :meth:`Tool.study`."""
        from adv_landmark import evaluate as host
        from adv_landmark.data import BOUNDS
        from advmed.evaluation.subjects import Subject

        metrics = host.metrics(data.unit, given.radii)
        models = [
            host.load_model(name, path, data, given.split, device)
            for name, path in zip(names, given.checkpoints, strict=True)
        ]
        height, width = data.size
        return Study(
            subjects=[
                Subject(m.name, m.path, batches(), m.margins, few=batches)
                for m in models
                for batches in [partial(host.make_batches, m, given.samples)]
            ],
            metrics=metrics,
            examples=partial(host.make_examples, models),
            bounds=BOUNDS,
            input=f"the image in [-1, 1] ({data.channels} x {height} x {width} values)",
            settings={"landmarks": f"{len(data.landmark_names)}: {', '.join(data.landmark_names)}"},
        )


main = Landmark().main


if __name__ == "__main__":
    sys.exit(main())

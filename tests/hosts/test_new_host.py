"""What docs/architecture.md says to somebody who adds a detector of torchvision."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

from advmed import MethodRun, TrainingSettings
from advmed.training.run import self_calibrated

pytestmark = pytest.mark.slow
PAGE = Path(__file__).resolve().parents[2] / "docs/architecture.md"


def test_the_objective_of_the_page_trains_a_detector() -> None:
    given: dict[str, Any] = {"torch": torch}
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(code, given)
    objective = given["DetectionObjective"]
    torch.manual_seed(0)
    model = fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64
    )
    images, boxes = torch.rand(3, 3, 64, 64), torch.tensor([[5.0, 5.0, 30.0, 30.0], [20.0, 20.0, 60.0, 50.0]])
    targets = [{"boxes": boxes, "labels": torch.tensor([1, 2])} for _ in images]
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    settings = TrainingSettings(preset="paper", delta=0.5, steps=3, bounds=(0, 1))  # noise that shows
    run = MethodRun("AMAT", settings, self_calibrated(objective.names, settings, len(images)), epochs=10)
    logs = []
    for epoch in range(2):
        run.begin_epoch(epoch)
        optimizer.zero_grad()
        step = run.step(objective(model, targets), images, ["a", "b", "c"])
        step.loss.backward()
        optimizer.step()
        logs.append(run.end_epoch())
    assert str(run.thresholds).count("<") == 4
    assert logs[1]["loss_adversarial"] > logs[1]["loss_clean"]  # the epoch before was the warm-up
    assert step.adversarial is not None
    assert 0.4 < (step.adversarial - images).flatten(1).norm(dim=1).min() <= 0.5 + 1e-5
    assert run.state_dict()["method"]

"""One of two processes of test_ddp.py: ``gloo_fit.py FOLDER`` with LOCAL_RANK and ADVMED_RUNS in the environment.

Lightning finds the other process by its own environment variables, as under SLURM or torchrun.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adv_landmark import module
from adv_landmark.cli import main
from adv_landmark.module import RobustLandmarks
from adv_landmark.network import make_network


def without_batch_norm(*given: Any) -> nn.Module:
    """The network whose images do not know of each other, so that it does not matter who shares a batch."""

    def replace(part: nn.Module) -> None:
        for name, child in part.named_children():
            if isinstance(child, nn.BatchNorm2d):  # timm's own kind has its activation within
                act = getattr(child, "act", nn.Identity())
                setattr(part, name, nn.Sequential(nn.GroupNorm(1, child.num_features), act))
            else:
                replace(child)

    network = make_network(*given)
    replace(network)
    return network


def run(name: str, words: list[str], folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"batches": [], "steps": []}
    step, end = RobustLandmarks.training_step, RobustLandmarks.on_train_end

    def noted(self: RobustLandmarks, batch: Any, batch_idx: int) -> Any:
        weights = b"".join(p.detach().numpy().tobytes() for p in self.parameters())
        found["steps"].append(hashlib.sha256(weights).hexdigest())
        found["batches"].append(list(batch["id"]))
        return step(self, batch, batch_idx)

    def ended(self: RobustLandmarks) -> None:
        end(self)
        found["method"] = self.run.method.state_dict()
        found["thresholds"] = str(self.run.thresholds)
        found["logged"] = {key: float(value) for key, value in self.trainer.logged_metrics.items()}

    RobustLandmarks.training_step, RobustLandmarks.on_train_end = noted, ended
    try:
        status = main(["fit", *words, "--trainer.default_root_dir", str(folder / name)])
    finally:
        RobustLandmarks.training_step, RobustLandmarks.on_train_end = step, end
    assert status == 0, name
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    module.make_network = without_batch_norm
    place, runs = Path(sys.argv[1]), json.loads(os.environ["ADVMED_RUNS"])
    predict = runs.pop("predict")
    found = {name: run(name, words, place) for name, words in runs.items()}
    assert main(["predict", *predict]) == 0
    (place / f"rank_{os.environ['LOCAL_RANK']}.json").write_text(json.dumps(found))

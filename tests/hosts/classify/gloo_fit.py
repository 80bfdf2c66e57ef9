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

from adv_classify.cli import main
from adv_classify.module import RobustClassifier


def run(name: str, words: list[str], folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"batches": [], "steps": []}
    step, end = RobustClassifier.training_step, RobustClassifier.on_train_end

    def noted(self: RobustClassifier, batch: Any, batch_idx: int) -> Any:
        weights = b"".join(p.detach().numpy().tobytes() for p in self.parameters())
        found["steps"].append(hashlib.sha256(weights).hexdigest())
        found["batches"].append(list(batch["id"]))
        return step(self, batch, batch_idx)

    def ended(self: RobustClassifier) -> None:
        end(self)
        found["method"] = self.run.method.state_dict()
        found["thresholds"] = str(self.run.thresholds)
        found["logged"] = {key: float(value) for key, value in self.trainer.logged_metrics.items()}

    RobustClassifier.training_step, RobustClassifier.on_train_end = noted, ended
    try:
        status = main(["fit", *words, "--trainer.default_root_dir", str(folder / name)])
    finally:
        RobustClassifier.training_step, RobustClassifier.on_train_end = step, end
    assert status == 0, name
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    place, runs = Path(sys.argv[1]), json.loads(os.environ["ADVMED_RUNS"])
    predict = runs.pop("predict")
    found = {name: run(name, words, place) for name, words in runs.items()}
    assert main(["predict", *predict]) == 0
    (place / f"rank_{os.environ['LOCAL_RANK']}.json").write_text(json.dumps(found))

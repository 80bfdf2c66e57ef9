"""One of two processes of test_ddp.py: the host's distributed training on the CPU, as far as it goes there.

The host takes a GPU for granted: the processes meet over gloo instead, the model is wrapped without device ids, and
the validation of the finished checkpoint, which asks for a GPU, is left out. Everything else is theirs.

python gloo_trainer.py FOLDER RANK ARGUMENTS RUNS (with RANK, LOCAL_RANK and WORLD_SIZE in the environment)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from torch import nn
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.models.yolo.detect import DetectionTrainer

from adv_yolo.trainer import TRAINERS
from helpers.hosts import Wrapper, meeting, recorded


def run(name: str, method: str, folder: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    kind = TRAINERS.get(method, DetectionTrainer)
    trainer = kind(overrides={**arguments, "project": str(folder), "name": name})
    trainer.world_size = 2
    found = recorded(trainer, "optimizer_step", lambda: trainer.model.module)
    measured: list[dict[str, float]] = []
    trainer.add_callback("on_train_epoch_end", lambda t: measured.append(getattr(t, "_epoch_values", {})))
    trainer.train()
    found |= {"folder": str(trainer.save_dir), "log": {key: [v[key] for v in measured] for key in measured[0]}}
    if kind is not DetectionTrainer:
        found |= {"method": trainer.run.method.state_dict(), "thresholds": str(trainer.run.thresholds)}
    return found


if __name__ == "__main__":
    folder, rank, arguments, runs = Path(sys.argv[1]), int(sys.argv[2]), *map(json.loads, sys.argv[3:])
    nn.parallel.DistributedDataParallel = Wrapper
    BaseTrainer._setup_ddp = lambda self: None
    BaseTrainer.final_eval = lambda self: None
    with meeting(folder, rank) as found:
        for name, (method, own) in runs.items():
            found[name] = run(name, method, folder, {**arguments, **own})

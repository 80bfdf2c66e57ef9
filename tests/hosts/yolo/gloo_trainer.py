"""One of two processes of test_ddp.py: the host's distributed training on the CPU, as far as it goes there.

The host takes a GPU for granted: the processes meet over gloo instead, the model is wrapped without device ids, and
the validation of the finished checkpoint, which asks for a GPU, is left out. Everything else is theirs.

python gloo_trainer.py FOLDER DATA MODEL (with RANK, LOCAL_RANK and WORLD_SIZE in the environment)
"""

from __future__ import annotations

import datetime
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils import RANK

from adv_yolo import AMATDetectionTrainer, DPAATDetectionTrainer, SATDetectionTrainer, TRADESDetectionTrainer

WORLD = 2
RUNS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "stock": (DetectionTrainer, {}),
    "nothing": (SATDetectionTrainer, {"eps": 0.0, "bn": "clean", "steps": 1}),
    "amat": (AMATDetectionTrainer, {"delta": 0.5, "steps": 2, "random_start": 1.0, "refinement": "crossing"}),
    "dpaat": (DPAATDetectionTrainer, {"eps": 1.0, "steps": 2, "step_size": 0.25, "average": "epoch"}),
    "trades": (TRADESDetectionTrainer, {"eps": 1.0, "steps": 2}),
}


class Wrapper(nn.parallel.DistributedDataParallel):
    passes = 0

    def __init__(self, module: nn.Module, device_ids: Any = None, **settings: Any) -> None:
        super().__init__(module, **settings)

    def forward(self, *given: Any, **named: Any) -> Any:
        type(self).passes += 1
        return super().forward(*given, **named)


def hashed(module: nn.Module) -> str:
    weights = dict(module.named_parameters())
    return hashlib.sha256(b"".join(weights[name].detach().numpy().tobytes() for name in sorted(weights))).hexdigest()


def run(name: str, folder: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    kind, own = RUNS[name]
    trainer = kind(overrides={**arguments, **own, "project": str(folder), "name": name})
    trainer.world_size = WORLD
    found: dict[str, Any] = {"steps": [], "epochs": []}
    step = trainer.optimizer_step

    def counted() -> None:
        step()
        found["steps"].append(hashed(trainer.model.module))

    trainer.optimizer_step = counted
    trainer.add_callback("on_train_epoch_end", lambda t: found["epochs"].append(getattr(t, "_epoch_values", None)))
    Wrapper.passes = 0
    trainer.train()
    found["passes"] = Wrapper.passes
    found["method"] = trainer.run.method.state_dict() if name != "stock" else None
    found["thresholds"] = str(trainer.run.thresholds) if name == "amat" else None
    found["folder"] = str(trainer.save_dir)
    return found


def main() -> None:
    folder, arguments = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=RANK,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=120),
    )
    nn.parallel.DistributedDataParallel = Wrapper
    BaseTrainer._setup_ddp = lambda self: None
    BaseTrainer.final_eval = lambda self: None
    found = {name: run(name, folder, arguments) for name in RUNS}
    (folder / f"rank_{RANK}.json").write_text(json.dumps(found))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()

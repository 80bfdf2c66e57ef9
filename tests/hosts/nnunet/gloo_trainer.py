"""One of two processes of test_ddp.py: the host's distributed training on the CPU, as far as it goes there.

nnU-Net takes a GPU for granted when it finds torch.distributed running. So trainers are made before it runs, told
afterwards, and wrapped by a DistributedDataParallel without device ids. Everything from ``initialize`` on is theirs.

python gloo_trainer.py RANK FOLDER PREPROCESSED_DATA_SET
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from nnunetv2.training.logging.nnunet_logger import LocalLogger
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as host
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from adv_nnunet import trainer as trainers

WORLD = 2
SETTINGS = {
    "epochs": 3,
    "iterations_per_epoch": 2,
    "val_iterations_per_epoch": 1,
    "steps": 2,
    "eps": 2.0,
    "delta": 1.0,
    "seed": 0,
    "refinement": "crossing",
}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "self-calibrated": ("AMAT", {"random_start": 1.0, "std_trainer": "nnUNetTrainerOfNobody"}),
    "measured": ("AMAT", {"backward": "sequential", "threshold_samples": 8}),
    "together": ("SAT", {"backward": "together"}),
    "sequential": ("SAT", {"backward": "sequential"}),
    "standard": ("STD", {}),
    "dpaat": ("DPAAT", {"average": "epoch", "step_size": 0.25}),
    "trades": ("TRADES", {}),
}


def make(name: str, folder: Path, data: Path) -> Any:
    kind, changes = RUNS[name]
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(SETTINGS | changes | {"tag": name}))
    os.environ["nnUNet_adversarial"] = str(path)
    plans = json.loads((data / "tiny.json").read_text()) | {"continue_training": False}
    description = json.loads((data / "dataset.json").read_text())
    return getattr(trainers, f"nnUNetTrainer{kind}")(plans, "2d", 0, description, torch.device("cpu"))


def hashed(trainer: Any) -> str:
    weights = trainer.network.state_dict()
    return hashlib.sha256(b"".join(weights[name].numpy().tobytes() for name in sorted(weights))).hexdigest()


def run(trainer: Any, rank: int) -> dict[str, Any]:
    """The whole training; fixed batches, others on each rank, and of a sample that both ranks meet."""
    trainer.is_ddp, trainer.local_rank = True, rank
    trainer.initialize()
    assert isinstance(trainer.network, DistributedDataParallel)
    assert trainer.batch_size == 4 // WORLD
    passes: list[int] = []
    trainer.network.register_forward_hook(lambda *_: passes.append(1))
    np.random.seed(10 + rank)
    own = trainer.get_dataloaders()
    batches = [next(own[0]) for _ in range(6)]
    # Augmentation is not repeatable (see conftest.py): take the images from a fixed stream instead.
    generator = torch.Generator().manual_seed(rank)
    shared = [f"{trainer.get_tr_and_val_datasets()[0].identifiers[0]}:7"]
    for batch in batches:
        batch["data"] = torch.randn(batch["data"].shape, generator=generator)
        batch["target"] = [
            torch.randint(0, 3, target.shape, generator=generator).to(target.dtype) for target in batch["target"]
        ]
        if "ids" in batch:
            batch["ids"][1:] = shared
    trainer.get_dataloaders = lambda: (iter(batches), own[1])
    per_step, step = [], trainer.train_step

    def train_step(batch: dict[str, Any]) -> Any:
        before = len(passes)
        result = step(batch)
        per_step.append((hashed(trainer), len(passes) - before))
        return result

    trainer.train_step = train_step
    trainer.run_training()
    thresholds = getattr(trainer.method, "thresholds", None)
    return {
        "steps": per_step,
        "method": trainer.method.state_dict(),
        "thresholds": str(thresholds),
        "log": {k: v for k, v in trainer.logger.get_checkpoint().items() if k in ("train_losses", *trainers.LOG_KEYS)},
        "folder": trainer.output_folder,
        "weights": {k: v.double().sum().item() for k, v in trainer.network.module.state_dict().items()},
    }


def main() -> None:
    rank, folder, data = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    LocalLogger.plot_progress_png = lambda self, folder: None
    made = {name: make(name, folder, data) for name in RUNS}
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=120),
    )
    host.DDP = lambda network, device_ids: DistributedDataParallel(network)
    found = {name: run(trainer, rank) for name, trainer in made.items()}
    (folder / f"rank_{rank}.json").write_text(json.dumps(found, default=float))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()

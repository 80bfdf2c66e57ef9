"""One of two processes of test_ddp.py: the host's distributed training on the CPU, as far as it goes there.

nnU-Net takes a GPU for granted when it finds torch.distributed running. So trainers are made before it runs, told
afterwards, and wrapped by a DistributedDataParallel without device ids. Everything from ``initialize`` on is theirs.

python gloo_trainer.py FOLDER RANK PREPROCESSED_DATA_SET SETTINGS
"""

from __future__ import annotations

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

from adv_nnunet import trainer as trainers
from helpers.hosts import Wrapper, meeting, recorded


def make(name: str, kind: str, settings: dict[str, Any], folder: Path, data: Path) -> Any:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings | {"tag": name}))
    os.environ["nnUNet_adversarial"] = str(path)
    plans = json.loads((data / "tiny.json").read_text()) | {"continue_training": False}
    description = json.loads((data / "dataset.json").read_text())
    return getattr(trainers, f"nnUNetTrainer{kind}")(plans, "2d", 0, description, torch.device("cpu"))


def run(trainer: Any, rank: int) -> dict[str, Any]:
    """The whole training; fixed batches, others on each rank, and of a sample that both ranks meet."""
    trainer.is_ddp, trainer.local_rank = True, rank
    trainer.initialize()
    assert isinstance(trainer.network, Wrapper)
    assert trainer.batch_size == 2  # of four
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
    measured = trainer.get_dataloaders  # thresholds are, on whole batches
    trainer.get_dataloaders = lambda: (iter(batches), own[1]) if trainer.batch_size == 2 else measured()
    found = recorded(trainer, "train_step", lambda: trainer.network.module)
    trainer.run_training()
    return found | {
        "method": trainer.method.state_dict(),
        "thresholds": str(getattr(trainer.method, "thresholds", None)),
        "log": {k: v for k, v in trainer.logger.get_checkpoint().items() if k in trainers.LOG_KEYS},
        "folder": trainer.output_folder,
        "weights": {k: v.double().sum().item() for k, v in trainer.network.module.state_dict().items()},
    }


if __name__ == "__main__":
    folder, rank, data, runs = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4])
    LocalLogger.plot_progress_png = lambda self, folder: None
    made = {name: make(name, kind, settings, folder, data) for name, (kind, settings) in runs.items()}
    host.DDP = Wrapper
    with meeting(folder, rank) as found:
        found.update({name: run(trainer, rank) for name, trainer in made.items()})

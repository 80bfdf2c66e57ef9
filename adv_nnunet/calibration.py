"""Thresholds for AMAT from a finished standard training: the loss terms of its network over clean training samples."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from tqdm import tqdm

from adv_nnunet.objective import SampleTerms
from advmed.thresholds import DEFAULT_RULE, TermStatistics, Thresholds, sha256

FILE = "thresholds.json"
"""Name of the file beside the checkpoint that was measured."""
CHECKPOINT = "checkpoint_final.pth"
"""A training is finished when this file is there."""


def standard_folders(trainer: Any) -> list[Path]:
    """Where a finished standard training of the same data set, plans, configuration and fold would be."""
    names = [trainer.settings.std_trainer] if trainer.settings.std_trainer else [trainer.stock_name, "nnUNetTrainerSTD"]
    dataset = Path(trainer.output_folder_base).parent
    suffix = f"__{trainer.plans_manager.plans_name}__{trainer.configuration_name}"
    return [dataset / (name + suffix) / f"fold_{trainer.fold}" for name in names]


def find_file(trainer: Any) -> Path | None:
    """The thresholds file of the standard training, if there is one."""
    return next((f / FILE for f in standard_folders(trainer) if (f / FILE).is_file()), None)


def find_checkpoint(trainer: Any) -> Path | None:
    """The final checkpoint of the standard training, if it is finished."""
    return next((f / CHECKPOINT for f in standard_folders(trainer) if (f / CHECKPOINT).is_file()), None)


def is_outdated(found: Thresholds, path: Path) -> bool:
    """Whether the checkpoint beside a thresholds file is not the one that was measured."""
    checkpoint = path.with_name(CHECKPOINT)
    return bool(found.source_sha256) and checkpoint.is_file() and sha256(checkpoint) != found.source_sha256


def measure(trainer: Any, checkpoint: Path, *, seed: int = 0) -> Thresholds:
    """Measures the network of ``checkpoint`` on clean training samples, and applies the rule of the settings.

    Samples are drawn as the training draws them (random crops, the same oversampling of foreground), without
    augmentation, from a fixed seed.

    Args:
        trainer: an initialised trainer of ours; gives data, loss and settings.
        checkpoint: a finished standard training of the same fold.
        seed: of the draws.

    Returns:
        The thresholds, with the mean foreground Dice of the measured network in ``notes``, to judge how well trained
        it is.
    """
    settings, config = trainer.settings, trainer.configuration_manager
    network = trainer.build_network_architecture(
        trainer.plans_manager,
        config,
        trainer.num_input_channels,
        trainer.label_manager.num_segmentation_heads,
        trainer.enable_deep_supervision,
    ).to(trainer.device)
    network.load_state_dict(torch.load(checkpoint, map_location=trainer.device, weights_only=False)["network_weights"])
    network.eval()
    terms = SampleTerms(trainer.loss, settings.terms, settings.absent_classes)
    statistics = TermStatistics(terms.names)

    training, _ = trainer.get_tr_and_val_datasets()
    transforms = trainer.get_validation_transforms(
        trainer._get_deep_supervision_scales(),
        is_cascaded=trainer.is_cascaded,
        foreground_labels=trainer.label_manager.foreground_labels,
        regions=trainer.label_manager.foreground_regions if trainer.label_manager.has_regions else None,
        ignore_label=trainer.label_manager.ignore_label,
    )
    loader = nnUNetDataLoader(
        training,
        trainer.batch_size,
        config.patch_size,
        config.patch_size,
        trainer.label_manager,
        oversample_foreground_percent=trainer.oversample_foreground_percent,
        transforms=transforms,
    )
    rule = settings.rule or DEFAULT_RULE
    samples = settings.threshold_samples or min(10_000, max(500, len(trainer.sample_ids() or training.identifiers)))
    dice: list[float] = []
    global_state = np.random.get_state()
    np.random.seed(seed)  # the host's loader draws from numpy's global generator
    try:
        with torch.no_grad(), tqdm(total=samples, desc="thresholds", unit="sample", disable=None) as bar:
            for _ in range(math.ceil(samples / trainer.batch_size)):  # (a bar that is not shown does not count)
                batch = loader.generate_train_batch()
                images, targets = trainer.to_device(batch)
                with trainer.autocast():
                    outputs = network(images)
                values = terms(outputs, targets)
                statistics.update(values)
                dice.append(trainer.hard_dice(outputs, targets))
                bar.update(len(values))
    finally:
        np.random.set_state(global_state)
    notes: dict[str, Any] = {
        "dataset": trainer.plans_manager.dataset_name,
        "configuration": trainer.configuration_name,
        "fold": trainer.fold,
        "absent_classes": "skip" if terms.skip_absent else "count",
        "training_dice": round(float(np.nanmean(dice)), 4),
    }
    return statistics.thresholds(rule, source=str(checkpoint), source_sha256=sha256(checkpoint), notes=notes)

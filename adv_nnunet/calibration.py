"""Thresholds for AMAT from a finished standard training: the loss terms of its network over clean training samples."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
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


USELESS, POOR = 0.1, 0.5
"""Mean Dice on training samples: below the first thresholds are refused, below the second doubted."""


def doubts(found: Thresholds, origin: str, refuse: bool) -> str | None:
    """What is to be said against the network that thresholds were measured on; None if nothing is, or not known.

    Args:
        found: the thresholds; their notes hold the network's Dice.
        origin: what was measured, or the file.
        refuse: whether a network that has learnt next to nothing is an error.

    Raises:
        ValueError: in that case.
    """
    quality = found.notes.get("training_dice")
    if quality is None or quality >= POOR:
        return None
    poor = f"the standard network behind {origin} has a mean Dice of {quality} on its own training samples"
    if refuse and not quality >= USELESS:
        raise ValueError(
            f"{poor}: it has learnt next to nothing, and thresholds of its losses mean nothing. Train it to its end, "
            f"name thresholds of another training ('thresholds: PATH'), or set 'check_standard: false' if this is what "
            f"you want."
        )
    return (
        f"WARNING: {poor}. Thresholds of a poorly trained network are high, and let noise grow that a good one could "
        f"not bear."
    )


def standard_network(trainer: Any, checkpoint: Path) -> nn.Module:
    """The network of a finished standard training, on the trainer's device."""
    network: nn.Module = trainer.build_network_architecture(
        trainer.plans_manager,
        trainer.configuration_manager,
        trainer.num_input_channels,
        trainer.label_manager.num_segmentation_heads,
        trainer.enable_deep_supervision,
    ).to(trainer.device)
    network.load_state_dict(torch.load(checkpoint, map_location=trainer.device, weights_only=False)["network_weights"])
    return network


def training_batches(trainer: Any) -> Iterator[dict[str, Any]]:
    """The host's own training batches, made in this process, so that global seeds decide about them."""
    before = os.environ.get("nnUNet_n_proc_DA")
    os.environ["nnUNet_n_proc_DA"] = "0"
    try:
        loader, _ = trainer.get_dataloaders()
    finally:
        if before is None:
            del os.environ["nnUNet_n_proc_DA"]
        else:
            os.environ["nnUNet_n_proc_DA"] = before
    return iter(loader)


def measure(trainer: Any, checkpoint: Path, *, seed: int = 0) -> Thresholds:
    """Measures the network of ``checkpoint`` on clean training samples, and applies the rule of the settings.

    Samples are those that the training sees: from the host's own loader, with its crops, oversampling and augmentation,
    from a fixed seed; the network is in training mode, with the statistics of the batch.

    Args:
        trainer: an initialised trainer of ours; gives data, loss and settings.
        checkpoint: a finished standard training of the same fold.
        seed: of the draws.

    Returns:
        The thresholds, with the mean foreground Dice of the measured network in ``notes``.
    """
    settings = trainer.settings
    terms = SampleTerms(trainer.loss, settings.terms, settings.absent_classes)
    statistics = TermStatistics(terms.names, keep=True)

    training, _ = trainer.get_tr_and_val_datasets()
    rule = settings.rule or DEFAULT_RULE
    samples = settings.threshold_samples or min(10_000, max(500, len(trainer.sample_ids() or training.identifiers)))
    dice: list[float] = []
    # The host's loader and augmentation draw from global generators.
    states = np.random.get_state(), random.getstate()
    try:
        with (
            torch.random.fork_rng(),
            torch.no_grad(),
            tqdm(total=samples, desc="thresholds", unit="sample", disable=None) as bar,
        ):
            np.random.seed(seed)
            random.seed(seed)
            torch.manual_seed(seed)
            network = standard_network(trainer, checkpoint).train()
            loader = training_batches(trainer)
            for _ in range(math.ceil(samples / trainer.batch_size)):  # (a bar that is not shown does not count)
                batch = next(loader)
                images, targets = trainer.to_device(batch)
                with trainer.autocast():
                    outputs = network(images)
                values = terms(outputs, targets)
                statistics.update(values)
                dice.append(trainer.hard_dice(outputs, targets))
                bar.update(len(values))
    finally:
        np.random.set_state(states[0])
        random.setstate(states[1])
    quality = round(float(np.nanmean(dice)), 4)
    notes: dict[str, Any] = {
        "dataset": trainer.plans_manager.dataset_name,
        "configuration": trainer.configuration_name,
        "fold": trainer.fold,
        "absent_classes": "skip" if terms.skip_absent else "count",
        "measured_on": "training batches with their augmentation, statistics of the batch",
        "training_dice": quality,
    }
    return statistics.thresholds(rule, source=str(checkpoint), source_sha256=sha256(checkpoint), notes=notes)

"""Thresholds for AMAT from a finished standard training: the loss terms of its network over clean training samples."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from adv_nnunet import host
from adv_nnunet.checkpoints import read_checkpoint
from adv_nnunet.objective import SampleTerms
from advmed.distributed import gathered, place
from advmed.files import sha256
from advmed.progress import ProgressBar
from advmed.thresholds import DEFAULT_RULE, TermStatistics, Thresholds
from advmed.training.run import differing_notes, load_thresholds

FILE = "thresholds.json"
"""Name of the file beside the checkpoint that was measured."""
CHECKPOINT = "checkpoint_final.pth"
"""A training is finished when this file is there."""


def standard_folders(trainer: Any) -> list[Path]:
    """Where a finished standard training of the same data set, plans, configuration and fold would be.

    By the trainer that the settings name; else by the stock trainer (or base) whose network ours trains, and
    nnUNetTrainerSTD, if that is the same network. None for a class of ours that changes the network itself.
    """
    names = [trainer.settings.std_trainer] if trainer.settings.std_trainer else trainer.standard_names
    dataset = Path(trainer.output_folder_base).parent
    suffix = f"__{trainer.plans_manager.plans_name}__{trainer.configuration_name}"
    return [dataset / (name + suffix) / f"fold_{trainer.fold}" for name in names]


def searched(trainer: Any) -> str:
    """Those folders, as a message names them."""
    folders = " or ".join(map(str, standard_folders(trainer)))
    return folders or "a folder that is known: name the trainer of the standard training with 'std_trainer'"


def find_file(trainer: Any) -> Path | None:
    """The thresholds file of the standard training, if there is one."""
    return next((f / FILE for f in standard_folders(trainer) if (f / FILE).is_file()), None)


def find_checkpoint(trainer: Any) -> Path | None:
    """The final checkpoint of the standard training, if it is finished."""
    return next((f / CHECKPOINT for f in standard_folders(trainer) if (f / CHECKPOINT).is_file()), None)


def conditions(trainer: Any) -> dict[str, Any]:
    """What thresholds depend on beside the checkpoint: their notes, and what a run compares with them."""
    terms = SampleTerms(trainer.loss, trainer.settings.terms, trainer.settings.absent_classes)
    scales = None if terms.weights is None else [round(weight, 4) for weight in terms.weights]  # (DDP: 1e-6 for 0)
    return {
        "dataset": trainer.plans_manager.dataset_name,
        "plans": trainer.plans_manager.plans_name,
        "configuration": trainer.configuration_name,
        "fold": trainer.fold,
        "absent_classes": "skip" if terms.skip_absent else "count",
        "deep_supervision": scales,
        "loss": trainer.loss_made_by,
        "augmentation": trainer.samples_made_by,
        "oversampling": trainer.oversampling,
        "probabilistic_oversampling": trainer.probabilistic_oversampling,
        "measured_on": "training batches with their augmentation, statistics of the batch",
    }


def load_named(trainer: Any, path: Path) -> tuple[Thresholds, str]:
    """Thresholds from a file that the user named, and a remark for the log.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no thresholds file, or one of something else than this run.
    """
    found, changed = load_thresholds(trainer.settings, str(path), trainer.terms.names)
    if differing := differing_notes(found.notes, conditions(trainer)):
        raise ValueError(
            f"the thresholds in {path} are of something else than this run: {'; '.join(differing)}. Make them for this "
            f"run (adv-nnunet thresholds); or, if they are meant for it, take these entries out of the file's 'notes'."
        )
    return found, changed


def load_found(trainer: Any, path: Path, say: Callable[[str], object]) -> tuple[Thresholds, str] | None:
    """Thresholds from the file beside the standard training; None, and a word why, if they are not of this run."""
    try:
        found, changed = load_named(trainer, path)
    except (ValueError, OSError) as error:
        say(f"WARNING: {path} is not taken: {error}")
        return None
    checkpoint = path.with_name(CHECKPOINT)
    if found.source_sha256 and checkpoint.is_file() and sha256(checkpoint) != found.source_sha256:
        say(f"WARNING: {path} is not taken: it was made of another checkpoint than the {CHECKPOINT} beside it")
        return None
    return found, changed


def keep(measured: Thresholds, checkpoint: Path, folder: Path) -> Path:
    """Writes thresholds beside the checkpoint that was measured, for later runs; else beside the run.

    A file that is there stays, unless it is no use to anybody: damaged, or of another checkpoint. Returns the path.
    """
    shared = checkpoint.with_name(FILE)
    try:
        of_this = shared.is_file() and Thresholds.load(shared).source_sha256 == measured.source_sha256
    except ValueError:
        of_this = False
    if not of_this:
        try:
            measured.save(shared)
            return shared
        except OSError:  # another user's, a share that is only read
            pass
    measured.save(folder / FILE)
    return folder / FILE


USELESS, POOR = 0.1, 0.5
"""Mean Dice on training samples: below the first thresholds are refused, below the second doubted."""


def default_rule(preset: str) -> str:
    """Of thresholds where nothing says another: the paper's for nnU-Net, or what was measured to make a network robust.

    By the mean, margins stay next to the standard network's (docs/results/margins.md).
    """
    return DEFAULT_RULE if preset == "paper" else "mean+2std"


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
    """The network of a finished standard training, on the trainer's device; see :func:`load_weights`."""
    network = host.build_network(trainer).to(trainer.device)
    load_weights(network, checkpoint)
    return network


def load_weights(network: nn.Module, checkpoint: Path) -> None:
    """Loads the weights of a training.

    Raises:
        ValueError: if they are those of another network.
    """
    try:
        network.load_state_dict(read_checkpoint(checkpoint)["network_weights"])
    except RuntimeError as error:
        raise ValueError(
            f"{checkpoint} is of another network than the one that is to have its weights (another architecture or "
            f"other plans). Name the training of the same network: with 'std_trainer' or 'start_from' in the settings, "
            f"or with -tr for adv-nnunet thresholds."
        ) from error


@contextmanager
def _whole_batches(trainer: Any) -> Iterator[int]:
    """Batches as one process alone draws them: under DDP a rank has a part of a batch, and foreground of its own."""
    part = trainer.batch_size, trainer.oversample_foreground_percent
    trainer.batch_size = trainer.configuration_manager.batch_size
    trainer.oversample_foreground_percent = trainer.oversampling
    try:
        yield trainer.batch_size
    finally:
        trainer.batch_size, trainer.oversample_foreground_percent = part


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
    each batch from a fixed seed; the network is in training mode, with the statistics of the batch. Processes that
    train together share the batches, and what comes out does not depend on how many they are.

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
    rule = settings.rule or default_rule(settings.preset)
    samples = settings.threshold_samples or min(10_000, max(500, len(trainer.sample_ids() or training.identifiers)))
    rank, ranks = place()
    dice: list[float] = []
    # The host's loader and augmentation draw from global generators.
    states = np.random.get_state(), random.getstate()
    try:
        with (
            torch.random.fork_rng(),
            torch.no_grad(),
            _whole_batches(trainer) as size,
            ProgressBar("thresholds", samples, "samples", shown=rank == 0) as bar,
        ):
            network = standard_network(trainer, checkpoint).train()
            _seed(seed)
            loader = training_batches(trainer)
            for number in range(rank, math.ceil(samples / size), ranks):
                _seed((seed + 1) * 1_000_003 + number)
                batch = next(loader)
                images, targets = trainer.to_device(batch)
                with trainer.autocast():
                    outputs = network(images)
                values = terms(outputs, targets)
                statistics.update(values)
                dice.append(trainer.hard_dice(outputs, targets))
                bar.update(len(values) * ranks)
    finally:
        np.random.set_state(states[0])
        random.setstate(states[1])
    statistics.merge()
    quality = round(float(np.nanmean([value for part in gathered(dice) for value in part])), 4)
    notes = {**conditions(trainer), "training_dice": quality}
    return statistics.thresholds(rule, source=str(checkpoint), source_sha256=sha256(checkpoint), notes=notes)


def _seed(seed: int) -> None:
    np.random.seed(seed % 2**32)
    random.seed(seed)
    torch.manual_seed(seed)

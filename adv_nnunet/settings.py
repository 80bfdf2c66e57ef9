"""The settings of our nnU-Net trainers, and where they are found."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from advmed.training.settings import TrainingSettings, read_settings

VARIABLE = "nnUNet_adversarial"
"""Environment variable that may name a settings file."""
FILE = "adversarial.yaml"
"""Its name in the preprocessed data set's folder, and that of the resolved settings in the output folder."""
STATE = "advmed"
"""Key of our state in a checkpoint; the stock host ignores it."""

# The paper tuned delta on three data sets (arXiv 2206.01736, section 3.8): 0.5 for 56 x 40 pixels, 3 for 320 x 320, 5
# for 320 x 256. Divided by the square root of the number of input values, as an L2 norm grows with it, these are 0.011,
# 0.009 and 0.017: one default for every patch size.
_DELTA_PER_VALUE = 0.01
# SAT's noise levels there: 1 to 15, 10 to 40, and 5 to 25; in the same units 0.02 to 0.3, 0.03 to 0.13, 0.02 to 0.09.
_EPS_PER_VALUE = 0.1


@dataclass(frozen=True, kw_only=True)
class Settings(TrainingSettings):
    """The settings of ``nnUNetTrainerAMAT``, ``nnUNetTrainerSAT`` and the other trainers of ours.

    Noise is measured in the units of nnU-Net's normalised intensities, over the network's whole input. The settings are
    those of :class:`advmed.TrainingSettings`, and these; all of them are on the page of settings (docs/settings.md).

    Attributes:
        eps: None: 0.1 * sqrt(number of values of the network's input); 0.1 in Linf.
        delta: None: 0.01 * sqrt(number of values of the network's input); 0.01 in Linf.
        terms: "sum": one loss term, cross-entropy plus Dice, as in the paper (K = 1); "separate": two (K = 2).
        absent_classes: what a class that a sample does not contain adds to the sample's Dice term. "count": what it
            adds to the host's loss of this sample alone; "skip": nothing; "auto": "count" where the host averages
            Dice over samples, "skip" where it computes Dice over the batch, in which an absent class costs a sample
            nothing either.
        sample_id: what has a margin of its own: "case", "slice" (2D), "part" (a case's patches with foreground, and
            those without), "cell" (case and grid cell of the patch's centre); "auto": slice in 2D, part in 3D.
        std_trainer: name of the trainer of the standard training that thresholds are made of; None: the stock trainer
            that ours derives from, then nnUNetTrainerSTD.
        start_from: "standard": begin with the weights of that standard training, all of them (nnU-Net's
            -pretrained_weights leaves out the segmentation layers); or the path of a checkpoint; "scratch": as the
            host. None: with the preset "fast" the standard training, if it is finished and no weights were given on
            the command line; else as the host.
        threshold_samples: number of clean training samples that thresholds are made of; None: by size of the data set.
        attack_precision: "host": as the host trains (float16 autocast on CUDA, float32 elsewhere); "float32";
            "bfloat16": autocast, for the attack's passes only.
        check_standard: refuse thresholds of a standard network that has learnt next to nothing.
        epochs: number of epochs; None: a quarter of those of the standard training where "fast" starts from it, else
            the host's.
        iterations_per_epoch: training iterations per epoch; None: the host's.
        val_iterations_per_epoch: validation iterations per epoch; None: the host's.
        robust_val_iterations: how many of them are attacked, too, for the robust Dice that checkpoint_best is chosen
            by; 0: none, and clean Dice decides; None: a tenth, at least one.
        initial_lr: initial learning rate; None: the host's.
        save_every: epochs between two checkpoints; None: the host's.
        compile: let the host compile the network, where it does so; None: for STD as the host, for other methods where
            the host's variable nnUNet_compile asks for it.
        check_data: read all training and validation cases before training, and stop at one that is not finite.
        overwrite: train anew in a folder that holds checkpoints of an earlier training.
        tag: appended to the trainer's name in the name of the output folder, to keep runs with other settings apart.

    Raises:
        ValueError: a value out of its range.

    Example:
        >>> from adv_nnunet import Settings
        >>> settings = Settings(terms="separate", steps=10).resolved(channels=1, patch_size=(56, 40))
        >>> settings.delta  # 0.01 * sqrt(56 * 40)
        0.4733
    """

    terms: Literal["sum", "separate"] = "sum"
    absent_classes: Literal["auto", "count", "skip"] = "auto"
    sample_id: Literal["auto", "case", "slice", "part", "cell"] = "auto"
    std_trainer: str | None = None
    start_from: str | None = None
    threshold_samples: int | None = None
    attack_precision: Literal["host", "float32", "bfloat16"] = "host"
    check_standard: bool = True
    epochs: int | None = None
    iterations_per_epoch: int | None = None
    val_iterations_per_epoch: int | None = None
    robust_val_iterations: int | None = None
    initial_lr: float | None = None
    save_every: int | None = None
    compile: bool | None = None
    check_data: bool = True
    overwrite: bool = False
    tag: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = ("threshold_samples", "epochs", "iterations_per_epoch", "val_iterations_per_epoch", "save_every")
        for name in counts:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if self.robust_val_iterations is not None and self.robust_val_iterations < 0:
            raise ValueError(f"robust_val_iterations must be >= 0, got {self.robust_val_iterations}")
        if self.initial_lr is not None and not (math.isfinite(self.initial_lr) and self.initial_lr > 0):
            raise ValueError(f"initial_lr must be a positive number, got {self.initial_lr}")
        if not all(c.isalnum() or c in "-." for c in self.tag):
            raise ValueError(f"tag may hold letters, digits, '-' and '.', got {self.tag!r}")

    def resolved(self, channels: int, patch_size: Sequence[int]) -> Settings:
        """These settings with the defaults that depend on the network's input filled in."""
        size = 1.0 if self.norm == math.inf else math.sqrt(channels * math.prod(int(n) for n in patch_size))
        return replace(
            self,
            eps=round(_EPS_PER_VALUE * size, 4) if self.eps is None else self.eps,
            delta=round(_DELTA_PER_VALUE * size, 4) if self.delta is None else self.delta,
            sample_id=("slice" if len(patch_size) == 2 else "part") if self.sample_id == "auto" else self.sample_id,
        )


def find_settings(dataset_folder: str | Path | None) -> tuple[Settings, str]:
    """The settings for a data set, and where they come from.

    The file that the environment variable ``nnUNet_adversarial`` names; else ``adversarial.yaml`` in the preprocessed
    data set's folder; else the defaults.

    Raises:
        FileNotFoundError: if the variable names a file that does not exist.
        ValueError: for a setting that is unknown or out of range.
    """
    named = os.environ.get(VARIABLE)
    if named:
        try:
            return read_settings(Settings, named), f"{named} (environment variable {VARIABLE})"
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; the environment variable {VARIABLE} names it") from error
    if dataset_folder is not None and (path := Path(dataset_folder) / FILE).is_file():
        return read_settings(Settings, path), str(path)
    return Settings(), "defaults"

"""Reports of two models with numbers of the paper, and one that has everything in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from advmed.evaluation.checks import Check
from advmed.evaluation.loop import Evaluation
from advmed.report import Entry, Metric, write_report
from helpers.evaluations import by_hand
from helpers.examples import segmented

LEVELS = (0.0, 5.0, 10.0)
IDS = tuple(f"case_{letter}" for letter in "abcdefghijkl")
UNIT = "L2 norm of the noise over the whole network input, in units of the normalised intensities"
# ADI of Heart under PGD and I-FGSM, rounded from Table 1 of the paper, clean first.
AMAT = {"pgd100": (0.9148, 0.8476, 0.7594), "ifgsm10": (0.9148, 0.8834, 0.8532)}
STD = {"pgd100": (0.7954, 0.5197, 0.1997), "ifgsm10": (0.7954, 0.6930, 0.6238)}
NOISE = {"gaussian": (0.9, 0.9, 0.89)}
MEAN = Metric("ADI", lambda scores: scores["dice"].mean(), per_sample=lambda scores: scores["dice"])
DICE = replace(MEAN, fails_at=0.5, is_mean=True)


def evaluation(curves: Mapping[str, tuple[float, ...]], fingerprint: str = "", **changes: Any) -> Evaluation:
    """An evaluation whose mean score is the curve; the samples lie 0.01 below and above it in turn."""

    def scores(value: Any) -> dict[str, Any]:
        return {"dice": value, "tp": np.array([[3, 4], [5, 6]] * 6), "boxes": np.zeros((12, 3, 4))}

    values = {name: np.array(curve)[:, None] + [-0.01, 0.01] * 6 for name, curve in curves.items()}
    made = by_hand(values, LEVELS, scores=scores, loss=[0.5, 0.25] * 6, ids=IDS, fingerprint=fingerprint)
    return replace(made, **changes)


def entries(
    names: Sequence[str] = ("STD", "AMAT"), noise: Mapping[str, tuple[float, ...]] | None = None
) -> list[Entry]:
    """The two models, the second with margins; noise is a control."""
    std, amat = (evaluation({**curves, **(noise or {})}, f"sha-of-{k}") for k, curves in enumerate((STD, AMAT)))
    return [Entry(names[0], std), Entry(names[1], amat, margins=np.linspace(0, 12, 25))]


def write(folder: Path, models: Sequence[Entry] | None = None, metric: Metric = MEAN, **changes: Any) -> Path:
    """Writes a report; returns the path of its page."""
    how: dict[str, Any] = {"title": "Heart", "level_unit": UNIT, **changes}
    return write_report(folder, models or entries(), [metric], **how)


def write_whole(folder: Path, names: Sequence[str] = ("STD", "AMAT")) -> Path:
    """A report with everything in it: a control, checks, failures, groups, margins, an example."""
    figures = {"gain": 0.0, "share": math.nan}
    checks = [Check("steps", "Twice the steps do not help.", "passed", "They do not.", figures)]
    models = [replace(entry, checks=checks) for entry in entries(names, NOISE)]
    how: dict[str, Any] = {
        "settings": {"data set": "Task02_Heart", "folder": Path("models")},
        "groups": [str(k) for k in range(12)],
    }
    return write(folder, models, DICE, **how, examples=[segmented()], class_names={1: "left atrium"})

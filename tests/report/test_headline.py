"""Whom a report does not call robust."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from advmed.evaluation.checks import Check
from advmed.report import Entry, Metric, findings, tabulate
from advmed.report.floor import lost
from advmed.report.summary import doubts, verdict
from helpers.evaluations import leave_out_curves, record_of
from helpers.reports import AMAT, DICE, MEAN, STD, entries, evaluation, write

MRE = Metric(
    "MRE",
    lambda scores: scores["dice"].mean(),
    higher_is_better=False,
    unit="mm",
    per_sample=lambda scores: scores["dice"],
    fails_at=4,
)


def said(curves: dict[str, tuple[float, ...]], metric: Metric = DICE, *, doubted: Any = (), **more: Any) -> list[str]:
    """The findings of models under PGD."""
    models = [Entry(name, evaluation({"pgd100": curve, **more})) for name, curve in curves.items()]
    (table,) = tabulate(models, [metric])
    return findings(table, doubted)


@pytest.mark.parametrize(
    ("value", "clean", "higher", "fails_at", "wanted"),
    [
        (0.249, 0.9, True, 0.5, True),  # the mean sample is twice as bad as one that has failed
        (0.251, 0.9, True, 0.5, False),
        (0.249, 0.3, True, 0.5, True),  # however little was there before
        (0.089, 0.9, True, None, True),  # nine tenths are gone
        (0.091, 0.9, True, None, False),
        (7.9, 1.0, False, 4, False),
        (8.1, 1.0, False, 4, True),
        (8.1, 1.0, False, None, False),  # an error has no scale of its own
        (-5.0, -1.0, True, None, False),
        (np.nan, 0.9, True, 0.5, False),
    ],
)
def test_when_a_value_is_lost(value: float, clean: float, higher: bool, fails_at: float | None, wanted: bool) -> None:
    found = lost(np.array([value]), np.array([clean]), higher_is_better=higher, fails_at=fails_at)
    assert found.tolist() == [wanted]


def test_the_best_of_broken_models_is_not_called_robust() -> None:
    both = {"a": (0.9, 0.5, 0.03), "b": (0.9, 0.4, 0.01)}
    first, second, third, _ = said(both)
    assert first == "No model is robust under pgd100 at noise level 10: the best ADI there is 0.0300 (a)."
    assert second.startswith("Under pgd100, a has the best AUC_robust of 2 models, 0.")
    assert "followed by b with" in second and "but" not in second
    assert third == "At noise level 10, ADI is 0.0300 for a and 0.0100 for b."
    (earlier, *others) = said({"a": (0.9, 0.2, 0.2), "b": (0.9, 0.24, 0.1)})
    assert (
        earlier == "No model is robust under pgd100 at noise level 5 and above: the best ADI at level 5 is 0.2400 (b)."
    )
    assert not [text for text in others if "robust" in text and "AUC_robust" not in text]
    # A value that is missing is nobody's robustness, either.
    assert said({"a": (0.9, 0.5, 0.03), "b": (0.9, 0.4, np.nan)})[0].startswith("No model is robust under pgd100 at ")
    assert said({"a": (0.9, 0.5, 0.03), "b": (0.9, 0.4, 0.3)})[0].startswith("b is the most robust of 2 models")
    alone, told = said({"a": (0.9, 0.5, 0.03)})
    assert alone == "a is not robust under pgd100 at noise level 10, where its ADI goes to 0.0300."
    assert told.startswith("ADI goes from 0.9000 on clean images to 0.0300 under pgd100")
    errors = said({"a": (1.0, 3.0, 8.5), "b": (1.0, 5.0, 12.0)}, MRE)
    assert errors[0] == "No model is robust under pgd100 at noise level 10: the best MRE (mm) there is 8.50 (a)."


def test_what_is_left_is_of_the_best_clean_value() -> None:
    """A model that is broken from the start loses nothing, and is not what is left of the others."""
    curves = {"broken": (0.05, 0.05, 0.05), "std": (0.9, 0.3, 0.01)}
    assert said(curves, MEAN)[0].startswith("No model is robust under pgd100 at noise level 10: the best ADI there is ")
    assert len(said({"broken": curves["broken"]}, MEAN)) == 1, "alone it is no worse than on clean images"


def test_a_model_that_is_lost_where_another_is_not_is_not_praised() -> None:
    first, *_ = said({"steep": (0.95, 0.9, 0.1), "flat": (0.6, 0.6, 0.5)})
    assert first.startswith("Under pgd100, steep has the best AUC_robust of 2 models, 0.82")
    assert first.endswith(", but steep is not robust at noise level 10, where its ADI is 0.1000.")


def test_models_whose_checks_failed_are_not_praised(tmp_path: Path) -> None:
    curves = {"std": STD["pgd100"], "amat": AMAT["pgd100"]}
    assert said(curves, doubted=["std"])[0].startswith("amat is the most robust of 2 models"), "it is better than that"
    first = said(curves, doubted=["amat"])[0]
    assert first.startswith("Under pgd100, amat has the best AUC_robust of 2 models, ")
    assert first.endswith(", but checks of the attack failed for amat, whose robustness may be overrated.")
    (alone,) = said({"amat": AMAT["pgd100"]}, doubted=["amat"])
    assert alone.endswith(", but checks of the attack failed for amat, whose robustness may be overrated.")
    equal = said({"a": AMAT["pgd100"], "b": AMAT["pgd100"]}, doubted=["a"])[0]
    assert "checks of the attack failed for a" in equal and "most robust" not in equal
    # As a report is written.
    bad = [Check("steps", "", "passed", "", {}), Check("noise", "", "failed", "", {})]
    models = [entries()[0], replace(entries()[1], checks=bad)]
    assert doubts(models) == {"AMAT": ["noise"]}
    with pytest.MonkeyPatch.context() as patch:
        leave_out_curves(patch)
        write(tmp_path, models, DICE)
    assert record_of(tmp_path)["findings"][0].endswith(
        "but checks of the attack failed for AMAT, whose robustness may be overrated."
    )


def test_a_model_that_says_the_same_of_everything_is_not_praised() -> None:
    curves = {"constant": (0.75, 0.75, 0.75), "std": (0.9, 0.4, 0.3)}
    assert said(curves)[0].endswith(", but no attack changes ADI of constant at any level.")
    assert said(curves, gaussian=(0.75, 0.75, 0.7))[0].endswith("at any level.")
    assert said(curves, MEAN)[0].startswith("constant is the most robust"), "it may be a metric that moves little"
    both = said({"constant": (0.1, 0.1, 0.1), "std": (0.12, 0.1, 0.1)})
    assert both[0].startswith("No model is robust under pgd100 at noise level 5 and above: ")


def test_noise_that_no_one_has_aimed_makes_nobody_robust() -> None:
    models = [Entry(name, evaluation({"gaussian": curves["pgd100"]})) for name, curves in (("a", AMAT), ("b", STD))]
    (table,) = tabulate(models, [DICE], resample=False)
    assert findings(table)[0].endswith(", but noise that no one has aimed is no attack.")


def test_an_auc_that_is_not_defined_makes_nobody_robust() -> None:
    first = said({"a": (0.9, np.nan, 0.5), "b": (0.8, np.nan, 0.4)})[0]
    assert "most robust" not in first and "it is not defined for a" in first


def test_checks_that_measured_nothing_say_nothing() -> None:
    nothing = Check("steps", "", "not measured", "", {})
    assert verdict([replace(entries()[0], checks=[nothing])])[0] is None

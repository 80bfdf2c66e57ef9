"""Is the attack strong enough to be believed? Signs of masked gradients, each with its figures and a verdict.

The signs are those of Athalye et al. 2018 ("Obfuscated gradients give a false sense of security", section 3.1) and
Carlini et al. 2019 ("On evaluating adversarial robustness"): more steps or restarts must not help, an attack without
gradients must not be the stronger one, an attack without limit must succeed, and the loss must rise with the radius. A
model whose gradients lead nowhere, one that answers otherwise whenever it is asked, and an attack that is broken all
look robust; here they are told apart from one that is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from advmed.attacks import APGD, DDN, PGD, Attack, AttackResult, Noise, SquareAttack, Standard
from advmed.attacks.problem import Bounds, attacking
from advmed.evaluation.loop import Evaluation
from advmed.evaluation.metric import Metric, Scores
from advmed.evaluation.worst import WorstOf
from advmed.norms import norm
from advmed.objective import Averaged, check_terms

Array = NDArray[Any]

MOST_GAIN = 0.05
"""By how much of its value a metric may get worse under a stronger attack; more on fewer than 40 samples."""
LEAST_SHARE = 0.9
"""What "nearly every sample" means."""
SLACK = 1e-3
"""What of a loss counts as the same loss, relative to the largest one of the sample."""


@dataclass(frozen=True)
class Unlimited:
    """An attack whose radius is the norm of the image itself: enough to make any image out of nothing.

    Args:
        attack: what attacks.
    """

    attack: PGD | APGD

    access: ClassVar[str] = "white box"

    @property
    def norm(self) -> float:
        """2 or inf."""
        return self.attack.norm

    @property
    def gradients(self) -> int:
        """Gradients per image."""
        return self.attack.gradients

    @property
    def queries(self) -> int:
        """Forward passes without a gradient per image."""
        return self.attack.queries

    @property
    def description(self) -> str:
        """What it does, for a report."""
        return f"{self.attack.description}; the noise may be as large as the image"

    def __call__(
        self,
        objective: Any,
        images: Tensor,
        radius: float | Tensor,
        *,
        bounds: Bounds = None,
        generator: torch.Generator | None = None,
    ) -> AttackResult:
        """Attacks a batch; see :class:`advmed.attacks.PGD`."""
        radius = norm(images, self.norm).clamp_min(radius)
        return self.attack(objective, images, radius, bounds=bounds, generator=generator)


@dataclass(frozen=True)
class Again:
    """No attack at all: the loss of a second pass over the clean images, of a network that may be random.

    The first pass draws what the pass of the clean images has drawn: an attack, a look at clean images and a score
    leave the random state as it was (:func:`advmed.guard.preserved`), and each begins with the same numbers. Only
    passes that follow each other tell a random network from another. An objective that averages over draws
    (:class:`advmed.objective.Averaged`) says itself that it is random, and is asked once. Where an objective can be
    taken apart (``take``), the second pass is over halves of the batch: what an image is worth must not depend on those
    beside it, as with BatchNorm in training mode.

    Args:
        norm: 2 or inf.
    """

    norm: float

    access: ClassVar[str] = "black box"
    gradients: ClassVar[int] = 0
    queries: ClassVar[int] = 2
    description: ClassVar[str] = "no attack: a second pass over the clean images"

    def __call__(
        self,
        objective: Any,
        images: Tensor,
        radius: float | Tensor,
        *,
        bounds: Bounds = None,
        generator: torch.Generator | None = None,
    ) -> AttackResult:
        """Asks twice; see :class:`advmed.attacks.PGD`, whose arguments these are."""
        with attacking(objective):
            terms = check_terms(objective(images), images)
            if not isinstance(objective, Averaged):
                terms = torch.cat(
                    [check_terms(part(images[rows]), images[rows]) for rows, part in _halves(objective, images)]
                )
        zeros = torch.zeros(len(images))
        return AttackResult(images, terms, norms=zeros, crossing=None, nonfinite=zeros.long())


def _halves(objective: Any, images: Tensor) -> list[tuple[Any, Any]]:
    """The samples of a batch in two parts, and the objective of each; in one where it cannot be taken apart."""
    take = getattr(objective, "take", None)
    if take is None or len(images) < 2:
        return [(slice(None), objective)]
    numbers = torch.arange(len(images), device=images.device)
    return [(rows, take(rows)) for rows in numbers.tensor_split(2)]


@dataclass(frozen=True)
class Check:
    """One question, and what was seen.

    Attributes:
        name: short name.
        question: what should be the case.
        verdict: "passed", "failed", or "not measured".
        finding: the figures, in a sentence.
        figures: the same as numbers, JSON-ready.
    """

    name: str
    question: str
    verdict: Literal["passed", "failed", "not measured"]
    finding: str
    figures: Mapping[str, float]


def strongest(attacks: Mapping[str, Attack]) -> tuple[str, PGD | APGD] | None:
    """The first attack that climbs the loss of the host by gradients, with its name; None without one. It is checked.

    Attacks on another loss (margins, CosPGD) are not: what the checks compare is the host's. Of an ensemble it is a
    member.
    """
    singles = [*_singles(attacks)]
    return next(((n, a) for n, a in singles if isinstance(a, PGD | APGD) and a.loss is None), None)


def pictured(attacks: Mapping[str, Attack]) -> tuple[str, Attack]:
    """The attack that pictures are made with: the first, of an ensemble its first member."""
    return next(iter(_singles(attacks)))


def _singles(attacks: Mapping[str, Attack]) -> Iterator[tuple[str, Attack]]:
    """The attacks that run by themselves, with the members of ensembles in their places."""
    for name, attack in attacks.items():
        if isinstance(attack, Standard):
            yield from (
                (f"{name}/{m}", cast(Attack, own)) for m, own in attack.members.items() if not isinstance(own, DDN)
            )
        elif not isinstance(attack, WorstOf):
            yield name, attack


def probes(attack: Attack) -> dict[str, Attack]:
    """The attack, and those that tell whether it is to be believed, by the names of their checks.

    Raises:
        TypeError: for an attack that is none of ours.
    """
    if not isinstance(attack, PGD | APGD):
        raise TypeError(
            f"only attacks of advmed.attacks that follow gradients are checked, got {type(attack).__name__}"
        )
    longer: PGD | APGD = replace(attack, steps=2 * attack.steps)
    if isinstance(longer, PGD):  # of the same length: halves that do not reach the sphere would not, either
        longer = replace(longer, step_scale=2 * longer.step_scale)
    return {
        "checked": attack,
        "steps": longer,
        # From other starting points: every attack of an evaluation has its own, and at the image there is only one.
        "restarts": replace(attack, random_start=attack.random_start or 1.0),
        "black box": SquareAttack(max(100, 5 * attack.steps), attack.norm),
        "unlimited": Unlimited(replace(attack, restarts=1)),
        "noise": Noise("gaussian", attack.norm),
        "repeatable": Again(attack.norm),
    }


def level_to_check(evaluation: Evaluation, attack: str, metric: Metric) -> float:
    """The level at which an attack decides about most samples: the share that fails is nearest to a half.

    The middle one for a metric without a notion of failure.
    """
    levels = evaluation.levels[1:]
    if metric.fails_at is None:
        return levels[(len(levels) - 1) // 2]
    shares = np.array([_failing(metric, evaluation.scores(attack, level))[0] for level in levels])
    return levels[int(np.argmin(np.nan_to_num(np.abs(shares - 0.5), nan=np.inf)))]


def check(evaluation: Evaluation, attack: str, probed: Evaluation | None, metric: Metric) -> list[Check]:
    """All checks of an attack on a model.

    Args:
        evaluation: of the model.
        attack: name of the attack in it that is checked, see :func:`strongest`.
        probed: the same model under :func:`probes`, on few samples at one level; None if that was not measured.
        metric: the metric that verdicts rest on.
    """
    found = [_rises(evaluation, attack)]
    if probed is None:
        return found + [
            Check(name, question, "not measured", "Not measured.", {})
            for name, question in QUESTIONS.items()
            if name != "radius"
        ]
    return [
        *found,
        _stronger(probed, "steps", metric, probed.scores("steps", probed.levels[-1])),
        _stronger(probed, "restarts", metric, _worse(probed, "checked", "restarts")),
        _black_box(probed, metric),
        _unlimited(probed, metric),
        _noise(probed),
        _repeatable(probed),
    ]


QUESTIONS = {
    "radius": "The loss rises with the radius for nearly every sample.",
    "steps": "Twice the steps do not help.",
    "restarts": "The worst of twice the runs is no worse.",
    "black box": "An attack without gradients is not the stronger one.",
    "unlimited": "With noise as large as the image, nearly every sample fails.",
    "noise": "The attack raises the loss, and more than noise of the same norm.",
    "repeatable": "Two passes over the same clean images, the second in halves, give the same loss.",
}


def _rises(evaluation: Evaluation, attack: str) -> Check:
    loss = np.stack([evaluation.at(attack, level).loss for level in evaluation.levels]).astype(np.float64)
    slack = SLACK * np.abs(loss).max(0)
    share = float((np.diff(loss, axis=0) >= -slack).all(0).mean())
    return _check("radius", share >= LEAST_SHARE, f"It does for {share:.0%} of {loss.shape[1]} samples.", share=share)


def _failing(metric: Metric, scores: Scores) -> tuple[float, int]:
    """The share of samples that fail, of those that have a value of the metric, and their number; NaN of none.

    A slice without a structure, in the truth and in the prediction, has no Dice.
    """
    failed = metric.failed(scores)
    known = failed[~np.isnan(failed)]
    return float(known.mean()) if len(known) else math.nan, len(known)


def _unknown(name: str, metric: Metric) -> Check:
    return Check(name, QUESTIONS[name], "not measured", f"{metric.label} has no value on these samples.", {})


def _stronger(probed: Evaluation, name: str, metric: Metric, scores: Scores) -> Check:
    before, after, gain = _gain(probed, metric, scores)
    if math.isnan(gain):
        return _unknown(name, metric)
    finding = f"{metric.label} goes from {before:.4g} to {after:.4g}."
    return _check(name, gain <= _allowed(probed), finding, before=before, after=after, gain=gain)


def _black_box(probed: Evaluation, metric: Metric) -> Check:
    level = probed.levels[-1]
    white, black, gain = _gain(probed, metric, probed.scores("black box", level))
    if math.isnan(gain):
        return _unknown("black box", metric)
    share = float((probed.at("black box", level).loss > _at_least(probed, "checked")).mean())
    finding = (
        f"{metric.label} is {white:.4g} with gradients and {black:.4g} without; without them the loss is the larger "
        f"one for {share:.0%} of {len(probed.ids)} samples."
    )
    passed = gain <= _allowed(probed) and 1 - share >= LEAST_SHARE
    return _check("black box", passed, finding, white_box=white, black_box=black, gain=gain, share=share)


def _unlimited(probed: Evaluation, metric: Metric) -> Check:
    if metric.fails_at is None:
        return Check("unlimited", QUESTIONS["unlimited"], "not measured", "The metric has no notion of failure.", {})
    share, known = _failing(metric, probed.scores("unlimited", probed.levels[-1]))
    if not known:
        return _unknown("unlimited", metric)
    return _check("unlimited", share >= LEAST_SHARE, f"{share:.0%} of {known} samples fail.", share=share)


def _noise(probed: Evaluation) -> Check:
    level = probed.levels[-1]
    attacked, noise, clean = (
        c.loss.astype(np.float64) for c in (probed.at("checked", level), probed.at("noise", level), probed.clean)
    )
    share = float(((attacked > clean) & (attacked > noise)).mean())
    rise, control = float((attacked - clean).mean()), float((noise - clean).mean())
    finding = (
        f"Larger than both clean and with noise for {share:.0%} of {len(attacked)} samples; the loss rises by "
        f"{rise:.3g} on the mean, by {control:.3g} with noise."
    )
    return _check("noise", share >= LEAST_SHARE and rise > control, finding, share=share, rise=rise, noise_rise=control)


def _repeatable(probed: Evaluation) -> Check:
    first = probed.clean.loss.astype(np.float64)
    second = probed.at("repeatable", probed.levels[-1]).loss.astype(np.float64)
    finite = np.isfinite(first) & np.isfinite(second)
    # A loss near 0 is the same as another one: what counts is measured by those of all samples.
    scale = max(float(np.abs(first[finite]).mean()) if finite.any() else 0.0, 1e-12)
    apart = np.abs(np.subtract(second, first, where=finite, out=np.zeros_like(first)))
    slack = SLACK * np.maximum(np.fmax(np.abs(first), np.abs(second)), scale)
    differ = np.where(finite, apart > slack, (first != second) & ~(np.isnan(first) & np.isnan(second)))
    share, gap = float(differ.mean()), float(apart.mean()) / scale
    finding = f"They differ for {share:.0%} of {len(first)} samples, by {gap:.2g} of the loss on the mean."
    passed = 1 - share >= LEAST_SHARE
    if not passed:
        finding += (
            " The network is random, or looks at the other images of a batch, and what an attack climbs is not what it "
            "is judged by: make it deterministic (dropout and the like off, BatchNorm in evaluation mode), or attack "
            "the mean over draws (advmed.Averaged)."
        )
    return _check("repeatable", passed, finding, share=share, gap=gap)


def _gain(probed: Evaluation, metric: Metric, scores: Scores) -> tuple[float, float, float]:
    """The metric under the checked attack and from other scores, and how much worse those make it, relatively."""
    before, after = metric.of(probed.scores("checked", probed.levels[-1])), metric.of(scores)
    sign = 1 if metric.higher_is_better else -1
    return before, after, sign * (before - after) / max(abs(metric.of(probed.clean.scores)), abs(before), 1e-12)


def _allowed(probed: Evaluation) -> float:
    """Two samples of few may turn without telling anything."""
    return max(MOST_GAIN, 2 / len(probed.ids))


def _worse(probed: Evaluation, *names: str) -> Scores:
    """The scores of each sample under whichever of the attacks had the larger loss."""
    conditions = [probed.at(name, probed.levels[-1]) for name in names]
    worst = np.argmax([np.nan_to_num(c.loss, nan=-np.inf) for c in conditions], axis=0)
    return {
        name: np.stack([c.scores[name] for c in conditions])[worst, np.arange(len(worst))]
        for name in conditions[0].scores
    }


def _at_least(probed: Evaluation, name: str) -> Array:
    """The losses under an attack, and what counts as the same."""
    loss = probed.at(name, probed.levels[-1]).loss.astype(np.float64)
    return loss + SLACK * np.abs(loss)


def _check(name: str, passed: bool, finding: str, **figures: float) -> Check:
    return Check(name, QUESTIONS[name], "passed" if passed else "failed", finding, figures)

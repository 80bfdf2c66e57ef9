"""AMAT: adaptive-margin adversarial training.

L. Ma and L. Liang, "Adaptive Adversarial Training to Improve Adversarial Robustness of DNNs for Medical Image
Segmentation and Detection", arXiv 2206.01736. The comments in :meth:`AMAT.step` name the lines of its Algorithm 1.

Its lines 10 to 12 are a ratchet: an attack of several steps ends on the sphere, so that line 12 leaves a margin where
it is, and a margin becomes the largest noise that its sample has ever borne. Where a sample comes back changed
(augmentation, crops, several slices under one id) the easiest visit decides, and margins run away. The other rules let
a margin follow what its sample bears (docs/results/margins.md has the comparison).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, Unpack, get_args

import torch
from torch import Tensor

from advmed.attacks.problem import AttackResult
from advmed.margins import MarginStore, names_of_samples
from advmed.methods.base import (
    AdaptiveRadiusMethod,
    AttackOptions,
    Backward,
    MethodSettings,
    MixedLoss,
    Step,
    ThresholdMethod,
    check_optional,
    check_positive,
)
from advmed.norms import per_sample
from advmed.objective import Objective
from advmed.thresholds import RunningThresholds, Thresholds

Rule = Literal["paper", "crossing", "secant", "balanced"]
TRACKING: tuple[Rule, ...] = ("secant", "balanced")
"""Rules by which a margin follows its sample in both directions; these have a floor."""
_EARLY = 16
"""Visits in which the most that a margin moves falls to a half of what it is at first."""
_MANY_AT_FLOOR, _MANY_AT_CAP = 0.5, 0.25
"""Shares of the margins on a bound that are worth a warning."""
_NEAR = 1e-4
"""How near to a bound a margin rests on it, relatively: margins are kept in single precision."""
CAP_OF_EPS, _FLOOR_OF_DELTA = 8.0, 0.25
"""Bounds of a margin that follows its sample: its cap in noise levels of interest, and, where it begins with an
estimate, its floor in delta. Tighter ones, 4 and 1, were measured to hold the margins of whole data sets
(docs/results/margins.md)."""


@dataclass(frozen=True, kw_only=True)
class AMATSettings(MethodSettings):
    """The settings of AMAT. What is None is chosen by the preset of the training, where nothing else is said.

    Attributes:
        delta: expansion step, > 0, in the unit of eps, as all margins: the most that a margin moves in a visit in the
            long run, and every margin's first value where none is estimated; None: the host's default.
        refinement: what a visit makes of a margin (lines 10 to 12). "paper": the noise reached is ||x~ - x||_p of the
            last iterate. It sits on the sphere whenever step_scale >= 1 and no bound interferes, so the refinement
            leaves the margin where it is. "crossing": the norm of the last iterate on the attack's path at which every
            term was still below its threshold, 0 if there was none; known from the attack's own passes, and it lets a
            margin shrink. "secant": half the way to the noise at which straight lines through the losses that were seen
            meet the threshold; up or down, and for no pass more (half of itself at most in its first visits, later
            delta). "balanced": up or down by
            delta, so that a margin settles where half of its visits bear it.
        train_on: where the adversarial image is. "sphere": where the attack ends. "crossing": on the way there, where
            the losses that the attack has seen put the threshold; never nearer to the clean image than delta, if
            the margin is that large.
        start: a margin's first value. "delta", or "estimate": where a straight line from the clean loss to that after
            the attack's first step meets the threshold, eps at most (without one margin_max, or delta); for no pass
            more. An attack of a single step has eps.
        margin_of: whose margin a sample is trained with. "own": its own, as algorithm 1 has it. "any": one that is
            drawn from the margins of all samples, for each visit anew, while its own goes on following what it bears.
            So levels are as large as AMAT finds them, and grow as they do, but no sample is spared. Takes the
            refinement "secant", which judges a margin by any noise, and train_on "sphere".
        empty_samples: what is done with samples in whose truth there is nothing to find (slices without a structure,
            images without an object). "as_others": as algorithm 1 has it; as a rule they bear noise of any size.
            "floor": they are trained with the lowest margin, and have none of their own. (The authors' release, too,
            keeps theirs at delta.)
        margin_min: lowest margin, >= 0; None: for "secant" and "balanced" a quarter of delta where margins begin with
            an estimate and delta where they do not, else none.
        margin_max: highest margin, > 0; None: 8 eps (classification 2 eps) for "secant" and "balanced", else none.
    """

    delta: float | None = None
    refinement: Literal["paper", "crossing", "secant", "balanced"] | None = None
    train_on: Literal["sphere", "crossing"] | None = None
    start: Literal["delta", "estimate"] | None = None
    margin_of: Literal["own", "any"] = "own"
    empty_samples: Literal["floor", "as_others"] = "as_others"
    margin_min: float | None = None
    margin_max: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_optional(self, "delta", "margin_max")
        check_optional(self, "margin_min", zero=True)
        if self.margin_min is not None and self.margin_max is not None and self.margin_min > self.margin_max:
            raise ValueError(f"margin_min {self.margin_min} is above margin_max {self.margin_max}")
        for name, allowed in (
            ("refinement", get_args(Rule)),
            ("train_on", ("sphere", "crossing")),
            ("start", ("delta", "estimate")),
            ("margin_of", ("own", "any")),
            ("empty_samples", ("floor", "as_others")),
        ):
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {value!r}")

    def cap(self, eps: float | None, times: float = CAP_OF_EPS) -> float | None:
        """The highest margin: margin_max or, of margins that follow their samples, so many times eps; None: none.

        The rule must have been chosen (:meth:`advmed.TrainingSettings.for_method`).
        """
        if self.margin_max is not None or self.refinement not in TRACKING or not eps:
            return self.margin_max
        return max(times * eps, self.delta or 0.0, self.margin_min or 0.0)


class AMAT(ThresholdMethod, AdaptiveRadiusMethod):
    """Every sample has its own noise level, its margin E(i), which grows while the model can bear it.

    Adaptive-margin adversarial training (L. Ma and L. Liang 2022, arXiv 2206.01736, Algorithm 1, with K loss terms eq.
    2). L = (L(x) + L(x~)) / 2 with x~ = PGD(x, y, E(i)) (lines 3 to 7). A margin whose attack left every loss term
    below its threshold grows by delta (lines 9 and 10); any other is refined to the mean of itself and the noise that
    was reached (line 12). Other rules than this one of the paper: ``refinement``.

    Margins, delta and their bounds are sizes of noise: its norm (L2, or Linf) over a sample's whole input, in units of
    the images as the network receives them.

    Args:
        delta: expansion step, and every margin's first value, > 0.
        thresholds: K thresholds xi, one per loss term and in its unit (section 2.2): fixed, self-calibrated, or plain
            numbers.
        refinement: what a visit makes of a margin. "paper": as above, with ||x~ - x||_p of the last iterate, which is
            on the sphere as a rule, so that a margin does not shrink. "crossing": the same with the norm of the last
            iterate on the attack's path at which every term was still below its threshold. "secant": half the way, up
            or down, to the noise at which straight lines through the losses that were seen meet the threshold.
            "balanced": up or down by delta.
        train_on: where the adversarial image is: "sphere", where the attack ends; "crossing", where the losses seen on
            the way put the threshold, which takes two steps or more.
        start: a margin's first value: "delta", or "estimate": where a straight line from the clean loss to that after
            the attack's first step, which goes as far as ``start_max`` lets it, meets the threshold. The attack goes on
            within that. (With a single step there is no look on the way, and a sample that is new has ``start_max``.)
        margin_of: whose margin a sample is trained with: "own", or that of "any" sample, drawn anew for each visit; the
            latter with refinement "secant" and train_on "sphere".
        empty_samples: what is done with samples whose truth is empty, as their objective says: "as_others", nothing;
            "floor", they are trained with the lowest margin and have none of their own.
        start_max: highest first value of a margin that begins with an estimate; None: margin_max, or delta without
            one. A network that has not learnt anything yet, or one that is very sure, is flat, and seems to bear any
            noise: margins that begin there teach it to stay flat.
        margin_min: lowest margin, >= 0; None: for "secant" and "balanced" a quarter of delta where margins begin with
            an estimate and delta where they do not, else none.
        margin_max: highest margin, > 0; None: none.
        **attack: of the training, by its names in :class:`AttackOptions`.

    Raises:
        ValueError: a number or a word out of its range, bounds of the margins that exclude each other or delta,
            ``train_on="crossing"`` with an attack of one step, or ``margin_of="any"`` with what it does not go with.

    Example:
        >>> import torch
        >>> from advmed import AMAT
        >>> method, objective = AMAT(delta=0.5, thresholds=1.5), lambda images: images.flatten(1).sum(1, keepdim=True)
        >>> for _ in range(3):  # noise of norm 0.5 takes the loss to 1, and the margin grows; of norm 1, to 2
        ...     step = method.step(objective, torch.zeros(1, 1, 2, 2), ["a"])
        >>> round(method.margins.get(["a"]).item(), 3)
        1.0
    """

    name = "AMAT"
    settings: ClassVar[type[MethodSettings]] = AMATSettings
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "fast": {
            **AdaptiveRadiusMethod.presets["fast"],
            "refinement": "secant",
            "train_on": "sphere",
            "start": "estimate",
        },
        "paper": {
            **AdaptiveRadiusMethod.presets["paper"],
            "refinement": "paper",
            "train_on": "sphere",
            "start": "delta",
        },
    }

    def __init__(
        self,
        delta: float,
        thresholds: Thresholds | RunningThresholds | Tensor | Sequence[float] | float,
        *,
        refinement: Rule = "paper",
        train_on: Literal["sphere", "crossing"] = "sphere",
        start: Literal["delta", "estimate"] = "delta",
        margin_of: Literal["own", "any"] = "own",
        empty_samples: Literal["floor", "as_others"] = "as_others",
        start_max: float | None = None,
        margin_min: float | None = AMATSettings.margin_min,
        margin_max: float | None = AMATSettings.margin_max,
        **attack: Unpack[AttackOptions],
    ) -> None:
        AMATSettings(
            refinement=refinement,
            train_on=train_on,
            start=start,
            margin_of=margin_of,
            empty_samples=empty_samples,
            margin_min=margin_min,
            margin_max=margin_max,
        )
        self.delta = check_positive("delta", delta)
        self.refinement, self.train_on, self.begin_with = refinement, train_on, start
        self.drawn, self.empty_samples = margin_of == "any", empty_samples
        if self.drawn and (refinement, train_on) != ("secant", "sphere"):
            raise ValueError(
                "margin_of 'any' takes refinement 'secant' and train_on 'sphere': other rules judge a margin by the "
                "loss at that very margin"
            )
        self.start_max = check_positive("start_max", start_max or margin_max or self.delta)
        floor = self.delta * (_FLOOR_OF_DELTA if start == "estimate" else 1.0) if refinement in TRACKING else 0.0
        if margin_min is None and margin_max is not None and margin_max < floor:
            raise ValueError(
                f"margin_max {margin_max:g} is below {floor:g}, the floor of margins that follow their samples: lower "
                f"delta, or set margin_min"
            )
        super().__init__(
            self.delta,
            self.delta,
            lowest=floor if margin_min is None else margin_min,
            highest=margin_max,
            additive=refinement == "balanced",
            averaged=refinement == "secant",
            estimated=start == "estimate",
            **attack,
        )
        if train_on == "crossing" and self.attack.steps == 1:
            raise ValueError(
                "train_on 'crossing' looks for a place on the way of an attack, and one step has none: use 2 "
                "steps or more, or train_on 'sphere'"
            )
        self.set_thresholds(thresholds)

    @classmethod
    def needs_thresholds(cls, objective: type) -> bool:
        """Always."""
        return True

    @classmethod
    def from_settings(
        cls, settings: Any, thresholds: Thresholds | RunningThresholds | None = None, **attack: Unpack[AttackOptions]
    ) -> Self:
        """See :meth:`Method.from_settings`.

        Raises:
            ValueError: if there are no thresholds, or delta is None.
        """
        own: AMATSettings = settings
        if own.delta is None or thresholds is None:
            raise ValueError("AMAT needs delta and thresholds")
        eps = getattr(settings, "eps", None)
        return cls(
            own.delta,
            thresholds,
            refinement=own.refinement or "paper",
            train_on=own.train_on or "sphere",
            start=own.start or "delta",
            margin_of=own.margin_of,
            empty_samples=own.empty_samples,
            start_max=max(eps, own.delta) if eps else None,
            margin_min=own.margin_min,
            margin_max=own.cap(eps),
            **attack,
        )

    @property
    def margins(self) -> MarginStore:
        """E, one margin for each sample."""
        return self.store

    def step(self, objective: Objective, images: Tensor, ids: Sequence[str], backward: Backward | None = None) -> Step:
        """See :meth:`Method.step`.

        Raises:
            ValueError: if the objective's number of terms (or their names) are not those of the thresholds.
        """
        ids = names_of_samples(ids)
        margin = self._levels(ids, images)
        xi = self._limits(objective, images)
        assert xi is not None
        mixed = MixedLoss(objective, backward, self.clean_gradients)
        empty = self._empty(objective, images)
        if any(empty):
            margin = margin.masked_fill(torch.tensor(empty, device=images.device), self.lowest)
        first = mixed.clean_first(images, 0.5)
        clean, clean_terms = mixed.clean(images, 0.5)  # lines 2, 5, 7
        self._check_number(clean_terms)
        looked: list[tuple[Tensor, Tensor]] = []
        new = self._unmet(ids, empty, images)
        level = self._drawn(margin, empty) if self.drawn else margin
        if new is not None:
            level = torch.where(new, self._furthest(clean_terms, xi), level)

        def estimated(terms: Tensor, norms: Tensor) -> Tensor:
            assert new is not None
            looked.append((norms.float(), terms))
            return torch.where(new, self._estimate(clean_terms, *looked[0], xi), level)

        limits, revise = xi if self.refinement == "crossing" else None, None if new is None else estimated
        attacked = self._attack(objective, images, level, limits, clean=first, revise=revise)  # line 3
        assert attacked.radius is not None
        level = attacked.radius.float()
        if not self.drawn:
            margin = level
        elif new is not None:
            margin = torch.where(new, level, margin)
        noisy, reached = attacked.images, attacked.norms.float()
        pulled = self.train_on == "crossing" and attacked.seen is not None
        if pulled:
            noisy, reached = self._at_crossing(images.detach(), attacked, clean_terms, xi)
        adversarial, terms = mixed.add(noisy, 0.5)  # lines 4, 6, 7; the host back-propagates, line 8

        points = [(reached, terms)]
        if pulled and attacked.seen is not None:  # what is known further out, where the image was pulled back
            points.append((attacked.seen[1].float().where(reached < attacked.norms, reached), attacked.seen[0]))
        inside = (terms < xi).all(1)  # line 9, with K terms eq. 2
        if len(points) == 2:  # an image that was pulled back lies inside by intent: what is known further out decides
            inside &= (points[1][1] < xi).all(1) | (reached >= attacked.norms)
        if self.refinement == "secant":
            expected = expected_crossing(clean_terms, points, xi)
            if self.drawn:  # a line through little noise tells too much of a convex loss further out
                expected = torch.minimum(expected, torch.maximum(margin, 2 * level))
            most = self._most(margin, self.margins.met(ids))
            moved = margin + torch.clamp((expected - margin) / 2, -most, most)
        elif self.refinement == "balanced":
            moved = torch.where(inside, margin + self.delta, margin - self.delta)
        else:
            found = reached if attacked.crossing is None else attacked.crossing.float()
            moved = torch.where(inside, margin + self.delta, (found + margin) / 2)  # lines 10 and 12
        if new is not None:  # the whole attack knows better than its first step
            expected = expected_crossing(clean_terms, [*points, *looked], xi)
            moved = torch.where(new, expected.clamp(max=2 * self.start_max), moved)
        # A broken pass moves no margin, nor does an attack that was lost; none follows what no gradient leads to.
        broken = (terms.isnan() | clean_terms.isnan()).any(1) | self._lost(attacked)
        if self.refinement in TRACKING:
            broken |= (attacked.norms == 0) & (level + margin > 0)
        moved = moved.where(~broken, math.nan)
        moved = self._bounded(moved)
        grown = inside if self.refinement in ("paper", "crossing") else moved > margin
        if any(empty):  # nothing is learnt from them
            kept = [row for row, nothing in enumerate(empty) if not nothing]
            ids, moved, grown = [ids[row] for row in kept], moved[kept], grown[kept]
        self.margins.visit(ids, moved, self.lowest, self.highest)
        if isinstance(self.thresholds, RunningThresholds):
            self.thresholds.update(clean_terms)
        logs = {
            "loss_clean": clean,
            "loss_adversarial": adversarial,
            "expanded": grown.float().sum() / max(len(grown), 1),
            "nonfinite": attacked.nonfinite.sum(),
        }
        return Step(mixed.total(), logs, clean_terms, noisy)

    def _empty(self, objective: Objective, images: Tensor) -> list[bool]:
        """Which samples have nothing to find in their truth, and are not to have margins."""
        if self.empty_samples != "floor":
            return [False] * len(images)
        said = getattr(objective, "empty", None)
        if said is None:
            raise ValueError(
                "empty_samples 'floor' needs to be told which samples are empty, and nothing is in this task; leave it "
                "at 'as_others', or give the objective an attribute 'empty'"
            )
        found = [bool(nothing) for nothing in said]
        if len(found) != len(images):
            raise ValueError(f"the objective calls {len(found)} samples empty or not, of {len(images)}")
        return found

    def _unmet(self, ids: Sequence[str], empty: Sequence[bool], images: Tensor) -> Tensor | None:
        """Which samples get an estimate for their first margin, (B,); None if none does."""
        if self.begin_with != "estimate":
            return None
        rows = [row for row, nothing in enumerate(empty) if not nothing]
        unmet = self.margins.unmet([ids[row] for row in rows])
        if unmet is None or len(rows) == len(empty):
            return unmet
        return torch.zeros(len(empty), dtype=torch.bool, device=images.device).index_copy(
            0, torch.tensor(rows, device=images.device), unmet
        )

    def _drawn(self, margin: Tensor, empty: Sequence[bool]) -> Tensor:
        """The noise levels of a batch, (B,), drawn from the margins of all samples; empty ones keep theirs."""
        if not len(self.margins):
            return margin
        drawn = self.margins.draw(len(margin), self._generator(1))
        return torch.where(torch.tensor(empty, device=margin.device), margin, drawn) if any(empty) else drawn

    def _furthest(self, clean_terms: Tensor, xi: Tensor) -> Tensor:
        """How far the attack of a first visit may go, (B,)."""
        return self._bounded(torch.where((clean_terms < xi).all(1), self.start_max, 0.0))

    def _estimate(self, clean_terms: Tensor, norms: Tensor, terms: Tensor, xi: Tensor) -> Tensor:
        """The noise at which a straight line through the clean loss and one at that noise meets the threshold, (B,)."""
        radius = expected_crossing(clean_terms, [(norms, terms)], xi).float().clamp(max=self.start_max)
        return self._bounded(radius.nan_to_num(self.lowest))

    def _most(self, margin: Tensor, visits: Tensor) -> Tensor:
        """How far a visit moves a margin at most, (B,): by half of itself at first, to be in time in a short training,
        and by delta in the long run, so that it settles at the median of what its visits bear."""
        early = _EARLY / (_EARLY + visits.to(margin.dtype))
        return torch.clamp((margin + self.delta) / 2 * early, min=self.delta)

    def _at_crossing(
        self, images: Tensor, attacked: AttackResult, clean_terms: Tensor, xi: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The images x + c (x~ - x), 0 < c <= 1, whose loss is expected to meet its threshold, and c ||x~ - x||_p."""
        assert attacked.seen is not None
        terms, norms = attacked.seen
        wanted = expected_crossing(clean_terms, [(norms.float(), terms)], xi).clamp_min(max(self.lowest, self.delta))
        share = (wanted / attacked.norms.float()).nan_to_num(1.0, 1.0, 1.0).clamp(max=1.0)
        noise = (attacked.images - images) * per_sample(share, images)
        whole = per_sample(share, images) == 1
        return torch.where(whole, attacked.images, images + noise), attacked.norms.float() * share

    def outlook(self, visits: float, eps: float | None) -> list[str]:
        """See :meth:`AdaptiveRadiusMethod.outlook`."""
        if self.refinement not in TRACKING or self.begin_with != "estimate":
            return super().outlook(visits, eps)
        cap = "no cap" if self.highest is None else f"cap {self.highest:.4g}"
        return [
            f"margins begin with an estimate and follow what each sample bears (L{self.attack.norm:g} norm, "
            f"floor {self.lowest:.4g}, {cap})"
        ]

    def resting(self) -> str | None:
        """See :meth:`AdaptiveRadiusMethod.resting`."""
        if self.refinement not in TRACKING or not len(self.margins):
            return None
        values = self.margins.values()
        low = float((values <= self.lowest * (1 + _NEAR)).float().mean())
        high = 0.0 if self.highest is None else float((values >= self.highest * (1 - _NEAR)).float().mean())
        if low > _MANY_AT_FLOOR:
            advice = "Lower margin_min, or choose higher thresholds" if self.lowest else "Choose higher thresholds"
            return (
                f"WARNING: {low:.0%} of the margins rest on their floor, {self.lowest:.4g}: these samples bear less "
                f"noise than that, and are trained with one noise level. {advice}"
            )
        if high > _MANY_AT_CAP:
            return (
                f"WARNING: {high:.0%} of the margins rest on their cap, {self.highest:.4g}: these samples bear more "
                f"noise than that. Choose lower thresholds, or set margin_max: to the largest noise level that matters "
                f"if the cap is above it, higher if these samples are to be told apart"
            )
        return None


def expected_crossing(clean: Tensor, points: Sequence[tuple[Tensor, Tensor]], xi: Tensor) -> Tensor:
    """The noise at which the first of the loss terms is expected to meet its threshold.

    Each term runs in straight lines through what is known of it, and beyond that as from the clean image to the last
    point. With one point that is radius * min_k (xi_k - l_k(x)) / (l_k(x~) - l_k(x)).

    Args:
        clean: loss terms of the clean images, (B, K).
        points: norms of noise, (B,), and the loss terms there, (B, K); the nearest first. A point that is no further
            out than the one before it counts for nothing.
        xi: thresholds, (K,).

    Returns:
        Shape (B,), >= 0; 0 where a clean term is above its threshold, inf where no term rises or there was no noise to
        tell, NaN where one is NaN.
    """
    at, low = torch.zeros_like(points[0][0])[:, None], clean
    found, met = torch.full_like(clean, math.inf), torch.zeros_like(clean, dtype=torch.bool)
    for norms, terms in points:
        further = norms[:, None] > at
        crossed = ~met & further & (terms >= xi)
        found = torch.where(crossed, at + (norms[:, None] - at) * _share(xi - low, terms - low), found)
        met = met | crossed
        at, low = torch.where(further, norms[:, None], at), torch.where(further, terms, low)
    beyond = torch.where(at > 0, at * _share(xi - clean, low - clean), math.inf)
    found = torch.where(met, found, beyond)
    found = torch.where(clean < xi, found, 0.0)
    broken = torch.stack([clean, *(terms for _, terms in points)]).isnan().any(0)
    return found.where(~broken, math.nan).amin(1)


def _share(gap: Tensor, rise: Tensor) -> Tensor:
    """Their quotient, inf where nothing rises."""
    return torch.where(rise > 0, gap / rise.clamp_min(torch.finfo(rise.dtype).tiny), math.inf)

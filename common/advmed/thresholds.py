"""Thresholds xi: the loss that a sample may have under attack (arXiv 2206.01736, section 2.2).

xi comes from V, the loss terms of a well-trained model over the clean training samples: ``mean`` takes xi = mean(V),
``mean+2std`` takes xi = mean(V) + 2 std(V), for each of the K terms by itself (section 2.3). Samples whose label is
wrong, or whose term is out of all proportion, raise a mean, and more so a standard deviation: ``median`` and
``median+2spread`` take the median of V and its median absolute deviation in place of both.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from advmed.distributed import gathered, is_distributed
from advmed.files import write_whole

FORMAT = "advmed.thresholds/1"
DEFAULT_RULE = "mean"
BOUNDARY = "boundary"
"""The rule that needs no network: see :func:`at_boundary`."""
_RULE = re.compile(r"(mean|median)(?:\+(\d+(?:\.\d+)?)(std|spread))?")
_SPREADS = {"mean": "std", "median": "spread"}
_NORMAL = 1.482602218505602
"""Standard deviation of a normal distribution over its median absolute deviation, 1 / Phi^-1(3/4)."""


def parse_rule(rule: str) -> tuple[str, float]:
    """What a rule takes as the centre, "mean" or "median", and how many standard deviations or spreads it adds.

    Raises:
        ValueError: for any other text than ``mean``, ``mean+<f>std``, ``median``, ``median+<f>spread``.
    """
    match = _RULE.fullmatch(rule.replace(" ", "")) if isinstance(rule, str) else None
    if match is None or match[3] not in (None, _SPREADS[match[1]]):
        raise ValueError(
            f"the rule for thresholds must be 'mean' or 'mean+<number>std' (mean+2std), 'median' or "
            f"'median+<number>spread', got {rule!r}"
        )
    return match[1], float(match[2] or 0)


def at_boundary(objective: type) -> Thresholds:
    """Thresholds at the losses beyond which a network may no longer recognise a sample, for the rule ``boundary``.

    So a margin is the way to the decision boundary, as in MMA training (G. W. Ding et al. 2020, arXiv 1812.02637), and
    no standard network has to be measured. The cross-entropy of a classifier is there log 2: the right class is then as
    probable as all others together, so that below it no other is taken (of two classes, above it always).

    Args:
        objective: the class of the objectives of a training.

    Raises:
        ValueError: if its terms have no such place.

    Example:
        >>> from advmed import ClassificationObjective
        >>> print(at_boundary(ClassificationObjective))
        ce < 0.693147
    """
    values = getattr(objective, "boundary", None)
    if values is None:
        raise ValueError(
            f"the rule {BOUNDARY!r} is for classifiers, whose cross-entropy says where an image is no longer "
            f"recognised: choose 'mean', 'mean+2std' or 'median+2spread'"
        )
    return Thresholds(values, objective.names, rule=BOUNDARY)  # type: ignore[attr-defined]  # as "boundary" has


def beyond_boundary(thresholds: Thresholds, objective: type) -> str | None:
    """What is to be said of thresholds above those of :func:`at_boundary`; None: nothing."""
    limits = getattr(objective, "boundary", None)
    if limits is None or not any(value > limit for value, limit in zip(thresholds.values, limits, strict=True)):
        return None
    bounds = ", ".join(f"{name} < {limit:.6g}" for name, limit in zip(thresholds.names, limits, strict=True))
    return (
        f"these thresholds lie beyond {bounds}, so that an image counts as bearing noise by which it may be taken for "
        f"another class. If clean accuracy suffers, a lower rule is one remedy, the rule {BOUNDARY!r} another"
    )


@dataclass(frozen=True)
class Thresholds:
    """K thresholds, one per loss term, and where they come from.

    xi is the loss that a sample may have under attack (AMAT paper, arXiv 2206.01736, section 2.2; with several terms
    section 2.3, eq. 2). It is made of V, the loss terms of a well-trained standard model over the clean training
    samples, each term by itself: xi = mean(V), or mean(V) + 2 std(V).

    Attributes:
        values: the K thresholds xi, each in the unit of its loss term.
        names: the names of the K loss terms.
        rule: the rule that made them of what follows, if any.
        mean: per term, over the samples.
        std: per term, over the samples (population).
        median: per term, over the samples.
        spread: per term, the median absolute deviation from the median, times 1.4826: the standard deviation, if the
            losses were normally distributed.
        n: number of samples.
        source: the checkpoint of the model that was measured.
        source_sha256: its hash.
        notes: anything else worth keeping (data set, fold, quality of the model), plain values.

    Raises:
        ValueError: if values and names do not fit together, or a value is NaN.

    Example:
        >>> from advmed import Thresholds
        >>> thresholds = Thresholds((0.25,), ("ce",), rule="mean", mean=(0.25,), std=(0.5,))
        >>> str(thresholds), str(thresholds.by_rule("mean+2std"))
        ('ce < 0.25', 'ce < 1.25')
    """

    values: tuple[float, ...]
    names: tuple[str, ...]
    rule: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    n: int | None = None
    source: str | None = None
    source_sha256: str | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    median: tuple[float, ...] | None = None
    spread: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("values", "mean", "std", "median", "spread"):
            value = getattr(self, name)
            if value is not None:
                numbers = value.tolist() if isinstance(value, Tensor) else value
                object.__setattr__(self, name, tuple(float(x) for x in numbers))
        object.__setattr__(self, "names", tuple(str(x) for x in self.names))
        if len(self.values) != len(self.names) or not self.values:
            raise ValueError(f"{len(self.values)} thresholds for {len(self.names)} loss terms {list(self.names)}")
        if any(map(math.isnan, self.values)):
            raise ValueError(f"a threshold is NaN: {dict(zip(self.names, self.values, strict=True))}")

    def __len__(self) -> int:
        return len(self.values)

    def __str__(self) -> str:
        return ", ".join(f"{name} < {value:.6g}" for name, value in zip(self.names, self.values, strict=True))

    def tensor(self, like: Tensor) -> Tensor:
        """The values on the device and of the dtype of ``like``, shape (K,)."""
        return torch.tensor(self.values, dtype=like.dtype).to(like.device, non_blocking=True)

    def require(self, names: Sequence[str], origin: str = "the thresholds") -> None:
        """Checks that these thresholds fit a model with the given loss terms.

        Raises:
            ValueError: saying both what the model has and what these thresholds are for.
        """
        if tuple(names) != self.names:
            raise ValueError(
                f"{origin} do not fit this model: they are for K = {len(self.names)} loss terms {list(self.names)}, "
                f"the model's loss has K = {len(names)} terms {list(names)}. Make thresholds of this model's own "
                f"standard training, or change the settings so that the terms agree."
            )

    def by_rule(self, rule: str | None, origin: str = "the thresholds") -> Thresholds:
        """These thresholds, made of the same losses by another rule; None changes nothing.

        Raises:
            ValueError: for an unknown rule, or if what it is made of is not known.
        """
        if rule is None or rule == self.rule:
            return self
        if self.rule not in (None, BOUNDARY) and parse_rule(rule) == parse_rule(self.rule):
            return self
        name, factor = parse_rule(rule)
        middle, spread = getattr(self, name), getattr(self, _SPREADS[name])
        if middle is None or spread is None:
            raise ValueError(
                f"{origin} hold no {name} and {_SPREADS[name]} that the rule {rule!r} could be applied to. Remove "
                f"'rule' from the settings to use the values as they are, or make the thresholds anew."
            )
        values = tuple(m + factor * s for m, s in zip(middle, spread, strict=True))
        return replace(self, values=values, rule=rule)

    def save(self, path: str | Path) -> None:
        """Writes the thresholds as a JSON file."""
        content = {"format": FORMAT, **asdict(self), "notes": dict(self.notes)}
        content["values"] = [x if math.isfinite(x) else str(x) for x in self.values]
        write_whole(path, json.dumps(content, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Thresholds:
        """Reads a file written by :meth:`save`.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is not one of thresholds.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no thresholds file {path}")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("format") != FORMAT:
                raise ValueError("another format")
            return cls(**content)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is not a thresholds file of the format {FORMAT}: {error}") from error


class TermStatistics:
    """Streaming mean and standard deviation of K loss terms, on the terms' device, with no host sync.

    They are what thresholds are made of (AMAT paper, arXiv 2206.01736, section 2.2). Merging batches follows Chan,
    Golub and LeVeque (1979), in float64 where the device has it.

    Args:
        names: the names of the K terms.
        memory: number of samples to remember, > 0: older ones fade out exponentially. None: all count alike.
        keep: keep the losses, (n, K), for the rules of the median; without ``memory`` only.

    Raises:
        ValueError: for a memory that is not positive, or losses that are to be kept and to fade.

    Example:
        >>> import torch
        >>> from advmed import TermStatistics
        >>> statistics = TermStatistics(["ce"])
        >>> statistics.update(torch.tensor([[1.0], [3.0]]))  # mean 2, standard deviation 1
        >>> statistics.thresholds("mean+2std").values
        (4.0,)
    """

    def __init__(self, names: Sequence[str], memory: float | None = None, *, keep: bool = False) -> None:
        if memory is not None and not memory > 0:
            raise ValueError(f"memory must be a positive number of samples, got {memory!r}")
        if keep and memory is not None:
            raise ValueError("losses are kept (keep=True) only where all of them count alike (memory=None)")
        self.names = tuple(names)
        self.memory = memory
        self._kept: list[Tensor] | None = [] if keep else None
        self._n = torch.zeros((), dtype=torch.float64)
        self._mean = torch.zeros(len(self.names), dtype=torch.float64)
        self._m2 = torch.zeros(len(self.names), dtype=torch.float64)

    def update(self, terms: Tensor) -> None:
        """Takes in the terms of a batch, shape (B, K); a sample with a term that is not finite is left out.

        Raises:
            ValueError: for terms of another shape.
        """
        if terms.ndim != 2 or terms.shape[1] != len(self.names):
            raise ValueError(f"expected terms of shape (B, {len(self.names)}), got {tuple(terms.shape)}")
        wide = torch.float32 if terms.device.type == "mps" else torch.float64
        terms = terms.detach().to(wide)
        if self._mean.device != terms.device:
            self._n, self._mean, self._m2 = (x.to(terms.device, wide) for x in (self._n, self._mean, self._m2))
        if self._kept is not None:
            self._kept.append(terms.clone())  # the caller may go on with its own
        counted = terms.isfinite().all(1)
        n = counted.sum().to(wide)
        safe = n.clamp_min(1)
        mean = torch.where(counted[:, None], terms, 0).sum(0) / safe
        m2 = torch.where(counted[:, None], (terms - mean) ** 2, 0).sum(0)
        if self.memory is not None:
            fade = torch.exp(-n / self.memory)
            self._n, self._m2 = self._n * fade, self._m2 * fade
        self._add(n, mean, m2)

    def _add(self, n: Tensor, mean: Tensor, m2: Tensor) -> None:
        sum_n = self._n + n
        shift = mean - self._mean
        share = n / sum_n.clamp_min(1e-12)
        self._m2 = self._m2 + m2 + shift**2 * self._n * share
        self._mean = self._mean + shift * share
        self._n = sum_n

    @property
    def n(self) -> float:
        """Number of samples taken in (with ``memory``: their weight)."""
        return float(self._n)

    @property
    def mean(self) -> Tensor:
        """(K,), float64."""
        return self._mean

    @property
    def std(self) -> Tensor:
        """(K,), float64; the population's."""
        return (self._m2 / self._n.clamp_min(1e-12)).clamp_min(0).sqrt()

    def median_and_spread(self) -> tuple[Tensor, Tensor] | None:
        """Median, and median absolute deviation from it times 1.4826, (K,) each; None if losses are not kept."""
        if self._kept is None:
            return None
        rows = torch.cat(self._kept)
        rows = rows[rows.isfinite().all(1)]
        median = rows.quantile(0.5, 0)
        return median, _NORMAL * (rows - median).abs().quantile(0.5, 0)

    def tensor(self, rule: str) -> Tensor:
        """The thresholds by ``rule`` as a (K,) tensor on the statistics' device; of the mean with no host sync.

        Raises:
            ValueError: for a rule of the median, if losses are not kept.
        """
        name, factor = parse_rule(rule)
        if name == "mean":
            return self._mean + factor * self.std
        if (found := self.median_and_spread()) is None:
            raise ValueError(f"the rule {rule!r} needs all losses (keep=True); 'mean' and 'mean+2std' do not")
        return found[0] + factor * found[1]

    def thresholds(
        self,
        rule: str,
        *,
        source: str | None = None,
        source_sha256: str | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> Thresholds:
        """The thresholds by ``rule``.

        Args:
            rule: ``mean``, ``mean+2std``, ``median`` or ``median+2spread``, with any number.
            source: what they are measured on, such as a checkpoint.
            source_sha256: of that file.
            notes: plain values that say more of it.

        Raises:
            ValueError: if nothing was taken in; for a rule of the median, if losses are not kept.
        """
        parse_rule(rule)
        n = self.n
        if not n > 0:
            raise ValueError("there are no thresholds to be had from no samples: no finite loss term was seen")
        robust: dict[str, Any] = {}
        if (found := self.median_and_spread()) is not None:
            robust = {"median": found[0], "spread": found[1]}
        values = self.tensor(rule).tolist()
        return Thresholds(
            tuple(values),
            self.names,
            rule,
            tuple(self._mean.tolist()),
            tuple(self.std.tolist()),
            round(n),
            **robust,
            source=source,
            source_sha256=source_sha256,
            notes={} if notes is None else notes,
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "names": list(self.names),
            "memory": self.memory,
            "n": self.n,
            "mean": self._mean.tolist(),
            "m2": self._m2.tolist(),
            **({} if self._kept is None else {"kept": [row for part in self._kept for row in part.tolist()]}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replaces the statistics.

        Raises:
            ValueError: if the state is about other terms.
        """
        if tuple(state["names"]) != self.names:
            raise ValueError(f"the statistics are of the terms {list(state['names'])}, not {list(self.names)}")
        self.memory = state["memory"]
        device, dtype = self._mean.device, self._mean.dtype
        self._n = torch.tensor(state["n"], dtype=dtype, device=device)
        self._mean = torch.tensor(state["mean"], dtype=dtype, device=device)
        self._m2 = torch.tensor(state["m2"], dtype=dtype, device=device)
        if self._kept is not None:
            self._kept = [torch.tensor(state["kept"], dtype=dtype, device=device).reshape(-1, len(self.names))]

    def merge(self, states: Sequence[Mapping[str, Any]] | None = None, *, average: bool = False) -> None:
        """Pools the statistics of all processes.

        Args:
            states: the :meth:`state_dict` of all processes. Default: gathered with ``torch.distributed``; nothing
                happens without it.
            average: for statistics that are merged again and again. The processes' weights are averaged, so that what
                they share already is not counted once more by each merge, and ``n`` is the number of samples per
                process. Otherwise the weights add up, which is meant for once, when all processes have finished.
        """
        if states is None:
            if not is_distributed():
                return
            states = gathered(self.state_dict())
        device, dtype = self._mean.device, self._mean.dtype
        pooled = TermStatistics(self.names, self.memory)
        weight = 1.0 / len(states) if average else 1.0
        for state in states:
            n, mean, m2 = (torch.tensor(state[key], dtype=torch.float64) for key in ("n", "mean", "m2"))
            pooled._add(n * weight, mean, m2 * weight)
        self._n, self._mean, self._m2 = (x.to(device, dtype) for x in (pooled._n, pooled._mean, pooled._m2))
        if self._kept is not None:
            rows = [row for state in states for row in state["kept"]]
            self._kept = [torch.tensor(rows, dtype=dtype, device=device).reshape(-1, len(self.names))]


class RunningThresholds:
    """Self-calibrated thresholds, for users who have no standard model: the rule on the clean terms of the training.

    The rules are the AMAT paper's (arXiv 2206.01736, section 2.2), what they are applied to is ours: a clean warm-up
    fills the statistics; afterwards they follow the clean terms L0 that adversarial training computes
    anyway. After :meth:`begin` they can fall below the warm-up's thresholds but never rise above them: otherwise large
    margins would raise the clean loss, which would raise the thresholds, which would raise the margins.

    Args:
        names: the names of the K terms.
        rule: ``mean`` or ``mean+2std``.
        memory: number of samples the statistics remember (about an epoch); None: all.

    Raises:
        ValueError: for a rule of the median, which takes the losses of a finished network, one that is none, or a
            memory that is not positive.

    Example:
        >>> import torch
        >>> from advmed import RunningThresholds
        >>> thresholds = RunningThresholds(["ce"])
        >>> thresholds.update(torch.tensor([[0.25], [0.5]]))  # the clean terms of a warm-up
        >>> thresholds.begin()
        >>> thresholds.update(torch.tensor([[9.0]]))  # later terms can only lower them
        >>> str(thresholds)
        'ce < 0.375'
    """

    def __init__(self, names: Sequence[str], rule: str = DEFAULT_RULE, memory: float | None = None) -> None:
        if parse_rule(rule)[0] != "mean":
            raise ValueError(
                f"the rule {rule!r} is for thresholds measured on a standard network; self-calibrated ones follow "
                f"'mean' or 'mean+<number>std'. Name a thresholds file or a standard network, or change 'rule'."
            )
        self.rule = rule
        self.statistics = TermStatistics(names, memory)
        self._ceiling: Tensor | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the K terms."""
        return self.statistics.names

    def __len__(self) -> int:
        return len(self.names)

    def __str__(self) -> str:
        return str(self.current()) if self.statistics.n else f"{self.rule} of the clean terms, not yet measured"

    def update(self, terms: Tensor) -> None:
        """Takes in the clean terms of a batch, (B, K)."""
        self.statistics.update(terms)

    def begin(self) -> None:
        """Ends the warm-up: from here on the thresholds can only fall.

        Raises:
            ValueError: if the warm-up saw no sample.
        """
        self._ceiling = torch.tensor(self.statistics.thresholds(self.rule).values, dtype=torch.float64)

    def tensor(self, like: Tensor) -> Tensor:
        """The thresholds now, shape (K,), on the device and of the dtype of ``like``."""
        now = self.statistics.tensor(self.rule).to(like.device, like.dtype)
        if self._ceiling is None:
            return now
        if self._ceiling.device != like.device:
            self._ceiling = self._ceiling.to(like.device, like.dtype if like.device.type == "mps" else torch.float64)
        return torch.minimum(now, self._ceiling.to(like.dtype))

    def current(self) -> Thresholds:
        """The thresholds now, as a record."""
        now = self.statistics.thresholds(self.rule, source="self-calibrated")
        if self._ceiling is None:
            return now
        values = [min(pair) for pair in zip(now.values, self._ceiling.tolist(), strict=True)]
        return replace(now, values=tuple(values))

    def require(self, names: Sequence[str], origin: str = "the self-calibrated thresholds") -> None:
        """As :meth:`Thresholds.require`."""
        Thresholds((0.0,) * len(self), self.names).require(names, origin)

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        ceiling = None if self._ceiling is None else self._ceiling.tolist()
        return {"rule": self.rule, "statistics": self.statistics.state_dict(), "ceiling": ceiling}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replaces statistics and ceiling; the rule stays the one this object was made with."""
        self.statistics.load_state_dict(state["statistics"])
        ceiling = state["ceiling"]
        self._ceiling = None if ceiling is None else torch.tensor(ceiling, dtype=torch.float64)

    def merge(self) -> None:
        """Makes the statistics of all processes equal (:meth:`TermStatistics.merge`)."""
        self.statistics.merge(average=True)

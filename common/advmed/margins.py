"""Per-sample state that outlives a step: AMAT's margins E(i), and any other number a method keeps for each sample.

The table lives on the model's device, so a look-up or an update is one indexing operation there; the host only turns
id strings into rows, and never waits for the device.
"""

from __future__ import annotations

import csv
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from advmed.distributed import gathered, is_distributed
from advmed.files import replacing


def names_of_samples(ids: Sequence[Any] | Tensor) -> list[str]:
    """Sample ids as strings, whatever a loader has made of them.

    A tensor's elements would each be another key, and a sample's margin never be found again.

    Example:
        >>> from advmed.margins import names_of_samples
        >>> names_of_samples(torch.tensor([3, 5])), names_of_samples(["a", 5])
        (['3', '5'], ['a', '5'])
    """
    plain = ids.tolist() if isinstance(ids, (Tensor, np.ndarray)) else ids
    return [
        sample if isinstance(sample, str) else str(getattr(sample, "item", lambda s=sample: s)()) for sample in plain
    ]


class MarginStore:
    """One number per sample id; an id never set has the initial value.

    It holds AMAT's margins E(i) (arXiv 2206.01736, Algorithm 1) and DPAAT's sizes: norms of the noise over a sample's
    whole input, in units of the images as the network receives them.

    Args:
        initial: value of a sample that was never set (AMAT: delta), finite.
        device: where the table lives; :meth:`to` moves it.
        additive: values move by steps of a given size, in both directions; see :meth:`merge`.
        averaged: a value is a moving average of what its sample's visits say; see :meth:`merge`.
        estimated: a sample's first value is its own, and no step from the initial one; see :meth:`merge`.

    Raises:
        ValueError: if ``initial`` is not finite.

    Example:
        >>> from advmed import MarginStore
        >>> margins = MarginStore(initial=0.5)
        >>> margins.set(["a"], [2.0])
        >>> margins.get(["a", "b"])  # b has not been set
        tensor([2.0000, 0.5000])
    """

    def __init__(
        self,
        initial: float = 0.0,
        *,
        device: torch.device | str = "cpu",
        additive: bool = False,
        averaged: bool = False,
        estimated: bool = False,
    ) -> None:
        if not math.isfinite(initial):
            raise ValueError(f"the initial value of a margin must be finite, got {initial!r}")
        self.initial = float(initial)
        self.additive, self.averaged, self.estimated = additive, averaged, estimated
        self._rows: dict[str, int] = {}
        self._fresh: set[str] = set()  # registered since the last merge; whether a visit counted, the device knows
        # Row 0 stands for every id that was never set; ids begin at row 1.
        self._values = torch.full((1,), self.initial, device=device)
        self._visits = torch.zeros(1, dtype=torch.int64, device=device)
        self._merged = self._values.clone()  # the values at the last merge, and the visits then
        self._merged_visits = self._visits.clone()

    def __len__(self) -> int:
        """Number of ids that have been set."""
        return len(self._rows)

    def __contains__(self, sample: Any) -> bool:
        return names_of_samples([sample])[0] in self._rows

    @property
    def device(self) -> torch.device:
        """Where the table lives."""
        return self._values.device

    def to(self, device: torch.device | str) -> MarginStore:
        """Moves the table, if it is not there yet; returns the store itself."""
        if self.device != torch.device(device):
            for name in ("_values", "_visits", "_merged", "_merged_visits"):
                setattr(self, name, getattr(self, name).to(device))
        return self

    def get(self, ids: Sequence[str]) -> Tensor:
        """The values of the samples, shape (B,), float32, on the store's device."""
        rows = [self._rows.get(sample, 0) for sample in names_of_samples(ids)]
        return self._values[self._on_device(rows)]

    def unmet(self, ids: Sequence[str]) -> Tensor | None:
        """Which of the samples have never been given a value, (B,), bool, on the store's device; None where it is known
        that all have, without waiting for the device."""
        names = names_of_samples(ids)
        if all(name in self._rows and name not in self._fresh for name in names):
            return None
        return self.met(names) == 0

    def met(self, ids: Sequence[str]) -> Tensor:
        """How often each of the samples has been given a value, shape (B,), int64, on the store's device."""
        rows = [self._rows.get(sample, 0) for sample in names_of_samples(ids)]
        return self._visits[self._on_device(rows)]

    def draw(self, number: int, generator: torch.Generator | None = None) -> Tensor:
        """So many of the values, drawn with replacement, shape (number,), float32, on the store's device.

        Args:
            number: of draws.
            generator: of random numbers, on the CPU; None: the global one.

        Raises:
            ValueError: if no id has been set.

        Example:
            >>> margins = MarginStore()
            >>> margins.set(["a", "b"], [2.0, 2.0])
            >>> margins.draw(3)
            tensor([2., 2., 2.])
        """
        if not self._rows:
            raise ValueError("there are no margins to draw from")
        rows = torch.randint(1, len(self) + 1, (number,), generator=generator)
        return self._values[self._on_device(rows.tolist())]

    def set(self, ids: Sequence[str], values: Tensor | Sequence[float]) -> None:
        """Writes the values of the samples, and counts a visit of each.

        An id that occurs twice takes its last value (and two visits). A value that is not finite is not written, and
        is no visit: the sample keeps what it has.

        Args:
            ids: B sample ids, strings; others are taken by their names (:func:`names_of_samples`).
            values: shape (B,).

        Raises:
            ValueError: if there are not as many values as ids.
        """
        values = torch.as_tensor(values, dtype=torch.float32, device=self.device).detach()
        if values.shape != (len(ids),):
            raise ValueError(f"expected one value for each of {len(ids)} ids, got shape {tuple(values.shape)}")
        if not len(ids):
            return
        rows = self._registered(ids)
        every = self._on_device(rows)
        last = {row: position for position, row in enumerate(rows)}
        self._count(every, values)
        if len(last) < len(rows):  # writing one row twice has no defined order on a device
            every, values = self._on_device(list(last)), values[self._on_device(list(last.values()))]
        self._write(every, values)

    def visit(
        self, ids: Sequence[str], values: Tensor, lowest: float = -math.inf, highest: float | None = None
    ) -> None:
        """Writes what the visits of a batch made of the values that the samples had; as :meth:`set`, but for repeats.

        The visits of an id that occurs several times began with the same value. They count together as those of several
        processes do: see :meth:`merge`.

        Args:
            ids: B sample ids, strings; others are taken by their names (:func:`names_of_samples`).
            values: shape (B,).
            lowest: what is below it is put there.
            highest: what is above it is put there; None: no limit.

        Example:
            >>> margins = MarginStore(initial=0.5)
            >>> margins.visit(["a", "b", "a"], torch.tensor([0.75, 0.5, 0.75]))  # a has grown twice by 0.25
            >>> margins.get(["a", "b"])
            tensor([1.0000, 0.5000])
        """
        values = values.detach().to(self.device, torch.float32)
        if len(set(names_of_samples(ids))) == len(ids):
            self.set(ids, values.clamp(lowest, highest))
            return
        rows = self._registered(ids)
        every = self._on_device(rows)
        places = {row: place for place, row in enumerate(dict.fromkeys(rows))}
        into, own = self._on_device([places[row] for row in rows]), self._on_device(list(places))
        finite, start = values.isfinite(), self._values[every]
        none = torch.zeros(len(places), device=self.device)
        number = none.index_add(0, into, finite.float())
        mean = none.index_add(0, into, values.where(finite, 0.0)) / number  # NaN where no visit counts
        if not self.averaged:
            shrunk = finite & (values >= 0) & (values < start) & (not self.additive)
            shares = torch.where(shrunk, values / start, 1.0)
            # Their product, of which a GPU has no deterministic form; a share of 0 stays one.
            shrinkage = none.index_add(0, into, shares.log()).exp()
            growth = none.index_add(0, into, (values - start).where(finite & ~shrunk, 0.0))
            first = (self._visits[own] == 0) & self.estimated
            mean = torch.where(first | (number == 0), mean, self._values[own] * shrinkage + growth)
        self._count(every, values)
        self._write(own, mean.clamp(lowest, highest))

    def _registered(self, ids: Sequence[str]) -> list[int]:
        """The rows of samples, new ones among them."""
        names = names_of_samples(ids)
        self._register(names)
        return [self._rows[name] for name in names]

    def _count(self, rows: Tensor, values: Tensor) -> None:
        self._visits.index_add_(0, rows, values.isfinite().to(self._visits.dtype))

    def _write(self, rows: Tensor, values: Tensor) -> None:
        self._values[rows] = torch.where(values.isfinite(), values, self._values[rows])

    def _register(self, ids: Iterable[str]) -> None:
        for sample in ids:
            if sample not in self._rows:
                self._rows[sample] = len(self._rows) + 1
                self._fresh.add(sample)
        missing = len(self._rows) + 1 - len(self._values)
        if missing > 0:
            missing = max(missing, len(self._values))  # doubling keeps the cost of growth constant per sample
            fill = self._values.new_full((missing,), self.initial)
            none = self._visits.new_zeros(missing)
            self._values, self._merged = torch.cat((self._values, fill)), torch.cat((self._merged, fill))
            self._visits = torch.cat((self._visits, none))
            self._merged_visits = torch.cat((self._merged_visits, none))

    def _on_device(self, rows: list[int]) -> Tensor:
        index = torch.tensor(rows, dtype=torch.int64)
        if self.device.type == "cuda":
            return index.pin_memory().to(self.device, non_blocking=True)
        return index.to(self.device)

    # What the table holds; these read the device, and belong at the end of an epoch.

    def ids(self) -> list[str]:
        """The ids that have been set, in the order in which they were first met."""
        return list(self._rows)

    def values(self) -> Tensor:
        """Their values, shape (len,), on the CPU."""
        return self._values[1 : len(self) + 1].cpu()

    def visits(self) -> Tensor:
        """How often each was set, shape (len,), int64, on the CPU."""
        return self._visits[1 : len(self) + 1].cpu()

    def quantiles(
        self, q: Sequence[float] = (0.05, 0.5, 0.95), of: Callable[[str], bool] = lambda sample: True
    ) -> list[float]:
        """Quantiles of the values of some ids; the initial value while there are none of them."""
        chosen = torch.tensor([of(sample) for sample in self._rows], dtype=torch.bool)
        values = self.values()[chosen] if chosen.any() else torch.tensor([self.initial])
        return [float(x) for x in torch.quantile(values.double(), torch.tensor(list(q), dtype=torch.float64))]

    def histogram(self, bins: int = 20) -> tuple[Tensor, Tensor]:
        """Counts (bins,) and edges (bins + 1,) of the values."""
        counts, edges = torch.histogram(self.values(), bins)
        return counts.long(), edges

    def to_csv(self, path: str | Path) -> None:
        """Writes the columns id, margin, visits."""
        with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("id", "margin", "visits"))
            writer.writerows(zip(self._rows, self.values().tolist(), self.visits().tolist(), strict=True))

    # State

    def state_dict(self) -> dict[str, Any]:
        """The whole store as plain lists and numbers: readable by JSON, and by a host without this package."""
        return {
            "initial": self.initial,
            "ids": self.ids(),
            "values": self.values().tolist(),
            "visits": self.visits().tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replaces the content of the store.

        Raises:
            ValueError: if the state is not one of a store, or its parts do not fit together.
        """
        missing = [key for key in ("initial", "ids", "values", "visits") if key not in state]
        if missing:
            raise ValueError(f"not the state of a margin store: {', '.join(missing)} missing, got {sorted(state)}")
        try:
            ids = list(state["ids"])
            values = torch.tensor([float(x) for x in (state["initial"], *state["values"])])
            visits = torch.tensor([0, *map(operator.index, state["visits"])], dtype=torch.int64)
            rows = {sample: row for row, sample in enumerate(ids, start=1)}
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"damaged margin state: {error}") from error
        if not len(rows) == len(ids) == len(values) - 1 == len(visits) - 1:
            raise ValueError(
                f"damaged margin state: {len(ids)} ids ({len(rows)} different), {len(values) - 1} values, "
                f"{len(visits) - 1} visits"
            )
        if not values.isfinite().all():
            raise ValueError("damaged margin state: a margin is not finite")
        self.initial = float(state["initial"])
        self._rows = rows
        self._fresh = {sample for sample, met in zip(ids, visits[1:].tolist(), strict=True) if not met}
        self._values, self._visits = values.to(self.device), visits.to(self.device)
        self._merged, self._merged_visits = self._values.clone(), self._visits.clone()

    def require_known(self, known: Iterable[str], hint: str = "") -> None:
        """Checks that the store is about this data set.

        Args:
            known: every id the data set can have.
            hint: what the user should do, added to the message.

        Raises:
            ValueError: naming some of the ids that are not among ``known``.
        """
        strangers = sorted(set(self._rows) - set(known))
        if strangers:
            raise ValueError(
                f"{len(strangers)} of {len(self)} margins belong to samples that are not in this data set, for example "
                f"{', '.join(strangers[:3])}. {hint}".strip()
            )

    # Several processes

    def merge(self, states: Sequence[Mapping[str, Any]] | None = None) -> None:
        """Makes the stores of all processes equal, as if the processes had taken their turns one after another.

        Each process tells what its visits changed since the last merge. For every sample, growth adds up (two
        processes that both enlarged a margin by delta enlarge it by 2 delta, as two visits would) and shrinkage
        multiplies (so that no margin falls below zero), unless values are ``additive``. Of ``averaged`` values, and of
        the first ones of samples whose first is ``estimated``, each process's counts as often as it has met the sample.
        A sample visited by one process takes that process's value. An id whose values were never finite is forgotten:
        it is met for the first time again.

        Args:
            states: for tests and for hosts with an exchange of their own: the :meth:`changes` of all processes, in the
                order of their ranks. Default: gathered with ``torch.distributed``; nothing happens without it.
        """
        if states is None:
            if not is_distributed():
                self._forget_unmet()
                return
            states = gathered(self.changes())
        merged = zip(self._rows, self._merged[1:].tolist(), self._merged_visits[1:].tolist(), strict=False)
        base = {sample: (value, visits) for sample, value, visits in merged if visits}
        table = {sample: [value, visits] for sample, (value, visits) in base.items()}
        since: dict[str, tuple[float, int]] = {}
        for state in states:  # in the order of the ranks, so that every process ends with the same table
            for sample, value, visits in zip(state["ids"], state["values"], state["visits"], strict=True):
                start = base.get(sample, (self.initial, 0))[0]
                entry = table.setdefault(sample, [start, 0])
                if self.averaged or (self.estimated and sample not in base):
                    total, met = since.get(sample, (0.0, 0))
                    since[sample] = total, met = total + value * visits, met + visits
                    entry[0], entry[1] = total / met, entry[1] + visits
                    continue
                shrunk = 0 <= value < start and not self.additive
                entry[0] = entry[0] * (value / start) if shrunk else entry[0] + (value - start)
                entry[1] += visits
        values, visited = zip(*table.values(), strict=True) if table else ((), ())
        self.load_state_dict({"initial": self.initial, "ids": list(table), "values": values, "visits": visited})

    def _forget_unmet(self) -> None:
        visits = self.visits()
        if bool((visits > 0).all()):
            self._fresh.clear()
            return
        kept = [
            (name, value, met)
            for name, value, met in zip(self._rows, self.values().tolist(), visits.tolist(), strict=True)
            if met
        ]
        ids, values, met = (list(column) for column in zip(*kept, strict=True)) if kept else ([], [], [])
        self.load_state_dict({"initial": self.initial, "ids": ids, "values": values, "visits": met})

    def clamp(self, lowest: float, highest: float | None = None) -> None:
        """Puts every value between the two; for after :meth:`merge`, which knows no bounds and may have passed them."""
        for table in (self._values, self._merged):
            table.clamp_(lowest, highest)

    def changes(self) -> dict[str, Any]:
        """The samples visited since the last merge: their ids, values, and visits since then."""
        size = len(self) + 1
        since = (self._visits[:size] - self._merged_visits[:size]).cpu()
        rows = since.nonzero().flatten().tolist()
        if not rows:
            return {"ids": [], "values": [], "visits": []}
        ids = self.ids()
        return {
            "ids": [ids[row - 1] for row in rows],
            "values": self._values[:size].cpu()[rows].tolist(),
            "visits": since[rows].tolist(),
        }


def read_margins(path: str | Path) -> NDArray[Any] | None:
    """The values that :meth:`MarginStore.to_csv` wrote, (n,); None if there is no file or nothing in it."""
    if not Path(path).is_file():
        return None
    with open(path, newline="", encoding="utf-8") as file:
        values = np.array([float(row["margin"]) for row in csv.DictReader(file)])
    return values if values.size and np.isfinite(values).all() else None

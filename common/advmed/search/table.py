"""The table of a search, as in the paper's Tables 8-12."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from advmed.files import write_whole
from advmed.search.curve import Curve, Incomparable, unlike
from advmed.search.plan import Plan, Range, Value, as_text, is_number
from advmed.search.trials import Trial


@dataclass(frozen=True)
class Table:
    """The summary of a search, as in the paper's Tables 8-12.

    Attributes:
        plan: the study file.
        trials: one for every setting, in the order of their values.
        scale: what values are divided by for AUC_robust.
    """

    plan: Plan
    trials: Sequence[Trial]
    scale: float

    @classmethod
    def of(cls, plan: Plan, trials: Sequence[Trial]) -> Table:
        """Makes the table.

        Raises:
            ValueError: for trials whose reports were not made alike.
        """
        done = [(trial, trial.curve) for trial in trials if trial.curve is not None]
        for trial, curve in done[1:]:
            differ = unlike(curve, done[0][1])
            if differ:
                raise Incomparable(f"{trial.name} and {done[0][0].name} were not evaluated alike: {differ}")
        scale = plan.scale
        if scale is None and done:
            scale = done[0][1].facts["scale"]
            if scale is None and done[0][1].sign < 0:
                scale = max(value for _, curve in done for value in curve.values)
        ordered = sorted(trials, key=lambda trial: [_order(trial.setting[name]) for name in plan.space])
        return cls(plan, ordered, scale or 1.0)

    @property
    def done(self) -> list[tuple[Trial, Curve]]:
        """The trials with a result."""
        return [(trial, trial.curve) for trial in self.trials if trial.curve is not None]

    @property
    def best(self) -> Trial | None:
        """The trial with the best objective, the first of several; None before one has ended."""
        return max(self.done, key=lambda pair: self._score(pair[1]), default=(None, None))[0]

    def _score(self, curve: Curve) -> float:
        return curve.sign * curve.measure(self.plan.objective, self.scale)

    @property
    def header(self) -> list[str]:
        """Names of the columns."""
        levels = self.done[0][1].levels[1:] if self.done else []
        return [*self.plan.space, "clean", *(f"{level:g}" for level in levels), "mean", "AUC_robust", ""]

    def rows(self, exact: bool = False) -> list[list[str]]:
        """The cells; ``exact`` for all digits."""
        width, rows = len(self.header) - len(self.plan.space) - 1, []
        digits = _digits([value for _, curve in self.done for value in curve.values])
        for trial in self.trials:
            cells, curve = [as_text(trial.setting[name]) for name in self.plan.space], trial.curve
            if curve is None:
                rows.append([*cells, *[""] * width, trial.state.lower()])
                continue
            numbers = [*curve.values, curve.measure("attacked_mean")]
            shown = [repr(float(n)) if exact else f"{n:.{digits}f}" for n in numbers]
            auc = _auc(curve, self.scale)
            shown.append("" if auc is None else repr(auc) if exact else f"{auc:.{_digits([auc])}f}")
            rows.append([*cells, *shown, "best" if trial is self.best else ""])
        return rows

    def text(self) -> str:
        """As aligned plain text, with the sentence."""
        lines = [self.header, *self.rows()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        shown = ["  ".join(c.rjust(w) for c, w in zip(line[:-1], widths, strict=False)) for line in lines]
        shown = [f"{left}  {line[-1]}".rstrip() for left, line in zip(shown, lines, strict=True)]
        return "\n".join([shown[0], "-" * max(map(len, shown)), *shown[1:], "", self.sentence()])

    def markdown(self) -> str:
        """As search.md."""
        lines = [self.header, ["---"] * len(self.header), *self.rows()]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"# {self.plan.study}\n\n{self.sentence()}\n\n{table}\n"

    def csv(self) -> str:
        """As search.csv."""
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows([[*self.header[:-1], "state"], *self.rows(exact=True)])
        return text.getvalue()

    def sentence(self) -> str:
        """The best setting in words, with what a reader should know of it."""
        best = self.best
        if best is None or best.curve is None:
            return " ".join(["No trial has a result yet.", *self._not_counted()])
        value, facts = self._shown(best.curve), best.curve.facts
        setting = ", ".join(f"{name} {as_text(v)}" for name, v in best.setting.items())
        direction = "highest" if best.curve.sign > 0 else "lowest"
        divided = f", divided by {self.scale:g}" if self.scale != 1 and self.plan.objective == "auc_robust" else ""
        said = [
            f"Best: {setting}, with the {direction} {self._objective} of {len(self.done)} settings, {value} "
            f"({facts['metric']} under {facts['attack']}{divided})."
        ]
        level = [trial.name for trial, curve in self.done if trial is not best and self._shown(curve) == value]
        if level:
            said.append(f"Level with it to four digits: {', '.join(level)}.")
        return " ".join([*said, *self._edges(best), *self._not_counted()])

    @property
    def _objective(self) -> str:
        """What trials are compared by, in words."""
        if not isinstance(self.plan.objective, str):
            return f"value at level {self.plan.objective:g}"
        words = {"auc_robust": "AUC_robust", "attacked_mean": "mean under attack", "clean": "value on clean images"}
        return words[self.plan.objective]

    def _shown(self, curve: Curve) -> str:
        return f"{curve.measure(self.plan.objective, self.scale):.4f}"

    def _edges(self, best: Trial) -> Iterator[str]:
        """A best value at the end of what was tried says that there may be better ones beyond."""
        for name in self.plan.space:
            tried = sorted({trial.setting[name] for trial, _ in self.done}, key=_order)
            if len(tried) < 3 or not all(is_number(value) for value in tried):
                continue
            if best.setting[name] == tried[0]:
                yield f"It is the smallest {name} tried: try smaller ones."
            if best.setting[name] == tried[-1]:
                yield f"It is the largest {name} tried: try larger ones."

    def _not_counted(self) -> Iterator[str]:
        """How many trials have no result."""
        words = {"FAILED": "failed", "RUNNING": "running", "WAITING": "waiting", "ABANDONED": "to be taken up again"}
        count = {word: sum(trial.state == state for trial in self.trials) for state, word in words.items()}
        if any(count.values()):
            yield f"Not counted: {', '.join(f'{n} {word}' for word, n in count.items() if n)}."

    def picture(self) -> bytes | None:
        """search.png: AUC_robust over the parameter; None where that cannot be drawn."""
        from advmed.report.figures import own_style

        (name, values), *others = self.plan.space.items()
        found = [(trial.setting[name], _auc(curve, self.scale)) for trial, curve in self.done]
        points = [(float(x), y) for x, y in found if is_number(x) and y is not None]
        if others or len(points) < max(2, len(found)):
            return None
        with own_style():
            return self._draw(name, points, isinstance(values, Range) and values.log)

    def _draw(self, name: str, points: Sequence[tuple[float, float]], log: bool) -> bytes:
        from matplotlib.figure import Figure

        facts = self.done[0][1].facts
        figure = Figure(figsize=(5, 3.2), layout="constrained")
        axes = figure.add_subplot()
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", color="#0072b2")
        marked = [point for point, (trial, _) in zip(points, self.done, strict=True) if trial is self.best]
        axes.plot(*marked[0], "o", ms=11, mfc="none", color="#d55e00", label="best")
        axes.legend(frameon=False)
        if log:
            axes.set_xscale("log")
        axes.set(xlabel=name, ylabel="AUC_robust", title=f"{facts['metric']} under {facts['attack']}")
        axes.grid(alpha=0.3)
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=130)
        return image.getvalue()

    def write(self) -> list[Path]:
        """Writes search.md, search.csv and, where it can be drawn, search.png into the folder of the search."""
        contents = {"md": self.markdown().encode(), "csv": self.csv().encode(), "png": self.picture()}
        found = {self.plan.folder / f"search.{ending}": content for ending, content in contents.items() if content}
        for path, content in found.items():
            write_whole(path, content)
        return list(found)


def _order(value: Value) -> tuple[bool, float, str]:
    """Numbers by their size, then texts."""
    return (False, float(value), "") if is_number(value) else (True, 0.0, as_text(value))


def _auc(curve: Curve, scale: float) -> float | None:
    """AUC_robust; None where it is not defined, which may be while another objective is."""
    try:
        return curve.measure("auc_robust", scale)
    except ValueError:
        return None


def _digits(values: Sequence[float]) -> int:
    """Digits behind the point, as many as the paper gives."""
    largest = max((abs(value) for value in values), default=0.0)
    return 4 if largest <= 1 else 3 if largest < 10 else 2

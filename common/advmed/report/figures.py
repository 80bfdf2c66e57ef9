"""The pictures of a report, all PNG: curves, margin histograms and example images."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from advmed.evaluation.subjects import Entry
from advmed.report.failures import Failures
from advmed.report.summary import Array, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Theme:
    """Colours of a figure. The line colours are told apart by readers with any kind of colour vision."""

    ink: str
    faint: str
    background: str
    lines: tuple[str, ...]


LIGHT = Theme(
    ink="#1c1d21",
    faint="#d9dade",
    background="#ffffff",
    lines=("#0072b2", "#d55e00", "#00805e", "#b8548f", "#a97600", "#5b4bb5", "#5f6368"),
)
DARK = Theme(
    ink="#e9e9ec",
    faint="#3c3e45",
    background="#1b1c20",
    lines=("#5ab4f0", "#ff8f57", "#2fc79a", "#e59bc6", "#edc04f", "#b3a4ff", "#a9adb3"),
)
CLASS_COLOURS = np.array(
    [(230, 159, 0), (86, 180, 233), (0, 190, 130), (240, 120, 180), (240, 228, 66), (213, 94, 0), (120, 110, 220)]
)
TRUE_POINT, FOUND_POINT = (0, 190, 130), (240, 228, 66)
_MARKERS = "os^Dvp*"


@dataclass(frozen=True)
class View:
    """What one model makes of one image.

    Attributes:
        model: name of the model.
        attack: name of the attack; empty for the clean image.
        level: noise level; 0 for the clean image.
        image: the input as attacked, the shape of the example's image.
        prediction: label map (H, W) of integers, 0 for background; None where the prediction is no map.
        note: short text under the picture, such as "Dice 0.61" or a predicted class.
        boxes: detections (n, 5): label > 0, and x1, y1, x2, y2 in pixels of the image; None where there are none.
        heat: what the prediction rests on, (H, W) in [0, 1], such as Grad-CAM; None for none.
        points: found landmarks (n, 2), x and y in pixels, (0, 0) the centre of the top left one; None for none.
    """

    model: str
    attack: str
    level: float
    image: Array
    prediction: Array | None = None
    note: str = ""
    boxes: Array | None = None
    heat: Array | None = None
    points: Array | None = None


@dataclass(frozen=True)
class Example:
    """A sample to be shown.

    Attributes:
        sample: its id.
        image: the clean input, (H, W) grey or (H, W, 3) RGB, in any range.
        truth: label map (H, W) of integers, 0 for background; None for none.
        views: what the models make of it, grouped by model, clean first.
        boxes: true objects, as the boxes of a view.
        points: true landmarks, as the points of a view, in the same order; NaN for one that is not known.
    """

    sample: str
    image: Array
    truth: Array | None
    views: Sequence[View]
    boxes: Array | None = None
    points: Array | None = None


@contextmanager
def own_style() -> Iterator[None]:
    """Matplotlib as it is delivered, whatever style sheet or matplotlibrc the process has; theirs is back afterwards.

    Settings are read when an artist is made and again when it is drawn: all of both belongs inside. The backend is no
    part of it: a Figure without pyplot is drawn by Agg, and a window that the process has open stays as it is.
    """
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        yield


@own_style()
def curves(tables: Sequence[Table]) -> bytes:
    """All curves in one picture: a row per metric, a column per attack."""
    from matplotlib.figure import Figure

    columns = len(aimed(tables[0]))
    figure = Figure(figsize=(5.2 * columns, 3.7 * len(tables)), layout="constrained", facecolor=LIGHT.background)
    grid = figure.subplots(len(tables), columns, squeeze=False)
    for row, table in zip(grid, tables, strict=True):
        for axes, attack in zip(row, aimed(table), strict=True):
            _draw_curve(axes, table, attack, LIGHT)
            axes.set_title(verbatim(attack), loc="left", fontsize=11, color=LIGHT.ink)
    return png(figure)


@own_style()
def curve(table: Table, attack: str, theme: Theme) -> bytes:
    """The curves of one metric under one attack."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.5), layout="constrained", facecolor=theme.background)
    _draw_curve(figure.subplots(), table, attack, theme)
    return png(figure)


def aimed(table: Table) -> list[str]:
    """The attacks that are some; where there are only controls, those."""
    return [attack for attack in table.attacks if attack not in table.controls] or list(table.attacks)


def _draw_curve(axes: Axes, table: Table, attack: str, theme: Theme) -> None:
    """A line per model with its 95 % interval, and dotted what unaimed noise of the same norm does."""
    a, control = table.attacks.index(attack), next(iter(table.controls), None)
    low, high = table.intervals[:, :, a]
    for m, model in enumerate(table.models):
        if control is not None and control != attack:
            colour, unaimed = theme.lines[m % len(theme.lines)], table.values[m, table.attacks.index(control)]
            axes.plot(table.levels, unaimed, color=colour, linewidth=1.2, linestyle=(0, (1, 2)))
        draw_line(axes, table.levels, table.values[m, a], low[m], high[m], m, model, theme)
    drawn = np.concatenate([table.values.ravel(), table.intervals.ravel()])
    finite = drawn[np.isfinite(drawn)]
    if finite.size and finite.min() >= 0 and finite.max() > 0:
        axes.set_ylim(0, 1.05 * finite.max())  # the same for all attacks of a metric, and honest about ratios
    finish(axes, table.levels, table.metric.label, table.metric.higher_is_better, theme)


def draw_line(
    axes: Axes, levels: Sequence[float], curve: Array, low: Array, high: Array, m: int, label: str, theme: Theme
) -> None:
    """The line of the m-th model over the noise level, in a band from ``low`` to ``high``."""
    axes.fill_between(levels, low, high, color=theme.lines[m % len(theme.lines)], alpha=0.15, linewidth=0)
    _line(axes, levels, curve, m, label, theme)


def _line(axes: Axes, levels: Sequence[float], curve: Array, m: int, label: str, theme: Theme) -> None:
    colour, marker = theme.lines[m % len(theme.lines)], _MARKERS[m % len(_MARKERS)]
    axes.plot(levels, curve, color=colour, marker=marker, markersize=5, linewidth=2, label=verbatim(label))


def finish(axes: Axes, levels: Sequence[float], label: str, higher_is_better: bool, theme: Theme) -> None:
    """Axes of a metric over the noise level."""
    axes.set_xticks(levels)
    axes.set_xlabel("noise level")
    axes.set_ylabel(f"{verbatim(label)}, {'higher' if higher_is_better else 'lower'} is better")
    _style(axes, theme)


def draw_points(
    axes: Axes,
    points: Array,
    intervals: Array,
    labels: Sequence[str],
    front: Sequence[int],
    label: str,
    higher_is_better: bool,
    theme: Theme,
) -> None:
    """Attacked over clean: a point for each of M models, in the colour of its curve.

    Args:
        axes: to draw into.
        points: clean value, and mean over the noise levels, (M, 2).
        intervals: of these, (M, 2, 2), the second axis lowest and highest; NaN for none.
        labels: names of the models.
        front: which models are joined by a line, in its order.
        label: of the metric.
        higher_is_better: direction.
        theme: colours.
    """
    if front:
        axes.plot(*points[list(front)].T, color=theme.faint, linewidth=1.5, zorder=0)
    for m, (point, (low, high), name) in enumerate(zip(points, intervals, labels, strict=True)):
        colour, marker = theme.lines[m % len(theme.lines)], _MARKERS[m % len(_MARKERS)]
        (clean,), (attacked,) = np.split(point, 2)
        axes.plot([low[0], high[0]], [attacked, attacked], color=colour, linewidth=1.2)
        axes.plot([clean, clean], [low[1], high[1]], color=colour, linewidth=1.2)
        axes.plot(clean, attacked, color=colour, marker=marker, markersize=7, linestyle="none", label=verbatim(name))
    axes.set_xlabel(f"{verbatim(label)} of clean images, {'higher' if higher_is_better else 'lower'} is better")
    axes.set_ylabel("mean over the noise levels")
    _style(axes, theme)
    axes.grid(axis="x", color=theme.faint, linewidth=0.8)


@own_style()
def failure_curves(failures: Failures, theme: Theme) -> bytes:
    """The share of samples that have failed up to each level."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.0), layout="constrained", facecolor=theme.background)
    axes = figure.subplots()
    for m, (model, share) in enumerate(zip(failures.models, failures.share, strict=True)):
        _line(axes, failures.levels, 100 * share, m, model, theme)
    axes.set_ylim(0, 103)
    axes.set_xticks(failures.levels)
    axes.set_xlabel("noise level")
    axes.set_ylabel("samples that fail, %")
    _style(axes, theme)
    return png(figure)


@own_style()
def margin_histogram(entries: Sequence[Entry], levels: Sequence[float], theme: Theme) -> bytes:
    """Histogram of the margins of the models that have some; the evaluated levels are marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.0), layout="constrained", facecolor=theme.background)
    axes = figure.subplots()
    top = max(float(np.max(entry.margins)) for entry in entries if entry.margins is not None)
    bins = np.linspace(0, max(top, levels[-1]) * 1.02, 41).tolist()
    for m, entry in enumerate(entries):
        if entry.margins is not None:
            colour = theme.lines[m % len(theme.lines)]  # the colour of its curve
            axes.hist(entry.margins, bins=bins, color=colour, alpha=0.3)
            name = verbatim(entry.name)
            axes.hist(entry.margins, bins=bins, color=colour, histtype="step", linewidth=1.6, label=name)
    for level in levels[1:]:
        axes.axvline(level, color=theme.ink, linewidth=1, linestyle=(0, (2, 3)))
    axes.set_xlabel("margin at the end of training (dotted: evaluated noise levels)")
    axes.set_ylabel("training samples")
    _style(axes, theme)
    return png(figure)


def _style(axes: Axes, theme: Theme) -> None:
    axes.set_facecolor(theme.background)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(theme.ink)
    axes.tick_params(colors=theme.ink)
    axes.xaxis.label.set_color(theme.ink)
    axes.yaxis.label.set_color(theme.ink)
    axes.grid(axis="y", color=theme.faint, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(facecolor=theme.background, edgecolor="none", framealpha=0.85, labelcolor=theme.ink)


def png(figure: Figure) -> bytes:
    """The figure as a file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=180, facecolor=figure.get_facecolor())
    return buffer.getvalue()


class ExamplePictures:
    """Draws one example; grey values, colours and the amplification of noise are the same in all its pictures.

    Raises:
        ValueError: for arrays whose shapes do not fit together or that hold NaN.
    """

    def __init__(self, example: Example, labels: Sequence[int]) -> None:
        """``labels`` are the foreground labels of all examples; their order gives the colours."""
        self.example, self.labels = example, list(labels)
        height, width = example.image.shape[:2]
        if example.image.ndim not in (2, 3) or example.image.shape[2:] not in ((), (3,)):
            raise ValueError(f"the image of {example.sample} must be (H, W) or (H, W, 3), got {example.image.shape}")
        images = [example.image, *(view.image for view in example.views)]
        maps = [example.truth, *(m for view in example.views for m in (view.prediction, view.heat))]
        shapes = {image.shape for image in images} | {
            (*m.shape, *example.image.shape[2:]) for m in maps if m is not None
        }
        if len(shapes) > 1 or not all(np.isfinite(image).all() for image in images):
            raise ValueError(f"the pictures of {example.sample} must be finite and of one shape, got {shapes}")
        self.stride = math.ceil(max(height, width) / 768)  # keeps pages of large images small
        self.zoom = max(1, round(384 * self.stride / max(height, width)))  # contours are thinner than pixels
        low, high = np.percentile(example.image, (0.5, 99.5))
        self.low, self.window = float(low), float(high - low) or 1.0
        noise = [np.abs(view.image - example.image) for view in example.views if view.level > 0]
        peak = max((float(np.percentile(n, 99.5)) for n in noise), default=0.0) / self.window
        self.amplification = _round_down(0.5 / peak) if peak > 0 else 1.0

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of every picture, in pixels."""
        height, width = (math.ceil(n / self.stride) * self.zoom for n in self.example.image.shape[:2])
        return width, height

    def clean(self) -> bytes:
        """The image alone."""
        return self._picture(self.example.image)

    def truth(self) -> bytes:
        """The image under its true labels."""
        example = self.example
        return self._picture(example.image, example.truth, boxes=example.boxes, true_points=example.points)

    def prediction(self, view: View) -> bytes:
        """The image as attacked, under its predicted labels, with the outline of the true ones in white."""
        example = self.example
        true_points = None if view.points is None else example.points
        return self._picture(view.image, view.prediction, example.truth, view.boxes, true_points, view.points)

    def heat(self, view: View) -> bytes:
        """The image as attacked, under what the prediction rests on: from none (dark blue) to much (yellow)."""
        from matplotlib import colormaps

        assert view.heat is not None
        pixels = np.clip((self._resize(view.image) - self.low) / self.window, 0, 1)
        grey = pixels if pixels.ndim == 2 else pixels.mean(2)
        colours = colormaps["plasma"](self._resize(np.clip(view.heat, 0, 1)))[..., :3]
        return _encode(((0.45 * grey[..., None] + 0.55 * colours) * 255).round().astype(np.uint8))

    def noise(self, view: View) -> bytes:
        """The perturbation, amplified; middle grey is none."""
        delta = self.amplification * (view.image - self.example.image) / self.window
        return self._picture(self.low + self.window * (0.5 + delta))

    def _picture(
        self,
        image: Array,
        labels: Array | None = None,
        outline: Array | None = None,
        boxes: Array | None = None,
        true_points: Array | None = None,
        points: Array | None = None,
    ) -> bytes:
        pixels = np.clip((self._resize(image) - self.low) / self.window, 0, 1) * 255
        pixels = np.repeat(pixels[..., None], 3, axis=2) if pixels.ndim == 2 else pixels
        if labels is not None:
            labels = self._resize(labels)
            for k, label in enumerate(self.labels):
                colour, area = CLASS_COLOURS[k % len(CLASS_COLOURS)], labels == label
                pixels[area] = 0.65 * pixels[area] + 0.35 * colour
                pixels[area & _edge(labels, 2)] = colour
        if outline is not None:
            outline = self._resize(outline)
            for thickness, colour in ((3, (0, 0, 0)), (2, (255, 255, 255))):
                pixels[_edge(outline, thickness) & (outline > 0)] = colour
        if boxes is not None:
            self._draw(pixels, boxes)
        if true_points is not None and points is not None:
            for ends in zip(true_points, points, strict=True):
                self._line(pixels, *ends, 1.0, FOUND_POINT)
        for found, colour in ((true_points, TRUE_POINT), (points, FOUND_POINT)):
            for point in () if found is None else found:
                self._line(pixels, point, point, 4.0, (0, 0, 0))
                self._line(pixels, point, point, 3.0, colour)
        return _encode(pixels.round().astype(np.uint8))

    def _line(self, pixels: Array, start: Array, end: Array, radius: float, colour: tuple[int, int, int]) -> None:
        """Everything within ``radius`` pixels of the picture of a line; a dot where it has no length."""
        if not (np.isfinite(start).all() and np.isfinite(end).all()):
            return
        factor = self.zoom / self.stride
        (x1, y1), (x2, y2) = ((np.asarray(point, dtype=np.float64) + 0.5) * factor - 0.5 for point in (start, end))
        rows, columns = np.ogrid[: pixels.shape[0], : pixels.shape[1]]
        across, down = x2 - x1, y2 - y1
        length = across**2 + down**2
        along = np.clip(((columns - x1) * across + (rows - y1) * down) / length, 0, 1) if length > 0 else 0.0
        pixels[(columns - x1 - along * across) ** 2 + (rows - y1 - along * down) ** 2 <= radius**2] = colour

    def _draw(self, pixels: Array, boxes: Array) -> None:
        """Frames, two pixels wide, in the colours of their labels."""
        height, width = pixels.shape[:2]
        for label, *corners in boxes:
            colour = CLASS_COLOURS[self.labels.index(int(label)) % len(CLASS_COLOURS)]
            scaled = np.round(np.array(corners) * self.zoom / self.stride).astype(int)
            x1, y1, x2, y2 = np.clip(scaled, 0, (width, height, width, height))
            for rows, columns in (
                (slice(y1, y1 + 2), slice(x1, x2)),
                (slice(max(y2 - 2, 0), y2), slice(x1, x2)),
                (slice(y1, y2), slice(x1, x1 + 2)),
                (slice(y1, y2), slice(max(x2 - 2, 0), x2)),
            ):
                pixels[rows, columns] = colour

    def _resize(self, image: Array) -> Array:
        """Nearest neighbour: a reader must see the pixels that the model saw."""
        thinned = image[:: self.stride, :: self.stride]
        return thinned.repeat(self.zoom, axis=0).repeat(self.zoom, axis=1)


def foreground_labels(examples: Sequence[Example], names: Mapping[int, str]) -> list[int]:
    """All foreground labels that have a name or occur in an example, ascending."""
    maps = [m for e in examples for m in (e.truth, *(view.prediction for view in e.views)) if m is not None]
    boxes = [b for e in examples for b in (e.boxes, *(view.boxes for view in e.views)) if b is not None]
    painted = {int(label) for m in maps for label in np.unique(m) if label > 0}
    return sorted(painted | {int(row[0]) for rows in boxes for row in rows} | set(names))


def _edge(labels: Array, thickness: int) -> Array:
    """Pixels with another label within ``thickness`` pixels above, below, left or right; bool, (H, W)."""
    edge = np.zeros(labels.shape, dtype=bool)
    for step in range(1, thickness + 1):
        vertical = labels[step:] != labels[:-step]
        horizontal = labels[:, step:] != labels[:, :-step]
        edge[step:] |= vertical
        edge[:-step] |= vertical
        edge[:, step:] |= horizontal
        edge[:, :-step] |= horizontal
    return edge


def _round_down(factor: float) -> float:
    """The largest of 1, 2, 5, 10, 20, 50, ... that is not above ``factor``, at least 1."""
    factor = max(1.0, factor * (1 + 1e-6))  # 50 must not become 20 for an error of rounding
    power = 10.0 ** math.floor(math.log10(factor))
    return max(step * power for step in (1, 2, 5) if step * power <= factor)


@own_style()
def _encode(pixels: Array) -> bytes:
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    imsave(buffer, pixels, format="png")
    return buffer.getvalue()


def verbatim(text: str) -> str:
    """A name as Matplotlib shows it as it is: a dollar sign would begin a formula, an underscore hides from legends."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text

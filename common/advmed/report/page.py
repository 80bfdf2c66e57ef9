"""The page of a report: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from advmed.evaluation.subjects import Entry
from advmed.report import figures
from advmed.report.failures import Failures
from advmed.report.figures import Example, ExamplePictures
from advmed.report.summary import Table, doubts


def render_page(
    record: Mapping[str, Any],
    entries: Sequence[Entry],
    tables: Sequence[Table],
    failures: Failures | None,
    examples: Sequence[Example],
    class_names: Mapping[int, str],
    *,
    grouped: bool,
) -> str:
    """report.html; the template escapes every text."""
    from jinja2 import Environment, StrictUndefined

    themes = (figures.LIGHT, figures.DARK)
    labels = figures.foreground_labels(examples, class_names)
    colours = [figures.CLASS_COLOURS[k % len(figures.CLASS_COLOURS)] for k in range(len(labels))]
    legend = [
        (class_names.get(label, f"class {label}"), "#{:02x}{:02x}{:02x}".format(*colour))
        for label, colour in zip(labels, colours, strict=True)
    ]
    if any(example.truth is not None for example in examples):
        legend.append(("white line: outline of the truth", "#ffffff"))
    if any(example.points is not None for example in examples):
        shown = ("#{:02x}{:02x}{:02x}".format(*colour) for colour in (figures.TRUE_POINT, figures.FOUND_POINT))
        legend += zip(("true landmark", "found landmark, with a line to the true one"), shown, strict=True)
    levels = tables[0].levels
    source = files("advmed.report").joinpath("template.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source).render(
        record=record,
        tables=tables,
        evaluation=entries[0].evaluation,
        curves=[
            [(attack, [_uri(figures.curve(table, attack, t)) for t in themes]) for attack in _shown(table)]
            for table in tables
        ],
        doubted=doubts(entries),
        failures=failures,
        infinity=float("inf"),
        checked=any(entry.checks for entry in entries),
        grouped=grouped,
        failure_curves=[] if failures is None else [_uri(figures.failure_curves(failures, t)) for t in themes],
        histogram=[_uri(figures.margin_histogram(entries, levels, t)) for t in themes] if record["margins"] else [],
        examples=[_example(example, labels) for example in examples],
        legend=legend,
    )


def _shown(table: Table) -> list[str]:
    """The attacks that have a picture, that which hurts most first."""
    aimed = figures.aimed(table)
    return [table.attacks[a] for a in table.order if table.attacks[a] in aimed]


def _example(example: Example, labels: Sequence[int]) -> dict[str, Any]:
    """An example as the page shows it: a strip of figures for the sample, and one for each model.

    A figure is (caption, note, pictures), a picture (data URI, alternative text).
    """
    draw = ExamplePictures(example, labels)
    sample = [("Input", "", [(_uri(draw.clean()), f"{example.sample}: the clean input")])]
    if any(truth is not None for truth in (example.truth, example.boxes, example.points)):
        sample.append(("Truth", "", [(_uri(draw.truth()), f"{example.sample}: the true labels over the clean input")]))
    strips = {"": sample}
    for view in example.views:
        caption = f"{view.attack}, level {view.level:g}" if view.level > 0 else "Clean"
        about = f"{example.sample}, {view.model}, {caption}"
        pictures = [(_uri(draw.prediction(view)), f"{about}: {view.note or 'prediction'}")]
        if view.level > 0:
            pictures.append((_uri(draw.noise(view)), f"{about}: the noise, amplified {draw.amplification:g} times"))
        if view.heat is not None:
            pictures.append((_uri(draw.heat(view)), f"{about}: what the prediction rests on"))
        strips.setdefault(view.model, []).append((caption, view.note, pictures))
    return {
        "sample": example.sample,
        "size": draw.size,
        "amplification": draw.amplification,
        "strips": strips,
    }


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()

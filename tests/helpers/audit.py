"""Whether report.json, samples.csv and the page of an evaluation agree, by computations of their own."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from advmed.evaluation.checks import QUESTIONS
from advmed.evaluation.intervals import interval, resamples, share_interval
from helpers.evaluations import record_of
from helpers.hosts import table


def audit(
    folder: Path,
    metric: str,
    *,
    fails_at: float,
    checked: int,
    shown: int,
    label: Callable[[str], str] = str,
    groups: Callable[[str], str] | None = None,
) -> dict[str, Any]:
    """Reads report.json of an evaluation, after comparing what it says with samples.csv and the page.

    Args:
        folder: of the report.
        metric: its value of a sample decides whether that has failed.
        fails_at: the value beyond which it has.
        checked: how many samples the attack was checked on; 0: it was not.
        shown: how many samples are shown.
        label: what the page shows of an id.
        groups: to which group an id belongs, ``str`` for none; the metric then is the mean of the samples' values.
    """
    record = record_of(folder)
    evaluation = record["configuration"]["evaluation"]
    levels, (*attacks, control) = evaluation["levels"], evaluation["attacks"]
    models, ids = list(record["configuration"]["models"]), record["configuration"]["samples"]
    better = 1 if record["configuration"]["metrics"][metric]["higher_is_better"] else -1
    rows = {(r["model"], r["id"], r["attack"], float(r["level"])): r[metric] for r in table(folder / "samples.csv")}
    page = html.unescape((folder / "report.html").read_text())

    def of(model: str, id_: str, attack: str, level: float) -> float:
        return float(rows[model, id_, attack if level else "clean", level] or "nan")

    # The control: noise of the same norm, with an access of its own, that counts for no failure.
    assert control == "gaussian"
    for effort in record["attacks"].values():
        accesses = {name: told["access"] for name, told in effort.items()}
        assert list(accesses.items()) == [*((name, "white box") for name in attacks), ("gaussian", "none")]
        assert effort["gaussian"]["gradients_per_image"] == 0
        for norm, level in zip(effort["gaussian"]["mean_norm"], levels[1:], strict=True):
            assert 0.3 * level < norm <= level * (1 + 1e-5)

    # Failures, from the rows of the samples.
    found = record["failures"]
    assert found["criterion"].startswith(f"{metric} {'below' if better > 0 else 'above'} ")
    assert found["levels"] == levels
    smallest: dict[str, dict[str, float]] = {model: {} for model in models}
    for model, own in smallest.items():
        for id_ in ids:
            values = [(level, of(model, id_, attack, level)) for level in levels for attack in attacks]
            failing = [level for level, value in values if better * (value - fails_at) < 0]
            own[id_] = math.nan if math.isnan(of(model, id_, "", 0)) else min(failing, default=math.inf)
        assert found["smallest_level"][model] == {i: v if math.isfinite(v) else None for i, v in own.items()}
        known = sorted(v for v in own.values() if not math.isnan(v))
        assert found["share"][model] == pytest.approx([sum(v <= k for v in known) / len(known) for k in levels])
        middle = known[(len(known) - 1) // 2]
        assert found["median"][model] == (middle if math.isfinite(middle) else None)

    # Pictures of those that fail first, of all that are right when clean, and of those that fail last.
    mean = {id_: np.mean([min(own[id_], 2 * levels[-1]) for own in smallest.values()]) for id_ in ids}
    mean = {id_: value for id_, value in mean.items() if not any(math.isnan(own[id_]) for own in smallest.values())}
    order = sorted([id_ for id_ in mean if mean[id_] > 0] or mean, key=lambda id_: mean[id_])
    first = order[: (shown + 1) // 2]
    wanted = [*first, *[id_ for id_ in order[::-1] if id_ not in first][: shown // 2]]
    assert re.findall(r'alt="([^"]*): the clean input"', page) == [label(id_) for id_ in wanted]

    # Intervals around every number.
    for name, results in record["results"].items():
        for model, numbers in results["models"].items():
            assert (name, numbers["clean_interval"]) == (name, numbers["attacks"]["gaussian"]["intervals"][0])
            for curve in numbers["attacks"].values():
                pairs = [*zip(curve["values"], curve["intervals"], strict=True)]
                pairs += [(curve[key], curve[f"{key}_interval"]) for key in ("attacked_mean", "auc_robust")]
                for number, (low, high) in pairs:
                    assert number is None or low is None or low <= high, (name, model)
    if groups is not None:
        drawn = resamples(ids, None if groups is str else [groups(id_) for id_ in ids], count=1000)
        units = len({groups(id_) for id_ in ids})
        assert record["results"][metric]["units"] <= units, "some have no value"
        units = record["results"][metric]["units"]
        for model in models:
            for attack, curve in record["results"][metric]["models"][model]["attacks"].items():
                for level, number, pair in zip(levels, curve["values"], curve["intervals"], strict=True):
                    value = np.array([of(model, id_, attack, level) for id_ in ids])
                    assert number == pytest.approx(np.nanmean(value), rel=1e-6)
                    means = [np.nanmean(part) for part in (value[draw] for draw in drawn) if not np.isnan(part).all()]
                    wanted = interval(np.array(means), units=units)
                    if record["results"][metric]["is_share"]:
                        wanted = share_interval(np.array(number), units=units)
                    told = [math.nan if bound is None else bound for bound in pair]
                    assert told == pytest.approx(wanted.tolist(), rel=1e-6, nan_ok=True)

    # Checks of the first attack, on so many of the samples, and what the verdict makes of them.
    assert record["verdict"]["text"] in page
    if not checked:
        assert record["verdict"]["trusted"] is None
        assert record["verdict"]["text"] == "Whether the attacks are strong enough was not checked."
        assert record["checks"] == {model: [] for model in models}
        assert not list(folder.glob("*/checks_*"))
        return record
    failed = {}
    for model, checks in record["checks"].items():
        assert [check["name"] for check in checks] == list(QUESTIONS)
        assert {check["verdict"] for check in checks} <= {"passed", "failed"}
        assert all(check["question"] and check["finding"] and check["figures"] for check in checks)
        failed[model] = [check["name"] for check in checks if check["verdict"] == "failed"]
        assert (f"{model} ({', '.join(failed[model])})" in record["verdict"]["text"]) == bool(failed[model])
        (probed,) = (folder / model).glob(f"checks_{checked}_*")
        assert float(probed.name.rsplit("_", 1)[1]) in [float(f"{level:g}") for level in levels[1:]]
        parts = [np.load(path, allow_pickle=False) for path in sorted((probed / "parts").glob("*.npz"))]
        some = [id_ for part in parts for id_ in json.loads(str(part["configuration"]))["ids"]]
        assert len(some) == checked
        assert set(some) <= set(ids)
    assert list(failed) == models
    assert record["verdict"]["trusted"] is not any(failed.values())
    return record

"""What all tests share."""

from __future__ import annotations

import csv
import html
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from advmed.evaluation.intervals import resamples
from helpers import models
from helpers.evaluations import leave_out_curves

pytest.register_assert_rewrite("advmed.testing.lightning")  # before anything imports it


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where several processes share the work, the long files come first, so that all processes end about together."""
    if hasattr(config, "workerinput"):
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tests run side by side with nnU-Net's processes on few cores; threads of tiny networks only wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the drawing of curves, which takes most of the time of a report."""
    leave_out_curves(monkeypatch)


CHECKS = ["radius", "steps", "restarts", "black box", "unlimited", "noise"]


@pytest.fixture(scope="session")
def audit() -> Callable[..., dict[str, Any]]:
    """Reads report.json of an evaluation with checks, after comparing what it says with samples.csv and the page.

    ``audit(folder, metric, fails_at=, checked=, shown=, label=, groups=)``: the metric whose value of a sample decides
    whether it has failed; how many samples were checked (0: none), and how many are shown, as what a page shows an id;
    to which group an id belongs. With groups (or ``str`` for none), the metric is the mean of the samples' values.
    """

    def read(
        folder: Path,
        metric: str,
        *,
        fails_at: float,
        checked: int,
        shown: int,
        label: Callable[[str], str] = str,
        groups: Callable[[str], str] | None = None,
    ) -> dict[str, Any]:
        record = json.loads((folder / "report.json").read_text())
        with (folder / "samples.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        evaluation = record["configuration"]["evaluation"]
        levels, attacks = evaluation["levels"], list(evaluation["attacks"])
        models, ids = list(record["configuration"]["models"]), record["configuration"]["samples"]
        decides = record["configuration"]["metrics"][metric]
        value = {(r["model"], r["id"], r["attack"], f"{float(r['level']):g}"): float(r[metric] or "nan") for r in rows}

        def of(model: str, id_: str, attack: str, level: float) -> float:
            return value[(model, id_, attack, f"{level:g}") if level else (model, id_, "clean", "0")]

        # The control: noise of the same norm, with an access of its own, that counts for no failure.
        assert attacks[-1] == "gaussian"
        for effort in record["attacks"].values():
            assert list(effort) == attacks
            assert [effort[name]["access"] for name in attacks] == ["white box"] * (len(attacks) - 1) + ["none"]
            assert effort["gaussian"]["gradients_per_image"] == 0
            for norm, level in zip(effort["gaussian"]["mean_norm"], levels[1:], strict=True):
                assert 0.3 * level < norm <= level * (1 + 1e-5)

        # Failures, from the rows of the samples.
        found = record["failures"]
        assert found["criterion"].startswith(f"{metric} {'below' if decides['higher_is_better'] else 'above'} ")
        assert found["levels"] == levels
        smallest: dict[str, dict[str, float]] = {}
        for model in models:
            smallest[model] = {}
            for id_ in ids:
                worse = [
                    level
                    for level in levels
                    for attack in attacks[:-1]
                    if (of(model, id_, attack, level) - fails_at) * (-1 if decides["higher_is_better"] else 1) > 0
                ]
                clean = of(model, id_, "", 0)
                smallest[model][id_] = math.nan if math.isnan(clean) else min(worse, default=math.inf)
            own = smallest[model]
            assert found["smallest_level"][model] == {i: v if math.isfinite(v) else None for i, v in own.items()}
            known = [v for v in own.values() if not math.isnan(v)]
            assert found["share"][model] == pytest.approx([sum(v <= k for v in known) / len(known) for k in levels])
            middle = sorted(known)[(len(known) - 1) // 2]
            assert found["median"][model] == (middle if math.isfinite(middle) else None)

        # Pictures of those that fail first, of all that are right when clean, and of those that fail last.
        mean = {
            id_: sum(min(smallest[model][id_], 2 * levels[-1]) for model in models) / len(models)
            for id_ in ids
            if not any(math.isnan(smallest[model][id_]) for model in models)
        }
        right = [id_ for id_ in mean if mean[id_] > 0] or list(mean)
        order = sorted(right, key=lambda id_: mean[id_])
        first = order[: (shown + 1) // 2]
        wanted = [*first, *[id_ for id_ in order[::-1] if id_ not in first][: shown // 2]]
        page = html.unescape((folder / "report.html").read_text())
        assert re.findall(r'alt="([^"]*): the clean input"', page) == [label(id_) for id_ in wanted]

        # Intervals around every number.
        for name, table in record["results"].items():
            for model, numbers in table["models"].items():
                assert (name, numbers["clean_interval"]) == (name, numbers["attacks"]["gaussian"]["intervals"][0])
                for curve in numbers["attacks"].values():
                    pairs = [*zip(curve["values"], curve["intervals"], strict=True)]
                    pairs += [(curve[key], curve[f"{key}_interval"]) for key in ("attacked_mean", "auc_robust")]
                    for number, (low, high) in pairs:
                        assert number is None or low is None or low <= high, (name, model)
        if groups is not None:
            drawn = resamples(ids, None if groups is str else [groups(id_) for id_ in ids], count=1000)
            for model in models:
                for attack, curve in record["results"][metric]["models"][model]["attacks"].items():
                    for level, number, pair in zip(levels, curve["values"], curve["intervals"], strict=True):
                        own = np.array([of(model, id_, attack, level) for id_ in ids])
                        assert number == pytest.approx(np.nanmean(own), rel=1e-6)
                        known = [part for part in (own[draw] for draw in drawn) if not np.isnan(part).all()]
                        wanted_pair = np.quantile([np.nanmean(part) for part in known], [0.025, 0.975])
                        assert pair == pytest.approx(wanted_pair.tolist(), rel=1e-6)

        # Checks of the first attack, on so many of the samples, and what the verdict makes of them.
        assert record["verdict"]["text"] in page
        if not checked:
            assert record["verdict"]["trusted"] is None
            assert record["verdict"]["text"] == "Whether the attacks are strong enough was not checked."
            assert record["checks"] == {model: [] for model in models}
            assert not list(folder.glob("*/checks_*"))
            return record
        failed = {}
        for model in models:
            checks = record["checks"][model]
            assert [check["name"] for check in checks] == CHECKS
            assert {check["verdict"] for check in checks} <= {"passed", "failed"}
            assert all(check["question"] and check["finding"] and check["figures"] for check in checks)
            failed[model] = [check["name"] for check in checks if check["verdict"] == "failed"]
            (probed,) = (folder / model).glob(f"checks_{checked}_*")
            assert float(probed.name.rsplit("_", 1)[1]) in [float(f"{level:g}") for level in levels[1:]]
            parts = [np.load(path, allow_pickle=False) for path in sorted((probed / "parts").glob("*.npz"))]
            some = [id_ for part in parts for id_ in json.loads(str(part["configuration"]))["ids"]]
            assert len(some) == checked
            assert set(some) <= set(ids)
        assert record["verdict"]["trusted"] is not any(failed.values())
        for model, names in failed.items():
            assert (f"{model} ({', '.join(names)})" in record["verdict"]["text"]) == bool(names)
        return record

    return read


@pytest.fixture
def tiny() -> SimpleNamespace:
    """Tiny models and objectives."""
    return SimpleNamespace(
        Affine=models.Affine,
        Logistic=models.Logistic,
        Classifier=models.Classifier,
        Compared=models.Compared,
        cnn=models.cnn,
    )


@pytest.fixture(scope="session")
def chest() -> SimpleNamespace:
    """Chest X-rays, and small networks of them that are trained once."""
    return SimpleNamespace(xrays=models.xrays, trained=models.trained, Objective=models.Classifier)

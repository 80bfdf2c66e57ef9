"""What the ensemble of attacks must do on every host."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from advmed.attacks import Standard
from advmed.evaluation.loop import EvaluationBatch, evaluate
from advmed.evaluation.metric import Metric
from advmed.evaluation.worst import badness

STEPS, QUERIES = 3, 2


def check_ensemble(
    task: str,
    batches: Sequence[EvaluationBatch],
    metrics: Sequence[Metric],
    levels: tuple[float, float, float],
    bounds: tuple[float, float] | None,
) -> Any:
    """No member is worse for the model than the ensemble, at any level, by any metric that noise can only harm."""
    attack = Standard(task, steps=STEPS, queries_of_square=QUERIES)
    criterion = next(metric for metric in metrics if metric.fails_at is not None)
    found = evaluate(batches, {"standard": attack}, levels, bounds=bounds, criterion=criterion)
    members = found.members_of("standard")
    assert [name.removeprefix("standard/") for name in members] == list(attack.members)
    for metric in metrics:
        if not metric.monotone:
            continue
        sign = 1 if metric.higher_is_better else -1
        curve = found.curve("standard", metric)
        assert all(sign * (a - b) >= -1e-12 for a, b in itertools.pairwise(curve)), metric.name
        for level, value in zip(levels[1:], curve[1:], strict=True):
            alone = [metric.of(found.at(name, level).scores) for name in members]
            assert sign * value <= min(sign * one for one in alone if not np.isnan(one)) + 1e-12, metric.name
    for level in levels[1:]:
        own = badness(criterion, found.scores("standard", level))
        assert (own >= np.max([badness(criterion, found.at(name, level).scores) for name in members], 0)).all()
        assert (found.at("standard", level).norm <= level * (1 + 1e-5)).all()
    # An objective can be cut: nothing less would leave lost samples alone.
    loaded = batches[0].load()
    rows = np.arange(len(loaded.images))[::-1].copy()
    objective: Any = loaded.objective
    part = objective.take(loaded.images.new_tensor(rows).long())
    whole = loaded.objective(loaded.images)
    np.testing.assert_allclose(
        part(loaded.images[rows]).detach().numpy(), whole.detach().numpy()[rows], rtol=1e-3, atol=1e-4
    )
    return found

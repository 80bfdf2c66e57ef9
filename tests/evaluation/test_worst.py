"""The worst of several attacks: per sample, greedily, never rising, and the same after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from advmed.attacks import APGD, DDN, PGD, Noise, SquareAttack, Standard, parse_attacks
from advmed.classification import ClassificationObjective
from advmed.evaluation.checks import pictured, strongest
from advmed.evaluation.loop import Evaluation, EvaluationBatch, LoadedBatch, evaluate, passes_of
from advmed.evaluation.metric import Metric
from advmed.evaluation.subjects import WORST, with_control, with_worst
from advmed.evaluation.worst import WorstOf, badness, chosen_scores, curve_of, greedy, worst_of
from helpers.tensors import seeded

ERROR = Metric("error", lambda s: float(np.nanmean(s["v"])), False, per_sample=lambda s: s["v"], fails_at=4)
SPREAD = Metric("spread", lambda s: float(np.std(s["v"])), False, monotone=False)
LARGEST = Metric("largest gap", lambda s: float(np.max(s["v"]) - np.min(s["v"])), False)


def column(*values: float) -> tuple[dict[str, Any], Any]:
    """Scores, and as losses the same."""
    return {"v": np.array(values, dtype=float)}, np.array(values, dtype=float)


def test_each_sample_has_its_own_worst() -> None:
    candidates = [column(1, 5, 2), column(3, 1, 2), column(2, 2, np.nan)]
    chosen = worst_of(ERROR, candidates)
    assert chosen.tolist() == [1, 0, 0]
    assert chosen_scores([scores for scores, _ in candidates], chosen)["v"].tolist() == [3, 5, 2]


def test_of_equals_the_one_of_the_larger_loss_counts() -> None:
    share = Metric("share", lambda s: 0.0, per_sample=lambda s: s["v"])
    scores = {"v": np.array([0.0, 1.0])}
    assert worst_of(share, [(scores, np.array([1.0, 2.0])), (scores, np.array([3.0, 2.0]))]).tolist() == [1, 0]
    assert worst_of(None, [column(1, 9), column(2, 8)]).tolist() == [1, 0]


def test_a_false_alarm_in_an_empty_sample_is_worse_than_none() -> None:
    dice = Metric("Dice", lambda s: 0.0, per_sample=lambda s: s["v"])
    assert badness(dice, {"v": np.array([np.nan, 0.0, 1.0])}).tolist() == [-np.inf, 0.0, -1.0]


def test_a_curve_never_gets_better_with_more_noise() -> None:
    levels = [{"a": column(3, 3), "b": column(1, 4)}, {"a": column(2, 9), "b": column(2, 1)}]
    found = curve_of(ERROR, column(1, 1), levels, None)
    assert [scores["v"].tolist() for scores in found] == [[3, 4], [3, 9]]
    # What is no mean of samples is found greedily; what more noise does not make worse, by the criterion.
    found = curve_of(LARGEST, column(1, 1), levels, ERROR)
    assert [LARGEST.of(scores) for scores in found] == [3, 8]
    found = curve_of(SPREAD, column(1, 1), levels, ERROR)
    assert [scores["v"].tolist() for scores in found] == [[3, 4], [3, 9]]
    found = curve_of(SPREAD, column(1, 1), levels, None)  # by the loss
    assert [scores["v"].tolist() for scores in found] == [[3, 4], [3, 9]]


def test_greedy_is_never_better_than_a_start_and_swaps_in_the_order_of_the_samples() -> None:
    generator = np.random.default_rng(0)
    total = Metric("total", lambda s: float(np.abs(s["v"].sum())), False, resamples=1000)
    for _ in range(20):
        parts = [{"v": generator.normal(size=12)} for _ in range(4)]
        found = greedy(total, parts, parts)
        assert total.of(found) >= max(total.of(part) for part in parts)
        rows = np.stack([part["v"] for part in parts])
        assert all(value in rows[:, k] for k, value in enumerate(found["v"]))
    # By hand: from 3, the swap of the first sample makes 7, that of the second would make 2.
    found = greedy(total, [{"v": np.array([1.0, 2.0])}], [{"v": np.array([5.0, -3.0])}])
    assert found["v"].tolist() == [5.0, 2.0]


def test_of_many_samples_some_are_swapped_together() -> None:
    calls = []

    def of(scores: Any) -> float:
        calls.append(1)
        return float(scores["v"].sum())

    total = Metric("total", of, False, resamples=10)
    ones, zeros = {"v": np.ones(1000)}, {"v": np.zeros(1000)}
    assert greedy(total, [zeros], [ones])["v"].sum() == 1000
    assert len(calls) == 1 + 10


def test_scores_of_any_shape_are_swapped_whole() -> None:
    first = {"boxes": np.zeros((3, 2, 2)), "n": np.array([1, 1, 1])}
    second = {"boxes": np.arange(12.0).reshape(3, 2, 2), "n": np.array([0, 2, 0])}
    found = greedy(Metric("sum", lambda s: float(s["n"].sum()), False), [first], [second])
    assert found["n"].tolist() == [1, 2, 1]
    assert np.array_equal(found["boxes"][1], second["boxes"][1])
    assert (found["boxes"][[0, 2]] == 0).all()
    assert (first["boxes"] == 0).all()


# An ensemble in the loop: a classifier of two pixels, whose accuracy is judged.

ACCURACY = Metric(
    "accuracy",
    lambda s: float(s["right"].mean()),
    per_sample=lambda s: s["right"].astype(float),
    fails_at=0.5,
    lost_at=0.0,
    is_mean=True,
)
ENSEMBLE = Standard("classification", steps=4, queries_of_square=4)
ATTACKS = {"standard": ENSEMBLE, "pgd2": PGD(2, 2.0), "gaussian": Noise("gaussian")}
LEVELS = (0, 0.1, 0.3)


def batches(on_load: Any = lambda: None) -> list[EvaluationBatch]:
    def load(number: int) -> LoadedBatch:
        on_load()
        images = torch.rand(4, 1, 1, 2, generator=seeded(number))
        objective = ClassificationObjective(torch.nn.Flatten(), images.flatten(1).argmax(1))

        def score(noisy: Tensor) -> dict[str, Tensor]:
            return {"right": ~objective.terms_and_errors(noisy)[1], "image": noisy.flatten(1)}

        return LoadedBatch(images, objective, score)

    return [EvaluationBatch([f"{n}/{k}" for k in range(4)], lambda n=n: load(n)) for n in range(3)]


def run(**how: Any) -> Evaluation:
    return evaluate(**{"batches": batches(), "attacks": ATTACKS, "levels": LEVELS, "criterion": ACCURACY} | how)


def test_a_linear_classifier_fails_exactly_where_the_noise_reaches_its_boundary() -> None:
    images = torch.cat([batch.load().images for batch in batches()]).flatten(1)
    distance = (images[:, 0] - images[:, 1]).abs() / 2**0.5
    found = run()
    for level in LEVELS[1:]:
        wanted = (distance > level).numpy()
        assert 0 < wanted.sum() < len(wanted)
        assert np.array_equal(found.scores("standard", level)["right"], wanted)


def test_the_worst_of_all_is_no_better_than_any() -> None:
    attacks = with_control(with_worst(ATTACKS))
    assert list(attacks) == ["standard", "pgd2", "gaussian", WORST]
    found = run(attacks=attacks)
    assert found.members_of(WORST) == (*(f"standard/{m}" for m in ENSEMBLE.members), "pgd2")
    for level in LEVELS[1:]:
        values = {name: ACCURACY.of(found.scores(name, level, ACCURACY)) for name in attacks}
        assert values[WORST] <= min(values.values())
    assert found.curve(WORST, ACCURACY) == tuple(sorted(found.curve(WORST, ACCURACY), reverse=True))
    assert found.curve("pgd2", ACCURACY) == found.curve("pgd2", ACCURACY.of)


def test_every_metric_is_measured_on_its_own_worst() -> None:
    """The mean of the first pixel is brought down by other images than those that cost the accuracy most."""
    bright = Metric("bright", lambda s: float(s["image"][:, 0].mean()), per_sample=lambda s: s["image"][:, 0])
    found = run()
    for level in LEVELS[1:]:
        rows = [found.at(m, level).scores["image"][:, 0] for m in found.members_of("standard")]
        assert bright.of(found.scores("standard", level, bright)) <= np.min(rows, 0).mean() + 1e-9
        assert bright.of(found.scores("standard", level, bright)) < bright.of(found.scores("standard", level)) - 0.01


class Smallest(Standard):
    """The member that looks for the smallest noise, alone."""

    @property
    def members(self) -> Any:
        return {"ddn": DDN(60)}


def test_the_smallest_noise_is_looked_for_by_the_criterion() -> None:
    found = run(attacks={"standard": Smallest("classification")})
    images = found.clean.scores["image"]
    distance = np.abs(images[:, 0] - images[:, 1]) / 2**0.5
    for level in LEVELS[1:]:
        broken = ~found.at("standard/ddn", level).scores["right"]
        assert broken[distance < 0.95 * level].all()
        assert not broken[distance > level].any()
    assert broken.any()


def test_each_sample_keeps_the_scores_of_one_image() -> None:
    """What the ensemble says of a sample is what one member found, all of it."""
    found = run()
    for level in LEVELS[1:]:
        images = found.scores("standard", level)["image"]
        members = [found.at(m, level).scores["image"] for m in found.members_of("standard")]
        members += [found.scores("standard", LEVELS[1])["image"], found.clean.scores["image"]]
        assert all(any(np.array_equal(images[k], part[k]) for part in members) for k in range(len(images)))
        norms = np.linalg.norm(images - found.clean.scores["image"], axis=1)
        assert np.allclose(norms, found.at("standard", level).norm, atol=1e-6)


def test_members_are_passes_of_their_own() -> None:
    names = [f"standard/{member}" for member in ENSEMBLE.members]
    passes = passes_of({**ATTACKS, WORST: WorstOf(("standard", "pgd2"), 2.0)}, LEVELS)
    assert passes[0] == ("clean", 0.0)
    assert passes[1 : 1 + 2 * len(names)] == [(name, level) for level in LEVELS[1:] for name in names]
    assert len(passes) == 1 + 2 * (len(names) + 2)
    shown: list[int] = []
    run(progress=lambda done, total, text: shown.append(total))
    assert set(shown) == {3 * (1 + 2 * (len(names) + 2))}


def test_a_killed_run_goes_on_with_the_same_numbers(tmp_path: Path) -> None:
    whole = run()
    left = 2

    def on_load() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(batches=batches(on_load), folder=tmp_path, fingerprint="model")
    again = run(folder=tmp_path, fingerprint="model")
    for key, condition in {**whole.attacked, **whole.members}.items():
        other = {**again.attacked, **again.members}[key]
        assert np.array_equal(condition.loss, other.loss)
        assert all(np.array_equal(condition.scores[name], other.scores[name]) for name in condition.scores)
    with pytest.raises(ValueError, match="criterion"):
        run(folder=tmp_path, fingerprint="model", criterion=ERROR)


def test_the_recipe_is_part_of_what_the_numbers_are_made_of() -> None:
    told = run().configuration
    assert told["criterion"] == {"name": "accuracy", "fails_at": 0.5}
    own = told["attacks"]["standard"]
    assert own["recipe"] == "advmed-standard/2"
    assert own["members"]["apgd-margin"]["loss"] == {"name": "margin of the logits", "targets": 0}
    assert own["members"]["square"]["steps"] == 4
    assert "criterion" not in run(attacks={"pgd2": PGD(2, 2.0)}).configuration


def test_what_judges_may_cost_less_than_what_scores() -> None:
    asked = {"score": 0, "judged": 0}

    def load() -> LoadedBatch:
        loaded = batches()[0].load()

        def score(images: Tensor) -> Any:
            asked["score"] += 1
            return loaded.score(images)

        def judged(images: Tensor) -> Any:
            asked["judged"] += 1
            return loaded.score(images)

        return LoadedBatch(loaded.images, loaded.objective, score, judged=judged)

    run(batches=[EvaluationBatch(["a", "b", "c", "d"], load)], attacks={"standard": ENSEMBLE})
    assert asked["score"] == 1 + 2 * len(ENSEMBLE.members)
    assert asked["judged"] > 4


def test_the_worst_is_no_attack_that_could_be_run() -> None:
    with pytest.raises(NotImplementedError, match="run those"):
        WorstOf(("a", "b"), 2.0)(None, torch.zeros(1, 1), 1.0)
    one = {"pgd2": PGD(2, 2.0)}
    assert with_worst(one) == one
    assert WORST not in with_worst({**one, "gaussian": Noise("gaussian")})


def test_checks_and_pictures_are_of_a_member() -> None:
    name, attack = strongest({"standard": Standard("segmentation")}) or ("", None)
    assert name == "standard/apgd-sum"
    assert isinstance(attack, APGD)
    assert attack.loss is None
    assert pictured({WORST: WorstOf(("a",), 2.0), "standard": Standard("detection")})[0] == "standard/apgd-sum"
    assert pictured({"square": SquareAttack(3)})[0] == "square"
    assert strongest({"square": SquareAttack(3)}) is None


def test_standard_is_a_name_of_a_command() -> None:
    (attack,) = parse_attacks(["standard"], norm=float("inf"), task="landmarks").values()
    assert attack == Standard("landmarks", float("inf"))

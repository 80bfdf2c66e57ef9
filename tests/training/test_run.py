"""A method in the course of a training: its warm-up, its log, its state, and epochs that begin again."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from advmed.clock import Pace
from advmed.progress import duration
from advmed.thresholds import RunningThresholds, Thresholds
from advmed.training.run import (
    LOG_KEYS,
    MethodRun,
    differing_notes,
    ingredients_of,
    load_thresholds,
    saved_thresholds,
    self_calibrated,
)
from advmed.training.settings import PRESETS, TrainingSettings
from helpers.models import Classifier, Compared, cnn
from helpers.tensors import uniform

IDS = ["a", "b", "c", "d"]
IMAGES = uniform(4, 3, 8, 8, seed=1, dtype=torch.float32)
COMPARING = ["TRADES", "DPAAT", "MART"]
NAMES = ("ce",)


@pytest.fixture
def objective() -> Any:
    return Classifier(cnn(normalise=True), torch.tensor([0, 1, 2, 3]))


@pytest.fixture
def compared() -> Any:
    """An objective that gives predictions; without BatchNorm, so that a pass changes nothing for the next."""
    return Compared(cnn(), torch.tensor([0, 1, 2, 3]))


def settings(**changes: Any) -> TrainingSettings:
    paper = {"preset": "paper", "delta": 0.5, "eps": 0.5, "steps": 2, "step_scale": 2.0}
    return TrainingSettings(**{**paper, **changes})


def running(rule: str = "mean", **changes: Any) -> RunningThresholds:
    return self_calibrated(NAMES, settings(**changes), 4, rule)


def fixed(value: float = 5.0) -> Thresholds:
    return Thresholds((value,), NAMES)


def epoch(run: MethodRun, number: int, objective: Any, steps: int = 2) -> dict[str, float]:
    run.begin_epoch(number)
    for _ in range(steps):
        run.step(objective, IMAGES, IDS)
    return run.end_epoch()


# Numbers that are none


def test_losses_that_are_never_finite_stop_a_training(objective: Any) -> None:
    """One that is suffices; an epoch without steps says nothing."""
    run = MethodRun("SAT", settings(), epochs=3)
    run.begin_epoch(0)
    run.check_losses("Do this.")
    for number, bad in enumerate((1, 2)):
        run.begin_epoch(number)
        for step in range(2):
            run.step(objective if step >= bad else lambda images: objective(images) * math.nan, IMAGES, IDS)
        if bad == 1:
            run.check_losses("Do this.")
    with pytest.raises(FloatingPointError, match=r"not finite in any step of epoch 2: .* Do this\."):
        run.check_losses("Do this.")


def test_a_loss_scale_that_falls_is_told_once_and_stops_a_training_when_nothing_is_left() -> None:
    said: list[str] = []
    run = MethodRun("SAT", settings(), epochs=9, say=said.append)
    run.begin_epoch(4)
    for scale in (2.0**16, 1.0):
        run.check_scale(scale, "Do this.")
    assert not said
    for scale in (0.5, 0.25, 2.0**-24):
        run.check_scale(scale, "Do this.")
    (line,) = said
    assert line.startswith("WARNING: gradients overflow float16")
    assert line.endswith("fallen to 0.5. Do this.")
    with pytest.raises(FloatingPointError, match=r"in every step.* 3e-08 in epoch 5, .* Do this\."):
        run.check_scale(2.0**-25, "Do this.")


# The warm-up


def test_the_warm_up_feeds_the_thresholds_and_nothing_else(objective: Any) -> None:
    """They begin once, when it is over."""
    run, said = MethodRun("AMAT", settings(), running(), epochs=20), []
    assert run.warmup_epochs == 2  # a tenth
    for number in range(5):
        lines = run.begin_epoch(number)
        said.append(len(lines))
        assert run.warming_up is (number < 2)
        if lines:
            assert lines[0].startswith("Warm-up done. Thresholds: ce < ")
        assert (run.thresholds.state_dict()["ceiling"] is None) is (number < 2)
        before = objective.calls
        step = run.step(objective, IMAGES, IDS)
        if number == 0:
            assert objective.calls == before + 1  # no attack
            assert step.adversarial is None
            assert run.method.steps_done == len(run.method.margins) == 0
            torch.testing.assert_close(run.thresholds.statistics.mean, step.terms.double().mean(0))
            torch.testing.assert_close(step.loss, step.terms.sum(1).mean())
        run.end_epoch()
    assert said == [0, 0, 1, 0, 0]
    assert run.method.margins.visits().tolist() == [3] * 4


def test_a_poor_network_after_the_warm_up_is_pointed_out(objective: Any) -> None:
    for found in ("a Dice of 0.12", None):
        run, said = MethodRun("AMAT", settings(), running(), epochs=20, doubts=lambda found=found: found), []
        for number in range(4):
            said += run.begin_epoch(number)
            run.step(objective, IMAGES, IDS)
            run.end_epoch()
        warned = [line for line in said if "WARNING: after the clean warm-up the network has a Dice of 0.12." in line]
        assert len(warned) == (found is not None) == len(said) - 1


def test_each_process_remembers_its_part_of_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("advmed.training.run.place", lambda: (1, 4))
    assert running().statistics.memory == 4 / 4


@pytest.mark.parametrize(
    ("name", "thresholds", "warmup_epochs", "epochs", "expected"),
    [
        ("AMAT", running(), None, 5, 1),
        ("AMAT", running(), None, 100, 10),
        ("AMAT", running(), 3, 100, 3),
        ("AMAT", fixed(), None, 100, 0),
        ("AMAT", fixed(), 2, 100, 2),
        ("SAT", None, None, 100, 0),
        ("SAT", None, 4, 100, 4),
        ("STD", None, 4, 100, 0),
        ("AMAT", fixed(), 3, 3, "leaves no adversarial epoch of 3"),
        ("AMAT", running(), None, 1, "leaves no adversarial epoch of 1"),
        ("AMAT", running(), 0, 9, "AMAT has no thresholds"),
        ("AMAT", None, None, 9, "AMAT needs delta and thresholds"),
    ],
)
def test_how_long_the_warm_up_is(
    name: str, thresholds: Any, warmup_epochs: int | None, epochs: int, expected: int | str
) -> None:
    """A run without an adversarial epoch, or without thresholds, is refused."""
    wanted = settings(warmup_epochs=warmup_epochs)
    if isinstance(expected, int):
        assert MethodRun(name, wanted, thresholds, epochs=epochs).warmup_epochs == expected
    else:
        with pytest.raises(ValueError, match=expected):
            MethodRun(name, wanted, thresholds, epochs=epochs)


@pytest.mark.parametrize("name", COMPARING)
def test_a_warm_up_compares_nothing_and_goes_through_the_hosts_backward(compared: Any, name: str) -> None:
    run, losses = MethodRun(name, settings(warmup_epochs=1), epochs=3), list[Tensor]()
    run.begin_epoch(0)
    step = run.step(compared, IMAGES, IDS, losses.append)
    assert [loss.requires_grad for loss in losses] == [True]
    assert not step.loss.requires_grad
    assert compared.passes == ["training"]
    assert math.isnan(run.end_epoch()["loss_sync"])
    assert run.method.state_dict()["steps_done"] == 0
    assert epoch(run, 1, compared)["loss_sync"] > 0
    assert run.method.state_dict()["steps_done"] == 2


# What an epoch is summed up in


@pytest.mark.parametrize("name", ["AMAT", "DPAAT"])
def test_an_epoch_is_summed_up(objective: Any, compared: Any, name: str) -> None:
    """Means of the steps, and quantiles of margins or perturbation sizes."""
    run = MethodRun(name, settings(step_size=0.125), fixed(math.inf) if name == "AMAT" else None, epochs=3)
    run.begin_epoch(0)
    logs = [run.step(objective if name == "AMAT" else compared, IMAGES, IDS).logs for _ in range(3)]
    values, sizes = run.end_epoch(), run.method.store.values().double()
    assert tuple(values) == LOG_KEYS
    for key in logs[0].keys() - {"nonfinite"}:
        assert values[key] == pytest.approx(sum(float(log[key]) for log in logs) / 3)
    assert values["loss_adversarial"] > values["loss_clean"]
    assert values["nonfinite"] == 0
    assert values["attack_seconds"] > 0
    quantiles = [values[f"margin_{q}"] for q in ("q05", "q50", "q95")]
    assert quantiles == pytest.approx([float(torch.quantile(sizes, q)) for q in (0.05, 0.5, 0.95)])
    if name == "AMAT":
        assert (quantiles, values["expanded"]) == (pytest.approx([0.5 * 4] * 3), 1)  # three visits
    else:
        assert 0 < values["expanded"] < 1 < len(sizes.unique())
    again = run.end_epoch()
    assert math.isnan(again["loss_clean"])
    assert again["attack_seconds"] == 0


def test_a_running_mean_begins_with_every_epoch(compared: Any) -> None:
    """With one that begins again, too."""
    run = MethodRun("DPAAT", settings(average="epoch"), epochs=9)
    for number in (0, 1, 1, 2):
        run.begin_epoch(number)
        for visits in range(3):
            assert run.method.state_dict()["increases"][1] == 4 * visits
            run.step(compared, IMAGES, IDS)


def test_steps_lost_to_bad_gradients_are_added_up(objective: Any) -> None:
    objective.model.eval()  # batch statistics would pass it on to all samples

    class Broken:
        names, model = NAMES, objective.model

        def __call__(self, images: Tensor) -> Tensor:
            terms = objective(images)
            return torch.cat([terms[:1] * math.nan, terms[1:]])

    run = MethodRun("SAT", settings(), epochs=3)
    values = epoch(run, 0, Broken())
    assert values["nonfinite"] == 2 * 2  # one sample, two attack steps, two batches
    assert math.isnan(values["expanded"])
    assert math.isnan(values["margin_q50"])


LOOKS = {"attack_share", "gradient_alignment"}  # not in so short an epoch
SIZES = {"expanded", "margin_q05", "margin_q50", "margin_q95"}


@pytest.mark.parametrize(
    ("name", "changes", "missing"),
    [
        ("STD", {}, set(LOG_KEYS) - {"loss_clean"} - LOOKS),
        ("SAT", {}, {"loss_sync", *SIZES}),
        ("AT", {}, {"loss_clean", "loss_sync", *SIZES}),
        ("TRADES", {}, SIZES),
        ("MART", {}, SIZES),
        ("FAT", {}, {"loss_clean", "loss_sync", *SIZES}),
        ("DPAAT", {}, set()),
        ("DPAAT", {"sync_weight": 0}, {"loss_sync"}),
    ],
)
def test_what_a_method_does_not_have_is_nan(
    compared: Any, name: str, changes: dict[str, Any], missing: set[str]
) -> None:
    values = epoch(MethodRun(name, settings(**changes), epochs=3), 0, compared)
    assert {key for key, value in values.items() if math.isnan(value)} == missing | LOOKS


# Epochs that begin again


KINDS: dict[str, Callable[[], MethodRun]] = {
    "AMAT": lambda: MethodRun("AMAT", settings(random_start=0.5), fixed(1.4), epochs=5),
    "AMAT, self-calibrated": lambda: MethodRun("AMAT", settings(random_start=0.5), running(), epochs=5),
    "TRADES": lambda: MethodRun("TRADES", settings(random_start=0.5, seed=3), epochs=5),
    **{
        f"DPAAT {changes}": lambda changes=changes: MethodRun(
            "DPAAT", settings(random_start=0.5, seed=3, step_size=0.0625, **changes), epochs=5
        )
        for changes in ({"average": "batch"}, {"average": "epoch"}, {"sync_weight": 0})
    },
}


def objective_of(kind: str, objective: Any, compared: Any) -> Any:
    return objective if kind.startswith("AMAT") else compared


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_that_begins_again_begins_where_it_began(objective: Any, compared: Any, kind: str) -> None:
    run, task = KINDS[kind](), objective_of(kind, objective, compared)
    for number in range(2):
        epoch(run, number, task)
    run.begin_epoch(2)
    start = copy.deepcopy(run.method.state_dict())
    for attempt in range(3):
        run.step(task, IMAGES, IDS)
        run.step(task, IMAGES + 0.1, IDS)
        if attempt == 1:
            run.end_epoch()  # back from a checkpoint after a whole epoch, too
        assert run.method.state_dict() != start
        lines = run.begin_epoch(2)
        assert lines == ["Epoch 3 begins again: margins and thresholds are back at its start"]
        assert run.method.state_dict() == start
    first = run.step(task, IMAGES, IDS).logs
    assert run.end_epoch()["loss_clean"] == pytest.approx(float(first["loss_clean"]))  # of this attempt alone
    after = run.method.state_dict()
    assert run.begin_epoch(3) == []
    assert run.method.state_dict() | {"increases": 0} == after | {"increases": 0}  # which begin anew


def test_the_first_adversarial_epoch_begins_again_with_its_thresholds(objective: Any) -> None:
    run = MethodRun("AMAT", settings(), running(), epochs=5)
    epoch(run, 0, objective)
    run.begin_epoch(1)
    ceiling = run.thresholds.state_dict()["ceiling"]
    run.step(objective, IMAGES * 0, IDS)
    run.begin_epoch(1)
    assert run.thresholds.state_dict()["ceiling"] == ceiling
    run.step(objective, IMAGES, IDS)
    assert run.method.margins.visits().tolist() == [1] * 4


# State


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_continues_from_its_state(objective: Any, compared: Any, kind: str) -> None:
    whole, task = KINDS[kind](), objective_of(kind, objective, compared)
    for number in range(3):
        epoch(whole, number, task)
    state = json.loads(json.dumps(whole.state_dict(), allow_nan=False))  # plain values
    second = KINDS[kind]()
    if kind.startswith("AMAT"):
        thresholds = saved_thresholds(state, NAMES, running)
        assert type(thresholds) is type(whole.thresholds)
        second = MethodRun("AMAT", settings(random_start=0.5), thresholds, epochs=5)
    assert second.load_state_dict(state) == []
    assert second.state_dict() == whole.state_dict()
    for run in (whole, second):
        run.begin_epoch(3)
    first, other = (run.step(task, IMAGES, IDS) for run in (whole, second))
    assert torch.equal(first.adversarial, other.adversarial)
    assert torch.equal(first.loss, other.loss)
    assert second.state_dict() == whole.state_dict()
    assert str(second.thresholds) == str(whole.thresholds)
    assert second.thresholds is None or second.thresholds is not whole.thresholds


def test_the_length_of_the_warm_up_is_that_of_the_saved_run() -> None:
    first, second = (MethodRun("AMAT", settings(), running(), epochs=epochs) for epochs in (40, 10))
    second.load_state_dict(first.state_dict())
    assert second.warmup_epochs == 4


def test_a_warm_up_that_was_left_open_follows_the_estimate_of_a_hosts_epochs(objective: Any) -> None:
    """Not one that is over, and none that was asked for."""
    for given, wanted in ((None, [4, 3, 3, 3]), (5, [5, 5, 5, 5])):
        own = settings(warmup_epochs=given)
        run = MethodRun("AMAT", own, self_calibrated(NAMES, own, 4), epochs=40)
        seen = []
        for number, epochs in enumerate((40, 30, 10, 90)):
            epoch(run, number, objective)
            run.set_epochs(epochs)
            seen.append(run.warmup_epochs)
        assert seen == wanted
        assert run.warming_up == (given is not None)


def test_a_run_sums_itself_up(objective: Any) -> None:
    measured = Thresholds((5.0,), NAMES, source="/home/somebody/best.pt", source_sha256="0123456789abcdef")
    calibrated = MethodRun("AMAT", settings(), running(), epochs=20)
    for number in range(3):
        epoch(calibrated, number, objective)
    runs = [
        (MethodRun("STD", settings(), epochs=4), 2, (0, None, None)),
        (MethodRun("SAT", settings(), epochs=4), 2, (2, None, None)),
        (MethodRun("AMAT", settings(), fixed(), epochs=4), 3, (3, "ce < 5", "given")),
        (
            MethodRun("AMAT", settings(), measured, epochs=4),
            1,
            (1, "ce < 5", "measured on best.pt (SHA-256 0123456789"),
        ),
        (calibrated, 1, (0, None, "self-calibrated in 2 clean epoch(s)")),
        (calibrated, 3, (1, str(calibrated.thresholds), "self-calibrated in 2 clean epoch(s)")),
    ]
    for run, epochs, (attacked, thresholds, origin) in runs:
        found = run.summary(epochs)
        assert (found["method"], found["epochs"], found["attacked_epochs"]) == (run.name, epochs, attacked)
        assert found["thresholds"] == thresholds
        assert found["thresholds_from"] == origin or found["thresholds_from"].startswith(origin)


# A noise level that grows


class Flat:
    """One term, the sum of the image's values; of four pixels it rises by twice the norm of the noise."""

    def __call__(self, images: Tensor) -> Tensor:
        return images.flatten(1).sum(1, keepdim=True)


def levels(run: MethodRun, epochs: range, steps: int) -> list[float]:
    """Of the noise in every step, as it was made."""
    found = []
    for number in epochs:
        run.begin_epoch(number)
        for _ in range(steps):
            step = run.step(Flat(), torch.zeros(1, 1, 2, 2), ["a"])
            found.append(0.0 if step.adversarial is None else float(step.adversarial.norm()))
        run.end_epoch()
    return found


@pytest.mark.parametrize("name", ["SAT", "AT"])
def test_a_level_grows_in_a_straight_line(name: str) -> None:
    """After the warm-up, in half of what is left; where the steps of an epoch are not known, epoch by epoch."""
    given = settings(preset="fast", steps=None, step_scale=None, eps=2.0, ramp=0.5, warmup_epochs=1)
    run = MethodRun(name, given, epochs=5, steps_per_epoch=2)
    lines = [line for number in (0, 1) for line in run.begin_epoch(number)]
    assert lines == ["The noise level grows from 0 to eps = 2, which it has by the end of epoch 3 of 5"]
    assert levels(run, range(1), 2) == [0.0, 0.0]
    assert levels(run, range(1, 5), 2) == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0])
    resumed = MethodRun(name, given, epochs=5, steps_per_epoch=2)
    resumed.load_state_dict(json.loads(json.dumps(run.state_dict())))
    assert levels(resumed, range(2, 4), 2) == pytest.approx([1.5, 2.0, 2.0, 2.0])
    assert levels(MethodRun(name, given, epochs=5), range(1, 5), 2) == pytest.approx([1.0, 1.0, *[2.0] * 6])
    again = MethodRun(name, given, epochs=5, steps_per_epoch=2)
    assert levels(again, range(1, 2), 2) == levels(again, range(1, 2), 2), "an epoch that begins again"
    within = MethodRun(name, given, epochs=5, steps_per_epoch=2)
    within.begin_epoch(1, done=1)  # of a checkpoint that was written in the middle of it
    within.step(Flat(), torch.zeros(1, 1, 2, 2), ["a"])
    assert within.method.eps == pytest.approx(1.0)
    within.steps_per_epoch = 4  # of a batch that did not fit the memory, and was halved
    assert levels(within, range(2, 3), 4) == pytest.approx([1.25, 1.5, 1.75, 2.0])
    assert (run.summary(1)["ramp"], run.summary(2)["ramp"]) == (None, 0.5)
    late = MethodRun(name, settings(ramp=0.5, decay="late", awp=0.01), epochs=5)
    assert ingredients_of(late.summary(2)) == ", awp 0.01, ramp 0.5, decay late"
    drawn = MethodRun("AMAT", settings(margin_of="any", refinement="secant"), fixed(-1.0), epochs=4)
    assert ingredients_of(drawn.summary(2)) == ", margin_of any"
    assert ingredients_of({"awp": None}) == "", "of an earlier release"


def test_a_level_that_does_not_grow() -> None:
    plain = MethodRun("SAT", settings(eps=2.0), epochs=2, steps_per_epoch=2)
    assert plain.begin_epoch(0) == []
    assert levels(plain, range(2), 2) == pytest.approx([2.0] * 4)
    assert plain.summary(1)["ramp"] is None
    adaptive = MethodRun("AMAT", settings(ramp=0.5), fixed(-1.0), epochs=4, steps_per_epoch=2)
    (line,) = adaptive.begin_epoch(0)
    assert line.startswith("WARNING: ramp is of methods with one noise level for all samples, and changes nothing here")
    assert MethodRun("STD", settings(ramp=0.5), epochs=4).begin_epoch(0) == []
    assert adaptive.summary(2)["ramp"] is None
    assert levels(adaptive, range(1), 1) == pytest.approx([0.5]), "its margins have their own course"
    longer = MethodRun("SAT", settings(eps=2.0, ramp=1.0), epochs=2, steps_per_epoch=2)
    assert levels(longer, range(1), 2) == pytest.approx([0.5, 1.0])
    longer.set_epochs(4)  # of a training by the clock
    assert levels(longer, range(1, 2), 2) == pytest.approx([0.75, 1.0])
    for share in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"ramp must be a share in \[0, 1\]"):
            settings(ramp=share)


def test_notes_of_thresholds_are_compared_with_the_run(tmp_path: Path) -> None:
    """As they are in a file; what only one of them has says nothing."""
    notes = {"imgsz": 320, "classes": None, "sizes": (1, 2), "part": {"a": 1}, "quality": 0.5}
    Thresholds((1.0,), NAMES, notes=notes).save(tmp_path / "t.json")
    for thresholds in (Thresholds((1.0,), NAMES, notes=notes), Thresholds.load(tmp_path / "t.json")):
        same = {"imgsz": 320, "classes": None, "sizes": (1, 2), "part": {"a": 1}, "data": "x"}
        assert differing_notes(thresholds.notes, same) == []
        other = {"imgsz": 640, "classes": [0], "sizes": [1, 2, 3], "part": {"a": 2}}
        assert differing_notes(thresholds.notes, other) == [
            *("imgsz 320 -> 640", "classes None -> [0]"),
            *("sizes [1, 2] -> [1, 2, 3]", "part {'a': 1} -> {'a': 2}"),
        ]
    assert differing_notes(fixed().notes, {"imgsz": 1}) == []


def test_changed_settings_are_told_and_other_methods_and_models_refused() -> None:
    state = MethodRun("SAT", settings(), epochs=4).state_dict()
    (line,) = MethodRun("SAT", settings(eps=2.0, steps=7), epochs=4).load_state_dict(state)
    assert line == "WARNING: settings changed since the checkpoint: eps 0.5 -> 2.0, steps 2 -> 7"
    own = MethodRun("AMAT", settings(), fixed(), epochs=4).state_dict()
    (line,) = MethodRun("AMAT", settings(rule="mean+2std"), fixed(), epochs=4).load_state_dict(own)
    assert line.startswith("WARNING: a run that goes on keeps the thresholds, their rule and the warm-up")
    assert line.endswith("not taken over: rule None -> mean+2std")
    with pytest.raises(ValueError, match="method 'SAT', this run trains 'AT'"):
        MethodRun("AT", settings(), epochs=4).load_state_dict(state)
    state = MethodRun("AMAT", settings(), fixed(), epochs=4).state_dict()
    with pytest.raises(ValueError, match=r"thresholds in the checkpoint do not fit.*\['ce'\].*\['box', 'cls'\]"):
        saved_thresholds(state, ("box", "cls"), running)


# The outlook

MARGINS = "margins can reach about {} (L2 norm, delta 0.5{})"
SIZES_LIE = "perturbation sizes begin at 0.5 and can come to lie between {} and {} (L{} norm)"


@pytest.mark.parametrize(
    ("name", "changes", "epochs", "visits", "samples", "met", "words", "advice"),
    [
        ("AMAT", {"eps": 2.0}, 10, 8, 8, "10.0", MARGINS.format("5.00", ", eps 2"), None),
        ("AMAT", {"eps": 2.0}, 4, 8, 8, "4.0", MARGINS.format("2.00", ", eps 2"), None),
        ("AMAT", {"eps": 2.0}, 3, 8, 8, "3.0", MARGINS.format("1.50", ", eps 2"), "0.67"),
        ("AMAT", {"eps": 2.0}, 10, 2, 8, "2.5", MARGINS.format("1.25", ", eps 2"), "0.8"),
        ("AMAT", {"eps": None}, 3, 8, 8, "3.0", MARGINS.format("1.50", ""), None),
        ("AMAT", {"eps": None, "warmup_epochs": 4}, 10, 8, 8, "6.0", MARGINS.format("3.00", ""), None),
        # Twenty steps of 0.05 lie between the smallest and the largest size.
        ("DPAAT", {}, 10, 8, 8, "10.0", SIZES_LIE.format("0.00", "1.00", 2), None),
        ("DPAAT", {}, 4, 8, 8, "4.0", SIZES_LIE.format("0.30", "0.70", 2), None),
        ("DPAAT", {"warmup_epochs": 4}, 10, 8, 8, "6.0", SIZES_LIE.format("0.20", "0.80", 2), None),
        ("DPAAT", {"eps_min": 0.25, "eps_max": 0.625}, 10, 8, 8, "10.0", SIZES_LIE.format("0.25", "0.62", 2), None),
        ("DPAAT", {"step_size": 0}, 10, 8, 8, "10.0", SIZES_LIE.format("0.50", "0.50", 2), None),
        ("DPAAT", {"norm": math.inf}, 4, 8, 8, "4.0", SIZES_LIE.format("0.30", "0.70", "inf"), None),
        # As it is; but a sample that is met at all is met once.
        ("DPAAT", {}, 2, 3, 100, "0.1", SIZES_LIE.format("0.45", "0.55", 2), None),
    ],
)
def test_the_outlook(
    name: str,
    changes: dict[str, Any],
    epochs: int,
    visits: int,
    samples: int,
    met: str,
    words: str,
    advice: str | None,
) -> None:
    run = MethodRun(name, settings(**changes), fixed() if name == "AMAT" else None, epochs=epochs)
    first, *warnings = run.outlook(samples, visits, "slices")
    assert first == f"{samples} slices, each met about {met} times in this run: {words}"
    assert len(warnings) == (advice is not None)
    if advice is not None:
        assert warnings[0].startswith("WARNING: margins cannot reach")
        assert f"Raise delta to about {advice}, " in warnings[0]
    for other in ("SAT", "TRADES"):
        assert MethodRun(other, settings(), epochs=10).outlook(8, 8) == []


def test_the_outlook_of_margins_that_follow() -> None:
    run = MethodRun("AMAT", settings(preset="fast", eps=2.0), fixed(), epochs=3)
    assert run.outlook(8, 8) == [
        "8 samples, each met about 3.0 times in this run: margins begin with an estimate and follow what "
        "each sample bears (L2 norm, floor 0.125, cap 16)"
    ]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((0.125, 0.125, 0.125, 2.0), "75% of the margins rest on their floor, 0.125: "),
        ((0.125, 0.125, 2.0, 3.0), None),
        ((16.0, 16.0, 2.0, 3.0), "50% of the margins rest on their cap, 16: "),
        ((16.0, 1.0, 2.0, 3.0), None),
    ],
)
def test_margins_that_rest_on_a_bound_are_pointed_out_once_and_late(
    values: tuple[float, ...], words: str | None
) -> None:
    said: list[str] = []
    run = MethodRun("AMAT", settings(preset="fast", eps=2.0), fixed(), epochs=6, say=said.append)
    for epoch in range(6):
        run.begin_epoch(epoch)
        run.method.store.set(list("abcd"), values)
        run.end_epoch()
        assert len([line for line in said if "rest on their" in line]) == (words is not None and epoch >= 3)
    assert words is None or any(line.startswith(f"WARNING: {words}") for line in said)
    assert MethodRun("DPAAT", settings(), epochs=6).method.resting() is None  # its sizes are meant to


# Presets


def test_what_is_left_open_is_chosen_by_the_preset() -> None:
    fast, paper = (
        MethodRun("AMAT", TrainingSettings(preset=p, delta=0.5, eps=2.0), fixed(), epochs=9) for p in PRESETS
    )
    assert (fast.method.attack.lengths, paper.method.attack.steps) == (pytest.approx((1, 1 / 2, 1 / 4)), 20)
    assert (fast.method.refinement, fast.method.train_on, fast.method.begin_with) == ("secant", "sphere", "estimate")
    assert (paper.method.refinement, paper.method.train_on, paper.method.begin_with) == ("paper", "sphere", "delta")
    assert (fast.method.cost, paper.method.cost) == (pytest.approx(10 / 3), pytest.approx(46 / 3))
    assert (fast.method.lowest, fast.method.highest) == (0.125, 16.0)
    assert (paper.method.lowest, paper.method.highest) == (0.0, None)
    assert fast.settings.refinement == "secant"
    own = TrainingSettings(steps=7, refinement="balanced", eps=2.0, delta=0.5, margin_max=3.0).for_method("AMAT")
    assert (own.steps, own.schedule, own.refinement, own.train_on) == (7, "decreasing", "balanced", "sphere")
    assert MethodRun("AMAT", own, fixed(), epochs=9).method.highest == 3.0
    for name in ("STD", "AT", "SAT", "TRADES", "MART", "FAT", "DPAAT"):
        chosen = TrainingSettings(eps=1.0).for_method(name)
        assert chosen.for_method(name) == chosen
        assert chosen.refinement is None


@pytest.mark.parametrize("name", ["STD", "AT", "SAT", "AMAT", "TRADES", "MART", "FAT", "DPAAT", "DPAAT plain"])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_cost_of_a_step_is_that_of_its_passes(name: str, preset: str) -> None:
    """In standard steps: a forward pass, a gradient of the images and one of the weights are alike."""
    changes = {"start": "delta"} | ({"sync_weight": 0.0} if name == "DPAAT plain" else {})
    wanted = settings(preset=preset, steps=None, step_scale=None, **changes)
    thresholds = Thresholds((5.0, 5.0), ("ce", "sharp")) if name == "AMAT" else None
    method = wanted.make_method(name.split()[0], thresholds)
    objective, passes = Compared(cnn(), torch.tensor([0, 1, 2, 3])), 0

    def count(_: Any, images: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal passes
        passes += 1
        learns = all(weight.requires_grad for weight in objective.model.parameters())
        if output.requires_grad:
            output.register_hook(lambda _: back(2 if learns and images[0].requires_grad is False else 1))

    def back(halves: int) -> None:
        nonlocal passes
        passes += halves

    objective.model.register_forward_hook(count)
    method.step(objective, IMAGES, IDS).loss.backward()
    # a shared clean pass goes back once for both: one half for the images and one for the weights
    shared = method.cost * 3 - passes
    assert shared == pytest.approx(0) or (preset == "fast" and shared == pytest.approx(1)), (passes, method.cost * 3)


# The time left


def test_the_time_that_is_left() -> None:
    """After some steps from these, then from whole epochs; a warm-up is cheaper."""
    now = 0.0
    pace = Pace(epochs=10, warmup=2, steps=20, cost=4.0, clock=lambda: now)
    said = []
    for epoch in range(4):
        if (line := pace.begin_epoch(epoch)) is not None:
            said.append((epoch, line))
        for _ in range(20):
            if (line := pace.step()) is not None:
                said.append((epoch, line))
            now += 3.0 if epoch < 2 else 15.0
        now += 60.0  # validation
    assert said == [
        (0, "About 34 min to the end (10 epochs of 20 steps; validation comes on top)"),  # 2 * 60 + 8 * 240 s
        (1, "About 66 min to the end (9 epochs)"),  # 120 + 8 * 480 s
        (2, "About 64 min to the end (8 epochs)"),
        (3, "About 42 min to the end (7 epochs)"),  # 7 * 360 s
    ]


def test_a_long_training_says_so_ten_times() -> None:
    now = 0.0
    pace, said = Pace(epochs=500, warmup=0, steps=2, cost=3.0, clock=lambda: now), []
    for epoch in range(500):
        said.append(pace.begin_epoch(epoch))
        for _ in range(2):
            said.append(pace.step())
            now += 3.0
    lines = [line for line in said if line]
    assert len(lines) == 10
    assert (lines[0], lines[1]) == ("About 50 min to the end (499 epochs)", "About 45 min to the end (450 epochs)")


def test_a_log_with_lines_for_each_epoch_has_the_time_that_is_left_in_each() -> None:
    now, said = 0.0, []
    run = MethodRun("SAT", TrainingSettings(eps=1.0), epochs=500, say=said.append, every_epoch=True)
    run._pace._clock = lambda: now
    for epoch in range(500):
        run.begin_epoch(epoch)
        run._pace.step()
        now += 6.0
    assert len(said) == 499, "in the first epoch nothing is known yet"
    assert (said[0], said[-1]) == ("About 50 min to the end (499 epochs)", "About 6 s to the end (1 epochs)")


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, "1 s"), (59, "59 s"), (119, "2 min"), (5340, "89 min"), (5400, "1 h 30 min"), (172_800, "2.0 days")],
)
def test_durations_in_words(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


# Thresholds from a file


def test_thresholds_are_read_by_the_rule_of_the_settings(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    Thresholds((3.0,), NAMES, "mean+2std", (1.0,), (1.0,), 9).save(path)
    assert load_thresholds(settings(), str(path), NAMES) == (Thresholds.load(path), "")
    found, remark = load_thresholds(settings(rule="mean"), str(path), NAMES)
    assert (found.values, found.rule) == ((1.0,), "mean")
    assert remark == ", by the rule mean of the settings instead of the file's"


def test_files_that_are_no_thresholds_of_this_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    with pytest.raises(FileNotFoundError, match="there is no thresholds file"):
        load_thresholds(settings(), str(path), NAMES)
    path.write_text("{}")
    with pytest.raises(ValueError, match="is not a thresholds file"):
        load_thresholds(settings(), str(path), NAMES)
    fixed().save(path)
    with pytest.raises(ValueError, match=r"the thresholds in .*t.json do not fit this model.*K = 1.*K = 2"):
        load_thresholds(settings(), str(path), ("box", "cls"))
    with pytest.raises(ValueError, match=r"t.json hold no mean and std"):
        load_thresholds(settings(rule="mean"), str(path), NAMES)

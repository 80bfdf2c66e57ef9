"""What `benchmarks/visits.py`, `fronts.py` and `sweeps.py` make of their measurements."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from advmed import AMAT, SAT

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])


@pytest.fixture
def visits() -> ModuleType:
    import visits

    return visits


@pytest.fixture
def sweeps() -> ModuleType:
    import sweeps

    return sweeps


# Visits


def test_agreement_is_that_of_the_analysis_of_variance(visits: ModuleType) -> None:
    # Mean squares by hand: groups (1, 3), (5, 7), (8, 12); means 2, 6, 10 about 6: between 2 (16 + 0 + 16) / 2 = 32,
    # within (2 + 2 + 8) / 3 = 4; the variance between is (32 - 4) / 2 = 14, and 14 / (14 + 4) lies between groups.
    groups, values = ["a", "a", "b", "b", "c", "c"], np.array([1.0, 3, 5, 7, 8, 12])
    assert visits.agreement(groups, values) == pytest.approx(14 / 18)


def test_agreement_finds_the_variances_that_made_the_data_whatever_the_sizes_of_the_groups(visits: ModuleType) -> None:
    draw = np.random.default_rng(0)
    groups = [str(k) for k in range(4000) for _ in range(draw.integers(1, 9))]
    effect = dict(zip(dict.fromkeys(groups), draw.normal(0, 2.0, 4000), strict=True))
    values = np.array([effect[group] for group in groups]) + draw.normal(0, 1.0, len(groups))
    assert visits.agreement(groups, values) == pytest.approx(4 / 5, abs=0.01)
    assert visits.agreement(groups, draw.normal(0, 1, len(groups))) == pytest.approx(0, abs=0.02)


def test_earlier_visits_foretell_what_repeats_and_nothing_else(visits: ModuleType) -> None:
    groups = [str(k) for k in range(300)] * 3
    own = np.random.default_rng(0).normal(size=300)
    assert visits.foretold(groups, np.tile(own, 3)) == (pytest.approx(1.0), pytest.approx(2 / 3))
    correlation, _ = visits.foretold(groups, np.random.default_rng(1).normal(size=900))
    assert abs(correlation) < 0.1


def test_an_id_is_made_coarser_part_by_part(visits: ModuleType) -> None:
    found = visits.groupings(["a:foreground:0,0,0", "a:background:0,0,0"])
    assert found["case"] == ["a", "a"]
    assert found["case, part"] == ["a:foreground", "a:background"]
    assert found["case, cell"] == ["a:0,0,0", "a:0,0,0"]
    assert len(set(found["case, part, cell"])) == 2
    assert list(visits.groupings(["case:3"])) == ["case", "case, slice"]
    assert list(visits.groupings(["images/a.jpg"])) == ["image"]


def test_a_watched_method_computes_the_same_and_writes_what_its_visits_found(
    visits: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def objective(images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).sum(1, keepdim=True)

    arguments: dict[str, Any] = {"delta": 0.25, "thresholds": 1.5, "refinement": "secant", "start": "estimate"}
    plain, ids = AMAT(**arguments), ["a", "b"]
    images = torch.tensor([[0.0, 0.0], [0.5, 0.5]]).view(2, 1, 1, 2)
    for _ in range(2):
        plain.step(objective, images, ids)
    monkeypatch.setattr(visits.amat, "expected_crossing", visits.noted(visits.amat.expected_crossing))
    with (tmp_path / "visits.csv").open("w", newline="") as visits.Watched.out:
        visits.Watched.head()
        watched = visits.Watched(**arguments)
        for _ in range(2):
            watched.step(objective, images, ids)
    torch.testing.assert_close(watched.margins.get(ids), plain.margins.get(ids), rtol=0, atol=0)
    rows = (tmp_path / "visits.csv").read_text().split()
    assert rows[0] == "id,crossing,margin" and len(rows) == 5
    # the loss is sqrt(2) times the noise's norm above its clean value, 0 and 1
    found = {row.split(",")[0]: float(row.split(",")[1]) for row in rows[1:]}
    assert found == {"a": pytest.approx(1.5 / 2**0.5, abs=1e-4), "b": pytest.approx(0.5 / 2**0.5, abs=1e-4)}
    assert "ids" in visits.table([tmp_path / "visits.csv"]).splitlines()[0]


def test_the_training_is_what_stands_behind_two_dashes(visits: ModuleType) -> None:
    words = ["record", "a.csv", "--finest", "--", "nnUNetv2_train", "4", "--", "x"]
    assert visits.split(words) == (["record", "a.csv", "--finest"], ["nnUNetv2_train", "4", "--", "x"])
    assert visits.split(["table", "a.csv"]) == (["table", "a.csv"], [])


# Sweeps


@pytest.mark.parametrize("method", ["STD", "SAT", "AT", "TRADES", "AMAT", "DPAAT"])
def test_every_method_makes_as_many_passes(sweeps: ModuleType, method: str) -> None:
    length = sweeps.equal_passes(method, 20)
    cost = {"STD": 3, "SAT": 10, "AT": 9, "TRADES": 12, "AMAT": 10, "DPAAT": 11}[method]  # docs/presets.md, in thirds
    assert length["trainer.max_epochs"] * length["trainer.limit_train_batches"] * cost == pytest.approx(60)
    assert 0 < length["trainer.limit_train_batches"] <= 1


@pytest.fixture
def result() -> dict[str, Any]:
    """Two seeds of a standard network and two levels of SAT; one of AT."""
    curves = {
        "STD": [[0.95, 0.3, 0.1, 0.2], [0.93, 0.3, 0.1, 0.2]],
        "SAT 0.4": [[0.94, 0.7, 0.5, 0.6], [0.92, 0.7, 0.5, 0.6]],
        "SAT 0.8": [[0.90, 0.8, 0.8, 0.8], [0.88, 0.8, 0.8, 0.8]],
        "SAT dealt AMAT's levels": [[0.92, 0.5, 0.5, 0.5], [0.92, 0.5, 0.5, 0.5]],
        "AT 0.4": [[0.94, 0.7, 0.5, 0.6]],
    }
    runs = {
        name: {"curves": {str(k): row for k, row in enumerate(rows)}, "margins": {"0": []}}
        for name, rows in curves.items()
    }
    return {"metric": "accuracy", "attack": "apgd50", "levels": [0, 0.4, 0.8], "points": [0.4, 0.7, 0.9], "runs": runs}


def test_tables_say_means_and_fronts(sweeps: ModuleType, result: dict[str, Any]) -> None:
    lines = sweeps.tables(result).splitlines()
    # AUC_robust is the mean of sqrt(0.94 x 0.6) and sqrt(0.92 x 0.6)
    assert "| SAT 0.4 | 2 | 0.930 ± 0.010 | 0.700 / 0.500 | 0.600 ± 0.000 | 0.747 ± 0.004 |  |" in lines
    assert "| SAT | 0.400 ± 0.000 | 0.600 ± 0.000 | 0.650 ± 0.000 |" in lines  # half, one and two points of STD's
    # of the seed that it has; no further than its line goes; less SAT's of that seed
    assert "| AT | 0.400 (+0.000) | 0.600 (+0.000) | 0.600 (-0.050) |" in lines
    assert not [line for line in lines if line.startswith("| TRADES")]
    # the other way round: half of the way to SAT 0.4, half of the way on, and further than any goes
    assert "| SAT | 0.935 ± 0.010 | 0.910 ± 0.010 | not reached |" in lines
    assert "| AT | 0.945 (+0.000) | not reached | not reached |" in lines


def test_rows_that_were_measured_before_stay_where_they_began_with_the_same(
    sweeps: ModuleType, result: dict[str, Any]
) -> None:
    class Kind(sweeps.Pneumonia):  # type: ignore[misc, name-defined]
        runs = dict.fromkeys(("SAT 0.4", "SAT 0.8", "AT 0.4", "SAT dealt AMAT's levels"), None)

    def cut(*names: str, **seeds: list[float]) -> dict[str, Any]:
        rows = {
            name: {
                "curves": seeds or result["runs"][name]["curves"],
                "margins": {},
                "measured": "today",
                "versions": {},
            }
            for name in names
        }
        return {**result, "runs": {"STD": result["runs"]["STD"], **rows}}

    new = [0.5, 0.5, 0.5, 0.5]
    joined = sweeps.joined(Kind, result, cut("AT 0.4", **{"1": new}))
    assert list(joined["runs"]) == ["STD", "SAT 0.4", "SAT 0.8", "AT 0.4", "SAT dealt AMAT's levels"]
    assert joined["runs"]["AT 0.4"]["curves"] == {"0": [0.94, 0.7, 0.5, 0.6], "1": new}
    assert (joined["runs"]["AT 0.4"]["measured"], joined["runs"]["SAT 0.4"]["measured"]) == ("today", None)
    with pytest.raises(SystemExit, match="has attack pgd20, these rows apgd50"):
        sweeps.joined(Kind, {**result, "attack": "pgd20"}, cut())
    other = cut()
    other["runs"] = {"STD": {"curves": {"1": [0.5, 0.3, 0.1, 0.2]}, "margins": {}}}
    with pytest.raises(SystemExit, match="another standard network of seed 1"):
        sweeps.joined(Kind, result, other)
    with pytest.raises(SystemExit, match="rows that are no runs any more"):
        sweeps.joined(Kind, {**result, "runs": {**result["runs"], "AT 0.05": result["runs"]["AT 0.4"]}}, cut())


def test_the_page_of_a_gpu_has_the_table_of_its_numbers() -> None:
    import gpu

    docs = BENCHMARKS.parent / "docs" / "results"
    page = (docs / "gpu.md").read_text(encoding="utf-8").splitlines()
    lines = gpu.table(json.loads((docs / "gpu_h200.json").read_text())["records"])
    assert len(lines) > 40
    assert [line for line in lines if line not in page] == []


@pytest.mark.parametrize("data", ["ham10000", "pneumonia", "lesions"])
def test_the_page_of_fronts_has_the_tables_of_its_numbers(sweeps: ModuleType, data: str) -> None:
    docs = BENCHMARKS.parent / "docs" / "results"
    page = (docs / "fronts.md").read_text(encoding="utf-8").splitlines()
    lines = sweeps.tables(json.loads((docs / f"fronts_{data}.json").read_text())).splitlines()
    assert [line for line in lines if line and line not in page] == []


def test_the_figure_shows_every_front(sweeps: ModuleType, result: dict[str, Any], tmp_path: Path) -> None:
    sweeps.figure(result, tmp_path / "fronts.png")
    assert (tmp_path / "fronts.png").read_bytes().startswith(b"\x89PNG")
    assert sweeps.of_dial(result, "SAT") == ["SAT 0.4", "SAT 0.8"]


# Fronts


@pytest.fixture
def fronts() -> ModuleType:
    import fronts

    return fronts


def test_a_run_is_held_against_the_line_of_its_own_seed(fronts: ModuleType) -> None:
    dial = [{0: [0.9, 0.2], 1: [0.8, 0.1]}, {0: [0.8, 0.4], 1: [0.7, 0.3]}]
    # half of the way between the two: 0.3 and 0.2
    assert fronts.beyond(True, {0: [0.85, 0.35], 1: [0.75, 0.22]}, dial) == "+0.035 ± 0.015"
    assert fronts.beyond(True, {0: [0.85, 0.25]}, dial) == "-0.050"
    assert fronts.beyond(True, {0: [0.95, 0.35]}, dial) == "cleaner than all of it"
    assert fronts.beyond(True, {0: [0.95, 0.35], 1: [0.75, 0.2]}, dial).startswith("+0.000; 1 of 2 seeds")
    assert fronts.beyond(True, {2: [0.85, 0.25]}, dial) == ""  # a seed that the dial has not


def test_where_less_is_better_a_line_is_read_the_other_way_round(fronts: ModuleType) -> None:
    dial = [{0: [1.5, 3.2]}, {0: [1.6, 2.8]}, {0: [1.58, 2.4]}]  # the last setting is better than the one before it
    assert fronts.beyond(False, {0: [1.6, 2.3]}, dial) == "+0.100"
    assert fronts.beyond(False, {0: [1.5, 3.1]}, dial) == "+0.100"


def test_what_is_finished_is_done_again_when_its_command_or_what_it_needs_has_changed(
    fronts: ModuleType, tmp_path: Path
) -> None:
    log, file = tmp_path / "a.log", tmp_path / "runs"
    words = ["python", "-c", f"open({str(file)!r}, 'a').write('x')"]

    def runs() -> int:
        return len(file.read_text())

    first = fronts.call(words, log, ["data"])
    assert fronts.call(words, log, ["data"]) == first and runs() == 1
    again = fronts.call(words, log, ["other data"])
    assert again != first and runs() == 2
    fronts.call([*words, "argument"], log, ["other data"])
    assert runs() == 3
    log.with_suffix(".done").write_text("12.5")  # as an older version of it, which did not know its command
    fronts.call(words, log)
    assert runs() == 4


def test_a_table_says_which_code_trained_its_rows(fronts: ModuleType, tmp_path: Path) -> None:
    assert re.fullmatch("[0-9a-f]{12}", fronts.code_of())
    for seed, name in ((0, "STD"), (1, "STD"), (0, "SAT 2")):
        logs = tmp_path / str(seed) / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        fronts.call(["python", "-c", ""], logs / f"{fronts.slug(name)}.train.log")
    rows = {"STD": {0: [], 1: []}, "SAT 2": {0: []}}
    assert fronts.codes(tmp_path, rows) == f"Trained by one version of the code: {fronts.code_of()}"
    done = tmp_path / "1" / "logs" / "STD.train.done"
    done.write_text(json.dumps({**json.loads(done.read_text()), "code": "another"}))
    said = f"Trained by code {fronts.code_of()}: STD, SAT 2\nTrained by code another: STD"
    assert fronts.codes(tmp_path, rows) == said
    assert "not noted: SAT 9" in fronts.codes(tmp_path, {**rows, "SAT 9": {0: []}}), "of before it was noted"


def test_a_training_that_was_done_anew_is_followed_by_those_that_begin_with_it(
    fronts: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []

    class Host(fronts.Host):  # type: ignore[name-defined,misc]  # of a module that is found at run time
        runs: ClassVar[dict[str, Any]] = {"SAT 1": {}, "dealt": {"of": "SAT 1"}}

        def train(self, name: str) -> list[str]:
            return ["train", name, self.words]

        def evaluate(self, name: str) -> list[str]:
            return ["evaluate", name]

    def run(words: list[str], **_: Any) -> Any:
        called.append(" ".join(Path(word).name for word in words[:2]))
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(fronts.subprocess, "run", run)
    monkeypatch.setattr(fronts, "curve", lambda *_: [])
    host = Host(tmp_path, 0)
    host.words = "as it was"

    def work() -> list[str]:
        called.clear()
        for name in ("STD", "SAT 1", "dealt"):
            fronts.work_on(host, name)
        return list(called)

    everything = ["train STD", "evaluate STD", "train SAT 1", "evaluate SAT 1", "train dealt", "evaluate dealt"]
    assert work() == everything
    old = tmp_path / "reports_pgd20" / "SAT_1"
    old.mkdir(parents=True)
    assert work() == [] and old.exists()
    (tmp_path / "logs" / "SAT_1.train.done").unlink()
    assert work() == everything[2:] and not old.exists()
    (tmp_path / "logs" / "STD.train.done").unlink()
    assert work() == everything


def test_levels_are_dealt_out_again_as_they_were_noted(tmp_path: Path) -> None:
    from ingredients import Dealt, Noted

    class Method:
        eps: Any = 1.0

        def step(self, objective: Any, images: torch.Tensor, ids: Any, backward: Any = None) -> Any:
            return type("Step", (), {"adversarial": images + objective(images)})

    def stub(**values: Any) -> Any:
        return type("Stub", (), values)

    def noise(images: torch.Tensor) -> torch.Tensor:
        return level.view(-1, 1, 1, 1) * torch.full((1, 1, 2, 2), 0.5)

    method = Method()
    module = stub(run=stub(method=method))
    trainer = stub(current_epoch=0)
    noted = Noted(str(tmp_path / "levels.csv"))
    noted.on_train_start(trainer, module)
    epochs = ([1.0, 2.0, 3.0, 5.0], [4.0, 6.0, 8.0, 10.0])
    for trainer.current_epoch, levels in enumerate(epochs):
        for batch in (levels[:3], levels[3:]):
            level = torch.tensor(batch)
            method.step(noise, torch.zeros(len(batch), 1, 2, 2), [])

    def given(median: bool) -> list[list[float]]:
        dealt, found = Dealt(str(tmp_path / "levels.csv"), seed=1, median=median), []
        for trainer.current_epoch in range(2):
            dealt.on_train_epoch_start(trainer, module)
            found.append([])
            for size in (3, 1):
                dealt.on_train_batch_start(trainer, module, {"image": torch.zeros(size, 1)}, 0)
                found[-1] += method.eps.tolist()
        return found

    shuffled = given(False)
    assert [sorted(one) for one in shuffled] == [list(one) for one in epochs]
    assert shuffled != [list(one) for one in epochs]
    assert given(False) == shuffled
    assert given(True) == [[2.0] * 4, [6.0] * 4]  # torch's median of an even number is the lower one


def test_runs_are_compared_in_the_seeds_that_both_have(fronts: ModuleType) -> None:
    curves = {
        "SAT 1": {0: [1.5, 2.0], 1: [1.7, 2.4]},
        "AMAT": {0: [1.4, 2.1], 1: [1.7, 2.3], 2: [9.0, 9.0]},
    }
    rows = fronts.paired(False, curves, "SAT 1").splitlines()[2:]
    assert rows == ["| AMAT | 2 | +0.050 ± 0.050 | +0.000 ± 0.100 |"]  # +0.1 and 0; -0.1 and +0.1
    assert fronts.paired(True, curves, "SAT 1").splitlines()[2:] == ["| AMAT | 2 | -0.050 ± 0.050 | +0.000 ± 0.100 |"]


class Sums:
    """Sums of values, scaled by a weight that learns; some of its images by their numbers."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, images: Tensor) -> Tensor:
        return images.flatten(1).sum(1, keepdim=True) * self.weight

    def take(self, rows: Tensor) -> Sums:
        return self


def steps_of(callback: Any, method: Any) -> Any:
    """The method's step, as the callback has it."""
    module = type("Module", (), {"run": type("Run", (), {"method": method})})
    callback.on_train_start(None, module)
    return method.step


def test_half_of_a_batch_is_attacked() -> None:
    from ingredients import Halved

    step = steps_of(Halved(), SAT(1.0, steps=1, step_scale=1.0))
    weight = torch.ones((), requires_grad=True)
    images = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 1, 2, 2) / 10
    made = step(Sums(weight), images, ["a", "b", "c", "d"])
    clean = [4 * k / 10 for k in range(4)]  # noise of norm 1 adds 2
    whole = (sum(clean[2:]) / 2 + sum(value + 2 for value in clean[2:]) / 2) / 2
    assert float(made.loss.detach()) == pytest.approx(2 / 3 * whole + sum(clean[:2]) / 2 / 3)


def test_replays_learn_clean_and_then_under_the_noise_that_they_have_found() -> None:
    from ingredients import Replayed

    method = SAT(0.2)
    step = steps_of(Replayed(times=3), method)
    weight, losses = torch.ones((), requires_grad=True), []
    for number in range(6):  # two batches; those that come in between wait in vain
        made = step(Sums(weight), torch.full((1, 1, 2, 2), number / 10), ["a"])
        made.loss.backward()
        losses.append(float(made.loss.detach()))
    assert losses == pytest.approx([0.0, 0.4, 0.4, 1.2, 1.6, 1.6])
    assert float(weight.grad) == pytest.approx(sum(losses))
    assert method.steps_done == 6

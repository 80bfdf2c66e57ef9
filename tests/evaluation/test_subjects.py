"""Several models in one report: what is measured again and what is not, what is drawn, and what is said."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from advmed.attacks import Noise
from advmed.attacks.names import parse_attacks
from advmed.cli.evaluate import compare
from advmed.evaluation.checks import QUESTIONS, probes
from advmed.evaluation.loop import EvaluationBatch, LoadedBatch
from advmed.evaluation.subjects import Subject, with_control
from advmed.files import clickable
from advmed.report import Example, Metric, View
from helpers.evaluations import record_of

pytestmark = pytest.mark.usefixtures("undrawn")

LEVELS = (0, 0.5, 2)
ATTACKS = parse_attacks(["pgd3", "ifgsm2"])
ERROR = Metric("error", lambda scores: float(scores["loss"].mean()), higher_is_better=False, unit="mm")
SHARE = Metric("share", lambda scores: float((scores["loss"] < 1).mean()))


@pytest.fixture
def loads() -> list[str]:
    """The models whose batches were loaded."""
    return []


@pytest.fixture
def subject(tmp_path: Path, loads: list[str]) -> Callable[..., Subject]:
    """A model, its steepness in its file; two batches of two images."""

    def make(name: str, steepness: float = 1.0, margins: Any = None) -> Subject:
        path = tmp_path / f"{name}.ckpt"
        path.write_text(str(steepness))

        def load(number: int) -> LoadedBatch:
            loads.append(name)
            images = torch.rand(2, 1, 4, 5, generator=torch.Generator().manual_seed(number)) * 0.4 - 0.2

            def objective(images: Tensor) -> Tensor:
                return torch.nn.functional.softplus(float(path.read_text()) * images.flatten(1).sum(1, keepdim=True))

            return LoadedBatch(images, objective, lambda images: {"loss": objective(images)[:, 0]})

        batches = [EvaluationBatch([f"{n}a", f"{n}b"], lambda n=n: load(n)) for n in range(2)]
        return Subject(name, path, batches, margins)

    return make


class Drawn:
    """Notes what the pictures were asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any, list[float], list[str]]] = []

    def __call__(self, attack: tuple[str, Any], levels: Sequence[float], ids: Sequence[str]) -> list[Example]:
        self.calls.append((*attack, list(levels), list(ids)))
        image = np.linspace(0, 1, 20).reshape(4, 5)
        views = [View("steep", "", 0, image), View("steep", attack[0], levels[0], image + 0.01, note="as attacked")]
        return [Example("0a", image, None, views)]


def run(folder: Path, subjects: Sequence[Subject], **changes: Any) -> tuple[Path, list[str]]:
    """A comparison; the path of the page, and what was said. A change to ``...`` leaves what it is by default."""
    said: list[str] = []
    given: dict[str, Any] = {
        "examples": Drawn(),
        "fingerprint": {"split": "val"},
        "bounds": (-1.0, 1.0),
        "say": said.append,
        "title": "Two models",
        "level_unit": "L2 norm of the noise",
        "attacks": ATTACKS,
        "levels": LEVELS,
        "metrics": [ERROR, SHARE],
        **changes,
    }
    page = compare(folder, subjects, **{name: value for name, value in given.items() if value is not ...})
    return page, said


def parts(folder: Path, name: str) -> list[Mapping[str, Any]]:
    files = sorted((folder / name / "parts").iterdir())
    return [json.loads(str(np.load(path, allow_pickle=False)["configuration"])) for path in files]


def test_all_models_are_in_one_report(tmp_path: Path, subject: Any, loads: list[str]) -> None:
    models = [subject("steep", 3.0, np.array([2.5])), subject("flat", 0.5, np.array([0.5, 1.5])), subject("bare")]
    page, said = run(tmp_path / "own", models, settings={"data": "x"}, fingerprint={"split": "val", "kept": Path("a")})
    names = [model.name for model in models]
    assert page == tmp_path / "own" / "report.html"
    assert loads == ["steep", "steep", "flat", "flat", "bare", "bare"]
    record = record_of(tmp_path / "own")
    assert list(record["results"]) == ["error", "share"]
    assert list(record["results"]["error"]["models"]) == names
    assert record["title"] == "Two models"
    assert record["configuration"]["level_unit"] == "L2 norm of the noise"
    assert record["configuration"]["settings"] == {"data": "x"}
    margins = {name: (told["n"], told["quantiles"]["0.5"]) for name, told in record["margins"].items()}
    assert margins == {"steep": (1, 2.5), "flat": (2, 1.0)}
    for model, weights in zip(names, ("3.0", "0.5", "1.0"), strict=True):
        curve = record["results"]["error"]["models"][model]["attacks"]["ifgsm2"]
        assert curve["levels"] == [0, 0.5, 2]
        assert curve["values"] == sorted(curve["values"])
        # Noise is added as a control.
        access = {name: told["access"] for name, told in record["attacks"][model].items()}
        assert access == {"pgd3": "white box", "ifgsm2": "white box", "worst attack": "white box", "gaussian": "none"}
        # Numbers are of the file of the model.
        checkpoint = {"checkpoint": hashlib.sha256(weights.encode()).hexdigest()}
        configurations = parts(tmp_path / "own", model)
        assert len(configurations) == 2
        for configuration in configurations:
            assert json.loads(configuration["fingerprint"]) == checkpoint | {"split": "val", "kept": "a"}
            assert configuration["bounds"] == [-1.0, 1.0]
    assert "gaussian noise (control)" in page.read_text()
    assert "gaussian" in said[0]


def test_the_closed_form_of_a_linear_model_within_its_bounds(tmp_path: Path, subject: Any) -> None:
    """The worst noise of length eps adds steepness * eps * sqrt(20) to the sum, and no more than the bounds allow."""
    model = subject("steep", 0.3)
    sums = torch.cat([batch.load().images.flatten(1).sum(1) for batch in model.batches])
    for bounds, limit in (((-1.0, 1.0), 20.0), (None, np.inf), ((-1.0, 0.3), 6.0)):
        folder = tmp_path / f"{limit}"
        run(folder, [model], bounds=bounds, levels=(0, 0.5, 5.5), attacks=parse_attacks(["ifgsm10"]))
        record = record_of(folder)
        found = record["results"]["error"]["models"]["steep"]["attacks"]["ifgsm10"]["values"]
        for level, value in zip((0, 0.5, 5.5), found, strict=True):
            worst = (sums + level * 20**0.5).clamp_max(limit) if level else sums
            assert value == pytest.approx(float(torch.nn.functional.softplus(0.3 * worst).mean()), rel=2e-3)
        evaluation = record["configuration"]["evaluation"]
        assert evaluation["bounds"] == (None if bounds is None else list(bounds))


def test_the_tables_are_said_and_then_the_page(
    tmp_path: Path, subject: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [subject("steep", 3.0), subject("flat", 0.5)]
    page, said = run(tmp_path / "own", models)
    assert len(said) == 3
    assert all(text.startswith("\n") for text in said)
    assert said[-1] == f"\nWhether the attacks are strong enough was not checked.\n\nReport: {clickable(page)}"
    for text, metric in zip(said, (ERROR, SHARE), strict=False):
        lines = text.strip("\n").splitlines()
        assert lines[0].startswith(metric.label)
        blocks = [line for line in lines[2:] if not line.startswith((" ", "*"))]
        assert blocks == ["pgd3", "ifgsm2", "worst attack", "gaussian"]
        results = record_of(tmp_path / "own")["results"][metric.name]["models"]
        rows = iter(line for line in lines[2:] if line.startswith(" "))
        for line, (attack, name) in zip(rows, product(blocks, results), strict=True):
            curve = results[name]["attacks"][attack]
            numbers = [results[name]["clean"], *curve["values"][1:], curve["attacked_mean"], curve["auc_robust"]]
            own_name, *shown = line.replace("*", " ").split()
            assert own_name == name
            digits = [len(word.partition(".")[2]) for word in shown]
            assert shown == [f"{number:.{count}f}" for number, count in zip(numbers, digits, strict=True)]
    capsys.readouterr()
    run(tmp_path / "own", models, say=...)
    assert capsys.readouterr().out == "".join(f"{text}\n" for text in said)  # printed where nobody says how


def test_what_stands_before_the_numbers_of_a_report_is_said_in_the_terminal_too(tmp_path: Path, subject: Any) -> None:
    odd = replace(ERROR, name="gain", higher_is_better=True)  # attacks raise it
    page, said = run(tmp_path / "own", [subject("steep", 3.0)], metrics=[odd])
    record = record_of(tmp_path / "own")
    assert "improves as the noise" in record["cautions"][0]
    warnings = "\n".join(f"WARNING: {note}" for note in record["cautions"])
    unchecked = "Whether the attacks are strong enough was not checked."
    assert said[-1] == f"\n{unchecked}\n{warnings}\n\nReport: {clickable(page)}"


def test_pictures_are_of_the_first_attack_and_of_all_levels_above_nothing(tmp_path: Path, subject: Any) -> None:
    drawn = Drawn()
    page, _ = run(tmp_path / "own", [subject("steep")], examples=drawn)
    assert drawn.calls == [("pgd3", ATTACKS["pgd3"], [0.5, 2], [id_]) for id_ in ("0a", "0b", "1a", "1b")]
    text = page.read_text()
    assert "as attacked" in text
    turned = Drawn()
    run(tmp_path / "turned", [subject("steep")], examples=turned, attacks=dict(reversed(ATTACKS.items())))
    assert turned.calls == [("ifgsm2", ATTACKS["ifgsm2"], [0.5, 2], [id_]) for id_ in ("0a", "0b", "1a", "1b")]


RIGHT = Metric(
    "right", lambda s: float((s["loss"] < 1).mean()), per_sample=lambda s: (s["loss"] < 1) * 1.0, fails_at=0.5
)


def written_at(folder: Path) -> dict[Path, int]:
    """When each finished batch was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("batch_*.npz")}


def checked(model: Subject) -> Subject:
    """With batches for the checks: the first ones."""
    return replace(model, subset=lambda number: model.batches[: number // 2])


def test_a_control_that_was_asked_for_is_the_only_one() -> None:
    assert list(with_control(ATTACKS)) == ["pgd3", "ifgsm2", "gaussian"]
    assert with_control(ATTACKS)["gaussian"] == Noise("gaussian", 2)
    assert with_control(parse_attacks(["pgd3"], norm=np.inf))["gaussian"] == Noise("gaussian", np.inf)
    own = parse_attacks(["uniform", "pgd3"])
    assert with_control(own) == own
    assert with_control({}) == {}


def test_the_attack_is_checked_and_the_verdict_said(tmp_path: Path, subject: Any, loads: list[str]) -> None:
    models = [checked(subject("steep", 3.0)), checked(subject("flat", 0.5))]
    page, said = run(tmp_path / "own", models, checks=2, metrics=[ERROR, RIGHT])
    assert loads == ["steep"] * 3 + ["flat"] * 3
    record = record_of(page.parent)
    for model in ("steep", "flat"):
        assert [one["name"] for one in record["checks"][model]] == list(QUESTIONS)
        assert record["checks"][model][1]["finding"].startswith("right goes from ")  # the metric that knows failures
        (place,) = [path.name for path in (tmp_path / "own" / model).iterdir() if path.name != "parts"]
        assert place in ("checks_2_0.5", "checks_2_2")
        (probed,) = parts(tmp_path / "own" / model, place)
        assert probed["ids"] == ["0a", "0b"]
        assert list(probed["attacks"]) == list(probes(ATTACKS["pgd3"]))
    assert said[-1].startswith(f"\n{record['verdict']['text']}\n\nReport: ")
    assert record["verdict"]["text"] in page.read_text()
    written = written_at(tmp_path / "own")
    run(tmp_path / "own", models, checks=2, metrics=[ERROR, RIGHT])
    assert written_at(tmp_path / "own") == written  # nor are checks made again


@pytest.mark.parametrize("why", ["no checks", "no samples for them", "no attack of ours"])
def test_what_is_not_checked_is_said(tmp_path: Path, subject: Any, why: str) -> None:
    model = subject("steep") if why == "no samples for them" else checked(subject("steep"))
    changes: dict[str, Any] = {"attacks": parse_attacks(["square5"])} if why == "no attack of ours" else {}
    _, said = run(tmp_path / "own", [model], checks=0 if why == "no checks" else 2, **changes)
    assert said[-1].startswith("\nWhether the attacks are strong enough was not checked.")


def test_pictures_are_of_samples_that_fail_first_and_last(tmp_path: Path, subject: Any) -> None:
    """The sum of the pixels decides when a sample of this model fails."""
    model = subject("steep", 0.2)
    sums = {
        id_: float(total)
        for batch in model.batches
        for id_, total in zip(batch.ids, batch.load().images.flatten(1).sum(1), strict=True)
    }
    order = sorted(sums, key=lambda id_: -sums[id_])
    grid = np.linspace(0, 3, 61)
    drawn = Drawn()
    how: dict[str, Any] = {"metrics": [RIGHT], "levels": list(grid), "attacks": parse_attacks(["ifgsm3"])}
    run(tmp_path / "own", [model], examples=drawn, shown=2, **how)
    assert [ids for *_, ids in drawn.calls] == [[order[0]], [order[-1]]]
    none = Drawn()
    page, _ = run(tmp_path / "none", [model], examples=none, shown=0, **how)
    assert none.calls == []
    assert "as attacked" not in page.read_text()
    plain = Drawn()
    run(tmp_path / "plain", [model], examples=plain, shown=3)  # no metric knows failures: at even distances
    assert [ids for *_, ids in plain.calls] == [["0a"], ["0b"], ["1b"]]


def test_groups_are_drawn_whole(tmp_path: Path, subject: Any) -> None:
    page, _ = run(tmp_path / "own", [subject("steep", 3.0)], groups=lambda id_: id_[0])
    assert record_of(page.parent)["bootstrap"]["groups"] == 2
    with np.load(page.parent / "draws.npz") as archive:
        assert len(np.unique(archive["error"][:, 0, 0, 0])) <= 3  # two groups: either twice, or both


def test_what_is_finished_is_not_computed_again(tmp_path: Path, subject: Any) -> None:
    models = [subject("steep", 3.0), subject("flat")]
    _, first = run(tmp_path / "own", models)
    written = written_at(tmp_path / "own")
    assert len(written) == 4
    _, second = run(tmp_path / "own", models)
    assert written_at(tmp_path / "own") == written
    assert first == second


MEASURED, REPORTED = (ValueError, "was measured with another configuration: "), (FileExistsError, "it differs in .*")
BOTH = {"flat": 1.0, "steep": 3.0}


@pytest.mark.parametrize(
    "case",
    [
        ({"steep": 2.0}, {}, MEASURED, "fingerprint"),  # another file of the same name
        ({"steep": 3.0}, {"fingerprint": {"split": "test"}}, MEASURED, "fingerprint"),
        ({"steep": 3.0}, {"seed": 1}, MEASURED, "seed"),
        ({"steep": 3.0}, {"levels": (0, 1)}, MEASURED, "levels"),
        ({"steep": 3.0}, {"attacks": parse_attacks(["pgd3", "ifgsm3"])}, MEASURED, "attacks"),
        ({"steep": 3.0}, {"bounds": None}, MEASURED, "bounds"),
        ({"steep": 3.0}, {"level_unit": "Linf norm"}, REPORTED, r"level_unit\)"),
        (BOTH, {"level_unit": "Linf norm"}, REPORTED, "level_unit"),
        (BOTH, {"settings": {"data": "y"}}, REPORTED, "settings"),
        (BOTH, {}, REPORTED, "models"),
    ],
)
def test_another_evaluation_or_report_is_refused_before_it_is_measured_unless_the_old_one_may_go(
    tmp_path: Path, subject: Any, loads: list[str], case: tuple[Any, ...]
) -> None:
    models, changes, (error, message), what = case

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in (tmp_path / "own").rglob("*") if path.is_file()}

    run(tmp_path / "own", [subject("steep", 3.0)])
    before = files()
    others = [subject(*model) for model in models.items()]
    loads.clear()
    with pytest.raises(error, match=message + what):
        run(tmp_path / "own", others, **changes)
    assert loads == []
    assert files() == before
    page, _ = run(tmp_path / "own", others, overwrite=True, **changes)
    assert loads == [name for name in models for _ in range(2)]
    assert files()[page.with_name("report.json")] != before[page.with_name("report.json")]


def test_models_need_names_of_their_own_and_the_same_samples(tmp_path: Path, subject: Any, loads: list[str]) -> None:
    steep, flat = subject("steep"), subject("flat")
    for models, message in (
        ([steep, steep], "a report needs one or more models of different names"),
        ([], "a report needs one or more models of different names"),
        ([steep, replace(flat, batches=flat.batches[1:])], "flat and steep cannot be compared: their samples differ"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "own", models)
    assert loads == []
    assert not (tmp_path / "own").exists()

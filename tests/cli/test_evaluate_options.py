"""The options of ``evaluate`` and ``thresholds``: one table in three syntaxes, checked before anything is measured."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from advmed.attacks import Attack
from advmed.cli import options
from advmed.cli.evaluate import EvaluationHost, EvaluationOptions, evaluate_models
from advmed.cli.thresholds import Quality, ThresholdsOptions, write_thresholds
from advmed.evaluation.loop import EvaluationBatch, LoadedBatch
from advmed.evaluation.metric import Metric
from advmed.evaluation.subjects import Subject
from advmed.files import clickable
from advmed.thresholds import Thresholds
from helpers.evaluations import record_of
from helpers.hosts import as_on_a_terminal

DEFAULTS = {option.name: option.default for option in options.EVALUATE}


def made(**given: Any) -> EvaluationOptions:
    return EvaluationOptions.of({**DEFAULTS, **given}, ["a"], models="models", option="--names")


# The three syntaxes


def by_argparse(words: Sequence[str]) -> Mapping[str, Any]:
    parser = argparse.ArgumentParser()
    options.add_options(parser, options.EVALUATE, out="-o")
    return vars(parser.parse_args(list(words)))


def by_jsonargparse(words: Sequence[str]) -> Mapping[str, Any]:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    options.add_typed_options(parser, options.EVALUATE)
    return vars(parser.parse_args(list(words)))


def by_key_values(words: Sequence[str]) -> Mapping[str, Any]:
    from ultralytics.cfg import parse_key_value_pair

    return options.key_values(options.EVALUATE, dict(map(parse_key_value_pair, words)))


WORDS = {
    by_argparse: "--names A B --norm 2 inf --levels 0 1 2.5 --levels_inf 0 0.1 --attacks pgd3 ifgsm2 --samples 7 "
    "--examples 1 --checks 0 --seed 3 -o here --overwrite",
    by_jsonargparse: "--names [A,B] --norm [2,inf] --levels [0,1,2.5] --levels_inf [0,0.1] --attacks [pgd3,ifgsm2] "
    "--samples 7 --examples 1 --checks 0 --seed 3 --out here --overwrite true",
    by_key_values: "names=A,B norm=2,inf levels=0,1,2.5 levels_inf=0,0.1 attacks=pgd3,ifgsm2 samples=7 examples=1 "
    "checks=0 seed=3 out=here overwrite=True",
}


@pytest.mark.parametrize("read", WORDS)
def test_the_same_options_and_defaults_in_every_syntax(read: Any) -> None:
    found = EvaluationOptions.of(read(WORDS[read].split()), ["x", "y"], models="models", option="--names")
    wanted = EvaluationOptions(
        names=("A", "B"),
        norms=(2.0, math.inf),
        levels=(0.0, 1.0, 2.5),
        levels_inf=(0.0, 0.1),
        attacks=("pgd3", "ifgsm2"),
        samples=7,
        examples=1,
        checks=0,
        seed=3,
        out=Path("here"),
        overwrite=True,
    )
    assert found == wanted
    by_default = EvaluationOptions.of(read([]), ["x", "y"], models="models", option="--names")
    assert by_default == EvaluationOptions(
        ("x", "y"), (2.0,), None, None, ("pgd100", "ifgsm10"), None, 4, 32, 0, Path("report"), False
    )


@pytest.mark.parametrize("word", ["norm=inf", "norm=2", "levels=0,1", "levels=[0, 1]", "levels=(0,1)", "attacks=pgd3"])
def test_a_value_alone_is_a_list_of_one(word: str) -> None:
    found = by_key_values([word])[word.partition("=")[0]]
    wanted = {"inf": ["inf"], "2": ["2"], "pgd3": ["pgd3"]}.get(word.partition("=")[2], [0, 1])
    assert [str(value) for value in found] == [str(value) for value in wanted]


def test_a_number_where_a_text_is_asked_for_is_a_text() -> None:
    found = by_key_values(["names=1,2", "out=2024", "samples=3"])
    assert (found["names"], found["out"], found["samples"]) == (["1", "2"], "2024", 3)


def test_an_option_without_a_default_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    options.add_options(parser, options.with_defaults(options.EVALUATE, out=None), out="-o")
    with pytest.raises(SystemExit):
        parser.parse_args([])
    assert "required: -o/--out" in capsys.readouterr().err


# What they may be


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"samples": 0}, "samples must be a whole number >= 1, got 0"),
        ({"samples": 2.5}, "samples must be a whole number >= 1, got 2.5"),
        ({"examples": -1}, "examples must be a whole number >= 0, got -1"),
        ({"checks": True}, "checks must be a whole number >= 0, got True"),
        ({"checks": "some"}, "checks must be a whole number >= 0, got 'some'"),
        ({"seed": 0.5}, "seed must be a whole number, got 0.5"),
        ({"levels": [1, 2]}, "must be finite, start at 0"),
        ({"levels": [0, "a"]}, "levels must be numbers, got 0, a"),
        ({"levels_inf": [0, 2, 1]}, "increase strictly"),
        ({"norm": [1]}, "norm must be 2 or inf, got 1"),
        ({"norm": ["L2"]}, "norm must be 2 or inf, got 'L2'"),
        ({"norm": []}, "one or more norms"),
        ({"attacks": []}, "one or more attacks"),
        ({"names": ["A", "B"]}, r"1 models need 1 different names, got \['A', 'B'\]; set them with --names"),
    ],
)
def test_a_mistake_is_told_when_the_options_are_made(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(**given)


@pytest.mark.parametrize("name", ["", " ", ".", "..", "../x", "a/b", "a\\b", "a\nb", "a\0", "n" * 101, "report.html"])
def test_a_name_that_is_none_of_a_folder_is_told_before_anything_is_measured(name: str) -> None:
    with pytest.raises(ValueError, match="a model's name"):
        made(names=[name])


def test_models_of_one_name_are_told_apart() -> None:
    with pytest.raises(ValueError, match=r"2 runs need 2 different names, got \['a', 'a'\]; set them with names=A,B"):
        EvaluationOptions.of(DEFAULTS, ["a", "a"], models="runs", option="names=A,B")


def test_a_norm_counts_once_and_whose_the_levels_are() -> None:
    assert made(norm=[2, "inf", "2", 2.0]).norms == (2.0, math.inf)
    two, one = (0.0, 1.0), (0.0, 0.5)
    both = made(norm=[2, "inf"], levels=two)
    assert (both.levels_of(2), both.levels_of(math.inf)) == (two, None)
    both = made(norm=[2, "inf"], levels=two, levels_inf=one)
    assert (both.levels_of(2), both.levels_of(math.inf)) == (two, one)
    assert made(norm=["inf"], levels=two).levels_of(math.inf) == two  # of the only norm
    assert made(norm=["inf"], levels=two, levels_inf=one).levels_of(math.inf) == one
    assert made(levels_inf=one).levels_of(2) is None


# The evaluation


class Linear(EvaluationHost):
    """A host of one model: the loss is the sum of the pixels, 4 x 5 of them."""

    def __init__(self, path: Path, apart: bool = False) -> None:
        self.path, self.seen, self.loaded = path, [], 0
        self.folder_per_norm = apart  # type: ignore[misc]  # of the class otherwise
        path.write_text("weights")

    def default_levels(self, norm: float) -> list[float]:
        return [0, 0.25] if norm == math.inf else [0, 1, 2]

    @property
    def subjects(self) -> list[Subject]:
        def load() -> LoadedBatch:
            self.loaded += 1

            def objective(images: Tensor) -> Tensor:
                return images.flatten(1).sum(1, keepdim=True)

            return LoadedBatch(torch.zeros(2, 1, 4, 5), objective, lambda x: {"loss": objective(x)[:, 0]})

        batches = [EvaluationBatch(["0", "1"], load)]
        return [Subject("a", self.path, batches, subset=lambda number: batches)]

    @property
    def metrics(self) -> list[Metric]:
        return [Metric("loss", lambda scores: float(scores["loss"].mean()), higher_is_better=False)]

    def examples(self, attack: tuple[str, Attack], levels: Any, ids: Any, *, seed: int) -> list[Any]:
        self.seen.append((attack[0], attack[1].norm, list(levels), list(ids), seed))
        return []

    data_name, measured_over = "toys", "the toy"
    groups: Any = None
    settings: dict[str, Any] = {"kind": "toy"}  # noqa: RUF012 - as the properties of a host
    fingerprint: dict[str, Any] = {}  # noqa: RUF012 - the same


@pytest.fixture
def host(tmp_path: Path, undrawn: None) -> Linear:
    return Linear(tmp_path / "model.ckpt")


def report(host: Linear, **given: Any) -> tuple[Path, dict[str, Any]]:
    """The page of the only norm, and the record beside it."""
    (page,) = evaluate_models(host, made(**{"attacks": ["ifgsm1"], "checks": 0, **given}), say=lambda text: None)
    return page, record_of(page.parent)


def test_a_report_for_each_norm(host: Linear, tmp_path: Path) -> None:
    """Of a sum of 20 pixels, noise of level e adds e * sqrt(20) in L2 and e * 20 in Linf."""
    said: list[str] = []
    given = made(norm=[2, "inf"], attacks=["ifgsm4"], examples=1, checks=0, seed=5, out=tmp_path / "out")
    pages = evaluate_models(host, given, say=said.append)
    assert pages == [tmp_path / "out" / kind / "report.html" for kind in ("L2", "Linf")]
    for page, kind, levels, factor in zip(pages, ("L2", "Linf"), ([0, 1, 2], [0, 0.25]), (20**0.5, 20), strict=True):
        assert page.is_file()
        found = record_of(page.parent)
        assert found["title"] == f"Robustness of a on toys in {kind}"
        assert found["configuration"]["level_unit"] == f"{kind} norm of the noise over the toy"
        curve = found["results"]["loss"]["models"]["a"]["attacks"]["ifgsm4"]
        assert curve["levels"] == levels
        assert curve["values"] == pytest.approx([level * factor for level in levels], rel=1e-4)
        assert f"Report: {clickable(page)}" in "".join(said)
    assert host.seen == [
        ("ifgsm4", 2.0, [1, 2], ["0"], 5),
        ("ifgsm4", math.inf, [0.25], ["0"], 5),
    ]


def test_a_host_newer_than_what_was_tested_is_pointed_out(
    host: Linear, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("advmed.versions._told", set())
    monkeypatch.setattr("advmed.versions.newer_than_tested", lambda packages: [f"{name} is new" for name in packages])
    host.packages = ("torch",)  # type: ignore[misc]  # as below
    said: list[str] = []
    given = made(norm=[2, "inf"], attacks=["ifgsm4"], examples=0, checks=0, out=tmp_path / "out")
    evaluate_models(host, given, say=said.append)
    assert [line for line in said if "is new" in line] == ["WARNING: torch is new"]


def test_options_and_what_the_host_says_reach_the_numbers(host: Linear, tmp_path: Path) -> None:
    host.bounds, host.groups = (-1.0, 0.1), lambda id_: "all"  # type: ignore[misc]  # bounds are of the class otherwise
    _, found = report(host, attacks=["ifgsm4"], checks=2, seed=5, out=tmp_path / "out")
    assert found["configuration"]["evaluation"]["seed"] == 5
    assert found["results"]["loss"]["models"]["a"]["attacks"]["ifgsm4"]["values"] == pytest.approx([0, 2, 2])
    assert [path.name for path in (tmp_path / "out" / "a").glob("checks_2_*")]
    assert found["checks"]["a"]
    assert found["bootstrap"]["groups"] == 1


def test_an_evaluation_shows_how_far_it_is(
    host: Linear, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    as_on_a_terminal(monkeypatch)
    report(host, examples=2, checks=2, out=tmp_path / "out")
    shown = capsys.readouterr().err
    # clean, and two attacks at two levels, of one batch; a curve for each attack; two samples
    for text in ("a: 100%", "5/5 passes", "a/checks_2_1: 100%", "intervals: 100%", "2/2 curves", "2/2 samples"):
        assert text in shown, text


def test_a_report_is_written_even_if_its_pictures_fail(
    host: Linear, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*what: Any, **how: Any) -> list[Any]:
        raise RuntimeError("no font for this")

    monkeypatch.setattr(Linear, "examples", fail)
    page, found = report(host, examples=1, out=tmp_path / "out")
    assert found["results"]["loss"]["models"]["a"]["clean"] == 0
    assert page.is_file()
    assert "the report has no pictures of samples: RuntimeError: no font for this" in caplog.text


@pytest.mark.parametrize(("apart", "place", "title"), [(False, "", "a on toys"), (True, "Linf", "a on toys in Linf")])
def test_a_report_of_one_norm_is_where_the_host_has_it(
    tmp_path: Path, undrawn: None, apart: bool, place: str, title: str
) -> None:
    host = Linear(tmp_path / "model.ckpt", apart)
    page, found = report(host, norm=["inf"], levels=[0, 0.5], out=tmp_path / "out")
    assert page == tmp_path / "out" / place / "report.html"
    assert found["title"] == f"Robustness of {title}"
    assert found["configuration"]["evaluation"]["levels"] == [0, 0.5]


def test_another_report_in_the_way_is_told_before_the_first_norm_is_measured(host: Linear, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report(host, norm=["inf"], out=out / "Linf")
    host.loaded = 0
    host.settings = {"kind": "another"}
    both = {"norm": [2, "inf"], "attacks": ["ifgsm1"], "checks": 0, "out": out}
    with pytest.raises(FileExistsError, match=r"Linf already holds .*it differs in settings"):
        evaluate_models(host, made(**both), say=lambda text: None)
    assert host.loaded == 0
    assert not (out / "L2").exists()
    evaluate_models(host, made(**both, overwrite=True), say=lambda text: None)
    assert record_of(out / "Linf")["configuration"]["settings"] == {"kind": "another"}


def test_attacks_are_read_before_models_are_loaded(
    host: Linear, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Linear, "subjects", property(lambda self: pytest.fail("loaded")))
    with pytest.raises(ValueError, match="unknown attack 'pgd'"):
        report(host, attacks=["pgd"], out=tmp_path / "out")


# Thresholds


def test_a_rule_is_checked() -> None:
    assert ThresholdsOptions.of({"rule": None, "out": None}) == ThresholdsOptions(None, None)
    assert ThresholdsOptions.of({"rule": "mean+2std", "out": "x.json"}).out == Path("x.json")
    with pytest.raises(ValueError, match="must be 'mean' or"):
        ThresholdsOptions.of({"rule": "mode", "out": None})


def test_where_thresholds_go_is_looked_at_before_they_are_measured(tmp_path: Path) -> None:
    beside = tmp_path / "thresholds.json"

    def destination(out: Any, default: Path = beside) -> Path:
        return ThresholdsOptions.of({"rule": None, "out": out}).destination(default)

    assert destination(None) == beside
    assert destination(str(tmp_path / "own.json")) == tmp_path / "own.json"
    assert not list(tmp_path.iterdir())
    with pytest.raises(IsADirectoryError, match=r"is a folder; name a file \(out"):
        destination(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"t.json cannot be written to .*none \(No such file"):
        destination(None, tmp_path / "none" / "t.json")


@pytest.mark.parametrize(("dice", "poor"), [(0.59, True), (0.6, False), (None, False)])
def test_thresholds_are_written_and_said(tmp_path: Path, dice: float | None, poor: bool) -> None:
    said: list[str] = []
    path = tmp_path / "t.json"
    measured = Thresholds(
        (0.5, 2.0), ("ce", "dice"), rule="mean", mean=(0.5, 2.0), std=(0.1, 0.25), n=7, median=(0.4, 1), spread=(0, 0.5)
    )
    quality = None if dice is None else Quality("Mean Dice", dice, least=0.6)
    write_thresholds(measured, path, of="clean images", quality=quality, hint="Train with it", say=said.append)
    assert Thresholds.load(path) == measured
    assert said[:3] == [
        "7 clean images: ce < 0.5, dice < 2",
        "  ce: threshold 0.5000 (mean; mean 0.5000, std 0.1000, median 0.4000, spread 0.0000)",
        "  dice: threshold 2.0000 (mean; mean 2.0000, std 0.2500, median 1.0000, spread 0.5000)",
    ]
    assert ("Mean Dice of that network on these samples: 0.590." in said) == poor
    assert any(line.startswith("WARNING: this network is poorly trained") for line in said) == poor
    assert said[-1] == f"Written to {path}. Train with it"

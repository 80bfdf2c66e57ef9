"""Settings of the methods: which of them a method gets, and what is refused before anything runs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from advmed.methods import DPAAT, METHODS, method_class
from advmed.thresholds import Thresholds
from advmed.training.run import without_use
from advmed.training.settings import TrainingSettings, make_settings, read_settings, settings_text

BAD = [-0.5, math.nan, math.inf, -math.inf]
ATTACK: dict[str, Any] = {"steps": 7, "step_scale": 2.5, "norm": math.inf, "bounds": (0.0, 1.0), "seed": 5}


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        (
            "DPAAT",
            {"eps_min": 0.25, "eps_max": 0.75, "step_size": 0.125, "sync_weight": 2.0, "average": "epoch"},
            {"eps_0": 0.5, "lowest": 0.25, "highest": 0.75, "step_size": 0.125, "sync_weight": 2.0, "average": "epoch"},
        ),
        ("DPAAT", {}, {"lowest": 0.0, "highest": 1.0, "step_size": 0.05, "sync_weight": 1.0, "average": "batch"}),
        ("TRADES", {"beta": 3.0}, {"eps": 0.5, "beta": 3.0}),
        ("TRADES", {}, {"beta": 6.0}),
        ("MART", {"kl_weight": 2.5}, {"eps": 0.5, "kl_weight": 2.5}),
        ("FAT", {"tau": 3}, {"eps": 0.5, "tau": 3}),
    ],
)
@pytest.mark.parametrize("random_start", [0.0, 0.3, 1.0])
def test_a_method_gets_its_settings(
    name: str, settings: dict[str, Any], expected: dict[str, Any], random_start: float
) -> None:
    method = TrainingSettings(eps=0.5, random_start=random_start, **settings, **ATTACK).make_method(name)
    assert type(method) is METHODS[name]
    assert {key: getattr(method, key) for key in expected} == expected
    attack = {key: getattr(method.attack, key) for key in ("steps", "step_scale", "norm")}
    assert attack | {"bounds": method.bounds, "seed": method.seed} == ATTACK
    # TRADES never starts on the image.
    assert method.attack.random_start == (0.01 if name == "TRADES" and not random_start else random_start)


@pytest.mark.parametrize(
    ("name", "given", "unused"),
    [
        ("SAT", {"eps": 0.5, "steps": 3, "delta": 0.25, "margin_of": "any"}, ["delta", "margin_of"]),
        ("SAT", {"awp": 0.01, "ramp": 0.5, "decay": "late", "seed": 3, "preset": "paper"}, []),
        ("SAT", {"beta": 6.0, "eps_max": None}, []),  # the defaults
        ("SAT", {"rule": "mean", "thresholds": "file.json"}, ["rule", "thresholds"]),
        ("FAT", {"rule": "mean", "tau": 2, "beta": 2.0}, ["beta"]),
        ("AMAT", {"eps": 0.5, "rule": "mean", "delta": 0.25, "tau": 2, "sync_weight": 2.0}, ["tau", "sync_weight"]),
        ("STD", {"eps": 0.5, "steps": 3, "awp": 0.01, "ramp": 0.5}, ["awp", "ramp"]),  # validation attacks by eps
    ],
)
def test_what_is_set_for_another_method_is_named(name: str, given: dict[str, Any], unused: list[str]) -> None:
    settings = TrainingSettings(**given)
    assert sorted(settings.without_use(name)) == sorted(unused)
    lines = without_use(name, settings)
    assert [line.partition(":")[0] for line in lines] == [f"Set, and without any effect on {name}"] * bool(unused)
    assert all(setting in line for line in lines for setting in unused)


def test_what_the_host_chose_by_itself_was_not_set() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Hosts(TrainingSettings):
        margin_min: float | None = 0.125

    assert Hosts().without_use("SAT") == []
    assert Hosts(margin_min=0.25).without_use("SAT") == ["margin_min"]


def test_every_method_is_known_by_its_name() -> None:
    assert {name: kind.name for name, kind in METHODS.items()} == {name: name for name in METHODS}
    for name in METHODS:
        thresholds = Thresholds((1.0,), ("loss",)) if name == "AMAT" else None
        assert type(TrainingSettings(eps=0.5, delta=0.5).make_method(name, thresholds)) is METHODS[name]
    assert [name for name in METHODS if method_class(name).keeps_sizes] == ["AMAT", "DPAAT"]
    with pytest.raises(
        ValueError, match=r"^unknown method 'PAT'; there are STD, AT, SAT, AMAT, TRADES, DPAAT, MART, FAT$"
    ):
        TrainingSettings(eps=0.5).make_method("PAT")


@pytest.mark.parametrize("name", ["AT", "SAT", "TRADES", "DPAAT", "MART", "FAT"])
def test_a_radius_is_needed(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} needs eps, the radius of its noise$"):
        TrainingSettings().make_method(name)


def test_passes_that_are_compared_cannot_be_back_propagated_one_after_the_other() -> None:
    apart = TrainingSettings(eps=0.5, backward="sequential")
    alone = replace(apart, sync_weight=0)
    for name, settings in (("TRADES", apart), ("DPAAT", apart), ("MART", apart), ("TRADES", alone)):
        message = (
            f"^{name} compares the predictions of its two passes, which therefore cannot be back-propagated one after "
            "the other: use backward 'together'$"
        )
        with pytest.raises(ValueError, match=message):
            settings.make_method(name)
        assert isinstance(TrainingSettings(eps=0.5).make_method(name), METHODS[name])
    assert isinstance(alone.make_method("DPAAT"), DPAAT)
    assert isinstance(apart.make_method("SAT"), METHODS["SAT"])


SIZES = "perturbation sizes need eps_min <= eps <= eps_max, got {}$"
FINITE = "{} must be a finite number {}, got {}$"
NUMBERS = ("eps", "eps_min", "eps_max", "step_size", "sync_weight")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        *(({name: value}, FINITE.format(name, ">= 0", value)) for name in NUMBERS for value in BAD),
        *(({"beta": value}, FINITE.format("beta", "> 0", value)) for value in (*BAD, 0.0)),
        ({"eps": 0.5, "eps_min": 0.75}, SIZES.format("eps_min 0.75, eps 0.5, eps_max 1")),
        ({"eps": 0.5, "eps_max": 0.25}, SIZES.format("eps_min 0, eps 0.5, eps_max 0.25")),
        ({"eps": 0.5, "eps_min": 2.0, "eps_max": 3.0}, SIZES.format("eps_min 2, eps 0.5, eps_max 3")),
        ({"average": "x"}, "average must be 'batch' or 'epoch', got 'x'"),
        ({"sync_weight": None}, "sync_weight must be a number, got None"),
        ({"beta": "big"}, "beta must be a number, got 'big'"),
        ({"step_size": True}, "step_size must be a number or null, got True"),
        ({"rule": "boundary", "thresholds": "t.json"}, "the rule 'boundary' is about no network's losses: .*t.json$"),
        ({"eps_mim": 1}, "unknown setting 'eps_mim', did you mean 'eps_min'\\?"),
        ({"backward": "apart"}, "backward must be 'together' or 'sequential', got 'apart'"),
    ],
)
def test_a_wrong_value_is_named(values: dict[str, Any], message: str) -> None:
    """In a file, and what is of the right type without one, too."""
    with pytest.raises(ValueError, match=f"^file: {message}"):
        make_settings(TrainingSettings, values, "file")
    if message.endswith("$") or "average" in values:
        with pytest.raises(ValueError, match=f"^{message}"):
            TrainingSettings(**values)


def test_zero_is_a_number_and_sizes_may_wait_for_the_hosts_default() -> None:
    TrainingSettings(eps=0, eps_min=0, eps_max=0, step_size=0, sync_weight=0)
    TrainingSettings(eps_min=0.75)


def test_what_is_written_can_be_read(tmp_path: Path) -> None:
    settings = TrainingSettings(
        eps=0.5, eps_min=0.1, eps_max=1.5, step_size=0.0, sync_weight=0.3, average="epoch", beta=1.0, **ATTACK
    )
    path = tmp_path / "adversarial.yaml"
    path.write_text(settings_text(settings, method="DPAAT"))
    assert read_settings(TrainingSettings, path) == settings
    path.write_text("eps: 1\nstep_size: null\nsync_weight: 2\naverage: epoch\n")
    method = read_settings(TrainingSettings, path).make_method("DPAAT")
    assert isinstance(method, DPAAT)
    assert (method.eps_0, method.step_size, method.sync_weight, method.average) == (1.0, 0.1, 2.0, "epoch")


def test_amat_keeps_its_bounds_to_itself() -> None:
    """The bounds of one method are not those of the other."""
    settings = TrainingSettings(eps=0.5, delta=0.5, margin_min=0.25, margin_max=2.0, eps_min=0.125, eps_max=0.75)
    amat, dpaat = settings.make_method("AMAT", Thresholds((1.0,), ("loss",))), settings.make_method("DPAAT")
    assert (amat.lowest, amat.highest, amat.growth, amat.store.additive) == (0.25, 2.0, 0.5, False)
    assert (dpaat.lowest, dpaat.highest, dpaat.growth, dpaat.store.additive) == (0.125, 0.75, 0.05, True)

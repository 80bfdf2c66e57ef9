"""Settings of our own beside those of the core: every wrong value is named, and says what would be right."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from adv_nnunet.settings import Settings
from advmed.training.settings import make_settings, read_settings

WRONG = [
    ({"detla": 0.5}, "unknown setting 'detla', did you mean 'delta'\\?.*The settings are: .*eps, .*delta,"),
    ({"steps": 0}, "steps must be a whole number >= 1, got 0"),
    ({"steps": True}, "steps must be a whole number or null, got True"),
    ({"eps": "big"}, "eps must be a number or null, got 'big'"),
    ({"delta": 0}, "delta must be a finite number > 0, got 0"),
    ({"rule": "mode"}, "the rule for thresholds must be 'mean' or 'mean\\+<number>std'"),
    ({"bounds": [1, 0]}, "lowest < highest"),
    ({"bounds": [0, 1, 2]}, "bounds must be a pair of numbers or 'sample' or null"),
    ({"warmup_epochs": -1}, "warmup_epochs must be >= 0, got -1"),
    ({"epochs": 0}, "epochs must be >= 1, got 0"),
    ({"iterations_per_epoch": 0}, "iterations_per_epoch must be >= 1, got 0"),
    ({"initial_lr": 0}, "initial_lr must be a positive number"),
    ({"sample_id": "patch"}, "sample_id must be 'auto' or 'case' or 'slice' or 'part' or 'cell', got 'patch'"),
    ({"terms": "both"}, "terms must be 'sum' or 'separate'"),
    ({"tag": "a/b"}, "tag may hold letters, digits"),
    ({"compile": 1}, "compile must be true or false or null, got 1"),
    ({"attack_precision": "float16"}, "attack_precision must be 'host' or 'float32' or 'bfloat16'"),
    ({"episodes": 3, "steps": "many", "eps": "big"}, "unknown setting 'episodes'.*steps must be.*eps must be"),
]


@pytest.mark.parametrize(("values", "message"), WRONG, ids=str)
def test_a_wrong_value_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s)^adversarial.yaml: .*{message}"):
        make_settings(Settings, values, "adversarial.yaml")


def test_defaults_by_the_size_of_the_input() -> None:
    """The paper's delta for 56 x 40 pixels is 0.5, for 320 x 320 it is 3."""
    small, large = Settings().resolved(1, [56, 40]), Settings().resolved(1, [320, 320])
    assert small.delta == pytest.approx(0.01 * math.sqrt(56 * 40), abs=1e-4)
    assert (large.delta, large.eps) == pytest.approx((3.2, 32))
    assert (small.sample_id, Settings().resolved(1, [40, 56, 40]).sample_id) == ("slice", "part")
    assert Settings().resolved(2, [320, 320]).delta == pytest.approx(0.01 * math.sqrt(2 * 320 * 320), abs=1e-4)
    assert Settings(norm=math.inf).resolved(1, [56, 40]).eps == 0.1
    assert Settings(delta=0.7, eps=3.0).resolved(1, [56, 40]).delta == 0.7


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("a: [1", "is not a YAML file"),
        ("- 1\n", "must hold 'name: value'"),
        ("# nothing yet\n", Settings()),
        ("initial_lr: 1e-3\nnorm: inf\n", Settings(initial_lr=0.001, norm=math.inf)),  # texts to YAML
    ],
)
def test_what_a_file_says(tmp_path: Path, text: str, result: Any) -> None:
    path = tmp_path / "adversarial.yaml"
    path.write_text(text)
    if isinstance(result, Settings):
        assert read_settings(Settings, path) == result
    else:
        with pytest.raises(ValueError, match=result):
            read_settings(Settings, path)

"""Mistakes that a command tells in the words of its host, each before anything is trained.

One of the network, one of the module and one of the data: what else is told is tested where it is found.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from advmed.testing.lightning import LightningHost
from helpers.classify import Classify
from helpers.landmark import Landmark
from helpers.mistakes import told

MISTAKES: dict[str, list[tuple[dict[str, Any], str]]] = {
    "adv-classify": [
        ({"model__network__name": "resnet81"}, "timm has no model 'resnet81'; near names are resnet18"),
        ({"model__label_smoothing": 1.0}, "label_smoothing must be in [0, 1), got 1.0"),
        ({"data__file": "none.npz"}, "there is no file none.npz"),
        ({"data__colour": 1}, "is not accepted by adv_classify.MedMNIST: adv-classify fit --data.help"),
    ],
    "adv-landmark": [
        ({"model__network__encoder": "resnet81"}, "there is no encoder 'resnet81'; near names are"),
        ({"model__heatmap": "gauss"}, "Got value: gauss"),
        ({"model__landmark_names": "[a]"}, "landmark_names"),  # the data's
        ({"data__size": "[16,16]"}, "the radius of a landmark, 0.8 pixels, must be at least 1"),
        ({"data__root": "none"}, "there is no table none/landmarks.csv"),
        ({"data__colour": 1}, "is not accepted by adv_landmark.LandmarkTable: adv-landmark fit --data.help"),
        ({"data__origin": "edge"}, "edge"),
    ],
}


def test_mistakes(host: LightningHost) -> None:
    for changes, message in MISTAKES[host.module.command]:
        assert message in host.refused(**changes)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("batch_size", 0, "batch_size must be >= 1, got 0"),
        ("channels", 2, "channels must be 1 or 3, got 2"),
        ("channels", 0, "channels must be 1 or 3, got 0"),
        ("size", 0, "size must be >= 1, got 0"),
        ("size", (8, -4), "size must be >= 1, got (8, -4)"),
        ("rotate", 181.0, "rotate must be between 0 and 180, got 181.0"),
        ("rotate", -1.0, "rotate must be between 0 and 180, got -1.0"),
        ("zoom", 0.95, "zoom must be between 0 and 0.9, got 0.95"),
        ("color", math.nan, "color must be between 0 and 1, got nan"),
    ],
)
def test_options_of_the_images_out_of_their_range(host: LightningHost, name: str, value: Any, message: str) -> None:
    told(ValueError, lambda: host.read(**{name: value}), message)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named_whoever_reads_it(tmp_path: Path, workers: int) -> None:
    host = Landmark(tmp_path / "host")
    path = host.root / "images" / "train3.png"
    path.write_bytes(path.read_bytes()[:-400])
    message = host.fails("fit", *host.words(tmp_path, data__workers=workers))
    assert "images/train3.png cannot be read as an image" in message
    assert "\n" not in message


def test_images_that_a_network_does_not_take(tmp_path: Path) -> None:
    host = Classify(tmp_path / "host")
    message = host.fails("fit", *host.words(tmp_path, model__network__name="test_vit3"))
    assert "Input height (16) doesn't match model (160)" in message
    assert not list(tmp_path.rglob("metrics.csv"))

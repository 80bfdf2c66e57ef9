"""Known ways to fool an evaluation, each planted in a trained network and pointed out; honest networks are not.

What is planted in gradients and inputs, and random layers, is in ``test_checks.py``; here is what is not about them.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from advmed.attacks import APGD, DLR, Margin, Standard, parse_attacks
from advmed.classification import ClassificationObjective
from advmed.evaluation.checks import Check, check, level_to_check, probes
from advmed.evaluation.loop import EvaluationBatch, LoadedBatch, evaluate
from advmed.evaluation.metric import Metric
from advmed.report.summary import Entry, cautions, findings, tabulate
from helpers.evaluations import mean_of
from helpers.tensors import seeded

ACCURACY = mean_of("correct", "accuracy", fails_at=0.5, is_mean=True)
LEVELS = (0.0, 0.2, 0.4, 0.8)


class Scaled(nn.Module):
    """Logits times a number, which changes no decision."""

    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, images: Tensor) -> Tensor:
        return self.factor * self.model(images)


class Normalised(nn.Module):
    """A batch normalisation before the network, which has seen the images once."""

    def __init__(self, model: nn.Module, images: Tensor, training: bool) -> None:
        super().__init__()
        self.norm, self.model = nn.BatchNorm2d(1, momentum=1.0), model
        with torch.no_grad():
            self.norm.train()(images)
            mean, deviation = images.mean(), images.std()
            self.norm.weight.fill_(deviation)
            self.norm.bias.fill_(mean)
        self.norm.train(training)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(self.norm(images))


def batches(chest: SimpleNamespace, model: nn.Module, number: int = 60) -> list[EvaluationBatch]:
    images, labels = (part[:number] for part in chest.xrays())

    def load() -> LoadedBatch:
        return LoadedBatch(
            images,
            ClassificationObjective(model, labels),
            lambda x: {"correct": (model(x).argmax(1) == labels).float()},
        )

    return [EvaluationBatch([str(i) for i in range(number)], load)]


def checked(chest: SimpleNamespace, model: nn.Module, name: str = "pgd10") -> dict[str, Check]:
    attack = parse_attacks([name])[name]
    how: dict[str, Any] = {"bounds": (0.0, 1.0), "seed": 0}
    own = evaluate(batches(chest, model), {name: attack}, LEVELS, **how)
    level = level_to_check(own, name, ACCURACY)
    probed = evaluate(batches(chest, model), probes(attack), (0.0, level), **how)
    return {one.name: one for one in check(own, name, probed, ACCURACY)}


def failed(found: dict[str, Check]) -> set[str]:
    return {name for name, one in found.items() if one.verdict == "failed"}


def test_saturated_logits_hide_their_gradients_from_a_cross_entropy(chest: SimpleNamespace) -> None:
    model = chest.trained("standard", 0)
    assert failed(checked(chest, Scaled(model, 1e5))) >= {"noise", "unlimited"}
    assert not failed(checked(chest, model, "pgd20"))
    # The ensemble is not fooled: its ratios of differences do not know the scale.
    images, labels = (part[:60] for part in chest.xrays())
    errors = {}
    for factor in (1.0, 1e5):
        objective = ClassificationObjective(Scaled(model, factor), labels)
        for name, attack in {
            "pgd": parse_attacks(["pgd10"])["pgd10"],
            "dlr": APGD(20, loss=DLR()),
            "margin": APGD(20, loss=Margin()),
            "standard": Standard("classification", steps=20, queries_of_square=20),
        }.items():
            found = attack(objective, images, 0.2, bounds=(0.0, 1.0), generator=seeded(0))
            errors[name, factor] = objective.terms_and_errors(found.images)[1].float().mean().item()
    assert errors["pgd", 1e5] < errors["pgd", 1.0] - 0.2
    for name in ("dlr", "margin", "standard"):
        assert errors[name, 1e5] == pytest.approx(errors[name, 1.0], abs=0.02)
    assert errors["standard", 1e5] >= errors["pgd", 1.0]


@pytest.mark.parametrize("training", [True, False])
def test_a_network_that_looks_at_the_rest_of_the_batch_is_found(chest: SimpleNamespace, training: bool) -> None:
    model = Normalised(chest.trained("standard", 0), chest.xrays()[0], training)
    found = checked(chest, model, "pgd20")
    assert failed(found) == ({"repeatable"} if training else set())
    assert ("BatchNorm in evaluation mode" in found["repeatable"].finding) == training


CUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "detached": lambda x: x.detach(),
    "through NumPy": lambda x: torch.from_numpy(x.detach().numpy().copy()),
    "rounded to integers": lambda x: (255 * x).long() / 255,
}


@pytest.mark.parametrize("cut", CUTS)
def test_a_gradient_that_is_cut_is_an_error_and_no_robustness(cut: str) -> None:
    """Of a segmentation head, here a convolution."""
    torch.manual_seed(0)
    features, head = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 2, 1)

    def objective(images: Tensor) -> Tensor:
        logits = head(CUTS[cut](features(images)))
        return nn.functional.cross_entropy(logits, torch.ones(2, 5, 5).long(), reduction="none").mean((1, 2))[:, None]

    for name in ("pgd3", "apgd3"):
        with pytest.raises(ValueError, match=r"no gradient leads from the loss to the images.*square1000"):
            parse_attacks([name])[name](objective, torch.rand(2, 1, 5, 5), 1.0)
    losses_only = parse_attacks(["square5"])["square5"](objective, torch.rand(2, 1, 5, 5), 1.0)
    assert losses_only.terms is not None


def test_a_detector_that_finds_nothing_is_nobodys_robustness() -> None:
    """Its IoU is 0, clean and attacked: nothing moves it, and nothing of it is praised."""
    iou = Metric("IoU", lambda s: float(s["iou"].mean()), per_sample=lambda s: s["iou"], fails_at=0.5, is_mean=True)

    def loaded(found: float) -> LoadedBatch:
        images = torch.rand(12, 1, 2, 2, generator=seeded(0))

        def objective(x: Tensor) -> Tensor:
            return x.flatten(1).sum(1, keepdim=True)

        def score(x: Tensor) -> dict[str, Tensor]:
            return {"iou": found * torch.ones(12) - 0.1 * found * (x != images).flatten(1).any(1)}

        return LoadedBatch(images, objective, score)

    ids = [str(k) for k in range(12)]
    entries = [
        Entry(name, evaluate([EvaluationBatch(ids, lambda f=f: loaded(f))], parse_attacks(["pgd3"]), (0, 1, 2)))
        for name, f in (("drops all", 0.0), ("drops all again", 0.0))
    ]
    (table,) = tabulate(entries, [iou])
    assert findings(table)[0].startswith("No model is robust")
    assert any("drops all: IoU is 0" in note and "at every noise level" in note for note in cautions(entries, [table]))
    honest = Entry("honest", evaluate([EvaluationBatch(ids, lambda: loaded(0.9))], parse_attacks(["pgd3"]), (0, 1, 2)))
    (table,) = tabulate([honest, entries[0]], [iou])
    assert not findings(table)[0].startswith("No model is robust")
    assert not any(note.startswith("honest") for note in cautions([honest, entries[0]], [table]))

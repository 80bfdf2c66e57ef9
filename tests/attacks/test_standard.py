"""The ensemble: who its members are, what it costs, and that nothing they find is lost."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from advmed.attacks import APGD, DDN, DLR, PGD, Judge, Margin, SoftDice, SquareAttack, Standard
from advmed.attacks.losses import margin
from advmed.attacks.standard import LOSSES
from advmed.classification import ClassificationObjective
from advmed.objective import ClassScores
from helpers.tensors import seeded


def network(classes: int = 4) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 16, classes))


def small(task: str = "classification", norm: float = 2.0) -> Standard:
    return Standard(task, norm, steps=6, queries_of_square=8)


def generator(name: str, level: float) -> torch.Generator:
    return seeded(hash((name, level)) % 1000)


def judge(objective: ClassificationObjective, **more: Any) -> Judge:
    return Judge(lambda images: objective.terms_and_errors(images)[1].double(), **({"fails_above": 0.5} | more))


def batch(count: int = 8) -> tuple[ClassificationObjective, Tensor]:
    model, images = network(), torch.rand(count, 1, 6, 6, generator=seeded(1))
    return ClassificationObjective(model, model(images).argmax(1)), images


@pytest.mark.parametrize("norm", [2.0, math.inf])
def test_all_of_its_points_lie_in_the_ball_and_inside_the_bounds(norm: float) -> None:
    objective, images = batch()
    levels = [0.05, 0.2] if norm == math.inf else [0.3, 1.0]
    for found in small(norm=norm).search(
        objective, images, levels, judge=judge(objective), generator=generator, bounds=(0.0, 1.0)
    ):
        noise = (found.images - images).flatten(1)
        size = noise.norm(dim=1) if norm == 2 else noise.abs().amax(1)
        assert (size <= found.level * (1 + 1e-5)).all()
        assert found.images.min() >= 0
        assert found.images.max() <= 1
        torch.testing.assert_close(found.terms, objective(found.images))


@dataclass
class Counted(ClassificationObjective):
    """An objective that remembers of how many samples a gradient was asked for, and of what."""

    inner: ClassificationObjective
    asked: list[tuple[str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(self.inner.model, self.inner.labels)

    def __call__(self, images: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.asked.append(("loss", len(images)))
        return super().__call__(images)

    def predictions(self, images: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.asked.append(("logits", len(images)))
        return super().predictions(images)

    def take(self, rows: Tensor) -> Any:
        part = Counted(super().take(rows))
        part.asked = self.asked
        return part


def test_on_samples_that_are_lost_only_the_first_member_spends_anything() -> None:
    objective, images = batch()
    counted = Counted(objective)
    lost_at_once = Judge(lambda x: torch.ones(len(x)), lost_at=1.0)
    members = len(small().members)
    assert (
        len(list(small().search(counted, images, [0.5, 1.0], judge=lost_at_once, generator=generator))) == 2 * members
    )
    assert set(counted.asked) == {("loss", len(images))}
    assert len(counted.asked) == 2 * 6

    counted = Counted(objective)
    half = torch.arange(len(images)) % 2 == 0
    value = Judge(lambda x: half.double(), lost_at=1.0)
    first = None
    for found in small().search(counted, images, [0.5], judge=value, generator=generator):
        first = found.images if first is None else first
        if found.member not in ("apgd-ce", "ddn"):
            assert torch.equal(found.images[half], first[half])
    assert {pair for pair in counted.asked if pair[0] == "logits"} == {("logits", int((~half).sum()))}


def test_a_sample_that_is_taken_alone_is_attacked_alone() -> None:
    """The objective of some rows is that of the batch, cut."""
    objective, images = batch()
    rows = torch.tensor([5, 0, 3])
    part = objective.take(rows)
    torch.testing.assert_close(part(images[rows]), objective(images)[rows])
    assert torch.equal(part.terms_and_errors(images[rows])[1], objective.terms_and_errors(images)[1][rows])


def test_a_level_begins_with_what_a_member_found_at_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, images = batch()
    starts: dict[tuple[int, float], Any] = {}
    real = APGD.__call__

    def spy(self: APGD, o: Any, x: Tensor, radius: float, **more: Any) -> Any:
        if self.loss is None:
            starts[len(starts), float(radius)] = more.get("initial")
        return real(self, o, x, radius, **more)

    monkeypatch.setattr(APGD, "__call__", spy)
    found = list(small("").search(objective, images, [0.3, 0.6], judge=judge(objective), generator=generator))
    of = {f.member: f.images for f in found if f.level == 0.3}
    assert list(starts) == [(0, 0.3), (1, 0.3), (2, 0.6), (3, 0.6)]
    assert starts[0, 0.3] is None
    assert starts[1, 0.3] is None
    assert torch.equal(starts[2, 0.6], of["apgd-sum"])
    assert torch.equal(starts[3, 0.6], of["apgd-sum-steady"])


def test_a_start_is_where_the_first_run_begins() -> None:
    objective, images = batch()
    noise = torch.zeros_like(images)
    noise[:, 0, 0, 0] = 0.25
    seen: list[Tensor] = []

    def watched(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        return objective(x)

    APGD(3)(watched, images, 0.5, initial=images + noise)
    assert torch.equal(seen[0], images + noise)
    seen.clear()
    APGD(10, shrink=True)(watched, images, 0.2, initial=images + noise)
    assert torch.equal(seen[0], images + noise)  # inside of twice the radius
    last = seen[-1] - images
    assert (last.flatten(1).norm(dim=1) <= 0.2 * (1 + 1e-5)).all()


def test_a_shrinking_ball_is_twice_then_one_and_a_half_times_as_large() -> None:
    sizes: list[float] = []

    def watched(x: Tensor) -> Tensor:
        sizes.append(x.flatten(1).norm(dim=1).item())
        return x.flatten(1).sum(1, keepdim=True)

    found = APGD(10, random_start=0, shrink=True)(watched, torch.zeros(1, 1, 2, 2), 1.0)
    assert max(sizes[:4]) == pytest.approx(2.0, rel=1e-5)
    assert max(sizes[4:8]) == pytest.approx(1.5, rel=1e-5)
    assert max(sizes[8:]) == pytest.approx(1.0, rel=1e-5)
    assert len(sizes) == 10 + 3  # a pass without a gradient ends each stage
    assert found.terms.item() == pytest.approx(2.0, rel=1e-5)


def test_the_worst_point_is_found_whoever_finds_it() -> None:
    """The first loss leads away from what the judge calls a failure; another member finds it."""

    class Misled(ClassificationObjective):
        def __call__(self, images: Tensor) -> Tensor:
            return -images.flatten(1).sum(1, keepdim=True)

    model = nn.Flatten()
    images = torch.tensor([[[[0.6, 0.5]]]])
    objective = Misled(model, torch.tensor([0]))
    found = Standard("classification", steps=10, queries_of_square=0)(objective, images, 0.2)
    assert found.images[0, 0, 0, 1] > found.images[0, 0, 0, 0]
    alone = APGD(10)(objective, images, 0.2, generator=seeded(0))
    assert alone.images[0, 0, 0, 1] < alone.images[0, 0, 0, 0] + 0.3


def test_no_member_is_worse_for_the_model_than_the_ensemble() -> None:
    objective, images = batch(32)
    ensemble = Standard("classification", steps=20, queries_of_square=50)
    errors = objective.terms_and_errors(ensemble(objective, images, 0.2, generator=seeded(0)).images)[1]
    for attack in (PGD(100, 5.0, keep="best", random_start=1.0), APGD(20, loss=Margin()), SquareAttack(50)):
        other = objective.terms_and_errors(attack(objective, images, 0.2, generator=seeded(0)).images)[1]
        assert errors.sum() >= other.sum()
    assert 0 < errors.sum() < len(errors)


def test_of_points_that_the_judge_finds_alike_the_larger_loss_is_kept() -> None:
    objective, images = batch()
    attack = Standard("classification", steps=6, queries_of_square=8)
    alike = Judge(lambda x: torch.zeros(len(x)))
    found = attack(objective, images, 0.3, generator=seeded(0), judge=alike)
    alone = APGD(6, shrink=True)(objective, images, 0.3, generator=seeded(0))
    assert found.terms is not None
    assert alone.terms is not None
    assert (found.terms >= alone.terms - 1e-6).all()
    assert (found.terms > objective(images)).all()


def test_without_a_source_of_randomness_the_global_one_stays() -> None:
    objective, images = batch(2)
    before = torch.get_rng_state()
    small()(objective, images, 0.3)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_recipe_is_what_its_version_says() -> None:
    """Whoever changes it gives it another version: two numbers under one name are of the same attack."""
    recipe = {
        "classification": "ce 100 shrinking, margin 100 shrinking, dlr-targeted 50 shrinking",
        "segmentation": "sum 100 shrinking, ce-masked 100 shrinking, js 100 shrinking, dice 100 shrinking, "
        "cosine 100 shrinking, sum-steady 100, dice-steady 100",
        "detection": "sum 100 shrinking, class 100 shrinking, box 100 shrinking, held 100 shrinking, "
        "vanish 100 shrinking, appear 100 shrinking, sum-steady 100",
        "landmarks": "sum 100 shrinking, heatmap 100 shrinking, offsets 100 shrinking, error 100 shrinking, "
        "elsewhere 100 shrinking, sum-steady 100",
    }
    assert Standard.recipe == "advmed-standard/2"
    for task, wanted in recipe.items():
        climbing = {name: m for name, m in Standard(task).members.items() if isinstance(m, APGD)}
        told = [f"{name.removeprefix('apgd-')} {m.steps}{' shrinking' * m.shrink}" for name, m in climbing.items()]
        assert ", ".join(told) == wanted
        assert all(m.restarts == 1 and m.random_start == 1.0 for m in climbing.values())
        assert Standard(task).members["ddn"] == DDN(100, 2.0)
        assert Standard(task).members["square"] == SquareAttack(450, 2.0)


def test_a_steady_run_climbs_what_its_name_says() -> None:
    members = Standard("segmentation").members
    assert members["apgd-sum-steady"].loss is None
    assert members["apgd-dice-steady"].loss == SoftDice()


@pytest.mark.parametrize("task", [task for task in LOSSES if task])
def test_a_recipe_has_three_losses_or_more_and_a_price(task: str) -> None:
    members = Standard(task).members
    assert len([m for m in members.values() if isinstance(m, APGD)]) >= 3
    assert list(members)[-2:] == ["ddn", "square"]
    # At most ten times PGD-100, where a pass without a gradient is a third of one with it.
    price = Standard(task).gradients + Standard(task).queries / 3
    assert 500 < price <= 1000


@pytest.mark.parametrize(
    ("given", "message"), [({"task": "x"}, "task must be one of"), ({"steps": 0}, "steps must be")]
)
def test_a_setting_that_is_none(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Standard(**given)


def test_the_ratio_of_differences_of_logits() -> None:
    logits = torch.tensor([[3.0, 1.0, 0.5, -2.0], [0.0, 4.0, 3.0, 1.0]], dtype=torch.float64)
    truth = torch.tensor([[1.0, 0, 0, 0], [1.0, 0, 0, 0]])
    scores = ClassScores(logits, truth, None, True)
    wanted = [-(3 - 1) / (3 - 0.5), (4 - 0) / (4 - 1)]
    assert DLR.value(scores)[:, 0].tolist() == pytest.approx(wanted)
    targets = torch.tensor([2, 3])
    wanted = [-(3 - 0.5) / (3 - (0.5 - 2) / 2), (1 - 0) / (4 - (1 + 0) / 2)]
    assert DLR.value(scores, targets)[:, 0].tolist() == pytest.approx(wanted)
    two = ClassScores(logits[:, :2], truth[:, :2], None, True)
    assert torch.equal(DLR.value(two), margin(two))

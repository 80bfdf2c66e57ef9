"""Per-sample terms against the stock loss, and against references in float64 written apart from them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss, DC_and_topk_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss, SoftDiceLoss
from torch import Tensor, nn

from adv_nnunet.objective import SampleTerms, SegmentationObjective, inference_loss
from helpers.hosts import binary_divergence, class_divergence

SPACES = [(12, 10), (6, 8, 4)]
CLASSES, IGNORE = 3, 3
SCALES = (1.0, 0.5, 0.0)


def dice_settings(batch_dice: bool, do_bg: bool = False) -> dict[str, Any]:
    return {"batch_dice": batch_dice, "smooth": 1e-5, "do_bg": do_bg, "ddp": False}


def stock(kind: str, batch_dice: bool, deep: bool) -> nn.Module:
    ignore, dice = kind.endswith("ignore"), {"dice_class": MemoryEfficientSoftDiceLoss}
    loss: nn.Module
    if kind.startswith("labels"):
        loss = DC_and_CE_loss(dice_settings(batch_dice), {}, ignore_label=IGNORE if ignore else None, **dice)
    else:
        loss = DC_and_BCE_loss({}, dice_settings(batch_dice, do_bg=True), use_ignore_label=ignore, **dice)
    return DeepSupervisionWrapper(loss, np.array(SCALES) / sum(SCALES)) if deep else loss


def batch(kind: str, space: tuple[int, ...], deep: bool, size: int = 4) -> tuple[Any, Any]:
    """Random logits (leaves with gradients) and targets, a list of three scales with deep supervision."""
    generator = torch.Generator().manual_seed(7)
    outputs, targets = [], []
    for scale in range(3 if deep else 1):
        shape = tuple(max(2, n // 2**scale) for n in space)
        channels = CLASSES if kind.startswith("labels") else 2
        outputs.append(torch.randn(size, channels, *shape, generator=generator).requires_grad_())
        if kind.startswith("labels"):
            top = CLASSES + kind.endswith("ignore")
            targets.append(torch.randint(0, top, (size, 1, *shape), generator=generator))
        else:
            heads = 2 + kind.endswith("ignore")
            targets.append(torch.rand(size, heads, *shape, generator=generator) > 0.5)
    return (outputs, targets) if deep else (outputs[0], targets[0])


def of_sample(tensors: Any, index: int) -> Any:
    one = slice(index, index + 1)
    return [t[one] for t in tensors] if isinstance(tensors, list) else tensors[one]


KINDS = ["labels", "labels+ignore", "regions", "regions+ignore"]
DICE = (SoftDiceLoss, MemoryEfficientSoftDiceLoss)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("deep", [False, True])
def test_a_row_is_the_stock_loss_of_the_sample_alone(
    space: tuple[int, ...], kind: str, batch_dice: bool, deep: bool
) -> None:
    loss = stock(kind, batch_dice, deep)
    outputs, targets = batch(kind, space, deep)
    terms = SampleTerms(loss, "separate", "count")(outputs, targets)
    assert terms.shape == (4, 2)
    wanted = torch.stack([loss(of_sample(outputs, i), of_sample(targets, i)) for i in range(4)])
    torch.testing.assert_close(terms.sum(1), wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(SampleTerms(loss, "sum", "count")(outputs, targets)[:, 0], wanted, rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(terms[1].sum(), outputs[0] if deep else outputs)
    assert gradient[1].abs().sum() > 0
    assert gradient[[0, 2, 3]].abs().sum() == 0, "rows know each other"


@pytest.mark.parametrize("kind", ["labels", "regions"])
@pytest.mark.parametrize("deep", [False, True])
def test_their_mean_is_the_stock_batch_loss_where_that_is_a_mean_over_samples(kind: str, deep: bool) -> None:
    loss = stock(kind, False, deep)
    outputs, targets = batch(kind, (12, 10), deep)
    leaves = outputs if deep else [outputs]
    mean = SampleTerms(loss, "sum")(outputs, targets).mean()
    ours = torch.autograd.grad(mean, leaves[:2])
    theirs = torch.autograd.grad(loss(outputs, targets), leaves[:2])
    torch.testing.assert_close(mean, loss(outputs, targets), rtol=1e-6, atol=1e-6)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)


def reference_dice(logits: Tensor, labels: Tensor, classes: list[int], skip: bool) -> float:
    """Soft Dice of one sample in float64, class by class."""
    probability = torch.softmax(logits.double(), 0)
    values = []
    for c in classes:
        truth = (labels == c).double()
        if skip and truth.sum() == 0:
            continue
        values.append(float((2 * (probability[c] * truth).sum() + 1e-5) / (truth.sum() + probability[c].sum() + 1e-5)))
    return sum(values) / len(values) if values else 1.0


def test_classes_that_a_sample_does_not_contain() -> None:
    outputs, targets = batch("labels", (12, 10), False)
    outputs = outputs.detach()
    targets[0][targets[0] == 2] = 1  # one class left
    targets[1].zero_()  # none
    terms = {way: SampleTerms(stock("labels", True, False), "separate", way) for way in ("count", "skip", "auto")}
    for way, skip in (("count", False), ("skip", True), ("auto", True)):
        found = terms[way](outputs, targets)[:, 1]
        wanted = [-reference_dice(outputs[i], targets[i, 0], [1, 2], skip) for i in range(4)]
        assert found.tolist() == pytest.approx(wanted, abs=1e-6), way
    averaged = SampleTerms(stock("labels", False, False), "separate", "auto")
    torch.testing.assert_close(averaged(outputs, targets), terms["count"](outputs, targets))
    empty = terms["skip"](outputs, targets)[1]
    assert empty[1] == -1
    assert empty[0] > 0  # its cross-entropy decides


@pytest.mark.parametrize("kind", ["labels+ignore", "regions+ignore"])
def test_a_sample_of_which_nothing_counts_costs_nothing(kind: str) -> None:
    outputs, targets = batch(kind, (12, 10), False)
    if kind.startswith("labels"):
        targets[2] = IGNORE
    else:
        targets[2, -1] = True
    terms = SampleTerms(stock(kind, False, False), "separate")(outputs, targets)
    assert terms.isfinite().all()
    assert terms[2, 0] == 0
    (gradient,) = torch.autograd.grad(terms[2].sum(), outputs)
    assert gradient.abs().max() == 0


def test_names_follow_the_number_of_terms() -> None:
    loss = stock("labels", False, False)
    assert SampleTerms(loss, "sum").names == ("ce+dice",)
    assert SampleTerms(loss, "separate").names == ("ce", "dice")


def test_a_loss_that_cannot_be_split_is_refused() -> None:
    topk = DC_and_topk_loss(dice_settings(False), {"k": 10})
    with pytest.raises(TypeError, match=r"DC_and_CE_loss and DC_and_BCE_loss; this trainer's loss is DC_and_topk_loss"):
        SampleTerms(topk)
    with pytest.raises(TypeError, match="this trainer's loss is CrossEntropyLoss"):
        SampleTerms(DeepSupervisionWrapper(nn.CrossEntropyLoss(), [1.0]))


class Labels:
    """The two things that inference_loss asks nnU-Net's label manager."""

    def __init__(self, regions: bool, ignore: int | None) -> None:
        self.has_regions, self.ignore_label = regions, ignore


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_an_evaluation_is_the_stock_one_without_deep_supervision(kind: str) -> None:
    labels = Labels(kind.startswith("regions"), IGNORE if kind.endswith("ignore") else None)
    outputs, targets = batch(kind, (12, 10), False)
    ours, theirs = inference_loss(labels), stock(kind, False, False)
    torch.testing.assert_close(ours(outputs, targets), theirs(outputs, targets))
    split = SampleTerms(ours).at_full_resolution(outputs, targets)
    assert split.shape == (4, 2)


def test_the_objective_attacks_the_bare_network_and_trains_the_wrapped_one() -> None:
    network = nn.Conv2d(1, CLASSES, 1)
    calls = []

    class Wrapper(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            calls.append("wrapper")
            result: Tensor = network(images)
            return result

    loss = stock("labels", True, False)
    _, targets = batch("labels", (12, 10), False)
    entered: list[int] = []

    @contextmanager
    def precision() -> Iterator[None]:
        entered.append(1)
        yield

    objective = SegmentationObjective(Wrapper(), network, loss, SampleTerms(loss, "sum"), targets, precision)
    images = torch.randn(4, 1, 12, 10)
    attacked = objective(images)
    predicted = objective.predictions(images)
    assert calls == []
    assert entered == [1, 1], "both passes of an attack run in the attack's precision"
    batch_loss, terms = objective.loss(images)
    assert calls == ["wrapper"]
    torch.testing.assert_close(batch_loss, loss(network(images), targets))
    torch.testing.assert_close(terms, attacked)
    assert not terms.requires_grad
    again, same_terms, output = objective.loss_and_predictions(images)
    assert calls == ["wrapper"] * 2
    assert entered == [1, 1], "training runs in the host's precision"
    assert torch.equal(again, batch_loss)
    assert torch.equal(same_terms, terms)
    assert torch.equal(output, predicted)
    assert output.requires_grad
    assert predicted.requires_grad
    assert objective.names == ("ce+dice",)
    assert objective.model is network


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("deep", [False, True])
def test_the_distance_is_the_divergence_at_full_resolution(space: tuple[int, ...], kind: str, deep: bool) -> None:
    """Voxel by voxel, and of the first output alone: the others are there to be trained, nobody predicts with them."""
    loss = stock(kind, False, deep)
    clean, targets = batch(kind, space, deep)
    other = [2 * x.detach() - 0.7 * x.detach().roll(1, 0) for x in clean] if deep else 2 * clean.detach() - 0.7
    if not deep:
        other[:, 0] += 0.5  # (a number added to all classes is none to a softmax)
    divergence = class_divergence if kind.startswith("labels") else binary_divergence
    wanted = divergence(*(x[0].detach() if deep else x.detach() for x in (clean, other))).flatten(1).mean(1)
    objective = SegmentationObjective(nn.Identity(), nn.Identity(), loss, SampleTerms(loss), targets)
    found = objective.distance(clean, other)
    assert found.shape == (4,)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-7)
    turned = objective.distance(other, clean)
    assert ((turned - found).abs() > 1e-3 * found).all(), "a divergence is not symmetric"
    assert torch.equal(objective.distance(clean, clean), torch.zeros(4))
    leaves = clean if deep else [clean]
    gradients = torch.autograd.grad(found.sum(), leaves, allow_unused=True)
    assert gradients[0].abs().sum() > 0
    assert all(gradient is None for gradient in gradients[1:])


SMOOTH = {"label_smoothing": 0.1}
LABELS, REGIONS = torch.tensor([0.2, 3.0, 1.0]), torch.tensor([2.0, 0.5]).reshape(2, 1, 1)


@pytest.mark.parametrize(
    ("kind", "options", "dice"),
    [
        ("labels", SMOOTH, {}),
        ("labels", {"weight": LABELS}, {}),
        ("labels", {**SMOOTH, "weight": LABELS}, {}),
        ("regions", {"pos_weight": REGIONS}, {}),
        ("regions", {"weight": REGIONS}, {}),
        *(("labels", {}, {"smooth": smooth, "class": kind}) for smooth in (0.0, 1.0) for kind in DICE),
        ("labels", {}, {"weights": (0.5, 2.0)}),
    ],
    ids=str,
)
@pytest.mark.parametrize("ignore", [False, True])
def test_options_of_the_stock_loss(kind: str, options: dict[str, Any], dice: dict[str, Any], ignore: bool) -> None:
    """Trainers that users derive set them; a row must still be the loss of its sample."""
    how = {**dice_settings(False, do_bg=kind == "regions"), "smooth": dice.get("smooth", 1e-5)}
    own = dice.get("class", SoftDiceLoss)
    weight_ce, weight_dice = dice.get("weights", (1, 1))
    if kind == "labels":
        more = {"ignore_label": IGNORE if ignore else None, "dice_class": own}
        loss: nn.Module = DC_and_CE_loss(how, dict(options), weight_ce, weight_dice, **more)
    else:
        loss = DC_and_BCE_loss(dict(options), how, use_ignore_label=ignore, dice_class=own)
    outputs, targets = batch(kind + "+ignore" * ignore, (12, 10), False)
    rows = SampleTerms(loss, "separate", "count")(outputs, targets)
    wanted = torch.stack([loss(of_sample(outputs, i), of_sample(targets, i)) for i in range(4)])
    torch.testing.assert_close(rows.sum(1), wanted, rtol=1e-6, atol=1e-6)


def test_absent_regions_are_looked_for_behind_the_ignore_mask() -> None:
    outputs, targets = batch("regions+ignore", (12, 10), False)
    targets[0, 0] = targets[0, -1]  # region 0 only where it is ignored
    row = SampleTerms(stock("regions+ignore", False, False), "separate", "skip")(outputs, targets)[0]
    p, valid = outputs[0, 1].double().sigmoid(), ~targets[0, -1]
    truth = targets[0, 1] & valid
    dice = (2 * p[truth].sum() + 1e-5) / (truth.sum() + p[valid].sum() + 1e-5)
    assert float(row[1]) == pytest.approx(-float(dice), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_outputs_are_summed_in_float32(dtype: torch.dtype) -> None:
    """Under autocast outputs are in half precision, whose sums overflow above 65 504 voxels or lose them."""
    output = torch.zeros(1, 2, 300, 300, dtype=dtype)
    output[:, 1] = 8
    rows = SampleTerms(stock("labels", False, False))(output, torch.ones(1, 1, 300, 300, dtype=torch.int16))
    assert rows.dtype == torch.float32
    assert rows[0].tolist() == pytest.approx([0, -1], abs=3e-3)

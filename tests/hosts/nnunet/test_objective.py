"""Per-sample terms against the stock loss, and against references in float64 written apart from them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss, DC_and_topk_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss, SoftDiceLoss
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor, nn

from adv_nnunet.objective import SampleTerms, SegmentationObjective, check_terms, inference_loss
from helpers.hosts import binary_divergence, class_divergence

SPACES = [(12, 10), (6, 8, 4)]
CLASSES, IGNORE = 3, 3
SCALES = (1.0, 0.5, 0.0)


def stock(
    kind: str,
    batch_dice: bool = False,
    deep: bool = False,
    options: dict[str, Any] | None = None,
    weights: tuple[float, float] = (1, 1),
    smooth: float = 1e-5,
    dice_class: type[nn.Module] = MemoryEfficientSoftDiceLoss,
) -> nn.Module:
    """The loss that the host builds, with options of its parts."""
    ignore, regions = kind.endswith("ignore"), kind.startswith("regions")
    dice, own = {"batch_dice": batch_dice, "smooth": smooth, "do_bg": regions, "ddp": False}, dict(options or {})
    loss: nn.Module
    if regions:
        loss = DC_and_BCE_loss(own, dice, *weights, use_ignore_label=ignore, dice_class=dice_class)
    else:
        loss = DC_and_CE_loss(dice, own, *weights, ignore_label=IGNORE if ignore else None, dice_class=dice_class)
    return DeepSupervisionWrapper(loss, np.array(SCALES) / sum(SCALES)) if deep else loss


def batch(kind: str, space: tuple[int, ...], deep: bool, size: int = 4) -> tuple[Any, Any]:
    """Random logits (leaves with gradients) and targets, a list of three scales with deep supervision."""
    generator = torch.Generator().manual_seed(7)
    labels, ignore = kind.startswith("labels"), kind.endswith("ignore")
    outputs, targets = [], []
    for scale in range(3 if deep else 1):
        shape = tuple(max(2, n // 2**scale) for n in space)
        outputs.append(torch.randn(size, CLASSES if labels else 2, *shape, generator=generator).requires_grad_())
        if labels:
            targets.append(torch.randint(0, CLASSES + ignore, (size, 1, *shape), generator=generator))
        else:
            targets.append(torch.rand(size, 2 + ignore, *shape, generator=generator) > 0.5)
    return (outputs, targets) if deep else (outputs[0], targets[0])


def of_sample(tensors: Any, index: int) -> Any:
    one = slice(index, index + 1)
    return [t[one] for t in tensors] if isinstance(tensors, list) else tensors[one]


KINDS = ["labels", "labels+ignore", "regions", "regions+ignore"]
DICE = (SoftDiceLoss, MemoryEfficientSoftDiceLoss)


def check_rows(loss: nn.Module, outputs: Any, targets: Any) -> None:
    """A row is the stock loss of the sample alone, with its gradients, and knows no other sample.

    So the mean over the rows is the stock loss of the batch where that is a mean over samples.
    """
    terms = SampleTerms(loss, "separate", "count")(outputs, targets)
    assert terms.shape == (4, 2)
    wanted = torch.stack([loss(of_sample(outputs, i), of_sample(targets, i)) for i in range(4)])
    torch.testing.assert_close(terms.sum(1), wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(SampleTerms(loss, "sum", "count")(outputs, targets)[:, 0], wanted, rtol=1e-6, atol=1e-6)
    leaves = outputs[:2] if isinstance(outputs, list) else [outputs]  # the third scale has no weight
    gradients = [torch.autograd.grad(rows.sum(), leaves, retain_graph=True) for rows in (terms, wanted)]
    for ours, theirs in zip(*gradients, strict=True):
        assert theirs.flatten(1).abs().sum(1).min() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)
    (gradient,) = torch.autograd.grad(terms[1].sum(), leaves[0])
    assert gradient[[0, 2, 3]].abs().sum() == 0, "rows know each other"


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("deep", [False, True])
def test_a_row_is_the_stock_loss_of_the_sample_alone(
    space: tuple[int, ...], kind: str, batch_dice: bool, deep: bool
) -> None:
    check_rows(stock(kind, batch_dice, deep), *batch(kind, space, deep))


SMOOTH = {"label_smoothing": 0.1}
LABELS, REGIONS = torch.tensor([0.2, 3.0, 1.0]), torch.tensor([2.0, 0.5]).reshape(2, 1, 1)


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("labels", {"options": SMOOTH}),
        ("labels", {"options": {"weight": LABELS}}),
        ("labels", {"options": {**SMOOTH, "weight": LABELS}}),
        ("regions", {"options": {"pos_weight": REGIONS}}),
        ("regions", {"options": {"weight": REGIONS}}),
        *(("labels", {"smooth": smooth, "dice_class": kind}) for smooth in (0.0, 1.0) for kind in DICE),
        ("labels", {"weights": (0.5, 2.0)}),
    ],
    ids=str,
)
@pytest.mark.parametrize("ignore", ["", "+ignore"])
def test_options_of_the_stock_loss(kind: str, how: dict[str, Any], ignore: str) -> None:
    """Trainers that users derive set them; a row must still be the loss of its sample."""
    check_rows(stock(kind + ignore, **how), *batch(kind + ignore, (12, 10), False))


def reference_dice(probability: Tensor, truth: Tensor, valid: Tensor, skip: bool) -> float:
    """Soft Dice of one sample in float64, class by class, over the voxels that count."""
    values = []
    for p, t in zip(probability.double(), truth & valid, strict=True):
        if t.any() or not skip:
            values.append(float((2 * p[t].sum() + 1e-5) / (t.sum() + p[valid].sum() + 1e-5)))
    return sum(values) / len(values) if values else 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_classes_that_a_sample_does_not_contain(kind: str) -> None:
    """With an ignore label, those that it has only where it is ignored."""
    outputs, targets = batch(kind, (12, 10), False)
    outputs, labels, ignore = outputs.detach(), kind.startswith("labels"), kind.endswith("ignore")
    valid = torch.ones(4, 12, 10, dtype=torch.bool)
    if labels:
        targets[0][targets[0] == 2] = 1  # one class left
        targets[1][targets[1] < CLASSES] = 0  # none
        valid = targets[:, 0] != IGNORE
        probability, truth = outputs.softmax(1)[:, 1:], torch.stack([targets[:, 0] == c for c in (1, 2)], 1)
    else:
        valid = ~targets[:, -1] if ignore else valid
        targets[0, 0] = targets[1, :2] = False
        if ignore:
            targets[0, 0] = targets[0, -1]
        probability, truth = outputs.sigmoid(), targets[:, :2]
    terms = {way: SampleTerms(stock(kind, True), "separate", way) for way in ("count", "skip", "auto")}
    for way, skip in (("count", False), ("skip", True), ("auto", True)):
        found = terms[way](outputs, targets)[:, 1]
        wanted = [-reference_dice(*of_one, skip) for of_one in zip(probability, truth, valid, strict=True)]
        assert found.tolist() == pytest.approx(wanted, abs=1e-6), way
    averaged = SampleTerms(stock(kind), "separate", "auto")
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
    terms = SampleTerms(stock(kind), "separate")(outputs, targets)
    assert terms.isfinite().all()
    assert terms[2, 0] == 0
    (gradient,) = torch.autograd.grad(terms[2].sum(), outputs)
    assert gradient.abs().max() == 0


def test_a_loss_that_cannot_be_split_is_refused() -> None:
    dice = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}
    topk = DC_and_topk_loss(dice, {"k": 10})
    with pytest.raises(TypeError, match=r"DC_and_CE_loss and DC_and_BCE_loss; this trainer's loss is DC_and_topk_loss"):
        SampleTerms(topk)
    with pytest.raises(TypeError, match="this trainer's loss is CrossEntropyLoss"):
        SampleTerms(DeepSupervisionWrapper(nn.CrossEntropyLoss(), [1.0]))


class Focal(DC_and_CE_loss):
    """A stock loss by its class, and another by what it computes."""

    def forward(self, net_output: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = super().forward(net_output, target)
        return 1.5 * loss


class Renamed(DC_and_CE_loss):
    """The stock loss, by another name."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("batch_dice", [False, True])
def test_the_terms_are_compared_with_the_loss_of_a_trainer(kind: str, deep: bool, batch_dice: bool) -> None:
    labels = label_manager(kind)
    check_terms(stock(kind, batch_dice, deep), labels, 3, torch.device("cpu"))
    if not kind.startswith("labels"):
        return
    dice = {"batch_dice": batch_dice, "smooth": 1e-5, "do_bg": False, "ddp": False}
    for own in (Renamed, Focal):
        loss: nn.Module = own(dice, {}, ignore_label=labels.ignore_label, dice_class=MemoryEfficientSoftDiceLoss)
        loss = DeepSupervisionWrapper(loss, np.array(SCALES) / sum(SCALES)) if deep else loss
        if own is Renamed:
            check_terms(loss, labels, 2, torch.device("cpu"))
            continue
        with pytest.raises(TypeError, match=r"does not fit this trainer's \(Focal of .*on random outputs"):
            check_terms(loss, labels, 2, torch.device("cpu"))


def test_the_comparison_does_not_touch_a_compiled_loss() -> None:
    """Other shapes than those of the training would have it compiled for any shape."""
    loss = stock("labels")
    eager = loss.dc
    calls: list[int] = []

    class Compiled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._orig_mod = eager

        def forward(self, *given: Any, **named: Any) -> Tensor:
            calls.append(1)
            result: Tensor = eager(*given, **named)
            return result

    loss.dc = Compiled()
    check_terms(loss, label_manager("labels"), 2, torch.device("cpu"))
    assert isinstance(loss.dc, Compiled)
    assert not calls


def label_manager(kind: str) -> LabelManager:
    """The host's, of three classes or two regions."""
    ignore = {"ignore": IGNORE} if kind.endswith("ignore") else {}
    if kind.startswith("labels"):
        return LabelManager({"background": 0, "a": 1, "b": 2, **ignore}, None)
    return LabelManager({"background": 0, "all": [1, 2], "b": 2, **ignore}, [1, 2])


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_an_evaluation_is_the_stock_one_without_deep_supervision(kind: str) -> None:
    ignore = IGNORE if kind.endswith("ignore") else None
    labels = SimpleNamespace(has_regions=kind.startswith("regions"), ignore_label=ignore)
    outputs, targets = batch(kind, (12, 10), False)
    ours, theirs = inference_loss(labels), stock(kind)
    torch.testing.assert_close(ours(outputs, targets), theirs(outputs, targets))
    split = SampleTerms(ours)
    torch.testing.assert_close(split.at_full_resolution(outputs, targets), split(outputs, targets))


def test_the_objective_attacks_the_bare_network_and_trains_the_wrapped_one() -> None:
    network = nn.Conv2d(1, CLASSES, 1)
    calls = []

    class Wrapper(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            calls.append("wrapper")
            result: Tensor = network(images)
            return result

    loss = stock("labels", True)
    _, targets = batch("labels", (12, 10), False)
    entered: list[int] = []

    @contextmanager
    def precision() -> Iterator[None]:
        entered.append(1)
        yield

    objective = SegmentationObjective(Wrapper(), network, loss, SampleTerms(loss, "sum"), targets, precision)
    images = torch.randn(4, 1, 12, 10)
    attacked, predicted = objective(images), objective.predictions(images)
    assert calls == []
    assert entered == [1, 1], "both passes of an attack run in the attack's precision"
    for found in (objective.loss(images), objective.loss_and_predictions(images)):
        assert calls.pop() == "wrapper"
        torch.testing.assert_close(found[0], loss(network(images), targets))
        torch.testing.assert_close(found[1], attacked)
        assert not found[1].requires_grad
    assert (calls, entered) == ([], [1, 1]), "training runs in the host's precision"
    output = objective.loss_and_predictions(images)[2]
    assert torch.equal(output, predicted)
    assert output.requires_grad
    assert predicted.requires_grad
    assert objective.names == ("ce+dice",)
    assert objective.model is network


@pytest.mark.parametrize("deep", [False, True])
def test_targets_may_be_made_in_inference_mode(deep: bool) -> None:
    """As a loader makes them inside of the block."""
    loss = stock("labels", False, deep)
    outputs, targets = batch("labels", SPACES[0], deep)
    leaf = outputs[0] if deep else outputs

    def gradient(targets: Any) -> Tensor:
        objective = SegmentationObjective(nn.Identity(), nn.Identity(), loss, SampleTerms(loss, "sum"), targets)
        found: Tensor = torch.autograd.grad(objective(outputs).sum(), leaf)[0]
        return found

    with torch.inference_mode():
        made = [target * 1 for target in targets] if deep else targets * 1
    torch.testing.assert_close(gradient(made), gradient(targets))


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("deep", [False, True])
def test_the_distance_is_the_divergence_at_full_resolution(space: tuple[int, ...], kind: str, deep: bool) -> None:
    """Voxel by voxel, and of the first output alone: the others are there to be trained, nobody predicts with them."""
    loss = stock(kind, False, deep)
    clean, targets = batch(kind, space, deep)
    sharper = [2 * x.detach() - 0.7 * x.detach().roll(1, 0) for x in (clean if deep else [clean])]
    other = sharper if deep else sharper[0]
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_outputs_are_summed_in_float32(dtype: torch.dtype) -> None:
    """Under autocast outputs are in half precision, whose sums overflow above 65 504 voxels or lose them."""
    output = torch.zeros(1, 2, 300, 300, dtype=dtype)
    output[:, 1] = 8
    rows = SampleTerms(stock("labels"))(output, torch.ones(1, 1, 300, 300, dtype=torch.int16))
    assert rows.dtype == torch.float32
    assert rows[0].tolist() == pytest.approx([0, -1], abs=3e-3)

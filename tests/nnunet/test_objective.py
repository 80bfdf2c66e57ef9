"""The per-sample form of nnU-Net's losses, against the stock losses and against references written out in float64."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss, DC_and_topk_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss, SoftDiceLoss
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor, nn

from adv_nnunet.objective import SampleTerms, SegmentationObjective, inference_loss
from common.attacks import pgd

CLASSES, IGNORE = 3, 3
SIZES = {2: (12, 10), 3: (8, 6, 10)}


def stock_loss(
    kind: str = "ce",
    *,
    batch_dice: bool = False,
    ignore: bool = False,
    scales: int = 0,
    dice_class: type[nn.Module] = MemoryEfficientSoftDiceLoss,
    smooth: float = 1e-5,
    **ce: Any,
) -> nn.Module:
    """A loss as nnUNetTrainer._build_loss makes it; ``scales`` outputs of deep supervision, the last without weight."""
    dice = {"batch_dice": batch_dice, "smooth": smooth, "ddp": False}
    if kind == "bce":
        loss = DC_and_BCE_loss(ce, {**dice, "do_bg": True}, use_ignore_label=ignore, dice_class=dice_class)
    else:
        ignore_label = IGNORE if ignore else None
        loss = DC_and_CE_loss({**dice, "do_bg": False}, ce, ignore_label=ignore_label, dice_class=dice_class)
    if not scales:
        return loss
    factors = np.array([1 / 2**i for i in range(scales)])
    factors[-1] = 0
    return DeepSupervisionWrapper(loss, factors / factors.sum())


def batch(
    kind: str = "ce", *, size: int = 4, dim: int = 2, ignore: bool = False, scales: int = 0, seed: int = 0
) -> tuple[Any, Any]:
    """Outputs and targets in the forms of the host's loader; int16 label maps, or bool regions with ignore last."""
    generator = torch.Generator().manual_seed(seed)
    outputs, targets = [], []
    for scale in range(max(1, scales)):
        shape = tuple(n // 2**scale for n in SIZES[dim])
        outputs.append(torch.randn(size, CLASSES, *shape, generator=generator, requires_grad=True))
        if kind == "bce":
            targets.append(torch.rand(size, CLASSES + ignore, *shape, generator=generator) > 0.6)
        else:
            targets.append(torch.randint(0, CLASSES + ignore, (size, 1, *shape), generator=generator).short())
    return (outputs, targets) if scales else (outputs[0], targets[0])


def part(values: Any, index: slice) -> Any:
    return [v[index] for v in values] if isinstance(values, list) else values[index]


ALL = list(itertools.product(("ce", "bce"), (2, 3), (0, 2), (False, True), (False, True)))


@pytest.mark.parametrize(("kind", "dim", "scales", "ignore", "batch_dice"), ALL)
def test_a_row_is_the_stock_loss_of_that_sample_alone(
    kind: str, dim: int, scales: int, ignore: bool, batch_dice: bool
) -> None:
    loss = stock_loss(kind, ignore=ignore, scales=scales, batch_dice=batch_dice)
    outputs, targets = batch(kind, dim=dim, ignore=ignore, scales=scales)
    rows = SampleTerms(loss, "separate", "count")(outputs, targets)
    assert rows.shape == (4, 2)
    assert rows.dtype == torch.float32
    for i in range(4):
        alone = loss(part(outputs, slice(i, i + 1)), part(targets, slice(i, i + 1)))
        assert float(rows[i].sum()) == pytest.approx(float(alone), abs=2e-6)
        assert float(SampleTerms(loss, "sum", "count")(outputs, targets)[i, 0]) == pytest.approx(float(alone), abs=2e-6)


@pytest.mark.parametrize(("kind", "dim", "scales"), list(itertools.product(("ce", "bce"), (2, 3), (0, 2))))
def test_the_mean_of_the_rows_is_the_stock_loss(kind: str, dim: int, scales: int) -> None:
    """Wherever the stock loss is a mean over samples: no batch Dice, no ignore label. Gradients, too."""
    loss = stock_loss(kind, scales=scales)
    outputs, targets = batch(kind, dim=dim, scales=scales)
    terms = SampleTerms(loss)
    leaves = outputs if isinstance(outputs, list) else [outputs]
    mean = terms(outputs, targets).sum(1).mean()
    stock = loss(outputs, targets)
    assert float(mean) == pytest.approx(float(stock), abs=2e-6)
    ours = torch.autograd.grad(mean, leaves, allow_unused=True)
    theirs = torch.autograd.grad(stock, leaves, allow_unused=True)
    for mine, reference in zip(ours, theirs, strict=True):
        assert (mine is None) == (reference is None)
        if mine is not None:
            assert torch.allclose(mine, reference, atol=1e-8, rtol=1e-4)


def test_rows_do_not_know_each_other() -> None:
    outputs, targets = batch()
    terms = SampleTerms(stock_loss(batch_dice=True))
    rows = terms(outputs, targets)
    (gradient,) = torch.autograd.grad(rows[1].sum(), outputs)
    assert gradient[1].abs().sum() > 0
    assert gradient[[0, 2, 3]].abs().sum() == 0
    changed = outputs.detach().clone()
    changed[0] += 5
    assert torch.equal(terms(changed, targets)[1:], rows[1:])


def reference(output: Tensor, target: Tensor, skip: bool) -> tuple[float, float]:
    """Cross-entropy and Dice term of one sample (classes, *spatial), written out voxel by voxel in float64."""
    x, labels = output.detach().double().numpy(), target.numpy().astype(int)[0]
    exponentials = np.exp(x - x.max(0))
    p = exponentials / exponentials.sum(0)
    ce = np.mean([-np.log(p[labels[v]][v]) for v in np.ndindex(labels.shape)])
    dice = []
    for c in range(1, len(x)):
        truth = labels == c
        if skip and not truth.any():
            continue
        dice.append((2 * (p[c] * truth).sum() + 1e-5) / (truth.sum() + p[c].sum() + 1e-5))
    return float(ce), -float(np.mean(dice)) if dice else -1.0


@pytest.mark.parametrize(
    ("absent_classes", "batch_dice", "skip"),
    [("count", True, False), ("skip", False, True), ("auto", False, False), ("auto", True, True)],
)
def test_absent_classes(absent_classes: Any, batch_dice: bool, skip: bool) -> None:
    outputs, targets = batch(size=4)
    targets[1][targets[1] == 2] = 1  # without class 2
    targets[2][:] = 0  # nothing at all
    targets[3][:] = 1
    rows = SampleTerms(stock_loss(batch_dice=batch_dice), "separate", absent_classes)(outputs, targets)
    for i in range(4):
        assert rows[i].tolist() == pytest.approx(reference(outputs[i], targets[i], skip), abs=1e-5)
    if skip:
        assert float(rows[2, 1]) == -1.0
        assert torch.autograd.grad(rows[2, 1], outputs)[0].abs().sum() == 0
    else:
        assert float(rows[2, 1]) == pytest.approx(0, abs=1e-4)


def test_absent_regions_are_counted_behind_the_ignore_mask() -> None:
    outputs, targets = batch("bce", size=2, ignore=True)
    targets[0, 0] = targets[0, -1]  # region 0 only where it is ignored
    rows = SampleTerms(stock_loss("bce", ignore=True), "separate", "skip")(outputs, targets)
    p, valid = outputs[0].detach().double().sigmoid(), ~targets[0, -1]
    dice = [
        float((2 * (p[c] * valid)[targets[0, c]].sum() + 1e-5) / ((p[c] + targets[0, c]) * valid).sum())
        for c in range(1, CLASSES)
    ]
    assert float(rows[0, 1]) == pytest.approx(-np.mean(dice), abs=1e-5)


def test_a_sample_that_is_ignored_as_a_whole_has_no_loss() -> None:
    outputs, targets = batch(size=2, ignore=True)
    targets[0] = IGNORE
    rows = SampleTerms(stock_loss(ignore=True), "separate", "count")(outputs, targets)
    assert rows[0].tolist() == [0.0, -1.0]
    assert rows.isfinite().all()
    gradient = torch.autograd.grad(rows.sum(), outputs)[0]
    assert gradient.isfinite().all()
    assert gradient[0].abs().sum() == 0


@pytest.mark.parametrize(
    ("kind", "ce"),
    [
        ("ce", {"weight": torch.tensor([0.2, 3.0, 1.0])}),
        ("ce", {"label_smoothing": 0.1}),
        ("ce", {"label_smoothing": 0.1, "weight": torch.tensor([0.2, 3.0, 1.0])}),
        ("bce", {"pos_weight": torch.tensor([2.0, 1.0, 0.5]).reshape(3, 1, 1)}),
    ],
    ids=str,
)
@pytest.mark.parametrize("ignore", [False, True])
def test_options_of_the_stock_cross_entropy(kind: str, ce: dict[str, Any], ignore: bool) -> None:
    """Trainers that users derive set them; a row must still be the loss of its sample."""
    loss = stock_loss(kind, ignore=ignore, **ce)
    outputs, targets = batch(kind, ignore=ignore)
    rows = SampleTerms(loss, "sum", "count")(outputs, targets)
    for i in range(4):
        assert float(rows[i]) == pytest.approx(float(loss(outputs[i : i + 1], targets[i : i + 1])), abs=2e-6)


@pytest.mark.parametrize("dice_class", [SoftDiceLoss, MemoryEfficientSoftDiceLoss])
@pytest.mark.parametrize("smooth", [0.0, 1.0])
def test_both_dice_classes_of_the_host(dice_class: type[nn.Module], smooth: float) -> None:
    loss = stock_loss(dice_class=dice_class, smooth=smooth)
    outputs, targets = batch()
    rows = SampleTerms(loss)(outputs, targets)
    assert float(rows.sum(1).mean()) == pytest.approx(float(loss(outputs, targets)), abs=2e-6)


def test_weights_of_the_parts() -> None:
    loss = stock_loss()
    loss.weight_ce, loss.weight_dice = 0.5, 2.0
    outputs, targets = batch()
    plain = SampleTerms(stock_loss())(outputs, targets)
    assert torch.allclose(SampleTerms(loss)(outputs, targets), plain * torch.tensor([0.5, 2.0]))


def test_names_and_sum() -> None:
    outputs, targets = batch(scales=2)
    loss = stock_loss(scales=2)
    separate, summed = SampleTerms(loss, "separate"), SampleTerms(loss, "sum")
    assert separate.names == ("ce", "dice")
    assert summed.names == ("ce+dice",)
    assert torch.allclose(summed(outputs, targets)[:, 0], separate(outputs, targets).sum(1))
    at_full = SampleTerms(stock_loss(), "separate")(outputs[0], targets[0])
    assert torch.equal(separate.at_full_resolution(outputs[0], targets[0]), at_full)


def test_a_list_of_one_for_a_loss_without_deep_supervision() -> None:
    outputs, targets = batch()
    terms = SampleTerms(stock_loss())
    assert torch.equal(terms([outputs], [targets]), terms(outputs, targets))


@pytest.mark.parametrize("loss", [DC_and_topk_loss({}, {}), nn.MSELoss(), DeepSupervisionWrapper(nn.MSELoss(), [1.0])])
def test_a_loss_that_cannot_be_split(loss: nn.Module) -> None:
    inner = loss.loss if isinstance(loss, DeepSupervisionWrapper) else loss
    with pytest.raises(TypeError, match=r"needs the loss of each sample.*this trainer's loss is") as caught:
        SampleTerms(loss)
    assert type(inner).__name__ in str(caught.value)


def test_half_precision_outputs_are_summed_in_float32() -> None:
    """Under autocast outputs are float16: 70 000 voxels of one class overflow it."""
    output = torch.zeros(1, 2, 300, 300, dtype=torch.bfloat16)
    output[:, 1] = 8
    target = torch.ones(1, 1, 300, 300, dtype=torch.int16)
    rows = SampleTerms(stock_loss(), "separate")(output, target)
    assert rows.dtype == torch.float32
    assert float(rows[0, 1]) == pytest.approx(-1, abs=2e-3)
    half = SampleTerms(stock_loss(), "separate")(output.half(), target)
    assert half.isfinite().all()
    assert float(half[0, 1]) == pytest.approx(-1, abs=2e-3)


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("ignore", [False, True])
def test_inference_loss(regions: bool, ignore: bool) -> None:
    description: dict[str, Any] = {"background": 0, "whole": [1, 2], "core": 2} if regions else {"background": 0, "a": 1}
    if ignore:
        description["ignore"] = 3
    labels = LabelManager(description, [1, 2] if regions else None)
    loss = inference_loss(labels)
    assert isinstance(loss, DC_and_BCE_loss if regions else DC_and_CE_loss)
    assert not loss.dc.batch_dice
    terms = SampleTerms(loss)
    assert not terms.skip_absent
    output = torch.randn(2, labels.num_segmentation_heads, 6, 6)
    target = (
        torch.rand(2, 2 + ignore, 6, 6) > 0.5
        if regions
        else torch.randint(0, 2, (2, 1, 6, 6)).masked_fill(torch.rand(2, 1, 6, 6) < 0.3, 3 if ignore else 0)
    )
    rows = terms(output, target)
    alone = [float(loss(output[i : i + 1], target[i : i + 1])) for i in range(2)]
    assert rows.sum(1).tolist() == pytest.approx(alone, abs=2e-6)


def test_the_objective_attacks_the_bare_model_and_trains_through_the_wrapper() -> None:
    model = nn.Conv2d(1, CLASSES, 3, padding=1)
    calls = []
    wrapper = nn.Sequential(model)
    wrapper.register_forward_hook(lambda *_: calls.append("wrapper"))
    loss = stock_loss(batch_dice=True)
    target = torch.randint(0, CLASSES, (2, 1, 8, 8)).short()
    objective = SegmentationObjective(wrapper, model, loss, SampleTerms(loss, "sum"), target)
    images = torch.randn(2, 1, 8, 8)
    result = pgd(objective, images, 1.0, steps=3, step_scale=2.0)
    assert calls == []
    assert objective.model is model
    assert objective.names == ("ce+dice",)
    value, rows = objective.loss(result.images)
    assert calls == ["wrapper"]
    assert float(value) == float(loss(model(result.images), target))
    assert not rows.requires_grad
    assert torch.allclose(rows, result.terms, atol=1e-5)

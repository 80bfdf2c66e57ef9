"""nnU-Net's loss as per-sample terms: cross-entropy and Dice, (B, 2), or their sum, (B, 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor, nn
from torch.nn import functional

from advmed.distances import sigmoid_divergence, softmax_divergence
from advmed.objective import ClassScores, ordinary

Outputs = Tensor | Sequence[Tensor]


class SampleTerms:
    """Splits a stock nnU-Net loss into one row of terms per sample.

    A row is what the stock loss gives for that sample alone: the weighted cross-entropy, and the weighted negative soft
    Dice averaged over classes, each summed over the outputs of deep supervision with the stock weights. Where the
    stock loss averages over samples (``batch_dice=False``, no ignore label), the batch mean of the rows' sums is the
    stock loss. Where it couples samples it is not: batch Dice sums the voxels of the batch before it divides, and
    with an ignore label the cross-entropy averages over the valid voxels of the batch.

    Args:
        loss: the trainer's loss, with or without deep supervision.
        terms: "separate" for (cross-entropy, Dice), "sum" for their sum.
        absent_classes: what a class without a voxel in a sample adds to its Dice. "count": what the stock loss of this
            sample alone gives, about 0 for the class, as if it was missed; "skip": the class is left out (a sample
            without any class has Dice 1, and its cross-entropy decides); "auto": "skip" for batch Dice.

    Raises:
        TypeError: for a loss that is none of the stock ones.

    Example:
        >>> import torch
        >>> from adv_nnunet import SampleTerms
        >>> from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
        >>> loss = DC_and_CE_loss({"batch_dice": False, "do_bg": False, "smooth": 1e-5, "ddp": False}, {})
        >>> outputs, target = torch.randn(2, 3, 8, 8), torch.randint(3, (2, 1, 8, 8))
        >>> terms = SampleTerms(loss)(outputs, target)  # cross-entropy and Dice of each sample
        >>> terms.shape, torch.isclose(terms.sum(1).mean(), loss(outputs, target)).item()
        (torch.Size([2, 2]), True)
    """

    def __init__(
        self,
        loss: nn.Module,
        terms: Literal["sum", "separate"] = "separate",
        absent_classes: Literal["auto", "count", "skip"] = "auto",
    ) -> None:
        self.weights: tuple[float, ...] | None = None
        if isinstance(loss, DeepSupervisionWrapper):
            self.weights, loss = tuple(float(w) for w in loss.weight_factors), loss.loss
        if not isinstance(loss, (DC_and_CE_loss, DC_and_BCE_loss)):
            raise TypeError(
                f"adversarial training needs the loss of each sample, and knows how to split nnU-Net's DC_and_CE_loss "
                f"and DC_and_BCE_loss; this trainer's loss is {type(loss).__name__}"
            )
        self.loss = loss
        self.dice = getattr(loss.dc, "_orig_mod", loss.dc)  # the host may have compiled it
        self.skip_absent = self.dice.batch_dice if absent_classes == "auto" else absent_classes == "skip"
        self.summed = terms == "sum"
        self.names: tuple[str, ...] = ("ce+dice",) if self.summed else ("ce", "dice")

    def __call__(self, outputs: Outputs, targets: Outputs) -> Tensor:
        """The terms of a batch.

        Args:
            outputs: the network's output, (B, classes, *spatial), or a list of them under deep supervision.
            targets: label maps (B, 1, *spatial), or regions (B, regions (+ 1 for ignore), *spatial); or a list.

        Returns:
            Shape (B, K), float32, with gradients.
        """
        if self.weights is None:
            terms = self._at_one_scale(_first(outputs), _first(targets))
        else:
            scales = zip(self.weights, outputs, targets, strict=False)
            terms = torch.stack([w * self._at_one_scale(o, t) for w, o, t in scales if w != 0]).sum(0)
        return terms.sum(1, keepdim=True) if self.summed else terms

    def at_full_resolution(self, output: Tensor, target: Tensor) -> Tensor:
        """The terms without deep supervision, as in inference: (B, K)."""
        terms = self._at_one_scale(output, target)
        return terms.sum(1, keepdim=True) if self.summed else terms

    def distance(self, clean: Outputs, other: Outputs) -> Tensor:
        """KL divergence between two predictions at full resolution, averaged over voxels, (B,).

        Of the softmax for label maps; summed over the regions, each a matter of yes and no, for regions.
        """
        divergence = softmax_divergence if isinstance(self.loss, DC_and_CE_loss) else sigmoid_divergence
        return divergence(_first(clean), _first(other))

    def class_scores(self, output: Tensor, target: Tensor) -> ClassScores:
        """Output and target of one scale, voxel by voxel; a voxel to ignore is background, and not valid."""
        loss = self.loss
        if isinstance(loss, DC_and_CE_loss):
            valid = None if loss.ignore_label is None else target != loss.ignore_label
            labels = target if valid is None else torch.where(valid, target, 0)
            truth = torch.zeros_like(output, dtype=torch.float32).scatter_(1, labels.long(), 1)
            return ClassScores(output, truth, valid, exclusive=True)
        valid = (target[:, -1:] == 0) if loss.use_ignore_label else None
        return ClassScores(
            output, (target[:, :-1] if loss.use_ignore_label else target).float(), valid, exclusive=False
        )

    def _at_one_scale(self, output: Tensor, target: Tensor) -> Tensor:
        loss, space = self.loss, tuple(range(2, output.ndim))
        if isinstance(loss, DC_and_CE_loss):
            labels = target[:, 0].long()
            _, truth, valid, _ = self.class_scores(output, target)
            per_voxel = functional.cross_entropy(
                output,
                labels,
                loss.ce.weight,
                reduction="none",
                ignore_index=loss.ce.ignore_index,
                label_smoothing=loss.ce.label_smoothing,
            )
            # (a label to ignore is no class, and masked below)
            weight = None if loss.ce.weight is None else loss.ce.weight[labels.clamp(0, output.shape[1] - 1)]
            ce = _mean(per_voxel.flatten(1), None if valid is None else valid[:, 0].flatten(1), weight)
        else:
            _, truth, valid, _ = self.class_scores(output, target)
            per_voxel = functional.binary_cross_entropy_with_logits(
                output, truth, loss.ce.weight, reduction="none", pos_weight=loss.ce.pos_weight
            )
            if valid is None:
                ce = per_voxel.flatten(1).mean(1)
            else:  # the host sums over regions but counts each voxel once
                counted = valid.flatten(1).sum(1).clamp_min(1e-8)
                ce = (per_voxel * valid).flatten(1).sum(1) / counted
        dice = self._dice(output, truth, valid, space)
        return torch.stack((loss.weight_ce * ce.float(), -loss.weight_dice * dice.float()), 1)

    def _dice(self, output: Tensor, truth: Tensor, valid: Tensor | None, space: tuple[int, ...]) -> Tensor:
        """Soft Dice, (B,): per class, then averaged."""
        probability = self.dice.apply_nonlin(output)
        if not self.dice.do_bg:
            probability, truth = probability[:, 1:], truth[:, 1:]
        if valid is not None:
            probability, truth = probability * valid, truth * valid
        overlap = (probability * truth).sum(space, dtype=torch.float32)
        predicted = probability.sum(space, dtype=torch.float32)
        true = truth.sum(space, dtype=torch.float32)
        smooth = float(self.dice.smooth)
        dice = (2 * overlap + smooth) / (true + predicted + smooth).clamp_min(1e-8)
        if not self.skip_absent:
            return dice.mean(1)
        present = true > 0
        number = present.sum(1)
        mean = torch.where(present, dice, 0.0).sum(1) / number.clamp_min(1)
        return torch.where(number > 0, mean, 1.0)


def check_terms(loss: nn.Module, labels: Any, dimensions: int, device: torch.device) -> None:
    """Compares the terms with the loss itself, on random outputs: what derives from a stock loss may be another one.

    Args:
        loss: of a trainer, with or without deep supervision.
        labels: the host's label manager.
        dimensions: 2 or 3, of the patches.
        device: of the loss.

    Raises:
        TypeError: as :class:`SampleTerms`; or if a sample's terms do not add up to the loss of that sample.
    """
    terms = SampleTerms(loss, "sum", "count")
    generator = torch.Generator().manual_seed(0)
    scales = 1 if terms.weights is None else len(terms.weights)
    outputs, targets = [], []
    for _ in range(scales):
        shape = (2, 1) + (6,) * dimensions
        values = torch.tensor([*labels.all_labels, *([] if labels.ignore_label is None else [labels.ignore_label])])
        truth = values[torch.randint(len(values), shape, generator=generator)]
        heads = torch.randn((2, labels.num_segmentation_heads, *shape[2:]), generator=generator)
        outputs.append(2 * heads.to(device))
        targets.append(training_target(labels, truth).to(device))
    with torch.no_grad(), _uncompiled(terms):
        for index in range(2):
            one = [[tensor[index : index + 1] for tensor in tensors] for tensors in (outputs, targets)]
            given = one if terms.weights is not None else [tensors[0] for tensors in one]
            found, wanted = float(terms(*given)), float(loss(*given))
            if not abs(found - wanted) <= 1e-3 * max(1.0, abs(wanted)):
                raise TypeError(
                    f"adversarial training needs the loss of each sample, and what it knows of nnU-Net's losses does "
                    f"not fit this trainer's ({type(terms.loss).__name__} of {type(terms.loss).__module__}): "
                    f"{found:.4f} for {wanted:.4f} on random outputs. Train with a base that keeps nnU-Net's loss."
                )


@contextmanager
def _uncompiled(terms: SampleTerms) -> Iterator[None]:
    """The loss without torch.compile, which must not see other shapes than those of the training."""
    before = terms.loss.dc
    terms.loss.dc = terms.dice
    try:
        yield
    finally:
        terms.loss.dc = before


def training_target(labels: Any, truth: Tensor) -> Tensor:
    """A label map, (B, 1, *spatial), in the form of the training: as it is, or regions with the ignore mask last."""
    if not labels.has_regions:
        return truth
    regions = [r if isinstance(r, tuple) else (r,) for r in labels.foreground_regions]
    masks = [torch.isin(truth, torch.tensor(region, device=truth.device)) for region in regions]
    if labels.has_ignore_label:
        masks.append(truth == labels.ignore_label)
    return torch.cat(masks, 1)


def inference_loss(labels: Any) -> nn.Module:
    """nnU-Net's loss for a data set's labels, without deep supervision, for attacks on a trained network.

    Args:
        labels: the host's label manager.
    """
    if labels.has_regions:
        dice = {"batch_dice": False, "do_bg": True, "smooth": 1e-5, "ddp": False}
        ignore = labels.ignore_label is not None
        return DC_and_BCE_loss({}, dice, use_ignore_label=ignore, dice_class=MemoryEfficientSoftDiceLoss)
    dice = {"batch_dice": False, "do_bg": False, "smooth": 1e-5, "ddp": False}
    return DC_and_CE_loss(dice, {}, ignore_label=labels.ignore_label, dice_class=MemoryEfficientSoftDiceLoss)


class SegmentationObjective:
    """The objective of one batch: ``images (B, C, *spatial) -> terms (B, K)``.

    Args:
        network: what the host trains with (a DistributedDataParallel wrapper, perhaps).
        model: the bare network, for the attack: its passes must not reach the wrapper, which would wait for the
            gradients of each.
        batch_loss: the host's own loss.
        terms: its per-sample form.
        target: of the batch.
        precision: makes the context that the attack's passes run in.

    Attributes:
        empty: for each sample, whether there is no structure in it; None: not said.

    Example:
        >>> import torch
        >>> from adv_nnunet import SampleTerms, SegmentationObjective
        >>> from advmed import pgd
        >>> from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
        >>> loss = DC_and_CE_loss({"batch_dice": False, "do_bg": False, "smooth": 1e-5, "ddp": False}, {})
        >>> network, images, target = torch.nn.Conv2d(1, 2, 1), torch.zeros(2, 1, 8, 8), torch.eye(8).expand(2, 1, 8, 8)
        >>> objective = SegmentationObjective(network, network, loss, SampleTerms(loss, "sum"), target)
        >>> found = pgd(objective, images, 1.0, steps=10, step_scale=4)
        >>> bool((found.terms > objective(images)).all())
        True
    """

    def __init__(
        self,
        network: nn.Module,
        model: nn.Module,
        batch_loss: nn.Module,
        terms: SampleTerms,
        target: Outputs,
        precision: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.network, self.model = network, model
        self.batch_loss, self.terms = batch_loss, terms
        self.target = ordinary(target) if isinstance(target, Tensor) else [ordinary(scale) for scale in target]
        self.precision = precision
        self.names = terms.names
        self.empty: Sequence[bool] | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """The terms, for an attack."""
        with self.precision():
            return self.terms(self.model(images), self.target)

    def loss(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The host's own loss of the batch, to back-propagate, and the terms of the same pass."""
        return self.loss_and_predictions(images)[:2]

    def predictions(self, images: Tensor) -> Outputs:
        """The network's output, for an attack."""
        with self.precision():
            return self.model(images)

    def loss_and_predictions(self, images: Tensor) -> tuple[Tensor, Tensor, Outputs]:
        """The host's own loss, the terms and the output of one training pass."""
        output = self.network(images)
        with torch.no_grad():
            terms = self.terms(output, self.target)
        return self.batch_loss(output, self.target), terms, output

    def class_scores(self, predictions: Outputs) -> ClassScores:
        """The classes of the voxels at full resolution."""
        return self.terms.class_scores(_first(predictions), _first(self.target))

    def distance(self, clean: Outputs, other: Outputs) -> Tensor:
        """See :meth:`SampleTerms.distance`."""
        return self.terms.distance(clean, other)


def _first(tensors: Outputs) -> Tensor:
    return tensors if isinstance(tensors, Tensor) else tensors[0]


def _mean(values: Tensor, valid: Tensor | None, weight: Tensor | None) -> Tensor:
    """Mean over the voxels of every sample that count, (B, voxels) -> (B,); 0 for a sample that has none."""
    if valid is None and weight is None:
        return values.mean(1)
    counted = torch.ones_like(values) if weight is None else weight.flatten(1).to(values.dtype)
    if valid is not None:
        counted = counted * valid
        values = values * valid
    return values.sum(1) / counted.sum(1).clamp_min(1e-8)

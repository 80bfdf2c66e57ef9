"""Ultralytics' detection loss as per-image terms (B, K), with gradients.

The host's criterion sums over the anchors of the whole batch and divides by the batch's sum of target scores. Here the
same sums are taken per image. By default an image's sums are divided by its own target scores, so that an image has the
loss that the host gives it alone: terms then do not depend on what else is in the batch, which is what thresholds and
attacks need. The training loss stays the host's own.

Models with two heads (YOLO26, YOLOv10) are trained by a weighted sum of a one-to-many and a one-to-one loss whose
weights move over the epochs, and the one-to-one head is cut off from the backbone (its features are detached). Terms
and attacks follow one head, the one that predicts: one-to-many with non-maximum suppression, as the host validates by
default, and one-to-one with ``nms=False``. An attack on the one-to-one head goes through the features that training
detaches; otherwise there would be no gradient to follow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from ultralytics import __version__
from ultralytics.cfg import DEFAULT_CFG_DICT
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.loss import v8DetectionLoss
from ultralytics.utils.metrics import bbox_iou
from ultralytics.utils.tal import bbox2dist

from advmed.distances import bernoulli_divergence
from advmed.objective import ordinary

Normalizer = Literal["image", "batch"]
HEADS = ("Detect", "v10Detect")
"""Heads whose loss is read here."""
Batch = Mapping[str, Any]


class ImageTerms:
    """The detection criterion of a model, read per image.

    Args:
        model: an Ultralytics ``DetectionModel``, YOLOv5u and newer.
        criterion: the host's criterion to read, made by ``model.init_criterion()``; None makes one.
        one_to_one: which head of a model with two is followed; None: the one that the model predicts with.

    Attributes:
        names: the names of the K terms, the criterion's own (``box_loss``, ``cls_loss``, ``dfl_loss`` or ``l1_loss``).
        criterion: the criterion; its values stay the host's.

    Raises:
        TypeError: for a model of another task.

    Example:
        >>> import torch
        >>> from adv_yolo import ImageTerms
        >>> from ultralytics import YOLO
        >>> model, box = YOLO("yolov8n.yaml").model, torch.tensor([[0.5, 0.5, 0.4, 0.4]])
        >>> images, zero = torch.rand(2, 3, 64, 64), torch.zeros(1)
        >>> batch = {"img": images, "batch_idx": zero, "cls": zero[:, None], "bboxes": box}
        >>> terms, predictions = ImageTerms(model), model(images)
        >>> terms.names
        ('box_loss', 'cls_loss', 'dfl_loss')
        >>> host, _, _ = terms.batch_loss(predictions, batch)  # the host's own criterion
        >>> torch.isclose(terms(predictions, batch, normalizer="batch").sum(), host.sum(), rtol=1e-3).item()
        True
    """

    def __init__(self, model: nn.Module, criterion: Any = None, *, one_to_one: bool | None = None) -> None:
        check_model(model)
        self.criterion = make_criterion(model) if criterion is None else criterion
        head = head_of(model)
        self.branch: str | None = None
        followed = self.criterion
        if hasattr(self.criterion, "one2one"):
            self.branch = "one2one" if (head.end2end if one_to_one is None else one_to_one) else "one2many"
            followed = getattr(self.criterion, self.branch)
        if type(followed) is not v8DetectionLoss:
            raise TypeError(
                f"adv_yolo knows the loss of detection models (v8DetectionLoss), got {type(followed).__name__}; "
                "oriented boxes, pose, segmentation and classification are not supported"
            )
        self._followed = followed
        self._recorder = _Recorder(followed)
        self._checked = False
        self.names: tuple[str, ...] = tuple(followed.loss_names)

    def __call__(self, predictions: Any, batch: Batch, normalizer: Normalizer = "image") -> Tensor:
        """The loss terms of every image.

        Args:
            predictions: of the model, in training or evaluation mode.
            batch: with ``batch_idx``, ``cls`` and ``bboxes`` as the host's loaders give them.
            normalizer: "image" divides an image's sums by its own target scores: the host's loss of this image alone.
                "batch" divides by those of the whole batch: the sum over the images is the host's loss of the batch.

        Returns:
            (B, K), float32, with gradients. An image without objects has only a classification term.
        """
        self._recorder.exact = False
        self._followed.get_assigned_targets_and_loss(self._select(predictions), batch)
        return self._recorder.terms(normalizer)

    def batch_loss(self, predictions: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The host's own loss of the batch and the terms of the same pass.

        Returns:
            loss: the host's loss vector, to be summed and back-propagated.
            items: the host's loss items for its logs, detached.
            terms: (B, K), detached.
        """
        self._recorder.exact = True
        try:
            loss, items = self.criterion(predictions, batch)
        finally:
            self._recorder.exact = False
        if not self._checked:
            self._checked = self._recorder.check()
        return loss, items, self._recorder.terms("image").detach()

    def confidence(self, predictions: Any) -> Tensor:
        """The sum over the anchors of the confidence of their likeliest class, (B, 1)."""
        scores: Tensor = self._select(predictions)["scores"]
        return scores.float().sigmoid().amax(1).sum(1, keepdim=True)

    @contextmanager
    def assigning(self, assigned: Any) -> Iterator[None]:
        """Gives the anchors to the objects as they were given before, whatever the predictions are.

        Args:
            assigned: of an earlier pass on images with the same objects, see :meth:`assignment`.
        """
        own = self._followed.assigner
        self._followed.assigner = _Listener(lambda *_, **__: assigned)
        try:
            yield
        finally:
            self._followed.assigner = own

    def assignment(self, predictions: Any, batch: Batch) -> Any:
        """How the host gives the anchors to the objects for such predictions."""
        own, kept = self._followed.assigner, []

        def assigner(*arguments: object, **more: object) -> Any:
            kept.append(own(*arguments, **more))
            return kept[-1]

        self._followed.assigner = _Listener(assigner)
        try:
            self(predictions, batch)
        finally:
            self._followed.assigner = own
        return kept[-1] if kept else None

    def _select(self, predictions: Any) -> Any:
        parsed = self._followed.parse_output(predictions)
        return parsed if self.branch is None else parsed[self.branch]

    def distance(self, clean: Any, other: Any) -> Tensor:
        """How far predictions are from those on clean images, (B,); the mean over the heads of a model with two.

        Per anchor, the Bernoulli KL divergence of the class scores, summed over classes, and, weighted by the clean
        confidence, the distance of the four sides (:func:`side_distance`); summed over anchors and divided by the sum
        of those weights, as the host divides its loss by the sum of target scores.
        """
        heads = zip(_heads(self._followed.parse_output(clean)), _heads(self._followed.parse_output(other)), strict=True)
        return torch.stack([_head_distance(first, second) for first, second in heads]).mean(0)

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Lets a gradient pass from the followed head to the image.

        In training mode a one-to-one head detaches its features. Only the flag of the head itself is changed; its
        layers keep theirs, BatchNorm with batch statistics among them.
        """
        head = head_of(model)
        training = head.training
        if head.anchors.is_inference():  # kept from a prediction of the host; no gradient passes through them
            head.shape = None
        if self.branch == "one2one":
            head.training = False
        try:
            yield
        finally:
            head.training = training


class _Recorder:
    """Listens to the two parts of a v8DetectionLoss that see anchors, and sums what they see per image."""

    def __init__(self, criterion: Any) -> None:
        self._bce, self._bbox = criterion.bce, criterion.bbox_loss
        if isinstance(self._bce, _Listener):
            raise TypeError("this criterion is already read by other ImageTerms; make a criterion of its own")
        self._gains = [float(getattr(criterion.hyp, name)) for name in ("box", "cls", "dfl")]
        self.exact = False  # whether the host's own values are handed back, and no gradient of ours is wanted
        self._totals: tuple[Tensor, Tensor] | None = None
        criterion.bce = _Listener(self._classification)
        criterion.bbox_loss = _Listener(self._boxes)

    def _classification(self, scores: Tensor, targets: Tensor) -> Tensor:
        # Kept, and summed when it is asked for: the host multiplies it by class weights in place.
        self._cls: Tensor = self._bce(scores, targets)
        return self._cls

    def _boxes(
        self,
        distances: Tensor,
        boxes: Tensor,
        anchors: Tensor,
        target_boxes: Tensor,
        target_scores: Tensor,
        target_scores_sum: Tensor,
        foreground: Tensor,
        size: Tensor,
        stride: Tensor,
    ) -> tuple[Tensor, Tensor]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.exact):
            self._scores = target_scores.flatten(1).sum(1).float()
            index = foreground.nonzero(as_tuple=True)
            weight = target_scores[index].sum(-1).float()
            overlap = bbox_iou(boxes[index], target_boxes[index], xywh=False, CIoU=True).squeeze(-1)
            self._box = _per_image((1 - overlap.float()) * weight, index[0], self._scores)
            distance = self._distance(distances[index], anchors, target_boxes, index, size, stride)
            self._dist = _per_image(distance.float() * weight, index[0], self._scores)
        self._sum = target_scores_sum
        if self.exact:
            self._totals = self._bbox(
                distances,
                boxes,
                anchors,
                target_boxes,
                target_scores,
                target_scores_sum,
                foreground,
                size,
                stride,
            )
            return self._totals
        return self._box.sum() / target_scores_sum, self._dist.sum() / target_scores_sum

    def _distance(
        self,
        distances: Tensor,
        anchors: Tensor,
        targets: Tensor,
        index: tuple[Tensor, ...],
        size: Tensor,
        stride: Tensor,
    ) -> Tensor:
        """DFL (Li et al. 2020) of every foreground anchor, or the L1 distance of its sides over the image size."""
        if self._bbox.dfl_loss is not None:
            bins = self._bbox.dfl_loss.reg_max
            sides = bbox2dist(anchors, targets, bins - 1)[index]
            loss: Tensor = self._bbox.dfl_loss(distances.reshape(-1, bins), sides)
            return loss.squeeze(-1)
        scale = (stride / size.flip(0).repeat(2)).expand_as(targets[0])[index[1]]  # left, top, right, bottom
        sides = bbox2dist(anchors, targets)[index]
        return ((distances - sides) * scale).abs().mean(-1)

    def terms(self, normalizer: Normalizer) -> Tensor:
        cls = self._cls.flatten(1).sum(1, dtype=torch.float32)
        sums = torch.stack(
            [part * gain for part, gain in zip((self._box, cls, self._dist), self._gains, strict=True)], 1
        )
        if normalizer == "image":
            return sums / self._scores.clamp(min=1)[:, None]
        return sums * (len(sums) / self._sum.float())

    def check(self) -> bool:
        """Raises RuntimeError if our sums are not the host's: its release computes its loss in another way.

        Returns:
            Whether the box loss was large enough to tell; a batch without objects has none.
        """
        assert self._totals is not None
        ours = torch.stack([self._box.sum(), self._dist.sum()]) / self._sum
        host = torch.stack([total.detach() for total in self._totals])
        if bool(host.isfinite().all()) and not torch.allclose(ours.float(), host.float(), rtol=2e-2, atol=1e-3):
            raise RuntimeError(
                f"Ultralytics {__version__} computes its box losses ({host.tolist()}) in another way than adv_yolo "
                f"({ours.tolist()}). Install the release named in advmed's documentation, and report this."
            )
        return bool(host[0] > 0.05)  # far above the tolerance


class _Listener:
    """A function in the place of one of a criterion's modules."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, *arguments: object, **more: object) -> Any:
        return self.function(*arguments, **more)


def _per_image(values: Tensor, image: Tensor, like: Tensor) -> Tensor:
    """Sums of the anchors' values by image, (B,)."""
    return torch.zeros_like(like).index_add(0, image, values)


def _heads(predictions: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The raw predictions of each head."""
    return [predictions] if "scores" in predictions else [predictions[name] for name in sorted(predictions)]


def _head_distance(clean: Mapping[str, Any], other: Mapping[str, Any]) -> Tensor:
    confidence = clean["scores"].detach().float().sigmoid().amax(1)
    classes = bernoulli_divergence(clean["scores"], other["scores"]).sum(1)
    sides = side_distance(clean, other)
    return (classes + confidence * sides).sum(1) / confidence.sum(1).clamp_min(1)


def side_distance(clean: Mapping[str, Any], other: Mapping[str, Any]) -> Tensor:
    """The distance of the four sides of every anchor's box, averaged over them, (B, anchors).

    KL divergence of the distributions where the head predicts those (DFL), else the absolute difference as a fraction
    of the image's size, which is what the host's ``l1_loss`` measures.
    """
    batch, channels, anchors = clean["boxes"].shape
    first, second = (predictions["boxes"].float().view(batch, 4, -1, anchors) for predictions in (clean, other))
    if channels > 4:
        log_p, log_q = first.log_softmax(2), second.log_softmax(2)
        return (log_p.exp() * (log_p - log_q)).sum(2).mean(1)
    cells = [level.shape[2:] for level in clean["feats"]]
    across = torch.cat([first.new_full((h * w,), 1 / w) for h, w in cells])  # made on the device
    along = torch.cat([first.new_full((h * w,), 1 / h) for h, w in cells])
    scale = torch.stack((across, along, across, along))  # left, top, right, bottom
    return ((first - second).squeeze(2).abs() * scale).mean(1)


class DetectionObjective:
    """The objective of one batch: ``images (B, 3, H, W) in [0, 1] -> terms (B, K)``.

    Args:
        model: the network, without a distributed wrapper.
        terms: its loss per image.
        batch: the host's batch with the targets.
        given: predictions for ``batch["img"]`` that the host has made already, for the first training pass on them.
        hold: makes the context of a training pass on images other than ``batch["img"]``, to keep them out of running
            statistics.
        loss_scale: what the host scales its loss by against float16 underflow, a scalar tensor; None: it does not.

    Attributes:
        items: the loss items of the first training pass, see :meth:`loss`.
        empty: for each image, whether there is no object in it; None: not said.

    Example:
        >>> import torch
        >>> from adv_yolo import DetectionObjective, ImageTerms
        >>> from ultralytics import YOLO
        >>> model, box = YOLO("yolov8n.yaml").model, torch.tensor([[0.5, 0.5, 0.4, 0.4]])
        >>> images, zero = torch.rand(2, 3, 64, 64), torch.zeros(1)
        >>> batch = {"img": images, "batch_idx": zero, "cls": zero[:, None], "bboxes": box}
        >>> objective = DetectionObjective(model, ImageTerms(model), batch)
        >>> objective(images).shape, objective.names
        (torch.Size([2, 3]), ('box_loss', 'cls_loss', 'dfl_loss'))
    """

    def __init__(
        self,
        model: nn.Module,
        terms: ImageTerms,
        batch: Batch,
        given: Any = None,
        hold: Any = nullcontext,
        loss_scale: Tensor | None = None,
    ) -> None:
        self.model, self.terms = model, terms
        self.batch = {key: ordinary(value) if isinstance(value, Tensor) else value for key, value in batch.items()}
        self.names = terms.names
        self.loss_scale = loss_scale
        self._given, self._hold = given, hold
        self.items: dict[str, Tensor] | None = None
        self.empty: Sequence[bool] | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """The terms, for an attack; of the host's own predictions where they are at hand and no gradient is asked."""
        if self._given is not None and images is self.batch["img"] and not torch.is_grad_enabled():
            return self.terms(self._given, self.batch)
        return self.terms(self.predictions(images), self.batch)

    def take(self, rows: Tensor) -> DetectionObjective:
        """The objective of some images of the batch, by their numbers."""
        index = self.batch["batch_idx"].long()
        place = torch.full((len(self.batch["img"]),), -1, device=rows.device)
        place[rows] = torch.arange(len(rows), device=rows.device)
        place = place.to(index.device)
        kept = (place[index] >= 0).nonzero()[:, 0]
        kept = kept[place[index[kept]].argsort(stable=True)]  # the host takes them to be in the order of the images
        part = {
            "img": self.batch["img"][rows],
            "batch_idx": place[index[kept]].to(self.batch["batch_idx"].dtype),
            "cls": self.batch["cls"][kept],
            "bboxes": self.batch["bboxes"][kept],
        }
        return DetectionObjective(self.model, self.terms, part)

    def confidence(self, images: Tensor) -> Tensor:
        """See :meth:`ImageTerms.confidence`."""
        return self.terms.confidence(self.predictions(images))

    def holding(self, images: Tensor) -> Held:
        """The same loss, with the anchors given to the objects as they are on ``images``."""
        return Held(self, self.terms.assignment(self.predictions(images), self.batch))

    def loss(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The host's own loss of the batch, to back-propagate, and the terms of the same pass.

        The loss items of the first such pass are kept in ``items``: the clean ones where a method makes a clean pass.
        """
        return self.loss_and_predictions(images)[:2]

    def predictions(self, images: Tensor) -> Any:
        """The raw predictions, for an attack."""
        with self.terms.attached(self.model):
            return self.model(images)

    def loss_and_predictions(self, images: Tensor) -> tuple[Tensor, Tensor, Any]:
        """As :meth:`loss`, and the raw predictions."""
        if self._given is not None and images is self.batch["img"]:
            predictions, self._given = self._given, None
        else:
            context: AbstractContextManager[object] = self._hold()
            with context:
                predictions = self.model(images)
        loss, items, terms = self.terms.batch_loss(predictions, self.batch)
        if self.items is None:
            self.items = items
        return loss.sum(), terms, predictions

    def distance(self, clean: Any, other: Any) -> Tensor:
        """See :meth:`ImageTerms.distance`."""
        return self.terms.distance(clean, other)


class Held:
    """The terms of an objective whose anchors stay with the objects that they were given to once.

    Args:
        objective: the objective.
        assigned: see :meth:`ImageTerms.assignment`.
    """

    def __init__(self, objective: DetectionObjective, assigned: Any) -> None:
        self.objective, self.assigned = objective, assigned
        self.model, self.names = objective.model, objective.names

    def __call__(self, images: Tensor) -> Tensor:
        """The terms, (B, K)."""
        if self.assigned is None:
            return self.objective(images)
        with self.objective.terms.assigning(self.assigned):
            return self.objective(images)


def per_image_losses(model: nn.Module, batch: Batch, *, normalizer: Normalizer = "image") -> Tensor:
    """The loss of every image of a batch, split into the K terms of the model's own criterion.

    Args:
        model: a detection model (``YOLO(...).model``), in training or evaluation mode, which decides about BatchNorm.
        batch: the host's batch: ``img`` (B, 3, H, W) in [0, 1], ``batch_idx`` (n,), ``cls`` (n, 1) and ``bboxes``
            (n, 4), normalised xywh.
        normalizer: see :meth:`ImageTerms.__call__`.

    Returns:
        (B, K), with gradients; the names of the terms are ``ImageTerms(model).names``.

    Raises:
        TypeError: for a model of another task.

    Example:
        >>> import torch
        >>> from adv_yolo import per_image_losses
        >>> from ultralytics import YOLO
        >>> box = torch.tensor([[0.5, 0.5, 0.4, 0.4]])  # an object in the first of two images
        >>> images, zero = torch.rand(2, 3, 64, 64), torch.zeros(1)
        >>> batch = {"img": images, "batch_idx": zero, "cls": zero[:, None], "bboxes": box}
        >>> losses = per_image_losses(YOLO("yolov8n.yaml").model, batch)
        >>> (losses > 0).tolist()  # box, class and DFL loss: without an object, only the class can be wrong
        [[True, True, True], [False, True, False]]
    """
    terms = ImageTerms(model)
    with terms.attached(model):
        predictions = model(batch["img"])
    return terms(predictions, batch, normalizer)


def head_of(model: Any) -> Any:
    """The layer that predicts."""
    return model.model[-1]


def make_criterion(model: Any) -> Any:
    """The model's criterion, a new one; also for a model loaded from a file, whose arguments are a plain dict."""
    arguments = model.args
    if isinstance(arguments, SimpleNamespace):
        return model.init_criterion()
    model.args = SimpleNamespace(**{**DEFAULT_CFG_DICT, **dict(arguments)})
    try:
        return model.init_criterion()
    finally:
        model.args = arguments


def check_head(description: Mapping[str, Any]) -> None:
    """Raises TypeError if a YAML file describes a model of another kind, whose making may fail for other reasons."""
    head = str(description["head"][-1][2]) if description.get("head") else "none"
    if head not in HEADS:
        raise TypeError(_UNKNOWN.format(kind="a description", head=head))


_UNKNOWN = (
    "adv_yolo works on detection models (ultralytics DetectionModel with a Detect head, YOLOv5u and newer), got {kind} "
    "with the head {head}. Oriented boxes, pose, segmentation, classification and open vocabularies (YOLO-World, "
    "YOLOE) are not supported; of a YOLO object pass its .model"
)


def check_model(model: Any) -> DetectionModel:
    """Returns ``model`` if it is a detection model.

    Raises:
        TypeError: otherwise, naming what was expected.
    """
    head = type(head_of(model)).__name__ if isinstance(model, DetectionModel) else "none"
    if type(model) is DetectionModel and head in HEADS:
        if getattr(head_of(model), "cv2", None) is None:
            raise TypeError("this model was fused, which removed the head that its loss needs; load the .pt file again")
        return model
    raise TypeError(_UNKNOWN.format(kind=type(model).__name__, head=head))

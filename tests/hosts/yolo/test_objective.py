"""Per-image terms against the stock criterion: image by image, summed over the batch, and through its gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from ultralytics import YOLO
from ultralytics.cfg import DEFAULT_CFG_DICT
from ultralytics.nn.tasks import (
    ClassificationModel,
    DetectionModel,
    OBBModel,
    PoseModel,
    RTDETRDetectionModel,
    SegmentationModel,
)
from ultralytics.utils.loss import BboxLoss

from adv_yolo import ImageTerms, per_image_losses
from adv_yolo.objective import DetectionObjective
from advmed.methods.trades import Distance, detached

CASES = [
    ("yolov5n", None),
    ("yolov8n", None),
    ("yolo11n", None),
    ("yolov10n", False),
    ("yolo26n", False),
    ("yolo26n", True),
]
families = pytest.mark.parametrize(("name", "end2end"), CASES)
modes = pytest.mark.parametrize("training", [False, True])


def followed(criterion: Any, predictions: Any, end2end: bool | None) -> tuple[Any, Any]:
    """The stock criterion of one head, and its predictions."""
    if end2end is None:
        return criterion, predictions[1] if isinstance(predictions, tuple) else predictions
    branch = "one2one" if end2end else "one2many"
    return getattr(criterion, branch), getattr(criterion, branch).parse_output(predictions)[branch]


def stock(model: DetectionModel, predictions: Any, batch: dict[str, Any], end2end: bool | None) -> Tensor:
    """The stock loss vector of the head that predicts, its factor of the batch size included."""
    criterion, own = followed(model.init_criterion(), predictions, end2end)
    return criterion.loss(own, batch)[0]


def predict(model: DetectionModel, images: Tensor, end2end: bool | None) -> Any:
    """As the model in its mode, but with a one-to-one head whose gradient reaches the images."""
    head = model.model[-1]
    training, head.training = head.training, head.training and not end2end
    try:
        return model(images)
    finally:
        head.training = training


# Values


@families
def test_an_image_has_the_stock_loss_of_this_image_alone(
    networks: Any, batch: dict[str, Any], tools: Any, name: str, end2end: bool | None
) -> None:
    model = networks(name, end2end)
    terms = per_image_losses(model, batch)
    assert terms.shape == (4, 3)
    for i in range(4):
        alone = tools.one_image(batch, i)
        wanted = stock(model, model(alone["img"]), alone, end2end)
        torch.testing.assert_close(terms[i], wanted, rtol=1e-5, atol=1e-6)
    assert terms[[0, 1, 3]].min() > 0


@families
def test_an_image_has_the_stock_loss_of_its_predictions_where_batch_norm_couples_images(
    networks: Any, batch: dict[str, Any], tools: Any, name: str, end2end: bool | None
) -> None:
    model = networks(name, end2end).train()
    predictions = model(batch["img"])
    terms = ImageTerms(model, one_to_one=end2end)(predictions, batch)
    for i in range(4):
        wanted = stock(model, tools.of_image(predictions, i), tools.one_image(batch, i), end2end)
        torch.testing.assert_close(terms[i], wanted, rtol=1e-5, atol=1e-6)


@modes
@families
def test_the_sum_over_images_is_the_stock_loss_of_the_batch_with_its_gradients(
    networks: Any, batch: dict[str, Any], name: str, end2end: bool | None, training: bool
) -> None:
    first = networks(name, end2end).train(training)
    second = copy.deepcopy(first)
    images, others = (batch["img"].clone().requires_grad_() for _ in range(2))
    ours = per_image_losses(first, {**batch, "img": images}, normalizer="batch")
    wanted = stock(second, predict(second, others, end2end), batch, end2end)
    torch.testing.assert_close(ours.sum(0), wanted, rtol=1e-5, atol=1e-6)
    ours.sum().backward()
    wanted.sum().backward()
    assert images.grad is not None
    assert others.grad is not None
    assert others.grad.flatten(1).norm(dim=1).min() > 0
    scale = float(others.grad.abs().max())
    torch.testing.assert_close(images.grad, others.grad, rtol=1e-4, atol=1e-5 * scale)
    weights = dict(second.named_parameters())
    assert sum(parameter.grad is not None for parameter in weights.values()) > 50
    for key, parameter in first.named_parameters():
        gradient = weights[key].grad
        assert (parameter.grad is None) == (gradient is None), key
        if gradient is not None:
            scale = float(gradient.abs().max())
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-4 * scale + 1e-8, msg=key)


@modes
@families
def test_the_training_loss_is_the_stock_one_bit_for_bit(
    networks: Any, batch: dict[str, Any], name: str, end2end: bool | None, training: bool
) -> None:
    model = networks(name, end2end).train(training)
    predictions = model(batch["img"])
    wanted, wanted_items = model.init_criterion()(predictions, batch)
    gradient = torch.autograd.grad(wanted.sum(), list(model.model[0].parameters()), retain_graph=True)
    terms = ImageTerms(model)
    loss, items, per_image = terms.batch_loss(predictions, batch)
    assert torch.equal(loss, wanted)
    assert items.keys() == wanted_items.keys()
    assert all(torch.equal(items[key], wanted_items[key]) for key in items)
    for ours, host in zip(
        torch.autograd.grad(loss.sum(), list(model.model[0].parameters()), retain_graph=True), gradient, strict=True
    ):
        assert torch.equal(ours, host)
    assert not per_image.requires_grad
    torch.testing.assert_close(per_image, terms(predictions, batch), rtol=1e-5, atol=1e-6)


@families
def test_the_terms_are_named_by_the_criterion(networks: Any, name: str, end2end: bool | None) -> None:
    model = networks(name, end2end)
    criterion = model.init_criterion()
    wanted = criterion.loss_names if end2end is None else criterion.one2many.loss_names
    names = ImageTerms(model).names
    assert names == tuple(wanted)
    assert names == ("box_loss", "cls_loss", "l1_loss" if name == "yolo26n" else "dfl_loss")


def test_class_weights_are_respected(networks: Any, batch: dict[str, Any], tools: Any) -> None:
    plain, weighted = networks("yolov8n"), networks("yolov8n")
    weighted.class_weights = torch.tensor([0.2, 1.3, 1.5])
    terms = per_image_losses(weighted, batch)
    for i in range(4):
        alone = tools.one_image(batch, i)
        wanted = stock(weighted, weighted(alone["img"]), alone, None)
        torch.testing.assert_close(terms[i], wanted, rtol=1e-5, atol=1e-6)
    unweighted = per_image_losses(plain, batch)
    torch.testing.assert_close(terms[:, [0, 2]], unweighted[:, [0, 2]])
    assert ((terms[:, 1] - unweighted[:, 1]).abs() > 1e-3 * unweighted[:, 1]).all()


@pytest.mark.parametrize(("name", "end2end"), [("yolov8n", None), ("yolo26n", True)])
def test_images_without_objects_have_a_classification_term_only(
    networks: Any, batch: dict[str, Any], name: str, end2end: bool | None
) -> None:
    model = networks(name, end2end)
    empty = {**batch, "batch_idx": torch.zeros(0), "cls": torch.zeros(0, 1), "bboxes": torch.zeros(0, 4)}
    some, none = per_image_losses(model, batch), per_image_losses(model, empty)
    assert some[2, 1] > 0
    assert torch.equal(some[2, [0, 2]], torch.zeros(2))
    assert torch.equal(none[:, [0, 2]], torch.zeros(4, 2))
    assert (none[:, 1] > 0).all()
    torch.testing.assert_close(none[2], some[2])
    loss, _, _ = ImageTerms(model).batch_loss(model(batch["img"]), empty)
    assert loss.isfinite().all()


@pytest.mark.parametrize("kind", [dict, lambda **given: SimpleNamespace(**given)])
def test_the_models_arguments_may_be_a_dict_or_a_namespace(networks: Any, batch: dict[str, Any], kind: Any) -> None:
    model = networks("yolov8n")
    plain = per_image_losses(model, batch)
    given = {**DEFAULT_CFG_DICT, "box": 2 * DEFAULT_CFG_DICT["box"]}
    model.args = kind(**given)
    before = model.args
    terms = per_image_losses(model, batch)
    assert model.args is before
    assert (model.args if isinstance(before, dict) else vars(model.args)) == given
    torch.testing.assert_close(terms, plain * torch.tensor([2.0, 1.0, 1.0]))


def test_arguments_of_an_old_checkpoint_are_filled_up_with_defaults(networks: Any, batch: dict[str, Any]) -> None:
    model = networks("yolov8n")
    plain = per_image_losses(model, batch)
    model.args = {"imgsz": 64}
    assert torch.equal(per_image_losses(model, batch), plain)
    assert model.args == {"imgsz": 64}


def test_a_model_of_the_facade_works(batch: dict[str, Any]) -> None:
    model = YOLO("yolov8n.yaml").model  # 80 classes
    assert per_image_losses(model, batch).shape == (4, 3)


def test_terms_do_not_depend_on_the_rest_of_the_batch(networks: Any, batch: dict[str, Any], tools: Any) -> None:
    model = networks("yolov8n")
    order = [3, 1, 0]
    labels = [tools.one_image(batch, i) for i in order]
    rows = [torch.cat([part["cls"], part["bboxes"]], 1) for part in labels]
    other = tools.join([part["img"][0] for part in labels], rows)
    torch.testing.assert_close(
        per_image_losses(model, other), per_image_losses(model, batch)[order], rtol=1e-5, atol=1e-6
    )


# The gradient of an attack


@pytest.mark.parametrize(("name", "end2end"), [("yolov8n", None), ("yolo26n", False), ("yolo26n", True)])
def test_the_gradient_is_the_slope_of_the_loss(
    networks: Any, batch: dict[str, Any], name: str, end2end: bool | None
) -> None:
    """By finite differences, with the targets that the host assigned held where they were: it detaches them."""
    model = networks(name, end2end)
    criterion = model.init_criterion()
    own, _ = followed(criterion, model(batch["img"]), end2end)
    assign, assigned = own.assigner, []

    def once(*given: Any) -> Any:
        if not assigned:
            assigned.append(assign(*given))
        return assigned[0]

    own.assigner = once
    objective = DetectionObjective(model, ImageTerms(model, criterion), batch)
    images = batch["img"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(images).sum(), images)
    norms = gradient.flatten(1).norm(dim=1)
    direction, step = gradient / norms[:, None, None, None], 1e-3
    with torch.no_grad():
        up, down = (objective(images + sign * step * direction).sum(1).double() for sign in (1, -1))
    torch.testing.assert_close((up - down) / (2 * step), norms.double(), rtol=0.02, atol=0)


@pytest.mark.parametrize("training", [False, True])
def test_a_gradient_passes_through_the_one_to_one_head(networks: Any, batch: dict[str, Any], training: bool) -> None:
    """The stock head in training mode lets none pass."""
    model = networks("yolo26n", True).train(training)
    images = batch["img"].clone().requires_grad_()
    objective = DetectionObjective(model, ImageTerms(model), batch)
    (gradient,) = torch.autograd.grad(objective(images).sum(), images)
    assert gradient.flatten(1).norm(dim=1).min() > 0
    assert all(module.training is training for module in model.modules())
    if training:
        terms = ImageTerms(model, one_to_one=True)(model(images), batch)
        with pytest.raises(RuntimeError, match=r"does not require grad|not have been used"):
            torch.autograd.grad(terms.sum(), images)


def test_the_head_is_in_training_mode_again_after_an_exception(networks: Any) -> None:
    model = networks("yolo26n", True).train()
    terms = ImageTerms(model)
    with pytest.raises(ZeroDivisionError), terms.attached(model):
        assert not model.model[-1].training
        assert model.model[-1].one2one_cv2[0][0].bn.training
        raise ZeroDivisionError
    assert all(module.training for module in model.modules())


def test_terms_follow_the_head_that_predicts_unless_told_otherwise(networks: Any) -> None:
    for end2end, branch in ((True, "one2one"), (False, "one2many")):
        model = networks("yolo26n", end2end)
        assert ImageTerms(model).branch == branch
        assert ImageTerms(model, one_to_one=not end2end).branch != branch
    assert ImageTerms(networks("yolov8n"), one_to_one=True).branch is None


# How far predictions are from those on clean images


def leaves(predictions: list[dict[str, Any]]) -> list[Tensor]:
    """Scores and boxes of the heads, made to have gradients of their own."""
    for head in predictions:
        head.update({name: head[name].detach().requires_grad_() for name in ("scores", "boxes")})
    return [head[name] for head in predictions for name in ("scores", "boxes")]


@modes
@families
def test_the_distance_is_that_of_scores_and_sides(
    networks: Any, batch: dict[str, Any], tools: Any, name: str, end2end: bool | None, training: bool
) -> None:
    """Of an image that is no square, or width and height would be one; and with the gradients of both arguments."""
    model = networks(name, end2end).train(training)
    images = torch.cat((batch["img"], batch["img"][..., :32]), 3)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    passes = [model(images), model(images + 0.1 * noise)]
    for predictions in passes:
        for head in tools.heads_of(predictions):
            head["scores"][0] -= 5  # an image in which nothing is seen,
            head["scores"][3] += 5  # and one that is full of objects
    given = [leaf for predictions in passes for leaf in leaves(tools.heads_of(predictions))]
    for head in tools.heads_of(passes[0]):
        weights = head["scores"].sigmoid().amax(1).sum(1)
        assert weights[0] < 1 < weights[3], "one way to divide is missing"
    found, wanted = ImageTerms(model).distance(*passes), tools.divergence(model, *passes)
    assert found.shape == (4,)
    assert (wanted > 1e-6).all()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-8)
    both = (torch.autograd.grad(distance.sum(), given) for distance in (found, wanted))
    for ours, theirs in zip(*both, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize(("name", "end2end"), [("yolov8n", None), ("yolo26n", False), ("yolo26n", True)])
def test_equal_predictions_have_no_distance_and_no_gradient(
    networks: Any, batch: dict[str, Any], tools: Any, name: str, end2end: bool | None
) -> None:
    model = networks(name, end2end)
    predictions = model(batch["img"])
    given = leaves(tools.heads_of(predictions))
    distance = ImageTerms(model).distance(predictions, predictions)
    assert torch.equal(distance, torch.zeros(4))
    for gradient in torch.autograd.grad(distance.sum(), given):
        assert gradient.abs().max() < 1e-7


@pytest.mark.parametrize(("name", "end2end"), [("yolov8n", None), ("yolo26n", False)])
def test_the_distance_of_predictions_in_half_precision_is_computed_in_float32(
    networks: Any, batch: dict[str, Any], tools: Any, name: str, end2end: bool | None
) -> None:
    model = networks(name, end2end)
    passes = [model(images) for images in (batch["img"], batch["img"].flip(3))]
    for predictions in passes:
        for head in tools.heads_of(predictions):
            head.update({part: head[part].detach().half() for part in ("scores", "boxes")})
    found = ImageTerms(model).distance(*passes)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), tools.divergence(model, *passes), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "end2end", "reached"),
    [("yolov8n", None, [True]), ("yolo26n", False, [True, False]), ("yolo26n", True, [True, True])],
)
def test_the_attack_on_the_distance_reaches_the_images(
    networks: Any, batch: dict[str, Any], tools: Any, name: str, end2end: bool | None, reached: list[bool]
) -> None:
    """In training mode the stock one-to-one head lets no gradient pass; the attack must reach the head that predicts,
    although the predictions that it starts from come from a training pass.
    """
    model = networks(name, end2end).train()
    objective = DetectionObjective(model, ImageTerms(model), batch)
    _, _, reference = objective.loss_and_predictions(batch["img"])
    attack = Distance(objective, detached(reference))
    assert attack.model is model
    images = (batch["img"] + 0.02 * torch.rand(batch["img"].shape)).requires_grad_()
    terms = attack(images)
    assert terms.shape == (4, 1)
    (gradient,) = torch.autograd.grad(terms.sum(), images)
    assert gradient.flatten(1).norm(dim=1).min() > 0
    for head, wanted in zip(tools.heads_of(objective.predictions(images)), reached, strict=True):
        (gradient,) = torch.autograd.grad(head["scores"].sum(), images, retain_graph=True, allow_unused=True)
        assert (gradient is not None) == wanted
    assert all(module.training for module in model.modules())


# Passes


def test_predictions_that_the_host_has_made_are_used_once_and_for_its_images_only(
    networks: Any, batch: dict[str, Any]
) -> None:
    model = networks("yolov8n").train()
    given = model(batch["img"])
    passes: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, inputs: passes.append(inputs[0]))
    holding: list[int] = []

    @contextmanager
    def hold() -> Iterator[None]:
        before = len(passes)
        yield
        holding.append(len(passes) - before)

    objective = DetectionObjective(model, ImageTerms(model), batch, given, hold)
    other = batch["img"].flip(3)
    predictions = [objective.loss_and_predictions(other)[2]]
    assert [images is other for images in passes] == [True]
    assert holding == [1]  # the pass on images that are not the host's is kept out of the running statistics
    items = objective.items
    predictions.append(objective.loss_and_predictions(batch["img"])[2])
    assert predictions[1] is given
    assert len(passes) == 1
    assert objective.items is items, "the items are those of the first pass"
    loss, terms, again = objective.loss_and_predictions(batch["img"])
    assert len(passes) == 2
    torch.testing.assert_close(again["scores"], given["scores"])
    assert predictions[0]["scores"].requires_grad
    torch.testing.assert_close(objective.loss(batch["img"])[0], loss)
    assert loss.shape == ()
    assert not terms.requires_grad


# What is refused


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (SegmentationModel, "yolov8n-seg"),
        (PoseModel, "yolov8n-pose"),
        (OBBModel, "yolov8n-obb"),
        (ClassificationModel, "yolov8n-cls"),
    ],
)
def test_models_of_other_tasks_are_refused(batch: dict[str, Any], kind: Any, name: str) -> None:
    model = kind(f"{name}.yaml", verbose=False)
    with pytest.raises(TypeError, match=rf"works on detection models.*{kind.__name__}"):
        per_image_losses(model, batch)


def test_a_detection_model_with_another_head_is_refused(batch: dict[str, Any]) -> None:
    """RT-DETR, a subclass, without building 30 million weights for it."""
    model = RTDETRDetectionModel.__new__(RTDETRDetectionModel)
    nn.Module.__init__(model)
    model.model = nn.Sequential(nn.Identity())
    with pytest.raises(TypeError, match=r"works on detection models.*RTDETRDetectionModel"):
        per_image_losses(model, batch)


def test_the_facade_is_refused_with_a_hint() -> None:
    with pytest.raises(TypeError, match=r"of a YOLO object pass its \.model"):
        ImageTerms(YOLO("yolov8n.yaml"))


def test_a_fused_model_without_its_training_head_is_refused(networks: Any, batch: dict[str, Any]) -> None:
    model = networks("yolo26n", True)
    model.fuse(verbose=False)
    with pytest.raises(TypeError, match="fused"):
        per_image_losses(model, batch)


def test_a_criterion_is_read_by_one_reader_only(networks: Any) -> None:
    model = networks("yolov8n")
    criterion = model.init_criterion()
    ImageTerms(model, criterion)
    with pytest.raises(TypeError, match="already read"):
        ImageTerms(model, criterion)


@pytest.mark.parametrize("end2end", [None, False, True])
def test_a_release_that_computes_boxes_otherwise_is_noticed(
    networks: Any, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch, end2end: bool | None
) -> None:
    model = networks("yolov8n" if end2end is None else "yolo26n", end2end)
    forward = BboxLoss.forward

    def another(self: BboxLoss, *given: Any) -> tuple[Tensor, Tensor]:
        box, distance = forward(self, *given)
        return box * 1.2, distance

    monkeypatch.setattr(BboxLoss, "forward", another)
    terms = ImageTerms(model)
    background = {**batch, **{name: batch[name][:0] for name in ("batch_idx", "cls", "bboxes")}}
    terms.batch_loss(model(batch["img"]), background)  # without an object nothing can be told, and it is looked again
    with pytest.raises(RuntimeError, match=r"computes its box losses .* in another way"):
        terms.batch_loss(model(batch["img"]), batch)

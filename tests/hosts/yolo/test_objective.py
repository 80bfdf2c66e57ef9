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

CASES = [("yolov5n", None), ("yolov8n", None), ("yolo11n", None)]
CASES += [("yolov10n", False), ("yolo26n", False), ("yolo26n", True)]
FEW = [CASES[1], *CASES[4:]]
MARKED = [pytest.param(case, marks=[] if case in FEW else pytest.mark.slow) for case in CASES]
families = pytest.mark.parametrize("model", MARKED, indirect=True, ids=str)
three = pytest.mark.parametrize("model", FEW, indirect=True, ids=str)
modes = pytest.mark.parametrize("training", [False, True])


@pytest.fixture
def model(request: pytest.FixtureRequest, networks: Any) -> DetectionModel:
    """A network, of two heads asked for the second or not."""
    name, end2end = getattr(request, "param", CASES[1])
    model = networks(name, end2end)
    model.asked = end2end
    return model


def followed(criterion: Any, predictions: Any, end2end: bool | None) -> tuple[Any, Any]:
    """The stock criterion of one head, and its predictions."""
    if end2end is None:
        return criterion, predictions[1] if isinstance(predictions, tuple) else predictions
    branch = "one2one" if end2end else "one2many"
    return getattr(criterion, branch), getattr(criterion, branch).parse_output(predictions)[branch]


def stock(model: DetectionModel, predictions: Any, batch: dict[str, Any]) -> Tensor:
    """The stock loss vector of the head that predicts, its factor of the batch size included."""
    criterion, own = followed(model.init_criterion(), predictions, model.asked)
    return criterion.loss(own, batch)[0]


def predict(model: DetectionModel, images: Tensor) -> Any:
    """As the model in its mode, but with a one-to-one head whose gradient reaches the images."""
    head = model.model[-1]
    training, head.training = head.training, head.training and not model.asked
    try:
        return model(images)
    finally:
        head.training = training


@families
def test_an_image_has_the_stock_loss_of_this_image_alone(model: Any, batch: dict[str, Any], tools: Any) -> None:
    """Whatever the rest of the batch; of its predictions alone where BatchNorm couples images."""
    terms = per_image_losses(model, batch)
    assert terms.shape == (4, 3)
    for i in range(4):
        alone = tools.one_image(batch, i)
        wanted = stock(model, model(alone["img"]), alone)
        torch.testing.assert_close(terms[i], wanted, rtol=1e-5, atol=1e-6)
    assert terms[[0, 1, 3]].min() > 0
    predictions = model.train()(batch["img"])
    read = ImageTerms(model, one_to_one=model.asked)
    assert read.names == ("box_loss", "cls_loss", "l1_loss" if model.model[-1].reg_max == 1 else "dfl_loss")
    assert read.names == tuple((read.criterion if model.asked is None else read.criterion.one2many).loss_names)
    for i, row in enumerate(read(predictions, batch)):
        wanted = stock(model, tools.of_image(predictions, i), tools.one_image(batch, i))
        torch.testing.assert_close(row, wanted, rtol=1e-5, atol=1e-6)


@modes
@families
def test_the_sum_over_images_is_the_stock_loss_of_the_batch_with_its_gradients(
    model: Any, batch: dict[str, Any], training: bool
) -> None:
    first = model.train(training)
    second = copy.deepcopy(first)
    images, others = (batch["img"].clone().requires_grad_() for _ in range(2))
    ours = per_image_losses(first, {**batch, "img": images}, normalizer="batch")
    wanted = stock(second, predict(second, others), batch)
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
def test_the_training_loss_is_the_stock_one_bit_for_bit(model: Any, batch: dict[str, Any], training: bool) -> None:
    model.train(training)
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


def test_class_weights_are_respected(model: Any, batch: dict[str, Any], tools: Any) -> None:
    unweighted = per_image_losses(model, batch)
    model.class_weights = torch.tensor([0.2, 1.3, 1.5])
    terms = per_image_losses(model, batch)
    for i in range(4):
        alone = tools.one_image(batch, i)
        torch.testing.assert_close(terms[i], stock(model, model(alone["img"]), alone), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(terms[:, [0, 2]], unweighted[:, [0, 2]])
    assert ((terms[:, 1] - unweighted[:, 1]).abs() > 1e-3 * unweighted[:, 1]).all()


@three
def test_images_without_objects_have_a_classification_term_only(model: Any, batch: dict[str, Any]) -> None:
    empty = {**batch, "batch_idx": torch.zeros(0), "cls": torch.zeros(0, 1), "bboxes": torch.zeros(0, 4)}
    some, none = per_image_losses(model, batch), per_image_losses(model, empty)
    assert some[2, 1] > 0
    assert torch.equal(some[2, [0, 2]], torch.zeros(2))
    assert torch.equal(none[:, [0, 2]], torch.zeros(4, 2))
    assert (none[:, 1] > 0).all()
    torch.testing.assert_close(none[2], some[2])
    loss, _, _ = ImageTerms(model).batch_loss(model(batch["img"]), empty)
    assert loss.isfinite().all()


DOUBLED = {"box": 2 * DEFAULT_CFG_DICT["box"]}


@pytest.mark.parametrize(
    "given", [{**DEFAULT_CFG_DICT, **DOUBLED}, SimpleNamespace(**{**DEFAULT_CFG_DICT, **DOUBLED}), DOUBLED], ids=type
)
def test_the_models_arguments_may_be_a_dict_or_a_namespace(model: Any, batch: dict[str, Any], given: Any) -> None:
    """Those of an old checkpoint are filled up with defaults."""
    plain = per_image_losses(model, batch)
    model.args, before = given, copy.deepcopy(given)
    terms = per_image_losses(model, batch)
    assert model.args is given
    assert given == before
    torch.testing.assert_close(terms, plain * torch.tensor([2.0, 1.0, 1.0]))


def test_a_model_of_the_facade_works(batch: dict[str, Any]) -> None:
    model = YOLO("yolov8n.yaml").model  # 80 classes
    assert per_image_losses(model, batch).shape == (4, 3)


@three
def test_the_gradient_is_the_slope_of_the_loss(model: Any, batch: dict[str, Any]) -> None:
    """By finite differences, with the targets that the host assigned held where they were: it detaches them."""
    criterion = model.init_criterion()
    own, _ = followed(criterion, model(batch["img"]), model.asked)
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


@modes
def test_a_gradient_passes_through_the_one_to_one_head(networks: Any, batch: dict[str, Any], training: bool) -> None:
    """The stock head in training mode lets none pass; it is in training mode again afterwards."""
    model = networks("yolo26n", True).train(training)
    images = batch["img"].clone().requires_grad_()
    read = ImageTerms(model)
    (gradient,) = torch.autograd.grad(DetectionObjective(model, read, batch)(images).sum(), images)
    assert gradient.flatten(1).norm(dim=1).min() > 0
    assert all(module.training is training for module in model.modules())
    if training:
        terms = ImageTerms(model, one_to_one=True)(model(images), batch)
        with pytest.raises(RuntimeError, match=r"does not require grad|not have been used"):
            torch.autograd.grad(terms.sum(), images)
        with pytest.raises(ZeroDivisionError), read.attached(model):
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


def leaves(predictions: list[dict[str, Any]]) -> list[Tensor]:
    """Scores and boxes of the heads, made to have gradients of their own."""
    for head in predictions:
        head.update({name: head[name].detach().requires_grad_() for name in ("scores", "boxes")})
    return [head[name] for head in predictions for name in ("scores", "boxes")]


@modes
@families
def test_the_distance_is_that_of_scores_and_sides(
    model: Any, batch: dict[str, Any], tools: Any, training: bool
) -> None:
    """Of an image that is no square, or width and height would be one; and with the gradients of both arguments."""
    model.train(training)
    images = torch.cat((batch["img"], batch["img"][..., :32]), 3)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    passes = [model(images), model(images + 0.1 * noise)]
    for predictions in passes:
        for head in tools.heads_of(predictions):
            # An image in which nothing is seen, however sure the network is,
            head["scores"][0] = head["scores"][0] / head["scores"][0].detach().abs().max() - 7
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


@three
def test_the_distance_of_equal_and_of_half_precision_predictions(model: Any, batch: dict[str, Any], tools: Any) -> None:
    predictions = model(batch["img"])
    given = leaves(tools.heads_of(predictions))
    distance = ImageTerms(model).distance(predictions, predictions)
    assert torch.equal(distance, torch.zeros(4))
    for gradient in torch.autograd.grad(distance.sum(), given):
        assert gradient.abs().max() < 1e-7
    passes = [predictions, model(batch["img"].flip(3))]
    for each in passes:
        for head in tools.heads_of(each):
            head.update({part: head[part].detach().half() for part in ("scores", "boxes")})
    found = ImageTerms(model).distance(*passes)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), tools.divergence(model, *passes), rtol=1e-4, atol=1e-9)


@three
def test_the_attack_on_the_distance_reaches_the_images(model: Any, batch: dict[str, Any], tools: Any) -> None:
    """In training mode the stock one-to-one head lets no gradient pass; the attack must reach the head that predicts,
    although the predictions that it starts from come from a training pass.
    """
    model.train()
    objective = DetectionObjective(model, ImageTerms(model), batch)
    _, _, reference = objective.loss_and_predictions(batch["img"])
    attack = Distance(objective, detached(reference))
    assert attack.model is model
    images = (batch["img"] + 0.02 * torch.rand(batch["img"].shape)).requires_grad_()
    terms = attack(images)
    assert terms.shape == (4, 1)
    (gradient,) = torch.autograd.grad(terms.sum(), images)
    assert gradient.flatten(1).norm(dim=1).min() > 0
    reached = {None: [True], False: [True, False], True: [True, True]}[model.asked]
    for head, wanted in zip(tools.heads_of(objective.predictions(images)), reached, strict=True):
        (gradient,) = torch.autograd.grad(head["scores"].sum(), images, retain_graph=True, allow_unused=True)
        assert (gradient is not None) == wanted
    assert all(module.training for module in model.modules())


def test_predictions_that_the_host_has_made_are_used_once_and_for_its_images_only(
    model: Any, batch: dict[str, Any]
) -> None:
    given = model.train()(batch["img"])
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


OTHERS = {SegmentationModel: "-seg", PoseModel: "-pose", OBBModel: "-obb", ClassificationModel: "-cls", YOLO: ""}


@pytest.mark.parametrize("kind", [*OTHERS, RTDETRDetectionModel])
def test_what_is_no_detection_model_is_refused(batch: dict[str, Any], kind: Any) -> None:
    if kind in OTHERS:
        model = kind(f"yolov8n{OTHERS[kind]}.yaml", verbose=False)
    else:  # a subclass, without building 30 million weights for it
        model = kind.__new__(kind)
        nn.Module.__init__(model)
        model.model = nn.Sequential(nn.Identity())
    hint = r"of a YOLO object pass its \.model" if kind is YOLO else kind.__name__
    with pytest.raises(TypeError, match=rf"works on detection models.*{hint}"):
        per_image_losses(model, batch)


def test_what_cannot_be_read_is_refused(networks: Any, model: Any, batch: dict[str, Any]) -> None:
    fused = networks("yolo26n", True)
    fused.fuse(verbose=False)  # takes its training head away
    with pytest.raises(TypeError, match="fused"):
        per_image_losses(fused, batch)
    criterion = model.init_criterion()
    ImageTerms(model, criterion)
    with pytest.raises(TypeError, match="already read"):
        ImageTerms(model, criterion)


@three
def test_a_release_that_computes_boxes_otherwise_is_noticed(
    model: Any, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
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

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
from advmed.attacks import APGD, Appearing, ExpectedError, HeldTargets, Terms, Vanishing
from advmed.methods.trades import Distance, detached
from helpers.detection import divergence, heads_of, of_image, one_image, thinned
from helpers.hosts import different

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


@pytest.mark.parametrize("class_weights", [None, (0.2, 1.3, 1.5)])
@families
def test_an_image_has_the_stock_loss_of_this_image_alone(
    model: Any, batch: dict[str, Any], class_weights: tuple[float, ...] | None
) -> None:
    """With its gradient, whatever the rest of the batch; of its predictions alone where BatchNorm couples images."""
    if class_weights is not None:
        model.class_weights = torch.tensor(class_weights)
    batch["img"].requires_grad_()
    terms = per_image_losses(model, batch)
    assert terms.shape == (4, 3)
    alone = [one_image(batch, i) for i in range(4)]
    wanted = torch.stack([stock(model, predict(model, each["img"]), each) for each in alone])
    torch.testing.assert_close(terms, wanted, rtol=1e-5, atol=1e-6)
    assert terms[[0, 1, 3]].min() > 0
    ours, theirs = (torch.autograd.grad(rows.sum(), batch["img"])[0] for rows in (terms, wanted))
    assert theirs.flatten(1).norm(dim=1).min() > 0
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))
    predictions = model.train()(batch["img"])
    read = ImageTerms(model, one_to_one=model.asked)
    assert read.names == ("box_loss", "cls_loss", "l1_loss" if model.model[-1].reg_max == 1 else "dfl_loss")
    assert read.names == tuple((read.criterion if model.asked is None else read.criterion.one2many).loss_names)
    wanted = torch.stack([stock(model, of_image(predictions, i), each) for i, each in enumerate(alone)])
    torch.testing.assert_close(read(predictions, batch), wanted, rtol=1e-5, atol=1e-6)
    # The head that predicts, unless told otherwise.
    branches = {None: (None, None), True: ("one2one", "one2many"), False: ("one2many", "one2one")}[model.asked]
    assert (ImageTerms(model).branch, ImageTerms(model, one_to_one=not model.asked).branch) == branches


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
    predictions, terms = model.train(training)(batch["img"]), ImageTerms(model)
    losses = [model.init_criterion()(predictions, batch), terms.batch_loss(predictions, batch)]
    (wanted, wanted_items), (loss, items, per_image) = losses
    assert torch.equal(loss, wanted)
    assert items.keys() == wanted_items.keys()
    assert not different(items, wanted_items)
    first = list(model.model[0].parameters())
    gradients = [torch.autograd.grad(each.sum(), first, retain_graph=True) for each in (loss, wanted)]
    assert all(map(torch.equal, *gradients))
    assert not per_image.requires_grad
    torch.testing.assert_close(per_image, terms(predictions, batch), rtol=1e-5, atol=1e-6)


@three
def test_images_without_objects_have_a_classification_term_only(model: Any, batch: dict[str, Any]) -> None:
    images = batch["img"].requires_grad_()
    empty = {**batch, "batch_idx": torch.zeros(0), "cls": torch.zeros(0, 1), "bboxes": torch.zeros(0, 4)}
    some, none = per_image_losses(model, batch), per_image_losses(model, empty)
    for rows in (some[2:3], none):
        assert (rows[:, 1] > 0).all()
        assert torch.equal(rows[:, [0, 2]], torch.zeros(len(rows), 2))
    torch.testing.assert_close(none[2], some[2])
    (gradient,) = torch.autograd.grad(none.sum(), images)
    assert gradient.isfinite().all()
    assert gradient.flatten(1).norm(dim=1).min() > 0
    loss, _, _ = ImageTerms(model).batch_loss(model(images), empty)
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


@modes
@three
def test_attacks_reach_the_images_through_the_head_that_predicts(
    model: Any, batch: dict[str, Any], training: bool
) -> None:
    """The stock one-to-one head in training mode lets no gradient pass; it is in training mode again afterwards.

    That on the distance, too, although the predictions that it starts from come from a training pass.
    """
    read = ImageTerms(model.train(training))
    objective = DetectionObjective(model, read, batch)
    distance = Distance(objective, detached(objective.loss_and_predictions(batch["img"])[2]))
    assert distance.model is model
    images = (batch["img"] + 0.02 * torch.rand(batch["img"].shape)).requires_grad_()
    for attack, number in ((objective, 3), (distance, 1)):
        terms = attack(images)
        assert terms.shape == (4, number)
        (gradient,) = torch.autograd.grad(terms.sum(), images)
        assert gradient.flatten(1).norm(dim=1).min() > 0
    predictions = heads_of(objective.predictions(images))
    for head, reached in zip(predictions, [True, model.asked or not training], strict=False):
        (gradient,) = torch.autograd.grad(head["scores"].sum(), images, retain_graph=True, allow_unused=True)
        assert (gradient is not None) == reached
    assert all(module.training is training for module in model.modules())
    if model.asked and training:
        terms = ImageTerms(model, one_to_one=True)(model(images), batch)
        with pytest.raises(RuntimeError, match=r"does not require grad|not have been used"):
            torch.autograd.grad(terms.sum(), images)
        with pytest.raises(ZeroDivisionError), read.attached(model):
            assert not model.model[-1].training
            assert model.model[-1].one2one_cv2[0][0].bn.training
            raise ZeroDivisionError
        assert all(module.training for module in model.modules())


def leaves(predictions: list[dict[str, Any]]) -> list[Tensor]:
    """Scores and boxes of the heads, made to have gradients of their own."""
    for head in predictions:
        head.update({name: head[name].detach().requires_grad_() for name in ("scores", "boxes")})
    return [head[name] for head in predictions for name in ("scores", "boxes")]


@modes
@families
def test_the_distance_is_that_of_scores_and_sides(model: Any, batch: dict[str, Any], training: bool) -> None:
    """Of an image that is no square, or width and height would be one; and with the gradients of both arguments."""
    model.train(training)
    images = torch.cat((batch["img"], batch["img"][..., :32]), 3)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    passes = [model(images), model(images + 0.1 * noise)]
    for predictions in passes:
        for head in heads_of(predictions):
            # An image in which nothing is seen, however sure the network is,
            head["scores"][0] = head["scores"][0] / head["scores"][0].detach().abs().max() - 7
            head["scores"][3] += 5  # and one that is full of objects
    given = [leaf for predictions in passes for leaf in leaves(heads_of(predictions))]
    for head in heads_of(passes[0]):
        weights = head["scores"].sigmoid().amax(1).sum(1)
        assert weights[0] < 1 < weights[3], "one way to divide is missing"
    found, wanted = ImageTerms(model).distance(*passes), divergence(model, *passes)
    assert found.shape == (4,)
    assert (wanted > 1e-6).all()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-8)
    both = (torch.autograd.grad(distance.sum(), given) for distance in (found, wanted))
    for ours, theirs in zip(*both, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * float(theirs.abs().max()))


@three
def test_the_distance_of_equal_and_of_half_precision_predictions(model: Any, batch: dict[str, Any]) -> None:
    predictions = model(batch["img"])
    given = leaves(heads_of(predictions))
    distance = ImageTerms(model).distance(predictions, predictions)
    assert torch.equal(distance, torch.zeros(4))
    for gradient in torch.autograd.grad(distance.sum(), given):
        assert gradient.abs().max() < 1e-7
    passes = [predictions, model(batch["img"].flip(3))]
    for each in passes:
        for head in heads_of(each):
            head.update({part: head[part].detach().half() for part in ("scores", "boxes")})
    found = ImageTerms(model).distance(*passes)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), divergence(model, *passes), rtol=1e-4, atol=1e-9)


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


# What attacks may ask for.


def objective_of(model: Any, batch: dict[str, Any]) -> DetectionObjective:
    model.eval()
    return DetectionObjective(model, ImageTerms(model), batch)


@three
def test_the_objective_of_some_images_is_that_of_the_batch_cut(model: Any, batch: dict[str, Any]) -> None:
    batch = thinned(batch)
    objective, rows = objective_of(model, batch), torch.tensor([3, 2, 0])
    part = objective.take(rows)
    torch.testing.assert_close(part(batch["img"][rows]), objective(batch["img"])[rows], rtol=1e-4, atol=1e-5)
    alone = objective.take(torch.tensor([1]))(batch["img"][1:2])
    torch.testing.assert_close(alone, objective(batch["img"])[1:2], rtol=1e-4, atol=1e-5)


@three
def test_the_confidence_is_that_of_the_likeliest_class_summed_over_the_anchors(
    model: Any, batch: dict[str, Any]
) -> None:
    found = objective_of(model, batch).confidence(batch["img"])
    heads = heads_of(model(batch["img"]))
    scores = heads[1 if model.asked else 0]["scores"].double()
    assert torch.allclose(found[:, 0].double(), (1 / (1 + (-scores).exp())).amax(1).sum(1), rtol=1e-4)


@three
def test_held_targets_are_those_of_the_clean_image(model: Any, batch: dict[str, Any]) -> None:
    objective = objective_of(model, batch)
    images = batch["img"]
    noisy = (images + 0.3 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    held = objective.holding(images)
    assert held.names == objective.names
    assert torch.equal(held(images), objective(images))
    assert not torch.allclose(held(noisy), objective(noisy), rtol=1e-3)
    assert torch.equal(objective(noisy), objective(noisy))  # the host assigns again

    # By hand: the host's criterion with an assigner that remembers.
    criterion = model.init_criterion()
    one, own = followed(criterion, model(images), model.asked)
    assigner, kept = one.assigner, []
    one.assigner = lambda *given, **more: kept.append(assigner(*given, **more)) or kept[0]
    one.loss(own, batch)
    _, own = followed(criterion, model(noisy), model.asked)
    wanted = one.loss(own, batch)[0] / len(images)
    objective.terms._recorder.exact = False
    with objective.terms.assigning(kept[0]):
        found = objective.terms(objective.predictions(noisy), batch, "batch").sum(0) / len(images)
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=1e-3)


def test_an_assignment_that_fails_leaves_the_hosts_assigner_in_its_place(model: Any, batch: dict[str, Any]) -> None:
    objective = objective_of(model, batch)
    own = objective.terms._followed.assigner
    with pytest.raises(ValueError, match="stop"), objective.terms.assigning(None):
        raise ValueError("stop")
    with pytest.raises(KeyError):
        objective.terms.assignment(objective.predictions(batch["img"]), {})
    assert objective.terms._followed.assigner is own


def test_attacks_of_the_task_raise_what_they_are_for(model: Any, batch: dict[str, Any]) -> None:
    objective, images = objective_of(model, batch), batch["img"]
    for loss in (Appearing(), Vanishing(), HeldTargets(), Terms(("cls_loss",)), Terms(("box_loss", "dfl_loss"))):
        (climbed,) = loss.objectives(objective, images)
        found = APGD(10, random_start=0, loss=loss)(objective, images, 2.0, bounds=(0.0, 1.0))
        rise = climbed(found.images).sum(1) - climbed(images).sum(1)
        assert rise.sum() > 0
        assert (rise > 0).sum() >= 2  # an image to whose objects no anchor is given has no box loss
        torch.testing.assert_close(found.terms, objective(found.images))
    with pytest.raises(TypeError, match="there is no term heatmap among those of the loss, box_loss, cls_loss"):
        APGD(3, loss=Terms(("heatmap",)))(objective, images, 1.0)
    with pytest.raises(TypeError, match="the loss of expected error is for landmark detectors"):
        APGD(3, loss=ExpectedError())(objective, images, 1.0)

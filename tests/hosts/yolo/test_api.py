"""``attack``: one call on a YOLO, its network or a file, against independent loops on the stock loss."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from ultralytics import YOLO
from ultralytics.nn.tasks import load_checkpoint

from adv_yolo import attack, per_image_losses
from adv_yolo.api import make_batch
from helpers.detection import stock_terms, thinned
from helpers.hosts import different

pytestmark = pytest.mark.slow

SHORT: dict[str, Any] = {"steps": 3, "step_scale": 2.0}


@pytest.fixture
def network(trained: Path) -> Any:
    """The network that knows its images, as the host loads it."""
    return load_checkpoint(trained)[0]


@pytest.fixture
def batch(data: Any) -> dict[str, Any]:
    """Images of the size that it knows."""
    return thinned(data.batch())


def stock_losses(model: Any, images: Tensor, batch: dict[str, Any]) -> Tensor:
    """The stock loss of every image alone, (B,)."""
    return stock_terms(model, {**batch, "img": images}).sum(1)


def test_a_facade_its_network_and_a_file_are_attacked_alike(trained: Path, batch: dict[str, Any]) -> None:
    facade = YOLO(str(trained))
    results = [attack(model, batch, radius=1.0, **SHORT) for model in (facade, facade.model, trained, str(trained))]
    for result in results[1:]:
        assert torch.equal(result.images, results[0].images)
        assert torch.equal(result.terms, results[0].terms)
    assert results[0].norms.median() > 0.5


@pytest.mark.parametrize(("name", "end2end"), [("yolov5n", None), ("yolo26n", False), ("yolo26n", True)])
def test_other_families_lose_to_the_attack(
    networks: Any, batch: dict[str, Any], name: str, end2end: bool | None
) -> None:
    model = networks(name, end2end)
    result = attack(model, batch, radius=3.0, steps=20, step_scale=2.0)
    with torch.no_grad():
        clean = per_image_losses(model, batch).sum(1)
        torch.testing.assert_close(per_image_losses(model, {**batch, "img": result.images}), result.terms)
    # Not of every image: the host assigns its anchors anew in each pass, so that the gradient leads down at times, and
    # the clean image is nothing that was found.
    assert (result.norms > 0).all()
    assert (result.terms.sum(1) > clean).any()
    assert result.terms.sum() > clean.sum()


@pytest.mark.parametrize("before", ["predict", "val"])
def test_a_facade_that_has_predicted_can_be_attacked(
    trained: Path, batch: dict[str, Any], data: Any, tmp_path: Path, before: str
) -> None:
    facade = YOLO(str(trained))
    quiet = {"imgsz": 96, "device": "cpu", "plots": False, "verbose": False, "project": str(tmp_path)}
    if before == "predict":
        facade.predict(batch["img"], **quiet)
    else:
        facade.val(data=str(data.yaml), batch=2, workers=0, **quiet)
    result = attack(facade, batch, radius=1.0, **SHORT)
    wanted = attack(trained, batch, radius=1.0, **SHORT)
    torch.testing.assert_close(result.terms, wanted.terms, rtol=1e-2, atol=1e-3)  # fused layers round otherwise
    assert result.norms.median() > 0.5


@pytest.mark.parametrize(("norm", "level"), [(2, 3.0), (math.inf, 0.05)])
def test_the_result_is_inside_the_ball_of_each_image_and_the_range(
    network: Any, batch: dict[str, Any], norm: float, level: float
) -> None:
    radius = torch.tensor([level, 0.0, 0.5 * level, 2 * level])

    def run(seed: int) -> Any:
        how: dict[str, Any] = {"restarts": 2, "generator": torch.Generator().manual_seed(seed), **SHORT}
        return attack(network, batch, radius=radius, norm=norm, random_start=True, **how)

    result = run(1)
    assert torch.equal(run(1).images, result.images), "a generator makes random starts repeatable"
    assert not torch.equal(run(2).images, result.images)
    assert result.images.shape == batch["img"].shape
    assert not result.images.requires_grad
    assert result.images.min() >= 0
    assert result.images.max() <= 1
    measured = (result.images - batch["img"]).flatten(1).norm(p=norm, dim=1)
    torch.testing.assert_close(measured, result.norms, rtol=1e-4, atol=1e-6)
    assert (measured <= radius * (1 + 1e-5)).all()
    assert (measured[radius > 0] > 0).all()
    assert result.nonfinite.tolist() == [0] * 4
    assert torch.equal(result.images[1], batch["img"][1])


def test_pgd_is_the_loop_of_the_paper(network: Any, batch: dict[str, Any]) -> None:
    """With the stock criterion, image by image, and its arithmetic on the noise in float64."""
    radius, steps, scale = 0.8, 4, 2.0
    result = attack(network, batch, radius=radius, steps=steps, step_scale=scale, keep="last")
    clean = batch["img"].double()
    noise = torch.zeros_like(clean)
    for _ in range(steps):
        images = (clean + noise).float().requires_grad_()
        (gradient,) = torch.autograd.grad(stock_losses(network, images, batch).sum(), images)
        gradient = gradient.double()
        noise = noise + scale * radius / steps * gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]
        size = noise.flatten(1).norm(dim=1)[:, None, None, None]
        noise = noise * (radius / size).clamp(max=1)
        noise = (clean + noise).clamp(0, 1) - clean
    assert (noise.flatten(1).norm(dim=1) > 0.8 * radius).all()
    off = ((result.images.double() - clean - noise).flatten(1).norm(dim=1) / radius).max()
    assert off < 1e-3


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was(networks: Any, batch: dict[str, Any], training: bool) -> None:
    model = networks("yolo26n", True).train(training)
    model.model[3].train(not training)
    for parameter in model.model[2].parameters():
        parameter.requires_grad_(False)
    weights = copy.deepcopy(model.state_dict())
    flags = [module.training for module in model.modules()]
    asked = [parameter.requires_grad for parameter in model.parameters()]
    random = torch.get_rng_state()
    attack(model, batch, radius=1.0, random_start=True, **SHORT)
    with pytest.raises(ValueError, match="radius"):
        attack(model, batch, radius=-1.0, **SHORT)
    assert not different(model.state_dict(), weights)
    assert [module.training for module in model.modules()] == flags
    assert [parameter.requires_grad for parameter in model.parameters()] == asked
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert getattr(model, "criterion", None) is None


def test_an_attack_needs_no_mode_and_no_gradients_to_be_on(networks: Any, batch: dict[str, Any]) -> None:
    """A network is attacked as it predicts: in evaluation mode, whatever mode it is in."""
    model = networks("yolov8n")
    wanted = attack(model, batch, radius=1.0, **SHORT)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            found = attack(model, {k: v.clone() for k, v in batch.items()}, radius=1.0, **SHORT)
        assert torch.equal(found.images, wanted.images)
    assert torch.equal(attack(model.train(), batch, radius=1.0, **SHORT).images, wanted.images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: {**b, "img": (b["img"] * 255).byte()}, r"floating point in \[0, 1\], got torch.uint8"),
        (lambda b: {**b, "img": b["img"] * 255}, r"in \[0, 1\], got values from .* divide by 255"),
        (lambda b: {**b, "img": b["img"] - 0.5}, r"in \[0, 1\], got values from -"),
        (lambda b: {**b, "img": b["img"] * math.nan}, "finite"),
        (lambda b: {**b, "img": b["img"][..., :50]}, r"multiples of 32, got \(4, 3, 96, 50\)"),
        (lambda b: {**b, "img": b["img"][0]}, r"must be \(B, 3, H, W\)"),
        (lambda b: {**b, "img": b["img"][:, :1]}, r"the model's 3 channel\(s\), got \(4, 1, 96, 96\)"),
        (lambda b: {**b, "img": b["img"][:0]}, r"B of 1 or more .* got \(0, 3, 96, 96\)"),
        (lambda b: {**b, "img": b["img"].half()}, r"images are torch.float16, the model's weights torch.float32"),
        (lambda b: b["img"].numpy(), r"images must be a tensor \(B, C, H, W\) or a batch .*, got ndarray"),
        (lambda b: {k: v for k, v in b.items() if k != "cls"}, "the batch has no cls; it needs img"),
        (lambda b: {"img": b["img"]}, "the batch has no batch_idx, cls, bboxes"),
        ([torch.zeros(1, 5)] * 3, "4 images need 4 label tensors.*got 3"),
        ([torch.rand(5, 4)] * 4, r"\(n, 5\)"),
        ([torch.rand(6)] * 4, r"\(n, 5\)"),
        (
            [torch.tensor([[0, 48.0, 48.0, 20.0, 20.0]])] * 4,
            "fractions of the image.* from 20 to 48; of pixels",
        ),
        ([torch.tensor([[0, -0.1, 0.5, 0.2, 0.2]])] * 4, r"got values from -0\.1 to 0\.5"),
        ([torch.tensor([[0, math.nan, 0.5, 0.2, 0.2]])] * 4, "fractions of the image"),
        ([torch.tensor([[3.0, 0.5, 0.5, 0.2, 0.2]])] * 4, "class"),  # there are the classes 0, 1 and 2
        (None, r"4 images need 4 label tensors \(n, 5\).*got none"),
        ({"radius": math.nan}, "radius"),
        ({"keep": "first"}, "keep must be 'last' or 'best'"),
    ],
)
def test_what_cannot_be_right_is_refused(network: Any, batch: dict[str, Any], change: Any, message: str) -> None:
    """A batch, labels beside images, or settings of the attack."""
    with pytest.raises((TypeError, ValueError), match=message):
        if isinstance(change, dict):
            attack(network, batch, **{"radius": 1.0, **SHORT, **change})
        elif callable(change):
            attack(network, change(batch), radius=1.0, **SHORT)
        else:
            attack(network, batch["img"], change, radius=1.0, **SHORT)


def test_sides_fit_the_largest_stride(batch: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"H and W multiples of 64, got \(4, 3, 96, 96\)"):
        attack(YOLO("yolov8n-p6.yaml"), batch, radius=1.0)


def test_images_and_labels_are_as_good_as_a_batch(network: Any, batch: dict[str, Any]) -> None:
    rows = torch.cat([batch["cls"], batch["bboxes"]], 1)
    labels = [rows[batch["batch_idx"] == i] for i in range(4)]
    first = attack(network, batch, radius=1.0, **SHORT)
    assert torch.equal(first.images, attack(network, batch["img"], labels, radius=1.0, **SHORT).images)
    made = make_batch(batch["img"], [[[0, 0.5, 0.5, 0.1, 0.2]], [], torch.zeros(0), [[1, 0.1, 0.1, 0.1, 0.1]] * 2])
    assert made["batch_idx"].tolist() == [0, 3, 3]
    assert made["cls"].flatten().tolist() == [0, 1, 1]
    assert made["bboxes"].shape == (3, 4)


def test_a_file_that_is_not_there_and_what_is_no_detection_model(batch: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no model file .*nothing.pt"):
        attack(tmp_path / "nothing.pt", batch, radius=1.0)
    with pytest.raises(TypeError, match=r"works on detection models.*Conv2d"):
        attack(torch.nn.Conv2d(3, 3, 1), batch, radius=1.0)

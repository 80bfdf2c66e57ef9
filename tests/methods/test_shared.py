"""The clean pass that is gone back through once, for the weights and for the attack."""

from __future__ import annotations

import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from advmed.attacks import PGD
from advmed.attacks.problem import CleanPass, steepness
from advmed.methods import AMAT, DPAAT, MART, SAT, Method
from helpers.models import Affine, Classifier, Mean, cnn
from helpers.tensors import assert_close, gradients, names, uniform

FAST: dict[str, Any] = {"steps": 3, "step_scale": 1.75, "schedule": "decreasing"}
LABELS = torch.tensor([0, 1, 2, 3])
IMAGES = uniform(4, 3, 8, 8, seed=1)
METHODS: dict[str, Any] = {
    "SAT": lambda **more: SAT(0.7, **FAST, **more),
    "AMAT": lambda **more: AMAT(0.7, [1.5], refinement="secant", train_on="crossing", **FAST, **more),
    "MART": lambda **more: MART(0.7, **FAST, **more),
    "DPAAT": lambda **more: DPAAT(0.7, **FAST, **more),
}


def task(**settings: Any) -> Mean:
    return Mean(cnn(**settings).double(), LABELS)


def step(method: Method, objective: Any, backward: Any = None) -> Any:
    return method.step(objective, IMAGES, names(4), backward)


@pytest.mark.parametrize("norm", [2, math.inf])
@pytest.mark.parametrize("name", METHODS)
def test_it_changes_no_gradient_and_saves_a_pass(name: str, norm: float) -> None:
    apart, shared = task(), task()
    first, second = (METHODS[name](share_gradient=share, norm=norm) for share in (False, True))
    expected, found = step(first, apart), step(second, shared)
    torch.testing.assert_close(found.adversarial, expected.adversarial, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-9, atol=0)
    for made in (expected, found):
        made.loss.backward()
    assert_close(gradients(shared.model), gradients(apart.model))
    assert (apart.calls, shared.calls) == (5, 4)  # three steps, clean and attacked; one of the steps for nothing
    assert first.state_dict() == second.state_dict()


@pytest.mark.parametrize("scale", [None, 2.0**13])
@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_a_loss_that_is_scaled_has_scaled_gradients(scale: float | None, weight: float) -> None:
    """As a gradient scaler, or accumulation over batches, has it; with the loss scale known to the objective or not."""
    expected, found = task(), task()
    if scale is not None:
        found.loss_scale = torch.tensor(scale, dtype=torch.float64)
    (step(SAT(0.7, **FAST), expected).loss * weight).backward()
    (step(SAT(0.7, **FAST, share_gradient=True), found).loss * (scale or 1.0) * weight).backward()
    assert_close([g / (scale or 1.0) for g in gradients(found.model)], gradients(expected.model))


def test_gradients_add_to_those_that_are_there() -> None:
    expected, found = task(), task()
    for objective, share in ((expected, False), (found, True)):
        for _ in range(2):
            step(SAT(0.7, **FAST, share_gradient=share), objective).loss.backward()
    assert_close(gradients(found.model), gradients(expected.model))


def test_a_second_backward_pass_is_refused() -> None:
    loss = step(SAT(0.7, **FAST, share_gradient=True), task()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="back-propagated a second time"):
        loss.backward()


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_compiled_network_is_trained_alike(name: str) -> None:
    """Methods that go back through the clean pass twice do not share it there."""
    apart, compiled = task(), task()
    compiled.model = compiled._network = torch.compile(compiled.model, backend="aot_eager")
    for objective in (apart, compiled):
        step(METHODS[name](share_gradient=True), objective).loss.backward()
    assert_close(gradients(compiled.model), gradients(apart.model))
    assert compiled.calls == (5 if name in ("MART", "DPAAT") else 4)


def test_weights_that_are_not_used_have_no_gradient() -> None:
    objective = task()
    objective.model[0].register_parameter("unused", nn.Parameter(torch.ones(2)))
    step(SAT(0.7, **FAST, share_gradient=True), objective).loss.backward()
    assert objective.model[0].unused.grad is None
    assert objective.model[0].weight.grad is not None


def test_half_of_the_weights_may_be_frozen() -> None:
    expected, found = task(), task()
    for objective, share in ((expected, False), (found, True)):
        objective.model[0].requires_grad_(False)
        step(SAT(0.7, **FAST, share_gradient=share), objective).loss.backward()
        assert objective.model[0].weight.grad is None
        objective.model[0].requires_grad_(True)
        for weight in objective.model[0].parameters():
            weight.grad = torch.zeros_like(weight)
    assert_close(gradients(found.model), gradients(expected.model))


def test_weights_outside_the_model_keep_their_gradients() -> None:
    """A loss with a weight of its own, as of several tasks: said once, and not shared from then on."""

    class Weighted(Mean):
        def __init__(self) -> None:
            super().__init__(cnn().double(), LABELS)
            self.weight = torch.ones((), dtype=torch.float64, requires_grad=True)

        def terms_of(self, logits: Tensor) -> Tensor:
            return super().terms_of(logits) * self.weight

    expected, found, method = Weighted(), Weighted(), SAT(0.7, **FAST, share_gradient=True)
    step(SAT(0.7, **FAST), expected).loss.backward()
    with pytest.warns(UserWarning, match=r"1 tensor\(s\) with gradients outside the objective's model"):
        step(method, found).loss.backward()
    torch.testing.assert_close(found.weight.grad, expected.weight.grad)
    assert_close(gradients(found.model), gradients(expected.model))
    assert found.calls == 5
    step(method, found)  # without a warning, which would be an error


class Summed(nn.Module):
    """Two weights that are added, whose gradients autograd gives as one and the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        network = cnn().double()
        self.first, self.head = nn.Sequential(*list(network)[:1]), nn.Sequential(*list(network)[1:])
        shape = self.first(IMAGES).shape[1:]
        self.one, self.two = (nn.Parameter(torch.full(shape, 0.5 * k, dtype=torch.float64)) for k in (1, 2))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.first(images) + (self.one + self.two))


def test_weights_with_one_gradient_are_scaled_once_each() -> None:
    """As positions and class token of a transformer have them, with gradients accumulated over batches."""
    torch.manual_seed(0)
    expected, found = Mean(Summed(), LABELS), Mean(Summed(), LABELS)
    found.model.load_state_dict(expected.model.state_dict())
    for objective, share in ((expected, False), (found, True)):
        (step(SAT(0.7, **FAST, share_gradient=share), objective).loss / 4).backward()
    assert_close(gradients(found.model), gradients(expected.model))


def test_hooks_of_weights_run_once() -> None:
    expected, found = task(), task()
    for objective in (expected, found):
        objective.model[0].weight.register_hook(lambda gradient: 0.1 * gradient)
    step(SAT(0.7, **FAST), expected).loss.backward()
    with pytest.warns(UserWarning, match="weights have hooks that may change their gradients"):
        step(SAT(0.7, **FAST, share_gradient=True), found).loss.backward()
    assert_close(gradients(found.model), gradients(expected.model))


def test_the_graph_of_the_clean_pass_is_gone_before_the_pass_on_the_noise() -> None:
    """Also where samples are new and their margins are estimated first: a first epoch needs no more memory."""

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    def at_the_last_pass(share: bool) -> int:
        objective, alive, counts = task(), weakref.WeakSet[Saved](), list[int]()

        def pack(tensor: Tensor) -> Saved:
            alive.add(saved := Saved(tensor))
            return saved

        objective.model.register_forward_pre_hook(lambda *_: counts.append(len(alive)))
        method = AMAT(0.7, [1.5], refinement="secant", start="estimate", **FAST, share_gradient=share)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
            step(method, objective)
        return counts[-1]

    assert at_the_last_pass(True) <= 1 < at_the_last_pass(False)


def test_in_float16_it_needs_to_know_the_loss_scale() -> None:
    for scale, backward, calls in ((None, None, 5), (torch.tensor(1024.0), None, 4), (None, torch.Tensor.backward, 4)):
        objective = Mean(cnn(), LABELS)
        objective.loss_scale = scale
        with torch.autocast("cpu", torch.float16):
            SAT(0.7, **FAST, share_gradient=True).step(objective, IMAGES.float(), names(4), backward)
        assert objective.calls == calls


def test_reentrant_checkpoints_are_told_what_to_set() -> None:
    from torch.utils.checkpoint import checkpoint

    class Saving(Classifier):
        def terms_and_errors(self, images: Tensor) -> tuple[Tensor, Tensor]:
            logits = checkpoint(self.model, images, use_reentrant=True)
            return nn.functional.cross_entropy(logits, self.labels, reduction="none")[:, None], logits.argmax(1) > 0

    with pytest.raises(RuntimeError, match="Set share_gradient: false"):
        step(SAT(0.7, **FAST, share_gradient=True), Saving(cnn().double(), LABELS))


@pytest.mark.parametrize("norm", [2, math.inf])
@pytest.mark.parametrize("random_start", [0.0, 0.5])
def test_an_attack_begins_with_what_a_clean_pass_has_told(norm: float, random_start: float) -> None:
    """Of the gradient only the direction counts; from a random start nothing is known."""
    attack, objective = PGD(3, 1.75, norm, random_start, schedule="decreasing"), task()
    leaf = IMAGES.clone().requires_grad_()
    terms = objective(leaf)
    known = CleanPass(terms.detach(), torch.autograd.grad(terms.sum() * 7, leaf)[0])
    found = [
        attack(objective, IMAGES, 0.7, clean=clean, generator=torch.Generator().manual_seed(1), thresholds=[1.4])
        for clean in (None, known)
    ]
    torch.testing.assert_close(found[0].images, found[1].images, rtol=1e-9, atol=1e-12)
    assert torch.equal(found[0].crossing > 0, found[1].crossing > 0)
    assert objective.calls == 1 + 4 + (4 if random_start else 3)


@pytest.mark.parametrize(("norm", "dual"), [(2, lambda s: s.norm()), (math.inf, lambda s: s.abs().sum())])
def test_steepness_is_the_dual_norm_of_the_gradient(norm: float, dual: Any) -> None:
    slopes = uniform(2, 3, 4, seed=3) - 0.5
    clean, steep = steepness(Affine(slopes, torch.zeros(2, dtype=torch.float64)), uniform(5, 3, 4), norm)
    torch.testing.assert_close(steep, dual(slopes.sum(0)).expand(5))
    assert clean.terms.shape == (5, 2)
    with torch.autocast("cpu", torch.float16):  # whose losses are scaled
        _, half = steepness(Affine(slopes.float(), torch.zeros(2)), uniform(5, 3, 4).float(), norm)
    torch.testing.assert_close(half, steep.float(), rtol=2e-3, atol=0)

"""TRADES against torchattacks, a closed form of a linear model, and losses and gradients worked out apart from it."""

from __future__ import annotations

import copy
import json
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli, kl_divergence

import advmed.attacks.problem as problem_module
from advmed.methods import SAT, TRADES
from advmed.methods.base import Step
from advmed.methods.trades import detached

ORDERS = [2, math.inf]
QUICK: dict[str, Any] = {"steps": 4, "step_scale": 2.0}


def names(count: int) -> list[str]:
    return [f"case_{i}" for i in range(count)]


def uniform(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradients(model: nn.Module) -> list[Tensor]:
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


def assert_close(first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
    assert sum(a.abs().sum() for a in first) > 0


def lengths(step: Step, images: Tensor, p: float = 2) -> Tensor:
    return torch.linalg.vector_norm((step.adversarial - images).flatten(1), ord=p, dim=1)


def divergence(clean: Tensor, other: Tensor) -> Tensor:
    """KL(softmax(clean) || softmax(other)), (B,)."""
    return F.kl_div(other.log_softmax(1), clean.softmax(1), reduction="none").sum(1)


def cnn_task(tiny: SimpleNamespace, **settings: Any) -> tuple[Any, Tensor]:
    model = tiny.cnn(**settings).double()
    for parameter in model.parameters():  # as it comes, noise hardly moves its predictions
        parameter.data *= 3
    return tiny.Compared(model, torch.tensor([0, 1, 2, 3, 1])), uniform(5, 3, 8, 8)


# The attack


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("random_start", [0.01, 0.5])
def test_on_a_linear_model_the_attack_ends_at_the_edge(tiny: SimpleNamespace, p: float, random_start: float) -> None:
    """Two classes are told apart by z = v.x alone, and the divergence grows with |z - z0|: the attack ends at
    z0 + eps ||v||* or z0 - eps ||v||*, on the side on which it started.
    """
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).double()
    model[1].weight.data = uniform(2, 12, seed=1) - 0.5
    images, eps = uniform(40, 3, 4), 0.8
    method = TRADES(eps, norm=p, steps=40, step_scale=40, random_start=random_start)
    step = method.step(tiny.Compared(model, torch.arange(40) % 2), images, names(40))
    normal = (model[1].weight[1] - model[1].weight[0]).detach()
    dual = normal.norm() if p == 2 else normal.abs().sum()
    clean = model(images).diff(dim=1).detach()[:, 0]
    side = ((step.adversarial - images).flatten(1) @ normal).sign()
    assert 8 < (side > 0).sum() < 32
    edge = clean + side * eps * dual
    torch.testing.assert_close(model(step.adversarial).diff(dim=1).detach()[:, 0], edge, rtol=1e-9, atol=0)
    expected = kl_divergence(Bernoulli(logits=clean), Bernoulli(logits=edge)).mean()
    torch.testing.assert_close(step.logs["loss_sync"], expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("random_start", [0.01, 1.0])
@pytest.mark.parametrize("p", ORDERS)
def test_the_attack_raises_the_divergence(tiny: SimpleNamespace, p: float, random_start: float) -> None:
    """Of every sample, far above that of the random start and of as much random noise."""
    found = {}
    for name, start, settings in (
        ("attack", random_start, {"steps": 10, "step_scale": 2.5}),
        ("start", random_start, {"steps": 1, "step_scale": 1e-12}),
        ("noise", 1.0, {"steps": 1, "step_scale": 1e-12}),
    ):
        objective, images = cnn_task(tiny)
        eps = 0.5 if p == 2 else 0.03
        step = TRADES(eps, norm=p, random_start=start, seed=3, **settings).step(objective, images, names(5))
        found[name] = divergence(objective.model(images), objective.model(step.adversarial)).detach()
        length = lengths(step, images, p)
        assert (length > 0).all()
        assert (length <= start * eps if name == "start" else length <= eps * (1 + 1e-9)).all()
        if name == "attack":
            torch.testing.assert_close(length, torch.full((5,), eps, dtype=torch.float64), rtol=1e-9, atol=0)
    assert (found["attack"] > 10 * found["start"]).all()
    assert (found["attack"] > 10 * found["noise"]).all()


@pytest.mark.parametrize(("steps", "scale"), [(1, 1.0), (10, 2.5), (20, 4.0)])
def test_the_attack_equals_torchattacks_tpgd_from_the_same_start(
    tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, steps: int, scale: float
) -> None:
    import torchattacks

    objective, images = cnn_task(tiny)
    eps = 0.1

    def same_noise(like: Tensor, radius: Tensor, order: float, generator: torch.Generator) -> Tensor:
        """The noise of torchattacks, drawn as it draws."""
        torch.manual_seed(7)
        return 0.001 * torch.randn_like(like)

    monkeypatch.setattr(problem_module, "random_in_ball", same_noise)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        expected = torchattacks.TPGD(objective.model, eps=eps, alpha=scale * eps / steps, steps=steps)(images)
        method = TRADES(eps, norm=math.inf, bounds=(0, 1), steps=steps, step_scale=scale)
        step = method.step(objective, images, names(5))
    assert (expected - images).abs().flatten(1).amax(1).min() > 0.09  # it did attack
    torch.testing.assert_close(step.adversarial, expected, rtol=0, atol=1e-10)
    reached = divergence(objective.model(images), objective.model(expected)).mean().detach()
    torch.testing.assert_close(step.logs["loss_sync"], reached, rtol=1e-8, atol=0)


def test_random_starts_are_repeatable_and_differ_from_step_to_step(tiny: SimpleNamespace) -> None:
    objective, images = cnn_task(tiny)

    def run(**settings: Any) -> list[Tensor]:
        method = TRADES(0.5, steps=2, step_scale=0.5, random_start=1.0, **settings)
        return [method.step(objective, images, names(5)).adversarial for _ in range(2)]

    first, again, other = run(), run(), run(seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


def test_the_attack_looks_at_predictions_only(tiny: SimpleNamespace) -> None:
    """Other labels change the loss and not the noise."""
    results = []
    for labels in ([0, 1, 2, 3, 1], [2, 2, 0, 1, 3]):
        objective, images = cnn_task(tiny)
        objective.labels = torch.tensor(labels)
        results.append(TRADES(0.7, **QUICK).step(objective, images, names(5)))
    assert torch.equal(results[0].adversarial, results[1].adversarial)
    assert torch.equal(results[0].logs["loss_sync"], results[1].logs["loss_sync"])
    assert results[0].loss != results[1].loss


# Losses and gradients


def host_loss(objective: Any, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of :class:`Compared`, its terms and the logits, by other means."""
    logits = objective.model(images)
    chosen = logits.gather(1, objective.labels[:, None])[:, 0]
    terms = torch.stack((logits.exp().sum(1).log() - chosen, (logits**2).sum(1) / logits.shape[1]), 1)
    return torch.linalg.vector_norm(terms), terms, logits


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("beta", [1.0, 6.0])
def test_the_loss_is_that_of_clean_images_and_the_weighted_distance(
    tiny: SimpleNamespace, p: float, beta: float
) -> None:
    objective, images = cnn_task(tiny)
    eps = 0.7 if p == 2 else 0.05
    step = TRADES(eps, beta=beta, norm=p, **QUICK).step(objective, images, names(5))
    step.loss.backward()
    found = gradients(objective.model)
    clean, terms, logits = host_loss(objective, images)
    adversarial, _, other = host_loss(objective, step.adversarial)
    sync = divergence(logits, other).mean()
    assert sync > 0.01
    expected = clean + beta * sync
    expected.backward()
    torch.testing.assert_close(step.loss, expected, rtol=1e-12, atol=0)
    assert_close(found, gradients(objective.model))
    torch.testing.assert_close(step.terms, terms.detach(), rtol=1e-12, atol=0)
    assert not step.terms.requires_grad
    expected_logs = {"loss_clean": clean.item(), "loss_adversarial": adversarial.item(), "loss_sync": sync.item()}
    expected_logs["nonfinite"] = 0
    assert set(step.logs) == set(expected_logs)
    for key, value in step.logs.items():
        assert value.item() == pytest.approx(expected_logs[key], rel=1e-12)
        assert value.shape == ()
        assert not value.requires_grad


def test_backward_gives_the_same_gradients(tiny: SimpleNamespace) -> None:
    results = []
    for given in (False, True):
        objective, images = cnn_task(tiny)
        losses: list[Tensor] = []

        def backward(loss: Tensor, losses: list[Tensor] = losses) -> None:
            losses.append(loss.detach())
            loss.backward()

        step = TRADES(0.7, **QUICK).step(objective, images, names(5), backward if given else None)
        assert len(losses) == int(given)  # the distance joins the two passes
        assert step.loss.requires_grad == (not given)
        if given:
            assert torch.equal(losses[0], step.loss)
        else:
            step.loss.backward()
        results.append((step.loss.detach(), gradients(objective.model)))
    assert torch.equal(results[0][0], results[1][0])
    assert_close(results[0][1], results[1][1])


@pytest.mark.parametrize("p", ORDERS)
def test_without_noise_it_is_standard_training(tiny: SimpleNamespace, p: float) -> None:
    objective, images = cnn_task(tiny)
    step = TRADES(0, norm=p, **QUICK).step(objective, images, names(5))
    assert torch.equal(step.adversarial, images)
    assert step.logs["loss_sync"] == 0
    step.loss.backward()
    found = gradients(objective.model)
    loss = host_loss(objective, images)[0]
    loss.backward()
    torch.testing.assert_close(step.loss, loss, rtol=1e-14, atol=0)
    assert_close(found, gradients(objective.model))


def test_number_of_passes(tiny: SimpleNamespace) -> None:
    objective, images = cnn_task(tiny)
    TRADES(0.7, **QUICK).step(objective, images, names(5))
    assert objective.passes == ["training"] + ["predictions"] * 4 + ["training"]


def test_the_model_learns_from_the_training_passes_alone(tiny: SimpleNamespace) -> None:
    """Between them the attack leaves BatchNorm, flags, gradients and the random state as they were."""
    objective, images = cnn_task(tiny, normalise=True, dropout=0.4)
    twin = copy.deepcopy(objective.model)
    torch.manual_seed(0)
    step = TRADES(0.7, **QUICK).step(objective, images, names(5))
    state = torch.get_rng_state()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in objective.model.parameters())
    assert all(module.training for module in objective.model.modules())
    torch.manual_seed(0)
    logits, others = twin(images), twin(step.adversarial)
    assert torch.equal(torch.get_rng_state(), state)
    for key, value in twin.state_dict().items():
        torch.testing.assert_close(objective.model.state_dict()[key], value, rtol=1e-12, atol=0)
    assert twin[1].num_batches_tracked == 2
    step.loss.backward()  # of a clean pass that was made before the attack
    (tiny.Compared(twin, objective.labels)._terms(logits).norm() + 6 * divergence(logits, others).mean()).backward()
    assert_close(gradients(objective.model), gradients(twin))


class Pair(NamedTuple):
    """As a model with two heads may return it."""

    first: Tensor
    second: Tensor


def test_the_attack_starts_from_predictions_without_gradients_in_any_nest(tiny: SimpleNamespace) -> None:
    """The clean predictions are what the noise leads away from: the attack does not reach into their pass."""
    objective, images = cnn_task(tiny)
    plain, compared = copy.copy(objective), []

    class Nested:
        model, labels = objective.model, objective.labels

        def __call__(self, images: Tensor) -> Tensor:
            return plain(images)

        def predictions(self, images: Tensor) -> Any:
            logits = plain.predictions(images)
            return {"heads": [logits[:, :2], (logits[:, 2:], "softmax")], "temperature": 2.0}

        def loss_and_predictions(self, images: Tensor) -> tuple[Tensor, Tensor, Any]:
            loss, terms, logits = plain.loss_and_predictions(images)
            return loss, terms, {"heads": [logits[:, :2], (logits[:, 2:], "softmax")], "temperature": 2.0}

        def distance(self, clean: Any, other: Any) -> Tensor:
            assert clean["temperature"] == other["temperature"] == 2.0
            assert clean["heads"][1][1] == other["heads"][1][1] == "softmax"
            first, second = (torch.cat((x["heads"][0], x["heads"][1][0]), 1) for x in (clean, other))
            compared.append((first.requires_grad, second.requires_grad))
            return divergence(first, second)

    steps = [TRADES(0.7, **QUICK).step(task, images, names(5)) for task in (objective, Nested())]
    assert compared == [(False, True)] * 4 + [(True, True)]
    torch.testing.assert_close(steps[0].adversarial, steps[1].adversarial, rtol=0, atol=1e-12)
    torch.testing.assert_close(steps[0].loss, steps[1].loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "nest",
    [
        lambda x: x,
        lambda x: [x, x],
        lambda x: (x, [x, None]),
        lambda x: {"a": x, "b": (x, 3)},
        lambda x: OrderedDict(a=x),
        lambda x: Pair(x, x),
    ],
)
def test_predictions_keep_their_form_without_gradients(nest: Callable[[Tensor], Any]) -> None:
    weight = torch.ones(3, requires_grad=True)
    found, expected = detached(nest(weight * 2)), nest(torch.full((3,), 2.0))

    def compare(a: Any, b: Any) -> None:
        if isinstance(b, Tensor):
            assert torch.equal(a, b)
            assert not a.requires_grad
        elif isinstance(b, dict):
            assert isinstance(a, dict)
            assert list(a) == list(b)
            compare(list(a.values()), list(b.values()))
        elif isinstance(b, (list, tuple)):
            assert type(a) is type(b)
            assert len(a) == len(b)
            for x, y in zip(a, b, strict=True):
                compare(x, y)
        else:
            assert a == b

    compare(found, expected)


@pytest.mark.parametrize("missing", ["predictions", "loss_and_predictions", "distance"])
def test_it_needs_predictions(tiny: SimpleNamespace, missing: str) -> None:
    objective, images = cnn_task(tiny)
    setattr(objective, missing, None)
    message = f"TRADES compares predictions on clean and attacked images, and Compared gives none: it has no {missing} "
    with pytest.raises(TypeError, match=message):
        TRADES(0.7, **QUICK).step(objective, images, names(5))
    assert objective.calls == 0


def test_a_broken_sample_harms_no_others_noise(tiny: SimpleNamespace) -> None:
    noise = []
    for broken in (False, True):
        objective, images = cnn_task(tiny)
        images[2, 0, 3, 3] = math.nan if broken else images[2, 0, 3, 3]
        step = TRADES(0.7, **QUICK).step(objective, images, names(5))
        assert step.logs["nonfinite"] == (QUICK["steps"] if broken else 0)
        noise.append((step.adversarial - images)[[0, 1, 3, 4]])
    torch.testing.assert_close(noise[0], noise[1], rtol=0, atol=1e-12)


# State


def test_a_resumed_run_continues_bit_for_bit(tiny: SimpleNamespace) -> None:
    objective, images = cnn_task(tiny)

    def fresh() -> TRADES:
        return TRADES(0.7, random_start=0.5, seed=4, **QUICK)

    whole, resumed = fresh(), fresh()
    for number in range(5):
        first = whole.step(objective, images, names(5))
        if number == 1:
            resumed.load_state_dict(json.loads(json.dumps(whole.state_dict(), allow_nan=False)))
        if number > 1:
            second = resumed.step(objective, images, names(5))
            assert torch.equal(first.adversarial, second.adversarial)
            assert torch.equal(first.loss, second.loss)
            assert resumed.state_dict() == whole.state_dict()
    assert whole.state_dict() == {"method": "TRADES", "steps_done": 5}


def test_the_state_of_another_method_is_refused() -> None:
    with pytest.raises(ValueError, match="the saved state is of the method 'SAT', this run trains 'TRADES'"):
        TRADES(1.0).load_state_dict(SAT(1.0).state_dict())


# Errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": -1}, "eps must be a finite number >= 0, got -1"),
        ({"eps": math.nan}, "eps must be a finite number >= 0, got nan"),
        ({"eps": math.inf}, "eps must be a finite number >= 0, got inf"),
        ({"beta": 0}, "beta must be a finite number > 0, got 0"),
        ({"beta": -6}, "beta must be a finite number > 0, got -6"),
        ({"beta": math.nan}, "beta must be a finite number > 0, got nan"),
        ({"beta": math.inf}, "beta must be a finite number > 0, got inf"),
        ({"random_start": 0}, "TRADES needs random_start > 0: on the clean image the gradient of its attack is zero"),
        ({"random_start": 0.0}, "TRADES needs random_start > 0"),
        ({"random_start": False}, "TRADES needs random_start > 0"),
        ({"random_start": -0.1}, r"random_start must be a fraction of the radius in \[0, 1\], got -0.1"),
        ({"random_start": 2}, r"random_start must be a fraction of the radius in \[0, 1\], got 2"),
        ({"random_start": math.nan}, r"random_start must be a fraction of the radius in \[0, 1\], got nan"),
        ({"steps": 0}, "steps must be a whole number >= 1, got 0"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        TRADES(**{"eps": 1.0, **settings})

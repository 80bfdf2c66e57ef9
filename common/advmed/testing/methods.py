"""What every training method promises: :class:`advmed.methods.Method`, as checks.

::

    from advmed import check_method

    check_method(lambda: SAT(0.5, steps=4))
    check_method(lambda: AMAT(0.5, [1.4, 0.2], steps=4))

The methods are given a tiny classifier with two loss terms, ``("ce", "sharp")``, and images in [0, 1). So thresholds,
where a method has some, are two.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from advmed.methods.base import AdaptiveRadiusMethod, AdversarialMethod, Method, MethodSettings, Step
from advmed.testing.expect import expect, expect_close, expect_error, expect_same
from advmed.testing.objectives import Classification, network, uniform

MethodFactory = Callable[[], Method]
"""Makes a fresh method, the same each time. Its attack should be short: a check makes a dozen steps."""

LABELS = (0, 1, 2, 3, 1)


def method_checks() -> list[tuple[str, Callable[[MethodFactory], None]]]:
    """The checks by their names; each is called with the factory."""
    return [(check.__name__.strip("_").replace("_", " "), check) for check in _CHECKS]


def check_method(make_method: MethodFactory) -> None:
    """Checks that a training method keeps what every method promises (:class:`Method`), on a tiny classifier.

    Among it: gradients of all weights, the same step with and without ``backward``, state that can be resumed, samples
    known by their ids. The classifier has two loss terms and images in [0, 1), so thresholds, where a method has some,
    are two. It needs no test framework; in tests of your own it is one call.

    Args:
        make_method: makes a fresh method, the same each time, with a short attack: a check makes a dozen steps.

    Raises:
        AssertionError: for the first promise that is not kept, which a note of the error names.

    Example:
        >>> from advmed import SAT, Method, Step, check_method
        >>> check_method(lambda: SAT(eps=0.5, steps=4))
        >>> class Forgetful(Method):  # its loss has no gradients
        ...     name = "forgetful"
        ...     def step(self, objective, images, ids, backward=None):
        ...         return Step(objective(images).mean().detach(), logs={})
        >>> try:
        ...     check_method(Forgetful)
        ... except AssertionError as error:
        ...     print(error.__notes__)
        ['check: makes a step of finite loss']
    """
    for name, check in method_checks():
        try:
            check(make_method)
        except AssertionError as error:
            error.add_note(f"check: {name}")
            raise


# The scene of all checks


class _Apart(Classification):
    """Its loss is the mean of the samples' own, so that a sample's gradient is its own, too."""

    def loss_and_predictions(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _, terms, logits = super().loss_and_predictions(images)
        return terms.sum(1).mean(), terms, logits


def _task(
    *, named: bool = True, apart: bool = False, dtype: torch.dtype = torch.float64, **settings: Any
) -> tuple[Classification, Tensor]:
    """A classifier in training mode, and five images; its loss joins them, unless they are to be ``apart``."""
    model = network(**settings).to(dtype)
    for parameter in model.parameters():  # as it comes, noise hardly moves its predictions
        parameter.data *= 3
    kind = _Apart if apart else Classification
    return kind(model, torch.tensor(LABELS), named=named), uniform(5, 3, 8, 8, dtype=dtype)


def _shares(make: MethodFactory) -> bool:
    """Whether its attack begins with the gradient of the training loss."""
    method = make()
    return isinstance(method, AdversarialMethod) and method.clean_gradients is not None


def _ids(count: int = 5) -> list[str]:
    return [f"case_{i}" for i in range(count)]


def _step(method: Method, task: tuple[Classification, Tensor], ids: Sequence[str] | None = None) -> Step:
    return method.step(*task, _ids() if ids is None else ids)


def _gradients(objective: Classification) -> list[Tensor]:
    found = []
    for parameter in objective.parameters:
        expect(parameter.grad is not None, "the loss does not reach all weights")
        assert parameter.grad is not None
        found.append(parameter.grad.clone())
        parameter.grad = None
    return found


def _expect_same_steps(first: Step, second: Step, message: str) -> None:
    expect_same(first.loss.detach(), second.loss.detach(), f"{message}: another loss")
    expect((first.adversarial is None) == (second.adversarial is None), message)
    if first.adversarial is not None and second.adversarial is not None:
        expect_same(first.adversarial, second.adversarial, f"{message}: other adversarial images")


def _training_images(model: nn.Module) -> list[Tensor]:
    """Will hold the images of the passes in which the weights ask for gradients: those of an attack do not."""
    seen: list[Tensor] = []

    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if all(parameter.requires_grad for parameter in model.parameters()):
            seen.append(inputs[0].detach().clone())

    model.register_forward_pre_hook(note)
    return seen


# The checks; the name of each is what is promised


def _says_what_it_is(make: MethodFactory) -> None:
    method = make()
    expect(isinstance(method, Method) and bool(method.name), "it has no name")
    expect(issubclass(method.settings, MethodSettings), "its settings are none")
    expect(method.keeps_sizes == isinstance(method, AdaptiveRadiusMethod), "keeps_sizes is not what it does")


def _makes_a_step_of_finite_loss(make: MethodFactory) -> None:
    for dtype in (torch.float32, torch.float64):
        objective, images = _task(dtype=dtype)
        before, version = images.clone(), images._version
        step = _step(make(), (objective, images))
        expect(step.loss.shape == () and step.loss.isfinite() and step.loss.requires_grad, "no loss to back-propagate")
        for key, value in step.logs.items():
            expect(value.shape == () and not value.requires_grad, f"{key} of the log is no detached scalar")
            expect(value.device == images.device and value.isfinite(), f"{key} of the log is elsewhere, or not finite")
        if step.terms is not None:
            expect(step.terms.shape == (5, 2) and not step.terms.requires_grad, "terms are not (B, K), detached")
            clean = objective.terms_of(objective.predictions(images)).detach()
            expect_close(step.terms, clean, "terms are not those of the clean images", rtol=1e-5, atol=1e-6)
        if step.adversarial is not None:
            found = step.adversarial
            expect(found.shape == images.shape and found.dtype == dtype, "adversarial images of another kind")
            expect(not found.requires_grad and found.isfinite().all(), "adversarial images ask for gradients")
        expect_same(images, before, "the images were written to")
        expect(images._version == version, "the images were written to")
        step.loss.backward()
        for gradient in _gradients(objective):
            expect(gradient.isfinite(), "a gradient of a weight is not finite")


def _backward_gives_the_same_gradients(make: MethodFactory) -> None:
    (objective, images), parts = _task(), list[Tensor]()

    def backward(loss: Tensor) -> None:
        expect(loss.shape == (), "a part of the loss is no scalar")
        parts.append(loss.detach())
        loss.backward()

    whole, split = make(), make()
    together = _step(whole, (objective, images))
    together.loss.backward()
    expected = _gradients(objective)
    apart = split.step(objective, images, _ids(), backward)
    expect(bool(parts) and not apart.loss.requires_grad, "the loss of a step with backward is attached")
    expect_close(torch.stack(parts).sum(), apart.loss, "the parts are not the loss", rtol=1e-12, atol=0)
    expect_close(apart.loss, together.loss.detach(), "another loss with backward", rtol=1e-12, atol=0)
    for found, gradient in zip(_gradients(objective), expected, strict=True):
        expect_close(found, gradient, "other gradients with backward", rtol=1e-10, atol=1e-13)
    expect(whole.state_dict() == split.state_dict(), "another state with backward")


def _knows_its_loss_where_the_noise_is_known(make: MethodFactory) -> None:
    """What ``awp`` learns from at moved weights: :meth:`AdversarialMethod.loss_of`."""
    method, (objective, images) = make(), _task()
    if not isinstance(method, AdversarialMethod):
        return
    step = _step(method, (objective, images))
    if step.adversarial is None:
        return
    step.loss.backward()
    expected = _gradients(objective)
    fresh = make()
    assert isinstance(fresh, AdversarialMethod)
    loss = fresh.loss_of(objective, images, step.adversarial)
    loss.backward()
    message = "loss_of has another loss than step: write one that is its"
    expect_close(loss.detach(), step.loss.detach(), message, rtol=1e-9, atol=0)
    for found, gradient in zip(_gradients(objective), expected, strict=True):
        expect_close(found, gradient, message, rtol=1e-8, atol=1e-12)


def _the_model_learns_from_the_training_passes_alone(make: MethodFactory) -> None:
    """The attack leaves gradients, flags, BatchNorm and the random state as they were."""
    objective, images = _task(normalise=True, dropout=0.4)
    twin = copy.deepcopy(objective.model)
    trained = _training_images(objective.model)
    torch_state = torch.get_rng_state()
    try:
        torch.manual_seed(0)
        _step(make(), (objective, images))
        after = torch.get_rng_state()
        expect(bool(trained), "there is no pass for training")
        torch.manual_seed(0)
        for seen in trained:
            twin(seen)
        expect_same(after, torch.get_rng_state(), "the random state moved otherwise than by the training passes")
    finally:
        torch.set_rng_state(torch_state)
    for key, value in twin.state_dict().items():
        found = objective.model.state_dict()[key]
        expect_close(found, value, f"{key} has learnt from an attack", rtol=1e-12, atol=0)
    expect(all(parameter.grad is None for parameter in objective.parameters), "the attack left gradients")
    expect(all(parameter.requires_grad for parameter in objective.parameters), "weights are frozen")
    expect(all(module.training for module in objective.model.modules()), "a layer has left training mode")


def _says_whether_it_learns_from_clean_images(make: MethodFactory) -> None:
    """It does where the gradients of a step change with what only the clean images pass through."""
    objective, images = _task()
    gain = nn.Parameter(torch.ones(5, 1, dtype=images.dtype))
    objective.model.register_parameter("gain", gain)  # of the model, as all weights that a method may know of

    def on_clean_images(_: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        return logits * gain if torch.equal(inputs[0], images) else logits

    objective.model.register_forward_hook(on_clean_images)
    method = make()
    _step(method, (objective, images)).loss.backward()
    learns = gain.grad is not None and bool(gain.grad.any())
    expect(method.learns_from_clean is learns, f"learns_from_clean is {method.learns_from_clean}, not {learns}")


def _works_with_an_objective_that_names_no_model(make: MethodFactory) -> None:
    first, second = (_step(make(), _task(named=named, apart=_shares(make))) for named in (True, False))
    expect_close(first.loss.detach(), second.loss.detach(), "another loss without a model", rtol=1e-9, atol=1e-12)
    if first.adversarial is not None and second.adversarial is not None:
        expect_close(first.adversarial, second.adversarial, "other images without a model", rtol=1e-9, atol=1e-12)


def _two_of_a_kind_make_the_same_steps(make: MethodFactory) -> None:
    task, first, second = _task(), make(), make()
    steps = []
    for _ in range(2):
        steps.append(_step(first, task))
        with torch.random.fork_rng():
            torch.manual_seed(1)
            _expect_same_steps(_step(second, task), steps[-1], "two methods made alike")
    if isinstance(first, AdversarialMethod) and first.attack.random_start:
        one, two = (step.adversarial for step in steps)
        expect(one is not None and two is not None and not torch.equal(one, two), "every step starts at the same noise")


def _a_resumed_method_goes_on_bit_for_bit(make: MethodFactory) -> None:
    """In the middle of an epoch, from a state that is plain JSON."""
    objective, images = _task()
    whole, resumed = make(), make()
    for number in range(7):
        ids = [f"case_{(number + i) % 7}" for i in range(5)]
        moved = objective, images + 0.01 * number
        first = _step(whole, moved, ids)
        if number == 2:
            state = whole.state_dict()
            plain = json.loads(json.dumps(state, allow_nan=False))
            expect(plain == state, "the state is not plain")
            resumed.load_state_dict(plain)
        elif number > 2:
            _expect_same_steps(_step(resumed, moved, ids), first, "a resumed method")
        if number == 4:
            for method in (whole, resumed):
                method.merge()
                method.begin_epoch()
        expect(number < 2 or resumed.state_dict() == whole.state_dict(), "a resumed method has another state")


def _refuses_the_state_of_another_method(make: MethodFactory) -> None:
    method = make()
    _step(method, _task())
    before = copy.deepcopy(method.state_dict())
    for state in ({}, {**before, "method": "another"}, {**before, "method": None}):
        expect_error(ValueError, partial(method.load_state_dict, state), f"a state of {state.get('method')}")
    expect(method.state_dict() == before, "a state that was refused was taken in part")


def _merging_alone_changes_nothing(make: MethodFactory) -> None:
    method, task = make(), _task()
    for _ in range(2):
        _step(method, task)
        before = copy.deepcopy(method.state_dict())
        method.merge()
        expect(method.state_dict() == before, "merging has changed the state of the only process")


def _ids_may_repeat(make: MethodFactory) -> None:
    """A batch that holds two crops of a case: one size for both, and one move."""
    method, task = make(), _task()
    step = _step(method, task, ["twice", "b", "c", "d", "twice"])
    expect(step.loss.isfinite(), "the loss is not finite")
    if isinstance(method, AdaptiveRadiusMethod):
        expect(method.store.ids() == ["twice", "b", "c", "d"], "an id was not met once")
        expect(method.store.visits() == torch.tensor([2, 1, 1, 1]), "visits are not those of the images")
        before = method.store.values()
        _step(method, task, ["twice", "b", "c", "d", "twice"])
        expect(method.store.values() <= before + method.growth + 1e-6, "a size moved twice")
        expect_error(ValueError, lambda: _step(make(), task, _ids(4)), "4 ids for 5 images")


def _a_broken_sample_moves_no_size_and_harms_no_other(make: MethodFactory) -> None:
    objective, images = _task(apart=_shares(make))
    broken, others = images.clone(), [0, 1, 3, 4]
    broken[2, 0, 3, 3] = math.nan
    healthy, method, without = make(), make(), make()
    fewer = type(objective)(objective.model, objective.labels[others])
    for visit in range(3):
        expected, found = _step(healthy, (objective, images)), _step(method, (objective, broken))
        without.step(fewer, images[others], [f"case_{i}" for i in others])
        if found.adversarial is None or expected.adversarial is None:
            return
        if visit == 0:
            theirs, ours = expected.adversarial[others], found.adversarial[others]
            expect_close(ours, theirs, "the others' noise", rtol=0, atol=1e-12)
        expect(found.logs["nonfinite"] > 0 if "nonfinite" in found.logs else True, "lost steps are not counted")
    if isinstance(method, AdaptiveRadiusMethod) and isinstance(without, AdaptiveRadiusMethod):
        expect(method.store.get(["case_2"]) == method.store.initial, "a broken sample moved its size")
        if not method.attack.random_start:  # else a smaller batch draws other numbers
            ids = [f"case_{i}" for i in others]
            expect_same(method.store.get(ids), without.store.get(ids), "a broken sample moves others' sizes")


_CHECKS: tuple[Callable[[MethodFactory], None], ...] = (
    _says_what_it_is,
    _makes_a_step_of_finite_loss,
    _backward_gives_the_same_gradients,
    _the_model_learns_from_the_training_passes_alone,
    _says_whether_it_learns_from_clean_images,
    _works_with_an_objective_that_names_no_model,
    _knows_its_loss_where_the_noise_is_known,
    _two_of_a_kind_make_the_same_steps,
    _a_resumed_method_goes_on_bit_for_bit,
    _refuses_the_state_of_another_method,
    _merging_alone_changes_nothing,
    _ids_may_repeat,
    _a_broken_sample_moves_no_size_and_harms_no_other,
)

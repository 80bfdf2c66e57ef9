"""What every attack promises: :class:`advmed.attacks.Attack`, as checks.

::

    from advmed import check_attack

    check_attack(lambda norm: PGD(10, 2.0, norm))
    check_attack(lambda norm: SquareAttack(20, norm), keeps_best=True, spatial=True)
"""

from __future__ import annotations

import dataclasses
import math
import pickle
import random as python_random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from advmed.attacks.base import Attack
from advmed.attacks.problem import AttackResult, Bounds, total
from advmed.norms import norm as lengths
from advmed.testing.expect import expect, expect_close, expect_error, expect_same
from advmed.testing.objectives import Classification, network, uniform

AttackFactory = Callable[[float], Attack]
"""Makes an attack in a norm, 2 or inf: as short as can be and still raise the loss of a tiny classifier."""

SHAPES = ((5,), (2, 7), (3, 8, 8), (2, 5, 4, 3))
"""(C, *spatial), of none to three spatial dimensions."""


class Traits(NamedTuple):
    """What attacks differ in.

    Attributes:
        random: its result depends on the generator.
        keeps_best: it returns the point of the largest loss that it has seen, not the last one.
        spatial: images must have spatial dimensions.
        looks: how far from the image it looks, in radii; what it returns never lies beyond one.
    """

    random: bool
    keeps_best: bool
    spatial: bool
    looks: float = 1.0

    @classmethod
    def of(cls, attack: Attack, random: bool | None, keeps_best: bool | None, spatial: bool) -> Traits:
        """Those that are given, and the others by the attack's ``random_start``, ``restarts``, ``keep``, ``shrink``."""
        if random is None:
            random = getattr(attack, "random_start", 1.0) > 0 or getattr(attack, "restarts", 1) > 1
        best = getattr(attack, "keep", None) == "best" if keeps_best is None else keeps_best
        return cls(random, best, spatial, 2.0 if getattr(attack, "shrink", False) else 1.0)


def attack_checks(
    *, random: bool | None = None, keeps_best: bool | None = None, spatial: bool = False
) -> list[tuple[str, Callable[[AttackFactory], None]]]:
    """The checks by their names; each is called with the factory, and tries both norms.

    Args:
        random: whether the result depends on the generator; None: if the attack has no ``random_start`` of 0.
        keeps_best: whether the point of the largest host's loss is returned; None: if its ``keep`` is "best".
        spatial: whether images must have spatial dimensions.
    """

    def both(check: Callable[[Attack, Traits], None]) -> Callable[[AttackFactory], None]:
        def run(make_attack: AttackFactory) -> None:
            for p in (2.0, math.inf):
                attack = make_attack(p)
                expect(attack.norm == p and attack == make_attack(p), f"{attack} is not what was asked for, L{p:g}")
                check(attack, Traits.of(attack, random, keeps_best, spatial))

        return run

    return [(check.__name__.strip("_").replace("_", " "), both(check)) for check in _CHECKS]


def check_attack(
    make_attack: AttackFactory, *, random: bool | None = None, keeps_best: bool | None = None, spatial: bool = False
) -> None:
    """Checks that an attack keeps what every attack promises (:class:`Attack`), on a tiny classifier and in both norms.

    Among it: noise within the radius and the bounds, each sample for itself, nothing left behind in the model or in the
    random state, the same result with the same generator. It needs no test framework; in tests of your own it is one
    call.

    Args:
        make_attack: makes the attack in a norm, 2 or inf: as short as can be and still raise a loss. Two that it makes
            must be equal.
        random: whether the result depends on the generator; None: if the attack has no ``random_start`` of 0.
        keeps_best: whether the point of the largest host's loss is returned; None: if its ``keep`` is "best".
        spatial: whether images must have spatial dimensions.

    Raises:
        AssertionError: for the first promise that is not kept, which a note of the error names.

    Example:
        >>> from advmed import Noise, check_attack
        >>> class Louder(Noise):  # of twice the norm that it is asked for
        ...     def __call__(self, objective, images, radius, **more):
        ...         return super().__call__(objective, images, 2 * radius, **more)
        >>> try:
        ...     check_attack(lambda norm: Louder("gaussian", norm))
        ... except AssertionError as error:
        ...     print(error.__notes__)
        ['check: never leaves ball and bounds']
    """
    for name, check in attack_checks(random=random, keeps_best=keeps_best, spatial=spatial):
        try:
            check(make_attack)
        except AssertionError as error:
            error.add_note(f"check: {name}")
            raise


# The scene of all checks


class _Behind(nn.Module):
    """A network behind a function of its images."""

    def __init__(self, function: Callable[[Tensor], Tensor], inner: nn.Module) -> None:
        super().__init__()
        self.function, self.inner = function, inner

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.inner(self.function(images))
        return found


def _task(
    shape: tuple[int, ...] = (3, 8, 8), batch: int = 5, dtype: torch.dtype = torch.float64, gain: float = 3.0
) -> tuple[Classification, Tensor]:
    """A classifier in evaluation mode, its weights multiplied by ``gain``, and images in [0, 1)."""
    model = network(shape[0], dimensions=len(shape) - 1).to(dtype).eval()
    for parameter in model.parameters():
        parameter.data *= gain
    return Classification(model, torch.arange(batch) % 4), uniform(batch, *shape, dtype=dtype)


def _task_behind(function: Callable[[Tensor], Tensor]) -> tuple[Classification, Tensor]:
    objective, images = _task()
    return Classification(_Behind(function, objective.model), objective.labels), images


def _radii(attack: Attack, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor([0.0, 0.1, 0.5, 1.0, 3.0], dtype=dtype) * (1 if attack.norm == 2 else 0.1)


def _run(
    attack: Attack,
    task: tuple[Any, Tensor],
    radius: float | Tensor | None = None,
    bounds: Bounds = None,
    seed: int | None = 0,
) -> AttackResult:
    """The attack on the images of a task; seed None: without a generator."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    given: Any = bounds
    return attack(task[0], task[1], _radii(attack) if radius is None else radius, bounds=given, generator=generator)


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[Tensor]]:
    """The images of all passes through a model."""
    points: list[Tensor] = []
    hook = model.register_forward_pre_hook(lambda _, inputs: points.append(inputs[0].detach().clone()))
    yield points
    hook.remove()


@contextmanager
def _no_random_state_moves() -> Iterator[None]:
    before = torch.get_rng_state(), pickle.dumps(np.random.get_state()), python_random.getstate()
    yield
    expect_same(torch.get_rng_state(), before[0], "torch's random state moved")
    expect(pickle.dumps(np.random.get_state()) == before[1], "numpy's random state moved")
    expect(python_random.getstate() == before[2], "Python's random state moved")


def _white_box(attack: Attack) -> bool:
    return attack.access == "white box"


def _height(attack: Attack, terms: Tensor) -> Tensor:
    """What an attack raises, (B,): the host's loss, or with a loss of its own the cross-entropy at least."""
    return total(terms) if getattr(attack, "loss", None) is None else terms[:, 0]


# The checks; the name of each is what is promised


def _says_what_it_is(attack: Attack, traits: Traits) -> None:
    expect(dataclasses.is_dataclass(attack), "it is no dataclass, whose fields an evaluation could write down")
    first = dataclasses.fields(cast(Any, attack))[0].name
    expect_error(dataclasses.FrozenInstanceError, lambda: setattr(attack, first, 0), "a setting can be changed")
    expect(len(attack.description) > 10 and "\n" not in attack.description, "it has no description of one line")
    expect(attack.access in ("white box", "black box", "none"), f"its access is {attack.access!r}")
    if attack.gradients is not None and attack.queries is not None:
        asked = "none" if attack.queries == 1 else "black box"
        expect(attack.access == ("white box" if attack.gradients else asked), f"{attack.access} is not what it costs")


def _costs_what_it_says(attack: Attack, traits: Traits) -> None:
    task = _task()
    _run(attack, task)
    queries = sum(kind.endswith("without gradient") for kind in task[0].passes)
    gradients = task[0].calls - queries
    expect(attack.gradients in (None, gradients), f"{gradients} gradients, and it says {attack.gradients}")
    expect(attack.queries in (None, queries), f"{queries} queries, and it says {attack.queries}")


def _gives_a_complete_result_in_any_shape(attack: Attack, traits: Traits) -> None:
    for shape in SHAPES[1:] if traits.spatial else SHAPES:
        for dtype, batch in ((torch.float64, 5), (torch.float32, 1)):
            objective, images = _task(shape, batch, dtype)
            radius = _radii(attack, dtype)[-batch:]
            before, version = images.clone(), images._version
            result = _run(attack, (objective, images), radius)
            expect_same(images, before, "the images were written to")
            expect(images._version == version, "the images were written to")
            expect(result.images.shape == images.shape and result.images.dtype == dtype, "images of another kind")
            expect(result.terms is not None, "the result has no terms")
            assert result.terms is not None
            terms = objective(result.images).detach()
            expect_close(result.terms, terms, "terms are not those of the images", rtol=1e-6, atol=1e-9)
            found = lengths(result.images - images, attack.norm)
            expect_close(result.norms, found, "norms are not those of the noise", rtol=1e-6, atol=1e-6)
            expect((result.norms > 0) == (radius > 0), "a sample was not attacked")
            count = result.nonfinite
            expect(count.shape == (batch,) and count.dtype == torch.int64 and count == 0, "gradients counted as broken")
            held = (result.images, result.terms, result.norms)
            expect(not any(tensor.requires_grad for tensor in held), "the result asks for gradients")
            if attack.access != "none" and batch > 1:
                rise = _height(attack, terms) - _height(attack, objective(images).detach())
                expect(rise.mean() > 0, "the loss has not risen")
    if traits.spatial:
        expect_error(ValueError, lambda: _run(attack, _task((5,))), "images without spatial dimensions")


def _never_leaves_ball_and_bounds(attack: Attack, traits: Traits) -> None:
    """At any pass; values outside the bounds may stay, and move inwards only."""
    objective, images = _task()
    own = images.flatten(1).amin(1), images.flatten(1).amax(1)
    low, high = images.clamp(max=0.2), images.clamp(min=0.8)
    boxes: list[tuple[Bounds, Tensor, Tensor]] = [
        (None, torch.full_like(images, -math.inf), torch.full_like(images, math.inf)),
        ((0.2, 0.8), low, high),
        ("sample", own[0].reshape(5, 1, 1, 1).expand_as(images), own[1].reshape(5, 1, 1, 1).expand_as(images)),
    ]
    radius = _radii(attack)
    for bounds, low, high in boxes:
        with _watched(objective.model) as points:
            result = _run(attack, (objective, images), radius, bounds)
        for point in (*points, result.images):
            far = lengths(point - images, attack.norm)
            limit = radius * (1.0 if point is result.images else traits.looks)
            expect(far <= limit * (1 + 1e-9) + 1e-12, f"noise {far} outside radii {limit}")
            expect((point >= low) & (point <= high), f"values outside the bounds {bounds}")
        expect((result.norms > 0) == (radius > 0), "a sample was not attacked")
    each = _run(attack, (objective, images), radius, own)
    expect_same(each.images, result.images, "bounds as one number a sample are not those bounds")
    for i in (1, 3):
        one = objective.labels[i : i + 1], images[i : i + 1]
        if not traits.random:
            alone = _run(attack, (Classification(objective.model, one[0]), one[1]), radius[i : i + 1], (0.2, 0.8))
            together = _run(attack, (objective, images), radius, (0.2, 0.8))
            expect_close(alone.images[0], together.images[i], "others' values change the bounds", rtol=1e-6, atol=1e-6)


def _radius_0_gives_the_image_back(attack: Attack, traits: Traits) -> None:
    objective, images = _task(dtype=torch.float32)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = -0.0, 1e-42
    boxes: tuple[Bounds, ...] = (None, (0.3, 0.6), "sample")
    for bounds in boxes:
        result = _run(attack, (objective, images), torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0]), bounds)
        expect_same(result.images[::2], images[::2], "radius 0 changed an image")
        expect(result.norms[::2] == 0, "radius 0 has a norm")
        expect(
            (result.images != images).flatten(1).any(1) == torch.tensor([0, 1, 0, 1, 0]).bool(), "one radius for all"
        )


def _one_number_is_a_radius_for_all(attack: Attack, traits: Traits) -> None:
    task, radius = _task(), torch.full((5,), 0.25, dtype=torch.float64, requires_grad=True)
    each, number = _run(attack, task, radius), _run(attack, task, 0.25)
    expect_same(each.images, number.images, "a number is not the same as one for each sample")
    expect(not each.images.requires_grad and not each.norms.requires_grad, "the radius' gradient is followed")


def _samples_are_alone(attack: Attack, traits: Traits) -> None:
    """A batch of N is N batches of one, where random numbers are not drawn for the whole batch."""
    if traits.random:
        return
    (objective, images), radius = _task(), _radii(attack)
    boxes: tuple[Bounds, ...] = (None, (0.0, 1.0), "sample")
    for bounds in boxes:
        whole = _run(attack, (objective, images), radius, bounds)
        for i in range(5):
            single = Classification(objective.model, objective.labels[i : i + 1]), images[i : i + 1]
            one = _run(attack, single, radius[i : i + 1], bounds)
            for name in ("images", "terms", "norms", "nonfinite"):
                found, expected = getattr(one, name)[0], getattr(whole, name)[i]
                expect_close(found, expected, f"{name} of a sample depend on its batch", rtol=1e-6, atol=1e-6)


def _keeps_the_worst_point_it_has_seen(attack: Attack, traits: Traits) -> None:
    """Of finite loss, and made by itself: the image, where it starts there, is no such point."""
    if not traits.keeps_best:
        return

    class Broken(Classification):
        """Sample 1 has a finite loss in two of three passes, sample 2 never."""

        bad = 0.0

        def terms_of(self, logits: Tensor) -> Tensor:
            terms = super().terms_of(logits)
            rows = torch.tensor([False, self.calls % 3 == 1, True, False, False])
            return torch.where(rows[:, None], self.bad, terms) if self.bad else terms

    for bad in (0.0, math.nan, math.inf):
        objective, images = _task()
        objective = Broken(objective.model, objective.labels)
        objective.bad = bad
        with _watched(objective.model) as points:
            result = _run(attack, (objective, images), bounds=(0.0, 1.0))
        objective.passes.clear()
        first = int(getattr(attack, "random_start", 1.0) == 0)
        seen = torch.stack([total(objective(point)).detach() for point in points])[first:]
        points = points[first:]
        worst = seen.where(seen.isfinite(), -math.inf).max(0)
        assert result.terms is not None
        sound = worst.values.isfinite()
        expect_same(total(result.terms)[sound], worst.values[sound], "the loss is not the largest")
        expect(not result.terms[~sound].sum(1).isfinite().any(), "a finite loss where there was none")
        expect(result.images.isfinite(), "a broken pass has broken an image")
        for i in range(1, 5):
            if sound[i]:
                expect_same(result.images[i], points[int(worst.indices[i])][i], "the image is not that of its loss")

    _, images = _task()

    def downhill(x: Tensor) -> Tensor:  # wherever its gradient leads
        rise = x.flatten(1).sum(1, keepdim=True)
        return rise - rise.detach() - (x - images).flatten(1).square().sum(1, keepdim=True).detach()

    result = _run(attack, (downhill, images))
    assert result.terms is not None
    expect((result.norms > 0) == (_radii(attack) > 0), "the clean image is returned as if it were attacked")
    expect_close(result.terms, downhill(result.images), "terms are not those of the images", rtol=1e-6, atol=1e-9)


def _the_generator_repeats_it_and_no_global_random_state_moves(attack: Attack, traits: Traits) -> None:
    with _no_random_state_moves():
        for named in (True, False):
            objective, images = _task()
            task = Classification(objective.model, objective.labels, named=named), images
            first, again, other = (_run(attack, task, seed=seed) for seed in (1, 1, 2))
            for name in ("images", "terms", "norms"):
                expect_same(getattr(first, name), getattr(again, name), f"the same generator gives other {name}")
            free = _run(attack, task, seed=None), _run(attack, task, seed=None)
            for one, two, what in ((first, other, "another generator"), (*free, "no generator")):
                differs = not torch.equal(one.images, two.images)
                expect(differs == traits.random, f"{what} {'changes' if differs else 'does not change'} the result")


def _leaves_no_trace_in_the_model(attack: Attack, traits: Traits) -> None:
    model = network(normalise=True, dropout=0.5).train()
    model[0].weight.requires_grad_(False)
    model[4].eval()
    images, labels = uniform(5, 3, 8, 8, dtype=torch.float32), torch.arange(5) % 4
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]
    asked: list[bool] = []
    model.register_forward_pre_hook(lambda *_: asked.append(any(p.requires_grad for p in model.parameters())))
    with _no_random_state_moves():
        _run(attack, (Classification(model, labels), images), 1.0, (0.0, 1.0), seed=None)
    expect(bool(asked) and not any(asked), "weights ask for a gradient under attack")
    for name, value in model.state_dict().items():
        expect_same(value, state[name], f"{name} has changed")
    after = [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]
    expect(after == flags, "training or requires_grad flags have changed")
    expect(all(parameter.grad is None for parameter in model.parameters()), "weights got a gradient")
    _run(attack, (Classification(model.eval(), labels, named=False), images.requires_grad_()), 1.0)
    expect(all(parameter.grad is None for parameter in model.parameters()), "weights of a model unnamed got a gradient")
    expect(images.grad is None, "the images got a gradient")


def _runs_where_gradients_are_off(attack: Attack, traits: Traits) -> None:
    (objective, images), radius = _task(), _radii(attack)
    box = torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    expected = _run(attack, (objective, images), radius, box)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            inside = images.clone(), radius.clone(), (box[0].clone(), box[1].clone())
            found = [_run(attack, (objective, x), r, b) for x, r, b in ((images, radius, box), inside)]
            expect(not torch.is_grad_enabled(), "gradients were switched on")
        found.append(_run(attack, (objective, inside[0]), inside[1], inside[2]))
        for result in found:
            expect_same(result.images, expected.images, f"another result in {mode.__name__}")
            assert result.terms is not None and expected.terms is not None
            expect_same(result.terms, expected.terms, f"other terms in {mode.__name__}")
            tensors = result.images, result.terms, result.norms
            expect(not any(map(Tensor.is_inference, tensors)), f"results of {mode.__name__} cannot be trained on")


def _runs_under_autocast(attack: Attack, traits: Traits) -> None:
    objective, images = _task(dtype=torch.float32, gain=1.0)
    radius = 1.0 if attack.norm == 2 else 0.1
    clean, exact = _height(attack, objective(images).detach()), _run(attack, (objective, images), radius)
    assert exact.terms is not None
    for kind in (torch.bfloat16, torch.float16):
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients), torch.autocast("cpu", kind):
                objective(images)  # as a host would; fills autocast's cache of cast weights
                result = _run(attack, (objective, images), radius)
            expect(result.images.dtype == torch.float32, "images in half precision")
            expect(result.nonfinite == 0, "gradients were lost")
            expect(result.norms <= radius * (1 + 1e-5), "noise outside the ball")
            rise = _height(attack, objective(result.images).detach()) - clean
            if attack.access == "none":
                expect_same(result.images, exact.images, "another noise")
            elif not _white_box(attack):  # what a search keeps hangs on the last digits of losses
                expect(rise.mean() > 0, "the loss has not risen")
            else:
                expect(rise.mean() >= 0.9 * (_height(attack, exact.terms) - clean).mean() - 1e-6, "a far weaker attack")
            if _white_box(attack) and attack.norm == 2 and not traits.random:
                ours, theirs = ((found.images - images).flatten(1) for found in (result, exact))
                expect(torch.cosine_similarity(ours, theirs) > 0.95, "noise of another direction")
        trained = []
        for attacked in (False, True):
            objective.model.zero_grad()
            with torch.autocast("cpu", kind):
                if attacked:
                    _run(attack, (objective, images), radius)
                objective(images).mean().backward()
            trained.append([parameter.grad for parameter in objective.model.parameters()])
        for plain, after in zip(*trained, strict=True):
            expect(plain is not None and after is not None, "training under autocast does not reach the weights")
            assert plain is not None and after is not None
            expect_same(after, plain, "training under autocast gets other gradients")


def _takes_images_in_half_precision(attack: Attack, traits: Traits) -> None:
    class Half(Classification):
        def __call__(self, images: Tensor) -> Tensor:
            return super().__call__(images).to(images.dtype)

    for kind in (torch.float16, torch.bfloat16):
        objective, images = _task(dtype=torch.float32, gain=1.0)
        objective, images = Half(_Behind(Tensor.float, objective.model), objective.labels), images.to(kind)
        radius = torch.tensor([0.0, 0.05, 0.1, 0.25, 0.5])
        with _watched(objective.model) as points:
            result = _run(attack, (objective, images), radius)
        expect({point.dtype for point in points} == {kind}, "the network is shown another precision")
        expect(result.images.dtype == kind, "another precision is returned")
        expect_same(result.images[0], images[0], "radius 0 changed an image")
        expect(result.nonfinite == 0, "gradients were lost")
        far = lengths(result.images.double() - images.double(), attack.norm)
        expect(far <= radius.double() * (1 + 1e-5), "noise outside the ball")
        expect_close(result.norms.double(), far, "norms are not those of the noise", rtol=1e-5, atol=1e-6)
        assert result.terms is not None
        terms = objective(result.images).detach()
        expect_close(result.terms, terms, "terms are not those of the images", rtol=1e-3, atol=1e-3)
        if not traits.keeps_best:  # in so few digits the image itself may be as bad
            expect(result.norms[1:] > 0, "a sample was not attacked")


def _keeps_the_memory_format(attack: Attack, traits: Traits) -> None:
    objective, images = _task()
    radius = 1.0 if attack.norm == 2 else 0.1
    first = _run(attack, (objective, images), radius, (0.0, 1.0))
    last = images.contiguous(memory_format=torch.channels_last)
    second = _run(attack, (objective, last), radius, (0.0, 1.0))
    expect_close(second.images, first.images, "another result for channels_last", rtol=0, atol=1e-9)
    expect(second.images.is_contiguous(memory_format=torch.channels_last), "channels_last was rearranged")


def _a_zero_gradient_moves_nothing(attack: Attack, traits: Traits) -> None:
    if not _white_box(attack) or traits.random:
        return
    dead = torch.tensor([False, True, False, False, False]).reshape(5, 1, 1, 1)
    task = _task_behind(lambda x: torch.where(dead, x.detach(), x))
    result = _run(attack, task, 0.5)
    expect_same(result.images[1], task[1][1], "an image without a gradient was moved")
    expect((result.norms > 0) == ~dead.flatten(), "a zero gradient harms other samples")
    expect(result.nonfinite == 0, "a zero gradient is counted as broken")


def _a_gradient_that_is_not_finite_is_counted_and_harms_no_other_sample(attack: Attack, traits: Traits) -> None:
    if not _white_box(attack):
        return
    healthy = _run(attack, _task(), 0.5, (0.0, 1.0))
    rows = torch.tensor([False, True, False, False, False])
    for bad in (math.nan, math.inf, -math.inf):

        def spoilt(images: Tensor, bad: float = bad) -> Tensor:
            passed = images.clone()
            if passed.requires_grad:
                broken = rows.reshape(5, 1, 1, 1)
                passed.register_hook(lambda gradient: gradient.masked_fill(broken, bad))
            return passed

        task = _task_behind(spoilt)
        result = _run(attack, task, 0.5, (0.0, 1.0))
        expect_same(result.images[~rows], healthy.images[~rows], "other samples are attacked otherwise")
        expect(result.nonfinite[~rows] == 0, "a broken gradient is counted for all")
        if attack.gradients is not None:
            expect(result.nonfinite[rows] == attack.gradients, f"{result.nonfinite[1]} of {attack.gradients} counted")
        expect(result.images.isfinite() & (result.norms <= 0.5 + 1e-9).reshape(5, 1, 1, 1), "an image was broken")
        if not traits.random:
            expect_same(result.images[1], task[1][1], "an image was moved by a broken gradient")


def _a_broken_image_harms_no_other_sample(attack: Attack, traits: Traits) -> None:
    objective, images = _task()
    broken = images.clone()
    broken[1, 2, 3, 4] = math.nan
    others = torch.tensor([0, 2, 3, 4])
    boxes: tuple[Bounds, ...] = (None, (0.0, 1.0), "sample")
    for bounds in boxes:
        healthy, result = (_run(attack, (objective, x), 0.3, bounds) for x in (images, broken))
        found, expected = result.images[others], healthy.images[others]
        expect_close(found, expected, "other samples are attacked otherwise", rtol=0, atol=1e-12)
        expect(result.nonfinite[others] == 0, "a broken image is counted for all")
        if _white_box(attack):
            if attack.gradients is not None:
                expect(result.nonfinite[1] == attack.gradients, "not every gradient of the broken image is counted")
            if not traits.random:
                rest = "the rest of a broken image was moved"
                expect_close(result.images[1], broken[1], rest, rtol=0, atol=0)


def _refuses_what_does_not_fit(attack: Attack, traits: Traits) -> None:
    task = _task()
    unfit: list[tuple[dict[str, Any], str]] = [
        ({"radius": torch.ones(3)}, "3 radii for 5 images"),
        ({"bounds": (1.0, 0.0)}, "bounds in the wrong order"),
        ({"bounds": "image"}, "bounds that are none"),
        ({"bounds": (torch.zeros(3), torch.ones(3))}, "3 bounds for 5 images"),
    ]
    for arguments, what in unfit:
        expect_error(ValueError, partial(_run, attack, task, **arguments), what)

    class Averaged(Classification):
        def __call__(self, images: Tensor) -> Tensor:
            return super().__call__(images).mean(0, keepdim=True)

    expect_error(ValueError, lambda: _run(attack, (Averaged(task[0].model, task[0].labels), task[1])), "averaged terms")

    def plain(images: Tensor) -> Tensor:
        return images.flatten(1).sum(1, keepdim=True)

    if getattr(attack, "loss", None) is None:
        _run(attack, (plain, task[1]))
    else:
        expect_error(TypeError, lambda: _run(attack, (plain, task[1])), "an objective without classes")


_CHECKS: tuple[Callable[[Attack, Traits], None], ...] = (
    _says_what_it_is,
    _costs_what_it_says,
    _gives_a_complete_result_in_any_shape,
    _never_leaves_ball_and_bounds,
    _radius_0_gives_the_image_back,
    _one_number_is_a_radius_for_all,
    _samples_are_alone,
    _keeps_the_worst_point_it_has_seen,
    _the_generator_repeats_it_and_no_global_random_state_moves,
    _leaves_no_trace_in_the_model,
    _runs_where_gradients_are_off,
    _runs_under_autocast,
    _takes_images_in_half_precision,
    _keeps_the_memory_format,
    _a_zero_gradient_moves_nothing,
    _a_gradient_that_is_not_finite_is_counted_and_harms_no_other_sample,
    _a_broken_image_harms_no_other_sample,
    _refuses_what_does_not_fit,
)

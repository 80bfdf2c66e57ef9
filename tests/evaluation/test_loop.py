"""The evaluation loop: right numbers, the same after a kill, and clear refusals."""

from __future__ import annotations

import gc
import json
import logging
import math
import re
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import advmed
from advmed.attacks.names import parse_attacks
from advmed.evaluation import loop
from advmed.evaluation.loop import Evaluation, EvaluationBatch, LoadedBatch, at_levels, attack_batch, evaluate

WEIGHT = torch.linspace(-1, 2, 12)
ATTACKS = parse_attacks(["pgd3", "ifgsm2"])
LEVELS = (0, 0.5, 2)


class Logistic:
    """Logistic loss of a linear model, one term: the worst noise of length eps is -y eps w / ||w||."""

    def __init__(self, targets: Tensor) -> None:
        self.targets = targets

    def margin(self, images: Tensor) -> Tensor:
        return self.targets * (images.flatten(1) @ WEIGHT)

    def __call__(self, images: Tensor) -> Tensor:
        return nn.functional.softplus(-self.margin(images))[:, None]


class Bumpy(Logistic):
    """A loss with hills, on which a short attack depends on where it starts."""

    def __call__(self, images: Tensor) -> Tensor:
        return torch.sin(5 * images.flatten(1)).sum(1, keepdim=True)


def load(number: int, size: int = 3, kind: type[Logistic] = Bumpy) -> LoadedBatch:
    generator = torch.Generator().manual_seed(number)
    images = torch.randn(size, 1, 3, 4, generator=generator)
    objective = kind(torch.where(torch.rand(size, generator=generator) < 0.5, -1.0, 1.0))
    return LoadedBatch(
        images, objective, lambda x: {"margin": objective.margin(x), "boxes": x.flatten(1)[:, :6].reshape(-1, 2, 3)}
    )


def batches(
    count: int = 4, on_load: Callable[[int], object] = lambda number: None, kind: type[Logistic] = Bumpy
) -> list[EvaluationBatch]:
    def make(number: int) -> LoadedBatch:
        on_load(number)
        return load(number, kind=kind)

    return [EvaluationBatch([f"case_{n}/{k}" for k in range(3)], lambda n=n: make(n)) for n in range(count)]


def run(
    folder: Path | None = None, on_load: Callable[[int], object] = lambda number: None, **changes: Any
) -> Evaluation:
    """Four batches under both attacks."""
    how = {"batches": batches(on_load=on_load), "attacks": ATTACKS, "levels": LEVELS, "fingerprint": "model"}
    return evaluate(**how | changes, folder=folder)


def one(images: Tensor, score: Callable[[Tensor], Any] | None = None) -> list[EvaluationBatch]:
    """A batch of two."""
    scored = LoadedBatch(images, Logistic(torch.ones(len(images))), score or (lambda x: {"sum": x.flatten(1).sum(1)}))
    return [EvaluationBatch(["first", "second"], lambda: scored)]


def parts(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "parts").iterdir())}


@pytest.fixture(scope="module")
def whole() -> Evaluation:
    return run()


def assert_identical(first: Evaluation, second: Evaluation) -> None:
    assert (first.ids, first.levels, first.configuration) == (second.ids, second.levels, second.configuration)
    assert list(first.attacked) == list(second.attacked)
    for attack in first.attacks:
        for level in first.levels:
            one, other = first.at(attack, level), second.at(attack, level)
            for name in ("norm", "loss", "nonfinite"):
                np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
            assert list(one.scores) == list(other.scores)
            for name, score in one.scores.items():
                np.testing.assert_array_equal(score, other.scores[name])
                assert score.dtype == other.scores[name].dtype


def test_closed_form_of_a_linear_model() -> None:
    result = evaluate(batches(kind=Logistic), parse_attacks(["pgd40", "ifgsm4"]), LEVELS)
    clean = torch.cat([load(n, kind=Logistic).score(load(n, kind=Logistic).images)["margin"] for n in range(4)])
    np.testing.assert_array_equal(result.clean.scores["margin"], clean.numpy())
    # From a random start PGD approaches the closed form, from the image I-FGSM walks straight to it.
    for attack, tolerance in (("pgd40", 5e-3), ("ifgsm4", 1e-5)):
        for level in LEVELS:
            worst = clean - level * WEIGHT.norm()
            condition = result.at(attack, level)
            np.testing.assert_allclose(condition.scores["margin"], worst, atol=tolerance)
            np.testing.assert_allclose(condition.loss, nn.functional.softplus(-worst), atol=tolerance)
            np.testing.assert_allclose(condition.norm, level, rtol=1e-5)
            assert condition.nonfinite.tolist() == [0] * 12
            assert condition.seconds > 0
    expected = [float(np.mean(clean.numpy() - level * float(WEIGHT.norm()))) for level in LEVELS]
    assert result.curve("ifgsm4", lambda scores: scores["margin"].mean()) == pytest.approx(expected, abs=1e-4)


def test_result_is_in_the_order_of_the_batches(whole: Evaluation) -> None:
    assert whole.ids == tuple(f"case_{number}/{k}" for number in range(4) for k in range(3))
    assert whole.scores("pgd3", 2)["boxes"].shape == (12, 2, 3)
    assert whole.scores("pgd3", 0) is whole.scores("ifgsm2", 0) is whole.clean.scores
    assert list(whole.attacked) == [("pgd3", 0.5), ("pgd3", 2), ("ifgsm2", 0.5), ("ifgsm2", 2)]
    with pytest.raises(KeyError, match=r"pgd3 at level 1 was not evaluated.*0 0\.5 2"):
        whole.at("pgd3", 1)
    with pytest.raises(KeyError, match="attacks pgd3, ifgsm2"):
        whole.scores("pgd4", 0)


def test_numbers_follow_the_seed_the_level_and_the_batch_and_nothing_else(whole: Evaluation) -> None:
    alone = run(attacks=parse_attacks(["pgd3"]), levels=(0, 1, 2))
    np.testing.assert_array_equal(whole.at("pgd3", 2).loss, alone.at("pgd3", 2).loss)
    same_images = [EvaluationBatch([str(n)], lambda: load(0, size=1)) for n in range(2)]
    first, again, other = (evaluate(same_images, ATTACKS, (0, 2), seed=s).at("pgd3", 2).loss for s in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).all()
    assert first[0] != first[1]
    # One of them can be repeated for pictures.
    repeated, elsewhere = (attack_batch(load(2), ATTACKS, "pgd3", 2, number=n, seed=3).images for n in (2, 1))
    scores = load(2).score(repeated)
    np.testing.assert_array_equal(scores["boxes"].numpy(), run(seed=3).scores("pgd3", 2)["boxes"][6:9])
    assert not torch.equal(repeated, elsewhere)
    # Without a gradient an attack stays where it starts: another direction at every level, not one scaled.
    flat = LoadedBatch(torch.zeros(1, 1, 3, 4), lambda x: 0 * x.flatten(1).sum(1, keepdim=True), lambda x: {"x": x})
    low, high = (attack_batch(flat, ATTACKS, "pgd3", level, number=0).images.flatten() for level in (1, 2))
    assert torch.cosine_similarity(low, high, dim=0) < 0.9


def test_a_killed_run_resumes_to_identical_numbers(tmp_path: Path, whole: Evaluation) -> None:
    loaded: list[int] = []

    def killed(number: int) -> None:
        if number == 2:
            raise KeyboardInterrupt
        loaded.append(number)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, killed)
    assert list(parts(tmp_path)) == ["batch_00000.npz", "batch_00001.npz"]
    resumed = run(tmp_path, loaded.append)
    finished = run(tmp_path)
    assert loaded == [0, 1, 0, 1, 2, 3], "what is finished is loaded to be compared"
    assert_identical(resumed, whole)
    assert_identical(finished, whole)
    assert finished.at("pgd3", 2).seconds == resumed.at("pgd3", 2).seconds
    # In another order the attacks are the same configuration.
    seen: list[str] = []
    turned = run(tmp_path, progress=lambda *step: seen.append(step[2]), attacks=dict(reversed(ATTACKS.items())))
    assert seen == ["finished earlier"] * 4
    for key, condition in whole.attacked.items():
        np.testing.assert_array_equal(condition.loss, turned.attacked[key].loss)
    seconds = 0.0
    for path in (tmp_path / "parts").iterdir():
        with np.load(path, allow_pickle=False) as part:  # no pickles
            assert part["pgd3@2.0/score/boxes"].shape == (3, 2, 3)
            assert '"fingerprint": "model"' in str(part["configuration"])
            seconds += float(part["pgd3@2.0/seconds"])
    assert finished.at("pgd3", 2).seconds == pytest.approx(seconds)


def test_a_kill_while_writing_leaves_no_part(
    tmp_path: Path, whole: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(file: Any, **arrays: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez_compressed", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    assert not list((tmp_path / "parts").glob("*.npz"))
    assert_identical(run(tmp_path), whole)
    assert not list((tmp_path / "parts").glob("*.tmp"))


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:200] + b"?" * 40 + b[240:]])
def test_a_damaged_part_is_measured_again(
    tmp_path: Path, whole: Evaluation, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path)
    part = tmp_path / "parts" / "batch_00001.npz"
    part.write_bytes(damage(part.read_bytes()))
    loaded: list[int] = []
    with caplog.at_level(logging.WARNING):
        assert_identical(run(tmp_path, loaded.append), whole)
    assert sorted(loaded) == [0, 1, 2, 3]
    assert "batch_00001.npz is damaged" in caplog.text


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed 0, now 1"),
        ({"fingerprint": "other"}, 'fingerprint "model", now "other"'),
        ({"bounds": (-9.0, 9.0)}, r"bounds null, now \[-9.0, 9.0\]"),
        ({"levels": (0, 1)}, r"levels \[0.0, 0.5, 2.0\], now \[0.0, 1.0\]"),
        ({"attacks": parse_attacks(["pgd3"])}, "attacks"),
        ({"batches": [EvaluationBatch(["a", "b", "c"], lambda: load(0))]}, "ids"),
        ({"packages": ["numpy"]}, "versions numpy null, now"),
    ],
)
def test_another_configuration_is_refused_and_nothing_is_touched(
    tmp_path: Path, change: Mapping[str, Any], named: str
) -> None:
    # The first part is missing: it must not be filled before the second is seen to be of another configuration.
    run(tmp_path)
    if "batches" not in change:
        (tmp_path / "parts" / "batch_00000.npz").unlink()
    before = parts(tmp_path)
    with pytest.raises(ValueError, match=f"another configuration: {named}"):
        run(tmp_path, **change)
    assert parts(tmp_path) == before


def test_a_difference_is_named_inside_of_a_commands_fingerprint(tmp_path: Path) -> None:
    before, now = ({"checkpoint": "c" * 64, "truth": {"labels": labels}} for labels in ("old", "new"))
    run(tmp_path, fingerprint=json.dumps(before))
    with pytest.raises(ValueError, match=r'configuration: fingerprint truth labels "old", now "new"\. Choose'):
        run(tmp_path, fingerprint=json.dumps(now))


def test_other_code_of_the_attacks_is_another_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(tmp_path).configuration
    assert re.fullmatch("[0-9a-f]{12}", first["attack_code"])
    assert first["versions"] == {"advmed": advmed.__version__, "torch": str(torch.__version__)}
    monkeypatch.setattr(loop, "_code", lambda: "0" * 12)
    with pytest.raises(ValueError, match=r'attack_code "[0-9a-f]+", now "000000000000"'):
        run(tmp_path)


@pytest.mark.parametrize("what", ["images", "targets"])
def test_other_images_or_targets_under_the_same_ids_are_refused(tmp_path: Path, what: str) -> None:
    """One pixel and one label changed after the first run, in a batch that it had finished."""

    def changed(number: int) -> LoadedBatch:
        batch = replace(load(number), targets=[torch.tensor([0, 1, 2])])
        if altered and number == 1:
            batch = replace(batch, images=batch.images * 1.0) if what == "images" else batch
            (batch.images[0, 0, 0] if what == "images" else batch.targets[0])[0] += 1
        return batch

    data = [EvaluationBatch([f"{n}/{k}" for k in range(3)], lambda n=n: changed(n)) for n in range(3)]
    altered = False
    run(tmp_path, batches=data)
    (tmp_path / "parts" / "batch_00000.npz").unlink()  # it must not be filled before the other is looked at
    before = parts(tmp_path)
    altered = True
    with pytest.raises(ValueError, match=rf"batch_00001\.npz was measured on other {what} than those of 1/0, 1/1, 1/2"):
        run(tmp_path, batches=data)
    assert parts(tmp_path) == before


IMAGES = torch.randn(2, 1, 3, 4, generator=torch.Generator().manual_seed(0))


def broken(value: float) -> Tensor:
    images = IMAGES.clone()
    images[1, 0, 0, 0] = value
    return images


def boxes(count: int) -> EvaluationBatch:
    return EvaluationBatch([str(count)], lambda: LoadedBatch(
        torch.zeros(1, 1, 3, 4), Logistic(torch.ones(1)), lambda x: {"b": x.new_zeros(1, count)}
    ))  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batches": one(broken(math.nan))}, r"NaN or infinite.*of second$"),
        ({"batches": one(broken(-math.inf))}, r"NaN or infinite.*of second$"),
        ({"batches": one(torch.randn(3, 1, 3, 4))}, r"B = 2 as there are ids, got torch.float32 of shape \(3, 1, 3, 4"),
        ({"batches": one(IMAGES.long())}, r"floating point.*torch\.int64"),
        ({"batches": one(IMAGES, lambda x: {"m": x.mean()})}, r"dimension is B = 2, got shapes \{'m': \(\)\}"),
        ({"batches": one(IMAGES, lambda x: {})}, "first dimension is B = 2"),
        ({"batches": one(IMAGES) * 2}, "unique, got first, second more than once"),
        ({"batches": []}, "one or more batches"),
        ({"attacks": {}}, "one or more attacks"),
        ({"folder": Path("never_made"), "fingerprint": ""}, "needs a fingerprint"),
        ({"levels": (1, 2), "batches": batches(on_load=pytest.fail)}, "start at 0"),
        ({"batches": [boxes(4), boxes(5)]}, r"'b' must have the same shape .* pad it"),
    ],
)
def test_what_cannot_be_evaluated(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(**{"batches": one(IMAGES), **changes})


def test_nonfinite_gradients_are_counted() -> None:
    def terms(images: Tensor) -> Tensor:
        # sqrt has no finite slope at 0: the second image, all zeros, never gets a gradient.
        return images.flatten(1).abs().sum(1, keepdim=True).sqrt()

    images = torch.stack([torch.ones(1, 2, 2), torch.zeros(1, 2, 2)])
    batch = LoadedBatch(images, terms, lambda x: {"sum": x.sum((1, 2, 3))})
    result = evaluate([EvaluationBatch(["good", "bad"], lambda: batch)], parse_attacks(["ifgsm4"]), (0, 1))
    condition = result.at("ifgsm4", 1)
    assert condition.nonfinite.tolist() == [0, 4]
    assert condition.norm.tolist() == [pytest.approx(1), 0]
    assert condition.scores["sum"].tolist() == [pytest.approx(6), 0]


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5), nn.Flatten(), nn.Linear(4, 1))

    class OfModel:
        def __init__(self) -> None:
            self.model = model

        def __call__(self, images: Tensor) -> Tensor:
            return model(images) ** 2

    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    batch = LoadedBatch(IMAGES, OfModel(), lambda x: {"y": model(x)})
    run(batches=[EvaluationBatch(["a", "b"], lambda: batch)])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_only_one_batch_is_alive() -> None:
    alive: list[weakref.ref[Tensor]] = []

    def loader(number: int) -> LoadedBatch:
        gc.collect()
        assert all(images() is None for images in alive)
        batch = load(number)
        alive.append(weakref.ref(batch.images))
        return batch

    run(batches=[EvaluationBatch([f"{n}{k}" for k in range(3)], lambda n=n: loader(n)) for n in range(3)])
    assert len(alive) == 3


def test_scores_are_copies_and_no_less_than_float32() -> None:
    buffer = torch.zeros(2)

    def score(images: Tensor) -> dict[str, Tensor]:
        buffer.copy_(images.flatten(1).sum(1))
        return {"sum": buffer}

    np.testing.assert_allclose(run(batches=one(IMAGES, score)).clean.scores["sum"], IMAGES.flatten(1).sum(1))
    half = run(batches=one(torch.ones(2, 1, 3, 4), lambda x: {"s": x.flatten(1).sum(1).bfloat16()})).clean.scores["s"]
    assert half.dtype == np.float32
    assert half.tolist() == [12, 12]


def test_progress_counts_passes_and_finished_batches(tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    run(batches=batches(2), progress=lambda *step: seen.append(step))
    assert [done for done, _, _ in seen] == list(range(1, 11))
    assert {total for _, total, _ in seen} == {10}
    passes = ["clean at 0", "pgd3 at 0.5", "pgd3 at 2", "ifgsm2 at 0.5", "ifgsm2 at 2"]
    assert [text for _, _, text in seen[:5]] == passes
    run(tmp_path, batches=batches(1))
    seen.clear()
    run(tmp_path, batches=batches(2), progress=lambda *step: seen.append(step))
    assert [done for done, _, _ in seen] == [5, *range(6, 11)], "what is finished is compared, which takes a while, too"
    assert seen[0] == (5, 10, "finished earlier")


def test_pictures_of_all_levels_keep_to_the_range_of_images() -> None:
    batch = load(2)
    low, high = float(batch.images.min()), float(batch.images.max())
    (zero, clean), *attacked = at_levels(batch, ATTACKS["pgd3"], (0.5, 2), bounds=(low, high))
    assert zero == 0 and clean is batch.images
    assert [level for level, _ in attacked] == [0.5, 2]
    for (level, images), (_, free) in zip(attacked, [*at_levels(batch, ATTACKS["pgd3"], (0.5, 2))][1:], strict=True):
        norms = (images - clean).flatten(1).norm(dim=1)
        assert (norms > 0.1 * level).all() and (norms <= level * (1 + 1e-5)).all()
        assert (images.min() >= low, images.max() <= high) == (True, True)
        assert free.min() < low or free.max() > high  # without bounds they leave it

"""The evaluation loop: right numbers, the same after a kill, and clear refusals."""

from __future__ import annotations

import gc
import logging
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from advmed.attacks import PGD
from advmed.attacks.names import parse_attacks
from advmed.evaluation.loop import Evaluation, EvaluationBatch, LoadedBatch, attack_batch, evaluate

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
    count: int = 4, on_load: Callable[[int], None] = lambda number: None, kind: type[Logistic] = Bumpy
) -> list[EvaluationBatch]:
    def loader(number: int) -> Callable[[], LoadedBatch]:
        def make() -> LoadedBatch:
            on_load(number)
            return load(number, kind=kind)

        return make

    return [EvaluationBatch([f"case_{number}/{k}" for k in range(3)], loader(number)) for number in range(count)]


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


def test_attack_names() -> None:
    attacks = parse_attacks(["pgd100", "ifgsm10", "pgd20x3"])
    assert attacks == {
        "pgd100": PGD(100, 5.0, random_start=1.0, keep="best"),
        "ifgsm10": PGD(10, 1.0, random_start=0.0, keep="best"),
        "pgd20x3": PGD(20, 5.0, random_start=1.0, restarts=3, keep="best"),
    }
    assert parse_attacks(["pgd5"], norm=math.inf)["pgd5"].norm == math.inf


@pytest.mark.parametrize("name", ["", "pgd", "pgd0", "pgd10x0", "ifgsm10x3", "PGD10", "pgd10 ", "cw10"])
def test_unknown_attack_names(name: str) -> None:
    with pytest.raises(ValueError, match=r"unknown attack .*for example pgd100"):
        parse_attacks([name])


def test_attack_given_twice() -> None:
    with pytest.raises(ValueError, match="'pgd5' is given twice"):
        parse_attacks(["pgd5", "pgd5"])


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


def test_result_is_in_the_order_of_the_batches() -> None:
    result = evaluate(batches(), ATTACKS, LEVELS)
    assert result.ids == tuple(f"case_{number}/{k}" for number in range(4) for k in range(3))
    assert result.scores("pgd3", 2)["boxes"].shape == (12, 2, 3)
    assert result.scores("pgd3", 0) is result.scores("ifgsm2", 0) is result.clean.scores
    assert list(result.attacked) == [("pgd3", 0.5), ("pgd3", 2), ("ifgsm2", 0.5), ("ifgsm2", 2)]
    with pytest.raises(KeyError, match=r"pgd3 at level 1 was not evaluated.*0 0\.5 2"):
        result.at("pgd3", 1)
    with pytest.raises(KeyError, match="attacks pgd3, ifgsm2"):
        result.scores("pgd4", 0)


def test_numbers_do_not_depend_on_what_else_is_evaluated() -> None:
    everything = evaluate(batches(), ATTACKS, (0, 0.5, 1, 2))
    alone = evaluate(batches(), parse_attacks(["pgd3"]), (0, 2))
    np.testing.assert_array_equal(everything.at("pgd3", 2).loss, alone.at("pgd3", 2).loss)


def test_random_starts_follow_the_seed_the_level_and_the_batch() -> None:
    def losses(seed: int) -> Any:
        same_images = [EvaluationBatch([str(n)], lambda: load(0, size=1)) for n in range(2)]
        return evaluate(same_images, ATTACKS, (0, 2), seed=seed).at("pgd3", 2).loss

    first, again, other = losses(0), losses(0), losses(1)
    np.testing.assert_array_equal(first, again)
    assert (first != other).all()
    assert first[0] != first[1]

    # Without a gradient an attack stays where it starts: another direction at every level, not one scaled.
    flat = LoadedBatch(torch.zeros(1, 1, 3, 4), lambda x: 0 * x.flatten(1).sum(1, keepdim=True), lambda x: {"x": x})
    low, high = (attack_batch(flat, ATTACKS, "pgd3", level, number=0).images.flatten() for level in (1, 2))
    assert torch.cosine_similarity(low, high, dim=0) < 0.9


def test_a_killed_run_resumes_to_identical_numbers(tmp_path: Path) -> None:
    loaded: list[int] = []

    def killed(number: int) -> None:
        if number == 2:
            raise KeyboardInterrupt
        loaded.append(number)

    with pytest.raises(KeyboardInterrupt):
        evaluate(batches(on_load=killed), ATTACKS, LEVELS, folder=tmp_path, fingerprint="model")
    assert [path.name for path in sorted((tmp_path / "parts").iterdir())] == ["batch_00000.npz", "batch_00001.npz"]
    resumed = evaluate(batches(on_load=loaded.append), ATTACKS, LEVELS, folder=tmp_path, fingerprint="model")
    assert loaded == [0, 1, 2, 3]
    finished = evaluate(batches(on_load=loaded.append), ATTACKS, LEVELS, folder=tmp_path, fingerprint="model")
    assert loaded == [0, 1, 2, 3]
    whole = evaluate(batches(), ATTACKS, LEVELS, fingerprint="model")
    assert_identical(resumed, whole)
    assert_identical(finished, whole)
    assert finished.at("pgd3", 2).seconds == resumed.at("pgd3", 2).seconds


def test_a_kill_while_writing_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(file: Any, **arrays: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez_compressed", killed)
        with pytest.raises(KeyboardInterrupt):
            evaluate(batches(), ATTACKS, LEVELS, folder=tmp_path, fingerprint="model")
    assert not list((tmp_path / "parts").glob("*.npz"))
    resumed = evaluate(batches(), ATTACKS, LEVELS, folder=tmp_path, fingerprint="model")
    assert_identical(resumed, evaluate(batches(), ATTACKS, LEVELS, fingerprint="model"))
    assert not list((tmp_path / "parts").glob("*.tmp"))


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:200] + b"?" * 40 + b[240:]])
def test_a_damaged_part_is_measured_again(
    tmp_path: Path, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    whole = evaluate(batches(), ATTACKS, LEVELS, folder=tmp_path, fingerprint="model")
    part = tmp_path / "parts" / "batch_00001.npz"
    part.write_bytes(damage(part.read_bytes()))
    loaded: list[int] = []
    with caplog.at_level(logging.WARNING):
        mended = evaluate(batches(on_load=loaded.append), ATTACKS, LEVELS, folder=tmp_path, fingerprint="model")
    assert loaded == [1]
    assert "batch_00001.npz is damaged" in caplog.text
    assert_identical(mended, whole)


def test_attacks_in_another_order_are_the_same_configuration(tmp_path: Path) -> None:
    first = evaluate(batches(), ATTACKS, LEVELS, folder=tmp_path, fingerprint="model")
    turned = dict(reversed(ATTACKS.items()))
    second = evaluate(batches(on_load=pytest.fail), turned, LEVELS, folder=tmp_path, fingerprint="model")
    for key, condition in first.attacked.items():
        np.testing.assert_array_equal(condition.loss, second.attacked[key].loss)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed 0, now 1"),
        ({"fingerprint": "other"}, 'fingerprint "model", now "other"'),
        ({"bounds": (-9.0, 9.0)}, r"bounds null, now \[-9.0, 9.0\]"),
        ({"levels": (0, 1)}, r"levels \[0.0, 0.5, 2.0\], now \[0.0, 1.0\]"),
        ({"attacks": parse_attacks(["pgd3"])}, "attacks"),
        ({"batches": [EvaluationBatch(["a", "b", "c"], lambda: load(0))]}, "ids"),
    ],
)
def test_another_configuration_is_refused_and_nothing_is_touched(
    tmp_path: Path, change: Mapping[str, Any], named: str
) -> None:
    # The second part is missing: it must not be filled before the third is seen to be of another configuration.
    settings: dict[str, Any] = {"batches": batches(), "attacks": ATTACKS, "levels": LEVELS, "fingerprint": "model"}
    evaluate(**settings, folder=tmp_path)
    if "batches" not in change:
        (tmp_path / "parts" / "batch_00000.npz").unlink()
    before = {path.name: path.read_bytes() for path in (tmp_path / "parts").iterdir()}
    with pytest.raises(ValueError, match=f"another configuration: {named}"):
        evaluate(**{**settings, **change}, folder=tmp_path)
    assert {path.name: path.read_bytes() for path in (tmp_path / "parts").iterdir()} == before


def test_parts_hold_no_pickles(tmp_path: Path) -> None:
    evaluate(batches(1), ATTACKS, LEVELS, folder=tmp_path, fingerprint="model")
    with np.load(tmp_path / "parts" / "batch_00000.npz", allow_pickle=False) as part:
        assert part["pgd3@2.0/score/boxes"].shape == (3, 2, 3)
        assert '"fingerprint": "model"' in str(part["configuration"])


def test_bounds_hold() -> None:
    def positive() -> LoadedBatch:
        images = torch.rand(2, 1, 3, 4)
        return LoadedBatch(
            images, Logistic(torch.ones(2)), lambda x: {"low": x.amin((1, 2, 3)), "high": x.amax((1, 2, 3))}
        )

    result = evaluate([EvaluationBatch(["a", "b"], positive)], ATTACKS, LEVELS, bounds=(0, 1))
    for condition in result.attacked.values():
        assert (condition.scores["low"] >= 0).all()
        assert (condition.scores["high"] <= 1).all()
        assert (condition.norm > 0).all()


@pytest.mark.parametrize("levels", [(), (0,), (1, 2), (0, 2, 1), (0, -1), (0, math.nan)])
def test_bad_levels(levels: Sequence[float], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="start at 0"):
        evaluate(batches(on_load=pytest.fail), ATTACKS, levels, folder=tmp_path, fingerprint="model")
    assert not list(tmp_path.iterdir())


def one(images: Tensor, score: Callable[[Tensor], Any] | None = None) -> list[EvaluationBatch]:
    scored = LoadedBatch(images, Logistic(torch.ones(len(images))), score or (lambda x: {"sum": x.flatten(1).sum(1)}))
    return [EvaluationBatch(["first", "second"], lambda: scored)]


def test_bad_batches() -> None:
    images = torch.randn(2, 1, 3, 4)
    broken = images.clone()
    broken[1, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"NaN or infinite.*of second$"):
        evaluate(one(broken), ATTACKS, LEVELS)
    with pytest.raises(ValueError, match=r"B = 2 as there are ids, got torch.float32 of shape \(3, 1, 3, 4\)"):
        evaluate(one(torch.randn(3, 1, 3, 4)), ATTACKS, LEVELS)
    with pytest.raises(ValueError, match=r"floating point.*torch\.int64"):
        evaluate(one(images.long()), ATTACKS, LEVELS)
    with pytest.raises(ValueError, match=r"first dimension is B = 2, got shapes \{'mean': \(\)\}"):
        evaluate(one(images, lambda x: {"mean": x.mean()}), ATTACKS, LEVELS)
    with pytest.raises(ValueError, match="first dimension is B = 2"):
        evaluate(one(images, lambda x: {}), ATTACKS, LEVELS)
    with pytest.raises(ValueError, match="unique, got first, second more than once"):
        evaluate(one(images) * 2, ATTACKS, LEVELS)
    with pytest.raises(ValueError, match="one or more batches"):
        evaluate([], ATTACKS, LEVELS)
    with pytest.raises(ValueError, match="one or more attacks"):
        evaluate(one(images), {}, LEVELS)
    with pytest.raises(ValueError, match="needs a fingerprint"):
        evaluate(one(images), ATTACKS, LEVELS, folder=Path("never_made"))


def test_scores_of_differing_shape_are_named() -> None:
    def boxes(count: int) -> Callable[[], LoadedBatch]:
        return lambda: LoadedBatch(
            torch.zeros(1, 1, 3, 4), Logistic(torch.ones(1)), lambda x: {"b": x.new_zeros(1, count)}
        )

    with pytest.raises(ValueError, match=r"'b' must have the same shape .* pad it"):
        evaluate([EvaluationBatch([str(n)], boxes(n)) for n in (4, 5)], ATTACKS, LEVELS)


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
    batch = LoadedBatch(
        torch.randn(2, 1, 3, 4, generator=torch.Generator().manual_seed(0)), OfModel(), lambda x: {"y": model(x)}
    )
    evaluate([EvaluationBatch(["a", "b"], lambda: batch)], ATTACKS, LEVELS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_only_one_batch_is_alive() -> None:
    alive: list[weakref.ref[Tensor]] = []

    def make(number: int) -> Callable[[], LoadedBatch]:
        def loader() -> LoadedBatch:
            gc.collect()
            assert all(images() is None for images in alive)
            batch = load(number)
            alive.append(weakref.ref(batch.images))
            return batch

        return loader

    evaluate([EvaluationBatch([f"{n}{k}" for k in range(3)], make(n)) for n in range(3)], ATTACKS, LEVELS)
    assert len(alive) == 3


def test_scores_are_copies() -> None:
    buffer = torch.zeros(2)

    def score(images: Tensor) -> dict[str, Tensor]:
        buffer.copy_(images.flatten(1).sum(1))
        return {"sum": buffer}

    images = torch.randn(2, 1, 3, 4)
    result = evaluate(one(images, score), ATTACKS, LEVELS)
    np.testing.assert_allclose(result.clean.scores["sum"], images.flatten(1).sum(1))


def test_half_precision_scores() -> None:
    result = evaluate(one(torch.ones(2, 1, 3, 4), lambda x: {"s": x.flatten(1).sum(1).bfloat16()}), ATTACKS, LEVELS)
    assert result.clean.scores["s"].dtype == np.float32
    assert result.clean.scores["s"].tolist() == [12, 12]


def test_progress_counts_passes_and_skips_finished_ones(tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    evaluate(batches(2), ATTACKS, LEVELS, progress=lambda *step: seen.append(step))
    assert [done for done, _, _ in seen] == list(range(1, 11))
    assert {total for _, total, _ in seen} == {10}
    assert [text for _, _, text in seen[:5]] == [
        "clean at 0",
        "pgd3 at 0.5",
        "pgd3 at 2",
        "ifgsm2 at 0.5",
        "ifgsm2 at 2",
    ]
    evaluate(batches(1), ATTACKS, LEVELS, folder=tmp_path, fingerprint="model")
    seen.clear()
    evaluate(
        batches(2), ATTACKS, LEVELS, folder=tmp_path, fingerprint="model", progress=lambda *step: seen.append(step)
    )
    assert [done for done, _, _ in seen] == list(range(6, 11))


def test_an_attack_can_be_repeated_for_pictures() -> None:
    result = evaluate(batches(), ATTACKS, LEVELS, seed=3)
    again = attack_batch(load(2), ATTACKS, "pgd3", 2, number=2, seed=3)
    scores = load(2).score(again.images)
    np.testing.assert_array_equal(scores["boxes"].numpy(), result.scores("pgd3", 2)["boxes"][6:9])
    other = attack_batch(load(2), ATTACKS, "pgd3", 2, number=1, seed=3)
    assert not torch.equal(again.images, other.images)

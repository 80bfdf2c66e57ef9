"""Thresholds from a finished standard training: measured, found, chosen, and logged."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from adv_nnunet import calibration as standard
from advmed.thresholds import RunningThresholds, Thresholds, sha256


def write(path: Path, *values: float, names: tuple[str, ...] = ("ce+dice",)) -> Path:
    Thresholds(values, names, rule="mean").save(path)
    return path


# --- which of the three it was ---------------------------------------------------------------------------------------


def test_a_file_that_the_settings_name(bench: Any, with_stock: Path) -> None:
    path = write(bench.folder / "mine.json", 0.125)
    write(with_stock / standard.FILE, 9.0)  # named beats found
    trainer = bench.make("AMAT", thresholds=str(path))
    trainer.on_train_start()
    assert trainer.method.thresholds.values == (0.125,)
    assert f"Thresholds from the file {path}: ce+dice < 0.125" in bench.log(trainer)
    assert trainer.run.warmup_epochs == 0


def test_a_file_beside_the_standard_training(bench: Any, with_stock: Path) -> None:
    path = write(with_stock / standard.FILE, 0.25)
    trainer = bench.make("AMAT")
    trainer.on_train_start()
    assert trainer.method.thresholds.values == (0.25,)
    assert f"Thresholds from the file {path} (found beside the standard training)" in bench.log(trainer)
    assert trainer.run.warmup_epochs == 0


def test_made_from_the_finished_standard_training(bench: Any, with_stock: Path) -> None:
    trainer = bench.make("AMAT", threshold_samples=30)
    trainer.on_train_start()
    log, path = bench.log(trainer), with_stock / standard.FILE
    assert f"Thresholds are measured on the standard training {with_stock / standard.CHECKPOINT}" in log
    assert "mean Dice of that network on clean training samples" in log
    assert f"written to {path}" in log
    found = Thresholds.load(path)
    assert trainer.method.thresholds == found
    assert found.n == 32  # whole batches of four
    assert found.source == str(with_stock / standard.CHECKPOINT)
    assert found.source_sha256 == sha256(with_stock / standard.CHECKPOINT)
    assert found.notes["configuration"] == "2d"
    assert found.notes["absent_classes"] == "skip"
    # The next training finds the file.
    again = bench.make("AMAT", tag="again")
    again.on_train_start()
    assert "found beside the standard training" in bench.log(again)
    assert "Delete the file" not in bench.log(again)
    assert again.method.thresholds == found


def test_self_calibrated(bench: Any) -> None:
    trainer = bench.make("AMAT", epochs=20)
    trainer.on_train_start()
    assert isinstance(trainer.method.thresholds, RunningThresholds)
    assert "Thresholds are self-calibrated: a clean warm-up first" in bench.log(trainer)
    assert trainer.run.warmup_epochs == 2  # a tenth
    assert "2 epoch(s) of clean warm-up" in bench.log(trainer)


def test_an_unfinished_standard_training_does_not_count(bench: Any, with_stock: Path) -> None:
    (with_stock / standard.CHECKPOINT).rename(with_stock / "checkpoint_latest.pth")
    trainer = bench.make("AMAT")
    trainer.on_train_start()
    assert "self-calibrated" in bench.log(trainer)


@pytest.mark.parametrize(
    "change", [{"fold": 1}, {"configuration": "3d_fullres"}, {"std_trainer": "nnUNetTrainerNoMirroring"}], ids=str
)
def test_a_standard_training_of_something_else_does_not_count(bench: Any, with_stock: Path, change: dict) -> None:
    write(with_stock / standard.FILE, 0.25)
    trainer = bench.make("AMAT", **change)
    trainer.on_train_start()
    assert "self-calibrated" in bench.log(trainer)


def test_our_own_standard_trainer_serves_too(bench: Any) -> None:
    """The schedule of the settings trains nnUNetTrainerSTD; its network is a standard one."""
    bench.make("STD").run_training()
    trainer = bench.make("AMAT", threshold_samples=8)
    trainer.on_train_start()
    assert "nnUNetTrainerSTD__tiny__2d" in trainer.method.thresholds.source
    assert "measured on the standard training" in bench.log(trainer)


def test_a_tagged_trainer_finds_the_same_standard_training(bench: Any, with_stock: Path) -> None:
    write(with_stock / standard.FILE, 0.25)
    trainer = bench.make("AMAT", tag="x")
    trainer.on_train_start()
    assert trainer.method.thresholds.values == (0.25,)


# --- the warm-up of self-calibration ---------------------------------------------------------------------------------


def test_the_warm_up_measures_the_clean_terms(bench: Any) -> None:
    trainer = bench.make("AMAT", epochs=4, warmup_epochs=1)
    batches = bench.batches(trainer, 8)
    trainer.initialize = lambda: None
    bench.feed(trainer, batches, bench.batches(trainer, 1))
    expected = []

    def record(step: Any) -> Any:
        def wrapped(batch: dict[str, Any]) -> Any:
            if trainer.current_epoch == 0:
                with torch.no_grad():
                    expected.append(trainer.terms(trainer.network(batch["data"]), batch["target"]).double())
            return step(batch)

        return wrapped

    trainer.train_step = record(trainer.train_step)
    trainer.run_training()
    # The statistics fade with a memory of one epoch: two batches of weights exp(-4 / 8) and 1.
    weight = math.exp(-4 / 8)
    first, second = (rows.mean().item() for rows in expected)
    ceiling = trainer.method.thresholds.state_dict()["ceiling"]
    assert ceiling == pytest.approx([(weight * first + second) / (weight + 1)], rel=1e-5)
    assert f"Warm-up done. Thresholds: ce+dice < {ceiling[0]:.6g}" in bench.log(trainer)
    assert trainer.method.thresholds.current().values[0] <= ceiling[0]
    assert sum(trainer.method.margins.visits().tolist()) == 3 * 2 * 4  # not in the warm-up
    # Every batch of warm-up and training is taken in once.
    assert trainer.method.thresholds.statistics.n == pytest.approx(4 * sum(weight**k for k in range(8)))


# --- the measurement -------------------------------------------------------------------------------------------------


def test_the_measured_mean_is_that_of_the_samples(
    bench: Any, with_stock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: the same draws through the same network in evaluation mode."""
    trainer = bench.make("AMAT", threshold_samples=12, terms="separate", rule="mean+2std")
    trainer.initialize()
    rows = []

    class Spy(standard.SampleTerms):
        def __call__(self, outputs: Any, targets: Any) -> Any:
            rows.append(super().__call__(outputs, targets))
            return rows[-1]

    monkeypatch.setattr(standard, "SampleTerms", Spy)
    found = standard.measure(trainer, with_stock / standard.CHECKPOINT)
    values = torch.cat(rows).double().numpy()
    assert values.shape == (12, 2)
    assert found.names == ("ce", "dice")
    assert found.mean == pytest.approx(values.mean(0), rel=1e-6)
    assert found.std == pytest.approx(values.std(0), rel=1e-5)
    assert found.values == pytest.approx(values.mean(0) + 2 * values.std(0), rel=1e-5)
    assert 0 <= found.notes["training_dice"] <= 1
    json.dumps(dict(found.notes))


def test_the_measurement_is_repeatable_and_leaves_random_states_alone(bench: Any, with_stock: Path) -> None:
    trainer = bench.make("AMAT", threshold_samples=12)
    trainer.initialize()
    before = np.random.get_state()[1].copy(), torch.get_rng_state(), {k: v.clone() for k, v in _weights(trainer)}
    first = standard.measure(trainer, with_stock / standard.CHECKPOINT)
    assert np.array_equal(np.random.get_state()[1], before[0])
    assert all(torch.equal(value, before[2][name]) for name, value in _weights(trainer))
    np.random.seed(99)
    assert standard.measure(trainer, with_stock / standard.CHECKPOINT) == first
    assert standard.measure(trainer, with_stock / standard.CHECKPOINT, seed=1) != first


def _weights(trainer: Any) -> Any:
    return trainer.network.state_dict().items()


@pytest.mark.parametrize("dataset", ["regions_ignore", "two_channels"])
def test_measuring_other_kinds_of_data(bench: Any, dataset: str) -> None:
    stock = bench.make(nnUNetTrainer, dataset=dataset)
    stock.num_epochs = stock.num_iterations_per_epoch = stock.num_val_iterations_per_epoch = 1
    stock.run_training()
    trainer = bench.make("AMAT", dataset=dataset, threshold_samples=8)
    trainer.on_train_start()
    assert math.isfinite(trainer.method.thresholds.values[0])
    assert "measured on the standard training" in bench.log(trainer)


# --- a file that does not belong to this training any more -----------------------------------------------------------


@pytest.mark.parametrize(("rule", "expected"), [("mean", 0.5), ("mean+2std", 0.7), (None, 0.6)])
def test_the_rule_of_the_settings_is_applied_to_a_found_file(
    bench: Any, with_stock: Path, rule: str | None, expected: float
) -> None:
    """The file keeps mean and std; without a rule in the settings, its own holds."""
    found = Thresholds((0.6,), ("ce+dice",), rule="mean+1std", mean=(0.5,), std=(0.1,), n=10)
    found.save(with_stock / standard.FILE)
    trainer = bench.make("AMAT", **({"rule": rule} if rule else {}))
    trainer.on_train_start()
    assert trainer.method.thresholds.values == pytest.approx((expected,))
    said = f"by the rule {rule} of the settings instead of the file's" in bench.log(trainer)
    assert said == (rule is not None)


def test_a_rule_for_a_file_of_bare_values(bench: Any, with_stock: Path) -> None:
    Thresholds((0.5,), ("ce+dice",)).save(with_stock / standard.FILE)
    trainer = bench.make("AMAT", rule="mean+2std")
    with pytest.raises(ValueError, match="hold no mean and std that the rule 'mean\\+2std' could be applied to"):
        trainer.on_train_start()


def test_a_found_file_of_an_older_standard_training_is_not_taken_silently(bench: Any, with_stock: Path) -> None:
    """The fold was trained anew, and the file beside it speaks of the network before."""
    found = Thresholds((0.5,), ("ce+dice",), "mean", (0.5,), (0.1,), 10, "checkpoint", "0" * 64)
    found.save(with_stock / standard.FILE)
    trainer = bench.make("AMAT")
    trainer.on_train_start()
    assert "was made of another checkpoint than the checkpoint_final.pth beside it. Delete" in bench.log(trainer)


# --- training that starts from the standard weights ------------------------------------------------------------------


@pytest.mark.parametrize("how", ["standard", "path"])
def test_start_from_the_standard_training(bench: Any, with_stock: Path, how: str) -> None:
    source = with_stock / standard.CHECKPOINT
    write(with_stock / standard.FILE, 0.25)
    trainer = bench.make("AMAT", start_from="standard" if how == "standard" else str(source))
    trainer.on_train_start()
    weights = torch.load(source, weights_only=False)["network_weights"]
    assert all(torch.equal(value, weights[name]) for name, value in _weights(trainer))
    assert f"Starting from the weights of {source}" in bench.log(trainer)


def test_a_resumed_training_starts_from_its_own_weights(bench: Any, with_stock: Path) -> None:
    first = bench.make("AMAT", start_from="standard", threshold_samples=4)
    first.run_training()
    path = Path(first.output_folder) / "checkpoint_final.pth"
    again = bench.make("AMAT", start_from="standard", resume=True)
    again.load_checkpoint(str(path))
    again.on_train_start()
    weights = torch.load(path, weights_only=False)["network_weights"]
    assert all(torch.equal(value, weights[name]) for name, value in _weights(again))


def test_continue_without_a_checkpoint_starts_from_the_standard_weights(bench: Any, with_stock: Path) -> None:
    """nnUNetv2_train --c with nothing to continue warns and trains from the start, which is where the settings say."""
    trainer = bench.make("AMAT", start_from="standard", threshold_samples=4, resume=True)
    trainer.on_train_start()
    weights = torch.load(with_stock / standard.CHECKPOINT, weights_only=False)["network_weights"]
    assert all(torch.equal(value, weights[name]) for name, value in _weights(trainer))

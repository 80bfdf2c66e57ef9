"""What we take for granted in nnU-Net. A release that breaks one of these breaks us, perhaps without an error.

Assumptions about the loader are in test_loader.py; that ``train_step`` is what ours repeats, in test_trainer.py.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian, compute_steps_for_sliding_window
from nnunetv2.paths import nnUNet_results
from nnunetv2.run import run_training
from nnunetv2.training.logging.nnunet_logger import LocalLogger, MetaLogger
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from adv_nnunet import host
from adv_nnunet.trainer import AdversarialTraining


@pytest.mark.parametrize(
    ("function", "pieces"),
    [
        # Plans say whether a training is continued.
        (run_training.get_trainer_from_args, 'plans["continue_training"] = continue_training'),
        (nnUNetTrainer.__init__, 'plans.pop("continue_training")'),
        # The schedule is read after the constructor.
        (nnUNetTrainer.run_training, "self.current_epoch, self.num_epochs ... self.num_iterations_per_epoch"),
        (nnUNetTrainer.run_training, "self.num_val_iterations_per_epoch"),
        (nnUNetTrainer.on_epoch_end, "self.save_every"),
        # A file object is a file name, too; and the name of the trainer is for predictions only.
        (nnUNetTrainer.save_checkpoint, "torch.save(checkpoint, filename)"),
        (nnUNetPredictor.initialize_from_trained_model_folder, "checkpoint['trainer_name']"),
        # How a network is built is told by the builder's signature.
        (nnUNetTrainer.initialize, "if 'plans_manager' in sig.parameters ... network_arch_init_kwargs_req_import"),
        # We keep the data sets that get_tr_and_val_datasets made; under DDP each rank validates on a share.
        (nnUNetTrainer.perform_actual_validation, "self.do_split()"),
        (nnUNetPredictor._internal_predict_sliding_window_return_logits, "sigma_scale=1. / 8"),
        (nnUNetPredictor._internal_predict_sliding_window_return_logits, "value_scaling_factor=10"),
    ],
)
def test_the_code_of_the_host(function: Any, pieces: str) -> None:
    """It has these pieces, in this order."""
    body = inspect.getsource(function)
    places = [body.index(piece) for piece in pieces.split(" ... ")]
    assert places == sorted(places)


def test_the_constructor_has_the_parameters_that_ours_repeats() -> None:
    """The host reads its own ``locals()`` by the names in the signature of the class that is made."""
    host, ours = (inspect.signature(kind.__init__).parameters for kind in (nnUNetTrainer, AdversarialTraining))
    assert [(p.name, p.default) for p in host.values()] == [(p.name, p.default) for p in ours.values()]


def test_names_paths_and_schedule(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class nnUNetTrainerWithAnotherName(nnUNetTrainer):
        pass

    trainer = bench.make(nnUNetTrainerWithAnotherName)
    assert Path(trainer.output_folder_base).name == "nnUNetTrainerWithAnotherName__tiny__2d"
    assert Path(trainer.output_folder) == Path(trainer.output_folder_base) / "fold_0"
    # Read when they are used: ``adv-nnunet thresholds`` lets a trainer think that its results go elsewhere.
    monkeypatch.setenv("nnUNet_results", "/elsewhere")
    assert str(nnUNet_results) == "/elsewhere"
    trainer.num_epochs, trainer.initial_lr = 17, 0.123
    trainer.initialize()
    assert isinstance(trainer.optimizer, torch.optim.SGD)
    assert trainer.optimizer.param_groups[0]["lr"] == 0.123
    assert trainer.lr_scheduler.max_steps == 17


def test_the_hooks_are_called_in_this_order(bench: Any) -> None:
    trainer = bench.make(nnUNetTrainer)
    trainer.num_epochs = trainer.num_iterations_per_epoch = trainer.num_val_iterations_per_epoch = 1
    calls = []
    hooks = ("on_train_start", "on_train_epoch_start", "train_step", "on_train_epoch_end", "on_epoch_end")
    for name in (*hooks, "save_checkpoint", "get_dataloaders", "get_tr_and_val_datasets"):
        method = getattr(trainer, name)

        def wrapped(*args: Any, name: str = name, method: Any = method) -> Any:
            calls.append(name)
            return method(*args)

        setattr(trainer, name, wrapped)
    trainer.run_training()
    assert calls == [
        *("on_train_start", "get_dataloaders", "get_tr_and_val_datasets"),
        *("on_train_epoch_start", "train_step", "on_train_epoch_end"),
        *("on_epoch_end", "save_checkpoint"),  # after our state of the epoch is complete: best or latest
        "save_checkpoint",  # final
    ]


@pytest.mark.parametrize(("dataset", "kind"), [("main", DC_and_CE_loss), ("regions", DC_and_BCE_loss)])
def test_the_loss_is_one_that_we_can_split(bench: Any, dataset: str, kind: type) -> None:
    trainer = bench.make(nnUNetTrainer, dataset=dataset)
    trainer.initialize()
    assert isinstance(trainer.loss, DeepSupervisionWrapper)
    assert isinstance(trainer.loss.loss, kind)
    assert trainer.loss.loss.dc.batch_dice is trainer.configuration_manager.batch_dice is True
    assert trainer.loss.weight_factors[-1] == 0


def test_checkpoints_may_hold_more(bench: Any) -> None:
    trainer = bench.make(nnUNetTrainer)
    trainer.initialize()
    path = bench.folder / "x.pth"
    trainer.save_checkpoint(str(path))
    checkpoint = torch.load(path, weights_only=False)
    assert {"network_weights", "trainer_name", "init_args", "current_epoch", "logging"} <= checkpoint.keys()
    assert checkpoint["trainer_name"] == "nnUNetTrainer"
    torch.save(checkpoint | {"somebody": {"else": 1}, "trainer_name": "not looked at"}, path)
    bench.make(nnUNetTrainer).load_checkpoint(str(path))
    assert "trainer_name" not in inspect.getsource(nnUNetTrainer.load_checkpoint)


def test_the_log_is_a_dictionary_of_lists_that_takes_new_keys(tmp_path: Path) -> None:
    logger = MetaLogger(str(tmp_path), False)
    lists = logger.local_logger.my_fantastic_logging
    assert isinstance(logger.local_logger, LocalLogger)
    lists["ours"] = [float("nan")]
    logger.log("ours", 2.0, 1)
    assert logger.get_value("ours", 1) == 2.0
    with pytest.raises(AssertionError):
        logger.log("never opened", 2.0, 0)
    assert logger.get_checkpoint() is lists


def test_pieces_of_the_sliding_window() -> None:
    assert compute_steps_for_sliding_window((100, 64), (64, 64), 0.5) == [[0, 18, 36], [0]]
    how = {"sigma_scale": 1 / 8, "value_scaling_factor": 10, "dtype": torch.float32, "device": torch.device("cpu")}
    weights = compute_gaussian((8, 6), **how)
    assert weights.max() == 10
    assert weights.min() > 0


def test_a_preprocessed_case_is_image_and_segmentation(bench: Any) -> None:
    training, validation = bench.make(nnUNetTrainer).get_tr_and_val_datasets()
    image, segmentation, previous, _ = training.load_case(training.identifiers[0])
    assert image.shape[0] == segmentation.shape[0] == 1
    assert image.shape[1:] == segmentation.shape[1:]
    assert previous is None
    assert isinstance(image[:], np.ndarray)
    assert not set(training.identifiers) & set(validation.identifiers)


def test_what_thresholds_are_told_apart_by_is_there() -> None:
    for name in (*host.MAKERS_OF_SAMPLES, *host.MAKERS_OF_LOSS):
        assert host.owners_of(nnUNetTrainer, (name,), AdversarialTraining) == ["nnUNetTrainer"]


def test_the_training_step_is_the_one_that_ours_repeats(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Comments do not count. A release with another one is told."""
    assert host.fingerprint_of_step() == host.READ_STEP
    trainer = bench.make("SAT")
    trainer.initialize()
    assert "another training step" not in bench.log(trainer)

    def train_step(self: Any, batch: Any) -> Any:
        return batch

    monkeypatch.setattr(nnUNetTrainer, "train_step", train_step)
    assert host.fingerprint_of_step() != host.READ_STEP
    trainer = bench.make("SAT", tag="x")
    trainer.initialize()
    assert "WARNING: this release of nnU-Net has another training step" in bench.log(trainer)


def test_a_release_newer_than_those_that_were_tested_is_pointed_out(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("advmed.versions._told", set())
    trainer = bench.make("SAT", tag="known")
    trainer.initialize()
    assert "newer than" not in bench.log(trainer)
    monkeypatch.setattr("advmed.versions.installed", lambda package: "99.0")
    trainer = bench.make("SAT", tag="new")
    trainer.initialize()
    assert "WARNING: nnunetv2 99.0 is newer than" in bench.log(trainer)

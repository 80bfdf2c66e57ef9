"""What we take for granted in nnU-Net. A release that breaks one of these breaks us, perhaps without an error.

Assumptions about the loader are in test_loader.py; that ``train_step`` is what ours repeats, in test_trainer.py.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
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
from torch.optim import SGD

from adv_nnunet.trainer import AdversarialTraining


def names_in(function: Callable[..., Any]) -> set[str]:
    """Attributes and functions that a function's code mentions."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} | {
        node.id for node in ast.walk(tree) if isinstance(node, ast.Name)
    }


def test_the_constructor_has_the_parameters_that_ours_repeats() -> None:
    """The host reads its own ``locals()`` by the names in the signature of the class that is made."""
    host, ours = inspect.signature(nnUNetTrainer.__init__), inspect.signature(AdversarialTraining.__init__)
    assert list(host.parameters) == list(ours.parameters)
    defaults = [[p.default for p in signature.parameters.values()] for signature in (host, ours)]
    assert defaults[0] == defaults[1]


def test_plans_say_whether_a_training_is_continued() -> None:
    source = inspect.getsource(run_training.get_trainer_from_args)
    assert 'plans["continue_training"] = continue_training' in source
    assert 'plans.pop("continue_training")' in inspect.getsource(nnUNetTrainer.__init__)


def test_the_output_folder_is_named_after_the_class(bench: Any) -> None:
    class nnUNetTrainerWithAnotherName(nnUNetTrainer):
        pass

    trainer = bench.make(nnUNetTrainerWithAnotherName)
    assert Path(trainer.output_folder_base).name == "nnUNetTrainerWithAnotherName__tiny__2d"
    assert Path(trainer.output_folder) == Path(trainer.output_folder_base) / "fold_0"


def test_paths_are_read_when_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """``adv-nnunet thresholds`` lets a trainer think that its results go elsewhere."""
    monkeypatch.setenv("nnUNet_results", "/elsewhere")
    assert str(nnUNet_results) == "/elsewhere"


def test_schedule_attributes_are_read_after_the_constructor(bench: Any) -> None:
    trainer = bench.make(nnUNetTrainer)
    trainer.num_epochs, trainer.initial_lr = 17, 0.123
    trainer.initialize()
    assert isinstance(trainer.optimizer, SGD)
    assert trainer.optimizer.param_groups[0]["lr"] == 0.123
    assert trainer.lr_scheduler.max_steps == 17
    loop = names_in(nnUNetTrainer.run_training)
    assert {"num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch", "current_epoch"} <= loop
    assert "save_every" in names_in(nnUNetTrainer.on_epoch_end)


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


def test_the_loss_is_one_that_we_can_split(bench: Any) -> None:
    for dataset, kind in (("main", DC_and_CE_loss), ("regions", DC_and_BCE_loss)):
        trainer = bench.make(nnUNetTrainer, dataset=dataset)
        trainer.initialize()
        assert isinstance(trainer.loss, DeepSupervisionWrapper)
        assert isinstance(trainer.loss.loss, kind)
        assert trainer.loss.loss.dc.batch_dice is trainer.configuration_manager.batch_dice is True
        assert trainer.loss.weight_factors[-1] == 0


def test_checkpoints_can_be_written_into_memory_and_may_hold_more(bench: Any) -> None:
    trainer = bench.make(nnUNetTrainer)
    trainer.initialize()
    path = bench.folder / "x.pth"
    trainer.save_checkpoint(str(path))
    checkpoint = torch.load(path, weights_only=False)
    assert {"network_weights", "trainer_name", "init_args", "current_epoch", "logging"} <= checkpoint.keys()
    assert checkpoint["trainer_name"] == "nnUNetTrainer"
    torch.save(checkpoint | {"somebody": {"else": 1}, "trainer_name": "not looked at"}, path)
    bench.make(nnUNetTrainer).load_checkpoint(str(path))
    saved = inspect.getsource(nnUNetTrainer.save_checkpoint)
    assert "torch.save(checkpoint, filename)" in saved, "a file object is no file name any more"
    assert "trainer_name" not in inspect.getsource(nnUNetTrainer.load_checkpoint)
    assert "checkpoint['trainer_name']" in inspect.getsource(nnUNetPredictor.initialize_from_trained_model_folder)


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


def test_validation_asks_for_the_split_itself() -> None:
    """We keep the data sets that get_tr_and_val_datasets made; under DDP each rank validates on a share."""
    assert "do_split" in names_in(nnUNetTrainer.perform_actual_validation)


def test_pieces_of_the_sliding_window() -> None:
    assert compute_steps_for_sliding_window((100, 64), (64, 64), 0.5) == [[0, 18, 36], [0]]
    weights = compute_gaussian(
        (8, 6), sigma_scale=1 / 8, value_scaling_factor=10, dtype=torch.float32, device=torch.device("cpu")
    )
    assert weights.max() == 10
    assert weights.min() > 0
    body = inspect.getsource(nnUNetPredictor._internal_predict_sliding_window_return_logits)
    assert "sigma_scale=1. / 8" in body
    assert "value_scaling_factor=10" in body


def test_a_preprocessed_case_is_image_and_segmentation(bench: Any) -> None:
    trainer = bench.make(nnUNetTrainer)
    training, validation = trainer.get_tr_and_val_datasets()
    image, segmentation, previous, _ = training.load_case(training.identifiers[0])
    assert image.shape[0] == segmentation.shape[0] == 1
    assert image.shape[1:] == segmentation.shape[1:]
    assert previous is None
    assert isinstance(image[:], np.ndarray)
    assert not set(training.identifiers) & set(validation.identifiers)

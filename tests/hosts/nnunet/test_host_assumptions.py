"""What we take for granted in nnU-Net. A release that breaks one of these breaks us, perhaps without an error.

Assumptions about the loader are held by test_loader.py; about losses, checkpoints, logs, and the ``train_step`` that
ours repeats, by test_trainer.py; about cases and the sliding window by test_evaluate.py.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run import run_training
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

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


def test_the_hooks_are_called_in_this_order(bench: Any) -> None:
    trainer = bench.make(nnUNetTrainer)
    trainer.num_epochs = trainer.num_iterations_per_epoch = trainer.num_val_iterations_per_epoch = 1
    start, epoch = "on_train_start get_dataloaders get_tr_and_val_datasets", "train_step on_train_epoch_end"
    # A checkpoint after our state of the epoch is complete: best or latest; and the final one.
    wanted = f"{start} on_train_epoch_start {epoch} on_epoch_end save_checkpoint save_checkpoint".split()
    calls = []

    def watched(name: str, hook: Any) -> Any:
        return lambda *given: calls.append(name) or hook(*given)

    for name in set(wanted):
        setattr(trainer, name, watched(name, getattr(trainer, name)))
    trainer.run_training()
    assert calls == wanted

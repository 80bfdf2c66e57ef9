"""What we take for granted in Ultralytics. A release that breaks one of these breaks us, perhaps without an error.

Assumptions about models and criteria are held by test_objective.py; about data sets, validators and metrics by
test_evaluate.py; about checkpoints, logs, running out of memory and weights of two heads by test_trainer.py.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from ultralytics.cfg import DEFAULT_CFG_DICT, check_dict_alignment
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.engine.validator import BaseValidator
from ultralytics.models.yolo.detect import DetectionTrainer, DetectionValidator
from ultralytics.nn.modules import Detect, v10Detect
from ultralytics.utils import dist

from adv_yolo.objective import HEADS
from adv_yolo.settings import argument_names
from adv_yolo.trainer import COLUMNS, AdversarialTraining

# Each function has these pieces of code, in this order.
CODE: dict[str, tuple[Any, str]] = {
    "a batch goes through the model and its criterion": (
        BaseTrainer._do_train,
        "self._setup_train() ... zero_grad() ... batch = self.preprocess_batch(batch) ... "
        "unwrap_model(self.model).loss(batch, preds) ... self.model(batch) ... self.scaler.scale(self.loss).backward() "
        "... self.optimizer_step()",
    ),
    "an epoch": (
        BaseTrainer._do_train,
        'while True: ... run_callbacks("on_train_epoch_start") ... criterion.update() ... '
        'run_callbacks("on_train_epoch_end") ... self.validate() ... _handle_nan_recovery(epoch) ... '
        "self.save_metrics( ... self.save_model() ... self.final_eval()",
    ),
    "a run is resumed when everything else is set up": (
        BaseTrainer._setup_train,
        "self.setup_model() ... self._build_train_pipeline() ... self.get_validator() ... self.set_class_weights() ... "
        "ModelEMA(self.model) ... self.resume_training(ckpt)",
    ),
    "what processes are given": (dist.generate_ddp_file, '"args": vars(trainer.args)'),
    "and make of it": (dist.generate_ddp_file, 'state["trainer"](cfg=cfg, overrides=state["args"]'),
    "processes are started": (BaseTrainer.train, "self.ddp ... generate_ddp_command(self)"),
}


@pytest.mark.parametrize("what", CODE)
def test_the_code_of_the_host(what: str) -> None:
    function, pieces = CODE[what]
    body = inspect.getsource(function)
    places = [body.index(piece) for piece in pieces.split(" ... ")]
    assert places == sorted(places)


def test_how_often_the_host_does_it() -> None:
    loop = inspect.getsource(BaseTrainer._do_train)
    assert loop.count("continue") == 2  # memory and NaN bring an epoch back to its start
    (included,) = (line for line in loop.splitlines() if "ema.update_attr" in line)
    assert "criterion" not in included
    # The head that predicts is chosen by an argument.
    assert DEFAULT_CFG_DICT["nms"] is None
    assert inspect.getsource(BaseValidator.__call__).count("self.args.nms is False") == 2
    assert {Detect.__name__, v10Detect.__name__} == set(HEADS)


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_what_we_override_has_the_signature_that_ours_has() -> None:
    names = (
        "__init__ train _build_train_pipeline resume_training run_callbacks preprocess_batch save_metrics save_model "
        "final_eval"
    )
    for name in names.split():
        assert parameters(getattr(DetectionTrainer, name)) == parameters(getattr(AdversarialTraining, name)), name
    assert parameters(DetectionTrainer.get_model)[:3] == ["self", "cfg", "weights"]


def test_arguments_of_ours_are_none_of_the_hosts_and_unknown_ones_are_compared_with_a_dict(tmp_path: Path) -> None:
    assert set(argument_names()).isdisjoint(DEFAULT_CFG_DICT)
    assert not {"seed", "warmup_epochs"} - set(DEFAULT_CFG_DICT)  # left to the host, or renamed because of it
    assert len(set(argument_names())) == len(argument_names())
    check_dict_alignment({"delta": None}, {"delta": 1})
    with pytest.raises(SyntaxError, match="delta"):
        check_dict_alignment({"delta": None}, {"delt": 1})
    with pytest.raises(SyntaxError, match="delta"):  # this is why ours are taken away for a validator
        DetectionValidator(save_dir=tmp_path, args={"delta": 1.0})
    assert all(name.startswith("train/") for name in COLUMNS.values())

"""What we take for granted in Ultralytics. A release that breaks one of these breaks us, perhaps without an error."""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from ultralytics.cfg import DEFAULT_CFG_DICT, check_dict_alignment
from ultralytics.data.base import BaseDataset
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.engine.validator import BaseValidator
from ultralytics.models.yolo.detect import DetectionTrainer, DetectionValidator
from ultralytics.nn.modules import Detect, v10Detect
from ultralytics.nn.tasks import BaseModel, DetectionModel
from ultralytics.utils import dist
from ultralytics.utils.loss import BboxLoss, E2ELoss, v8DetectionLoss
from ultralytics.utils.metrics import DetMetrics
from ultralytics.utils.torch_utils import ModelEMA

from adv_yolo.objective import HEADS
from adv_yolo.settings import argument_names
from adv_yolo.trainer import COLUMNS, AdversarialTraining


def source(function: Any) -> str:
    return textwrap.dedent(inspect.getsource(function))


def calls(function: Callable[..., Any]) -> list[str]:
    """What a function calls, in the order of its lines."""
    found = []
    for node in ast.walk(ast.parse(source(function))):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            found.append((node.lineno, node.col_offset, name))
    return [name for _, _, name in sorted(found)]


def in_order(names: list[str], wanted: list[str]) -> bool:
    """Whether ``wanted`` is a subsequence."""
    rest = iter(names)
    return all(name in rest for name in wanted)


# Arguments


def test_no_argument_of_ours_is_one_of_the_hosts() -> None:
    assert set(argument_names()).isdisjoint(DEFAULT_CFG_DICT)
    assert not {"seed", "warmup_epochs"} - set(DEFAULT_CFG_DICT)  # left to the host, or renamed because of it
    assert len(set(argument_names())) == len(argument_names())


def test_unknown_arguments_are_compared_with_a_dict() -> None:
    check_dict_alignment({"delta": None}, {"delta": 1})
    with pytest.raises(SyntaxError, match="delta"):
        check_dict_alignment({"delta": None}, {"delt": 1})


def test_the_constructor_takes_what_ours_takes() -> None:
    ours = list(inspect.signature(AdversarialTraining.__init__).parameters)
    for host in (BaseTrainer, DetectionTrainer):
        assert list(inspect.signature(host.__init__).parameters) == ours == ["self", "cfg", "overrides", "_callbacks"]


def test_what_we_override_has_the_signature_that_ours_has() -> None:
    for name in (
        "train",
        "_build_train_pipeline",
        "resume_training",
        "run_callbacks",
        "preprocess_batch",
        "save_metrics",
        "save_model",
        "final_eval",
    ):
        host, ours = (inspect.signature(getattr(kind, name)) for kind in (DetectionTrainer, AdversarialTraining))
        assert list(host.parameters) == list(ours.parameters), name
    assert list(inspect.signature(DetectionTrainer.get_model).parameters)[:3] == ["self", "cfg", "weights"]


# The loop


def test_a_batch_goes_through_the_model_and_its_criterion() -> None:
    loop = source(BaseTrainer._do_train)
    assert "batch = self.preprocess_batch(batch)" in loop
    assert "self.model(batch)" in loop
    assert "unwrap_model(self.model).loss(batch, preds)" in loop  # compiled
    assert "self.scaler.scale(self.loss).backward()" in loop
    assert "self.loss_items" in loop
    assert loop.index("preprocess_batch") < loop.index("self.model(batch)") < loop.index(".backward()")


def test_the_model_asks_its_criterion(networks: Any, batch: dict[str, Any]) -> None:
    model = networks("yolov8n").train()
    seen: list[Any] = []
    model.criterion = lambda *given: seen.append(given) or (torch.zeros(3), {})
    model(batch)
    ((predictions, handed),) = seen
    assert set(predictions) == {"boxes", "scores", "feats"}
    assert handed is batch
    assert inspect.signature(BaseModel.loss).parameters.keys() == {"self", "batch", "preds"}


def test_an_epoch_has_this_order() -> None:
    assert in_order(
        calls(BaseTrainer._do_train),
        ["_setup_train", "zero_grad", "preprocess_batch", "model", "backward", "optimizer_step"],
    )
    loop = source(BaseTrainer._do_train)
    steps = [
        'run_callbacks("on_train_epoch_start")',
        "criterion.update()",
        'run_callbacks("on_train_epoch_end")',
        "self.validate()",
        "_handle_nan_recovery(epoch)",
        "self.save_metrics(",
        "self.save_model()",
        "self.final_eval()",
    ]
    places = [loop.index(step) for step in steps]
    assert places == sorted(places)
    assert 'hasattr(unwrap_model(self.model).criterion, "update")' in loop


def test_a_run_is_resumed_when_everything_else_is_set_up() -> None:
    setup = source(BaseTrainer._setup_train)
    steps = [
        "self.setup_model()",
        "self._build_train_pipeline()",
        "self.get_validator()",
        "self.set_class_weights()",
        "ModelEMA(self.model)",
        "self.resume_training(ckpt)",
    ]
    places = [setup.index(step) for step in steps]
    assert places == sorted(places)
    assert "_build_train_pipeline" in calls(BaseTrainer._do_train)  # once more, when memory ran out


def test_memory_and_nan_bring_an_epoch_back_to_its_start() -> None:
    loop = source(BaseTrainer._do_train)
    assert '"out of memory" in str(e).lower()' in loop
    assert loop.count("continue") == 2
    assert loop.index("while True:") < loop.index('run_callbacks("on_train_epoch_start")')


# Checkpoints


def test_checkpoints_are_copies_of_the_average_with_its_attributes(networks: Any) -> None:
    body = source(BaseTrainer.save_model)
    assert "ema = deepcopy(ema).half()" in body
    assert "ema.criterion = None" in body
    assert '"ema": ema' in body
    network = networks("yolov8n")
    average = ModelEMA(network)
    average.ema.advmed = {"some": ["thing"]}
    assert copy.deepcopy(average.ema).half().advmed == {"some": ["thing"]}
    include = [line for line in source(BaseTrainer._do_train).splitlines() if "ema.update_attr" in line]
    assert len(include) == 1
    assert "criterion" not in include[0]


def test_the_metrics_are_a_dict_that_takes_more_keys() -> None:
    body = source(BaseTrainer.save_metrics)
    assert "keys, vals = list(metrics.keys()), list(metrics.values())" in body
    assert "{**self.label_loss_items(self.tloss), **self.metrics, **self.lr}" in source(BaseTrainer._do_train)
    assert all(name.startswith("train/") for name in COLUMNS.values())


def test_a_validator_rejects_arguments_that_it_does_not_know(tmp_path: Path) -> None:
    """This is why ours are taken away for it."""
    with pytest.raises(SyntaxError, match="delta"):
        DetectionValidator(save_dir=tmp_path, args={"delta": 1.0})


def test_processes_get_the_arguments_of_the_trainer() -> None:
    body = inspect.getsource(dist.generate_ddp_file)
    assert '"args": vars(trainer.args)' in body
    assert 'state["trainer"](cfg=cfg, overrides=state["args"]' in body
    assert "generate_ddp_command(self)" in source(BaseTrainer.train)
    assert "self.ddp" in source(BaseTrainer.train)


# The loss


def test_the_criterion_has_the_parts_that_we_listen_to(networks: Any) -> None:
    criterion = networks("yolov8n").init_criterion()
    assert type(criterion) is v8DetectionLoss
    assert isinstance(criterion.bce, nn.BCEWithLogitsLoss)
    assert criterion.bce.reduction == "none"
    assert isinstance(criterion.bbox_loss, BboxLoss)
    assert criterion.loss_names == ("box_loss", "cls_loss", "dfl_loss")
    assert all(hasattr(criterion.hyp, name) for name in ("box", "cls", "dfl"))
    assert list(inspect.signature(criterion.get_assigned_targets_and_loss).parameters)[:2] == ["preds", "batch"]
    body = source(v8DetectionLoss.get_assigned_targets_and_loss)
    assert "self.bce(pred_scores, target_scores.to(dtype))" in body
    assert "bce_loss *= self.class_weights" in body
    assert "target_scores_sum = target_scores.sum().clamp_(min=1)" in body


def test_the_gains_have_this_order() -> None:
    body = source(v8DetectionLoss.get_assigned_targets_and_loss)
    for place, name in enumerate(("box", "cls", "dfl")):
        assert f"loss[{place}] *= self.hyp.{name}" in body
    assert "loss[0], loss[2] = self.bbox_loss(" in body
    assert "return loss * batch_size, loss_detach" in source(v8DetectionLoss.loss)


def test_the_box_loss_is_given_these_arguments() -> None:
    assert list(inspect.signature(BboxLoss.forward).parameters) == [
        "self",
        "pred_dist",
        "pred_bboxes",
        "anchor_points",
        "target_bboxes",
        "target_scores",
        "target_scores_sum",
        "fg_mask",
        "imgsz",
        "stride",
    ]
    assert BboxLoss(16).dfl_loss.reg_max == 16
    assert BboxLoss(1).dfl_loss is None


def test_models_with_two_heads_have_two_criteria(networks: Any, batch: dict[str, Any]) -> None:
    model = networks("yolo26n")
    criterion = model.init_criterion()
    assert type(criterion) is E2ELoss
    assert type(criterion.one2many) is type(criterion.one2one) is v8DetectionLoss
    assert criterion.o2m + criterion.o2o == pytest.approx(1)
    assert criterion.o2m > criterion.o2o
    for training in (False, True):
        parsed = criterion.one2many.parse_output(model.train(training)(batch["img"]))
        assert set(parsed) == {"one2many", "one2one"}


def test_a_one_to_one_head_detaches_its_features_while_its_own_flag_says_training() -> None:
    assert "[xi.detach() for xi in x] if self.training else x" in source(Detect.forward)


def test_the_head_that_predicts_is_chosen_by_an_argument() -> None:
    assert DEFAULT_CFG_DICT["nms"] is None
    assert source(BaseValidator.__call__).count("self.args.nms is False") == 2
    assert {Detect.__name__, v10Detect.__name__} == set(HEADS)


# Data and evaluation


def test_a_data_set_lists_its_files_and_labels(data: Any, tools: Any) -> None:
    from ultralytics.cfg import get_cfg
    from ultralytics.data import build_yolo_dataset
    from ultralytics.data.utils import check_det_dataset

    info = check_det_dataset(str(data.yaml))
    args = get_cfg(overrides={"imgsz": 64, "task": "detect"})
    made = build_yolo_dataset(args, info["train"], 4, info, mode="val", rect=False, stride=32)
    assert isinstance(made, BaseDataset)
    assert [Path(name).stem for name in made.im_files] == data.names("train")
    assert [len(label["cls"]) for label in made.labels] == [len(data.labels(name)) for name in data.names("train")]
    batch = made.collate_fn([made[0], made[1], made[2]])
    assert [Path(name).stem for name in batch["im_file"]] == data.names("train")[:3]
    assert batch["img"].dtype == torch.uint8
    assert batch["img"].shape == (3, 3, 64, 64)
    assert set(batch["batch_idx"].tolist()) == {0.0, 2.0}  # the second is a background image
    assert "path" in info


def test_pieces_of_the_validator() -> None:
    for name, given in {
        "postprocess": ["self", "preds"],
        "_prepare_batch": ["self", "si", "batch"],
        "_prepare_pred": ["self", "pred"],
        "_process_batch": ["self", "preds", "batch"],
        "init_metrics": ["self", "model"],
    }.items():
        assert list(inspect.signature(getattr(DetectionValidator, name)).parameters) == given, name
    metrics = DetMetrics({0: "a"})
    assert set(metrics.stats) == {"tp", "conf", "pred_cls", "target_cls", "target_img"}


def test_detection_models_of_all_families_are_one_class(networks: Any) -> None:
    for name in ("yolov5n", "yolov8n", "yolo11n", "yolov10n", "yolo26n"):
        model = networks(name)
        assert type(model) is DetectionModel
        assert type(model.model[-1]).__name__ in HEADS

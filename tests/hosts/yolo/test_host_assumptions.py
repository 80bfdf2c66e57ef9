"""What we take for granted in Ultralytics. A release that breaks one of these breaks us, perhaps without an error."""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from ultralytics.cfg import DEFAULT_CFG_DICT, check_dict_alignment, get_cfg
from ultralytics.data import build_yolo_dataset
from ultralytics.data.base import BaseDataset
from ultralytics.data.utils import check_det_dataset
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.engine.validator import BaseValidator
from ultralytics.models.yolo.detect import DetectionTrainer, DetectionValidator
from ultralytics.nn.modules import Detect, v10Detect
from ultralytics.nn.tasks import BaseModel, DetectionModel
from ultralytics.utils import dist
from ultralytics.utils.loss import BboxLoss, E2ELoss, v8DetectionLoss
from ultralytics.utils.metrics import DetMetrics
from ultralytics.utils.nms import non_max_suppression
from ultralytics.utils.torch_utils import EarlyStopping

from adv_yolo.calibration import AUGMENTATION, GAINS
from adv_yolo.objective import HEADS
from adv_yolo.settings import argument_names
from adv_yolo.trainer import AdversarialTraining

pytestmark = pytest.mark.slow


def source(function: Any) -> str:
    return textwrap.dedent(inspect.getsource(function))


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
    "two heads": (BaseTrainer._do_train, 'hasattr(unwrap_model(self.model).criterion, "update")'),
    "out of memory": (BaseTrainer._do_train, '"out of memory" in str(e).lower() ... _build_train_pipeline()'),
    "checkpoints": (BaseTrainer.save_model, 'ema = deepcopy(ema).half() ... ema.criterion = None ... "ema": ema'),
    "metrics": (BaseTrainer._do_train, "{**self.label_loss_items(self.tloss), **self.metrics, **self.lr}"),
    "columns": (BaseTrainer.save_metrics, "keys, vals = list(metrics.keys()), list(metrics.values())"),
    "fitness": (
        BaseTrainer.validate,
        'metrics = self.validator(self) ... return None, None ... metrics.pop("fitness" ... self.best_fitness = ',
    ),
    "an epoch without fitness neither wins nor counts": (EarlyStopping.__call__, "if fitness is None ... return False"),
    "the best epoch": (BaseTrainer.save_model, "if self.best_fitness == self.fitness ... self.best.write_bytes"),
    "where checkpoints are written": (
        BaseTrainer.save_model,
        "self.wdir.mkdir(parents=True ... self.last.write_bytes ... self.best.write_bytes ... (self.wdir / f",
    ),
    "a fitness that is none is not broken": (BaseTrainer._handle_nan_recovery, "self.fitness is not None and"),
    "a validation's batches": (BaseTrainer._build_train_pipeline, 'else batch_size * 2 ... mode="val"'),
    "weights to begin with": (BaseTrainer.setup_model, "self.get_model(cfg=cfg, weights=weights"),
    "what a training makes of a batch": (
        DetectionTrainer.preprocess_batch,
        "self.device ... self.args.multi_scale ... self.stride ... self.args.imgsz",
    ),
    "the images of a training": (
        DetectionTrainer.build_dataset,
        'build_yolo_dataset(self.args, img_path, batch, self.data, mode=mode, rect=mode == "val", stride=gs)',
    ),
    "what processes are given": (dist.generate_ddp_file, '"args": vars(trainer.args)'),
    "and make of it": (
        dist.generate_ddp_file,
        'state["trainer"](cfg=cfg, overrides=state["args"] ... trainer.model = state["model"] ... trainer.train()',
    ),
    "a model that was made before is none to make": (
        BaseTrainer.setup_model,
        "if isinstance(self.model, torch.nn.Module) ... return ... self.get_model(",
    ),
    "processes are started": (BaseTrainer.train, "self.ddp ... generate_ddp_command(self)"),
    "the criterion": (
        v8DetectionLoss.get_assigned_targets_and_loss,
        "target_scores_sum = target_scores.sum().clamp_(min=1) ... self.bce(pred_scores, target_scores.to(dtype)) ... "
        "bce_loss *= self.class_weights ... loss[0], loss[2] = self.bbox_loss( ... loss[0] *= self.hyp.box ... "
        "loss[1] *= self.hyp.cls ... loss[2] *= self.hyp.dfl",
    ),
    "the clock is looked at behind an image": (
        non_max_suppression,
        "prediction = prediction[0] ... for xi, (x, xk) in ... output[xi] = x[i] ... > time_limit ... break",
    ),
    "weights of classes": (
        DetectionTrainer.set_class_weights,
        "self.args.cls_pw ... self.get_class_counts() ... unwrap_model(self.model) ... model.class_weights = ",
    ),
    "the size of the batch": (v8DetectionLoss.loss, "return loss * batch_size, loss_detach"),
    "a one-to-one head detaches its features while its own flag says training": (
        Detect.forward,
        "[xi.detach() for xi in x] if self.training else x",
    ),
}


@pytest.mark.parametrize("what", CODE)
def test_the_code_of_the_host(what: str) -> None:
    function, pieces = CODE[what]
    body = source(function)
    places = [body.index(piece) for piece in pieces.split(" ... ")]
    assert places == sorted(places)


def test_how_often_the_host_does_it() -> None:
    loop = source(BaseTrainer._do_train)
    assert loop.count("continue") == 2  # memory and NaN bring an epoch back to its start
    (included,) = (line for line in loop.splitlines() if "ema.update_attr" in line)
    assert "criterion" not in included
    # The head that predicts is chosen by an argument.
    assert DEFAULT_CFG_DICT["nms"] is None
    assert source(BaseValidator.__call__).count("self.args.nms is False") == 2
    assert {Detect.__name__, v10Detect.__name__} == set(HEADS)


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


BOXES = "pred_dist pred_bboxes anchor_points target_bboxes target_scores target_scores_sum fg_mask imgsz stride"


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        (DetectionTrainer.__init__, "cfg overrides _callbacks"),
        (AdversarialTraining.__init__, "cfg overrides _callbacks"),
        (BaseModel.loss, "batch preds"),
        (BboxLoss.forward, BOXES),
        (DetectionValidator.postprocess, "preds"),
        (DetectionValidator._prepare_batch, "si batch"),
        (DetectionValidator._prepare_pred, "pred"),
        (DetectionValidator._process_batch, "preds batch"),
        (DetectionValidator.init_metrics, "model"),
    ],
)
def test_signatures(function: Any, wanted: str) -> None:
    assert parameters(function) == ["self", *wanted.split()]


def test_what_we_override_has_the_signature_that_ours_has() -> None:
    names = (
        "train setup_model _build_train_pipeline resume_training run_callbacks preprocess_batch validate save_metrics "
        "save_model final_eval"
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
    assert set(AUGMENTATION) | set(GAINS) <= set(DEFAULT_CFG_DICT)


def test_the_model_asks_its_criterion(networks: Any, batch: dict[str, Any]) -> None:
    model = networks("yolov8n").train()
    seen: list[Any] = []
    model.criterion = lambda *given: seen.append(given) or (torch.zeros(3), {})
    model(batch)
    ((predictions, handed),) = seen
    assert set(predictions) == {"boxes", "scores", "feats"}
    assert handed is batch


@pytest.mark.parametrize("name", ["yolov8n", "yolo26n"])
def test_criteria_have_the_parts_that_we_listen_to(networks: Any, batch: dict[str, Any], name: str) -> None:
    """Models with two heads have two of them, whose weights move."""
    model = networks(name)
    criterion = model.init_criterion()
    parts = [criterion]
    if name == "yolo26n":
        assert type(criterion) is E2ELoss
        assert criterion.o2m + criterion.o2o == pytest.approx(1)
        assert criterion.o2m > criterion.o2o
        parts = [criterion.one2many, criterion.one2one]
        for training in (False, True):
            parsed = criterion.one2many.parse_output(model.train(training)(batch["img"]))
            assert set(parsed) == {"one2many", "one2one"}
    for part in parts:
        assert type(part) is v8DetectionLoss
        assert isinstance(part.bce, nn.BCEWithLogitsLoss)
        assert part.bce.reduction == "none"
        assert isinstance(part.bbox_loss, BboxLoss)
        assert part.loss_names[:2] == ("box_loss", "cls_loss")
        assert all(hasattr(part.hyp, name) for name in ("box", "cls", "dfl"))
        assert parameters(part.get_assigned_targets_and_loss)[:2] == ["preds", "batch"]
    assert BboxLoss(16).dfl_loss.reg_max == 16
    assert BboxLoss(1).dfl_loss is None


def test_a_data_set_lists_its_files_and_labels(data: Any) -> None:
    info = check_det_dataset(str(data.yaml))
    args = get_cfg(overrides={"imgsz": 64, "task": "detect"})
    made = build_yolo_dataset(args, info["train"], 4, info, mode="val", rect=False, stride=32)
    assert isinstance(made, BaseDataset)
    assert [Path(name).stem for name in made.im_files] == data.names("train")
    assert [Path(name).stem for name in made.label_files] == data.names("train")
    assert [len(label["cls"]) for label in made.labels] == [len(data.labels(name)) for name in data.names("train")]
    batch = made.collate_fn([made[0], made[1], made[2]])
    assert [Path(name).stem for name in batch["im_file"]] == data.names("train")[:3]
    assert (batch["img"].dtype, batch["img"].shape) == (torch.uint8, (3, 3, 64, 64))
    assert set(batch["batch_idx"].tolist()) == {0.0, 2.0}  # the second is a background image


def test_the_metrics_keep_these_statistics() -> None:
    assert set(DetMetrics({0: "a"}).stats) == {"tp", "conf", "pred_cls", "target_cls", "target_img"}


@pytest.mark.slow
def test_detection_models_of_all_families_are_one_class(networks: Any) -> None:
    for name in ("yolov5n", "yolov8n", "yolo11n", "yolov10n", "yolo26n"):
        model = networks(name)
        assert type(model) is DetectionModel
        assert type(model.model[-1]).__name__ in HEADS

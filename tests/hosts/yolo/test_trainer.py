"""The trainers against the stock one: weights, steps, statistics, checkpoints, interruptions and bad input."""

from __future__ import annotations

import copy
import csv
import io
import logging
import math
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from ultralytics import YOLO
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils import DEFAULT_CFG_DICT, LOGGER

from adv_yolo import (
    AMATDetectionTrainer,
    ATDetectionTrainer,
    DPAATDetectionTrainer,
    SATDetectionTrainer,
    TRADESDetectionTrainer,
)
from adv_yolo.settings import argument_names
from adv_yolo.trainer import COLUMNS, STATE, MethodCriterion
from advmed.thresholds import RunningThresholds, Thresholds

TERMS = ("box_loss", "cls_loss", "dfl_loss")
SHORT = {"steps": 1, "step_scale": 1.0}


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What the host's logger says."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(f"{record.levelname}: {record.getMessage()}")

    listener = Listener()
    LOGGER.addHandler(listener)
    yield said
    LOGGER.removeHandler(listener)


@pytest.fixture(scope="module")
def make(data: Any, tools: Any) -> Callable[..., Any]:
    """A trainer with quick settings."""

    def made(kind: type[Any], folder: Path, source: Any = None, **arguments: Any) -> Any:
        ours = SHORT if kind is not DetectionTrainer else {}
        given = {"model": tools.ONE_HEAD, "data": str((source or data).yaml), "project": str(folder), "name": "run"}
        return kind(overrides={**tools.QUIET, **given, **ours, **arguments})

    return made


@pytest.fixture
def run(make: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    def trained(kind: type[Any], name: str = "own", callbacks: dict[str, Any] | None = None, **arguments: Any) -> Any:
        trainer = make(kind, tmp_path / name, **arguments)
        for event, callback in (callbacks or {}).items():
            trainer.add_callback(event, callback)
        trainer.train()
        return trainer

    return trained


@pytest.fixture(scope="module")
def thresholds(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """A thresholds file in which all terms have one value."""
    folder = tmp_path_factory.mktemp("thresholds")

    def write(value: float, names: tuple[str, ...] = TERMS) -> str:
        path = folder / f"{value}-{len(names)}-{names[-1]}.json"
        Thresholds((value,) * len(names), names).save(path)
        return str(path)

    return write


def table(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return list(rows[0]), rows


def epochs(path: Path) -> list[int]:
    return [int(row["epoch"]) for row in table(path)[1]]


def same(first: nn.Module, second: nn.Module) -> list[str]:
    """Names of the entries that differ."""
    other = second.state_dict()
    return [name for name, value in first.state_dict().items() if not torch.equal(value, other[name])]


# The stock trainer


@pytest.mark.parametrize(
    ("model", "arguments"),
    [
        ("ONE_HEAD", {}),
        ("TWO_HEADS", {}),
        ("ONE_HEAD", {"cls_pw": 1.0, "cls": 2.0}),
        ("ONE_HEAD", {"multi_scale": 0.5, "imgsz": 96, "fliplr": 0.5}),
        ("ONE_HEAD", {"freeze": 2, "nbs": 8, "single_cls": True}),
    ],
)
def test_noise_of_nothing_is_the_stock_training_bit_for_bit(
    run: Any, tools: Any, model: str, arguments: dict[str, Any]
) -> None:
    given = {**tools.STILL, "model": getattr(tools, model), **arguments}
    stock = run(DetectionTrainer, "stock", **given)
    ours = run(SATDetectionTrainer, "ours", eps=0.0, bn="clean", **given)
    assert same(stock.model, ours.model) == []
    assert same(stock.ema.ema, ours.ema.ema) == []
    other = run(SATDetectionTrainer, "other", eps=2.0, bn="clean", val=False, **given)
    assert len(same(stock.model, other.model)) > 20
    assert all(value.isfinite().all() for value in other.model.state_dict().values())


@pytest.mark.parametrize("backward", ["together", "sequential"])
def test_noise_of_nothing_is_the_stock_training_in_half_precision(
    run: Any, tools: Any, monkeypatch: pytest.MonkeyPatch, backward: str
) -> None:
    """The host has it on GPUs only; autocast keeps its casts of the weights from pass to pass everywhere."""
    half = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    monkeypatch.setattr("ultralytics.engine.trainer.autocast", lambda *_, **__: half())
    given = {**tools.STILL, "val": False}
    stock = run(DetectionTrainer, "stock", **given)
    ours = run(SATDetectionTrainer, "ours", eps=0.0, bn="clean", backward=backward, **given)
    if backward == "together":
        assert same(stock.model, ours.model) == []
    for name, value in stock.model.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], value, rtol=1e-2, atol=1e-4, msg=name)
    other = run(SATDetectionTrainer, "other", eps=2.0, bn="clean", backward=backward, **given)
    assert len(same(stock.model, other.model)) > 20
    assert other.run.method.steps_done == 4


def test_the_clean_warm_up_is_the_stock_training_bit_for_bit(run: Any, tools: Any, tmp_path: Path) -> None:
    weights: dict[str, Any] = {}

    def keep(trainer: Any) -> None:
        if trainer.epoch == 0:
            weights[type(trainer).__name__] = copy.deepcopy(trainer.model)

    for kind in (DetectionTrainer, AMATDetectionTrainer):
        run(kind, kind.__name__, callbacks={"on_train_epoch_end": keep}, **tools.STILL)
    assert same(weights["DetectionTrainer"], weights["AMATDetectionTrainer"]) == []


def test_optimizer_steps_are_as_many_as_the_stock_trainers(
    run: Any, monkeypatch: pytest.MonkeyPatch, thresholds: Any
) -> None:
    steps: list[int] = []
    step = BaseTrainer.optimizer_step

    def counted(self: Any) -> None:
        steps.append(self.epoch)
        step(self)

    monkeypatch.setattr(BaseTrainer, "optimizer_step", counted)
    found = []
    for kind, own in (
        (DetectionTrainer, {}),
        (SATDetectionTrainer, {"eps": 1.0, "backward": "sequential"}),
        (AMATDetectionTrainer, {"delta": 1.0, "thresholds": thresholds(5.0)}),
    ):
        steps.clear()
        run(kind, kind.__name__, nbs=8, epochs=3, val=False, **own)
        found.append(list(steps))
    assert found[0] == [0, 1, 2]  # of two batches each
    assert found[1] == found[2] == found[0]


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        (SATDetectionTrainer, {"bn": "both"}),
        (SATDetectionTrainer, {"bn": "clean"}),
        (SATDetectionTrainer, {"bn": "adversarial"}),
        (DPAATDetectionTrainer, {"sync_weight": 0.0}),  # back-propagates one pass only
    ],
)
def test_sequential_backward_gives_the_same_weights(run: Any, tools: Any, kind: type[Any], own: dict[str, Any]) -> None:
    first, second = (
        run(kind, backward, backward=backward, eps=1.0, **own, epochs=1, val=False, **tools.STILL)
        for backward in ("together", "sequential")
    )
    for name, value in first.model.state_dict().items():
        torch.testing.assert_close(second.model.state_dict()[name], value, rtol=1e-4, atol=1e-6, msg=name)


# Methods that compare predictions


COMPARING = [
    (TRADESDetectionTrainer, {"beta": 3.0}),
    (DPAATDetectionTrainer, {"sync_weight": 3.0}),
    (DPAATDetectionTrainer, {"sync_weight": 0.0}),
]


class Looked(Exception):
    """A batch has been looked at; the rest of the run is of no interest."""


@pytest.mark.parametrize(
    ("model", "arguments", "branch"),
    [("ONE_HEAD", {}, None), ("TWO_HEADS", {}, "one2many"), ("TWO_HEADS", {"nms": False}, "one2one")],
    ids=str,
)
@pytest.mark.parametrize(("kind", "own"), COMPARING)
def test_the_loss_is_that_of_the_host_and_the_weighted_distance(
    make: Any,
    tools: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[Any],
    own: dict[str, float],
    model: str,
    arguments: dict[str, Any],
    branch: str | None,
) -> None:
    """With the gradients: neither of the two passes is a constant of the distance. The loss items that the host logs
    are those of the clean pass, where a method makes one that it learns from.
    """
    method_loss = kind.method_loss

    def look(self: Any, predictions: Any, batch: dict[str, Any]) -> Any:
        network, steps, step = copy.deepcopy(self.model), [], self.run.method.step
        monkeypatch.setattr(self.run.method, "step", lambda *a, **k: steps.append(step(*a, **k)) or steps[-1])
        loss, items = method_loss(self, predictions, batch)

        noise = steps[0].adversarial - batch["img"]
        assert noise.flatten(1).norm(dim=1).min() > 1.0, "the attack found no way (TRADES starts at 1 % of the radius)"
        criterion = network.init_criterion()
        if model == "TWO_HEADS":
            criterion.o2m, criterion.o2o = self.terms.criterion.o2m, self.terms.criterion.o2o
        passes = [network(images) for images in (batch["img"], steps[0].adversarial)]
        (clean, clean_items), (adversarial, adversarial_items) = (criterion(each, batch) for each in passes)
        sync, (weight,) = tools.divergence(network, *passes).mean(), own.values()
        wanted = (clean if kind is TRADESDetectionTrainer else adversarial).sum() + weight * sync
        assert weight == 0 or weight * sync > 1e-3 * wanted, "the distance is too small to be seen in the sum"
        torch.testing.assert_close(loss.double(), wanted.double(), rtol=1e-5, atol=0)
        of_pass = adversarial_items if weight == 0 else clean_items
        assert items.keys() == of_pass.keys()
        for name, value in items.items():
            torch.testing.assert_close(value, of_pass[name], rtol=1e-4, atol=1e-6)
        assert any(float(clean_items[name]) != float(adversarial_items[name]) for name in items)

        both = []
        for module, value in ((self.model, loss), (network, wanted)):
            learnt = [p for p in module.parameters() if p.requires_grad]
            both.append(torch.autograd.grad(value, learnt, allow_unused=True))
        assert len(both[0]) > 20
        for ours, theirs in zip(*both, strict=True):
            assert (ours is None) == (theirs is None)
            if theirs is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()) + 1e-7)
        raise Looked

    monkeypatch.setattr(kind, "method_loss", look)
    settings = {"eps": 3.0, "steps": 3, "step_scale": 3.0, "model": getattr(tools, model)}
    trainer = make(kind, tmp_path, **settings, **own, **arguments)
    with pytest.raises(Looked):
        trainer.train()
    assert trainer.terms.branch == branch


@pytest.fixture(scope="module", params=[TRADESDetectionTrainer, DPAATDetectionTrainer], ids=["TRADES", "DPAAT"])
def compared(request: pytest.FixtureRequest, make: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished run; ``saved`` are copies of last.pt as it was during the training."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("compared")
    trainer = make(request.param, folder, epochs=3, eps=1.0, step_size=0.25, eps_max=1.5)
    trainer.saved = []

    def keep(trainer: Any) -> None:
        trainer.saved.append(folder / f"{trainer.epoch}.pt")
        shutil.copy(trainer.last, trainer.saved[-1])

    trainer.add_callback("on_model_save", keep)
    trainer.train()
    return trainer


def test_results_tell_of_the_distance(compared: Any) -> None:
    _, rows = table(compared.save_dir / "results.csv")
    assert len(rows) == 3
    for row in rows:
        ours = {key: float(row[column]) for key, column in COLUMNS.items()}
        for key in ("loss_clean", "loss_adversarial", "loss_sync", "attack_seconds"):
            assert ours[key] > 0, key
        levels = [ours[f"margin_{q}"] for q in ("q05", "q50", "q95")]
        if isinstance(compared, TRADESDetectionTrainer):
            assert all(math.isnan(value) for value in (*levels, ours["expanded"]))
        else:
            assert 0.25 <= levels[0] <= levels[1] <= levels[2] <= 1.5
            assert 0 < ours["expanded"] < 1


def test_sizes_ride_in_the_checkpoint_and_are_written_down(compared: Any, data: Any) -> None:
    states = [getattr(torch.load(path, weights_only=False)["ema"], STATE) for path in compared.saved]
    assert len(states) == 3
    assert all(map(plain, states))
    if isinstance(compared, TRADESDetectionTrainer):
        assert not any("margins" in state["method"] for state in states)
        assert not (compared.save_dir / "margins.csv").exists()
        return
    names = {f"images/{name}.jpg" for name in data.names("train")}
    for epoch, state in enumerate(states):
        sizes = state["method"]["margins"]
        assert set(sizes["ids"]) == names
        assert sizes["visits"] == [epoch + 1] * 8
        steps = [(value - 1.0) / 0.25 for value in sizes["values"]]
        assert len(set(steps)) > 1
        # Up or down at every visit, but for the upper end, two steps from the first size.
        assert all(step == round(step) and abs(step) <= min(epoch + 1, 3) and step <= 2 for step in steps)
    _, rows = table(compared.save_dir / "margins.csv")
    written = {row["id"]: float(row["margin"]) for row in rows}
    assert written == pytest.approx(dict(zip(sizes["ids"], sizes["values"], strict=True)))


def test_finished_checkpoints_hold_nothing_of_ours(compared: Any, data: Any) -> None:
    image = data.folder / "images" / f"{data.names('val')[0]}.jpg"
    for path in (compared.last, compared.best):
        checkpoint = torch.load(path, weights_only=False)
        assert checkpoint["ema"] is None
        assert not hasattr(checkpoint["model"], STATE)
        assert checkpoint["model"].criterion is None
        assert not set(checkpoint["train_args"]) & set(argument_names())
        assert len(YOLO(path).predict(image, imgsz=64, device="cpu", verbose=False)) == 1


# Running statistics


def counts(trainer: Any) -> set[int]:
    return {int(m.num_batches_tracked) for m in trainer.model.modules() if isinstance(m, nn.BatchNorm2d)}


def means(trainer: Any) -> Tensor:
    """Of all layers; the first would be too alike."""
    return torch.cat([m.running_mean for m in trainer.model.modules() if isinstance(m, nn.BatchNorm2d)])


@pytest.mark.parametrize(
    ("kind", "own", "bn", "passes"),
    [
        (SATDetectionTrainer, {}, "both", 2),
        (SATDetectionTrainer, {}, "clean", 1),
        (SATDetectionTrainer, {}, "adversarial", 1),
        (ATDetectionTrainer, {}, "both", 1),
        (ATDetectionTrainer, {}, "clean", 1),
        (AMATDetectionTrainer, {}, "both", 2),
        (AMATDetectionTrainer, {}, "clean", 1),
        (AMATDetectionTrainer, {}, "adversarial", 1),
        (TRADESDetectionTrainer, {}, "both", 2),
        (TRADESDetectionTrainer, {}, "clean", 1),
        (TRADESDetectionTrainer, {}, "adversarial", 1),
        (DPAATDetectionTrainer, {}, "both", 2),
        (DPAATDetectionTrainer, {}, "clean", 1),
        (DPAATDetectionTrainer, {}, "adversarial", 1),
        (DPAATDetectionTrainer, {"sync_weight": 0.0}, "both", 1),
        (DPAATDetectionTrainer, {"sync_weight": 0.0}, "clean", 1),
    ],
)
def test_training_passes_feed_the_running_statistics_and_attacks_do_not(
    run: Any, thresholds: Any, kind: type[Any], own: dict[str, Any], bn: str, passes: int
) -> None:
    noise = {"delta": 1.0, "thresholds": thresholds(5.0)} if kind is AMATDetectionTrainer else {"eps": 1.0}
    trainer = run(kind, bn=bn, steps=3, epochs=1, val=False, **noise, **own)
    assert counts(trainer) == {2 * passes}
    assert all(m.track_running_stats for m in trainer.model.modules() if isinstance(m, nn.BatchNorm2d))


def test_the_option_says_which_images_feed_the_running_statistics(run: Any, tools: Any) -> None:
    """After one batch, when the weights of all runs are still those they began with."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return {"on_train_batch_end": lambda trainer: seen.setdefault(name, means(trainer).clone())}

    common = {"epochs": 1, "val": False, **tools.STILL}
    run(DetectionTrainer, "stock", keep("stock"), **common)
    for bn in ("both", "clean", "adversarial"):
        run(SATDetectionTrainer, bn, keep(bn), bn=bn, eps=6.0, **common)
    run(ATDetectionTrainer, "at", keep("at"), eps=6.0, **common)
    for bn in ("clean", "adversarial"):
        run(TRADESDetectionTrainer, f"trades {bn}", keep(f"trades {bn}"), bn=bn, eps=6.0, **common)
        run(DPAATDetectionTrainer, f"dpaat {bn}", keep(f"dpaat {bn}"), bn=bn, eps=6.0, **common)
        # Without synchronisation no loss of clean images is learnt from: like AT, whatever the option says.
        run(DPAATDetectionTrainer, f"none {bn}", keep(f"none {bn}"), bn=bn, eps=6.0, sync_weight=0.0, **common)
    assert torch.equal(seen["clean"], seen["stock"])
    for name, same_as in (
        ("trades clean", "stock"),
        ("dpaat clean", "stock"),
        ("dpaat adversarial", "at"),  # its first attack is that of AT
        ("none clean", "at"),
        ("none adversarial", "at"),
    ):
        assert torch.equal(seen[name], seen[same_as]), name
    for other in ("stock", "at"):  # attacked images, but not those of AT
        assert (seen["trades adversarial"] - seen[other]).abs().max() > 1e-3
    assert torch.equal(seen["adversarial"], seen["at"])
    for one, other in (("adversarial", "clean"), ("both", "clean"), ("both", "adversarial")):
        assert (seen[one] - seen[other]).abs().max() > 1e-3


# What a run leaves behind


@pytest.fixture(scope="module")
def finished(make: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A self-calibrated AMAT run; ``saved`` are copies of last.pt as it was during the training."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("finished")
    trainer = make(AMATDetectionTrainer, folder, epochs=3, delta=0.5, plots=True, model="yolo26n.yaml")
    trainer.saved, trainer.weights_of_heads, trainer.criteria = [], [], []

    def keep(trainer: Any) -> None:
        trainer.saved.append(folder / f"{trainer.epoch}.pt")
        shutil.copy(trainer.last, trainer.saved[-1])
        trainer.weights_of_heads.append(trainer.terms.criterion.o2m)
        trainer.criteria.append(trainer.model.criterion)

    trainer.add_callback("on_model_save", keep)
    trainer.train()
    return trainer


def test_results_gain_our_columns(finished: Any) -> None:
    names, rows = table(finished.save_dir / "results.csv")
    ours = [name for name in names if "adv_" in name]
    assert ours == list(COLUMNS.values()) == names[-len(ours) :]
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3]
    assert [math.isnan(float(row["train/adv_loss_adversarial"])) for row in rows] == [True, False, False]
    for row in rows:
        assert None not in row
        assert float(row["train/adv_loss_clean"]) > 0
    for row in rows[1:]:
        margins = [float(row[f"train/adv_margin_{q}"]) for q in ("q05", "q50", "q95")]
        assert margins == sorted(margins)
        assert 0 <= float(row["train/adv_expanded"]) <= 1
        assert float(row["train/adv_attack_seconds"]) > 0
        assert float(row["train/adv_nonfinite"]) == 0
    assert (finished.save_dir / "results.png").stat().st_size > 1000


@pytest.mark.parametrize("val", [True, False])
def test_columns_keep_their_order(run: Any, val: bool, tools: Any) -> None:
    stock = run(DetectionTrainer, "stock", val=val, epochs=3)
    ours = run(SATDetectionTrainer, "ours", val=val, epochs=3, eps=0.5)
    expected = table(stock.save_dir / "results.csv")[0] + list(COLUMNS.values())
    names, rows = table(ours.save_dir / "results.csv")
    assert names == expected
    for row in rows:
        assert None not in row  # as many values as names
        assert float(row["train/adv_loss_clean"]) > 0.5
        assert math.isnan(float(row["train/adv_margin_q50"]))


def test_settings_are_written_down(finished: Any) -> None:
    text = (finished.save_dir / "adversarial.yaml").read_text()
    found = yaml.safe_load(text)
    assert found["delta"] == 0.5
    assert found["eps"] == pytest.approx(10 * 64 / 320)  # the default, for 64 pixels instead of 320
    assert found["steps"] == 1
    assert "# method: AMAT" in text
    assert set(found) == set(argument_names()), "it can be passed on as cfg=adversarial.yaml"
    arguments = yaml.safe_load((finished.save_dir / "args.yaml").read_text())
    assert not set(arguments) & set(argument_names())


def test_margins_are_written_down(finished: Any, data: Any) -> None:
    _, rows = table(finished.save_dir / "margins.csv")
    assert {row["id"] for row in rows} == {f"images/{name}.jpg" for name in data.names("train")}
    assert {row["visits"] for row in rows} == {"2"}  # one of the three epochs was clean
    kept = dict(zip(finished.run.method.margins.ids(), finished.run.method.margins.values().tolist(), strict=True))
    for row in rows:
        assert float(row["margin"]) == pytest.approx(kept[row["id"]])


def plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(plain, value)) and all(map(plain, value.values()))
    if isinstance(value, (list, tuple)):
        return type(value) in (list, tuple) and all(map(plain, value))
    return value is None or type(value) in (bool, int, float, str)


def test_checkpoints_hold_plain_values_while_training_and_nothing_afterwards(finished: Any) -> None:
    for epoch, path in enumerate(finished.saved):
        network = torch.load(path, weights_only=False)["ema"]
        state = getattr(network, STATE)
        assert plain(state)
        assert len(state["method"]["margins"]["ids"]) == (0 if epoch == 0 else 8)
        assert state["images"]["count"] == 8
        assert network.criterion is None
    for path in (finished.last, finished.best):
        checkpoint = torch.load(path, weights_only=False)
        assert checkpoint["optimizer"] is None
        assert checkpoint["ema"] is None
        assert not hasattr(checkpoint["model"], STATE)
        assert not set(checkpoint["train_args"]) & set(argument_names())
    assert not hasattr(finished.ema.ema, STATE)


def test_the_weights_of_two_heads_move_as_in_the_stock_training(finished: Any) -> None:
    host = finished.model.init_criterion()
    wanted = []
    for _ in range(3):
        host.update()
        wanted.append(host.o2m)
    assert finished.weights_of_heads == pytest.approx(wanted)
    assert len(set(wanted)) > 1


def test_the_criterion_is_left_out_of_copies(finished: Any) -> None:
    criterion = finished.criteria[0]
    assert isinstance(criterion, MethodCriterion)
    assert copy.deepcopy(criterion) is None
    assert copy.copy(criterion) is None
    assert pickle.loads(pickle.dumps(criterion)) is None
    assert copy.deepcopy(finished.model).criterion is None
    assert criterion.one2many is finished.terms.criterion.one2many
    assert not hasattr(criterion, "something_else")


WITHOUT_US = """
import os, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("adv_yolo", "adv_nnunet", "advmed"):
            raise ModuleNotFoundError(f"{name} is not installed here", name=name)

sys.meta_path.insert(0, Blocker())
import torch
torch.set_num_threads(1)
from ultralytics import YOLO

data, image, middle, *paths = sys.argv[1:]
quiet = dict(imgsz=64, device="cpu", verbose=False, project=os.getcwd())
assert hasattr(torch.load(middle, weights_only=False)["ema"], "advmed")
for path in (middle, *paths):
    model = YOLO(path)
    assert len(model.predict(image, **quiet)) == 1
    assert model.val(data=data, plots=False, workers=0, **quiet).box.map >= 0
exported = YOLO(paths[-1]).export(format="torchscript", imgsz=64, device="cpu")
assert YOLO(exported, task="detect").predict(image, **quiet)[0].orig_shape
try:
    import adv_yolo
except ModuleNotFoundError:
    print("fine without us")
"""


@pytest.mark.slow
def test_checkpoints_work_where_our_packages_are_not_installed(finished: Any, data: Any, tmp_path: Path) -> None:
    image = data.folder / "images" / f"{data.names('val')[0]}.jpg"
    paths = [tmp_path / "last.pt", tmp_path / "best.pt"]
    for path in paths:
        shutil.copy(finished.wdir / path.name, path)
    words = [str(word) for word in (data.yaml, image, finished.saved[1], *paths)]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_US, *words], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fine without us" in done.stdout


# AMAT


def test_margins_grow_by_delta_a_visit_while_nothing_is_too_much(run: Any, thresholds: Any, data: Any) -> None:
    trainer = run(AMATDetectionTrainer, delta=0.25, thresholds=thresholds(math.inf), epochs=3, val=False)
    margins = trainer.run.method.margins
    assert sorted(margins.ids()) == [f"images/{name}.jpg" for name in data.names("train")]
    assert margins.visits().tolist() == [3] * 8
    assert margins.values().tolist() == pytest.approx([0.25 * 4] * 8)
    _, rows = table(trainer.save_dir / "results.csv")
    assert [float(row["train/adv_margin_q50"]) for row in rows] == pytest.approx([0.5, 0.75, 1.0])
    assert [float(row["train/adv_expanded"]) for row in rows] == [1.0] * 3


def test_margins_stay_where_they_are_while_everything_is_too_much(run: Any, thresholds: Any) -> None:
    """The attack ends on the sphere, where no range of pixels keeps it from."""
    trainer = run(AMATDetectionTrainer, delta=0.25, thresholds=thresholds(-math.inf), val=False, bounds=None)
    assert trainer.run.method.margins.values().tolist() == pytest.approx([0.25] * 8, rel=1e-5)
    assert trainer.run.method.margins.visits().tolist() == [2] * 8


def test_self_calibrated_thresholds_begin_after_the_warm_up(run: Any, lines: list[str]) -> None:
    trainer = run(AMATDetectionTrainer, epochs=4, clean_epochs=2, delta=0.5, val=False)
    assert isinstance(trainer.run.thresholds, RunningThresholds)
    assert trainer.run.thresholds.names == TERMS
    assert trainer.run.method.margins.visits().tolist() == [2] * 8
    said = [line for line in lines if "Warm-up done. Thresholds: box_loss < " in line]
    assert len(said) == 1
    assert any("margins can reach about 1.00" in line for line in lines)
    assert any("self-calibrated" in line for line in lines)


def test_thresholds_are_measured_on_a_trained_model(run: Any, networks: Any, tools: Any, tmp_path: Path) -> None:
    path = tools.save(networks("yolov8n"), tmp_path / "std.pt")
    trainer = run(AMATDetectionTrainer, thresholds=str(path), epochs=1, val=False)
    found = trainer.run.thresholds
    assert isinstance(found, Thresholds)
    assert (found.n, found.rule, found.names) == (8, "mean+2std", TERMS)
    assert found.values == pytest.approx([m + 2 * s for m, s in zip(found.mean, found.std, strict=True)])
    assert trainer.run.method.margins.visits().tolist() == [1] * 8


@pytest.mark.parametrize("kind", [AMATDetectionTrainer, DPAATDetectionTrainer])
def test_mosaic_is_off_where_images_have_noise_levels_and_says_so(
    make: Any, tmp_path: Path, lines: list[str], kind: type[Any]
) -> None:
    trainer = make(kind, tmp_path)
    assert trainer.args.mosaic == 0
    (said,) = (line for line in lines if "so that a noise level belongs to one image" in line)
    assert f"{kind.method_name}:" in said
    assert "mosaic=0.0" in said
    assert not any("WARNING" in line and "mosaic" in line for line in lines)


@pytest.mark.parametrize("kind", [SATDetectionTrainer, ATDetectionTrainer, TRADESDetectionTrainer])
def test_mosaic_stays_as_it_is_for_other_methods(make: Any, tmp_path: Path, lines: list[str], kind: type[Any]) -> None:
    assert make(kind, tmp_path, eps=1.0, mixup=0.5).args.mosaic == DEFAULT_CFG_DICT["mosaic"] == 1.0
    assert not any("noise level" in line for line in lines)


def test_a_warning_of_mixed_images_names_the_method(make: Any, tmp_path: Path, lines: list[str]) -> None:
    assert make(DPAATDetectionTrainer, tmp_path, mosaic=1.0).args.mosaic == 1
    (said,) = (line for line in lines if "several images become one" in line)
    assert said.startswith("WARNING")
    assert "DPAAT with mosaic=1.0:" in said
    assert not any("so that a noise level belongs to one image" in line for line in lines)


def test_images_that_are_mixed_on_request_warn_and_keep_stable_ids(run: Any, data: Any, lines: list[str]) -> None:
    trainer = run(AMATDetectionTrainer, mosaic=1.0, mixup=0.5, close_mosaic=1, clean_epochs=1, epochs=3, val=False)
    assert any(line.startswith("WARNING") and "mosaic=1.0, mixup=0.5" in line for line in lines)
    assert set(trainer.run.method.margins.ids()) == {f"images/{name}.jpg" for name in data.names("train")}
    assert trainer.run.method.margins.visits().tolist() == [2] * 8


# Resuming


class Interrupted(Exception):
    """The run was interrupted."""


def interrupt(epoch: int, batch: int = 1) -> dict[str, Any]:
    """A callback that raises in an epoch, after some of its batches."""
    seen: list[int] = []

    def stop(trainer: Any) -> None:
        if trainer.epoch == epoch:
            seen.append(1)
            if len(seen) == batch:
                raise Interrupted

    return {"on_train_batch_end": stop}


@pytest.fixture
def broken(make: Any, tmp_path: Path) -> Callable[..., Path]:
    """The last.pt of a run that was interrupted in its third epoch of four."""

    def stopped(kind: type[Any] = AMATDetectionTrainer, folder: str = "broken", **arguments: Any) -> Path:
        trainer = make(kind, tmp_path / folder, epochs=4, **arguments)
        trainer.add_callback("on_train_batch_end", interrupt(2)["on_train_batch_end"])
        with pytest.raises(Interrupted):
            trainer.train()
        return Path(trainer.last)

    return stopped


def resume(kind: type[Any], last: Path, callbacks: dict[str, Any] | None = None, **arguments: Any) -> Any:
    trainer = kind(overrides={"model": str(last), "resume": str(last), **arguments})
    for event, callback in (callbacks or {}).items():
        trainer.add_callback(event, callback)
    trainer.train()
    return trainer


def test_a_resumed_run_continues_with_its_margins_thresholds_and_settings(
    broken: Any, lines: list[str], data: Any
) -> None:
    last = broken(delta=0.25, steps=2, refinement="crossing", random_start=0.5)
    state = getattr(torch.load(last, weights_only=False)["ema"], STATE)
    found: dict[str, Any] = {}

    def look(trainer: Any) -> None:
        found.setdefault("state", trainer.run.state_dict())
        found.setdefault("settings", trainer.settings)

    lines.clear()
    trainer = resume(AMATDetectionTrainer, last, {"on_train_epoch_start": look}, delta=9.0, steps=7)
    assert found["state"] == {key: state[key] for key in found["state"]}
    assert (found["settings"].delta, found["settings"].steps, found["settings"].refinement) == (0.25, 2, "crossing")
    assert any("WARNING" in line and "Resume ignores ['delta', 'steps']" in line for line in lines)
    assert trainer.run.method.margins.visits().tolist() == [3] * 8  # of four epochs one was clean
    assert state["method"]["margins"]["visits"] == [1] * 8  # the interrupted epoch left nothing
    assert state["method"]["thresholds"]["ceiling"] is not None
    assert epochs(trainer.save_dir / "results.csv") == [1, 2, 3, 4]
    assert trainer.save_dir == last.parents[1]
    assert not any("settings changed" in line for line in lines)


def test_a_resumed_run_continues_with_its_perturbation_sizes(broken: Any, lines: list[str]) -> None:
    given = {"eps": 1.0, "step_size": 0.25, "eps_min": 0.5, "eps_max": 2.0, "average": "epoch", "sync_weight": 2.0}
    last = broken(DPAATDetectionTrainer, **given)
    state = getattr(torch.load(last, weights_only=False)["ema"], STATE)["method"]
    assert state["margins"]["visits"] == [2] * 8  # the interrupted epoch left nothing
    found: dict[str, Any] = {}

    def look(trainer: Any) -> None:
        found.setdefault("state", trainer.run.method.state_dict())

    lines.clear()
    trainer = resume(DPAATDetectionTrainer, last, {"on_train_epoch_start": look})
    assert found["state"]["margins"] == state["margins"]
    assert found["state"]["steps_done"] == state["steps_done"] == 4
    assert found["state"]["increases"] == [0.0, 0.0], "the mean of an epoch is that of this epoch"
    assert {name: getattr(trainer.settings, name) for name in given} == given
    assert (trainer.run.method.lowest, trainer.run.method.highest, trainer.run.method.average) == (0.5, 2.0, "epoch")
    assert trainer.run.method.sizes.visits().tolist() == [4] * 8
    assert epochs(trainer.save_dir / "results.csv") == [1, 2, 3, 4]
    assert sum("noise levels" in line and "of the visits let one grow" in line for line in lines) == 2


def test_thresholds_from_a_file_are_kept_when_it_has_gone(broken: Any, thresholds: Any, tmp_path: Path) -> None:
    path = shutil.copy(thresholds(3.0), tmp_path / "thresholds.json")
    last = broken(thresholds=str(path))
    Path(path).unlink()
    trainer = resume(AMATDetectionTrainer, last)
    assert trainer.run.thresholds.values == (3.0,) * 3
    assert trainer.run.method.margins.visits().tolist() == [4] * 8


def test_a_resumed_run_with_two_heads_goes_on_with_their_weights(broken: Any, tools: Any) -> None:
    last = broken(SATDetectionTrainer, model=tools.TWO_HEADS, eps=0.5)
    seen: list[float] = []
    look = {"on_train_epoch_start": lambda trainer: seen.append(trainer.terms.criterion.o2m)}
    trainer = resume(SATDetectionTrainer, last, look)
    host = trainer.model.init_criterion()
    wanted = []
    for _ in range(3):
        host.update()
        wanted.append(host.o2m)
    assert seen == pytest.approx(wanted[1:])
    assert trainer.run.method.steps_done == 8


KILLED = """
import os, signal, sys
import torch
from ultralytics import YOLO
from adv_yolo import AMATDetectionTrainer

torch.set_num_threads(1)
model = YOLO("yolov8n.yaml")

def kill(trainer):
    if trainer.epoch == 2:
        os.kill(os.getpid(), signal.SIGKILL)

model.add_callback("on_train_batch_end", kill)
model.train(trainer=AMATDetectionTrainer, **eval(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_killed_run_is_resumed(data: Any, tools: Any, tmp_path: Path) -> None:
    arguments = {**tools.QUIET, "data": str(data.yaml), "project": str(tmp_path), "name": "killed", "epochs": 4}
    arguments |= {"delta": 0.5, **SHORT}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, repr(arguments)], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    last = tmp_path / "killed" / "weights" / "last.pt"
    before = (last.parents[1] / "margins.csv").read_text()
    assert "images/" in before
    model = YOLO(str(last))
    model.train(resume=True, trainer=AMATDetectionTrainer)
    assert epochs(last.parents[1] / "results.csv") == [1, 2, 3, 4]
    _, rows = table(last.parents[1] / "margins.csv")
    assert {row["visits"] for row in rows} == {"3"}
    assert not hasattr(load_checkpoint(last)[0], STATE)


def test_a_data_set_that_moved_keeps_its_margins(broken: Any, make_data: Any, tmp_path: Path) -> None:
    own = make_data("first")
    last = broken(source=own)
    shutil.copytree(own.folder, tmp_path / "second")
    shutil.rmtree(own.folder)
    trainer = resume(AMATDetectionTrainer, last, data=str(tmp_path / "second" / own.yaml.name))
    assert trainer.run.method.margins.visits().tolist() == [3] * 8


@pytest.mark.parametrize("kind", [AMATDetectionTrainer, SATDetectionTrainer, DPAATDetectionTrainer])
@pytest.mark.parametrize("change", ["one less", "one more", "another"])
def test_a_run_whose_images_have_changed_is_not_resumed(
    broken: Any, make_data: Any, kind: type[Any], change: str
) -> None:
    own = make_data()
    last = broken(kind, source=own, **({} if kind is AMATDetectionTrainer else {"eps": 0.5}))
    names, other = own.names("train"), own.names("val")[0]
    changed = {"one less": names[:-1], "one more": [*names, other], "another": [*names[:-1], other]}[change]
    own.list("train", changed)
    with pytest.raises(ValueError, match=rf"images have changed.*8 then, {len(changed)} now"):
        resume(kind, last)


def test_a_stock_run_and_a_run_of_another_method_are_not_resumed(broken: Any) -> None:
    last = broken(DetectionTrainer, "stock")
    with pytest.raises(ValueError, match="no unfinished training of AMATDetectionTrainer: it holds no margins"):
        resume(AMATDetectionTrainer, last)
    last = broken(SATDetectionTrainer, "sat", eps=0.5)
    for kind in (AMATDetectionTrainer, DPAATDetectionTrainer):
        with pytest.raises(ValueError, match=f"no unfinished training of {kind.__name__}: it holds a run of SAT"):
            resume(kind, last)


def test_a_finished_run_is_a_starting_point_for_another_but_not_resumed(finished: Any, run: Any) -> None:
    with pytest.raises((AssertionError, ValueError), match=r"finished, nothing to resume|no unfinished training"):
        resume(AMATDetectionTrainer, finished.last)
    again = run(SATDetectionTrainer, model=str(finished.last), eps=0.5, epochs=1, val=False)
    assert again.run.method.steps_done == 2


# Epochs that begin again


@pytest.mark.parametrize("source", ["file", "self-calibrated"])
def test_an_epoch_lost_to_a_nan_leaves_no_mark_on_the_margins(
    run: Any, thresholds: Any, lines: list[str], source: str
) -> None:
    begun: list[tuple[int, Any]] = []
    poisoned: list[int] = []

    def look(trainer: Any) -> None:
        begun.append((trainer.epoch, copy.deepcopy(trainer.run.method.state_dict())))

    def poison(trainer: Any) -> None:
        if trainer.epoch == 2 and len(poisoned) < 2:
            poisoned.append(1)
            if len(poisoned) == 2:  # after the epoch's last batch
                trainer.loss = trainer.loss * math.nan

    own = {"thresholds": thresholds(math.inf)} if source == "file" else {}
    trainer = run(
        AMATDetectionTrainer,
        callbacks={"on_train_epoch_start": look, "on_train_batch_end": poison},
        delta=0.25,
        epochs=4,
        **own,
    )
    assert [epoch for epoch, _ in begun] == [0, 1, 2, 2, 3]
    assert begun[2][1] == begun[3][1]
    assert begun[3][1] != begun[4][1]
    adversarial = 4 if source == "file" else 3
    assert trainer.run.method.margins.visits().tolist() == [adversarial] * 8
    assert trainer.run.method.steps_done == 2 * adversarial
    assert any("Epoch 3 begins again: margins and thresholds are back at its start" in line for line in lines)
    assert epochs(trainer.save_dir / "results.csv") == [1, 2, 3, 4]


class Starved(AMATDetectionTrainer):
    """Runs out of memory once, after the attack of the second batch."""

    left = 1

    def method_loss(self, predictions: Any, batch: dict[str, Any]) -> Any:
        result = super().method_loss(predictions, batch)
        if self.run.method.steps_done == 2 and self.left:
            self.left -= 1
            raise RuntimeError("CUDA out of memory")
        return result


def test_the_epoch_is_begun_again_when_memory_runs_out(run: Any, thresholds: Any) -> None:
    trainer = run(Starved, delta=0.25, thresholds=thresholds(math.inf), val=False)
    assert trainer.left == 0
    assert trainer.batch_size == 2
    margins = trainer.run.method.margins
    assert margins.visits().tolist() == [2] * 8
    assert margins.values().tolist() == pytest.approx([0.75] * 8)
    assert trainer.run.method.steps_done == 2 * 4
    assert epochs(trainer.save_dir / "results.csv") == [1, 2]


class Collapsed(SATDetectionTrainer):
    """Runs out of memory within a training pass whose images are kept out of the running statistics."""

    left = 1

    def preprocess_batch(self, batch: dict[str, Any]) -> Any:
        batch = super().preprocess_batch(batch)
        if self.left:
            self.left -= 1
            raise RuntimeError("CUDA out of memory")
        return batch


def test_running_statistics_are_held_no_longer_after_an_exception(run: Any) -> None:
    trainer = run(Collapsed, eps=0.5, bn="adversarial", val=False, epochs=1)
    assert trainer.batch_size == 2
    assert counts(trainer) == {4}
    assert all(m.track_running_stats for m in trainer.model.modules() if isinstance(m, nn.BatchNorm2d))


def test_attack_steps_lost_to_bad_gradients_are_counted_and_warned_of(
    run: Any, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    grad = torch.autograd.grad

    def overflowing(*given: Any, **named: Any) -> Any:
        (gradient,) = grad(*given, **named)
        gradient[0] = math.inf
        return (gradient,)

    monkeypatch.setattr(torch.autograd, "grad", overflowing)
    trainer = run(SATDetectionTrainer, eps=0.5, steps=3, epochs=1)
    _, rows = table(trainer.save_dir / "results.csv")
    assert float(rows[0]["train/adv_nonfinite"]) == 2 * 3  # an image in each batch, in every step
    assert any(line.startswith("WARNING") and "6 attack step(s) were skipped" in line for line in lines)
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())


# Several GPUs


def test_our_arguments_reach_the_processes_that_the_host_starts(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thresholds: Any
) -> None:
    """The host pickles ``vars(trainer.args)`` and makes the trainer anew from it (ultralytics.utils.dist)."""
    own = {"delta": 0.7, "clean_epochs": 1, "thresholds": thresholds(2.0), "norm": math.inf, "bounds": None}
    trainer = make(AMATDetectionTrainer, tmp_path, **own)
    handed: list[dict[str, Any]] = []
    monkeypatch.setattr(BaseTrainer, "train", lambda self: handed.append(dict(vars(self.args))))
    trainer.ddp = True
    trainer.train()
    buffer = io.BytesIO()
    torch.save({"trainer": type(trainer), "args": handed[0]}, buffer)
    state = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert state["trainer"] is AMATDetectionTrainer
    again = state["trainer"](cfg={**DEFAULT_CFG_DICT, "save_dir": ""}, overrides=state["args"])
    assert again.settings == trainer.settings
    assert not set(vars(again.args)) & set(argument_names())
    assert again.save_dir == trainer.save_dir
    assert again.args.mosaic == 0


def test_sequential_backward_needs_a_single_process(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = DetectionTrainer.__init__

    def two(self: Any, *given: Any, **named: Any) -> None:
        host(self, *given, **named)
        self.world_size = 2

    monkeypatch.setattr(DetectionTrainer, "__init__", two)
    with pytest.raises(ValueError, match="backward=sequential works in a single process"):
        make(SATDetectionTrainer, tmp_path, eps=1.0, backward="sequential")
    make(SATDetectionTrainer, tmp_path, eps=1.0)


# Through the facade


def test_the_facade_trains_with_our_trainers_and_predicts_afterwards(data: Any, tools: Any, tmp_path: Path) -> None:
    model = YOLO("yolov5n.yaml")
    arguments = {**tools.QUIET, "data": str(data.yaml), "project": str(tmp_path), "name": "run", "epochs": 2}
    model.train(trainer=ATDetectionTrainer, eps=0.5, **SHORT, **arguments)
    assert isinstance(model.trainer, ATDetectionTrainer)
    image = data.folder / "images" / f"{data.names('val')[0]}.jpg"
    assert len(model.predict(image, imgsz=64, device="cpu", verbose=False)) == 1
    _, rows = table(tmp_path / "run" / "results.csv")
    assert all(math.isnan(float(row["train/adv_loss_clean"])) for row in rows)
    assert all(float(row["train/adv_loss_adversarial"]) > 0 for row in rows)


# Bad input


TOGETHER = r"^{} compares the predictions of its two passes, .* one after the other: use backward 'together'$"


@pytest.mark.parametrize(
    ("kind", "arguments", "error", "message"),
    [
        (AMATDetectionTrainer, {"delt": 1.0}, SyntaxError, "delta"),
        (AMATDetectionTrainer, {"delta": 0}, ValueError, "delta must be a finite number > 0"),
        (AMATDetectionTrainer, {"delta": -1.0}, ValueError, "delta must be a finite number > 0"),
        (AMATDetectionTrainer, {"delta": "much"}, ValueError, "delta must be a number or null, got 'much'"),
        (AMATDetectionTrainer, {"bn": "none"}, ValueError, "bn must be 'both' or 'clean' or 'adversarial'"),
        (AMATDetectionTrainer, {"refinement": "x"}, ValueError, "refinement must be 'paper' or 'crossing'"),
        (AMATDetectionTrainer, {"clean_epochs": -1}, ValueError, "clean_epochs must be >= 0, got -1"),
        (AMATDetectionTrainer, {"clean_epochs": "x"}, ValueError, "clean_epochs must be a whole number"),
        (SATDetectionTrainer, {"eps": -1.0}, ValueError, "eps must be a finite number >= 0"),
        (TRADESDetectionTrainer, {"beta": 0}, ValueError, "beta must be a finite number > 0"),
        (DPAATDetectionTrainer, {"sync_weight": -1}, ValueError, "sync_weight must be a finite number >= 0"),
        (DPAATDetectionTrainer, {"average": "week"}, ValueError, "average must be 'batch' or 'epoch'"),
        (DPAATDetectionTrainer, {"eps": 2.0, "eps_max": 1.0}, ValueError, "got eps_min 0, eps 2, eps_max 1$"),
        (TRADESDetectionTrainer, {"backward": "sequential"}, ValueError, TOGETHER.format("TRADES")),
        (DPAATDetectionTrainer, {"backward": "sequential"}, ValueError, TOGETHER.format("DPAAT")),
        (SATDetectionTrainer, {"steps": 0}, ValueError, "steps must be a whole number >= 1"),
        (SATDetectionTrainer, {"norm": 1}, ValueError, "norm"),
        (SATDetectionTrainer, {"task": "segment"}, TypeError, "trains detection models, not task=segment"),
        (SATDetectionTrainer, {"distill_model": "x.pt"}, ValueError, "distill_model"),
        (AMATDetectionTrainer, {"thresholds": "no.json"}, FileNotFoundError, "thresholds=no.json: there is no such"),
        (AMATDetectionTrainer, {"data": "no/such.yaml"}, RuntimeError, "no/such.yaml"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(
    make: Any, tmp_path: Path, kind: type[Any], arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(kind, tmp_path, **arguments)
    if "data" not in arguments:
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "arguments", "error", "message"),
    [
        (AMATDetectionTrainer, {"model": "yolov8n-seg.yaml"}, (TypeError, ValueError), "detection model"),
        (AMATDetectionTrainer, {"clean_epochs": 0}, ValueError, "AMAT has no thresholds: clean_epochs=0 rules out"),
        (AMATDetectionTrainer, {"clean_epochs": 2}, ValueError, r"clean_epochs .*leaves no adversarial epoch of 2"),
        (AMATDetectionTrainer, {"epochs": 1}, ValueError, r"clean_epochs .*leaves no adversarial epoch of 1"),
        (
            DPAATDetectionTrainer,
            {"eps_min": 3.0},  # above the default for 64 pixels
            ValueError,
            "^perturbation sizes need eps_min <= eps <= eps_max, got eps_min 3, eps 2, eps_max 4$",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_first_epoch(
    make: Any, tmp_path: Path, kind: type[Any], arguments: dict[str, Any], error: Any, message: str
) -> None:
    trainer = make(kind, tmp_path, **arguments)
    trainer.add_callback("on_train_epoch_start", lambda _: pytest.fail("an epoch began"))
    with pytest.raises(error, match=message):
        trainer.train()


def test_thresholds_of_another_family_are_refused(
    make: Any, tmp_path: Path, thresholds: Any, networks: Any, tools: Any
) -> None:
    other = ("box_loss", "cls_loss", "l1_loss")
    path = tools.save(networks("yolo26n"), tmp_path / "other.pt")
    for source in (thresholds(1.0, other), str(path)):
        trainer = make(AMATDetectionTrainer, tmp_path, thresholds=source)
        with pytest.raises(ValueError, match=r"K = 3 loss terms .*l1_loss.* K = 3 terms .*dfl_loss"):
            trainer.train()
    trainer = make(AMATDetectionTrainer, tmp_path, thresholds=thresholds(1.0, other[:2]))
    with pytest.raises(ValueError, match=r"K = 2 loss terms .* K = 3 terms"):
        trainer.train()


def test_thresholds_cannot_be_measured_on_a_model_of_other_classes(
    make: Any, make_data: Any, tmp_path: Path, trained: Path, tools: Any
) -> None:
    own = make_data()
    own.describe([*tools.CLASSES, "another"])
    trainer = make(AMATDetectionTrainer, tmp_path, own, thresholds=str(trained))
    with pytest.raises(ValueError, match=r"predicts 3 class\(es\) .* the data set has 4"):
        trainer.train()


def test_thresholds_without_mean_and_std_take_no_other_rule(make: Any, tmp_path: Path, thresholds: Any) -> None:
    trainer = make(AMATDetectionTrainer, tmp_path, thresholds=thresholds(1.0), rule="mean")
    with pytest.raises(ValueError, match="hold no mean and std"):
        trainer.train()


def test_labels_without_any_object_are_refused(make: Any, make_data: Any, tmp_path: Path) -> None:
    own = make_data()
    for name in own.names("train"):
        own.write_labels(name, [])
    trainer = make(SATDetectionTrainer, tmp_path, own, eps=1.0)
    with pytest.raises(ValueError, match=r"none of the 8 training images has an object.*labels/a\.txt"):
        trainer.train()


def test_a_batch_of_background_images_trains(make: Any, make_data: Any, tmp_path: Path, thresholds: Any) -> None:
    own = make_data()
    for name in own.names("train")[1:]:
        own.write_labels(name, [])
    trainer = make(
        AMATDetectionTrainer, tmp_path, own, delta=0.5, thresholds=thresholds(math.inf), epochs=1, batch=2, val=False
    )
    trainer.train()
    assert trainer.run.method.margins.visits().tolist() == [1] * 8
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())

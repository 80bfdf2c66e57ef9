"""The trainers against the stock one: weights, steps, statistics, checkpoints, interruptions and bad input."""

from __future__ import annotations

import copy
import math
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn
from ultralytics import YOLO
from ultralytics.cfg import get_cfg
from ultralytics.data.utils import check_det_dataset
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.models.yolo.detect import DetectionTrainer, DetectionValidator
from ultralytics.nn.tasks import DetectionModel, load_checkpoint
from ultralytics.utils import DEFAULT_CFG_DICT, YAML, callbacks, downloads
from ultralytics.utils.callbacks import tensorboard, wb
from ultralytics.utils.plotting import plot_results

from adv_yolo import AMATDetectionTrainer, attack, calibration
from adv_yolo.checkpoint import STATE
from adv_yolo.settings import argument_names, arguments_of
from adv_yolo.trainer import COLUMNS, ROBUST, TRAINERS, MethodCriterion, epochs_of, widened
from advmed.thresholds import RunningThresholds, Thresholds
from advmed.training.run import MethodRun
from helpers.detection import CLASSES, ONE_HEAD, STILL, TERMS, TWO_HEADS, DataSet, divergence, epochs, save
from helpers.hosts import (
    BLOCKER,
    Interrupted,
    as_on_a_terminal,
    different,
    margins_of,
    overflow,
    plain,
    table,
    watched,
)

pytestmark = pytest.mark.slow

OTHER_TERMS = ("box_loss", "cls_loss", "l1_loss")
"""Of two heads."""


@pytest.fixture
def run(make: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    def trained(kind: str | type[Any], name: str = "own", on: dict[str, Any] | None = None, **arguments: Any) -> Any:
        trainer = make(kind, tmp_path / name, **arguments)
        for event, callback in (on or {}).items():
            trainer.add_callback(event, callback)
        trainer.train()
        return trainer

    return trained


def changed(first: nn.Module, second: nn.Module) -> list[str]:
    return different(first.state_dict(), second.state_dict())


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"model": TWO_HEADS},
        {"cls_pw": 1.0, "cls": 2.0, "val": False},
        {"multi_scale": 0.5, "imgsz": 96, "fliplr": 0.5},
        {"freeze": 2, "nbs": 8, "single_cls": True},
    ],
    ids=str,
)
def test_noise_of_nothing_is_the_stock_training_bit_for_bit(run: Any, arguments: dict[str, Any]) -> None:
    given = {**STILL, **arguments}
    stock = run("stock", "stock", **given)
    ours = run("sat", "ours", eps=0.0, bn="clean", **given)  # which no attacked validation judges
    assert not changed(stock.model, ours.model)
    assert not changed(stock.ema.ema, ours.ema.ema)
    expected, rows = (table(trainer.save_dir / "results.csv") for trainer in (stock, ours))
    for row in rows:
        assert list(row)[: len(expected[0])] == list(expected[0]), "ours are the last ones"
        assert all(row.values()), "as many values as names"
    kinds = ("loss_clean", "loss_adversarial", "nonfinite", "attack_seconds")
    assert list(rows[0])[len(expected[0]) :] == [COLUMNS[kind] for kind in kinds], (
        "none that this method has no value of"
    )
    other = run("sat", "other", eps=2.0, bn="clean", **{**given, "val": False})
    assert len(changed(stock.model, other.model)) > 20
    assert all(value.isfinite().all() for value in other.model.state_dict().values())


def test_noise_of_nothing_is_the_stock_training_in_half_precision(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host has it on GPUs only; autocast keeps its casts of the weights from pass to pass everywhere."""
    half = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    monkeypatch.setattr("ultralytics.engine.trainer.autocast", lambda *_, **__: half())
    given = {**STILL, "val": False}
    stock = run("stock", "stock", **given)
    for backward in ("together", "sequential"):
        ours = run("sat", f"{backward} 0", eps=0.0, bn="clean", backward=backward, **given)
        assert backward == "sequential" or not changed(stock.model, ours.model)
        for name, value in stock.model.state_dict().items():
            torch.testing.assert_close(ours.model.state_dict()[name], value, rtol=1e-2, atol=1e-4, msg=name)
        other = run("sat", f"{backward} 2", eps=2.0, bn="clean", backward=backward, **given)
        assert len(changed(stock.model, other.model)) > 20
        assert other.run.method.steps_done == 4


def test_the_clean_warm_up_is_the_stock_training_bit_for_bit(run: Any) -> None:
    ends: list[nn.Module] = []

    def keep(trainer: Any) -> None:
        if trainer.epoch == 0:
            ends.append(copy.deepcopy(trainer.model))

    for kind in ("stock", "amat"):
        run(kind, kind, {"on_train_epoch_end": keep}, val=False, **STILL)
    assert not changed(*ends)


LOSS = {"amat": (0.5, 0.5), "sat": (0.5, 0.5), "at": (0, 1), "trades": (1, 0), "dpaat": (0, 1)}
"""What the host's loss on clean and on attacked images counts for."""
SEQUENTIAL = {"backward": "sequential"}


def test_a_failed_write_leaves_the_old_checkpoint(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a kill while the host writes would: there is always one to go on from."""
    trainer = make("sat", tmp_path, epochs=3, save_period=1)
    kept: dict[str, bytes] = {}
    write = Path.write_bytes

    def full_disk(path: Path, content: bytes) -> int:
        if path.suffix == ".pt" and trainer.epoch == 1:
            kept.update({file.name: file.read_bytes() for file in trainer.last.parents[1].glob("*.pt")})
            write(path, content[:1000])
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    assert set(kept) == {"last.pt", "best.pt", "epoch0.pt"}
    assert {path.name: path.read_bytes() for path in trainer.wdir.iterdir()} == kept
    assert torch.load(trainer.last, weights_only=False)["epoch"] == 0


def test_images_under_two_names_are_pointed_out(make: Any, tmp_path: Path, said: list[str]) -> None:
    """In training and validation, and with other objects; a file that is listed twice is none of them."""
    own = DataSet(tmp_path / "own")
    train, val = own.names("train"), own.names("val")
    own.list("train", [*train, train[0]])
    shutil.copy(own.folder / f"images/{train[0]}.jpg", own.folder / f"images/{val[0]}.jpg")
    own.write_labels(val[0], own.labels(train[0]))
    shutil.copy(own.folder / f"images/{train[2]}.jpg", own.folder / f"images/{train[3]}.jpg")
    trainer = make("sat", tmp_path, own, epochs=1)
    trainer.train()
    warned = [line for line in said if line.startswith("WARNING") and "copy of" in line]
    assert len(warned) == 2
    assert f"1 image(s) have two truths, such as images/{train[3]}.jpg of train, a copy of " in warned[0]
    assert f"1 image(s) are in two splits, such as images/{val[0]}.jpg of val, a copy of " in warned[1]


@pytest.mark.parametrize(
    ("model", "arguments", "branch"),
    [(ONE_HEAD, {}, None), (TWO_HEADS, {}, "one2many"), (TWO_HEADS, {"nms": False}, "one2one")],
    ids=["one head", "two heads", "the second head"],
)
@pytest.mark.parametrize(
    ("kind", "own"),
    [
        *(("trades", {"beta": 3.0}), ("dpaat", {"sync_weight": 3.0}), ("at", {})),
        *(("dpaat", {"sync_weight": 0.0}), ("dpaat", {"sync_weight": 0.0, **SEQUENTIAL})),
        *(("amat", {"margin_min": 1.5}), ("sat", SEQUENTIAL)),
    ],
    ids=str,
)
def test_the_loss_is_that_of_the_host_and_the_weighted_distance(
    make: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    thresholds: Any,
    kind: str,
    own: dict[str, Any],
    model: str,
    arguments: dict[str, Any],
    branch: str | None,
) -> None:
    """With the gradients: neither of the two passes is a constant of the distance. The loss items that the host logs
    are those of the clean pass, where a method makes one that it learns from.
    """
    method_loss, share = TRAINERS[kind].method_loss, LOSS[kind]
    weight = own.get("beta", own.get("sync_weight", 0.0))

    def look(self: Any, predictions: Any, batch: dict[str, Any]) -> Any:
        network, steps = copy.deepcopy(self.model), watched(self.run.method, monkeypatch)
        loss, items = method_loss(self, predictions, batch)

        noise = steps[0].adversarial - batch["img"]
        assert noise.flatten(1).norm(dim=1).min() > 1.0, "the attack found no way (TRADES starts at 1 % of the radius)"
        criterion = network.init_criterion()
        if model == TWO_HEADS:
            criterion.o2m, criterion.o2o = self.terms.criterion.o2m, self.terms.criterion.o2o
        passes = [network(images) for images in (batch["img"], steps[0].adversarial)]
        (clean, clean_items), (adversarial, adversarial_items) = (criterion(each, batch) for each in passes)
        sync = divergence(network, *passes).mean()
        wanted = share[0] * clean.sum() + share[1] * adversarial.sum() + weight * sync
        assert weight == 0 or weight * sync > 1e-3 * wanted, "the distance is too small to be seen in the sum"
        torch.testing.assert_close(loss.double(), wanted.double(), rtol=1e-5, atol=0)
        of_pass = clean_items if share[0] or weight else adversarial_items
        assert items.keys() == of_pass.keys()
        for name, value in items.items():
            torch.testing.assert_close(value, of_pass[name], rtol=1e-4, atol=1e-6)
        assert any(float(clean_items[name]) != float(adversarial_items[name]) for name in items)

        loss.backward()  # where the passes are back-propagated one after the other, it finds nothing more
        wanted.backward()
        weights = dict(network.named_parameters())
        assert sum(parameter.grad is not None for parameter in weights.values()) > 20
        for name, parameter in self.model.named_parameters():
            ours, theirs = parameter.grad, weights[name].grad
            assert (ours is None) == (theirs is None), name
            if theirs is not None:
                scale = float(theirs.abs().max())
                torch.testing.assert_close(ours, theirs.to(ours), rtol=1e-3, atol=1e-4 * scale + 1e-7, msg=name)
        raise Interrupted

    monkeypatch.setattr(TRAINERS[kind], "method_loss", look)
    settings = {"eps": 3.0, "delta": 3.0, "steps": 3, "step_scale": 3.0}
    settings["thresholds"] = thresholds(5.0, TERMS if model == ONE_HEAD else OTHER_TERMS)
    trainer = make(kind, tmp_path, model=model, **settings, **own, **arguments)
    with pytest.raises(Interrupted):
        trainer.train()
    assert trainer.terms.branch == branch


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        *(("sat", {"bn": bn}) for bn in ("clean", "both", "adversarial")),
        *(("sat", {**SEQUENTIAL, "bn": "both"}), ("sat", {"model": TWO_HEADS})),
        *(("amat", {"start": "delta"}), ("dpaat", {"nbs": 2}), ("dpaat", {"sync_weight": 0.0})),
    ],
    ids=str,
)
def test_the_gradient_of_the_hosts_own_pass_saves_one_and_changes_nothing_for_an_image_alone(
    make: Any, tmp_path: Path, thresholds: Any, monkeypatch: pytest.MonkeyPatch, kind: str, own: dict[str, Any]
) -> None:
    """Its batch's loss is the image's own. In half precision, as on a GPU, the loss is scaled on the way."""
    names = OTHER_TERMS if own.get("model") == TWO_HEADS else TERMS
    given = {"eps": 3.0, "delta": 3.0, "steps": 3, "step_scale": 2.0, "batch": 1, "nbs": 1, **STILL, **own}
    given["thresholds"] = thresholds(5.0, names)
    found: dict[bool, Any] = {}
    for shared in (False, True):
        trainer = make(kind, tmp_path / str(shared), share_gradient=shared, **given)
        passes, noise, batches = [], [], []

        def ready(trainer: Any, passes: list[int] = passes, noise: list[Tensor] = noise, half: bool = shared) -> None:
            trainer.model.model[0].register_forward_hook(lambda *_: passes.append(1))
            if half:
                trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
            step = trainer.run.method.step

            def watch(*given: Any, **named: Any) -> Any:
                made = step(*given, **named)
                noise.append(made.adversarial - given[1].detach())
                return made

            monkeypatch.setattr(trainer.run.method, "step", watch)

        def stop(trainer: Any, batches: list[int] = batches) -> None:
            batches.append(1)
            if len(batches) == trainer.accumulate:
                scale = trainer.scaler.get_scale()
                named = trainer.model.named_parameters()
                trainer.kept = {name: p.grad.clone() / scale for name, p in named if p.grad is not None}
                raise Interrupted

        trainer.add_callback("on_train_start", ready)
        monkeypatch.setattr(trainer, "optimizer_step", partial(stop, trainer))
        if own.get("nbs"):  # gradients of two batches are added up
            trainer.add_callback("on_train_batch_end", lambda t, b=batches: b.append(1) if len(b) == 0 else None)
        with pytest.raises(Interrupted):
            trainer.train()
        found[shared] = (trainer.kept, len(passes), noise, trainer.settings)
    (grads, most, noise, _), (others, least, same, settings) = found[False], found[True]
    steps = len(noise)
    assert steps == own.get("nbs", 1)
    clean = kind != "dpaat" or "sync_weight" not in own  # else it makes no clean pass that it learns from
    assert most - least == (steps if clean else 0)
    if clean:
        assert least == steps * (1 + settings.steps), "the host's, those of the attack but its first, and the last"
    for one, two in zip(noise, same, strict=True):
        assert not two.requires_grad
        assert one.norm() > 2.0
        torch.testing.assert_close(two, one, rtol=1e-2, atol=1e-3)
    assert grads.keys() == others.keys()
    assert len(grads) > 20
    for name, wanted in grads.items():
        scale = float(wanted.abs().max())
        torch.testing.assert_close(others[name], wanted, rtol=1e-2, atol=2e-3 * scale + 1e-7, msg=name)


def test_in_float16_the_shared_gradients_are_taken_of_the_scaled_loss(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On GPUs only, as the host has it. Without the scale they would be lost, and the pass would not be shared."""
    half = partial(torch.autocast, "cpu", dtype=torch.float16)
    monkeypatch.setattr("ultralytics.engine.trainer.autocast", lambda *_, **__: half())
    found: dict[bool, list[Any]] = {}

    def ready(trainer: Any) -> None:
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        trainer.passes = []
        trainer.model.model[0].register_forward_hook(lambda *_: trainer.passes.append(1))

    for shared in (False, True):
        given = {"eps": 2.0, "steps": 2, "epochs": 1, "val": False, "share_gradient": shared, **STILL}
        trainer = run("sat", str(shared), {"on_train_start": ready}, **given)
        found[shared] = [dict(trainer.model.named_parameters()), len(trainer.passes), trainer.scaler.get_scale()]
    assert [most for _, most, _ in found.values()] == [2 * 4, 2 * 3]
    assert {scale for _, _, scale in found.values()} == {2.0**12}, "no step was lost to an overflow"
    for name, value in found[False][0].items():
        torch.testing.assert_close(found[True][0][name], value, rtol=5e-2, atol=2e-3, msg=name)


@pytest.mark.parametrize("own", [{}, {"model": TWO_HEADS, "nms": False}, SEQUENTIAL], ids=str)
def test_gradients_are_taken_at_moved_weights(run: Any, own: dict[str, Any]) -> None:
    """With weights that are hardly moved they are those of a training without; with others, others."""
    found: dict[float, Any] = {}
    for awp in (0.0, 1e-12, 0.5):
        passes: list[int] = []

        def ready(trainer: Any, passes: list[int] = passes) -> None:
            trainer.model.model[0].register_forward_hook(lambda *_: passes.append(1))

        given = {"eps": 2.0, "steps": 2, "epochs": 1, "val": False, "robust_batches": 0, **STILL, **own}
        trainer = run("sat", str(awp), {"on_train_start": ready}, awp=awp, **given)
        found[awp] = dict(trainer.model.named_parameters()), len(passes)
    (plain, fewer), (same, more), (other, _) = found.values()
    assert more > fewer
    assert (more - fewer) % 2 == 0, "clean and attacked once more in each step"
    for name, value in plain.items():
        torch.testing.assert_close(same[name], value, rtol=1e-3, atol=1e-5, msg=name)
    assert max(float((other[name] - value).detach().abs().max()) for name, value in plain.items()) > 1e-3


def test_a_level_grows_with_the_training(run: Any, said: list[str]) -> None:
    levels: list[float] = []
    given = {"eps": 2.0, "ramp": 1.0, "steps": 2, "epochs": 2, "val": False, "robust_batches": 0}
    given |= {"delta": 0.5}
    trainer = run("sat", on={"on_train_batch_end": lambda trainer: levels.append(trainer.run.method.eps)}, **given)
    assert [line.rpartition(": ")[2] for line in said if "Set, and without any effect on SAT" in line] == ["delta"]
    count = 2 * len(trainer.train_loader)
    assert levels == pytest.approx([2.0 * (step + 1) / count for step in range(count)])
    assert sum("The noise level grows from 0 to eps = 2, which it has by the end of epoch 2" in line for line in said)


def test_the_learning_rate_falls_late(run: Any) -> None:
    rates: list[float] = []
    given = {"eps": 1.0, "steps": 1, "epochs": 4, "val": False, "robust_batches": 0, "optimizer": "SGD", "lr0": 0.02}
    given |= {"decay": "late", "warmup_epochs": 0}
    on = {"on_train_batch_end": lambda trainer: rates.append(trainer.optimizer.param_groups[0]["lr"])}
    trainer = run("sat", on=on, **given)
    count = len(trainer.train_loader)
    assert count > 1
    assert rates == pytest.approx([0.02] * 3 * count + [0.02 * (1 - batch / count) for batch in range(count)])
    assert trainer.lf(3.5) == pytest.approx(0.5), "what the host's warm-up goes by"


def test_no_gradient_is_shared_where_it_is_of_another_head_than_the_attacked_one(run: Any, said: list[str]) -> None:
    trainer = run("sat", model=TWO_HEADS, nms=False, eps=1.0, epochs=1, val=False)
    assert trainer.settings.share_gradient is False
    assert trainer.run.method.clean_gradients is None
    assert sum("share_gradient is off: with nms=False" in line for line in said) == 1


def layers(trainer: Any) -> list[nn.BatchNorm2d]:
    return [module for module in trainer.model.modules() if isinstance(module, nn.BatchNorm2d)]


def test_the_option_says_which_images_feed_the_running_statistics(run: Any) -> None:
    """After one batch, when the weights of all runs are still those they began with. Attacks feed nothing."""
    seen: dict[str, Tensor] = {}

    def start(name: str, kind: str, passes: int, **own: Any) -> None:
        def keep(trainer: Any) -> None:
            # Of all layers; the first would be too alike.
            seen.setdefault(name, torch.cat([layer.running_mean for layer in layers(trainer)]).clone())

        trainer = run(kind, name, {"on_train_batch_end": keep}, epochs=1, val=False, **STILL, **own)
        assert {int(layer.num_batches_tracked) for layer in layers(trainer)} == {2 * passes}, name
        assert all(layer.track_running_stats for layer in layers(trainer))

    start("stock", "stock", 1)
    for bn in ("both", "clean", "adversarial"):
        given, passes = {"bn": bn, "eps": 6.0, "steps": 2}, 1 + (bn == "both")
        start(bn, "sat", passes, **given)
        start(f"{bn}, sequential", "sat", passes, **given, **SEQUENTIAL)
        start(f"trades {bn}", "trades", passes, **given)
        start(f"at {bn}", "at", 1, **given)  # it learns from no loss of clean images, whatever the option says
    for name, same_as in (
        *((f"{bn}, sequential", bn) for bn in ("both", "clean", "adversarial")),
        *((f"at {bn}", "adversarial") for bn in ("both", "clean", "adversarial")),
        *(("clean", "stock"), ("trades clean", "stock")),
    ):
        assert torch.equal(seen[name], seen[same_as]), name
    for one, other in (
        *(("adversarial", "clean"), ("both", "clean"), ("both", "adversarial")),
        *(("trades adversarial", "stock"), ("trades adversarial", "at both")),  # attacked images, but not those of AT
    ):
        assert (seen[one] - seen[other]).abs().max() > 1e-3


FINISHED: dict[str, dict[str, Any]] = {
    "amat": {"delta": 0.5, "plots": True, "model": TWO_HEADS},  # self-calibrated: its first epoch is clean
    "trades": {"eps": 1.0},
}
of_amat = pytest.mark.parametrize("finished", ["amat"], indirect=True)


@pytest.fixture(scope="module", params=FINISHED)
def finished(request: pytest.FixtureRequest, make: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of three epochs; ``saved`` are copies of last.pt as it was during the training."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp(request.param)
    trainer = make(request.param, folder, epochs=3, save_period=1, **FINISHED[request.param])
    trainer.saved, trainer.measured, trainer.weights_of_heads, trainer.criteria = [], [], [], []

    def keep(trainer: Any) -> None:
        trainer.saved.append(shutil.copy(trainer.last, folder / f"{trainer.epoch}.pt"))
        trainer.measured.append(trainer._epoch_values)
        trainer.weights_of_heads.append(getattr(trainer.terms.criterion, "o2m", None))
        trainer.criteria.append(trainer.model.criterion)

    trainer.add_callback("on_model_save", keep)
    trainer.train()
    return trainer


def test_results_and_noise_levels_are_written_down(finished: Any, data: Any) -> None:
    adaptive, folder = finished.method_name == "AMAT", finished.save_dir
    assert epochs(folder) == [1, 2, 3]
    for row, values in zip(table(folder / "results.csv"), finished.measured, strict=True):
        written = {key: float(row.get(column, "nan")) for key, column in COLUMNS.items()}
        assert written == pytest.approx(values, rel=1e-3, abs=1e-5, nan_ok=True)
        clean = adaptive and row["epoch"] == "1"
        assert (written["loss_adversarial"] > 0) == (written["attack_seconds"] > 0) == (not clean)
        assert (written["loss_sync"] > 0) == (not adaptive)
    assert (folder / "margins.csv").exists() == adaptive
    if adaptive:
        assert {row["visits"] for row in table(folder / "margins.csv")} == {"2"}
        store = finished.run.method.store
        expected = dict(zip(store.ids(), store.values().tolist(), strict=True))
        assert margins_of(folder / "margins.csv") == pytest.approx(expected)
        assert set(expected) == set(data.ids("train"))
        assert (folder / "results.png").stat().st_size > 1000
        assert (folder / "train_batch2.jpg").stat().st_size > 1000, "the host plots the first attacked batch"


def panels(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, list[float]]:
    """What the stock plot of a run shows: the values of the first line of each panel, by its title."""
    with patch.context() as kept:
        kept.setattr(plt, "close", lambda *_: None)
        plot_results(folder / "results.csv")
        figure = plt.gcf()
    shown = {axes.get_title(): list(axes.get_lines()[0].get_ydata()) for axes in figure.axes if axes.get_visible()}
    plt.close(figure)
    return shown


@of_amat
def test_the_stock_plot_shows_margins_losses_and_what_an_epoch_is_judged_by(
    finished: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = panels(finished.save_dir, monkeypatch)
    ours = {name: values for name, values in found.items() if "adv_" in name or "robust" in name}
    margins = [COLUMNS[f"margin_{q}"] for q in ("q05", "q50", "q95")]
    assert set(ours) == {*margins, COLUMNS["loss_clean"], COLUMNS["loss_adversarial"], ROBUST}
    for name, values in found.items():
        assert np.isfinite(values).sum() >= 2, f"the panel {name} is empty"
    for name in margins:
        key = next(key for key, column in COLUMNS.items() if column == name)
        assert ours[name] == pytest.approx([values[key] for values in finished.measured], rel=1e-4)


def test_the_results_of_an_earlier_release_go_on_under_the_names_of_today(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    assert widened(path, ["train/adv_loss_clean"]) == [], "there is no file yet"
    path.write_text("epoch,train/box_loss,lr/pg0,train/adv_loss_sync,train/adv_margin_q50\n1,2.5,0.1,nan,0.7\n")
    names = ["train/adv_loss_sync", "metrics/adv_margin_q50", "train/adv_own"]
    assert widened(path, ["metrics/adv_margin_q50", "train/adv_own"]) == names
    assert table(path) == [
        dict(zip(["epoch", "train/box_loss", "lr/pg0", *names], ["1", "2.5", "0.1", "nan", "0.7", "nan"], strict=True))
    ]
    before = path.stat().st_mtime_ns
    assert widened(path, names) == names
    assert path.stat().st_mtime_ns == before, "it is not written where nothing is to be changed"


class Configuration(dict[str, Any]):
    """In the place of the configuration of a run of W&B."""

    def setdefaults(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            self.setdefault(name, value)


class Recorder:
    """In the place of a writer of TensorBoard, or a run of W&B."""

    def __init__(self) -> None:
        self.config = Configuration()
        self.scalars: list[dict[str, Any]] = []

    def add_scalar(self, name: str, value: Any, step: int) -> None:
        self.scalars.append({name: value, "epoch": step})

    def log(self, values: dict[str, Any], commit: bool = True) -> None:
        self.scalars.append(values)

    def of(self, name: str) -> list[float]:
        return [float(values[name]) for values in self.scalars if name in values]


def test_loggers_of_the_host_have_our_values(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's own callbacks read them; in a test it leaves out the packages that they write to."""
    board, wandb = Recorder(), Recorder()
    monkeypatch.setattr(tensorboard, "WRITER", board, raising=False)
    monkeypatch.setattr(wb, "wb", SimpleNamespace(run=wandb, Image=str))
    monkeypatch.setattr(wb, "_processed_plots", {}, raising=False)

    def both(trainer: Any) -> None:
        for logger in (tensorboard, wb):
            logger.on_fit_epoch_end(trainer)

    end_epoch = MethodRun.end_epoch
    more: dict[int, dict[str, float]] = {1: {"own": 2.5}}  # of a method of one's own
    monkeypatch.setattr(MethodRun, "end_epoch", lambda run: end_epoch(run) | more.get(run._epoch, {}))
    trainer = run("amat", "own", {"on_fit_epoch_end": both}, epochs=3, delta=0.5, eps=1.0)
    rows = table(trainer.save_dir / "results.csv")
    assert [row["train/adv_own"] for row in rows] == ["nan", "2.5", "nan"]
    names = [name for name in rows[0] if "adv_" in name or name == ROBUST]
    assert {COLUMNS["margin_q50"], COLUMNS["loss_adversarial"], ROBUST} <= set(names)
    for name in names:
        expected = [value for row in rows if not math.isnan(value := float(row[name]))]
        for logger in (board, wandb):
            assert logger.of(name) == pytest.approx(expected, rel=1e-4, abs=1e-6), name
    prefixes = ("train/", "lr/", "metrics/", "val/")
    assert all(name.startswith(prefixes) for name in names), "the host gives these the epoch as their step in W&B"


def test_loggers_of_the_host_have_our_arguments(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B by its own callback, with what they were resolved to; others read the same object at other events."""
    wandb = Recorder()
    monkeypatch.setattr(wb, "wb", SimpleNamespace(run=wandb, Image=str))
    seen: dict[str, dict[str, Any]] = {}

    def look(event: str) -> Any:
        return lambda trainer: seen.update({event: dict(vars(trainer.args))})

    heard = callbacks.get_default_callbacks()
    heard["on_pretrain_routine_start"].append(look("start"))  # while the trainer is made
    heard["on_pretrain_routine_end"] += [wb.on_pretrain_routine_end, look("end")]
    heard["on_train_start"].append(look("train"))
    heard["on_train_epoch_end"].append(look("later"))

    class Heard(AMATDetectionTrainer):
        def __init__(self, overrides: Any) -> None:
            super().__init__(overrides=overrides, _callbacks=heard)

    trainer = make(Heard, tmp_path, epochs=2, delta=0.5, rule="mean+1std", steps=None)
    trainer.train()
    resolved = arguments_of(trainer.settings)
    assert {"method": "AMAT", "delta": 0.5, "rule": "mean+1std"}.items() <= seen["start"].items()
    assert "steps" not in seen["start"], "it is chosen later"
    assert {resolved["steps"], resolved["eps"]}.isdisjoint({None})
    for found in (wandb.config, seen["end"], seen["train"]):
        assert {"method": "AMAT", **{k: v for k, v in resolved.items() if v is not None}}.items() <= found.items()
    assert wandb.config["imgsz"] == 64, "and the host's are there"
    for found in (seen["later"], vars(trainer.args), YAML.load(trainer.save_dir / "args.yaml")):
        assert not set(found) & {"method", *argument_names()}, "the stock host would refuse a checkpoint of them"


def test_checkpoints_hold_plain_values_while_training_and_nothing_afterwards(finished: Any, data: Any) -> None:
    assert len(finished.saved) == 3
    for epoch, path in enumerate(finished.saved):
        network = torch.load(path, weights_only=False)["ema"]
        state = getattr(network, STATE)
        assert plain(state)
        assert state["images"]["count"] == 8
        assert network.criterion is None
        levels = state["method"].get("margins", {"ids": None})["ids"]
        assert levels is None if finished.method_name == "TRADES" else len(levels) == (0 if epoch == 0 else 8)
    image = data.folder / data.ids("val")[0]
    for path in (finished.last, finished.best):
        checkpoint = torch.load(path, weights_only=False)
        assert checkpoint["optimizer"] is checkpoint["ema"] is checkpoint["model"].criterion is None
        assert not hasattr(checkpoint["model"], STATE)
        assert not set(checkpoint["train_args"]) & set(argument_names())
        assert checkpoint["train_args"]["time"] is None
        assert len(YOLO(path).predict(image, imgsz=64, device="cpu", verbose=False)) == 1
    assert not hasattr(finished.ema.ema, STATE)
    assert finished.args.time is None


def test_no_finished_file_names_an_image_and_all_tell_what_they_are(finished: Any, data: Any, said: list[str]) -> None:
    """Those of single epochs, too, which have kept their optimizer: none of them can be resumed any more."""
    folder, clean = finished.save_dir / "weights", int(finished.method_name == "AMAT")
    files = {path.name: path for path in folder.iterdir()}
    assert set(files) == {"last.pt", "best.pt", "epoch0.pt", "epoch1.pt", "epoch2.pt"}
    for name, path in files.items():
        content = path.read_bytes()
        assert not any(Path(id_).stem.encode() in content for id_ in data.ids("train")), name
        checkpoint = torch.load(path, weights_only=False)
        summary = checkpoint[STATE]
        assert plain(summary)
        assert summary["method"] == finished.method_name
        assert summary["attacked_epochs"] == summary["epochs"] - clean
        if name.startswith("epoch"):
            assert summary["epochs"] == int(name[5]) + 1
            for train in (YOLO(path).train, partial(YOLO(path).train, trainer=type(finished))):
                with pytest.raises((TypeError, ValueError), match=f"{finished.method_name} training .* has ended"):
                    train(resume=True, device="cpu")
    summary = torch.load(files["last.pt"], weights_only=False)[STATE]
    assert summary["epochs"] == 3
    if clean:
        assert summary["thresholds"] == str(finished.run.thresholds)
        assert summary["thresholds_from"] == "self-calibrated in 1 clean epoch(s)"
    text = (finished.save_dir / "adversarial.yaml").read_text()
    for key, value in summary.items():
        assert (f"# {key}: {value}" in text.splitlines()) == (value is not None)


@of_amat
def test_settings_are_written_down(finished: Any) -> None:
    """What was used, by the preset and by the host's image size."""
    text = (finished.save_dir / "adversarial.yaml").read_text()
    found = yaml.safe_load(text)
    assert (found["delta"], found["steps"]) == (0.5, 1)
    assert found["eps"] == pytest.approx(10 * 64 / 320)  # the default, for 64 pixels instead of 320
    assert (found["refinement"], found["schedule"], found["share_gradient"]) == ("secant", "decreasing", True)
    assert "# method: AMAT" in text
    assert set(found) == set(argument_names()), "it can be passed on as cfg=adversarial.yaml"
    assert not set(yaml.safe_load((finished.save_dir / "args.yaml").read_text())) & set(argument_names())


@of_amat
def test_the_criterion_stands_in_for_the_hosts_and_is_left_out_of_copies(finished: Any) -> None:
    criterion = finished.criteria[0]
    assert isinstance(criterion, MethodCriterion)
    for copied in (copy.deepcopy(criterion), copy.copy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert copied is None
    assert copy.deepcopy(finished.model).criterion is None
    assert criterion.one2many is finished.terms.criterion.one2many
    assert not hasattr(criterion, "something_else")
    # The weights of two heads move as in the stock training.
    assert finished.weights_of_heads == pytest.approx(weights_of_heads(finished))
    assert len(set(finished.weights_of_heads)) > 1


def weights_of_heads(trainer: Any) -> list[float]:
    """The host's weights of the one-to-many head in the epochs after the first."""
    host, found = trainer.model.init_criterion(), []
    for _ in range(3):
        host.update()
        found.append(host.o2m)
    return found


WITHOUT_US = (
    BLOCKER
    + """
import os
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
try:
    YOLO(middle).train(resume=True, device="cpu")
except TypeError as error:
    assert "unfinished AMAT training" in str(error) and "adv-yolo detect train resume model=FILE" in str(error), error
else:
    raise AssertionError("it went on without attacks")
YOLO(middle).train(data=data, epochs=1, batch=4, workers=0, plots=False, val=False, amp=False, **quiet)
exported = YOLO(paths[-1]).export(format="torchscript", imgsz=64, device="cpu")
assert YOLO(exported, task="detect").predict(image, **quiet)[0].orig_shape
try:
    import adv_yolo
except ModuleNotFoundError:
    print("fine without us")
"""
)


@of_amat
def test_checkpoints_work_where_our_packages_are_not_installed(finished: Any, data: Any, tmp_path: Path) -> None:
    paths = [shutil.copy(path, tmp_path) for path in (finished.last, finished.best)]
    words = [str(word) for word in (data.yaml, data.folder / data.ids("val")[0], finished.saved[1], *paths)]
    command = [sys.executable, "-c", WITHOUT_US, *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fine without us" in done.stdout


def test_images_without_an_object_have_no_margin(run: Any, data: Any) -> None:
    images = zip(data.ids("train"), data.names("train"), strict=True)
    (background,) = [sample for sample, name in images if not len(data.labels(name))]
    trainer = run("amat", epochs=2, delta=0.5, val=False, empty_samples="floor")
    assert sorted({*trainer.run.method.margins.ids(), background}) == data.ids("train")
    assert background not in trainer.run.method.margins


def test_self_calibrated_thresholds_begin_after_the_warm_up(run: Any, data: Any, said: list[str]) -> None:
    """With images that are mixed on request, which have the ids of the first."""
    given = {"mosaic": 1.0, "mixup": 0.5, "close_mosaic": 1, "preset": "paper"}
    trainer = run("amat", epochs=4, clean_epochs=2, delta=0.5, val=False, **given)
    assert isinstance(trainer.run.thresholds, RunningThresholds)
    assert trainer.run.thresholds.names == TERMS
    assert trainer.run.method.margins.visits().tolist() == [2] * 8
    assert sorted(trainer.run.method.margins.ids()) == data.ids("train")
    for words in ("Warm-up done. Thresholds: box_loss < ", "margins can reach about 1.00", "are self-calibrated"):
        assert sum(words in line for line in said) == 1, words


@pytest.fixture
def known(make_data: Any) -> Any:
    """A data set whose training images are those that the trained network knows."""
    own = make_data()
    own.list("train", own.names("val"))
    return own


def test_thresholds_are_measured_on_a_trained_model_named_or_trained_on(
    make: Any, known: Any, trained: Path, tmp_path: Path, said: list[str]
) -> None:
    """Its weights are still those of the file, and so are its losses."""
    found, given = [], {"source": known, "imgsz": 96, "epochs": 1, "val": False, "scale": 0.2, "multi_scale": 0.3}
    for name, own in (("named", {"thresholds": str(trained)}), ("itself", {"model": str(trained)})):
        trainer = make("amat", tmp_path / name, **given, **own)
        begun: list[Any] = []
        trainer.add_callback("on_train_start", lambda t, b=begun: b.append(copy.deepcopy(t.model)))
        trainer.train()
        found.append(trainer.run.thresholds)
        assert (found[-1].n, found[-1].rule, found[-1].names) == (4, "mean+2std", TERMS)
        assert found[-1].notes["augmentation"]["scale"] == 0.2
        assert trainer.run.method.margins.visits().tolist() == [1] * 4
        assert trainer.run.warmup_epochs == 0
    assert found[0] == found[1]
    assert not changed(begun[0], load_checkpoint(trained)[0]), "measuring leaves no trace in what is trained"
    assert sum("thresholds measured on the network that is trained on" in line for line in said) == 1
    # A network that was trained on other labels is none to measure on.
    other = {**given, "classes": [0, 1]}
    with pytest.raises(ValueError, match=r"was trained with classes=None, .* measured with classes=\[0, 1\]"):
        make("amat", tmp_path / "other", thresholds=str(trained), **other).train()
    trainer = make("amat", tmp_path / "other", model=str(trained), **{**other, "epochs": 2})
    trainer.add_callback("on_train_start", stop_here)
    with pytest.raises(Interrupted):
        trainer.train()
    assert isinstance(trainer.run.thresholds, RunningThresholds)
    # Under other arguments the file is not quite right, and says so.
    found[0].save(tmp_path / "t.json")
    said.clear()
    other = {**given, "scale": 0.4, "augmentations": [{"transform": "Blur"}]}
    trainer = make("amat", tmp_path / "file", **other, thresholds=str(tmp_path / "t.json"))
    trainer.add_callback("on_train_start", stop_here)
    with pytest.raises(Interrupted):
        trainer.train()
    changes = "scale 0.2 -> 0.4, augmentations None -> [{'transform': 'Blur'}]. Measure"
    assert any(line.startswith("WARNING") and "are not those of" in line and changes in line for line in said)
    assert not any("plain images, not on those" in line for line in said)


DIFFERENT: list[tuple[dict[str, Any], str]] = [
    ({"imgsz": 64}, "imgsz 96 -> 64"),
    ({"cls": 2.0}, r"cls 0\.5 -> 2\.0"),
    ({"cls_pw": 1.0}, r"cls_pw 0\.0 -> 1\.0"),
    ({"classes": [1, 0]}, r"classes None -> \[0, 1\]"),
    ({"single_cls": True}, r"names \[.*\] -> \['item'\].*single_cls False -> True"),
    ({"source": "other images"}, "samples .*'count': 4.* -> .*'count': 3"),
    ({"source": "other names"}, r"names \['RBC'.* -> \['red'"),
]


def test_thresholds_at_a_decision_boundary_are_refused(make: Any, data: Any, tmp_path: Path) -> None:
    trainer = make("amat", tmp_path, source=data, epochs=1, val=False, rule="boundary")
    trainer.add_callback("on_train_epoch_start", lambda _: pytest.fail("an epoch began"))
    with pytest.raises(ValueError, match="the rule 'boundary' is for classifiers"):
        trainer.train()


@pytest.mark.parametrize(("change", "message"), DIFFERENT, ids=str)
def test_a_thresholds_file_of_another_training_is_refused(
    make: Any,
    known: Any,
    trained: Path,
    tmp_path: Path,
    change: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before the first epoch; an augmentation that differs is told."""
    as_on_a_terminal(monkeypatch)
    info = check_det_dataset(str(known.yaml))
    args = get_cfg(overrides={"imgsz": 96, "batch": 4, "workers": 0, "mosaic": 0.0})
    found = calibration.measure(trained, info, args, rule="mean", device=torch.device("cpu"))
    shown = capsys.readouterr().err
    assert "how good the network is: 100%" in shown
    assert "thresholds: 100%" in shown
    found.save(tmp_path / "t.json")
    assert str(tmp_path) not in str(dict(found.notes))
    given = {"source": known, "imgsz": 96, "epochs": 1, "val": False, **change}
    match given["source"]:
        case "other images":
            known.list("train", known.names("train")[:3])
            given["source"] = known
        case "other names":
            known.describe(["red", "white", "small"])
            given["source"] = known
    trainer = make("amat", tmp_path, thresholds=str(tmp_path / "t.json"), **given)
    trainer.add_callback("on_train_epoch_start", lambda _: pytest.fail("an epoch began"))
    with pytest.raises(ValueError, match=f"t.json are not those of this training: .*{message}.* Measure again"):
        trainer.train()


def test_thresholds_of_the_other_head_are_refused(
    make: Any, data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two, whose terms have the same names: ``nms`` says which is followed."""
    monkeypatch.setattr(calibration, "UNTRAINED", 0.0)
    path = save(DetectionModel(TWO_HEADS, nc=len(CLASSES), verbose=False), tmp_path / "two.pt")
    info = check_det_dataset(str(data.yaml))
    args = get_cfg(overrides={"imgsz": 64, "batch": 4, "workers": 0, "mosaic": 0.0})
    found = calibration.measure(path, info, args, rule="mean", device=torch.device("cpu"))
    assert found.notes["head"] == "one2many"
    found.save(tmp_path / "t.json")
    trainer = make("amat", tmp_path, model=TWO_HEADS, thresholds=str(tmp_path / "t.json"), nms=False)
    with pytest.raises(ValueError, match=r"are not those of this training: head one2many -> one2one\. Measure again"):
        trainer.train()


def stop_here(_: Any) -> None:
    raise Interrupted


def test_a_network_that_has_learnt_nothing_gives_no_thresholds(
    make: Any, networks: Any, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(save(DetectionModel(ONE_HEAD, nc=len(CLASSES), verbose=False), tmp_path / "new.pt"))
    with pytest.raises(ValueError, match=r"new.pt detects next to nothing on the training images \(mAP50 0.000"):
        make("amat", tmp_path, thresholds=path).train()
    trainer = make("amat", tmp_path, model=path)
    trainer.add_callback("on_train_start", stop_here)
    with pytest.raises(Interrupted):
        trainer.train()
    assert isinstance(trainer.run.thresholds, RunningThresholds)
    assert sum("so that no thresholds can be measured on it" in line for line in said) == 1
    monkeypatch.setattr(calibration, "UNTRAINED", 0.0)
    trainer = make("amat", tmp_path, model=path)
    trainer.add_callback("on_train_start", stop_here)
    with pytest.raises(Interrupted):
        trainer.train()
    assert isinstance(trainer.run.thresholds, Thresholds)
    assert sum(line.startswith("WARNING") and "is poorly trained" in line for line in said) == 1


@pytest.mark.parametrize(
    ("kind", "given", "mosaic"),
    [
        *(("amat", {}, 0), ("dpaat", {"mosaic": 1.0}, 1), ("amat", {"mosaic": 1.0, "mixup": 0.5}, 1)),
        ("trades", {"eps": 1.0, "mixup": 0.5}, 1),
    ],
)
def test_mosaic_is_off_where_images_have_noise_levels_and_says_so(
    make: Any, tmp_path: Path, said: list[str], kind: str, given: dict[str, float], mosaic: int
) -> None:
    assert make(kind, tmp_path, **given).args.mosaic == mosaic
    off = [line for line in said if "so that a noise level belongs to one image" in line]
    mixed = [line for line in said if "several images become one" in line]
    assert len(off) == (mosaic == 0)
    assert all(f"{kind.upper()}:" in line and "mosaic=0.0" in line for line in off)
    assert len(mixed) == ("mosaic" in given)
    values = ", ".join(f"{name}={value}" for name, value in given.items())
    assert all(line.startswith("WARNING") and f"{kind.upper()} with {values}:" in line for line in mixed)


@pytest.mark.parametrize(
    ("given", "warned"),
    [({"multi_scale": 0.5}, True), ({}, False), ({"multi_scale": 0.5, "norm": math.inf}, False)],
    ids=str,
)
@pytest.mark.parametrize("kind", ["amat", "sat"])
def test_sizes_that_change_are_warned_of_where_levels_mean_another_change(
    make: Any, tmp_path: Path, said: list[str], kind: str, given: dict[str, float], warned: bool
) -> None:
    make(kind, tmp_path, **given)
    lines = [line for line in said if "stronger change of a small image" in line]
    assert len(lines) == warned
    assert all(line.startswith("WARNING") and f"{kind.upper()} with multi_scale=0.5:" in line for line in lines)


def resume(kind: str, last: Path, **arguments: Any) -> Any:
    """The resumed run after its end, with its state and the weights of its heads as its epochs began."""
    trainer = TRAINERS[kind](overrides={"model": str(last), "resume": str(last), **arguments})
    trainer.begun, trainer.weights_of_heads = [], []

    def look(trainer: Any) -> None:
        trainer.begun.append(copy.deepcopy(trainer.run.state_dict()))
        trainer.weights_of_heads.append(getattr(trainer.terms.criterion, "o2m", None))

    trainer.add_callback("on_train_epoch_start", look)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("kind", "visits", "own"),
    [
        ("amat", [1, 3], {"steps": 2, "refinement": "crossing", "random_start": 0.5}),  # the first epoch was clean
        ("amat", [2, 4], {"thresholds": 3.0}),
        ("dpaat", [2, 4], {"step_size": 0.25, "eps_max": 2.0, "average": "epoch"}),
        ("sat", None, {"model": TWO_HEADS}),
    ],
    ids=str,
)
def test_a_resumed_run_continues_as_it_began_where_its_data_set_moved_and_not_where_its_images_have_changed(
    make_data: Any,
    broken: Any,
    thresholds: Any,
    said: list[str],
    tmp_path: Path,
    kind: str,
    visits: list[int] | None,
    own: dict[str, Any],
) -> None:
    """With its thresholds, although their file has gone. The interrupted epoch leaves nothing."""
    source, given = make_data("first"), {"delta": 0.25, "eps": 1.0, **own}
    if "thresholds" in own:
        given["thresholds"] = str(shutil.copy(thresholds(own["thresholds"]), tmp_path / "thresholds.json"))
    last = broken(kind, source=source, **given)
    state = getattr(torch.load(last, weights_only=False)["ema"], STATE)
    (tmp_path / "thresholds.json").unlink(missing_ok=True)
    names, other = source.names("train"), source.names("val")[0]
    for changed_names in (names[:-1], [*names, other], [*names[:-1], other]):
        source.list("train", changed_names)
        with pytest.raises(ValueError, match=rf"images have changed.*8 then, {len(changed_names)} now"):
            resume(kind, last)
    source.list("train", names)
    shutil.move(source.folder, tmp_path / "second")
    said.clear()
    trainer = resume(kind, last, delta=9.0, steps=7, data=str(tmp_path / "second" / source.yaml.name))

    if kind == "dpaat":
        state["method"]["increases"] = [0.0, 0.0]  # the mean of an epoch is that of this epoch
    assert trainer.begun[0] == {key: state[key] for key in trainer.begun[0]}
    settings, method = trainer.settings, trainer.run.method
    assert all(getattr(settings, name) == value for name, value in given.items() if name != "model")
    assert any("WARNING" in line and "Resume ignores ['delta', 'steps']" in line for line in said)
    assert not any("settings changed" in line for line in said)
    assert epochs(trainer.save_dir) == [1, 2, 3, 4]
    assert trainer.save_dir == last.parents[1]
    if visits is None:
        assert method.steps_done == 8
        assert trainer.weights_of_heads == pytest.approx(weights_of_heads(trainer)[1:])
    else:
        assert state["method"]["margins"]["visits"] == [visits[0]] * 8
        assert method.store.visits().tolist() == [visits[1]] * 8
        assert sum("noise levels" in line and "of the visits let one grow" in line for line in said) == 2
    if "thresholds" in own:
        assert trainer.run.thresholds.values == (3.0,) * 3
    elif kind == "amat":
        assert state["method"]["thresholds"]["ceiling"] is not None
    elif kind == "dpaat":
        assert (method.highest, method.average) == (2.0, "epoch")


def test_a_resumed_run_keeps_its_late_decay(broken: Any, said: list[str]) -> None:
    """The host makes its schedule before the checkpoint's settings are known."""
    last = broken("sat", eps=0.5, steps=1, decay="late", lr0=0.02, optimizer="SGD", warmup_epochs=0)
    rates: list[float] = []
    trainer = TRAINERS["sat"](overrides={"model": str(last), "resume": str(last), "decay": "host"})
    trainer.add_callback("on_train_batch_start", lambda trainer: rates.append(trainer.optimizer.param_groups[0]["lr"]))
    trainer.train()
    assert not any("without any effect" in line for line in said), "delta was filled in by the first run"
    assert trainer.settings.decay == "late"
    count = len(trainer.train_loader)  # of epochs 3 and 4
    assert rates == pytest.approx([0.02] * count + [0.02 * (1 - batch / count) for batch in range(count)])
    assert trainer.lf(3.5) == pytest.approx(0.5)


def test_a_run_of_an_earlier_release_goes_on_without_what_it_did_not_know(broken: Any) -> None:
    last = broken("sat", eps=0.5, steps=2)
    checkpoint = torch.load(last, weights_only=False)
    arguments = getattr(checkpoint["ema"], STATE)["arguments"]
    for name in ("preset", "schedule", "share_gradient", "robust_batches"):
        del arguments[name]
    torch.save(checkpoint, last)
    settings = resume("sat", last).settings
    assert (settings.schedule, settings.share_gradient, settings.robust_batches) == ("equal", False, 0)
    assert (settings.steps, settings.eps) == (2, 0.5)


@pytest.mark.parametrize("words", [{"trainer": AMATDetectionTrainer}, {"method": "amat"}, {"delta": 1.0}], ids=str)
def test_the_hosts_tuner_refuses_our_trainers_and_arguments(
    data: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: dict[str, Any]
) -> None:
    """So that nobody tunes a standard training, and thinks it was another: the page says what to do in its place."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SyntaxError, match=f"'{next(iter(words))}' is not a valid YOLO argument"):
        YOLO(ONE_HEAD).tune(data=str(data.yaml), iterations=1, epochs=1, device="cpu", **words)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("own", [{}, {"time": 0.5}], ids=str)
def test_the_hosts_own_way_to_resume_goes_on_with_attacks_or_not_at_all(
    broken: Any, said: list[str], own: dict[str, float]
) -> None:
    """The stock trainer is kept from it; ours has the host's arguments as they were."""
    last = broken("sat", eps=0.5, **own)
    before = torch.load(last, weights_only=False)
    assert before["ema"].args.time == own.get("time")
    with pytest.raises(TypeError, match=r"unfinished SAT training.*trainer=SATDetectionTrainer, resume=True"):
        YOLO(last).train(resume=True)
    assert epochs(last.parents[1]) == [1, 2], "it left something behind"
    model, begun = YOLO(last), []
    model.add_callback("on_train_epoch_start", lambda t: begun.append((t.args.time, t.run.warming_up)))
    model.add_callback("on_train_epoch_end", stop)
    model.train(trainer=TRAINERS["sat"], resume=True)
    assert begun == [(own.get("time"), False)]
    assert epochs(last.parents[1]) == [1, 2, 3]
    assert sum("goes on as SAT, 2 of 2 epochs under attack" in line for line in said) == 1


def test_a_run_is_resumed_where_its_images_lie_behind_a_link_that_moved(
    make_data: Any, broken: Any, tmp_path: Path
) -> None:
    """No id says where an image lies, whatever links the host follows."""
    source = make_data("disk1")
    (tmp_path / "set").symlink_to("disk1")
    ids = sorted(source.ids("train"))
    last = broken("amat", data=str(tmp_path / "set" / source.yaml.name), delta=0.25)
    shutil.move(tmp_path / "disk1", tmp_path / "disk2")
    (tmp_path / "set").unlink()
    (tmp_path / "set").symlink_to("disk2")
    trainer = resume("amat", last)
    assert sorted(margins_of(trainer.save_dir / "margins.csv")) == ids


def test_ids_are_relative_and_unlike(tmp_path: Path) -> None:
    for folder in ("data/images", "site_a/images", "site_b/images"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "link").symlink_to("data")

    def names(root: Any, *files: str) -> list[str]:
        return calibration.relative_names([str(tmp_path / file) for file in files], root)

    for root in (tmp_path / "data", tmp_path / "link"):
        assert names(root, "data/images/a.png", "data/b.png") == ["images/a.png", "b.png"]
    assert names(tmp_path / "link", "link/images/a.png") == ["images/a.png"]
    both = ["site_a/images/a.png", "site_b/images/a.png"]
    assert names(tmp_path / "conf", *both) == ["../site_a/images/a.png", "../site_b/images/a.png"]
    assert names(tmp_path / "data", "data/a.png", both[0]) == ["a.png", "../a.png"]
    assert names(tmp_path / "dat", "data/a.png") == ["../a.png"]
    assert names(None, both[0]) == ["../a.png"]


def test_an_image_that_a_list_names_twice_is_met_twice_and_has_one_margin(
    run: Any, make_data: Any, thresholds: Any, said: list[str]
) -> None:
    own = make_data()
    names = own.names("train")
    own.list("train", [*names, *names[:4]])
    trainer = run("amat", source=own, epochs=1, delta=0.25, thresholds=thresholds(3.0), val=False)
    visits = dict(zip(trainer.run.method.store.ids(), trainer.run.method.store.visits().tolist(), strict=True))
    assert visits == dict(zip(own.ids("train")[:8], [2] * 4 + [1] * 4, strict=True))
    assert any("8 images, each met about 1.5 times" in line for line in said)


def test_a_failed_process_of_several_is_a_mistake_that_says_where_to_look(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any) -> None:
        raise subprocess.CalledProcessError(3, "torchrun")

    monkeypatch.setattr(BaseTrainer, "train", fail)
    with pytest.raises(RuntimeError, match=r"one of the processes of the training failed \(status 3\)"):
        make("sat", tmp_path, eps=1.0).train()


@of_amat
def test_what_is_no_unfinished_run_of_the_method_is_not_resumed(broken: Any, finished: Any, run: Any) -> None:
    stock, sat = broken("stock"), broken("sat", eps=0.5)
    for kind, last, holds in (("amat", stock, "no margins"), ("dpaat", sat, "a run of SAT")):
        with pytest.raises(ValueError, match=f"no unfinished training of {kind.upper()}.*: it holds {holds}"):
            resume(kind, last)
    with pytest.raises((AssertionError, ValueError), match=r"finished, nothing to resume|no unfinished training"):
        resume("amat", finished.last)
    # It is a starting point for another.
    assert run("sat", model=str(finished.last), eps=0.5, epochs=1, val=False).run.method.steps_done == 2


def test_an_epoch_lost_to_a_nan_leaves_no_mark_on_the_margins(run: Any, said: list[str]) -> None:
    begun: list[tuple[int, Any]] = []
    poisoned: list[int] = []

    def look(trainer: Any) -> None:
        begun.append((trainer.epoch, copy.deepcopy(trainer.run.method.state_dict())))

    def poison(trainer: Any) -> None:
        if trainer.epoch == 2 and len(poisoned) < 2:
            poisoned.append(1)
            if len(poisoned) == 2:  # after the epoch's last batch
                trainer.loss = trainer.loss * math.nan

    trainer = run("amat", on={"on_train_epoch_start": look, "on_train_batch_end": poison}, delta=0.25, epochs=4)
    assert [epoch for epoch, _ in begun] == [0, 1, 2, 2, 3]
    assert begun[2][1] == begun[3][1]
    assert begun[3][1] != begun[4][1]
    assert trainer.run.method.margins.visits().tolist() == [3] * 8  # the first epoch was clean
    assert trainer.run.method.steps_done == 2 * 3
    assert any("Epoch 3 begins again: margins and thresholds are back at its start" in line for line in said)
    assert epochs(trainer.save_dir) == [1, 2, 3, 4]


@pytest.mark.parametrize("where", ["the attack of the second batch", "a pass whose images are kept out"])
def test_the_epoch_is_begun_again_when_memory_runs_out(
    run: Any, thresholds: Any, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """The running statistics are held no longer than the pass that is kept out of them."""
    name = "method_loss" if where.startswith("the attack") else "preprocess_batch"
    host, left = getattr(AMATDetectionTrainer, name), [1]

    def starved(self: Any, *given: Any) -> Any:
        result = host(self, *given)
        if left and (name == "preprocess_batch" or self.run.method.steps_done == 2):
            left.pop()
            raise RuntimeError("CUDA out of memory")
        return result

    monkeypatch.setattr(AMATDetectionTrainer, name, starved)
    given = {"delta": 0.25, "thresholds": thresholds(math.inf), "bn": "adversarial", "val": False, "preset": "paper"}
    trainer = run("amat", **given)
    assert (left, trainer.batch_size) == ([], 2)
    margins = trainer.run.method.margins
    assert margins.visits().tolist() == [2] * 8
    assert margins.values().tolist() == pytest.approx([0.75] * 8)
    assert trainer.run.method.steps_done == 2 * 4
    assert epochs(trainer.save_dir) == [1, 2]
    lost = 2 if name == "method_loss" else 0  # passes of the lost epoch
    assert {int(layer.num_batches_tracked) for layer in layers(trainer)} == {2 * 4 + lost}
    assert all(layer.track_running_stats for layer in layers(trainer))


class Attacked(DetectionValidator):
    """The host's validator, whose images are attacked by a call of our own."""

    def preprocess(self, batch: dict[str, Any]) -> dict[str, Any]:
        batch, model = super().preprocess(batch), self.judged
        found = attack(model, batch, radius=2.0, steps=5, step_scale=2.0, keep="last")
        return {**batch, "img": found.images}


def test_fitness_is_what_the_hosts_validator_measures_under_attack(
    make: Any, known: Any, trained: Path, tmp_path: Path
) -> None:
    given = {"model": str(trained), "imgsz": 96, "epochs": 1, "batch": 1, "nbs": 1, "eps": 2.0, "lr0": 1e-4, **STILL}
    trainer = make("sat", tmp_path, source=known, **given)
    found: dict[str, Any] = {}

    def look(trainer: Any) -> None:
        found["states"] = copy.deepcopy(trainer.ema.ema.state_dict())
        found["metrics"], found["fitness"], found["best"] = *trainer.validate(), trainer.best_fitness
        validator = Attacked(trainer.test_loader, trainer.save_dir, copy.copy(trainer.args))
        validator.judged = trainer.ema.ema
        found["attacked"] = validator(trainer)
        raise Interrupted

    trainer.add_callback("on_train_epoch_end", look)
    with pytest.raises(Interrupted):
        trainer.train()
    clean = found["metrics"]["metrics/mAP50-95(B)"]
    assert found["fitness"] == found["best"] == pytest.approx(found["attacked"]["fitness"], abs=1e-4)
    assert 0.01 < found["fitness"] < 0.8 * clean
    assert not different(found["states"], trainer.ema.ema.state_dict())


def test_the_best_epoch_is_the_best_under_attack_and_no_clean_one(
    run: Any, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    """Not even where clean images are detected better there; nor does patience begin before."""
    host, judged, saved = DetectionTrainer.validate, iter([0.1, 0.3, 0.2, 0.2]), []

    def validate(self: Any) -> Any:
        metrics, _ = host(self)
        self.best_fitness = 0.9
        return metrics, 0.9

    monkeypatch.setattr(DetectionTrainer, "validate", validate)
    under_attack = AMATDetectionTrainer._under_attack

    def measured(self: Any) -> Any:
        found, value = under_attack(self), next(judged)
        assert found.keys() >= {"fitness", "metrics/mAP50-95(B)"}
        return found | {"fitness": value, "metrics/mAP50-95(B)": value}

    monkeypatch.setattr(AMATDetectionTrainer, "_under_attack", measured)
    keep = {"on_model_save": lambda t: saved.append((copy.deepcopy(t.ema.ema), t.best_fitness))}
    trainer = run("amat", on=keep, epochs=9, clean_epochs=3, patience=2)
    assert [best for _, best in saved] == [None] * 3 + [0.1, 0.3, 0.3, 0.3]
    rows = table(trainer.save_dir / "results.csv")
    assert [float(row[ROBUST]) for row in rows] == pytest.approx([math.nan] * 3 + [0.1, 0.3, 0.2, 0.2], nan_ok=True)
    best = torch.load(trainer.best, weights_only=False)["model"].state_dict()
    assert not different(best, {name: value.half() for name, value in saved[4][0].state_dict().items()})
    assert not any("under attack, that in best.pt neither" in line for line in said)


def stop(trainer: Any) -> None:
    """The user's own end of a run."""
    trainer.stop = True


def test_a_run_that_ends_before_it_attacks_fails_and_can_go_on(make: Any, tmp_path: Path) -> None:
    trainer = make("amat", tmp_path, epochs=4, clean_epochs=2)
    trainer.add_callback("on_fit_epoch_end", stop)
    with pytest.raises(RuntimeError, match=r"ended within its 2 clean epochs.*train resume model=.*last\.pt"):
        trainer.train()
    assert epochs(trainer.save_dir) == [1]
    again = resume("amat", trainer.last)
    assert epochs(trainer.save_dir) == [1, 2, 3, 4]
    assert again.run.method.steps_done == 4


def test_where_epochs_are_not_judged_they_have_the_hosts_fitness(run: Any) -> None:
    trainer = run("sat", "off", epochs=1, eps=1.0, robust_batches=0)
    assert trainer.best_fitness == trainer.fitness == pytest.approx(trainer.metrics["metrics/mAP50-95(B)"], abs=1e-4)
    assert ROBUST not in table(trainer.save_dir / "results.csv")[0]


@pytest.mark.parametrize(("own", "clean"), [({}, 2), ({"clean_epochs": 4}, 4)], ids=str)
def test_a_time_is_shared_among_clean_and_attacked_epochs(run: Any, own: dict[str, int], clean: int) -> None:
    """The host estimates the epochs anew after each: a tenth of them is clean, where that was left open."""
    seen: list[bool] = []

    def estimated(trainer: Any) -> None:  # called after the host's estimate, before ours is read
        trainer.epochs = trainer.args.epochs = {0: 24, 1: 21}.get(trainer.epoch, 6)

    def look(trainer: Any) -> None:
        seen.append(trainer.run.warming_up)
        trainer.stop = len(seen) == 6

    class Timed(AMATDetectionTrainer):
        def run_callbacks(self, event: str) -> None:
            if event == "on_fit_epoch_end":
                estimated(self)
            super().run_callbacks(event)

    trainer = run(Timed, on={"on_fit_epoch_end": look}, time=1.0, epochs=100, val=False, **own)
    assert seen[:6] == [True] * clean + [False] * (6 - clean)
    assert set(trainer.run.method.margins.visits().tolist()) == {6 - clean}


def test_a_length_by_the_clock_is_the_first_processes(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """After every epoch, and not after the last evaluation, which not all processes need to make."""
    asked: list[int] = []

    def first(value: Any) -> Any:
        if not isinstance(value, int):
            return value
        asked.append(value)
        return 9

    monkeypatch.setattr("adv_yolo.trainer.from_first_rank", first)
    seen: list[tuple[int, int]] = []

    def look(trainer: Any) -> None:
        seen.append((trainer.epochs, trainer.run.epochs))
        trainer.stop = len(seen) == 2

    trainer = run("sat", on={"on_fit_epoch_end": look}, time=1.0, eps=1.0, steps=1, robust_batches=0)
    assert seen == [(9, 9)] * 3, "two epochs, and the evaluation of the best one"
    assert len(asked) == 2
    assert trainer.args.epochs == 9


@pytest.mark.parametrize(
    ("own", "wanted"),
    [({}, 3), ({"preset": "paper"}, 100), ({"epochs": 7}, 7), ({"single_cls": True}, 100), ({"time": 1.0}, 100)],
    ids=str,
)
def test_what_was_trained_on_these_classes_is_trained_a_quarter_as_long(
    data: Any, tmp_path: Path, said: list[str], own: dict[str, Any], wanted: int
) -> None:
    path = save(DetectionModel(ONE_HEAD, nc=len(CLASSES), verbose=False), tmp_path / "std.pt")
    checkpoint = torch.load(path, weights_only=False)
    checkpoint["train_args"]["epochs"] = 9
    torch.save(checkpoint, path)
    given = {"model": str(path), "data": str(data.yaml), "project": str(tmp_path), "device": "cpu", **own}
    trainer = AMATDetectionTrainer(overrides=given)
    assert trainer.epochs == trainer.args.epochs == wanted
    assert yaml.safe_load((trainer.save_dir / "args.yaml").read_text())["epochs"] == wanted
    assert sum("a quarter of the 9 that" in line for line in said) == (wanted == 3)


@pytest.mark.parametrize(
    ("named", "wanted"),
    [("brain-tumor.yaml", 9), ("brain-tumor", 9), ("folder", 9), ("coco8.yaml", None), ("https://x.org/a.zip", None)],
)
def test_the_classes_of_a_data_set_that_the_host_finds_are_known_where_it_is_here(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch, named: str, wanted: int | None
) -> None:
    """By a name that the host comes with, and nothing is downloaded for it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "any.yaml").write_text("names: [negative, positive]")
    model = DetectionModel(ONE_HEAD, nc=2, verbose=False)
    path = save(model, tmp_path / "std.pt")
    checkpoint = torch.load(path, weights_only=False)
    checkpoint["model"].names = {0: "negative", 1: "positive"}
    checkpoint["train_args"]["epochs"] = 9
    torch.save(checkpoint, path)
    monkeypatch.setattr(downloads, "safe_download", lambda *_, **__: pytest.fail("a download"))
    assert epochs_of(str(path), named, False) == wanted
    assert sum(f"knows the classes of data={named} cannot be told" in line for line in said) == ("https" in named)


@pytest.mark.parametrize("scale", [0.5, 2.0**-25])
def test_a_loss_scale_that_has_fallen_is_told(run: Any, said: list[str], scale: float) -> None:
    """The host's scaler skips steps and says nothing."""

    def low(trainer: Any) -> None:
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=scale)

    words = "its loss scale has fallen to"
    stops = pytest.raises(FloatingPointError, match=f"{words} 3e-08 in epoch 1, .* Train with amp=False")
    with nullcontext() if scale == 0.5 else stops:
        run("sat", "own", {"on_train_start": low}, eps=0.5, steps=1, epochs=2)
    told = [line for line in said if words in line]
    assert len(told) == (scale == 0.5)
    assert all(line.startswith("WARNING") and f"{words} 0.5. Train with amp=False" in line for line in told)


def test_attack_steps_lost_to_bad_gradients_are_counted_and_warned_of(
    run: Any, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    overflow(monkeypatch, 0)
    trainer = run("sat", eps=0.5, steps=3, epochs=1, share_gradient=False)
    (row,) = table(trainer.save_dir / "results.csv")
    assert float(row["train/adv_nonfinite"]) == 2 * 3  # an image in each batch, in every step
    assert any(line.startswith("WARNING") and "6 attack step(s) were skipped" in line for line in said)
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())


def test_our_arguments_reach_the_processes_that_the_host_starts(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thresholds: Any
) -> None:
    """The host pickles ``vars(trainer.args)`` and makes the trainer anew from it (ultralytics.utils.dist)."""
    own = {"delta": 0.7, "clean_epochs": 1, "thresholds": thresholds(2.0), "norm": math.inf, "bounds": None}
    trainer = make("amat", tmp_path, **own)
    handed: list[bytes] = []
    monkeypatch.setattr(BaseTrainer, "train", lambda self: handed.append(pickle.dumps((type(self), vars(self.args)))))
    trainer.ddp = True
    trainer.train()
    kind, arguments = pickle.loads(handed[0])
    assert kind is AMATDetectionTrainer
    again = kind(cfg={**DEFAULT_CFG_DICT, "save_dir": ""}, overrides=arguments)
    assert again.settings == trainer.settings
    assert not set(vars(again.args)) & set(argument_names())
    assert again.save_dir == trainer.save_dir
    assert again.args.mosaic == 0


def test_thresholds_are_measured_in_the_processes_that_the_host_starts(
    make: Any, known: Any, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They get a model that was made before (``Model.train``, ``generate_ddp_file``), and make none."""
    given = {"model": str(trained), "imgsz": 96, "epochs": 1, "val": False}
    alone = make("amat", tmp_path / "alone", known, **given)
    weights = load_checkpoint(trained)[0]
    parent = make("amat", tmp_path / "several", known, **given)
    parent.model = parent.get_model(weights=weights, cfg=weights.yaml)
    parent.ddp = True
    handed: list[bytes] = []
    with monkeypatch.context() as patch:
        patch.setattr(
            BaseTrainer, "train", lambda self: handed.append(pickle.dumps((type(self), vars(self.args), self.model)))
        )
        parent.train()
    kind, arguments, model = pickle.loads(handed[0])
    child = kind(cfg={**DEFAULT_CFG_DICT, "save_dir": ""}, overrides=arguments)
    child.model = model
    for trainer in (alone, child):
        trainer.add_callback("on_train_start", stop_here)
        with pytest.raises(Interrupted):
            trainer.train()
        assert trainer.run.warmup_epochs == 0
        assert not [name for name in [*vars(trainer.model), *vars(trainer.ema.ema)] if "advmed" in name]
    assert isinstance(child.run.thresholds, Thresholds)
    assert child.run.thresholds == alone.run.thresholds


def test_sequential_backward_needs_a_single_process(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = DetectionTrainer.__init__

    def two(self: Any, *given: Any, **named: Any) -> None:
        host(self, *given, **named)
        self.world_size = 2

    monkeypatch.setattr(DetectionTrainer, "__init__", two)
    with pytest.raises(ValueError, match="backward=sequential works in a single process"):
        make("sat", tmp_path, eps=1.0, backward="sequential")
    make("sat", tmp_path, eps=1.0)


EARLY: list[tuple[str, dict[str, Any], str]] = [
    ("amat", {"delt": 1.0}, "delta"),
    ("amat", {"bn": "none"}, "bn must be 'both' or 'clean' or 'adversarial'"),
    ("amat", {"clean_epochs": "x"}, "clean_epochs must be a whole number"),
    ("dpaat", {"eps": 2.0, "eps_max": 1.0}, "got eps_min 0, eps 2, eps_max 1$"),
    ("trades", SEQUENTIAL, "^TRADES compares the predictions of its two passes, .* use backward 'tog"),
    ("sat", {"task": "segment"}, "trains detection models, not task=segment"),
    ("sat", {"distill_model": "x.pt"}, "distill_model"),
    ("amat", {"thresholds": "no.json"}, "thresholds=no.json: there is no such"),
]
"""What can be seen without loading anything."""
LATE: list[tuple[str, dict[str, Any], str]] = [
    ("amat", {"data": "no/such.yaml"}, "no/such.yaml"),
    ("amat", {"model": "yolov8n-seg.yaml"}, "detection model"),
    ("amat", {"clean_epochs": 0}, "AMAT has no thresholds: clean_epochs=0 rules out"),
    ("amat", {"clean_epochs": 2}, r"clean_epochs .*leaves no adversarial epoch of 2"),
    ("dpaat", {"eps_min": 3.0}, "<= eps_max, got eps_min 3, eps 2, eps_max 4$"),  # the default for 64 pixels
    ("amat", {"thresholds": OTHER_TERMS}, r"K = 3 loss terms .*l1_loss.* K = 3 terms .*dfl_loss"),
    ("amat", {"thresholds": "yolo26n"}, r"K = 3 loss terms .*l1_loss.* K = 3 terms .*dfl_loss"),
    ("amat", {"thresholds": TERMS, "rule": "mean"}, "hold no mean and std"),
    ("amat", {"thresholds": "another class"}, r"predicts 3 class\(es\) .* the data set has 4"),
    ("sat", {"labels": None}, r"none of the 8 training images has an object.*labels/a\.txt"),
]


@pytest.mark.parametrize(("kind", "arguments", "message"), [*EARLY, *LATE], ids=str)
def test_what_cannot_be_trained_is_refused_before_the_first_epoch(
    make: Any,
    make_data: Any,
    tmp_path: Path,
    thresholds: Any,
    networks: Any,
    trained: Path,
    kind: str,
    arguments: dict[str, Any],
    message: str,
) -> None:
    """And before anything is written, where it can be."""
    given, own = dict(arguments), make_data()
    match given.get("thresholds"):
        case tuple() as names:
            given["thresholds"] = thresholds(1.0, names)
        case "yolo26n":
            given["thresholds"] = str(save(networks("yolo26n"), tmp_path / "other.pt"))
        case "another class":
            given["thresholds"] = str(trained)
            own.describe([*CLASSES, "another"])
    if "labels" in given:
        del given["labels"]
        for name in own.names("train"):
            own.write_labels(name, [])
    with pytest.raises((OSError, RuntimeError, SyntaxError, TypeError, ValueError), match=message):
        trainer = make(kind, tmp_path / "runs", own, **given)
        trainer.add_callback("on_train_epoch_start", lambda _: pytest.fail("an epoch began"))
        trainer.train()
    assert (kind, arguments, message) in LATE or not (tmp_path / "runs").exists()


def test_a_release_newer_than_those_that_were_tested_is_pointed_out(
    make: Any, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("advmed.versions._told", set())
    monkeypatch.setattr("advmed.versions.installed", lambda package: "99.0")
    make("sat", tmp_path, eps=1.0)
    (line,) = [line for line in said if "newer than" in line]
    assert line.startswith("WARNING: ") and "ultralytics 99.0 is newer than" in line

"""The trainers against the stock one: weights, steps, statistics, checkpoints, interruptions and bad input."""

from __future__ import annotations

import copy
import io
import math
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
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
from ultralytics.utils import DEFAULT_CFG_DICT

from adv_yolo import AMATDetectionTrainer, SATDetectionTrainer
from adv_yolo.settings import argument_names
from adv_yolo.trainer import COLUMNS, STATE, TRAINERS, MethodCriterion
from advmed.thresholds import RunningThresholds, Thresholds
from helpers.hosts import BLOCKER, Interrupted, different, margins_of, plain, table, watched

pytestmark = pytest.mark.slow

TERMS = ("box_loss", "cls_loss", "dfl_loss")
SHORT = {"steps": 1, "step_scale": 1.0}


@pytest.fixture(scope="module")
def make(data: Any, tools: Any) -> Callable[..., Any]:
    """A trainer with quick settings: the stock one, or one of ours by the name of its method or its class."""

    def made(kind: str | type[Any], folder: Path, source: Any = None, model: str = "ONE_HEAD", **arguments: Any) -> Any:
        given = {"model": getattr(tools, model, model), "data": str((source or data).yaml)}
        given |= {"project": str(folder), "name": "run", **({} if kind == "stock" else SHORT)}
        trainer = {"stock": DetectionTrainer, **TRAINERS}.get(kind, kind)
        return trainer(overrides={**tools.QUIET, **given, **arguments})

    return made


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
        {"model": "TWO_HEADS"},
        {"cls_pw": 1.0, "cls": 2.0},
        {"multi_scale": 0.5, "imgsz": 96, "fliplr": 0.5},
        {"freeze": 2, "nbs": 8, "single_cls": True},
    ],
    ids=str,
)
def test_noise_of_nothing_is_the_stock_training_bit_for_bit(run: Any, tools: Any, arguments: dict[str, Any]) -> None:
    given = {**tools.STILL, **arguments}
    stock = run("stock", "stock", **given)
    ours = run("sat", "ours", eps=0.0, bn="clean", **given)
    assert not changed(stock.model, ours.model)
    assert not changed(stock.ema.ema, ours.ema.ema)
    other = run("sat", "other", eps=2.0, bn="clean", val=False, **given)
    assert len(changed(stock.model, other.model)) > 20
    assert all(value.isfinite().all() for value in other.model.state_dict().values())


def test_noise_of_nothing_is_the_stock_training_in_half_precision(
    run: Any, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host has it on GPUs only; autocast keeps its casts of the weights from pass to pass everywhere."""
    half = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    monkeypatch.setattr("ultralytics.engine.trainer.autocast", lambda *_, **__: half())
    given = {**tools.STILL, "val": False}
    stock = run("stock", "stock", **given)
    for backward in ("together", "sequential"):
        ours = run("sat", f"{backward} 0", eps=0.0, bn="clean", backward=backward, **given)
        assert backward == "sequential" or not changed(stock.model, ours.model)
        for name, value in stock.model.state_dict().items():
            torch.testing.assert_close(ours.model.state_dict()[name], value, rtol=1e-2, atol=1e-4, msg=name)
        other = run("sat", f"{backward} 2", eps=2.0, bn="clean", backward=backward, **given)
        assert len(changed(stock.model, other.model)) > 20
        assert other.run.method.steps_done == 4


def test_the_clean_warm_up_is_the_stock_training_bit_for_bit(run: Any, tools: Any) -> None:
    weights: dict[str, Any] = {}

    def keep(trainer: Any) -> None:
        weights.setdefault(type(trainer).__name__, copy.deepcopy(trainer.model))

    for kind in ("stock", "amat"):
        run(kind, kind, {"on_train_epoch_end": keep}, val=False, **tools.STILL)
    assert not changed(weights["DetectionTrainer"], weights["AMATDetectionTrainer"])


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("sat", {"bn": "both"}),
        ("sat", {"bn": "clean"}),
        ("sat", {"bn": "adversarial"}),
        ("dpaat", {"sync_weight": 0.0}),  # back-propagates one pass only
    ],
)
def test_sequential_backward_gives_the_same_weights(run: Any, tools: Any, kind: str, own: dict[str, Any]) -> None:
    """With an optimizer step for two batches."""
    given = {"eps": 1.0, "epochs": 2, "nbs": 8, "val": False, **tools.STILL, **own}
    first, second = (run(kind, backward, backward=backward, **given) for backward in ("together", "sequential"))
    for name, value in first.model.state_dict().items():
        torch.testing.assert_close(second.model.state_dict()[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("model", "arguments", "branch"),
    [("ONE_HEAD", {}, None), ("TWO_HEADS", {}, "one2many"), ("TWO_HEADS", {"nms": False}, "one2one")],
    ids=str,
)
@pytest.mark.parametrize(
    ("kind", "own"), [("trades", {"beta": 3.0}), ("dpaat", {"sync_weight": 3.0}), ("dpaat", {"sync_weight": 0.0})]
)
def test_the_loss_is_that_of_the_host_and_the_weighted_distance(
    make: Any,
    tools: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    own: dict[str, float],
    model: str,
    arguments: dict[str, Any],
    branch: str | None,
) -> None:
    """With the gradients: neither of the two passes is a constant of the distance. The loss items that the host logs
    are those of the clean pass, where a method makes one that it learns from.
    """
    method_loss = TRAINERS[kind].method_loss

    def look(self: Any, predictions: Any, batch: dict[str, Any]) -> Any:
        network, steps = copy.deepcopy(self.model), watched(self.run.method, monkeypatch)
        loss, items = method_loss(self, predictions, batch)

        noise = steps[0].adversarial - batch["img"]
        assert noise.flatten(1).norm(dim=1).min() > 1.0, "the attack found no way (TRADES starts at 1 % of the radius)"
        criterion = network.init_criterion()
        if model == "TWO_HEADS":
            criterion.o2m, criterion.o2o = self.terms.criterion.o2m, self.terms.criterion.o2o
        passes = [network(images) for images in (batch["img"], steps[0].adversarial)]
        (clean, clean_items), (adversarial, adversarial_items) = (criterion(each, batch) for each in passes)
        sync, (weight,) = tools.divergence(network, *passes).mean(), own.values()
        wanted = (clean if kind == "trades" else adversarial).sum() + weight * sync
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
        raise Interrupted

    monkeypatch.setattr(TRAINERS[kind], "method_loss", look)
    settings = {"eps": 3.0, "steps": 3, "step_scale": 3.0, "model": model}
    trainer = make(kind, tmp_path, **settings, **own, **arguments)
    with pytest.raises(Interrupted):
        trainer.train()
    assert trainer.terms.branch == branch


def layers(trainer: Any) -> list[nn.BatchNorm2d]:
    return [module for module in trainer.model.modules() if isinstance(module, nn.BatchNorm2d)]


def test_the_option_says_which_images_feed_the_running_statistics(run: Any, tools: Any, thresholds: Any) -> None:
    """After one batch, when the weights of all runs are still those they began with. Attacks feed nothing."""
    seen: dict[str, Tensor] = {}
    common = {"epochs": 1, "val": False, **tools.STILL}

    def start(name: str, kind: str, passes: int, **own: Any) -> None:
        def keep(trainer: Any) -> None:
            # Of all layers; the first would be too alike.
            seen.setdefault(name, torch.cat([layer.running_mean for layer in layers(trainer)]).clone())

        trainer = run(kind, name, {"on_train_batch_end": keep}, **common, **own)
        assert {int(layer.num_batches_tracked) for layer in layers(trainer)} == {2 * passes}, name
        assert all(layer.track_running_stats for layer in layers(trainer))

    start("stock", "stock", 1)
    for bn in ("both", "clean", "adversarial"):
        given, passes = {"bn": bn, "eps": 6.0, "steps": 2}, 1 + (bn == "both")
        start(bn, "sat", passes, **given)
        start(f"amat {bn}", "amat", passes, **given, delta=1.0, thresholds=thresholds(5.0))
        start(f"trades {bn}", "trades", passes, **given)
        start(f"dpaat {bn}", "dpaat", passes, **given)
        # AT learns from no loss of clean images, nor does DPAAT without synchronisation, whatever the option says.
        start(f"at {bn}", "at", 1, **given)
        start(f"none {bn}", "dpaat", 1, **given, sync_weight=0.0)
    for name, same_as in (
        ("clean", "stock"),
        ("amat clean", "stock"),
        ("trades clean", "stock"),
        ("dpaat clean", "stock"),
        ("adversarial", "at both"),
        ("dpaat adversarial", "at both"),  # its first attack is that of AT
        *((f"{name} {bn}", "at both") for name in ("at", "none") for bn in ("both", "clean", "adversarial")),
    ):
        assert torch.equal(seen[name], seen[same_as]), name
    for one, other in (
        *(("adversarial", "clean"), ("both", "clean"), ("both", "adversarial")),
        *(("trades adversarial", "stock"), ("trades adversarial", "at both")),  # attacked images, but not those of AT
    ):
        assert (seen[one] - seen[other]).abs().max() > 1e-3


FINISHED: dict[str, dict[str, Any]] = {
    "amat": {"delta": 0.5, "plots": True, "model": "TWO_HEADS"},  # self-calibrated: its first epoch is clean
    "trades": {"eps": 1.0},
    "dpaat": {"eps": 1.0, "step_size": 0.25, "eps_max": 1.5},
}
methods = pytest.mark.parametrize("method", FINISHED)


@pytest.fixture(scope="module")
def finished(make: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Runs of three epochs; ``saved`` are copies of last.pt as it was during the training."""
    made: dict[str, Any] = {}

    def finish(method: str) -> Any:
        if method in made:
            return made[method]
        torch.set_num_threads(1)
        folder = tmp_path_factory.mktemp(method)
        trainer = made[method] = make(method, folder, epochs=3, **FINISHED[method])
        trainer.saved, trainer.weights_of_heads, trainer.criteria = [], [], []

        def keep(trainer: Any) -> None:
            trainer.saved.append(shutil.copy(trainer.last, folder / f"{trainer.epoch}.pt"))
            trainer.weights_of_heads.append(getattr(trainer.terms.criterion, "o2m", None))
            trainer.criteria.append(trainer.model.criterion)

        trainer.add_callback("on_model_save", keep)
        trainer.train()
        return trainer

    return finish


@methods
def test_results_and_noise_levels_are_written_down(finished: Any, data: Any, method: str) -> None:
    trainer = finished(method)
    rows = table(trainer.save_dir / "results.csv")
    names = list(rows[0])
    assert [name for name in names if "adv_" in name] == list(COLUMNS.values()) == names[-len(COLUMNS) :]
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    for epoch, row in enumerate(rows):
        assert None not in row
        ours = {key: float(row[column]) for key, column in COLUMNS.items()}
        clean, levels = method == "amat" and epoch == 0, [ours[f"margin_{q}"] for q in ("q05", "q50", "q95")]
        assert ours["loss_clean"] > 0
        assert (ours["loss_adversarial"] > 0) == (ours["attack_seconds"] > 0) == (ours["nonfinite"] == 0) == (not clean)
        assert (ours["loss_sync"] > 0) == (method != "amat")
        if method == "trades":
            assert all(math.isnan(value) for value in (*levels, ours["expanded"]))
        elif not clean:
            assert levels == sorted(levels)
            assert 0 <= ours["expanded"] <= 1
        if method == "dpaat":
            assert 0.25 <= levels[0] <= levels[2] <= 1.5
            assert 0 < ours["expanded"] < 1
    path = trainer.save_dir / "margins.csv"
    if method == "trades":
        assert not path.exists()
    else:
        assert {row["visits"] for row in table(path)} == {"2" if method == "amat" else "3"}
        store = trainer.run.method.store
        assert margins_of(path) == pytest.approx(dict(zip(store.ids(), store.values().tolist(), strict=True)))
        assert set(store.ids()) == {f"images/{name}.jpg" for name in data.names("train")}
    if method == "amat":
        assert (trainer.save_dir / "results.png").stat().st_size > 1000


@methods
def test_checkpoints_hold_plain_values_while_training_and_nothing_afterwards(
    finished: Any, data: Any, method: str
) -> None:
    trainer = finished(method)
    assert len(trainer.saved) == 3
    for epoch, path in enumerate(trainer.saved):
        network = torch.load(path, weights_only=False)["ema"]
        state = getattr(network, STATE)
        assert plain(state)
        assert state["images"]["count"] == 8
        assert network.criterion is None
        assert ("margins" in state["method"]) == (method != "trades")
        if method == "amat":
            assert len(state["method"]["margins"]["ids"]) == (0 if epoch == 0 else 8)
        if method == "dpaat":
            sizes = state["method"]["margins"]
            assert set(sizes["ids"]) == {f"images/{name}.jpg" for name in data.names("train")}
            assert sizes["visits"] == [epoch + 1] * 8
            steps = [(value - 1.0) / 0.25 for value in sizes["values"]]
            assert len(set(steps)) > 1
            # Up or down at every visit, but for the upper end, two steps from the first size.
            assert all(step == round(step) and abs(step) <= min(epoch + 1, 3) and step <= 2 for step in steps)
    image = data.folder / "images" / f"{data.names('val')[0]}.jpg"
    for path in (trainer.last, trainer.best):
        checkpoint = torch.load(path, weights_only=False)
        assert checkpoint["optimizer"] is checkpoint["ema"] is checkpoint["model"].criterion is None
        assert not hasattr(checkpoint["model"], STATE)
        assert not set(checkpoint["train_args"]) & set(argument_names())
        assert len(YOLO(path).predict(image, imgsz=64, device="cpu", verbose=False)) == 1
    assert not hasattr(trainer.ema.ema, STATE)


@pytest.mark.parametrize("val", [True, False])
def test_columns_keep_their_order(run: Any, val: bool) -> None:
    stock, ours = run("stock", "stock", val=val), run("sat", "ours", val=val, eps=0.5)
    expected, rows = (table(trainer.save_dir / "results.csv") for trainer in (stock, ours))
    assert list(rows[0]) == [*expected[0], *COLUMNS.values()]
    for row in rows:
        assert None not in row  # as many values as names
        assert float(row["train/adv_loss_clean"]) > 0.5
        assert math.isnan(float(row["train/adv_margin_q50"]))


def test_settings_are_written_down(finished: Any) -> None:
    folder = finished("amat").save_dir
    text = (folder / "adversarial.yaml").read_text()
    found = yaml.safe_load(text)
    assert (found["delta"], found["steps"]) == (0.5, 1)
    assert found["eps"] == pytest.approx(10 * 64 / 320)  # the default, for 64 pixels instead of 320
    assert "# method: AMAT" in text
    assert set(found) == set(argument_names()), "it can be passed on as cfg=adversarial.yaml"
    assert not set(yaml.safe_load((folder / "args.yaml").read_text())) & set(argument_names())


def test_the_criterion_stands_in_for_the_hosts_and_is_left_out_of_copies(finished: Any) -> None:
    trainer = finished("amat")
    criterion = trainer.criteria[0]
    assert isinstance(criterion, MethodCriterion)
    for copied in (copy.deepcopy(criterion), copy.copy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert copied is None
    assert copy.deepcopy(trainer.model).criterion is None
    assert criterion.one2many is trainer.terms.criterion.one2many
    assert not hasattr(criterion, "something_else")
    # The weights of two heads move as in the stock training.
    assert trainer.weights_of_heads == pytest.approx(weights_of_heads(trainer))
    assert len(set(trainer.weights_of_heads)) > 1


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
exported = YOLO(paths[-1]).export(format="torchscript", imgsz=64, device="cpu")
assert YOLO(exported, task="detect").predict(image, **quiet)[0].orig_shape
try:
    import adv_yolo
except ModuleNotFoundError:
    print("fine without us")
"""
)


def test_checkpoints_work_where_our_packages_are_not_installed(finished: Any, data: Any, tmp_path: Path) -> None:
    image = data.folder / "images" / f"{data.names('val')[0]}.jpg"
    trainer = finished("amat")
    paths = [shutil.copy(path, tmp_path) for path in (trainer.last, trainer.best)]
    words = [str(word) for word in (data.yaml, image, trainer.saved[1], *paths)]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_US, *words], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fine without us" in done.stdout


def test_margins_grow_by_delta_a_visit_while_nothing_is_too_much(run: Any, thresholds: Any, data: Any) -> None:
    trainer = run("amat", delta=0.25, thresholds=thresholds(math.inf), epochs=3, val=False)
    margins = trainer.run.method.margins
    assert sorted(margins.ids()) == [f"images/{name}.jpg" for name in data.names("train")]
    assert margins.visits().tolist() == [3] * 8
    assert margins.values().tolist() == pytest.approx([0.25 * 4] * 8)
    rows = table(trainer.save_dir / "results.csv")
    assert [float(row["train/adv_margin_q50"]) for row in rows] == pytest.approx([0.5, 0.75, 1.0])
    assert [float(row["train/adv_expanded"]) for row in rows] == [1.0] * 3


def test_self_calibrated_thresholds_begin_after_the_warm_up(run: Any, said: list[str]) -> None:
    trainer = run("amat", epochs=4, clean_epochs=2, delta=0.5, val=False)
    assert isinstance(trainer.run.thresholds, RunningThresholds)
    assert trainer.run.thresholds.names == TERMS
    assert trainer.run.method.margins.visits().tolist() == [2] * 8
    assert sum("Warm-up done. Thresholds: box_loss < " in line for line in said) == 1
    assert any("margins can reach about 1.00" in line for line in said)
    assert any("self-calibrated" in line for line in said)


def test_thresholds_are_measured_on_a_trained_model(run: Any, trained: Path) -> None:
    trainer = run("amat", thresholds=str(trained), epochs=1, val=False)
    found = trainer.run.thresholds
    assert isinstance(found, Thresholds)
    assert (found.n, found.rule, found.names) == (8, "mean+2std", TERMS)
    assert found.values == pytest.approx([m + 2 * s for m, s in zip(found.mean, found.std, strict=True)])
    assert trainer.run.method.margins.visits().tolist() == [1] * 8


@pytest.mark.parametrize(
    ("kind", "given", "mosaic"),
    [("amat", {}, 0), ("dpaat", {}, 0), ("dpaat", {"mosaic": 1.0}, 1), ("amat", {"mosaic": 1.0, "mixup": 0.5}, 1)]
    + [(kind, {"eps": 1.0, "mixup": 0.5}, 1) for kind in ("sat", "at", "trades")],
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


def test_images_that_are_mixed_on_request_keep_stable_ids(run: Any, data: Any) -> None:
    trainer = run("amat", mosaic=1.0, mixup=0.5, close_mosaic=1, clean_epochs=1, epochs=3, val=False)
    assert set(trainer.run.method.margins.ids()) == {f"images/{name}.jpg" for name in data.names("train")}
    assert trainer.run.method.margins.visits().tolist() == [2] * 8


def interrupt(trainer: Any) -> None:
    if trainer.epoch == 2:
        raise Interrupted


@pytest.fixture
def broken(make: Any, tmp_path: Path) -> Callable[..., Path]:
    """The last.pt of a run that was interrupted in its third epoch of four."""

    def stopped(kind: str = "amat", **arguments: Any) -> Path:
        trainer = make(kind, tmp_path / "broken" / kind, epochs=4, **arguments)
        trainer.add_callback("on_train_batch_end", interrupt)
        with pytest.raises(Interrupted):
            trainer.train()
        return Path(trainer.last)

    return stopped


def resume(kind: str, last: Path, begun: Callable[[Any], Any] | None = None, **arguments: Any) -> Any:
    """The resumed run after its end; ``begun`` is what its epochs are looked at with as they begin."""
    trainer = TRAINERS[kind](overrides={"model": str(last), "resume": str(last), **arguments})
    if begun is not None:
        trainer.begun = []
        trainer.add_callback("on_train_epoch_start", lambda trainer: trainer.begun.append(begun(trainer)))
    trainer.train()
    return trainer


def saved_state(last: Path) -> Any:
    return getattr(torch.load(last, weights_only=False)["ema"], STATE)


def test_a_resumed_run_continues_with_its_margins_thresholds_and_settings(
    broken: Any, said: list[str], tools: Any
) -> None:
    last = broken(delta=0.25, steps=2, refinement="crossing", random_start=0.5)
    state = saved_state(last)
    said.clear()
    trainer = resume("amat", last, lambda trainer: copy.deepcopy(trainer.run.state_dict()), delta=9.0, steps=7)
    assert trainer.begun[0] == {key: state[key] for key in trainer.begun[0]}
    settings = trainer.settings
    assert (settings.delta, settings.steps, settings.refinement) == (0.25, 2, "crossing")
    assert any("WARNING" in line and "Resume ignores ['delta', 'steps']" in line for line in said)
    assert not any("settings changed" in line for line in said)
    assert trainer.run.method.margins.visits().tolist() == [3] * 8  # of four epochs one was clean
    assert state["method"]["margins"]["visits"] == [1] * 8  # the interrupted epoch left nothing
    assert state["method"]["thresholds"]["ceiling"] is not None
    assert tools.epochs(trainer.save_dir) == [1, 2, 3, 4]
    assert trainer.save_dir == last.parents[1]


def test_a_resumed_run_continues_with_its_perturbation_sizes(broken: Any, said: list[str], tools: Any) -> None:
    given = {"eps": 1.0, "step_size": 0.25, "eps_min": 0.5, "eps_max": 2.0, "average": "epoch", "sync_weight": 2.0}
    last = broken("dpaat", **given)
    state = saved_state(last)["method"]
    assert state["margins"]["visits"] == [2] * 8  # the interrupted epoch left nothing
    said.clear()
    trainer = resume("dpaat", last, lambda trainer: copy.deepcopy(trainer.run.method.state_dict()))
    assert trainer.begun[0]["margins"] == state["margins"]
    assert trainer.begun[0]["steps_done"] == state["steps_done"] == 4
    assert trainer.begun[0]["increases"] == [0.0, 0.0], "the mean of an epoch is that of this epoch"
    assert {name: getattr(trainer.settings, name) for name in given} == given
    method = trainer.run.method
    assert (method.lowest, method.highest, method.average) == (0.5, 2.0, "epoch")
    assert method.sizes.visits().tolist() == [4] * 8
    assert tools.epochs(trainer.save_dir) == [1, 2, 3, 4]
    assert sum("noise levels" in line and "of the visits let one grow" in line for line in said) == 2


def test_thresholds_from_a_file_are_kept_when_it_has_gone(broken: Any, thresholds: Any, tmp_path: Path) -> None:
    path = shutil.copy(thresholds(3.0), tmp_path / "thresholds.json")
    last = broken(thresholds=str(path))
    Path(path).unlink()
    trainer = resume("amat", last)
    assert trainer.run.thresholds.values == (3.0,) * 3
    assert trainer.run.method.margins.visits().tolist() == [4] * 8


def test_a_resumed_run_with_two_heads_goes_on_with_their_weights(broken: Any) -> None:
    trainer = resume("sat", broken("sat", model="TWO_HEADS", eps=0.5), lambda trainer: trainer.terms.criterion.o2m)
    assert trainer.begun == pytest.approx(weights_of_heads(trainer)[1:])
    assert trainer.run.method.steps_done == 8


@pytest.mark.parametrize("kind", ["amat", "sat", "dpaat"])
def test_a_run_is_resumed_where_its_data_set_moved_and_not_where_its_images_have_changed(
    broken: Any, make_data: Any, tmp_path: Path, kind: str
) -> None:
    own = make_data("first")
    last = broken(kind, source=own, **({} if kind == "amat" else {"eps": 0.5}))
    names, other = own.names("train"), own.names("val")[0]
    for changed_names in (names[:-1], [*names, other], [*names[:-1], other]):
        own.list("train", changed_names)
        with pytest.raises(ValueError, match=rf"images have changed.*8 then, {len(changed_names)} now"):
            resume(kind, last)
    own.list("train", names)
    shutil.copytree(own.folder, tmp_path / "second")
    shutil.rmtree(own.folder)
    trainer = resume(kind, last, data=str(tmp_path / "second" / own.yaml.name))
    if kind != "sat":
        assert trainer.run.method.store.visits().tolist() == [3 if kind == "amat" else 4] * 8


def test_what_is_no_unfinished_run_of_the_method_is_not_resumed(broken: Any, finished: Any, run: Any) -> None:
    stock, sat = broken("stock"), broken("sat", eps=0.5)
    for kind in ("amat", "dpaat"):
        for last, holds in ((stock, "no margins"), (sat, "a run of SAT")):
            with pytest.raises(ValueError, match=f"no unfinished training of {kind.upper()}.*: it holds {holds}"):
                resume(kind, last)
    done = finished("trades").last
    with pytest.raises((AssertionError, ValueError), match=r"finished, nothing to resume|no unfinished training"):
        resume("trades", done)
    # It is a starting point for another.
    assert run("sat", model=str(done), eps=0.5, epochs=1, val=False).run.method.steps_done == 2


@pytest.mark.parametrize("source", ["file", "self-calibrated"])
def test_an_epoch_lost_to_a_nan_leaves_no_mark_on_the_margins(
    run: Any, tools: Any, thresholds: Any, said: list[str], source: str
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
    watch = {"on_train_epoch_start": look, "on_train_batch_end": poison}
    trainer = run("amat", on=watch, delta=0.25, epochs=4, **own)
    assert [epoch for epoch, _ in begun] == [0, 1, 2, 2, 3]
    assert begun[2][1] == begun[3][1]
    assert begun[3][1] != begun[4][1]
    adversarial = 4 if source == "file" else 3
    assert trainer.run.method.margins.visits().tolist() == [adversarial] * 8
    assert trainer.run.method.steps_done == 2 * adversarial
    assert any("Epoch 3 begins again: margins and thresholds are back at its start" in line for line in said)
    assert tools.epochs(trainer.save_dir) == [1, 2, 3, 4]


class Starved(AMATDetectionTrainer):
    """Runs out of memory once, after the attack of the second batch."""

    left = 1

    def method_loss(self, predictions: Any, batch: dict[str, Any]) -> Any:
        result = super().method_loss(predictions, batch)
        if self.run.method.steps_done == 2 and self.left:
            self.left -= 1
            raise RuntimeError("CUDA out of memory")
        return result


def test_the_epoch_is_begun_again_when_memory_runs_out(run: Any, tools: Any, thresholds: Any) -> None:
    trainer = run(Starved, delta=0.25, thresholds=thresholds(math.inf), val=False)
    assert (trainer.left, trainer.batch_size) == (0, 2)
    margins = trainer.run.method.margins
    assert margins.visits().tolist() == [2] * 8
    assert margins.values().tolist() == pytest.approx([0.75] * 8)
    assert trainer.run.method.steps_done == 2 * 4
    assert tools.epochs(trainer.save_dir) == [1, 2]


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
    assert {int(layer.num_batches_tracked) for layer in layers(trainer)} == {4}
    assert all(layer.track_running_stats for layer in layers(trainer))


def test_attack_steps_lost_to_bad_gradients_are_counted_and_warned_of(
    run: Any, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    grad = torch.autograd.grad

    def overflowing(*given: Any, **named: Any) -> Any:
        (gradient,) = grad(*given, **named)
        gradient[0] = math.inf
        return (gradient,)

    monkeypatch.setattr(torch.autograd, "grad", overflowing)
    trainer = run("sat", eps=0.5, steps=3, epochs=1)
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
        make("sat", tmp_path, eps=1.0, backward="sequential")
    make("sat", tmp_path, eps=1.0)


TOGETHER = r"^{} compares the predictions of its two passes, .* one after the other: use backward 'together'$"


@pytest.mark.parametrize(
    ("kind", "arguments", "error", "message"),
    [
        ("amat", {"delt": 1.0}, SyntaxError, "delta"),
        ("amat", {"delta": 0}, ValueError, "delta must be a finite number > 0"),
        ("amat", {"bn": "none"}, ValueError, "bn must be 'both' or 'clean' or 'adversarial'"),
        ("amat", {"clean_epochs": -1}, ValueError, "clean_epochs must be >= 0, got -1"),
        ("amat", {"clean_epochs": "x"}, ValueError, "clean_epochs must be a whole number"),
        ("dpaat", {"eps": 2.0, "eps_max": 1.0}, ValueError, "got eps_min 0, eps 2, eps_max 1$"),
        ("trades", {"backward": "sequential"}, ValueError, TOGETHER.format("TRADES")),
        ("dpaat", {"backward": "sequential"}, ValueError, TOGETHER.format("DPAAT")),
        ("sat", {"task": "segment"}, TypeError, "trains detection models, not task=segment"),
        ("sat", {"distill_model": "x.pt"}, ValueError, "distill_model"),
        ("amat", {"thresholds": "no.json"}, FileNotFoundError, "thresholds=no.json: there is no such"),
        ("amat", {"data": "no/such.yaml"}, RuntimeError, "no/such.yaml"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(
    make: Any, tmp_path: Path, kind: str, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(kind, tmp_path, **arguments)
    assert "data" in arguments or not list(tmp_path.iterdir())


OTHER = ("box_loss", "cls_loss", "l1_loss")
SIZES = "^perturbation sizes need eps_min <= eps <= eps_max, got eps_min 3, eps 2, eps_max 4$"


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("amat", {"model": "yolov8n-seg.yaml"}, "detection model"),
        ("amat", {"clean_epochs": 0}, "AMAT has no thresholds: clean_epochs=0 rules out"),
        ("amat", {"clean_epochs": 2}, r"clean_epochs .*leaves no adversarial epoch of 2"),
        ("amat", {"epochs": 1}, r"clean_epochs .*leaves no adversarial epoch of 1"),
        ("dpaat", {"eps_min": 3.0}, SIZES),  # above the default for 64 pixels
        ("amat", {"thresholds": OTHER}, r"K = 3 loss terms .*l1_loss.* K = 3 terms .*dfl_loss"),
        ("amat", {"thresholds": "yolo26n"}, r"K = 3 loss terms .*l1_loss.* K = 3 terms .*dfl_loss"),
        ("amat", {"thresholds": OTHER[:2]}, r"K = 2 loss terms .* K = 3 terms"),
        ("amat", {"thresholds": TERMS, "rule": "mean"}, "hold no mean and std"),
        ("amat", {"thresholds": "another class"}, r"predicts 3 class\(es\) .* the data set has 4"),
        ("sat", {"labels": None}, r"none of the 8 training images has an object.*labels/a\.txt"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_first_epoch(
    make: Any,
    make_data: Any,
    tmp_path: Path,
    thresholds: Any,
    networks: Any,
    trained: Path,
    tools: Any,
    kind: str,
    arguments: dict[str, Any],
    message: str,
) -> None:
    given, own = dict(arguments), make_data()
    match given.get("thresholds"):
        case tuple() as names:
            given["thresholds"] = thresholds(1.0, names)
        case "yolo26n":
            given["thresholds"] = str(tools.save(networks("yolo26n"), tmp_path / "other.pt"))
        case "another class":
            given["thresholds"] = str(trained)
            own.describe([*tools.CLASSES, "another"])
    if "labels" in given:
        del given["labels"]
        for name in own.names("train"):
            own.write_labels(name, [])
    trainer = make(kind, tmp_path, own, **given)
    trainer.add_callback("on_train_epoch_start", lambda _: pytest.fail("an epoch began"))
    with pytest.raises((TypeError, ValueError), match=message):
        trainer.train()


def test_a_batch_of_background_images_trains(run: Any, make_data: Any, thresholds: Any) -> None:
    own = make_data()
    for name in own.names("train")[1:]:
        own.write_labels(name, [])
    given = {"delta": 0.5, "thresholds": thresholds(math.inf), "epochs": 1, "batch": 2, "val": False}
    trainer = run("amat", source=own, **given)
    assert trainer.run.method.margins.visits().tolist() == [1] * 8
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())

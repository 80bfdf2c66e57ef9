"""Training by the command: every method, against plain loops, interrupted and resumed, and what a run leaves."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from sklearn.metrics import average_precision_score
from torch import Tensor, nn
from torch.utils.data import default_collate

from adv_classify import ClassificationObjective
from adv_classify.cli import main
from adv_classify.data import MedMNIST
from adv_classify.module import (
    ClassifierAttack,
    MethodOptions,
    Network,
    RobustClassifier,
    mean_average_precision,
    resolved,
)
from advmed.attacks import PGD
from advmed.thresholds import Thresholds
from advmed.training.settings import TrainingSettings

VALUES = 3 * 16 * 16
BOTH = {"loss_clean", "loss_adversarial"}
ATTACKED = {"nonfinite", "attack_seconds"}
SIZES = {"expanded", "margin_q05", "margin_q50", "margin_q95"}
COLUMNS = {
    "STD": {"loss_clean"},
    "AT": {"loss_adversarial", *ATTACKED},
    "SAT": {*BOTH, *ATTACKED},
    "AMAT": {*BOTH, *ATTACKED, *SIZES},
    "TRADES": {*BOTH, *ATTACKED, "loss_sync"},
    "DPAAT": {*BOTH, *ATTACKED, *SIZES, "loss_sync"},
}
ADAPTIVE = {"AMAT", "DPAAT"}


@pytest.fixture(scope="module")
def begin(tools: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of weights to begin with."""
    path = tmp_path_factory.mktemp("begin") / "begin.pth"
    with torch.random.fork_rng():
        torch.manual_seed(5)
        torch.save(timm.create_model(tools.NETWORK, num_classes=3).state_dict(), path)
    return path


@pytest.fixture
def fit(npz: Path, tmp_path: Path, tools: Any) -> Callable[..., Path]:
    """A training on the pictures; returns the run's folder."""

    def run(name: str = "own", data: Path = npz, **changes: Any) -> Path:
        return tools.fit(data, tmp_path / name, **changes)

    return run


@pytest.fixture
def refused(npz: Path, tmp_path: Path, tools: Any, fails: Callable[..., str]) -> Callable[..., str]:
    """A training that must not begin; returns the message."""

    def run(data: Path = npz, **changes: Any) -> str:
        folder = tmp_path / "refused"
        message = fails("fit", *tools.arguments(data, folder, **changes))
        left = {path.name for path in folder.rglob("*") if path.is_file()}
        assert left <= {"config.yaml", "hparams.yaml"}  # Lightning writes them before it asks anybody
        return message

    return run


@pytest.fixture
def thresholds(tmp_path: Path) -> Callable[..., Path]:
    def write(value: float, names: tuple[str, ...] = ("ce",)) -> Path:
        path = tmp_path / "own.json"
        Thresholds((value,) * len(names), names).save(path)
        return path

    return write


def state_of(run: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)


# Every method


@pytest.mark.parametrize("name", COLUMNS)
def test_every_method_learns_easy_classes(fit: Any, npz: Path, tools: Any, name: str) -> None:
    more = {"model__method__warmup_epochs": 1} if name == "AMAT" else {}
    run = fit(model__method__name=name, model__method__eps=0.1, model__lr=3e-3, trainer__max_epochs=4, **more)
    assert tools.logged(run, "val/accuracy")[-1] > 0.9
    assert tools.logged(run, "val/mAP")[-1] > 0.9
    rows = tools.table(run / "metrics.csv")
    assert {key.removeprefix("adv/") for key in rows[-1] if key.startswith("adv/")} == COLUMNS[name]
    for key in COLUMNS[name]:
        values = tools.logged(run, f"adv/{key}")
        assert len(values) == (3 if name == "AMAT" and key in ("nonfinite", "expanded", "loss_adversarial") else 4)
        assert all(value >= 0 and math.isfinite(value) for value in values)
    assert {"config.yaml", "adversarial.yaml"} <= {path.name for path in run.iterdir()}
    assert (run / "margins.csv").exists() == (name in ADAPTIVE)
    if name in ADAPTIVE:
        found = tools.margins(run)
        assert sorted(found) == MedMNIST(str(npz)).train_ids
        assert {visits for _, visits in found.values()} == {3 if name == "AMAT" else 4}
    state = state_of(run)
    assert state["epoch"] == 3
    assert all(value.isfinite().all() for value in state["state_dict"].values())
    assert state["advmed"]["method"]["method"] == name


@pytest.mark.parametrize("network", ["test_resnet", "test_efficientnet"])
def test_batch_norm_learns_from_what_is_trained_on_only(fit: Any, tools: Any, network: str) -> None:
    """AT: a pass on the clean images would be one more."""
    run = fit(model__method__name="AT", model__network__name=network, model__attack__steps=3)
    counts = {int(v) for k, v in tools.weights(run).items() if k.endswith("num_batches_tracked")}
    assert counts == {3}


@pytest.mark.parametrize(("norm", "eps", "delta"), [("2", 0.2174, 0.05434), (".inf", 0.0157, 0.00392)])
def test_a_run_says_what_it_was(fit: Any, npz: Path, norm: str, eps: float, delta: float) -> None:
    run = fit(model__method__name="DPAAT", model__method__eps_min=0.001, model__attack__norm=norm)
    text = (run / "adversarial.yaml").read_text()
    assert text.startswith("# method: DPAAT\n# thresholds: None\n")
    settings = yaml.safe_load(text)
    assert (settings["eps"], settings["delta"]) == (eps, delta)  # what they were resolved to
    assert (settings["eps_min"], settings["norm"], settings["steps"]) == (0.001, float(norm.strip(".")), 2)
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["method"]["name"] == "DPAAT"
    assert config["data"]["init_args"]["file"] == str(npz)


def test_a_run_is_run_again_by_its_own_configuration(fit: Any, tmp_path: Path, tools: Any) -> None:
    config = tmp_path / "transform.yaml"
    flip = {"class_path": "torchvision.transforms.v2.RandomHorizontalFlip", "init_args": {"p": 0.3}}
    config.write_text(yaml.safe_dump({"data": {"class_path": "MedMNIST", "init_args": {"transform": flip}}}))
    run = fit(config=config, model__method__name="AMAT", trainer__max_epochs=2)
    written = yaml.safe_load((run / "config.yaml").read_text())["data"]["init_args"]["transform"]
    assert written["class_path"] == flip["class_path"]
    again = tmp_path / "again"
    assert main(["fit", "--config", str(run / "config.yaml"), "--trainer.default_root_dir", str(again)]) == 0
    other = tools.runs(again)[-1]
    assert (other / "margins.csv").read_text() == (run / "margins.csv").read_text()
    first, second = tools.weights(run), tools.weights(other)
    assert all(torch.equal(value, second[key]) for key, value in first.items())


# Against plain loops


@pytest.fixture
def met(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The ids of every batch of a training, in their order."""
    batches: list[list[str]] = []
    step = RobustClassifier.training_step

    def noted(self: RobustClassifier, batch: Any, batch_idx: int) -> Tensor:
        batches.append(list(batch["id"]))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(RobustClassifier, "training_step", noted)
    return batches


def plain_loop(
    data: MedMNIST, met: list[list[str]], begin: Path, loss: Callable[..., Tensor], name: str
) -> dict[str, Tensor]:
    """PyTorch and nothing else, on normalised images."""
    model = timm.create_model(name, num_classes=3)
    model.load_state_dict(torch.load(begin))
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    samples = {sample["id"]: sample for sample in data.dataset("train")}
    model.train()
    for ids in met:
        batch = default_collate([samples[i] for i in ids])
        optimizer.zero_grad()
        loss(model((batch["image"] - 0.5) / 0.5), batch["label"]).backward()
        optimizer.step()
    return {f"network.model.{key}": value for key, value in model.state_dict().items()}


SGD = {"optimizer": "SGD", "optimizer__lr": 0.05, "optimizer__momentum": 0.9}
COUNTS = torch.tensor([12.0, 8.0, 4.0])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_standard_training_is_the_plain_loop(
    fit: Any, met: list[list[str]], begin: Path, tmp_path: Path, tools: Any, smoothing: float, weighted: bool
) -> None:
    labels = np.repeat([0, 1, 2], [12, 8, 4])
    path = tools.write_npz(tmp_path / "own.npz", train_images=tools.pictures(labels), train_labels=labels[:, None])
    run = fit(
        data=path,
        data__flip=0,
        model__network__weights=begin,
        model__label_smoothing=smoothing,
        model__class_weights="balanced" if weighted else "none",
        trainer__max_epochs=2,
        **SGD,
    )
    weight = 24 / (3 * COUNTS)

    def loss(logits: Tensor, label: Tensor) -> Tensor:
        each = nn.functional.cross_entropy(logits, label, reduction="none", label_smoothing=smoothing)
        return (each * weight[label]).mean() if weighted else each.mean()

    data = MedMNIST(str(path), flip=0, workers=0)
    assert [len(ids) for ids in met] == [8] * 6
    assert sorted(i for ids in met[:3] for i in ids) == sorted(i for ids in met[3:] for i in ids) == data.train_ids
    wanted = plain_loop(data, met, begin, loss, tools.NETWORK)
    found = {key: value for key, value in tools.weights(run).items() if key in wanted}
    tools.close(wanted, found)
    start = torch.load(begin)
    assert (wanted["network.model.classifier.weight"] - start["classifier.weight"]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["SAT", "AT", "DPAAT"])
def test_noise_of_nothing_is_standard_training(fit: Any, begin: Path, tools: Any, name: str) -> None:
    given = {"data__flip": 0, "model__network__weights": begin, "trainer__max_epochs": 2, **SGD}
    standard = tools.weights(fit("standard", **given))
    ours = tools.weights(fit("ours", model__method__name=name, model__method__eps=0.0, **given))
    tools.close(standard, ours, atol=2e-4)
    other = tools.weights(fit("other", model__method__name=name, model__method__eps=1.0, **given))
    assert max(float((value - other[key]).abs().max()) for key, value in standard.items()) > 1e-3


def test_accumulated_batches_are_one_large_batch(fit: Any, begin: Path, tools: Any) -> None:
    given = {"model__method__name": "SAT", "model__network__weights": begin, "data__flip": 0, **SGD}
    large = tools.weights(fit("large", **given))
    small = tools.weights(fit("small", data__batch_size=4, trainer__accumulate_grad_batches=2, **given))
    tools.close(large, small, atol=2e-4)
    assert (large["network.model.classifier.weight"] - torch.load(begin)["classifier.weight"]).abs().max() > 1e-3


def test_gradients_are_clipped_as_the_trainer_says(fit: Any, begin: Path, tools: Any) -> None:
    given = {"model__network__weights": begin, "optimizer": "SGD", "optimizer__lr": 1.0}
    found = tools.weights(fit(model__method__name="SAT", trainer__gradient_clip_val=1e-3, **given))
    start = torch.load(begin)
    moved = sum(float((found[f"network.model.{key}"] - value).square().sum()) for key, value in start.items()) ** 0.5
    assert 1e-3 < moved <= 3.001e-3  # three steps


def test_the_optimizer_is_the_users(fit: Any, begin: Path, tools: Any) -> None:
    given = {"optimizer": "SGD", "optimizer__lr": 0.0, "lr_scheduler": "ExponentialLR", "lr_scheduler__gamma": 0.5}
    run = fit(model__network__weights=begin, model__method__name="AT", **given)
    found = tools.weights(run)
    assert all(torch.equal(value, found[f"network.model.{key}"]) for key, value in torch.load(begin).items())
    assert state_of(run)["lr_schedulers"][0]["gamma"] == 0.5


def test_the_default_optimizer_ends_with_a_rate_of_nothing(fit: Any) -> None:
    state = state_of(fit(model__lr=0.01, trainer__max_epochs=2))
    assert state["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(0, abs=1e-9)
    assert state["optimizer_states"][0]["param_groups"][0]["initial_lr"] == 0.01
    assert state["lr_schedulers"][0]["T_max"] == 6


@pytest.mark.parametrize("name", ["DPAAT", "AMAT"])
def test_half_precision(fit: Any, tools: Any, name: str) -> None:
    run = fit(model__method__name=name, trainer__precision="bf16-mixed", trainer__max_epochs=2)
    assert all(value.dtype in (torch.float32, torch.int64) for value in tools.weights(run).values())
    assert tools.logged(run, "adv/nonfinite")[-1] == 0
    assert len(tools.margins(run)) == 24
    assert tools.logged(run, "val/accuracy")[-1] > 0.5


# Class imbalance, validation


def test_balanced_weights_keep_the_scale_of_the_loss() -> None:
    counts = [30, 12, 3, 15]
    model = RobustClassifier(Network(name="test_resnet"), class_weights="balanced", num_classes=4, class_counts=counts)
    weight = model.class_weight
    assert float((weight * torch.tensor(counts)).sum()) == pytest.approx(60)  # the mean over all images is 1
    torch.testing.assert_close(weight * torch.tensor(counts), torch.full((4,), 15.0))
    even = RobustClassifier(Network(name="test_resnet"), class_weights="balanced", num_classes=4, class_counts=[7] * 4)
    assert torch.equal(even.class_weight, torch.ones(4))
    assert RobustClassifier(Network(name="test_resnet"), num_classes=4).class_weight is None
    assert "class_weight" not in model.state_dict()


def test_balanced_draws_see_rare_images_again(fit: Any, tmp_path: Path, tools: Any) -> None:
    labels = np.repeat([0, 1, 2], [20, 2, 2])
    path = tools.write_npz(tmp_path / "own.npz", train_images=tools.pictures(labels), train_labels=labels[:, None])
    run = fit(data=path, model__method__name="DPAAT", data__sampler="balanced", trainer__max_epochs=3)
    found = tools.margins(run)
    visits = np.bincount(labels, weights=[found.get(f"train/{i:06d}", (0, 0))[1] for i in range(24)])
    assert visits.sum() == 72
    assert visits[1] > 12
    assert visits[2] > 12


def test_validation_under_attack_is_the_attack_at_eps(fit: Any, npz: Path, tools: Any) -> None:
    run = fit(model__method__eps=0.7, model__validation_steps=3, trainer__max_epochs=2)
    model = RobustClassifier.from_checkpoint(run / "checkpoints" / "last.ckpt")
    batch = next(iter(MedMNIST(str(npz), workers=0, batch_size=12).val_dataloader()))
    objective = ClassificationObjective(model.network, batch["label"])
    attacked = PGD(3, 2.5)(objective, batch["image"], 0.7, bounds=(0.0, 1.0)).images
    for prefix, images in (("", batch["image"]), ("robust_", attacked)):
        right = (model(images).argmax(1) == batch["label"]).float().mean().item()
        assert tools.logged(run, f"val/{prefix}accuracy")[-1] == pytest.approx(right)
        wanted = mean_average_precision(model(images).softmax(1), batch["label"])
        assert tools.logged(run, f"val/{prefix}mAP")[-1] == pytest.approx(float(wanted), abs=1e-4)
    assert tools.logged(run, "val/robust_accuracy")[-1] < tools.logged(run, "val/accuracy")[-1]


def test_the_best_checkpoint_is_of_the_best_epoch_and_the_last_of_the_last(fit: Any, tools: Any) -> None:
    run = fit(trainer__max_epochs=4, model__lr=3e-3, checkpoint__monitor="val/accuracy")
    values = tools.logged(run, "val/accuracy")
    assert values[-1] == max(values)
    assert state_of(run, "best")["epoch"] == values.index(max(values)) < 3
    assert state_of(run)["epoch"] == 3
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}


def test_the_folder_of_checkpoints_is_the_users(fit: Any, tmp_path: Path) -> None:
    fit(checkpoint__dirpath=tmp_path / "kept", checkpoint__filename="top")
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"top.ckpt", "last.ckpt"}


# AMAT and DPAAT


def test_self_calibrated_thresholds(fit: Any, tools: Any, said: list[str]) -> None:
    run = fit(model__method__name="AMAT", model__method__delta=0.3, trainer__max_epochs=3)
    assert any("thresholds are self-calibrated" in line for line in said)
    assert any(line.startswith("Warm-up done. Thresholds: ce < ") for line in said)
    assert any(line.startswith("24 images, each met about 2.0 times") for line in said)
    for value, visits in tools.margins(run).values():
        assert visits == 2
        assert 0 < value <= 0.9 + 1e-6
    saved = state_of(run)["advmed"]
    assert saved["thresholds"] is None
    assert saved["method"]["thresholds"]["statistics"]["names"] == ["ce"]


@pytest.mark.parametrize("value", [1e9, -1e9])
def test_thresholds_of_a_file(fit: Any, tools: Any, thresholds: Any, said: list[str], value: float) -> None:
    run = fit(
        model__method__name="AMAT",
        model__method__delta=0.25,
        model__method__thresholds=thresholds(value),
        model__attack__bounds="null",
        trainer__max_epochs=2,
    )
    assert any("thresholds from the file" in line for line in said)
    found = tools.margins(run)
    assert len(found) == 24
    for margin, visits in found.values():
        assert visits == 2
        assert margin == pytest.approx(0.75 if value > 0 else 0.25, rel=1e-5)
    assert f"# thresholds: ce < {value:.6g}\n" in (run / "adversarial.yaml").read_text()
    assert state_of(run)["advmed"]["thresholds"]["values"] == (value,)


@pytest.mark.parametrize("rule", ["mean", "mean+2std"])
def test_thresholds_of_a_standard_checkpoint(
    fit: Any, standard: Path, npz: Path, tmp_path: Path, rule: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, path = standard / "checkpoints" / "last.ckpt", tmp_path / "thresholds.json"
    assert main(["thresholds", str(checkpoint), "--rule", rule, "--out", str(path)]) == 0
    capsys.readouterr()
    run = fit(
        model__method__name="AMAT", model__method__thresholds=checkpoint, model__method__rule=rule, data__flip=0.5
    )
    measured, saved = Thresholds.load(path), state_of(run)["advmed"]["thresholds"]
    assert measured.values == pytest.approx(saved["values"], rel=1e-5)
    assert (saved["rule"], saved["n"], saved["source"]) == (rule, 24, str(checkpoint))
    assert saved["notes"] == {"split": "train"}
    model = RobustClassifier.from_checkpoint(checkpoint)
    batch = next(iter(MedMNIST(str(npz), workers=0, batch_size=24, flip=0).train_dataloader()))
    terms = nn.functional.cross_entropy(model(batch["image"]), batch["label"], reduction="none").double()
    wanted = terms.mean() + (2 * terms.std(correction=0) if rule != "mean" else 0)
    assert measured.values[0] == pytest.approx(wanted.item(), rel=1e-4)


def test_thresholds_that_do_not_fit_are_refused(
    refused: Any, thresholds: Any, standard: Path, tmp_path: Path, tools: Any
) -> None:
    given = {"model__method__name": "AMAT"}
    message = refused(**given, model__method__thresholds=thresholds(1.0, ("box", "cls")))
    assert "K = 2 loss terms ['box', 'cls'], the model's loss has K = 1 terms ['ce']" in message
    assert "there is no thresholds file" in refused(**given, model__method__thresholds=tmp_path / "none.json")
    assert "there is no thresholds file" in refused(**given, model__method__thresholds=tmp_path / "none.ckpt")
    checkpoint = standard / "checkpoints" / "last.ckpt"
    four = tools.write_npz(tmp_path / "four.npz", classes=4)
    message = refused(data=four, **given, model__method__thresholds=checkpoint)
    assert "predicts 3 classes, the data has 4" in message
    notes = tmp_path / "notes.ckpt"
    torch.save({"state_dict": {}}, notes)
    assert "is no checkpoint of adv-classify" in refused(**given, model__method__thresholds=notes)
    assert "leaves no adversarial epoch" in refused(**given)  # one epoch is warm-up


def test_sizes_move_by_steps_within_their_range(fit: Any, tools: Any) -> None:
    run = fit(
        model__method__name="DPAAT",
        model__method__eps=0.4,
        model__method__step_size=0.1,
        model__method__eps_min=0.3,
        model__method__eps_max=0.5,
        trainer__max_epochs=4,
    )
    values = [value for value, _ in tools.margins(run).values()]
    steps = [round((value - 0.4) / 0.1) for value in values]
    assert values == pytest.approx([0.4 + 0.1 * step for step in steps], abs=1e-6)
    assert len(set(steps)) > 1
    assert set(steps) <= {-1, 0, 1}
    assert tools.logged(run, "adv/margin_q95")[-1] <= 0.5


def test_the_ablations_of_dpaat(fit: Any, tools: Any) -> None:
    given = {"model__method__name": "DPAAT", "model__method__eps": 0.4}
    fixed = fit("fixed", model__method__step_size=0.0, **given)
    assert [value for value, _ in tools.margins(fixed).values()] == pytest.approx([0.4] * 24)
    plain = fit("plain", model__method__sync_weight=0.0, **given)
    assert "adv/loss_sync" not in tools.table(plain / "metrics.csv")[-1]
    assert len({value for value, _ in tools.margins(plain).values()}) > 1


@pytest.mark.parametrize(("norm", "eps", "delta"), [(2.0, 0.2174, 0.05434), (math.inf, 0.0157, 0.00392)])
def test_noise_levels_by_the_size_of_an_image(norm: float, eps: float, delta: float) -> None:
    assert eps == round((2 / 255 * VALUES**0.5) if norm == 2 else 4 / 255, 4)
    found = resolved(TrainingSettings(norm=norm), VALUES)
    assert (found.eps, found.delta) == (eps, delta)
    kept = resolved(TrainingSettings(norm=norm, eps=0.0, delta=0.3), VALUES)
    assert (kept.eps, kept.delta) == (0.0, 0.3)


# Interrupted and resumed


class PowerCut(RuntimeError):
    pass


LONG: dict[str, dict[str, Any]] = {
    "AMAT": {"model__method__name": "AMAT", "model__method__refinement": "crossing", "model__method__delta": 0.5},
    "DPAAT": {
        "model__method__name": "DPAAT",
        "model__method__average": "epoch",
        "model__attack__random_start": 0.5,
        "model__network__name": "test_resnet",  # has statistics of its own
        "model__network__drop_rate": 0.3,  # draws from the state of the process, as flips do
        "data__sampler": "balanced",
    },
}


def long(name: str) -> dict[str, Any]:
    return {"trainer__max_epochs": 4, "data__flip": 0.5, "model__lr": 1e-2, **LONG[name]}


def check_resumed(whole: Path, resumed: Path, tools: Any) -> None:
    """The same to the last bit: weights, optimizer, noise levels, visits."""
    first, second = state_of(whole), state_of(resumed)
    assert (first["epoch"], first["global_step"]) == (second["epoch"], second["global_step"]) == (3, 12)
    assert first["advmed"] == second["advmed"]
    assert first["lr_schedulers"] == second["lr_schedulers"]
    for key, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][key]), key
    states = [state["optimizer_states"][0]["state"] for state in (first, second)]
    assert all(torch.equal(value, states[1][i][key]) for i, part in states[0].items() for key, value in part.items())
    assert (whole / "margins.csv").read_text() == (resumed / "margins.csv").read_text()
    values = [tools.logged(run, "adv/margin_q50") for run in (whole, resumed)]
    assert values[0][-2:] == values[1]


@pytest.mark.parametrize("name", LONG)
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(
    fit: Any, npz: Path, tmp_path: Path, tools: Any, monkeypatch: pytest.MonkeyPatch, name: str, fails: Any
) -> None:
    whole = fit("whole", **long(name))
    step = RobustClassifier.training_step

    def stop(self: RobustClassifier, batch: Any, batch_idx: int) -> Tensor:
        if (self.current_epoch, batch_idx) == (2, 1):
            raise PowerCut("a power cut")
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(RobustClassifier, "training_step", stop)
        assert "a power cut" in fails("fit", *tools.arguments(npz, tmp_path / "cut", **long(name)))
    last = tools.runs(tmp_path / "cut")[-1] / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["epoch"] == 1
    check_resumed(whole, fit("cut", ckpt_path=last, **long(name)), tools)


KILLED = """
import os, signal, sys
from adv_classify.cli import main
from adv_classify.module import RobustClassifier
step = RobustClassifier.training_step
def stop(self, batch, batch_idx):
    if (self.current_epoch, batch_idx) == (2, 1):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch, batch_idx)
RobustClassifier.training_step = stop
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_happened(npz: Path, tmp_path: Path, tools: Any) -> None:
    """All three in processes of their own: what else is imported here may change the last bit of a convolution."""

    def run(folder: str, *code: str, status: int = 0, **more: Any) -> Path:
        command = [sys.executable, *code, "fit", *tools.arguments(npz, tmp_path / folder, **long("AMAT"), **more)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == status, done.stderr
        return tools.runs(tmp_path / folder)[-1]

    module = ("-m", "adv_classify.cli")
    cut = run("cut", "-c", KILLED, status=-signal.SIGKILL)
    resumed = run("cut", *module, ckpt_path=cut / "checkpoints" / "last.ckpt")
    check_resumed(run("whole", *module), resumed, tools)


def test_there_is_a_last_checkpoint_of_every_epoch_validated_or_not(fit: Any) -> None:
    run = fit(trainer__max_epochs=3, trainer__check_val_every_n_epoch=2, model__method__name="DPAAT")
    assert state_of(run)["epoch"] == 2
    assert state_of(run)["advmed"]["method"]["margins"]["visits"] == [3] * 24
    assert state_of(run, "best")["epoch"] == 1
    assert state_of(run, "best")["advmed"]["method"]["margins"]["visits"] == [2] * 24


def test_a_resumed_run_keeps_the_thresholds_it_began_with(fit: Any, tools: Any, thresholds: Any) -> None:
    path = thresholds(1e9)
    given = {
        "model__method__name": "AMAT",
        "model__method__delta": 0.25,
        "model__method__thresholds": path,
        "model__attack__bounds": "null",
    }
    last = fit("first", **given, trainer__max_epochs=2) / "checkpoints" / "last.ckpt"
    thresholds(-1e9)  # the file is another one now
    run = fit("second", **given, trainer__max_epochs=3, ckpt_path=last)
    assert "# thresholds: ce < 1e+09\n" in (run / "adversarial.yaml").read_text()
    assert [value for value, _ in tools.margins(run).values()] == pytest.approx([1.0] * 24, rel=1e-5)
    path.unlink()
    assert len(tools.margins(fit("third", **given, trainer__max_epochs=3, ckpt_path=last))) == 24


def test_another_method_or_other_data_cannot_resume_a_run(
    refused: Any, adaptive: Path, npz: Path, tmp_path: Path, tools: Any
) -> None:
    last = {"ckpt_path": adaptive / "checkpoints" / "last.ckpt", "trainer__max_epochs": 5}
    message = refused(**last, model__method__name="SAT")
    assert message == (
        "the checkpoint is of a run of AMAT, it cannot be resumed with SAT. To start from its weights, name it as the "
        "network's weights instead"
    )
    fewer = tools.write_npz(tmp_path / "fewer.npz", {"train": 21, "val": 12})
    message = refused(data=fewer, **last, model__method__name="AMAT")
    assert message == (
        "the training images are not those of the checkpoint (24 then, 21 now): restore them, or start a new training"
    )
    four = tools.write_npz(tmp_path / "four.npz", classes=4)
    message = refused(data=four, **last, model__method__name="AMAT")
    assert message == (
        f"the checkpoint is of {tools.NETWORK} for 3 classes and 3 channel(s), and cannot be loaded into "
        f"{tools.NETWORK} for 4 classes and 3 channel(s)"
    )
    message = refused(**last, model__method__name="AMAT", model__network__name="test_resnet")
    assert message.startswith(f"the checkpoint is of {tools.NETWORK} for 3 classes")
    assert message.endswith("cannot be loaded into test_resnet for 3 classes and 3 channel(s)")
    assert "not found" in refused(**{**last, "ckpt_path": tmp_path / "none.ckpt"}, model__method__name="AMAT")


def test_other_settings_of_a_resumed_run_are_the_users_and_are_named(fit: Any, adaptive: Path, tools: Any) -> None:
    """LightningCLI would put the checkpoint's in their place, without a word."""
    given = {"model__method__name": "AMAT", "trainer__max_epochs": 4, "model__method__margin_max": 0.01}
    with pytest.warns(UserWarning, match="settings changed since the checkpoint: .*margin_max") as warned:
        run = fit(ckpt_path=adaptive / "checkpoints" / "last.ckpt", **given)
    assert not any("delta" in str(w.message) for w in warned if "settings changed" in str(w.message))
    assert [value for value, _ in tools.margins(run).values()] == pytest.approx([0.01] * 24)
    assert {visits for _, visits in tools.margins(run).values()} == {3}


# Settings that cannot be


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainer__max_epochs": -1}, "set max_epochs, got -1"),
        ({"trainer__max_epochs": None, "trainer__max_steps": 3}, "set max_epochs, got -1"),
        ({"model__method__backward": "sequential"}, "backward 'sequential' is not to be had with Lightning"),
        ({"model__label_smoothing": 1.0}, "label_smoothing must be in [0, 1), got 1.0"),
        ({"model__method__name": "DPAAT", "model__method__eps": 1, "model__method__eps_min": 2}, "need eps_min <= eps"),
        ({"model__method__name": "DPAAT", "model__method__eps_min": 1.0}, "got eps_min 1"),
        ({"model__method__name": "AMAT", "model__method__warmup_epochs": 0}, "rules out self-calibration"),
    ],
)
def test_settings_that_cannot_be_trained_with(refused: Any, changes: dict[str, Any], message: str) -> None:
    told = refused(**changes)
    assert message in told
    assert "\n" not in told


def test_class_weights_need_counts() -> None:
    with pytest.raises(ValueError, match="class_weights 'balanced' needs class_counts"):
        RobustClassifier(Network(name="test_resnet"), class_weights="balanced", num_classes=3)


# Checkpoints


def test_the_network_of_a_checkpoint_needs_none_of_us(standard: Path, tmp_path: Path, tools: Any) -> None:
    """Plain values, loaded where our packages cannot be imported, into a plain network of timm."""
    images = tools.noise(2, 3, 16, 16)
    model = RobustClassifier.from_checkpoint(standard / "checkpoints" / "last.ckpt")
    assert not model.training
    torch.save({"images": images, "logits": model(images).detach()}, tmp_path / "wanted.pt")
    code = f"""
import sys
sys.modules["adv_classify"] = sys.modules["advmed"] = sys.modules["lightning"] = None
import timm, torch
checkpoint = torch.load({str(standard / "checkpoints" / "last.ckpt")!r}, weights_only=True)
weights, start = checkpoint["state_dict"], "network.model."
model = timm.create_model({tools.NETWORK!r}, num_classes=3).eval()
model.load_state_dict({{k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)}})
wanted = torch.load({str(tmp_path / "wanted.pt")!r}, weights_only=True)
images = (wanted["images"] - weights["network.mean"]) / weights["network.std"]
torch.testing.assert_close(model(images), wanted["logits"])
print("the same")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "the same", done.stderr


def test_a_checkpoint_is_read_with_its_settings(fit: Any, begin: Path, tools: Any) -> None:
    weights = begin.with_name("gone.pth")
    weights.write_bytes(begin.read_bytes())
    run = fit(
        model__network__weights=weights,
        model__method__name="DPAAT",
        model__attack__norm=".inf",
        model__class_weights="balanced",
        data__channels=3,
    )
    weights.unlink()  # what the training began with is needed no more
    model = RobustClassifier.from_checkpoint(run / "checkpoints" / "best.ckpt")
    assert (model.method_name, model.settings.norm, model.settings.bounds) == ("DPAAT", math.inf, (0.0, 1.0))
    assert torch.equal(model.class_weight, torch.ones(3))
    assert model.num_classes == 3
    saved = tools.weights(run, "best")
    assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("content", [None, {"state_dict": {}}, b"nothing"])
def test_what_is_no_checkpoint_of_ours(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "other.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    kind, message = (FileNotFoundError, "there is no") if content is None else (ValueError, "cannot be read|is no che")
    with pytest.raises(kind, match=message):
        RobustClassifier.from_checkpoint(path)


# Metrics


@pytest.mark.parametrize("absent", [False, True])
def test_map_is_that_of_scikit_learn_over_the_classes_that_occur(tools: Any, absent: bool) -> None:
    probabilities = tools.noise(60, 5, seed=2).softmax(1)
    labels = torch.randint(0, 5, (60,), generator=torch.Generator().manual_seed(3))
    if absent:
        labels[labels == 2] = 4
    present = labels.unique().tolist()
    assert len(present) == (4 if absent else 5)
    wanted = np.mean([average_precision_score(labels == k, probabilities[:, k]) for k in present])
    assert float(mean_average_precision(probabilities, labels)) == pytest.approx(wanted, rel=1e-5)


def test_a_module_of_ones_own_settings() -> None:
    """Lightning's hyper-parameters are plain values, too."""
    model = RobustClassifier(
        Network(name="test_resnet"),
        MethodOptions(name="DPAAT", eps=0.5),
        ClassifierAttack(norm=math.inf),
        num_classes=4,
        channels=1,
    )
    assert model.hparams["method"]["eps"] == 0.5
    assert model.hparams["attack"]["bounds"] == [0.0, 1.0]
    assert model(torch.rand(2, 1, 16, 16)).shape == (2, 4)

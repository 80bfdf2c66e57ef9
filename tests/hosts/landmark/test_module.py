"""Training by the command: every method, against a plain loop, interrupted and resumed, and what a run leaves."""

from __future__ import annotations

import inspect
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
import yaml
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from adv_landmark.cli import main
from adv_landmark.data import LandmarkTable
from adv_landmark.maps import decode, encode
from adv_landmark.module import (
    LandmarkAttack,
    MethodOptions,
    Network,
    RobustLandmarks,
    check_model,
    resolved,
    write_predictions,
)
from adv_landmark.objective import LandmarkObjective
from advmed.attacks import PGD
from advmed.thresholds import Thresholds
from advmed.training.settings import TrainingSettings

VALUES = 1 * 32 * 48
LEVEL = round(math.sqrt(VALUES / (3 * 200 * 160)), 5)
RADIUS = 2.4  # a twentieth of 48
TERMS = ("heatmap", "offset_y", "offset_x")
TINY = Network(encoder="tu-test_efficientnet", decoder_channels=(16, 16, 8, 8, 8))
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


@pytest.fixture
def fit(root: Path, tmp_path: Path, tools: Any) -> Callable[..., Path]:
    """A training on the pictures; returns the run's folder."""

    def run(name: str = "own", data: Path = root, **changes: Any) -> Path:
        return tools.fit(data, tmp_path / name, **changes)

    return run


@pytest.fixture
def refused(root: Path, tmp_path: Path, tools: Any, fails: Callable[..., str]) -> Callable[..., str]:
    """A training that must not begin; returns the message."""

    def run(data: Path = root, **changes: Any) -> str:
        folder = tmp_path / "refused"
        message = fails("fit", *tools.arguments(data, folder, **changes))
        left = {path.name for path in folder.rglob("*") if path.is_file()}
        assert left <= {"config.yaml", "hparams.yaml"}  # Lightning writes them before it asks anybody
        assert "\n" not in message
        return message

    return run


@pytest.fixture
def thresholds(tmp_path: Path) -> Callable[..., Path]:
    def write(value: float, names: tuple[str, ...] = TERMS) -> Path:
        path = tmp_path / "own.json"
        Thresholds((value,) * len(names), names).save(path)
        return path

    return write


@pytest.fixture(scope="module")
def begin(tools: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of an encoder's weights to begin with."""
    path = tmp_path_factory.mktemp("begin") / "begin.pth"
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = smp.Unet(tools.ENCODER, encoder_weights=None, in_channels=1, decoder_channels=(16, 16, 8, 8, 8))
    torch.save(model.encoder.model.state_dict(), path)
    return path


def of_the_run(data: Path, **changes: Any) -> LandmarkTable:
    return LandmarkTable(str(data), **{"size": (32, 48), "batch_size": 4, "workers": 0, **changes})


def module(**changes: Any) -> RobustLandmarks:
    given = {"network": TINY, "landmark_names": ["a", "b"], "channels": 1, "size": (32, 48), **changes}
    with torch.random.fork_rng():
        return RobustLandmarks(**given)


# Every method


@pytest.mark.parametrize("name", COLUMNS)
def test_every_method_trains_and_says_what_an_epoch_was(fit: Any, root: Path, tools: Any, name: str) -> None:
    epochs = 2 if name == "AMAT" else 1  # one of them to find the thresholds
    run = fit(model__method__name=name, trainer__max_epochs=epochs)
    rows = tools.table(run / "metrics.csv")
    assert {key.removeprefix("adv/") for key in rows[-1] if key.startswith("adv/")} == COLUMNS[name]
    for key in COLUMNS[name]:
        values = tools.logged(run, f"adv/{key}")
        assert len(values) == (1 if name == "AMAT" and key in ("nonfinite", "expanded", "loss_adversarial") else epochs)
        assert all(value >= 0 and math.isfinite(value) for value in values)
    assert len(tools.logged(run, "train/loss")) == 2 * epochs
    assert len(tools.logged(run, "val/MRE")) == epochs
    assert {"config.yaml", "adversarial.yaml"} <= {path.name for path in run.iterdir()}
    assert (run / "margins.csv").exists() == (name in ADAPTIVE)
    if name in ADAPTIVE:
        found = tools.margins(run)
        assert sorted(found) == sorted(of_the_run(root).train_ids)
        assert {visits for _, visits in found.values()} == {1}
    state = tools.state(run)
    assert state["epoch"] == epochs - 1
    assert all(value.isfinite().all() for value in state["state_dict"].values())
    assert state["advmed"]["method"]["method"] == name


def test_a_standard_training_learns_where_the_landmarks_are(standard: Path, root: Path, tools: Any) -> None:
    losses = tools.logged(standard, "train/loss")
    assert np.mean(losses[-4:]) < 0.4 * np.mean(losses[:4])
    model = RobustLandmarks.from_checkpoint(standard / "checkpoints" / "last.ckpt")
    batch = default_collate(list(of_the_run(root).dataset("train")))
    with torch.no_grad():
        error = model.errors(model(batch["image"]), batch)
    assert float(error.nanmedian()) < 1  # mm, of 19


@pytest.mark.parametrize("name", ["AT", "SAT", "TRADES", "DPAAT"])
def test_a_run_says_what_it_was(fit: Any, root: Path, name: str) -> None:
    run = fit(model__method__name=name)
    text = (run / "adversarial.yaml").read_text()
    assert text.startswith(f"# method: {name}\n# thresholds: None\n")
    settings = yaml.safe_load(text)
    assert (settings["eps"], settings["delta"]) == (LEVEL, LEVEL)  # what they were resolved to
    assert (settings["steps"], settings["norm"], settings["bounds"]) == (2, 2.0, [-1.0, 1.0])
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["method"]["name"] == name
    assert config["data"]["init_args"]["root"] == str(root)


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_other_precisions(fit: Any, tools: Any, precision: str) -> None:
    run = fit(model__method__name="DPAAT", trainer__precision=precision)
    kinds = {value.dtype for value in tools.weights(run).values()}
    assert kinds <= {torch.float64 if precision == "64-true" else torch.float32, torch.int64}
    assert tools.logged(run, "adv/nonfinite") == [0]
    assert len(tools.margins(run)) == 8


# Noise levels and losses that depend on the images


@pytest.mark.parametrize(("norm", "eps", "delta"), [(2.0, LEVEL, LEVEL), (math.inf, 0.00784, 0.00196)])
def test_noise_levels_by_the_size_of_an_image(norm: float, eps: float, delta: float) -> None:
    found = resolved(TrainingSettings(norm=norm), VALUES)
    assert (found.eps, found.delta) == (eps, delta)
    kept = resolved(TrainingSettings(norm=norm, eps=0.0, delta=0.3), VALUES)
    assert (kept.eps, kept.delta) == (0.0, 0.3)


def test_the_level_of_the_paper_for_its_images() -> None:
    assert resolved(TrainingSettings(), 3 * 200 * 160).eps == 1
    assert resolved(TrainingSettings(), 4 * 3 * 200 * 160).delta == 2
    assert "1 in L2 for an image of 3 x 200 x 160 values" in " ".join((inspect.getdoc(RobustLandmarks) or "").split())


@pytest.mark.parametrize(("given", "radius"), [(None, RADIUS), (1, 1.0), (5.5, 5.5), (15.9, 15.9)])
def test_the_radius_is_a_twentieth_of_the_longer_side(given: float | None, radius: float) -> None:
    model = module(radius=given)
    assert model.radius == radius == model.hparams["radius"]
    assert model.objective_of(torch.zeros(1, 1, 32, 48), torch.full((1, 2, 2), 9.0)).targets.disk.sum() == 2 * int(
        sum((9 - x) ** 2 + (9 - y) ** 2 <= radius**2 for x in range(48) for y in range(32))
    )


@pytest.mark.parametrize(
    ("radius", "size", "shown"),
    [(0.99, (32, 48), "0.99"), (16, (32, 48), "16"), (-3, (32, 48), "-3"), (math.nan, (32, 48), "nan"),
     (None, (16, 19), "0.95"), (None, (8, 200), "10")],
)  # fmt: skip
def test_a_radius_that_does_not_fit_is_refused(radius: float | None, size: tuple[int, int], shown: str) -> None:
    with pytest.raises(ValueError, match="choose another size or radius") as told:
        module(radius=radius, size=size)
    assert str(told.value).startswith(f"the radius of a landmark, {shown} pixels, must be at least 1 and fit into")
    assert f"resized to {size[0]} x {size[1]}" in str(told.value)


@pytest.mark.parametrize(
    ("heatmap", "given", "weight"), [("dice", None, 0.5), ("bce", None, 2.0), ("dice", 3.0, 3.0), ("bce", 0.1, 0.1)]
)
def test_the_weight_of_the_heatmaps(heatmap: Any, given: float | None, weight: float) -> None:
    model = module(heatmap=heatmap, heatmap_weight=given)
    assert model.heatmap_weight == weight
    objective = model.objective_of(torch.zeros(2, 1, 32, 48), torch.full((2, 2, 2), 9.0))
    assert (objective.heatmap, objective.heatmap_weight) == (heatmap, weight)
    assert (model.hparams["heatmap"], model.hparams["heatmap_weight"]) == (heatmap, given)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.inf, math.nan])
def test_a_weight_of_the_heatmaps_that_is_none(weight: float) -> None:
    with pytest.raises(ValueError, match=f"heatmap_weight must be > 0, got {weight}"):
        module(heatmap_weight=weight)


# Against a plain loop


@pytest.fixture
def met(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The ids of every batch of a training, in their order."""
    batches: list[list[str]] = []
    step = RobustLandmarks.training_step

    def noted(self: RobustLandmarks, batch: Any, batch_idx: int) -> Tensor:
        batches.append(list(batch["id"]))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(RobustLandmarks, "training_step", noted)
    return batches


def scaled(points: np.ndarray) -> np.ndarray:
    """Points of a file of 40 x 48 pixels in an image of 32 x 48: edges stay edges."""
    return np.stack([points[:, 0], (points[:, 1] + 0.5) * 0.8 - 0.5], 1)


def plain_terms(maps: Tensor, points: np.ndarray, heatmap: str, weight: float, radius: float = RADIUS) -> Tensor:
    """The loss terms of one image, landmark by landmark, of the landmarks that are known."""
    count, each = len(points), []
    rows, columns = torch.meshgrid(torch.arange(maps.shape[1]), torch.arange(maps.shape[2]), indexing="ij")
    for k, (x, y) in enumerate(points):
        if math.isnan(x):
            continue
        squared = (rows - y) ** 2 + (columns - x) ** 2
        inside = squared <= radius**2
        heat = maps[k].sigmoid()
        if heatmap == "dice":
            loss = 1 - (2 * heat[inside].sum() + 1) / (heat.sum() + inside.sum() + 1)
        else:
            target = torch.where(inside, torch.exp(-squared / (2 * radius**2)), 0.0)
            loss = -(target * heat.log() + (1 - target) * (1 - heat).log()).mean()
        down = (maps[count + k] - (y - rows) / radius)[inside].abs().mean()
        across = (maps[2 * count + k] - (x - columns) / radius)[inside].abs().mean()
        each.append(torch.stack([weight * loss, down, across]))
    return torch.stack(each).mean(0)


SGD = {"optimizer": "SGD", "optimizer__lr": 0.05, "optimizer__momentum": 0.9}


@pytest.mark.parametrize(("heatmap", "given", "weight"), [("dice", None, 0.5), ("bce", None, 2.0), ("dice", 1.5, 1.5)])
def test_standard_training_is_the_plain_loop(
    fit: Any,
    met: list[list[str]],
    root: Path,
    tools: Any,
    begin: Path,
    heatmap: str,
    given: float | None,
    weight: float,
) -> None:
    """PyTorch, the U-Net of the library, and nothing else."""
    own = {"model__network__weights": begin, "model__heatmap": heatmap, "model__heatmap_weight": given, **SGD}
    start = tools.weights(fit("start", **{**own, "optimizer__lr": 0.0}))
    met.clear()
    run = fit(trainer__max_epochs=2, **own)
    assert [len(ids) for ids in met] == [4] * 4
    epochs = [sorted(i for ids in part for i in ids) for part in (met[:2], met[2:])]
    assert epochs == [sorted(of_the_run(root).train_ids)] * 2
    model = smp.Unet(tools.ENCODER, encoder_weights=None, in_channels=1, classes=9, decoder_channels=(16, 16, 8, 8, 8))
    for key, value in torch.load(begin, weights_only=True).items():
        if "running" not in key and "tracked" not in key:
            assert torch.equal(start[f"network.model.encoder.model.{key}"], value)
    keys = model.state_dict().keys()
    fresh = {k: torch.zeros_like(v) if "mean" in k or "tracked" in k else torch.ones_like(v) if "var" in k
             else start[f"network.model.{k}"] for k, v in model.state_dict().items()}  # fmt: skip
    model.load_state_dict(fresh)
    data = of_the_run(root)
    small = {sample["id"]: sample["image"] for sample in data.dataset("train")}
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    model.train()
    for ids in met:
        optimizer.zero_grad()
        batch = torch.stack([small[i] for i in ids])
        wide = torch.cat([batch, batch[..., -1:].expand(-1, -1, -1, 16)], -1)  # the edge is continued to 64 columns
        maps = model(wide)[..., :48]
        losses = [
            plain_terms(m, scaled(tools.truth(root, i)), heatmap, weight).sum() for m, i in zip(maps, ids, strict=True)
        ]
        torch.stack(losses).mean().backward()
        optimizer.step()
    learnt = tools.weights(run)
    found = {key: learnt[f"network.model.{key}"] for key in keys}
    tools.close(model.state_dict(), found, atol=2e-4, rtol=1e-3)
    assert max(float((value - fresh[key]).abs().max()) for key, value in found.items() if "tracked" not in key) > 1e-2


@pytest.mark.parametrize("name", ["AT", "SAT", "DPAAT"])
def test_noise_of_nothing_is_standard_training(fit: Any, tools: Any, name: str) -> None:
    given = {"trainer__max_epochs": 2, **SGD, "optimizer__lr": 0.005}

    def learnt(run: Path) -> dict[str, Tensor]:
        """Of two passes, SAT's BatchNorm learns twice."""
        return {
            k: v for k, v in tools.weights(run).items() if name == "AT" or not k.endswith(("mean", "var", "tracked"))
        }

    standard = learnt(fit("standard", **given))
    ours = learnt(fit("ours", model__method__name=name, model__method__eps=0.0, **given))
    tools.close(standard, ours, atol=2e-4, rtol=1e-3)
    other = learnt(fit("other", model__method__name=name, model__method__eps=3.0, **given))
    assert max(float((value - other[key]).abs().max()) for key, value in standard.items()) > 3e-3


# BatchNorm


@pytest.mark.parametrize("name", ["AT", "SAT", "AMAT", "TRADES", "DPAAT"])
def test_an_attack_leaves_the_network_as_it_was(
    fit: Any, monkeypatch: pytest.MonkeyPatch, thresholds: Any, name: str
) -> None:
    """In training and in validation, to the last bit: weights, running statistics, training flags, gradients."""
    attack, attacked = PGD.__call__, []
    models: list[RobustLandmarks] = []
    start = RobustLandmarks.on_fit_start

    def noted(self: RobustLandmarks) -> None:
        models.append(self)
        start(self)

    def watched(self: PGD, *given: Any, **how: Any) -> Any:
        (model,) = models
        before = {key: value.clone() for key, value in model.state_dict().items()}
        flags = [part.training for part in model.modules()]
        gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        result = attack(self, *given, **how)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert flags == [part.training for part in model.modules()]
        for p, gradient in zip(model.parameters(), gradients, strict=True):
            assert (p.grad is None) == (gradient is None)
            assert gradient is None or torch.equal(p.grad, gradient)
        attacked.append(model.network.training)
        return result

    monkeypatch.setattr(RobustLandmarks, "on_fit_start", noted)
    monkeypatch.setattr(PGD, "__call__", watched)
    given = {"model__method__thresholds": thresholds(1.0)} if name == "AMAT" else {}
    fit(model__method__name=name, model__validation_steps=1, trainer__num_sanity_val_steps=0, **given)
    assert attacked == [True, True, False]


@pytest.mark.parametrize("encoder", ["tu-test_resnet", "tu-test_efficientnet"])
@pytest.mark.parametrize(("name", "passes"), [("STD", 1), ("AT", 1), ("SAT", 2)])
def test_batch_norm_learns_from_what_is_trained_on_only(
    fit: Any, tools: Any, encoder: str, name: str, passes: int
) -> None:
    run = fit(
        model__method__name=name,
        model__network__encoder=encoder,
        model__attack__steps=3,
        model__validation_steps=2,
    )
    counts = {int(v) for k, v in tools.weights(run).items() if k.endswith("num_batches_tracked")}
    assert counts == {2 * passes}


@pytest.mark.parametrize(("images", "batches"), [(5, [4]), (6, [4, 2])])
def test_batch_norm_is_given_no_single_image(
    fit: Any, met: list[list[str]], tmp_path: Path, tools: Any, images: int, batches: list[int]
) -> None:
    fit(data=tools.write_table(tmp_path / "few", {"train": images, "val": 1}))
    assert [len(ids) for ids in met] == batches


# Validation


def by_hand(model: RobustLandmarks, images: Tensor, ids: list[str], root: Path, tools: Any, unit: str) -> np.ndarray:
    """Radial errors in NumPy, in pixels or mm of the files; NaN where the table is empty."""
    found = decode(model(images), model.radius)[0].detach().double().numpy()
    place = np.stack([found[..., 0], (found[..., 1] + 0.5) / 0.8 - 0.5], -1)
    away = place - np.stack([tools.truth(root, i) for i in ids])
    return np.hypot(*np.moveaxis(away * (tools.SPACING if unit == "mm" else (1, 1)), -1, 0))


@pytest.mark.parametrize("unit", ["mm", "px"])
@pytest.mark.parametrize(("command", "split"), [("validate", "val"), ("test", "test")])
def test_what_is_logged_is_what_numpy_finds(
    standard: Path, root: Path, tmp_path: Path, tools: Any, unit: str, command: str, split: str
) -> None:
    checkpoint = standard / "checkpoints" / "last.ckpt"
    words = ["--data", "LandmarkTable", "--data.root", root, "--data.size", "[32,48]", "--data.workers", 0]
    words += ["--data.batch_size", 3, "--data.unit", unit, "--ckpt_path", checkpoint, "--trainer.accelerator", "cpu"]
    words += ["--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", tmp_path]
    assert main([command, *map(str, words)]) == 0
    (run,) = tools.runs(tmp_path)
    model = RobustLandmarks.from_checkpoint(checkpoint)
    batch = default_collate(list(of_the_run(root).dataset(split)))
    objective = LandmarkObjective(model.network, batch["points"], (32, 48), radius=RADIUS, heatmap_weight=0.5)
    attacked = PGD(3, 2.5)(objective, batch["image"], 1.5, bounds=(-1.0, 1.0)).images
    for prefix, images in (("", batch["image"]), ("robust_", attacked)):
        error = by_hand(model, images, batch["id"], root, tools, unit)
        assert error.shape == (len(batch["id"]), 3)
        known = error[~np.isnan(error)]
        assert len(known) == (10 if split == "val" else 9)
        assert tools.logged(run, f"{split}/{prefix}MRE") == pytest.approx([known.mean()], rel=1e-4)
        for r in (2, 2.5, 3, 4):
            wanted = [(known <= r).mean()] if unit == "mm" else []
            assert tools.logged(run, f"{split}/{prefix}SDR_{r}mm") == pytest.approx(wanted)
    columns = set(tools.table(run / "metrics.csv")[0])
    per = 5 if unit == "mm" else 1
    assert len([name for name in columns if name.startswith(f"{split}/")]) == 2 * per
    assert tools.logged(run, f"{split}/robust_MRE") > tools.logged(run, f"{split}/MRE")


@pytest.mark.parametrize(("norm", "eps"), [(2.0, LEVEL), (math.inf, 0.00784)])
def test_validation_under_attack_is_at_the_level_of_the_method(
    fit: Any, monkeypatch: pytest.MonkeyPatch, norm: float, eps: float
) -> None:
    """The default level, too, and in the norm of the training, without a random start."""
    attack, attacked = PGD.__call__, []

    def noted(self: PGD, objective: Any, images: Tensor, radius: Any, **how: Any) -> Any:
        attacked.append((self.steps, self.step_scale, self.norm, self.random_start, radius, how["bounds"], len(images)))
        return attack(self, objective, images, radius, **how)

    monkeypatch.setattr(PGD, "__call__", noted)
    fit(model__validation_steps=7, model__attack__norm=norm if norm == 2 else ".inf")
    wanted = (7, 2.5, norm, 0.0, eps, (-1.0, 1.0), 4)
    assert attacked == [wanted] * 2  # before the training and after its epoch


def test_a_landmark_at_the_radius_itself_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model, values = module(unit="mm"), {}
    errors = torch.tensor([[2.0, math.nan], [2.5, 4.0], [0.5, 9.0]])
    monkeypatch.setattr(model, "all_scores", lambda: {"clean": errors, "attacked": errors + 0.5})
    monkeypatch.setattr(model, "log_dict", lambda given, **_: values.update(given))
    model.on_test_epoch_end()
    found = {name: float(value) for name, value in values.items()}
    assert found == pytest.approx({
        "test/MRE": 3.6, "test/SDR_2mm": 0.4, "test/SDR_2.5mm": 0.6, "test/SDR_3mm": 0.6, "test/SDR_4mm": 0.8,
        "test/robust_MRE": 4.1, "test/robust_SDR_2mm": 0.2, "test/robust_SDR_2.5mm": 0.4,
        "test/robust_SDR_3mm": 0.6, "test/robust_SDR_4mm": 0.6,
    })  # fmt: skip


def test_there_is_no_attack_in_validation_unless_it_is_asked_for(standard: Path, adaptive: Path, tools: Any) -> None:
    for run, wanted in ((standard, 5), (adaptive, 0)):
        assert len([name for name in tools.table(run / "metrics.csv")[0] if "robust" in name]) == wanted


def test_errors_of_maps_that_are_true(root: Path, tools: Any) -> None:
    """Half a disk to the right and a whole one down, in the unit of the data."""
    batch = default_collate(list(of_the_run(root).dataset("val")))
    known = ~torch.isnan(batch["points"]).any(2)
    model = module(landmark_names=["corner", "dot", "end"], unit="mm")
    for move, unit, wanted in (
        ((0.0, 0.0), "mm", 0.0),
        ((1.2, 0.0), "px", 1.2),
        ((0.0, -2.4), "px", 2.4 / 0.8),
        ((1.2, -2.4), "mm", math.hypot(1.2 * 0.4, 2.4 / 0.8 * 0.5)),
    ):
        model.unit = unit
        error = model.errors(perfect(batch["points"] + torch.tensor(move)), batch)
        assert torch.equal(~torch.isnan(error), known)
        torch.testing.assert_close(error[known], torch.full_like(error[known], wanted), atol=2e-4, rtol=1e-4)


def test_the_best_checkpoint_has_the_smallest_error_and_the_last_is_the_last(fit: Any, tools: Any) -> None:
    run = fit(trainer__max_epochs=5, model__lr=3e-2)
    values = tools.logged(run, "val/MRE")
    assert tools.state(run, "best")["epoch"] == values.index(min(values)) != values.index(max(values))
    assert tools.state(run)["epoch"] == 4
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}


# Prediction


def perfect(points: Tensor, size: tuple[int, int] = (32, 48), radius: float = RADIUS) -> Tensor:
    """The maps that a network ought to give."""
    targets = encode(points, size, radius)
    heat = torch.where(targets.disk > 0, 20.0, -20.0)
    wide = [part.expand(-1, -1, *size) for part in (targets.offset_y, targets.offset_x)]
    return torch.cat([heat, *wide], 1)


def write_spots(root: Path, tools: Any, origin: float) -> dict[str, np.ndarray]:
    """Two spots in each image, one left and one right; returns their centres as pixels of the file count from 0."""
    places = {}
    (root / "images").mkdir(parents=True)
    rows, columns = np.ogrid[:40, :48]
    marks: list[dict[str, Any]] = []
    splits = []
    for i, split in enumerate(("train", "train", "val", "test", "test")):
        centres = np.array([(7.0 + 2 * i, 9.0 + 3 * i), (39.0 - i, 30.0 - 4 * i)])
        image = sum(np.where((abs(columns - x) <= 2) & (abs(rows - y) <= 2), 255, 0) for x, y in centres)
        Image.fromarray(image.astype(np.uint8)).save(root / "images" / f"{i}.png")
        places[f"{i}.png"] = centres
        splits.append({"image": f"{i}.png", "split": split})
        for landmark, (x, y) in zip("ab", centres, strict=True):
            marks.append({"image": f"{i}.png", "landmark_index": landmark, "x": x + origin, "y": y + origin})
    tools.write_csv(root / "landmarks.csv", marks)
    tools.write_csv(root / "split.csv", splits)
    return places


def spots(images: Tensor) -> Tensor:
    """The centre of mass of the light in the left and in the right half, in pixels of what the network receives."""
    light = (images[:, 0] + 1) / 2
    halves = []
    for start, stop in ((0, light.shape[2] // 2), (light.shape[2] // 2, light.shape[2])):
        part = light[:, :, start:stop]
        x, y = torch.arange(start, stop).float(), torch.arange(light.shape[1]).float()
        total = part.sum((1, 2))
        halves.append(torch.stack([(part.sum(1) * x).sum(1) / total, (part.sum(2) * y).sum(1) / total], 1))
    return torch.stack(halves, 1)


@pytest.mark.parametrize("origin", ["centre", "corner"])
@pytest.mark.parametrize("size", ["[40,48]", "[80,96]", "[20,48]"])
def test_predictions_of_a_perfect_network_lie_on_the_pixels_of_the_file(
    fit: Any, tmp_path: Path, tools: Any, monkeypatch: pytest.MonkeyPatch, origin: str, size: str
) -> None:
    """It sees nothing but images, and its points come back in the table's own coordinates."""
    offset = 0.5 if origin == "corner" else 0.0
    centres = write_spots(tmp_path / "spots", tools, offset)
    own = {"data__root": tmp_path / "spots", "data__origin": origin, "data__size": size, "model__radius": 3}
    checkpoint = fit(trainer__max_epochs=1, **own) / "checkpoints" / "last.ckpt"

    def forward(self: RobustLandmarks, images: Tensor) -> Tensor:
        return perfect(spots(images), tuple(images.shape[2:]), self.radius)

    monkeypatch.setattr(RobustLandmarks, "forward", forward)
    words = tools.arguments(tmp_path / "spots", tmp_path / "found", ckpt_path=checkpoint, **own)
    assert main(["predict", *(w for w in words)]) == 0
    (run,) = tools.runs(tmp_path / "found")
    rows = tools.table(run / "predictions.csv")
    assert list(rows[0]) == ["image", "landmark_index", "x", "y", "confidence"]
    assert [(row["image"], row["landmark_index"]) for row in rows] == [(i, k) for i in ("3.png", "4.png") for k in "ab"]
    wanted = [row for row in tools.table(tmp_path / "spots" / "landmarks.csv") if row["image"] in ("3.png", "4.png")]
    for row, true in zip(rows, wanted, strict=True):
        assert float(row["x"]) == pytest.approx(float(true["x"]), abs=0.0101 if size != "[20,48]" else 0.1)
        assert float(row["y"]) == pytest.approx(float(true["y"]), abs=0.0101 if size != "[20,48]" else 0.1)
        assert 0.85 < float(row["confidence"]) <= 1
    for name, places in list(centres.items())[3:]:
        shown = np.array(Image.open(run / "overlays" / f"{name}.png"))
        assert shown.shape == (40, 48, 3)
        for x, y in places.astype(int):
            assert tuple(shown[y, x]) == (230, 60, 30)
    assert main(["test", *words]) == 0  # the same network has no error in the data's unit
    assert tools.logged(tools.runs(tmp_path / "found")[-1], "test/MRE")[0] < 0.05


def test_predictions_of_validation_images_where_there_are_no_others(tmp_path: Path, tools: Any) -> None:
    """Names of images may hold folders, and names of landmarks may be anything."""
    image = tmp_path / "a.png"
    Image.fromarray(np.zeros((6, 400), np.uint8)).save(image)

    class Data:
        landmark_names = ("x,y", "b")

        class Part:
            ids, images = ["sub/a.png"], [image]

        splits: ClassVar = {"val": Part}

    batch = {"id": ["sub/a.png"], "points": torch.tensor([[[1.234, 2.0], [200, -3]]]), "confidence": torch.ones(1, 2)}
    path = write_predictions(tmp_path, [batch], Data)
    assert path == tmp_path / "predictions.csv"
    assert tools.table(path) == [
        {"image": "sub/a.png", "landmark_index": "x,y", "x": "1.23", "y": "2.00", "confidence": "1.0000"},
        {"image": "sub/a.png", "landmark_index": "b", "x": "200.00", "y": "-3.00", "confidence": "1.0000"},
    ]
    assert Image.open(tmp_path / "overlays" / "sub" / "a.png.png").size == (400, 6)


# Thresholds


def test_self_calibrated_thresholds(adaptive: Path, tools: Any) -> None:
    for value, visits in tools.margins(adaptive).values():
        assert visits == 2
        assert 0 < value <= 3 * LEVEL + 1e-6
    saved = tools.state(adaptive)["advmed"]
    assert saved["thresholds"] is None
    kept = saved["method"]["thresholds"]
    assert kept["statistics"]["names"] == list(TERMS)
    assert kept["rule"] == "mean+2std"  # of the paper, for landmarks


def test_a_rule_of_the_users(fit: Any, tools: Any, said: list[str]) -> None:
    run = fit(model__method__name="AMAT", model__method__rule="mean", trainer__max_epochs=2)
    assert any("thresholds are self-calibrated" in line for line in said)
    assert any(line.startswith("Warm-up done. Thresholds: heatmap < ") for line in said)
    assert any(line.startswith("8 images, each met about 1.0 times") for line in said)
    assert tools.state(run)["advmed"]["method"]["thresholds"]["rule"] == "mean"


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
    assert len(found) == 8
    for margin, visits in found.values():
        assert visits == 2
        assert margin == pytest.approx(0.75 if value > 0 else 0.25, rel=1e-5)
    assert f"# thresholds: heatmap < {value:.6g}, offset_y" in (run / "adversarial.yaml").read_text()
    assert tools.state(run)["advmed"]["thresholds"]["values"] == (value,) * 3


@pytest.mark.parametrize(("rule", "factor"), [(None, 2), ("mean", 0), ("mean+1std", 1)])
def test_thresholds_of_a_standard_checkpoint(
    fit: Any, standard: Path, root: Path, tools: Any, rule: str | None, factor: float, said: list[str]
) -> None:
    checkpoint = standard / "checkpoints" / "last.ckpt"
    run = fit(
        model__method__name="AMAT",
        model__method__thresholds=checkpoint,
        model__method__rule=rule,
        data__rotate=20,  # the images are measured as they are
    )
    saved = tools.state(run)["advmed"]["thresholds"]
    assert (saved["rule"], saved["n"], saved["source"]) == (rule or "mean+2std", 8, str(checkpoint))
    assert saved["notes"] == {"split": "train"}
    assert saved["names"] == TERMS
    assert any(line.startswith(f"thresholds measured on {checkpoint}: heatmap < ") for line in said)
    model = RobustLandmarks.from_checkpoint(checkpoint)
    terms = np.array([
        plain_terms(model(sample["image"][None])[0], scaled(tools.truth(root, sample["id"])), "dice", 0.5)
        .detach()
        .numpy()
        for sample in of_the_run(root).dataset("train")
    ])  # fmt: skip
    assert saved["values"] == pytest.approx(tuple(terms.mean(0) + factor * terms.std(0)), rel=1e-3)


def test_thresholds_that_do_not_fit_are_refused(refused: Any, thresholds: Any, tmp_path: Path) -> None:
    given = {"model__method__name": "AMAT"}
    message = refused(**given, model__method__thresholds=thresholds(1.0, ("ce",)))
    assert "K = 1 loss terms ['ce'], the model's loss has K = 3 terms ['heatmap', 'offset_y', 'offset_x']" in message
    assert "there is no thresholds file" in refused(**given, model__method__thresholds=tmp_path / "none.json")
    assert "there is no thresholds file" in refused(**given, model__method__thresholds=tmp_path / "none.ckpt")
    notes = tmp_path / "notes.ckpt"
    torch.save({"state_dict": {}}, notes)
    assert "is no checkpoint of adv-landmark" in refused(**given, model__method__thresholds=notes)
    assert "leaves no adversarial epoch" in refused(**given)  # one epoch is warm-up


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__heatmap": "bce", "model__heatmap_weight": 0.5}, "trained with heatmap dice, this training has bce"),
        ({"model__heatmap_weight": 1}, "trained with heatmap_weight 0.5, this training has 1"),
        ({"model__radius": 3}, "trained with radius 2.4, this training has 3.0"),
        ({"data__channels": 3}, "takes images of 1 channel(s), the data has 3"),
        ({"data__size": "[34,48]"}, "was trained on images of (32, 48), the data's are resized to (34, 48)"),
    ],
)
def test_thresholds_of_another_loss_are_refused(
    refused: Any, standard: Path, changes: dict[str, Any], message: str
) -> None:
    checkpoint = standard / "checkpoints" / "last.ckpt"
    told = refused(model__method__name="AMAT", model__method__thresholds=checkpoint, **changes)
    assert told.startswith(str(checkpoint))
    assert message in told
    assert told.endswith("their losses cannot be compared") == message.startswith("trained with")


def test_thresholds_of_other_landmarks_are_refused(refused: Any, standard: Path, tmp_path: Path, tools: Any) -> None:
    checkpoint = standard / "checkpoints" / "last.ckpt"
    two = tools.write_table(tmp_path / "two", names=("dot", "end"))
    message = refused(data=two, model__method__name="AMAT", model__method__thresholds=checkpoint)
    assert message == f"{checkpoint} finds 3 landmarks (corner, dot, end), the data has 2 (dot, end)"


def test_a_model_and_its_own_data_are_none_to_complain_about(standard: Path, root: Path) -> None:
    path = standard / "checkpoints" / "last.ckpt"
    check_model(RobustLandmarks.from_checkpoint(path), path, of_the_run(root))
    assert RobustLandmarks.standard(path, of_the_run(root)).radius == RADIUS


# Interrupted and resumed


class PowerCut(RuntimeError):
    pass


LONG: dict[str, dict[str, Any]] = {
    "AMAT": {"model__method__name": "AMAT", "model__method__refinement": "crossing", "model__method__delta": 0.5},
    "DPAAT": {
        "model__method__name": "DPAAT",
        "model__method__average": "epoch",
        "model__attack__random_start": 0.5,
        "model__network__encoder": "tu-test_resnet",
        "model__heatmap": "bce",
    },
}


def long(name: str) -> dict[str, Any]:
    augmented = {"data__rotate": 10, "data__zoom": 0.1, "data__shift": 0.05, "data__color": 0.1}
    return {"trainer__max_epochs": 4, "model__lr": 1e-2, **augmented, **LONG[name]}


def check_resumed(whole: Path, resumed: Path, tools: Any) -> None:
    """The same to the last bit: weights, optimizer, noise levels, visits."""
    first, second = tools.state(whole), tools.state(resumed)
    assert (first["epoch"], first["global_step"]) == (second["epoch"], second["global_step"]) == (3, 8)
    assert first["advmed"] == second["advmed"]
    assert first["lr_schedulers"] == second["lr_schedulers"]
    for key, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][key]), key
    states = [state["optimizer_states"][0]["state"] for state in (first, second)]
    assert all(torch.equal(value, states[1][i][key]) for i, part in states[0].items() for key, value in part.items())
    assert (whole / "margins.csv").read_text() == (resumed / "margins.csv").read_text()
    for name in ("adv/margin_q50", "val/MRE"):
        values = [tools.logged(run, name) for run in (whole, resumed)]
        assert values[0][-2:] == values[1]


@pytest.mark.parametrize("name", LONG)
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(
    fit: Any, root: Path, tmp_path: Path, tools: Any, monkeypatch: pytest.MonkeyPatch, name: str, fails: Any
) -> None:
    whole = fit("whole", **long(name))
    step = RobustLandmarks.training_step

    def stop(self: RobustLandmarks, batch: Any, batch_idx: int) -> Tensor:
        if (self.current_epoch, batch_idx) == (2, 1):
            raise PowerCut("a power cut")
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(RobustLandmarks, "training_step", stop)
        assert "a power cut" in fails("fit", *tools.arguments(root, tmp_path / "cut", **long(name)))
    last = tools.runs(tmp_path / "cut")[-1] / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["epoch"] == 1
    check_resumed(whole, fit("cut", ckpt_path=last, **long(name)), tools)


KILLED = """
import os, signal, sys
from adv_landmark.cli import main
from adv_landmark.module import RobustLandmarks
step = RobustLandmarks.training_step
def stop(self, batch, batch_idx):
    if (self.current_epoch, batch_idx) == (2, 1):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch, batch_idx)
RobustLandmarks.training_step = stop
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_run_of_the_installed_command_goes_on_as_if_nothing_had_happened(
    root: Path, tmp_path: Path, tools: Any
) -> None:
    """All three in processes of their own: what else is imported here may change the last bit of a convolution."""

    def run(folder: str, *start: str, status: int = 0, **more: Any) -> Path:
        command = [*start, "fit", *tools.arguments(root, tmp_path / folder, **long("AMAT"), **more)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == status, done.stderr
        return tools.runs(tmp_path / folder)[-1]

    command = str(Path(sys.executable).with_name("adv-landmark"))
    cut = run("cut", sys.executable, "-c", KILLED, status=-signal.SIGKILL)
    resumed = run("cut", command, ckpt_path=cut / "checkpoints" / "last.ckpt")
    check_resumed(run("whole", command), resumed, tools)


def test_another_run_cannot_be_resumed(refused: Any, adaptive: Path, root: Path, tmp_path: Path, tools: Any) -> None:
    last = {"ckpt_path": adaptive / "checkpoints" / "last.ckpt", "trainer__max_epochs": 5}
    message = refused(**last, model__method__name="SAT")
    assert message == (
        "the checkpoint is of a run of AMAT, it cannot be resumed with SAT. To start from its weights, name it as the "
        "network's weights instead"
    )
    own = {**last, "model__method__name": "AMAT"}
    fewer = tools.write_table(tmp_path / "fewer", {"train": 7, "val": 4})
    assert refused(data=fewer, **own) == (
        "the training images are not those of the checkpoint (8 then, 7 now): restore them, or start a new training"
    )
    here = f"a U-Net on {tools.ENCODER} for 3 landmarks (corner, dot, end), 1 channel(s), radius 2.4"
    other = tools.write_table(tmp_path / "other", names=("corner", "dot", "middle"))
    for changes, there in (
        ({"data": other}, here.replace("end", "middle")),
        ({"data__channels": 3}, here.replace("1 channel", "3 channel")),
        ({"model__radius": 4.5}, here.replace("2.4", "4.5")),
        ({"model__network__encoder": "tu-test_resnet"}, here.replace(tools.ENCODER, "tu-test_resnet")),
    ):
        assert refused(**{**own, **changes}) == f"the checkpoint is of {here}, and cannot be loaded into {there}"
    assert "not found" in refused(**{**own, "ckpt_path": tmp_path / "none.ckpt"})


def test_other_settings_of_a_resumed_run_are_the_users_and_are_named(fit: Any, adaptive: Path, tools: Any) -> None:
    given = {"model__method__name": "AMAT", "trainer__max_epochs": 4, "model__method__margin_max": 0.01}
    with pytest.warns(UserWarning, match="settings changed since the checkpoint: .*margin_max") as warned:
        run = fit(ckpt_path=adaptive / "checkpoints" / "last.ckpt", **given)
    told = [str(w.message) for w in warned if "settings changed" in str(w.message)]
    assert not any("delta" in line or "eps" in line for line in told)  # the defaults are those of before
    assert [value for value, _ in tools.margins(run).values()] == pytest.approx([0.01] * 8)
    assert {visits for _, visits in tools.margins(run).values()} == {3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainer__max_epochs": -1}, "set max_epochs, got -1"),
        ({"trainer__max_epochs": None, "trainer__max_steps": 3}, "set max_epochs, got -1"),
        ({"model__method__backward": "sequential"}, "backward 'sequential' is not to be had with Lightning"),
        ({"model__radius": 16}, "the radius of a landmark, 16 pixels, must be at least 1 and fit into the images"),
        ({"model__radius": 0.5}, "the radius of a landmark, 0.5 pixels, must be at least 1"),
        ({"model__heatmap_weight": 0}, "heatmap_weight must be > 0, got 0"),
        ({"model__method__name": "AMAT", "model__method__warmup_epochs": 0}, "rules out self-calibration"),
        ({"model__network__decoder_channels": "[8,8]"}, "decoder_channels must be five numbers >= 1, got [8, 8]"),
    ],
)
def test_settings_that_cannot_be_trained_with(refused: Any, changes: dict[str, Any], message: str) -> None:
    assert message in refused(**changes)


# Checkpoints


def only_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(only_plain(part) for pair in value.items() for part in pair)
    if isinstance(value, (list, tuple)):
        return all(only_plain(part) for part in value)
    return value is None or type(value) in (str, int, float, bool)


@pytest.mark.parametrize("name", ["standard", "adaptive"])
def test_the_network_of_a_checkpoint_needs_none_of_us(
    request: pytest.FixtureRequest, root: Path, tools: Any, name: str
) -> None:
    """Plain values, loaded into the plain network of the library."""
    path = request.getfixturevalue(name) / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert only_plain({k: v for k, v in checkpoint["hyper_parameters"].items() if not k.startswith("_")})
    assert only_plain(checkpoint["advmed"])
    start = "network.model."
    assert all(key.startswith(start) for key in checkpoint["state_dict"])
    model = smp.Unet(tools.ENCODER, encoder_weights=None, in_channels=1, classes=9, decoder_channels=(16, 16, 8, 8, 8))
    model.load_state_dict({k.removeprefix(start): v for k, v in checkpoint["state_dict"].items()})
    images = torch.stack([sample["image"] for sample in of_the_run(root).dataset("val")])
    wide = torch.cat([images, images[..., -1:].expand(-1, -1, -1, 16)], -1)
    ours = RobustLandmarks.from_checkpoint(path)
    assert not ours.training
    torch.testing.assert_close(model.eval()(wide)[..., :48], ours(images))


def test_a_checkpoint_is_read_with_its_settings(
    fit: Any, begin: Path, root: Path, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[RobustLandmarks] = []
    end = RobustLandmarks.on_train_epoch_end

    def kept(self: RobustLandmarks) -> None:
        end(self)
        trained.append(self)

    monkeypatch.setattr(RobustLandmarks, "on_train_epoch_end", kept)
    weights = begin.with_name("gone.pth")
    weights.write_bytes(begin.read_bytes())
    run = fit(
        model__network__weights=weights,
        model__method__name="DPAAT",
        model__attack__norm=".inf",
        model__heatmap="bce",
        model__heatmap_weight=3,
        model__radius=4,
        model__validation_steps=1,
        data__unit="px",
    )
    weights.unlink()  # what the training began with is needed no more
    model = RobustLandmarks.from_checkpoint(run / "checkpoints" / "last.ckpt")
    assert (model.method_name, model.settings.norm, model.settings.bounds) == ("DPAAT", math.inf, (-1.0, 1.0))
    assert (model.heatmap, model.heatmap_weight, model.radius, model.unit) == ("bce", 3, 4, "px")
    assert (model.landmark_names, model.size, model.validation_steps) == (["corner", "dot", "end"], (32, 48), 1)
    assert model.hparams["network"]["weights"] is None
    saved = tools.weights(run)
    assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())
    images = torch.stack([sample["image"] for sample in of_the_run(root).dataset("val")])
    torch.testing.assert_close(model(images), trained[0].cpu().eval()(images))


@pytest.mark.parametrize("content", [None, {"state_dict": {}}, b"nothing", {"hyper_parameters": {"network": {}}}])
def test_what_is_no_checkpoint_of_ours(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "other.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    kind, message = (FileNotFoundError, "there is no") if content is None else (ValueError, "cannot be read|is no che")
    with pytest.raises(kind, match=message):
        RobustLandmarks.from_checkpoint(path)


def test_a_module_of_ones_own_settings() -> None:
    """Lightning's hyper-parameters are plain values, too."""
    model = module(
        method=MethodOptions(name="DPAAT", eps=0.5), attack=LandmarkAttack(norm=math.inf), channels=3, size=(40, 30)
    )
    assert model.hparams["method"]["eps"] == 0.5
    assert model.hparams["attack"]["bounds"] == [-1.0, 1.0]
    assert (model.hparams["size"], model.hparams["unit"]) == ([40, 30], "px")
    assert model(torch.zeros(2, 3, 40, 30)).shape == (2, 6, 40, 30)


def test_many_landmarks_are_not_all_named_in_a_message() -> None:
    values = {"network": {"encoder": "vgg19"}, "landmark_names": [f"m{k}" for k in range(30)], "channels": 3}
    text = RobustLandmarks.made_of({**values, "radius": 2.5})
    assert text is not None
    assert text.startswith("a U-Net on vgg19 for 30 landmarks (m0, m1, ")
    assert text.endswith(", m19, ...), 3 channel(s), radius 2.5")
    assert RobustLandmarks.made_of(values) is None

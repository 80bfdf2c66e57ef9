"""Trainings against plain loops, class imbalance, and what else is the classifiers' own."""

from __future__ import annotations

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
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import default_collate

from adv_classify.data import ImageFolder, MedMNIST
from adv_classify.module import Network, RobustClassifier
from advmed.testing.lightning import runs, watched_steps
from advmed.thresholds import Thresholds
from helpers import classify
from helpers.classify import Classify, write_folders, write_npz, write_uneven

RESNET = Network(name="test_resnet")
FOLDERS = {"data": "ImageFolder", "data__file": None}


def plain_loop(
    data: MedMNIST, met: list[list[str]], begin: Path, loss: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Tensor]:
    """PyTorch and nothing else, on normalised images."""
    model = timm.create_model(Classify.network["model__network__name"], num_classes=3)
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


@pytest.mark.slow
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_standard_training_is_the_plain_loop(
    host: Classify, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smoothing: float, weighted: bool
) -> None:
    watched, path, begin = watched_steps(monkeypatch, host.module), tmp_path / "own.npz", tmp_path / "begin.pth"
    write_uneven(path, 12, 8, 4)
    torch.save(timm.create_model(host.network["model__network__name"], num_classes=3).state_dict(), begin)
    run = host.fit(
        tmp_path,
        data__file=path,
        model__network__weights=begin,
        model__label_smoothing=smoothing,
        model__class_weights="balanced" if weighted else "none",
        trainer__max_epochs=2,
        optimizer="SGD",
        optimizer__lr=0.05,
        optimizer__momentum=0.9,
    )
    weight = 24 / (3 * torch.tensor([12.0, 8.0, 4.0]))

    def loss(logits: Tensor, label: Tensor) -> Tensor:
        each = nn.functional.cross_entropy(logits, label, reduction="none", label_smoothing=smoothing)
        return (each * weight[label]).mean() if weighted else each.mean()

    data = MedMNIST(str(path), flip=0, workers=0)
    met = watched.ids
    assert [len(ids) for ids in met] == [8] * 6
    assert sorted(i for ids in met[:3] for i in ids) == sorted(i for ids in met[3:] for i in ids) == data.train_ids
    wanted, found = plain_loop(data, met, begin, loss), run.weights()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    start = torch.load(begin)["classifier.weight"]
    assert (wanted["network.model.classifier.weight"] - start).abs().max() > 1e-3


def test_balanced_weights_keep_the_scale_of_the_loss() -> None:
    counts = [30, 12, 3, 15]
    model = RobustClassifier(RESNET, class_weights="balanced", num_classes=4, class_counts=counts)
    weight = model.class_weight * torch.tensor(counts)
    assert float(weight.sum()) == pytest.approx(60)  # the mean over all images is 1
    torch.testing.assert_close(weight, torch.full((4,), 15.0))
    assert "class_weight" not in model.state_dict()
    even = RobustClassifier(RESNET, class_weights="balanced", num_classes=4, class_counts=[7] * 4)
    assert torch.equal(even.class_weight, torch.ones(4))
    assert RobustClassifier(RESNET, num_classes=4).class_weight is None
    with pytest.raises(ValueError, match="class_weights 'balanced' needs class_counts"):
        RobustClassifier(RESNET, class_weights="balanced", num_classes=3)


@pytest.mark.slow
def test_thresholds_are_of_the_weighted_loss_of_a_weighted_training(host: Classify, tmp_path: Path) -> None:
    path = write_uneven(tmp_path / "own.npz", 16, 5, 3)
    changes = {"data__file": path, "model__class_weights": "balanced", "model__label_smoothing": 0.1}
    run = host.fit(tmp_path, **changes)
    host.ok("thresholds", run.best, "--out", "own.json")
    model = RobustClassifier.from_checkpoint(run.best)
    assert torch.equal(model.class_weight, 24 / (3 * torch.tensor([16.0, 5.0, 3.0])))
    batch = default_collate(list(MedMNIST(str(path), workers=0).dataset("train")))
    losses = host.terms(model, batch)[:, 0] * model.class_weight[batch["label"]].numpy()
    assert Thresholds.load("own.json").mean == pytest.approx((np.mean(losses),), rel=1e-4)


@pytest.mark.slow
def test_folders_of_grey_images_train_as_well(host: Classify, tmp_path: Path) -> None:
    """With all of the augmentation, a transform of the user's beside it, and again by the run's own configuration."""
    root = write_folders(tmp_path / "own", each=4)
    for path in root.rglob("*.png"):
        Image.open(path).convert("L").resize((20, 12)).save(path)
    (root / "train" / "bee" / "0.png").unlink()
    changes = {**FOLDERS, "data__root": root, "data__size": "[16,24]", "model__method__name": "AMAT"}
    changes |= {"data__rotate": 10, "data__zoom": 0.1, "data__color": 0.2, "trainer__max_epochs": 2}
    run = host.fit(tmp_path, **changes)
    assert sorted(run.margins) == sorted(ImageFolder(str(root), size=(16, 24)).train_ids)
    model = RobustClassifier.from_checkpoint(run.best)
    assert model.hparams["channels"] == 1
    assert model(torch.rand(2, 1, 16, 24)).shape == (2, 3)
    flip = {"class_path": "torchvision.transforms.v2.RandomHorizontalFlip", "init_args": {"p": 0.3}}
    data = {"class_path": "ImageFolder", "init_args": {"transform": flip}}
    Path("own.yaml").write_text(yaml.safe_dump({"data": data}))
    first = host.fit(tmp_path / "first", config="own.yaml", **changes)
    assert first.yaml()["data"]["init_args"]["transform"]["class_path"] == flip["class_path"]
    host.ok("fit", "--config", first.folder / "config.yaml", "--trainer.default_root_dir", tmp_path / "again")
    (again,) = runs(tmp_path / "again")
    assert again.margins == first.margins != run.margins
    other = again.weights()
    assert all(torch.equal(value, other[key]) for key, value in first.weights().items())


# Mistakes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__network__name": "resnet81"}, "timm has no model 'resnet81'; near names are resnet18"),
        ({"model__network__weights": "none.pth"}, "there is no file of weights none.pth"),
        ({"model__label_smoothing": 1.0}, "label_smoothing must be in [0, 1), got 1.0"),
        ({"data__file": "none.npz"}, "there is no file none.npz"),
        ({"data__colour": 1}, "given class_path 'adv_classify.MedMNIST'"),
        ({"data__flip": 2}, "flip must be between 0 and 1, got 2.0"),
        ({"data__size": "[0,16]"}, "size must be >= 1, got (0, 16)"),
    ],
)
def test_mistakes(host: Classify, changes: dict[str, Any], message: str) -> None:
    assert message in host.refused(**changes)


def test_mistakes_that_the_images_show(host: Classify, tmp_path: Path) -> None:
    message = host.fails("fit", *host.words(tmp_path, model__network__name="test_vit3"))
    assert "Input height (16) doesn't match model (160)" in message
    root = write_folders(tmp_path / "own")
    path = root / "train" / "bee" / "1.png"
    path.write_bytes(path.read_bytes()[:-300])
    for workers in (0, 1):
        changes = {**FOLDERS, "data__root": root, "data__size": 16, "data__workers": workers}
        message = host.fails("fit", *host.words(tmp_path, **changes))
        assert "bee/1.png cannot be read as an image" in message
        assert "\n" not in message
    assert not list(tmp_path.rglob("metrics.csv"))


@pytest.mark.slow
def test_images_of_other_classes_are_refused_by_every_command(host: Classify, tmp_path: Path) -> None:
    four = write_npz(tmp_path / "four.npz", classes=4)
    path, name = host.standard.last, host.network["model__network__name"]
    here, there = (f"{name} for {k} classes and 3 channel(s)" for k in (3, 4))
    assert host.fails("validate", *host.reading(file=four), "--ckpt_path", path).startswith("the checkpoint is of ")
    last = {"ckpt_path": host.adaptive.last, "trainer__max_epochs": 5, "model__method__name": "AMAT"}
    wanted = f"the checkpoint is of {here}, and cannot be loaded into {there}"
    assert host.refused(data__file=four, **last) == wanted
    other = host.refused(**last, model__network__name="test_resnet")
    assert other == f"the checkpoint is of {here}, and cannot be loaded into {here.replace(name, 'test_resnet')}"
    measured = {"model__method__name": "AMAT", "model__method__thresholds": path}
    for message in (
        host.refused(data__file=four, **measured),
        host.fails("thresholds", path, "--data.file", four),
        host.fails("evaluate", path, "--data.file", four),
    ):
        assert "predicts 3 classes" in message
        assert "the data has 4" in message
        assert "\n" not in message
    message = host.fails("evaluate", path, "--data.channels", 1)
    assert "3 classes from 3 channel(s), the data has 3 classes and 1 channel(s)" in message


# Checkpoints and predictions


@pytest.mark.slow
def test_predictions(host: Classify, tmp_path: Path) -> None:
    words = [*host.reading(classes="[x,y,z]"), "--ckpt_path", host.adaptive.best]
    host.ok("predict", *words, "--trainer.default_root_dir", tmp_path)
    rows = runs(tmp_path)[0].table("predictions.csv")
    assert list(rows[0]) == ["id", "prediction", "x", "y", "z"]
    model = RobustClassifier.from_checkpoint(host.adaptive.best)
    wanted = model(host.batch("test")["image"]).softmax(1).tolist()
    for row, probability in zip(rows, wanted, strict=True):
        assert [float(row[name]) for name in "xyz"] == pytest.approx(probability, abs=1e-5)
        assert row["prediction"] == "xyz"[int(np.argmax(probability))]


@pytest.mark.slow
def test_the_network_of_a_checkpoint_needs_none_of_us(host: Classify, tmp_path: Path) -> None:
    """Loaded where our packages cannot be imported, into a plain network of timm."""
    images, path = classify.noise(2, 3, 16, 16), host.standard.last
    torch.save(
        {"images": images, "logits": RobustClassifier.from_checkpoint(path)(images).detach()}, tmp_path / "own.pt"
    )
    code = f"""
import sys
sys.modules["adv_classify"] = sys.modules["advmed"] = sys.modules["lightning"] = None
import timm, torch
checkpoint = torch.load({str(path)!r}, weights_only=True)
weights, start = checkpoint["state_dict"], "network.model."
model = timm.create_model({host.network["model__network__name"]!r}, num_classes=3).eval()
model.load_state_dict({{k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)}})
wanted = torch.load({str(tmp_path / "own.pt")!r}, weights_only=True)
images = (wanted["images"] - weights["network.mean"]) / weights["network.std"]
torch.testing.assert_close(model(images), wanted["logits"])
print("the same")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "the same", done.stderr

"""Trainings against plain loops, class imbalance, and what else is the classifiers' own."""

from __future__ import annotations

import warnings
from dataclasses import replace
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
from adv_classify.evaluate import load_model
from adv_classify.module import Network, RobustClassifier, check_images
from advmed import TrainingSettings
from advmed.testing.lightning import runs
from advmed.thresholds import Thresholds
from helpers.classify import Classify, write_folders, write_npz, write_uneven
from helpers.lightning import check_plain_loop

RESNET = Network(name="test_resnet")
FOLDERS = {"data": "ImageFolder", "data__file": None}


@pytest.mark.slow
@pytest.mark.parametrize(("smoothing", "weighted"), [(0.0, False), (0.2, True)])
def test_standard_training_is_the_plain_loop(
    host: Classify, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smoothing: float, weighted: bool
) -> None:
    """PyTorch and nothing else, on normalised images."""
    weight = (24 / (3 * torch.tensor([12.0, 8.0, 4.0]))).double()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        logits, label = model((batch["image"] - 0.5) / 0.5), batch["label"]
        each = nn.functional.cross_entropy(logits, label, reduction="none", label_smoothing=smoothing)
        return (each * weight[label]).mean() if weighted else each.mean()

    path = write_uneven(tmp_path / "own.npz", 12, 8, 4)
    model = timm.create_model(host.network["model__network__name"], num_classes=3)
    changes = {"data__file": path, "model__label_smoothing": smoothing}
    changes["model__class_weights"] = "balanced" if weighted else "none"
    check_plain_loop(host, tmp_path, monkeypatch, host.read(file=path), "", model, loss, **changes)


def test_margins_are_twice_eps_at_most() -> None:
    """Where they follow their samples; the paper's have no cap."""
    settings = TrainingSettings(eps=0.5)
    for given, cap in (
        ({}, 1.0),
        ({"eps": None}, 2 * 0.2196),
        ({"margin_max": 0.8}, 0.8),
        ({"delta": 3.0}, 3.0),
        ({"refinement": "balanced"}, 1.0),
        ({"refinement": "paper"}, None),
        ({"preset": "paper"}, None),
        ({"eps": 0.0}, None),
    ):
        assert RobustClassifier.resolved(replace(settings, **given), 28 * 28).margin_max == cap, given


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


def test_rare_classes_are_not_weighed_twice(host: Classify) -> None:
    both: dict[str, Any] = {"data__sampler": "balanced", "model__class_weights": "balanced"}
    message = "sampler: balanced of the data and class_weights: balanced of the model both make up for rare classes"
    assert message in host.refused(**both)


@pytest.mark.slow
def test_thresholds_know_no_class_weights_and_no_smoothing(host: Classify, tmp_path: Path) -> None:
    """Or the images of a common class, whose weighted loss is small whatever they are taken for, bore any noise."""
    path = write_uneven(tmp_path / "own.npz", 16, 5, 3)
    changes = {"data__file": path, "model__class_weights": "balanced", "model__label_smoothing": 0.1}
    run = host.fit(tmp_path, **changes)
    host.ok("thresholds", run.best, "--out", "own.json")
    model = RobustClassifier.from_checkpoint(run.best)
    assert torch.equal(model.class_weight, 24 / (3 * torch.tensor([16.0, 5.0, 3.0])))
    batch = default_collate(list(MedMNIST(str(path), workers=0).dataset("train")))
    losses = host.terms(model, batch)[:, 0]
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


def test_a_network_is_judged_by_its_balanced_accuracy() -> None:
    """A class that does not occur counts for nothing; chance is a quarter."""
    model, label = RobustClassifier(RESNET, num_classes=4), torch.tensor([0] * 8 + [1] * 2)
    for right, value, untrained, mediocre in (
        ([1.0] * 8 + [0.0] * 2, 0.5, False, True),  # always the same class
        ([0.25] * 8 + [0.375] * 2, 0.3125, True, True),
        ([0.5] * 8 + [1.0] * 2, 0.75, False, False),
    ):
        judged = model.judge({"label": label, "right": torch.tensor(right)})
        assert (judged.value, judged.untrained, judged.mediocre) == (pytest.approx(value), untrained, mediocre)
        assert str(judged).endswith("(by chance 0.25)")
    logits = torch.tensor([[0.1, 0.9, 0.0, 0.0], [0.5, 0.2, 0.1, 0.0]])
    batch = {"image": torch.zeros(2, 3, 8, 8), "label": torch.tensor([1, 2]), "id": ["a", "b"]}
    assert model.evidence(model.objective(batch)[0], logits, batch)["right"].tolist() == [1.0, 0.0]
    found = model.evidence_of(logits.softmax(1), model.truth(batch))
    assert found["right"].tolist() == [1.0, 0.0]
    assert found["label"].tolist() == [1, 2]


# Checkpoints and predictions


@pytest.mark.slow
def test_images_of_other_classes_are_refused_by_every_command(host: Classify, tmp_path: Path) -> None:
    four = write_npz(tmp_path / "four.npz", classes=4)
    path, name = host.standard.last, host.network["model__network__name"]
    here, there = (f"{name} for {k} classes and 3 channel(s)" for k in (3, 4))
    assert host.fails("validate", *host.reading(file=four), "--ckpt_path", path).startswith("the checkpoint is of ")
    last = {"ckpt_path": host.adaptive.last, "trainer__max_epochs": 5, "model__method__name": "AMAT"}
    refused = f"the checkpoint is of {here}, and cannot be loaded into "
    assert host.refused(data__file=four, **last) == refused + there
    classes = f"{path} predicts 3 classes, the data has 4 (['0', '1', '2', '3'])"
    measured = {"model__method__name": "AMAT", "model__method__thresholds": path}
    assert host.refused(data__file=four, **measured) == classes
    assert host.fails("thresholds", path, "--data.file", four) == classes
    start = f"{path} predicts 3 classes from 3 channel(s), the data has "
    assert host.fails("evaluate", path, "--data.file", four) == f"{start}4 classes and 3 channel(s)"
    assert host.fails("evaluate", path, "--data.channels", 1) == f"{start}3 classes and 1 channel(s)"


def test_images_of_another_size_are_refused_by_every_command(host: Classify, tmp_path: Path) -> None:
    """Whether they are resized or are so; of an older checkpoint, which does not say its size, only a warning."""
    run = host.fit(tmp_path)
    assert run.state()["hyper_parameters"]["image_size"] == [16, 16]
    larger, last = {"size": "[24,20]"}, ["--ckpt_path", run.last, "--trainer.default_root_dir", tmp_path]
    wanted = "was trained on images of 16 x 16, the data's are 24 x 20: set size of the data to [16, 16]"
    for command in ("validate", "test", "predict"):
        assert host.fails(command, *host.reading(**larger), *last) == f"the checkpoint {wanted}"
    resumed = {"ckpt_path": run.last, "trainer__max_epochs": 2}
    assert host.refused(data__size="[24,20]", **resumed) == f"the checkpoint {wanted}"
    for command in ("evaluate", "thresholds"):
        assert host.fails(command, run.last, "--data.size", "[24,20]") == f"{run.last} {wanted}"
    data = host.read()
    assert (data.image_size, data.image_bits) == ((16, 16), None)
    state = run.state()
    del state["hyper_parameters"]["image_size"], state["hyper_parameters"]["image_bits"]
    torch.save(state, run.last.with_stem("old"))
    with pytest.warns(UserWarning, match="does not say the size of the images .*: see yourself that it was 24 x 20"):
        load_model("old", run.last.with_stem("old"), host.read(size=(24, 20)), "val", torch.device("cpu"))
    with pytest.warns(UserWarning, match="the checkpoint does not say the size"):
        host.ok("validate", *host.reading(), "--ckpt_path", run.last.with_stem("old"))


def test_images_that_are_read_with_other_bits_are_pointed_out() -> None:
    with pytest.warns(UserWarning, match="own.ckpt was trained on images of 12 bits, and .* read as of 16"):
        check_images({"image_size": [8, 8], "image_bits": 12}, (8, 8), 16, "own.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for bits in (12, None):  # None: images of 8 bits, made of those for another program, say
            check_images({"image_size": [8, 8], "image_bits": 12}, (8, 8), bits, "own.ckpt")


@pytest.mark.slow
def test_predictions_are_those_of_a_plain_network(host: Classify, tmp_path: Path) -> None:
    """Of timm, with the weights of the checkpoint, on normalised images."""
    words = [*host.reading(classes="[x,y,z]"), "--ckpt_path", host.adaptive.best]
    host.ok("predict", *words, "--trainer.default_root_dir", tmp_path)
    rows = runs(tmp_path)[0].table("predictions.csv")
    assert list(rows[0]) == ["id", "prediction", "x", "y", "z"]
    weights = host.adaptive.weights("best")
    mean, std = (weights.pop(f"network.{name}") for name in ("mean", "std"))
    plain = timm.create_model(host.network["model__network__name"], num_classes=3).eval()
    plain.load_state_dict({name.removeprefix("network.model."): value for name, value in weights.items()})
    wanted = plain((host.batch("test")["image"] - mean) / std).softmax(1).tolist()
    for row, probability in zip(rows, wanted, strict=True):
        assert [float(row[name]) for name in "xyz"] == pytest.approx(probability, abs=1e-5)
        assert row["prediction"] == "xyz"[int(np.argmax(probability))]

"""What an evaluation of classifiers measures: metrics against scikit-learn, Grad-CAM, attacks on the margin."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, average_precision_score, balanced_accuracy_score

from adv_classify import evaluate as host_evaluate
from adv_classify.data import MedMNIST
from adv_classify.external import TorchAttack
from adv_classify.gradcam import agreement
from adv_classify.objective import ClassificationObjective
from advmed.attacks import APGD, PGD, Margin, Noise, SquareAttack
from helpers.classify import Classify, mean_average_precision, noise
from helpers.ensemble import check_ensemble


@pytest.fixture(scope="module")
def model(host: Classify) -> host_evaluate.TrainedModel:
    data = MedMNIST(host.images["file"], workers=0, batch_size=5)
    return host_evaluate.load_model("own", host.standard.best, data, "val", torch.device("cpu"))


# Metrics


@pytest.mark.parametrize("absent", [False, True])
def test_metrics_are_those_of_scikit_learn(absent: bool) -> None:
    """Of five classes with many mistakes; images without a map are left out of the agreement."""
    label = torch.randint(0, 5, (80,), generator=torch.Generator().manual_seed(1))
    if absent:
        label[label == 3] = 0
    probability = (noise(80, 5, seed=2) * 3 + torch.eye(5)[label]).softmax(1).numpy()
    cam = np.random.default_rng(0).uniform(-0.2, 1, 80)
    cam[:5] = np.nan
    label = label.numpy()
    given = {"probability": probability, "label": label, "cam": cam}
    present, found = np.unique(label), probability.argmax(1)
    assert len(present) == (4 if absent else 5)
    metrics = {metric.name: metric for metric in host_evaluate.metrics()}
    wanted = {
        "accuracy": accuracy_score(label, found),
        "balanced accuracy": np.mean([(found == k)[label == k].mean() for k in present]),
        "mAP": mean_average_precision(label, probability),
        "Grad-CAM agreement": cam[5:].mean(),
    }
    if not absent:
        assert wanted["balanced accuracy"] == pytest.approx(balanced_accuracy_score(label, found))
        assert wanted["mAP"] == pytest.approx(average_precision_score(np.eye(5)[label], probability, average="macro"))
    assert 0.3 < wanted["accuracy"] < 0.9
    assert wanted["accuracy"] != pytest.approx(wanted["balanced accuracy"], abs=1e-3)
    for name, value in wanted.items():
        assert metrics[name].of(given) == pytest.approx(value, rel=1e-5), name
        assert metrics[name].higher_is_better
    np.testing.assert_array_equal(metrics["accuracy"].per_sample(given), found == label)
    np.testing.assert_array_equal(metrics["Grad-CAM agreement"].per_sample(given), cam)
    assert [metric.name for metric in host_evaluate.metrics(False)] == ["mAP", "accuracy", "balanced accuracy"]


@pytest.mark.filterwarnings("error")
def test_where_every_map_is_empty_the_agreement_is_no_number() -> None:
    (agreement,) = (metric for metric in host_evaluate.metrics() if metric.name == "Grad-CAM agreement")
    assert np.isnan(agreement.of({"cam": np.full(4, np.nan)}))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["L2", "Linf"])
def test_the_report_says_whether_to_believe_it(host: Classify, audit: Any, kind: str) -> None:
    data = host.read()
    names = {s["id"]: f"{s['id']} ({data.class_names[s['label']]})" for s in data.dataset("val")}
    how = {"fails_at": 0.5, "checked": 3, "shown": 2, "label": names.get, "groups": str}
    record = audit(host.report / kind, "accuracy", **how)
    assert record["failures"]["criterion"] == "accuracy below 0.5"
    assert "Grad-CAM agreement" in (host.report / kind / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_an_evaluation_without_grad_cam_and_an_attack_that_needs_more_classes(host: Classify) -> None:
    words = ["evaluate", host.standard.last, "--samples", 2, "--norm", "[2]", "--levels", "[0,1]", "--examples", 1]
    assert "autoattack needs 4 classes or more" in host.fails(*words, "--attacks", "[autoattack]")
    assert "Grad-CAM" not in host.ok(*words, "--attacks", "[pgd1]", "--checks", 0, "--gradcam", "false")


@pytest.mark.slow
def test_scores_are_of_the_network_on_the_images_that_are_attacked(
    host: Classify, model: host_evaluate.TrainedModel
) -> None:
    """The agreement is for the class of the clean image."""
    batch, loaded = host.batch("val"), host_evaluate.load(model, range(12))
    images, labels, ids = model.read(range(12))
    assert (ids, labels.tolist()) == (batch["id"], batch["label"].tolist())
    assert torch.equal(loaded.images, images)
    assert torch.equal(images, batch["image"])
    assert (loaded.objective.names, loaded.objective.weight) == (("ce",), None)
    attacked = (images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    classes = model.network(images).argmax(1)
    for shown in (images, attacked):
        scores = loaded.score(shown)
        torch.testing.assert_close(scores["probability"].detach(), model.network(shown).softmax(1).detach())
        assert torch.equal(scores["label"], labels)
        wanted = agreement(model.cam(images, classes), model.cam(shown, classes))
        torch.testing.assert_close(scores["cam"], wanted, equal_nan=True)
        known = wanted[~wanted.isnan()]  # the others have an empty map
        assert len(known) > 6
        assert (known.min() > 1 - 1e-5) == (shown is images)
    assert torch.isnan(host_evaluate.Explained(replace(model, cam=None), images).agreement(attacked)).all()


@pytest.mark.slow
def test_examples_show_clean_and_attacked_images_of_every_model(model: host_evaluate.TrainedModel) -> None:
    other = replace(model, name="no cam", cam=None)
    attack = ("pgd2", host_evaluate.parse(["pgd2"], 2)["pgd2"])
    ids = ["val/000005", "val/000000", "val/000011"]
    examples = host_evaluate.make_examples([model, other], ["x", "y", "z"], attack, [0.5, 1.0], ids, seed=0)
    assert [example.sample for example in examples] == ["val/000005 (z)", "val/000000 (x)", "val/000011 (z)"]
    for example in examples:
        assert [(view.model, view.level) for view in example.views] == [
            (name, level) for name in ("own", "no cam") for level in (0.0, 0.5, 1.0)
        ]
        for view in example.views:
            assert view.image.shape == (16, 16, 3)
            assert view.note.split()[0] in "xyz"
            assert view.note.endswith("%")
            assert (view.heat is None) == (view.model == "no cam")
            if view.heat is not None:
                assert view.heat.shape == (16, 16)
                assert 0 <= view.heat.min() <= view.heat.max() <= 1
        assert np.linalg.norm(example.views[1].image - example.views[0].image) == pytest.approx(0.5, rel=0.2)
    assert host_evaluate.make_examples([other], ["x", "y", "z"], attack, [0.5], []) == []


# Attacks by name


def test_attacks_by_name() -> None:
    """Those with a number are ours; APGD and the Square Attack are there twice."""
    names = ["pgd20x3", "apgd20", "apgd20x2", "square200", "gaussian", "uniform", "apgd", "square"]
    attacks = host_evaluate.parse([*names, "margin100x3", "targeted20x2", "pgd100x3"], math.inf)
    assert list(attacks)[:8] == names
    assert {attack.norm for attack in attacks.values()} == {math.inf}
    pgd, *ours, apgd, square, margin, targeted, like = attacks.values()
    assert isinstance(pgd, PGD)
    assert (pgd.steps, pgd.restarts) == (20, 3)
    noises = [Noise(kind, math.inf) for kind in ("gaussian", "uniform")]
    assert ours == [APGD(20, math.inf), APGD(20, math.inf, restarts=2), SquareAttack(200, math.inf), *noises]
    assert not any("torchattacks" in attack.description for attack in ours)
    for attack, access in ((apgd, "white box"), (square, "black box")):
        assert isinstance(attack, TorchAttack)
        assert (attack.access, attack.gradients, attack.queries) == (access, None, None)
        assert "torchattacks" in attack.description
    assert margin == replace(like, loss=Margin())
    assert targeted == replace(like, steps=20, restarts=2, loss=Margin(targets=9))
    assert (like.steps, like.restarts, like.random_start, like.keep) == (100, 3, 1.0, "best")
    assert (margin.gradients, targeted.gradients) == (300, 20 * 2 * 9)
    assert margin.description == f"{like.description}; climbs the margin of the largest wrong class"
    assert "each of up to 9 wrong classes" in targeted.description
    assert "margin of" not in like.description


WRONG = ["cw", "pgd0", "pgd", "margin", "margin0", "margin20x0", "targeted", "targetedx2", "square20x2", "gaussian20"]


def test_names_that_are_none_or_given_twice() -> None:
    """Answered under the name that was given, whoever might have been meant, with all there are."""
    known = (
        r"expected pgd<steps>, apgd<steps>.* gaussian, uniform, or standard.*; margin<steps> or targeted.* autoattack"
    )
    for name in (*WRONG, "Apgd", "apgd 20", "autoattack2", ""):
        with pytest.raises(ValueError, match=f"unknown attack '{name}': {known}"):
            host_evaluate.parse(["pgd1", name], 2)
    for name in ("apgd", "apgd20", "gaussian", "margin20"):
        with pytest.raises(ValueError, match=f"attack '{name}' is given twice"):
            host_evaluate.parse([name, "pgd1", name], 2)


@pytest.mark.parametrize("p", [2.0, math.inf])
def test_targeted_attacks_reach_the_largest_margin_of_a_linear_model(p: float) -> None:
    """max_j z_j - z_y + eps ||w_j - w_y||_q, q the dual of p: in closed form, for every image, without a trace."""
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5, bias=False))
    weight = model[1].weight.detach().double()
    images, labels, eps = noise(40, 3, 2, 2), torch.arange(40) % 5, 0.3 if p == 2 else 0.08
    rises = weight[None] - weight[labels][:, None]
    margins = (rises * images.flatten(1).double()[:, None]).sum(2)
    margins = margins + eps * (rises.norm(dim=2) if p == 2 else rises.abs().sum(2))
    wanted = margins.scatter(1, labels[:, None], -math.inf).amax(1)
    objective = ClassificationObjective(model, labels)
    found = {}
    for name, method in host_evaluate.parse(["targeted50", "margin50"], p).items():
        with torch.inference_mode():
            result = method(objective, images, eps, bounds=None, generator=torch.Generator().manual_seed(0))
        logits = model(result.images).detach().double()
        own = logits.gather(1, labels[:, None])[:, 0]
        found[name] = logits.scatter(1, labels[:, None], -math.inf).amax(1) - own
        torch.testing.assert_close(result.terms, objective(result.images))
        assert (result.norms <= eps * (1 + 1e-5)).all()
        torch.testing.assert_close(result.norms, (result.images - images).flatten(1).norm(p, 1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["targeted50"], wanted, rtol=1e-3, atol=1e-3)
    assert (found["margin50"] <= wanted + 1e-3).all()
    assert (result.terms > objective(images)).any()  # the cross-entropy is not what they raise
    assert torch.equal(model[1].weight.double(), weight)
    assert model[1].weight.grad is None


def test_the_ensemble_is_the_worst_of_its_members(model: host_evaluate.TrainedModel) -> None:
    found = check_ensemble(
        "classification", host_evaluate.make_batches(model, 8), host_evaluate.metrics(), (0, 0.3, 1), (0.0, 1.0)
    )
    right = [found.scores("standard", level)["probability"].argmax(1) for level in (0, 0.3, 1)]
    label = found.clean.scores["label"]
    assert (right[2] == label).mean() < (right[0] == label).mean()
    # What is wrong already is made more so by the first member, and left alone by the others.
    lost = right[0] != label
    first, *others = found.members_of("standard")
    assert (found.at(first, 1).norm[lost] > 0).all()
    assert (found.at(first, 1).loss[lost] > found.clean.loss[lost]).all()
    for name in others:
        np.testing.assert_array_equal(found.at(name, 1).loss[lost], found.at("standard", 1).loss[lost])

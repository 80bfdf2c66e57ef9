"""What an evaluation measures: metrics against scikit-learn, and the same numbers whenever they are measured."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, average_precision_score, balanced_accuracy_score

from adv_classify import evaluate as host
from adv_classify.data import MedMNIST
from adv_classify.external import TorchAttack
from adv_classify.gradcam import agreement
from adv_classify.module import RobustClassifier
from adv_classify.objective import ClassificationObjective
from advmed.attacks import APGD, PGD, Margin, Noise, SquareAttack
from advmed.evaluation.loop import evaluate
from advmed.report import Entry, tabulate

CPU = torch.device("cpu")
LEVELS = (0.0, 0.4, 1.2)


@pytest.fixture(scope="module")
def data(npz: Path) -> MedMNIST:
    return MedMNIST(str(npz), workers=0, batch_size=5)


@pytest.fixture(scope="module")
def model(standard: Path, data: MedMNIST) -> host.TrainedModel:
    return host.load_model("own", standard / "checkpoints" / "best.ckpt", data, "val", CPU)


@pytest.fixture(scope="module")
def measured(model: host.TrainedModel) -> Any:
    attacks = host.parse(["pgd3", "ifgsm2"], 2)
    return evaluate(host.make_batches(model), attacks, LEVELS, bounds=host.BOUNDS, seed=1)


def scores(tools: Any, absent: bool = False) -> dict[str, np.ndarray]:
    """Of five classes with many mistakes."""
    label = torch.randint(0, 5, (80,), generator=torch.Generator().manual_seed(1))
    if absent:
        label[label == 3] = 0
    logits = tools.noise(80, 5, seed=2) * 3 + torch.eye(5)[label]
    cam = np.random.default_rng(0).uniform(-0.2, 1, 80)
    return {"probability": logits.softmax(1).numpy(), "label": label.numpy(), "cam": cam}


@pytest.mark.parametrize("absent", [False, True])
def test_metrics_are_those_of_scikit_learn(tools: Any, absent: bool) -> None:
    given = scores(tools, absent)
    label, probability = given["label"], given["probability"]
    present = np.unique(label)
    assert len(present) == (4 if absent else 5)
    metrics = {metric.name: metric for metric in host.metrics()}
    wanted = {
        "accuracy": accuracy_score(label, probability.argmax(1)),
        "balanced accuracy": np.mean([(probability.argmax(1) == k)[label == k].mean() for k in present]),
        "mAP": np.mean([average_precision_score(label == k, probability[:, k]) for k in present]),
        "Grad-CAM agreement": given["cam"].mean(),
    }
    if not absent:
        assert wanted["balanced accuracy"] == pytest.approx(balanced_accuracy_score(label, probability.argmax(1)))
        one_hot = np.eye(5)[label]
        assert wanted["mAP"] == pytest.approx(average_precision_score(one_hot, probability, average="macro"))
    assert 0.3 < wanted["accuracy"] < 0.9
    assert wanted["accuracy"] != pytest.approx(wanted["balanced accuracy"], abs=1e-3)
    for name, value in wanted.items():
        assert metrics[name].of(given) == pytest.approx(value, rel=1e-5), name
        assert metrics[name].higher_is_better
    np.testing.assert_array_equal(metrics["accuracy"].per_sample(given), probability.argmax(1) == label)
    np.testing.assert_array_equal(metrics["Grad-CAM agreement"].per_sample(given), given["cam"])
    assert [metric.name for metric in host.metrics(False)] == ["mAP", "accuracy", "balanced accuracy"]


def test_images_without_a_map_are_left_out_of_the_agreement(tools: Any) -> None:
    given = scores(tools)
    given["cam"][:5] = np.nan
    metric = {metric.name: metric for metric in host.metrics()}["Grad-CAM agreement"]
    assert metric.of(given) == pytest.approx(given["cam"][5:].mean())


def test_scores_are_of_the_network_on_the_images_that_are_attacked(
    model: host.TrainedModel, measured: Any, data: MedMNIST
) -> None:
    assert measured.ids == tuple(f"val/{i:06d}" for i in range(12))
    dataset = data.dataset("val")
    for i, sample in enumerate(dataset):
        clean = model.network(sample["image"][None]).softmax(1)[0].detach()
        np.testing.assert_allclose(measured.clean.scores["probability"][i], clean, rtol=1e-4, atol=1e-6)
        assert measured.clean.scores["label"][i] == sample["label"]
    cam = measured.clean.scores["cam"]
    np.testing.assert_allclose(cam[np.isfinite(cam)], 1, atol=1e-5)  # the others have an empty map
    assert np.isfinite(cam).sum() > 6
    for attack in ("pgd3", "ifgsm2"):
        for level in LEVELS[1:]:
            found = measured.attacked[attack, level]
            assert (found.norm <= level * (1 + 1e-5)).all()
            assert found.norm.max() > 0.7 * level
            assert (found.loss > measured.clean.loss).all()
            assert np.abs(found.scores["probability"].sum(1) - 1).max() < 1e-5
            assert found.scores["cam"].shape == (12,)
            assert np.nanmin(found.scores["cam"]) < 1 - 1e-3


def test_marp_is_the_mean_of_map_over_the_attacked_levels(measured: Any) -> None:
    tables = {table.metric.name: table for table in tabulate([Entry("own", measured)], host.metrics())}
    for name, of in (("mAP", host.mean_ap), ("accuracy", host.accuracy)):
        table = tables[name]
        assert table.levels == LEVELS
        for row, attack in enumerate(("pgd3", "ifgsm2")):
            curve = [of(measured.scores(attack, level)) for level in LEVELS]
            assert table.values[0, row] == pytest.approx(curve)
            assert table.attacked_mean[0, row] == pytest.approx(np.mean(curve[1:]))
            area = (0.4 * (curve[0] + curve[1]) + 0.8 * (curve[1] + curve[2])) / 2 / 1.2
            assert table.auc[0, row] == pytest.approx(math.sqrt(curve[0] * area))
        assert table.values[0, 0, 2] < table.values[0, 0, 0]
        shown = dict(zip(table.columns, table.text[0], strict=True))
        assert float(shown["pgd3", "mean"]) == pytest.approx(table.attacked_mean[0, 0], abs=1e-4)


def test_a_resumed_evaluation_has_the_same_numbers(model: host.TrainedModel, tmp_path: Path) -> None:
    attacks = host.parse(["pgd2"], 2)
    how: dict[str, Any] = {"bounds": host.BOUNDS, "seed": 3, "fingerprint": "own"}
    whole = evaluate(host.make_batches(model), attacks, LEVELS, folder=tmp_path / "whole", **how)
    batches = host.make_batches(model)

    def cut() -> Any:
        raise RuntimeError("a power cut")

    broken = [batches[0], batches[1], replace(batches[2], load=cut)]
    with pytest.raises(RuntimeError, match="a power cut"):
        evaluate(broken, attacks, LEVELS, folder=tmp_path / "cut", **how)
    assert len(list((tmp_path / "cut" / "parts").iterdir())) == 2
    rest = [replace(batches[0], load=cut), replace(batches[1], load=cut), batches[2]]
    resumed = evaluate(rest, attacks, LEVELS, folder=tmp_path / "cut", **how)
    for key, condition in {("clean", 0.0): whole.clean, **whole.attacked}.items():
        other = resumed.clean if key[0] == "clean" else resumed.attacked[key]
        np.testing.assert_array_equal(condition.norm, other.norm)
        np.testing.assert_array_equal(condition.loss, other.loss)
        for name, values in condition.scores.items():
            np.testing.assert_array_equal(values, other.scores[name])


def test_some_images_are_at_even_distances(model: host.TrainedModel) -> None:
    def numbers(*limits: int | None) -> list[list[int]]:
        return [[int(i.removeprefix("val/")) for i in batch.ids] for batch in host.make_batches(model, *limits)]

    assert numbers(None) == numbers(12) == numbers(99) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]]
    assert numbers(4) == [[0, 3, 7, 11]]
    assert numbers(1) == [[0]]
    assert numbers(4, 3) == [[0, 3, 11]]  # of those that are evaluated, some are checked
    assert numbers(None, 3) == [[0, 5, 11]]
    assert numbers(4, 32) == numbers(4)
    assert [len(part) for part in numbers(11)] == [5, 5, 1]


def test_attacks_by_name() -> None:
    """Those with a number are ours; APGD and the Square Attack are there twice."""
    names = ["pgd20x3", "ifgsm10", "apgd20", "apgd20x2", "apgd", "square200", "square", "gaussian", "uniform"]
    attacks = host.parse(names, math.inf)
    assert list(attacks) == names
    assert isinstance(attacks["pgd20x3"], PGD)
    assert (attacks["pgd20x3"].steps, attacks["pgd20x3"].restarts) == (20, 3)
    assert (attacks["apgd20"], attacks["apgd20x2"]) == (APGD(20, math.inf), APGD(20, math.inf, restarts=2))
    assert attacks["square200"] == SquareAttack(200, math.inf)
    assert [attacks[name] for name in ("gaussian", "uniform")] == [Noise(k, math.inf) for k in ("gaussian", "uniform")]
    for name, access in (("apgd", "white box"), ("square", "black box")):
        assert isinstance(attacks[name], TorchAttack)
        assert (attacks[name].access, attacks[name].gradients, attacks[name].queries) == (access, None, None)
        assert "torchattacks" in attacks[name].description
        assert "torchattacks" not in attacks[f"{name}20{'0' if name == 'square' else ''}"].description
    assert {attack.norm for attack in attacks.values()} == {math.inf}


def test_a_name_given_twice() -> None:
    for name in ("apgd", "apgd20", "gaussian", "margin20"):
        with pytest.raises(ValueError, match=f"attack '{name}' is given twice"):
            host.parse([name, "pgd1", name], 2)


WRONG = ["cw", "pgd0", "pgd", "margin", "margin0", "margin20x0", "targeted", "targetedx2", "square20x2", "gaussian20"]


@pytest.mark.parametrize("name", [*WRONG, "Apgd", "apgd 20", "autoattack2", ""])
def test_a_name_that_is_none_is_answered_with_all_there_are(name: str) -> None:
    """Under the name that was given, whoever might have been meant."""
    known = r"expected pgd<steps>, apgd<steps>.* gaussian or uniform; margin<steps> or targeted<steps>.* autoattack"
    with pytest.raises(ValueError, match=f"unknown attack '{name}': {known}"):
        host.parse(["pgd1", name], 2)


def test_a_model_of_other_data_is_refused(standard: Path, tmp_path: Path, tools: Any, npz: Path) -> None:
    path = standard / "checkpoints" / "best.ckpt"
    four = MedMNIST(str(tools.write_npz(tmp_path / "four.npz", classes=4)), workers=0)
    with pytest.raises(ValueError, match=r"3 classes from 3 channel\(s\), the data has 4 classes and 3 channel"):
        host.load_model("own", path, four, "val", CPU)
    grey = MedMNIST(str(npz), workers=0, channels=1)
    with pytest.raises(ValueError, match=r"3 classes from 3 channel\(s\), the data has 3 classes and 1 channel"):
        host.load_model("own", path, grey, "val", CPU)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        host.load_model("own", tmp_path / "none.ckpt", grey, "val", CPU)


def test_margins_come_with_the_run(adaptive: Path, standard: Path, data: MedMNIST, tools: Any, tmp_path: Path) -> None:
    path = adaptive / "checkpoints" / "best.ckpt"
    found = host.load_model("own", path, data, "val", CPU, gradcam=False).margins
    assert sorted(found) == pytest.approx(sorted(value for value, _ in tools.margins(adaptive).values()))
    assert host.read_margins(standard / "margins.csv") is None
    (tmp_path / "margins.csv").write_text("id,margin,visits\na,nan,1\n")
    assert host.read_margins(tmp_path / "margins.csv") is None
    (tmp_path / "margins.csv").write_text("id,margin,visits\n")
    assert host.read_margins(tmp_path / "margins.csv") is None


def test_a_loaded_model_predicts_and_does_not_learn(model: host.TrainedModel, standard: Path) -> None:
    assert not model.network.training
    twin = RobustClassifier.from_checkpoint(standard / "checkpoints" / "best.ckpt")
    images, labels, ids = model.read([3, 4])
    assert ids == ["val/000003", "val/000004"]
    assert labels.tolist() == [0, 1]
    assert torch.equal(model.network(images), twin(images))
    loaded = host.load(model, [3, 4])
    assert loaded.objective.names == ("ce",)
    assert loaded.objective.weight is None


def test_the_agreement_is_for_the_class_of_the_clean_image(model: host.TrainedModel) -> None:
    images, _, _ = model.read([0, 1, 2])
    explained = host.Explained(model, images)
    assert torch.equal(explained.classes, model.network(images).argmax(1))
    attacked = (images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    wanted = agreement(model.cam(images, explained.classes), model.cam(attacked, explained.classes))
    torch.testing.assert_close(explained.agreement(attacked), wanted, equal_nan=True)
    assert torch.isnan(host.Explained(replace(model, cam=None), images).agreement(attacked)).all()


def test_examples_show_clean_and_attacked_images_of_every_model(model: host.TrainedModel, tools: Any) -> None:
    other = replace(model, name="no cam", cam=None)
    attack = ("pgd2", host.parse(["pgd2"], 2)["pgd2"])
    ids = ["val/000005", "val/000000", "val/000011"]
    examples = host.make_examples([model, other], ["x", "y", "z"], attack, [0.5, 1.0], ids, seed=0)
    assert [example.sample for example in examples] == ["val/000005 (z)", "val/000000 (x)", "val/000011 (z)"]
    for example in examples:
        assert [(view.model, view.level) for view in example.views] == [
            (name, level) for name in ("own", "no cam") for level in (0.0, 0.5, 1.0)
        ]
        for view in example.views:
            assert (view.heat is None) == (view.model == "no cam")
            assert view.image.shape == (16, 16, 3)
            assert view.note.split()[0] in "xyz"
            assert view.note.endswith("%")
            if view.heat is not None:
                assert view.heat.shape == (16, 16)
                assert 0 <= view.heat.min() <= view.heat.max() <= 1
        assert np.linalg.norm(example.views[1].image - example.views[0].image) == pytest.approx(0.5, rel=0.2)
    assert host.picture(tools.noise(2, 1, 4, 5)).shape == (4, 5)
    assert host.make_examples([other], ["x", "y", "z"], attack, [0.5], []) == []


# Attacks on the margin


def linear(classes: int = 5) -> tuple[torch.nn.Module, torch.Tensor]:
    """Logits W x, with classes far apart and near, and W."""
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, classes, bias=False))
    return model, model[1].weight.detach().double()


@pytest.mark.parametrize("p", [2.0, math.inf])
def test_targeted_attacks_reach_the_largest_margin_of_a_linear_model(tools: Any, p: float) -> None:
    """max_j z_j - z_y + eps ||w_j - w_y||_q, q the dual of p: in closed form, for every image."""
    model, weight = linear()
    images, labels, eps = tools.noise(40, 3, 2, 2), torch.arange(40) % 5, 0.3 if p == 2 else 0.08
    rises = weight[None] - weight[labels][:, None]
    margins = (rises * images.flatten(1).double()[:, None]).sum(2)
    margins = margins + eps * (rises.norm(dim=2) if p == 2 else rises.abs().sum(2))
    wanted = margins.scatter(1, labels[:, None], -math.inf).amax(1)
    objective = ClassificationObjective(model, labels)
    attack = host.parse(["targeted50", "margin50"], p)
    found = {}
    for name, method in attack.items():
        result = method(objective, images, eps, bounds=None, generator=torch.Generator().manual_seed(0))
        logits = model(result.images).detach().double()
        own = logits.gather(1, labels[:, None])[:, 0]
        found[name] = logits.scatter(1, labels[:, None], -math.inf).amax(1) - own
        torch.testing.assert_close(result.terms, objective(result.images))
        assert (result.norms <= eps * (1 + 1e-5)).all()
        torch.testing.assert_close(result.norms, (result.images - images).flatten(1).norm(p, 1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["targeted50"], wanted, rtol=1e-3, atol=1e-3)
    assert (found["margin50"] <= wanted + 1e-3).all()
    best = objective(images + 0).detach()  # the cross-entropy is not what they raise
    assert (result.terms.detach() > best).any()


def test_names_of_attacks_on_the_margin() -> None:
    attacks = host.parse(["margin100x3", "targeted20x2", "pgd100x3"], math.inf)
    like = attacks["pgd100x3"]
    margin, targeted = attacks["margin100x3"], attacks["targeted20x2"]
    assert (margin.loss, targeted.loss) == (Margin(), Margin(targets=9))
    for attack, steps, restarts in ((margin, 100, 3), (targeted, 20, 2)):
        assert (attack.steps, attack.restarts, attack.norm) == (steps, restarts, math.inf)
        assert (attack.step_scale, attack.random_start, attack.keep) == (like.step_scale, 1.0, "best")
    assert (margin.gradients, targeted.gradients) == (300, 20 * 2 * 9)
    assert margin.description == f"{like.description}; climbs the margin of the largest wrong class"
    assert "each of up to 9 wrong classes" in targeted.description
    assert "margin of" not in like.description


def test_an_attack_on_the_margin_leaves_no_trace(model: host.TrainedModel) -> None:
    batch = host.make_batches(model, 3)[0].load()
    before = {key: value.clone() for key, value in model.network.state_dict().items()}
    attack = host.parse(["targeted2"], 2)["targeted2"]
    with torch.inference_mode():
        attack(batch.objective, batch.images, 0.5, bounds=host.BOUNDS, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(value, before[key]) for key, value in model.network.state_dict().items())
    assert all(parameter.grad is None for parameter in model.network.parameters())

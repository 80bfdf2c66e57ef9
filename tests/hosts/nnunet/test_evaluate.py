"""The attacked function is nnU-Net's prediction; the numbers are those of an independent computation."""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import nn

from adv_nnunet import evaluate as host
from adv_nnunet.cli import _model_folders, main
from adv_nnunet.evaluate import SlidingWindow
from adv_nnunet.objective import inference_loss
from advmed.attacks.names import parse_attacks
from advmed.evaluation.dice import Counts, adi, tvdi
from advmed.evaluation.loop import evaluate
from helpers.ensemble import check_ensemble
from helpers.hosts import as_on_a_terminal, different, table

pytestmark = pytest.mark.slow


@pytest.fixture
def stock_model(stock: Path) -> Any:
    return load(stock)


def load(folder: Path) -> Any:
    return host.load_model("STD", folder, 0, torch.device("cpu"), file="checkpoint_final.pth")


def report(output: Path, *words: Any) -> Path:
    """Runs the command on the CPU."""
    given = ["evaluate", "-p", "tiny", "-device", "cpu", "-o", output, *words]
    assert main([str(word) for word in given]) == 0
    return output


SIZES_2D = [(56, 40), (57, 41), (90, 61), (30, 25), (30, 70), (168, 120)]
SIZES_3D = [(40, 56, 40), (33, 51, 35), (45, 70, 39)]


def host_logits(model: Any, image: np.ndarray | torch.Tensor, step: float = 0.5) -> torch.Tensor:
    """What nnU-Net predicts for a volume (C, z, y, x), without mirroring."""
    own, cpu = model.predictor, torch.device("cpu")
    theirs = nnUNetPredictor(step, use_mirroring=False, device=cpu, allow_tqdm=False)
    parts = (model.window.network, own.plans_manager, own.configuration_manager, None, own.dataset_json, "", (0, 1))
    theirs.manual_initialization(*parts)
    return theirs.predict_sliding_window_return_logits(torch.as_tensor(image)).float()


@pytest.mark.parametrize("size", SIZES_2D)
@pytest.mark.parametrize("step", [0.5, 1.0])
def test_slices_are_predicted_as_nnunet_does(stock_model: Any, size: tuple[int, int], step: float) -> None:
    image = torch.randn(1, 2, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = SlidingWindow(stock_model.window.network, stock_model.window.patch_size, step)(image.swapaxes(0, 1))
    theirs = host_logits(stock_model, image, step).swapaxes(0, 1)
    assert ours.shape == theirs.shape == (2, 3, *size)
    assert (ours - theirs).abs().max() < 0.02 * theirs.abs().max()  # nnU-Net adds up in float16
    assert (ours.argmax(1) == theirs.argmax(1)).float().mean() > 0.995


@pytest.mark.parametrize("size", SIZES_3D)
def test_volumes_are_predicted_as_nnunet_does(finished: Callable[..., Path], size: tuple[int, int, int]) -> None:
    model = load(finished(configuration="3d_fullres"))
    image = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = model.window(image[None])[0]
    theirs = host_logits(model, image)
    assert ours.shape == theirs.shape == (3, *size)
    # nnU-Net adds up in float16, where the Gaussian's weights in the corners of a volume are next to nothing.
    difference = (ours - theirs).abs()
    assert (difference < 0.02 * theirs.abs().max()).float().mean() > 0.93
    assert difference.median() < 0.002 * theirs.abs().max()


class Plain(SlidingWindow):
    """Every tile's activations kept, and the tiles put together by their definition."""

    def _stitched(self, padded: torch.Tensor, tiles: list[tuple[slice, ...]]) -> torch.Tensor:
        weight = host.compute_gaussian(
            self.patch_size, sigma_scale=1 / 8, value_scaling_factor=10, dtype=torch.float32, device=padded.device
        )
        place = [
            tuple(n for t, size in zip(tile[::-1], padded.shape[:1:-1], strict=True) for n in (t.start, size - t.stop))
            for tile in tiles
        ]
        total = sum(
            nn.functional.pad(self.network(padded[(..., *t)]) * weight, p) for t, p in zip(tiles, place, strict=True)
        )
        return total / sum(nn.functional.pad(weight, p) for p in place)


@pytest.mark.parametrize("size", [(56, 40), (57, 40), (90, 61), (30, 100)])
def test_gradients_through_recomputed_tiles(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.InstanceNorm2d(4), nn.Tanh(), nn.Conv2d(4, 3, 3, padding=1)
    )
    passes = []
    network[0].register_forward_hook(lambda *_: passes.append(1))
    image, weight = torch.randn(2, 1, *size), torch.randn(2, 3, *size)
    gradients, outputs = [], []
    for window in (SlidingWindow(network, (56, 40)), Plain(network, (56, 40))):
        leaf = image.clone().requires_grad_()
        outputs.append(window(leaf))
        gradients.append(torch.autograd.grad((outputs[-1] * weight).sum(), leaf)[0])
    assert torch.allclose(*outputs, atol=1e-5)
    assert torch.allclose(*gradients, atol=1e-4 * float(gradients[1].abs().max()))
    tiles = {(56, 40): 1, (57, 40): 2, (90, 61): 9, (30, 100): 4}[size]
    assert len(passes) == tiles + (2 * tiles if tiles > 2 else tiles), "more than two tiles are computed again"
    del passes[:]
    with torch.no_grad():
        SlidingWindow(network, (56, 40))(image)
    assert len(passes) == tiles, "without gradients nothing is computed again"


def test_adi_and_tvdi_of_clean_slices_and_the_harm_of_an_attack(
    stock_model: Any, world: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against nnU-Net's own logits, the preprocessed labels, and Dice of sets of pixels."""
    cases = host.validation_cases(stock_model, 0)
    assert list(cases) == world.cases[6:]
    as_on_a_terminal(monkeypatch)
    samples = host.list_samples(stock_model, cases, 30)
    assert "reading the cases: 100%" in capsys.readouterr().err
    _predict_foreground(stock_model, cases)
    batches = host.make_batches(stock_model, cases, samples, 7)
    assert [id_ for batch in batches for id_ in batch.ids] == [sample.id for sample in samples]
    before = {name: value.clone() for name, value in stock_model.window.state_dict().items()}
    measured = evaluate(batches, parse_attacks(["ifgsm4"]), [0, 1, 4])
    assert not different(stock_model.window.state_dict(), before)
    assert not stock_model.window.training
    clean, weak, strong = (measured.at("ifgsm4", level) for level in (0, 1, 4))
    assert clean.loss.mean() < weak.loss.mean() < strong.loss.mean()
    assert not strong.nonfinite.any()
    scores = measured.scores("ifgsm4", 0)
    loss, losses = inference_loss(stock_model.labels), []
    twice, both = np.zeros((len(samples), 2)), np.zeros((len(samples), 2))
    for row, sample in enumerate(samples):
        image, segmentation = cases[sample.case]()
        logits = host_logits(stock_model, image[:, [sample.index]])
        losses.append(float(loss(logits[None, :, 0], torch.from_numpy(segmentation[None, :, sample.index]).clamp(0))))
        predicted = logits.argmax(0)[0].numpy()
        for c in (1, 2):
            places = [set(map(tuple, np.argwhere(x == c))) for x in (predicted, segmentation[0, sample.index])]
            twice[row, c - 1] = 2 * len(places[0] & places[1])
            both[row, c - 1] = len(places[0]) + len(places[1])
    expected_tvdi = (twice.sum(0) / both.sum(0)).mean()
    per_slice = np.ma.masked_invalid(np.divide(twice, both, where=both > 0, out=np.full_like(both, np.nan))).mean(1)
    assert clean.loss.tolist() == pytest.approx(losses, abs=0.01)
    assert expected_tvdi > 0.01, "a network that predicts nothing tests nothing"
    assert adi(Counts.of(scores)) == pytest.approx(per_slice.mean(), abs=0.01)
    assert tvdi(Counts.of(scores)) == pytest.approx(expected_tvdi, abs=0.01)
    found = host.metrics(True)[0].per_sample(scores)
    assert np.allclose(found, per_slice.filled(np.nan), atol=0.02, equal_nan=True)
    assert [metric.name for metric in host.metrics(True)] == ["ADI", "TVDI"]
    assert [metric.name for metric in host.metrics(False)] == ["Dice"]


def _predict_foreground(model: Any, cases: Any, share: float = 0.05) -> None:
    """After so short a training all is background: moves the decision so that a share of the first case is not."""
    image, _ = next(iter(cases.values()))()
    with torch.no_grad():
        logits = model.window(torch.from_numpy(image).swapaxes(0, 1))
        distance = logits[:, 0] - logits[:, 1:].amax(1)
        model.window.network.decoder.seg_layers[-1].bias[0] -= distance.quantile(share)


def test_padding_is_not_scored(stock_model: Any, world: Any) -> None:
    """A network that sees class 1 everywhere: what it predicts outside of the image is no false positive."""
    cases = host.validation_cases(stock_model, 0)
    samples = host.list_samples(stock_model, cases, 4)
    with torch.no_grad():
        stock_model.window.network.decoder.seg_layers[-1].bias[1] += 1000
    (batch,) = host.make_batches(stock_model, cases, samples, 32)
    loaded = batch.load()
    assert loaded.images.shape[2:] == (56, 40)
    counts = loaded.score(loaded.images)
    for sample, tp, fp in zip(samples, counts["tp"][:, 0], counts["fp"][:, 0], strict=True):
        path = world.raw / world.dataset("main") / "labelsTr" / f"{sample.case}.nii.gz"
        label = sitk.GetArrayFromImage(sitk.ReadImage(path))[sample.index]
        assert label.size < 56 * 40
        assert int(tp) == (label == 1).sum()
        assert int(tp + fp) == label.size


def test_slices_of_different_sizes_do_not_share_a_batch(stock_model: Any) -> None:
    """Some of them are taken at even distances."""
    shapes = {"a": (2, 56, 40), "b": (1, 56, 40), "c": (3, 60, 40)}
    cases = {
        name: lambda shape=shape: (np.zeros((1, *shape), np.float32), np.zeros((1, *shape), np.int16))
        for name, shape in shapes.items()
    }
    batches = host.make_batches(stock_model, cases, host.list_samples(stock_model, cases), 2)
    assert [list(batch.ids) for batch in batches] == [["a:0", "a:1"], ["b:0"], ["c:0", "c:1"], ["c:2"]]
    sizes = [(2, 1, 56, 40), (1, 1, 56, 40), (2, 1, 60, 40), (1, 1, 60, 40)]
    assert [tuple(batch.load().images.shape) for batch in batches] == sizes
    assert [sample.id for sample in host.list_samples(stock_model, cases, 2)] == ["a:0", "c:2"]
    assert len(host.list_samples(stock_model, cases, 10_000)) == 6


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("dataset", ["regions_ignore", "ignore", "two_channels"])
def test_other_kinds_of_data(finished: Callable[..., Path], tmp_path: Path, world: Any, dataset: str) -> None:
    folder = finished(dataset)
    words = ["--attacks", "pgd2", "--levels", "0", "2", "--samples", "6", "--examples", "1", "--checks", "0"]
    output = report(tmp_path / "report", "-d", world.dataset(dataset), "-c", "2d", "-m", folder, *words)
    assert len({row["id"] for row in table(output / "samples.csv")}) == 6
    shown = (output / "report.html").read_text().count(": the clean input")
    assert shown == (not dataset.startswith("regions")), "overlapping regions are no label map"
    model = load(folder)
    cases = host.validation_cases(model, 0)
    samples = host.list_samples(model, cases, 3)
    (batch,) = host.make_batches(model, cases, samples, 32)
    loaded = batch.load()
    counts = loaded.score(loaded.images)
    assert counts["tp"].shape == (3, 2)
    if dataset.endswith("ignore"):  # what is ignored counts nowhere
        _, truth = next(iter(cases.values()))()
        ignored = torch.from_numpy(truth[0, [sample.index for sample in samples]] == 3)
        assert ignored.any()
        everything = torch.stack((counts["tp"], counts["fp"], counts["fn"])).sum((0, 2))
        assert (everything <= 2 * (~ignored).flatten(1).sum(1)).all()


@pytest.mark.usefixtures("undrawn")
def test_the_report_says_whether_to_believe_it(
    stock: Path, tmp_path: Path, world: Any, monkeypatch: pytest.MonkeyPatch, audit: Any
) -> None:
    """Of slices, whose intervals are over cases; with a network that finds something."""
    load_model = host.load_model

    def finding(*given: Any, **how: Any) -> Any:
        model = load_model(*given, **how)
        _predict_foreground(model, host.validation_cases(model, 0), 0.2)
        return model

    monkeypatch.setattr(host, "load_model", finding)
    words = ["--attacks", "pgd2", "--levels", "0", "1", "3", "--samples", "16", "--examples", "3", "--checks", "4"]
    output = report(tmp_path / "report", "-d", "4", "-c", "2d", "-m", f"own={stock}", *words)
    how = {"fails_at": 0.5, "checked": 4, "shown": 3, "groups": lambda id_: id_.split(":")[0]}
    record = audit(output, "ADI", **how)
    assert {id_.split(":")[0] for id_ in record["configuration"]["samples"]} == set(world.cases[6:])
    assert record["failures"]["criterion"] == "ADI below 0.5"
    assert record["results"]["ADI"]["models"]["own"]["clean"] > 0.01
    assert "(whole groups of them)" in (output / "report.html").read_text()


@pytest.mark.usefixtures("undrawn")
def test_a_volume_under_attack(
    finished: Callable[..., Path], tmp_path: Path, world: Any, capsys: pytest.CaptureFixture[str], audit: Any
) -> None:
    words = ["--attacks", "pgd1", "--levels", "0", "10", "--samples", "1", "--examples", "1", "--checks", "0"]
    folder = finished(configuration="3d_fullres")
    output = report(tmp_path / "report", "-d", "4", "-c", "3d_fullres", "-m", folder, *words)
    text, page = capsys.readouterr().out, (output / "report.html").read_text()
    assert "TVDI" not in text
    assert "Whether the attacks are strong enough was not checked." in text
    assert "whole case as" in page
    assert "(whole groups of them)" not in page
    record = audit(output, "Dice", fails_at=0.5, checked=0, shown=1, groups=str)
    assert record["configuration"]["samples"] == world.cases[6:7]


@pytest.mark.usefixtures("undrawn")
def test_raw_files_of_the_validation_cases_give_the_numbers_of_the_validation_cases(
    stock: Path, tmp_path: Path, world: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    images, labels = tmp_path / "images", tmp_path / "labels"
    for folder, part, ending in ((images, "imagesTr", "_0000.nii.gz"), (labels, "labelsTr", ".nii.gz")):
        folder.mkdir()
        for case in world.cases[6:]:
            shutil.copy(world.raw / world.dataset("main") / part / f"{case}{ending}", folder)
    words = ["-d", "4", "-c", "2d", "-m", f"mine={stock}", "--attacks", "ifgsm2", "--levels", "0", "3"]
    words += ["--samples", "6", "--examples", "1", "--checks", "0"]
    raw, validation = (
        report(tmp_path / name, *words, *more) for name, more in (("raw", ("-i", images, "-l", labels)), ("own", ()))
    )
    assert (raw / "samples.csv").read_text() == (validation / "samples.csv").read_text()
    assert "mine" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("dataset", "values", "wanted"),
    [("main", 56 * 40, [0.0, 1.9, 5.7, 9.5]), ("two_channels", 2 * 56 * 40, [0.0, 2.7, 8.0, 13.0])],
)
def test_the_default_levels_grow_with_all_values_of_the_input(
    finished: Callable[..., Path], world: Any, dataset: str, values: int, wanted: list[float]
) -> None:
    """As eps and delta do: one level is one RMS change of a value, whatever the number of channels."""
    evaluation = host.SegmentationEvaluation(
        folders={"one": finished(dataset)},
        fold=0,
        device=torch.device("cpu"),
        checkpoint="checkpoint_final.pth",
        step_size=0.5,
        batch_size=1,
        samples=None,
        raw=None,
        dataset=world.dataset(dataset),
        configuration="2d",
    )
    assert evaluation.default_levels(2) == wanted
    assert wanted[1:] == pytest.approx([share * math.sqrt(values) for share in (0.04, 0.12, 0.2)], rel=0.03)
    assert evaluation.default_levels(math.inf) == [0.0, 0.04, 0.12, 0.2]


def test_margins_of_a_model_of_ours_and_none_of_a_stock_one(bench: Any, stock_model: Any) -> None:
    assert stock_model.margins is None
    trainer = bench.train("AMAT", warmup_epochs=1)
    margins = load(Path(trainer.output_folder).parent).margins
    assert margins.tolist() == trainer.method.margins.values().tolist()


def test_the_ensemble_is_the_worst_of_its_members(stock_model: Any) -> None:
    cases = host.validation_cases(stock_model, 0)
    samples = host.list_samples(stock_model, cases, 6)
    batches = host.make_batches(stock_model, cases, samples, 3)
    check_ensemble("segmentation", batches, host.metrics(planar=True), (0, 2, 6), None)


def test_trainers_are_named_by_what_tells_them_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    trainers = ["nnUNetTrainer", "nnUNetTrainer_250epochs", "nnUNetTrainerAMAT", "MyTrainer"]
    args = argparse.Namespace(m=None, tr=trainers, d="Dataset004_Hippocampus", p=None, c="2d")
    folders = _model_folders(args)
    assert [name for name, _ in folders] == ["STD", "250epochs", "AMAT", "MyTrainer"]
    assert folders[1][1].name == "nnUNetTrainer_250epochs__nnUNetPlans__2d"

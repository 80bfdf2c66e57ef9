"""The paper's tables beside ours: what `benchmarks/paper.py` prints, and what its scripts take for trained."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from advmed import auc_robust
from advmed.files import sha256

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
CURVE = {"levels": [0.0, 2.0, 6.0, 10.0], "values": [0.5, 0.4, 0.3, 0.2], "auc_robust": 0.4}


@pytest.fixture(scope="module")
def paper() -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("paper")
    finally:
        sys.path.remove(str(BENCHMARKS))


def found(paper: Any, curves: Any = None, **own: Any) -> Any:
    """What was measured, as the tests do not mind."""
    given = {"scale": 1.0, "delta_scale": 1.0, "samples": 17, "steps": 10, "seconds": {}}
    return paper.Found(curves=curves or {}, **(given | own))


@pytest.mark.parametrize("name", ["table1", "table2", "table3", "table6", "table7"])
def test_every_published_curve_has_the_levels_of_its_table(paper: Any, name: str) -> None:
    table = paper.TABLES[name]
    levels, published = paper.levels_of(table), paper.published(table)
    assert levels[0] == 0
    assert len(levels) == 4
    assert {"AMAT"} < set(published)
    assert {f"SAT{eps:g}" for eps in paper.sats_of(table.dataset)} < set(published)
    for curves in published.values():
        clean = {curve[0] for curve in curves.values()}
        assert len(clean) == 1, "both attacks begin with the same clean value"
        assert all(len(curve) == len(levels) for curve in curves.values())


def test_the_numbers_over_delta_are_the_papers(paper: Any) -> None:
    """Their AUC_robust, which the paper prints, follows from the curves that are shown."""
    table = paper.TABLES["table9"]
    curve = paper.published(table)["delta 0.5"]["pgd100"]
    best = [row for row in paper.rows("auc_robust_appendix_a.csv") if row["dataset"] == "hippocampus"]
    wanted = next(float(row["auc_robust"]) for row in best if float(row["delta"]) == 0.5)
    assert auc_robust(paper.levels_of(table), curve) == pytest.approx(wanted, abs=1e-4)


def test_a_cell_is_ours_and_the_papers_in_brackets(paper: Any) -> None:
    curves = {"AMAT": {attack: [0.5, 0.4, 0.3, 0.2] for attack in paper.ATTACKS}}
    text = paper.page("table2", paper.TABLES["table2"], found(paper, curves, scale=0.4, hours={"AMAT": 1.25}), "cpu")
    assert "17 validation samples" in text
    assert "one seed (0)" in text
    cells = "| AMAT | 0.500 (0.784) | 0.400 (0.752) | 0.300 (0.675) | 0.200 (0.558) | 0.300 (0.662) |"
    area = (2 * 0.45 + 4 * 0.35 + 4 * 0.25) / 10
    assert f"{cells} {(0.5 * area) ** 0.5:.3f} (" in text
    assert text.splitlines()[6].endswith(") | 1.25 |")
    assert "| 0.50 |" not in text
    unknown = paper.page("table2", paper.TABLES["table2"], found(paper, curves, hours={"AMAT": None}), "cpu")
    assert unknown.splitlines()[6].endswith(") |  |")


@pytest.mark.parametrize("name", ["table1", "table2", "table3", "table6", "table7"])
def test_averages_are_the_papers(paper: Any, name: str) -> None:
    table = paper.TABLES[name]
    sums = paper.sums_of(table, paper.published(table))
    looked = 0
    for row in paper.rows("results_tables_1_to_7.csv"):
        if (row["dataset"], row["level"]) == (table.dataset, "avg") and row["attack"] in sums.get(row["method"], {}):
            assert sums[row["method"]][row["attack"]][0] == pytest.approx(float(row["value"]), rel=2e-3, abs=2e-4)
            looked += 1
    assert looked >= (2 if name == "table3" else 8), "of table 3 the scan has lost most"


@pytest.mark.parametrize("name", ["table8", "table9", "table10", "table11", "table12"])
def test_areas_are_the_papers(paper: Any, name: str) -> None:
    table = paper.TABLES[name]
    sums = paper.sums_of(table, paper.published(table))
    rows = [row for row in paper.rows("auc_robust_appendix_a.csv") if row["dataset"] == table.dataset]
    assert len(rows) > 3
    for row in rows:
        found = sums[f"delta {float(row['delta']):g}"]["pgd100"][1]
        assert found == pytest.approx(float(row["auc_robust"]), rel=2e-3)


def test_the_caption_tells_levels_and_deltas_apart(paper: Any) -> None:
    given = found(paper, scale=0.4, delta_scale=3.0, steps=10, notes=(paper.FINE_TUNED,))
    text = paper.caption(paper.TABLES["table9"], given, "cpu")
    assert "noise levels of the paper times 0.4, AMAT's deltas times 3;" in text
    assert "10 attack steps in training (its authors' release: 20)" in text
    assert "fine-tuned from the standard one" in text
    assert "mean nothing" not in text
    assert "mean nothing" in paper.caption(paper.TABLES["table9"], given, "smoke")


def test_table_4_is_beside_the_papers_own_metric(paper: Any) -> None:
    curves = {"STD": {attack: [0.835, 0.4, 0.3, 0.2] for attack in paper.ATTACKS}}
    text = paper.page("table4", paper.TABLES["table4"], found(paper, curves), "cpu")
    assert "| TVDI | clean |" in text
    assert "| STD | 0.835 (0.880) |" in text


def test_seconds_are_compared_with_standard_ones(paper: Any) -> None:
    given = found(paper, seconds={"STD": 2.0, "SAT5": 6.6}, per="iteration", samples=0, steps=10)
    text = paper.page("table5", paper.TABLES["table5"], given, "cpu")
    assert "seconds of an iteration" in text
    assert "10 attack steps in training (its authors' release: 20)" in text
    assert "| SAT5 | 6.6 | 3.30 (11.40) |" in text


def test_seconds_of_trainings_side_by_side_are_doubted(paper: Any, tmp_path: Path) -> None:
    for name, jobs in (("a", 1), ("b", 2)):
        (tmp_path / name).write_text(str(jobs))
    assert paper.together([tmp_path / "a"]) == ()
    assert "2 trainings ran side by side" in paper.together([tmp_path / "a", tmp_path / "b"])[0]
    assert "not recorded" in paper.together([tmp_path / "a", tmp_path / "c"])[0]


def call(paper: Any, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["paper.py", *words])
    paper.main()


def test_the_list_says_what_data_hold(
    paper: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call(paper, monkeypatch, "list")
    said = capsys.readouterr().out
    for word in ("table5-bccd", "splits_final.json", "bccd.yaml", "400_senior", "landmarks.csv"):
        assert word in said
    assert set(paper.LAYOUTS) == {table.dataset for table in paper.TABLES.values()}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["table2"], "--data FOLDER is needed"),
        (["table2", "--data", str(ROOT / "examples" / "data" / "bccd")], "has no dataset.json"),
        (["table7", "--data", str(ROOT / "tests")], "has no bccd.yaml"),
        (["table5-bccd", "--data", str(ROOT / "examples" / "data" / "bccd"), "--jobs", "2"], "leave out --jobs"),
        (["table2", "--show", "--work", "nowhere"], "has not been measured"),
    ],
)
def test_bad_input_is_one_error_before_anything_begins(
    paper: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    words: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        call(paper, monkeypatch, *words)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


# nnU-Net


def plans(stages: int) -> dict[str, Any]:
    """Of nnU-Net, as much as the script reads."""
    network = {"n_stages": stages, "features_per_stage": [32] * stages}
    return {"configurations": {"2d": {"batch_size": 40, "architecture": {"arch_kwargs": network}}}}


def pretended(bench: Any, stages: int = 4) -> Callable[..., None]:
    """A stand-in for the installed commands, which leaves what they would; notes what it was called for."""
    bench.called = []

    def command(log: str, arguments: list[str], **variables: str) -> None:
        bench.called.append(log)
        name = log.partition("_")[2]
        if log == "preprocess":
            (bench.folders["nnUNet_preprocessed"] / bench.name / "nnUNetPlans_2d").mkdir(parents=True)
            (bench.folders["nnUNet_preprocessed"] / bench.name / "nnUNetPlans.json").write_text(
                json.dumps(plans(stages))
            )
        elif log.startswith("train_"):
            fold = bench.folder(name) / "fold_0"
            fold.mkdir(parents=True)
            keys = ("adv_margin_q05", "adv_margin_q50", "adv_margin_q95")
            seconds = 500.0 if name == "STD" else 1000.0
            times = {"epoch_start_timestamps": [0.0], "epoch_end_timestamps": [seconds]}
            torch.save({"logging": times | {key: [1.0] for key in keys}}, fold / "checkpoint_final.pth")
        elif log.startswith("thresholds_"):
            standard = bench.folder("STD") / "fold_0" / "checkpoint_final.pth"
            Path(arguments[arguments.index("-o") + 1]).write_text(json.dumps({"source_sha256": sha256(standard)}))
        else:
            output = Path(arguments[arguments.index("-o") + 1])
            output.mkdir(parents=True)
            models = {n: {"attacks": {"pgd100": CURVE, "ifgsm10": CURVE}} for n in ("STD", *bench.preset.runs)}
            evaluation = {"attacks": {"pgd100": {}, "ifgsm10": {}}}
            report = {
                "configuration": {"samples": ["a", "b"], "evaluation": evaluation},
                "results": {"ADI": {"models": models}, "TVDI": {"models": models}},
            }
            (output / "report.json").write_text(json.dumps(report))

    return command


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A data set's folder."""
    data = tmp_path / "data"
    data.mkdir()
    splits = [{"train": [f"case_{i}" for i in range(8)], "val": ["case_8"]}]
    (data / "splits_final.json").write_text(json.dumps(splits))
    return data


@pytest.fixture
def pretending(paper: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The benchmarks that a table makes, their commands pretended."""
    made: list[Any] = []
    after = paper.hippocampus.Benchmark.__post_init__

    def init(bench: Any) -> None:
        after(bench)
        bench.command = pretended(bench, stages=7 if "Heart" in bench.name else 4)
        made.append(bench)

    monkeypatch.setattr(paper.hippocampus.Benchmark, "__post_init__", init)
    return made


def test_table_4_needs_no_other_table_before_it(paper: Any, pretending: list[Any], raw: Path, tmp_path: Path) -> None:
    options = paper.Options(raw, tmp_path / "work", "cpu", "cpu", 1, False)
    given = paper.segmentation(options, paper.TABLES["table4"])
    assert given.curves["STD"]["pgd100"][0] == 0.5
    assert pretending[0].called == ["preprocess", "train_STD", "evaluate_STD"]
    assert paper.FINE_TUNED not in given.notes
    both = paper.segmentation(options, paper.TABLES["table2"])
    assert (both.hours["STD"], both.hours["AMAT"]) == (500 / 3600, 1000 / 3600)
    assert "train_STD" not in pretending[1].called
    assert "evaluate_all" in pretending[1].called


def test_seconds_are_of_an_iteration_where_epochs_have_not_as_many(
    paper: Any, pretending: list[Any], raw: Path, tmp_path: Path
) -> None:
    """Standard epochs have 250 iterations, adversarial ones 100: 500 s and 1000 s are 2 s and 10 s."""
    options = paper.Options(raw, tmp_path / "work", "cpu", "cpu", 1, False)
    given = paper.segmentation(options, paper.TABLES["table5"])
    assert given.seconds["STD"] == 2
    assert given.seconds["SAT5"] == given.seconds["AMAT"] == 10
    assert given.per == "iteration"
    assert not any("evaluate" in log for log in pretending[0].called)
    assert not any("side by side" in note for note in given.notes)
    settings = yaml.safe_load((pretending[0].work / "settings" / "AMAT.paper.yaml").read_text())
    assert settings["delta"] == 1.5
    assert given.delta_scale == 3
    assert given.scale == 1


@pytest.mark.parametrize(("name", "epochs"), [("table1", 50), ("table2", 100), ("table3", 50)])
def test_the_papers_epochs(
    paper: Any, pretending: list[Any], raw: Path, tmp_path: Path, name: str, epochs: int
) -> None:
    options = paper.Options(raw, tmp_path / "work", "paper", "cpu", 1, False)
    given = paper.segmentation(options, paper.TABLES[name])
    assert (given.steps, given.delta_scale, given.notes) == (20, 1, ())
    for file in (pretending[0].work / "settings").glob("*.yaml"):
        assert yaml.safe_load(file.read_text())["epochs"] == epochs


def test_a_plan_with_more_stages_gets_as_many_features(
    paper: Any, pretending: list[Any], raw: Path, tmp_path: Path
) -> None:
    features = paper.hippocampus.features_for
    assert features((12, 24, 48, 96), 4) == [12, 24, 48, 96]
    assert features((12, 24, 48, 96), 7) == [12, 24, 48, 96, 192, 192, 192]
    assert features((12, 24, 48, 96), 3) == [12, 24, 48]
    options = paper.Options(raw, tmp_path / "work", "cpu", "cpu", 1, False)
    paper.segmentation(options, paper.TABLES["table1"])
    folder = pretending[0].folders["nnUNet_preprocessed"] / "Dataset002_Heart"
    made = json.loads((folder / "nnUNetPlans_cpu.json").read_text())["configurations"]["2d"]
    assert made["architecture"]["arch_kwargs"]["features_per_stage"] == [12, 24, 48, 96, 192, 192, 192]


def test_a_folder_of_nnunet_keeps_its_settings(paper: Any, pretending: list[Any], raw: Path, tmp_path: Path) -> None:
    own = paper.hippocampus
    preset = own.PRESETS["cpu"]

    def bench(**other: Any) -> Any:
        return own.Benchmark(replace(preset, **other), raw, tmp_path / "work", "cpu", 1)

    bench().train_all()
    again = bench()
    again.train_all()
    assert again.called == []
    shutil.move(tmp_path / "work", tmp_path / "moved")
    moved = own.Benchmark(preset, raw, tmp_path / "moved", "cpu", 1)
    moved.train_all()
    assert moved.called == []
    shutil.move(tmp_path / "moved", tmp_path / "work")
    with pytest.raises(SystemExit, match=r"seed is 1, and was 0.*take another --work"):
        bench(standard=preset.standard | {"seed": 1}).train_all()
    with pytest.raises(SystemExit, match=r"steps is 5, and was 10.*take another --work"):
        bench(adversarial=preset.adversarial | {"steps": 5}).train_all()
    with pytest.raises(SystemExit, match=r"another splits_final.json.*take another --work"):
        bench(training_cases=2).train_all()
    with pytest.raises(SystemExit, match=r"another nnUNetPlans_cpu.json.*take another --work"):
        bench(batch_size=3).train_all()
    (tmp_path / "work" / "settings" / "thresholds_mean.json").write_text('{"source_sha256": "another"}')
    with pytest.raises(SystemExit, match=r"of another network.*take another --work"):
        bench().train_all()


# YOLO


@pytest.fixture
def cells(paper: Any, tmp_path: Path) -> Callable[..., Any]:
    """Makes a benchmark of blood cells in one working folder, its command pretended."""
    data = tmp_path / "cells"
    (data / "images").mkdir(parents=True)
    (data / "bccd.yaml").write_text("names: [RBC]")

    def make(preset: str = "cpu", model: str = "yolov8n.yaml", seed: int = 0) -> Any:
        bench = paper.bccd.Benchmark(preset, data, tmp_path / "work", model, "cpu", 1, seed)
        (bench.work / "logs").mkdir(parents=True, exist_ok=True)
        bench.called = []
        bench.killed = False

        def command(log: str, words: list[str]) -> None:
            bench.called.append((log, words))
            file = bench.checkpoint(log.removeprefix("train_"))
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"epoch": -1, "train_args": {"epochs": 50}}, file)
            if bench.killed:
                raise KeyboardInterrupt

        bench.command = command
        return bench

    return make


def test_a_folder_of_yolo_keeps_its_command(cells: Callable[..., Any]) -> None:
    arguments = ("epochs=50", "lr0=0.002")
    cells().train("STD", "yolov8n.yaml", arguments)
    again = cells()
    again.train("STD", "yolov8n.yaml", arguments)
    assert again.called == []
    for other, model, words, said in (
        (cells(seed=1), "yolov8n.yaml", arguments, "seed is 1, and was 0"),
        (cells(), "yolov5n.yaml", arguments, "model is yolov5n.yaml, and was yolov8n.yaml"),
        (cells(), "yolov8n.yaml", ("epochs=51", "lr0=0.002"), "epochs is 51, and was 50"),
    ):
        with pytest.raises(SystemExit, match=f"{said}.*take another --work"):
            other.train("STD", model, words)


def test_a_yolo_training_killed_after_its_end_is_done(cells: Callable[..., Any]) -> None:
    """Ultralytics refuses to resume what has ended; one that has not is resumed."""
    bench = cells()
    bench.killed = True
    with pytest.raises(KeyboardInterrupt):
        bench.train("STD", "yolov8n.yaml", ("epochs=50",))
    again = cells()
    again.train("STD", "yolov8n.yaml", ("epochs=50",))
    assert again.called == []
    done = again.work / "logs" / "STD.done"
    for epoch, resumed in ((48, True), (49, False)):  # 49 is the last: killed before the host had stripped the file
        done.unlink()
        torch.save({"epoch": epoch, "train_args": {"epochs": 50}}, again.checkpoint("STD"))
        again.called.clear()
        again.train("STD", "yolov8n.yaml", ("epochs=50",))
        assert [words[2] for _, words in again.called] == ["resume"] * resumed
    with pytest.raises(SystemExit, match="take another --work"):
        cells(seed=1).train("STD", "yolov8n.yaml", ("epochs=50",))


def test_a_yolo_training_with_an_empty_marker_is_known_by_what_the_host_wrote(cells: Callable[..., Any]) -> None:
    bench, arguments = cells(), ("epochs=50", "method=sat", "eps=0.4")
    bench.command("train_SAT1", [])
    bench.called.clear()
    (bench.work / "logs" / "SAT1.done").touch()
    host = {"model": "/elsewhere/yolov8n.yaml", "epochs": 50, "seed": 0, "imgsz": 128, "data": "/elsewhere/bccd.yaml"}
    (bench.folder("SAT1") / "args.yaml").write_text(yaml.safe_dump(host))
    (bench.folder("SAT1") / "adversarial.yaml").write_text("# method: SAT\neps: 0.4\n")
    with pytest.raises(SystemExit, match=r"eps is 4, and was 0.4"):
        bench.train("SAT1", "yolov8n.yaml", ("epochs=50", "method=sat", "eps=4"))
    with pytest.raises(SystemExit, match="method is amat, and was sat"):
        bench.train("SAT1", "yolov8n.yaml", ("epochs=50", "method=amat", "eps=0.4"))
    bench.train("SAT1", "yolov8n.yaml", arguments)
    assert bench.called == []
    assert "eps=0.4\n" in (bench.work / "logs" / "SAT1.done").read_text()


def test_the_papers_batch_is_given_once(paper: Any, cells: Callable[..., Any]) -> None:
    bench = cells("paper")
    bench.train("STD", "yolov5s.yaml", bench.preset.standard)
    words = bench.called[0][1]
    assert [word for word in words if word.startswith("batch=")] == ["batch=32"]
    assert {"epochs=300", "optimizer=SGD", "lr0=0.01", "imgsz=320"} < set(words)


def test_the_clock_of_a_resumed_yolo_run_begins_anew(paper: Any, tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text("epoch,time\n1,10\n2,21\n3,9\n4,20\n")
    assert paper.bccd.epoch_seconds(tmp_path / "results.csv") == 10.5


# Landmarks


def test_the_folder_decides_how_landmarks_are_read(paper: Any, tmp_path: Path) -> None:
    from adv_landmark import ISBI2015

    table, original = tmp_path / "table", tmp_path / "isbi"
    (table / "images").mkdir(parents=True)
    Image.new("L", (8, 6)).save(table / "images" / "a.png")
    (table / "landmarks.csv").touch()
    reader = paper.landmark.reader
    (table / "split.csv").write_text("image,split\na,train\n")
    with pytest.raises(SystemExit, match="no pixel spacing"):
        reader(table, None)
    assert reader(table, 0.2)[1]["spacing"] == 0.2
    (table / "split.csv").write_text("image,split,spacing\na,train,0.3\n")
    assert "spacing" not in reader(table, None)[1]
    Image.new("L", paper.landmark.HAMEDAN).save(table / "images" / "a.png")
    (table / "split.csv").write_text("image,split\na,train\n")
    assert reader(table, None)[1]["spacing"] == 0.422

    for folder, name in (("RawImage/TrainingData", "001"), ("RawImage/Test1Data", "151")):
        (original / folder).mkdir(parents=True)
        Image.new("RGB", (12, 15)).save(original / folder / f"{name}.bmp")
        for annotator in ("400_senior", "400_junior"):
            (original / annotator).mkdir(exist_ok=True)
            (original / annotator / f"{name}.txt").write_text("3,2\n5,6\n")
    bench = paper.landmark.Landmark(tmp_path, ["vgg19"], [0], [], "cpu", 1, paper.landmark.PRESETS["full"], original)
    data = bench.content("vgg19", "STD", 0)["data"]
    assert data["class_path"] == "adv_landmark.data.ISBI2015"
    read = ISBI2015(**data["init_args"])
    assert (read.spacing, read.unit, read.size, read.channels) == ((0.1, 0.1), "mm", (200, 160), 3)
    with pytest.raises(SystemExit, match=r"neither landmarks.csv nor TrainingData"):
        reader(tmp_path / "nothing", None)


def test_a_folder_of_lightning_keeps_its_settings(paper: Any, tmp_path: Path) -> None:
    source = ROOT / "examples" / "data" / "hippocampus_landmarks"
    preset = paper.landmark.PRESETS["cpu"]

    def bench(**other: Any) -> Any:
        given = replace(preset, **other)
        made = paper.landmark.Landmark(tmp_path / "work", ["net"], [0], ["STD", "AMAT"], "cpu", 1, given, source, 1.0)
        (made.work / "logs").mkdir(parents=True, exist_ok=True)
        made.called = []

        def command(log: str, words: list[str]) -> None:
            made.called.append(log)
            if log.startswith("train_"):
                file = made.checkpoint(*log.removeprefix("train_").split("_")[:2], 0)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch()

        made.command = command
        return made

    def train(made: Any) -> list[str]:
        for method in ("STD", "AMAT"):
            made.train("net", method, 0)
            made.evaluate("net", method, 0)
        return list(made.called)

    assert len(train(bench())) == 4
    assert train(bench()) == []
    assert train(bench(evaluate=("--samples", "3"))) == ["evaluate_net_STD_0", "evaluate_net_AMAT_0"]
    with pytest.raises(SystemExit, match=r"trainer.max_epochs is 41, and was 40.*take another --work"):
        train(bench(epochs=41))
    with pytest.raises(SystemExit, match=r"model.lr is 0.1, and was 0.003.*take another --work"):
        train(bench(lr=0.1))

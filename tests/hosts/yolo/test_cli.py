"""``adv-yolo``: once as the installed command, otherwise in this process."""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ultralytics.utils import LOGGER, torch_utils

from adv_yolo import cli
from adv_yolo.cli import main
from adv_yolo.settings import argument_names
from adv_yolo.trainer import STATE
from advmed.thresholds import Thresholds

QUICK = ["epochs=2", "imgsz=64", "batch=4", "device=cpu", "workers=0", "plots=False", "amp=False", "warmup_epochs=0"]


@pytest.fixture
def said() -> Iterator[list[str]]:
    lines: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    listener = Listener()
    LOGGER.addHandler(listener)
    yield lines
    LOGGER.removeHandler(listener)


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must fail, and returns its one message."""

    def run(*words: Any) -> str:
        capsys.readouterr()
        assert main([str(word) for word in words]) == 1
        message = capsys.readouterr().err
        assert message.startswith("adv-yolo: ")
        assert "Traceback" not in message
        return message

    return run


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# The round that a user makes


COMMAND = Path(sys.executable).with_name("adv-yolo")


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    folder = tmp_path_factory.mktemp("command")

    def run(*words: Any, status: int = 0, processes: int = 1) -> str:
        torchrun = [str(COMMAND.with_name("torchrun")), "--nproc-per-node", str(processes), "--no-python"]
        start = [*(torchrun if processes > 1 else []), str(COMMAND)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        done = subprocess.run(
            [*start, *map(str, words)], capture_output=True, text=True, cwd=folder, env=environment, timeout=300
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


@pytest.mark.slow
def test_the_installed_command_trains_and_evaluates(
    command: Callable[..., str], tools: Any, data: Any, tmp_path: Path
) -> None:
    place = [f"project={tmp_path}", "name=a run"]  # a space is an argument's own business
    train = ["detect", "train", f"model={tools.ONE_HEAD}", f"data={data.yaml}", *QUICK, *place]
    text = command(*train, "method=amat", "delta=0.5", "steps=1", "mosaic=0.0")
    run = tmp_path / "a run"
    assert "thresholds are self-calibrated" in text
    with (run / "margins.csv").open() as file:
        assert {row["visits"] for row in csv.DictReader(file)} == {"1"}
    best = run / "weights" / "best.pt"
    # Two processes share the images, and find what one finds.
    words = ["evaluate", f"model={best}", f"data={data.yaml}", "levels=0,1", "attacks=pgd1", "checks=2", "batch=1"]
    words += ["device=cpu", "examples=1"]
    text = command(*words, f"out={tmp_path}/r", processes=2)
    assert text.count("Report: ") == 1
    assert "mAP50-95" in text
    assert "a run" in text
    assert len(list((tmp_path / "r" / "a run" / "parts").iterdir())) == 4
    assert main([*words, f"out={tmp_path}/one"]) == 0
    one, two = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "r"))
    for name in ("results", "checks", "failures", "verdict", "findings"):
        assert one[name] == two[name], name
    assert (tmp_path / "one" / "samples.csv").read_text() == (tmp_path / "r" / "samples.csv").read_text()


# Training


def interrupted(folder: Path, data: Any, tools: Any, method: str, *more: str) -> Path:
    """The last.pt of a run that a signal ended in its second epoch."""
    from adv_yolo.trainer import TRAINERS

    begin = TRAINERS[method].run_callbacks

    def stop(self: Any, event: str) -> None:
        begin(self, event)
        if event == "on_train_batch_end" and self.epoch == 2:
            raise KeyboardInterrupt

    words = [
        f"model={tools.ONE_HEAD}",
        f"data={data.yaml}",
        *QUICK,
        "epochs=4",
        f"project={folder}",
        "name=x",
        "steps=1",
    ]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TRAINERS[method], "run_callbacks", stop)
        main(["train", *words, f"method={method}", "steps=1", *more])
    return folder / "x" / "weights" / "last.pt"


@pytest.mark.parametrize(
    ("method", "own", "visits", "words"),
    [
        ("amat", "delta", "3", ["model={}", "resume=True"]),  # of four epochs one was clean
        ("amat", "delta", "3", ["resume={}"]),
        ("amat", "delta", "3", ["resume", "model={}", "method=amat"]),
        ("dpaat", "step_size", "4", ["model={}", "resume=True"]),
        ("dpaat", "step_size", "4", ["resume", "model={}", "method=dpaat"]),
    ],
)
def test_a_run_is_resumed_by_its_checkpoint(
    data: Any, tools: Any, tmp_path: Path, method: str, own: str, visits: str, words: list[str]
) -> None:
    last = interrupted(tmp_path, data, tools, method, f"{own}=0.25")
    state = getattr(torch.load(last, weights_only=False)["ema"], STATE)
    assert state["arguments"][own] == 0.25
    assert len(state["method"]["margins"]["ids"]) == 8
    assert main(["detect", "train", *(word.format(last) for word in words)]) == 0
    with (last.parents[1] / "margins.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["visits"] for row in rows} == {visits}
    assert {row["id"] for row in rows} == {f"images/{name}.jpg" for name in data.names("train")}


def test_a_run_is_not_resumed_with_another_method(
    data: Any, tools: Any, tmp_path: Path, fails: Callable[..., str]
) -> None:
    last = interrupted(tmp_path, data, tools, "sat", "eps=0.5")
    message = fails("detect", "train", f"model={last}", "resume=True", "method=amat")
    assert "is a run of method=sat, it cannot be resumed with method=amat" in message


@pytest.mark.parametrize("method", ["at", "SAT", "trades", "DPAAT"])
def test_methods_are_trained_by_name(data: Any, tools: Any, tmp_path: Path, method: str) -> None:
    words = [f"model={tools.ONE_HEAD}", f"data={data.yaml}", *QUICK, f"project={tmp_path}", "name=x", "epochs=1"]
    assert main(["train", *words, f"method={method}", "eps=0.5", "steps=1", "norm=inf"]) == 0
    text = (tmp_path / "x" / "adversarial.yaml").read_text()
    assert f"# method: {method.upper()}" in text
    assert "norm: .inf" in text


@pytest.mark.parametrize("method", [[], ["method=std"]])
def test_without_a_method_the_host_trains(data: Any, tools: Any, tmp_path: Path, method: list[str]) -> None:
    words = [f"model={tools.ONE_HEAD}", f"data={data.yaml}", *QUICK, f"project={tmp_path}", "name=x", "epochs=1"]
    assert main(["detect", "train", *words, *method]) == 0
    assert (tmp_path / "x" / "weights" / "best.pt").is_file()
    assert not (tmp_path / "x" / "adversarial.yaml").exists()
    assert "adv_" not in (tmp_path / "x" / "results.csv").read_text()


def test_arguments_may_come_from_the_hosts_file(data: Any, tools: Any, tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(f"model: {tools.ONE_HEAD}\ndata: {data.yaml}\nmethod: sat\neps: 0.5\nsteps: 1\nepochs: 3\n")
    words = [*QUICK, "epochs=1", f"project={tmp_path}", "name=x"]
    assert main(["train", f"cfg={file}", *words]) == 0
    assert "eps: 0.5" in (tmp_path / "x" / "adversarial.yaml").read_text()
    assert len((tmp_path / "x" / "results.csv").read_text().splitlines()) == 2


# Mistakes in training


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method=amat", "delt=3.5"], "delta"),
        (["method=amat", "epoch=3"], "epochs"),
        (["method=amat", "delta=0"], "delta must be a finite number > 0, got 0"),
        (["method=amat", "delta=-3"], "delta must be a finite number > 0"),
        (["method=amat", "delta=big"], "delta must be a number or null, got 'big'"),
        (["method=amat", "refinement=papers"], "refinement must be 'paper' or 'crossing'"),
        (["method=amta"], "method=amta is unknown; there are amat, sat, at, trades, dpaat and std"),
        (["delta=3.5", "steps=2"], "delta, steps: these arguments need method=, one of amat, sat"),
        (["method=std", "eps=3"], "eps: these arguments need method=, one of amat"),
        (["method=sat", "eps"], "'eps' is missing an '=' sign"),
        (["method=trades", "beta=0"], "beta must be a finite number > 0, got 0"),
        (["method=dpaat", "average=week"], "average must be 'batch' or 'epoch', got 'week'"),
        (["method=amat", "task=segment"], "not task=segment"),
        (["method=amat", "thresholds=no.json"], "thresholds=no.json: there is no such file"),
    ],
)
def test_mistakes_in_arguments_are_named(
    fails: Callable[..., str], data: Any, tools: Any, words: list[str], message: str
) -> None:
    text = fails("train", f"model={tools.ONE_HEAD}", f"data={data.yaml}", *QUICK, *words)
    assert message in text
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method=trades", "backward=sequential"], "TRADES compares the predictions of its two passes"),
        (["method=dpaat", "backward=sequential"], "DPAAT compares the predictions of its two passes"),
        (["method=dpaat", "eps=1", "eps_min=2"], "eps_min <= eps <= eps_max, got eps_min 2, eps 1, eps_max 2"),
    ],
)
def test_arguments_that_do_not_go_together_are_named(
    fails: Callable[..., str], data: Any, tools: Any, tmp_path: Path, words: list[str], message: str
) -> None:
    place = [f"project={tmp_path}", "name=x"]
    text = fails("train", f"model={tools.ONE_HEAD}", f"data={data.yaml}", *QUICK, *place, *words)
    assert message in text
    assert text.count("\n") == 1, "one line"
    assert not (tmp_path / "x" / "results.csv").exists()


def test_the_nearest_argument_is_suggested(fails: Callable[..., str], data: Any, tools: Any) -> None:
    given = ["train", f"model={tools.ONE_HEAD}", f"data={data.yaml}", "method=amat"]
    for wrong, right in (("delt", "delta"), ("stepscale", "step_scale"), ("treshold", "thresholds"), ("imgs", "imgsz")):
        text = fails(*given, f"{wrong}=1")
        assert f"'{wrong}' is not a valid" in text
        assert f"'{right}" in text.partition("Similar arguments")[2]


def test_model_and_data_are_asked_for(fails: Callable[..., str], data: Any, tools: Any) -> None:
    assert "train needs model=..." in fails("train", "method=sat", f"data={data.yaml}")
    assert "train needs data=..." in fails("train", "method=sat", f"model={tools.ONE_HEAD}")
    for name in ("thresholds", "evaluate"):
        assert f"{name} needs model=..." in fails(name, f"data={data.yaml}")
        assert f"{name} needs data=..." in fails(name, "model=x.pt")


def test_files_that_are_not_there_are_named(fails: Callable[..., str], data: Any, tools: Any, trained: Path) -> None:
    assert "no/such.yaml" in fails("train", "method=sat", f"model={tools.ONE_HEAD}", "data=no/such.yaml", *QUICK)
    assert "nothing.yaml" in fails("train", "method=sat", "model=nothing.yaml", f"data={data.yaml}", *QUICK)
    assert "there is no data set file no/such.yaml" in fails("thresholds", f"model={trained}", "data=no/such.yaml")
    for name in ("thresholds", "evaluate"):
        assert "nothing.pt" in fails(name, "model=no/nothing.pt", f"data={data.yaml}")


def test_thresholds_of_another_family_are_refused(
    fails: Callable[..., str], data: Any, networks: Any, tools: Any, tmp_path: Path
) -> None:
    other = tools.save(networks("yolo26n"), tmp_path / "other.pt")
    assert main(["thresholds", f"model={other}", f"data={data.yaml}", "batch=4", "device=cpu"]) == 0
    for source in (other.with_name("thresholds.json"), other):
        given = [f"model={tools.ONE_HEAD}", f"data={data.yaml}", *QUICK, "method=amat", f"thresholds={source}"]
        message = fails("train", *given)
        assert "l1_loss" in message
        assert "dfl_loss" in message


def test_debug_shows_where_a_mistake_was_noticed(data: Any, tools: Any) -> None:
    with pytest.raises(ValueError, match="delta"):
        main(["train", f"model={tools.ONE_HEAD}", f"data={data.yaml}", "method=amat", "delta=0", "--debug"])


# Thresholds


@pytest.mark.parametrize(("rule", "factor"), [(None, 2), ("mean", 0), ("mean+1.5std", 1.5)])
def test_thresholds_are_mean_and_deviation_of_the_clean_terms(
    trained: Path, data: Any, tmp_path: Path, rule: str | None, factor: float, tools: Any
) -> None:
    out = tmp_path / "t.json"
    words = [f"model={trained}", f"data={data.yaml}", "split=val", "batch=3", f"out={out}", "device=cpu"]
    assert main(["thresholds", *words, *([] if rule is None else [f"rule={rule}"])]) == 0
    found = Thresholds.load(out)
    assert found.n == 4
    assert found.names == ("box_loss", "cls_loss", "dfl_loss")
    assert (found.source, found.rule) == (str(trained), rule or "mean+2std")
    assert found.notes["imgsz"] == 96  # as the model was trained
    from ultralytics.nn.tasks import load_checkpoint

    model, _ = load_checkpoint(trained)
    model.args = tools.namespace(model.args)
    criterion, whole = model.init_criterion(), tools.known_batch(data)
    rows = []
    with torch.no_grad():
        for i in range(4):
            alone = tools.one_image(whole, i)
            rows.append(criterion(model(alone["img"]), alone)[0].double())
    terms = torch.stack(rows)
    wanted = terms.mean(0) + factor * terms.std(0, correction=0)
    assert found.values == pytest.approx(wanted.tolist(), rel=1e-4)
    assert all(map(math.isfinite, found.values))


def test_mistakes_in_thresholds_are_named(fails: Callable[..., str], trained: Path, data: Any, make_data: Any) -> None:
    given = ["thresholds", f"model={trained}", f"data={data.yaml}"]
    assert "must be 'mean' or 'mean+<number>std'" in fails(*given, "rule=median")
    assert "has no split 'test'" in fails(*given, "split=test")
    assert "['rule']" in fails(*given, "rul=mean")
    own = make_data()
    own.describe(["a", "b"])
    for name in own.names("train") + own.names("val"):
        own.write_labels(name, [[0, 0.5, 0.5, 0.2, 0.2]])
    message = fails("thresholds", f"model={trained}", f"data={own.yaml}", "device=cpu")
    assert "predicts 3 class(es)" in message
    assert "the data set has 2" in message


# Evaluation


@pytest.mark.usefixtures("undrawn")
def test_an_evaluation_is_not_repeated_and_another_one_is_told_apart(
    trained: Path, data: Any, tmp_path: Path, fails: Callable[..., str]
) -> None:
    given = [f"model={trained}", f"data={data.yaml}", "attacks=pgd1", "device=cpu", "batch=2", "checks=0"]
    given += [f"out={tmp_path / 'r'}"]
    assert main(["evaluate", *given, "levels=0,1", "examples=1"]) == 0
    parts = sorted((tmp_path / "r" / "run" / "parts").iterdir())
    times = [part.stat().st_mtime_ns for part in parts]
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    assert main(["evaluate", *given, "levels=0,1", "examples=1"]) == 0
    assert [part.stat().st_mtime_ns for part in parts] == times
    again = json.loads((tmp_path / "r" / "report.json").read_text())
    assert {**again, "created": None} == {**report, "created": None}
    assert "another configuration" in fails("evaluate", *given, "levels=0,2")
    assert main(["evaluate", *given, "levels=0,2", "overwrite=True"]) == 0


@pytest.mark.usefixtures("undrawn")
def test_default_levels_grow_with_the_image(trained: Path, data: Any, tmp_path: Path) -> None:
    given = [
        f"model={trained}",
        f"data={data.yaml}",
        "attacks=pgd1",
        "device=cpu",
        "examples=1",
        "samples=1",
        "checks=0",
    ]
    assert main(["evaluate", *given, f"out={tmp_path / 'two'}"]) == 0
    assert main(["evaluate", *given, f"out={tmp_path / 'inf'}", "norm=inf"]) == 0
    two, inf = ((tmp_path / name / "table.csv").read_text() for name in ("two", "inf"))
    for level in ("1.5", "3", "4.5"):  # 5, 10 and 15 for 320 pixels
        assert level in two
    for level in (2, 4, 8):
        assert f"{level / 255:.6f}" in inf


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["attacks=cw10"], "cw10"),
        (["levels=0,-1"], "level"),
        (["names=A,B"], "1 models need 1 different names"),
        (["split=test"], "has no split 'test'"),
        (["lvels=0,1"], "Similar arguments are i.e. ['levels'"),
        (["norm=1"], "norm"),
        (["samples=0"], "samples must be a whole number >= 1, got 0"),
        (["samples=2.5"], "samples must be a whole number >= 1, got 2.5"),
        (["examples=-1"], "examples must be a whole number >= 0, got -1"),
        (["examples=few"], "examples must be a whole number >= 0, got 'few'"),
        (["checks=-1"], "checks must be a whole number >= 0, got -1"),
        (["checks=1.5"], "checks must be a whole number >= 0, got 1.5"),
        (["checks=True"], "checks must be a whole number >= 0, got True"),
    ],
)
def test_mistakes_in_an_evaluation_are_named(
    fails: Callable[..., str], trained: Path, data: Any, words: list[str], message: str
) -> None:
    assert message in fails("evaluate", f"model={trained}", f"data={data.yaml}", "device=cpu", *words)


def test_every_process_takes_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {"": "cuda:0", "0,1": "cuda:0", "cpu": "cpu"}
    monkeypatch.setattr(torch_utils, "select_device", lambda name, **_: torch.device(chosen[name]))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    def device(**found: str) -> str:
        return str(cli._device(found, {}))

    assert [device(), device(device="0,1"), device(device="cpu")] == ["cuda:0", "cuda:0", "cpu"]
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [device(), device(device="0,1"), device(device="cpu")] == ["cuda:1", "cuda:1", "cpu"]


def test_models_of_the_same_name_are_told_apart(fails: Callable[..., str], trained: Path, data: Any) -> None:
    assert "2 models need 2 different names" in fails("evaluate", f"model={trained},{trained}", f"data={data.yaml}")


@pytest.mark.usefixtures("undrawn")
def test_a_model_of_a_single_class_is_evaluated_as_it_was_trained(data: Any, tools: Any, tmp_path: Path) -> None:
    words = [f"model={tools.ONE_HEAD}", f"data={data.yaml}", *QUICK, f"project={tmp_path}", "name=x", "epochs=1"]
    assert main(["train", *words, "single_cls=True"]) == 0
    given = [f"model={tmp_path / 'x' / 'weights' / 'best.pt'}", f"data={data.yaml}", "single_cls=True", "device=cpu"]
    assert main(["thresholds", *given]) == 0
    assert (
        main(["evaluate", *given, "levels=0,1", "attacks=pgd1", "checks=0", "examples=1", f"out={tmp_path / 'r'}"]) == 0
    )


# The host's own commands


def test_other_commands_are_the_hosts(trained: Path, data: Any, tmp_path: Path, said: list[str]) -> None:
    common = [f"model={trained}", "imgsz=96", "device=cpu", f"project={tmp_path}"]
    assert main(["detect", "val", *common, f"data={data.yaml}", "plots=False", "workers=0", "name=v"]) == 0
    assert any(line.split()[:2] == ["all", "4"] for line in said)
    image = shutil.copy(data.folder / "images" / f"{data.names('val')[0]}.jpg", tmp_path / "one.jpg")
    assert main(["detect", "predict", *common, f"source={image}", "name=p", "save=True"]) == 0
    assert (tmp_path / "p" / "one.jpg").is_file()


def test_help_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["help"], ["--help"]):
        assert main(words) == 0
        text = capsys.readouterr().out
        for name in (*argument_names(), "method=amat", "adv-yolo thresholds", "adv-yolo evaluate", "yolo help"):
            assert name in text, name


def test_unknown_commands_fail_as_the_hosts_do(fails: Callable[..., str]) -> None:
    assert "'nonsense' is not a valid" in fails("nonsense")

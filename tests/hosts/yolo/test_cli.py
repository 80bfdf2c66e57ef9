"""``adv-yolo``: once as the installed command, otherwise in this process."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils import torch_utils

from adv_yolo import cli
from adv_yolo.cli import main
from adv_yolo.evaluate import DetectionEvaluation
from adv_yolo.settings import argument_names
from adv_yolo.trainer import STATE, TRAINERS
from advmed.thresholds import Thresholds
from helpers.detection import ONE_HEAD, TERMS, stock_terms
from helpers.hosts import Interrupted, mistake_of, table

QUICK = ["epochs=2", "imgsz=64", "batch=4", "device=cpu", "workers=0", "plots=False", "amp=False", "warmup_epochs=0"]
COMMAND = Path(sys.executable).with_name("adv-yolo")


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must fail, and returns its one message."""

    def run(*words: Any) -> str:
        message = mistake_of(main, capsys, *words)
        assert message.startswith("adv-yolo: ")
        return message

    return run


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def train(data: Any) -> list[str]:
    """A short training in the folder x."""
    return ["train", f"model={ONE_HEAD}", f"data={data.yaml}", *QUICK, f"project={Path.cwd()}", "name=x"]


@pytest.fixture
def own(trained: Path, data: Any) -> list[str]:
    """What our own commands are given."""
    return [f"model={trained}", f"data={data.yaml}", "device=cpu", "batch=2"]


@pytest.mark.slow
def test_the_installed_command_trains_and_evaluates(train: list[str], data: Any, tmp_path: Path) -> None:
    def command(*words: Any, processes: int = 1) -> str:
        torchrun = [str(COMMAND.with_name("torchrun")), "--nproc-per-node", str(processes), "--no-python"]
        start = [*(torchrun if processes > 1 else []), str(COMMAND), *map(str, words)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        done = subprocess.run(start, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    # (A space is an argument's own business.)
    text = command("detect", *train, "name=a run", "method=amat", "delta=0.5", "steps=1", "mosaic=0.0")
    run = tmp_path / "a run"
    assert "thresholds are self-calibrated" in text
    assert {row["visits"] for row in table(run / "margins.csv")} == {"1"}
    # Two processes share the images, and find what one finds.
    words = ["evaluate", f"model={run / 'weights' / 'best.pt'}", f"data={data.yaml}", "levels=0,1", "attacks=pgd1"]
    words += ["checks=0", "batch=1", "device=cpu", "examples=1"]
    text = command(*words, f"out={tmp_path}/r", processes=2)
    assert text.count("Report: ") == 1
    assert "mAP50-95" in text
    assert "a run" in text
    assert len(list((tmp_path / "r" / "a run" / "parts").iterdir())) == 4
    assert main([*words, f"out={tmp_path}/one"]) == 0
    one, two = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "r"))
    for name in ("results", "failures", "findings"):
        assert one[name] == two[name], name
    assert (tmp_path / "one" / "samples.csv").read_text() == (tmp_path / "r" / "samples.csv").read_text()


@pytest.mark.slow
def test_a_run_is_resumed_by_its_checkpoint_and_not_with_another_method(
    train: list[str], data: Any, fails: Callable[..., str]
) -> None:
    begin = TRAINERS["dpaat"].run_callbacks

    def stop(self: Any, event: str) -> None:
        begin(self, event)
        if event == "on_train_batch_end" and self.epoch == 2:
            raise Interrupted

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(TRAINERS["dpaat"], "run_callbacks", stop)
        main([*train, "epochs=4", "steps=1", "method=DPAAT", "step_size=0.25"])
    last = Path("x/weights/last.pt").absolute()
    state = getattr(torch.load(last, weights_only=False)["ema"], STATE)
    assert state["arguments"]["step_size"] == 0.25
    assert len(state["method"]["margins"]["ids"]) == 8
    message = fails("detect", "train", f"model={last}", "resume=True", "method=sat")
    assert "is a run of method=dpaat, it cannot be resumed with method=sat" in message
    shutil.copytree("x", "kept")
    for words in (["model={}", "resume=True"], ["resume={}"], ["resume", "model={}", "method=dpaat"]):
        shutil.rmtree("x")  # as it was when the run ended
        shutil.copytree("kept", "x")
        assert main(["detect", "train", *(word.format(last) for word in words)]) == 0
        visits = {row["id"]: row["visits"] for row in table(Path("x/margins.csv"))}
        assert visits == dict.fromkeys(data.ids("train"), "4")


@pytest.mark.parametrize("method", [[], ["method=std"]])
def test_without_a_method_the_host_trains(train: list[str], method: list[str]) -> None:
    assert main(["detect", *train, "epochs=1", *method]) == 0
    assert Path("x/weights/best.pt").is_file()
    assert not Path("x/adversarial.yaml").exists()
    assert "adv_" not in Path("x/results.csv").read_text()


def test_arguments_may_come_from_the_hosts_file(train: list[str]) -> None:
    """What is typed wins."""
    Path("own.yaml").write_text("method: SAT\neps: 0.5\nsteps: 1\nepochs: 3\n")
    assert main([*train, "cfg=own.yaml", "epochs=1", "norm=inf"]) == 0
    text = Path("x/adversarial.yaml").read_text()
    for line in ("# method: SAT", "eps: 0.5", "norm: .inf"):
        assert line in text.splitlines()
    assert len(table(Path("x/results.csv"))) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method=amat", "epoch=3"], "epochs"),
        (["method=amat", "delta=0"], "delta must be a finite number > 0, got 0"),
        (["method=amta"], "method=amta is unknown; there are amat, sat, at, trades, dpaat, fat and std"),
        (["delta=3.5", "steps=2"], "delta, steps: these arguments need method=, one of amat, sat"),
        (["method=std", "eps=3"], "eps: these arguments need method=, one of amat"),
        (["method=sat", "eps"], "'eps' is missing an '=' sign"),
        (["method=sat", "data=no/such.yaml"], "no/such.yaml"),
        (["method=sat", "model=nothing.yaml"], "nothing.yaml"),
        *(
            (["method=amat", f"{wrong}=1"], f"'{wrong}' is not a valid .*Similar arguments.*'{right}")
            for wrong, right in (("delt", "delta"), ("stepscale", "step_scale"), ("treshold", "thresholds"))
        ),
    ],
)
def test_mistakes_in_arguments_are_named(
    fails: Callable[..., str], train: list[str], words: list[str], message: str
) -> None:
    assert re.search(message, fails(*train, *words), re.DOTALL)
    assert not Path("x/results.csv").exists()


def test_model_and_data_are_asked_for(fails: Callable[..., str], data: Any) -> None:
    assert "train needs data=..." in fails("train", "method=sat", f"model={ONE_HEAD}")
    for words in (["train", "method=sat"], ["thresholds"], ["evaluate"]):
        assert f"{words[0]} needs model=..." in fails(*words, f"data={data.yaml}")
    for name in ("thresholds", "evaluate"):
        assert f"{name} needs data=..." in fails(name, "model=x.pt")
        assert "nothing.pt" in fails(name, "model=no/nothing.pt", f"data={data.yaml}")


def test_debug_shows_where_a_mistake_was_noticed(train: list[str]) -> None:
    with pytest.raises(ValueError, match="delta"):
        main([*train, "method=amat", "delta=0", "--debug"])


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "factor"), [(None, 2), ("mean", 0), ("mean+1.5std", 1.5)])
def test_thresholds_are_mean_and_deviation_of_the_clean_terms(
    own: list[str], trained: Path, data: Any, tmp_path: Path, rule: str | None, factor: float
) -> None:
    """Beside the model, unless told otherwise."""
    path = shutil.copy(trained, tmp_path / "own.pt")
    words = ["split=val", "batch=3", *([f"model={path}"] if rule is None else [f"rule={rule}", "out=t.json"])]
    assert main(["thresholds", *own, *words]) == 0
    found = Thresholds.load(path.with_name("thresholds.json" if rule is None else "t.json"))
    assert (found.n, found.names) == (4, TERMS)
    assert (found.source, found.rule) == (str(path if rule is None else trained), rule or "mean+2std")
    assert found.notes["imgsz"] == 96  # as the model was trained
    with torch.no_grad():
        terms = stock_terms(load_checkpoint(trained)[0], data.known_batch()).double()
    wanted = terms.mean(0) + factor * terms.std(0, correction=0)
    assert found.values == pytest.approx(wanted.tolist(), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["thresholds", "rule=median"], "must be 'mean' or 'mean+<number>std'"),
        (["thresholds", "split=test"], "has no split 'test'"),
        (["thresholds", "rul=mean"], "['rule']"),
        (["thresholds", "data=no/such.yaml"], "there is no data set file no/such.yaml"),
        (["evaluate", "levels=0,-1"], "level"),
        (["evaluate", "names=A,B"], "1 models need 1 different names"),
        (["evaluate", "model={0},{0}"], "2 models need 2 different names"),
        (["evaluate", "split=test"], "has no split 'test'"),
        (["evaluate", "lvels=0,1"], "Similar arguments are i.e. ['levels'"),
        (["evaluate", "checks=True"], "checks must be a whole number >= 0, got True"),
    ],
)
def test_mistakes_in_our_own_commands_are_named(
    fails: Callable[..., str], own: list[str], trained: Path, words: list[str], message: str
) -> None:
    assert message in fails(words[0], *own, words[1].format(trained))


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_an_evaluation_is_not_repeated_and_another_one_is_told_apart(own: list[str], fails: Callable[..., str]) -> None:
    given = ["evaluate", *own, "attacks=pgd1", "checks=0", "examples=0", "out=r"]
    assert main([*given, "levels=0,1"]) == 0
    parts = sorted(Path("r/run/parts").iterdir())
    times = [part.stat().st_mtime_ns for part in parts]
    assert main([*given, "levels=0,1"]) == 0
    assert [part.stat().st_mtime_ns for part in parts] == times
    assert "another configuration" in fails(*given, "levels=0,2")
    assert main([*given, "levels=0,2", "overwrite=True"]) == 0


@pytest.mark.parametrize(("norm", "level"), [(2, [0, 1.5, 3, 4.5]), (math.inf, [0, 2 / 255, 4 / 255, 8 / 255])])
def test_default_levels_grow_with_the_image(tmp_path: Path, norm: float, level: list[float]) -> None:
    """In L2, from 5, 10 and 15 for 320 pixels."""
    cpu, arguments = torch.device("cpu"), {"imgsz": 96}
    host = DetectionEvaluation({}, {}, tmp_path, cpu, arguments, samples=None, folder=tmp_path)
    assert host.default_levels(norm) == pytest.approx(level, abs=1e-6)


def test_every_process_takes_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {"": "cuda:0", "0,1": "cuda:0", "cpu": "cpu"}
    monkeypatch.setattr(torch_utils, "select_device", lambda name, **_: torch.device(chosen[name]))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    def device(**found: str) -> str:
        return str(cli._device(found, {}))

    assert [device(), device(device="0,1"), device(device="cpu")] == ["cuda:0", "cuda:0", "cpu"]
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [device(), device(device="0,1"), device(device="cpu")] == ["cuda:1", "cuda:1", "cpu"]


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_model_of_a_single_class_is_evaluated_as_it_was_trained(train: list[str], data: Any) -> None:
    assert main([*train, "epochs=1", "single_cls=True"]) == 0
    given = ["model=x/weights/best.pt", f"data={data.yaml}", "single_cls=True", "device=cpu"]
    assert main(["thresholds", *given]) == 0
    assert main(["evaluate", *given, "levels=0,1", "attacks=pgd1", "checks=0", "examples=1", "out=r"]) == 0


@pytest.mark.slow
def test_other_commands_are_the_hosts(trained: Path, data: Any, said: list[str]) -> None:
    common = [f"model={trained}", "imgsz=96", "device=cpu", f"project={Path.cwd()}"]
    assert main(["detect", "val", *common, f"data={data.yaml}", "plots=False", "workers=0", "name=v"]) == 0
    assert any(line.split()[1:3] == ["all", "4"] for line in said)
    image = shutil.copy(data.folder / "images" / f"{data.names('val')[0]}.jpg", "one.jpg")
    assert main(["detect", "predict", *common, f"source={image}", "name=p", "save=True"]) == 0
    assert Path("p/one.jpg").is_file()


def test_help_names_everything(capsys: pytest.CaptureFixture[str], fails: Callable[..., str]) -> None:
    for words in ([], ["help"], ["--help"]):
        assert main(words) == 0
        text = capsys.readouterr().out
        for name in (*argument_names(), "method=amat", "adv-yolo thresholds", "adv-yolo evaluate", "yolo help"):
            assert name in text, name
    assert "'nonsense' is not a valid" in fails("nonsense")

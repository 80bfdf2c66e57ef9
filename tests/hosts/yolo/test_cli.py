"""``adv-yolo``: once as the installed command, otherwise in this process."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from torch import Tensor
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import DetectionModel, load_checkpoint
from ultralytics.utils import torch_utils

from adv_yolo import calibration, cli
from adv_yolo.checkpoint import STATE
from adv_yolo.cli import main
from adv_yolo.evaluate import DetectionEvaluation
from adv_yolo.settings import Settings
from advmed.thresholds import Thresholds
from helpers.detection import CLASSES, ONE_HEAD, QUIET, TERMS, of_image, one_image, save
from helpers.hosts import mistake_of, table
from helpers.pages import run

COMMAND = Path(sys.executable).with_name("adv-yolo")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def train(data: Any) -> list[str]:
    """A short training in the folder x."""
    quick = [f"{name}={value}" for name, value in QUIET.items()]
    return ["train", f"model={ONE_HEAD}", f"data={data.yaml}", *quick, f"project={Path.cwd()}", "name=x"]


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_trained_model_is_evaluated_in_two_processes_as_in_one(
    train: list[str], data: Any, tmp_path: Path, said: list[str]
) -> None:
    """By the installed command."""
    # (A space is an argument's own business.)
    assert main(["detect", *train, "name=a run", "method=amat", "delta=0.5", "steps=1", "mosaic=0.0"]) == 0
    model = tmp_path / "a run" / "weights" / "best.pt"
    assert any("thresholds are self-calibrated" in line for line in said)
    assert {row["visits"] for row in table(tmp_path / "a run" / "margins.csv")} == {"1"}
    words = ["evaluate", f"model={model}", f"data={data.yaml}", "levels=0,1", "attacks=pgd1", "checks=0", "batch=1"]
    words += ["device=cpu", "examples=1"]
    twice = ["torchrun", "--nproc-per-node", 2, "--no-python", COMMAND]
    text = run(tmp_path, *twice, *words, f"out={tmp_path}/two")
    assert text.count("Report: ") == 1
    assert "mAP50-95" in text
    assert "a run" in text
    assert main([*words, f"out={tmp_path}/one"]) == 0
    one, two = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two"))
    for name in ("results", "failures", "findings"):
        assert one[name] == two[name], name
    assert (tmp_path / "one" / "samples.csv").read_text() == (tmp_path / "two" / "samples.csv").read_text()
    parts = sorted((tmp_path / "two" / "a run" / "parts").iterdir())
    times = [part.stat().st_mtime_ns for part in parts]
    assert len(parts) == 4
    assert main([*words, f"out={tmp_path}/two"]) == 0
    assert [part.stat().st_mtime_ns for part in parts] == times, "what is measured is not measured again"


@pytest.mark.slow
def test_a_run_is_resumed_by_its_checkpoint_and_not_with_another_method(
    broken: Any, data: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    last = broken("dpaat", step_size=0.25)
    run = last.parents[1]
    state = getattr(torch.load(last, weights_only=False)["ema"], STATE)
    assert state["arguments"]["step_size"] == 0.25
    assert len(state["method"]["margins"]["ids"]) == 8
    message = mistake_of(main, capsys, "detect", "train", f"model={last}", "resume=True", "method=sat")
    assert "is a run of method=dpaat, it cannot be resumed with method=sat" in message
    shutil.copytree(run, "kept")
    for words in (["model={}", "resume=True"], ["resume={}"], ["resume", "model={}", "method=dpaat"]):
        shutil.rmtree(run)  # as it was when the run ended
        shutil.copytree("kept", run)
        assert main(["detect", "train", *(word.format(last) for word in words)]) == 0
        visits = {row["id"]: row["visits"] for row in table(run / "margins.csv")}
        assert visits == dict.fromkeys(data.ids("train"), "4")


@pytest.mark.parametrize("moment", ["adv_yolo.trainer.strip_states", "ultralytics.engine.trainer.strip_optimizer"])
def test_a_run_killed_behind_its_last_epoch_is_completed(
    train: list[str], data: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The host takes it for finished; whoever would resume it is told so, and names and optimizer go."""
    with monkeypatch.context() as patch:
        patch.setattr(moment, lambda *_, **__: sys.exit("killed"))
        with pytest.raises(SystemExit, match="killed"):
            main(["detect", *train, "method=dpaat", "epochs=1", "save_period=1"])
    last, first = Path("x/weights/last.pt"), Path("x/weights/epoch0.pt")
    names = data.ids("train")

    def named() -> list[str]:
        return sorted(p.name for p in last.parent.iterdir() if any(n.encode() in p.read_bytes() for n in names))

    assert named() == ["best.pt", "epoch0.pt", "last.pt"]
    other = last.with_name("epoch7.pt")  # of another run, as in a folder of the user's
    checkpoint = torch.load(first, weights_only=False)
    torch.save({**checkpoint, "train_args": {**checkpoint["train_args"], "seed": 5}}, other)
    message = mistake_of(main, capsys, "detect", "train", "resume", f"model={last}")
    assert "is a finished DPAAT training, there is nothing to resume" in message
    assert named() == ["epoch7.pt"]
    other.unlink()
    assert named() == []
    for path in (last, last.with_name("best.pt")):
        _, checkpoint = load_checkpoint(path)
        assert checkpoint["optimizer"] is None
        assert checkpoint["train_args"]["time"] is None
        summary = checkpoint[STATE]
        assert (summary["method"], summary["attacked_epochs"], summary["epochs"]) == ("DPAAT", 1, 1)
    assert not hasattr(torch.load(first, weights_only=False)["ema"], STATE)
    assert "there is nothing to resume" in mistake_of(main, capsys, "detect", "train", "resume", f"model={last}")


@pytest.mark.parametrize("method", [[], ["method=std"]])
def test_without_a_method_the_host_trains(train: list[str], data: Any, method: list[str]) -> None:
    """Also where a path has a space."""
    shutil.copytree(data.folder, "my data")
    assert main(["detect", *train, f"data=my data/{data.yaml.name}", "name=an x", "epochs=1", *method]) == 0
    assert Path("an x/weights/best.pt").is_file()
    assert not Path("an x/adversarial.yaml").exists()
    assert "adv_" not in Path("an x/results.csv").read_text()


@pytest.mark.parametrize("kind", ["empty", "half", "bytes", "text", "list", "weights only"])
def test_a_damaged_checkpoint_is_named(capsys: pytest.CaptureFixture[str], data: Any, kind: str) -> None:
    model = save(DetectionModel(ONE_HEAD, nc=len(CLASSES), verbose=False), Path("best.pt"))
    whole, bad = model.read_bytes(), Path("bad.pt")
    half = len(whole) // 2
    spoilt = {"half": whole[:half], "text": b"hello " * 99, "bytes": whole[:half] + bytes(64) + whole[half + 64 :]}
    bad.write_bytes(spoilt.get(kind, b""))
    if kind in {"list", "weights only"}:
        torch.save([1, 2] if kind == "list" else {"layer": torch.zeros(2)}, bad)
    for words in (
        *(["evaluate", f"data={data.yaml}"], ["thresholds", f"data={data.yaml}"]),
        *(["train", "resume"], ["train", "method=sat", f"data={data.yaml}", f"project={Path.cwd()}"]),
    ):
        message = mistake_of(main, capsys, *words, "model=bad.pt", "device=cpu")
        assert re.search("bad.pt (is|references) .*(checkpoint|Ultralytics|written)", message, re.DOTALL), message


WITHOUT_A_NET = """
import socket, sys, threading
tried = []

def blocked(*given, **named):
    tried.append(repr(given))
    raise OSError("blocked")

socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = blocked
from adv_yolo.cli import main

data, model, *train = sys.argv[1:]
assert main(["detect", *train, "method=sat", "steps=1", "epochs=1", "plots=True"]) == 0
given = [f"model={model}", f"data={data}", "device=cpu"]
assert main(["thresholds", *given, "split=val", "out=t.json"]) == 0
assert main(["evaluate", *given, "levels=0,1", "attacks=pgd1", "checks=0", "examples=1"]) == 0
assert main(["detect", "val", *given, "workers=0", "imgsz=96"]) == 0
for thread in threading.enumerate():
    if thread is not threading.current_thread():
        thread.join(1)
print("tried:", tried)
"""


@pytest.mark.slow
def test_no_connection_is_tried(train: list[str], data: Any, trained: Path, tmp_path: Path) -> None:
    """By a user who has not forbidden any: no telemetry, no look for updates. (A font, once, unless there is one.)"""
    font = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    (tmp_path / "c" / "Ultralytics").mkdir(parents=True)
    shutil.copy(font, tmp_path / "c" / "Ultralytics" / "Arial.ttf")
    own = {k: v for k, v in os.environ.items() if not k.startswith("YOLO_")} | {"YOLO_CONFIG_DIR": str(tmp_path / "c")}
    command = [sys.executable, "-c", WITHOUT_A_NET, str(data.yaml), str(trained), *train]
    done = subprocess.run(command, capture_output=True, text=True, env=own, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tried: []" in done.stdout


def test_arguments_may_come_from_the_hosts_file(train: list[str]) -> None:
    """What is typed wins."""
    Path("own.yaml").write_text("method: SAT\neps: 0.5\nsteps: 1\nepochs: 3\n")
    assert main([*train, "cfg=own.yaml", "epochs=1", "norm=inf"]) == 0
    text = Path("x/adversarial.yaml").read_text()
    for line in ("# method: SAT", "eps: 0.5", "norm: .inf"):
        assert line in text.splitlines()
    assert len(table(Path("x/results.csv"))) == 1


TRAIN = ["train", f"model={ONE_HEAD}", "data={data}", "project={here}"]
THRESHOLDS, EVALUATE = ([name, "model={model}", "data={data}", "device=cpu"] for name in ("thresholds", "evaluate"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nonsense"], "'nonsense' is not a valid"),
        ([*TRAIN, "method=amat", "epoch=3"], "epochs"),
        ([*TRAIN, "method=amat", "delta=0"], "delta must be a finite number > 0, got 0"),
        ([*TRAIN, "method=amta"], "method=amta is unknown; there are amat, sat, at, trades, dpaat, fat and std"),
        ([*TRAIN, "delta=3.5", "steps=2"], "delta, steps: these arguments need method=, one of amat, sat"),
        ([*TRAIN, "method=std", "eps=3"], "eps: these arguments need method=, one of amat"),
        ([*TRAIN, "method=sat", "eps"], "'eps' is missing an '=' sign"),
        ([*TRAIN, "method=sat", "data=no/such.yaml"], "no/such.yaml"),
        ([*TRAIN, "method=sat", "model=nothing.yaml"], "nothing.yaml"),
        (
            [*TRAIN, "method=sat", "model=no/weights/best.pt"],
            "no model file no/weights/best.pt; name a trained",
        ),
        *(
            ([*TRAIN, "method=amat", f"{wrong}=1"], f"'{wrong}' is not a valid .*Similar arguments.*'{right}")
            for wrong, right in (("delt", "delta"), ("stepscale", "step_scale"), ("treshold", "thresholds"))
        ),
        (["train", "method=sat", "data={data}"], r"train needs model=\.\.\."),
        (["train", "method=sat", "model=x.yaml"], r"train needs data=\.\.\."),
        (["thresholds", "data={data}"], r"thresholds needs model=\.\.\."),
        (["evaluate", "model={model}"], r"evaluate needs data=\.\.\."),
        ([*THRESHOLDS, "model=no/nothing.pt"], "nothing.pt"),
        ([*EVALUATE, "model=no/nothing.pt"], "nothing.pt"),
        ([*THRESHOLDS, "rule=mode"], r"must be 'mean' or 'mean\+<number>std'"),
        ([*THRESHOLDS, "split=test"], "has no split 'test'"),
        ([*THRESHOLDS, "rul=mean"], r"\['rule'\]"),
        ([*THRESHOLDS, "data=no/such.yaml"], "there is no data set file no/such.yaml"),
        ([*EVALUATE, "levels=0,-1"], "level"),
        ([*EVALUATE, "model={model},{model}"], "2 models need 2 different names.* names=A,B"),
        ([*EVALUATE, "split=test"], "has no split 'test'"),
        ([*EVALUATE, "lvels=0,1"], r"Similar arguments are i.e. \['levels'"),
        ([*EVALUATE, "out=best.pt"], "reports are written to a folder, and best.pt is a file"),
        ([*EVALUATE, "imgsz=abc"], "'imgsz=abc' is not a valid image size"),
        ([*EVALUATE, "device=0"], "Invalid CUDA 'device=0' requested"),
        ([*THRESHOLDS, "out={here}"], r"is a folder; name a file \(out"),
        ([*THRESHOLDS, "out=no/such/t.json"], r"t.json cannot be written to .*/no/such \(No such file"),
        ([*TRAIN, "method=sat", "model=yolov8s-worldv2.yaml"], "with the head WorldDetect.*YOLO-World"),
        ([*TRAIN, "method=sat", "model=yoloe-11s.yaml"], "with the head YOLOEDetect"),
        *(
            (words, "no tune here.*advmed search.*search_yolo.yaml, which adv-yolo init writes")
            for words in (["detect", "tune"], ["mode=tune"])
        ),
        (["train", "resume"], r"train resume needs model=\.\.\., the last.pt of the run"),
        (["train", "resume", "model=no/last.pt"], "there is no model file no/last.pt"),
        (["train", "resume", "model={model}"], "best.pt is a finished training, there is nothing to resume"),
    ],
    ids=str,
)
def test_mistakes_are_named_before_anything_is_trained_or_measured(
    capsys: pytest.CaptureFixture[str], data: Any, words: list[str], message: str
) -> None:
    model = save(DetectionModel(ONE_HEAD, nc=len(CLASSES), verbose=False), Path("best.pt"))
    given = {"model": model, "data": data.yaml, "here": Path.cwd()}
    said = mistake_of(main, capsys, *(word.format(**given) for word in words))
    assert said.startswith("adv-yolo: ")
    assert re.search(message, said, re.DOTALL), said
    assert {path.name for path in Path().rglob("*") if path.is_file()} <= {"best.pt", "args.yaml"}


def test_a_model_that_lies_in_a_numbered_run_is_pointed_out(capsys: pytest.CaptureFixture[str], data: Any) -> None:
    """A second run of one name goes to a folder with a number, and so the first one can be empty."""
    save(DetectionModel(ONE_HEAD, nc=len(CLASSES), verbose=False), Path("runs/standard-2/weights/best.pt"))
    for words in ([*TRAIN, "method=sat"], EVALUATE, THRESHOLDS):
        words = [word for word in words if not word.startswith("model=")]
        given = [word.format(data=data.yaml, here=Path.cwd()) for word in words]
        said = mistake_of(main, capsys, *given, "model=runs/standard/weights/best.pt")
        assert "there is runs/standard-2/weights/best.pt, though" in said, said


def terms_in_training(path: Path, data: Any, arguments: dict[str, Any]) -> Tensor:
    """The stock loss of every validation image alone, from a pass over the batches of the host's own training."""
    given = {"model": str(path), "data": str(data.yaml), "device": "cpu", "workers": 0, "mosaic": 0.0, **arguments}
    trainer = DetectionTrainer(overrides={**given, "project": str(Path.cwd()), "name": "stock"})
    trainer.model, trainer.stride = load_checkpoint(path)[0].train(), 32
    trainer.model.args = trainer.args
    vars(trainer.model).pop("class_weights", None)  # a training does not take them over
    trainer.train_loader = trainer.get_dataloader(trainer.data["train"], batch_size=3, rank=-1)
    trainer.set_class_weights()
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    found = []
    for raw in trainer.get_dataloader(trainer.data["val"], batch_size=3, rank=-1, mode="train"):
        batch = trainer.preprocess_batch(raw)
        predictions, criterion = trainer.model(batch["img"]), trainer.model.init_criterion()
        for i in range(len(batch["img"])):
            found.append(criterion(of_image(predictions, i), one_image(batch, i))[0].detach())
    return torch.stack(found).double()


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "factor"), [(None, 2), ("mean", 0)])
def test_thresholds_are_mean_and_deviation_of_the_terms_that_a_training_sees(
    trained: Path, data: Any, tmp_path: Path, said: list[str], rule: str | None, factor: float
) -> None:
    """Beside the model, unless told otherwise. Its augmentation is the model's own, but for what is given."""
    path = shutil.copy(trained, tmp_path / "own.pt")
    words = [f"model={path}"] if rule is None else [f"model={trained}", f"rule={rule}", "out=t.json"]
    words += [f"data={data.yaml}", "split=val", "batch=3", "device=cpu", "scale=0.2", "seed=5", "box=3.0"]
    words.append("cls_pw=0.5")
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert main(["thresholds", *words]) == 0
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    found = Thresholds.load(path.with_name("thresholds.json" if rule is None else "t.json"))
    assert (found.n, found.names) == (4, TERMS)
    assert (found.source, found.rule) == (str(path if rule is None else trained), rule or "mean+2std")
    assert found.notes["imgsz"] == 96  # as the model was trained
    assert found.notes["images"] == 4
    assert (found.notes["augmentation"]["scale"], found.notes["augmentation"]["fliplr"]) == (0.2, 0.5)
    host = YOLO(str(trained)).val(data=str(data.yaml), rect=False, imgsz=96, device="cpu", workers=0, plots=False)
    assert found.notes["mAP50"] == pytest.approx(host.box.map50, abs=1e-4)
    assert any("mAP50 (plain images) of that network" in line for line in said)
    terms = terms_in_training(trained, data, {"imgsz": 96, "scale": 0.2, "box": 3.0, "cls_pw": 0.5})
    wanted = terms.mean(0) + factor * terms.std(0, correction=0)
    assert found.values == pytest.approx(wanted.tolist(), rel=1e-4)


@pytest.mark.parametrize(
    ("norm", "channels", "level"),
    [
        (2, 3, [0, 1.5, 3, 4.5]),
        (2, 12, [0, 3, 6, 9]),
        (2, 1, [0, 0.866025, 1.732051, 2.598076]),
        (math.inf, 12, [0, 2 / 255, 4 / 255, 8 / 255]),
    ],
)
def test_default_levels_grow_with_the_image(tmp_path: Path, norm: float, channels: int, level: list[float]) -> None:
    """In L2, from 5, 10 and 15 for 320 pixels in colours, as the default of eps does."""
    cpu, arguments = torch.device("cpu"), {"imgsz": 96}
    host = DetectionEvaluation({}, {"channels": channels}, tmp_path, cpu, arguments, samples=None, folder=tmp_path)
    assert host.default_levels(norm) == pytest.approx(level, abs=1e-6)
    if norm == 2:
        assert host.default_levels(norm)[2] == pytest.approx(Settings().resolved(channels, 96, 0).eps, abs=1e-4)


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
def test_a_model_of_a_single_class_is_measured_as_it_was_trained_and_not_if_it_was_not(
    train: list[str],
    data: Any,
    said: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert main([*train, "epochs=1", "single_cls=True"]) == 0
    given = ["model=x/weights/best.pt", f"data={data.yaml}", "single_cls=True", "device=cpu"]
    message = mistake_of(main, capsys, "thresholds", *given)
    assert "x/weights/best.pt detects next to nothing on the training images (mAP50 0.000, below 0.05)" in message
    assert not Path("x/weights/thresholds.json").exists()
    monkeypatch.setattr(calibration, "UNTRAINED", 0.0)
    assert main(["thresholds", *given]) == 0
    assert any("WARNING: this network is poorly trained" in line for line in said)
    assert main(["evaluate", *given, "levels=0,1", "attacks=pgd1", "checks=0", "examples=1", "out=r"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("own", [{"classes": 0}, {"single_cls": True}, {"imgsz": 70}], ids=str)
def test_thresholds_are_of_the_labels_and_the_size_that_the_model_was_trained_with(
    trained: Path,
    data: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    own: dict[str, Any],
) -> None:
    """Not of all classes, where it has learnt some; and of the size that the host's training rounds its own to."""
    if "single_cls" in own:
        monkeypatch.setattr(calibration, "UNTRAINED", 0.0)
    checkpoint = torch.load(trained, weights_only=False)
    if "single_cls" in own:
        model = DetectionModel(ONE_HEAD, nc=1, verbose=False)
        model.names = {0: "item"}
        checkpoint["model"] = model.half()
    checkpoint["model"].class_weights = torch.full((checkpoint["model"].model[-1].nc,), 9.0)
    blur = [{"transform": {"__class_fullname__": "Blur", "p": 0.0}}]
    checkpoint["train_args"] |= {**own, "augmentations": blur}
    torch.save(checkpoint, tmp_path / "own.pt")
    words = ["thresholds", "model=own.pt", f"data={data.yaml}", "split=val", "batch=3", "device=cpu", "seed=5"]
    assert main([*words, "rule=mean"]) == 0
    found = Thresholds.load(tmp_path / "thresholds.json")
    ((name, value),) = own.items()
    assert found.notes[name] == {"classes": [0], "imgsz": 96}.get(name, value)
    assert found.notes["augmentation"]["augmentations"] == blur
    terms = terms_in_training(tmp_path / "own.pt", data, {**own, "imgsz": 96})
    assert found.values == pytest.approx(terms.mean(0).tolist(), rel=1e-4)
    if "classes" in own:
        message = mistake_of(main, capsys, *words, "classes=0,1,2")
        assert (
            "own.pt was trained with classes=[0], single_cls=False, and is to be measured with classes=[0, 1, 2]"
            in message
        )


def test_models_that_were_trained_alike_are_compared(
    capsys: pytest.CaptureFixture[str], data: Any, tmp_path: Path
) -> None:
    for name, size in (("a", 64), ("b", 96)):
        save(DetectionModel(ONE_HEAD, nc=len(CLASSES), verbose=False), tmp_path / f"{name}.pt", size)
    message = mistake_of(main, capsys, "evaluate", "model=a.pt,b.pt", f"data={data.yaml}", "device=cpu")
    assert "different values of imgsz (a.pt: imgsz=64, b.pt: imgsz=96); say imgsz=" in message
    assert not Path("runs").exists()


@pytest.mark.slow
def test_other_commands_are_the_hosts(trained: Path, data: Any, said: list[str]) -> None:
    common = [f"model={trained}", "imgsz=96", "device=cpu", f"project={Path.cwd()}"]
    assert main(["detect", "val", *common, f"data={data.yaml}", "plots=False", "workers=0", "name=v"]) == 0
    assert any(line.split()[1:3] == ["all", "4"] for line in said)
    image = shutil.copy(data.folder / "images" / f"{data.names('val')[0]}.jpg", "one.jpg")
    assert main(["detect", "predict", *common, f"source={image}", "name=p", "save=True"]) == 0
    assert Path("p/one.jpg").is_file()

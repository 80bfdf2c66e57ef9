"""The function that runs every command: what it calls a mistake, what it says of one, and the exit status."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from advmed.cli.runner import run


def raising(error: BaseException) -> Any:
    def body(argv: list[str]) -> None:
        raise error

    return body


def compiled() -> SyntaxError:
    try:
        compile("def", "own.py", "exec")
    except SyntaxError as error:
        return error
    raise AssertionError


def test_the_words_and_the_exit_status_are_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    assert run("own", lambda argv: seen.append(argv) or 3, ["--debug", "one", "--two"]) == 3
    assert run("own", lambda argv: seen.append(argv), []) == 0
    monkeypatch.setattr(sys, "argv", ["own", "--debug", "three"])  # where none are given, those of the process
    assert run("own", lambda argv: seen.append(argv)) == 0
    assert seen == [["one", "--two"], [], ["three"]]
    assert sys.argv == ["own", "three"]  # for hosts that read them there


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (FileNotFoundError("there is no x"), "there is no x"),
        (ValueError("a value"), "a value"),
        (TypeError("a type"), "a type"),
        (RuntimeError("a run"), "a run"),
        (ImportError("a module"), "a module"),
        (argparse.ArgumentError(None, "an argument"), "an argument"),
        (AssertionError("an explained assertion"), "an explained assertion"),
        (SyntaxError("'x' is not a valid argument"), "'x' is not a valid argument"),
    ],
)
def test_a_mistake_is_one_message(error: Exception, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("own", raising(error), ["evaluate", "x"]) == 1
    assert capsys.readouterr() == ("", f"own: {text}\n")
    assert run("own", raising(error), ["evaluate", "x"], subcommands=("evaluate",)) == 1
    assert capsys.readouterr().err == f"own evaluate: {text}\n"
    with pytest.raises(type(error)):
        run("own", raising(error), ["evaluate", "--debug"])


@pytest.mark.parametrize("error", [KeyError("a bug"), AssertionError(), compiled(), IndexError("a bug")])
def test_a_bug_is_not_hidden(error: Exception) -> None:
    with pytest.raises(type(error)):
        run("own", raising(error), [])


def test_lightnings_error_is_known_once_lightning_is_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "lightning.fabric.utilities.exceptions"
    module = ModuleType(name)
    own = type("MisconfigurationException", (Exception,), {})
    module.MisconfigurationException = own  # type: ignore[attr-defined]  # a module made here
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(own):
        run("own", raising(own("no such accelerator")), [])
    monkeypatch.setitem(sys.modules, name, module)
    assert run("own", raising(own("no such accelerator")), []) == 1
    assert capsys.readouterr().err == "own: no such accelerator\n"


def test_the_mistake_itself_is_told_where_a_library_wraps_it(capsys: pytest.CaptureFixture[str]) -> None:
    outer = ValueError('Parser key "model.eps":\n  Does not validate against any of the Union subtypes')
    outer.__cause__ = ValueError("eps must be > 0")
    assert run("own", raising(outer), []) == 1
    assert capsys.readouterr().err == 'own: Parser key "model.eps": eps must be > 0\n'
    worker = "Caught ValueError in DataLoader worker process 0.\nTraceback ...\nValueError: 1.png is broken\n"
    assert run("own", raising(RuntimeError(worker)), []) == 1
    assert capsys.readouterr().err == "own: 1.png is broken\n"


def missing(name: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_a_missing_extra_is_named_and_another_module_told_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("adv-own", raising(missing("timm.layers")), [], extra="classify") == 1
    wanted = "adv-own needs timm, which is not installed: pip install 'advmed[classify]'\n"
    assert capsys.readouterr().err == wanted
    for extra, module in ((None, "ultralytics"), ("yolo", "advmed.nothing"), ("yolo", "adv_yolo.nothing")):
        assert run("own", raising(missing(module)), [], extra=extra) == 1
        assert capsys.readouterr().err == f"own: No module named {module!r}\n"


HIDE = """
import importlib, json, sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("lightning", "nnunetv2", "ultralytics"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
for module, words in json.loads(sys.argv[1]):
    assert importlib.import_module(module).main(words) == 1
"""


def test_a_command_whose_extra_is_not_installed_says_so(tmp_path: Path) -> None:
    calls = {
        "adv_yolo.cli": ["thresholds", "model=a.pt", "data=b.yaml"],
        "adv_nnunet.cli": ["evaluate", "-d", "4", "-c", "2d", "-o", "x"],
        "adv_classify.cli": ["fit"],
        "adv_landmark.cli": ["evaluate", "a.ckpt"],
    }
    words = [sys.executable, "-c", HIDE, json.dumps([*calls.items()])]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert (done.returncode, done.stdout) == (0, "")
    needs = {"yolo": "ultralytics", "nnunet": "nnunetv2", "classify": "lightning", "landmark": "lightning"}
    assert done.stderr.splitlines() == [
        f"adv-{extra} needs {package}, which is not installed: pip install 'advmed[{extra}]'"
        for extra, package in needs.items()
    ]


def test_a_reader_who_has_seen_enough_ends_a_command_quietly() -> None:
    code = (
        "import sys; from advmed.cli.runner import run\n"
        "sys.exit(run('own', lambda argv: [print('a line') for _ in range(100000)] and None))"
    )
    command = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert command.stdout is not None
    assert command.stdout.readline() == "a line\n"
    command.stdout.close()
    _, error = command.communicate(timeout=60)
    assert (command.returncode, error) == (1, "")

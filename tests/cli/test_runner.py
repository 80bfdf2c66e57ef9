"""The function that runs every command: what it calls a mistake, what it says of one, and the exit status."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
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


def test_the_words_and_the_exit_status_are_the_commands() -> None:
    seen: list[list[str]] = []

    def body(argv: list[str]) -> int:
        seen.append(argv)
        return 3

    assert run("own", body, ["--debug", "one", "--two"]) == 3
    assert run("own", lambda argv: seen.append(argv), []) == 0
    assert seen == [["one", "--two"], []]


def test_the_words_are_those_of_the_process_where_none_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["own", "--debug", "one"])
    seen: list[list[str]] = []
    assert run("own", lambda argv: seen.append(argv)) == 0
    assert seen == [["one"]]
    assert sys.argv == ["own", "one"]  # for hosts that read them there


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
    module.MisconfigurationException = own  # type: ignore[attr-defined]
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


@pytest.mark.parametrize(
    ("extra", "module", "package"),
    [
        ("yolo", "ultralytics.utils", "ultralytics"),
        ("nnunet", "nnunetv2", "nnunetv2"),
        ("classify", "timm.layers", "timm"),
        ("landmark", "segmentation_models_pytorch", "segmentation_models_pytorch"),
    ],
)
def test_a_missing_extra_is_named(extra: str, module: str, package: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("adv-own", raising(missing(module)), [], extra=extra) == 1
    wanted = f"adv-own needs {package}, which is not installed: pip install 'advmed[{extra}]'\n"
    assert capsys.readouterr().err == wanted


def test_a_missing_module_of_no_extra_is_told_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    for extra, module in ((None, "ultralytics"), ("yolo", "advmed.nothing"), ("yolo", "adv_yolo.nothing")):
        assert run("own", raising(missing(module)), [], extra=extra) == 1
        assert capsys.readouterr().err == f"own: No module named {module!r}\n"


def python(code: str, *, folder: Path, words: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=folder, timeout=300)


HIDE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden())
from {module} import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("module", "package", "words", "message"),
    [
        ("adv_yolo.cli", "ultralytics", ["thresholds", "model=a.pt", "data=b.yaml"], "adv-yolo needs ultralytics"),
        ("adv_nnunet.cli", "nnunetv2", ["evaluate", "-d", "4", "-c", "2d", "-o", "x"], "adv-nnunet needs nnunetv2"),
        ("adv_classify.cli", "lightning", ["fit"], "adv-classify needs lightning"),
        ("adv_landmark.cli", "lightning", ["evaluate", "a.ckpt"], "adv-landmark needs lightning"),
    ],
)
def test_a_command_whose_extra_is_not_installed_says_so(
    module: str, package: str, words: list[str], message: str, tmp_path: Path
) -> None:
    done = python(HIDE.format(package=package, module=module), folder=tmp_path, words=words)
    assert done.returncode == 1
    extra = module.partition(".")[0].removeprefix("adv_")
    assert done.stderr.strip() == f"{message}, which is not installed: pip install 'advmed[{extra}]'"
    assert done.stdout == ""


def test_a_reader_who_has_seen_enough_ends_a_command_quietly(tmp_path: Path) -> None:
    code = (
        "import sys; from advmed.cli.runner import run\n"
        "sys.exit(run('own', lambda argv: [print('a line') for _ in range(100000)] and None))"
    )
    done = subprocess.run(
        f'{sys.executable} -c "$CODE" 2> errors | head -n 1; echo ${{PIPESTATUS[0]}}',
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"CODE": code},
        timeout=60,
    )
    assert done.stdout == "a line\n1\n"
    assert (tmp_path / "errors").read_text() == ""

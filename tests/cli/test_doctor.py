"""``advmed doctor``: what stands on the page, and that what is broken is found; ``--print-completion`` beside it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from advmed.cli import doctor
from advmed.cli.main import main
from advmed.versions import newer_than_tested, ranges, tell_if_newer

Said = Callable[..., str]


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the processes answer, in the place of several seconds of imports: by what their code holds."""
    given: dict[str, Any] = {
        "importlib.import_module": lambda words: [f'["{name}", ""]' for name in words],
        "torch.cuda": lambda _: ['{"build": "2.14.1", "cuda": "none that PyTorch can use"}'],
        "nnUNet_extTrainer": lambda _: ["/site/adv_nnunet/trainers"],
        "recursive_find": lambda _: ["adv_nnunet.trainer"],
        "SETTINGS_FILE": lambda _: ['{"settings": "/tmp/settings.json", "runs_dir": "runs"}'],
    }

    def ask(code: str, *words: str, **_: Any) -> tuple[list[str], str]:
        (answer,) = [answer for part, answer in given.items() if part in code]
        found = answer(words)
        return ([], found) if isinstance(found, str) else (found, "")

    monkeypatch.setattr(doctor, "ask", ask)
    for host in ("adv_nnunet", "adv_yolo"):
        monkeypatch.setattr(f"{host}.doctor.ask", ask)
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "nnUNet_adversarial"):
        monkeypatch.delenv(name, raising=False)
    return given


def page(capsys: pytest.CaptureFixture[str], *, broken: bool) -> str:
    """The page, whose exit status must fit."""
    capsys.readouterr()
    assert main(["doctor"]) == int(broken)
    out = capsys.readouterr().out
    assert out.rstrip().splitlines()[-1] == ("Something is broken, see above." if broken else "Nothing is broken.")
    return out


def test_the_page_names_what_a_report_needs(answers: Any, capsys: pytest.CaptureFixture[str]) -> None:
    text = page(capsys, broken=False)
    for name, known in ranges().items():
        assert f"{known.package} " in text
        assert f"{version(name)} " in text and f"tested: {known.oldest} to {known.newest}" in text
    for name in ("scipy", "matplotlib", "jinja2", "pyyaml", "tqdm", "packaging", "lazy-loader", "shtab"):
        assert re.search(rf"^  {name} +{re.escape(version(name))} +(needed: >=|for completion)", text, re.MULTILINE), (
            name
        )
    assert re.search(r"^  documentation +\S*docs/index.md$", text, re.MULTILINE)
    for part in ("Python ", "platform ", "advmed[nnunet]    works", "advmed[yolo] ", "adv_nnunet.trainer", "none that"):
        assert part in text
    assert "nnUNet_raw " in text and "YOLO_CONFIG_DIR" in text and "runs_dir" in text


def test_the_home_folder_of_the_user_is_not_told(
    answers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    (tmp_path / "raw").mkdir()
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "raw"))
    text = page(capsys, broken=False)
    assert "~/raw" in text and str(tmp_path) not in text


@pytest.mark.parametrize(
    ("part", "answer", "said"),
    [
        ("importlib.import_module", "Killed", "the interpreter ended (Killed)"),
        (
            "importlib.import_module",
            lambda words: [f'["{name}", "{"RuntimeError: no nms" if "yolo" in name else ""}"]' for name in words],
            "advmed[yolo] cannot be imported: adv_yolo.evaluate: RuntimeError: no nms",
        ),
        ("recursive_find", "RuntimeError: not found", "nnUNetv2_train does not find our trainers (RuntimeError"),
        ("recursive_find", "KeyError: 'triton'", "(KeyError: 'triton'): Triton cannot be imported"),
        ("recursive_find", lambda _: ["theirs"], "nnUNetv2_train does not find our trainers first"),
    ],
)
def test_what_does_not_work_is_said(
    part: str, answer: Any, said: str, answers: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    answers[part] = (lambda _: answer) if isinstance(answer, str) else answer
    text = page(capsys, broken=True)
    assert said in text.split("\nBroken\n")[1]


@pytest.mark.parametrize("kind", ["missing", "file", "read-only"])
def test_a_folder_that_cannot_be_used_is_broken(
    kind: str, answers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "results"
    if kind == "file":
        place.write_text("")
    elif kind == "read-only":
        place.mkdir()
        writable = doctor._writable
        monkeypatch.setattr(doctor, "_writable", lambda folder: folder != place and writable(folder))  # root may write
    monkeypatch.setenv("nnUNet_results", str(place))
    text = page(capsys, broken=True)
    wrong = {"missing": "does not exist", "file": "is a file", "read-only": "cannot be written"}[kind]
    assert f"nnUNet_results names the folder {place}, which {wrong}" in text


def test_a_data_folder_that_is_only_read_may_be_read_only(
    answers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    writable = doctor._writable
    monkeypatch.setattr(doctor, "_writable", lambda folder: folder != tmp_path and writable(folder))
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    page(capsys, broken=False)


def test_a_settings_file_that_is_missing_is_broken(
    answers: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("nnUNet_adversarial", "/nowhere/adversarial.yaml")
    assert "settings file /nowhere/adversarial.yaml, which does not exist" in page(capsys, broken=True)


def with_versions(monkeypatch: pytest.MonkeyPatch, **changed: str | None) -> None:
    """Other versions, as if they were installed; None for a package that is not."""
    from advmed import versions

    real = versions.installed
    names = {name.replace("_", "-"): value for name, value in changed.items()}

    def installed(package: str) -> str | None:
        return names[package] if package in names else real(package)

    for module in (versions, doctor):
        monkeypatch.setattr(module, "installed", installed)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"torch": "2.14.1+cu130", "torchvision": "0.29.1+cpu"}, "are built for different devices"),
        ({"torch": "2.3.0"}, "advmed asks for torch>=2.4, got 2.3.0"),
        ({"torch": "2.9.0"}, "asks for torch"),  # nnU-Net's own requirement
        ({"jinja2": None}, "jinja2 is not installed: pip install advmed"),
    ],
)
def test_versions_that_do_not_fit_are_broken(
    changed: Any, said: str, answers: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_versions(monkeypatch, **changed)
    assert said in page(capsys, broken=True).split("\nBroken\n")[1]


def test_a_version_that_only_matters_elsewhere_is_a_note(
    answers: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_versions(monkeypatch, setuptools="1.0")
    asked = doctor.requires
    monkeypatch.setattr(doctor, "requires", lambda name: ["setuptools>=70"] if name == "torch" else asked(name))
    assert "asks for setuptools>=70, got 1.0" in page(capsys, broken=False).split("\nTo know\n")[1]


def test_a_host_that_is_missing_is_no_fault(
    answers: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_versions(monkeypatch, nnunetv2=None, ultralytics=None)
    text = page(capsys, broken=False)
    assert "advmed[yolo]      not installed" in text and "nnUNet_raw" not in text


def test_an_extra_that_came_in_part_with_another_host_is_no_fault(
    answers: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """pip install advmed[nnunet]: nnU-Net brings timm, which the classifiers need as well."""
    none = {"lightning": None, "segmentation-models-pytorch": None, "ultralytics": None, "torchattacks": None}
    with_versions(monkeypatch, **none)
    answers["importlib.import_module"] = lambda words: [
        f'["{name}", "{"" if name.startswith(("advmed", "adv_nnunet")) else "No module named lightning"}"]'
        for name in words
    ]
    text = page(capsys, broken=False)
    assert "advmed[classify]  not installed, without lightning\n" in text
    assert "advmed[landmark]  not installed, without lightning and segmentation-models-pytorch\n" in text
    assert "advmed[nnunet]    works" in text
    assert "pip install" not in text


def test_a_newer_host_is_pointed_out(
    answers: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_versions(monkeypatch, ultralytics="99.0.0")
    text = page(capsys, broken=False)
    assert "99.0.0 (newer)" in text
    assert "ultralytics 99.0.0 is newer than" in text.split("\nTo know\n")[1]


@pytest.mark.parametrize(
    ("installed", "newer"), [("{newest}", 0), ("{newest}+cpu", 0), ("{newest}.post1", 1), ("x", 0)]
)
def test_newer_is_what_no_test_has_seen(installed: str, newer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with_versions(monkeypatch, timm=installed.format(newest=ranges()["timm"].newest))
    assert len(newer_than_tested(["timm", "a-stranger"])) == newer


def test_a_newer_host_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("advmed.versions._told", set())
    with_versions(monkeypatch, ultralytics="99.0.0")
    said: list[str] = []
    for _ in range(2):
        tell_if_newer(("ultralytics", "timm"), said.append)
    (line,) = said
    assert f"install ultralytics=={ranges()['ultralytics'].newest}" in line


def test_the_processes_are_real(tmp_path: Path) -> None:
    """What the tests above have in place of several imports, once: nothing of the network, no folder of the caller."""
    (tmp_path / "json.py").write_text("raise SystemExit('taken from the working folder')")
    code = "import os, sys; print(os.environ['YOLO_OFFLINE'], sys.flags.safe_path)"
    look = f"from advmed.cli.doctor import ask; print(ask({code!r}), ask('import os; os.abort()')[1] != '')"
    done = subprocess.run([sys.executable, "-P", "-c", look], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(['true True'], '') True"


@pytest.mark.slow
def test_the_whole_page_is_printed_in_a_process_of_its_own(tmp_path: Path) -> None:
    environment = {**os.environ, "YOLO_CONFIG_DIR": str(tmp_path)}
    command = [sys.executable, "-c", "import sys; from advmed.cli.main import main; sys.exit(main(['doctor']))"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("works") == 5
    assert "adv_nnunet.trainer" in done.stdout and str(tmp_path) in done.stdout


# Completion


LIGHTNING = ["init", "fit", "thresholds", "evaluate", "--model.method.delta", "--trainer.max_epochs", "--attacks"]


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("advmed.cli.main", ["compare", "doctor", "--metric"]),
        ("adv_nnunet.cli", ["evaluate", "-tr"]),
        ("adv_classify.cli", [*LIGHTNING, "--data.root", "--gradcam"]),
        ("adv_landmark.cli", [*LIGHTNING, "--data.spacing", "--model.network.encoder"]),
    ],
)
def test_completion_knows_the_subcommands_and_their_options(
    module: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """In a script that a shell reads at once, and is one."""
    with pytest.raises(SystemExit) as end:
        import_module(module).main(["--print-completion", "bash"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    known = set(re.findall(r"[\w.-]+", out))
    assert set(words) <= known
    assert len(out) < 100_000
    subprocess.run(["bash", "-n"], input=out, text=True, check=True)


def test_completion_of_another_shell_is_told_from_those_that_are_known(capsys: pytest.CaptureFixture[str]) -> None:
    from adv_classify.cli import main as classify

    with pytest.raises(SystemExit):
        classify(["--print-completion", "abacus"])
    assert "there are bash" in capsys.readouterr().err


def test_completion_without_shtab_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["--print-completion", "bash"]) == 1
    assert "pip install shtab" in capsys.readouterr().err

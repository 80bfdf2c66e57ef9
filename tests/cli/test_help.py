"""Help is answered at once: nothing heavy is imported for it, by our packages neither, and it names every option."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from advmed.cli.options import EVALUATE, THRESHOLDS

HEAVY = ("torch", "numpy", "matplotlib", "lightning", "timm", "ultralytics", "nnunetv2", "optuna")
CODE = """
import contextlib, importlib, io, json, sys
answers = []
for module, *words in json.loads(sys.argv[1]):
    out, status = io.StringIO(), 0
    with contextlib.redirect_stdout(out):
        try:
            status = importlib.import_module(module).main(words)
        except SystemExit as end:  # argparse ends the process
            status = end.code
    answers.append({"status": status, "out": out.getvalue(), "modules": list(sys.modules)})
print(json.dumps(answers))
"""
HOSTS = ("adv_nnunet", "adv_yolo", "adv_classify", "adv_landmark")
LIGHTNING = ("adv_classify", "adv_landmark")
CALLS = [
    *(("advmed.cli.main", *words) for words in (["--help"], ["compare", "--help"], ["search", "-h"])),
    *(
        (f"{host}.cli", *words)
        for host in HOSTS
        for words in (["--help"], ["evaluate", "--help"], ["thresholds", "-h"])
    ),
    ("adv_nnunet.cli", "settings", "--help"),
    *((f"{host}.cli", "init", "--help") for host in HOSTS),
    ("adv_yolo.cli",),
    ("adv_yolo.cli", "help"),
    ("adv_yolo.cli", "evaluate", "help"),
    *((f"{host}.cli", name, "--help") for host in LIGHTNING for name in ("fit", "validate", "test", "predict")),
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Mapping[tuple[str, ...], Mapping[str, Any]]:
    """What the commands answer, one after the other in a process of their own, and what is imported by then."""
    words = [sys.executable, "-c", CODE, json.dumps(CALLS)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path_factory.mktemp("help"), timeout=120)
    assert done.returncode == 0, done.stderr
    assert "LightningCLI's args" not in done.stderr
    return dict(zip(CALLS, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("call", CALLS, ids=" ".join)
def test_help_imports_nothing_heavy(call: tuple[str, ...], answers: Any) -> None:
    found = answers[call]
    assert found["status"] == 0
    assert [name for name in HEAVY if name in found["modules"]] == []
    assert "--debug" in found["out"] or call[0] == "adv_yolo.cli"
    assert "usage" in found["out"] or "yolo" in found["out"]


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(("words", "table"), [(("evaluate", "--help"), EVALUATE), (("thresholds", "-h"), THRESHOLDS)])
def test_every_option_is_in_every_hosts_help(host: str, words: tuple[str, ...], table: Any, answers: Any) -> None:
    text = answers[f"{host}.cli", *words]["out"]
    plain = " ".join(text.split())
    for option in table:
        assert (f"{option.name}=..." if host == "adv_yolo" else f"--{option.name}") in text
        assert option.help in plain


def test_the_options_of_one_host_are_in_its_help(answers: Any) -> None:
    own = {"adv_classify": "--gradcam", "adv_landmark": "--radii", "adv_nnunet": "-step_size", "adv_yolo": "single_cls"}
    for host, option in own.items():
        assert option in answers[f"{host}.cli", "evaluate", "--help"]["out"]


@pytest.mark.parametrize("call", CALLS, ids=" ".join)
def test_every_option_of_a_help_is_on_the_page_of_commands(call: tuple[str, ...], answers: Any) -> None:
    """Under the heading of its command; NAME=... and --name stand at the beginning of a line of a help."""
    module, *words = call
    command = [word for word in words if word.isalpha() and word != "help"]
    name = " ".join([module.partition(".")[0].replace("_", "-"), *command])
    page = (Path(__file__).parents[2] / "docs/commands.md").read_text(encoding="utf-8")
    (heading,) = [line for line in page.splitlines() if re.fullmatch(rf"###? {name}", line)]
    section = re.split(r"\n#{2,3} ", page.partition(f"\n{heading}\n")[2])[0]
    if f"{name.partition(' ')[0]} fit`" in section:  # says that its options are those of fit
        assert command[0] in ("validate", "test", "predict")
        return
    found = re.findall(r"^  (?:(-{1,2}\w[\w.-]*)|(\w+=)\.\.\. )", answers[call]["out"], re.MULTILINE)
    options = {dashed or named for dashed, named in found} - {"-h", "--help"}
    assert options or not command or command == ["settings"]
    assert {option for option in options if f"`{option}" not in section} == set()


@pytest.mark.parametrize("host", LIGHTNING)
def test_a_short_help_says_where_the_rest_is(host: str, answers: Any) -> None:
    text = answers[f"{host}.cli", "fit", "--help"]["out"]
    page = str(Path(__file__).parents[2] / f"docs/{host.removeprefix('adv_')}.md")
    for part in ("--config", "--data", "--ckpt_path", "--model.network", "--model.method", "--trainer", "--help-all"):
        assert part in text
    assert page in text
    assert Path(page).is_file()
    assert text.count(f"\n  {host.replace('_', '-')} fit ") == 2, "two examples"


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (("advmed.cli.main", "--help"), "index.md"),
        (("advmed.cli.main", "search", "-h"), "search.md"),
        (("adv_nnunet.cli", "--help"), "nnunet.md"),
        (("adv_yolo.cli", "--help"), "yolo.md"),
        (("adv_classify.cli", "--help"), "classify.md"),
        (("adv_landmark.cli", "--help"), "landmark.md"),
    ],
)
def test_a_help_names_its_page_as_one_path(call: tuple[str, ...], name: str, answers: Any) -> None:
    assert f" {Path(__file__).parents[2] / 'docs' / name}\n" in answers[call]["out"]


def test_yolos_help_has_the_arguments_of_training_with_their_defaults(answers: Any) -> None:
    from adv_yolo.settings import Settings, arguments_of

    text = answers["adv_yolo.cli", "help"]["out"]
    listed = text[text.index("thresholds=std_best.pt") : text.index("2. Thresholds")].split("\n", 1)[1]
    wanted = [f"{name}={'null' if value is None else value}" for name, value in arguments_of(Settings()).items()]
    assert " ".join(listed.split()) == " ".join(wanted)


@pytest.mark.slow
def test_help_all_is_lightnings(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from adv_classify.cli import main

    monkeypatch.setattr(sys, "argv", ["adv-classify", "fit", "--help-all"])
    with suppress(SystemExit):
        assert main() == 0
    out, error = capsys.readouterr()
    assert "LightningCLI's args" not in error
    for option in ("--trainer.max_epochs", "--model.method.delta", "--checkpoint.monitor", "--data.help"):
        assert option in out

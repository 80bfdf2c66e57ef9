"""Help is answered at once: nothing heavy is imported for it, and it names every option."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from advmed.cli.options import EVALUATE, THRESHOLDS

HEAVY = ("torch", "numpy", "matplotlib", "lightning", "timm", "ultralytics", "nnunetv2", "optuna")
CODE = """
import contextlib, importlib, io, json, sys
module, *words = sys.argv[1:]
out = io.StringIO()
status = 0
with contextlib.redirect_stdout(out):
    try:
        status = importlib.import_module(module).main(words)
    except SystemExit as end:  # argparse ends the process
        status = end.code
print(json.dumps({"status": status, "out": out.getvalue(), "modules": list(sys.modules)}))
"""
HOSTS = ("adv_nnunet", "adv_yolo", "adv_classify", "adv_landmark")
LIGHTNING = ("adv_classify", "adv_landmark")
CALLS = [
    *(("advmed.cli.main", words) for words in (["--help"], ["compare", "--help"], ["search", "-h"])),
    *((f"{host}.cli", words) for host in HOSTS for words in (["--help"], ["evaluate", "--help"], ["thresholds", "-h"])),
    ("adv_nnunet.cli", ["settings", "--help"]),
    ("adv_yolo.cli", []),
    ("adv_yolo.cli", ["help"]),
    ("adv_yolo.cli", ["evaluate", "help"]),
    *((f"{host}.cli", [name, "--help"]) for host in LIGHTNING for name in ("fit", "validate", "test", "predict")),
]


def helped(module: str, words: list[str], folder: Path) -> Mapping[str, Any]:
    """What a command answers in a process of its own, and what it has imported."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, module, *words], capture_output=True, text=True, cwd=folder, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "LightningCLI's args" not in done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(("module", "words"), CALLS, ids=lambda value: value if isinstance(value, str) else None)
def test_help_imports_nothing_heavy(module: str, words: list[str], tmp_path: Path) -> None:
    found = helped(module, words, tmp_path)
    assert found["status"] == 0
    assert [name for name in HEAVY if name in found["modules"]] == []
    assert "--debug" in found["out"] or module == "adv_yolo.cli"
    assert "usage" in found["out"] or "yolo" in found["out"]


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(("command", "table"), [("evaluate", EVALUATE), ("thresholds", THRESHOLDS)])
def test_every_option_is_in_every_hosts_help(host: str, command: str, table: Any, tmp_path: Path) -> None:
    text = helped(f"{host}.cli", [command, "--help"], tmp_path)["out"]
    plain = " ".join(text.split())
    for option in table:
        assert (f"{option.name}=..." if host == "adv_yolo" else f"--{option.name}") in text
        assert option.help in plain


def test_the_options_of_one_host_are_in_its_help(tmp_path: Path) -> None:
    for host, option in (("adv_classify", "--gradcam"), ("adv_landmark", "--radii"), ("adv_nnunet", "-step_size")):
        assert option in helped(f"{host}.cli", ["evaluate", "--help"], tmp_path)["out"]
    assert "single_cls" in helped("adv_yolo.cli", ["evaluate", "--help"], tmp_path)["out"]


@pytest.mark.parametrize("host", LIGHTNING)
def test_a_short_help_says_where_the_rest_is(host: str, tmp_path: Path) -> None:
    name = host.replace("_", "-")
    text = helped(f"{host}.cli", ["fit", "--help"], tmp_path)["out"]
    page = f"docs/{host.removeprefix('adv_')}.md"
    for part in ("--config", "--data", "--ckpt_path", "--model.network", "--model.method", "--trainer", "--help-all"):
        assert part in text
    assert page in text
    assert (Path(__file__).parents[2] / page).is_file()
    assert text.count(f"\n  {name} fit ") == 2, "two examples"


def test_yolos_help_has_the_arguments_of_training_with_their_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    from adv_yolo.cli import main
    from adv_yolo.settings import Settings, arguments_of

    assert main(["help"]) == 0
    text = capsys.readouterr().out
    listed = text[text.index("thresholds=std_best.pt") : text.index("2. Thresholds")].split("\n", 1)[1]
    wanted = [f"{name}={'null' if value is None else value}" for name, value in arguments_of(Settings()).items()]
    assert " ".join(listed.split()) == " ".join(wanted)


@pytest.mark.slow
def test_help_all_is_lightnings(tmp_path: Path) -> None:
    text = helped("adv_classify.cli", ["fit", "--help-all"], tmp_path)["out"]
    for option in ("--trainer.max_epochs", "--model.method.delta", "--checkpoint.monitor", "--data.help"):
        assert option in text

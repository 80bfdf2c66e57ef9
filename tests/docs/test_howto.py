"""What the how-to pages tell to paste and to type, pasted and typed; and the notebook. No network is reached for."""

from __future__ import annotations

import re
import runpy
import socket
from contextlib import chdir
from pathlib import Path
from typing import Any, NoReturn

import nbclient
import nbformat
import numpy as np
import pytest
from matplotlib.image import imread, imsave

from advmed.testing.lightning import unchanged_process
from helpers.hosts import ROOT
from helpers.howto import Block, blocks_of, check_command, check_printed, clone, commands_of, run_page

FOLDER = ROOT / "docs" / "howto"
NOTEBOOK = ROOT / "examples" / "notebook" / "chest_xrays.ipynb"
PAGES = sorted(FOLDER.glob("*.md"))
WITH = {
    language: [path for path in PAGES if any(block.language == language for block in blocks_of(path.read_text()))]
    for language in ("python", "console", "bash")
}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a network that leads nowhere: a page that needs a download fails."""

    def refuse(self: socket.socket, address: Any) -> NoReturn:
        raise AssertionError(f"a connection to {address} was asked for")

    connect = socket.socket.connect
    monkeypatch.setattr(
        socket.socket, "connect", lambda s, to: connect(s, to) if s.family == socket.AF_UNIX else refuse(s, to)
    )
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def named(path: Path) -> str:
    return path.stem


@pytest.mark.slow
@pytest.mark.parametrize("path", WITH["python"], ids=named)
def test_the_code_of_a_page_runs(path: Path, tmp_path: Path) -> None:
    run_page(path, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted({*WITH["console"], *WITH["bash"]}), ids=named)
def test_the_commands_of_a_page_are_understood(path: Path, tmp_path: Path) -> None:
    blocks = blocks_of(path.read_text(encoding="utf-8"))
    for block in blocks:
        if block.title:
            (tmp_path / block.title).write_text(block.text)
    with clone(tmp_path):
        typed = [words for block in blocks if block.language in ("console", "bash") for words in commands_of(block)]
        assert typed
        for words in typed:
            check_command(words, tmp_path)


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_a_page_says_first_what_one_will_have_and_is_found(path: Path) -> None:
    title, start = path.read_text(encoding="utf-8").split("\n\n")[:2]
    assert title.startswith("# ")
    assert start.startswith("At the end ")
    assert re.search(r"\bIt takes \w+", start), "and how long it takes"
    assert f"howto/{path.name}" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


# A page that breaks


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n", AssertionError),
        ("```python\nfrom advmed import attack_that_is_gone\n```\n", ImportError),
        ("```python\nprint('accuracy', 0.5)\n```\n\n```text\naccuracy 0.8\n```\n", AssertionError),
        ("```python\nprint('accuracy', 0.5)\n```\n\n```text\nprecision 0.5\n```\n", AssertionError),
    ],
)
def test_broken_code_of_a_page_fails(text: str, error: type[Exception], tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("# A page\n\n" + text)
    with pytest.raises(error):
        run_page(path, tmp_path)


def test_a_page_is_run_block_by_block_in_one_namespace(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("```python\nx = 2\n```\nand\n```python\nprint('x is', x)\n```\n\n```text\nx is 2\n```\n")
    assert run_page(path, tmp_path)["x"] == 2


@pytest.mark.parametrize(
    "line",
    [
        "adv-nnunet evaluate -d 4 -c 2d --atacks pgd100 -o report",
        "adv-yolo detect train model=a.pt data=d.yaml methd=amat",
        "adv-yolo evaluate model=a.pt data=d.yaml attack=pgd100",
        "adv-classify fit --config pneumoniamnist.yaml --trainer.device 2",
        "adv-classify evaluate best.ckpt --atacks '[pgd100]'",
        "nnUNetv2_train 4 2d 0 -tr nnUNetTrainerAMAT -num_gpu 2 -x",
        "nnUNetv2_train 4 2d 0 -tr nnUNetTrainerAMATT",
        "advmed search no.yaml",
        "torchrun --nprocs 2 --no-python adv-yolo evaluate model=a.pt data=d.yaml",
        "pip download --destination wheels advmed",
        "python examples/no.py",
        "unknown-command",
    ],
)
def test_a_command_that_no_parser_takes_fails(line: str, tmp_path: Path) -> None:
    (words,) = commands_of(Block("console", f"$ {line}\n", 1))
    with clone(tmp_path), pytest.raises((Exception, SystemExit)):
        check_command(words, tmp_path)


def test_numbers_may_differ_by_little() -> None:
    block = Block("text", "accuracy 0.50, steps 20\n", 1)
    check_printed("accuracy 0.52, steps 20", block, Path("page.md"))
    for printed in (
        "accuracy 0.58, steps 20",
        "accuracy 0.50, steps 21",
        "accuracy 0.50",
        "accuracy 0.5, 20 steps",
    ):
        with pytest.raises(AssertionError):
            check_printed(printed, block, Path("page.md"))


# Noise levels


@pytest.mark.slow
def test_table_and_picture_of_noise_levels_are_those_of_the_script(tmp_path: Path) -> None:
    page = (FOLDER / "levels.md").read_text(encoding="utf-8")
    with unchanged_process():
        lines = runpy.run_path(str(ROOT / "examples" / "noise_levels.py"))["main"](tmp_path / "levels.png")
    (shown,) = re.findall(r"^\| norm \|.*?(?=\n\n)", page, re.MULTILINE | re.DOTALL)
    check_printed("\n".join(lines), Block("text", shown, 1), FOLDER / "levels.md")
    made, kept = (imread(path)[..., :3] for path in (tmp_path / "levels.png", FOLDER / "levels.png"))
    assert made.shape == kept.shape
    assert np.abs(made - kept).mean() < 0.02


# What leaves the house


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_the_files_with_ids_are_those_of_the_page(tmp_path: Path) -> None:
    """Of a run of adv-classify, which is one on Lightning, and of its report."""
    from adv_classify.cli import main

    page = FOLDER / "offline_hospital.md"
    told = re.findall(r"^\| `([\w./<>*]+)`[^|]*\| (yes|no)\b", page.read_text(encoding="utf-8"), re.MULTILINE)
    (code,) = [block.text for block in blocks_of(page.read_text()) if "def files_with" in block.text]
    space: dict[str, Any] = {}
    exec(code, space)
    files_with = space["files_with"]
    draw = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 8)):
        for number in range(count):
            folder = tmp_path / "data" / split / "ab"[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            image = draw.integers(0, 128, (16, 16)) + 100 * (number % 2)
            imsave(folder / f"patient_{split}{number}.png", image.astype(np.uint8), cmap="gray", vmin=0, vmax=255)
    run = ["--model.network.name", "test_resnet", "--model.method.name", "AMAT", "--model.attack.steps", "1"]
    run += ["--trainer.max_epochs", "2", "--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    data = ["--data", "ImageFolder", "--data.root", "data", "--data.batch_size", "4", "--data.workers", "0"]
    with chdir(tmp_path), unchanged_process():
        assert main(["fit", *data, *run, "--trainer.default_root_dir", "run"]) == 0
        best = str(next(Path("run").rglob("best.ckpt")))
        few = ["--attacks", "[pgd1]", "--norm", "[2]", "--examples", "1", "--checks", "0", "--device", "cpu"]
        assert main(["evaluate", best, *few, "--out", "run/report"]) == 0
        files = {path for path in Path("run").rglob("*") if path.is_file()}
        holders = set(files_with("run", "patient_"))
    for name, answer in told:
        meant = {path for path in files if path.match(name)}
        assert meant, f"a run has no {name}"
        assert meant & holders == (meant if answer == "yes" else set()), name
    assert not {path for path in files if not any(path.match(name) for name, _ in told)}, "which the page does not name"
    assert {answer for _, answer in told} == {"yes", "no"}


# The notebook


@pytest.mark.slow
def test_the_notebook_runs_and_says_what_it_has_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # a kernel is spoken to through sockets of this machine
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    kept = nbformat.read(NOTEBOOK, as_version=4)
    book = nbformat.read(NOTEBOOK, as_version=4)
    folder = tmp_path / "examples" / "notebook"
    folder.mkdir(parents=True)
    (tmp_path / "examples" / "data").symlink_to(ROOT / "examples" / "data")
    nbclient.NotebookClient(book, timeout=200, resources={"metadata": {"path": str(folder)}}).execute()
    assert (folder / "runs" / "report" / "report.html").is_file()
    pictures = 0
    for before, after in zip(kept.cells, book.cells, strict=True):
        old, new = (outputs(cell) for cell in (before, after))
        assert old.keys() == new.keys(), before.source
        pictures += "image/png" in old
        if "text" in old:
            check_printed(new["text"], Block("text", old["text"], 1), NOTEBOOK)
    assert pictures == 2
    assert len(NOTEBOOK.read_bytes()) < 100_000, "outputs are kept small"


def outputs(cell: Any) -> dict[str, str]:
    """What a cell has printed, and its pictures."""
    found: dict[str, str] = {}
    for output in cell.get("outputs", ()):
        if output.output_type == "stream":
            assert output.name == "stdout", output.text
            found["text"] = found.get("text", "") + output.text
        elif "image/png" in output.data:
            found["image/png"] = output.data["image/png"]
        else:
            found["text"] = found.get("text", "") + output.data["text/plain"]
    return found

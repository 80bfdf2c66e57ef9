"""Pages as a reader has them: their code in its order, what it says that it prints, and their commands."""

from __future__ import annotations

import argparse
import io
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from advmed.cli import init
from advmed.cli.completion import OPTION
from advmed.lazy import OURS
from advmed.testing.lightning import unchanged_process
from helpers.hosts import ROOT

FENCE = re.compile(r"^```(\w*)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
TOLERANCE = 0.1
"""How far a printed fraction may be from the page's, as a share of it: another processor rounds in another way."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        language: behind the fence.
        text: inside.
        line: of the page, on which the text begins.
        title: the file that it is, where the page gives it a name.
    """

    language: str
    text: str
    line: int
    title: str = ""


def blocks_of(page: str) -> list[Block]:
    """The fenced blocks of a page, in their order."""
    return [Block(m[1], m[3], page.count("\n", 0, m.start()) + 2, m[2] or "") for m in FENCE.finditer(page)]


def run_page(path: Path, folder: Path) -> dict[str, Any]:
    """Runs the code of a page in a folder that has the repository's ``examples``, as a clone has them.

    Blocks of ``python`` run one after the other in one namespace. A block of ``text`` right behind one is what it
    prints, fractions up to :data:`TOLERANCE`.

    Returns:
        The namespace at the end.
    """
    space: dict[str, Any] = {"__name__": "__main__"}
    printed: str | None = None
    with clone(folder), unchanged_process():
        for block in blocks_of(path.read_text(encoding="utf-8")):
            if block.language == "python":
                code = compile("\n" * (block.line - 1) + block.text, str(path), "exec")  # a traceback names its line
                out = io.StringIO()
                with redirect_stdout(out):
                    exec(code, space)
                printed = out.getvalue()
            elif block.language == "text" and printed is not None:
                check_printed(printed, block, path)
                printed = None
    return space


def check_printed(printed: str, block: Block, path: Path) -> None:
    """What was printed has the words and whole numbers of the block, and its fractions or others near to them."""
    where = f"{path.name}, line {block.line}: printed\n{printed}\nand the page has\n{block.text}"
    assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", block.text).split(), where
    for found, wanted in zip(NUMBER.findall(printed), NUMBER.findall(block.text), strict=True):
        digits = len(wanted.partition(".")[2])
        near = max(TOLERANCE * abs(float(wanted)), 1.01 * 10.0**-digits) if digits else 0.0  # one in the last digit
        assert abs(float(found) - float(wanted)) <= near, where


@contextmanager
def clone(folder: Path) -> Iterator[None]:
    """A working folder that looks like a clone of the repository, as far as pages name files of one.

    With what ``init`` writes into it.
    """
    for name in ("examples", "docs", "benchmarks", *OURS[1:]):
        (folder / name).symlink_to(ROOT / name)
    for host in OURS[1:]:
        init.write_configurations(host, folder)
    with chdir(folder):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


# Commands


def commands_of(block: Block) -> list[list[str]]:
    """The commands of a block of ``console`` (behind a prompt) or ``bash`` (a script), as words."""
    text = block.text.replace("\\\n", " ")
    lines = text.splitlines()
    if block.language == "console":
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        if words and words[-1] == "&":
            words.pop()
        while words and re.fullmatch(r"[A-Za-z_]\w*=.*", words[0]):  # variables of the command
            words.pop(0)
        if ">" in words:
            del words[words.index(">") :]
        if words:
            found.append(words)
    return found


def check_command(words: Sequence[str], folder: Path) -> str:
    """Has a command's own parser read its words; in a folder that looks like a clone.

    Returns:
        The name of the command that was read.

    Raises:
        KeyError: for a command that nobody here can read.
    """
    name, *rest = words
    if name.startswith("nnUNetv2_"):
        _stock_nnunet(name, rest)
    else:
        PARSERS[name](rest, folder)
    return name


def parsed_by(name: str, words: Sequence[str], call: Callable[[], object]) -> argparse.Namespace:
    """What a program's own parser makes of its words, where that lies inside of the function that does the work: it is
    called, and left as soon as the words are read."""

    class Read(BaseException):
        pass

    parse = argparse.ArgumentParser.parse_args

    def read(parser: argparse.ArgumentParser, *given: Any) -> Any:
        raise Read(parse(parser, *given))

    with mock.patch.object(sys, "argv", [name, *words]), mock.patch.object(argparse.ArgumentParser, "parse_args", read):
        try:
            call()
        except Read as found:
            (namespace,) = found.args
            return namespace
    raise AssertionError(f"{name} has read no words")


def _nnunet(words: list[str], _: Path) -> None:
    from adv_nnunet.cli import _parser

    with _ended():
        _check_trainers(_parser().parse_args(words))


def _stock_nnunet(name: str, words: list[str]) -> None:
    (entry,) = distribution("nnunetv2").entry_points.select(group="console_scripts", name=name)
    _check_trainers(parsed_by(name, words, entry.load()))


def _check_trainers(given: argparse.Namespace) -> None:
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    trainers = getattr(given, "tr", None) or []
    for trainer in [trainers] if isinstance(trainers, str) else trainers:
        assert recursive_find_trainer_class_by_name(trainer) is not None, trainer


@contextmanager
def _ended() -> Iterator[None]:
    """A parser that has answered by itself, and ends well: help, completion."""
    try:
        with redirect_stdout(io.StringIO()):
            yield
    except SystemExit as end:
        if end.code:
            raise


def _init(words: list[str]) -> None:
    parser = argparse.ArgumentParser()
    init.add_arguments(parser)
    parser.parse_args(words)


def _stock_yolo(words: list[str], _: Path) -> None:
    from ultralytics.utils import DEFAULT_CFG_DICT, SETTINGS

    from adv_yolo.cli import _parse

    if words[0] == "settings":
        assert {word.partition("=")[0] for word in words[1:]} <= set(SETTINGS)
    else:
        _parse(words, {**DEFAULT_CFG_DICT, "task": None, "mode": None})


def _yolo(words: list[str], _: Path) -> None:
    from ultralytics.utils import DEFAULT_CFG_DICT

    from adv_yolo.cli import OWN, _own, _parse
    from adv_yolo.settings import argument_names
    from adv_yolo.trainer import TRAINERS

    if words[0] == "init":
        _init(words[1:])
        return
    if words[0] in OWN:
        _own(words[1:], words[0])
        return
    known = {**DEFAULT_CFG_DICT, **dict.fromkeys(argument_names()), "method": None, "task": None, "mode": None}
    assert _parse(words, known)["method"] in TRAINERS


def _lightning(module: str) -> Callable[[list[str], Path], None]:
    def check(words: list[str], _: Path) -> None:
        main = import_module(module).main
        host = main.__self__
        if words[0] == "init":
            _init(words[1:])
            return
        if words[0] == OPTION:  # and its making is tested elsewhere
            assert len(words) == 2
            return
        if words[0] in ("evaluate", "thresholds"):
            host._parser(words[0], full=True).parse_args(words[1:])
            return
        with redirect_stdout(io.StringIO()) as printed, unchanged_process():
            if "--help" in words:
                assert main(words) == 0
                return
            try:
                assert main([*words, "--print_config"]) == 0
            except SystemExit as end:
                assert not end.code
        assert "model:" in printed.getvalue()

    return check


def _advmed(words: list[str], folder: Path) -> None:
    from advmed.cli.main import _parser
    from advmed.search.plan import fill, read_plan

    with _ended():
        given = _parser(words).parse_args(words)
        if given.command != "search":
            return
        plan = read_plan(given.study)
        known = plan.placeholders(plan.grid()[0]) | {"checkpoint": "last.ckpt"}
        for command in (plan.train, plan.evaluate):
            check_command([fill(word, known) for word in command], folder)


def _torchrun(words: list[str], folder: Path) -> None:
    from torch.distributed.run import get_args_parser

    given = get_args_parser().parse_args(words)
    assert given.no_python
    check_command([given.training_script, *given.training_script_args], folder)


def _pip(words: list[str], _: Path) -> None:
    from pip._internal.commands import create_command

    command = create_command(words[0])
    command.parser.parse_args(words[1:])


def _python(words: list[str], folder: Path) -> None:
    name, *rest = words
    if name == "-m":
        assert find_spec(rest[0]) is not None, words
    elif name != "-c":
        text = (folder / name).read_text(encoding="utf-8")
        if not rest:
            return
        assert "parse_args(" in text, f"{name} takes no arguments"
        script = (folder / name).resolve()
        before = set(sys.modules)
        with unchanged_process():
            sys.path.insert(0, str(script.parent))
            given = parsed_by(name, rest, lambda: runpy.run_path(str(script), run_name="__main__"))
        for module in set(sys.modules) - before:
            if Path(getattr(sys.modules[module], "__file__", None) or "/").parent == script.parent:
                del sys.modules[module]  # a neighbour of the script, of a common name
        inner = rest[rest.index("--") + 1 :] if "--" in rest else getattr(given, "command", None)
        if inner and script.name == "standard.py" and inner[0] == "adv-nnunet":
            inner = [*inner, "-o", "report"]  # the script says where
        if inner:  # which the script calls
            check_command(inner, folder)


def _make(words: list[str], _: Path) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert {word for word in words if "=" not in word} <= set(targets), words


def _bash(words: list[str], folder: Path) -> None:
    """A script of the page: it was written into the folder, and is one."""
    (script,) = words
    subprocess.run(["bash", "-n", script], cwd=folder, check=True)


def _srun(words: list[str], folder: Path) -> None:
    check_command(words, folder)


def _nothing(words: list[str], _: Path) -> None:
    assert words


PARSERS: dict[str, Callable[[list[str], Path], None]] = {
    "adv-nnunet": _nnunet,
    "adv-yolo": _yolo,
    "yolo": _stock_yolo,
    "adv-classify": _lightning("adv_classify.cli"),
    "adv-landmark": _lightning("adv_landmark.cli"),
    "advmed": _advmed,
    "torchrun": _torchrun,
    "pip": _pip,
    "python": _python,
    "python3": _python,
    "make": _make,
    "sbatch": _bash,
    "srun": _srun,
    "export": _nothing,
    "source": _nothing,
    "cd": _nothing,
}
"""What reads the words of each command that a page may tell to type, beside nnU-Net's own."""

"""Messages name pages where they lie, in a clone as after ``pip install`` of a wheel; no text names another place."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from advmed import documentation
from helpers.hosts import ROOT

SOURCES = sorted(path for folder in ("common/advmed", *ROOT.glob("adv_*")) for path in (ROOT / folder).rglob("*.py"))


def test_a_page_of_a_clone_is_found_there() -> None:
    assert documentation.page("howto/levels.md") == str(ROOT / "docs/howto/levels.md")


def test_what_is_installed_comes_first_and_what_is_missing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed, clone = tmp_path / "advmed/docs", tmp_path / "docs"
    for folder in (installed, clone):
        folder.mkdir(parents=True)
        (folder / "search.md").write_text("# A page\n")
    monkeypatch.setattr(documentation, "FOLDERS", (installed, clone))
    assert documentation.page("search.md") == str(installed / "search.md")
    assert documentation.page("yolo.md") == "docs/yolo.md in Advmed's repository"


def texts(tree: ast.Module) -> list[str]:
    """The texts of a module that a user may be shown: all but docstrings, and texts under a constant."""
    told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told
    ]


def test_no_message_and_no_configuration_names_a_place_in_a_clone() -> None:
    """The pages are elsewhere in a wheel: see advmed.documentation."""
    assert len(SOURCES) > 100
    named = {
        f"{path.name}: {text}"
        for path in SOURCES
        if path.name != "documentation.py"
        for text in texts(ast.parse(path.read_text("utf-8")))
        if re.search(r"\bdocs/", text)
    }
    assert not named
    for path in ROOT.glob("adv_*/configurations/*.yaml"):
        assert "docs/" not in path.read_text("utf-8"), path


def test_every_page_that_is_asked_for_exists() -> None:
    """Calls of page() with a name that stands there, and init's page=."""
    asked = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call):
                given = [*node.args, *(word.value for word in node.keywords if word.arg == "page")]
                asked |= {
                    word.value
                    for word in given
                    if isinstance(word, ast.Constant)
                    and isinstance(word.value, str)
                    and word.value.endswith(".md")
                    and ast.unparse(node.func).rpartition(".")[2]
                    in ("page", "page_of", "documentation", "main", "write")
                }
    assert {"index.md", "search.md", "nnunet.md", "yolo.md"} <= asked
    assert {name for name in asked if not (ROOT / "docs" / name).is_file()} == set()

"""The pages of the documentation, built as ``make docs`` builds them and read in a browser, and those that are written.

What needs the environment of the pages is skipped where ``make docs`` has not made it.
"""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from helpers.browser import DESK, PHONE, Browser, needs_browser, troubles
from test_public_names import PACKAGES, stub_names

ROOT = Path(__file__).parents[1]
SITE = ROOT / "docs" / "_site"
PYTHON = ROOT / os.environ.get("DOCS_VENV", ".venv-docs") / "bin" / "python"
needs_pages = pytest.mark.skipif(not PYTHON.exists(), reason="no environment that builds the pages: make docs")


# What is written


@pytest.mark.parametrize("name", ["commands.md", "settings.md"])
def test_the_reference_is_as_the_code_is(name: str) -> None:
    wanted = runpy.run_path(str(SITE / "reference.py"))["pages"]()[name]
    found = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert found == wanted, "run python docs/_site/reference.py"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_on_the_page_of_its_package(package: str) -> None:
    pages = runpy.run_path(str(SITE / "pages.py"))
    assert sorted(pages["PACKAGES"]) == sorted(PACKAGES)
    names = re.findall(rf"^::: {package}\.(\w+)$", pages["api_page"](package), re.MULTILINE)
    assert names == stub_names(package)
    index = pages["linked"]((ROOT / "docs" / "api.md").read_text(encoding="utf-8"))
    assert re.findall(rf"\(api/{package}\.md#{package}\.(\w+)\) \|", index) == names


FORM = ["What was run", "Results", "What it shows", "What it does not show"]
OTHERS = {"reports.md"}  # pictures


@pytest.mark.parametrize("page", sorted({path.name for path in (ROOT / "docs/results").glob("*.md")} - OTHERS))
def test_pages_of_results_have_one_form(page: str) -> None:
    text = (ROOT / "docs/results" / page).read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == FORM
    assert "$ " in text.partition("## What was run")[2].partition("## Results")[0], "the command that was run"


def test_what_is_named_in_the_repository_is_there() -> None:
    """Pages, messages and comments name files by their path; one that has moved must take its names along."""
    named = re.compile(
        r"(?<![\w/.-])(?:examples|benchmarks|docs|tools|common|adv_\w+)/[\w/.-]+\.(?:py|yaml|md|ipynb|toml)\b"
    )
    folders = [ROOT / name for name in ("examples", "benchmarks", "docs", "common", *PACKAGES[1:])]
    files = [path for folder in folders for kind in ("*.py", "*.md", "*.yaml") for path in folder.rglob(kind)]
    lost = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in [*files, ROOT / "README.md"]
        for name in named.findall(path.read_text(encoding="utf-8"))
        if not (ROOT / name).exists()
    }
    assert len(files) > 200
    assert not lost


# What is built


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    words = [PYTHON, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    done = subprocess.run(
        words, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("profile"), ROOT / "build" / "site-pages")
    yield opened
    opened.close()


def sections(html: str, package: str) -> Mapping[str, str]:
    """The part of a page that is about each public name."""
    parts = re.split(rf'<h2 id="{package}\.(\w+)"', html)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@needs_pages
@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_has_signature_text_and_example(site: Path, package: str) -> None:
    """Data, such as a dict, has a text only; where a host makes a class, its page says whose the arguments are."""
    found = sections((site / "api" / f"{package}.html").read_text(encoding="utf-8"), package)
    assert list(found) == stub_names(package)
    for name, html in found.items():
        assert re.search(r'<div class="doc doc-contents.*?<p>\s*\S', html, re.DOTALL), name
        if name != "METHODS":
            assert "doc-signature" in html or "arguments are those of" in " ".join(html.split()), name
            assert re.search(r'Examples:</span>.*?<span class="gp">', html, re.DOTALL), name
    text = re.sub("<[^>]*>", "", "".join(found.values()))
    assert not re.search(r":(class|func|meth|mod|attr|data):", text), "a role of Sphinx is left"


OUTSIDE = """[...document.querySelectorAll('.md-content *')]
    .filter(e => !e.closest('pre, .md-typeset__scrollwrap, .md-nav, .headerlink'))
    .filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"""
CUT = """[...document.querySelectorAll('pre > code')].filter(e => e.innerText.startsWith('$ '))
    .filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.innerText.slice(0, 80))"""
SCROLLS = """[...document.querySelectorAll('.language-python pre > code')].filter(e => !e.closest('.doc-contents'))
    .filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.innerText.slice(0, 80))"""
"""Code of the pages that a desk's screen does not hold; that of docstrings is as wide as they are."""
BROKEN = r"""(() => { const broken = [];
    for (const cell of document.querySelectorAll('td, th')) {
        const walker = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
        for (let node; node = walker.nextNode();)
            for (const word of node.data.matchAll(/[^\s/,=-]+/g)) {
                const range = document.createRange();
                range.setStart(node, word.index);
                range.setEnd(node, word.index + word[0].length);
                const lines = [...range.getClientRects()];
                if (new Set(lines.map(r => Math.round(r.top))).size > 1 &&
                    lines.reduce((sum, r) => sum + r.width, 0) < 0.9 * cell.clientWidth) broken.push(word[0]);
            } }
    return broken })()"""
"""Words in tables that are on two lines and would fit into one."""


@needs_pages
@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [DESK, PHONE])
def test_every_page_is_whole_at_a_desk_and_on_a_phone(site: Path, browser: Browser, width: int) -> None:
    """Nothing hangs over the edge or is fetched from elsewhere, no command or code is cut, no name is broken."""
    found: dict[str, Any] = {}
    pages = sorted(path for path in site.rglob("*.html") if path.name != "404.html")  # which is for a server
    assert len(pages) > 30
    for path in pages:
        browser.open(path, width)
        page = str(path.relative_to(site))
        wide = browser.value("document.documentElement.scrollWidth")
        seen = [wide] if wide > width else []
        seen += troubles(browser) + browser.value(OUTSIDE) + browser.value(CUT) + browser.value(BROKEN)
        seen += browser.value(SCROLLS) if width == DESK else []
        if seen:
            found[page] = seen
    assert not found


@needs_pages
@needs_browser
def test_the_search_works_on_pages_from_the_disk(site: Path, browser: Browser) -> None:
    browser.open(site / "index.html")
    browser.value("document.querySelector('[data-md-component=search-query]').focus()")
    browser("Input.insertText", text="margin_min")
    end = time.monotonic() + 30
    links: list[str] = []
    while not links and time.monotonic() < end:
        links = browser.value("[...document.querySelectorAll('a.md-search-result__link')].map(a => a.href)")
        time.sleep(0.1)
    assert any("settings.html" in link for link in links)
    assert troubles(browser) == []

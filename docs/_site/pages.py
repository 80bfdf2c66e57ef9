"""A hook of MkDocs: the pages of docs/api/, one for each package, made of the one list of its public names.

Imports nothing of ours, so that the pages are built without PyTorch; mkdocstrings reads the sources.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "advmed": "common/advmed",
    "adv_nnunet": "adv_nnunet",
    "adv_yolo": "adv_yolo",
    "adv_classify": "adv_classify",
    "adv_landmark": "adv_landmark",
}
"""The packages, and their folders."""


def public_names(package: str) -> dict[str, str]:
    """The public names of a package, in the order of its stub, and the modules that they are defined in."""
    stub = ast.parse((ROOT / PACKAGES[package] / "__init__.pyi").read_text(encoding="utf-8"))
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    return {
        alias.asname: f"{package}.{node.module}" if node.level else str(node.module)
        for node in imports
        for alias in node.names
        if alias.asname is not None
    }


def api_page(package: str) -> str:
    """The page of a package in Markdown: an introduction, and a directive of mkdocstrings for every public name."""
    summary = ast.get_docstring(ast.parse((ROOT / PACKAGES[package] / "__init__.py").read_text(encoding="utf-8")))
    first = str(summary).split("\n\n")[0].replace("\n", " ")
    names = "\n\n".join(f"::: {package}.{name}" for name in public_names(package))
    return f"# {package}\n\n{first}\n\n[All names at a glance](../api.md#{package})\n\n{names}\n"


def linked(page: str) -> str:
    """The index of public names, each with a link to its place in the pages of the packages."""
    heading, *sections = re.split(rf"(?m)^(?=## (?:{'|'.join(PACKAGES)})$)", page)
    for k, section in enumerate(sections):
        package = section[3:].partition("\n")[0]
        link = rf"| [`\1`](api/{package}.md#{package}.\1) |"
        sections[k] = re.sub(r"(?m)^\| `(\w+)` \|", link, section)
    return "".join([heading, *sections])


def listed(html: str) -> str:
    """Marks the tables of names, whose rows a phone shows as a list, and labels their cells with the heads of columns.

    Such a table has four columns at most, and a name (code) in the first cell of most rows; or three or four, and words
    in most cells of the others.
    """
    return re.sub(r"(?s)<table>(.*?)</table>", _listed, html)


_MOST_COLUMNS = 4


def _is_prose(rows: str, columns: int) -> bool:
    cells = [re.sub("<[^>]*>", "", cell) for cell in re.findall(r"(?s)<td[^>]*>(.*?)</td>", rows)]
    others = [cell for place, cell in enumerate(cells) if place % columns]
    return columns > 2 and sum(len(re.findall("[a-z]{2,}", cell)) > 2 for cell in others) >= 0.5 * len(others)


def _listed(found: re.Match[str]) -> str:
    head, rows = found[1].partition("</thead>")[::2]
    labels = re.findall(r"(?s)<th(?: [^>]*)?>(.*?)</th>", head)
    firsts = re.findall(r"(?s)<tr>\s*<td[^>]*>(.*?)</td>", rows)
    names = [first for first in firsts if re.match(r"(<(a|strong)[^>]*>)*<code>", first)]
    if len(labels) > _MOST_COLUMNS or not (len(names) >= 0.75 * len(firsts) or _is_prose(rows, len(labels))):
        return found[0]

    def cells(row: re.Match[str]) -> str:
        several = zip(re.findall(r"(?s)<td[^>]*>.*?</td>", row[1]), labels, strict=True)
        first, *others = [(cell, re.sub("<[^>]*>", "", label)) for cell, label in several]
        if len(others) == 1:  # what the one other column is, its text says
            return f"<tr>{first[0]}{others[0][0]}</tr>"
        return f"<tr>{first[0]}{''.join(_labelled(*other) for other in others)}</tr>"

    return f"<table data-rows>{head}</thead>" + re.sub(r"(?s)<tr>(.*?)</tr>", cells, rows) + "</table>"


def _labelled(cell: str, label: str) -> str:
    return cell.replace("<td", f'<td data-label="{label}"', 1)


def unbroken(html: str) -> str:
    """Holds the options of commands together, which a browser would break behind a hyphen; marks long code."""
    html = re.sub(rf"<code>(?=[^<]*[ (])([^<]{{{_LONG},}})</code>", r'<code class="long">\1</code>', html)
    return re.sub(r'(?s)<div class="language-console.*?</pre>', _unbroken, html)


_LONG = 40
"""Characters of code, which is more than a name, that may be broken in a table."""


def _unbroken(found: re.Match[str]) -> str:
    return re.sub(r"(?<=[\s>])(-[\w.-]+)(?=[^<>]*<)", r'<span class="option">\1</span>', found[0])


def on_files(files: Any, *, config: Any) -> Any:
    """Adds the pages that are made here."""
    from mkdocs.structure.files import File

    for package in PACKAGES:
        files.append(File.generated(config, f"api/{package}.md", content=api_page(package)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Links the index."""
    return linked(markdown) if page.file.src_uri == "api.md" else markdown


def on_page_content(html: str, **_: Any) -> str:
    """Marks the tables of names, and options; leaves out scripts of other sites, such as a notebook's MathJax."""
    return re.sub(r'<script[^>]*\ssrc="https?:[^"]*"[^>]*>\s*</script>', "", unbroken(listed(html)))

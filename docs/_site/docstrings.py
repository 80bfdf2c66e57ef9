"""An extension of Griffe, with which mkdocstrings reads our sources: what Sphinx would write otherwise.

``Example:`` is a section of examples, and ``:class:`advmed.PGD``` a link where the name is public.
"""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import griffe

PAGES = runpy.run_path(str(Path(__file__).with_name("pages.py")))  # beside this file, which is on no path of Python's

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):`~?(?P<target>[^`]+)`")
PUBLIC = {
    name: f"{package}.{name}" for package in reversed(PAGES["PACKAGES"]) for name in PAGES["public_names"](package)
}


def in_markdown(text: str) -> str:
    """A docstring as the parser of Google's style and Markdown understand it."""
    text = re.sub(r"(?m)^(\s*)Example:$", r"\1Examples:", text)
    return ROLE.sub(_link, text)


def _link(found: re.Match[str]) -> str:
    target = found["target"]
    name = target.removeprefix("advmed.").split(".")[-1]
    return f"[`{target}`][{PUBLIC[name]}]" if name in PUBLIC and target != name.lower() else f"`{target}`"


class Docstrings(griffe.Extension):
    """Rewrites the docstrings of all objects."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """See :class:`griffe.Extension`."""
        if obj.docstring is not None:
            obj.docstring.value = in_markdown(obj.docstring.value)

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Gives a NamedTuple the signature that Python gives it."""
        if any(str(base).rpartition(".")[2] == "NamedTuple" for base in cls.bases):
            kind = griffe.ParameterKind.positional_or_keyword
            given = [
                griffe.Parameter(name, annotation=field.annotation, kind=kind, default=field.value)
                for name, field in cls.attributes.items()
                if field.annotation is not None
            ]
            itself = griffe.Parameter("self", kind=kind)
            cls.set_member("__init__", griffe.Function("__init__", parameters=griffe.Parameters(itself, *given)))

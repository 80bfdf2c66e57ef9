"""Type checkers and editors see every argument: no public signature takes what it does not name."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from typing import Any, get_type_hints

import pytest

from test_architecture import MODULES

HOST_HOOKS = {
    "adv_nnunet.loader.SliceLoader.get_bbox",
    "adv_nnunet.loader.PartLoader.__init__",
    "adv_nnunet.trainer.AdversarialTraining.configure_optimizers",
}
"""Overridden for the host, which calls them; what it hands over is handed on."""


def untyped(tree: ast.Module, module: str) -> Iterator[str]:
    """The public functions and methods whose ``**arguments`` have no type, or are anything."""

    def walk(node: ast.AST, name: str) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                public = not child.name.startswith("_") or child.name in ("__init__", "__call__")
                given = child.args.kwarg
                if public and given is not None:
                    kind = "" if given.annotation is None else ast.unparse(given.annotation)
                    if kind in ("", "Any", "typing.Any"):
                        yield f"{name}.{child.name}"
            elif isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
                yield from walk(child, f"{name}.{child.name}")
            elif isinstance(child, ast.If | ast.Try):
                yield from walk(child, name)

    return walk(tree, module)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def f(**more): pass", ["m.f"]),
        ("def f(a, **more: Any): pass", ["m.f"]),
        ("class A:\n    def __init__(self, **more: typing.Any): pass", ["m.A.__init__"]),
        ("if True:\n    def f(**more): pass", ["m.f"]),
        ("def f(**more: Unpack[Options]): pass\ndef g(*, a: Any): pass\ndef _h(**more): pass", []),
        ("class _A:\n    def f(self, **more): pass", []),
    ],
)
def test_every_such_signature_is_seen(source: str, found: list[str]) -> None:
    assert list(untyped(ast.parse(source), "m")) == found


def test_no_public_signature_takes_anything() -> None:
    found = {name for module, tree in MODULES.items() for name in untyped(tree, module)}
    assert found == HOST_HOOKS


def arguments(kind: type) -> dict[str, Any]:
    """The keyword arguments of a class with their types."""
    names = [name for name in inspect.signature(kind).parameters if name != "self"]
    hints = get_type_hints(kind.__init__)
    return {name: hints[name] for name in names}


def test_what_data_classes_hand_on_are_the_arguments_of_their_base() -> None:
    from adv_classify import data as images
    from adv_landmark import data as landmarks

    assert get_type_hints(images.DataOptions) == arguments(images.ClassificationData)
    assert get_type_hints(landmarks.SpacedOptions) == arguments(landmarks.LandmarkData)


def test_the_arguments_of_an_attack_are_its_settings_and_a_seed() -> None:
    """Of every method, as its signature has them."""
    from advmed import METHODS, AttackOptions, AttackSettings

    options = set(get_type_hints(AttackOptions))
    assert options == {*arguments(AttackSettings), "seed"}
    for method in METHODS.values():
        given = {name: p for name, p in inspect.signature(method).parameters.items() if p.kind is p.VAR_KEYWORD}
        assert set(given) == ({"attack"} if method.name != "STD" else set())

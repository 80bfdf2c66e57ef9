"""The architecture, read off the source: who imports whom, and that nobody asks a method, a host or an attack its name.

Every import counts, those inside functions and for type checking alone included.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from advmed.attacks.names import _NOISE, _NUMBERED
from advmed.methods import METHODS

ROOT = Path(__file__).parents[1]
HOSTS = sorted(path.name for path in ROOT.glob("adv_*"))

GROUND = {
    "classification",
    "copies",
    "distributed",
    "norms",
    "distances",
    "documentation",
    "files",
    "guard",
    "clock",
    "objective",
    "progress",
    "margins",
    "thresholds",
    "lazy",
    "versions",
    "zoo",
}
LAYERS = [
    {"ground"},
    {"attacks"},
    {"methods"},
    {"training", "evaluation"},
    {"report"},
    {"search"},
    {"cli"},
    {"integrations"},
    {"hosts"},
    {"testing"},
]
"""From the ground up. A module imports from its own room and from lower layers; rooms of one layer not each other."""
CORE = {
    "jinja2",
    "jsonargparse",
    "lazy_loader",
    "matplotlib",
    "numpy",
    "packaging",
    "scipy",
    "shtab",
    "torch",
    "tqdm",
    "yaml",
}
"""What the core imports beside the standard library."""
FRAMEWORKS = {
    "advmed.integrations": {"lightning", "PIL", "safetensors"},
    "adv_classify": {"lightning", "timm", "torchattacks", "torchmetrics", "torchvision"},
    "adv_landmark": {"lightning", "PIL", "segmentation_models_pytorch", "timm", "torchvision"},
    "adv_nnunet": {"nnunetv2", "PIL"},
    "adv_yolo": {"ultralytics"},
}
"""Who imports what more."""


def sources() -> dict[str, ast.Module]:
    """The modules of the product by their dotted names; a package goes by its own name."""
    found = {}
    for folder in (ROOT / "common" / "advmed", *(ROOT / host for host in HOSTS)):
        for path in sorted(folder.rglob("*.py")):
            name = ".".join(path.relative_to(folder.parent).with_suffix("").parts).removesuffix(".__init__")
            found[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return found


MODULES = sources()


def imports(tree: ast.Module) -> Iterator[str]:
    """What a module imports: ``a.b`` for ``from a import b`` if that is a module of the product, else ``a``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports are written out in full"
            whole = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name if name in MODULES else node.module for name in whole)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield from (word.value for word in node.args if isinstance(word, ast.Constant))


def room(module: str) -> str:
    package, _, rest = f"{module}.".partition(".")
    first = rest.partition(".")[0]
    return "hosts" if package in HOSTS else "ground" if first in {"", *GROUND} else first


def edges() -> Iterator[tuple[str, str]]:
    """Imports of the product by the product."""
    for name, tree in MODULES.items():
        yield from ((name, other) for other in imports(tree) if other.partition(".")[0] in ("advmed", *HOSTS))


def test_every_import_is_seen() -> None:
    """The reader below all other tests, on a source that has one of each kind."""
    source = """
        import os, lightning.pytorch as pl
        from advmed.report import figures, Entry
        if TYPE_CHECKING:
            from advmed.norms import NORMS
        def late():
            import adv_yolo.trainer
            importlib.import_module("optuna.storages")
    """
    found = set(imports(ast.parse(re.sub("^ {8}", "", source, flags=re.MULTILINE))))
    named = {"os", "lightning.pytorch", "advmed.report.figures", "advmed.report", "advmed.norms", "adv_yolo.trainer"}
    assert found == named | {"optuna.storages"}
    assert {"advmed", "advmed.norms", "advmed.report.page", "adv_nnunet.trainers.advmed_nnunet_trainers"} <= {*MODULES}
    assert [room(name) for name in ("advmed", "advmed.norms", "advmed.report.page", "adv_yolo")] == [
        *("ground", "ground", "report", "hosts")
    ]
    assert len(set(edges())) > 200


def test_every_module_has_its_room() -> None:
    rooms = {room(name) for name in MODULES}
    assert rooms <= set().union(*LAYERS), "a new room or file of the ground floor has no layer yet"
    assert {name.split(".")[1] for name in MODULES if room(name) == "ground" and "." in name} == GROUND


def test_imports_point_down() -> None:
    height = {name: k for k, layer in enumerate(LAYERS) for name in layer}
    wrong = {
        (module, room(other))
        for module, other in edges()
        if room(other) != room(module) and height[room(other)] >= height[room(module)]
    }
    assert wrong == set()


def test_public_names_are_for_users() -> None:
    """The product imports from the modules themselves, so that the direction can be seen."""
    packages, taken = ("advmed", *HOSTS), set()
    for tree in MODULES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module in packages:
                taken |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in packages:
                taken.add(ast.unparse(node))
    assert taken - MODULES.keys() == {"advmed.__version__"}


def test_hosts_do_not_know_each_other() -> None:
    pairs = {(module.partition(".")[0], other.partition(".")[0]) for module, other in edges() if room(other) == "hosts"}
    assert pairs <= {(host, host) for host in HOSTS}


def test_only_hosts_and_integrations_know_frameworks() -> None:
    found: dict[str, set[str]] = {}
    for name, tree in MODULES.items():
        owner = next((owner for owner in FRAMEWORKS if f"{name}.".startswith(f"{owner}.")), "")
        owner = "optuna" if room(name) == "search" else "testing" if room(name) == "testing" else owner
        used = {other.partition(".")[0] for other in imports(tree)} - {"advmed", *HOSTS, *sys.stdlib_module_names}
        found.setdefault(owner, set()).update(used - CORE)
    found.pop("testing", None)
    assert found == {"": set(), "optuna": {"optuna"}, **FRAMEWORKS}


def test_long_work_is_watched_in_one_way() -> None:
    """By advmed.progress: nobody has bars, or lines on the way, of their own, nor those of a host."""
    assert {m for m, tree in MODULES.items() if any("tqdm" in n.lower() for n in imports(tree))} == {"advmed.progress"}


def test_there_are_no_cycles() -> None:
    graph = {name: {other for other in imports(tree) if other in MODULES} for name, tree in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


# Names

HOST_NAMES = {name: (host,) for host in HOSTS for name in (host, host.removeprefix("adv_"))}
METHOD_NAMES = {name: (kind.__module__,) for name, kind in METHODS.items()}
ATTACK_NAMES = {name: ("advmed.attacks", "adv_classify.external") for name in (*_NUMBERED, *_NOISE)}
OWNERS = HOST_NAMES | METHOD_NAMES | ATTACK_NAMES
"""A name, and the modules (or packages) that may compare with it: those of what it is the name of."""


def asked(tree: ast.Module) -> Iterator[str]:
    """The names of methods, hosts and attacks that a module compares something with, as texts or as classes.

    Comparisons (``==``, ``in``, ``is``), cases of ``match``, ``isinstance`` and ``issubclass``.
    """
    classes = {kind.__name__: name for name, kind in METHODS.items()}
    for node in ast.walk(tree):
        asks = isinstance(node, ast.Compare | ast.MatchValue | ast.MatchClass)
        asks |= isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass")
        for part in ast.walk(node) if asks else ():
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                word = re.sub(r"(?<=[a-z])\d+(x\d+)?$", "", part.value)
                if word in OWNERS:
                    yield word
            elif isinstance(part, ast.Name | ast.Attribute):
                word = ast.unparse(part).split(".")[-1]
                if word in classes:
                    yield classes[word]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("name == 'AMAT'", "AMAT"),
        ("method.name != 'STD'", "STD"),
        ("name in ('SAT', other)", "SAT"),
        ("name not in {'AT'}", "AT"),
        ("attack == 'pgd100x3'", "pgd"),
        ("attack == 'gaussian'", "gaussian"),
        ("host == 'nnunet'", "nnunet"),
        ("isinstance(method, methods.DPAAT)", "DPAAT"),
        ("issubclass(kind, SAT | TRADES)", "SAT TRADES"),
        ("isinstance(method, (AMAT, int))", "AMAT"),
        ("type(method) is AMAT", "AMAT"),
        ("match name:\n case 'AMAT': pass", "AMAT"),
        ("match method:\n case AMAT(): pass", "AMAT"),
        ("isinstance(method, AdversarialMethod) and name == 'ADI' and METHODS['AMAT']", ""),
    ],
)
def test_every_question_for_a_name_is_seen(source: str, name: str) -> None:
    assert " ".join(asked(ast.parse(source))) == name


def test_nobody_else_asks_for_a_name() -> None:
    assert set(METHOD_NAMES) >= {"STD", "AT", "SAT", "AMAT", "TRADES", "DPAAT"}
    found = [
        (module, name)
        for module, tree in MODULES.items()
        for name in asked(tree)
        if not any(f"{module}.".startswith(f"{owner}.") for owner in OWNERS[name])
    ]
    assert found == []

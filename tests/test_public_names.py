"""The public names: one list, which packages, API page and docstrings agree on, and whose examples run."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
import runpy
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType
from typing import Any, get_args, get_type_hints, is_typeddict

import pytest
from docstring_parser import DocstringStyle, parse

import advmed
from helpers.pages import python

ROOT = Path(__file__).parents[1]
HOSTS = {"adv_nnunet": "nnunet", "adv_yolo": "yolo", "adv_classify": "classify", "adv_landmark": "landmark"}
PACKAGES = ["advmed", *HOSTS]


def stub_names(package: str) -> list[str]:
    stub = ROOT / ("common/advmed" if package == "advmed" else package) / "__init__.pyi"
    imports = [node for node in ast.parse(stub.read_text()).body if isinstance(node, ast.ImportFrom)]
    return [str(alias.asname) for node in imports for alias in node.names]


def page_names(package: str) -> list[str]:
    page = (ROOT / "docs" / "api.md").read_text()
    section = page.split(f"\n## {package}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `(\w+)` \| \S.* \|$", section, re.MULTILINE)


@pytest.mark.parametrize("package", PACKAGES)
def test_stub_package_and_page_have_the_same_names(package: str) -> None:
    names = stub_names(package)
    module = importlib.import_module(package)
    assert names
    assert len(set(names)) == len(names)
    assert page_names(package) == names
    assert sorted(module.__all__) == sorted(names)
    assert set(names) <= set(dir(module))


EXAMPLES = [pytest.param(package, name, id=f"{package}.{name}") for package in PACKAGES for name in stub_names(package)]


@pytest.mark.parametrize(("package", "name"), EXAMPLES)
def test_the_example_of_a_name_runs(
    package: str, name: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, as a reader would paste it: it imports what it uses. Data, such as a dict, has no docstring of its own."""
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    if "ultralytics" not in sys.modules:  # the user's settings stay as they are
        monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path_factory.mktemp("ultralytics")))
    found = getattr(importlib.import_module(package), name)
    if not (inspect.isclass(found) or inspect.isfunction(found)):
        assert isinstance(found, (dict, tuple, str, int, float))
        return
    text = inspect.cleandoc(found.__doc__ or "")  # Python 3.13 takes the indentation off by itself
    assert "\nExample:\n" in text
    example = doctest.DocTestParser().get_doctest(text, {"__name__": "__main__"}, f"{package}.{name}", None, None)
    assert any(part.want for part in example.examples), "an example shows what comes out"
    report: list[str] = []
    failed, _ = doctest.DocTestRunner(verbose=False).run(example, out=report.append)
    assert not failed, "".join(report)


# What a docstring says


def load(package: str, name: str) -> Any:
    return getattr(importlib.import_module(package), name)


def is_ours(found: Any) -> bool:
    return str(getattr(found, "__module__", "")).partition(".")[0] in PACKAGES


def is_public(found: Any) -> bool:
    return any(found.__name__ in stub_names(package) and load(package, found.__name__) is found for package in PACKAGES)


def described(found: Any) -> set[str]:
    """The arguments and attributes that a docstring tells of."""
    params = parse(inspect.cleandoc(found.__doc__ or ""), DocstringStyle.GOOGLE).params
    return {param.arg_name.lstrip("*") for param in params if (param.description or "").strip()}


def arguments_of(found: Any) -> set[str]:
    """What a class or a function is called with; the fields of a TypedDict."""
    if is_typeddict(found):
        return set(found.__annotations__)
    if getattr(found, "_is_protocol", False):  # nobody makes one
        return set()
    return {name for name in inspect.signature(found).parameters if not name.startswith("_")}


def handed_on(found: Any) -> list[type]:
    """The TypedDicts that ``**options`` of a class or a function take their names from."""
    function = found.__init__ if inspect.isclass(found) else found
    if not isinstance(function, FunctionType) or not is_ours(function):
        return []
    variable = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.VAR_KEYWORD]
    return [get_args(get_type_hints(function)[name])[0] for name in variable]


def undescribed(found: Any, settings: set[str]) -> set[str]:
    """The arguments that neither the docstring tells of nor that of a public base, which the page links.

    Args:
        found: a class or a function.
        settings: names of the classes whose fields docs/settings.md describes, for docstrings that name that page.
    """
    bases = found.__mro__[1:] if inspect.isclass(found) and not is_typeddict(found) else ()
    told = described(found).union(*(described(base) for base in bases if is_ours(base) and is_public(base)))
    if "docs/settings.md" in (found.__doc__ or ""):
        told |= set().union(*(described(base) for base in bases if base.__name__ in settings))
    maker = next((base for base in (found, *bases) if "__init__" in vars(base)), found)
    if not is_ours(maker) and maker.__name__ in (found.__doc__ or ""):  # the host's own, and the docstring names it
        return set()
    return arguments_of(found) - told


def is_written(function: Any) -> bool:
    """Whether it is a function of ours, and not one that ``dataclass`` has made."""
    return isinstance(function, FunctionType) and is_ours(function) and function.__code__.co_filename[0] != "<"


def tree_of(function: FunctionType) -> ast.Module:
    return ast.parse(textwrap.dedent(inspect.getsource(function)))


def may_raise(function: Any, owner: type | None = None, seen: frozenset[Any] = frozenset()) -> bool:
    """Whether a function of ours holds a ``raise``, or calls one of ours that does.

    Args:
        function: of ours.
        owner: the class of a method, to follow ``super()``.
        seen: functions that are being looked at.
    """
    if not is_written(function) or function in seen:
        return False
    seen |= {function}
    for node in ast.walk(tree_of(function)):
        if isinstance(node, ast.Raise):
            return True
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name):
            called = function.__globals__.get(node.func.id)
            if inspect.isclass(called) and construction_raises(called, seen):
                return True
            if not inspect.isclass(called) and may_raise(called, None, seen):
                return True
        elif isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "super()" and owner is not None:
            name = node.func.attr
            defined = next(base for base in owner.__mro__ if vars(base).get(name) is function)
            later = owner.__mro__[owner.__mro__.index(defined) + 1 :]
            following = next((vars(base)[name] for base in later if name in vars(base)), None)
            if may_raise(following, owner, seen):
                return True
    return False


def construction_raises(kind: type, seen: frozenset[Any] = frozenset()) -> bool:
    return any(may_raise(getattr(kind, name, None), kind, seen) for name in ("__init__", "__post_init__"))


def unsaid_errors(found: Any) -> Iterator[str]:
    """What raises an error and whose docstring has no Raises: the function, the construction, public methods."""

    def says(text: str | None) -> bool:
        return "\nRaises:\n" in inspect.cleandoc(text or "")

    if not inspect.isclass(found):
        if may_raise(found) and not says(found.__doc__):
            yield found.__name__
        return
    makers = {name: getattr(found, name, None) for name in ("__init__", "__post_init__")}
    bases = [base for base in found.__mro__[1:] if is_ours(base) and is_public(base)]
    handed_down = any(
        makers == {name: getattr(base, name, None) for name in makers} for base in bases if says(base.__doc__)
    )
    if construction_raises(found) and not handed_down and not says(found.__doc__):
        yield found.__name__
    for name, member in vars(found).items():
        function: Any = getattr(member, "fget", getattr(member, "__func__", member))
        public = name == "__call__" or not name.startswith("_")
        if not public or not is_written(function) or says(function.__doc__):
            continue
        if any(isinstance(node, ast.Raise) for node in ast.walk(tree_of(function))):
            yield f"{found.__name__}.{name}"


class Sum:
    """A sum.

    Args:
        first: a number.
    """

    def __init__(self, first: float, second: float) -> None:
        if first > second:
            raise ValueError("first > second")
        self.value = first + second

    def half(self) -> float:
        """Half of it."""
        if self.value < 0:
            raise ValueError("value < 0")
        return self.value / 2


class Sums(Sum):
    """Sums.

    Args:
        *more: numbers.

    Raises:
        ValueError: if they are in no order.
    """

    def __init__(self, *more: float) -> None:
        super().__init__(*more)


def total(first: float, second: float) -> float:
    """Their sum."""
    return Sums(first, second).value


def test_what_is_not_described_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """In classes and functions that stand for ours: arguments, and errors, inherited and of what they call, too."""
    monkeypatch.setitem(globals(), "PACKAGES", [*PACKAGES, __name__.partition(".")[0]])
    monkeypatch.setitem(globals(), "is_public", lambda found: False)
    assert [undescribed(found, set()) for found in (Sum, Sums, total)] == [{"second"}, set(), {"first", "second"}]
    assert [list(unsaid_errors(found)) for found in (Sum, Sums, total)] == [["Sum", "Sum.half"], [], ["total"]]
    monkeypatch.setattr(Sums, "__doc__", "Sums.")
    assert list(unsaid_errors(Sums)) == ["Sums"]
    assert insides("from advmed.methods import AMAT\nimport advmed.clock\nfrom advmed import AMAT, nothing") == [
        "advmed.methods.AMAT",
        "advmed.clock",
        "advmed.nothing",
    ]


CODE = [
    pytest.param(package, name, id=f"{package}.{name}")
    for package in PACKAGES
    for name in stub_names(package)
    if name != "METHODS"
]
ROLE = re.compile(r":(class|func|meth|attr|mod|data|exc):`~?([^`]+)`")


@pytest.mark.parametrize(("package", "name"), CODE)
def test_every_argument_is_described(package: str, name: str) -> None:
    settings = set(runpy.run_path(str(ROOT / "docs" / "_site" / "reference.py"))["CORE"])
    found = load(package, name)
    assert not undescribed(found, settings)
    for options in handed_on(found):
        told = described(options).union(*(described(b) for b in (found, *found.__mro__) if is_ours(b) and is_public(b)))
        assert set(options.__annotations__) <= told, f"the fields of {options.__name__}"


@pytest.mark.parametrize(("package", "name"), CODE)
def test_every_error_is_described(package: str, name: str) -> None:
    assert list(unsaid_errors(load(package, name))) == []


@pytest.mark.parametrize(("package", "name"), CODE)
def test_docstrings_lead_to_public_names_only(package: str, name: str) -> None:
    """What they refer to, and what their examples import."""
    found = load(package, name)
    text = inspect.cleandoc(found.__doc__ or "")
    public = {name for package in PACKAGES for name in stub_names(package)}
    for kind, target in ROLE.findall(text):
        if target.partition(".")[0] in ("torch", "numpy", "lightning"):
            continue
        parts = target.split(".")
        own = kind in ("meth", "attr") and len(parts) == 1
        named = parts[-2] if kind in ("meth", "attr") and not own else parts[-1]
        assert own or named in public, f"{target} is an inside"
    for example in doctest.DocTestParser().get_examples(text):
        assert not insides(example.source)


def insides(code: str) -> list[str]:
    """What code imports of ours that is no public name."""
    imports = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import | ast.ImportFrom)]
    found = []
    for node in imports:
        if isinstance(node, ast.Import):
            found += [
                alias.name for alias in node.names if alias.name.partition(".")[0] in PACKAGES and "." in alias.name
            ]
        elif str(node.module).partition(".")[0] in PACKAGES:
            public = stub_names(str(node.module)) if node.module in PACKAGES else []
            found += [f"{node.module}.{alias.name}" for alias in node.names if alias.name not in public]
    return found


PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
NAMED = re.compile(r"(?<![\w./])((?:advmed|adv_\w+)(?:\.\w+)+)(?!\w*/\d)")  # no format, such as advmed.report/2
FOR_CONTRIBUTORS = {"architecture.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_tell_to_import_public_names_only(page: Path) -> None:
    """In blocks of Python; and what they name in the text, or as a class in a configuration, ends in a public name."""
    text = page.read_text(encoding="utf-8")
    fence = re.compile(r"^( *)```python[^\n]*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
    for _, code in fence.findall(text):
        assert not insides(textwrap.dedent(code))
    if page.name in FOR_CONTRIBUTORS:
        return
    for name in NAMED.findall(re.sub(r"(?m)^.*`advmed\.testing`.*$", "", text)):
        package, *parts = name.split(".")
        if package in PACKAGES and find_spec(f"{package}.{parts[0]}") is not None:
            assert set(parts) & set(stub_names(package)), f"{name} is an inside"


PAPER = re.compile(r"\barXiv \d{4}\.\d{5}\b|\b(?:19|20)\d\d\b")
PLACE = re.compile(r"\b(?:[Aa]lgorithms?|eqs?\.|equations?|[Ss]ections?|Appendix)\s[\dA-Z]|\bf_\d")
NO_PAPER = {"Attack", "AttackLoss", "AttackResult", "Noise", "Terms", "STD"}
"""Attacks and methods that are nobody's, and what attacks have in common."""
NO_PLACE = {"Standard": "ours", "DPAAT": "summary"}
"""What is of no one place, and the word by which its docstring says why: a recipe of ours, a paper not at hand."""
OF_PAPERS = {
    "advmed": ["MarginStore", "RunningThresholds", "TermStatistics", "Thresholds", "adi", "auc_robust", "tvdi"],
    "adv_landmark": ["LandmarkObjective", "RobustLandmarks", "decode", "encode"],
}


def of_papers() -> Iterator[tuple[str, str]]:
    """Attacks, losses to attack with, methods and their trainers, and what else of the papers is public."""
    for package in PACKAGES:
        for name in stub_names(package):
            found = load(package, name)
            attacks = str(getattr(found, "__module__", "")).startswith("advmed.attacks")
            method = found.__name__ if found in advmed.METHODS.values() else getattr(found, "method_name", "STD")
            if (attacks and name not in NO_PAPER) or method != "STD" or name in OF_PAPERS.get(package, []):
                yield package, name


def test_what_papers_have_described_cites_them_and_says_where() -> None:
    named = list(of_papers())
    assert len(named) > 35
    for package, name in named:
        text = inspect.cleandoc(load(package, name).__doc__ or "").partition("\nExample:\n")[0]
        assert PAPER.search(text), f"{package}.{name} names no paper"
        why = next((word for key, word in NO_PLACE.items() if key in name), None)
        assert PLACE.search(text) or (why is not None and why in text), f"{package}.{name} does not say where"


def test_a_missing_host_is_named_with_its_extra(tmp_path: Path) -> None:
    """And what needs PyTorch only does not miss it."""
    asked = {"adv_nnunet": ("SampleTerms", "nnunetv2"), "adv_yolo": ("attack", "ultralytics")}
    asked |= {"adv_classify": ("Network", "timm"), "adv_landmark": ("Network", "segmentation_models_pytorch")}
    code = "import importlib, sys\n"
    code += f"sys.modules.update(dict.fromkeys({[package for _, package in asked.values()]}))\n"
    code += f"for package, (name, _) in {asked}.items():\n"
    code += "    try:\n        getattr(importlib.import_module(package), name)\n"
    code += "    except ImportError as error:\n        print(error)\n"
    code += "from adv_classify import ClassificationObjective\nprint(ClassificationObjective.names)"
    *messages, names = python(tmp_path, code).splitlines()
    for (package, (name, host)), message in zip(asked.items(), messages, strict=True):
        install = rf"which is not installed: pip install 'advmed\[{HOSTS[package]}\]'"
        assert re.fullmatch(rf"{package}\.{name} needs {host}(\.\w+)?, {install}", message)
    assert names == "('ce',)"


def test_the_version_is_that_of_the_distribution() -> None:
    assert advmed.__version__ == version("advmed")


@pytest.mark.parametrize("place", ["common.py", "common/__init__.py"])
def test_a_common_of_the_user_is_not_in_the_way(place: str, tmp_path: Path) -> None:
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("MINE = True\n")
    code = "import common\nfrom adv_classify import ClassificationObjective\nprint(common.MINE)"
    assert python(tmp_path, code) == "True"


def test_nothing_but_the_packages_is_installed(tmp_path: Path) -> None:
    """By a wheel, and by an editable installation, where the folders of the repository lie beside the packages."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    site = tmp_path / "site"
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    strangers = ["tests", "docs", "examples", "benchmarks", "common"]
    look = "from importlib.util import find_spec\nimport os\n"
    look += f"specs = [spec for spec in map(find_spec, {strangers}) if spec is not None]\n"
    look += f"ours = lambda spec: any(os.path.dirname(p) == {str(ROOT)!r} for p in spec.submodule_search_locations)\n"
    look += "print([spec.name for spec in specs if ours(spec)])"
    assert python(tmp_path, look) == "[]"
    code = f"import sys\nfrom importlib.util import find_spec\nsys.path.insert(0, {str(site)!r})\n"
    code += f"print([name for name in {[*PACKAGES, *strangers]} if find_spec(name) is not None])"
    assert python(tmp_path, code, "-S", "-E") == str(PACKAGES)

"""The public names: one list, which packages, API page and docstrings agree on, and whose examples run."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

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

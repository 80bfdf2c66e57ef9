"""What stands in several places of the project and must agree, and what a wheel shows and holds."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import advmed
from advmed.versions import ranges
from helpers.wheel import build_wheel

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    return zipfile.ZipFile(build_wheel(tmp_path_factory.mktemp("wheel")))


def test_the_version_is_one() -> None:
    """Of the packages, of the citation, and of the newest entry of the changelog that is not to come."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]
    entries = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert entries[0] == "Unreleased"
    assert cited == entries[1] == advmed.__version__


def test_the_configurations_are_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    named = {str(path.relative_to(ROOT)) for path in ROOT.glob("adv_*/configurations/*.yaml")}
    assert len(named) >= 10
    assert named <= set(wheel.namelist())
    assert "advmed/tested.toml" in wheel.namelist()


def test_the_pages_are_in_the_wheel_with_what_they_link_to(wheel: zipfile.ZipFile) -> None:
    """Without pictures, and without what makes the site."""
    pages = {str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md") if ".ruff_cache" not in path.parts}
    found = {name.removeprefix("advmed/") for name in wheel.namelist() if name.startswith("advmed/docs/")}
    assert found == pages
    for page in pages:
        for target in re.findall(r"\]\((?!https?:)([^)#\s]+\.md)", (ROOT / page).read_text("utf-8")):
            inside = (ROOT / page).parent.joinpath(target).resolve()
            assert not inside.is_relative_to(ROOT / "docs") or str(inside.relative_to(ROOT)) in found, (page, target)


def test_an_editable_install_has_the_pages_of_the_clone(tmp_path: Path) -> None:
    """And no copy of them, which would be those of the day of the installation."""
    code = f"from hatchling.build import build_editable; print(build_editable({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    named = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert not [name for name in named if name.endswith(".md") or name.startswith("advmed/")]


def test_the_readme_of_the_wheel_leads_nowhere_wrong(wheel: zipfile.ZipFile) -> None:
    """Its links to files of the repository are plain words; nothing else has changed."""
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    shown = str(message_from_bytes(wheel.read(name)).get_payload(decode=True), "utf-8")
    readme = (ROOT / "README.md").read_text()
    link = r"\[([^\]]+)\]\(([^)]+)\)"
    assert {target for _, target in re.findall(link, shown)} == {
        target for _, target in re.findall(link, readme) if target.startswith("https://")
    }
    assert shown.strip() == re.sub(link, lambda found: found[0] if "://" in found[2] else found[1], readme).strip()


def test_links_of_the_readme_work_in_the_repository() -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", (ROOT / "README.md").read_text()):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_every_address_of_the_project_is_real() -> None:
    """No place that is made up: the papers, and whatever the repository is once it has an address."""
    assert PROJECT["urls"]
    assert all(url.startswith("https://") and "example" not in url for url in PROJECT["urls"].values())


def test_lower_bounds_are_what_was_tested() -> None:
    """The oldest version of a package that was tested is the first that pyproject.toml allows, where it names one."""
    lines = [*PROJECT["dependencies"], *(line for part in PROJECT["optional-dependencies"].values() for line in part)]
    bounds: dict[str, set[str]] = {}
    for requirement in map(Requirement, lines):
        for part in requirement.specifier:
            assert part.operator == ">=", "upper bounds only where a break is known"
            bounds.setdefault(canonicalize_name(requirement.name), set()).add(part.version)
    for name, known in ranges().items():
        (bound,) = bounds[name]
        assert Version(bound) == Version(known.oldest)
        assert Version(known.oldest) <= Version(known.newest)

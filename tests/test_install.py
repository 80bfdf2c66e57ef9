"""What `pip install advmed[nnunet]` must leave behind, checked in fresh interpreters of the installed environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest

from advmed.methods import METHODS

VARIABLE = "nnUNet_extTrainer"
HOOK = Path(__file__).parents[1] / "adv_nnunet" / "advmed_nnunet.pth"
SHOW = f"import os; print(os.environ.get({VARIABLE!r}))"


def python(code: str, *flags: str, value: str | None = None, cwd: Path | None = None) -> str:
    """Run `code` in a new interpreter with the variable set to `value` (None: unset); stderr must stay empty."""
    env = {k: v for k, v in os.environ.items() if k != VARIABLE}
    if value is not None:
        env[VARIABLE] = value
    done = subprocess.run([sys.executable, *flags, "-c", code], env=env, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.strip()


@pytest.fixture(scope="module")
def trainers() -> str:
    """The shim folder of the installed package, as an interpreter outside the repository sees it."""
    code = "import adv_nnunet, os; print(os.path.join(os.path.dirname(adv_nnunet.__file__), 'trainers'))"
    folder = python(code, cwd=Path(sys.prefix))
    assert Path(folder).is_dir()
    return folder


def same(left: str, right: str) -> bool:
    return os.path.normcase(os.path.realpath(left)) == os.path.normcase(os.path.realpath(right))


# --- the installed environment ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["-I"]])
@pytest.mark.parametrize("value", [None, "", f"/mine{os.pathsep}/my others"])
def test_the_variable_is_set_at_start(value: str | None, flags: list[str], trainers: str, tmp_path: Path) -> None:
    """A value of the user stays in front; an empty one counts as none. Isolated mode has it, too."""
    front = value + os.pathsep if value else ""
    got = python(SHOW, *flags, value=value, cwd=tmp_path)
    assert got.startswith(front)
    assert same(got.removeprefix(front), trainers)


@pytest.mark.parametrize("value", [None, "/somewhere/else"])
def test_nested_interpreters_do_not_add_it_twice(value: str | None, trainers: str, tmp_path: Path) -> None:
    nested = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {SHOW!r}]))"
    got = python(nested, value=value, cwd=tmp_path)
    assert got == python(SHOW, value=value, cwd=tmp_path)
    assert [same(part, trainers) for part in got.split(os.pathsep)].count(True) == 1


def test_start_up_imports_nothing_of_ours(tmp_path: Path) -> None:
    code = "import sys; print([m for m in ('torch', 'numpy', 'adv_nnunet', 'advmed', 'nnunetv2') if m in sys.modules])"
    assert python(code, cwd=tmp_path) == "[]"


@pytest.mark.slow
def test_stock_nnunet_finds_our_trainers_and_those_of_the_user(tmp_path: Path) -> None:
    """The stock look-up finds each class, finds the same class again, and it survives pickling (spawned workers)."""
    (tmp_path / "theirs.py").write_text(
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n\n\n"
        "class nnUNetTrainerOfTheUser(nnUNetTrainer):\n    pass\n"
    )
    names = [f"nnUNetTrainer{name}" for name in METHODS]
    code = (
        "import pickle\n"
        "from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find\n"
        f"for name in {names}:\n"
        "    found = find(name)\n"
        "    assert found is find(name), f'a second look-up of {name} gave another class'\n"
        "    assert pickle.loads(pickle.dumps(found)) is found\n"
        "    print('FOUND', found.__module__, found.__name__)\n"
        "print('FOUND', find('nnUNetTrainerOfTheUser').__name__)"
    )
    env = os.environ | {VARIABLE: str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    *found, theirs = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("FOUND")]
    assert theirs == ["nnUNetTrainerOfTheUser"]
    assert [name for _, name in found] == names
    assert all(module.startswith("adv_nnunet.") for module, _ in found), "only a shim is forgotten by the host"


def test_the_distribution_is_complete(tmp_path: Path) -> None:
    installed = distribution("advmed")
    scripts = {e.name: e.value for e in installed.entry_points if e.group == "console_scripts"}
    assert (scripts["adv-nnunet"], scripts["adv-yolo"]) == ("adv_nnunet.cli:main", "adv_yolo.cli:main")
    assert installed.metadata["License-Expression"] == "Apache-2.0"
    needed = ["advmed/py.typed", "adv_nnunet/py.typed", "adv_yolo/py.typed", "advmed/report/template.html"]
    code = (
        "from importlib.resources import files\n"
        f"for package, _, name in (path.partition('/') for path in {needed}):\n"
        "    print(files(package).joinpath(name).is_file())"
    )
    assert python(code, cwd=tmp_path).split() == ["True"] * len(needed), f"one of {needed} is missing"


# --- the hook by itself ----------------------------------------------------------------------------------------------
# `-S` keeps the environment's own site-packages out; site.addsitedir then treats a folder of ours like one.


def process(folder: Path, *, value: str | None = None, more: str = "") -> str:
    code = f"import os, site, sys\n{more}\nsite.addsitedir({str(folder)!r})\nprint(os.environ.get({VARIABLE!r}))"
    return python(code, "-S", "-E", value=value, cwd=Path(sys.prefix))


@pytest.fixture
def fake_site(tmp_path: Path) -> Path:
    """A site-packages folder, its path with a blank and an umlaut, that holds the hook and an empty shim folder."""
    folder = tmp_path / "site päckages"
    (folder / "adv_nnunet" / "trainers").mkdir(parents=True)
    for file in (HOOK, HOOK.with_name("advmed_nnunet_startup.py")):
        shutil.copy(file, folder)
    return folder


def test_the_hook_is_one_import_line() -> None:
    (line,) = HOOK.read_bytes().splitlines()  # Python runs a .pth file line by line
    assert line.startswith(b"import ") and line.isascii()


def test_newer_pythons_call_the_same_function(fake_site: Path) -> None:
    """PEP 829: from 3.15 on the line of the .pth file gives way to the entry point of the .start file."""
    entry = HOOK.with_suffix(".start").read_text().strip()
    assert entry.replace(":", ".") in HOOK.read_text()
    code = f"import os, sys\nfrom pkgutil import resolve_name\nsys.path.append({str(fake_site)!r})\n"
    code += f"resolve_name({entry!r})()\nprint(os.environ.get({VARIABLE!r}))"
    assert python(code, "-S", "-E", cwd=Path(sys.prefix)) == str(fake_site / "adv_nnunet" / "trainers")


def test_a_child_of_another_environment_finds_the_stock_trainers(trainers: str, tmp_path: Path) -> None:
    """It inherits the variable, but has no package of ours: the folder then holds no trainers, and breaks nothing."""
    shim = Path(trainers) / "advmed_nnunet_trainers.py"
    code = f"import runpy\nprint([name for name in runpy.run_path({str(shim)!r}) if name.startswith('nnUNet')])"
    assert python(code, "-S", "-E", cwd=tmp_path) == "[]"


@pytest.mark.parametrize("twice", [False, True])
def test_the_hook_adds_its_folder_once(fake_site: Path, twice: bool) -> None:
    again = f"site.addsitedir({str(fake_site)!r})" if twice else ""
    assert process(fake_site, more=again) == str(fake_site / "adv_nnunet" / "trainers")


def test_an_editable_install_points_elsewhere(tmp_path: Path, fake_site: Path) -> None:
    shutil.move(fake_site / "adv_nnunet", tmp_path / "check out" / "adv_nnunet")
    (fake_site / "_editable_impl_advmed.pth").write_text(str(tmp_path / "check out") + "\n", encoding="utf-8")
    assert process(fake_site) == str(tmp_path / "check out" / "adv_nnunet" / "trainers")


@pytest.mark.parametrize("left", ["", "adv_nnunet", "adv_nnunet/trainers"])
def test_a_half_removed_package_changes_nothing(fake_site: Path, left: str) -> None:
    """The package is gone, or a file is in the place of a folder."""
    shutil.rmtree(fake_site / "adv_nnunet")
    if left:
        (fake_site / left).parent.mkdir(exist_ok=True)
        (fake_site / left).write_text("")
    assert process(fake_site) == "None"
    assert process(fake_site, value="/mine") == "/mine"


@pytest.mark.parametrize("break_it", ["sys.path.insert(0, None)", "sys.path.insert(0, '\\0')", "os.path.isdir = None"])
def test_the_hook_never_raises_nor_prints(break_it: str, fake_site: Path) -> None:
    process(fake_site, more=break_it)  # python() fails on a non-zero exit and on anything written to stderr

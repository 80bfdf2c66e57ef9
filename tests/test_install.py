"""What `pip install advmed[nnunet]` must leave behind, checked in fresh interpreters of the installed environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest

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


def test_the_variable_is_set_at_start(trainers: str, tmp_path: Path) -> None:
    assert same(python(SHOW, cwd=tmp_path), trainers)


def test_a_value_of_the_user_stays_in_front(trainers: str, tmp_path: Path) -> None:
    own = os.pathsep.join([str(tmp_path / "mine"), str(tmp_path / "my others")])
    got = python(SHOW, value=own, cwd=tmp_path)
    assert got.startswith(own + os.pathsep)
    assert same(got[len(own) + 1 :], trainers)


def test_an_empty_value_counts_as_unset(trainers: str, tmp_path: Path) -> None:
    assert same(python(SHOW, value="", cwd=tmp_path), trainers)


@pytest.mark.parametrize("value", [None, "/somewhere/else"])
def test_nested_interpreters_do_not_add_it_twice(value: str | None, trainers: str, tmp_path: Path) -> None:
    nested = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {SHOW!r}]))"
    got = python(nested, value=value, cwd=tmp_path)
    assert got == python(SHOW, value=value, cwd=tmp_path)
    assert [same(part, trainers) for part in got.split(os.pathsep)].count(True) == 1


def test_isolated_mode_has_it_too(trainers: str, tmp_path: Path) -> None:
    assert same(python(SHOW, "-I", cwd=tmp_path), trainers)


def test_start_up_imports_nothing_of_ours(tmp_path: Path) -> None:
    code = "import sys; print([m for m in ('torch', 'numpy', 'adv_nnunet', 'advmed', 'nnunetv2') if m in sys.modules])"
    assert python(code, cwd=tmp_path) == "[]"


def test_stock_nnunet_finds_the_trainers(tmp_path: Path) -> None:
    """The stock look-up finds each class, finds the same class again, and it survives pickling (spawned workers)."""
    names = [f"nnUNetTrainer{method}" for method in ("AMAT", "SAT", "AT", "STD", "TRADES", "DPAAT")]
    code = (
        "import pickle\n"
        "from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find\n"
        f"for name in {names}:\n"
        "    found = find(name)\n"
        "    assert found is find(name), f'a second look-up of {name} gave another class'\n"
        "    assert pickle.loads(pickle.dumps(found)) is found\n"
        "    print('FOUND', found.__module__, found.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("FOUND")]
    assert [name for _, name in found] == names
    assert all(module.startswith("adv_nnunet.") for module, _ in found), "only a shim is forgotten by the host"


def test_trainers_of_the_user_are_found_beside_ours(tmp_path: Path) -> None:
    (tmp_path / "theirs.py").write_text(
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n\n\n"
        "class nnUNetTrainerOfTheUser(nnUNetTrainer):\n    pass\n"
    )
    code = (
        "from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find\n"
        "print(find('nnUNetTrainerOfTheUser').__name__, find('nnUNetTrainerAMAT').__name__)"
    )
    env = os.environ | {VARIABLE: str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().splitlines()[-1] == "nnUNetTrainerOfTheUser nnUNetTrainerAMAT"


def test_the_distribution_is_complete(tmp_path: Path) -> None:
    installed = distribution("advmed")
    scripts = {e.name: e.value for e in installed.entry_points if e.group == "console_scripts"}
    assert scripts["adv-nnunet"] == "adv_nnunet.cli:main"
    assert scripts["adv-yolo"] == "adv_yolo.cli:main"
    assert installed.metadata["License-Expression"] == "Apache-2.0"
    for package, name in (
        ("advmed", "py.typed"),
        ("adv_nnunet", "py.typed"),
        ("adv_yolo", "py.typed"),
        ("advmed.report", "template.html"),
    ):
        code = f"from importlib.resources import files; print(files({package!r}).joinpath({name!r}).is_file())"
        assert python(code, cwd=tmp_path) == "True", f"{package}/{name} is missing from the installed package"


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        (
            "advmed.training.run, advmed.evaluation.loop, advmed.report, advmed.training.settings",
            ["nnunetv2", "ultralytics", "torchattacks"],
        ),
        ("adv_nnunet.trainer, adv_nnunet.evaluate, adv_nnunet.cli", ["ultralytics", "adv_yolo", "torchattacks"]),
        ("adv_yolo.trainer, adv_yolo.evaluate, adv_yolo.cli", ["nnunetv2", "adv_nnunet.trainer", "torchattacks"]),
    ],
    ids=["core", "nnunet", "yolo"],
)
def test_nobody_needs_another_host(modules: str, absent: list[str], tmp_path: Path) -> None:
    """All hosts are installed here, so that what a package imports has to be looked at."""
    code = f"import sys\nimport {modules}\nprint([name for name in {absent!r} if name in sys.modules])"
    env = os.environ | {"YOLO_CONFIG_DIR": str(tmp_path), "YOLO_OFFLINE": "true"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.stdout.strip().splitlines()[-1] == "[]", done.stdout + done.stderr


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
    lines = HOOK.read_bytes().splitlines()
    assert len(lines) == 1, "Python runs a .pth file line by line"
    assert lines[0].startswith(b"import ")
    assert lines[0].isascii()


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


def test_blanks_in_the_path(fake_site: Path) -> None:
    assert process(fake_site) == str(fake_site / "adv_nnunet" / "trainers")


def test_an_editable_install_points_elsewhere(tmp_path: Path, fake_site: Path) -> None:
    shutil.move(fake_site / "adv_nnunet", tmp_path / "check out" / "adv_nnunet")
    (fake_site / "_editable_impl_advmed.pth").write_text(str(tmp_path / "check out") + "\n", encoding="utf-8")
    assert process(fake_site) == str(tmp_path / "check out" / "adv_nnunet" / "trainers")


def test_a_half_removed_package_changes_nothing(fake_site: Path) -> None:
    shutil.rmtree(fake_site / "adv_nnunet")
    assert process(fake_site) == "None"
    assert process(fake_site, value="/mine") == "/mine"


def test_a_file_in_place_of_the_folder_changes_nothing(fake_site: Path) -> None:
    shutil.rmtree(fake_site / "adv_nnunet" / "trainers")
    (fake_site / "adv_nnunet" / "trainers").write_text("")
    assert process(fake_site) == "None"


@pytest.mark.parametrize("break_it", ["sys.path.insert(0, None)", "sys.path.insert(0, '\\0')", "os.path.isdir = None"])
def test_the_hook_never_raises_nor_prints(break_it: str, fake_site: Path) -> None:
    process(fake_site, more=break_it)  # python() fails on a non-zero exit and on anything written to stderr


def test_the_same_site_twice_adds_it_once(fake_site: Path) -> None:
    again = f"site.addsitedir({str(fake_site)!r})"
    assert process(fake_site, more=again) == str(fake_site / "adv_nnunet" / "trainers")

"""The networks of ``zoo/``: whole, small, and worth what their cards say in the stock host; and ``advmed zoo``."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from advmed import auc_robust
from advmed.cli.main import main
from advmed.zoo import CARD, FOLDER, Network, networks, read_card
from helpers.hosts import ROOT

NETWORKS = networks()
TASKS = sorted({network.folder.parent.name for network in NETWORKS})
OURS = ("advmed", "adv_nnunet", "adv_yolo", "adv_classify", "adv_landmark")
ALONE = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({OURS!r}))  # an import of any of them fails
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def named(network: Network) -> str:
    return network.name


def test_there_are_the_networks_of_every_task_whose_licence_allows_it() -> None:
    found = {network.name for network in NETWORKS}
    assert found >= {
        f"{task}/{method}" for task in ("hippocampus", "bccd", "pneumonia") for method in ("STD", "SAT", "AMAT")
    }
    assert "pneumonia/DPAAT" in found
    assert {network.licence for network in NETWORKS} == {"CC BY-SA 4.0", "MIT", "CC BY 4.0"}


def test_they_are_small_enough_for_a_clone() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 15e6


@pytest.mark.parametrize("network", NETWORKS, ids=named)
def test_the_files_are_those_of_the_card(network: Network) -> None:
    assert network.files
    assert network.damaged() == []
    extra = {path.relative_to(network.folder).as_posix() for path in network.folder.rglob("*") if path.is_file()}
    assert extra == {*network.files, CARD}


def task_of(network: Network) -> str:
    """What docs/zoo.md says of a network's task."""
    sections = (ROOT / "docs" / "zoo.md").read_text(encoding="utf-8").split("\n## ")
    (section,) = (section for section in sections if f"| `{network.name}` |" in section)
    return section


@pytest.mark.parametrize("network", NETWORKS, ids=named)
def test_the_card_is_that_of_the_report(network: Network) -> None:
    report = json.loads((network.folder.parent / "report.json").read_text())
    models = report["results"][network.metric]["models"]
    (model,) = (model for name, model in models.items() if name.startswith(network.folder.name))
    attack = model["attacks"]["standard" if network.attack.startswith("advmed-standard") else network.attack]
    assert network.values == pytest.approx(attack["values"], abs=1e-4)
    assert list(network.levels) == attack["levels"]
    assert network.auc_robust == pytest.approx(auc_robust(network.levels, network.values), abs=1e-3)
    assert list(network.values) == sorted(network.values, reverse=True), "more noise does not help"
    text = (network.folder / CARD).read_text()
    assert all(f"{value:.3f}" in text.split("---\n", 2)[2] for value in network.values)
    assert all(command in text for command in (*network.predict, *network.training))
    (name,) = (name for name in report["configuration"]["models"] if name.startswith(network.folder.name))
    attacked = json.loads(report["configuration"]["models"][name])["checkpoint"]
    said = "attacked before they were packed" in task_of(network)
    assert (attacked in network.files.values()) is not said, "another file was attacked than lies here"


@pytest.mark.slow
def test_the_page_and_the_cards_are_those_that_the_script_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    script = importlib.import_module("zoo")
    assert script.overview() == (ROOT / "docs" / "zoo.md").read_text(encoding="utf-8")
    for network in NETWORKS:
        assert script.page(network) == (network.folder / CARD).read_text(encoding="utf-8")


@pytest.mark.parametrize("task", TASKS)
def test_robust_networks_withstand_more_than_the_standard_one(task: str) -> None:
    values = {one.folder.name: one.auc_robust for one in NETWORKS if one.folder.parent.name == task}
    assert all(value > values["STD"] for name, value in values.items() if name != "STD")


@pytest.mark.parametrize("network", NETWORKS, ids=named)
def test_no_path_nor_id_of_the_training_is_left_in_the_files(network: Network) -> None:
    for file in network.files:
        content = (network.folder / file).read_bytes()
        for trace in (
            b"/build/zoo/",
            b"/nnUNet_",
            b"/home/",
            b"/tmp/",
            b"hippocampus_0",
            b"BloodImage_",
            b"optimizer_s",
        ):
            assert trace not in content, f"{trace!r} in {file}"


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_the_stock_host_finds_the_cards_number(task: str, tmp_path: Path) -> None:
    """In a process in which nothing of ours can be imported."""
    some = [network for network in NETWORKS if network.folder.parent.name == task]
    words = [sys.executable, "-c", ALONE, str(ROOT / "examples" / "stock.py"), *(str(one.folder) for one in some)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    for network in some:
        (found,) = re.findall(rf"(?m)^{re.escape(str(network.folder))}: (\S+)$", done.stdout)
        # Sums in another order on another machine may move a box or a voxel.
        assert float(found) == pytest.approx(network.embedded.value, abs=0.005), network.name


@pytest.mark.slow
def test_make_zoo_attacks_them_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """With fewer samples and steps."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    script = importlib.import_module("attack_zoo")
    monkeypatch.setattr(script, "ATTACK", "pgd2")
    monkeypatch.setattr(script, "SAMPLES", dict.fromkeys(script.SAMPLES, 4))
    attack = script.Attack(tmp_path)
    attack.run()
    text = capsys.readouterr().out
    for network in NETWORKS:
        assert re.search(rf"(?m)^  {network.folder.name} +0\.\d+ ", text)
    for task in TASKS:
        assert (attack.report(task) / "report.html").is_file()


def test_the_standard_weights_are_of_the_sizes_that_nnunet_says() -> None:
    (network,) = (network for network in NETWORKS if network.name == "hippocampus/AMAT")
    content = torch.load(network.folder / "fold_0" / "checkpoint_final.pth", weights_only=False)
    assert content["trainer_name"] == "nnUNetTrainer", "the stock one"
    assert all(bool(value.isfinite().all()) for value in content["network_weights"].values())


def test_the_list_and_the_page_of_a_network(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for network in NETWORKS:
        (line,) = (line for line in lines if line.startswith(f"{network.name} "))
        assert network.licence in line and f"{network.auc_robust:.3f}" in line
    assert main(["zoo", "zoo/hippocampus/amat/"]) == 0
    text = capsys.readouterr().out
    assert "nnUNetv2_predict_from_modelfolder" in text
    assert "208 training and 17 validation volumes" in " ".join(text.split())


def test_a_name_that_is_not_there_is_told_with_those_that_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo", "hippocampus/MART"]) != 0
    assert "there are bccd/STD" in capsys.readouterr().err


def test_a_damaged_file_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(FOLDER / "pneumonia", tmp_path / "zoo" / "pneumonia")
    (tmp_path / "zoo" / "pneumonia" / "STD" / "model.ckpt").write_bytes(b"half of it")
    assert main(["zoo", "pneumonia/STD", "--folder", str(tmp_path / "zoo")]) != 0
    assert "is not the file that the card was written for" in capsys.readouterr().err


def test_a_folder_without_networks_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo", "--folder", str(tmp_path)]) != 0
    assert "zoo of a clone" in capsys.readouterr().err


def test_an_installation_without_a_clone_says_where_the_networks_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("advmed.zoo.FOLDER", tmp_path / "zoo")
    assert main(["zoo"]) == 1
    said = capsys.readouterr().err
    assert "a wheel holds none" in said and "the folder zoo of a clone" in said and str(tmp_path) not in said


@pytest.mark.parametrize("text", ["no head", "---\nname: x\n---\n", "---\n[: \n---\n"])
def test_what_is_no_card_is_told(text: str, tmp_path: Path) -> None:
    (tmp_path / CARD).write_text(text)
    with pytest.raises(ValueError, match=r"no card|no YAML"):
        read_card(tmp_path / CARD)

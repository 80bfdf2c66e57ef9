"""``init`` of every host's command: what it writes, what it says, and that it overwrites nothing."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from advmed.cli.init import configurations
from helpers.hosts import ROOT

HOSTS = ("adv_classify", "adv_landmark", "adv_nnunet", "adv_yolo")


def run(host: str, *words: object) -> int:
    status: int = import_module(f"{host}.cli").main(["init", *map(str, words)])
    return status


@pytest.mark.parametrize("host", HOSTS)
def test_the_files_are_written_as_they_are(host: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And the command that is named for each takes it where it lies, a path with a space and an umlaut too."""
    folder = tmp_path / "my cönfigs" / "new"
    assert run(host, folder) == 0
    written = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert written == {path.name: path.read_bytes() for path in (ROOT / host / "configurations").iterdir()}
    assert any(name.startswith("search_") for name in written)
    said = capsys.readouterr().out
    named = [line for line in map(str.strip, said.splitlines()) if line.startswith(("adv", "nnUNet_adversarial="))]
    assert len(named) == len(written)
    for line, name in zip(named, sorted(written), strict=True):
        assert any(word.endswith(str(folder / name)) for word in shlex.split(line)), line


@pytest.mark.parametrize("host", HOSTS)
def test_every_file_begins_with_the_command_that_takes_it(host: str) -> None:
    for found in configurations(host):
        first, second, *_ = found.text.splitlines()
        assert first.startswith("# ") and found.name in first
        assert second.startswith("# "), "what it is for"
        assert yaml.safe_load(found.text)


def test_a_study_takes_the_configurations_that_are_written_beside_it() -> None:
    """In whatever folder; none is looked for where the search is called."""
    named = 0
    for host in HOSTS:
        names = {found.name for found in configurations(host)}
        for found in (found for found in configurations(host) if found.is_study):
            content = "\n".join(line for line in found.text.splitlines() if not line.startswith("#"))
            for path in re.findall(r"--config (\S+)", content):
                named += 1
                assert path.startswith("{here}/")
                assert path.removeprefix("{here}/") in names
    assert named


def test_names_are_no_twins() -> None:
    """Two hosts in one folder are not in each other's way."""
    names = [found.name for host in HOSTS for found in configurations(host)]
    assert len(set(names)) == len(names)


def test_nothing_is_overwritten_unless_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "table.yaml"
    mine.write_text("mine\n")
    assert run("adv_landmark") == 1
    message = capsys.readouterr().err
    assert "table.yaml would be overwritten, and nothing has been written" in message and "--overwrite" in message
    assert [path.name for path in tmp_path.iterdir()] == ["table.yaml"]
    assert mine.read_text() == "mine\n"
    assert run("adv_landmark", "--overwrite") == 0
    assert mine.read_text() == (ROOT / "adv_landmark/configurations/table.yaml").read_text()
    assert run("adv_landmark") == 0, "what is there already is in nobody's way"


def test_a_folder_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert run("adv_yolo", tmp_path / "file") == 1
    assert f"{tmp_path / 'file'} is no folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "place", "names"),
    [
        ("adv_classify", "examples/data/pneumoniamnist/pneumoniamnist.npz", "pneumoniamnist.yaml"),
        ("adv_landmark", "examples/data/hippocampus_landmarks", "search_landmark.yaml"),
        ("adv_yolo", "examples/data/bccd/bccd.yaml", "search_yolo.yaml"),
    ],
)
def test_data_that_only_a_clone_has_are_said_where_they_are_missing(
    host: str,
    place: str,
    names: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(host, "mine") == 0
    said = capsys.readouterr().out
    assert "in a clone of Advmed's repository, and not in this folder" in said
    assert f"  {place} (in {names})\n" in said
    assert (ROOT / place).exists()
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    assert run(host, "mine") == 0
    assert "repository" not in capsys.readouterr().out


@pytest.mark.parametrize("host", HOSTS)
def test_the_pages_that_are_named_are_there(host: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(host, tmp_path) == 0
    named = re.findall(r"^What .*: (\S+)$", capsys.readouterr().out, re.MULTILINE)
    assert [Path(path).name for path in named] == [f"{host.removeprefix('adv_')}.md", "search.md"]
    assert all(Path(path).is_file() for path in named)


def test_nnunets_settings_are_the_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file changes nothing as it is, and is found where the page says."""
    from adv_nnunet.settings import FILE, VARIABLE, Settings, find_settings

    monkeypatch.delenv(VARIABLE, raising=False)
    assert run("adv_nnunet", tmp_path) == 0
    settings, origin = find_settings(tmp_path)
    assert origin == str(tmp_path / FILE)
    assert settings == Settings()

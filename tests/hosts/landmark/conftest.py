"""The host under test, with its trainings, for all tests of this folder."""

from __future__ import annotations

import pytest

from helpers.landmark import Landmark


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Landmark:
    return Landmark(tmp_path_factory.mktemp("landmark"))


@pytest.fixture(autouse=True)
def own_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command leaves in its folder is looked for there."""
    monkeypatch.chdir(tmp_path_factory.mktemp("own"))

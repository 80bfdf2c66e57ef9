"""Both hosts, for what they share: each test of this folder that asks for a host is run with either."""

from __future__ import annotations

import pytest

from advmed.testing.lightning import LightningHost
from helpers.classify import Classify
from helpers.landmark import Landmark


@pytest.fixture(scope="session", params=[Classify, Landmark], ids=["classify", "landmark"])
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LightningHost:
    """Its images; nothing is trained."""
    made: LightningHost = request.param(tmp_path_factory.mktemp("host"))
    return made

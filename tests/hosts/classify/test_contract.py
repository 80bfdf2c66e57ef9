"""What every host on Lightning owes its users."""

from __future__ import annotations

import pytest

from advmed.testing.lightning import LightningInputContract, LightningTrainingContract


class TestInput(LightningInputContract):
    pass


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
class TestTraining(LightningTrainingContract):
    pass

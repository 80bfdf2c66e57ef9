"""What all tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers import models
from helpers.evaluations import leave_out_curves

pytest.register_assert_rewrite("advmed.testing.lightning", "helpers.audit")  # before anything imports them


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where several processes share the work, the long files come first, so that all processes end about together."""
    if hasattr(config, "workerinput"):
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tests run side by side with nnU-Net's processes on few cores; threads of tiny networks only wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the drawing of curves, which takes most of the time of a report."""
    leave_out_curves(monkeypatch)


@pytest.fixture(scope="session")
def audit() -> Callable[..., dict[str, Any]]:
    """See :func:`helpers.audit.audit`."""
    from helpers.audit import audit

    return audit


@pytest.fixture
def tiny() -> SimpleNamespace:
    """Tiny models and objectives."""
    return SimpleNamespace(
        Affine=models.Affine,
        Logistic=models.Logistic,
        Classifier=models.Classifier,
        Compared=models.Compared,
        cnn=models.cnn,
    )


@pytest.fixture(scope="session")
def chest() -> SimpleNamespace:
    """Chest X-rays, and small networks of them that are trained once."""
    return SimpleNamespace(xrays=models.xrays, trained=models.trained, Objective=models.Classifier)

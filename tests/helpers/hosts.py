"""What the tests of the hosts share: two processes side by side, checkpoints, tables, and pages that are typed in."""

from __future__ import annotations

import csv
import datetime
import hashlib
import json
import logging
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributions import Bernoulli, Categorical, kl_divergence
from torch.nn.parallel import DistributedDataParallel

from advmed import progress
from advmed.methods.base import Step

ROOT = Path(__file__).parents[2]
BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("adv_nnunet", "adv_yolo", "advmed"):
            raise ModuleNotFoundError(f"{name} is not installed here", name=name)

sys.meta_path.insert(0, Blocker())
"""
"""Code that makes Python behave as where our packages are not installed."""


class Interrupted(BaseException):
    """Ends a run of a host where a test wants it to end."""


def table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def margins_of(path: Path) -> dict[str, float]:
    """margins.csv as id -> margin."""
    return {row["id"]: float(row["margin"]) for row in table(path)}


def plain(value: Any) -> bool:
    """Whether a value is made of plain types only, which need no package of ours to be read."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and plain(entry) for key, entry in value.items())
    if isinstance(value, (list, tuple)):
        return type(value) in (list, tuple) and all(map(plain, value))
    return value is None or type(value) in (bool, int, float, str)


def different(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> list[str]:
    """Names of the entries that differ, bit for bit."""
    assert left.keys() == right.keys()
    return [name for name, value in left.items() if not torch.equal(value, right[name])]


def watched(method: Any, patch: Any) -> list[Step]:
    """What a method makes of every batch from here on."""
    made: list[Step] = []
    step = method.step
    patch.setattr(method, "step", lambda *given, **named: made.append(step(*given, **named)) or made[-1])
    return made


def overflow(patch: Any, row: int) -> None:
    """From here on the gradient of this sample of a batch is not finite in any step of an attack."""
    grad = torch.autograd.grad

    def overflowing(*given: Any, **named: Any) -> tuple[Tensor]:
        (gradient,) = grad(*given, **named)
        gradient[row] = math.inf
        return (gradient,)

    patch.setattr(torch.autograd, "grad", overflowing)


def as_on_a_terminal(patch: Any) -> None:
    """From here on bars are shown on the standard error, and at once."""
    patch.setattr(progress, "on_terminal", lambda: True)
    patch.setattr(progress, "_DELAY", 0.0)


def binary_divergence(clean: Tensor, other: Tensor) -> Tensor:
    """KL of independent yes-or-no predictions, summed over the second axis, in float64."""
    return kl_divergence(*(Bernoulli(logits=logits.double()) for logits in (clean, other))).sum(1)


def class_divergence(clean: Tensor, other: Tensor, axis: int = 1) -> Tensor:
    """KL of a choice of one among the entries of an axis, in float64."""
    return kl_divergence(*(Categorical(logits=logits.double().movedim(axis, -1)) for logits in (clean, other)))


@contextmanager
def listening(logger: logging.Logger) -> Iterator[list[str]]:
    """What a logger says, as "LEVEL: message"."""
    said: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: said.append(f"{record.levelname}: {record.getMessage()}")  # type: ignore[method-assign]  # a recorder
    logger.addHandler(listener)
    yield said
    logger.removeHandler(listener)


def mistake_of(main: Callable[[list[str]], int], capsys: Any, *words: Any) -> str:
    """The one message of a command that must fail."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 1
    message: str = capsys.readouterr().err
    assert "Traceback" not in message
    return message


# Several processes


def side_by_side(
    script: Path, folder: Path, *arguments: Any, world: int = 2, **environment: str
) -> list[dict[str, Any]]:
    """Runs a script in processes, ``script FOLDER RANK ARGUMENTS``, and returns what each wrote (see meeting)."""
    # And what this process imports from; an empty part would be the working folder.
    path = os.pathsep.join(filter(None, [str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "WORLD_SIZE": str(world), **environment}
    logs = [folder / f"rank_{rank}.log" for rank in range(world)]
    processes = []
    for rank, log in enumerate(logs):
        command = [sys.executable, str(script), str(folder), str(rank), *map(str, arguments)]
        own = os.environ | environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with log.open("wb") as out:
            processes.append(subprocess.Popen(command, env=own, stdout=out, stderr=subprocess.STDOUT))
    try:
        statuses = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert statuses == [0] * world, "\n".join(log.read_text()[-3000:] for log in logs)
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(world)]


@contextmanager
def meeting(folder: Path, rank: int) -> Iterator[dict[str, Any]]:
    """In such a script: meets the others over gloo; what is put into the dictionary is returned to the test."""
    torch.set_num_threads(1)
    address, patience = f"file://{folder / 'meeting'}", datetime.timedelta(seconds=120)
    world = int(os.environ["WORLD_SIZE"])
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world, timeout=patience)
    found: dict[str, Any] = {}
    yield found
    (folder / f"rank_{rank}.json").write_text(json.dumps(found, default=float))
    distributed.barrier()
    distributed.destroy_process_group()


class Wrapper(DistributedDataParallel):
    """Without the host's device ids; counts the passes through it that keep gradients: not those of a validation."""

    passes = 0

    def __init__(self, module: nn.Module, device_ids: Any = None, **settings: Any) -> None:
        super().__init__(module, **settings)

    def forward(self, *given: Any, **named: Any) -> Any:
        Wrapper.passes += torch.is_grad_enabled()
        return super().forward(*given, **named)


def recorded(trainer: Any, name: str, network: Callable[[], nn.Module]) -> dict[str, Any]:
    """After every call of a trainer's method that ends a step: its network's hash, and the passes through the wrapper.

    An attack that went through it would wait for the other process, and for a gradient of every weight.
    """
    found: dict[str, Any] = {"steps": [], "passes": []}
    method = getattr(trainer, name)

    def step(*given: Any) -> Any:
        result = method(*given)
        weights = [value.detach().numpy().tobytes() for value in network().parameters()]
        found["steps"].append(hashlib.sha256(b"".join(weights)).hexdigest())
        found["passes"].append(Wrapper.passes)
        Wrapper.passes = 0
        return result

    setattr(trainer, name, step)
    return found


def check_one_network(ranks: Sequence[Mapping[str, Any]], passes: Sequence[int]) -> None:
    """After every step the processes have the same network, another one than before, and so many passes behind them."""
    first, second = (rank["steps"] for rank in ranks)
    assert first == second
    assert len(set(first)) == len(first)
    assert [rank["passes"] for rank in ranks] == [list(passes)] * 2


def check_levels(ranks: Sequence[Mapping[str, Any]], thresholds: str) -> dict[str, Any]:
    """The processes have the same thresholds, which begin so, and noise levels, which are returned."""
    first, second = ranks
    assert first["method"] == second["method"]
    assert first["thresholds"] == second["thresholds"]
    assert first["thresholds"].startswith(thresholds)
    for key in (key for key in first["log"] if "margin" in key):
        assert first["log"][key] == second["log"][key]
    margins: dict[str, Any] = first["method"]["margins"]
    assert all(math.isfinite(value) and value >= 0 for value in margins["values"])
    return margins


# Pages


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def commands(page: str, *names: str) -> list[list[str]]:
    """The words of the commands of these names that a page tells to type, in their order."""
    lines = [line for block in blocks(page, "console") for line in block.splitlines()]
    words = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines if line.startswith("$ ")]
    return [line for line in words if line and line[0] in names]

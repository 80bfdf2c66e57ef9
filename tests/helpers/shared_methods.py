"""Methods and statistics on one of three processes, started by tests/ground/test_distributed.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from advmed.methods import AMAT, DPAAT
from advmed.testing.objectives import Classification
from advmed.thresholds import RunningThresholds, TermStatistics
from helpers.hosts import meeting

WORLD, EPOCHS, BATCHES = 3, 3, 4
DPAATS: dict[str, dict[str, Any]] = {
    "dpaat": {"sync_weight": 2.0},
    "dpaat epoch": {"sync_weight": 2.0, "average": "epoch"},
    "dpaat plain": {"sync_weight": 0.0},
}


def batch_of(rank: int, epoch: int, batch: int, shared: bool) -> tuple[list[str], Tensor, Tensor]:
    """Ids, images and labels of a batch: the ranks' own samples, or with ``shared`` samples that all may meet."""
    generator = torch.Generator().manual_seed(epoch * 100 + batch + 10 * rank)
    index = torch.randperm(10, generator=generator)[:3]
    owner = 0 if shared else rank
    table = torch.Generator().manual_seed(1000 + owner)
    images = torch.randn(10, 2, 6, generator=table)
    labels = torch.randint(0, 2, (10,), generator=table) * 2.0 - 1.0
    return [f"rank{owner}_{i}" for i in index.tolist()], images[index], labels[index]


def method_of(kind: str) -> AMAT:
    if kind == "secant":
        fast: Any = {"steps": 3, "step_scale": 1.75, "schedule": "decreasing", "start": "estimate"}
        return AMAT(0.25, [0.7], refinement="secant", train_on="crossing", margin_max=0.9, **fast)
    thresholds: Any = [0.7] if kind == "fixed" else RunningThresholds(["loss"], "mean+2std")
    return AMAT(0.25, thresholds, steps=4, step_scale=2.0, refinement="crossing", margin_max=0.9)


def train(method: AMAT, rank: int, epoch: int, shared: bool) -> None:
    weight = torch.randn(12, generator=torch.Generator().manual_seed(5))
    for batch in range(BATCHES):
        ids, images, labels = batch_of(rank, epoch, batch, shared)
        method.step(
            lambda x, labels=labels: torch.nn.functional.softplus(-labels * (x.flatten(1) @ weight))[:, None],
            images,
            ids,
        )


def amat_of(rank: int, kind: str, shared: bool) -> list[dict[str, Any]]:
    method, states = method_of(kind), []
    for epoch in range(EPOCHS):
        train(method, rank, epoch, shared)
        method.merge()
        states.append(method.state_dict())
    return states


class Share(Classification):
    """A process's part of a batch: attacked on the model itself, trained through what averages the gradients."""

    def __init__(self, model: nn.Module, network: nn.Module, labels: Tensor) -> None:
        super().__init__(model, labels)
        self.network = network

    def loss_and_predictions(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.network(images)
        terms = self.terms_of(logits)
        return terms.sum(1).mean(), terms.detach(), logits


def dpaat_of(rank: int, world: int, settings: dict[str, Any], rate: float = 0.5) -> dict[str, list[Any]]:
    """This process's share of every global batch of six of twelve samples, each met twice an epoch by one process."""
    generator = torch.Generator().manual_seed(8)
    images = torch.randn(12, 2, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (12,), generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(9)
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    network = DistributedDataParallel(model) if dist.is_initialized() else model
    optimiser = torch.optim.SGD(model.parameters(), rate)
    method = DPAAT(0.5, eps_min=0.2, step_size=0.1, steps=4, step_scale=2.0, **settings)
    found: dict[str, list[Any]] = {"gradients": [], "sizes": [], "increases": []}
    for _ in range(EPOCHS):
        method.begin_epoch()
        for batch in torch.randperm(12, generator=generator).split(6) * 2:
            mine = batch[rank::world]
            step = method.step(Share(model, network, labels[mine]), images[mine], [f"s{i}" for i in mine.tolist()])
            optimiser.zero_grad()
            step.loss.backward()
            found["gradients"].append(torch.cat([p.grad.flatten() for p in model.parameters()]).tolist())
            found["increases"].append(method.state_dict()["increases"])
            optimiser.step()
        method.merge()
        margins = method.state_dict()["margins"]
        found["sizes"].append(dict(zip(margins["ids"], margins["values"], strict=True)))
    return found


def terms_of(rank: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed(50 * rank + epoch)
    return torch.rand(5 + 3 * rank, 2, generator=generator, dtype=torch.float64) * (1 + rank)


def statistics_of(rank: int) -> dict[str, Any]:
    statistics = TermStatistics(["a", "b"])
    for epoch in range(EPOCHS):
        statistics.update(terms_of(rank, epoch))
    statistics.merge()
    return statistics.state_dict()


def running_of(rank: int, memory: float | None) -> list[dict[str, Any]]:
    running, states = RunningThresholds(["a", "b"], "mean", memory), []
    for epoch in range(EPOCHS):
        running.update(terms_of(rank, epoch))
        running.merge()
        if epoch == 0:
            running.begin()
        states.append(running.state_dict() | {"now": running.tensor(torch.zeros((), dtype=torch.float64)).tolist()})
    return states


if __name__ == "__main__":
    rank = int(sys.argv[2])
    with meeting(Path(sys.argv[1]), rank) as found:
        found |= {
            "amat": amat_of(rank, "fixed", shared=False),
            "amat shared": amat_of(rank, "fixed", shared=True),
            "amat running": amat_of(rank, "running", shared=True),
            "amat secant": amat_of(rank, "secant", shared=True),
            "statistics": statistics_of(rank),
            "running": running_of(rank, None),
            "running, fading": running_of(rank, 20.0),
            **{name: dpaat_of(rank, WORLD, settings) for name, settings in DPAATS.items()},
        }

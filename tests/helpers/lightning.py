"""A standard training of a host on Lightning beside a plain loop, and networks that are not as they begin."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from advmed.testing.lightning import LightningHost, moved, watched_steps

Loss = Callable[[nn.Module, Any], Tensor]


def shaken(model: nn.Module) -> None:
    """Changes weights, biases and statistics of a network: many begin with numbers that every network has."""
    generator = torch.Generator().manual_seed(1)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value += 0.1 * torch.rand(value.shape, generator=generator)


def check_plain_loop(
    host: LightningHost,
    folder: Path,
    patch: pytest.MonkeyPatch,
    data: Any,
    begun: str,
    model: nn.Module,
    loss: Loss,
    **changes: Any,
) -> None:
    """Trains by the host's command, and a network of its library by PyTorch and nothing else: the weights are the same.

    In float64: in float32 a rounding error at the kink of a ReLU grows to 1e-2 within few steps, for some weights.
    The part of the network that is called ``begun`` begins with the weights of a file; the loss is that of the network
    and a batch of the data.
    """
    watched, begin = watched_steps(patch, host.module), folder / "begin.pth"
    torch.save(model.get_submodule(begun).state_dict(), begin)
    changes |= {"optimizer": "SGD", "optimizer__lr": 0.05, "optimizer__momentum": 0.9}
    changes |= {"trainer__max_epochs": 2, "trainer__precision": "64-true", "model__network__weights": begin}
    run = host.fit(folder, **changes)
    start = {name.removeprefix("network.model."): value for name, value in watched.start.items()}
    for name, value in torch.load(begin).items():
        whole = f"{begun}.{name}".strip(".")
        assert whole not in start or torch.equal(start[whole].float(), value), whole
    for epoch in (watched.ids[: host.steps], watched.ids[host.steps :]):
        assert [len(ids) for ids in epoch] == [host.batch_size] * host.steps
        assert sorted(i for ids in epoch for i in ids) == sorted(data.train_ids)
    for name, parameter in model.double().named_parameters():
        parameter.data.copy_(start[name])
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    samples = {s["id"]: {**s, "image": s["image"].double()} for s in data.dataset("train")}
    model.train()
    for ids in watched.ids:
        optimizer.zero_grad()
        loss(model, default_collate([samples[i] for i in ids])).backward()
        optimizer.step()
    found = run.weights()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[f"network.model.{name}"], value, atol=1e-7, rtol=1e-6)
    assert moved(watched.start, found) > 1e-2

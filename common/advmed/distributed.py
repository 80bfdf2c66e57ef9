"""Several processes: those that train together, and those that share an evaluation.

An evaluation by several is started as ``torchrun --nproc-per-node 2 --no-python adv-classify evaluate ...``: each
process measures every n-th batch and writes it to the folder that they share; then all read what the others wrote. What
a batch's numbers are does not depend on who measured it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

_PATIENCE = timedelta(days=7)  # a process may have to wait for the others as long as their batches take
_group: Any = None  # the group of processes that exchange values; None: that of the training


def is_distributed() -> bool:
    """Whether several processes train together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def gathered(value: Any) -> list[Any]:
    """The values of all processes, in the order of their ranks; plain types. Alone: the one value."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value, group=_group)
    return values


def summed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sums of tensors over all processes, which have them in the same order and shapes; in one exchange."""
    if not tensors or not is_distributed():
        return list(tensors)
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
    torch.distributed.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def wanted_by_any(wanted: bool, model: torch.nn.Module | None, device: torch.device) -> bool:
    """Whether one more pass of a model is made: because this process wants it, or because another does that waits.

    With SyncBatchNorm each pass waits for the same pass of the other processes. Where only some of them made one more,
    as a look at samples that only they have, all would wait forever. Other models make what their own process wants.

    Args:
        wanted: by this process.
        model: whose pass it is; all processes ask at the same place.
        device: where the processes exchange values.
    """
    if place()[1] == 1 or model is None:
        return wanted
    if not any(isinstance(layer, torch.nn.SyncBatchNorm) and layer.training for layer in model.modules()):
        return wanted
    asked = torch.tensor([float(wanted)], device=device)
    torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
    return bool(asked)


def from_first_rank(value: Any) -> Any:
    """The value that the first process has, in all of them."""
    if not is_distributed():
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, group=_group)
    return values[0]


@contextmanager
def patient() -> Iterator[None]:
    """Inside, processes wait for each other's values for days, where NCCL would end the training after ten minutes.

    For work before the first batch that one process may take long for. All processes enter it at about the same time.
    """
    global _group
    if not is_distributed():
        yield
        return
    _group = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group(_group)
        _group = None


def place() -> tuple[int, int]:
    """The rank of this process among those that train together, and their number; (0, 1) alone."""
    if not is_distributed():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


@dataclass(frozen=True)
class Processes:
    """This process among those of an evaluation.

    Attributes:
        rank: which one it is, from 0; 0 writes the report.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def of_environment(cls) -> Processes:
        """The processes that torchrun started, joined; one alone without it."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1 or "MASTER_ADDR" not in os.environ:
            return cls()
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo", timeout=_PATIENCE)
        return cls(torch.distributed.get_rank(), torch.distributed.get_world_size())

    def wait(self) -> None:
        """Returns when every process has come here."""
        if self.size > 1:
            torch.distributed.barrier()

    def gathered(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of their ranks; every process has come here before it returns."""
        return [value] if self.size == 1 else gathered(value)


def device_of_rank(name: str) -> str:
    """``cuda`` as the GPU of this process under torchrun; any other device as it is."""
    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if name == "cuda" and rank is not None and torch.cuda.device_count() > 1 else name

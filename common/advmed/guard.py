"""Holding a model still while it is attacked.

An attack runs many forward passes through a network in training mode. None of them may leave a trace: BatchNorm must
not learn from attack iterates (twenty of them per step would drown the one clean batch), training flags,
``requires_grad`` flags and the random state that dropout and augmentation draw from must be what they were.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[nn.Module]:
    """BatchNorm layers in training mode normalise with the statistics of the batch, and learn nothing from it."""
    # With track_running_stats off, a BatchNorm layer in training mode is handed no running statistics at all.
    tracking = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    for batch_norm in tracking:
        batch_norm.track_running_stats = False
    try:
        yield model
    finally:
        for batch_norm in tracking:
            batch_norm.track_running_stats = True


@contextmanager
def unlearnt(model: nn.Module) -> Iterator[nn.Module]:
    """A training pass that leaves no trace in the model's buffers; its gradients are to be taken inside.

    BatchNorm normalises with the statistics of the batch; other layers in training mode learn, and forget it.
    """
    buffers = _learning_buffers(model)
    with frozen_statistics(model):
        try:
            yield model
        finally:
            _restore(buffers)  # of layers that have no switch


@contextmanager
def preserved(model: nn.Module) -> Iterator[nn.Module]:
    """Holds ``model`` still: what runs inside leaves no trace in it, nor in torch's random state.

    Inside, BatchNorm layers in training mode normalise with the statistics of the batch, as the training pass does
    (running statistics lag behind early in training and make a weak attack), and move no running statistic; layers in
    evaluation mode stay in it (and are trusted to write no buffers). Parameters ask for no gradient, so that a pass
    neither computes nor stores anything for weight gradients. On the way out, also after an exception, the
    state_dict, training flags, ``requires_grad`` flags and the random state of the CPU and of the model's CUDA devices
    are bit-identical to before.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    modules = list(model.modules())
    flags = [module.training for module in modules]
    buffers = _learning_buffers(model)
    devices = {tensor.device for tensor in model.parameters()} | {tensor.device for tensor in model.buffers()}
    cuda = sorted({device.index or 0 for device in devices if device.type == "cuda"})
    with torch.random.fork_rng(devices=cuda), frozen_statistics(model):
        for parameter in parameters:
            parameter.requires_grad_(False)
        try:
            yield model
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)
            for module, flag in zip(modules, flags, strict=True):
                module.training = flag
            _restore(buffers)


def _learning_buffers(model: nn.Module) -> list[tuple[nn.Module, str, Tensor, Tensor, int]]:
    """What a pass in training mode may write to, and what stands there.

    Layers other than BatchNorm (InstanceNorm with running statistics, spectral norm, ...) have no switch as it has, and
    a BatchNorm of somebody else's may write its statistics by itself.
    """
    return [
        (module, name, buffer, buffer.clone(), buffer._version)
        for module in model.modules()
        if module.training and not (isinstance(module, _BatchNorm) and type(module).__module__.startswith("torch."))
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]


def _restore(buffers: list[tuple[nn.Module, str, Tensor, Tensor, int]]) -> None:
    with torch.no_grad():
        for module, name, buffer, saved, version in buffers:
            module._buffers[name] = buffer  # a layer may have replaced the tensor rather than written into it
            if buffer._version != version:  # written into; else leave it, an autograd graph may still need it
                buffer.copy_(saved)

"""Weights from files: checkpoints of Lightning, of PyTorch, and safetensors. No code in a file is run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from advmed.files import check_whole


def load_weights(
    model: nn.Module,
    path: str | Path,
    *,
    prefixes: Sequence[str],
    heads: Sequence[str] = (),
    alike: Callable[[str], str] = str,
) -> None:
    """Loads weights from a file of timm, of torchvision, of PyTorch, or a checkpoint of ours.

    Args:
        model: what is loaded into; what the file holds beyond it is left alone.
        path: the file.
        prefixes: names that a wrapper may have put before those of the weights, such as "module."; the first that
            occurs is taken off, and weights without it are not the model's.
        alike: what of a name decides whether two are the same.
        heads: names that the model's own last layers begin with; these may be missing or of another shape.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if they are of another network, or no weights at all.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of weights {path}")
    content = read_tensors(path)
    found = content.get("state_dict", content)
    for prefix in prefixes:
        if any(key.startswith(prefix) for key in found):
            found = {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}
    own = model.state_dict()
    names = {alike(key): key for key in own}
    known = {names[alike(key)]: value for key, value in found.items() if alike(key) in names}
    fitting = {key: value for key, value in known.items() if value.shape == own[key].shape}
    missing = sorted(key for key in own.keys() - fitting.keys() if not key.startswith(tuple(heads)))
    if missing:
        raise ValueError(
            f"{path} holds weights of another network: {len(missing)} of {len(own)} tensors are missing or have "
            f"another shape, such as {', '.join(missing[:3])}"
        )
    nn.Module.load_state_dict(model, fitting, strict=False)


def read_tensors(path: Path) -> dict[str, Any]:
    """The content of a file of tensors and plain values; no code in it is run.

    Raises:
        ValueError: if it is no such file.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
        check_whole(path)
    except Exception as error:  # every format has its own
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path} cannot be read as a file of weights: {type(error).__name__}: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no file of weights: it holds a {type(content).__name__}")
    return content

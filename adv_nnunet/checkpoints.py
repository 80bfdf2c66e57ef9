"""Checkpoints: read without running code in them, and without the names of patients when a training has ended.

While a training goes on, its checkpoints hold the ids of its samples, which a resumption needs. A model is passed on
when training has ended: then the ids are taken out. They stay in ``margins.csv`` beside the checkpoint, from which a
training that is continued takes them again.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adv_nnunet.settings import STATE
from advmed.files import check_whole

CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth")
"""Names of the host's files, in the order in which it looks for one to go on with."""
TABLE = "margins.csv"
"""Name of the file with the ids, beside the checkpoint."""
_IDS = "ids_sha256"


def _plain_types() -> list[Any]:
    """What the numbers in the host's log are made of, by NumPy 1 or 2, whose functions lie in other modules."""
    # codecs.encode: of their bytes, which PyTorch allows by itself from a release after 2.4 on.
    functions = [np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]]
    made: list[Any] = [
        codecs.encode,
        np.ndarray,
        np.dtype,
        *(type(np.dtype(name)) for name in ("f2", "f4", "f8", "i4", "i8", "bool")),
    ]
    for function in functions:
        for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            made.append(_renamed(function, module))
    return made


def _renamed(function: Any, module: str) -> Any:
    def named(*args: Any) -> Any:
        return function(*args)

    named.__module__, named.__name__, named.__qualname__ = module, function.__name__, function.__name__
    return named


_SAFE = _plain_types()


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint of nnU-Net or of ours, on the CPU. Nothing that it holds is run.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, is no checkpoint, or holds more than tensors and plain values.
    """
    torch.serialization.add_safe_globals(_SAFE)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        check_whole(path)
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error):
            raise _unreadable(path, error) from error
        raise ValueError(
            f"{path} holds more than weights and plain values, which could run code when it is read: "
            f"{str(error).splitlines()[-1] or error}. Take a checkpoint that nnU-Net itself wrote."
        ) from error
    except FileNotFoundError:
        raise
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(content, dict) or "network_weights" not in content:
        raise ValueError(f"{path} is not a checkpoint of nnU-Net: it holds no 'network_weights'")
    return content


def _unreadable(path: str | Path, error: Exception) -> ValueError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ValueError(
        f"{path} cannot be read as a checkpoint ({reason}): it is damaged, or was written in part only. Copy it again, "
        f"or move it away, to go on from another checkpoint of that folder or anew."
    )


def without_names(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint without the ids of samples in our state, and with no more than the ends of absolute paths."""
    if STATE not in checkpoint:
        return dict(checkpoint)
    state = _shortened(dict(checkpoint[STATE]))
    margins = state["method"].get("margins")
    if margins and margins["ids"]:
        state["method"]["margins"] = {**margins, "ids": [], _IDS: _digest(margins["ids"])}
    return {**checkpoint, STATE: state}


def with_names(state: Mapping[str, Any], folder: Path, settings: Any) -> dict[str, Any]:
    """Our state in a checkpoint, with all that :func:`without_names` has taken out of it.

    Args:
        state: as in the checkpoint.
        folder: of the checkpoint, with ``margins.csv``.
        settings: of the present run; a path in them that ends as the saved one is taken for the same.

    Raises:
        ValueError: if ``margins.csv`` is missing, or is that of another training.
    """
    now = {name: str(value) for name, value in vars(settings).items()}
    saved = {name: now[name] if _ending(now.get(name)) == value else value for name, value in state["settings"].items()}
    state = {**state, "settings": saved, "method": dict(state["method"])}
    margins = state["method"].get("margins")
    if margins and _IDS in margins:
        state["method"]["margins"] = {**margins, "ids": _ids(margins, folder / TABLE)}
    return state


def _ids(margins: Mapping[str, Any], path: Path) -> list[str]:
    """The ids of saved margins: the table's first ones, in the order in which they were met."""
    ids: list[str] = []
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            ids = [row["id"] for row in csv.DictReader(file)][: len(margins["values"])]
    if _digest(ids) != margins[_IDS]:
        raise ValueError(
            f"the checkpoint of this finished training holds margins without the names of their samples, and {path}, "
            f"where these are kept, {'belongs to another training' if ids else 'is missing'}. Put it back; or start a "
            f"new training without --c, with -pretrained_weights."
        )
    return ids


def _digest(ids: list[str]) -> str:
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()


def _ending(value: Any) -> Any:
    """Of an absolute path the last three parts, which say whose checkpoint it is; anything else as it is."""
    if isinstance(value, str) and Path(value).is_absolute():
        return "/".join(Path(value).parts[-3:]).lstrip("/")
    return value


def _shortened(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _shortened(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_shortened(entry) for entry in value)
    return _ending(value)

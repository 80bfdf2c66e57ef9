"""What rides in the host's checkpoints: the state of an unfinished training, and the summary of a finished one.

The stock trainer would resume an unfinished adversarial training as a standard one. Its checkpoint therefore keeps, in
the place of the host's argument ``time``, a sentence that the host's check of its arguments prints and refuses; the
real value rides in our state. Predicting, validating, exporting and training from the weights do not look at it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils.files import get_latest_run
from ultralytics.utils.patches import torch_load
from ultralytics.utils.torch_utils import strip_optimizer

from advmed.files import check_whole, replacing

STATE = "advmed"
"""Attribute of the network in an unfinished checkpoint that holds our state, in plain types; and the entry of a
finished one with its summary. The stock host ignores both."""
MARKED = "time"
"""The argument of the host whose place the sentence takes."""


def read_checkpoint(path: str | Path) -> tuple[Any, dict[str, Any]]:
    """The network in a checkpoint of the host, and all of the checkpoint.

    Raises:
        FileNotFoundError: if there is no such file; the host would look for it on the internet.
        TypeError: if it is no checkpoint of the host.
        ValueError: if it is damaged.
    """
    if not Path(path).is_file():
        others = " or ".join(map(str, _others(Path(path))))
        hint = f"there is {others}, though: the host numbers runs of one name" if others else "name a trained .pt"
        raise FileNotFoundError(f"there is no model file {path}; {hint}")
    check_whole(path)
    try:
        network, checkpoint = load_checkpoint(path)
    except (AttributeError, KeyError, IndexError) as error:
        raise TypeError(f"{path} is no checkpoint of Ultralytics, which holds a network and its arguments") from error
    return network, checkpoint


def _others(path: Path) -> list[Path]:
    """The same file in runs that the host has given the same name and a number: train2, standard-2."""
    run, named = path.parent.parent, path.parent.name == "weights"
    return sorted(run.parent.glob(f"{run.name}*/weights/{path.name}")) if named and run.name else []


def is_finished(checkpoint: Mapping[str, Any]) -> bool:
    """Whether there is nothing to resume, as the host decides it."""
    return checkpoint.get("epoch", -1) < 0 or checkpoint.get("optimizer") is None


def unfinished_mark(method: str, trainer: str) -> str:
    """What the stock trainer says where it is to resume an unfinished training of ours."""
    return (
        f"This is an unfinished {method} training, which the stock trainer would go on with as a standard one. Resume "
        f"it with: adv-yolo detect train resume model=FILE, or YOLO(FILE).train(trainer={trainer}, resume=True)"
    )


def ended_mark(method: str) -> str:
    """What is said where a checkpoint of a training that has ended is to be resumed."""
    return (
        f"The {method} training that this checkpoint is of has ended, and what a resumed run needs has left its files. "
        f"Start a new training from its weights, without resume"
    )


def to_resume(resume: Any) -> Path | None:
    """The checkpoint that the host takes for its argument ``resume``, if there is one."""
    path = resume if isinstance(resume, (str, Path)) and Path(resume).is_file() else get_latest_run()
    return Path(path) if path and Path(path).is_file() else None


@contextmanager
def without_mark(path: Path) -> Iterator[Path]:
    """A file that the host reads the arguments of an unfinished training from; ``path`` where that bears no mark.

    Raises:
        ValueError: if the training has ended.
    """
    network, _ = read_checkpoint(path)
    mark, state = network.args.get(MARKED), getattr(network, STATE, None)
    if not isinstance(mark, str):
        yield path
        return
    if state is None:
        raise ValueError(f"{path}: {mark}")
    nothing = nn.Identity()
    nothing.args = {"task": network.args["task"]}  # type: ignore[assignment]  # which the host asks of any network
    with tempfile.TemporaryDirectory() as folder:
        arguments = {**network.args, MARKED: state["host"][MARKED]}
        torch.save({"model": nothing, "train_args": arguments}, Path(folder, path.name))
        yield Path(folder, path.name)


def complete(path: Path) -> bool:
    """Does what a training that was killed behind its last epoch had left to do: the optimizer and our state go.

    Args:
        path: of a checkpoint.

    Returns:
        Whether that training has ended, so that there is nothing to resume.
    """
    network, checkpoint = read_checkpoint(path)
    state = getattr(network, STATE, None)
    ended = is_finished(checkpoint) or (
        state is not None and _summary(state)["epochs"] >= checkpoint["train_args"]["epochs"]
    )
    if ended and state is not None:
        for file in _checkpoints(path.parent):
            other = torch_load(file, map_location="cpu")
            theirs, ours = other["train_args"], checkpoint["train_args"]
            if any(theirs[name] != ours[name] for name in theirs.keys() & ours.keys()):
                continue  # of another run, in a folder of the user's
            if file.name in ("last.pt", "best.pt") and not is_finished(other):
                strip_optimizer(file)
            _strip_state(file)
    return ended


def strip_states(folder: Path) -> None:
    """Takes our state, with the names of the training images in it, out of the checkpoints of a training that has
    ended; the summary of its run takes its place.

    Args:
        folder: of the checkpoints, as the host names them; others are left alone.
    """
    for path in _checkpoints(folder):
        _strip_state(path)


def _checkpoints(folder: Path) -> list[Path]:
    found = [folder / "last.pt", folder / "best.pt", *sorted(folder.glob("epoch*.pt"))]
    return [path for path in found if path.exists()]


def _strip_state(path: Path) -> None:
    checkpoint = torch_load(path, map_location="cpu")
    networks = [m for m in (checkpoint.get("model"), checkpoint.get("ema")) if isinstance(m, nn.Module)]
    states = [vars(network).pop(STATE, None) for network in networks]
    state = next((state for state in states if state is not None), None)
    if state is None:
        return
    checkpoint[STATE] = _summary(state)
    finished, method = is_finished(checkpoint), checkpoint[STATE]["method"]
    checkpoint["train_args"][MARKED] = state["host"][MARKED] if finished else ended_mark(method)
    with replacing(path) as temporary:
        torch.save(checkpoint, temporary)


def _summary(state: Mapping[str, Any]) -> dict[str, Any]:
    """Of the run; states of earlier releases have none."""
    summary: dict[str, Any] = state.get("summary") or {"method": state["method"]["method"], "epochs": state["epochs"]}
    return summary

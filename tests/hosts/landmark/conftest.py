"""A few small pictures with shapes whose corners and centres are landmarks, and ways to train by the command."""

from __future__ import annotations

import csv
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from adv_landmark.cli import main

ENCODER = "tu-test_efficientnet"
COUNTS = {"train": 8, "val": 4, "test": 3}
NAMES = ("corner", "dot", "end")
FILE, SIZE = (40, 48), (32, 48)  # height and width of a file, and what it is resized to: another scale in y than in x
SPACING = (0.4, 0.5)  # in x and y
UNKNOWN = {"train2.png": ("dot",), "val1.png": ("corner", "end")}


def picture(seed: int) -> tuple[np.ndarray, dict[str, tuple[float, float]]]:
    """A rectangle and a disk on noise, and the landmarks: two corners and a centre, (x, y) from pixel to pixel."""
    random = np.random.default_rng(seed)
    image = random.integers(0, 50, FILE, dtype=np.uint8)
    x, y = int(random.integers(6, 12)), int(random.integers(5, 11))
    right, below = x + int(random.integers(9, 13)), y + int(random.integers(9, 13))
    image[y : below + 1, x : right + 1] += 110
    dot = float(random.integers(35, 42)), float(random.integers(12, 25))
    rows, columns = np.ogrid[: FILE[0], : FILE[1]]
    image[(columns - dot[0]) ** 2 + (rows - dot[1]) ** 2 <= 9] += 200
    return image, {"corner": (x, y), "dot": dot, "end": (right, below)}


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_table(
    root: Path,
    counts: Mapping[str, int] | None = None,
    *,
    names: Sequence[str] = NAMES,
    spacing: tuple[float, float] | None = SPACING,
    unknown: Mapping[str, Sequence[str]] = UNKNOWN,
    offset: float = 0.0,
    mode: str = "L",
) -> Path:
    """``landmarks.csv``, ``split.csv`` and the images that they name; ``offset`` is what the table adds to a point."""
    (root / "images").mkdir(parents=True)
    marks, splits = [], []
    for split, count in (COUNTS if counts is None else counts).items():
        for i in range(count):
            name = f"{split}{i}.png"
            image, points = picture(100 * len(split) + i)
            Image.fromarray(image).convert(mode).save(root / "images" / name)
            for landmark in names:
                place = points.get(landmark, points["dot"])
                x, y = ("", "") if landmark in unknown.get(name, ()) else (place[0] + offset, place[1] + offset)
                marks.append({"image": name, "landmark_index": landmark, "x": x, "y": y})
            known = {} if spacing is None else {"spacing_x": spacing[0], "spacing_y": spacing[1]}
            splits.append({"image": name, "split": split, **known})
    write_csv(root / "landmarks.csv", marks)
    write_csv(root / "split.csv", splits)
    return root


def truth(root: Path, image: str) -> np.ndarray:
    """The points of an image as the table has them, (L, 2), in the order of their names."""
    rows = [row for row in table(root / "landmarks.csv") if row["image"] == image]
    rows.sort(key=lambda row: row["landmark_index"])
    return np.array([[float(row[axis] or "nan") for axis in "xy"] for row in rows])


def arguments(root: Path, folder: Path, /, **changes: Any) -> list[str]:
    """Options of a short training; those that are None are left out."""
    given = {
        "data": "LandmarkTable",
        "data.root": root,
        "data.size": list(SIZE),
        "data.batch_size": 4,
        "data.workers": 0,
        "model.network.encoder": ENCODER,
        "model.network.decoder_channels": "[16,16,8,8,8]",
        "model.attack.steps": 2,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "trainer.log_every_n_steps": 1,
        "trainer.max_epochs": 1,
        "trainer.default_root_dir": folder,
    }
    changed = {key.replace("__", "."): value for key, value in changes.items()}
    return [
        word for key, value in {**given, **changed}.items() if value is not None for word in (f"--{key}", str(value))
    ]


def runs(folder: Path) -> list[Path]:
    """The folders of the runs, the latest last."""
    return sorted((folder / "lightning_logs").glob("version_*"), key=lambda path: int(path.name.split("_")[1]))


def fit(root: Path, folder: Path, /, **changes: Any) -> Path:
    """Trains by the command in this process; returns the run's folder."""
    assert main(["fit", *arguments(root, folder, **changes)]) == 0
    return runs(folder)[-1]


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def logged(run: Path, name: str) -> list[float]:
    """The values of a column of metrics.csv."""
    return [float(row[name]) for row in table(run / "metrics.csv") if row.get(name)]


def state(run: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)


def weights(run: Path, name: str = "last") -> dict[str, Tensor]:
    return state(run, name)["state_dict"]


def margins(run: Path) -> dict[str, tuple[float, int]]:
    """Margin and visits of every id, as the run has written them down."""
    return {row["id"]: (float(row["margin"]), int(row["visits"])) for row in table(run / "margins.csv")}


def close(first: dict[str, Tensor], second: dict[str, Tensor], atol: float = 1e-5, rtol: float = 1e-4) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.fixture(autouse=True, scope="session")
def threads() -> Iterator[None]:
    """Trainings that several tests share begin before a test has its one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tools() -> SimpleNamespace:
    return SimpleNamespace(
        ENCODER=ENCODER,
        COUNTS=COUNTS,
        NAMES=NAMES,
        FILE=FILE,
        SIZE=SIZE,
        SPACING=SPACING,
        picture=picture,
        write_csv=write_csv,
        write_table=write_table,
        truth=truth,
        arguments=arguments,
        runs=runs,
        fit=fit,
        table=table,
        logged=logged,
        state=state,
        weights=weights,
        margins=margins,
        close=close,
    )


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures and their tables."""
    return write_table(tmp_path_factory.mktemp("data") / "own")


@pytest.fixture(scope="session")
def standard(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a standard training that has learnt where the landmarks are, roughly."""
    folder = tmp_path_factory.mktemp("trained") / "standard"
    attacked = {"model__validation_steps": 3, "model__method__eps": 1.5, "trainer__check_val_every_n_epoch": 30}
    return fit(root, folder, trainer__max_epochs=60, model__lr=5e-3, **attacked)


@pytest.fixture(scope="session")
def adaptive(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of an AMAT training."""
    return fit(root, tmp_path_factory.mktemp("trained") / "amat", trainer__max_epochs=3, model__method__name="AMAT")


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What Lightning's loggers say."""
    lines: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    listener, loggers = Listener(), [logging.getLogger(f"lightning.{name}") for name in ("pytorch", "fabric")]
    for logger in loggers:
        logger.addHandler(listener)
    yield lines
    for logger in loggers:
        logger.removeHandler(listener)


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must fail, and returns its one message."""

    def run(*words: Any) -> str:
        capsys.readouterr()
        assert main([str(word) for word in words]) == 1
        message = capsys.readouterr().err
        told = message[message.index("adv-landmark: ") :]
        assert "Traceback" not in message
        assert "Union" not in told
        return told.removeprefix("adv-landmark: ").strip()

    return run


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """The command sets a seed for all of the process, and Lightning notes it in the environment."""
    before, path = dict(os.environ), list(sys.path)
    with torch.random.fork_rng():
        yield
    os.environ.clear()
    os.environ.update(before)
    sys.path[:] = path

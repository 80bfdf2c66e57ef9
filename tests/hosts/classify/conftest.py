"""A few small pictures whose classes are easy to learn, and ways to train on them by the command."""

from __future__ import annotations

import csv
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from adv_classify.cli import main

NETWORK = "test_efficientnet_gn"  # 0.1 million weights, no BatchNorm: images of a batch do not know of each other
COUNTS = {"train": 24, "val": 12, "test": 9}
SIZE = 16


def pictures(labels: np.ndarray, size: int = SIZE, seed: int = 0) -> np.ndarray:
    """Noise in which the channel of the class is brighter, (N, size, size, 3)."""
    images = np.random.default_rng(seed).integers(0, 60, (len(labels), size, size, 3), dtype=np.uint8)
    images[np.arange(len(labels)), :, :, labels % 3] += 120
    return images


def write_npz(path: Path, counts: dict[str, int] | None = None, classes: int = 3, **replaced: Any) -> Path:
    """A MedMNIST file; arrays of the same name are replaced, those that are None left out."""
    arrays: dict[str, Any] = {}
    for seed, (split, count) in enumerate((counts or COUNTS).items()):
        labels = np.arange(count) % classes
        arrays |= {f"{split}_images": pictures(labels, seed=seed), f"{split}_labels": labels[:, None]}
    arrays |= replaced
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return path


def write_table(root: Path, rows: Sequence[dict[str, Any]] | None = None, size: int = SIZE, grey: bool = False) -> Path:
    """``labels.csv`` and the images that it names."""
    if rows is None:
        rows = [
            {"image": f"{split}{i}.png", "label": i % 3, "dx": "abc"[i % 3], "split": split}
            for split, count in COUNTS.items()
            for i in range(count)
        ]
    (root / "images").mkdir(parents=True)
    for i, row in enumerate(rows):
        if "image" in row:
            array = pictures(np.array([i]), size, seed=i)[0]
            Image.fromarray(array[..., 0] if grey else array).save(root / "images" / row["image"])
    with (root / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return root


def write_folders(root: Path, splits: Sequence[str] = ("train", "val", "test"), each: int = 2) -> Path:
    """Folders of images, ``each`` in a class."""
    for split in splits:
        for label, name in enumerate(("cat", "ant", "bee")):
            (root / split / name).mkdir(parents=True)
            for i, array in enumerate(pictures(np.full(each, label), seed=label)):
                Image.fromarray(array).save(root / split / name / f"{i}.png")
    return root


class Small(nn.Sequential):
    """A classifier of grey or colour images without timm."""

    def __init__(self, channels: int = 3, classes: int = 4, seed: int = 0) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            super().__init__(
                nn.Conv2d(channels, 6, 3, padding=1),
                nn.Tanh(),
                nn.AdaptiveAvgPool2d(2),
                nn.Flatten(),
                nn.Linear(24, classes),
            )


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def arguments(file: Path, folder: Path, /, **changes: Any) -> list[str]:
    """Options of a short training; those that are None are left out."""
    given = {
        "data": "MedMNIST",
        "data.file": file,
        "data.batch_size": 8,
        "data.workers": 0,
        "model.network.name": NETWORK,
        "model.attack.steps": 2,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
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


def fit(file: Path, folder: Path, /, **changes: Any) -> Path:
    """Trains by the command in this process; returns the run's folder."""
    assert main(["fit", *arguments(file, folder, **changes)]) == 0
    return runs(folder)[-1]


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def logged(run: Path, name: str) -> list[float]:
    """The values of a column of metrics.csv."""
    return [float(row[name]) for row in table(run / "metrics.csv") if row.get(name)]


def weights(run: Path, name: str = "last") -> dict[str, Tensor]:
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]


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
        NETWORK=NETWORK,
        COUNTS=COUNTS,
        Small=Small,
        noise=noise,
        pictures=pictures,
        write_npz=write_npz,
        write_table=write_table,
        write_folders=write_folders,
        arguments=arguments,
        runs=runs,
        fit=fit,
        table=table,
        logged=logged,
        weights=weights,
        margins=margins,
        close=close,
    )


@pytest.fixture(scope="session")
def npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_npz(tmp_path_factory.mktemp("data") / "pictures.npz")


@pytest.fixture(scope="session")
def standard(npz: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a standard training that has learnt its classes."""
    return fit(npz, tmp_path_factory.mktemp("trained") / "standard", trainer__max_epochs=3)


@pytest.fixture(scope="session")
def adaptive(npz: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of an AMAT training."""
    return fit(npz, tmp_path_factory.mktemp("trained") / "amat", trainer__max_epochs=3, model__method__name="AMAT")


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
        told = message[message.index("adv-classify: ") :]
        assert "Traceback" not in message
        assert "Union" not in told
        return told.removeprefix("adv-classify: ").strip()

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

"""A small nnU-Net world of real data: raw, preprocessed, tiny plans, and trainers that run in this process."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

# nnU-Net reads these when it is imported.
os.environ.setdefault("nnUNet_def_n_proc", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pytest
import SimpleITK as sitk
import torch
import yaml
from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.logging.nnunet_logger import LocalLogger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from adv_nnunet import trainer as trainers
from advmed.thresholds import Thresholds

SOURCE = Path(__file__).parents[3] / "examples" / "data" / "Dataset004_Hippocampus"
NAME = "Dataset004_Hippocampus"
PLANS = "tiny"
CONFIGURATIONS = ("2d", "3d_fullres")
SETTINGS: dict[str, Any] = {
    "preset": "paper",
    "check_standard": False,  # networks of a few steps know next to nothing
    "epochs": 2,
    "iterations_per_epoch": 2,
    "val_iterations_per_epoch": 1,
    "steps": 2,
    "step_scale": 2.0,
    "eps": 2.0,
    "delta": 1.0,
    "seed": 0,
}
"""What a training in a test does unless it says otherwise."""
CPU = torch.device("cpu")


def enter(world: World, results: Path, patch: pytest.MonkeyPatch) -> None:
    """nnU-Net's variables, no settings but those that a test writes, and what makes nnU-Net quick."""
    for name, value in world.variables(results).items():
        patch.setenv(name, value)
    patch.delenv("nnUNet_adversarial", raising=False)
    patch.setattr(multiprocessing, "get_context", _threads)
    patch.setattr(LocalLogger, "plot_progress_png", lambda self, folder: None)  # costs more than an epoch here
    patch.setattr(torch, "set_num_threads", lambda number: None)  # commands take a thread for every core


@pytest.fixture(autouse=True)
def environment(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has a results folder of its own."""
    enter(world, tmp_path / "results", monkeypatch)


class _ThreadContext:
    """In place of the "spawn" context: pools of threads start at once, and spawned processes import torch first."""

    Pool = staticmethod(lambda processes=1, *args, **kwargs: ThreadPool(max(1, processes), *args, **kwargs))


_get_context = multiprocessing.get_context


def _threads(method: str | None = None) -> Any:
    return _ThreadContext if method == "spawn" else _get_context(method)


class World:
    """Data sets in nnU-Net's layout, made when they are first asked for."""

    settings = SETTINGS

    def __init__(self, root: Path) -> None:
        self.root, self.raw, self.preprocessed = root, root / "raw", root / "preprocessed"
        self.cases = sorted(p.name.removesuffix(".nii.gz") for p in (SOURCE / "labelsTr").glob("*.nii.gz"))[:8]
        self._made: dict[str, str] = {}

    def variables(self, results: Path) -> dict[str, str]:
        results.mkdir(exist_ok=True)
        return {
            "nnUNet_raw": str(self.raw),
            "nnUNet_preprocessed": str(self.preprocessed),
            "nnUNet_results": str(results),
            "nnUNet_def_n_proc": "1",
            "nnUNet_n_proc_DA": "0",  # batches are made in this process
            "nnUNet_compile": "f",
        }

    def make_main(self) -> None:
        """Eight cases, planned and preprocessed by nnU-Net itself; fold 0 validates on the last two."""
        self._copy_raw(NAME, self.cases)
        extract_fingerprints([4], num_processes=1, verbose=False, show_progress_bar=False)
        plan_experiments([4])
        plans = json.loads((self.preprocessed / NAME / "nnUNetPlans.json").read_text()) | {"plans_name": PLANS}
        for name in CONFIGURATIONS:
            configuration = plans["configurations"][name]
            configuration["batch_size"] = 4 if name == "2d" else 2
            configuration["architecture"]["arch_kwargs"]["features_per_stage"] = [4, 8, 8, 8]
        self._preprocess(NAME, plans, (self.cases[:6], self.cases[6:]), (self.cases[2:], self.cases[:2]))
        self._made["main"] = NAME

    def dataset(self, kind: str) -> str:
        """The name of a data set of that kind: main, or one of four cases: regions, ignore, two_channels, ..."""
        if kind not in self._made:
            name = f"Dataset{len(self._made) + 10:03d}_{kind.replace('_', '')}"
            cases, main, folder = self.cases[:4], self.preprocessed / NAME, self.preprocessed / name
            self._copy_raw(name, cases)
            self._change(kind, self.raw / name, cases)
            folder.mkdir()
            shutil.copy(self.raw / name / "dataset.json", folder)
            shutil.copy(main / "dataset_fingerprint.json", folder)
            plans = json.loads((main / f"{PLANS}.json").read_text()) | {"dataset_name": name}
            if kind == "two_channels":
                properties = plans["foreground_intensity_properties_per_channel"]
                properties["1"] = properties["0"]
                for configuration in (plans["configurations"][name] for name in CONFIGURATIONS):
                    configuration["normalization_schemes"] *= 2
                    configuration["use_mask_for_norm"] *= 2
            self._preprocess(name, plans, (cases[:3], cases[3:]))
            self._made[kind] = name
        return self._made[kind]

    def _copy_raw(self, name: str, cases: Sequence[str]) -> None:
        for part, ending in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
            (self.raw / name / part).mkdir(parents=True)
            for case in cases:
                shutil.copy(SOURCE / part / f"{case}{ending}", self.raw / name / part)
        content = json.loads((SOURCE / "dataset.json").read_text()) | {"numTraining": len(cases)}
        (self.raw / name / "dataset.json").write_text(json.dumps(content))

    def _preprocess(self, name: str, plans: dict[str, Any], *folds: tuple[Sequence[str], Sequence[str]]) -> None:
        """What nnUNetv2_preprocess does, without its processes; and the split."""
        folder = self.preprocessed / name
        (folder / f"{PLANS}.json").write_text(json.dumps(plans))
        shutil.copytree(self.raw / name / "labelsTr", folder / "gt_segmentations")
        for configuration in CONFIGURATIONS:
            DefaultPreprocessor(verbose=False).run(int(name[7:10]), configuration, PLANS, num_processes=1)
        content = [{"train": list(train), "val": list(val)} for train, val in folds]
        (folder / "splits_final.json").write_text(json.dumps(content))

    def _change(self, kind: str, folder: Path, cases: Sequence[str]) -> None:
        """Changes the raw files of four cases to those of a kind of data set."""
        labels: dict[str, Any] = {"background": 0, "Anterior": 1, "Posterior": 2}
        changes: dict[str, Any] = {"labels": labels}
        if kind.startswith("regions"):
            changes |= {"labels": {"background": 0, "whole": [1, 2], "posterior": 2}, "regions_class_order": [1, 2]}
        if kind.endswith("ignore"):
            changes["labels"]["ignore"] = 3
            for case in cases:
                _edit(folder / "labelsTr" / f"{case}.nii.gz", _ignore_a_third)
        if kind == "two_channels":
            changes["channel_names"] = {"0": "MRI", "1": "blurred"}
            for case in cases:
                first, second = (folder / "imagesTr" / f"{case}_000{channel}.nii.gz" for channel in range(2))
                sitk.WriteImage(sitk.SmoothingRecursiveGaussian(sitk.ReadImage(first, sitk.sitkFloat32), 2.0), second)
        if kind == "empty_case":
            _edit(folder / "labelsTr" / f"{cases[1]}.nii.gz", np.zeros_like)
        path = folder / "dataset.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _edit(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    image = sitk.ReadImage(path)
    changed = sitk.GetImageFromArray(change(sitk.GetArrayFromImage(image)))
    changed.CopyInformation(image)
    sitk.WriteImage(changed, path)


def _ignore_a_third(label: np.ndarray) -> np.ndarray:
    label = label.copy()
    label[:, :, : label.shape[2] // 3] = 3
    return label


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("nnunet"))
    with pytest.MonkeyPatch.context() as patch:
        enter(world, world.root / "results", patch)
        patch.setenv("nnUNet_n_proc_DA", "1")  # a number of threads while plans are made
        world.make_main()
    return world


class Bench:
    """Makes trainers of this test, and runs them in this process."""

    def __init__(self, world: World, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.world, self.folder, self.patch = world, folder, patch
        self.results = Path(os.environ["nnUNet_results"])

    def make(
        self,
        kind: str | type[nnUNetTrainer] = "AMAT",
        configuration: str = "2d",
        *,
        dataset: str = "main",
        fold: int | str = 0,
        resume: Any = False,
        plans: str = PLANS,
        named: bool = True,
        **settings: Any,
    ) -> Any:
        """A trainer as nnUNetv2_train makes it, of a method's name or a class; the settings are in a file.

        To be resumed: as with --c, or a trainer whose last checkpoint is loaded.
        """
        path = self.folder / "settings.yaml"
        path.write_text(yaml.safe_dump(SETTINGS | settings))
        self.patch.setenv("nnUNet_adversarial", str(path) if named else "")
        if isinstance(kind, str):
            kind = trainers.TRAINERS[kind]
        folder = self.world.preprocessed / self.world.dataset(dataset)
        content = json.loads((folder / f"{plans}.json").read_text()) | {"continue_training": bool(resume)}
        description = json.loads((folder / "dataset.json").read_text())
        made = kind(plans=content, configuration=configuration, fold=fold, dataset_json=description, device=CPU)
        if not isinstance(resume, bool):
            final, latest = (Path(resume.output_folder) / f"checkpoint_{name}.pth" for name in ("final", "latest"))
            made.load_checkpoint(str(final if final.exists() else latest))
        return made

    def started(self, *args: Any, **kwargs: Any) -> Any:
        """A trainer in the state after ``on_train_start``."""
        trainer = self.make(*args, **kwargs)
        trainer.on_train_start()
        return trainer

    def ready(self, *args: Any, **kwargs: Any) -> Any:
        """A trainer in its first training epoch."""
        trainer = self.started(*args, **kwargs)
        trainer.on_train_epoch_start()
        return trainer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """A trainer after its training."""
        trainer = self.make(*args, **kwargs)
        trainer.run_training()
        return trainer

    def thresholds(self, *values: float, names: Sequence[str] = ("ce+dice",)) -> str:
        """A thresholds file."""
        path = self.folder / "thresholds.json"
        Thresholds(values, tuple(names)).save(path)
        return str(path)

    def batches(self, trainer: Any, number: int, seed: int = 0) -> list[dict[str, Any]]:
        """Batches of a trainer's own data without augmentation, the same in every call; with ``ids`` where it has them.

        (Augmentation is not repeatable: nnU-Net's blur picks the faster of two algorithms by measuring them.)
        """
        if not trainer.was_initialized:
            trainer.initialize()
        state = np.random.get_state()
        training, _ = trainer.get_tr_and_val_datasets()
        trainer.get_tr_and_val_datasets = lambda: (training, training)
        try:
            _, loader = type(trainer).get_dataloaders(trainer)
            np.random.seed(seed)
            return [next(loader) for _ in range(number)]
        finally:
            np.random.set_state(state)
            del trainer.get_tr_and_val_datasets

    def feed(self, trainer: Any, batches: Iterable[dict[str, Any]]) -> None:
        """Makes a trainer take these batches, and always the same one for validation."""
        (validation,) = self.batches(trainer, 1, seed=9)

        def forever() -> Iterator[dict[str, Any]]:
            while True:  # the host overwrites targets where there is an ignore label
                yield validation | {"target": [t.clone() for t in validation["target"]]}

        trainer.get_dataloaders = lambda: (iter(batches), forever())

    def log(self, trainer: Any) -> str:
        return Path(trainer.log_file).read_text()

    def saved(self, trainer: Any, name: str = "final") -> dict[str, Any]:
        """A checkpoint of a trainer."""
        path = Path(trainer.output_folder) / f"checkpoint_{name}.pth"
        checkpoint: dict[str, Any] = torch.load(path, weights_only=False)
        return checkpoint


@pytest.fixture
def bench(world: World, tmp_path: Path, environment: None, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(world, tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def finished(world: World, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Model folders of short trainings (fold 0), each made once and not to be written into."""
    results = tmp_path_factory.mktemp("finished")
    made: dict[Any, Path] = {}

    def trained(dataset: str = "main", configuration: str = "2d", kind: Any = "STD") -> Path:
        key = dataset, configuration, kind
        if key in made:
            return made[key]
        with pytest.MonkeyPatch.context() as patch:
            enter(world, results, patch)
            torch.manual_seed(1)
            schedule = {"epochs": 1, "iterations_per_epoch": 1, "initial_lr": 0.05}
            trainer = Bench(world, results, patch).make(kind, configuration, dataset=dataset, **schedule)
            if kind is nnUNetTrainer:
                trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 1, 20, 1
            trainer.run_training()
        made[key] = Path(trainer.output_folder).parent
        return made[key]

    return trained


@pytest.fixture(scope="session")
def stock(finished: Callable[..., Path]) -> Path:
    """The model folder of a finished training of the stock trainer; its results folder has no other."""
    return finished(kind=nnUNetTrainer)


@pytest.fixture
def with_stock(stock: Path, bench: Bench) -> Path:
    """A copy of it in this test's results folder; returns the fold's folder."""
    copied = bench.results / NAME / stock.name
    shutil.copytree(stock, copied)
    return copied / "fold_0"

"""A small nnU-Net world of real data: raw, preprocessed, tiny plans, and trainers that run in this process."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace
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
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from adv_nnunet import trainer as trainers

SOURCE = Path(__file__).parents[3] / "examples" / "data" / "Dataset004_Hippocampus"
NAME = "Dataset004_Hippocampus"
PLANS = "tiny"
CONFIGURATIONS = ("2d", "3d_fullres")
SETTINGS: dict[str, Any] = {
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


@pytest.fixture(autouse=True)
def environment(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net's variables; every test has a results folder of its own, and no settings but those it writes."""
    for name, value in variables(world, tmp_path / "results").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")  # batches are made in this process
    monkeypatch.delenv("nnUNet_adversarial", raising=False)
    monkeypatch.setattr(multiprocessing, "get_context", _threads)


def variables(world: World, results: Path) -> dict[str, str]:
    results.mkdir(exist_ok=True)
    return {
        "nnUNet_raw": str(world.raw),
        "nnUNet_preprocessed": str(world.preprocessed),
        "nnUNet_results": str(results),
        "nnUNet_def_n_proc": "1",
        "nnUNet_compile": "f",
    }


class _ThreadContext:
    """In place of the "spawn" context: pools of threads start at once, and spawned processes import torch first."""

    Pool = staticmethod(lambda processes=1, *args, **kwargs: ThreadPool(max(1, processes), *args, **kwargs))


_get_context = multiprocessing.get_context


def _threads(method: str | None = None) -> Any:
    return _ThreadContext if method == "spawn" else _get_context(method)


class World:
    """Data sets in nnU-Net's layout, made when they are first asked for."""

    name, plans, source, settings = NAME, PLANS, SOURCE, SETTINGS

    def __init__(self, root: Path) -> None:
        self.root, self.raw, self.preprocessed = root, root / "raw", root / "preprocessed"
        self.cases = sorted(p.name.removesuffix(".nii.gz") for p in (SOURCE / "labelsTr").glob("*.nii.gz"))[:8]
        self._made: dict[str, str] = {}

    @cached_property
    def main(self) -> str:
        """Eight cases, planned and preprocessed by nnU-Net itself; fold 0 validates on the last two."""
        self._copy_raw(NAME, self.cases)
        with self._planning():
            extract_fingerprints([4], num_processes=1, verbose=False, show_progress_bar=False)
            plan_experiments([4])
        folder = self.preprocessed / NAME
        shutil.copytree(self.raw / NAME / "labelsTr", folder / "gt_segmentations")
        plans = json.loads((folder / "nnUNetPlans.json").read_text())
        plans["plans_name"] = PLANS
        for name in CONFIGURATIONS:
            configuration = plans["configurations"][name]
            configuration["batch_size"] = 4 if name == "2d" else 2
            configuration["architecture"]["arch_kwargs"]["features_per_stage"] = [4, 8, 8, 8]
        (folder / f"{PLANS}.json").write_text(json.dumps(plans))
        self._preprocess(NAME)
        self.split(NAME, (self.cases[:6], self.cases[6:]), (self.cases[2:], self.cases[:2]))
        return NAME

    def dataset(self, kind: str) -> str:
        """The name of a data set of that kind: main, or one of four cases: regions, ignore, two_channels, ..."""
        if kind == "main":
            return self.main
        if kind not in self._made:
            base = self.main
            name = f"Dataset{len(self._made) + 11:03d}_{kind.replace('_', '')}"
            cases = self.cases[:4]
            self._copy_raw(name, cases)
            getattr(self, f"_make_{kind}")(self.raw / name, cases)
            folder = self.preprocessed / name
            folder.mkdir()
            shutil.copy(self.raw / name / "dataset.json", folder)
            shutil.copy(self.preprocessed / base / "dataset_fingerprint.json", folder)
            shutil.copytree(self.raw / name / "labelsTr", folder / "gt_segmentations")
            plans = json.loads((self.preprocessed / base / f"{PLANS}.json").read_text()) | {"dataset_name": name}
            if kind == "two_channels":
                properties = plans["foreground_intensity_properties_per_channel"]
                properties["1"] = properties["0"]
                for configuration in (plans["configurations"][name] for name in CONFIGURATIONS):
                    configuration["normalization_schemes"] *= 2
                    configuration["use_mask_for_norm"] *= 2
            (folder / f"{PLANS}.json").write_text(json.dumps(plans))
            self._preprocess(name)
            self.split(name, (cases[:3], cases[3:]))
            self._made[kind] = name
        return self._made[kind]

    def split(self, name: str, *folds: tuple[Sequence[str], Sequence[str]]) -> None:
        content = [{"train": list(train), "val": list(val)} for train, val in folds]
        (self.preprocessed / name / "splits_final.json").write_text(json.dumps(content))

    def _copy_raw(self, name: str, cases: Sequence[str]) -> None:
        for part, ending in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
            (self.raw / name / part).mkdir(parents=True)
            for case in cases:
                shutil.copy(SOURCE / part / f"{case}{ending}", self.raw / name / part)
        content = json.loads((SOURCE / "dataset.json").read_text()) | {"numTraining": len(cases)}
        (self.raw / name / "dataset.json").write_text(json.dumps(content))

    def _preprocess(self, name: str) -> None:
        """What nnUNetv2_preprocess does, without its processes."""
        folder = self.preprocessed / name
        description = json.loads((folder / "dataset.json").read_text())
        plans = PlansManager(str(folder / f"{PLANS}.json"))
        for name_of_configuration in CONFIGURATIONS:
            configuration = plans.get_configuration(name_of_configuration)
            target = folder / configuration.data_identifier
            target.mkdir()
            for label in sorted((self.raw / name / "labelsTr").glob("*.nii.gz")):
                case = label.name.removesuffix(".nii.gz")
                images = [str(p) for p in sorted((self.raw / name / "imagesTr").glob(f"{case}_*.nii.gz"))]
                DefaultPreprocessor(verbose=False).run_case_save(
                    str(target / case), images, str(label), plans, configuration, description
                )

    @staticmethod
    def _planning() -> Any:
        """Within a session fixture there is no environment of a test yet."""
        return pytest.MonkeyPatch.context()

    # Kinds of data sets: each changes the raw files of four cases.

    @staticmethod
    def _describe(folder: Path, **changes: Any) -> None:
        path = folder / "dataset.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    @staticmethod
    def _edit(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
        image = sitk.ReadImage(path)
        changed = sitk.GetImageFromArray(change(sitk.GetArrayFromImage(image)))
        changed.CopyInformation(image)
        sitk.WriteImage(changed, path)

    def _make_regions(self, folder: Path, cases: Sequence[str]) -> None:
        labels = {"background": 0, "whole": [1, 2], "posterior": 2}
        self._describe(folder, labels=labels, regions_class_order=[1, 2])

    def _make_ignore(self, folder: Path, cases: Sequence[str]) -> None:
        self._describe(folder, labels={"background": 0, "Anterior": 1, "Posterior": 2, "ignore": 3})
        for case in cases:
            self._edit(folder / "labelsTr" / f"{case}.nii.gz", _ignore_a_third)

    def _make_regions_ignore(self, folder: Path, cases: Sequence[str]) -> None:
        labels = {"background": 0, "whole": [1, 2], "posterior": 2, "ignore": 3}
        self._describe(folder, labels=labels, regions_class_order=[1, 2])
        for case in cases:
            self._edit(folder / "labelsTr" / f"{case}.nii.gz", _ignore_a_third)

    def _make_two_channels(self, folder: Path, cases: Sequence[str]) -> None:
        self._describe(folder, channel_names={"0": "MRI", "1": "blurred"})
        for case in cases:
            image = sitk.ReadImage(folder / "imagesTr" / f"{case}_0000.nii.gz", sitk.sitkFloat32)
            sitk.WriteImage(sitk.SmoothingRecursiveGaussian(image, 2.0), folder / "imagesTr" / f"{case}_0001.nii.gz")

    def _make_nan(self, folder: Path, cases: Sequence[str]) -> None:
        """As it is; :meth:`spoil` puts the NaN in later, because readers of NIfTI files turn NaN into 0."""

    _make_nan_in_validation = _make_nan

    def spoil(self, name: str, case: str) -> None:
        """Puts one NaN into a preprocessed case."""
        folder = self.preprocessed / name / "nnUNetPlans_2d"
        image, segmentation, _, properties = nnUNetDatasetBlosc2(str(folder), [case]).load_case(case)
        image, segmentation = image[:], segmentation[:]
        image[0, 5, 20, 20] = np.nan
        for path in folder.glob(f"{case}*.b2nd"):
            path.unlink()
        nnUNetDatasetBlosc2.save_case(image, segmentation, properties, str(folder / case))

    def _make_empty_case(self, folder: Path, cases: Sequence[str]) -> None:
        self._edit(folder / "labelsTr" / f"{cases[1]}.nii.gz", np.zeros_like)


def _ignore_a_third(label: np.ndarray) -> np.ndarray:
    label = label.copy()
    label[:, :, : label.shape[2] // 3] = 3
    return label


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("nnunet"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables(world, world.root / "results").items():
            patch.setenv(name, value)
        patch.setattr(multiprocessing, "get_context", _threads)
        assert world.main == NAME
    return world


class Bench:
    """Makes trainers of this test, and runs them in this process."""

    def __init__(self, world: World, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.world, self.folder, self.patch = world, folder, patch

    @property
    def results(self) -> Path:
        return Path(os.environ["nnUNet_results"])

    def settings(self, **changes: Any) -> Path:
        """Writes a settings file and names it in the environment."""
        path = self.folder / "settings.yaml"
        path.write_text(yaml.safe_dump(SETTINGS | changes))
        self.patch.setenv("nnUNet_adversarial", str(path))
        return path

    def make(
        self,
        kind: str | type[nnUNetTrainer] = "AMAT",
        configuration: str = "2d",
        *,
        dataset: str = "main",
        fold: int | str = 0,
        resume: bool = False,
        plans: str = PLANS,
        **settings: Any,
    ) -> Any:
        """A trainer as nnUNetv2_train makes it: one of ours by the name of its method, or a class."""
        self.settings(**settings)
        if isinstance(kind, str):
            kind = getattr(trainers, f"nnUNetTrainer{kind}")
        folder = self.world.preprocessed / self.world.dataset(dataset)
        content = json.loads((folder / f"{plans}.json").read_text()) | {"continue_training": resume}
        description = json.loads((folder / "dataset.json").read_text())
        return kind(plans=content, configuration=configuration, fold=fold, dataset_json=description, device=CPU)

    def ready(self, *args: Any, **kwargs: Any) -> Any:
        """A trainer in the state after ``on_train_start``, in its first training epoch."""
        trainer = self.make(*args, **kwargs)
        trainer.on_train_start()
        trainer.on_train_epoch_start()
        return trainer

    def batches(self, trainer: Any, number: int, seed: int = 0) -> list[dict[str, Any]]:
        """Batches of a trainer's own data without augmentation, the same in every call; with ``ids`` where it has them.

        (Augmentation is not repeatable: nnU-Net's blur picks the faster of two algorithms by measuring them.)
        """
        if not trainer.was_initialized:
            trainer.initialize()
        training, _ = trainer.get_tr_and_val_datasets()
        labels = trainer.label_manager
        transforms = nnUNetTrainer.get_validation_transforms(
            trainer._get_deep_supervision_scales(),
            foreground_labels=labels.foreground_labels,
            regions=labels.foreground_regions if labels.has_regions else None,
            ignore_label=labels.ignore_label,
        )
        patch = trainer.configuration_manager.patch_size
        kind = nnUNetDataLoader
        if getattr(trainer, "method_name", None) in ("AMAT", "DPAAT") and len(patch) == 2:
            kind = trainers.SliceLoader
        loader = kind(training, trainer.batch_size, patch, patch, labels, 0.33, transforms=transforms)
        state = np.random.get_state()
        np.random.seed(seed)
        try:
            return [loader.generate_train_batch() for _ in range(number)]
        finally:
            np.random.set_state(state)

    def feed(self, trainer: Any, batches: Sequence[dict[str, Any]], validation: Sequence[dict[str, Any]]) -> None:
        """Makes a trainer take these batches, cycling through the validation ones."""

        def forever() -> Iterator[dict[str, Any]]:
            while True:
                for batch in validation:  # the host overwrites targets where there is an ignore label
                    yield batch | {"target": [t.clone() for t in batch["target"]]}

        trainer.get_dataloaders = lambda: (iter(batches), forever())

    def log(self, trainer: Any) -> str:
        return Path(trainer.log_file).read_text()


@pytest.fixture
def bench(world: World, tmp_path: Path, environment: None, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(world, tmp_path, monkeypatch)


@pytest.fixture(autouse=True)
def no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """progress.png costs more than a training epoch here; tests that want it say ``@pytest.mark.usefixtures``."""
    if "pictures" not in request.fixturenames:
        from nnunetv2.training.logging.nnunet_logger import LocalLogger

        monkeypatch.setattr(LocalLogger, "plot_progress_png", lambda self, folder: None)


@pytest.fixture
def pictures() -> None:
    """Asks for progress.png."""


@pytest.fixture(scope="session")
def stock_results(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with a finished training of the stock trainer (2d, fold 0), not to be written into."""
    folder = tmp_path_factory.mktemp("stock")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables(world, folder).items():
            patch.setenv(name, value)
        patch.setenv("nnUNet_n_proc_DA", "0")
        patch.setattr(multiprocessing, "get_context", _threads)
        from nnunetv2.training.logging.nnunet_logger import LocalLogger

        patch.setattr(LocalLogger, "plot_progress_png", lambda self, folder: None)
        torch.manual_seed(1)
        bench = Bench(world, folder, patch)
        trainer = bench.make(nnUNetTrainer)
        trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 1, 20, 1
        trainer.run_training()
        (folder / "settings.yaml").unlink()
    return folder


@pytest.fixture
def with_stock(stock_results: Path, bench: Bench) -> Path:
    """A copy of it as this test's results folder; returns the fold's folder."""
    shutil.copytree(stock_results, bench.results, dirs_exist_ok=True)
    return bench.results / NAME / f"nnUNetTrainer__{PLANS}__2d" / "fold_0"


@pytest.fixture(scope="session")
def console() -> SimpleNamespace:
    """The installed commands, by name."""
    scripts = Path(sysconfig.get_path("scripts"))
    return SimpleNamespace(
        train=[sys.executable, str(scripts / "nnUNetv2_train")],
        predict=[sys.executable, str(scripts / "nnUNetv2_predict")],
        ours=[sys.executable, str(scripts / "adv-nnunet")],
        twice=[sys.executable, str(scripts / "torchrun"), "--nproc-per-node", "2", "--no-python"],
    )

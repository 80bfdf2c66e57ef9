"""Sample ids name what the loader really cut."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.training.dataloading import data_loader as host_module
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as host_trainer_module

from adv_nnunet.loader import CellLoader, SliceLoader, case_of, has_foreground, with_loader


def test_slice_ids_name_the_stored_slices(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of cases whose every slice is filled with a number of its own."""
    trainer = bench.make()
    training, _ = trainer.get_tr_and_val_datasets()
    load_case, numbers = training.load_case, {}

    def numbered(case: str) -> tuple[Any, ...]:
        image, *rest = load_case(case)
        first = 1 + 1000 * training.identifiers.index(case)
        numbers.update({f"{case}:{i}": first + i for i in range(image.shape[1])})
        return first + np.arange(image.shape[1])[:, None, None] + np.zeros(image.shape, np.float32), *rest

    monkeypatch.setattr(training, "load_case", numbered)
    seen = set()
    for batch in bench.batches(trainer, 6):
        assert [case_of(sample) for sample in batch["ids"]] == list(batch["keys"])
        assert batch["data"].amax((1, 2, 3)).tolist() == [numbers[sample] for sample in batch["ids"]]
        seen |= {*batch["ids"]}
    assert len(seen) > 12
    assert seen <= set(trainer.sample_ids()) == set(numbers)


def test_ids_come_through_a_worker_process(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    trainer = bench.make()
    trainer.initialize()
    loaders = trainer.get_dataloaders()
    try:
        batch = next(loaders[0])
    finally:
        for loader in loaders:
            loader._finish()
    assert host_trainer_module.nnUNetDataLoader is host_module.nnUNetDataLoader, "ours stays behind"
    assert len(batch["ids"]) == trainer.batch_size
    assert [case_of(sample) for sample in batch["ids"]] == list(batch["keys"])
    assert set(batch["ids"]) <= set(trainer.sample_ids())


def test_cells_are_those_of_the_centre_of_the_patch() -> None:
    loader = CellLoader.__new__(CellLoader)
    loader.patch_size, loader.final_patch_size = (10, 14, 10), (8, 8, 8)
    assert loader._id("case", [0, 0, 0]) == "case:0,0,0"  # centre 5, 7, 5
    assert loader._id("case", [3, 1, 3]) == "case:1,1,1"  # 8, 8, 8
    assert loader._id("case", [-9, -9, 12]) == "case:0,0,2"  # outside below: the first cell; 17
    assert case_of("case:0,0,2") == "case"


def test_a_structure_is_no_background_nothing_to_ignore_and_nothing_outside() -> None:
    labels = torch.tensor([[0, 0], [0, 2], [-1, 0], [3, 3]]).view(4, 1, 1, 2)
    assert has_foreground(labels, None) == [False, True, False, True]
    assert has_foreground([labels, labels[:, :, :, :1]], 3) == [False, True, False, False]  # deep supervision
    regions = torch.tensor([[[0, 0], [0, 0]], [[0, 1], [0, 0]], [[0, 0], [1, 1]]]).unsqueeze(2).float()
    assert has_foreground(regions, None) == [False, True, True]
    assert has_foreground(regions, 3) == [False, True, False]  # the last channel is what is to be ignored


def test_cells_in_3d(bench: Any) -> None:
    trainer = bench.make(configuration="3d_fullres", sample_id="cell")
    trainer.initialize()
    batch = next(trainer.get_dataloaders()[0])
    assert all(sample.count(",") == 2 for sample in batch["ids"])
    assert trainer.sample_ids() is None


def test_a_trainer_with_loaders_of_its_own_is_told_what_to_do() -> None:
    class Own:
        def get_dataloaders(self) -> None:
            """Loaders from somewhere else."""

    with pytest.raises(RuntimeError, match=r"Own\.get_dataloaders does not build .* Set 'sample_id: case'"):
        with_loader(Own().get_dataloaders, SliceLoader)


def test_defaults_and_closures_of_the_method_survive() -> None:
    marker = object()

    def make(own: object) -> Any:
        def get_dataloaders(self: Any, first: int = 3, *, second: int = 4) -> Any:
            return nnUNetDataLoader, own, first, second  # noqa: F821 - a global of the host's module

        return get_dataloaders

    bound = types.MethodType(make(marker), object())
    assert with_loader(bound, SliceLoader) == (SliceLoader, marker, 3, 4)

"""Thresholds from a finished standard training: measured, found, chosen, and logged."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerNoMirroring import nnUNetTrainerNoMirroring
from nnunetv2.training.nnUNetTrainer.variants.loss.nnUNetTrainerDiceLoss import nnUNetTrainerDiceCELoss_noSmooth
from nnunetv2.training.nnUNetTrainer.variants.network_architecture.nnUNetTrainerBN import nnUNetTrainerBN
from nnunetv2.training.nnUNetTrainer.variants.network_architecture.nnUNetTrainerNoDeepSupervision import (
    nnUNetTrainerNoDeepSupervision,
)
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from adv_nnunet import calibration as standard
from adv_nnunet.cli import main
from adv_nnunet.trainer import AdversarialTraining, nnUNetTrainerAMAT
from advmed.files import sha256
from advmed.thresholds import RunningThresholds, TermStatistics, Thresholds
from helpers.hosts import as_on_a_terminal, different

FOUND = Thresholds((0.6,), ("ce+dice",), "mean+1std", (0.5,), (0.1,), 10)


def test_a_file_that_the_settings_name_beats_one_beside_the_standard_training(bench: Any, with_stock: Path) -> None:
    """A tagged trainer finds the same standard training."""
    found, named = with_stock / standard.FILE, bench.thresholds(0.125)
    FOUND.save(found)
    for settings, value, said in (
        ({"thresholds": named}, 0.125, f"Thresholds from the file {named}: ce+dice < 0.125"),
        ({}, 0.6, f"Thresholds from the file {found} (found beside the standard training)"),
        ({"tag": "x"}, 0.6, f"Thresholds from the file {found} (found beside the standard training)"),
        ({"rule": "mean"}, 0.5, "by the rule mean of the settings instead of the file's"),
    ):
        trainer = bench.started("AMAT", **settings)
        assert trainer.method.thresholds.values == (value,)
        assert said in bench.log(trainer)
        assert ("rule" in settings) == ("by the rule" in bench.log(trainer))
        other = "That file has the rule mean+1std, and keeps it. By default the preset"
        assert other in bench.log(trainer) or value != 0.6  # trainings of one second share a log
        assert trainer.run.warmup_epochs == 0


@pytest.mark.parametrize(("preset", "rule"), [("fast", "mean+2std"), ("paper", "mean")])
def test_the_rule_where_nothing_says_another(bench: Any, with_stock: Path, preset: str, rule: str) -> None:
    """Of a measured network, which is found again, and of a clean warm-up."""
    for measured in ("are measured on", "(found beside the standard training)"):
        trainer = bench.started("AMAT", threshold_samples=12, preset=preset)
        assert measured in bench.log(trainer)
        assert trainer.method.thresholds.rule == rule
        assert "By default the preset" not in bench.log(trainer)
    shutil.rmtree(with_stock)
    assert bench.started("AMAT", epochs=20, preset=preset).method.thresholds.rule == rule


def test_made_from_the_finished_standard_training(bench: Any, with_stock: Path) -> None:
    trainer = bench.started("AMAT", threshold_samples=30)
    log, path, checkpoint = bench.log(trainer), with_stock / standard.FILE, with_stock / standard.CHECKPOINT
    assert f"Thresholds are measured on the standard training {checkpoint}" in log
    assert "mean Dice of that network on clean training samples" in log
    assert f"written to {path}" in log
    found = Thresholds.load(path)
    assert trainer.method.thresholds == found
    assert found.n == 32  # whole batches of four
    assert (found.source, found.source_sha256) == (str(checkpoint), sha256(checkpoint))
    assert (found.notes["configuration"], found.notes["absent_classes"]) == ("2d", "skip")
    # The next training finds the file.
    again = bench.started("AMAT", tag="again")
    assert "found beside the standard training" in bench.log(again)
    assert "is not taken" not in bench.log(again)
    assert again.method.thresholds == found


@pytest.mark.parametrize("dataset", ["main", "regions_ignore", "two_channels"])
def test_our_own_standard_trainer_serves_too(bench: Any, finished: Callable[..., Path], dataset: str) -> None:
    """The schedule of the settings trains nnUNetTrainerSTD; its network is a standard one."""
    folder = finished(dataset)
    shutil.copytree(folder, bench.results / folder.parent.name / folder.name)
    trainer = bench.started("AMAT", dataset=dataset, threshold_samples=8)
    assert "nnUNetTrainerSTD__tiny__2d" in trainer.method.thresholds.source
    assert "measured on the standard training" in bench.log(trainer)
    assert math.isfinite(trainer.method.thresholds.values[0])


@pytest.mark.parametrize(
    "change",
    [{}, {"fold": 1}, {"configuration": "3d_fullres"}, {"std_trainer": "nnUNetTrainerNoMirroring"}, "unfinished"],
    ids=str,
)
def test_self_calibrated_where_there_is_no_finished_standard_training(
    bench: Any, with_stock: Path, change: Any
) -> None:
    """One of something else, or one that has not ended, does not count."""
    if change == "unfinished":
        change = {}
        (with_stock / standard.CHECKPOINT).rename(with_stock / "checkpoint_latest.pth")
    elif change:
        FOUND.save(with_stock / standard.FILE)
    else:
        shutil.rmtree(with_stock)
    trainer = bench.started("AMAT", epochs=20, **change)
    assert isinstance(trainer.method.thresholds, RunningThresholds)
    assert trainer.method.thresholds.statistics.memory == 2 * trainer.configuration_manager.batch_size, "an epoch"
    assert "Thresholds are self-calibrated: a clean warm-up first" in bench.log(trainer)
    assert trainer.run.warmup_epochs == 2  # a tenth
    assert "2 epoch(s) of clean warm-up" in bench.log(trainer)
    for dice, said in ((0.4321, "a pseudo Dice of 0.432"), (0.6, None)):
        trainer.logger.log("mean_fg_dice", dice, trainer.current_epoch)
        assert trainer._doubts() == said


def test_the_measured_mean_is_that_of_the_samples(
    bench: Any, stock: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By hand: the same draws through the same network. Repeatable, and without a trace."""
    trainer = bench.make("AMAT", threshold_samples=12, terms="separate", rule="mean+2std")
    trainer.initialize()
    rows, checkpoint = [], stock / "fold_0" / standard.CHECKPOINT

    class Spy(standard.SampleTerms):
        def __call__(self, outputs: Any, targets: Any) -> Any:
            rows.append(super().__call__(outputs, targets))
            return rows[-1]

    monkeypatch.setattr(standard, "SampleTerms", Spy)
    np.random.seed(98)  # another seed than that of the measurement
    state, weights = np.random.get_state()[1].copy(), {k: v.clone() for k, v in trainer.network.state_dict().items()}
    as_on_a_terminal(monkeypatch)
    found = standard.measure(trainer, checkpoint)
    assert "12/12 samples" in capsys.readouterr().err
    values = torch.cat(rows).double().numpy()
    assert values.shape == (12, 2)
    assert found.names == ("ce", "dice")
    assert found.mean == pytest.approx(values.mean(0), rel=1e-6)
    assert found.std == pytest.approx(values.std(0), rel=1e-5)
    assert found.values == pytest.approx(values.mean(0) + 2 * values.std(0), rel=1e-5)
    assert 0 <= found.notes["training_dice"] <= 1
    json.dumps(dict(found.notes))

    assert np.array_equal(np.random.get_state()[1], state)
    assert not different(trainer.network.state_dict(), weights)
    np.random.seed(99)
    assert standard.measure(trainer, checkpoint) == found
    object.__setattr__(trainer.settings, "seed", 1)  # of a run, for which thresholds are no other
    assert standard.measure(trainer, checkpoint) == found
    assert standard.measure(trainer, checkpoint, seed=1) != found


@pytest.mark.parametrize("how", ["standard", "path", "nothing to continue"])
def test_start_from_the_standard_training(bench: Any, with_stock: Path, how: str) -> None:
    """nnUNetv2_train --c with nothing to continue warns and trains from the start, which is where the settings say."""
    source = with_stock / standard.CHECKPOINT
    given = {"start_from": str(source) if how == "path" else "standard", "threshold_samples": 4}
    trainer = bench.started("AMAT", resume=how == "nothing to continue", **given)
    weights = torch.load(source, weights_only=False)["network_weights"]
    assert not different(trainer.network.state_dict(), weights)
    assert f"Starting from the weights of {source}" in bench.log(trainer)
    if how == "standard":  # but not a training that is continued
        trainer.run_training()
        again = bench.started("AMAT", resume=trainer, **given)
        assert not different(again.network.state_dict(), bench.saved(trainer)["network_weights"])
        assert different(again.network.state_dict(), weights)


class OlderSignature(nnUNetTrainer):
    """Its network is built by the signature that nnU-Net still takes from older trainers."""

    @staticmethod
    def build_network_architecture(
        architecture_class_name: str,
        arch_init_kwargs: dict[str, Any],
        arch_init_kwargs_req_import: Sequence[str],
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> torch.nn.Module:
        network: torch.nn.Module = get_network_from_plans(
            architecture_class_name, arch_init_kwargs, arch_init_kwargs_req_import, num_input_channels,
            num_output_channels, deep_supervision=enable_deep_supervision,
        )  # fmt: skip
        return network


class OlderSignatureAMAT(AdversarialTraining, OlderSignature):
    method_name = "AMAT"


@pytest.mark.filterwarnings("ignore:.*old build_network_architecture signature")
def test_a_network_built_by_the_old_signature_is_measured(bench: Any, with_stock: Path) -> None:
    """As the stock trainer's, for it is the same network here."""
    trainer = bench.started(OlderSignatureAMAT, threshold_samples=4, std_trainer="nnUNetTrainer")
    found = Thresholds.load(with_stock / standard.FILE)
    assert trainer.method.thresholds == found
    (with_stock / standard.FILE).unlink()
    assert bench.started("AMAT", threshold_samples=4).method.thresholds.values == found.values


class OtherTransformsAMAT(nnUNetTrainerAMAT):
    def get_training_transforms(self, *args: object, **kwargs: object) -> Any:
        return super().get_training_transforms(*args, **kwargs)


class MoreForegroundAMAT(nnUNetTrainerAMAT):
    def initialize(self) -> None:
        self.oversample_foreground_percent = 0.5
        super().initialize()


class NoMirroringAMAT(AdversarialTraining, nnUNetTrainerNoMirroring):
    method_name = "AMAT"


class NoDeepSupervisionAMAT(AdversarialTraining, nnUNetTrainerNoDeepSupervision):
    method_name = "AMAT"


class BatchNormAMAT(AdversarialTraining, nnUNetTrainerBN):
    method_name = "AMAT"


class NotSmoothAMAT(AdversarialTraining, nnUNetTrainerDiceCELoss_noSmooth):
    method_name = "AMAT"


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (NoDeepSupervisionAMAT, r"run: deep_supervision \[0\.6667, 0\.3333, 0\.0\] -> None\."),
        (NotSmoothAMAT, r"run: loss \['nnUNetTrainer'\] -> \['nnUNetTrainerDiceCELoss_noSmooth', 'nnUNetTrainer'\]\."),
        (
            NoMirroringAMAT,
            r"run: augmentation \['nnUNetTrainer'\] -> \['nnUNetTrainerNoMirroring', 'nnUNetTrainer'\]\.",
        ),
        (OtherTransformsAMAT, r"run: augmentation .* -> \['OtherTransformsAMAT', 'nnUNetTrainer'\]\."),
        (MoreForegroundAMAT, r"run: oversampling 0\.33 -> 0\.5\."),
        ("FAT", None),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_thresholds_of_a_trainer_with_other_samples_or_another_loss_are_not_taken(
    bench: Any, kind: Any, why: str | None
) -> None:
    """A file of an earlier release says nothing of them, and is."""
    plain, trainer = bench.make(tag="plain"), bench.make(kind, tag="x")
    plain.initialize()
    trainer.initialize()
    notes, path = standard.conditions(plain), bench.folder / "of_plain.json"
    replace(FOUND, notes=notes).save(path)
    if why is None:
        assert standard.load_named(trainer, path)[0].values == FOUND.values
        return
    with pytest.raises(ValueError, match=why):
        standard.load_named(trainer, path)
    earlier = ("dataset", "plans", "configuration", "fold", "absent_classes", "measured_on")
    replace(FOUND, notes={name: notes[name] for name in earlier}).save(path)
    assert standard.load_named(trainer, path)[0].values == FOUND.values


COMMAND = ["thresholds", "-d", "4", "-c", "2d", "-p", "tiny", "-device", "cpu", "--samples", "8", "-tr"]


@pytest.mark.parametrize(
    ("named", "kind"),
    [
        ("nnUNetTrainerNoDeepSupervision", NoDeepSupervisionAMAT),
        ("nnUNetTrainerNoMirroring", NoMirroringAMAT),
        ("nnUNetTrainerSTD_tagged", "AMAT"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_the_command_measures_what_amat_before_the_named_trainer_sees(
    bench: Any, with_stock: Path, named: str, kind: Any
) -> None:
    folder = with_stock.parent.with_name(f"{named}__tiny__2d")
    with_stock.parent.rename(folder)
    trainer = bench.make(kind, std_trainer=named, threshold_samples=8)
    trainer.initialize()
    assert main([*COMMAND, named]) == 0
    found = Thresholds.load(folder / "fold_0" / standard.FILE)
    assert found.notes == standard.conditions(trainer) | {"training_dice": found.notes["training_dice"]}
    assert found.values == pytest.approx(standard.measure(trainer, folder / "fold_0" / standard.CHECKPOINT).values)
    trainer.on_train_start()
    assert trainer.method.thresholds == found
    assert "is not taken" not in bench.log(trainer)


def test_a_standard_training_of_another_network_is_named(
    bench: Any, with_stock: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for settings in ({}, {"start_from": "standard", "thresholds": bench.thresholds(1.0)}):
        with pytest.raises(ValueError, match=r"checkpoint_final\.pth is of another network .* with 'std_trainer' or"):
            bench.started(BatchNormAMAT, std_trainer="nnUNetTrainer", **settings)
    with_stock.parent.rename(with_stock.parent.with_name("nnUNetTrainerBN__tiny__2d"))
    assert main([*COMMAND, "nnUNetTrainerBN"]) == 1
    assert "is of another network" in capsys.readouterr().err
    assert main([*COMMAND, "nnUNetTrainerNobodys"]) == 1
    assert "nnU-Net finds no trainer 'nnUNetTrainerNobodys'" in capsys.readouterr().err


def damaged(path: Path) -> None:
    path.write_text(path.read_text()[:40])


def of_another_network(path: Path) -> None:
    Thresholds((0.5,), ("ce+dice",), "mean", (0.5,), (0.1,), 10, "checkpoint", "0" * 64).save(path)


@pytest.mark.parametrize(
    ("spoil", "kept", "why"),
    [
        (damaged, False, "is not a thresholds file"),
        (of_another_network, False, "it was made of another checkpoint than the checkpoint_final.pth beside it"),
        ({"absent_classes": "count"}, True, "of something else than this run: absent_classes skip -> count"),
        ({"terms": "separate"}, True, "K = 1 loss terms"),
    ],
    ids=["damaged", "of_another_network", "absent_classes", "terms"],
)
def test_thresholds_of_another_thing_are_measured_anew(
    bench: Any, with_stock: Path, spoil: Any, kept: bool, why: str
) -> None:
    """What the file says of itself is compared with the run. One that is right for other runs stays as it is."""
    bench.started("AMAT", threshold_samples=4)
    path, settings = with_stock / standard.FILE, spoil if isinstance(spoil, dict) else {}
    if not settings:
        spoil(path)
    before = path.read_bytes()
    trainer = bench.started("AMAT", threshold_samples=4, tag="second", **settings)
    log, own = bench.log(trainer), Path(trainer.output_folder) / standard.FILE
    assert "is not taken" in log
    assert why in log
    assert "Thresholds are measured on the standard training" in log
    assert (path.read_bytes() == before) == kept == own.is_file()
    assert Thresholds.load(own if kept else path) == trainer.method.thresholds


def test_a_named_file_of_another_thing_is_refused(bench: Any, with_stock: Path) -> None:
    trainer = bench.started("AMAT", threshold_samples=4)
    named = bench.folder / "named.json"
    shutil.copy(with_stock / standard.FILE, named)
    with pytest.raises(ValueError, match=r"named\.json are of something else than this run: fold 0 -> 1\. Make them"):
        bench.started("AMAT", fold=1, thresholds=str(named))
    assert bench.started("AMAT", tag="x", thresholds=str(named)).method.thresholds == trainer.method.thresholds


def test_a_standard_training_in_a_folder_that_cannot_be_written(
    bench: Any, with_stock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Thresholds.save

    def refused(thresholds: Thresholds, path: Path) -> None:
        if Path(path).parent == with_stock:
            raise PermissionError(13, "Permission denied")
        save(thresholds, path)

    monkeypatch.setattr(Thresholds, "save", refused)
    trainer = bench.started("AMAT", threshold_samples=4)
    own = Path(trainer.output_folder) / standard.FILE
    assert Thresholds.load(own) == trainer.method.thresholds
    assert f"written to {own}" in bench.log(trainer)


def test_several_processes_measure_what_one_measures(
    bench: Any, with_stock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each a part of the batches, of the size and with the foreground that one process draws."""
    checkpoint = with_stock / standard.CHECKPOINT
    trainer = bench.make("AMAT", threshold_samples=16)
    trainer.initialize()
    alone = standard.measure(trainer, checkpoint)
    states: list[Any] = []

    def one_of_two(rank: int) -> Any:
        trainer.batch_size, trainer.oversample_foreground_percent = 2, float(rank)  # as the host shares them
        monkeypatch.setattr(standard, "place", lambda: (rank, 2))
        monkeypatch.setattr(TermStatistics, "merge", lambda statistics: states.append(statistics.state_dict()))
        standard.measure(trainer, checkpoint)
        assert (trainer.batch_size, trainer.oversample_foreground_percent) == (2, float(rank))

    for rank in (0, 1):
        one_of_two(rank)
    monkeypatch.undo()
    assert [state["n"] for state in states] == [8, 8]
    together = TermStatistics(alone.names, keep=True)
    together.merge(states)
    assert together.thresholds("mean").mean == pytest.approx(alone.mean, rel=1e-6)
    assert together.thresholds("mean").std == pytest.approx(alone.std, rel=1e-6)

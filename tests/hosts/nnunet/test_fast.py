"""The preset "fast": from the standard network, in a quarter of its epochs, and the best epoch by robust Dice."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.run.run_training import maybe_load_checkpoint
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from adv_nnunet import calibration as standard
from adv_nnunet.loader import PartLoader
from adv_nnunet.settings import STATE
from helpers.hosts import different

FAST: dict[str, Any] = {"preset": "fast", "steps": None, "step_scale": None, "epochs": None}


def weights_of(path: Path) -> Any:
    return torch.load(path, weights_only=False)["network_weights"]


def shorter(path: Path, epochs: int) -> None:
    """Makes a standard training say that it took so many epochs."""
    checkpoint = torch.load(path, weights_only=False)
    torch.save(checkpoint | {"current_epoch": epochs}, path)


def test_it_starts_from_the_standard_network_for_a_quarter_of_its_epochs(bench: Any, with_stock: Path) -> None:
    checkpoint = with_stock / standard.CHECKPOINT
    shorter(checkpoint, 6)
    trainer = bench.started("AMAT", threshold_samples=8, **FAST)
    assert trainer.num_epochs == trainer.run.epochs == trainer.lr_scheduler.max_steps == 2
    assert not different(trainer.network.state_dict(), weights_of(checkpoint))
    assert trainer.method.thresholds.source == str(checkpoint)
    assert trainer.method.attack.lengths == pytest.approx((1, 1 / 2, 1 / 4))
    log = bench.log(trainer)
    assert "a quarter of the 6 epochs of the standard training, 2" in log
    assert f"Starting from the weights of {checkpoint}" in log
    for trainer, epochs in (  # what is given is taken
        (bench.started("AMAT", threshold_samples=8, **FAST | {"epochs": 3}, tag="a"), 3),
        (bench.started("AMAT", threshold_samples=8, start_from="scratch", **FAST | {"epochs": 3}, tag="b"), 3),
    ):
        assert trainer.num_epochs == epochs
        assert bool(different(trainer.network.state_dict(), weights_of(checkpoint))) == (trainer.settings.tag == "b")


@pytest.mark.parametrize(
    ("given", "epochs", "taken"),
    [({}, 1000, True), ({"epochs": 3}, 3, True), ({"start_from": "standard"}, 2, False)],
    ids=str,
)
def test_weights_of_the_command_line_are_trained_as_long_as_from_scratch(
    bench: Any, with_stock: Path, given: dict[str, Any], epochs: int, taken: bool
) -> None:
    """The host makes network and schedule before it loads them; only the standard training needs a quarter."""
    checkpoint, other = with_stock / standard.CHECKPOINT, bench.folder / "other.pth"
    shorter(checkpoint, 6)
    bench.started("SAT", **FAST | {"epochs": 1}, start_from="scratch", tag="other").save_checkpoint(str(other))
    trainer = bench.make("SAT", **FAST | given)
    maybe_load_checkpoint(trainer, False, False, str(other))
    before = copy.deepcopy(trainer.network.state_dict())
    trainer.on_train_start()
    assert trainer.num_epochs == trainer.run.epochs == trainer.lr_scheduler.max_steps == epochs
    assert bool(different(trainer.network.state_dict(), before)) != taken
    assert ("a quarter of the 6 epochs" in bench.log(trainer)) == (not taken)
    assert ("the weights of the command line and trains all 1000 epochs" in bench.log(trainer)) == (epochs == 1000)
    rates = {group["lr"] for group in trainer.optimizer.param_groups}
    trainer.on_train_epoch_start()
    assert rates == {0.01} == {group["lr"] for group in trainer.optimizer.param_groups}
    assert trainer.lr_scheduler.optimizer is trainer.optimizer


def test_without_a_standard_training_it_says_what_is_missed(bench: Any) -> None:
    trainer = bench.started("SAT", **FAST | {"epochs": 2})
    assert "SAT trains from scratch, 2 epochs. With one (the stock trainer, same fold) a quarter" in bench.log(trainer)
    assert "from scratch" not in bench.log(bench.started("STD", **FAST | {"epochs": 2}))


def test_a_resumed_run_keeps_its_length(bench: Any, with_stock: Path) -> None:
    """Whatever has become of the standard training; and its best epoch stays to be beaten."""
    checkpoint = with_stock / standard.CHECKPOINT
    shorter(checkpoint, 12)
    first = bench.make("SAT", save_every=1, **FAST)
    first.num_epochs = 1  # it ends early
    first.run_training()
    first.num_epochs = 3
    first.save_checkpoint(str(Path(first.output_folder) / "checkpoint_final.pth"))
    checkpoint.unlink()
    again = bench.make("SAT", resume=first, save_every=1, **FAST)
    assert again.num_epochs == again.lr_scheduler.max_steps == 3
    assert again._best_robust == first._best_robust > -math.inf
    again.run_training()
    assert len(again._logged("adv_robust_dice")) == 3


@pytest.mark.parametrize(
    ("configuration", "kind"), [("3d_fullres", "SAT"), ("3d_fullres", "AMAT"), ("3d_fullres", "DPAAT")]
)
def test_a_shared_first_gradient_changes_nothing_but_the_time(bench: Any, configuration: str, kind: str) -> None:
    """Where Dice is averaged over samples: then the loss of the batch is the mean of theirs."""
    ends, passes = [], []
    for share in (False, True):
        trainer = bench.ready(
            kind, configuration, share_gradient=share, start="delta", thresholds=bench.thresholds(1.0), warmup_epochs=0,
            tag=str(share), **FAST | {"epochs": 1},
        )  # fmt: skip
        assert not trainer.terms.dice.batch_dice
        count = trainer.network.register_forward_hook(lambda *_, passes=passes, share=share: passes.append(share))
        (batch,) = bench.batches(trainer, 1)
        trainer.train_step(batch)
        count.remove()
        ends.append(trainer.network.state_dict())
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-3, atol=1e-6, msg=name)
    assert (passes.count(False), passes.count(True)) == (5, 4)


@pytest.mark.parametrize("given", [{}, {"preset": "paper", "steps": 2}, {"backward": "sequential"}], ids=str)
def test_gradients_are_taken_at_moved_weights(bench: Any, given: dict[str, Any]) -> None:
    """With weights that are hardly moved they are those of a training without; with others, others."""
    ends: dict[float, Any] = {}
    for awp in (0.0, 1e-12, 0.5):
        own = FAST | {"epochs": 1} | given
        trainer = bench.ready("SAT", "3d_fullres", awp=awp, warmup_epochs=0, tag=str(awp), **own)
        passes: list[int] = []
        count = trainer.network.register_forward_hook(lambda *_, passes=passes: passes.append(1))
        (batch,) = bench.batches(trainer, 1)
        trainer.train_step(batch)
        count.remove()
        ends[awp] = trainer.network.state_dict(), len(passes)
    (plain, fewer), (same, more), (other, _) = ends.values()
    assert more == fewer + 2, "clean and attacked once more"
    for name, value in plain.items():
        torch.testing.assert_close(same[name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert max(float((other[name] - value).abs().max()) for name, value in plain.items()) > 1e-4


def test_a_level_grows_with_the_training(bench: Any) -> None:
    """By the iterations of an epoch, as the host has them."""
    own = FAST | {"epochs": 2, "iterations_per_epoch": 2}
    trainer = bench.ready("SAT", "3d_fullres", ramp=1.0, eps=2.0, delta=0.5, warmup_epochs=0, **own)
    assert bench.log(trainer).count("Set, and without any effect on SAT: delta \n") == 1
    levels = []
    for batch in bench.batches(trainer, 3):
        trainer.train_step(batch)
        levels.append(trainer.run.method.eps)
    assert levels == pytest.approx([0.5, 1.0, 1.0])  # of its first epoch, which is half of the training


@pytest.mark.parametrize("kind", ["SAT", "STD"])
@pytest.mark.parametrize(
    ("decay", "rates"),
    [
        ("late", [0.02] * 7 + [0.01]),  # it falls within the last of four epochs, iteration by iteration
        ("host", [0.02 * (1 - k // 2 / 4) ** 0.9 for k in range(8)]),
    ],
)
def test_the_learning_rate_falls_late(bench: Any, kind: str, decay: str, rates: list[float]) -> None:
    own = FAST | {"epochs": 4, "iterations_per_epoch": 2, "initial_lr": 0.02, "steps": 1, "warmup_epochs": 0}
    trainer = bench.started(kind, "3d_fullres", decay=decay, **own)
    (batch,) = bench.batches(trainer, 1)
    found = []
    for epoch in range(4):
        trainer.current_epoch = epoch
        trainer.on_train_epoch_start()
        for _ in range(2):
            trainer.train_step(batch)
            found.append(trainer.optimizer.param_groups[0]["lr"])
    assert found == pytest.approx(rates)


def test_a_base_whose_optimizer_depends_on_a_stage(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As nnUNetTrainer_warmup's."""
    own, stages = nnUNetTrainer.configure_optimizers, []
    monkeypatch.setattr(nnUNetTrainer, "configure_optimizers", lambda self, stage="": stages.append(stage) or own(self))
    trainer = bench.ready("SAT", "3d_fullres", warmup_epochs=0, **FAST | {"epochs": 2})
    trainer.configure_optimizers("warmup_all")
    assert stages[-1] == "warmup_all"
    trainer.settings = replace(trainer.settings, decay="late")
    with pytest.raises(ValueError, match=r"'decay: late' would take the place of the warm-up that .* has"):
        trainer.configure_optimizers("warmup_all")


def test_the_best_epoch_is_that_of_the_robust_dice(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never one of the clean warm-up, whose Dice is the best here."""
    trainer = bench.make(
        "SAT", epochs=4, warmup_epochs=1, iterations_per_epoch=1, val_iterations_per_epoch=3, robust_val_iterations=2
    )
    robust, attacked, saved = iter([0.2, 0.4, 0.1]), [], []
    sizes = np.array([100.0, 100.0])

    def counts(batch: Any) -> Any:
        value = scores[trainer.current_epoch]
        attacked.append(trainer.current_epoch)
        return np.stack([value * sizes, (1 - value) * sizes, (1 - value) * sizes])

    scores = {1: next(robust), 2: next(robust), 3: next(robust)}
    monkeypatch.setattr(trainer, "_attacked_counts", counts)
    save = trainer.save_checkpoint
    monkeypatch.setattr(
        trainer, "save_checkpoint", lambda path: (saved.append((trainer.current_epoch, Path(path).name)), save(path))
    )
    trainer.run_training()
    assert [epoch for epoch, name in saved if name == "checkpoint_best.pth"] == [1, 2]
    assert attacked == [1, 1, 2, 2, 3, 3]
    assert trainer._logged("adv_robust_dice") == pytest.approx([math.nan, 0.2, 0.4, 0.1], nan_ok=True)
    averages = [math.nan, 0.2, 0.2 * 0.9 + 0.4 * 0.1, (0.2 * 0.9 + 0.4 * 0.1) * 0.9 + 0.1 * 0.1]
    assert trainer._logged("adv_ema_robust_dice") == pytest.approx(averages, nan_ok=True)
    for name in ("best", "final"):
        checkpoint = bench.saved(trainer, name)
        assert checkpoint[STATE]["nnunet"]["best_robust"] == pytest.approx(averages[2])
        assert math.isfinite(checkpoint["_best_ema"])
    # without attacked batches clean Dice decides, of the epochs that were attacked
    saved.clear()
    trainer = bench.make("SAT", epochs=3, warmup_epochs=2, iterations_per_epoch=1, robust_val_iterations=0, tag="clean")
    save = trainer.save_checkpoint
    monkeypatch.setattr(
        trainer, "save_checkpoint", lambda path: (saved.append((trainer.current_epoch, Path(path).name)), save(path))
    )
    trainer.run_training()
    assert [epoch for epoch, name in saved if name == "checkpoint_best.pth"] == [2]


@pytest.mark.parametrize("dataset", ["main", "regions_ignore", "ignore"])
def test_the_robust_dice_is_that_of_the_attacked_images(bench: Any, dataset: str) -> None:
    """At noise level 0 it is the host's own pseudo Dice; the host's targets are left as they are."""
    trainer = bench.ready("SAT", dataset=dataset, initial_lr=0.1)
    (batch,) = bench.batches(trainer, 1)
    with torch.no_grad():
        for eps, same in ((0.0, True), (200.0, False)):
            object.__setattr__(trainer.settings, "eps", eps)
            targets = [target.clone() for target in batch["target"]]
            found = trainer._attacked_counts(batch)
            assert all(map(torch.equal, batch["target"], targets))
            host = trainer.validation_step({**batch, "target": [target.clone() for target in targets]})
            own = np.stack([host["tp_hard"], host["fp_hard"], host["fn_hard"]])
            assert np.allclose(found, own) == same


@pytest.mark.parametrize("dataset", ["main", "regions_ignore", "ignore", "empty_case"])
def test_patches_with_foreground_and_without_have_margins_of_their_own(bench: Any, dataset: str) -> None:
    trainer = bench.make(configuration="3d_fullres", dataset=dataset, preset="fast")
    assert trainer.settings.sample_id == "part"
    ids = trainer.sample_ids()
    ignore = trainer.label_manager.ignore_label
    for batch in bench.batches(trainer, 6):
        assert set(batch["ids"]) <= set(ids)
        for case, sample, target in zip(batch["keys"], batch["ids"], batch["target"][0], strict=True):
            labels = target[:-1] if len(target) > 1 and ignore is not None else target
            holds = bool(((labels > 0) & (labels != (ignore if len(target) == 1 else None))).any())
            assert sample == f"{case}:{'foreground' if holds else 'background'}"
    if dataset == "main":
        loader = PartLoader.__new__(PartLoader)
        assert isinstance(loader, PartLoader.__mro__[1])


def test_the_log_shows_margins_of_foreground(bench: Any) -> None:
    trainer = bench.ready("AMAT", "3d_fullres", thresholds=bench.thresholds(1.0))
    case = trainer.sample_ids()[0].rsplit(":", 1)[0]
    trainer.method.margins.set([f"{case}:foreground", f"{case}:background"], [2.0, 90.0])
    assert trainer.run.end_epoch()["margin_q95"] == 2.0


def test_an_untrained_standard_network_is_refused(bench: Any, finished: Callable[..., Path], with_stock: Path) -> None:
    """It has learnt nothing: all its weights are as large as they came, and random."""
    path = with_stock / standard.CHECKPOINT
    checkpoint = torch.load(path, weights_only=False)
    for name, value in checkpoint["network_weights"].items():
        if "seg_layers" in name:
            checkpoint["network_weights"][name] = torch.zeros_like(value)  # says background everywhere
    torch.save(checkpoint, path)
    with pytest.raises(
        ValueError, match=r"has a mean Dice of 0\.0 on its own training samples: .*check_standard: false"
    ):
        bench.started("AMAT", threshold_samples=8, check_standard=True)
    assert (with_stock / standard.FILE).is_file()  # and from the file again
    with pytest.raises(ValueError, match="it has learnt next to nothing"):
        bench.started("AMAT", check_standard=True, tag="again")
    trainer = bench.started("AMAT", threshold_samples=8, check_standard=False, tag="still")
    assert "WARNING: the standard network behind" in bench.log(trainer)


def test_thresholds_are_measured_on_what_training_sees(bench: Any, with_stock: Path) -> None:
    """With its augmentation, in training mode, repeatable, and without a trace in any random state."""
    trainer = bench.make("AMAT", threshold_samples=40, seed=None)
    trainer.initialize()
    seen, modes = [], []
    own = trainer.get_training_transforms
    trainer.get_training_transforms = lambda *a, **k: (seen.append(1), own(*a, **k))[1]
    build = trainer.build_network_architecture

    @functools.wraps(build)  # the host looks at the signature
    def building(*args: Any, **kwargs: Any) -> Any:
        network = build(*args, **kwargs)
        network.register_forward_hook(lambda module, *_: modes.append(module.training))
        return network

    trainer.build_network_architecture = building
    states = np.random.get_state()[1].copy(), torch.get_rng_state()
    first, second, third = (
        standard.measure(trainer, with_stock / standard.CHECKPOINT, seed=seed).values[0] for seed in (0, 0, 1)
    )
    assert first == pytest.approx(second, rel=1e-3) != pytest.approx(third, rel=1e-6)
    assert len(seen) == 3
    assert len(modes) >= 30
    assert all(modes)
    assert (np.random.get_state()[1] == states[0]).all()
    assert torch.equal(torch.get_rng_state(), states[1])


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["0", "1"])
def test_two_runs_with_a_seed_are_the_same(bench: Any, monkeypatch: pytest.MonkeyPatch, processes: str) -> None:
    """Augmentation, batches and weights; another seed makes other ones."""
    monkeypatch.setenv("nnUNet_n_proc_DA", processes)
    ends = []
    for number, seed in enumerate((3, 3, 4)):
        trainer = bench.make("SAT", seed=seed, tag=f"{number}", iterations_per_epoch=3)
        trainer.on_train_start()
        try:
            trainer.on_epoch_start()
            trainer.on_train_epoch_start()
            for _ in range(3):
                trainer.train_step(next(trainer.dataloader_train))
        finally:
            for loader in (trainer.dataloader_train, trainer.dataloader_val):
                getattr(loader, "_finish", lambda: None)()
        ends.append(trainer.network.state_dict())
    assert not different(ends[0], ends[1])
    assert different(ends[0], ends[2])

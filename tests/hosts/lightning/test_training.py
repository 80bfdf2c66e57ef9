"""What a run is resumed with, what it keeps as its best, and what it refuses; small trainings of either host."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger

from adv_classify import MedMNIST, Network, RobustClassifier
from adv_classify.evaluate import load_model
from advmed import DPAAT, MarginStore, MethodRun
from advmed.integrations.lightning import RobustModule
from advmed.integrations.lightning.module import folder_of
from advmed.testing.lightning import (
    LightningHost,
    Run,
    in_words,
    listening,
    noted_rates,
    runs,
    watched_by,
    watched_steps,
)
from helpers.classify import Classify, Small, noise, write_npz
from helpers.mistakes import told


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command leaves in its folder is looked for there."""
    monkeypatch.chdir(tmp_path)


def epochs(run: Run) -> dict[str, int]:
    """The epochs of a run's checkpoints."""
    return {path.name: int(torch.load(path, weights_only=True)["epoch"]) for path in run.last.parent.iterdir()}


def resume(host: LightningHost, folder: Path, run: Run, **changes: Any) -> Run:
    return host.fit(folder, ckpt_path=run.last, **changes)


# The best epoch


@pytest.mark.slow
def test_a_resumed_run_keeps_the_best_epoch_of_the_first(host: LightningHost, tmp_path: Path) -> None:
    """In its own folder, also where the run has been moved; unless the file is of an epoch that is done again."""
    by_epoch: dict[str, Any] = {"checkpoint__monitor": "epoch", "checkpoint__mode": "min"}
    first = host.fit(tmp_path / "first", trainer__max_epochs=2, **by_epoch)
    assert epochs(resume(host, tmp_path / "second", first, trainer__max_epochs=3, **by_epoch)) == {
        "best.ckpt": 0,
        "last.ckpt": 2,
    }
    moved = first.folder.rename(tmp_path / "moved")
    run = resume(host, tmp_path / "third", Run(moved), trainer__max_epochs=3, **by_epoch)
    assert epochs(run) == {"best.ckpt": 0, "last.ckpt": 2}
    assert all(torch.equal(v, Run(moved).weights("best")[k]) for k, v in run.weights("best").items())
    few = host.fit(tmp_path / "few", trainer__max_epochs=3, checkpoint__save_top_k=2, **by_epoch)
    assert epochs(resume(host, tmp_path / "few", few, trainer__max_epochs=4, checkpoint__save_top_k=2, **by_epoch)) == {
        "best.ckpt": 0,
        "epoch=0.ckpt": 0,
        "epoch=1.ckpt": 1,
        "last.ckpt": 3,
    }
    (moved / "checkpoints" / "best.ckpt").unlink()
    with pytest.warns(UserWarning, match="is not there any more or of a later epoch: the best ones will be among"):
        run = resume(host, tmp_path / "fourth", Run(moved), trainer__max_epochs=3, **by_epoch)
    assert epochs(run) == {"best.ckpt": 2, "last.ckpt": 2}


def test_the_mode_fits_what_is_watched(host: LightningHost) -> None:
    """Where it is not named, and where it is named."""
    metric, mode = host.monitor
    other = {"max": "min", "min": "max"}[mode]
    command = host.module.mode_of
    assert [command(name) for name in (metric, host.robust, "adv/loss_clean", "train/loss", "val/other")] == [
        mode,
        mode,
        "min",
        "min",
        None,
    ]
    said = f"BestCheckpoint takes the worst epoch by {metric} for the best: its mode is {other}, set {mode}"
    assert host.refused(checkpoint__monitor=metric, checkpoint__mode=other) == said
    said = f"BestStopping takes the worst epoch by {metric} for the best: its mode is {other}, set {mode}"
    stop = {"class_path": "EarlyStopping", "init_args": {"monitor": metric, "mode": other}}
    assert host.refused(trainer__callbacks=[stop]) == said
    message = host.refused(checkpoint__monitor="val/other")
    assert message == "whether val/other is better when larger or smaller is not known: set checkpoint.mode"


@pytest.mark.slow
def test_a_loss_is_best_when_it_is_least(host: LightningHost, tmp_path: Path) -> None:
    run = host.fit(tmp_path, checkpoint__monitor="adv/loss_clean", trainer__max_epochs=3, model__lr=3e-3)
    losses = run.logged("adv/loss_clean")
    assert epochs(run)["best.ckpt"] == int(np.argmin(losses))
    assert watched_by(run) == ("adv/loss_clean", "min")


def test_a_configuration_of_a_standard_run_leaves_the_choice_of_the_best_epoch_open(
    host: LightningHost, tmp_path: Path
) -> None:
    """Or an adversarial training by it would keep its best epoch of clean images."""
    first = host.fit(tmp_path / "first")
    assert watched_by(first) == host.monitor
    again = ["fit", "--config", first.folder / "config.yaml", "--model.method.name", "SAT"]
    host.ok(*again, "--trainer.default_root_dir", tmp_path / "second")
    (second,) = runs(tmp_path / "second")
    assert watched_by(second) == (host.robust, host.monitor[1])
    wanted = f"the best epoch of SAT is chosen by {host.monitor[0]}, of clean images"
    with pytest.warns(UserWarning, match=wanted):
        host.ok(*again, "--checkpoint.monitor", host.monitor[0], "--trainer.default_root_dir", tmp_path / "third")
    (third,) = runs(tmp_path / "third")
    assert watched_by(third) == host.monitor


# The folder of a run


def test_a_run_writes_where_its_checkpoints_lie_and_over_no_file_of_the_users(
    host: LightningHost, tmp_path: Path
) -> None:
    """Where the logger has no folder of its own: the working folder is nobody's run."""
    own = Path("config.yaml")
    own.write_text("trainer:\n  logger: false\n  default_root_dir: null\n")
    words = host.words(tmp_path / "unused", config=own, trainer__default_root_dir=None)
    message = host.fails("fit", *words)
    assert message == (
        f"the training would write its configuration over {tmp_path / own}, which is yours: give the run a folder of "
        f"its own with trainer.default_root_dir"
    )
    assert own.read_text().startswith("trainer:")
    assert not list(tmp_path.rglob("*.ckpt"))
    kept = {"model__method__name": "DPAAT", "checkpoint__dirpath": tmp_path / "run" / "checkpoints"}
    host.ok("fit", *words, *in_words(kept))
    run = Run(tmp_path / "run")
    assert {path.name for path in run.folder.iterdir()} >= {"config.yaml", "adversarial.yaml", "margins.csv"}
    assert {path.name for path in tmp_path.glob("[!.]*") if path.is_file()} == {"config.yaml"}
    host.ok("fit", *words, *in_words(kept))  # over what a run has left
    message = host.fails("fit", "--config", run.folder / "config.yaml")
    assert "which is yours" in message  # it was told to read that very file
    before = (run.folder / "config.yaml").read_text()
    root = ["--trainer.logger", "false", "--trainer.default_root_dir", run.folder]
    host.ok("predict", *host.reading(), "--ckpt_path", run.last, *root)
    assert (run.folder / "config.yaml").read_text() == before
    assert (run.folder / "predictions.csv").is_file()


def test_the_folder_of_a_run_is_the_loggers_or_that_of_the_checkpoints() -> None:
    """As of Weights & Biases, whose files lie elsewhere, and without a logger."""
    kept = [SimpleNamespace(dirpath="runs/project/7/checkpoints"), SimpleNamespace(dirpath="other/checkpoints")]
    for logger, callbacks, folder in (
        (CSVLogger("runs"), kept, "log"),
        (Logger, kept, "runs/project/7"),
        (None, kept, "runs/project/7"),
        (None, [SimpleNamespace()], "log"),
        (None, [], "log"),
    ):
        trainer = SimpleNamespace(log_dir="log", logger=logger, checkpoint_callbacks=callbacks)
        assert folder_of(trainer) == folder


# What a trained network is validated with


def test_options_of_a_trained_network_win_or_are_refused(host: LightningHost, tmp_path: Path) -> None:
    run = host.fit(tmp_path)
    words = ["validate", *host.reading(), "--ckpt_path", run.last, "--trainer.default_root_dir", tmp_path]
    assert host.robust not in host.ok(*words)
    assert host.robust in host.ok(*words, "--model.validation_steps", 2, "--model.method.eps", 0.5)
    found = runs(tmp_path)[-1].yaml()["model"]
    assert (found["validation_steps"], found["method"]["eps"], found["method"]["name"]) == (2, 0.5, "STD")
    assert found["network"] == run.yaml()["model"]["network"]
    message = host.fails(*words, "--model.lr", 0.5)
    assert message == (
        "--model.lr is 0.5, and the checkpoint was trained with 0.001: leave it out. Of a trained network, validate "
        "can change validation_steps, method and attack"
    )
    (name, value), *_ = host.other_network.items()
    assert "and the checkpoint was trained with" in host.fails(*words, *in_words({name: value}))
    host.ok(*words, *in_words(dict(host.network)), "--model.network.weights", run.last)  # the same, and to begin with


# Checkpoints by name, and a longer run


@pytest.mark.slow
def test_the_last_checkpoint_by_name(host: LightningHost, tmp_path: Path) -> None:
    """Where the folder is the same for every run, as Lightning has it; else the newest is named, and nothing begins."""
    kept: dict[str, Any] = {"checkpoint__dirpath": tmp_path / "kept"}
    host.fit(tmp_path, trainer__max_epochs=2, **kept)
    host.fit(tmp_path, trainer__max_epochs=3, ckpt_path="last", **kept)
    path = tmp_path / "kept" / "last.ckpt"
    assert torch.load(path, weights_only=True)["epoch"] == 2
    words = [
        *host.reading(),
        "--trainer.default_root_dir",
        tmp_path,
        *in_words(kept),
    ]  # the network is the checkpoint's
    shown = [host.ok("validate", *words, "--ckpt_path", name) for name in ("last", path)]
    assert shown[0] == shown[1]
    run = host.fit(tmp_path / "runs")
    root = ["--trainer.default_root_dir", tmp_path / "runs"]
    for command in ("validate", "test", "predict"):
        message = host.fails(command, *host.reading(), *root, "--ckpt_path", "last")
        assert (
            message
            == f"--ckpt_path last finds no checkpoint in the folder of this run: name the file, such as {run.last}"
        )
    for name, checkpoint in (("last", run.last), ("best", run.best)):
        message = host.fails("fit", *host.words(tmp_path / "runs", ckpt_path=name))
        assert message.endswith(f"name the file, such as {checkpoint}")


@pytest.mark.slow
def test_the_rate_of_a_longer_run_is_that_of_one_planned_so(
    host: LightningHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = noted_rates(monkeypatch, host.module)
    host.fit(tmp_path, trainer__max_epochs=4)
    planned = rates.copy()
    first = host.fit(tmp_path, trainer__max_epochs=2)
    rates.clear()
    with listening() as said:
        host.main(["fit", *host.words(tmp_path, trainer__max_epochs=4, ckpt_path=first.last, model__method__tau=3)])
    assert [line.rpartition(": ")[2] for line in said if "without any effect" in line] == ["tau"]
    assert rates == pytest.approx(planned[2 * host.steps :], rel=1e-4)
    assert f"the learning rate goes on as in a training of {4 * host.steps} steps" in "\n".join(said)


@pytest.mark.slow
def test_the_rate_after_a_late_decay_is_the_cosines(
    host: LightningHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A schedule that goes from value to value would begin with what the other one has left."""
    rates = noted_rates(monkeypatch, host.module)
    host.fit(tmp_path, trainer__max_epochs=4)
    planned = rates.copy()
    first = host.fit(tmp_path, trainer__max_epochs=4, trainer__max_steps=2 * host.steps, model__method__decay="late")
    rates.clear()
    with listening() as said:
        host.main(["fit", *host.words(tmp_path, trainer__max_epochs=4, ckpt_path=first.last)])
    assert rates == pytest.approx(planned[2 * host.steps :], rel=1e-4)
    assert "the learning rate goes on as in a training of" in "\n".join(said)


@pytest.mark.slow
@pytest.mark.parametrize("given", [{"ramp": 1.0}, {"warmup_epochs": 1}], ids=str)
def test_a_run_that_goes_on_within_an_epoch(
    host: LightningHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]
) -> None:
    """Lightning does not begin that epoch again; levels and the clean warm-up go on where they were."""
    seen: list[tuple[float, bool]] = []
    step = MethodRun.step

    def noted(run: Any, *words: Any) -> Any:
        made = step(run, *words)
        seen.append((run.method.eps, run.warming_up))
        return made

    monkeypatch.setattr(MethodRun, "step", noted)
    keeping = {"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 1, "save_top_k": -1}}
    words: dict[str, Any] = {f"model__method__{name}": value for name, value in given.items()}
    words |= {"model__method__name": "SAT", "model__method__eps": 1.0, "trainer__max_epochs": 2}
    first = host.fit(tmp_path / "first", trainer__callbacks=[keeping], **words)
    whole, number = seen.copy(), host.steps + 1  # steps that are done
    (middle,) = first.last.parent.glob(f"*step={number}.ckpt")
    seen.clear()
    host.fit(tmp_path / "second", ckpt_path=middle, **words)
    assert host.steps > 1
    assert len(set(whole)) > 1
    assert seen == whole[number:]


@pytest.mark.slow
def test_a_schedule_of_the_users_that_a_checkpoint_changes_is_named(host: LightningHost, tmp_path: Path) -> None:
    """Its rate would climb again in a longer run, without a word; the length that it had is no news."""
    planned = {"optimizer": "SGD", "optimizer__lr": 0.01, "lr_scheduler": "CosineAnnealingLR"}
    first = host.fit(tmp_path, trainer__max_epochs=2, **planned, lr_scheduler__T_max=2)
    for length in (2, 4):
        words = host.words(tmp_path, trainer__max_epochs=3, ckpt_path=first.last, **planned, lr_scheduler__T_max=length)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            host.main(["fit", *words])
        told = [str(warning.message) for warning in caught if "CosineAnnealingLR goes on" in str(warning.message)]
        assert bool(told) == (length == 4)
        assert all("with T_max 2, not 4: " in line for line in told)


@pytest.mark.slow
def test_a_run_without_validation_says_that_it_has_no_best_epoch(host: LightningHost, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no best checkpoint will be written"):
        run = host.fit(tmp_path, trainer__limit_val_batches=0, model__method__name="SAT")
    assert [path.name for path in run.last.parent.iterdir()] == ["last.ckpt"]


# Orders, batches and processes


@pytest.mark.slow
def test_loaders_made_anew_go_on_with_the_order(
    host: LightningHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = watched_steps(monkeypatch, host.module)
    host.fit(tmp_path, trainer__max_epochs=3, trainer__reload_dataloaders_every_n_epochs=1)
    orders = [[i for batch in steps.ids[k * host.steps : (k + 1) * host.steps] for i in batch] for k in range(3)]
    assert len({tuple(order) for order in orders}) == 3
    assert all(sorted(order) == sorted(host.ids("train")) for order in orders)


def test_a_last_batch_of_one_image_is_left_out_by_what_a_process_gets(tmp_path: Path) -> None:
    """18 images for two processes are 9 each, of which 4, 4 and 1."""

    class Two:
        world_size = 2

    for count, whole, shared in ((17, True, True), (18, False, True), (16, False, False), (10, False, True)):
        data = Classify.data(str(write_npz(tmp_path / f"{count}.npz", {"train": count, "val": 3})), batch_size=4)
        assert data.train_dataloader().drop_last == whole
        data.trainer = Two()
        assert data.train_dataloader().drop_last == shared


def test_samples_that_two_processes_have_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Classify.module(num_classes=2)

    class Two:
        world_size = 2

    parts: dict[str, list[Any]] = {"ids": [["a", "c", "e"], ["b", "d", "a"]], "x": [[0.0, 2.0, 4.0], [1.0, 3.0, 0.0]]}
    monkeypatch.setattr(RobustModule, "trainer", Two())

    def gathered(value: Any) -> list[Any]:
        return parts["ids"] if isinstance(value, list) else [torch.tensor(x) for x in parts["x"]]

    monkeypatch.setattr("advmed.integrations.lightning.module.gathered", gathered)
    model._scored, model._scored_ids = [{"x": torch.tensor([0.0, 2.0, 4.0])}], ["a", "c", "e"]
    assert sorted(model._all_scores()["x"].tolist()) == [0, 1, 2, 3, 4]
    assert not model._scored_ids


# What a loader gives


def test_ids_that_a_loader_has_made_numbers_of() -> None:
    """And each id is the same sample whatever it comes as."""
    store = MarginStore(0.5)
    for ids in (torch.arange(3), np.arange(3), [0, 1, 2], ["0", "1", "2"], list(torch.arange(3))):
        store.set(ids, torch.full((3,), 2.0))
        assert store.get(ids).tolist() == [2, 2, 2]
    assert (store.ids(), store.visits().tolist(), store.met(torch.tensor([2, 7])).tolist()) == (
        ["0", "1", "2"],
        [5] * 3,
        [5, 0],
    )
    network, method = Small(3, 3), DPAAT(eps_0=0.5, steps=2, bounds=(0.0, 1.0))
    objective = Classify.module.objective_class(network, torch.tensor([0, 1, 2, 0]))
    for _ in range(2):
        method.step(objective, noise(4, 3, 8, 8), torch.arange(4))
    assert method.store.visits().tolist() == [2] * 4


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_images_that_the_bounds_do_not_fit_are_refused_at_once(tmp_path: Path, dtype: torch.dtype) -> None:
    """In training and in validation: attacks would move them by a 255th of what is meant."""
    data = MedMNIST(str(write_npz(tmp_path / "own.npz")), batch_size=8, workers=0)
    data.on_after_batch_transfer = lambda batch, _: {**batch, "image": (batch["image"] * 255).to(dtype)}
    model = RobustClassifier(Network(name="test_efficientnet_gn"), num_classes=3)
    quiet: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "max_epochs": 1}
    trainer = Trainer(**quiet, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0)
    said = (
        "images must be floating-point numbers between 0 and 1, the attack's bounds; the first batch has ",
        "from 0",
    )
    told(ValueError, lambda: trainer.fit(model, datamodule=data), *said, str(dtype).removeprefix("torch."))
    told(ValueError, lambda: trainer.validate(model, datamodule=data), *said)


# What trains otherwise


def test_a_batch_of_one_image_and_batch_norm(tmp_path: Path) -> None:
    host = Classify(tmp_path / "host")
    message = host.fails("fit", *host.words(tmp_path, data__batch_size=1, model__network__name="test_resnet"))
    assert message.startswith(
        "BatchNorm cannot train with a batch of 1 image, whose last maps are one pixel: set data."
    )


def test_what_would_train_before_the_training_is_refused(host: LightningHost) -> None:
    for name in ("LearningRateFinder", "BatchSizeFinder"):
        message = host.refused(trainer__callbacks=[{"class_path": name}])
        assert message.startswith(f"{name} trains before the training has begun, which a method that attacks cannot")
    model = RobustClassifier(Network(name="test_efficientnet_gn"), num_classes=3)
    told(RuntimeError, lambda: model.training_step({}, 0), "the training has not begun: on_fit_start")


@pytest.mark.slow
def test_every_image_is_met_once_an_epoch_whatever_trains(tmp_path: Path) -> None:
    """An optimizer that evaluates a batch several times would meet it as often; an epoch for BatchNorm is none."""
    host = Classify(tmp_path / "host")
    closure = {"optimizer": "torch.optim.LBFGS", "optimizer__max_iter": 3}
    message = host.fails("fit", *host.words(tmp_path, model__method__name="DPAAT", **closure))
    assert message.startswith(
        "LBFGS evaluates the loss of a batch several times a step, and DPAAT would move the noise "
    )
    host.fit(tmp_path / "sat", model__method__name="SAT", **closure)
    average = [{"class_path": "StochasticWeightAveraging", "init_args": {"swa_lrs": 1e-3}}]
    run = host.fit(
        tmp_path / "swa",
        model__method__name="DPAAT",
        trainer__max_epochs=2,
        trainer__callbacks=average,
        model__network__name="test_resnet",
    )
    assert {visits for _, visits in run.margins.values()} == {2}
    assert set(run.state()["advmed"]["method"]["margins"]["visits"]) == {2}
    assert run.state()["epoch"] == 2  # that of the statistics, and its network is the averaged one
    assert len(run.logged("adv/margin_q50")) == 2


# Classes


@pytest.mark.slow
def test_classes_in_another_order_are_refused(tmp_path: Path) -> None:
    """By every command that takes a checkpoint; numbers alone name nothing."""
    host = Classify(tmp_path / "host")
    run = host.fit(tmp_path / "run", data__classes="[ant,bee,cat]")
    said = (
        "knows the classes ant, bee, cat, in this order, and the data has cat, bee, ant: set the data's classes to the"
    )
    for classes, fits in (("[ant,bee,cat]", True), ("[cat,bee,ant]", False), (None, True)):
        for command in ("validate", "test", "predict", "fit"):
            own = host.words(tmp_path / "other", data__classes=classes, ckpt_path=run.last, trainer__max_epochs=2)
            words = (
                own
                if command == "fit"
                else [*host.reading({**host.images, "classes": classes}), "--ckpt_path", run.last]
            )
            if fits:
                host.ok(command, *words)
            else:
                assert said in host.fails(command, *words)
        data = host.read(classes=classes and classes.strip("[]").split(","))
        for check in (
            lambda data=data: host.module.standard(run.last, data),
            lambda data=data: load_model("own", run.last, data, "val", torch.device("cpu"), gradcam=False),
        ):
            check() if fits else told(ValueError, check, f"{run.last} {said}")


def test_releases_newer_than_those_that_were_tested_are_pointed_out(
    host: LightningHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of Lightning, and of what the networks are from; once."""
    monkeypatch.setattr("advmed.versions._told", set())
    monkeypatch.setattr("advmed.versions.installed", lambda package: "99.0")
    module = host.module.__new__(host.module)  # of the whole module it takes the class
    with pytest.warns(UserWarning, match=r"99\.0 is newer than") as told:
        module.setup("validate")
        module.setup("validate")
    named = [str(warning.message).split()[0] for warning in told]
    assert named == list(host.module.packages)
    assert {"lightning", "timm"} <= set(named)

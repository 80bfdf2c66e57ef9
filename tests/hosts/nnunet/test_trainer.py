"""The trainers in the host's own loop: what they change, and that they change nothing else."""

from __future__ import annotations

import copy
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerNoMirroring import nnUNetTrainerNoMirroring
from nnunetv2.training.nnUNetTrainer.variants.network_architecture.nnUNetTrainerBN import nnUNetTrainerBN
from nnunetv2.training.nnUNetTrainer.variants.network_architecture.nnUNetTrainerNoDeepSupervision import (
    nnUNetTrainerNoDeepSupervision,
)
from torch import Tensor, nn

from adv_nnunet import calibration as standard
from adv_nnunet.checkpoints import read_checkpoint
from adv_nnunet.settings import FILE, Settings, find_settings
from adv_nnunet.trainer import LOG_KEYS, STATE, AdversarialTraining, _open_log, nnUNetTrainerAMAT, nnUNetTrainerSAT
from advmed.methods import AdaptiveRadiusMethod
from advmed.training.run import MethodRun
from advmed.training.settings import read_settings
from helpers.hosts import Interrupted, binary_divergence, class_divergence, different, plain, table, watched


class NoDeepSupervisionAMAT(AdversarialTraining, nnUNetTrainerNoDeepSupervision):
    method_name = "AMAT"


class NoDeepSupervisionTRADES(AdversarialTraining, nnUNetTrainerNoDeepSupervision):
    method_name = "TRADES"


class NoMirroringAMAT(AdversarialTraining, nnUNetTrainerNoMirroring):
    method_name = "AMAT"


class Softer(nnUNetTrainer):
    """Another network with the same weights."""

    @staticmethod
    def build_network_architecture(plans_manager: Any, *given: Any, **named: Any) -> nn.Module:
        network: nn.Module = nnUNetTrainer.build_network_architecture(plans_manager, *given, **named)
        for module in list(network.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.LeakyReLU):
                    setattr(module, name, nn.Softsign())
        return network


class SofterSAT(AdversarialTraining, Softer):
    method_name = "SAT"


class NoMirroringBatchNormSAT(AdversarialTraining, nnUNetTrainerNoMirroring, nnUNetTrainerBN):
    method_name = "SAT"


class SofterInItselfSAT(nnUNetTrainerSAT):
    build_network_architecture = staticmethod(Softer.build_network_architecture)


class Clipped(nnUNetTrainer):
    """A training step of its own."""

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"loss": np.float32(7)}


class ClippedSTD(AdversarialTraining, Clipped):
    method_name = "STD"


class ClippedSAT(AdversarialTraining, Clipped):
    method_name = "SAT"


class WrittenAfterItSAT(ClippedSAT):
    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        return AdversarialTraining.train_step(self, batch)


def weights(trainer: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.network.state_dict().items()}


@pytest.mark.parametrize(("kind", "configuration"), [("STD", "2d"), ("STD", "3d_fullres"), ("AMAT", "2d")])
def test_std_and_the_warm_up_are_the_stock_trainer_bit_for_bit(bench: Any, kind: str, configuration: str) -> None:
    """Our train_step repeats the host's around the loss. If a release changes its own, this fails first."""
    ours, stock = bench.ready(kind, configuration), bench.make(nnUNetTrainer, configuration)
    stock.initialize()
    stock.network.load_state_dict(ours.network.state_dict())
    for batch in bench.batches(ours, 4):
        losses = [float(trainer.train_step(dict(batch))["loss"]) for trainer in (ours, stock)]
        assert losses[0] == losses[1]
        assert not different(weights(ours), weights(stock))
    left, right = (trainer.optimizer.state_dict()["state"] for trainer in (ours, stock))
    assert all(torch.equal(left[key]["momentum_buffer"], right[key]["momentum_buffer"]) for key in left)
    if kind == "AMAT":  # it measures the clean terms, with a memory of an epoch of eight samples, and nothing else
        assert ours.method.thresholds.statistics.n == pytest.approx(4 * sum(math.exp(-4 * k / 8) for k in range(4)))
        assert len(ours.method.margins) == 0


def test_a_whole_std_training_ends_with_the_stock_weights(bench: Any) -> None:
    """Schedule, deep supervision, validation passes in between: everything around the step is the host's, too."""
    ends = []
    for kind in ("STD", nnUNetTrainer):
        trainer = bench.make(kind)
        trainer.num_epochs, trainer.num_val_iterations_per_epoch, trainer.num_iterations_per_epoch = 2, 1, 2
        torch.manual_seed(0)
        bench.feed(trainer, bench.batches(trainer, 4))
        trainer.run_training()
        ends.append(bench.saved(trainer))
    assert not different(*(end["network_weights"] for end in ends))
    for key, values in ends[1]["logging"].items():
        if "timestamps" not in key:
            assert ends[0]["logging"][key] == values, key
    assert ends[0].keys() - ends[1].keys() == {STATE}
    assert ends[0]["_best_ema"] == ends[1]["_best_ema"]


LOSS = {"AMAT": (0.5, 0.5), "SAT": (0.5, 0.5), "AT": (0, 1), "TRADES": (1, 0), "DPAAT": (0, 1)}
"""What the host's loss on clean and on attacked images counts for."""
SEQUENTIAL = {"backward": "sequential"}
STEPS: list[tuple[Any, str, str, dict[str, Any]]] = [
    ("AMAT", "2d", "main", {"terms": "separate", "refinement": "crossing", "norm": "inf"}),
    ("AMAT", "2d", "main", {"sample_id": "cell", "bounds": "sample", **SEQUENTIAL}),
    ("AMAT", "2d", "main", {"attack_precision": "bfloat16", "absent_classes": "count"}),
    ("AMAT", "3d_fullres", "main", {}),
    (NoDeepSupervisionAMAT, "2d", "main", {}),
    ("AMAT", "2d", "two_channels", {}),
    ("AMAT", "3d_fullres", "main", {"preset": "fast"}),
    ("AMAT", "2d", "regions_ignore", {"preset": "fast", "terms": "separate", "steps": None}),
    ("SAT", "2d", "ignore", {"preset": "fast"}),
    ("DPAAT", "2d", "regions", {"preset": "fast"}),
    ("AMAT", "3d_fullres", "regions", {"terms": "separate"}),
    ("AMAT", "2d", "ignore", {}),
    (NoDeepSupervisionAMAT, "2d", "ignore", {"terms": "separate"}),
    ("AMAT", "2d", "regions_ignore", SEQUENTIAL),
    ("SAT", "3d_fullres", "main", SEQUENTIAL),
    ("AT", "2d", "main", {"random_start": 1.0}),
    ("AT", "2d", "main", SEQUENTIAL),
    ("TRADES", "2d", "main", {"norm": "inf", "bounds": "sample"}),
    ("TRADES", "3d_fullres", "regions", {"terms": "separate", "attack_precision": "bfloat16"}),
    ("TRADES", "2d", "regions_ignore", {"beta": 3.0}),
    (NoDeepSupervisionTRADES, "2d", "ignore", {}),
    ("DPAAT", "2d", "main", {}),
    ("DPAAT", "2d", "main", {"sync_weight": 0.0, "terms": "separate", **SEQUENTIAL}),
    ("DPAAT", "3d_fullres", "main", {"average": "epoch"}),
    ("DPAAT", "2d", "ignore", {"sample_id": "cell"}),
    ("DPAAT", "2d", "regions", {"norm": "inf"}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "configuration", "dataset", "settings"), STEPS, ids=str)
def test_a_step_learns_from_the_stock_loss_and_the_weighted_distance(
    bench: Any, monkeypatch: pytest.MonkeyPatch, kind: Any, configuration: str, dataset: str, settings: dict[str, Any]
) -> None:
    """On real batches, with the gradients: neither of the two passes is a constant of the distance."""
    names = ("ce", "dice") if settings.get("terms") == "separate" else ("ce+dice",)
    linf = settings.get("norm") == "inf"
    given = {"eps": 0.3 if linf else 10.0, "delta": 0.1 if linf else 1.0, "sync_weight": 3.0, **settings}
    path = bench.thresholds(*(1.0 for _ in names), names=names)
    trainer = bench.ready(kind, configuration, dataset=dataset, thresholds=path, **given)
    for layer in trainer.network.decoder.seg_layers:  # noise hardly moves the predictions of a new network
        layer.weight.data *= 2
    batch = next(trainer.dataloader_train)
    target, labels = batch["target"], trainer.label_manager
    deep = kind not in (NoDeepSupervisionAMAT, NoDeepSupervisionTRADES)
    assert isinstance(target, list) == isinstance(trainer.network(batch["data"]), (list, tuple)) == deep
    if deep and dataset.endswith("ignore"):
        ignored = target[0][:, -1:] > 0 if labels.has_regions else target[0] == labels.ignore_label
        assert ignored.any(), "the batch shows nothing of what is tested"
    network, before, steps = copy.deepcopy(trainer.network), weights(trainer), watched(trainer.method, monkeypatch)
    loss = float(trainer.train_step(batch)["loss"])

    passes = [network(images) for images in (batch["data"], steps[0].adversarial)]
    clean, adversarial = (trainer.loss(output, target) for output in passes)
    divergence = binary_divergence if labels.has_regions else class_divergence
    sync = divergence(*(output[0] if deep else output for output in passes)).mean()
    own, weight = LOSS[trainer.method_name], 0.0
    if trainer.method_name in ("TRADES", "DPAAT"):
        weight = trainer.settings.beta if trainer.method_name == "TRADES" else trainer.settings.sync_weight
    wanted = own[0] * clean + own[1] * adversarial + weight * sync
    assert weight == 0 or weight * sync > 0.005 * loss, "the distance is too small to be seen in the sum"
    terms = [trainer.terms(output, target).sum(1).mean() for output in passes]
    assert terms[1] > terms[0] or trainer.method_name == "TRADES", "the attack found no way"
    assert loss == pytest.approx(wanted.item(), rel=1e-5)
    wanted.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 12)
    for (name, ours), theirs in zip(trainer.network.named_parameters(), network.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=name)
    assert different(before, weights(trainer))

    logs = trainer.run.end_epoch()
    assert logs["loss_adversarial"] == pytest.approx(adversarial.item(), rel=1e-5)
    assert logs["loss_sync"] == pytest.approx(sync.item() if weight else math.nan, rel=1e-3, nan_ok=True)
    if own[0] == weight == 0:  # a clean pass that nobody learns from has terms and no loss of the host
        clean = terms[0]
    if trainer.method_name != "AT":
        assert logs["loss_clean"] == pytest.approx(clean.item(), rel=1e-5)
    assert trainer.num_input_channels == batch["data"].shape[1] == (2 if dataset == "two_channels" else 1)
    assert trainer.terms.names == names
    # The host's own loader says no more than the case; nobody else needs ours.
    adaptive = trainer.method_name in ("AMAT", "DPAAT")
    assert ("ids" in batch) == adaptive
    assert isinstance(trainer.method, AdaptiveRadiusMethod) == adaptive
    if adaptive:
        assert set(trainer.method.store.ids()) == set(batch.get("ids", batch["keys"]))
    with trainer._attack_precision():
        assert torch.is_autocast_enabled("cpu") == (settings.get("attack_precision") == "bfloat16")


def test_a_margin_is_the_radius_of_its_sample(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, margins = bench.ready("AMAT", thresholds=bench.thresholds(math.inf)), [0.25, 2.0, 0.5, 1.0]
    (batch,) = bench.batches(trainer, 1)
    made = watched(trainer.method, monkeypatch)
    trainer.method.margins.set(batch["ids"], margins)
    trainer.train_step(batch)
    assert (made[0].adversarial - batch["data"]).flatten(1).norm(dim=1).tolist() == pytest.approx(margins, rel=1e-4)


def run(bench: Any, trainer: Any, start: int = 0, stop: int | None = None) -> Any:
    """The host's whole loop on fixed batches, from batch ``start``, killed when it asks for batch ``stop``."""

    def fed() -> Any:
        for number, batch in enumerate(bench.batches(trainer, 8)):
            if number == stop:
                raise Interrupted
            if number >= start:
                yield batch

    bench.feed(trainer, fed())
    if stop is None:
        trainer.run_training()
    else:
        with pytest.raises(Interrupted):
            trainer.run_training()
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "stop", "settings"),
    [
        ("AMAT", 5, {"refinement": "crossing", "random_start": 1.0, "warmup_epochs": 1}),  # self-calibrated
        ("AMAT", 3, {"refinement": "crossing", "warmup_epochs": 2}),  # in the warm-up
        # Between warm-up and the first adversarial epoch; and the host's validation overwrites targets.
        ("AMAT", 4, {"warmup_epochs": 2, "terms": "separate", "dataset": "regions_ignore"}),
        ("AMAT", 7, {"file": True, "backward": "sequential"}),
        ("DPAAT", 5, {"average": "epoch", "step_size": 0.25, "random_start": 0.5}),
        ("TRADES", 5, {}),  # its attack starts at random whatever the settings say
    ],
    ids=str,
)
def test_killed_and_resumed_is_uninterrupted(bench: Any, kind: str, stop: int, settings: dict[str, Any]) -> None:
    settings = {"epochs": 4, "save_every": 1, **settings}
    if settings.pop("file", False):
        settings["thresholds"] = bench.thresholds(1.7)
    whole = run(bench, bench.make(kind, tag="whole", **settings))
    killed = run(bench, bench.make(kind, tag="killed", **settings), stop=stop)
    assert not (Path(killed.output_folder) / "checkpoint_final.pth").exists()
    if "thresholds" in settings:
        bench.thresholds(99.0)  # someone has written another file meanwhile
    resumed = bench.make(kind, tag="killed", resume=killed, **settings)
    assert resumed.current_epoch == stop // 2
    run(bench, resumed, start=stop // 2 * 2)

    assert not different(weights(whole), weights(resumed))
    assert resumed.method.state_dict() == whole.method.state_dict()
    assert resumed.run.warmup_epochs == whole.run.warmup_epochs
    assert ("Thresholds from the checkpoint: ce+dice < 1.7" in bench.log(resumed)) == ("thresholds" in settings)
    ends = [bench.saved(trainer) for trainer in (whole, resumed)]
    for key, values in ends[0]["logging"].items():
        if "timestamps" not in key and key != "adv_attack_seconds":
            assert np.array_equal(ends[1]["logging"][key], values, equal_nan=True), key
    assert np.isfinite(ends[0]["logging"]["train_losses"]).all()
    assert str(ends[0][STATE]["method"]) == str(ends[1][STATE]["method"])
    tables = [Path(t.output_folder) / "margins.csv" for t in (whole, resumed)]
    if kind == "TRADES":
        assert not any(path.exists() for path in tables), "one noise level for all is no table"
        return
    assert tables[0].read_text() == tables[1].read_text()
    rows = table(tables[1])
    assert list(rows[0]) == ["id", "margin", "visits"]
    assert {row["id"] for row in rows} <= set(resumed.sample_ids())
    assert all(":" in row["id"] for row in rows), "a slice has a level of its own, not a case"
    assert len({row["margin"] for row in rows}) > 1
    assert sum(int(row["visits"]) for row in rows) == (8 - 2 * whole.run.warmup_epochs) * 4


def test_resuming_or_validating_a_finished_training_changes_nothing(bench: Any) -> None:
    """nnUNetv2_train --c of a finished training runs its validation again, and writes checkpoint_final again;
    nnUNetv2_train --val loads it without a training.
    """
    given = {"thresholds": bench.thresholds(math.inf)}
    first = bench.train("AMAT", **given)
    before = bench.saved(first)
    assert len(before[STATE]["method"]["margins"]["values"]) > 0
    bench.make("AMAT", resume=first, **given).run_training()
    after = bench.saved(first)
    assert after[STATE] == before[STATE]
    assert after["current_epoch"] == before["current_epoch"]
    assert not different(after["network_weights"], before["network_weights"])
    summary = Path(first.output_folder) / "validation" / "summary.json"
    third = bench.make("AMAT", **given)
    third.load_checkpoint(str(Path(first.output_folder) / "checkpoint_final.pth"))
    third.perform_actual_validation()
    assert len(json.loads(summary.read_text())["metric_per_case"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["STD", "TRADES", NoMirroringAMAT], ids=str)
def test_a_log_and_checkpoints_of_the_host_with_plain_values_of_ours(bench: Any, kind: Any) -> None:
    trainer = bench.make(kind, epochs=3, warmup_epochs=None if kind == "STD" else 1, tag="x")
    measured, end_epoch = [], MethodRun.end_epoch
    bench.patch.setattr(MethodRun, "end_epoch", lambda run: measured.append(end_epoch(run)) or measured[-1])
    trainer.run_training()
    logging = bench.saved(trainer)["logging"]
    log = {name: logging[name] for name in LOG_KEYS}
    robust = log.pop("adv_robust_dice"), log.pop("adv_ema_robust_dice")
    assert [math.isnan(value) for value in robust[0]] == [True] + [kind == "STD"] * 2
    for name, found in log.items():
        wanted = [values[name.removeprefix("adv_")] for values in measured]
        assert np.array_equal(found, wanted, equal_nan=True), name
    assert np.isfinite(log["adv_loss_adversarial"]).tolist() == [False] + [kind != "STD"] * 2  # after the warm-up
    folder = Path(trainer.output_folder)
    reference = bench.make(nnUNetTrainer)
    reference.initialize()
    reference.save_checkpoint(str(bench.folder / "stock.pth"))
    expected = torch.load(bench.folder / "stock.pth", weights_only=False)
    for name in ("final", "best"):
        checkpoint = bench.saved(trainer, name)
        assert checkpoint.keys() == expected.keys() | {STATE}
        assert checkpoint["trainer_name"] == "nnUNetTrainer" + "NoMirroring" * (kind is NoMirroringAMAT)
        assert checkpoint["network_weights"].keys() == expected["network_weights"].keys()
        assert plain(checkpoint[STATE]), "something else than plain values needs this package to be read"
        assert checkpoint[STATE]["warmup_epochs"] == (kind != "STD")
    assert not list(folder.glob("*.tmp"))
    assert not (folder / "checkpoint_latest.pth").exists()
    # And the stock classes take it.
    reference.load_checkpoint(str(folder / "checkpoint_final.pth"))
    assert not different(weights(reference), weights(trainer))
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder.parent), (0,), "checkpoint_final.pth")
    assert not different(predictor.list_of_parameters[0], weights(trainer))


def test_a_failed_write_leaves_the_old_checkpoint(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = bench.ready("AMAT")
    path = Path(trainer.output_folder) / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(path))
    before = path.read_bytes()
    save = torch.save

    def full_disk(content: Any, target: Any) -> None:
        if isinstance(target, (str, Path)):
            Path(target).write_bytes(b"half a checkpoint")
            raise OSError(28, "No space left on device")
        save(content, target)

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        trainer.save_checkpoint(str(path))
    assert path.read_bytes() == before
    assert not list(path.parent.glob("*.tmp")), "what could not be written fills the disk"


def test_fold_all_without_checkpoints(bench: Any) -> None:
    """And with nothing to continue, where the host warns and trains from the start."""
    trainer = bench.make("AMAT", fold="all", resume=True)
    trainer.disable_checkpointing = True
    trainer.run_training()
    assert Path(trainer.output_folder).name == "fold_all"
    assert len(trainer.sample_ids()) > len(bench.make("AMAT").sample_ids())
    assert not list(Path(trainer.output_folder).glob("*.pth*"))
    assert len(trainer.logger.get_checkpoint()["adv_margin_q50"]) == 2


def test_a_stock_log_gets_our_keys(with_stock: Path, bench: Any) -> None:
    trainer = bench.make("AMAT", epochs=3)
    trainer.load_checkpoint(str(with_stock / "checkpoint_final.pth"))
    log = trainer.logger.get_checkpoint()
    assert trainer.current_epoch == 1
    assert not set(LOG_KEYS) & set(log)
    _open_log(trainer.logger, trainer.current_epoch)
    trainer.logger.log("adv_loss_clean", 1.0, 1)
    assert np.array_equal(log["adv_loss_clean"], [math.nan, 1.0], equal_nan=True)
    assert set(LOG_KEYS) <= set(log)


def test_the_resolved_settings_can_be_read_back(bench: Any) -> None:
    given = {"norm": "inf", "bounds": [-1.0, 5.0], "tag": "run-2.b", "warmup_epochs": 1}
    trainer = bench.started("AMAT", eps=None, delta=None, **given)
    path = Path(trainer.output_folder) / FILE
    assert read_settings(Settings, path) == trainer.settings
    assert trainer.settings.delta == pytest.approx(0.01)
    assert trainer.settings.sample_id == "slice"
    head = path.read_text().splitlines()[:3]
    assert head[0] == "# method: AMAT"
    assert "environment variable nnUNet_adversarial" in head[1]
    assert head[2] == "# thresholds: mean of the clean terms, not yet measured"


def test_a_tag_changes_the_output_folder_and_nothing_else(bench: Any) -> None:
    tagged, plain_one = bench.make("AMAT", tag="eps-5"), bench.make("AMAT")
    assert Path(plain_one.output_folder).parent.name == "nnUNetTrainerAMAT__tiny__2d"
    assert Path(tagged.output_folder).parent.name == "nnUNetTrainerAMAT_eps-5__tiny__2d"
    assert isinstance(tagged, nnUNetTrainerAMAT)
    assert tagged.stock_name == "nnUNetTrainer"
    assert type(plain_one) is nnUNetTrainerAMAT, "the tag of one trainer stuck to the class"


def test_schedule_and_seed_of_the_settings(bench: Any) -> None:
    schedule = {"epochs": 7, "iterations_per_epoch": 3, "val_iterations_per_epoch": 5}
    made = []
    for seed in (3, 3, 4):
        trainer = bench.make("STD", seed=seed, initial_lr=0.05, save_every=2, **schedule)
        torch.rand(5)
        trainer.initialize()
        made.append(weights(trainer))
    assert not different(made[0], made[1])
    assert different(made[0], made[2])
    assert (trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch) == (7, 3, 5)
    assert trainer.optimizer.param_groups[0]["lr"] == 0.05
    assert trainer.lr_scheduler.max_steps == 7
    assert trainer.save_every == 2
    stock, left_alone = bench.make(nnUNetTrainer), bench.make("STD", **dict.fromkeys(schedule))
    for name in ("num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch"):
        assert getattr(left_alone, name) == getattr(stock, name)


def test_settings_that_are_named_beat_those_of_the_data_set_folder_and_those_beat_defaults(
    bench: Any, world: Any
) -> None:
    """Which grow with the input."""
    path = world.preprocessed / world.dataset("two_channels") / FILE
    path.write_text("eps: 7\nsteps: 3\n")
    make = partial(bench.make, "AMAT", dataset="two_channels")
    try:
        found = [make(), make(named=False)]
    finally:
        path.unlink()
    found.append(make(named=False))
    assert [(trainer.settings.eps, trainer.settings.steps) for trainer in found[:2]] == [(2.0, 2), (7.0, 3)]
    assert "settings.yaml (environment variable nnUNet_adversarial)" in found[0].settings_origin
    assert [trainer.settings_origin for trainer in found[1:]] == [str(path), "defaults"]
    assert found[2].settings.eps == pytest.approx(0.1 * math.sqrt(2 * 56 * 40), abs=1e-3)
    assert found[2].settings.sample_id == "slice"
    bench.patch.setenv("nnUNet_adversarial", "none.yaml")
    with pytest.raises(FileNotFoundError, match=r"none\.yaml; the environment variable nnUNet_adversarial names it"):
        find_settings(path.parent)


def test_what_a_run_says_of_its_noise_levels(bench: Any) -> None:
    """The words are those of every host."""
    trainer = bench.started("AMAT", epochs=5, warmup_epochs=1, thresholds=bench.thresholds(1.0), eps=10.0)
    log, (training, _) = bench.log(trainer), trainer.get_tr_and_val_datasets()
    samples = sum(training.load_case(case)[0].shape[1] for case in training.identifiers)
    visits = 4 * 2 * 4 / samples  # epochs x iterations x batch
    assert f"{samples} samples (slice), each met about {visits:.1f} times in this run: margins can reach about" in log
    assert "WARNING: margins cannot reach the noise levels of interest (about eps = 10)" in log

    trainer = bench.started("DPAAT", "3d_fullres", epochs=13, warmup_epochs=1, eps=None, step_size=1.0)
    assert trainer.method.eps_0 == pytest.approx(0.1 * math.sqrt(40 * 56 * 40), abs=1e-3)
    cases = "6 cases (whose patches with and without a structure have margins apart), each met about 8.0 times"
    assert f"{cases} in this run: perturbation sizes begin at" in bench.log(trainer)
    assert "each met about" not in bench.log(bench.started("TRADES", "3d_fullres"))


@pytest.mark.parametrize(
    ("kind", "named", "searched"),
    [
        (nnUNetTrainerSAT, "nnUNetTrainer", ["nnUNetTrainer", "nnUNetTrainerSTD"]),
        (NoMirroringAMAT, "nnUNetTrainerNoMirroring", ["nnUNetTrainerNoMirroring", "nnUNetTrainerSTD"]),
        (SofterSAT, "Softer", ["Softer"]),
        (NoMirroringBatchNormSAT, "nnUNetTrainerBN", ["nnUNetTrainerBN"]),
        (SofterInItselfSAT, "SofterInItselfSAT", []),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_checkpoint_names_a_trainer_of_the_same_network(
    bench: Any, kind: Any, named: str, searched: list[str]
) -> None:
    """Which is the one that thresholds and first weights are taken from, too."""
    trainer = bench.ready(kind, tag="x")
    trainer.save_checkpoint(str(bench.folder / "x.pth"))
    assert read_checkpoint(bench.folder / "x.pth")["trainer_name"] == named
    assert ("nnUNetv2_predict will not find" in bench.log(trainer)) == (kind is SofterSAT)  # it lies in no such folder
    found = [folder.parent.name for folder in standard.standard_folders(trainer)]
    assert found == [f"{name}__tiny__2d" for name in searched]
    bases = {base.__name__: base for base in kind.__mro__}
    built = bases[named].build_network_architecture(
        trainer.plans_manager, trainer.configuration_manager, 1, trainer.label_manager.num_segmentation_heads, True
    )
    assert list(map(type, built.modules())) == list(map(type, trainer.network.modules()))


def test_slices_without_a_structure_have_no_margin(bench: Any) -> None:
    trainer = bench.ready("AMAT", thresholds=bench.thresholds(9.0), empty_samples="floor")
    met: dict[str, set[bool]] = {}
    for batch in bench.batches(trainer, 8):
        target = batch["target"][0] if isinstance(batch["target"], list) else batch["target"]
        for sample, found in zip(batch["ids"], (target > 0).flatten(1).any(1).tolist(), strict=True):
            met.setdefault(sample, set()).add(found)
        trainer.train_step(batch)
    assert {False} in met.values() and {True} in met.values()
    assert set(trainer.method.margins.ids()) == {sample for sample, found in met.items() if True in found}


def test_a_training_step_of_a_base_is_not_dropped(bench: Any) -> None:
    """Standard training is that step; a method says that it would take its place, unless its class has one."""
    with pytest.raises(TypeError, match=r"Clipped has a training step of its own .* which SAT would take the place of"):
        bench.make(ClippedSAT)
    trainer = bench.ready(ClippedSTD)
    (batch,) = bench.batches(trainer, 1)
    assert trainer.train_step(batch) == {"loss": 7}
    assert bench.ready(WrittenAfterItSAT).train_step(batch)["loss"] < 7


@pytest.mark.parametrize(
    ("kind", "setting", "variable", "compiled", "said"),
    [
        ("STD", None, None, True, ""),
        ("STD", None, "f", False, ""),
        ("STD", False, None, False, "'compile: false' goes before nnU-Net's own choice"),
        ("SAT", None, None, False, "SAT is trained without torch.compile, where nnU-Net compiles by default"),
        ("SAT", None, "true", True, ""),
        ("SAT", True, None, True, ""),
        ("SAT", True, "f", False, "'compile: true' does nothing"),
    ],
)
def test_who_compiles_the_network(
    bench: Any, kind: str, setting: bool | None, variable: str | None, compiled: bool, said: str
) -> None:
    """Standard training as the host does by default; what does not happen as there is told."""
    bench.patch.delenv("nnUNet_compile")
    if variable is not None:
        bench.patch.setenv("nnUNet_compile", variable)
    trainer = bench.make(kind, compile=setting)
    trainer.device = torch.device("cuda")
    assert trainer._do_i_compile() == compiled
    trainer._tell_about_the_host()
    log = bench.log(trainer)
    assert said in log
    assert ("compile" in log) == bool(said)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["AMAT", "TRADES"])
def test_a_compiled_network_learns_the_same(bench: Any, kind: str) -> None:
    ends = []
    for compiled in (False, True):
        compile_ = partial(torch.compile, backend="eager")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nnUNetTrainer, "_do_i_compile", lambda self, compiled=compiled: compiled)
            patch.setattr(torch, "compile", compile_)
            trainer = bench.ready(kind, compile=True, thresholds=bench.thresholds(1.0), tag=str(compiled))
            (batch,) = bench.batches(trainer, 1)
            trainer.train_step(batch)
        assert hasattr(trainer.network, "_orig_mod") == compiled
        ends.append({name.removeprefix("_orig_mod."): value for name, value in trainer.network.state_dict().items()})
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_a_longer_training_that_was_interrupted_is_continued_where_it_was(bench: Any) -> None:
    """The host goes back to the final checkpoint of the shorter one, and to its margins."""
    given = {"thresholds": bench.thresholds(math.inf), "save_every": 1}
    first = bench.train("AMAT", epochs=2, **given)
    longer = bench.make("AMAT", epochs=4, resume=first, **given)
    bench.feed(longer, stopped(bench.batches(longer, 3)))
    with pytest.raises(Interrupted):
        longer.run_training()
    assert bench.saved(longer)["current_epoch"] == 2
    again = bench.make("AMAT", epochs=4, resume=longer, **given)  # asks for the final one, as the host does
    assert again.current_epoch == 3
    assert "checkpoint_latest.pth went further than checkpoint_final.pth" in bench.log(again)
    again.on_train_start()
    assert again.method.margins.state_dict() == longer.run._snapshot[1]["margins"]
    # Without a final one the host goes on from the latest, which it writes every 50 epochs, even where it is older.
    folder = Path(longer.output_folder)
    (folder / "checkpoint_final.pth").unlink()
    newer = torch.load(folder / "checkpoint_latest.pth", weights_only=False)
    torch.save(newer, folder / "checkpoint_best.pth")
    for older in (0, newer["current_epoch"]):
        torch.save(newer | {"current_epoch": older}, folder / "checkpoint_latest.pth")
        again = bench.make("AMAT", epochs=4, resume=longer, **given)
        assert again.current_epoch == 3
        chosen = again._furthest(folder / "checkpoint_latest.pth")
        assert Path(chosen).name == ("checkpoint_latest.pth" if older else "checkpoint_best.pth")
    # A training anew loses the old checkpoints, or it would be continued from them.
    anew = bench.started("AMAT", epochs=1, overwrite=True, **given)
    assert not list(Path(anew.output_folder).glob("checkpoint_*"))


def stopped(batches: list[Any]) -> Any:
    yield from batches
    raise Interrupted


@pytest.mark.parametrize("kind", ["AMAT", "DPAAT"])
def test_a_finished_training_tells_what_it_is_and_no_names(bench: Any, world: Any, kind: str) -> None:
    """Neither patients nor folders are in what the host packs to be passed on; a longer training finds them again."""
    given = {"epochs": 3, "warmup_epochs": 1, "save_every": 1}
    if kind == "AMAT":
        given["thresholds"] = bench.thresholds(math.inf)
    trainer = bench.train(kind, **given)
    folder = Path(trainer.output_folder)
    for name in ("checkpoint_final.pth", "checkpoint_best.pth", "debug.json"):
        content = (folder / name).read_bytes()
        for word in (*world.cases, str(bench.folder), str(world.root)):
            assert word.encode() not in content, (name, word)
    summary = bench.saved(trainer)[STATE]["summary"]
    assert (summary["method"], summary["epochs"], summary["attacked_epochs"]) == (kind, 3, 2)
    told = f"{kind}, 2 of 3 epoch(s) under attack"
    assert f"Trained: {told}" in bench.log(trainer)
    again = bench.started(kind, resume=trainer, **given)
    assert f"Continued: {told}" in bench.log(again)
    assert "settings changed" not in bench.log(again)
    assert again.method.store.state_dict() == trainer.method.store.state_dict()
    (folder / "margins.csv").write_text("id,margin,visits\nsomebody:1,1.0,1\n")
    with pytest.raises(ValueError, match=r"margins\.csv, where these are kept, belongs to another training"):
        bench.started(kind, resume=trainer, **given)
    (folder / "margins.csv").unlink()
    with pytest.raises(ValueError, match=r"margins\.csv, where these are kept, is missing\. Put it back"):
        bench.started(kind, resume=trainer, **given)


def test_slices_that_are_never_drawn_do_not_count_in_the_outlook(bench: Any) -> None:
    """Where there is an ignore label, the host draws slices of which something is annotated."""
    trainer = bench.make("AMAT", dataset="ignore")
    training, _ = trainer.get_tr_and_val_datasets()
    load_case, every = training.load_case, trainer.sample_ids()

    def sparse(case: str) -> Any:
        image, segmentation, previous, properties = load_case(case)
        places = {k: [v for v in voxels if v[1] in (3, 4)] for k, voxels in properties["class_locations"].items()}
        return image, segmentation, previous, {**properties, "class_locations": places}

    training.load_case = sparse
    assert trainer._drawn_ids() == [f"{case}:{index}" for case in training.identifiers for index in (3, 4)]
    assert len(every) > 50
    assert {sample for batch in bench.batches(trainer, 6) for sample in batch["ids"]} <= set(trainer._drawn_ids())
    trainer = bench.make("AMAT")
    assert trainer._drawn_ids() == trainer.sample_ids()

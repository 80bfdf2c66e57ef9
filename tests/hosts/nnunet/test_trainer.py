"""The trainers in the host's own loop: what they change, and that they change nothing else."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerNoMirroring import nnUNetTrainerNoMirroring
from nnunetv2.training.nnUNetTrainer.variants.network_architecture.nnUNetTrainerNoDeepSupervision import (
    nnUNetTrainerNoDeepSupervision,
)
from torch import Tensor

from adv_nnunet.settings import FILE, Settings
from adv_nnunet.trainer import LOG_KEYS, STATE, AdversarialTraining, _open_log, nnUNetTrainerAMAT
from advmed.methods import AdaptiveRadiusMethod
from advmed.training.settings import read_settings
from helpers.hosts import Interrupted, binary_divergence, class_divergence, different, plain, table, watched


class NoDeepSupervisionAMAT(AdversarialTraining, nnUNetTrainerNoDeepSupervision):
    method_name = "AMAT"


class NoDeepSupervisionTRADES(AdversarialTraining, nnUNetTrainerNoDeepSupervision):
    method_name = "TRADES"


class NoMirroringAMAT(AdversarialTraining, nnUNetTrainerNoMirroring):
    method_name = "AMAT"


def weights(trainer: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.network.state_dict().items()}


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_std_is_the_stock_trainer_bit_for_bit(bench: Any, configuration: str) -> None:
    """Our train_step repeats the host's around the loss. If a release changes its own, this fails first."""
    ours, stock = (bench.make(kind, configuration) for kind in ("STD", nnUNetTrainer))
    for trainer in (ours, stock):
        trainer.initialize()
    stock.network.load_state_dict(ours.network.state_dict())
    for batch in bench.batches(ours, 4):
        losses = [float(trainer.train_step(dict(batch))["loss"]) for trainer in (ours, stock)]
        assert losses[0] == losses[1]
        assert not different(weights(ours), weights(stock))
    left, right = (trainer.optimizer.state_dict()["state"] for trainer in (ours, stock))
    assert all(torch.equal(left[key]["momentum_buffer"], right[key]["momentum_buffer"]) for key in left)


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "configuration", "dataset", "settings"),
    [
        ("AMAT", "2d", "main", {}),
        ("AMAT", "2d", "main", {"terms": "separate", "refinement": "crossing", "norm": "inf"}),
        ("AMAT", "2d", "main", {"sample_id": "cell", "backward": "sequential", "bounds": "sample"}),
        ("AMAT", "2d", "main", {"attack_precision": "bfloat16", "absent_classes": "count"}),
        ("AMAT", "3d_fullres", "main", {}),
        (NoDeepSupervisionAMAT, "2d", "main", {}),
        ("AMAT", "2d", "two_channels", {}),
        ("AMAT", "2d", "regions", {}),
        ("AMAT", "3d_fullres", "regions", {"terms": "separate"}),
        ("AMAT", "2d", "ignore", {}),
        (NoDeepSupervisionAMAT, "2d", "ignore", {"terms": "separate"}),
        ("AMAT", "2d", "regions_ignore", {}),
        ("SAT", "2d", "main", {}),
        ("SAT", "3d_fullres", "main", {"backward": "sequential"}),
        ("AT", "2d", "main", {"random_start": 1.0}),
        ("TRADES", "2d", "main", {"norm": "inf", "bounds": "sample"}),
        ("TRADES", "3d_fullres", "regions", {"terms": "separate", "attack_precision": "bfloat16"}),
        ("TRADES", "2d", "regions_ignore", {}),
        (NoDeepSupervisionTRADES, "2d", "ignore", {}),
        ("DPAAT", "2d", "main", {}),
        ("DPAAT", "2d", "main", {"sync_weight": 0.0, "backward": "sequential", "terms": "separate"}),
        ("DPAAT", "3d_fullres", "main", {"average": "epoch"}),
        ("DPAAT", "2d", "ignore", {"sample_id": "cell"}),
        ("DPAAT", "2d", "regions", {"norm": "inf"}),
    ],
    ids=str,
)
def test_a_step_on_real_batches(bench: Any, kind: Any, configuration: str, dataset: str, settings: dict) -> None:
    names = ("ce", "dice") if settings.get("terms") == "separate" else ("ce+dice",)
    path = bench.thresholds(*(1.0 for _ in names), names=names)
    trainer = bench.ready(kind, configuration, dataset=dataset, thresholds=path, **settings)
    before = weights(trainer)
    batch = next(trainer.dataloader_train)
    if isinstance(batch["target"], list) and dataset.endswith("ignore"):
        labels = trainer.label_manager
        ignored = batch["target"][0][:, -1:] > 0 if labels.has_regions else batch["target"][0] == labels.ignore_label
        assert ignored.any(), "the batch shows nothing of what is tested"
    out = trainer.train_step(batch)
    assert np.isfinite(out["loss"])
    parameters = list(trainer.network.parameters())
    gradients = [p.grad for p in parameters if p.grad is not None]
    assert len(gradients) >= len(parameters) - 4, "only the lowest outputs of deep supervision have no weight"
    assert all(g.isfinite().all() for g in gradients)
    assert sum(float(g.abs().sum()) for g in gradients) > 0
    assert different(before, weights(trainer))
    assert trainer.num_input_channels == batch["data"].shape[1] == (2 if dataset == "two_channels" else 1)
    assert trainer.terms.names == names
    # The host's own loader says no more than the case; nobody else needs ours.
    adaptive = trainer.method_name in ("AMAT", "DPAAT")
    assert ("ids" in batch) == (adaptive and configuration == "2d")
    assert isinstance(trainer.method, AdaptiveRadiusMethod) == adaptive
    if adaptive:
        assert set(trainer.method.store.ids()) == set(batch.get("ids", batch["keys"]))
    with trainer._attack_precision():
        assert torch.is_autocast_enabled("cpu") == (settings.get("attack_precision") == "bfloat16")
    deep = kind not in (NoDeepSupervisionAMAT, NoDeepSupervisionTRADES)
    assert isinstance(batch["target"], list) == isinstance(trainer.network(batch["data"]), (list, tuple)) == deep
    assert (trainer.terms.weights is None) != deep


def test_a_whole_training_on_ignored_labels_and_regions(bench: Any) -> None:
    """The host's validation overwrites targets; nothing of ours may trip over it."""
    trainer = bench.train("AMAT", dataset="regions_ignore", epochs=3, warmup_epochs=1)
    assert np.isfinite(bench.saved(trainer)["logging"]["train_losses"]).all()


def test_margins_are_the_radius_and_grow_while_every_term_is_below_its_threshold(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = bench.ready("AMAT", thresholds=bench.thresholds(math.inf), delta=0.75)
    (batch,) = bench.batches(trainer, 1)
    assert len(set(batch["ids"])) == len(batch["ids"])
    made = watched(trainer.method, monkeypatch)
    for visits in (1, 2, 3):
        trainer.train_step(dict(batch))
        assert trainer.method.margins.get(batch["ids"]).tolist() == pytest.approx([0.75 * (1 + visits)] * 4)
    assert trainer.method.margins.visits().tolist() == [3] * 4
    trainer.method.margins.set(batch["ids"][:2], [2.5, 0.25])
    trainer.train_step(batch)
    distances = torch.stack([(step.adversarial - batch["data"]).flatten(1).norm(dim=1) for step in made])
    wanted = torch.tensor([[0.75] * 4, [1.5] * 4, [2.25] * 4, [2.5, 0.25, 3.0, 3.0]])
    torch.testing.assert_close(distances, wanted, rtol=1e-4, atol=0)


def test_the_loss_is_the_mean_of_the_stock_loss_on_clean_and_attacked_images(bench: Any) -> None:
    trainer = bench.ready("AMAT", thresholds=bench.thresholds(1.0))
    (batch,) = bench.batches(trainer, 1)
    with torch.no_grad():
        clean = float(trainer.loss(trainer.network(batch["data"]), batch["target"]))
    loss = float(trainer.train_step(batch)["loss"])
    logs = trainer.run.end_epoch()
    assert logs["loss_clean"] == pytest.approx(clean, rel=1e-6)
    assert loss == pytest.approx((logs["loss_clean"] + logs["loss_adversarial"]) / 2, rel=1e-6)
    assert logs["loss_adversarial"] > logs["loss_clean"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["AMAT", "SAT", "AT", "DPAAT"])
def test_sequential_backward_makes_the_same_update(bench: Any, kind: str) -> None:
    """DPAAT without synchronisation back-propagates one pass only, so that the setting does not matter to it."""
    ends = []
    for backward in ("together", "sequential"):
        how = {"backward": backward, "refinement": "crossing", "sync_weight": 0.0}
        trainer = bench.ready(kind, thresholds=bench.thresholds(1.0), **how)
        before = weights(trainer)
        for batch in bench.batches(trainer, 2):
            loss = float(trainer.train_step(batch)["loss"])
        assert different(before, weights(trainer))
        ends.append((weights(trainer), loss, trainer.method.state_dict()))
    (left, loss, state), (right, other_loss, other_state) = ends
    assert loss == pytest.approx(other_loss, rel=1e-5)
    assert all(torch.allclose(left[name], right[name], atol=1e-6, rtol=1e-4) for name in left)
    if kind in ("AMAT", "DPAAT"):
        assert state["margins"]["values"] == pytest.approx(other_state["margins"]["values"], abs=1e-4)
        assert state["margins"]["ids"] == other_state["margins"]["ids"]


def test_warm_up_is_stock_training(bench: Any) -> None:
    warm = bench.ready("AMAT", thresholds=bench.thresholds(1.0), warmup_epochs=1)
    plain_one = bench.ready("STD")
    plain_one.network.load_state_dict(warm.network.state_dict())
    for batch in bench.batches(warm, 2):
        warm.train_step(dict(batch))
        plain_one.train_step(dict(batch))
    assert not different(weights(warm), weights(plain_one))
    assert len(warm.method.margins) == 0


def divergence(clean: Any, other: Any, regions: bool) -> Tensor:
    """KL(clean || other) of every sample at full resolution, the mean over its voxels, in float64."""
    p, q = (output if isinstance(output, Tensor) else output[0] for output in (clean, other))
    return (binary_divergence if regions else class_divergence)(p, q).flatten(1).mean(1)


def surer(trainer: Any) -> None:
    """Makes the predictions of a new network decided ones; noise hardly moves those it begins with."""
    for layer in trainer.network.decoder.seg_layers:
        layer.weight.data *= 2


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["main", "regions"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [("TRADES", {"beta": 3.0}), ("DPAAT", {"sync_weight": 3.0}), ("DPAAT", {"sync_weight": 0.0})],
    ids=str,
)
def test_the_loss_is_that_of_the_host_and_the_weighted_distance(
    bench: Any, monkeypatch: pytest.MonkeyPatch, kind: str, settings: dict[str, float], dataset: str
) -> None:
    """With the gradients: neither of the two passes is a constant of the distance."""
    trainer = bench.ready(kind, dataset=dataset, eps=5.0, **settings)
    surer(trainer)
    (batch,) = bench.batches(trainer, 1)
    assert isinstance(batch["target"], list), "no deep supervision"
    network, steps = copy.deepcopy(trainer.network), watched(trainer.method, monkeypatch)
    loss = float(trainer.train_step(batch)["loss"])

    passes = [network(images) for images in (batch["data"], steps[0].adversarial)]
    clean, adversarial = (trainer.loss(output, batch["target"]) for output in passes)
    (weight,) = settings.values()
    sync = divergence(*passes, regions=dataset == "regions").mean()
    wanted = (clean if kind == "TRADES" else adversarial) + weight * sync
    assert weight == 0 or weight * sync > 0.02 * loss, "the distance is too small to be seen in the sum"
    assert loss == pytest.approx(float(wanted.detach()), rel=1e-5)
    wanted.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 12)
    for (name, ours), theirs in zip(trainer.network.named_parameters(), network.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=name)

    logs = trainer.run.end_epoch()
    assert logs["loss_adversarial"] == pytest.approx(float(adversarial.detach()), rel=1e-5)
    if weight > 0:
        assert logs["loss_clean"] == pytest.approx(float(clean.detach()), rel=1e-5)
        assert logs["loss_sync"] == pytest.approx(float(sync.detach()), rel=1e-3)
    else:  # a clean pass that nobody learns from has terms and no loss of the host
        terms = trainer.terms(passes[0], batch["target"])
        assert logs["loss_clean"] == pytest.approx(float(terms.sum(1).mean().detach()), rel=1e-5)
        assert math.isnan(logs["loss_sync"])


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
        ("AMAT", 4, {"warmup_epochs": 2, "terms": "separate"}),  # between warm-up and the first adversarial epoch
        ("AMAT", 7, {"file": True, "backward": "sequential"}),
        ("DPAAT", 5, {"average": "epoch", "step_size": 0.25, "random_start": 0.5}),
        ("DPAAT", 3, {"warmup_epochs": 2, "sync_weight": 0.0}),
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
    resumed = bench.make(kind, tag="killed", resume=killed, **settings)
    assert resumed.current_epoch == stop // 2
    run(bench, resumed, start=stop // 2 * 2)

    assert not different(weights(whole), weights(resumed))
    assert resumed.method.state_dict() == whole.method.state_dict()
    assert resumed.run.warmup_epochs == whole.run.warmup_epochs
    ends = [bench.saved(trainer) for trainer in (whole, resumed)]
    for key, values in ends[0]["logging"].items():
        if "timestamps" not in key and key != "adv_attack_seconds":
            assert np.array_equal(ends[1]["logging"][key], values, equal_nan=True), key
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


def test_a_run_continues_with_its_thresholds_and_the_settings_of_now(bench: Any) -> None:
    given = {"epochs": 4, "save_every": 1}
    first = run(bench, bench.make("AMAT", thresholds=bench.thresholds(1.25), **given), stop=2)
    # Someone wrote another file meanwhile.
    second = bench.make("AMAT", thresholds=bench.thresholds(99.0), delta=3.0, resume=first, **given)
    second.on_train_start()
    assert second.method.thresholds == first.method.thresholds
    assert second.method.thresholds.values == (1.25,)
    assert second.method.delta == 3.0
    log = bench.log(second)
    assert "Thresholds from the checkpoint: ce+dice < 1.25" in log
    assert "WARNING: settings changed since the checkpoint: delta 1.0 -> 3.0" in log


def test_resuming_or_validating_a_finished_training_changes_nothing(bench: Any) -> None:
    """nnUNetv2_train --c of a finished training runs its validation again, and writes checkpoint_final again;
    nnUNetv2_train --val loads it without a training.
    """
    given = {"thresholds": bench.thresholds(math.inf)}
    first = bench.train("AMAT", **given)
    before = bench.saved(first)
    assert len(before[STATE]["method"]["margins"]["ids"]) > 0
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


def test_continue_without_a_checkpoint_starts_anew(bench: Any) -> None:
    """The host warns and trains from the start; so do we."""
    trainer = bench.train("AMAT", resume=True)
    assert len(bench.saved(trainer)["logging"]["adv_margin_q50"]) == 2


def check_log(kind: str, logging: dict[str, list[float]]) -> None:
    """One value per epoch, NaN where a method has none; the first of three epochs was a warm-up."""
    assert {len(values) for values in logging.values()} == {3}
    after_warm_up, never, always = [False, True, True], [False] * 3, [True] * 3
    margins = ("adv_margin_q05", "adv_margin_q50", "adv_margin_q95")
    expected = {
        "adv_loss_clean": [True, False, False] if kind == "AT" else always,
        "adv_loss_adversarial": after_warm_up,
        "adv_loss_sync": after_warm_up if kind in ("TRADES", "DPAAT") else never,
        "adv_expanded": after_warm_up if kind in ("AMAT", "DPAAT") else never,
        "adv_nonfinite": after_warm_up,
        "adv_attack_seconds": always,
        **dict.fromkeys(margins, always if kind in ("AMAT", "DPAAT") else never),
    }
    if kind == "STD":
        expected = {name: always if name == "adv_loss_clean" else never for name in LOG_KEYS}
    assert {name: np.isfinite(logging[name]).tolist() for name in LOG_KEYS} == expected
    if kind != "STD":
        assert logging["adv_attack_seconds"][0] == 0
        assert logging["adv_attack_seconds"][1] > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["AMAT", "SAT", "AT", "STD", "TRADES", "DPAAT", NoMirroringAMAT], ids=str)
def test_a_log_and_checkpoints_of_the_host_with_plain_values_of_ours(bench: Any, kind: Any) -> None:
    trainer = bench.train(kind, epochs=3, warmup_epochs=None if kind == "STD" else 1, tag="x")
    check_log(trainer.method_name, bench.saved(trainer)["logging"])
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
        json.dumps(checkpoint[STATE])
        torch.save(checkpoint[STATE], bench.folder / "state.pth")
        torch.load(bench.folder / "state.pth", weights_only=True)
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
    trainer = bench.make("AMAT", fold="all")
    trainer.disable_checkpointing = True
    trainer.run_training()
    assert Path(trainer.output_folder).name == "fold_all"
    assert len(trainer.sample_ids()) > len(bench.make("AMAT").sample_ids())
    assert not list(Path(trainer.output_folder).glob("*.pth*"))


def test_a_stock_log_gets_our_keys(with_stock: Path, bench: Any) -> None:
    trainer = bench.make("AMAT", epochs=3)
    trainer.load_checkpoint(str(with_stock / "checkpoint_final.pth"))
    assert trainer.current_epoch == 1
    assert not set(LOG_KEYS) & set(trainer.logger.local_logger.my_fantastic_logging)
    _open_log(trainer.logger, trainer.current_epoch)
    for key in LOG_KEYS:
        trainer.logger.log(key, 1.0, 1)
        assert len(trainer.logger.get_value(key, None)) == 2
        assert math.isnan(trainer.logger.get_value(key, 0))


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
    plain_one, tagged = bench.make("AMAT"), bench.make("AMAT", tag="eps-5")
    assert Path(plain_one.output_folder).parent.name == "nnUNetTrainerAMAT__tiny__2d"
    assert Path(tagged.output_folder).parent.name == "nnUNetTrainerAMAT_eps-5__tiny__2d"
    assert isinstance(tagged, nnUNetTrainerAMAT)
    assert tagged.stock_name == "nnUNetTrainer"
    assert type(bench.make("AMAT")) is nnUNetTrainerAMAT, "the tag of one trainer stuck to the class"


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


def test_settings_of_the_data_set_folder(bench: Any, world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path, make = world.preprocessed / world.dataset("main") / FILE, type(bench.make("SAT"))
    plans = json.loads((path.parent / "tiny.json").read_text()) | {"continue_training": False}
    given = (plans, "2d", 0, json.loads((path.parent / "dataset.json").read_text()), torch.device("cpu"))
    try:
        path.write_text("eps: 7\nsteps: 3\n")
        assert make(*copy.deepcopy(given)).settings.eps == 2.0  # the variable comes first
        monkeypatch.delenv("nnUNet_adversarial")
        trainer = make(*copy.deepcopy(given))
        assert (trainer.settings.eps, trainer.settings.steps, trainer.settings_origin) == (7.0, 3, str(path))
    finally:
        path.unlink()
    trainer = make(*copy.deepcopy(given))
    assert trainer.settings_origin == "defaults"
    # Defaults grow with the input.
    assert (trainer.settings.steps, trainer.settings.sample_id) == (20, "slice")
    assert trainer.settings.delta == pytest.approx(0.01 * math.sqrt(56 * 40), abs=1e-3)
    two = bench.make("AMAT", dataset="two_channels", eps=None, delta=None)
    assert two.settings.eps == pytest.approx(0.1 * math.sqrt(2 * 56 * 40), abs=1e-3)


def test_what_a_run_says_of_its_noise_levels(bench: Any) -> None:
    given = {"thresholds": bench.thresholds(1.0), "eps": 10.0, "delta": 1.0}
    trainer = bench.started("AMAT", epochs=5, warmup_epochs=1, **given)
    log = bench.log(trainer)
    training, _ = trainer.get_tr_and_val_datasets()
    samples = sum(training.load_case(case)[0].shape[1] for case in training.identifiers)
    visits = 4 * 2 * 4 / samples  # epochs x iterations x batch
    assert f"{samples} samples (slice), each met about {visits:.1f} times" in log
    assert "WARNING: margins cannot reach the noise levels of interest (about eps = 10)" in log
    assert "Raise delta to about 10" in log

    log = bench.log(bench.started("AMAT", "3d_fullres", epochs=61, **given))
    assert "6 samples (case), each met about 40.7 times in this run: margins can reach about 40.67" in log
    assert "WARNING" not in log

    trainer = bench.started("DPAAT", "3d_fullres", epochs=13, warmup_epochs=1, eps=None, step_size=1.0)
    eps = trainer.settings.eps
    assert eps == pytest.approx(0.1 * math.sqrt(40 * 56 * 40), abs=1e-3)
    assert (trainer.method.eps_0, trainer.method.highest) == (eps, 2 * eps), "the host's default and what hangs on it"
    assert (
        f"6 samples (case), each met about 8.0 times in this run: perturbation sizes begin at {eps:g} and can come to "
        f"lie between {eps - 8:.2f} and {eps + 8:.2f} (L2 norm)"
    ) in bench.log(trainer)
    assert "each met about" not in bench.log(bench.started("TRADES", "3d_fullres"))

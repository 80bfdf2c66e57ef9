"""What a user of nnU-Net does beside training: looks at progress.png, the log and W&B, finds the best configuration."""

from __future__ import annotations

import json
import math
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from nnunetv2.evaluation.find_best_configuration import find_best_configuration_entry_point
from nnunetv2.run.run_training import run_training_entry
from nnunetv2.training.logging import nnunet_logger
from nnunetv2.training.logging.nnunet_logger import LocalLogger
from PIL import Image

from adv_nnunet.picture import HEIGHT, add_panels
from adv_nnunet.trainer import LOG_KEYS
from advmed.training.run import MethodRun

PLOT = LocalLogger.plot_progress_png
"""The host's, which other tests leave out."""


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as opened:
        return np.asarray(opened.convert("RGB"))


def log_of(epochs: int) -> dict[str, list[float]]:
    return {key: [0.5 + epoch for epoch in range(epochs)] for key in LOG_KEYS}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "panels"), [("AMAT", 2), ("SAT", 1), ("STD", 0)])
def test_progress_png_has_panels_of_ours_below_those_of_the_host(bench: Any, kind: str, panels: int) -> None:
    bench.patch.setattr(LocalLogger, "plot_progress_png", PLOT)
    trainer = bench.make(kind, epochs=2, warmup_epochs=None if kind == "STD" else 1)
    trainer.run_training()
    PLOT(trainer.logger.local_logger, str(bench.folder))
    host, found = pixels(bench.folder / "progress.png"), pixels(Path(trainer.output_folder) / "progress.png")
    height = round(0.6 * host.shape[1])
    assert found.shape == (host.shape[0] + panels * height, *host.shape[1:])
    assert np.array_equal(found[: host.shape[0]], host), "the host's panels are as it draws them"
    for number in range(panels):
        panel = found[host.shape[0] + number * height :][:height]
        assert (panel < 250).mean() > 0.01, "an empty panel"


@pytest.mark.parametrize("size", [(640, 480), (3000, 1000)])
def test_panels_fit_a_picture_of_another_release_and_are_not_added_twice(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "progress.png"
    Image.new("RGBA", size, (10, 200, 30, 255)).save(path)
    add_panels(path, log_of(3))
    first = pixels(path)
    assert first.shape == (size[1] + 2 * round(0.6 * size[0]), size[0], 3)
    assert (first[: size[1]] == (10, 200, 30)).all()
    add_panels(path, log_of(3))  # the host has not drawn it anew
    assert np.array_equal(pixels(path), first)
    add_panels(path, log_of(9))
    again = pixels(path)
    assert again.shape == first.shape
    assert not np.array_equal(again, first)
    with Image.open(path) as opened:
        assert int(opened.info[HEIGHT]) == size[1]


def test_where_the_host_draws_nothing_there_is_nothing(tmp_path: Path) -> None:
    before = set(tmp_path.iterdir())
    add_panels(tmp_path / "progress.png", log_of(2))
    assert set(tmp_path.iterdir()) == before


def test_a_damaged_picture_does_not_end_a_training(bench: Any) -> None:
    def half(logger: Any, folder: str) -> None:
        Path(folder, "progress.png").write_bytes(b"half a picture")

    bench.patch.setattr(LocalLogger, "plot_progress_png", half)
    trainer = bench.train("SAT")
    assert trainer.current_epoch == 2
    assert bench.log(trainer).count("WARNING: progress.png is without our panels") == 2


def test_each_epoch_of_the_log_says_how_long_the_whole_run_will_take(bench: Any) -> None:
    trainer = bench.train("AMAT", epochs=4, iterations_per_epoch=3, warmup_epochs=1)
    lines = [line for line in bench.log(trainer).splitlines() if "to the end (" in line]
    assert [line.split("to the end ")[1].strip() for line in lines] == [
        "(4 epochs of 3 steps; validation comes on top)",  # as soon as there are steps to be timed
        *("(3 epochs)", "(2 epochs)", "(1 epochs)"),
    ]
    assert all("About " in line for line in lines)


def test_a_value_that_only_a_method_of_ones_own_has_is_logged(bench: Any) -> None:
    """The host wants a value for every key in every epoch."""
    end_epoch = MethodRun.end_epoch
    more: dict[int, dict[str, float]] = {1: {"own": 2.5}}
    bench.patch.setattr(MethodRun, "end_epoch", lambda run: end_epoch(run) | more.get(run._epoch, {}))
    log = bench.saved(bench.train("SAT", epochs=3))["logging"]
    assert np.array_equal(log["adv_own"], [math.nan, 2.5, math.nan], equal_nan=True)


def test_wandb_gets_our_values(bench: Any) -> None:
    """By the host's own logger, once the host's variable switches it on."""
    seen: dict[tuple[str, int], float] = {}
    run = SimpleNamespace(config={}, summary={}, step=0)
    run.log = lambda values, step: seen.update({(key, step): value for key, value in values.items()})
    bench.patch.setattr(nnunet_logger, "wandb", SimpleNamespace(init=lambda **_: run))
    bench.patch.setenv("nnUNet_wandb_enabled", "1")
    trainer = bench.train("AMAT", warmup_epochs=1)
    log = bench.saved(trainer)["logging"]
    for key in LOG_KEYS:
        assert np.array_equal([seen[key, epoch] for epoch in range(2)], log[key], equal_nan=True), key
    assert math.isfinite(seen["adv_margin_q50", 1])
    assert math.isfinite(seen["adv_robust_dice", 1])
    told = run.config["adversarial"]
    assert told["method"] == "AMAT"
    assert {name: told[name] for name in ("delta", "eps", "steps")} == {
        name: getattr(trainer.settings, name) for name in ("delta", "eps", "steps")
    }
    assert None not in (told["delta"], told["eps"], told["steps"])


@pytest.mark.slow
def test_npz_and_find_best_configuration(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Typed as ever: two folds of two trainers with --npz, and the best of them and of their ensemble."""

    def call(command: Any, line: str) -> None:
        bench.patch.setattr(sys, "argv", shlex.split(line))
        command()

    bench.make("AMAT")  # its settings are in the file that the environment names
    folders = {}
    for kind in ("AMAT", "SAT"):
        folders[kind] = bench.results / bench.world.dataset("main") / f"nnUNetTrainer{kind}__tiny__2d"
        for fold in (0, 1):
            call(
                run_training_entry,
                f"nnUNetv2_train 4 2d {fold} -tr nnUNetTrainer{kind} -p tiny --npz -device cpu",
            )
            validation = folders[kind] / f"fold_{fold}" / "validation"
            cases = {path.name.split(".")[0] for path in validation.glob("*.nii.gz")}
            assert len(cases) == 2
            assert {path.stem for path in validation.glob("*.npz")} == cases
    capsys.readouterr()
    call(
        find_best_configuration_entry_point,
        "nnUNetv2_find_best_configuration 4 -p tiny -c 2d -tr nnUNetTrainerAMAT nnUNetTrainerSAT -f 0 1 -np 1",
    )
    text = capsys.readouterr().out
    found = json.loads((bench.results / bench.world.dataset("main") / "inference_information.json").read_text())
    assert set(found["all_results"]) == {
        *(folder.name for folder in folders.values()),
        "ensemble___nnUNetTrainerAMAT__tiny__2d___nnUNetTrainerSAT__tiny__2d___0_1",
    }
    best = found["best_model_or_ensemble"]
    assert {model["trainer"] for model in best["selected_model_or_models"]} <= {"nnUNetTrainerAMAT", "nnUNetTrainerSAT"}
    assert Path(best["postprocessing_file"]).is_file()
    assert "nnUNetv2_predict -d " in text
    assert "-tr nnUNetTrainer" in text

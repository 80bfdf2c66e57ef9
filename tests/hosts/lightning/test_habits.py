"""What a user of Lightning looks for: names in callback_metrics, values in loggers, a configuration to be fed back."""

from __future__ import annotations

import io
import math
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger

from advmed.integrations.lightning.module import plain
from advmed.testing.lightning import QUIET, LightningHost, runs, unchanged_process
from advmed.training.run import LOG_KEYS
from helpers.hosts import ROOT, as_on_a_terminal

NAMES: dict[str, set[str]] = {
    "adv-classify": {"accuracy", "balanced_accuracy", "mAP"},
    "adv-landmark": {"MRE"},
}
"""Of the metrics, clean and robust."""


class Recorder(Logger):
    """What any logger of Lightning is given: CSV, TensorBoard, Weights & Biases."""

    name, version = "recorder", 0

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, list[tuple[float, int]]] = {}
        self.parameters: dict[str, Any] = {}

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.parameters.update(params)

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        for name, value in metrics.items():
            self.seen.setdefault(name, []).append((float(value), int(step or 0)))


@pytest.mark.slow
def test_callback_metrics_and_loggers_have_our_values_under_the_names_of_the_page(
    host: LightningHost, tmp_path: Path
) -> None:
    model = host.module.from_checkpoint(host.adaptive.last).train()
    logger = Recorder()
    trainer = Trainer(**{**QUIET, "logger": logger}, max_epochs=3, default_root_dir=tmp_path)
    trainer.fit(model, datamodule=host.read())
    assert logger.parameters["method"]["name"] == "AMAT", "of Lightning itself, as it was given"
    resolved = logger.parameters["adversarial"]
    assert resolved == {"method": "AMAT", **plain(asdict(model.settings))}
    assert None not in (resolved["delta"], resolved["eps"], resolved["steps"])
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    metrics = NAMES[host.module.command]
    wanted = {f"val/{prefix}{name}" for prefix in ("", "robust_") for name in metrics}
    assert wanted <= set(found)
    ours = {name for name in found if name.startswith("adv/")}
    assert {"adv/margin_q05", "adv/margin_q50", "adv/margin_q95", "adv/loss_clean", "adv/loss_adversarial"} <= ours
    assert ours <= {f"adv/{key}" for key in LOG_KEYS}
    assert "train/loss" in found
    assert all(map(math.isfinite, found.values()))
    page = (ROOT / "docs" / f"{host.module.command.removeprefix('adv-')}.md").read_text()
    for name in {*wanted, *(name for name in ours if "margin_q" not in name), "train/loss"}:
        assert f"`{name}`" in page, f"{name} is not on the page"
    for name in {*wanted, *ours}:
        value, step = logger.seen[name][-1]
        assert value == pytest.approx(found[name], nan_ok=True), name
        assert step > 0
        assert len(logger.seen[name]) in (2, 3), "once an epoch; of the attack, not of the clean warm-up"


@pytest.mark.slow
def test_a_printed_configuration_can_be_fed_back(host: LightningHost, tmp_path: Path) -> None:
    given = {**host.easy, "model__method__name": "SAT", "model__validation_steps": 1, "trainer__max_epochs": 1}
    words = host.words(tmp_path / "first", **given)
    out = io.StringIO()
    with unchanged_process(), redirect_stdout(out), pytest.raises(SystemExit) as ended:
        host.main(["fit", *words, "--print_config"])
    assert ended.value.code == 0
    printed = out.getvalue()
    assert not (tmp_path / "first").exists(), "it only prints"
    content = yaml.safe_load(printed)
    assert content["model"]["method"]["name"] == "SAT"
    assert set(content) >= {"model", "data", "trainer", "checkpoint", "seed_everything"}
    path = tmp_path / "printed.yaml"
    path.write_text(printed)
    host.ok("fit", *words)
    host.ok("fit", "--config", path, "--trainer.default_root_dir", tmp_path / "second")
    (first,), (second,) = (runs(tmp_path / name) for name in ("first", "second"))
    for one, other in zip(first.table(), second.table(), strict=True):
        assert {k: v for k, v in one.items() if "seconds" not in k} == {
            k: v for k, v in other.items() if "seconds" not in k
        }
    # and so is what a run leaves
    host.ok("fit", "--config", first.folder / "config.yaml", "--trainer.default_root_dir", tmp_path / "third")
    assert len(runs(tmp_path / "third")) == 1


@pytest.mark.slow
def test_thresholds_and_looks_at_the_images_show_how_far_they_are(
    host: LightningHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = host.standard.last
    as_on_a_terminal(monkeypatch)
    words = ["thresholds", checkpoint, "--device", "cpu", *host.reading()[:-4], "--out", tmp_path / "thresholds.json"]
    status, _, shown = host.call(*words)
    assert status == 0, shown
    assert "thresholds: 100%" in shown
    if any(isinstance(image, Path) for image in host.read().splits["train"].images):
        assert "reading headers: 100%" in shown

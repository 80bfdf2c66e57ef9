"""Our panels below those of the host's ``progress.png``, which stay as the host has drawn them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, PngImagePlugin

from advmed.files import replacing

HEIGHT = "advmed_host_height"
"""Under which the picture tells how high the host's part of it is: a host may not draw it anew every time."""
_INCHES = 30, 18
"""Width and height of a panel, and"""
_LETTERS: dict[Any, Any] = {"font.size": 27.5, "axes.labelsize": 30, "xtick.labelsize": 27.5, "ytick.labelsize": 27.5}
"""sizes of letters in it, as the host has them."""


def add_panels(path: Path, log: Mapping[str, Sequence[float]]) -> None:
    """Adds to the host's picture: losses of clean and attacked samples with the robust Dice, and the noise levels.

    Args:
        path: of the picture; where the host has drawn none, there is none afterwards.
        log: one value for each epoch (:data:`adv_nnunet.trainer.LOG_KEYS`), NaN where there was none.

    Raises:
        OSError: if the picture cannot be read or written.
    """
    if not path.is_file():
        return
    with _opened(path) as opened:
        height = int(opened.info.get(HEIGHT, opened.height))
        hosts = opened.convert("RGB").crop((0, 0, opened.width, height))
    ours = _draw(log, hosts.width)
    whole = Image.new("RGB", (hosts.width, height + ours.height), "white")
    whole.paste(hosts, (0, 0))
    whole.paste(ours, (0, height))
    note = PngImagePlugin.PngInfo()
    note.add_text(HEIGHT, str(height))
    with replacing(path) as temporary:
        whole.save(temporary, "PNG", pnginfo=note, compress_level=1)


def _opened(path: Path) -> Image.Image:
    """The picture; not by Image.open, in whose place other packages (Ultralytics) put functions of their own."""
    try:
        return PngImagePlugin.PngImageFile(path)
    except SyntaxError as error:  # Pillow's word for a damaged file
        raise OSError(f"{path.name} cannot be read ({error})") from error


def _draw(log: Mapping[str, Sequence[float]], width: int) -> Image.Image:
    """The panels, as many pixels wide as the host's picture."""
    levels = bool(np.isfinite(np.asarray(log["adv_margin_q50"], dtype=float)).any())
    with mpl.rc_context(_LETTERS):
        figure = Figure((_INCHES[0], _INCHES[1] * (1 + levels)), dpi=width / _INCHES[0], layout="constrained")
        axes = figure.subplots(1 + levels, squeeze=False, sharex=True)[:, 0]
        axes[0].tick_params(labelbottom=True)
        _losses(axes[0], log)
        if levels:
            _noise_levels(axes[1], log)
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi="figure")
    with Image.open(image) as opened:
        return opened.convert("RGB")


def _losses(axes: Any, log: Mapping[str, Sequence[float]]) -> None:
    """As the host's first panel, of training and of attacked validation batches."""
    dice = axes.twinx()
    for key, colour, name in (
        ("adv_loss_clean", "b", "loss_tr, clean samples"),
        ("adv_loss_adversarial", "r", "loss_tr, attacked samples"),
    ):
        axes.plot(log[key], color=colour, marker="o", label=name, linewidth=4)
    for key, style, name in (
        ("adv_robust_dice", "dotted", "pseudo dice under attack"),
        ("adv_ema_robust_dice", "-", "pseudo dice under attack (mov. avg.)"),
    ):
        dice.plot(log[key], color="g", ls=style, label=name, linewidth=4)
    axes.set(xlabel="epoch", ylabel="loss")
    dice.set_ylabel("pseudo dice under attack")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1))
    dice.legend(loc="lower right", bbox_to_anchor=(1, 1))


def _noise_levels(axes: Any, log: Mapping[str, Sequence[float]]) -> None:
    low, median, high = (np.asarray(log[f"adv_margin_{q}"], dtype=float) for q in ("q05", "q50", "q95"))
    axes.fill_between(range(len(median)), low, high, alpha=0.3, label="noise levels of the samples, 5 to 95 %")
    axes.plot(median, color="b", marker="o", label="median", linewidth=4)
    axes.set(xlabel="epoch", ylabel="noise level")
    axes.set_ylim(bottom=0)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)

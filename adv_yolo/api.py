"""Attacks on detection models for users who want nothing else: FGSM, PGD and their like on YOLO in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from ultralytics import YOLO

from adv_yolo.checkpoint import read_checkpoint
from adv_yolo.objective import Batch, DetectionObjective, ImageTerms, check_model, head_of
from advmed.attacks import AttackResult, pgd
from advmed.attacks.problem import Bounds
from advmed.guard import preserved
from advmed.objective import ordinary


def attack(
    model: YOLO | nn.Module | str | Path,
    images: Batch | Tensor,
    labels: Sequence[Tensor] | None = None,
    *,
    radius: float | Tensor,
    steps: int = 20,
    step_scale: float = 4.0,
    norm: float = 2,
    bounds: Bounds = (0.0, 1.0),
    random_start: float | bool = False,
    restarts: int = 1,
    keep: Literal["last", "best"] = "best",
    generator: torch.Generator | None = None,
) -> AttackResult:
    """Projected gradient ascent on a detector's own loss (PGD, as :func:`advmed.pgd`).

    The network is attacked as it predicts: in evaluation mode, whatever mode it is in; its weights, modes and running
    statistics are left as they are, and no facade's ``train()`` or ``eval()`` is called. ``steps=1, step_scale=1,
    norm=float("inf")`` is FGSM, ``step_scale=1`` I-FGSM.

    Args:
        model: a ``YOLO``, its ``.model``, or the path of a trained ``.pt``.
        images: the host's batch (a dict with ``img``, ``batch_idx``, ``cls``, ``bboxes``), or images (B, C, H, W) in
            [0, 1], with sides that are multiples of the model's largest stride (32; P6 models: 64).
        labels: with images: B tensors (n_i, 5), class and normalised x, y, width, height; n_i may be 0.
        radius: noise level, one number or (B,), in the given norm over all values of an image.
        steps: number of gradient steps.
        step_scale: a in alpha = a * radius / steps.
        norm: 2 or inf.
        bounds: lowest and highest pixel value, or None.
        random_start: True, False, or a fraction of the radius.
        restarts: number of runs, of which the worst for the model is kept per image.
        keep: "best" (largest loss) or "last" iterate.
        generator: makes random starts repeatable.

    Returns:
        ``.images`` (B, 3, H, W), ``.terms`` (B, K), ``.norms`` (B,), ``.nonfinite`` (B,).

    Raises:
        TypeError: for a model of another task, or images that are no tensor of the type of its weights.
        ValueError: for images out of [0, 1], labels that do not fit, or attack settings out of range.
        FileNotFoundError: for a path that does not exist.

    Example:
        >>> import torch
        >>> from adv_yolo import attack
        >>> from ultralytics import YOLO
        >>> images = torch.full((1, 3, 64, 64), 0.5)
        >>> labels = [torch.tensor([[0, 0.5, 0.5, 0.4, 0.4]])]  # class, x, y, width, height
        >>> found = attack(YOLO("yolov8n.yaml"), images, labels, radius=1.0, steps=2, keep="last")
        >>> round((found.images - images).norm().item(), 3)
        1.0
    """
    with torch.inference_mode(False):
        network = network_of(model)
        batch = images if not isinstance(images, Tensor) else make_batch(images, labels)
        check_batch(batch, network)
        device = next(network.parameters()).device
        batch = {k: ordinary(v).to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        with preserved(network):  # training flags among what it restores
            network.eval()
            objective = DetectionObjective(network, ImageTerms(network), batch)
            return pgd(
                objective,
                batch["img"],
                radius,
                steps=steps,
                step_scale=step_scale,
                norm=norm,
                bounds=bounds,
                random_start=random_start,
                restarts=restarts,
                keep=keep,
                generator=generator,
            )


def network_of(model: YOLO | nn.Module | str | Path) -> nn.Module:
    """The network in a YOLO object or a checkpoint.

    Raises:
        TypeError: for anything that is no detection model.
        FileNotFoundError: for a path that does not exist.
    """
    if isinstance(model, (str, Path)):
        model, _ = read_checkpoint(model)
    elif isinstance(model, YOLO):
        model = model.model
    return check_model(model)


def make_batch(images: Tensor, labels: Sequence[Tensor] | None) -> dict[str, Any]:
    """The host's batch from images (B, 3, H, W) in [0, 1] and B label tensors (n_i, 5)."""
    if labels is None or len(labels) != len(images):
        raise ValueError(
            f"{len(images)} images need {len(images)} label tensors (n, 5) with class, x, y, width and height "
            f"(normalised), got {'none' if labels is None else len(labels)}"
        )
    rows = [torch.as_tensor(label, dtype=torch.float32) for label in labels]
    wrong = [tuple(row.shape) for row in rows if row.numel() and (row.ndim != 2 or row.shape[1] != 5)]
    if wrong:
        raise ValueError(f"label tensors must be (n, 5): class, x, y, width and height; got {wrong[0]}")
    rows = [row.reshape(-1, 5) for row in rows]
    none = torch.zeros(0, 5)  # of an empty batch, which is told later
    index = torch.cat([none[:, 0], *(torch.full((len(row),), float(i)) for i, row in enumerate(rows))])
    joined = torch.cat([none, *rows])
    return {"img": images, "batch_idx": index, "cls": joined[:, :1], "bboxes": joined[:, 1:]}


def check_batch(batch: Batch, network: Any) -> None:
    """Raises for a batch that the loss cannot be computed of."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"images must be a tensor (B, C, H, W) or a batch of Ultralytics, got {type(batch).__name__}")
    missing = [key for key in ("img", "batch_idx", "cls", "bboxes") if key not in batch]
    if missing:
        raise ValueError(f"the batch has no {', '.join(missing)}; it needs img, batch_idx, cls and bboxes")
    images = batch["img"]
    if not images.is_floating_point():
        raise TypeError(f"images must be floating point in [0, 1], got {images.dtype}; divide by 255 first")
    weights = next(network.parameters()).dtype
    if images.dtype != weights:
        raise TypeError(f"images are {images.dtype}, the model's weights {weights}; give them the same type")
    stride, channels = max(32, int(network.stride.max())), int(network.yaml.get("channels", 3))
    if images.ndim != 4 or any(side % stride for side in images.shape[2:]):
        raise ValueError(
            f"images must be (B, {channels}, H, W) with H and W multiples of {stride}, got {tuple(images.shape)}"
        )
    if images.shape[1] != channels or not len(images):
        raise ValueError(
            f"images must be (B, {channels}, H, W) with B of 1 or more and the model's {channels} channel(s), got "
            f"{tuple(images.shape)}"
        )
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"images must be finite and in [0, 1], got values from {low:g} to {high:g}; divide by 255")
    boxes = batch["bboxes"]
    if not bool(((boxes >= 0) & (boxes <= 1)).all()):  # NaN is neither
        raise ValueError(
            f"boxes must be x, y, width and height as fractions of the image, in [0, 1], got values from "
            f"{float(boxes.min()):g} to {float(boxes.max()):g}; of pixels, divide by the sides"
        )
    count = int(head_of(network).nc)
    classes = batch["cls"]
    if classes.numel() and not (classes.min() >= 0 and classes.max() < count):
        raise ValueError(f"labels have the class {int(classes.max())}, the model's {count} classes begin at 0")

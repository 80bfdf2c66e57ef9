"""Adversarial training and attacks for Ultralytics detection models (YOLOv5u, YOLOv8 and newer).

``YOLO("yolov8n.yaml").train(trainer=AMATDetectionTrainer, data="data.yaml", delta=3.5)``
"""

from typing import TYPE_CHECKING

from advmed.lazy import lazy

if TYPE_CHECKING:
    from adv_yolo.api import attack
    from adv_yolo.objective import ImageTerms, per_image_losses
    from adv_yolo.trainer import (
        AMATDetectionTrainer,
        ATDetectionTrainer,
        DPAATDetectionTrainer,
        SATDetectionTrainer,
        TRADESDetectionTrainer,
    )

__getattr__ = lazy(
    __name__,
    {
        "attack": "api",
        "ImageTerms": "objective",
        "per_image_losses": "objective",
        **{f"{method}DetectionTrainer": "trainer" for method in ("AMAT", "AT", "DPAAT", "SAT", "TRADES")},
    },
)

__all__ = [
    "AMATDetectionTrainer",
    "ATDetectionTrainer",
    "DPAATDetectionTrainer",
    "ImageTerms",
    "SATDetectionTrainer",
    "TRADESDetectionTrainer",
    "attack",
    "per_image_losses",
]

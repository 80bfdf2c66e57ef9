"""Adversarial training and attacks for Ultralytics detection models (YOLOv5u, YOLOv8 and newer).

``YOLO("yolov8n.yaml").train(trainer=AMATDetectionTrainer, data="data.yaml", delta=3.5)``
"""

from adv_yolo.api import attack
from adv_yolo.objective import ImageTerms, per_image_losses
from adv_yolo.trainer import (
    AMATDetectionTrainer,
    ATDetectionTrainer,
    DPAATDetectionTrainer,
    SATDetectionTrainer,
    TRADESDetectionTrainer,
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

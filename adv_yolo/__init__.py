"""Adversarial training and attacks for Ultralytics detection models (YOLOv5u, YOLOv8 and newer).

``YOLO("yolov8n.yaml").train(trainer=AMATDetectionTrainer, data="data.yaml", delta=3.5)``

The public names are those of ``__init__.pyi``; each is imported when it is first asked for.
"""

from advmed.lazy import public_names

__getattr__, __dir__, __all__ = public_names(__name__, __file__, extra="yolo")

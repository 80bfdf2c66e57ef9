"""Adversarial training for nnU-Net v2, by swapping the trainer: ``nnUNetv2_train DATASET 2d 0 -tr nnUNetTrainerAMAT``.

The public names are those of ``__init__.pyi``; each is imported when it is first asked for.
"""

from advmed.lazy import public_names

__getattr__, __dir__, __all__ = public_names(__name__, __file__, extra="nnunet")

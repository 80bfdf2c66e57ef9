"""What nnU-Net finds when it looks a trainer up in ``nnUNet_extTrainer``; the classes live in ``adv_nnunet.trainer``.

nnU-Net imports every module in this folder and forgets it afterwards, so there must be nothing here but names.
"""

from adv_nnunet.trainer import (
    nnUNetTrainerAMAT,
    nnUNetTrainerAT,
    nnUNetTrainerDPAAT,
    nnUNetTrainerSAT,
    nnUNetTrainerSTD,
    nnUNetTrainerTRADES,
)

__all__ = [
    "nnUNetTrainerAMAT",
    "nnUNetTrainerAT",
    "nnUNetTrainerDPAAT",
    "nnUNetTrainerSAT",
    "nnUNetTrainerSTD",
    "nnUNetTrainerTRADES",
]

"""What nnU-Net finds when it looks a trainer up in ``nnUNet_extTrainer``; the classes live in ``adv_nnunet.trainer``.

nnU-Net imports every module in this folder and forgets it afterwards, so there must be nothing here but names.
"""

from adv_nnunet.trainer import *  # noqa: F403 - the trainers, which are all that is named there

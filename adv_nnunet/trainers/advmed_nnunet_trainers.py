"""What nnU-Net finds when it looks a trainer up in ``nnUNet_extTrainer``; the classes live in ``adv_nnunet.trainer``.

nnU-Net imports every module in this folder and forgets it afterwards, so there must be nothing here but names. A child
process of another environment inherits the variable: where this package is not installed, there are no trainers, and
nnU-Net's own are found as ever.
"""

from importlib.util import find_spec

if find_spec("adv_nnunet") is not None:
    from adv_nnunet.trainer import *  # noqa: F403 - the trainers, which are all that is named there

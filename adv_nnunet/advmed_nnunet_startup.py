"""What Python runs when an interpreter starts: our trainers' folder for nnU-Net. It lies in site-packages itself.

Python 3.15 and newer call it by ``advmed_nnunet.start`` (PEP 829), older ones by the line in ``advmed_nnunet.pth``.
"""

import os
import sys

VARIABLE = "nnUNet_extTrainer"


def add_trainers() -> None:
    """Appends the folder ``adv_nnunet/trainers`` to the environment variable where nnU-Net looks for trainers.

    It imports nothing and never fails; without the package it does nothing.
    """
    try:
        for place in sys.path:
            folder = os.path.join(place, "adv_nnunet", "trainers")
            if os.path.isdir(folder):
                value = os.environ.get(VARIABLE, "")
                if folder not in value.split(os.pathsep):
                    os.environ[VARIABLE] = value + os.pathsep + folder if value else folder
                return
    except Exception:  # an interpreter must start, whatever happens here
        return

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
        folder = find_trainers()
        value = os.environ.get(VARIABLE, "")
        if folder is not None and folder not in value.split(os.pathsep):
            os.environ[VARIABLE] = value + os.pathsep + folder if value else folder
    except Exception:  # an interpreter must start, whatever happens here
        return


def find_trainers() -> str | None:
    """The folder ``adv_nnunet/trainers``; None if there is none."""
    for place in sys.path:
        folder = os.path.join(place, "adv_nnunet", "trainers")
        if os.path.isdir(folder):
            return folder
    for finder in sys.meta_path:  # an editable install has a finder of its own
        spec = finder.find_spec("adv_nnunet", None)
        for place in (spec and spec.submodule_search_locations) or ():
            folder = os.path.join(place, "trainers")
            if os.path.isdir(folder):
                return folder
    return None

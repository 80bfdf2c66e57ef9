"""What ``advmed doctor`` looks at in nnU-Net: its folders, and whether its commands find our trainers."""

from __future__ import annotations

import os

from adv_nnunet.settings import VARIABLE
from advmed.cli.doctor import Page, ask

TITLE = "nnU-Net"
FOLDERS = {"nnUNet_raw": False, "nnUNet_preprocessed": True, "nnUNet_results": True}
"""The host's variables, and whether we write there."""
TRAINERS = "nnUNet_extTrainer"
OTHERS = ("nnUNet_compile", "nnUNet_def_n_proc", "nnUNet_n_proc_DA")
FIND = """
import os, sys
from contextlib import redirect_stdout
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
with redirect_stdout(sys.stderr):
    found = recursive_find_trainer_class_by_name("nnUNetTrainerAMAT")
print(found.__module__)
"""
"""What ``nnUNetv2_train -tr nnUNetTrainerAMAT`` does to find its trainer."""


def examine(page: Page) -> None:
    """Adds folders, settings and the trainers to the page."""
    for name, write in FOLDERS.items():
        page.folder(TITLE, name, os.environ.get(name), write=write)
    for name in OTHERS:
        page.add(TITLE, name, os.environ.get(name, "not set"))
    settings = os.environ.get(VARIABLE)
    page.add(TITLE, VARIABLE, settings or "not set")
    if settings and not os.path.isfile(settings):
        page.broken.append(f"{VARIABLE} names the settings file {settings}, which does not exist")
    lines, ended = ask(f"import os\nprint(os.environ.get({TRAINERS!r}, ''))")
    page.add(TITLE, f"{TRAINERS} of a new interpreter", ended or (lines or [""])[-1] or "not set")
    lines, ended = ask(FIND)
    if not ended and lines[-1].startswith("adv_nnunet."):
        page.add(TITLE, "nnUNetTrainerAMAT", f"found, {lines[-1]}")
        return
    page.add(TITLE, "nnUNetTrainerAMAT", "not found" if ended else f"another one is found first, of {lines[-1]}")
    if ended == "KeyError: 'triton'":  # of PyTorch 2.4: an import that failed halfway, at which nnU-Net stumbles
        page.broken.append(
            f"nnUNetv2_train does not find our trainers ({ended}): Triton cannot be imported. What `python -c 'import "
            f"triton'` says is missing, most likely setuptools, must be installed"
        )
        return
    page.broken.append(
        f"nnUNetv2_train does not find our trainers{'' if ended else ' first'}"
        f"{f' ({ended})' if ended else ''}: the start-up hook did not run, or a script overwrote {TRAINERS}. Install "
        f"advmed with pip into this environment, or set the variable to the folder adv_nnunet/trainers"
    )

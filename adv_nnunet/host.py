"""What of nnU-Net's inside a release may break: read from its source, and kept in this one place.

What the data loader does stands in :mod:`adv_nnunet.loader`; ``tests/hosts/nnunet/test_host_assumptions.py`` looks at
both.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import io
import json
import os
import textwrap
from collections.abc import Collection
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from torch.nn.parallel import DistributedDataParallel

from advmed.files import write_whole

PACKAGES = ("nnunetv2",)
"""Whose releases may break us: a newer one than those that were tested is pointed out."""
READ_STEP = "e5ba754489b9d7d7405b3f2eb2a4432326ab6930b6fe6e3ce46a13a9c6ed34a7"
"""Of nnUNetTrainer.train_step as it was when ours was written after it (2.8.1), without comments."""
COMPILE = "nnUNet_compile"
"""Environment variable by which a user decides whether the host compiles the network."""
MAKERS_OF_SAMPLES = (
    "get_training_transforms",
    "configure_rotation_dummyDA_mirroring_and_inital_patch_size",
    "get_dataloaders",
)
"""Methods of a trainer that decide how its training samples are cut and augmented."""
MAKERS_OF_LOSS = ("_build_loss", "_get_deep_supervision_scales")
"""Methods of a trainer that decide what its loss is."""


def fingerprint_of_step() -> str | None:
    """SHA-256 of the code of the host's ``train_step``, without comments; None where there is no source to read."""
    try:
        source = textwrap.dedent(inspect.getsource(nnUNetTrainer.train_step))
    except OSError:
        return None
    return hashlib.sha256(ast.unparse(ast.parse(source)).encode()).hexdigest()


def owner_of(kind: type, name: str) -> type:
    """The class that defines what ``kind.name`` is."""
    return next(base for base in kind.__mro__ if name in vars(base))


def class_below(kind: type, ours: type, name: str) -> type:
    """The class whose ``name`` ours takes the place of, in a class that derives from ours."""
    below = kind.__mro__[kind.__mro__.index(ours) + 1 :]
    return next(base for base in below if name in vars(base))


def owners_of(kind: type, names: Collection[str], ours: type) -> list[str]:
    """The names of the classes, without ours, that define one of these methods, in the order of a call."""
    return [base.__name__ for base in kind.__mro__ if base is not ours and any(name in vars(base) for name in names)]


def standard_class(kind: type, ours: type) -> type:
    """The trainer that a checkpoint of ours names, so that prediction builds the network that was trained.

    The nearest base that is not ours and builds the same network; the class itself where none does.

    Args:
        kind: a trainer.
        ours: a class that all trainers of ours derive from.
    """
    builder = owner_of(kind, "build_network_architecture")
    bases = (base for base in kind.__mro__ if issubclass(base, nnUNetTrainer) and not issubclass(base, ours))
    return next((base for base in bases if owner_of(base, "build_network_architecture") is builder), kind)


def build_network(trainer: Any) -> torch.nn.Module:
    """A new network of an initialised trainer, not on its device yet, as ``nnUNetTrainer.initialize`` builds it."""
    plan = trainer.configuration_manager
    if "plans_manager" in inspect.signature(trainer.build_network_architecture).parameters:
        described = [trainer.plans_manager, plan]
    else:  # a trainer of before, which the host still takes
        described = [plan.network_arch_class_name, plan.network_arch_init_kwargs]
        described.append(plan.network_arch_init_kwargs_req_import)
    network: torch.nn.Module = trainer.build_network_architecture(
        *described,
        trainer.num_input_channels,
        trainer.label_manager.num_segmentation_heads,
        trainer.enable_deep_supervision,
    )
    return network


def bare(network: torch.nn.Module) -> torch.nn.Module:
    """The network without DistributedDataParallel, compiled or not."""
    return network.module if isinstance(network, DistributedDataParallel) else network


def channels(described: Any) -> int:
    """Of the network's input; of a trainer of the host's, or its predictor."""
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels

    plans, configuration = described.plans_manager, described.configuration_manager
    return int(determine_num_input_channels(plans, configuration, described.dataset_json))


def logged(logger: Any) -> dict[str, list[Any]]:
    """The host's log, a list of one value per epoch for every key; what is changed in it is changed in the log."""
    lists: dict[str, list[Any]] = logger.local_logger.my_fantastic_logging
    return lists


def require_environment(*names: str) -> None:
    """Raises RuntimeError if one of nnU-Net's environment variables is not set."""
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        raise RuntimeError(
            f"nnU-Net does not know where its data is: the environment variable(s) {', '.join(missing)} are not set. "
            f"Set them to folders (export NAME=FOLDER), as nnU-Net's installation asks."
        )


def strip_debug_file(path: Path, names: Collection[str]) -> None:
    """Replaces the user's folders in the host's ``debug.json``, which its model export packs, by their variables.

    Args:
        path: of the file.
        names: attributes of the trainer that are left out.
    """
    content = {key: value for key, value in json.loads(path.read_text()).items() if key not in names}
    variables = ("HOME", "nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
    folders = {os.environ.get(name, "").rstrip("/"): name for name in variables}
    text = json.dumps(content, indent=4)
    for folder in sorted(filter(None, folders), key=len, reverse=True):
        text = text.replace(json.dumps(folder)[1:-1], f"${folders[folder]}")
    write_whole(path, text)


def find_trainer(name: str) -> type[nnUNetTrainer] | None:
    """The trainer of that name in nnU-Net's own folder or in those of nnUNet_extTrainer, if there is one."""
    with redirect_stdout(io.StringIO()):
        try:
            found: type[nnUNetTrainer] = recursive_find_trainer_class_by_name(name)
        except RuntimeError:
            return None
    return found


def is_found(kind: type) -> bool:
    """Whether prediction finds a trainer by its name."""
    if kind.__module__.startswith("nnunetv2."):
        return True
    found = find_trainer(kind.__name__)
    return found is not None and (found.__module__, found.__qualname__) == (kind.__module__, kind.__qualname__)

"""Which epoch is the best, and when to stop: Lightning's own callbacks, which wait for the end of the clean warm-up.

A network that has not met an attack yet is often the best one by a clean metric, and now and then by a robust one; what
it reaches must neither be kept as the best nor use up patience.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from advmed.files import replacing
from advmed.integrations.lightning.weights import read_tensors


class AfterWarmup(Callback):
    """A base class before a callback that watches a metric: during the clean warm-up it does not look.

    Of a module that is no :class:`advmed.integrations.lightning.RobustModule` it knows no warm-up.
    """

    def _waits(self, pl_module: Any) -> bool:
        run = getattr(pl_module, "run", None)
        return getattr(self, "monitor", None) is not None and run is not None and bool(run.warming_up)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """As the callback's own, after the warm-up."""
        if not self._waits(pl_module):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """As the callback's own, after the warm-up."""
        if not self._waits(pl_module):
            super().on_train_epoch_end(trainer, pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """As the callback's own, after the warm-up."""
        if not self._waits(pl_module):
            super().on_validation_end(trainer, pl_module)


class BestCheckpoint(AfterWarmup, ModelCheckpoint):
    """Lightning's ModelCheckpoint; with a ``monitor``, no epoch of the clean warm-up is among the best.

    A training that is resumed in another folder brings its best epochs along, and a later one must be better to take
    their place. The command has it; it is for a Trainer of your own, in the place of Lightning's. The arguments are
    those of :class:`lightning.pytorch.callbacks.ModelCheckpoint`.

    Example:
        >>> from adv_classify import BestCheckpoint  # or adv_landmark
        >>> BestCheckpoint(monitor="val/robust_mAP", mode="max", filename="best").save_top_k
        1
    """

    _resumed: tuple[Path, int]
    _to_copy: Mapping[Path, Path] = {}

    @property
    def state_key(self) -> str:
        """Tells the best one from the best few, which have the same monitor."""
        return f"{super().state_key}{self.filename}"

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Notes where the checkpoint lies."""
        self._resumed = Path(trainer.ckpt_path).parent, int(checkpoint["epoch"])

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Copies the best epochs from another folder; a training that is refused has not come here."""
        super().on_train_start(trainer, pl_module)
        for found, own in self._to_copy.items() if trainer.is_global_zero else ():
            own.parent.mkdir(parents=True, exist_ok=True)
            with replacing(own) as temporary:
                shutil.copyfile(found, temporary)
        self._to_copy = {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As Lightning's; takes the best epochs of another folder, too."""
        if self.monitor is not None and self.dirpath is not None and state_dict.get("dirpath") != self.dirpath:
            state_dict = self._brought_along(state_dict)
        super().load_state_dict(state_dict)

    def _brought_along(self, state: Mapping[str, Any]) -> dict[str, Any]:
        folder, epoch = self._resumed
        kept: dict[str, Any] = {}
        copies: dict[Path, Path] = {}
        for path, score in state.get("best_k_models", {}).items():
            beside = folder / Path(path).name  # the run may have been moved
            found = beside if beside.is_file() else Path(path)
            if not found.is_file() or read_tensors(found)["epoch"] > epoch:
                rank_zero_warn(
                    f"{found}, the best epoch so far by {self.monitor}, is not there any more or of a later epoch: the "
                    f"best ones will be among the epochs from here on"
                )
                continue
            own = copies[found] = Path(str(self.dirpath), found.name)
            kept[str(own)] = score
        self._to_copy = copies
        best, worst = (max, min) if self.mode == "max" else (min, max)
        first = best(kept, key=lambda path: kept[path]) if kept else ""
        full = bool(kept) and len(kept) == self.save_top_k
        last = worst(kept, key=lambda path: kept[path]) if full else ""
        return {
            **state,
            "dirpath": self.dirpath,
            "best_k_models": kept,
            "best_model_path": first,
            "best_model_score": kept.get(first),
            "kth_best_model_path": last,
            "kth_value": kept[last] if full else self.kth_value,
            "last_model_path": "",
        }


class BestStopping(AfterWarmup, EarlyStopping):
    """Lightning's EarlyStopping, whose patience begins with the first attacked epoch.

    The command has it; it is for a Trainer of your own, in the place of Lightning's. The arguments are those of
    :class:`lightning.pytorch.callbacks.EarlyStopping`.

    Example:
        >>> from adv_classify import BestStopping  # or adv_landmark
        >>> BestStopping(monitor="val/robust_mAP", mode="max", patience=5).wait_count
        0
    """


_KINDS: dict[type[Callback], type[AfterWarmup]] = {ModelCheckpoint: BestCheckpoint, EarlyStopping: BestStopping}


def does_not_wait(callback: Callback) -> type[AfterWarmup] | None:
    """What takes the place of a callback that would look at the warm-up; None where it does not."""
    return None if getattr(callback, "monitor", None) is None else _KINDS.get(type(callback))


def waiting(callback: Callback) -> Callback:
    """The callback, or in its place one with the same settings that waits for the end of the warm-up."""
    kind = does_not_wait(callback)
    if kind is None:
        return callback
    other = kind.__new__(kind)
    vars(other).update(vars(callback))
    return other

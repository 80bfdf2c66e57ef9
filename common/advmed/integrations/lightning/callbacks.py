"""Which epoch is the best, and when to stop: Lightning's own callbacks, which wait for the end of the clean warm-up.

A network that has not met an attack yet is often the best one by a clean metric, and now and then by a robust one; what
it reaches must neither be kept as the best nor use up patience.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint


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

    Example:
        >>> from advmed.integrations.lightning import BestCheckpoint
        >>> BestCheckpoint(monitor="val/robust_mAP", mode="max", filename="best").save_top_k
        1
    """

    @property
    def state_key(self) -> str:
        """Tells the best one from the best few, which have the same monitor."""
        return f"{super().state_key}{self.filename}"


class BestStopping(AfterWarmup, EarlyStopping):
    """Lightning's EarlyStopping, whose patience begins with the first attacked epoch.

    Example:
        >>> from advmed.integrations.lightning import BestStopping
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

"""A method in the course of a training: what every host does around :meth:`advmed.methods.Method.step`.

A host calls, in this order: :meth:`MethodRun.begin_epoch`, :meth:`MethodRun.step` for each batch,
:meth:`MethodRun.end_epoch`; and lets :meth:`MethodRun.state_dict` ride in its checkpoint.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from torch import Tensor

from advmed.clock import Pace
from advmed.distributed import gathered, is_distributed, place
from advmed.methods import STD, AdaptiveRadiusMethod, AdversarialMethod, Method, WeightPerturbation
from advmed.methods.base import Backward, FixedRadiusMethod, Step
from advmed.objective import Objective
from advmed.thresholds import DEFAULT_RULE, RunningThresholds, Thresholds
from advmed.training.settings import TrainingSettings
from advmed.training.strength import WEAK, StrengthCheck

LOG_KEYS = (
    "loss_clean",
    "loss_adversarial",
    "loss_sync",
    "expanded",
    "attack_share",
    "gradient_alignment",
    "nonfinite",
    "attack_seconds",
    "margin_q05",
    "margin_q50",
    "margin_q95",
)
"""What an epoch is summed up in; a method has some of them."""
_KEPT = ("thresholds", "rule", "warmup_epochs")
"""Settings that are those of a run's beginning, also where it is resumed with others."""
_LOW_SCALE, _NO_SCALE = 1.0, 2.0**-24
"""Of a loss in float16: hosts begin with 2 to the 16th; by the second, no gradient is left to be scaled."""
_MOST_STEPS = 20
"""Of the attack that others are compared with; as many as the papers have."""


class MethodRun:
    """A method with its clean warm-up, its log and its state.

    Args:
        name: of the method, such as "AMAT".
        settings: the resolved settings.
        thresholds: of AMAT.
        epochs: length of the training.
        steps_per_epoch: batches of an epoch, for an estimate of the time left; None: not known.
        say: takes a line for the host's log.
        shown: whether the margin of a sample with that id counts in the quantiles of the log.
        doubts: what is to be said, after a clean warm-up, against the network that thresholds are calibrated on (how
            bad it still is by the host's own metric); None if nothing is.
        every_epoch: whether the time that is left is said at every epoch, in a log that has lines for each; otherwise
            at every tenth of the training.

    Attributes:
        method: the :class:`advmed.methods.Method`.
        settings: what was left open in them is chosen by the preset.
        warmup_epochs: epochs of standard training at the beginning.
        warming_up: whether the present epoch is one of them.
        steps_per_epoch: batches of an epoch, None where that is not known; a host may find out that there are others.

    Raises:
        ValueError: for settings that the method cannot work with, or a warm-up that leaves no adversarial epoch.

    Example:
        >>> import torch
        >>> from advmed import MethodRun, TrainingSettings
        >>> run = MethodRun("SAT", TrainingSettings(eps=1.0), epochs=1)
        >>> lines = run.begin_epoch(0)
        >>> step = run.step(lambda images: images.flatten(1).sum(1, keepdim=True), torch.zeros(1, 1, 2, 2), ["a"])
        >>> round(run.end_epoch()["loss_adversarial"], 3)
        2.0
    """

    def __init__(
        self,
        name: str,
        settings: TrainingSettings,
        thresholds: Thresholds | RunningThresholds | None = None,
        *,
        epochs: int,
        steps_per_epoch: int | None = None,
        say: Callable[[str], None] = lambda line: None,
        shown: Callable[[str], bool] = lambda sample: True,
        doubts: Callable[[], str | None] = lambda: None,
        every_epoch: bool = False,
    ) -> None:
        self.name, self.settings, self.epochs = name, settings.for_method(name), epochs
        settings = self.settings
        self.method: Method = settings.make_method(name, thresholds)
        self._say, self._shown, self._doubts = say, shown, doubts
        self._perturbed: WeightPerturbation | None = None
        if settings.awp and isinstance(self.method, AdversarialMethod):
            self._perturbed = WeightPerturbation(self.method, settings.awp)
        self._check = strength_check(self.method, self.cost)
        self.warmup_epochs = _warmup(self.method, settings, thresholds, epochs)
        self.warming_up = self.warmup_epochs > 0
        self._eps = self.method.eps if settings.ramp and isinstance(self.method, FixedRadiusMethod) else None
        self.steps_per_epoch = steps_per_epoch
        self._epoch, self._steps = 0, 0
        self._remarked = self._ramping = False
        self._pace = Pace(epochs, self.warmup_epochs, steps_per_epoch, self.cost, every_epoch=every_epoch)
        self._totals: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._finite: Tensor | None = None
        self._scale_told = False
        self._snapshot: tuple[int, dict[str, Any]] | None = None

    @property
    def thresholds(self) -> Thresholds | RunningThresholds | None:
        """The method's thresholds, if it has any."""
        return getattr(self.method, "thresholds", None)

    @property
    def cost(self) -> float:
        """Of a step after the warm-up, in standard training steps, as :attr:`advmed.Method.cost`; with ``awp``."""
        return (self._perturbed or self.method).cost

    @property
    def moves_weights(self) -> bool:
        """Whether gradients are taken at moved weights, in the present epoch."""
        return self._perturbed is not None and not self.warming_up

    def set_epochs(self, epochs: int) -> None:
        """Another length of the training than was thought, where a host trains for a time and not for epochs.

        A clean warm-up whose length was left open, and which still goes on, is a tenth of it again.

        Args:
            epochs: as the host now estimates it, in the last of its calls between two epochs.
        """
        self.epochs = epochs
        if self.warming_up and self.settings.warmup_epochs is None:
            self.warmup_epochs = max(self._epoch + 1, epochs // 10)
        self._pace.epochs, self._pace.warmup = max(epochs, self._epoch + 1), self.warmup_epochs

    def summary(self, epochs: int) -> dict[str, Any]:
        """What a run is after so many epochs, for whoever gets its network: plain values, no samples and no folders.

        Args:
            epochs: that are done, clean ones among them.
        """
        attacked = max(0, epochs - self.warmup_epochs) if isinstance(self.method, AdversarialMethod) else 0
        thresholds, origin = self.thresholds, None
        if isinstance(thresholds, RunningThresholds):
            origin = f"self-calibrated in {self.warmup_epochs} clean epoch(s)"
        elif thresholds is not None:
            source = thresholds.source
            origin = "given" if source is None else f"measured on {PurePath(source).name}"
            if thresholds.source_sha256 is not None:
                origin += f" (SHA-256 {thresholds.source_sha256[:12]}...)"
        return {
            "method": self.name,
            "epochs": epochs,
            "attacked_epochs": attacked,
            "awp": self._perturbed.gamma if self._perturbed is not None and attacked else None,
            "ramp": self.settings.ramp if self._eps is not None and attacked else None,
            "decay": self.settings.decay if self.settings.decay != "host" else None,
            "margin_of": self.settings.margin_of
            if isinstance(self.method, AdaptiveRadiusMethod) and self.method.drawn
            else None,
            "thresholds": None if thresholds is None or attacked == 0 else str(thresholds),
            "thresholds_from": origin,
        }

    def begin_epoch(self, epoch: int, done: int = 0) -> list[str]:
        """To be called before the first batch of every epoch.

        An epoch that begins a second time (the host ran out of memory, or went back to a checkpoint) begins with the
        state that it began with before.

        Args:
            epoch: counted from 0.
            done: its batches that an earlier run has made, where this one goes on in the middle of the epoch.

        Returns:
            Lines for the host's log.
        """
        lines = []
        if self._snapshot is not None and self._snapshot[0] == epoch:
            self.method.load_state_dict(self._snapshot[1])
            lines.append(f"Epoch {epoch + 1} begins again: margins and thresholds are back at its start")
        else:
            self.method.begin_epoch()
            self._snapshot = epoch, copy.deepcopy(self.method.state_dict())
        self._totals, self._counts, self._finite = {}, {}, None
        self._epoch, self._steps, self.warming_up = epoch, done, epoch < self.warmup_epochs
        if self.settings.ramp and not self.warming_up and not self._ramping:
            self._ramping = True
            lines += self._of_ramp()
        if (left := self._pace.begin_epoch(epoch)) is not None:
            self._say(left)
        if epoch == self.warmup_epochs and isinstance(self.thresholds, RunningThresholds):
            self.thresholds.begin()
            lines.append(f"Warm-up done. Thresholds: {self.thresholds}")
            if (found := self._doubts()) is not None:
                lines.append(
                    f"WARNING: after the clean warm-up the network has {found}. Thresholds of a poorly trained network "
                    f"are high, and let noise grow that a good one could not bear. Begin with a standard network, or "
                    f"set a longer warm-up"
                )
        return lines

    def step(self, objective: Objective, images: Tensor, ids: Sequence[str], backward: Backward | None = None) -> Step:
        """The method's step, or a standard one during the warm-up; see :meth:`advmed.methods.Method.step`."""
        if (left := self._pace.step()) is not None:
            self._say(left)
        if not self.warming_up:
            self._set_level()
            step = (self._perturbed or self.method).step(objective, images, ids, backward)
            if self._check is not None and step.adversarial is not None and self._check.due():
                self._check.look(objective, images.detach(), step.adversarial)
        else:
            step = STD().step(objective, images, ids, backward)
            if isinstance(self.thresholds, RunningThresholds) and step.terms is not None:
                self.thresholds.update(step.terms)
        for key, value in step.logs.items():  # sums on the device: nobody waits for it
            self._totals[key] = self._totals[key] + value if key in self._totals else value
            self._counts[key] = self._counts.get(key, 0) + 1
        finite = step.loss.detach().isfinite()
        self._finite = finite if self._finite is None else self._finite | finite
        return step

    def check_losses(self, remedy: str) -> None:
        """To be called before :meth:`end_epoch`, in all processes, where the host does not look at losses itself.

        Args:
            remedy: what the user can do, in the host's words.

        Raises:
            FloatingPointError: no loss of the epoch was finite, in any process.
        """
        found = gathered(None if self._finite is None else bool(self._finite))  # one may have had no batch
        if False in found and True not in found:
            raise FloatingPointError(
                f"the training loss was not finite in any step of epoch {self._epoch + 1}: the network learns nothing. "
                f"The last checkpoint may have such weights. {remedy}"
            )

    def check_scale(self, scale: float, remedy: str) -> None:
        """To be called at the end of an epoch by a host that trains in float16.

        Its scaler makes no step whose gradients are not finite, halves the scale, and says nothing: a network whose
        activations are beyond float16 stays as it is for the whole training.

        Args:
            scale: what losses are multiplied by now, against underflow; 1 without a scaler.
            remedy: what the user can do, in the host's words.

        Raises:
            FloatingPointError: so many steps were skipped that no gradient is left to be scaled.
        """
        if scale < _NO_SCALE:
            raise FloatingPointError(
                f"the gradients overflow float16 in every step: its loss scale has fallen to {scale:.1g} in epoch "
                f"{self._epoch + 1}, and the network learns nothing. {remedy}"
            )
        if scale < _LOW_SCALE and not self._scale_told:
            self._scale_told = True
            self._say(
                f"WARNING: gradients overflow float16, and steps are skipped: its loss scale has fallen to {scale:.2g}"
                f". {remedy}"
            )

    def _of_ramp(self) -> list[str]:
        """What is to be said where the attacks begin."""
        if self._eps is None:
            if not isinstance(self.method, AdversarialMethod):
                return []
            return [
                f"WARNING: ramp is of methods with one noise level for all samples, and changes nothing here: the "
                f"levels of {self.name} have a course of their own"
            ]
        full = self.warmup_epochs + math.ceil(self.settings.ramp * (self.epochs - self.warmup_epochs))
        return [
            f"The noise level grows from 0 to eps = {self._eps:g}, which it has by the end of epoch {full} of "
            f"{self.epochs}"
        ]

    def _set_level(self) -> None:
        """The noise level of the step that begins, where it grows with the training (``ramp``): a curriculum.

        Q.-Z. Cai et al., "Curriculum Adversarial Training", IJCAI 2018, arXiv 1805.04807, in its simplest form.
        """
        if self._eps is None or not isinstance(self.method, FixedRadiusMethod):
            return
        self._steps += 1
        of_epoch = min(1.0, self._steps / self.steps_per_epoch) if self.steps_per_epoch else 1.0
        done = (self._epoch - self.warmup_epochs + of_epoch) / max(1, self.epochs - self.warmup_epochs)
        self.method.eps = self._eps * min(1.0, done / self.settings.ramp)

    def end_epoch(self) -> dict[str, float]:
        """To be called after the last batch of every epoch, in all processes: makes their margins equal.

        Returns:
            One value for each of :data:`LOG_KEYS`, NaN where the method has none: means over the steps, what a look at
            the attack's strength found (:class:`advmed.training.strength.Strength`), the number of attack steps lost to
            a gradient that was not finite, seconds of attacks, and quantiles of the margins (AMAT) or perturbation
            sizes (DPAAT).
        """
        self.method.merge()
        values = dict.fromkeys(LOG_KEYS, math.nan)
        values |= {key: float(total) / self._counts[key] for key, total in self._totals.items()}
        if "nonfinite" in self._totals:
            values["nonfinite"] = float(self._totals["nonfinite"])
        if isinstance(self.method, AdversarialMethod):
            values["attack_seconds"] = self.method.clock.drain()
        if isinstance(self.method, AdaptiveRadiusMethod):
            low, median, high = self.method.store.quantiles(of=self._shown)
            values |= {"margin_q05": low, "margin_q50": median, "margin_q95": high}
            # From scratch, margins rest on their floor at first: nothing is said before half of the training is over.
            if not self._remarked and 2 * (self._epoch + 1) > self.epochs and (line := self.method.resting()):
                self._remarked = True
                self._say(line)
        self._judge(values)
        self._totals, self._counts = {}, {}
        return values

    def _judge(self, values: dict[str, float]) -> None:
        """Whether the attack was strong enough, in all processes; more steps where it was not."""
        if self._check is None or not isinstance(self.method, AdversarialMethod):
            return
        found = self._check.drain(gathered(self._check.sums()) if is_distributed() else None)
        if found is None:
            return
        values |= {"attack_share": found.share, "gradient_alignment": found.alignment}
        attack = self.method.attack
        if found.share < WEAK and attack.steps < _MOST_STEPS:
            self._set_steps(min(_MOST_STEPS, 2 * attack.steps))
            self._say(
                f"WARNING: the training's attack of {attack.steps} step(s) adds only {found.share:.0%} of what 20 "
                f"steps add to the loss (gradient alignment {found.alignment:.2f}): the network may be learning to "
                f"hide its gradients (catastrophic overfitting). From here on it has {self.method.attack.steps} steps. "
                f"Judge earlier epochs by an evaluation with many steps, and begin with more if this repeats."
            )

    def _set_steps(self, steps: int) -> None:
        assert isinstance(self.method, AdversarialMethod)
        self.method.attack = dataclasses.replace(self.method.attack, steps=steps)

    def outlook(self, samples: int, visits_per_epoch: float, what: str = "samples") -> list[str]:
        """How far margins can grow in this run, with a warning where that is not far enough.

        Args:
            samples: number of samples that have a margin.
            visits_per_epoch: samples drawn in an epoch.
            what: what they are.
        """
        if not isinstance(self.method, AdaptiveRadiusMethod):
            return []
        visits = (self.epochs - self.warmup_epochs) * visits_per_epoch / max(1, samples)
        met = f"{samples} {what}, each met about {visits:.1f} times in this run"
        visits = max(1.0, visits)  # a sample that is met at all is met once
        first, *warnings = self.method.outlook(visits, self.settings.eps)
        return [f"{met}: {first}", *warnings]

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, in plain types."""
        thresholds = self.thresholds
        return {
            "version": 1,
            "method": self.method.state_dict(),
            "settings": {key: str(value) for key, value in vars(self.settings).items()},
            "thresholds": dict(vars(thresholds)) if isinstance(thresholds, Thresholds) else None,
            "warmup_epochs": self.warmup_epochs,
            "steps": self.method.attack.steps if isinstance(self.method, AdversarialMethod) else None,
            "unlooked": None if self._check is None else self._check.steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Takes the state of an earlier run; the thresholds are those that the run was made with (:func:`saved`).

        Returns:
            Lines for the host's log, one if settings have changed.
        """
        self.warmup_epochs = int(state["warmup_epochs"])
        self.method.load_state_dict(state["method"])
        self._snapshot = None
        if self._check is not None and state.get("unlooked") is not None:
            self._check.steps = int(state["unlooked"])
        steps, wanted = state.get("steps"), self.settings.steps
        same = str(wanted) == state["settings"].get("steps")
        if same and steps is not None and wanted is not None and steps > wanted:  # raised in the earlier run
            self._set_steps(steps)
        saved = {field.name: str(field.default) for field in dataclasses.fields(self.settings)} | state["settings"]
        changed = {
            name: f"{name} {saved[name]} -> {value}"
            for name, value in vars(self.settings).items()
            if str(value) != saved[name]
        }
        kept = [changed.pop(name) for name in _KEPT if name in changed]
        lines = []
        if changed:
            lines.append(f"WARNING: settings changed since the checkpoint: {', '.join(changed.values())}")
        if kept:
            lines.append(
                f"WARNING: a run that goes on keeps the thresholds, their rule and the warm-up that it began with; not "
                f"taken over: {', '.join(kept)}"
            )
        return lines


def ingredients_of(summary: Mapping[str, Any]) -> str:
    """What a run had beside its method, by its summary: ", awp 0.005, ramp 0.8"; a summary of an earlier release has
    fewer of them."""
    return "".join(f", {name} {summary[name]}" for name in ("awp", "ramp", "decay", "margin_of") if summary.get(name))


def saved_thresholds(
    state: Mapping[str, Any], names: Sequence[str], running: Callable[[], RunningThresholds]
) -> Thresholds | RunningThresholds:
    """The thresholds of a state of :meth:`MethodRun.state_dict`, to make the resumed run with.

    Args:
        state: the saved state.
        names: the model's K loss terms.
        running: makes empty self-calibrated thresholds; :meth:`MethodRun.load_state_dict` fills them.

    Raises:
        ValueError: if the state is of a model with other loss terms.
    """
    if state["thresholds"] is None:
        return running()
    saved = Thresholds(**state["thresholds"])
    saved.require(names, "the thresholds in the checkpoint")
    return saved


def self_calibrated(
    names: Sequence[str], settings: TrainingSettings, samples_per_epoch: float, default_rule: str = DEFAULT_RULE
) -> RunningThresholds:
    """Self-calibrated thresholds that remember about an epoch, of which each process sees its part."""
    return RunningThresholds(names, settings.rule or default_rule, memory=samples_per_epoch / place()[1])


def load_thresholds(settings: TrainingSettings, path: str, names: Sequence[str]) -> tuple[Thresholds, str]:
    """Thresholds from a file, by the rule of the settings if they name one, and a remark for the log.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no thresholds file, of another model, or the rule cannot be applied to it.
    """
    origin = f"the thresholds in {path}"
    found = Thresholds.load(path)
    found.require(names, origin)
    taken = found.by_rule(settings.rule, origin)
    return taken, "" if taken is found else f", by the rule {taken.rule} of the settings instead of the file's"


def differing_notes(notes: Mapping[str, Any], run: Mapping[str, Any]) -> list[str]:
    """In what thresholds were measured on another thing than a run trains on: ``["imgsz 320 -> 640"]``.

    Args:
        notes: of the thresholds (:attr:`advmed.thresholds.Thresholds.notes`).
        run: what the run has, by the names of the notes, JSON-ready. A name that is in one of the two only says
            nothing: files of earlier releases have fewer notes.
    """
    then, now = (json.loads(json.dumps(dict(values))) for values in (notes, run))  # as in a file: tuples are lists
    return [f"{name} {then[name]} -> {now[name]}" for name in now if name in then and then[name] != now[name]]


def without_use(name: str, settings: TrainingSettings) -> list[str]:
    """A line for the host's log, before the training: what was set, and means nothing to the method.

    Args:
        name: of the method.
        settings: as they were given, before anything that was left open in them is chosen.
    """
    unused = settings.without_use(name)
    return [f"Set, and without any effect on {name}: {', '.join(unused)}"] if unused else []


def strength_check(method: Method, cost: float | None = None) -> StrengthCheck | None:
    """Looks at the strength of a method's attack, if that is to find the largest loss with few steps.

    Args:
        method: of the training.
        cost: of its steps, in standard ones; None: as the method has it.
    """
    if not isinstance(method, AdversarialMethod) or not method.maximises or method.attack.steps >= _MOST_STEPS:
        return None
    return StrengthCheck(method.cost if cost is None else cost, method.attack.norm, method.bounds, method.seed)


def fingerprint(ids: Iterable[str]) -> dict[str, Any]:
    """Tells one set of samples from another."""
    names = sorted(ids)
    return {"count": len(names), "sha256": hashlib.sha256("\n".join(names).encode()).hexdigest()}


def _warmup(
    method: Method, settings: TrainingSettings, thresholds: Thresholds | RunningThresholds | None, epochs: int
) -> int:
    if not isinstance(method, AdversarialMethod):
        return 0
    warmup = settings.warmup_epochs
    if warmup is None:
        warmup = max(1, epochs // 10) if isinstance(thresholds, RunningThresholds) else 0
    if warmup >= epochs:
        raise ValueError(
            f"warmup_epochs ({warmup}) leaves no adversarial epoch of {epochs}; lower it or raise 'epochs'"
        )
    if isinstance(thresholds, RunningThresholds) and warmup == 0:
        raise ValueError(
            f"{method.name} has no thresholds: 'warmup_epochs: 0' rules out self-calibration; name a thresholds file"
        )
    return warmup

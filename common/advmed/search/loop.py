"""The search: trials are trained, evaluated and recorded until none is left."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from advmed.files import write_whole
from advmed.progress import ProgressBar, write
from advmed.search.claim import Claim, Lost, Watch
from advmed.search.command import Interrupted, Stop, run_command
from advmed.search.curve import Curve, Incomparable, differences, read_curve, refuse, row, unlike
from advmed.search.plan import Plan, Setting, fill, newest
from advmed.search.trials import Trial, Trials

FOLDER_FILE = "study.json"
"""In the folder of a search: which study it belongs to."""
TRIAL_FILE = "trial.json"
"""In the folder of a trial: its setting, and how far it has come."""


class Search:
    """A search in this process; others may work at the same study."""

    def __init__(self, plan: Plan, study: Any, stop: Stop, say: Callable[[str], object] = write) -> None:
        self._plan, self._stop, self._say = plan, stop, say
        self._trials = Trials(plan, study)
        self._watch = Watch(plan.patience)

    def run(self, retry_failed: bool = False, stop_on_failure: bool = False) -> None:
        """Runs trials until none is left.

        Raises:
            Interrupted: if the user stops it; the trial can be taken up again.
            ValueError: if a report cannot be compared with those of the other trials.
        """
        if retry_failed:
            self._trials.retry_failed()
        total = self._trials.left()
        with ProgressBar(self._plan.study, total, "trials", say=self._say) as bar:
            while True:
                self._take_over()
                trial = self._trials.take()
                if trial is None and not self._wait():
                    return
                if trial is None:
                    continue
                failed = not self._run(trial)
                bar.update(max(0, total - self._trials.left() - bar.done))
                if failed and stop_on_failure:
                    return

    def _take_over(self) -> set[str]:
        """Leaves trials whose owner has died to whoever takes them up; returns what is known of the others."""
        verdicts = set()
        for trial in self._trials.all():
            if trial.state == "RUNNING":
                verdict = self._watch.verdict(trial.number, trial.attributes.get("life"))
                if verdict == "dead" and self._trials.abandon(trial) and trial.setting:
                    self._say(f"{trial.name}: its process has died, it is taken up again")
                verdicts.add(verdict)
        return verdicts

    def _wait(self) -> bool:
        """With nothing to do, waits for what trials of other machines are known to be; False if all is known."""
        said = False
        while True:
            verdicts = self._take_over()
            if "dead" in verdicts:
                return True
            if "unknown" not in verdicts:
                return False
            if not said:
                self._say(f"Waiting for a sign of life of other machines, at most {self._plan.patience:.0f} s")
                said = True
            self._stop.sleep(min(1.0, self._plan.patience / 20))

    def _run(self, trial: Trial) -> bool:
        """Runs a trial; False if it failed."""
        claim = None
        try:
            if self._stop.asked:
                raise Interrupted
            claim = self._trials.claim(trial, self._plan.folder_of(trial.setting))
            curve = self._measure(trial, claim)
            self._check_alike(trial, curve)
            value = curve.measure(self._plan.objective)
            self._trials.complete(trial, curve)
            self._say(f"{trial.name}: {curve.facts['metric']} {row([f'{v:.4g}' for v in curve.values])} "
                      f"({self._plan.objective} {value:.4g})")  # fmt: skip
        except Interrupted:
            self._trials.abandon(trial)
            raise
        except Lost as lost:
            self._say(f"{trial.name}: stopped, {lost}")
        except Incomparable as error:
            self._trials.fail(trial, str(error))
            raise
        except (OSError, ValueError, RuntimeError) as error:
            if claim is not None and claim.lost:
                self._say(f"{trial.name}: stopped, {claim.lost}")
                return True
            self._trials.fail(trial, str(error))
            self._say(f"{trial.name} failed: {error}")
            return False
        finally:
            if claim is not None:
                claim.close()
        return True

    def _measure(self, trial: Trial, claim: Claim) -> Curve:
        """Trains and evaluates, as far as an earlier process has not done it."""
        plan, folder = self._plan, self._plan.folder_of(trial.setting)
        known = plan.placeholders(trial.setting)
        environment = {name: fill(text, known) for name, text in plan.environment.items()}
        state = _read_state(folder, trial.setting)
        if not state.get("trained"):
            words: Sequence[str] = plan.train
            checkpoint = newest(plan, known)
            if state.get("started") and plan.resume and (plan.checkpoint is None or checkpoint):
                words, known = plan.resume, known | {"checkpoint": checkpoint or ""}
            for name, text in plan.files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                write_whole(folder / name, fill(text, known))
            self._say(f"{trial.name}: " + ("training goes on" if words is plan.resume else "training"))
            _write_state(folder, trial.setting, "started")
            filled = [fill(word, known) for word in words]
            run_command(filled, folder / "train.log", environment, claim, self._stop, "training")
            _write_state(folder, trial.setting, "trained")
        if plan.checkpoint is not None:
            checkpoint = newest(plan, known)
            if checkpoint is None:
                raise FileNotFoundError(
                    f"training left no file {fill(plan.checkpoint, known)}, see its log in {folder}"
                )
            known = known | {"checkpoint": checkpoint}
        self._say(f"{trial.name}: evaluation")
        filled = [fill(word, known) for word in plan.evaluate]
        run_command(filled, folder / "evaluate.log", environment, claim, self._stop, "evaluation")
        return read_curve(Path(fill(plan.report, known)), plan)

    def _check_alike(self, trial: Trial, curve: Curve) -> None:
        other = next((t for t in self._trials.all() if t.curve is not None and t.number != trial.number), None)
        if other is not None and other.curve is not None:
            differ = unlike(curve, other.curve)
            if differ:
                raise Incomparable(
                    f"the report of {trial.name} cannot be compared with that of {other.name}: {differ}. Evaluate all "
                    f"trials alike; this one can be repeated with --retry-failed"
                )


def _read_state(folder: Path, setting: Setting) -> dict[str, Any]:
    path = folder / TRIAL_FILE
    if not path.is_file():
        return {}
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if state["setting"] == dict(setting):
            return state
        reason = f"is of the setting {state['setting']}"
    except (ValueError, KeyError, TypeError):
        reason = "is damaged"
    raise ValueError(f"{path} {reason}: move the folder away")


def _write_state(folder: Path, setting: Setting, reached: str) -> None:
    state = {"setting": dict(setting), **_read_state(folder, setting), reached: True}
    write_whole(folder / TRIAL_FILE, json.dumps(state))


def claim_folder(plan: Plan) -> None:
    """Makes the folder of a search, or checks whose it is.

    Raises:
        ValueError: if it belongs to another study, or to another version of the study file.
    """
    path = plan.folder / FOLDER_FILE
    plan.folder.mkdir(parents=True, exist_ok=True)
    ours = {"study": plan.study, **plan.definition}
    if not path.exists():
        write_whole(path, json.dumps(ours, indent=1))
        return
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
        name = theirs["study"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: take another folder") from error
    if name != plan.study:
        raise ValueError(f"the folder {plan.folder} belongs to the study {name!r}: take another folder")
    refuse(differences(ours, theirs), f"the folder {plan.folder}")

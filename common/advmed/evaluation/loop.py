"""The evaluation loop: every batch clean, then under every attack at every noise level, scored by the host.

The loop knows no task. A host gives batches, each with an objective to attack and a ``score`` that turns images into
the per-sample ingredients of its metric (Dice: TP, FP, FN), and computes the metric afterwards from the
:class:`Evaluation`. Every finished batch is one file, so a killed run goes on where it was and ends with the same
numbers: random starts depend on (seed, attack, level, batch number) and on nothing that ran before. A file says what it
was made of (settings, versions, the code of the attacks, hashes of images and targets), and counts for nothing else.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import advmed
from advmed.attacks import Attack, AttackResult, Standard
from advmed.attacks.problem import check_scale, total
from advmed.attacks.standard import Judge
from advmed.distributed import Processes
from advmed.evaluation.auc import check_levels
from advmed.evaluation.metric import Metric, Scores
from advmed.evaluation.worst import WorstOf, badness, curve_of, select, worst_of
from advmed.files import replacing
from advmed.norms import norm
from advmed.objective import Objective, check_terms, inspecting
from advmed.progress import ProgressBar

logger = logging.getLogger(__name__)

FORMAT = "advmed.evaluation/2"
ALONE = Processes()
_CLEAN = ("clean", 0.0)
EARLIER = "finished earlier"
"""What progress calls a batch that an earlier run has finished."""

Progress = Callable[[int, int, str], None]
"""Called with (passes done, passes in total, what was just done); a pass is a batch at one attack and level."""


@dataclass(frozen=True)
class LoadedBatch:
    """A batch on its device, ready to be attacked.

    Attributes:
        images: as the network receives them, floating point, shape (B, C, *spatial).
        objective: images -> loss terms (B, K), closed over the model and the targets of this batch.
        score: images -> the ingredients of the metric, a dict of tensors whose first dimension is B and whose other
            dimensions are the same in every batch. Called without gradients.
        targets: what objective and score are closed over beside the model: labels, boxes, landmarks. A resumed
            evaluation compares them, and the images, with those that its finished batches were measured on.
        judged: as ``score``, what the criterion needs alone, where that costs less: an ensemble asks for it often.

    Example:
        >>> import torch
        >>> from advmed import LoadedBatch
        >>> objective = lambda images: images.flatten(1).sum(1, keepdim=True)
        >>> batch = LoadedBatch(torch.ones(2, 1, 2, 2), objective, lambda images: {"mean": images.mean((1, 2, 3))})
        >>> batch.score(batch.images)["mean"]
        tensor([1., 1.])
    """

    images: Tensor
    objective: Objective
    score: Callable[[Tensor], Mapping[str, Tensor]]
    targets: Sequence[Tensor] = ()
    judged: Callable[[Tensor], Mapping[str, Tensor]] | None = None


@dataclass(frozen=True)
class EvaluationBatch:
    """A batch that is loaded when it is its turn: its sample ids, and a function that loads it.

    Attributes:
        ids: B sample ids, unique in the whole evaluation.
        load: makes the :class:`LoadedBatch`.

    Example:
        >>> import torch
        >>> from advmed import EvaluationBatch, LoadedBatch
        >>> objective = lambda images: images.flatten(1).sum(1, keepdim=True)
        >>> score = lambda images: {"mean": images.mean((1, 2, 3))}
        >>> batch = EvaluationBatch(["a", "b"], load=lambda: LoadedBatch(torch.ones(2, 1, 2, 2), objective, score))
        >>> batch.load().images.shape
        torch.Size([2, 1, 2, 2])
    """

    ids: Sequence[str]
    load: Callable[[], LoadedBatch]


@dataclass(frozen=True)
class Condition:
    """The samples under one attack at one level.

    Attributes:
        norm: achieved norm of the noise, (N,).
        loss: loss summed over the K terms, (N,).
        nonfinite: attack steps lost to a non-finite gradient, (N,), int64.
        scores: the ingredients of the metric, each of shape (N, ...).
        seconds: time of the attack on all N samples, without loading and scoring; clean: of one forward pass.
        device: on which it was measured, such as "cpu"; the devices, where different batches were on different ones.
    """

    norm: NDArray[Any]
    loss: NDArray[Any]
    nonfinite: NDArray[Any]
    scores: Scores
    seconds: float
    device: str = ""


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` measured; samples are in the order of the batches.

    Attributes:
        configuration: everything the numbers depend on, JSON-ready: format, attacks, levels, seed, bounds, fingerprint,
            versions of packages and a hash of the attacks' code.
        attacks: the attacks by name.
        levels: the noise levels, 0 first.
        ids: the N sample ids.
        clean: the samples as they are.
        attacked: the samples under (attack name, level > 0); of an ensemble each sample under the member that is the
            worst for it by the criterion.
        members: the samples under (ensemble/member, level > 0), for every ensemble.
        criterion: the metric that says what is the worst for a sample; None: the loss.

    Example:
        >>> import torch
        >>> from advmed import EvaluationBatch, LoadedBatch, evaluate, parse_attacks
        >>> objective = lambda images: images.flatten(1).sum(1, keepdim=True)
        >>> batch = LoadedBatch(torch.zeros(2, 1, 2, 2), objective, lambda images: {"sum": objective(images)[:, 0]})
        >>> found = evaluate([EvaluationBatch(["a", "b"], lambda: batch)], parse_attacks(["ifgsm10"]), [0, 1])
        >>> found.ids, found.at("ifgsm10", 1).loss.round(3).tolist()
        (('a', 'b'), [2.0, 2.0])
    """

    configuration: Mapping[str, Any]
    attacks: Mapping[str, Attack]
    levels: tuple[float, ...]
    ids: tuple[str, ...]
    clean: Condition
    attacked: Mapping[tuple[str, float], Condition]
    members: Mapping[tuple[str, float], Condition] = field(default_factory=dict)
    criterion: Metric | None = None
    _worst: dict[tuple[str, str], list[dict[str, NDArray[Any]]]] = field(default_factory=dict, repr=False)

    def at(self, attack: str, level: float) -> Condition:
        """The samples under ``attack`` at ``level``; level 0 is the clean samples, for every attack.

        Raises:
            KeyError: for an attack or level that was not evaluated.
        """
        if (attack, level) in self.members:
            return self.members[attack, level]
        known = attack in self.attacks or any(attack == member for member, _ in self.members)
        if not known or level not in self.levels:
            raise KeyError(
                f"{attack} at level {level:g} was not evaluated; there are the attacks {', '.join(self.attacks)} "
                f"at the levels {' '.join(f'{level:g}' for level in self.levels)}"
            )
        return self.clean if level == 0 else self.attacked[attack, level]

    def scores(self, attack: str, level: float, metric: Metric | None = None) -> Scores:
        """The ingredients of the metric under ``attack`` at ``level``, by name, each of shape (N, ...).

        Args:
            attack: its name.
            level: noise level.
            metric: for an ensemble: whose worst is meant (:mod:`advmed.evaluation.worst`); None: the criterion's.
        """
        members = self.members_of(attack)
        if metric is None or level == 0 or not members:
            return self.at(attack, level).scores
        if (attack, metric.name) not in self._worst:
            found = [
                {name: (self.at(name, at).scores, self.at(name, at).loss) for name in members} for at in self.levels[1:]
            ]
            clean = self.clean.scores, self.clean.loss
            self._worst[attack, metric.name] = curve_of(metric, clean, found, self.criterion)
        return self._worst[attack, metric.name][self.levels.index(level) - 1]

    def members_of(self, attack: str) -> tuple[str, ...]:
        """What an ensemble is the worst of, by names that :meth:`at` knows; nothing for an attack by itself."""
        return _members(attack, self.attacks)

    def curve(self, attack: str, metric: Callable[[Scores], float] | Metric) -> tuple[float, ...]:
        """A metric under ``attack`` at every one of ``levels``."""
        if isinstance(metric, Metric):
            return tuple(float(metric.of(self.scores(attack, level, metric))) for level in self.levels)
        return tuple(float(metric(self.scores(attack, level))) for level in self.levels)


def evaluate(
    batches: Sequence[EvaluationBatch],
    attacks: Mapping[str, Attack],
    levels: Sequence[float],
    *,
    bounds: tuple[float, float] | None = None,
    seed: int = 0,
    folder: Path | None = None,
    fingerprint: str = "",
    packages: Sequence[str] = (),
    progress: Progress | None = None,
    processes: Processes = ALONE,
    criterion: Metric | None = None,
) -> Evaluation:
    """Measures every batch clean and under every attack at every level.

    One batch at a time is loaded; of it only per-sample numbers are kept. With a ``folder`` each finished batch is
    written to ``folder/parts`` at once, and batches found there are not computed again, if they hold the images and
    targets that they held then. Resumed or not, the scores are the same bit for bit on the same machine; seconds are
    those of the run that measured them.

    Args:
        batches: the batches, in a fixed order.
        attacks: attacks by name, see :func:`advmed.parse_attacks`.
        levels: noise levels, 0 first: radii in the attack's norm over a sample's whole input.
        bounds: lowest and highest value of an input, None for none.
        seed: of the random starts.
        folder: where finished batches are kept, None for nowhere.
        fingerprint: what else the numbers depend on, such as the hash of the model file; required with a folder, so
            that a resumed run cannot mix the numbers of two models.
        packages: distributions whose versions the numbers depend on, beside ours and PyTorch.
        progress: called after every pass of this process, and for each batch that an earlier run has finished.
        processes: the processes that share the work; more than one need a folder.
        criterion: the metric of single samples that an ensemble is judged by; None: the loss.

    Raises:
        ValueError: for levels, ids, images, terms or scores that are not as described, or a folder that holds the
            numbers of another configuration, other images or other targets; nothing is written in these last cases.

    Example:
        >>> import torch
        >>> from advmed import EvaluationBatch, LoadedBatch, evaluate, parse_attacks
        >>> objective = lambda images: images.flatten(1).sum(1, keepdim=True)
        >>> batch = LoadedBatch(torch.zeros(2, 1, 2, 2), objective, lambda images: {"sum": objective(images)[:, 0]})
        >>> found = evaluate([EvaluationBatch(["a", "b"], lambda: batch)], parse_attacks(["ifgsm10"]), [0, 1, 2])
        >>> [round(value, 3) for value in found.curve("ifgsm10", lambda scores: scores["sum"].mean())]
        [0.0, 2.0, 4.0]
    """
    levels = check_levels(levels)
    if not attacks:
        raise ValueError("evaluate needs one or more attacks, got none")
    _check_ids(batches)
    configuration = describe(attacks, levels, bounds=bounds, seed=seed, fingerprint=fingerprint, packages=packages)
    if criterion is not None and any(isinstance(attack, Standard) for attack in attacks.values()):
        configuration["criterion"] = {"name": criterion.name, "fails_at": criterion.fails_at}
    passes = passes_of(attacks, levels)
    finished: dict[int, list[Condition]] = {}
    if folder is not None:
        if not fingerprint:
            raise ValueError("a folder needs a fingerprint, such as the hash of the model file that is evaluated")
        parts = folder / "parts"
        parts.mkdir(parents=True, exist_ok=True)
        # All files are looked at before the first is written: a folder of another configuration stays untouched.
        for number, batch in enumerate(batches):
            part = _read_part(_part(parts, number), _for_batch(configuration, number, batch), passes)
            if part is not None:
                finished[number] = part
    elif processes.size > 1:
        raise ValueError("several processes need a folder, through which they share what they have measured")
    mine = range(processes.rank, len(batches), processes.size)
    done = 0

    def report(text: str, passed: int = 1) -> None:
        nonlocal done
        done += passed
        if progress is not None:
            progress(done, len(mine) * len(passes), text)

    for number in sorted(finished.keys() & mine):
        _check_content(_part(parts, number), batches[number])
        report(EARLIER, len(passes))
    processes.wait()  # all have read what was there before the first writes
    for number in mine:
        if number in finished:
            continue
        batch = batches[number]
        loaded = batch.load()
        finished[number] = _measure(number, batch.ids, loaded, attacks, levels, bounds, seed, criterion, report)
        if folder is not None:
            whole = _for_batch(configuration, number, batch)
            _write_part(_part(parts, number), whole, content(loaded), passes, finished[number])
        del loaded  # before the next one is loaded
    processes.wait()
    for number, batch in enumerate(batches):
        if number not in finished:
            finished[number] = _theirs(_part(parts, number), _for_batch(configuration, number, batch), passes)

    joined = {key: _join([finished[number][k] for number in range(len(batches))]) for k, key in enumerate(passes)}
    clean = joined.pop(_CLEAN)
    attacked: dict[tuple[str, float], Condition] = {}
    for name in attacks:
        members = _members(name, attacks)
        worst = clean
        for level in levels[1:]:
            worst = _worst(criterion, worst, [joined[m, level] for m in members]) if members else joined[name, level]
            attacked[name, level] = worst
    return Evaluation(
        configuration=configuration,
        attacks=dict(attacks),
        levels=levels,
        ids=tuple(id_ for batch in batches for id_ in batch.ids),
        clean=clean,
        attacked=attacked,
        members={key: condition for key, condition in joined.items() if key not in attacked},
        criterion=criterion,
    )


def passes_of(attacks: Mapping[str, Attack], levels: Sequence[float]) -> list[tuple[str, float]]:
    """What is measured of a batch, in this order: clean, then every attack, or member of one, at every level."""
    found = [_CLEAN]
    for name, attack in attacks.items():
        members = [name] if _single(attack) else _own(name, attack)
        found += [(member, level) for level in levels[1:] for member in members]
    return found


def _single(attack: Attack) -> bool:
    return not isinstance(attack, Standard | WorstOf)


def _own(name: str, attack: Attack) -> list[str]:
    """The members that an ensemble runs itself."""
    return [f"{name}/{member}" for member in attack.members] if isinstance(attack, Standard) else []


def _members(name: str, attacks: Mapping[str, Attack]) -> tuple[str, ...]:
    """What a row is the worst of, with the members of ensembles in their places; nothing for an attack by itself."""
    attack = attacks.get(name)
    if not isinstance(attack, WorstOf):
        return () if attack is None else tuple(_own(name, attack))
    return tuple(m for other in attack.attacks for m in (_members(other, attacks) or (other,)))


def _worst(criterion: Metric | None, before: Condition, members: Sequence[Condition]) -> Condition:
    """Each sample under whichever member is the worst for it, or as it was with less noise, where that is worse."""
    candidates = [before, *members]
    chosen = worst_of(
        criterion if criterion is not None and criterion.per_sample is not None else None,
        [(c.scores, c.loss) for c in candidates],
    )
    return Condition(
        norm=select([c.norm for c in candidates], chosen),
        loss=select([c.loss for c in candidates], chosen),
        nonfinite=np.sum([c.nonfinite for c in members], 0),
        scores={name: select([c.scores[name] for c in candidates], chosen) for name in before.scores},
        seconds=sum(c.seconds for c in members),
        device=", ".join(dict.fromkeys(c.device for c in members)),
    )


def describe(
    attacks: Mapping[str, Attack],
    levels: Sequence[float],
    *,
    bounds: tuple[float, float] | None = None,
    seed: int = 0,
    fingerprint: str = "",
    packages: Sequence[str] = (),
) -> dict[str, Any]:
    """The configuration of :func:`evaluate` called with these arguments, JSON-ready."""
    plain: dict[str, Any] = json.loads(
        json.dumps(
            {
                "format": FORMAT,
                "attacks": {name: _settings(attack) for name, attack in attacks.items()},
                "levels": check_levels(levels),
                "seed": seed,
                "bounds": bounds,
                "fingerprint": fingerprint,
                "versions": {
                    "advmed": advmed.__version__,
                    "torch": str(torch.__version__),
                    **{name: version(name) for name in packages},
                },
                "attack_code": _code(),
            }
        )
    )
    return plain


def evaluate_with_bar(
    name: str,
    batches: Sequence[EvaluationBatch],
    attacks: Mapping[str, Attack],
    levels: Sequence[float],
    *,
    folder: Path,
    overwrite: bool = False,
    processes: Processes = ALONE,
    bounds: tuple[float, float] | None = None,
    seed: int = 0,
    fingerprint: str = "",
    packages: Sequence[str] = (),
    criterion: Metric | None = None,
) -> Evaluation:
    """:func:`evaluate` as a command runs it: with a progress bar, and the finished batches in ``folder/name``.

    Args:
        name: of the model.
        batches: as in :func:`evaluate`, like all other arguments.
        attacks: attacks by name.
        levels: noise levels, 0 first.
        folder: of the report.
        overwrite: forget the batches that an earlier run has finished.
        processes: the processes that share the work; only the first shows a bar.
        bounds: as in :func:`evaluate`, like what follows.
        seed: of the random starts.
        fingerprint: what the numbers depend on.
        packages: distributions whose versions they depend on.
        criterion: the metric that attacks are compared by.
    """
    if overwrite and processes.rank == 0:
        shutil.rmtree(folder / name / "parts", ignore_errors=True)
    processes.wait()
    passes = len(range(processes.rank, len(batches), processes.size)) * len(passes_of(attacks, levels))
    with ProgressBar(name, passes, "passes", shown=processes.rank == 0) as bar:

        def progress(done: int, total: int, text: str) -> None:
            bar.update(done - bar.done, text, earlier=text == EARLIER)

        return evaluate(
            batches,
            attacks,
            levels,
            folder=folder / name,
            progress=progress,
            processes=processes,
            bounds=bounds,
            seed=seed,
            fingerprint=fingerprint,
            packages=packages,
            criterion=criterion,
        )


def attack_batch(
    batch: LoadedBatch,
    attacks: Mapping[str, Attack],
    name: str,
    level: float,
    *,
    number: int,
    bounds: tuple[float, float] | None = None,
    seed: int = 0,
) -> AttackResult:
    """Attacks batch ``number`` exactly as :func:`evaluate` does, for example to draw pictures of it afterwards."""
    generator = _generator(name, level, number, seed)
    return attacks[name](batch.objective, batch.images, level, bounds=bounds, generator=generator)


def _generator(name: str, level: float, number: int, seed: int) -> torch.Generator:
    """The randomness of an attack on a batch; on the CPU, whose noise is the same on every machine."""
    key = f"{seed}/{name}/{float(level)}/{number}".encode()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:8], "big", signed=True))


def at_levels(
    batch: LoadedBatch,
    attack: Attack,
    levels: Sequence[float],
    *,
    bounds: tuple[float, float] | None = None,
    seed: int = 0,
) -> Iterator[tuple[float, Tensor]]:
    """The images of a batch clean and attacked, for pictures: an attack of their own, not the noise of the evaluation.

    Args:
        batch: the batch.
        attack: the attack.
        levels: noise levels > 0.
        bounds: lowest and highest value of an input, None for none.
        seed: of the random starts.

    Yields:
        Level and images, 0 and the clean ones first.
    """
    generator = torch.Generator().manual_seed(seed)
    yield 0.0, batch.images
    for level in levels:
        yield level, attack(batch.objective, batch.images, level, bounds=bounds, generator=generator).images


def _measure(
    number: int,
    ids: Sequence[str],
    loaded: LoadedBatch,
    attacks: Mapping[str, Attack],
    levels: Sequence[float],
    bounds: tuple[float, float] | None,
    seed: int,
    criterion: Metric | None,
    report: Callable[[str], None],
) -> list[Condition]:
    """All passes over one batch, in the order of :func:`passes_of`."""
    _check_images(loaded.images, ids)
    check_scale(loaded.images, bounds)
    conditions, device = [], device_name(loaded.images.device)
    start = time.perf_counter()

    def keep(result: AttackResult, name: str, level: float) -> None:
        nonlocal start
        assert result.terms is not None  # an attack leaves them out only when told to
        loss = _array(total(result.terms))  # waits for the device: the attack has really ended
        seconds = time.perf_counter() - start
        with inspecting(loaded.objective):
            scores = _check_scores(loaded.score(result.images), ids)
        noise = _array(result.norms), loss, _array(result.nonfinite)
        conditions.append(Condition(*noise, scores, seconds, device))
        report(f"{name} at {level:g}")
        start = time.perf_counter()

    keep(_not_attacked(loaded), *_CLEAN)
    for name, attack in attacks.items():
        if isinstance(attack, Standard):
            for member, level, result in _search(loaded, attack, name, levels, number, bounds, seed, criterion):
                keep(result, f"{name}/{member}", level)
        elif _single(attack):
            for level in levels[1:]:
                result = attack_batch(loaded, attacks, name, level, number=number, bounds=bounds, seed=seed)
                keep(result, name, level)
    return conditions


def _search(
    loaded: LoadedBatch,
    attack: Standard,
    name: str,
    levels: Sequence[float],
    number: int,
    bounds: tuple[float, float] | None,
    seed: int,
    criterion: Metric | None,
) -> Iterator[tuple[str, float, AttackResult]]:
    """What the members of an ensemble find, level by level."""
    found = attack.search(
        loaded.objective,
        loaded.images,
        levels[1:],
        judge=_judge(loaded, criterion),
        generator=lambda member, level: _generator(f"{name}/{member}", level, number, seed),
        bounds=bounds,
    )
    for member, level, images, terms, nonfinite in found:
        noise = images.to(torch.promote_types(images.dtype, torch.float32)) - loaded.images
        yield member, level, AttackResult(images, terms, norm(noise, attack.norm), None, nonfinite)


def _judge(loaded: LoadedBatch, criterion: Metric | None) -> Judge:
    """How bad images are by the metric of single samples; without one by the loss alone."""
    if criterion is None or criterion.per_sample is None:
        return Judge(lambda images: torch.zeros(len(images), device=images.device))
    sign = -1.0 if criterion.higher_is_better else 1.0

    def value(images: Tensor) -> Tensor:
        with inspecting(loaded.objective):
            scores = {key: _array(score) for key, score in (loaded.judged or loaded.score)(images).items()}
        bad = torch.from_numpy(badness(criterion, scores))
        return (bad.float() if images.device.type == "mps" else bad).to(images.device)  # which has no float64

    limit, lost = criterion.fails_at, criterion.lost_at
    return Judge(value, None if limit is None else sign * limit, float("inf") if lost is None else sign * lost)


def device_name(device: torch.device) -> str:
    """What a reader calls it: the name of the card, or the kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _not_attacked(batch: LoadedBatch) -> AttackResult:
    with inspecting(batch.objective):
        terms = check_terms(batch.objective(batch.images), batch.images)
    zeros = torch.zeros(len(batch.images))
    return AttackResult(batch.images, terms, norms=zeros, crossing=None, nonfinite=zeros.long())


def _array(tensor: Tensor) -> NDArray[Any]:
    tensor = tensor.detach().cpu()
    tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor  # NumPy has no bfloat16
    return tensor.numpy().copy()  # a host may use the memory again


def _settings(attack: Attack) -> dict[str, Any]:
    """The attack's settings for JSON, which has no infinity."""
    settings = asdict(cast(Any, attack))
    if isinstance(attack, Standard):
        members = {name: _settings(cast(Any, member)) for name, member in attack.members.items()}
        return {"recipe": attack.recipe, "members": members, "norm": _norm(attack.norm)}
    loss: Any = getattr(attack, "loss", None)
    settings.pop("loss", None)
    if loss is not None:
        settings["loss"] = {"name": loss.name, **asdict(loss)}
    return {**settings, "norm": _norm(attack.norm)}


def _norm(p: float) -> float | str:
    return "inf" if p == float("inf") else p


def _check_ids(batches: Sequence[EvaluationBatch]) -> None:
    counts = Counter(id_ for batch in batches for id_ in batch.ids)
    if not batches or any(len(batch.ids) == 0 for batch in batches):
        raise ValueError(f"evaluate needs one or more batches of one or more samples, got {len(batches)} batches")
    twice = [id_ for id_, count in counts.items() if count > 1]
    if twice:
        raise ValueError(f"sample ids must be unique, got {_listed(twice)} more than once")


def _check_images(images: Tensor, ids: Sequence[str]) -> None:
    if images.ndim < 2 or len(images) != len(ids) or not images.is_floating_point():
        raise ValueError(
            f"images must be floating point of shape (B, C, *spatial) with B = {len(ids)} as there are ids, "
            f"got {images.dtype} of shape {tuple(images.shape)}"
        )
    broken = (~images.isfinite()).flatten(1).any(1).tolist()
    if any(broken):
        names = [id_ for id_, bad in zip(ids, broken, strict=True) if bad]
        raise ValueError(f"images hold NaN or infinite values, check the preprocessing of {_listed(names)}")


def _check_scores(scores: Mapping[str, Tensor], ids: Sequence[str]) -> dict[str, NDArray[Any]]:
    shapes = {name: tuple(value.shape) for name, value in scores.items()}
    if not shapes or any(shape[:1] != (len(ids),) for shape in shapes.values()):
        raise ValueError(f"score must return tensors whose first dimension is B = {len(ids)}, got shapes {shapes}")
    return {name: _array(value) for name, value in scores.items()}


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _join(parts: Sequence[Condition]) -> Condition:
    """One condition of all batches."""
    names = list(parts[0].scores)
    if any(list(part.scores) != names for part in parts):
        raise ValueError(f"score must return the same names for every batch, got {[list(p.scores) for p in parts]}")
    for name in names:
        shapes = {part.scores[name].shape[1:] for part in parts}
        if len(shapes) > 1:
            raise ValueError(f"score {name!r} must have the same shape (B, ...) in every batch, got {shapes}; pad it")
    return Condition(
        norm=np.concatenate([part.norm for part in parts]),
        loss=np.concatenate([part.loss for part in parts]),
        nonfinite=np.concatenate([part.nonfinite for part in parts]),
        scores={name: np.concatenate([part.scores[name] for part in parts]) for name in names},
        seconds=sum(part.seconds for part in parts),
        device=", ".join(dict.fromkeys(part.device for part in parts)),
    )


def content(batch: LoadedBatch) -> dict[str, str]:
    """Tells images, and targets, from others: SHA-256 of their values, shapes and types."""
    return {"images": _hash([batch.images]), "targets": _hash(batch.targets)}


def _hash(tensors: Sequence[Tensor]) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


@cache
def _code() -> str:
    """Tells the code that attacks from an earlier one of the same version: a hash of its source, 12 hex digits."""
    folder = Path(__file__).parents[1]
    files = [*sorted((folder / "attacks").glob("*.py")), folder / "norms.py", folder / "guard.py"]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


# Parts: one .npz file per batch, with its whole configuration in it. Arrays are named <attack>@<level>/<quantity>.


def _part(folder: Path, number: int) -> Path:
    return folder / f"batch_{number:05d}.npz"


def _for_batch(configuration: Mapping[str, Any], number: int, batch: EvaluationBatch) -> dict[str, Any]:
    return {**configuration, "batch": number, "ids": list(batch.ids)}


def _write_part(
    path: Path,
    configuration: Mapping[str, Any],
    measured_on: Mapping[str, str],
    passes: Sequence[tuple[str, float]],
    conditions: Sequence[Condition],
) -> None:
    """Writes a finished batch, or nothing: a kill in the middle leaves no half file under the final name."""
    arrays: dict[str, Any] = {
        "configuration": np.array(json.dumps(configuration)),
        "content": np.array(json.dumps(measured_on)),
    }
    for (name, level), condition in zip(passes, conditions, strict=True):
        for quantity in ("norm", "loss", "nonfinite", "seconds", "device"):
            arrays[f"{name}@{level}/{quantity}"] = getattr(condition, quantity)
        for score, value in condition.scores.items():
            arrays[f"{name}@{level}/score/{score}"] = value
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)


def _read_part(
    path: Path, configuration: Mapping[str, Any], passes: Sequence[tuple[str, float]]
) -> list[Condition] | None:
    """Reads a finished batch; None if there is none, or its file is damaged.

    Raises:
        ValueError: if it was made with another configuration.
    """
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        found: dict[str, Any] = json.loads(str(arrays["configuration"]))
        json.loads(str(arrays["content"]))
    except Exception as error:  # a damaged archive makes its readers raise almost anything
        logger.warning("%s is damaged (%s: %s); its batch is measured again", path, type(error).__name__, error)
        return None
    if found != configuration:
        raise ValueError(
            f"{path} was measured with another configuration: {'; '.join(_differences(found, configuration))}. "
            "Choose another folder, or delete this one to start anew"
        )
    return [_condition(arrays, f"{name}@{level}/") for name, level in passes]


def _check_content(path: Path, batch: EvaluationBatch) -> None:
    """Raises ValueError if a finished batch, which has been read, was measured on other images or targets."""
    with np.load(path, allow_pickle=False) as archive:
        then: dict[str, str] = json.loads(str(archive["content"]))
    now = content(batch.load())
    if differ := [name for name in now if now[name] != then.get(name)]:
        raise ValueError(
            f"{path} was measured on other {' and '.join(differ)} than those of {_listed(batch.ids)} now: the data "
            f"have changed since. Choose another folder, or delete this one to start anew"
        )


def _theirs(path: Path, configuration: Mapping[str, Any], passes: Sequence[tuple[str, float]]) -> list[Condition]:
    """Reads what another process has measured."""
    part = _read_part(path, configuration, passes)
    if part is None:
        raise RuntimeError(f"{path}, which another process was to write, is not there: do they share the folder?")
    return part


def _condition(arrays: Mapping[str, NDArray[Any]], prefix: str) -> Condition:
    norm, loss, nonfinite, seconds, device = (
        arrays[prefix + name] for name in ("norm", "loss", "nonfinite", "seconds", "device")
    )
    start = prefix + "score/"
    scores = {name.removeprefix(start): value for name, value in arrays.items() if name.startswith(start)}
    return Condition(norm, loss, nonfinite, scores, float(seconds), str(device))


def _differences(then: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Each difference of two configurations in words; inside of what both have as a mapping, by its name there."""
    for name in now:
        old, new = (_unpacked(values.get(name)) for values in (then, now))
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differences(old, {**dict.fromkeys(old), **new}, f"{prefix}{name} ")
        elif old != new:
            yield f"{prefix}{name} {_short(old)}, now {_short(new)}"


def _unpacked(value: Any) -> Any:
    """A fingerprint is JSON as a string, where a command made it."""
    try:
        return json.loads(value) if isinstance(value, str) and value.startswith("{") else value
    except ValueError:
        return value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:97] + "..."

"""A look at every preprocessed case before training: what would spoil it, or end it after hours.

Cases are shared among the processes of a training. What was found in a case is remembered beside the preprocessed data,
and holds as long as the case's files stay as they are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from advmed.copies import Sample, digest, warnings_of_copies
from advmed.distributed import from_first_rank, gathered, place
from advmed.files import remember, remembered
from advmed.progress import watched

OUTSIDE = -1
"""The host's mark for voxels that its preprocessing found outside of the body."""


@dataclass(frozen=True)
class Found:
    """What a preprocessed case holds.

    Attributes:
        files: name, size and time of change of each of its files.
        finite: whether all values of the image are.
        labels: the values of the segmentation.
        shapes: of image and segmentation, without channels.
        image: a digest of the image.
        truth: a digest of the segmentation.
    """

    files: list[list[Any]]
    finite: bool
    labels: list[int]
    shapes: list[list[int]]
    image: str
    truth: str


def undeclared(labels: Iterable[int], label_manager: Any) -> list[int]:
    """Those that a data set does not declare; the ignore label and the mark of preprocessing are known."""
    declared = {0, OUTSIDE, *map(int, label_manager.all_labels)}
    if label_manager.ignore_label is not None:
        declared.add(int(label_manager.ignore_label))
    return sorted(set(labels) - declared)


def declaration(label_manager: Any) -> str:
    """The labels of a data set, as a message names them."""
    ignore = "" if label_manager.ignore_label is None else f", ignore {label_manager.ignore_label}"
    return ", ".join(str(int(label)) for label in label_manager.all_labels) + ignore


def check_cases(
    datasets: Sequence[Any], label_manager: Any, folder: Path, memory: Sequence[Path], say: Callable[[str], object]
) -> None:
    """Reads every case of a training that has not been looked at yet, and stops at what cannot be trained on.

    Args:
        datasets: the host's, for training and validation; their ``load_case`` reads.
        label_manager: the host's.
        folder: with the preprocessed cases.
        memory: where to remember what was found: the first of these files that can be written.
        say: takes a line for the log.

    Raises:
        FileNotFoundError: for a case that is not there.
        ValueError: for images that are not finite, labels that are not declared, or segmentations of another shape.
    """
    cases = {case: dataset for dataset in datasets for case in dataset.identifiers}  # with fold "all" in both
    states = _states(folder, cases)
    missing = [case for case in cases if not states[case]]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} case(s) of splits_final.json are not in {folder}: {', '.join(missing[:10])}. Preprocess "
            f"them (nnUNetv2_preprocess), or take them out of splits_final.json."
        )
    known = from_first_rank({case: found for case, found in _known(memory).items() if case in cases})
    known = {case: found for case, found in known.items() if found.files == states[case]}
    rest = [case for case in cases if case not in known]
    if rest:
        say(f"Data check: {len(rest)} of {len(cases)} case(s) are read, for the first time in this state")
        rank, size = place()
        read = _read({case: cases[case] for case in rest[rank::size]}, states, say)
        fresh = {case: found for part in gathered(read) for case, found in part.items()}
        if rank == 0:
            remember(_plain({**_known(memory), **known, **fresh}), memory)
        known |= fresh
    _judge({case: known[case] for case in cases}, label_manager, say)
    training, validation = (list(dataset.identifiers) for dataset in datasets)
    if set(training) == set(validation):  # fold "all"
        validation = []
    splits = [(case, "train") for case in training] + [(case, "val") for case in validation]
    samples = [Sample(split, case, known[case].image, known[case].truth) for case, split in splits]
    for line in warnings_of_copies(samples):
        say(f"WARNING: {line}")


def _judge(found: Mapping[str, Found], label_manager: Any, say: Callable[[str], object]) -> None:
    again = "and preprocess them again (nnUNetv2_plan_and_preprocess), or take the cases out of splits_final.json."
    broken = [case for case, content in found.items() if not content.finite]
    if broken:
        raise ValueError(
            f"{len(broken)} preprocessed case(s) hold NaN or infinite values: {_some(broken)}. Mend the raw images "
            f"{again}"
        )
    apart = [case for case, content in found.items() if content.shapes[0] != content.shapes[1]]
    if apart:
        image, label = found[apart[0]].shapes
        raise ValueError(
            f"{len(apart)} preprocessed case(s) have a segmentation of another shape than the image: {_some(apart)} "
            f"({label} for {image}). Mend the raw files {again}"
        )
    strange = {case: extra for case, content in found.items() if (extra := undeclared(content.labels, label_manager))}
    if strange:
        some = [f"{case} ({', '.join(map(str, labels))})" for case, labels in strange.items()]
        raise ValueError(
            f"{len(strange)} preprocessed case(s) hold labels that dataset.json does not declare: {_some(some)}. "
            f"Declared are {declaration(label_manager)}. Declare them, or mend the labels {again}"
        )
    ignored = {0, OUTSIDE, label_manager.ignore_label}
    empty = [case for case, content in found.items() if not set(content.labels) - ignored]
    if empty:
        say(
            f"{len(empty)} case(s) have no foreground: {_some(empty)}. They are trained on as the stock trainer does; "
            f"check their labels if this is not meant."
        )


def _some(cases: Sequence[str]) -> str:
    return ", ".join(cases[:10]) + (", ..." if len(cases) > 10 else "")


def _read(
    cases: Mapping[str, Any], states: Mapping[str, list[list[Any]]], say: Callable[[str], object]
) -> dict[str, Found]:
    """What the cases hold; in as many threads as the host has processes for its batches, four at most."""
    from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

    def look(case: str) -> Found:
        try:
            loaded = cases[case].load_case(case)
            image, segmentation = (np.ascontiguousarray(array[:]) for array in loaded[:2])
            shapes = [list(map(int, array.shape[1:])) for array in (image, segmentation)]
            labels = sorted({int(label) for plane in segmentation[0] for label in np.unique(plane)})
            finite = bool(np.isfinite(image).all())
            return Found(states[case], finite, labels, shapes, digest(image), digest(segmentation))
        except Exception as error:  # of whatever reads the files
            raise ValueError(
                f"the preprocessed case {case} cannot be read ({type(error).__name__}: {error}). Preprocess it again "
                f"(nnUNetv2_preprocess), or take it out of splits_final.json."
            ) from error

    with ThreadPoolExecutor(max(1, min(4, get_allowed_n_proc_DA()))) as pool:
        shown = place()[0] == 0
        found = watched(pool.map(look, cases), "Data check", "cases", total=len(cases), shown=shown, say=say)
        return dict(zip(cases, found, strict=True))


def _states(folder: Path, cases: Iterable[str]) -> dict[str, list[list[Any]]]:
    """Name, size and time of change of the files of each case; an empty list for a case that has none."""
    states: dict[str, list[list[Any]]] = {case: [] for case in cases}
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            stem = entry.name.rpartition(".")[0]
            case = stem if stem in states else stem.removesuffix("_seg")
            if case in states:
                status = entry.stat()
                states[case].append([entry.name, status.st_size, status.st_mtime_ns])
    return states


def _known(memory: Sequence[Path]) -> dict[str, Found]:
    """What was found earlier, by this release."""
    found = {}
    for case, content in remembered(memory).items():
        with suppress(TypeError):
            found[case] = Found(**content)
    return found


def _plain(found: Mapping[str, Found]) -> dict[str, Any]:
    return {case: vars(content) for case, content in found.items() if content.finite}

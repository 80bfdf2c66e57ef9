"""Images that are there under two names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from advmed import copies
from advmed.copies import Sample, contents, digest, warnings_of_copies


def test_what_is_said_of_copies() -> None:
    """Each kind by itself; a name that comes again, and what cannot be a copy, is none."""
    samples = [
        *(Sample("train", "a", "1", [0.5]), Sample("train", "a", "1", [0.5]), Sample("train", "b", "1", [0.5])),
        *(
            Sample("train", "c", "2", 0),
            Sample("train", "d", "2", 1),
            Sample("train", "e", None),
            Sample("val", "f", None),
        ),
        *(Sample("val", "g", "1", [0.5]), Sample("test", "a", "1", [0.5]), Sample("test", "h", "3", 0)),
    ]
    apart, across, within = warnings_of_copies(samples)
    assert apart.startswith("1 image(s) have two truths, such as d of train, a copy of c of train")
    assert across.startswith("2 image(s) are in two splits, such as g of val, a copy of a of train")
    assert within.startswith("1 image(s) are in one split more than once, such as b of train, a copy of a of train")
    assert warnings_of_copies(samples[:2] + samples[3:4]) == []


def test_only_files_that_may_be_copies_are_read_and_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"a": "one", "b": "two", "c": "one", "d": "longest", "e": "pairs", "f": "pairs"}
    paths = [tmp_path / name for name in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        path.write_text(text)
    read: list[str] = []
    of_file = copies._of_file
    monkeypatch.setattr(copies, "_of_file", lambda path: (read.append(path.name), of_file(path))[1])
    memory = [tmp_path / "memory.json"]
    one, two, again, longest, *pair = contents(paths, memory)
    assert (one, longest) == (again, None)
    assert pair[0] == pair[1] not in (one, two, None)
    assert two not in (one, None)
    assert read == ["a", "b", "c", "e", "f"]
    assert contents(paths, memory, threads=3) == [one, two, again, longest, *pair]
    assert read == ["a", "b", "c", "e", "f"]
    assert str(tmp_path) not in memory[0].read_text()
    paths[1].write_text("one")
    assert contents(paths, memory)[1] == one
    assert read == ["a", "b", "c", "e", "f", "b"]


def test_digests_of_arrays_are_of_their_values() -> None:
    array = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert digest(array) == digest(array.copy()) != digest(array + 1)

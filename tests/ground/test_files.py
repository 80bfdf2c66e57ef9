"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from advmed.files import replacing, write_whole


def test_a_failure_in_the_middle_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "kept.csv"
    write_whole(path, "old\n")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old\n"
    assert os.listdir(tmp_path) == ["kept.csv"]


def test_nothing_is_written_where_there_was_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no"), replacing(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise ValueError("no")
    assert os.listdir(tmp_path) == []


def test_a_reader_never_sees_a_half(tmp_path: Path) -> None:
    path, texts = tmp_path / "shared", ["a" * 100_000, "b" * 200_000]
    write_whole(path, texts[0])
    writers = [threading.Thread(target=lambda t=t: [write_whole(path, t) for _ in range(50)]) for t in texts]
    for writer in writers:
        writer.start()
    seen = {path.read_text() for _ in range(100)}
    for writer in writers:
        writer.join()
    assert seen <= set(texts)
    assert os.listdir(tmp_path) == ["shared"]


def test_the_longest_names_that_a_folder_takes(tmp_path: Path) -> None:
    write_whole(tmp_path / ("n" * 255), "ä")
    assert (tmp_path / ("n" * 255)).read_bytes() == "ä".encode()

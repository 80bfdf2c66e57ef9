"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch

from advmed.files import check_whole, remember, remembered, replacing, state_of, write_whole


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


def test_damage_in_a_checkpoint_is_found_anywhere(tmp_path: Path) -> None:
    """PyTorch reads other bytes without a word."""
    path = tmp_path / "a.pt"
    torch.save({name: torch.full((1000,), 0.5) for name in "abc"}, path)
    check_whole(path)
    whole = path.read_bytes()
    weights = whole.index(torch.full((1000,), 0.5).numpy().tobytes())
    path.write_bytes(whole[:weights] + bytes(8) + whole[weights + 8 :])
    assert torch.load(path)["a"][0] == 0
    with pytest.raises(ValueError, match=r"a\.pt is damaged: some bytes of 1 of its"):
        check_whole(path)


@pytest.mark.skipif(not hasattr(torch.serialization, "set_crc32_options"), reason="PyTorch 2.4 always writes them")
def test_checkpoints_without_sums_are_not_judged(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(10)}, path)
    finally:
        torch.serialization.set_crc32_options(before)
    check_whole(path)


def test_other_files_are_not_judged(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"a": torch.ones(10)}, path, _use_new_zipfile_serialization=False)
    check_whole(path)
    path.write_text("a,b")
    check_whole(path)


def test_a_state_is_of_one_file_as_it_is(tmp_path: Path) -> None:
    path, other = tmp_path / "a", tmp_path / "b"
    for one in (path, other):
        one.write_text("a")
        os.utime(one, (1, 1))
    first = state_of(path)
    assert first == state_of(path) != state_of(other)
    assert str(tmp_path) not in first
    os.utime(path, (1, 2))
    assert state_of(path) != first


def test_what_is_remembered(tmp_path: Path) -> None:
    """In the first place that can be written; what is damaged was not remembered."""
    nowhere, one, two = tmp_path / "no" / "a.json", tmp_path / "b.json", tmp_path / "c.json"
    assert remembered([nowhere, one]) == {}
    remember({"x": [1, "y"]}, [nowhere, one, two])
    assert not two.exists()
    assert remembered([nowhere, one, two]) == {"x": [1, "y"]}
    for text in ("{", "[1]", "3"):
        two.write_text(text)
        assert remembered([one, two]) == {"x": [1, "y"]}
    remember({}, [nowhere])
    assert not nowhere.parent.exists()

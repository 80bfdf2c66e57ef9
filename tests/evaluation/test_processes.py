"""Two real processes (gloo on the CPU) at one evaluation, against one that does it alone."""

from __future__ import annotations

import datetime
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import advmed
from advmed.attacks.names import parse_attacks
from advmed.distributed import Processes, device_of_rank, from_first_rank, gathered, patient, place
from advmed.evaluation.loop import evaluate
from helpers import shared_evaluation
from helpers.evaluations import leave_out_curves, record_of
from helpers.hosts import side_by_side

SCRIPT = Path(shared_evaluation.__file__)
ATTACKS = parse_attacks(["pgd2"])
PASSES = 1 + (len(shared_evaluation.ATTACKS) + 1) * (len(shared_evaluation.LEVELS) - 1)
"""Over a batch: clean, and under every attack and the control at every level."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes meet, and the files of their models."""
    made: Path = tmp_path_factory.mktemp("team")
    for name in ("one", "other"):
        (made / f"{name}.ckpt").write_text(name)
    return made


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    """What each process ended with."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ours = os.pathsep.join([str(Path(advmed.__file__).parents[1]), str(SCRIPT.parents[1])])
    return side_by_side(SCRIPT, folder, PYTHONPATH=ours, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


@pytest.fixture(scope="module")
def alone(folder: Path, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """One process that does everything."""
    with pytest.MonkeyPatch.context() as patch:
        leave_out_curves(patch)
        return shared_evaluation.run(folder, "alone")


def without_time(report: Any) -> Any:
    """A record without when it was made and how long its passes took."""
    if isinstance(report, Mapping):
        return {key: without_time(value) for key, value in report.items() if key not in ("seconds", "created")}
    return [without_time(value) for value in report] if isinstance(report, list) else report


def assert_same_report(folder: Path) -> None:
    """Bit by bit, in all files but what tells the time."""
    ours, theirs = folder / "shared", folder / "alone"
    assert sorted(p.name for p in ours.iterdir()) == sorted(p.name for p in theirs.iterdir())
    for name in ("results.csv", "samples.csv", "table.csv"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    records = [without_time(record_of(path)) for path in (ours, theirs)]
    assert records[0] == records[1]
    with np.load(ours / "draws.npz") as left, np.load(theirs / "draws.npz") as right:
        assert left.files == right.files == ["share", "loss"]
        for name in left.files:
            assert left[name].tobytes() == right[name].tobytes()
    parts = sorted(path.relative_to(ours) for path in ours.rglob("*.npz") if path.parent.name == "parts")
    assert len(parts) == 2 * (5 + 2)  # models x (batches, batches of the checks)
    for part in parts:
        with np.load(ours / part) as left, np.load(theirs / part) as right:
            assert left.files == right.files
            for name in left.files:
                assert name.endswith("/seconds") or left[name].tobytes() == right[name].tobytes(), (part, name)


@pytest.mark.slow
def test_the_work_is_shared_and_the_report_is_that_of_one_process(
    folder: Path, ranks: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    assert [found["team"] for found in ranks] == [{"rank": 0, "size": 2}, {"rank": 1, "size": 2}]
    # Batches 0, 2, 4 and 1, 3 of each model, and one batch each of its checks.
    assert ranks[0]["shared"]["loaded"] == [f"{name} {n}" for name in ("one", "other") for n in (0, 2, 4, 0)]
    assert ranks[1]["shared"]["loaded"] == [f"{name} {n}" for name in ("one", "other") for n in (1, 3, 1)]
    assert sorted(alone["loaded"]) == sorted(ranks[0]["shared"]["loaded"] + ranks[1]["shared"]["loaded"])
    assert_same_report(folder)
    # The first process speaks, and all see the page.
    for turn in ("shared", "again", "mended"):
        assert ranks[0][turn]["said"] == [text.replace("alone", "shared") for text in alone["said"]]
        assert ranks[1][turn]["said"] == []
        assert all(found[turn]["exists"] for found in ranks)
    assert ranks[0]["shared"]["page"] == ranks[1]["shared"]["page"]
    assert alone["warned"] == ranks[0]["shared"]["warned"] == ranks[1]["shared"]["warned"] == []
    # What is finished is loaded by its owner, to be compared, and measured by nobody.
    assert [found["again"]["loaded"] for found in ranks] == [found["shared"]["loaded"] for found in ranks]
    assert [found["again"]["measured"] for found in ranks] == [0, 0]


def pictures(page: Path) -> list[str]:
    """The pictures of samples on a page, in their order."""
    return re.findall(r'src="(data:image/[^"]+)"', page.read_text())


@pytest.mark.slow
def test_pictures_are_shared_and_in_the_order_of_one_process(
    folder: Path, ranks: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    assert len(alone["drawn"]) == 4
    assert [found["shared"]["drawn"] for found in ranks] == [alone["drawn"][::2], alone["drawn"][1::2]]
    shared = pictures(folder / "shared" / "report.html")
    assert shared == pictures(folder / "alone" / "report.html")
    # Where one process fails at its pictures, none waits for it, and the page is one without any.
    assert [found["undrawn"]["exists"] for found in ranks] == [True, True]
    assert len(pictures(folder / "undrawn" / "report.html")) == len(shared) - 4 * 4


@pytest.mark.slow
def test_a_damaged_part_is_measured_again_by_its_owner_and_said_by_all(ranks: list[dict[str, Any]]) -> None:
    """Two parts were damaged and one taken away between the turns; the files of the report are those of before."""
    assert [found["mended"]["measured"] for found in ranks] == [PASSES, 2 * PASSES]
    for found in ranks:
        for number, said in zip((1, 2), found["mended"]["warned"], strict=True):
            assert f"batch_0000{number}.npz is damaged" in said
            assert said.endswith("its batch is measured again")


def test_one_of_several_processes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It needs a folder that all share; one that has nothing to do reads what the others have."""
    monkeypatch.setattr(Processes, "wait", lambda self: None)  # the others are done, elsewhere
    loaded: list[str] = []
    batches = shared_evaluation.subject(folder, "one", loaded).batches
    how: dict[str, Any] = {"folder": tmp_path, "fingerprint": "x"}
    with pytest.raises(ValueError, match="several processes need a folder"):
        evaluate(batches, ATTACKS, (0, 1), processes=Processes(0, 2))
    with pytest.raises(RuntimeError, match=r"batch_00001\.npz, .* is not there: do they share the folder\?"):
        evaluate(batches, ATTACKS, (0, 1), **how, processes=Processes(0, 2))
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == [f"batch_0000{n}.npz" for n in (0, 2, 4)]
    loaded.clear()
    alone = evaluate(batches, ATTACKS, (0, 1), **how)
    assert loaded == [f"one {n}" for n in (0, 2, 4, 1, 3)], "those of the first process are compared"
    loaded.clear()
    idle = evaluate(batches, ATTACKS, (0, 1), **how, processes=Processes(7, 8))
    assert not loaded
    np.testing.assert_array_equal(idle.at("pgd2", 1).loss, alone.at("pgd2", 1).loss)


@pytest.mark.parametrize("environment", [{}, {"WORLD_SIZE": "1", "MASTER_ADDR": "here"}, {"WORLD_SIZE": "4"}])
def test_alone_without_torchrun(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "MASTER_ADDR", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    processes = Processes.of_environment()
    assert processes == Processes(0, 1)
    processes.wait()


def test_every_process_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert device_of_rank("cuda") == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [device_of_rank(name) for name in ("cuda", "cuda:0", "cpu")] == ["cuda:1", "cuda:0", "cpu"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert device_of_rank("cuda") == "cuda"


def test_processes_that_train_together_wait_for_days_where_they_are_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a group of their own: NCCL would end the training after ten minutes."""
    assert (place(), gathered(1), from_first_rank(2)) == ((0, 1), [1], 2)
    with patient():  # alone, nobody waits
        assert gathered(1) == [1]
    waits: list[datetime.timedelta | None] = []
    for name in ("all_gather_object", "broadcast_object_list"):
        exchange = getattr(torch.distributed, name)

        def watched(*given: Any, group: Any, exchange: Any = exchange) -> None:
            backend = None if group is None else group._get_backend(torch.device("cpu"))
            waits.append(None if backend is None else backend.options._timeout)
            exchange(*given, group=group)

        monkeypatch.setattr(torch.distributed, name, watched)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        with pytest.raises(KeyError), patient():
            assert (gathered({"a": 1}), from_first_rank("b")) == ([{"a": 1}], "b")
            raise KeyError
        assert gathered(2) == [2]
        assert place() == (0, 1)
    finally:
        torch.distributed.destroy_process_group()
    assert waits == [datetime.timedelta(days=7)] * 2 + [None]

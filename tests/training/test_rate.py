"""The learning rate that stays and falls late."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from advmed.training.rate import LateDecay, late_decay
from advmed.training.settings import TrainingSettings


def optimizer() -> torch.optim.SGD:
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.5, 0.1)])


def rates(of: torch.optim.Optimizer) -> list[float]:
    return [group["lr"] for group in of.param_groups]


@pytest.mark.parametrize("named", [True, False])
def test_the_rate_stays_for_three_quarters_and_falls_in_a_line(named: bool) -> None:
    """For hosts that name the epoch, before or after its steps, and for those that do not."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own = optimizer()
        schedule, found = LateDecay(own, lambda: 8.0), []
        for epoch in range(8):
            if named:
                schedule.step(epoch)
            found.append(rates(own))
            own.step()
            if not named:
                schedule.step()
    assert found == [pytest.approx([0.5, 0.1])] * 7 + [pytest.approx([0.25, 0.05])]
    assert schedule.get_last_lr() == pytest.approx([0.25, 0.05] if named else [0.005, 0.001])


def test_the_line_ends_above_nothing() -> None:
    """At a hundredth, where a training by the clock goes on for longer than it was thought, too."""
    assert [late_decay(step, 100) for step in (75, 80, 95, 99)] == pytest.approx([1.0, 0.8, 0.2, 0.04])
    assert [late_decay(step, 100) for step in (99.9, 100, 101)] == [0.01] * 3
    assert [late_decay(step, 1) for step in (0, 0.75, 0.875)] == pytest.approx([1.0, 1.0, 0.5]), "of a single epoch"


def test_a_rate_within_an_epoch_leaves_the_schedule_where_it_is() -> None:
    own = optimizer()
    schedule = LateDecay(own, lambda: 4.0)
    own.step()
    schedule.step(3)
    for share, rate in ((0.0, 0.5), (0.5, 0.25), (0.75, 0.125)):
        schedule.within(3 + share)
        assert rates(own) == schedule.get_last_lr() == pytest.approx([rate, rate / 5])
    assert schedule.last_epoch == 3


def test_another_length_and_another_run_go_on() -> None:
    own, length = optimizer(), [4.0]
    schedule = LateDecay(own, lambda: length[0])
    for _ in range(4):
        own.step()
        schedule.step()
    assert rates(own) == pytest.approx([0.005, 0.001])
    other = optimizer()
    resumed = LateDecay(other, lambda: 40.0)
    resumed.load_state_dict(schedule.state_dict())
    other.step()
    resumed.step()
    assert (resumed.last_epoch, rates(other)) == (5, pytest.approx([0.5, 0.1])), "of a longer training"
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer(), 40)
    cosine.step()
    resumed.load_state_dict(cosine.state_dict())  # where a resumed run has another decay than the checkpoint
    resumed.step()
    assert (resumed.last_epoch, rates(other)) == (2, pytest.approx([0.5, 0.1]))
    length[0] = 40.0  # as a training by the clock has it
    own.step()
    schedule.step()
    assert rates(own) == pytest.approx([0.5, 0.1])


def test_other_words_are_refused() -> None:
    wrong: Any = "cosine"
    with pytest.raises(ValueError, match="decay must be 'host' or 'late', got 'cosine'"):
        TrainingSettings(decay=wrong)

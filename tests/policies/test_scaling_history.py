"""What a core remembers of its changes: wishes, what they would have saved, reversals, and the traffic since then."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from fakes import fleet, observation, snapshot, target

from policies.contract import Observation
from policies.decider import Decider
from policies.spec import GuardrailSpec, WindowSpec

QUICK = {"scale_down_cooldown_s": 0.0, "scale_down_window_s": 0.0}


def window(time_s: float, load: float = 2.0, n: int = 1) -> Observation:
    """One healthy window of 15 s with a given offered load, replicas; its noise band is 0.05."""
    return observation(snapshot(n=n, time_s=time_s, replicas_target=4), load)


class Core:
    """A decider that is told every observation, so that what arrives can be anything."""

    def __init__(self, n: int = 1, **guardrails: Any) -> None:
        self.decider = Decider(fleet(n=n), WindowSpec(), GuardrailSpec.model_validate({**QUICK, **guardrails}))
        self.decider.observe(snapshot(n=n, time_s=0.0, replicas_target=4))
        self.time_s, self.n = 0.0, n

    def tick(self, wish: int, load: float = 2.0, times: int = 1) -> int:
        """What the first service's target settles at after so many windows."""
        for _ in range(times):
            self.time_s += 15.0
            seen = window(self.time_s, load, self.n)
            settled, _ = self.decider.settle(target(np.full((self.n, 1), wish)), seen)
        return int(settled.replicas[0, 0])

    def ticks(self, wishes: Sequence[int], load: float = 2.0) -> list[int]:
        """The settled targets, wish by wish."""
        return [self.tick(wish, load) for wish in wishes]


def test_fleet_that_flaps_at_steady_load_stands_still_after_the_first_reversal() -> None:
    assert Core().ticks([4, 3, 4, 3, 4, 3, 4, 3]) == [4, 3, 4, 4, 4, 4, 4, 4]


def test_scale_down_after_a_reversal_is_made_once_it_would_have_been_worth_the_change() -> None:
    core = Core(reversal_memory_s=1e9)
    core.ticks([4, 3, 4])
    # One of 4 replicas saves 240 s times 10 less 1, of the whole fleet, in 8,640 s.
    assert core.tick(3, times=576) == 4
    assert core.tick(3) == 3


def test_wish_for_the_fleet_in_force_starts_the_wait_anew() -> None:
    core = Core(reversal_memory_s=1e9)
    core.ticks([4, 3, 4])
    core.tick(3, times=576)
    assert core.ticks([4, 3, 3]) == [4, 4, 4]


def test_scale_up_because_more_arrives_is_no_reversal() -> None:
    core = Core()
    core.ticks([4, 3])
    assert core.tick(4, load=2.2) == 4
    assert core.tick(3, load=2.2) == 3


def test_second_scale_up_in_a_row_is_no_reversal() -> None:
    core = Core()
    assert core.ticks([3, 4, 5]) == [3, 4, 5]
    assert core.decider.state()["reversals"].tolist() == pytest.approx([1.0], rel=0.01)


def test_price_stays_a_number_however_often_a_fleet_flaps() -> None:
    core = Core(scale_down_worth_s=0.0, reversal_factor=100.0, reversal_memory_s=1e9)
    with np.errstate(over="raise", invalid="raise"):
        assert core.ticks([4, 3] * 200) == [4, 3] * 200


def test_target_that_was_not_carried_out_is_no_change() -> None:
    core = Core()
    core.tick(4)
    for wish in (3, 4, 3):
        core.tick(wish)
        core.decider.retract(np.array([True]))
    state = core.decider.state()
    assert (state["reversals"].tolist(), state["changed_s"].tolist()) == ([0.0], [-np.inf])


def test_wait_goes_on_while_targets_are_not_carried_out() -> None:
    core = Core()
    core.tick(4)
    for _ in range(3):
        core.tick(3)
        core.decider.retract(np.array([True]))
    # Two windows of a quarter of the fleet: in the first one the wish before it still counted.
    assert core.decider.state()["forgone_s"].tolist() == [7.5]


def test_reversal_outlives_a_restart() -> None:
    before, after = Core(), Core()
    before.ticks([4, 3, 4])
    after.decider.restore(before.decider.state())
    after.time_s = before.time_s
    assert after.tick(3) == before.tick(3) == 4


def test_reset_forgets_the_reversals_of_the_masked_services() -> None:
    core = Core(n=2)
    core.ticks([4, 3, 4])
    core.decider.reset(np.array([True, False]))
    assert core.decider.state()["reversals"].tolist() == pytest.approx([0.0, 1.0], rel=0.01)


def test_another_proposal_is_judged_as_if_it_had_been_made_all_along() -> None:
    core = Core(scale_down_window_s=60.0)
    core.tick(3, times=9)
    seen = window(core.time_s + 15.0)
    core.decider.settle(target(4), seen)
    assert core.decider.what_if(target(2), seen).replicas.tolist() == [[2]]

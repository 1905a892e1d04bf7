"""Counts that the actuator leaves open: which replicas never come, and which were there and do not answer any more."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from live_fakes import service_spec

from autoscaler.actuators.base import FleetState, pools_of
from autoscaler.actuators.starts import StartSpec
from autoscaler.metrics.replica_counts import ReplicaCounts

SPEC = service_spec()  # a cold start of 40 s
UNKNOWN = FleetState.unknown(pools_of([SPEC]))


class Fleet:
    """A service whose target is known, on a clock of its own."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.counts = ReplicaCounts([SPEC], StartSpec(), lambda: self.now_s)
        self.said: list[str] = []

    def after(self, seconds: float, target: float, scraped: float, **told: float) -> list[float]:
        """Ready, starting, stuck and found to be stuck here; with what the actuator tells besides, or `measured`."""
        self.now_s += seconds
        self.said = []
        measured = told.pop("measured", None)
        counts = {f"replicas_{name}": np.array([[value]]) for name, value in {"target": target, **told}.items()}
        values = {} if measured is None else {"replicas_ready": np.array([[measured]])}
        state = self.counts.complete(replace(UNKNOWN, **counts), values, np.array([[scraped]]), self.said)
        found = (state.replicas_ready, state.replicas_starting, state.replicas_stuck, self.counts.stuck)
        return [float(one[0, 0]) for one in found]


@pytest.mark.plays("replicas never ready")
def test_what_is_scraped_is_ready_and_what_never_comes_is_given_up() -> None:
    fleet = Fleet()
    assert fleet.after(0.0, 12, 4) == [4.0, 8.0, 0.0, 0.0]
    assert fleet.after(299.0, 12, 4) == [4.0, 8.0, 0.0, 0.0]
    assert fleet.after(2.0, 12, 4) == [4.0, 0.0, 8.0, 8.0]
    assert fleet.said == ["chat: 8 replicas have been starting for more than 5 min and will be given back first"]
    assert fleet.after(15.0, 4, 4) == [4.0, 0.0, 0.0, 0.0]
    assert fleet.said == []


@pytest.mark.plays(
    "scrapes of replicas fail that nobody else counts",
    "they count as starting, named, so none is given back (`replicas_starting`)",
)
def test_replicas_whose_scrapes_fail_are_not_given_up() -> None:
    """What they serve is not known, so nothing is given back: they count as starting, for however long."""
    fleet = Fleet()
    assert fleet.after(0.0, 8, 8) == [8.0, 0.0, 0.0, 0.0]
    for _ in range(3):
        assert fleet.after(1000.0, 8, 4) == [4.0, 4.0, 0.0, 0.0]
        assert "4 of 8 replicas are not scraped any more" in fleet.said[0]
    assert fleet.after(15.0, 10, 4) == [4.0, 6.0, 0.0, 0.0]
    assert fleet.after(301.0, 10, 4) == [4.0, 4.0, 2.0, 2.0]  # the two that were asked for since never came
    assert fleet.after(15.0, 4, 4) == [4.0, 0.0, 0.0, 0.0]
    assert fleet.after(15.0, 8, 4) == [4.0, 4.0, 0.0, 0.0]
    assert fleet.after(301.0, 8, 4) == [4.0, 0.0, 4.0, 4.0]


def test_what_metrics_count_is_gone_when_they_say_so() -> None:
    fleet = Fleet()
    assert fleet.after(0.0, 8, 8, measured=8) == [8.0, 0.0, 0.0, 0.0]
    assert fleet.after(15.0, 8, 4, measured=4) == [4.0, 4.0, 0.0, 0.0]
    assert fleet.after(301.0, 8, 4, measured=4) == [4.0, 0.0, 4.0, 4.0]


def test_what_the_actuator_counts_is_its_own_to_give_up() -> None:
    fleet = Fleet()
    for _ in range(2):
        assert fleet.after(1000.0, 8, 4, ready=4, starting=3, stuck=1) == [4.0, 3.0, 1.0, 0.0]
    assert fleet.said == []
    # Once it does not count any more, a start is as old as it has been seen here.
    assert fleet.after(15.0, 8, 4, measured=4) == [4.0, 4.0, 0.0, 0.0]


@pytest.mark.parametrize("target", [8.0, np.nan])
def test_what_nobody_knows_stays_unknown(target: float) -> None:
    fleet = Fleet()
    for _ in range(2):
        ready, starting, stuck, _ = fleet.after(1000.0, target, np.nan)
        assert np.isnan([ready, starting]).all()
        assert stuck == 0.0

"""Starts that never end: told from those that are on their way, named, and no reason to keep ready replicas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from live_fakes import LiveWorld, live_config, service_spec

from autoscaler.actuators.base import FleetState, pools_of
from autoscaler.actuators.metric_only import MetricOnlyActuator, MetricOnlyConfig
from autoscaler.actuators.starts import Start, StartLedger, StartSpec
from autoscaler.metrics.replica_counts import ReplicaCounts
from envs.traffic.trace import Trace
from policies.contract import Bools, Floats, Reason, Snapshot, Target

SPEC = service_spec()  # a cold start of 40 s
POOL = pools_of([SPEC])[0]


class Fleet:
    """Replicas on a clock of its own."""

    def __init__(self, **settings: float) -> None:
        self.now_s = 0.0
        self.ledger = StartLedger([SPEC], StartSpec(**settings), lambda: self.now_s)

    def after(self, seconds: float, starting: int, *known: Start) -> tuple[float, float, str]:
        """Starting, stuck and what is said of it."""
        self.now_s += seconds
        state = replace(FleetState.unknown([POOL]), replicas_starting=np.array([[float(starting)]]))
        settled = self.ledger.settle(state, {POOL: known})
        return settled.replicas_starting[0, 0], settled.replicas_stuck[0, 0], "; ".join(settled.problems)


def test_a_start_is_on_its_way_for_three_cold_starts_and_at_least_five_minutes() -> None:
    fleet = Fleet()
    assert fleet.after(0.0, 2) == (2.0, 0.0, "")
    assert fleet.after(299.0, 2) == (2.0, 0.0, "")
    starting, stuck, said = fleet.after(2.0, 3)  # a third one has just begun
    assert (starting, stuck) == (1.0, 2.0)
    assert said == "chat: 2 replicas have been starting for more than 5 min and will be given back first"


def test_a_slow_engine_has_longer() -> None:
    fleet = Fleet(cold_starts=20.0)
    fleet.after(0.0, 1)
    assert fleet.after(799.0, 1) == (1.0, 0.0, "")
    assert fleet.after(2.0, 1)[:2] == (0.0, 1.0)


def test_replicas_that_get_ready_and_others_that_begin_are_not_late() -> None:
    fleet = Fleet()
    for _ in range(20):
        assert fleet.after(50.0, 2) == (2.0, 0.0, "")
        assert fleet.after(50.0, 0) == (0.0, 0.0, "")


def test_the_age_and_the_reason_that_the_cluster_knows_count_from_the_first_look_on() -> None:
    known = (
        Start("chat-b", 700.0, "Unschedulable: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu."),
        Start("chat-a", 20.0, ""),
        Start("", 0.0, "FailedCreate: exceeded quota"),
    )
    starting, stuck, said = Fleet().after(0.0, 2, *known)
    assert (starting, stuck) == (1.0, 1.0)
    assert said == (
        "chat: 1 replica has been starting for more than 5 min and will be given back first"
        " (chat-b: Unschedulable: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu.)"
    )


def test_replicas_that_were_never_made_are_named_by_the_reason_of_their_owner() -> None:
    fleet, quota = Fleet(), Start("", 0.0, "FailedCreate: exceeded quota")
    fleet.after(0.0, 2, quota)
    assert fleet.after(301.0, 2, quota)[2].endswith("(FailedCreate: exceeded quota)")


def test_as_many_are_named_as_are_counted() -> None:
    pods = [Start(f"chat-{name}", 400.0 + age, "") for name, age in (("a", 1), ("b", 2), ("c", 3))]  # one too many
    assert Fleet().after(0.0, 2, *pods) == (
        0.0,
        2.0,
        "chat: 2 replicas have been starting for more than 5 min and will be given back first (chat-b; chat-c)",
    )


def test_what_never_gets_ready_on_a_node_is_paid_for_and_what_waits_for_one_is_not() -> None:
    crashes = Start("chat-a", 900.0, "CrashLoopBackOff", placed=True)
    waits, young = Start("chat-b", 900.0, "Unschedulable"), Start("chat-c", 20.0, "", placed=True)
    state = replace(FleetState.unknown([POOL]), replicas_starting=np.array([[3.0]]))
    settled = Fleet().ledger.settle(state, {POOL: [crashes, waits, young]})
    assert (settled.replicas_stuck[0, 0], settled.replicas_stuck_paid[0, 0]) == (2.0, 1.0)


def test_what_is_unknown_stays_unknown() -> None:
    state = Fleet().ledger.settle(FleetState.unknown([POOL]))
    assert np.isnan(state.replicas_starting[0, 0])
    assert (state.replicas_stuck[0, 0], state.problems) == (0.0, ())


class Full(LiveWorld):
    """A cluster with room for four replicas; what is asked for beyond that is pending for ever."""

    room, asked = 4, 0

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.ledger = StartLedger(self.specs, StartSpec(), lambda: self.now_s)

    def apply(self, target: Target) -> None:
        self.asked = max(int(target.replicas[0, 0]), 0) or self.asked
        super().apply(replace(target, replicas=np.minimum(target.replicas, self.room)))

    def state(self) -> FleetState:
        state = super().state()
        if not self.asked:
            return state
        wanted = np.array([[float(self.asked)]])
        starting = np.maximum(wanted - state.replicas_ready, 0.0)
        return self.ledger.settle(replace(state, replicas_target=wanted, replicas_starting=starting))

    def read(self) -> Snapshot:
        snapshot, state = super().read(), self.watch.last
        pipeline = snapshot.boot_pipeline.copy()
        pipeline[..., 0] += np.maximum(state.replicas_starting - snapshot.replicas_starting, 0.0)
        return replace(snapshot, replicas_starting=state.replicas_starting, boot_pipeline=pipeline)

    def route(self, rows: Bools, adrift: Bools) -> None:
        """Nothing to route."""


class MetricOnly(Full):
    """The same, carried out by somebody who reads targets as metrics: only scrapes say how many replicas there are."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        self.shown = MetricOnlyActuator(MetricOnlyConfig(), self.specs)
        self.counts = ReplicaCounts(self.specs, StartSpec(), lambda: self.now_s)
        self.problems: tuple[str, ...] = ()

    @property
    def replicas_stuck(self) -> Floats:
        return self.counts.stuck

    def apply(self, target: Target) -> None:
        super().apply(target)
        self.shown.apply(target)

    def state(self) -> FleetState:
        return self.shown.state()

    def read(self) -> Snapshot:
        snapshot, problems = LiveWorld.read(self), list[str]()
        state = self.counts.complete(self.watch.last, {}, snapshot.replicas_ready, problems)
        self.problems = tuple(problems)
        pipeline = np.zeros_like(snapshot.boot_pipeline)
        pipeline[..., 0] = state.replicas_starting
        counts = {"replicas_target": state.replicas_target, "replicas_starting": state.replicas_starting}
        return replace(snapshot, **counts, boot_pipeline=pipeline)


@pytest.mark.plays("replicas never ready")
@pytest.mark.parametrize("make", [Full, MetricOnly])
@pytest.mark.parametrize("policy", ["token-demand", "learned"])
def test_replicas_that_never_come_do_not_keep_those_that_did(tmp_path: Path, policy: str, make: type[Full]) -> None:
    rng = np.random.default_rng(0)
    times = np.sort(np.concatenate([rng.uniform(0, 5400, 1080), rng.uniform(600, 1500, 22_500)]))
    trace = Trace.from_arrays(
        arrival_s=times,
        prompt_tokens=rng.integers(500, 2500, len(times)),
        output_tokens=rng.integers(20, 200, len(times)),
        duration_s=5400.0,
    )
    spec = service_spec(initial_replicas=2)
    world = make([spec], [trace])
    service = world.service(live_config(tmp_path, spec, policy={"reference": policy, "cache": tmp_path / "p"}))
    decisions = world.run(service, 300)
    asked = [int(one.settled.replicas[0, 0]) for one in decisions]
    assert max(asked) > world.room  # more were asked for than there is room
    assert asked[-1] <= 2
    late = [bool(one.reasons[0] & int(Reason.REPLICAS_STARTING)) for one in decisions]
    assert not any(late[-100:])
    service.close()

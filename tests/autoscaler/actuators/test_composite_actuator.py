"""The order in which replicas and caps move, so that no request is lost or left waiting."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from autoscaler.actuators.base import Access, FleetState, PartlyFailed, PoolName, pools_of
from autoscaler.actuators.composite import CompositeActuator
from policies.contract import LEAVE_ALONE, ActuationFailed, Target
from policies.spec import PoolSpec, ScalingSpec, Slo, find_engine

ENGINE = find_engine("llama-3.1-8b-h100", Path())
SPEC = ScalingSpec(service="chat", slo=Slo(ttft_s=0.5, tpot_s=0.05), pools=(PoolSpec(engine=ENGINE, max_replicas=8),))
POOLS = pools_of([SPEC])


def one(value: float) -> np.ndarray:
    return np.array([[float(value)]])


@dataclass
class Replicas:
    """Counts; names r0, r1, ... of which the highest go first unless others are preferred."""

    log: list[str]
    target: float = 2
    ready: float = 2
    preferred: tuple[str, ...] = ()
    fails: bool = False
    asked: int = 0
    stuck: int = 0
    unknown: bool = False
    refuses: bool = False
    """Whether a scale-down would be refused."""
    away: bool = False
    """Whether nobody can say which there are."""
    lags: bool = False
    """Whether replicas stay ready for a while after the count has fallen."""

    def apply(self, target: Target) -> None:
        if target.replicas[0, 0] in (LEAVE_ALONE, self.target):
            return
        if self.fails:
            raise ActuationFailed("the API server is down")
        self.log.append(f"replicas {target.replicas[0, 0]}")
        self.target = int(target.replicas[0, 0])
        if not self.lags:
            self.ready = min(self.ready, self.target)

    def state(self) -> FleetState:
        counts = {"replicas_target": one(self.target), "replicas_ready": one(self.ready)}
        return replace(FleetState.unknown(POOLS), **counts, replicas_stuck=one(self.stuck))

    def check(self) -> list[Access]:
        return []

    def close(self) -> None:
        pass

    def members(self) -> dict[str, dict[str, str]]:
        self.asked += 1
        if self.away:
            return {}
        return {"chat": {f"r{number}": "address" for number in range(int(self.ready))}}

    def victims(self, pool: PoolName, count: int) -> list[str]:
        if self.unknown:
            raise RuntimeError("its replicas cannot be listed")
        return [f"r{number}" for number in reversed(range(int(self.ready)))][:count]

    def prefer(self, pool: PoolName, replicas: Sequence[str]) -> None:
        self.preferred = tuple(replicas)

    def rehearse(self, pool: PoolName, count: int) -> None:
        if self.refuses:
            raise RuntimeError("HTTP 403: may not patch pods")


@dataclass
class Caps:
    """A gateway."""

    log: list[str]
    cap: float = 16
    sessions: dict[str, int] = field(default_factory=dict)
    draining: set[str] = field(default_factory=set)
    routed: set[str] = field(default_factory=set)
    routing: bool = True
    fails: bool = False

    def apply(self, target: Target) -> None:
        if target.replicas[0, 0] == LEAVE_ALONE or target.batch_cap[0, 0] == self.cap:
            return
        if self.fails:
            raise PartlyFailed({"chat": "HAProxy is down"})
        self.log.append(f"cap {target.batch_cap[0, 0]}")
        self.cap = int(target.batch_cap[0, 0])

    def state(self) -> FleetState:
        return replace(FleetState.unknown(POOLS), batch_cap=one(self.cap))

    def check(self) -> list[Access]:
        return []

    def close(self) -> None:
        pass

    def routes(self, service: str) -> bool:
        return self.routing

    def follow(self, pool: PoolName, members: Mapping[str, str], leaving: Collection[str]) -> None:
        if self.fails:
            raise RuntimeError("HAProxy is down")
        back = sorted(self.draining & set(members) - set(leaving))
        self.log += [f"undrain {server}" for server in back]
        self.draining -= set(back)
        self.routed = set(members) - self.draining

    def refill(self, pool: PoolName, members: Mapping[str, str]) -> bool:
        if self.routed:
            return False
        self.routed = set(members)
        return True

    def drain(self, pool: PoolName, members: Mapping[str, str]) -> dict[str, int]:
        self.log += [f"drain {server}" for server in members if server not in self.draining]
        self.draining |= set(members)
        return {server: self.sessions.get(server, 0) for server in members}


@dataclass
class World:
    log: list[str] = field(default_factory=list)
    now_s: float = 0.0

    def __post_init__(self) -> None:
        self.replicas, self.caps = Replicas(self.log), Caps(self.log)
        self.actuator = CompositeActuator(self.replicas, self.caps, [SPEC], 60.0, lambda: self.now_s)

    def apply(self, replicas: int, cap: int) -> list[str]:
        """What happened in one tick."""
        self.log.clear()
        self.actuator.apply(Target(np.array([[replicas]]), np.array([[cap]])))
        self.route()
        return list(self.log)

    def route(self) -> None:
        self.actuator.route(np.array([True]), np.array([False]))


def test_more_of_both_happens_at_once() -> None:
    assert World().apply(4, 32) == ["cap 32", "replicas 4"]


def test_a_cap_falls_only_when_the_capacity_is_ready() -> None:
    world = World()
    assert world.apply(4, 8) == ["replicas 4"]
    assert world.apply(4, 8) == []
    world.replicas.ready = 4
    assert world.apply(4, 8) == ["cap 8"]


def test_capacity_falls_after_the_cap_has_risen_and_the_replica_is_empty() -> None:
    world = World()
    world.caps.sessions = {"r1": 3}
    assert world.apply(1, 32) == ["cap 32", "drain r1"]
    assert world.apply(1, 32) == []
    world.caps.sessions = {}
    assert world.apply(1, 32) == ["replicas 1"]
    assert world.replicas.preferred == ("r1",)


def test_a_replica_that_does_not_empty_is_waited_for_only_so_long() -> None:
    world = World()
    world.caps.sessions = {"r1": 1}
    assert world.apply(1, 16) == ["drain r1"]
    world.now_s = 59.0
    assert world.apply(1, 16) == []
    world.now_s = 60.0
    assert world.apply(1, 16) == ["replicas 1"]


def test_a_replica_that_is_wanted_again_gets_requests_again() -> None:
    world = World()
    world.caps.sessions = {"r1": 1}
    assert world.apply(1, 16) == ["drain r1"]
    assert world.apply(2, 16) == ["undrain r1"]
    assert world.replicas.target == 2


def test_a_replica_that_was_given_back_gets_no_request_until_it_is_gone() -> None:
    world = World()
    world.replicas.lags = True
    assert world.apply(1, 16) == ["drain r1", "replicas 1"]
    assert world.caps.routed == {"r0"}
    assert world.apply(1, 16) == []  # the pod is ready still
    assert world.caps.routed == {"r0"}
    world.replicas.ready = 1
    assert world.apply(1, 16) == []
    world.replicas.ready = 2  # another one by that name
    assert world.apply(2, 16) == ["replicas 2", "undrain r1"]
    assert world.caps.routed == {"r0", "r1"}


def test_of_several_that_were_given_back_those_that_are_there_still_get_no_request() -> None:
    world = World()
    world.replicas.target = world.replicas.ready = 4
    world.replicas.lags = True
    assert world.apply(2, 16) == ["drain r3", "drain r2", "replicas 2"]
    world.replicas.ready = 3  # r3 is gone, r2 will be
    assert world.apply(2, 16) == []
    assert world.caps.routed == {"r0", "r1"}


def test_each_scale_down_drains_its_own_victims_while_the_last_ones_are_there_still() -> None:
    world = World()
    world.replicas.target = world.replicas.ready = 3
    world.replicas.lags = True
    assert world.apply(2, 16) == ["drain r2", "replicas 2"]
    assert world.apply(1, 16) == ["drain r1", "replicas 1"]
    assert world.caps.routed == {"r0"}


def test_routing_follows_without_any_target_and_only_where_it_is_told_to() -> None:
    world = World()
    world.replicas.ready = 3
    world.actuator.route(np.array([False]), np.array([False]))
    assert world.caps.routed == set()
    world.route()
    assert world.caps.routed == {"r0", "r1", "r2"}


def test_a_controller_that_may_no_longer_scale_does_not_keep_replicas_out_of_routing() -> None:
    world = World()
    world.caps.sessions = {"r1": 1}
    world.apply(1, 16)
    world.now_s = 60.0
    world.route()
    assert world.caps.routed == {"r0"}
    world.now_s = 61.0
    world.route()
    assert world.caps.routed == {"r0", "r1"}


def test_nobody_is_asked_for_replicas_where_nothing_is_routed() -> None:
    world = World()
    world.caps.routing = False
    world.route()
    assert (world.replicas.asked, world.caps.routed) == (0, set())


def test_what_cannot_be_listed_is_not_given_back() -> None:
    world = World()
    world.replicas.unknown = True
    with pytest.raises(PartlyFailed, match="chat: its replicas cannot be listed"):
        world.actuator.apply(Target(np.array([[1]]), np.array([[16]])))
    assert world.replicas.target == 2


def test_nothing_is_drained_for_a_removal_that_would_be_refused() -> None:
    world = World()
    world.replicas.refuses = True
    for _ in range(2):
        with pytest.raises(PartlyFailed, match="chat: HTTP 403: may not patch pods"):
            world.apply(1, 16)
        assert (world.log, world.replicas.target) == ([], 2)
    world.replicas.refuses = False
    assert world.apply(1, 16) == ["drain r1", "replicas 1"]


def test_what_was_drained_is_routed_to_again_when_its_removal_fails() -> None:
    world = World()
    world.replicas.target = world.replicas.ready = 3
    world.replicas.lags = True
    assert world.apply(2, 16) == ["drain r2", "replicas 2"]
    world.replicas.fails = True
    with pytest.raises(PartlyFailed, match="chat: the API server is down"):
        world.apply(1, 16)
    world.route()
    assert world.caps.routed == {"r0", "r1"}  # r2 was given back before


def test_a_count_that_waits_for_a_drain_is_said_to_wait() -> None:
    world = World()
    world.caps.sessions = {"r1": 3}
    world.apply(1, 16)
    assert world.actuator.draining().tolist() == [[True]]
    world.caps.sessions = {}
    world.apply(1, 16)
    assert world.actuator.draining().tolist() == [[False]]


def test_a_cap_does_not_wait_for_replicas_that_never_come() -> None:
    world = World()
    world.replicas.target, world.replicas.ready = 4, 2
    assert world.apply(4, 8) == []
    world.replicas.stuck = 2
    assert world.apply(4, 8) == ["cap 8"]


@pytest.mark.parametrize("adrift", [False, True])
def test_an_empty_gateway_gets_the_replicas_that_were_last_known(adrift: bool) -> None:
    world, rows = World(), (np.array([not adrift]), np.array([adrift]))
    world.route()
    world.replicas.away, world.caps.routed = True, set()
    world.actuator.route(*rows)
    assert world.caps.routed == {"r0", "r1"}
    world.caps.routed = {"r1"}  # not empty: what is known is old
    world.actuator.route(*rows)
    assert world.caps.routed == {"r1"}


def test_an_empty_gateway_that_nobody_can_fill_is_named() -> None:
    world = World()
    world.replicas.away = True
    with pytest.raises(PartlyFailed, match="chat: its gateway has no server in service, and its replicas are not kno"):
        world.route()


def test_a_gateway_that_cannot_route_is_named() -> None:
    world = World()
    world.caps.fails = True
    with pytest.raises(PartlyFailed, match="chat: HAProxy is down"):
        world.route()


def test_capacity_stays_when_the_cap_could_not_be_set() -> None:
    world = World()
    world.caps.fails = True
    with pytest.raises(PartlyFailed, match="HAProxy is down"):
        world.actuator.apply(Target(np.array([[1]]), np.array([[32]])))
    assert world.replicas.target == 2


def test_a_failure_of_either_part_names_the_service() -> None:
    world = World()
    world.replicas.fails = True
    with pytest.raises(PartlyFailed) as failed:
        world.apply(4, 32)
    assert failed.value.failures == {"chat": "the API server is down"}
    assert world.caps.cap == 32


def test_a_service_to_be_left_alone_is_not_touched() -> None:
    assert World().apply(LEAVE_ALONE, 99) == []


def test_an_empty_gateway_is_not_filled_with_replicas_that_were_to_go() -> None:
    """The API server goes away and HAProxy restarts, while a replica is drained or after it was given back."""
    world = World()
    world.replicas.lags = True  # it is listed for a while after it was given back
    world.route()
    world.caps.sessions = {"r1": 3}
    world.apply(1, 32)
    for given_back in (False, True):
        if given_back:
            world.caps.sessions = {}
            assert "replicas 1" in world.apply(1, 32)
            world.now_s += 1000.0  # the drain is long over
        world.replicas.away, world.caps.routed = True, set()
        world.route()
        assert world.caps.routed == {"r0"}
        world.replicas.away = False
    world.replicas.lags, world.replicas.ready = False, 1
    world.route()
    assert not any(world.actuator._given_back.values())


def test_an_empty_gateway_is_filled_with_what_is_to_go_where_there_is_nothing_else() -> None:
    world = World()
    world.replicas.lags = True
    world.apply(0, 16)
    world.replicas.away, world.caps.routed = True, set()
    world.route()
    assert world.caps.routed == {"r0", "r1"}


def test_a_tick_that_leaves_a_service_alone_gives_nothing_back() -> None:
    world = World()
    world.caps.sessions = {"r1": 3}
    world.apply(1, 32)
    world.apply(LEAVE_ALONE, 32)
    assert not any(world.actuator._given_back.values())

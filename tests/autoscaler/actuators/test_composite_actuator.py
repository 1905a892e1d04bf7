"""The order in which replicas and caps move, so that no request is lost or left waiting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

    def apply(self, target: Target) -> None:
        if target.replicas[0, 0] in (LEAVE_ALONE, self.target):
            return
        if self.fails:
            raise ActuationFailed("the API server is down")
        self.log.append(f"replicas {target.replicas[0, 0]}")
        self.target = int(target.replicas[0, 0])
        self.ready = min(self.ready, self.target)

    def state(self) -> FleetState:
        return replace(FleetState.unknown(POOLS), replicas_target=one(self.target), replicas_ready=one(self.ready))

    def check(self) -> list[Access]:
        return []

    def close(self) -> None:
        pass

    def members(self) -> dict[str, dict[str, str]]:
        return {"chat": {f"r{number}": "address" for number in range(int(self.ready))}}

    def victims(self, pool: PoolName, count: int) -> list[str]:
        return [f"r{number}" for number in reversed(range(int(self.ready)))][:count]

    def prefer(self, pool: PoolName, replicas: Sequence[str]) -> None:
        self.preferred = tuple(replicas)


@dataclass
class Caps:
    """A gateway."""

    log: list[str]
    cap: float = 16
    sessions: dict[str, int] = field(default_factory=dict)
    draining: set[str] = field(default_factory=set)
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

    def follow(self, members: Mapping[str, Mapping[str, str]]) -> None:
        pass

    def drain(self, pool: PoolName, servers: Sequence[str]) -> dict[str, int]:
        self.log += [f"drain {server}" for server in servers if server not in self.draining]
        self.draining |= set(servers)
        return {server: self.sessions.get(server, 0) for server in servers}

    def undrain(self, pool: PoolName, servers: Sequence[str]) -> None:
        self.log += [f"undrain {server}" for server in servers]
        self.draining -= set(servers)


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
        return list(self.log)


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


def test_capacity_stays_when_the_cap_could_not_be_set() -> None:
    world = World()
    world.caps.fails = True
    with pytest.raises(PartlyFailed, match="HAProxy is down"):
        world.apply(1, 32)
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

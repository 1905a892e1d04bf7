"""What the peers share: a service seen as one pool of like replicas, and a count of replicas placed on the real pools.

Most autoscalers know one pool. They see the sums over a service's pools; the count that they answer is placed cheapest
pool first, which is what an operator would do by hand: a class of pools (spot, on-demand) gets its share, and inside a
class the pool with the lowest price per decoded token at its full batch is filled first. A service's minima come before
all. An unchanged count leaves every pool as it is.

Requests that wait at the gateway count as waiting in the engines: without a cap in front of them, that is where the
peers' own deployments have them. Peers do not cap the batch. A measurement that is missing is NaN, stays NaN through
the arithmetic of a rule, and an answer that is NaN holds.
This module must not know any peer's rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from policies.baselines.parameters import SPOT_SHARE, Parameter
from policies.baselines.windows import Tick
from policies.contract import Bools, Floats, Ints, Observation, Snapshot, Target
from policies.durable import Durable
from policies.fleet import Fleet
from policies.pool_arrays import any_pool, nan_to_num, sum_pools

NOMINAL_CONTEXT_TOKENS = 1000.0


@dataclass(frozen=True, eq=False, slots=True)
class Service:
    """One window of `n` services, each as one pool. All (n,); NaN means missing."""

    snapshot: Snapshot
    time_s: Floats
    current: Floats  # replicas asked for
    ready: Floats
    running: Floats  # requests in the engines' batches
    waiting: Floats  # requests in the engines' queues and at the gateway
    kv_usage: Floats  # mean over ready replicas, 0..1
    slots: Floats  # max_num_seqs of a mean replica
    kv_capacity: Floats  # tokens, of a mean replica
    minimum: Floats
    maximum: Floats

    @property
    def in_system(self) -> Floats:
        """Requests that run or wait."""
        return self.running + self.waiting

    @classmethod
    def of(cls, snapshot: Snapshot, fleet: Fleet, placed: Floats) -> Service:
        """The sums over the pools; `placed` (n, P) are the replicas asked for."""
        ready = snapshot.replicas_ready
        weight = np.where(sum_pools(placed)[:, np.newaxis] >= 0.5, placed, fleet.exists)
        weight = weight / np.maximum(sum_pools(weight), 1e-9)[:, np.newaxis]
        serving = sum_pools(ready)
        return cls(
            snapshot=snapshot,
            time_s=snapshot.time_s,
            current=sum_pools(placed),
            ready=serving,
            running=sum_pools(snapshot.running),
            waiting=sum_pools(snapshot.waiting) + snapshot.queue_requests,
            kv_usage=sum_pools(snapshot.kv_cache_usage * ready) / np.maximum(serving, 1.0),
            slots=np.maximum(sum_pools(weight * fleet.max_num_seqs), 1.0),
            kv_capacity=np.maximum(sum_pools(weight * fleet.kv_capacity), 1.0),
            minimum=sum_pools(fleet.min_replicas).astype(np.float64),
            maximum=sum_pools(fleet.max_replicas).astype(np.float64),
        )


class Placement:
    """Remembers the replicas last asked for, through windows in which the count is unknown."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self._last = np.zeros(fleet.exists.shape)

    def reset(self, rows: Bools) -> None:
        """Forget the masked services."""
        self._last[rows] = 0.0

    def current(self, snapshot: Snapshot) -> Floats:
        """(n, P) replicas asked for; where that is missing, the last that was known."""
        self._last = np.where(np.isnan(snapshot.replicas_target), self._last, snapshot.replicas_target)
        return self._last

    def target(self, replicas: Floats) -> Target:
        """Replicas (n, P) within the pools' bounds, with the engines' own batch limit; NaN keeps what is there."""
        fleet = self.fleet
        wanted = np.where(np.isnan(replicas), self._last, replicas)
        wanted = np.where(fleet.exists, np.clip(wanted, fleet.min_replicas, fleet.max_replicas), 0.0)
        return Target(replicas=wanted.astype(np.int64), batch_cap=fleet.max_num_seqs.astype(np.int64))


def token_price(fleet: Fleet) -> Floats:
    """(n, P) dollars per decoded token of a replica at its full batch; infinite for pools that are not there."""
    batch = np.maximum(fleet.max_num_seqs, 1.0)
    token_s = (fleet.a + fleet.c * batch + fleet.d * batch * NOMINAL_CONTEXT_TOKENS) / batch
    return np.where(fleet.exists, fleet.usd_per_replica_s * token_s, np.inf)


def spread(count: Floats, fleet: Fleet, spot_share: float) -> Ints:
    """Place `count` (n,) replicas on the pools (n, P): minima first, then the cheapest of each class.

    `spot_share` of the count, rounded down, goes to spot where both classes exist. What a class cannot take goes to the
    other; what nobody can take is dropped.
    """
    spot = fleet.is_spot & fleet.exists
    both = any_pool(spot) & any_pool(~fleet.is_spot & fleet.exists)
    count = np.ceil(count - 1e-9)
    on_demand = np.where(both, np.ceil((1.0 - spot_share) * count - 1e-9), np.where(any_pool(spot), 0.0, count))
    placed = np.where(fleet.exists, fleet.min_replicas, 0).astype(np.float64)
    order = np.argsort(token_price(fleet), axis=1, kind="stable")
    rows = np.arange(len(fleet))
    for by_class in (True, False):
        for rank in range(fleet.pools):
            pool = order[:, rank]
            cheap = spot[rows, pool]
            room = np.maximum(fleet.max_replicas[rows, pool] - placed[rows, pool], 0.0)
            left = count - sum_pools(placed)
            if by_class:
                have = sum_pools(np.where(spot == cheap[:, np.newaxis], placed, 0.0))
                left = np.minimum(left, np.where(cheap, count - on_demand, on_demand) - have)
            placed[rows, pool] += np.where(fleet.exists[rows, pool], np.clip(left, 0.0, room), 0.0)
    return placed.astype(np.int64)


class SinglePoolPolicy(Durable):
    """Base of the peers that answer with a count: the tick, the hold, the placement.

    A subclass answers `desired`, and forgets in `forget`.

    Args:
        fleet: the services.
        spot_share: share of the replicas on spot where it is offered, 0..1.
    """

    name = ""
    PARAMETERS: ClassVar[tuple[Parameter, ...]] = (SPOT_SHARE,)
    tick_s: ClassVar[float] = 15.0
    replaces: ClassVar[bool] = False
    """Whether the pools may change where the count does not."""

    def __init__(self, fleet: Fleet, spot_share: float = 0.5) -> None:
        self.spot_share = spot_share
        self.fleet = fleet
        self._placement = Placement(fleet)
        self._tick = Tick(len(fleet), self.tick_s)

    def reset(self, services: Bools | None = None) -> None:
        """Forget the history of the masked services, of all when None."""
        rows = np.ones(len(self.fleet), bool) if services is None else services
        self._placement.reset(rows)
        self._tick.reset(rows)
        self.forget(rows)

    def propose(self, observation: Observation) -> Target:
        """The rule's count where it is due and known, what is in force elsewhere; placed on the pools."""
        snapshot = observation.snapshot
        placed = self._placement.current(snapshot)
        service = Service.of(snapshot, self.fleet, placed)
        due = self._tick.due(snapshot.time_s, ~observation.blind)
        desired = self.desired(service, observation, due)
        desired = np.clip(desired, service.minimum, service.maximum)
        moved = due & ~np.isnan(desired) & (self.replaces | (desired != service.current))
        return self._placement.target(np.where(moved[:, np.newaxis], self.place(desired, service), placed))

    def desired(self, service: Service, observation: Observation, due: Bools) -> Floats:
        """The count (n,) that the rule wants; NaN holds. Rows that are not due are only seen, not decided."""
        raise NotImplementedError

    def place(self, desired: Floats, service: Service) -> Floats:
        """A whole count (n,) on the pools (n, P)."""
        return spread(nan_to_num(desired), self.fleet, self.spot_share).astype(np.float64)

    def forget(self, rows: Bools) -> None:
        """Begin anew with the masked services."""

"""Kubernetes' HorizontalPodAutoscaler v2 on concurrency per replica, with its default behaviour.

After the documented algorithm (autoscaling/v2): every 15 s ``desired = ceil(replicas * metric / target)``, no change
within a tolerance of 10 %, scale-up at most max(4 replicas, 100 %) per 15 s without stabilisation, scale-down over the
highest recommendation of the last 300 s, the size found at the start included. Replicas that are not ready report no
metric: they count as idle on the way up and at the target on the way down; a change of direction by that correction
means no change, and so does a window without metrics.
Left out: several metrics at once, container resource metrics, readiness initialisation periods.
"""

from __future__ import annotations

import numpy as np

from policies.contract import Bools, Floats, Observation, Target
from policies.fleet import Fleet

PERIOD_S = 15.0


class HpaPolicy:
    """Scales every pool on requests (running, waiting and a share of the gateway queue) per replica.

    Args:
        fleet: the services.
        target_share: target concurrency per replica as a share of the engine's `max_num_seqs`, 0..1.
        tolerance: relative deviation that changes nothing.
        stabilization_s: window of the scale-down stabilisation, seconds.
        max_up_replicas: replicas that one period may add.
        max_up_share: share of the pool that one period may add; the larger of both applies.
    """

    name = "hpa"

    def __init__(
        self,
        fleet: Fleet,
        target_share: float = 0.5,
        tolerance: float = 0.1,
        stabilization_s: float = 300.0,
        max_up_replicas: int = 4,
        max_up_share: float = 1.0,
    ) -> None:
        self.target_share = target_share
        self.tolerance = tolerance
        self.stabilization_s = stabilization_s
        self.max_up_replicas = max_up_replicas
        self.max_up_share = max_up_share
        self._fleet = fleet
        self._times_s: list[Floats] = []
        self._recommended: list[Floats] = []
        self._next_s = np.full(len(fleet), -np.inf)

    def reset(self, services: Bools | None = None) -> None:
        """Forget the recommendations of the masked services."""
        rows = np.ones(len(self._fleet), bool) if services is None else services
        for time_s in self._times_s:
            time_s[rows] = -np.inf
        self._next_s[rows] = -np.inf

    def propose(self, observation: Observation) -> Target:
        """One evaluation per 15 s period; in between the target stands."""
        snapshot = observation.snapshot
        current = np.nan_to_num(snapshot.replicas_target)
        due = (snapshot.time_s >= self._next_s - 1e-6) & ~snapshot.blind()
        first = due & np.isneginf(self._next_s)
        self._next_s = np.where(due, snapshot.time_s + PERIOD_S, self._next_s)
        recommended = np.where(due[:, np.newaxis], self._recommend(observation, current), current)

        # Stabilisation: the highest recommendation in the window, when it is below the current target. Only evaluations
        # are remembered, and at the first one the size that was found.
        self._times_s.append(np.where(due, snapshot.time_s, -np.inf))
        self._recommended.append(np.where(first[:, np.newaxis], np.maximum(recommended, current), recommended))
        while self._times_s and not (self._times_s[0] > snapshot.time_s - self.stabilization_s).any():
            self._times_s.pop(0)
            self._recommended.pop(0)
        highest = recommended
        for time_s, earlier in zip(self._times_s, self._recommended, strict=True):
            inside = (snapshot.time_s - time_s < self.stabilization_s) & (time_s <= snapshot.time_s)
            highest = np.where(inside[:, np.newaxis], np.maximum(highest, earlier), highest)
        desired = np.where(recommended < current, np.minimum(current, highest), recommended)
        most = current + np.maximum(self.max_up_replicas, np.ceil(current * self.max_up_share))
        desired = np.where(self._fleet.exists, np.minimum(desired, most), 0.0)
        return Target(
            replicas=np.clip(desired, self._fleet.min_replicas, self._fleet.max_replicas).astype(np.int64),
            batch_cap=self._fleet.max_num_seqs.astype(np.int64),
        )

    def _recommend(self, observation: Observation, current: Floats) -> Floats:
        """The rule itself, (n, P): usage over all replicas, corrected for those that are not ready."""
        snapshot, fleet = observation.snapshot, self._fleet
        ready = np.nan_to_num(snapshot.replicas_ready)
        share = np.where(fleet.exists, np.maximum(ready, 0.0), 0.0)
        total = np.maximum(share.sum(axis=1, keepdims=True), 1.0)
        queue = np.nan_to_num(snapshot.queue_requests)[:, np.newaxis] * share / total
        load = np.nan_to_num(snapshot.running) + np.nan_to_num(snapshot.waiting) + queue
        target = np.maximum(self.target_share * fleet.max_num_seqs, 1.0)
        ready_ratio = load / np.maximum(ready, 1.0) / target
        unready = np.maximum(current - ready, 0.0)
        # Not-ready replicas: no load on the way up, exactly the target on the way down.
        assumed = np.where(ready_ratio > 1.0, 0.0, target) * unready
        ratio = (load + assumed) / np.maximum(ready + unready, 1.0) / target
        flipped = (ratio - 1.0) * (ready_ratio - 1.0) < 0.0
        within = np.abs(ratio - 1.0) <= self.tolerance + 1e-9
        desired = np.ceil(ratio * np.maximum(ready + unready, 1.0) - 1e-9)
        return np.where(flipped | within, current, desired)

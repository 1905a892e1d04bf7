"""One replay: a policy on the simulated cluster through the controller that ships, until every request is judged.

Services run side by side, `n` wide: the seeds of a scenario, the settings that a study tries, the plans of a search.
A service's results do not depend on which others run beside it.
This module must not know what is done with the results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from autoscaler.controller import Controller, MetricsSource, Recorder
from envs.cluster.simulation import SimulatedCluster
from envs.traffic.trace import Trace
from policies.contract import Bools, Decision, Floats, Observation, Policy, Snapshot, Target
from policies.decider import Decider
from policies.fleet import Fleet
from policies.objective import Usage
from policies.spec import ScalingSpec
from training.replaying.scores import Bill, Verdicts, judge

DRAIN_S = 600.0
"""Requests in service at the end of the trace get at least this time to finish, seconds."""
DRAIN_STEP_S = 60.0


class NoRecorder:
    """Keeps nothing."""

    def record(self, decision: Decision) -> None:
        """Forget."""

    def conclude(self, decision: Decision) -> None:
        """Forget."""


class SideBySide:
    """One policy per service, each made for a fleet of that service alone; satisfies `Policy`.

    Args:
        policies: one per service.
    """

    name = "side-by-side"

    def __init__(self, policies: Sequence[Policy]) -> None:
        self._policies = list(policies)

    def reset(self, services: Bools | None = None) -> None:
        """Let the masked services' policies forget."""
        for index, policy in enumerate(self._policies):
            if services is None or services[index]:
                policy.reset()

    def propose(self, observation: Observation) -> Target:
        """Every policy's proposal for its own service."""
        targets = [policy.propose(_only(observation, index)) for index, policy in enumerate(self._policies)]
        return Target(
            replicas=np.concatenate([target.replicas for target in targets]),
            batch_cap=np.concatenate([target.batch_cap for target in targets]),
        )


_SNAPSHOT = tuple(item.name for item in fields(Snapshot))
_ENCODED = tuple(item.name for item in fields(Observation) if item.name != "snapshot")


def _only(observation: Observation, index: int) -> Observation:
    """The observation of one service alone: views, (1, ...)."""
    own = slice(index, index + 1)
    snapshot = observation.snapshot
    encoded: dict[str, Any] = {name: getattr(observation, name)[own] for name in _ENCODED}
    return Observation(snapshot=Snapshot(**{name: getattr(snapshot, name)[own] for name in _SNAPSHOT}), **encoded)


@dataclass(frozen=True, eq=False)
class Replay:
    """What a replay left behind.

    Attributes:
        specs: one per service.
        traces: one per service.
        cluster: drained.
        usage: cumulative, exactly as of the horizon.
        preemptions: (n,) as of the horizon.
        horizon_s: end of the billed time.
    """

    specs: Sequence[ScalingSpec]
    traces: Sequence[Trace]
    cluster: SimulatedCluster
    usage: Usage
    preemptions: Floats
    horizon_s: float

    def usd(self) -> Floats:
        """(n,) bill of every service, dollars, overhead included."""
        pools = self.cluster.arrays.pools
        return np.array([Bill(spec, pools).total_usd(self.usage, row) for row, spec in enumerate(self.specs)])

    def attainment(self) -> Floats:
        """(n,) share of arrivals that met both objectives."""
        share: Floats = self.cluster.usage().good / np.array([len(trace) for trace in self.traces])
        return share

    def verdicts(self, row: int) -> Verdicts:
        """Every request of one service judged; the replay must have been recorded."""
        trace, finish_s = self.traces[row], self.finish_s(row)
        first_token_s = self.cluster.arrays.first_token_s[self._own(row)]
        return judge(trace.arrival_s, first_token_s, finish_s, trace.output_tokens, self.specs[row].slo)

    def finish_s(self, row: int) -> Floats:
        """(requests,) finish times of one service, NaN when never; the replay must have been recorded."""
        finish: Floats = self.cluster.arrays.finish_s[self._own(row)]
        return finish

    def _own(self, row: int) -> slice:
        first = self.cluster.library.first
        return slice(int(first[row]), int(first[row + 1]))


class World:
    """Services ready to be replayed, and the fleet that a policy is made for.

    Args:
        specs: one per service; all share the interface and the guardrails of the first.
        traces: one per service.
        seeds: one per service, of cold starts and reclaims.
        record: keep first-token and finish times.
        believed: what the decision core takes the services for, one per service; what they are when left out.
    """

    def __init__(
        self,
        specs: Sequence[ScalingSpec],
        traces: Sequence[Trace],
        seeds: Sequence[int],
        record: bool = True,
        believed: Sequence[ScalingSpec] | None = None,
    ) -> None:
        self.specs, self.traces = list(specs), list(traces)
        self.cluster = SimulatedCluster.replay(self.specs, self.traces, seeds, record=record)
        self.source: MetricsSource = self.cluster
        self.fleet = Fleet.from_specs(believed or self.specs)
        interval_s = self.specs[0].interface.window.control_interval_s
        self.horizon_s = max(interval_s, *(trace.duration_s for trace in self.traces))

    def run(self, policy: Policy, recorder: Recorder | None = None) -> Replay:
        """Replay to the horizon and drain; once per world."""
        spec = self.specs[0]
        window = spec.interface.window
        controller = Controller(
            decider=Decider(self.fleet, window, spec.guardrails),
            policy=policy,
            source=self.source,
            actuator=self.cluster,
            clock=self.cluster,
            recorder=recorder or NoRecorder(),
            interval_s=window.control_interval_s,
        )
        controller.run(until_s=self.horizon_s)
        usage, preemptions = read_horizon(self.cluster, self.horizon_s)
        drain(self.cluster, self.horizon_s, self.specs, self.traces)
        return Replay(self.specs, self.traces, self.cluster, usage, preemptions, self.horizon_s)


def read_horizon(cluster: SimulatedCluster, horizon_s: float) -> tuple[Usage, Floats]:
    """Cumulative usage and (n,) preemptions exactly at the horizon.

    The cluster measures one metrics delay before the time that it is run to, so it is run that much further.
    """
    cluster.wait_until(max(horizon_s + cluster.window.metrics_delay_s, cluster.now_s))
    usage = cluster.usage()
    # The cluster's readings are views of arrays that the next window overwrites.
    copied = Usage(**{item.name: getattr(usage, item.name).copy() for item in fields(usage)})
    return copied, cluster.counter("preemptions").copy()


def drain(cluster: SimulatedCluster, horizon_s: float, specs: Sequence[ScalingSpec], traces: Sequence[Trace]) -> None:
    """Keep the clock running, without decisions, until every request is served or can only be a miss.

    A request that arrived at the horizon and meets both objectives is done once the TTFT objective and the time of its
    output at the pace of the TPOT objective have passed; whatever is unfinished by then has missed.
    """
    slowest_s = max(
        spec.slo.ttft_s + spec.slo.tpot_s * int(trace.output_tokens.max())
        for spec, trace in zip(specs, traces, strict=True)
    )
    limit_s = horizon_s + max(DRAIN_S, slowest_s)
    expected = np.array([len(trace) for trace in traces])
    while cluster.now_s < limit_s:
        usage = cluster.usage()
        if (usage.finished + usage.rejected >= expected).all():
            break
        cluster.wait_until(min(cluster.now_s + DRAIN_STEP_S, limit_s))

"""What goes wrong in the field but not in a tidy replay: each disturbance is a few small functions on one scenario.

A disturbance changes the world that is simulated, what the decision core believes of it, the traffic, or the metrics
on their way from the one to the other; everything else stays as the scenario says.
This module must not know about policies, nor how a run is scored.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from autoscaler.controller import Clock, MetricsSource
from envs.traffic.trace import Trace
from policies.contract import MetricsUnavailable, Snapshot
from policies.engine import ConfigError
from policies.spec import PoolSpec, ScalingSpec

ENGINE_ERROR = 0.25
LATE_S = 30.0
GAP_EVERY_S, GAP_S = 600.0, 60.0
STORMS_PER_DAY, STORM_SHARE = 144.0, 0.5
LENGTH_FACTOR = 3


def as_it_is(spec: ScalingSpec) -> ScalingSpec:
    """The service itself."""
    return spec


def steps_off(spec: ScalingSpec, error: float) -> ScalingSpec:
    """Every coefficient of every engine's step time off by a relative `error`."""

    def wrong(pool: PoolSpec) -> PoolSpec:
        coefficients = {name: value * (1.0 + error) for name, value in pool.engine.step.model_dump().items()}
        step = pool.engine.step.model_copy(update=coefficients)
        return pool.model_copy(update={"engine": pool.engine.model_copy(update={"step": step})})

    return _with_pools(spec, wrong)


def slow_starts(spec: ScalingSpec) -> ScalingSpec:
    """Every stage of a start takes twice as long."""

    def slow(pool: PoolSpec) -> PoolSpec:
        stages = {name: 2.0 * value for name, value in pool.start.model_dump().items()}
        return pool.model_copy(update={"cold_start": pool.start.model_copy(update=stages)})

    return _with_pools(spec, slow)


def stormy(spec: ScalingSpec) -> ScalingSpec:
    """Half of every spot pool is taken at once, every ten minutes on average."""

    def struck(pool: PoolSpec) -> PoolSpec:
        spot = pool.spot.model_copy(update={"storms_per_day": STORMS_PER_DAY, "storm_share": STORM_SHARE})
        return pool.model_copy(update={"spot": spot})

    return _with_pools(spec, struck)


def everybody(spec: ScalingSpec) -> bool:
    """Any service."""
    return True


def has_spot(spec: ScalingSpec) -> bool:
    """Whether any pool can be taken back."""
    return any(pool.price_class == "spot" for pool in spec.pools)


def _with_pools(spec: ScalingSpec, change: Callable[[PoolSpec], PoolSpec]) -> ScalingSpec:
    return spec.model_copy(update={"pools": tuple(change(pool) for pool in spec.pools)})


def as_it_came(trace: Trace) -> Trace:
    """The trace itself."""
    return trace


def longer(trace: Trace) -> Trace:
    """From the middle of the trace on one request in three stays, three times as long: about as many tokens in all."""
    late = trace.arrival_s >= trace.duration_s / 2
    kept = np.flatnonzero(~late | (np.cumsum(late) % LENGTH_FACTOR == 1))
    factor = np.where(late[kept], LENGTH_FACTOR, 1)
    columns = {name: getattr(trace, name)[kept] for name in ("arrival_s", "session_id", "tenant", "model")} | {
        name: getattr(trace, name)[kept] * factor for name in ("prompt_tokens", "output_tokens", "prefix_hit_tokens")
    }
    return replace(trace, **columns)


class Late:
    """A metrics source whose every answer is older than it should be; satisfies `MetricsSource`.

    Args:
        source: what answers in time.
        late_s: by how much later its answers arrive, seconds.
    """

    def __init__(self, source: MetricsSource, late_s: float) -> None:
        self._source = source
        self._late_s = late_s
        self._under_way: deque[Snapshot] = deque()

    def read(self) -> Snapshot:
        """The newest answer that has arrived.

        Raises:
            MetricsUnavailable: before the first one has.
        """
        latest = self._source.read()
        self._under_way.append(latest)
        arrived_s = latest.time_s[0] - self._late_s
        if self._under_way[0].time_s[0] > arrived_s:
            raise MetricsUnavailable("no answer has arrived yet")
        while len(self._under_way) > 1 and self._under_way[1].time_s[0] <= arrived_s:
            self._under_way.popleft()
        return self._under_way[0]


class Gappy:
    """A metrics source that is silent for the last `gap_s` of every `every_s` seconds; satisfies `MetricsSource`."""

    def __init__(self, source: MetricsSource, clock: Clock, every_s: float, gap_s: float) -> None:
        self._source = source
        self._clock = clock
        self._every_s = every_s
        self._speaks_s = every_s - gap_s

    def read(self) -> Snapshot:
        """The source's answer.

        Raises:
            MetricsUnavailable: in a gap.
        """
        if self._clock.now_s % self._every_s >= self._speaks_s:
            raise MetricsUnavailable("the metrics are silent")
        return self._source.read()


def in_time(source: MetricsSource, clock: Clock) -> MetricsSource:
    """The source itself."""
    return source


def late(source: MetricsSource, clock: Clock) -> MetricsSource:
    """Everything that the controller reads is half a minute older."""
    return Late(source, LATE_S)


def with_gaps(source: MetricsSource, clock: Clock) -> MetricsSource:
    """Nothing can be read for one minute of every ten."""
    return Gappy(source, clock, GAP_EVERY_S, GAP_S)


@dataclass(frozen=True)
class Disturbance:
    """What goes wrong.

    Attributes:
        name: in tables.
        meaning: one sentence without a full stop.
        world: the service as it is simulated and billed.
        believed: the service as the decision core takes it to be.
        traffic: what arrives.
        metrics: what stands between cluster and controller.
        concerns: whether a service can be hit by it at all.
    """

    name: str
    meaning: str
    world: Callable[[ScalingSpec], ScalingSpec] = as_it_is
    believed: Callable[[ScalingSpec], ScalingSpec] = as_it_is
    traffic: Callable[[Trace], Trace] = as_it_came
    metrics: Callable[[MetricsSource, Clock], MetricsSource] = in_time
    concerns: Callable[[ScalingSpec], bool] = everybody


NONE = Disturbance("none", "the scenario as it is")
DISTURBANCES = (
    NONE,
    Disturbance(
        "engine 25 % slower on paper",
        "the decision core computes with step times that are 25 % too high; the engines are as they were",
        believed=partial(steps_off, error=ENGINE_ERROR),
    ),
    Disturbance(
        "engine 25 % faster on paper",
        "the decision core computes with step times that are 25 % too low; the engines are as they were",
        believed=partial(steps_off, error=-ENGINE_ERROR),
    ),
    Disturbance(
        "cold starts doubled",
        "every stage of a start takes twice as long as the decision core is told",
        world=slow_starts,
    ),
    Disturbance(
        "metrics 30 s late", "everything that the controller reads is 30 s older than it was made for", metrics=late
    ),
    Disturbance("metrics missing", "nothing can be read for one minute of every ten", metrics=with_gaps),
    Disturbance(
        "reclaim storms",
        "half of the spot pool is taken at once, every ten minutes on average; only where there is one",
        world=stormy,
        concerns=has_spot,
    ),
    Disturbance(
        "lengths tripled",
        "from the middle of the trace on one request in three stays, three times as long, prompt and output",
        traffic=longer,
    ),
)


def named(names: list[str]) -> tuple[Disturbance, ...]:
    """The disturbances of these names, in the order of `DISTURBANCES`, after the scenario as it is; all for no names.

    Raises:
        ConfigError: when there is no disturbance of a name.
    """
    known = [disturbance.name for disturbance in DISTURBANCES]
    for name in names:
        if name not in known:
            raise ConfigError(f"no disturbance named {name!r}; there are: {', '.join(known)}")
    return tuple(
        disturbance for disturbance in DISTURBANCES if not names or disturbance is NONE or disturbance.name in names
    )

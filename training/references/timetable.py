"""Plans: targets written down beforehand, played through the controller like any other policy.

This module must not know how a plan is found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from policies.contract import Bools, Floats, Ints, Observation, Target
from policies.spec import GuardrailSpec, ScalingSpec, WindowSpec


@dataclass(frozen=True, eq=False)
class Timetable:
    """What one service asks for at every tick.

    Attributes:
        replicas: (ticks, P) targets; tick 0 is one control interval after the start, the last row stays in force.
        batch_cap: (P,) constant caps.
    """

    replicas: Ints
    batch_cap: Ints


class TimetablePolicy:
    """Plays one timetable per service.

    Args:
        timetables: of equal shape, one per service.
        window: control interval and metrics delay: which tick it is follows from the time of the measurement.
    """

    name = "timetable"

    def __init__(self, timetables: Sequence[Timetable], window: WindowSpec) -> None:
        self._replicas = np.stack([table.replicas for table in timetables])
        self._batch_cap = np.stack([table.batch_cap for table in timetables])
        self._window = window

    def reset(self, services: Bools | None = None) -> None:
        """Nothing to forget."""

    def propose(self, observation: Observation) -> Target:
        """The row of this tick."""
        n, ticks, _ = self._replicas.shape
        time_s: Floats = observation.snapshot.time_s + self._window.metrics_delay_s
        tick = np.rint(time_s / self._window.control_interval_s).astype(np.int64) - 1
        return Target(
            replicas=self._replicas[np.arange(n), np.clip(tick, 0, ticks - 1)],
            batch_cap=self._batch_cap.copy(),
        )


def unguarded(spec: ScalingSpec) -> ScalingSpec:
    """The spec without the guardrails that slow a target down or raise it; bounds and the GPU budget stay.

    A plan knows what comes, so it needs no caution; and a reference must be what its name says: a constant fleet must
    stay constant.
    """
    free = GuardrailSpec(
        max_scale_up_factor=1e6,
        max_scale_up_step=1_000_000,
        max_scale_down_share=1.0,
        scale_down_cooldown_s=0.0,
        scale_down_window_s=0.0,
        scale_down_worth_s=0.0,
        hold_down_while_burning=False,
        hold_down_while_starting=False,
        backlog_boost=False,
        gpu_budget=spec.guardrails.gpu_budget,
    )
    return spec.model_copy(update={"guardrails": free})


def starting_at(spec: ScalingSpec, replicas: Ints) -> ScalingSpec:
    """The spec with `replicas` (P,) ready at time 0, where a pool leaves `initial_replicas` unset."""
    pools = tuple(
        pool
        if pool.initial_replicas is not None
        else pool.model_copy(update={"initial_replicas": int(np.clip(size, pool.min_replicas, pool.max_replicas))})
        for pool, size in zip(spec.pools, replicas, strict=True)
    )
    return spec.model_copy(update={"pools": pools})

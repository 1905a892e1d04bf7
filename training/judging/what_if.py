"""What if: one trace of the user's own, under policies, over cold starts and objectives.

This module must not know how results are shown.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from envs.cluster.library import RequestLibrary
from envs.randomization import steady_demand
from envs.traffic.formats import import_trace
from policies.engine import ColdStart, EngineProfile
from policies.fleet import Fleet
from policies.spec import PoolSpec, ScalingSpec, Slo, find_engine, shipped_configs
from training.replaying.scenarios import Scenario, Suite, TraceSource

DEFAULT_ENGINE, DEFAULT_TTFT_S, DEFAULT_TPOT_S, DEFAULT_ATTAINMENT = "llama-3.1-8b-h100", 3.0, 0.08, 0.95
"""The service where nothing is said."""
BUSIEST_S = 300.0
ROOM = 3.0
"""`max_replicas` over the mean demand of the busiest five minutes, where it is not given."""


@dataclass(frozen=True)
class Sweep:
    """What to vary: one scenario for every combination.

    Attributes:
        cold_start_s: seconds from the request for a replica to its first request; None leaves the profile's.
        ttft_s: objectives on the time to first token, seconds.
        tpot_s: objectives on the time per output token, seconds.
        attainment: share of arrivals that must meet both.
    """

    cold_start_s: tuple[float, ...] | tuple[None]
    ttft_s: tuple[float, ...]
    tpot_s: tuple[float, ...]
    attainment: float


def suite_of(
    trace: Path,
    engine: EngineProfile,
    sweep: Sweep,
    max_replicas: int | None = None,
    train: float | None = None,
) -> Suite:
    """The sweep as a suite, named after the trace; every scenario starts with the fleet that the first minutes need.

    Args:
        trace: request log in any format that `jevons trace import` reads.
        engine: profile of the one pool.
        sweep: what to vary.
        max_replicas: most replicas; three times the demand of the busiest five minutes when None.
        train: share of the trace, from its start, to tune policies on; the rest is judged. All is judged when None.

    Raises:
        TraceError: when the trace cannot be used.
        ValueError: when `train` is not between 0 and 1.
    """
    if train is not None and not 0 < train < 1:
        raise ValueError(f"the share to tune on must be between 0 and 1, got {train:g}")
    requests = import_trace(trace).trace
    cut_s = None if train is None else train * requests.duration_s
    scenarios = []
    for cold_start_s, ttft_s, tpot_s in itertools.product(sweep.cold_start_s, sweep.ttft_s, sweep.tpot_s):
        slo = Slo(ttft_s=ttft_s, tpot_s=tpot_s, attainment=sweep.attainment)
        started = engine.cold_start if cold_start_s is None else stretched(engine.cold_start, cold_start_s)
        first, busiest = replicas_needed(engine, slo, RequestLibrary.of([requests]), requests.duration_s)
        largest = max_replicas or max(2, math.ceil(ROOM * busiest))
        scenarios.append(
            Scenario(
                name=_name(sweep, started.total_s, ttft_s, tpot_s),
                description=f"{trace.name} on {engine.name}",
                trace=TraceSource(file=trace),
                pools=(
                    PoolSpec(
                        engine=engine,
                        max_replicas=largest,
                        initial_replicas=min(largest, max(1, math.ceil(ROOM / 2 * first))),
                        cold_start=started,
                    ),
                ),
                slo=slo,
                slice=None if cut_s is None else (cut_s, requests.duration_s),
                train_slice=None if cut_s is None else (0.0, cut_s),
            )
        )
    return Suite(name=f"what if: {trace.name}", scenarios=tuple(scenarios))


def default_scenario(trace: Path) -> Scenario:
    """A trace on the service that is assumed where nothing is said.

    Raises:
        TraceError: when the trace cannot be used.
    """
    sweep = Sweep((None,), (DEFAULT_TTFT_S,), (DEFAULT_TPOT_S,), DEFAULT_ATTAINMENT)
    (scenario,) = suite_of(trace, find_engine(DEFAULT_ENGINE, shipped_configs()), sweep).scenarios
    return scenario


def stretched(start: ColdStart, total_s: float) -> ColdStart:
    """The same stages, stretched to a total; all of it is the load where the profile has none."""
    if start.total_s <= 0:
        return ColdStart(node_s=0, image_s=0, weights_s=total_s, warmup_s=0)
    factor = total_s / start.total_s
    return ColdStart(
        node_s=start.node_s * factor,
        image_s=start.image_s * factor,
        weights_s=start.weights_s * factor,
        warmup_s=start.warmup_s * factor,
    )


def replicas_needed(engine: EngineProfile, slo: Slo, library: RequestLibrary, duration_s: float) -> tuple[float, float]:
    """Replicas that the first and the busiest five minutes need when their work comes evenly."""
    span_s = min(BUSIEST_S, max(duration_s, 1.0))
    starts = np.arange(0.0, max(duration_s, 1.0), span_s)
    first, end = library.rows(np.zeros(len(starts), np.int64), np.array([starts, starts + span_s]))
    spec = ScalingSpec(slo=slo, pools=(PoolSpec(engine=engine, max_replicas=1),))
    fleet = Fleet.from_specs([spec] * len(starts))
    demand = steady_demand(fleet, library.totals(first, end), np.full(len(starts), span_s))[:, 0]
    return float(demand[0]), float(demand.max())


def _name(sweep: Sweep, cold_start_s: float, ttft_s: float, tpot_s: float) -> str:
    parts = [f"cold start {cold_start_s:g} s", f"TTFT {ttft_s:g} s"]
    if len(sweep.tpot_s) > 1:
        parts.append(f"TPOT {tpot_s * 1000:g} ms")
    return ", ".join(parts)


def numbers(option: str, text: str | None, default: Sequence[float]) -> tuple[float, ...]:
    """The numbers of a comma-separated option.

    >>> numbers("--ttft", "1,3", [])
    (1.0, 3.0)

    Raises:
        ValueError: when one is not a number above 0.
    """
    if text is None:
        return tuple(default)
    found = []
    for word in text.split(","):
        try:
            number = float(word)
        except ValueError:
            number = math.nan
        if not 0 < number < math.inf:
            raise ValueError(f"{option}: expected numbers above 0, separated by commas, got {word.strip()!r}")
        found.append(number)
    return tuple(dict.fromkeys(found))

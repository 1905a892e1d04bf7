"""The references as rows of the table: the bound computed, plan and best static fleet searched once and kept.

``bound``: no policy that holds the SLO can be cheaper (`fluid_bound`). ``plan``: what a controller that knew the
traffic would have done, proved in the simulator (`clairvoyant`). ``best-static``: the smallest constant fleet that
holds the SLO, known in hindsight. bound <= plan <= best-static, where the plan holds.
This module must not know about policies.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from envs.traffic.trace import Trace
from training.references.clairvoyant import Bench, Trial, best_static, find_plan
from training.references.fluid_bound import Unservable, fluid_bound
from training.references.timetable import Timetable, TimetablePolicy, starting_at, unguarded
from training.replaying.result_cache import ResultCache, scenario_key
from training.replaying.scenarios import Scenario
from training.replaying.scores import Score, unscored
from training.replaying.timeline import Timeline
from training.replaying.world import World

PLAN_REPLAYS = 400
"""Replays that the search for one plan may take, about."""
WIDTH = 16


def find(scenario: Scenario, trace: Trace, seed: int, cache: ResultCache) -> dict[str, Timetable]:
    """The plan and the best static fleet of one seed, from the cache where they are there."""
    key = {**scenario_key(scenario, {seed: trace.digest()}), "replays": PLAN_REPLAYS, "width": WIDTH}
    known = cache.get("plan", key)
    if known is None:
        bench = Bench(scenario.spec, trace, seed, WIDTH)
        static = best_static(bench)
        plan = find_plan(bench, static, bench.replays + PLAN_REPLAYS)
        known = {"plan": _plain(plan), "best-static": _plain(static)}
        cache.put("plan", key, known)
    return {
        name: Timetable(np.array(found["replicas"], np.int64), np.array(found["batch_cap"], np.int64))
        for name, found in known.items()
    }


def _plain(trial: Trial) -> dict[str, Any]:
    return {"replicas": trial.plan.replicas.tolist(), "batch_cap": trial.plan.batch_cap.tolist()}


def bound_scores(scenario: Scenario, traces: Sequence[Trace]) -> tuple[Score, ...]:
    """The row of the fluid bound for every seed: dollars and replica-hours, and nothing that only a run could have.

    Dollars are per token of the whole trace, so that they are a bound too.
    """
    scores = []
    for trace, seed in zip(traces, scenario.seeds, strict=True):
        started_s = time.perf_counter()
        horizon_s = max(scenario.control_interval_s, trace.duration_s)
        row = unscored(scenario.name, "bound", seed, trace, horizon_s)
        try:
            bound = fluid_bound(scenario.spec, trace, horizon_s)
        except Unservable:
            scores.append(row)
            continue
        per_mtok = 1e6 / float(trace.prompt_tokens.sum(dtype=np.int64) + trace.output_tokens.sum(dtype=np.int64))
        scores.append(
            row.with_cost(bound.usd, bound.usd * per_mtok, bound.replica_hours, time.perf_counter() - started_s)
        )
    return tuple(scores)


def timetable_world(scenario: Scenario, traces: Sequence[Trace], plans: Sequence[Timetable]) -> World:
    """The seeds of a scenario side by side, each starting where its plan starts."""
    spec = unguarded(scenario.spec)
    return World([starting_at(spec, plan.replicas[0]) for plan in plans], traces, scenario.seeds)


def timetable_policy(scenario: Scenario, plans: Sequence[Timetable]) -> TimetablePolicy:
    """The policy that plays the plans of all seeds, padded to one length."""
    ticks = max(len(plan.replicas) for plan in plans)
    padded = [
        Timetable(np.pad(plan.replicas, ((0, ticks - len(plan.replicas)), (0, 0)), mode="edge"), plan.batch_cap)
        for plan in plans
    ]
    return TimetablePolicy(padded, scenario.spec.interface.window)


def no_timeline(pools: tuple[str, ...]) -> Timeline:
    """The timeline of what was never run."""
    nothing, by_pool = np.zeros(0), np.zeros((0, len(pools)))
    whole, whole_by_pool = np.zeros(0, np.int64), np.zeros((0, len(pools)), np.int64)
    return Timeline(
        pools=pools,
        time_s=nothing,
        arrival_rps=nothing,
        token_rate_tps=nothing,
        queue_requests=nothing,
        running=nothing,
        oldest_wait_s=nothing,
        ttft_attainment=nothing,
        tpot_attainment=nothing,
        ready=by_pool,
        starting=by_pool,
        draining=by_pool,
        target=whole_by_pool,
        batch_cap=whole_by_pool,
        usd=nothing,
        reasons=whole,
        scaled=np.zeros(0, bool),
    )

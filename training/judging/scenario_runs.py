"""One piece of an evaluation: a scenario under one policy, all seeds side by side, or under its references.

This module must not know which pieces there are, nor where they run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from policies.contract import Policy
from policies.fleet import Fleet
from policies.lineup import Entry, build, starting_spec
from policies.spec import InterfaceSpec
from training.references.oracle import bound_scores, find, no_timeline, timetable_policy, timetable_world
from training.references.timetable import Timetable
from training.replaying.disturbances import NONE, Disturbance
from training.replaying.result_cache import ResultCache
from training.replaying.scenarios import Scenario, traces_of
from training.replaying.scores import REFERENCE, Bill, Score, score
from training.replaying.timeline import FIRST, Timeline, TimelineRecorder
from training.replaying.world import World

Maker = Callable[[Entry, Fleet, InterfaceSpec], Policy]
DEFAULT = "default"
"""`tuned` of a policy whose parameters are those of its reference."""


class Variant(NamedTuple):
    """A policy as it is run on one scenario: what was asked for, how it was tuned, and the settings that came of it."""

    policy: str
    tuned: str
    entry: Entry


class ScenarioRun(NamedTuple):
    """One scenario under one policy, all seeds side by side."""

    scores: tuple[Score, ...]
    timeline: Timeline
    trace_digests: tuple[str, ...]


def label(policy: str, tuned: str) -> str:
    """How a policy is called where its tuning must be told too.

    >>> label("hpa", "train"), label("hpa", "default"), label("plan", "reference")
    ('hpa (train)', 'hpa', 'plan')
    """
    return policy if tuned in {DEFAULT, REFERENCE} else f"{policy} ({tuned})"


def run_scenario(
    scenario: Scenario,
    entry: Entry,
    policy: str | None = None,
    tuned: str = DEFAULT,
    disturbance: Disturbance = NONE,
    make: Maker = build,
) -> ScenarioRun:
    """Replay all seeds of a scenario side by side under one policy, and score them.

    Args:
        scenario: what to judge on.
        entry: the policy.
        policy: name in the table; the entry's reference when None.
        tuned: how its settings came about.
        disturbance: what goes wrong meanwhile.
        make: builds the policy; an ablation builds parts of it.
    """
    started_s = time.perf_counter()
    spec = starting_spec(entry, scenario.spec)
    traces = [disturbance.traffic(trace) for trace in traces_of(scenario)]
    believed = [disturbance.believed(spec)] * len(traces)
    world = World([disturbance.world(spec)] * len(traces), traces, scenario.seeds, believed=believed)
    world.source = disturbance.metrics(world.source, world.cluster)
    built = make(entry, world.fleet, spec.interface)
    return score_run(world, built, scenario, policy or entry.reference, tuned, started_s)


def run_references(scenario: Scenario, names: Sequence[str], cache: ResultCache) -> list[ScenarioRun]:
    """The runs of the named references, in order."""
    traces = traces_of(scenario)
    digests = tuple(trace.digest() for trace in traces)
    runs = []
    plans: list[dict[str, Timetable]] = []
    for name in names:
        started_s = time.perf_counter()
        if name == "bound":
            nothing = no_timeline(tuple(pool.label for pool in scenario.spec.pools))
            runs.append(ScenarioRun(bound_scores(scenario, traces), nothing, digests))
            continue
        plans = plans or [
            find(scenario, trace, seed, cache) for trace, seed in zip(traces, scenario.seeds, strict=True)
        ]
        chosen = [plan[name] for plan in plans]
        world = timetable_world(scenario, traces, chosen)
        runs.append(score_run(world, timetable_policy(scenario, chosen), scenario, name, REFERENCE, started_s))
    return runs


def run_work(scenario: Scenario, what: Variant | tuple[str, ...], cache: ResultCache) -> list[ScenarioRun]:
    """One piece of work of an evaluation."""
    if isinstance(what, Variant):
        return [run_scenario(scenario, what.entry, what.policy, what.tuned)]
    return run_references(scenario, what, cache)


def score_run(world: World, policy: Policy, scenario: Scenario, name: str, tuned: str, started_s: float) -> ScenarioRun:
    """Replay a world whose services are the seeds of a scenario, and score them under the name `name`."""
    spec = world.specs[0]
    bill = Bill(spec, world.cluster.arrays.pools)
    recorder = TimelineRecorder(
        tuple(pool.label for pool in spec.pools), spent_usd=lambda: bill.total_usd(world.cluster.usage(), FIRST)
    )
    replay = world.run(policy, recorder)
    timeline = recorder.timeline()
    wall_s = (time.perf_counter() - started_s) / len(world.traces)
    scores = []
    for row, (trace, seed) in enumerate(zip(world.traces, scenario.seeds, strict=True)):
        scored = score(
            spec,
            trace,
            replay.usage,
            row,
            replay.verdicts(row),
            replay.finish_s(row),
            int(replay.preemptions[row]),
            replay.horizon_s,
            (scenario.name, name, tuned, seed),
        )
        ticks = timeline.reason_counts() if row == 0 else {}
        scores.append(replace(scored, wall_s=wall_s, guardrail_ticks=ticks))
    return ScenarioRun(tuple(scores), timeline, tuple(trace.digest() for trace in world.traces))

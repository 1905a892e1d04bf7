"""The same policy on the same scenarios under several treatments: what each changes, beside the first one.

A treatment is a disturbance of the scenario (`training.replaying.disturbances`) or an ablation of the policy
(`training.judging.ablations`).
This module must not know which, nor how figures are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from policies.contract import Floats
from policies.lineup import build
from training.judging.evaluate import BOOTSTRAP_RESAMPLES, describe, describe_policy, versions
from training.judging.scenario_runs import Maker, ScenarioRun, Variant, run_scenario
from training.replaying.disturbances import NONE, Disturbance
from training.replaying.scenarios import Scenario, Suite
from training.replaying.scores import Score
from training.replaying.workers import Progress, Workers

Interval = tuple[float, float, float]
"""A mean and its bootstrap interval, 2.5 and 97.5 %."""


class Treatment(NamedTuple):
    """What is done to a run, by the words of `training.judging.scenario_runs.run_scenario`; `meaning` is for tables."""

    name: str
    meaning: str
    disturbance: Disturbance = NONE
    make: Maker = build


class Work(NamedTuple):
    """One piece of work: a scenario under one policy and one treatment."""

    treatment: Treatment
    scenario: Scenario
    variant: Variant


@dataclass(frozen=True)
class Comparison:
    """One policy under one treatment, over those scenarios of one group that the treatment concerns.

    Attributes:
        group: of scenarios.
        policy: reference as asked for.
        tuned: how its settings came about.
        treatment: name.
        scenarios: that the treatment concerns.
        held: those whose SLO the policy held.
        held_before: those that it held under the first treatment.
        attainment: mean over the scenarios, 0..1.
        attainment_change: of that mean against the first treatment, with its bootstrap interval.
        cost_ratio: dollars over those under the first treatment, geometric mean over the scenarios held both times,
            with its bootstrap interval; None where there is none.
        scale_events_per_hour: mean over the scenarios.
        scale_events_per_hour_before: the same under the first treatment.
    """

    group: str
    policy: str
    tuned: str
    treatment: str
    scenarios: int
    held: int
    held_before: int
    attainment: float
    attainment_change: Interval
    cost_ratio: Interval | None
    scale_events_per_hour: float
    scale_events_per_hour_before: float


@dataclass(frozen=True)
class Comparisons:
    """What the pieces of work under several treatments found.

    Attributes:
        suite: its name.
        treatments: name and meaning of each; the first is what the others are compared with.
        comparisons: in the order of the work.
        rows: one per treatment, scenario, policy and seed: the treatment, and the score as in `Score.row`.
        scenarios: what each scenario was, see `training.judging.evaluate.describe`.
        policies: reference and digest of the bundle.
        versions: what the figures depend on.
    """

    suite: str
    treatments: tuple[dict[str, str], ...]
    comparisons: tuple[Comparison, ...]
    rows: tuple[dict[str, Any], ...]
    scenarios: tuple[dict[str, Any], ...]
    policies: tuple[dict[str, Any], ...]
    versions: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Everything, ready for `json.dumps`."""
        return asdict(self)


def run_treatments(
    suite: Suite,
    work: Sequence[Work],
    workers: Workers,
    on_progress: Progress = lambda done, total, label: None,
    group_of: Callable[[Scenario], str] = lambda scenario: "all",
) -> Comparisons:
    """Run every piece of work and compare; the result does not depend on the workers.

    Args:
        suite: the scenarios.
        work: for each, there is one of the same scenario and policy under the first treatment among them.
        workers: where they run.
        on_progress: told after each piece.
        group_of: the group that a scenario is summed up in.
    """
    for index, (treatment, scenario, variant) in enumerate(work):
        task = (scenario, variant.entry, variant.policy, variant.tuned, treatment.disturbance, treatment.make)
        workers.submit(index, run_scenario, *task)
    runs: dict[int, ScenarioRun] = {}
    for done in range(1, len(work) + 1):
        index, runs[index] = workers.next_done()
        treatment, scenario, variant = work[index]
        on_progress(done, len(work), f"{scenario.name} / {variant.policy} / {treatment.name}")
    scores = [runs[index].scores for index in range(len(work))]
    digests = {item.scenario.name: runs[index].trace_digests for index, item in reversed(list(enumerate(work)))}
    entries = {item.variant.policy: item.variant.entry for item in work}
    return Comparisons(
        suite=suite.name,
        treatments=tuple(
            {"name": name, "meaning": meaning}
            for name, meaning in dict.fromkeys((item.treatment.name, item.treatment.meaning) for item in work)
        ),
        comparisons=tuple(compare(work, scores, group_of)),
        rows=tuple(
            {"treatment": item.treatment.name, **row.row()}
            for item, rows in zip(work, scores, strict=True)
            for row in rows
        ),
        scenarios=tuple(describe(item, digests[item.name], ()) for item in suite.scenarios if item.name in digests),
        policies=tuple({**describe_policy(entry), "policy": name} for name, entry in entries.items()),
        versions=versions(),
    )


def compare(
    work: Sequence[Work], scores: Sequence[tuple[Score, ...]], group_of: Callable[[Scenario], str]
) -> list[Comparison]:
    """Sum up the scores of every piece of work, all seeds, by group, policy and treatment."""
    first = work[0].treatment.name
    before: dict[tuple[str, str, str], tuple[Score, ...]] = {}
    members: dict[tuple[str, str, str, str], list[tuple[Scenario, tuple[Score, ...]]]] = {}
    for (treatment, scenario, variant), rows in zip(work, scores, strict=True):
        if treatment.name == first:
            before[scenario.name, variant.policy, variant.tuned] = rows
        key = (group_of(scenario), variant.policy, variant.tuned, treatment.name)
        members.setdefault(key, []).append((scenario, rows))
    return [
        _comparison(key, [(scenario, before[scenario.name, key[1], key[2]], rows) for scenario, rows in runs])
        for key, runs in members.items()
    ]


def _comparison(
    key: tuple[str, str, str, str], runs: Sequence[tuple[Scenario, tuple[Score, ...], tuple[Score, ...]]]
) -> Comparison:
    """One comparison of runs (scenario, scores before, scores under the treatment)."""
    held_before = [_mean(before, "attainment") >= scenario.slo.attainment for scenario, before, _ in runs]
    held = [_mean(after, "attainment") >= scenario.slo.attainment for scenario, _, after in runs]
    changes = [_column(after, "attainment") - _column(before, "attainment") for _, before, after in runs]
    logs = [
        np.log(_column(after, "usd") / _column(before, "usd"))
        for (_, before, after), then, now in zip(runs, held_before, held, strict=True)
        if then and now
    ]
    return Comparison(
        *key,
        scenarios=len(runs),
        held=sum(held),
        held_before=sum(held_before),
        attainment=float(np.mean([_mean(after, "attainment") for _, _, after in runs])),
        attainment_change=two_level_bootstrap(changes),
        cost_ratio=_exp(two_level_bootstrap(logs)) if logs else None,
        scale_events_per_hour=float(np.mean([_mean(after, "scale_events_per_hour") for _, _, after in runs])),
        scale_events_per_hour_before=float(np.mean([_mean(before, "scale_events_per_hour") for _, before, _ in runs])),
    )


def two_level_bootstrap(groups: Sequence[Floats]) -> Interval:
    """Mean over groups (scenarios) of the means over their members (seeds), and its bootstrap interval.

    Groups are drawn anew, and in every drawn group its members.

    >>> two_level_bootstrap([np.array([1.0, 3.0]), np.array([4.0])])[0]
    3.0
    """
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(groups), size=(BOOTSTRAP_RESAMPLES, len(groups)))
    means = np.zeros(drawn.shape)
    for index, values in enumerate(groups):
        members = rng.integers(len(values), size=(*drawn.shape, len(values)))
        means = np.where(drawn == index, values[members].mean(axis=-1), means)
    low, high = np.percentile(means.mean(axis=1), (2.5, 97.5))
    return float(np.mean([values.mean() for values in groups])), float(low), float(high)


def _exp(interval: Interval) -> Interval:
    mean, low, high = np.exp(interval)
    return float(mean), float(low), float(high)


def _column(rows: Sequence[Score], name: str) -> Floats:
    return np.array([getattr(row, name) for row in rows], np.float64)


def _mean(rows: Sequence[Score], name: str) -> float:
    return float(_column(rows, name).mean())

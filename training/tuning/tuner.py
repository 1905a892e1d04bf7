"""Tuning: the settings of a policy that serve a slice of traffic at the lowest cost while holding the SLO.

Every policy gets the same: a study (`studies`) over its declared parameters (`policies.baselines.parameters`).
Studies that are cut off are resumed; results are kept by digest.

Tuning on the *train* slice is what an operator can do; tuning on the test slice itself (*hindsight*) is an advantage
that no operator has.
This module must not know which policies there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from policies.baselines.parameters import Parameter, Setting
from policies.fleet import Fleet
from policies.lineup import build, resolve, starting_spec, tunable_parameters
from training.replaying.result_cache import ResultCache, scenario_key
from training.replaying.scenarios import Scenario, trace_digests, traces_of
from training.replaying.workers import Progress, Workers
from training.replaying.world import SideBySide, World
from training.tuning.studies import Search, Store, trials_for

Part = Literal["train", "hindsight"]


@dataclass(frozen=True)
class TuningTask:
    """A policy to tune on a scenario's slice."""

    scenario: Scenario
    policy: str
    part: Part


@dataclass(frozen=True)
class Tuning:
    """What tuning found.

    Attributes:
        scenario: its name.
        policy: the reference that was tuned.
        part: slice that it was tuned on.
        settings: of the best trial.
        attainment: on the slice, mean over seeds.
        usd: on the slice, mean over seeds.
        holds_slo: whether any setting held the SLO; else `settings` is the one with the highest attainment.
        trials: settings that were run.
        edges: parameters whose best value still lies on an edge of what was searched, and where.
    """

    scenario: str
    policy: str
    part: Part
    settings: dict[str, Setting]
    attainment: float
    usd: float
    holds_slo: bool
    trials: int
    edges: tuple[str, ...]


def parameters_for(policy: str, scenario: Scenario) -> tuple[Parameter, ...]:
    """The parameters of a policy that matter on a scenario; none for a policy that has none or names its own."""
    classes = {pool.price_class for pool in scenario.pools}
    return tuple(item for item in tunable_parameters(policy) if not item.needs_spot or len(classes) > 1)


def try_settings(scenario: Scenario, references: Sequence[str]) -> list[tuple[float, float]]:
    """Mean attainment and dollars over the seeds of each policy reference, all replayed side by side."""
    traces = traces_of(scenario)
    specs, policies = [], []
    for reference in references:
        entry = resolve(reference)
        spec = starting_spec(entry, scenario.spec)
        for _ in traces:
            specs.append(spec)
            policies.append(build(entry, Fleet.from_specs([spec]), spec.interface))
    seeds = list(scenario.seeds) * len(references)
    replay = World(specs, list(traces) * len(references), seeds, record=False).run(SideBySide(policies))
    attainment = replay.attainment().reshape(len(references), -1).mean(axis=1)
    usd = replay.usd().reshape(len(references), -1).mean(axis=1)
    return [(float(share), float(cost)) for share, cost in zip(attainment, usd, strict=True)]


def tune(
    tasks: Sequence[TuningTask],
    workers: Workers,
    cache: ResultCache,
    on_progress: Progress = lambda done, total, label: None,
) -> list[Tuning]:
    """Answer every task, in order; policies without parameters are left out.

    The answers do not depend on the workers. Each study goes batch by batch; studies run beside each other.

    Raises:
        ConfigError: when a recorded scenario does not say what to tune on.
    """
    searches: list[_OpenTask] = []
    answers: dict[int, Tuning] = {}
    wanted: list[int] = []
    store = None
    digests: dict[tuple[str, Part], dict[int, str]] = {}
    for index, task in enumerate(tasks):
        parameters = parameters_for(task.policy, task.scenario)
        if not parameters:
            continue
        scenario = task.scenario.training() if task.part == "train" else task.scenario
        place = (task.scenario.name, task.part)
        if place not in digests:
            digests[place] = trace_digests(scenario)
        wanted.append(index)
        key = {
            **scenario_key(scenario, digests[place]),
            "policy": task.policy,
            "bundle": resolve(task.policy).bundle_digest,
            "parameters": [repr(item) for item in parameters],
            "trials": trials_for(parameters),
        }
        known = cache.get("tuning", key)
        if known is not None:
            known["edges"] = tuple(known["edges"])
            answers[index] = replace(Tuning(**known), scenario=task.scenario.name, part=task.part)
            continue
        if store is None:
            store = Store(cache.folder)
        search = Search(task.policy, parameters, scenario.slo.attainment, store.study(key))
        asked = _OpenTask(index, task, scenario, key, search)
        if search.done:  # cut off between the last trial and the answer
            answers[index] = asked.answer(cache)
            continue
        searches.append(asked)
    total = len(wanted)
    if total:
        on_progress(len(answers), total, "tuning")
    waiting = list(reversed(searches))
    under_way = 0
    while waiting or under_way:
        while waiting and under_way < 2 * workers.width:
            under_way += _submit_next(waiting.pop(), workers)
        asked, found = workers.next_done()
        under_way -= 1
        asked.search.tell(found)
        if not asked.search.done:
            under_way += _submit_next(asked, workers)
            continue
        answers[asked.index] = answer = asked.answer(cache)
        on_progress(len(answers), total, f"{answer.scenario} / {answer.policy} ({answer.part})")
    return [answers[index] for index in wanted]


@dataclass(frozen=True, eq=False)
class _OpenTask:
    """A task, the scenario of its slice, the key of its answer, and the search for it."""

    index: int
    task: TuningTask
    scenario: Scenario
    key: dict[str, Any]
    search: Search

    def answer(self, cache: ResultCache) -> Tuning:
        """What the search found, kept."""
        best = self.search.best
        tuning = Tuning(
            scenario=self.task.scenario.name,
            policy=self.task.policy,
            part=self.task.part,
            settings=best.settings,
            attainment=best.attainment,
            usd=best.usd,
            holds_slo=self.search.holds_slo,
            trials=self.search.ran,
            edges=self.search.edges,
        )
        cache.put("tuning", self.key, asdict(tuning))
        return tuning


def _submit_next(asked: _OpenTask, workers: Workers) -> int:
    workers.submit(asked, try_settings, asked.scenario, asked.search.ask())
    return 1

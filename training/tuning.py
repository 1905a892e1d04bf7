"""Tuning: the settings of a policy that serve a slice of traffic at the lowest cost while holding the SLO.

Every policy gets the same: an Optuna study over its declared parameters (`policies.baselines.parameters`), whose first
settings are the defaults and a spread over the whole ranges, the rest proposed by a tree-structured Parzen estimator
under the constraint that attainment meets the target. Only settings that were run count. An optimum at the edge of a
range widens it and is searched on. Studies are kept in one SQLite file and resumed; results are kept by digest.

On the *train* slice that is what an operator can do; on the test slice itself (*hindsight*) it is a gift.
This module must not know which policies there are.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from envs.traces import Trace
from policies.baselines.parameters import Parameter, Setting
from policies.fleet import Fleet
from policies.lineup import build, reference_of, resolve, starting_spec, tunable_parameters
from training.replay import SideBySide, World
from training.result_cache import ResultCache, scenario_key
from training.scenarios import Scenario
from training.workers import Workers

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import Trial

Part = Literal["train", "hindsight"]
BATCH = 8
"""Settings that one task replays side by side."""
TRIALS_PER_PARAMETER = 8
MOST_TRIALS = 24
WIDENINGS = 2
"""Times that ranges are widened where the optimum lies on an edge."""
EDGE = 0.02
"""Share of a range that counts as its edge."""
DIGITS = 4
"""Significant digits of a setting: what is run is what a reference says."""
STORE = "studies.db"
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Question:
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


@dataclass(frozen=True)
class Finding:
    """One setting that was run: mean attainment and dollars over the seeds."""

    settings: dict[str, Setting]
    attainment: float
    usd: float


def parameters_for(policy: str, scenario: Scenario) -> tuple[Parameter, ...]:
    """The parameters of a policy that matter on a scenario; none for a policy that has none or names its own."""
    classes = {pool.price_class for pool in scenario.pools}
    return tuple(item for item in tunable_parameters(policy) if not item.needs_spot or len(classes) > 1)


def trials_for(parameters: Sequence[Parameter]) -> int:
    """Settings to run before widening: more for more parameters."""
    return min(MOST_TRIALS, BATCH + TRIALS_PER_PARAMETER * len(parameters))


@functools.lru_cache(maxsize=8)
def _traces(scenario_json: str) -> tuple[Trace, ...]:
    scenario = Scenario.model_validate_json(scenario_json)
    return tuple(scenario.requests(seed) for seed in scenario.seeds)


def traces_of(scenario: Scenario) -> tuple[Trace, ...]:
    """The traces of all seeds; the last few scenarios are remembered."""
    return _traces(scenario.model_dump_json())


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


def trace_digests(scenario: Scenario) -> dict[int, str]:
    """Digest of every seed's trace."""
    return {seed: trace.digest() for seed, trace in zip(scenario.seeds, traces_of(scenario), strict=True)}


def tune(
    questions: Sequence[Question],
    workers: Workers,
    cache: ResultCache,
    on_progress: Progress = lambda done, total, label: None,
) -> list[Tuning]:
    """Answer every question, in order; policies without parameters are left out.

    The answers do not depend on the workers. Each study goes batch by batch; studies run beside each other.

    Raises:
        ConfigError: when a recorded scenario does not say what to tune on.
    """
    searches: list[_Search] = []
    keys: dict[int, dict[str, Any]] = {}
    answers: dict[int, Tuning] = {}
    wanted: list[int] = []
    store = None
    digests: dict[tuple[str, Part], dict[int, str]] = {}
    for index, question in enumerate(questions):
        parameters = parameters_for(question.policy, question.scenario)
        if not parameters:
            continue
        scenario = question.scenario.training() if question.part == "train" else question.scenario
        place = (question.scenario.name, question.part)
        if place not in digests:
            digests[place] = trace_digests(scenario)
        wanted.append(index)
        key = {
            **scenario_key(scenario, digests[place]),
            "policy": question.policy,
            "parameters": [repr(item) for item in parameters],
            "trials": trials_for(parameters),
        }
        known = cache.get("tuning", key)
        if known is not None:
            known["edges"] = tuple(known["edges"])
            answers[index] = replace(Tuning(**known), scenario=question.scenario.name, part=question.part)
            continue
        if store is None:
            store = _Store(cache.folder)
        search = _Search(index, question, scenario, parameters, store.study(key))
        if search.done:  # cut off between the last trial and the answer
            answers[index] = search.answer()
            cache.put("tuning", key, asdict(answers[index]))
            continue
        keys[index] = key
        searches.append(search)
    total = len(wanted)
    if total:
        on_progress(len(answers), total, "tuning")
    waiting = list(reversed(searches))
    under_way = 0
    while waiting or under_way:
        while waiting and under_way < 2 * workers.width:
            under_way += _submit_next(waiting.pop(), workers)
        search, found = workers.next_done()
        under_way -= 1
        search.tell(found)
        if not search.done:
            under_way += _submit_next(search, workers)
            continue
        answer = search.answer()
        answers[search.index] = answer
        cache.put("tuning", keys[search.index], asdict(answer))
        on_progress(len(answers), total, f"{answer.scenario} / {answer.policy} ({answer.part})")
    return [answers[index] for index in wanted]


def _submit_next(search: _Search, workers: Workers) -> int:
    workers.submit(search, try_settings, search.scenario, search.ask())
    return 1


class _Store:
    """The SQLite file of all studies; in memory where nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._storage: Any = None
        if folder is not None:
            import sqlalchemy

            folder.mkdir(parents=True, exist_ok=True)
            self._storage = optuna.storages.RDBStorage(f"sqlite:///{folder / STORE}")

            # A power cut may lose the last trials, which are run again then; waiting for the disk doubles the time.
            @sqlalchemy.event.listens_for(self._storage.engine, "connect")
            def _fast(connection: Any, record: Any) -> None:
                connection.execute("PRAGMA synchronous=OFF")

    def study(self, key: dict[str, Any]) -> Study:
        import optuna

        from training.result_cache import code_digest

        canonical = json.dumps({**key, "code": code_digest()}, sort_keys=True)
        name = hashlib.sha256(canonical.encode()).hexdigest()
        return optuna.create_study(storage=self._storage, study_name=name, load_if_exists=True)


class _Search:
    """One study, batch by batch. What is asked next follows from the trials told so far alone, so it can be resumed."""

    def __init__(
        self, index: int, question: Question, scenario: Scenario, parameters: tuple[Parameter, ...], study: Study
    ) -> None:
        self.index = index
        self.question = question
        self.scenario = scenario
        self._parameters = parameters
        self._stored = study
        self._study = _in_memory(study)
        self._asked: list[Trial] = []
        self._findings = [
            Finding(trial.user_attrs["settings"], *trial.user_attrs["found"]) for trial in self._study.trials
        ]

    @property
    def done(self) -> bool:
        """True where the budget is spent and no range is to be widened."""
        return self._stage() is None

    def ask(self) -> list[str]:
        """References of the next settings to run."""
        import optuna

        ranges = self._stage()
        assert ranges is not None, "asked after the end"
        ran = len(self._findings)
        seed = int.from_bytes(hashlib.sha256(f"{self._stored.study_name} {ran}".encode()).digest()[:4], "big")
        self._study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=BATCH, constant_liar=True)
        if ran == 0:
            for settings in _spread(self._parameters, ranges):
                self._study.enqueue_trial(settings)
        self._asked = [self._study.ask() for _ in range(BATCH)]
        references = []
        for trial in self._asked:
            settings = {
                item.name: _suggest(trial, item, span) for item, span in zip(self._parameters, ranges, strict=True)
            }
            trial.set_user_attr("settings", settings)
            references.append(reference_of(self.question.policy, settings))
        return references

    def tell(self, found: Sequence[tuple[float, float]]) -> None:
        """The results of the settings last asked for."""
        target = self.scenario.slo.attainment
        for trial, (attainment, usd) in zip(self._asked, found, strict=True):
            trial.set_user_attr("found", [attainment, usd])
            trial.set_constraint("attainment", target - attainment)
            self._stored.add_trial(self._study.tell(trial, usd))
            self._findings.append(Finding(trial.user_attrs["settings"], attainment, usd))

    def answer(self) -> Tuning:
        """The best setting that was run."""
        best = self._best(len(self._findings))
        ranges, _ = self._ranges(len(self._findings))
        target = self.scenario.slo.attainment
        edges = (_edge(item, span, best.settings) for item, span in zip(self._parameters, ranges, strict=True))
        return Tuning(
            scenario=self.question.scenario.name,
            policy=self.question.policy,
            part=self.question.part,
            settings=best.settings,
            attainment=best.attainment,
            usd=best.usd,
            holds_slo=best.attainment >= target,
            trials=len(self._findings),
            edges=tuple(f"{item.name} {edge}" for item, edge in zip(self._parameters, edges, strict=True) if edge),
        )

    def _stage(self) -> list[tuple[float, float]] | None:
        """Ranges of the next batch; None where nothing is left to run."""
        ran = len(self._findings)
        if ran < trials_for(self._parameters):
            return [(item.low, item.high) for item in self._parameters]
        ranges, widened = self._ranges(ran)
        return ranges if widened else None

    def _ranges(self, ran: int) -> tuple[list[tuple[float, float]], bool]:
        """Ranges after `ran` trials, and whether the last widening has not been searched yet."""
        ranges = [(item.low, item.high) for item in self._parameters]
        at = trials_for(self._parameters)
        for _ in range(WIDENINGS):
            if ran < at:
                break
            best = self._best(at)
            wider = [
                _widened(item, span, _edge(item, span, best.settings))
                for item, span in zip(self._parameters, ranges, strict=True)
            ]
            if wider == ranges:
                break
            ranges = wider
            if ran < at + BATCH:
                return ranges, True
            at += BATCH
        return ranges, False

    def _best(self, ran: int) -> Finding:
        """The cheapest of the first `ran` that holds the SLO; where none does, the one with the highest attainment."""
        target = self.scenario.slo.attainment
        findings = self._findings[:ran]
        holding = [item for item in findings if item.attainment >= target]
        if holding:
            return min(holding, key=lambda item: item.usd)
        return max(findings, key=lambda item: (item.attainment, -item.usd))


def _in_memory(stored: Study) -> Study:
    """A study in memory with the trials of a stored one: asking a database for every number takes longer than runs."""
    import optuna

    study = optuna.create_study()
    study.add_trials(stored.get_trials(deepcopy=False))
    return study


def _spread(parameters: Sequence[Parameter], ranges: Sequence[tuple[float, float]]) -> list[dict[str, Setting]]:
    """The first batch: the defaults, and a Sobol sequence over the whole ranges."""
    from scipy.stats import qmc

    points = qmc.Sobol(len(parameters), scramble=True, rng=0).random(BATCH)[: BATCH - 1]
    first: list[dict[str, Setting]] = [
        {item.name: _inside(item, span) for item, span in zip(parameters, ranges, strict=True)}
    ]
    return first + [
        {item.name: _at(item, span, float(share)) for item, span, share in zip(parameters, ranges, point, strict=True)}
        for point in points
    ]


def _inside(item: Parameter, span: tuple[float, float]) -> Setting:
    return item.default if item.choices else _rounded(item, min(max(float(item.default), span[0]), span[1]))


def _at(item: Parameter, span: tuple[float, float], share: float) -> Setting:
    """The value at a share, 0..1, of the range."""
    if item.choices:
        return item.choices[min(int(share * len(item.choices)), len(item.choices) - 1)]
    low, high = span
    value = low * (high / low) ** share if item.log else low + (high - low) * share
    return _rounded(item, value)


def _suggest(trial: Trial, item: Parameter, span: tuple[float, float]) -> Setting:
    if item.choices:
        choice: str = trial.suggest_categorical(item.name, list(item.choices))
        return choice
    low, high = span
    if item.whole:
        return trial.suggest_int(item.name, math.floor(low), math.ceil(high), log=item.log)
    return _rounded(item, trial.suggest_float(item.name, low, high, log=item.log))


def _rounded(item: Parameter, value: float) -> Setting:
    return round(value) if item.whole else float(f"{value:.{DIGITS}g}")


def _edge(item: Parameter, span: tuple[float, float], settings: dict[str, Setting]) -> str:
    """``low`` or ``high`` where the value lies on that edge of its range and better ones may lie beyond; else empty."""
    if item.choices:
        return ""
    value, (low, high) = float(settings[item.name]), span
    share = math.log(value / low) / math.log(high / low) if item.log else (value - low) / (high - low)
    floor = (0.0 if item.zero else 1.0) if item.whole else 0.0
    if share <= EDGE and (low > floor or (item.log and not item.whole)):
        return "low"
    if share >= 1.0 - EDGE and high < item.most:
        return "high"
    return ""


def _widened(item: Parameter, span: tuple[float, float], edge: str) -> tuple[float, float]:
    """The range, half as wide again beyond the edge, within what makes sense."""
    if not edge:
        return span
    low, high = span
    floor = (0.0 if item.zero else 1.0) if item.whole else 0.0
    if item.log:
        step = math.sqrt(high / low)
        return (max(low / step, floor) or low / step, high) if edge == "low" else (low, min(high * step, item.most))
    step = 0.5 * (high - low)
    if edge == "high":
        return low, min(high + step, item.most)
    nearest = floor if item.zero or item.whole else low / 2.0
    return max(low - step, nearest), high

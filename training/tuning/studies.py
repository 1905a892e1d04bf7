"""One tuning study: which settings of a policy to run next, and the best of those that were run.

An Optuna study whose first settings are the defaults and a spread over the whole ranges, the rest proposed by a
tree-structured Parzen estimator under the constraint that attainment meets the target. Only settings that were run
count. If the optimum lies at the edge of a range, the range is widened and the search goes on. Studies are kept in one
SQLite file and resumed.
This module must not know how settings are run.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from policies.baselines.parameters import Parameter, Setting
from policies.lineup import reference_of
from training.replaying.result_cache import code_digest

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import Trial

BATCH = 8
"""Settings that one task replays side by side."""
TRIALS_PER_PARAMETER = 8
MAX_TRIALS = 24
WIDENINGS = 2
"""Times that ranges are widened where the optimum lies on an edge."""
EDGE = 0.02
"""Share of a range that counts as its edge."""
DIGITS = 4
"""Significant digits of a setting: what is run is what a reference says."""
STORE = "studies.db"


@dataclass(frozen=True)
class Finding:
    """One setting that was run: mean attainment and dollars over the seeds."""

    settings: dict[str, Setting]
    attainment: float
    usd: float


def trials_for(parameters: Sequence[Parameter]) -> int:
    """Settings to run before widening: more for more parameters."""
    return min(MAX_TRIALS, BATCH + TRIALS_PER_PARAMETER * len(parameters))


class Store:
    """The SQLite file of all studies; in memory where nothing is kept.

    Args:
        folder: of the file, made if it is not there; None keeps nothing.
    """

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
        """The study of a question as this version of the code would answer it, with the trials run so far."""
        import optuna

        canonical = json.dumps({**key, "code": code_digest()}, sort_keys=True)
        name = hashlib.sha256(canonical.encode()).hexdigest()
        return optuna.create_study(storage=self._storage, study_name=name, load_if_exists=True)


class Search:
    """One study, batch by batch. What is asked next follows from the trials told so far alone, so it can be resumed.

    Args:
        policy: reference that is tuned.
        parameters: of the policy, at least one.
        target: attainment that the SLO asks for, a share.
        study: stored, with the trials run so far.
    """

    def __init__(self, policy: str, parameters: tuple[Parameter, ...], target: float, study: Study) -> None:
        self._policy = policy
        self._parameters = parameters
        self._target = target
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
        seed = int.from_bytes(hashlib.sha256(f"{self._stored.study_name} {self.ran}".encode()).digest()[:4], "big")
        self._study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=BATCH, constant_liar=True)
        if self.ran == 0:
            for settings in _spread(self._parameters, ranges):
                self._study.enqueue_trial(settings)
        self._asked = [self._study.ask() for _ in range(BATCH)]
        references = []
        for trial in self._asked:
            settings = {
                item.name: _suggest(trial, item, span) for item, span in zip(self._parameters, ranges, strict=True)
            }
            trial.set_user_attr("settings", settings)
            references.append(reference_of(self._policy, settings))
        return references

    def tell(self, found: Sequence[tuple[float, float]]) -> None:
        """The results of the settings last asked for: mean attainment and dollars of each."""
        for trial, (attainment, usd) in zip(self._asked, found, strict=True):
            trial.set_user_attr("found", [attainment, usd])
            trial.set_constraint("attainment", self._target - attainment)
            self._stored.add_trial(self._study.tell(trial, usd))
            self._findings.append(Finding(trial.user_attrs["settings"], attainment, usd))

    @property
    def ran(self) -> int:
        """Settings that were run."""
        return len(self._findings)

    @property
    def best(self) -> Finding:
        """The cheapest that holds the SLO; where none does, the one with the highest attainment."""
        return self._best(self.ran)

    @property
    def holds_slo(self) -> bool:
        """Whether any setting that was run holds the SLO."""
        return self.best.attainment >= self._target

    @property
    def edges(self) -> tuple[str, ...]:
        """Parameters whose best value still lies on an edge of what was searched, and where."""
        ranges, _ = self._ranges(self.ran)
        best = self.best.settings
        edges = ((item.name, _edge(item, span, best)) for item, span in zip(self._parameters, ranges, strict=True))
        return tuple(f"{name} {edge}" for name, edge in edges if edge)

    def _stage(self) -> list[tuple[float, float]] | None:
        """Ranges of the next batch; None where nothing is left to run."""
        if self.ran < trials_for(self._parameters):
            return [(item.low, item.high) for item in self._parameters]
        ranges, widened = self._ranges(self.ran)
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
        """As `best`, of the first `ran`."""
        findings = self._findings[:ran]
        holding = [item for item in findings if item.attainment >= self._target]
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
    if share >= 1.0 - EDGE and high < item.limit:
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
        return (max(low / step, floor) or low / step, high) if edge == "low" else (low, min(high * step, item.limit))
    step = 0.5 * (high - low)
    if edge == "high":
        return low, min(high + step, item.limit)
    nearest = floor if item.zero or item.whole else low / 2.0
    return max(low - step, nearest), high

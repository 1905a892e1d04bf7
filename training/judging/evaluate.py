"""Judging: policies x scenarios x seeds through the real controller on the simulated cluster.

Every published figure comes from here, so from the class that ships (`autoscaler.controller.Controller`).
This module must not know how results are shown.
"""

from __future__ import annotations

import importlib.metadata
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from policies.engine import ConfigError
from policies.fleet import Fleet
from policies.learned import BundleMismatch
from policies.lineup import REFERENCES, Entry, build, reference_of, resolve, self_tuned
from training.judging.scenario_runs import DEFAULT, ScenarioRun, Variant, label, run_work
from training.replaying.result_cache import ResultCache
from training.replaying.scenarios import Scenario, Suite, TraceSource
from training.replaying.scores import AVERAGED, REFERENCE, Score
from training.replaying.timeline import Timeline
from training.replaying.workers import Progress, Workers, open_workers
from training.tuning.tuner import Part, Tuning, TuningTask, parameters_for, tune
from training.versions.registry import resolve_bundle

TUNED = (DEFAULT, "train", "self", "hindsight")
BOOTSTRAP_RESAMPLES = 2000
INTERVALS = ("attainment", "usd", "usd_per_mtok", "usd_per_good_mtok")
"""Columns that get a bootstrap interval over seeds."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What an evaluation found.

    Attributes:
        suite: its name.
        rows: one score per scenario, policy, tuning and seed, in the order asked for.
        scenarios: what each scenario was: objectives, pools, seeds, digests of spec and traces; `servable` says whether
            the clairvoyant plan holds its SLO, None where there is no plan.
        policies: what each policy was: reference, digest of its bundle and the engines that it was trained on.
        versions: of Jevons and of what the figures depend on.
        timelines: of the first seed, by scenario and label, see `label`.
        tunings: what tuning found, see `training.tuning.tuner.Tuning`.
        skipped: scenarios of the suite that could not run here, and why.
    """

    suite: str
    rows: tuple[Score, ...]
    scenarios: tuple[dict[str, Any], ...]
    policies: tuple[dict[str, Any], ...]
    versions: dict[str, str] = field(default_factory=dict)
    timelines: dict[tuple[str, str], Timeline] = field(default_factory=dict)
    tunings: tuple[dict[str, Any], ...] = ()
    skipped: tuple[dict[str, str], ...] = ()

    def by_scenario(self) -> list[dict[str, Any]]:
        """One row per scenario, policy and tuning: means over seeds.

        `seeds` counts them; `holds_slo` compares the mean attainment with the target. Where there are several seeds,
        ``<column>_low`` and ``<column>_high`` hold the bootstrap interval of the mean (2.5 to 97.5 %), else None.
        """
        targets = {scenario["name"]: scenario["slo"]["attainment"] for scenario in self.scenarios}
        runs: dict[tuple[str, str, str], list[Score]] = {}
        for row in self.rows:
            runs.setdefault((row.scenario, row.policy, row.tuned), []).append(row)
        return [_averaged(rows, targets[scenario]) for (scenario, _, _), rows in runs.items()]

    def to_json(self) -> dict[str, Any]:
        """Everything but the timelines, ready for `json.dumps`: NaN is null."""
        return {
            "suite": self.suite,
            "rows": [row.row() for row in self.rows],
            "by_scenario": [{name: _null(value) for name, value in row.items()} for row in self.by_scenario()],
            "scenarios": list(self.scenarios),
            "policies": list(self.policies),
            "tunings": list(self.tunings),
            "skipped": list(self.skipped),
            "versions": self.versions,
        }


def evaluate(
    suite: Suite,
    policies: Sequence[str],
    jobs: int = 1,
    on_progress: Progress = lambda done, total, label: None,
    *,
    tuned: Sequence[str] = (DEFAULT,),
    cache: ResultCache | None = None,
    ray_address: str | None = None,
) -> Evaluation:
    """Run every policy on every scenario and seed.

    What can be checked is checked first: references, bundles, their interface, and that each trace can be read.
    The result does not depend on `jobs` or `ray_address`, `wall_s` aside.

    Args:
        suite: what to judge on.
        policies: references as `policies.lineup` reads them; ``bound``, ``plan`` and ``best-static`` among them.
        jobs: processes.
        on_progress: told after each scenario and policy, and after each study.
        tuned: settings of every policy that can be tuned: ``default``, those tuned on the ``train`` slice, these and
            moved at run time by the measured attainment (``self``), those tuned in ``hindsight``.
        cache: where plans and tuned settings are kept; nowhere when None.
        ray_address: of a Ray cluster to run on instead of local processes, see `training.replaying.workers`.

    Raises:
        ConfigError: when a reference is unknown, or a recorded scenario does not say what to tune on.
        BundleMismatch: when a bundle cannot be used.
        TraceError: when a trace cannot be used.
    """
    cache = cache or ResultCache(None)
    named = list(dict.fromkeys(policies))
    references = [name for name in REFERENCES if name in named]
    entries = [resolve(reference, resolve_bundle) for reference in named if reference not in REFERENCES]
    _check(suite, entries)
    with open_workers(jobs, ray_address) as workers:
        tunings = _tuned(suite, entries, tuned, workers, cache, on_progress)
        work = _work(suite, entries, references, tuned, tunings)
        runs = _run_all(work, workers, cache, on_progress)
    rows: dict[str, list[Score]] = {scenario.name: [] for scenario in suite.scenarios}
    digests: dict[str, tuple[str, ...]] = {}
    timelines: dict[tuple[str, str], Timeline] = {}
    for (scenario, _), found in zip(work, runs, strict=True):
        for run in found:
            first = run.scores[0]
            rows[scenario.name] += run.scores
            digests[scenario.name] = run.trace_digests
            timelines[scenario.name, label(first.policy, first.tuned)] = run.timeline
    return Evaluation(
        suite=suite.name,
        rows=tuple(row for scenario in suite.scenarios for row in rows[scenario.name]),
        scenarios=tuple(
            describe(scenario, digests[scenario.name], rows[scenario.name])
            for scenario in suite.scenarios
            if scenario.name in digests
        ),
        policies=tuple(describe_policy(entry) for entry in entries),
        versions=versions(),
        timelines=timelines,
        tunings=tuple(asdict(item) for item in tunings),
        skipped=tuple(asdict(item) for item in suite.skipped),
    )


def _check(suite: Suite, entries: Sequence[Entry]) -> None:
    for scenario in suite.scenarios:
        fleet = Fleet.from_specs([scenario.spec])
        for entry in entries:
            try:
                build(entry, fleet, scenario.spec.interface)
            except (ConfigError, BundleMismatch) as error:
                raise type(error)(f"scenario {scenario.name!r}, policy {entry.reference!r}: {error}") from None
        if scenario.trace.file is not None:
            scenario.requests(scenario.seeds[0])


def _tuned(
    suite: Suite,
    entries: Sequence[Entry],
    tuned: Sequence[str],
    workers: Workers,
    cache: ResultCache,
    on_progress: Progress,
) -> list[Tuning]:
    """The settings that `tuned` asks for; a self-tuned policy starts at those of the train slice."""
    unknown = sorted(set(tuned) - set(TUNED))
    if unknown or not tuned:
        raise ConfigError(f"tuned {', '.join(unknown)!r}: expected {', '.join(TUNED)}")
    parts: list[Part] = ["train"] if {"train", "self"} & set(tuned) else []
    parts += ["hindsight"] if "hindsight" in tuned else []
    tasks = [
        TuningTask(scenario, entry.reference, part)
        for scenario in suite.scenarios
        for part in parts
        for entry in entries
    ]
    return tune(tasks, workers, cache, on_progress)


def variants(
    suite: Suite,
    entries: Sequence[Entry],
    tuned: Sequence[str],
    workers: Workers,
    cache: ResultCache,
    on_progress: Progress,
) -> list[tuple[Scenario, Variant]]:
    """Every policy with every kind of settings that `tuned` asks for, scenario by scenario, checked and tuned.

    Raises:
        ConfigError: as `evaluate`.
        BundleMismatch: as `evaluate`.
        TraceError: as `evaluate`.
    """
    _check(suite, entries)
    tunings = _tuned(suite, entries, tuned, workers, cache, on_progress)
    work = _work(suite, entries, (), tuned, tunings)
    return [(scenario, what) for scenario, what in work if isinstance(what, Variant)]


def _work(
    suite: Suite,
    entries: Sequence[Entry],
    references: Sequence[str],
    tuned: Sequence[str],
    tunings: Sequence[Tuning],
) -> list[tuple[Scenario, Variant | tuple[str, ...]]]:
    """What to run, scenario by scenario: variants of policies, and the references together, which share a search."""
    settings = {(item.scenario, item.policy, item.part): item.settings for item in tunings}
    work: list[tuple[Scenario, Variant | tuple[str, ...]]] = []
    for scenario in suite.scenarios:
        for entry in entries:
            name = entry.reference
            moved = self_tuned(name)
            tunable = bool(parameters_for(name, scenario))
            for mode in TUNED:
                if mode == DEFAULT and (mode in tuned or not tunable):
                    work.append((scenario, Variant(name, mode, entry)))
                if mode == DEFAULT or mode not in tuned or (mode == "self" and moved == name):
                    continue
                if tunable:
                    found = settings[scenario.name, name, "hindsight" if mode == "hindsight" else "train"]
                    chosen = resolve(reference_of(moved if mode == "self" else name, found), resolve_bundle)
                    work.append((scenario, Variant(name, mode, chosen)))
                elif mode == "self":
                    work.append((scenario, Variant(name, mode, resolve(moved, resolve_bundle))))
        if references:
            work.append((scenario, tuple(references)))
    return work


def _run_all(
    work: Sequence[tuple[Scenario, Variant | tuple[str, ...]]],
    workers: Workers,
    cache: ResultCache,
    on_progress: Progress,
) -> list[list[ScenarioRun]]:
    """The runs of every piece of work, in its order. References take longest, so they are handed in first."""
    for index in sorted(range(len(work)), key=lambda index: isinstance(work[index][1], Variant)):
        workers.submit(index, run_work, *work[index], cache)
    runs: list[list[ScenarioRun]] = [[] for _ in work]
    on_progress(0, len(work), _label(*work[0]) if work else "")
    for done in range(1, len(work) + 1):
        index, runs[index] = workers.next_done()
        on_progress(done, len(work), _label(*work[index]))
    return runs


def _averaged(rows: Sequence[Score], target: float) -> dict[str, Any]:
    averaged: dict[str, Any] = {
        "scenario": rows[0].scenario,
        "policy": rows[0].policy,
        "tuned": rows[0].tuned,
        "seeds": len(rows),
    }
    for name in AVERAGED:
        averaged[name] = float(np.mean([getattr(row, name) for row in rows]))
    computed = math.isnan(averaged["attainment"])  # the bound: nobody ran it
    averaged["holds_slo"] = all(row.holds_slo for row in rows) if computed else averaged["attainment"] >= target
    for name in INTERVALS:
        low, high = bootstrap_interval([getattr(row, name) for row in rows])
        averaged[f"{name}_low"], averaged[f"{name}_high"] = low, high
    return averaged


def bootstrap_interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """2.5 and 97.5 % quantiles of the mean under resampling; (None, None) for fewer than two values."""
    if len(values) < 2:
        return None, None
    rng = np.random.default_rng(0)
    array = np.asarray(values, np.float64)
    means = array[rng.integers(len(array), size=(BOOTSTRAP_RESAMPLES, len(array)))].mean(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def describe(scenario: Scenario, trace_digests: Sequence[str], rows: Sequence[Score]) -> dict[str, Any]:
    """What a scenario was, for JSON; `rows` are its scores."""
    spec = scenario.spec
    source = scenario.trace
    planned = [row.holds_slo for row in rows if (row.policy, row.tuned) == ("plan", REFERENCE)]
    return {
        "name": scenario.name,
        "description": scenario.description,
        "source": source.kind,
        "servable": all(planned) if planned else None,
        "trace": f"generated: {source.generator!r}" if source.generator is not None else _files(source),
        "slo": spec.slo.model_dump(),
        "pools": [
            {
                "name": pool.label,
                "engine": pool.engine.name,
                "gpu": pool.engine.gpu,
                "gpus_per_replica": pool.engine.gpus_per_replica,
                "min_replicas": pool.min_replicas,
                "max_replicas": pool.max_replicas,
                "price_class": pool.price_class,
                "usd_per_gpu_hour": pool.gpu_usd_per_hour,
                "billing": pool.billing,
                "cold_start_s": pool.start.total_s,
            }
            for pool in spec.pools
        ],
        "control_interval_s": scenario.control_interval_s,
        "metrics_delay_s": scenario.metrics_delay_s,
        "overhead_rate": spec.objective.overhead_rate,
        "seeds": list(scenario.seeds),
        "spec_digest": spec.digest(),
        "trace_digests": list(trace_digests),
    }


def describe_policy(entry: Entry) -> dict[str, Any]:
    """What a policy was, for JSON."""
    described: dict[str, Any] = {"policy": entry.reference, "bundle_digest": entry.bundle_digest}
    if entry.bundle is not None:
        config = entry.bundle.manifest.provenance.get("config", {})
        described["engines"] = list(config.get("worlds", {}).get("engines", []))
    return described


def versions() -> dict[str, str]:
    """Of Jevons and of what the figures depend on."""
    found = {name: importlib.metadata.version(name) for name in ("jevons", "numpy", "numba", "onnxruntime")}
    return {**found, "python": platform.python_version()}


def _files(source: TraceSource) -> str:
    return ", ".join(str(file) for file in source.files)


def _label(scenario: Scenario, what: Variant | tuple[str, ...]) -> str:
    return f"{scenario.name} / {label(what.policy, what.tuned) if isinstance(what, Variant) else 'references'}"


def _null(value: Any) -> Any:
    return None if isinstance(value, float) and value != value else value

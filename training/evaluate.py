"""Judging: policies x scenarios x seeds through the real controller on the simulated cluster.

Every published figure comes from here, so from the class that ships (`autoscaler.controller.Controller`).
This module must not know how results are shown.
"""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import numpy as np

from autoscaler.controller import Controller
from envs.cluster import SimulatedCluster
from envs.traces import Trace
from policies.decider import Decider
from policies.engine import ConfigError
from policies.fleet import Fleet
from policies.learned import BundleMismatch
from policies.lineup import Entry, build, resolve, starting_spec
from policies.objective import Usage
from policies.spec import ScalingSpec
from training.console import end_on_ctrl_c
from training.registry import resolve_bundle
from training.scenarios import Scenario, Suite
from training.scores import AVERAGED, Bill, Score, judge, score
from training.timeline import FIRST, Timeline, TimelineRecorder

DRAIN_S = 600.0
"""Requests in service at the end of the trace get at least this time to finish, seconds."""
DRAIN_STEP_S = 60.0
BOOTSTRAP_RESAMPLES = 2000
INTERVALS = ("attainment", "usd", "usd_per_mtok", "usd_per_good_mtok")
"""Columns that get a bootstrap interval over seeds."""

Progress = Callable[[int, int, str], None]
"""Called with cells done, cells in all, and what the next or last cell is."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What an evaluation found.

    Attributes:
        suite: its name.
        rows: one score per scenario, policy and seed, in the order asked for.
        scenarios: what each scenario was: objectives, pools, seeds, digests of spec and traces.
        policies: what each policy was: reference and digest of its bundle.
        versions: of Jevons and of what the figures depend on.
        timelines: of the first seed, by scenario and policy.
    """

    suite: str
    rows: tuple[Score, ...]
    scenarios: tuple[dict[str, Any], ...]
    policies: tuple[dict[str, Any], ...]
    versions: dict[str, str] = field(default_factory=dict)
    timelines: dict[tuple[str, str], Timeline] = field(default_factory=dict)

    def by_scenario(self) -> list[dict[str, Any]]:
        """One row per scenario and policy: means over seeds.

        `seeds` counts them; `holds_slo` compares the mean attainment with the target. Where there are several seeds,
        ``<column>_low`` and ``<column>_high`` hold the bootstrap interval of the mean (2.5 to 97.5 %), else None.
        """
        targets = {scenario["name"]: scenario["slo"]["attainment"] for scenario in self.scenarios}
        cells: dict[tuple[str, str], list[Score]] = {}
        for row in self.rows:
            cells.setdefault((row.scenario, row.policy), []).append(row)
        return [_averaged(rows, targets[scenario]) for (scenario, _), rows in cells.items()]

    def to_json(self) -> dict[str, Any]:
        """Everything but the timelines, ready for `json.dumps`: NaN is null."""
        return {
            "suite": self.suite,
            "rows": [row.row() for row in self.rows],
            "by_scenario": [{name: _null(value) for name, value in row.items()} for row in self.by_scenario()],
            "scenarios": list(self.scenarios),
            "policies": list(self.policies),
            "versions": self.versions,
        }


class Cell(NamedTuple):
    """One scenario under one policy, all seeds side by side."""

    scores: tuple[Score, ...]
    timeline: Timeline
    trace_digests: tuple[str, ...]


def evaluate(
    suite: Suite,
    policies: Sequence[str],
    jobs: int = 1,
    on_progress: Progress = lambda done, total, label: None,
) -> Evaluation:
    """Run every policy on every scenario and seed.

    What can be checked is checked first: references, bundles, their interface, and that each trace can be read.
    The result does not depend on `jobs`, `wall_s` aside.

    Args:
        suite: what to judge on.
        policies: references as `policies.lineup` reads them.
        jobs: processes.
        on_progress: told after each scenario and policy.

    Raises:
        ConfigError: when a reference is unknown.
        BundleMismatch: when a bundle cannot be used.
        TraceError: when a trace cannot be used.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    entries = [resolve(reference, resolve_bundle) for reference in dict.fromkeys(policies)]
    for scenario in suite.scenarios:
        fleet = Fleet.from_specs([scenario.spec])
        for entry in entries:
            try:
                build(entry, fleet, scenario.spec.interface)
            except (ConfigError, BundleMismatch) as error:
                raise type(error)(f"scenario {scenario.name!r}, policy {entry.reference!r}: {error}") from None
        if scenario.trace.file is not None:
            scenario.requests(scenario.seeds[0])
    work = [(scenario, entry) for scenario in suite.scenarios for entry in entries]
    cells: list[Cell | None] = [None] * len(work)
    on_progress(0, len(work), _label(*work[0]) if work else "")
    for done, (index, cell) in enumerate(_run_all(work, jobs), start=1):
        cells[index] = cell
        on_progress(done, len(work), _label(*work[index]))
    found = [cell for cell in cells if cell is not None]
    keys = [(scenario.name, entry.reference) for scenario, entry in work]
    return Evaluation(
        suite=suite.name,
        rows=tuple(row for cell in found for row in cell.scores),
        scenarios=tuple(
            _describe(scenario, found[index * len(entries)].trace_digests)
            for index, scenario in enumerate(suite.scenarios)
            if entries
        ),
        policies=tuple({"policy": entry.reference, "bundle_digest": entry.bundle_digest} for entry in entries),
        versions=_versions(),
        timelines={key: cell.timeline for key, cell in zip(keys, found, strict=True)},
    )


def run_cell(scenario: Scenario, entry: Entry) -> Cell:
    """Replay all seeds of a scenario side by side under one policy, and score them."""
    started_s = time.perf_counter()
    spec = starting_spec(entry, scenario.spec)
    traces = [scenario.requests(seed) for seed in scenario.seeds]
    n = len(traces)
    interval_s = scenario.control_interval_s
    horizon_s = max(interval_s, *(trace.duration_s for trace in traces))
    cluster = SimulatedCluster.replay([spec] * n, traces, scenario.seeds)
    fleet = Fleet.from_specs([spec] * n)
    bill = Bill(spec, cluster.arrays.pools)
    recorder = TimelineRecorder(
        tuple(pool.label for pool in spec.pools), spent_usd=lambda: bill.total_usd(cluster.usage(), FIRST)
    )
    controller = Controller(
        decider=Decider(fleet, spec.interface.window, spec.guardrails),
        policy=build(entry, fleet, spec.interface),
        source=cluster,
        actuator=cluster,
        clock=cluster,
        recorder=recorder,
        interval_s=interval_s,
    )
    controller.run(until_s=horizon_s)
    usage, preemptions = read_horizon(cluster, horizon_s)
    drain(cluster, horizon_s, spec, traces)
    timeline = recorder.timeline()
    first = cluster.library.first
    wall_s = (time.perf_counter() - started_s) / n
    scores = []
    for row, (trace, seed) in enumerate(zip(traces, scenario.seeds, strict=True)):
        own = slice(first[row], first[row + 1])
        finish_s = cluster.arrays.finish_s[own]
        verdicts = judge(trace.arrival_s, cluster.arrays.first_token_s[own], finish_s, trace.output_tokens, spec.slo)
        label = (scenario.name, entry.reference, seed)
        scored = score(spec, trace, usage, row, verdicts, finish_s, int(preemptions[row]), horizon_s, label)
        ticks = timeline.reason_counts() if row == 0 else {}
        scores.append(replace(scored, wall_s=wall_s, guardrail_ticks=ticks))
    return Cell(tuple(scores), timeline, tuple(trace.digest() for trace in traces))


def read_horizon(cluster: SimulatedCluster, horizon_s: float) -> tuple[Usage, np.ndarray]:
    """Cumulative usage and (n,) preemptions exactly at the horizon.

    The cluster measures one metrics delay before the time that it is run to, so it is run that much further.
    """
    cluster.wait_until(max(horizon_s + cluster.window.metrics_delay_s, cluster.now_s))
    usage = cluster.usage()
    # The cluster's readings are views of arrays that the next window overwrites.
    copied = Usage(**{item.name: getattr(usage, item.name).copy() for item in fields(usage)})
    return copied, cluster.counter("preemptions")


def drain(cluster: SimulatedCluster, horizon_s: float, spec: ScalingSpec, traces: Sequence[Trace]) -> None:
    """Keep the clock running, without decisions, until every request is served or can only be a miss.

    A request that arrived at the horizon and meets both objectives is done after the TTFT objective and its output at
    the pace of the TPOT objective; what is unfinished then has missed.
    """
    longest = max(int(trace.output_tokens.max()) for trace in traces)
    limit_s = horizon_s + max(DRAIN_S, spec.slo.ttft_s + spec.slo.tpot_s * longest)
    expected = np.array([len(trace) for trace in traces])
    while cluster.now_s < limit_s:
        usage = cluster.usage()
        if (usage.finished + usage.rejected >= expected).all():
            break
        cluster.wait_until(min(cluster.now_s + DRAIN_STEP_S, limit_s))


def _run_all(work: Sequence[tuple[Scenario, Entry]], jobs: int) -> Iterator[tuple[int, Cell]]:
    """Cells with their places in `work`, as they get done."""
    jobs = min(jobs, len(work))
    if jobs <= 1:
        for index, (scenario, entry) in enumerate(work):
            yield index, run_cell(scenario, entry)
        return
    # Spawned, not forked: the parent may hold threads (onnxruntime, numba) that a fork would leave locked.
    # The initializer lives in a light module: Ctrl-C may come while the workers still import.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=end_on_ctrl_c) as pool:
        try:
            places = {pool.submit(run_cell, *cell): index for index, cell in enumerate(work)}
            for future in as_completed(places):
                yield places[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _averaged(rows: Sequence[Score], target: float) -> dict[str, Any]:
    averaged: dict[str, Any] = {
        "scenario": rows[0].scenario,
        "policy": rows[0].policy,
        "tuned": rows[0].tuned,
        "seeds": len(rows),
    }
    for name in AVERAGED:
        averaged[name] = float(np.mean([getattr(row, name) for row in rows]))
    averaged["holds_slo"] = averaged["attainment"] >= target
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


def _describe(scenario: Scenario, trace_digests: Sequence[str]) -> dict[str, Any]:
    spec = scenario.spec
    source = scenario.trace
    return {
        "name": scenario.name,
        "description": scenario.description,
        "trace": str(source.file) if source.file is not None else f"generated: {source.generator!r}",
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


def _versions() -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in ("jevons", "numpy", "numba", "onnxruntime")}
    return {**found, "python": platform.python_version()}


def _label(scenario: Scenario, entry: Entry) -> str:
    return f"{scenario.name} / {entry.reference}"


def _null(value: Any) -> Any:
    return None if isinstance(value, float) and value != value else value

"""The signals of all services: every query asked at once, and the answers as arrays.

This module must not know what a snapshot is made of.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np

from autoscaler.metrics import presets, promql
from autoscaler.metrics.client import PrometheusClient, PrometheusConfig, PrometheusQueryError, label_values
from autoscaler.metrics.latency_histograms import Buckets, read_buckets
from autoscaler.metrics.plausibility import LeftOut
from autoscaler.metrics.queries import (
    Query,
    build_native_queries,
    build_queries,
    candidates_by_signal,
    grouping_of,
    names_of,
    per_pool,
)
from autoscaler.metrics.scrape_coverage import RATED, Targets
from autoscaler.problem_texts import some_of
from policies.contract import Floats, MetricsUnavailable
from policies.engine import ConfigError
from policies.spec import ScalingSpec

WORKERS = 8
"""Queries in flight at once."""
MOST_SCRAPERS = 8
"""Of one target that are told apart: a page may name any number."""
LATE_S = 0.25
"""How much later than its deadline a query's answer may be handed over: the machine may be busy, seconds."""
UNSTORED = (
    "is exposed, but Prometheus stores nothing of it: it turns classic histograms into native ones and does not keep "
    "those; set always_scrape_classic_histograms: true for these scrapes"
)
"""Of a histogram."""
Answers = Mapping[str, list[dict[str, Any]]]
"""Samples by signal, as the server's API gives them."""


class SignalReader:
    """Asks for the signals of `n` services, one query a signal.

    Args:
        config: where the measurements are and what they are called.
        specs: the services.
    """

    def __init__(self, config: PrometheusConfig, specs: Sequence[ScalingSpec]) -> None:
        self.config = config
        self.specs = tuple(specs)
        self.client = PrometheusClient(config)
        self.queries = build_queries(config, specs)
        self._native = build_native_queries(config, specs)
        self._executor = ThreadPoolExecutor(WORKERS, "prometheus")
        self._hanging: list[tuple[str, Future[list[dict[str, Any]]]]] = []  # queries past their deadline, by signal
        kinds = {query.kind for query in (*self.queries, *self._native)}
        self._rows = {
            kind: {
                value: row
                for row, spec in enumerate(specs)
                for value in label_values(names_of(config, kind), spec.service)
            }
            for kind in kinds
        }
        self._columns: list[dict[str, int]] = [
            {
                **({"": 0} if len(spec.pools) == 1 else {}),
                **{pool.label: place for place, pool in enumerate(spec.pools)},
            }
            for spec in specs
        ]

    def ask(self) -> tuple[Answers, list[str]]:
        """Answers by signal, and in words what was not answered in time.

        Raises:
            MetricsUnavailable: when no query was answered.
        """
        hanging = self._still_hanging()
        if len(self._hanging) >= WORKERS:
            raise MetricsUnavailable(f"{self.config.url}: {hanging}")
        try:
            self.client.log_in()
        except ConfigError as error:
            raise MetricsUnavailable(str(error)) from None
        until_s = time.monotonic() + self.config.deadline_s
        answers, problems = self._ask_all(self.queries, until_s)
        if hanging:  # first: it may be why others came too late
            problems.insert(0, hanging)
        if not answers:
            why = hanging or problems[0].partition(": ")[2]  # which signals it came to first differs from tick to tick
            raise MetricsUnavailable(f"{self.config.url}: {why}")
        self._add_native(answers, problems, until_s)
        return answers, problems

    def _ask_all(self, queries: Iterable[Query], until_s: float) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
        futures = {query.signal: self._executor.submit(self.client.ask, query.text, until_s) for query in queries}
        answers: dict[str, list[dict[str, Any]]] = {}
        unanswered: dict[str, list[str]] = {}  # signals by what is wrong: a server that is away is named once
        for signal, future in futures.items():
            try:
                answers[signal] = future.result(max(0.0, until_s + LATE_S - time.monotonic()))
            except PrometheusQueryError as error:
                unanswered.setdefault(str(error), []).append(signal)
            except TimeoutError:
                unanswered.setdefault("no answer in time", []).append(signal)
                if not future.cancel():
                    self._hanging.append((signal, future))
        return answers, [f"{some_of(signals)}: {why}" for why, signals in unanswered.items()]

    def _still_hanging(self) -> str:
        """What keeps query threads from new queries, in words; empty when nothing does.

        An answer ends with its deadline; but a name that cannot be looked up, or whatever nobody foresaw, may not.
        """
        self._hanging = [(signal, future) for signal, future in self._hanging if not future.done()]
        signals = ", ".join(signal for signal, _ in self._hanging)
        return f"{len(self._hanging)} of {WORKERS} query threads still wait for {signals}" if signals else ""

    def _add_native(self, answers: dict[str, list[dict[str, Any]]], problems: list[str], until_s: float) -> None:
        """Histograms that the server stores as native ones, of the targets that have no classic series.

        Prometheus 3 can turn classic histograms into native ones as it scrapes, also those of some targets alone.
        Whether there are any comes with what is seen: not every server that speaks PromQL knows their functions. Where
        they cannot be had, a service's classic series may be a part of it only: the signal is missing.
        """
        named = [row["metric"] for row in answers.get("seen", ()) if promql.NATIVE in row["metric"]]
        if named:
            answers["seen"] = [row for row in answers["seen"] if promql.NATIVE not in row["metric"]]
        having: dict[Query, set[str]] = {}
        for query in self._native:
            found = {one.get(query.label, "") for one in named if one[promql.NATIVE] in query.histograms}
            if query.signal in answers and found & set(self._rows[query.kind]):
                having[query] = found
        if not having:
            problems += self._unstored(answers, until_s)
            return
        native, more = self._ask_all(having, until_s)
        problems += more
        for query, services in having.items():
            classic = answers[query.signal]
            if query.signal not in native:
                classic = [row for row in classic if row["metric"].get(query.label, "") not in services]
            answers[query.signal] = [*classic, *native.get(query.signal, ())]

    def _unstored(self, answers: Answers, until_s: float) -> list[str]:
        """The latency histograms that targets expose and of which the server has nothing at all, in words."""
        if not any(float(row["value"][1]) >= RATED for row in answers.get("seen", ())):
            return []  # there can't be a rate of anything
        lacking = [
            one.signal for one in self._native if one.signal.endswith("_bucket") and answers.get(one.signal) == []
        ]
        candidates = {signal: candidates_by_signal(self.config)[signal][0] for signal in lacking}
        found = []
        for signal, names in candidates.items():
            wholes = [promql.whole_name(one) for one in names]
            if "histogram" in self.client.types(dict.fromkeys(wholes), until_s) and not self._stored(names, until_s):
                found.append(f"{signal}: {wholes[0]} {UNSTORED}")
        return found

    def _stored(self, names: Iterable[str], until_s: float) -> bool:
        """Whether there is any series of a classic histogram, of whomever and however seldom it is scraped."""
        try:
            return bool(self.client.ask(promql.render_any(names), until_s))
        except PrometheusQueryError:
            return True  # nobody knows, so nothing is said

    def time_s(self, answers: Answers, otherwise: float) -> float:
        """The server's clock where it says a time: ages are differences on that clock alone."""
        rows = (rows[0] for rows in answers.values() if rows)
        return max((float(row["value"][0]) for row in rows), default=otherwise)

    def arrays(self, answers: Answers, problems: list[str]) -> dict[str, Floats]:
        """Every signal as an array, (n, P) by pool or (n,) by service; `problems` is told what is no number."""
        return {
            query.signal: self._fill(query, _of_services(query, answers), problems)
            for query in self.queries
            if query.signal in presets.SIGNALS
        }

    def buckets(self, signal: str, answers: Answers, at_s: Floats, problems: list[str]) -> Buckets:
        """The buckets of a latency histogram by service, with the edges `at_s` among them; none where nobody asks.

        One that has an edge that is no number is missing, which `problems` is told.
        """
        query = next((one for one in self.queries if one.signal == signal), None)
        if query is None:
            return read_buckets([], "", {}, len(self.specs), at_s)
        rows, by_name = _of_services(query, answers), self._rows[query.kind]
        odd = {by_name.get(row["metric"].get(query.label, "")) for row in rows if row["metric"].get("le") == "NaN"}
        problems += [
            f"{signal}: {spec.service} has a bucket edge that is no number"
            for place, spec in enumerate(self.specs)
            if place in odd
        ]
        return read_buckets(rows, query.label, by_name, len(self.specs), at_s)

    def left_out(self, answers: Answers, targets: Floats) -> dict[str, dict[int, LeftOut]]:
        """By signal and place of the service, the targets that report what cannot be; of `targets` (n,) engines."""
        found: dict[str, dict[int, LeftOut]] = {}
        for query in self.queries:
            values: dict[int, dict[str, float]] = {}
            for sample in answers.get(query.signal, ()):
                row = self._rows[query.kind].get(sample["metric"].get(query.label, ""))
                if row is not None and _is_left_out(query, sample):
                    values.setdefault(row, {})[sample["metric"][query.target]] = float(sample["value"][1])
            if values:
                many = targets if query.kind == "engine" else np.full(len(self.specs), np.nan)
                found[query.signal] = {row: LeftOut(of, query.highest, many[row]) for row, of in values.items()}
        return found

    def targets(self, answers: Answers) -> tuple[Targets, Floats]:
        """What is scraped of every service, and (n, P) how many targets of each pool; NaN where none is."""
        n, pools = len(self.specs), max(len(spec.pools) for spec in self.specs)
        label, count = self.config.replica_label, np.full((n, pools), np.nan)
        scrapers: list[dict[str, set[str]]] = [{} for _ in range(n)]
        newest: list[dict[str, float]] = [{} for _ in range(n)]
        samples: list[dict[str, float]] = [{} for _ in range(n)]
        found: dict[tuple[int, int], set[str]] = {}
        for query in self.queries:
            for sample in answers.get(query.signal, ()) if query.signal in ("seen", "sample_time") else ():
                metric = sample["metric"]
                row, target = self._rows[query.kind].get(metric.get(query.label, "")), metric.get(label, "")
                if row is None:
                    continue
                if query.signal == "sample_time":
                    newest[row][target] = max(newest[row].get(target, -np.inf), float(sample["value"][1]))
                    continue
                who = " ".join(metric.get(one, "") for one in self.config.scraper_labels).strip()
                by = scrapers[row].setdefault(target, set())
                if len(by) < MOST_SCRAPERS:  # two are one too many already
                    by.add(who)
                samples[row][target] = max(samples[row].get(target, 0.0), float(sample["value"][1]))
                column = self._columns[row].get(metric.get(query.pool_label, "")) if query.pool_label else 0
                if column is not None:
                    found.setdefault((row, column), set()).add(target)
        for at, names in found.items():
            count[at] = len(names)
        return Targets(scrapers, newest, samples), count

    def _fill(self, query: Query, rows: list[dict[str, Any]], problems: list[str]) -> Floats:
        """One signal as an array: (n, P) by pool, (n,) by service. Buckets are read elsewhere."""
        n, pools = len(self.specs), max(len(spec.pools) for spec in self.specs)
        found: dict[tuple[int, int], list[float]] = {}
        if not query.signal.endswith("_bucket"):
            by_name = self._rows[query.kind]
            for sample in rows:
                metric = sample["metric"]
                row = by_name.get(metric.get(query.label, ""))
                if row is None:
                    continue
                column = self._columns[row].get(metric.get(query.pool_label, "")) if query.pool_label else 0
                if column is None:
                    continue
                value = float(sample["value"][1])
                if np.isnan(value) and query.signal == "batch_cap":  # HAProxy's word for none: the engine's own holds
                    value = max(pool.engine.max_num_seqs for pool in self.specs[row].pools)
                elif np.isnan(value):
                    problems.append(f"{query.signal}: {self.specs[row].service} reports NaN")
                found.setdefault((row, column), []).append(value)
        values = np.full((n, pools), np.nan)
        how = presets.SIGNALS[query.signal].targets
        for at, parts in found.items():  # several where a service has several label values
            values[at] = max(parts) if how == "max" else sum(parts) / (len(parts) if how == "avg" else 1)
        return values if query.pool_label or per_pool(query.signal) else values[:, 0]

    def replica_loads(self, window_s: float) -> dict[str, float]:
        """Running requests by replica, for removing the least loaded first; empty when unknown."""
        names, _ = candidates_by_signal(self.config).get("running", ((), ""))
        label = self.config.replica_label
        group = replace(
            grouping_of(self.config, "engine", "running", [spec.service for spec in self.specs]), services=(label,)
        )
        try:
            rows = self.client.ask(promql.render("running", names, group, self.config.matchers, window_s))
        except PrometheusQueryError:
            return {}
        loads = {row["metric"].get(label, ""): float(row["value"][1]) for row in rows}
        return {name: load for name, load in loads.items() if load >= 0}

    def close(self) -> None:
        """Stop the query threads and drop connections."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        self.client.close()


def _is_left_out(query: Query, sample: Mapping[str, Any]) -> bool:
    return bool(query.target and query.target != query.label and query.target in sample["metric"])


def _of_services(query: Query, answers: Answers) -> list[dict[str, Any]]:
    """The rows of whole services."""
    return [sample for sample in answers.get(query.signal, ()) if not _is_left_out(query, sample)]

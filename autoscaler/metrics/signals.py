"""The signals of all services: every query asked at once, and the answers as arrays.

This module must not know what a snapshot is made of.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from autoscaler.metrics import presets
from autoscaler.metrics.client import PrometheusClient, PrometheusConfig, PrometheusQueryError
from autoscaler.metrics.latency_histograms import Buckets, read_buckets
from autoscaler.metrics.queries import Query, build_queries, candidates_by_signal, per_pool
from policies.contract import Floats, MetricsUnavailable
from policies.engine import ConfigError
from policies.spec import ScalingSpec

WORKERS = 8
"""Queries in flight at once."""
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
        self._client = PrometheusClient(config)
        self.queries = build_queries(config, specs)
        self._executor = ThreadPoolExecutor(WORKERS, "prometheus")
        self._rows = {
            kind: {names.get(spec.service, spec.service): row for row, spec in enumerate(specs)}
            for kind, names in (
                ("engine", config.names),
                ("gateway", config.gateway_names),
                ("replicas", config.replicas_names),
            )
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
        try:
            self._client.log_in()
        except ConfigError as error:
            raise MetricsUnavailable(str(error)) from None
        until_s = time.monotonic() + self.config.deadline_s
        futures = {query.signal: self._executor.submit(self._client.ask, query.text, until_s) for query in self.queries}
        answers, problems = {}, []
        for signal, future in futures.items():
            try:
                answers[signal] = future.result(max(0.0, until_s - time.monotonic()) + self.config.timeout_s)
            except (PrometheusQueryError, TimeoutError) as error:
                problems.append(f"{signal}: {error or 'no answer in time'}")
        if not answers:
            raise MetricsUnavailable(f"{self.config.url}: {problems[0]}")
        return answers, problems

    def time_s(self, answers: Answers, otherwise: float) -> float:
        """The server's clock where it says a time: ages are differences on that clock alone."""
        return max((float(rows[0]["value"][0]) for rows in answers.values() if rows), default=otherwise)

    def arrays(self, answers: Answers, problems: list[str]) -> dict[str, Floats]:
        """Every signal as an array, (n, P) by pool or (n,) by service; `problems` is told what is no number."""
        return {query.signal: self._fill(query, answers.get(query.signal), problems) for query in self.queries}

    def buckets(self, signal: str, rows: list[dict[str, Any]]) -> Buckets:
        """The buckets of a latency histogram by service; none where the signal is not asked for."""
        query = next((one for one in self.queries if one.signal == signal), None)
        if query is None:
            return read_buckets([], "", {}, len(self.specs))
        return read_buckets(rows, query.label, self._rows[query.kind], len(self.specs))

    def _fill(self, query: Query, rows: list[dict[str, Any]] | None, problems: list[str]) -> Floats:
        """One signal as an array: (n, P) by pool, (n,) by service. Buckets are read elsewhere."""
        n, pools = len(self.specs), max(len(spec.pools) for spec in self.specs)
        values = np.full((n, pools), np.nan)
        if rows is not None and not query.signal.endswith("_bucket"):
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
                if not np.isfinite(value):
                    problems.append(f"{query.signal}: {self.specs[row].service} reports {sample['value'][1]}")
                    value = np.nan
                values[row, column] = value
        return values if query.pool_label or per_pool(query.signal) else values[:, 0]

    def replica_loads(self, window_s: float) -> dict[str, float]:
        """Running requests by replica, for removing the least loaded first; empty when unknown."""
        names, _ = candidates_by_signal(self.config).get("running", ((), ""))
        label = self.config.replica_label
        try:
            rows = self._client.ask(presets.render("running", names, (label,), self.config.matchers, window_s))
        except PrometheusQueryError:
            return {}
        return {row["metric"].get(label, ""): float(row["value"][1]) for row in rows}

    def close(self) -> None:
        """Stop the query threads and drop connections."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._client.close()

"""The queries of a configuration: one per signal, for all services at once.

This module must not know how they are sent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from autoscaler.metrics import presets, promql
from autoscaler.metrics.client import Names, PrometheusConfig, label_values
from autoscaler.metrics.plausibility import HITS, NO_MORE_THAN, NO_MORE_WINDOWS, most_of_a_target
from autoscaler.metrics.promql import Grouping
from policies.engine import ConfigError
from policies.spec import ScalingSpec

Kind = Literal["engine", "gateway", "replicas"]
"""Whose naming of services a query follows."""
INSTANCE = "instance"
"""The label that names a target of a gateway: Prometheus gives it to everything that it scrapes."""


LONGEST_VALUES = 50_000
"""Characters of all label values of services together: a query has them up to a hundred times, and 10 MB are taken."""


@dataclass(frozen=True)
class Query:
    """One PromQL text, what its answer is grouped by and how its rows are found.

    Attributes:
        signal: name in `presets.SIGNALS`, or `seen`, `sample_time`.
        text: PromQL.
        label: the label that names the service.
        pool_label: the label that names the pool, if the answer is kept apart by pool.
        kind: whose naming of services it follows.
        target: the label that names a target, in the rows of those that are left out.
        highest: what a target can report at most, else it is left out.
        histograms: the names of the native histograms that it reads.
    """

    signal: str
    text: str
    label: str
    pool_label: str | None
    kind: Kind
    target: str = ""
    highest: float = math.inf
    histograms: tuple[str, ...] = ()


def per_pool(signal: str) -> bool:
    """Whether a signal is kept apart by pool."""
    return signal == "seen" or (signal in presets.SIGNALS and presets.SIGNALS[signal].per_pool)


def candidates_by_signal(config: PrometheusConfig) -> dict[str, tuple[tuple[str, ...], Kind]]:
    """Metric names to look up and whose naming they follow, by signal: own names, then the gateway's, then engines'."""
    found: dict[str, tuple[tuple[str, ...], Kind]] = {}
    for engine in config.engines:
        for signal, names in presets.ENGINES[engine].items():
            found[signal] = ((*found.get(signal, ((), ""))[0], *names), "engine")
    sources: tuple[tuple[Kind, presets.Gateway | None], ...] = (
        ("gateway", presets.GATEWAYS.get(config.gateway)),
        ("replicas", presets.REPLICA_SOURCES.get(config.replicas)),
    )
    for kind, preset in sources:
        found |= {signal: (names, kind) for signal, names in (preset.names.items() if preset else ())}
    return found | {signal: (names, found.get(signal, ((), "engine"))[1]) for signal, names in config.metrics.items()}


def names_of(config: PrometheusConfig, kind: Kind) -> Names:
    """Label values by service, where they are not its name."""
    return {"engine": config.names, "gateway": config.gateway_names, "replicas": config.replicas_names}[kind]


def grouping_of(config: PrometheusConfig, kind: Kind, signal: str, services: Iterable[str]) -> Grouping:
    """Which labels name services, pools and targets in the series of a signal, and which values are these services'.

    Raises:
        ConfigError: when these are too many for one query.
    """
    values = [value for service in services for value in label_values(names_of(config, kind), service)]
    if sum(map(len, values)) + len(values) > LONGEST_VALUES:
        raise ConfigError(f"metrics: the names of {len(values)} services are too long for one query: set shards")
    gateway = presets.GATEWAYS.get(config.gateway)
    replicas = presets.REPLICA_SOURCES.get(config.replicas)
    if kind == "replicas":
        label = config.replicas_label or (replicas.label if replicas else config.service_label)
        return Grouping((label,), only=promql.one_of(label, values))
    if kind == "gateway":
        label = config.gateway_label or (gateway.label if gateway else config.service_label)
        return Grouping((label,), INSTANCE, config.scraper_labels, only=promql.one_of(label, values))
    pool = (config.pool_label,) if config.pool_label and per_pool(signal) else ()
    copies = tuple(label for engine in config.engines for label in presets.COPIES.get(engine, ()))
    only = promql.one_of(config.service_label, values)
    return Grouping((config.service_label, *pool), config.replica_label, config.scraper_labels, copies, only)


def build_queries(config: PrometheusConfig, specs: Sequence[ScalingSpec]) -> list[Query]:
    """One query per signal for all services.

    The one for what is `seen` also answers which native histograms there are, in rows with the label `promql.NATIVE`.
    """
    window_s = config.window_s or specs[0].interface.window.control_interval_s
    services = [spec.service for spec in specs]
    gateway = presets.GATEWAYS.get(config.gateway)
    waits = gateway is not None and not gateway.measures_ttft and "queue_mean" in gateway.names
    edges = {
        # All edges for a histogram, or where a wait at the gateway is taken off the objective.
        "ttft_bucket": () if waits or config.histograms else sorted({spec.slo.ttft_s for spec in specs}),
        "tpot_bucket": () if config.histograms else sorted({spec.slo.tpot_s for spec in specs}),
    }
    queries = []
    candidates = candidates_by_signal(config)
    for signal, (names, kind) in candidates.items():
        group = grouping_of(config, kind, signal, services)
        other, others_kind = candidates.get(NO_MORE_THAN.get(signal, ""), ((), kind))
        most = None
        if other and others_kind == kind:
            most = promql.Most(NO_MORE_THAN[signal], other, HITS, NO_MORE_WINDOWS * window_s)
        label, pool_label = group.services[0], group.services[1] if len(group.services) > 1 else None
        highest = most_of_a_target(signal, specs)
        text = promql.render(signal, names, group, config.matchers, window_s, edges.get(signal, ()), highest, most)
        queries.append(Query(signal, text, label, pool_label, kind, group.target, highest))
        if signal == "running":
            seen, taken = promql.render_targets(names, group, config.matchers, window_s)
            seen = " or ".join([seen, *_native_names(config, services, window_s)])
            queries.append(Query("seen", seen, label, pool_label, kind))
            queries.append(Query("sample_time", taken, label, None, kind))
    return queries


def build_native_queries(config: PrometheusConfig, specs: Sequence[ScalingSpec]) -> list[Query]:
    """For histograms that the server stores as native ones: a query for each signal that is a part of one."""
    window_s = config.window_s or specs[0].interface.window.control_interval_s
    services = [spec.service for spec in specs]
    queries = []
    for signal, (names, kind) in _histogram_parts(config).items():
        group = grouping_of(config, kind, signal, services)
        highest = most_of_a_target(signal, specs)
        text = promql.render_native(signal, names, group, config.matchers, window_s, highest)
        whole = tuple(promql.whole_name(name) for name in names)
        queries.append(Query(signal, text, group.services[0], None, kind, group.target, highest, whole))
    return queries


def _histogram_parts(config: PrometheusConfig) -> dict[str, tuple[tuple[str, ...], Kind]]:
    """Of `candidates_by_signal` those that are parts of histograms."""
    parts = {
        signal: (tuple(name for name in names if promql.is_histogram_part(name)), kind)
        for signal, (names, kind) in candidates_by_signal(config).items()
        if presets.SIGNALS[signal].series in ("rate", "bucket_rate")
    }
    return {signal: found for signal, found in parts.items() if found[0]}


def _native_names(config: PrometheusConfig, services: Sequence[str], window_s: float) -> list[str]:
    """What asks for the names of native histograms, by whose naming of services they follow."""
    names: dict[Kind, list[str]] = {}
    for some, kind in _histogram_parts(config).values():
        names.setdefault(kind, []).extend(some)
    return [
        promql.render_native_names(every, grouping_of(config, kind, "ttft_bucket", services), config.matchers, window_s)
        for kind, every in names.items()
    ]

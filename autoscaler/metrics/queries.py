"""The queries of a configuration: one per signal, for all services at once.

This module must not know how they are sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from autoscaler.metrics import presets
from autoscaler.metrics.client import PrometheusConfig
from policies.spec import ScalingSpec

Kind = Literal["engine", "gateway", "replicas"]
"""Whose naming of services a query follows."""


@dataclass(frozen=True)
class Query:
    """One PromQL text, what its answer is grouped by and how its rows are found.

    Attributes:
        signal: name in `presets.SIGNALS`, or `seen`, `sample_time`.
        text: PromQL.
        label: the label that names the service.
        pool_label: the label that names the pool, if the answer is kept apart by pool.
        kind: whose naming of services it follows.
    """

    signal: str
    text: str
    label: str
    pool_label: str | None
    kind: Kind


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


def build_queries(config: PrometheusConfig, specs: Sequence[ScalingSpec]) -> list[Query]:
    """One query per signal for all services."""
    window_s = config.window_s or specs[0].interface.window.control_interval_s
    gateway = presets.GATEWAYS.get(config.gateway)
    replicas = presets.REPLICA_SOURCES.get(config.replicas)
    labels = {
        "engine": config.service_label,
        "gateway": config.gateway_label or (gateway.label if gateway else config.service_label),
        "replicas": config.replicas_label or (replicas.label if replicas else config.service_label),
    }
    waits = gateway is not None and not gateway.measures_ttft and "queue_wait" in gateway.names
    edges = {
        # All edges for a histogram, or where a wait at the gateway moves the edge that is read.
        "ttft_bucket": () if waits or config.histograms else sorted({spec.slo.ttft_s for spec in specs}),
        "tpot_bucket": () if config.histograms else sorted({spec.slo.tpot_s for spec in specs}),
    }
    queries = []
    for signal, (names, kind) in candidates_by_signal(config).items():
        pool_label = config.pool_label if presets.SIGNALS[signal].per_pool and kind == "engine" else None
        by = (labels[kind], *([pool_label] if pool_label else []))
        text = presets.render(signal, names, by, config.matchers, window_s, edges.get(signal, ()))
        queries.append(Query(signal, text, labels[kind], pool_label, kind))
        if signal == "running":
            seen = presets.render_seen(names, by, config.matchers, window_s)
            queries.append(Query("seen", seen, labels[kind], pool_label, kind))
            taken = presets.render_sample_time(names, by[:1], config.matchers)
            queries.append(Query("sample_time", taken, labels[kind], None, kind))
    return queries

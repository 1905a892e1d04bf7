"""What `jevons check` proves before anything is scaled: every query, the objectives, the actuator's rights.

Everything is asked of the live servers, and nothing is changed.
This module must not know about decisions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np

from autoscaler.actuators.base import Access
from autoscaler.metrics import presets
from autoscaler.metrics.client import PrometheusClient, PrometheusConfig, PrometheusQueryError
from autoscaler.metrics.queries import Query, build_queries, candidates_by_signal
from policies.engine import ConfigError
from policies.spec import ScalingSpec

NAMED = 5
"""Services named in one line."""
MIN_SAMPLES = 2
"""Samples that a rate needs within its window."""


def check_metrics(config: PrometheusConfig, specs: Sequence[ScalingSpec]) -> list[Access]:
    """Prove every query against the live server.

    A signal that is not needed passes without a metric, with a remark; a query that the server refuses does not pass.
    """
    client = PrometheusClient(config)
    try:
        client.log_in()
        known = client.names()
        lines = [Access(f"Prometheus {config.url}", True, f"{len(known)} metric names")]
        queries = build_queries(config, specs)
        answers: dict[str, list[dict[str, Any]]] = {}
        for query in queries:
            try:
                answers[query.signal] = client.ask(query.text)
            except PrometheusQueryError as error:
                lines.append(Access(query.signal, False, f"{error}; the query was {query.text}"))
                continue
            lines.append(_signal(config, specs, query, answers[query.signal], known))
        lines += _objectives(config, specs, queries, client)
        lines += _freshness(config, specs, answers)
        lines.append(_samples(config, specs, client))
    except (PrometheusQueryError, ConfigError) as error:
        return [Access(f"Prometheus {config.url}", False, str(error))]
    finally:
        client.close()
    return lines


def suggest(candidates: Sequence[str], known: set[str]) -> str:
    """The name on the server that is most like one of the candidates, empty when none is."""
    plain = {re.sub(r"[^a-z0-9]", "_", name.lower()): name for name in sorted(known)}
    for candidate in candidates:
        wanted = re.sub(r"[^a-z0-9]", "_", candidate.partition("{")[0].lower())
        ends = [name for flat, name in plain.items() if flat.endswith(wanted.split("_", 1)[-1])]
        if ends:
            return ends[0]
    for candidate in candidates:
        close = get_close_matches(candidate.partition("{")[0].lower(), list(plain), n=1, cutoff=0.75)
        if close:
            return plain[close[0]]
    return ""


def _signal(
    config: PrometheusConfig, specs: Sequence[ScalingSpec], query: Query, rows: list[dict[str, Any]], known: set[str]
) -> Access:
    """One line for one query: which services have an answer, and what is wrong for the others."""
    signal = "running" if query.signal in ("seen", "sample_time") else query.signal
    candidates = candidates_by_signal(config)
    names, _ = candidates[signal]
    found = [name for name in names if _exists(name, known)]
    meaning = presets.SIGNALS[signal].meaning if query.signal == signal else query.signal.replace("_", " ")
    # Arrivals at a gateway are as good a sign of load as tokens.
    optional = not presets.SIGNALS[signal].needed or (signal == "generation" and "arrival" in candidates)
    if not found:
        alias = suggest(names, known)
        hint = f"; {alias} looks like it: set metrics: {{{signal}: [{alias}]}}" if alias else ""
        detail = f"no metric named {names[0]}{hint}"
        return Access(query.signal, optional, f"{detail} ({'not needed' if optional else 'needed'}: {meaning})")
    labels = {row["metric"].get(query.label, "") for row in rows}
    mapping = {"engine": config.names, "gateway": config.gateway_names, "replicas": config.replicas_names}[query.kind]
    missing = [spec.service for spec in specs if mapping.get(spec.service, spec.service) not in labels]
    if not missing:
        return Access(query.signal, True, f"{found[0]}: {meaning}, {len(specs)} of {len(specs)} services")
    unused = sorted(labels - {mapping.get(spec.service, spec.service) for spec in specs} - {""})
    seen = f"label {query.label} has {', '.join(unused[:NAMED])}" if unused else f"no series has label {query.label}"
    if labels == {""} or not rows:
        seen = f"its series have no label {query.label}" if rows else "it has no sample in the window"
    shown = ", ".join(missing[:NAMED]) + (f" and {len(missing) - NAMED} more" if len(missing) > NAMED else "")
    return Access(query.signal, optional, f"{found[0]}: nothing for {shown}; {seen}")


def _objectives(
    config: PrometheusConfig, specs: Sequence[ScalingSpec], queries: Sequence[Query], client: PrometheusClient
) -> list[Access]:
    """Whether the latency objectives are bucket edges: only there is attainment exact."""
    lines = []
    for signal, objective in (("ttft_bucket", "ttft_s"), ("tpot_bucket", "tpot_s")):
        query = next((one for one in queries if one.signal == signal), None)
        if query is None:
            lines.append(Access(objective, False, "no engine or gateway in `metrics` has this histogram"))
            continue
        names, _ = candidates_by_signal(config)[signal]
        text = presets.render(signal, names, (), config.matchers, config.window_s or 60.0).replace(
            "by (, le)", "by (le)"
        )
        edges = sorted(float(row["metric"]["le"]) for row in client.ask(text))
        finite = [edge for edge in edges if np.isfinite(edge)]
        wanted: dict[float, list[str]] = {}
        for spec in specs:
            wanted.setdefault(getattr(spec.slo, objective), []).append(spec.service)
        for slo_s, services in sorted(wanted.items()):
            subject = f"{objective} {slo_s:g} of {', '.join(services[:NAMED])}"
            if not finite:
                lines.append(Access(subject, False, f"{names[0]}: no buckets yet, send a request first"))
            elif any(np.isclose(edge, slo_s, rtol=1e-6) for edge in finite):
                lines.append(Access(subject, True, "is a bucket edge"))
            else:
                near = sorted(finite, key=lambda edge: abs(np.log(edge / slo_s)))[:2]
                shown = " or ".join(f"{edge:g}" for edge in sorted(near))
                lines.append(Access(subject, False, f"is no bucket edge, so attainment cannot be told; use {shown}"))
    return lines


def _freshness(
    config: PrometheusConfig, specs: Sequence[ScalingSpec], answers: Mapping[str, list[dict[str, Any]]]
) -> list[Access]:
    rows = answers.get("sample_time", [])
    ages = {row["metric"].get(config.service_label, ""): row["value"][0] - float(row["value"][1]) for row in rows}
    old = {name: age for name, age in ages.items() if age > config.max_age_s}
    if not ages:
        return []
    worst = max(ages.values())
    shown = f"newest samples are at most {worst:.1f} s old"
    return [Access("freshness", not old, shown if not old else f"{shown}: {', '.join(sorted(old)[:NAMED])}")]


def _samples(config: PrometheusConfig, specs: Sequence[ScalingSpec], client: PrometheusClient) -> Access:
    """Whether the rate window holds the samples that a rate needs.

    Only series that were there when the window began, and still are, count: a replica that has just started says
    nothing about how often it is scraped. Where all are that young nothing can be told yet.
    """
    window_s = config.window_s or specs[0].interface.window.control_interval_s
    window = presets.duration(window_s)
    names, _ = candidates_by_signal(config)["running"]
    series = [presets.selector(name, config.matchers) for name in names]
    terms = []
    for one in series:
        old = f"({one} and {one} offset {window})"
        terms.append(f"(count_over_time({one}[{window}]) and {old}) or ({old} * 0)")
    rows = client.ask(f"min({' or '.join(terms)})")
    if not rows:
        there = client.ask(f"count({' or '.join(series)})")
        detail = f"cannot be told yet: no series is older than {window_s:g} s" if there else f"{names[0]}: no series"
        return Access("scrape interval", bool(there), detail)
    samples = float(rows[0]["value"][1])
    detail = f"{samples:.0f} samples in a window of {window_s:g} s"
    if samples <= MIN_SAMPLES:
        detail += ": scrape more often, or set a longer window_s"
    return Access("scrape interval", samples > MIN_SAMPLES, detail)


def _exists(candidate: str, known: set[str]) -> bool:
    name = candidate.partition("{")[0]
    if name.startswith("~"):
        return any(re.fullmatch(name[1:], one) for one in known)
    return name in known

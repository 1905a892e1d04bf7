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
from autoscaler.metrics import presets, promql
from autoscaler.metrics.client import PrometheusClient, PrometheusConfig, PrometheusQueryError, label_values
from autoscaler.metrics.prometheus import PrometheusSource
from autoscaler.metrics.promql import Grouping, is_histogram_part, whole_name
from autoscaler.metrics.queries import Query, candidates_by_signal, grouping_of, names_of
from autoscaler.metrics.signals import UNSTORED, Answers, SignalReader
from autoscaler.problem_texts import some_of
from policies.contract import MetricsUnavailable
from policies.engine import ConfigError
from policies.spec import ScalingSpec

NAMED = 5
"""Services named in one line."""
MIN_SAMPLES = 2
"""Samples that a rate needs within its window."""


def check_metrics(config: PrometheusConfig, specs: Sequence[ScalingSpec]) -> list[Access]:
    """Prove every query against the live server, with the code that reads it later.

    A signal that is not needed passes without a metric, with a remark; a query that the server refuses does not pass.
    """
    lines: list[Access] = []
    try:
        signals = SignalReader(config, specs)
    except ConfigError as error:
        return [Access("metrics", False, str(error))]
    try:
        signals.client.log_in()
        known = signals.client.names()
        lines.append(Access(f"Prometheus {config.url}", True, f"{len(known)} metric names"))
        answers, failed = signals.ask()
        for query in signals.queries:
            if query.signal in answers:
                lines.append(_signal(config, specs, query, answers[query.signal], known, failed, signals.client))
            else:
                why = next(
                    (text for text in failed if text.startswith(f"{query.signal}: ")), f"{query.signal}: no answer"
                )
                lines.append(Access(query.signal, False, f"{why.partition(': ')[2]}; the query was {query.text}"))
        lines += _wakes(config, specs)
        lines += _objectives(config, specs, signals.queries, signals.client, failed)
        lines += _targets(config, specs, signals, answers)
        lines += _freshness(config, specs, answers)
        lines.append(_samples(config, specs, signals.client))
        lines += _reading(config, specs, lines)
    except (PrometheusQueryError, MetricsUnavailable, ConfigError) as error:
        return [Access(f"Prometheus {config.url}", False, str(error))]
    finally:
        signals.close()
    return lines


def alias_of(signal: str, config: PrometheusConfig, known: set[str]) -> str:
    """What a signal may be called on this server, empty when nothing is like it or what is counts something else.

    A name that stands for another signal does, in the configuration or in a preset, and so does a counter that lacks
    words of ours: it counts the whole. With `prompt_tokens_total` for the cached ones, every prompt would be cached.
    """
    candidates = candidates_by_signal(config)
    names, _ = candidates[signal]
    read = [(one, used) for one, (used, _) in candidates.items()]
    for preset in (*presets.ENGINES.values(), *(gateway.names for gateway in presets.GATEWAYS.values())):
        read += preset.items()
    taken = {name.partition("{")[0] for one, used in read if one != signal for name in used}
    ours = [_words(name.partition("{")[0]) for name in names]
    said = {one: _words(one) for one in known if _kind(one) == "total"}
    wholes = {one for one, words in said.items() if any(words < our for our in ours) and words not in ours}
    return suggest(names, known - taken - wholes)


def suggest(candidates: Sequence[str], known: set[str]) -> str:
    """The name on the server that is most like one of the candidates, empty when none is.

    What it counts must be the same: a total is none of a histogram's buckets, sums or counts.
    """
    plain = {re.sub(r"[^a-z0-9]", "_", name.lower()): name for name in sorted(known)}
    for candidate in candidates:
        wanted = re.sub(r"[^a-z0-9]", "_", candidate.partition("{")[0].lower())
        ends = [name for flat, name in plain.items() if flat.endswith(wanted.split("_", 1)[-1])]
        if ends:
            return ends[0]
    for candidate in candidates:
        name = candidate.partition("{")[0].lower()
        alike = [flat for flat in plain if _kind(flat) == _kind(name)]
        close = get_close_matches(name, alike, n=1, cutoff=0.75)
        if close:
            return plain[close[0]]
    return ""


def _words(name: str) -> set[str]:
    """Without the prefix of whose it is."""
    return set(re.split(r"[^a-z0-9]+", name.rpartition(":")[2].lower()))


def _kind(name: str) -> str:
    ending = name.rpartition("_")[2]
    return ending if ending in ("total", "bucket", "sum", "count") else ""


def _signal(
    config: PrometheusConfig,
    specs: Sequence[ScalingSpec],
    query: Query,
    rows: list[dict[str, Any]],
    known: set[str],
    failed: Sequence[str],
    client: PrometheusClient,
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
        found = [whole for name in names if is_histogram_part(name) and (whole := whole_name(name)) in known]
        meaning += ", stored as a native histogram" if found else ""
    if not found and any(said.startswith(f"{query.signal}: ") and UNSTORED in said for said in failed):
        return Access(query.signal, False, f"{whole_name(names[0])} {UNSTORED}")
    if not found:
        alias = alias_of(signal, config, known)
        hint = f"; {alias} looks like it: set metrics: {{{signal}: [{alias}]}}" if alias else ""
        detail = f"no metric named {names[0]}{_asleep(signal, specs)}{hint}"
        return Access(query.signal, optional, f"{detail} ({'not needed' if optional else 'needed'}: {meaning})")
    labels = {row["metric"].get(query.label, "") for row in rows}
    wanted = {spec.service: label_values(names_of(config, query.kind), spec.service) for spec in specs}
    missing = [service for service, values in wanted.items() if labels.isdisjoint(values)]
    window_s = config.window_s or specs[0].interface.window.control_interval_s
    if missing or signal == "arrival":
        every = client.ask(promql.render_services(names, query.label, config.matchers, window_s))
        labels |= {row["metric"].get(query.label, "") for row in every}
    unused = sorted(labels - {value for values in wanted.values() for value in values} - {""})
    shown = some_of(unused, NAMED)
    if not missing:
        # Adapters of a model have names of their own at a gateway.
        rest = f"; not counted: {query.label} {shown}" if signal == "arrival" and unused else ""
        return Access(query.signal, True, f"{found[0]}: {meaning}, {len(specs)} of {len(specs)} services{rest}")
    seen = f"label {query.label} has {shown}" if unused else f"no series has label {query.label}"
    misnamed = False
    if labels == {""}:
        seen, misnamed = f"its series have no label {query.label}", True
    elif not labels:
        seen = "it has no sample in the window"
        if config.matchers and client.ask(promql.render_services(names, query.label, {}, window_s)):
            wrong = some_of([f'{label}="{value}"' for label, value in config.matchers.items()], NAMED)
            seen, misnamed = f"its series do not have {wrong}: see matchers", True
    services = some_of(missing, NAMED)
    rest = _asleep(signal, [spec for spec in specs if spec.service in missing])
    # What the configuration asks for by name is there under other labels; of an engine's, others' may be all there are.
    asked = query.kind != "engine" or signal in config.metrics
    return Access(
        query.signal, optional and not (asked and misnamed), f"{found[0]}: nothing for {services}; {seen}{rest}"
    )


def _asleep(signal: str, specs: Sequence[ScalingSpec]) -> str:
    """What services without a queue that is counted have to know, if they may go to zero."""
    asleep = signal == "queue" and any(spec.sleeps for spec in specs)
    return "; at zero replicas only an arrival starts a service" if asleep else ""


def _wakes(config: PrometheusConfig, specs: Sequence[ScalingSpec]) -> list[Access]:
    """Whether anything can tell that a service at zero replicas is wanted: no engine is there to say it."""
    asleep = [spec.service for spec in specs if spec.sleeps]
    if not asleep or {"arrival", "queue"} & candidates_by_signal(config).keys():
        return []
    how = "set metrics.gateway, or min_replicas: 1 in one of its pools"
    detail = f"{some_of(asleep, NAMED)}: nothing counts requests while no replica runs, so none would be started; {how}"
    return [Access("from zero", False, detail)]


def _objectives(
    config: PrometheusConfig,
    specs: Sequence[ScalingSpec],
    queries: Sequence[Query],
    client: PrometheusClient,
    failed: Sequence[str],
) -> list[Access]:
    """Whether the latency objectives are bucket edges: only there is attainment exact."""
    lines = []
    for signal, objective in (("ttft_bucket", "ttft_s"), ("tpot_bucket", "tpot_s")):
        query = next((one for one in queries if one.signal == signal), None)
        if query is None:
            lines.append(Access(objective, False, "no engine or gateway in `metrics` has this histogram"))
            continue
        names, kind = candidates_by_signal(config)[signal]
        only = grouping_of(config, kind, signal, [spec.service for spec in specs]).only
        # Where the services' label has another name, what anybody exposes still says which edges there are.
        buckets = _all_buckets(config, client, signal, names, only) or _all_buckets(config, client, signal, names, "")
        gone = next((said for said in failed if said.startswith(f"{signal}: ") and UNSTORED in said), "")
        why = gone.partition(": ")[2] or f"{names[0]}: no buckets yet, send a request first"
        wanted: dict[float, list[str]] = {}
        for spec in specs:
            wanted.setdefault(getattr(spec.slo, objective), []).append(spec.service)
        for slo_s, services in sorted(wanted.items()):
            subject = f"{objective} {slo_s:g} of {', '.join(services[:NAMED])}"
            # A native histogram has edges where it has events; the bucket that the objective is in is what matters.
            inside = [
                edge
                for lower, upper in buckets
                if lower * (1 + 1e-6) < slo_s < upper * (1 - 1e-6)
                for edge in (lower, upper)
            ]
            if not buckets:
                lines.append(Access(subject, False, why))
            elif not inside:
                lines.append(Access(subject, True, "is a bucket edge"))
            else:
                shown = " or ".join(f"{edge:g}" for edge in sorted(set(inside)) if 0 < edge < np.inf)
                lines.append(Access(subject, False, f"is no bucket edge, so attainment cannot be told; use {shown}"))
    return lines


def _all_buckets(
    config: PrometheusConfig, client: PrometheusClient, signal: str, names: Sequence[str], only: str
) -> list[tuple[float, float]]:
    """Lower and upper edge of every bucket, of all services together; of a native histogram those with events."""
    window_s = config.window_s or 60.0
    together = Grouping((), only=only)
    rows = client.ask(promql.render(signal, names, together, config.matchers, window_s))
    edges = sorted({edge for row in rows if (edge := float(row["metric"].get("le", "NaN"))) == edge})
    classic = list(zip([0.0, *edges], edges, strict=False))
    if not client.ask(promql.render_native_names(names, together, config.matchers, window_s)):
        return classic
    rows = client.ask(promql.render_native(signal, names, together, config.matchers, window_s))
    native = [bucket for row in rows if "histogram" in row for bucket in row["histogram"][1].get("buckets", ())]
    return classic + [(float(lower), float(upper)) for _, lower, upper, _ in native]


def _targets(
    config: PrometheusConfig, specs: Sequence[ScalingSpec], signals: SignalReader, answers: Answers
) -> list[Access]:
    """Whether targets can be told apart, and label values belong to services that there are."""
    services = {spec.service for spec in specs}
    lines = [
        Access(field, False, f"there is no service {name!r}")
        for field in ("names", "gateway_names", "replicas_names")
        for name in sorted(set(getattr(config, field)) - services)
    ]
    rows = answers.get("seen", ())
    named = {"pool_label": [config.pool_label] if config.pool_label else []}
    # Of the labels that are there unless said otherwise, not every Prometheus gives each.
    named["scraper_labels"] = sorted(
        set(config.scraper_labels) - set(PrometheusConfig.model_fields["scraper_labels"].default)
    )
    lines += [
        Access(field, False, f"none of the replicas' series has the label {label}")
        for field, labels in named.items()
        for label in labels
        if rows and not any(row["metric"].get(label) for row in rows)
    ]
    targets, _ = signals.targets(answers)
    found = [set(one) for one in targets.scrapers]
    if any("" in names for names in found):
        detail = f"its series have no label {config.replica_label}: set replica_label to one that names a replica"
        return [*lines, Access("targets", False, detail)]
    shown = f"{sum(map(len, found))} targets by the label {config.replica_label}"
    return [*lines, Access("targets", True, shown)] if any(found) else lines


def _reading(config: PrometheusConfig, specs: Sequence[ScalingSpec], lines: Sequence[Access]) -> list[Access]:
    """What a reading of the whole finds: replicas that are scraped twice, values that cannot be."""
    source = PrometheusSource(config, specs)
    try:
        source.read()
    finally:
        source.close()
    said = ["is no bucket edge"]  # by the objectives
    said += ["samples in the window"] * any(line.subject == "scrape interval" and not line.ok for line in lines)
    told = [problem for problem in source.problems if not any(one in problem for one in said)]
    found = [Access("reading", False, problem) for problem in told]
    known = {line.detail.partition("; the query was ")[0] for line in lines if not line.ok}
    return [line for line in found if line.detail.partition(": ")[2] not in known]


def _freshness(
    config: PrometheusConfig, specs: Sequence[ScalingSpec], answers: Mapping[str, list[dict[str, Any]]]
) -> list[Access]:
    rows = answers.get("sample_time", [])
    ages = {
        row["metric"].get(config.service_label, ""): float(row["value"][0]) - float(row["value"][1]) for row in rows
    }
    old = {name: age for name, age in ages.items() if not age <= config.max_age_s}
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
    window = promql.duration(window_s)
    names, kind = candidates_by_signal(config)["running"]
    only = grouping_of(config, kind, "running", [spec.service for spec in specs]).only
    series = [promql.selector(name, config.matchers, only) for name in names]
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

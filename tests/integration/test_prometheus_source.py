"""Snapshots from a real Prometheus that scrapes made-up engines: values, gaps, and every fault on the way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from exporters import ConstantEngine
from fault_proxy import FaultProxy
from servers import Prometheus, free_port, start, wait_until

from autoscaler.actuators.base import Access, FleetState, pools_of
from autoscaler.check import check_metrics
from autoscaler.metrics.client import PrometheusConfig
from autoscaler.metrics.prometheus import PrometheusSource
from policies.contract import MetricsUnavailable
from policies.spec import PoolSpec, ScalingSpec, Slo, find_engine

ENGINE = find_engine("llama-3.1-8b-h100", Path())
WINDOW_S = 6.0


def spec(service: str, ttft_s: float = 0.5) -> ScalingSpec:
    return ScalingSpec(
        service=service, slo=Slo(ttft_s=ttft_s, tpot_s=0.05), pools=(PoolSpec(engine=ENGINE, max_replicas=8),)
    )


def vllm(prefix: str = "vllm:", scale: float = 1.0) -> ConstantEngine:
    """Five requests per second of 100 prompt and 20 output tokens; 80 % of first tokens within 0.5 s."""
    return ConstantEngine(
        gauges={
            f"{prefix}num_requests_running": 6,
            f"{prefix}num_requests_waiting": 2,
            f"{prefix}kv_cache_usage_perc": 0.25,
        },
        rates={
            name: rate * scale
            for name, rate in {
                f"{prefix}prompt_tokens_total": 500,
                f"{prefix}prompt_tokens_cached_total": 200,
                f"{prefix}generation_tokens_total": 100,
                f'{prefix}request_success_total{{finished_reason="length"}}': 5,
                f"{prefix}request_prompt_tokens_sum": 500,
                f"{prefix}request_generation_tokens_sum": 100,
                f"{prefix}request_generation_tokens_count": 5,
                f'{prefix}time_to_first_token_seconds_bucket{{le="0.25"}}': 2,
                f'{prefix}time_to_first_token_seconds_bucket{{le="0.5"}}': 4,
                f'{prefix}time_to_first_token_seconds_bucket{{le="1.0"}}': 5,
                f'{prefix}time_to_first_token_seconds_bucket{{le="+Inf"}}': 5,
                f'{prefix}request_time_per_output_token_seconds_bucket{{le="0.05"}}': 5,
                f'{prefix}request_time_per_output_token_seconds_bucket{{le="+Inf"}}': 5,
            }.items()
        },
    )


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[Prometheus]:
    """One of its own for each test: what another test scraped would be answered for five minutes."""
    server = start(Prometheus, tmp_path / "prometheus", scrape_s=1.0)
    yield server
    server.stop()


@pytest.fixture
def engines(prometheus: Prometheus) -> Iterator[Callable[..., list[ConstantEngine]]]:
    """Scrape made-up engines until the window is full."""
    running: list[ConstantEngine] = []

    def scrape(groups: list[tuple[ConstantEngine, str]]) -> list[ConstantEngine]:
        running.extend(exporter for exporter, _ in groups)
        prometheus.scrape([(exporter.address, {"service": service}) for exporter, service in groups])
        prometheus.wait_scraped([exporter.address for exporter, _ in groups])
        time.sleep(WINDOW_S + 1.0)
        return running

    yield scrape
    for exporter in running:
        exporter.stop()


def state_of(specs: list[ScalingSpec], ready: int | list[int] = 1) -> Callable[[], FleetState]:
    def state() -> FleetState:
        known = np.broadcast_to(np.asarray(ready, np.float64).reshape(-1, 1), (len(specs), 1))
        none = np.zeros((len(specs), 1))
        return replace(
            FleetState.unknown(pools_of(specs)),
            replicas_target=known,
            replicas_ready=known,
            replicas_starting=none,
            replicas_draining=none,
            batch_cap=none + 64,
        )

    return state


def source(url: str, specs: list[ScalingSpec], ready: int | list[int] = 1, **options: object) -> PrometheusSource:
    config = PrometheusConfig.model_validate({"url": url, "window_s": WINDOW_S, **options})
    return PrometheusSource(config, specs, state_of(specs, ready))


def near(values: np.ndarray, *wanted: float) -> bool:
    return values.tolist() == pytest.approx(list(wanted), rel=0.1, nan_ok=True)


def test_reads_rates_levels_lengths_and_attainment(prometheus: Prometheus, engines: Callable[..., object]) -> None:
    # Two replicas of one service, one of another, whose names are the older, escaped ones.
    engines([(vllm(), "chat"), (vllm(), "chat"), (vllm("vllm_"), "code")])
    specs = [spec("chat"), spec("code"), spec("nobody")]
    snapshot = source(prometheus.url, specs, ready=[2, 1, 1]).read()
    assert near(snapshot.generation_tps, 200, 100, math.nan)
    assert near(snapshot.prefill_tps, 600, 300, math.nan)
    assert near(snapshot.finished_rps, 10, 5, math.nan)
    assert near(snapshot.arrival_rps, 10, 5, math.nan)
    assert near(snapshot.prompt_tokens_mean, 100, 100, math.nan)
    assert near(snapshot.output_tokens_mean, 20, 20, math.nan)
    assert near(snapshot.ttft_attainment, 0.8, 0.8, math.nan)
    assert near(snapshot.tpot_attainment, 1.0, 1.0, math.nan)
    assert near(snapshot.running[:, 0], 12, 6, math.nan)
    assert near(snapshot.waiting[:, 0], 4, 2, math.nan)
    assert near(snapshot.kv_cache_usage[:, 0], 0.25, 0.25, math.nan)
    assert snapshot.blind().tolist() == [False, False, True]


def test_a_replica_that_is_scraped_twice_makes_its_service_blind(
    prometheus: Prometheus, engines: Callable[..., object]
) -> None:
    engines([(vllm(), "chat"), (vllm(), "chat")])
    reader = source(prometheus.url, [spec("chat")])
    assert not reader.read().blind()[0]  # a replica that was just replaced looks like this once
    assert reader.read().blind()[0]
    assert "chat: 2 series for 1 replicas: scraped twice?" in reader.problems


def test_two_replicas_are_one_service(prometheus: Prometheus, engines: Callable[..., object]) -> None:
    engines([(vllm(), "chat"), (vllm(), "chat")])
    snapshot = source(prometheus.url, [spec("chat")], ready=2).read()
    assert near(snapshot.generation_tps, 200)
    assert not snapshot.blind()[0]
    assert near(snapshot.ttft_histogram_rps.sum(axis=1), 10)
    assert near(snapshot.oldest_wait_s, 0.4)  # four waiting, ten a second


def test_an_objective_between_edges_is_missing_not_guessed(
    prometheus: Prometheus, engines: Callable[..., object]
) -> None:
    engines([(vllm(), "chat")])
    specs = [spec("chat", ttft_s=0.4)]
    reader = source(prometheus.url, specs)
    assert np.isnan(reader.read().ttft_attainment[0])
    assert "ttft_bucket: chat: 0.4 s is no bucket edge" in reader.problems
    lines = {line.subject: line for line in check_metrics(reader.config, specs)}
    assert lines["ttft_s 0.4 of chat"].detail == "is no bucket edge, so attainment cannot be told; use 0.25 or 0.5"


def test_check_passes_and_names_the_alias_of_a_missing_metric(
    prometheus: Prometheus, engines: Callable[..., object]
) -> None:
    odd = vllm()
    odd.gauges["acme_num_requests_running"] = odd.gauges.pop("vllm:num_requests_running")
    engines([(vllm(), "chat"), (odd, "code")])
    good = check_metrics(source(prometheus.url, [spec("chat")]).config, [spec("chat")])
    assert [line for line in good if not line.ok] == []
    config = PrometheusConfig(url=prometheus.url, window_s=WINDOW_S, engines=("sglang",))
    running = next(line for line in check_metrics(config, [spec("code")]) if line.subject == "running")
    assert not running.ok
    assert running.detail.startswith("no metric named sglang:num_running_reqs")
    config = PrometheusConfig(url=prometheus.url, window_s=WINDOW_S, metrics={"running": ("num_requests_running",)})
    running = next(line for line in check_metrics(config, [spec("code")]) if line.subject == "running")
    assert "acme_num_requests_running looks like it" in running.detail


def test_check_judges_the_scrape_interval_by_series_that_are_old_enough(
    prometheus: Prometheus, engines: Callable[..., object]
) -> None:
    specs = [spec("chat")]

    def interval(window_s: float) -> Access:
        config = source(prometheus.url, specs, window_s=window_s).config
        return next(line for line in check_metrics(config, specs) if line.subject == "scrape interval")

    engines([(vllm(), "chat")])
    assert interval(WINDOW_S).ok
    assert interval(60.0) == Access("scrape interval", True, "cannot be told yet: no series is older than 60 s")
    for too_short_s in (0.1, 1.0):
        assert not interval(too_short_s).ok
        assert interval(too_short_s).detail.endswith("scrape more often, or set a longer window_s")
    young = vllm()
    prometheus.scrape([(young.address, {"service": "chat"})], "-young")
    prometheus.wait_scraped([young.address])
    assert interval(WINDOW_S).ok
    young.stop()


def test_not_a_number_and_infinity_are_missing(prometheus: Prometheus, engines: Callable[..., object]) -> None:
    sick = vllm()
    sick.gauges |= {"vllm:num_requests_running": "NaN", "vllm:kv_cache_usage_perc": "+Inf"}
    engines([(sick, "chat"), (vllm(), "code")])
    reader = source(prometheus.url, [spec("chat"), spec("code")])
    snapshot = reader.read()
    assert near(snapshot.running[:, 0], math.nan, 6)
    assert near(snapshot.kv_cache_usage[:, 0], math.nan, 0.25)
    assert snapshot.blind().tolist() == [True, False]
    assert {"running: chat reports NaN", "kv_cache_usage: chat reports +Inf"} <= set(reader.problems)


def test_a_restarted_engine_makes_no_negative_rate(prometheus: Prometheus, engines: Callable[..., object]) -> None:
    engine = vllm()
    engine.began_s -= 1000.0
    engines([(engine, "chat")])
    engine.began_s = time.monotonic()
    time.sleep(3.0)
    snapshot = source(prometheus.url, [spec("chat")]).read()
    assert 0.0 < snapshot.generation_tps[0] < 150.0
    assert 0.0 <= snapshot.prefill_tps[0] < 450.0
    assert 0.0 <= snapshot.ttft_attainment[0] <= 1.0


def test_old_samples_make_a_service_blind(prometheus: Prometheus, engines: Callable[..., object]) -> None:
    # The query still answers: Prometheus looks back five minutes.
    old = vllm()
    old.sample_age_s = 100.0
    engines([(old, "chat"), (vllm(), "code")])
    reader = source(prometheus.url, [spec("chat"), spec("code")])
    snapshot = reader.read()
    assert snapshot.blind().tolist() == [True, False]
    assert any("chat: the newest sample is 10" in problem for problem in reader.problems)


def test_an_engine_that_is_gone_makes_its_service_blind(prometheus: Prometheus, engines: Callable[..., object]) -> None:
    gone = vllm()
    engines([(gone, "chat")])
    reader = source(prometheus.url, [spec("chat")])
    assert not reader.read().blind()[0]
    gone.stop()
    wait_until(lambda: reader.read().blind()[0], "blind", limit_s=60)


def test_a_replica_that_is_not_scraped_makes_a_half_seen_service_blind(
    prometheus: Prometheus, engines: Callable[..., object]
) -> None:
    engines([(vllm(), "chat")])
    reader = source(prometheus.url, [spec("chat")], ready=2, discovery_s=0)
    assert reader.read().blind()[0]
    assert "chat: 1 of 2 replicas are scraped" in reader.problems


def test_a_service_scaled_to_zero_is_idle_not_blind(prometheus: Prometheus, engines: Callable[..., object]) -> None:
    engines([(vllm(), "other")])
    snapshot = source(prometheus.url, [spec("chat")], ready=0).read()
    assert snapshot.running[0, 0] == 0.0
    assert snapshot.generation_tps[0] == 0.0
    assert not snapshot.blind()[0]


def test_without_an_actuator_that_counts_what_is_scraped_is_ready(
    prometheus: Prometheus, engines: Callable[..., object]
) -> None:
    engines([(vllm(), "chat"), (vllm(), "chat")])
    specs = [spec("chat")]
    config = PrometheusConfig(url=prometheus.url, window_s=WINDOW_S)
    silent = PrometheusSource(config, specs, lambda: FleetState.unknown(pools_of(specs))).read()
    assert (silent.replicas_ready[0, 0], silent.replicas_target[0, 0]) == (2.0, 2.0)
    failed = PrometheusSource(config, specs, lambda: FleetState.unknown(pools_of(specs), ("no answer",))).read()
    assert np.isnan(failed.replicas_ready[0, 0])
    assert failed.blind()[0]


def test_prometheus_down_is_unavailable_within_the_deadline() -> None:
    reader = source(f"http://127.0.0.1:{free_port()}", [spec("chat")], deadline_s=1)
    with pytest.raises(MetricsUnavailable, match="refused"):
        reader.read()


@pytest.mark.parametrize("fault", [500, 503, 429, "cut", "empty"])
def test_a_failing_prometheus_is_unavailable(faulty_prometheus: FaultProxy, fault: int | str) -> None:
    faulty_prometheus.fault = lambda method, path: fault
    with pytest.raises(MetricsUnavailable):
        source(faulty_prometheus.url, [spec("chat")], deadline_s=1).read()


def test_a_slow_prometheus_is_unavailable_within_the_deadline(faulty_prometheus: FaultProxy) -> None:
    faulty_prometheus.fault = lambda method, path: "slow"
    faulty_prometheus.delay_s = 60.0
    with pytest.raises(MetricsUnavailable, match=r"imeout|deadline"):
        source(faulty_prometheus.url, [spec("chat")], timeout_s=0.5, deadline_s=1).read()


def test_a_fault_that_passes_is_not_seen(
    prometheus: Prometheus, faulty_prometheus: FaultProxy, engines: Callable[..., object]
) -> None:
    engines([(vllm(), "chat")])
    failed: list[int] = []

    def first_fails(method: str, path: str) -> int | None:
        failed.append(1)
        return 503 if len(failed) == 1 else None

    faulty_prometheus.fault = first_fails
    reader = source(faulty_prometheus.url, [spec("chat")])
    assert near(reader.read().generation_tps, 100)
    assert reader.problems == ()


def test_one_query_per_metric_however_many_services(faulty_prometheus: FaultProxy) -> None:
    asked = []
    for services in (1, 1000):
        faulty_prometheus.seen.clear()
        source(faulty_prometheus.url, [spec(f"s{number}") for number in range(services)], ready=0).read()
        asked.append(len(faulty_prometheus.seen))
    assert asked == [14, 14]


def test_refuses_a_token_that_is_not_there(tmp_path: Path) -> None:
    reader = source("http://127.0.0.1:9", [spec("chat")], auth={"bearer_token_file": str(tmp_path / "none")})
    with pytest.raises(MetricsUnavailable, match="cannot be read"):
        reader.read()

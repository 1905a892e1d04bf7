"""Snapshots from a real Prometheus that scrapes made-up engines: values, gaps, and every fault on the way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from exporters import ConstantEngine
from fault_proxy import FaultProxy
from scraped_engines import WINDOW_S, near, scrape, source, spec, vllm
from servers import Prometheus, free_port, wait_until

from autoscaler.actuators.base import Access, FleetState, pools_of
from autoscaler.check import check_metrics
from autoscaler.metrics.client import PrometheusConfig
from autoscaler.metrics.prometheus import PrometheusSource
from policies.contract import MetricsUnavailable

pytestmark = pytest.mark.scrapes


@pytest.fixture
def server(each_prometheus: Prometheus) -> Prometheus:
    return each_prometheus


@pytest.fixture
def engines(server: Prometheus) -> Iterator[Callable[..., list[ConstantEngine]]]:
    """Scrape made-up engines until the window is full."""
    running: list[ConstantEngine] = []

    def scraped(groups: list[tuple[ConstantEngine, str]]) -> list[ConstantEngine]:
        running.extend(exporter for exporter, _ in groups)
        scrape(server, [(exporter, {"service": service}) for exporter, service in groups])
        return running

    yield scraped
    for exporter in running:
        exporter.stop()


def test_reads_rates_levels_lengths_and_attainment(server: Prometheus, engines: Callable[..., object]) -> None:
    # Two replicas of one service, one of another, whose names are the older, escaped ones.
    engines([(vllm(), "chat"), (vllm(), "chat"), (vllm("vllm_"), "code")])
    specs = [spec("chat"), spec("code"), spec("nobody")]
    snapshot = source(server.url, specs, ready=[2, 1, 1]).read()
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


def test_two_replicas_are_one_service(server: Prometheus, engines: Callable[..., object]) -> None:
    engines([(vllm(), "chat"), (vllm(), "chat")])
    snapshot = source(server.url, [spec("chat")], ready=2).read()
    assert near(snapshot.generation_tps, 200)
    assert not snapshot.blind()[0]
    assert near(snapshot.ttft_histogram_rps.sum(axis=1), 10)
    assert near(snapshot.oldest_wait_s, 0.4)  # four waiting, ten a second


def test_an_objective_between_edges_is_missing_not_guessed(server: Prometheus, engines: Callable[..., object]) -> None:
    engines([(vllm(), "chat")])
    specs = [spec("chat", ttft_s=0.4)]
    reader = source(server.url, specs)
    assert np.isnan(reader.read().ttft_attainment[0])
    assert "ttft_bucket: chat: 0.4 s is no bucket edge" in reader.problems
    lines = {line.subject: line for line in check_metrics(reader.config, specs)}
    assert lines["ttft_s 0.4 of chat"].detail == "is no bucket edge, so attainment cannot be told; use 0.25 or 0.5"


def test_check_passes_and_names_the_alias_of_a_missing_metric(
    server: Prometheus, engines: Callable[..., object]
) -> None:
    odd = vllm()
    odd.gauges["acme_num_requests_running"] = odd.gauges.pop("vllm:num_requests_running")
    engines([(vllm(), "chat"), (odd, "code")])
    good = check_metrics(source(server.url, [spec("chat")]).config, [spec("chat")])
    assert [line for line in good if not line.ok] == []
    config = PrometheusConfig(url=server.url, window_s=WINDOW_S, engines=("sglang",))
    running = next(line for line in check_metrics(config, [spec("code")]) if line.subject == "running")
    assert not running.ok
    assert running.detail.startswith("no metric named sglang:num_running_reqs")
    config = PrometheusConfig(url=server.url, window_s=WINDOW_S, metrics={"running": ("num_requests_running",)})
    running = next(line for line in check_metrics(config, [spec("code")]) if line.subject == "running")
    assert "acme_num_requests_running looks like it" in running.detail


def test_check_judges_the_scrape_interval_by_series_that_are_old_enough(
    server: Prometheus, engines: Callable[..., object]
) -> None:
    specs = [spec("chat")]

    def interval(window_s: float) -> Access:
        config = source(server.url, specs, window_s=window_s).config
        return next(line for line in check_metrics(config, specs) if line.subject == "scrape interval")

    engines([(vllm(), "chat")])
    assert interval(WINDOW_S).ok
    assert interval(60.0) == Access("scrape interval", True, "cannot be told yet: no series is older than 60 s")
    for too_short_s in (0.1, 1.0):
        assert not interval(too_short_s).ok
        assert interval(too_short_s).detail.endswith("scrape more often, or set a longer window_s")
    young = vllm()
    server.scrape([(young.address, {"service": "chat"})], "-young")
    server.wait_scraped([young.address])
    assert interval(WINDOW_S).ok
    young.stop()


def test_not_a_number_and_infinity_are_missing(server: Prometheus, engines: Callable[..., object]) -> None:
    sick = vllm()
    sick.gauges |= {"vllm:num_requests_running": "NaN", "vllm:kv_cache_usage_perc": "+Inf"}
    engines([(sick, "chat"), (vllm(), "code")])
    reader = source(server.url, [spec("chat"), spec("code")])
    snapshot = reader.read()
    assert near(snapshot.running[:, 0], math.nan, 6)
    assert near(snapshot.kv_cache_usage[:, 0], math.nan, 0.25)
    assert snapshot.blind().tolist() == [True, False]
    gone = f"left out: {sick.address}, and too few are left"
    said = {"running: chat reports NaN", "kv_cache_usage: chat reports inf, but at most 1.05 is possible"}
    assert {f"{one}; {gone}" for one in said} <= set(reader.problems)


@pytest.mark.plays("a counter is reset")
def test_a_restarted_engine_makes_no_negative_rate(server: Prometheus, engines: Callable[..., object]) -> None:
    engine = vllm()
    engine.began_s -= 1000.0
    engines([(engine, "chat")])
    engine.began_s = time.monotonic()
    time.sleep(3.0)
    snapshot = source(server.url, [spec("chat")]).read()
    assert 0.0 < snapshot.generation_tps[0] < 150.0
    assert 0.0 <= snapshot.prefill_tps[0] < 450.0
    assert 0.0 <= snapshot.ttft_attainment[0] <= 1.0


@pytest.mark.plays("samples stale or NaN")
def test_old_samples_make_a_service_blind(server: Prometheus, engines: Callable[..., object]) -> None:
    # The query still answers: Prometheus looks back five minutes.
    old = vllm()
    old.sample_age_s = 100.0
    engines([(old, "chat"), (vllm(), "code")])
    reader = source(server.url, [spec("chat"), spec("code")])
    snapshot = reader.read()
    assert snapshot.blind().tolist() == [True, False]
    assert any("chat: the newest sample is 10" in problem for problem in reader.problems)


def test_an_engine_that_is_gone_makes_its_service_blind(server: Prometheus, engines: Callable[..., object]) -> None:
    gone = vllm()
    engines([(gone, "chat")])
    reader = source(server.url, [spec("chat")])
    assert not reader.read().blind()[0]
    gone.stop()
    wait_until(lambda: reader.read().blind()[0], "blind", limit_s=60)


def test_a_replica_that_is_not_scraped_makes_a_half_seen_service_blind(
    server: Prometheus, engines: Callable[..., object]
) -> None:
    engines([(vllm(), "chat")])
    reader = source(server.url, [spec("chat")], ready=2, discovery_s=0)
    assert reader.read().blind()[0]
    assert "chat: 1 of 2 replicas are scraped" in reader.problems


def test_a_service_scaled_to_zero_is_idle_not_blind(server: Prometheus, engines: Callable[..., object]) -> None:
    engines([(vllm(), "other")])
    snapshot = source(server.url, [spec("chat")], ready=0).read()
    assert snapshot.running[0, 0] == 0.0
    assert snapshot.generation_tps[0] == 0.0
    assert not snapshot.blind()[0]


def test_without_an_actuator_that_counts_what_is_scraped_is_ready(
    server: Prometheus, engines: Callable[..., object]
) -> None:
    engines([(vllm(), "chat"), (vllm(), "chat")])
    specs = [spec("chat")]
    config = PrometheusConfig(url=server.url, window_s=WINDOW_S)
    silent = PrometheusSource(config, specs, lambda: FleetState.unknown(pools_of(specs))).read()
    assert (silent.replicas_ready[0, 0], silent.replicas_target[0, 0]) == (2.0, 2.0)
    failed = PrometheusSource(config, specs, lambda: FleetState.unknown(pools_of(specs), ("no answer",))).read()
    assert np.isnan(failed.replicas_ready[0, 0])
    assert failed.blind()[0]


def test_prometheus_down_is_unavailable_within_the_deadline() -> None:
    reader = source(f"http://127.0.0.1:{free_port()}", [spec("chat")], deadline_s=1)
    with pytest.raises(MetricsUnavailable, match="refused"):
        reader.read()


@pytest.mark.plays("Prometheus down, slow, 500, empty answers")
@pytest.mark.parametrize("fault", [500, 503, 429, "cut", "empty"])
def test_a_failing_prometheus_is_unavailable(faulty_prometheus: FaultProxy, fault: int | str) -> None:
    faulty_prometheus.fault = lambda method, path: fault
    with pytest.raises(MetricsUnavailable):
        source(faulty_prometheus.url, [spec("chat")], deadline_s=1).read()


@pytest.mark.plays("Prometheus down, slow, 500, empty answers")
def test_a_slow_prometheus_is_unavailable_within_the_deadline(faulty_prometheus: FaultProxy) -> None:
    faulty_prometheus.fault = lambda method, path: "slow"
    faulty_prometheus.delay_s = 60.0
    with pytest.raises(MetricsUnavailable, match=r"imeout|deadline"):
        source(faulty_prometheus.url, [spec("chat")], timeout_s=0.5, deadline_s=1).read()


def test_a_fault_that_passes_is_not_seen(server: Prometheus, engines: Callable[..., object]) -> None:
    engines([(vllm(), "chat")])
    proxy = FaultProxy(server.url)
    failed: list[int] = []

    def first_fails(method: str, path: str) -> int | None:
        failed.append(1)
        return 503 if len(failed) == 1 else None

    proxy.fault = first_fails
    reader = source(proxy.url, [spec("chat")])
    assert near(reader.read().generation_tps, 100)
    assert reader.problems == ()
    proxy.stop()


def test_one_query_per_metric_however_many_services(faulty_prometheus: FaultProxy) -> None:
    asked = []
    for services in (1, 1000):
        faulty_prometheus.seen.clear()
        specs = [spec(f"s{number}") for number in range(services)]
        # A busy machine parses a thousand names slowly, and what is tried again is asked twice.
        source(faulty_prometheus.url, specs, ready=0, timeout_s=60.0, deadline_s=120.0).read()
        asked.append(len(faulty_prometheus.seen))
    assert asked == [14, 14]


def test_refuses_a_token_that_is_not_there(tmp_path: Path) -> None:
    reader = source("http://127.0.0.1:9", [spec("chat")], auth={"bearer_token_file": str(tmp_path / "none")})
    with pytest.raises(MetricsUnavailable, match="cannot be read"):
        reader.read()

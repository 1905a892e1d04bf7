"""Values that engines really report and that cannot be, through a real Prometheus: missing, by name and counted."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from exporters import ConstantEngine
from scraped_engines import WINDOW_S, near, scrape, source, spec, vllm
from servers import Prometheus

from autoscaler.check import check_metrics

pytestmark = pytest.mark.scrapes

CHAT = {"service": "chat"}


def test_kv_usage_in_per_cent_is_missing(each_prometheus: Prometheus) -> None:
    engine = vllm()
    engine.gauges["vllm:kv_cache_usage_perc"] = 37.5
    scrape(each_prometheus, [(engine, CHAT)])
    reader = source(each_prometheus.url, [spec()])
    snapshot = reader.read()
    assert near(snapshot.kv_cache_usage[:, 0], math.nan)
    assert near(snapshot.running[:, 0], 6)
    assert not snapshot.blind()[0]
    impossible = "kv_cache_usage: chat reports 37.5, but at most 1.05 is possible (in per cent?)"
    said = f"{impossible}; left out: {engine.address}, and too few are left"
    assert reader.problems == (said,)
    assert reader.implausible == {("chat", "kv_cache_usage"): 1}
    assert said in [line.detail for line in check_metrics(reader.config, [spec()]) if not line.ok]


def test_more_cache_hits_than_prompts_are_no_hits(each_prometheus: Prometheus) -> None:
    """vLLM counts a hit whenever it tries to schedule a request."""
    engine = vllm()
    del engine.rates["vllm:prompt_tokens_cached_total"]
    engine.rates["vllm:prefix_cache_hits_total"] = 2000
    scrape(each_prometheus, [(engine, CHAT)])
    reader = source(each_prometheus.url, [spec()])
    assert near(reader.read().prefill_tps, 500)
    (problem,) = reader.problems
    assert problem.startswith("cached: chat reports ")
    assert reader.implausible == {("chat", "cached"): 1}


@pytest.mark.parametrize(("others", "prefill"), [((0,), 1000), ((200, 200, 200), 4 * 500 - 3 * 200)])
def test_hits_of_one_replica_do_not_make_up_for_the_prompts_of_others(
    each_prometheus: Prometheus, others: tuple[int, ...], prefill: float
) -> None:
    """800 hits of 500 prompt tokens: of all together less than their prompts. Where too few are left, none has hits."""
    engines = [vllm() for _ in range(1 + len(others))]
    for engine, hits in zip(engines, (800, *others), strict=True):
        del engine.rates["vllm:prompt_tokens_cached_total"]
        engine.rates["vllm:prefix_cache_hits_total"] = hits
    scrape(each_prometheus, [(engine, CHAT) for engine in engines])
    reader = source(each_prometheus.url, [spec()], ready=len(engines))
    assert near(reader.read().prefill_tps, prefill)
    (problem,) = reader.problems
    few = ", and too few are left" if len(others) == 1 else ""
    assert problem.startswith("cached: chat reports ")
    assert problem.endswith(f" tokens/s, more than its prompt tokens; left out: {engines[0].address}{few}")


@pytest.mark.parametrize("share", [0.0, 0.125])
def test_too_few_running_requests_for_the_tokens_are_missing_after_two_windows(
    each_prometheus: Prometheus, share: float
) -> None:
    """By 2,000 tokens a second at 25 to 50 ms each, 50 to 100 requests run."""
    engine = vllm(scale=20)
    engine.rates['vllm:request_time_per_output_token_seconds_bucket{le="0.025"}'] = 0
    engine.gauges["vllm:num_requests_running"] = 75 * share
    engine.gauges["vllm:kv_cache_usage_perc"] = 0.5
    scrape(each_prometheus, [(engine, CHAT)])
    reader = source(each_prometheus.url, [spec()])
    assert not reader.read().blind()[0]  # a burst may have ended just before the scrape
    time.sleep(2 * WINDOW_S)
    assert reader.read().blind()[0]
    assert any(problem.startswith(f"running: chat reports {75 * share:.1f}, but") for problem in reader.problems)
    engine.gauges["vllm:num_requests_running"] = 75
    time.sleep(1.2)
    assert not reader.read().blind()[0]
    assert reader.problems == ()


def test_kv_usage_that_counts_cached_blocks_is_missing(each_prometheus: Prometheus) -> None:
    engines = [vllm() for _ in range(4)]
    for engine in engines:
        engine.gauges |= {"vllm:num_requests_running": 0.25, "vllm:kv_cache_usage_perc": 0.9}
    scrape(each_prometheus, [(engine, CHAT) for engine in engines])
    reader = source(each_prometheus.url, [spec()], ready=4)
    reader.read()
    time.sleep(2 * WINDOW_S)
    snapshot = reader.read()
    assert near(snapshot.kv_cache_usage[:, 0], math.nan)
    assert near(snapshot.running[:, 0], 1)
    assert reader.problems == (
        "kv_cache_usage: chat reports 3.6 full caches for 1.0 running requests (cached blocks too?)",
    )


def test_negative_infinite_and_impossibly_fast_values_are_missing(each_prometheus: Prometheus) -> None:
    engine = vllm()
    engine.gauges |= {"vllm:num_requests_waiting": -1, "vllm:num_requests_running": "+Inf"}
    engine.rates |= {"vllm:generation_tokens_total": 1e10, "vllm:request_success_total": 1e7}
    scrape(each_prometheus, [(engine, CHAT)])
    reader = source(each_prometheus.url, [spec()])
    snapshot = reader.read()
    for values in (snapshot.waiting[:, 0], snapshot.running[:, 0], snapshot.generation_tps, snapshot.finished_rps):
        assert np.isnan(values[0])
    assert {signal for _, signal in reader.implausible} == {"waiting", "running", "generation", "finished"}
    gone = f"left out: {engine.address}, and too few are left"
    assert f"waiting: chat reports -1, but at least 0 is possible; {gone}" in reader.problems


def test_latencies_in_milliseconds_are_missing(each_prometheus: Prometheus) -> None:
    edges = {"250": 2, "500": 4, "1000": 5, "60000": 5, "+Inf": 5}
    engine = ConstantEngine(vllm().gauges, {"vllm:generation_tokens_total": 100})
    engine.rates |= {f'acme_ttft_bucket{{le="{edge}"}}': rate for edge, rate in edges.items()}
    scrape(each_prometheus, [(engine, CHAT)])
    specs = [spec(ttft_s=500.0)]
    reader = source(each_prometheus.url, specs, metrics={"ttft_bucket": ["acme_ttft_bucket"]})
    snapshot = reader.read()
    assert np.isnan(snapshot.ttft_attainment[0])
    assert np.isnan(snapshot.arrival_rps[0])
    assert "ttft_bucket: chat has a bucket edge of 60000 s: in milliseconds?" in reader.problems

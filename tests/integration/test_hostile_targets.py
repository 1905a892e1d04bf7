"""What somebody else's targets, or one bad replica, expose costs the other services and replicas nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

import pytest
from exporters import ConstantEngine, Exporter
from scraped_engines import near, scrape, source, spec, vllm
from servers import Prometheus

from autoscaler.check import check_metrics

pytestmark = pytest.mark.scrapes

ODD_EDGES = (
    'vllm:time_to_first_token_seconds_bucket{le="abc"} 1\n'
    'vllm:request_time_per_output_token_seconds_bucket{le="abc"} 1\n'
)


@pytest.fixture
def odd() -> Iterator[Exporter]:
    exporter = Exporter(lambda: ODD_EDGES)
    yield exporter
    exporter.stop()


def test_an_edge_that_is_no_number_at_a_target_of_nobody_costs_nobody_anything(
    each_prometheus: Prometheus, odd: Exporter
) -> None:
    names = {"chat": ["chat", "chat.v2"]}
    groups = [(vllm(), {"service": "chat"}), (odd, {"service": "evil"}), (odd, {"service": "chatXv2"}), (odd, {})]
    scrape(each_prometheus, groups[:2])
    reader = source(each_prometheus.url, [spec()], names=names)
    snapshot = reader.read()
    assert near(snapshot.ttft_attainment, 0.8)
    assert near(snapshot.tpot_attainment, 1.0)
    assert near(snapshot.arrival_rps, 5)
    assert reader.problems == ()
    each_prometheus.scrape([(odd.address, labels) for _, labels in groups[2:]], owner="more")
    time.sleep(3)
    assert near(reader.read().ttft_attainment, 0.8)
    assert all(line.ok for line in check_metrics(reader.config, [spec()]) if line.subject.startswith(("ttft", "tpot")))


def test_an_edge_that_is_no_number_at_ones_own_target_is_missing_there_and_named(
    each_prometheus: Prometheus, odd: Exporter
) -> None:
    groups = [(vllm(), {"service": "chat"}), (vllm(), {"service": "code"}), (odd, {"service": "chat"})]
    scrape(each_prometheus, groups)
    reader = source(each_prometheus.url, [spec("chat"), spec("code")], ready=[2, 1])
    snapshot = reader.read()
    assert near(snapshot.ttft_attainment, math.nan, 0.8)
    assert near(snapshot.arrival_rps, math.nan, 5)
    assert {f"{signal}_bucket: chat has a bucket edge that is no number" for signal in ("ttft", "tpot")} <= set(
        reader.problems
    )


CHAT = {"service": "chat"}
SUMMED = {"running", "waiting", "generation", "prompt", "finished", "ttft_bucket", "tpot_bucket"}


def negative(engine: ConstantEngine) -> None:
    engine.gauges = dict.fromkeys(engine.gauges, -1e6)
    engine.rates = dict.fromkeys(engine.rates, -1e6)


def not_a_number(engine: ConstantEngine) -> None:
    engine.gauges = dict.fromkeys(engine.gauges, "NaN")
    engine.rates = dict.fromkeys(engine.rates, math.nan)


def huge(engine: ConstantEngine) -> None:
    engine.gauges = dict.fromkeys(engine.gauges, 1e12)
    engine.rates = dict.fromkeys(engine.rates, 1e12)


@pytest.mark.plays(
    "one of many replicas reports negative, huge or non-numbers", "it is left out and named; the others are the load"
)
@pytest.mark.parametrize("spoil", [negative, not_a_number, huge])
def test_a_replica_that_reports_what_cannot_be_takes_no_load_from_the_others(
    each_prometheus: Prometheus, spoil: Callable[[ConstantEngine], None]
) -> None:
    engines = [vllm(scale=10) for _ in range(4)]
    spoil(engines[0])
    scrape(each_prometheus, [(engine, CHAT) for engine in engines])
    reader = source(each_prometheus.url, [spec()], ready=4)
    snapshot = reader.read()
    assert near(snapshot.running[:, 0], 180)
    assert near(snapshot.waiting[:, 0], 60)
    assert near(snapshot.kv_cache_usage[:, 0], 0.25)
    # Whose rates are not in them is plain, however late a busy machine scrapes.
    assert snapshot.generation_tps[0] == pytest.approx(3000, rel=0.5)
    assert snapshot.finished_rps[0] == pytest.approx(150, rel=0.5)
    assert snapshot.arrival_rps[0] == pytest.approx(150, rel=0.5)
    assert near(snapshot.ttft_attainment, 0.8)
    assert not snapshot.blind()[0]
    assert {signal for _, signal in reader.implausible} >= SUMMED
    assert all(problem.endswith(f"; left out: {engines[0].address}") for problem in reader.problems)
    assert reader.replica_loads() == {engine.address: 60 for engine in engines[1:]} | (
        {engines[0].address: 1e12} if spoil is huge else {}
    )


def test_where_too_few_replicas_are_left_the_service_is_blind(each_prometheus: Prometheus) -> None:
    """60 and 60 and -70 are no 50 running requests, and no 120 either."""
    engines = [vllm(scale=10) for _ in range(3)]
    negative(engines[0])
    scrape(each_prometheus, [(engine, CHAT) for engine in engines])
    reader = source(each_prometheus.url, [spec()], ready=3)
    snapshot = reader.read()
    for values in (snapshot.running[:, 0], snapshot.generation_tps, snapshot.arrival_rps, snapshot.ttft_attainment):
        assert near(values, math.nan)
    assert snapshot.blind()[0]
    said = f"reports -1e+06, but at least 0 is possible; left out: {engines[0].address}, and too few are left"
    assert f"running: chat {said}" in reader.problems

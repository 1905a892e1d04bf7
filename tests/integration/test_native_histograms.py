"""Histograms that Prometheus 3 stores as native ones, and names that only Prometheus 3 has."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exporters import ConstantEngine, Exporter
from scraped_engines import WINDOW_S, near, scrape, source, spec, vllm
from servers import Prometheus, start

from autoscaler.check import check_metrics
from autoscaler.metrics.client import PrometheusQueryError

pytestmark = pytest.mark.scrapes

CHAT = {"service": "chat"}
GAUGES = {"num_requests_running": 6, "num_requests_waiting": 2, "kv_cache_usage_perc": 0.25}
COUNTERS = {"generation_tokens_total": 100, "prompt_tokens_total": 500, "request_success_total": 5}
HISTOGRAMS: dict[str, tuple[dict[str, float], float]] = {
    "time_to_first_token_seconds": ({"0.25": 2, "0.5": 4, "1.0": 5, "2.5": 5}, 2),
    "request_time_per_output_token_seconds": ({"0.025": 5, "0.05": 5, "0.1": 5}, 0.1),
    "request_prompt_tokens": ({"50": 0, "200": 5}, 500),
    "request_generation_tokens": ({"10": 0, "50": 5}, 100),
}
"""Buckets by edge and sum, per second; five events a second."""


class TypedEngine(Exporter):
    """vLLM's metrics with their types, without which Prometheus takes no series for a histogram's."""

    def __init__(self) -> None:
        self.began_s = time.monotonic()
        super().__init__(self.exposition)

    def exposition(self) -> str:
        grown_s = time.monotonic() - self.began_s
        lines = []
        for name, value in GAUGES.items():
            lines += [f"# TYPE vllm:{name} gauge", f"vllm:{name} {value}"]
        for name, rate in COUNTERS.items():
            lines += [f"# TYPE vllm:{name} counter", f"vllm:{name} {rate * grown_s}"]
        for name, (buckets, sum_rate) in HISTOGRAMS.items():
            lines.append(f"# TYPE vllm:{name} histogram")
            for edge, rate in {**buckets, "+Inf": 5}.items():
                lines.append(f'vllm:{name}_bucket{{le="{edge}"}} {int(rate * 20 * grown_s)}')
            lines += [f"vllm:{name}_sum {sum_rate * 20 * grown_s}", f"vllm:{name}_count {int(100 * grown_s)}"]
        return "\n".join(lines) + "\n"


@pytest.fixture(params=[False, True], ids=["native", "both"])
def converting(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Prometheus]:
    """Prometheus 3 that converts, and one that also keeps the classic series."""
    job = {"convert_classic_histograms_to_nhcb": True, "always_scrape_classic_histograms": request.param}
    features = ("native-histograms",)
    server = start(Prometheus, tmp_path / "prometheus", scrape_s=0.5, major=3, job=job, features=features)
    yield server
    server.stop()


def test_native_histograms_are_read_like_classic_ones(converting: Prometheus) -> None:
    engines = [TypedEngine(), TypedEngine()]
    scrape_all(converting, engines)
    reader = source(converting.url, [spec()], ready=2)
    snapshot = reader.read()
    assert reader.problems == ()
    assert near(snapshot.ttft_attainment, 0.8)
    assert near(snapshot.tpot_attainment, 1.0)
    assert near(snapshot.arrival_rps, 200)
    assert near(snapshot.prompt_tokens_mean, 100)
    assert near(snapshot.output_tokens_mean, 20)
    assert near(snapshot.ttft_histogram_rps.sum(axis=1), 200)
    assert [line for line in check_metrics(reader.config, [spec()]) if not line.ok] == []


@pytest.fixture
def mixing(tmp_path: Path) -> Iterator[Prometheus]:
    """Prometheus 3 that converts in its first job, and not in the second."""
    job, features = {"convert_classic_histograms_to_nhcb": True}, ("native-histograms",)
    server = start(Prometheus, tmp_path / "prometheus", scrape_s=0.5, major=3, job=job, features=features, again={})
    yield server
    server.stop()


@pytest.mark.parametrize("natives", [1, 2], ids=["another", "also"])
def test_both_forms_of_one_service_are_read_together_and_each_target_once(mixing: Prometheus, natives: int) -> None:
    """One of two replicas has classic series: alone, or as it is scraped in both jobs."""
    engines = [TypedEngine(), TypedEngine()]
    mixing.scrape_again([(engines[1].address, CHAT)])
    scrape_all(mixing, engines[:natives])
    mixing.wait_scraped([engines[1].address])
    time.sleep(WINDOW_S)
    reader = source(mixing.url, [spec()], ready=2)
    snapshot = reader.read()
    assert [one for one in reader.problems if "scraped twice" not in one] == []
    assert near(snapshot.arrival_rps, 200)
    assert near(snapshot.ttft_attainment, 0.8)
    assert near(snapshot.ttft_histogram_rps.sum(axis=1), 200)
    assert near(snapshot.tpot_histogram_rps.sum(axis=1), 200)
    assert near(snapshot.prompt_tokens_mean, 100)
    assert near(snapshot.output_tokens_mean, 20)


def test_a_part_of_a_service_is_not_taken_for_the_whole(mixing: Prometheus, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where native histograms cannot be had; a service that has none is not concerned."""
    engines, other = [TypedEngine(), TypedEngine()], TypedEngine()
    mixing.scrape_again([(engines[1].address, CHAT), (other.address, {"service": "code"})])
    scrape_all(mixing, engines[:1])
    mixing.wait_scraped([other.address])
    time.sleep(WINDOW_S)
    reader = source(mixing.url, [spec(), spec("code")], ready=[2, 1])
    ask = reader._signals.client.ask

    def refuse(text: str, *arguments: Any) -> Any:
        if "unless group by" in text:
            raise PrometheusQueryError("HTTP 400")
        return ask(text, *arguments)

    monkeypatch.setattr(reader._signals.client, "ask", refuse)
    snapshot = reader.read()
    assert near(snapshot.arrival_rps, np.nan, 100)
    assert near(snapshot.ttft_attainment, np.nan, 0.8)
    assert near(snapshot.output_tokens_mean, np.nan, 20)
    (problem,) = reader.problems
    assert problem.endswith(": HTTP 400")


def test_an_objective_inside_of_a_native_bucket_is_refused_with_its_edges(converting: Prometheus) -> None:
    scrape_all(converting, [TypedEngine()])
    specs = [spec(ttft_s=0.4)]
    reader = source(converting.url, specs)
    reader.read()
    assert reader.problems == ("ttft_bucket: chat: 0.4 s is no bucket edge",)
    (line,) = [line for line in check_metrics(reader.config, specs) if not line.ok]
    assert line.detail == "is no bucket edge, so attainment cannot be told; use 0.25 or 0.5"


def test_a_native_histogram_that_is_scraped_twice_counts_once(converting: Prometheus) -> None:
    engine = TypedEngine()
    converting.scrape_again([(engine.address, CHAT)])
    scrape_all(converting, [engine])
    snapshot = source(converting.url, [spec()]).read()
    assert near(snapshot.arrival_rps, 100)
    assert near(snapshot.prompt_tokens_mean, 100)


def test_histograms_that_are_converted_and_not_stored_are_refused_with_the_reason(tmp_path: Path) -> None:
    """Prometheus 3 before 3.8 stores native histograms only with a feature flag, and converts without it."""
    job = {"convert_classic_histograms_to_nhcb": True}
    server = start(Prometheus, tmp_path / "prometheus", scrape_s=0.5, major=3, job=job)
    scrape_all(server, [TypedEngine()])
    reader = source(server.url, [spec()])
    assert np.isnan(reader.read().ttft_attainment[0])
    assert [problem.partition(", but ")[0] for problem in reader.problems] == [
        "ttft_bucket: vllm:time_to_first_token_seconds is exposed",
        "tpot_bucket: vllm:request_time_per_output_token_seconds is exposed",
    ]
    wrong = [line for line in check_metrics(reader.config, [spec()]) if not line.ok]
    assert {line.subject for line in wrong} == {
        "ttft_bucket",
        "tpot_bucket",
        "ttft_s 0.5 of chat",
        "tpot_s 0.05 of chat",
    }
    assert all("set always_scrape_classic_histograms: true" in line.detail for line in wrong)
    server.stop()


def test_histograms_that_are_scraped_too_seldom_are_not_taken_for_ones_that_are_not_stored(tmp_path: Path) -> None:
    server = start(Prometheus, tmp_path / "prometheus", scrape_s=3.0)
    engines = [TypedEngine(), TypedEngine()]
    server.scrape([(engine.address, CHAT) for engine in engines])
    server.wait_scraped([engine.address for engine in engines])
    reader = source(server.url, [spec()], ready=2, window_s=1.0)
    reader.read()
    time.sleep(1.2)
    for _ in range(8):  # whether a sample is in the window or not
        assert reader.read().blind().all()
        (problem,) = reader.problems
        assert problem.startswith("chat: scraped too seldom, ")
        assert problem.endswith(" s old: scrape more often, or set a longer metrics.window_s")
        time.sleep(0.5)
    wrong = {line.subject: line.detail for line in check_metrics(reader.config, [spec()]) if not line.ok}
    assert wrong["scrape interval"].endswith(" in a window of 1 s: scrape more often, or set a longer window_s")
    assert not any("always_scrape_classic_histograms" in detail for detail in wrong.values())
    server.stop()


def test_a_missing_histogram_is_not_suggested_to_be_a_counter(each_prometheus: Prometheus) -> None:
    engine = vllm()
    engine.rates = {name: rate for name, rate in engine.rates.items() if "request_generation_tokens" not in name}
    scrape(each_prometheus, [(engine, CHAT)])
    config = source(each_prometheus.url, [spec()]).config
    line = next(line for line in check_metrics(config, [spec()]) if line.subject == "length_count")
    assert line.detail.startswith("no metric named vllm:request_generation_tokens_count (not needed")


def test_names_and_labels_with_dots_are_read(tmp_path: Path) -> None:
    """As OpenTelemetry writes them; Prometheus 3 takes them as they are."""
    server = start(Prometheus, tmp_path / "prometheus", scrape_s=0.5, major=3)
    service = '"k8s.deployment.name"="chat"'
    engine = ConstantEngine({f'{{"acme.running",{service}}}': 6}, {f'{{"acme.tokens",{service}}}': 100})
    scrape(server, [(engine, {})])
    options = {"service_label": "k8s.deployment.name", "matchers": {"k8s.deployment.name": "chat"}}
    own = {"running": ["acme.running"], "generation": ["acme.tokens"]}
    snapshot = source(server.url, [spec()], metrics=own, **options).read()
    assert near(snapshot.running[:, 0], 6)
    assert near(snapshot.generation_tps, 100)
    server.stop()


def scrape_all(server: Prometheus, engines: list[TypedEngine]) -> None:
    server.scrape([(engine.address, CHAT) for engine in engines])
    server.wait_scraped([engine.address for engine in engines])
    time.sleep(WINDOW_S + 0.7)

"""A service's traffic, from what is scraped; a real trace on a real server is recorded in `tests/integration`."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from autoscaler.metrics.client import PrometheusClient, PrometheusConfig
from autoscaler.metrics.traffic_recording import Recording, record
from policies.engine import ConfigError
from tests.chaos.fake_prometheus import URL, FakePrometheus

START_S, END_S, EVERY_S = datetime(2026, 1, 31, 12, tzinfo=UTC).timestamp(), 600.0, 15.0
LINE = '10.0.0.1:5000 [31/Jan/2026:12:00:01.250] chat-in chat/r1 0/12/0/80/900 200 5 - - ---- 1/1/0/0/0 0/0 "POST /"\n'
Target = tuple[str, str, str, tuple[str, ...]]
"""Job, instance, its tensor-parallel ranks, and the edges of its histograms."""


def lengths(ranks: str, edges: tuple[str, ...], count: float) -> list[tuple[str, dict[str, str], float]]:
    """Half of the requests have up to one token, the others up to two."""
    return [
        (
            f"sglang:{which}_tokens_histogram_bucket",
            {"le": le, "tp_rank": rank},
            count * (0.5 if float(le) == 1 else 1.0),
        )
        for which in ("prompt", "generation")
        for rank in ranks
        for le in edges
    ]


def recorded(folder: Path, *targets: Target) -> Recording:
    """Ten minutes in which each target finishes a request a second; arrivals come from a log."""
    now_s = START_S - 60.0
    server = FakePrometheus(lambda: now_s)
    while now_s <= START_S + END_S:
        server.scrape(
            {
                (job, instance): ({"service": "chat"}, lengths(ranks, edges, now_s - START_S + 60.0))
                for job, instance, ranks, edges in targets
            }
        )
        now_s += EVERY_S
    log = folder / "haproxy.log"
    log.write_text(LINE)
    config = PrometheusConfig(url=URL, engines=("sglang",), gateway="haproxy")
    with server.reachable():
        return record(config, "chat", START_S, START_S + END_S, log)


ENGINE: Target = ("engines", "r1", "0", ("1.0", "2.0", "+Inf"))


@pytest.mark.parametrize(
    ("targets", "requests"),
    [
        ((ENGINE,), 600),
        ((ENGINE, ("engines", "r2", "0", ("1", "2", "+Inf"))), 1200),  # another spelling of the same edges
        ((ENGINE, ("again", "r1", "0", ("1.0", "2.0", "+Inf"))), 600),  # scraped twice
        ((("engines", "r1", "01", ("1.0", "2.0", "+Inf")),), 600),  # two ranks that work together
    ],
)
def test_each_request_is_in_one_bucket_once(tmp_path: Path, targets: tuple[Target, ...], requests: float) -> None:
    made = recorded(tmp_path, *targets)
    for found in (made.prompt, made.output):
        assert found.edges.tolist() == [1.0, 2.0, float("inf")]
        assert found.counts.sum() == pytest.approx(requests)
        assert found.counts[:, 0].sum() == pytest.approx(requests / 2)


def played(rows: Mapping[str, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers by a part of the query, the first that is in it."""

    def ask(self: PrometheusClient, query: str, **_: Any) -> list[dict[str, Any]]:
        return next((found for part, found in rows.items() if part in query), [])

    monkeypatch.setattr(PrometheusClient, "ask", ask)


NATIVE = [
    {
        "metric": {"service": "chat"},
        "histogram": [END_S, {"count": "2", "sum": "3", "buckets": [[0, "0", "1", "1"], [0, "1", "2", "1"]]}],
    }
]


CLASSIC = [
    {"metric": {"service": "chat", "le": edge}, "value": [END_S, str(count)]}
    for edge, count in (("1.0", 1), ("2.0", 3), ("+Inf", 4))
]


@pytest.mark.parametrize(
    ("classic", "requests"), [([], [300.0, 300.0, 0.0]), (CLASSIC, [600.0, 900.0, 300.0])], ids=["alone", "mixed"]
)
def test_native_histograms_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classic: list[dict[str, Any]], requests: list[float]
) -> None:
    """Also where only some of the replicas have them."""
    played({"unless group by": NATIVE, "_bucket": classic}, monkeypatch)
    log = tmp_path / "haproxy.log"
    log.write_text(LINE)
    made = record(PrometheusConfig(url=URL), "chat", START_S, START_S + 300.0, log)
    assert made.prompt.edges.tolist() == [1.0, 2.0, float("inf")]
    assert made.output.counts.tolist() == [requests]


def test_ranks_that_work_together_are_one_counter_of_arrivals(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [[START_S + 10.0 * tick, str(tick)] for tick in range(1, 31)]
    ranks = [{"metric": {"service": "chat", "instance": "r1", "tp_rank": one}, "values": samples} for one in "01"]
    classic = [{"metric": {"service": "chat", "le": "+Inf"}, "value": [START_S, "1"]}]
    played({"_bucket": classic, "_count": ranks}, monkeypatch)
    made = record(PrometheusConfig(url=URL, engines=("sglang",)), "chat", START_S, START_S + 300.0)
    assert made.arrivals.count.sum() == 29


@pytest.mark.parametrize(
    ("engine", "sentence"),
    [
        ("tensorrt-llm", "engines tensorrt-llm: no length histograms are known for them"),
        ("tgi", "engines tgi: they count no arrivals; set metrics.gateway"),
    ],
)
def test_engines_that_do_not_count_it_are_named(engine: str, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    played({}, monkeypatch)
    config = PrometheusConfig.model_validate({"url": URL, "engines": [engine]})
    with pytest.raises(ConfigError, match=sentence):
        record(config, "chat", START_S, START_S + 300.0)


def test_arrivals_without_any_length_are_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    played({"tokens": [{"metric": {"service": "chat"}, "value": [START_S, "1"]}]}, monkeypatch)
    log = tmp_path / "haproxy.log"
    log.write_text(LINE)
    with pytest.raises(ConfigError, match="no finished request in the histogram vllm:request_prompt_tokens between"):
        record(PrometheusConfig(url=URL), "chat", START_S, START_S + 300.0, log)

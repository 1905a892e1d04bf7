"""What is made of Prometheus's answers, without a server; the servers' side is in `tests/integration`."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autoscaler.actuators.base import FleetState, pools_of
from autoscaler.check import suggest
from autoscaler.metrics.boot_ledger import BootLedger
from autoscaler.metrics.client import PrometheusAuth, PrometheusConfig, PrometheusQueryError
from autoscaler.metrics.prometheus import PrometheusSource
from policies.contract import TTFT_EDGES_S, Snapshot
from policies.engine import ConfigError
from policies.spec import PoolSpec, ScalingSpec, Slo, find_engine

ENGINE = find_engine("llama-3.1-8b-h100", Path())
NOW_S = 1_800_000_000.0


def spec(*pools: str) -> ScalingSpec:
    made = tuple(PoolSpec(name=name, engine=ENGINE, max_replicas=8) for name in pools or ("",))
    return ScalingSpec(service="chat", slo=Slo(ttft_s=0.5, tpot_s=0.05), pools=made)


class Answers:
    """Answers queries by the signal that they are for; a signal without an entry has no series."""

    def __init__(self, source: PrometheusSource, by_signal: dict[str, Any]) -> None:
        self.signals = {query.text: query for query in source._signals.queries}
        self.by_signal = by_signal

    def log_in(self) -> None:
        pass

    def close(self) -> None:
        pass

    def ask(self, text: str, until_s: float | None = None) -> list[dict[str, Any]]:
        query = self.signals[text]
        answer = self.by_signal.get(query.signal, {})
        if isinstance(answer, Exception):
            raise answer
        if not isinstance(answer, dict):
            answer = {"": answer}
        key = "le" if query.signal.endswith("_bucket") else query.pool_label
        return [
            {"metric": {query.label: "chat", **({key: name} if key else {})}, "value": [NOW_S, str(value)]}
            for name, value in answer.items()
        ]


def read(by_signal: dict[str, Any], one: ScalingSpec | None = None, ready: float = 1, **options: Any) -> Snapshot:
    specs = [one or spec()]
    width = len(specs[0].pools)

    def state() -> FleetState:
        counts = np.full((1, width), float(ready))
        unknown = FleetState.unknown(pools_of(specs))
        return replace(unknown, replicas_target=counts, replicas_ready=counts, replicas_draining=0 * counts)

    config = PrometheusConfig.model_validate({"url": "http://localhost:9090", **options})
    source = PrometheusSource(config, specs, state)
    source._signals._client = Answers(source, by_signal)  # type: ignore[assignment]
    snapshot = source.read()
    source.close()
    return snapshot


LOADED: dict[str, Any] = {
    "running": 4,
    "seen": 1,
    "sample_time": NOW_S - 3,
    "waiting": 0,
    "generation": 100,
    "finished": 5,
    "ttft_bucket": {"0.1": 1, "0.25": 3, "0.5": 4, "1.0": 5, "+Inf": 5},
    "queue": 0,
    "queue_wait": 0,
}


def test_attainment_without_a_wait_is_the_share_at_the_objective() -> None:
    assert read(LOADED, gateway="haproxy").ttft_attainment.tolist() == [0.8]


@pytest.mark.parametrize(("wait_s", "share"), [(0.2, 0.6), (0.25, 0.6), (0.3, 0.2), (0.45, 0.0), (9.0, 0.0)])
def test_a_wait_at_the_gateway_is_taken_off_the_objective_at_the_next_lower_edge(wait_s: float, share: float) -> None:
    snapshot = read(LOADED | {"queue_wait": wait_s}, gateway="haproxy")
    assert snapshot.ttft_attainment.tolist() == pytest.approx([share])


def test_an_unknown_wait_makes_the_attainment_unknown() -> None:
    snapshot = read(LOADED | {"queue_wait": PrometheusQueryError("no answer")}, gateway="haproxy")
    assert np.isnan(snapshot.ttft_attainment[0])
    assert not snapshot.blind()[0]


def test_a_gateway_that_measures_ttft_needs_no_correction() -> None:
    assert read(LOADED, gateway="llm-d-epp").ttft_attainment.tolist() == [0.8]


def test_the_histogram_is_linear_inside_a_bucket_and_moved_by_the_wait() -> None:
    snapshot = read(LOADED, gateway="haproxy")
    moved = read(LOADED | {"queue_wait": 0.1}, gateway="haproxy")
    at = TTFT_EDGES_S.index(0.2)
    # Half of the first bucket by 0.05 s; two thirds of the second by 0.2 s.
    assert snapshot.ttft_histogram_rps[0, 0] == pytest.approx(0.5)
    assert snapshot.ttft_histogram_rps[0, : at + 1].sum() == pytest.approx(1 + 2 * 2 / 3)
    assert moved.ttft_histogram_rps[0, : at + 1].sum() == pytest.approx(1.0)
    assert snapshot.ttft_histogram_rps[0].sum() == moved.ttft_histogram_rps[0].sum() == pytest.approx(5.0)


def test_histograms_are_left_out_where_nobody_wants_them() -> None:
    snapshot = read(LOADED, histograms=False)
    assert snapshot.ttft_histogram_rps.shape == (1, 0)
    assert snapshot.ttft_attainment.tolist() == [0.8]


def test_pools_are_kept_apart_by_their_label() -> None:
    answers = LOADED | {"running": {"spot": 2, "fast": 7, "elsewhere": 9}, "seen": {"spot": 1, "fast": 1}}
    snapshot = read(answers, spec("fast", "spot"), pool_label="pool")
    assert snapshot.running.tolist() == [[7.0, 2.0]]


def test_several_pools_without_a_label_are_refused() -> None:
    with pytest.raises(ConfigError, match="'chat' has several pools, so pool_label must be set"):
        read(LOADED, spec("fast", "spot"))


def test_one_failed_query_is_one_missing_signal() -> None:
    snapshot = read(LOADED | {"waiting": PrometheusQueryError("HTTP 422")})
    assert np.isnan(snapshot.waiting[0, 0])
    assert snapshot.running[0, 0] == 4
    assert not snapshot.blind()[0]


def test_time_is_that_of_the_server_not_of_this_machine() -> None:
    assert read(LOADED).time_s.tolist() == [NOW_S]
    assert abs(time.time() - NOW_S) > 1e6


def test_starting_replicas_come_closer_and_the_oldest_leave_first() -> None:
    ledger = BootLedger([spec()])
    cold_start_s = spec().pools[0].start.total_s
    known = np.zeros((1, 1), bool)

    def bins(starting: float, now_s: float) -> list[float]:
        return ledger.bins(np.array([[starting]]), known, now_s)[0, 0].tolist()  # type: ignore[no-any-return]

    assert bins(2, 0) == [0, 0, 2]
    assert bins(3, 200) == [0, 0, 3]
    assert bins(3, cold_start_s - 60) == [0, 2, 1]
    assert bins(1, cold_start_s) == [0, 0, 1]
    assert bins(1, cold_start_s + 1000) == [1, 0, 0]  # overdue
    assert np.isnan(ledger.bins(np.zeros((1, 1)), ~known, 0)).all()


def test_secrets_come_from_the_environment_or_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PROMETHEUS_TOKEN", "abc")
    assert PrometheusAuth(bearer_token_env="PROMETHEUS_TOKEN").headers() == {"Authorization": "Bearer abc"}
    file = tmp_path / "password"
    file.write_text("xyz\n")
    assert PrometheusAuth(username="me", password_file=file).basic() == ("me", "xyz")
    with pytest.raises(ConfigError, match="environment variable NOT_SET"):
        PrometheusAuth(bearer_token_env="NOT_SET").headers()


def test_two_ways_of_logging_in_are_refused() -> None:
    with pytest.raises(ValueError, match="expected one of"):
        PrometheusAuth(bearer_token_env="A", username="me", password_env="B")


def test_a_name_that_ends_alike_is_suggested() -> None:
    known = {"up", "acme:num_requests_running", "vllm:kv_cache_usage"}
    assert suggest(["vllm:num_requests_running"], known) == "acme:num_requests_running"
    assert suggest(["vllm:kv_cache_usage_perc"], known) == "vllm:kv_cache_usage"
    assert suggest(["tgi_queue_size"], known) == ""


def test_a_window_longer_than_the_interval_is_accounted_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four snapshots within one window of rates: whoever adds them up must not count the same traffic four times."""
    config = PrometheusConfig.model_validate({"url": "http://localhost:9090", "window_s": 60.0})
    source = PrometheusSource(config, [spec()])
    source._signals._client = Answers(source, LOADED)  # type: ignore[assignment]
    accounted = []
    for seconds in (0, 15, 30, 150, 140, 155):  # a gap longer than the window, and a clock that goes back
        monkeypatch.setitem(globals(), "NOW_S", 1.8e9 + seconds)
        accounted.append(source.read().window_s.tolist())
    assert accounted == [[60.0], [15.0], [15.0], [60.0], [60.0], [15.0]]
    source.close()

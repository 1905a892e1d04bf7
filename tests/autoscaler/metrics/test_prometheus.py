"""What is made of Prometheus's answers, without a server; the servers' side is in `tests/integration`."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from dripping_server import DrippingServer

from autoscaler.actuators.base import FleetState, pools_of
from autoscaler.check import alias_of, suggest
from autoscaler.metrics.boot_ledger import BootLedger
from autoscaler.metrics.client import PrometheusAuth, PrometheusConfig, PrometheusQueryError
from autoscaler.metrics.prometheus import PrometheusSource
from autoscaler.metrics.queries import candidates_by_signal
from autoscaler.metrics.signals import LATE_S
from policies.contract import TTFT_EDGES_S, MetricsUnavailable, Snapshot
from policies.engine import ConfigError
from policies.redaction import LONGEST
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

    def types(self, names: Any, until_s: float) -> set[str]:
        return set()

    def ask(self, text: str, until_s: float | None = None) -> list[dict[str, Any]]:
        if text not in self.signals:  # for native histograms: there are none
            return []
        query = self.signals[text]
        answer = self.by_signal.get(query.signal, {})
        if isinstance(answer, Exception):
            raise answer
        if not isinstance(answer, dict):
            answer = {"": answer}
        key = "le" if query.signal.endswith("_bucket") else query.pool_label
        targets = query.signal in ("seen", "sample_time")
        return [
            {
                "metric": {
                    query.label: "chat",
                    **({"instance": f"r{name}", "job": "engines"} if targets else {}),
                    **({key: name} if key else {}),
                },
                "value": [NOW_S, str(value)],
            }
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
    source._signals.client = Answers(source, by_signal)  # type: ignore[assignment]
    snapshot = source.read()
    source.close()
    return snapshot


LOADED: dict[str, Any] = {
    "running": 4,
    "seen": 3,
    "sample_time": NOW_S - 3,
    "waiting": 0,
    "generation": 100,
    "finished": 5,
    "ttft_bucket": {"0.1": 1, "0.25": 3, "0.5": 4, "1.0": 5, "+Inf": 5},
    "queue": 0,
    "queue_mean": 0,
}


@pytest.mark.parametrize(
    ("metrics", "options", "cap"),
    [
        ({}, {}, ENGINE.max_num_seqs),  # nobody sets one, so the engine's own limit is in force
        ({"batch_cap": 48}, {"gateway": "haproxy"}, 48),
        ({"batch_cap": "NaN"}, {"gateway": "haproxy"}, ENGINE.max_num_seqs),  # HAProxy's word for no limit
        ({"batch_cap": 4000}, {"gateway": "haproxy"}, ENGINE.max_num_seqs),
        ({}, {"gateway": "haproxy"}, np.nan),
    ],
)
def test_without_a_limit_in_front_the_engines_own_is_the_cap(
    metrics: dict[str, Any], options: dict[str, Any], cap: float
) -> None:
    np.testing.assert_array_equal(read(LOADED | metrics, **options).batch_cap, [[cap]])


def test_attainment_without_a_wait_is_the_share_at_the_objective() -> None:
    assert read(LOADED, gateway="haproxy").ttft_attainment.tolist() == [0.8]


@pytest.mark.parametrize(
    ("wait_s", "share"), [(0.005, 0.796), (0.2, 0.64), (0.25, 0.6), (0.3, 1.4 / 3), (0.45, 0.1), (9.0, 0.0)]
)
def test_a_wait_at_the_gateway_is_taken_off_the_objective(wait_s: float, share: float) -> None:
    # Five first tokens a second: by Little's law the mean queue is five times the wait.
    snapshot = read(LOADED | {"queue_mean": 5 * wait_s}, gateway="haproxy")
    assert snapshot.ttft_attainment.tolist() == pytest.approx([share])


def test_a_queue_that_no_request_leaves_makes_the_attainment_unknown() -> None:
    silent = dict.fromkeys(LOADED["ttft_bucket"], 0)
    assert np.isnan(read(LOADED | {"queue_mean": 3, "ttft_bucket": silent}, gateway="haproxy").ttft_attainment[0])


@pytest.mark.parametrize("signal", ["running", "seen", "sample_time", "waiting", "generation"])
def test_a_number_that_is_none_is_missing_and_ends_nothing(signal: str) -> None:
    """Such as a native histogram that a target exposes under the name of a gauge."""
    snapshot = read(LOADED | {signal: "NaN"})
    assert snapshot.blind().tolist() == [signal in ("running", "seen", "sample_time")]


def test_an_unknown_wait_makes_the_attainment_unknown() -> None:
    snapshot = read(LOADED | {"queue_mean": PrometheusQueryError("no answer")}, gateway="haproxy")
    assert np.isnan(snapshot.ttft_attainment[0])
    assert not snapshot.blind()[0]


def test_a_gateway_that_measures_ttft_needs_no_correction() -> None:
    assert read(LOADED, gateway="llm-d-epp").ttft_attainment.tolist() == [0.8]


def test_the_histogram_is_linear_inside_a_bucket_and_moved_by_the_wait() -> None:
    snapshot = read(LOADED, gateway="haproxy")
    moved = read(LOADED | {"queue_mean": 0.5}, gateway="haproxy")
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
    answers = LOADED | {"running": {"spot": 2, "fast": 7, "elsewhere": 9}, "seen": {"spot": 3, "fast": 3}}
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


@pytest.mark.parametrize("impossible", [-3, 1e9, "inf"])
def test_impossible_counts_of_replicas_are_not_scaled_by(impossible: float | str) -> None:
    """The fleet is then what is scraped: one replica."""
    counts = {"replicas_ready": impossible, "replicas_target": impossible}
    snapshot = read(LOADED | counts, ready=np.nan, replicas="kube-state-metrics")
    assert (snapshot.replicas_ready.tolist(), snapshot.replicas_target.tolist()) == ([[1.0]], [[1.0]])


def test_replicas_that_only_metrics_count_and_that_never_come_are_not_on_their_way() -> None:
    options = {"replicas": "kube-state-metrics", "starts": {"cold_starts": 1e-9, "at_least_s": 0.0}}
    config = PrometheusConfig.model_validate({"url": "http://localhost:9090", **options})
    source = PrometheusSource(config, [spec()], lambda: FleetState.unknown(pools_of([spec()])))
    counts = {"replicas_ready": 1, "replicas_target": 3}
    source._signals.client = Answers(source, LOADED | counts)  # type: ignore[assignment]
    assert (source.read().replicas_starting.tolist(), source.replicas_stuck.tolist()) == ([[2.0]], [[0.0]])
    snapshot = source.read()
    assert (snapshot.replicas_starting.tolist(), source.replicas_stuck.tolist()) == ([[0.0]], [[2.0]])
    assert snapshot.boot_pipeline.sum() == 0.0
    assert source.problems == ("chat: 2 replicas have been starting for more than 0 min and will be given back first",)
    source.close()


def test_a_server_that_sends_without_an_end_takes_one_deadline_of_all_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the reason, no query comes back."""
    source = PrometheusSource(PrometheusConfig.model_validate({"url": "http://localhost:9090"}), [spec()])
    now_s, cancelled = [0.0], []

    class Endless:
        def result(self, timeout: float) -> None:
            now_s[0] += timeout
            raise TimeoutError

        def cancel(self) -> None:
            cancelled.append(self)

    monkeypatch.setattr("autoscaler.metrics.signals.time", SimpleNamespace(monotonic=lambda: now_s[0]))
    monkeypatch.setattr(source._signals._executor, "submit", lambda *_: Endless())
    with pytest.raises(MetricsUnavailable, match=r"9090: no answer in time$"):
        source.read()
    source.close()
    assert now_s[0] == source.config.deadline_s + LATE_S
    assert len(cancelled) == len(source._signals.queries)


def test_prometheus_and_the_cluster_are_asked_at_the_same_time() -> None:
    """Each waits for the other to have been asked: a reading takes as long as the slower one, not as both."""
    specs, both = [spec()], threading.Barrier(2, timeout=10.0)

    def state() -> FleetState:
        both.wait()
        return FleetState.unknown(pools_of(specs))

    class Waiting(Answers):
        def log_in(self) -> None:
            both.wait()

    with reading(Waiting, specs, state) as source:
        source.read()


def test_what_is_in_force_is_read_also_when_prometheus_does_not_answer() -> None:
    specs, read = [spec()], []

    def state() -> FleetState:
        read.append(True)
        return FleetState.unknown(pools_of(specs))

    class Away(Answers):
        def ask(self, text: str, until_s: float | None = None) -> list[dict[str, Any]]:
            raise PrometheusQueryError("no answer")

    with reading(Away, specs, state) as source, pytest.raises(MetricsUnavailable, match="no answer"):
        source.read()
    assert read == [True]


@contextmanager
def reading(client: type[Answers], specs: list[ScalingSpec], state: Any = None, **options: Any) -> Iterator[Any]:
    """A source with such a client."""
    config = PrometheusConfig.model_validate({"url": "http://localhost:9090", **options})
    source = PrometheusSource(config, specs, state)
    source._signals.client.close()
    source._signals.client = client(source, LOADED)  # type: ignore[assignment]
    yield source
    source.close()


@pytest.mark.plays(
    "Prometheus answers a byte at a time",
    "held (`missing_metrics`) at its deadline; the next answer that comes whole is read",
)
@pytest.mark.parametrize("part", ["header", "body", "chunk"])
def test_answers_that_drip_end_with_the_deadline_and_keep_no_thread(part: str) -> None:
    server = DrippingServer(part)
    config = PrometheusConfig.model_validate({"url": server.url, "timeout_s": 0.2, "deadline_s": 0.5})
    source = PrometheusSource(config, [spec()])
    with pytest.raises(MetricsUnavailable, match=r"timed out|deadline"):
        source.read()
    source._signals.client.close()
    source._signals.client = Answers(source, LOADED)  # type: ignore[assignment]
    assert source.read().running.tolist() == [[4.0]]
    assert source.problems == ()
    source.close()
    server.stop()


class Hanging(Answers):
    """Queries for some signals come back when they are let go."""

    let_go = threading.Event()
    signals_that_hang: tuple[str, ...] = ()

    def ask(self, text: str, until_s: float | None = None) -> list[dict[str, Any]]:
        if text in self.signals and self.signals[text].signal in self.signals_that_hang:
            self.let_go.wait(60.0)
        return super().ask(text, until_s)


def test_queries_that_do_not_come_back_are_named_at_later_ticks_until_they_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hanging, "let_go", threading.Event())
    monkeypatch.setattr(Hanging, "signals_that_hang", ("running", "waiting"))
    with reading(Hanging, [spec()], deadline_s=0.2) as source:
        source.read()
        assert source.problems == ("running, waiting: no answer in time",)
        monkeypatch.setattr(Hanging, "signals_that_hang", ())
        assert source.read().running.tolist() == [[4.0]]
        assert source.problems == ("2 of 8 query threads still wait for running, waiting",)
        Hanging.let_go.set()
        deadline_s = time.monotonic() + 10.0
        while source._signals._still_hanging() and time.monotonic() < deadline_s:
            time.sleep(0.01)
        source.read()
        assert source.problems == ()


def test_where_all_query_threads_hang_the_tick_ends_at_once_with_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hanging, "let_go", threading.Event())
    with reading(Hanging, [spec()], deadline_s=0.2) as source:
        monkeypatch.setattr(Hanging, "signals_that_hang", tuple(one.signal for one in source._signals.queries))
        with pytest.raises(MetricsUnavailable, match="9090: no answer in time"):
            source.read()
        with pytest.raises(MetricsUnavailable, match="8 of 8 query threads still wait for running, "):
            source.read()
        Hanging.let_go.set()


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


@pytest.mark.parametrize("part", ["total", "bucket", "sum", "count"])
def test_no_name_of_another_kind_is_suggested_however_alike_it_is(part: str) -> None:
    name = "vllm:request_generation_tokens"
    kinds = ("total", "bucket", "sum", "count", "len")
    assert suggest([f"{name}_{part}"], {f"{name}_{kind}" for kind in kinds if kind != part}) == ""
    assert suggest([f"{name}_{part}"], {f"{name}s_{kind}" for kind in kinds}) == f"{name}s_{part}"


@pytest.mark.parametrize(
    ("signal", "engine", "own", "known"),
    [
        ("cached", "vllm", {}, {"vllm:prompt_tokens_total"}),  # another signal of this engine
        ("cached", "vllm", {"prompt": ("mine",)}, {"vllm:prompt_tokens_total"}),  # one that nobody reads here
        ("cached", "vllm", {}, {"acme:prompt_tokens_total"}),  # the whole of which the cached ones are a part
        ("finished", "vllm", {"arrival": ("vllm:request_successes_total",)}, {"vllm:request_successes_total"}),
    ],
)
def test_no_name_is_suggested_that_stands_for_something_else(
    signal: str, engine: str, own: dict[str, tuple[str, ...]], known: set[str]
) -> None:
    config = PrometheusConfig.model_validate({"url": "http://localhost:9090", "engines": [engine], "metrics": own})
    assert suggest(candidates_by_signal(config)[signal][0], known), "it is alike"
    assert alias_of(signal, config, known) == ""


def test_a_name_of_the_same_meaning_is_suggested() -> None:
    config = PrometheusConfig.model_validate({"url": "http://localhost:9090", "engines": ["vllm"]})
    known = {"acme:prompt_tokens_cached_total", "vllm:prompt_tokens_total"}
    assert alias_of("cached", config, known) == "acme:prompt_tokens_cached_total"


def test_a_window_longer_than_the_interval_is_accounted_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four snapshots within one window of rates: whoever adds them up must not count the same traffic four times."""
    config = PrometheusConfig.model_validate({"url": "http://localhost:9090", "window_s": 60.0})
    source = PrometheusSource(config, [spec()])
    source._signals.client = Answers(source, LOADED)  # type: ignore[assignment]
    accounted = []
    for seconds in (0, 15, 30, 150, 140, 155):  # a gap longer than the window, and a clock that goes back
        monkeypatch.setitem(globals(), "NOW_S", 1.8e9 + seconds)
        accounted.append(source.read().window_s.tolist())
    assert accounted == [[60.0], [15.0], [15.0], [60.0], [60.0], [15.0]]
    source.close()


def test_a_problem_is_no_longer_than_people_read() -> None:
    unknown = replace(FleetState.unknown(pools_of([spec()])), problems=("x" * 1_000_000,))
    source = PrometheusSource(PrometheusConfig(url="http://localhost:9090"), [spec()], lambda: unknown)
    source._signals.client = Answers(source, {"running": 6})  # type: ignore[assignment]
    source.read()
    assert max(map(len, source.problems)) == LONGEST

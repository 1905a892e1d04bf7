"""Snapshots of all services from Prometheus, with one query per metric however many services there are.

What is missing, stale, duplicated or not a number is NaN, never 0, so that the decision core holds instead of guessing.
A wait in a gateway in front of the engines (a batch cap outside them moves their queue there) is part of the time to
first token: it is taken off the objective before the engines' histogram is read.
This module must not know what is decided from a snapshot.
"""

from __future__ import annotations

import os
import re
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from autoscaler import metric_presets as presets
from autoscaler.actuators.base import FleetState, PoolName, pools_of
from policies.contract import BOOT_BINS, TPOT_EDGES_S, TTFT_EDGES_S, Floats, MetricsUnavailable, Snapshot
from policies.engine import ConfigError, NonNegative, Positive, StrictModel
from policies.spec import ScalingSpec, Share

if TYPE_CHECKING:
    from prometheus_api_client import PrometheusConnect

BOOT_EDGES_S = (30.0, 120.0)
"""Remaining seconds that separate the bins of `Snapshot.boot_pipeline`."""
WORKERS = 8
"""Queries in flight at once."""
FIRST_PAUSE_S = 0.1


class PrometheusAuth(StrictModel):
    """How to log in. Secrets come from the environment or from a mounted file, never from this configuration."""

    bearer_token_env: str | None = Field(default=None, description="Environment variable that holds a bearer token.")
    bearer_token_file: Path | None = Field(default=None, description="File with a bearer token, read at each tick.")
    username: str | None = Field(default=None, description="User name for basic authentication.")
    password_env: str | None = Field(default=None, description="Environment variable that holds the password.")
    password_file: Path | None = Field(default=None, description="File with the password.")
    ca_file: Path | None = Field(default=None, description="Certificate authority to trust, PEM.")
    client_cert_file: Path | None = Field(default=None, description="Client certificate, PEM.")
    client_key_file: Path | None = Field(default=None, description="Key of the client certificate, PEM.")
    verify_tls: bool = Field(default=True, description="Verify the server's certificate.")

    @model_validator(mode="after")
    def _one_way(self) -> PrometheusAuth:
        ways = [self.bearer_token_env, self.bearer_token_file, self.username]
        if sum(way is not None for way in ways) > 1:
            raise ValueError("expected one of bearer_token_env, bearer_token_file, username")
        if (self.username is None) != (self.password_env is None and self.password_file is None):
            raise ValueError("username needs password_env or password_file, and they need username")
        return self

    def headers(self) -> dict[str, str]:
        """The authorisation header, if any.

        Raises:
            ConfigError: when the secret is not there.
        """
        token = _secret(self.bearer_token_env, self.bearer_token_file)
        return {} if token is None else {"Authorization": f"Bearer {token}"}

    def basic(self) -> tuple[str, str] | None:
        """User name and password, if any.

        Raises:
            ConfigError: when the secret is not there.
        """
        password = _secret(self.password_env, self.password_file)
        return None if self.username is None or password is None else (self.username, password)


def _secret(variable: str | None, file: Path | None) -> str | None:
    if variable is not None:
        if not os.environ.get(variable):
            raise ConfigError(f"environment variable {variable}: expected a secret, but it is not set")
        return os.environ[variable].strip()
    if file is None:
        return None
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror or error}") from None


Engine = Literal["vllm", "sglang", "tgi", "tensorrt-llm", "ray-serve"]
GatewayName = Literal["none", "haproxy", "llm-d-epp", "ray-serve"]


class PrometheusConfig(StrictModel):
    """Where the measurements are and what they are called."""

    url: Annotated[str, Field(pattern=r"^https?://")] = Field(description="Prometheus, for example http://host:9090.")
    engines: Annotated[tuple[Engine, ...], Field(min_length=1)] = Field(
        default=("vllm",), description="Inference engines whose metric names are looked up."
    )
    gateway: GatewayName = Field(default="none", description="What stands in front of the engines and holds a queue.")
    replicas: Literal["none", "kube-state-metrics"] = Field(
        default="none", description="Where replica counts are read when the actuator cannot say."
    )
    service_label: str = Field(default="service", description="Label of the engines' series that names the service.")
    pool_label: str | None = Field(default=None, description="Label that names the pool, where a service has several.")
    replica_label: str = Field(default="instance", description="Label that names one replica.")
    gateway_label: str | None = Field(default=None, description="Label that names the service at the gateway.")
    replicas_label: str | None = Field(default=None, description="Label that names the service in replica counts.")
    names: dict[str, str] = Field(default={}, description="Label value by service, where it is not the service's name.")
    gateway_names: dict[str, str] = Field(default={}, description="The same at the gateway.")
    replicas_names: dict[str, str] = Field(default={}, description="The same in replica counts.")
    matchers: dict[str, str] = Field(default={}, description="Labels that every series must have, such as a namespace.")
    metrics: dict[str, tuple[str, ...]] = Field(
        default={}, description="Own metric names by signal, for engines that are not in the table."
    )
    window_s: Positive | None = Field(default=None, description="Window of rates; the control interval when unset.")
    max_age_s: Positive = Field(default=60.0, description="A newest sample older than this makes a service blind.")
    min_coverage: Share = Field(default=0.7, description="Least share of the ready replicas that must be scraped.")
    discovery_s: NonNegative = Field(default=60.0, description="A replica ready for less need not be scraped yet.")
    timeout_s: Positive = Field(default=2.0, description="Longest wait for one answer.")
    deadline_s: Positive = Field(default=5.0, description="Longest time for one snapshot, retries included.")
    attempts: int = Field(default=3, ge=1, le=10, description="Tries of one query within the deadline.")
    histograms: bool = Field(
        default=True,
        description="Fetch whole latency histograms, for policies that scale on quantiles; else the objectives' edges.",
    )
    auth: PrometheusAuth = Field(default=PrometheusAuth(), description="How to log in.")

    @model_validator(mode="after")
    def _known_signals(self) -> PrometheusConfig:
        unknown = sorted(set(self.metrics) - set(presets.SIGNALS))
        if unknown:
            raise ValueError(f"metrics: no signal named {unknown[0]!r}; signals: {', '.join(presets.SIGNALS)}")
        return self


@dataclass(frozen=True)
class Query:
    """One PromQL text, what its answer is grouped by and how its rows are found.

    Attributes:
        signal: name in `presets.SIGNALS`, or `seen`, `sample_time`.
        text: PromQL.
        label: the label that names the service.
        pool_label: the label that names the pool, if the answer is kept apart by pool.
        kind: whose naming of services it follows.
    """

    signal: str
    text: str
    label: str
    pool_label: str | None
    kind: Literal["engine", "gateway", "replicas"]


class PrometheusQueryError(RuntimeError):
    """Raised when a query got no answer; the message says why."""


class PrometheusClient:
    """Instant queries within a deadline, on prometheus-api-client.

    Args:
        config: where the server is, how to log in, how long to wait.
    """

    def __init__(self, config: PrometheusConfig) -> None:
        import requests
        from prometheus_api_client import PrometheusConnect
        from urllib3.util.retry import Retry

        self.config = config
        auth = config.auth
        session = requests.Session()
        session.verify = str(auth.ca_file) if auth.ca_file else auth.verify_tls
        if auth.client_cert_file:
            key = str(auth.client_key_file) if auth.client_key_file else None
            session.cert = (str(auth.client_cert_file), key) if key else str(auth.client_cert_file)
        # The client's own retries know no deadline, and its default is to wait for ever.
        self._connect: PrometheusConnect = PrometheusConnect(
            url=config.url.rstrip("/"), session=session, retry=Retry(0), timeout=config.timeout_s
        )

    def log_in(self) -> None:
        """Read the secrets anew: a mounted token is replaced while we run.

        Raises:
            ConfigError: when a secret is not there.
        """
        self._connect.headers = self.config.auth.headers()
        self._connect.auth = self.config.auth.basic()

    def ask(self, query: str, until_s: float | None = None, at_s: float | None = None) -> list[dict[str, Any]]:
        """The rows of an instant query.

        Args:
            query: PromQL.
            until_s: deadline on `time.monotonic`; one whole snapshot's time from now when None.
            at_s: the moment asked about, Unix seconds; the server's now when None.

        Raises:
            PrometheusQueryError: when there is no answer before the deadline, or the server refuses the query.
        """
        params = None if at_s is None else {"time": f"{at_s:.3f}"}
        rows: list[dict[str, Any]] = self._try(
            lambda wait_s: self._connect.custom_query(query, params=params, timeout=wait_s), until_s
        )
        return rows

    def names(self) -> set[str]:
        """Every metric name that the server knows.

        Raises:
            PrometheusQueryError: when there is no answer in time.
        """
        found: list[str] = self._try(lambda _: self._connect.all_metrics(), None)
        return set(found)

    def close(self) -> None:
        """Drop connections."""
        self._connect.close()

    def _try(self, call: Callable[[float], Any], until_s: float | None) -> Any:
        from prometheus_api_client.exceptions import PrometheusApiClientException
        from requests import RequestException

        until_s = time.monotonic() + self.config.deadline_s if until_s is None else until_s
        why, pause_s = "the deadline has passed", FIRST_PAUSE_S
        for _ in range(self.config.attempts):
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                break
            try:
                return call(min(self.config.timeout_s, left_s))
            except PrometheusApiClientException as error:
                why = " ".join(str(error).split())[:300]
                if "Status Code 4" in why and "Status Code 429" not in why:
                    break  # the server understood and refuses: asking again changes nothing
            except (RequestException, ValueError, KeyError, TypeError) as error:
                # The whole query is in the address, which would hide what went wrong.
                sentence = " ".join(re.sub(r"with url: \S+", "", str(error)).split())
                why = f"{type(error).__name__}: {sentence[:300]}"
            time.sleep(max(0.0, min(pause_s, until_s - time.monotonic())))
            pause_s *= 2
        raise PrometheusQueryError(why)


class PrometheusSource:
    """A `MetricsSource` of `n` services.

    Args:
        config: where the measurements are and what they are called.
        specs: the services; their names are the label values unless `config.names` says otherwise.
        state: what is in force, from the actuator; replica counts come from Prometheus where it is None or unknown.
        clock: seconds since the epoch, for windows in which Prometheus says no time.

    Raises:
        ConfigError: when a service has several pools and there is no `pool_label`.
    """

    def __init__(
        self,
        config: PrometheusConfig,
        specs: Sequence[ScalingSpec],
        state: Callable[[], FleetState] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.config = config
        self.specs = tuple(specs)
        self.problems: tuple[str, ...] = ()
        """What the last `read` could not have, in words."""
        self.last_state: FleetState | None = None
        """The actuator's state as of the last `read`."""
        self._pools = pools_of(specs)
        several = next((spec.service for spec in specs if len(spec.pools) > 1), None)
        if several and config.pool_label is None:
            raise ConfigError(f"metrics: service {several!r} has several pools, so pool_label must be set")
        self._state = state
        self._clock = clock
        self._client = PrometheusClient(config)
        self._executor = ThreadPoolExecutor(WORKERS, "prometheus")
        self.queries = build_queries(config, specs)
        self._rows = {
            kind: {names.get(spec.service, spec.service): row for row, spec in enumerate(specs)}
            for kind, names in (
                ("engine", config.names),
                ("gateway", config.gateway_names),
                ("replicas", config.replicas_names),
            )
        }
        self._columns: list[dict[str, int]] = [
            {
                **({"": 0} if len(spec.pools) == 1 else {}),
                **{pool.label: place for place, pool in enumerate(spec.pools)},
            }
            for spec in specs
        ]
        self._slo_ttft = np.array([spec.slo.ttft_s for spec in specs])
        self._slo_tpot = np.array([spec.slo.tpot_s for spec in specs])
        self._boot = BootLedger(specs)
        self._empty_s = np.full(len(specs), np.nan)  # when the queue was last seen empty
        self._window_s = config.window_s or specs[0].interface.window.control_interval_s
        self._twice = np.zeros(len(specs), bool)  # whether the last reading had too many series
        self._ready_history: deque[tuple[float, Floats]] = deque()

    def read(self) -> Snapshot:
        """The latest window of every service; a gap is NaN.

        Raises:
            MetricsUnavailable: when no query was answered.
        """
        answers, problems = self._ask_all()
        state = self._state() if self._state is not None else None
        self.last_state = state
        if state is not None:
            problems += list(state.problems)
        now_s = self._time(answers)
        values = {query.signal: self._fill(query, answers.get(query.signal), problems) for query in self.queries}
        snapshot = self._assemble(values, answers, state, now_s, problems)
        self.problems = tuple(dict.fromkeys(problems))
        return snapshot

    def replica_loads(self) -> dict[str, float]:
        """Running requests by replica, for removing the least loaded first; empty when unknown."""
        names, _ = candidates_by_signal(self.config).get("running", ((), ""))
        label = self.config.replica_label
        try:
            rows = self._client.ask(presets.render("running", names, (label,), self.config.matchers, self._window_s))
        except PrometheusQueryError:
            return {}
        return {row["metric"].get(label, ""): float(row["value"][1]) for row in rows}

    def close(self) -> None:
        """Stop the query threads and drop connections."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._client.close()

    def _ask_all(self) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
        try:
            self._client.log_in()
        except ConfigError as error:
            raise MetricsUnavailable(str(error)) from None
        until_s = time.monotonic() + self.config.deadline_s
        futures = {query.signal: self._executor.submit(self._client.ask, query.text, until_s) for query in self.queries}
        answers, problems = {}, []
        for signal, future in futures.items():
            try:
                answers[signal] = future.result(max(0.0, until_s - time.monotonic()) + self.config.timeout_s)
            except (PrometheusQueryError, TimeoutError) as error:
                problems.append(f"{signal}: {error or 'no answer in time'}")
        if not answers:
            raise MetricsUnavailable(f"{self.config.url}: {problems[0]}")
        return answers, problems

    def _time(self, answers: Mapping[str, list[dict[str, Any]]]) -> float:
        """The server's clock where it says a time: ages are differences on that clock alone."""
        return max((float(rows[0]["value"][0]) for rows in answers.values() if rows), default=self._clock())

    def _fill(self, query: Query, rows: list[dict[str, Any]] | None, problems: list[str]) -> Floats:
        """One signal as an array: (n, P) by pool, (n,) by service. Buckets are read elsewhere."""
        n, pools = len(self.specs), max(len(spec.pools) for spec in self.specs)
        values = np.full((n, pools), np.nan)
        if rows is not None and not query.signal.endswith("_bucket"):
            by_name = self._rows[query.kind]
            for sample in rows:
                metric = sample["metric"]
                row = by_name.get(metric.get(query.label, ""))
                if row is None:
                    continue
                column = self._columns[row].get(metric.get(query.pool_label, "")) if query.pool_label else 0
                if column is None:
                    continue
                value = float(sample["value"][1])
                if not np.isfinite(value):
                    problems.append(f"{query.signal}: {self.specs[row].service} reports {sample['value'][1]}")
                    value = np.nan
                values[row, column] = value
        return values if query.pool_label or presets_per_pool(query.signal) else values[:, 0]

    def _assemble(
        self,
        values: Mapping[str, Floats],
        answers: Mapping[str, list[dict[str, Any]]],
        state: FleetState | None,
        now_s: float,
        problems: list[str],
    ) -> Snapshot:
        n, width = len(self.specs), max(len(spec.pools) for spec in self.specs)
        exists = np.zeros((n, width), bool)
        for pool in self._pools:
            exists[pool.row, pool.column] = True

        def service(name: str) -> Floats:
            return values.get(name, np.full(n, np.nan))

        def pool_values(name: str) -> Floats:
            return np.where(exists, values.get(name, np.full((n, width), np.nan)), 0.0)

        target, ready, starting, draining = self._replicas(state, values, exists)
        empty = _every(np.where(exists, ready + draining, 0.0) == 0)
        lost = self._lost(values, ready, draining, now_s, empty, problems)

        def seen(array: Floats) -> Floats:
            """Without what is lost; a service without replicas has nothing running, which is known."""
            idle, gone = (empty, lost) if array.ndim == 1 else (empty[:, None], lost[:, None])
            return np.where(idle & np.isnan(array), 0.0, np.where(gone, np.nan, array))

        queue = np.zeros(n) if self.config.gateway == "none" else service("queue")
        finished = seen(service("finished"))
        running, waiting = seen(pool_values("running")), pool_values("waiting")
        waiting = seen(waiting)
        wait_s = self._gateway_wait(values)
        ttft, ttft_bins, ttft_count = self._latency(
            "ttft_bucket", answers, self._slo_ttft, wait_s, TTFT_EDGES_S, problems
        )
        tpot, tpot_bins, _ = self._latency("tpot_bucket", answers, self._slo_tpot, np.zeros(n), TPOT_EDGES_S, problems)
        arrival = service("arrival")
        if self.config.gateway == "none":
            # Nothing counts arrivals in front of the engines: first tokens follow them, late by the engines' queue.
            arrival = np.where(np.isnan(arrival), seen(ttft_count), arrival)
        count = service("length_count")
        with np.errstate(divide="ignore", invalid="ignore"):
            prompt_mean = np.where(count > 0, service("prompt_sum") / count, np.nan)
            output_mean = np.where(count > 0, service("output_sum") / count, np.nan)
        prompt, cached = service("prompt"), service("cached")
        prefill = np.maximum(prompt - np.where(np.isnan(cached), 0.0, cached), 0.0)
        backlog = queue + np.where(np.isnan(waiting), 0.0, waiting).sum(axis=1)
        missing_pipeline = np.isnan(starting)
        return Snapshot(
            time_s=np.full(n, now_s),
            window_s=np.full(n, self._window_s),
            arrival_rps=arrival,
            prompt_tps=np.where(lost, np.nan, arrival * prompt_mean),
            prefill_tps=seen(prefill),
            generation_tps=seen(service("generation")),
            finished_rps=finished,
            prompt_tokens_mean=np.where(lost, np.nan, prompt_mean),
            output_tokens_mean=np.where(lost, np.nan, output_mean),
            queue_requests=queue,
            oldest_wait_s=self._oldest_wait(backlog, finished, now_s),
            ttft_attainment=np.where(lost, np.nan, ttft),
            tpot_attainment=np.where(lost, np.nan, tpot),
            ttft_histogram_rps=np.where(lost[:, None], np.nan, ttft_bins),
            tpot_histogram_rps=np.where(lost[:, None], np.nan, tpot_bins),
            replicas_target=target,
            replicas_starting=starting,
            replicas_ready=ready,
            replicas_draining=draining,
            boot_pipeline=self._boot.bins(np.where(missing_pipeline, 0.0, starting), missing_pipeline, now_s),
            running=running,
            waiting=waiting,
            kv_cache_usage=seen(pool_values("kv_cache_usage")),
            batch_cap=self._caps(state, values, exists),
        )

    def _replicas(
        self, state: FleetState | None, values: Mapping[str, Floats], exists: np.ndarray
    ) -> tuple[Floats, Floats, Floats, Floats]:
        """Target, ready, starting, draining (n, P): from the actuator, else from Prometheus, else unknown."""
        blank = np.where(exists, np.nan, 0.0)
        measured_target = np.where(exists, values.get("replicas_target", blank), 0.0)
        measured_ready = np.where(exists, values.get("replicas_ready", blank), 0.0)
        if state is None:
            ready = measured_ready
            target = measured_target
            starting, draining = blank, np.where(exists, 0.0, 0.0)
        else:
            ready = np.where(np.isnan(state.replicas_ready), measured_ready, state.replicas_ready)
            target = np.where(np.isnan(state.replicas_target), measured_target, state.replicas_target)
            starting, draining = state.replicas_starting, np.nan_to_num(state.replicas_draining)
        if state is None or not state.problems:
            # An actuator that failed leaves counts unknown; one that does not count replicas leaves it to the metrics:
            # what is scraped is ready, and what there is was asked for.
            ready = np.where(np.isnan(ready), np.where(exists, values.get("seen", blank), 0.0), ready)
            target = np.where(np.isnan(target), ready, target)
        starting = np.where(np.isnan(starting), np.maximum(target - ready, 0.0), starting)
        return target, ready, starting, draining

    def _caps(self, state: FleetState | None, values: Mapping[str, Floats], exists: np.ndarray) -> Floats:
        caps = np.where(exists, np.nan, 0.0) if state is None else state.batch_cap
        if "batch_cap" in values:
            caps = np.where(np.isnan(caps), values["batch_cap"][:, None], caps)
        return np.where(exists, caps, 0.0)

    def _lost(
        self,
        values: Mapping[str, Floats],
        ready: Floats,
        draining: Floats,
        now_s: float,
        empty: np.ndarray,
        problems: list[str],
    ) -> np.ndarray:
        """(n,) True where a service's series are stale, cover too few of its replicas, or are there twice."""
        n = len(self.specs)
        newest = values["sample_time"] if "sample_time" in values else np.full(n, np.nan)
        age_s = now_s - newest
        stale = ~(age_s <= self.config.max_age_s) & ~empty & ~np.isnan(newest)
        seen_count = values["seen"].sum(axis=1) if "seen" in values else np.full(n, np.nan)
        ready_count, live = ready.sum(axis=1), (ready + draining).sum(axis=1)
        self._ready_history.append((now_s, ready_count))
        while len(self._ready_history) > 1 and self._ready_history[0][0] < now_s - self.config.discovery_s:
            self._ready_history.popleft()
        # A clock that went back leaves readings from the future behind.
        expected = np.min([count for at_s, count in self._ready_history if at_s <= now_s], axis=0)
        with np.errstate(invalid="ignore"):
            partial = (seen_count < self.config.min_coverage * expected) & (expected >= 1)
            many = (seen_count >= 2 * live) & (live >= 1) & (self._state is not None)
        # A replica that was just replaced is seen beside its successor for one window.
        twice, self._twice = many & self._twice, many
        for row in np.flatnonzero(stale | partial | twice):
            name = self.specs[row].service
            if stale[row]:
                problems.append(f"{name}: the newest sample is {age_s[row]:.0f} s old")
            elif partial[row]:
                problems.append(f"{name}: {seen_count[row]:.0f} of {expected[row]:.0f} replicas are scraped")
            else:
                problems.append(f"{name}: {seen_count[row]:.0f} series for {live[row]:.0f} replicas: scraped twice?")
        return np.asarray(stale | partial | twice)

    def _gateway_wait(self, values: Mapping[str, Floats]) -> Floats:
        """(n,) seconds that requests wait before the engine's own clock starts."""
        gateway = presets.GATEWAYS.get(self.config.gateway)
        if gateway is None or gateway.measures_ttft or "queue_wait" not in values:
            return np.zeros(len(self.specs))
        return values["queue_wait"]

    def _latency(
        self,
        signal: str,
        answers: Mapping[str, list[dict[str, Any]]],
        slo_s: Floats,
        wait_s: Floats,
        edges_s: Sequence[float],
        problems: list[str],
    ) -> tuple[Floats, Floats, Floats]:
        """(n,) share within the objective, (n, edges + 1) events per second by latency, (n,) events per second.

        The share is exact where the objective is a bucket edge and nothing waits in front. With a wait, the largest
        edge that the wait leaves room for is read: the share can then only be too low. The histogram is moved by the
        wait and interpolated at the edges of the contract.
        """
        n = len(self.specs)
        edges, cumulative, rate = self._buckets(signal, answers)
        there = ~np.isnan(cumulative)
        share = np.full(n, np.nan)
        by_latency = np.full((n, len(edges_s) + 1 if self.config.histograms else 0), np.nan)
        if not len(edges):
            return share, by_latency, rate
        for row in np.flatnonzero(there.any(axis=1) & ~there.all(axis=1)):
            # Engines with other edges than the rest of the fleet: linear between their own.
            own = there[row]
            cumulative[row] = np.interp(edges, edges[own], cumulative[row, own], left=0.0)
        if self.config.histograms:
            at_s = np.asarray(edges_s)[np.newaxis, :] - wait_s[:, np.newaxis]
            by_latency = _rebin(edges, cumulative, rate, at_s)
        room_s = slo_s - wait_s
        place = np.abs(edges[np.newaxis, :] - slo_s[:, np.newaxis]).argmin(axis=1)
        rows = np.arange(n)
        is_edge = (np.abs(edges[place] - slo_s) <= 1e-6 * slo_s) & there[rows, place]
        below = np.where(there & (edges[np.newaxis, :] <= room_s[:, np.newaxis] * (1 + 1e-6)), cumulative, 0.0)
        within = np.where(wait_s > 0, below.max(axis=1), np.where(is_edge, cumulative[rows, place], np.nan))
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where((rate > 0) & np.isfinite(room_s), np.clip(within / rate, 0.0, 1.0), np.nan)
        problems += [
            f"{signal}: {self.specs[row].service}: {slo_s[row]:g} s is no bucket edge"
            for row in np.flatnonzero((rate > 0) & (wait_s <= 0) & ~is_edge)
        ]
        return share, by_latency, rate

    def _buckets(self, signal: str, answers: Mapping[str, list[dict[str, Any]]]) -> tuple[Floats, Floats, Floats]:
        """(e,) finite upper edges, (n, e) cumulative events per second, NaN where missing, and (n,) all of them."""
        n = len(self.specs)
        query = next((one for one in self.queries if one.signal == signal), None)
        rows: list[dict[str, Any]] = answers.get(signal, []) if query is not None else []
        # 1 and 1.0 are one edge: texts are read as numbers, each text once.
        edge_of = {text: float(text) for text in {sample["metric"].get("le", "nan") for sample in rows}}
        edges = np.array(sorted({edge for edge in edge_of.values() if np.isfinite(edge)}))
        columns = {text: int(np.searchsorted(edges, edge)) for text, edge in edge_of.items() if not np.isnan(edge)}
        found = np.full((n, len(edges) + 1), np.nan)  # the last column is that of +Inf
        if query is not None:
            by_name = self._rows[query.kind]
            for sample in rows:
                metric = sample["metric"]
                row, column = by_name.get(metric.get(query.label, "")), columns.get(metric.get("le", "nan"))
                if row is not None and column is not None:
                    value, before = float(sample["value"][1]), found[row, column]
                    found[row, column] = value if before != before else before + value
        found[~np.isfinite(found)] = np.nan
        return edges, found[:, :-1], found[:, -1]

    def _oldest_wait(self, backlog: Floats, finished: Floats, now_s: float) -> Floats:
        """(n,) estimated age of the oldest unserved request: nothing exports it.

        By Little's law the last of `backlog` requests waits backlog over rate; and none waits longer than there has
        been a queue.
        """
        known = ~np.isnan(backlog)
        empty = known & (backlog <= 0)
        self._empty_s = np.where(empty | np.isnan(self._empty_s) | (self._empty_s > now_s), now_s, self._empty_s)
        window_s = self.specs[0].interface.window.control_interval_s
        queued_for_s = now_s - self._empty_s + window_s
        with np.errstate(divide="ignore", invalid="ignore"):
            by_rate = np.where(finished > 0, backlog / finished, np.inf)
        return np.where(empty, 0.0, np.where(known, np.minimum(by_rate, queued_for_s), np.nan))


class BootLedger:
    """When starting replicas were first seen, so that their remaining time can be told.

    Args:
        specs: the services; a pool's cold start is the expected time of its engine profile.
    """

    def __init__(self, specs: Sequence[ScalingSpec]) -> None:
        self._pools = pools_of(specs)
        self._cold_start_s = {pool: specs[pool.row].pools[pool.column].start.total_s for pool in self._pools}
        self._since: dict[PoolName, list[float]] = {pool: [] for pool in self._pools}
        self._shape = (len(specs), max(len(spec.pools) for spec in specs))

    def bins(self, starting: Floats, missing: np.ndarray, now_s: float) -> Floats:
        """(n, P, BOOT_BINS) starting replicas by expected remaining time; the longest-starting ones leave first."""
        counts = np.zeros((*self._shape, BOOT_BINS))
        for pool in self._pools:
            at = (pool.row, pool.column)
            if missing[at]:
                counts[at] = np.nan
                continue
            since, wanted = self._since[pool], int(starting[at])
            if not since and not wanted:
                continue
            del since[: max(0, len(since) - wanted)]
            since.extend([now_s] * (wanted - len(since)))
            left_s = self._cold_start_s[pool] - (now_s - np.array(since))
            places = np.searchsorted(BOOT_EDGES_S, left_s, "right")
            counts[at] = np.bincount(places, minlength=BOOT_BINS)
        return counts


def _rebin(edges: Floats, cumulative: Floats, total: Floats, at_s: Floats) -> Floats:
    """Cumulative counts as counts per bin of other edges, linear inside a bucket.

    Args:
        edges: (e,) finite upper edges of the source, ascending.
        cumulative: (n, e) events up to each.
        total: (n,) all events.
        at_s: (n, m) the edges wanted, service by service.

    Returns:
        (n, m + 1) events per bin; what is above the largest finite edge of the source is in the last one.
    """
    lower = np.concatenate([[0.0], edges])
    counts = np.concatenate([np.zeros((len(total), 1)), cumulative], axis=1)
    place = np.clip(np.searchsorted(lower, at_s, "right") - 1, 0, len(edges) - 1)
    inside = np.clip((at_s - lower[place]) / (lower[place + 1] - lower[place]), 0.0, 1.0)
    rows = np.arange(len(total))[:, np.newaxis]
    reached = counts[rows, place] + inside * (counts[rows, place + 1] - counts[rows, place])
    ends = np.concatenate([np.zeros((len(total), 1)), reached, total[:, np.newaxis]], axis=1)
    return np.maximum(np.diff(ends, axis=1), 0.0)


def presets_per_pool(signal: str) -> bool:
    """Whether a signal is kept apart by pool."""
    return signal == "seen" or (signal in presets.SIGNALS and presets.SIGNALS[signal].per_pool)


def candidates_by_signal(config: PrometheusConfig) -> dict[str, tuple[tuple[str, ...], str]]:
    """Metric names to look up and whose naming they follow, by signal: own names, then the gateway's, then engines'."""
    found: dict[str, tuple[tuple[str, ...], str]] = {}
    for engine in config.engines:
        for signal, names in presets.ENGINES[engine].items():
            found[signal] = ((*found.get(signal, ((), ""))[0], *names), "engine")
    for kind, preset in (
        ("gateway", presets.GATEWAYS.get(config.gateway)),
        ("replicas", presets.REPLICA_SOURCES.get(config.replicas)),
    ):
        found |= {signal: (names, kind) for signal, names in (preset.names.items() if preset else ())}
    return found | {signal: (names, found.get(signal, ((), "engine"))[1]) for signal, names in config.metrics.items()}


def build_queries(config: PrometheusConfig, specs: Sequence[ScalingSpec]) -> list[Query]:
    """One query per signal for all services."""
    window_s = config.window_s or specs[0].interface.window.control_interval_s
    gateway = presets.GATEWAYS.get(config.gateway)
    replicas = presets.REPLICA_SOURCES.get(config.replicas)
    labels = {
        "engine": config.service_label,
        "gateway": config.gateway_label or (gateway.label if gateway else config.service_label),
        "replicas": config.replicas_label or (replicas.label if replicas else config.service_label),
    }
    waits = gateway is not None and not gateway.measures_ttft and "queue_wait" in gateway.names
    edges = {
        # All edges for a histogram, or where a wait at the gateway moves the edge that is read.
        "ttft_bucket": () if waits or config.histograms else sorted({spec.slo.ttft_s for spec in specs}),
        "tpot_bucket": () if config.histograms else sorted({spec.slo.tpot_s for spec in specs}),
    }
    queries = []
    for signal, (names, kind) in candidates_by_signal(config).items():
        pool_label = config.pool_label if presets.SIGNALS[signal].per_pool and kind == "engine" else None
        by = (labels[kind], *([pool_label] if pool_label else []))
        text = presets.render(signal, names, by, config.matchers, window_s, edges.get(signal, ()))
        queries.append(Query(signal, text, labels[kind], pool_label, kind))  # type: ignore[arg-type]
        if signal == "running":
            seen = presets.render_seen(names, by, config.matchers, window_s)
            queries.append(Query("seen", seen, labels[kind], pool_label, kind))  # type: ignore[arg-type]
            taken = presets.render_sample_time(names, by[:1], config.matchers)
            queries.append(Query("sample_time", taken, labels[kind], None, kind))  # type: ignore[arg-type]
    return queries


def _every(values: np.ndarray) -> np.ndarray:
    return np.asarray(values.all(axis=1))

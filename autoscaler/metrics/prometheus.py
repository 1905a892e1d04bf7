"""Snapshots of all services from Prometheus, with one query per metric however many services there are.

What is missing, stale, impossible or not a number is NaN, never 0, so that the decision core holds instead of guessing.
A wait in a gateway in front of the engines (a batch cap outside them moves their queue there) is part of the time to
first token: it is taken off the objective before the engines' histogram is read.
This module must not know what is decided from a snapshot.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from autoscaler.actuators.base import FleetState, pools_of
from autoscaler.metrics import presets
from autoscaler.metrics.boot_ledger import BootLedger
from autoscaler.metrics.client import PrometheusConfig
from autoscaler.metrics.latency_histograms import Buckets, counts_by_latency, share_within
from autoscaler.metrics.plausibility import Plausibility
from autoscaler.metrics.queue_age import QueueAge
from autoscaler.metrics.replica_counts import ReplicaCounts
from autoscaler.metrics.scrape_coverage import Coverage
from autoscaler.metrics.signals import Answers, SignalReader
from policies.contract import TPOT_EDGES_S, TTFT_EDGES_S, Floats, Snapshot
from policies.engine import ConfigError
from policies.fleet import Fleet
from policies.redaction import in_short
from policies.spec import ScalingSpec


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
        self._pools = pools_of(specs)
        several = next((spec.service for spec in specs if len(spec.pools) > 1), None)
        if several and config.pool_label is None:
            raise ConfigError(f"metrics: service {several!r} has several pools, so pool_label must be set")
        self._state = state
        self._clock = clock
        self._signals = SignalReader(config, specs)
        self._asking = ThreadPoolExecutor(1, "prometheus-reading")
        self._slo_ttft = np.array([spec.slo.ttft_s for spec in specs])
        self._slo_tpot = np.array([spec.slo.tpot_s for spec in specs])
        self._counts = ReplicaCounts(specs, config.starts)
        self._max_num_seqs = Fleet.from_specs(specs).max_num_seqs
        self._boot = BootLedger(specs)
        self._window_s = config.window_s or specs[0].interface.window.control_interval_s
        self._read_s: float | None = None  # the server's time of the last snapshot
        self._coverage = Coverage([spec.service for spec in specs], config, self._window_s)
        self._plausibility = Plausibility(specs, self._window_s, config.min_coverage)
        self._queue_age = QueueAge(len(specs), specs[0].interface.window.control_interval_s)

    def read(self) -> Snapshot:
        """The latest window of every service; a gap is NaN.

        What is in force is asked at the same time: a reading takes as long as the slower of the two, and is known also
        when Prometheus is not there.

        Raises:
            MetricsUnavailable: when no query was answered.
        """
        asked = self._asking.submit(self._signals.ask)
        state = self._state() if self._state is not None else None
        answers, problems = asked.result()
        if state is not None:
            problems += list(state.problems)
        now_s = self._signals.time_s(answers, self._clock())
        snapshot = self._assemble(answers, state, now_s, problems)
        self.problems = tuple(dict.fromkeys(map(in_short, problems)))
        return snapshot

    @property
    def implausible(self) -> Mapping[tuple[str, str], int]:
        """How often a value was impossible, and so missing, by service and signal."""
        return self._plausibility.counts

    @property
    def replicas_stuck(self) -> Floats:
        """(n, P) replicas that never come, of those that the actuator does not count."""
        return self._counts.stuck

    def replica_loads(self) -> dict[str, float]:
        """Running requests by replica, for removing the least loaded first; empty when unknown."""
        return self._signals.replica_loads(self._window_s)

    def close(self) -> None:
        """Stop the query threads and drop connections."""
        self._asking.shutdown(wait=False, cancel_futures=True)
        self._signals.close()

    def _assemble(self, answers: Answers, state: FleetState | None, now_s: float, problems: list[str]) -> Snapshot:
        n, width = len(self.specs), max(len(spec.pools) for spec in self.specs)
        exists = np.zeros((n, width), bool)
        for pool in self._pools:
            exists[pool.row, pool.column] = True
        values = self._signals.arrays(answers, problems)
        values |= self._plausibility.counts_of_replicas(values, problems)
        targets, scraped = self._signals.targets(answers)
        fleet = self._counts.complete(state, values, scraped, problems)
        ready, starting, draining = fleet.replicas_ready, fleet.replicas_starting, fleet.replicas_draining
        # One that never gets ready may answer /metrics.
        live = np.where(exists, ready + starting + draining + fleet.replicas_stuck, 0.0)
        expected = np.fmax([len(found) for found in targets.scrapers], np.nan_to_num(ready).sum(axis=1))
        left_out = self._signals.left_out(answers, expected)
        values = self._plausibility.without(values, left_out, problems)
        ttft, tpot = (
            self._plausibility.seconds(
                signal, self._signals.buckets(signal, answers, slo_s, problems), left_out.get(signal, {}), problems
            )
            for signal, slo_s in (("ttft_bucket", self._slo_ttft), ("tpot_bucket", self._slo_tpot))
        )
        values = self._plausibility.possible(values, tpot, np.fmax(live, scraped), scraped, now_s, problems)

        def service(name: str) -> Floats:
            return values.get(name, np.full(n, np.nan))

        def pool_values(name: str) -> Floats:
            return np.where(exists, values.get(name, np.full((n, width), np.nan)), 0.0)

        empty = (np.where(exists, ready + draining, 0.0) == 0).all(axis=1)
        # Only an actuator counts what starts and drains, so only then are there too many.
        counted = np.full((n, width), np.nan) if state is None else state.replicas_ready + state.replicas_draining
        known_live = np.where(exists & np.isnan(counted), np.nan, live).sum(axis=1)
        lost = self._coverage.lost(targets, ready.sum(axis=1), known_live, now_s, empty, problems)

        def seen(array: Floats) -> Floats:
            """Without what is lost; a service without replicas has nothing running, which is known."""
            idle, gone = (empty, lost) if array.ndim == 1 else (empty[:, None], lost[:, None])
            return np.where(idle & np.isnan(array), 0.0, np.where(gone, np.nan, array))

        queue = np.zeros(n) if self.config.gateway == "none" else service("queue")
        finished = seen(service("finished"))
        running, waiting = seen(pool_values("running")), pool_values("waiting")
        waiting = seen(waiting)
        wait_s = self._gateway_wait(values, ttft.total)
        ttft_share, ttft_bins = self._latency("ttft_bucket", ttft, self._slo_ttft, wait_s, TTFT_EDGES_S, problems)
        tpot_share, tpot_bins = self._latency("tpot_bucket", tpot, self._slo_tpot, np.zeros(n), TPOT_EDGES_S, problems)
        arrival = service("arrival")
        if self.config.gateway == "none":
            # Nothing counts arrivals in front of the engines: first tokens follow them, late by the engines' queue.
            arrival = np.where(np.isnan(arrival), seen(ttft.total), arrival)
        count = service("length_count")
        with np.errstate(divide="ignore", invalid="ignore"):
            prompt_mean = np.where(count > 0, service("prompt_sum") / count, np.nan)
            output_mean = np.where(count > 0, service("output_sum") / count, np.nan)
        backlog = queue + np.where(np.isnan(waiting), 0.0, waiting).sum(axis=1)
        missing_pipeline = np.isnan(starting)
        return Snapshot(
            time_s=np.full(n, now_s),
            window_s=np.full(n, self._accounted_s(now_s)),
            arrival_rps=arrival,
            prompt_tps=np.where(lost, np.nan, arrival * prompt_mean),
            prefill_tps=seen(service("prefill")),
            generation_tps=seen(service("generation")),
            finished_rps=finished,
            prompt_tokens_mean=np.where(lost, np.nan, prompt_mean),
            output_tokens_mean=np.where(lost, np.nan, output_mean),
            queue_requests=queue,
            oldest_wait_s=self._queue_age.oldest_wait_s(backlog, finished, now_s),
            ttft_attainment=np.where(lost, np.nan, ttft_share),
            tpot_attainment=np.where(lost, np.nan, tpot_share),
            ttft_histogram_rps=np.where(lost[:, None], np.nan, ttft_bins),
            tpot_histogram_rps=np.where(lost[:, None], np.nan, tpot_bins),
            replicas_target=fleet.replicas_target,
            replicas_starting=starting,
            replicas_ready=ready,
            replicas_draining=draining,
            boot_pipeline=self._boot.bins(np.where(missing_pipeline, 0.0, starting), missing_pipeline, now_s),
            running=running,
            waiting=waiting,
            kv_cache_usage=seen(pool_values("kv_cache_usage")),
            batch_cap=self._caps(state, values, exists),
        )

    def _accounted_s(self, now_s: float) -> float:
        """What of the rates' window no earlier snapshot has accounted for, seconds.

        Windows are longer than the control interval where scrapes are rare. Whoever adds up rates over snapshots would
        count such traffic several times, and whoever forgets with time would forget too fast.
        """
        since_s = np.inf if self._read_s is None else now_s - self._read_s
        self._read_s = now_s
        # A server's clock that went back says nothing about the time that passed.
        return self._window_s if since_s < 0 else float(min(self._window_s, since_s))

    def _caps(self, state: FleetState | None, values: Mapping[str, Floats], exists: np.ndarray) -> Floats:
        """(n, P) requests that a replica is given at once: what is set in front, at most the engine's own limit."""
        caps = np.where(exists, np.nan, 0.0) if state is None else state.batch_cap
        if "batch_cap" in values:
            caps = np.where(np.isnan(caps), values["batch_cap"][:, None], caps)
        elif state is None or not state.problems:  # nothing is set, and nobody failed to say so
            caps = np.where(np.isnan(caps), self._max_num_seqs, caps)
        return np.where(exists, np.minimum(caps, self._max_num_seqs), 0.0)

    def _gateway_wait(self, values: Mapping[str, Floats], first_tokens_rps: Floats) -> Floats:
        """(n,) mean time that the window's requests waited before the engine's own clock started, seconds.

        By Little's law: the mean queue of the window over the rate at which requests left it, which are those that the
        engines gave a first token.
        """
        gateway = presets.GATEWAYS.get(self.config.gateway)
        if gateway is None or gateway.measures_ttft or "queue_mean" not in values:
            return np.zeros(len(self.specs))
        queue = values["queue_mean"]
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(queue == 0, 0.0, np.where(first_tokens_rps > 0, queue / first_tokens_rps, np.nan))

    def _latency(
        self,
        signal: str,
        buckets: Buckets,
        slo_s: Floats,
        wait_s: Floats,
        edges_s: Sequence[float],
        problems: list[str],
    ) -> tuple[Floats, Floats]:
        """(n,) share within the objective, (n, edges + 1) events per second by latency."""
        share, untold = share_within(buckets, slo_s, wait_s)
        problems += [
            f"{signal}: {self.specs[row].service}: {slo_s[row]:g} s is no bucket edge" for row in np.flatnonzero(untold)
        ]
        none = np.full((len(self.specs), 0), np.nan)
        return share, counts_by_latency(buckets, edges_s, wait_s) if self.config.histograms else none

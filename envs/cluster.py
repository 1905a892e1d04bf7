"""The simulated cluster: `n` services, each with pools of replicas, on a virtual clock.

It answers a controller like a real one: `read` is its metrics source, `apply` its actuator, `now_s` and `wait_until`
its clock. Measurements are as old as the interface's metrics delay says.
This module must not know about rewards or policies.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from envs import fleet_step
from envs.fleet_step import POOL_COLUMNS, SERVICE_COLUMNS
from envs.library import RequestLibrary
from envs.state import (
    BOOT_BINS,
    NODE,
    POOL,
    REPLICA,
    SERVICE,
    SLOT,
    SLOT_BITS,
    ClusterArrays,
    Records,
)
from envs.traces import Trace
from policies.contract import Floats, Ints, Snapshot, Target
from policies.objective import Usage
from policies.spec import PoolSpec, ScalingSpec, WindowSpec

RECLAIMED_ROWS_SHARE = 0.5
"""Spot pools get spare replica rows: those under notice still occupy theirs while replacements start."""
S = {name: column for column, name in enumerate(SERVICE_COLUMNS)}
P = {name: column for column, name in enumerate(POOL_COLUMNS)}


def pool_rows(pool: PoolSpec) -> int:
    """Replica rows that a pool needs."""
    spare = int(np.ceil(pool.max_replicas * RECLAIMED_ROWS_SHARE)) + 1 if pool.price_class == "spot" else 0
    return pool.max_replicas + spare


def pack_pools(specs: Sequence[ScalingSpec], pools: int) -> Records:
    """Parameters of every pool of `specs` as kernel records, (len(specs), pools); absent pools have no rows."""
    records = np.zeros((len(specs), pools), POOL)
    records["next_storm_s"] = np.inf
    records["max_num_seqs"] = 1
    records["batch_cap"] = 1
    for row, spec in enumerate(specs):
        first = 0
        for column, pool in enumerate(spec.pools):
            record = records[row, column]
            record["a"], record["b"], record["c"], record["d"], record["e"] = pool.engine.step.seconds
            record["kv_capacity"] = pool.engine.kv_capacity_tokens
            record["token_budget"] = pool.engine.max_num_batched_tokens
            record["max_num_seqs"] = pool.engine.max_num_seqs
            record["batch_cap"] = min(pool.initial_batch_cap or pool.engine.max_num_seqs, pool.engine.max_num_seqs)
            record["first_replica"] = first
            record["replica_rows"] = pool_rows(pool)
            record["slots_per_node"] = pool.engine.gpus_per_node // pool.engine.gpus_per_replica
            record["bill_per_node"] = pool.billing == "node"
            record["node_s"] = pool.start.node_s
            record["image_s"] = pool.start.image_s
            record["weights_s"] = pool.start.weights_s
            record["warmup_s"] = pool.start.warmup_s
            record["stage_cv"] = pool.cold_start_cv
            record["full_speed_loads"] = pool.full_speed_loads
            if pool.price_class == "spot":
                record["reclaim_per_s"] = pool.spot.reclaims_per_replica_day / 86400.0
                record["storm_per_s"] = pool.spot.storms_per_day / 86400.0
                record["storm_share"] = pool.spot.storm_share
                record["notice_s"] = pool.spot.notice_s
            first += int(record["replica_rows"])
    return records


class SimulatedCluster:
    """`n` services in lock-step memory; each has its own clock, trace rows and random numbers.

    Args:
        library: the requests.
        n: services.
        pools: pools per service, padding included.
        rows: replica rows per service, see `pool_rows`.
        slots: requests that one replica may hold: the largest `max_num_seqs`.
        window: control interval and metrics delay.
        record: keep first-token and finish times per trace row (each row must then belong to one service only).

    Raises:
        ValueError: when a service needs more than 4,096 slots per replica.
    """

    def __init__(
        self,
        library: RequestLibrary,
        n: int,
        pools: int,
        rows: int,
        slots: int,
        window: WindowSpec,
        record: bool = False,
    ) -> None:
        if slots > 1 << SLOT_BITS:
            raise ValueError(f"max_num_seqs {slots} is above {1 << SLOT_BITS}")
        self.library = library
        self.window = window
        requests = len(library.arrival_s) if record else 0
        ring = rows * slots  # every replica may be reclaimed with every slot taken
        self.arrays = ClusterArrays(
            pools=pools,
            rows=rows,
            slots=slots,
            ring=ring,
            service=np.zeros(n, SERVICE),
            pool=np.zeros(n * pools, POOL),
            replica=np.zeros(n * rows, REPLICA),
            node=np.zeros(n * rows, NODE),
            slot=np.zeros(n * rows * slots, SLOT),
            heap=np.zeros(n * rows * slots, np.int64),
            free_slots=np.zeros(n * rows * slots, np.int32),
            end_s=np.full(n * rows, np.inf),
            load=np.full(n * rows, np.inf),
            run_kind=np.zeros(n * rows, np.int8),
            status=np.zeros(n * rows, np.int8),
            returned=np.zeros(n * ring, np.int64),
            arrival_s=library.arrival_s,
            prompt_tokens=library.prompt_tokens,
            output_tokens=library.output_tokens,
            prefix_hit_tokens=library.prefix_hit_tokens,
            first_token_s=np.full(requests, np.nan),
            finish_s=np.full(requests, np.nan),
            served_by=np.full(requests, -1, np.int16),
        )
        self._everything = np.arange(n)
        self._services = np.zeros((n, len(SERVICE_COLUMNS)))
        self._pools = np.zeros((n, pools, len(POOL_COLUMNS)))
        self._before = self._services.copy()
        self._pools_before = self._pools.copy()
        self._read_s = np.zeros(n)
        self._read_before_s = np.zeros(n)
        self._kv_capacity = np.ones((n, pools), order="F")

    @classmethod
    def replay(
        cls,
        specs: Sequence[ScalingSpec],
        traces: Sequence[Trace],
        seeds: Sequence[int],
        record: bool = True,
    ) -> SimulatedCluster:
        """One service per spec, each replaying its own trace from the start.

        The initial fleet (`initial_replicas`, else `min_replicas`) is ready at time 0.
        """
        n = len(specs)
        library = RequestLibrary.of(traces)
        window = specs[0].interface.window
        pools = max(len(spec.pools) for spec in specs)
        rows = max(sum(pool_rows(pool) for pool in spec.pools) for spec in specs)
        slots = max(pool.engine.max_num_seqs for spec in specs for pool in spec.pools)
        cluster = cls(library, n, pools, rows, slots, window, record)
        initial = np.zeros((n, pools), np.int64)
        for row, spec in enumerate(specs):
            for column, pool in enumerate(spec.pools):
                start = pool.min_replicas if pool.initial_replicas is None else pool.initial_replicas
                initial[row, column] = min(start, pool.max_replicas)
        cluster.begin(
            np.arange(n),
            pack_pools(specs, pools),
            ttft_slo_s=np.array([spec.slo.ttft_s for spec in specs]),
            tpot_slo_s=np.array([spec.slo.tpot_s for spec in specs]),
            origin_s=np.zeros(n),
            first_row=library.first[:-1],
            end_row=library.first[1:],
            seeds=np.array(seeds),
            replicas=initial,
        )
        return cluster

    def __len__(self) -> int:
        """Number of services."""
        return len(self._services)

    def begin(
        self,
        services: Ints,
        pool_records: Records,
        *,
        ttft_slo_s: Floats,
        tpot_slo_s: Floats,
        origin_s: Floats,
        first_row: Ints,
        end_row: Ints,
        seeds: Ints,
        replicas: Ints,
    ) -> None:
        """Start an episode on the listed services (k,).

        Args:
            services: (k,) which.
            pool_records: (k, P) from `pack_pools`.
            ttft_slo_s: (k,) objective that the counters judge by.
            tpot_slo_s: (k,)
            origin_s: (k,) trace time at which the service's clock reads 0.
            first_row: (k,) first library row to arrive.
            end_row: (k,) one past the last.
            seeds: (k,) of the service's random numbers.
            replicas: (k, P) ready at once.
        """
        arrays = self.arrays
        pool = arrays.pool.reshape(len(self), arrays.pools)
        pool[services] = pool_records
        arrays.service["ttft_slo_s"][services] = ttft_slo_s
        arrays.service["tpot_slo_s"][services] = tpot_slo_s
        fleet_step.reset_rows(
            arrays, services, origin_s, first_row, end_row, seeds.astype(np.uint64), replicas.astype(np.int64)
        )
        self._kv_capacity[services] = np.maximum(pool_records["kv_capacity"], 1)
        self._services[services] = 0.0
        self._before[services] = 0.0
        self._pools[services] = 0.0
        self._pools_before[services] = 0.0
        self._read_s[services] = 0.0
        self._read_before_s[services] = 0.0

    # Clock

    @property
    def now_s(self) -> float:
        """Time of the first service's clock, seconds since the start of its episode."""
        return float(self.arrays.service["now_s"][0])

    def wait_until(self, time_s: float) -> None:
        """Run every service to `time_s`; measurements are taken one metrics delay earlier."""
        self._run_to(np.full(len(self), time_s), self._everything)

    def run_window(self, services: Ints | None = None) -> None:
        """Run the listed services (k,), all when None, one control interval on from where their own clocks stand."""
        act_s = self.arrays.service["now_s"] + self.window.control_interval_s
        self._run_to(act_s, self._everything if services is None else services)

    def _run_to(self, act_s: Floats, services: Ints) -> None:
        now_s = self.arrays.service["now_s"]
        for before, latest in (
            (self._before, self._services),
            (self._pools_before, self._pools),
            (self._read_before_s, self._read_s),
        ):
            before[services] = latest[services]
        self._read_s[services] = np.maximum(act_s - self.window.metrics_delay_s, now_s)[services]
        fleet_step.run_windows(self.arrays, services, self._read_s, act_s, self._services, self._pools)

    # Metrics source

    def read(self) -> Snapshot:
        """What a metrics system would report now: the window that ended one metrics delay ago."""
        now, before = self._services, self._before
        pools = self._pools
        span_s = np.maximum(self._read_s - self._read_before_s, 1e-9)
        delta = now - before

        def rate(name: str) -> Floats:
            return delta[:, S[name]] / span_s

        def mean(name: str, per: str) -> Floats:
            count = delta[:, S[per]]
            return np.where(count > 0, delta[:, S[name]] / np.maximum(count, 1.0), np.nan)

        def pool(name: str) -> Floats:
            # Pool by pool in memory: services are many, pools few.
            return pools[:, :, P[name]].copy(order="F")

        ready = pool("replicas_ready")
        return Snapshot(
            time_s=self._read_s.copy(),
            window_s=span_s,
            arrival_rps=rate("arrived"),
            prompt_tps=rate("arrived_prompt_tokens"),
            prefill_tps=rate("prefill_tokens"),
            generation_tps=rate("generated_tokens"),
            finished_rps=rate("finished"),
            prompt_tokens_mean=mean("finished_prompt_tokens", "finished"),
            output_tokens_mean=mean("finished_output_tokens", "finished"),
            queue_requests=now[:, S["queued"]].copy(),
            oldest_wait_s=now[:, S["oldest_wait_s"]].copy(),
            ttft_attainment=mean("ttft_ok", "first_tokens"),
            tpot_attainment=mean("tpot_ok", "finished"),
            replicas_target=pool("replicas_target"),
            replicas_starting=pool("replicas_starting"),
            replicas_ready=ready,
            replicas_draining=pool("replicas_draining"),
            boot_pipeline=pools[:, :, P["boot_soon"] : P["boot_soon"] + BOOT_BINS].copy(),
            running=pool("running"),
            waiting=pool("waiting"),
            kv_cache_usage=pool("kv_used_tokens") / (np.maximum(ready, 1.0) * self._kv_capacity),
            batch_cap=pool("batch_cap"),
        )

    def usage(self) -> Usage:
        """Cumulative usage since the start of the episode, as of the last measurement."""
        return self._usage_of(self._services.copy(), self._pools.copy(), self._read_s.copy())

    def window_usage(self) -> Usage:
        """Usage in the last window; `overdue` is the level at its end."""
        return self._usage_of(
            self._services - self._before,
            self._pools - self._pools_before,
            self._read_s - self._read_before_s,
            overdue=self._services[:, S["overdue"]],
        )

    def _usage_of(self, services: Floats, pools: Floats, read_s: Floats, overdue: Floats | None = None) -> Usage:
        return Usage(
            span_s=read_s,
            arrivals=services[:, S["arrived"]],
            rejected=services[:, S["rejected"]],
            finished=services[:, S["finished"]],
            ttft_ok=services[:, S["ttft_ok"]],
            tpot_ok=services[:, S["tpot_ok"]],
            good=services[:, S["good"]],
            overdue=services[:, S["overdue"]] if overdue is None else overdue,
            prompt_tokens=services[:, S["finished_prompt_tokens"]],
            output_tokens=services[:, S["finished_output_tokens"]],
            good_tokens=services[:, S["good_tokens"]],
            scale_events=services[:, S["scale_ups"]] + services[:, S["scale_downs"]],
            replica_s=pools[:, :, P["billed_replica_s"]],
            node_s=pools[:, :, P["billed_node_s"]],
            ready_s=pools[:, :, P["ready_s"]],
            busy_s=pools[:, :, P["busy_s"]],
        )

    def counter(self, name: str) -> Floats:
        """(n,) a cumulative service counter or level by its name in `envs.fleet_step.SERVICE_COLUMNS`."""
        return self._services[:, S[name]].copy()

    # Actuator

    def apply(self, target: Target) -> None:
        """Carry out an absolute target now."""
        fleet_step.apply_all(self.arrays, np.ascontiguousarray(target.replicas), np.ascontiguousarray(target.batch_cap))

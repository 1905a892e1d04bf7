"""The simulated cluster: `n` services, each with pools of replicas, on a virtual clock.

It answers a controller like a real one: `read` is its metrics source, `apply` its actuator, `now_s` and `wait_until`
its clock. Measurements are as old as the interface's metrics delay says.
This module must not know about rewards or policies.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from envs.cluster import window_step
from envs.cluster.library import RequestLibrary
from envs.cluster.pools import pack_pools, pool_rows
from envs.cluster.reading import SPENT, Reading, S, snapshot_of, usage_of
from envs.cluster.state import (
    NODE,
    POOL,
    REPLICA,
    SERVICE,
    SLOT,
    SLOT_BITS,
    ClusterArrays,
    Records,
)
from envs.cluster.window_step import POOL_COLUMNS, SERVICE_COLUMNS
from envs.traffic.trace import Trace
from policies.contract import TPOT_EDGES_S, TTFT_EDGES_S, Floats, Ints, Snapshot, Target
from policies.objective import Usage
from policies.spec import ScalingSpec, WindowSpec


class SimulatedCluster:
    """`n` services in lock-step memory; each has its own clock, trace rows and random numbers.

    Args:
        library: the requests.
        n: services.
        pools: pools per service, padding included.
        rows: replica rows per service, see `pool_rows`.
        slots: requests that one replica may hold: the largest `max_num_seqs`.
        window: control interval and metrics delay.
        record: keep first-token and finish times per trace row (each row must then belong to one service only), and
            report latency histograms; training needs neither.

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
        bins = len(TTFT_EDGES_S) + len(TPOT_EDGES_S) + 2 if record else 0
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
            ttft_edges_s=np.array(TTFT_EDGES_S),
            tpot_edges_s=np.array(TPOT_EDGES_S),
            histograms=np.zeros((n, bins), np.int64),
        )
        self._everything = np.arange(n)
        self._latest = self._previous = Reading(
            np.zeros(n),
            np.zeros((len(SERVICE_COLUMNS), n)),
            np.zeros((len(POOL_COLUMNS), pools, n)),
            np.zeros((bins, n)),
        )
        self._moved: Floats | None = None  # service columns of the window, once asked for
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
        return len(self._everything)

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
        window_step.reset_rows(
            arrays, services, origin_s, first_row, end_row, seeds.astype(np.uint64), replicas.astype(np.int64)
        )
        self._kv_capacity[services] = np.maximum(pool_records["kv_capacity"], 1)
        self._latest, self._previous = self._latest.renewed(services), self._previous.renewed(services)
        self._moved = None

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
        self._previous = self._previous.patched(services, self._latest)
        self._latest = self._latest.renewed(services)
        read_s, *columns = self._latest
        read_s[services] = np.maximum(act_s - self.window.metrics_delay_s, self.arrays.service["now_s"])[services]
        window_step.run_windows(self.arrays, services, read_s, act_s, *columns)
        self._moved = None

    def _window(self) -> Floats:
        """(SERVICE_COLUMNS, n) how far every counter moved in the last window; of levels it means nothing."""
        if self._moved is None:
            self._moved = self._latest.services - self._previous.services
        return self._moved

    # Metrics source

    def read(self) -> Snapshot:
        """What a metrics system would report now: the window that ended one metrics delay ago."""
        return snapshot_of(self._latest, self._previous, self._window(), self._kv_capacity)

    def usage(self) -> Usage:
        """Cumulative usage since the start of the episode, as of the last measurement."""
        latest = self._latest
        return usage_of(latest.read_s, latest.services, latest.pools[SPENT], latest.services[S["overdue"]])

    def window_usage(self) -> Usage:
        """Usage in the last window; `overdue` is the level at its end."""
        latest, previous = self._latest, self._previous
        spent = latest.pools[SPENT] - previous.pools[SPENT]
        return usage_of(latest.read_s - previous.read_s, self._window(), spent, latest.services[S["overdue"]])

    def counter(self, name: str) -> Floats:
        """(n,) a cumulative service counter or level by its name in `envs.cluster.window_step.SERVICE_COLUMNS`."""
        column: Floats = self._latest.services[S[name]]
        return column

    # Actuator

    def apply(self, target: Target) -> None:
        """Carry out an absolute target now."""
        window_step.apply_all(
            self.arrays, np.ascontiguousarray(target.replicas), np.ascontiguousarray(target.batch_cap)
        )

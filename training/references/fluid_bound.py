"""The fluid lower bound: what no policy that holds the SLO can undercut.

A linear programme over time. Requests are a fluid of work; replicas can be fractional, share work at will and lose
nothing to batching; scale-down is free; scale-up pays for its boot. What remains are facts that bind every policy:

- a request that counts as met needs its prefill by the TTFT objective and its output by the TPOT objective after that,
  and no work before it has arrived; up to ``1 - attainment`` of the requests may be late, the most expensive first;
- a late request is still served: the gateway serves in order and sheds nothing, so a missed request costs its work all
  the same. Only one of the last to arrive may be unfinished at the horizon (`_may_be_unfinished`);
- an iteration costs its fixed time `a` at least once per `max_num_seqs` decodes, per KV cache full of contexts and per
  token budget of prefill (`work_of`), in the pool on which the request is fastest relative to the first;
- a replica that was not there at the start is billed for its image, weights and warm-up first, each at the low end of
  its distribution, and serves nothing before.

Every simplification lowers the cost: the optimum is a lower bound. The plan (`training.references.clairvoyant`) is an
upper one.
This module must not know how anything is simulated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_array

from envs.cluster.pools import pool_rows
from envs.traffic.trace import Trace
from policies.contract import Bools, Floats, Ints
from policies.spec import PoolSpec, ScalingSpec

MAX_INTERVALS = 480
"""Intervals of the programme; longer horizons get wider ones, which only lowers the bound."""
WORK_BINS = 4
"""Bins by size of the requests of one interval, for choosing which ones are late."""
NO_LIMIT = 1e6
"""Replicas at the beginning where the size is free."""
INFEASIBLE = 2
"""Status of `scipy.optimize.linprog`."""
LOW_END_SIGMAS = 4.0
"""A stage of a boot is counted this far below its median: one draw in 30,000 is shorter."""


class Unservable(ValueError):  # noqa: N818 - reads as the finding that it is
    """Raised when not even a fluid within the pools' bounds serves enough requests in time."""


@dataclass(frozen=True)
class Bound:
    """The cheapest fluid.

    Attributes:
        usd: lower bound on the bill, dollars, overhead included.
        replica_hours: billed replica-hours of the optimum, all pools.
    """

    usd: float
    replica_hours: float


@dataclass(frozen=True, eq=False)
class Work:
    """Least time of one replica that each request takes, seconds, arrays (requests,)."""

    prefill_s: Floats
    decode_s: Floats

    @property
    def total_s(self) -> Floats:
        """(requests,) both."""
        return self.prefill_s + self.decode_s


def work_of(trace: Trace, pool: PoolSpec) -> Work:
    """Least replica time of every request on a pool, at the best batching that its engine allows.

    Variable time is the step-time model's sum over the request's iterations. The fixed time `a` of iterations is
    shared: over all requests it is at least `a` times the largest of (decodes / `max_num_seqs`), (context tokens read /
    KV capacity) and (prefill tokens / token budget); the binding one is shared out.
    """
    engine = pool.engine
    a, b, c, d, e = engine.step.seconds
    prompt = trace.prompt_tokens.astype(np.float64)
    cached = np.minimum(trace.prefix_hit_tokens, np.maximum(trace.prompt_tokens - 1, 0)).astype(np.float64)
    computed = prompt - cached
    steps = trace.output_tokens - 1.0  # the prefill emits the first token
    contexts = steps * prompt + steps * (steps - 1.0) / 2.0
    prefill_s = b * computed + e * computed * (cached + computed / 2.0)
    decode_s = c * steps + d * contexts
    shares = (
        ("decode", steps / engine.max_num_seqs),
        ("decode", contexts / engine.kv_capacity_tokens),
        ("prefill", computed / engine.max_num_batched_tokens),
    )
    kind, share = max(shares, key=lambda item: float(item[1].sum()))
    if kind == "decode":
        return Work(prefill_s, decode_s + a * share)
    return Work(prefill_s + a * share, decode_s)


def boot_charge_s(pool: PoolSpec) -> float:
    """Billed seconds of a start before the replica serves, at the low end of the stages' distribution."""
    sigma = math.sqrt(math.log1p(pool.cold_start_cv**2))
    low = math.exp(-LOW_END_SIGMAS * sigma - 0.5 * sigma * sigma)
    start = pool.start
    return (start.image_s + start.weights_s + start.warmup_s) * low


def fluid_bound(spec: ScalingSpec, trace: Trace, horizon_s: float) -> Bound:
    """Lower bound on the bill up to the horizon of any policy that holds the SLO on this trace.

    Raises:
        Unservable: when the pools are too small even for that.
    """
    pools = spec.pools
    works = [work_of(trace, pool) for pool in pools]
    base = works[0]
    # Seconds of pool 0 that a second of pool p does at best.
    speed = np.array([float((base.total_s / np.maximum(work.total_s, 1e-300)).max()) for work in works])
    interval_s = max(spec.interface.window.control_interval_s, horizon_s / MAX_INTERVALS)
    intervals = math.ceil(horizon_s / interval_s - 1e-9)
    bins = _bins(trace, base, spec, interval_s, intervals, horizon_s)
    return _solve(spec, speed, bins, interval_s, intervals, horizon_s, (1.0 - spec.slo.attainment) * len(trace))


@dataclass(frozen=True, eq=False)
class _Bins:
    """Requests lumped by arrival interval and size. Arrays (bins,); work in seconds of a replica of pool 0."""

    prefill_s: Floats
    decode_s: Floats
    largest_prefill_s: Floats
    largest_decode_s: Floats
    arrives: Ints  # interval from whose start the work may be done
    prefill_due: Ints  # interval by whose end it must be done; `intervals` when only after the horizon
    decode_due: Ints
    may_be_unfinished: Bools  # at the horizon, where they are late


def _may_be_unfinished(trace: Trace, spec: ScalingSpec, horizon_s: float) -> Bools:
    """(requests,) True where a late request may still be under way, or not begun, at the horizon.

    The queue is first in, first out, and no more than ``1 - attainment`` of the requests are late: what has not begun
    is among as many last arrivals. What has begun emits a token per iteration, and no iteration takes longer than one
    with a full token budget, batch and KV cache.
    """
    slowest_s = np.zeros(len(trace))
    for pool in spec.pools:
        engine = pool.engine
        a, b, c, d, e = engine.step.seconds
        budget, context = engine.max_num_batched_tokens, engine.kv_capacity_tokens
        iteration_s = a + budget * (b + e * float(trace.prompt_tokens.max())) + c * engine.max_num_seqs + d * context
        chunks = np.ceil(trace.prompt_tokens / max(16, budget - engine.max_num_seqs))
        slowest_s = np.maximum(slowest_s, iteration_s * (trace.output_tokens + chunks))
    not_begun = np.arange(len(trace)) >= len(trace) - (1.0 - spec.slo.attainment) * len(trace)
    return not_begun | (trace.arrival_s + slowest_s >= horizon_s)


def _bins(trace: Trace, work: Work, spec: ScalingSpec, interval_s: float, intervals: int, horizon_s: float) -> _Bins:
    arrives = np.minimum((trace.arrival_s / interval_s).astype(np.int64), intervals - 1)
    order = np.lexsort((-work.total_s, arrives))
    start = np.searchsorted(arrives[order], np.arange(intervals + 1))
    rank = np.empty(len(trace), np.int64)
    rank[order] = np.arange(len(trace)) - start[arrives[order]]
    size = np.diff(start)[arrives]
    # The largest twentieth of an interval's requests are told apart most finely: those will be late.
    edges = np.array([0.02, 0.05, 0.2])
    unfinished = _may_be_unfinished(trace, spec, horizon_s)
    label = (arrives * WORK_BINS + np.searchsorted(edges, rank / size, side="right")) * 2 + unfinished
    ttft_due_s = trace.arrival_s + spec.slo.ttft_s
    done_s = ttft_due_s + spec.slo.tpot_s * (trace.output_tokens - 1)

    def due(time_s: Floats) -> Ints:
        late = time_s > horizon_s - 1e-9
        by = np.minimum(np.ceil(time_s / interval_s - 1e-9).astype(np.int64) - 1, intervals - 1)
        return np.where(late, intervals, np.maximum(by, 0))

    used, place = np.unique(label, return_inverse=True)

    def largest(values: np.ndarray) -> np.ndarray:
        found = np.zeros(len(used), values.dtype)
        np.maximum.at(found, place, values)
        return found

    return _Bins(
        prefill_s=np.bincount(place, work.prefill_s, len(used)).astype(np.float64),
        decode_s=np.bincount(place, work.decode_s, len(used)).astype(np.float64),
        largest_prefill_s=largest(work.prefill_s),
        largest_decode_s=largest(work.decode_s),
        arrives=used // (2 * WORK_BINS),
        prefill_due=largest(due(ttft_due_s)),
        decode_due=largest(due(done_s)),
        may_be_unfinished=used % 2 > 0,
    )


def _solve(
    spec: ScalingSpec,
    speed: Floats,
    bins: _Bins,
    interval_s: float,
    intervals: int,
    horizon_s: float,
    max_late: float,
) -> Bound:
    """Build and solve the programme.

    Columns: replicas (pool, interval), starts (pool, interval), work done by the end of an interval, work due by then
    that is late, and per bin the late shares of its prefill and decode work and the requests that this takes.
    """
    pools, count = len(spec.pools), len(bins.arrives)
    width = np.full(intervals, interval_s)
    width[-1] = horizon_s - interval_s * (intervals - 1)
    replicas = np.arange(pools * intervals).reshape(pools, intervals)
    starts = replicas + replicas.size
    done = 2 * replicas.size + np.arange(intervals)
    excused_by = done + intervals
    late_prefill = excused_by[-1] + 1 + np.arange(count)
    late_decode, late = late_prefill + count, late_prefill + 2 * count
    columns = int(excused_by[-1]) + 1 + 3 * count
    price = np.array([pool.usd_per_replica_hour / 3600.0 for pool in spec.pools])
    boot_s = np.array([boot_charge_s(pool) for pool in spec.pools])

    cost, low, high = np.zeros(columns), np.zeros(columns), np.full(columns, np.inf)
    present = np.full(pools, NO_LIMIT)
    for pool, settings in enumerate(spec.pools):
        cost[replicas[pool]] = price[pool] * width
        cost[starts[pool]] = price[pool] * boot_s[pool]
        # A provider may take spot replicas below the minimum.
        low[replicas[pool]] = 0.0 if settings.price_class == "spot" else settings.min_replicas
        high[replicas[pool]] = pool_rows(settings)
        if settings.initial_replicas is not None:
            present[pool] = max(min(settings.initial_replicas, settings.max_replicas), low[replicas[pool, 0]])
            high[replicas[pool][np.cumsum(width) <= boot_s[pool]]] = present[pool]
    high[late_prefill] = high[late_decode] = 1.0
    # No work before its arrival.
    high[done] = np.cumsum(np.bincount(bins.arrives, bins.prefill_s + bins.decode_s, intervals))

    rows = _Rows()
    every, after = np.arange(intervals), np.arange(1, intervals)
    # Work is done by replicas, and not undone.
    for direction in (1.0, -1.0):
        rows.add(every, done, direction)
        rows.add(after, done[:-1], -direction)
        for pool in range(pools):
            rows.add(every, replicas[pool], -speed[pool] * width if direction > 0 else np.zeros(intervals))
        rows.close(np.zeros(intervals))
    # What is due by the end of an interval is done by then, unless late.
    rows.add(every, done, -1.0)
    rows.add(every, excused_by, -1.0)
    due = np.zeros(intervals)
    for work_s, by in ((bins.prefill_s, bins.prefill_due), (bins.decode_s, bins.decode_due)):
        due += np.cumsum(np.bincount(by, work_s, intervals + 1)[:intervals])
    rows.close(-due)
    rows.add(every, excused_by, 1.0)
    rows.add(after, excused_by[:-1], -1.0)
    for work_s, by, column in (
        (bins.prefill_s, bins.prefill_due, late_prefill),
        (bins.decode_s, bins.decode_due, late_decode),
    ):
        inside = by < intervals
        rows.add(by[inside], column[inside], -work_s[inside])
    rows.close(np.zeros(intervals))
    # Late work is done by the horizon all the same, but for what may be unfinished then.
    rows.add([0], done[-1:], -1.0)
    must = 0.0
    for work_s, by, column in (
        (bins.prefill_s, bins.prefill_due, late_prefill),
        (bins.decode_s, bins.decode_due, late_decode),
    ):
        inside = by < intervals
        must += float(work_s[inside].sum())
        excused = inside & bins.may_be_unfinished
        rows.add(np.zeros(int(excused.sum()), np.int64), column[excused], -work_s[excused])
    rows.close(np.array([-must]))
    # A start for every replica more; those at the beginning are there already.
    for pool in range(pools):
        rows.add(every, replicas[pool], 1.0)
        rows.add(after, replicas[pool][:-1], -1.0)
        rows.add(every, starts[pool], -1.0)
        rows.close(np.where(every == 0, present[pool], 0.0))
    # A late share of a bin's work takes at least that work over its largest request.
    for share, work_s, largest_s in (
        (late_prefill, bins.prefill_s, bins.largest_prefill_s),
        (late_decode, bins.decode_s, bins.largest_decode_s),
    ):
        rows.add(np.arange(count), share, work_s / np.maximum(largest_s, 1e-300))
        rows.add(np.arange(count), late, -1.0)
        rows.close(np.zeros(count))
    rows.add(np.zeros(count, np.int64), late, 1.0)
    rows.close(np.array([max_late]))

    found = linprog(
        cost, A_ub=rows.matrix(columns), b_ub=rows.limits(), bounds=np.stack([low, high], axis=1), method="highs"
    )
    if found.status == INFEASIBLE:
        raise Unservable("even a fluid within the pools' bounds cannot hold the SLO on this trace")
    if not found.success:
        raise RuntimeError(f"the fluid bound was not found: {found.message}")
    held = found.x[replicas] @ width + boot_s * found.x[starts].sum(axis=1)
    return Bound(
        usd=float(found.fun) * (1.0 + spec.objective.overhead_rate),
        replica_hours=float(held.sum()) / 3600.0,
    )


class _Rows:
    """Collects the inequality rows ``A x <= limit`` block by block."""

    def __init__(self) -> None:
        self._row: list[np.ndarray] = []
        self._column: list[np.ndarray] = []
        self._value: list[np.ndarray] = []
        self._limits: list[Floats] = []
        self._closed = 0

    def add(self, row: object, column: np.ndarray, value: object) -> None:
        """Entries of the open block; `row` counts from its first row."""
        at = np.asarray(row, np.int64)
        self._row.append(at + self._closed)
        self._column.append(np.asarray(column, np.int64))
        self._value.append(np.broadcast_to(np.asarray(value, np.float64), at.shape))

    def close(self, limits: Floats) -> None:
        """End the block with its right-hand sides."""
        self._limits.append(np.asarray(limits, np.float64))
        self._closed += len(limits)

    def matrix(self, columns: int) -> coo_array:
        """The matrix, sparse."""
        entries = np.concatenate(self._value)
        place = (np.concatenate(self._row), np.concatenate(self._column))
        return coo_array((entries, place), shape=(self._closed, columns))

    def limits(self) -> Floats:
        """The right-hand sides."""
        return np.concatenate(self._limits)

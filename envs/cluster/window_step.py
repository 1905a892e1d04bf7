"""The window kernel, what the cluster calls: episodes begun, targets handed on, services run and measured.

Semantics are in ``docs/cluster_model.md``; state is in ``envs/cluster/state.py``. Compiled by numba.
This module must not know about policies or dollars: it counts replica-seconds and node-seconds.
"""

from __future__ import annotations

from numba import njit

from envs.cluster.engine_step import settle_progress
from envs.cluster.fleet_step import apply_target, exponential_s, fleet_events, scale_pool
from envs.cluster.gateway_step import dispatch, run_engines, start_boundaries, take_arrivals
from envs.cluster.replica_step import INF, set_weight
from envs.cluster.state import BOOT_EDGES_S, GONE, KERNEL, READY, STARTING

SERVICE_COLUMNS = (
    "queued",
    "oldest_wait_s",
    "arrived",
    "rejected",
    "arrived_prompt_tokens",
    "prefill_tokens",
    "generated_tokens",
    "first_tokens",
    "ttft_ok",
    "finished",
    "tpot_ok",
    "good",
    "good_tokens",
    "finished_prompt_tokens",
    "finished_output_tokens",
    "preemptions",
    "reclaimed",
    "scale_ups",
    "scale_downs",
    "overdue",
)
POOL_COLUMNS = (
    "replicas_target",
    "replicas_starting",
    "replicas_ready",
    "replicas_draining",
    "boot_soon",
    "boot_mid",
    "boot_late",
    "running",
    "waiting",
    "kv_used_tokens",
    "batch_cap",
    "billed_replica_s",
    "billed_node_s",
    "ready_s",
    "busy_s",
    "generated_tokens",
    "reclaims",
)


@njit(**KERNEL)
def reset_service(st, v, origin_s, first_row, end_row, seed, replicas):
    """Start an episode of service `v`: its trace rows, its clock at 0, `replicas` (pools,) ready at once.

    The pool st.rows must hold their parameters already; their accumulators are cleared here.
    """
    service = st.service[v]
    service.now_s = 0.0
    service.origin_s = origin_s
    service.next_arrival = first_row
    service.end_arrival = end_row
    service.queue_head = first_row
    service.queued = 0
    service.returned_head = 0
    service.returned_count = 0
    service.boundaries = 0
    service.live_end = v * st.rows
    service.freed = 0
    service.rng = seed
    service.arrived = 0
    service.rejected = 0
    service.arrived_prompt_tokens = 0
    service.prefill_tokens = 0
    service.generated_tokens = 0
    service.first_tokens = 0
    service.ttft_ok = 0
    service.finished = 0
    service.tpot_ok = 0
    service.good = 0
    service.good_tokens = 0
    service.finished_prompt_tokens = 0
    service.finished_output_tokens = 0
    service.preemptions = 0
    service.reclaimed = 0
    service.scale_ups = 0
    service.scale_downs = 0
    service.max_kv = 0
    for i in range(st.histograms.shape[1]):
        st.histograms[v, i] = 0
    for g in range(v * st.rows, (v + 1) * st.rows):
        st.status[g] = GONE
        st.load[g] = INF
        st.end_s[g] = INF
        st.run_kind[g] = 0
        st.node[g].used = 0
        st.node[g].granted_s = INF
    for i in range(st.pools):
        pool = st.pool[v * st.pools + i]
        if pool.replica_rows == 0:
            continue
        service.max_kv = max(service.max_kv, pool.kv_capacity)
        pool.loads_updated_s = 0.0
        pool.billed_replica_s = 0.0
        pool.billed_node_s = 0.0
        pool.ready_s = 0.0
        pool.busy_s = 0.0
        pool.generated_tokens = 0
        pool.reclaims = 0
        pool.next_storm_s = exponential_s(service, pool.storm_per_s)
        set_weight(st, v * st.pools + i)
        scale_pool(st, v, v * st.pools + i, replicas[i], 0.0, True)
    fleet_events(st, v, 0.0)


@njit(nogil=True, **KERNEL)
def reset_rows(st, services, origin_s, first_row, end_row, seeds, replicas):
    """Start an episode on the listed services (k,): see `reset_service`; replicas is (k, pools), the rest (k,)."""
    for i in range(services.size):
        reset_service(st, services[i], origin_s[i], first_row[i], end_row[i], seeds[i], replicas[i])


@njit(nogil=True, **KERNEL)
def apply_all(st, replicas, batch_cap):
    """Carry out targets (n, pools) for every service; a negative replica count leaves that service alone."""
    for v in range(st.service.size):
        if replicas[v, 0] >= 0:
            apply_target(st, v, replicas[v], batch_cap[v])


@njit(**KERNEL)
def advance(st, v, until_s):
    """Run service `v` up to `until_s`; what is due at `until_s` itself happens at the start of the next call."""
    service = st.service[v]
    while service.live_end > v * st.rows and st.status[service.live_end - 1] == GONE:
        service.live_end -= 1
    while service.now_s < until_s:
        now_s = service.now_s
        if service.next_event_s <= now_s:
            fleet_events(st, v, now_s)
        take_arrivals(st, v, now_s)
        if service.queued > 0:
            dispatch(st, v, now_s)
        start_boundaries(st, v)
        next_s = min(until_s, service.next_event_s)
        if service.next_arrival < service.end_arrival:
            next_s = min(next_s, st.arrival_s[service.next_arrival] - service.origin_s)
        run_engines(st, v, next_s)


@njit(**KERNEL)
def _overdue(st, v):
    """Requests that have no first token and are past the TTFT objective: misses, though not yet finished."""
    service = st.service[v]
    late = 0
    limit_s = service.now_s - service.ttft_slo_s
    for i in range(service.returned_count):
        request = st.returned[v * st.ring + service.returned_head + i]
        late += st.arrival_s[request] - service.origin_s < limit_s
    if service.queued > service.returned_count:
        for request in range(service.queue_head, service.next_arrival):
            if st.arrival_s[request] - service.origin_s >= limit_s:
                break
            late += st.prompt_tokens[request] + st.output_tokens[request] <= service.max_kv
    for g in range(v * st.rows, service.live_end):
        if st.status[g] >= READY:
            replica = st.replica[g]
            for head in (replica.waiting_head, replica.prefill_head):
                k = head
                while k >= 0:
                    slot = st.slot[g * st.slots + k]
                    late += slot.emitted == 0 and slot.arrival_s < limit_s
                    k = slot.next
    return late


@njit(**KERNEL)
def measure(st, v, service_out, pool_out, histograms_out):
    """Write the measurements of service `v` now: rows of SERVICE_COLUMNS, of POOL_COLUMNS per pool, and histograms."""
    service = st.service[v]
    now_s = service.now_s
    oldest_s = now_s
    if service.returned_count > 0:
        oldest_s = st.arrival_s[st.returned[v * st.ring + service.returned_head]] - service.origin_s
    elif service.queued > 0:
        oldest_s = st.arrival_s[service.queue_head] - service.origin_s
    for i in range(st.pools):
        pool = st.pool[v * st.pools + i]
        ready = starting = draining = running = waiting = kv_used = 0
        boot_soon = boot_mid = boot_late = 0
        billed_s = pool.billed_replica_s
        node_s = pool.billed_node_s
        ready_s = pool.ready_s
        busy_s = pool.busy_s
        first = v * st.rows + pool.first_replica
        expected_s = pool.node_s + pool.image_s + pool.weights_s + pool.warmup_s
        for g in range(first, first + pool.replica_rows):
            node = st.node[g]
            if node.used > 0 and node.granted_s < now_s:
                node_s += now_s - node.granted_s
            status = st.status[g]
            if status == GONE:
                continue
            replica = st.replica[g]
            if replica.bill_start_s < now_s:
                billed_s += now_s - replica.bill_start_s
            if status == STARTING:
                starting += 1
                left_s = expected_s - (now_s - replica.requested_s)
                if left_s < BOOT_EDGES_S[0]:
                    boot_soon += 1
                elif left_s < BOOT_EDGES_S[1]:
                    boot_mid += 1
                else:
                    boot_late += 1
                continue
            settle_progress(st, v, g)
            ready_s += now_s - replica.ready_at_s
            busy_s += replica.busy_s
            if status == READY:
                ready += 1
                kv_used += replica.kv_used
            else:
                draining += 1
            running += replica.outstanding - replica.waiting
            waiting += replica.waiting
            if replica.waiting_head >= 0:
                oldest_s = min(oldest_s, st.slot[g * st.slots + replica.waiting_head].arrival_s)
        out = pool_out[:, i]
        out[0] = pool.replicas_target
        out[1] = starting
        out[2] = ready
        out[3] = draining
        out[4] = boot_soon
        out[5] = boot_mid
        out[6] = boot_late
        out[7] = running
        out[8] = waiting
        out[9] = kv_used
        out[10] = pool.batch_cap
        out[11] = billed_s
        out[12] = node_s
        out[13] = ready_s
        out[14] = busy_s
        out[15] = pool.generated_tokens
        out[16] = pool.reclaims
    service_out[0] = service.queued
    service_out[1] = now_s - oldest_s
    service_out[2] = service.arrived
    service_out[3] = service.rejected
    service_out[4] = service.arrived_prompt_tokens
    service_out[5] = service.prefill_tokens
    service_out[6] = service.generated_tokens
    service_out[7] = service.first_tokens
    service_out[8] = service.ttft_ok
    service_out[9] = service.finished
    service_out[10] = service.tpot_ok
    service_out[11] = service.good
    service_out[12] = service.good_tokens
    service_out[13] = service.finished_prompt_tokens
    service_out[14] = service.finished_output_tokens
    service_out[15] = service.preemptions
    service_out[16] = service.reclaimed
    service_out[17] = service.scale_ups
    service_out[18] = service.scale_downs
    service_out[19] = _overdue(st, v)
    for i in range(histograms_out.size):
        histograms_out[i] = st.histograms[v, i]


@njit(nogil=True, **KERNEL)
def run_windows(st, services, read_s, act_s, service_out, pool_out, histograms_out):
    """One control window for each listed service: run to `read_s`, measure, run on to `act_s`.

    Arrays are as wide as the cluster: times (n,), outputs (SERVICE_COLUMNS, n), (POOL_COLUMNS, pools, n) and (bins, n).
    """
    for v in services:
        advance(st, v, read_s[v])
        measure(st, v, service_out[:, v], pool_out[:, :, v], histograms_out[:, v])
        advance(st, v, act_s[v])

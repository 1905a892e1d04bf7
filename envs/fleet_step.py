"""The fleet kernel: starts, nodes, storage bandwidth, draining, reclaims, bills, and the clock that drives the engines.

Semantics are in ``docs/cluster_model.md``; state is in ``envs/state.py``. Compiled by numba.
This module must not know about policies or dollars: it counts replica-seconds and node-seconds.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from envs.engine_step import (
    INF,
    dispatch,
    release,
    reset_replica,
    return_to_gateway,
    run_engines,
    settle_progress,
    start_boundaries,
    take_arrivals,
    update_load,
)
from envs.state import (
    BOOT_EDGES_S,
    DRAINING,
    GONE,
    KERNEL,
    READY,
    RECLAIMED,
    STAGE_IMAGE,
    STAGE_NODE,
    STAGE_WARMUP,
    STAGE_WEIGHTS,
    STARTING,
)

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
def _uniform(service):
    """Next uniform number in (0, 1) of the service's own generator (splitmix64)."""
    service.rng += np.uint64(0x9E3779B97F4A7C15)
    z = service.rng
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return (np.float64(z >> np.uint64(11)) + 0.5) * (1.0 / 9007199254740992.0)


@njit(**KERNEL)
def _exponential_s(service, rate_per_s):
    return -math.log(_uniform(service)) / rate_per_s if rate_per_s > 0.0 else INF


@njit(**KERNEL)
def _stage_s(service, mean_s, cv):
    """Duration of a stage: lognormal with the given mean and coefficient of variation."""
    if cv <= 0.0 or mean_s <= 0.0:
        return mean_s
    sigma = math.sqrt(math.log(1.0 + cv * cv))
    normal = math.sqrt(-2.0 * math.log(_uniform(service))) * math.cos(2.0 * math.pi * _uniform(service))
    return mean_s * math.exp(sigma * normal - 0.5 * sigma * sigma)


@njit(**KERNEL)
def _become_ready(st, v, g, now_s):
    replica = st.replica[g]
    replica.ready_at_s = now_s
    st.status[g] = READY
    st.service[v].freed = 1
    update_load(st, g)


@njit(**KERNEL)
def _place(st, v, g, now_s, granted_at_once):
    """Give replica `g` a slot on a node of its pool, asking for a new node when none has room."""
    service = st.service[v]
    replica = st.replica[g]
    pool = st.pool[replica.pool]
    first = v * st.rows + pool.first_replica
    best = -1
    for row in range(first, first + pool.replica_rows):
        node = st.node[row]
        if 0 < node.used < pool.slots_per_node and (best < 0 or node.granted_s < st.node[best].granted_s):
            best = row
    if best < 0:
        for row in range(first, first + pool.replica_rows):
            if st.node[row].used == 0:
                best = row
                break
        wait_s = 0.0 if granted_at_once else _stage_s(service, pool.node_s, pool.stage_cv)
        st.node[best].granted_s = now_s + wait_s
        st.node[best].last_leave_s = now_s
    st.node[best].used += 1
    replica.node = best
    replica.bill_start_s = max(now_s, st.node[best].granted_s)


@njit(**KERNEL)
def _request_replica(st, v, p, now_s, ready_at_once):
    """Start one replica in pool row `p`; False when every row of the pool is taken."""
    service = st.service[v]
    pool = st.pool[p]
    first = v * st.rows + pool.first_replica
    for g in range(first, first + pool.replica_rows):
        if st.status[g] == GONE:
            reset_replica(st, g)
            service.live_end = max(service.live_end, g + 1)
            replica = st.replica[g]
            replica.pool = p
            replica.requested_s = now_s
            replica.ready_at_s = INF
            _place(st, v, g, now_s, ready_at_once)
            replica.reclaim_s = replica.bill_start_s + _exponential_s(service, pool.reclaim_per_s)
            if ready_at_once:
                _become_ready(st, v, g, now_s)
            else:
                st.status[g] = STARTING
                replica.stage = STAGE_NODE
                replica.stage_end_s = replica.bill_start_s
                replica.image_s = _stage_s(service, pool.image_s, pool.stage_cv)
                replica.load_left_s = _stage_s(service, pool.weights_s, pool.stage_cv)
                replica.warmup_s = _stage_s(service, pool.warmup_s, pool.stage_cv)
            return True
    return False


@njit(**KERNEL)
def _drain_one(st, v, p, now_s):
    """Drain the least loaded ready replica of pool row `p`; ties to the emptiest node, then the highest index."""
    pool = st.pool[p]
    first = v * st.rows + pool.first_replica
    best = -1
    for g in range(first, first + pool.replica_rows):
        if st.status[g] == READY:
            if best < 0:
                best = g
                continue
            here = st.replica[g]
            other = st.replica[best]
            if here.outstanding < other.outstanding or (
                here.outstanding == other.outstanding and st.node[here.node].used <= st.node[other.node].used
            ):
                best = g
    st.status[best] = DRAINING
    update_load(st, best)
    if st.replica[best].outstanding == 0:
        if st.run_kind[best] != 0:
            st.service[v].boundaries -= 1
        release(st, best, now_s)


@njit(**KERNEL)
def scale_pool(st, v, p, target, now_s, ready_at_once):
    """Bring pool row `p` towards `target` replicas (starting plus ready); absolute, so repeating it is harmless."""
    pool = st.pool[p]
    pool.replicas_target = target
    first = v * st.rows + pool.first_replica
    last = first + pool.replica_rows
    wanted = 0
    for g in range(first, last):
        wanted += st.status[g] == STARTING or st.status[g] == READY
    while wanted < target:
        best = -1
        for g in range(first, last):
            if st.status[g] == DRAINING and (best < 0 or st.replica[g].outstanding > st.replica[best].outstanding):
                best = g
        if best >= 0:
            st.status[best] = READY
            st.service[v].freed = 1
            update_load(st, best)
        elif not _request_replica(st, v, p, now_s, ready_at_once):
            break
        wanted += 1
    while wanted > target:
        latest = -1
        for g in range(first, last):
            if st.status[g] == STARTING and (latest < 0 or st.replica[g].requested_s >= st.replica[latest].requested_s):
                latest = g
        if latest >= 0:
            release(st, latest, now_s)
        else:
            _drain_one(st, v, p, now_s)
        wanted -= 1


@njit(**KERNEL)
def _credit_loads(st, v, p, now_s):
    """Progress of the weight loads of pool row `p` since the last credit; returns the current rate of each."""
    pool = st.pool[p]
    first = v * st.rows + pool.first_replica
    loading = 0
    for g in range(first, first + pool.replica_rows):
        loading += st.status[g] == STARTING and st.replica[g].stage == STAGE_WEIGHTS
    rate = 1.0
    if loading > 0:
        rate = min(1.0, pool.full_speed_loads / loading)
        done_s = (now_s - pool.loads_updated_s) * rate
        for g in range(first, first + pool.replica_rows):
            if st.status[g] == STARTING and st.replica[g].stage == STAGE_WEIGHTS:
                st.replica[g].load_left_s -= done_s
    pool.loads_updated_s = now_s
    return rate


@njit(**KERNEL)
def _advance_stages(st, v, g, now_s):
    """Move a starting replica through every stage that is over by now."""
    replica = st.replica[g]
    if replica.stage == STAGE_NODE and replica.stage_end_s <= now_s:
        replica.stage = STAGE_IMAGE
        replica.stage_end_s = now_s + replica.image_s
    if replica.stage == STAGE_IMAGE and replica.stage_end_s <= now_s:
        replica.stage = STAGE_WEIGHTS
    if replica.stage == STAGE_WEIGHTS and replica.load_left_s <= 1e-9:
        replica.stage = STAGE_WARMUP
        replica.stage_end_s = now_s + replica.warmup_s
    if replica.stage == STAGE_WARMUP and replica.stage_end_s <= now_s:
        _become_ready(st, v, g, now_s)


@njit(**KERNEL)
def _give_notice(st, v, g, now_s):
    """A spot replica is told that it will be taken away."""
    replica = st.replica[g]
    pool = st.pool[replica.pool]
    pool.reclaims += 1
    if st.status[g] == STARTING or replica.outstanding == 0:
        if st.run_kind[g] != 0:
            st.service[v].boundaries -= 1
        release(st, g, now_s)
    else:
        st.status[g] = RECLAIMED
        replica.reclaim_s = now_s + pool.notice_s
        update_load(st, g)


@njit(**KERNEL)
def fleet_events(st, v, now_s):
    """Process everything due in the fleet of service `v` and find the time of its next event."""
    service = st.service[v]
    next_s = INF
    for p in range(v * st.pools, (v + 1) * st.pools):
        pool = st.pool[p]
        first = v * st.rows + pool.first_replica
        last = first + pool.replica_rows
        _credit_loads(st, v, p, now_s)
        storm = pool.next_storm_s <= now_s
        lost = False
        for g in range(first, last):
            status = st.status[g]
            if status == GONE:
                continue
            if status == RECLAIMED:
                if st.replica[g].reclaim_s <= now_s:
                    return_to_gateway(st, v, g)
                    release(st, g, now_s)
                    lost = True  # its row is free: a replacement may have had to wait for it
                continue
            granted = st.replica[g].bill_start_s <= now_s
            if st.replica[g].reclaim_s <= now_s or (storm and granted and _uniform(service) < pool.storm_share):
                lost = True
                _give_notice(st, v, g, now_s)
            elif status == STARTING:
                _advance_stages(st, v, g, now_s)
        if storm:
            pool.next_storm_s = now_s + _exponential_s(service, pool.storm_per_s)
        if lost:
            # The orchestrator replaces a lost replica by itself: the target stands.
            scale_pool(st, v, p, pool.replicas_target, now_s, False)
            for g in range(first, last):
                if st.status[g] == STARTING:
                    _advance_stages(st, v, g, now_s)
        rate = _credit_loads(st, v, p, now_s)
        next_s = min(next_s, pool.next_storm_s)
        for g in range(first, last):
            status = st.status[g]
            if status == GONE:
                continue
            replica = st.replica[g]
            next_s = min(next_s, replica.reclaim_s)
            if status == STARTING:
                if replica.stage == STAGE_WEIGHTS:
                    next_s = min(next_s, now_s + replica.load_left_s / rate)
                else:
                    next_s = min(next_s, replica.stage_end_s)
    service.next_event_s = next_s


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
def apply_target(st, v, replicas, batch_cap):
    """Carry out an absolute target for service `v`: arrays (pools,) of replica counts and batch caps."""
    service = st.service[v]
    changed = False
    for i in range(st.pools):
        pool = st.pool[v * st.pools + i]
        if pool.replica_rows == 0 or replicas[i] < 0:
            continue
        cap = max(1, min(batch_cap[i], pool.max_num_seqs))
        if cap != pool.batch_cap:
            pool.batch_cap = cap
            set_weight(st, v * st.pools + i)
            service.freed = 1
            for g in range(v * st.rows + pool.first_replica, v * st.rows + pool.first_replica + pool.replica_rows):
                if st.status[g] != GONE:
                    update_load(st, g)
        service.scale_ups += replicas[i] > pool.replicas_target
        service.scale_downs += replicas[i] < pool.replicas_target
        if replicas[i] != pool.replicas_target or pool.reclaims > 0:
            _credit_loads(st, v, v * st.pools + i, service.now_s)
            scale_pool(st, v, v * st.pools + i, replicas[i], service.now_s, False)
            changed = True
    if changed:
        fleet_events(st, v, service.now_s)


@njit(**KERNEL)
def set_weight(st, p):
    """Dispatch weight of a replica of pool row `p`: its nominal decode rate at the batch cap (context 1,000)."""
    pool = st.pool[p]
    cap = pool.batch_cap
    pool.inv_weight = (pool.a + pool.c * cap + pool.d * cap * 1000.0) / cap


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
def apply_all(st, replicas, batch_cap):
    """Carry out targets (n, pools) for every service; a negative replica count leaves that service alone."""
    for v in range(st.service.size):
        if replicas[v, 0] >= 0:
            apply_target(st, v, replicas[v], batch_cap[v])


@njit(nogil=True, **KERNEL)
def run_windows(st, services, read_s, act_s, service_out, pool_out, histograms_out):
    """One control window for each listed service: run to `read_s`, measure, run on to `act_s`.

    Arrays are as wide as the cluster: times (n,), outputs (SERVICE_COLUMNS, n), (POOL_COLUMNS, pools, n) and (bins, n).
    """
    for v in services:
        advance(st, v, read_s[v])
        measure(st, v, service_out[:, v], pool_out[:, :, v], histograms_out[:, v])
        advance(st, v, act_s[v])


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
        pool.next_storm_s = _exponential_s(service, pool.storm_per_s)
        set_weight(st, v * st.pools + i)
        scale_pool(st, v, v * st.pools + i, replicas[i], 0.0, True)
    fleet_events(st, v, 0.0)


@njit(nogil=True, **KERNEL)
def reset_rows(st, services, origin_s, first_row, end_row, seeds, replicas):
    """Start an episode on the listed services (k,): see `reset_service`; replicas is (k, pools), the rest (k,)."""
    for i in range(services.size):
        reset_service(st, services[i], origin_s[i], first_row[i], end_row[i], seeds[i], replicas[i])

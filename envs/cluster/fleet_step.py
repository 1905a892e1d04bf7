"""The fleet kernel: starts, nodes, storage bandwidth, draining, spot reclaims, and targets carried out.

Semantics are in ``docs/cluster_model.md``; state is in ``envs/cluster/state.py``. Compiled by numba.
This module must not know how requests are served, nor about control windows, policies or dollars.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from envs.cluster.gateway_step import return_to_gateway
from envs.cluster.replica_step import INF, release, reset_replica, set_weight, update_load
from envs.cluster.state import (
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
def exponential_s(service, rate_per_s):
    """Seconds until the next event of a Poisson process; never at a rate of 0."""
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
            replica.reclaim_s = replica.bill_start_s + exponential_s(service, pool.reclaim_per_s)
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
            pool.next_storm_s = now_s + exponential_s(service, pool.storm_per_s)
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

"""The gateway kernel: a service's queue, its dispatch to replicas, and the replicas' work between two events.

Semantics are in ``docs/cluster_model.md``; state is in ``envs/cluster/state.py``. Compiled by numba.
This module must not know how iterations are composed or timed, nor about starts, nodes or policies.
"""

from __future__ import annotations

from numba import njit

from envs.cluster.engine_step import SLOT_MASK, assign, end_run, heap_pop, heap_push, settle_progress, start_run
from envs.cluster.replica_step import INF
from envs.cluster.state import AT_BOUNDARY, GONE, HOT, IDLE, KERNEL


@njit(**HOT)
def take_arrivals(st, v, now_s):
    """Requests that arrive at `now_s` join the gateway queue; one that no pool can ever hold is rejected."""
    service = st.service[v]
    while service.next_arrival < service.end_arrival:
        request = service.next_arrival
        if st.arrival_s[request] - service.origin_s > now_s:
            return
        service.arrived += 1
        service.arrived_prompt_tokens += st.prompt_tokens[request]
        service.next_arrival += 1
        if st.prompt_tokens[request] + st.output_tokens[request] > service.max_kv:
            service.rejected += 1
            if service.queued == service.returned_count:
                service.queue_head = service.next_arrival
        else:
            if service.queued == service.returned_count:
                service.queue_head = request
            service.queued += 1


@njit(**KERNEL)
def _pick(st, v, needed_kv):
    """Replica of service `v` with the lowest load among those whose KV cache can ever hold the request, or -1."""
    best = -1
    lowest_load = INF
    for g in range(v * st.rows, st.service[v].live_end):
        if st.load[g] < lowest_load and st.pool[st.replica[g].pool].kv_capacity >= needed_kv:
            lowest_load = st.load[g]
            best = g
    return best


@njit(**HOT)
def dispatch(st, v, now_s):
    """Send queued requests to replicas while some ready replica has room under its batch cap."""
    service = st.service[v]
    service.freed = 0
    while service.queued > 0:
        lowest_load = INF
        best = -1
        for g in range(v * st.rows, st.service[v].live_end):
            if st.load[g] < lowest_load:
                lowest_load = st.load[g]
                best = g
        if best < 0:
            return
        returned = service.returned_count > 0
        if returned:
            request = st.returned[v * st.ring + service.returned_head]
        else:
            request = service.queue_head
            while st.prompt_tokens[request] + st.output_tokens[request] > service.max_kv:
                request += 1  # rejected when it arrived
            service.queue_head = request
        needed = st.prompt_tokens[request] + st.output_tokens[request]
        if needed > st.pool[st.replica[best].pool].kv_capacity:
            best = _pick(st, v, needed)
            if best < 0:
                return  # first in, first out: the head waits for a replica that can hold it
        if returned:
            service.returned_head += 1
            service.returned_count -= 1
        else:
            service.queue_head += 1
        service.queued -= 1
        assign(st, v, best, request, now_s)


@njit(**KERNEL)
def return_to_gateway(st, v, g):
    """Take every request from replica `g` and put it at the head of the gateway queue, in arrival order."""
    service = st.service[v]
    replica = st.replica[g]
    base = g * st.slots
    ring_base = v * st.ring
    settle_progress(st, v, g)
    # Rows are in arrival order. The replica's own heap, of no other use now, sorts them.
    for i in range(replica.decoding):
        st.heap[base + i] = st.slot[base + (st.heap[base + i] & SLOT_MASK)].request
    count = replica.decoding
    for head in (replica.prefill_head, replica.waiting_head):
        k = head
        while k >= 0:
            st.heap[base + count] = st.slot[base + k].request
            count += 1
            k = st.slot[base + k].next
    for size in range(count):
        heap_push(st.heap, base, size, st.heap[base + size])
    # Move the ring's rows to its start, then up by `count` to make room, and merge.
    waiting = service.returned_count
    for i in range(waiting):
        st.returned[ring_base + i] = st.returned[ring_base + service.returned_head + i]
    for i in range(waiting - 1, -1, -1):
        st.returned[ring_base + count + i] = st.returned[ring_base + i]
    old = count
    for i in range(count + waiting):
        left = count + waiting - old
        taken = i - (old - count)
        if taken == count or (left > 0 and st.returned[ring_base + old] < st.heap[base]):
            st.returned[ring_base + i] = st.returned[ring_base + old]
            old += 1
        else:
            st.returned[ring_base + i] = heap_pop(st.heap, base, count - taken)
    service.returned_head = 0
    service.returned_count += count
    service.queued += count
    service.reclaimed += count
    service.freed = 1
    if st.run_kind[g] == AT_BOUNDARY:
        service.boundaries -= 1
    elif st.run_kind[g] != IDLE:
        replica.busy_s += service.now_s - replica.run_start_s
    replica.outstanding = 0


@njit(**HOT)
def start_boundaries(st, v):
    """Every replica at a boundary starts its next run."""
    if st.service[v].boundaries > 0:
        for g in range(v * st.rows, st.service[v].live_end):
            if st.run_kind[g] == AT_BOUNDARY:
                start_run(st, v, g)


@njit(**HOT)
def _run_alone(st, v, g, until_s):
    """Run replica `g` up to `until_s`; with an empty gateway queue replicas don't interact."""
    while st.end_s[g] <= until_s:
        if st.run_kind[g] != AT_BOUNDARY:
            end_run(st, v, g)
            if st.status[g] == GONE:
                return
        if st.end_s[g] >= until_s:
            return  # stands at a boundary at `until_s` exactly: requests that arrive then may still join
        start_run(st, v, g)


@njit(**HOT)
def _run_queued(st, v, until_s):
    """Run all replicas in time order while requests wait at the gateway, up to `until_s` at most."""
    service = st.service[v]
    while service.queued > 0:
        now_s = INF
        for g in range(v * st.rows, st.service[v].live_end):
            if st.end_s[g] < now_s:
                now_s = st.end_s[g]
        if now_s > until_s:
            return
        for g in range(v * st.rows, st.service[v].live_end):
            if st.end_s[g] == now_s and st.run_kind[g] != AT_BOUNDARY:
                end_run(st, v, g)
        if now_s == until_s:
            return
        if service.freed:
            dispatch(st, v, now_s)
        start_boundaries(st, v)


@njit(**HOT)
def run_engines(st, v, until_s):
    """Let every replica of service `v` work up to `until_s`, with no arrival and no fleet event in between."""
    service = st.service[v]
    if service.queued > 0:
        _run_queued(st, v, until_s)
    if service.queued == 0:
        for g in range(v * st.rows, st.service[v].live_end):
            if st.end_s[g] <= until_s:
                _run_alone(st, v, g, until_s)
    service.now_s = until_s

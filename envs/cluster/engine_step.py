"""The engine kernel: exact continuous batching of one replica, macro-stepped between events.

Semantics are in ``docs/cluster_model.md``; state is in ``envs/cluster/state.py``. Compiled by numba.
This module must not know about other replicas, the gateway's queue, starts, nodes or policies.
"""

from __future__ import annotations

import math

from numba import njit

from envs.cluster.replica_step import INF, release, update_load
from envs.cluster.state import AT_BOUNDARY, DECODING, DRAINING, HOT, IDLE, KERNEL, MIXED, SLOT_BITS

SLOT_MASK = (1 << SLOT_BITS) - 1
MIN_PREFILL_BUDGET = 16  # tokens; a full decode batch cannot starve prefills


@njit(**HOT)
def heap_push(heap, base, size, key):
    """Insert `key` into the min-heap of `size` entries at `base`."""
    i = size
    while i > 0:
        parent = (i - 1) >> 1
        above = heap[base + parent]
        if above <= key:
            break
        heap[base + i] = above
        i = parent
    heap[base + i] = key


@njit(**HOT)
def heap_pop(heap, base, size):
    """Remove and return the smallest key of the min-heap of `size` entries at `base`."""
    top = heap[base]
    last = heap[base + size - 1]
    size -= 1
    i = 0
    while True:
        child = 2 * i + 1
        if child >= size:
            break
        if child + 1 < size and heap[base + child + 1] < heap[base + child]:
            child += 1
        if heap[base + child] >= last:
            break
        heap[base + i] = heap[base + child]
        i = child
    heap[base + i] = last
    return top


@njit(**HOT)
def decode_run_s(first_s, growth_s, steps):
    """Seconds of `steps` decode iterations: the first takes `first_s`, each later one `growth_s` more than the last."""
    return steps * first_s + growth_s * (0.5 * steps * (steps - 1))


@njit(**HOT)
def steps_to_reach(first_s, growth_s, span_s):
    """Smallest number of decode iterations (at least 1) that lasts `span_s` or longer."""
    linear = first_s - 0.5 * growth_s
    guess = 2.0 * span_s / (linear + math.sqrt(linear * linear + 2.0 * growth_s * span_s))
    steps = max(1, int(math.ceil(guess)))  # noqa: RUF046 - numba's ceil gives a float
    # The root is rounded: settle on the exact integer.
    while decode_run_s(first_s, growth_s, steps) < span_s:
        steps += 1
    while steps > 1 and decode_run_s(first_s, growth_s, steps - 1) >= span_s:
        steps -= 1
    return steps


@njit(**HOT)
def _free_slot(st, g, k):
    replica = st.replica[g]
    st.free_slots[g * st.slots + replica.free_count] = k
    replica.free_count += 1
    replica.outstanding -= 1


@njit(**HOT)
def _count(histograms, v, first_bin, edges_s, value_s):
    """Add one to service `v`'s bin of `value_s`; an edge belongs to the bin below it."""
    bin_ = 0
    while bin_ < edges_s.size and value_s > edges_s[bin_]:
        bin_ += 1
    histograms[v, first_bin + bin_] += 1


@njit(**HOT)
def _finish(st, v, g, k, now_s):
    """Request in slot `k` has emitted its last token at `now_s`."""
    service = st.service[v]
    replica = st.replica[g]
    slot = st.slot[g * st.slots + k]
    output = slot.output
    service.finished += 1
    service.finished_prompt_tokens += slot.prompt
    service.finished_output_tokens += output
    in_time = slot.first_s - slot.arrival_s <= service.ttft_slo_s
    steady = output <= 1 or now_s - slot.first_s <= service.tpot_slo_s * (output - 1)
    service.tpot_ok += steady
    if st.histograms.size > 0:
        tpot_s = (now_s - slot.first_s) / max(output - 1, 1)
        _count(st.histograms, v, st.ttft_edges_s.size + 1, st.tpot_edges_s, tpot_s)
    if in_time and steady:
        service.good += 1
        service.good_tokens += slot.prompt + output
    if st.finish_s.size > 0:
        st.first_token_s[slot.request] = slot.first_s
        st.finish_s[slot.request] = now_s
        st.served_by[slot.request] = replica.pool % st.pools
    service.freed = 1
    _free_slot(st, g, k)


@njit(**HOT)
def _emit_after_prefill(st, v, g, k, now_s):
    """The prefill of slot `k` is complete: emit a token, then leave or start to decode."""
    service = st.service[v]
    replica = st.replica[g]
    slot = st.slot[g * st.slots + k]
    slot.emitted += 1
    service.generated_tokens += 1
    st.pool[replica.pool].generated_tokens += 1
    if slot.emitted == 1:
        slot.first_s = now_s
        service.first_tokens += 1
        service.ttft_ok += now_s - slot.arrival_s <= service.ttft_slo_s
        if st.histograms.size > 0:
            _count(st.histograms, v, 0, st.ttft_edges_s, now_s - slot.arrival_s)
    if slot.emitted >= slot.output:
        replica.kv_used -= slot.target
        _finish(st, v, g, k, now_s)
    else:
        key = (replica.iteration + slot.output - slot.emitted) << SLOT_BITS | k
        heap_push(st.heap, g * st.slots, replica.decoding, key)
        replica.decoding += 1
        replica.kv_decode += slot.target


@njit(**HOT)
def end_run(st, v, g):
    """The run of replica `g` ends at `end_s[g]`: its tokens take effect and it stands at a boundary."""
    service = st.service[v]
    replica = st.replica[g]
    base = g * st.slots
    now_s = st.end_s[g]
    kind = st.run_kind[g]
    outstanding_before = replica.outstanding
    replica.busy_s += now_s - replica.run_start_s
    if replica.decoding > 0:
        steps = replica.steps
        tokens = replica.decoding * steps
        replica.iteration += steps
        replica.kv_used += tokens
        replica.kv_decode += tokens
        service.generated_tokens += tokens
        st.pool[replica.pool].generated_tokens += tokens
        while replica.decoding > 0 and st.heap[base] >> SLOT_BITS == replica.iteration:
            k = heap_pop(st.heap, base, replica.decoding) & SLOT_MASK
            replica.decoding -= 1
            slot = st.slot[base + k]
            context = slot.prompt + slot.output - 1
            replica.kv_used -= context
            replica.kv_decode -= context
            _finish(st, v, g, k, now_s)
    if kind == MIXED:
        # Chunks were given in order, so the completed prefills are a prefix of the list.
        k = replica.prefill_head
        while k >= 0:
            slot = st.slot[base + k]
            if slot.chunk == 0:
                break
            slot.prefilled += slot.chunk
            service.prefill_tokens += slot.chunk
            slot.chunk = 0
            if slot.prefilled < slot.target:
                break
            after = slot.next
            replica.prefill_head = after
            if after < 0:
                replica.prefill_tail = -1
            _emit_after_prefill(st, v, g, k, now_s)
            k = after
    st.run_kind[g] = AT_BOUNDARY
    service.boundaries += 1
    if replica.outstanding < outstanding_before:
        if replica.outstanding == 0 and st.status[g] >= DRAINING:
            service.boundaries -= 1
            release(st, g, now_s)
        else:
            update_load(st, g)


@njit(**KERNEL)
def _preempt_latest(st, v, g):
    """Preempt the latest-admitted sequence of replica `g` (recompute): back to the head of its waiting queue."""
    replica = st.replica[g]
    base = g * st.slots
    if replica.prefill_head >= 0:
        # Prefills complete in admission order, so every prefilling sequence is later than every decoding one.
        k = replica.prefill_tail
        if replica.prefill_head == k:
            replica.prefill_head = -1
            replica.prefill_tail = -1
        else:
            before = replica.prefill_head
            while st.slot[base + before].next != k:
                before = st.slot[base + before].next
            st.slot[base + before].next = -1
            replica.prefill_tail = before
        slot = st.slot[base + k]
        replica.kv_used -= slot.target
        slot.chunk = 0
    else:
        latest = 0
        for i in range(1, replica.decoding):
            order = st.slot[base + (st.heap[base + i] & SLOT_MASK)].order
            if order > st.slot[base + (st.heap[base + latest] & SLOT_MASK)].order:
                latest = i
        key = st.heap[base + latest]
        k = key & SLOT_MASK
        slot = st.slot[base + k]
        slot.emitted = slot.output - ((key >> SLOT_BITS) - replica.iteration)
        slot.hit = 0
        context = slot.prompt + slot.emitted - 1
        replica.kv_used -= context
        replica.kv_decode -= context
        # Remove from the heap: refill the hole with the last key by rebuilding the part above it.
        replica.decoding -= 1
        last = st.heap[base + replica.decoding]
        if latest < replica.decoding:
            st.heap[base + latest] = last
            for size in range(replica.decoding):
                heap_push(st.heap, base, size, st.heap[base + size])
    slot = st.slot[base + k]
    slot.next = replica.waiting_head
    replica.waiting_head = k
    if replica.waiting_tail < 0:
        replica.waiting_tail = k
    replica.waiting += 1
    st.service[v].preemptions += 1


@njit(**HOT)
def start_run(st, v, g):
    """Replica `g` stands at a boundary: preempt, admit, compose the next iteration or macro-run."""
    replica = st.replica[g]
    pool = st.pool[replica.pool]
    base = g * st.slots
    now_s = st.end_s[g]
    st.service[v].boundaries -= 1
    free = pool.kv_capacity - replica.kv_used
    while replica.decoding > free:
        _preempt_latest(st, v, g)
        free = pool.kv_capacity - replica.kv_used
    free -= replica.decoding
    while replica.waiting_head >= 0:
        k = replica.waiting_head
        slot = st.slot[base + k]
        context = slot.prompt + slot.emitted
        if context + 1 > free:
            break
        free -= context
        replica.kv_used += context
        replica.waiting_head = slot.next
        replica.waiting -= 1
        if slot.next < 0:
            replica.waiting_tail = -1
        slot.target = context
        slot.prefilled = min(slot.hit, context - 1)
        slot.chunk = 0
        slot.order = replica.admissions
        replica.admissions += 1
        slot.next = -1
        if replica.prefill_tail < 0:
            replica.prefill_head = k
        else:
            st.slot[base + replica.prefill_tail].next = k
        replica.prefill_tail = k

    replica.run_start_s = now_s
    decoding = replica.decoding
    if replica.prefill_head >= 0:
        budget = max(MIN_PREFILL_BUDGET, pool.token_budget - decoding)
        seconds = pool.a + pool.c * decoding + pool.d * replica.kv_decode
        k = replica.prefill_head
        while k >= 0 and budget > 0:
            slot = st.slot[base + k]
            chunk = min(slot.target - slot.prefilled, budget)
            budget -= chunk
            slot.chunk = chunk
            seconds += chunk * (pool.b + pool.e * (slot.prefilled + 0.5 * chunk))
            k = slot.next
        replica.steps = 1
        st.run_kind[g] = MIXED
        st.end_s[g] = now_s + seconds
    elif decoding > 0:
        steps = (st.heap[base] >> SLOT_BITS) - replica.iteration
        until_full = (pool.kv_capacity - replica.kv_used) // decoding
        steps = min(steps, until_full)
        replica.steps = steps
        first_s = pool.a + pool.c * decoding + pool.d * replica.kv_decode
        st.run_kind[g] = DECODING
        st.end_s[g] = now_s + decode_run_s(first_s, pool.d * decoding, steps)
    else:
        st.run_kind[g] = IDLE
        st.end_s[g] = INF


@njit(**HOT)
def _cut_run(st, g, now_s):
    """A request joined replica `g` in a decode run: end the run at the first boundary at or after `now_s`."""
    replica = st.replica[g]
    pool = st.pool[replica.pool]
    first_s = pool.a + pool.c * replica.decoding + pool.d * replica.kv_decode
    growth_s = pool.d * replica.decoding
    span_s = now_s - replica.run_start_s
    # Only a measurement moves the start of a run up to now: then this very instant is a boundary.
    steps = steps_to_reach(first_s, growth_s, span_s) if span_s > 0.0 else 0
    if steps < replica.steps:
        replica.steps = steps
        st.end_s[g] = replica.run_start_s + decode_run_s(first_s, growth_s, steps)


@njit(**HOT)
def assign(st, v, g, request, now_s):
    """Hand trace row `request` to replica `g`."""
    service = st.service[v]
    replica = st.replica[g]
    replica.free_count -= 1
    k = st.free_slots[g * st.slots + replica.free_count]
    slot = st.slot[g * st.slots + k]
    slot.request = request
    slot.arrival_s = st.arrival_s[request] - service.origin_s
    slot.first_s = INF
    slot.prompt = st.prompt_tokens[request]
    slot.output = st.output_tokens[request]
    slot.hit = st.prefix_hit_tokens[request]
    slot.emitted = 0
    slot.prefilled = 0
    slot.chunk = 0
    slot.next = -1
    blocked = replica.waiting_head >= 0
    if blocked:
        st.slot[g * st.slots + replica.waiting_tail].next = k
    else:
        replica.waiting_head = k
    replica.waiting_tail = k
    replica.waiting += 1
    replica.outstanding += 1
    update_load(st, g)
    kind = st.run_kind[g]
    if kind == IDLE:
        st.run_kind[g] = AT_BOUNDARY
        st.end_s[g] = now_s
        service.boundaries += 1
    elif kind == DECODING and not blocked:
        # Behind a blocked head nobody is admitted before a completion, which ends the run anyway.
        _cut_run(st, g, now_s)
        if st.end_s[g] <= now_s:
            end_run(st, v, g)


@njit(**HOT)
def settle_progress(st, v, g):
    """Credit the iterations of a decode run that are complete by now, so that measurements are exact."""
    service = st.service[v]
    replica = st.replica[g]
    if st.run_kind[g] != DECODING or service.now_s <= replica.run_start_s:
        return
    pool = st.pool[replica.pool]
    first_s = pool.a + pool.c * replica.decoding + pool.d * replica.kv_decode
    growth_s = pool.d * replica.decoding
    span_s = service.now_s - replica.run_start_s
    done = min(steps_to_reach(first_s, growth_s, span_s), replica.steps)
    if decode_run_s(first_s, growth_s, done) > span_s:
        done -= 1
    if done <= 0 or done >= replica.steps:
        return
    elapsed_s = decode_run_s(first_s, growth_s, done)
    tokens = replica.decoding * done
    replica.run_start_s += elapsed_s
    replica.busy_s += elapsed_s
    replica.steps -= done
    replica.iteration += done
    replica.kv_used += tokens
    replica.kv_decode += tokens
    service.generated_tokens += tokens
    pool.generated_tokens += tokens

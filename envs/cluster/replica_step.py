"""The replica kernel: a row emptied for a new replica, the load that dispatch compares, the bill of one that leaves.

Semantics are in ``docs/cluster_model.md``; state is in ``envs/cluster/state.py``. Compiled by numba.
This module must not know what an engine does with its requests, nor why a replica comes or goes.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from envs.cluster.state import GONE, HOT, IDLE, KERNEL, READY

INF = np.inf


@njit(**KERNEL)
def reset_replica(st, g):
    """Empty replica row `g` before it is given to a new replica."""
    replica = st.replica[g]
    replica.iteration = 0
    replica.decoding = 0
    replica.kv_decode = 0
    replica.kv_used = 0
    replica.outstanding = 0
    replica.admissions = 0
    replica.waiting_head = -1
    replica.waiting_tail = -1
    replica.waiting = 0
    replica.prefill_head = -1
    replica.prefill_tail = -1
    replica.busy_s = 0.0
    replica.free_count = st.slots
    for k in range(st.slots):
        st.free_slots[g * st.slots + k] = st.slots - 1 - k
    st.end_s[g] = INF
    st.load[g] = INF
    st.run_kind[g] = IDLE


@njit(**KERNEL)
def set_weight(st, p):
    """Dispatch weight of a replica of pool row `p`: its nominal decode rate at the batch cap (context 1,000)."""
    pool = st.pool[p]
    cap = pool.batch_cap
    pool.inv_weight = (pool.a + pool.c * cap + pool.d * cap * 1000.0) / cap


@njit(**HOT)
def update_load(st, g):
    """Refresh the dispatch key of replica `g`."""
    replica = st.replica[g]
    pool = st.pool[replica.pool]
    if st.status[g] == READY and replica.outstanding < pool.batch_cap:
        st.load[g] = (replica.outstanding + 1) * pool.inv_weight
    else:
        st.load[g] = INF


@njit(**KERNEL)
def release(st, g, now_s):
    """Remove replica `g`, settle its bill and its node's."""
    replica = st.replica[g]
    pool = st.pool[replica.pool]
    if replica.bill_start_s < now_s:
        pool.billed_replica_s += now_s - replica.bill_start_s
    if replica.ready_at_s < now_s:
        pool.ready_s += now_s - replica.ready_at_s
    pool.busy_s += replica.busy_s
    node = st.node[replica.node]
    node.used -= 1
    node.last_leave_s = max(node.last_leave_s, now_s)
    if node.used == 0:
        if node.granted_s < node.last_leave_s:
            pool.billed_node_s += node.last_leave_s - node.granted_s
        node.granted_s = INF
    st.status[g] = GONE
    st.load[g] = INF
    st.end_s[g] = INF
    st.run_kind[g] = IDLE

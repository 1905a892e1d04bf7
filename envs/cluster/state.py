"""Memory layout of the simulated cluster: the arrays that the compiled kernels read and write.

Everything is flat and global: service ``v`` owns pools ``v*P .. v*P+P-1``, replica rows ``v*R .. v*R+R-1``, and replica
``g`` owns request slots ``g*S .. g*S+S-1``. Records keep what is used together on one cache line; the few columns that
are scanned for every request (`end_s`, `load`) are separate arrays.
This module must not know how the state evolves.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from envs.cluster import kernel_cache  # noqa: F401 - says where numba caches before the first kernel is defined

Records = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

# What a replica's engine is doing (`run_kind`).
IDLE, DECODING, MIXED, AT_BOUNDARY = 0, 1, 2, 3
# Where a replica is in its life (`status`).
GONE, STARTING, READY, DRAINING, RECLAIMED = 0, 1, 2, 3, 4
# Stages of a start (`stage`).
STAGE_NODE, STAGE_IMAGE, STAGE_WEIGHTS, STAGE_WARMUP = 0, 1, 2, 3
# The boot pipeline is reported by expected remaining time: under 30 s, 30 to 120 s, longer.
BOOT_BINS = 3
BOOT_EDGES_S = (30.0, 120.0)

SLOT_BITS = 12  # a heap entry is `iteration << SLOT_BITS | slot`; max_num_seqs is at most 1 << SLOT_BITS

SERVICE = np.dtype(
    [
        ("now_s", "f8"),
        ("origin_s", "f8"),  # trace time at which this service's clock reads 0
        ("next_arrival", "i8"),  # trace row of the next request to arrive
        ("end_arrival", "i8"),  # one past the last row
        ("queue_head", "i8"),  # oldest row that waits at the gateway; rows [queue_head, next_arrival) minus rejected
        ("queued", "i8"),  # requests at the gateway, returned ones included
        ("returned_head", "i8"),
        ("returned_count", "i8"),
        ("live_end", "i8"),  # one past the last replica row in use: what the hot loops scan
        ("boundaries", "i8"),  # replicas AT_BOUNDARY
        ("freed", "i8"),  # a request left a replica since the last dispatch
        ("max_kv", "i8"),  # largest KV capacity of the pools
        ("next_event_s", "f8"),  # next fleet event (start stage, reclaim)
        ("ttft_slo_s", "f8"),
        ("tpot_slo_s", "f8"),
        ("rng", "u8"),
        # Cumulative counters, never reset inside an episode.
        ("arrived", "i8"),
        ("rejected", "i8"),
        ("arrived_prompt_tokens", "i8"),
        ("prefill_tokens", "i8"),  # computed, so without prefix hits and with recomputation
        ("generated_tokens", "i8"),
        ("first_tokens", "i8"),
        ("ttft_ok", "i8"),
        ("finished", "i8"),
        ("tpot_ok", "i8"),
        ("good", "i8"),  # finished within both objectives
        ("good_tokens", "i8"),  # prompt and output tokens of the good ones
        ("finished_prompt_tokens", "i8"),
        ("finished_output_tokens", "i8"),
        ("preemptions", "i8"),
        ("reclaimed", "i8"),  # requests returned to the gateway by reclaims
        ("scale_ups", "i8"),
        ("scale_downs", "i8"),
    ],
    align=True,
)

POOL = np.dtype(
    [
        ("a", "f8"),
        ("b", "f8"),
        ("c", "f8"),
        ("d", "f8"),
        ("e", "f8"),
        ("kv_capacity", "i8"),
        ("token_budget", "i8"),
        ("max_num_seqs", "i8"),
        ("batch_cap", "i8"),
        ("inv_weight", "f8"),
        ("first_replica", "i8"),  # first replica row of the pool, relative to the service
        ("replica_rows", "i8"),
        ("replicas_target", "i8"),
        ("slots_per_node", "i8"),
        ("bill_per_node", "i8"),
        ("node_s", "f8"),
        ("image_s", "f8"),
        ("weights_s", "f8"),
        ("warmup_s", "f8"),
        ("stage_cv", "f8"),  # coefficient of variation of every stage's duration
        ("full_speed_loads", "f8"),  # weight loads that the storage serves at full speed
        ("loads_updated_s", "f8"),
        ("reclaim_per_s", "f8"),  # hazard of a reclaim, per spot replica
        ("storm_per_s", "f8"),  # rate of correlated reclaims of the pool
        ("storm_share", "f8"),  # share of the pool that a storm takes
        ("notice_s", "f8"),
        ("next_storm_s", "f8"),
        ("billed_replica_s", "f8"),  # of replicas that are gone
        ("billed_node_s", "f8"),  # of nodes that are gone
        ("ready_s", "f8"),  # replica-seconds ready or draining, of replicas that are gone
        ("busy_s", "f8"),  # of replicas that are gone
        ("generated_tokens", "i8"),
        ("reclaims", "i8"),
    ],
    align=True,
)

REPLICA = np.dtype(
    [
        ("pool", "i8"),  # row in the pool array
        ("run_start_s", "f8"),
        ("steps", "i8"),  # iterations of the current run
        ("iteration", "i8"),  # decode iterations so far
        ("decoding", "i8"),
        ("kv_decode", "i8"),  # context tokens of the decoding batch
        ("kv_used", "i8"),
        ("outstanding", "i8"),
        ("admissions", "i8"),
        ("waiting_head", "i8"),
        ("waiting_tail", "i8"),
        ("waiting", "i8"),
        ("prefill_head", "i8"),
        ("prefill_tail", "i8"),
        ("busy_s", "f8"),
        ("free_count", "i8"),
        ("stage", "i8"),
        ("stage_end_s", "f8"),
        ("image_s", "f8"),
        ("load_left_s", "f8"),
        ("warmup_s", "f8"),
        ("requested_s", "f8"),
        ("bill_start_s", "f8"),
        ("ready_at_s", "f8"),
        ("reclaim_s", "f8"),  # when notice is given (READY, DRAINING) or ends (RECLAIMED)
        ("node", "i8"),  # row in the node array
    ],
    align=True,
)

NODE = np.dtype([("used", "i8"), ("granted_s", "f8"), ("last_leave_s", "f8")], align=True)

SLOT = np.dtype(
    [
        ("request", "i8"),
        ("arrival_s", "f8"),
        ("first_s", "f8"),
        ("order", "i8"),  # of admission
        ("prompt", "i4"),
        ("output", "i4"),
        ("hit", "i4"),
        ("emitted", "i4"),  # up to date while waiting or prefilling; implied by the heap while decoding
        ("prefilled", "i4"),
        ("target", "i4"),  # context that the prefill builds
        ("chunk", "i4"),
        ("next", "i4"),  # next slot of the same list
    ],
    align=True,
)


# How the kernels are compiled. They allocate nothing, so numba's reference counting is off: counting (atomically) each
# time an array is taken out of the tuple below cost four fifths of the run time.
KERNEL: dict[str, Any] = {"cache": True, "error_model": "numpy", "_nrt": False}
# Functions called per request are inlined: passing the tuple by value cost two thirds of what remained.
HOT: dict[str, Any] = {**KERNEL, "forceinline": True}


class ClusterArrays(NamedTuple):
    """All state of `n` services, as arrays that the kernels share. See the module docstring for the row layout."""

    pools: int  # per service
    rows: int  # replicas per service
    slots: int  # per replica
    ring: int  # of returned requests, per service
    service: Records
    pool: Records
    replica: Records
    node: Records
    slot: Records
    heap: Ints
    free_slots: npt.NDArray[np.int32]
    end_s: Floats  # end of the current run, or the boundary itself when AT_BOUNDARY; inf when idle
    load: Floats  # dispatch key; inf when the replica takes no request
    run_kind: npt.NDArray[np.int8]
    status: npt.NDArray[np.int8]
    returned: Ints  # trace rows returned by reclaims, in arrival order
    arrival_s: Floats
    prompt_tokens: npt.NDArray[np.int32]
    output_tokens: npt.NDArray[np.int32]
    prefix_hit_tokens: npt.NDArray[np.int32]
    first_token_s: Floats  # per request row; empty when nothing is recorded
    finish_s: Floats
    served_by: npt.NDArray[np.int16]  # pool index of the finishing attempt
    ttft_edges_s: Floats  # upper edges of the histogram's bins
    tpot_edges_s: Floats
    histograms: Ints  # (n, TTFT bins then TPOT bins) requests since the episode began; (n, 0) when nobody reads them

"""Pools of a scaling spec as the kernels read them.

This module must not know how the state evolves.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from envs.cluster.state import POOL, Records
from policies.spec import PoolSpec, ScalingSpec

RECLAIMED_ROWS_SHARE = 0.5
"""Spot pools get spare replica rows: those under notice still occupy theirs while replacements start."""


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

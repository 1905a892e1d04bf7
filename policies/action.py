"""What a learned policy's three outputs mean: headroom, batch cap, spot share.

The outputs are residuals on a reference rule, so an untrained policy (all zeros) is already a sane autoscaler. They do
not depend on the number of pools: within a price class, capacity is bought where a unit of this traffic is cheapest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from policies.columns import any_pool, known, most, total
from policies.contract import Bools, Floats, Observation, Target
from policies.fleet import Fleet
from policies.spec import ActionSpec

ACTIONS: tuple[str, ...] = ("headroom", "batch_cap", "spot_share")
MIN_OUTPUT_BATCH_CAP = 4
MIN_DEMAND = 1e-3
"""Replicas needed below which a service that may have none gets none."""


def decode_action(action: npt.NDArray[Any], observation: Observation, fleet: Fleet, spec: ActionSpec) -> Target:
    """Turn outputs (n, 3) in -1..1 into a target (n, P). An output that is not a number counts as 0, the reference."""
    action = np.clip(known(np.asarray(action, np.float64)), -1.0, 1.0)
    headroom = spec.headroom_reference * np.power(spec.headroom_span, action[:, 0])
    cap = observation.batch_limit * spec.batch_cap_span ** action[:, 1][:, np.newaxis]
    spot_share = np.clip(spec.spot_share_reference + spec.spot_share_span * action[:, 2], 0.0, 1.0)
    return Target(
        replicas=allocate(observation.demand, headroom, spot_share, fleet),
        batch_cap=np.clip(np.rint(cap), MIN_OUTPUT_BATCH_CAP, fleet.max_num_seqs).astype(np.int64),
    )


def reference_batch_cap(observation: Observation, fleet: Fleet) -> npt.NDArray[np.int64]:
    """The batch cap (n, P) of a zero output: the largest batch that meets the TPOT objective."""
    return np.clip(np.rint(observation.batch_limit), MIN_OUTPUT_BATCH_CAP, fleet.max_num_seqs).astype(np.int64)


def allocate(demand: Floats, headroom: Floats, spot_share: Floats, fleet: Fleet) -> npt.NDArray[np.int64]:
    """Replicas (n, P) that cover `headroom` (n,) times `demand` (n, P), cheapest pools first within each price class.

    `demand` is what each pool would need to serve everything. `spot_share` (n,) of the work goes to spot pools where
    there are both classes. What a class cannot take within its bounds spills over to the other.
    """
    spot, on_demand = fleet.is_spot & fleet.exists, ~fleet.is_spot & fleet.exists
    both = any_pool(spot) & any_pool(on_demand)
    share = np.where(both, spot_share, any_pool(spot).astype(float))
    replicas = np.zeros(demand.shape, np.int64)
    order = np.argsort(np.where(fleet.exists, demand * fleet.usd_per_replica_s, np.inf), axis=1, kind="stable")
    # Spot first with its share; on-demand gets the rest with what spot could not take; what is left spills back.
    left = _fill(replicas, order, spot, share, demand, headroom, fleet)
    left = _fill(replicas, order, on_demand, 1.0 - share + left, demand, headroom, fleet)
    if fleet.pools > 1:
        _fill(replicas, order, spot, left, demand, headroom, fleet)
    # Work that rounds to nothing still needs someone to do it.
    nobody = total(np.maximum(replicas, fleet.min_replicas)) == 0
    rows = np.flatnonzero(nobody & (most(np.where(fleet.exists, demand, 0.0)) > MIN_DEMAND))
    replicas[rows, order[rows, 0]] = 1
    return np.where(fleet.exists, np.clip(replicas, fleet.min_replicas, fleet.max_replicas), 0)


def _fill(
    replicas: npt.NDArray[np.int64],
    order: npt.NDArray[np.int64],
    members: Bools,
    share: Floats,
    demand: Floats,
    headroom: Floats,
    fleet: Fleet,
) -> Floats:
    """Give `share` (n,) of the work to member pools in `order`, in place; the share (n,) that did not fit."""
    rows = np.arange(len(demand))
    left = np.maximum(share, 0.0)
    for rank in range(order.shape[1]):
        pool = order[:, rank]
        whole = np.maximum(headroom * demand[rows, pool], 1e-9)  # replicas of this pool for all the work
        room = (fleet.max_replicas[rows, pool] - replicas[rows, pool]).astype(float)
        # A sliver of a replica is not worth a whole one.
        wanted = np.ceil(left * whole - 0.02)
        added = np.where(members[rows, pool], np.clip(wanted, 0.0, room), 0.0)
        replicas[rows, pool] += added.astype(np.int64)
        left = np.maximum(left - added / whole, 0.0)
        left = np.where(members[rows, pool] & (left * whole <= 0.02), 0.0, left)
    return left

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
SLIVER = 0.02
"""Part of a replica that is not worth a whole one."""
MIN_DEMAND = 1e-3
"""Replicas needed below which a service that may have none gets none."""


def decode_action(action: npt.NDArray[Any], observation: Observation, fleet: Fleet, spec: ActionSpec) -> Target:
    """Turn outputs (n, 3) in -1..1 into a target (n, P). An output that is not a number counts as 0, the reference."""
    action = np.clip(known(np.asarray(action, np.float64)), -1.0, 1.0)
    headroom = spec.headroom_reference * np.power(spec.headroom_span, action[:, 0])
    cap = observation.batch_limit * spec.batch_cap_span ** action[:, 1][:, np.newaxis]
    spot_share = np.clip(spec.spot_share_reference + spec.spot_share_span * action[:, 2], 0.0, 1.0)
    return Target(
        replicas=allocate(sustained_demand(observation), headroom, spot_share, fleet),
        batch_cap=np.clip(np.rint(cap), MIN_OUTPUT_BATCH_CAP, fleet.max_num_seqs).astype(np.int64),
    )


def sustained_demand(observation: Observation) -> Floats:
    """What headroom multiplies: the larger of the last window's demand and its five-minute mean, (n, P).

    Replicas take minutes to start, so the lull between two bursts is no reason to give them back.
    """
    return np.maximum(observation.demand, observation.demand_mean)


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
    order = np.argsort(np.where(fleet.exists, demand * fleet.usd_per_replica_s, np.inf), axis=1, kind="stable")

    n = len(demand)
    ranks = order * n + np.arange(n)[:, np.newaxis]  # places in an array that is stored pool by pool

    def ranked(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return values.T.ravel().take(ranks)

    whole = np.maximum(headroom[:, np.newaxis] * ranked(demand), 1e-9)  # replicas of each pool for all the work
    room = ranked(fleet.max_replicas).astype(float)
    spot_ranked, on_demand_ranked = ranked(spot), ranked(on_demand)
    # Spot first with its share; on-demand gets the rest with what spot could not take; what is left spills back.
    added, left = _fill(np.zeros_like(whole), whole, room, spot_ranked, share)
    added, left = _fill(added, whole, room, on_demand_ranked, 1.0 - share + left)
    if fleet.pools > 1 and (left > 0.0).any():
        added, _ = _fill(added, whole, room, spot_ranked, left)
    flat = np.empty(n * fleet.pools, np.int64)
    flat[ranks] = added
    replicas = flat.reshape(fleet.pools, n).T
    # Work that rounds to nothing still needs someone to do it.
    nobody = total(np.maximum(replicas, fleet.min_replicas)) == 0
    rows = np.flatnonzero(nobody & (most(np.where(fleet.exists, demand, 0.0)) > MIN_DEMAND))
    replicas[rows, order[rows, 0]] = 1
    return np.where(fleet.exists, np.clip(replicas, fleet.min_replicas, fleet.max_replicas), 0)


def _fill(replicas: Floats, whole: Floats, room: Floats, members: Bools, share: Floats) -> tuple[Floats, Floats]:
    """Give `share` (n,) of the work to member pools in their order; replicas (n, P), and the share that did not fit.

    `whole` (n, P) are the replicas that each pool would need for all the work, `room` (n, P) its maximum.
    """
    filled = replicas.copy()
    left = np.maximum(share, 0.0)
    for rank in range(whole.shape[1]):
        needed = whole[:, rank]
        # A sliver of a replica is not worth a whole one.
        wanted = np.ceil(left * needed - SLIVER)
        added = np.minimum(np.maximum(wanted, 0.0), room[:, rank] - filled[:, rank])
        added = np.where(members[:, rank], added, 0.0)
        filled[:, rank] += added
        left = np.maximum(left - added / needed, 0.0)
        left = np.where(members[:, rank] & (left * needed <= SLIVER), 0.0, left)
    return filled, left

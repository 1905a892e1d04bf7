"""What a learned policy's four outputs mean: headroom, slack, batch cap, spot share.

The outputs are residuals on a reference rule, so an untrained policy (all zeros) is already a sane autoscaler. They do
not depend on the number of pools: within a price class, capacity is bought where a unit of this traffic is cheapest.
Headroom and slack define a band, not a count: within it, the fleet in force stays as it is. A replica that is given
back and requested again is paid for while it starts and is missing in the meantime, so a policy must be able to do
nothing.

The rule follows the five-minute mean of the demand. In a surge, when demand outruns that mean whatever the headroom,
the fleet is at least what the rule asks for at the current demand.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from policies.contract import Bools, Floats, Observation, Target
from policies.fleet import Fleet
from policies.observation import FEATURES
from policies.pool_arrays import any_pool, clip, max_pools, nan_to_num
from policies.spec import ActionSpec

ACTIONS: tuple[str, ...] = ("headroom", "slack", "batch_cap", "spot_share")
MIN_OUTPUT_BATCH_CAP = 4
ROUNDING_TOLERANCE = 0.02
"""Part of a replica that is not worth a whole one."""
SURGE = 3.0
"""A surge: the one-minute mean of the demand over its five-minute mean."""
SURGE_COLUMN = FEATURES.index("log_mean_60s_over_mean_300s")
MIN_DEMAND = 1e-3
"""Replicas needed below which a service that may have none gets none."""


def decode_action(action: npt.NDArray[Any], observation: Observation, fleet: Fleet, spec: ActionSpec) -> Target:
    """Turn outputs (n, 4) in -1..1 into a target (n, P). An output that is not a number counts as 0, the reference."""
    outputs = clip(nan_to_num(np.array(action.T, np.float64)), -1.0, 1.0)
    spans = np.array([[spec.headroom_span], [spec.slack_span], [spec.batch_cap_span]])
    headroom, slack, cap_factor = np.power(spans, outputs[:3])
    spot_share = clip(spec.spot_share_reference + spec.spot_share_span * outputs[3], 0.0, 1.0)
    surging = observation.features[:, SURGE_COLUMN] > np.log(SURGE)
    now = observation.demand[:, 0] / np.maximum(observation.demand_mean[:, 0], MIN_DEMAND)
    min_replicas = spec.headroom_reference * np.maximum(headroom, np.where(surging, now, 0.0))
    band = np.array([min_replicas, min_replicas * (1.0 + spec.slack_reference * slack)])
    lowest, highest = allocate_each(observation.demand_mean, band, spot_share, fleet)
    in_force = observation.snapshot.replicas_target
    return Target(
        replicas=clip(np.where(np.isnan(in_force), lowest, in_force), lowest, highest).astype(np.int64),
        batch_cap=_batch_cap(observation.batch_limit.T * cap_factor, fleet),
    )


def reference_batch_cap(observation: Observation, fleet: Fleet) -> npt.NDArray[np.int64]:
    """The batch cap (n, P) of a zero output: the largest batch that meets the TPOT objective."""
    return _batch_cap(observation.batch_limit.T, fleet)


def _batch_cap(caps: Floats, fleet: Fleet) -> npt.NDArray[np.int64]:
    """Whole caps (n, P) from real ones (P, n)."""
    return clip(np.rint(caps), MIN_OUTPUT_BATCH_CAP, fleet.max_num_seqs.T).astype(np.int64).T


def allocate(demand: Floats, headroom: Floats, spot_share: Floats, fleet: Fleet) -> npt.NDArray[np.int64]:
    """Replicas (n, P) that cover `headroom` (n,) times `demand` (n, P), cheapest pools first within each price class.

    `demand` is what each pool would need to serve everything. `spot_share` (n,) of the work goes to spot pools where
    there are both classes. What a class cannot take within its bounds spills over to the other.
    """
    replicas: npt.NDArray[np.int64] = allocate_each(demand, headroom[np.newaxis], spot_share, fleet)[0]
    return replicas


def allocate_each(demand: Floats, headrooms: Floats, spot_share: Floats, fleet: Fleet) -> npt.NDArray[np.int64]:
    """`allocate` for several headrooms (k, n) in one pass: replicas (k, n, P)."""
    share = np.where(any_pool(fleet.exists > fleet.is_spot), spot_share * any_pool(fleet.is_spot), 1.0)
    order = _cheapest_first(demand * fleet.usd_per_replica_s, fleet.exists)
    k, n = headrooms.shape
    ranks = order * n + np.arange(n)  # places in an array that is stored pool by pool

    def ranked(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        places: npt.NDArray[Any] = values.T.ravel().take(ranks)
        return places[:, np.newaxis]

    whole = np.maximum(headrooms * ranked(demand), 1e-9)  # replicas (P, k, n) of each pool for all the work
    room = ranked(fleet.max_replicas)  # (P, 1, n)
    spot_room = room * ranked(fleet.is_spot)
    on_demand_room = room - spot_room
    # Spot first with its share; on-demand gets the rest with what spot could not take; what is left spills back.
    added, left = _fill(whole, spot_room, share)
    rest, left = _fill(whole, on_demand_room, 1.0 - share + left)
    added += rest
    if (left > 0.0).any():
        added += _fill(whole, room - added, left)[0]
    by_pool = np.empty((k, n * fleet.pools))
    by_pool[:, ranks] = added.transpose(1, 0, 2)
    replicas = np.maximum(by_pool.reshape(k, fleet.pools, n).transpose(0, 2, 1), fleet.min_replicas).astype(np.int64)
    # Work that rounds to nothing still needs someone to do it.
    idle = ~np.logical_or.reduce([replicas[..., pool] > 0 for pool in range(fleet.pools)])
    if idle.any():
        levels, rows = np.nonzero(idle & (max_pools(np.where(fleet.exists, demand, 0.0)) > MIN_DEMAND))
        replicas[levels, rows, order[0, rows]] = np.minimum(1, fleet.max_replicas[rows, order[0, rows]])
    settled: npt.NDArray[np.int64] = np.minimum(replicas, fleet.max_replicas)
    return settled


def _cheapest_first(price: Floats, exists: Bools) -> npt.NDArray[np.int64]:
    """Pools (P, n) of each service by price (n, P), cheapest first; those that it does not have come last."""
    ranked = np.where(exists, price, np.inf).T
    if len(ranked) == 2:  # by far the most services; sorting pairs one by one costs ten times a comparison
        second_first = (ranked[1] < ranked[0]).astype(np.int64)
        return np.array([second_first, 1 - second_first])
    return np.argsort(ranked, axis=0, kind="stable")


def _fill(whole: Floats, room: Floats, share: Floats) -> tuple[Floats, Floats]:
    """Give `share` (k, n) of the work to pools in their order, up to `room` (P, k, n) replicas each.

    `whole` (P, k, n) are the replicas that each pool would need for all the work. A pool without room takes nothing.

    Returns:
        Replicas (P, k, n), and the share (k, n) that did not fit, at least 0.
    """
    # A small part of a replica is not worth a whole one, here or elsewhere.
    tolerances = ROUNDING_TOLERANCE * (room > 0)
    replicas = []
    left = share
    for needed, free, tolerance in zip(whole, room, tolerances, strict=True):
        added = clip(np.ceil(left * needed - ROUNDING_TOLERANCE), 0.0, free)
        left = left - (added + tolerance) / needed
        replicas.append(added)
    return np.array(replicas), np.maximum(left, 0.0)

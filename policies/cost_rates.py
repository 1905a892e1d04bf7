"""What a fleet costs while the load stays as it is: dollars and tokens per second, as measured and as modelled.

This module must not know what was billed, nor over which time.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from policies.contract import Floats, Ints, Observation, Snapshot
from policies.fleet import Fleet
from policies.pool_arrays import nan_to_num, sum_pools


class Counts(Protocol):
    """Replicas of a fleet, (n, P) each; NaN where unknown."""

    @property
    def replicas_starting(self) -> Floats:
        """On their way."""
        ...

    @property
    def replicas_ready(self) -> Floats:
        """That serve."""
        ...

    @property
    def replicas_draining(self) -> Floats:
        """That finish their requests."""
        ...


def cost_rates(
    snapshot: Snapshot, fleet: Fleet, overhead_rate: Floats, more: Floats | float = 0.0
) -> tuple[Floats, Floats]:
    """Provisioned dollars per second and tokens served per second, (n, P) each; NaN where unknown.

    Every replica that starts, serves or drains is paid for. A service's tokens are shared out over its pools by their
    running requests, by their ready replicas where none runs.

    Args:
        snapshot: the present fleet and load.
        fleet: prices.
        overhead_rate: (n,) network, storage and CPU as a share of the GPU bill.
        more: (n, P) replicas that are paid for besides.
    """
    usd_per_s = (replicas_paid(snapshot) + more) * fleet.usd_per_replica_s * (1.0 + overhead_rate)[:, np.newaxis]
    running, ready = nan_to_num(snapshot.running), nan_to_num(snapshot.replicas_ready)
    weight = np.where((sum_pools(running) > 0)[:, np.newaxis], running, ready)
    share = weight / np.maximum(sum_pools(weight), 1e-9)[:, np.newaxis]
    return usd_per_s, served_tps(snapshot)[:, np.newaxis] * share


def replicas_paid(seen: Counts) -> Floats:
    """(n, P) replicas that start, serve or drain; NaN where it is unknown how many serve."""
    paid: Floats = seen.replicas_ready + nan_to_num(seen.replicas_starting) + nan_to_num(seen.replicas_draining)
    return paid


def served_tps(snapshot: Snapshot) -> Floats:
    """(n,) prompt and output tokens of the requests that finished, per second; NaN where unknown.

    What arrives and is not served makes no token cheaper.
    """
    means = snapshot.prompt_tokens_mean + snapshot.output_tokens_mean
    return np.where(snapshot.finished_rps == 0, 0.0, snapshot.finished_rps * means)


def token_rate_tps(snapshot: Snapshot) -> Floats:
    """(n,) the load: prompt tokens that arrived and tokens generated, per second; NaN where either is unknown."""
    rate: Floats = snapshot.prompt_tps + snapshot.generation_tps
    return rate


class ModelledCost(NamedTuple):
    """What a target costs while the load stays as it is, (n,) each."""

    usd_per_hour: Floats
    usd_per_mtok: Floats
    served_share: Floats


def modelled_cost(replicas: Ints, observation: Observation, fleet: Fleet, overhead_rate: Floats) -> ModelledCost:
    """Provisioned dollars of replicas (n, P), over the tokens that they can serve of the present load.

    The share served is capacity over demand, at most 1, with the demand of `policies.demand`.

    Args:
        replicas: (n, P) all of them ready.
        observation: the present load.
        fleet: prices.
        overhead_rate: (n,) network, storage and CPU as a share of the GPU bill.
    """
    usd_per_s = sum_pools(replicas * fleet.usd_per_replica_s) * (1.0 + overhead_rate)
    needed = np.maximum(observation.demand, 1e-9)
    served = np.minimum(sum_pools(np.where(fleet.exists, replicas / needed, 0.0)), 1.0)
    tokens_tps = token_rate_tps(observation.snapshot) * served
    per_mtok = np.divide(usd_per_s * 1e6, tokens_tps, out=np.full(len(usd_per_s), np.nan), where=tokens_tps > 0)
    return ModelledCost(usd_per_s * 3600.0, per_mtok, served)

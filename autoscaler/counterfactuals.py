"""What other policies would have done at the same tick, and what that would have cost.

Each peer sees the same observation from the same target in force, and its wish goes through the same guardrails.
This module must not know who decided in earnest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from policies.columns import total
from policies.contract import Floats, Ints, Observation, Policy, Snapshot, Target
from policies.decider import Decider
from policies.durable import State, restore_each, states_of
from policies.fleet import Fleet


class Modelled(NamedTuple):
    """What a target costs while the load stays as it is, (n,) each."""

    usd_per_hour: Floats
    usd_per_mtok: Floats
    served_share: Floats


def modelled_cost(replicas: Ints, observation: Observation, fleet: Fleet, overhead_rate: Floats) -> Modelled:
    """Provisioned dollars of replicas (n, P), over the tokens that they can serve of the present load.

    The share served is capacity over demand, at most 1, with the demand of `policies.demand`.

    Args:
        replicas: (n, P) all of them ready.
        observation: the present load.
        fleet: prices.
        overhead_rate: (n,) network, storage and CPU as a share of the GPU bill.
    """
    usd_per_s = total(replicas * fleet.usd_per_replica_s) * (1.0 + overhead_rate)
    needed = np.maximum(observation.demand, 1e-9)
    served = np.minimum(total(np.where(fleet.exists, replicas / needed, 0.0)), 1.0)
    tokens_tps = token_rate_tps(observation.snapshot) * served
    per_mtok = np.divide(usd_per_s * 1e6, tokens_tps, out=np.full(len(usd_per_s), np.nan), where=tokens_tps > 0)
    return Modelled(usd_per_s * 3600.0, per_mtok, served)


def token_rate_tps(snapshot: Snapshot) -> Floats:
    """(n,) prompt tokens that arrived and tokens generated, per second; NaN where either is unknown."""
    rate: Floats = snapshot.prompt_tps + snapshot.generation_tps
    return rate


class Counterfactuals:
    """Peers in the shadow of the acting policy.

    Args:
        peers: policies by the name under which they are recorded; may be exchanged between ticks.
        fleet: the services.
        overhead_rate: (n,) share of the GPU bill.
    """

    def __init__(self, peers: Mapping[str, Policy], fleet: Fleet, overhead_rate: Floats) -> None:
        self.peers = dict(peers)
        self.fleet = fleet
        self.overhead_rate = overhead_rate
        self.failed: set[str] = set()

    def of(self, settled: Target, observation: Observation, decider: Decider) -> dict[str, npt.NDArray[Any]]:
        """Arrays by ``peer NAME/replicas`` and so on, and the modelled cost of the target that was settled.

        A peer that raises is left out from then on, and named in `failed`.
        """
        found = self._rows("own", settled, observation)
        for name, policy in self.peers.items():
            if name in self.failed:
                continue
            try:
                target = decider.what_if(policy.propose(observation), observation)
            except Exception:  # a peer is a plug-in and must not disturb the decision in earnest
                self.failed.add(name)
                continue
            found |= self._rows(f"peer {name}", target, observation)
            found[f"peer {name}/replicas"] = target.replicas
            found[f"peer {name}/batch_cap"] = target.batch_cap
        return found

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """What the peers remember."""
        return states_of(self.peers)

    def restore(self, state: State) -> None:
        """Go on from what `state` returned."""
        restore_each(self.peers, state)

    def _rows(self, name: str, target: Target, observation: Observation) -> dict[str, npt.NDArray[Any]]:
        cost = modelled_cost(target.replicas, observation, self.fleet, self.overhead_rate)
        return {f"{name}/{field}": values for field, values in zip(Modelled._fields, cost, strict=True)}

"""What other policies would have done at the same tick, and what that would have cost.

Each peer sees the same observation from the same target in force, and its proposal goes through the same guardrails.
This module must not know which policy really decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

from autoscaler.versions.timed_answers import TimedAnswers
from policies.contract import Floats, Observation, Policy, Target
from policies.cost_rates import ModelledCost, modelled_cost
from policies.decider import Decider
from policies.durable import State, restore_each, states_of
from policies.fleet import Fleet


class Counterfactuals:
    """Peers in the shadow of the acting policy.

    Args:
        peers: policies by the name under which they are recorded; may be exchanged between ticks.
        fleet: the services.
        overhead_rate: (n,) share of the GPU bill.
        answers: asks the policies.
    """

    def __init__(self, peers: Mapping[str, Policy], fleet: Fleet, overhead_rate: Floats, answers: TimedAnswers) -> None:
        self.peers = dict(peers)
        self.fleet = fleet
        self.overhead_rate = overhead_rate
        self.failed: dict[str, str] = {}
        """Why a peer is left out, in words, by its name."""
        self._answers = answers

    def own(self, settled: Target, observation: Observation) -> dict[str, npt.NDArray[Any]]:
        """The modelled cost of the target that was settled in the end, arrays by ``own/usd_per_hour`` and so on."""
        return self._rows("own", settled, observation)

    def of_peers(self, observation: Observation, decider: Decider) -> dict[str, npt.NDArray[Any]]:
        """Arrays by ``peer NAME/replicas`` and so on.

        A peer that raises is left out from then on, and named in `failed`.
        """
        found: dict[str, npt.NDArray[Any]] = {}
        for name, policy in self.peers.items():
            if name in self.failed:
                continue
            try:
                target = decider.what_if(self._answers.propose(policy, observation), observation)
            except Exception as error:  # a peer is a plug-in and must not disturb the real decision
                self.failed[name] = f"{name} is not compared any more: {type(error).__name__}: {error}"
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
        return {f"{name}/{field}": values for field, values in zip(ModelledCost._fields, cost, strict=True)}

"""The learned policy in parts: how much each of its outputs is worth.

Replicas, batch cap and choice of pool are one decision of the network. An ablation takes one or two of them from the
reference rule that the outputs are residuals on, from a rule of our own, or leaves them as the engine has them.
This module must not know what a policy is judged on.
"""

from __future__ import annotations

from dataclasses import dataclass

from policies.action import ACTIONS
from policies.baselines.reactive import ReactivePolicy
from policies.baselines.static import StaticPolicy
from policies.baselines.token_demand import TokenDemandPolicy
from policies.contract import Bools, Features, Floats, Observation, Policy, Target
from policies.engine import ConfigError
from policies.fleet import Fleet
from policies.learned import LearnedPolicy
from policies.lineup import Entry
from policies.spec import InterfaceSpec, ScalingSpec

POOLS_OUTPUT = ACTIONS.index("spot_share")
LEARNED, REFERENCE_POOLS = "learned", "learned, pools at the reference"
REFERENCE_CAP, ENGINE_CAP = TokenDemandPolicy.name, StaticPolicy.name
"""Rules whose batch cap is the reference (the largest batch that meets the TPOT objective), and the engine's own."""


class PoolsAtReference(LearnedPolicy):
    """The learned policy with the output that chooses between pools held at 0, the reference."""

    def outputs(self, features: Features) -> Floats:
        """The network's outputs (n, 4) in -1..1."""
        actions = super().outputs(features)
        actions[:, POOLS_OUTPUT] = 0.0
        return actions


class Combined:
    """Replicas of one policy with the batch caps of another; satisfies `Policy`.

    Args:
        replicas: whose replicas count.
        caps: whose batch caps count.
    """

    def __init__(self, replicas: Policy, caps: Policy) -> None:
        self.name = f"{replicas.name} with the caps of {caps.name}"
        self._replicas = replicas
        self._caps = caps

    def reset(self, services: Bools | None = None) -> None:
        """Let both forget the masked services."""
        self._replicas.reset(services)
        self._caps.reset(services)

    def propose(self, observation: Observation) -> Target:
        """The proposal of each for its own part."""
        replicas, caps = self._replicas.propose(observation), self._caps.propose(observation)
        return Target(replicas=replicas.replicas, batch_cap=caps.batch_cap)


@dataclass(frozen=True)
class Ablation:
    """Who decides what.

    Attributes:
        name: in tables.
        meaning: one sentence without a full stop.
        replicas: who sets replicas, and with them the choice of pool: a part of the learned policy, or a rule.
        caps: who sets batch caps.
    """

    name: str
    meaning: str
    replicas: str = LEARNED
    caps: str = LEARNED

    def concerns(self, spec: ScalingSpec) -> bool:
        """Whether it is one of its own there: without a choice of pool, two ablations of it are the same."""
        return self.replicas != REFERENCE_POOLS or len({pool.price_class for pool in spec.pools}) > 1

    def make(self, entry: Entry, fleet: Fleet, interface: InterfaceSpec) -> Policy:
        """The parts of a learned policy, put together for a fleet.

        Raises:
            ConfigError: when the policy is no plain learned one.
            BundleMismatch: when the bundle was trained for another interface.
        """
        if entry.bundle is None or entry.self_tuned:
            raise ConfigError(f"policy {entry.reference!r}: an ablation takes a learned policy apart, without +self")
        parts = [_part(name, entry, fleet, interface) for name in (self.replicas, self.caps)]
        return parts[0] if self.replicas == self.caps else Combined(*parts)


def _part(name: str, entry: Entry, fleet: Fleet, interface: InterfaceSpec) -> Policy:
    assert entry.bundle is not None, "checked by the caller"
    if name in {LEARNED, REFERENCE_POOLS}:
        learned = LearnedPolicy if name == LEARNED else PoolsAtReference
        return learned(entry.bundle, fleet, interface)
    return {rule.name: rule for rule in (ReactivePolicy, TokenDemandPolicy, StaticPolicy)}[name](fleet)


ABLATIONS = (
    Ablation("replicas, cap, pools", "the learned policy as it is"),
    Ablation(
        "replicas, cap",
        "pools at the reference: half of the capacity on spot, where there is some",
        replicas=REFERENCE_POOLS,
    ),
    Ablation("replicas, pools", "batch caps at the reference: the largest that meets TPOT", caps=REFERENCE_CAP),
    Ablation("replicas", "batch caps and pools at the reference", replicas=REFERENCE_POOLS, caps=REFERENCE_CAP),
    Ablation("replicas, pools; engine's cap", "batch caps as the engine has them", caps=ENGINE_CAP),
    Ablation(
        "replicas; engine's cap",
        "batch caps as the engine has them, pools at the reference",
        replicas=REFERENCE_POOLS,
        caps=ENGINE_CAP,
    ),
    Ablation("cap, on reactive", "replicas and pools by the rule `reactive`", replicas=ReactivePolicy.name),
    Ablation("cap, on token-demand", "replicas and pools by the rule `token-demand`", replicas=TokenDemandPolicy.name),
    Ablation("nothing: reactive", "the rule alone", replicas=ReactivePolicy.name, caps=ReactivePolicy.name),
    Ablation("nothing: token-demand", "the rule alone", replicas=TokenDemandPolicy.name, caps=TokenDemandPolicy.name),
)
"""Named after what the learned policy decides. The choice between pools is that of spot or not."""

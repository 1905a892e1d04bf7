"""Which policy decides, from tick to tick: takes new versions over, watches them, and rolls back.

This module must not know where versions come from.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autoscaler.versions.counterfactuals import Counterfactuals
from autoscaler.versions.follower import PolicyConfig, PolicyFollower, is_learned
from autoscaler.versions.ladder import FallbackLadder
from autoscaler.versions.probation import Probation
from policies.contract import Decision, Floats
from policies.cost_rates import cost_rates
from policies.fleet import Fleet
from policies.learned import LearnedPolicy
from policies.spec import InterfaceSpec

CHALLENGER = "challenger"


class Lifecycle:
    """Exchanges the ladder's learned policy between ticks.

    Args:
        champion: follows the acting policy.
        challenger: follows the one in the shadow, None when there is none.
        ladder: where the champion decides.
        counterfactuals: where the challenger is recorded.
        probation: when to roll back.
        fleet: prices.
        overhead_rate: (n,) share of the GPU bill.
    """

    def __init__(
        self,
        champion: PolicyFollower | None,
        challenger: PolicyFollower | None,
        ladder: FallbackLadder,
        counterfactuals: Counterfactuals,
        probation: Probation,
        fleet: Fleet,
        overhead_rate: Floats,
    ) -> None:
        self.champion = champion
        self.challenger = challenger
        self.events: list[str] = []
        """What happened to the policy, in words, newest last."""
        self.label = ""
        self._ladder = ladder
        self._counterfactuals = counterfactuals
        self._probation = probation
        self._fleet = fleet
        self._overhead_rate = overhead_rate
        self._previous: tuple[str, LearnedPolicy] | None = None

    @classmethod
    def of(
        cls,
        config: PolicyConfig,
        services: Sequence[str],
        fleet: Fleet,
        interface: InterfaceSpec,
        ladder: FallbackLadder,
        counterfactuals: Counterfactuals,
        overhead_rate: Floats,
    ) -> Lifecycle:
        """As a live configuration says; where it names a rule, no champion is followed."""
        first_price = np.array([config.first_prices.get(name, np.nan) for name in services])

        def follower(reference: str | None) -> PolicyFollower | None:
            return None if reference is None else PolicyFollower(reference, config, fleet, interface, first_price)

        champion = follower(config.reference if is_learned(config) else None)
        probation = Probation(config.rollback)
        return cls(champion, follower(config.challenger), ladder, counterfactuals, probation, fleet, overhead_rate)

    @property
    def followers(self) -> list[PolicyFollower]:
        """Those of champion and challenger that there are."""
        return [follower for follower in (self.champion, self.challenger) if follower is not None]

    @property
    def version(self) -> str:
        """What decides: its label and the start of its digest."""
        digest = self._ladder.version
        return f"{self.label}@{digest[:12]}" if self.label else digest

    def before_tick(self) -> None:
        """Take over what is ready."""
        if self.champion is not None:
            self._ladder.wanted_learned = True
            version = self.champion.take()
            if version is not None:
                before = self._ladder.exchange(version.policy)
                if before is not None:
                    self._previous = (self.label, before)
                    self._probation.begin()
                self.label = version.label
                self.events.append(f"policy {version.label} ({version.digest[:12]}) decides from now on")
        if self.challenger is not None:
            version = self.challenger.take()
            if version is not None:
                self._counterfactuals.peers[CHALLENGER] = version.policy
                self._counterfactuals.failed.pop(CHALLENGER, None)
                self.events.append(f"policy {version.label} ({version.digest[:12]}) runs in the shadow")

    def after_tick(self, decision: Decision) -> None:
        """Watch what the policy achieves; roll back when it is worse than the one before."""
        why = self._probation.add(decision, *cost_rates(decision.snapshot, self._fleet, self._overhead_rate))
        if why and self._previous is not None and self.champion is not None:
            label, policy = self._previous
            bad = self._ladder.exchange(policy)
            if bad is not None:
                self.champion.refuse(bad.bundle.digest)
            self.events.append(f"rolled back from {self.label} to {label}: {why}")
            self.label, self._previous = label, None
            self._probation.end()
        del self.events[:-20]

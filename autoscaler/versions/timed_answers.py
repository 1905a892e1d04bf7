"""Policies asked within a time limit: a network that computes for ever must not hold up the loop.

This module must not know what is done without an answer.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from autoscaler.stages import Overdue, within
from policies.contract import Observation, Policy, Target


@runtime_checkable
class Cancellable(Protocol):
    """A policy whose native code can be told to stop."""

    def cancel(self) -> None:
        """End the answer that is under way."""
        ...


class Abandoned(RuntimeError):  # noqa: N818 - reads as the state that it reports
    """Raised when a policy is not asked any more."""


class TimedAnswers:
    """Asks policies, each answer in a thread of its own.

    A policy that has not answered in time is not asked while its thread may still be at work. Its late answer is lost,
    and so is what it remembers: a rule is reset and asked again once it has come back, since below it there is nothing;
    a network, which was told to stop, is not asked again in this process.

    Args:
        limit_s: seconds that one answer may take.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._hung: list[tuple[str, Policy, Overdue]] = []

    def propose(self, policy: Policy, observation: Observation) -> Target:
        """The policy's proposal.

        Raises:
            Overdue: when it does not come in time.
            Abandoned: when that has happened before, and the policy cannot be asked now.
            Exception: what the policy raises.
        """
        for late in [late for late in self._hung if late[1] is policy]:
            if isinstance(policy, Cancellable) or late[2].thread.is_alive():
                raise Abandoned(late[0])
            self._hung.remove(late)
            policy.reset()
        try:
            return within(self.limit_s, f"policy-{policy.name}", lambda: policy.propose(observation))
        except Overdue as error:
            then = "it is asked again when it has come back"
            if isinstance(policy, Cancellable):
                policy.cancel()
                then = "it is not asked again"
            self._hung.append((f"policy {policy.name}: {error}; {then}", policy, error))
            raise

    @property
    def problems(self) -> list[str]:
        """Which policies are not asked now, and why."""
        return [why for why, *_ in self._hung]

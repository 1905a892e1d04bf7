"""The time in which a policy that was exchanged can still give way to the one before it.

This module must not know where policies come from, nor how they are exchanged.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from policies.contract import Decision, Floats
from policies.engine import NonNegative, Positive, StrictModel
from policies.pool_arrays import nan_to_num
from policies.spec import Share


class RollbackSpec(StrictModel):
    """When an exchanged policy gives way to the one before it."""

    watch_s: NonNegative = Field(
        default=1800.0, description="A new policy is compared with the one before for this long, seconds; 0 never."
    )
    min_requests: int = Field(default=500, ge=1, description="Finished requests on both sides before it is judged.")
    attainment_loss: Share = Field(default=0.02, description="Attainment that it may lose, absolute.")
    cost_ratio: Positive = Field(default=1.25, description="Cost per token that it may reach, as a ratio.")


class Probation:
    """Compares live attainment and cost per token since an exchange with those before it.

    Sums are over all services, requests and tokens weighing alike.

    Args:
        spec: how much worse the new policy may be.
        price: dollars per second and tokens per second of a decision's window.
    """

    def __init__(self, spec: RollbackSpec) -> None:
        self.spec = spec
        self._before = np.zeros(5)  # seconds, requests, good requests, dollars, tokens
        self._since = np.zeros(5)
        self._on = False

    @property
    def on(self) -> bool:
        """Whether a policy is being watched."""
        return self._on

    def begin(self) -> None:
        """A new policy acts from now on."""
        if self._on or self._since[0] > 0:
            self._before = self._since
        self._since, self._on = np.zeros(5), True

    def end(self) -> None:
        """From now on the present policy is what a new one is compared with."""
        self._before, self._since, self._on = np.zeros(5), np.zeros(5), False

    def add(self, decision: Decision, usd_per_s: Floats, token_tps: Floats) -> str:
        """Account for one window; why to roll back, empty when not.

        Args:
            decision: the window.
            usd_per_s: (n, P) provisioned.
            token_tps: (n, P) served.
        """
        snapshot = decision.snapshot
        window_s = nan_to_num(snapshot.window_s)
        finished = nan_to_num(snapshot.finished_rps) * window_s
        attained = nan_to_num(np.fmin(snapshot.ttft_attainment, snapshot.tpot_attainment), 1.0)
        usd, tokens = (nan_to_num(rate).sum(axis=1) * window_s for rate in (usd_per_s, token_tps))
        longest = float(window_s.max(initial=0.0))
        self._since += [longest, finished.sum(), (finished * attained).sum(), usd.sum(), tokens.sum()]
        if not self._on:
            # A moving measure of the present policy: half of it is forgotten every watch time.
            if self.spec.watch_s > 0:
                self._since *= 0.5 ** (longest / self.spec.watch_s)
            return ""
        verdict = self._verdict()
        if verdict or self._since[0] >= self.spec.watch_s:
            self._on = False
        return verdict

    def _verdict(self) -> str:
        if min(self._before[1], self._since[1]) < self.spec.min_requests:
            return ""
        before, since = self._before[2] / self._before[1], self._since[2] / self._since[1]
        if since < before - self.spec.attainment_loss:
            return f"attainment fell from {before:.1%} to {since:.1%}"
        if self._before[4] > 0 and self._since[4] > 0:
            cost_before, cost_since = self._before[3] / self._before[4], self._since[3] / self._since[4]
            if cost_since > self.spec.cost_ratio * cost_before:
                return f"cost per token rose to {cost_since / cost_before:.2f} times"
        return ""

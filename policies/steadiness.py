"""What the guardrail of steadiness remembers: the last change, the traffic since then, wishes, and reversals.

A fleet flaps when noise alone moves a target back and forth. So a scale-down asks two questions. Has the offered load
fallen since the last change, by more than the noise of its estimate? What arrives does not depend on the fleet, unlike
latencies, queues and the requests in service. If it has not fallen: would the replicas by now have been worth the
change? That price rises with every reversal, a scale-down that was taken back while the offered load was as before.
This module must not know about limits, policies or latencies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from policies.contract import Bools, Floats, Ints, Observation, Target
from policies.pool_arrays import clip, nan_to_zero, sum_pools
from policies.spec import GuardrailSpec

NOISE_MARGIN = 5.0
"""Standard errors of the offered load that are still noise: the highest and lowest of an hour are 4 to 5 apart."""
LEAST_BAND = 0.05
"""Change of the offered load that is noise however many requests arrive: the mix of lengths is estimated too."""
FORGOTTEN = 0.1
"""Reversals below which it is forgotten how large they were."""
MOST_REVERSALS = 100.0
"""More are not counted: the price, up to 100 to this power, must stay a number."""


class ScalingHistory(NamedTuple):
    """What has become of the targets of `n` services. Never changed in place: a target may be retracted."""

    changed_s: Floats  # (n,) time of the last change of the total target; -inf: none yet
    shrank: Bools  # (n,) that change was a scale-down
    reversals: Floats  # (n,) scale-downs taken back at unchanged load, fading, as of the last change
    span: Ints  # (n,) largest step that was taken back, replicas; 0 once it has been forgotten
    highest_load: Floats  # (n,) highest offered load since the last change, replicas
    load_at_fall: Floats  # (n,) offered load at the last scale-down, replicas
    forgone_s: Floats  # (n,) what the wished scale-down would have saved, seconds of the whole fleet
    wish: Ints  # (n, P) highest proposal of the window that runs
    last_wish: Ints  # (n, P) highest proposal of the window before
    wish_since_s: Floats  # (n,) start of the window that runs

    @classmethod
    def none(cls, n: int, pools: int) -> ScalingHistory:
        """Nothing has happened yet."""
        nothing, wish = np.zeros(n), np.zeros((n, pools), np.int64)
        never = np.full(n, -np.inf)
        return cls(
            never, np.zeros(n, bool), nothing, np.zeros(n, np.int64), nothing, nothing, nothing, wish, wish, never
        )

    def replaced(self, rows: Bools, other: ScalingHistory) -> ScalingHistory:
        """The masked services as they are in `other`."""
        return ScalingHistory(
            *(
                np.where(rows if mine.ndim == 1 else rows[:, np.newaxis], theirs, mine)
                for mine, theirs in zip(self, other, strict=True)
            )
        )

    def forget(self, rows: Bools) -> ScalingHistory:
        """The masked services begin anew."""
        return self.replaced(rows, ScalingHistory.none(*self.wish.shape))

    def restored(self, state: Mapping[str, npt.NDArray[Any]]) -> ScalingHistory:
        """The history in saved arrays by name."""
        return ScalingHistory(*(np.array(state[name], mine.dtype) for name, mine in self._asdict().items()))

    def not_after(self, time_s: Floats) -> ScalingHistory:
        """A clock that was set back must not make a wait longer than it is."""
        return self._replace(
            changed_s=np.minimum(self.changed_s, time_s), wish_since_s=np.minimum(self.wish_since_s, time_s)
        )

    def made_all_along(self, proposed: Target) -> ScalingHistory:
        """As if that had been proposed for ever: the wishes remembered here are another policy's."""
        forgone_s = np.full(len(self.changed_s), np.inf)
        return self._replace(wish=proposed.replicas, last_wish=proposed.replicas, forgone_s=forgone_s)

    def highest_wish(self) -> Ints:
        """(n, P) highest proposal of the last one to two windows."""
        return np.maximum(self.wish, self.last_wish)

    def fallen(self, observation: Observation) -> Floats:
        """(n,) by which share the offered load has fallen below its highest since the last change; NaN: unknown."""
        share: Floats = 1.0 - observation.offered_load / np.maximum(self.highest_load, 1e-9)
        return share

    def reversals_at(self, time_s: Floats, spec: GuardrailSpec) -> Floats:
        """(n,) what is left of the reversals."""
        left: Floats = self.reversals * np.exp((self.changed_s - time_s) / spec.reversal_memory_s)
        return left

    def seen(self, proposed: Target, current: Ints, observation: Observation, spec: GuardrailSpec) -> ScalingHistory:
        """A window has passed with `current` (n, P) in force, and a policy has proposed a target."""
        snapshot, replicas = observation.snapshot, proposed.replicas
        over = (snapshot.time_s - self.wish_since_s >= spec.scale_down_window_s)[:, np.newaxis]
        last = np.where(over, self.wish, self.last_wish)
        wish = np.where(over, replicas, np.maximum(self.wish, replicas))
        spare = sum_pools(np.maximum(current - np.maximum(wish, last), 0)) / np.maximum(sum_pools(current), 1)
        return self._replace(
            highest_load=np.fmax(self.highest_load, observation.offered_load),
            forgone_s=np.where(spare > 0, self.forgone_s + spare * nan_to_zero(snapshot.window_s), 0.0),
            wish=wish,
            last_wish=last,
            wish_since_s=np.where(over[:, 0], snapshot.time_s, self.wish_since_s),
        )

    def moved(self, step: Ints, time_s: Floats, observation: Observation, spec: GuardrailSpec) -> ScalingHistory:
        """The total target has changed by `step` (n,); where that is 0, nothing has happened."""
        moved, down, load = step != 0, step < 0, observation.offered_load
        as_before = ~(load > self.load_at_fall * (1.0 + noise_band(observation, spec)))
        taken_back = (step > 0) & self.shrank & as_before
        left = self.reversals_at(time_s, spec)
        return self._replace(
            changed_s=np.where(moved, time_s, self.changed_s),
            shrank=np.where(moved, down, self.shrank),
            reversals=np.where(moved, np.minimum(left + taken_back, MOST_REVERSALS), self.reversals),
            span=np.where(taken_back, np.maximum(step, np.where(left > FORGOTTEN, self.span, 0)), self.span),
            highest_load=np.where(moved, load, self.highest_load),
            load_at_fall=np.where(down, load, self.load_at_fall),
            forgone_s=np.where(moved, 0.0, self.forgone_s),
        )


def noise_band(observation: Observation, spec: GuardrailSpec) -> Floats:
    """(n,) relative change of the offered load that may be noise of its estimate."""
    return clip(NOISE_MARGIN * observation.offered_load_error, LEAST_BAND, max(spec.noise_band, LEAST_BAND))

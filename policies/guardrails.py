"""Rules that settle every proposed target, in order, whichever policy proposed it.

Each rule is a small named function on arrays; a rule that cannot evaluate (missing data) keeps the current target, so
the list fails closed. The bounds come last and therefore always hold.
This module must not know about policies, I/O or wall time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from policies.contract import Bools, Floats, Ints, Observation, Reason, Target
from policies.fleet import Fleet
from policies.pool_arrays import any_pool, clip, min_pools, nan_to_zero, sum_pools
from policies.spec import GuardrailSpec
from policies.steadiness import ScalingHistory, noise_band

SMALL_STEP = 0.1
"""Share of the fleet below which a scale-down is small: what it saves is little beside the change."""


@dataclass(frozen=True, eq=False, slots=True)
class Situation:
    """What the rules look at."""

    observation: Observation
    fleet: Fleet
    spec: GuardrailSpec
    current: Ints  # (n, P) the target in force
    current_cap: Ints  # (n, P)
    history: ScalingHistory  # with this window and this proposal

    @property
    def limits(self) -> Limits:
        """The hard limits of all services."""
        return Limits(self.fleet.min_replicas, self.fleet.max_replicas, self.fleet.gpus, self.spec)

    @property
    def quiet_s(self) -> Floats:
        """(n,) since the last change of the total target."""
        quiet_s: Floats = self.observation.snapshot.time_s - self.history.changed_s
        return quiet_s


Rule = Callable[[Target, Situation], Target]


def hold_when_blind(target: Target, situation: Situation) -> Target:
    """Missing replica counts or load: keep the target in force, replicas and caps."""
    blind = situation.observation.blind
    if not blind.any():
        return target
    return Target(
        replicas=np.where(blind, situation.current.T, target.replicas.T).T,
        batch_cap=np.where(blind, situation.current_cap.T, target.batch_cap.T).T,
    )


def cover_backlog(target: Target, situation: Situation) -> Target:
    """The oldest request has waited longer than a start takes: ask at once for what the demand estimate needs.

    This is the last resort: it waits for a start and the TTFT objective, so a policy that had asked for enough when the
    wait began would have it by now. Acting earlier than that is the policy's business. A service with no replica at all
    waits only for half the objective. This rule only raises the target. The demand includes working off the backlog,
    see `policies.demand`. The fleet in force grows in its present proportions; what a pool at its maximum cannot take
    goes to the first pool with room.
    """
    if not situation.spec.backlog_boost:
        return target
    fleet = situation.fleet
    fastest_start_s = min_pools(np.where(fleet.exists, fleet.cold_start_s, np.inf))
    patience_s = np.where(any_pool(situation.current > 0), fastest_start_s + fleet.ttft_slo_s, 0.5 * fleet.ttft_slo_s)
    late = situation.observation.snapshot.oldest_wait_s > patience_s
    (rows,) = late.nonzero()
    if not len(rows):
        return target
    replicas = target.replicas.copy()
    replicas[rows] = _lifted(
        target.replicas[rows],
        situation.current[rows],
        # Someone waits: at least one replica. Absent pools cover nothing.
        np.where(fleet.exists[rows], np.maximum(situation.observation.demand[rows], 1e-3), np.inf),
        Limits(fleet.min_replicas[rows], fleet.max_replicas[rows], fleet.gpus[rows], situation.spec),
    )
    return Target(replicas=replicas, batch_cap=target.batch_cap)


def _lifted(proposed: Ints, current: Ints, demand: Floats, limits: Limits) -> Ints:
    """Replicas (k, P) that cover the demand (k, P), and no less than in force or proposed."""
    # The floor depends on what is in force alone, not on the proposal, so settling twice changes nothing.
    growth = 1.0 / clip(sum_pools(current / demand), 1e-6, 1.0)
    highest = np.maximum(limits.high, current)
    floor = np.minimum(np.ceil(current * growth[:, np.newaxis] - 1e-9), highest).astype(np.int64)
    for pool in range(floor.shape[1]):
        missing = np.ceil((1.0 - sum_pools(floor / demand)) * np.minimum(demand[:, pool], 1e9) - 1e-9)
        floor[:, pool] += clip(missing, 0, highest[:, pool] - floor[:, pool]).astype(np.int64)
    held = np.maximum(proposed, current)
    # A proposal counts for what the limits below will leave of it.
    reachable = limits.within_bounds(limits.within_step(held, current), current)
    reachable = limits.within_bounds(limits.within_budget(reachable, current), current)
    short = sum_pools(reachable / demand) < 1.0
    return np.where(short[:, np.newaxis], np.maximum(held, floor), held)


@dataclass(frozen=True, eq=False, slots=True)
class Limits:
    """The hard limits on replicas (k, P)."""

    low: Ints  # (k, P)
    high: Ints  # (k, P)
    gpus: Floats  # (k, P) per replica
    spec: GuardrailSpec

    def within_step(self, replicas: Ints, current: Ints) -> Ints:
        """No further from what is in force than one tick may go."""
        spec = self.spec
        highest = np.maximum(np.floor(current * spec.max_scale_up_factor), current + spec.max_scale_up_step)
        return clip(replicas, self.step_down(current), highest).astype(np.int64)

    def within_bounds(self, replicas: Ints, current: Ints) -> Ints:
        """Between minimum and maximum; a fleet above its maximum comes down to it one step per tick."""
        return clip(replicas, self.low, np.maximum(self.high, self.step_down(current))).astype(np.int64)

    def step_down(self, current: Ints) -> Floats:
        """(k, P) fewest replicas after one step."""
        lowest: Floats = current - np.maximum(np.ceil(current * self.spec.max_scale_down_share), 1.0)
        return lowest

    def within_budget(self, replicas: Ints, current: Ints) -> Ints:
        """First everything in force is kept, then pools grow in their order until the GPU budget is spent."""
        if self.spec.gpu_budget is None:
            return replicas
        kept = np.minimum(replicas, current)
        free = self.spec.gpu_budget - sum_pools(kept * self.gpus)
        settled = kept.copy()
        for pool in range(settled.shape[1]):
            gpus = np.maximum(self.gpus[:, pool], 1.0)
            grown = np.minimum(replicas[:, pool] - kept[:, pool], np.floor(np.maximum(free, 0.0) / gpus))
            settled[:, pool] += grown.astype(np.int64)
            free = free - grown * gpus
        return settled


def hold_down_while_burning(target: Target, situation: Situation) -> Target:
    """The last window missed its objectives more often than allowed, or nobody knows: no scale-down."""
    if not situation.spec.hold_down_while_burning:
        return target
    return _no_less(target, situation, burning(situation.observation, situation.fleet))


def burning(observation: Observation, fleet: Fleet) -> Bools:
    """(n,) services that missed their objectives more often than allowed in the last window, or nobody knows.

    Latencies are unknown in a window without a first token; that counts as burning only while requests wait, at the
    gateway or in the engines, or nobody knows whether they do.
    """
    snapshot = observation.snapshot
    attained = np.fmin(snapshot.ttft_attainment, snapshot.tpot_attainment)
    nobody_waits = snapshot.queue_requests + sum_pools(nan_to_zero(snapshot.waiting)) <= 0
    unknown = np.isnan(snapshot.ttft_attainment) & ~nobody_waits
    missed: Bools = (attained < fleet.attainment_target) | unknown
    return missed


def hold_down_while_starting(target: Target, situation: Situation) -> Target:
    """Replicas are on their way: see what they achieve before any are given back."""
    if not situation.spec.hold_down_while_starting:
        return target
    return _no_less(target, situation, sum_pools(situation.observation.snapshot.replicas_starting) > 0)


def limit_step(target: Target, situation: Situation) -> Target:
    """A bounded change per tick, up and down, per pool."""
    return Target(situation.limits.within_step(target.replicas, situation.current), target.batch_cap)


def cool_down(target: Target, situation: Situation) -> Target:
    """No scale-down soon after the last change."""
    return _no_less(target, situation, ~(situation.quiet_s >= situation.spec.scale_down_cooldown_s))


def stay_steady(target: Target, situation: Situation) -> Target:
    """Traffic has not fallen since the last change: a scale-down must be wished for long enough to be worth a change.

    It goes no lower than what was wished throughout the last windows. A small one, and one no larger than what was
    taken back before, waits until it would have saved its price. That price rises with every reversal, so a fleet that
    flaps soon stands still. What follows a fall of the offered load does not wait, nor does any scale-up.
    """
    spec, current, history = situation.spec, situation.current, situation.history
    steady = ~(history.fallen(situation.observation) >= noise_band(situation.observation, spec))
    wished = np.where(spec.scale_down_window_s > 0, np.minimum(history.highest_wish(), current), 0)
    lowest = np.where(steady[:, np.newaxis], np.maximum(target.replicas, wished), target.replicas)
    # The largest step that one tick may make is not small, however few replicas it takes.
    largest = any_pool((lowest < current) & (lowest <= situation.limits.step_down(current)))
    fall = sum_pools(np.maximum(current - lowest, 0))
    small = ~largest & (fall < SMALL_STEP * sum_pools(current))
    reversals = history.reversals_at(situation.observation.snapshot.time_s, spec)
    price_s = spec.scale_down_worth_s * ((spec.reversal_factor**reversals - 1.0) * (fall <= history.span) + small)
    return _no_less(Target(lowest, target.batch_cap), situation, steady & (history.forgone_s < price_s))


def keep_cap(target: Target, situation: Situation) -> Target:
    """A batch cap moves only where the change is more than the noise of its estimate, not at every tick."""
    now = situation.current_cap
    change = np.abs(np.minimum(target.batch_cap, situation.fleet.max_num_seqs) - now)  # of what the bounds will leave
    kept = (change > 0) & (change < situation.spec.batch_cap_band * now)
    return Target(target.replicas, np.where(kept, now, target.batch_cap)) if kept.any() else target


def keep_gpu_budget(target: Target, situation: Situation) -> Target:
    """Growth stops at the GPU budget: first everything in force is kept, then pools grow in their order."""
    return Target(situation.limits.within_budget(target.replicas, situation.current), target.batch_cap)


def keep_bounds(target: Target, situation: Situation) -> Target:
    """Minimum and maximum replicas; batch caps between 1 and the engine's own limit."""
    return Target(
        replicas=situation.limits.within_bounds(target.replicas, situation.current),
        batch_cap=clip(target.batch_cap, 1, situation.fleet.max_num_seqs).astype(np.int64),
    )


RULES: tuple[tuple[Reason, Rule], ...] = (
    (Reason.BACKLOG, cover_backlog),
    (Reason.SLO_BURNING, hold_down_while_burning),
    (Reason.REPLICAS_STARTING, hold_down_while_starting),
    (Reason.COOLDOWN, cool_down),
    (Reason.STEP_LIMIT, limit_step),
    (Reason.STEADY_TRAFFIC, stay_steady),
    (Reason.STEADY_TRAFFIC, keep_cap),
    (Reason.MISSING_METRICS, hold_when_blind),
    (Reason.BOUNDS, keep_bounds),
    (Reason.GPU_BUDGET, keep_gpu_budget),  # shared out among what the pools may really have
    (Reason.BOUNDS, keep_bounds),
)
"""The rules in the order of their application. Only the hard limits come after the hold of a blind tick."""


def settle(target: Target, situation: Situation) -> tuple[Target, Ints]:
    """Apply every rule; the settled target and (n,) flags of `Reason` for the rules that changed something."""
    # Without a budget nothing comes between the bounds and themselves.
    rules = RULES if situation.spec.gpu_budget is not None else RULES[:-2]
    reasons, replicas = [], [target.replicas.T]
    capped = np.zeros(len(target), np.int64)
    for reason, rule in rules:
        settled = rule(target, situation)
        if settled.replicas is not target.replicas:
            reasons.append([int(reason)])
            replicas.append(settled.replicas.T)
        if settled.batch_cap is not target.batch_cap:
            capped |= any_pool(settled.batch_cap != target.batch_cap) * int(reason)
        target = settled
    steps = np.array(replicas)
    changed = any_pool(steps[1:] != steps[:-1])  # (rules, n)
    return target, np.bitwise_or.reduce(changed * np.array(reasons), axis=0) | capped


def _no_less(target: Target, situation: Situation, rows: Bools) -> Target:
    """On the masked rows keep at least the replicas in force, pool by pool."""
    held = np.maximum(target.replicas, situation.current)
    return Target(replicas=np.where(rows[:, np.newaxis], held, target.replicas), batch_cap=target.batch_cap)

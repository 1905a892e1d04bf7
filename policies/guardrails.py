"""Rules that settle every proposed target, in order, whichever policy proposed it.

Each rule is a small named function on arrays; a rule that cannot evaluate (missing data) keeps the current target, so
the list fails closed. The bounds come last and therefore always hold.
This module must not know about policies, I/O or wall time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from policies.columns import any_pool, known, total
from policies.contract import Bools, Floats, Ints, Observation, Reason, Target, take_rows
from policies.fleet import Fleet
from policies.spec import GuardrailSpec


@dataclass(frozen=True, eq=False, slots=True)
class Situation:
    """What the rules look at."""

    observation: Observation
    fleet: Fleet
    spec: GuardrailSpec
    current: Ints  # (n, P) the target in force
    current_cap: Ints  # (n, P)
    quiet_s: Floats  # (n,) since the last change of the total target


Rule = Callable[[Target, Situation], Target]


def hold_when_blind(target: Target, situation: Situation) -> Target:
    """Missing replica counts or load: keep the target in force, replicas and caps."""
    blind = situation.observation.snapshot.blind()[:, np.newaxis]
    return Target(
        replicas=np.where(blind, situation.current, target.replicas),
        batch_cap=np.where(blind, situation.current_cap, target.batch_cap),
    )


def cover_backlog(target: Target, situation: Situation) -> Target:
    """The oldest request has waited for half the TTFT objective: ask at once for what the demand estimate needs.

    Only raises. The demand includes working off the backlog, see `policies.demand`. The fleet in force grows in its
    present proportions; what a pool at its maximum cannot take goes to the first pool with room.
    """
    if not situation.spec.backlog_boost:
        return target
    late = situation.observation.snapshot.oldest_wait_s > 0.5 * situation.fleet.ttft_slo_s
    rows = np.flatnonzero(late)
    if not len(rows):
        return target
    replicas = target.replicas.copy()
    replicas[rows] = _lifted(take_rows(target, rows), _of_rows(situation, rows), situation.observation.demand[rows])
    return Target(replicas=replicas, batch_cap=target.batch_cap)


def _of_rows(situation: Situation, rows: Ints) -> Situation:
    """The limits of the listed services (k,); their observation is left out of the copy."""
    return replace(
        situation,
        fleet=take_rows(situation.fleet, rows),
        current=situation.current[rows],
        current_cap=situation.current_cap[rows],
        quiet_s=situation.quiet_s[rows],
    )


def _lifted(target: Target, situation: Situation, demand: Floats) -> Ints:
    """Replicas (k, P) that cover the demand (k, P), and no less than in force or proposed."""
    fleet, current = situation.fleet, situation.current
    demand = np.maximum(demand, 1e-3)  # someone waits: at least one replica

    def covered(replicas: Ints) -> Floats:
        share: Floats = total(np.where(fleet.exists, replicas / demand, 0.0))
        return share

    # The floor depends on what is in force alone, not on the proposal, so settling twice changes nothing.
    growth = 1.0 / np.clip(covered(current), 1e-6, 1.0)
    highest = np.maximum(fleet.max_replicas, current)
    floor = np.minimum(np.ceil(current * growth[:, np.newaxis] - 1e-9), highest).astype(np.int64)
    for pool in range(fleet.pools):
        missing = np.ceil((1.0 - covered(floor)) * demand[:, pool] - 1e-9)
        floor[:, pool] += np.clip(missing, 0, highest[:, pool] - floor[:, pool]).astype(np.int64)
    held = np.maximum(target.replicas, current)
    # A proposal counts for what the limits below will leave of it.
    reachable = Target(held, target.batch_cap)
    for limit in (limit_step, keep_bounds, keep_gpu_budget, keep_bounds):
        reachable = limit(reachable, situation)
    short = covered(reachable.replicas) < 1.0
    return np.where(short[:, np.newaxis], np.maximum(held, floor), held)


def hold_down_while_burning(target: Target, situation: Situation) -> Target:
    """The last window missed its objectives more often than allowed, or nobody knows: no scale-down.

    Latencies are unknown in a window without a first token; that counts as burning only while requests wait, at the
    gateway or in the engines.
    """
    if not situation.spec.hold_down_while_burning:
        return target
    snapshot, fleet = situation.observation.snapshot, situation.fleet
    attained = np.fmin(snapshot.ttft_attainment, snapshot.tpot_attainment)
    waiting = known(snapshot.queue_requests, 1.0) + total(known(snapshot.waiting))
    unknown = np.isnan(snapshot.ttft_attainment) & (waiting > 0)
    burning = (attained < fleet.attainment_target) | unknown
    return _no_less(target, situation, burning)


def hold_down_while_starting(target: Target, situation: Situation) -> Target:
    """Replicas are on their way: judge them before any are given back."""
    if not situation.spec.hold_down_while_starting:
        return target
    return _no_less(target, situation, total(situation.observation.snapshot.replicas_starting) > 0)


def limit_step(target: Target, situation: Situation) -> Target:
    """A bounded change per tick, up and down, per pool."""
    spec, current = situation.spec, situation.current
    most = np.maximum(np.floor(current * spec.max_scale_up_factor), current + spec.max_scale_up_step)
    least = current - np.maximum(np.ceil(current * spec.max_scale_down_share), 1.0)
    return Target(
        replicas=np.clip(target.replicas, least, most).astype(np.int64),
        batch_cap=target.batch_cap,
    )


def cool_down(target: Target, situation: Situation) -> Target:
    """No scale-down soon after the last change."""
    return _no_less(target, situation, ~(situation.quiet_s >= situation.spec.scale_down_cooldown_s))


def keep_gpu_budget(target: Target, situation: Situation) -> Target:
    """Growth stops at the GPU budget: first everything in force is kept, then pools grow in their order."""
    budget = situation.spec.gpu_budget
    if budget is None:
        return target
    fleet = situation.fleet
    kept = np.minimum(target.replicas, situation.current)
    free = budget - total(kept * fleet.gpus)
    settled = kept.copy()
    for pool in range(fleet.pools):
        gpus = np.maximum(fleet.gpus[:, pool], 1.0)
        grown = np.minimum(target.replicas[:, pool] - kept[:, pool], np.floor(np.maximum(free, 0.0) / gpus))
        settled[:, pool] += grown.astype(np.int64)
        free = free - grown * gpus
    return Target(replicas=settled, batch_cap=target.batch_cap)


def keep_bounds(target: Target, situation: Situation) -> Target:
    """Minimum and maximum replicas; batch caps between 1 and the engine's own limit."""
    fleet = situation.fleet
    return Target(
        replicas=np.clip(target.replicas, fleet.min_replicas, fleet.max_replicas),
        batch_cap=np.clip(target.batch_cap, 1, fleet.max_num_seqs).astype(np.int64),
    )


RULES: tuple[tuple[Reason, Rule], ...] = (
    (Reason.BACKLOG, cover_backlog),
    (Reason.SLO_BURNING, hold_down_while_burning),
    (Reason.REPLICAS_STARTING, hold_down_while_starting),
    (Reason.COOLDOWN, cool_down),
    (Reason.STEP_LIMIT, limit_step),
    (Reason.MISSING_METRICS, hold_when_blind),
    (Reason.BOUNDS, keep_bounds),  # the budget is shared out among what the pools may really have
    (Reason.GPU_BUDGET, keep_gpu_budget),
    (Reason.BOUNDS, keep_bounds),
)
"""The rules in the order of their application. Only the hard limits come after the hold of a blind tick."""


def settle(target: Target, situation: Situation) -> tuple[Target, Ints]:
    """Apply every rule; the settled target and (n,) flags of `Reason` for the rules that changed something."""
    reasons = np.zeros(len(target), np.int64)
    for reason, rule in RULES:
        settled = rule(target, situation)
        if settled.replicas is not target.replicas:
            reasons |= np.where(any_pool(settled.replicas != target.replicas), int(reason), 0)
        if settled.batch_cap is not target.batch_cap:
            reasons |= np.where(any_pool(settled.batch_cap != target.batch_cap), int(reason), 0)
        target = settled
    return target, reasons


def _no_less(target: Target, situation: Situation, rows: Bools) -> Target:
    """On the masked rows keep at least the replicas in force, pool by pool."""
    held = np.maximum(target.replicas, situation.current)
    return Target(replicas=np.where(rows[:, np.newaxis], held, target.replicas), batch_cap=target.batch_cap)

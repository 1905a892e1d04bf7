"""Recorded snapshots through another policy: what it would have asked for, tick by tick.

The recorded world does not react to what is replayed: at each tick, the target in force is the recorded one.
This module must not know where ticks are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from autoscaler.controller import nothing_known
from autoscaler.records.ticks import Tick
from policies.contract import Decision, Floats, Policy, put_rows, take_rows
from policies.cost_rates import modelled_cost
from policies.decider import Decider
from policies.spec import ScalingSpec


@dataclass(frozen=True, eq=False)
class Replayed:
    """One tick of a replay.

    Attributes:
        tick: identifier of the recorded one.
        present: (n,) services that the recorded tick holds.
        decision: of the policy that was replayed.
        usd_per_hour: (n,) modelled, of its target.
        recorded: (n, P) replicas that were settled on in the record, -1 where absent.
        recorded_usd_per_hour: (n,) modelled, of those.
    """

    tick: int
    present: np.ndarray
    decision: Decision
    usd_per_hour: Floats
    recorded: np.ndarray
    recorded_usd_per_hour: Floats


def replay(ticks: Sequence[Tick], specs: Sequence[ScalingSpec], decider: Decider, policy: Policy) -> list[Replayed]:
    """Run ticks, oldest first, through a fresh core and a policy for the services of `specs`."""
    rows = {spec.service: row for row, spec in enumerate(specs)}
    overhead_rate = np.array([spec.objective.overhead_rate for spec in specs])
    interval_s = specs[0].interface.window.control_interval_s
    found = []
    for tick in ticks:
        places = {rows[name]: place for place, name in enumerate(tick.services) if name in rows}
        if not places:
            continue
        own, theirs = np.array(list(places)), np.array(list(places.values()))
        snapshot = nothing_known(tick.time_s, interval_s, decider)
        blank = take_rows(snapshot, np.arange(len(specs)))
        width = min(decider.fleet.pools, tick.arrays["settled/replicas"].shape[1])
        part = take_rows(tick.snapshot, theirs)
        for name in type(part).__dataclass_fields__:
            array, values = getattr(blank, name), getattr(part, name)
            if array.ndim > 1:
                array[own, :width] = values[:, :width]
            else:
                array[own] = values
        put_rows(snapshot, np.arange(len(specs)), blank)
        decider.release(np.ones(len(specs), bool))
        observation = decider.observe(blank)
        decision = decider.decide(observation, policy)
        recorded = np.full(decider.fleet.exists.shape, -1, np.int64)
        recorded[own, :width] = tick.arrays["settled/replicas"][theirs, :width]
        present = np.zeros(len(specs), bool)
        present[own] = True
        cost = modelled_cost(decision.settled.replicas, observation, decider.fleet, overhead_rate)
        theirs_cost = modelled_cost(np.maximum(recorded, 0), observation, decider.fleet, overhead_rate)
        found.append(Replayed(tick.id, present, decision, cost.usd_per_hour, recorded, theirs_cost.usd_per_hour))
    return found


def summary(replayed: Sequence[Replayed], specs: Sequence[ScalingSpec]) -> list[dict[str, Any]]:
    """One row per service: ticks, ticks with another target, mean replicas and modelled dollars per hour of both."""
    rows = []
    for row, spec in enumerate(specs):
        own = [item for item in replayed if item.present[row]]
        if not own:
            continue
        ours = np.array([item.decision.settled.replicas[row].sum() for item in own])
        theirs = np.array([item.recorded[row].sum() for item in own])
        rows.append(
            {
                "service": spec.service,
                "ticks": len(own),
                "different": int((ours != theirs).sum()),
                "replicas": float(ours.mean()),
                "recorded_replicas": float(theirs.mean()),
                "usd_per_hour": float(np.mean([item.usd_per_hour[row] for item in own])),
                "recorded_usd_per_hour": float(np.mean([item.recorded_usd_per_hour[row] for item in own])),
            }
        )
    return rows

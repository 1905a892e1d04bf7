"""One recorded decision in words, and as plain data.

This module must not know how decisions are made or kept; it only reads what was recorded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from autoscaler.records.ticks import Tick
from autoscaler.versions.ladder import Rung
from policies.contract import Reason

MEANINGS: dict[Reason, str] = {
    Reason.MISSING_METRICS: "replica counts or any sign of load were missing, so nothing was changed",
    Reason.BACKLOG: "the oldest request had waited for half the TTFT objective, so the demand was covered at once",
    Reason.SLO_BURNING: "objectives were being missed, so no replica was given back",
    Reason.REPLICAS_STARTING: "replicas were still starting, so none was given back",
    Reason.STEP_LIMIT: "the step was larger than one tick may make",
    Reason.COOLDOWN: "the last change was too recent for a scale-down",
    Reason.GPU_BUDGET: "the GPU budget was reached",
    Reason.BOUNDS: "a pool's minimum or maximum, or the engine's own batch limit, was reached",
    Reason.POLICY_FAILED: "a policy failed, and the next rung of the ladder took over",
    Reason.ACTUATION_FAILED: "the target could not be carried out; the next tick tries again",
    Reason.BUNDLE_REFUSED: "no learned policy could be used, so the baseline decided",
    Reason.OUT_OF_RANGE: "the observation lay outside the training range, so the baseline decided",
    Reason.PARTLY_BLIND: "some measurements were missing, so the baseline decided",
    Reason.BURNING_WHILE_SHRINKING: "the learned policy asked for less while objectives were missed, so the baseline "
    "decided",
    Reason.PAUSED: "the service is paused",
    Reason.KILL_SWITCH: "the kill switch is engaged",
    Reason.NOT_LEADER: "another controller holds the lease, or this one could not renew it",
    Reason.FOREIGN_EDIT: "somebody else has changed the replicas; their edit is left alone for a while",
    Reason.OTHER_AUTOSCALER: "another autoscaler acts on the same target",
    Reason.OWNER_UNKNOWN: "it could not be read whether another autoscaler acts on the same target",
    Reason.REVALIDATING: "a scale-down is looked at a second time before it is carried out",
    Reason.NOT_RECORDED: "the decision could not be recorded, so it was not carried out",
    Reason.OVERDUE: "the decision was too old when its turn came",
}


def explained(tick: Tick, service: str, outcome: str, reasons: int, pools: Sequence[str]) -> dict[str, Any]:
    """One decision as plain data.

    Args:
        tick: the recorded tick.
        service: which of its services.
        outcome: what became of it.
        reasons: flags of `Reason`.
        pools: names of the service's pools.

    Raises:
        ValueError: when the service is not part of the tick.
    """
    row = tick.services.index(service)
    arrays = {name: array[row] for name, array in tick.arrays.items()}
    names = sorted({name.split("/")[0] for name in arrays if name.startswith("peer ")})

    def pool_values(name: str) -> dict[str, Any]:
        return {pool: _plain(arrays[name][column]) for column, pool in enumerate(pools)}

    def cost(name: str) -> dict[str, Any]:
        return {field: _plain(arrays[f"{name}/{field}"]) for field in ("usd_per_hour", "usd_per_mtok", "served_share")}

    return {
        "service": service,
        "tick": tick.id,
        "time": datetime.fromtimestamp(tick.time_s, UTC).isoformat(timespec="seconds"),
        "mode": str(arrays["mode"]),
        "policy": tick.policy,
        "rung": Rung(int(arrays["rung"])).name.lower(),
        "distance": _plain(arrays["distance"]),
        "snapshot": tick.snapshot.row(row),
        "demand": pool_values("demand"),
        "in_force": pool_values("in_force"),
        "proposed": {"replicas": pool_values("proposed/replicas"), "batch_cap": pool_values("proposed/batch_cap")},
        "settled": {"replicas": pool_values("settled/replicas"), "batch_cap": pool_values("settled/batch_cap")},
        "outcome": outcome,
        "reasons": Reason(reasons).words(),
        "cost": cost("own"),
        "counterfactuals": {
            name.removeprefix("peer "): {
                "replicas": pool_values(f"{name}/replicas"),
                "batch_cap": pool_values(f"{name}/batch_cap"),
                **cost(name),
            }
            for name in names
        },
        "seconds": tick.seconds,
        "fencing_token": int(arrays["token"]),
    }


def in_words(decision: dict[str, Any]) -> str:
    """What `explained` gives, as a few lines of text."""
    seen = decision["snapshot"]
    lines = [
        f"{decision['service']} at {decision['time']} (tick {decision['tick']}), mode {decision['mode']}",
        "",
        f"Seen: {_number(seen['arrival_rps'])} requests/s, {_number(_sum(seen['prompt_tps'], seen['generation_tps']))} "
        f"tokens/s, {_number(seen['queue_requests'])} waiting at the gateway, the oldest for "
        f"{_number(seen['oldest_wait_s'])} s; {_share(seen['ttft_attainment'])} of first tokens and "
        f"{_share(seen['tpot_attainment'])} of requests in time.",
    ]
    for column, pool in enumerate(decision["settled"]["replicas"]):
        lines.append(
            f"Pool {pool}: {_number(seen['replicas_ready'][column])} ready, "
            f"{_number(seen['replicas_starting'][column])} starting, asked for {decision['in_force'][pool]}; "
            f"demand {_number(decision['demand'][pool])} replicas."
        )
    far = decision["distance"]
    lines += [
        f"Proposed by {_rung(decision)}: {_target(decision['proposed'])}."
        + (f" The observation lay {far:.2f} widths outside the training range." if far else ""),
        f"Settled: {_target(decision['settled'])}, {_money(decision['cost'])}.",
        f"Outcome: {decision['outcome']}.",
    ]
    words = {reason.words()[0]: text for reason, text in MEANINGS.items()}
    lines += [f"  {reason}: {words[reason]}." for reason in decision["reasons"]]
    for name, peer in decision["counterfactuals"].items():
        lines.append(f"{name} would have asked for {_target(peer)}, {_money(peer)}.")
    if decision["seconds"]:
        took = ", ".join(f"{stage} {seconds * 1e3:.0f} ms" for stage, seconds in decision["seconds"].items())
        lines.append(f"Took: {took}.")
    return "\n".join(lines)


def _rung(decision: dict[str, Any]) -> str:
    names = {"learned": f"the learned policy ({decision['policy']})", "baseline": "the baseline", "hold": "nobody"}
    return names[decision["rung"]]


def _target(target: dict[str, Any]) -> str:
    return "; ".join(
        f"{pool} {count} replicas with cap {target['batch_cap'][pool]}" for pool, count in target["replicas"].items()
    )


def _money(cost: dict[str, Any]) -> str:
    per_mtok = cost["usd_per_mtok"]
    tail = "" if per_mtok is None else f", {per_mtok:.3f} $ per million tokens, {cost['served_share']:.0%} served"
    return f"{cost['usd_per_hour']:.2f} $/h{tail} as modelled"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.1f}".removesuffix(".0")


def _share(value: float | None) -> str:
    return "an unknown share" if value is None else f"{value:.1%}"


def _sum(*values: float | None) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _plain(value: Any) -> Any:
    number = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(number, float) and math.isnan(number) else number

"""One recorded decision in words, and as plain data.

This module must not know how decisions are made or kept; it only reads what was recorded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from autoscaler.records.ticks import Tick
from autoscaler.versions.ladder import ALWAYS_MEASURED, Rung
from policies.contract import Reason

MEANINGS: dict[Reason, str] = {
    Reason.MISSING_METRICS: "replica counts or any sign of load were missing, so nothing was changed",
    Reason.BACKLOG: "the oldest request had waited longer than a start takes, so the demand was covered at once",
    Reason.SLO_BURNING: "objectives were being missed, so no replica was given back",
    Reason.REPLICAS_STARTING: "replicas were still starting, so none was given back",
    Reason.STEP_LIMIT: "the step was larger than one tick may make",
    Reason.COOLDOWN: "the last change was too recent for a scale-down",
    Reason.STEADY_TRAFFIC: "the mean load of the last five minutes had not clearly fallen since the last change, so "
    "less or nothing was given back, or a small change of a batch cap was left out",
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
    Reason.DRAINING: "the replicas to remove finish their requests first, so the count stays until then",
    Reason.NOT_RECORDED: "the decision could not be recorded, so it was not carried out",
    Reason.OVERDUE: "the decision was too old when its turn came, or nobody could be asked in time who may act",
}


COUNTS = ("replicas_target", "replicas_starting", "replicas_ready")


def missing(measured: Mapping[str, Any]) -> str:
    """Which measurements a decision needed and did not have, in words; empty when none.

    Args:
        measured: those of one service, as `Snapshot.row` gives them.
    """
    names = [name for name in (*COUNTS, *ALWAYS_MEASURED) if None in np.ravel(measured[name])]
    return f"missing: {', '.join(names)}" if names else ""


LACKING = Reason.MISSING_METRICS | Reason.PARTLY_BLIND
"""Reasons that say that something was missing."""


def meaning(reason: Reason, measured: Mapping[str, Any]) -> str:
    """A reason in words, with what was missing where it was that.

    Args:
        reason: one code.
        measured: what was measured of the service, as `Snapshot.row` gives it; asked of `LACKING` alone.
    """
    names = missing(measured) if reason & LACKING else ""
    return MEANINGS[reason] + (f" ({names})" if names else "")


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
    # What was settled says nothing where nobody knows what is in force, and a model says nothing without load.
    lost = bool((arrays["in_force"] < 0).any())
    blind = lost or bool(Reason.MISSING_METRICS & reasons)

    def pool_values(name: str, known: bool = True) -> dict[str, Any]:
        return {pool: _plain(arrays[name][column]) if known else None for column, pool in enumerate(pools)}

    def target(name: str, known: bool = True) -> dict[str, Any]:
        return {field: pool_values(f"{name}/{field}", known) for field in ("replicas", "batch_cap")}

    def cost(name: str, known: bool) -> dict[str, Any]:
        values = {field: _plain(arrays[f"{name}/{field}"]) for field in ("usd_per_mtok", "served_share")}
        hourly = _plain(arrays[f"{name}/usd_per_hour"]) if known else None
        return {"usd_per_hour": hourly, **(dict.fromkeys(values) if blind else values)}

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
        "in_force": pool_values("in_force", not lost),
        "proposed": target("proposed"),
        "settled": target("settled", not lost),
        "outcome": outcome,
        "reasons": Reason(reasons).words(),
        "hold": str(arrays.get("hold", "")),  # a record of an earlier version has none
        "cost": cost("own", not lost),
        "counterfactuals": {
            name.removeprefix("peer "): {**target(name, not blind), **cost(name, not blind)} for name in names
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
            f"{_number(seen['replicas_starting'][column])} starting, asked for {_number(decision['in_force'][pool])}; "
            f"demand {_number(decision['demand'][pool])} replicas."
        )
    far = decision["distance"]
    lines += [
        f"Proposed by {_rung(decision)}: {_target(decision['proposed'])}."
        + (f" The observation lay {far:.2f} widths outside the training range." if far else ""),
        f"Settled: {_target(decision['settled'])}{_money(decision['cost'])}.",
        f"Outcome: {decision['outcome']}.",
    ]
    lines += [f"  {reason}: {meaning(Reason[reason.upper()], seen)}." for reason in decision["reasons"]]
    if decision["hold"]:
        lines.append(f"  {decision['hold']}.")
    for name, peer in decision["counterfactuals"].items():
        lines.append(f"{name} would have asked for {_target(peer)}{_money(peer)}.")
    if decision["seconds"]:
        took = ", ".join(f"{stage} {seconds * 1e3:.0f} ms" for stage, seconds in decision["seconds"].items())
        lines.append(f"Took: {took}.")
    return "\n".join(lines)


def _rung(decision: dict[str, Any]) -> str:
    names = {"learned": f"the learned policy ({decision['policy']})", "baseline": "the baseline", "hold": "nobody"}
    return names[decision["rung"]]


def _target(target: dict[str, Any]) -> str:
    if None in target["replicas"].values():
        return "unknown"
    return "; ".join(
        f"{pool} {count} replicas with cap {target['batch_cap'][pool]}" for pool, count in target["replicas"].items()
    )


def _money(cost: dict[str, Any]) -> str:
    if cost["usd_per_hour"] is None:
        return ""
    per_mtok = cost["usd_per_mtok"]
    tail = "" if per_mtok is None else f", {per_mtok:.3f} $ per million tokens, {cost['served_share']:.0%} served"
    return f", {cost['usd_per_hour']:.2f} $/h{tail} as modelled"


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

"""Every kind of fault that the hostile suite draws, whichever world plays it.

This module must not know how a fault is played.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Scope = Literal["service", "controller"]


@dataclass(frozen=True)
class Kind:
    """One kind of fault.

    Attributes:
        words: what happens, for the documentation.
        scope: whether one service suffers or all of the controller's.
        ticks: (least, most) ticks that it lasts; (0, 0) is over at once.
        after_ticks: ticks after its end in which a hold is still its own, beyond the two that every recovery has.
        weight: how often it is drawn, relative to the others.
        database: whether it blocks the database, or needs it to begin and to end; no storm has both.
        slot: of the kinds that share one, a storm has one: each would end the other.
        restarts: at its end a controller starts, which takes a process its time.
    """

    words: str
    scope: Scope
    ticks: tuple[int, int] = (1, 12)
    after_ticks: int = 0
    weight: float = 1.0
    database: Literal["", "blocks", "needs"] = ""
    slot: str = ""
    restarts: bool = False


EDIT_HOLD_TICKS = 6
"""`edit_hold_s` of both worlds, in ticks."""

KINDS: Mapping[str, Kind] = {
    # Metrics
    "metrics down": Kind("Prometheus does not answer", "controller", slot="answers"),
    "metrics 401": Kind("Prometheus answers 401", "controller", slot="answers"),
    "metrics 429": Kind("Prometheus answers 429", "controller", slot="answers"),
    "metrics 503": Kind("Prometheus answers 503", "controller", slot="answers"),
    "metrics slow": Kind("Prometheus answers after its deadline", "controller", ticks=(1, 6), slot="answers"),
    "metrics cut": Kind("Prometheus ends its answers in the middle", "controller", slot="answers"),
    "metrics HTML": Kind("Prometheus answers 200 with a page of HTML", "controller", slot="answers"),
    "metrics matrix": Kind("Prometheus answers 200 with a matrix instead of a vector", "controller", slot="answers"),
    "metrics nulls": Kind("Prometheus answers 200 with nulls for samples", "controller", slot="answers"),
    "metrics gap": Kind("Prometheus answers, and scrapes nothing", "controller", after_ticks=2),
    "metrics of a service missing": Kind("a service's series are gone", "service", after_ticks=2, slot="missing"),
    "metrics of replicas missing": Kind(
        "half of a service's replicas are not scraped", "service", after_ticks=2, slot="missing"
    ),
    "metrics twice": Kind("a service's replicas are scraped twice under other labels", "service", after_ticks=2),
    "latency missing": Kind("a service's latency histograms are gone", "service", after_ticks=2),
    "metrics implausible": Kind("a service's engines report negative, huge or non-numbers", "service"),
    "metrics frozen": Kind(
        "Prometheus goes on answering with one old window", "controller", ticks=(1, 8), after_ticks=2, slot="clock"
    ),
    "metrics clock back": Kind(
        "Prometheus's clock goes back by an hour", "controller", ticks=(1, 8), after_ticks=2, slot="clock"
    ),
    "metrics clock ahead": Kind(
        "Prometheus's clock runs ahead by an hour", "controller", ticks=(1, 8), after_ticks=2, slot="clock"
    ),
    # Cluster
    "API down": Kind("the API server does not answer", "controller", slot="API"),
    "API 403": Kind("the API server refuses everything with 403", "controller", slot="API"),
    "API 500": Kind("the API server fails with 500", "controller", slot="API"),
    "API slow": Kind("the API server answers after the time-out", "controller", ticks=(1, 6), slot="API"),
    "writes 403": Kind("writes to a service's count are refused", "service"),
    "writes 409": Kind("writes to a service's count meet a conflict", "service"),
    "writes cut": Kind("a service's count is written, and the answer is cut", "service"),
    "counts unknown": Kind("a service's replicas cannot be counted", "service"),
    "HPA": Kind("an HPA on the same target appears", "service"),
    "owners unreadable": Kind("HPAs cannot be listed", "controller"),
    "foreign edit": Kind("somebody sets another replica count", "service", (0, 0), EDIT_HOLD_TICKS, weight=2.0),
    "pods killed": Kind("half of a service's replicas die", "service", (0, 0), weight=2.0),
    "pods replaced": Kind("all of a service's replicas are replaced, at other addresses", "service", (0, 0)),
    "pods never ready": Kind("what a service starts does not get ready", "service", (4, 20)),
    # Gateway
    "gateway restarted": Kind(
        "HAProxy is restarted and has forgotten every server that was added", "controller", (0, 0)
    ),
    "gateway frozen": Kind("HAProxy is stopped by a signal, then goes on", "controller", ticks=(1, 6)),
    "gateway socket missing": Kind("HAProxy's socket is not there", "controller"),
    # Database and disk
    "database locked": Kind("another process locks the database", "controller", database="blocks"),
    "database full": Kind("no decision can be written: the disk is full", "controller", database="needs"),
    # Controller
    "controller killed": Kind("kill -9, and a restart", "controller", ticks=(0, 4), weight=2.0, restarts=True),
    "killed before the act": Kind("kill -9 between the record and the act", "controller", (0, 0), slot="kill"),
    "killed after the act": Kind("kill -9 between the act and its conclusion", "controller", (0, 0), slot="kill"),
    "second controller": Kind("a second controller runs", "controller", ticks=(2, 15)),
    "lease lost": Kind("another controller holds the leases", "controller", ticks=(1, 4), database="needs"),
    "slow tick": Kind("reading takes longer than a decision may be old", "controller", (0, 0)),
    "wall clock jumps": Kind("the host's clock jumps by a day", "controller"),
    "bad bundle": Kind("a new policy bundle is corrupt", "controller", ticks=(2, 12), weight=0.5, restarts=True),
    # Orders
    "kill file": Kind("the kill-switch file is there", "controller"),
    "kill order": Kind("the kill switch is ordered", "controller", database="needs"),
    "paused": Kind("a service is paused", "service", weight=1.5, database="needs", slot="mode"),
    "advised": Kind("a service is set to advise", "service", database="needs", slot="mode"),
    "maximum lowered": Kind(
        "the maximum is lowered below what runs, by a restart", "controller", ticks=(6, 20), restarts=True
    ),
}

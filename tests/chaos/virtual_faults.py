"""How the world in process plays each kind of fault: what begins it, and what ends it.

This module must not know what must hold.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from autoscaler.authority.controls import Controls, Mode
from autoscaler.records.database import Database
from policies.contract import LEAVE_ALONE
from tests.chaos.schedule import Event
from tests.chaos.shared_faults import bad_bundle, database, fill, free_leases, lock, lower_maximum, take_leases
from tests.chaos.undoing import Undo, each, nothing

if TYPE_CHECKING:
    from tests.chaos.virtual_world import VirtualWorld

Play = Callable[["VirtualWorld", Event], Undo]
BLINDING = ("down", "401", "429", "503", "slow", "cut", "HTML", "matrix", "nulls")
"""Ways in which Prometheus can answer nothing that counts."""


class Killed(BaseException):
    """The process is gone."""


def flag(name: str, value: Any, off: Any) -> Play:
    """An attribute of the cluster while the fault lasts."""

    def play(world: VirtualWorld, event: Event) -> Undo:
        setattr(world.cluster, name, value)
        return lambda: setattr(world.cluster, name, off)

    return play


def member(name: str) -> Play:
    """The service's row in one of the cluster's sets while the fault lasts."""

    def play(world: VirtualWorld, event: Event) -> Undo:
        getattr(world.cluster, name).add(event.row)
        return lambda: getattr(world.cluster, name).discard(event.row)

    return play


def answers(fault: str) -> Play:
    """What Prometheus answers while the fault lasts."""

    def play(world: VirtualWorld, event: Event) -> Undo:
        world.cluster.prometheus.fault = fault
        return lambda: setattr(world.cluster.prometheus, "fault", "")

    return play


def shared(name: str, value: Callable[[Event], float]) -> Play:
    """The service's value in one of the cluster's mappings while the fault lasts."""

    def play(world: VirtualWorld, event: Event) -> Undo:
        getattr(world.cluster, name)[event.row] = value(event)
        return lambda: getattr(world.cluster, name).pop(event.row)

    return play


def frozen(world: VirtualWorld, event: Event) -> Undo:
    prometheus = world.cluster.prometheus
    prometheus.frozen_s = prometheus.time_s
    return lambda: setattr(prometheus, "frozen_s", None)


def shifted(seconds: float) -> Play:
    """Its clock jumps and back again; each time it begins with an empty memory, as it takes no sample of its past."""

    def jump(world: VirtualWorld, ahead_s: float) -> None:
        world.cluster.prometheus.ahead_s = ahead_s
        world.cluster.prometheus.forget()

    def play(world: VirtualWorld, event: Event) -> Undo:
        jump(world, seconds)
        return lambda: jump(world, 0.0)

    return play


def hpa(world: VirtualWorld, event: Event) -> Undo:
    def own(word: str) -> None:
        owners = list(world.cluster.owners)
        owners[event.row] = word
        world.cluster.owners = tuple(owners)

    own("HorizontalPodAutoscaler made by somebody")
    # It is read with a tick, and a tick under way may not know it yet.
    undo = world.forbid(event.kind, event.row, "an HPA is on the target")
    return each(lambda: own(""), undo)


def owners_unreadable(world: VirtualWorld, event: Event) -> Undo:
    world.cluster.owners_unread = tuple(range(len(world.services)))
    undo = world.forbid(event.kind, -1, "nobody can read who else scales")
    return each(lambda: setattr(world.cluster, "owners_unread", ()), undo)


def foreign_edit(world: VirtualWorld, event: Event) -> Undo:
    wanted = [[LEAVE_ALONE]] * len(world.services)
    wanted[event.row] = [1 + int(event.value * world.largest)]
    world.cluster.set(wanted)
    return nothing


def pods_lost(share: float) -> Play:
    def play(world: VirtualWorld, event: Event) -> Undo:
        world.cluster.lose(event.row, share)
        return nothing

    return play


def never_ready(world: VirtualWorld, event: Event) -> Undo:
    world.cluster.stall(event.row, True)
    return lambda: world.cluster.stall(event.row, False)


def locked(world: VirtualWorld, event: Event) -> Undo:
    release = lock(database(world))
    return each(release, world.forbid(event.kind, -1, "the database is locked"))


def full(world: VirtualWorld, event: Event) -> Undo:
    empty = fill(database(world))
    return each(empty, world.forbid(event.kind, -1, "the disk is full"))


def killed(world: VirtualWorld, event: Event) -> Undo:
    world.service, world.back_at = None, event.end
    return nothing


def killed_in_tick(moment: str) -> Play:
    def play(world: VirtualWorld, event: Event) -> Undo:
        def kill() -> None:
            raise Killed

        setattr(world.cluster, moment, kill)
        return lambda: setattr(world.cluster, moment, lambda: None)

    return play


def second_controller(world: VirtualWorld, event: Event) -> Undo:
    world.second = world.start()
    if world.second is not None:
        world.second.leases.holder = "elsewhere/1/1/1"  # type: ignore[attr-defined]

    def end() -> None:
        if world.second is not None:
            world.second.close()
        world.second = None

    return end


def lease_lost(world: VirtualWorld, event: Event) -> Undo:
    with suppress(sqlite3.Error):
        take_leases(database(world))
    undo = world.forbid(event.kind, -1, "another controller holds the lease")
    return each(lambda: free_leases(database(world)), undo)


def slow_tick(world: VirtualWorld, event: Event) -> Undo:
    world.cluster.slow_read_s = 45.0
    return nothing


def clock_jump(world: VirtualWorld, event: Event) -> Undo:
    real, jump_s = time.time, 86400.0 if event.value > 0.5 else -86400.0
    time.time = lambda: real() + jump_s
    return lambda: setattr(time, "time", real)


def kill_file(world: VirtualWorld, event: Event) -> Undo:
    (world.folder / "STOP").touch()
    undo = world.forbid(event.kind, -1, "the kill file is there")
    return each(lambda: (world.folder / "STOP").unlink(missing_ok=True), undo)


def order(world: VirtualWorld, give: Callable[[Controls], object]) -> bool:
    """Give an order; whether it came through: not while the database is locked or full."""
    database = Database(f"sqlite:///{world.folder / 'jevons.db'}")
    try:
        give(Controls(database))
        return True
    except OSError:
        return False
    finally:
        database.close()


def insist(world: VirtualWorld, event: Event, give: Callable[[Controls], object]) -> None:
    """Give the order that ends a fault, at once or at the first tick that takes it."""
    if not order(world, give):
        raise AssertionError(f"{event}: the order to end it did not come through")


def kill_order(world: VirtualWorld, event: Event) -> Undo:
    given = order(world, lambda controls: controls.kill())
    undo = world.forbid(event.kind, -1, "the kill switch is ordered") if given else nothing
    return each(lambda: insist(world, event, lambda controls: controls.revive()), undo)


def moded(mode: Mode) -> Play:
    def play(world: VirtualWorld, event: Event) -> Undo:
        name = world.services[event.row]
        given = order(world, lambda controls: controls.set_mode([name], mode))
        undo = world.forbid(event.kind, event.row, f"its mode is {mode.value}") if given else nothing
        return each(lambda: insist(world, event, lambda controls: controls.set_mode([name], Mode.ACT)), undo)

    return play


def maximum_lowered(world: VirtualWorld, event: Event) -> Undo:
    return lower_maximum(world, 2 + int(event.value * 3))


PLAYS: dict[str, Play] = {
    **{f"metrics {fault}": answers(fault) for fault in BLINDING},
    "metrics gap": flag("gap", True, False),
    "metrics of a service missing": shared("missing", lambda event: 1.0),
    "metrics of replicas missing": shared("missing", lambda event: 0.5),
    "metrics twice": shared("twice", lambda event: 1.0 if event.value < 0.5 else 0.6),
    "latency missing": member("no_latency"),
    "metrics implausible": shared("implausible", lambda event: event.value),
    "metrics frozen": frozen,
    "metrics clock back": shifted(-3600.0),
    "metrics clock ahead": shifted(3600.0),
    "API down": flag("unreadable", "https://kubernetes: no answer", ""),
    "writes 403": member("refused_rows"),
    "writes cut": member("cut"),
    "counts unknown": member("uncounted"),
    "HPA": hpa,
    "owners unreadable": owners_unreadable,
    "foreign edit": foreign_edit,
    "pods killed": pods_lost(0.5),
    "pods replaced": pods_lost(1.0),
    "pods never ready": never_ready,
    "gateway socket missing": flag("unroutable", True, False),
    "database locked": locked,
    "database full": full,
    "controller killed": killed,
    "killed before the act": killed_in_tick("before_apply"),
    "killed after the act": killed_in_tick("after_apply"),
    "second controller": second_controller,
    "lease lost": lease_lost,
    "slow tick": slow_tick,
    "wall clock jumps": clock_jump,
    "bad bundle": bad_bundle,
    "kill file": kill_file,
    "kill order": kill_order,
    "paused": moded(Mode.PAUSED),
    "advised": moded(Mode.ADVISE),
    "maximum lowered": maximum_lowered,
}

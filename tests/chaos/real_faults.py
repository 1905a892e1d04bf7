"""How the world of real servers plays each kind of fault: what begins it, and what ends it.

This module must not know what must hold.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from kube_objects import DEPLOYMENTS, delete
from servers import Process

from autoscaler.actuators.kube_api import KubeError
from autoscaler.authority.controls import Controls, Mode
from tests.chaos.schedule import Event
from tests.chaos.shared_faults import bad_bundle, database, fill, free_leases, lock, lower_maximum, take_leases
from tests.chaos.undoing import Undo, each, nothing

if TYPE_CHECKING:
    from tests.chaos.real_world import RealWorld

Play = Callable[["RealWorld", Event], Undo]
Fault = Callable[[str, str], Any]
"""What a proxy does with a method and a path."""
HPAS = "/apis/autoscaling/v1/namespaces/default/horizontalpodautoscalers"
MATRIX = b'{"status":"success","data":{"resultType":"matrix","result":[{"metric":{},"values":[[1,"1"]]}]}}'
NULLS = b'{"status":"success","data":{"resultType":"vector","result":[{"metric":null,"value":null}]}}'


def prometheus_answers(fault: Any) -> Play:
    def play(world: RealWorld, event: Event) -> Undo:
        world.prometheus_faults[event.kind] = lambda method, path: fault
        return lambda: world.prometheus_faults.pop(event.kind)

    return play


def kube_answers(fault: Any, one: bool = False) -> Play:
    """All of the API server, or writes to the count of one service."""

    def play(world: RealWorld, event: Event) -> Undo:
        ours = f"/deployments/{world.services[event.row]}"

        def answer(method: str, path: str) -> Any:
            written = method in ("PUT", "PATCH") and ours in path
            return fault if written or not one else None

        world.kube_faults[event.kind] = answer
        return lambda: world.kube_faults.pop(event.kind)

    return play


def scraped(name: str, value: Callable[[Event], float]) -> Play:
    def play(world: RealWorld, event: Event) -> Undo:
        fleet = world.fleets[event.row]

        def put(share: float) -> None:
            setattr(fleet, name, share)
            fleet.rescrape()

        put(value(event))
        return lambda: put(0.0)

    return play


def hpa(world: RealWorld, event: Event) -> Undo:
    name = world.services[event.row]
    scaled = {"apiVersion": "apps/v1", "kind": "Deployment", "name": name}
    world.api.post(HPAS, {"metadata": {"name": name}, "spec": {"maxReplicas": 9, "scaleTargetRef": scaled}})
    undo = world.forbid(event, "an HPA is on the target")
    return each(lambda: delete(world.api, f"{HPAS}/{name}"), undo)


def owners_unreadable(world: RealWorld, event: Event) -> Undo:
    world.kube_faults[event.kind] = lambda method, path: 500 if path.endswith("/horizontalpodautoscalers") else None
    undo = world.forbid(event, "nobody can read who else scales")
    return each(lambda: world.kube_faults.pop(event.kind), undo)


def foreign_edit(world: RealWorld, event: Event) -> Undo:
    name, count = world.services[event.row], 1 + int(event.value * world.largest)
    path = f"{DEPLOYMENTS}/{name}/scale"
    for _ in range(5):
        with suppress(KubeError):
            scale = world.api.get(path)
            if scale["spec"].get("replicas") == count:
                break
            world.edits.append((name, count))
            world.api.put(path, {**scale, "spec": {"replicas": count}})
            break
    return nothing


def lost(share: float) -> Play:
    def play(world: RealWorld, event: Event) -> Undo:
        world.fleets[event.row].lose(share)
        return nothing

    return play


def never_ready(world: RealWorld, event: Event) -> Undo:
    world.fleets[event.row].stall(True)
    return lambda: world.fleets[event.row].stall(False)


def gateway_restarted(world: RealWorld, event: Event) -> Undo:
    haproxy = world.haproxy
    haproxy.kill()
    Process.__init__(haproxy, haproxy.process.args, haproxy.log)
    return nothing


def gateway_frozen(world: RealWorld, event: Event) -> Undo:
    os.kill(world.haproxy.process.pid, signal.SIGSTOP)
    return lambda: os.kill(world.haproxy.process.pid, signal.SIGCONT)


def socket_missing(world: RealWorld, event: Event) -> Undo:
    away = world.haproxy.socket.with_suffix(".away")
    world.haproxy.socket.rename(away)
    return lambda: away.rename(world.haproxy.socket) if away.exists() else None


def locked(world: RealWorld, event: Event) -> Undo:
    release = lock(database(world))
    return each(release, world.forbid(event, "the database is locked"))


def full(world: RealWorld, event: Event) -> Undo:
    empty = fill(database(world))
    return each(empty, world.forbid(event, "the disk is full"))


def killed(world: RealWorld, event: Event) -> Undo:
    controller, world.controller = world.controller, None
    if controller is not None:
        controller.kill()

    def again() -> None:
        world.controller = world.start()

    return again


def second_controller(world: RealWorld, event: Event) -> Undo:
    second = world.start("second")
    return second.stop


def lease_lost(world: RealWorld, event: Event) -> Undo:
    take_leases(database(world))
    undo = world.forbid(event, "another controller holds the lease")
    return each(lambda: free_leases(database(world)), undo)


def maximum_lowered(world: RealWorld, event: Event) -> Undo:
    return lower_maximum(world, 1 + int(event.value * 2))


def kill_file(world: RealWorld, event: Event) -> Undo:
    (world.folder / "STOP").touch()
    undo = world.forbid(event, "the kill file is there")
    return each(lambda: (world.folder / "STOP").unlink(missing_ok=True), undo)


def kill_order(world: RealWorld, event: Event) -> Undo:
    controls = Controls(world.database)
    controls.kill()
    undo = world.forbid(event, "the kill switch is ordered")
    return each(controls.revive, undo)


def moded(mode: Mode) -> Play:
    def play(world: RealWorld, event: Event) -> Undo:
        controls, name = Controls(world.database), world.services[event.row]
        controls.set_mode([name], mode)
        undo = world.forbid(event, f"its mode is {mode.value}")
        return each(lambda: controls.set_mode([name], Mode.ACT), undo)

    return play


PLAYS: dict[str, Play] = {
    "metrics 401": prometheus_answers(401),
    "metrics 429": prometheus_answers(429),
    "metrics 503": prometheus_answers(503),
    "metrics slow": prometheus_answers("slow"),
    "metrics cut": prometheus_answers("cut"),
    "metrics HTML": prometheus_answers(b"<!doctype html><title>Sign in</title>"),
    "metrics matrix": prometheus_answers(MATRIX),
    "metrics nulls": prometheus_answers(NULLS),
    "metrics of a service missing": scraped("hidden", lambda event: 1.0),
    "metrics of replicas missing": scraped("hidden", lambda event: 0.5),
    "metrics twice": scraped("twice", lambda event: 1.0 if event.value < 0.5 else 0.6),
    "API 403": kube_answers(403),
    "API 500": kube_answers(500),
    "API slow": kube_answers("slow"),
    "writes 403": kube_answers(403, one=True),
    "writes 409": kube_answers(409, one=True),
    "writes cut": kube_answers("cut", one=True),
    "HPA": hpa,
    "owners unreadable": owners_unreadable,
    "foreign edit": foreign_edit,
    "pods killed": lost(0.5),
    "pods replaced": lost(1.0),
    "pods never ready": never_ready,
    "gateway restarted": gateway_restarted,
    "gateway frozen": gateway_frozen,
    "gateway socket missing": socket_missing,
    "database locked": locked,
    "database full": full,
    "controller killed": killed,
    "second controller": second_controller,
    "lease lost": lease_lost,
    "bad bundle": bad_bundle,
    "kill file": kill_file,
    "kill order": kill_order,
    "paused": moded(Mode.PAUSED),
    "advised": moded(Mode.ADVISE),
    "maximum lowered": maximum_lowered,
}

"""The world of real servers on the wall clock: `jevons run` in a process of its own, ticks of a second.

Prometheus, the API server and HAProxy are real, the replicas emulated engines; scheduler and kubelet are played.
Clients send requests all the time.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections import deque
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import yaml
from fault_proxy import FaultProxy
from kube_objects import DEPLOYMENTS, create_deployment, create_pod, delete, kube_api, set_ready
from kube_server import KubeApiServer
from servers import Controller, Engine, HAProxy, Prometheus, free_port, wait_until
from slow_engine import slow_engine

from autoscaler.actuators.haproxy_api import HAProxyError, RuntimeApi
from autoscaler.actuators.kube_api import KubeError
from autoscaler.authority.controls import Controls, Mode
from autoscaler.hosting.config import LiveConfig
from autoscaler.records.database import Database
from autoscaler.records.ticks import read_ticks
from policies.contract import Reason
from policies.spec import GuardrailSpec
from tests.chaos.clients import Answered, Clients
from tests.chaos.hostile_fleet import HostileFleet
from tests.chaos.invariants import Invariants, Look, ServiceLook, Write
from tests.chaos.kinds import EDIT_HOLD_TICKS
from tests.chaos.real_faults import HPAS, PLAYS, Fault
from tests.chaos.schedule import Event, Schedule, draw
from tests.chaos.undoing import Undo

SERVICES = ("chat", "code", "neighbour")
ACTING = 2
"""The first services may be scaled; the last one is only advised and not routed."""
MOST, ATTAINMENT = 4, 0.9
BOOT_S, TICK_S, START_TICKS, RECOVERY_TICKS = 1.0, 1.0, 12, 5
"""A second of boot and per tick; ticks until `jevons run` decides; ticks of a recovery, each seen up to 1.5 s late."""
PROFILE = slow_engine(c_us_per_seq=5000.0, max_num_seqs=16, warmup_s=BOOT_S)
LOSING = {"pods killed", "pods replaced", "gateway restarted", "gateway frozen", "pods never ready"}
"""Faults that may lose requests themselves."""
UNROUTED = {
    *("controller killed", "lease lost", "API down", "API 403", "API 500", "API slow", "gateway socket missing"),
    *("bad bundle", "maximum lowered", "counts unknown", "second controller", "database locked", "gateway frozen"),
}
"""Faults under which nobody can follow the replicas, or read where they are."""
ROUTED_WITHIN_S, TICK_MAY_TAKE_S = 5.0, 4.0
BLINDING = {f"metrics {fault}" for fault in ("401", "429", "503", "slow", "cut", "HTML", "matrix", "nulls")}


class RealWorld:
    """One run.

    Args:
        schedule: the faults, a tick a second.
        folder: for files.
        kube: the API server, which may outlive the run.
    """

    def __init__(self, schedule: Schedule, folder: Path, kube: KubeApiServer) -> None:
        self.schedule, self.folder, self.kube = schedule, folder, kube
        folder.mkdir(parents=True, exist_ok=True)
        self.stack = ExitStack()
        self.services, self.largest = SERVICES, MOST
        self.most, self.bundle = MOST, ""
        self.invariants = Invariants(schedule, GuardrailSpec(), RECOVERY_TICKS)
        self.forbidden: dict[tuple[str, int], tuple[str, float]] = {}  # why, and since when
        self.prometheus_faults: dict[str, Fault] = {}
        self.kube_faults: dict[str, Fault] = {}
        self.edits: list[tuple[str, int]] = []
        self.in_force = MOST  # the maximum that the controller was started with
        self.changes: deque[tuple[str, int, int, int]] = deque()  # service, before, after, the maximum in force then
        self.began_s = 0.0
        self.controller: Controller | None = None
        self.lost: list[Answered] = []
        self._told: deque[tuple[float, list[str]]] = deque(maxlen=8)
        self._done = threading.Event()

    # Set-up

    def __enter__(self) -> RealWorld:
        try:
            self._build()
        except BaseException:
            self.stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.stack.close()

    def _build(self) -> None:
        folder, stack = self.folder, self.stack
        self.prometheus = Prometheus(folder / "prometheus", scrape_s=1.0)
        stack.callback(self.prometheus.stop)
        self.engine = Engine(folder, name="neighbour").ready()
        stack.callback(self.engine.stop)
        self.haproxy = HAProxy(folder / "haproxy", SERVICES, {"neighbour": [("theirs", self.engine.address)]})
        stack.callback(lambda: self.haproxy.stop())
        self.prometheus_proxy = FaultProxy(self.prometheus.url)
        self.kube_proxy = FaultProxy(f"https://127.0.0.1:{self.kube.port}", ca=self.kube.ca)
        for proxy, faults in ((self.prometheus_proxy, self.prometheus_faults), (self.kube_proxy, self.kube_faults)):
            proxy.delay_s = 4.0
            proxy.fault = lambda method, path, faults=faults: next(
                (found for fault in list(faults.values()) if (found := fault(method, path)) is not None), None
            )
            stack.callback(proxy.stop)
        self.kubeconfig = self.kube.write_kubeconfig("chaos", "admin-token", self.kube_proxy.url)
        self.api = kube_api(self.kube)
        stack.callback(self.api.close)
        for name in SERVICES[:ACTING]:
            create_deployment(self.kube, name, 1)
        for name in (SERVICES[ACTING], "bystander"):
            create_deployment(self.kube, name, 1)
            set_ready(self.kube, name, 1)
        create_pod(self.kube, "neighbour-1", "neighbour")
        for name in SERVICES[:ACTING]:
            delete(self.api, f"{HPAS}/{name}")
        self.prometheus.scrape([(f"127.0.0.1:{self.haproxy.metrics_port}", {"job": "haproxy"})], "-haproxy")
        self.prometheus.scrape([(self.engine.address, {"service": "neighbour"})], "-neighbour")
        port = free_port()
        self.fleets = [
            HostileFleet(row, self.kube, self.prometheus, name, PROFILE, BOOT_S, port)
            for row, name in enumerate(SERVICES[:ACTING])
        ]
        for fleet in self.fleets:
            stack.callback(fleet.stop)
        self.database = Database(f"sqlite:///{folder / 'jevons.db'}")
        self.database.create()
        stack.callback(self.database.close)
        Controls(self.database).set_mode(SERVICES[ACTING:], Mode.ADVISE)
        wait_until(lambda: all(fleet.ready for fleet in self.fleets), "the first replicas are ready")
        self.controller = self.start()
        stack.callback(lambda: self.controller.stop() if self.controller else None)
        wait_until(lambda: all(self.haproxy.serves(name) for name in SERVICES), "the gateway has servers")
        self.theirs = self._their_servers()

    def config(self) -> LiveConfig:
        """The configuration as it is now."""
        services = [
            {
                "service": name,
                "slo": {"ttft_s": 2.5, "tpot_s": 0.2, "attainment": ATTAINMENT},
                "pools": [{"engine": PROFILE, "min_replicas": 1, "max_replicas": self.most}],
                "interface": {"window": {"control_interval_s": TICK_S, "metrics_delay_s": 0.5}},
                "guardrails": {"scale_down_cooldown_s": 4.0},
            }
            for name in SERVICES
        ]
        connection = {"kubeconfig": self.kubeconfig, "timeout_s": 2.0, "deadline_s": 3.0}
        targets = {name: {"name": name} for name in SERVICES}
        data = {
            "name": "chaos",
            "services": services,
            "metrics": {
                "url": self.prometheus_proxy.url,
                "gateway": "haproxy",
                "gateway_label": "proxy",
                "window_s": 5.0,
                "timeout_s": 2.0,
                "deadline_s": 3.0,
                "discovery_s": 10.0,
            },
            "actuator": {
                "kind": "composite",
                "replicas": {
                    "kind": "kubernetes",
                    "connection": connection,
                    "targets": targets,
                    "replica_port": self.fleets[0].port,
                },
                "batch_cap": {"kind": "haproxy", "sockets": [str(self.haproxy.socket)], "route": SERVICES[:ACTING]},
                "drain_s": 5.0,
            },
            "mode": "act",
            "policy": {"reference": self.bundle or "token-demand:memory_s=20", "cache": self.folder / "policies"},
            "counterfactuals": [],
            "kill_file": self.folder / "STOP",
            "records": {"url": f"sqlite:///{self.folder / 'jevons.db'}"},
            "lease": {"duration_s": 8.0},
            "exposition": {"port": None},
            "supervision": {"revalidation": {"wait_s": 1.0}, "edit_hold_s": float(EDIT_HOLD_TICKS)},
            "limits": {"read_s": 8.0, "record_s": 5.0, "act_s": 8.0, "conclude_s": 5.0},
        }
        return LiveConfig.model_validate(data)

    def start(self, name: str = "live") -> Controller:
        """`jevons run` with the configuration as it is now."""
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(self.config().model_dump(mode="json", exclude_none=True)))
        self.in_force = self.most
        return Controller(self.folder, path, "--no-ray")

    def restart(self) -> None:
        """Another configuration: an orderly end and a start."""
        if self.controller is not None:
            self.controller.stop()
        self.controller = self.start()

    # Running

    def run(self) -> list[str]:
        """Every violation found."""
        watching = threading.Thread(target=self._watch, daemon=True)
        watching.start()
        self.clients = Clients({name: self.haproxy.url(name) for name in SERVICES}, self.schedule.seed)
        self.began_s, undone, tick = time.monotonic(), [], 0
        while tick < self.schedule.ticks:
            self._due(undone, tick)
            undone += [(event.end, PLAYS[event.kind](self, event)) for event in self.schedule.beginning(tick)]
            self._due(undone, tick)
            time.sleep(max(0.0, self.began_s + (tick + 1) * TICK_S - time.monotonic()))
            self.invariants.judge(self._look(tick))
            late = int((time.monotonic() - self.began_s) / TICK_S) - tick - 1
            if late > 0:  # what a fault took to play: the schedule goes on from here
                self.began_s += late * TICK_S
            tick += 1
        self._due(undone, self.schedule.ticks + 10**6)
        self.clients.stop()
        self._done.set()
        watching.join(5.0)
        return self.invariants.found

    @staticmethod
    def _due(undone: list[tuple[int, Undo]], tick: int) -> None:
        for one in [one for one in undone if one[0] <= tick]:
            undone.remove(one)
            one[1]()

    def _watch(self) -> None:
        """Notice every change of a replica count."""
        api, known = kube_api(self.kube), {}
        while not self._done.wait(0.1):
            with suppress(KubeError):
                for one in api.items(DEPLOYMENTS):
                    name, count = one["metadata"]["name"], int(one["spec"]["replicas"])
                    if known.get(name, count) != count:
                        self.changes.append((name, known[name], count, self.in_force))
                    known[name] = count
        api.close()

    def _look(self, tick: int) -> Look:
        now_s = time.monotonic()
        if self.controller is not None and self.controller.process.poll() is not None:
            error = f"jevons run ended with {self.controller.process.returncode}: {self._log_tail()}"
            self.controller = self.start()
        else:
            error = ""
        writes: dict[str, list[Write]] = {}
        highest: dict[str, int] = {}
        found: dict[str, list[tuple[Write, int]]] = {}
        foreign = []
        while self.changes:
            name, old, new, most = self.changes.popleft()
            if (name, new) in self.edits:
                self.edits.remove((name, new))
            elif name in SERVICES[:ACTING]:
                tick_id = self._recorded(name, new)
                highest[name] = max(highest.get(name, 0), most)
                writes.setdefault(name, []).append(Write(old, new, tick_id is not None))
                found.setdefault(name, []).append((writes[name][-1], tick_id or 0))
            else:
                foreign.append(f"Deployment {name} {old} -> {new}")
        with suppress(HAProxyError):
            theirs = self._their_servers()
            if theirs != self.theirs:
                foreign.append(f"servers {self.theirs} -> {theirs}")
                self.theirs = theirs
        decisions, problems = self._decisions()
        self._told.append((now_s, problems))
        told = tuple({problem for at_s, some in self._told for problem in some if now_s - at_s < 4.0})
        until_s = time.time() + 3 * TICK_MAY_TAKE_S  # on a busy machine
        while not told and any(outcome == "held" for outcome, _ in decisions.values()) and time.time() < until_s:
            time.sleep(0.5)  # a decision is there before its tick has ended and said what is wrong
            told = tuple(self._decisions()[1])
        blind = any(
            event.kind in BLINDING and event.at < tick - 4 and tick < event.end for event in self.schedule.events
        )
        services = {}
        for row, name in enumerate(SERVICES):
            outcome, reasons = decisions.get(name, ("", ()))
            # A tick may be under way when something is forbidden; one that is older may not write any more.
            forbidden = next(
                (
                    why
                    for (_, concerned), (why, since_s) in self.forbidden.items()
                    if concerned in (-1, row) and now_s - since_s > TICK_MAY_TAKE_S
                ),
                "",
            )
            mine = tuple(writes.get(name, ()))
            down = [tick_id for write, tick_id in found.get(name, ()) if write.after < (write.before or 0)]
            burning = any(self._burning(name, tick_id) for tick_id in down)
            high = highest.get(name, self.most)
            services[name] = ServiceLook(outcome, reasons, mine, forbidden, blind, burning, 1, high)
        return Look(tick, services, told, error, tuple(foreign), tuple(self._losses(tick)))

    def _decisions(self) -> tuple[dict[str, tuple[str, tuple[str, ...]]], list[str]]:
        """What was decided in the last seconds by service, and what the controller says is wrong."""
        found: dict[str, tuple[str, tuple[str, ...]]] = {}
        problems: list[str] = []
        with suppress(sqlite3.Error):
            connection = sqlite3.connect(f"file:{self.folder / 'jevons.db'}?mode=ro", uri=True, timeout=0.2)
            try:
                since = time.time() - 4.0
                query = "SELECT service, outcome, reasons FROM decisions WHERE time_s > ? ORDER BY tick"
                for service, outcome, reasons in connection.execute(query, (since,)):
                    found[service] = (outcome, tuple(Reason(reasons).words()))
                for (status,) in connection.execute("SELECT status FROM controllers WHERE beat_s > ?", (since,)):
                    problems += json.loads(status).get("problems", [])
            finally:
                connection.close()
        return found, problems

    def _recorded(self, service: str, replicas: int) -> int | None:
        """The tick among the newest that decided on so many; 0 where nobody can tell."""
        query = "SELECT replicas_after, tick FROM decisions WHERE service = ? ORDER BY tick DESC LIMIT 4"
        with suppress(sqlite3.Error):
            connection = sqlite3.connect(f"file:{self.folder / 'jevons.db'}?mode=ro", uri=True, timeout=1.0)
            try:
                return next((tick for count, tick in connection.execute(query, (service,)) if count == replicas), None)
            finally:
                connection.close()
        return 0

    def _burning(self, service: str, tick_id: int) -> bool:
        """Whether the window that a tick saw missed the objectives."""
        for tick in read_ticks(self.database, tick=tick_id):
            row, seen = tick.services.index(service), tick.snapshot
            return bool(np.fmin(seen.ttft_attainment[row], seen.tpot_attainment[row]) < ATTAINMENT)
        return False

    def _their_servers(self) -> dict[str, tuple[str, int]]:
        """Servers that are not the controller's: address and cap."""
        api = RuntimeApi(str(self.haproxy.socket), 0.3)
        return {
            f"{name}/{server.name}": (server.address, server.cap)
            for name in SERVICES
            for server in api.servers(name).values()
            if name == "neighbour" or not server.name.startswith("jevons-")
        }

    def _losses(self, tick: int) -> list[str]:
        """Requests that a replica could have served."""
        found = []
        for one in self.clients.take():
            if one.outcome == "done":
                continue
            self.lost.append(one)
            if one.service == "neighbour":
                excused = self._during(one, {"gateway restarted", "gateway frozen"}, set(), -1)
            else:
                excused = self._during(one, LOSING, UNROUTED, SERVICES.index(one.service))
            if not excused:
                took_s = one.ended_s - one.sent_s
                found.append(f"{one.service}: {one.outcome} after {took_s:.1f} s")
        return found

    def _during(self, one: Answered, losing: set[str], unrouted: set[str], row: int) -> bool:
        """Whether a fault took the request itself, or what it left behind could not be known yet."""
        sent, ended = (round((at_s - self.began_s) / TICK_S) for at_s in (one.sent_s, one.ended_s))
        for event in self.schedule.events:
            if event.kind not in losing or not event.concerns(row):
                continue
            blocked = [
                other.end + START_TICKS
                for other in self.schedule.events
                if other.kind in unrouted and event.at - START_TICKS <= other.end and other.at <= event.end + 5
            ]
            until = max([event.end, *blocked]) + ROUTED_WITHIN_S + BOOT_S
            if event.at - 1 <= ended and sent <= until + 1:
                return True
        return False

    def _log_tail(self) -> str:
        return (self.folder / "live-run.log").read_text(errors="replace")[-400:]

    def forbid(self, event: Event, why: str) -> Undo:
        """Nobody may write until the undoing."""
        key = (event.kind, event.row)
        self.forbidden[key] = (why, time.monotonic())
        return lambda: self.forbidden.pop(key, None)


def schedule(seed: int, seconds: float) -> Schedule:
    """The faults of one run on the wall clock."""
    return draw(seed, round(seconds / TICK_S), sorted(PLAYS), ACTING, most=3, start_ticks=START_TICKS)

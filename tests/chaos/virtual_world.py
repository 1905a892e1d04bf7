"""The world in process: live controllers on a simulated cluster and a virtual clock."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from live_fakes import live_config, service_spec

from autoscaler.actuators.base import Access, FleetState, PartlyFailed
from autoscaler.authority.controls import Controls, Mode
from autoscaler.hosting.config import LiveConfig
from autoscaler.hosting.service import LiveService
from autoscaler.records import database as records_database
from autoscaler.records.database import Database
from policies.contract import Bools, Decision, Outcome, Reason, Target
from policies.spec import Slo, Spot
from tests.chaos.fake_prometheus import URL
from tests.chaos.hostile_cluster import HostileCluster, traffic
from tests.chaos.invariants import Invariants, Look, ServiceLook
from tests.chaos.kinds import EDIT_HOLD_TICKS
from tests.chaos.schedule import Schedule, draw
from tests.chaos.undoing import Undo
from tests.chaos.virtual_faults import PLAYS, Killed
from training.replaying.scores import Bill

TICK_S = 15.0
TICKS_PER_HOUR = round(3600 / TICK_S)
SERVICES = ("chat", "code", "neighbour")
ACTING = 2
"""The first services may be scaled; the last one is always advised, so it is somebody else's to write."""
MOST = 10
STARTING_TICKS = 5
"""A controller that is down at the end of a run is given so many ticks to come back."""
BILLED_TICKS = 4 * TICKS_PER_HOUR
"""Runs as long as that are billed: in shorter ones the tick before each change of a fleet is more than a per cent."""


class Hands:
    """One controller's actuator and clock on the cluster that all share."""

    def __init__(self, cluster: HostileCluster) -> None:
        self.cluster = cluster
        self.stopped = False

    @property
    def now_s(self) -> float:
        return self.cluster.now_s

    def wait_until(self, time_s: float) -> None:
        self.cluster.wait_until(time_s)

    def stop(self) -> None:
        self.stopped = True

    def apply(self, target: Target) -> None:
        self.cluster.apply(target)

    def state(self) -> FleetState:
        return self.cluster.state()

    def route(self, rows: Bools, adrift: Bools) -> None:
        if self.cluster.unroutable:
            raise PartlyFailed({"chat": "the gateway does not answer"})

    def check(self) -> list[Access]:
        return []

    def close(self) -> None:
        """Nothing to release."""


class VirtualWorld:
    """One run: a schedule, its traffic, a controller, and the invariants after every tick.

    Args:
        schedule: the faults; its seed makes the traffic and the policy.
        folder: for the database.
    """

    def __init__(self, schedule: Schedule, folder: Path) -> None:
        self.schedule = schedule
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        spot = Spot(reclaims_per_replica_day=0.0, notice_s=0.0)  # spare rows for replicas in the place of lost ones
        slo = Slo(ttft_s=2.0, tpot_s=0.075, attainment=0.95)
        self.specs = tuple(
            service_spec(name, max_replicas=MOST, price_class="spot", spot=spot, cold_start_cv=0.1).model_copy(
                update={"slo": slo}
            )
            for name in SERVICES
        )
        duration_s = (schedule.ticks + 10) * TICK_S + 100.0
        traces = [traffic(1000 * schedule.seed + row, duration_s) for row in range(len(SERVICES))]
        self.cluster = HostileCluster(self.specs, traces, folder / "jevons.db")
        self.learned = schedule.seed % 2 == 1
        self.services, self.largest, self.most = SERVICES, MOST, MOST
        self.bundle = ""
        self.invariants = Invariants(schedule, self.specs[0].guardrails)
        self.service: LiveService | None = None
        self.second: LiveService | None = None
        self.back_at = 0
        self.forbidden: dict[tuple[str, int], str] = {}  # why nobody may write, by fault and row
        self.began_usd: Any = None  # as of the first bill
        self.unknown_usd = np.zeros(len(SERVICES))  # that ran while nobody could count replicas

    def config(self) -> LiveConfig:
        """The configuration as it is now."""
        specs = [
            spec.model_copy(update={"pools": (spec.pools[0].model_copy(update={"max_replicas": self.most}),)})
            for spec in self.specs
        ]
        reference = self.bundle or ("learned" if self.learned else "token-demand")
        supervision = {"revalidation": {"wait_s": 15.0}, "edit_hold_s": EDIT_HOLD_TICKS * TICK_S}
        policy = {"reference": reference, "cache": self.folder / "policies"}
        metrics = {"url": URL, "gateway": "llm-d-epp", "attempts": 1}
        return live_config(self.folder, *specs, policy=policy, supervision=supervision, metrics=metrics)

    def start(self) -> LiveService | None:
        """A controller, or none while its database cannot be used."""
        hands = Hands(self.cluster)
        try:
            made = LiveService(self.config(), actuator=hands, clock=hands)
        except Exception:  # a supervisor tries again; what it raises is for the operator
            return None
        made.start()
        made.heartbeat.stop(release=False)  # beats come with the ticks: its own would be on the wall clock
        return made

    def run(self) -> list[str]:
        """Every violation found."""
        with quick(), self.cluster.prometheus.reachable():
            database = Database(f"sqlite:///{self.folder / 'jevons.db'}")
            database.create()
            Controls(database).set_mode(SERVICES[ACTING:], Mode.ADVISE)
            undone: list[tuple[int, Undo]] = []
            for tick in range(self.schedule.ticks):
                self._wait()
                for due, undo in [one for one in undone if one[0] <= tick]:
                    undone.remove((due, undo))
                    undo()
                begun = self.schedule.beginning(tick)
                undone += [(event.end, PLAYS[event.kind](self, event)) for event in begun]
                self.invariants.judge(self.tick(tick))
                for due, undo in [one for one in undone if one[0] <= tick]:  # what is over at once
                    undone.remove((due, undo))
                    undo()
            for _, undo in undone:
                undo()
            self._come_back()
            self._judge_dollars()
            if self.service is not None:
                self.service.close()
            database.close()
        return self.invariants.found

    def _come_back(self) -> None:
        """A controller that is down at the end is begun again: its bill outlives it, and is judged in any case."""
        self.back_at = 0
        for tick in range(self.schedule.ticks, self.schedule.ticks + STARTING_TICKS):
            if self.service is None:
                self._wait()
                self.tick(tick)

    def _judge_dollars(self) -> None:
        if self.schedule.ticks < BILLED_TICKS or self.began_usd is None:
            return
        for row, (billed, truth) in enumerate(self._dollars() - self.began_usd):
            self.invariants.judge_dollars(billed, truth, self.unknown_usd[row], f"dollars of {SERVICES[row]}")

    def _wait(self) -> None:
        """Until the next tick."""
        before_usd = self._dollars()[:, 1]
        self.cluster.wait_until(self.cluster.now_s + TICK_S)
        unknown = [
            self.service is None or bool(self.cluster.unreadable) or row in self.cluster.uncounted
            for row in range(len(SERVICES))
        ]
        self.unknown_usd += np.where(unknown, self._dollars()[:, 1] - before_usd, 0.0)

    def tick(self, tick: int) -> Look:
        """One tick of every controller that runs, and what was seen."""
        before = dict(self.forbidden)
        self.cluster.writes.clear()
        if self.service is None and tick >= self.back_at:
            self.service = self.start()
        decision, error = None, ""
        for service in [one for one in (self.service, self.second) if one is not None]:
            service.heartbeat.beat()
            try:
                found = service.step()
            except Killed:
                self.service = None
                continue
            except Exception as raised:
                error = f"{type(raised).__name__}: {raised}"
                continue
            decision = decision if found is None else found
        if self.cluster.prometheus.unanswerable:  # said here: whoever asks takes it for a fault of his server
            raise AssertionError(f"the fake Prometheus cannot answer {self.cluster.prometheus.unanswerable}")
        if self.began_usd is None and self.service is not None:
            self.began_usd = self._dollars()
        problems = tuple(self.service.problems()) if self.service is not None else ()
        looks = {name: self._look(row, decision, before) for row, name in enumerate(SERVICES)}
        foreign = tuple(
            f"{SERVICES[row]} {write.before} -> {write.after}"
            for row, writes in self.cluster.writes.items()
            if row >= ACTING
            for write in writes
        )
        return Look(tick, looks, problems, error, foreign)

    def _look(self, row: int, decision: Decision | None, before: dict[tuple[str, int], str]) -> ServiceLook:
        outcome, reasons, burning = "", (), False
        if decision is not None:
            outcome = Outcome(int(decision.outcome[row])).name.lower()
            reasons = tuple(Reason(int(decision.reasons[row])).words())
            seen = decision.snapshot
            attained = np.fmin(seen.ttft_attainment[row], seen.tpot_attainment[row])
            burning = bool(attained < self.specs[row].slo.attainment)
        # What began or ended within the tick may go either way.
        forbidden = next((why for key, why in self.forbidden.items() if key[1] in (-1, row) and before.get(key)), "")
        blind = bool(self.cluster.prometheus.fault)
        writes = tuple(self.cluster.writes.get(row, ())) if row < ACTING else ()
        return ServiceLook(outcome, reasons, writes, forbidden, blind, burning, 1, self.most)

    def restart(self) -> None:
        """Another configuration: an orderly end and a start."""
        if self.service is not None:
            self.service.close()
        self.service = self.start()

    def _dollars(self) -> Any:
        """(n, 2) dollars by the bill of the controller, and by what the cluster says has run."""
        usage, found = self.cluster.cluster.usage(), []
        for row, spec in enumerate(self.specs):
            labels = {"service": spec.service, "pool": spec.pools[0].label}
            billed = self.service.registry.get_sample_value("jevons_cost_usd_total", labels) if self.service else None
            truth = Bill(spec, self.cluster.cluster.arrays.pools).total_usd(usage, row)
            found.append((np.nan if billed is None else billed, truth))
        return np.array(found)

    def forbid(self, kind: str, row: int, why: str) -> Undo:
        """Nobody may write until the undoing."""
        self.forbidden[kind, row] = why
        return lambda: self.forbidden.pop((kind, row), None)


@contextmanager
def quick() -> Iterator[None]:
    """A locked database is given up on after a moment, and pauses are short: no time passes that a wait could use."""
    slow, sleep = records_database.BUSY_S, time.sleep
    records_database.BUSY_S = 0.02
    time.sleep = lambda seconds: sleep(seconds / 100.0)
    try:
        yield
    finally:
        records_database.BUSY_S, time.sleep = slow, sleep


def schedule(seed: int, hours: float) -> Schedule:
    """The faults of one run of so many virtual hours."""
    return draw(seed, round(hours * TICKS_PER_HOUR), sorted(PLAYS), ACTING)

"""A live service on the simulated cluster: a virtual clock, a database file, and a world that can be tampered with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from autoscaler.actuators.base import Access, Announcement, FleetState, PartlyFailed
from autoscaler.hosting.config import LiveConfig
from autoscaler.hosting.service import LiveService
from envs.cluster.simulation import SimulatedCluster
from envs.traffic.trace import Trace
from policies.contract import LEAVE_ALONE, Bools, Floats, MetricsUnavailable, Snapshot, Target
from policies.engine import ColdStart
from policies.spec import GuardrailSpec, PoolSpec, ScalingSpec, Slo, find_engine, shipped_configs

START_S = 1_700_000_000.0


def service_spec(name: str = "chat", **pool: Any) -> ScalingSpec:
    start = ColdStart(node_s=20.0, image_s=5.0, weights_s=10.0, warmup_s=5.0)
    settings: dict[str, Any] = {"max_replicas": 12, "initial_replicas": 2, "cold_start": start, "cold_start_cv": 0.0}
    engine = find_engine("llama-3.1-8b-l40s", shipped_configs())
    return ScalingSpec(
        service=name,
        slo=Slo(ttft_s=2.0, tpot_s=0.08, attainment=0.95),
        pools=(PoolSpec(engine=engine, **{**settings, **pool}),),
    )


def quick(spec: ScalingSpec) -> ScalingSpec:
    """The same without the wait of steady traffic: the fleet is small again soon after a burst."""
    return spec.model_copy(update={"guardrails": GuardrailSpec(scale_down_window_s=0.0, scale_down_worth_s=0.0)})


def live_config(folder: Path, *specs: ScalingSpec, **changes: Any) -> LiveConfig:
    data: dict[str, Any] = {
        "services": specs or (service_spec(),),
        "metrics": {"url": "http://127.0.0.1:9"},
        "actuator": {"kind": "metric_only"},
        "mode": "act",
        "policy": {"reference": "token-demand", "cache": folder / "policies"},
        "counterfactuals": (),
        "kill_file": folder / "STOP",
        "records": {"url": f"sqlite:///{folder / 'jevons.db'}"},
        "exposition": {"port": None},
        "limits": {"read_s": 60.0, "record_s": 60.0, "act_s": 60.0, "conclude_s": 60.0},
        "supervision": {"revalidation": {"wait_s": 0.0}},
    }
    return LiveConfig.model_validate({**data, **changes})


def burst(mean_rps: float = 4.0, peak_rps: float = 30.0, duration_s: float = 1800.0, seed: int = 0) -> Trace:
    """Steady traffic with one burst in the middle third."""
    rng = np.random.default_rng(seed)
    calm = rng.uniform(0.0, duration_s, int(mean_rps * duration_s))
    high = rng.uniform(duration_s / 3, duration_s / 2, int(peak_rps * duration_s / 6))
    times = np.sort(np.concatenate([calm, high]))
    return Trace.from_arrays(
        arrival_s=times,
        prompt_tokens=rng.integers(50, 2000, len(times)),
        output_tokens=rng.integers(10, 300, len(times)),
        duration_s=duration_s,
    )


class LiveWorld:
    """A simulated cluster as source, actuator and clock of live services; faults are switched on by name.

    Faults: `blind` (no metrics), `refusing` (no target is carried out), `refused` (services whose targets are not),
    `unroutable` (the gateway does not answer), `busy` (services whose replicas to remove have requests).
    """

    def __init__(self, specs: Sequence[ScalingSpec], traces: Sequence[Trace]) -> None:
        self.specs = tuple(specs)
        self.cluster = SimulatedCluster.replay(specs, traces, range(len(specs)))
        self.targets: list[Target] = []
        self.owners: tuple[str, ...] = ("",) * len(specs)
        self.owners_unread: tuple[int, ...] = ()
        self.set_by: tuple[str, ...] = ()
        self.edits_put_back = False
        self.written = np.full((len(specs), 1), np.nan)
        self.announced: list[Announcement] = []
        self.on_announce: Any = lambda: None
        self.blind = False
        self.refusing = False
        self.refused: tuple[str, ...] = ()
        self.before_apply: Any = lambda: None
        self.after_apply: Any = lambda: None
        self.stopped = False
        self.routed: list[list[bool]] = []
        self.adrift: list[list[bool]] = []
        self.unroutable = False
        self.busy: tuple[str, ...] = ()
        self.waits = np.zeros((len(specs), 1), bool)
        self.state_calls = 0
        self.watch: Any = None

    # Clock

    @property
    def now_s(self) -> float:
        return START_S + self.cluster.now_s

    def wait_until(self, time_s: float) -> None:
        if not self.stopped:
            self.cluster.wait_until(max(time_s - START_S, self.cluster.now_s))

    def stop(self) -> None:
        self.stopped = True

    # Source

    def read(self) -> Snapshot:
        self.watch()
        if self.blind:
            raise MetricsUnavailable("no answer")
        seen = self.cluster.read()
        values = {name: getattr(seen, name) for name in Snapshot.__dataclass_fields__}
        state = self.state()
        in_force = {"replicas_target": state.replicas_target, "batch_cap": state.batch_cap}
        return Snapshot(**{**values, **in_force, "time_s": seen.time_s + START_S})

    # Actuator

    def route(self, rows: Bools, adrift: Bools) -> None:
        self.routed.append(rows.tolist())
        self.adrift.append(adrift.tolist())
        if self.unroutable:
            raise PartlyFailed({"chat": "the gateway does not answer"})

    def state(self) -> FleetState:
        self.state_calls += 1
        pool = self.cluster.arrays.pool.reshape(len(self.cluster), self.cluster.arrays.pools)
        latest = self.cluster.read()
        return FleetState(
            replicas_target=pool["replicas_target"].astype(float),
            replicas_starting=latest.replicas_starting,
            replicas_ready=latest.replicas_ready,
            replicas_draining=latest.replicas_draining,
            batch_cap=pool["batch_cap"].astype(float),
            owners=self.owners,
            owners_unread=self.owners_unread,
            set_by=self.set_by,
            edits_put_back=self.edits_put_back,
        )

    def wrote(self) -> Floats:
        return self.written

    def draining(self) -> Bools:
        return self.waits

    def announce(self, announcement: Announcement) -> None:
        self.on_announce()
        self.announced.append(announcement)

    def apply(self, target: Target) -> None:
        self.written[:] = np.nan
        self.before_apply()
        if self.refusing:
            raise PartlyFailed({spec.service: "said no" for spec in self.specs})
        self.targets.append(target)
        allowed = target.replicas.copy()
        failures = {}
        for row, spec in enumerate(self.specs):
            if spec.service in self.refused:
                allowed[row] = LEAVE_ALONE
                failures[spec.service] = "forbidden"
        busy = np.array([[spec.service in self.busy] for spec in self.specs])
        in_force = self.cluster.arrays.pool.reshape(len(self.cluster), self.cluster.arrays.pools)["replicas_target"]
        self.waits = busy & (allowed != LEAVE_ALONE) & (allowed < in_force)
        allowed[self.waits] = LEAVE_ALONE
        self.set(allowed, target.batch_cap)
        self.written = np.where(allowed == LEAVE_ALONE, np.nan, allowed)
        self.after_apply()
        if failures:
            raise PartlyFailed(failures)

    def set(self, replicas: Any, batch_cap: Any = None) -> None:
        """What a person with access to the cluster can do; `LEAVE_ALONE` rows stay."""
        pool = self.cluster.arrays.pool.reshape(len(self.cluster), self.cluster.arrays.pools)
        wanted = np.asarray(replicas, np.int64)
        caps = pool["batch_cap"].astype(np.int64) if batch_cap is None else batch_cap
        current = pool["replicas_target"].astype(np.int64)
        self.cluster.apply(Target(np.where(wanted == LEAVE_ALONE, current, wanted), caps))

    def check(self) -> list[Access]:
        return []

    def close(self) -> None:
        """Nothing to release."""

    # Driving

    def service(self, config: LiveConfig) -> LiveService:
        """A live service on this world, started."""
        made = LiveService(config, source=self, actuator=self, clock=self)
        self.watch = made.state
        made.start()
        return made

    def run(self, service: LiveService, ticks: int) -> list[Any]:
        """Tick after tick, one control interval apart."""
        decisions = []
        for _ in range(ticks):
            self.wait_until(self.now_s + service.config.interval_s)
            decisions.append(service.step())
        return decisions

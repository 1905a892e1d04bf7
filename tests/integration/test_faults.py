"""Every fault of the table in docs/live.md through a whole controller on real servers.

Two services, `chat` and `code`, each with one replica in the real API server and one made-up engine that a real
Prometheus scrapes. A fault begins, the load of both rises, and what was promised must be seen: the replicas of a held
service stay, the other service is scaled, and when the fault is gone the held one is scaled too.
"""

from __future__ import annotations

import itertools
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from exporters import ConstantEngine
from fault_proxy import FaultProxy
from kube_objects import DEPLOYMENTS, create_deployment, delete, kube_api, replicas_of, set_ready
from kube_server import KubeApiServer
from servers import Prometheus, start

from autoscaler.clocks import SteadyWallClock
from autoscaler.hosting.config import LiveConfig
from autoscaler.hosting.service import LiveService
from policies.contract import Decision, Outcome, Reason
from policies.lineup import SHIPPED_BUNDLE
from policies.spec import find_engine

NUMBER = itertools.count(1)
WINDOW_S = 4.0
SEEN_S = 60.0
"""Longest wait for an outcome: the window must fill, and the machine may be busy."""
HPAS = "/apis/autoscaling/v1/namespaces/default/horizontalpodautoscalers"


def engine(rps: float, running: float) -> ConstantEngine:
    """Requests of 1,000 prompt and 200 output tokens."""
    made = ConstantEngine({}, {})
    load(made, rps, running)
    return made


def load(engine: ConstantEngine, rps: float, running: float | str) -> None:
    """From now on the counters grow by so much. They begin anew, which is a reset."""
    engine.began_s = time.monotonic()
    engine.gauges |= {
        "vllm:num_requests_running": running,
        "vllm:num_requests_waiting": 0.0,
        "vllm:kv_cache_usage_perc": 0.5,
    }
    engine.rates |= {
        "vllm:prompt_tokens_total": 1000 * rps,
        "vllm:generation_tokens_total": 200 * rps,
        "vllm:request_success_total": rps,
        "vllm:request_prompt_tokens_sum": 1000 * rps,
        "vllm:request_generation_tokens_sum": 200 * rps,
        "vllm:request_generation_tokens_count": rps,
        'vllm:time_to_first_token_seconds_bucket{le="2.0"}': rps,
        'vllm:time_to_first_token_seconds_bucket{le="+Inf"}': rps,
        'vllm:request_time_per_output_token_seconds_bucket{le="0.05"}': rps,
        'vllm:request_time_per_output_token_seconds_bucket{le="+Inf"}': rps,
    }


@dataclass
class World:
    """The servers, and what was made for one test."""

    prometheus: Prometheus
    prometheus_proxy: FaultProxy
    kube: KubeApiServer
    kube_proxy: FaultProxy
    kubeconfig: Path
    folder: Path
    stack: ExitStack
    chat: str = ""
    code: str = ""
    engines: dict[str, ConstantEngine] = field(default_factory=dict)
    sick: set[str] = field(default_factory=set)
    """Services whose running requests are not a number."""

    def __post_init__(self) -> None:
        number = next(NUMBER)
        self.chat, self.code = f"chat{number}", f"code{number}"
        for name in (self.chat, self.code):
            create_deployment(self.kube, name, 1)
            set_ready(self.kube, name, 1)
            self.engines[name] = engine(1.0, 1.0)
            self.stack.callback(self.engines[name].stop)
        self.scrape()

    def scrape(self) -> None:
        self.prometheus.scrape([(made.address, {"service": name}) for name, made in self.engines.items()])
        self.prometheus.wait_scraped([made.address for made in self.engines.values()])

    def config(self, **changes: Any) -> LiveConfig:
        services = [
            {
                "service": name,
                "slo": {"ttft_s": 2.0, "tpot_s": 0.05, "attainment": 0.9},
                "pools": [{"engine": find_engine("llama-3.1-8b-h100", Path()), "max_replicas": 8}],
                "guardrails": {"scale_down_cooldown_s": 0.0, "scale_down_window_s": 0.0, "scale_down_worth_s": 0.0},
            }
            for name in (self.chat, self.code)
        ]
        connection = {"kubeconfig": self.kubeconfig, "timeout_s": 1.0, "deadline_s": 2.0}
        data: dict[str, Any] = {
            "services": services,
            "metrics": {"url": self.prometheus_proxy.url, "window_s": WINDOW_S, "timeout_s": 1.0, "deadline_s": 2.0},
            "actuator": {"kind": "kubernetes", "connection": connection},
            "mode": "act",
            "policy": {"reference": "token-demand", "cache": self.folder / "policies"},
            "counterfactuals": [],
            "kill_file": self.folder / "STOP",
            "records": {"url": f"sqlite:///{self.folder / 'jevons.db'}"},
            "exposition": {"port": None},
            "supervision": {"revalidation": {"wait_s": 0.0}, "max_decision_age_s": 60.0},
            "limits": {"read_s": 20.0, "record_s": 20.0, "act_s": 20.0, "conclude_s": 20.0},
        }
        return LiveConfig.model_validate({**data, **changes})

    def service(self, **changes: Any) -> LiveService:
        made = LiveService(self.config(**changes))
        made.start()
        self.stack.callback(made.close)
        return made

    def rise(self) -> None:
        """The load of both services becomes more than one replica can take."""
        for name, made in self.engines.items():
            load(made, 60.0, "NaN" if name in self.sick else 200.0)

    def replicas(self, name: str) -> int:
        return replicas_of(self.kube, name)


@pytest.fixture(scope="module")
def servers(kube_server: KubeApiServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, ...]]:
    prometheus = start(Prometheus, tmp_path_factory.mktemp("prometheus"), scrape_s=0.5)
    prometheus_proxy = FaultProxy(prometheus.url)
    kube_proxy = FaultProxy(f"https://127.0.0.1:{kube_server.port}", ca=kube_server.ca)
    prometheus_proxy.delay_s = kube_proxy.delay_s = 5.0
    kubeconfig = kube_server.write_kubeconfig("faults", "admin-token", kube_proxy.url)
    yield prometheus, prometheus_proxy, kube_server, kube_proxy, kubeconfig
    prometheus_proxy.stop()
    kube_proxy.stop()
    prometheus.stop()


@pytest.fixture
def world(servers: tuple[Any, ...], tmp_path: Path) -> Iterator[World]:
    with ExitStack() as stack:
        made = World(*servers, tmp_path, stack)
        yield made
        made.prometheus_proxy.fault = made.kube_proxy.fault = lambda method, path: None


def said(decision: Decision | None, row: int) -> tuple[str, set[str]]:
    """Outcome and reasons of one service."""
    if decision is None:
        return "stands by", set()
    return Outcome(int(decision.outcome[row])).name.lower(), set(Reason(int(decision.reasons[row])).words())


def ticks_until(service: LiveService, true: Callable[[Decision | None], bool], what: str) -> Decision | None:
    """Tick once a second until something is so."""
    until_s = time.monotonic() + SEEN_S
    while True:
        decision = service.step()
        if true(decision):
            return decision
        assert time.monotonic() < until_s, (what, [said(decision, row) for row in (0, 1)], service.status()["problems"])
        time.sleep(1.0)


Undo = Callable[[], None]


def prometheus_fault(fault: Any) -> Callable[[World], Undo]:
    def begin(world: World) -> Undo:
        world.prometheus_proxy.fault = lambda method, path: fault
        return lambda: setattr(world.prometheus_proxy, "fault", lambda method, path: None)

    return begin


def prometheus_down(world: World) -> Undo:
    world.prometheus.stop()

    def restart() -> None:
        world.prometheus.restart()
        world.scrape()

    return restart


def not_a_number(world: World) -> Undo:
    world.engines[world.chat].gauges["vllm:num_requests_running"] = "NaN"
    world.sick.add(world.chat)

    def mend() -> None:
        world.sick.clear()
        world.rise()

    return mend


def stale(world: World) -> Undo:
    """Its exporter goes on with samples of 100 seconds ago."""
    good, old = world.engines[world.chat], engine(60.0, 200.0)
    old.sample_age_s = 100.0
    world.stack.callback(old.stop)
    world.engines[world.chat] = old
    world.scrape()

    def mend() -> None:
        world.engines[world.chat] = good
        load(good, 60.0, 200.0)
        world.scrape()

    return mend


def scale_fault(fault: Any) -> Callable[[World], Undo]:
    """Writes of the counts of one service fail."""

    def begin(world: World) -> Undo:
        ours = f"/{world.chat}/scale"
        world.kube_proxy.fault = lambda method, path: fault if method == "PUT" and path.endswith(ours) else None
        return lambda: setattr(world.kube_proxy, "fault", lambda method, path: None)

    return begin


def listing_fault(plural: str, fault: Any) -> Callable[[World], Undo]:
    """The objects of one kind cannot be listed."""

    def begin(world: World) -> Undo:
        world.kube_proxy.fault = lambda method, path: fault if path.split("?")[0].endswith(f"/{plural}") else None
        return lambda: setattr(world.kube_proxy, "fault", lambda method, path: None)

    return begin


def target_deleted(world: World) -> Undo:
    api = kube_api(world.kube)
    delete(api, f"{DEPLOYMENTS}/{world.chat}")
    api.close()

    def create() -> None:
        create_deployment(world.kube, world.chat, 1)
        set_ready(world.kube, world.chat, 1)

    return create


def other_autoscaler(world: World) -> Undo:
    api = kube_api(world.kube)
    scaled = {"apiVersion": "apps/v1", "kind": "Deployment", "name": world.chat}
    api.post(HPAS, {"metadata": {"name": world.chat}, "spec": {"maxReplicas": 9, "scaleTargetRef": scaled}})

    def remove() -> None:
        delete(api, f"{HPAS}/{world.chat}")
        api.close()

    return remove


def database_locked(world: World) -> Undo:
    other = sqlite3.connect(world.folder / "jevons.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")

    def release() -> None:
        other.execute("ROLLBACK")
        other.close()

    return release


@dataclass(frozen=True)
class Fault:
    """What begins, the reason that must be given, and whether only the one service is held."""

    begin: Callable[[World], Undo]
    reason: str
    alone: bool = True


FAULTS = {
    "Prometheus down": Fault(prometheus_down, "missing_metrics", alone=False),
    "Prometheus slow": Fault(prometheus_fault("slow"), "missing_metrics", alone=False),
    "Prometheus 500": Fault(prometheus_fault(500), "missing_metrics", alone=False),
    "Prometheus empty": Fault(prometheus_fault("empty"), "missing_metrics", alone=False),
    "metrics stale": Fault(stale, "missing_metrics"),
    "metrics NaN": Fault(not_a_number, "missing_metrics"),
    "API server 403": Fault(scale_fault(403), "actuation_failed"),
    "API server 409": Fault(scale_fault(409), "actuation_failed"),
    "API server 429": Fault(scale_fault(429), "actuation_failed"),
    "API server 500": Fault(scale_fault(500), "actuation_failed"),
    "API server time-out": Fault(scale_fault("slow"), "actuation_failed"),
    "API server connection cut": Fault(scale_fault("cut"), "actuation_failed"),
    "target deleted": Fault(target_deleted, "missing_metrics"),
    "HPA on the same target": Fault(other_autoscaler, "other_autoscaler"),
    "HPAs cannot be read": Fault(listing_fault("horizontalpodautoscalers", 500), "owner_unknown", alone=False),
    "ScaledObjects may not be read": Fault(listing_fault("scaledobjects", 403), "owner_unknown", alone=False),
    "database locked": Fault(database_locked, "not_recorded", alone=False),
}


@pytest.mark.plays(
    "Prometheus down, slow, 500, empty answers",
    "every service is held",
)
@pytest.mark.plays(
    "samples stale or NaN",
    "that service is held (`missing_metrics`), the others go on",
)
@pytest.mark.plays(
    "API server 403, 409, 429, 500, time-out, connection cut",
    "retried within the limit where that can help, then that service is held (`actuation_failed`), the others go on",
)
@pytest.mark.plays(
    "target deleted",
    "that service is held (`missing_metrics`), named in the status; scaled again when it is back",
)
@pytest.mark.plays(
    "HPA on the same target",
    "held (`other_autoscaler`), named, never fought",
)
@pytest.mark.plays(
    "HPAs or ScaledObjects cannot be read",
    "held (`owner_unknown`): what cannot be read forbids",
)
@pytest.mark.plays(
    "database locked",
    "held (`not_recorded`): what is not recorded is not carried out",
)
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_holds_what_it_must_and_nothing_else(world: World, name: str) -> None:
    fault = FAULTS[name]
    service = world.service()
    ticks_until(service, lambda seen: said(seen, 0)[0] == said(seen, 1)[0] == "unchanged", "all is well")
    undo = fault.begin(world)
    world.rise()

    held = False

    def seen(decision: Decision | None) -> bool:
        nonlocal held  # where an answer was cut, the count was written: the hold may last one tick only
        outcome, reasons = said(decision, 0)
        held = held or (outcome == "held" and fault.reason in reasons)
        return held and (world.replicas(world.code) > 1 or not fault.alone)

    ticks_until(service, seen, name)
    if name not in {"target deleted", "API server connection cut"}:
        assert world.replicas(world.chat) == 1
    assert fault.alone or world.replicas(world.code) == 1
    undo()
    ticks_until(service, lambda _: world.replicas(world.chat) > 1 and world.replicas(world.code) > 1, "scaled")


@pytest.mark.plays(
    "a counter is reset",
    "nothing: the rate counts on from zero",
)
def test_a_counter_that_is_reset_holds_nothing(world: World) -> None:
    service = world.service()
    ticks_until(service, lambda seen: said(seen, 0)[0] == "unchanged", "all is well")
    for _ in range(3):
        world.engines[world.chat].began_s = time.monotonic()
        assert said(service.step(), 0) == ("unchanged", set())
        time.sleep(1.0)
    assert world.replicas(world.chat) == 1


@pytest.mark.plays(
    "replicas never ready",
    "they count as there, so that no more are asked for than the load needs; no scale-down while they start "
    "(`replicas_starting`), but after three cold starts they keep nothing, go first and are named with the pod's own "
    "reason",
)
def test_replicas_that_never_get_ready_are_neither_doubled_nor_given_back(world: World) -> None:
    """Nobody plays the kubelet: what was asked for stays unready."""
    service = world.service()
    world.rise()
    ticks_until(service, lambda _: world.replicas(world.chat) > 1, "scaled up")
    wanted = set()
    for _ in range(8):
        service.step()
        wanted.add(world.replicas(world.chat))
        time.sleep(1.0)
    assert max(wanted) <= 8  # its maximum: what starts counts as there
    for made in world.engines.values():
        load(made, 1.0, 1.0)
    before = world.replicas(world.chat)
    decision = ticks_until(service, lambda seen: "replicas_starting" in said(seen, 0)[1], "held while replicas start")
    assert decision is not None
    assert world.replicas(world.chat) == before
    set_ready(world.kube, world.chat, before)
    extra = [engine(0.2, 0.2) for _ in range(before - 1)]
    for made in extra:
        world.stack.callback(made.stop)
    groups = [(made.address, {"service": world.chat}) for made in extra]
    world.prometheus.scrape(groups, "-extra")
    world.stack.callback(world.prometheus.scrape, [], "-extra")
    ticks_until(service, lambda _: world.replicas(world.chat) < before, "given back when they are ready")


@pytest.mark.plays(
    "MLflow down",
    "what is loaded goes on, after a restart the kept copy; with neither the baseline decides (`bundle_refused`)",
)
@pytest.mark.plays(
    "corrupt bundle",
    "refused; what is loaded goes on, with nothing loaded the baseline decides (`bundle_refused`)",
)
@pytest.mark.parametrize("policy", ["corrupt bundle", "MLflow down"])
def test_without_its_bundle_the_baseline_decides(world: World, policy: str) -> None:
    reference: dict[str, Any] = {"reference": "models:/chat@champion", "tracking_uri": "http://127.0.0.1:9"}
    if policy == "corrupt bundle":
        bad = world.folder / "bad.zip"
        content = bytearray(SHIPPED_BUNDLE.read_bytes())
        content[len(content) // 2] ^= 1
        bad.write_bytes(content)
        reference = {"reference": str(bad)}
    service = world.service(policy={**reference, "cache": world.folder / "policies"})
    world.rise()
    decision = ticks_until(service, lambda _: world.replicas(world.chat) > 1, "the baseline scales")
    assert "bundle_refused" in said(decision, 0)[1]
    assert service.status()["problems"] != []


@pytest.mark.plays(
    "the wall clock jumps by a day, either way",
    "nothing: ticks, cooldowns and leases run on a clock that only counts what has passed",
)
@pytest.mark.parametrize("jump_s", [-86400.0, 86400.0])
def test_a_jump_of_the_wall_clock_changes_nothing(world: World, monkeypatch: pytest.MonkeyPatch, jump_s: float) -> None:
    service = LiveService(world.config(), clock=SteadyWallClock())
    service.start()
    world.stack.callback(service.close)
    ticks_until(service, lambda seen: said(seen, 0)[0] == "unchanged", "all is well")
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + jump_s)
    for _ in range(3):
        assert said(service.step(), 0) == ("unchanged", set())
    world.rise()
    monkeypatch.setattr(time, "time", real)
    ticks_until(service, lambda _: world.replicas(world.chat) > 1, "scaled")


@pytest.mark.plays(
    "two controllers",
    "one acts, the other stands by; a late write is refused because of its token",
)
def test_of_two_controllers_one_acts_and_the_other_stands_by(world: World) -> None:
    first = world.service()
    second = LiveService(world.config())
    second.leases.holder = "another host/1/1/1"  # type: ignore[attr-defined]
    second.start()
    world.stack.callback(second.close)
    ticks_until(first, lambda seen: said(seen, 0)[0] == "unchanged", "all is well")
    world.rise()
    for _ in range(3):
        assert said(second.step(), 0)[0] == "stands by"
    ticks_until(first, lambda _: world.replicas(world.chat) > 1, "scaled")
    assert said(second.step(), 0)[0] == "stands by"

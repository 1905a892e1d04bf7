"""A burst against real servers: Prometheus, HAProxy, the Kubernetes API and MLflow, with emulated engines behind them.

A fleet that Jevons scales and a static one that is sized for the peak answer the same requests at the same time. Their
costs are what ran, in replica-seconds, over the tokens that clients received.
"""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import numpy as np
import pytest
import yaml
from kube_objects import create_deployment
from kube_server import KubeApiServer
from played_fleet import PlayedFleet
from servers import Controller, HAProxy, MLflow, Prometheus, start, wait_until
from slow_engine import slow_engine

from autoscaler.hosting.config import LiveConfig
from autoscaler.hosting.progress import Watchdog
from autoscaler.hosting.service import LiveService
from autoscaler.records.database import Database
from autoscaler.records.ticks import Tick, read_ticks
from autoscaler.versions.registry import BUNDLE_FILE
from policies.engine import ColdStart
from policies.learned import load_bundle
from policies.lineup import SHIPPED_BUNDLE
from policies.secret_url import REVEALED
from training.versions.registry import register
from training.versions.tracking import connect, experiment_id

MOST, PEAK_SIZE = 6, 4
"""Replicas that may be asked for, and those that the peak needs with half of them to spare."""
TTFT_S = 2.5
PROMPT_TOKENS, OUTPUT_TOKENS = 100, 20
PROFILE = slow_engine(c_us_per_seq=5000.0, max_num_seqs=32)


@dataclass(frozen=True)
class Burst:
    """Traffic that rises to a peak, stays there and ends at once."""

    calm_s: float
    rise_s: float
    peak_s: float
    after_s: float
    calm_rps: float = 1.5
    peak_rps: float = 16.0

    @property
    def length_s(self) -> float:
        return self.calm_s + self.rise_s + self.peak_s + self.after_s

    def arrivals(self) -> np.ndarray:
        """Poisson arrivals, seconds."""
        rng = np.random.default_rng(0)
        corners_s = np.cumsum([0.0, self.calm_s, self.rise_s, self.peak_s, 1e-3, self.after_s])
        rates = [self.calm_rps, self.calm_rps, self.peak_rps, self.peak_rps, self.calm_rps, self.calm_rps]
        times = np.sort(rng.uniform(0.0, self.length_s, int(self.peak_rps * self.length_s)))
        return times[rng.random(len(times)) < np.interp(times, corners_s, rates) / self.peak_rps]


class Answer(NamedTuple):
    """What became of one request."""

    outcome: str
    sent_s: float  # Unix time
    ttft_s: float


def config(
    folder: Path, prometheus: Prometheus, haproxy: HAProxy, kube: KubeApiServer, fleet: PlayedFleet, **changes: Any
) -> LiveConfig:
    connection = {"kubeconfig": kube.kubeconfig, "timeout_s": 10.0, "deadline_s": 20.0}
    start_s = ColdStart(node_s=0.0, image_s=0.0, weights_s=0.0, warmup_s=fleet.boot_s)
    engine = PROFILE.model_copy(update={"cold_start": start_s})
    service = {
        "service": fleet.service,
        "slo": {"ttft_s": TTFT_S, "tpot_s": 0.2, "attainment": 0.95},
        "pools": [{"engine": engine, "min_replicas": 1, "max_replicas": MOST}],
        **changes.pop("spec"),
    }
    cap = {"kind": "haproxy", "sockets": [str(haproxy.socket)], "route": ["*"], "timeout_s": 5.0}
    data = {
        "name": fleet.service,
        "services": [service],
        "metrics": {
            "url": prometheus.url,
            "gateway": "haproxy",
            "gateway_label": "proxy",
            "timeout_s": 5.0,
            "discovery_s": 20.0,
        },
        "actuator": {
            "kind": "composite",
            "replicas": {"kind": "kubernetes", "connection": connection, "replica_port": fleet.port},
            "batch_cap": cap,
            "drain_s": 30.0,
        },
        "mode": "act",
        "counterfactuals": ["hpa", f"static:replicas={PEAK_SIZE}"],
        "kill_file": folder / "STOP",
        "records": {"url": f"sqlite:///{folder / fleet.service}.db"},
        "lease": {"kind": "kubernetes", "connection": connection, "prefix": f"jevons-{fleet.port}-"},
        "exposition": {"port": 0},
        "limits": {"read_s": 30.0, "record_s": 30.0, "permit_s": 30.0, "act_s": 60.0, "conclude_s": 30.0},
    }
    supervision = {"max_decision_age_s": 60.0, "revalidation": {"wait_s": changes.pop("wait_s", 15.0)}}
    changes["policy"] = {"cache": folder / "policies", **changes["policy"]}
    changes["metrics"] = {**data["metrics"], **changes.pop("metrics", {})}
    return LiveConfig.model_validate({**data, "supervision": supervision, **changes})


async def send(urls: list[str], times_s: np.ndarray) -> list[list[Answer]]:
    """One streamed request to each address at each time; what became of each, by address."""
    began_s = time.monotonic()
    timeout = aiohttp.ClientTimeout(total=180.0)
    body = {
        "model": "m",
        "prompt": "x",
        "jevons_prompt_tokens": PROMPT_TOKENS,
        "max_tokens": OUTPUT_TOKENS,
        "stream": True,
    }
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def one(url: str, at_s: float) -> Answer:
            await asyncio.sleep(max(0.0, began_s + at_s - time.monotonic()))
            sent_s, ttft_s = time.time(), np.inf
            try:
                async with session.post(f"{url}/v1/completions", json=body) as response:
                    text = await response.content.readline()
                    ttft_s = time.time() - sent_s
                    text += await response.content.read()
                    whole = response.status == 200 and text.rstrip().endswith(b"[DONE]")
                    return Answer("done" if whole else f"status {response.status}", sent_s, ttft_s)
            except (aiohttp.ClientError, TimeoutError) as error:
                return Answer(type(error).__name__, sent_s, np.inf)

        answers = await asyncio.gather(*(one(url, at_s) for url in urls for at_s in times_s.tolist()))
    return [list(answers[row * len(times_s) : (row + 1) * len(times_s)]) for row in range(len(urls))]


@dataclass(frozen=True)
class Course:
    """What became of a burst, once with the fleet that was scaled and once with the static one."""

    answers: list[Answer]
    static_answers: list[Answer]
    fleet: PlayedFleet
    paid_s: float  # replica-seconds
    static_paid_s: float
    ticks: list[Tick]
    began_s: float  # Unix time of the first request

    def usd_per_mtok(self, static: bool = False) -> float:
        """Of the replicas that were there, over the tokens that clients received."""
        answers = self.static_answers if static else self.answers
        tokens = (PROMPT_TOKENS + OUTPUT_TOKENS) * sum(answer.outcome == "done" for answer in answers)
        return (self.static_paid_s if static else self.paid_s) * PROFILE.usd_per_gpu_hour / 3600.0 / tokens * 1e6

    def missed_by(self, time_s: float) -> int:
        """Requests whose TTFT objective had passed without a token by a Unix time."""
        return sum(answer.ttft_s > TTFT_S and answer.sent_s + TTFT_S <= time_s for answer in self.answers)


def played(
    burst: Burst,
    live: LiveConfig,
    fleet: PlayedFleet,
    fixed: LiveConfig,
    fixed_fleet: PlayedFleet,
    haproxy: HAProxy,
    controller: Controller | None,
    given_back_within_s: float = 180.0,
) -> Course:
    """Send the burst to both fleets; wait until the scaled one is given back.

    Without a process that hosts it, the live controller is run here; the static fleet's always is.
    """
    here = [LiveService(fixed)] + ([] if controller else [LiveService(live)])
    watchdog = Watchdog()
    loops = [threading.Thread(target=service.run, args=(watchdog,), daemon=True) for service in here]
    database = Database(live.database_url)
    database.create()
    try:
        wait_until(lambda: fleet.most >= 1 and fixed_fleet.most >= PEAK_SIZE, "the first replicas are ready")
        for loop in loops:
            loop.start()
        acted = "the first act"
        wait_until(lambda: any(tick.concluded for tick in read_ticks(database)), acted, limit_s=400.0, pause_s=0.5)
        for backend in (fleet.service, fixed_fleet.service):
            wait_until(lambda name=backend: haproxy.serves(name), f"{backend} has servers")
        began_s, paid_s, fixed_paid_s = time.time(), fleet.paid_s, fixed_fleet.paid_s
        answers, fixed_answers = asyncio.run(
            send([haproxy.url(fleet.service), haproxy.url(fixed_fleet.service)], burst.arrivals())
        )
        paid_s, fixed_paid_s = fleet.paid_s - paid_s, fixed_fleet.paid_s - fixed_paid_s
        wait_until(
            lambda: read_ticks(database, last=1)[0].snapshot.replicas_target[0, 0] <= 2,
            "the fleet is given back",
            limit_s=given_back_within_s,
            pause_s=0.5,
        )
        if controller:
            controller.down()
    finally:
        for service in here:
            service.stop()
        for loop in loops:
            loop.join(60.0)
    return Course(answers, fixed_answers, fleet, paid_s, fixed_paid_s, read_ticks(database, since_s=began_s), began_s)


def assert_worth_it(course: Course, attainment: float) -> None:
    """The whole promise: nothing lost, up before the budget burned, down after, for less than a static fleet."""
    for answers in (course.answers, course.static_answers):
        outcomes = [answer.outcome for answer in answers]
        assert {outcome: outcomes.count(outcome) for outcome in set(outcomes)} == {"done": len(answers)}
    assert course.fleet.most >= 3
    assert course.fleet.killed_with_requests == 0

    replicas = np.array([tick.snapshot.replicas_target[0, 0] for tick in course.ticks])
    assert np.nanmax(replicas) >= 3
    assert replicas[-1] <= 2
    budget = (1.0 - attainment) * len(course.answers)
    up = next(
        tick for tick in course.ticks if tick.target("settled").replicas[0, 0] > tick.snapshot.replicas_target[0, 0]
    )
    misses, missed = course.missed_by(up.time_s), course.missed_by(np.inf)
    assert misses < budget
    cost, static_cost = course.usd_per_mtok(), course.usd_per_mtok(static=True)
    within = 1.0 - missed / len(course.answers)
    static_within = np.mean([answer.ttft_s <= TTFT_S for answer in course.static_answers])
    print(
        f"replicas {replicas.tolist()}; up {up.time_s - course.began_s:.0f} s after the start with {misses} of "
        f"{budget:.0f} misses; TTFT within {TTFT_S:g} s: {within:.1%}, static {static_within:.1%}; "
        f"$ per million tokens: {cost:.2f}, static {static_cost:.2f}"
    )
    assert cost < static_cost


@pytest.fixture
def boot_s() -> float:
    """Seconds that a replica takes to start."""
    return 4.0


@pytest.fixture
def fleets(
    prometheus: Prometheus, haproxy: HAProxy, kube: KubeApiServer, boot_s: float
) -> Iterator[tuple[PlayedFleet, PlayedFleet]]:
    """One that is to be scaled, and a static one."""
    create_deployment(kube, "chat", 1)
    create_deployment(kube, "code", PEAK_SIZE)
    prometheus.scrape([(f"127.0.0.1:{haproxy.metrics_port}", {"job": "haproxy"})], "-haproxy")
    made = [PlayedFleet(kube, prometheus, name, PROFILE, boot_s) for name in ("chat", "code")]
    yield made[0], made[1]
    for fleet in made:
        fleet.stop()


FAST = {
    "interface": {"window": {"control_interval_s": 3.0, "metrics_delay_s": 1.0}},
    "guardrails": {"scale_down_cooldown_s": 9.0, "scale_down_window_s": 6.0, "scale_down_worth_s": 24.0},
}


@pytest.mark.timeout(580)
def test_a_burst_is_met_and_given_back_for_less_than_a_static_fleet_costs(
    prometheus: Prometheus,
    haproxy: HAProxy,
    kube: KubeApiServer,
    fleets: tuple[PlayedFleet, PlayedFleet],
    tmp_path: Path,
) -> None:
    """Time is compressed: ticks of three seconds, replicas that start in four."""
    fleet, fixed_fleet = fleets
    fast = {"spec": FAST, "metrics": {"window_s": 6.0}, "wait_s": 3.0}
    live = config(tmp_path, prometheus, haproxy, kube, fleet, policy={"reference": "token-demand:memory_s=30"}, **fast)
    fixed = config(
        tmp_path, prometheus, haproxy, kube, fixed_fleet, policy={"reference": f"static:replicas={PEAK_SIZE}"}, **fast
    )
    course = played(Burst(18.0, 12.0, 24.0, 50.0), live, fleet, fixed, fixed_fleet, haproxy, None)
    assert_worth_it(course, attainment=0.95)
    assert all(tick.concluded for tick in course.ticks)


@pytest.fixture
def mlflow(tmp_path: Path) -> Iterator[MLflow]:
    server = start(MLflow, tmp_path / "mlflow")
    yield server
    server.stop()


def champion(mlflow: MLflow, folder: Path) -> str:
    """The shipped bundle as champion of a model in the registry; its digest."""
    client = connect(mlflow.url)
    run = client.create_run(experiment_id(client)).info.run_id
    client.log_artifact(run, shutil.copy(SHIPPED_BUNDLE, folder / BUNDLE_FILE))
    digest = load_bundle(SHIPPED_BUNDLE).digest
    version = register(client, "shipped", run, digest)
    client.set_registered_model_alias("shipped", "champion", version)
    return digest


@pytest.mark.timeout(1200)
@pytest.mark.long
@pytest.mark.parametrize("host", ["--no-ray", pytest.param("--ray", marks=pytest.mark.ray)])
@pytest.mark.parametrize("boot_s", [20.0])
def test_the_shipped_policy_from_a_registry_meets_a_burst_for_less_than_a_static_fleet_costs(
    prometheus: Prometheus,
    haproxy: HAProxy,
    kube: KubeApiServer,
    mlflow: MLflow,
    fleets: tuple[PlayedFleet, PlayedFleet],
    tmp_path: Path,
    host: str,
) -> None:
    """In real time: the shipped policy ticks every 15 seconds, so everything lasts five times as long as above."""
    digest = champion(mlflow, tmp_path)
    fleet, fixed_fleet = fleets
    slow: dict[str, Any] = {"spec": {"guardrails": {"scale_down_cooldown_s": 30.0}}}
    policy = {"reference": "models:/shipped@champion", "tracking_uri": mlflow.url}
    live = config(tmp_path, prometheus, haproxy, kube, fleet, policy=policy, **slow)
    fixed = config(
        tmp_path, prometheus, haproxy, kube, fixed_fleet, policy={"reference": f"static:replicas={PEAK_SIZE}"}, **slow
    )
    path = tmp_path / "live.yaml"
    path.write_text(yaml.safe_dump(live.model_dump(mode="json", exclude_none=True, context=REVEALED)))
    controller = Controller(tmp_path, path, host)
    try:
        course = played(Burst(90.0, 60.0, 120.0, 250.0), live, fleet, fixed, fixed_fleet, haproxy, controller, 900.0)
    finally:
        controller.stop()
    assert_worth_it(course, attainment=0.95)
    caps = {int(tick.snapshot.batch_cap[0, 0]) for tick in course.ticks if tick.snapshot.batch_cap[0, 0] > 0}
    assert len(caps) >= 2, "batch caps moved in HAProxy"
    rungs = [int(tick.arrays["rung"][0]) for tick in course.ticks]
    assert rungs.count(0) > 0.8 * len(rungs), "the learned policy decided"
    assert all(tick.policy == f"learned shipped/1@{digest[:12]}" for tick in course.ticks)

"""A burst against real servers: Prometheus, HAProxy and the Kubernetes API, with emulated engines behind them.

Time is compressed: the controller ticks every three seconds, and replicas start in four.
"""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import aiohttp
import numpy as np
import pytest
from kube_objects import create_deployment, delete_pods
from played_fleet import PlayedFleet
from servers import HAProxy, KubeApiServer, Prometheus, wait_until

from autoscaler.config import LiveConfig
from autoscaler.records import read_ticks
from autoscaler.service import LiveService
from policies.contract import Outcome
from policies.engine import ColdStart, EngineProfile, StepModel

CALM_S, BURST_S, AFTER_S = 18.0, 30.0, 50.0
CALM_RPS, BURST_RPS = 1.5, 12.0
MOST = 6
PROFILE = EngineProfile(
    name="slow",
    model="emulated",
    gpu="none",
    backend="emulated",
    precision="none",
    gpus_per_replica=1,
    gpus_per_node=8,
    step=StepModel(
        a_ms=60.0,
        b_us_per_prefill_token=50.0,
        c_us_per_seq=2000.0,
        d_us_per_1k_kv_tokens=0.0,
        e_ns_per_prefill_token2=0.0,
    ),
    kv_capacity_tokens=100_000,
    max_num_seqs=8,
    max_num_batched_tokens=2048,
    cold_start=ColdStart(node_s=0.0, image_s=0.0, weights_s=0.0, warmup_s=4.0),
    usd_per_gpu_hour=3.6,
    fitted_on="round numbers for a test",
)


def config(folder: Path, prometheus: Prometheus, haproxy: HAProxy, kube: KubeApiServer, port: int) -> LiveConfig:
    connection = {"kubeconfig": kube.kubeconfig, "timeout_s": 10.0, "deadline_s": 20.0}
    service = {
        "service": "chat",
        "slo": {"ttft_s": 2.0, "tpot_s": 0.2, "attainment": 0.9},
        "pools": [{"engine": PROFILE, "min_replicas": 1, "max_replicas": MOST}],
        "interface": {"window": {"control_interval_s": 3.0, "metrics_delay_s": 1.0}},
        "guardrails": {"scale_down_cooldown_s": 9.0},
    }
    return LiveConfig.model_validate(
        {
            "services": [service],
            "metrics": {
                "url": prometheus.url,
                "gateway": "haproxy",
                "gateway_label": "proxy",
                "window_s": 6.0,
                "timeout_s": 5.0,
                "discovery_s": 10.0,
            },
            "actuator": {
                "kind": "composite",
                "replicas": {"kind": "kubernetes", "connection": connection, "replica_port": port},
                "batch_cap": {"kind": "haproxy", "sockets": [str(haproxy.socket)], "timeout_s": 5.0},
                "drain_s": 30.0,
            },
            "mode": "act",
            "policy": {"reference": "token-demand:memory_s=30", "cache": folder / "policies"},
            "counterfactuals": ["hpa", f"static:replicas={MOST}"],
            "kill_file": folder / "STOP",
            "records": {"url": f"sqlite:///{folder / 'jevons.db'}"},
            "lease": {"kind": "kubernetes", "connection": connection, "prefix": f"jevons-{port}-"},
            "exposition": {"port": 0},
            "supervision": {"revalidation": {"wait_s": 3.0}, "max_decision_age_s": 60.0},
            "limits": {"read_s": 30.0, "record_s": 30.0, "act_s": 60.0, "conclude_s": 30.0},
        }
    )


async def send(url: str, times_s: np.ndarray) -> list[str]:
    """One streamed request at each time; what became of each."""
    began_s = time.monotonic()
    timeout = aiohttp.ClientTimeout(total=180.0)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:

        async def one(at_s: float) -> str:
            await asyncio.sleep(max(0.0, began_s + at_s - time.monotonic()))
            body = {"model": "m", "prompt": "x", "jevons_prompt_tokens": 100, "max_tokens": 20, "stream": True}
            try:
                async with session.post(f"{url}/v1/completions", json=body) as response:
                    text = await response.text()
                    return "done" if response.status == 200 and "[DONE]" in text else f"status {response.status}"
            except (aiohttp.ClientError, TimeoutError) as error:
                return type(error).__name__

        return list(await asyncio.gather(*(one(at_s) for at_s in times_s.tolist())))


def arrivals() -> np.ndarray:
    rng = np.random.default_rng(0)
    total_s = CALM_S + BURST_S + AFTER_S
    calm = rng.uniform(0.0, total_s, int(CALM_RPS * total_s))
    burst = rng.uniform(CALM_S, CALM_S + BURST_S, int(BURST_RPS * BURST_S))
    return np.sort(np.concatenate([calm, burst]))


@pytest.mark.timeout(540)
def test_a_burst_is_met_and_given_back_without_losing_a_request(
    prometheus: Prometheus, haproxy: HAProxy, kube: KubeApiServer, tmp_path: Path
) -> None:
    delete_pods(kube)
    create_deployment(kube, "chat", 1)
    gateway = (f"127.0.0.1:{haproxy.metrics_port}", {"job": "haproxy"})
    fleet = PlayedFleet(kube, prometheus, "chat", PROFILE, 4.0, [gateway])
    service = LiveService(config(tmp_path, prometheus, haproxy, kube, fleet.port))
    loop = threading.Thread(target=service.run, daemon=True)
    try:
        wait_until(lambda: fleet.most >= 1, "the first replica is ready")
        loop.start()
        wait_until(lambda: service.last is not None and service.last.outcome[0] != Outcome.HELD, "the first act")
        outcomes = asyncio.run(send(haproxy.url("chat"), arrivals()))
        wait_until(
            lambda: service.last is not None and service.last.snapshot.replicas_target[0, 0] <= 2,
            "the fleet is given back",
            limit_s=120.0,
        )
    finally:
        service.stop()
        loop.join(60.0)
        fleet.stop()
    assert {outcome: outcomes.count(outcome) for outcome in set(outcomes)} == {"done": len(arrivals())}
    assert fleet.most >= 3
    assert fleet.killed_with_requests == 0

    ticks = read_ticks(service.database)
    assert all(tick.concluded for tick in ticks)
    replicas = np.array([tick.snapshot.replicas_target[0, 0] for tick in ticks])
    assert np.nanmax(replicas) >= 3
    assert replicas[-1] <= 2
    # Cost per token against a static fleet of the largest size on the same burst.
    paid = np.array([np.nansum(tick.arrays["snapshot/replicas_ready"]) for tick in ticks]).mean()
    assert paid < 0.75 * MOST
    usd = service.exposition._usd.sum()
    assert usd > 0
    assert service.exposition._tokens.sum() > 0.5 * 120 * len(arrivals())

"""Speed figures, one JSON object a line: name, value, unit.

Run with ``make bench``. CPU seconds of this process are what is divided by, so that a busy machine disturbs less;
ratios are measured in turn within one run. The best of several repeats is reported: noise only ever slows.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

from envs.autoscaling_env import AutoscalingEnv
from envs.cluster import window_step
from envs.cluster.simulation import SimulatedCluster
from envs.cluster.warm_up import warm_up
from envs.episodes import EpisodeSpec
from envs.randomization import Randomization, ScenarioBank, draw_bank
from envs.traffic.trace import Trace
from envs.vector_env import AutoscalingVecEnv
from policies.action import ACTIONS
from policies.baselines.token_demand import TokenDemandPolicy
from policies.contract import Policy
from policies.decider import Decider
from policies.engine import ColdStart, EngineProfile, StepModel
from policies.fleet import Fleet
from policies.learned import LearnedPolicy, load_bundle
from policies.spec import GuardrailSpec, InterfaceSpec, ObjectiveSpec, PoolSpec, ScalingSpec, Slo, shipped_configs
from tests.benchmarks import kubernetes_pods, live, live_edges, prometheus_reading

REQUESTS = 200_000
ENVS = 512
REPEATS = 5


def main() -> None:
    """Print every figure."""
    torch.set_num_threads(1)
    warm_up(lambda line: print(line, file=sys.stderr))
    for name, value, unit in figures():
        print(json.dumps({"name": name, "value": round(value, 3 if value < 1000 else 0), "unit": unit}), flush=True)


def figures() -> Iterator[tuple[str, float, str]]:
    """All of them, as they are measured."""
    for requests in (REQUESTS // 4, REQUESTS):
        yield f"simulator_requests_per_s_{requests}", simulator(requests, 8, 40.0), "requests/CPU-s"
    yield "simulator_requests_per_s_64_replicas", simulator(REQUESTS, 64, 320.0), "requests/CPU-s"
    bank = twenty_requests_a_step()
    kernel_us, overhead_us, per_step = vector_env(bank)
    yield "env_requests_per_step", per_step, "requests"
    yield "env_kernel_us_per_step_512", kernel_us, "us"
    yield "env_overhead_us_per_step_512", overhead_us, "us"
    yield "env_steps_per_s_512", 1e6 / (kernel_us + overhead_us), "steps/CPU-s"
    native, share = ppo(bank, native=True)
    dummy, _ = ppo(bank, native=False)
    yield "ppo_steps_per_s_native", native, "steps/CPU-s"
    yield "ppo_env_share_of_time_native", share, "share"
    yield "ppo_steps_per_s_dummy", dummy, "steps/CPU-s"
    yield "ppo_native_over_dummy", native / dummy, "ratio"
    for n in (1, 1000):
        for kind in ("token-demand", "learned"):
            p50, p99 = decision(kind, n)
            yield f"decision_{kind}_p50_ms_n{n}", p50 * 1e3, "ms"
            yield f"decision_{kind}_p99_ms_n{n}", p99 * 1e3, "ms"
    yield from live.figures()
    yield from live_edges.figures()
    yield from kubernetes_pods.figures()
    yield from prometheus_reading.figures()


def best_cpu_s(run: Callable[[], None], repeats: int = REPEATS) -> float:
    """Least CPU seconds of several runs."""
    times = []
    for _ in range(repeats):
        started = time.process_time()
        run()
        times.append(time.process_time() - started)
    return min(times)


def simulator(requests: int, replicas: int, rps: float) -> float:
    """Requests per CPU-second: Poisson arrivals, lognormal lengths, 8B-like replicas on H100, cap 128, budget 2,048."""
    rng = np.random.default_rng(0)
    arrival_s = np.cumsum(rng.exponential(1.0 / rps, requests))
    trace = Trace.from_arrays(
        arrival_s=arrival_s,
        prompt_tokens=np.clip(rng.lognormal(6, 1, requests), 1, 8000).astype(np.int32),
        output_tokens=np.clip(rng.lognormal(5, 1, requests), 1, 2000).astype(np.int32),
        name="benchmark",
    )
    engine = EngineProfile(
        name="benchmark",
        model="8B",
        gpu="H100",
        backend="vLLM",
        precision="bf16",
        gpus_per_replica=1,
        gpus_per_node=8,
        step=StepModel(
            a_ms=6.0,
            b_us_per_prefill_token=27.0,
            c_us_per_seq=20.0,
            d_us_per_1k_kv_tokens=44.0,
            e_ns_per_prefill_token2=0.93,
        ),
        kv_capacity_tokens=437_000,
        max_num_seqs=256,
        max_num_batched_tokens=2048,
        cold_start=ColdStart(node_s=0, image_s=0, weights_s=0, warmup_s=0),
        usd_per_gpu_hour=4.0,
        fitted_on="the benchmark's own figures",
    )
    pool = PoolSpec(engine=engine, max_replicas=replicas, initial_replicas=replicas, initial_batch_cap=128)
    spec = ScalingSpec(slo=Slo(ttft_s=1.0, tpot_s=0.05), pools=(pool,))

    def measured() -> float:
        cluster = SimulatedCluster.replay([spec], [trace], [0])
        seconds = best_cpu_s(lambda: cluster.wait_until(arrival_s[-1] + 600.0), repeats=1)
        assert cluster.arrays.service["finished"][0] == requests
        return seconds

    return requests / min(measured() for _ in range(REPEATS))


def twenty_requests_a_step() -> ScenarioBank:
    """Small worlds with about 20 requests per control interval."""
    ranges = Randomization(
        traces=8,
        scenarios=64,
        trace_s=2 * 3600.0,
        profiles={"chat": 1.0},
        engines=("llama-3.1-70b-h100-tp4",),
        mean_replicas=(0.1, 0.18),
        max_replicas=8,
    )
    return draw_bank(ranges, InterfaceSpec(), GuardrailSpec(), ObjectiveSpec(), 0)


def vector_env(bank: ScenarioBank) -> tuple[float, float, float]:
    """Kernel and other microseconds of CPU per environment step, and requests per step, at 512 environments."""
    env = AutoscalingVecEnv(bank, ENVS)
    env.reset()
    actions = np.zeros((ENVS, len(ACTIONS)), np.float32)
    kernel = window_step
    names = ("run_windows", "apply_all", "reset_rows")
    originals = {name: getattr(kernel, name) for name in names}
    spent = [0.0]

    def timed(function: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: object) -> None:
            started = time.process_time()
            function(*arguments)
            spent[0] += time.process_time() - started

        return call

    steps, results = 60, []
    try:
        for name in names:
            setattr(kernel, name, timed(originals[name]))
        for _ in range(REPEATS):
            spent[0] = 0.0
            started = time.process_time()
            for _ in range(steps):
                env.step_async(actions)
                env.step_wait()
            whole = time.process_time() - started
            results.append((whole - spent[0], spent[0]))
    finally:
        for name in names:
            setattr(kernel, name, originals[name])
    other, inside = (min(column) / steps / ENVS * 1e6 for column in zip(*results, strict=True))
    episodes = env.episodes
    return inside, other, float(episodes.cluster.counter("arrived").sum() / (episodes._step + 1).sum())


def ppo(bank: ScenarioBank, native: bool) -> tuple[float, float]:
    """Environment steps per CPU-second of PPO.learn, and the environment's share of the time (native only)."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.vec_env import DummyVecEnv

    episodes = EpisodeSpec()
    if native:
        env: AutoscalingVecEnv | DummyVecEnv = AutoscalingVecEnv(bank, ENVS, episodes)
        rollout, total = 64, 4 * 64 * ENVS
    else:
        env = DummyVecEnv([lambda: AutoscalingEnv(bank, episodes)] * 8)
        rollout, total = 256, 4 * 256 * 8
    model = PPO(
        "MlpPolicy", env, n_steps=rollout, batch_size=min(4096, rollout * env.num_envs), n_epochs=4, device="cpu"
    )
    model.learn(rollout * env.num_envs)
    env_before = env.step_s if isinstance(env, AutoscalingVecEnv) else 0.0
    wall, started = time.perf_counter(), time.process_time()
    model.learn(total)
    cpu_s, wall_s = time.process_time() - started, time.perf_counter() - wall
    share = (env.step_s - env_before) / wall_s if isinstance(env, AutoscalingVecEnv) else float("nan")
    return total / cpu_s, share


def decision(kind: str, n: int) -> tuple[float, float]:
    """Median and 99th percentile seconds of one decision pass for `n` services."""
    from policies.spec import find_engine

    engine = find_engine("llama-3.1-8b-h100", shipped_configs())
    spec = ScalingSpec(slo=Slo(ttft_s=2.0, tpot_s=0.05), pools=(PoolSpec(engine=engine, max_replicas=8),))
    rng = np.random.default_rng(0)
    trace = Trace.from_arrays(
        arrival_s=np.cumsum(rng.exponential(0.5, 600)),
        prompt_tokens=rng.integers(100, 2000, 600),
        output_tokens=rng.integers(10, 400, 600),
        name="benchmark",
    )
    cluster = SimulatedCluster.replay([spec] * min(n, 32), [trace] * min(n, 32), range(min(n, 32)))
    fleet = Fleet.from_specs([spec] * n)
    decider = Decider(fleet, spec.interface.window, spec.guardrails)
    policy: Policy = TokenDemandPolicy(fleet)
    if kind == "learned":
        policy = LearnedPolicy(load_bundle(shipped_configs() / "policies" / "default.zip"), fleet, spec.interface)
    cluster.wait_until(60.0)
    from policies.contract import take_rows

    snapshot = take_rows(cluster.read(), np.arange(n) % min(n, 32))
    times = []
    for _ in range(300):
        started = time.perf_counter()
        decider.tick(snapshot, policy)
        times.append(time.perf_counter() - started)
    return float(np.quantile(times, 0.5)), float(np.quantile(times, 0.99))


if __name__ == "__main__":
    main()

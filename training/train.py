"""The learning recipe, readable from top to bottom.

Worlds are drawn, PPO learns in many of them at once from a guarded rule on, the price of a miss follows the attainment
constraint, held-out times and worlds decide which network is kept. Every run is in MLflow.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from stable_baselines3 import PPO
from stable_baselines3.common.logger import Logger

from envs.episodes import Episodes
from envs.randomization import ScenarioBank, draw_bank
from envs.traces import Trace
from envs.vector_env import AutoscalingVecEnv
from policies.action import ACTIONS
from policies.learned import FORMAT, Manifest, write_bundle
from policies.observation import FEATURES
from policies.spec import ScalingSpec
from training.export import check_equal, probe_observations, to_onnx
from training.monitor import RunState, TrainingMonitor, Validator
from training.tracking import code_version, connect, experiment_id
from training.train_config import TrainConfig

VALIDATION_SEED = 20_000
EQUALITY_PROBES = 10_000


@dataclass(frozen=True)
class TrainedPolicy:
    """What one seed gave."""

    seed: int
    folder: Path
    score: float
    bundle: Path
    digest: str
    run_id: str
    state: RunState


def train_all(config: TrainConfig, out: Path, resume: bool, say: Callable[[str], None], bar: Any) -> TrainedPolicy:
    """Train every seed of `config` and return the one with the best validation score.

    Args:
        config: the run.
        out: folder of the run; each seed gets a sub-folder.
        resume: go on from the checkpoints in `out` where there are any.
        say: receives one-line messages.
        bar: called with (label, done, total) for progress.
    """
    torch.set_num_threads(1)  # two threads collapse when the cores are shared
    bank = draw_worlds(config, lambda done, total: bar("drawing worlds", done, total))
    say(f"{len(bank)} scenarios on {len(bank.traces)} traces, {len(bank.library.arrival_s):,} requests")
    return min((train_seed(config, bank, seed, out, resume, say, bar) for seed in config.seeds), key=lambda p: p.score)


def draw_worlds(config: TrainConfig, on_trace: Callable[[int, int], None]) -> ScenarioBank:
    """The worlds of a run: random ones, and the scenarios of a suite when the configuration names one."""
    bank = draw_bank(config.worlds, config.interface, config.guardrails, config.objective, config.seeds[0], on_trace)
    if config.suite is None:
        return bank
    from training.scenarios import load_suite

    specs: list[ScalingSpec] = []
    traces: list[Trace] = []
    trace_of: list[int] = []
    for scenario in load_suite(config.suite).scenarios:
        for seed in scenario.seeds if scenario.trace.generator else scenario.seeds[:1]:
            specs += [scenario.spec] * config.suite_copies
            trace_of += [len(traces)] * config.suite_copies
            traces.append(scenario.requests(seed))
    return bank.joined(specs, traces, trace_of)


def train_seed(
    config: TrainConfig,
    bank: ScenarioBank,
    seed: int,
    out: Path,
    resume: bool,
    say: Callable[[str], None],
    bar: Any,
) -> TrainedPolicy:
    """Train one seed to its end, its early stop, or where it was interrupted."""
    folder = out / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    resumed = resume and (folder / "checkpoint.zip").is_file()
    state = RunState.load(folder) if resumed else RunState(log_miss_price=float(np.log(config.objective.miss_price)))
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))

    held_out = config.episodes.model_copy(update={"log_miss_price_spread": 0.0})
    part = (config.train_share, 1.0)
    validator = Validator(Episodes(bank, config.validation.episodes, held_out, VALIDATION_SEED, part), VALIDATION_SEED)
    # A resumed run draws new episodes: those before the interruption are learned from already.
    env = AutoscalingVecEnv(
        bank,
        config.ppo.num_envs,
        config.episodes,
        seed=seed + 1_000_003 * state.steps,
        part=(0.0, config.train_share),
    )
    model = PPO.load(folder / "checkpoint.zip", env, device="cpu") if resumed else new_model(config, env, seed)
    model.set_logger(Logger(folder=None, output_formats=[]))

    client = connect(config.tracking_uri)
    if not state.mlflow_run_id:
        run = client.create_run(experiment_id(client), run_name=f"{config.name}-seed{seed}")
        state.mlflow_run_id = run.info.run_id
        _log_start(client, state.mlflow_run_id, config, bank, seed)
    run_id = state.mlflow_run_id

    def log(metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            client.log_metric(run_id, name, value, step=step, synchronous=False)

    monitor = TrainingMonitor(
        config, folder, state, validator, log, lambda steps: bar(f"seed {seed}", steps, config.total_steps)
    )
    monitor.init_callback(model)
    if not state.curve:
        first = monitor.validate()
        say(f"seed {seed}: start {_words(first)}")
    if state.steps < config.total_steps and not state.finished:
        try:
            model.learn(config.total_steps - state.steps, callback=monitor, reset_num_timesteps=False)
        except KeyboardInterrupt:
            monitor.checkpoint()
            raise
        monitor.validate()
        state.finished = True
        state.save(folder)
    best = next(point for point in state.curve if point["score"] == state.best_score)
    say(f"seed {seed}: best at {state.best_steps:,} steps {_words(best)}")

    bundle, digest = write_policy(config, bank, folder, state, seed)
    for file in ("config.yaml", "best.zip", "policy.zip", "state.json"):
        client.log_artifact(run_id, str(folder / file))
    client.log_metric(run_id, "validation/best_score", state.best_score)
    client.set_tag(run_id, "bundle_digest", digest)
    client.set_terminated(run_id)
    return TrainedPolicy(seed, folder, state.best_score, bundle, digest, run_id, state)


def new_model(config: TrainConfig, env: AutoscalingVecEnv, seed: int) -> PPO:
    """PPO whose untrained network is the guarded rule of the warm start: a small residual around a constant."""
    ppo = config.ppo
    model = PPO(
        "MlpPolicy",
        env,
        learning_rate=lambda left: ppo.learning_rate * (0.1 + 0.9 * left),
        n_steps=ppo.steps_per_rollout,
        batch_size=ppo.batch_size,
        n_epochs=ppo.epochs,
        gamma=ppo.gamma,
        gae_lambda=ppo.gae_lambda,
        clip_range=ppo.clip_range,
        ent_coef=ppo.entropy,
        target_kl=ppo.target_kl,
        policy_kwargs={"net_arch": list(ppo.hidden), "log_std_init": ppo.log_std},
        seed=seed,
        device="cpu",
    )
    if config.warm_start is not None:
        action = config.interface.action
        output = np.log(config.warm_start.headroom / action.headroom_reference) / np.log(action.headroom_span)
        with torch.no_grad():
            policy: Any = model.policy
            policy.action_net.bias[ACTIONS.index("headroom")] = float(np.clip(output, -1.0, 1.0))
    return model


def write_policy(config: TrainConfig, bank: ScenarioBank, folder: Path, state: RunState, seed: int) -> tuple[Path, str]:
    """Export the best network of a run to `policy.zip`, checked against `predict`; the bundle and its digest."""
    model = PPO.load(folder / "best.zip", device="cpu")
    weights = to_onnx(model)
    difference = check_equal(model, weights, probe_observations(EQUALITY_PROBES))
    best = next(point for point in state.curve if point["score"] == state.best_score)
    manifest = Manifest(
        format=FORMAT,
        interface=config.interface,
        interface_digest=config.interface.digest(),
        features=FEATURES,
        actions=ACTIONS,
        feature_low=tuple(state.feature_low),
        feature_high=tuple(state.feature_high),
        log_miss_price=state.log_miss_price,
        log_miss_price_span=config.episodes.log_miss_price_spread,
        provenance={
            "code_version": code_version(),
            "algorithm": "PPO",
            "seed": seed,
            "steps": state.best_steps,
            "training_seconds": round(state.seconds, 1),
            "validation": best,
            "equality_with_predict": difference,
            "equality_probes": EQUALITY_PROBES,
            "trace_digests": [trace.digest() for trace in bank.traces],
            "config": json.loads(config.model_dump_json()),
        },
    )
    path = folder / "policy.zip"
    return path, write_bundle(path, manifest, weights)


def _log_start(client: Any, run_id: str, config: TrainConfig, bank: ScenarioBank, seed: int) -> None:
    parameters = {
        "seed": seed,
        "total_steps": config.total_steps,
        "interface_digest": config.interface.digest(),
        "scenarios": len(bank),
        "traces": len(bank.traces),
        "code_version": code_version(),
        **{f"ppo.{name}": value for name, value in config.ppo.model_dump().items()},
    }
    for name, value in parameters.items():
        client.log_param(run_id, name, value)
    client.log_dict(run_id, config.model_dump(mode="json"), "resolved_config.json")
    client.log_dict(run_id, {trace.name: trace.digest() for trace in bank.traces}, "trace_digests.json")
    client.log_dict(
        run_id, {f"{row}-{spec.service}": spec.digest() for row, spec in enumerate(bank.specs)}, "spec_digests.json"
    )


def _words(result: dict[str, float]) -> str:
    return (
        f"score {result['score']:.3f} (provisioned {result['provisioned']:.2f}, misses {result['misses']:.2f}), "
        f"attainment {result['attainment']:.4f}, holds {result['holds_slo_share']:.0%}"
    )

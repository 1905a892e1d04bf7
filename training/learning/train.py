"""The learning recipe, readable from top to bottom.

Worlds are drawn, and PPO learns in many of them at once, starting from a guarded rule. Each episode has a price of a
miss of its own, which the network sees. Held-out times and worlds decide which network is kept. Every run is in MLflow.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import yaml
from stable_baselines3 import PPO
from stable_baselines3.common.logger import Logger

from autoscaler.versions.registry import BUNDLE_FILE
from envs.episodes import Episodes
from envs.randomization import ScenarioBank, draw_bank
from envs.traffic.trace import Trace
from envs.vector_env import AutoscalingVecEnv
from policies.action import ACTIONS
from policies.atomic_files import write_text
from policies.engine import ConfigError, read_yaml
from policies.learned import FORMAT, Manifest, load_bundle, write_bundle
from policies.observation import FEATURES
from policies.redaction import scrubbed
from policies.spec import ScalingSpec
from training.learning.checkpoint import load_checkpoint
from training.learning.export import check_equal, probe_observations, to_onnx
from training.learning.group_baseline import GroupRolloutBuffer
from training.learning.monitor import Log, RunState, TrainingMonitor, Validator
from training.learning.train_config import TrainConfig
from training.versions.tracking import RunLog, code_version, connect, experiment_id, run_exists

VALIDATION_SEED = 20_000
EQUALITY_PROBES = 10_000
CHANGEABLE = {"total_steps", "seeds", "tracking_uri", "evaluation_suite", "checkpoint_every_steps"}
"""What a resumed run may be given anew."""


class Stopped(Exception):  # noqa: N818 - nothing is wrong
    """Raised in a callback to give a run up; what it has learned stays in its folder."""


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
    course = course_of(config, out, lambda done, total: bar("drawing worlds", done, total))
    bank = course.bank
    say(f"{len(bank)} scenarios on {len(bank.traces)} traces, {len(bank.library.arrival_s):,} requests")
    return min(
        (train_seed(config, course, seed, out, resume, say, bar) for seed in config.seeds), key=lambda p: p.score
    )


class Course(Protocol):
    """What learning from scratch and fine-tuning differ in.

    Attributes:
        bank: the worlds to learn in.
        part: share of every trace's time to learn on, as (from, to).
    """

    bank: ScenarioBank
    part: tuple[float, float]

    def begin(self) -> RunState:
        """The state of a run that has not begun."""
        ...

    def first_model(self, model: PPO) -> PPO:
        """A model to begin with, made of an untrained one."""
        ...

    def monitor(self, folder: Path, state: RunState, log: Log, on_progress: Callable[[int], None]) -> TrainingMonitor:
        """What judges the network while it learns."""
        ...


class FromScratch:
    """The course of a run that starts at a rule."""

    def __init__(self, config: TrainConfig, bank: ScenarioBank) -> None:
        self.config = config
        self.bank = bank
        self.part = (0.0, config.train_share)

    def begin(self) -> RunState:
        """Nothing is known."""
        return RunState()

    def first_model(self, model: PPO) -> PPO:
        """Untrained, it is the rule."""
        return model

    def monitor(self, folder: Path, state: RunState, log: Log, on_progress: Callable[[int], None]) -> TrainingMonitor:
        """Validates on the last part of every trace."""
        config, part = self.config, (self.config.train_share, 1.0)
        episodes = Episodes(self.bank, config.validation.episodes, config.episodes, VALIDATION_SEED, part)
        return TrainingMonitor(config, folder, state, Validator(episodes, VALIDATION_SEED), log, on_progress)


def course_of(config: TrainConfig, out: Path, on_trace: Callable[[int, int], None]) -> Course:
    """The course that a configuration describes; `out` is the folder of the run."""
    if config.fine_tune is None:
        return FromScratch(config, draw_worlds(config, on_trace))
    from training.learning.fine_tune import FineTuning

    return FineTuning(config, out, on_trace)


def draw_worlds(config: TrainConfig, on_trace: Callable[[int, int], None]) -> ScenarioBank:
    """The worlds of a run: random ones, and the scenarios of a suite when the configuration names one."""
    bank = draw_bank(config.worlds, config.interface, config.guardrails, config.objective, config.seeds[0], on_trace)
    if config.suite is None:
        return bank
    from training.replaying.scenarios import load_suite

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
    course: Course,
    seed: int,
    out: Path,
    resume: bool,
    say: Callable[[str], None],
    bar: Any,
) -> TrainedPolicy:
    """Train one seed to its end, its early stop, or where it was interrupted.

    Its MLflow run ends as FINISHED, as KILLED when interrupted or stopped, or as FAILED; a resumed run goes on in the
    same one.

    Raises:
        ConfigError: when the run to resume was started with another configuration.
    """
    folder = out / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    resumed = resume and (folder / "state.json").is_file()
    if resumed:
        check_same(config, folder / "config.yaml")
        state = RunState.load(folder)
    else:
        state = course.begin()
    client = connect(config.tracking_uri)
    bundle, known_run = folder / BUNDLE_FILE, run_exists(client, state.mlflow_run_id)
    if state.bundle_digest and known_run and bundle.is_file() and load_bundle(bundle).digest == state.bundle_digest:
        # A second export would change what is registered already.
        say(f"seed {seed}: finished before, best at {state.best_steps:,} steps {_words(state.best_point())}")
        return TrainedPolicy(seed, folder, state.best_score, bundle, state.bundle_digest, state.mlflow_run_id, state)
    write_text(folder / "config.yaml", yaml.safe_dump(_written(config), sort_keys=False))

    if known_run:
        client.update_run(state.mlflow_run_id, status="RUNNING")
    else:
        run = client.create_run(experiment_id(client), run_name=f"{config.name}-seed{seed}")
        state.mlflow_run_id = run.info.run_id
        state.save(folder)
    run_id = state.mlflow_run_id
    log = RunLog(client, run_id)
    try:
        if not (known_run and state.curve):
            _log_start(client, run_id, config, course.bank, seed)
        _learn(config, course, seed, folder, state, log, say, bar)
        bundle, digest = write_policy(config, course.bank, folder, state, seed)
        for file in ("config.yaml", "best.zip", BUNDLE_FILE, "state.json"):
            client.log_artifact(run_id, str(folder / file))
        client.log_metric(run_id, "validation/best_score", state.best_score)
        client.set_tag(run_id, "bundle_digest", digest)
        state.bundle_digest = digest
        state.save(folder)
    except (KeyboardInterrupt, Stopped):
        log.end("KILLED")
        raise
    except BaseException:
        log.end("FAILED")
        raise
    log.end()
    return TrainedPolicy(seed, folder, state.best_score, bundle, digest, run_id, state)


def _learn(
    config: TrainConfig,
    course: Course,
    seed: int,
    folder: Path,
    state: RunState,
    log: RunLog,
    say: Callable[[str], None],
    bar: Any,
) -> None:
    """Everything between the start of a seed, or where its checkpoint left it, and its best network."""
    monitor = course.monitor(folder, state, log, lambda steps: bar(f"seed {seed}", steps, config.total_steps))
    ppo = config.ppo
    env = AutoscalingVecEnv(course.bank, ppo.num_envs, config.episodes, seed, course.part, ppo.group)
    if state.checkpoint:
        model = load_checkpoint(folder / state.checkpoint, env)
    else:
        model = course.first_model(new_model(config, env, seed))
    # A resumed run draws new episodes: those before the interruption are learned from already. Making or loading a
    # model seeds the environment too, so this comes after it.
    model.set_random_seed((seed + 1_000_003 * state.steps) % (1 << 31))
    model.set_logger(Logger(folder=None, output_formats=[]))
    monitor.init_callback(model)
    if not state.curve:
        say(f"seed {seed}: start {_words(monitor.validate())}")
    if state.steps < config.total_steps and not monitor.stopped:
        try:
            model.learn(config.total_steps - state.steps, callback=monitor, reset_num_timesteps=False)
        except KeyboardInterrupt:
            monitor.checkpoint()
            raise
    if state.curve[-1]["steps"] < state.steps and not monitor.stopped:
        monitor.validate()
    state.finish(folder)
    say(f"seed {seed}: best at {state.best_steps:,} steps {_words(state.best_point())}")


def _written(config: TrainConfig) -> Any:
    """A configuration as it is kept beside its run."""
    return scrubbed(config.model_dump(mode="json"))


def check_same(config: TrainConfig, path: Path) -> None:
    """Make sure that a run to resume was started with this configuration, number of steps and the like aside.

    Raises:
        ConfigError: naming the fields that differ.
    """
    started = read_yaml(path)
    now = _written(config)
    before = started if isinstance(started, dict) else {}
    differing = [name for name in now if name not in CHANGEABLE and now[name] != before.get(name)]
    if now["seeds"][0] != (before.get("seeds") or [None])[0]:
        differing.append("seeds (the first one draws the worlds)")
    if differing:
        raise ConfigError(f"{path}: the run to resume was started with another {', '.join(differing)}")


def new_model(config: TrainConfig, env: AutoscalingVecEnv, seed: int) -> PPO:
    """PPO whose untrained network is the guarded rule of the warm start: a small residual around a constant."""
    ppo = config.ppo
    model = PPO(
        "MlpPolicy",
        env,
        # The last rollout may go beyond the end: what is left is never below 0.
        learning_rate=lambda left: ppo.learning_rate * (0.1 + 0.9 * max(left, 0.0)),
        n_steps=ppo.steps_per_rollout,
        batch_size=ppo.batch_size,
        n_epochs=ppo.epochs,
        gamma=ppo.gamma,
        gae_lambda=ppo.gae_lambda,
        clip_range=ppo.clip_range,
        ent_coef=ppo.entropy,
        target_kl=ppo.target_kl,
        rollout_buffer_class=GroupRolloutBuffer,
        rollout_buffer_kwargs={"group": ppo.group},
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
    """Export the best network of a finished run to its bundle, checked against `predict`; path and digest."""
    model = load_checkpoint(folder / "best.zip")
    weights = to_onnx(model)
    difference = check_equal(model, weights, probe_observations(EQUALITY_PROBES))
    manifest = Manifest(
        format=FORMAT,
        interface=config.interface,
        interface_digest=config.interface.digest(),
        features=FEATURES,
        actions=ACTIONS,
        feature_low=tuple(state.feature_low),
        feature_high=tuple(state.feature_high),
        log_miss_price=float(np.log(config.objective.miss_price)),
        log_miss_price_span=config.episodes.log_miss_price_spread,
        provenance={
            "code_version": code_version(),
            "algorithm": "PPO",
            "seed": seed,
            "steps": state.best_steps,
            "training_seconds": round(state.seconds, 1),
            "validation": state.best_point(),
            "equality_with_predict": difference,
            "equality_probes": EQUALITY_PROBES,
            "trace_digests": [trace.digest() for trace in bank.traces],
            "config": json.loads(config.model_dump_json(exclude={"tracking_uri"})),  # where it was kept says nothing
        },
    )
    path = folder / BUNDLE_FILE
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
    known = client.get_run(run_id).data.params  # of a run that was cut off here; they cannot be changed
    for name, value in parameters.items():
        if name not in known:
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

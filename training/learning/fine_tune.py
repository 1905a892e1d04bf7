"""Fine-tuning: a policy goes on learning on one service's own traffic.

The trace is cut by time: its first part to learn on, beside a share of random worlds so that nothing is forgotten; the
part after it decides which network is kept; the last part is for the verdict alone.
Validation replays its part through the controller that ships, as the policy will run live, error budget included.
This module must not know how a policy is registered.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from stable_baselines3 import PPO

from envs.cluster.library import RequestLibrary
from envs.episodes import Episodes
from envs.randomization import ScenarioBank, draw_bank
from envs.traffic.formats import import_trace
from envs.traffic.trace import Trace, TraceError
from policies.engine import ConfigError
from policies.fleet import Fleet
from policies.learned import BundleMismatch, LearnedPolicy, PolicyBundle, load_bundle
from policies.spec import ScalingSpec
from training.judging.what_if import replicas_needed
from training.learning.export import to_onnx
from training.learning.fine_tune_config import FineTuneSpec, Origin
from training.learning.monitor import Log, RunState, TrainingMonitor, Validator
from training.learning.network import actor_layers, freeze_actor, hidden_widths, load_actor
from training.learning.train_config import TrainConfig
from training.replaying.world import World

SOURCE_FILE = "source.zip"
"""The bundle that a run started from, in its folder: an alias may name another one when the run is resumed."""
UNSEEN_SEED = 30_000
MIN_STEPS = 40
"""Fewest control intervals of an episode: starts take minutes."""
FIRST_FLEET = 1.5
"""Replicas at the start of a replay over the demand of its first five minutes, where the service does not say."""


class Parts(NamedTuple):
    """A trace cut by time, each part rebased to 0."""

    train: Trace
    validation: Trace
    held_out: Trace


def cuts_s(spec: FineTuneSpec, trace: Trace) -> tuple[float, float]:
    """Where the validation part begins and where it ends, seconds."""
    return (
        spec.train_share * trace.duration_s,
        (spec.train_share + spec.validation_share) * trace.duration_s,
    )


def cut(spec: FineTuneSpec, trace: Trace) -> Parts:
    """The three parts.

    Raises:
        TraceError: when one has no request.
    """
    first, second = cuts_s(spec, trace)
    parts = Parts(trace.slice(0.0, first), trace.slice(first, second), trace.slice(second, trace.duration_s))
    for name, part in parts._asdict().items():
        if not len(part):
            raise TraceError(f"trace {trace.name!r}: no request lies in its {name.replace('_', '-')} part")
    return parts


def prepared(recipe: TrainConfig, source: str, bundle: PolicyBundle, trace: Path, service: ScalingSpec) -> TrainConfig:
    """The recipe for one service: the network and interface of the bundle, the limits of the service.

    Raises:
        BundleMismatch: when the bundle cannot go on learning, or was made for another interface.
        ConfigError: when the service has a name that cannot be registered.
        TraceError: when the trace is too short for an episode.
    """
    manifest = bundle.manifest
    if manifest.interface_digest != service.interface.digest():
        raise BundleMismatch(
            f"{bundle.source}: trained for another interface (control interval, metrics delay or action) than that of "
            f"service {service.service!r}"
        )
    if set(service.service) & set("/:"):
        raise ConfigError(f"service {service.service!r}: the name of a registered policy may hold neither / nor :")
    spec = recipe.fine_tune or FineTuneSpec()
    requests = import_trace(trace).trace
    interval_s = service.interface.window.control_interval_s
    # The first window runs before the first action.
    steps = min(recipe.episodes.steps, math.floor(spec.train_share * requests.duration_s / interval_s) - 1)
    if steps < MIN_STEPS:
        needed_s = (MIN_STEPS + 1) * interval_s / spec.train_share
        raise TraceError(
            f"trace {requests.name!r}: lasts {requests.duration_s:,.0f} s, too short: fine-tuning learns on its first "
            f"{spec.train_share:.0%}, where an episode must fit, so it needs {needed_s:,.0f} s at least"
        )
    cut(spec, requests)
    origin = Origin(
        source=source,
        bundle_digest=bundle.digest,
        trace=trace.resolve(),
        trace_digest=requests.digest(),
        service=service,
    )
    changes = {
        "name": f"{recipe.name}-{service.service}",
        "interface": manifest.interface,
        "guardrails": service.guardrails,
        # The dial stays the source's.
        "objective": service.objective.model_copy(update={"miss_price": math.exp(manifest.log_miss_price)}),
        "evaluation_suite": None,
        "warm_start": None,
        "episodes": recipe.episodes.model_copy(
            update={"steps": steps, "log_miss_price_spread": manifest.log_miss_price_span}
        ),
        "ppo": recipe.ppo.model_copy(update={"hidden": hidden_widths(actor_layers(bundle))}),
        "fine_tune": spec.model_copy(update={"origin": origin}),
    }
    return recipe.model_copy(update=changes)


class FineTuning:
    """The course of a fine-tuning; satisfies `training.learning.train.Course`.

    Args:
        config: as `prepared` gives it.
        out: folder of the run, with the bundle to start from.
        on_trace: called with (traces done, traces in all) while worlds are drawn.

    Raises:
        ConfigError: when the trace is not the one that the run was started with.
        BundleMismatch: when the bundle is not.
    """

    part = (0.0, 1.0)

    def __init__(self, config: TrainConfig, out: Path, on_trace: Callable[[int, int], None]) -> None:
        assert config.fine_tune is not None
        assert config.fine_tune.origin is not None, "set by `prepared`"
        self.config, self.spec, self.origin = config, config.fine_tune, config.fine_tune.origin
        self.bundle = load_bundle(out / SOURCE_FILE)
        if self.bundle.digest != self.origin.bundle_digest:
            raise BundleMismatch(f"{out / SOURCE_FILE}: not the bundle that this run was started from")
        trace = import_trace(self.origin.trace).trace
        if trace.digest() != self.origin.trace_digest:
            raise ConfigError(f"{self.origin.trace}: not the trace that this run was started with")
        self._parts = cut(self.spec, trace)
        traces = config.worlds.traces
        worlds = self._worlds(config.seeds[0], lambda done, _: on_trace(done, 2 * traces))
        copies = math.ceil(len(worlds) * self.spec.own_share / (1.0 - self.spec.own_share))
        self.bank = worlds.joined([self.origin.service] * copies, [self._parts.train], [0] * copies)
        self._unseen = self._worlds(UNSEEN_SEED, lambda done, _: on_trace(traces + done, 2 * traces))

    def _worlds(self, seed: int, on_trace: Callable[[int, int], None]) -> ScenarioBank:
        config = self.config
        return draw_bank(config.worlds, config.interface, config.guardrails, config.objective, seed, on_trace)

    def begin(self) -> RunState:
        """Where the source left off: the range of what it has seen."""
        manifest = self.bundle.manifest
        return RunState(feature_low=list(manifest.feature_low), feature_high=list(manifest.feature_high))

    def first_model(self, model: PPO) -> PPO:
        """A new model with the source's actor."""
        load_actor(model, actor_layers(self.bundle))
        return model

    def monitor(self, folder: Path, state: RunState, log: Log, on_progress: Callable[[int], None]) -> FineTuningMonitor:
        """Validates on the service's own trace; watches worlds that are never trained on."""
        own = OwnReplay(self.origin.service, self._parts.validation, self.bundle, self.spec.validation_seeds)
        episodes = Episodes(self._unseen, self.config.validation.episodes, self.config.episodes, UNSEEN_SEED)
        unseen = Validator(episodes, UNSEEN_SEED)
        return FineTuningMonitor(self.config, folder, state, unseen, own, log, on_progress)


class OwnReplay:
    """Replays a part of the service's trace under networks, through the controller that ships.

    Args:
        service: whose trace it is.
        part: of the trace.
        source: the bundle whose cost is the unit.
        seeds: replays, which differ in cold starts and reclaims.
    """

    def __init__(self, service: ScalingSpec, part: Trace, source: PolicyBundle, seeds: int) -> None:
        self.spec = started(service, part)
        self.trace = part
        self.seeds = seeds
        self._manifest = source.manifest
        self.source_usd, self.source_attainment = self.replay(source.weights)

    def replay(self, weights: bytes) -> tuple[float, float]:
        """Dollars and attainment of a network, means over the seeds."""
        bundle = PolicyBundle(self._manifest, weights, digest="", source="the network in training")
        specs = [self.spec] * self.seeds
        policy = LearnedPolicy(bundle, Fleet.from_specs(specs), self.spec.interface)
        replay = World(specs, [self.trace] * self.seeds, list(range(self.seeds)), record=False).run(policy)
        return float(replay.usd().mean()), float(replay.attainment().mean())

    def score(self, usd: float, attainment: float) -> dict[str, float]:
        """Cost over the source's, plus misses beyond the allowed ones in units of these; lower is better."""
        target = self.spec.slo.attainment
        provisioned = usd / self.source_usd
        misses = max(0.0, target - attainment) / (1.0 - target)
        return {
            "score": provisioned + misses,
            "provisioned": provisioned,
            "misses": misses,
            "attainment": attainment,
            "holds_slo_share": float(attainment >= target),
        }


class FineTuningMonitor(TrainingMonitor):
    """Lets the new critic learn alone at first, validates on the service's own trace, keeps an eye on the clock.

    Args:
        config: of the run.
        folder: of the run.
        state: new or resumed.
        unseen: episodes in worlds that are never trained on; they decide nothing.
        own: the validation part.
        log: receives metrics and the step they belong to.
        on_progress: called with the environment steps done.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        state: RunState,
        unseen: Validator,
        own: OwnReplay,
        log: Log,
        on_progress: Callable[[int], None],
    ) -> None:
        super().__init__(config, folder, state, unseen, log, on_progress)
        assert config.fine_tune is not None
        self.own, self.spec = own, config.fine_tune

    def judge(self) -> dict[str, float]:
        """Replay the network on the service's own part; what it makes of other worlds is watched beside it."""
        assert isinstance(self.model, PPO)
        return {**self.own.score(*self.own.replay(to_onnx(self.model))), "worlds_score": super().judge()["score"]}

    def _on_rollout_start(self) -> None:
        super()._on_rollout_start()
        assert isinstance(self.model, PPO)
        freeze_actor(self.model, self.model.num_timesteps < self.spec.critic_steps)

    def _on_step(self) -> bool:
        in_time = time.perf_counter() - self._started_s < self.spec.max_seconds
        return super()._on_step() and in_time


def started(service: ScalingSpec, part: Trace) -> ScalingSpec:
    """The service with the fleet that the first minutes of a replay need, in its first pool, unless it says itself."""
    if any(pool.initial_replicas is not None for pool in service.pools):
        return service
    pool, *others = service.pools
    demand, _ = replicas_needed(pool.engine, service.slo, RequestLibrary.of([part]), part.duration_s)
    first = int(np.clip(math.ceil(FIRST_FLEET * demand), max(1, pool.min_replicas), pool.max_replicas))
    return service.model_copy(update={"pools": (pool.model_copy(update={"initial_replicas": first}), *others)})

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from stable_baselines3 import PPO

import training.learning.train
from envs.episodes import Episodes
from envs.vector_env import AutoscalingVecEnv
from policies import lineup
from policies.action import ACTIONS
from policies.engine import ConfigError
from policies.learned import MISS_PRICE_COLUMN, LearnedPolicy, load_bundle
from policies.observation import encode_miss_price
from training.learning.monitor import RunState, TrainingMonitor, Validator
from training.learning.train import TrainedPolicy, _written, check_same, draw_worlds, new_model, train_all
from training.learning.train_config import TrainConfig
from training.versions.registry import CHALLENGER, register
from training.versions.tracking import connect

NUM_ENVS, ROLLOUT = 16, 16 * 8
Bar = Callable[[str, int, int], None]


def recipe(**overrides: Any) -> TrainConfig:
    """One small world whose fleet starts far too large, and a run of seconds."""
    values: dict[str, Any] = {
        "name": "tiny",
        "total_steps": 8 * ROLLOUT,
        "train_share": 0.5,
        "evaluation_suite": None,
        "checkpoint_every_steps": 2 * ROLLOUT,
        "worlds": {
            "traces": 1,
            "scenarios": 1,
            "trace_s": 2400.0,
            "mean_replicas": (6.0, 6.0),
            "profiles": {"chat": 1.0},
            "engines": ("llama-3.1-70b-h100-tp4",),
            "max_over_peak": (4.0, 4.0),
            "spot_scenarios": 0.0,
            "cold_start_s": (60.0, 60.0),
        },
        "episodes": {"steps": 40, "log_miss_price_spread": 0.5},
        "warm_start": {"headroom": 2.6},
        "ppo": {"num_envs": NUM_ENVS, "steps_per_rollout": 8, "batch_size": 64, "hidden": (8,), "target_kl": None},
        "validation": {"every_steps": 2 * ROLLOUT, "episodes": 4},
    }
    return TrainConfig.model_validate({**values, **overrides})


@dataclass
class Store:
    """An embedded MLflow store, and what the runs in it said."""

    folder: Path
    said: list[str] = field(default_factory=list)

    @property
    def uri(self) -> str:
        return f"sqlite:///{self.folder / 'mlflow.db'}"

    def train(self, out: Path, resume: bool = False, bar: Bar = lambda *_: None, **overrides: Any) -> TrainedPolicy:
        return train_all(recipe(tracking_uri=self.uri, **overrides), out, resume, self.said.append, bar)

    def run(self, run_id: str) -> Any:
        return connect(self.uri).get_run(run_id)

    def status(self, out: Path) -> str:
        return str(self.run(RunState.load(out / "seed-0").mlflow_run_id).info.status)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def learned(store: Store, tmp_path_factory: pytest.TempPathFactory) -> TrainedPolicy:
    """A run that is long enough to learn that the fleet is too large."""
    ppo = {
        "num_envs": 64,
        "steps_per_rollout": 20,
        "batch_size": 320,
        "hidden": (32,),
        "learning_rate": 3e-3,
        "gamma": 0.9,
        "log_std": -0.7,
        "target_kl": None,
        "epochs": 6,
    }
    steps = 64 * 20 * 10
    validation = {"every_steps": steps // 5, "episodes": 16}
    return store.train(tmp_path_factory.mktemp("learned"), total_steps=steps, ppo=ppo, validation=validation)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def interrupt_at(steps: int, error: type[BaseException] = KeyboardInterrupt) -> Bar:
    def bar(label: str, done: int, total: int) -> None:
        if label.startswith("seed") and done >= steps:
            raise error

    return bar


class PowerCut(BaseException):
    """What nothing gets to react to."""


# What a finished run is.


def test_learning_finds_out_that_the_fleet_is_too_large(learned: TrainedPolicy) -> None:
    start = learned.state.curve[0]
    assert learned.score < 0.85 * start["score"]
    best = learned.state.best_point()
    assert best["provisioned"] < 0.85 * start["provisioned"]
    assert best["attainment"] > 0.95

    bundle = load_bundle(learned.bundle)
    config = recipe()
    bank = draw_worlds(config, lambda *_: None)
    policy = LearnedPolicy(bundle, bank.fleet, config.interface)
    features = Episodes(bank, 64, config.episodes, 5, (0.5, 1.0)).reset(stagger=False).features
    headroom = policy.outputs(features)[:, ACTIONS.index("headroom")]
    untrained = np.log(2.6 / config.interface.action.headroom_reference) / np.log(config.interface.action.headroom_span)
    assert headroom.mean() < untrained - 0.2


def test_the_curve_has_a_point_at_the_start_at_every_interval_and_at_the_end(learned: TrainedPolicy) -> None:
    assert [point["steps"] for point in learned.state.curve] == [0, 2560, 5120, 7680, 10240, 12800]
    assert learned.score == min(point["score"] for point in learned.state.curve)
    for point in learned.state.curve:
        assert point["score"] == pytest.approx(point["provisioned"] + point["misses"] + point["churn"])


def test_the_bundle_says_where_it_comes_from(learned: TrainedPolicy) -> None:
    bundle = load_bundle(learned.bundle)
    manifest, state = bundle.manifest, learned.state
    assert bundle.digest == learned.digest
    assert manifest.interface == recipe().interface
    assert manifest.provenance["steps"] == state.best_steps
    assert manifest.provenance["validation"] == state.best_point()
    assert manifest.provenance["equality_with_predict"] <= 1e-5
    assert manifest.provenance["config"]["ppo"]["num_envs"] == 64
    assert len(manifest.provenance["trace_digests"]) == 1
    assert manifest.log_miss_price == np.log(recipe().objective.miss_price)
    assert manifest.log_miss_price_span == 0.5
    low, high = np.array(manifest.feature_low), np.array(manifest.feature_high)
    assert (low <= high).all()
    assert (low < high).any()
    dial = encode_miss_price(np.array([manifest.log_miss_price]))[0]
    assert low[MISS_PRICE_COLUMN] < dial < high[MISS_PRICE_COLUMN]


def test_the_bundle_answers_like_the_network_that_was_kept(learned: TrainedPolicy) -> None:
    policy = LearnedPolicy(
        load_bundle(learned.bundle), draw_worlds(recipe(), lambda *_: None).fleet, recipe().interface
    )
    features = np.random.default_rng(1).normal(size=(50, len(policy.bundle.manifest.features))).astype(np.float32)
    answers, _ = PPO.load(learned.folder / "best.zip", device="cpu").predict(features, deterministic=True)
    assert policy.outputs(features) == pytest.approx(answers, abs=1e-5)


def test_the_bundle_can_be_named_where_policies_are_judged(learned: TrainedPolicy) -> None:
    assert lineup.resolve(str(learned.bundle)).bundle_digest == learned.digest


def test_the_run_is_in_mlflow_with_parameters_curves_and_files(store: Store, learned: TrainedPolicy) -> None:
    client, run = connect(store.uri), store.run(learned.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["seed"] == "0"
    assert run.data.params["ppo.gamma"] == "0.9"
    assert run.data.params["total_steps"] == "12800"
    assert run.data.params["interface_digest"] == recipe().interface.digest()
    assert run.data.tags["bundle_digest"] == learned.digest
    assert run.data.metrics["validation/best_score"] == learned.score
    history = {item.step: item.value for item in client.get_metric_history(learned.run_id, "validation/score")}
    assert history == {int(point["steps"]): point["score"] for point in learned.state.curve}
    assert [item.step for item in client.get_metric_history(learned.run_id, "train/provisioned")] == [
        1280 * rollout for rollout in range(1, 11)
    ]
    assert 0.0 < run.data.metrics["train/env_time_share"] < 1.0
    files = {item.path for item in client.list_artifacts(learned.run_id)}
    assert files == {
        "config.yaml",
        "best.zip",
        "policy.zip",
        "state.json",
        "resolved_config.json",
        "trace_digests.json",
        "spec_digests.json",
    }


def test_the_run_can_be_registered_as_challenger(store: Store, learned: TrainedPolicy) -> None:
    client = connect(store.uri)
    version = register(client, "tiny", learned.run_id, learned.digest)
    assert str(client.get_model_version_by_alias("tiny", CHALLENGER).version) == version
    assert client.get_model_version("tiny", version).run_id == learned.run_id


def test_nothing_but_the_results_is_left_in_the_folder(learned: TrainedPolicy) -> None:
    names = {path.name for path in learned.folder.iterdir()}
    assert names == {"best.zip", "config.yaml", learned.state.checkpoint, "policy.zip", "state.json"}


def test_the_same_seed_learns_the_same_and_the_better_seed_wins(store: Store, tmp_path: Path) -> None:
    both = store.train(tmp_path / "both", seeds=(0, 1), total_steps=2 * ROLLOUT)
    scores = [RunState.load(tmp_path / f"both/seed-{seed}").best_score for seed in (0, 1)]
    assert both.score == min(scores)
    assert both.seed == scores.index(min(scores))
    again = store.train(tmp_path / "again", total_steps=2 * ROLLOUT)
    first = RunState.load(tmp_path / "both/seed-0")
    assert [point["score"] for point in again.state.curve] == [point["score"] for point in first.curve]


# Interrupted and resumed.


class RecordingEnv(AutoscalingVecEnv):
    """Keeps what the learner sees first."""

    first: list[np.ndarray]

    def reset(self) -> Any:
        features = super().reset()
        type(self).first.append(np.array(features))
        return features


@pytest.fixture
def resets(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    RecordingEnv.first = []
    monkeypatch.setattr(training.learning.train, "AutoscalingVecEnv", RecordingEnv)
    return RecordingEnv.first


def test_an_interrupted_run_resumes_with_the_steps_that_remain(
    store: Store, tmp_path: Path, resets: list[np.ndarray]
) -> None:
    at = 3 * ROLLOUT + NUM_ENVS
    with pytest.raises(KeyboardInterrupt):
        store.train(tmp_path, bar=interrupt_at(at))
    before = RunState.load(tmp_path / "seed-0")
    assert before.steps == at
    assert not before.finished
    assert store.status(tmp_path) == "KILLED"

    done: list[int] = []
    result = store.train(tmp_path, resume=True, bar=lambda label, steps, _: done.append(steps))
    assert done[1] == at + NUM_ENVS  # after the drawing of the one trace
    assert recipe().total_steps <= result.state.steps < recipe().total_steps + ROLLOUT
    assert result.state.finished
    assert result.run_id == before.mlflow_run_id
    assert store.status(tmp_path) == "FINISHED"
    # Validated where the schedule says, in one sequence, and at the end.
    steps = [point["steps"] for point in result.state.curve]
    assert steps == sorted(set(steps))
    assert steps[:2] == [0, 2 * ROLLOUT]
    assert steps[-1] == result.state.steps

    fresh, resumed = resets
    assert not np.array_equal(fresh, resumed)
    last = PPO.load(tmp_path / "seed-0" / result.state.checkpoint, device="cpu")
    assert last.policy.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * recipe().ppo.learning_rate)


def test_the_learning_rate_goes_on_where_it_was(store: Store, tmp_path: Path) -> None:
    def rate() -> float:
        state = RunState.load(tmp_path / "seed-0")
        model = PPO.load(tmp_path / "seed-0" / state.checkpoint, device="cpu")
        assert model.num_timesteps == state.steps
        return float(model.policy.optimizer.param_groups[0]["lr"])

    for at, resume in ((2 * ROLLOUT + NUM_ENVS, False), (6 * ROLLOUT + 2 * NUM_ENVS, True)):
        with pytest.raises(KeyboardInterrupt):
            store.train(tmp_path, resume=resume, bar=interrupt_at(at))
        rolled = at - at % ROLLOUT if not resume else at - NUM_ENVS
        expected = 0.1 + 0.9 * (1.0 - rolled / recipe().total_steps)
        assert rate() == pytest.approx(expected * recipe().ppo.learning_rate)


def test_the_rate_of_a_run_shorter_than_a_rollout_stays_positive(store: Store, tmp_path: Path) -> None:
    result = store.train(tmp_path, total_steps=1)
    assert result.state.steps == ROLLOUT
    model = PPO.load(tmp_path / "seed-0" / result.state.checkpoint, device="cpu")
    assert model.policy.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * recipe().ppo.learning_rate)


def test_a_run_that_lost_its_power_resumes_from_its_checkpoint(store: Store, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(PowerCut):
        store.train(out, bar=interrupt_at(5 * ROLLOUT, PowerCut))
    state = RunState.load(out / "seed-0")
    assert 4 * ROLLOUT <= state.steps < 5 * ROLLOUT
    assert PPO.load(out / "seed-0" / state.checkpoint, device="cpu").num_timesteps == state.steps
    result = store.train(out, resume=True)
    assert result.state.steps == 8 * ROLLOUT
    assert result.run_id == state.mlflow_run_id


def test_a_run_cut_off_before_its_first_validation_resumes_in_the_same_mlflow_run(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(self: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(TrainingMonitor, "validate", cut)
        with pytest.raises(KeyboardInterrupt):
            store.train(tmp_path)
    before = RunState.load(tmp_path / "seed-0")
    assert store.status(tmp_path) == "KILLED"
    result = store.train(tmp_path, resume=True, total_steps=ROLLOUT)
    assert result.run_id == before.mlflow_run_id
    assert result.state.steps == ROLLOUT


def test_a_failed_run_is_marked_failed(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        store.train(tmp_path, bar=interrupt_at(ROLLOUT, ZeroDivisionError))
    assert store.status(tmp_path) == "FAILED"


def test_without_resume_a_run_starts_anew(store: Store, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        store.train(tmp_path, bar=interrupt_at(3 * ROLLOUT))
    before = RunState.load(tmp_path / "seed-0")
    result = store.train(tmp_path, total_steps=ROLLOUT)
    assert result.state.steps == ROLLOUT
    assert result.run_id != before.mlflow_run_id
    assert result.state.curve[0]["steps"] == 0


def test_a_finished_run_stays_as_it_is(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = store.train(tmp_path, total_steps=ROLLOUT)
    monkeypatch.setattr(training.learning.train, "code_version", lambda: "another")
    again = store.train(tmp_path, resume=True, total_steps=8 * ROLLOUT)
    assert (again.digest, again.run_id, again.state.steps) == (first.digest, first.run_id, ROLLOUT)
    assert store.said[-1].startswith("seed 0: finished before")


def test_a_finished_run_whose_bundle_is_gone_exports_it_again(store: Store, tmp_path: Path) -> None:
    first = store.train(tmp_path, total_steps=ROLLOUT)
    first.bundle.unlink()
    again = store.train(tmp_path, resume=True, total_steps=ROLLOUT)
    assert load_bundle(again.bundle).weights
    assert again.state.steps == ROLLOUT
    assert len(again.state.curve) == len(first.state.curve)


def test_a_recipe_with_a_secret_in_it_is_the_same_as_before(tmp_path: Path) -> None:
    """What is kept of a recipe has no secrets, and is compared with what would be kept of this one."""
    config, kept = recipe(suite="https://me:s3cret@store/mine.yaml"), tmp_path / "config.yaml"
    kept.write_text(yaml.safe_dump(_written(config)))
    assert "s3cret" not in kept.read_text()
    check_same(config, kept)
    with pytest.raises(ConfigError, match="suite"):
        check_same(recipe(suite="https://me:s3cret@store/other.yaml"), kept)


def test_another_recipe_cannot_resume_a_run(store: Store, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        store.train(tmp_path, bar=interrupt_at(ROLLOUT))
    with pytest.raises(ConfigError, match="another objective, warm_start"):
        store.train(tmp_path, resume=True, objective={"miss_price": 30.0}, warm_start=None)
    with pytest.raises(ConfigError, match="seeds"):
        store.train(tmp_path, resume=True, seeds=(1, 0))


def test_a_state_that_is_no_state_is_named(store: Store, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        store.train(tmp_path, bar=interrupt_at(ROLLOUT))
    for content in ("{", "[]", '{"stepz": 1}'):
        (tmp_path / "seed-0/state.json").write_text(content)
        with pytest.raises(ValueError, match=r"state\.json: not the state of a training run"):
            store.train(tmp_path, resume=True)


def test_a_run_without_progress_stops_early(store: Store, tmp_path: Path) -> None:
    ppo = recipe().ppo.model_dump() | {"learning_rate": 1e-12}
    validation = {"every_steps": ROLLOUT, "episodes": 4, "patience": 2}
    result = store.train(tmp_path, ppo=ppo, validation=validation)
    assert [point["steps"] for point in result.state.curve] == [0, ROLLOUT, 2 * ROLLOUT]
    assert result.state.best_steps == 0
    assert result.state.finished
    assert result.state.steps < 3 * ROLLOUT


# Whatever the moment, state and networks on disk belong together.


class ScriptedValidator:
    """Scores from a list; the network is marked with its score, so that it can be told apart later."""

    def __init__(self, *scores: float) -> None:
        self.scores = list(scores)

    def run(self, act: Callable[[np.ndarray], np.ndarray]) -> dict[str, float]:
        return {"score": self.scores.pop(0)}


@pytest.fixture(scope="module")
def model() -> PPO:
    config = recipe()
    bank = draw_worlds(config, lambda *_: None)
    return new_model(config, AutoscalingVecEnv(bank, NUM_ENVS, config.episodes, part=(0.0, 0.5)), 0)


def mark(model: PPO, value: float) -> None:
    with torch.no_grad():
        model.policy.action_net.bias.fill_(value)


def marked(path: Path) -> float:
    return float(PPO.load(path, device="cpu").policy.action_net.bias[0].item())


def replay(model: PPO, folder: Path) -> RunState:
    """Validations and checkpoints as in a run, each on a network of its own."""
    scores = (5.0, 6.0, 4.0, 3.0, 7.0)
    state = RunState()
    monitor = TrainingMonitor(
        recipe(),
        folder,
        state,
        ScriptedValidator(*scores),
        lambda *_: None,
        lambda _: None,  # type: ignore[arg-type]
    )
    monitor.init_callback(model)
    for index, score in enumerate(scores):
        state.steps = model.num_timesteps = 100 * index
        mark(model, score)
        monitor.validate()
        model.num_timesteps += 50
        mark(model, 10.0 + index)
        monitor.checkpoint()
    state.finish(folder)
    return state


@pytest.fixture
def crash(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let the n-th change of the folder from now on fail, and all after it."""
    left = [10**9]

    def guarded(change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise PowerCut
            return change(*args, **kwargs)

        return changed

    monkeypatch.setattr(Path, "replace", guarded(Path.replace))
    monkeypatch.setattr(Path, "unlink", guarded(Path.unlink))
    monkeypatch.setattr(shutil, "copyfile", guarded(shutil.copyfile))

    def after(changes: int) -> None:
        left[0] = changes

    return after


def test_a_crash_between_any_two_writes_leaves_a_state_with_its_own_networks(
    model: PPO, tmp_path: Path, crash: Callable[[int], None]
) -> None:
    expected_score = {0: 5.0, 100: 5.0, 200: 4.0, 300: 3.0, 400: 3.0}
    crashes = 0
    for changes in range(200):
        folder = tmp_path / str(changes)
        folder.mkdir()
        crash(changes)
        try:
            replay(model, folder)
            break
        except PowerCut:
            crashes += 1
        if not (folder / "state.json").exists():
            assert changes < 3  # nothing has been promised yet
            continue
        state = RunState.load(folder)
        assert state.best_score == expected_score[state.steps - state.steps % 100]
        assert marked(folder / state.best) == state.best_score
        checkpoint = 10.0 + state.steps // 100 if state.steps % 100 else state.best_score
        assert marked(folder / state.checkpoint) == checkpoint
        assert PPO.load(folder / state.checkpoint, device="cpu").num_timesteps == state.steps
        assert min(point["score"] for point in state.curve) == state.best_score
    assert crashes > 20
    state = RunState.load(folder)
    assert state.finished
    assert marked(folder / "best.zip") == 3.0
    assert {path.name for path in folder.iterdir()} == {"best.zip", "checkpoint-450.zip", "state.json"}


def test_what_a_killed_run_left_half_written_is_dropped(tmp_path: Path) -> None:
    for name in (".best-100.zip.7.partial", "best-100.zip", "best-200.zip"):
        (tmp_path / name).touch()
    RunState(best="best-200.zip").drop_unused(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["best-200.zip"]


def test_the_state_survives_a_round_trip(tmp_path: Path) -> None:
    state = RunState(steps=5, curve=[{"steps": 0.0, "score": 1.5}], feature_low=[0.25], mlflow_run_id="r")
    state.save(tmp_path)
    assert RunState.load(tmp_path) == state
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]
    json.loads((tmp_path / "state.json").read_text())


def test_validation_weighs_held_out_episodes_over_the_whole_range_of_prices() -> None:
    config = recipe(episodes={"steps": 20, "log_miss_price_spread": 2.0})
    bank = draw_worlds(config, lambda *_: None)
    result = Validator(Episodes(bank, 16, config.episodes, 0, (0.5, 1.0)), 5).run(lambda f: np.zeros((len(f), 4)))

    episodes = Episodes(bank, 16, config.episodes, 5, (0.5, 1.0))
    episodes.reset(stagger=False)
    prices = np.exp(episodes.fleet.log_miss_price)
    assert prices.min() < 0.5 * config.objective.miss_price
    assert prices.max() > 2.0 * config.objective.miss_price
    costs = np.zeros(16)
    for _ in range(20):
        terms = episodes.step(np.zeros((16, 4))).terms
        costs += (terms["provisioned"] + terms["misses"] + terms["churn"]) / 20
    assert result["score"] == pytest.approx((costs / (1.0 + 0.03 * prices)).mean())

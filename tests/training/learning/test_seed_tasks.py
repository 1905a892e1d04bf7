"""Seeds as tasks, and sweeps of them: over Ray, in processes, killed and taken up again."""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from local_ray import local_ray

from policies.engine import ConfigError
from training.learning.monitor import RunState
from training.learning.seed_tasks import PROGRESS_FILE, STOP_FILE, ProgressFile, train_as_tasks
from training.learning.sweep import BEST_FILE, Sweep, TrialResult, load_sweep
from training.learning.train import Stopped, train_all
from training.learning.train_config import TrainConfig, load_train_config
from training.replaying.workers import InProcess, RayTasks

ROLLOUT = 8 * 16
RECIPE: dict[str, Any] = {
    "name": "tiny",
    "total_steps": 2 * ROLLOUT,
    "train_share": 0.5,
    "evaluation_suite": None,
    "checkpoint_every_steps": ROLLOUT,
    "worlds": {"traces": 1, "scenarios": 1, "trace_s": 1200.0, "mean_replicas": [1.0, 2.0], "profiles": {"chat": 1.0}},
    "episodes": {"steps": 20},
    "ppo": {"num_envs": 8, "steps_per_rollout": 16, "batch_size": 64, "hidden": [8]},
    "validation": {"every_steps": ROLLOUT, "episodes": 2, "patience": 1000},
}


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    with local_ray(cpus=1):
        yield


def recipe(folder: Path, **changes: Any) -> TrainConfig:
    return TrainConfig.model_validate({**RECIPE, "tracking_uri": f"sqlite:///{folder / 'mlflow.db'}", **changes})


def nothing(*_: object) -> None:
    pass


def scores(folder: Path) -> list[float]:
    return [point["score"] for point in RunState.load(folder / "seed-0").curve]


@pytest.mark.integration
@pytest.mark.ray
def test_a_seed_learns_the_same_as_a_ray_task(ray_cluster: None, tmp_path: Path) -> None:
    config = recipe(tmp_path)
    here = train_all(config, tmp_path / "here", False, nothing, nothing)
    said: list[str] = []
    there = train_as_tasks(config, tmp_path / "there", False, said.append, nothing, RayTasks(1))
    assert scores(tmp_path / "there") == scores(tmp_path / "here")
    assert len(scores(tmp_path / "here")) == 3
    assert (there.seed, there.score) == (here.seed, here.score)
    assert said[0].startswith("seed 0: start score")


@pytest.mark.integration
@pytest.mark.ray
def test_a_seed_whose_worker_is_killed_goes_on_from_its_checkpoint(ray_cluster: None, tmp_path: Path) -> None:
    validation = {"every_steps": 50 * ROLLOUT, "episodes": 2, "patience": 1000}
    changes = {"total_steps": 400 * ROLLOUT, "checkpoint_every_steps": 10 * ROLLOUT, "validation": validation}
    config = recipe(tmp_path, **changes)
    folder = tmp_path / "run/seed-0"
    killed: dict[str, int] = {}

    def kill() -> None:
        while not killed:
            time.sleep(0.05)
            try:
                state, progress = RunState.load(folder), json.loads((folder / PROGRESS_FILE).read_text())
            except (OSError, ValueError):
                continue
            if state.steps >= 20 * ROLLOUT:
                os.kill(progress["pid"], signal.SIGKILL)
                killed.update(steps=state.steps, pid=progress["pid"])

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    said: list[str] = []
    pids: set[int] = set()

    def bar(label: str, done: int, total: int) -> None:
        with contextlib.suppress(OSError):  # it ended just now
            pids.add(json.loads((folder / PROGRESS_FILE).read_text())["pid"])

    policy = train_as_tasks(config, tmp_path / "run", False, said.append, bar, RayTasks(1))
    killer.join(1.0)
    assert killed["steps"] < policy.state.steps
    assert pids - {killed["pid"]}
    # The second worker found what the first had learned: it did not start again.
    assert [line.split(":")[1].split()[0] for line in said] == ["best"]
    steps = [point["steps"] for point in policy.state.curve]
    assert steps == sorted(set(steps))
    assert steps[0] == 0
    assert steps[-1] >= config.total_steps


def test_the_store_is_there_before_any_task(tmp_path: Path) -> None:
    """Two tasks that create a store at once get in each other's way."""

    class Looks(InProcess):
        def submit(self, key: Any, task: Callable[..., Any], *arguments: Any) -> None:
            config = arguments[0]
            assert Path(config.tracking_uri.removeprefix("sqlite:///")).is_file()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_as_tasks(recipe(tmp_path, seeds=[0, 1]), tmp_path / "run", False, print, nothing, Looks())


def test_a_task_ends_where_the_one_who_waits_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "seed-0"
    folder.mkdir()
    progress = ProgressFile(folder)
    progress("seed 0", 1, 10)
    assert json.loads((folder / PROGRESS_FILE).read_text()) == {
        "label": "seed 0", "done": 1, "total": 10, "pid": os.getpid()
    }  # fmt: skip
    (tmp_path / STOP_FILE).touch()
    with pytest.raises(Stopped):
        ProgressFile(folder)("seed 0", 2, 10)


# Sweeps.


class Played(InProcess):
    """Answers trials from a table instead of training; at the end of it, the power fails."""

    def __init__(self, *results: TrialResult) -> None:
        super().__init__()
        self.results = list(results)
        self.configs: list[TrainConfig] = []
        self.folders: list[str] = []

    def next_done(self) -> tuple[Any, Any]:
        key, _, (config, folder) = self._waiting.popleft()
        self.configs.append(config)
        self.folders.append(folder.name)
        if not self.results:
            raise KeyboardInterrupt
        return key, self.results.pop(0)


def written(folder: Path, **changes: Any) -> Path:
    (folder / "train.yaml").write_text(yaml.safe_dump({**RECIPE, "tracking_uri": f"sqlite:///{folder}/mlflow.db"}))
    ranges = {
        "ppo.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
        "ppo.epochs": {"low": 1, "high": 4, "whole": True},
        "ppo.hidden": {"choices": [[8], [16, 16]]},
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({"recipe": "train.yaml", "trials": 4, "parameters": ranges, **changes}))
    return path


def test_a_sweep_varies_the_recipe_and_keeps_the_best(tmp_path: Path) -> None:
    said: list[str] = []
    spec, config = load_sweep(written(tmp_path))
    workers = Played(TrialResult((3.0,)), TrialResult((1.0, 2.0)), TrialResult(()), TrialResult((), "diverged"))
    best = Sweep(spec, config, tmp_path / "out", said.append, nothing).run(workers)
    assert best.value == 1.5
    assert [line.split(" with ")[0] for line in said] == [
        "trial-0: score 3.000", "trial-1: score 1.500", "trial-2: stopped early", "trial-3: failed"
    ]  # fmt: skip
    rates = [config.ppo.learning_rate for config in workers.configs]
    assert len(set(rates)) == 4
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)
    kept = load_train_config(tmp_path / "out" / BEST_FILE)
    assert kept.ppo == workers.configs[1].ppo
    assert kept.worlds == config.worlds


def test_a_sweep_that_was_cut_off_goes_on_in_the_same_folders(tmp_path: Path) -> None:
    spec, config = load_sweep(written(tmp_path))
    first = Played(TrialResult((3.0,)))
    with pytest.raises(KeyboardInterrupt):
        Sweep(spec, config, tmp_path / "out", nothing, nothing).run(first)
    second = Played(*[TrialResult((2.0,))] * 3)
    Sweep(spec, config, tmp_path / "out", nothing, nothing).run(second)
    assert second.folders[0] == first.folders[1] == "trial-1"
    assert second.configs[0] == first.configs[1]
    assert len(second.folders) == 3
    other = spec.model_copy(update={"seed": 1})
    with pytest.raises(ConfigError, match="holds another sweep"):
        Sweep(other, config, tmp_path / "out", nothing, nothing)


def test_a_trial_that_lags_behind_is_told_to_stop(tmp_path: Path) -> None:
    spec, config = load_sweep(written(tmp_path, startup_trials=2))
    sweep = Sweep(spec, config, tmp_path / "out", nothing, nothing)
    workers = Played()

    def play(scores: list[float]) -> bool:
        sweep._start(workers)
        (number,) = sweep._under_way
        own = tmp_path / f"out/trial-{number}/seed-0"
        own.mkdir(parents=True)
        stop = own.parent / STOP_FILE
        for length in range(1, len(scores) + 1):
            RunState(curve=[{"steps": float(at), "score": scores[at]} for at in range(length)]).save(own)
            sweep._watch()
        stopped = stop.exists()
        sweep._conclude(number, TrialResult(() if stopped else (min(scores),)))
        return stopped

    assert [play(scores) for scores in ([5.0, 3.0, 2.0], [5.0, 3.0, 2.5], [5.0, 4.9, 4.8], [5.0, 2.0, 1.0])] == [
        False, False, True, False
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"parameters": {"objective.miss_price": {"low": 1, "high": 2}}}, "leave validation scores comparable"),
        ({"parameters": {"ppo.gama": {"low": 0.9, "high": 0.99}}}, "has no field 'ppo.gama'"),
        ({"parameters": {"ppo.gamma": {"low": 0.9, "high": 1.5}}}, "gamma"),
        ({"parameters": {"ppo.gamma": {"low": 0.9}}}, "low below high"),
        ({"trials": 0}, "trials"),
        ({"recipe": "absent.yaml"}, "no such file"),
    ],
)
def test_a_wrong_sweep_is_refused_before_any_trial(changes: dict[str, Any], expected: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_sweep(written(tmp_path, **changes))

"""Sweeps: which hyper-parameters of a recipe give the best validation score.

The few that matter and their ranges are declared in YAML. Each trial is a training run in a folder and an MLflow run of
its own; trials run beside each other, and one whose validations lag behind the others' is stopped. The study is kept in
the folder of the sweep, so that an interrupted sweep resumes, and its unfinished trials go on from their checkpoints.
This module must not know how learning works.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml
from pydantic import Field, model_validator

from policies.atomic_files import write_text
from policies.engine import ConfigError, StrictModel, load_model, parse_model, read_yaml
from training.learning.monitor import RunState
from training.learning.seed_tasks import POLL_S, STOP_FILE, Where, show_progress, train_task
from training.learning.train import Stopped
from training.learning.train_config import TrainConfig, load_train_config
from training.replaying.workers import Workers, open_workers
from training.versions.tracking import ensure_store

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial, Trial

SEARCHABLE = ("ppo.", "warm_start.", "episodes.reward_scale")
"""What may be searched: fields that leave the validation score comparable between trials."""
STUDY_FILE, SPEC_FILE, BEST_FILE = "study.journal", "sweep.yaml", "best.yaml"
Scalar = bool | int | float | str


class SearchRange(StrictModel):
    """Values of one hyper-parameter: a range, or a list to choose from."""

    low: float | None = Field(default=None, allow_inf_nan=False, description="Lowest value.")
    high: float | None = Field(default=None, allow_inf_nan=False, description="Highest value.")
    log: bool = Field(default=False, description="Search on a logarithmic scale.")
    whole: bool = Field(default=False, description="Whole numbers only.")
    choices: tuple[Scalar | tuple[Scalar, ...], ...] = Field(default=(), description="Values to choose from instead.")

    @model_validator(mode="after")
    def _one_kind(self) -> SearchRange:
        if bool(self.choices) == (self.low is not None or self.high is not None):
            raise ValueError("expected either choices, or low and high")
        if not self.choices and (self.low is None or self.high is None or self.low >= self.high):
            raise ValueError("expected low below high")
        if self.log and (self.low is None or self.low <= 0):
            raise ValueError("a logarithmic range must be above 0")
        return self

    def suggest(self, trial: Trial, name: str) -> Any:
        """The value that a trial is to use."""
        if self.choices:
            texts = [json.dumps(choice) for choice in self.choices]  # a study only keeps scalars
            return json.loads(str(trial.suggest_categorical(name, texts)))
        assert self.low is not None
        assert self.high is not None
        if self.whole:
            return trial.suggest_int(name, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(name, self.low, self.high, log=self.log)

    def ends(self) -> list[Any]:
        """Values that show whether a recipe takes them."""
        return [json.loads(json.dumps(choice)) for choice in self.choices] or [
            int(end) if self.whole else end for end in (self.low, self.high) if end is not None
        ]


class SweepSpec(StrictModel):
    """A search over a recipe."""

    recipe: Path = Field(description="Training configuration to vary, relative to this file.")
    trials: int = Field(default=24, ge=1, description="Trials in all.")
    total_steps: int | None = Field(default=None, ge=1, description="Environment steps of a trial; the recipe's else.")
    parameters: dict[str, SearchRange] = Field(min_length=1, description="Fields of the recipe, as in ppo.gamma.")
    startup_trials: int = Field(default=5, ge=0, description="Finished trials before any is stopped early.")
    seed: int = Field(default=0, ge=0, description="Of the search.")

    @model_validator(mode="after")
    def _comparable(self) -> SweepSpec:
        for name in self.parameters:
            if not name.startswith(SEARCHABLE):
                raise ValueError(f"parameters.{name}: only {', '.join(SEARCHABLE)} leave validation scores comparable")
        return self


@dataclass
class UnderWay:
    """A trial that runs: its folder, and how many of its validations the study knows."""

    trial: Trial
    folder: Path
    known: int = 0


class TrialResult(NamedTuple):
    """What a trial's task gives back: a score for each seed, or why there is none."""

    scores: tuple[float, ...]
    failure: str = ""


def load_sweep(path: Path) -> tuple[SweepSpec, TrainConfig]:
    """Read a sweep and the recipe that it varies.

    Raises:
        ConfigError: with the file, the field and what was expected.
    """
    spec = load_model(path, SweepSpec)
    recipe = load_train_config(path.parent / spec.recipe)
    if spec.total_steps is not None:
        recipe = recipe.model_copy(update={"total_steps": spec.total_steps})
    for name, values in spec.parameters.items():
        for value in values.ends():
            varied(recipe, {name: value}, f"{path}: field parameters.{name}")
    return spec, recipe


def varied(recipe: TrainConfig, settings: dict[str, Any], where: str) -> TrainConfig:
    """The recipe with some fields set, each named by its path.

    Raises:
        ConfigError: when there is no such field, or it does not take the value.
    """
    data = recipe.model_dump(mode="json")
    for name, value in settings.items():
        *path, last = name.split(".")
        place = data
        for key in path:
            place = place.get(key) or {}
        if last not in place:
            raise ConfigError(f"{where}: the recipe has no field {name!r}")
        place[last] = value
    return parse_model(data, TrainConfig, where)


def trial_task(config: TrainConfig, out: Path) -> TrialResult:
    """Train the seeds of one trial, one after the other."""
    try:
        return TrialResult(tuple(train_task(config, seed, out).policy.score for seed in config.seeds))
    except Stopped:
        return TrialResult(())
    except ValueError as error:  # settings with which learning diverges are a result too
        return TrialResult((), " ".join(str(error).split())[:200])


class Sweep:
    """A study in a folder.

    Args:
        spec: what to search.
        recipe: what to vary.
        out: folder of the sweep; every worker must see it under this path.
        say: receives one-line messages.
        bar: called with (label, done, total) for progress.

    Raises:
        ConfigError: when the folder holds another sweep.
    """

    def __init__(
        self,
        spec: SweepSpec,
        recipe: TrainConfig,
        out: Path,
        say: Callable[[str], None],
        bar: Callable[[str, int, int], None],
    ) -> None:
        import optuna
        from optuna.storages.journal import JournalFileBackend

        self.spec, self.out, self._say, self._bar = spec, out.resolve(), say, bar
        # A checkpoint at each validation tells the one who waits what it gave.
        self.recipe = recipe.model_copy(
            update={
                "tracking_uri": ensure_store(recipe.tracking_uri),
                "evaluation_suite": None,
                "checkpoint_every_steps": recipe.validation.every_steps,
            }
        )
        self.out.mkdir(parents=True, exist_ok=True)
        self._keep_spec()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.study: Study = optuna.create_study(
            storage=optuna.storages.JournalStorage(JournalFileBackend(str(self.out / STUDY_FILE))),
            study_name="sweep",
            load_if_exists=True,
            pruner=optuna.pruners.MedianPruner(n_startup_trials=spec.startup_trials, n_warmup_steps=1),
        )
        self._under_way: dict[int, UnderWay] = {}

    def run(self, workers: Workers) -> FrozenTrial:
        """Run the trials that are left; the best of all.

        Raises:
            ValueError: when no trial was finished.
        """
        from optuna.trial import TrialState

        self._take_up()
        while True:
            self._bar("trials", self._finished(), self.spec.trials)
            while len(self._under_way) < workers.width and self._finished() + len(self._under_way) < self.spec.trials:
                self._start(workers)
            if not self._under_way:
                break
            while not workers.any_done(POLL_S):
                self._watch()
            number, result = workers.next_done()
            self._watch()
            self._conclude(number, result)
        if not self.study.get_trials(states=[TrialState.COMPLETE]):
            raise ValueError(f"{self.out}: no trial was finished; what was said above tells why")
        best = self.study.best_trial
        chosen = varied(self.recipe, best.user_attrs["settings"], "the best trial")
        kept = chosen.model_dump(mode="json", exclude={"tracking_uri", "evaluation_suite", "checkpoint_every_steps"})
        write_text(self.out / BEST_FILE, yaml.safe_dump(kept, sort_keys=False))
        return best

    def _keep_spec(self) -> None:
        """Remember what is searched; a sweep goes on only with the same, its number of trials aside."""
        changeable = {"trials"}
        data = {
            "sweep": self.spec.model_dump(mode="json", exclude=changeable),
            "recipe": self.recipe.model_dump(mode="json", exclude={"tracking_uri"}),
        }
        path = self.out / SPEC_FILE
        if path.is_file() and read_yaml(path) != data:
            raise ConfigError(f"{self.out}: holds another sweep or recipe: go on with that one, or name another --out")
        write_text(path, yaml.safe_dump(data, sort_keys=False))

    def _take_up(self) -> None:
        """Queue the trials that were cut off, to go on in their folders."""
        from optuna.trial import TrialState

        for trial in self.study.get_trials(states=[TrialState.RUNNING]):
            folder = trial.user_attrs.get("folder", trial.number)
            self.study.tell(trial.number, state=TrialState.FAIL)
            self.study.enqueue_trial(trial.params, user_attrs={"folder": folder, "goes_on": trial.number})

    def _finished(self) -> int:
        """Trials that need not be run again."""
        trials = self.study.get_trials(deepcopy=False)
        went_on = {trial.user_attrs.get("goes_on") for trial in trials}
        return sum(trial.state.is_finished() and trial.number not in went_on for trial in trials)

    def _start(self, workers: Workers) -> None:
        import optuna

        # What is asked next follows from the trials so far, whoever asks.
        seed = self.spec.seed * 100_003 + len(self.study.get_trials(deepcopy=False))
        startup = max(self.spec.startup_trials, 2 * len(self.spec.parameters))
        self.study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup, constant_liar=True)
        trial = self.study.ask()
        settings = {name: values.suggest(trial, name) for name, values in self.spec.parameters.items()}
        trial.set_user_attr("settings", settings)
        number = trial.user_attrs.get("folder", trial.number)
        folder = self.out / f"trial-{number}"
        config = varied(self.recipe, settings, f"trial {number}")
        config = config.model_copy(update={"name": f"{self.recipe.name}-trial{number}"})
        self._under_way[trial.number] = UnderWay(trial, folder)
        workers.submit(trial.number, trial_task, config, folder)

    def _watch(self) -> None:
        """Show how far trials are, tell the study what they gave so far, stop those that lag behind."""
        for item in self._under_way.values():
            own = item.folder / f"seed-{self.recipe.seeds[0]}"
            show_progress(own, self._bar, item.folder.name)
            try:
                curve = RunState.load(own).curve
            except (OSError, ValueError):
                continue  # it has only begun
            while item.known < len(curve):
                item.trial.report(curve[item.known]["score"], item.known)
                item.known += 1
            if item.trial.should_prune():
                (item.folder / STOP_FILE).touch()

    def _conclude(self, number: int, result: TrialResult) -> None:
        from optuna.trial import TrialState

        item = self._under_way.pop(number)
        trial, folder = item.trial, item.folder
        (folder / STOP_FILE).unlink(missing_ok=True)
        settings = ", ".join(f"{name} {_short(value)}" for name, value in trial.user_attrs["settings"].items())
        if result.scores:
            score = sum(result.scores) / len(result.scores)
            self.study.tell(trial, score)
            self._say(f"{folder.name}: score {score:.3f} with {settings}")
        elif result.failure:
            self.study.tell(trial, state=TrialState.FAIL)
            self._say(f"{folder.name}: failed with {settings}: {result.failure}")
        else:
            self.study.tell(trial, state=TrialState.PRUNED)
            self._say(f"{folder.name}: stopped early with {settings}")


def run_sweep(
    spec: SweepSpec,
    recipe: TrainConfig,
    out: Path,
    say: Callable[[str], None],
    bar: Callable[[str, int, int], None],
    where: Where,
) -> FrozenTrial:
    """Run or go on with a sweep; its best trial.

    Raises:
        ConfigError: when the folder holds another sweep.
        ValueError: when the cluster cannot be reached, or no trial was finished.
    """
    sweep = Sweep(spec, recipe, out, say, bar)
    with open_workers(*where, apart=True) as workers:
        return sweep.run(workers)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

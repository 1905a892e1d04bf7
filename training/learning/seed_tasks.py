"""Seeds as tasks: in processes of this machine or on a Ray cluster, each going on from its own checkpoints.

A task always resumes what it finds in its folder. So a task that Ray runs again because its worker died loses no more
than the time since its last checkpoint. The folder of the run must be one that every node sees.
This module must not know how learning works.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from policies.atomic_files import write_text
from training.learning.monitor import STATE_FILE
from training.learning.train import Stopped, TrainedPolicy, course_of, train_all, train_seed
from training.learning.train_config import TrainConfig
from training.replaying.workers import Workers, open_workers
from training.versions.tracking import ensure_store

POLL_S = 1.0
"""Time between two looks at the progress, seconds."""
PROGRESS_FILE, STOP_FILE = "progress.json", "stop"


class Outcome(NamedTuple):
    """What a task gives back: the policy, and what was said on the way."""

    policy: TrainedPolicy
    said: list[str]


class ProgressFile:
    """Writes a task's progress to its folder, at most as often as the waiting process looks; stops when it says so.

    Args:
        folder: of the seed; a file named `STOP_FILE` beside it ends the task.
    """

    def __init__(self, folder: Path) -> None:
        self._path, self._stop = folder / PROGRESS_FILE, folder.parent / STOP_FILE
        self._next_s = 0.0

    def __call__(self, label: str, done: int, total: int) -> None:
        """Note that `done` of `total` steps are done.

        Raises:
            Stopped: when the task is to end.
        """
        if time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + POLL_S
            write_text(self._path, json.dumps({"label": label, "done": done, "total": total, "pid": os.getpid()}))
            if self._stop.exists():
                raise Stopped


def train_task(config: TrainConfig, seed: int, out: Path) -> Outcome:
    """Train one seed, or go on with it."""
    import torch

    torch.set_num_threads(1)
    said: list[str] = []
    folder = out / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    progress = ProgressFile(folder)
    course = course_of(config, out, lambda done, total: progress(f"seed {seed}: worlds", done, total))
    policy = train_seed(config, course, seed, out, True, said.append, progress)
    (folder / PROGRESS_FILE).unlink(missing_ok=True)
    return Outcome(policy, said)


Where = tuple[int, str | None]
"""Processes, and the address of a Ray cluster, as `training.replaying.workers.open_workers` reads them."""


def train_seeds(
    config: TrainConfig,
    out: Path,
    resume: bool,
    say: Callable[[str], None],
    bar: Callable[[str, int, int], None],
    where: Where,
) -> TrainedPolicy:
    """Train every seed of `config`, in this process or as tasks; as `training.learning.train.train_all`.

    Raises:
        ValueError: when the cluster cannot be reached.
    """
    if where == (1, None):
        return train_all(config, out, resume, say, bar)
    with open_workers(*where) as workers:
        return train_as_tasks(config, out, resume, say, bar, workers)


def train_as_tasks(
    config: TrainConfig,
    out: Path,
    resume: bool,
    say: Callable[[str], None],
    bar: Callable[[str, int, int], None],
    workers: Workers,
) -> TrainedPolicy:
    """Train every seed of `config` beside each other and return the one with the best validation score.

    The networks are the same as of `training.learning.train.train_all`.

    Args:
        config: the run.
        out: folder of the run; every worker must see it under this path.
        resume: go on from the checkpoints in `out` where there are any.
        say: receives one-line messages, those of a seed when it is done.
        bar: called with (label, done, total) for progress.
        workers: where seeds run.
    """
    out = out.resolve()
    config = config.model_copy(update={"tracking_uri": ensure_store(config.tracking_uri)})
    for seed in config.seeds:
        if not resume:
            (out / f"seed-{seed}" / STATE_FILE).unlink(missing_ok=True)
        workers.submit(seed, train_task, config, seed, out)
    policies: list[TrainedPolicy] = []
    while len(policies) < len(config.seeds):
        while not workers.any_done(POLL_S):
            for seed in config.seeds:
                show_progress(out / f"seed-{seed}", bar)
        _, outcome = workers.next_done()
        policies.append(outcome.policy)
        for line in outcome.said:
            say(line)
    return min(policies, key=lambda policy: (policy.score, config.seeds.index(policy.seed)))


def show_progress(folder: Path, bar: Callable[[str, int, int], None], label: str | None = None) -> None:
    """Show what a task under way has written last, under its own label if no other is given."""
    try:
        written = json.loads((folder / PROGRESS_FILE).read_text())
    except (OSError, ValueError):
        return
    bar(label or written["label"], written["done"], written["total"])

"""Where heavy work runs: in this process, in a local pool of processes, or as tasks on a Ray cluster.

The work is the same in all three, and so are the results; only the order in which they come differs.
This module must not know what the work is.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, Protocol

from autoscaler.hosting import local_ray
from policies.redaction import redacted

Task = Callable[..., Any]
Progress = Callable[[int, int, str], None]
"""Called with pieces done, pieces in all, and what the next or last piece is."""


def end_on_ctrl_c() -> None:
    """Let Ctrl-C end a worker process without a traceback; its parent reports."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Workers(Protocol):
    """Runs tasks: submit any number, collect them as they get done."""

    width: int

    def submit(self, key: Any, task: Task, *args: Any) -> None:
        """Hand a task in; `key` comes back with its result."""
        ...

    def any_done(self, timeout_s: float) -> bool:
        """Whether `next_done` has something to give, after waiting for it at most `timeout_s` seconds."""
        ...

    def next_done(self) -> tuple[Any, Any]:
        """Key and result of a task that is done; waits for one. An error of the task is raised here.

        Raises:
            IndexError: when nothing is under way.
        """
        ...


class InProcess:
    """One task after the other, here, when its result is asked for."""

    width = 1

    def __init__(self) -> None:
        self._waiting: deque[tuple[Any, Task, tuple[Any, ...]]] = deque()

    def submit(self, key: Any, task: Task, *args: Any) -> None:
        """Queue a task."""
        self._waiting.append((key, task, args))

    def any_done(self, timeout_s: float) -> bool:
        """Whether a task is waiting: it runs when its result is asked for."""
        return bool(self._waiting)

    def next_done(self) -> tuple[Any, Any]:
        """Run the oldest task."""
        key, task, args = self._waiting.popleft()
        return key, task(*args)


class LocalPool:
    """Processes on this machine.

    Args:
        pool: of spawned processes.
        width: how many.
    """

    def __init__(self, pool: ProcessPoolExecutor, width: int) -> None:
        self.width = width
        self._pool = pool
        self._keys: dict[Future[Any], Any] = {}

    def submit(self, key: Any, task: Task, *args: Any) -> None:
        """Hand a task to the pool."""
        self._keys[self._pool.submit(task, *args)] = key

    def any_done(self, timeout_s: float) -> bool:
        """Wait for a result."""
        return bool(wait(self._keys, timeout_s, FIRST_COMPLETED).done)

    def next_done(self) -> tuple[Any, Any]:
        """The first result."""
        if not self._keys:
            raise IndexError("nothing is under way")
        done, _ = wait(self._keys, return_when=FIRST_COMPLETED)
        future = next(iter(done))
        return self._keys.pop(future), future.result()


class RayTasks:
    """Tasks on the Ray cluster that this process is connected to; its nodes need the same Jevons installed.

    Args:
        width: tasks that run at once: the cluster's CPUs.
    """

    def __init__(self, width: int) -> None:
        import ray

        self.width = width
        self._ray = ray
        self._keys: dict[Any, Any] = {}
        self._remote: dict[Task, Any] = {}

    def submit(self, key: Any, task: Task, *args: Any) -> None:
        """Send a task to the cluster."""
        if task not in self._remote:
            self._remote[task] = self._ray.remote(num_cpus=1)(task)
        self._keys[self._remote[task].remote(*args)] = key

    def any_done(self, timeout_s: float) -> bool:
        """Wait for a result."""
        return bool(self._ray.wait(list(self._keys), num_returns=1, timeout=timeout_s)[0])

    def next_done(self) -> tuple[Any, Any]:
        """The first result."""
        if not self._keys:
            raise IndexError("nothing is under way")
        (done, *_), _ = self._ray.wait(list(self._keys), num_returns=1)
        key = self._keys.pop(done)
        try:
            return key, self._ray.get(done)
        except self._ray.exceptions.RayTaskError as error:
            # The task's own error, as the other two kinds of workers raise it.
            raise error.cause if isinstance(error.cause, Exception) else error from None


@contextmanager
def open_workers(jobs: int, ray_address: str | None = None, apart: bool = False) -> Iterator[Workers]:
    """Workers for a block of code; what is still under way at its end is given up.

    Args:
        jobs: processes; 1 works in this one.
        ray_address: of a Ray cluster, as `ray.init` reads it (``auto``, ``ray://HOST:10001``); ``local`` starts one on
            this machine with `jobs` CPUs. Then `jobs` means nothing else.
        apart: work in a process of its own even where it is only one, so that this one can look on.

    Raises:
        ValueError: when `jobs` is below 1, or the cluster cannot be reached.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    if ray_address is not None:
        with _ray_cluster(ray_address, jobs) as width:
            yield RayTasks(width)
        return
    if jobs == 1 and not apart:
        yield InProcess()
        return
    # Spawned, not forked: the parent may hold threads (onnxruntime, numba) that a fork would leave locked.
    # The initializer lives in this light module: Ctrl-C may come while the workers still import.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=end_on_ctrl_c) as pool:
        try:
            yield LocalPool(pool, jobs)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _ray_cluster(address: str, jobs: int) -> Iterator[int]:
    loaded, options = sys.modules.get("ray"), {}
    if address == "local" and (loaded is None or not loaded.is_initialized()):
        options = {**local_ray.options(), "include_dashboard": False, "num_cpus": jobs}
    import ray

    ours = not ray.is_initialized()
    if ours:
        try:
            ray.init(**{"address": address, "log_to_driver": False, **options})
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ValueError(f"--ray-address {address}: {' '.join(redacted(str(error)).split())[:200]}") from None
    try:
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        yield max(1, int(resources.get("CPU", 1)))
    finally:
        if ours:
            ray.shutdown()

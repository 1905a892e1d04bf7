"""Ray as the host of live controllers: named, detached, restartable actors, one per shard.

The actors keep nothing that the database does not hold too. A driver process owns or joins the cluster; when the head
of a cluster that it owns dies, it ends, and `supervise` starts another one.
This is the only module that imports Ray to host something.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from autoscaler.hosting.config import LiveConfig, RayConfig
from autoscaler.hosting.decision_log import configure_logging
from autoscaler.hosting.service import LiveService

LOG = logging.getLogger("jevons")
LOOK_S = 2.0
"""Time between two looks at the actors, seconds."""
LONGEST_PAUSE_S = 30.0
ENDED = 0


class ControllerActor:
    """Hosts one shard; its loop runs in a thread, so that questions are answered while a tick runs.

    Args:
        config: the whole configuration, JSON.
        shard: which shard.
    """

    def __init__(self, config: str, shard: int) -> None:
        loaded = LiveConfig.model_validate_json(config)
        configure_logging(loaded.log)
        self._service = LiveService(loaded, shard)
        self._ended = threading.Event()
        threading.Thread(target=self._run, name="jevons-loop", daemon=True).start()

    def _run(self) -> None:
        try:
            self._service.run()
        except BaseException:
            LOG.exception("the loop has given up; Ray starts the actor again")
            os._exit(1)
        self._ended.set()

    def status(self) -> dict[str, Any]:
        """What the controller says about itself, its process number included."""
        return {**self._service.status(), "pid": os.getpid(), "ended": self._ended.is_set()}

    def stop(self) -> None:
        """End the loop after the present tick."""
        self._service.stop()


def actor_name(config: LiveConfig, shard: int) -> str:
    """Name of a shard's actor in the namespace."""
    return f"{config.name}-{shard}"


def connect(config: RayConfig) -> Any:
    """Join the cluster that the configuration names, or start one on loopback; the `ray` module."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    common: dict[str, Any] = {"namespace": config.namespace, "log_to_driver": False, "configure_logging": False}
    if config.address is not None:
        ray.init(address=config.address, **common)
        return ray
    common |= {"include_dashboard": config.dashboard_port is not None, "dashboard_host": "127.0.0.1"}
    if config.dashboard_port is not None:
        common["dashboard_port"] = config.dashboard_port
    ray.init(_node_ip_address="127.0.0.1", **common)
    return ray


def start_actors(ray: Any, config: LiveConfig) -> list[Any]:
    """The actors of all shards; those that run already are left alone."""
    remote = ray.remote(ControllerActor)
    text = config.model_dump_json()
    return [
        remote.options(
            name=actor_name(config, shard),
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            max_task_retries=0,
            max_concurrency=4,
            num_cpus=config.ray.cpus_per_actor,
        ).remote(text, shard)
        for shard in range(config.shards)
    ]


def drive(configs: Sequence[LiveConfig], detach: bool, say: Callable[[str], None]) -> None:
    """Host controllers until they have ended; with `detach` leave them to the cluster.

    All configurations share the first one's cluster.
    """
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    ray = connect(configs[0].ray)
    actors = [actor for config in configs for actor in start_actors(ray, config)]
    names = ", ".join(actor_name(config, shard) for config in configs for shard in range(config.shards))
    say(f"hosting {names} on Ray, namespace {configs[0].ray.namespace}")
    if detach:
        return
    while not stop.wait(LOOK_S):
        if all(_ended(ray, actor) for actor in actors):
            break
    for actor in actors:
        _end(ray, actor)
    ray.shutdown()


def _ended(ray: Any, actor: Any) -> bool:
    """Whether an actor's loop has come to its end. One that restarts has not."""
    try:
        return bool(ray.get(actor.status.remote(), timeout=10.0)["ended"])
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
        return False


def _end(ray: Any, actor: Any) -> None:
    """Let the present tick end and the leases be handed back, then remove the actor."""
    try:
        ray.get(actor.stop.remote(), timeout=10.0)
        until_s = time.monotonic() + 30.0
        while not _ended(ray, actor) and time.monotonic() < until_s:
            time.sleep(0.2)
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
        LOG.warning("an actor did not answer; it is removed")
    ray.kill(actor, no_restart=True)


def supervise(paths: Sequence[Path], say: Callable[[str], None]) -> int:
    """Run the driver in a process of its own, and another one when it dies with the head of its cluster; exit code."""
    command = [sys.executable, "-m", "autoscaler.hosting.ray_host", *(str(path) for path in paths)]
    stop, pause_s = threading.Event(), 1.0
    child: subprocess.Popen[bytes] | None = None

    def end(*_: object) -> None:
        stop.set()
        if child is not None:
            child.terminate()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    while not stop.is_set():
        began_s = time.monotonic()
        # A session of its own: Ctrl-C reaches this process alone, which then ends the driver in order.
        child = subprocess.Popen(command, start_new_session=True)
        code = child.wait()
        if code == ENDED or stop.is_set():
            break
        pause_s = 1.0 if time.monotonic() - began_s > 60.0 else min(2 * pause_s, LONGEST_PAUSE_S)
        say(f"the Ray driver ended with code {code}; starting it again in {pause_s:g} s")
        stop.wait(pause_s)
    return ENDED


def main(arguments: Sequence[str]) -> None:
    """The driver: `python -m autoscaler.hosting.ray_host CONFIG...`."""
    from autoscaler.hosting.config import load_live_config

    configs = [load_live_config(Path(path)).located(Path.cwd()) for path in arguments]
    configure_logging(configs[0].log)
    drive(configs, detach=False, say=LOG.info)


if __name__ == "__main__":
    main(sys.argv[1:])

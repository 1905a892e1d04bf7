"""Ray as the host of live controllers: named, detached, restartable actors, one per shard.

The actors keep nothing that the database does not hold too. A driver process starts or joins the cluster, makes the
actors, and looks at them; those that are there already it leaves alone. It ends when the cluster is lost, and
`supervise` starts another one, which makes them again.
This is the only module that imports Ray to host something.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from autoscaler.authority.controls import DownWatch
from autoscaler.hosting import local_ray
from autoscaler.hosting.attempts import Attempts, Run, Standing, report, sentence
from autoscaler.hosting.config import LiveConfig, RayConfig, load_live_config
from autoscaler.hosting.presence import Doing
from autoscaler.hosting.process import prepare
from autoscaler.hosting.progress import Watchdog
from autoscaler.hosting.waiting import Waiting
from policies.engine import ConfigError
from policies.redaction import guard_streams
from policies.secret_url import REVEALED

LOG = logging.getLogger("jevons")
LOOK_S = 1.0
"""Time between two looks at the cluster and the actors, seconds."""
ANSWER_S = 10.0
"""How long an actor may take to say how it stands, seconds."""
CONNECT_S = 90.0
"""How long a cluster may take to start, or to let this process join, seconds."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 5.0
"""Pause before the next driver, seconds; it doubles up to the longest."""
DRIVER = (sys.executable, "-m", "autoscaler.hosting.ray_host")
EXIT_ENDED, EXIT_FAILED, EXIT_LOST = 0, 2, 3
"""Exit codes of the driver: the controllers have ended; one cannot run; the cluster is lost."""

Say = Callable[[str], None]


class ControllerActor:
    """Hosts one shard; its loop runs in a thread, so that questions are answered while a tick runs.

    Args:
        config: the whole configuration, JSON.
        shard: which shard.
        before_s: stamp of the order to end that had been carried out when the run began; also after a restart.
    """

    def __init__(self, config: str, shard: int, before_s: float | None) -> None:
        loaded = LiveConfig.model_validate_json(config)
        prepare(loaded.log)
        self._config = config
        self._attempts = Attempts(loaded, shard, Watchdog(), DownWatch(loaded.name, before_s))
        threading.Thread(target=self._attempts.run, name="jevons-loop", daemon=True).start()

    def standing(self) -> tuple[Doing, str]:
        """What it does, and what is wrong."""
        standing = self._attempts.standing
        return standing.doing, standing.problem

    def config(self) -> str:
        """The configuration that it runs with, JSON."""
        return self._config

    def stop(self) -> None:
        """End the loop after the present tick."""
        self._attempts.stop()


def actor_name(config: LiveConfig, shard: int) -> str:
    """Name of a shard's actor in the namespace."""
    return f"{config.name}-{shard}"


def connect(config: RayConfig) -> Any:
    """Join the cluster that the configuration names, or start one on loopback, with a token; the `ray` module."""
    if config.address is not None:
        arguments: dict[str, Any] = {"address": config.address.reveal()}
    else:
        arguments = local_ray.options()
        arguments["include_dashboard"] = config.dashboard_port is not None
        if config.dashboard_port is not None:
            arguments["dashboard_port"] = config.dashboard_port
    import ray

    ray.init(namespace=config.namespace, log_to_driver=False, configure_logging=False, **arguments)
    return ray


def start_actor(ray: Any, run: Run, shard: int) -> Any:
    """The actor of a shard; one that runs already is left alone."""
    config = run.config
    return (
        ray.remote(ControllerActor)
        .options(
            name=actor_name(config, shard),
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            max_task_retries=0,
            max_concurrency=4,
            num_cpus=config.ray.cpus_per_actor,
        )
        .remote(config.model_dump_json(context=REVEALED), shard, run.down.before_s)
    )


def remove_ended(ray: Any, config: LiveConfig, shard: int) -> None:
    """Remove an actor whose shard has ended and that no driver was there to remove: it would be taken for the next."""
    errors = (ValueError, ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError)
    with suppress(*errors):  # there is none, or it does not answer and is looked at as any other
        actor = ray.get_actor(actor_name(config, shard), namespace=config.ray.namespace)
        if Standing(*ray.get(actor.standing.remote(), timeout=ANSWER_S)).over:
            ray.kill(actor, no_restart=True)


class Watched:
    """One actor as its driver sees it.

    Args:
        ray: the module, connected.
        run: whose shard it is.
        shard: which.
        say: tells people what changes.
    """

    def __init__(self, ray: Any, run: Run, shard: int, say: Say) -> None:
        self.name = run.config.shard_name(shard)
        self.standing = Standing(Doing.STARTS)
        self._ray, self._run, self._shard, self._say = ray, run, shard, say
        self._actor = start_actor(ray, run, shard)
        self._asked: Any = None
        self._asked_s = 0.0

    def look(self) -> Standing:
        """How it stands, as far as it has said by now; what has changed is told. A dead actor is made again."""
        ray, now_s = self._ray, time.monotonic()
        if self._asked is None:
            self._asked, self._asked_s = self._actor.standing.remote(), now_s
        try:
            found = Standing(*ray.get(self._asked, timeout=0))
            self._asked = None
        except ray.exceptions.GetTimeoutError:
            if now_s - self._asked_s < ANSWER_S:
                return self.standing
            found = Standing(Doing.WAITS, f"its Ray actor has not answered for {ANSWER_S:g} s or more")
        except ray.exceptions.ActorUnavailableError:
            self._asked = None
            found = Standing(Doing.WAITS, "its Ray actor is gone; Ray starts it again")
        except ray.exceptions.RayActorError as error:
            self._asked = None
            if error.actor_init_failed:
                found = Standing(Doing.FAILED, f"its Ray actor cannot be made: {_last_line(error)}")
                report(self._run.config, self._shard, found)
            else:
                found = Standing(Doing.WAITS, "its Ray actor is dead; another one is made")
                self._actor = start_actor(ray, self._run, self._shard)
        if found != self.standing:
            self._say(f"{self.name} {found.doing}" + (f": {found.problem}" if found.problem else ""))
        self.standing = found
        return found

    def is_another(self) -> bool:
        """Whether the actor was there before, with another configuration than this one."""
        with suppress(self._ray.exceptions.RayActorError, self._ray.exceptions.GetTimeoutError):
            mine = self._run.config.model_dump_json(context=REVEALED)
            return bool(self._ray.get(self._actor.config.remote(), timeout=ANSWER_S) != mine)
        return False

    def stop(self) -> None:
        """Let the present tick be the last one."""
        self._actor.stop.remote()

    def end(self) -> None:
        """After `stop`: wait until the leases are handed back, then remove the actor."""
        errors = (self._ray.exceptions.RayActorError, self._ray.exceptions.GetTimeoutError)
        try:
            until_s = time.monotonic() + 30.0
            while not Standing(*self._ray.get(self._actor.standing.remote(), timeout=ANSWER_S)).over:
                if time.monotonic() > until_s:
                    break
                time.sleep(0.2)
        except errors:
            LOG.warning("%s: its Ray actor does not answer; it is removed", self.name)
        self._ray.kill(self._actor, no_restart=True)


def drive(runs: Sequence[Run], detach: bool, say: Say, why: str = "") -> int:
    """Host controllers until they have ended; with `detach` leave them to the cluster once they run; an exit code.

    All configurations share the first one's cluster.

    Args:
        runs: what to host.
        detach: whether the actors go on without this process.
        say: tells people.
        why: they are begun again, in words; empty at first.
    """
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    cluster = runs[0].config.ray
    address = None if cluster.address is None else cluster.address.reveal()
    with Waiting(runs, stop, say, why) as waiting:
        if stop.is_set() or not _wait_for(address, stop, waiting.wait_for):
            return EXIT_ENDED
        try:
            ray = _connect_in_time(cluster)
        except (ValueError, ConfigError) as error:
            waiting.fail(f"ray.address {cluster.address}: {sentence(error)}")
            return EXIT_FAILED
        except Exception as error:
            if type(error).__name__ == "AuthenticationError":
                waiting.fail(f"the Ray cluster refuses this host's token: {_last_line(error)}")
                return EXIT_FAILED
            say(f"Ray cannot be {'started' if cluster.address is None else 'joined'}: {sentence(error)}")
            return EXIT_LOST
        head = _place(address) if _is_client(address) else ray.get_runtime_context().gcs_address
        shards = [(run, shard) for run in waiting.left() for shard in range(run.config.shards)]
        for run, shard in shards:
            remove_ended(ray, run.config, shard)
        watched = [Watched(ray, run, shard, say) for run, shard in shards]
    if watched:
        say(f"hosting {', '.join(one.name for one in watched)} on Ray, namespace {cluster.namespace}, head {head}")
    for one in watched:
        if one.is_another():
            say(f"{one.name} runs already, with another configuration; `jevons down` ends it")
    code: int | None = None
    while code is None:
        stopped = stop.wait(LOOK_S)
        if not answers(head) and not answers(head):
            say(f"the Ray cluster at {head} is lost")
            os._exit(EXIT_LOST)  # its library would wait a minute for the head, and end the process then
        try:
            standings = [one.look() for one in watched]
        except ConnectionError as error:
            say(f"the Ray cluster at {head} is lost: {sentence(error)}")
            os._exit(EXIT_LOST)
        if any(standing.doing == Doing.FAILED for standing in standings):
            code = EXIT_FAILED
        elif stopped or all(standing.doing == Doing.ENDED for standing in standings):
            code = EXIT_ENDED
        elif detach and all(standing.doing != Doing.STARTS for standing in standings):
            return EXIT_ENDED
    for one in watched:
        one.stop()
    for one in watched:
        one.end()
    ray.shutdown()
    return code


def answers(address: str) -> bool:
    """Whether somebody listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=1.0):
            return True
    except OSError:
        return False


def _wait_for(address: str | None, stop: threading.Event, say: Callable[[str], object]) -> bool:
    """Wait until somebody listens where the cluster is to be joined; False when told to end meanwhile."""
    place = _place(address)
    if not place.rpartition(":")[2].isdigit():
        return True
    said = False
    while not stop.is_set():
        if answers(place):
            return True
        if not said:
            say(f"no Ray cluster answers at {place}; waiting for it")
        said = True
        stop.wait(0.5)
    return False


def _is_client(address: str | None) -> bool:
    """Whether a cluster is joined through its client server: its head may be out of reach from here."""
    return (address or "").startswith("ray://")


def _place(address: str | None) -> str:
    """HOST:PORT of an address that names one."""
    return (address or "").removeprefix("ray://")


def _connect_in_time(config: RayConfig) -> Any:
    """`connect`; a process that hangs in it ends."""

    def give_up() -> None:
        LOG.error("Ray has not answered for %g s", CONNECT_S)
        os._exit(EXIT_LOST)

    timer = threading.Timer(CONNECT_S, give_up)
    timer.daemon = True
    timer.start()
    try:
        return connect(config)
    finally:
        timer.cancel()


def _last_line(error: Exception) -> str:
    """What went wrong, of an error with a remote traceback."""
    return str(error).strip().splitlines()[-1].strip()


def supervise(runs: Sequence[Run], say: Say) -> int:
    """Run the driver in a process of its own, and another one when it ends with its cluster; exit code."""
    why = ""
    stop, pause_s = threading.Event(), FIRST_PAUSE_S
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
        child = subprocess.Popen([*DRIVER, why, *map(_as_word, runs)], start_new_session=True)
        if stop.is_set():  # told so while it was being started
            child.terminate()
        code = child.wait()
        if code == EXIT_FAILED:
            say("error: a controller cannot run; the line above says why")
            return EXIT_FAILED
        if code == EXIT_ENDED or stop.is_set():
            return EXIT_ENDED
        pause_s = FIRST_PAUSE_S if time.monotonic() - began_s > 60.0 else min(2 * pause_s, LONGEST_PAUSE_S)
        why = f"the Ray driver {'has lost its cluster' if code == EXIT_LOST else f'ended with code {code}'}"
        say(f"{why}; starting it again in {pause_s:g} s")
        stop.wait(pause_s)
    return EXIT_ENDED


def _as_word(run: Run) -> str:
    """A run as one word of a command line."""
    return json.dumps([str(run.path), run.down.before_s])


def _of_word(word: str) -> Run:
    path, before_s = json.loads(word)
    config = load_live_config(Path(path)).located(Path.cwd())
    return Run(Path(path), config, DownWatch(config.name, before_s))


def main(arguments: Sequence[str]) -> int:
    """The driver: `python -m autoscaler.hosting.ray_host WHY RUN...`; its exit code."""
    guard_streams()
    why, *words = arguments
    runs = [_of_word(word) for word in words]
    prepare(runs[0].config.log)
    return drive(runs, detach=False, say=LOG.info, why=why)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

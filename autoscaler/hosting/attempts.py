"""A shard, begun again for as long as what stops it can pass, and given up at once where it cannot.

A wrong configuration is final. A database that is not there yet, a port that is still taken or a loop that has given up
can pass: they are tried again after a pause that grows.
This module must not know where it is hosted.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from autoscaler.actuators.base import Refused
from autoscaler.authority.controls import Controls, DownWatch
from autoscaler.hosting.config import LiveConfig
from autoscaler.hosting.presence import Doing, Presence
from autoscaler.hosting.progress import Watchdog
from autoscaler.hosting.service import LiveService
from autoscaler.records.database import Database
from policies.learned import BundleMismatch

LOG = logging.getLogger("jevons")
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
"""Pause after the first failure, seconds; each further one doubles it, up to the longest."""
LOOK_S = 2.0
"""Time between two looks at the orders while it waits, seconds."""
SPEAKING = (ValueError, OSError, Refused, BundleMismatch)
"""Errors whose message is a sentence for people; any other is an error of the program."""


class Hosted(Protocol):
    """What is hosted: a `LiveService`."""

    @property
    def doing(self) -> Doing:
        """As of the last tick."""
        ...

    def run(self, watchdog: Watchdog) -> None:
        """Until `stop`."""
        ...

    def stop(self) -> None:
        """End it after the present tick."""
        ...

    def close(self) -> None:
        """Let go of everything."""
        ...


@dataclass(frozen=True)
class Standing:
    """What a shard does, and what is wrong."""

    doing: Doing
    problem: str = ""

    @property
    def over(self) -> bool:
        """Whether nothing more will happen."""
        return self.doing in {Doing.FAILED, Doing.ENDED}


class Run(NamedTuple):
    """One configuration, hosted from the start that somebody ordered to its end, over all restarts in between."""

    path: Path
    config: LiveConfig
    down: DownWatch


Make = Callable[[LiveConfig, int, DownWatch], Hosted]


class Attempts:
    """Makes one shard and runs it, again and again where that can help.

    Args:
        config: the whole controller's configuration.
        shard: which of its shards.
        watchdog: of this process.
        down: hears `jevons down` for the run that this is a part of; a run of its own when left out.
        make: makes it.
    """

    def __init__(
        self,
        config: LiveConfig,
        shard: int,
        watchdog: Watchdog,
        down: DownWatch | None = None,
        make: Make = lambda config, shard, down: LiveService(config, shard, down=down),
    ) -> None:
        self.name = config.shard_name(shard)
        self._config, self._shard, self._watchdog, self._make = config, shard, watchdog, make
        self._down = down or DownWatch(config.name)
        self._standing = Standing(Doing.STARTS)
        self._service: Hosted | None = None
        self._stopped = threading.Event()

    @property
    def standing(self) -> Standing:
        """What it does now, and what is wrong where it cannot run."""
        service = self._service
        return self._standing if service is None else Standing(service.doing)

    def run(self) -> None:
        """Until `stop` or `jevons down`, or until `standing` is `failed`."""
        pause_s = FIRST_PAUSE_S
        over = self._stand(Standing(Doing.STARTS))
        while not over and not self._stopped.is_set():
            began, began_s = False, time.monotonic()
            try:
                service = self._make(self._config, self._shard, self._down)
                self._service, began = service, True
                if self._stopped.is_set():
                    service.stop()
                service.run(self._watchdog)
                break
            except Exception as error:
                problem = sentence(error)
                if not began and not can_pass(error):
                    LOG.error("%s cannot start: %s", self.name, problem, exc_info=not isinstance(error, SPEAKING))
                    self._stand(Standing(Doing.FAILED, problem))
                    return
                if time.monotonic() - began_s > LONGEST_PAUSE_S:  # it has run: this is another trouble than the last
                    pause_s = FIRST_PAUSE_S
                trace = not isinstance(error, SPEAKING)
                LOG.warning("%s: %s; trying again in %g s", self.name, problem, pause_s, exc_info=trace)
            self._let_go()
            over = self._wait(pause_s, Standing(Doing.WAITS, problem))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        self._service = None
        self._stand(Standing(Doing.ENDED))

    def stop(self) -> None:
        """End the loop after the present tick, and no more attempts."""
        self._stopped.set()
        if self._service is not None:
            self._service.stop()

    def _wait(self, pause_s: float, standing: Standing) -> bool:
        """Wait before the next attempt; whether it was told to end meanwhile."""
        until_s = time.monotonic() + pause_s
        while not self._stand(standing):  # said again and again: who says nothing counts as silent
            left_s = until_s - time.monotonic()
            if left_s <= 0 or self._stopped.wait(min(left_s, LOOK_S)):
                return False
        return True

    def _stand(self, standing: Standing) -> bool:
        """Leave word of how it stands; whether it was told to end."""
        self._standing = standing
        told = report(self._config, self._shard, standing, self._down)
        if told and not standing.over:
            LOG.info("%s ends: %s", self.name, told)
        return bool(told)

    def _let_go(self) -> None:
        """Of leases and ports of a loop that has given up, so that the next one can have them."""
        service, self._service = self._service, None
        if service is not None:
            with suppress(Exception):
                service.close()


def can_pass(error: Exception) -> bool:
    """Whether what stopped a shard at its start can pass without anybody doing something: it lies outside."""
    return isinstance(error, OSError)


def sentence(error: BaseException) -> str:
    """An error in one line."""
    words = " ".join(str(error).split())
    return words if words and isinstance(error, SPEAKING) else f"{type(error).__name__}: {words}"


def report(config: LiveConfig, shard: int, standing: Standing, down: DownWatch | None = None) -> str:
    """Leave word of a shard that does not run, for `jevons status`, and hear the orders; nothing else depends on it.

    Returns:
        who has told it to end, in words; empty when nobody has, or nobody can be asked.
    """
    told = ""
    said = {
        "controller": config.shard_name(shard),
        "doing": standing.doing,
        "services": len(config.shard(shard)),
        "leads": 0,
        "policy": "none",
        "problems": [standing.problem] if standing.problem else [],
        "states": {},
    }
    with suppress(Exception), _records(config) as database:
        told = "" if down is None else down.told(Controls(database).read())
        Presence(database, config.shard_name(shard)).tell(said)
    return told


def leave(config: LiveConfig, shard: int) -> None:
    """Take back what this process has said of a shard: somebody else speaks for it."""
    with suppress(Exception), _records(config) as database:
        Presence(database, config.shard_name(shard)).leave()


def hear(config: LiveConfig, down: DownWatch) -> str:
    """Who has told a run to end, in words; empty when nobody has, or nobody can be asked."""
    with suppress(Exception), _records(config) as database:
        return down.told(Controls(database).read())
    return ""


@contextmanager
def _records(config: LiveConfig) -> Iterator[Database]:
    database = Database(config.database_url)
    try:
        database.create()
        yield database
    finally:
        database.close()

"""What is said and heard for shards that have no host yet: a Ray cluster may be long in coming.

Nobody else does it for them meanwhile: `jevons status` would not show them, and `jevons down` not reach them.
This module must not know what is waited for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import TracebackType

from autoscaler.background import Background
from autoscaler.hosting.attempts import LOOK_S, Run, Standing, leave, report
from autoscaler.hosting.presence import Doing


class Waiting:
    """While inside, its runs are said to start or to wait, and hear the orders.

    Args:
        runs: what is to be hosted.
        stop: set once no run is left to be hosted.
        say: tells people.
        why: they are begun again, in words; empty at first.
    """

    def __init__(self, runs: Sequence[Run], stop: threading.Event, say: Callable[[str], None], why: str) -> None:
        self._runs, self._stop, self._say = list(runs), stop, say
        self._standing = Standing(Doing.WAITS, why) if why else Standing(Doing.STARTS)
        self._last: Standing | None = None
        self._ended: set[str] = set()
        self._thread = Background("orders", self._look, LOOK_S)

    def left(self) -> list[Run]:
        """The runs that nobody has told to end."""
        return [run for run in self._runs if run.config.name not in self._ended]

    def wait_for(self, what: str) -> None:
        """Say what is waited for from now on."""
        self._say(what)
        self._standing = Standing(Doing.WAITS, what)
        self._look()

    def fail(self, why: str) -> None:
        """Say that they cannot be hosted, for good."""
        self._say(f"error: {why}")
        self._last = Standing(Doing.FAILED, why)

    def __enter__(self) -> Waiting:
        self._look()
        self._thread.start(LOOK_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Who hosts them speaks for them from now on; where nobody will, this is the last word."""
        self._thread.stop(LOOK_S)
        last = Standing(Doing.ENDED) if self._stop.is_set() else self._last
        for run in self.left():
            for shard in range(run.config.shards):
                if last is None:
                    leave(run.config, shard)
                else:
                    report(run.config, shard, last)

    def _look(self) -> None:
        for run in self.left():
            told = [report(run.config, shard, self._standing, run.down) for shard in range(run.config.shards)]
            if any(told):
                self._ended.add(run.config.name)
                self._say(f"{run.config.name} ends: {told[0]}")
                for shard in range(run.config.shards):
                    report(run.config, shard, Standing(Doing.ENDED))
        if not self.left():
            self._stop.set()

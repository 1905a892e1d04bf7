"""The stages of a tick, timed and bounded.

A stage that takes longer than its limit is left behind in its thread, and its error raised in its place; until that
thread comes back the same stage is refused, so two of them never run at once.
This module must not know what the stages do.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

LOG = logging.getLogger("jevons")
Result = TypeVar("Result")


class Overdue(RuntimeError):  # noqa: N818 - reads as the state that it reports
    """Raised when a call has given no answer in time; it goes on in its thread, and what it returns is lost."""

    def __init__(self, message: str, thread: threading.Thread) -> None:
        super().__init__(message)
        self.thread = thread


class _Worker(threading.Thread):
    """A thread whose caller may go on without it."""

    left_behind = False


def left_behind() -> bool:
    """Whether nobody waits any more for what the calling thread does: it must change nothing from here on."""
    return getattr(threading.current_thread(), "left_behind", False)


def within(limit_s: float, name: str, call: Callable[[], Result]) -> Result:
    """The answer of `call`, made in a thread of its own.

    Args:
        limit_s: longest wait, seconds.
        name: of the thread.
        call: what to do.

    Raises:
        Overdue: when it takes longer.
        RuntimeError: when `call` wants to end the interpreter: that ends its own thread and no more.
        Exception: what `call` raises.
    """
    answer: list[Result] = []
    raised: list[BaseException] = []

    def work() -> None:
        try:
            answer.append(call())
        except BaseException as error:  # handed to the caller's thread
            raised.append(error)

    thread = _Worker(target=work, name=f"jevons-{name}", daemon=True)
    thread.start()
    thread.join(limit_s)
    if thread.is_alive():
        thread.left_behind = True
        raise Overdue(f"no answer within {limit_s:g} s", thread)
    if raised:
        if isinstance(raised[0], SystemExit):
            raise RuntimeError(f"SystemExit: {raised[0]}") from raised[0]
        raise raised[0]
    return answer[0]


class Stages:
    """Runs the stages of a tick and remembers how long each one took.

    Args:
        limits_s: seconds that each stage may take. A stage without a limit runs in the caller's thread, and what it
            raises is the caller's own; one that has a limit can neither hang nor end the tick, whatever goes wrong.
    """

    def __init__(self, limits_s: Mapping[str, float] | None = None) -> None:
        self.limits_s = dict(limits_s or {})
        self.seconds: dict[str, float] = {}
        # Other threads read these two: they are replaced and never changed.
        self.errors: Mapping[str, str] = {}
        """What went wrong the last time, in words, by stage; a stage that went well is not in it."""
        self.failures: Mapping[str, int] = {}
        """How often each stage has failed."""
        self._running: dict[str, threading.Thread] = {}

    def run(self, stage: str, call: Callable[[], Result], failed: type[Exception]) -> Result:
        """The answer of `call`.

        Raises:
            Exception: of a stage with a limit the class `failed`, whatever went wrong: the limit has passed, an earlier
                call still hangs, or `call` raised something else; of another stage what `call` raises.
        """
        began_s = time.perf_counter()
        try:
            limit_s = self.limits_s.get(stage)
            answer = call() if limit_s is None else self._bounded(stage, call, limit_s)
            if stage in self.errors:
                self.errors = {one: words for one, words in self.errors.items() if one != stage}
            return answer
        except Exception as error:
            expected = isinstance(error, failed | Overdue)
            words = str(error) if expected and str(error) else f"{type(error).__name__}: {error}"
            if not expected and words != self.errors.get(stage):
                LOG.error("%s: an error of the program", stage, exc_info=error)
            self.errors = {**self.errors, stage: words}
            self.count(stage)
            if isinstance(error, failed) or stage not in self.limits_s:
                raise
            raise failed(f"stage {stage}: {words}") from error
        finally:
            self.seconds[stage] = time.perf_counter() - began_s

    def _bounded(self, stage: str, call: Callable[[], Result], limit_s: float) -> Result:
        earlier = self._running.get(stage)
        if earlier is not None and earlier.is_alive():
            raise Overdue("an earlier call still hangs", earlier)
        try:
            return within(limit_s, stage, call)
        except Overdue as error:
            self._running[stage] = error.thread
            raise

    def count(self, stage: str) -> None:
        """A failure more of a stage, or of what lies between the stages."""
        self.failures = {**self.failures, stage: self.failures.get(stage, 0) + 1}

    def forget(self) -> None:
        """What went wrong the last time says nothing any more; how often it did stays."""
        self.errors = {}

    def spent(self) -> dict[str, Any]:
        """Seconds by stage of the last tick."""
        return dict(self.seconds)

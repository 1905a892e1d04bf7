"""The stages of a tick, timed and bounded.

A stage that takes longer than its limit is left behind in its thread, and its error raised in its place; until that
thread comes back the same stage is refused, so two of them never run at once.
This module must not know what the stages do.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

Result = TypeVar("Result")


class Stages:
    """Runs the stages of a tick and remembers how long each one took.

    Args:
        limits_s: seconds that each stage may take; a stage without a limit runs in the caller's thread.
    """

    def __init__(self, limits_s: Mapping[str, float] | None = None) -> None:
        self.limits_s = dict(limits_s or {})
        self.seconds: dict[str, float] = {}
        self.errors: dict[str, str] = {}
        """What went wrong the last time, in words, by stage; a stage that went well is not in it."""
        self.failures: dict[str, int] = {}
        """How often each stage has failed."""
        self._running: dict[str, threading.Thread] = {}

    def run(self, stage: str, call: Callable[[], Result], overdue: type[Exception]) -> Result:
        """The answer of `call`.

        Raises:
            Exception: the class `overdue`, when the limit has passed or an earlier call still hangs; else what `call`
                raises.
        """
        began_s = time.perf_counter()
        try:
            limit_s = self.limits_s.get(stage)
            answer = call() if limit_s is None else self._bounded(stage, call, limit_s, overdue)
            self.errors.pop(stage, None)
            return answer
        except Exception as error:
            self.errors[stage] = str(error) or type(error).__name__
            self.failures[stage] = self.failures.get(stage, 0) + 1
            raise
        finally:
            self.seconds[stage] = time.perf_counter() - began_s

    def _bounded(self, stage: str, call: Callable[[], Result], limit_s: float, overdue: type[Exception]) -> Result:
        earlier = self._running.get(stage)
        if earlier is not None and earlier.is_alive():
            raise overdue(f"stage {stage}: an earlier call still hangs")
        answer: list[Result] = []
        raised: list[BaseException] = []

        def work() -> None:
            try:
                answer.append(call())
            except BaseException as error:  # handed to the caller's thread
                raised.append(error)

        thread = threading.Thread(target=work, name=f"jevons-{stage}", daemon=True)
        self._running[stage] = thread
        thread.start()
        thread.join(limit_s)
        if thread.is_alive():
            raise overdue(f"stage {stage}: no answer within {limit_s:g} s")
        if raised:
            raise raised[0]
        return answer[0]

    def spent(self) -> dict[str, Any]:
        """Seconds by stage of the last tick."""
        return dict(self.seconds)

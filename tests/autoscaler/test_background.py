"""Work in the background: begun again when it fails, named until it goes well."""

from __future__ import annotations

import threading

import pytest

from autoscaler.background import Background


class Rounds:
    """A round of work per entry: raises it, or goes well where it is None; the last one sets `done` and repeats."""

    def __init__(self, *rounds: BaseException | None) -> None:
        self._rounds = list(rounds)
        self.done = threading.Event()
        self.count = 0

    def __call__(self) -> None:
        self.count += 1
        error = self._rounds.pop(0) if self._rounds else None
        if not self._rounds:
            self.done.set()
        if error is not None:
            raise error


@pytest.mark.plays("a background thread fails", "begun again, counted, named")
def test_a_full_disk_once_is_said_counted_and_survived() -> None:
    seen: list[str] = []
    work = Rounds(OSError(28, "No space left on device"), None, None)
    thread = Background("registry", lambda: seen.append(thread.problem) or work(), 0.001, first_pause_s=0.001)  # type: ignore[func-returns-value]
    thread.start()
    assert work.done.wait(60.0)
    thread.stop(60.0)
    assert seen[:3] == [
        "",
        "thread registry: OSError: [Errno 28] No space left on device; begun again in 0.001 s",
        "",
    ]
    assert (thread.restarts, thread.problem) == (1, "")


def test_not_even_the_end_of_the_interpreter_ends_it() -> None:
    work = Rounds(SystemExit(1), MemoryError(), None)
    thread = Background("watch", work, 0.001, first_pause_s=0.001)
    thread.start()
    assert work.done.wait(60.0)
    thread.stop(60.0)
    assert thread.restarts == 2


def test_pauses_grow_with_each_failure_in_a_row() -> None:
    pauses: list[float] = []
    work = Rounds(*[ValueError()] * 9, None, ValueError())
    thread = Background("watch", work, 5.0)

    def wait(pause_s: float) -> bool:
        pauses.append(pause_s)
        return len(pauses) > 11

    thread.stopping.wait = wait  # type: ignore[method-assign,assignment]
    thread.start()
    thread.stop(60.0)
    assert pauses == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0, 5.0, 1.0]


def test_days_of_failures_do_not_end_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL")
    work = Rounds(*[OSError("no route")] * 3000, None)
    thread = Background("heartbeat", work, None)
    thread.stopping.wait = lambda timeout=None: False  # type: ignore[method-assign]
    thread.start()
    assert work.done.wait(60.0)
    thread.stop(60.0)
    assert (work.count, thread.restarts, thread.problem) == (3001, 3000, "")


def test_work_that_does_not_come_back_is_named() -> None:
    now, inside, go = [0.0], threading.Event(), threading.Event()

    def hang() -> None:
        inside.set()
        go.wait(60.0)

    thread = Background("watch", hang, None, stuck_s=30.0, now=lambda: now[0])
    thread.start()
    assert inside.wait(60.0)
    assert thread.problem == ""
    now[0] = 31.0
    assert thread.problem == "thread watch: has not come back for 31 s"
    go.set()
    thread.stop(60.0)
    assert thread.problem == ""


def test_one_round_is_enough_where_no_period_is_given() -> None:
    work = Rounds(None)
    thread = Background("file", work, None)
    thread.start()
    assert work.done.wait(60.0)
    thread.stop(60.0)
    assert work.count == 1

"""What an actuator last said, also when an earlier call comes back after a later one."""

from __future__ import annotations

import threading
from typing import Any

from live_fakes import LiveWorld, burst, service_spec

from autoscaler.actuators.state_watch import StateWatch


def test_a_call_that_was_left_behind_does_not_undo_a_newer_one() -> None:
    world, now = LiveWorld([service_spec()], [burst()]), [0.0]
    state, inside, go = world.state, threading.Event(), threading.Event()
    watch = StateWatch(world, world.specs, lambda: now[0])

    def hanging() -> Any:
        found = state()
        inside.set()
        go.wait(60.0)
        return found

    world.state = hanging  # type: ignore[method-assign]
    late = threading.Thread(target=watch)
    late.start()
    assert inside.wait(60.0)
    world.state = state  # type: ignore[method-assign]
    world.set([[7]])
    now[0] = 15.0
    assert watch().replicas_target.tolist() == [[7.0]]
    go.set()
    late.join(60.0)
    assert watch.last.replicas_target.tolist() == [[7.0]]
    assert watch.recent(1.0) is watch.last

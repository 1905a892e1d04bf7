"""Orders that are given while no process of a controller is there to hear them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from live_fakes import LiveWorld, burst, live_config, service_spec

from autoscaler.authority.controls import Controls, DownWatch, Mode
from autoscaler.controller import RecordsUnavailable
from autoscaler.hosting.service import LiveService
from policies.contract import Outcome, Reason


def killed(service: LiveService) -> None:
    """As by kill -9: nothing is handed back."""
    service.heartbeat.stop(release=False)
    service.database.close()


def said(decision: Any) -> tuple[str, list[str]]:
    return Outcome(int(decision.outcome[0])).name.lower(), Reason(int(decision.reasons[0])).words()


HELD: dict[str, tuple[Callable[[Controls], object], str, str]] = {
    "pause": (lambda controls: controls.set_mode(["chat"], Mode.PAUSED), "held", "paused"),
    "pause --all": (lambda controls: controls.kill(), "held", "kill_switch"),
    "mode advise": (lambda controls: controls.set_mode(["chat"], Mode.ADVISE), "advised", ""),
}


@pytest.mark.plays(
    "an order while its controller waits, restarts or starts",
    "it holds afterwards; `jevons down` ends whoever starts before it has seen the end",
)
@pytest.mark.parametrize("order", HELD)
def test_an_order_that_is_given_while_it_restarts_holds_afterwards(tmp_path: Path, order: str) -> None:
    give, outcome, reason = HELD[order]
    world = LiveWorld([service_spec()], [burst()])
    first = world.service(live_config(tmp_path))
    world.run(first, 3)
    killed(first)
    applied = len(world.targets)
    give(Controls(first.database))
    second = world.service(live_config(tmp_path))
    decisions = world.run(second, 3)
    assert {said(decision)[0] for decision in decisions} == {outcome}
    assert all(reason in said(decision)[1] for decision in decisions if reason)
    assert len(world.targets) == applied
    second.close()


def test_resume_that_is_given_while_it_restarts_ends_the_hold_of_an_edit(tmp_path: Path) -> None:
    world = LiveWorld([service_spec()], [burst(peak_rps=4.0)])
    first = world.service(live_config(tmp_path))
    world.run(first, 5)
    world.set([[9]])
    assert "foreign_edit" in said(world.run(first, 2)[-1])[1]
    killed(first)
    Controls(first.database).resume(["chat"], Mode.ACT)
    second = world.service(live_config(tmp_path))
    assert "foreign_edit" not in said(world.run(second, 1)[-1])[1]
    second.close()


@pytest.mark.plays("an order while its controller waits, restarts or starts")
@pytest.mark.parametrize("done", [False, True], ids=["while down waits", "after down has seen the end"])
def test_down_reaches_whoever_starts_until_it_has_seen_the_end(tmp_path: Path, done: bool) -> None:
    world = LiveWorld([service_spec()], [burst()])
    first = world.service(live_config(tmp_path, name="test"))
    world.run(first, 2)
    killed(first)
    controls = Controls(first.database)
    ordered_s = controls.end("test")
    if done:
        controls.ended("test", ordered_s)
    second = world.service(live_config(tmp_path, name="test"))
    assert (world.run(second, 1)[0] is None, world.stopped) == (not done, not done)
    second.close()


def test_a_loop_that_is_begun_again_hears_what_was_ordered_while_it_was_made(tmp_path: Path) -> None:
    """What one run has heard counts for all of its loops."""
    world = LiveWorld([service_spec()], [burst()])
    config, down = live_config(tmp_path, name="test"), DownWatch("test")
    first = LiveService(config, source=world, actuator=world, clock=world, down=down)
    world.watch = first.state
    first.start()
    world.run(first, 2)
    killed(first)
    controls = Controls(first.database)
    second = LiveService(config, source=world, actuator=world, clock=world, down=down)
    controls.ended("test", controls.end("test"))  # the loop was not there to be seen
    second.start()
    assert (second.step(), world.stopped) == (None, True)
    second.close()


def test_nothing_is_done_before_the_orders_were_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may say that it is paused; leases alone, as Kubernetes keeps them, say nothing of that."""
    world = LiveWorld([service_spec()], [burst()])
    config = live_config(tmp_path)
    service = LiveService(config, source=world, actuator=world, clock=world)
    world.watch = service.state
    read = Controls.read

    def away(self: Controls) -> Any:
        raise RecordsUnavailable("the database: no route")

    monkeypatch.setattr(Controls, "read", away)
    service.start()
    service.heartbeat.stop(release=False)
    assert (service.heartbeat.pulse.tokens.tolist(), world.run(service, 2)) == ([1], [None, None])
    assert "the database: no route" in service.problems()
    monkeypatch.setattr(Controls, "read", read)
    service.heartbeat.beat()
    assert world.run(service, 1)[0] is not None
    service.close()


def test_a_mode_that_nobody_here_knows_forbids_its_service_and_no_other(tmp_path: Path) -> None:
    """A row of a later release, or one written by hand."""
    specs = [service_spec("a"), service_spec("b")]
    world = LiveWorld(specs, [burst(seed=seed) for seed in range(2)])
    service = world.service(live_config(tmp_path, *specs))
    controls = Controls(service.database)
    controls._write({"a": "gently", "<a": "gently"})
    assert controls.read().modes == {"a": Mode.PAUSED}
    service.heartbeat.beat()
    decision = world.run(service, 1)[0]
    assert (decision.outcome == Outcome.HELD).tolist() == [True, False]
    service.close()

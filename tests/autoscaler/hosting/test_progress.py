"""A loop that stands still: its process ends with the cause, its lease lapses, its probes say so."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from live_fakes import LiveWorld, burst, live_config, service_spec

from autoscaler.authority.leases import NOT_HELD
from autoscaler.hosting.progress import Progress
from autoscaler.hosting.service import LiveService

STALLED = Path(__file__).with_name("stalled_controller.py")
ROOT = Path(__file__).parents[3]


@pytest.mark.plays(
    "a loop that stands still, also in native code that holds Python's lock",
    "the process ends with the stacks; its lease lapses, a successor goes on with its memory",
)
@pytest.mark.parametrize("how", ["native", "waiting"])
def test_a_process_whose_loop_stands_still_ends_and_its_successor_takes_over(tmp_path: Path, how: str) -> None:
    """Also where native code never gives the interpreter lock back, so that no Python thread can do anything."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "autoscaler")])
    ended = subprocess.run(
        [sys.executable, STALLED, tmp_path, how],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 1, ended.stderr
    assert "Timeout" in ended.stderr
    assert "in stand_still" in ended.stderr  # the stack of the thread that stands still
    world = LiveWorld([service_spec()], [burst()])
    successor = world.service(live_config(tmp_path))
    assert successor.heartbeat.pulse.tokens.tolist() == [2]
    assert world.run(successor, 1)[0] is not None
    successor.close()


def stood(progress: Progress, seconds: float) -> None:
    """As if the last tick had come to its end so long ago."""
    now = progress._now
    progress._now = lambda: now() + seconds


def test_leases_are_renewed_only_while_ticks_come_to_their_end(tmp_path: Path) -> None:
    world = LiveWorld([service_spec()], [burst()])
    service = world.service(live_config(tmp_path))
    world.run(service, 2)
    renewed = []
    renew = service.leases.renew
    service.leases.renew = lambda: renewed.append(1) or renew()  # type: ignore[method-assign,func-returns-value]
    service.heartbeat.beat()
    assert renewed == [1]
    stood(service.progress, service.config.stall_s + 1.0)
    service.heartbeat.beat()
    assert renewed == [1]
    assert "leases are not renewed" in service.heartbeat.pulse.problem
    world.run(service, 1)
    service.heartbeat.beat()
    assert renewed == [1, 1]
    assert service.heartbeat.pulse.problem == ""
    service.close()


def broken() -> None:
    raise KeyError("result")


def ticked(service: LiveService) -> None:
    """As the loop does it."""
    try:
        service.step()
    except Exception as error:
        service._failed(error)


@pytest.mark.plays(
    "a loop whose every tick fails", "it hands its leases back, named; a standby goes on with its memory"
)
def test_a_loop_whose_every_tick_fails_leaves_its_services_to_one_that_works(tmp_path: Path) -> None:
    world = LiveWorld([service_spec()], [burst()])
    second = LiveService(live_config(tmp_path), source=world, actuator=world, clock=world)
    second.leases.holder = "elsewhere/1/1/1"  # type: ignore[attr-defined]
    first = world.service(live_config(tmp_path))
    second.start()
    world.run(first, 3)
    first.lifecycle.before_tick = broken  # type: ignore[method-assign]
    ticked(first)
    first.heartbeat.beat()
    assert (first.heartbeat.pulse.tokens.tolist(), first.doing) == ([1], "fails")
    stood(first.progress, first.config.stall_s + 1.0)
    ticked(first)
    first.heartbeat.beat()
    assert first.heartbeat.pulse.tokens.tolist() == [NOT_HELD]
    problem = first.heartbeat.pulse.problem
    assert problem.startswith("no tick has been completed for ")
    assert problem.endswith(" s (KeyError: 'result'): leases are left to others for 45 s")
    world.watch = second.state
    second.heartbeat.beat()
    assert second.heartbeat.pulse.tokens.tolist() == [2]
    assert world.run(second, 1)[0] is not None
    ticked(first)
    assert (first.doing, problem in first.problems()) == ("stands by", True)
    now = first.heartbeat._now
    first.heartbeat._now = lambda: now() + 46.0
    first.heartbeat.beat()
    assert (first.heartbeat.pulse.tokens.tolist(), first.heartbeat.pulse.problem) == ([NOT_HELD], "")
    second.close()
    first.close()


def test_a_loop_that_fails_and_has_no_standby_tries_again_and_goes_on(tmp_path: Path) -> None:
    world = LiveWorld([service_spec()], [burst()])
    service = world.service(live_config(tmp_path))
    world.run(service, 2)
    good = service.lifecycle.before_tick
    service.lifecycle.before_tick = broken  # type: ignore[method-assign]
    stood(service.progress, service.config.stall_s + 1.0)
    ticked(service)
    ticked(service)
    assert service.doing == "stands by"
    now = service.heartbeat._now
    service.heartbeat._now = lambda: now() + 46.0
    service.heartbeat.beat()
    assert service.heartbeat.pulse.tokens.tolist() == [2]
    ticked(service)  # fails again, and keeps what it has for as long as before
    service.heartbeat.beat()
    assert service.heartbeat.pulse.tokens.tolist() == [2]
    service.lifecycle.before_tick = good  # type: ignore[method-assign]
    assert world.run(service, 1)[0] is not None
    assert service.problems() == []
    service.close()


def asked(service: LiveService, path: str) -> tuple[int, str]:
    url = f"http://127.0.0.1:{service.metrics_port}{path}"
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_health_and_readiness_hang_on_ticks(tmp_path: Path) -> None:
    world = LiveWorld([service_spec()], [burst()])
    service = world.service(live_config(tmp_path, exposition={"port": 0}))
    assert asked(service, "/healthz") == (200, "ok\n")
    assert asked(service, "/readyz") == (503, "no tick has come to its end yet\n")
    world.run(service, 1)
    assert asked(service, "/readyz") == (200, "ok\n")
    code, text = asked(service, "/metrics")
    assert code == 200
    assert "jevons_decisions_total" in text
    stood(service.progress, service.config.stall_s + 1.0)
    for path in ("/healthz", "/readyz"):
        code, text = asked(service, path)
        assert code == 503
        assert text.startswith("no tick has come to its end for ")
    assert asked(service, "/metrics")[0] == 200
    assert asked(service, "/other")[0] == 404
    service.close()


def test_a_standby_is_healthy_and_ready(tmp_path: Path) -> None:
    world = LiveWorld([service_spec()], [burst()])
    first = world.service(live_config(tmp_path))
    second = LiveService(live_config(tmp_path, exposition={"port": 0}), source=world, actuator=world, clock=world)
    second.leases.holder = "elsewhere/1/1/1"  # type: ignore[attr-defined]
    second.start()
    assert second.step() is None
    assert asked(second, "/readyz") == (200, "ok\n")
    second.close()
    first.close()

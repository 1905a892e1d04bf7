"""The controller as Ray actors: kill -9 of the actor and of the head, status, and an orderly end.

Without Prometheus: every decision is held, which is all that these tests need to see that the controller lives.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from servers import wait_until

from autoscaler.hosting.config import load_live_config
from autoscaler.records.database import CONTROLLERS, DECISIONS, LEASES, Database
from autoscaler.records.ticks import read_ticks
from policies.spec import shipped_configs

pytestmark = [pytest.mark.ray, pytest.mark.timeout(580)]
JEVONS = (sys.executable, "-c", "from training.commands.main import app; app()")
START_S = 270.0


class Running:
    """`jevons run` in a process of its own."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder, self.options = folder, options
        spec = yaml.safe_load((shipped_configs() / "live" / "services" / "chat.yaml").read_text())
        spec["interface"] = {"window": {"control_interval_s": 1.0, "metrics_delay_s": 0.5}}
        data = {
            "name": "test",
            "services": [spec],
            "metrics": {"url": "http://127.0.0.1:9", "timeout_s": 0.2, "deadline_s": 0.4},
            "actuator": {"kind": "metric_only"},
            "policy": {"reference": "token-demand"},
            "exposition": {"port": None},
            "lease": {"duration_s": 20.0},
        }
        self.config = folder / "live.yaml"
        self.config.write_text(yaml.safe_dump(data))
        self.log = (folder / "run.log").open("w")
        self.environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_enable_worker_prestart": "0"}
        self.process = self.start()
        self.database = Database(load_live_config(self.config).located(folder).database_url)
        self.database.create()

    def start(self) -> subprocess.Popen[bytes]:
        command = [*JEVONS, "run", *self.options, "--config", str(self.config)]
        return subprocess.Popen(
            command, cwd=self.folder, stdout=self.log, stderr=self.log, env=self.environment, start_new_session=True
        )

    def ticks(self) -> int:
        return len(read_ticks(self.database))

    def controllers(self) -> list[Any]:
        with self.database.begin() as connection:
            return list(connection.execute(CONTROLLERS.select().order_by(CONTROLLERS.c.beat_s)).all())

    def token(self) -> int:
        with self.database.begin() as connection:
            return int(connection.execute(LEASES.select()).one().token)

    def pid(self) -> int:
        """Of the worker that hosts the actor now."""
        return int(self.controllers()[-1].pid)

    def jevons(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [*JEVONS, *words, "--config", str(self.config)]
        return subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=120, check=False)

    def goes_on(self, what: str) -> float:
        """Seconds until the next tick is concluded."""
        before, began_s = self.ticks(), time.monotonic()
        wait_until(lambda: self.ticks() > before + 1, what, limit_s=START_S, pause_s=0.1)
        return time.monotonic() - began_s


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    made = Running(tmp_path)
    yield made
    if made.process.poll() is None:
        made.process.terminate()
        made.process.wait(90)
    made.log.close()


def test_the_controller_outlives_kill_9_of_its_actor_and_of_the_head(running: Running) -> None:
    wait_until(lambda: running.ticks() >= 2, "the first ticks", limit_s=START_S, pause_s=0.5)
    assert running.token() == 1

    first = running.pid()
    os.kill(first, signal.SIGKILL)
    seconds = running.goes_on("the actor is back")
    assert running.pid() != first
    assert running.token() == 2
    print(f"takeover after kill -9 of the actor: {seconds:.1f} s")

    second = running.pid()
    # The head is Ray's control store and the raylet of its node; the actor's worker dies with the latter.
    session, began_s = _session(second), time.monotonic()
    for name in ("gcs_server", "raylet"):
        found = subprocess.run(["pgrep", "-f", f"/{name} .*{session}"], capture_output=True, text=True, check=False)
        for pid in found.stdout.split():
            os.kill(int(pid), signal.SIGKILL)
    wait_until(lambda: running.pid() not in {first, second}, "the head is back", limit_s=START_S, pause_s=0.2)
    seconds = time.monotonic() - began_s
    print(f"takeover after kill -9 of the head: {seconds:.1f} s")
    running.goes_on("ticks after the head is back")
    assert running.token() == 3

    # Nothing was lost: every tick is there once, in order, and says why it was held.
    with running.database.begin() as connection:
        rows = connection.execute(DECISIONS.select().order_by(DECISIONS.c.tick)).all()
    assert [row.token for row in rows] == sorted(row.token for row in rows)
    assert {row.outcome for row in rows} <= {"held", "pending"}

    found = json.loads(running.jevons("status", "--json").stdout)
    assert found["controllers"][0]["doing"] == "acts"
    assert running.jevons("down").returncode == 0
    assert running.process.wait(120) == 0


def test_a_process_without_ray_is_succeeded_after_kill_9_and_ends_in_order(tmp_path: Path) -> None:
    running = Running(tmp_path, "--no-ray")
    try:
        wait_until(lambda: running.ticks() >= 2, "the first ticks", limit_s=START_S, pause_s=0.5)
        running.process.kill()
        running.process.wait(30)
        running.process = running.start()
        print(f"takeover after kill -9 of the process: {running.goes_on('the next process'):.1f} s")
        assert running.token() == 2
        assert running.jevons("down").returncode == 0
        assert running.process.wait(60) == 0
    finally:
        if running.process.poll() is None:
            running.process.kill()
        running.log.close()


def _session(pid: int) -> str:
    """Name of the Ray session that a worker belongs to."""
    words = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    command = Path(f"/proc/{pid}/cmdline").read_bytes().decode().replace("\0", " ")
    for word in (*words, *command.split()):
        if "session_2" in word:
            return "session_" + word.split("session_", 1)[1].split("/")[0]
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return _session(parent)

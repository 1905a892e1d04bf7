"""The controller as Ray actors: kill -9 of the actor and of the head, status, and an orderly end.

Without Prometheus: every decision is held, which is all that these tests need to see that the controller lives.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from servers import free_port, wait_until

from autoscaler.hosting.config import load_live_config
from autoscaler.records.database import CONTROLLERS, DECISIONS, LEASES, Database
from autoscaler.records.ticks import read_ticks
from policies.spec import shipped_configs

pytestmark = [pytest.mark.ray, pytest.mark.timeout(580)]
JEVONS = (sys.executable, "-c", "from training.commands.main import app; app()")
LOOPBACK = ("127.", "[::ffff:127.")
START_S = 270.0
INTERVAL_S = 15.0
"""Of a controller, by default."""


class Running:
    """`jevons run` in a process of its own."""

    def __init__(
        self,
        folder: Path,
        *options: str,
        interval_s: float = 1.0,
        environment: Mapping[str, str] | None = None,
        **changes: Any,
    ) -> None:
        self.folder, self.options = folder, options
        spec = yaml.safe_load((shipped_configs() / "live" / "services" / "chat.yaml").read_text())
        spec["interface"] = {"window": {"control_interval_s": interval_s, "metrics_delay_s": 0.5}}
        data = {
            "name": "test",
            "services": [spec],
            "metrics": {"url": "http://127.0.0.1:9", "timeout_s": 0.2, "deadline_s": 0.4},
            "actuator": {"kind": "metric_only"},
            "policy": {"reference": "token-demand"},
            "exposition": {"port": None},
            "lease": {"duration_s": 20.0},
            **changes,
        }
        self.config = folder / "live.yaml"
        self.config.write_text(yaml.safe_dump(data))
        self.log = (folder / "run.log").open("w")
        self.environment = dict(environment or {**os.environ, "RAY_AUTH_MODE": "disabled"})
        self.environment |= {"RAY_enable_worker_prestart": "0"}
        self.process = self.start()
        self.database = Database(load_live_config(self.config).located(folder).database_url)
        self.database.create()

    def start(self) -> subprocess.Popen[bytes]:
        command = [*JEVONS, "run", *self.options, "--config", str(self.config)]
        return subprocess.Popen(
            command, cwd=self.folder, stdout=self.log, stderr=self.log, env=self.environment, start_new_session=True
        )

    def said(self) -> str:
        """All that its terminal has shown."""
        return (self.folder / "run.log").read_text()

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(90)
        self.log.close()

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
        return next(
            int(row.pid) for row in reversed(self.controllers()) if row.status["doing"] in {"acts", "stands by"}
        )

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
    made.end()


@pytest.mark.plays(
    "`kill -9` of the actor, of Ray's head, of a process without Ray",
    "back in seconds with its memory; `jevons run` starts a new cluster for a dead head",
)
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


@pytest.mark.plays("`kill -9` of the actor, of Ray's head, of a process without Ray")
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


@dataclass
class Cluster:
    """A Ray cluster of one node on loopback that outlives whoever joins it, as `ray start --head` makes it."""

    folder: Path
    port: int
    token: str = "a-token-of-the-tests"

    @property
    def environment(self) -> dict[str, str]:
        """Of whoever joins it."""
        alone = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # all of it on loopback
        return {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, **alone}

    def start(self) -> None:
        command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--node-ip-address=127.0.0.1"]
        command += [f"--port={self.port}", f"--ray-client-server-port={free_port()}", f"--temp-dir={self.folder}"]
        command += [f"--dashboard-agent-listen-port={free_port()}", "--include-dashboard=false", "--num-cpus=2"]
        environment = {**self.environment, "JEVONS_TEST_CLUSTER": str(self.folder)}
        subprocess.run(
            [*command, "--disable-usage-stats"], env=environment, check=True, timeout=START_S, stdout=subprocess.DEVNULL
        )

    def kill(self) -> None:
        """As a lost machine ends: nobody is told."""
        for process in Path("/proc").iterdir():
            if process.name.isdigit():
                with suppress(OSError):
                    if f"JEVONS_TEST_CLUSTER={self.folder}\0".encode() in (process / "environ").read_bytes():
                        os.kill(int(process.name), signal.SIGKILL)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as folder:  # short: the path of a socket has a limit
        made = Cluster(Path(folder), free_port())
        made.start()
        yield made
        made.kill()


@pytest.mark.plays("the head of a joined Ray cluster dies", "said, waited for; back within two ticks of the next head")
def test_a_lost_head_is_said_and_the_controllers_are_back_within_two_ticks_of_the_next_one(
    cluster: Cluster, tmp_path: Path
) -> None:
    running = Running(
        tmp_path, interval_s=INTERVAL_S, environment=cluster.environment, ray={"address": f"127.0.0.1:{cluster.port}"}
    )
    try:
        wait_until(lambda: running.ticks() >= 1, "the first tick", limit_s=START_S, pause_s=0.5)
        cluster.kill()
        wait_until(lambda: "no Ray cluster answers at" in running.said(), "the loss is said", limit_s=60.0, pause_s=0.2)
        before = running.ticks()
        (row, *_) = json.loads(running.jevons("status", "--json").stdout)["controllers"]
        assert (row["doing"], "Ray" in row["problems"][0]) == ("waits", True)
        assert running.process.poll() is None
        cluster.start()
        began_s = time.monotonic()
        wait_until(lambda: running.ticks() > before, "the next tick", limit_s=START_S, pause_s=0.1)
        seconds = time.monotonic() - began_s
        print(f"back after the head is back: {seconds:.1f} s")
        assert seconds < 2 * INTERVAL_S
        assert running.jevons("down").returncode == 0
        assert running.process.wait(120) == 0
    finally:
        running.end()


@pytest.mark.plays("an order while its controller waits, restarts or starts")
def test_a_run_that_waits_for_its_cluster_is_in_the_status_and_hears_jevons_down(tmp_path: Path) -> None:
    running = Running(tmp_path, ray={"address": f"127.0.0.1:{free_port()}"})
    try:
        wait_until(lambda: "no Ray cluster answers at" in running.said(), "the wait is said", START_S, 0.2)
        (row,) = json.loads(running.jevons("status", "--json").stdout)["controllers"]
        assert (row["doing"], "no Ray cluster answers at" in row["problems"][0]) == ("waits", True)
        assert running.jevons("down").returncode == 0
        assert running.process.wait(60) == 0
        assert "test ends: `jevons down` by " in running.said()
    finally:
        running.end()


def test_a_detached_run_after_jevons_down_runs(cluster: Cluster, tmp_path: Path) -> None:
    """Of the one before an actor is still there that has ended, and nobody to remove it."""
    running = Running(
        tmp_path, "--detach", environment=cluster.environment, ray={"address": f"127.0.0.1:{cluster.port}"}
    )
    try:
        assert running.process.wait(START_S) == 0
        running.goes_on("the first run ticks")
        assert running.jevons("down").returncode == 0
        running.process = running.start()
        assert running.process.wait(START_S) == 0
        running.goes_on("the second run ticks")
        assert running.jevons("down").returncode == 0
    finally:
        running.end()


@pytest.mark.plays("a controller that cannot run", "one sentence in the terminal and in `status`, exit code 2")
@pytest.mark.parametrize("host", ["--ray", "--no-ray"])
def test_a_controller_that_cannot_run_ends_with_its_sentence(tmp_path: Path, host: str) -> None:
    running = Running(tmp_path, host, fallback="no-such-policy")
    try:
        assert running.process.wait(START_S) == 2
        assert "unknown policy 'no-such-policy'" in running.said()
        (row,) = json.loads(running.jevons("status", "--json").stdout)["controllers"]
        assert row["doing"] == "failed"
        assert "unknown policy 'no-such-policy'" in row["problems"][0]
    finally:
        running.end()


def test_a_cluster_that_is_started_here_listens_on_loopback_and_asks_for_its_token(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    running = Running(
        tmp_path, environment={**environment, "HOME": str(tmp_path)}, ray={"dashboard_port": (port := free_port())}
    )
    try:
        wait_until(lambda: running.ticks() >= 1, "the first tick", limit_s=START_S, pause_s=0.5)
        session = _session(running.pid())
        listening = _listening(session)
        assert listening  # somebody was found at all
        assert [address for address in listening if not address.startswith(LOOPBACK)] == []
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/api/version", timeout=10)
        assert refused.value.code == 401
        token = (tmp_path / ".ray" / "auth_token").read_text()
        headers = {"Authorization": f"Bearer {token}"}
        with urllib.request.urlopen(
            urllib.request.Request(f"http://127.0.0.1:{port}/api/version", headers=headers), timeout=10
        ) as answer:
            assert answer.status == 200
    finally:
        running.end()


def test_workers_on_a_cluster_that_is_started_for_them_are_on_loopback_with_a_token(tmp_path: Path) -> None:
    script = (
        "import os; from training.replaying.workers import open_workers\n"
        "with open_workers(1, 'local'):\n"
        "    import ray; session = ray.get_runtime_context().get_session_name()\n"
        "    print(os.environ['RAY_AUTH_MODE'], session, flush=True); input()\n"
    )
    # Without the environment of other tests.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    root = str(Path(__file__).resolve().parents[2])
    with subprocess.Popen(
        [sys.executable, "-c", script],
        env={**environment, "HOME": str(tmp_path)},
        cwd=root,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        mode, session = process.stdout.readline().split()
        listening = _listening(session)
        process.communicate("\n", timeout=60)
    assert mode == "token"
    assert listening
    assert [address for address in listening if not address.startswith(LOOPBACK)] == []


def _session(pid: int) -> str:
    """Name of the Ray session that a worker belongs to."""
    words = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    command = Path(f"/proc/{pid}/cmdline").read_bytes().decode().replace("\0", " ")
    for word in (*words, *command.split()):
        if "session_2" in word:
            return "session_" + word.split("session_", 1)[1].split("/")[0]
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return _session(parent)


def _listening(session: str) -> list[str]:
    """HOST:PORT of every socket on which a process of a Ray session listens."""
    found = subprocess.run(["pgrep", "-f", session], capture_output=True, text=True, check=True).stdout.split()
    found += [str(child) for pid in found for child in _children(int(pid))]
    table = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line.split()[3] for line in table if any(f"pid={pid}," in line for pid in found)]


def _children(pid: int) -> list[int]:
    """Processes below one, at any depth."""
    found = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return found + [grandchild for child in found for grandchild in _children(child)]

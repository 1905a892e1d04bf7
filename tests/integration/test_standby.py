"""Two controllers in processes of their own share a database: the second takes over, with orders and memory."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from fault_proxy import FaultProxy
from kube_objects import set_ready
from kube_server import KubeApiServer
from servers import Controller, Prometheus, wait_until
from test_faults import World, engine, load

from autoscaler.records.database import DECISIONS, Database
from policies.contract import Reason
from policies.secret_url import REVEALED

INTERVAL_S = 3.0
LEASE_S = 9.0
LONG_S = 120.0
REPLICAS = 3
"""What the leader scales up to."""


class Pair:
    """A leader and a standby with one configuration."""

    def __init__(self, world: World, url: str, folder: Path) -> None:
        self.world, self.folder = world, folder
        config = world.config(records={"url": url}, lease={"duration_s": LEASE_S}, name="pair")
        data = config.model_dump(mode="json", context=REVEALED)
        for service in data["services"]:
            service["guardrails"] |= {"scale_down_cooldown_s": 3600.0}
            # One step leads there: the replicas that the test then makes ready are those that there will be.
            service["pools"][0]["max_replicas"] = REPLICAS
            service["interface"]["window"] |= {"control_interval_s": INTERVAL_S, "metrics_delay_s": 1.0}
        self.config = folder / "pair.yaml"
        self.config.write_text(yaml.safe_dump(data))
        self.database = Database(url)
        self.database.create()
        self.processes: list[Controller] = []

    def start(self) -> Controller:
        name = self.config.with_name(f"pair{len(self.processes)}.yaml")
        name.write_text(self.config.read_text())
        made = Controller(self.folder, name, "--no-ray")
        self.processes.append(made)
        return made

    def rows(self) -> list[Any]:
        """Decisions for `chat`, the oldest first."""
        mine = DECISIONS.select().where(DECISIONS.c.service == self.world.chat).order_by(DECISIONS.c.tick)
        with self.database.begin() as connection:
            return list(connection.execute(mine).all())

    def doing(self) -> list[str]:
        found = json.loads(self.processes[-1].order("status", "--json"))
        return sorted(row["doing"] for row in found["controllers"])


@pytest.fixture
def pair(
    prometheus: Prometheus,
    faulty_prometheus: FaultProxy,
    kube: KubeApiServer,
    faulty_kube: tuple[FaultProxy, Path],
    tmp_path: Path,
    database_url: str,
) -> Iterator[Pair]:
    with ExitStack() as stack:
        world = World(prometheus, faulty_prometheus, kube, *faulty_kube, tmp_path, stack)
        made = Pair(world, database_url, tmp_path)
        yield made
        for process in made.processes:
            process.kill()
        made.database.close()


def scaled_and_calm(pair: Pair) -> None:
    """A leader that has scaled up to `REPLICAS` and now waits for its cooldown, and a standby."""
    pair.start()
    wait_until(lambda: len(pair.rows()) > 1, "the leader decides", LONG_S, 0.3)
    pair.start()
    wait_until(lambda: pair.doing() == ["acts", "stands by"], "the other one stands by", LONG_S, 0.5)
    world = pair.world
    pair.processes[0].order("mode", world.code, "advise")
    world.rise()
    wait_until(lambda: world.replicas(world.chat) == REPLICAS, "a scale-up", LONG_S, 0.3)
    load(world.engines[world.chat], 0.5, 1.0)
    targets = [(made.address, {"service": name}) for name, made in world.engines.items()]
    for _ in range(REPLICAS - 1):
        replica = engine(0.5, 1.0)
        world.stack.callback(replica.stop)
        targets.append((replica.address, {"service": world.chat}))
    world.prometheus.scrape(targets)
    world.prometheus.wait_scraped([address for address, _ in targets])
    set_ready(world.kube, world.chat, REPLICAS)
    ready = len(pair.rows())

    def waits() -> bool:
        return any(Reason.COOLDOWN in Reason(row.reasons) for row in pair.rows()[ready:])

    wait_until(waits, "the cooldown holds the scale-down", LONG_S, 0.5)


@pytest.mark.plays(
    "`kill -9` of the leader beside a standby",
    "the standby goes on with orders, cooldowns and targets, on SQLite and PostgreSQL",
)
def test_after_kill_9_of_the_leader_the_standby_goes_on_with_its_memory_and_its_orders(pair: Pair) -> None:
    scaled_and_calm(pair)
    killed = len(pair.rows())
    pair.processes[0].kill()
    began_s = time.monotonic()
    wait_until(lambda: pair.rows()[-1].token == 2, "the standby decides", LONG_S, 0.1)
    seconds = time.monotonic() - began_s
    print(f"takeover after kill -9: {seconds:.1f} s")
    wait_until(lambda: len(pair.rows()) > killed + 4, "some more ticks", LONG_S, 0.3)
    reasons = [Reason(row.reasons) for row in pair.rows() if row.token == 2]
    # Without memory the cooldown would be forgotten and the fleet shrink; without the target it would be an edit.
    assert any(Reason.COOLDOWN in one for one in reasons), [one.words() for one in reasons]
    assert not any(Reason.FOREIGN_EDIT in one for one in reasons)
    assert pair.world.replicas(pair.world.chat) == REPLICAS
    found = json.loads(pair.processes[-1].order("status", "--json"))
    assert {row["service"]: row["mode"] for row in found["services"]} == {
        pair.world.chat: "act",
        pair.world.code: "advise",
    }


@pytest.mark.plays("a leader that was frozen comes back", "it stands by; what it writes with its old token is refused")
def test_a_leader_that_was_frozen_and_comes_back_writes_nothing(pair: Pair) -> None:
    scaled_and_calm(pair)
    old = pair.processes[0].process
    old.send_signal(signal.SIGSTOP)
    wait_until(lambda: pair.rows()[-1].token == 2, "the standby decides", LONG_S, 0.1)
    ticks = len(pair.rows())
    old.send_signal(signal.SIGCONT)
    wait_until(lambda: len(pair.rows()) > ticks + 4, "some more ticks", LONG_S, 0.3)
    tokens = [row.token for row in pair.rows()]
    assert tokens == sorted(tokens)
    assert pair.doing() == ["acts", "stands by"]

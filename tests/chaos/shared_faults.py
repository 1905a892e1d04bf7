"""Faults that both worlds play in the same way: in the controller's database, in its bundle, in its bounds."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any, Protocol

from policies.lineup import SHIPPED_BUNDLE
from tests.chaos.schedule import Event
from tests.chaos.undoing import Undo, each

FULL = "CREATE TRIGGER full BEFORE INSERT ON ticks BEGIN SELECT RAISE(FAIL, 'database or disk is full'); END"
BUSY_S = 10.0


class Restartable(Protocol):
    """What a world has of its controller."""

    folder: Path
    bundle: str
    most: int
    largest: int

    def restart(self) -> None:
        """Begin the controller anew with what the world says now."""
        ...


def database(world: Restartable) -> Path:
    return world.folder / "jevons.db"


def tell(file: Path, statement: str, *values: Any) -> None:
    connection = sqlite3.connect(file, timeout=BUSY_S)
    connection.execute(statement, values)
    connection.commit()
    connection.close()


def lock(file: Path) -> Undo:
    other = sqlite3.connect(file, isolation_level=None, timeout=BUSY_S)
    other.execute("BEGIN EXCLUSIVE")
    return each(lambda: other.execute("ROLLBACK"), other.close)


def fill(file: Path) -> Undo:
    tell(file, FULL)
    return lambda: tell(file, "DROP TRIGGER full")


def take_leases(file: Path) -> None:
    tell(file, "UPDATE leases SET holder = ?, token = token + 1", "elsewhere/1/1/1")


def free_leases(file: Path) -> None:
    tell(file, "UPDATE leases SET holder = ''")


def bad_bundle(world: Restartable, event: Event) -> Undo:
    content = bytearray(SHIPPED_BUNDLE.read_bytes())
    content[int(event.value * len(content))] ^= 1
    bad = world.folder / "bad.zip"
    bad.write_bytes(content)
    world.bundle = str(bad)
    world.restart()

    def good() -> None:
        world.bundle = ""
        world.restart()

    return good


def lower_maximum(world: Restartable, most: int) -> Undo:
    world.most = most
    world.restart()

    def raise_again() -> None:
        world.most = world.largest
        world.restart()

    return raise_again

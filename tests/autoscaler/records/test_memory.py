"""Which saved state of a service counts, where several processes have written one."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
import sqlalchemy as sa

from autoscaler.records.database import STATE_FORMAT, STATES, Database, pack, pack_names, put
from autoscaler.records.memory import FINGERPRINT, TOKEN, Memory, bring_back, forget_others
from policies.contract import Ints


class Means:
    """One number per service."""

    def __init__(self, services: int) -> None:
        self.value = np.zeros((services, 1))

    def state(self) -> dict[str, npt.NDArray[np.float64]]:
        return {"value": self.value}

    def restore(self, arrays: dict[str, npt.NDArray[np.float64]]) -> None:
        self.value = arrays["value"]


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    made = Database(database_url)
    made.create()
    yield made
    made.close()


def save(database: Database, process: str, time_s: float, tokens: Ints | None, **values: float) -> None:
    arrays: dict[str, npt.NDArray[np.generic]] = {
        "means/value": np.array([[value] for value in values.values()]),
        FINGERPRINT: np.array(["p"] * len(values)),
    }
    if tokens is not None:
        arrays[TOKEN] = tokens
    row = {"controller": process, "version": STATE_FORMAT, "time_s": time_s, "services": pack_names(tuple(values))}
    with database.begin() as connection:
        put(connection, STATES, {**row, "arrays": pack(arrays)})


def brought_back(database: Database) -> list[float]:
    """Of services a and b."""
    means = Means(2)
    found = bring_back(database, Memory({"means": means}, ["p", "p"]), ["a", "b"], np.ones(2, bool))
    assert (found.restored.tolist(), found.damaged) == ([True, True], {})
    return means.value[:, 0].tolist()


def test_the_newest_token_counts_whatever_the_clocks_say(database: Database) -> None:
    save(database, "x 1", 1000.0, np.array([1, 1]), a=1.0, b=2.0)
    save(database, "x 2", 900.0, np.array([2]), b=9.0)  # took b over; its clock is behind
    assert brought_back(database) == [1.0, 9.0]


def test_of_one_token_the_latest_counts_and_a_state_without_tokens_is_the_oldest(database: Database) -> None:
    save(database, "x", 5000.0, None, a=7.0, b=7.0)  # of an earlier release
    assert brought_back(database) == [7.0, 7.0]
    save(database, "x 1", 1000.0, np.array([3, 3]), a=1.0, b=2.0)
    save(database, "x 2", 1010.0, np.array([3]), a=5.0)
    assert brought_back(database) == [5.0, 2.0]


def change(database: Database, process: str, **values: object) -> None:
    with database.begin() as connection:
        connection.execute(sa.update(STATES).where(STATES.c.controller == process).values(**values))


DAMAGES = {
    "its archive": ({"arrays": b"damaged"}, "a stored archive is damaged"),
    "its names": ({"services": b"damaged"}, "stored names are damaged"),
    "its rows": ({"services": pack_names(("a", "c", "d"))}, "its rows are not those of its services"),
    "another format": ({"version": STATE_FORMAT + 1}, f"it was written in format {STATE_FORMAT + 1}"),
}


@pytest.mark.plays(
    "a damaged memory of a service", "set aside and named; it starts from the fleet as it is, the others go on"
)
@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_state_is_set_aside_and_stands_in_nobodys_way(database: Database, what: str) -> None:
    damage, words = DAMAGES[what]
    save(database, "x", 1000.0, np.array([1]), b=2.0)
    save(database, "y", 1000.0, np.array([1, 1]), a=1.0, c=3.0)
    change(database, "y", **damage)
    means = Means(2)
    found = bring_back(database, Memory({"means": means}, ["p", "p"]), ["a", "b"], np.ones(2, bool))
    assert (found.restored.tolist(), means.value[:, 0].tolist()) == ([False, True], [0.0, 2.0])
    assert set(found.damaged) == ({"a", "b"} if what == "its names" else {"a"})  # whose is it, without names?
    assert all(why.startswith(words) for why in found.damaged.values())
    # Who leads neither of its services has nothing to do with it.
    if what != "its names":
        alone = bring_back(database, Memory({"means": Means(1)}, ["p"]), ["b"], np.ones(1, bool))
        assert (alone.restored.tolist(), alone.damaged) == ([True], {})


def test_an_older_state_is_brought_back_and_the_damage_said(database: Database) -> None:
    save(database, "x 1", 1000.0, np.array([1]), a=1.0)
    save(database, "x 2", 1010.0, np.array([2]), a=9.0)
    change(database, "x 2", arrays=b"damaged")
    means = Means(1)
    found = bring_back(database, Memory({"means": means}, ["p"]), ["a"], np.ones(1, bool))
    assert (found.restored.tolist(), means.value.tolist(), set(found.damaged)) == ([True], [[1.0]], {"a"})


def test_values_of_another_kind_under_the_same_name_are_left_out(database: Database) -> None:
    save(database, "x", 1000.0, np.array([1]), a=1.0)
    arrays = {"means/value": np.array([["seven"]]), FINGERPRINT: np.array(["p"]), TOKEN: np.array([1])}
    change(database, "x", arrays=pack(arrays))
    means = Means(1)
    found = bring_back(database, Memory({"means": means}, ["p"]), ["a"], np.ones(1, bool))
    assert (found.restored.tolist(), means.value.tolist()) == ([True], [[0.0]])


def test_a_state_that_does_not_say_whose_it_is_goes_with_the_next_sweep(database: Database) -> None:
    save(database, "x", 1000.0, np.array([1]), b=9.0)
    save(database, "y", 1000.0, np.array([1]), a=1.0)
    change(database, "y", services=b"damaged")
    with database.begin() as connection:
        forget_others(connection, "z", {"c"})
        assert connection.execute(sa.select(STATES.c.controller)).scalars().all() == ["x"]


def test_states_of_others_go_once_all_of_their_services_are_led_here(database: Database) -> None:
    save(database, "x 1", 1000.0, np.array([1, 1]), a=1.0, b=2.0)
    save(database, "x 2", 1000.0, np.array([2]), b=9.0)
    for led, left in (({"b"}, ["x 1", "x 2"]), ({"a", "b"}, ["x 2"])):
        with database.begin() as connection:
            forget_others(connection, "x 2", led)
            rows = connection.execute(sa.select(STATES.c.controller).order_by(STATES.c.controller)).scalars().all()
        assert rows == left

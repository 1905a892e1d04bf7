"""Who is an owner of a count, and who only edits it now and then."""

from __future__ import annotations

import numpy as np

from autoscaler.authority.foreign_edits import ForeignEdits

TICK_S, REVERT_S, NO_ORDER = 15.0, 300.0, np.zeros(1)


class Count:
    """One service's count: here it is changed every minute, whatever the load does."""

    def __init__(self) -> None:
        self.edits = ForeignEdits(np.ones((1, 1), bool), hold_s=60.0, revert_s=REVERT_S)
        self.replicas, self.now_s, self.ticks = 2, 0.0, 0

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds / TICK_S)):
            self.look()
            if self.ticks % 4 == 0 and not self.edits.standing(self.now_s, NO_ORDER)[0]:
                self.write(5 + self.ticks // 4 % 2)

    def look(self) -> None:
        self.ticks += 1
        self.now_s += TICK_S
        self.edits.look(np.array([[self.replicas]], float), self.now_s, NO_ORDER)

    def write(self, replicas: int) -> None:
        before, after = np.array([[self.replicas]], float), np.array([[replicas]])
        self.replicas = replicas
        done = np.ones(1, bool)
        self.edits.carried_out(after, before, after.astype(float), done, ~done, self.now_s)

    def owned(self) -> bool:
        return bool(self.edits.reverted(NO_ORDER)[0])


def test_edits_hours_apart_make_no_owner_however_often_ours_changes() -> None:
    count = Count()
    for _ in range(4):
        count.run(7200.0)
        count.replicas = 4
        count.run(120.0)
        assert not count.owned()


def test_who_puts_back_what_is_written_every_minute_is_an_owner_the_second_time() -> None:
    """Such as a synchronisation every two minutes: between two of them ours stand for less than `revert_s`."""
    count = Count()
    found = []
    for _ in range(2):
        count.run(180.0)
        count.replicas = 4
        count.run(30.0)
        found.append(count.owned())
    assert found == [False, True]


def test_ours_that_are_what_somebody_set_prove_nothing() -> None:
    count = Count()
    count.run(180.0)
    count.replicas = 4
    count.run(120.0)
    count.write(4)
    for _ in range(40):
        count.look()
    count.write(5)
    count.look()
    count.replicas = 4
    count.look()
    assert count.owned()

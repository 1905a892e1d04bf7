from itertools import pairwise

import pytest

from tests.chaos.kinds import KINDS
from tests.chaos.real_world import PLAYS as REAL
from tests.chaos.schedule import Event, Schedule, draw, shrunk
from tests.chaos.virtual_world import PLAYS as VIRTUAL


def test_every_kind_is_played_somewhere_and_nothing_else_is() -> None:
    assert set(KINDS) == set(VIRTUAL) | set(REAL)


@pytest.mark.parametrize("seed", range(20))
def test_a_seed_draws_the_same_storms_again_with_a_calm_after_each(seed: int) -> None:
    drawn = draw(seed, 2000, sorted(KINDS), 2)
    assert drawn == draw(seed, 2000, sorted(KINDS), 2)
    assert drawn != draw(seed + 1, 2000, sorted(KINDS), 2)
    assert len(drawn.events) > 50
    assert max(event.end for event in drawn.events) < 2000
    for row in (0, 1):
        troubled = [drawn.trouble(tick, row, 0) for tick in range(2000)]
        changes = [tick for tick, (before, now) in enumerate(pairwise(troubled)) if before != now]
        assert len(changes) > 10
    calm = [not (drawn.trouble(tick, 0, 2) or drawn.trouble(tick, 1, 2)) for tick in range(2000)]
    assert sum(calm) > 400


def test_storms_hold_several_faults_at_once_but_none_that_would_end_another() -> None:
    together = set()
    for seed in range(30):
        events = draw(seed, 2000, sorted(KINDS), 2).events
        for one in events:
            for other in events:
                if one is not other and one.at <= other.at < max(one.end, one.at + 1):
                    together.add((one.kind, other.kind))
                    assert one.kind != other.kind
                    assert not KINDS[one.kind].slot or KINDS[one.kind].slot != KINDS[other.kind].slot
                    assert {KINDS[one.kind].database, KINDS[other.kind].database} != {"blocks", "needs"}
    assert len(together) > 200


def test_trouble_ends_with_what_follows_from_the_whole_storm() -> None:
    """An edit that nobody could see is held from when somebody can."""
    storm = Schedule(0, 100, (Event("foreign edit", 0, 10, 0, 0.5), Event("metrics down", -1, 9, 12, 0.5)))
    after = KINDS["foreign edit"].after_ticks
    assert [storm.trouble(tick, 0, 2) for tick in (8, 9, 21 + after + 1, 21 + after + 2)] == [False, True, True, False]
    assert storm.trouble(22, 1, 2)
    assert not storm.trouble(23, 1, 2)


def test_a_failure_is_shrunk_to_the_faults_that_it_needs() -> None:
    drawn = draw(3, 1000, sorted(KINDS), 2)
    needed = {drawn.events[4], drawn.events[9]}
    assert set(shrunk(drawn, lambda smaller: needed <= set(smaller.events)).events) == needed

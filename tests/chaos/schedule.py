"""Which faults happen when: drawn by seed, printed where an invariant fails, replayed exactly, shrunk one by one.

This module must not know how a fault is played.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tests.chaos.kinds import KINDS

CALM_TICKS = 14
"""Between two storms, so that a recovery can be seen."""


@dataclass(frozen=True)
class Event:
    """One fault.

    Attributes:
        kind: name in `KINDS`.
        row: the service that suffers; -1 stands for all.
        at: tick before which it begins.
        ticks: how many ticks it lasts; 0 is over at once.
        value: 0 to 1, what the fault makes of it.
    """

    kind: str
    row: int
    at: int
    ticks: int
    value: float

    @property
    def end(self) -> int:
        """First tick without it."""
        return self.at + self.ticks

    def concerns(self, row: int) -> bool:
        """Whether a service suffers."""
        return self.row in (-1, row)

    def __str__(self) -> str:
        where = "" if self.row < 0 else f" service {self.row}"
        return f"tick {self.at:5d} for {self.ticks:2d}: {self.kind}{where} ({self.value:.3f})"


@dataclass(frozen=True)
class Schedule:
    """The faults of one run.

    Attributes:
        seed: it was drawn from, and the world's traffic is.
        ticks: length of the run.
        events: by time.
        start_ticks: how long a controller takes to start.
    """

    seed: int
    ticks: int
    events: tuple[Event, ...]
    start_ticks: int = 0

    def beginning(self, tick: int) -> list[Event]:
        """What begins before a tick."""
        return [event for event in self.events if event.at == tick]

    def trouble(self, tick: int, row: int, grace: int) -> bool:
        """Whether a service may still suffer at a tick: a storm, what follows from its faults, and `grace` ticks more.

        What follows begins when the whole storm is over: an edit is found when somebody can read again.
        """
        storm: list[Event] = []
        for event in self.events:
            if event.at <= tick and event.concerns(row):
                if storm and event.at > self.over_at(storm):
                    storm = []
                storm.append(event)
        return bool(storm) and tick < self.over_at(storm) + grace

    def over_at(self, storm: Sequence[Event]) -> int:
        """First tick after a storm and all that follows from its faults."""
        kinds = [KINDS[event.kind] for event in storm]
        starts = self.start_ticks * any(kind.restarts for kind in kinds)
        return max(event.end for event in storm) + max(kind.after_ticks for kind in kinds) + starts

    def __str__(self) -> str:
        return "\n".join([f"seed {self.seed}, {self.ticks} ticks", *map(str, self.events)])


def draw(
    seed: int, ticks: int, playable: Sequence[str], services: int, most: int = 4, start_ticks: int = 0
) -> Schedule:
    """Storms of one to `most` faults that overlap, with a calm after each.

    Args:
        seed: decides everything.
        ticks: length of the run.
        playable: kinds that the world can play.
        services: rows that may suffer alone.
        most: faults in one storm.
        start_ticks: how long a controller takes to start.
    """
    rng, calm = random.Random(seed), Schedule(seed, ticks, (), start_ticks)
    weights = [KINDS[name].weight for name in playable]
    events: list[Event] = []
    tick = 10  # the controller first comes up
    while tick < ticks - CALM_TICKS:
        chosen: dict[str, Event] = {}
        for name in rng.choices(playable, weights, k=rng.randint(1, most)):
            kind = KINDS[name]
            row = rng.randrange(services) if kind.scope == "service" else -1
            # One of a kind at a time: the end of one must not end another.
            chosen[kind.slot or name] = Event(
                name, row, tick + rng.randint(0, 10), rng.randint(*kind.ticks), rng.random()
            )
        storm = list(chosen.values())
        if any(KINDS[event.kind].database == "blocks" for event in storm):
            storm = [event for event in storm if KINDS[event.kind].database != "needs"]
        storm = [event for event in storm if calm.over_at([event]) + CALM_TICKS < ticks]
        events += storm
        tick = (calm.over_at(storm) if storm else tick) + CALM_TICKS + rng.randint(0, 10)
    return replace(calm, events=tuple(sorted(events, key=lambda event: event.at)))


def shrunk(schedule: Schedule, fails: Callable[[Schedule], bool]) -> Schedule:
    """The same schedule with every fault left out that the failure does not need."""
    for event in reversed(schedule.events):
        smaller = replace(schedule, events=tuple(one for one in schedule.events if one is not event))
        if fails(smaller):
            schedule = smaller
    return schedule

"""What lives is told from what is gone by the times of samples; the real server's part is in `tests/integration`."""

from __future__ import annotations

import numpy as np
import pytest

from autoscaler.metrics.client import PrometheusConfig
from autoscaler.metrics.scrape_coverage import Coverage, Targets
from autoscaler.problem_texts import kind

WINDOW_S = 60.0
CONFIG = PrometheusConfig(url="http://localhost:9090")


class Scraped:
    """Targets that are scraped at every reading, and those that were."""

    def __init__(self, window_s: float = WINDOW_S) -> None:
        self.coverage = Coverage(["chat"], CONFIG, window_s)
        self.newest: dict[str, float] = {}

    def read(self, alive: set[str], now_s: float, live: float) -> tuple[bool, list[str]]:
        self.newest |= dict.fromkeys(alive, now_s)
        targets = Targets(
            [dict.fromkeys(self.newest, frozenset({"engines"}))], [dict(self.newest)], [dict.fromkeys(self.newest, 4.0)]
        )
        problems: list[str] = []
        counts = np.array([live])
        lost = self.coverage.lost(targets, np.array([1.0]), counts, now_s, np.array([False]), problems)
        return bool(lost[0]), problems


def test_a_rollout_leaves_its_old_replicas_behind_and_holds_nothing() -> None:
    """A new replica every tick; the old one's samples stay in the window."""
    scraped = Scraped()
    found = [scraped.read({f"r{tick}", f"r{tick + 1}"}, 15.0 * tick, live=2.0)[0] for tick in range(20)]
    assert not any(found)


def test_one_target_too_many_holds_once_half_a_window_has_shown_that_all_live() -> None:
    scraped = Scraped()
    found = [scraped.read({"r1", "r2", "r3"}, 15.0 * tick, live=2.0) for tick in range(4)]
    assert [lost for lost, _ in found] == [False, False, True, True]
    assert "chat: 3 targets are scraped for 2 replicas" in found[-1][1][0]


def test_a_scale_down_is_compared_with_what_there_was() -> None:
    scraped = Scraped()
    scraped.read({"r1", "r2", "r3"}, 0.0, live=3.0)
    assert not scraped.read({"r1", "r2", "r3"}, 30.0, live=2.0)[0]
    assert not scraped.read({"r1", "r2"}, 60.0, live=2.0)[0]


@pytest.mark.parametrize("live", [np.nan, 0.0])
def test_replicas_that_nobody_counts_are_never_too_few(live: float) -> None:
    scraped = Scraped()
    assert not any(scraped.read({"r1", "r2"}, 15.0 * tick, live)[0] for tick in range(6))


def test_a_clock_that_goes_back_begins_anew() -> None:
    scraped = Scraped()
    for now_s in (1000.0, 1030.0, 400.0):
        scraped.read({"r1"}, now_s, live=1.0)
    assert not scraped.read({"r1"}, 430.0, live=1.0)[0]


def test_a_service_of_which_nothing_is_scraped_is_named() -> None:
    assert Scraped().read(set(), 0.0, live=2.0)[1] == ["chat: no series of its replicas in the last 60 s"]


def partial(readings: list[tuple[float, float]]) -> list[bool]:
    """Whether one target is too few, at times with numbers of ready replicas."""
    coverage, found = Coverage(["chat"], CONFIG, WINDOW_S), []
    for now_s, ready in readings:
        targets = Targets([{"r1": frozenset({"engines"})}], [{"r1": now_s}], [{"r1": 4.0}])
        live, empty = np.array([np.nan]), np.array([False])
        found.append(bool(coverage.lost(targets, np.array([ready]), live, now_s, empty, [])[0]))
    return found


def test_a_count_that_could_not_be_read_once_hides_nothing() -> None:
    assert partial([(0.0, 4.0), (15.0, np.nan), (30.0, 4.0)]) == [True, True, True]
    assert partial([(0.0, np.nan)]) == [False]


def test_a_clock_that_went_back_leaves_no_reading_behind() -> None:
    assert partial([(1e6, 1.0), (0.0, 1.0), *((15.0 * tick, 4.0) for tick in range(1, 6))])[-1]


def test_of_many_duplicates_and_scrapers_the_first_are_named() -> None:
    scrapers = frozenset(f"tests r{number:04}" for number in range(5000))
    names = [f"r{number}" for number in range(9)]
    targets = Targets([dict.fromkeys(names, scrapers)], [{"r0": 0.0}], [dict.fromkeys(names, 4.0)])
    problems: list[str] = []
    none = np.array([False])
    Coverage(["chat"], CONFIG, WINDOW_S).lost(targets, np.array([9.0]), np.array([9.0]), 0.0, none, problems)
    who = "'tests r0000', 'tests r0001', 'tests r0002' and 4997 more"
    assert problems == [f"chat: 9 of 9 replicas are scraped twice, by {who}: r0, r1, r2 and 6 more"]


def scraped_every(
    scrape_s: float, window_s: float, tick_s: float, ready: float = 4.0, targets: int = 4
) -> list[tuple[bool, list[str]]]:
    """What ten readings say of replicas of which all scrapes go well, each at its own time."""
    coverage, found = Coverage(["chat"], CONFIG, window_s), []
    for tick in range(10):
        now_s = 1000.0 + tick_s * tick
        times = {
            f"r{one}": [
                at_s for at_s in np.arange(scrape_s * one / targets, now_s, scrape_s).tolist() if at_s > now_s - 300
            ]
            for one in range(targets)
        }
        samples = {one: sum(at_s > now_s - window_s for at_s in taken) for one, taken in times.items()}
        there = {one: float(count) for one, count in samples.items() if count}
        newest = {one: taken[-1] for one, taken in times.items()}
        scraped = Targets([dict.fromkeys(there, frozenset({"engines"}))], [newest], [there])
        problems: list[str] = []
        counts, empty = np.array([ready]), np.array([False])
        found.append((bool(coverage.lost(scraped, counts, counts, now_s, empty, problems)[0]), problems))
    return found


@pytest.mark.parametrize(
    ("scrape_s", "window_s", "tick_s"), [(30.0, 10.0, 10.0), (15.0, 15.0, 15.0), (55.0, 15.0, 5.0)]
)
@pytest.mark.parametrize("ready", [4.0, np.nan])
def test_a_window_that_is_too_short_for_the_scrapes_is_one_cause_at_every_reading(
    scrape_s: float, window_s: float, tick_s: float, ready: float
) -> None:
    found = scraped_every(scrape_s, window_s, tick_s, ready)
    later = found[4:]  # than the first window
    if not np.isnan(ready):
        assert all(lost for lost, _ in found)
        assert len({kind(one) for _, problems in later for one in problems}) == 1
        assert all(len(problems) == 1 for _, problems in found)
    for _, problems in later:
        for one in problems:
            assert one.startswith("chat: scraped too seldom, ")
            assert one.endswith(" s old: scrape more often, or set a longer metrics.window_s")


def test_of_a_window_that_now_and_then_holds_too_few_samples_it_is_said_all_the_time() -> None:
    found = scraped_every(scrape_s=11.0, window_s=15.0, tick_s=15.0, ready=1.0, targets=1)
    assert {lost for lost, _ in found} == {True, False}
    assert all(len(problems) == 1 for _, problems in found)


def test_a_window_that_holds_the_scrapes_says_nothing() -> None:
    assert scraped_every(scrape_s=5.0, window_s=15.0, tick_s=15.0) == [(False, [])] * 10

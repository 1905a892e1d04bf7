"""Decisions in the database: what is kept, for how long, and how one is told in words."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from live_fakes import LiveWorld, burst, live_config, quick, service_spec
from sqlalchemy import func, select, text

from autoscaler.controller import RecordsUnavailable
from autoscaler.hosting.service import LiveService
from autoscaler.records.database import DECISIONS, STATES, TICKS, Database
from autoscaler.records.explain import MEANINGS, explained, in_words
from autoscaler.records.replay import replay, summary
from autoscaler.records.ticks import read_outcome, read_ticks
from autoscaler.stages import Overdue, within
from policies.baselines.static import StaticPolicy
from policies.baselines.token_demand import TokenDemandPolicy
from policies.contract import Decision, Outcome, Reason
from policies.decider import Decider
from policies.fleet import Fleet
from policies.secret_url import Url
from policies.spec import ScalingSpec


@pytest.fixture(scope="module")
def recorded(
    tmp_path_factory: pytest.TempPathFactory, new_database: Callable[[], str]
) -> Iterator[tuple[LiveService, LiveWorld, list[object]]]:
    """Two services, 60 ticks with a burst, acted on by token demand."""
    folder = tmp_path_factory.mktemp("records")
    specs = [quick(service_spec(name)) for name in ("chat", "code")]
    world = LiveWorld(specs, [burst(), burst(seed=1)])
    changes = {"counterfactuals": ("hpa", "static:replicas=3"), "records": {"url": new_database()}}
    service = world.service(live_config(folder, *specs, **changes))
    yield service, world, list(world.run(service, 60))
    service.close()


def fresh(specs: tuple[ScalingSpec, ...]) -> tuple[Decider, Fleet]:
    fleet = Fleet.from_specs(specs)
    return Decider(fleet, specs[0].interface.window, specs[0].guardrails), fleet


def test_every_tick_is_kept_with_all_its_arrays(recorded: tuple[LiveService, LiveWorld, list[object]]) -> None:
    service, _, decisions = recorded
    ticks = read_ticks(service.database)
    assert len(ticks) == len(decisions) == 60
    for tick, decision in zip(ticks, decisions, strict=True):
        np.testing.assert_array_equal(tick.snapshot.running, decision.snapshot.running)  # type: ignore[attr-defined]
        np.testing.assert_array_equal(tick.target("settled").replicas, decision.settled.replicas)  # type: ignore[attr-defined]
        assert tick.services == ("chat", "code")
        assert tick.concluded
    with service.database.begin() as connection:
        assert connection.execute(select(func.count()).select_from(DECISIONS)).scalar() == 120
        assert connection.execute(select(func.count()).select_from(STATES)).scalar() == 1


def test_a_decision_is_told_in_words(recorded: tuple[LiveService, LiveWorld, list[object]]) -> None:
    service, _, _ = recorded
    tick = read_ticks(service.database, "chat", last=1)[0]
    outcome, reasons = read_outcome(service.database, tick.id, "chat")
    found = explained(tick, "chat", outcome, reasons, ["l40s"])
    assert set(found["counterfactuals"]) == {"hpa", "static:replicas=3"}
    assert found["counterfactuals"]["static:replicas=3"]["replicas"] == {"l40s": 3}
    assert found["cost"]["usd_per_hour"] > 0
    json.dumps(found)
    words = in_words(found)
    for expected in ("chat at 20", "Seen: ", "Pool l40s: ", "Proposed by the baseline", "Outcome: ", "hpa would have"):
        assert expected in words


def test_what_nobody_knew_is_told_as_unknown(recorded: tuple[LiveService, LiveWorld, list[object]]) -> None:
    """Without counts or load the arrays hold what rules made of nothing: sentinels, and targets from zero replicas."""
    service, _, _ = recorded
    tick = read_ticks(service.database, "chat", last=1)[0]
    in_force = tick.arrays["in_force"]
    lost = replace(tick, arrays={**tick.arrays, "in_force": np.full_like(in_force, -1)})
    words = in_words(explained(lost, "chat", "held", int(Reason.MISSING_METRICS), ["l40s"]))
    assert "starting, asked for unknown; demand" in words
    assert "Settled: unknown.\n" in words
    assert "hpa would have asked for unknown.\n" in words
    assert " -1" not in words
    assert "$" not in words
    blind = in_words(explained(tick, "chat", "held", int(Reason.MISSING_METRICS), ["l40s"]))
    assert f"Settled: l40s {in_force[0, 0]} replicas" in blind  # counts were known
    assert "hpa would have asked for unknown.\n" in blind
    assert "served as modelled" not in blind
    json.dumps(explained(lost, "chat", "held", int(Reason.MISSING_METRICS), ["l40s"]))


def test_what_was_missing_is_named(recorded: tuple[LiveService, LiveWorld, list[object]]) -> None:
    service, _, _ = recorded
    tick = read_ticks(service.database, "chat", last=1)[0]
    nothing = np.full_like(tick.snapshot.batch_cap, np.nan)
    lacking = replace(tick, arrays=tick.arrays | {"snapshot/batch_cap": nothing, "snapshot/kv_cache_usage": nothing})
    words = in_words(explained(lacking, "chat", "advised", int(Reason.PARTLY_BLIND), ["l40s"]))
    assert "partly_blind: some measurements were missing, so the baseline decided " in words
    assert "(missing: kv_cache_usage, batch_cap)." in words


@pytest.fixture
def two(tmp_path: Path) -> Iterator[tuple[LiveService, list[Decision]]]:
    """A service, and two decisions that it has not written yet."""
    world = LiveWorld([service_spec()], [burst()])
    service = world.service(live_config(tmp_path))
    made = world.run(service, 1)[0]
    yield service, [replace(made, snapshot=replace(made.snapshot)) for _ in range(2)]
    service.close()


def left_behind(work: Callable[[], None]) -> threading.Thread:
    with pytest.raises(Overdue) as late:
        within(0.05, "late", work)
    return late.value.thread


def test_a_conclusion_that_comes_late_is_no_other_decisions(two: tuple[LiveService, list[Decision]]) -> None:
    service, (first, second) = two
    records, gate = service.records, threading.Event()
    records.record(first)
    records._seconds = lambda: {"act": 1.0} if gate.wait(60.0) else {}
    late = left_behind(lambda: records.conclude(replace(first, outcome=np.array([Outcome.HELD]))))
    records._seconds = dict
    records.record(second)
    with service.database.begin() as connection:
        before = connection.execute(STATES.select()).all()
    gate.set()
    late.join()
    _, *ticks = read_ticks(service.database)
    assert [tick.concluded for tick in ticks] == [False, False]
    assert [read_outcome(service.database, tick.id, "chat")[0] for tick in ticks] == ["pending", "pending"]
    with service.database.begin() as connection:  # the memory of an earlier tick replaces no later one
        assert connection.execute(STATES.select()).all() == before
    for decision, concluded in ((first, [False, False]), (second, [False, True])):  # the second was written last
        records.conclude(decision)
        assert [tick.concluded for tick in read_ticks(service.database)[1:]] == concluded


def test_a_record_that_comes_late_is_taken_back(two: tuple[LiveService, list[Decision]]) -> None:
    """It was held as not recorded: nobody may believe that it was carried out."""
    service, (first, second) = two
    records, gate = service.records, threading.Event()
    records._version = lambda: "late" if gate.wait(60.0) else ""
    late = left_behind(lambda: records.record(first))
    records.conclude(first)
    gate.set()
    late.join()
    assert len(read_ticks(service.database)) == 1
    records.record(second)
    records.conclude(second)
    assert [tick.concluded for tick in read_ticks(service.database)] == [True, True]


def test_every_reason_has_words() -> None:
    assert set(MEANINGS) == {reason for reason in Reason if reason}


def test_the_modelled_cost_of_a_peer_is_its_replicas_times_their_price(
    recorded: tuple[LiveService, LiveWorld, list[object]],
) -> None:
    service, _, _ = recorded
    spec = service.config.services[0]
    tick = read_ticks(service.database, last=1)[0]
    expected = 3 * spec.pools[0].usd_per_replica_hour * (1 + spec.objective.overhead_rate)
    assert tick.arrays["peer static:replicas=3/usd_per_hour"].tolist() == pytest.approx([expected, expected])


def test_a_replay_of_the_same_policy_gives_the_recorded_decisions(
    recorded: tuple[LiveService, LiveWorld, list[object]],
) -> None:
    """Parity: what the live path decided is what the core decides on the same snapshots.

    Cooldowns are left out of the comparison: the world of a record does not say when the last change was made.
    """
    service, _, _ = recorded
    specs = service.config.services
    decider, fleet = fresh(specs)
    ticks = read_ticks(service.database)
    found = replay(ticks, specs, decider, TokenDemandPolicy(fleet))
    for tick, again in zip(ticks, found, strict=True):
        np.testing.assert_array_equal(tick.target("proposed").replicas, again.decision.proposed.replicas)
        np.testing.assert_array_equal(tick.target("proposed").batch_cap, again.decision.proposed.batch_cap)


def test_a_replay_of_another_policy_is_compared_with_the_record(
    recorded: tuple[LiveService, LiveWorld, list[object]],
) -> None:
    service, _, _ = recorded
    specs = service.config.services
    decider, fleet = fresh(specs)
    rows = summary(replay(read_ticks(service.database), specs, decider, StaticPolicy(fleet, np.array([12]))), specs)
    assert [row["service"] for row in rows] == ["chat", "code"]
    assert all(row["ticks"] == 60 and row["different"] > 30 for row in rows)
    assert all(row["usd_per_hour"] > row["recorded_usd_per_hour"] for row in rows)


def test_a_service_that_is_not_in_the_record_is_left_out(
    recorded: tuple[LiveService, LiveWorld, list[object]],
) -> None:
    service, _, _ = recorded
    specs = (service_spec("new"), service_spec("code"))
    decider, fleet = fresh(specs)
    rows = summary(replay(read_ticks(service.database, last=5), specs, decider, TokenDemandPolicy(fleet)), specs)
    assert [row["service"] for row in rows] == ["code"]


def test_what_is_older_than_the_retention_is_dropped(tmp_path: Path, database_url: str) -> None:
    world = LiveWorld([service_spec()], [burst(peak_rps=4.0)])
    records = {"url": database_url, "keep_days": 600.0 / 86400.0}
    service = world.service(live_config(tmp_path, records=records))
    world.run(service, 100)
    with service.database.begin() as connection:
        oldest = connection.execute(select(func.min(TICKS.c.time_s))).scalar()
        least = connection.execute(select(func.min(TICKS.c.id))).scalar()
        assert connection.execute(select(func.min(DECISIONS.c.tick))).scalar() == least
    assert world.now_s - oldest < 1200.0 + 15.0
    service.close()


@pytest.mark.plays(
    "disk full",
    "held (`not_recorded`): what is not recorded is not carried out",
)
def test_a_full_disk_holds_and_the_controller_goes_on_when_there_is_room(tmp_path: Path) -> None:
    world = LiveWorld([service_spec()], [burst(peak_rps=4.0)])
    service = world.service(live_config(tmp_path))
    world.run(service, 3)
    applied = len(world.targets)
    with service.database.begin() as connection:
        pages = connection.execute(text("PRAGMA page_count")).scalar()
        connection.execute(text(f"PRAGMA max_page_count={pages}"))
    held = world.run(service, 6)
    assert "not_recorded" in Reason(int(held[-1].reasons[0])).words()
    assert len(world.targets) < applied + 6
    before = len(world.targets)
    with service.database.begin() as connection:
        connection.execute(text("PRAGMA max_page_count=1000000"))
    world.run(service, 2)
    assert len(world.targets) == before + 2
    service.close()


def test_secrets_come_from_the_environment() -> None:
    with pytest.raises(ValueError, match="NOWHERE, which is not set"):
        Url("postgresql://a:${NOWHERE}@b/c").reveal({})


def test_a_database_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(RecordsUnavailable, match="unable to open"):
        Database(f"sqlite:///{tmp_path / 'folder'}").create()

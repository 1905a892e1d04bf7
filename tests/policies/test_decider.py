"""One whole decision: what is seen, proposed, settled and remembered."""

from __future__ import annotations

import numpy as np
import pytest
from fakes import ScriptedPolicy, fleet, missing, pool, rows_of, snapshot, spec, spot, target

from policies.contract import Decision, Outcome, Reason, Snapshot, Target, take_rows
from policies.decider import Decider
from policies.fleet import Fleet
from policies.spec import GuardrailSpec, WindowSpec

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


def decider(services: Fleet | None = None, **guardrails: float) -> Decider:
    return Decider(fleet() if services is None else services, WindowSpec(), GuardrailSpec.model_validate(guardrails))


def at(time_s: float, n: int = 1, pools: int = 1, **overrides: object) -> Snapshot:
    return snapshot(n, pools, time_s=time_s, **overrides)


def words(decision: Decision) -> tuple[list[list[int]], list[str], str]:
    """Settled replicas, reasons and outcome of a decision's first service."""
    return (
        decision.settled.replicas.tolist(),
        Reason(int(decision.reasons[0])).words(),
        Outcome(int(decision.outcome[0])).name,
    )


def test_decision_records_what_was_seen_proposed_and_settled() -> None:
    seen, wish = at(100, replicas_target=4), target(30, 32)
    decision = decider().tick(seen, ScriptedPolicy(wish))
    assert decision.snapshot is seen
    assert decision.proposed is wish
    assert decision.policy == "scripted"
    assert words(decision) == ([[16]], ["step_limit"], "SCALED")
    assert decision.settled.batch_cap.tolist() == [[32]]
    assert (decision.reasons.shape, decision.outcome.shape) == ((1,), (1,))


def test_first_tick_adopts_the_targets_in_force() -> None:
    """From the world's 8 replicas, half may go: neither from 0 nor from a minimum."""
    assert words(decider().tick(at(100, replicas_target=8), ScriptedPolicy(target(1)))) == (
        [[4]],
        ["step_limit"],
        "SCALED",
    )


def test_wish_for_what_is_in_force_is_unchanged_from_the_first_tick() -> None:
    core = decider(fleet(width=3))
    for time_s in (100, 115):
        window = at(time_s, pools=3, replicas_target=[4, 0, 0], batch_cap=[64, 0, 0])
        decision = core.tick(window, ScriptedPolicy(target([4, 0, 0], [64, 1, 1])))
        assert words(decision) == ([[4, 0, 0]], [], "UNCHANGED")


def test_change_of_the_cap_alone_is_scaling() -> None:
    assert words(decider().tick(at(100), ScriptedPolicy(target(2, 32)))) == ([[2]], [], "SCALED")


def test_later_ticks_go_on_from_the_own_target_not_from_stale_measurements() -> None:
    core = decider()
    core.tick(at(100, replicas_target=4), ScriptedPolicy(target(16)))
    stale = at(115, replicas_target=4)
    assert words(core.tick(stale, ScriptedPolicy(target(16)))) == ([[16]], [], "UNCHANGED")


def test_unknown_target_is_taken_from_what_runs_and_an_unknown_cap_from_the_engine() -> None:
    core = decider()
    seen = at(100, replicas_target=np.nan, replicas_ready=5, replicas_starting=1, batch_cap=np.nan)
    blind = core.tick(seen, ScriptedPolicy(target(1, 1)))
    assert words(blind) == ([[6]], ["missing_metrics", "replicas_starting"], "HELD")
    assert blind.settled.batch_cap.tolist() == [[64]]
    after = core.tick(at(115), ScriptedPolicy(target(6, 64)))
    assert words(after) == ([[6]], [], "UNCHANGED")


def test_start_without_metrics_holds_until_the_world_is_seen() -> None:
    """Nothing is known of 12 running replicas: nothing is scaled, and nothing is remembered in their place."""
    core = decider()
    for time_s in (100, 115):
        blind = core.tick(missing(time_s=time_s), ScriptedPolicy(target(1)))
        assert Outcome(int(blind.outcome[0])) is Outcome.HELD
    seen = core.tick(at(130, replicas_target=12), ScriptedPolicy(target(1)))
    assert words(seen) == ([[6]], ["step_limit"], "SCALED")


def test_missing_cap_is_no_reason_to_forget_the_replicas() -> None:
    seen = at(100, replicas_target=12, batch_cap=np.nan)
    assert words(decider().tick(seen, ScriptedPolicy(target(12)))) == ([[12]], [], "UNCHANGED")


def test_blind_tick_holds_what_was_settled_before() -> None:
    core = decider()
    core.tick(at(100, replicas_target=4), ScriptedPolicy(target(6, 32)))
    blind = core.tick(missing(time_s=115), ScriptedPolicy(target(1, 64)))
    assert words(blind) == ([[6]], ["missing_metrics", "slo_burning"], "HELD")
    assert blind.settled.batch_cap.tolist() == [[32]]


def test_blind_tick_says_so_when_a_hard_limit_moves_the_target() -> None:
    core = decider()
    core.tick(at(100, replicas_target=4), ScriptedPolicy(target(4)))
    core.fleet.set_row(0, spec(pool(max_replicas=3)))
    assert words(core.tick(missing(time_s=115), ScriptedPolicy(target(4)))) == ([[3]], ["bounds"], "SCALED")


def test_cooldown_runs_from_the_last_change_of_the_total() -> None:
    core = decider(scale_down_window_s=0.0)
    core.tick(at(100, replicas_target=4), ScriptedPolicy(target(6)))
    held = ([[6]], ["cooldown"], "UNCHANGED")
    assert words(core.tick(at(115), ScriptedPolicy(target(5)))) == held
    assert words(core.tick(at(159), ScriptedPolicy(target(5)))) == held
    assert words(core.tick(at(160), ScriptedPolicy(target(5)))) == ([[5]], [], "SCALED")
    assert words(core.tick(at(175), ScriptedPolicy(target(4)))) == ([[5]], ["cooldown"], "UNCHANGED")
    assert words(core.tick(at(220), ScriptedPolicy(target(4)))) == ([[4]], [], "SCALED")


def test_exchange_between_pools_and_changes_of_the_cap_start_no_cooldown() -> None:
    core = decider(fleet(pool(), spot()), scale_down_window_s=0.0)
    core.tick(at(100, pools=2, replicas_target=4), ScriptedPolicy(target([4, 4])))
    core.tick(at(115, pools=2), ScriptedPolicy(target([3, 5], 32)))
    assert words(core.tick(at(130, pools=2), ScriptedPolicy(target([3, 4], 32)))) == ([[3, 4]], [], "SCALED")


def test_adopting_starts_no_cooldown() -> None:
    assert words(decider().tick(at(100, replicas_target=4), ScriptedPolicy(target(3)))) == ([[3]], [], "SCALED")


def test_reset_rows_adopt_anew_and_others_go_on() -> None:
    core = decider(fleet(n=2))
    core.tick(at(100, n=2, replicas_target=4), ScriptedPolicy(target([[8], [8]])))
    core.reset(np.array([True, False]))
    decision = core.tick(at(115, n=2, replicas_target=4), ScriptedPolicy(target([[3], [3]])))
    assert decision.settled.replicas.tolist() == [[3], [8]]
    assert [Reason(int(flags)).words() for flags in decision.reasons] == [[], ["cooldown"]]


def test_reset_of_everything_is_a_new_decider() -> None:
    core, fresh = decider(), decider()
    core.tick(at(100, replicas_target=4), ScriptedPolicy(target(8)))
    core.reset()
    for time_s in (10, 25):
        window = at(time_s, replicas_target=3)
        one, other = core.tick(window, ScriptedPolicy(target(2))), fresh.tick(window, ScriptedPolicy(target(2)))
        assert words(one) == words(other)


def test_decisions_made_are_not_changed_by_what_comes_later() -> None:
    core = decider(fleet(n=2))
    first = core.tick(at(100, n=2, replicas_target=4), ScriptedPolicy(target([[8], [8]], 32)))
    core.reset(np.array([True, False]))
    core.observe_rows(take_rows(at(0, n=2, replicas_target=1), np.array([1])), np.array([1]))
    assert (first.settled.replicas.tolist(), first.settled.batch_cap.tolist()) == ([[8], [8]], [[32], [32]])


def test_caller_who_writes_into_a_decision_does_not_change_the_target_in_force() -> None:
    core = decider()
    decision = core.tick(at(100, replicas_target=4), ScriptedPolicy(target(8)))
    decision.settled.replicas[:] = 1
    decision.settled.batch_cap[:] = 1
    assert words(core.tick(at(115), ScriptedPolicy(target(8)))) == ([[8]], [], "UNCHANGED")


def test_rows_begun_anew_take_their_own_targets() -> None:
    core = decider(fleet(n=3))
    core.tick(at(100, n=3, replicas_target=4), ScriptedPolicy(target([[8]] * 3)))
    rows = np.array([2, 0])
    core.observe_rows(snapshot(n=2, time_s=10.0, replicas_target=[[6], [10]]), rows)
    window = at(115, n=3)
    settled, _ = core.settle(target([[9], [7], [5]]), core.observe(window))
    assert settled.replicas.tolist() == [[9], [8], [5]]


def test_observe_and_settle_are_a_tick() -> None:
    """The training environment calls the halves, the controller the whole."""
    halves, whole = decider(), decider()
    for time_s, wish in ((100, 9), (115, 2), (175, 2), (190, 30)):
        window = at(time_s, replicas_target=4)
        settled, reasons = halves.settle(target(wish), halves.observe(window))
        decision = whole.tick(window, ScriptedPolicy(target(wish)))
        assert settled.replicas.tolist() == decision.settled.replicas.tolist()
        assert reasons.tolist() == decision.reasons.tolist()


def test_each_service_is_decided_as_if_alone() -> None:
    rng = np.random.default_rng(1)
    specs = [spec(pool()), spec(pool(), spot()), spec(pool(max_replicas=4))]
    wide, alone = decider(Fleet.from_specs(specs)), [decider(Fleet.from_specs([single])) for single in specs]
    exists = wide.fleet.exists
    for tick in range(30):
        window = at(
            15.0 * tick,
            n=3,
            pools=2,
            replicas_target=np.where(exists, 3.0, 0.0),
            replicas_ready=np.where(exists, 3.0, 0.0),
            running=np.where(exists, rng.integers(0, 300, (3, 2)), 0.0),
            batch_cap=np.where(exists, 64.0, 0.0),
            queue_requests=rng.integers(0, 50, 3),
            oldest_wait_s=rng.choice([0.0, 3.0], 3),
            ttft_attainment=rng.choice([1.0, 0.5, np.nan], 3),
            arrival_rps=rng.choice([2.0, np.nan], 3),
            generation_tps=rng.choice([400.0, 4000.0, np.nan], 3),
        )
        wish = Target(rng.integers(0, 25, (3, 2)), np.full((3, 2), 32))
        together = wide.tick(window, ScriptedPolicy(wish))
        for row, single in enumerate(specs):
            width = len(single.pools)
            own = slice(row, row + 1)
            proposal = Target(wish.replicas[own, :width], wish.batch_cap[own, :width])
            decision = alone[row].tick(rows_of(window, row, width), ScriptedPolicy(proposal))
            assert decision.settled.replicas.tolist() == together.settled.replicas[own, :width].tolist()
            assert decision.outcome.tolist() == together.outcome[own].tolist()

"""Outputs in -1..1 as residuals on a reference rule; capacity where it is cheapest."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from fakes import engine, fleet, observation, pool, snapshot, spec, spot
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from policies.action import ACTIONS, SURGE_COLUMN, allocate, decode_action, reference_batch_cap
from policies.contract import Floats, Target
from policies.fleet import Fleet
from policies.spec import ActionSpec

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

SPEC = ActionSpec()
BOTH = fleet(pool(), spot(), width=3)


def decode(
    services: Fleet,
    headroom: float = 0.0,
    cap: float = 0.0,
    share: float = 0.0,
    demand: Any = 4.0,
    limit: Any = 32.0,
    slack: float = 0.0,
    in_force: float = np.nan,
) -> Target:
    n, pools = services.exists.shape
    seen = observation(snapshot(n=n, pools=pools, replicas_target=in_force), demand, limit)
    return decode_action(np.full((n, 4), (headroom, slack, cap, share)), seen, services, SPEC)


def give(services: Fleet, demand: Any, headroom: float = 1.0, share: float = 0.5) -> list[int]:
    n, pools = services.exists.shape
    wanted: Floats = np.broadcast_to(np.asarray(demand, float), (n, pools))
    replicas: list[list[int]] = allocate(wanted, np.full(n, headroom), np.full(n, share), services).tolist()
    assert len(replicas) == 1
    return replicas[0]


def test_zero_outputs_are_the_reference_rule() -> None:
    zero = decode(BOTH)
    assert zero.replicas.tolist() == [[3, 3, 0]]  # 1.3 * 4 = 5.2, half on spot: 2.6 of each
    seen = observation(snapshot(pools=3), 4.0, 32.0)
    assert zero.batch_cap.tolist() == reference_batch_cap(seen, BOTH).tolist() == [[32, 32, 1]]
    assert zero.replicas.dtype == zero.batch_cap.dtype == np.int64


@pytest.mark.parametrize(("output", "replicas"), [(-1.0, 2), (0.0, 6), (1.0, 16)])
def test_headroom_spans_its_factor_both_ways(output: float, replicas: int) -> None:
    assert decode(fleet(), headroom=output).replicas.tolist() == [[replicas]]  # 1.3 * 3 ** output * 4


@pytest.mark.parametrize(("in_force", "replicas"), [(0.0, 6), (5.0, 6), (6.0, 6), (7.0, 7), (8.0, 7), (20.0, 7)])
def test_a_fleet_within_the_band_stays_as_it_is(in_force: float, replicas: int) -> None:
    """At least 1.3 * 4 = 5.2 and at most 1.3 times as many, 6.76."""
    assert decode(fleet(), in_force=in_force).replicas.tolist() == [[replicas]]


@pytest.mark.parametrize(("slack", "replicas"), [(-1.0, 6), (0.0, 7), (1.0, 21)])
def test_slack_spans_its_factor_both_ways(slack: float, replicas: int) -> None:
    """1.3 * 4 = 5.2 are the fewest; 3 %, 30 % and 300 % more are kept."""
    services = fleet(pool(max_replicas=100))
    assert decode(services, slack=slack, in_force=100.0).replicas.tolist() == [[replicas]]


@pytest.mark.parametrize(("output", "cap"), [(-1.0, 16), (0.0, 32), (1.0, 64)])
def test_batch_cap_spans_its_factor_both_ways(output: float, cap: int) -> None:
    assert decode(fleet(), cap=output).batch_cap.tolist() == [[cap]]


def test_batch_cap_stays_between_four_and_the_engines_own() -> None:
    assert decode(fleet(), cap=1.0, limit=64.0).batch_cap.tolist() == [[64]]
    assert decode(fleet(), cap=-1.0, limit=1.0).batch_cap.tolist() == [[4]]
    tiny = fleet(pool(engine=engine(max_num_seqs=2)))
    assert decode(tiny).batch_cap.tolist() == [[2]]


def test_spot_share_one_is_all_spot_and_minus_one_none() -> None:
    assert decode(BOTH, share=1.0).replicas.tolist() == [[1, 6, 0]]  # the on-demand minimum stays
    assert decode(BOTH, share=-1.0).replicas.tolist() == [[6, 0, 0]]


@pytest.mark.parametrize("kind", [pool, spot])
def test_spot_share_means_nothing_with_one_price_class(kind: Any) -> None:
    services = fleet(kind())
    assert {decode(services, share=share).replicas[0, 0] for share in (-1.0, 0.0, 1.0)} == {6}


def test_outputs_outside_their_range_count_as_its_ends() -> None:
    assert decode(fleet(), 5.0, 5.0, 5.0).replicas.tolist() == decode(fleet(), 1.0, 1.0, 1.0).replicas.tolist()


def test_an_output_that_is_no_number_counts_as_the_reference() -> None:
    broken = decode(BOTH, np.nan, np.nan, np.nan)
    assert broken.replicas.tolist() == decode(BOTH).replicas.tolist()
    assert broken.batch_cap.tolist() == decode(BOTH).batch_cap.tolist()
    assert decode(BOTH, np.inf, 0.0, 0.0).replicas.tolist() == decode(BOTH, 1.0, 0.0, 0.0).replicas.tolist()


def test_cheapest_pool_of_a_class_fills_first() -> None:
    dear, cheap = pool(name="dear", min_replicas=0), pool(name="cheap", min_replicas=0, max_replicas=3)
    services = fleet(dear, cheap.model_copy(update={"usd_per_gpu_hour": 1.0}))
    assert give(services, 2.5) == [0, 3]
    assert give(services, 5.0) == [2, 3]


def test_cheapest_is_by_work_done_not_by_replica() -> None:
    """Half the price per replica and three times the replicas is dearer."""
    services = fleet(pool(min_replicas=0), pool(name="slow", min_replicas=0, usd_per_gpu_hour=1.8))
    assert give(services, [[2.0, 6.0]]) == [2, 0]
    assert give(services, [[2.0, 3.0]]) == [0, 3]


def test_what_spot_cannot_take_spills_over_to_on_demand_and_back() -> None:
    assert give(fleet(pool(), spot(max_replicas=2)), 10.0, share=0.5) == [8, 2]
    assert give(fleet(pool(max_replicas=2), spot()), 10.0, share=0.5) == [2, 8]
    assert give(fleet(pool(max_replicas=2), spot(max_replicas=3)), 10.0, share=0.5) == [2, 3]


@pytest.mark.parametrize("width", [2, 3, 8])
def test_padding_does_not_swallow_the_spill_over(width: int) -> None:
    services = fleet(pool(), spot(max_replicas=2), width=width)
    demand = np.where(services.exists, 10.0, 0.0)  # as estimated: absent pools need nothing
    assert give(services, demand)[:2] == [8, 2]


def test_pool_that_would_need_almost_nothing_does_not_swallow_the_rest() -> None:
    """A far stronger pool of the other class must not round the work of the weak ones away."""
    services = fleet(pool(min_replicas=0, max_replicas=5), spot(), spot(name="strong", usd_per_gpu_hour=90.0))
    assert give(services, [[4.0, 4.0, 0.015]], share=0.0) == [4, 0, 0]


def test_sliver_of_a_replica_is_not_worth_a_whole_one() -> None:
    assert give(fleet(), 3.01) == [3]
    assert give(fleet(), 3.03) == [4]


def test_the_last_replica_goes_only_when_the_work_has_gone() -> None:
    services = fleet(pool(min_replicas=0), spot(), width=3)
    assert give(services, [[0.01, 0.01, 0.0]]) == [0, 1, 0]
    assert give(services, [[0.001, 0.001, 0.0]]) == [0, 0, 0]
    assert give(fleet(pool(), spot()), 0.01) == [1, 0]


def test_no_demand_keeps_the_minimum() -> None:
    assert give(fleet(pool(min_replicas=2), spot(), width=3), 0.0) == [2, 0, 0]


def random_fleet(rng: np.random.Generator) -> Fleet:
    """Three services of up to three pools with any bounds and prices."""
    specs = []
    for _ in range(3):
        pools = []
        for column in range(rng.integers(1, 4)):
            least = int(rng.integers(0, 4))
            bounds = {"min_replicas": least, "max_replicas": least + int(rng.integers(1, 9))}
            kind = spot if rng.random() < 0.5 else pool
            pools.append(kind(name=f"p{column}", usd_per_gpu_hour=float(rng.uniform(0.5, 5)), **bounds))
        specs.append(spec(*pools))
    return Fleet.from_specs(specs, 3)


anything = st.sampled_from([-np.inf, np.nan, np.inf]) | st.floats(-2, 2)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    action=hnp.arrays(np.float64, (3, len(ACTIONS)), elements=anything),
    demand=hnp.arrays(np.float64, (3, 3), elements=st.floats(0, 1e6)),
    limit=hnp.arrays(np.float64, (3, 3), elements=st.floats(1, 4096)),
)
def test_targets_are_always_within_bounds(seed: int, action: Floats, demand: Floats, limit: Floats) -> None:
    services = random_fleet(np.random.default_rng(seed))
    seen = observation(snapshot(n=3, pools=3), demand, limit)
    wanted = decode_action(action, seen, services, SPEC)
    assert (wanted.replicas >= services.min_replicas).all()
    assert (wanted.replicas <= services.max_replicas).all()
    assert (wanted.batch_cap >= 1).all()
    assert (wanted.batch_cap <= services.max_num_seqs).all()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    demand=st.floats(0.1, 30),
    share=st.floats(-1, 1),
    outputs=st.tuples(st.floats(-1, 1), st.floats(-1, 1)),
)
def test_more_headroom_never_gives_fewer_replicas(
    seed: int, demand: float, share: float, outputs: tuple[float, float]
) -> None:
    services = random_fleet(np.random.default_rng(seed))
    low, high = (decode(services, output, 0.0, share, demand).replicas.sum(axis=1) for output in sorted(outputs))
    assert (low <= high).all()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0, 1), demand=st.floats(0.1, 40))
def test_the_work_is_covered_wherever_there_is_room(seed: int, share: float, demand: float) -> None:
    rng = np.random.default_rng(seed)
    services = random_fleet(rng)
    needs = np.where(services.exists, demand * rng.uniform(0.5, 2.0, (3, 3)), 0.0)
    replicas = allocate(needs, np.ones(3), np.full(3, share), services)
    covered = np.divide(replicas, needs, out=np.zeros((3, 3)), where=services.exists).sum(axis=1)
    full = (replicas == services.max_replicas).all(axis=1)
    slivers = 3 * 0.02 / needs[services.exists].min()
    assert ((covered >= 1.0 - slivers) | full).all()


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_each_service_is_allocated_as_if_alone(seed: int) -> None:
    rng = np.random.default_rng(seed)
    services = random_fleet(rng)
    demand = np.where(services.exists, rng.uniform(0, 20, (3, 3)), 0.0)
    headroom, share = rng.uniform(0.5, 2, 3), rng.random(3)
    together = allocate(demand, headroom, share, services)
    for row in range(3):
        width = int(services.exists[row].sum())
        alone = Fleet.empty(1, width)
        for name in ("exists", "is_spot", "usd_per_replica_s", "min_replicas", "max_replicas"):
            getattr(alone, name)[:] = getattr(services, name)[row : row + 1, :width]
        at = slice(row, row + 1)
        assert allocate(demand[at, :width], headroom[at], share[at], alone).tolist() == together[at, :width].tolist()


@pytest.mark.parametrize(("ratio", "replicas"), [(2.9, 2), (3.1, 11)])  # 1.3 * 8
def test_a_surge_is_covered_at_once_whatever_the_headroom(ratio: float, replicas: int) -> None:
    seen = dataclasses.replace(observation(snapshot(), 8.0), demand_mean=np.array([[2.0]]))
    seen.features[0, SURGE_COLUMN] = np.log(ratio)
    lean = np.array([[-0.5, -1.0, 0.0, 0.0]])  # 1.3 * 3 ** -0.5 * 2 = 1.5 replicas
    assert decode_action(lean, seen, fleet(), SPEC).replicas.tolist() == [[replicas]]
    generous = dataclasses.replace(seen, demand_mean=np.array([[4.0]]))
    outputs = np.array([[1.0, -1.0, 0.0, 0.0]])  # 1.3 * 3 * 4, more than now needs
    assert decode_action(outputs, generous, fleet(), SPEC).replicas.tolist() == [[16]]


def test_headroom_multiplies_what_the_last_five_minutes_needed() -> None:
    lull = dataclasses.replace(observation(snapshot(), 2.0), demand_mean=np.array([[8.0]]))
    services = fleet(pool(max_replicas=100))
    assert decode_action(np.zeros((1, 4)), lull, services, SPEC).replicas.tolist() == [[11]]  # 1.3 * 8

"""Every policy goes on after a restart as if nothing had happened: the same targets, bit for bit."""

from __future__ import annotations

import io

import numpy as np
import pytest
from fakes import fleet, observation, pool, random_snapshot, spec, spot

from policies.contract import Observation
from policies.durable import HISTORY, Remembering
from policies.lineup import ALL, CONSTANT, make_policy, self_tuned

SERVICES = fleet(pool(), spot(), n=3)
SPECS = [spec(pool(), spot())] * 3
BEFORE, AFTER = 30, 60
REFERENCES = [name for name in ALL if name != CONSTANT]


def observations() -> list[Observation]:
    """Random windows, some of them blind."""
    rng = np.random.default_rng(3)
    seen = [random_snapshot(rng, SERVICES, 1e9 + 15.0 * tick, missing_share=0.02) for tick in range(BEFORE + AFTER)]
    return [observation(one, demand=rng.exponential(5.0, (3, 2))) for one in seen]


@pytest.mark.parametrize("reference", [*REFERENCES, self_tuned("hpa"), "dynamo-throughput:load_scaling=sla"])
def test_a_restart_changes_no_target(reference: str) -> None:
    windows = observations()
    straight = make_policy(reference, SERVICES, SPECS)
    expected = [straight.propose(window) for window in windows]

    first = make_policy(reference, SERVICES, SPECS)
    for window in windows[:BEFORE]:
        first.propose(window)
    assert isinstance(first, Remembering)
    stored = io.BytesIO()
    np.savez(stored, **first.state())
    stored.seek(0)
    second, stranger = make_policy(reference, SERVICES, SPECS), make_policy(reference, SERVICES, SPECS)
    second.restore(dict(np.load(stored)))
    differs = False
    for window, target in zip(windows[BEFORE:], expected[BEFORE:], strict=True):
        found, fresh = second.propose(window), stranger.propose(window)
        np.testing.assert_array_equal(found.replicas, target.replicas)
        np.testing.assert_array_equal(found.batch_cap, target.batch_cap)
        differs |= bool((fresh.replicas != target.replicas).any())
    assert differs or reference == "learned", "without its memory it would have decided otherwise"


@pytest.mark.parametrize("reference", REFERENCES)
def test_every_array_has_the_services_first(reference: str) -> None:
    policy = make_policy(reference, SERVICES, SPECS)
    for window in observations()[:3]:
        policy.propose(window)
    assert isinstance(policy, Remembering)
    for name, array in policy.state().items():
        assert len(array) == len(SERVICES), name
        assert array.ndim >= 3 or not name.endswith(HISTORY), name

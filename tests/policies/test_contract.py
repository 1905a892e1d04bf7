"""The shared nouns: what counts as blind, plain rows, reason words."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
from fakes import HEALTHY, POOL_FIELDS, SNAPSHOT_FIELDS, missing, snapshot, target

from policies.contract import Outcome, Reason, Snapshot, put_rows, take_rows


def test_snapshot_length_is_the_number_of_services() -> None:
    assert len(snapshot(n=3, pools=2)) == 3
    assert len(target([[1, 2], [3, 4]])) == 2


@pytest.mark.parametrize("name", ["replicas_ready", "replicas_target", "replicas_starting", "running"])
def test_one_pool_without_a_vital_count_is_blind(name: str) -> None:
    assert snapshot(n=2, pools=2, **{name: [[1.0, 1.0], [1.0, np.nan]]}).blind().tolist() == [False, True]


def test_one_sign_of_load_is_enough_to_see() -> None:
    assert snapshot(generation_tps=np.nan).blind().tolist() == [False]
    assert snapshot(arrival_rps=np.nan).blind().tolist() == [False]
    assert snapshot(arrival_rps=np.nan, generation_tps=np.nan).blind().tolist() == [True]


@pytest.mark.parametrize(
    "name",
    sorted(
        set(SNAPSHOT_FIELDS)
        - {"replicas_ready", "replicas_target", "replicas_starting", "running", "generation_tps", "arrival_rps"}
    ),
)
def test_other_gaps_are_not_blind(name: str) -> None:
    gap: dict[str, Any] = {name: np.nan}
    assert snapshot(**gap).blind().tolist() == [False]


def test_zeros_are_not_blind() -> None:
    nothing: dict[str, Any] = dict.fromkeys(SNAPSHOT_FIELDS, 0.0)
    assert snapshot(**nothing).blind().tolist() == [False]


def test_row_is_plain_and_names_every_measurement() -> None:
    row = snapshot(n=2, pools=2, arrival_rps=[1.0, np.nan], running=[[1.0, 2.0], [3.0, np.nan]]).row(1)
    expected: dict[str, Any] = {
        name: [value, value] if name in POOL_FIELDS else value for name, value in HEALTHY.items()
    }
    expected |= {"arrival_rps": None, "running": [3.0, None], "boot_pipeline": [[0.0] * 3] * 2}
    assert row == expected


def test_a_missing_row_is_none_at_every_depth() -> None:
    row = missing(pools=1).row(0)
    assert row["boot_pipeline"] == [[None, None, None]]
    assert row["ttft_attainment"] is None


def test_rows_taken_are_copies_and_can_be_put_back() -> None:
    seen = snapshot(n=3, pools=2, arrival_rps=[1.0, 2.0, 3.0])
    part: Snapshot = take_rows(seen, np.array([2, 0]))
    assert part.arrival_rps.tolist() == [3.0, 1.0]
    part.arrival_rps[:] = 9.0
    assert seen.arrival_rps.tolist() == [1.0, 2.0, 3.0]
    put_rows(seen, np.array([2, 0]), part)
    assert seen.arrival_rps.tolist() == [9.0, 2.0, 9.0]


def test_nouns_cannot_be_reassigned() -> None:
    with pytest.raises(FrozenInstanceError):
        target([1]).replicas = np.zeros((1, 1), np.int64)  # type: ignore[misc]


def test_reason_words_name_exactly_the_set_codes() -> None:
    assert Reason.NONE.words() == []
    assert (Reason.BACKLOG | Reason.BOUNDS).words() == ["backlog", "bounds"]
    every = Reason(sum(int(reason) for reason in Reason))
    assert every.words() == [reason.name.lower() for reason in Reason if reason.name]
    assert len(every.words()) == 25


def test_codes_are_stable_because_records_keep_them() -> None:
    assert {reason.name: int(reason) for reason in Reason} == {
        "MISSING_METRICS": 1,
        "BACKLOG": 2,
        "SLO_BURNING": 4,
        "REPLICAS_STARTING": 8,
        "STEP_LIMIT": 16,
        "COOLDOWN": 32,
        "GPU_BUDGET": 64,
        "BOUNDS": 128,
        "POLICY_FAILED": 256,
        "ACTUATION_FAILED": 512,
        "BUNDLE_REFUSED": 1024,
        "OUT_OF_RANGE": 2048,
        "PARTLY_BLIND": 4096,
        "BURNING_WHILE_SHRINKING": 8192,
        "PAUSED": 16384,
        "KILL_SWITCH": 32768,
        "NOT_LEADER": 65536,
        "FOREIGN_EDIT": 131072,
        "OTHER_AUTOSCALER": 262144,
        "REVALIDATING": 524288,
        "NOT_RECORDED": 1048576,
        "OVERDUE": 2097152,
        "OWNER_UNKNOWN": 4194304,
        "STEADY_TRAFFIC": 8388608,
        "DRAINING": 16777216,
    }
    assert [int(outcome) for outcome in Outcome] == [0, 1, 2, 3]

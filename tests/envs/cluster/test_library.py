"""Traces laid end to end, sliced by time and summed without a loop."""

from __future__ import annotations

import numpy as np
import pytest

from envs.cluster.library import RequestLibrary
from envs.traffic.trace import Trace

FIRST = Trace.from_arrays(
    arrival_s=[0.0, 1.0, 1.0, 4.0],
    prompt_tokens=[10, 20, 30, 40],
    output_tokens=[1, 2, 3, 4],
    prefix_hit_tokens=[0, 5, 30, 0],
    duration_s=5.0,
)
EMPTY = Trace.from_arrays(arrival_s=[], prompt_tokens=[], output_tokens=[], duration_s=7.0)
SECOND = Trace.from_arrays(arrival_s=[0.5, 2.5], prompt_tokens=[100, 200], output_tokens=[50, 60])


@pytest.fixture(name="library")
def library_of_three() -> RequestLibrary:
    return RequestLibrary.of([FIRST, EMPTY, SECOND])


def test_traces_lie_end_to_end_each_from_its_own_time_zero(library: RequestLibrary) -> None:
    assert library.first.tolist() == [0, 4, 4, 6]
    assert library.arrival_s.tolist() == [0.0, 1.0, 1.0, 4.0, 0.5, 2.5]
    assert library.prompt_tokens.tolist() == [10, 20, 30, 40, 100, 200]
    assert library.output_tokens.tolist() == [1, 2, 3, 4, 50, 60]
    assert library.prefix_hit_tokens.tolist() == [0, 5, 30, 0, 0, 0]
    assert library.duration_s.tolist() == [5.0, 7.0, 2.5]


@pytest.mark.parametrize(
    ("trace", "start_s", "end_s", "rows"),
    [
        (0, 0.0, 5.0, (0, 4)),
        (0, 1.0, 4.0, (1, 3)),  # the start belongs to the slice, the end to the next one
        (0, 1.5, 3.0, (3, 3)),
        (1, 0.0, 7.0, (4, 4)),
        (2, 0.0, 1.0, (4, 5)),
        (2, 2.6, 9.0, (6, 6)),
    ],
)
def test_rows_of_a_time_slice_are_those_of_its_own_trace(
    library: RequestLibrary, trace: int, start_s: float, end_s: float, rows: tuple[int, int]
) -> None:
    found = library.rows(np.array([trace]), np.array([[start_s], [end_s]]))
    assert found.ravel().tolist() == list(rows)


def test_rows_of_many_slices_are_found_at_once(library: RequestLibrary) -> None:
    assert library.rows(np.array([0, 1, 2, 0]), np.array([1.5, 3.0, 2.6, 99.0])).tolist() == [3, 4, 6, 4]


def test_totals_count_requests_and_tokens_and_at_least_one_computed_token_each(library: RequestLibrary) -> None:
    """A prompt that hits the cache in full still has one token computed: 10 + 15 + 1 + 40."""
    first, end = np.array([0, 1, 4, 4]), np.array([4, 3, 4, 6])
    assert library.totals(first, end).tolist() == [
        [4, 100, 66, 10],
        [2, 50, 16, 5],
        [0, 0, 0, 0],
        [2, 300, 300, 110],
    ]

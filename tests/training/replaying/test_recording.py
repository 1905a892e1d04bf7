"""From counters, histograms and access logs to a trace."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from autoscaler.metrics.traffic_recording import Arrivals, Lengths, Recording, increments, read_haproxy_log
from policies.engine import ConfigError
from training.replaying.recording import trace_from_recording

START_S = datetime(2026, 1, 31, 12, tzinfo=UTC).timestamp()


def lengths(edges: list[float], counts: list[list[float]]) -> Lengths:
    ends = START_S + 300.0 * np.arange(1, len(counts) + 1)
    return Lengths(ends, np.array(edges), np.array(counts, np.float64))


def recording(arrivals: Arrivals, prompt: Lengths, output: Lengths) -> Recording:
    return Recording(START_S, 600.0, arrivals, prompt, output, ())


def spans(*rows: tuple[float, float, float]) -> Arrivals:
    table = np.array(rows)
    return Arrivals(START_S + table[:, 0], START_S + table[:, 1], table[:, 2])


def test_a_counter_that_was_reset_counts_from_zero() -> None:
    samples = [(10, "100"), (20, "104"), (30, "104"), (40, "3"), (50, "5")]
    assert increments(samples, 0, 100) == [(10, 20, 4.0), (30, 40, 3.0), (40, 50, 2.0)]


def test_what_grew_outside_the_recording_is_left_out() -> None:
    assert increments([(10, "1"), (20, "4"), (30, "9")], 15, 25) == [(10, 20, 3.0)]


def test_requests_lie_in_the_span_in_which_they_were_counted() -> None:
    arrivals = spans((0, 10, 3), (100, 100, 1), (400, 405, 2))
    trace = trace_from_recording(recording(arrivals, lengths([10], [[6], [0]]), lengths([1], [[6], [0]])), "mine", 0)
    assert len(trace) == 6
    assert np.all(trace.arrival_s[:3] <= 10)
    assert trace.arrival_s[3] == 100
    assert np.all((trace.arrival_s[4:] >= 400) & (trace.arrival_s[4:] <= 405))
    assert (trace.duration_s, trace.name) == (600.0, "mine")


def test_lengths_follow_the_histogram_of_their_block() -> None:
    arrivals = spans((0, 300, 1000), (300.001, 600, 1000))
    prompt = lengths([10, 100, np.inf], [[500, 500, 0], [0, 0, 1000]])
    output = lengths([2, 3], [[0, 1000], [0, 1000]])
    trace = trace_from_recording(recording(arrivals, prompt, output), "mine", 1)
    first, second = trace.prompt_tokens[:1000], trace.prompt_tokens[1000:]
    assert np.mean(first <= 10) == pytest.approx(0.5, abs=0.06)
    assert (first.min(), first.max()) >= (1, 50)
    assert first.max() <= 100
    assert (second > 100).all()
    assert (second <= 200).all()
    assert set(trace.output_tokens.tolist()) == {3}


def test_the_same_seed_draws_the_same_trace() -> None:
    made = recording(spans((0, 600, 50)), lengths([10, 100], [[5, 5]]), lengths([10, 100], [[5, 5]]))
    digests = [trace_from_recording(made, "mine", seed).digest() for seed in (7, 7, 8)]
    assert digests[0] == digests[1] != digests[2]


LOG = (
    "Jan 31 12:00:00 host haproxy[1]: 10.0.0.1:5000 [31/Jan/2026:12:00:01.250] chat-in chat/r1 0/12/0/80/900 200 5 - - "
    '---- 1/1/0/0/0 0/0 "POST /v1/completions HTTP/1.1"\n'
    '10.0.0.1:5001 [31/Jan/2026:12:00:03.000] chat-in chat/<NOSRV> 0/-1/-1/-1/0 503 5 - - SC-- 1/1/0/0/0 0/0 "POST /"\n'
    '10.0.0.1:5002 [31/Jan/2026:12:00:00.500] chat-in chat/r2 0/0/0/80/+900 200 5 - - ---- 1/1/0/0/0 0/0 "POST /"\n'
    '10.0.0.1:5003 [31/Jan/2026:12:00:02.000] code-in code/r2 0/0/0/80/900 200 5 - - ---- 1/1/0/0/0 0/0 "POST /"\n'
    '10.0.0.1:5004 [31/Jan/2026:13:00:00.000] chat-in chat/r2 0/0/0/80/900 200 5 - - ---- 1/1/0/0/0 0/0 "POST /"\n'
)


def test_an_access_log_gives_the_moments_of_one_backend(tmp_path: Path) -> None:
    file = tmp_path / "haproxy.log"
    file.write_text(LOG)
    arrivals = read_haproxy_log(file, ["chat"], START_S, START_S + 600)
    assert (arrivals.from_s - START_S).tolist() == [0.5, 1.25]
    assert arrivals.resolution_s == 0.0


def test_another_log_is_refused_in_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "access.log"
    file.write_text('{"time": 1}\n')
    with pytest.raises(ConfigError, match="none of its 1 lines is in the format of HAProxy's `option httplog`"):
        read_haproxy_log(file, ["chat"], 0, 1e12)

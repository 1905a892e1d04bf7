"""A generated trace, replayed on emulated engines, is recorded as what it was: number, dispersion, lengths."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import numpy as np
import pytest
from servers import Engine, Prometheus, start

from autoscaler.metrics.client import PrometheusConfig
from autoscaler.metrics.traffic_recording import record
from envs.traffic.generator import GeneratorSpec, generate
from envs.traffic.summary import counts, dispersion
from envs.traffic.trace import Trace
from training.replaying.recording import trace_from_recording

DURATION_S = 60.0


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[Prometheus]:
    server = start(Prometheus, tmp_path / "prometheus")
    yield server
    server.stop()


@pytest.fixture
def engines(tmp_path: Path) -> Iterator[list[Engine]]:
    running = [Engine(tmp_path, "--speedup", "20") for _ in range(2)]
    for engine in running:
        engine.ready()
    yield running
    for engine in running:
        engine.stop()


async def replay(trace: Trace, engines: list[Engine]) -> list[float]:
    """Unix time of each request's first token; each is sent at its time, or later on a busy machine."""
    began_s = time.monotonic()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def send(row: int) -> float:
            await asyncio.sleep(trace.arrival_s[row] - (time.monotonic() - began_s))
            body = {
                "prompt": "",
                "jevons_prompt_tokens": int(trace.prompt_tokens[row]),
                "max_tokens": int(trace.output_tokens[row]),
                "stream": True,
            }
            async with session.post(
                f"http://{engines[row % len(engines)].address}/v1/completions", json=body
            ) as answer:
                assert answer.status == 200
                await answer.content.readline()
                first_s = time.time()
                await answer.content.read()
                return first_s

        return await asyncio.gather(*(send(row) for row in range(len(trace))))


def test_a_replayed_trace_is_recorded_as_it_was(prometheus: Prometheus, engines: list[Engine]) -> None:
    # A crowd: without one the windows' counts hardly differ, and their dispersion is the noise of six numbers.
    crowd = GeneratorSpec(
        profile="flash_crowd", duration_s=DURATION_S, mean_rps=4.0, crowd_peak=5.0, crowd_rise_s=8.0, crowd_decay_s=10.0
    )
    trace = generate(crowd, seed=3)
    short = Trace.from_arrays(
        trace.arrival_s, trace.prompt_tokens, np.minimum(trace.output_tokens, 200), duration_s=DURATION_S
    )
    prometheus.scrape([(engine.address, {"service": "chat"}) for engine in engines])
    prometheus.wait_scraped([engine.address for engine in engines])
    began_s = time.time()
    first_s = np.sort(asyncio.run(replay(short, engines)))
    time.sleep(3.0)  # the last scrape
    recording = record(PrometheusConfig(url=prometheus.url), "chat", began_s - 1.0, time.time())
    recorded = trace_from_recording(recording, "recorded", seed=0)

    # Beside what clients saw in the same windows: how late a busy machine sent and served is not the recorder's fault.
    ones = np.ones(len(first_s), np.int64)
    seen = Trace.from_arrays(first_s - recording.start_s, ones, ones, duration_s=recording.duration_s)
    assert len(recorded) == pytest.approx(len(short), rel=0.03)
    assert dispersion(recorded, 10.0) == pytest.approx(dispersion(seen, 10.0), rel=0.25)
    assert np.abs(counts(recorded, 10.0) - counts(seen, 10.0)).sum() <= 0.1 * len(seen)
    assert recording.arrivals.resolution_s == pytest.approx(1.0, rel=0.5)
    for field in ("prompt_tokens", "output_tokens"):
        ratios = np.percentile(getattr(recorded, field), (25, 50, 75)) / np.percentile(
            getattr(short, field), (25, 50, 75)
        )
        # A bucket of 1, 2, 5 is at most a factor of 2.5 wide.
        assert np.all((ratios > 1 / 1.6) & (ratios < 1.6)), (field, ratios)
    assert recording.lost[0] == "arrivals are the times of first tokens: the engines' queues have smoothed bursts"

"""A trace slice on a live engine and through the cluster model: the two latency distributions side by side.

This module must not know about fits or the command line.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from envs.traffic.trace import Trace
from policies.contract import Floats
from policies.engine import ConfigError, EngineProfile
from training.profiling.load_client import Engine, open_loop
from training.replaying.fixed_fleet import simulate

LEVELS = (50, 90, 99)
PROMPT_SEED = 7_000_000
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, eq=False)
class Latencies:
    """Per request, (requests,), seconds; TPOT is NaN for a one-token output."""

    ttft_s: Floats
    tpot_s: Floats
    e2e_s: Floats
    makespan_s: float
    output_tokens: int

    def summary(self) -> dict[str, float]:
        """Percentiles in seconds and the output rate in tokens per second."""
        found: dict[str, float] = {}
        for name, values in (("ttft", self.ttft_s), ("tpot", self.tpot_s), ("e2e", self.e2e_s)):
            for level in LEVELS:
                found[f"{name}_p{level}_s"] = float(np.nanpercentile(values, level))
        found["output_tps"] = self.output_tokens / self.makespan_s
        return found


@dataclass(frozen=True, eq=False)
class LatencyComparison:
    """One batch cap.

    Attributes:
        batch_cap: concurrent requests admitted to the engine.
        live: one entry per repeat.
        simulated: the cluster model on the same requests.
    """

    batch_cap: int
    live: tuple[Latencies, ...]
    simulated: Latencies

    def rows(self) -> list[dict[str, float | str | int | None]]:
        """Per quantity: measured (mean of the repeats), simulated, relative error, and the spread of the repeats."""
        measured = [one.summary() for one in self.live]
        simulated = self.simulated.summary()
        found: list[dict[str, float | str | int | None]] = []
        for name, value in simulated.items():
            each = np.array([one[name] for one in measured])
            mean = float(each.mean())
            found.append(
                {
                    "batch_cap": self.batch_cap,
                    "quantity": name,
                    "measured": mean,
                    "simulated": value,
                    "error": value / mean - 1.0,
                    "repeat_spread": float((each.max() - each.min()) / mean) if len(each) > 1 else None,
                }
            )
        return found


def replay(
    engine: Engine,
    trace: Trace,
    profile: EngineProfile,
    batch_caps: Sequence[int],
    repeats: int = 1,
    on_progress: Progress | None = None,
) -> list[LatencyComparison]:
    """Serve `trace` live and simulated, once per batch cap and repeat; the repeats go round the caps in turn.

    Args:
        engine: live, one replica.
        trace: requests; prefix hits are ignored, as prompts are random.
        profile: what to simulate with.
        batch_caps: concurrent requests admitted.
        repeats: of the live runs, to see how much they differ among themselves.
        on_progress: called with (done, total, label).

    Raises:
        ConfigError: when the trace is empty or a request cannot fit the engine.
        EngineFailed: when the engine fails.
    """
    if not len(trace):
        raise ConfigError(f"trace {trace.name!r}: has no request in the slice")
    largest = int((trace.prompt_tokens + trace.output_tokens).max())
    if largest > profile.kv_capacity_tokens:
        raise ConfigError(
            f"trace {trace.name!r}: a request of {largest:,} tokens cannot fit the KV cache of {profile.name}, "
            f"{profile.kv_capacity_tokens:,} tokens"
        )
    fresh = Trace.from_arrays(
        arrival_s=trace.arrival_s,
        prompt_tokens=trace.prompt_tokens,
        output_tokens=trace.output_tokens,
        name=trace.name,
    )
    simulated = {cap: _simulated(fresh, profile, cap) for cap in batch_caps}
    live = asyncio.run(_live(engine, fresh, batch_caps, repeats, on_progress or (lambda done, total, label: None)))
    return [LatencyComparison(cap, tuple(live[cap]), simulated[cap]) for cap in batch_caps]


def _simulated(trace: Trace, profile: EngineProfile, cap: int) -> Latencies:
    found = simulate(trace, profile, replicas=1, batch_cap=cap)
    return Latencies(
        ttft_s=found.ttft_s,
        tpot_s=found.tpot_s,
        e2e_s=found.finish_s - trace.arrival_s,
        makespan_s=float(found.finish_s.max() - trace.arrival_s[0]),
        output_tokens=int(trace.output_tokens.sum()),
    )


async def _live(
    engine: Engine, trace: Trace, batch_caps: Sequence[int], repeats: int, tell: Progress
) -> dict[int, list[Latencies]]:
    found: dict[int, list[Latencies]] = {cap: [] for cap in batch_caps}
    total = len(trace) * len(batch_caps) * repeats
    done = 0

    def one_more(label: str) -> Callable[[], None]:
        def count() -> None:
            nonlocal done
            done += 1
            tell(done, total, label)

        return count

    async with engine:
        for turn in range(repeats):
            for cap in batch_caps:
                served = await open_loop(
                    engine,
                    list(trace.arrival_s),
                    list(trace.prompt_tokens),
                    list(trace.output_tokens),
                    cap,
                    seed=PROMPT_SEED * (1 + turn) + cap * len(trace),
                    on_served=one_more(f"batch cap {cap}, run {turn + 1} of {repeats}"),
                )
                finish_s = np.array([one.finish_s for one in served])
                found[cap].append(
                    Latencies(
                        ttft_s=np.array([one.ttft_s for one in served]),
                        tpot_s=np.array([one.tpot_s for one in served]),
                        e2e_s=np.array([one.e2e_s for one in served]),
                        makespan_s=float(finish_s.max() - trace.arrival_s[0]),
                        output_tokens=sum(one.output_tokens for one in served),
                    )
                )
    return found

"""Sweep a live engine: closed loops over concurrency, prompt and output lengths, a row per point, resumable.

This module must not know about fits.
"""

from __future__ import annotations

import asyncio
import csv
import itertools
import os
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from envs.cluster.closed_loop import LoadProtocol, loop_lengths
from policies.engine import ConfigError
from training.profiling.csv_rows import read_rows
from training.profiling.load_client import Engine, EngineFailed, closed_loop, counter_total, kv_capacity_tokens
from training.profiling.measurements import unidentified

ROW_COLUMNS = (
    "model",
    "prompt_tokens",
    "output_tokens",
    "concurrency",
    "requests_per_client",
    "length_spread",
    "ttft_ms",
    "ttft_p90_ms",
    "tpot_ms",
    "requests",
    "seconds",
    "preemptions",
)
MIN_REQUESTS = 12
"""Requests of a point, however few its clients."""
REQUESTS_PER_CLIENT = 4
LENGTH_SPREAD = 0.25
"""Output lengths vary by this share, so that clients do not move in lock-step."""
LENGTH_TOLERANCE = 0.02
"""Share by which served lengths may differ from those asked for."""

Point = tuple[int, int, int]
"""Prompt tokens, output tokens, concurrency."""
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Sweep:
    """What to measure.

    Attributes:
        prompt_tokens: lengths, at least two different ones.
        output_tokens: mean lengths.
        concurrency: clients.
        max_minutes: after which no request is sent any more.
    """

    prompt_tokens: Sequence[int]
    output_tokens: Sequence[int]
    concurrency: Sequence[int]
    max_minutes: float

    def points(self) -> list[Point]:
        """Every combination; the corners come first, so that a sweep cut short still tells the coefficients apart."""
        prompts, outputs, clients = (
            sorted(set(axis)) for axis in (self.prompt_tokens, self.output_tokens, self.concurrency)
        )
        ends = itertools.product({prompts[0], prompts[-1]}, {outputs[0], outputs[-1]}, {clients[0], clients[-1]})
        corners = sorted(ends)
        others = [point for point in itertools.product(prompts, outputs, clients) if point not in corners]
        order = np.random.default_rng(0).permutation(len(others))
        return corners + [others[index] for index in order]

    def check(self, fixed: Collection[str]) -> None:
        """Refuse a sweep that cannot tell the coefficients that are not `fixed`.

        Raises:
            ConfigError: naming them and what helps.
        """
        missing = [name for name in unidentified(self.prompt_tokens, self.concurrency) if name not in fixed]
        if missing:
            raise ConfigError(
                f"the sweep cannot identify {', '.join(missing)}: give --prompt and --concurrency two values or more "
                "(or --fix NAME=VALUE)"
            )


@dataclass(frozen=True)
class SweepResult:
    """How a sweep ended.

    Attributes:
        model: the engine's name for it.
        done: points with a row.
        points: points planned.
        kv_capacity_tokens: as the engine reports it, None where it does not.
    """

    model: str
    done: int
    points: int
    kv_capacity_tokens: int | None


def measure(engine: Engine, sweep: Sweep, rows_file: Path, on_progress: Progress | None = None) -> SweepResult:
    """Measure every point that `rows_file` does not hold yet; each row is on disk before the next point starts.

    Raises:
        ConfigError: when `rows_file` holds another table or another model's rows.
        EngineFailed: when the engine cannot be reached, dies or does not honour the lengths asked for.
    """
    return asyncio.run(_measure(engine, sweep, rows_file, on_progress or (lambda done, total, label: None)))


async def _measure(engine: Engine, sweep: Sweep, rows_file: Path, tell: Progress) -> SweepResult:
    deadline_s = time.monotonic() + sweep.max_minutes * 60.0
    async with engine:
        done = _rows_done(rows_file, engine.model)
        points = sweep.points()
        capacity = kv_capacity_tokens(await engine.metrics())
        finished = sum(point in done for point in points)
        for point in points:
            if point in done:
                continue
            tell(finished, len(points), f"{point[2]} clients, {point[0]} + {point[1]} tokens")
            left_s = deadline_s - time.monotonic()
            if left_s <= 0.0:
                break
            try:
                async with asyncio.timeout(left_s):
                    row = await _measure_point(engine, point)
            except TimeoutError:
                break
            except EngineFailed as error:
                raise EngineFailed(
                    f"{error} ({finished} of {len(points)} points are in {rows_file}; run the same command to go on)"
                ) from None
            _append(rows_file, row)
            finished += 1
        tell(finished, len(points), "done")
    return SweepResult(engine.model, finished, len(points), capacity)


async def _measure_point(engine: Engine, point: Point) -> dict[str, object]:
    prompt, output, concurrency = point
    per_client = max(REQUESTS_PER_CLIENT, -(-MIN_REQUESTS // concurrency))
    protocol = LoadProtocol(requests_per_client=per_client, length_spread=LENGTH_SPREAD)
    lengths = loop_lengths(protocol, output, concurrency)
    await engine.complete(prompt, 2, seed=_seed(point) - 1)
    before = await engine.metrics()
    started_s = time.monotonic()
    served = await closed_loop(engine, prompt, [int(length) for length in lengths], concurrency, _seed(point))
    seconds = time.monotonic() - started_s
    after = await engine.metrics()
    for name, got, asked in (
        ("prompts", np.array([one.prompt_tokens for one in served]), np.full(len(served), prompt)),
        ("outputs", np.array([one.output_tokens for one in served]), lengths),
    ):
        off = abs(got.sum() / asked.sum() - 1.0)
        if off > LENGTH_TOLERANCE + len(served) / asked.sum():
            raise EngineFailed(
                f"{engine.url}: served {name} of {got.mean():.0f} tokens on average where {asked.mean():.0f} were "
                "asked for: the engine must honour max_tokens with ignore_eos, and its context must hold them"
            )
    ttft_ms = np.array([one.ttft_s for one in served]) * 1e3
    tpot_ms = np.array([one.tpot_s for one in served]) * 1e3
    return {
        "model": engine.model,
        "prompt_tokens": prompt,
        "output_tokens": output,
        "concurrency": concurrency,
        "requests_per_client": per_client,
        "length_spread": LENGTH_SPREAD,
        "ttft_ms": round(float(ttft_ms.mean()), 4),
        "ttft_p90_ms": round(float(np.percentile(ttft_ms, 90)), 4),
        "tpot_ms": round(float(np.nanmean(tpot_ms)), 5),
        "requests": len(served),
        "seconds": round(seconds, 2),
        "preemptions": int(
            counter_total(after, "num_preemptions_total") - counter_total(before, "num_preemptions_total")
        ),
    }


def _seed(point: Point) -> int:
    """Of a point's prompts: different points must not share prefixes."""
    return int(np.random.default_rng(point).integers(1, 1 << 40))


def _rows_done(rows_file: Path, model: str) -> set[Point]:
    """Points that the file holds; an empty file holds none."""
    if not rows_file.exists() or not rows_file.stat().st_size:
        return set()
    rows = read_rows(rows_file)
    if rows.header != ROW_COLUMNS:
        raise ConfigError(f"{rows_file}: is no table of a sweep; name another file with --rows")
    done = set()
    for line, row in rows.lines:
        if row["model"] != model:
            raise ConfigError(
                f"{rows_file}: line {line}: was measured on {row['model']!r}, the engine serves {model!r}; "
                "name another file with --rows"
            )
        try:
            prompt, output, concurrency = (int(row[name]) for name in ROW_COLUMNS[1:4])
            whole = all(float(row[name]) >= 0.0 for name in ROW_COLUMNS[4:])
        except ValueError:
            whole = False
        if not whole:
            raise ConfigError(f"{rows_file}: line {line}: is damaged; remove that line and run the same command again")
        done.add((prompt, output, concurrency))
    return done


def _append(rows_file: Path, row: dict[str, object]) -> None:
    before = rows_file.read_bytes() if rows_file.exists() else b""
    with rows_file.open("a", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, ROW_COLUMNS)
        if not before:
            writer.writeheader()
        elif not before.endswith((b"\n", b"\r")):
            out.write("\n")
        writer.writerow(row)
        out.flush()
        os.fsync(out.fileno())

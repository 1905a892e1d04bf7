"""Sessions of coding agents: calls that wait for a tool or a person, over a prompt that grows and is cached.

The tables are quantiles measured on 441 recorded sessions of an agentic coding tool; samples follow straight lines
between them on a log scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CACHE_BLOCK_TOKENS = 64
MAX_CONTEXT_TOKENS = 900_000


@dataclass(frozen=True)
class Quantiles:
    """A positive quantity given by measured quantiles.

    Attributes:
        levels: probabilities, rising from 0 to 1.
        values: the quantiles, rising, above 0.
    """

    levels: tuple[float, ...]
    values: tuple[float, ...]

    def at(self, uniform: NDArray[np.float64]) -> NDArray[np.float64]:
        """Values at the given probabilities, same shape."""
        return np.exp(np.interp(uniform, self.levels, np.log(self.values)))


CALLS = Quantiles((0, 0.05, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95, 0.99, 1), (3, 5, 7, 18, 46, 94, 157, 234, 340, 561))
FIRST_PROMPT_TOKENS = Quantiles(
    (0, 0.05, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95, 0.99, 1),
    (8_979, 13_048, 15_446, 19_105, 65_044, 115_360, 283_778, 417_531, 787_497, 851_858),
)
# Growth of the prompt from call to call: the previous output and what a tool or a person added.
GROWTH_TOKENS = Quantiles(
    (0, 0.05, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95, 0.99, 0.998, 0.9995, 1),
    (18, 159, 214, 374, 719, 1_614, 3_466, 6_004, 15_675, 50_000, 90_000, 400_000),
)
OUTPUT_TOKENS = Quantiles(
    (0, 0.01, 0.05, 0.25, 0.50, 0.75, 0.90, 0.95, 0.99, 1), (2, 59, 94, 147, 241, 462, 915, 1_570, 3_612, 18_195)
)
AFTER_TOOL_S = Quantiles((0, 0.05, 0.25, 0.50, 0.75, 0.90, 0.99, 1), (2, 4, 6, 9, 20, 67, 607, 3_600))
AFTER_PERSON_S = Quantiles((0, 0.10, 0.50, 0.90, 0.99, 1), (5, 14, 101, 1_634, 14_000, 70_000))
# Share of calls after a person that makes the mix of the two tables match the recorded gaps.
PERSON_SHARE = 0.09
# The recorded server time of a call is close to a fixed part and a constant speed: p50 6.4 s, p90 18 s, p99 55 s.
CALL_FIXED_S = 2.5
CALL_TOKENS_PER_S = 65.0
# A model with a window of 200,000 tokens summarises its history a little before it is full.
COMPACT_AT_TOKENS = (135_000, 168_000)
AFTER_COMPACTION_TOKENS = Quantiles((0, 0.05, 0.25, 0.50, 0.75, 1), (11_000, 21_800, 39_700, 70_000, 103_000, 125_000))
LARGE_WINDOW_SHARE = 0.22
# Sessions that start with a large prompt are short: median 51 calls below 20,000 tokens, 15 above 400,000. The measured
# correlation of the logs is -.34; only a stronger one makes the largest prompts as rare among calls as measured.
CALLS_FIRST_PROMPT_CORRELATION = -0.6
# What survives a compaction or a lost cache is the tools-and-system prefix.
SYSTEM_PREFIX_TOKENS = 15_000
CACHE_LOSS_SHARE = 0.013


@dataclass(frozen=True)
class AgentCalls:
    """Calls of many sessions, session after session; arrays of shape ``(calls,)``.

    Attributes:
        session: index of the call's session.
        since_start_s: seconds from the session's first call.
        prompt_tokens: prompt tokens.
        output_tokens: output tokens.
        prefix_hit_tokens: cached prompt tokens.
    """

    session: NDArray[np.int64]
    since_start_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    prefix_hit_tokens: NDArray[np.int64]


def sample_sessions(sessions: int, rng: np.random.Generator) -> AgentCalls:
    """Draw whole sessions."""
    first_normal = rng.standard_normal(sessions)
    own = np.sqrt(1 - CALLS_FIRST_PROMPT_CORRELATION**2)
    calls_normal = CALLS_FIRST_PROMPT_CORRELATION * first_normal + own * rng.standard_normal(sessions)
    calls = np.rint(CALLS.at(_ranks(calls_normal, rng))).astype(np.int64)
    first_prompt = FIRST_PROMPT_TOKENS.at(_ranks(first_normal, rng))
    total = int(calls.sum())
    starts = np.cumsum(calls) - calls
    output = np.rint(OUTPUT_TOKENS.at(rng.uniform(size=total)))
    growth = np.rint(GROWTH_TOKENS.at(rng.uniform(size=total)))
    person = rng.uniform(size=total) < PERSON_SHARE
    level = rng.uniform(size=total)
    think_s = np.where(person, AFTER_PERSON_S.at(level), AFTER_TOOL_S.at(level))
    gap_s = np.roll(CALL_FIXED_S + output / CALL_TOKENS_PER_S, 1) + think_s
    gap_s[starts] = 0.0
    elapsed_s = np.cumsum(gap_s)
    since_start_s = elapsed_s - np.repeat(elapsed_s[starts], calls)

    limit = rng.uniform(*COMPACT_AT_TOKENS, sessions)
    large = (first_prompt > limit) | (rng.uniform(size=sessions) < LARGE_WINDOW_SHARE)
    limit[large] = MAX_CONTEXT_TOKENS
    prompt = np.empty(total)
    compacted = np.zeros(total, bool)
    for first, count, prompt_start, max_tokens in zip(starts, calls, first_prompt, limit, strict=True):
        growth[first] = prompt_start
        at = first
        while at < first + count:
            grown = np.cumsum(growth[at : first + count])
            fitting = max(1, int(np.searchsorted(grown, max_tokens, "right")))
            prompt[at : at + fitting] = np.minimum(grown[:fitting], MAX_CONTEXT_TOKENS)
            at += fitting
            if at < first + count:
                compacted[at] = True
                growth[at] = float(AFTER_COMPACTION_TOKENS.at(rng.uniform(size=1))[0])
    prompt = np.rint(prompt)
    cold = compacted | (rng.uniform(size=total) < CACHE_LOSS_SHARE)
    previous = np.roll(prompt, 1)
    hit = np.minimum(np.where(cold, SYSTEM_PREFIX_TOKENS, previous), np.minimum(previous, prompt))
    hit = np.floor(hit / CACHE_BLOCK_TOKENS) * CACHE_BLOCK_TOKENS
    hit[starts] = 0.0
    return AgentCalls(
        session=np.repeat(np.arange(sessions), calls),
        since_start_s=since_start_s,
        prompt_tokens=prompt.astype(np.int64),
        output_tokens=output.astype(np.int64),
        prefix_hit_tokens=hit.astype(np.int64),
    )


def _ranks(values: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Turn values into uniform ones of the same order: one in each of as many equal slices of 0..1."""
    order = np.argsort(np.argsort(values, kind="stable"), kind="stable")
    uniform: NDArray[np.float64] = (order + rng.uniform(size=len(values))) / max(1, len(values))
    return uniform

"""What a measurement can be: one table of bounds, and the measurements that cannot be true together.

An impossible value is a missing one, by name: an engine that reports a gauge of 0 while it serves, per cent for a
share, or more cache hits than prompts would otherwise be believed, and scaled by.
This module must not know what a missing value leads to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from autoscaler.metrics.latency_histograms import Buckets, mean_at_least
from autoscaler.metrics.presets import SIGNALS
from autoscaler.problem_texts import some_of
from policies.contract import Bools, Floats
from policies.engine import EngineProfile
from policies.spec import ScalingSpec

FASTER = 50.0
"""An engine may be so many times faster than its profile: newer hardware, several ranks in a replica."""
HITS = 1.05
"""Cache hits over prompt tokens that the moments of counting explain: hits count before their prompts do."""
TOKENS_PER_STEP = 8.0
"""A sequence may be given so many tokens in the shortest iteration of the profile: speculation, newer hardware."""
NO_MORE_THAN = {"cached": "prompt"}
"""Counters of which no target counts more than of another: of each also where the others' make up for it."""
NO_MORE_WINDOWS = 4.0
"""Over so many windows together: hits of few long prompts may be in one window, and the prompts in the next."""
FEWEST = 0.5
"""Running requests over those that must run, below which the gauge is wrong; TPOT is that of requests that ended."""
ENOUGH = 24.0
"""So many requests must have run in the windows before a gauge is doubted that showed too few in each of them: by
chance, none of few runs at the moment of a scrape. Of so many, independent ones are missed once in 10^10 times."""
HELD = 2.0
"""Full KV caches over running requests, each of which holds one at most."""


@dataclass(frozen=True)
class Bound:
    """What a signal of a service can be at most; the least is 0.

    Attributes:
        highest: for the service, in the signal's unit.
        per_replica: and for each replica, from its profile.
        hint: what else it may be, in words.
    """

    highest: float = np.inf
    per_replica: Callable[[EngineProfile], float] | None = None
    hint: str = ""


def _generated_tps(profile: EngineProfile) -> float:
    base_s, _, sequence_s, *_ = profile.step.seconds
    return FASTER * profile.max_num_seqs / (base_s + sequence_s * profile.max_num_seqs)


def _prefilled_tps(profile: EngineProfile) -> float:
    _, token_s, *_ = profile.step.seconds
    return FASTER / token_s if token_s > 0 else np.inf


BACKWARDS = "a counter that goes back?"
BOUNDS: dict[str, Bound] = {
    # A share; engines overshoot it by a few blocks.
    "kv_cache_usage": Bound(highest=1.05, hint="in per cent?"),
    # A request holds a token of the KV cache.
    "running": Bound(per_replica=lambda profile: profile.kv_capacity_tokens, hint="a counter?"),
    "waiting": Bound(highest=1e7, hint="a counter?"),
    "queue": Bound(highest=1e7, hint="a counter?"),
    "queue_mean": Bound(highest=1e7, hint="a counter?"),
    "generation": Bound(per_replica=_generated_tps, hint=BACKWARDS),
    # Prompt tokens include those from the cache, which cost nothing; what is computed of them is bounded below.
    "prompt": Bound(highest=1e9, hint=BACKWARDS),
    "cached": Bound(highest=1e9, hint=BACKWARDS),
    "prefill": Bound(per_replica=_prefilled_tps, hint=BACKWARDS),
    "finished": Bound(highest=1e5, hint=BACKWARDS),
    "arrival": Bound(highest=1e5, hint=BACKWARDS),
    "prompt_sum": Bound(highest=1e9, hint=BACKWARDS),
    "output_sum": Bound(highest=1e9, hint=BACKWARDS),
    "length_count": Bound(highest=1e5, hint=BACKWARDS),
    "ttft_bucket": Bound(highest=1e5, hint=BACKWARDS),
    "tpot_bucket": Bound(highest=1e9, hint=BACKWARDS),
    "batch_cap": Bound(highest=1e6),
    "replicas_target": Bound(highest=1e5),
    "replicas_ready": Bound(highest=1e5),
}
"""Signals of `presets.SIGNALS`, and the prefill that is made of two of them. Edges: `LARGEST_EDGE_S`."""
REPLICA_COUNTS = ("replicas_target", "replicas_ready")
TOO_FEW = ", and too few are left"
LARGEST_EDGE_S = {"ttft_bucket": 7200.0, "tpot_bucket": 600.0}
"""The largest finite edge of a latency histogram in seconds; one in milliseconds has larger ones."""


def most_of_a_target(signal: str, specs: Sequence[ScalingSpec]) -> float:
    """What one target of any of these services can report; infinite where targets are not added up.

    Of several services the largest: the exact bound of a service is that of its sum.
    """
    bound = BOUNDS.get(signal)
    if bound is None or SIGNALS[signal].targets == "max":
        return np.inf
    if bound.per_replica is None:
        return bound.highest
    return max(bound.per_replica(pool.engine) for spec in specs for pool in spec.pools)


@dataclass(frozen=True)
class LeftOut:
    """Targets of one signal of one service that report what cannot be.

    Attributes:
        values: what each reports, by its name.
        highest: what one can report at most.
        targets: how many targets there should be; NaN where nobody knows.
    """

    values: Mapping[str, float]
    highest: float
    targets: float

    def too_few(self, least: float) -> bool:
        """Whether those that are left are less than this share, so that their sum is not the service's."""
        return not self.targets - len(self.values) >= least * self.targets


class Plausibility:
    """Judges every reading of `n` services.

    Args:
        specs: the services.
        window_s: window of rates, seconds.
        min_coverage: least share of a service's targets that must be left, where others report what cannot be.
    """

    def __init__(self, specs: Sequence[ScalingSpec], window_s: float, min_coverage: float) -> None:
        self._min_coverage = min_coverage
        self._services = tuple(spec.service for spec in specs)
        self._window_s = window_s
        self._shape = (len(specs), max(len(spec.pools) for spec in specs))
        self._per_replica: dict[str, Floats] = {}
        for signal, bound in BOUNDS.items():
            if bound.per_replica is not None:
                self._per_replica[signal] = limits = np.zeros(self._shape)
                for row, spec in enumerate(specs):
                    for column, pool in enumerate(spec.pools):
                        limits[row, column] = bound.per_replica(pool.engine)
        steps_s = [min(pool.engine.step.seconds[0] for pool in spec.pools) for spec in specs]
        self._fastest_s = np.array(steps_s) / TOKENS_PER_STEP  # (n,) per token of a sequence
        self._missed = np.zeros(len(specs))  # (n,) requests that must have run in windows that showed too few
        self._judged_s = -np.inf
        self._since_s: dict[str, Floats] = {}  # (n,) since when measurements contradict each other, NaN when they don't
        self.counts: dict[tuple[str, str], int] = {}
        """How often a value was impossible, by service and signal."""

    def counts_of_replicas(self, values: Mapping[str, Floats], problems: list[str]) -> dict[str, Floats]:
        """The counts of replicas among the signals, without what is impossible: the bounds of others hang on them."""
        unknown = np.full(self._shape, np.nan)
        return {one: self._bounded(one, values[one], unknown, problems) for one in REPLICA_COUNTS if one in values}

    def without(
        self,
        values: Mapping[str, Floats],
        left_out: Mapping[str, Mapping[int, LeftOut]],
        problems: list[str],
    ) -> dict[str, Floats]:
        """The signals without those of which too few targets are left.

        Args:
            values: signals by name, (n,) by service or (n, P) by pool.
            left_out: by signal and place of the service, what cannot be.
            problems: told what is left out, in words.
        """
        found = {signal: value.copy() for signal, value in values.items()}
        for signal, by_row in left_out.items():
            for row, out in by_row.items():
                few = out.too_few(self._min_coverage)
                if few:
                    found[signal][row] = np.nan
                what = self._impossible(signal, out.values[min(out.values)], out.highest)
                self._say(row, signal, f"{what}; left out: {some_of(sorted(out.values))}{TOO_FEW * few}", problems)
        return found

    def possible(
        self,
        values: Mapping[str, Floats],
        tpot: Buckets,
        replicas: Floats,
        scraped: Floats,
        now_s: float,
        problems: list[str],
    ) -> dict[str, Floats]:
        """The signals without what is impossible.

        Args:
            values: signals by name, (n,) by service or (n, P) by pool.
            tpot: latencies of the window, by which running requests can be told from tokens.
            replicas: (n, P) replicas that may serve; NaN where unknown.
            scraped: (n, P) replicas that are scraped; NaN where none is.
            now_s: time of the reading.
            problems: told what is impossible, in words.
        """
        found = {signal: self._bounded(signal, value, replicas, problems) for signal, value in values.items()}
        found = self._no_more_hits_than_prompts(found, replicas, problems)
        found = self._enough_running(found, tpot, now_s, problems)
        return self._kv_of_running(found, scraped, now_s, problems)

    def seconds(self, signal: str, buckets: Buckets, left_out: Mapping[int, LeftOut], problems: list[str]) -> Buckets:
        """A latency histogram, without those of services whose edges are no seconds, or of which too few are left."""
        edges, _, own, total = buckets
        if not len(edges):
            return buckets
        largest_s = np.where(own, edges, 0.0).max(axis=1)
        odd = (largest_s > LARGEST_EDGE_S[signal]) & ~np.isnan(total)
        for row in np.flatnonzero(odd).tolist():
            self._say(row, signal, f"has a bucket edge of {largest_s[row]:g} s: in milliseconds?", problems)
        odd[[row for row, out in left_out.items() if out.too_few(self._min_coverage)]] = True
        return buckets._replace(total=np.where(odd, np.nan, total))

    def _bounded(self, signal: str, value: Floats, replicas: Floats, problems: list[str]) -> Floats:
        bound = BOUNDS.get(signal)
        if bound is None:
            return value
        highest = np.full(value.shape, bound.highest)
        if bound.per_replica is not None:
            limits = self._per_replica[signal] * np.maximum(replicas, 1.0)
            highest = np.fmin(highest, limits if value.ndim == 2 else limits.sum(axis=1))
        with np.errstate(invalid="ignore"):
            odd = (value < 0) | (value > highest) | np.isinf(value)  # nothing is larger than an unknown limit
        for at in map(tuple, np.argwhere(odd).tolist()):
            self._say(at[0], signal, self._impossible(signal, value[at], highest[at]), problems)
        return np.where(odd, np.nan, value)

    @staticmethod
    def _impossible(signal: str, value: float, highest: float) -> str:
        if np.isnan(value):
            return "reports NaN"
        hint = f" ({BOUNDS[signal].hint})" if BOUNDS[signal].hint and 0 < value < np.inf else ""
        if 0 <= value <= highest:
            return f"reports {value:.1f} tokens/s, more than its prompt tokens"
        limit = "at least 0" if value < 0 else f"at most {highest:.4g}"
        return f"reports {value:.4g}, but {limit} is possible{hint}"

    def _no_more_hits_than_prompts(
        self, values: dict[str, Floats], replicas: Floats, problems: list[str]
    ) -> dict[str, Floats]:
        """Engines count a hit whenever they try to schedule a request: under load, several times."""
        if "prompt" not in values:
            return values
        prompt, cached = values["prompt"], values.get("cached", np.full(self._shape[0], np.nan))
        with np.errstate(invalid="ignore"):
            odd = cached > HITS * prompt
        for row in np.flatnonzero(odd).tolist():
            self._say(
                row, "cached", f"reports {cached[row]:.1f} tokens/s of {prompt[row]:.1f} prompt tokens/s", problems
            )
        cached = np.where(odd, np.nan, cached)
        prefill = np.maximum(prompt - np.nan_to_num(cached), 0.0)
        return values | {"cached": cached, "prefill": self._bounded("prefill", prefill, replicas, problems)}

    def _enough_running(
        self, values: dict[str, Floats], tpot: Buckets, now_s: float, problems: list[str]
    ) -> dict[str, Floats]:
        """By Little's law, tokens per second times the time of a token is how many requests generate them."""
        if "running" not in values or "generation" not in values:
            return values
        must = values["generation"] * np.fmax(mean_at_least(tpot), self._fastest_s)
        running = values["running"].sum(axis=1)
        windows = np.clip((now_s - self._judged_s) / self._window_s, 0.0, 1.0)  # that are new since the last reading
        self._judged_s = now_s
        with np.errstate(invalid="ignore"):
            few = running < FEWEST * must
        self._missed = np.where(few, self._missed + must * windows, 0.0)
        odd = self._lasting("running", few, now_s) & (self._missed >= ENOUGH)
        for row in np.flatnonzero(odd).tolist():
            detail = f"{values['generation'][row]:.1f} tokens/s need {must[row]:.1f} at least"
            self._say(row, "running", f"reports {running[row]:.1f}, but {detail}", problems)
        return values | {"running": np.where(odd[:, np.newaxis], np.nan, values["running"])}

    def _kv_of_running(
        self, values: dict[str, Floats], scraped: Floats, now_s: float, problems: list[str]
    ) -> dict[str, Floats]:
        """A request is on one replica and holds at most its KV cache; cached blocks of nobody are not in use."""
        if "running" not in values or "kv_cache_usage" not in values:
            return values
        # The usage is a mean over what is scraped: replicas that are only starting have no part in it.
        full = np.nansum(values["kv_cache_usage"] * np.nan_to_num(scraped), axis=1)
        running = values["running"].sum(axis=1)
        with np.errstate(invalid="ignore"):
            odd = self._lasting("kv_cache_usage", full > HELD * np.maximum(running, 1.0), now_s)
        for row in np.flatnonzero(odd).tolist():
            detail = f"reports {full[row]:.1f} full caches for {running[row]:.1f} running requests (cached blocks too?)"
            self._say(row, "kv_cache_usage", detail, problems)
        return values | {"kv_cache_usage": np.where(odd[:, np.newaxis], np.nan, values["kv_cache_usage"])}

    def _lasting(self, rule: str, odd: Bools, now_s: float) -> Bools:
        """(n,) True where it has been so for two windows: a gauge is of one moment, and a burst may just have ended."""
        since_s = self._since_s.get(rule, np.full(len(odd), np.nan))
        since_s = np.where(odd, np.where(np.isnan(since_s) | (since_s > now_s), now_s, since_s), np.nan)
        self._since_s[rule] = since_s
        lasting: Bools = now_s - since_s >= 1.9 * self._window_s
        return lasting

    def _say(self, row: int, signal: str, what: str, problems: list[str]) -> None:
        service = self._services[row]
        problems.append(f"{signal}: {service} {what}")
        self.counts[service, signal] = self.counts.get((service, signal), 0) + 1

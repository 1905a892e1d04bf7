"""The clairvoyant plan: what a controller that knew the traffic would have done, proved in the simulator.

1. *Demand*: the replicas that each control interval's work needs, from the step-time model (`demand_of`).
2. *Path*: the cheapest path of ready replicas over that demand times a headroom, where every start is billed for its
   boot: a dynamic programme, O(intervals x replicas) (`cheapest_path`). Several headrooms, splits over the pools and
   batch caps, and the best static fleet, are the first plans.
3. *Replay and repair*: they are replayed side by side in the real cluster model; those that miss the SLO get replicas
   ahead of the misses.
4. *Lowering*: local search takes replicas away, over shorter and shorter stretches of time, as long as the SLO holds.

The result is an upper bound on the optimum, and it is never dearer than the best static fleet. Batch caps are constant
in a plan, so a policy that moves them may come out cheaper.
This module must not know about policies.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from envs.traffic.trace import Trace
from policies.contract import Floats, Ints
from policies.fleet import Fleet
from policies.spec import ScalingSpec
from training.references.timetable import Timetable, TimetablePolicy, starting_at, unguarded
from training.replaying.world import World

HEADROOMS = (0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0)
SHARES = (1.0, 0.5, 0.0)
"""Shares of the work that the first pool takes, where there are several; the others share the rest evenly."""
MAX_ROWS = 4_000_000
"""Requests in one batch of replays: what keeps its memory below about 200 MB."""
REPAIRS = 3
COLD_START_MARGIN = 1.15
"""Starts are asked for this much earlier than their mean duration."""


@dataclass(frozen=True, eq=False)
class Trial:
    """A plan and what its replay found."""

    plan: Timetable
    usd: float
    attainment: float
    missed_s: Floats  # (misses,) arrival times of the requests that missed


class Bench:
    """Replays plans for one service on one trace, side by side, and counts them.

    Args:
        spec: the service, its own guardrails included.
        trace: its requests.
        seed: of cold starts and reclaims.
        width: plans replayed at once.
    """

    def __init__(self, spec: ScalingSpec, trace: Trace, seed: int, width: int = 16) -> None:
        self.spec = unguarded(spec)
        self.trace = trace
        self.seed = seed
        self.width = int(np.clip(MAX_ROWS // max(len(trace), 1), 2, width))
        self.replays = 0
        window = spec.interface.window
        self.interval_s = window.control_interval_s
        self.horizon_s = max(self.interval_s, trace.duration_s)
        self.ticks = max(1, math.floor(self.horizon_s / self.interval_s + 1e-9))
        self.low = np.array([pool.min_replicas for pool in spec.pools])
        self.high = np.array([pool.max_replicas for pool in spec.pools])
        self._known: dict[bytes, Trial] = {}

    def holds(self, trial: Trial) -> bool:
        """True where the replay met the attainment target."""
        return trial.attainment >= self.spec.slo.attainment

    def constant(self, replicas: Ints, batch_cap: Ints) -> Timetable:
        """A fleet that never changes."""
        return Timetable(np.tile(replicas, (self.ticks, 1)), batch_cap)

    def try_all(self, plans: Sequence[Timetable]) -> list[Trial]:
        """Replay every plan; one that was replayed before is remembered."""
        keys = [plan.replicas.tobytes() + plan.batch_cap.tobytes() for plan in plans]
        new = {key: plan for key, plan in zip(keys, plans, strict=True) if key not in self._known}
        items = list(new.items())
        for start in range(0, len(items), self.width):
            batch = items[start : start + self.width]
            for (key, _), trial in zip(batch, self._replay([plan for _, plan in batch]), strict=True):
                self._known[key] = trial
        return [self._known[key] for key in keys]

    def _replay(self, plans: Sequence[Timetable]) -> list[Trial]:
        self.replays += len(plans)
        specs = [starting_at(self.spec, plan.replicas[0]) for plan in plans]
        n = len(plans)
        world = World(specs, [self.trace] * n, [self.seed] * n)
        replay = world.run(TimetablePolicy(plans, self.spec.interface.window))
        usd = replay.usd()
        trials = []
        for row, plan in enumerate(plans):
            good = replay.verdicts(row).good
            trials.append(Trial(plan, float(usd[row]), float(good.mean()), self.trace.arrival_s[~good]))
        return trials


def batch_caps(spec: ScalingSpec, trace: Trace) -> list[Ints]:
    """Constant caps to try, each (P,): the engines' own, what the TPOT objective allows, and seven tenths of that."""
    own = np.array([pool.engine.max_num_seqs for pool in spec.pools])
    fleet = Fleet.from_specs([spec])
    output = max(float(trace.output_tokens.mean()), 1.0)
    prompt = float(trace.prompt_tokens.mean())
    computed = float(np.maximum(trace.prompt_tokens - trace.prefix_hit_tokens, 1).mean())
    # The context that a running request has on average: long outputs run longer.
    steps = trace.output_tokens.astype(np.float64)
    context = float((steps * (trace.prompt_tokens + steps / 2)).sum() / steps.sum())
    prefill_s = fleet.b[0] + fleet.e[0] * (prompt - computed / 2)
    token_s = fleet.c[0] + fleet.d[0] * context + prefill_s * computed / output
    by_pace = (spec.slo.tpot_s - fleet.a[0]) / np.maximum(token_s, 1e-12)
    limit = np.clip(np.minimum(by_pace, fleet.kv_capacity[0] / context), 1, own).astype(np.int64)
    caps = [own, limit, np.maximum(1, (limit * 0.7).astype(np.int64))]
    return [cap for index, cap in enumerate(caps) if not any((cap == other).all() for other in caps[:index])]


def demand_of(spec: ScalingSpec, trace: Trace, batch_cap: Ints, interval_s: float, intervals: int) -> Floats:
    """Replicas (intervals, P) of each pool that would keep up with all the work as it falls due, in batches of the cap.

    Prefill falls due on arrival, output evenly over the time that it takes at nine tenths of the TPOT objective.
    """
    edges = np.arange(intervals + 1) * interval_s
    demand = np.zeros((intervals, len(spec.pools)))
    prompt = trace.prompt_tokens.astype(np.float64)
    cached = np.minimum(trace.prefix_hit_tokens, np.maximum(trace.prompt_tokens - 1, 0))
    computed = prompt - cached
    steps = trace.output_tokens - 1.0
    spoken_s = np.maximum(0.9 * spec.slo.tpot_s * steps, 1e-3)
    for column, pool in enumerate(spec.pools):
        a, b, c, d, e = pool.engine.step.seconds
        context = prompt + steps / 2
        # A batch is as large as the cap, or as what fits the KV cache.
        batch = np.minimum(batch_cap[column], np.maximum(pool.engine.kv_capacity_tokens / context, 1.0))
        prefill_s = computed * (b + e * (cached + computed / 2)) + a * computed / pool.engine.max_num_batched_tokens
        pace = steps * (a / batch + c + d * context) / spoken_s
        started = np.concatenate([trace.arrival_s, trace.arrival_s + spoken_s])
        slope = np.concatenate([pace, -pace])
        order = np.argsort(started, kind="stable")
        at, slope = started[order], slope[order]
        seen = np.searchsorted(at, edges)
        rate = np.concatenate([[0.0], np.cumsum(slope)])[seen]
        offset = np.concatenate([[0.0], np.cumsum(slope * at)])[seen]
        arrived = np.concatenate([[0.0], np.cumsum(prefill_s)])[np.searchsorted(trace.arrival_s, edges)]
        demand[:, column] = np.diff(rate * edges - offset + arrived) / interval_s
    return np.maximum(demand, 0.0)


def cheapest_path(need: Ints, low: int, high: int, boot_intervals: float, initial: int | None = None) -> Ints:
    """Replicas (T,) that cover `need` (T,) at the lowest cost: one per replica and interval, plus every start's boot.

    Args:
        need: fewest replicas per interval.
        low: fewest replicas allowed.
        high: most replicas allowed; a need above counts as this.
        boot_intervals: price of a start, in replica-intervals.
        initial: replicas before the first interval, free when None.
    """
    sizes = np.arange(low, high + 1)
    covered = np.clip(need, low, high)
    came_from = np.zeros((len(need), len(sizes)), np.int64)
    best = np.zeros(len(sizes)) if initial is None else np.where(sizes == initial, 0.0, np.inf)
    if initial is not None and not low <= initial <= high:
        raise ValueError(f"initial replicas {initial} are not between {low} and {high}")
    places = np.arange(len(sizes))
    for index, lowest in enumerate(covered):
        # From below with a boot for each more, or from above for nothing.
        rising = best - boot_intervals * sizes
        below = np.where(rising == np.minimum.accumulate(rising), places, 0)
        below = np.maximum.accumulate(below)
        above = (
            len(sizes)
            - 1
            - np.maximum.accumulate(np.where(best[::-1] == np.minimum.accumulate(best[::-1]), places, 0))[::-1]
        )
        up, down = rising[below] + boot_intervals * sizes, best[above]
        came_from[index] = np.where(down <= up, above, below)
        best = np.minimum(up, down) + sizes
        best[sizes < lowest] = np.inf
    path = np.zeros(len(need), np.int64)
    place = int(np.argmin(best))
    for index in range(len(need) - 1, -1, -1):
        path[index] = sizes[place]
        place = int(came_from[index, place])
    return path


def timetable_of(path: Ints, lead: int) -> Ints:
    """Targets (T - 1,) at the ticks between the intervals of a path (T,), starts asked for `lead` ticks ahead."""
    padded = np.concatenate([path, np.full(lead + 1, path[-1])])
    windows = np.lib.stride_tricks.sliding_window_view(padded, lead + 1)
    targets: Ints = windows.max(axis=1)[1 : len(path)]
    return targets


def first_plans(bench: Bench) -> list[Timetable]:
    """Plans from the dynamic programme: every headroom, split over the pools and batch cap."""
    spec, pools = bench.spec, len(bench.spec.pools)
    splits = [np.ones(1)] if pools == 1 else [_split(share, pools) for share in SHARES]
    plans = []
    for cap in batch_caps(spec, bench.trace):
        demand = demand_of(spec, bench.trace, cap, bench.interval_s, bench.ticks + 1)
        for split in splits:
            for headroom in HEADROOMS:
                columns = [_pool_plan(bench, pool, demand[:, pool] * split[pool] * headroom) for pool in range(pools)]
                plans.append(Timetable(np.stack(columns, axis=1), cap))
    return plans


def _split(share: float, pools: int) -> Floats:
    split = np.full(pools, (1.0 - share) / (pools - 1))
    split[0] = share
    return split


def _pool_plan(bench: Bench, pool: int, demand: Floats) -> Ints:
    settings = bench.spec.pools[pool]
    start = settings.start
    boot_s = start.image_s + start.weights_s + start.warmup_s
    initial = settings.initial_replicas
    path = cheapest_path(
        np.ceil(demand - 1e-9).astype(np.int64),
        settings.min_replicas,
        settings.max_replicas,
        boot_s / bench.interval_s,
        None if initial is None else int(np.clip(initial, settings.min_replicas, settings.max_replicas)),
    )
    return timetable_of(path, _lead(bench, pool))


def _lead(bench: Bench, pool: int) -> int:
    return math.ceil(COLD_START_MARGIN * bench.spec.pools[pool].start.total_s / bench.interval_s)


def repaired(bench: Bench, trial: Trial, add: int) -> Timetable:
    """The plan with `add` more replicas around every control interval that holds its share of the misses.

    In the pool that has most room, from a cold start ahead of the misses until after the last of them.
    """
    tick = np.clip(np.ceil(trial.missed_s / bench.interval_s).astype(np.int64) - 1, 0, bench.ticks - 1)
    missed = np.bincount(tick, minlength=bench.ticks)
    worst = np.argsort(-missed, kind="stable")
    excess = (bench.spec.slo.attainment - trial.attainment) * len(bench.trace)
    enough = int(np.searchsorted(np.cumsum(missed[worst]), max(excess, 1.0) * 1.5)) + 1
    chosen = worst[: max(1, enough)]
    replicas = trial.plan.replicas.copy()
    pool = int(np.argmax(bench.high - replicas[chosen].mean(axis=0)))
    lead = _lead(bench, pool)
    raised = np.zeros(bench.ticks, bool)
    for tick_of_miss in chosen[missed[chosen] > 0]:
        raised[max(0, tick_of_miss - lead - 1) : tick_of_miss + 2] = True
    replicas[raised, pool] = np.minimum(replicas[raised, pool] + add, bench.high[pool])
    return replace(trial.plan, replicas=replicas)


def best_static(bench: Bench) -> Trial:
    """The cheapest constant fleet that holds the SLO; the one with the highest attainment where none does.

    Pools after the first are tried at every size; the first one's is searched, since more replicas serve no worse.
    """
    others = itertools.product(*(range(low, high + 1) for low, high in zip(bench.low[1:], bench.high[1:], strict=True)))
    lanes = list(itertools.product(batch_caps(bench.spec, bench.trace), others))
    # Invariant of a lane: below `lower` nothing holds, `upper` is the smallest known to hold (or past the end).
    lower = [int(bench.low[0])] * len(lanes)
    upper = [int(bench.high[0]) + 1] * len(lanes)
    tried: list[Trial] = []
    while True:
        open_lanes = [lane for lane in range(len(lanes)) if lower[lane] < upper[lane]]
        if not open_lanes:
            break
        each = max(1, bench.width // len(open_lanes))
        asked: list[tuple[int, int]] = []
        for lane in open_lanes:
            points = np.linspace(lower[lane], upper[lane] - 1, min(each, upper[lane] - lower[lane]) + 2)[1:-1]
            asked += [(lane, size) for size in sorted({round(float(point)) for point in points})]
        plans = [bench.constant(np.array([size, *lanes[lane][1]]), lanes[lane][0]) for lane, size in asked]
        for (lane, size), trial in zip(asked, bench.try_all(plans), strict=True):
            tried.append(trial)
            if bench.holds(trial):
                upper[lane] = min(upper[lane], size)
            else:
                lower[lane] = max(lower[lane], size + 1)
        lower = [min(low, high) for low, high in zip(lower, upper, strict=True)]
    return choose(bench, tried)


def choose(bench: Bench, trials: Sequence[Trial]) -> Trial:
    """The cheapest that holds; the one with the highest attainment, then the cheapest, where none does."""
    holding = [trial for trial in trials if bench.holds(trial)]
    if holding:
        return min(holding, key=lambda trial: trial.usd)
    return max(trials, key=lambda trial: (trial.attainment, -trial.usd))


def find_plan(bench: Bench, static: Trial, max_replays: int) -> Trial:
    """The cheapest plan found within about `max_replays` replays.

    Args:
        bench: what to plan for.
        static: the best static fleet, a plan to begin with.
        max_replays: bound on the replays of the whole search.
    """
    tried = [static, *bench.try_all(first_plans(bench))]
    for strength in range(1, REPAIRS + 1):
        best = choose(bench, tried)
        failing = [trial for trial in tried if not bench.holds(trial) and (trial.usd < best.usd or best not in tried)]
        failing = sorted(failing, key=lambda trial: -trial.attainment)[: bench.width // 2]
        mended = [repaired(bench, trial, add) for trial in failing for add in (strength, 2 * strength)]
        tried += bench.try_all(mended)
    best = choose(bench, tried)
    return lowered(bench, best, max_replays) if bench.holds(best) else best


def lowered(bench: Bench, best: Trial, max_replays: int) -> Trial:
    """Take replicas away, over shorter and shorter stretches, as long as the SLO holds."""
    length = bench.ticks
    shortest = max(2, bench.ticks // 64)
    while length >= shortest and bench.replays < max_replays:
        improved = _lower_once(bench, best, length)
        if improved is None:
            length //= 2
        else:
            best = improved
    return best


def _lower_once(bench: Bench, best: Trial, length: int) -> Trial | None:
    """Lower the best stretches of one length together; None when no stretch can be lowered."""
    starts = itertools.product(range(len(bench.low)), range(0, bench.ticks, max(1, length // 2)))
    moves = [plan for pool, start in starts for plan in _without(bench, best.plan, pool, slice(start, start + length))]
    if not moves:
        return None
    singles = bench.try_all(moves)
    gains = []
    for trial in singles:
        saved, misses = best.usd - trial.usd, len(trial.missed_s) - len(best.missed_s)
        if saved > 1e-9 and bench.holds(trial):
            gains.append((misses / saved, trial))
    if not gains:
        return None
    gains.sort(key=lambda item: item[0])
    # Together: the stretches that cost the fewest misses per dollar, as many as the SLO bears.
    combined = []
    sizes = sorted({math.ceil(len(gains) * share) for share in (0.15, 0.3, 0.45, 0.6, 0.8, 1.0)})
    for size in sizes:
        taken = np.maximum.reduce([best.plan.replicas - trial.plan.replicas for _, trial in gains[:size]])
        combined.append(replace(best.plan, replicas=np.maximum(best.plan.replicas - taken, bench.low)))
    return choose(bench, [*bench.try_all(combined), *(trial for _, trial in gains)])


def _without(bench: Bench, plan: Timetable, pool: int, stretch: slice) -> list[Timetable]:
    """The plan with one replica fewer in a stretch of ticks; none where nothing can be taken."""
    replicas = plan.replicas.copy()
    replicas[stretch, pool] = np.maximum(replicas[stretch, pool] - 1, bench.low[pool])
    return [] if (replicas == plan.replicas).all() else [replace(plan, replicas=replicas)]

"""Built-in traffic generator: seeded traces with the burst shape and lengths of published ones.

Three things multiply into the arrival intensity: a daily profile, log-Ornstein-Uhlenbeck processes (a slow one that all
clients share, a fast one per source) and, for code completion, an on/off gate per source. Each source draws its
arrivals as a Gamma renewal process on that intensity.

Scale: a profile was measured at some rate. At ``n`` times that rate, `n` independent sources carry the traffic: bursts
of seconds average out as those of independent clients do, which keeps the index of dispersion and lowers the peak over
the mean, while the slow terms are shared and keep their relative size. `GeneratorSpec.sources` overrides it: one source
keeps the relative bursts of the small service at any rate. Below the measured rate there is one source.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from envs.traffic.agent_sessions import sample_sessions
from envs.traffic.shapes import DRIFT_PHI, SHAPES, Gate, Shape, SteadyProfile
from envs.traffic.trace import Trace, TraceError, merge
from policies.engine import NonNegative, Positive, StrictModel

Profile = Literal["chat", "code", "reasoning", "agentic", "diurnal_mix", "flash_crowd", "regime_change"]
Factor = Callable[[NDArray[np.float64]], NDArray[np.float64]]
FloatArray = NDArray[np.float64]

_DAY_S = 86_400.0
_DRIFT_WINDOW_S = 600.0
_AGENT_PEAK_HOUR = 20.5
_AGENT_MAX_TO_MIN = 2.4
_MAX_REQUESTS = 200_000_000


class GeneratorSpec(StrictModel):
    """What to generate."""

    profile: Profile = Field(description="Kind of traffic.")
    duration_s: Positive = Field(description="Length of the trace, seconds.")
    mean_rps: Positive = Field(
        description="Mean requests per second over the trace; before the event for flash_crowd and regime_change."
    )
    start_hour: float = Field(default=0.0, ge=0, lt=24, description="Hour of the day at which the trace starts.")
    diurnal_max_to_min: float | None = Field(
        default=None, ge=1, le=1000, description="Daily maximum over minimum of the rate; default the profile's own."
    )
    peak_hour: float | None = Field(
        default=None, ge=0, lt=24, description="Hour of the maximum; default the profile's."
    )
    drift_sigma: NonNegative | None = Field(
        default=None, le=3, description="Standard deviation of the log rate over hours; default the profile's own."
    )
    sources: int | None = Field(
        default=None,
        ge=1,
        le=100_000,
        description="Independent sources that share the rate: fewer make harder bursts; default by the measured rate.",
    )
    mix: dict[Literal["chat", "code", "reasoning", "agentic"], Annotated[float, Field(gt=0)]] = Field(
        default={"chat": 0.6, "code": 0.3, "reasoning": 0.1},
        min_length=1,
        description="diurnal_mix: shares of the requests by profile, in any unit; each profile is a tenant.",
    )
    base_profile: SteadyProfile = Field(
        default="chat", description="flash_crowd: the traffic; regime_change: the traffic before the change."
    )
    crowd_peak: float = Field(default=29.0, ge=1, le=10_000, description="flash_crowd: peak over the rate without it.")
    crowd_start: float = Field(default=0.4, ge=0, lt=1, description="flash_crowd: start, as a share of the duration.")
    crowd_rise_s: Positive = Field(default=300.0, description="flash_crowd: linear rise to the peak, seconds.")
    crowd_decay_s: Positive = Field(default=3600.0, description="flash_crowd: time constant of the decay, seconds.")
    after_profile: SteadyProfile = Field(default="reasoning", description="regime_change: traffic after the change.")
    change_at: float = Field(default=0.5, gt=0, lt=1, description="regime_change: time, as a share of the duration.")
    rate_after: Positive = Field(default=0.5, description="regime_change: mean rate after over before the change.")

    @model_validator(mode="after")
    def _fits_in_memory(self) -> GeneratorSpec:
        if self.duration_s * self.mean_rps > _MAX_REQUESTS:
            raise ValueError(f"duration_s * mean_rps must be at most {_MAX_REQUESTS} requests")
        return self


def generate(spec: GeneratorSpec, seed: int) -> Trace:
    """Generate a trace; the same spec and seed give the same trace.

    Raises:
        TraceError: when the seed is negative.
    """
    if seed < 0:
        raise TraceError(f"generate: seed: expected at least 0, got {seed}")
    seeds = np.random.SeedSequence(seed)
    name = f"{spec.profile}-{spec.mean_rps:g}rps-{spec.duration_s:g}s-seed{seed}"
    if spec.profile == "diurnal_mix":
        trace = _mix(spec, seeds)
    elif spec.profile == "regime_change":
        trace = _regime_change(spec, seeds)
    elif spec.profile == "flash_crowd":
        trace = _steady(spec, SHAPES[spec.base_profile], np.random.default_rng(seeds), _crowd(spec))
    elif spec.profile == "agentic":
        trace = _agentic(spec, np.random.default_rng(seeds))
    else:
        trace = _steady(spec, SHAPES[spec.profile], np.random.default_rng(seeds))
    return replace(trace, name=name)


def _steady(spec: GeneratorSpec, shape: Shape, rng: np.random.Generator, event: Factor | None = None) -> Trace:
    """One profile; `event` multiplies the intensity by a factor of the time in seconds."""
    step_s = _step_s(spec, shape)
    steps = max(1, math.ceil(spec.duration_s / step_s))
    step_s = spec.duration_s / steps
    middle_s: FloatArray = (np.arange(steps, dtype=np.float64) + 0.5) * step_s
    drift_sigma = shape.drift_sigma if spec.drift_sigma is None else spec.drift_sigma
    drift_theta_s = -_DRIFT_WINDOW_S / math.log(DRIFT_PHI)
    shared = _daily(spec, middle_s, shape.diurnal_max_to_min, shape.peak_hour)
    shared *= np.exp(_slow_process(middle_s, shape.slow_sigma, shape.slow_theta_s, rng))
    shared *= np.exp(_slow_process(middle_s, drift_sigma, drift_theta_s, rng))
    after_event = 1.0 if event is None else event(middle_s)
    sources = spec.sources or max(1, round(spec.mean_rps / shape.source_rps))
    arrivals = []
    for _ in range(sources):
        intensity = shared.copy()
        if shape.fast_sigma:
            intensity *= np.exp(_process(steps, step_s, shape.fast_sigma, shape.fast_theta_s, rng))
        if shape.gate:
            intensity *= _gate(middle_s, shape.gate, rng)
        # Scaled by its own mean: what is asked for is the mean of this trace, not of all traces that could have been.
        intensity *= spec.mean_rps / sources / intensity.mean() * after_event
        arrivals.append(_renewal_on(intensity, step_s, shape.renewal_cv, rng))
    arrival_s = np.sort(np.concatenate(arrivals))
    return Trace.from_arrays(
        arrival_s,
        shape.prompt.sample(len(arrival_s), rng),
        shape.output.sample(len(arrival_s), rng),
        duration_s=spec.duration_s,
    )


def _agentic(spec: GeneratorSpec, rng: np.random.Generator) -> Trace:
    """Sessions on one clock, those under way at the start included."""
    # Sessions last hours; starting them this long before the trace fills it from its first second.
    lead_s = min(_DAY_S, max(4 * 3600.0, 4 * spec.duration_s))
    wanted = round(spec.mean_rps * spec.duration_s)
    if not wanted:
        return Trace.from_arrays([], [], [], duration_s=spec.duration_s)
    grid_s = np.arange(-lead_s, spec.duration_s, 60.0)
    daily = np.cumsum(_daily(spec, grid_s, _AGENT_MAX_TO_MIN, _AGENT_PEAK_HOUR))
    columns: list[tuple[NDArray[np.generic], ...]] = []
    found = sessions = 0
    batch = 1 + math.ceil(wanted / 60 * (spec.duration_s + lead_s) / spec.duration_s / 2)
    while found < wanted:
        calls = sample_sessions(batch, rng)
        start_s = np.interp(rng.uniform(daily[0], daily[-1], batch), daily, grid_s)
        arrival_s = start_s[calls.session] + calls.since_start_s
        inside = np.flatnonzero((arrival_s >= 0) & (arrival_s < spec.duration_s))
        per_session = np.bincount(calls.session[inside], minlength=batch)
        enough = int(np.searchsorted(found + np.cumsum(per_session), wanted)) + 1
        inside = inside[calls.session[inside] < enough]
        found += len(inside)
        columns.append(
            (
                arrival_s[inside],
                calls.prompt_tokens[inside],
                calls.output_tokens[inside],
                calls.prefix_hit_tokens[inside],
                calls.session[inside] + sessions,
            )
        )
        sessions += batch
    arrival_s, prompt, output, hit, session = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    order = np.argsort(arrival_s, kind="stable")
    _, session_id = np.unique(session, return_inverse=True)
    return Trace.from_arrays(
        arrival_s[order],
        prompt[order],
        output[order],
        prefix_hit_tokens=hit[order],
        session_id=session_id[order],
        duration_s=spec.duration_s,
    )


def _mix(spec: GeneratorSpec, seeds: np.random.SeedSequence) -> Trace:
    """Profiles as tenants, each with its own daily profile."""
    total = sum(spec.mix.values())
    # Sorted, so that the order of keys in a file does not change the trace.
    parts = []
    for (profile, weight), child in zip(sorted(spec.mix.items()), seeds.spawn(len(spec.mix)), strict=True):
        part = spec.model_copy(update={"profile": profile, "mean_rps": spec.mean_rps * weight / total})
        rng = np.random.default_rng(child)
        trace = _agentic(part, rng) if profile == "agentic" else _steady(part, SHAPES[profile], rng)
        parts.append(replace(trace, tenant=np.zeros(len(trace), np.int32), tenants=(profile,)))
    return merge(parts)


def _regime_change(spec: GeneratorSpec, seeds: np.random.SeedSequence) -> Trace:
    """One profile, then from one moment on another."""
    change_s = spec.change_at * spec.duration_s
    first, second = seeds.spawn(2)
    before = spec.model_copy(update={"duration_s": change_s})
    after = spec.model_copy(
        update={
            "duration_s": spec.duration_s - change_s,
            "mean_rps": spec.mean_rps * spec.rate_after,
            "start_hour": (spec.start_hour + change_s / 3600) % 24,
        }
    )
    head = _steady(before, SHAPES[spec.base_profile], np.random.default_rng(first))
    tail = _steady(after, SHAPES[spec.after_profile], np.random.default_rng(second))
    tail = replace(tail, arrival_s=tail.arrival_s + change_s, duration_s=spec.duration_s)
    return merge([head, tail])


def _crowd(spec: GeneratorSpec) -> Factor:
    """Linear rise from 1 to the peak, then exponential decay towards 1."""
    start_s = spec.crowd_start * spec.duration_s

    def factor(time_s: FloatArray) -> FloatArray:
        since_s = time_s - start_s
        rise = np.clip(since_s / spec.crowd_rise_s, 0.0, 1.0)
        decay = np.exp(-np.maximum(since_s - spec.crowd_rise_s, 0.0) / spec.crowd_decay_s)
        return 1.0 + (spec.crowd_peak - 1.0) * rise * decay

    return factor


def _step_s(spec: GeneratorSpec, shape: Shape) -> float:
    """Grid of the intensity: ten steps in the shortest correlation time, at least 1,000 in the trace."""
    shortest_s = min(
        shape.fast_theta_s if shape.fast_sigma else math.inf,
        shape.gate.on_s / 4 if shape.gate else math.inf,
        shape.slow_theta_s if shape.slow_sigma else math.inf,
        100.0,
    )
    return min(shortest_s / 10, spec.duration_s / 1000)


def _daily(spec: GeneratorSpec, time_s: FloatArray, max_to_min: float, peak_hour: float) -> FloatArray:
    """Daily profile, a sinusoid of the log rate, same shape as `time_s`."""
    ratio = max_to_min if spec.diurnal_max_to_min is None else spec.diurnal_max_to_min
    peak = peak_hour if spec.peak_hour is None else spec.peak_hour
    angle = 2 * math.pi * (time_s / _DAY_S + (spec.start_hour - peak) / 24)
    return np.exp(0.5 * math.log(ratio) * np.cos(angle))


def _process(steps: int, step_s: float, sigma: float, theta_s: float, rng: np.random.Generator) -> FloatArray:
    """Stationary Ornstein-Uhlenbeck process at `steps` times, exact at any step."""
    phi = math.exp(-step_s / theta_s)
    noise = rng.standard_normal(steps)
    noise[1:] *= math.sqrt(1 - phi * phi)
    # accumulate over Python floats beats a loop over array elements five times.
    values = itertools.accumulate((noise * sigma).tolist(), lambda last, new: phi * last + new)
    return np.fromiter(values, np.float64, steps)


def _slow_process(time_s: FloatArray, sigma: float, theta_s: float, rng: np.random.Generator) -> FloatArray:
    """The same, drawn on a grid of a twentieth of the correlation time and joined by straight lines."""
    if not sigma:
        return np.zeros(len(time_s))
    knot_s = theta_s / 20
    knots = math.ceil(time_s[-1] / knot_s) + 2
    return np.interp(time_s, np.arange(knots) * knot_s, _process(knots, knot_s, sigma, theta_s, rng))


def _gate(time_s: FloatArray, gate: Gate, rng: np.random.Generator) -> FloatArray:
    """Intensity factor of an on/off source: 1 while on."""
    cycles = math.ceil(time_s[-1] / (gate.on_s + gate.off_s) * 1.5) + 20
    periods = np.column_stack([rng.exponential(gate.on_s, cycles), rng.exponential(gate.off_s, cycles)]).ravel()
    # Exponential periods have no memory, so starting at a switch is stationary once the first state is drawn fairly.
    starts_off = rng.uniform() > gate.on_s / (gate.on_s + gate.off_s)
    switched = np.searchsorted(np.cumsum(periods[int(starts_off) :]), time_s, "right") + int(starts_off)
    return np.where(switched % 2 == 0, 1.0, gate.floor)


def _renewal_on(intensity: FloatArray, step_s: float, cv: float, rng: np.random.Generator) -> FloatArray:
    """Arrival times of a stationary Gamma renewal process whose clock advances by `intensity`, requests/s."""
    clock = np.concatenate([[0.0], np.cumsum(intensity) * step_s])
    end = float(clock[-1])
    shape = 1 / cv**2
    # The gap that covers time 0 is length-biased, Gamma(shape + 1), and time 0 falls uniformly in it.
    ticks = np.array([rng.gamma(shape + 1, 1 / shape) * rng.uniform()])
    while ticks[-1] < end:
        left = end - ticks[-1]
        gaps = rng.gamma(shape, 1 / shape, math.ceil(left + 4 * cv * math.sqrt(left)) + 16)
        ticks = np.concatenate([ticks, ticks[-1] + np.cumsum(gaps)])
    ticks = ticks[: np.searchsorted(ticks, end, "left")]
    arrival_s: FloatArray = np.interp(ticks, clock, np.arange(len(clock), dtype=np.float64) * step_s)
    return arrival_s

from functools import cache
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from envs.traffic.agent_sessions import Quantiles, sample_sessions
from envs.traffic.generator import GeneratorSpec, Profile, generate
from envs.traffic.shapes import SHAPES
from envs.traffic.summary import counts, dispersion, empty_share, iat_cv, peak_to_mean
from envs.traffic.trace import TraceError
from envs.traffic.trace_files import load_trace
from policies.engine import load_model

ROOT = Path(__file__).parents[3]
MEASURED = ROOT.parent / "shared" / "traces"
needs_measured = pytest.mark.skipif(not MEASURED.is_dir(), reason="measured traces are not here")
PROFILES = get_args(Profile)


def spec(profile, duration_s=3_600.0, mean_rps=4.0, **fields):
    return GeneratorSpec(profile=profile, duration_s=duration_s, mean_rps=mean_rps, **fields)


@cache
def statistics(profile, duration_s, mean_rps, seeds):
    """Mean over seeds of each burst statistic, for traces as long as the measured one."""
    found = []
    for seed in range(seeds):
        trace = generate(spec(profile, duration_s, mean_rps, start_hour=12.0), seed)
        found.append(
            {
                "iat_cv": iat_cv(trace),
                "peak_to_mean": peak_to_mean(trace, 10.0),
                "empty": empty_share(trace, 10.0),
                **{window_s: dispersion(trace, float(window_s)) for window_s in (1, 10, 60, 300)},
            }
        )
    return {key: float(np.mean([row[key] for row in found])) for key in found[0]}


@pytest.mark.parametrize("profile", PROFILES)
def test_the_same_seed_gives_the_same_trace_and_another_seed_another(profile):
    first, again, other = (generate(spec(profile), seed) for seed in (7, 7, 8))
    assert first.digest() == again.digest() != other.digest()
    assert first.duration_s == 3_600.0
    assert len(first) > 1_000


@pytest.mark.parametrize("profile", ["chat", "code", "reasoning", "agentic", "diurnal_mix"])
@pytest.mark.parametrize("mean_rps", [0.5, 8.0])
def test_the_mean_rate_is_the_one_asked_for(profile, mean_rps):
    rates = [generate(spec(profile, 7_200.0, mean_rps), seed).mean_rps for seed in range(3)]
    assert np.mean(rates) == pytest.approx(mean_rps, rel=0.06)


# Numbers name the window of the index of dispersion, seconds. Tolerances hold what 24 seeds of an hour scatter by.
@pytest.mark.parametrize(
    ("statistic", "measured", "tolerance"),
    [
        ("iat_cv", 13.0, 0.15),
        (1, 13.0, 0.20),
        (10, 72.0, 0.25),
        (60, 164.0, 0.20),
        (300, 138.0, 0.60),
        ("peak_to_mean", 12.8, 0.35),
        ("empty", 0.56, 0.15),
    ],
)
def test_code_bursts_like_the_measured_trace(statistic, measured, tolerance):
    assert statistics("code", 3_430.0, 3.2, 24)[statistic] == pytest.approx(measured, rel=tolerance)


@pytest.mark.parametrize(
    ("statistic", "measured", "tolerance"), [("iat_cv", 1.07, 0.03), (1, 1.31, 0.1), (10, 3.03, 0.35), (60, 12.5, 0.4)]
)
def test_chat_drifts_like_the_measured_trace(statistic, measured, tolerance):
    assert statistics("chat", 1_750.0, 5.56, 24)[statistic] == pytest.approx(measured, rel=tolerance)


@pytest.mark.parametrize(
    ("statistic", "measured", "tolerance"), [("iat_cv", 1.6, 0.1), (1, 4.2, 0.25), (10, 22.5, 0.3), (300, 563.0, 0.35)]
)
def test_reasoning_swings_like_the_measured_trace(statistic, measured, tolerance):
    assert statistics("reasoning", 50_400.0, 7.86, 4)[statistic] == pytest.approx(measured, rel=tolerance)


@pytest.mark.parametrize(
    ("profile", "prompt_p50", "prompt_p99", "output_p50", "output_p99"),
    [
        ("chat", 1_035, 4_122, 140, 611),
        ("code", 1_463, 7_436, 13, 251),
        ("reasoning", 97, 23_017, 1_190, 13_818),
        ("agentic", 108_180, 569_579, 242, 3_625),
    ],
)
def test_lengths_match_the_measured_traces(profile, prompt_p50, prompt_p99, output_p50, output_p99):
    trace = generate(spec(profile, 86_400.0, 1.0), seed=0)
    assert np.percentile(trace.prompt_tokens, [50, 99]) == pytest.approx([prompt_p50, prompt_p99], rel=0.15)
    assert np.percentile(trace.output_tokens, [50, 99]) == pytest.approx([output_p50, output_p99], rel=0.12)


def test_independent_sources_keep_the_dispersion_and_lower_the_peak():
    # Without terms that the sources share, dispersion does not depend on their number.
    alone = spec("code", 7_200.0, 3.2, diurnal_max_to_min=1.0, drift_sigma=0.0)
    many = spec("code", 7_200.0, 32.0, diurnal_max_to_min=1.0, drift_sigma=0.0)
    hard = many.model_copy(update={"sources": 1})
    small, large, single = ([generate(each, seed) for seed in range(6)] for each in (alone, many, hard))

    def mean(statistic, traces, window_s):
        return np.mean([statistic(trace, window_s) for trace in traces])

    assert mean(dispersion, large, 10.0) == pytest.approx(mean(dispersion, small, 10.0), rel=0.2)
    assert mean(peak_to_mean, large, 10.0) < 0.5 * mean(peak_to_mean, small, 10.0)
    assert mean(peak_to_mean, single, 10.0) == pytest.approx(mean(peak_to_mean, small, 10.0), rel=0.35)


@pytest.mark.parametrize("max_to_min", [1.0, 6.0])
def test_the_daily_profile_has_the_ratio_and_peak_hour_asked_for(max_to_min):
    flat = spec("chat", 86_400.0, 20.0, diurnal_max_to_min=max_to_min, peak_hour=10.0, start_hour=4.0, drift_sigma=0.0)
    hourly = np.mean([counts(generate(flat, seed), 3_600.0) for seed in range(6)], axis=0)
    assert hourly.max() / hourly.min() == pytest.approx(max_to_min, rel=0.45)
    if max_to_min > 1:
        assert abs(int(hourly.argmax()) - 6) <= 2, "the peak is six hours after the start"


def test_agent_sessions_have_the_measured_lengths_and_pauses():
    calls = sample_sessions(3_000, np.random.default_rng(0))
    per_session = np.bincount(calls.session)
    assert np.percentile(per_session, [25, 50, 75, 90]) == pytest.approx([18, 46, 94, 157], rel=0.05)
    gaps_s = np.diff(calls.since_start_s)[np.diff(calls.session) == 0]
    assert np.percentile(gaps_s, [50, 75, 90, 99]) == pytest.approx([19, 39, 131, 2_754], rel=0.35)


def test_agent_prompts_grow_and_hit_the_cache():
    trace = generate(spec("agentic", 86_400.0, 0.5), seed=0)
    uncached = trace.prompt_tokens - trace.prefix_hit_tokens
    assert trace.prefix_hit_tokens.sum(dtype=float) / trace.prompt_tokens.sum(dtype=float) == pytest.approx(
        0.96, abs=0.01
    )
    assert np.median(uncached) == pytest.approx(727, rel=0.15)
    order = np.lexsort((trace.arrival_s, trace.session_id))
    same = np.diff(trace.session_id[order]) == 0
    growth = np.diff(trace.prompt_tokens[order])[same]
    assert (growth > 0).mean() > 0.97
    assert np.median(growth) == pytest.approx(719, rel=0.1)


def test_agents_are_under_way_from_the_first_second():
    trace = generate(spec("agentic", 7_200.0, 2.0, diurnal_max_to_min=1.0), seed=0)
    quarters = counts(trace, 1_800.0)
    assert quarters[0] == pytest.approx(quarters.mean(), rel=0.25)


def test_a_mix_keeps_its_shares_and_names_its_tenants():
    trace = generate(spec("diurnal_mix", 7_200.0, 20.0, mix={"reasoning": 1.0, "chat": 2.0, "agentic": 1.0}), seed=0)
    assert trace.tenants == ("agentic", "chat", "reasoning")
    assert np.bincount(trace.tenant) / len(trace) == pytest.approx([0.25, 0.5, 0.25], abs=0.02)
    assert ((trace.session_id >= 0) == (trace.tenant == 0)).all()


def test_a_flash_crowd_multiplies_the_rate_and_passes():
    crowd = spec("flash_crowd", 14_400.0, 2.0, crowd_peak=20.0, crowd_start=0.5, crowd_rise_s=60.0, crowd_decay_s=600.0)
    per_minute = np.mean([counts(generate(crowd, seed), 60.0) for seed in range(5)], axis=0)
    assert per_minute[:118].mean() == pytest.approx(120, rel=0.15)
    assert per_minute[121:124].mean() == pytest.approx(120 * 20, rel=0.35)
    assert per_minute[-20:].mean() < 2 * 120


def test_a_regime_change_changes_lengths_and_rate_at_once():
    trace = generate(spec("regime_change", 7_200.0, 8.0, change_at=0.25, rate_after=0.5), seed=0)
    before, after = trace.slice(0, 1_800), trace.slice(1_800, 7_200)
    assert (before.mean_rps, after.mean_rps) == (pytest.approx(8, rel=0.05), pytest.approx(4, rel=0.05))
    assert (np.median(before.output_tokens), np.median(after.output_tokens)) == (
        pytest.approx(140, rel=0.1),
        pytest.approx(1_190, rel=0.1),
    )


@settings(max_examples=40, deadline=None)
@given(
    profile=st.sampled_from(PROFILES),
    duration_s=st.floats(1e-3, 5_000),
    mean_rps=st.floats(1e-4, 20),
    start_hour=st.floats(0, 23.9),
    seed=st.integers(0, 2**63),
)
def test_any_spec_gives_a_valid_trace(profile, duration_s, mean_rps, start_hour, seed):
    # `Trace` checks its own rules on construction.
    trace = generate(spec(profile, duration_s, mean_rps, start_hour=start_hour), seed)
    assert trace.duration_s == pytest.approx(duration_s)


@pytest.mark.parametrize(
    "fields",
    [
        {"profile": "video"},
        {"duration_s": 0},
        {"mean_rps": -1},
        {"mean_rps": float("nan")},
        {"duration_s": 1e9, "mean_rps": 1e3},
        {"start_hour": 24},
        {"diurnal_max_to_min": 0.5},
        {"mix": {}},
        {"mix": {"chat": 0}},
        {"mix": {"poems": 1}},
        {"change_at": 1},
        {"unknown": 1},
    ],
)
def test_a_spec_out_of_range_is_refused(fields):
    with pytest.raises(ValidationError):
        GeneratorSpec(**({"profile": "chat", "duration_s": 60.0, "mean_rps": 1.0} | fields))


def test_a_negative_seed_is_refused():
    with pytest.raises(TraceError, match="seed: expected at least 0"):
        generate(spec("chat"), -1)


def test_every_field_is_described():
    assert all(field.description for field in GeneratorSpec.model_fields.values())


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "traffic").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_traffic_loads_under_its_own_name(path):
    assert load_model(path, GeneratorSpec).profile == path.stem


def test_quantile_tables_are_well_formed():
    from envs.traffic import agent_sessions

    tables = [value for value in vars(agent_sessions).values() if isinstance(value, Quantiles)]
    assert len(tables) == 7
    for table in tables:
        assert (table.levels[0], table.levels[-1]) == (0, 1)
        assert (np.diff(table.levels) > 0).all()
        assert (np.diff(table.values) > 0).all()


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_mixture_weights_sum_to_one(name):
    for mixture in (SHAPES[name].prompt, SHAPES[name].output):
        assert sum(mixture.weights) == pytest.approx(1.0)
        assert len(mixture.weights) == len(mixture.mu) == len(mixture.sigma)


@needs_measured
@pytest.mark.parametrize(
    ("profile", "file", "duration_s", "mean_rps", "seeds", "windows_s"),
    [
        ("code", "azure2023_code", 3_430.0, 3.2, 24, (1, 10, 60)),
        ("chat", "azure2023_conv", 1_750.0, 5.56, 24, (1, 10, 60)),
        ("reasoning", "servegen_r1", 50_400.0, 7.86, 4, (1, 10, 60, 300)),
    ],
)
def test_dispersion_grows_with_the_window_as_in_the_measured_file(
    profile, file, duration_s, mean_rps, seeds, windows_s
):
    measured = load_trace(MEASURED / f"{file}.parquet")
    generated = statistics(profile, duration_s, mean_rps, seeds)
    for window_s in windows_s:
        assert generated[window_s] == pytest.approx(dispersion(measured, window_s), rel=0.35)

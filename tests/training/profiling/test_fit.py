from dataclasses import replace

import numpy as np
import pytest

from envs.cluster.closed_loop import LoadProtocol
from policies.engine import ConfigError
from training.profiling.conditions import Conditions, Unknowns, unknown_conditions
from training.profiling.fit import coefficients_of, fit_profile, step_model
from training.profiling.measurements import COEFFICIENTS, LoopLatencyTable, StepTimes

PROTOCOL = LoadProtocol(requests_per_client=4)
TRUE = np.array([6.0, 18.0, 14.0, 42.0, 1.2])


def step_rows(noise=0.0, coefficients=TRUE, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(p, B, k) for p in (0, 64, 512, 2048, 8192) for B in (0, 1, 16, 128) for k in (128, 2048) if p or B]
    design = np.array([[1, p, B, B * k, p * p / 2] for p, B, k in shapes], float)
    table = StepTimes(design, {})
    seconds = table.predict(coefficients)["step"] * np.exp(noise * rng.standard_normal(len(design)))
    return StepTimes(design, {"step": seconds})


def loop_rows(protocol=PROTOCOL, declared=True):
    points = [(p, o, c) for p in (128, 1024, 3000) for o in (64, 200) for c in (1, 4, 16)]
    prompts, outputs, clients = (np.array(axis) for axis in zip(*points, strict=True))
    table = LoopLatencyTable(
        prompts,
        outputs,
        clients,
        {"tpot": prompts * 1.0, "ttft": prompts * 1.0},
        (protocol,) * len(points),
        200_000,
        2048,
    )
    measured = table.predict(TRUE)
    return LoopLatencyTable(prompts, outputs, clients, measured, table.protocols if declared else None, 200_000, 2048)


def test_step_times_give_their_coefficients_back():
    fit = fit_profile(step_rows(noise=0.01), bootstrap=20)
    np.testing.assert_allclose(coefficients_of(fit.step), TRUE, rtol=0.1)
    assert (fit.low <= TRUE * 1.03).all()
    assert (fit.high >= TRUE * 0.97).all()
    (held_out,) = fit.errors(held_out=True)
    assert held_out.rows == len(fit.table)
    assert held_out.mean < 0.015


def test_closed_loops_give_their_coefficients_back():
    fit = fit_profile(loop_rows(), folds=3, bootstrap=0)
    np.testing.assert_allclose(coefficients_of(fit.step), TRUE, rtol=0.05)
    assert max(error.mean for error in fit.errors(held_out=True)) < 0.02


AXES = (
    tuple({"requests_per_client": count, "waiting": waiting} for count in (4, 12) for waiting in (0, 1)),
    ({"cached_share": 0.0}, {"cached_share": 0.5}),
    ({"max_num_batched_tokens": 2048}, {"max_num_batched_tokens": 512}),
)


def test_the_way_of_measuring_is_found_among_the_unknowns():
    protocol = LoadProtocol(requests_per_client=12, waiting=1, cached_share=0.5)
    unknowns = Unknowns(Conditions(LoadProtocol(requests_per_client=4), 512), AXES)
    fit = fit_profile(loop_rows(protocol, declared=False), unknowns=unknowns, folds=0, bootstrap=0)
    assert fit.conditions == Conditions(protocol, 2048)
    assert fit.held_out == {}


def test_unusual_conditions_need_more_than_noise():
    """Noise alone makes one of the alternatives a little better; the usual conditions stay."""
    table = loop_rows(declared=False)
    rng = np.random.default_rng(5)
    noisy = {name: values * np.exp(0.1 * rng.standard_normal(len(table))) for name, values in table.measured.items()}
    usual = Conditions(PROTOCOL, 2048)
    unknowns = Unknowns(usual, (({"max_num_batched_tokens": 2048}, {"max_num_batched_tokens": 3072}),))
    assert fit_profile(replace(table, measured=noisy), unknowns=unknowns, folds=0, bootstrap=0).conditions == usual


def test_what_is_known_of_a_measurement_is_not_searched():
    unknowns = unknown_conditions(max_num_batched_tokens=1024, requests_per_client=7)
    searched = {name for axis in unknowns.axes for change in axis for name in change}
    assert unknowns.usual == Conditions(LoadProtocol(requests_per_client=7), 1024)
    assert searched == {"start", "requests_per_client", "waiting", "cached_share"}
    assert {change["requests_per_client"] for change in unknowns.axes[0]} == {7}


def test_a_few_wrong_rows_do_not_decide_the_fit():
    table = step_rows(noise=0.01)
    spoilt = table.measured["step"].copy()
    spoilt[[3, 11, 20]] *= 8
    fit = fit_profile(StepTimes(table.design, {"step": spoilt}), folds=0, bootstrap=0)
    np.testing.assert_allclose(coefficients_of(fit.step), TRUE, rtol=0.15)


def test_coefficients_are_never_negative():
    table = step_rows(coefficients=np.array([6.0, 18.0, 0.0, 42.0, 0.0]), noise=0.05)
    assert (coefficients_of(fit_profile(table, folds=0, bootstrap=0).step) >= 0).all()


def test_a_fixed_coefficient_is_left_alone():
    fit = fit_profile(step_rows(), fixed={"c_us_per_seq": 30.0}, folds=0, bootstrap=0)
    assert fit.step.c_us_per_seq == 30.0
    assert fit.step.a_ms != 6.0


def test_four_digits_are_kept():
    assert step_model(TRUE * 1.00001) == step_model(TRUE)


def test_too_few_rows_are_refused():
    with pytest.raises(ConfigError, match="5 rows are too few to fit 5 coefficients: at least 6"):
        fit_profile(step_rows().take(np.arange(5)))
    with pytest.raises(ConfigError, match="7 rows are too few for 3 folds"):
        fit_profile(step_rows().take(np.arange(0, 35, 5)), folds=3)


def test_rows_that_cannot_tell_a_coefficient_are_refused():
    table = step_rows()
    decodes = table.take(np.flatnonzero(table.design[:, 1] == 0))
    with pytest.raises(ConfigError, match="cannot identify b_us_per_prefill_token, e_ns_per_prefill_token2"):
        fit_profile(decodes, folds=0)
    fit_profile(decodes, fixed={"b_us_per_prefill_token": 1.0, "e_ns_per_prefill_token2": 0.0}, folds=0, bootstrap=0)
    loops = loop_rows()
    with pytest.raises(ConfigError, match="cannot identify b_us_per_prefill_token, c_us_per_seq"):
        fit_profile(loops.take(np.flatnonzero(loops.concurrency == 4)), folds=0)


def test_an_unknown_fixed_coefficient_is_refused():
    with pytest.raises(ConfigError, match=f"unknown coefficient 'f'; coefficients: {COEFFICIENTS[0]}"):
        fit_profile(step_rows(), fixed={"f": 1.0})

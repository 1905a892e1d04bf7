"""Episodes: how they are cut, what they cost, and that no action means the reference rule."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import pytest
from gymnasium.utils.env_checker import check_env as check_gymnasium_env
from stable_baselines3.common.env_checker import check_env as check_sb3_env

from envs.autoscaling_env import AutoscalingEnv
from envs.episodes import Episodes, EpisodeSpec, StepResult
from envs.randomization import Randomization, ScenarioBank, draw_bank
from envs.traffic.trace import Trace
from policies.action import allocate, reference_batch_cap
from policies.contract import Observation, Target
from policies.decider import Decider
from policies.engine import ColdStart
from policies.observation import FEATURES
from policies.spec import (
    GuardrailSpec,
    InterfaceSpec,
    ObjectiveSpec,
    PoolSpec,
    ScalingSpec,
    Slo,
    WindowSpec,
    find_engine,
    shipped_configs,
)

SHORT = EpisodeSpec(steps=8)


@cache
def bank() -> ScenarioBank:
    ranges = Randomization(
        traces=4, scenarios=16, trace_s=1800.0, mean_replicas=(1.0, 3.0), max_replicas=8, spot_scenarios=0.5
    )
    return draw_bank(ranges, InterfaceSpec(), GuardrailSpec(), ObjectiveSpec(), 0)


def actions(n: int, steps: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).uniform(-1, 1, (steps, n, 4)).astype(np.float32)


def one_world(trace: Trace, **pool: Any) -> ScenarioBank:
    """One scenario without any chance in it: 8B on H100, starts of exactly a minute."""
    start = ColdStart(node_s=30.0, image_s=10.0, weights_s=15.0, warmup_s=5.0)
    spec = ScalingSpec(
        slo=Slo(ttft_s=2.0, tpot_s=0.05, attainment=0.9),
        pools=(
            PoolSpec(
                **{
                    "engine": find_engine("llama-3.1-8b-h100", shipped_configs()),
                    "max_replicas": 10,
                    "cold_start": start,
                    "cold_start_cv": 0.0,
                    **pool,
                }
            ),
        ),
    )
    return ScenarioBank.of([spec], [trace], [0])


def steady_trace(rps: float, duration_s: float, prompt: int = 500, output: int = 200) -> Trace:
    n = int(rps * duration_s)
    return Trace.from_arrays(
        arrival_s=np.arange(n) / rps,
        prompt_tokens=np.full(n, prompt),
        output_tokens=np.full(n, output),
        duration_s=duration_s,
    )


def test_the_environment_passes_the_checkers_of_gymnasium_and_stable_baselines() -> None:
    check_gymnasium_env(AutoscalingEnv(bank(), SHORT), skip_render_check=True)
    check_sb3_env(AutoscalingEnv(bank(), SHORT))


def test_the_environment_is_registered_under_its_versioned_name() -> None:
    env = gym.make("jevons/Autoscaling-v1", bank=bank(), episodes=SHORT)
    assert isinstance(env.unwrapped, AutoscalingEnv)
    assert env.spec is not None
    assert env.spec.version == 1
    features, info = env.reset(seed=1)
    assert features.shape == (len(FEATURES),)
    assert set(info) == {"snapshot"}


def test_an_episode_is_truncated_after_its_steps_and_never_terminates() -> None:
    env = AutoscalingEnv(bank(), SHORT)
    env.reset(seed=0)
    ends = [env.step(action[0])[2:4] for action in actions(1, SHORT.steps)]
    assert ends == [(False, False)] * (SHORT.steps - 1) + [(False, True)]


def test_a_seed_repeats_an_episode() -> None:
    runs = []
    for seed in (3, 3, 4):
        env = AutoscalingEnv(bank(), SHORT)
        first, _ = env.reset(seed=seed)
        steps = [env.step(action[0]) for action in actions(1, SHORT.steps)]
        runs.append(
            (first.tolist(), [(features.tolist(), reward, info["terms"]) for features, reward, _, _, info in steps])
        )
    assert repr(runs[0]) == repr(runs[1])
    assert runs[0][0] != runs[2][0]


def test_the_reward_is_minus_the_scaled_sum_of_its_cost_terms() -> None:
    scale = 0.37
    episodes = Episodes(bank(), 32, SHORT.model_copy(update={"reward_scale": scale}), 0)
    episodes.reset(stagger=False)
    seen = {"provisioned": 0.0, "misses": 0.0, "churn": 0.0}
    for action in actions(32, SHORT.steps):
        result = episodes.step(action)
        terms = result.terms
        assert set(terms) == {"provisioned", "misses", "churn", "attainment"}
        weight = 1.0 / (1.0 + SHORT.usual_miss_rate * np.exp(episodes.fleet.log_miss_price))
        expected = -scale * weight * (terms["provisioned"] + terms["misses"] + terms["churn"])
        np.testing.assert_allclose(result.reward, expected, rtol=1e-12)
        for name in seen:
            assert (terms[name] >= 0.0).all()
            seen[name] += float(terms[name].sum())
    assert min(seen.values()) > 0.0, "a term that is always zero is not tested"


def test_rewards_of_an_idle_hour_are_the_replicas_in_units_of_one() -> None:
    """Without traffic the unit is one replica; one with 15 % overhead, at the price of 20 for a miss, scaled by 0.1."""
    quiet = Trace.from_arrays(arrival_s=[0.0], prompt_tokens=[1], output_tokens=[1], duration_s=4000.0)
    world = one_world(quiet, max_replicas=1)
    spec = SHORT.model_copy(update={"log_miss_price_spread": 0.0})
    episodes = Episodes(world, 1, spec, 5, part=(0.5, 1.0))
    episodes.reset()
    for action in actions(1, 4):
        result = episodes.step(action)
        assert result.reward == pytest.approx([-0.115 / (1.0 + 0.03 * 20.0)], abs=1e-12)
        assert np.isnan(result.terms["attainment"]).all()


def test_misses_are_counted_once_each_and_never_taken_back() -> None:
    """One replica that is allowed cannot hold this load: every certain miss shows up in the reward, up to the limit."""
    world = one_world(steady_trace(30.0, 1200.0, prompt=2000), max_replicas=1)
    spec = EpisodeSpec(steps=30, miss_limit=1e9, log_miss_price_spread=0.0)
    episodes = Episodes(world, 1, spec, 0)
    episodes.reset(stagger=False)
    counted = most = 0.0
    for action in actions(1, 30):
        result = episodes.step(action)
        # The price of a miss is 20 costs of a request; the unit of the terms is the cost of a window.
        counted += result.terms["misses"][0] / 20.0 * episodes.reward._window_arrivals[0]
        usage = episodes.cluster.usage()
        most = max(most, float((usage.finished - usage.good + usage.rejected + usage.overdue)[0]))
        assert counted == pytest.approx(most, rel=1e-9)
    assert counted > 1000


def test_the_last_window_of_an_episode_has_traffic_too() -> None:
    """Else a policy would learn that traffic stops at the end."""
    episodes = Episodes(one_world(steady_trace(5.0, 2000.0)), 4, SHORT, 0)
    episodes.reset(stagger=False)
    rates = [episodes.step(action).observation.snapshot.arrival_rps for action in actions(4, SHORT.steps)]
    np.testing.assert_allclose(rates, 5.0, atol=0.1)


def test_first_episodes_are_staggered_and_later_ones_are_whole() -> None:
    n, steps = 16, 16
    episodes = Episodes(bank(), n, EpisodeSpec(steps=steps), 0)
    episodes.reset()
    ends: list[list[int]] = [[] for _ in range(n)]
    for step, action in enumerate(actions(n, 3 * steps), start=1):
        result = episodes.step(action)
        for row in np.flatnonzero(result.truncated):
            ends[row].append(step)
        episodes.restart(result.truncated)
    assert [row[0] for row in ends] == [16, 14, 12, 10, 8, 6, 4, 2] * 2
    assert {later - earlier for row in ends for earlier, later in pairwise(row)} == {steps}


def observed(observation: Observation) -> dict[str, npt.NDArray[Any]]:
    snapshot = observation.snapshot
    names = ("time_s", "arrival_rps", "queue_requests", "replicas_ready", "running", "batch_cap", "replicas_target")
    return {"features": observation.features, **{name: getattr(snapshot, name) for name in names}}


def test_a_restart_leaves_the_other_rows_untouched() -> None:
    n = 6
    ended = np.array([False, True, False, False, True, False])
    with_restart, without = (Episodes(bank(), n, EpisodeSpec(steps=20), 0) for _ in range(2))
    for episodes in (with_restart, without):
        episodes.reset(stagger=False)
        for action in actions(n, 5):
            episodes.step(action)
    before = {
        name: value.copy() for name, value in observed(with_restart.step(actions(n, 1, 1)[0]).observation).items()
    }
    without.step(actions(n, 1, 1)[0])
    after = observed(with_restart.restart(ended))
    for name, value in before.items():
        np.testing.assert_array_equal(after[name][~ended], value[~ended], err_msg=name)
    assert after["time_s"].tolist() == [100.0, 10.0, 100.0, 100.0, 10.0, 100.0]
    for action in actions(n, 5, 2):
        left, right = with_restart.step(action), without.step(action)
        np.testing.assert_array_equal(left.reward[~ended], right.reward[~ended])
        theirs = observed(right.observation)
        for name, value in observed(left.observation).items():
            np.testing.assert_array_equal(value[~ended], theirs[name][~ended], err_msg=name)


def test_a_restarted_row_is_like_a_new_one() -> None:
    """What the first life of a row left behind must not show: compare with a cluster that never had one."""
    world = one_world(steady_trace(8.0, 3000.0))
    used, fresh = (Episodes(world, 1, EpisodeSpec(steps=10, log_miss_price_spread=0.0), 0) for _ in range(2))
    used.reset(stagger=False)
    for action in actions(1, 10):
        used.step(action)
    used.rng, fresh.rng = np.random.default_rng(7), np.random.default_rng(7)
    first = used.restart(np.array([True]))
    np.testing.assert_array_equal(first.features, fresh.reset(stagger=False).features)
    for action in actions(1, 10, 3):
        left, right = used.step(action), fresh.step(action)
        np.testing.assert_array_equal(left.observation.features, right.observation.features)
        assert (left.reward.tolist(), left.truncated.tolist()) == (right.reward.tolist(), right.truncated.tolist())


@pytest.mark.parametrize("cut", [0.5, 0.7])
def test_slices_for_training_and_validation_never_overlap_in_time(cut: float) -> None:
    duration_s = 6000.0
    n = 6000
    times = np.arange(n) * duration_s / n
    trace = Trace.from_arrays(
        arrival_s=times, prompt_tokens=np.full(n, 10), output_tokens=np.ones(n), duration_s=duration_s
    )
    spans = []
    for part in ((0.0, cut), (cut, 1.0)):
        episodes = Episodes(one_world(trace), 64, EpisodeSpec(steps=20), 0, part)
        episodes.reset(stagger=False)
        service = episodes.cluster.arrays.service
        first = np.searchsorted(times, service["origin_s"])
        spans.append((float(times[first].min()), float(times[service["end_arrival"] - 1].max())))
    (train_from, train_to), (held_from, held_to) = spans
    assert train_from < train_to < cut * duration_s <= held_from < held_to
    assert train_to > cut * duration_s - 100.0  # and the parts are used to their ends
    assert held_from < cut * duration_s + 100.0


def test_a_part_that_is_shorter_than_an_episode_is_refused_by_name() -> None:
    trace = steady_trace(1.0, 1000.0)
    with pytest.raises(
        ValueError, match="an episode lasts 315 s, but its part of trace 'trace' only 300 s: fewer steps"
    ):
        Episodes(one_world(trace), 1, EpisodeSpec(steps=20), part=(0.7, 1.0))


def test_a_group_lives_the_same_episodes_as_long_as_it_does_the_same() -> None:
    n, group = 12, 3
    episodes = Episodes(bank(), n, SHORT, 0, group=group)
    episodes.reset()
    draw = np.random.default_rng(3)
    lived = []
    for _ in range(2 * SHORT.steps):
        result = episodes.step(np.repeat(draw.uniform(-1, 1, (n // group, 4)), group, axis=0))
        for values in (result.observation.features, result.reward, result.truncated, episodes.scenario):
            first = np.asarray(values).reshape(n // group, group, -1)
            np.testing.assert_array_equal(first, np.repeat(first[:, :1], group, axis=1))
        episodes.restart(result.truncated)
        lived.append(episodes.scenario[::group].copy())
    assert len(np.unique(lived)) > n // group  # new groups are drawn, and not all the same
    assert len(np.unique(episodes.fleet.log_miss_price)) == n // group
    result = episodes.step(draw.uniform(-1, 1, (n, 4)))
    assert len(np.unique(result.reward)) > n // group  # and they are not one


def test_episodes_that_are_no_whole_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="10 episodes cannot be divided into groups of 4"):
        Episodes(bank(), 10, SHORT, group=4)


def reference_rule(observation: Observation, decider: Decider, interface: InterfaceSpec) -> Target:
    """The fleet in force between 1.3 times the demand's mean and 1.3 times that, half of it on spot where offered.

    In a surge, the demand of now takes the place of its mean.
    """
    n = len(observation.features)
    assert (interface.action.headroom_reference, interface.action.slack_reference) == (1.3, 0.3)
    assert interface.action.spot_share_reference == 0.5
    surging = observation.features[:, FEATURES.index("log_mean_60s_over_mean_300s")] > np.log(3.0)
    over_mean = observation.demand[:, 0] / np.maximum(observation.demand_mean[:, 0], 1e-3)
    fewest = 1.3 * np.where(surging, np.maximum(over_mean, 1.0), 1.0)
    lowest, highest = (
        allocate(observation.demand_mean, headroom, np.full(n, 0.5), decider.fleet)
        for headroom in (fewest, 1.3 * fewest)
    )
    return Target(
        replicas=np.clip(observation.snapshot.replicas_target, lowest, highest).astype(np.int64),
        batch_cap=reference_batch_cap(observation, decider.fleet),
    )


def test_no_action_is_the_reference_rule_under_the_guardrails() -> None:
    n = 16
    zero, by_hand = (Episodes(bank(), n, EpisodeSpec(steps=20), 0) for _ in range(2))
    zero.reset(stagger=False)
    observation = by_hand.reset(stagger=False)
    moved = 0
    for _ in range(12):
        result: StepResult = zero.step(np.zeros((n, 4), np.float32))
        proposed = reference_rule(observation, by_hand.decider, by_hand.bank.interface)
        settled, _ = by_hand.decider.settle(proposed, observation)
        moved += int((settled.replicas != observation.snapshot.replicas_target).sum())
        by_hand.cluster.apply(settled)
        by_hand.cluster.run_window()
        observation = by_hand.decider.observe(by_hand.cluster.read())
        np.testing.assert_array_equal(result.observation.features, observation.features)
        np.testing.assert_array_equal(result.observation.snapshot.replicas_target, observation.snapshot.replicas_target)
    assert moved > n


def test_measurements_are_as_old_as_the_metrics_delay() -> None:
    world = one_world(steady_trace(5.0, 2000.0))
    late = InterfaceSpec(window=WindowSpec(control_interval_s=20.0, metrics_delay_s=8.0))
    spec = world.specs[0].model_copy(update={"interface": late})
    episodes = Episodes(ScenarioBank.of([spec], list(world.traces), [0]), 2, SHORT, 0)
    times = [episodes.reset(stagger=False).snapshot.time_s[0]]
    times += [episodes.step(action).observation.snapshot.time_s[0] for action in actions(2, 3)]
    assert times == [12.0, 32.0, 52.0, 72.0]
    assert episodes.cluster.now_s == 80.0

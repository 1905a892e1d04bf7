"""The loop on scripted ports, and on the simulated cluster against the same core driven by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import numpy as np
import numpy.typing as npt
import pytest

from autoscaler.controller import Controller, nothing_known
from envs.cluster.simulation import SimulatedCluster
from envs.episodes import Episodes, EpisodeSpec
from envs.randomization import ScenarioBank
from envs.traffic.trace import Trace
from policies.action import decode_action
from policies.baselines.hpa import HpaPolicy
from policies.baselines.token_demand import TokenDemandPolicy
from policies.contract import (
    ActuationFailed,
    Bools,
    Decision,
    MetricsUnavailable,
    Observation,
    Outcome,
    Policy,
    Reason,
    Snapshot,
    Target,
)
from policies.decider import Decider
from policies.engine import ColdStart
from policies.fleet import Fleet
from policies.spec import InterfaceSpec, PoolSpec, ScalingSpec, Slo, Spot, WindowSpec, find_engine, shipped_configs

SPEC = ScalingSpec(
    slo=Slo(ttft_s=2.0, tpot_s=0.05),
    pools=(PoolSpec(engine=find_engine("llama-3.1-8b-h100", shipped_configs()), max_replicas=20),),
)


class World:
    """All four ports over one script of answers; keeps what happened, in order."""

    def __init__(self, *answers: Snapshot | None, refused: tuple[int, ...] = (), started_s: float = 0.0) -> None:
        self._answers = list(answers)
        self._refused = refused
        self._applied = 0
        self.now_s = started_s
        self.events: list[tuple[str, float]] = []
        self.decisions: list[Decision] = []
        self.targets: list[Target] = []

    def read(self) -> Snapshot:
        self.events.append(("read", self.now_s))
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if answer is None:
            raise MetricsUnavailable("no answer within 5 s")
        return answer

    def apply(self, target: Target) -> None:
        self._applied += 1
        if self._applied in self._refused:
            self.events.append(("refused", self.now_s))
            raise ActuationFailed("the API server said no")
        self.events.append(("applied", self.now_s))
        self.targets.append(target)

    def wait_until(self, time_s: float) -> None:
        self.now_s = max(self.now_s, time_s)

    def record(self, decision: Decision) -> None:
        self.events.append(("recorded", self.now_s))
        self.decisions.append(decision)

    def conclude(self, decision: Decision) -> None:
        self.events.append(("concluded", self.now_s))
        self.decisions[-1] = decision


class Wish:
    """Always the same number of replicas."""

    name = "wish"

    def __init__(self, replicas: int) -> None:
        self._target = Target(replicas=np.array([[replicas]]), batch_cap=np.array([[64]]))

    def reset(self, services: Bools | None = None) -> None:
        """Nothing to forget."""

    def propose(self, observation: Observation) -> Target:
        return self._target


def window(time_s: float, replicas: float = 2.0) -> Snapshot:
    """A healthy window of one service with one pool."""
    blank = nothing_known(time_s, 15.0, Decider(Fleet.from_specs([SPEC]), WindowSpec(), SPEC.guardrails))
    values = {field.name: np.zeros_like(getattr(blank, field.name)) for field in fields(Snapshot)}
    values |= {
        "time_s": np.array([time_s]),
        "window_s": np.array([15.0]),
        "ttft_attainment": np.ones(1),
        "tpot_attainment": np.ones(1),
        "replicas_target": np.array([[replicas]]),
        "replicas_ready": np.array([[replicas]]),
        "batch_cap": np.array([[64.0]]),
    }
    return Snapshot(**values)


def controller_on(world: World, policy: Policy, interval_s: float = 15.0) -> Controller:
    decider = Decider(Fleet.from_specs([SPEC]), WindowSpec(), SPEC.guardrails)
    return Controller(decider, policy, world, world, world, world, interval_s)


def outcomes(world: World) -> list[tuple[str, list[str], int]]:
    return [
        (Outcome(int(d.outcome[0])).name, Reason(int(d.reasons[0])).words(), int(d.settled.replicas[0, 0]))
        for d in world.decisions
    ]


def test_a_decision_is_recorded_before_it_is_carried_out() -> None:
    world = World(window(0.0))
    controller_on(world, Wish(4)).tick()
    assert [event for event, _ in world.events] == ["read", "recorded", "applied", "concluded"]
    assert [target.replicas.tolist() for target in world.targets] == [[[4]]]
    assert outcomes(world) == [("SCALED", [], 4)]


def test_ticks_come_at_fixed_times_from_the_start_of_the_clock() -> None:
    world = World(window(0.0), started_s=100.0)
    controller_on(world, Wish(2)).run(until_s=160.0)
    assert [time_s for event, time_s in world.events if event == "read"] == [115.0, 130.0, 145.0, 160.0]


def test_a_slow_tick_does_not_shift_the_later_ones() -> None:
    class Slow(World):
        def read(self) -> Snapshot:
            answer = super().read()
            self.now_s += 4.0
            return answer

    world = Slow(window(0.0))
    controller_on(world, Wish(2)).run(until_s=60.0)
    assert [time_s for event, time_s in world.events if event == "read"] == [15.0, 30.0, 45.0, 60.0]


def test_an_unchanged_target_is_carried_out_again() -> None:
    """Absolute targets heal what somebody else changed."""
    world = World(window(0.0), window(15.0, 4.0))
    controller_on(world, Wish(4)).run(until_s=30.0)
    assert outcomes(world) == [("SCALED", [], 4), ("UNCHANGED", [], 4)]
    assert [target.replicas.tolist() for target in world.targets] == [[[4]], [[4]]]


def test_unavailable_metrics_become_a_held_decision_and_nothing_is_applied() -> None:
    world = World(window(0.0), None, None, window(45.0, 4.0))
    controller = controller_on(world, Wish(4))
    controller.run(until_s=30.0)
    assert outcomes(world) == [("SCALED", [], 4), ("HELD", [], 4)]
    assert len(world.targets) == 1
    blind = world.decisions[1].snapshot
    assert blind.time_s.tolist() == [30.0]
    assert np.isnan(blind.replicas_ready).all()
    assert np.isnan(blind.arrival_rps).all()
    controller.policy = Wish(8)
    controller.run(until_s=60.0)
    assert outcomes(world)[2:] == [("HELD", ["missing_metrics"], 4), ("SCALED", [], 8)]
    assert [target.replicas.tolist() for target in world.targets] == [[[4]], [[8]]]


def test_metrics_that_were_never_there_hold_from_the_first_tick() -> None:
    world = World(None)
    controller_on(world, Wish(7)).run(until_s=45.0)
    assert [outcome for outcome, _, _ in outcomes(world)] == ["HELD"] * 3
    assert world.targets == []


def test_a_failed_actuation_is_recorded_and_tried_again_at_the_next_tick() -> None:
    world = World(window(0.0), window(15.0), refused=(1,))
    controller = controller_on(world, Wish(4))
    controller.run(until_s=15.0)
    assert [event for event, _ in world.events] == ["read", "recorded", "refused", "concluded"]
    assert outcomes(world) == [("HELD", ["actuation_failed"], 4)]
    controller.run(until_s=30.0)
    assert [target.replicas.tolist() for target in world.targets] == [[[4]]]


def test_the_tick_hands_back_what_became_of_the_decision() -> None:
    world = World(window(0.0), refused=(1,))
    controller = controller_on(world, Wish(4))
    assert controller.tick() is world.decisions[-1]
    assert controller.tick().outcome.tolist() == [Outcome.UNCHANGED]


@pytest.mark.parametrize("port", ["read", "record", "apply", "conclude"])
def test_an_error_of_the_program_is_not_swallowed(port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(window(0.0))

    def broken(*arguments: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(world, port, broken)
    with pytest.raises(ZeroDivisionError):
        controller_on(world, Wish(4)).tick()


# Parity: the same decisions from the controller and from the core driven as in training.


def bursty_trace() -> Trace:
    """20 minutes at 4 requests a second with a burst of 60 in the middle."""
    rng = np.random.default_rng(0)
    times = np.concatenate([rng.uniform(0.0, 1200.0, 4800), rng.uniform(500.0, 700.0, 12000)])
    return Trace.from_arrays(
        arrival_s=np.sort(times),
        prompt_tokens=rng.integers(50, 3000, len(times)),
        output_tokens=rng.integers(10, 500, len(times)),
        duration_s=1200.0,
    )


def parity_spec(*, chance: bool) -> ScalingSpec:
    engine = find_engine("llama-3.1-8b-h100", shipped_configs())
    start = ColdStart(node_s=40.0, image_s=10.0, weights_s=20.0, warmup_s=10.0)
    steady = PoolSpec(engine=engine, max_replicas=12, cold_start=start, cold_start_cv=0.3 if chance else 0.0)
    risk = Spot(reclaims_per_replica_day=200.0, storms_per_day=100.0)
    spot = steady.model_copy(update={"name": "spot", "price_class": "spot", "min_replicas": 0, "spot": risk})
    return ScalingSpec(slo=Slo(ttft_s=2.0, tpot_s=0.05), pools=(steady, spot) if chance else (steady,))


class ReferenceRule:
    """What a learned policy does whose outputs are all zero."""

    name = "reference"

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def reset(self, services: Bools | None = None) -> None:
        """Nothing to forget."""

    def propose(self, observation: Observation) -> Target:
        zeros = np.zeros((len(self._fleet), 4))
        return decode_action(zeros, observation, self._fleet, InterfaceSpec().action)


class Log:
    """Keeps decisions."""

    def __init__(self) -> None:
        self.decisions: list[Decision] = []

    def record(self, decision: Decision) -> None:
        self.decisions.append(decision)

    def conclude(self, decision: Decision) -> None:
        """Nothing more to keep."""


def controlled(spec: ScalingSpec, trace: Trace, policy_of: Callable[[Fleet], Policy], until_s: float) -> list[Decision]:
    cluster, fleet, log = SimulatedCluster.replay([spec], [trace], [3]), Fleet.from_specs([spec]), Log()
    decider = Decider(fleet, spec.interface.window, spec.guardrails)
    Controller(decider, policy_of(fleet), cluster, cluster, cluster, log, 15.0).run(until_s)
    return log.decisions


def as_arrays(decision: Decision) -> dict[str, npt.NDArray[np.float64]]:
    measured = {field.name: getattr(decision.snapshot, field.name) for field in fields(Snapshot)}
    return {
        **measured,
        "settled replicas": decision.settled.replicas,
        "settled caps": decision.settled.batch_cap,
        "reasons": decision.reasons,
    }


@pytest.mark.parametrize("policy_of", [TokenDemandPolicy, HpaPolicy, ReferenceRule])
def test_the_controller_decides_as_the_core_driven_by_hand(policy_of: Callable[[Fleet], Policy]) -> None:
    """Decision for decision over 20 minutes with a burst, random start times and spot reclaims."""
    spec, trace = parity_spec(chance=True), bursty_trace()
    decisions = controlled(spec, trace, policy_of, 1200.0)
    cluster, fleet = SimulatedCluster.replay([spec], [trace], [3]), Fleet.from_specs([spec])
    decider, policy = Decider(fleet, spec.interface.window, spec.guardrails), policy_of(fleet)
    assert len(decisions) == 80
    for decision in decisions:
        cluster.run_window()
        observation = decider.observe(cluster.read())
        proposed = policy.propose(observation)
        settled, reasons = decider.settle(proposed, observation)
        by_hand = Decision(observation.snapshot, proposed, settled, reasons, decision.outcome, policy.name)
        expected = as_arrays(by_hand)
        for name, value in as_arrays(decision).items():
            np.testing.assert_array_equal(value, expected[name], err_msg=name)
        cluster.apply(settled)
    assert sum(int(decision.outcome[0]) == Outcome.SCALED for decision in decisions) > 5
    assert max(int(decision.settled.replicas.sum()) for decision in decisions) > 4


def test_the_controller_decides_as_a_training_episode_with_zero_actions() -> None:
    """The episode's own slice of the trace, replayed under the controller: same windows, same targets, 60 times."""
    spec, trace, steps = parity_spec(chance=False), bursty_trace(), 60
    episodes = Episodes(ScenarioBank.of([spec], [trace], [0]), 1, EpisodeSpec(steps=steps), 4)
    seen = [episodes.reset(stagger=False).snapshot]
    service = episodes.cluster.arrays.service[0]
    origin_s = float(service["origin_s"])
    span_s = np.array([[origin_s], [origin_s + episodes.length_s]])
    rows = slice(*episodes.bank.library.rows(np.array([0]), span_s).ravel())
    initial = int(seen[0].replicas_target[0, 0])
    seen += [episodes.step(np.zeros((1, 4))).observation.snapshot for _ in range(steps)]
    cut = Trace.from_arrays(
        arrival_s=trace.arrival_s[rows] - origin_s,
        prompt_tokens=trace.prompt_tokens[rows],
        output_tokens=trace.output_tokens[rows],
    )
    start = spec.pools[0].model_copy(update={"initial_replicas": initial})
    decisions = controlled(spec.model_copy(update={"pools": (start,)}), cut, ReferenceRule, 15.0 * (steps + 1))
    assert len(decisions) == len(seen)
    for tick, (decision, snapshot) in enumerate(zip(decisions, seen, strict=True)):
        for field in fields(Snapshot):
            if field.name.endswith("_histogram_rps"):
                continue  # training keeps none, and no feature is made of them
            ours, theirs = getattr(decision.snapshot, field.name), getattr(snapshot, field.name)
            np.testing.assert_array_equal(ours, theirs, err_msg=f"{field.name} at tick {tick}")
    for decision, snapshot in zip(decisions[:-1], seen[1:], strict=True):
        assert decision.settled.replicas.tolist() == snapshot.replicas_target.tolist()
        assert decision.settled.batch_cap.tolist() == snapshot.batch_cap.tolist()
    assert len({int(decision.settled.replicas[0, 0]) for decision in decisions}) > 3

"""Policies that never answer: a real network that computes for ever, and Python that waits."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from hanging_network import hanging_bundle
from live_fakes import LiveWorld, burst, live_config, service_spec

from autoscaler.versions.follower import warmed
from autoscaler.versions.ladder import Rung
from policies.contract import Bools, Observation, Outcome, Reason, Target
from policies.fleet import Fleet

LIMITS = {"read_s": 60.0, "record_s": 60.0, "act_s": 60.0, "conclude_s": 60.0, "decide_s": 0.5}


def asked() -> list[threading.Thread]:
    """Threads in which a policy has been asked and has not answered."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("jevons-policy-")]


@pytest.mark.plays(
    "a policy that computes for ever",
    "the baseline decides, the policy is not asked again (`policy_failed`)",
)
def test_a_network_that_computes_for_ever_gives_way_to_the_baseline_and_is_not_asked_again(tmp_path: Path) -> None:
    spec = service_spec()
    world = LiveWorld([spec], [burst()])
    service = world.service(live_config(tmp_path, limits=LIMITS))
    bundle = hanging_bundle()
    network = warmed(bundle, Fleet.from_specs([spec]), spec.interface)  # the warm-up passes
    asks, outputs = [], network.outputs
    network.outputs = lambda features: asks.append(1) or outputs(features)  # type: ignore[method-assign,func-returns-value]
    service.ladder.exchange(network)
    decisions = world.run(service, 20)
    assert len(asks) == 1
    assert {int(decision.details["rung"][0]) for decision in decisions} == {Rung.BASELINE}
    assert all(Reason.POLICY_FAILED & int(decision.reasons[0]) for decision in decisions)
    assert {Outcome(int(decision.outcome[0])).name for decision in decisions} <= {"SCALED", "UNCHANGED"}
    assert "policy learned: no answer within 0.5 s; it is not asked again" in service.status()["problems"]
    for thread in asked():  # it was told to stop, so that it does not burn a core for ever
        thread.join(60.0)
        assert not thread.is_alive()
    service.close()


class Late:
    """Answers when it is let go."""

    name = "late"

    def __init__(self) -> None:
        self.go = threading.Event()

    def reset(self, services: Bools | None = None) -> None:
        """Nothing to forget."""

    def propose(self, observation: Observation) -> Target:
        self.go.wait(60.0)
        return Target(np.full((1, 1), 12), np.full((1, 1), 1))


@pytest.mark.parametrize(("place", "outcomes"), [("baseline", {"HELD"}), ("peer", {"SCALED", "UNCHANGED"})])
def test_a_late_answer_changes_nothing(tmp_path: Path, place: str, outcomes: set[str]) -> None:
    world = LiveWorld([service_spec()], [burst()])
    service = world.service(live_config(tmp_path, limits=LIMITS))
    late = Late()
    if place == "baseline":
        service.ladder.baseline = late
    else:
        service.counterfactuals.peers["late"] = late
    decision = world.run(service, 1)[0]
    assert Outcome(int(decision.outcome[0])).name in outcomes
    assert "peer late/replicas" not in decision.details
    before = {name: array.copy() for name, array in service.decider.state().items()}
    (thread,) = asked()
    late.go.set()
    thread.join(60.0)
    for name, array in service.decider.state().items():
        np.testing.assert_array_equal(array, before[name], err_msg=name)
    assert any("no answer within 0.5 s" in problem for problem in service.status()["problems"])
    if place == "baseline":  # below it there is nothing: it is asked again, or the fleet would be held for ever
        decision = world.run(service, 1)[0]
        assert Outcome(int(decision.outcome[0])).name in {"SCALED", "UNCHANGED"}
        assert service.status()["problems"] == []
    service.close()

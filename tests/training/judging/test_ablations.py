import numpy as np
import pytest
from command_line import refusal
from worlds import ENGINE, chat

from policies.action import reference_batch_cap
from policies.baselines.reactive import ReactivePolicy
from policies.decider import Decider
from policies.engine import ConfigError
from policies.fleet import Fleet
from policies.learned import LearnedPolicy
from policies.lineup import resolve
from training.judging.ablations import ABLATIONS
from training.replaying.world import World

BY_NAME = {ablation.name: ablation for ablation in ABLATIONS}
POOLS = [
    {"name": "on-demand", "engine": ENGINE, "max_replicas": 20},
    {"name": "spot", "engine": ENGINE, "max_replicas": 20, "price_class": "spot", "usd_per_gpu_hour": 0.6},
]


@pytest.fixture(scope="module")
def scenario():
    return chat(pools=POOLS, trace={"generator": {"profile": "chat", "duration_s": 600, "mean_rps": 8}})


@pytest.fixture(scope="module")
def observation(scenario):
    """After two minutes."""
    world = World([scenario.spec], [scenario.requests(0)], [0])
    decider = Decider(world.fleet, scenario.spec.interface.window, scenario.guardrails)
    for tick in range(1, 9):
        world.cluster.wait_until(15.0 * tick)
        seen = decider.observe(world.cluster.read())
    return seen


@pytest.fixture(scope="module")
def fleet(scenario):
    return Fleet.from_specs([scenario.spec])


def targets(name, scenario, fleet, observation, bundle="learned"):
    return BY_NAME[name].make(resolve(bundle), fleet, scenario.spec.interface).propose(observation)


def test_the_first_ablation_is_the_learned_policy(scenario, fleet, observation):
    whole = LearnedPolicy(resolve("learned").bundle, fleet, scenario.spec.interface).propose(observation)
    found = targets("replicas, cap, pools", scenario, fleet, observation)
    assert (found.replicas.tolist(), found.batch_cap.tolist()) == (whole.replicas.tolist(), whole.batch_cap.tolist())


def test_what_the_policy_does_not_decide_comes_from_elsewhere(scenario, fleet, observation):
    whole = targets("replicas, cap, pools", scenario, fleet, observation)
    rule = ReactivePolicy(fleet).propose(observation)
    reference = reference_batch_cap(observation, fleet)
    engine = fleet.max_num_seqs.astype(int)
    expected = {
        "replicas, pools": (whole.replicas, reference),
        "replicas, pools; engine's cap": (whole.replicas, engine),
        "cap, on reactive": (rule.replicas, whole.batch_cap),
        "nothing: reactive": (rule.replicas, rule.batch_cap),
    }
    for name, (replicas, cap) in expected.items():
        found = targets(name, scenario, fleet, observation)
        assert (found.replicas.tolist(), found.batch_cap.tolist()) == (replicas.tolist(), cap.tolist()), name


def test_pools_at_the_reference_share_the_capacity_evenly(scenario, fleet, observation, monkeypatch):
    """A network that puts everything on spot is held at half; its headroom and its cap stay."""
    monkeypatch.setattr(LearnedPolicy, "outputs", lambda self, features: np.array([[0.9, 0.0, 0.4, 1.0]]))
    free = targets("replicas, cap, pools", scenario, fleet, observation)
    held = targets("replicas, cap", scenario, fleet, observation)
    assert free.replicas[0, 1] > 2 * free.replicas[0, 0]
    assert abs(int(held.replicas[0, 0]) - int(held.replicas[0, 1])) <= 1
    assert abs(int(held.replicas.sum()) - int(free.replicas.sum())) <= 1
    assert held.batch_cap.tolist() == free.batch_cap.tolist()


def test_pools_are_ablated_only_where_there_is_a_choice(scenario):
    alike = [ablation.name for ablation in ABLATIONS if not ablation.concerns(chat().spec)]
    assert alike == ["replicas, cap", "replicas", "replicas; engine's cap"]
    assert all(ablation.concerns(scenario.spec) for ablation in ABLATIONS)


def test_a_rule_cannot_be_taken_apart(scenario, fleet):
    with pytest.raises(ConfigError, match="an ablation takes a learned policy apart"):
        ABLATIONS[0].make(resolve("hpa"), fleet, scenario.spec.interface)
    assert "policy 'hpa': an ablation takes a learned policy apart" in refusal("ablate", "--policy", "hpa")

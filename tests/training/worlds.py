"""Small scenarios that several test modules share."""

from envs.traffic.trace import Trace
from policies.spec import find_engine, shipped_configs
from training.replaying.scenarios import Scenario, Suite

ENGINE = find_engine("llama-3.1-8b-l40s", shipped_configs()).model_dump()
START = {"node_s": 0, "image_s": 5, "weights_s": 10, "warmup_s": 15}


def tiny_trace() -> Trace:
    return Trace.from_arrays([0.0, 1.0], [10, 10], [2, 2], duration_s=900.0)


def chat(**fields) -> Scenario:
    """Ten minutes of chat for up to five replicas."""
    defaults = {
        "name": "chat",
        "trace": {"generator": {"profile": "chat", "duration_s": 600, "mean_rps": 8}},
        "pools": [{"engine": ENGINE, "max_replicas": 5, "initial_replicas": 2, "cold_start": START}],
        "slo": {"ttft_s": 2.0, "tpot_s": 0.08, "attainment": 0.9},
    }
    return Scenario.model_validate({**defaults, **fields})


def suite_of(*scenarios: Scenario) -> Suite:
    return Suite(name="tiny", scenarios=scenarios)

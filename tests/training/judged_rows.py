"""Scores of a toy evaluation."""

import math
from dataclasses import replace

from worlds import tiny_trace

from training.replaying.scores import REFERENCE, unscored


def scored(policy, usd, holds=True, tuned="default", scenario="one", seed=0):
    row = unscored(scenario, policy, seed, tiny_trace(), 900.0).with_cost(usd, usd / 2, usd / 10, 0.0)
    computed = policy == "bound"
    return replace(row, tuned=tuned, holds_slo=holds, attainment=math.nan if computed else 0.97 if holds else 0.5)


def scenario_of(name="one", source="generated", servable=True):
    return {
        "name": name,
        "description": "what it is",
        "source": source,
        "servable": servable,
        "slo": {"ttft_s": 1.0, "tpot_s": 0.05, "attainment": 0.95},
        "pools": [
            {
                "engine": "e",
                "max_replicas": 4,
                "usd_per_gpu_hour": 2.0,
                "price_class": "on_demand",
                "cold_start_s": 60.0,
            }
        ],
    }


ROWS = (
    scored("hpa", 30.0),
    scored("hpa", 18.0, tuned="train"),
    scored("hpa", 12.0, tuned="hindsight"),
    scored("knative", 9.0, holds=False),
    scored("reactive", 15.0, tuned="self"),
    scored("bound", 8.0, tuned=REFERENCE),
    scored("plan", 10.0, tuned=REFERENCE),
)

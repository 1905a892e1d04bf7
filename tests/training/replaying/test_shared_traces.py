"""The main job on real traffic: a slice of each recorded trace that lies beside the checkout, when it does."""

from pathlib import Path

import pytest
import yaml

from training.judging.evaluate import evaluate
from training.replaying.scenarios import load_suite

TRACES = Path(__file__).resolve().parents[4] / "shared" / "traces"


@pytest.mark.parametrize(
    ("file", "scale", "requests"), [("azure2023_conv.parquet", 1.0, 6000), ("servegen_r1.parquet", 0.5, 2000)]
)
def test_twenty_minutes_of_recorded_traffic_are_judged(file, scale, requests, tmp_path):
    if not (TRACES / file).is_file():
        pytest.skip(f"{file} is not beside this checkout")
    path = tmp_path / "suite.yaml"
    scenario = {
        "name": file,
        "trace": {"file": str(TRACES / file)},
        "slice": ["5m", "25m"],
        "scale": scale,
        "pools": [{"engine": "llama-3.1-8b-h100", "min_replicas": 1, "max_replicas": 6, "initial_replicas": 6}],
        "slo": {"ttft_s": 2.0, "tpot_s": 0.05, "attainment": 0.9},
    }
    path.write_text(yaml.safe_dump({"scenarios": [scenario]}))
    evaluation = evaluate(load_suite(path), ["static", "token-demand"])
    static, demand = evaluation.rows
    assert static.requests == demand.requests > requests * 0.5
    assert static.holds_slo
    assert static.finished + static.rejected == static.requests
    assert demand.usd < static.usd
    assert 0 < static.usd_per_mtok < 100

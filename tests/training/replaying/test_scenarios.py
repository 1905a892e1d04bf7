from pathlib import Path

import polars as pl
import pytest
import yaml

from envs.traffic.trace import Trace, TraceError
from envs.traffic.trace_files import write_trace
from policies.engine import ConfigError
from training.replaying.scenarios import find_suite, load_suite, parse_duration, shipped_suites

GENERATED = {"generator": {"profile": "chat", "duration_s": 600, "mean_rps": 2}}
POOL = {"engine": "llama-3.1-8b-h100", "max_replicas": 3}
SLO = {"ttft_s": 1.0, "tpot_s": 0.05}


def write_suite(folder: Path, *scenarios, **top) -> Path:
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump({**top, "scenarios": list(scenarios)}))
    return path


def scenario(**fields):
    return {"name": "one", "trace": GENERATED, "pools": [POOL], "slo": SLO, **fields}


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "traces" / "log.csv"
    path.parent.mkdir()
    path.write_text("arrival_s,prompt_tokens,output_tokens\n" + "".join(f"{t},100,10\n" for t in range(0, 600, 3)))
    return path


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90.0), ("20m", 1200.0), ("1h30m", 5400.0), ("1.5h", 5400.0), ("2d", 172800.0)]
)
def test_durations_have_units(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["soon", "", "5", "1h then 2m"])
def test_a_malformed_duration_is_refused(text):
    with pytest.raises(ValueError, match="expected seconds or a duration"):
        parse_duration(text)


def test_a_trace_file_is_relative_to_the_suite_and_sliced(tmp_path, log):
    path = write_suite(tmp_path, scenario(trace={"file": "traces/log.csv"}, slice=["1m", 300]))
    suite = load_suite(path)
    trace = suite.scenarios[0].requests(0)
    assert (suite.name, trace.duration_s, len(trace)) == ("suite", 240.0, 80)


def test_an_absolute_trace_file_and_an_engine_file_beside_the_suite_are_found(tmp_path, log):
    engine = (find_suite("demo").parents[1] / "engines" / "llama-3.1-8b-l40s.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(engine)
    pools = [{"engine": "mine.yaml", "max_replicas": 2}]
    suite = load_suite(write_suite(tmp_path, scenario(trace={"file": str(log)}, pools=pools)))
    assert suite.scenarios[0].pools[0].engine.gpu == "L40S"
    assert suite.scenarios[0].trace.file == log


def test_scale_changes_the_rate_and_keeps_the_duration(tmp_path, log):
    trace = load_suite(write_suite(tmp_path, scenario(trace={"file": str(log)}, scale=2.5))).scenarios[0].requests(1)
    assert (len(trace), trace.duration_s) == (500, 597.0)


def test_ticks_are_spread_where_asked(tmp_path, log):
    given = load_suite(write_suite(tmp_path, scenario(trace={"file": str(log)}, spread_ticks=3))).scenarios[0]
    spread = given.requests(0)
    assert ((spread.arrival_s % 3) > 0.01).mean() > 0.9
    assert not (spread.arrival_s == given.requests(1).arrival_s).any()


def test_generated_traffic_differs_by_seed_and_repeats_itself(tmp_path):
    given = load_suite(write_suite(tmp_path, scenario(seeds=3))).scenarios[0]
    assert given.seeds == (0, 1, 2)
    assert given.requests(1).digest() == given.requests(1).digest() != given.requests(2).digest()


def test_defaults_fill_in_and_merge_the_objectives(tmp_path):
    defaults = {"trace": GENERATED, "pools": [POOL], "slo": {**SLO, "attainment": 0.9}, "seeds": [4]}
    path = write_suite(tmp_path, {"name": "a"}, {"name": "b", "slo": {"ttft_s": 3.0}, "seeds": 2}, defaults=defaults)
    first, second = load_suite(path).scenarios
    assert (first.slo.ttft_s, first.slo.attainment, first.seeds) == (1.0, 0.9, (4,))
    assert (second.slo.ttft_s, second.slo.attainment, second.seeds) == (3.0, 0.9, (0, 1))


def test_overrides_reach_the_scaling_spec(tmp_path):
    fields = {
        "control_interval_s": "30s",
        "metrics_delay_s": 2,
        "guardrails": {"gpu_budget": 2},
        "objective": {"overhead_rate": 0.0},
    }
    spec = load_suite(write_suite(tmp_path, scenario(**fields))).scenarios[0].spec
    assert spec.interface.window.model_dump() == {"control_interval_s": 30.0, "metrics_delay_s": 2.0}
    assert (spec.guardrails.gpu_budget, spec.objective.overhead_rate, spec.service) == (2, 0.0, "one")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"trace": {"file": "none.csv"}}, "scenario 'one': field trace.file: .*none.csv: no such file"),
        ({"trace": {}}, "scenario 'one': field trace: .*expected one of file, rates and generator"),
        ({"trace": {"generator": {"profile": "chat", "duration_s": 60}}}, "field trace.generator.mean_rps: Field req"),
        (
            {"pools": [{**POOL, "engine": "gpt-9"}]},
            "scenario 'one': field pools.0.engine: no engine profile named 'gpt-9'",
        ),
        ({"pools": [{**POOL, "max_replicas": 0}]}, "scenario 'one': field pools.0.max_replicas: .*greater"),
        ({"pools": [POOL, POOL]}, "pools need different names"),
        ({"pools": []}, "field pools"),
        ({"slo": {"ttft_s": 0, "tpot_s": 1}}, "field slo.ttft_s"),
        ({"slice": ["5m", "1m"]}, "slice must end after its start"),
        ({"slice": ["soon", "1m"]}, "field slice.0: .*expected seconds or a duration"),
        ({"seeds": [1, 1]}, "seeds must differ"),
        ({"seeds": 0}, "field seeds"),
        ({"metrics_delay_s": 15}, "metrics_delay_s must be below control_interval_s"),
        ({"speed": 2}, "scenario 'one': field speed: Extra inputs are not permitted"),
    ],
)
def test_a_wrong_field_is_one_sentence_with_file_scenario_and_field(tmp_path, fields, sentence):
    path = write_suite(tmp_path, scenario(**fields))
    with pytest.raises(ConfigError, match=sentence) as caught:
        load_suite(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "expected a mapping"),
        ("scenarios: []", "field scenarios: expected a list"),
        ("scenarios: [3]", r"field scenarios.0: expected a mapping"),
        ("defaults: 3\nscenarios: [{}]", "field defaults: expected a mapping"),
        ("scenarios: [", "not valid YAML"),
    ],
)
def test_a_malformed_suite_is_refused(tmp_path, text, sentence):
    path = tmp_path / "suite.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        load_suite(path)


def test_two_scenarios_may_not_share_a_name(tmp_path):
    with pytest.raises(ConfigError, match="two scenarios are named 'one'"):
        load_suite(write_suite(tmp_path, scenario(), scenario()))


def test_an_unknown_suite_lists_those_that_ship():
    with pytest.raises(ConfigError, match="no suite named 'big'; shipped suites: demo, dev, full, gate, pools, smoke"):
        load_suite("big")


def test_scenarios_are_chosen_by_name(tmp_path):
    suite = load_suite(write_suite(tmp_path, scenario(), scenario(name="two")))
    assert [chosen.name for chosen in suite.only(["two"]).scenarios] == ["two"]
    with pytest.raises(ConfigError, match="has no scenario 'three'; it has: one, two"):
        suite.only(["three"])


def test_a_slice_without_requests_is_refused(tmp_path):
    write_trace(Trace.from_arrays([0.0, 500.0], [5, 5], [5, 5]), tmp_path / "gap.parquet")
    given = load_suite(write_suite(tmp_path, scenario(trace={"file": "gap.parquet"}, slice=[100, 200]))).scenarios[0]
    with pytest.raises(TraceError, match=r"scenario 'one': .*no request is left"):
        given.requests(0)


@pytest.mark.parametrize("name", shipped_suites())
def test_shipped_suites_load(name):
    suite = load_suite(name)
    assert suite.name == name
    assert suite.description


TRACES = {"file": "$JEVONS_TRACES/log.csv"}


def optional_suite(tmp_path, trace):
    pools = [{"engine": "llama-3.1-8b-h100", "max_replicas": 2}]
    both = [
        {"name": "made", "trace": {"generator": {"profile": "chat", "duration_s": 60, "mean_rps": 1}}},
        {"name": "recorded", "trace": trace, "slice": [10, 20], "train_slice": [0, 10]},
    ]
    path = tmp_path / "suite.yaml"
    path.write_text(
        yaml.safe_dump({"defaults": {"pools": pools, "slo": {"ttft_s": 1, "tpot_s": 0.1}}, "scenarios": both})
    )
    return path


@pytest.mark.parametrize("folder", [None, "empty"])
def test_a_scenario_without_its_recorded_trace_is_skipped_and_says_so(folder, tmp_path, monkeypatch):
    monkeypatch.delenv("JEVONS_TRACES", raising=False)
    if folder:
        monkeypatch.setenv("JEVONS_TRACES", str(tmp_path / folder))
    suite = load_suite(optional_suite(tmp_path, TRACES))
    told = f"log.csv is not in {tmp_path / folder}" if folder else "JEVONS_TRACES is not set"
    assert [scenario.name for scenario in suite.scenarios] == ["made"]
    assert [(item.name, item.reason) for item in suite.skipped] == [("recorded", f"needs recorded traces: {told}")]


def test_a_recorded_trace_in_the_named_folder_is_real_traffic(tmp_path, monkeypatch):
    monkeypatch.setenv("JEVONS_TRACES", str(tmp_path))
    (tmp_path / "log.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,10,5\n12,10,5\n30,10,5\n")
    made, recorded = load_suite(optional_suite(tmp_path, TRACES)).scenarios
    assert [made.trace.kind, recorded.trace.kind] == ["generated", "real"]
    assert [len(recorded.requests(0)), len(recorded.training().requests(0))] == [1, 1]


def test_requests_are_made_from_measured_client_rates_at_native_scale(tmp_path, monkeypatch):
    monkeypatch.setenv("JEVONS_TRACES", str(tmp_path))
    (tmp_path / "log.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,10,5\n12,20,6\n")
    rates = {"window_start_s": [0, 600], "client_id": [1, 1], "rate_rps": [5.0, 1.0], "iat_cv": [1.0, 1.0]}
    pl.DataFrame(rates).write_parquet(tmp_path / "rates.parquet")
    source = {"rates": {"file": "$JEVONS_TRACES/rates.parquet", "lengths": "$JEVONS_TRACES/log.csv"}}
    path = optional_suite(tmp_path, source)
    path.write_text(path.read_text().replace("- 10\n  - 20", "- 600\n  - 1200").replace("- 0\n  - 10", "- 0\n  - 600"))
    _, recorded = load_suite(path).scenarios
    train = recorded.training()
    assert (recorded.slice, train.slice) == ((600.0, 1200.0), (0.0, 600.0))
    assert len(train.requests(0)) == pytest.approx(3000, rel=0.1)
    assert len(recorded.requests(0)) == pytest.approx(600, rel=0.2)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"train_slice": [0, 15], "slice": [10, 20]}, "must not overlap"),
        ({"train_slice": [0, 15]}, "must not overlap"),
        ({"train_slice": [9, 3], "slice": [10, 20]}, "must end after its start"),
        ({"seeds": [0, 1], "train_seeds": [1]}, "train_seeds must differ from seeds"),
    ],
)
def test_policies_are_never_tuned_on_what_they_are_judged_on(fields, sentence, tmp_path):
    path = optional_suite(tmp_path, {"generator": {"profile": "chat", "duration_s": 60, "mean_rps": 1}})
    data = yaml.safe_load(path.read_text())
    data["scenarios"] = [{**data["scenarios"][0], **fields}]
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError, match=sentence):
        load_suite(path)


def test_the_full_suite_covers_the_axes():
    """Sixteen scenarios and more without any recorded trace."""
    suite = load_suite("full")
    scenarios = suite.scenarios
    assert len(scenarios) >= 16
    profiles = {scenario.trace.generator.profile for scenario in scenarios if scenario.trace.generator}
    assert profiles == {"chat", "code", "reasoning", "agentic", "diurnal_mix", "flash_crowd", "regime_change"}
    assert {pool.start.total_s for scenario in scenarios for pool in scenario.pools} >= {0, 60, 120, 300}
    assert {len(scenario.pools) for scenario in scenarios} == {1, 2}
    assert any(pool.price_class == "spot" for scenario in scenarios for pool in scenario.pools)
    assert len({pool.engine.name for scenario in scenarios for pool in scenario.pools}) >= 5
    assert len({scenario.slo for scenario in scenarios}) >= 5

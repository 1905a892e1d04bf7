import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from untrained import untrained_manifest

from envs.cluster.simulation import SimulatedCluster
from envs.traffic.trace import Trace
from envs.traffic.trace_files import write_trace
from policies import lineup
from policies.action import ACTIONS
from policies.contract import Outcome
from policies.decider import Decider
from policies.engine import ConfigError
from policies.fleet import Fleet
from policies.learned import BundleMismatch, load_bundle, write_bundle
from policies.observation import FEATURES
from policies.spec import PoolSpec, Slo, find_engine, shipped_configs
from training.judging.evaluate import bootstrap_interval, evaluate
from training.judging.scenario_runs import run_scenario
from training.replaying.scenarios import Scenario, Suite
from training.replaying.scores import UNLABELLED, judge, split_bill, worst_hour
from training.replaying.world import read_horizon

ENGINE = find_engine("llama-3.1-8b-h100", shipped_configs())
SLO = {"ttft_s": 0.5, "tpot_s": 0.03, "attainment": 0.9}


def make(**fields) -> Scenario:
    defaults = {
        "name": "chat",
        "trace": {"generator": {"profile": "chat", "duration_s": 900, "mean_rps": 12}},
        "pools": [{"engine": ENGINE.model_dump(), "max_replicas": 6}],
        "slo": SLO,
        "seeds": 2,
    }
    return Scenario.model_validate({**defaults, **fields})


def suite_of(*scenarios: Scenario) -> Suite:
    return Suite(name="test", scenarios=scenarios)


@pytest.fixture
def labelled(tmp_path):
    """Two tenants, one of them with long requests; some requests have none."""
    rng = np.random.default_rng(0)
    arrival_s = np.sort(rng.uniform(0, 600, 3000))
    tenant = rng.integers(-1, 2, 3000)
    trace = Trace.from_arrays(
        arrival_s,
        np.where(tenant == 1, 900, 90),
        np.full(3000, 40),
        tenant=tenant,
        tenants=("a", "b"),
        duration_s=600.0,
    )
    write_trace(trace, tmp_path / "labelled.parquet")
    return make(name="tenants", trace={"file": tmp_path / "labelled.parquet"}, seeds=[0])


@pytest.fixture(scope="module")
def judged():
    return evaluate(suite_of(make()), ["static", "token-demand"])


def test_there_is_one_row_per_scenario_policy_and_seed(judged):
    keys = [(row.scenario, row.policy, row.tuned, row.seed) for row in judged.rows]
    assert keys == [("chat", policy, "default", seed) for policy in ("static", "token-demand") for seed in (0, 1)]


def test_attainment_is_that_of_a_replay_judged_by_hand():
    """A static fleet needs no decision, so a replay without a controller gives the same request times."""
    pools = [{"engine": ENGINE.model_dump(), "min_replicas": 1, "max_replicas": 1}]
    scenario = make(seeds=[3], pools=pools, slo={"ttft_s": 0.12, "tpot_s": 0.012})
    (row,) = evaluate(suite_of(scenario), ["static"]).rows
    trace = scenario.requests(3)
    cluster = SimulatedCluster.replay([scenario.spec], [trace], [3])
    cluster.wait_until(3600.0)
    first_s, finish_s = cluster.arrays.first_token_s, cluster.arrays.finish_s
    met = [
        end == end and first - sent <= 0.12 and (tokens == 1 or (end - first) / (tokens - 1) <= 0.012)
        for sent, first, end, tokens in zip(trace.arrival_s, first_s, finish_s, trace.output_tokens, strict=True)
    ]
    assert 0.02 < row.attainment < 0.98
    assert row.attainment == pytest.approx(sum(met) / len(trace), abs=1e-12)
    assert row.ttft_attainment == pytest.approx(np.mean(first_s - trace.arrival_s <= 0.12), abs=1e-12)
    assert row.requests == row.finished == len(trace)


def test_dollars_of_a_static_fleet_by_hand():
    scenario = make(seeds=[0], objective={"overhead_rate": 0.25})
    (row,) = evaluate(suite_of(scenario), ["static:replicas=3"]).rows
    gpu_usd = 3 * 900 / 3600 * ENGINE.usd_per_gpu_hour
    assert row.gpu_usd_by_pool == {ENGINE.name: pytest.approx(gpu_usd, rel=1e-12)}
    assert row.usd == pytest.approx(gpu_usd * 1.25, rel=1e-12)
    assert (row.replica_hours, row.gpu_hours) == (pytest.approx(0.75), pytest.approx(0.75))
    assert (row.scale_events, row.scheduling_efficiency) == (0, 1.0)
    assert row.usd_per_mtok == pytest.approx(row.usd / row.served_tokens * 1e6, rel=1e-12)
    assert row.usd_per_good_mtok >= row.usd_per_mtok


def test_tokens_are_those_served_by_the_end_of_the_trace():
    scenario = make(seeds=[0])
    (row,) = evaluate(suite_of(scenario), ["static"]).rows
    trace = scenario.requests(0)
    cluster = SimulatedCluster.replay([lineup.starting_spec(lineup.resolve("static"), scenario.spec)], [trace], [0])
    cluster.wait_until(1500.0)
    done = cluster.arrays.finish_s <= 900.0
    assert row.served_tokens == int(trace.prompt_tokens[done].sum() + trace.output_tokens[done].sum())
    assert not done.all()
    assert row.finished == len(trace)


def test_node_billing_counts_whole_nodes():
    pools = [{"engine": ENGINE.model_dump(), "min_replicas": 2, "max_replicas": 2, "billing": "node"}]
    (row,) = evaluate(suite_of(make(seeds=[0], pools=pools)), ["static"]).rows
    assert row.scheduling_efficiency == pytest.approx(2 / 8)
    assert row.gpu_hours == pytest.approx(8 * 0.25)
    assert row.gpu_usd_by_pool == {ENGINE.name: pytest.approx(8 * 0.25 * ENGINE.usd_per_gpu_hour)}


def test_cost_by_tenant_sums_to_the_bill_in_proportion_to_tokens(labelled):
    (row,) = evaluate(suite_of(labelled), ["static"]).rows
    assert set(row.usd_by_tenant) == {UNLABELLED, "a", "b"}
    assert sum(row.usd_by_tenant.values()) == pytest.approx(row.usd, rel=1e-12)
    assert row.usd_by_tenant["b"] > 5 * row.usd_by_tenant["a"]
    assert row.usd_by_model == {}


def test_a_rejected_request_is_a_miss_and_is_not_served(tmp_path):
    write_trace(Trace.from_arrays([1.0, 2.0], [10**6, 100], [10, 10], duration_s=60.0), tmp_path / "huge.parquet")
    (row,) = evaluate(suite_of(make(trace={"file": tmp_path / "huge.parquet"}, seeds=[0])), ["static"]).rows
    assert (row.requests, row.finished, row.rejected, row.attainment, row.tpot_attainment) == (2, 1, 1, 0.5, 0.5)
    assert row.served_tokens == 110


def test_what_never_finishes_is_a_miss():
    scenario = make(
        seeds=[0],
        trace={"generator": {"profile": "chat", "duration_s": 300, "mean_rps": 200}},
        pools=[{"engine": ENGINE.model_dump(), "min_replicas": 1, "max_replicas": 1, "initial_batch_cap": 4}],
    )
    (row,) = evaluate(suite_of(scenario), ["static:batch_cap=4"]).rows
    assert row.finished < row.requests
    assert row.attainment <= row.finished / row.requests


def test_several_processes_give_what_one_gives(judged):
    parallel = evaluate(suite_of(make()), ["static", "token-demand"], jobs=2)
    first, second = judged.to_json(), parallel.to_json()
    for result in (first, second):
        for row in (*result["rows"], *result["by_scenario"]):
            del row["wall_s"]
    assert first == second
    key = ("chat", "token-demand")
    assert (judged.timelines[key].target == parallel.timelines[key].target).all()


def test_the_controller_decides_as_the_decision_core_driven_by_hand():
    scenario = make()
    run = run_scenario(scenario, lineup.resolve("token-demand"))
    specs = [scenario.spec] * 2
    fleet = Fleet.from_specs(specs)
    cluster = SimulatedCluster.replay(specs, [scenario.requests(seed) for seed in (0, 1)], [0, 1])
    decider = Decider(fleet, scenario.spec.interface.window, scenario.guardrails)
    policy = lineup.make_policy("token-demand", fleet, specs)
    targets, reasons = [], []
    for _ in range(60):
        cluster.run_window()
        decision = decider.tick(cluster.read(), policy)
        assert (decision.outcome != Outcome.HELD).all()
        cluster.apply(decision.settled)
        targets.append(decision.settled.replicas[0])
        reasons.append(decision.reasons[0])
    assert (run.timeline.target == np.array(targets)).all()
    assert (run.timeline.reasons == np.array(reasons)).all()
    assert len(np.unique(targets)) > 1


def test_the_timeline_ends_with_the_bill(judged):
    line = judged.timelines["chat", "static"]
    assert len(line) == 60
    assert (line.time_s[0], line.time_s[-1]) == (10.0, 895.0)
    rate = 6 * ENGINE.usd_per_gpu_hour * 1.15
    assert line.usd_per_hour == pytest.approx(np.full(60, rate))
    assert (line.ready == 6).all()


def test_means_over_seeds_come_with_an_interval(judged):
    row = judged.by_scenario()[1]
    seeds = [each.usd for each in judged.rows if each.policy == "token-demand"]
    assert row["seeds"] == 2
    assert row["usd"] == pytest.approx(np.mean(seeds))
    assert min(seeds) - 1e-9 <= row["usd_low"] <= row["usd"] <= row["usd_high"] <= max(seeds) + 1e-9
    assert bootstrap_interval([1.0]) == (None, None)


def test_metadata_names_what_was_judged(judged):
    result = judged.to_json()
    (scenario,) = result["scenarios"]
    assert scenario["spec_digest"] == make().spec.digest()
    assert scenario["trace_digests"] == [make().requests(seed).digest() for seed in (0, 1)]
    assert result["policies"][0] == {"policy": "static", "bundle_digest": None}
    assert {"jevons", "numpy", "numba"} <= set(result["versions"])


def test_a_trace_shorter_than_a_tick_is_judged_without_a_decision(tmp_path):
    write_trace(Trace.from_arrays([0.0], [10], [5]), tmp_path / "short.parquet")
    evaluation = evaluate(suite_of(make(trace={"file": tmp_path / "short.parquet"}, seeds=[0])), ["hpa"])
    assert evaluation.rows[0].attainment == 1.0
    assert evaluation.rows[0].horizon_s == 15.0


def test_verdicts_of_requests_by_hand():
    verdicts = judge(
        arrival_s=np.array([0.0, 0.0, 1.0, 1.0, 2.0]),
        first_token_s=np.array([0.5, 0.6, 1.1, 1.1, np.nan]),
        finish_s=np.array([0.5, 0.6, 1.4, 1.5, np.nan]),
        output_tokens=np.array([1, 1, 11, 11, 5]),
        slo=Slo(ttft_s=0.5, tpot_s=0.035),
    )
    assert verdicts.ttft_ok.tolist() == [True, False, True, True, False]
    assert verdicts.tpot_ok.tolist() == [True, True, True, False, False]
    assert verdicts.good.tolist() == [True, False, True, False, False]


def test_the_worst_hour_needs_enough_arrivals():
    arrival_s = np.concatenate([np.linspace(0, 3500, 100), np.linspace(3700, 7100, 100), [7300.0]])
    good = np.concatenate([np.ones(100, bool), np.arange(100) < 80, [False]])
    assert worst_hour(arrival_s, good) == pytest.approx(0.8)
    assert worst_hour(arrival_s[:10], good[:10]) == 1.0


def test_a_bill_without_labels_is_not_split():
    assert split_bill(5.0, np.ones(2), np.full(2, -1, np.int32), ()) == {}
    assert split_bill(6.0, np.array([1.0, 2.0]), np.array([0, 1], np.int32), ("a", "b")) == {"a": 2.0, "b": 4.0}


@pytest.mark.parametrize(
    ("reference", "sentence"),
    [
        ("vpa", "unknown policy 'vpa'; there are learned, reactive, token-demand, hpa, keda"),
        ("hpa:target=1", "unknown parameter 'target=1'; hpa has target_share"),
        ("hpa:target_share=0", "parameter target_share: expected a number above 0, got '0'"),
        ("static:share=2", "parameter share: expected a number above 0, at most 1, got '2'"),
        ("keda:trigger=cpu", "parameter trigger: expected one of waiting, running, in_system, got 'cpu'"),
        ("hpa:max_up_replicas=1.5", "parameter max_up_replicas: expected a whole number of at least 1, got '1.5'"),
        ("static+self", "a constant fleet looks at nothing, so it cannot tune itself"),
        ("static:replicas=many", "parameter replicas: expected a number of replicas"),
        ("static:replicas=1/2", "scenario 'chat', policy 'static:replicas=1/2': replicas for 2 pools, but there are 1"),
        ("token-demand:headroom=nan", "parameter headroom: expected a number above 0"),
    ],
)
def test_an_unknown_policy_or_parameter_is_one_sentence(reference, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        evaluate(suite_of(make()), [reference])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("reference", "sentence"),
    [
        ("learned:price=6", r"unknown parameter 'price=6'; learned has first_price, as in learned:first_price=VALUE"),
        ("learned:first_price=0", r"parameter first_price: expected a number above 0, at most 90, got '0'"),
        ("models:/chat:first_price=x", r"parameter first_price: expected a number"),
    ],
)
def test_a_first_price_that_makes_no_sense_is_one_sentence(reference, sentence):
    with pytest.raises(ConfigError, match=sentence):
        lineup.resolve(reference, lambda asked: lineup.SHIPPED_BUNDLE)


def test_a_missing_pretrained_policy_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(lineup, "SHIPPED_BUNDLE", tmp_path / "none.zip")
    with pytest.raises(ConfigError, match="no pretrained policy ships with this checkout"):
        lineup.resolve("learned")


def test_a_file_that_is_no_bundle_is_refused(tmp_path):
    (tmp_path / "x.zip").write_bytes(b"not a bundle")
    with pytest.raises(BundleMismatch):
        lineup.resolve(str(tmp_path / "x.zip"))


def test_parameters_reach_the_policies():
    fleet = Fleet.from_specs([make().spec])
    assert lineup.make_policy("hpa:target_share=0.3:tolerance=0", fleet, [make().spec]).target_share == 0.3
    assert lineup.make_policy("token-demand:headroom=1.4", fleet, [make().spec]).headroom == 1.4
    bandit = lineup.make_policy("autothrottle+self:explore=0", fleet, [make().spec])
    assert (bandit.name, bandit.policy.explore) == ("autothrottle+self", 0.0)


def test_all_names_every_policy_once_and_all_self_every_one_that_can_tune_itself():
    asked = lineup.split_references(["hpa, all", "static:replicas=2"])
    named = (name for name in (*lineup.ALL, *lineup.REFERENCES) if name != "hpa")
    assert asked == ["hpa", *named, "static:replicas=2"]
    tuned = lineup.split_references(["all+self"])
    assert tuned == [f"{name}+self" for name in lineup.ALL if name != "static"]
    assert all(lineup.resolve(reference).self_tuned for reference in tuned)


def test_settings_become_a_reference_and_back():
    reference = lineup.reference_of(lineup.self_tuned("keda"), {"trigger": "running", "threshold": 2.5})
    entry = lineup.resolve(reference)
    assert (entry.kind, entry.self_tuned, entry.parameters) == ("keda", True, {"trigger": "running", "threshold": 2.5})
    assert lineup.tunable_parameters("keda+self") == lineup.BASELINES["keda"].PARAMETERS
    assert lineup.tunable_parameters("keda:threshold=2") == lineup.tunable_parameters("learned:first_price=6") == ()
    assert [name for name in lineup.ALL if not lineup.is_peer(name)] == ["learned", "reactive", "token-demand"]


@pytest.mark.parametrize("name", ["learned", str(lineup.SHIPPED_BUNDLE), "models:/chat@champion", "models:/chat/3"])
def test_every_bundle_can_be_told_its_first_price(name):
    assert len(lineup.tunable_parameters(name)) == (not name.startswith("models:/"))
    reference = lineup.reference_of(lineup.self_tuned(name), {"first_price": 6.0})
    entry = lineup.resolve(reference, lambda asked: lineup.SHIPPED_BUNDLE if asked == name else None)
    assert (entry.kind, entry.self_tuned, entry.parameters) == ("learned", True, {"first_price": 6.0})
    fleet = Fleet.from_specs([make().spec])
    assert lineup.build(entry, fleet, make().spec.interface).policy._dial.log_price == pytest.approx(np.log([6.0]))


@pytest.mark.parametrize("reference", [*lineup.ALL, "learned+self", "llm-d-slo+self"])
def test_every_policy_runs_through_the_controller(reference):
    short = make(trace={"generator": {"profile": "chat", "duration_s": 300, "mean_rps": 3}}, seeds=[0])
    (score,) = run_scenario(short, lineup.resolve(reference)).scores
    assert score.finished + score.rejected > 0
    assert score.replica_hours > 0


def test_a_static_fleet_is_there_from_the_start_unless_the_scenario_says_otherwise():
    entry = lineup.resolve("static:replicas=4")
    spec = make().spec
    assert lineup.starting_spec(entry, spec).pools[0].initial_replicas == 4
    given = spec.model_copy(update={"pools": (PoolSpec(engine=ENGINE, max_replicas=6, initial_replicas=2),)})
    assert lineup.starting_spec(entry, given) == given
    assert lineup.starting_spec(lineup.resolve("hpa"), spec) == spec


def test_progress_counts_scenarios_times_policies():
    told = []
    evaluate(suite_of(make(seeds=[0])), ["static", "hpa"], on_progress=lambda *state: told.append(state))
    assert told == [(0, 2, "chat / static"), (1, 2, "chat / static"), (2, 2, "chat / hpa")]


def test_counters_of_the_cluster_agree_with_the_verdicts():
    scenario = make(seeds=[0])
    trace = scenario.requests(0)
    cluster = SimulatedCluster.replay([scenario.spec], [trace], [0])
    usage, _ = read_horizon(cluster, 900.0)
    cluster.wait_until(3600.0)
    now = cluster.arrays
    verdicts = judge(trace.arrival_s, now.first_token_s, now.finish_s, trace.output_tokens, scenario.slo)
    done = now.finish_s <= 900.0
    assert usage.span_s.tolist() == [900.0]
    assert int(usage.good[0]) == int((verdicts.good & done).sum())
    assert int(usage.tpot_ok[0]) == int((verdicts.tpot_ok & done).sum())


@pytest.fixture
def bundle(tmp_path):
    """A bundle whose network always answers 0: the reference rule."""
    inputs, outputs = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, width])
        for name, width in (("features", len(FEATURES)), ("action", len(ACTIONS)))
    )
    weights = numpy_helper.from_array(np.zeros((len(FEATURES), len(ACTIONS)), np.float32), "weights")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["features", "weights"], ["action"])], "zero", [inputs], [outputs], [weights]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path = tmp_path / "zero.zip"
    write_bundle(path, untrained_manifest(), model.SerializeToString())
    return path


def test_a_bundle_is_judged_like_any_policy_in_any_process(bundle):
    suite = suite_of(make(seeds=[0], trace={"generator": {"profile": "chat", "duration_s": 300, "mean_rps": 5}}))
    references = [str(bundle), "static"]
    one, two = evaluate(suite, references), evaluate(suite, references, jobs=2)
    assert one.rows[0].attainment == two.rows[0].attainment > 0
    assert one.policies[0]["bundle_digest"] == load_bundle(bundle).digest


def test_a_bundle_for_another_interface_is_refused_before_anything_runs(bundle):
    slow = make(name="slow", control_interval_s=30, trace={"file": "never/read"})
    with pytest.raises(BundleMismatch, match=r"scenario 'slow', policy '.*zero.zip': .*for a decision every 15 s"):
        evaluate(suite_of(slow), [str(bundle)])

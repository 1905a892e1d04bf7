import ast
import dataclasses
from pathlib import Path

import pytest
from worlds import chat

from policies.baselines.parameters import Parameter
from policies.engine import ConfigError
from policies.learned import load_bundle, write_bundle
from policies.lineup import SHIPPED_BUNDLE, reference_of
from training.judging.evaluate import evaluate
from training.replaying import result_cache
from training.replaying.result_cache import ResultCache
from training.replaying.workers import InProcess
from training.tuning import studies
from training.tuning.studies import BATCH, trials_for
from training.tuning.tuner import TuningTask, parameters_for, try_settings, tune


class Counting(InProcess):
    """In-process workers that count, and that are cut off after a number of tasks."""

    def __init__(self, until: int = 10**6) -> None:
        super().__init__()
        self.tasks = 0
        self.until = until

    def next_done(self):
        if self.tasks == self.until:
            raise KeyboardInterrupt
        self.tasks += 1
        return super().next_done()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(studies, "TRIALS_PER_PARAMETER", 0)
    monkeypatch.setattr(studies, "WIDENINGS", 1)


QUESTION = TuningTask(chat(), "token-demand", "train")


def test_the_answer_is_the_cheapest_setting_that_was_run_and_held(quick):
    (answer,) = tune([QUESTION], InProcess(), ResultCache(None))
    (found,) = try_settings(chat().training(), [reference_of("token-demand", answer.settings)])
    assert answer.holds_slo
    assert found == (answer.attainment, answer.usd)
    assert answer.trials >= BATCH


def test_side_by_side_settings_score_as_each_alone():
    references = ["hpa:target_share=0.2", "reactive", "knative+self"]
    alone = [try_settings(chat(), [reference])[0] for reference in references]
    assert try_settings(chat(), references) == alone


def test_a_study_that_was_cut_off_goes_on_and_ends_the_same(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "TRIALS_PER_PARAMETER", BATCH)
    tasks = [TuningTask(chat(), "static", "hindsight")]
    (whole,) = tune(tasks, InProcess(), ResultCache(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        tune(tasks, Counting(until=1), ResultCache(tmp_path / "cut"))
    rest = Counting()
    (resumed,) = tune(tasks, rest, ResultCache(tmp_path / "cut"))
    assert resumed == whole
    assert rest.tasks == whole.trials // BATCH - 1


def test_an_answer_is_kept_by_digest(quick, tmp_path):
    cache = ResultCache(tmp_path)
    first = tune([QUESTION], InProcess(), cache)
    again, other = Counting(), Counting()
    assert tune([QUESTION], again, cache) == first
    tune([dataclasses.replace(QUESTION, part="hindsight")], other, cache)
    assert (again.tasks, other.tasks > 0) == (0, True)


def test_another_bundle_under_the_same_name_is_tuned_anew(quick, tmp_path):
    shipped, path = load_bundle(SHIPPED_BUNDLE), tmp_path / "policy.zip"
    ran = []
    for name in ("first", "first", "second"):
        write_bundle(path, shipped.manifest.model_copy(update={"provenance": {"name": name}}), shipped.weights)
        counting = Counting()
        (answer,) = tune([TuningTask(chat(), str(path), "train")], counting, ResultCache(tmp_path / "cache"))
        ran.append(counting.tasks > 0)
    assert ran == [True, False, True]
    assert list(answer.settings) == ["first_price"]


def test_policies_without_parameters_and_parameters_without_use_are_left_out():
    assert tune([TuningTask(chat(), "hpa:tolerance=0.2", "train")], InProcess(), ResultCache(None)) == []
    assert "spot_share" not in {item.name for item in parameters_for("token-demand", chat())}


def test_more_parameters_get_more_trials_up_to_a_limit():
    one = Parameter("x", 1.0, 0.0, 2.0)
    assert [trials_for([one] * count) for count in (1, 2, 9)] == [16, 24, 24]


@pytest.mark.parametrize(
    ("item", "value", "edge", "wider"),
    [
        (Parameter("x", 1.0, 1.0, 16.0, log=True), 1.0, "low", (0.25, 16.0)),
        (Parameter("x", 1.0, 1.0, 16.0, log=True), 16.0, "high", (1.0, 64.0)),
        (Parameter("x", 1.0, 0.0, 2.0, zero=True), 0.0, "", (0.0, 2.0)),
        (Parameter("x", 1.0, 0.5, 1.0, limit=1.0), 1.0, "", (0.5, 1.0)),
        (Parameter("x", 1.0, 0.0, 2.0), 2.0, "high", (0.0, 3.0)),
        (Parameter("x", 1, 1, 9, whole=True), 1, "", (1, 9)),
        (Parameter("x", "a", choices=("a", "b")), "a", "", (0.0, 0.0)),
    ],
)
def test_an_optimum_on_an_edge_widens_the_range_unless_nothing_lies_beyond(item, value, edge, wider):
    span = (item.low, item.high)
    assert studies._edge(item, span, {"x": value}) == edge
    assert studies._widened(item, span, edge) == wider


def test_the_train_slice_is_other_traffic_than_what_is_judged():
    scenario = chat(seeds=[3, 4])
    train = scenario.training()
    assert set(train.seeds).isdisjoint(scenario.seeds)
    cut = chat(slice=("5m", "10m"), train_slice=("0m", "5m")).training()
    assert (cut.slice, cut.seeds) == ((0.0, 300.0), (0,))


def test_tuned_and_references_stand_on_one_table(quick):
    judged = evaluate(
        tuning_suite(), ["token-demand", "static:replicas=3", "bound", "plan"], tuned=["train", "self", "hindsight"]
    )
    assert [(row.policy, row.tuned) for row in judged.rows] == [
        ("token-demand", "train"),
        ("token-demand", "self"),
        ("token-demand", "hindsight"),
        ("static:replicas=3", "default"),
        ("bound", "reference"),
        ("plan", "reference"),
    ]
    assert judged.scenarios[0]["servable"] is True
    assert [item["part"] for item in judged.tunings] == ["train", "hindsight"]


def tuning_suite():
    from worlds import suite_of

    return suite_of(chat())


def test_a_recorded_scenario_must_say_what_to_tune_on(tmp_path):
    scenario = chat(trace={"file": tmp_path / "x.csv"})
    with pytest.raises(ConfigError, match="tuning on a recorded trace needs train_slice"):
        tune([TuningTask(scenario, "hpa", "train")], InProcess(), ResultCache(None))


def test_the_digest_covers_every_module_that_a_kept_result_comes_from():
    root = Path(result_cache.__file__).parents[2]
    # Where work runs, and what the key of a result says anyway.
    beside = {f"training.replaying.{name}" for name in ("result_cache", "scenarios", "timeline", "workers")}
    found, waiting = set(), ["training.tuning.tuner", "training.references.clairvoyant"]
    while waiting:
        source = f"{waiting.pop().replace('.', '/')}.py"
        found.add(source)
        tree = ast.parse((root / source).read_text())
        modules = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        imported = {module for module in modules if module.startswith("training.")} - beside
        waiting += [module for module in imported if f"{module.replace('.', '/')}.py" not in found]
    assert found == {source for source in result_cache._SOURCES if source.startswith("training/")}

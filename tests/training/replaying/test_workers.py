import pytest
from local_ray import local_ray
from worlds import chat, suite_of

from training.judging.evaluate import evaluate
from training.judging.what_if import numbers
from training.replaying.result_cache import ResultCache
from training.replaying.workers import InProcess, open_workers


def results(workers, asked):
    for number in asked:
        workers.submit(number, numbers, "--ttft", str(number), [])
    return dict(workers.next_done() for _ in asked)


@pytest.fixture(scope="module")
def ray_cluster():
    with local_ray(cpus=2):
        yield "auto"


def test_tasks_come_back_under_their_keys():
    assert results(InProcess(), [1, 2, 3]) == {1: (1.0,), 2: (2.0,), 3: (3.0,)}


def test_an_error_of_a_task_is_raised_as_it_is():
    with open_workers(1) as workers, pytest.raises(ValueError, match="expected numbers above 0"):
        results(workers, [-1])


def test_fewer_than_one_job_is_refused():
    with pytest.raises(ValueError, match="jobs must be at least 1"), open_workers(0):
        pass


def test_ray_tasks_run_the_same_and_raise_the_same(ray_cluster):
    with open_workers(1, ray_cluster) as workers:
        assert workers.width == 2
        assert results(workers, [1, 2, 3]) == {1: (1.0,), 2: (2.0,), 3: (3.0,)}
        with pytest.raises(ValueError, match="expected numbers above 0"):
            results(workers, [-1])


def test_an_evaluation_over_ray_tasks_equals_the_serial_one(ray_cluster, tmp_path):
    """Several processes, tuning and references included, to the last bit."""
    suite = suite_of(chat(), chat(name="other", seeds=[1]))
    asked = {"policies": ["static", "bound", "plan"], "tuned": ["default", "train"]}
    serial = evaluate(suite, **asked, cache=ResultCache(tmp_path / "serial")).to_json()
    over_ray = evaluate(suite, **asked, cache=ResultCache(tmp_path / "ray"), ray_address=ray_cluster).to_json()
    for result in (serial, over_ray):
        for row in [*result["rows"], *result["by_scenario"]]:
            del row["wall_s"]
    assert over_ray == serial

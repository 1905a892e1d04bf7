"""What counts is the target that is scraped, on a real Prometheus: not its series, and not how often it is scraped."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from exporters import ConstantEngine
from kube_objects import create_deployment, create_pod, set_ready
from kube_server import KubeApiServer
from scraped_engines import ENGINE, WINDOW_S, near, part, scrape, source, spec, together, vllm
from servers import Prometheus, start, wait_until

from autoscaler.actuators.kube_api import KubeConnection
from autoscaler.actuators.kubernetes import KubernetesActuator, KubernetesConfig
from autoscaler.check import check_metrics
from autoscaler.metrics.client import PrometheusConfig
from autoscaler.metrics.prometheus import PrometheusSource
from policies.cost_rates import replicas_paid
from policies.spec import PoolSpec

pytestmark = pytest.mark.scrapes

CHAT = {"service": "chat"}


def blind_over_a_window(reader: PrometheusSource) -> list[bool]:
    """Of the readings that it takes to tell what lives from what is gone."""
    found = []
    for _ in range(3):
        found.append(bool(reader.read().blind()[0]))
        time.sleep(WINDOW_S / 2 + 0.1)
    return [*found, bool(reader.read().blind()[0])]


@pytest.mark.parametrize("label", ["engine", "pid", "WorkerId", "model_name"])
def test_ranks_of_a_replica_add_up_and_their_kv_usage_is_a_mean(each_prometheus: Prometheus, label: str) -> None:
    ranks = [part(scale=0.5, labels=f'{label}="{rank}"') for rank in (0, 1)]
    for (gauges, _), usage in zip(ranks, (0.2, 0.6), strict=True):
        gauges.update({name: usage for name in gauges if "kv_cache" in name})
    scrape(each_prometheus, [(together(ranks), CHAT)])
    reader = source(each_prometheus.url, [spec()])
    assert blind_over_a_window(reader) == [False] * 4
    snapshot = reader.read()
    assert reader.problems == ()
    assert near(snapshot.running[:, 0], 6)
    assert near(snapshot.generation_tps, 100)
    assert near(snapshot.ttft_attainment, 0.8)
    assert near(snapshot.kv_cache_usage[:, 0], 0.4)
    assert [line for line in check_metrics(reader.config, [spec()]) if not line.ok] == []


def test_ranks_that_serve_the_same_requests_count_once(each_prometheus: Prometheus) -> None:
    """SGLang with two data-parallel ranks on two tensor-parallel ones each, all of which report."""

    def gauge(name: str, value: float) -> dict[str, float | str]:
        return {f'sglang:{name}{{dp_rank="{rank // 2}",tp_rank="{rank}",pp_rank="0"}}': value for rank in range(4)}

    engine = ConstantEngine(
        gauge("num_running_reqs", 3) | gauge("num_queue_reqs", 1) | gauge("token_usage", 0.25),
        {"sglang:generation_tokens_total": 100},
    )
    scrape(each_prometheus, [(engine, CHAT)])
    snapshot = source(each_prometheus.url, [spec()], engines=["sglang"]).read()
    assert near(snapshot.running[:, 0], 6)
    assert near(snapshot.waiting[:, 0], 2)
    assert near(snapshot.kv_cache_usage[:, 0], 0.25)


def test_many_ranks_of_one_replica_are_no_coverage_of_the_others(each_prometheus: Prometheus) -> None:
    eight = together([part(scale=1 / 8, labels=f'engine="{rank}"') for rank in range(8)])
    scrape(each_prometheus, [(eight, CHAT)])
    reader = source(each_prometheus.url, [spec()], ready=4, discovery_s=0)
    assert reader.read().blind()[0]
    assert reader.problems == ("chat: 1 of 4 replicas are scraped",)


def test_starting_replicas_may_answer_before_they_are_ready(each_prometheus: Prometheus) -> None:
    scrape(each_prometheus, [(vllm(), CHAT) for _ in range(3)])
    reader = source(each_prometheus.url, [spec()], ready=1, starting=2)
    assert blind_over_a_window(reader) == [False] * 4
    assert reader.problems == ()


def test_the_surplus_of_a_rollout_may_answer_and_is_paid_for(each_prometheus: Prometheus, kube: KubeApiServer) -> None:
    """Of a Deployment: one replica that is ready, and the new one of a surge, which is not ready yet."""
    create_deployment(kube, "chat", 1)
    for name, ready in (("old", True), ("new", False)):
        create_pod(kube, name, "chat", ready=ready)
    set_ready(kube, "chat", 1)
    scrape(each_prometheus, [(vllm(), CHAT), (vllm(), CHAT)])
    connection = KubeConnection(kubeconfig=kube.kubeconfig, timeout_s=1.0, deadline_s=3.0)
    fleet = KubernetesActuator(KubernetesConfig(connection=connection), [spec()])
    config = PrometheusConfig.model_validate({"url": each_prometheus.url, "window_s": WINDOW_S})
    reader = PrometheusSource(config, [spec()], fleet.state)
    assert blind_over_a_window(reader)[1:] == [False] * 3  # the watch of the pods begins with the first one
    snapshot = reader.read()
    assert reader.problems == ()
    assert [snapshot.replicas_ready[0, 0], snapshot.replicas_starting[0, 0]] == [1.0, 0.0]
    assert replicas_paid(snapshot)[0, 0] == 2.0
    fleet.close()


def test_replicas_that_are_scraped_twice_count_once_and_are_named(each_prometheus: Prometheus) -> None:
    """Three of four, in a second job."""
    replicas = [(vllm(), {**CHAT, "pod": f"p{number}"}) for number in range(4)]
    scrape_again(each_prometheus, replicas[:3])
    scrape(each_prometheus, replicas)
    for label in ("instance", "pod"):
        reader = source(each_prometheus.url, [spec()], ready=4, replica_label=label)
        assert blind_over_a_window(reader) == [False] * 4
        snapshot = reader.read()
        assert near(snapshot.running[:, 0], 24)
        assert near(snapshot.generation_tps, 400)
        assert near(snapshot.finished_rps, 20)
        assert near(snapshot.ttft_histogram_rps.sum(axis=1), 20)
        (problem,) = reader.problems
        assert problem.startswith("chat: 3 of 4 replicas are scraped twice, by again, tests: ")
    (said,) = [line for line in check_metrics(reader.config, [spec()]) if not line.ok]
    assert said.detail == problem
    assert problem.endswith(": p0, p1, p2")


def test_one_replica_under_two_names_is_found_and_holds(each_prometheus: Prometheus) -> None:
    """A second job that gives the replica another name: nothing says which of the targets are one."""
    replicas = [vllm(), vllm()]
    scrape_again(each_prometheus, [(replicas[0], {**CHAT, "instance": "pod-0"})])
    scrape(each_prometheus, [(one, CHAT) for one in replicas])
    reader = source(each_prometheus.url, [spec()], ready=2)
    assert blind_over_a_window(reader)[-1]
    assert (
        "chat: 3 targets are scraped for 2 replicas: one replica under two values of the label instance, or replicas "
        "of something else" in reader.problems
    )


def test_a_replica_that_was_replaced_is_not_one_too_many(each_prometheus: Prometheus) -> None:
    """The old one's series stay in the window beside the new one's."""
    old, new = vllm(), vllm()
    scrape(each_prometheus, [(old, CHAT)])
    reader = source(each_prometheus.url, [spec()], ready=1)
    found = [bool(reader.read().blind()[0])]
    old.stop()
    each_prometheus.scrape([(new.address, CHAT)])
    for _ in range(10):
        time.sleep(0.5)
        found.append(bool(reader.read().blind()[0]))
    assert not any(found)


def test_adapters_at_the_gateway_count_with_their_model(each_prometheus: Prometheus) -> None:
    picker = ConstantEngine(
        {f'llm_d_epp_flow_control_queue_size{{model_name="{model}"}}': 1 for model in ("llama", "sql")},
        {f'llm_d_epp_request_total{{model_name="{model}"}}': rate for model, rate in (("llama", 4), ("sql", 2))},
    )
    scrape(each_prometheus, [(vllm(), CHAT), (picker, {})])
    alone, both = (
        source(each_prometheus.url, [spec()], gateway="llm-d-epp", gateway_names={"chat": names})
        for names in ("llama", ["llama", "sql"])
    )
    assert near(alone.read().arrival_rps, 4)
    snapshot = both.read()
    assert near(snapshot.arrival_rps, 6)
    assert near(snapshot.queue_requests, 2)
    arrival = next(line for line in check_metrics(alone.config, [spec()]) if line.subject == "arrival")
    assert arrival.detail.endswith("not counted: model_name sql")


def test_a_gateway_that_is_scraped_twice_counts_once(each_prometheus: Prometheus) -> None:
    picker = ConstantEngine({}, {'llm_d_epp_request_total{model_name="chat"}': 4})
    scrape_again(each_prometheus, [(picker, {})])
    scrape(each_prometheus, [(vllm(), CHAT), (picker, {})])
    assert near(source(each_prometheus.url, [spec()], gateway="llm-d-epp").read().arrival_rps, 4)


def test_a_counter_that_is_born_with_its_first_request_counts_it_once(each_prometheus: Prometheus) -> None:
    """A gateway without a series for the model, at zero replicas; one request; and the target's restart later."""
    counter = 'llm_d_epp_request_total{model_name="chat"}'
    gateway = ConstantEngine({"llm_d_epp_up": 1}, {})
    scrape(each_prometheus, [(gateway, {})])
    reader = source(each_prometheus.url, [spec()], ready=0, gateway="llm-d-epp")
    assert np.isnan(reader.read().arrival_rps[0])
    gateway.gauges[counter] = 1
    time.sleep(1.2)
    assert reader.read().arrival_rps.tolist() == pytest.approx([1 / WINDOW_S])
    time.sleep(WINDOW_S)
    assert reader.read().arrival_rps.tolist() == [0.0]
    gateway.gauges[counter] = 2
    time.sleep(1.2)
    assert 0.5 / WINDOW_S < reader.read().arrival_rps[0] < 2 / WINDOW_S


def test_check_says_what_starts_a_service_at_zero_where_no_queue_is_counted(each_prometheus: Prometheus) -> None:
    """With no metric of that name, and with one that has no series of the service's model."""
    gateway = ConstantEngine({'llm_d_epp_request_total{model_name="chat"}': 1}, {})
    scrape(each_prometheus, [(gateway, {})])
    config = source(each_prometheus.url, [spec()], gateway="llm-d-epp").config

    def queue(min_replicas: int) -> str:
        pool = PoolSpec(engine=ENGINE, min_replicas=min_replicas, initial_replicas=1, max_replicas=8)
        lines = check_metrics(config, [spec().model_copy(update={"pools": (pool,)})])
        line = next(line for line in lines if line.subject == "queue")
        assert line.ok
        return line.detail

    said = "at zero replicas only an arrival starts a service"
    assert said in queue(0)
    assert "no metric named llm_d_epp_flow_control_queue_size" in queue(0)
    assert said not in queue(1)
    gateway.gauges['llm_d_epp_flow_control_queue_size{model_name="other"}'] = 0
    wait_until(lambda: "nothing for chat" in queue(0), "the queue of another model is scraped")
    assert said in queue(0)
    assert said not in queue(1)


def test_a_target_that_was_not_seen_before_does_not_bring_its_past(each_prometheus: Prometheus) -> None:
    """A long-lived counter is found for the first time, or again after its target did not answer."""
    gateway = ConstantEngine({'llm_d_epp_request_total{model_name="chat"}': 1_000_000}, {})
    scrape(each_prometheus, [(gateway, {})], wait_s=1.5)
    reader = source(each_prometheus.url, [spec()], ready=0, gateway="llm-d-epp")
    assert reader.read().arrival_rps.tolist() == [0.0]
    each_prometheus.scrape([(gateway.address, {"zone": "a"})])  # new labels: every series is another one
    for _ in range(6):
        time.sleep(0.7)
        assert not reader.read().arrival_rps[0] > 0


@pytest.mark.parametrize("major", [2, 3])
@pytest.mark.parametrize("relabelled", ["target", "series"])
def test_series_that_get_other_labels_do_not_bring_their_past(tmp_path: Path, major: int, relabelled: str) -> None:
    """A scrape or two pass until Prometheus takes the old ones back: until then both are there."""
    prometheus = start(Prometheus, tmp_path / "prometheus", scrape_s=4.0, major=major)
    gateway = ConstantEngine({'llm_d_epp_request_total{model_name="chat"}': 1_000_000}, {})
    scrape(prometheus, [(gateway, {})], wait_s=13.0)
    reader = source(prometheus.url, [spec()], ready=0, gateway="llm-d-epp", window_s=12.0)
    assert reader.read().arrival_rps.tolist() == [0.0]
    if relabelled == "target":
        prometheus.scrape([(gateway.address, {"zone": "a"})])
    else:
        prometheus.relabel({"target_label": "zone", "replacement": "a"})
    seen = []
    for _ in range(50):
        time.sleep(0.3)
        seen.append(float(reader.read().arrival_rps[0]))
    assert not [rate for rate in seen if rate > 0]
    prometheus.stop()


def scrape_again(prometheus: Prometheus, groups: list[tuple[ConstantEngine, Mapping[str, str]]]) -> None:
    prometheus.scrape_again([(engine.address, labels) for engine, labels in groups])

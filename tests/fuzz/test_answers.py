"""Every answer of a server becomes a value, or one of Jevons's own errors, whatever is in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from budget import fuzz
from hypothesis import strategies as st
from loopback import Loopback
from mutations import bodies, mutated_text

from autoscaler.actuators.base import FleetState, PartlyFailed, pools_of
from autoscaler.actuators.haproxy import HAProxyActuator, HAProxyConfig
from autoscaler.actuators.haproxy_api import HAProxyError, RuntimeApi
from autoscaler.actuators.kube_api import KubeConnection
from autoscaler.actuators.kubernetes import KubernetesActuator, KubernetesConfig
from autoscaler.actuators.ray_serve import RayServeActuator, RayServeConfig
from autoscaler.authority.kubernetes_leases import KubernetesLeases
from autoscaler.authority.leases import LeaseSpec, LeasesUnavailable
from autoscaler.check import check_metrics
from autoscaler.metrics.client import PrometheusConfig
from autoscaler.metrics.prometheus import PrometheusSource
from autoscaler.versions.registry import RegistryUnavailable, fetch
from policies.contract import MetricsUnavailable, Target
from policies.learned import BundleMismatch
from policies.spec import PoolSpec, ScalingSpec, Slo, find_engine, shipped_configs

ENGINE = find_engine("llama-3.1-8b-l40s", shipped_configs())
SPECS = [
    ScalingSpec(service="chat", slo=Slo(ttft_s=0.5, tpot_s=0.05), pools=(PoolSpec(engine=ENGINE, max_replicas=8),))
]
STATUSES = st.sampled_from([200, 200, 200, 200, 200, 200, 204, 301, 400, 401, 404, 409, 422, 429, 500, 503])
SERVER_EXAMPLES = 40


def answers(*examples: Any) -> st.SearchStrategy[tuple[int, bytes]]:
    return st.tuples(STATUSES, bodies(*examples))


def target(replicas: int, cap: int) -> Target:
    return Target(replicas=np.array([[replicas]]), batch_cap=np.array([[cap]]))


LABELS = {"service": "chat", "instance": "10.0.0.1:8000", "le": "0.5", "__name__": "vllm:num_requests_running"}
VECTOR = {
    "status": "success",
    "data": {
        "resultType": "vector",
        "result": [
            {"metric": LABELS, "value": [1772445600.0, "3"]},
            {"metric": {**LABELS, "le": "+Inf", "instance": "b"}, "value": [1772445600.0, "4"]},
        ],
    },
}
MATRIX = {"status": "success", "data": {"resultType": "matrix", "result": [{"metric": LABELS, "values": [[1, "3"]]}]}}
NAMES = {"status": "success", "data": ["vllm:num_requests_running", "up"]}
HISTOGRAM = {"count": "3", "sum": "2.5", "buckets": [[0, "0.5", "1", "2"], [0, "1", "2", "1"]]}
NATIVE = {
    "status": "success",
    "data": {"resultType": "vector", "result": [{"metric": LABELS, "histogram": [1772445600.0, HISTOGRAM]}]},
}
FAILED = {"status": "error", "errorType": "bad_data", "error": "no"}


def prometheus(loopback: Loopback) -> PrometheusConfig:
    return PrometheusConfig(
        url=loopback.url, attempts=1, timeout_s=5.0, gateway="haproxy", replicas="kube-state-metrics"
    )


@fuzz(answers(VECTOR, MATRIX, NAMES, NATIVE, FAILED), SERVER_EXAMPLES)
def test_prometheus_as_the_source(loopback: Loopback, value: tuple[int, bytes]) -> None:
    loopback.status, loopback.body = value
    source = PrometheusSource(prometheus(loopback), SPECS, lambda: FleetState.unknown(pools_of(SPECS)))
    try:
        snapshot = source.read()
        assert len(snapshot) == 1
    except MetricsUnavailable as unavailable:
        assert str(unavailable)  # noqa: PT017 - either way is right
    source.replica_loads()
    source.close()


@fuzz(answers(VECTOR, MATRIX, NAMES, NATIVE, FAILED), SERVER_EXAMPLES)
def test_prometheus_as_check_asks_it(loopback: Loopback, value: tuple[int, bytes]) -> None:
    loopback.status, loopback.body = value
    assert check_metrics(prometheus(loopback), SPECS)


COLUMNS = "be_id be_name srv_id srv_name srv_addr srv_op_state srv_admin_state srv_uweight srv_iweight "
COLUMNS += (
    "srv_time_since_last_change srv_check_status srv_check_result srv_check_health srv_check_state srv_agent_state "
)
COLUMNS += "bk_f_forced_id srv_f_forced_id srv_fqdn srv_port srvrecord srv_use_ssl srv_check_port srv_check_addr"
STATE = f"""1
# {COLUMNS}
3 chat 1 jevons-1 10.0.0.1 2 0 1 1 20 1 0 2 0 0 0 0 - 8000 - 0 0 - - 0
3 chat 2 mine 10.0.0.2 2 0 1 1 20 1 0 2 0 0 0 0 - 8000 - 0 0 - - 0
"""
STAT = "# pxname,svname,qcur,qmax,scur,smax,slim,stot\nchat,jevons-1,0,0,2,3,16,9\nchat,mine,0,0,1,1,,4\n"


class Texts(RuntimeApi):
    """Answers what it is told to."""

    def __init__(self, state: str, stat: str) -> None:
        super().__init__("/nowhere", 1.0)
        self.texts = {"show servers state": state, "show stat": stat}

    def ask(self, command: str, until_s: float | None = None) -> str:
        return next((text for begin, text in self.texts.items() if command.startswith(begin)), "").strip()


@fuzz(st.tuples(mutated_text(STATE), mutated_text(STAT)))
def test_haproxy(value: tuple[str, str]) -> None:
    api = Texts(*value)
    try:
        api.servers("chat")
    except HAProxyError as refused:
        assert "\n" not in str(refused)  # noqa: PT017 - either way is right
    actuator = HAProxyActuator(HAProxyConfig(sockets=("/nowhere",), route=("*",)), SPECS)
    actuator._processes = [api]
    actuator.state()
    actuator.check()
    for act in (
        lambda: actuator.apply(target(2, 8)),
        lambda: actuator.follow(pools_of(SPECS)[0], {"a": "10.0.0.1:8000", "b": "10.0.0.9:8000"}, ()),
        lambda: actuator.drain(pools_of(SPECS)[0], {"a": "10.0.0.1:8000"}),
    ):
        try:
            act()
        except (PartlyFailed, HAProxyError) as refused:
            assert "\n" not in str(refused)  # noqa: PT017 - either way is right


META = {"name": "chat", "namespace": "default", "labels": {"app": "chat"}, "resourceVersion": "5", "uid": "u"}
SELECTOR = {"matchLabels": {"app": "chat"}}
DEPLOYMENT = {"metadata": META, "spec": {"replicas": 2, "selector": SELECTOR}, "status": {"readyReplicas": 2}}
POD_STATUS = {"podIP": "10.0.0.1", "phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}
COST = {"controller.kubernetes.io/pod-deletion-cost": "3"}
POD = {"metadata": {**META, "name": "chat-1", "annotations": COST}, "spec": {"containers": []}, "status": POD_STATUS}
OWNED = {"kind": "Deployment", "name": "chat", "apiVersion": "apps/v1"}
SCALER = {"metadata": META, "spec": {"scaleTargetRef": OWNED, "maxReplicas": 3}}
SCALE = {"metadata": META, "spec": {"replicas": 2}, "status": {"replicas": 2, "selector": "app=chat"}}
LEASE = {
    "metadata": META,
    "spec": {"holderIdentity": "other", "leaseTransitions": 3, "renewTime": "2026-01-01T00:00:00Z"},
}
LISTS = [{"kind": "List", "metadata": {"resourceVersion": "7"}, "items": [item]} for item in (DEPLOYMENT, POD, SCALER)]


def connection(folder: Path, url: str) -> KubeConnection:
    path = folder / "kubeconfig"
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "local",
        "clusters": [{"name": "local", "cluster": {"server": url}}],
        "users": [{"name": "user", "user": {"token": "t"}}],
        "contexts": [{"name": "local", "context": {"cluster": "local", "user": "user"}}],
    }
    path.write_text(yaml.safe_dump(config))
    return KubeConnection(kubeconfig=path, timeout_s=2.0, deadline_s=0.2)


@fuzz(answers(LEASE), SERVER_EXAMPLES)
def test_leases(loopback: Loopback, tmp_path: Path, value: tuple[int, bytes]) -> None:
    loopback.status, loopback.body = value
    leases = KubernetesLeases(
        LeaseSpec(kind="kubernetes", connection=connection(tmp_path, loopback.url)), ["chat"], "me"
    )
    for ask in (leases.renew, leases.release):
        try:
            ask()
        except LeasesUnavailable as unavailable:
            assert str(unavailable)  # noqa: PT017 - either way is right
    assert leases.check()
    leases.close()


@fuzz(answers(*LISTS, SCALE, {**LISTS[0], **SCALE}), SERVER_EXAMPLES)
def test_kubernetes(loopback: Loopback, tmp_path: Path, value: tuple[int, bytes]) -> None:
    loopback.status, loopback.body = value
    config = KubernetesConfig(connection=connection(tmp_path, loopback.url))
    actuator = KubernetesActuator(config, SPECS)
    actuator.state()
    actuator.members()
    actuator.check()
    try:
        actuator.apply(target(3, 8))
    except PartlyFailed as refused:
        assert str(refused)  # noqa: PT017 - either way is right
    actuator.close()


REPLICA = {"replica_id": "a", "state": "RUNNING"}
SETTINGS = {"max_ongoing_requests": 8, "autoscaling_config": None}
RUNNING = {"name": "chat", "status": "HEALTHY", "replicas": [REPLICA], "deployment_config": SETTINGS}
DECLARED = {"name": "chat", "import_path": "x:y", "deployments": [{"name": "chat", "num_replicas": 1}]}
APPLICATION = {
    "name": "chat",
    "status": "RUNNING",
    "deployments": {"chat": {**RUNNING, "target_num_replicas": 1}},
    "deployed_app_config": DECLARED,
}
SERVE = {"applications": {"chat": APPLICATION}, "target_capacity": None, "proxy_location": "EveryNode"}
EXTERNAL = {
    "applications": {"chat": {**APPLICATION, "deployed_app_config": {**DECLARED, "external_scaler_enabled": True}}}
}


@fuzz(answers(SERVE, EXTERNAL), SERVER_EXAMPLES)
def test_ray_serve(loopback: Loopback, value: tuple[int, bytes]) -> None:
    loopback.status, loopback.body = value
    for replicas in ("declared", "external"):
        config = RayServeConfig(address=loopback.url, deadline_s=0.05, replicas=replicas)
        actuator = RayServeActuator(config, SPECS)
        actuator.state()
        actuator.check()
        try:
            actuator.apply(target(3, 16))
        except PartlyFailed as refused:
            assert str(refused)  # noqa: PT017 - either way is right
        actuator.close()


VERSION = {
    "name": "policy",
    "version": "3",
    "run_id": "0123456789abcdef0123456789abcdef",
    "source": "mlflow-artifacts:/1/2/artifacts/policy.zip",
    "creation_timestamp": 1,
    "last_updated_timestamp": 2,
    "current_stage": "None",
    "status": "READY",
    "tags": [{"key": "bundle_digest", "value": "abc"}],
}
RUN = {"info": {"run_id": VERSION["run_id"], "artifact_uri": "mlflow-artifacts:/1/2/artifacts", "experiment_id": "1"}}
REGISTRY = {"model_version": VERSION, "run": {**RUN, "data": {}}}


@fuzz(answers(REGISTRY), SERVER_EXAMPLES // 4)
def test_registry(
    loopback: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: tuple[int, bytes]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    loopback.status, loopback.body = value
    for reference in ("models:/policy@champion", "models:/policy/3"):
        try:
            fetch(reference, loopback.url, tmp_path / "cache")
        except (RegistryUnavailable, BundleMismatch) as refused:
            assert str(refused)  # noqa: PT017 - either way is right

"""Who else has a say in a Deployment's replicas, on a real API server whose other controllers are played."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import FaultProxy
from kube_objects import DEPLOYMENTS, create_deployment, custom_kind, delete, replicas_of
from kube_server import KubeApiServer
from test_kubernetes_actuator import SPEC, target

from autoscaler.actuators.base import FleetState, PartlyFailed
from autoscaler.actuators.kube_api import KubeApi, KubeConnection, KubeError
from autoscaler.actuators.kuberay import KubeRayConfig
from autoscaler.actuators.kubernetes import KubernetesActuator, KubernetesConfig
from autoscaler.actuators.ray_serve import RayServeActuator, RayServeConfig
from autoscaler.actuators.serve_api import ServeApi

SERVICES = "/apis/serving.kserve.io/v1beta1/namespaces/default/inferenceservices"
EXTERNAL = {"serving.kserve.io/autoscalerClass": "external"}


def actuator(kubeconfig: Path, **options: Any) -> KubernetesActuator:
    connection = KubeConnection(kubeconfig=kubeconfig, timeout_s=1.0, deadline_s=3.0)
    return KubernetesActuator(KubernetesConfig(connection=connection, **options), [SPEC])


def refused(one: KubernetesActuator) -> list[str]:
    return [line.detail for line in one.check() if not line.ok]


def replicas(count: int) -> dict[str, Any]:
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "chat"}, "spec": {"replicas": count}}


def setters(api: KubeApi) -> list[tuple[str, str]]:
    """Manager and operation of whoever owns the count, by the server's own word."""
    fields = api.get(f"{DEPLOYMENTS}/chat")["metadata"]["managedFields"]
    found = [(one["manager"], one["operation"]) for one in fields if "f:replicas" in one["fieldsV1"].get("f:spec", {})]
    return sorted(found)


# Git


@pytest.mark.plays(
    "git, KServe or a RayService sets replicas back",
    "held (`other_autoscaler`), named with the way out",
)
@pytest.mark.parametrize(
    ("manager", "tool", "way"),
    [
        ("argocd-controller", "Argo CD", "ignoreDifferences of /spec/replicas"),
        ("kustomize-controller", "Flux", "no replicas in git"),
        ("helm-controller", "Flux", "no replicas in git"),
    ],
)
def test_git_that_owns_replicas_is_an_owner(
    kube: KubeApiServer, api: KubeApi, manager: str, tool: str, way: str
) -> None:
    assert actuator(kube.kubeconfig).state().owners == ("",)
    api.apply(f"{DEPLOYMENTS}/chat", replicas(1), fieldManager=manager, force="true")
    sentence = (
        f"git owns replicas, through {tool} (field manager {manager}): give {tool} {way} and set own_replicas: force, "
        "or stay in mode advise"
    )
    found = actuator(kube.kubeconfig)
    assert found.state().owners == (sentence,)
    assert refused(found) == [sentence]
    assert actuator(kube.kubeconfig, own_replicas="force").state().owners == ("",)


@pytest.mark.parametrize(
    ("mark", "tool"),
    [
        ({"labels": {"argocd.argoproj.io/instance": "fleet"}}, "Argo CD"),
        ({"annotations": {"argocd.argoproj.io/tracking-id": "fleet:apps/Deployment:default/chat"}}, "Argo CD"),
        ({"labels": {"kustomize.toolkit.fluxcd.io/name": "fleet"}}, "Flux"),
    ],
)
def test_what_git_applied_with_a_count_is_owned_by_it_whoever_wrote_last(
    kube: KubeApiServer, api: KubeApi, mark: dict[str, Any], tool: str
) -> None:
    applied = {"kubectl.kubernetes.io/last-applied-configuration": '{"spec": {"replicas": 1}}'}
    annotations = {**mark.get("annotations", {}), **applied}
    api.merge(f"{DEPLOYMENTS}/chat", {"metadata": {**mark, "annotations": annotations}})
    (owner,) = actuator(kube.kubeconfig).state().owners
    assert owner.startswith(f"git owns replicas, through {tool} (it carries ")
    api.merge(f"{DEPLOYMENTS}/chat", {"metadata": {"annotations": {next(iter(applied)): '{"spec": {}}'}}})
    assert actuator(kube.kubeconfig).state().owners == ("",)


@pytest.mark.plays(
    "a field that anybody may write is no JSON, of another shape, or nested without end",
    "that service alone is held (`owner_unknown`) where the field matters, and named; the others go on",
)
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 200_000, "it is nested too deeply"),
        ('{"spec": ' * 2_000, "it is nested too deeply"),
        ("{", "Expecting property name"),
        ('{"spec": 5}', "TypeError"),
        ("5", "TypeError"),
    ],
)
def test_what_is_written_into_one_object_leaves_the_others_readable(
    kube: KubeApiServer, api: KubeApi, text: str, said: str
) -> None:
    create_deployment(kube, "code", replicas=3)
    both = [SPEC, SPEC.model_copy(update={"service": "code"})]
    found = KubernetesActuator(KubernetesConfig(connection=KubeConnection(kubeconfig=kube.kubeconfig)), both)
    applied = {"kubectl.kubernetes.io/last-applied-configuration": text}
    api.merge(f"{DEPLOYMENTS}/chat", {"metadata": {"annotations": applied}})
    assert found.state().owners_unread == ()  # nothing says that it comes from git
    api.merge(f"{DEPLOYMENTS}/chat", {"metadata": {"labels": {"argocd.argoproj.io/instance": "fleet"}}})
    state = found.state()
    assert state.replicas_target[:, 0].tolist() == [2.0, 3.0]
    assert (state.owners, state.owners_unread) == (("", ""), (0,))
    (problem,) = (one for one in state.problems if "who owns" in one)
    assert problem.startswith("who owns the replicas of chat: ")
    assert said in problem
    assert len(problem) < 300
    found.close()


# KServe


@pytest.fixture
def inference_service(api: KubeApi) -> Iterator[dict[str, Any]]:
    """An InferenceService that owns the Deployment."""
    with custom_kind(api, "serving.kserve.io", "v1beta1", "inferenceservices", "InferenceService"):
        body = {"apiVersion": "serving.kserve.io/v1beta1", "kind": "InferenceService", "metadata": {"name": "chat"}}
        made = api.post(SERVICES, {**body, "spec": {}})
        belong(api, made)
        yield made
        delete(api, f"{SERVICES}/chat")


def belong(api: KubeApi, owner: dict[str, Any]) -> None:
    """What a controller writes into what it makes."""
    reference = {
        "apiVersion": owner["apiVersion"],
        "kind": owner["kind"],
        "name": owner["metadata"]["name"],
        "uid": owner["metadata"]["uid"],
        "controller": True,
    }
    api.merge(f"{DEPLOYMENTS}/chat", {"metadata": {"ownerReferences": [reference]}})


def test_kserve_is_an_owner_unless_its_class_is_external(
    kube: KubeApiServer, api: KubeApi, inference_service: dict[str, Any]
) -> None:
    found = actuator(kube.kubeconfig)
    sentence = (
        "InferenceService default/chat sets the replicas back: annotate it with "
        "serving.kserve.io/autoscalerClass=external, or stay in mode advise"
    )
    assert found.state().owners == (sentence,)
    assert refused(found) == [sentence]
    api.merge(f"{SERVICES}/chat", {"metadata": {"annotations": EXTERNAL}})
    assert found.state().owners == ("",)
    assert refused(found) == []


def test_an_inference_service_that_cannot_be_read_leaves_the_owner_unknown(
    faulty_kube: tuple[FaultProxy, Path], api: KubeApi, inference_service: dict[str, Any]
) -> None:
    proxy, kubeconfig = faulty_kube
    proxy.fault = lambda method, path: 403 if "inferenceservices" in path else None
    state = actuator(kubeconfig).state()
    assert state.owners_unread == (0,)
    assert "who owns the replicas of chat: HTTP 403" in "; ".join(state.problems)
    assert state.replicas_target[0, 0] == 2


@pytest.mark.parametrize(
    "name",
    [
        "../../../../../../api/v1/namespaces/default/pods/code-0",
        "chat?watch=true&timeoutSeconds=60",
        "chat/../../../../../../../version",
        "chat/status",
        "..",
        "chat%2fstatus",
        "chat#",
        "\x1b[31mchat",
    ],
)
def test_an_owner_whose_name_is_a_path_is_not_asked_for(
    faulty_kube: tuple[FaultProxy, Path], api: KubeApi, name: str
) -> None:
    proxy, kubeconfig = faulty_kube
    found = actuator(kubeconfig)
    found.state()
    usual = {path.split("?")[0] for _, path in proxy.seen}
    metadata = {"name": name, "uid": "1"}
    belong(api, {"apiVersion": "serving.kserve.io/v1beta1", "kind": "InferenceService", "metadata": metadata})
    state = found.state()
    assert {path.split("?")[0] for _, path in proxy.seen} == usual
    assert state.owners_unread == (0,)
    (problem,) = (one for one in state.problems if "who owns" in one)
    assert problem == f"who owns the replicas of chat: no name of an object: {name!a}"
    found.close()


# Other controllers


def test_a_deployment_of_another_controller_is_named_by_check_and_not_held(kube: KubeApiServer, api: KubeApi) -> None:
    with custom_kind(api, "example.com", "v1", "fleets", "Fleet"):
        path = "/apis/example.com/v1/namespaces/default/fleets"
        belong(api, api.post(path, {"apiVersion": "example.com/v1", "kind": "Fleet", "metadata": {"name": "big"}}))
        found = actuator(kube.kubeconfig)
        assert found.state().owners == ("",)
        said = [line.detail for line in found.check() if line.ok]
        assert "belongs to Fleet big, whose controller may set the replicas back: scale that if it has /scale" in said
        delete(api, f"{path}/big")


def author(state: FleetState) -> str:
    return state.author(0)


def test_who_set_the_count_is_told_where_the_server_says_so(kube: KubeApiServer, api: KubeApi) -> None:
    found = actuator(kube.kubeconfig)
    found.state()
    found.apply(target(4))
    assert author(found.state()) == ""
    api.merge(f"{DEPLOYMENTS}/chat", replicas(7), fieldManager="kubectl-edit")
    assert author(found.state()) == "kubectl-edit"
    assert author(found.state()) == "kubectl-edit"  # it still is in force
    found.apply(target(3))
    assert author(found.state()) == ""


def test_it_tells_which_counts_it_wrote(kube: KubeApiServer, api: KubeApi) -> None:
    found = actuator(kube.kubeconfig)
    found.apply(target(4))
    api.merge(f"{DEPLOYMENTS}/chat", replicas(2))  # before anybody could see it
    assert found.wrote().tolist() == [[4.0]]
    found.apply(target(2))
    assert str(found.wrote()[0, 0]) == "nan"


# Ownership of replicas


def test_by_default_the_count_is_not_declared(kube: KubeApiServer, api: KubeApi) -> None:
    actuator(kube.kubeconfig).apply(target(4))
    assert ("jevons", "Apply") not in setters(api)


def test_a_count_that_is_declared_shows_its_owner_and_stops_who_applies_another(
    kube: KubeApiServer, api: KubeApi
) -> None:
    own = actuator(kube.kubeconfig, own_replicas=True)
    own.apply(target(2))  # what is in force already
    assert setters(api)[-1] == ("jevons", "Apply")
    own.apply(target(4))
    assert (replicas_of(kube, "chat"), setters(api)) == (4, [("jevons", "Apply")])
    with pytest.raises(KubeError, match='conflict with "jevons"'):
        api.apply(f"{DEPLOYMENTS}/chat", replicas(1), fieldManager="kubectl")
    assert replicas_of(kube, "chat") == 4


def test_an_edit_of_a_declared_count_is_put_back(kube: KubeApiServer, api: KubeApi) -> None:
    own = actuator(kube.kubeconfig, own_replicas=True)
    own.apply(target(4))
    api.merge(f"{DEPLOYMENTS}/chat", replicas(9), fieldManager="kubectl-edit")
    state = own.state()
    assert (state.edits_put_back, state.owners, author(state)) == (True, ("",), "kubectl-edit")
    own.apply(target(4))
    assert (replicas_of(kube, "chat"), setters(api)) == (4, [("jevons", "Apply")])


def test_another_manager_that_declares_the_count_is_an_owner_and_not_overwritten(
    kube: KubeApiServer, api: KubeApi
) -> None:
    own = actuator(kube.kubeconfig, own_replicas=True)
    own.apply(target(4))
    api.apply(f"{DEPLOYMENTS}/chat", replicas(1), fieldManager="kubectl", force="true")
    sentence = (
        "kubectl declares spec.replicas by server-side apply: take replicas out of what it applies, or set "
        "own_replicas: force"
    )
    with pytest.raises(PartlyFailed, match="kubectl declares spec"):
        own.apply(target(4))
    assert own.state().owners == (sentence,)
    assert replicas_of(kube, "chat") == 1
    forced = actuator(kube.kubeconfig, own_replicas="force")
    assert forced.state().owners == ("",)
    forced.apply(target(4))
    assert (replicas_of(kube, "chat"), setters(api)) == (4, [("jevons", "Apply")])


def test_ownership_needs_a_kind_whose_count_is_where_a_deployment_has_it() -> None:
    resource = {"group": "example.com", "version": "v1", "plural": "engines"}
    with pytest.raises(ValueError, match="own_replicas: only for resource deployment, statefulset or leaderworkerset"):
        KubernetesConfig.model_validate({"own_replicas": True, "target": {"resource": resource}})


# KubeRay

RAY_SERVICES = "/apis/ray.io/v1/namespaces/default/rayservices"


@pytest.fixture
def ray_service(api: KubeApi) -> Iterator[dict[str, Any]]:
    """A RayService as KubeRay's operator leaves it."""
    with custom_kind(api, "ray.io", "v1", "rayservices", "RayService"):
        status = {"activeServiceStatus": {"rayClusterName": "llm-raycluster-x7k2p"}}
        body = {"apiVersion": "ray.io/v1", "kind": "RayService", "metadata": {"name": "llm"}, "status": status}
        yield api.post(RAY_SERVICES, {**body, "spec": {"serveConfigV2": "applications: []"}})
        delete(api, f"{RAY_SERVICES}/llm")


class OneApplication(ServeApi):
    """A Serve that runs one application."""

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        deployment = {"target_num_replicas": 2, "deployment_config": {"max_ongoing_requests": 8}, "replicas": []}
        config = {"name": "chat", "deployments": [{"name": "chat", "num_replicas": 2, "max_ongoing_requests": 8}]}
        one = {"status": "RUNNING", "deployed_app_config": config, "deployments": {"chat": deployment}}
        return {"applications": {"chat": one}} if method == "GET" else {}


def serving(config: RayServeConfig) -> RayServeActuator:
    found = RayServeActuator(config, [SPEC])
    found._api = OneApplication(config)
    return found


def served(kubeconfig: Path, address: str, **kuberay: Any) -> RayServeActuator:
    connection = KubeConnection(kubeconfig=kubeconfig, timeout_s=1.0, deadline_s=3.0)
    return serving(RayServeConfig(address=address, kuberay=KubeRayConfig(connection=connection, **kuberay)))


@pytest.mark.parametrize(
    ("address", "kuberay"),
    [
        ("http://llm-head-svc.default.svc.cluster.local:8265", {}),
        ("http://llm-raycluster-x7k2p-head-svc.default:8265", {}),
        ("http://127.0.0.1:8265", {"name": "llm", "namespace": "default"}),
    ],
)
def test_the_ray_service_that_owns_the_cluster_is_an_owner(
    kube: KubeApiServer, ray_service: dict[str, Any], address: str, kuberay: dict[str, str]
) -> None:
    found = served(kube.kubeconfig, address, **kuberay)
    sentence = (
        "RayService default/llm owns this cluster, and its operator puts serveConfigV2 back: set num_replicas and "
        "max_ongoing_requests there, and stay in mode advise"
    )
    assert found.state().owners == (sentence,)
    assert [line.detail for line in found.check() if not line.ok] == [sentence]


def test_a_ray_cluster_without_a_ray_service_has_no_owner(kube: KubeApiServer, ray_service: dict[str, Any]) -> None:
    found = served(kube.kubeconfig, "http://other-head-svc.default:8265")
    assert found.state().owners == ("",)
    assert [line for line in found.check() if not line.ok] == []
    assert serving(RayServeConfig(address="http://127.0.0.1:8265")).state().owners == ("",)


def test_ray_services_that_cannot_be_read_leave_the_owner_unknown(
    kube: KubeApiServer, ray_service: dict[str, Any]
) -> None:
    found = served(kube.limited, "http://llm-head-svc.default:8265")
    state = found.state()
    assert (state.owners, state.owners_unread, state.replicas_target[0, 0]) == (("",), (0,), 2.0)
    assert "RayServices in default: HTTP 403" in state.problems[0]
    assert [line.ok for line in found.check()] == [True, False]


def test_a_ray_service_that_is_named_must_be_there(kube: KubeApiServer, ray_service: dict[str, Any]) -> None:
    state = served(kube.kubeconfig, "http://127.0.0.1:8265", name="lmm", namespace="default").state()
    assert (state.owners_unread, state.problems) == ((0,), ("RayService default/lmm: not found, see kuberay.name",))
    with pytest.raises(ValueError, match="needed, as address is no head"):
        RayServeConfig.model_validate({"kuberay": {"namespace": "default"}})

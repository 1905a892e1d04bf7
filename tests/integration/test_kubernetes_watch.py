"""The watch on a real API server, through a proxy that breaks it off, is silent, or forgets where it was."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from fault_proxy import FaultProxy
from kube_objects import PODS, create_pod, delete, kube_api
from kube_server import KubeApiServer
from servers import wait_until

from autoscaler.actuators import kube_watch
from autoscaler.actuators.kube_api import KubeApi, KubeConnection, KubeError
from autoscaler.actuators.kube_watch import KubeWatch
from autoscaler.actuators.kubernetes_pods import Replica, read_pod

CHAT = {"labelSelector": "app in (chat)"}


def watch(kubeconfig: Path, watch_s: float = 60.0, timeout_s: float = 5.0) -> KubeWatch[Replica]:
    connection = KubeConnection(kubeconfig=kubeconfig, timeout_s=timeout_s, deadline_s=5.0, watch_s=watch_s)
    return KubeWatch(KubeApi(connection), PODS, read_pod, CHAT)


def names(pods: KubeWatch[Replica]) -> list[str]:
    return sorted(pod.name for pod in pods.read())


def test_what_was_there_what_comes_and_what_goes_without_another_list(
    kube: KubeApiServer, faulty_kube: tuple[FaultProxy, Path]
) -> None:
    proxy, kubeconfig = faulty_kube
    create_pod(kube, "chat-a", "chat", ready=False)
    create_pod(kube, "other", "other")
    pods = watch(kubeconfig)
    assert [(pod.name, pod.ready) for pod in pods.read()] == [("chat-a", False)]
    create_pod(kube, "chat-b", "chat")
    wait_until(lambda: names(pods) == ["chat-a", "chat-b"], "the new pod is seen")
    api = kube_api(kube)
    api.merge(f"{PODS}/chat-a/status", {"status": {"conditions": [{"type": "Ready", "status": "True"}]}})
    wait_until(lambda: all(pod.ready for pod in pods.read()), "it becomes ready")
    delete(api, f"{PODS}/chat-a")
    wait_until(lambda: names(pods) == ["chat-b"], "it goes")
    api.merge(f"{PODS}/chat-b", {"metadata": {"labels": {"app": "other"}}})
    wait_until(lambda: names(pods) == [], "it is no longer selected")
    assert len(proxy.seen) == 2  # one list, one watch
    pods.close()
    api.close()


def test_watches_follow_each_other_without_a_list(
    kube: KubeApiServer, faulty_kube: tuple[FaultProxy, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy, kubeconfig = faulty_kube
    create_pod(kube, "chat-a", "chat")
    pods = watch(kubeconfig, watch_s=1.0)
    failures: list[Exception] = []
    monkeypatch.setattr(pods, "_failed", failures.append)
    pods.read()
    wait_until(lambda: len(proxy.seen) >= 4, "the third watch begins")
    create_pod(kube, "chat-b", "chat")
    wait_until(lambda: names(pods) == ["chat-a", "chat-b"], "changes are seen still")
    assert failures == []
    pods.close()


@pytest.mark.plays(
    "the watch of the pods refused, broken off, silent, or too old (410)",
    "unknown and named until it stands: routing stays as it is, nothing is given back; 410 is listed anew and is no "
    "fault",
)
@pytest.mark.parametrize("fault", [403, 500, "cut", "empty"])
def test_a_watch_that_is_lost_is_an_error_and_not_what_was_there(
    kube: KubeApiServer, faulty_kube: tuple[FaultProxy, Path], fault: int | str
) -> None:
    proxy, kubeconfig = faulty_kube
    create_pod(kube, "chat-a", "chat")
    pods = watch(kubeconfig)
    pods._api.connection = pods._api.connection.model_copy(update={"deadline_s": 1.0})
    assert names(pods) == ["chat-a"]
    proxy.fault = lambda method, path: fault
    wait_until(lambda: not pods._stands(), "the loss is known")
    with pytest.raises(KubeError, match=f"HTTP {fault}" if isinstance(fault, int) else "cut short|broke off|no answer"):
        pods.read()
    create_pod(kube, "chat-b", "chat")
    proxy.fault = lambda method, path: None
    assert names(pods) == ["chat-a", "chat-b"]  # at once, not after a pause
    pods.close()


def test_a_version_that_is_gone_is_listed_anew_and_nothing_is_wrong(
    kube: KubeApiServer, faulty_kube: tuple[FaultProxy, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    create_pod(kube, "chat-a", "chat")
    pods = watch(faulty_kube[1], watch_s=1.0)
    whole, gone = pods._api.watch, [True]

    def too_late(path: str, seconds: float, **query: str) -> object:
        if gone and pods._entries:
            gone.pop()
            raise KubeError(410, "too old resource version")
        return whole(path, seconds, **query)

    monkeypatch.setattr(pods._api, "watch", too_late)
    assert names(pods) == ["chat-a"]
    assert (gone, pods._failures) == ([], 0)
    pods.close()


def test_a_server_that_says_nothing_is_known_in_time(kube: KubeApiServer, faulty_kube: tuple[FaultProxy, Path]) -> None:
    """A connection that stays open while nothing comes: what was there is not served for ever."""
    proxy, kubeconfig = faulty_kube
    create_pod(kube, "chat-a", "chat")
    pods = watch(kubeconfig, watch_s=1.0, timeout_s=0.5)
    pods._api.connection = pods._api.connection.model_copy(update={"deadline_s": 0.5})
    assert names(pods) == ["chat-a"]
    proxy.delay_s = 5.0
    proxy.fault = lambda method, path: "silent"

    def lost() -> bool:
        try:
            pods.read()
        except KubeError:
            return True
        return False

    wait_until(lost, "the silence is known")
    proxy.fault = lambda method, path: None
    wait_until(lambda: not lost(), "it stands again")
    pods.close()


def test_a_thread_that_died_is_begun_again(kube: KubeApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    create_pod(kube, "chat-a", "chat")
    pods = watch(kube.kubeconfig)
    names(pods)
    first = pods._thread
    assert first is not None
    pods.close()
    first.join(5.0)
    assert not first.is_alive()
    create_pod(kube, "chat-b", "chat")
    assert names(pods) == ["chat-a", "chat-b"]
    pods.close()


def test_a_watch_that_nobody_reads_ends(kube: KubeApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kube_watch, "IDLE_S", 0.5)
    pods = watch(kube.kubeconfig, watch_s=1.0)
    pods.read()
    thread = pods._thread
    assert isinstance(thread, threading.Thread)
    thread.join(10.0)
    assert (thread.is_alive(), pods._entries) == (False, {})


def test_more_objects_than_can_be_kept_are_an_error(kube: KubeApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kube_watch, "MAX_ENTRIES", 2)
    for name in ("chat-a", "chat-b", "chat-c"):
        create_pod(kube, name, "chat")
    pods = watch(kube.kubeconfig)
    with pytest.raises(KubeError, match="more than 2 objects"):
        pods.read()
    pods.close()

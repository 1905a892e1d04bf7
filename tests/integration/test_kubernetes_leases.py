"""Leases on a real API server: one holder, takeover, fencing tokens, the kill-switch annotation, missing rights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_proxy import FaultProxy
from kube_objects import delete, kube_api
from kube_server import KubeApiServer

from autoscaler.actuators.kube_api import KubeConnection
from autoscaler.authority.controls import ANNOTATION
from autoscaler.authority.kubernetes_leases import KubernetesLeases
from autoscaler.authority.leases import NOT_HELD, LeaseSpec, LeasesUnavailable

LEASES = "/apis/coordination.k8s.io/v1/namespaces/default/leases"


class Steady:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def leases(kubeconfig: Path, holder: str, clock: Steady, *services: str) -> KubernetesLeases:
    spec = LeaseSpec(kind="kubernetes", connection=KubeConnection(kubeconfig=kubeconfig, timeout_s=10, deadline_s=20))
    return KubernetesLeases(spec, services or ("chat",), holder, clock)


@pytest.fixture
def clean(kube: KubeApiServer) -> Iterator[KubeApiServer]:
    api = kube_api(kube)
    for lease in api.items(LEASES):
        delete(api, f"{LEASES}/{lease['metadata']['name']}")
    yield kube
    api.close()


def test_one_holds_the_other_waits_and_takes_over_with_a_larger_token(clean: KubeApiServer) -> None:
    clock = Steady()
    first, second = (leases(clean.kubeconfig, name, clock) for name in ("a/1", "b/1"))
    assert first.renew().tolist() == [1]
    assert second.renew().tolist() == [NOT_HELD]
    clock.now_s += 40.0
    assert first.renew().tolist() == [1]
    assert second.renew().tolist() == [NOT_HELD]
    clock.now_s += 44.0
    assert second.renew().tolist() == [NOT_HELD]
    clock.now_s += 1.0
    assert second.renew().tolist() == [2]
    assert first.renew().tolist() == [NOT_HELD]
    second.release()
    assert first.renew().tolist() == [3]


def test_check_names_the_rights_without_which_nobody_leads(clean: KubeApiServer) -> None:
    named = [f"may {verb} leases jevons-chat in default" for verb in ("get", "update")]
    subjects = [*named, "may create leases in default"]  # as there is none yet
    allowed, limited = (leases(kubeconfig, "a/1", Steady()).check() for kubeconfig in (clean.kubeconfig, clean.limited))
    assert [(line.subject, line.ok) for line in allowed] == [(subject, True) for subject in subjects]
    assert [(line.subject, line.ok) for line in limited] == [(subject, False) for subject in named]
    assert {line.detail for line in limited} == {"not granted: bind a Role that allows it"}


def test_a_lease_that_is_there_already_is_taken_and_needs_no_right_to_make_one(clean: KubeApiServer) -> None:
    api = kube_api(clean)
    api.post(LEASES, {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "jevons-chat"}})
    own = leases(clean.kubeconfig, "a/1", Steady())
    assert "may create leases in default" not in {line.subject for line in own.check()}
    assert own.renew().tolist() == [1]
    own.release()
    api.close()


def test_of_two_that_read_the_same_lease_one_may_write(clean: KubeApiServer) -> None:
    clock = Steady()
    first, second = (leases(clean.kubeconfig, name, clock) for name in ("a/1", "b/1"))
    first.renew()
    first.release()
    read = second._asked("GET", "chat")
    assert first.renew().tolist() == [2]
    assert read is not None
    assert second._asked("PUT", "chat", read) is None


def test_the_annotation_stops_one_service(clean: KubeApiServer) -> None:
    own = leases(clean.kubeconfig, "a/1", Steady(), "chat", "code")
    own.renew()
    assert own.annotated() == ("", "")
    api = kube_api(clean)
    api.merge(f"{LEASES}/jevons-code", {"metadata": {"annotations": {ANNOTATION: "true"}}})
    own.renew()
    chat, code = own.annotated()
    assert chat == ""
    assert code.startswith(f"annotation {ANNOTATION} of Lease jevons-code; `kubectl annotate lease jevons-code ")
    api.merge(f"{LEASES}/jevons-code", {"metadata": {"annotations": {ANNOTATION: None}}})
    own.renew()
    assert own.annotated() == ("", "")
    api.close()


@pytest.mark.plays(
    "one service's Lease cannot be read or written",
    "held (`not_leader`) after two thirds of its duration, and named; the others are renewed",
)
@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_a_lease_that_fails_leaves_the_others_renewed(
    clean: KubeApiServer, faulty_kube: tuple[FaultProxy, Path], method: str
) -> None:
    proxy, kubeconfig = faulty_kube
    own = leases(kubeconfig, "a/1", Steady(), "chat", "code")
    assert own.renew().tolist() == [1, 1]
    own._api.connection = own._api.connection.model_copy(update={"deadline_s": 0.5})
    proxy.fault = lambda asked, path: 500 if (asked, path) == (method, f"{LEASES}/jevons-chat") else None
    before = renewed(clean, "jevons-code")
    assert own.renew().tolist() == [NOT_HELD, 1]
    assert renewed(clean, "jevons-code") > before
    failed, well = own.unread()
    assert failed.startswith("Lease jevons-chat: HTTP 500")
    assert well == ""
    with pytest.raises(LeasesUnavailable, match="Lease jevons-chat: HTTP 500"):
        own.release()
    proxy.fault = lambda asked, path: None
    other = leases(clean.kubeconfig, "b/1", Steady(), "chat", "code")
    assert other.renew().tolist() == [NOT_HELD, 2]  # what could be handed back was
    assert own.renew().tolist() == [1, NOT_HELD]
    assert own.unread() == ("", "")


def renewed(server: KubeApiServer, name: str) -> str:
    api = kube_api(server)
    found = str(api.get(f"{LEASES}/{name}")["spec"]["renewTime"])
    api.close()
    return found


def test_without_the_right_to_leases_nothing_is_held_and_the_server_is_quoted(clean: KubeApiServer) -> None:
    own = leases(
        clean.write_kubeconfig("nobody", "autoscaler-token", f"https://127.0.0.1:{clean.port}"), "a/1", Steady()
    )
    with pytest.raises(LeasesUnavailable, match="403"):
        own.renew()


@pytest.mark.parametrize("status", [429, 500])
def test_a_server_that_refuses_for_a_while_is_asked_again(
    clean: KubeApiServer, faulty_kube: tuple[FaultProxy, Path], status: int
) -> None:
    proxy, kubeconfig = faulty_kube
    own = leases(kubeconfig, "a/1", Steady())
    left = [status, status]
    proxy.fault = lambda method, path: left.pop() if left else None
    assert own.renew().tolist() == [1]

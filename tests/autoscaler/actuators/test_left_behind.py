"""Whoever is left behind by its tick reads on, and writes nothing more: orders and leases may be others by now."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from autoscaler.actuators.base import Refused
from autoscaler.actuators.kube_api import KubeApi, KubeConnection
from autoscaler.actuators.serve_api import APPLICATIONS, ServeApi, ServeConnection
from autoscaler.stages import Overdue, within
from policies.secret_url import Url

NOWHERE = "http://127.0.0.1:9"


def kube(folder: Path) -> KubeApi:
    config = folder / "kubeconfig"
    config.write_text(
        f"clusters: [{{name: c, cluster: {{server: '{NOWHERE}'}}}}]\n"
        "contexts: [{name: c, context: {cluster: c, user: u}}]\n"
        "users: [{name: u, user: {token: secret}}]\ncurrent-context: c\n"
    )
    return KubeApi(KubeConnection(kubeconfig=config, timeout_s=0.1, deadline_s=0.1))


def late(call: Callable[[], object]) -> str:
    """What comes of a call that its tick has left behind."""
    go, done, said = threading.Event(), threading.Event(), []

    def work() -> None:
        go.wait(60.0)
        try:
            call()
        except Refused as error:
            said.append(str(error))
        done.set()

    with pytest.raises(Overdue):
        within(0.01, "act", work)
    go.set()
    assert done.wait(60.0)
    return said[0]


def test_writes_to_kubernetes(tmp_path: Path) -> None:
    api = kube(tmp_path)
    for call in (api.merge, api.put, api.post, api.apply):
        assert "the tick has ended" in late(lambda call=call: call("/api/v1/x", {}))  # type: ignore[misc]
    assert "the tick has ended" not in late(lambda: api.get("/api/v1/x"))
    api.close()


def test_writes_to_ray_serve() -> None:
    api = ServeApi(ServeConnection(address=Url(NOWHERE), timeout_s=0.1, deadline_s=0.1))
    assert "the tick has ended" in late(lambda: api.ask("PUT", APPLICATIONS, {}))
    assert "the tick has ended" not in late(lambda: api.ask("GET", APPLICATIONS))
    api.close()

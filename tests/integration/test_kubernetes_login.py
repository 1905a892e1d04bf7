"""Credentials that are replaced while the controller runs, on a real API server."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from kube_objects import PODS
from kube_server import KubeApiServer

from autoscaler.actuators.kube_api import KubeApi, KubeConnection, KubeError
from autoscaler.actuators.kube_watch import KubeWatch
from autoscaler.actuators.kubernetes_pods import read_pod


def in_a_token_file(kubeconfig: Path, token: str) -> None:
    file = kubeconfig.with_name("token")
    file.write_text(token)
    _rewrite(kubeconfig, {"tokenFile": str(file)})


def in_the_kubeconfig(kubeconfig: Path, token: str) -> None:
    _rewrite(kubeconfig, {"token": token})


def _rewrite(kubeconfig: Path, user: dict[str, str]) -> None:
    config = yaml.safe_load(kubeconfig.read_text())
    config["users"] = [{"name": "user", "user": user}]
    kubeconfig.write_text(yaml.safe_dump(config))


@pytest.fixture
def kubeconfig(kube: KubeApiServer, tmp_path: Path) -> Path:
    copy = tmp_path / "kubeconfig"
    copy.write_text(kube.kubeconfig.read_text())
    return copy


@pytest.mark.plays(
    "a token, kubeconfig or certificate authority is replaced",
    "read anew when the login is refused; the same request goes through",
)
@pytest.mark.parametrize("write", [in_a_token_file, in_the_kubeconfig])
def test_a_login_that_is_refused_is_read_anew(kubeconfig: Path, write: Callable[[Path, str], None]) -> None:
    write(kubeconfig, "no-longer-valid")
    api = KubeApi(KubeConnection(kubeconfig=kubeconfig))
    with pytest.raises(KubeError, match="HTTP 401"):
        api.get(PODS)
    write(kubeconfig, "admin-token")
    assert api.get(PODS)["kind"] == "PodList"
    write(kubeconfig, "no-longer-valid")  # what is accepted still is not read again
    assert api.get(PODS)["kind"] == "PodList"
    api.close()


def test_a_watch_goes_on_with_the_new_login(kubeconfig: Path) -> None:
    in_a_token_file(kubeconfig, "no-longer-valid")
    api = KubeApi(KubeConnection(kubeconfig=kubeconfig))
    pods = KubeWatch(api, PODS, read_pod, {"labelSelector": "app=nobody"})
    with pytest.raises(KubeError, match="HTTP 401"):
        pods.read()
    in_a_token_file(kubeconfig, "admin-token")
    assert pods.read() == []
    pods.close()
    api.close()


def test_a_certificate_authority_that_was_replaced_is_read_anew(kubeconfig: Path, tmp_path: Path) -> None:
    config = yaml.safe_load(kubeconfig.read_text())
    authority = Path(config["clusters"][0]["cluster"]["certificate-authority"])
    copy = tmp_path / "ca.crt"
    other = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "/dev/null", "-out", str(copy)]
    subprocess.run([*other, "-subj", "/CN=other"], check=True, capture_output=True)
    config["clusters"][0]["cluster"]["certificate-authority"] = str(copy)
    kubeconfig.write_text(yaml.safe_dump(config))
    api = KubeApi(KubeConnection(kubeconfig=kubeconfig, deadline_s=1.0))
    with pytest.raises(KubeError, match="certificate"):
        api.get(PODS)
    copy.write_text(authority.read_text())
    assert api.get(PODS)["kind"] == "PodList"
    api.close()

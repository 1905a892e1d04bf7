"""A real Kubernetes API server on loopback, without the controllers that would act on its objects."""

from __future__ import annotations

import lzma
import os
import shutil
import ssl
import subprocess
from pathlib import Path
from typing import Any

import yaml
from servers import ROOT, Missing, Process, answers, free_port, program

PACKED_API_SERVER = ROOT.parent / "shared" / "kube" / "kube-apiserver.xz"


class KubeApiServer:
    """etcd and kube-apiserver: from $KUBEBUILDER_ASSETS (envtest's folder) where it is set. No controllers run."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        assets = os.environ.get("KUBEBUILDER_ASSETS", "")
        etcd = (
            str(Path(assets) / "etcd")
            if assets and (Path(assets) / "etcd").is_file()
            else program("etcd", "etcd-server")
        )
        self._ports = [free_port() for _ in range(3)]
        self.port, client, peer = self._ports
        self._etcd = Process(
            [
                etcd,
                f"--data-dir={folder / 'etcd'}",
                f"--listen-client-urls=http://127.0.0.1:{client}",
                f"--advertise-client-urls=http://127.0.0.1:{client}",
                f"--listen-peer-urls=http://127.0.0.1:{peer}",
                f"--initial-advertise-peer-urls=http://127.0.0.1:{peer}",
                f"--initial-cluster=default=http://127.0.0.1:{peer}",
                "--unsafe-no-fsync",
            ],
            folder / "etcd.log",
        )
        self._etcd.wait(lambda: answers(f"http://127.0.0.1:{client}/health"), "etcd")
        key = folder / "service-accounts.key"
        subprocess.run(
            [program("openssl", "openssl"), "genrsa", "-out", str(key), "2048"], check=True, capture_output=True
        )
        tokens = folder / "tokens.csv"
        tokens.write_text("admin-token,admin,admin,system:masters\nautoscaler-token,autoscaler,autoscaler\n")
        self._api = Process(
            [
                str(_api_server(assets, folder)),
                f"--etcd-servers=http://127.0.0.1:{client}",
                "--bind-address=127.0.0.1",
                "--advertise-address=127.0.0.1",
                f"--secure-port={self.port}",
                f"--cert-dir={folder / 'certificates'}",
                f"--token-auth-file={tokens}",
                "--authorization-mode=RBAC",
                f"--service-account-key-file={key}",
                f"--service-account-signing-key-file={key}",
                "--service-account-issuer=https://kubernetes.default.svc",
                "--service-cluster-ip-range=10.0.0.0/24",
                "--disable-admission-plugins=ServiceAccount",
            ],
            folder / "kube-apiserver.log",
        )
        unverified = ssl.create_default_context()
        unverified.check_hostname, unverified.verify_mode = False, ssl.CERT_NONE
        url = f"https://127.0.0.1:{self.port}"
        headers = {"Authorization": "Bearer admin-token"}
        try:
            self._api.wait(lambda: answers(f"{url}/readyz", headers, unverified), "kube-apiserver")
        except AssertionError:
            self._etcd.stop()
            raise
        self.ca = folder / "certificates" / "apiserver.crt"
        self.kubeconfig = self.write_kubeconfig("admin", "admin-token", url)
        self.limited = self.write_kubeconfig("limited", "autoscaler-token", url)

    def write_kubeconfig(self, name: str, token: str, url: str) -> Path:
        cluster: dict[str, Any] = {"server": url}
        if url.startswith("https"):
            cluster["certificate-authority"] = str(self.ca)
        path = self.folder / f"{name}.kubeconfig"
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "local",
            "clusters": [{"name": "local", "cluster": cluster}],
            "users": [{"name": "user", "user": {"token": token}}],
            "contexts": [{"name": "local", "context": {"cluster": "local", "user": "user"}}],
        }
        path.write_text(yaml.safe_dump(config))
        return path

    def stop(self) -> None:
        self._api.stop()  # first: it hangs when etcd goes before it
        self._etcd.stop()


def _api_server(assets: str, folder: Path) -> Path:
    if assets:
        return Path(assets) / "kube-apiserver"
    found = shutil.which("kube-apiserver")
    if found:
        return Path(found)
    if not PACKED_API_SERVER.is_file():
        raise Missing("kube-apiserver is not there: set KUBEBUILDER_ASSETS to a folder of setup-envtest")
    binary = folder / "kube-apiserver"
    with lzma.open(PACKED_API_SERVER) as packed, binary.open("wb") as out:
        shutil.copyfileobj(packed, out, 1 << 20)
    binary.chmod(0o755)
    return binary

"""What the pods of a fleet cost per tick beside those of others in the namespace: listed each time, or watched.

A small HTTP server in this process plays the API server with answers that were made before. Both ways are measured in
one run on wall time, so their ratio says what the watch saves.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import parse_qs, urlsplit

import numpy as np
import yaml

from autoscaler.actuators.kube_api import PAGE, KubeApi, KubeConnection
from autoscaler.actuators.kube_watch import KubeWatch
from autoscaler.actuators.kubernetes_pods import read_pod

FOREIGN, OWN, TICKS = 3000, 8, 15
PODS = "/api/v1/namespaces/default/pods"


def pod(name: str, app: str) -> dict[str, object]:
    """About as large as a pod of an inference engine is."""
    container = {
        "name": "engine",
        "image": "engine:1",
        "args": [f"--option-{number}=value" for number in range(20)],
        "env": [{"name": f"VARIABLE_{number}", "value": "x" * 40} for number in range(20)],
    }
    metadata = {
        "name": name,
        "namespace": "default",
        "uid": name,
        "resourceVersion": "1",
        "creationTimestamp": "2026-01-01T00:00:00Z",
        "labels": {"app": app},
        "managedFields": [{"manager": "kubelet", "fieldsV1": {f"f:field{number}": {} for number in range(40)}}],
    }
    conditions = [
        {"type": kind, "status": "True", "lastTransitionTime": "2026-01-01T00:01:00Z"}
        for kind in ("Initialized", "Ready", "ContainersReady", "PodScheduled")
    ]
    status = {"phase": "Running", "podIP": "10.0.0.1", "conditions": conditions}
    return {"metadata": metadata, "spec": {"containers": [container]}, "status": status}


class PlayedServer(ThreadingHTTPServer):
    """Lists, with and without the label, and a watch on which nothing happens."""

    daemon_threads = True

    def __init__(self) -> None:
        own = [pod(f"chat-{number}", "chat") for number in range(OWN)]
        every = [*own, *(pod(f"other-{number}", f"other-{number % 50}") for number in range(FOREIGN))]
        self.own = page(own, "")
        self.every = {
            str(start): page(every[start : start + PAGE], str(start + PAGE) if start + PAGE < len(every) else "")
            for start in range(0, len(every), PAGE)
        }
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    """Answers of `PlayedServer`."""

    protocol_version = "HTTP/1.1"
    server: PlayedServer

    def log_message(self, *_: object) -> None:
        """Nothing is logged."""

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        if "watch" in query:
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            time.sleep(float(query["timeoutSeconds"][0]))
            self.wfile.write(b"0\r\n\r\n")
            return
        body = self.server.own if "labelSelector" in query else self.server.every[query.get("continue", ["0"])[0]]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def page(items: list[dict[str, object]], token: str) -> bytes:
    return json.dumps({"metadata": {"resourceVersion": "1", "continue": token}, "items": items}).encode()


def figures() -> Iterator[tuple[str, float, str]]:
    """Milliseconds of one look at the pods, listed and watched, and their ratio."""
    server = PlayedServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with TemporaryDirectory() as folder:
        kubeconfig = Path(folder) / "kubeconfig"
        cluster = {"name": "x", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}
        context = {"name": "x", "context": {"cluster": "x", "user": "x"}}
        login = {"name": "x", "user": {"token": "none"}}
        config = {"current-context": "x", "clusters": [cluster], "contexts": [context], "users": [login]}
        kubeconfig.write_text(yaml.safe_dump(config))
        api = KubeApi(KubeConnection(kubeconfig=kubeconfig, timeout_s=10.0, deadline_s=30.0))
    watch = KubeWatch(api, PODS, read_pod, {"labelSelector": "app in (chat)"})
    assert len(watch.read()) == OWN
    spent: dict[str, list[float]] = {"listed": [], "watched": []}
    for _ in range(TICKS):
        began_s = time.perf_counter()
        pods = [read_pod(one) for one in api.items(PODS) if one["metadata"]["labels"]["app"] == "chat"]
        between_s = time.perf_counter()
        seen = watch.read()
        spent["listed"].append(between_s - began_s)
        spent["watched"].append(time.perf_counter() - between_s)
        assert len(pods) == len(seen)
    listed, watched = (float(np.median(values)) for values in spent.values())
    yield f"live_pods_listed_ms_foreign{FOREIGN}", listed * 1e3, "ms"
    yield f"live_pods_watched_ms_foreign{FOREIGN}", watched * 1e3, "ms"
    yield "live_pods_listed_over_watched", listed / watched, "ratio"
    watch.close()
    api.close()
    server.shutdown()

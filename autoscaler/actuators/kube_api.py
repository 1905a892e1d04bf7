"""The few calls on the Kubernetes API that scaling needs, each bounded in time and retried where that can help.

On the official client, with plain paths: a scale subresource looks the same on every kind, built in or custom.
This module must not know about services or targets.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from autoscaler.actuators.base import Access, Refused
from policies.engine import Positive, StrictModel

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

FIRST_PAUSE_S = 0.1
PAGE = 500
"""Objects per page of a list."""
RETRIED = (429, 500, 502, 503, 504)
Json = dict[str, Any]


class KubeConnection(StrictModel):
    """How to reach the API server."""

    kubeconfig: Path | None = Field(
        default=None, description="Kubeconfig file; the pod's service account, or else the user's own, when unset."
    )
    context: str | None = Field(default=None, description="Context of the kubeconfig; its current one when unset.")
    timeout_s: Positive = Field(default=3.0, description="Longest wait for one answer.")
    deadline_s: Positive = Field(default=8.0, description="Longest time for one operation, retries included.")


class KubeError(Refused):
    """Raised when the API server refused or did not answer."""


class KubeApi:
    """A connection to one API server.

    Args:
        connection: where it is and how long to wait.

    Raises:
        KubeError: when there is no usable configuration.
    """

    def __init__(self, connection: KubeConnection) -> None:
        self.connection = connection
        self._client = _client(connection)

    def get(self, path: str, **query: str) -> Json:
        """One object. Raises `KubeError`."""
        return self._retried("GET", path, query, None)

    def items(self, path: str, **query: str) -> list[Json]:
        """Every object of a list, page by page. Raises `KubeError`."""
        found: list[Json] = []
        token = ""
        while True:
            page = self._retried("GET", path, {**query, "limit": str(PAGE), "continue": token}, None)
            found += page.get("items", [])
            token = page.get("metadata", {}).get("continue", "")
            if not token:
                return found

    def put(self, path: str, body: Json, **query: str) -> Json:
        """Replace an object whose resource version is still that of the body. Raises `KubeError`, 409 among them."""
        return self._retried("PUT", path, query, body)

    def post(self, path: str, body: Json, **query: str) -> Json:
        """Create an object. Raises `KubeError`."""
        return self._retried("POST", path, query, body)

    def merge(self, path: str, body: Json, **query: str) -> Json:
        """Change the given fields of an object. Raises `KubeError`."""
        return self._retried("PATCH", path, query, body)

    def allowed(self, verb: str, group: str, resource: str, subresource: str, namespace: str) -> bool:
        """Whether this user may do it, by the server's own word. Raises `KubeError`."""
        attributes = {
            "verb": verb,
            "group": group,
            "resource": resource,
            "subresource": subresource,
            "namespace": namespace,
        }
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": attributes},
        }
        answer = self.post("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", review)
        return bool(answer.get("status", {}).get("allowed"))

    def close(self) -> None:
        """Drop connections."""
        self._client.close()

    def _retried(self, method: str, path: str, query: dict[str, str], body: Json | None) -> Json:
        until_s, pause_s = time.monotonic() + self.connection.deadline_s, FIRST_PAUSE_S
        while True:
            try:
                return self._once(method, path, query, body, until_s - time.monotonic())
            except KubeError as error:
                if error.status not in (0, *RETRIED) or time.monotonic() + pause_s >= until_s:
                    raise
            time.sleep(pause_s)
            pause_s *= 2

    def _once(self, method: str, path: str, query: dict[str, str], body: Json | None, left_s: float) -> Json:
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        headers = {"Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = "application/merge-patch+json" if method == "PATCH" else "application/json"
        request = self._client.param_serialize(
            method,
            path,
            query_params=[(name, value) for name, value in query.items() if value],
            header_params=headers,
            body=body,
            auth_settings=["BearerToken"],
        )
        try:
            response = self._client.call_api(
                *request, _request_timeout=max(0.05, min(self.connection.timeout_s, left_s))
            )
            raw = response.read()
        except ApiException as error:
            raise KubeError(error.status or 0, _reason(error.status or 0, str(error.reason), error.body)) from None
        except (HTTPError, OSError) as error:
            raise KubeError(0, f"no answer: {' '.join(str(error).split())[:200]}") from None
        if response.status >= 400:
            raise KubeError(response.status, _reason(response.status, str(response.reason), raw))
        try:
            answer: Json = json.loads(raw)
        except ValueError:
            raise KubeError(0, "the answer is cut short or no JSON") from None
        return answer


def _client(connection: KubeConnection) -> ApiClient:
    from kubernetes import client, config

    settings = client.Configuration()
    settings.retries = 0  # our own know a deadline
    try:
        if connection.kubeconfig is None and connection.context is None:
            try:
                config.load_incluster_config(client_configuration=settings)
            except config.ConfigException:
                config.load_kube_config(client_configuration=settings)
        else:
            file = None if connection.kubeconfig is None else str(connection.kubeconfig)
            config.load_kube_config(file, context=connection.context, client_configuration=settings)
    except (config.ConfigException, OSError) as error:
        raise KubeError(0, f"no usable kubeconfig: {' '.join(str(error).split())}") from None
    return client.ApiClient(settings)


def _reason(status: int, reason: str, body: Any) -> str:
    """The server's own sentence where it gives one."""
    try:
        message = json.loads(body)["message"]
    except (TypeError, ValueError, KeyError):
        message = reason
    return f"HTTP {status}: {' '.join(str(message).split())[:300]}"


def rights(api: KubeApi, needed: Iterable[tuple[str, str, str, str]], namespace: str) -> list[Access]:
    """Whether this user has the rights that are needed, each by the server's own word.

    Args:
        api: the server.
        needed: verb, API group, plural and subresource of each.
        namespace: where.
    """
    lines = []
    for verb, group, resource, sub in needed:
        what = f"may {verb} {resource}{'/' + sub if sub else ''} in {namespace}"
        try:
            ok = api.allowed(verb, group, resource, sub, namespace)
            lines.append(Access(what, ok, "" if ok else "not granted: bind a Role that allows it"))
        except KubeError as error:
            lines.append(Access(what, False, str(error)))
    return lines

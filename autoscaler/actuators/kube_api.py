"""The few calls on the Kubernetes API that scaling needs, each bounded in time and retried where that can help.

On the official client, with plain paths: a scale subresource looks the same on every kind, built in or custom.
This module must not know about services or targets.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import Field

from autoscaler.actuators.base import Access, Refused
from autoscaler.problem_texts import bare, quoted
from autoscaler.stages import left_behind
from policies.engine import Positive, StrictModel
from policies.json_text import read_json

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

FIRST_PAUSE_S, SHORTEST_S = 0.1, 0.05
RETRIED_SHARE = 0.75
"""Part of an operation's time in which what was refused is asked again; the rest is for what has not been asked yet."""
PAGE = 500
"""Objects per page of a list."""
RETRIED = (429, 500, 502, 503, 504)
PATCHES = {"PATCH": "application/merge-patch+json", "APPLY": "application/apply-patch+yaml"}
"""Content types of the two ways to patch."""
UNAUTHORIZED = 401
MAX_LINE = 1 << 23
"""Bytes of one event of a watch; the API server keeps no object that is larger than a fifth of it."""
CHUNK = 1 << 16
Json = dict[str, Any]


class KubeConnection(StrictModel):
    """How to reach the API server."""

    kubeconfig: Path | None = Field(
        default=None, description="Kubeconfig file; the pod's service account, or else the user's own, when unset."
    )
    context: str | None = Field(default=None, description="Context of the kubeconfig; its current one when unset.")
    timeout_s: Positive = Field(default=3.0, description="Longest wait for one whole answer.")
    deadline_s: Positive = Field(
        default=4.0,
        description="Longest time for one operation, retries included; all that one reading asks is one operation.",
    )
    watch_s: Annotated[float, Field(ge=1.0)] = Field(
        default=10.0,
        description="A watch is asked for anew after this time, so that one that has died is known within it and"
        " `timeout_s`; until then what was watched may be that old, seconds.",
    )


class KubeError(Refused):
    """Raised when the API server refused or did not answer."""


class LoginRefused(KubeError):  # noqa: N818 - as its base
    """Raised when the API server does not know us, or we not it: the credentials may have been replaced."""


class NoAnswer(KubeError):  # noqa: N818 - as its base
    """Raised when nothing came back."""


class Dropped(NoAnswer):
    """Raised when the connection ended without an answer: a kept one may have been closed by the server meanwhile."""


class Needed(NamedTuple):
    """One right; for one object where a name is given."""

    verb: str
    group: str
    resource: str
    subresource: str = ""
    name: str = ""


class _Operation(threading.local):
    """What one thread's requests share: a deadline, None where each has its own, and whether the server is away."""

    until_s: float | None = None
    away = False


class KubeApi:
    """A connection to one API server.

    Tokens, certificates and whole kubeconfigs are replaced while a controller runs: when the server refuses the login,
    the configuration is read anew, and the request sent once more.

    Args:
        connection: where it is and how long to wait.

    Raises:
        KubeError: when there is no usable configuration.
    """

    def __init__(self, connection: KubeConnection) -> None:
        self.connection = connection
        self._client = _client(connection)
        self._renewing = threading.Lock()
        self._operation = _Operation()

    @contextmanager
    def one_operation(self) -> Iterator[None]:
        """All that this thread asks inside ends within one deadline; a server that is away is not asked again."""
        self._operation.until_s, self._operation.away = time.monotonic() + self.connection.deadline_s, False
        try:
            yield
        finally:
            self._operation.until_s, self._operation.away = None, False

    def until_s(self) -> float:
        """Until when this thread may wait for what it begins now, or ask again, on `time.monotonic`."""
        shared, deadline_s = self._operation.until_s, self.connection.deadline_s
        return time.monotonic() + deadline_s if shared is None else shared - (1.0 - RETRIED_SHARE) * deadline_s

    def get(self, path: str, **query: str) -> Json:
        """One object. Raises `KubeError`."""
        return self._retried("GET", path, query, None)

    def items(self, path: str, **query: str) -> list[Json]:
        """Every object of a list. Raises `KubeError`."""
        return [item for page in self.pages(path, **query) for item in page["items"]]

    def pages(self, path: str, **query: str) -> Iterator[Json]:
        """A list, page by page; all pages show it at the same version. Raises `KubeError`."""
        token = ""
        while True:
            page = self._retried("GET", path, {**query, "limit": str(PAGE), "continue": token}, None)
            page["items"] = page.get("items") or []
            metadata = page.get("metadata")
            if not isinstance(page["items"], list) or not isinstance(metadata, dict):
                raise KubeError(0, "the answer is no list of objects")
            yield page
            token = str(metadata.get("continue") or "")
            if not token:
                return

    def watch(self, path: str, seconds: float, **query: str) -> EventStream:
        """Changes to a list from `resourceVersion` on, until the server ends the watch after about `seconds`.

        Raises:
            KubeError: when the server refuses or does not answer; 410 when it no longer knows that version.
        """
        whole_s = max(1, round(seconds))
        query |= {"watch": "true", "allowWatchBookmarks": "true", "timeoutSeconds": str(whole_s)}
        waits_s = (self.connection.timeout_s, whole_s + self.connection.timeout_s)
        return EventStream(self._sent("GET", path, query, None, waits_s))

    def put(self, path: str, body: Json, **query: str) -> Json:
        """Replace an object whose resource version is still that of the body. Raises `KubeError`, 409 among them."""
        return self._retried("PUT", path, query, body)

    def post(self, path: str, body: Json, **query: str) -> Json:
        """Create an object. Raises `KubeError`."""
        return self._retried("POST", path, query, body)

    def merge(self, path: str, body: Json, **query: str) -> Json:
        """Change the given fields of an object. Raises `KubeError`."""
        return self._retried("PATCH", path, query, body)

    def apply(self, path: str, body: Json, **query: str) -> Json:
        """Declare the given fields of an object by server-side apply. Raises `KubeError`, 409 for another's fields."""
        return self._retried("APPLY", path, query, body)

    def allowed(self, needed: Needed, namespace: str) -> bool:
        """Whether this user may do it, by the server's own word. Raises `KubeError`."""
        attributes = {**needed._asdict(), "namespace": namespace}
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": attributes},
        }
        answer = self.post("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", review)
        status = answer.get("status") if isinstance(answer, dict) else None
        return isinstance(status, dict) and status.get("allowed") is True

    def close(self) -> None:
        """Drop connections."""
        self._client.close()

    def _retried(self, method: str, path: str, query: dict[str, str], body: Json | None) -> Json:
        if method != "GET" and left_behind():
            raise KubeError(0, "the tick has ended, so nothing more of its target is carried out")
        operation, until_s, pause_s = self._operation, self.until_s(), FIRST_PAUSE_S
        shared, whole_s = operation.until_s is not None, self.connection.deadline_s
        if operation.away:
            raise NoAnswer(0, "no answer to what was asked before")
        while True:
            left_s = (operation.until_s or until_s) - time.monotonic()
            if shared and left_s <= 0:
                raise NoAnswer(0, f"not asked: earlier answers took all of {whole_s:g} s")
            try:
                return self._once(method, path, query, body, left_s)
            except KubeError as error:
                if error.status not in (0, *RETRIED) or time.monotonic() + pause_s >= until_s:
                    operation.away = shared and isinstance(error, NoAnswer)
                    if operation.away and left_s < self.connection.timeout_s and "timed out" in str(error):
                        left = f"{left_s:.1f} s that earlier answers left of {whole_s:g} s"
                        raise NoAnswer(0, f"{error}, in the {left}") from None
                    raise
            time.sleep(pause_s)
            pause_s *= 2

    def _once(self, method: str, path: str, query: dict[str, str], body: Json | None, left_s: float) -> Json:
        from urllib3.exceptions import HTTPError

        wait_s = max(SHORTEST_S, min(self.connection.timeout_s, left_s))
        response = self._sent(method, path, query, body, wait_s)
        try:
            answer = read_json(response.read())
        except (HTTPError, OSError) as error:
            where = self._client.configuration.host
            raise NoAnswer(0, f"no answer from {where}: {_line(bare(error))}") from None
        except ValueError:
            raise KubeError(0, "the answer is cut short or no JSON") from None
        if not isinstance(answer, dict):
            raise KubeError(0, "the answer is no object")
        return answer

    def _sent(self, method: str, path: str, query: dict[str, str], body: Json | None, timeout_s: Any) -> Any:
        """The response to a request, with a new login or connection where the old one is refused or gone."""
        client, began_s = self._client, time.monotonic()
        try:
            return _response(client, method, path, query, body, timeout_s)
        except Dropped:
            if method != "GET":  # it may have been carried out
                raise
        except LoginRefused:
            self._renew(client)
        if isinstance(timeout_s, float):  # of one answer, both tries together
            timeout_s = max(SHORTEST_S, timeout_s - (time.monotonic() - began_s))
        return _response(self._client, method, path, query, body, timeout_s)

    def _renew(self, refused: ApiClient) -> None:
        """Read the configuration anew, and drop the connections of the login that was refused."""
        with self._renewing:  # of many requests at once, one does
            if self._client is refused:
                self._client = _client(self.connection)
                refused.close()  # requests that are under way over it go on


class EventStream:
    """The events of one watch, as they come: each with a `type` and an `object`.

    The official client's own watch has no time limit, goes over a 410 once by itself, skips what does not parse, and
    keeps whole objects; so events are read here.

    Args:
        response: the open response.
    """

    def __init__(self, response: Any) -> None:
        self._response = response

    def __iter__(self) -> Iterator[Json]:
        """Events, until the server ends the watch. Raises `KubeError`."""
        from urllib3.exceptions import HTTPError

        left = bytearray()
        try:
            for part in self._response.response.stream(CHUNK, decode_content=True):
                left += part
                *lines, rest = left.split(b"\n")
                left = bytearray(rest)
                if len(left) > MAX_LINE:
                    raise KubeError(0, "the watch sends an event without an end")
                for line in lines:
                    if line.strip():
                        yield _event(line)
        except (HTTPError, OSError, ValueError) as error:  # ValueError: closed by another thread
            raise KubeError(0, f"the watch broke off: {_line(error)}") from None
        finally:
            self.close()

    def close(self) -> None:
        """End it, from any thread."""
        with suppress(Exception):  # whatever is left of a connection that is given up
            self._response.response.connection.sock.shutdown(socket.SHUT_RDWR)
        with suppress(Exception):
            self._response.response.close()


def _event(line: bytes | bytearray) -> Json:
    """One event. Raises `KubeError` for an error that the server sends as one."""
    try:
        event = read_json(line)
        kind, changed = event["type"], event["object"]
        if kind == "ERROR":
            raise KubeError(int(changed.get("code") or 0), _line(changed.get("message", "the watch failed")))
        if isinstance(changed["metadata"]["resourceVersion"], str):
            return dict(event)
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise KubeError(0, "the watch sends what is no event")


def _response(client: ApiClient, method: str, path: str, query: dict[str, str], body: Json | None, wait_s: Any) -> Any:
    """An open response with a status below 400. Raises `KubeError`."""
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError, ProtocolError, SSLError

    headers = {"Accept": "application/json"}
    if body is not None:
        headers["Content-Type"] = PATCHES.get(method, "application/json")
    request = client.param_serialize(
        "PATCH" if method in PATCHES else method,
        path,
        query_params=[(name, value) for name, value in query.items() if value],
        header_params=headers,
        body=body,
        auth_settings=["BearerToken"],
    )
    try:
        response = client.call_api(*request, _request_timeout=wait_s)
        if response.status < 400:
            return response
        raw, status, reason = response.read(), response.status, str(response.reason)
    except ApiException as error:
        raw, status, reason = error.body, error.status or 0, str(error.reason)
    except (HTTPError, OSError) as error:
        cause = getattr(error, "reason", error)
        kinds = {SSLError: LoginRefused, ProtocolError: Dropped}
        refused = next((raised for kind, raised in kinds.items() if isinstance(cause, kind)), NoAnswer)
        raise refused(0, f"no answer from {client.configuration.host}: {_line(bare(cause))}") from None
    raise (LoginRefused if status == UNAUTHORIZED else KubeError)(status, _reason(status, reason, raw))


def _client(connection: KubeConnection) -> ApiClient:
    from kubernetes import client, config

    from autoscaler.bounded_http import bound

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
    except Exception as error:  # whatever a file says that is half-written, or another one's
        where = f" in {connection.kubeconfig}" if connection.kubeconfig is not None else ""
        known = isinstance(error, config.ConfigException | OSError)
        why = _line(error if known else f"{type(error).__name__}: {error}").rstrip(".")
        way = "name one in `connection: {kubeconfig: PATH}`, of the actuator's part and of `lease`"
        raise KubeError(0, f"no usable kubeconfig{where}: {why}; {way}") from None
    made = client.ApiClient(settings)
    bound(made.rest_client.pool_manager)
    return made


def _reason(status: int, reason: str, body: Any) -> str:
    """The server's own sentence where it gives one."""
    try:
        message = read_json(body)["message"]
    except (TypeError, ValueError, KeyError):
        message = reason
    return f"HTTP {status}: {_line(message, 300)}"


def _line(message: object, length: int = 200) -> str:
    return quoted(message, length)


@contextmanager
def parsed() -> Iterator[None]:
    """What is made of an answer of another shape is a `KubeError`."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise KubeError(0, f"an answer of another shape: {type(error).__name__}: {_line(error)}") from None


def rights(api: KubeApi, needed: Iterable[Needed], namespace: str) -> list[Access]:
    """Whether this user has the rights that are needed in a namespace, each by the server's own word."""
    lines = []
    for one in needed:
        resource = f"{one.resource}/{one.subresource}" if one.subresource else one.resource
        what = f"may {one.verb} {resource}{f' {one.name}' if one.name else ''} in {namespace}"
        try:
            ok = api.allowed(one, namespace)
            lines.append(Access(what, ok, "" if ok else "not granted: bind a Role that allows it"))
        except KubeError as error:
            lines.append(Access(what, False, str(error)))
    return lines

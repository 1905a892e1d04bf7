"""Ray Serve's declarative REST interface: what is deployed, and the document that a PUT takes.

A PUT replaces the configuration of all applications and removes declared ones that it does not list, so a document
begins as what is declared.
This module must not know what is wanted.
"""

from __future__ import annotations

import copy
import os
import time
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from autoscaler.actuators.base import Refused
from autoscaler.problem_texts import quoted
from autoscaler.stages import left_behind
from policies.engine import ConfigError, Positive, StrictModel
from policies.json_text import read_json
from policies.redaction import remember
from policies.secret_url import HttpUrl, Url

FIRST_PAUSE_S = 0.2
RETRIED = (429, 500, 502, 503, 504)
APPLICATIONS = "/api/serve/applications/"
Json = dict[str, Any]


class ServeConnection(StrictModel):
    """How to reach Serve."""

    address: HttpUrl = Field(default=Url("http://127.0.0.1:8265"), description="Ray's dashboard.")
    token_env: str = Field(default="RAY_AUTH_TOKEN", description="Environment variable that may hold a Ray token.")
    token_file: Path | None = Field(default=None, description="File that holds a Ray token.")
    timeout_s: Positive = Field(default=4.0, description="Longest wait for one whole answer.")
    deadline_s: Positive = Field(default=4.0, description="Longest time for one operation, retries included.")


class ServeError(Refused):
    """Raised when Serve refused or did not answer."""


Count = Annotated[int, Field(ge=0, le=1_000_000)]


class _Part(BaseModel):
    """Part of an answer as it is read; there is more in it, which is given back as it is."""

    model_config = ConfigDict(strict=True)


class _Replica(_Part):
    state: str


class _Autoscaling(_Part):
    policy: dict[str, Any] | None = None


class _Settings(_Part):
    max_ongoing_requests: Count | None = None
    autoscaling_config: _Autoscaling | None = None


class _Deployment(_Part):
    replicas: list[_Replica] = []
    deployment_config: _Settings = _Settings()
    target_num_replicas: Count | None = None


class _Entry(_Part):
    name: str
    max_ongoing_requests: Count | None = None


class _Declared(_Part):
    name: str
    deployments: list[_Entry] = []


class _Application(_Part):
    status: str = ""
    deployments: dict[str, _Deployment] = {}
    deployed_app_config: _Declared | None = None


class _Details(_Part):
    applications: dict[str, _Application]


class ServeApi:
    """One cluster's Serve.

    Args:
        connection: how to reach it.

    Raises:
        ConfigError: when the address names a secret that is not set.
    """

    def __init__(self, connection: ServeConnection) -> None:
        import requests

        from autoscaler.bounded_http import BoundedAdapter

        self.connection = connection
        self._session = requests.Session()
        for prefix in ("http://", "https://"):
            self._session.mount(prefix, BoundedAdapter())
        try:
            self.root = connection.address.reveal().rstrip("/")
            """The address with its secrets."""
        except ValueError as error:
            raise ConfigError(f"actuator.address {error}") from None

    def details(self) -> Json:
        """What is deployed. Raises `ServeError`."""
        details = self.ask("GET", APPLICATIONS)
        try:
            _Details.model_validate(details)
        except ValidationError as error:
            field = ".".join(map(str, error.errors()[0]["loc"]))[:100]
            raise ServeError(
                0, f"{self.connection.address}: an answer of another shape, at {field or 'its top'}"
            ) from None
        return details

    def ask(self, method: str, path: str, body: Json | None = None) -> Json:
        """The answer to one request, tried again where that can help. Raises `ServeError`."""
        if method != "GET" and left_behind():
            raise ServeError(0, "the tick has ended, so nothing more of its target is carried out")
        until_s, pause_s = time.monotonic() + self.connection.deadline_s, FIRST_PAUSE_S
        while True:
            try:
                return self._once(method, path, body, until_s - time.monotonic())
            except ServeError as error:
                if error.status not in (0, *RETRIED) or time.monotonic() + pause_s >= until_s:
                    raise
            time.sleep(pause_s)
            pause_s *= 2

    def _once(self, method: str, path: str, body: Json | None, left_s: float) -> Json:
        import requests

        try:
            response = self._session.request(
                method,
                f"{self.root}{path}",
                json=body,
                headers=self._headers(),
                timeout=max(0.05, min(self.connection.timeout_s, left_s)),
            )
            if response.status_code in (401, 403):
                raise ServeError(response.status_code, f"{self.connection.address}: refused the token; set token_file")
            if response.status_code >= 400:
                raise ServeError(response.status_code, f"HTTP {response.status_code}: {quoted(response.text)}")
            answer: Json = read_json(response.content) if response.content else {}
        except requests.RequestException as error:
            raise ServeError(0, f"{self.connection.address}: {type(error).__name__}: {quoted(error)}") from None
        except ValueError:
            raise ServeError(0, f"{self.connection.address}: the answer is cut short or no JSON") from None
        return answer

    def _headers(self) -> dict[str, str]:
        token = os.environ.get(self.connection.token_env, "")
        file = self.connection.token_file
        if file is None and not token:
            standard = Path.home() / ".ray" / "auth_token"  # where Ray itself writes and looks
            file = standard if standard.is_file() else None
        if file is not None:
            try:
                token = file.read_text(encoding="utf-8").strip()
            except OSError as error:
                raise ServeError(401, f"{file}: cannot be read: {error.strerror or error}") from None
        remember(token, str(file or self.connection.token_env))
        return {"Authorization": f"Bearer {token}"} if token else {}

    def close(self) -> None:
        """Drop connections."""
        self._session.close()


def declared(details: Json) -> Json:
    """What a PUT must hold to change nothing: every declared application, with externally set counts as they are.

    Args:
        details: Serve's answer to a GET of its applications.
    """
    applications = []
    for application in details["applications"].values():
        config = application.get("deployed_app_config")
        if config is None:
            continue  # started by serve.run: a PUT does not remove it
        config = copy.deepcopy(config)
        if config.get("external_scaler_enabled"):
            _keep_counts(config, application.get("deployments", {}))
        applications.append(config)
    body: Json = {"applications": applications}
    for key in ("proxy_location", "http_options", "grpc_options", "target_capacity"):
        if details.get(key) is not None:
            body[key] = details[key]
    return body


def _keep_counts(config: Json, deployments: Json) -> None:
    """A count set from outside is not in the declared configuration, and a PUT would set it back."""
    for name, found in deployments.items():
        entry = entry_of(config, name)
        if found.get("target_num_replicas") is not None:
            entry["num_replicas"] = found["target_num_replicas"]


def entry_of(config: Json, deployment: str) -> Json:
    """What a declared application says of a deployment; put there if it says nothing."""
    entries = config.setdefault("deployments", [])
    found: Json | None = next((one for one in entries if one["name"] == deployment), None)
    if found is None:
        found = {"name": deployment}
        entries.append(found)
    return found

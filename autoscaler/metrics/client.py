"""Prometheus as a server: how to reach it, how to log in, and instant queries within a deadline.

On prometheus-api-client, whose defaults would wait for ever and retry without an end.
This module must not know what is asked.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from autoscaler.metrics import presets
from policies.engine import ConfigError, NonNegative, Positive, StrictModel
from policies.spec import Share

if TYPE_CHECKING:
    from prometheus_api_client import PrometheusConnect

FIRST_PAUSE_S = 0.1


class PrometheusAuth(StrictModel):
    """How to log in. Secrets come from the environment or from a mounted file, never from this configuration."""

    bearer_token_env: str | None = Field(default=None, description="Environment variable that holds a bearer token.")
    bearer_token_file: Path | None = Field(default=None, description="File with a bearer token, read at each tick.")
    username: str | None = Field(default=None, description="User name for basic authentication.")
    password_env: str | None = Field(default=None, description="Environment variable that holds the password.")
    password_file: Path | None = Field(default=None, description="File with the password.")
    ca_file: Path | None = Field(default=None, description="Certificate authority to trust, PEM.")
    client_cert_file: Path | None = Field(default=None, description="Client certificate, PEM.")
    client_key_file: Path | None = Field(default=None, description="Key of the client certificate, PEM.")
    verify_tls: bool = Field(default=True, description="Verify the server's certificate.")

    @model_validator(mode="after")
    def _one_way(self) -> PrometheusAuth:
        ways = [self.bearer_token_env, self.bearer_token_file, self.username]
        if sum(way is not None for way in ways) > 1:
            raise ValueError("expected one of bearer_token_env, bearer_token_file, username")
        if (self.username is None) != (self.password_env is None and self.password_file is None):
            raise ValueError("username needs password_env or password_file, and they need username")
        return self

    def headers(self) -> dict[str, str]:
        """The authorisation header, if any.

        Raises:
            ConfigError: when the secret is not there.
        """
        token = _secret(self.bearer_token_env, self.bearer_token_file)
        return {} if token is None else {"Authorization": f"Bearer {token}"}

    def basic(self) -> tuple[str, str] | None:
        """User name and password, if any.

        Raises:
            ConfigError: when the secret is not there.
        """
        password = _secret(self.password_env, self.password_file)
        return None if self.username is None or password is None else (self.username, password)


def _secret(variable: str | None, file: Path | None) -> str | None:
    if variable is not None:
        if not os.environ.get(variable):
            raise ConfigError(f"environment variable {variable}: expected a secret, but it is not set")
        return os.environ[variable].strip()
    if file is None:
        return None
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror or error}") from None


Engine = Literal["vllm", "sglang", "tgi", "tensorrt-llm", "ray-serve"]
GatewayName = Literal["none", "haproxy", "llm-d-epp", "ray-serve"]


class PrometheusConfig(StrictModel):
    """Where the measurements are and what they are called."""

    url: Annotated[str, Field(pattern=r"^https?://")] = Field(description="Prometheus, for example http://host:9090.")
    engines: Annotated[tuple[Engine, ...], Field(min_length=1)] = Field(
        default=("vllm",), description="Inference engines whose metric names are looked up."
    )
    gateway: GatewayName = Field(default="none", description="What stands in front of the engines and holds a queue.")
    replicas: Literal["none", "kube-state-metrics"] = Field(
        default="none", description="Where replica counts are read when the actuator cannot say."
    )
    service_label: str = Field(default="service", description="Label of the engines' series that names the service.")
    pool_label: str | None = Field(default=None, description="Label that names the pool, where a service has several.")
    replica_label: str = Field(default="instance", description="Label that names one replica.")
    gateway_label: str | None = Field(default=None, description="Label that names the service at the gateway.")
    replicas_label: str | None = Field(default=None, description="Label that names the service in replica counts.")
    names: dict[str, str] = Field(default={}, description="Label value by service, where it is not the service's name.")
    gateway_names: dict[str, str] = Field(default={}, description="The same at the gateway.")
    replicas_names: dict[str, str] = Field(default={}, description="The same in replica counts.")
    matchers: dict[str, str] = Field(default={}, description="Labels that every series must have, such as a namespace.")
    metrics: dict[str, tuple[str, ...]] = Field(
        default={}, description="Own metric names by signal, for engines that are not in the table."
    )
    window_s: Positive | None = Field(default=None, description="Window of rates; the control interval when unset.")
    max_age_s: Positive = Field(default=60.0, description="A newest sample older than this makes a service blind.")
    min_coverage: Share = Field(default=0.7, description="Least share of the ready replicas that must be scraped.")
    discovery_s: NonNegative = Field(default=60.0, description="A replica ready for less need not be scraped yet.")
    timeout_s: Positive = Field(default=2.0, description="Longest wait for one answer.")
    deadline_s: Positive = Field(default=5.0, description="Longest time for one snapshot, retries included.")
    attempts: int = Field(default=3, ge=1, le=10, description="Tries of one query within the deadline.")
    histograms: bool = Field(
        default=True,
        description="Fetch whole latency histograms, for policies that scale on quantiles; else the objectives' edges.",
    )
    auth: PrometheusAuth = Field(default=PrometheusAuth(), description="How to log in.")

    @model_validator(mode="after")
    def _known_signals(self) -> PrometheusConfig:
        unknown = sorted(set(self.metrics) - set(presets.SIGNALS))
        if unknown:
            raise ValueError(f"metrics: no signal named {unknown[0]!r}; signals: {', '.join(presets.SIGNALS)}")
        return self


class PrometheusQueryError(RuntimeError):
    """Raised when a query got no answer; the message says why."""


class PrometheusClient:
    """Instant queries within a deadline, on prometheus-api-client.

    Args:
        config: where the server is, how to log in, how long to wait.
    """

    def __init__(self, config: PrometheusConfig) -> None:
        import requests
        from prometheus_api_client import PrometheusConnect
        from urllib3.util.retry import Retry

        self.config = config
        auth = config.auth
        session = requests.Session()
        session.verify = str(auth.ca_file) if auth.ca_file else auth.verify_tls
        if auth.client_cert_file:
            key = str(auth.client_key_file) if auth.client_key_file else None
            session.cert = (str(auth.client_cert_file), key) if key else str(auth.client_cert_file)
        # The client's own retries know no deadline, and its default is to wait for ever.
        self._connect: PrometheusConnect = PrometheusConnect(
            url=config.url.rstrip("/"), session=session, retry=Retry(0), timeout=config.timeout_s
        )

    def log_in(self) -> None:
        """Read the secrets anew: a mounted token is replaced while we run.

        Raises:
            ConfigError: when a secret is not there.
        """
        self._connect.headers = self.config.auth.headers()
        self._connect.auth = self.config.auth.basic()

    def ask(self, query: str, until_s: float | None = None, at_s: float | None = None) -> list[dict[str, Any]]:
        """The rows of an instant query.

        Args:
            query: PromQL.
            until_s: deadline on `time.monotonic`; one whole snapshot's time from now when None.
            at_s: the moment asked about, Unix seconds; the server's now when None.

        Raises:
            PrometheusQueryError: when there is no answer before the deadline, or the server refuses the query.
        """
        params = None if at_s is None else {"time": f"{at_s:.3f}"}
        rows: list[dict[str, Any]] = self._try(
            lambda wait_s: self._connect.custom_query(query, params=params, timeout=wait_s), until_s
        )
        return rows

    def names(self) -> set[str]:
        """Every metric name that the server knows.

        Raises:
            PrometheusQueryError: when there is no answer in time.
        """
        found: list[str] = self._try(lambda _: self._connect.all_metrics(), None)
        return set(found)

    def close(self) -> None:
        """Drop connections."""
        self._connect.close()

    def _try(self, call: Callable[[float], Any], until_s: float | None) -> Any:
        from prometheus_api_client.exceptions import PrometheusApiClientException
        from requests import RequestException

        until_s = time.monotonic() + self.config.deadline_s if until_s is None else until_s
        why, pause_s = "the deadline has passed", FIRST_PAUSE_S
        for _ in range(self.config.attempts):
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                break
            try:
                return call(min(self.config.timeout_s, left_s))
            except PrometheusApiClientException as error:
                why = " ".join(str(error).split())[:300]
                if "Status Code 4" in why and "Status Code 429" not in why:
                    break  # the server understood and refuses: asking again changes nothing
            except (RequestException, ValueError, KeyError, TypeError) as error:
                # The whole query is in the address, which would hide what went wrong.
                sentence = " ".join(re.sub(r"with url: \S+", "", str(error)).split())
                why = f"{type(error).__name__}: {sentence[:300]}"
            time.sleep(max(0.0, min(pause_s, until_s - time.monotonic())))
            pause_s *= 2
        raise PrometheusQueryError(why)

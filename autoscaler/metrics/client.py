"""Prometheus as a server: how to reach it, how to log in, and instant queries within a deadline.

On prometheus-api-client, whose defaults would wait for ever and retry without an end.
This module must not know what is asked.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlencode

from pydantic import Field, model_validator

from autoscaler.actuators.starts import StartSpec
from autoscaler.metrics import answers, presets
from autoscaler.problem_texts import MOST_READ, quoted
from policies.engine import ConfigError, NonNegative, Positive, StrictModel
from policies.names import LabelName
from policies.redaction import remember
from policies.secret_url import HttpUrl
from policies.spec import Share

if TYPE_CHECKING:
    from prometheus_api_client import PrometheusConnect

FIRST_PAUSE_S = 0.1
LONGEST_ADDRESS = 6000
"""Characters of a query in an address. Servers take a megabyte, what stands in front of them often 8,000 bytes."""


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
        secret = os.environ[variable].strip()
        remember(secret)
        return secret
    if file is None:
        return None
    try:
        secret = file.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror or error}") from None
    remember(secret, str(file))
    return secret


HEADER_NAME = r"^[A-Za-z0-9!#$%&'*+.^_`|~-]+$"
SET_ELSEWHERE = ("authorization", "host", "content-length", "transfer-encoding", "connection")
"""Headers that the login or the connection sets."""


class Header(StrictModel):
    """One header of every request: its value, or where the value is read at each tick."""

    value: str | None = Field(default=None, description="The value itself; a secret does not belong here.")
    env: str | None = Field(default=None, description="Environment variable that holds the value.")
    file: Path | None = Field(default=None, description="File with the value.")

    @model_validator(mode="after")
    def _one_way(self) -> Header:
        if sum(way is not None for way in (self.value, self.env, self.file)) != 1:
            raise ValueError("expected one of value, env, file")
        return self

    def read(self) -> str:
        """The value.

        Raises:
            ConfigError: when it is not there, or would be more than one line.
        """
        value = self.value if self.value is not None else _secret(self.env, self.file) or ""
        if not value.isprintable() or not value.isascii():
            raise ConfigError("metrics.headers: a value must be one line of ASCII")
        return value


Engine = Literal["vllm", "sglang", "tgi", "tensorrt-llm", "ray-serve"]
GatewayName = Literal["none", "haproxy", "llm-d-epp", "ray-serve"]
Names = dict[str, str | Annotated[tuple[str, ...], Field(min_length=1)]]


class PrometheusConfig(StrictModel):
    """Where the measurements are and what they are called."""

    url: HttpUrl = Field(description="Prometheus, for example http://host:9090.")
    engines: Annotated[tuple[Engine, ...], Field(min_length=1)] = Field(
        default=("vllm",), description="Inference engines whose metric names are looked up."
    )
    gateway: GatewayName = Field(default="none", description="What stands in front of the engines and holds a queue.")
    replicas: Literal["none", "kube-state-metrics"] = Field(
        default="none", description="Where replica counts are read when the actuator cannot say."
    )
    service_label: LabelName = Field(
        default="service", description="Label of the engines' series that names the service."
    )
    pool_label: LabelName | None = Field(
        default=None, description="Label that names the pool, where a service has several."
    )
    replica_label: LabelName = Field(default="instance", description="Label that names one replica.")
    gateway_label: LabelName | None = Field(default=None, description="Label that names the service at the gateway.")
    replicas_label: LabelName | None = Field(
        default=None, description="Label that names the service in replica counts."
    )
    scraper_labels: tuple[LabelName, ...] = Field(
        default=("job", "prometheus_replica"),
        description="Labels that say who scraped: what differs in them alone is one replica, scraped several times.",
    )
    names: Names = Field(
        default={},
        description="Label value by service, or several of them, where it is not the service's name.",
    )
    gateway_names: Names = Field(default={}, description="The same at the gateway, such as a model and its adapters.")
    replicas_names: Names = Field(default={}, description="The same in replica counts.")
    matchers: dict[LabelName, str] = Field(
        default={}, description="Labels that every series must have, such as a namespace."
    )
    metrics: dict[str, tuple[str, ...]] = Field(
        default={}, description="Own metric names by signal, for engines that are not in the table."
    )
    window_s: Positive | None = Field(default=None, description="Window of rates; the control interval when unset.")
    max_age_s: Positive = Field(default=60.0, description="A newest sample older than this makes a service blind.")
    min_coverage: Share = Field(default=0.7, description="Least share of the ready replicas that must be scraped.")
    discovery_s: NonNegative = Field(default=60.0, description="A replica ready for less need not be scraped yet.")
    starts: StartSpec = Field(
        default=StartSpec(), description="How long a start may take, where the actuator does not count replicas."
    )
    timeout_s: Positive = Field(default=2.0, description="Longest wait for one whole answer.")
    deadline_s: Positive = Field(default=5.0, description="Longest time for one snapshot, retries included.")
    attempts: int = Field(default=3, ge=1, le=10, description="Tries of one query within the deadline.")
    histograms: bool = Field(
        default=True,
        description="Fetch whole latency histograms, for policies that scale on quantiles; else the objectives' edges.",
    )
    auth: PrometheusAuth = Field(default=PrometheusAuth(), description="How to log in.")
    headers: dict[Annotated[str, Field(pattern=HEADER_NAME)], Header] = Field(
        default={}, description="More headers of every request, such as X-Scope-OrgID: the tenant of Mimir or Thanos."
    )

    @model_validator(mode="after")
    def _free_headers(self) -> PrometheusConfig:
        taken = next((name for name in self.headers if name.lower() in SET_ELSEWHERE), None)
        if taken:
            raise ValueError(f"headers: {taken} is set by auth or by the connection")
        return self

    @model_validator(mode="after")
    def _different_label_values(self) -> PrometheusConfig:
        for field in ("names", "gateway_names", "replicas_names"):
            names = getattr(self, field)
            values = [value for service in names for value in label_values(names, service)]
            twice = next((value for value in values if values.count(value) > 1), None)
            if twice is not None:
                raise ValueError(f"{field}: {twice!r} is there twice; a label value belongs to one service")
        return self

    @model_validator(mode="after")
    def _known_signals(self) -> PrometheusConfig:
        unknown = sorted(set(self.metrics) - set(presets.SIGNALS))
        if unknown:
            raise ValueError(f"metrics: no signal named {unknown[0]!r}; signals: {', '.join(presets.SIGNALS)}")
        return self


def label_values(names: Names, service: str) -> tuple[str, ...]:
    """The label values that mean a service; the first is its own, the others add to it."""
    found = names.get(service, service)
    return (found,) if isinstance(found, str) else found


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

        from autoscaler.bounded_http import BoundedAdapter

        self.config = config
        auth = config.auth

        class Session(requests.Session):
            def request(  # type: ignore[override]
                self, method: str, url: str, params: Any = None, **options: Any
            ) -> requests.Response:
                """A query that is too long for an address, as one that names many services, goes in the body."""
                if params and len(urlencode(params)) > LONGEST_ADDRESS:
                    return super().request("POST", url, data=params, **options)
                return super().request(method, url, params=params, **options)

        session = Session()
        session.verify = str(auth.ca_file) if auth.ca_file else auth.verify_tls
        if auth.client_cert_file:
            key = str(auth.client_key_file) if auth.client_key_file else None
            session.cert = (str(auth.client_cert_file), key) if key else str(auth.client_cert_file)
        try:
            url = config.url.reveal().rstrip("/")
        except ValueError as error:
            raise ConfigError(f"metrics.url {error}") from None
        self._connect: PrometheusConnect = PrometheusConnect(url=url, session=session)
        # In the place of the client's own, whose retries know no deadline; also where the server sends us elsewhere.
        for prefix in ("http://", "https://", url):
            session.mount(prefix, BoundedAdapter())

    def log_in(self) -> None:
        """Read the secrets anew: a mounted token is replaced while we run.

        Raises:
            ConfigError: when a secret is not there.
        """
        more = {name: header.read() for name, header in self.config.headers.items()}
        self._connect.headers = more | self.config.auth.headers()
        self._connect.auth = self.config.auth.basic()

    def ask(
        self, query: str, until_s: float | None = None, at_s: float | None = None, window: bool = False
    ) -> list[dict[str, Any]]:
        """The rows of an instant query.

        Args:
            query: PromQL.
            until_s: deadline on `time.monotonic`; one whole snapshot's time from now when None.
            at_s: the moment asked about, Unix seconds; the server's now when None.
            window: the query is a range selector, whose rows have the samples of a window instead of one each.

        Raises:
            PrometheusQueryError: when there is no answer before the deadline, or the server refuses the query.
        """
        params = None if at_s is None else {"time": f"{at_s:.3f}"}
        ask = partial(self._connect.custom_query, query, params=params)
        rows: list[dict[str, Any]] = self._try(lambda wait_s: answers.samples(ask(timeout=wait_s), window), until_s)
        return rows

    def names(self) -> set[str]:
        """Every metric name that the server knows.

        Raises:
            PrometheusQueryError: when there is no answer in time.
        """

        def ask(wait_s: float) -> list[str]:
            self._connect._timeout = wait_s  # this call takes none of its own
            return answers.names(self._connect.all_metrics())

        return set(self._try(ask, None))

    def types(self, names: Iterable[str], until_s: float) -> set[str]:
        """What targets say that any of these metrics is, such as ``histogram``; empty where no server keeps it.

        Args:
            names: metric names.
            until_s: deadline on `time.monotonic`.
        """
        found = set()
        try:
            for name in names:
                listed = self._try(partial(self._type_entries, name), until_s)
                found |= {str(entry["type"]) for entry in listed}
        except PrometheusQueryError:
            return set()  # not every server has this part of the API
        return found

    def close(self) -> None:
        """Drop connections."""
        self._connect.close()

    def _type_entries(self, name: str, wait_s: float) -> list[dict[str, Any]]:
        self._connect._timeout = wait_s  # this call takes none of its own
        entries: list[dict[str, Any]] = self._connect.get_metric_metadata(name)
        return entries

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
                why = quoted(error)
                if "Status Code 4" in why and "Status Code 429" not in why:
                    break  # the server understood and refuses: asking again changes nothing
            except (
                RequestException,
                ValueError,
                LookupError,
                TypeError,
                AttributeError,
                OverflowError,
                RecursionError,
            ) as error:
                # The whole query is in the address, which would hide what went wrong.
                sentence = re.sub(r"with url: \S+", "", str(error)[:MOST_READ])
                why = f"{type(error).__name__}: {quoted(sentence)}"
            time.sleep(max(0.0, min(pause_s, until_s - time.monotonic())))
            pause_s *= 2
        raise PrometheusQueryError(why)

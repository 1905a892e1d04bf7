"""What goes with a request and what an answer must look like."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
import requests
from dripping_server import DrippingServer
from prometheus_api_client.exceptions import PrometheusApiClientException

from autoscaler.actuators.kube_api import KubeApi, KubeConnection, KubeError
from autoscaler.metrics.client import PrometheusAuth, PrometheusClient, PrometheusConfig, PrometheusQueryError
from policies import redaction
from policies.engine import ConfigError
from policies.redaction import KEPT, redacted

KUBECONFIG = """
apiVersion: v1
kind: Config
current-context: one
contexts: [{name: one, context: {cluster: one, user: one}}]
clusters: [{name: one, cluster: {server: "http://127.0.0.1:PORT"}}]
users: [{name: one, user: {token: none}}]
"""


def config(**options: Any) -> PrometheusConfig:
    return PrometheusConfig.model_validate({"url": "http://127.0.0.1:9", "attempts": 1, **options})


def test_headers_come_from_the_configuration_the_environment_or_a_file_that_is_read_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TENANT", "team-b")
    monkeypatch.setenv("TOKEN", "abc")
    file = tmp_path / "key"
    file.write_text("first\n")
    headers = {"X-Scope-OrgID": {"value": "team-a"}, "X-Team": {"env": "TENANT"}, "X-Key": {"file": file}}
    client = PrometheusClient(config(headers=headers, auth={"bearer_token_env": "TOKEN"}))
    wanted = {"X-Scope-OrgID": "team-a", "X-Team": "team-b", "X-Key": "first", "Authorization": "Bearer abc"}
    client.log_in()
    assert client._connect.headers == wanted
    file.write_text("second\n")
    client.log_in()
    assert client._connect.headers == wanted | {"X-Key": "second"}
    file.write_text("two\nlines\n")
    with pytest.raises(ConfigError, match="one line of ASCII"):
        client.log_in()
    file.unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        client.log_in()


@pytest.mark.parametrize("raised", [PrometheusApiClientException, ValueError])
@pytest.mark.parametrize("place", range(280, 304, 4))
def test_a_secret_is_hidden_also_where_an_error_is_cut(
    monkeypatch: pytest.MonkeyPatch, raised: type[Exception], place: int
) -> None:
    secret = "Tr0ub4dor  and 3"  # two blanks, which a sentence does not keep
    monkeypatch.setenv("PASSWORD", secret)
    client = PrometheusClient(config(auth={"username": "me", "password_env": "PASSWORD"}))
    client.log_in()

    def refuse(*_: Any, **__: Any) -> None:
        raise raised("x" * place + f" {secret} " + "y" * 300)

    monkeypatch.setattr(client._connect, "custom_query", refuse)
    with pytest.raises(PrometheusQueryError) as refused:
        client.ask("up")
    assert "Tr0" not in str(refused.value)
    assert len(str(refused.value)) <= 300 + len("ValueError: ")


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({"authorization": {"value": "x"}}, "is set by auth or by the connection"),
        ({"X Scope": {"value": "x"}}, "should match pattern"),
        ({"X-Scope-OrgID": {"value": "x", "env": "Y"}}, "expected one of value, env, file"),
        ({"X-Scope-OrgID": {}}, "expected one of value, env, file"),
    ],
)
def test_headers_that_cannot_be_are_refused(headers: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        config(headers=headers)


@pytest.fixture
def frozen() -> Iterator[int]:
    """The port of a server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def closed() -> int:
    """A port on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.mark.parametrize("away", ["frozen", "closed"])
def test_a_server_that_is_away_is_named_in_the_same_words_each_time(
    away: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    port = request.getfixturevalue(away)
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(KUBECONFIG.replace("PORT", str(port)))
    found: dict[str, set[str]] = {"metrics": set(), "kubernetes": set()}
    for wait_s in (0.11, 0.16):
        client = PrometheusClient(config(url=f"http://127.0.0.1:{port}", timeout_s=wait_s, deadline_s=0.2))
        with pytest.raises(PrometheusQueryError) as unanswered:
            client.ask("up")
        found["metrics"].add(str(unanswered.value))
        with pytest.raises(KubeError) as refused:
            KubeApi(KubeConnection(kubeconfig=kubeconfig, timeout_s=wait_s, deadline_s=0.2)).get("/version")
        found["kubernetes"].add(str(refused.value))
    assert [len(words) for words in found.values()] == [1, 1], found


def test_a_label_value_belongs_to_one_service() -> None:
    with pytest.raises(ValueError, match="gateway_names: 'sql' is there twice"):
        config(gateway_names={"chat": ["llama", "sql"], "code": "sql"})


@pytest.mark.parametrize(
    "answer",
    [
        None,
        {"a": 1},
        [1],
        [{"metric": []}],
        [{"metric": {"service": 1}, "value": [1, "2"]}],
        [{"metric": {}, "value": None}],
        [{"metric": {}, "value": [1]}],
        [{"metric": {}, "value": [1, None]}],
        [{"metric": {}, "values": [[1]]}],
        [{"metric": {}, "histogram": [1, {"sum": "1"}]}],
        [{"metric": {}, "histogram": [1, {"count": "1", "buckets": [[0, "1"]]}]}],
        [{"metric": {}, "histogram": [1, {"count": "1", "buckets": [[0, "1", "x", "2"]]}]}],
        [{"metric": {}, "histogram": [1, {"count": "1", "buckets": 5}]}],
        [{"metric": {}, "histogram": [1, "2"]}],
    ],
)
def test_an_answer_of_another_shape_is_no_answer(answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client = PrometheusClient(config(deadline_s=0.2))
    monkeypatch.setattr(client._connect, "custom_query", lambda *_, **__: answer)
    with pytest.raises(PrometheusQueryError):
        client.ask("up")


def test_a_histogram_under_the_name_of_a_number_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    client = PrometheusClient(config())
    answer = [{"metric": {}, "histogram": [7, {"count": "3", "buckets": []}]}, {"metric": {}, "value": [7, "2"]}]
    monkeypatch.setattr(client._connect, "custom_query", lambda *_, **__: answer)
    assert [row["value"] for row in client.ask("up")] == [[7, "NaN"], [7, "2"]]


@pytest.mark.parametrize("what", ["ask", "names", "types"])
def test_whatever_is_asked_ends_with_the_deadline(what: str) -> None:
    server = DrippingServer("body")
    client = PrometheusClient(config(url=server.url, timeout_s=30.0, deadline_s=0.5, attempts=3))
    began_s = time.monotonic()
    if what == "types":
        assert client.types(["up"], began_s + 0.5) == set()
    else:
        with pytest.raises(PrometheusQueryError, match="timed out"):
            client.ask("up") if what == "ask" else client.names()
    assert time.monotonic() - began_s < 3.0
    client.close()
    server.stop()


def test_a_token_file_that_is_rotated_keeps_the_last_tokens_hidden(tmp_path: Path) -> None:
    file = tmp_path / "token"
    for number in range(100):
        file.write_text(f"rotated-{number:03d}")
        PrometheusAuth(bearer_token_file=file).headers()
    assert redacted("rotated-099 rotated-098") == "*** ***"
    assert len(redaction._known[str(file)]) == KEPT


def test_what_is_no_number_in_a_row_is_missing_there_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    client = PrometheusClient(config())
    bad = [{"metric": {"le": "abc"}, "value": [1, "1"]}, {"metric": {}, "value": [1, "much"]}]
    good = {"metric": {"le": "+Inf"}, "value": [1, "2"]}
    monkeypatch.setattr(client._connect, "custom_query", lambda *_, **__: [*bad, good])
    rows = client.ask("up")
    assert rows == [{"metric": {"le": "NaN"}, "value": [1, "1"]}, {"metric": {}, "value": [1, "NaN"]}, good]


def test_a_query_that_is_too_long_for_an_address_goes_in_the_body(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []

    def send(_: object, request: requests.PreparedRequest, **__: object) -> requests.Response:
        sent.append((request.method, len(str(request.url)), parse_qs(str(request.body)).get("query")))
        answer = requests.Response()
        answer.status_code, answer._content = 200, b'{"data": {"result": []}}'
        return answer

    monkeypatch.setattr(requests.Session, "send", send)
    client = PrometheusClient(config())
    long = "a" * 10_000
    assert client.ask("up") == client.ask(long) == []
    (short_method, _, _), (long_method, address, body) = sent
    assert (short_method, long_method, body) == ("GET", "POST", [long])
    assert address < 100

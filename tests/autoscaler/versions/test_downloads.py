"""A bundle comes from a registry within a size and a time, and what is refused leaves nothing on the disk."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autoscaler.versions import registry
from autoscaler.versions.registry import BUNDLE_FILE, RegistryUnavailable, download, fetch
from autoscaler.versions.signatures import Trust, make_keys
from policies.learned import MAX_BYTES, BundleMismatch
from policies.lineup import SHIPPED_BUNDLE


class Artifacts(ThreadingHTTPServer):
    """Answers as it is told to, and counts what it was asked and could send."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.kind, self.asked, self.sent = "whole", 0, 0
        self.logins: list[str | None] = []
        self.url = f"http://127.0.0.1:{self.server_port}/artifacts"


class Answer(BaseHTTPRequestHandler):
    server: Artifacts

    def do_GET(self) -> None:
        self.server.asked += 1
        self.server.logins.append(self.headers.get("Authorization"))
        self.send_response(404 if self.server.kind == "broken" else 200)
        self.end_headers()
        content = SHIPPED_BUNDLE.read_bytes()
        parts = {"whole": [content], "cut": [content[:1000]], "broken": [], "drip": [b"P"] * 10_000}
        try:
            for part in parts.get(self.server.kind, [bytes(2**20)] * 10_000):
                self.wfile.write(part)
                self.server.sent += len(part)
                if self.server.kind == "drip":
                    time.sleep(0.02)
        except OSError:
            pass  # they have heard enough

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def artifacts() -> Iterator[Artifacts]:
    server = Artifacts()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


class Client:
    """A registry with one version, whose bundle is elsewhere."""

    tracking_uri = "http://127.0.0.1:9"

    def __init__(self, artifact_uri: str, **tags: str) -> None:
        self.artifact_uri, self.tags = artifact_uri, tags

    def get_run(self, _: str) -> Any:
        return SimpleNamespace(info=SimpleNamespace(artifact_uri=self.artifact_uri))

    def get_model_version(self, name: str, version: str) -> Any:
        return SimpleNamespace(name=name, version=version, run_id="r", tags=self.tags)


def test_the_login_goes_to_the_registrys_own_server_alone(
    artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "a-token-of-the-controller")
    client = Client(artifacts.url)
    download(client, "r")
    client.tracking_uri = artifacts.url.removesuffix("/artifacts")
    download(client, "r")
    assert artifacts.logins == [None, "Bearer a-token-of-the-controller"]


def test_a_bundle_comes_whole(artifacts: Artifacts) -> None:
    assert download(Client(artifacts.url), "r") == SHIPPED_BUNDLE.read_bytes()


def test_an_answer_without_an_end_is_left_at_the_size_of_a_bundle(artifacts: Artifacts) -> None:
    artifacts.kind = "endless"
    with pytest.raises(BundleMismatch, match="larger than any policy bundle"):
        download(Client(artifacts.url), "r")
    assert artifacts.sent < MAX_BYTES + (16 << 20)  # what lies in buffers on the way


def test_an_answer_that_drips_is_left_after_a_while(artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "DOWNLOAD_S", 0.5)
    artifacts.kind = "drip"
    with pytest.raises(RegistryUnavailable, match=r"did not come within 0\.5 s"):
        download(Client(artifacts.url), "r")
    assert artifacts.sent < 5000


def test_a_server_that_fails_is_named_and_its_page_not_read(artifacts: Artifacts) -> None:
    artifacts.kind = "broken"
    with pytest.raises(RegistryUnavailable, match="answers 404 where the bundle should be"):
        download(Client(artifacts.url), "r")


@pytest.mark.parametrize("content", ["endless", "sparse"])
def test_a_file_of_the_store_is_read_within_bounds(tmp_path: Path, content: str) -> None:
    if content == "endless":
        (tmp_path / BUNDLE_FILE).symlink_to("/dev/zero")
    else:
        with (tmp_path / BUNDLE_FILE).open("wb") as file:
            file.truncate(8 << 30)
    with pytest.raises((BundleMismatch, OSError), match=r"larger than any policy bundle|no regular file"):
        download(Client(tmp_path.as_uri()), "r")


class ObjectStore:
    """Another kind of store, whose client writes a file of any size."""

    size = MAX_BYTES

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def list_artifacts(self) -> list[Any]:
        return [SimpleNamespace(path=BUNDLE_FILE, file_size=self.size)]

    def download_artifacts(self, path: str, folder: str) -> str:
        assert self.size <= MAX_BYTES
        (Path(folder) / path).write_bytes(SHIPPED_BUNDLE.read_bytes())
        return str(Path(folder) / path)


def test_an_object_store_is_asked_for_the_size_first(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.store.artifact import artifact_repository_registry

    monkeypatch.setattr(artifact_repository_registry, "get_artifact_repository", ObjectStore)
    assert download(Client("s3://bucket"), "r") == SHIPPED_BUNDLE.read_bytes()
    monkeypatch.setattr(ObjectStore, "size", MAX_BYTES + 1)
    with pytest.raises(BundleMismatch, match="larger than any policy bundle"):
        download(Client("s3://bucket"), "r")


@pytest.mark.parametrize("kind", ["endless", "cut", "whole"])
def test_what_is_refused_leaves_nothing_on_the_disk(
    artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    artifacts.kind = kind
    other = "0" * 64
    monkeypatch.setattr(registry, "connect", lambda _: Client(artifacts.url, bundle_digest=other))
    with pytest.raises(BundleMismatch, match=r"^models:/m/1: "):
        fetch("models:/m/1", None, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_what_nobody_signed_is_not_even_asked_for(
    artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "connect", lambda _: Client(artifacts.url, bundle_digest="0" * 64))
    with pytest.raises(BundleMismatch, match="has no signature that can be read"):
        fetch("models:/m/1", None, tmp_path / "cache", Trust([make_keys(tmp_path / "key")]))
    assert artifacts.asked == 0

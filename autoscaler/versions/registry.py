"""The registry of policy versions, asked within bounds: a version is found, its bundle downloaded, verified and kept.

Whoever can write to a registry decides what it answers, so nothing is taken from it beyond a size and a time, and what
is refused never reaches the disk. This is the only live module that imports MLflow.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from autoscaler.problem_texts import quoted
from autoscaler.versions import signatures
from autoscaler.versions.signatures import Trust
from policies.atomic_files import write_text, write_whole
from policies.bounded_files import TooLarge, read_bounded
from policies.learned import MAX_BYTES, BundleMismatch, PolicyBundle, parse_bundle, read_bundle
from policies.lineup import REGISTRY_PREFIX
from policies.redaction import remember
from policies.telemetry import turn_off

BUNDLE_FILE = "policy.zip"
DIGEST_TAG = "bundle_digest"
DOWNLOAD_S = 60.0
"""A bundle takes no longer to come, seconds."""
PART_BYTES = 2**16


class RegistryUnavailable(ConnectionError):  # noqa: N818 - reads as the state that it reports
    """Raised when the registry gives no answer, or not the bundle that it should."""


@dataclass(frozen=True)
class Registered:
    """What a registry says about one version.

    Attributes:
        version: NAME/VERSION; the name is the one that was asked for.
        run_id: the run that holds the bundle.
        digest: of the bundle, SHA-256; None where nobody has written it.
        signature: base64; empty where there is none.
    """

    version: str
    run_id: str
    digest: str | None
    signature: str


def connect(tracking_uri: str | None) -> Any:
    """MLflow's client, with short waits: who asks, asks again soon. An operator's own setting wins."""
    turn_off()
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    for name in ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"):  # MLflow's client reads them
        remember(os.environ.get(name, ""))
    import mlflow

    return mlflow.MlflowClient(tracking_uri)


def find(client: Any, reference: str) -> Registered:
    """The version that `models:/NAME@ALIAS` or `models:/NAME/VERSION` names now."""
    body = reference.removeprefix(REGISTRY_PREFIX)
    if "@" in body:
        name, alias = body.split("@", 1)
        found = client.get_model_version_by_alias(name, alias)
        version = str(found.version)
        if not version.isdecimal():
            raise RegistryUnavailable(f"answers with the version {version!r}, expected a number")
    else:
        name, version = body.split("/", 1)
        found = client.get_model_version(name, version)
    tags = found.tags
    return Registered(f"{name}/{version}", found.run_id, tags.get(DIGEST_TAG), tags.get(signatures.TAG) or "")


def fetch(reference: str, tracking_uri: str | None, cache: Path, trust: Trust | None = None) -> tuple[str, Path]:
    """Version and local bundle file that `models:/NAME@ALIAS` or `models:/NAME/VERSION` names now, digest verified.

    Raises:
        RegistryUnavailable: when the registry does not give it.
        BundleMismatch: when the bundle is not the one that was registered, or none of the trusted keys has signed it as
            this version.
    """
    trust = trust or Trust()
    with _faults(reference):
        client = connect(tracking_uri)
        found = find(client, reference)
        kept = cache / f"{_plain(f'{found.version}-{str(found.digest)[:12]}')}.zip"
        if not _is_whole(kept, found, trust):
            content = _download_verified(client, found, reference, trust)
            cache.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_whole(kept, lambda partial: partial.write_bytes(content))
        if found.signature:
            write_text(signatures.signature_file(kept), f"{found.signature}\n")
        write_text(cache / _pointer(reference), f"{found.version}\n{kept.name}\n")
    return found.version, kept


def kept_bundle(reference: str, cache: Path) -> tuple[str, Path] | None:
    """What `fetch` gave last, from the disk; None when there is nothing."""
    try:
        version, name = read_bounded(cache / _pointer(reference), PART_BYTES).decode().splitlines()
    except (OSError, ValueError):
        return None
    body = reference.removeprefix(REGISTRY_PREFIX)
    if version.rpartition("/")[0] != body.split("@", 1)[0] if "@" in body else version != body:
        return None
    path = cache / Path(name).name
    return (version, path) if os.path.isfile(path) else None  # noqa: PTH113 - a name that is none is no error


def sign_version(reference: str, tracking_uri: str | None, key: Path) -> str:
    """Sign a registered version and write the signature to its tag; NAME/VERSION.

    Raises:
        RegistryUnavailable: when the registry does not give it, or does not take the tag.
        BundleMismatch: when the bundle is not the one that was registered.
        ConfigError: when the key file holds no private Ed25519 key.
    """
    with _faults(reference):
        client = connect(tracking_uri)
        found = find(client, reference)
        content = _download_verified(client, found, reference, Trust())
    signature = signatures.sign(content, key, found.version)
    with _faults(reference):
        client.set_model_version_tag(*found.version.split("/"), signatures.TAG, signature)
    return found.version


def verify_version(reference: str, tracking_uri: str | None, trust: Trust) -> PolicyBundle:
    """The bundle of a registered version, which one of the trusted keys has signed.

    Raises:
        RegistryUnavailable: when the registry does not give it.
        BundleMismatch: when the bundle is not the one that was registered, or not signed as this version.
    """
    with _faults(reference):
        client = connect(tracking_uri)
        content = _download_verified(client, find(client, reference), reference, trust)
    return parse_bundle(content, reference)


def download(client: Any, run_id: str) -> bytes:
    """The bundle of a run, not verified; what is larger than any bundle is not read to its end.

    Raises:
        RegistryUnavailable: when it does not come in time.
        BundleMismatch: when it is larger than any policy bundle.
        Exception: those of MLflow's client.
    """
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
    from mlflow.store.artifact.http_artifact_repo import HttpArtifactRepository
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    uri = client.get_run(run_id).info.artifact_uri
    store: Any = get_artifact_repository(uri, tracking_uri=client.tracking_uri)
    try:
        if isinstance(store, HttpArtifactRepository):
            return _streamed(store.artifact_uri, client.tracking_uri)
        if isinstance(store, LocalArtifactRepository):
            return read_bounded(Path(store.artifact_dir) / BUNDLE_FILE, MAX_BYTES)
        # MLflow's client of another store writes a file of any size; the store itself says how large it is.
        sizes = {item.path: item.file_size for item in store.list_artifacts()}
        if (sizes.get(BUNDLE_FILE) or 0) > MAX_BYTES:
            raise TooLarge
        with tempfile.TemporaryDirectory(prefix="jevons-") as folder:
            return read_bounded(Path(store.download_artifacts(BUNDLE_FILE, folder)), MAX_BYTES)
    except TooLarge:
        raise BundleMismatch(f"the bundle of run {run_id}: larger than any policy bundle") from None


def _streamed(artifact_uri: str, tracking_uri: str) -> bytes:
    """The bundle below an address of MLflow's server, as its client asks for it, but within a size and a time.

    The run says the address, and whoever may write a run may name any: the login is for the registry's own server.
    """
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import MlflowHostCreds, http_request

    until_s = time.monotonic() + DOWNLOAD_S
    # Not compressed: the size is that of what is read.
    options: dict[str, Any] = {"stream": True, "extra_headers": {"Accept-Encoding": "identity"}}
    own = urlsplit(artifact_uri)[:2] == urlsplit(tracking_uri)[:2]
    credentials = get_default_host_creds(artifact_uri) if own else MlflowHostCreds(artifact_uri)
    answer: Any = http_request(credentials, f"/{BUNDLE_FILE}", "GET", **options)
    with answer as response:
        if response.status_code != 200:
            raise RegistryUnavailable(f"answers {response.status_code} where the bundle should be")
        content = bytearray()
        while part := response.raw.read1(PART_BYTES, decode_content=False):
            content += part
            if len(content) > MAX_BYTES:
                raise TooLarge
            if time.monotonic() > until_s:
                raise RegistryUnavailable(f"the bundle did not come within {DOWNLOAD_S:g} s")
    return bytes(content)


def _download_verified(client: Any, found: Registered, reference: str, trust: Trust) -> bytes:
    if trust:  # before anything is downloaded
        trust.readable(found.signature, reference)
        if found.digest is None:
            raise BundleMismatch(f"{reference}: {found.version} has no tag {DIGEST_TAG}, which names its bundle")
    content = download(client, found.run_id)
    _verify(content, found, reference, trust)
    return content


def _verify(content: bytes, found: Registered, where: str, trust: Trust) -> None:
    trust.check(content, found.signature, where, found.version)
    if found.digest not in (None, parse_bundle(content, where).digest):
        raise BundleMismatch(f"{where}: the stored bundle is not the one that was registered")


def _is_whole(kept: Path, found: Registered, trust: Trust) -> bool:
    """Whether a bundle that was fetched before is there, and still what it was: a disk may have damaged it."""
    try:
        _verify(read_bundle(kept), found, kept.name, trust)
    except BundleMismatch:
        return False
    return True


@contextmanager
def _faults(reference: str) -> Iterator[None]:
    """Every fault of a registry becomes `RegistryUnavailable`."""
    try:
        yield
    except BundleMismatch as error:
        raise BundleMismatch(str(error) if str(error).startswith(reference) else f"{reference}: {error}") from None
    except Exception as error:  # MLflow's client raises its own, requests', SQLAlchemy's and the file system's errors
        raise RegistryUnavailable(f"{reference}: {quoted(error)}") from error


def _pointer(reference: str) -> str:
    return f"{_plain(reference.removeprefix(REGISTRY_PREFIX))}.last"


def _plain(words: str) -> str:
    """Part of a file's name: what a registry answers leads into no other folder."""
    return "".join(letter if letter.isalnum() else "-" for letter in words)

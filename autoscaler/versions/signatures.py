"""Signatures of policy bundles: Ed25519 over the bytes and the version that they are, checked before they are read.

Whoever promotes a bundle signs it; a controller that has keys to trust runs nothing that they did not sign. The
signature of a file lies beside it (``policy.zip.sig``) and covers its bytes. That of a registered version is its tag
and covers its NAME/VERSION, too: whoever can write to the registry cannot give one version out as another.
This module must not know what is in a bundle.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from policies.atomic_files import write_text
from policies.bounded_files import read_bounded
from policies.engine import ConfigError
from policies.learned import BundleMismatch, parse_bundle, read_bundle
from policies.lineup import REGISTRY_PREFIX

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

TAG = "bundle_signature"
"""Of a registered version."""
MAX_KEY_BYTES = 10_000
"""Of a key or a signature."""


def signature_file(bundle: Path) -> Path:
    """Where a bundle's signature is."""
    return bundle.with_name(f"{bundle.name}.sig")


def make_keys(private: Path) -> Path:
    """Write a new private key, for its owner's eyes alone, and the public one beside it; the public one's path.

    Raises:
        OSError: when one of them is there, or cannot be written.
    """
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key, public = Ed25519PrivateKey.generate(), private.with_name(f"{private.name}.pub")
    secret = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    shared = key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    for path, content, mode in ((private, secret, 0o600), (public, shared, 0o644)):
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode), "wb") as file:
            file.write(content)
    return public


def signed_bytes(content: bytes, version: str | None = None) -> bytes:
    """What a signature is over: a line that says what for, then the version if it is one of a registry, the bundle.

    Args:
        content: the bundle.
        version: NAME/VERSION in the registry; None for a file.
    """
    purpose = "jevons policy bundle 1\n" if version is None else f"jevons policy version 1\n{version}\n"
    return purpose.encode() + content


def sign(content: bytes, key: Path, version: str | None = None) -> str:
    """The signature of a bundle's bytes, base64; as NAME/VERSION of a registry, or as a file.

    Raises:
        ConfigError: when the key file holds no private Ed25519 key.
    """
    return base64.b64encode(_private(key).sign(signed_bytes(content, version))).decode()


def sign_file(bundle: Path, key: Path) -> Path:
    """Write a bundle's signature beside it; its path.

    Raises:
        ConfigError: when the key file holds no private Ed25519 key.
        BundleMismatch: when the file is no bundle.
        OSError: when the signature cannot be written.
    """
    content = read_bundle(bundle)
    parse_bundle(content, str(bundle))  # what is no bundle is not signed
    write_text(signature_file(bundle), sign(content, key) + "\n")
    return signature_file(bundle)


class Trust:
    """The public keys of which one must have signed a bundle; with none, any bundle will do.

    Args:
        keys: PEM files.

    Raises:
        ConfigError: when a file holds no public Ed25519 key.
    """

    def __init__(self, keys: Sequence[Path] = ()) -> None:
        self._keys = [_public(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._keys)

    def check_of(self, bundle: Path, version: str | None = None) -> Callable[[bytes], None]:
        """What a file's bytes must pass before they are read, by the signature beside it: it raises `BundleMismatch`.

        Args:
            bundle: the file.
            version: NAME/VERSION where it is the copy of a registered one.
        """

        def check(content: bytes) -> None:
            if self:
                try:
                    signature = read_bounded(signature_file(bundle), MAX_KEY_BYTES).decode()
                except (OSError, ValueError):
                    signature = ""
                self.check(content, signature, str(bundle), version)

        return check

    def check(self, content: bytes, signature: str, where: str, version: str | None = None) -> None:
        """Refuse bytes that none of the keys has signed.

        Args:
            content: the bundle.
            signature: base64.
            where: names the bundle in errors.
            version: NAME/VERSION in the registry; None for a file.

        Raises:
            BundleMismatch: when there are keys, and none of them has signed the bundle as what it is given out for.
        """
        if not self:
            return
        raw = self.readable(signature, where)
        if self._signed(raw, signed_bytes(content, version)):
            return
        if version is not None and self._signed(raw, signed_bytes(content)):
            raise BundleMismatch(
                f"{where}: its signature does not say that it is {version}, as those made by earlier Jevons; sign it "
                f"again with `jevons bundle sign {REGISTRY_PREFIX}{version} --key KEY`"
            )
        as_what = "" if version is None else f" as {version}"
        raise BundleMismatch(f"{where}: signed{as_what} by none of the trusted keys, or altered since")

    def readable(self, signature: str, where: str) -> bytes:
        """The bytes of a signature.

        Raises:
            BundleMismatch: when there are keys, and this is none.
        """
        try:
            raw = base64.b64decode(signature.strip(), validate=True)
        except ValueError:
            raw = b""
        if self and not raw:
            raise BundleMismatch(f"{where}: has no signature that can be read; one of the trusted keys must sign it")
        return raw

    def _signed(self, signature: bytes, message: bytes) -> bool:
        from cryptography.exceptions import InvalidSignature

        for key in self._keys:
            try:
                key.verify(signature, message)
            except InvalidSignature:
                continue
            return True
        return False


def _public(path: Path) -> Ed25519PublicKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    content = _read(path)
    try:
        key = load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError(f"{path}: expected a public Ed25519 key, PEM") from None
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"{path}: expected a public Ed25519 key, PEM")
    return key


def _private(path: Path) -> Ed25519PrivateKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    content = _read(path)
    try:
        key = load_pem_private_key(content, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ConfigError(f"{path}: expected a private Ed25519 key, PEM, without a passphrase") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{path}: expected a private Ed25519 key, PEM, without a passphrase")
    return key


def _read(path: Path) -> bytes:
    try:
        return read_bounded(path, MAX_KEY_BYTES)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None

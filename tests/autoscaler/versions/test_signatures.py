"""A controller that trusts keys runs no bundle that they have not signed, and reads none before it knows."""

from __future__ import annotations

import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from command_line import call, refusal
from live_fakes import live_config, service_spec

from autoscaler.hosting.config import LiveConfig
from autoscaler.versions.follower import PolicyConfig, PolicyFollower
from autoscaler.versions.signatures import Trust, make_keys, sign, sign_file, signature_file
from policies.engine import ConfigError
from policies.fleet import Fleet
from policies.learned import BundleMismatch, load_bundle
from policies.lineup import SHIPPED_BUNDLE


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copy(SHIPPED_BUNDLE, tmp_path / "policy.zip"))


@pytest.fixture
def key(tmp_path: Path) -> Path:
    make_keys(tmp_path / "release")
    return tmp_path / "release"


def public(key: Path) -> Path:
    return key.with_name(f"{key.name}.pub")


def test_a_signed_bundle_is_read_and_any_change_of_it_is_refused(bundle: Path, key: Path) -> None:
    sign_file(bundle, key)
    trust = Trust([public(key)])
    assert load_bundle(bundle, trust.check_of(bundle)).digest == load_bundle(bundle).digest
    content = bundle.read_bytes()
    for place in (0, len(content) // 2, len(content) - 1):
        bundle.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(BundleMismatch, match="signed by none of the trusted keys, or altered since"):
            load_bundle(bundle, trust.check_of(bundle))


def test_one_of_several_keys_will_do_and_another_will_not(tmp_path: Path, bundle: Path, key: Path) -> None:
    make_keys(tmp_path / "other")
    sign_file(bundle, key)
    both = Trust([tmp_path / "other.pub", public(key)])
    load_bundle(bundle, both.check_of(bundle))
    other = Trust([tmp_path / "other.pub"])
    with pytest.raises(BundleMismatch, match="signed by none"):
        load_bundle(bundle, other.check_of(bundle))


@pytest.mark.parametrize("signature", [None, b"", b"no base64!", b"AAAA", b"\xff" * 100])
def test_a_bundle_without_a_signature_is_not_even_opened(bundle: Path, key: Path, signature: bytes | None) -> None:
    bundle.write_bytes(b"no archive")  # which is never found out
    if signature is not None:
        signature_file(bundle).write_bytes(signature)
    with pytest.raises(BundleMismatch, match=r"no signature that can be read|signed by none"):
        load_bundle(bundle, Trust([public(key)]).check_of(bundle))


VERSION = "jevons-policy/7"


@pytest.mark.parametrize("signed_as", ["retired/7", "jevons-policy/6", "jevons-policy/70", "jevons-policy", "", None])
def test_a_signature_of_anything_else_does_not_fit_a_version(bundle: Path, key: Path, signed_as: str | None) -> None:
    content, trust = bundle.read_bytes(), Trust([public(key)])
    trust.check(content, sign(content, key, VERSION), "it", VERSION)
    with pytest.raises(BundleMismatch, match=r"^it: (signed as jevons-policy/7 by none|its signature does not say)"):
        trust.check(content, sign(content, key, signed_as), "it", VERSION)


def test_a_signature_of_a_version_does_not_fit_a_file(bundle: Path, key: Path) -> None:
    content = bundle.read_bytes()
    with pytest.raises(BundleMismatch, match="signed by none"):
        Trust([public(key)]).check(content, sign(content, key, VERSION), "it")


def test_a_version_that_was_signed_before_signatures_named_it_says_how_to_sign_it(bundle: Path, key: Path) -> None:
    content = bundle.read_bytes()
    with pytest.raises(BundleMismatch) as refused:
        Trust([public(key)]).check(content, sign(content, key), "it", VERSION)
    assert str(refused.value) == (
        "it: its signature does not say that it is jevons-policy/7, as those made by earlier Jevons; sign it again "
        "with `jevons bundle sign models:/jevons-policy/7 --key KEY`"
    )


def follower(reference: str, *keys: Path) -> PolicyFollower:
    spec = service_spec()
    config = PolicyConfig(reference=reference, trusted_keys=keys)
    return PolicyFollower(reference, config, Fleet.from_specs([spec]), spec.interface)


def test_a_controller_takes_signed_bundles_and_the_shipped_one(bundle: Path, key: Path) -> None:
    unsigned = follower(str(bundle), public(key))
    unsigned.look()
    assert unsigned.take() is None
    assert "no signature that can be read" in unsigned.problem
    sign_file(bundle, key)
    for reference in (str(bundle), "learned"):
        trusting = follower(reference, public(key))
        trusting.look()
        assert (trusting.take() is not None, trusting.problem) == (True, "")


def test_bundles_beside_the_policy_are_refused_where_signatures_are_asked_for(tmp_path: Path, key: Path) -> None:
    policy = {"reference": "learned", "trusted_keys": [public(key)]}
    for other in ("other.zip", "other.zip+self", "other.zip:first_price=6", "models:/chat/3+self"):
        sentence = re.escape(f"{other!r} is a bundle whose signature nobody checks")
        for field in ({"counterfactuals": (other,)}, {"fallback": other}):
            with pytest.raises(ValueError, match=sentence):
                live_config(tmp_path, policy=policy, **field)
    loaded: LiveConfig = live_config(tmp_path, policy={**policy, "trusted_keys": ["keys/a.pub"]})
    assert loaded.located(tmp_path).policy.trusted_keys == (tmp_path / "keys/a.pub",)


@pytest.mark.parametrize("behind", ["+self", ":first_price=6", "+self:first_price=6"])
@pytest.mark.parametrize("bundle", ["other.zip", "models:/chat@champion", "models:/chat/3"])
def test_a_bundle_that_nobody_would_follow_and_check_is_refused(tmp_path: Path, bundle: str, behind: str) -> None:
    with pytest.raises(ValueError, match="a bundle takes neither parameters nor"):
        live_config(tmp_path, policy={"reference": f"{bundle}{behind}"})
    assert live_config(tmp_path, policy={"reference": f"learned{behind}"}).policy.reference == f"learned{behind}"


def test_keys_are_for_their_owner_and_are_never_replaced(key: Path) -> None:
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        make_keys(key)


@pytest.mark.parametrize("content", [b"", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", bytes(99)])
def test_a_key_that_is_none_is_one_sentence(tmp_path: Path, bundle: Path, content: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="key: expected a public Ed25519 key, PEM"):
        Trust([path])
    with pytest.raises(ConfigError, match="key: expected a private Ed25519 key"):
        sign_file(bundle, path)
    with pytest.raises(ConfigError, match="nowhere: cannot be read: No such file"):
        Trust([tmp_path / "nowhere"])


def test_openssl_verifies_what_jevons_signs(tmp_path: Path, bundle: Path, key: Path) -> None:
    """The format is nobody's own: Ed25519 over a line and the bytes, base64."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not here")
    sign_file(bundle, key)
    (tmp_path / "signed").write_bytes(b"jevons policy bundle 1\n" + bundle.read_bytes())
    raw = subprocess.run(["base64", "-d", signature_file(bundle)], capture_output=True, check=True).stdout
    (tmp_path / "raw").write_bytes(raw)
    words = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", public(key), "-rawin"]
    words += ["-in", tmp_path / "signed", "-sigfile", tmp_path / "raw"]
    assert "Verified Successfully" in subprocess.run(words, capture_output=True, text=True, check=True).stdout


def test_the_commands_make_keys_sign_and_verify(tmp_path: Path, bundle: Path) -> None:
    assert call("bundle", "keys", tmp_path / "k").exit_code == 0
    assert call("bundle", "sign", bundle, "--key", tmp_path / "k").exit_code == 0
    found = call("bundle", "verify", bundle, "--key", tmp_path / "k.pub")
    assert (found.exit_code, load_bundle(bundle).digest in found.stdout) == (0, True)
    assert call("bundle", "keys", tmp_path / "other").exit_code == 0
    assert "signed by none" in refusal("bundle", "verify", bundle, "--key", tmp_path / "other.pub")
    assert "File exists" in refusal("bundle", "keys", tmp_path / "k")
    (tmp_path / "no.zip").write_bytes(b"no")
    assert "not a readable policy bundle" in refusal("bundle", "sign", tmp_path / "no.zip", "--key", tmp_path / "k")

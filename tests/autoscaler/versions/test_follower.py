"""The acting policy through its life, against an embedded MLflow registry."""

from __future__ import annotations

import errno
import json
import stat
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import call, refusal
from live_fakes import LiveWorld, burst, live_config, service_spec

from autoscaler.versions.follower import PolicyConfig, PolicyFollower, Version, warmed
from autoscaler.versions.probation import Probation, RollbackSpec
from autoscaler.versions.registry import BUNDLE_FILE
from autoscaler.versions.signatures import TAG, Trust, make_keys, sign
from policies.atomic_files import write_text
from policies.contract import Decision, Outcome, Reason, Target
from policies.fleet import Fleet
from policies.learned import load_bundle, write_bundle
from policies.lineup import SHIPPED_BUNDLE
from policies.secret_url import Url
from policies.spec import InterfaceSpec
from training.versions.registry import register
from training.versions.tracking import connect, experiment_id

NAME = "live"


class Registry:
    """An embedded store; every version is the shipped bundle under another provenance."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.uri = f"sqlite:///{folder / 'mlflow.db'}"
        self.client = connect(self.uri)
        self.versions: list[str] = []

    def add(self, champion: bool = True) -> str:
        """Register a version; its digest."""
        shipped = load_bundle(SHIPPED_BUNDLE)
        manifest = shipped.manifest.model_copy(update={"provenance": {"version": len(self.versions)}})
        path = self.folder / f"v{len(self.versions)}" / BUNDLE_FILE
        digest = write_bundle(path, manifest, shipped.weights)
        run = self.client.create_run(experiment_id(self.client)).info.run_id
        self.client.log_artifact(run, str(path))
        version = register(self.client, NAME, run, digest)
        self.versions.append(version)
        if champion:
            self.client.set_registered_model_alias(NAME, "champion", version)
        return digest

    def stored(self, version: str) -> Path:
        run = self.client.get_model_version(NAME, version).run_id
        return Path(self.client.get_run(run).info.artifact_uri.removeprefix("file://")) / BUNDLE_FILE


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return Registry(tmp_path_factory.mktemp("registry"))


def follower(store: Registry, cache: Path, uri: str | None = None) -> PolicyFollower:
    config = PolicyConfig(reference=f"models:/{NAME}@champion", tracking_uri=uri or store.uri, cache=cache)
    return PolicyFollower(config.reference, config, Fleet.from_specs([service_spec()]), InterfaceSpec())


def digest_of(version: Version | None) -> str:
    assert version is not None
    return version.digest


def test_the_alias_is_followed_and_each_version_is_offered_once(store: Registry, tmp_path: Path) -> None:
    first = store.add()
    own = follower(store, tmp_path)
    own.look()
    version = own.take()
    assert digest_of(version) == first
    own.look()
    assert own.take() is None
    second = store.add()
    own.look()
    assert digest_of(own.take()) == second
    assert own.problem == ""


def test_a_disk_that_is_full_once_is_said_and_the_next_look_goes_on(
    store: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add()
    own, written = follower(store, tmp_path), []

    def full_once(path: Path, text: str) -> None:
        written.append(path)
        if len(written) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_text(path, text)

    monkeypatch.setattr("autoscaler.versions.registry.write_text", full_once)
    own.look()
    assert "No space left on device" in own.problem
    assert own.take() is None
    own.look()
    assert own.problem == ""
    assert own.take() is not None


@pytest.mark.plays("a background thread fails")
def test_the_thread_that_looks_survives_what_nobody_foresaw(
    store: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add()
    own, locate, seen = follower(store, tmp_path), PolicyFollower._locate, threading.Event()

    def broken_once(this: PolicyFollower) -> tuple[str, Path]:
        if own.thread.restarts == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        assert "No space left on device" in own.thread.problem
        seen.set()
        return locate(this)

    monkeypatch.setattr(PolicyFollower, "_locate", broken_once)
    own.thread.start()
    assert seen.wait(60.0)
    own.thread.stop(60.0)
    assert own.take() is not None


@pytest.mark.plays("MLflow down")
def test_with_the_registry_down_what_is_loaded_goes_on_even_over_a_restart(store: Registry, tmp_path: Path) -> None:
    expected = store.add()
    own = follower(store, tmp_path)
    own.look()
    assert digest_of(own.take()) == expected
    own._config = own._config.model_copy(update={"tracking_uri": Url(f"sqlite:///{tmp_path}/no/where.db")})
    own.look()
    assert own.take() is None
    assert "models:/live@champion" in own.problem
    restarted = follower(store, tmp_path, uri=f"sqlite:///{tmp_path}/no/where.db")
    restarted.look()
    assert digest_of(restarted.take()) == expected


@pytest.mark.plays("corrupt bundle")
@pytest.mark.parametrize("damage", ["altered", "truncated", "empty", "another"])
def test_a_kept_copy_that_is_damaged_is_fetched_again(store: Registry, tmp_path: Path, damage: str) -> None:
    store.add()
    expected = store.add()
    own = follower(store, tmp_path / "cache")
    own.look()
    assert digest_of(own.take()) == expected
    (kept,) = (tmp_path / "cache").glob("*.zip")
    whole = kept.read_bytes()
    middle = len(whole) // 2
    other = store.stored(store.versions[0]).read_bytes()
    changed = {
        "altered": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        "truncated": whole[:middle],
        "empty": b"",
        "another": other,
    }
    kept.write_bytes(changed[damage])
    own.look()
    assert (own.problem, kept.read_bytes() == whole) == ("", True)
    kept.write_bytes(changed[damage])
    restarted = follower(store, tmp_path / "cache")
    restarted.look()
    assert (restarted.problem, digest_of(restarted.take())) == ("", expected)


@pytest.mark.plays("corrupt bundle")
def test_a_bundle_that_was_altered_in_the_store_is_refused_and_the_last_one_stays(
    store: Registry, tmp_path: Path
) -> None:
    good = store.add()
    own = follower(store, tmp_path)
    own.look()
    assert digest_of(own.take()) == good
    store.add()
    path = store.stored(store.versions[-1])
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    own.look()
    assert own.take() is None
    assert "truncated or altered" in own.problem
    assert follower(store, tmp_path / "empty").take() is None


def test_the_signature_of_a_version_is_its_tag_and_is_kept_with_the_bundle(store: Registry, tmp_path: Path) -> None:
    make_keys(tmp_path / "key")

    def trusting(uri: str) -> PolicyFollower:
        own = follower(store, tmp_path / "cache", uri)
        own._trust = Trust([tmp_path / "key.pub"])
        own.look()
        return own

    expected = store.add()
    unsigned = trusting(store.uri)
    assert unsigned.take() is None
    assert "no signature that can be read" in unsigned.problem
    version = store.versions[-1]
    signature = sign(store.stored(version).read_bytes(), tmp_path / "key", f"{NAME}/{version}")
    store.client.set_model_version_tag(NAME, version, TAG, signature)
    assert digest_of(trusting(store.uri).take()) == expected
    assert digest_of(trusting(f"sqlite:///{tmp_path}/no/where.db").take()) == expected


def test_a_signature_that_is_put_on_another_version_brings_nothing_back(store: Registry, tmp_path: Path) -> None:
    """An attacker may write to the registry and has no key; an operator may move the alias back to what was signed."""
    make_keys(tmp_path / "key")
    own = follower(store, tmp_path / "cache")
    own._trust = Trust([tmp_path / "key.pub"])
    withdrawn = store.add(champion=False)
    old = store.client.get_model_version(NAME, store.versions[-1])
    signature = sign(store.stored(old.version).read_bytes(), tmp_path / "key", f"{NAME}/{old.version}")
    store.client.set_model_version_tag(NAME, old.version, TAG, signature)
    tags = {TAG: signature, "bundle_digest": withdrawn}
    for name in (NAME, "another-model"):
        if name != NAME:
            store.client.create_registered_model(name)
        replayed = store.client.create_model_version(name, old.source, old.run_id, tags=tags)
        store.client.set_registered_model_alias(name, "champion", replayed.version)
        own.reference = f"models:/{name}@champion"
        own.look()
        assert own.take() is None
        assert f"signed as {name}/{replayed.version} by none of the trusted keys" in own.problem
    store.client.set_registered_model_alias(NAME, "champion", old.version)
    own.reference = f"models:/{NAME}@champion"
    own.look()
    assert (digest_of(own.take()), own.problem) == (withdrawn, "")


def test_a_signed_version_without_a_digest_is_refused(store: Registry, tmp_path: Path) -> None:
    make_keys(tmp_path / "key")
    own = follower(store, tmp_path / "cache")
    own._trust = Trust([tmp_path / "key.pub"])
    store.add()
    version = store.versions[-1]
    signature = sign(store.stored(version).read_bytes(), tmp_path / "key", f"{NAME}/{version}")
    store.client.set_model_version_tag(NAME, version, TAG, signature)
    store.client.delete_model_version_tag(NAME, version, "bundle_digest")
    own.look()
    assert own.take() is None
    assert own.problem == f"models:/{NAME}@champion: {NAME}/{version} has no tag bundle_digest, which names its bundle"


def test_a_kept_copy_is_not_given_out_as_another_version(store: Registry, tmp_path: Path) -> None:
    make_keys(tmp_path / "key")
    expected = store.add()
    version, nowhere = store.versions[-1], f"sqlite:///{tmp_path}/no/where.db"
    signature = sign(store.stored(version).read_bytes(), tmp_path / "key", f"{NAME}/{version}")
    store.client.set_model_version_tag(NAME, version, TAG, signature)

    def restarted(uri: str) -> PolicyFollower:
        own = follower(store, tmp_path / "cache", uri)
        own._trust = Trust([tmp_path / "key.pub"])
        own.look()
        return own

    assert digest_of(restarted(store.uri).take()) == expected
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700
    pointer = tmp_path / "cache" / f"{NAME}-champion.last"
    written = pointer.read_text()
    for other, why in ((f"{NAME}/9999", "signed as live/9999 by none"), ("another/1", "")):
        pointer.write_text(written.replace(f"{NAME}/{version}", other))
        own = restarted(nowhere)
        assert own.take() is None
        assert why in own.problem
    pointer.write_text(written)
    assert digest_of(restarted(nowhere).take()) == expected


def test_a_kept_copy_that_was_damaged_is_fetched_again(store: Registry, tmp_path: Path) -> None:
    expected = store.add()
    follower(store, tmp_path).look()
    (kept,) = tmp_path.glob("*.zip")
    kept.write_bytes(b"damaged")
    own = follower(store, tmp_path)
    own.look()
    assert (digest_of(own.take()), own.problem) == (expected, "")


def test_the_commands_sign_and_verify_a_version(store: Registry, tmp_path: Path) -> None:
    make_keys(tmp_path / "key")
    digest = store.add()
    reference = f"models:/{NAME}/{store.versions[-1]}"
    verify = ("bundle", "verify", reference, "--key", tmp_path / "key.pub", "--tracking-uri", store.uri)
    assert "no signature that can be read" in refusal(*verify)
    assert call("bundle", "sign", reference, "--key", tmp_path / "key", "--tracking-uri", store.uri).exit_code == 0
    assert digest in call(*verify).stdout
    own = follower(store, tmp_path / "cache")
    own._trust = Trust([tmp_path / "key.pub"])
    own.look()
    assert (digest_of(own.take()), own.problem) == (digest, "")
    assert "models:/none/1" in refusal("bundle", "verify", "models:/none/1", *verify[3:])


def test_another_bundle_than_the_registered_one_is_refused(store: Registry, tmp_path: Path) -> None:
    store.add()
    earlier = store.stored(store.versions[0]).read_bytes()
    store.stored(store.versions[-1]).write_bytes(earlier)
    own = follower(store, tmp_path)
    own.look()
    assert own.take() is None
    assert "not the one that was registered" in own.problem
    store.add()


def test_a_bundle_for_another_interface_is_refused(store: Registry, tmp_path: Path) -> None:
    config = PolicyConfig(reference="learned", cache=tmp_path)
    spec = service_spec()
    interface = InterfaceSpec.model_validate({"window": {"control_interval_s": 20.0}})
    own = PolicyFollower("learned", config, Fleet.from_specs([spec]), interface)
    own.look()
    assert own.take() is None
    assert own.problem.endswith("trained for a decision every 15 s, but control_interval_s is 20 s")


# In the loop


def live(store: Registry, folder: Path, **policy: Any) -> tuple[LiveWorld, Any]:
    world = LiveWorld([service_spec()], [burst(peak_rps=4.0)])
    reference = {"reference": f"models:/{NAME}@champion", "tracking_uri": store.uri, "cache": folder / "cache"}
    return world, world.service(live_config(folder, policy={**reference, **policy}))


def test_a_new_champion_decides_from_the_next_tick_on(store: Registry, tmp_path: Path) -> None:
    first = store.add()
    world, service = live(store, tmp_path)
    world.run(service, 3)
    assert service.lifecycle.version.endswith(first[:12])
    second = store.add()
    service.lifecycle.champion.look()
    world.run(service, 2)
    assert service.lifecycle.version.endswith(second[:12])
    assert [event.split(" ")[-1] for event in service.lifecycle.events] == ["on", "on"]
    service.close()


def test_a_worse_policy_is_taken_back_and_not_taken_again(store: Registry, tmp_path: Path) -> None:
    first = store.add()
    rollback = {"min_requests": 200, "watch_s": 1200.0, "attainment_loss": 0.05}
    world, service = live(store, tmp_path, rollback=rollback)
    world.run(service, 12)
    second = store.add()
    service.lifecycle.champion.look()
    service.lifecycle.before_tick()
    bad = service.ladder.learned
    assert bad.bundle.digest == second

    # It asks for one replica with a batch of four, whatever comes.
    bad.propose = lambda observation: Target(np.array([[1]]), np.array([[4]]))
    decisions = world.run(service, 30)
    assert service.ladder.learned.bundle.digest == first
    assert any("rolled back" in event for event in service.lifecycle.events)
    service.lifecycle.champion.look()
    world.run(service, 2)
    assert service.ladder.learned.bundle.digest == first
    assert all(isinstance(decision, Decision) for decision in decisions)
    service.close()


def test_a_challenger_runs_in_the_shadow(store: Registry, tmp_path: Path) -> None:
    store.add()
    world, service = live(store, tmp_path, challenger=f"models:/{NAME}@challenger")
    (decision,) = world.run(service, 1)
    assert decision.details["peer challenger/replicas"].shape == (1, 1)
    assert any("shadow" in event for event in service.lifecycle.events)
    service.close()


def test_without_any_usable_bundle_the_baseline_decides_and_says_so(tmp_path: Path) -> None:
    bad = tmp_path / "bad.zip"
    bad.write_bytes(b"PK\x03\x04 not a bundle")
    world = LiveWorld([service_spec()], [burst(peak_rps=4.0)])
    service = world.service(live_config(tmp_path, policy={"reference": str(bad), "cache": tmp_path / "cache"}))
    (decision,) = world.run(service, 1)
    assert Reason.BUNDLE_REFUSED in Reason(int(decision.reasons[0]))
    assert Outcome(int(decision.outcome[0])) in {Outcome.SCALED, Outcome.UNCHANGED}
    assert any("not a readable policy bundle" in problem for problem in service.status()["problems"])
    json.dumps(service.status())
    service.close()


def test_probation_waits_for_enough_requests_and_names_what_got_worse() -> None:
    world = LiveWorld([service_spec()], [burst(peak_rps=4.0)])
    world.cluster.wait_until(15.0)
    snapshot = world.cluster.read()

    def window(attained: float, requests: float) -> Decision:
        values = {name: getattr(snapshot, name) for name in type(snapshot).__dataclass_fields__}
        values |= {"ttft_attainment": np.array([attained]), "tpot_attainment": np.ones(1)}
        values |= {"finished_rps": np.array([requests / 15.0]), "window_s": np.array([15.0])}
        none = Target(np.zeros((1, 1), np.int64), np.ones((1, 1), np.int64))
        return Decision(type(snapshot)(**values), none, none, np.zeros(1, np.int64), np.zeros(1, np.int64), "p")

    def run(attained: float, usd: float) -> list[str]:
        probation = Probation(RollbackSpec(min_requests=100, watch_s=600.0))
        rate = np.ones((1, 1))
        for _ in range(20):
            assert probation.add(window(0.99, 10.0), rate, rate) == ""
        probation.begin()
        return [probation.add(window(attained, 20.0), usd * rate, rate) for _ in range(8)]

    assert run(0.99, 1.0) == [""] * 8
    assert [bool(verdict) for verdict in run(0.90, 1.0)][:5] == [False, False, False, False, True]
    assert "attainment fell from 99.0% to 90.0%" in run(0.90, 1.0)
    assert "cost per token rose to 1.50 times" in run(0.99, 1.5)


def test_warming_refuses_what_cannot_run() -> None:
    fleet = Fleet.from_specs([service_spec()])
    assert warmed(load_bundle(SHIPPED_BUNDLE), fleet, InterfaceSpec()).bundle.source


def test_known_prices_reach_every_policy_that_is_loaded(tmp_path: Path) -> None:
    fleet = Fleet.from_specs([service_spec(), service_spec()])
    own = PolicyFollower("learned", PolicyConfig(cache=tmp_path), fleet, InterfaceSpec(), np.array([np.nan, 3.0]))
    own.look()
    version = own.take()
    assert version is not None
    first, second = np.exp(version.policy._dial.log_price).tolist()
    assert second == pytest.approx(3.0) != pytest.approx(first)

"""Versions of a learned policy: found under an alias or in a file, loaded and warmed.

The registry is asked in a thread of its own. While MLflow is down, even over a restart, the controller goes on with
what it has.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field, model_validator

from autoscaler.background import Background
from autoscaler.versions.probation import RollbackSpec
from autoscaler.versions.registry import RegistryUnavailable, fetch, kept_bundle
from autoscaler.versions.signatures import Trust
from policies.contract import Floats
from policies.engine import ConfigError, Positive, StrictModel
from policies.fleet import Fleet
from policies.learned import BundleMismatch, LearnedPolicy, PolicyBundle, load_bundle, mismatch
from policies.lineup import REGISTRY_PREFIX, SELF, SHIPPED_BUNDLE, names_bundle
from policies.observation import FEATURES
from policies.secret_url import Url
from policies.spec import InterfaceSpec

WARM_ROWS = (1, 64)
STUCK_S = 120.0
"""A look that takes longer, for a download or a network that does not come to an end, is named."""


class PolicyConfig(StrictModel):
    """What proposes targets."""

    reference: Annotated[str, Field(min_length=1)] = Field(
        default="learned",
        description="`learned` for the shipped bundle, a bundle file, models:/NAME@ALIAS, or a rule such as hpa.",
    )
    first_prices: dict[str, Positive] = Field(
        default={},
        description="Of services with a recording: the price of a miss to begin with, see docs/evaluation.md.",
    )
    challenger: str | None = Field(
        default=None, description="A second models:/NAME@ALIAS that runs in the shadow; its targets are recorded."
    )
    tracking_uri: Url | None = Field(
        default=None, description="MLflow; the environment's MLFLOW_TRACKING_URI if unset."
    )
    trusted_keys: tuple[Path, ...] = Field(
        default=(),
        description="Public keys (PEM, Ed25519) of which one must have signed every bundle but the shipped one; with "
        "none, signatures are not asked for.",
    )
    poll_s: Positive = Field(default=30.0, description="Time between two looks at the registry, seconds.")
    cache: Path = Field(default=Path("runs/live/policies"), description="Folder that keeps the last bundles.")
    rollback: RollbackSpec = Field(default=RollbackSpec(), description="When a new policy is taken back.")

    @model_validator(mode="after")
    def _bundles_are_followed(self) -> PolicyConfig:
        # What is followed is checked, signature and all; with parameters it would be a rule, loaded once by nobody.
        if names_bundle(self.reference) and not is_learned(self):
            raise ValueError(
                f"reference {self.reference!r}: expected a rule, `learned`, a bundle file that ends in .zip or models:/"
                "NAME@ALIAS; a bundle takes neither parameters nor +self here, but see first_prices"
            )
        return self


@dataclass(frozen=True, eq=False)
class Version:
    """A policy that is ready to decide.

    Attributes:
        label: version in the registry, or the file.
        policy: warmed.
    """

    label: str
    policy: LearnedPolicy

    @property
    def digest(self) -> str:
        """SHA-256 of the bundle."""
        return self.policy.bundle.digest


def warmed(
    bundle: PolicyBundle, fleet: Fleet, interface: InterfaceSpec, first_price: Floats | None = None
) -> LearnedPolicy:
    """The policy of a bundle, checked against the interface and run once, so that its first tick is not slow.

    Raises:
        BundleMismatch: when it does not fit, or cannot be run.
    """
    policy = LearnedPolicy(bundle, fleet, interface, first_price)
    for rows in WARM_ROWS:
        policy.outputs(np.zeros((rows, len(FEATURES)), np.float32))
    return policy


def refuse_untrained(config: PolicyConfig, interface: InterfaceSpec, fallback: str) -> None:
    """Refuse a bundle that was trained at another interval than it is to decide at; the baseline would in its place.

    A bundle of a registry is looked at when it has been fetched, and one that cannot be read is a problem of its own.

    Args:
        config: what proposes targets.
        interface: what the controller encodes and decodes.
        fallback: the rule to name instead.

    Raises:
        ConfigError: naming both intervals and the rule.
    """
    if not is_learned(config) or config.reference.startswith(REGISTRY_PREFIX):
        return
    path = _bundle_file(config.reference)
    try:
        trained = load_bundle(path, _trust(config, config.reference).check_of(path)).manifest.interface
    except BundleMismatch:
        return
    differs = mismatch(trained, interface)
    if differs:
        raise ConfigError(
            f"policy.reference {config.reference!r}: {differs}; set policy.reference to a rule, such as {fallback}"
        )


def _bundle_file(reference: str) -> Path:
    return SHIPPED_BUNDLE if reference == "learned" else Path(reference)


def _trust(config: PolicyConfig, reference: str) -> Trust:
    """Who must have signed a bundle; the shipped one is part of Jevons."""
    return Trust(() if reference == "learned" else config.trusted_keys)


class PolicyFollower:
    """Keeps the policy that one reference names ready, and hands a new one over when it is asked between ticks.

    Args:
        reference: `learned`, a bundle file, or `models:/...`.
        config: where and how often to look.
        fleet: the services.
        interface: what this controller encodes and decodes.
        first_price: of a miss (n,), NaN where none is known; None: nowhere.

    Raises:
        ConfigError: when a trusted key cannot be read.
    """

    def __init__(
        self,
        reference: str,
        config: PolicyConfig,
        fleet: Fleet,
        interface: InterfaceSpec,
        first_price: Floats | None = None,
    ) -> None:
        self.reference = reference
        self.problem = ""
        """What went wrong at the last look, empty when nothing did."""
        self._config = config
        self._fleet = fleet
        self._interface = interface
        self._first_price = first_price
        self._trust = _trust(config, reference)
        self._lock = threading.Lock()
        self._ready: Version | None = None
        self._loaded: str | None = None
        self._refused: set[str] = set()
        self.looked = threading.Event()
        """Set once the first look has ended, however it went."""
        self.thread = Background(
            f"policy {reference}",
            self.look,
            config.poll_s if reference.startswith(REGISTRY_PREFIX) else None,
            stuck_s=STUCK_S,
        )
        """What looks, once it has been started; where the reference cannot change its meaning, it looks once."""

    def look(self) -> None:
        """One look: load what the reference names now, if that is new. Faults are kept in `problem`."""
        try:
            label, path = self._locate()
            bundle = self._load(label, path)
            if bundle.digest not in self._refused and bundle.digest != self._loaded:
                version = Version(label, self._warmed(bundle))
                with self._lock:
                    self._ready, self._loaded = version, bundle.digest
            self.problem = ""
        except (BundleMismatch, RegistryUnavailable) as error:
            self.problem = str(error)
            self._fall_back_on_kept()
        finally:
            self.looked.set()

    def take(self) -> Version | None:
        """A new version, once; None when there is none. Never waits."""
        with self._lock:
            version, self._ready = self._ready, None
        return version

    def refuse(self, digest: str) -> None:
        """Do not offer this bundle again until the reference names another one."""
        self._refused.add(digest)

    def _locate(self) -> tuple[str, Path]:
        if self.reference.startswith(REGISTRY_PREFIX):
            return fetch(self.reference, self._tracking_uri(), self._config.cache, self._trust)
        path = _bundle_file(self.reference)
        return path.name, path

    def _load(self, label: str, path: Path) -> PolicyBundle:
        """What `_locate` found, once more checked: between two looks somebody may have written to the folder."""
        registered = self.reference.startswith(REGISTRY_PREFIX)
        return load_bundle(path, self._trust.check_of(path, label if registered else None))

    def _tracking_uri(self) -> str | None:
        uri = self._config.tracking_uri
        try:
            return None if uri is None else uri.reveal()
        except ValueError as error:
            raise RegistryUnavailable(f"policy.tracking_uri {error}") from None

    def _warmed(self, bundle: PolicyBundle) -> LearnedPolicy:
        return warmed(bundle, self._fleet, self._interface, self._first_price)

    def _fall_back_on_kept(self) -> None:
        """At the start, with the registry down: the bundle of the last run."""
        kept = kept_bundle(self.reference, self._config.cache)
        if self._loaded is not None or kept is None:
            return
        try:
            bundle = self._load(*kept)
            version = Version(kept[0], self._warmed(bundle))
        except BundleMismatch as error:
            self.problem = f"{self.problem}; the kept copy: {error}"
            return
        with self._lock:
            self._ready, self._loaded = version, bundle.digest


def is_learned(config: PolicyConfig) -> bool:
    """Whether the reference names a bundle rather than a rule."""
    reference = config.reference
    if reference.startswith(REGISTRY_PREFIX):
        return reference.count(":") == 1 and not reference.endswith(SELF)
    return reference == "learned" or reference.endswith(".zip")

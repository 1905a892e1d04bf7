"""Versions of a learned policy: found under an alias or in a file, loaded and warmed, and watched on probation.

The registry is asked in a thread of its own, and what it gave last is kept on the disk: while MLflow is down, even over
a restart, the controller goes on with what it has. This is the only live module that imports MLflow.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from policies.contract import Decision, Floats
from policies.engine import NonNegative, Positive, StrictModel
from policies.fleet import Fleet
from policies.learned import BundleMismatch, LearnedPolicy, PolicyBundle, load_bundle
from policies.lineup import REGISTRY_PREFIX, SHIPPED_BUNDLE
from policies.observation import FEATURES
from policies.pool_arrays import nan_to_num
from policies.spec import InterfaceSpec, Share

BUNDLE_FILE = "policy.zip"
WARM_ROWS = (1, 64)


class RollbackSpec(StrictModel):
    """When an exchanged policy gives way to the one before it."""

    watch_s: NonNegative = Field(
        default=1800.0, description="A new policy is compared with the one before for this long, seconds; 0 never."
    )
    min_requests: int = Field(default=500, ge=1, description="Finished requests on both sides before it is judged.")
    attainment_loss: Share = Field(default=0.02, description="Attainment that it may lose, absolute.")
    cost_ratio: Positive = Field(default=1.25, description="Cost per token that it may reach, as a ratio.")


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
    tracking_uri: str | None = Field(
        default=None, description="MLflow; the environment's MLFLOW_TRACKING_URI if unset."
    )
    poll_s: Positive = Field(default=30.0, description="Time between two looks at the registry, seconds.")
    cache: Path = Field(default=Path("runs/live/policies"), description="Folder that keeps the last bundles.")
    rollback: RollbackSpec = Field(default=RollbackSpec(), description="When a new policy is taken back.")


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


class RegistryUnavailable(RuntimeError):  # noqa: N818 - reads as the state that it reports
    """Raised when the registry gives no answer, or not the bundle that it should."""


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


def fetch(reference: str, tracking_uri: str | None, cache: Path) -> tuple[str, Path]:
    """Version and local bundle file that `models:/NAME@ALIAS` or `models:/NAME/VERSION` names now, digest verified.

    Raises:
        RegistryUnavailable: when the registry does not give it.
        BundleMismatch: when the bundle is not the one that was registered.
    """
    # Short waits: the follower asks again soon. An operator's own setting wins.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    import mlflow

    body = reference.removeprefix(REGISTRY_PREFIX)
    try:
        client: Any = mlflow.MlflowClient(tracking_uri)
        if "@" in body:
            found = client.get_model_version_by_alias(*body.split("@", 1))
        else:
            found = client.get_model_version(*body.split("/", 1))
        label = f"{found.name}/{found.version}"
        digest = found.tags.get("bundle_digest")
        kept = cache / f"{found.name}-{found.version}-{(digest or 'unknown')[:12]}.zip"
        if not kept.is_file():
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as folder:
                fetched = Path(client.download_artifacts(found.run_id, BUNDLE_FILE, folder))
                _verified(fetched, digest, reference)
                shutil.copyfile(fetched, Path(folder) / "whole.zip")
                (Path(folder) / "whole.zip").replace(kept)
    except BundleMismatch:
        raise
    except Exception as error:  # MLflow's client raises its own, requests', SQLAlchemy's and the file system's errors
        raise RegistryUnavailable(f"{reference}: {' '.join(str(error).split())[:200]}") from error
    _verified(kept, digest, reference)
    (cache / _pointer(reference)).write_text(f"{label}\n{kept.name}\n", encoding="utf-8")
    return label, kept


def kept_bundle(reference: str, cache: Path) -> tuple[str, Path] | None:
    """What `fetch` gave last, from the disk; None when there is nothing."""
    try:
        label, name = (cache / _pointer(reference)).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return None
    path = cache / name
    return (label, path) if path.is_file() else None


def _verified(path: Path, digest: str | None, reference: str) -> None:
    found = load_bundle(path).digest
    if digest is not None and found != digest:
        raise BundleMismatch(f"{reference}: the stored bundle is not the one that was registered")


def _pointer(reference: str) -> str:
    words = reference.removeprefix(REGISTRY_PREFIX)
    return "".join(letter if letter.isalnum() else "-" for letter in words) + ".last"


class PolicyFollower:
    """Keeps the policy that one reference names ready, and hands a new one over when it is asked between ticks.

    Args:
        reference: `learned`, a bundle file, or `models:/...`.
        config: where and how often to look.
        fleet: the services.
        interface: what this controller encodes and decodes.
        first_price: of a miss (n,), NaN where none is known; None: nowhere.
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
        self._lock = threading.Lock()
        self._ready: Version | None = None
        self._loaded: str | None = None
        self._refused: set[str] = set()
        self._stop = threading.Event()

    def look(self) -> None:
        """One look: load what the reference names now, if that is new. Faults are kept in `problem`."""
        try:
            label, path = self._locate()
            bundle = load_bundle(path)
            if bundle.digest not in self._refused and bundle.digest != self._loaded:
                version = Version(label, self._warmed(bundle))
                with self._lock:
                    self._ready, self._loaded = version, bundle.digest
            self.problem = ""
        except (BundleMismatch, RegistryUnavailable) as error:
            self.problem = str(error)
            self._fall_back_on_kept()

    def take(self) -> Version | None:
        """A new version, once; None when there is none. Never waits."""
        with self._lock:
            version, self._ready = self._ready, None
        return version

    def refuse(self, digest: str) -> None:
        """Do not offer this bundle again until the reference names another one."""
        self._refused.add(digest)

    def start(self) -> None:
        """Look in the background until `stop`, where the reference can change its meaning."""
        if self.reference.startswith(REGISTRY_PREFIX):

            def work() -> None:
                while not self._stop.wait(self._config.poll_s):
                    self.look()

            threading.Thread(target=work, name=f"jevons-follow-{self.reference}", daemon=True).start()

    def stop(self) -> None:
        """Look no more."""
        self._stop.set()

    def _locate(self) -> tuple[str, Path]:
        if self.reference.startswith(REGISTRY_PREFIX):
            return fetch(self.reference, self._config.tracking_uri, self._config.cache)
        path = SHIPPED_BUNDLE if self.reference == "learned" else Path(self.reference)
        return path.name, path

    def _warmed(self, bundle: PolicyBundle) -> LearnedPolicy:
        return warmed(bundle, self._fleet, self._interface, self._first_price)

    def _fall_back_on_kept(self) -> None:
        """At the start, with the registry down: the bundle of the last run."""
        kept = kept_bundle(self.reference, self._config.cache)
        if self._loaded is not None or kept is None:
            return
        try:
            bundle = load_bundle(kept[1])
            version = Version(kept[0], self._warmed(bundle))
        except BundleMismatch as error:
            self.problem = f"{self.problem}; the kept copy: {error}"
            return
        with self._lock:
            self._ready, self._loaded = version, bundle.digest


class Probation:
    """Compares live attainment and cost per token since an exchange with those before it.

    Sums are over all services, requests and tokens weighing alike.

    Args:
        spec: how much worse the new policy may be.
        price: dollars per second and tokens per second of a decision's window.
    """

    def __init__(self, spec: RollbackSpec) -> None:
        self.spec = spec
        self._before = np.zeros(5)  # seconds, requests, good requests, dollars, tokens
        self._since = np.zeros(5)
        self._on = False

    @property
    def on(self) -> bool:
        """Whether a policy is being watched."""
        return self._on

    def begin(self) -> None:
        """A new policy acts from now on."""
        if self._on or self._since[0] > 0:
            self._before = self._since
        self._since, self._on = np.zeros(5), True

    def end(self) -> None:
        """From now on the present policy is what a new one is compared with."""
        self._before, self._since, self._on = np.zeros(5), np.zeros(5), False

    def add(self, decision: Decision, usd_per_s: Floats, token_tps: Floats) -> str:
        """Account for one window; why to roll back, empty when not.

        Args:
            decision: the window.
            usd_per_s: (n, P) provisioned.
            token_tps: (n, P) served.
        """
        snapshot = decision.snapshot
        window_s = nan_to_num(snapshot.window_s)
        finished = nan_to_num(snapshot.finished_rps) * window_s
        attained = nan_to_num(np.fmin(snapshot.ttft_attainment, snapshot.tpot_attainment), 1.0)
        usd, tokens = (nan_to_num(rate).sum(axis=1) * window_s for rate in (usd_per_s, token_tps))
        longest = float(window_s.max(initial=0.0))
        self._since += [longest, finished.sum(), (finished * attained).sum(), usd.sum(), tokens.sum()]
        if not self._on:
            # A moving measure of the present policy: half of it is forgotten every watch time.
            if self.spec.watch_s > 0:
                self._since *= 0.5 ** (longest / self.spec.watch_s)
            return ""
        verdict = self._verdict()
        if verdict or self._since[0] >= self.spec.watch_s:
            self._on = False
        return verdict

    def _verdict(self) -> str:
        if min(self._before[1], self._since[1]) < self.spec.min_requests:
            return ""
        before, since = self._before[2] / self._before[1], self._since[2] / self._since[1]
        if since < before - self.spec.attainment_loss:
            return f"attainment fell from {before:.1%} to {since:.1%}"
        if self._before[4] > 0 and self._since[4] > 0:
            cost_before, cost_since = self._before[3] / self._before[4], self._since[3] / self._since[4]
            if cost_since > self.spec.cost_ratio * cost_before:
                return f"cost per token rose to {cost_since / cost_before:.2f} times"
        return ""


def is_learned(config: PolicyConfig) -> bool:
    """Whether the reference names a bundle rather than a rule."""
    reference = config.reference
    return reference == "learned" or reference.endswith(".zip") or reference.startswith(REGISTRY_PREFIX)

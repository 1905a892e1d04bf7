"""Learned policies: a bundle of ONNX weights and a manifest, loaded without pickle.

A bundle is a zip archive of two members, not compressed: ``manifest.json`` and ``policy.onnx``. The manifest names the
interface that the policy was trained for, the range of every feature in training, and where the policy came from; a
digest covers all of it. A bundle that is truncated, altered in any byte or made for another interface is refused.
This module must not know how policies are trained.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, ValidationError, model_validator

from policies.action import ACTIONS, decode_action
from policies.atomic_files import write_whole
from policies.baselines.parameters import Parameter
from policies.bounded_files import TooLarge, read_bounded
from policies.contract import Bools, Features, Floats, Observation, Target
from policies.durable import Durable
from policies.engine import StrictModel
from policies.fleet import Fleet
from policies.json_text import read_json
from policies.miss_price_dial import MISS_PRICES, MissPriceDial
from policies.observation import FEATURES, encode_miss_price
from policies.onnx_network import NetworkRefused, check_network
from policies.spec import InterfaceSpec
from policies.telemetry import turn_off

FORMAT = 1
MAX_BYTES = 64 * 1024 * 1024
MEMBERS = ("manifest.json", "policy.onnx")
MISS_PRICE_COLUMN = FEATURES.index("log_miss_price")
Finite = Annotated[float, Field(allow_inf_nan=False)]


class BundleMismatch(RuntimeError):  # noqa: N818 - reads as the state that it reports
    """Raised when a bundle cannot be trusted here: unreadable, altered, or made for another interface."""


class Manifest(StrictModel):
    """What a bundle says about itself."""

    format: int = Field(description="Version of the bundle format.")
    interface: InterfaceSpec = Field(description="Observation and action that the policy was trained for.")
    interface_digest: str = Field(description="SHA-256 of the interface.")
    features: tuple[str, ...] = Field(description="Names of the inputs, in order.")
    actions: tuple[str, ...] = Field(description="Names of the outputs, in order.")
    feature_low: tuple[Finite, ...] = Field(description="Lowest value of each feature in training.")
    feature_high: tuple[Finite, ...] = Field(description="Highest value of each feature in training.")
    log_miss_price: Finite = Field(description="Centre of the trained dial: natural log of the price of a miss.")
    log_miss_price_span: Finite = Field(ge=0, description="Half-width of the trained dial.")
    provenance: dict[str, Any] = Field(description="How it was trained: versions, digests, seeds, steps, scores.")

    @model_validator(mode="after")
    def _one_range_per_feature(self) -> Manifest:
        if not len(self.feature_low) == len(self.feature_high) == len(self.features):
            raise ValueError("feature_low and feature_high must hold one number per feature")
        return self


@dataclass(frozen=True, eq=False)
class PolicyBundle:
    """A verified manifest and its weights.

    Attributes:
        manifest: what the bundle says about itself.
        weights: the network, ONNX.
        digest: SHA-256 over both, hexadecimal.
        source: where it came from, for messages.
    """

    manifest: Manifest
    weights: bytes
    digest: str
    source: str = "the bundle"


def write_bundle(path: Path, manifest: Manifest, weights: bytes) -> str:
    """Write a bundle; its digest, hexadecimal. The file appears whole or not at all.

    Raises:
        OSError: when it cannot be written.
    """
    data = manifest.model_dump(mode="json")
    digest = _digest(data, weights)
    text = json.dumps({**data, "digest": digest}, indent=1, sort_keys=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda partial: partial.write_bytes(_pack(text.encode(), weights)))
    return digest


def load_bundle(path: Path, check: Callable[[bytes], None] | None = None) -> PolicyBundle:
    """Read and verify a bundle.

    Args:
        path: the file.
        check: what its bytes must pass before they are parsed, such as a signature's; it raises `BundleMismatch`.

    Raises:
        BundleMismatch: when the file is missing, not a bundle, truncated, altered, or of another format or encoding, or
            when its network is none that Jevons runs.
    """
    content = read_bundle(path)
    if check is not None:
        check(content)
    return parse_bundle(content, str(path))


def read_bundle(path: Path) -> bytes:
    """The bytes of a bundle, not verified.

    Raises:
        BundleMismatch: when the file is missing, larger than any bundle, or cannot be read.
    """
    try:
        return read_bounded(path, MAX_BYTES)
    except FileNotFoundError:
        raise BundleMismatch(f"{path}: no such policy bundle") from None
    except TooLarge:
        raise BundleMismatch(f"{path}: larger than any policy bundle") from None
    except (OSError, ValueError) as error:  # or no path
        raise BundleMismatch(f"{path}: not a readable policy bundle: {error}") from None


def parse_bundle(content: bytes, where: str) -> PolicyBundle:
    """Verify a bundle's bytes; `where` names their source in errors.

    Raises:
        BundleMismatch: as for `load_bundle`.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            found = [member.filename for member in archive.infolist()]
            if sorted(found) != sorted(MEMBERS):
                raise BundleMismatch(
                    f"{where}: not a policy bundle: expected the members {' and '.join(MEMBERS)}, found "
                    f"{', '.join(map(repr, found[:5])) or 'none'}{' and more' if len(found) > 5 else ''}"
                )
            # Without compression nothing can unpack to more than the file holds.
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise BundleMismatch(f"{where}: a member is compressed: not as Jevons writes a policy bundle")
            text, weights = (archive.read(name) for name in MEMBERS)
            data = read_json(text)
    except BundleMismatch:
        raise
    except Exception as error:  # a damaged archive also raises zlib.error, struct.error, RecursionError and more
        raise BundleMismatch(f"{where}: not a readable policy bundle (truncated or altered?): {error}") from None
    claimed = data.pop("digest", None) if isinstance(data, dict) else None
    if claimed is None or claimed != _digest(data, weights):
        raise BundleMismatch(f"{where}: the contents do not match their digest: truncated or altered")
    if content != _pack(text, weights):
        raise BundleMismatch(f"{where}: not byte for byte as Jevons writes a policy bundle: altered or packed again")
    if data.get("format") != FORMAT:  # first: another format has other fields
        raise BundleMismatch(f"{where}: bundle format {data.get('format')!r}, this version of Jevons reads {FORMAT}")
    try:
        manifest = Manifest.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "(whole manifest)"
        raise BundleMismatch(f"{where}: manifest field {field}: {first['msg']}") from None
    if manifest.features != FEATURES or manifest.actions != ACTIONS:
        raise BundleMismatch(f"{where}: made for other features or actions than this version of Jevons encodes")
    try:
        check_network(weights)
    except NetworkRefused as error:
        raise BundleMismatch(f"{where}: {error}") from None
    if manifest.interface_digest != manifest.interface.digest():
        raise BundleMismatch(f"{where}: the interface does not match its digest")
    return PolicyBundle(manifest=manifest, weights=weights, digest=str(claimed), source=where)


def mismatch(trained: InterfaceSpec, used: InterfaceSpec) -> str:
    """How the interface that a policy was trained for differs from the one in use, in words; empty when it does not."""
    if trained.digest() == used.digest():
        return ""
    window, own = trained.window, used.window
    if window.control_interval_s != own.control_interval_s:
        return (
            f"trained for a decision every {window.control_interval_s:g} s, but control_interval_s is "
            f"{own.control_interval_s:g} s"
        )
    if window.metrics_delay_s != own.metrics_delay_s:
        return (
            f"trained on metrics that are {window.metrics_delay_s:g} s old, but metrics_delay_s is "
            f"{own.metrics_delay_s:g} s"
        )
    return f"trained for interface {trained.digest()[:12]}, but this service uses {used.digest()[:12]}: action differs"


def _pack(manifest: bytes, weights: bytes) -> bytes:
    """The archive, the same bytes everywhere: no compression, a fixed date, a fixed system."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in zip(MEMBERS, (manifest, weights), strict=True):
            member = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            member.create_system = 3
            archive.writestr(member, content, zipfile.ZIP_STORED)
    return buffer.getvalue()


def _digest(manifest: dict[str, Any], weights: bytes) -> str:
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.sha256(canonical + b"\0" + weights).hexdigest()


class LearnedPolicy(Durable):
    """Runs a bundle's network and decodes its outputs.

    The network reads the price of a miss, which follows the error budget (`policies.miss_price_dial`).

    Args:
        bundle: verified weights and manifest.
        fleet: the services.
        interface: what this controller encodes and decodes.
        first_price: of a miss, where one is known to serve the service's own traffic: one for all, or (n,) with NaN
            where none is known.

    Raises:
        BundleMismatch: when the bundle was trained for another interface, or its network has other shapes.
    """

    name = "learned"
    PARAMETERS = (
        Parameter(
            "first_price",
            16.0,
            low=MISS_PRICES[0],
            high=MISS_PRICES[1],
            log=True,
            limit=MISS_PRICES[1],
            meaning="price of a miss to begin with, in costs of serving a request",
        ),
    )

    def __init__(
        self,
        bundle: PolicyBundle,
        fleet: Fleet,
        interface: InterfaceSpec,
        first_price: Floats | float | None = None,
    ) -> None:
        turn_off()
        import onnxruntime

        if bundle.manifest.interface_digest != interface.digest():
            raise BundleMismatch(f"{bundle.source}: {mismatch(bundle.manifest.interface, interface)}")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4  # what goes wrong is in the exception
        self.bundle = bundle
        self._run = onnxruntime.RunOptions()
        self._run.log_severity_level = 4
        try:
            self._session = onnxruntime.InferenceSession(bundle.weights, options, providers=["CPUExecutionProvider"])
            self.outputs(np.zeros((1, len(FEATURES)), np.float32))
        except BundleMismatch:
            raise
        except Exception as error:  # onnxruntime's own exceptions have no common base
            reason = " ".join(str(error).split())
            raise BundleMismatch(f"{bundle.source}: the network cannot be run: {reason}") from None
        self._fleet = fleet
        self._interface = interface
        middle, span = bundle.manifest.log_miss_price, bundle.manifest.log_miss_price_span
        self._dial = MissPriceDial(fleet, middle - span, middle + span, first_price)

    def reset(self, services: Bools | None = None) -> None:
        """Forget the error budgets of the masked services."""
        self._dial.reset(services)

    def cancel(self) -> None:
        """End a run of the network that is under way, and every later one: they raise. For other threads to call."""
        self._run.terminate = True

    def outputs(self, features: Features) -> Floats:
        """The network's outputs (n, 4) in -1..1 for features (n, F)."""
        (actions,) = self._session.run(None, {"features": features}, self._run)
        if actions.shape != (len(features), len(ACTIONS)) or not np.isfinite(actions).all():
            raise BundleMismatch(
                f"{self.bundle.source}: the network's answer has shape {actions.shape} or holds values that are no "
                f"finite numbers, expected shape ({len(features)}, {len(ACTIONS)})"
            )
        return np.asarray(actions, np.float64)

    def distance(self, features: Features) -> Floats:
        """(n,) how far an observation lies outside the training range: the largest excess over any feature's width."""
        low = np.asarray(self.bundle.manifest.feature_low)
        high = np.asarray(self.bundle.manifest.feature_high)
        width = np.maximum(high - low, 0.1)
        excess = np.maximum(np.maximum(low - features, features - high), 0.0) / width
        excess[:, MISS_PRICE_COLUMN] = 0.0
        return np.asarray(excess.max(axis=1))

    def propose(self, observation: Observation) -> Target:
        """The network's proposal with the dial where the error budget has put it."""
        features = observation.features.copy()
        features[:, MISS_PRICE_COLUMN] = encode_miss_price(self._dial.update(observation.snapshot))
        return decode_action(self.outputs(features), observation, self._fleet, self._interface.action)

"""The manifest of a policy that nobody trained."""

from __future__ import annotations

from typing import Any

from policies.action import ACTIONS
from policies.learned import FORMAT, Manifest
from policies.observation import FEATURES
from policies.spec import InterfaceSpec


def untrained_manifest(bound: float = 10.0, **provenance: Any) -> Manifest:
    """A manifest for the standard interface and all features and actions; features lie within `bound` of 0."""
    interface = InterfaceSpec()
    return Manifest(
        format=FORMAT,
        interface=interface,
        interface_digest=interface.digest(),
        features=FEATURES,
        actions=ACTIONS,
        feature_low=(-bound,) * len(FEATURES),
        feature_high=(bound,) * len(FEATURES),
        log_miss_price=3.0,
        log_miss_price_span=1.0,
        provenance=provenance,
    )

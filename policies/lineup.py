"""Policies by reference: the words of ``jevons evaluate --policy`` and of a live configuration.

``static``, ``hpa`` and ``token-demand``, with parameters after colons (``hpa:target_share=0.6:tolerance=0.2``);
``learned`` for the bundle that ships with Jevons; a path to a bundle; ``models:/NAME@ALIAS`` or ``models:/NAME/3`` for
one in the model registry.
This module must not know what a policy is judged on, nor how a registry is reached: the caller brings that along.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from policies.baselines.hpa import HpaPolicy
from policies.baselines.static import StaticPolicy
from policies.baselines.token_demand import TokenDemandPolicy
from policies.contract import Policy
from policies.engine import ConfigError
from policies.fleet import Fleet
from policies.learned import LearnedPolicy, PolicyBundle, load_bundle
from policies.spec import InterfaceSpec, ScalingSpec, shipped_configs

Registry = Callable[[str], Path]
"""Fetches the bundle that a `models:/` reference names; the path of a local copy."""
ALL = ("learned", "token-demand", "hpa", "static")
"""What ``all`` stands for."""
SHIPPED_BUNDLE = shipped_configs() / "policies" / "default.zip"
Value = int | float | list[int]


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _counts(text: str) -> list[int]:
    numbers = [int(part) for part in text.split("/")]
    if min(numbers) < 0:
        raise ValueError
    return numbers


def _not_negative(text: str) -> float:
    number = float(text)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError
    return number


def _positive(text: str) -> float:
    number = _not_negative(text)
    if number == 0:
        raise ValueError
    return number


def _share(text: str) -> float:
    number = _not_negative(text)
    if number > 1:
        raise ValueError
    return number


def _positive_share(text: str) -> float:
    return min(_positive(text), _share(text))


@dataclass(frozen=True)
class _Parameter:
    parse: Callable[[str], Value]
    expected: str


_COUNT = _Parameter(_count, "a whole number of at least 1")
_POSITIVE = _Parameter(_positive, "a number above 0")
_NOT_NEGATIVE = _Parameter(_not_negative, "a number of at least 0")
_SHARE = _Parameter(_share, "a number from 0 to 1")
PARAMETERS: dict[str, dict[str, _Parameter]] = {
    "static": {
        "replicas": _Parameter(_counts, "a number of replicas, or one per pool as in 4/2"),
        "batch_cap": _COUNT,
    },
    "hpa": {
        "target_share": _Parameter(_positive_share, "a number above 0, at most 1"),
        "tolerance": _NOT_NEGATIVE,
        "stabilization_s": _NOT_NEGATIVE,
        "max_up_replicas": _COUNT,
        "max_up_share": _NOT_NEGATIVE,
    },
    "token-demand": {"headroom": _POSITIVE, "spot_share": _SHARE, "memory_s": _POSITIVE},
}


@dataclass(frozen=True)
class Entry:
    """A policy that was asked for, checked and loaded as far as that is possible without a fleet.

    Attributes:
        reference: the words that asked for it.
        kind: ``static``, ``hpa``, ``token-demand`` or ``learned``.
        parameters: of a simple rule.
        bundle: of a learned policy.
    """

    reference: str
    kind: str
    parameters: dict[str, Value]
    bundle: PolicyBundle | None = None

    @property
    def bundle_digest(self) -> str | None:
        """SHA-256 of the bundle, None for a simple rule."""
        return None if self.bundle is None else self.bundle.digest


def split_references(texts: Sequence[str]) -> list[str]:
    """References of a comma-separated, repeatable option; ``all`` stands for four; doubles are dropped.

    >>> split_references(["hpa,static:replicas=4", "hpa"])
    ['hpa', 'static:replicas=4']

    Raises:
        ConfigError: when there is none.
    """
    words = [word.strip() for text in texts for word in text.split(",") if word.strip()]
    references = [name for word in words for name in (ALL if word == "all" else (word,))]
    if not references:
        raise ConfigError(f"no policy named; there are {_known()}")
    return list(dict.fromkeys(references))


def resolve(reference: str, registry: Registry | None = None) -> Entry:
    """Check a reference and load its bundle; `registry` fetches those in the model registry.

    Raises:
        ConfigError: when the policy, a parameter or a value is unknown; the message lists what exists.
        BundleMismatch: when a bundle is missing or cannot be trusted.
    """
    if reference == "learned":
        if not SHIPPED_BUNDLE.is_file():
            raise ConfigError(
                "no pretrained policy ships with this checkout (configs/policies/default.zip is missing): "
                "train one with `jevons train`, or name a bundle file"
            )
        return Entry(reference, "learned", {}, load_bundle(SHIPPED_BUNDLE))
    if reference.startswith("models:/"):
        if registry is None:
            raise ConfigError(f"policy {reference!r}: no model registry can be used here; name a bundle file")
        return Entry(reference, "learned", {}, load_bundle(registry(reference)))
    if reference.endswith(".zip"):
        return Entry(reference, "learned", {}, load_bundle(Path(reference)))
    kind, *assignments = reference.split(":")
    if kind not in PARAMETERS:
        raise ConfigError(f"unknown policy {reference!r}; there are {_known()}")
    return Entry(reference, kind, _parameters(reference, kind, assignments))


def build(entry: Entry, fleet: Fleet, interface: InterfaceSpec) -> Policy:
    """The policy for a fleet.

    Raises:
        BundleMismatch: when a bundle was trained for another interface.
        ConfigError: when ``replicas`` of a static policy names more pools than there are.
    """
    values = entry.parameters
    if entry.bundle is not None:
        return LearnedPolicy(entry.bundle, fleet, interface)
    if entry.kind == "hpa":
        return HpaPolicy(fleet, **values)  # type: ignore[arg-type]
    if entry.kind == "token-demand":
        return TokenDemandPolicy(fleet, **values)  # type: ignore[arg-type]
    replicas, batch_cap = values.get("replicas"), values.get("batch_cap")
    assert batch_cap is None or isinstance(batch_cap, int)
    if isinstance(replicas, list):
        if len(replicas) not in {1, fleet.pools}:
            raise ConfigError(f"replicas for {len(replicas)} pools, but there are {fleet.pools}")
        return StaticPolicy(fleet, np.array(replicas, np.int64), batch_cap)
    return StaticPolicy(fleet, None, batch_cap)


def make_policy(reference: str, fleet: Fleet, specs: Sequence[ScalingSpec], registry: Registry | None = None) -> Policy:
    """The policy that `reference` names, for the services of `fleet`, whose specs share one interface.

    Raises:
        ConfigError: as `resolve` and `build`.
        BundleMismatch: as `resolve` and `build`.
    """
    return build(resolve(reference, registry), fleet, specs[0].interface)


def starting_spec(entry: Entry, spec: ScalingSpec) -> ScalingSpec:
    """The spec with the fleet that is ready at time 0.

    That is `initial_replicas`, else `min_replicas`. A static fleet has been there all along: where a pool leaves
    `initial_replicas` unset, it starts at its constant size.
    """
    if entry.kind != "static" or spec.guardrails.gpu_budget is not None:
        return spec
    most = [pool.max_replicas for pool in spec.pools]
    wanted = entry.parameters.get("replicas", most)
    sizes = wanted * len(most) if isinstance(wanted, list) and len(wanted) == 1 else wanted
    if not isinstance(sizes, list) or len(sizes) != len(most):
        return spec  # `build` says what is wrong
    pools = tuple(
        pool
        if pool.initial_replicas is not None
        else pool.model_copy(update={"initial_replicas": min(max(size, pool.min_replicas), pool.max_replicas)})
        for pool, size in zip(spec.pools, sizes, strict=True)
    )
    return spec.model_copy(update={"pools": pools})


def _parameters(reference: str, kind: str, assignments: list[str]) -> dict[str, Value]:
    known = PARAMETERS[kind]
    values: dict[str, Value] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or name not in known:
            raise ConfigError(
                f"policy {reference!r}: unknown parameter {assignment!r}; {kind} has {', '.join(known)}, "
                f"as in {kind}:{next(iter(known))}=VALUE"
            )
        try:
            values[name] = known[name].parse(text)
        except ValueError:
            raise ConfigError(
                f"policy {reference!r}: parameter {name}: expected {known[name].expected}, got {text!r}"
            ) from None
    return values


def _known() -> str:
    return (
        f"{', '.join(ALL)} (all of them: all), a path to a bundle that ends in .zip, "
        "and models:/NAME@ALIAS or models:/NAME/VERSION"
    )

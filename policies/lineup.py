"""Policies by reference: the words of ``jevons evaluate --policy`` and of a live configuration.

The name of a baseline, with parameters after colons (``hpa:target_share=0.6:tolerance=0.2``), see ``docs/peers.md``;
``learned`` for the bundle that ships with Jevons; a path to a bundle; ``models:/NAME@ALIAS`` or ``models:/NAME/3`` for
one in the model registry; each of these takes ``:first_price=6``. ``+self`` behind a name lets an error budget move its
headroom (``hpa+self``).
This module must not know what a policy is judged on, nor how a registry is reached: the caller brings that along.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from policies.baselines.aibrix import AibrixPolicy
from policies.baselines.autothrottle import AutothrottlePolicy
from policies.baselines.dynamo import DynamoLoadPolicy
from policies.baselines.dynamo_throughput import DynamoThroughputPolicy
from policies.baselines.hpa import HpaPolicy
from policies.baselines.keda import KedaPolicy
from policies.baselines.knative import KnativePolicy
from policies.baselines.llm_d import LlmdInFlightPolicy, LlmdSloPolicy, LlmdTokensPolicy
from policies.baselines.parameters import Parameter, Setting, TunablePolicy
from policies.baselines.ray_serve import RayServePolicy
from policies.baselines.reactive import ReactivePolicy
from policies.baselines.skyserve import SkyServePolicy
from policies.baselines.static import StaticPolicy
from policies.baselines.token_demand import TokenDemandPolicy
from policies.baselines.wva import WvaSaturationPolicy, WvaTokensPolicy
from policies.baselines.wva_queueing import WvaQueueingPolicy
from policies.contract import Policy
from policies.engine import ConfigError
from policies.fleet import Fleet
from policies.learned import LearnedPolicy, PolicyBundle, load_bundle
from policies.self_tuned import SelfTunedPolicy
from policies.spec import InterfaceSpec, ScalingSpec, shipped_configs

Registry = Callable[[str], Path]
"""Fetches the bundle that a `models:/` reference names; the path of a local copy."""
SHIPPED_BUNDLE = shipped_configs() / "policies" / "default.zip"
Value = Setting | list[int]
BASELINES: dict[str, type[TunablePolicy]] = {
    policy.name: policy
    for policy in (
        ReactivePolicy,
        TokenDemandPolicy,
        HpaPolicy,
        KedaPolicy,
        KnativePolicy,
        RayServePolicy,
        LlmdSloPolicy,
        LlmdInFlightPolicy,
        LlmdTokensPolicy,
        WvaSaturationPolicy,
        WvaTokensPolicy,
        WvaQueueingPolicy,
        DynamoLoadPolicy,
        DynamoThroughputPolicy,
        AibrixPolicy,
        SkyServePolicy,
        AutothrottlePolicy,
        StaticPolicy,
    )
}
"""Every policy that ships and is not learned, by name: our own rules first, then the peers."""
OWN = (ReactivePolicy.name, TokenDemandPolicy.name)
"""The baselines that no other project wrote."""
ALL = (LearnedPolicy.name, *BASELINES)
"""What ``all`` stands for, together with the references."""
REFERENCES = ("bound", "plan", "best-static")
"""Rows of a table that no policy makes, see `training.references.oracle`."""
SELF = "+self"
REGISTRY_PREFIX = "models:/"
CONSTANT = StaticPolicy.name
BATCH_CAP = Parameter("batch_cap", 1, whole=True, meaning="concurrent requests per replica")


@dataclass(frozen=True)
class Entry:
    """A policy that was asked for, checked and loaded as far as that is possible without a fleet.

    Attributes:
        reference: the words that asked for it.
        kind: the name of a baseline, or ``learned``.
        parameters: that the reference sets.
        bundle: of a learned policy.
        self_tuned: whether an error budget moves its headroom.
    """

    reference: str
    kind: str
    parameters: dict[str, Value]
    bundle: PolicyBundle | None = None
    self_tuned: bool = False

    @property
    def bundle_digest(self) -> str | None:
        """SHA-256 of the bundle, None for a baseline."""
        return None if self.bundle is None else self.bundle.digest


def split_references(texts: Sequence[str]) -> list[str]:
    """References of a comma-separated, repeatable option; doubles are dropped.

    ``all`` stands for every policy that ships and for the references, ``all+self`` for each policy self-tuned.

    >>> split_references(["hpa,static:replicas=4", "hpa"])
    ['hpa', 'static:replicas=4']

    Raises:
        ConfigError: when there is none.
    """
    words = [word.strip() for text in texts for word in text.split(",") if word.strip()]
    groups = {"all": (*ALL, *REFERENCES), f"all{SELF}": tuple(self_tuned(name) for name in ALL if name != CONSTANT)}
    references = [name for word in words for name in groups.get(word, (word,))]
    if not references:
        raise ConfigError(f"no policy named; there are {_known()}")
    return list(dict.fromkeys(references))


def resolve(reference: str, registry: Registry | None = None) -> Entry:
    """Check a reference and load its bundle; `registry` fetches those in the model registry.

    Raises:
        ConfigError: when the policy, a parameter or a value is unknown; the message lists what exists.
        BundleMismatch: when a bundle is missing or cannot be trusted.
    """
    name, assignments = _split(reference)
    asked, tuned = name.removesuffix(SELF), name.endswith(SELF)
    if asked in BASELINES:
        if tuned and asked == CONSTANT:
            raise ConfigError(f"policy {reference!r}: a constant fleet looks at nothing, so it cannot tune itself")
        return Entry(reference, asked, _parameters(reference, asked, assignments), None, tuned)
    if asked == LearnedPolicy.name:
        if not SHIPPED_BUNDLE.is_file():
            raise ConfigError(
                "no pretrained policy ships with this checkout (configs/policies/default.zip is missing): "
                "train one with `jevons train`, or name a bundle file"
            )
        path = SHIPPED_BUNDLE
    elif asked.startswith(REGISTRY_PREFIX):
        if registry is None:
            raise ConfigError(f"policy {reference!r}: no model registry can be used here; name a bundle file")
        path = registry(asked)
    elif asked.endswith(".zip"):
        path = Path(asked)
    else:
        raise ConfigError(f"unknown policy {reference!r}; there are {_known()}")
    parameters = _parameters(reference, LearnedPolicy.name, assignments)
    return Entry(reference, LearnedPolicy.name, parameters, load_bundle(path), tuned)


def build(entry: Entry, fleet: Fleet, interface: InterfaceSpec) -> Policy:
    """The policy for a fleet.

    Raises:
        BundleMismatch: when a bundle was trained for another interface.
        ConfigError: when ``replicas`` of a static policy names more pools than there are.
    """
    policy = _build(entry, fleet, interface)
    return SelfTunedPolicy(policy, fleet) if entry.self_tuned else policy


def _build(entry: Entry, fleet: Fleet, interface: InterfaceSpec) -> Policy:
    values: dict[str, Any] = dict(entry.parameters)
    if entry.bundle is not None:
        return LearnedPolicy(entry.bundle, fleet, interface, **values)
    replicas = values.get("replicas")
    if isinstance(replicas, list):
        if len(replicas) not in {1, fleet.pools}:
            raise ConfigError(f"replicas for {len(replicas)} pools, but there are {fleet.pools}")
        values["replicas"] = np.array(replicas, np.int64)
    make: Callable[..., Policy] = BASELINES[entry.kind]
    return make(fleet, **values)


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
    if entry.kind != CONSTANT or spec.guardrails.gpu_budget is not None:
        return spec
    largest = [pool.max_replicas for pool in spec.pools]
    share = entry.parameters.get("share", 1.0)
    assert isinstance(share, int | float)
    wanted = entry.parameters.get("replicas", [math.ceil(share * size - 1e-9) for size in largest])
    sizes = wanted * len(largest) if isinstance(wanted, list) and len(wanted) == 1 else wanted
    if not isinstance(sizes, list) or len(sizes) != len(largest):
        return spec  # `build` says what is wrong
    pools = tuple(
        pool
        if pool.initial_replicas is not None
        else pool.model_copy(update={"initial_replicas": min(max(size, pool.min_replicas), pool.max_replicas)})
        for pool, size in zip(spec.pools, sizes, strict=True)
    )
    return spec.model_copy(update={"pools": pools})


def tunable_parameters(reference: str) -> tuple[Parameter, ...]:
    """What a tuner may set of a policy; nothing where the reference sets it already, or a registry says what it is."""
    name, assignments = _split(reference)
    if assignments or name.startswith(REGISTRY_PREFIX):
        return ()
    return BASELINES.get(name.removesuffix(SELF), LearnedPolicy).PARAMETERS


def reference_of(policy: str, settings: Mapping[str, Setting]) -> str:
    """The reference of a policy with the given parameters."""
    return ":".join([policy, *(f"{name}={value}" for name, value in settings.items())])


def self_tuned(policy: str) -> str:
    """The reference of a policy whose headroom follows the measured attainment; a constant stays what it is.

    >>> self_tuned("hpa:target_share=0.6"), self_tuned("static")
    ('hpa+self:target_share=0.6', 'static')
    """
    name, assignments = _split(policy)
    return policy if name == CONSTANT else ":".join([f"{name}{SELF}", *assignments])


def is_peer(reference: str) -> bool:
    """True for an algorithm of another project, self-tuned or not."""
    name = _split(reference)[0].removesuffix(SELF)
    return name in BASELINES and name not in OWN


def names_bundle(reference: str) -> bool:
    """True for a bundle in a file or a registry, with or without parameters; not for the one that ships.

    >>> [names_bundle(one) for one in ("a.zip", "a.zip+self", "models:/a/3:first_price=6", "learned:first_price=6")]
    [True, True, True, False]
    """
    name = _split(reference)[0].removesuffix(SELF)
    return name.endswith(".zip") or name.startswith(REGISTRY_PREFIX)


def is_rule(reference: str) -> bool:
    """True for a reactive rule of our own, self-tuned or not."""
    return _split(reference)[0].removesuffix(SELF) in OWN


def _split(reference: str) -> tuple[str, list[str]]:
    """What a reference names, and the assignments behind it. ``models:/NAME`` has a colon of its own.

    >>> _split("hpa:target_share=0.6"), _split("models:/chat/3"), _split("hpa:0.6")
    (('hpa', ['target_share=0.6']), ('models:/chat/3', []), ('hpa', ['0.6']))
    """
    name, *rest = reference.split(":")
    if rest and rest[0].startswith("/"):
        name, rest = f"{name}:{rest[0]}", rest[1:]
    return name, rest


def _counts(text: str) -> list[int]:
    numbers = [int(part) for part in text.split("/")]
    if min(numbers) < 0:
        raise ValueError
    return numbers


def _parameters(reference: str, kind: str, assignments: list[str]) -> dict[str, Value]:
    known: dict[str, tuple[Callable[[str], Value], str]] = {
        item.name: (item.parse, item.expected) for item in BASELINES.get(kind, LearnedPolicy).PARAMETERS
    }
    if kind == CONSTANT:  # what an operator sets and no tuner searches
        known["replicas"] = (_counts, "a number of replicas, or one per pool as in 4/2")
        known["batch_cap"] = (BATCH_CAP.parse, BATCH_CAP.expected)
    values: dict[str, Value] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or name not in known:
            raise ConfigError(
                f"policy {reference!r}: unknown parameter {assignment!r}; {kind} has {', '.join(known)}, "
                f"as in {kind}:{next(iter(known))}=VALUE"
            )
        parse, expected = known[name]
        try:
            values[name] = parse(text)
        except ValueError:
            raise ConfigError(f"policy {reference!r}: parameter {name}: expected {expected}, got {text!r}") from None
    return values


def _known() -> str:
    return (
        f"{', '.join(ALL)} (all of them: all), a path to a bundle that ends in .zip, "
        "and models:/NAME@ALIAS or models:/NAME/VERSION; any with +self behind its name"
    )

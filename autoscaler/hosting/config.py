"""The live configuration: one YAML file per controller.

A file names services (scaling specs), where their metrics are, what carries targets out, which policy decides and what
it may do. This module must not start anything.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from autoscaler.actuators.base import pools_of
from autoscaler.actuators.build import ActuatorConfig, CompositeConfig
from autoscaler.actuators.haproxy import EVERY, HAProxyConfig
from autoscaler.actuators.kubernetes import KubernetesConfig
from autoscaler.authority.controls import Mode
from autoscaler.authority.heartbeat import HEAR_S
from autoscaler.authority.leases import LeaseSpec
from autoscaler.authority.supervision import SupervisionSpec
from autoscaler.hosting.decision_log import LogFormat
from autoscaler.hosting.exposition import ExpositionConfig
from autoscaler.metrics.client import PrometheusConfig
from autoscaler.records.database import RecordsConfig, database_file
from autoscaler.versions.follower import PolicyConfig
from autoscaler.versions.ladder import LadderSpec
from policies.engine import ConfigError, Positive, StrictModel, parse_model, read_yaml
from policies.lineup import names_bundle
from policies.names import Name, checked_name
from policies.secret_url import Url
from policies.spec import ScalingSpec, load_spec, resolve_engines


class RayConfig(StrictModel):
    """The Ray cluster that hosts the controller."""

    address: Url | None = Field(
        default=None, description="Cluster to join, such as auto or ray://HOST:10001; started on this host when unset."
    )
    namespace: Name = Field(default="jevons", description="Namespace of the actors' names.")
    dashboard_port: int | None = Field(
        default=None, ge=1, le=65535, description="Port of the dashboard on loopback when the cluster is started here."
    )
    cpus_per_actor: Annotated[float, Field(ge=0, le=64)] = Field(
        default=0.1, description="CPUs that Ray sets aside per shard."
    )


SPARE_S = 0.5
"""What a reading may take besides its waits, seconds."""


class StageLimits(StrictModel):
    """How long each stage of a tick may take, seconds; what takes longer is left behind and the decision held."""

    read_s: Positive = Field(default=10.0, description="Metrics and, at the same time, the state of the cluster.")
    decide_s: Positive = Field(default=5.0, description="One policy's answer; one that is late is not asked again.")
    record_s: Positive = Field(default=5.0, description="The write before acting.")
    permit_s: Positive = Field(default=12.0, description="Asking once more, before acting, who may act.")
    act_s: Positive = Field(default=20.0, description="Carrying targets out.")
    conclude_s: Positive = Field(default=5.0, description="The write after acting.")
    route_s: Positive = Field(default=10.0, description="Routing requests to the replicas that there are.")
    announce_s: Positive = Field(default=2.0, description="Events about what was done.")

    @property
    def all_s(self) -> float:
        """Seconds that a tick may take when every stage needs its whole limit."""
        return self.decide_s + sum(self.by_stage().values())

    def by_stage(self) -> dict[str, float]:
        """Limits of the stages that wait for something outside, by the names that the controller uses."""
        return {
            "read": self.read_s,
            "record": self.record_s,
            "permit": self.permit_s,
            "act": self.act_s,
            "conclude": self.conclude_s,
            "route": self.route_s,
            "announce": self.announce_s,
        }


class LiveConfig(StrictModel):
    """Everything that one live controller needs to know."""

    name: Name = Field(default="jevons", description="Name of the controller.")
    services: Annotated[tuple[ScalingSpec, ...], Field(min_length=1)] = Field(
        description="Scaling specs: paths of YAML files, or their contents."
    )
    metrics: PrometheusConfig = Field(description="Where the measurements are.")
    actuator: ActuatorConfig = Field(description="What carries targets out.")
    mode: Mode = Field(
        default=Mode.ADVISE, description="What the controller may do until `jevons mode` says otherwise."
    )
    policy: PolicyConfig = Field(default=PolicyConfig(), description="What proposes targets.")
    fallback: str = Field(default="token-demand", description="Baseline below a learned policy, by reference.")
    ladder: LadderSpec = Field(default=LadderSpec(), description="When a service falls to the baseline.")
    counterfactuals: tuple[str, ...] = Field(
        default=("token-demand", "hpa"), description="Policies whose targets are recorded beside, by reference."
    )
    supervision: SupervisionSpec = Field(default=SupervisionSpec(), description="What must be so before acting.")
    kill_file: Path | None = Field(
        default=Path("runs/live/STOP"), description="While this file exists nothing is carried out."
    )
    records: RecordsConfig = Field(default=RecordsConfig(), description="Where decisions are kept.")
    lease: LeaseSpec = Field(default=LeaseSpec(), description="How controllers agree on who acts.")
    log: LogFormat = Field(default="text", description="How the controller's log is written: text, or json by line.")
    exposition: ExpositionConfig = Field(default=ExpositionConfig(), description="The controller's own metrics.")
    targets_file: Path | None = Field(
        default=None, description="JSON file with the latest targets, for `autoscaler.hosting.serve_policy.policy`."
    )
    shards: int = Field(default=1, ge=1, le=256, description="Actors that share the services.")
    ray: RayConfig = Field(default=RayConfig(), description="The Ray cluster that hosts the controller.")
    limits: StageLimits = Field(default=StageLimits(), description="How long each stage of a tick may take.")

    @model_validator(mode="after")
    def _one_rhythm(self) -> LiveConfig:
        names = [spec.service for spec in self.services]
        for place, name in enumerate(names):  # it goes into commands, paths and queries
            try:
                checked_name(name)
            except ValueError as error:
                raise ValueError(f"services.{place}.service: {error}, got {name!r:.60}") from None
        twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
        if twice:
            raise ValueError(f"services: {twice[0]!r} is there twice; every service needs its own name")
        unknown = sorted(set(self.policy.first_prices) - set(names))
        if unknown:
            raise ValueError(f"policy.first_prices: there is no service {unknown[0]!r}")
        first = self.services[0]
        for spec in self.services[1:]:
            if spec.interface != first.interface or spec.guardrails != first.guardrails:
                raise ValueError(
                    f"services: {spec.service!r} has another interface or other guardrails than {first.service!r}; "
                    "put it into a file of its own"
                )
        return self

    @model_validator(mode="after")
    def _readings_end_in_time(self) -> LiveConfig:
        """A stage that ends before its servers' own deadlines would lose the whole reading to one that is slow."""
        state = {f"actuator.{field}": wait_s for field, wait_s in self.actuator.waits_s().items()}
        for field, limit_s, besides_s, waits_s in (
            ("read_s", self.limits.read_s, SPARE_S, {"metrics.deadline_s": self.metrics.deadline_s}),
            ("read_s", self.limits.read_s, SPARE_S, state),
            ("permit_s", self.limits.permit_s, SPARE_S + HEAR_S, state),
        ):
            needed_s = sum(waits_s.values()) + besides_s
            if waits_s and needed_s > limit_s:
                waits = " and ".join(f"{name} of {wait_s:g} s" for name, wait_s in waits_s.items())
                raise ValueError(
                    f"limits.{field}: {limit_s:g} s is too short for {waits}; set it to {needed_s:g} or more, or lower "
                    "what it has to hold"
                )
        return self

    @model_validator(mode="after")
    def _routed_services(self) -> LiveConfig:
        composite = self.actuator if isinstance(self.actuator, CompositeConfig) else None
        part = self.actuator if composite is None else composite.batch_cap
        if not isinstance(part, HAProxyConfig) or not part.route:
            return self
        if composite is None or not isinstance(composite.replicas, KubernetesConfig):
            raise ValueError(
                f"actuator.{'batch_cap.' if composite else ''}route: only replicas in Kubernetes can be followed; use "
                "kind composite with replicas of kind kubernetes, or leave route out"
            )
        unknown = sorted(set(part.route) - {EVERY} - {spec.service for spec in self.services})
        if unknown:
            raise ValueError(f"actuator.batch_cap.route: there is no service {unknown[0]!r}")
        owners: dict[str, str] = {}
        for pool in (one for one in pools_of(self.services) if part.routes(one.service)):
            backend = part.backend_of(pool)
            owner = owners.setdefault(backend, pool.service)
            if owner != pool.service:
                raise ValueError(
                    f"actuator.batch_cap.route: {owner!r} and {pool.service!r} have one backend, {backend!r}; each "
                    "would take the other's replicas out of it"
                )
        return self

    @model_validator(mode="after")
    def _every_bundle_is_signed(self) -> LiveConfig:
        unchecked = [one for one in (self.fallback, *self.counterfactuals) if names_bundle(one)]
        if self.policy.trusted_keys and unchecked:
            raise ValueError(
                f"policy.trusted_keys: {unchecked[0]!r} is a bundle whose signature nobody checks; only "
                "policy.reference and policy.challenger may name bundles"
            )
        return self

    @property
    def interval_s(self) -> float:
        """Seconds between two ticks."""
        return self.services[0].interface.window.control_interval_s

    @property
    def stall_s(self) -> float:
        """Seconds without the end of a tick after which the loop counts as standing still."""
        return 2.0 * self.interval_s + self.limits.all_s

    @model_validator(mode="after")
    def _a_shard_each(self) -> LiveConfig:
        if self.shards > len(self.services):
            raise ValueError(f"shards: {self.shards} actors for {len(self.services)} services; at most one each")
        return self

    @property
    def database_url(self) -> str:
        """The URL of the records with its secrets filled in.

        Raises:
            ConfigError: when a secret is not set.
        """
        try:
            return self.records.url.reveal()
        except ValueError as error:
            raise ConfigError(f"records.url {error}") from None

    def located(self, folder: Path) -> LiveConfig:
        """The same with every path that the controller writes made absolute, relative to `folder`."""
        file = database_file(self.records.url)
        records = self.records
        if file is not None and not file.is_absolute():
            records = records.model_copy(update={"url": Url(f"sqlite:///{(folder / file).resolve()}")})
        keys = tuple(folder / key for key in self.policy.trusted_keys)
        policy = self.policy.model_copy(update={"cache": folder / self.policy.cache, "trusted_keys": keys})
        if policy.reference.endswith(".zip"):
            policy = policy.model_copy(update={"reference": str((folder / policy.reference).resolve())})
        paths = {
            name: folder / path for name in ("kill_file", "targets_file") if (path := getattr(self, name)) is not None
        }
        return self.model_copy(update={"records": records, "policy": policy, **paths})

    def shard_name(self, index: int) -> str:
        """Name of one shard for people."""
        return self.name if self.shards == 1 else f"{self.name}-{index}"

    def shard(self, index: int) -> tuple[ScalingSpec, ...]:
        """The services of one shard, in their order; every service belongs to exactly one."""
        return self.services[index :: self.shards]


def load_live_config(path: Path) -> LiveConfig:
    """Read a live configuration; specs and engines are relative to the file, all other paths to the working folder.

    Raises:
        ConfigError: with the file, the field and what was expected.
    """
    data = read_yaml(path)
    if isinstance(data, dict) and isinstance(data.get("services"), list):
        data = {**data, "services": [_service(item, path, place) for place, item in enumerate(data["services"])]}
    return parse_model(data, LiveConfig, str(path))


def _service(item: object, path: Path, place: int) -> object:
    try:
        if isinstance(item, str):
            return load_spec(path.parent / item)
        if isinstance(item, dict):
            return {**item, "pools": resolve_engines(item.get("pools"), path.parent)}
    except ConfigError as error:
        raise ConfigError(f"{path}: field services.{place}: {error}") from None
    return item

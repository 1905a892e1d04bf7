"""Replicas and `max_ongoing_requests` of Ray Serve deployments, through Serve's declarative REST interface.

A PUT replaces the configuration of all applications and removes declared ones that it does not list, so what is
deployed is read, changed in the two places that are ours, and written back whole. The processes keep running: neither
the cap nor the count restarts a replica.
This module must not know how replicas are placed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from autoscaler.actuators.base import Access, FleetState, PartlyFailed, PoolName, pools_of, refuse_shared, wanted
from autoscaler.actuators.kuberay import KubeRayConfig, Ownership, RayServices, head_service
from autoscaler.actuators.serve_api import APPLICATIONS, Json, ServeApi, ServeConnection, ServeError, declared, entry_of
from autoscaler.actuators.starts import StartLedger, StartSpec
from policies.contract import Target
from policies.engine import StrictModel
from policies.names import NameTemplate
from policies.spec import ScalingSpec


class ServeTarget(StrictModel):
    """Which deployment serves a pool."""

    application: NameTemplate = Field(
        default="{service}", description="Application; {service} and {pool} are filled in."
    )
    deployment: NameTemplate = Field(default="{service}", description="Deployment; {service} and {pool} are filled in.")


class RayServeConfig(ServeConnection):
    """Replicas and caps of Ray Serve deployments."""

    kind: Literal["ray_serve"] = Field(default="ray_serve", description="Which actuator this is.")
    target: ServeTarget = Field(default=ServeTarget(), description="The deployment of pools without an own entry.")
    targets: dict[str, ServeTarget] = Field(default={}, description="Deployment by `service` or `service/pool`.")
    replicas: Literal["declared", "external", "none"] = Field(
        default="declared",
        description="Set num_replicas in the configuration; use the external scaler's endpoint, for applications with "
        "external_scaler_enabled; or leave counts to Serve (with `autoscaler.hosting.serve_policy.policy`).",
    )
    kuberay: KubeRayConfig | None = Field(
        default=None,
        description="Where a RayService that owns the cluster would be; looked for without it too where `address` is a "
        "head's Service of KubeRay.",
    )
    starts: StartSpec = Field(default=StartSpec(), description="How long a start may take.")

    def waits_s(self) -> dict[str, float]:
        """Longest waits of one reading of what is in force, by field, seconds."""
        owner = (self.kuberay or KubeRayConfig()).connection.deadline_s
        looks = self.kuberay is not None or head_service(str(self.address))[0]
        return {"deadline_s": self.deadline_s} | ({"kuberay.connection.deadline_s": owner} if looks else {})

    @model_validator(mode="after")
    def _names_the_ray_service(self) -> RayServeConfig:
        if self.kuberay is not None and self.kuberay.name is None and not head_service(str(self.address))[0]:
            raise ValueError("kuberay.name: needed, as address is no head's Service (NAME-head-svc.NAMESPACE)")
        return self


class RayServeActuator:
    """Sets replica counts and caps of `n` services.

    Args:
        config: where Serve is and what the services are called there.
        specs: the services.

    Raises:
        ConfigError: when the address names a secret that is not set, or two pools have one deployment.
    """

    def __init__(self, config: RayServeConfig, specs: Sequence[ScalingSpec]) -> None:
        self.config = config
        self._pools = pools_of(specs)
        self._starts = StartLedger(specs, config.starts)
        self._places = {pool: _place(config, pool) for pool in self._pools}
        refuse_shared({pool: self._where(pool) for pool in self._pools})
        self._api = ServeApi(config)
        self._services = RayServices(config.kuberay, self._api.root)

    def apply(self, target: Target) -> None:
        """Set what differs, all services in one write. Raises `PartlyFailed`."""
        targets = list(wanted(target, self._pools))
        if not targets:
            return
        try:
            details = self._api.details()
        except ServeError as error:
            raise PartlyFailed({pool.service: str(error) for pool, _, _ in targets}) from None
        failures: dict[str, str] = {}
        body = declared(details)
        before = copy.deepcopy(body)
        scales: list[tuple[PoolName, int, Json]] = []
        for pool, replicas, cap in targets:
            try:
                self._edit(pool, replicas, cap, details, body, scales)
            except ServeError as error:
                failures[pool.service] = str(error)
        try:
            if body != before:
                for _, replicas, entry in scales:  # a PUT carries counts out too, and later than the external scaler
                    entry["num_replicas"] = replicas
                self._api.ask("PUT", APPLICATIONS, body)
        except ServeError as error:
            raise PartlyFailed({pool.service: str(error) for pool, _, _ in targets}) from None
        for pool, replicas, _ in scales:
            application, deployment = self._places[pool]
            path = f"/api/v1/applications/{application}/deployments/{deployment}/scale"
            try:
                self._api.ask("POST", path, {"target_num_replicas": replicas})
            except ServeError as error:
                failures[pool.service] = str(error)
        if failures:
            raise PartlyFailed(failures)

    def state(self) -> FleetState:
        """What was asked for last, and what runs; Serve's autoscaler is another owner unless it asks our policy."""
        state = FleetState.unknown(self._pools)
        try:
            details = self._api.details()
        except ServeError as error:
            return replace(state, problems=(str(error),))
        cluster = self._services.ownership()
        owners, problems = [cluster.owner] * len(state.owners), [cluster.problem] if cluster.problem else []
        unread = tuple(range(len(owners))) if cluster.problem else ()
        for pool in self._pools:
            found = self._deployment(details, pool)
            if found is None:
                problems.append(f"{self._where(pool)}: not found")
                continue
            at = (pool.row, pool.column)
            states = [one["state"] for one in found.get("replicas", [])]
            ready = sum(one == "RUNNING" for one in states)
            count, cap = self._asked_for(details, pool)
            failed = details["applications"][self._places[pool][0]].get("status") == "DEPLOY_FAILED"
            if failed or details.get("target_capacity") is not None:
                count, cap = _running(found)  # Serve runs nothing, or a share only, of what was declared
            target = len(states) if count is None else count
            state.replicas_target[at] = target
            state.replicas_ready[at] = ready
            state.replicas_starting[at] = sum(one in ("STARTING", "UPDATING", "RECOVERING") for one in states)
            state.replicas_starting[at] = max(state.replicas_starting[at], target - ready)
            state.replicas_draining[at] = sum(one in ("STOPPING", "PENDING_MIGRATION") for one in states)
            state.batch_cap[at] = cap or np.nan
            scaler = found.get("deployment_config", {}).get("autoscaling_config") or {}
            function = str((scaler.get("policy") or {}).get("policy_function", ""))
            if scaler and "autoscaler.hosting.serve_policy" not in function and not owners[pool.row]:
                owners[pool.row] = f"Ray Serve's autoscaling_config of {self._where(pool)}"
        state = replace(state, owners=tuple(owners), problems=tuple(problems), owners_unread=unread)
        return self._starts.settle(state)

    def check(self) -> list[Access]:
        """Every deployment, how it was deployed, and whether this mode of scaling fits it."""
        try:
            details = self._api.details()
        except ServeError as error:
            return [Access(f"Ray Serve {self.config.address}", False, str(error))]
        lines = [Access(f"Ray Serve {self.config.address}", True, f"{len(details['applications'])} applications")]
        cluster = self._services.ownership()
        if cluster != Ownership():
            return [*lines, Access("the owner of the cluster", False, cluster.owner or cluster.problem)]
        body, state = declared(details), self.state()
        for pool in self._pools:
            at = (pool.row, pool.column)
            try:
                self._edit(pool, 1, 1, details, copy.deepcopy(body), [])
            except ServeError as error:
                lines.append(Access(self._where(pool), False, str(error)))
                continue
            if state.owners[pool.row]:
                lines.append(Access(self._where(pool), False, f"{state.owners[pool.row]} scales it too"))
                continue
            shown = f"replicas {state.replicas_target[at]:g}, ready {state.replicas_ready[at]:g}"
            lines.append(Access(self._where(pool), True, f"{shown}, max_ongoing_requests {state.batch_cap[at]:g}"))
        return lines

    def close(self) -> None:
        """Drop connections."""
        self._api.close()
        self._services.close()

    def _edit(
        self,
        pool: PoolName,
        replicas: int,
        cap: int,
        details: Json,
        body: Json,
        scales: list[tuple[PoolName, int, Json]],
    ) -> None:
        """Write one pool's target into the body; a count for the external scaler goes to `scales`, with its entry."""
        application, deployment = self._places[pool]
        found = self._deployment(details, pool)
        if found is None:
            raise ServeError(404, f"{self._where(pool)}: not found")
        config = next((one for one in body["applications"] if one["name"] == application), None)
        if config is None:
            raise ServeError(409, f"{self._where(pool)}: was started by serve.run; deploy it with `serve deploy`")
        external = bool(config.get("external_scaler_enabled"))
        if external != (self.config.replicas == "external") and self.config.replicas != "none":
            state = "true" if external else "false"
            raise ServeError(412, f"{self._where(pool)}: external_scaler_enabled is {state}, see `replicas`")
        entry = entry_of(config, deployment)
        count_now, cap_now = self._asked_for(details, pool)
        if cap_now != cap:
            entry["max_ongoing_requests"] = cap
        if count_now == replicas or self.config.replicas == "none":
            return
        if external:
            scales.append((pool, replicas, entry))
        elif found.get("deployment_config", {}).get("autoscaling_config"):
            raise ServeError(409, f"{self._where(pool)}: has an autoscaling_config; remove it, or set replicas: none")
        else:
            entry["num_replicas"] = replicas

    def _deployment(self, details: Json, pool: PoolName) -> Json | None:
        application, deployment = self._places[pool]
        found: Json | None = details["applications"].get(application, {}).get("deployments", {}).get(deployment)
        return found

    def _asked_for(self, details: Json, pool: PoolName) -> tuple[int | None, int | None]:
        """Count and cap of a deployment that is there, as they were declared last; what runs, where Serve sets them.

        Serve's controller carries a declaration out in its own loop, so what runs is older for a moment, and a target
        that sets back what was declared a moment ago would look as if nothing had to be done.
        """
        application, deployment = self._places[pool]
        around = details["applications"][application]
        found = around["deployments"][deployment]
        config = around.get("deployed_app_config") or {}
        entry: Json = next((one for one in config.get("deployments") or [] if one["name"] == deployment), {})
        count, cap = _running(found)
        # A count is not the declaration's where Serve's own autoscaler or an external one sets it.
        free = config.get("external_scaler_enabled") or found.get("deployment_config", {}).get("autoscaling_config")
        declared_count = entry.get("num_replicas")
        if isinstance(declared_count, int) and not free:
            count = declared_count
        return count, entry.get("max_ongoing_requests") or cap

    def _where(self, pool: PoolName) -> str:
        application, deployment = self._places[pool]
        return f"deployment {deployment} of application {application}"


def _running(deployment: Json) -> tuple[int | None, int | None]:
    """Target count and cap that Serve's controller works by."""
    settings = deployment.get("deployment_config", {})
    return deployment.get("target_num_replicas"), settings.get("max_ongoing_requests")


def _place(config: RayServeConfig, pool: PoolName) -> tuple[str, str]:
    target = config.targets.get(pool.label, config.target)
    return pool.render(target.application), pool.render(target.deployment)

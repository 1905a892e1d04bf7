"""Replicas and `max_ongoing_requests` of Ray Serve deployments, through Serve's declarative REST interface.

A PUT replaces the configuration of all applications and removes declared ones that it does not list, so what is
deployed is read, changed in the two places that are ours, and written back whole. The processes keep running: neither
the cap nor the count restarts a replica.
This module must not know how replicas are placed.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from autoscaler.actuators.base import Access, FleetState, PartlyFailed, PoolName, Refused, pools_of, wanted
from policies.contract import Target
from policies.engine import Positive, StrictModel
from policies.spec import ScalingSpec

FIRST_PAUSE_S = 0.2
RETRIED = (429, 500, 502, 503, 504)
APPLICATIONS = "/api/serve/applications/"
Json = dict[str, Any]


class ServeTarget(StrictModel):
    """Which deployment serves a pool."""

    application: str = Field(default="{service}", description="Application; {service} and {pool} are filled in.")
    deployment: str = Field(default="{service}", description="Deployment; {service} and {pool} are filled in.")


class RayServeConfig(StrictModel):
    """Replicas and caps of Ray Serve deployments."""

    kind: Literal["ray_serve"] = Field(default="ray_serve", description="Which actuator this is.")
    address: Annotated[str, Field(pattern=r"^https?://")] = Field(
        default="http://127.0.0.1:8265", description="Ray's dashboard."
    )
    target: ServeTarget = Field(default=ServeTarget(), description="The deployment of pools without an own entry.")
    targets: dict[str, ServeTarget] = Field(default={}, description="Deployment by `service` or `service/pool`.")
    replicas: Literal["declared", "external", "none"] = Field(
        default="declared",
        description="Set num_replicas in the configuration; use the external scaler's endpoint, for applications with "
        "external_scaler_enabled; or leave counts to Serve (with `autoscaler.hosting.serve_policy.policy`).",
    )
    token_env: str = Field(default="RAY_AUTH_TOKEN", description="Environment variable that may hold a Ray token.")
    token_file: Path | None = Field(default=None, description="File that holds a Ray token.")
    timeout_s: Positive = Field(default=5.0, description="Longest wait for one answer.")
    deadline_s: Positive = Field(default=15.0, description="Longest time for one operation, retries included.")


class ServeError(Refused):
    """Raised when Serve refused or did not answer."""


class RayServeActuator:
    """Sets replica counts and caps of `n` services.

    Args:
        config: where Serve is and what the services are called there.
        specs: the services.
    """

    def __init__(self, config: RayServeConfig, specs: Sequence[ScalingSpec]) -> None:
        import requests

        self.config = config
        self._pools = pools_of(specs)
        self._places = {pool: _place(config, pool) for pool in self._pools}
        self._session = requests.Session()

    def apply(self, target: Target) -> None:
        """Set what differs, all services in one write. Raises `PartlyFailed`."""
        targets = list(wanted(target, self._pools))
        if not targets:
            return
        try:
            details = self._details()
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
                self._ask("PUT", APPLICATIONS, body)
        except ServeError as error:
            raise PartlyFailed({pool.service: str(error) for pool, _, _ in targets}) from None
        for pool, replicas, _ in scales:
            application, deployment = self._places[pool]
            path = f"/api/v1/applications/{application}/deployments/{deployment}/scale"
            try:
                self._ask("POST", path, {"target_num_replicas": replicas})
            except ServeError as error:
                failures[pool.service] = str(error)
        if failures:
            raise PartlyFailed(failures)

    def state(self) -> FleetState:
        """What was asked for last, and what runs; Serve's autoscaler is another owner unless it asks our policy."""
        state = FleetState.unknown(self._pools)
        try:
            details = self._details()
        except ServeError as error:
            return replace(state, problems=(str(error),))
        owners, problems = [""] * len(state.owners), []
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
            if scaler and "autoscaler.hosting.serve_policy" not in function:
                owners[pool.row] = f"Ray Serve's autoscaling_config of {self._where(pool)}"
        return replace(state, owners=tuple(owners), problems=tuple(problems))

    def check(self) -> list[Access]:
        """Every deployment, how it was deployed, and whether this mode of scaling fits it."""
        try:
            details = self._details()
        except ServeError as error:
            return [Access(f"Ray Serve {self.config.address}", False, str(error))]
        lines = [Access(f"Ray Serve {self.config.address}", True, f"{len(details['applications'])} applications")]
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
        self._session.close()

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
        entry = _entry(config, deployment)
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

    def _details(self) -> Json:
        details = self._ask("GET", APPLICATIONS)
        if "applications" not in details:
            raise ServeError(0, f"{self.config.address}: no list of applications in the answer")
        return details

    def _ask(self, method: str, path: str, body: Json | None = None) -> Json:
        until_s, pause_s = time.monotonic() + self.config.deadline_s, FIRST_PAUSE_S
        while True:
            try:
                return self._once(method, path, body, until_s - time.monotonic())
            except ServeError as error:
                if error.status not in (0, *RETRIED) or time.monotonic() + pause_s >= until_s:
                    raise
            time.sleep(pause_s)
            pause_s *= 2

    def _once(self, method: str, path: str, body: Json | None, left_s: float) -> Json:
        import requests

        try:
            response = self._session.request(
                method,
                f"{self.config.address.rstrip('/')}{path}",
                json=body,
                headers=self._headers(),
                timeout=max(0.05, min(self.config.timeout_s, left_s)),
            )
            if response.status_code in (401, 403):
                raise ServeError(response.status_code, f"{self.config.address}: refused the token; set token_file")
            if response.status_code >= 400:
                raise ServeError(response.status_code, f"HTTP {response.status_code}: {response.text[:300]}")
            answer: Json = response.json() if response.text else {}
        except requests.RequestException as error:
            raise ServeError(0, f"{self.config.address}: {type(error).__name__}: {str(error)[:200]}") from None
        except ValueError:
            raise ServeError(0, f"{self.config.address}: the answer is cut short or no JSON") from None
        return answer

    def _headers(self) -> dict[str, str]:
        token = os.environ.get(self.config.token_env, "")
        file = self.config.token_file
        if file is None and not token:
            standard = Path.home() / ".ray" / "auth_token"  # where Ray itself writes and looks
            file = standard if standard.is_file() else None
        if file is not None:
            try:
                token = file.read_text(encoding="utf-8").strip()
            except OSError as error:
                raise ServeError(401, f"{file}: cannot be read: {error.strerror or error}") from None
        return {"Authorization": f"Bearer {token}"} if token else {}


def _running(deployment: Json) -> tuple[int | None, int | None]:
    """Target count and cap that Serve's controller works by."""
    settings = deployment.get("deployment_config", {})
    return deployment.get("target_num_replicas"), settings.get("max_ongoing_requests")


def declared(details: Json) -> Json:
    """What a PUT must hold to change nothing: every declared application, with externally set counts as they are.

    Args:
        details: Serve's answer to a GET of its applications.
    """
    applications = []
    for application in details["applications"].values():
        config = application.get("deployed_app_config")
        if config is None:
            continue  # started by serve.run: a PUT does not remove it
        config = copy.deepcopy(config)
        if config.get("external_scaler_enabled"):
            _keep_counts(config, application.get("deployments", {}))
        applications.append(config)
    body: Json = {"applications": applications}
    for key in ("proxy_location", "http_options", "grpc_options", "target_capacity"):
        if details.get(key) is not None:
            body[key] = details[key]
    return body


def _keep_counts(config: Json, deployments: Json) -> None:
    """A count set from outside is not in the declared configuration, and a PUT would set it back."""
    for name, found in deployments.items():
        entry = _entry(config, name)
        if found.get("target_num_replicas") is not None:
            entry["num_replicas"] = found["target_num_replicas"]


def _entry(config: Json, deployment: str) -> Json:
    """What a declared application says of a deployment; put there if it says nothing."""
    entries = config.setdefault("deployments", [])
    found: Json | None = next((one for one in entries if one["name"] == deployment), None)
    if found is None:
        found = {"name": deployment}
        entries.append(found)
    return found


def _place(config: RayServeConfig, pool: PoolName) -> tuple[str, str]:
    target = config.targets.get(pool.label, config.target)
    return pool.render(target.application), pool.render(target.deployment)

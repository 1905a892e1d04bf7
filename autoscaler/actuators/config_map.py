"""The batch cap as a key of a ConfigMap or an annotation of the pods' owner, for engines that watch one.

A projected ConfigMap reaches a running replica in up to about a minute; an environment variable never does.
This module must not know about replica counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from pydantic import Field

from autoscaler.actuators.base import Access, FleetState, PartlyFailed, PoolName, pools_of, wanted
from autoscaler.actuators.kube_api import KubeApi, KubeConnection, KubeError
from policies.contract import Target
from policies.engine import StrictModel
from policies.spec import ScalingSpec


class ConfigMapConfig(StrictModel):
    """Batch caps in ConfigMaps or annotations."""

    kind: Literal["config_map"] = Field(default="config_map", description="Which actuator this is.")
    connection: KubeConnection = Field(default=KubeConnection(), description="How to reach the API server.")
    namespace: str = Field(default="default", description="Namespace.")
    name: str = Field(default="{service}-jevons", description="Name; {service} and {pool} are filled in.")
    key: str = Field(default="batch_cap", description="Key, or annotation, that holds the cap.")
    place: Literal["config_map", "deployment_annotation"] = Field(
        default="config_map", description="A ConfigMap's data, or an annotation of the Deployment of that name."
    )


class ConfigMapActuator:
    """Writes batch caps of `n` services where engines read them.

    Args:
        config: where that is.
        specs: the services.

    Raises:
        KubeError: when there is no usable kubeconfig.
    """

    def __init__(self, config: ConfigMapConfig, specs: Sequence[ScalingSpec]) -> None:
        self.config = config
        self._pools = pools_of(specs)
        self._api = KubeApi(config.connection)

    def apply(self, target: Target) -> None:
        """Write the caps that differ; a ConfigMap that is not there is made. Raises `PartlyFailed`."""
        failures: dict[str, str] = {}
        for pool, _, cap in wanted(target, self._pools):
            try:
                if self._read(pool) != cap:
                    self._write(pool, cap)
            except KubeError as error:
                failures[pool.service] = f"{self._path(pool)}: {error}"
        if failures:
            raise PartlyFailed(failures)

    def state(self) -> FleetState:
        """Caps in force; NaN where none is written."""
        state, problems = FleetState.unknown(self._pools), []
        for pool in self._pools:
            try:
                cap = self._read(pool)
            except KubeError as error:
                problems.append(f"{self._path(pool)}: {error}")
                continue
            if cap is not None:
                state.batch_cap[pool.row, pool.column] = cap
        return replace(state, problems=tuple(problems))

    def check(self) -> list[Access]:
        """Rights by the server's own word, and what is written now."""
        maps = self.config.place == "config_map"
        group, resource = ("", "configmaps") if maps else ("apps", "deployments")
        lines = []
        for verb in ("get", "patch", *(("create",) if maps else ())):
            what = f"may {verb} {resource} in {self.config.namespace}"
            try:
                ok = self._api.allowed(verb, group, resource, "", self.config.namespace)
                lines.append(Access(what, ok, "" if ok else "not granted: bind a Role that allows it"))
            except KubeError as error:
                lines.append(Access(what, False, str(error)))
        for pool in self._pools:
            try:
                cap = self._read(pool)
                lines.append(Access(self._path(pool), True, f"cap {cap}" if cap else "no cap is written yet"))
            except KubeError as error:
                lines.append(Access(self._path(pool), False, str(error)))
        return lines

    def close(self) -> None:
        """Drop connections."""
        self._api.close()

    def _read(self, pool: PoolName) -> int | None:
        try:
            found = self._api.get(self._path(pool))
        except KubeError as error:
            if error.status == 404 and self.config.place == "config_map":
                return None
            raise
        place = found.get("data") if self.config.place == "config_map" else found["metadata"].get("annotations")
        text = (place or {}).get(self.config.key, "")
        return int(text) if text.isdigit() else None

    def _write(self, pool: PoolName, cap: int) -> None:
        value = {self.config.key: str(cap)}
        if self.config.place != "config_map":
            self._api.merge(self._path(pool), {"metadata": {"annotations": value}})
            return
        try:
            self._api.merge(self._path(pool), {"data": value})
        except KubeError as error:
            if error.status != 404:
                raise
            name = pool.render(self.config.name)
            folder = self._path(pool).rpartition("/")[0]
            body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": value}
            self._api.post(folder, body)

    def _path(self, pool: PoolName) -> str:
        root = "/api/v1" if self.config.place == "config_map" else "/apis/apps/v1"
        kind = "configmaps" if self.config.place == "config_map" else "deployments"
        return f"{root}/namespaces/{self.config.namespace}/{kind}/{pool.render(self.config.name)}"

"""The batch cap as a key of a ConfigMap or an annotation of the pods' owner, for engines that watch one.

A projected ConfigMap reaches a running replica in up to about a minute; an environment variable never does.
This module must not know about replica counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from pydantic import Field

from autoscaler.actuators.base import Access, FleetState, PartlyFailed, PoolName, pools_of, refuse_shared, wanted
from autoscaler.actuators.kube_api import Json, KubeApi, KubeConnection, KubeError, Needed, parsed, rights
from autoscaler.actuators.kube_paths import path_of
from policies.contract import Target
from policies.engine import StrictModel
from policies.json_text import read_integer
from policies.names import Key, Name, NameTemplate
from policies.spec import ScalingSpec


class ConfigMapConfig(StrictModel):
    """Batch caps in ConfigMaps or annotations."""

    kind: Literal["config_map"] = Field(default="config_map", description="Which actuator this is.")
    connection: KubeConnection = Field(default=KubeConnection(), description="How to reach the API server.")
    namespace: Name = Field(default="default", description="Namespace.")
    name: NameTemplate = Field(default="{service}-jevons", description="Name; {service} and {pool} are filled in.")
    key: Key = Field(default="batch_cap", description="Key, or annotation, that holds the cap.")
    place: Literal["config_map", "deployment_annotation"] = Field(
        default="config_map", description="A ConfigMap's data, or an annotation of the Deployment of that name."
    )

    def waits_s(self) -> dict[str, float]:
        """Longest waits of one reading of what is in force, by field, seconds."""
        return {"connection.deadline_s": self.connection.deadline_s}


class ConfigMapActuator:
    """Writes batch caps of `n` services where engines read them.

    Args:
        config: where that is.
        specs: the services.

    Raises:
        ConfigError: when two pools have one object.
        KubeError: when there is no usable kubeconfig.
    """

    def __init__(self, config: ConfigMapConfig, specs: Sequence[ScalingSpec]) -> None:
        self.config = config
        self._pools = pools_of(specs)
        refuse_shared({pool: self._path(pool) for pool in self._pools})
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
        with self._api.one_operation():
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
        lines, missing = [], False
        for pool in self._pools:
            name = pool.render(self.config.name)
            needed = [Needed(verb, group, resource, "", name) for verb in ("get", "patch")]
            lines += rights(self._api, needed, self.config.namespace)
            try:
                cap = self._read(pool)
                lines.append(Access(self._path(pool), True, f"cap {cap}" if cap else "no cap is written yet"))
                missing |= maps and self._object(pool) is None
            except KubeError as error:
                lines.append(Access(self._path(pool), False, str(error)))
        if missing:  # the right to make one cannot be given by name
            lines += rights(self._api, [Needed("create", group, resource)], self.config.namespace)
        return lines

    def close(self) -> None:
        """Drop connections."""
        self._api.close()

    def _object(self, pool: PoolName) -> Json | None:
        """The ConfigMap, None where it is not there, or the Deployment. Raises `KubeError`."""
        try:
            return self._api.get(self._path(pool))
        except KubeError as error:
            if error.status == 404 and self.config.place == "config_map":
                return None
            raise

    def _read(self, pool: PoolName) -> int | None:
        found = self._object(pool) or {"metadata": {}}
        with parsed():
            place = found.get("data") if self.config.place == "config_map" else found["metadata"].get("annotations")
            text = (place or {}).get(self.config.key, "")
            return read_integer(text) if text.isdecimal() and text.isascii() else None

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
        kind = ("v1", "configmaps") if self.config.place == "config_map" else ("apps/v1", "deployments")
        return path_of(kind[0], self.config.namespace, kind[1], pool.render(self.config.name))

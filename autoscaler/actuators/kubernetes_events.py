"""Kubernetes Events about a scaled object, for `kubectl describe` and whoever collects them.

https://kubernetes.io/docs/reference/kubernetes-api/cluster-resources/event-v1/
This module must not know what is worth an event.
"""

from __future__ import annotations

import os
import socket
import time
from datetime import UTC, datetime

from autoscaler.actuators.base import Announcement
from autoscaler.actuators.kube_api import Json, KubeApi, KubeError
from autoscaler.actuators.kube_paths import path_of

REPORTER = "jevons.dev/autoscaler"
MAX_NOTE = 1000
"""Characters; the API takes 1,024 bytes."""


class EventWriter:
    """Writes Events.

    Args:
        api: the server.
    """

    def __init__(self, api: KubeApi) -> None:
        self._api = api
        self._instance = f"{socket.gethostname()[:100]}/{os.getpid()}"
        self._written = 0
        self._kinds: dict[tuple[str, str], str] = {}

    def kind(self, group_version: str, plural: str) -> str:
        """The name of a kind, asked of the server once. Raises `KubeError`."""
        if (group_version, plural) not in self._kinds:
            for one in self._api.get(f"/apis/{group_version}").get("resources") or ():
                self._kinds[group_version, str(one.get("name"))] = str(one.get("kind"))
        try:
            return self._kinds[group_version, plural]
        except KeyError:
            raise KubeError(404, f"{group_version} has no {plural}") from None

    def write(self, regarding: Json, told: Announcement) -> None:
        """Write one.

        Args:
            regarding: the object: `apiVersion`, `kind`, `namespace`, `name`, and `uid` where it is known.
            told: what happened, and when: it may have waited for the server.

        Raises:
            KubeError: when the server refuses or does not answer.
        """
        at, self._written = datetime.fromtimestamp(told.at_s, UTC), self._written + 1
        name = f"{regarding['name'][:200]}.{int(time.time() * 1e6):x}-{self._written:x}"
        body = {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {"name": name, "namespace": regarding["namespace"]},
            "eventTime": at.isoformat(timespec="microseconds").replace("+00:00", "Z"),
            "reportingController": REPORTER,
            "reportingInstance": self._instance,
            "action": "Hold" if told.warning else "Scale",
            "reason": told.reason,
            "regarding": regarding,
            "note": told.note.encode("ascii", "replace").decode()[:MAX_NOTE],
            "type": "Warning" if told.warning else "Normal",
        }
        try:
            self._api.post(path_of("events.k8s.io/v1", regarding["namespace"], "events"), body)
        except KubeError as error:
            if error.status != 409:  # an answer was lost, and it was written already
                raise

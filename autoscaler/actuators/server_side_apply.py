"""`spec.replicas` declared to be ours, by server-side apply with a field manager, so that others can see who owns it.

https://kubernetes.io/docs/reference/using-api/server-side-apply/
This module must not know about services or targets.
"""

from __future__ import annotations

from autoscaler.actuators.kube_api import Json, KubeApi, KubeError, parsed
from autoscaler.actuators.kubernetes_owners import MANAGER, OwnReplicas, declaring

KIND_NAMES = {"deployments": "Deployment", "statefulsets": "StatefulSet", "leaderworkersets": "LeaderWorkerSet"}
"""Kinds by plural."""


def declare_replicas(api: KubeApi, path: str, replicas: int, own: OwnReplicas, dry_run: bool = False) -> None:
    """Declare the count of the object at `path`, `/apis/GROUP/VERSION/namespaces/NAMESPACE/PLURAL/NAME`.

    What somebody has set without declaring it, such as by `kubectl scale`, is put back. Against another manager that
    declares it too, the count is only taken with `own` = "force".

    Raises:
        KubeError: with status 409 and the other manager's name where somebody else declares the count.
    """
    _, _, group, version, _, namespace, plural, name = path.split("/")
    body: Json = {
        "apiVersion": f"{group}/{version}",
        "kind": KIND_NAMES[plural],
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"replicas": replicas},
    }
    query = {"fieldManager": MANAGER, "dryRun": "All" if dry_run else ""}
    try:
        api.apply(path, body, force="true" if own == "force" else "", **query)
    except KubeError as error:
        if error.status != 409 or own == "force":
            raise
        found = api.get(path)
        with parsed():
            others = declaring(found)
        if others:
            raise KubeError(409, f"{others[-1]} declares spec.replicas too") from None
        api.apply(path, body, force="true", **query)

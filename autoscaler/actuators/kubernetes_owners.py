"""Who has a say in an object's replica count, by what the object itself says: git, KServe, another controller.

From its managed fields, labels and owner references.
HorizontalPodAutoscalers and ScaledObjects name their target themselves; they are read elsewhere.
This module must not know what is wanted, nor change anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from autoscaler.actuators.base import PoolName
from autoscaler.actuators.kube_api import Json, KubeApi, KubeError
from autoscaler.actuators.kube_paths import path_of
from autoscaler.actuators.kubernetes_pods import plain
from policies.json_text import read_json

MANAGER = "jevons"
"""Field manager of everything that is written here."""
OwnReplicas = bool | Literal["force"]
"""Whether `spec.replicas` is declared to be ours, and whether even where somebody else declares it too."""
GIT = {
    "argocd-controller": "Argo CD",
    "argocd-application-controller": "Argo CD",
    "kustomize-controller": "Flux",
    "helm-controller": "Flux",
}
"""Field managers that put back what is in git."""
GIT_MARKS = {
    "argocd.argoproj.io/instance": "Argo CD",
    "argocd.argoproj.io/tracking-id": "Argo CD",
    "kustomize.toolkit.fluxcd.io/name": "Flux",
    "helm.toolkit.fluxcd.io/name": "Flux",
}
"""Labels and annotations of what comes from git."""
LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
AUTOSCALER_CLASS = "serving.kserve.io/autoscalerClass"


class Setter(NamedTuple):
    """One field manager of `spec.replicas`."""

    time: str
    manager: str
    operation: str


@dataclass(frozen=True)
class Claim:
    """Who else has a say in one object's count, each in one sentence, empty where there is nobody.

    Attributes:
        owner: somebody against whom nothing is written, and the way out.
        remark: somebody who may be against it.
        author: who set the count in force, as far as that is known.
        unread: whether it could not be read who owns it.
        ours: whether it is declared to be ours.
    """

    owner: str = ""
    remark: str = ""
    author: str = ""
    unread: bool = False
    ours: bool = False


class ClaimReader:
    """Reads claims, and remembers who had set a count at the reading before.

    Args:
        api: the server.
        own: whether the count is declared to be ours.
    """

    def __init__(self, api: KubeApi, own: OwnReplicas) -> None:
        self._api = api
        self._own = own
        self._last: dict[PoolName, tuple[int, Setter | None, str]] = {}

    def read(self, pool: PoolName, item: Json | None, problems: list[str]) -> Claim:
        """Claims on a pool's object; none where the object was not read, or is of a kind of which only /scale is."""
        if item is None:
            return Claim()
        try:
            return self._read(pool, item)
        except KubeError as error:
            problems.append(f"who owns the replicas of {pool.label}: {error}")
        except Exception as error:  # whatever is written into one object leaves the others readable
            problems.append(f"who owns the replicas of {pool.label}: the object does not parse: {plain(repr(error))}")
        return Claim(unread=True)

    def _read(self, pool: PoolName, item: Json) -> Claim:
        setters = sorted(_setters(item))
        kind, name = _controller(item)
        author = self._author(pool, int(item["spec"].get("replicas", 1)), setters[-1] if setters else None)
        remark, ours = "", any(one.manager == MANAGER and one.operation == "Apply" for one in setters)
        if kind:
            whose = plain(f"{kind} {name}")
            author = author or f"perhaps the controller of {whose}"
            remark = f"belongs to {whose}, whose controller may set the replicas back: scale that if it has /scale"
        if kind == "InferenceService":
            return Claim(self._kserve(item, name), author=author, ours=ours)
        return Claim(self._declared(item, setters), remark, author, ours=ours)

    def _author(self, pool: PoolName, count: int, newest: Setter | None) -> str:
        """The manager that wrote since the last reading. Old servers do not note who writes /scale."""
        last_count, last_setter, author = self._last.get(pool, (count, newest, ""))
        if newest is not None and newest != last_setter:
            author = "" if newest.manager == MANAGER else newest.manager
        elif count != last_count:
            author = ""
        self._last[pool] = (count, newest, author)
        return author

    def _declared(self, item: Json, setters: list[Setter]) -> str:
        """Whoever declares the count, and puts it back where it differs."""
        if self._own == "force":
            return ""
        by_git = [(GIT[one.manager], f"field manager {one.manager}") for one in setters if one.manager in GIT]
        if not by_git:
            metadata = item["metadata"]
            marks = {**(metadata.get("labels") or {}), **(metadata.get("annotations") or {})}
            found = [(tool, f"it carries {mark}") for mark, tool in GIT_MARKS.items() if mark in marks]
            by_git = found if found and "replicas" in _last_applied(item).get("spec", {}) else []
        if by_git:
            tool, sign = by_git[0]
            way = "ignoreDifferences of /spec/replicas" if tool == "Argo CD" else "no replicas in git"
            return (
                f"git owns replicas, through {tool} ({sign}): give {tool} {way} and set own_replicas: force, or stay "
                "in mode advise"
            )
        others = declaring(item)
        if self._own and others:
            return (
                f"{others[-1]} declares spec.replicas by server-side apply: take replicas out of what it applies, or "
                "set own_replicas: force"
            )
        return ""

    def _kserve(self, item: Json, name: str) -> str:
        """KServe's controller sets the replicas of its Deployments back unless it is told who scales."""
        found = _annotation(item, AUTOSCALER_CLASS)
        if not found:
            path = path_of("serving.kserve.io/v1beta1", _namespace(item), "inferenceservices", name)
            try:
                found = _annotation(self._api.get(path), AUTOSCALER_CLASS)
            except KubeError as error:
                if error.status != 404:
                    raise
                return ""
        if found == "external":
            return ""
        return (
            f"InferenceService {_namespace(item)}/{name} sets the replicas back: annotate it with "
            f"{AUTOSCALER_CLASS}=external, or stay in mode advise"
        )


def declaring(item: Json) -> list[str]:
    """Other managers that declare an object's count by server-side apply, the newest last."""
    return [one.manager for one in sorted(_setters(item)) if one.operation == "Apply" and one.manager != MANAGER]


def _setters(item: Json) -> Iterator[Setter]:
    for entry in item["metadata"].get("managedFields") or ():
        if "f:replicas" in ((entry.get("fieldsV1") or {}).get("f:spec") or {}):
            yield Setter(str(entry.get("time", "")), str(entry.get("manager", "")), str(entry.get("operation", "")))


def _controller(item: Json) -> tuple[str, str]:
    """Kind and name of the object whose controller made this one; empty where there is none."""
    for owner in item["metadata"].get("ownerReferences") or ():
        if owner.get("controller"):
            return str(owner["kind"]), str(owner["name"])
    return "", ""


def _last_applied(item: Json) -> Json:
    """What `kubectl apply`, and who works as it does, applied last. Raises when it cannot be read."""
    return dict(read_json(_annotation(item, LAST_APPLIED) or "{}"))


def _annotation(item: Json, name: str) -> str:
    return str((item["metadata"].get("annotations") or {}).get(name, ""))


def _namespace(item: Json) -> str:
    return str(item["metadata"]["namespace"])

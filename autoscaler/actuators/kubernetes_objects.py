"""What a Kubernetes API server says is there: scaled objects, their replicas, and who else scales them.

This module must not know what is wanted, nor change anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from autoscaler.actuators.base import PoolName
from autoscaler.actuators.kube_api import Json, KubeApi, KubeError, Needed, parsed
from autoscaler.actuators.kube_paths import path_of
from autoscaler.actuators.kube_watch import KubeWatch
from autoscaler.actuators.kubernetes_pods import Replica, groups, plain, read_pod
from autoscaler.actuators.label_selectors import LabelSelector, covering
from autoscaler.actuators.pod_controllers import Parent, strangers
from policies.engine import StrictModel
from policies.json_text import read_integer
from policies.names import Name, NameTemplate

OWNERS = (("autoscaling", "horizontalpodautoscalers"), ("keda.sh", "scaledobjects"))
"""Other autoscalers: groups and plurals."""
FEW = 32
"""Objects of one kind in one namespace that are read by name; more are listed."""


class Resource(StrictModel):
    """A kind that has a scale subresource."""

    group: Name = Field(default="apps", description="API group.")
    version: Name = Field(default="v1", description="API version.")
    plural: Name = Field(default="deployments", description="Plural of the kind, as in paths.")

    @property
    def known(self) -> bool:
        """Whether it is known what such an object says of its replicas."""
        return any((one.group, one.plural) == (self.group, self.plural) for one in KINDS.values())

    def path(self, namespace: str, name: str = "") -> str:
        """Where the objects, or one of them, are."""
        return path_of(f"{self.group}/{self.version}", namespace, self.plural, *([name] if name else []))


KINDS: dict[str, Resource] = {
    "deployment": Resource(),
    "statefulset": Resource(plural="statefulsets"),
    "leaderworkerset": Resource(group="leaderworkerset.x-k8s.io", plural="leaderworkersets"),
}


class ScaleTarget(StrictModel):
    """Which object holds a pool's replica count."""

    namespace: Name = Field(default="default", description="Namespace.")
    name: NameTemplate = Field(default="{service}", description="Name; {service} and {pool} are filled in.")
    resource: Literal["deployment", "statefulset", "leaderworkerset"] | Resource = Field(
        default="deployment", description="Kind: a known one, or group, version and plural of one with /scale."
    )

    @property
    def kind(self) -> Resource:
        """Group, version and plural."""
        return KINDS[self.resource] if isinstance(self.resource, str) else self.resource


@dataclass(frozen=True)
class ScaleStatus:
    """What one pool's object says of itself.

    Attributes:
        target: replicas asked for.
        count: replicas that there are, ready or not.
        ready: None where the object does not say it.
        selector: of its pods.
        parent: whose pods are counted.
        group_size: pods of one replica.
        failure: why it cannot make more of them, in its own words.
        gpus: GPUs of one replica as its template asks for them; 0 where it asks for none.
    """

    target: int
    count: int
    ready: int | None
    selector: LabelSelector
    parent: Parent
    group_size: int = 1
    failure: str = ""
    gpus: int = 0


@dataclass(frozen=True)
class PoolObjects:
    """What there is of one pool.

    Attributes:
        scale: None where the object was not found.
        replicas: None where they are not known.
        owner: another autoscaler that acts on the object, in words; empty where there is none.
        owner_unread: whether it could not be read who else acts on it.
        item: the object as the server gave it; None where it was not found, or only its scale is read.
    """

    scale: ScaleStatus | None
    replicas: list[Replica] | None
    owner: str
    owner_unread: bool
    item: Json | None = None


class ObjectReader:
    """Reads the objects of all pools; their pods are watched.

    Args:
        api: the server.
        targets: which object holds a pool's count.
        names: names of these objects, rendered.
    """

    def __init__(self, api: KubeApi, targets: Mapping[PoolName, ScaleTarget], names: Mapping[PoolName, str]) -> None:
        self._api = api
        self._targets = targets
        self._names = names
        self._watches: dict[tuple[str, str], KubeWatch[Replica]] = {}  # by namespace and selector
        self._scales: dict[PoolName, ScaleStatus] = {}

    def read(self, problems: list[str]) -> dict[PoolName, PoolObjects]:
        """What there is of every pool; `problems` is told what could not be read."""
        objects, scales = self._objects(problems)
        for pool, target in self._targets.items():
            item = objects.get((target.namespace, target.kind.plural, self._names[pool]))
            if item is not None:
                with _named(self.where(pool), problems):
                    scales[pool] = _read_object(item, target.kind)
        self._scales = scales
        pods = self._pods(scales, problems)
        foreign, unread = self._foreign(problems)
        found = {}
        for pool, target in self._targets.items():
            key = (target.namespace, target.kind.plural, self._names[pool])
            found[pool] = PoolObjects(
                scales.get(pool),
                pods.get(pool),
                foreign.get(key, ""),
                target.namespace in unread,
                objects.get(key),
            )
        return found

    def replicas_now(self, pool: PoolName) -> list[Replica]:
        """A pool's replicas as they are at this moment, asked of the server.

        Raises:
            KubeError: when they cannot be listed, or none of what there is can be told to be its own.
        """
        scale = self._scales.get(pool)
        if scale is None or not scale.selector.requirements:
            raise KubeError(0, "its pods are not known")
        path = path_of("v1", self._targets[pool].namespace, "pods")
        problems: list[str] = []
        with _named(path, problems):
            pods = [read_pod(one) for one in self._api.items(path, **_selecting(scale.selector.text()))]
            found, others = _replicas(pods, scale)
            if found or not others or not scale.count:
                return found
            problems.append(others)
        raise KubeError(0, problems[0])

    def where(self, pool: PoolName) -> str:
        """A pool's object in words."""
        target = self._targets[pool]
        return f"{target.kind.plural}/{self._names[pool]} in {target.namespace}"

    def needed(self) -> dict[str, list[Needed]]:
        """The rights that `read` uses, by namespace."""
        found: dict[str, list[Needed]] = {}
        for namespace, kind, names in self._places():
            rights = found.setdefault(namespace, [])
            if not kind.known:
                rights += [Needed("get", kind.group, kind.plural, "scale", name) for name in names]
            elif len(names) > FEW:
                rights.append(Needed("list", kind.group, kind.plural))
            else:
                rights += [Needed("get", kind.group, kind.plural, "", name) for name in names]
        for rights in found.values():
            rights += [Needed(verb, "", "pods") for verb in ("list", "watch")]
            rights += [Needed("list", group, plural) for group, plural in OWNERS]
        return found

    def close(self) -> None:
        """End the watches."""
        for watch in self._watches.values():
            watch.close()

    def _places(self) -> list[tuple[str, Resource, list[str]]]:
        """Namespace, kind and names of all objects."""
        found: dict[tuple[str, str], tuple[str, Resource, list[str]]] = {}
        for pool, target in self._targets.items():
            kind = target.kind
            place = found.setdefault((target.namespace, f"{kind.group}/{kind.plural}"), (target.namespace, kind, []))
            place[2].append(self._names[pool])
        return [found[key] for key in sorted(found)]

    def _objects(self, problems: list[str]) -> tuple[dict[tuple[str, str, str], Json], dict[PoolName, ScaleStatus]]:
        """Objects of known kinds by (namespace, plural, name), and the scale of each pool of another kind."""
        objects: dict[tuple[str, str, str], Json] = {}
        scales: dict[PoolName, ScaleStatus] = {}
        for namespace, kind, names in self._places():
            if not kind.known:
                continue
            with _named(f"{kind.plural} in {namespace}", problems):
                for item in self._named_items(kind, namespace, names, problems):
                    objects[namespace, kind.plural, item["metadata"]["name"]] = item
        for pool, target in self._targets.items():
            if not target.kind.known:
                with _named(self.where(pool), problems):
                    path = target.kind.path(target.namespace, self._names[pool])
                    scales[pool] = _read_scale(self._api.get(f"{path}/scale"))
        return objects, scales

    def _named_items(self, kind: Resource, namespace: str, names: Sequence[str], problems: list[str]) -> Iterable[Json]:
        """The named objects, or all of the namespace where that is cheaper; `problems` is told which are not there."""
        if len(names) > FEW:
            listed = self._api.items(kind.path(namespace))
            absent = sorted(set(names) - {item["metadata"]["name"] for item in listed})
            problems += [f"{kind.plural}/{name} in {namespace}: not found" for name in absent]
            return listed
        found = []
        for name in names:
            try:
                found.append(self._api.get(kind.path(namespace, name)))
            except KubeError as error:
                if error.status not in (403, 404):  # the others may be there, and allowed
                    raise
                problems.append(f"{kind.plural}/{name} in {namespace}: {error}")
        return found

    def _pods(self, scales: Mapping[PoolName, ScaleStatus], problems: list[str]) -> dict[PoolName, list[Replica]]:
        """The replicas of each pool, without the pools whose pods cannot be watched."""
        found: dict[PoolName, list[Replica]] = {}
        wanted = set()
        for namespace in sorted({target.namespace for target in self._targets.values()}):
            pools = [pool for pool in scales if self._targets[pool].namespace == namespace]
            texts = covering({scales[pool].selector for pool in pools})
            pods: dict[str, list[Replica]] = {}
            for text in sorted(set(texts.values())):
                wanted.add((namespace, text))
                try:
                    pods[text] = self._watch(namespace, text).read()
                except KubeError as error:
                    problems.append(f"pods in {namespace} ({plain(text)}): {error}")
            for pool in pools:
                selector = scales[pool].selector
                seen = pods.get(texts.get(selector, ""))
                if seen is not None:
                    matching = [one for one in seen if selector.matches(one.labels)]
                    found[pool], others = _replicas(matching, scales[pool])
                    problems += [f"{self.where(pool)}: {others}"] if others else []
        # Where no object could be read it is not known what is wanted.
        known = {self._targets[pool].namespace for pool in scales}
        for key in [key for key in self._watches if key not in wanted and key[0] in known]:
            self._watches.pop(key).close()
        return found

    def _watch(self, namespace: str, text: str) -> KubeWatch[Replica]:
        if (namespace, text) not in self._watches:
            path = path_of("v1", namespace, "pods")
            self._watches[namespace, text] = KubeWatch(self._api, path, read_pod, _selecting(text))
        return self._watches[namespace, text]

    def _foreign(self, problems: list[str]) -> tuple[dict[tuple[str, str, str], str], set[str]]:
        """Other autoscalers by (namespace, plural, name) of what they scale, and namespaces where they are unknown."""
        found: dict[tuple[str, str, str], str] = {}
        unread: set[str] = set()
        plurals = {"Deployment": "deployments", "StatefulSet": "statefulsets", "LeaderWorkerSet": "leaderworkersets"}
        places = {
            # v1 is served by every release; it names the target as the newer versions do.
            "HorizontalPodAutoscaler": ("autoscaling/v1", "horizontalpodautoscalers"),
            "ScaledObject": ("keda.sh/v1alpha1", "scaledobjects"),
        }
        for namespace in sorted({target.namespace for target in self._targets.values()}):
            for what, (group_version, plural) in places.items():
                try:
                    items = self._api.items(path_of(group_version, namespace, plural))
                except KubeError as error:
                    if error.status != 404:  # else it is not installed
                        problems.append(f"{what}s in {namespace}: {error}")
                        unread.add(namespace)
                    continue
                told = len(problems)
                with _named(f"{what}s in {namespace}", problems):
                    for item in items:
                        scaled = item["spec"].get("scaleTargetRef") or {}
                        kind = scaled.get("kind", "Deployment")
                        whose = plurals.get(kind, f"{kind.lower()}s")
                        owner = f"{what} {namespace}/{item['metadata']['name']}"
                        found[namespace, whose, scaled.get("name", "")] = owner
                if len(problems) > told:
                    unread.add(namespace)
        return found, unread


def _read_object(item: Json, kind: Resource) -> ScaleStatus:
    """A Deployment, StatefulSet or LeaderWorkerSet."""
    spec, status = item["spec"], item.get("status") or {}
    selector, size, templates = LabelSelector.of(spec.get("selector") or {}), 1, [(spec.get("template"), 1)]
    if "leaderWorkerTemplate" in spec:
        group = spec["leaderWorkerTemplate"]
        size = int(group.get("size", 1))
        selector = LabelSelector.of({"matchLabels": {"leaderworkerset.sigs.k8s.io/name": item["metadata"]["name"]}})
        worker = group.get("workerTemplate")
        templates = [(group.get("leaderTemplate") or worker, 1), (worker, size - 1)]
    conditions = {one["type"]: one for one in status.get("conditions") or ()}
    failed: Json = conditions.get("ReplicaFailure") or {}
    return ScaleStatus(
        target=int(spec.get("replicas", 1)),
        count=int(status.get("replicas") or 0),
        ready=int(status.get("readyReplicas") or 0),
        selector=selector,
        parent=_parent(item, kind.plural),
        group_size=size,
        failure=plain(f"{failed['reason']}: {failed['message']}") if failed.get("status") == "True" else "",
        gpus=sum(_gpus(template or {}) * count for template, count in templates),
    )


def _read_scale(scale: Json) -> ScaleStatus:
    """A scale subresource, which counts replicas but not ready ones: those are counted from the pods."""
    status = scale.get("status") or {}
    selector = LabelSelector.parse(str(status.get("selector") or ""))
    target, count = int((scale.get("spec") or {}).get("replicas", 0)), int(status.get("replicas") or 0)
    return ScaleStatus(target, count, None, selector, _parent(scale, ""))


def _parent(item: Json, plural: str) -> Parent:
    return Parent(plural, str(item["metadata"]["name"]), str(item["metadata"].get("uid", "")))


def _gpus(template: Json) -> int:
    """GPUs of one pod: whatever is counted under a name like `nvidia.com/gpu`."""
    containers = (template.get("spec") or {}).get("containers") or ()
    limits = [(one.get("resources") or {}).get("limits") or {} for one in containers]
    return sum(read_integer(str(count)) for one in limits for name, count in one.items() if name.endswith("/gpu"))


def _replicas(pods: list[Replica], scale: ScaleStatus) -> tuple[list[Replica], str]:
    """The replicas among pods that the selector matches, and what there is to say of the others."""
    own = [pod for pod in pods if scale.parent.owns(pod)]
    others = strangers((pod for pod in pods if not scale.parent.owns(pod)), scale.selector.text())
    return groups(own, scale.group_size) if scale.group_size > 1 else own, others


def _selecting(text: str) -> dict[str, str]:
    return {"labelSelector": text}


@contextmanager
def _named(where: str, problems: list[str]) -> Iterator[None]:
    """What the server refuses, or answers in another shape, becomes a problem that names the place."""
    try:
        with parsed():
            yield
    except KubeError as error:
        problems.append(f"{where}: {error}")

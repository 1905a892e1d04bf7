"""The part of a cluster that a bare API server lacks: starts, readies and removes replicas of one Deployment.

Each replica is an emulated engine on a loopback address of its own, in this process; Prometheus is told of it.
"""

from __future__ import annotations

import asyncio
import threading
import time

from aiohttp import web
from kube_objects import DEPLOYMENTS, PODS, delete, kube_api, played_pod
from kube_server import KubeApiServer
from servers import Prometheus, free_port

from autoscaler.actuators.kubernetes_pods import DELETION_COST
from autoscaler.emulation.engine import EmulatedEngine
from autoscaler.emulation.server import EngineServer
from policies.engine import EngineProfile

LOOK_S = 0.3


class PlayedFleet:
    """Plays scheduler and kubelet for the Deployment `service`.

    Args:
        kube: the API server.
        prometheus: scrapes the replicas.
        service: name of the Deployment, and label of the series.
        profile: of the engines.
        boot_s: seconds from the start of a replica to its readiness.
        port: of every replica; any free one when left out.
    """

    def __init__(
        self,
        kube: KubeApiServer,
        prometheus: Prometheus,
        service: str,
        profile: EngineProfile,
        boot_s: float,
        port: int | None = None,
    ) -> None:
        self.port = port or free_port()
        self.service = service
        self.killed_with_requests = 0
        self.most = 0
        self.paid_s = 0.0
        """Replica-seconds so far, from the start of a replica until its last request is answered."""
        self.boot_s = boot_s
        self._prometheus, self._profile = prometheus, profile
        self._api = kube_api(kube)
        self._engines: dict[str, tuple[web.AppRunner, EngineServer]] = {}
        self._leaving: list[tuple[web.AppRunner, EngineServer]] = []
        self._ready: set[str] = set()
        self._next = 1
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._play()), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(30.0)
        self._api.close()

    async def _play(self) -> None:
        looked_s = time.monotonic()
        while not self._stop.is_set():
            await self._look()
            await asyncio.sleep(LOOK_S)
            now_s = time.monotonic()
            self.paid_s += (len(self._engines) + len(self._leaving)) * (now_s - looked_s)
            looked_s = now_s
        for runner, _ in [*self._engines.values(), *self._leaving]:
            await runner.cleanup()

    async def _look(self) -> None:
        deployment = await asyncio.to_thread(self._api.get, f"{DEPLOYMENTS}/{self.service}")
        wanted = int(deployment["spec"]["replicas"])
        while len(self._engines) < wanted:
            await self._start()
        if len(self._engines) > wanted:
            await self._remove(len(self._engines) - wanted)
        for name, (_, server) in self._engines.items():
            if server._ready and name not in self._ready:
                self._ready.add(name)
                status = {"phase": "Running", "podIP": self._address(name), "conditions": [_condition(True)]}
                await asyncio.to_thread(self._api.merge, f"{PODS}/{name}/status", {"status": status})
        status = {"replicas": len(self._engines), "readyReplicas": len(self._ready)}
        await asyncio.to_thread(self._api.merge, f"{DEPLOYMENTS}/{self.service}/status", {"status": status})
        for one in [one for one in self._leaving if not _busy(one[1].engine)]:
            self._leaving.remove(one)
            await one[0].cleanup()
        self.most = max(self.most, len(self._ready))

    async def _start(self) -> None:
        name = f"{self.service}-{self._next}"
        self._next += 1
        server = EngineServer(EmulatedEngine(self._profile), self.boot_s)
        runner = web.AppRunner(server.application(), access_log=None)
        await runner.setup()
        await web.TCPSite(runner, self._address(name), self.port).start()
        self._engines[name] = (runner, server)
        await asyncio.to_thread(self._api.post, PODS, played_pod(name, self.service))
        self._scrape()

    async def _remove(self, count: int) -> None:
        pods = {pod["metadata"]["name"]: pod for pod in await asyncio.to_thread(self._api.items, PODS)}

        def order(name: str) -> tuple[bool, int]:
            marks = pods[name]["metadata"].get("annotations") or {}
            return name in self._ready, int(marks.get(DELETION_COST, 0))

        for name in sorted((name for name in self._engines if name in pods), key=order)[:count]:
            runner, server = self._engines.pop(name)
            self._ready.discard(name)
            self.killed_with_requests += _busy(server.engine)
            self._leaving.append((runner, server))
            await asyncio.to_thread(delete, self._api, f"{PODS}/{name}")
        self._scrape()

    def _address(self, name: str) -> str:
        return f"127.0.1.{int(name.rsplit('-', 1)[1])}"

    def _scrape(self) -> None:
        own = [(f"{self._address(name)}:{self.port}", {"service": self.service}) for name in self._engines]
        self._prometheus.scrape(own, f"-{self.service}")


def _busy(engine: EmulatedEngine) -> bool:
    return bool(engine.waiting or engine.prefilling or engine.decoding)


def _condition(ready: bool) -> dict[str, str]:
    return {"type": "Ready", "status": "True" if ready else "False"}

"""A played fleet whose replicas die, never get ready, or are scraped wrongly."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

from kube_objects import PODS, delete
from played_fleet import PlayedFleet

FOR_EVER_S = 1e6


class HostileFleet(PlayedFleet):
    """Plays scheduler and kubelet, and what happens to replicas.

    Args:
        net: which of the loopback networks its replicas are in.
        arguments: of `PlayedFleet`.
    """

    def __init__(self, net: int, *arguments: Any) -> None:
        self._net = net
        self.hidden = 0.0  # share that is not scraped
        self.twice = 0.0  # share that is scraped by two jobs
        self._lost = 0.0  # share that is to die
        self._used: dict[str, str] = {}  # addresses by replica
        super().__init__(*arguments)
        self._usual_boot_s = self.boot_s

    @property
    def ready(self) -> int:
        """Replicas that can serve."""
        return len(self._ready)

    def lose(self, share: float) -> None:
        """A share of the ready replicas dies with its requests; others are started."""
        self._lost = share

    def stall(self, stalled: bool) -> None:
        """What is started meanwhile gets ready only after the end of the stall."""
        self.boot_s = FOR_EVER_S if stalled else self._usual_boot_s
        if not stalled:
            for _, server in list(self._engines.values()):
                server._ready = True

    def rescrape(self) -> None:
        """Tell Prometheus what it scrapes from now on."""
        self._scrape()

    async def _look(self) -> None:
        share, self._lost = self._lost, 0.0
        if share:
            ready = sorted(self._ready)
            for name in ready[: max(1, round(share * len(ready)))] if ready else ():
                await self._die(name)
            self._scrape()
        await super()._look()
        for name in [name for name in self._used if name not in self._engines]:
            del self._used[name]

    async def _die(self, name: str) -> None:
        runner, _ = self._engines.pop(name)
        self._ready.discard(name)
        for connection in list(runner.server.connections) if runner.server else ():
            if connection.transport is not None:
                connection.transport.abort()
        closing: Callable[[], Any] = runner.cleanup
        for site in list(runner.sites):
            await site.stop()
        self._closing = asyncio.create_task(closing())
        await asyncio.to_thread(delete, self._api, f"{PODS}/{name}")

    def _address(self, name: str) -> str:
        """The lowest that nobody has: addresses are used again."""
        if name not in self._used:
            taken = set(self._used.values())
            every = (f"127.0.{1 + self._net}.{number}" for number in range(1, 255))
            self._used[name] = next(at for at in every if at not in taken and not self._bound(at))
        return self._used[name]

    def _bound(self, address: str) -> bool:
        """Whether a replica that is leaving still listens there."""
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, self.port))
            except OSError:
                return True
        return False

    def _scrape(self) -> None:
        names = list(self._engines)
        groups = []
        for place, name in enumerate(names):
            address = f"{self._address(name)}:{self.port}"
            if place >= self.hidden * len(names):
                groups.append((address, {"service": self.service}))
            if place < self.twice * len(names):
                groups.append((address, {"service": self.service, "job": "again"}))
        self._prometheus.scrape(groups, f"-{self.service}")

"""Clients of services behind a gateway: requests at a rate that changes, and what became of each."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

import aiohttp

PROMPT_TOKENS, OUTPUT_TOKENS = 100, 20


@dataclass(frozen=True)
class Answered:
    """One request.

    Attributes:
        service: whose.
        sent_s: steady time.
        ended_s: steady time.
        outcome: `done`, or what came instead.
    """

    service: str
    sent_s: float
    ended_s: float
    outcome: str


class Clients:
    """Send requests until they are stopped; each service's rate is drawn anew now and then.

    Args:
        urls: address by service.
        seed: of rates and arrivals.
        rates: requests per second that a service may have.
        stretch_s: (least, most) seconds between two changes of a rate.
    """

    def __init__(
        self,
        urls: Mapping[str, str],
        seed: int,
        rates: tuple[float, ...] = (0.5, 1.5, 4.0),
        stretch_s: tuple[float, float] = (10.0, 40.0),
    ) -> None:
        self.sent = 0
        self.ended: list[Answered] = []
        self._urls, self._seed, self._rates, self._stretch_s = dict(urls), seed, rates, stretch_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._send()), daemon=True)
        self._thread.start()

    def take(self) -> list[Answered]:
        """What has ended since the last call."""
        found, self.ended = self.ended, []
        return found

    def stop(self) -> None:
        """No more requests; those under way get ten seconds."""
        self._stop.set()
        self._thread.join(30.0)

    async def _send(self) -> None:
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120.0), connector=connector) as session:
            loops = [self._serve(session, name, url) for name, url in self._urls.items()]
            await asyncio.gather(*loops)

    async def _serve(self, session: aiohttp.ClientSession, service: str, url: str) -> None:
        rng = random.Random(f"{self._seed} {service}")
        under_way: set[asyncio.Task[None]] = set()
        rate, until_s = rng.choice(self._rates), time.monotonic() + rng.uniform(*self._stretch_s)
        while not self._stop.is_set():
            await asyncio.sleep(min(rng.expovariate(rate), 2.0))
            if time.monotonic() > until_s:
                rate, until_s = rng.choice(self._rates), time.monotonic() + rng.uniform(*self._stretch_s)
            task = asyncio.create_task(self._one(session, service, url))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
        if under_way:
            await asyncio.wait(under_way, timeout=10.0)
        for task in under_way:
            task.cancel()

    async def _one(self, session: aiohttp.ClientSession, service: str, url: str) -> None:
        self.sent += 1
        body = {"model": "m", "prompt": "x", "jevons_prompt_tokens": PROMPT_TOKENS, "max_tokens": OUTPUT_TOKENS}
        sent_s = time.monotonic()
        try:
            async with session.post(f"{url}/v1/completions", json={**body, "stream": True}) as response:
                text = await response.content.read()
                whole = response.status == 200 and text.rstrip().endswith(b"[DONE]")
                outcome = "done" if whole else f"status {response.status}"
        except (aiohttp.ClientError, TimeoutError) as error:
            outcome = type(error).__name__
        self.ended.append(Answered(service, sent_s, time.monotonic(), outcome))

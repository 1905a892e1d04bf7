"""Closed-loop load and trace replay on an OpenAI-compatible engine, with per-request timings.

Only ``/v1/completions`` with streaming is used. Prompts are random, so that no prefix cache helps.
A small client of our own rather than a load generator: the simulation must serve exactly the same requests in the same
order, lengths included (see `envs.cluster.closed_loop.loop_lengths`), and requests must be paced by a trace as well.
This module must not know about profiles, fits or files.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import aiohttp
import numpy as np
from aiohttp.http import HttpProcessingError

from policies.redaction import redacted

FIRST_TOKEN_ID, LAST_TOKEN_ID = 10, 500
"""Token ids that prompts are drawn from: within every vocabulary, past the usual control tokens."""
CONNECT_TIMEOUT_S = 10.0
METRICS_TIMEOUT_S = 5.0
LISTING_TIMEOUT_S = 10.0
REQUEST_TIMEOUT_S = 300.0
WORD_SAMPLE = 64
UNREACHABLE = (aiohttp.ClientError, TimeoutError, ConnectionError)
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, HttpProcessingError)
"""What reading an answer that is something else may raise."""


class EngineFailed(ValueError):  # noqa: N818 - reads as the sentence it starts
    """Raised when the engine cannot be measured; the message says what it answered."""


@dataclass(frozen=True)
class Served:
    """One request as its client saw it; times in seconds on the client's monotonic clock."""

    sent_s: float
    first_token_s: float
    finish_s: float
    prompt_tokens: int
    output_tokens: int

    @property
    def ttft_s(self) -> float:
        """Seconds from sending to the first token."""
        return self.first_token_s - self.sent_s

    @property
    def tpot_s(self) -> float:
        """Seconds per token after the first; NaN for a one-token output."""
        gaps = self.output_tokens - 1
        return (self.finish_s - self.first_token_s) / gaps if gaps > 0 else float("nan")

    @property
    def e2e_s(self) -> float:
        """Seconds from sending to the last token."""
        return self.finish_s - self.sent_s


class Engine:
    """A connection to one engine.

    Args:
        url: base address, with or without ``/v1``.
        model: name to ask for; the first that the engine lists when None.
        request_timeout_s: after which a request counts as failed.
        api_key: sent as a bearer token when given.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        request_timeout_s: float = REQUEST_TIMEOUT_S,
        api_key: str | None = None,
    ) -> None:
        self.url = re.sub(r"/(v1/?)?$", "", url)
        if not re.match(r"https?://", self.url):
            raise EngineFailed(f"{url}: expected an address such as http://127.0.0.1:8000")
        self.model = model or ""
        self._timeout = aiohttp.ClientTimeout(total=request_timeout_s, connect=CONNECT_TIMEOUT_S)
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._words_per_token: float | None = None
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(limit=0)
        self._session = aiohttp.ClientSession(timeout=self._timeout, headers=self._headers, connector=connector)
        try:
            if not self.model:
                self.model = await self._first_model()
            await self._settle_prompts()
        except BaseException:
            await self._session.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def complete(self, prompt_tokens: int, output_tokens: int, seed: int) -> Served:
        """Send one request and read its stream to the end.

        Raises:
            EngineFailed: when the engine is gone, answers with an error, or cuts the stream short.
        """
        body = {
            "model": self.model,
            "prompt": self._prompt(prompt_tokens, seed),
            "max_tokens": output_tokens,
            "min_tokens": output_tokens,
            "ignore_eos": True,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        sent_s = time.perf_counter()
        first_s = last_s = 0.0
        usage: dict[str, int] = {}
        try:
            async with self._session.post(f"{self.url}/v1/completions", json=body) as answer:
                if answer.status != 200:
                    text = " ".join(redacted(await answer.text()).split())[:300]
                    raise EngineFailed(f"{self.url}: answered {answer.status} to a completion request: {text}")
                async for line in answer.content:
                    if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
                        continue
                    now_s = time.perf_counter()
                    event = json.loads(line[5:])
                    if event.get("choices"):
                        first_s = first_s or now_s
                        last_s = now_s
                    usage = event.get("usage") or usage
            if not usage or not first_s:
                raise EngineFailed(f"{self.url}: a stream ended without tokens or without its usage report")
            served = Served(sent_s, first_s, last_s, int(usage["prompt_tokens"]), int(usage["completion_tokens"]))
        except EngineFailed:
            raise
        except UNREACHABLE as error:
            raise EngineFailed(f"{self.url}: {_reason(error)}") from None
        except UNREADABLE:
            raise EngineFailed(f"{self.url}: /v1/completions streams no OpenAI completion events") from None
        if served.prompt_tokens < 1:
            raise EngineFailed(f"{self.url}: the usage report of a stream counts no prompt tokens")
        return served

    async def metrics(self) -> dict[str, float]:
        """Samples of ``/metrics``, labels in the name; empty where the engine has none."""
        timeout = aiohttp.ClientTimeout(total=METRICS_TIMEOUT_S)
        try:
            async with self._session.get(f"{self.url}/metrics", timeout=timeout) as answer:
                return parse_metrics(await answer.text()) if answer.status == 200 else {}
        except (*UNREACHABLE, UnicodeDecodeError):
            return {}

    async def _first_model(self) -> str:
        try:
            timeout = aiohttp.ClientTimeout(total=LISTING_TIMEOUT_S)
            async with self._session.get(f"{self.url}/v1/models", timeout=timeout) as answer:
                if answer.status != 200:
                    raise EngineFailed(f"{self.url}: answered {answer.status} to /v1/models; is this an OpenAI API?")
                return str((await answer.json(content_type=None))["data"][0]["id"])
        except EngineFailed:
            raise
        except UNREACHABLE as error:
            raise EngineFailed(f"{self.url}: {_reason(error)}") from None
        except UNREADABLE:
            raise EngineFailed(f"{self.url}: /v1/models lists no model; name one with --model") from None

    async def _settle_prompts(self) -> None:
        """Find out whether token ids are taken as prompts, else how many tokens a word makes."""
        try:
            served = await self.complete(WORD_SAMPLE, 1, 0)
        except EngineFailed as refused:
            if "answered 4" not in str(refused):
                raise
        else:
            if abs(served.prompt_tokens - WORD_SAMPLE) <= 1:
                return
        self._words_per_token = 1.0
        served = await self.complete(WORD_SAMPLE, 1, 0)
        self._words_per_token = WORD_SAMPLE / served.prompt_tokens

    def _prompt(self, tokens: int, seed: int) -> list[int] | str:
        rng = np.random.default_rng(seed)
        if self._words_per_token is None:
            return [int(token) for token in rng.integers(FIRST_TOKEN_ID, LAST_TOKEN_ID, tokens)]
        words = max(1, round(tokens * self._words_per_token))
        return " ".join(str(number) for number in rng.integers(0, 10, words))


async def closed_loop(
    engine: Engine,
    prompt_tokens: int,
    output_tokens: Sequence[int],
    concurrency: int,
    seed: int,
    on_served: Callable[[], None] | None = None,
) -> list[Served]:
    """`concurrency` clients take requests from one list, in order, each when its last one has returned.

    Args:
        engine: to send to.
        prompt_tokens: of every request.
        output_tokens: (requests,) of each.
        concurrency: clients.
        seed: of the prompts.
        on_served: called after each request.

    Raises:
        EngineFailed: at the first request that fails; the others are cancelled.
    """
    served: list[Served | None] = [None] * len(output_tokens)
    pending = iter(enumerate(output_tokens))

    async def client() -> None:
        for row, output in pending:
            served[row] = await engine.complete(prompt_tokens, int(output), seed + row)
            if on_served is not None:
                on_served()

    await _all_or_none(client() for _ in range(concurrency))
    return [one for one in served if one is not None]


async def open_loop(
    engine: Engine,
    arrival_s: Sequence[float],
    prompt_tokens: Sequence[int],
    output_tokens: Sequence[int],
    batch_cap: int,
    seed: int,
    on_served: Callable[[], None] | None = None,
) -> list[Served]:
    """Send requests at their times, at most `batch_cap` at once; the others wait here, first come first served.

    `Served.sent_s` is the arrival, so that the wait in front of the cap is part of the time to first token.

    Raises:
        EngineFailed: at the first request that fails; the others are cancelled.
    """
    served: list[Served | None] = [None] * len(arrival_s)
    slots = asyncio.Semaphore(batch_cap)
    start_s = time.perf_counter()

    async def one(row: int) -> None:
        due_s = start_s + float(arrival_s[row])
        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
        async with slots:
            found = await engine.complete(int(prompt_tokens[row]), int(output_tokens[row]), seed + row)
        served[row] = Served(
            due_s - start_s,
            found.first_token_s - start_s,
            found.finish_s - start_s,
            found.prompt_tokens,
            found.output_tokens,
        )
        if on_served is not None:
            on_served()

    await _all_or_none(one(row) for row in range(len(arrival_s)))
    return [one for one in served if one is not None]


async def _all_or_none(jobs: Iterable[Any]) -> None:
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def parse_metrics(text: str) -> dict[str, float]:
    r"""Samples of a Prometheus text page, under ``name{labels}``.

    >>> parse_metrics('# HELP x\nx{a="1"} 2.5\ny 3\n')
    {'x{a="1"}': 2.5, 'y': 3.0}
    """
    samples = {}
    for line in text.splitlines():
        found = re.match(r"([^#{\s]+(?:\{.*\})?)\s+(\S+)", line)
        if found:
            try:
                samples[found[1]] = float(found[2])
            except ValueError:
                continue
    return samples


def kv_capacity_tokens(samples: dict[str, float]) -> int | None:
    """KV cache capacity from vLLM's ``cache_config_info``, tokens; None where the engine does not tell."""
    for name in samples:
        if re.match(r"vllm[:_]cache_config_info\{", name):
            blocks = re.search(r'num_gpu_blocks="(\d+)"', name)
            size = re.search(r'block_size="(\d+)"', name)
            if blocks and size and int(blocks[1]):
                return int(blocks[1]) * int(size[1])
    return None


def counter_total(samples: dict[str, float], name: str) -> float:
    """Sum over labels of a counter such as ``num_preemptions_total``; 0 where it is absent."""
    pattern = re.compile(rf"vllm[:_]{name}(\{{|$)")
    return sum(value for sample, value in samples.items() if pattern.match(sample))


def _reason(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return f"the engine is gone or refused the connection: {error or type(error).__name__}"

"""An inference engine without a GPU: OpenAI's streaming API and vLLM's metrics, paced by an engine profile.

Iterations are those of ``docs/cluster_model.md``: admission in order of arrival while the KV cache has room, chunked
prefill within the token budget, one token per decoding sequence, and a duration from the step-time model. What the
cluster model computes on a virtual clock happens here on the real one, divided by a speed-up for short tests.
It takes the numbers of a request from itself: `max_tokens` is its output, and a prompt has one token per word, or
`jevons_prompt_tokens` where that field is given.
This module must not know about scaling.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from policies.engine import EngineProfile

MIN_PREFILL_BUDGET = 16
"""Prefill tokens of an iteration however many sequences decode, as in the cluster model."""
TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
"""vLLM's bucket edges, as are those below."""
TPOT_BUCKETS = (
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
)
LENGTH_BUCKETS = tuple(float(base * 10**power) for power in range(6) for base in (1, 2, 5))
FINISH_REASONS = ("stop", "length", "abort")


@dataclass(eq=False)
class Sequence:
    """One request inside the engine; times are on the engine's own clock, seconds."""

    prompt_tokens: int
    output_tokens: int
    arrival_s: float
    prefilled: int = 0
    emitted: int = 0
    kv_tokens: int = 0
    first_s: float = 0.0
    last_s: float = 0.0
    gone: bool = False
    tokens: asyncio.Queue[int] = field(default_factory=asyncio.Queue)

    @property
    def context(self) -> int:
        """KV tokens that it needs before its next prefill ends: the prompt, and what a preemption threw away."""
        return self.prompt_tokens + self.emitted


class EngineMetrics:
    """vLLM's metric names, with the labels `model_name` and `engine`.

    Args:
        model: value of `model_name`.
    """

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model, "engine": "0"}
        self.running = self._gauge("num_requests_running", "Requests in the batch.")
        self.waiting = self._gauge("num_requests_waiting", "Requests in the queue.")
        self.kv_usage = self._gauge("kv_cache_usage_perc", "Share of KV blocks in use, 0..1.")
        self.prompt = self._counter("prompt_tokens", "Prompt tokens processed.")
        self.generation = self._counter("generation_tokens", "Tokens generated.")
        self.preemptions = self._counter("num_preemptions", "Sequences put back into the queue.")
        self.ttft = self._histogram("time_to_first_token_seconds", "Arrival to first token.", TTFT_BUCKETS)
        self.tpot = self._histogram("request_time_per_output_token_seconds", "Per request.", TPOT_BUCKETS)
        self.itl = self._histogram("inter_token_latency_seconds", "Between tokens.", TPOT_BUCKETS)
        self.e2e = self._histogram("e2e_request_latency_seconds", "Arrival to last token.", TTFT_BUCKETS)
        self.prompt_length = self._histogram("request_prompt_tokens", "Of finished requests.", LENGTH_BUCKETS)
        self.output_length = self._histogram("request_generation_tokens", "Of finished requests.", LENGTH_BUCKETS)
        success = Counter(
            "vllm:request_success", "Requests finished.", (*self._labels, "finished_reason"), registry=self.registry
        )
        self.success = {reason: success.labels(**self._labels, finished_reason=reason) for reason in FINISH_REASONS}

    def text(self) -> bytes:
        """The exposition."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"vllm:{name}", text, tuple(self._labels), registry=self.registry).labels(**self._labels)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"vllm:{name}", text, tuple(self._labels), registry=self.registry).labels(**self._labels)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        labels = tuple(self._labels)
        return Histogram(f"vllm:{name}", text, labels, registry=self.registry, buckets=buckets).labels(**self._labels)


class EmulatedEngine:
    """Continuous batching on the wall clock.

    Args:
        profile: speed, memory and limits.
        batch_cap: concurrent sequences; the profile's `max_num_seqs` when None. May be changed at any time.
        speedup: how many of its seconds pass in one real second. Latencies in its metrics are its own seconds divided
            by this, that is real ones, as a scraper on the real clock expects.
        model: the served model's name; the profile's when None.
    """

    def __init__(
        self, profile: EngineProfile, batch_cap: int | None = None, speedup: float = 1.0, model: str | None = None
    ) -> None:
        self.profile = profile
        self.batch_cap = batch_cap or profile.max_num_seqs
        self.speedup = speedup
        self.model = model or profile.model
        self.metrics = EngineMetrics(self.model)
        self.waiting: deque[Sequence] = deque()
        self.prefilling: list[Sequence] = []
        self.decoding: list[Sequence] = []
        self._work = asyncio.Event()
        self._kv_used = 0

    @property
    def outstanding(self) -> int:
        """Requests that are waiting or running."""
        return len(self.waiting) + len(self.prefilling) + len(self.decoding)

    def submit(self, prompt_tokens: int, output_tokens: int) -> Sequence:
        """Queue one request.

        Raises:
            ValueError: when it can never fit in the KV cache.
        """
        if prompt_tokens + output_tokens > self.profile.kv_capacity_tokens:
            raise ValueError(f"prompt and output exceed the KV capacity of {self.profile.kv_capacity_tokens} tokens")
        sequence = Sequence(prompt_tokens, output_tokens, time.monotonic())
        self.waiting.append(sequence)
        self._show()
        self._work.set()
        return sequence

    def abandon(self, sequence: Sequence) -> None:
        """The client has gone: its place is free from the next iteration on."""
        sequence.gone = True
        self._work.set()

    async def run(self) -> None:
        """Iterate until cancelled."""
        boundary_s = time.monotonic()
        while True:
            self._remove_abandoned()
            self._preempt()
            self._admit()
            self._show()
            if not self.prefilling and not self.decoding:
                self._work.clear()
                await self._work.wait()
                boundary_s = time.monotonic()
                continue
            chunks = self._compose()
            boundary_s = max(boundary_s + self._step_s(chunks) / self.speedup, time.monotonic() - 1.0)
            # Sleeping to the boundary, not for the step, keeps the pace when the machine is late.
            await asyncio.sleep(max(0.0, boundary_s - time.monotonic()))
            self._finish_step(chunks)

    def _remove_abandoned(self) -> None:
        for group in (self.prefilling, self.decoding):
            for sequence in [one for one in group if one.gone]:
                group.remove(sequence)
                self._release(sequence)
                self.metrics.success["abort"].inc()
        self.waiting = deque(one for one in self.waiting if not one.gone)

    def _preempt(self) -> None:
        """Latest admitted first, until every decode has room for its token."""
        while self._kv_used + len(self.decoding) > self.profile.kv_capacity_tokens:
            group = self.prefilling or self.decoding
            sequence = group.pop()
            self._release(sequence)
            sequence.prefilled = 0
            self.waiting.appendleft(sequence)
            self.metrics.preemptions.inc()

    def _admit(self) -> None:
        while self.waiting and len(self.prefilling) + len(self.decoding) < self.batch_cap:
            head = self.waiting[0]
            free = self.profile.kv_capacity_tokens - self._kv_used - len(self.decoding)
            if head.context + 1 > free:
                return
            self.prefilling.append(self.waiting.popleft())
            head.kv_tokens = head.context
            self._kv_used += head.kv_tokens

    def _compose(self) -> list[tuple[Sequence, int]]:
        """(sequence, prefill tokens) of the coming iteration, in order of admission."""
        budget = max(MIN_PREFILL_BUDGET, self.profile.max_num_batched_tokens - len(self.decoding))
        chunks = []
        for sequence in self.prefilling:
            tokens = min(budget, sequence.context - sequence.prefilled)
            if tokens <= 0:
                break
            chunks.append((sequence, tokens))
            budget -= tokens
        return chunks

    def _step_s(self, chunks: list[tuple[Sequence, int]]) -> float:
        a, b, c, d, e = self.profile.step.seconds
        prefill = sum(tokens * b + e * tokens * (sequence.prefilled + tokens / 2) for sequence, tokens in chunks)
        context = sum(sequence.kv_tokens for sequence in self.decoding)
        return a + prefill + c * len(self.decoding) + d * context

    def _finish_step(self, chunks: list[tuple[Sequence, int]]) -> None:
        now_s = time.monotonic()
        for sequence in list(self.decoding):
            sequence.kv_tokens += 1
            self._kv_used += 1
            self._emit(sequence, now_s)
            if sequence.emitted >= sequence.output_tokens:
                self.decoding.remove(sequence)
                self._complete(sequence)
        for sequence, tokens in chunks:
            sequence.prefilled += tokens
            if sequence.prefilled < sequence.context:
                continue
            self.prefilling.remove(sequence)
            if not sequence.emitted:
                self.metrics.prompt.inc(sequence.prompt_tokens)
            self._emit(sequence, now_s)
            if sequence.emitted >= sequence.output_tokens:
                self._complete(sequence)
            else:
                self.decoding.append(sequence)

    def _release(self, sequence: Sequence) -> None:
        self._kv_used -= sequence.kv_tokens
        sequence.kv_tokens = 0

    def _emit(self, sequence: Sequence, now_s: float) -> None:
        if sequence.emitted:
            self.metrics.itl.observe(now_s - sequence.last_s)
        else:
            sequence.first_s = now_s
            self.metrics.ttft.observe(now_s - sequence.arrival_s)
        sequence.emitted += 1
        sequence.last_s = now_s
        self.metrics.generation.inc()
        sequence.tokens.put_nowait(sequence.emitted)

    def _complete(self, sequence: Sequence) -> None:
        self._release(sequence)
        if sequence.emitted > 1:
            self.metrics.tpot.observe((sequence.last_s - sequence.first_s) / (sequence.emitted - 1))
        self.metrics.e2e.observe(sequence.last_s - sequence.arrival_s)
        self.metrics.prompt_length.observe(sequence.prompt_tokens)
        self.metrics.output_length.observe(sequence.emitted)
        self.metrics.success["length"].inc()

    def _show(self) -> None:
        self.metrics.running.set(len(self.prefilling) + len(self.decoding))
        self.metrics.waiting.set(len(self.waiting))
        self.metrics.kv_usage.set(self._kv_used / self.profile.kv_capacity_tokens)


class EngineServer:
    """The engine behind OpenAI's API.

    Args:
        engine: what answers.
        start_s: seconds until it is ready, as a real engine loads its weights.
        batch_cap_file: a file that holds the batch cap, looked at each second, such as a mounted ConfigMap's key.
    """

    def __init__(self, engine: EmulatedEngine, start_s: float = 0.0, batch_cap_file: Path | None = None) -> None:
        self.engine = engine
        self._start_s = start_s
        self._batch_cap_file = batch_cap_file
        self._ready = False
        self._tasks: list[asyncio.Task[None]] = []

    def application(self) -> web.Application:
        """The web application; it starts and stops the engine's loop."""
        app = web.Application(client_max_size=64 * 2**20)
        app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/metrics", self._metrics),
                web.get("/v1/models", self._models),
                web.post("/v1/completions", self._completions),
                web.post("/v1/chat/completions", self._chat),
            ]
        )
        app.cleanup_ctx.append(self._lifetime)
        return app

    async def _lifetime(self, _: web.Application) -> AsyncIterator[None]:
        self._tasks = [asyncio.create_task(self._warm_up()), asyncio.create_task(self.engine.run())]
        if self._batch_cap_file is not None:
            self._tasks.append(asyncio.create_task(self._watch_cap(self._batch_cap_file)))
        yield
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _warm_up(self) -> None:
        await asyncio.sleep(self._start_s)
        self._ready = True

    async def _watch_cap(self, file: Path) -> None:
        while True:
            # A file that is not there yet, or being written, leaves the cap as it is.
            with contextlib.suppress(OSError, ValueError):
                self.engine.batch_cap = max(1, min(int(file.read_text()), self.engine.profile.max_num_seqs))
            await asyncio.sleep(1.0)

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response(status=200 if self._ready else 503)

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=self.engine.metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": self.engine.model, "object": "model"}]})

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, chat=False)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, chat=True)

    async def _answer(self, request: web.Request, chat: bool) -> web.StreamResponse:
        if not self._ready:
            return _refusal(503, "the engine is starting")
        try:
            body = await request.json()
            output = int(body.get("max_tokens") or body.get("max_completion_tokens") or 16)
            sequence = self.engine.submit(prompt_tokens_of(body), output)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            return _refusal(400, " ".join(str(error).split()))
        try:
            if body.get("stream"):
                return await self._stream(request, sequence, chat, body)
            for _ in range(output):
                await sequence.tokens.get()
            return web.json_response(self._whole(sequence, chat))
        except (asyncio.CancelledError, ConnectionError):
            self.engine.abandon(sequence)
            raise

    async def _stream(
        self, request: web.Request, sequence: Sequence, chat: bool, body: dict[str, Any]
    ) -> web.StreamResponse:
        token = await sequence.tokens.get()  # before the headers, which vLLM sends with the first token
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        await response.prepare(request)
        while True:
            last = token >= sequence.output_tokens
            choice: dict[str, Any] = {"index": 0, "finish_reason": "length" if last else None}
            choice |= {"delta": {"content": " token"}} if chat else {"text": " token"}
            await response.write(_event({**self._head(chat, chunk=True), "choices": [choice]}))
            if last:
                break
            token = await sequence.tokens.get()
        if (body.get("stream_options") or {}).get("include_usage"):
            await response.write(_event({**self._head(chat, chunk=True), "choices": [], "usage": _usage(sequence)}))
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    def _head(self, chat: bool, chunk: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if chat else "text_completion"
        return {"id": "emulated", "object": kind, "created": int(time.time()), "model": self.engine.model}

    def _whole(self, sequence: Sequence, chat: bool) -> dict[str, Any]:
        text = " token" * sequence.emitted
        choice: dict[str, Any] = {"index": 0, "finish_reason": "length"}
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        return {**self._head(chat, chunk=False), "choices": [choice], "usage": _usage(sequence)}


def prompt_tokens_of(body: dict[str, Any]) -> int:
    """Prompt tokens of an OpenAI request: as given in `jevons_prompt_tokens`, else one per word, at least 1."""
    given = body.get("jevons_prompt_tokens")
    if given is not None:
        return max(1, int(given))
    if "messages" in body:
        return max(1, sum(len(str(message["content"]).split()) for message in body["messages"]))
    return max(1, len(str(body.get("prompt", "")).split()))


def serve(server: EngineServer, host: str, port: int) -> None:
    """Serve until SIGINT or SIGTERM; requests under way are finished first."""
    web.run_app(server.application(), host=host, port=port, print=None, shutdown_timeout=60.0, access_log=None)


def _event(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


def _usage(sequence: Sequence) -> dict[str, int]:
    total = sequence.prompt_tokens + sequence.emitted
    return {"prompt_tokens": sequence.prompt_tokens, "completion_tokens": sequence.emitted, "total_tokens": total}


def _refusal(status: int, message: str) -> web.Response:
    return web.json_response({"error": {"message": message, "type": "invalid_request_error"}}, status=status)

"""The emulated engine behind HTTP: OpenAI's API, streamed or whole, vLLM's health check and metrics.

The lengths of a request are read from the request itself: `max_tokens` is its output, and a prompt has one token per
word, or `jevons_prompt_tokens` where that field is given.
This module must not know how the engine keeps its pace.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from autoscaler.emulation.engine import EmulatedEngine, Sequence


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

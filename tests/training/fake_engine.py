"""A small engine with the OpenAI API: continuous batching paced by the step-time form, on loopback, in a thread."""

import asyncio
import json
import threading
from contextlib import contextmanager

from aiohttp import web

STEP_S = (2e-3, 2e-6, 5e-5, 1e-8)
"""Seconds: per iteration, prefill token, decoded sequence and context token."""
KV_BLOCKS, BLOCK_TOKENS = 500, 16


class FakeEngine:
    """Counts what it serves; `dies_after` completions it drops every connection.

    `listing` and `answer`, a status and a body each, are sent in place of models and completions.
    """

    def __init__(
        self, dies_after=None, honours_lengths=True, takes_token_ids=True, metrics=True, listing=None, answer=None
    ):
        self.listing = listing
        self.answer = answer
        self.dies_after = dies_after
        self.honours_lengths = honours_lengths
        self.takes_token_ids = takes_token_ids
        self.has_metrics = metrics
        self.served = 0
        self.most_at_once = 0
        self._waiting = []
        self._work = None

    async def completions(self, request):
        if self.answer is not None:
            return web.Response(status=self.answer[0], body=self.answer[1])
        body = await request.json()
        prompt = body["prompt"]
        if isinstance(prompt, list) and not self.takes_token_ids:
            return web.json_response({"error": "prompt must be a string"}, status=400)
        if self.dies_after is not None and self.served >= self.dies_after:
            request.transport.abort()
            return web.Response()
        prompt_tokens = len(prompt) if isinstance(prompt, list) else 2 * len(prompt.split())
        output_tokens = body["max_tokens"] if self.honours_lengths else max(1, body["max_tokens"] // 2)
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        tokens = asyncio.Queue()
        self._waiting.append([prompt_tokens, output_tokens, tokens])
        self._work.set()
        for _ in range(output_tokens):
            await tokens.get()
            await answer.write(b'data: {"choices": [{"text": "x"}]}\n\n')
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": output_tokens}
        await answer.write(f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n".encode())
        self.served += 1
        return answer

    async def models(self, request):
        if self.listing is not None:
            return web.Response(status=self.listing[0], body=self.listing[1])
        return web.json_response({"data": [{"id": "fake-model"}]})

    async def metrics(self, request):
        if not self.has_metrics:
            raise web.HTTPNotFound
        text = (
            "# HELP vllm:cache_config_info Information\n"
            f'vllm:cache_config_info{{block_size="{BLOCK_TOKENS}",num_gpu_blocks="{KV_BLOCKS}"}} 1.0\n'
            'vllm:num_preemptions_total{model_name="fake-model"} 3.0\n'
        )
        return web.Response(text=text)

    async def iterate(self):
        a, b, c, d = STEP_S
        decoding = []
        while True:
            if not decoding and not self._waiting:
                self._work.clear()
                await self._work.wait()
            prefills, self._waiting = self._waiting, []
            self.most_at_once = max(self.most_at_once, len(decoding) + len(prefills))
            context = sum(sequence[0] for sequence in decoding)
            await asyncio.sleep(a + b * sum(one[0] for one in prefills) + c * len(decoding) + d * context)
            decoding += prefills
            for sequence in decoding:
                sequence[0] += 1
                sequence[1] -= 1
                sequence[2].put_nowait(None)
            decoding = [sequence for sequence in decoding if sequence[1] > 0]


@contextmanager
def running(engine):
    """Serve `engine`; yields its address."""
    ready, address = threading.Event(), []
    loop = asyncio.new_event_loop()

    async def serve():
        engine._work = asyncio.Event()
        app = web.Application()
        app.router.add_post("/v1/completions", engine.completions)
        app.router.add_get("/v1/models", engine.models)
        app.router.add_get("/metrics", engine.metrics)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        address.append(f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}")
        iterations = loop.create_task(engine.iterate())
        ready.set()
        await stopped.wait()
        iterations.cancel()
        await runner.cleanup()

    stopped = asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    ready.wait(10)
    try:
        yield address[0]
    finally:
        loop.call_soon_threadsafe(stopped.set)
        thread.join(10)
        loop.close()

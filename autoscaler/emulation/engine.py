"""An inference engine without a GPU: OpenAI's streaming API and vLLM's metrics, paced by an engine profile.

Iterations are those of ``docs/cluster_model.md``: admission in order of arrival while the KV cache has room, chunked
prefill within the token budget, one token per decoding sequence, and a duration from the step-time model. What the
cluster model computes on a virtual clock happens here on the real one, divided by a speed-up for short tests.
This module must not know about HTTP or scaling.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

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

"""A slow, plain simulator of ``docs/cluster_model.md``: one engine iteration at a time, nothing skipped.

It is what the fast kernel is compared with, so it is written from the document alone and favours being obviously
right: occupied KV tokens are summed anew at every boundary, queues are lists, and the invariants are asserted
as it goes.
The fleet is fixed: every replica is ready at time 0; it may be told to stop accepting (``drain_at``) or to disappear
(``kill_at``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from policies.engine import EngineProfile


class Numbers(Protocol):
    """One number per request: a list or an array."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> float: ...


@dataclass(frozen=True)
class ReferencePool:
    """Replicas of one kind; replicas are numbered through all pools in order, from 0."""

    profile: EngineProfile
    replicas: int
    batch_cap: int


@dataclass(frozen=True)
class ReferenceResult:
    """What became of each request, and totals; see the fields."""

    first_token_s: NDArray[np.float64]  # per request: time of the first token, nan when there was none
    finish_s: NDArray[np.float64]  # per request: time of the last token, nan when not finished
    replica: NDArray[np.int64]  # per request: the replica it was last dispatched to, -1 when never
    preemptions: NDArray[np.int64]  # per request: how often its KV was freed to make room, over all attempts
    rejected: NDArray[np.bool_]  # per request: too large for every pool
    emitted: NDArray[np.int64]  # per request: tokens of the attempt that counts
    iterations: NDArray[np.int64]  # per replica: iterations that ended
    busy_s: NDArray[np.float64]  # per replica: time in iterations, one cut short by a kill or `until_s` up to there
    peak_kv: NDArray[np.int64]  # per replica: most KV tokens occupied or set aside
    tokens_generated: int  # all tokens emitted
    tokens_lost: int  # of these, the ones of attempts that a kill undid
    end_s: float  # time of the last event

    @property
    def total_iterations(self) -> int:
        """Iterations that ended, over all replicas."""
        return int(self.iterations.sum())


@dataclass
class Request:
    """One request and where its current attempt stands."""

    index: int
    arrival: float
    prompt: int
    output: int
    prefix_hit: int
    replica: int = -1
    preemptions: int = 0
    first_token: float = math.nan
    finish: float = math.nan
    emitted: int = 0
    decoding: bool = False
    kv: int = 0  # KV tokens occupied: the whole context from admission on
    cached: int = 0  # of the context, the tokens that prefill need not compute any more

    @property
    def context(self) -> int:
        """Tokens that a prefill starting now has to cover."""
        return self.prompt + self.emitted

    def admit(self) -> None:
        """Occupy the whole context and start its prefill."""
        hit = self.prefix_hit if self.emitted == 0 else 0
        self.kv = self.context
        self.cached = min(hit, self.context - 1)
        self.decoding = False

    def release(self) -> None:
        """Free the KV tokens."""
        self.kv = 0
        self.cached = 0
        self.decoding = False

    def restart(self) -> None:
        """Forget the attempt."""
        self.release()
        self.emitted = 0
        self.first_token = math.nan

    def emit(self, now: float) -> None:
        """Take note of one more token."""
        self.emitted += 1
        if self.emitted == 1:
            self.first_token = now
        if self.emitted == self.output:
            self.finish = now
        assert self.emitted <= self.output


@dataclass
class Iteration:
    """The composition of the iteration under way, fixed at its start."""

    start: float
    end: float
    decodes: list[Request]
    chunks: list[tuple[Request, int]]


@dataclass
class Replica:
    """One engine: a waiting queue and the admitted sequences, both in order."""

    index: int
    profile: EngineProfile
    cap: int
    waiting: list[Request] = field(default_factory=list)
    running: list[Request] = field(default_factory=list)  # prefilling and decoding, in the order of admission
    iteration: Iteration | None = None
    accepting: bool = True
    iterations: int = 0
    busy: float = 0.0
    peak_kv: int = 0
    emitted: int = 0

    @property
    def outstanding(self) -> int:
        """Requests waiting, prefilling or decoding."""
        return len(self.waiting) + len(self.running)

    @property
    def weight(self) -> float:
        """Nominal decode rate at the batch cap, tokens per second: contexts of 1,000 tokens, no prefill."""
        a, _, c, d, _ = self.profile.step.seconds
        return self.cap / (a + c * self.cap + d * self.cap * 1000)

    def occupied(self) -> int:
        """KV tokens held by the admitted sequences."""
        return sum(request.kv for request in self.running)

    def accept(self, request: Request) -> None:
        """Put a dispatched request into the waiting queue."""
        assert self.accepting
        assert self.outstanding < self.cap
        assert request.prompt + request.output <= self.profile.kv_capacity_tokens
        request.replica = self.index
        self.waiting.append(request)

    def start(self, now: float) -> None:
        """Do what the boundary asks for, in order, and start an iteration if there is anything to do."""
        assert self.iteration is None
        capacity = self.profile.kv_capacity_tokens

        # 1. Preemption, latest-admitted first, until every remaining decode has room for its token.
        while True:
            decodes = [request for request in self.running if request.decoding]
            free = capacity - self.occupied()
            if len(decodes) <= free:
                break
            victim = self.running.pop()
            victim.release()
            victim.preemptions += 1
            self.waiting.insert(0, victim)

        # 2. Reservation.
        free -= len(decodes)

        # 3. Admission.
        while self.waiting and self.waiting[0].context + 1 <= free:
            request = self.waiting.pop(0)
            request.admit()
            free -= request.kv
            self.running.append(request)

        held = self.occupied() + len(decodes)
        assert held + free == capacity
        assert 0 <= held <= capacity
        self.peak_kv = max(self.peak_kv, held)
        if not self.running:
            assert not self.waiting, "an empty replica must be able to admit the head of its queue"
            return

        # 4. Composition.
        budget = max(16, self.profile.max_num_batched_tokens - len(decodes))
        chunks: list[tuple[Request, int]] = []
        for request in self.running:
            if not request.decoding and budget > 0:
                chunk = min(budget, request.context - request.cached)
                assert chunk >= 1
                budget -= chunk
                chunks.append((request, chunk))
        self.iteration = Iteration(now, now + self.duration(decodes, chunks), decodes, chunks)

    def duration(self, decodes: list[Request], chunks: list[tuple[Request, int]]) -> float:
        """Time of one iteration, seconds."""
        a, b, c, d, e = self.profile.step.seconds
        prefilled = sum(chunk for _, chunk in chunks)
        read = sum(request.kv for request in decodes)
        attention = sum(e * chunk * (request.cached + chunk / 2) for request, chunk in chunks)
        return a + b * prefilled + c * len(decodes) + d * read + attention

    def finish(self, now: float) -> None:
        """End the iteration under way: decodes take effect, then prefill chunks; completed requests leave."""
        iteration = self.iteration
        assert iteration is not None
        assert iteration.end == now
        self.iteration = None
        self.iterations += 1
        self.busy += iteration.end - iteration.start
        for request in iteration.decodes:
            request.kv += 1
            self.emit(request, now)
            assert request.kv == request.prompt + request.emitted - 1
        for request, chunk in iteration.chunks:
            request.cached += chunk
            if request.cached == request.context:
                request.decoding = True
                self.emit(request, now)
                assert request.kv == request.prompt + request.emitted - 1
        for request in self.running:
            if request.emitted == request.output:
                request.release()
        self.running = [request for request in self.running if request.emitted < request.output]
        assert self.occupied() <= self.profile.kv_capacity_tokens

    def emit(self, request: Request, now: float) -> None:
        """Emit one token of a request."""
        request.emit(now)
        self.emitted += 1

    def interrupt(self, now: float) -> None:
        """Account for the part of an iteration that went by before it was cut short."""
        if self.iteration is not None:
            self.busy += now - self.iteration.start
            self.iteration = None

    def kill(self, now: float) -> list[Request]:
        """Disappear; returns the unfinished requests."""
        self.interrupt(now)
        self.accepting = False
        unfinished = self.waiting + self.running
        self.waiting = []
        self.running = []
        return unfinished


def dispatch(queue: list[Request], replicas: list[Replica]) -> None:
    """Hand out the head of the gateway queue while some replica takes it."""
    while queue:
        head = queue[0]
        able = [
            replica
            for replica in replicas
            if replica.accepting
            and replica.outstanding < replica.cap
            and head.prompt + head.output <= replica.profile.kv_capacity_tokens
        ]
        if not able:
            return
        best = min(able, key=lambda replica: ((replica.outstanding + 1) / replica.weight, replica.index))
        best.accept(queue.pop(0))


def simulate(
    arrival_s: Numbers,
    prompt_tokens: Numbers,
    output_tokens: Numbers,
    prefix_hit_tokens: Numbers,
    pools: Sequence[ReferencePool],
    until_s: float | None = None,
    *,
    drain_at: Mapping[int, float] | None = None,
    kill_at: Mapping[int, float] | None = None,
) -> ReferenceResult:
    """Simulate a fixed fleet.

    Args:
        arrival_s: arrival times at the gateway, in ascending order.
        prompt_tokens: length of each prompt, prefix hit included.
        output_tokens: tokens that each request generates.
        prefix_hit_tokens: tokens of each prompt found in the prefix cache.
        pools: the fleet.
        until_s: time of the last event to process; by default, until nothing happens any more.
        drain_at: for some replicas, when they stop accepting requests.
        kill_at: for some replicas, when they disappear and their unfinished requests return to the gateway.

    Raises:
        ValueError: when the inputs don't describe a workload and a fleet.
    """
    requests = _requests(arrival_s, prompt_tokens, output_tokens, prefix_hit_tokens)
    replicas = _replicas(pools)
    drains = sorted((time, index) for index, time in (drain_at or {}).items())
    kills = sorted((time, index) for index, time in (kill_at or {}).items())
    if any(not 0 <= index < len(replicas) for _, index in drains + kills):
        raise ValueError("drain_at or kill_at names a replica that does not exist")
    largest = max(pool.profile.kv_capacity_tokens for pool in pools)
    rejected = np.array([request.prompt + request.output > largest for request in requests], dtype=np.bool_)

    upcoming = list(requests)
    queue: list[Request] = []
    lost = 0
    now = 0.0
    while True:
        ends = [replica.iteration.end for replica in replicas if replica.iteration is not None]
        times = ends + [time for time, _ in drains[:1] + kills[:1]] + [request.arrival for request in upcoming[:1]]
        if not times or (until_s is not None and min(times) > until_s):
            break
        assert min(times) >= now
        now = min(times)

        # Iterations that end now.
        for replica in replicas:
            if replica.iteration is not None and replica.iteration.end == now:
                replica.finish(now)

        # Fleet events.
        while drains and drains[0][0] == now:
            replicas[drains.pop(0)[1]].accepting = False
        returned: list[Request] = []
        while kills and kills[0][0] == now:
            returned += replicas[kills.pop(0)[1]].kill(now)
        for request in returned:
            lost += request.emitted
            request.restart()
        queue[:0] = sorted(returned, key=lambda request: (request.arrival, request.index))

        # Arrivals.
        while upcoming and upcoming[0].arrival == now:
            request = upcoming.pop(0)
            if not rejected[request.index]:
                queue.append(request)

        dispatch(queue, replicas)

        # Replicas at a boundary go on; idle ones with work start.
        for replica in replicas:
            if replica.iteration is None:
                replica.start(now)

    if until_s is not None:
        for replica in replicas:
            replica.interrupt(until_s)

    generated = sum(replica.emitted for replica in replicas)
    assert sum(request.emitted for request in requests) == generated - lost
    for request in requests:
        assert math.isnan(request.finish) == (request.emitted < request.output)
        assert math.isnan(request.first_token) == (request.emitted == 0)
    return ReferenceResult(
        first_token_s=np.array([request.first_token for request in requests], dtype=np.float64),
        finish_s=np.array([request.finish for request in requests], dtype=np.float64),
        replica=np.array([request.replica for request in requests], dtype=np.int64),
        preemptions=np.array([request.preemptions for request in requests], dtype=np.int64),
        rejected=rejected,
        emitted=np.array([request.emitted for request in requests], dtype=np.int64),
        iterations=np.array([replica.iterations for replica in replicas], dtype=np.int64),
        busy_s=np.array([replica.busy for replica in replicas], dtype=np.float64),
        peak_kv=np.array([replica.peak_kv for replica in replicas], dtype=np.int64),
        tokens_generated=generated,
        tokens_lost=lost,
        end_s=now,
    )


def _requests(arrival: Numbers, prompt: Numbers, output: Numbers, prefix_hit: Numbers) -> list[Request]:
    """Build the requests, refusing what is not a workload."""
    if len({len(arrival), len(prompt), len(output), len(prefix_hit)}) != 1:
        raise ValueError("arrival, prompt, output and prefix hit must be equally long")
    requests = [
        Request(i, float(arrival[i]), int(prompt[i]), int(output[i]), int(prefix_hit[i])) for i in range(len(arrival))
    ]
    if any(later.arrival < earlier.arrival for earlier, later in pairwise(requests)):
        raise ValueError("arrivals must be in ascending order")
    if any(request.arrival < 0 for request in requests):
        raise ValueError("arrivals must not be negative")
    if any(request.prompt < 1 or request.output < 1 or request.prefix_hit < 0 for request in requests):
        raise ValueError("a request needs a prompt and an output of at least one token, and no negative prefix hit")
    return requests


def _replicas(pools: Sequence[ReferencePool]) -> list[Replica]:
    """Build the replicas of all pools, numbered in order."""
    replicas: list[Replica] = []
    for pool in pools:
        if not 1 <= pool.batch_cap <= pool.profile.max_num_seqs:
            raise ValueError(f"batch cap {pool.batch_cap} is not within 1 and {pool.profile.max_num_seqs}")
        first = len(replicas)
        replicas += [Replica(first + i, pool.profile, pool.batch_cap) for i in range(pool.replicas)]
    if not replicas:
        raise ValueError("the fleet is empty")
    return replicas

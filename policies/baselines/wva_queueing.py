"""The workload-variant autoscaler's queueing core: how many replicas a rate needs to meet its latency objectives.

Source: llm-d-workload-variant-autoscaler and its inferno queue analyzer. With ``n`` requests in the batch, prompts of
``I`` and outputs of ``O`` tokens, ``T(n) = alpha + n * (beta * (I + O) / (O + 1) + gamma * (I + O / 2))``; prefill
takes ``T(n) + (beta + gamma) * I``, a decoded token ``T(n) + beta + gamma * (I + O / 2)``, and the service rate is
``mu(n) = n / (prefill + O * decode)`` up to a batch of ``N``. A state-dependent M/M/1 queue with room for ``N + 10
N`` gives wait and mean batch for a rate; bisection finds the highest rate that meets both objectives; replicas are
the measured rate over it. alpha, beta and gamma are the engine profile's a, b and d. The prefix cache is unknown to
this model.
Left out: the Kalman filter that tunes the three (not wired in there), throughput objectives, the penalty on changing
the GPU type. Pools are used cheapest first, by the summed price of the replicas that the whole rate would need.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import numpy as np

from policies.baselines.parameters import Parameter
from policies.baselines.windows import SlidingWindow
from policies.baselines.wva import ENGINE_S, VariantPolicy
from policies.contract import Bools, Floats, Observation, Snapshot, Target
from policies.fleet import Fleet

QUEUE_PER_BATCH = 10
BISECTIONS = 24


class Queue(NamedTuple):
    """Service curve of one replica of each of `k` pools; see the module docstring."""

    prompt: Floats  # (k,) tokens
    output: Floats
    alpha: Floats  # (k,) seconds
    beta: Floats
    gamma: Floats
    batch: Floats  # (k,) largest

    def prefill_s(self, n: Floats) -> Floats:
        """Seconds of a prefill in a batch of `n`, (k, ...)."""
        return self._step_s(n) + self._wide((self.beta + self.gamma) * self.prompt, n)

    def decode_s(self, n: Floats) -> Floats:
        """Seconds per decoded token in a batch of `n`, (k, ...)."""
        return self._step_s(n) + self._wide(self.beta + self.gamma * (self.prompt + self.output / 2.0), n)

    def _step_s(self, n: Floats) -> Floats:
        compute = self.beta * (self.prompt + self.output) / (self.output + 1.0)
        read = self.gamma * (self.prompt + self.output / 2.0)
        return self._wide(self.alpha, n) + n * self._wide(compute + read, n)

    @staticmethod
    def _wide(values: Floats, n: Floats) -> Floats:
        return values.reshape(-1, *([1] * (n.ndim - 1)))

    def rates(self) -> Floats:
        """Service rates mu(1) .. mu(N) (k, max N), requests per second; beyond a pool's own N the last one."""
        states = np.arange(1.0, np.max(self.batch) + 1.0)[np.newaxis, :]
        n = np.minimum(states, self.batch[:, np.newaxis])
        rates: Floats = n / (self.prefill_s(n) + self._wide(self.output, n) * self.decode_s(n))
        return rates


def latencies(queue: Queue, rate_rps: Floats) -> tuple[Floats, Floats]:
    """Mean TTFT and time per token (k,) at an arrival rate (k,), of the queue with room for 11 batches.

    States up to the largest batch are summed one by one, those beyond in closed form: they form a geometric series.
    """
    rates = queue.rates()
    batch = queue.batch
    states = np.arange(1, rates.shape[1] + 1)
    inside = states <= batch[:, np.newaxis]
    with np.errstate(divide="ignore"):
        logs = np.cumsum(np.where(inside, np.log(np.maximum(rate_rps, 1e-12))[:, np.newaxis] - np.log(rates), 0.0), 1)
    top = np.maximum(logs.max(axis=1), 0.0)
    weights = np.where(inside, np.exp(logs - top[:, np.newaxis]), 0.0)
    idle = np.exp(-top)
    last = np.take_along_axis(weights, (batch[:, np.newaxis] - 1).astype(np.int64), 1)[:, 0]
    ratio = np.minimum(rate_rps / rates[:, -1], 1.0 - 1e-9)
    room = QUEUE_PER_BATCH * batch
    power = ratio**room
    tail = last * ratio * (1.0 - power) / (1.0 - ratio)  # sum of last * ratio^j, j = 1 .. room
    # sum of j * ratio^j in closed form
    tail_waiting = last * ratio * (1.0 - (room + 1.0) * power + room * power * ratio) / (1.0 - ratio) ** 2
    whole = idle + weights.sum(axis=1) + tail
    accepted = rate_rps * (1.0 - last * power / whole)
    wait_s = tail_waiting / whole / np.maximum(accepted, 1e-12)
    in_service = ((weights * states).sum(axis=1) + tail * batch) / whole
    mean_batch = np.maximum(in_service, 1.0)
    decode_s = queue.decode_s(mean_batch)
    return wait_s + queue.prefill_s(mean_batch) + decode_s, decode_s


def highest_rate(queue: Queue, ttft_slo_s: Floats, tpot_slo_s: Floats) -> Floats:
    """Requests per second (k,) that one replica serves within both objectives (k,); 0 where none is slow enough."""
    low, high = np.zeros_like(queue.batch), queue.rates()[:, -1] * (1.0 - 1e-6)
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        ttft_s, tpot_s = latencies(queue, middle)
        holds = (ttft_s <= ttft_slo_s) & (tpot_s <= tpot_slo_s)
        low, high = np.where(holds, middle, low), np.where(holds, high, middle)
    return low


class WvaQueueingPolicy(VariantPolicy):
    """Scales on the measured rate over what the queueing model lets one replica serve.

    Args:
        fleet: the services.
        rate_factor: on the measured rate; 1 in the original.
        stabilization_s: of the HPA behind, both ways, seconds.
    """

    name = "wva-queueing"
    PARAMETERS: ClassVar[tuple[Parameter, ...]] = (
        Parameter("rate_factor", 1.0, 0.05, 5.0, log=True, meaning="factor on the measured request rate"),
        Parameter("stabilization_s", 240.0, 0.0, 1800.0, zero=True, meaning="of the HPA behind, both ways"),
    )

    def __init__(self, fleet: Fleet, rate_factor: float = 1.0, stabilization_s: float = 240.0) -> None:
        super().__init__(fleet, stabilization_s)
        n = len(fleet)
        self.rate_factor = rate_factor
        self._rate = SlidingWindow(n, ENGINE_S)
        self._prompt = np.full(n, np.nan)
        self._output = np.full(n, np.nan)

    def forget(self, rows: Bools) -> None:
        """Forget rates and lengths."""
        self._rate.reset(rows)
        self._prompt[rows] = self._output[rows] = np.nan

    def propose(self, observation: Observation) -> Target:
        """Remember rate and lengths, then as the base."""
        snapshot = observation.snapshot
        self._rate.add(snapshot.time_s, snapshot.arrival_rps)
        self._prompt = np.where(np.isnan(snapshot.prompt_tokens_mean), self._prompt, snapshot.prompt_tokens_mean)
        self._output = np.where(np.isnan(snapshot.output_tokens_mean), self._output, snapshot.output_tokens_mean)
        return super().propose(observation)

    def analyse(self, snapshot: Snapshot, placed: Floats, kv: Floats, queue: Floats) -> Floats:
        """Replicas by pool, the cheapest for the whole rate first; NaN, which holds, until lengths are known."""
        fleet = self.fleet
        n, pools = fleet.exists.shape
        rate = self._rate.mean(snapshot.time_s) * self.rate_factor
        known = ~np.isnan(rate + self._prompt + self._output)
        prompt = np.repeat(np.where(known, self._prompt, 1.0), pools)
        output = np.repeat(np.where(known, np.maximum(self._output, 1.0), 1.0), pools)
        # The largest batch: what the engine admits and the cache holds.
        batch = np.minimum(fleet.max_num_seqs.ravel(), fleet.kv_capacity.ravel() / (prompt + output / 2.0))
        curve = Queue(
            prompt,
            output,
            fleet.a.ravel(),
            fleet.b.ravel(),
            fleet.d.ravel(),
            np.maximum(np.floor(batch), 1.0),
        )
        highest = highest_rate(curve, np.repeat(fleet.ttft_slo_s, pools), np.repeat(fleet.tpot_slo_s, pools))
        per_replica = np.maximum(highest.reshape(n, pools), 1e-6)
        whole = np.where(fleet.exists, np.ceil(rate[:, np.newaxis] / per_replica - 1e-9), 0.0)
        price = np.where(fleet.exists, fleet.usd_per_replica_s * whole, np.inf)
        desired = np.where(fleet.exists, fleet.min_replicas, 0).astype(np.float64)
        left = rate - (desired * per_replica).sum(axis=1)
        order, rows = np.argsort(price, axis=1, kind="stable"), np.arange(n)
        for rank in range(pools):
            pool = order[:, rank]
            room = np.maximum(fleet.max_replicas[rows, pool] - desired[rows, pool], 0.0)
            added = np.clip(np.ceil(np.maximum(left, 0.0) / per_replica[rows, pool] - 1e-9), 0.0, room)
            desired[rows, pool] += np.where(fleet.exists[rows, pool], np.nan_to_num(added), 0.0)
            left = left - np.nan_to_num(added) * per_replica[rows, pool]
        return np.where(known[:, np.newaxis], desired, np.nan)

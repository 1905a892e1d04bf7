"""llm-d's autoscaling through KEDA and an HPA: on latency objectives, on requests in flight, on tokens.

Source: llm-d autoscaling guides and their ScaledObjects (KEDA with the endpoint picker's metrics). Each signal becomes
a desired count every 15 s, which passes an HPA's 10 % tolerance and the guide's own behaviour.
Three details are not documented in what could be read, so they follow llm-d in spirit rather than to the letter: that
the SLO law falls back to no change below its own count, the second threshold of the in-flight trigger, and what exactly
counts as tokens in flight. Predicted latencies (preferred there) are left out; the actual ones are used, as the guides
do where no predictor runs.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from policies.baselines.hpa_behavior import Behavior, ScalingRules, tolerated
from policies.baselines.parameters import SPOT_SHARE, Parameter
from policies.baselines.single_pool import Service, SinglePoolPolicy
from policies.baselines.windows import SlidingWindow
from policies.contract import TPOT_EDGES_S, TTFT_EDGES_S, Bools, Floats, Observation
from policies.fleet import Fleet
from policies.latency import histogram_quantile
from policies.pool_arrays import sum_pools

SIGNAL_S = 15.0
QUANTILE = 0.9
RATE_WINDOW_S = 60.0
SMOOTHING_S = 45.0
SIGNAL_CAP = 2.0


class LlmdSloPolicy(SinglePoolPolicy):
    """Scales on the worse of P90 TTFT and P90 TPOT over their objectives.

    ``s = mean over 45 s of min(max(P90 TTFT / SLO, P90 TPOT / SLO), 2)``, quantiles over 60 s of histogram; nothing
    measured counts as 0. With ``n`` replicas of which a share ``c`` is ready: above `up`, ``n + ceil(n*(s*c/up - 1))``
    (never less than ``n``); below `down`, ``n - floor(n*(1 - s/down))``. Up max(100 %, 4 replicas) per 60 s after 30 s,
    down one replica per 120 s after 180 s.

    Args:
        fleet: the services.
        up: share of the objectives above which replicas are added.
        down: share of the objectives below which they are removed.
        stabilization_s: window of scale-down stabilisation, seconds.
        spot_share: share of the replicas on spot where it is offered, 0..1.
    """

    name = "llm-d-slo"
    PARAMETERS: ClassVar[tuple[Parameter, ...]] = (
        Parameter("up", 0.55, 0.1, 1.5, log=True, meaning="share of the objectives that adds replicas"),
        Parameter("down", 0.40, 0.02, 1.0, log=True, meaning="share of the objectives that removes them"),
        Parameter("stabilization_s", 180.0, 0.0, 3600.0, zero=True, meaning="window of scale-down stabilisation"),
        SPOT_SHARE,
    )
    tick_s = SIGNAL_S

    def __init__(
        self,
        fleet: Fleet,
        up: float = 0.55,
        down: float = 0.40,
        stabilization_s: float = 180.0,
        spot_share: float = 0.5,
    ) -> None:
        super().__init__(fleet, spot_share)
        n = len(fleet)
        self.up = up
        self.down = down
        self._first_tokens = SlidingWindow(n, RATE_WINDOW_S, len(TTFT_EDGES_S) + 1)
        self._finishes = SlidingWindow(n, RATE_WINDOW_S, len(TPOT_EDGES_S) + 1)
        self._signal = SlidingWindow(n, SMOOTHING_S)
        self._behavior = Behavior(
            n,
            up=ScalingRules(stabilization_s=30.0, replicas=4, share=1.0, period_s=60.0),
            down=ScalingRules(stabilization_s=stabilization_s, replicas=1, share=0.0, period_s=120.0),
        )

    def forget(self, rows: Bools) -> None:
        """Forget latencies and recommendations."""
        for window in (self._first_tokens, self._finishes, self._signal):
            window.reset(rows)
        self._behavior.reset(rows)

    def desired(self, service: Service, observation: Observation, due: Bools) -> Floats:
        """The law's count, stabilised and limited."""
        snapshot, time_s, fleet = service.snapshot, service.time_s, self.fleet
        signals = []
        for window, rates, edges, slo_s in (
            (self._first_tokens, snapshot.ttft_histogram_rps, TTFT_EDGES_S, fleet.ttft_slo_s),
            (self._finishes, snapshot.tpot_histogram_rps, TPOT_EDGES_S, fleet.tpot_slo_s),
        ):
            if rates.shape[1] == 0:  # nobody keeps histograms here: unknown, so hold
                return np.full(len(fleet), np.nan)
            window.add(time_s, rates * snapshot.window_s[:, np.newaxis])
            counts = window.sum(time_s)
            quantile_s = histogram_quantile(counts, edges, QUANTILE)
            silent = np.nansum(counts, axis=1) <= 0
            known = ~np.isnan(rates).any(axis=1)
            signals.append(np.where(known, np.where(silent, 0.0, quantile_s / slo_s), np.nan))
        self._signal.add(time_s, np.minimum(np.maximum(*signals), SIGNAL_CAP), due)
        seen = ~np.isnan(signals[0] + signals[1])
        strain = np.where(seen, self._signal.mean(time_s), np.nan)
        desired = tolerated(slo_law(strain, service.current, service.ready, self.up, self.down), service.current)
        return self._behavior.settle(time_s, due & ~np.isnan(desired), service.current, desired)


def slo_law(strain: Floats, current: Floats, ready: Floats, up: float = 0.55, down: float = 0.40) -> Floats:
    """Replicas (n,) for a `strain` (n,), the latency over its objective.

    >>> slo_law(np.array([1.1, 0.2]), np.array([4.0, 8.0]), np.array([4.0, 8.0])).tolist()
    [8.0, 4.0]
    """
    partial = (ready > 0) & (ready < current)
    share = np.where(partial, ready / np.maximum(current, 1.0), 1.0)
    more = current + np.maximum(np.ceil(current * (strain * share / up - 1.0) - 1e-9), 0.0)
    less = current - np.floor(current * (1.0 - strain / down) + 1e-9)
    desired = np.where(strain > up, more, np.where(strain < down, less, current))
    return np.where(np.isnan(strain), np.nan, desired)


class LlmdInFlightPolicy(SinglePoolPolicy):
    """Scales on requests that run (16 a replica) and requests that wait, whichever asks for more.

    Up 100 % per 15 s at once, down 100 % per 15 s after 300 s.

    Args:
        fleet: the services.
        threshold: running requests per replica.
        queue_threshold: waiting requests per replica.
        stabilization_s: window of scale-down stabilisation, seconds.
        spot_share: share of the replicas on spot where it is offered, 0..1.
    """

    name = "llm-d-inflight"
    PARAMETERS: ClassVar[tuple[Parameter, ...]] = (
        Parameter("threshold", 16.0, 0.5, 512.0, log=True, meaning="running requests per replica"),
        Parameter("queue_threshold", 16.0, 0.25, 512.0, log=True, meaning="waiting requests per replica"),
        Parameter("stabilization_s", 300.0, 0.0, 3600.0, zero=True, meaning="window of scale-down stabilisation"),
        SPOT_SHARE,
    )
    tick_s = SIGNAL_S

    def __init__(
        self,
        fleet: Fleet,
        threshold: float = 16.0,
        queue_threshold: float = 16.0,
        stabilization_s: float = 300.0,
        spot_share: float = 0.5,
    ) -> None:
        super().__init__(fleet, spot_share)
        self.threshold = threshold
        self.queue_threshold = queue_threshold
        self._behavior = Behavior(
            len(fleet),
            up=ScalingRules(stabilization_s=0.0, replicas=0, share=1.0, period_s=15.0),
            down=ScalingRules(stabilization_s=stabilization_s, replicas=0, share=1.0, period_s=15.0),
        )

    def forget(self, rows: Bools) -> None:
        """Forget recommendations."""
        self._behavior.reset(rows)

    def desired(self, service: Service, observation: Observation, due: Bools) -> Floats:
        """The larger of both triggers, stabilised and limited."""
        needed = np.maximum(service.running / self.threshold, service.waiting / self.queue_threshold)
        current = service.current
        desired = np.where(tolerated(needed, current) == current, current, np.maximum(np.ceil(needed - 1e-9), 1.0))
        desired = np.where(np.isnan(needed), np.nan, desired)
        return self._behavior.settle(service.time_s, due & ~np.isnan(desired), current, desired)


class LlmdTokensPolicy(SinglePoolPolicy):
    """Scales on the prompt tokens in flight over the peak prefill rate, and on KV cache in use.

    ``max(ceil(tokens in flight / peak tokens per second / 1.5 s), ceil(sum of KV cache usage / 0.8))``. Tokens in
    flight are requests in the system times the mean prompt of the requests that finished. The peak is a constant of
    the deployment (15,928 tokens/s for the guide's 32B model on two H100); here it is a factor times what the engine
    profile says. Up one replica per 180 s, down one per 300 s after 300 s.

    Args:
        fleet: the services.
        peak_factor: peak prefill rate over the engine profile's.
        work_s: seconds of prefill that a replica may have in flight.
        kv_target: KV cache usage per replica.
        stabilization_s: window of scale-down stabilisation, seconds.
        spot_share: share of the replicas on spot where it is offered, 0..1.
    """

    name = "llm-d-tokens"
    PARAMETERS: ClassVar[tuple[Parameter, ...]] = (
        Parameter("peak_factor", 1.0, 0.1, 100.0, log=True, meaning="peak prefill rate over the engine profile's"),
        Parameter("work_s", 1.5, meaning="seconds of prefill in flight per replica", low=0.1, high=60.0, log=True),
        Parameter("kv_target", 0.8, 0.02, 1.0, log=True, meaning="KV cache usage per replica"),
        Parameter("stabilization_s", 300.0, 0.0, 3600.0, zero=True, meaning="window of scale-down stabilisation"),
        SPOT_SHARE,
    )
    tick_s = SIGNAL_S

    def __init__(
        self,
        fleet: Fleet,
        peak_factor: float = 1.0,
        work_s: float = 1.5,
        kv_target: float = 0.8,
        stabilization_s: float = 300.0,
        spot_share: float = 0.5,
    ) -> None:
        super().__init__(fleet, spot_share)
        self.peak_factor = peak_factor
        self.work_s = work_s
        self.kv_target = kv_target
        self._prompt = np.full(len(fleet), np.nan)
        self._behavior = Behavior(
            len(fleet),
            up=ScalingRules(stabilization_s=0.0, replicas=1, share=0.0, period_s=180.0),
            down=ScalingRules(stabilization_s=stabilization_s, replicas=1, share=0.0, period_s=300.0),
        )

    def forget(self, rows: Bools) -> None:
        """Forget recommendations and lengths."""
        self._behavior.reset(rows)
        self._prompt[rows] = np.nan

    def desired(self, service: Service, observation: Observation, due: Bools) -> Floats:
        """The larger of both signals, stabilised and limited."""
        fleet, snapshot = self.fleet, service.snapshot
        self._prompt = np.where(np.isnan(snapshot.prompt_tokens_mean), self._prompt, snapshot.prompt_tokens_mean)
        # Until a request has finished there is no length to multiply by.
        tokens = service.in_system * np.where(np.isnan(self._prompt), 0.0, self._prompt)
        rate = np.where(fleet.exists, 1.0 / np.maximum(fleet.b, 1e-9), 0.0)
        pools = np.maximum(sum_pools(fleet.exists.astype(np.float64)), 1.0)
        peak_tps = self.peak_factor * sum_pools(rate) / pools
        by_tokens = tokens / np.maximum(peak_tps, 1e-9) / self.work_s
        by_cache = service.kv_usage * service.ready / self.kv_target
        needed = np.maximum(by_tokens, by_cache)
        current = service.current
        desired = np.where(tolerated(needed, current) == current, current, np.maximum(np.ceil(needed - 1e-9), 1.0))
        desired = np.where(np.isnan(needed), np.nan, desired)
        return self._behavior.settle(service.time_s, due & ~np.isnan(desired), current, desired)

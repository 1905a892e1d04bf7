"""The Dynamo planner's throughput scaling: replicas for the load that is predicted for the next interval.

Source: ai-dynamo/dynamo 1.6.1, `components/src/dynamo/planner/core/throughput_scaling.py` and
`core/load/predictors.py`. Every 180 s the requests, prompts and outputs of the next interval are predicted
separately; ``replicas = max(ceil(requests / interval / engine rate), 1)``, where the engine rate is that of the
largest batch whose TTFT and ITL meet the objectives in the performance model; at most eight replicas change per tick;
no lengths yet: hold. With load scaling on, this is a floor under the load scaling's answer.
Predictors: ``constant`` (the last value) and ``kalman`` (local linear trend; q_level 1, q_trend 0.1, r 10, the last
value until five points are in). ARIMA and Prophet are left out, and so are speculative decoding, the GPU budget and
separate prefill and decode fleets; the engine rate is of an engine that does both.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from policies.baselines.dynamo import DynamoLoadPolicy, Lengths, Replica
from policies.baselines.parameters import SPOT_SHARE, Parameter
from policies.baselines.single_pool import Service, SinglePoolPolicy
from policies.baselines.windows import SlidingWindow
from policies.contract import Bools, Floats, Observation, Target
from policies.fleet import Fleet

INTERVAL_S = 180.0
MAX_STEP = 8.0
MIN_POINTS = 5
Q_LEVEL, Q_TREND, R = 1.0, 0.1, 10.0


class KalmanTrend:
    """Local linear trend of `n` series: level and slope, one step ahead."""

    def __init__(self, n: int) -> None:
        self._state = np.zeros((n, 2))
        self._covariance = np.zeros((n, 2, 2))
        self._points = np.zeros(n)
        self._last = np.full(n, np.nan)

    def reset(self, rows: Bools) -> None:
        """Forget the masked series."""
        self._points[rows] = 0.0
        self._last[rows] = np.nan

    def add(self, values: Floats, wanted: Bools) -> None:
        """Fold in one point (n,) of the wanted series."""
        rows = np.flatnonzero(wanted & ~np.isnan(values))
        first = rows[self._points[rows] == 0]
        self._state[first] = np.stack([values[first], np.zeros(len(first))], axis=1)
        self._covariance[first] = np.eye(2) * R
        later = rows[self._points[rows] > 0]
        step = np.array([[1.0, 1.0], [0.0, 1.0]])
        state = self._state[later] @ step.T
        covariance = step @ self._covariance[later] @ step.T + np.diag([Q_LEVEL, Q_TREND])
        gain = covariance[:, :, 0] / (covariance[:, 0, 0] + R)[:, np.newaxis]
        self._state[later] = state + gain * (values[later] - state[:, 0])[:, np.newaxis]
        self._covariance[later] = covariance - gain[:, :, np.newaxis] * covariance[:, np.newaxis, 0, :]
        self._points[rows] += 1
        self._last[rows] = values[rows]

    def predict(self) -> Floats:
        """The next point (n,), never below 0; the last value until five points are in; NaN before the first."""
        ahead = np.maximum(self._state.sum(axis=1), 0.0)
        return np.where(self._points >= MIN_POINTS, ahead, self._last)


class Constant(KalmanTrend):
    """The last value."""

    def predict(self) -> Floats:
        """The last value (n,); NaN before the first."""
        return self._last.copy()


def engine_rate(
    replica: Replica, prompt: Floats, output: Floats, computed: Floats, ttft_slo_s: Floats, tpot_slo_s: Floats
) -> Floats:
    """Requests per second (n,) of one replica at the largest batch that meets both objectives; of 1 where none does.

    In a steady state each request of a batch brings one prefill per `output` iterations, which slows all of them.
    """
    batch = np.arange(1.0, max(float(replica.max_num_seqs.max()), 1.0) + 1.0)[:, np.newaxis]
    context = batch * (prompt + output / 2.0)
    itl_s = replica.itl_s(batch, context)
    prefill_s = prompt * computed * replica.b
    tpot_s = itl_s + batch * prefill_s / np.maximum(output, 1.0)
    ttft_s = replica.prefill_s(prompt * computed, batch, context)
    fits = (context <= replica.kv_capacity) & (batch <= replica.max_num_seqs)
    holds = fits & (tpot_s <= tpot_slo_s) & (ttft_s <= ttft_slo_s)
    best = np.where(holds, batch, 1.0).max(axis=0)
    row = np.arange(len(prompt))
    rate: Floats = best / (np.maximum(output, 1.0) * tpot_s[best.astype(np.int64) - 1, row])
    return rate


class DynamoThroughputPolicy(SinglePoolPolicy):
    """Replicas for the predicted load, at least.

    Args:
        fleet: the services.
        predictor: ``kalman`` or ``constant``.
        load_scaling: ``off``, or the mode of the load scaling that stands on this floor: ``throughput``, ``latency``,
            ``sla``.
        demand_factor: on the predicted requests; 1 in the original.
        spot_share: share of the replicas on spot where it is offered, 0..1.
    """

    name = "dynamo-throughput"
    PARAMETERS: ClassVar[tuple[Parameter, ...]] = (
        Parameter("predictor", "kalman", choices=("kalman", "constant"), meaning="of the next interval"),
        Parameter("load_scaling", "off", choices=("off", "throughput", "latency", "sla"), meaning="above this floor"),
        Parameter("demand_factor", 1.0, 0.2, 5.0, log=True, meaning="factor on the predicted requests"),
        SPOT_SHARE,
    )
    tick_s = INTERVAL_S

    def __init__(
        self,
        fleet: Fleet,
        predictor: str = "kalman",
        load_scaling: str = "off",
        demand_factor: float = 1.0,
        spot_share: float = 0.5,
    ) -> None:
        super().__init__(fleet, spot_share)
        n = len(fleet)
        self.demand_factor = demand_factor
        self._load = None if load_scaling == "off" else DynamoLoadPolicy(fleet, load_scaling, spot_share=spot_share)
        series = KalmanTrend if predictor == "kalman" else Constant
        self._requests, self._prompt, self._output = series(n), series(n), series(n)
        self._rate = SlidingWindow(n, INTERVAL_S)
        self._lengths = Lengths(n)
        self._floor = np.full(n, np.nan)

    def forget(self, rows: Bools) -> None:
        """Forget the series, and what the load scaling remembers."""
        for part in (self._requests, self._prompt, self._output, self._rate, self._lengths):
            part.reset(rows)
        self._floor[rows] = np.nan
        if self._load is not None:
            self._load.reset(rows)

    def propose(self, observation: Observation) -> Target:
        """The predicted count; with load scaling its answer, no less than the predicted count."""
        own = super().propose(observation)
        if self._load is None:
            return own
        loaded = self._load.propose(observation)
        lacking = np.nan_to_num(self._floor) > loaded.replicas.sum(axis=1)
        raised = self.place(self._floor, Service.of(observation.snapshot, self.fleet, loaded.replicas.astype(float)))
        return self._placement.target(np.where(lacking[:, np.newaxis], raised, loaded.replicas))

    def desired(self, service: Service, observation: Observation, due: Bools) -> Floats:
        """The count for the next interval."""
        fleet, snapshot = self.fleet, service.snapshot
        self._lengths.update(service)
        self._rate.add(service.time_s, snapshot.arrival_rps)
        requests = self._rate.mean(service.time_s) * INTERVAL_S
        seen = due & ~np.isnan(requests)
        for series, values in (
            (self._requests, requests),
            (self._prompt, self._lengths.prompt),
            (self._output, self._lengths.output),
        ):
            series.add(values, seen)
        prompt, output = np.maximum(self._prompt.predict(), 1.0), np.maximum(self._output.predict(), 1.0)
        rate = engine_rate(
            Replica(service, fleet), prompt, output, self._lengths.computed, fleet.ttft_slo_s, fleet.tpot_slo_s
        )
        needed = np.ceil(self._requests.predict() * self.demand_factor / INTERVAL_S / rate - 1e-9)
        count = np.clip(np.maximum(needed, 1.0), service.current - MAX_STEP, service.current + MAX_STEP)
        count = np.where(seen, count, np.nan)
        self._floor = np.where(np.isnan(count), self._floor, count)
        return count

"""SkyServe's request-rate autoscaler, with its spot fallback.

Source: skypilot, `sky/serve/autoscalers.py` (0.9). Every 20 s ``target = ceil(qps / target_qps)`` with the rate of the
last 60 s; 15 decisions in a row above what is set (300 s) raise it, 60 below (1200 s) lower it, any other sample
begins anew; from zero replicas it is immediate. Where spot and on-demand pools stand side by side: the base of
on-demand replicas is always there, the rest is spot, and on-demand fills in for spot replicas that are not ready
(dynamic fallback).
The rate per replica is the operator's to give; the default is one of the project's examples.
Left out: the instance-aware autoscaler, the decision every 5 s at zero replicas.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from policies.baselines.parameters import Parameter
from policies.baselines.single_pool import Service, SinglePoolPolicy, spread
from policies.baselines.windows import SlidingWindow, Streak
from policies.contract import Bools, Floats, Observation
from policies.fleet import Fleet
from policies.pool_arrays import any_pool, nan_to_num, sum_pools

DECISION_S = 20.0
QPS_WINDOW_S = 60.0


class SkyServePolicy(SinglePoolPolicy):
    """Scales on requests per second.

    Args:
        fleet: the services.
        target_qps: requests per second and replica.
        upscale_delay_s: how long votes must point up, seconds.
        downscale_delay_s: how long votes must point down, seconds.
        base_ondemand: on-demand replicas that are always there beside spot ones.
    """

    name = "skyserve"
    PARAMETERS: ClassVar[tuple[Parameter, ...]] = (
        Parameter("target_qps", 2.5, 0.01, 100.0, log=True, meaning="requests per second and replica"),
        Parameter("upscale_delay_s", 300.0, 20.0, 1200.0, log=True, meaning="how long votes must point up"),
        Parameter("downscale_delay_s", 1200.0, 20.0, 7200.0, log=True, meaning="how long they must point down"),
        Parameter("base_ondemand", 0, 0, 8, whole=True, zero=True, needs_spot=True, meaning="on-demand replicas kept"),
    )
    tick_s = DECISION_S
    replaces = True

    def __init__(
        self,
        fleet: Fleet,
        target_qps: float = 2.5,
        upscale_delay_s: float = 300.0,
        downscale_delay_s: float = 1200.0,
        base_ondemand: int = 0,
    ) -> None:
        super().__init__(fleet)
        self.target_qps = target_qps
        self.upscale_wishes = int(upscale_delay_s / DECISION_S)
        self.downscale_wishes = int(downscale_delay_s / DECISION_S)
        self.base_ondemand = base_ondemand
        self._rate = SlidingWindow(len(fleet), QPS_WINDOW_S)
        self._streak = Streak(len(fleet))
        self._target = np.full(len(fleet), np.nan)

    def forget(self, rows: Bools) -> None:
        """Forget the rate, the votes and the target."""
        self._rate.reset(rows)
        self._streak.reset(rows)
        self._target[rows] = np.nan

    def desired(self, service: Service, observation: Observation, due: Bools) -> Floats:
        """The rate's count once enough votes in a row asked for more, or for less."""
        rate = service.snapshot.arrival_rps
        self._rate.add(service.time_s, rate)
        asked = np.where(np.isnan(self._target), service.current, self._target)
        desired = np.ceil(self._rate.mean(service.time_s) / self.target_qps - 1e-9)
        desired = np.clip(desired, service.minimum, service.maximum)
        seen = due & ~np.isnan(desired)
        sign = np.nan_to_num(np.sign(desired - asked))
        votes, _ = self._streak.update(service.time_s, sign, seen)
        enough = np.where(sign > 0, self.upscale_wishes, self.downscale_wishes)
        ripe = seen & (((sign != 0) & (votes >= enough)) | ((asked < 1) & (sign > 0)))
        self._streak.reset(ripe)
        self._target = np.where(ripe, desired, np.where(seen, asked, self._target))
        return np.where(seen, self._target, np.nan)

    def place(self, desired: Floats, service: Service) -> Floats:
        """Spot beyond the base, and on-demand for the spot that is not ready; cheapest first inside each class."""
        fleet = self.fleet
        spot = fleet.is_spot & fleet.exists
        both = any_pool(spot) & any_pool(~fleet.is_spot & fleet.exists)
        desired = nan_to_num(desired)
        on_demand = np.minimum(desired, float(self.base_ondemand))
        ready_spot = sum_pools(np.where(spot, nan_to_num(service.snapshot.replicas_ready), 0.0))
        fallback = np.maximum(desired - on_demand - ready_spot, 0.0)
        on_spot = np.where(spot, spread(desired - on_demand, fleet, 1.0), 0)
        elsewhere = np.where(spot, 0, spread(on_demand + fallback, fleet, 0.0))
        single = spread(desired, fleet, self.spot_share)
        return np.where(both[:, np.newaxis], on_spot + elsewhere, single).astype(np.float64)

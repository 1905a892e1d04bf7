"""`n` training episodes side by side: the decision core driving the simulated cluster, with a reward.

This is the environment; `autoscaling_env` and `vector_env` only dress it for Gymnasium and Stable-Baselines3.
This module must not know about learning algorithms.
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field

from envs.cluster.simulation import SimulatedCluster
from envs.randomization import Range, ScenarioBank, steady_demand
from envs.reward import Reward
from policies.action import decode_action
from policies.contract import Bools, Features, Floats, Ints, Observation, put_rows, take_rows
from policies.decider import Decider
from policies.engine import StrictModel
from policies.fleet import Fleet

WAVES = 8
FOLLOWING_STEP_S = 300.0


class EpisodeSpec(StrictModel):
    """How episodes are cut from the bank."""

    steps: int = Field(default=240, ge=2, description="Control intervals per episode.")
    start_over_demand: Range = Field(
        default=(0.8, 4.0), description="Replicas at the start over the demand: below 1 starts in overload."
    )
    log_miss_price_spread: Annotated[float, Field(ge=0)] = Field(
        default=2.9, description="Half-width of the uniform spread of the log price of a miss between episodes."
    )
    usual_miss_rate: Annotated[float, Field(ge=0)] = Field(
        default=0.03,
        description="Miss rate at which misses weigh as much as the bill in the scale of the reward, whatever their "
        "price: episodes at a high price must not drown those at a low one.",
    )
    reward_scale: Annotated[float, Field(gt=0)] = Field(default=0.1, description="Factor on the reward.")
    miss_limit: Annotated[float, Field(gt=0)] = Field(
        default=3.0, description="Most misses counted in one window, in mean arrivals per window; bounds the reward."
    )


class StepResult(NamedTuple):
    """What one step gives, each with leading axis n."""

    observation: Observation
    reward: Floats
    truncated: Bools
    terms: dict[str, Floats]  # cost terms over the cost of following the demand, before scaling; attainment so far


class Episodes:
    """Runs `n` episodes; each ends by truncation after a fixed number of windows (a cluster does not die).

    Args:
        bank: the worlds.
        n: episodes side by side.
        spec: how episodes are cut.
        seed: of all draws.
        part: share of every trace's time that slices come from, as (from, to): never the same for training and
            validation.
        group: neighbours that run the same episode (world, slice of traffic, price of a miss and start), so that a
            learner can separate what the traffic does to all of them from what each one's actions do.

    Raises:
        ValueError: when that part of a trace is shorter than one episode, or `n` episodes are no whole groups.
    """

    def __init__(
        self,
        bank: ScenarioBank,
        n: int,
        spec: EpisodeSpec,
        seed: int = 0,
        part: tuple[float, float] = (0.0, 1.0),
        group: int = 1,
    ) -> None:
        if n % group:
            raise ValueError(f"{n} episodes cannot be divided into groups of {group}")
        window = bank.interface.window
        self.bank = bank
        self.spec = spec
        self.group = group
        # One more than the steps: the first window runs before the first action.
        self.length_s = (spec.steps + 1) * window.control_interval_s
        self._part = part
        shortest = int(np.argmin(bank.library.duration_s))
        room_s = bank.library.duration_s[shortest] * (part[1] - part[0])
        if room_s < self.length_s:
            raise ValueError(
                f"an episode lasts {self.length_s:.0f} s, but its part of trace "
                f"{bank.traces[shortest].name!r} only {room_s:.0f} s: fewer steps per episode, or a longer trace"
            )
        self.log_miss_price = float(np.log(bank.objective.miss_price))
        self.fleet = Fleet.empty(n, bank.fleet.pools)
        self.cluster = SimulatedCluster(bank.library, n, bank.fleet.pools, bank.rows, bank.slots, window)
        self.decider = Decider(self.fleet, window, bank.guardrails)
        self.reward = Reward(
            bank.objective,
            self.fleet,
            window.control_interval_s,
            scale=spec.reward_scale,
            usual_miss_rate=spec.usual_miss_rate,
            miss_limit=spec.miss_limit,
        )
        self._step = np.zeros(n, np.int64)
        self._last_step = np.full(n, spec.steps, np.int64)
        self._observation: Observation | None = None
        self.rng = np.random.default_rng(seed)
        self.scenario = np.zeros(n, np.int64)  # bank row of each episode

    def __len__(self) -> int:
        """Episodes side by side."""
        return len(self._step)

    def reset(self, stagger: bool = True) -> Observation:
        """Start all episodes anew.

        Args:
            stagger: shorten the first episodes of some waves, so that not all episodes begin at once.
        """
        n = len(self)
        self._last_step[:] = self.spec.steps
        if stagger:
            wave = np.arange(n) // self.group % WAVES
            self._last_step -= self.spec.steps * wave // WAVES
        self._begin(np.arange(n))
        self.decider.reset()
        self._observation = self.decider.observe(self.cluster.read())
        return self._observation

    def step(self, action: npt.NDArray[Any]) -> StepResult:
        """Apply actions (n, 4) in -1..1, run one window. Episodes that end are not restarted here: see `restart`."""
        assert self._observation is not None, "call reset() first"
        proposed = decode_action(action, self._observation, self.fleet, self.bank.interface.action)
        settled, _ = self.decider.settle(proposed, self._observation)
        self.cluster.apply(settled)
        self.cluster.run_window()
        reward, terms = self.reward.of_window(self.cluster.window_usage(), self.cluster.usage())
        self._step += 1
        self._observation = self.decider.observe(self.cluster.read())
        return StepResult(self._observation, reward, self._step >= self._last_step, terms)

    def restart(self, ended: Bools) -> Observation:
        """Start new episodes where `ended` (n,) is True; the observations of all."""
        assert self._observation is not None, "call reset() first"
        rows = np.flatnonzero(ended)
        if len(rows):
            self._last_step[rows] = self.spec.steps
            self._begin(rows)
            put_rows(self._observation, rows, self.decider.observe_rows(take_rows(self.cluster.read(), rows), rows))
        return self._observation

    def _begin(self, services: Ints) -> None:
        """Draw a scenario and a slice of its trace for each group of the listed services; run their first window."""
        bank, rng, k = self.bank, self.rng, len(services)
        groups = k // self.group  # a group begins and ends as one

        def each(drawn: npt.NDArray[Any]) -> npt.NDArray[Any]:
            return np.repeat(drawn, self.group)

        scenario = each(rng.integers(len(bank), size=groups))
        self.scenario[services] = scenario
        traces = bank.trace[scenario]
        duration_s = bank.library.duration_s[traces]
        earliest_s, latest_s = duration_s * self._part[0], duration_s * self._part[1] - self.length_s
        origin_s = earliest_s + (latest_s - earliest_s) * each(rng.random(groups))
        first, end = bank.library.rows(traces, np.array([origin_s, origin_s + self.length_s]))
        drawn = take_rows(bank.fleet, scenario)
        put_rows(self.fleet, services, drawn)
        spread = self.spec.log_miss_price_spread
        self.fleet.log_miss_price[services] = self.log_miss_price + each(rng.uniform(-spread, spread, groups))

        pools = bank.pools[scenario]
        demand = steady_demand(drawn, bank.library.totals(first, end), np.full(k, self.length_s))
        interval_s = bank.interface.window.control_interval_s
        self.reward.begin(
            services,
            bill_per_node=pools["bill_per_node"] > 0,
            node_gpus=pools["slots_per_node"] * bank.fleet.gpus[scenario],
            window_usd=self._following_usd_per_s(drawn, traces, origin_s) * interval_s,
            window_arrivals=np.maximum((end - first) * interval_s / self.length_s, 0.05),
        )

        low, high = self.spec.start_over_demand
        factor = np.exp(each(rng.uniform(np.log(low), np.log(high), size=groups)))[:, np.newaxis]
        shares = drawn.exists / np.maximum(drawn.exists.sum(axis=1, keepdims=True), 1)
        replicas = np.ceil(demand * factor * shares)
        self.cluster.begin(
            services,
            pools,
            ttft_slo_s=drawn.ttft_slo_s,
            tpot_slo_s=drawn.tpot_slo_s,
            origin_s=origin_s,
            first_row=first,
            end_row=end,
            seeds=each(rng.integers(1 << 62, size=groups)),
            replicas=np.clip(replicas, np.maximum(drawn.min_replicas, 0), drawn.max_replicas).astype(np.int64),
        )
        self.cluster.run_window(services)
        self._step[services] = 0

    def _following_usd_per_s(self, fleet: Fleet, traces: Ints, origin_s: Floats) -> Floats:
        """(k,) price of a fleet that follows the slices' demand in steps of a few minutes, on its cheapest pool.

        The unit of all costs: a world whose traffic comes in bursts costs several times its mean demand under any
        policy, and must not count several times.
        """
        blocks, k = max(round(self.length_s / FOLLOWING_STEP_S), 1), len(traces)
        step_s = self.length_s / blocks
        edges = self.bank.library.rows(traces, origin_s + step_s * np.arange(blocks + 1)[:, np.newaxis])
        # Every block of every episode is a row of its own: one estimate for all.
        each = take_rows(fleet, np.tile(np.arange(k), blocks))
        totals = self.bank.library.totals(edges[:-1].ravel(), edges[1:].ravel())
        demand = steady_demand(each, totals, np.full(blocks * k, step_s))
        replicas = np.where(each.exists, np.maximum(np.ceil(demand), 1.0), np.inf)
        usd_per_s = (replicas * np.where(each.exists, each.usd_per_replica_s, 1.0)).min(axis=1)
        mean_usd_per_s: Floats = usd_per_s.reshape(blocks, k).mean(axis=0)
        return mean_usd_per_s

    @property
    def features(self) -> Features:
        """(n, F) of the current observation."""
        assert self._observation is not None, "call reset() first"
        return self._observation.features

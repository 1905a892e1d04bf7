"""The environment for Gymnasium: one episode at a time.

Importing this module registers ``jevons/Autoscaling-v1``.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from envs.episodes import Episodes, EpisodeSpec
from envs.randomization import Randomization, ScenarioBank, draw_bank
from policies.action import ACTIONS
from policies.observation import FEATURES
from policies.spec import GuardrailSpec, InterfaceSpec, ObjectiveSpec

FEATURE_LIMIT = 10.0


def observation_space() -> gym.spaces.Box:
    """The encoded features, see `policies.observation.FEATURES`."""
    return gym.spaces.Box(-FEATURE_LIMIT, FEATURE_LIMIT, (len(FEATURES),), np.float32)


def action_space() -> gym.spaces.Box:
    """Residuals on headroom, slack, batch cap and spot share, see `policies.action`."""
    return gym.spaces.Box(-1.0, 1.0, (len(ACTIONS),), np.float32)


def small_bank(seed: int = 0) -> ScenarioBank:
    """A few small worlds, for trying things out."""
    ranges = Randomization(traces=4, scenarios=8, trace_s=2 * 3600.0, mean_replicas=(1.0, 3.0), max_replicas=8)
    return draw_bank(ranges, InterfaceSpec(), GuardrailSpec(), ObjectiveSpec(), seed)


class AutoscalingEnv(gym.Env[npt.NDArray[np.float32], npt.NDArray[np.float32]]):
    """Scale an LLM inference service through bursts.

    ## Description
    A service with one or more pools of replicas receives recorded or generated traffic. Every control interval the
    agent sees measurements as a metrics system reports them (late, and aggregated over the interval) and sets replicas
    and batch caps. Replicas take minutes to start and are billed from the grant of their node.

    ## Action Space
    `Box(-1, 1, (4,), float32)`: residuals on a reference rule, which is what all zeros do.

    | Num | Action | -1 | 0 | 1 |
    |---|---|---|---|---|
    | 0 | fewest replicas over the five-minute mean of the demand | reference / span | reference | reference x span |
    | 1 | slack: replicas above the fewest that are kept | reference / span | reference | reference x span |
    | 2 | batch cap over the batch that meets the TPOT objective | 1 / span | 1 | span |
    | 3 | share of capacity on spot, where offered | reference - span | reference | reference + span |

    Spans and references are in `policies.spec.ActionSpec`. In a surge (`policies.action.SURGE`) the fleet is at least
    what the reference rule asks for the demand of now. Guardrails settle every target.

    ## Observation Space
    `Box(-10, 10, (F,), float32)`: the features named in `policies.observation.FEATURES`, free of scale.
    ``info["snapshot"]`` holds the measurements themselves.

    ## Rewards
    Minus the cost of the window, in units of the cost of a fleet that follows the episode's demand in five-minute
    steps, times `reward_scale` and a factor that falls with the price of a miss. The cost is made of provisioned
    dollars, misses at the price of a miss (a feature, so that one policy learns the whole frontier) and churn. The
    terms are in ``info["terms"]``.

    ## Starting State
    A random scenario and time slice of its trace; the fleet starts at a random multiple of the slice's mean demand,
    below 1 included, so that overload is part of training.

    ## Episode End
    Truncation after `EpisodeSpec.steps` windows; never termination: a cluster does not die.

    ## Arguments
    * ``bank``: the worlds (`envs.randomization.ScenarioBank`); a few small ones when left out.
    * ``episodes``: `envs.episodes.EpisodeSpec`.

    ## Version History
    * v1: initial version.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - the name and type are Gymnasium's

    def __init__(self, bank: ScenarioBank | None = None, episodes: EpisodeSpec | None = None) -> None:
        self.observation_space: gym.spaces.Space[npt.NDArray[np.float32]] = observation_space()  # type: ignore[assignment]
        self.action_space: gym.spaces.Space[npt.NDArray[np.float32]] = action_space()  # type: ignore[assignment]
        self._episodes = Episodes(bank or small_bank(), 1, episodes or EpisodeSpec())

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        """Start an episode; a seed makes all that follows repeatable."""
        super().reset(seed=seed)
        self._episodes.rng = self.np_random
        observation = self._episodes.reset(stagger=False)
        return observation.features[0], {"snapshot": observation.snapshot.row(0)}

    def step(
        self, action: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Run one control window."""
        result = self._episodes.step(np.asarray(action)[np.newaxis])
        info = {
            "snapshot": result.observation.snapshot.row(0),
            "terms": {name: float(value[0]) for name, value in result.terms.items()},
        }
        return result.observation.features[0], float(result.reward[0]), False, bool(result.truncated[0]), info


gym.register(id="jevons/Autoscaling-v1", entry_point="envs.autoscaling_env:AutoscalingEnv")

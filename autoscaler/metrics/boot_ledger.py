"""How long starting replicas still need: nobody exports it, so their starts are remembered.

This module must not know where counts come from.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autoscaler.actuators.base import pools_of
from autoscaler.actuators.starts import StartTimes
from policies.contract import BOOT_BINS, Floats
from policies.spec import ScalingSpec

BOOT_EDGES_S = (30.0, 120.0)
"""Remaining seconds that separate the bins of `Snapshot.boot_pipeline`."""


class BootLedger:
    """When starting replicas were first seen, so that their remaining time can be told.

    Args:
        specs: the services; a pool's cold start is the expected time of its engine profile.
    """

    def __init__(self, specs: Sequence[ScalingSpec]) -> None:
        self._pools = pools_of(specs)
        self._cold_start_s = {pool: specs[pool.row].pools[pool.column].start.total_s for pool in self._pools}
        self._times = {pool: StartTimes() for pool in self._pools}
        self._shape = (len(specs), max(len(spec.pools) for spec in specs))

    def bins(self, starting: Floats, missing: np.ndarray, now_s: float) -> Floats:
        """(n, P, BOOT_BINS) starting replicas by expected remaining time; the longest-starting ones leave first."""
        counts = np.zeros((*self._shape, BOOT_BINS))
        for pool in self._pools:
            at = (pool.row, pool.column)
            if missing[at]:
                counts[at] = np.nan
                continue
            left_s = self._cold_start_s[pool] - self._times[pool].ages_s(int(starting[at]), now_s)
            if not len(left_s):
                continue
            places = np.searchsorted(BOOT_EDGES_S, left_s, "right")
            counts[at] = np.bincount(places, minlength=BOOT_BINS)
        return counts

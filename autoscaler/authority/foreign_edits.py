"""Edits by other people: a replica count in force that nobody here asked for.

This module must not know who may act, nor how counts are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from policies.contract import Bools, Floats, Ints
from policies.pool_arrays import any_pool, min_pools

UNKNOWN = -1
"""A count that nobody can tell an edit from."""


class ForeignEdits:
    """Finds edits by comparing what is in force with what was last carried out.

    Args:
        exists: (n, P) True where a service has such a pool.
        hold_s: an edit is left alone for this long after the last one, seconds.
    """

    def __init__(self, exists: Bools, hold_s: float) -> None:
        n = len(exists)
        self._exists = exists
        self._hold_s = hold_s
        self._applied: Ints = np.full(exists.shape, UNKNOWN, np.int64)  # what was last carried out
        self._base: Ints = np.full(exists.shape, UNKNOWN, np.int64)  # what was in force just before
        self._edited_s: Floats = np.full(n, -np.inf)
        self._edited_to: Ints = np.full(exists.shape, UNKNOWN, np.int64)
        self._order_s: Floats = np.full(n, -np.inf)  # stamp of the last order when the edit was found

    def look(self, world: Floats, now_s: float, ordered_s: Floats) -> None:
        """Find what is neither what was last applied, nor what was there before, nor on the way between both.

        Args:
            world: (n, P) replicas in force; NaN where unknown.
            now_s: time.
            ordered_s: (n,) stamp of the last order for the service, on whatever clock.
        """
        exists = self._exists
        known = ~any_pool(np.isnan(world) & exists)
        applied, base = (min_pools(np.where(exists, counts, 0)) for counts in (self._applied, self._base))
        ours = known & (applied >= 0) & (base >= 0)
        outside = (world < np.minimum(self._applied, self._base)) | (world > np.maximum(self._applied, self._base))
        found = ours & any_pool(outside & exists)
        again = known & self.standing(now_s, ordered_s) & any_pool((world != self._edited_to) & exists)
        new = found | again
        self._edited_s = np.where(new, now_s, self._edited_s)
        edited_to = np.where(new[:, np.newaxis], np.nan_to_num(world, nan=UNKNOWN), self._edited_to)
        self._edited_to = edited_to.astype(np.int64)
        self._order_s = np.where(new, ordered_s, self._order_s)
        # From here on the edit is what is there; while it is left alone nothing is applied.
        self.forget(new)

    def standing(self, now_s: float, ordered_s: Floats) -> Bools:
        """(n,) where an edit is to be left alone: recent, and no other order has been given since it was found.

        Orders are told apart and not dated: they come from hosts whose clocks differ from this one.
        """
        recent = now_s - self._edited_s < self._hold_s
        edited: Bools = recent & (ordered_s == self._order_s)
        return edited

    def carried_out(self, replicas: Ints, world: Floats, done: Bools, failed: Bools) -> None:
        """Remember what was carried out.

        Args:
            replicas: (n, P) targets.
            world: (n, P) replicas in force just before; NaN where unknown.
            done: (n,) True where the target is in force now.
            failed: (n,) True where nobody knows how far it came: no edit can be told from it.
        """
        rows = done[:, np.newaxis]
        self._applied = np.where(rows, replicas, self._applied)
        self._base = np.where(rows, np.where(np.isnan(world), UNKNOWN, world), self._base).astype(np.int64)
        self.forget(failed)

    def forget(self, rows: Bools) -> None:
        """Nobody knows whether the last targets of the masked services were carried out."""
        self._applied = np.where(rows[:, np.newaxis], UNKNOWN, self._applied)

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """What survives a restart: arrays with leading axis n."""
        return {
            "applied": self._applied,
            "base": self._base,
            "edited_s": self._edited_s,
            "edited_to": self._edited_to,
            "order_s": self._order_s,
        }

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Go on from what `state` returned."""
        self._applied, self._base, self._edited_to = (
            np.array(state[name], np.int64) for name in ("applied", "base", "edited_to")
        )
        self._edited_s = np.array(state["edited_s"], np.float64)
        self._order_s = np.array(state["order_s"], np.float64)

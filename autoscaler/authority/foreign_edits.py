"""Edits by other people: a replica count in force that nobody here asked for, and who puts ours back again and again.

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
REVERTS = 2
"""Counts of ours put back in a row that make an owner out of an edit."""


class ForeignEdits:
    """Finds edits by comparing what is in force with what was last carried out.

    Args:
        exists: (n, P) True where a service has such a pool.
        hold_s: an edit is left alone for this long after the last one, seconds.
        revert_s: a count that was written here and replaced within this time was put back, seconds.
    """

    def __init__(self, exists: Bools, hold_s: float, revert_s: float) -> None:
        n = len(exists)
        self._exists = exists
        self._hold_s = hold_s
        self._revert_s = revert_s
        self._applied: Ints = np.full(exists.shape, UNKNOWN, np.int64)  # what was last carried out
        self._base: Ints = np.full(exists.shape, UNKNOWN, np.int64)  # what was in force just before
        self._in_force: Bools = np.zeros(n, bool)  # whether what was carried out is known to have been in force
        self._failed: Bools = np.zeros(n, bool)  # whether nobody knows how far it came
        self._written_s: Floats = np.full(n, -np.inf)  # when a count was last changed here
        self._reverts: Ints = np.zeros(n, np.int64)  # counts of ours that were put back, in a row
        self._stood_since_s: Floats = np.full(n, np.inf)  # since when ours are in force where theirs were; inf: not
        self._edited_s: Floats = np.full(n, -np.inf)
        self._edited_to: Ints = np.full(exists.shape, UNKNOWN, np.int64)
        self._order_s: Floats = np.full(n, -np.inf)  # stamp of the last order when the edit was found

    def look(self, world: Floats, now_s: float, ordered_s: Floats, put_back: bool = False) -> None:
        """Find edits.

        A count that is known to have been in force is edited when another one is. Until then, what was there before
        and what lies on the way between both are no edits: an actuator may have to wait. After a failure only the two
        themselves are none.

        Args:
            world: (n, P) replicas in force; NaN where unknown.
            now_s: time.
            ordered_s: (n,) stamp of the last order for the service, on whatever clock.
            put_back: an edit is not left alone but overwritten; that it was one still counts.
        """
        exists = self._exists
        known = ~any_pool(np.isnan(world) & exists)
        applied, base = (min_pools(np.where(exists, counts, 0)) for counts in (self._applied, self._base))
        ours = known & (applied >= 0) & (base >= 0)
        other = (world != self._applied) & exists
        strange = other & (world != self._base)
        outside = (world < np.minimum(self._applied, self._base)) | (world > np.maximum(self._applied, self._base))
        found = ours & np.where(
            self._in_force, any_pool(other), any_pool(np.where(self._failed[:, np.newaxis], strange, outside & exists))
        )
        standing = self.standing(now_s, ordered_s)
        again = known & standing & any_pool((world != self._edited_to) & exists)
        # Counts of ours that have stood for as long, one after the other or a single one, or an order, end the row.
        lasted = now_s - self._written_s > self._revert_s
        kept = ours & ~found & any_pool((self._applied != self._edited_to) & exists)
        stood = now_s - self._stood_since_s > self._revert_s
        ended = ((kept | found) & self._in_force & (lasted | stood)) | (ordered_s != self._order_s)
        self._reverts = np.where(ended, 0, self._reverts) + (found & self._in_force & ~lasted)
        self._in_force = self._in_force | (ours & ~any_pool(other))
        self._stood_since_s = np.where(kept & self._in_force, np.minimum(self._stood_since_s, now_s), np.inf)
        new = found | again
        self._edited_s = np.where(new, -np.inf if put_back else now_s, self._edited_s)
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

    def reverted(self, ordered_s: Floats) -> Bools:
        """(n,) where somebody owns the count: ours was put back twice in a row, and no order has been given since."""
        owned: Bools = (self._reverts >= REVERTS) & (ordered_s == self._order_s)
        return owned

    def end(self, rows: Bools) -> None:
        """The edits of the masked services (n,) need no longer be left alone."""
        self._edited_s = np.where(rows, -np.inf, self._edited_s)

    def until_s(self, row: int) -> float:
        """When the edit of a service need no longer be left alone."""
        return float(self._edited_s[row] + self._hold_s)

    def value(self, row: int) -> str:
        """The counts that a service was last edited to, pool by pool."""
        return " + ".join(str(count) for count in self._edited_to[row, self._exists[row]].tolist())

    def carried_out(
        self, replicas: Ints, world: Floats, wrote: Floats, done: Bools, failed: Bools, now_s: float
    ) -> None:
        """Remember what was carried out.

        Args:
            replicas: (n, P) targets.
            world: (n, P) replicas in force just before; NaN where unknown.
            wrote: (n, P) counts that were certainly written; NaN where none was or nobody can tell.
            done: (n,) True where the target was carried out.
            failed: (n,) True where nobody knows how far it came.
            now_s: time.
        """
        tried, exists = done | failed, self._exists
        same = ~any_pool((replicas != self._applied) & exists)
        in_place = ~any_pool((np.where(np.isnan(wrote), world, wrote) != replicas) & exists)
        self._in_force = np.where(tried, (same & self._in_force) | in_place & done, self._in_force)
        self._failed = np.where(tried, failed, self._failed)
        changed = tried & any_pool((world != replicas) & exists)
        self._written_s = np.where(changed, now_s, self._written_s)
        rows = tried[:, np.newaxis]
        self._applied = np.where(rows, replicas, self._applied)
        self._base = np.where(rows, np.where(np.isnan(world), UNKNOWN, world), self._base).astype(np.int64)

    def forget(self, rows: Bools) -> None:
        """Nobody knows whether the last targets of the masked services were carried out."""
        self._applied = np.where(rows[:, np.newaxis], UNKNOWN, self._applied)
        self._in_force = self._in_force & ~rows

    def untold(self) -> Bools:
        """(n,) where nobody knows what was last carried out: what is in force is what there is."""
        return any_pool((self._applied == UNKNOWN) & self._exists) | self._failed

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """What survives a restart: arrays with leading axis n."""
        return {
            "applied": self._applied,
            "base": self._base,
            "in_force": self._in_force,
            "failed": self._failed,
            "written_s": self._written_s,
            "stood_since_s": self._stood_since_s,
            "reverts": self._reverts,
            "edited_s": self._edited_s,
            "edited_to": self._edited_to,
            "order_s": self._order_s,
        }

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Go on from what `state` returned."""
        self._applied, self._base, self._edited_to, self._reverts = (
            np.array(state[name], np.int64) for name in ("applied", "base", "edited_to", "reverts")
        )
        self._in_force, self._failed = (np.array(state[name], bool) for name in ("in_force", "failed"))
        self._edited_s, self._order_s, self._written_s, self._stood_since_s = (
            np.array(state[name], np.float64) for name in ("edited_s", "order_s", "written_s", "stood_since_s")
        )

"""What a controller remembers, saved and brought back service by service.

A controller may come back with other services, in another order, or in another number of shards: each service finds its
own rows by name, in whichever saved state holds the newest of them.
This module must not know what the arrays mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from autoscaler.records.database import STATES, Arrays, Database, unpack, unpack_names
from policies.contract import Bools
from policies.durable import HISTORY, Remembering

FINGERPRINT = "fingerprint"
"""What a service's rows were made for: they are brought back only where it is the same."""


class Memory:
    """The memory of several parts as one set of arrays.

    Args:
        parts: by name.
        fingerprints: (n,) of each service: its pools in order.
    """

    def __init__(self, parts: Mapping[str, Remembering], fingerprints: Sequence[str]) -> None:
        self._parts = dict(parts)
        self._fingerprints = np.array(fingerprints)

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """All parts, arrays with leading axis n."""
        arrays = {
            f"{part}/{name}": array for part, owner in self._parts.items() for name, array in owner.state().items()
        }
        return {**arrays, FINGERPRINT: self._fingerprints}

    def restore(self, saved: Arrays, rows: Mapping[int, int]) -> Bools:
        """Bring services back.

        Args:
            saved: what `state` returned once.
            rows: saved row by present row.

        Returns:
            (n,) which services were brought back.
        """
        prints = saved.get(FINGERPRINT, np.array([]))
        usable = {row: old for row, old in rows.items() if prints[old] == self._fingerprints[row]}
        restored = np.zeros(len(self._fingerprints), bool)
        restored[list(usable)] = True
        if not usable:
            return restored
        for part, owner in self._parts.items():
            mixed = {}
            for name, present in owner.state().items():
                array = np.array(present)
                earlier = saved.get(f"{part}/{name}")
                if earlier is not None and earlier.ndim == array.ndim:
                    if name.endswith(HISTORY):
                        array, earlier = _as_long(array, earlier)
                    for row, old in usable.items():
                        _overlay(array[row : row + 1], earlier[old : old + 1])
                mixed[name] = array
            owner.restore(mixed)
        return restored


def _as_long(*histories: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    """Histories (n, T, ...) of one length: the shorter one begins with samples that are for ever past."""
    length = max(history.shape[1] for history in histories)
    pads = [np.full((len(one), length - one.shape[1], *one.shape[2:]), -np.inf) for one in histories]
    return [np.concatenate([pad, one], axis=1) for pad, one in zip(pads, histories, strict=True)]


def _overlay(array: npt.NDArray[Any], earlier: npt.NDArray[Any]) -> None:
    """Copy what both have in common: the widest service decides how many pools the arrays have room for."""
    common = tuple(slice(0, min(sizes)) for sizes in zip(array.shape, earlier.shape, strict=True))
    array[common] = earlier[common]


def bring_back(database: Database, memory: Memory, services: Sequence[str], wanted: Bools) -> Bools:
    """Restore the masked services (n,) from the newest saved states that hold them; (n,) which were.

    Raises:
        RecordsUnavailable: when the states cannot be read.
    """
    with database.begin() as connection:
        saved = connection.execute(STATES.select().order_by(STATES.c.time_s.desc())).all()
    missing = {services[row]: row for row in np.flatnonzero(wanted).tolist()}
    restored = np.zeros(len(services), bool)
    for state in saved:
        found = {missing[name]: old for old, name in enumerate(unpack_names(state.services)) if name in missing}
        if found:
            restored |= memory.restore(unpack(state.arrays), found)
            for row in found:
                del missing[services[row]]
    return restored

"""What a controller remembers, saved and brought back service by service.

A controller may come back with other services, in another order, or in another number of shards: each service finds its
own rows by name, in whichever saved state holds the newest of them. A state that cannot be read is set aside.
This module must not know what the arrays mean.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa

from autoscaler.controller import RecordsUnavailable
from autoscaler.records.database import STATE_FORMAT, STATES, Arrays, Database, unpack, unpack_names
from policies.contract import Bools
from policies.durable import HISTORY, Remembering

FINGERPRINT = "fingerprint"
"""What a service's rows were made for: they are brought back only where it is the same."""

TOKEN = "token"
"""Fencing token with which a service's rows were written."""


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
                if earlier is not None and _fits(earlier, array):
                    if name.endswith(HISTORY):
                        array, earlier = _as_long(array, earlier)
                    for row, old in usable.items():
                        _overlay(array[row : row + 1], earlier[old : old + 1])
                mixed[name] = array
            owner.restore(mixed)
        return restored


def _fits(earlier: npt.NDArray[Any], array: npt.NDArray[Any]) -> bool:
    """Whether saved values can stand where present ones do: another release may keep other ones under one name."""
    return earlier.ndim == array.ndim and np.can_cast(earlier.dtype, array.dtype, "same_kind")


def _as_long(*histories: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    """Histories (n, T, ...) of one length: the shorter one begins with samples that are for ever past."""
    length = max(history.shape[1] for history in histories)
    pads = [np.full((len(one), length - one.shape[1], *one.shape[2:]), -np.inf) for one in histories]
    return [np.concatenate([pad, one], axis=1) for pad, one in zip(pads, histories, strict=True)]


def _overlay(array: npt.NDArray[Any], earlier: npt.NDArray[Any]) -> None:
    """Copy what both have in common: the widest service decides how many pools the arrays have room for."""
    common = tuple(slice(0, min(sizes)) for sizes in zip(array.shape, earlier.shape, strict=True))
    array[common] = earlier[common]


@dataclass(frozen=True)
class Saved:
    """One saved state, as it was read.

    Attributes:
        services: names, in the order of the rows; everybody's where they cannot be read.
        arrays: what was saved.
        damage: why it cannot be brought back, in words; empty where it can.
    """

    services: tuple[str, ...]
    arrays: Arrays
    damage: str = ""


@dataclass(frozen=True, eq=False)
class Found:
    """What became of the memory of `n` services.

    Attributes:
        restored: (n,) services whose memory is back.
        damaged: why a memory that may have been the newest was set aside, in words, by service.
    """

    restored: Bools
    damaged: Mapping[str, str]


def bring_back(database: Database, memory: Memory, services: Sequence[str], wanted: Bools) -> Found:
    """Restore the masked services (n,) from the newest saved states that hold them and can be read.

    The newest state of a service is the one that was written with its newest fencing token; the clocks of two hosts
    cannot be compared, so time decides only between states of one token.

    Raises:
        RecordsUnavailable: when the database does not answer.
    """
    with database.begin() as connection:
        rows = connection.execute(STATES.select().order_by(STATES.c.time_s)).all()
    missing = {services[row] for row in np.flatnonzero(wanted).tolist()}
    # A state of other services is nobody's business here, be it damaged or not.
    saved = [one for one in (_read(row, services) for row in rows) if not missing.isdisjoint(one.services)]
    damaged = {name: one.damage for one in saved if one.damage for name in missing.intersection(one.services)}
    newest: dict[str, tuple[int, int, int]] = {}  # token, state, row in it
    for place, one in enumerate(saved):
        if one.damage:
            continue
        tokens = one.arrays.get(TOKEN, np.full(len(one.services), -1)).tolist()
        for row, (name, token) in enumerate(zip(one.services, tokens, strict=True)):
            newest[name] = max(newest.get(name, (-1, -1, -1)), (token, place, row))
    restored = np.zeros(len(services), bool)
    found: dict[int, dict[int, int]] = {}
    for present in np.flatnonzero(wanted).tolist():
        if services[present] in newest:
            _, place, row = newest[services[present]]
            found.setdefault(place, {})[present] = row
    for place, places in found.items():
        restored |= memory.restore(saved[place].arrays, places)
    return Found(restored, damaged)


def _names(packed: bytes) -> tuple[str, ...]:
    """Of the services of a saved state, none where they are damaged."""
    with suppress(RecordsUnavailable):
        return unpack_names(packed)
    return ()


def _read(row: Any, everybody: Sequence[str]) -> Saved:
    """A row of `STATES`."""
    names = tuple(everybody)
    try:
        names = unpack_names(row.services)
        if row.version != STATE_FORMAT:
            return Saved(names, {}, f"it was written in format {row.version}, and {STATE_FORMAT} is read here")
        arrays = unpack(row.arrays)
        if any(array.ndim == 0 or len(array) != len(names) for array in arrays.values()):
            return Saved(names, {}, "its rows are not those of its services")
        return Saved(names, arrays)
    except RecordsUnavailable as error:
        return Saved(names, {}, str(error))


def forget_others(connection: sa.Connection, own: str, led: Collection[str]) -> None:
    """Drop the states of other processes that hold nothing but services that this one leads.

    Whoever leads a service has the newest memory of it. What does not say whose it is can be nobody's.
    """
    others = sa.select(STATES.c.controller, STATES.c.services).where(STATES.c.controller != own)
    void = [row.controller for row in connection.execute(others).all() if set(_names(row.services)) <= set(led)]
    if void:
        connection.execute(STATES.delete().where(STATES.c.controller.in_(void)))

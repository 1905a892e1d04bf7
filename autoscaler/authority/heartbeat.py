"""The pulse of a controller: who holds the leases, what people have ordered, whether it must stop.

Beats in its own thread, so that a hung database or API server never holds up a tick; the tick reads the last pulse and
trusts it only while it is young. Leases are renewed only while ticks come to their end: a controller whose loop stands
still must lose them. One whose ticks all fail hands them back.
This module must not know what a tick does with it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from autoscaler.authority.controls import Controls, Mode, Orders, kill_file_engaged
from autoscaler.authority.leases import NOT_HELD, TRUSTED_SHARE, Leases, LeasesUnavailable
from autoscaler.background import Background
from autoscaler.controller import RecordsUnavailable
from policies.contract import Bools, Floats, Ints

HEAR_S = 1.0
"""How long a tick waits for a beat under way before it goes by the last pulse, seconds."""
NAMED = 3
"""Leases that a problem names."""


@dataclass(frozen=True, eq=False)
class Pulse:
    """What the last beat found.

    Attributes:
        tokens: (n,) fencing tokens, `NOT_HELD` where another controller acts.
        modes: (n,) modes in force.
        ordered_s: (n,) stamp of the last order, -inf where there was none.
        killed: (n,) why the kill switch is engaged, empty where it is not.
        beat_s: (n,) steady time of the beat that last knew who holds the lease, -inf before the first.
        problem: what went wrong at the last beat, empty when nothing did.
        unread: why the last beat does not know who holds a service's lease, by service, where it does not.
    """

    tokens: Ints
    modes: tuple[Mode, ...]
    ordered_s: tuple[float, ...]
    killed: tuple[str, ...]
    beat_s: Floats
    problem: str = ""
    unread: Mapping[str, str] = field(default_factory=dict)


class Heartbeat:
    """Beats at a fixed period.

    Args:
        services: names.
        leases: who may act.
        controls: what people order.
        default_mode: of services without an order.
        kill_file: file whose existence engages the kill switch.
        duration_s: of a lease, seconds.
        now: a clock that never jumps, seconds.
        stalled: why leases must not be renewed, in words; empty while ticks come to their end.
    """

    def __init__(
        self,
        services: Sequence[str],
        leases: Leases,
        controls: Controls,
        default_mode: Mode,
        kill_file: Path | None,
        duration_s: float,
        now: Callable[[], float] = time.monotonic,
        stalled: Callable[[], str] = lambda: "",
    ) -> None:
        n = len(services)
        self.services = tuple(services)
        self.kill_file = kill_file
        self._leases = leases
        self._controls = controls
        self._default_mode = default_mode
        self._duration_s = duration_s
        self._stalled = stalled
        self._now = now
        self._lock = threading.Lock()
        self._away_until_s, self._away = -np.inf, ""  # while no lease is taken, and why
        self.thread: Background | None = None
        """What beats, once it has been started."""
        self._orders, self._heard = Orders({}, {}, "", {}), False
        never = np.full(n, -np.inf)
        self.pulse = Pulse(
            np.full(n, NOT_HELD), (default_mode,) * n, (-np.inf,) * n, ("",) * n, never, "no beat has come yet"
        )

    def beat(self) -> Pulse:
        """One beat, in the caller's thread. Where a fault outside hides a lease, its last token stays and grows old."""
        with self._lock:
            began_s, problem, whys = self._now(), self._stalled(), [""] * len(self.services)
            tokens, beat_s = self.pulse.tokens, self.pulse.beat_s
            if problem:
                problem += ": leases are not renewed"
            elif began_s < self._away_until_s:
                problem = self._away
            else:
                try:
                    renewed, whys = self._leases.renew(), list(self._leases.unread())
                    known = np.array([not why for why in whys], bool)
                    tokens, beat_s = np.where(known, renewed, tokens), np.where(known, began_s, beat_s)
                except Exception as error:  # whatever somebody has written there: named, and the last tokens grow old
                    whys = [why or _words(error) for why in self._leases.unread()]
                problem = _named([why for why in dict.fromkeys(whys) if why])
            try:  # also without leases: a controller that stands by must hear `jevons down`
                self._orders, self._heard = self._controls.read(), True
            except Exception as error:
                problem = problem or _words(error)
            unread = {service: why for service, why in zip(self.services, whys, strict=True) if why}
            self.pulse = self._pulse(tokens, beat_s, problem, unread)
            return self.pulse

    def _beat(self) -> None:
        self.beat()

    def hear(self) -> None:
        """Read the orders between two beats, in the caller's thread; where that cannot be done the last ones count."""
        if not self._lock.acquire(timeout=HEAR_S):  # a beat hangs, and must not hold up a tick
            return
        try:
            self._orders, self._heard = self._controls.read(), True
            self.pulse = self._pulse(self.pulse.tokens, self.pulse.beat_s, self.pulse.problem, self.pulse.unread)
        except Exception as error:
            self.pulse = replace(self.pulse, problem=_words(error))
        finally:
            self._lock.release()

    def _pulse(self, tokens: Ints, beat_s: Floats, problem: str, unread: Mapping[str, str]) -> Pulse:
        orders = self._orders
        return Pulse(
            tokens=tokens,
            modes=tuple(orders.modes.get(service, self._default_mode) for service in self.services),
            ordered_s=tuple(orders.ordered_s.get(service, -np.inf) for service in self.services),
            killed=tuple(orders.killed or mark for mark in self._leases.annotated()),
            beat_s=beat_s,
            problem=problem,
            unread=unread,
        )

    def leading(self) -> Bools:
        """(n,) services on which this controller may act right now."""
        pulse = self.pulse
        fresh = self._now() - pulse.beat_s < TRUSTED_SHARE * self._duration_s
        return np.asarray((pulse.tokens != NOT_HELD) & fresh & self._heard, bool)  # orders may be older than it is

    def adrift(self) -> Bools:
        """(n,) services that were this controller's when somebody could last be asked, and nobody can be now."""
        pulse = self.pulse
        unread = np.array([service in pulse.unread for service in self.services], bool)
        return np.asarray((pulse.tokens != NOT_HELD) & unread & ~self.leading(), bool)

    def killed(self) -> tuple[str, ...]:
        """(n,) why the kill switch is engaged right now; the file is looked at, not remembered."""
        reason = kill_file_engaged(self.kill_file)
        return tuple(reason or mark for mark in self.pulse.killed)

    @property
    def orders(self) -> Orders | None:
        """The last that were read; None before that."""
        return self._orders if self._heard else None

    def start(self, period_s: float) -> None:
        """Beat in the background until `stop`."""
        self.thread = Background("heartbeat", self._beat, period_s, stuck_s=self._duration_s)
        self.thread.start(period_s)

    def give_way(self, why: str) -> None:
        """Hand the leases back, and take none for as long as one lasts, so that another controller can have them.

        To be called between two ticks: nothing is being carried out then.

        Args:
            why: this one does not do its work, in words.
        """
        if not self._lock.acquire(timeout=HEAR_S):  # a beat hangs; there will be another failure
            return
        try:
            self._away = f"{why}: leases are left to others for {self._duration_s:g} s"
            self._away_until_s = self._now() + self._duration_s
            self._release(self._away)
        finally:
            self._lock.release()

    def stop(self, release: bool) -> None:
        """No more beats; `release` hands the leases back."""
        if self.thread is not None:
            self.thread.stop(self._duration_s)
        if release:
            self._release("")

    def _release(self, why: str) -> None:
        none, never = np.full(len(self.services), NOT_HELD), np.full(len(self.services), -np.inf)
        self.pulse = self._pulse(none, never, why, {})  # first: what is handed back is acted on no more
        try:
            self._leases.release()
        except LeasesUnavailable as error:  # they lapse by themselves
            self.pulse = replace(self.pulse, problem=str(error))


def _words(error: Exception) -> str:
    known = isinstance(error, LeasesUnavailable | RecordsUnavailable)
    return str(error) if known else f"orders and leases: {type(error).__name__}: {error}"


def _named(problems: Sequence[str]) -> str:
    """The first few of them."""
    more = f" (and {len(problems) - NAMED} more)" if len(problems) > NAMED else ""
    return "; ".join(problems[:NAMED]) + more

"""The pulse of a controller: who holds the leases, what people have ordered, whether it must stop.

Beats in its own thread, so that a hung database or API server never holds up a tick; the tick reads the last pulse and
trusts it only while it is young.
This module must not know what a tick does with it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from autoscaler.authority.controls import Controls, Mode, Orders, kill_file_engaged
from autoscaler.authority.leases import NOT_HELD, TRUSTED_SHARE, Leases, LeasesUnavailable
from autoscaler.controller import RecordsUnavailable
from policies.contract import Bools, Ints

HEAR_S = 1.0
"""How long a tick waits for a beat under way before it goes by the last pulse, seconds."""


@dataclass(frozen=True, eq=False)
class Pulse:
    """What the last beat found.

    Attributes:
        tokens: (n,) fencing tokens, `NOT_HELD` where another controller acts.
        modes: (n,) modes in force.
        ordered_s: (n,) stamp of the last order, -inf where there was none.
        killed: (n,) why the kill switch is engaged, empty where it is not.
        beat_s: steady time of the beat, -inf before the first.
        problem: what went wrong at the last beat, empty when nothing did.
    """

    tokens: Ints
    modes: tuple[Mode, ...]
    ordered_s: tuple[float, ...]
    killed: tuple[str, ...]
    beat_s: float
    problem: str = ""


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
    ) -> None:
        n = len(services)
        self.services = tuple(services)
        self.kill_file = kill_file
        self._leases = leases
        self._controls = controls
        self._default_mode = default_mode
        self._duration_s = duration_s
        self._now = now
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._orders, self._heard = Orders({}, {}, "", {}), False
        self.pulse = Pulse(
            np.full(n, NOT_HELD), (default_mode,) * n, (-np.inf,) * n, ("",) * n, -np.inf, "no beat has come yet"
        )

    def beat(self) -> Pulse:
        """One beat, in the caller's thread. After an outside fault, the last tokens stay and grow old."""
        with self._lock:
            began_s, problem = self._now(), ""
            tokens, beat_s = self.pulse.tokens, self.pulse.beat_s
            try:
                tokens, beat_s = self._leases.renew(), began_s
                self._orders, self._heard = self._controls.read(), True
            except (LeasesUnavailable, RecordsUnavailable) as error:
                problem = str(error)
            self.pulse = self._pulse(tokens, beat_s, problem)
            return self.pulse

    def hear(self) -> None:
        """Read the orders between two beats, in the caller's thread; where that cannot be done the last ones count."""
        if not self._lock.acquire(timeout=HEAR_S):  # a beat hangs, and must not hold up a tick
            return
        try:
            self._orders, self._heard = self._controls.read(), True
            self.pulse = self._pulse(self.pulse.tokens, self.pulse.beat_s, self.pulse.problem)
        except RecordsUnavailable as error:
            self.pulse = replace(self.pulse, problem=str(error))
        finally:
            self._lock.release()

    def _pulse(self, tokens: Ints, beat_s: float, problem: str) -> Pulse:
        orders = self._orders
        return Pulse(
            tokens=tokens,
            modes=tuple(orders.modes.get(service, self._default_mode) for service in self.services),
            ordered_s=tuple(orders.ordered_s.get(service, -np.inf) for service in self.services),
            killed=tuple(orders.killed or mark for mark in self._leases.annotated()),
            beat_s=beat_s,
            problem=problem,
        )

    def leading(self) -> Bools:
        """(n,) services on which this controller may act right now."""
        pulse = self.pulse
        fresh = self._now() - pulse.beat_s < TRUSTED_SHARE * self._duration_s
        return np.asarray((pulse.tokens != NOT_HELD) & fresh, bool)

    def killed(self) -> tuple[str, ...]:
        """(n,) why the kill switch is engaged right now; the file is looked at, not remembered."""
        reason = kill_file_engaged(self.kill_file)
        return tuple(reason or mark for mark in self.pulse.killed)

    def ended_s(self, controller: str) -> float | None:
        """Stamp of the last order to the named controller to end, -inf without one; None before orders were read."""
        return self._orders.down_s.get(controller, -np.inf) if self._heard else None

    def start(self, period_s: float) -> None:
        """Beat in the background until `stop`."""

        def work() -> None:
            while not self._stop.wait(period_s):
                self.beat()

        self._thread = threading.Thread(target=work, name="jevons-heartbeat", daemon=True)
        self._thread.start()

    def stop(self, release: bool) -> None:
        """No more beats; `release` hands the leases back."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(self._duration_s)
        if release:
            try:
                self._leases.release()
            except LeasesUnavailable as error:
                self.pulse = self._pulse(np.full(len(self.services), NOT_HELD), -np.inf, str(error))

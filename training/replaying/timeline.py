"""What happened over time in one replay: the recorder of an evaluation, and the arrays that the report plots.

This module must not know how runs are scored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from policies.contract import Bools, Decision, Floats, Ints, Outcome, Reason, Snapshot

FIRST = 0
"""The service of a replay that is recorded: the one of the first seed."""


@dataclass(frozen=True, eq=False)
class Timeline:
    """Measurements and decisions of one service, one entry per tick. NaN where nothing was measured.

    Attributes:
        pools: names of the pools.
        time_s: (ticks,) time of the measurement.
        arrival_rps: (ticks,) requests per second in the window.
        token_rate_tps: (ticks,) prompt tokens that arrived and tokens generated, per second.
        queue_requests: (ticks,) requests at the gateway and inside the engines that have not started.
        running: (ticks,) requests in the batches.
        oldest_wait_s: (ticks,) age of the oldest request without service, seconds.
        ttft_attainment: (ticks,) share of first tokens in the window within the objective, 0..1.
        tpot_attainment: (ticks,) share of finished requests in the window within the objective, 0..1.
        ready: (ticks, P) replicas.
        starting: (ticks, P) replicas.
        draining: (ticks, P) replicas.
        target: (ticks, P) replicas asked for by this tick's decision.
        batch_cap: (ticks, P) cap asked for by this tick's decision.
        usd: (ticks,) provisioned dollars so far, overhead included, as of `time_s`.
        reasons: (ticks,) flags of `policies.contract.Reason`.
        scaled: (ticks,) True where the decision changed the target.
    """

    pools: tuple[str, ...]
    time_s: Floats
    arrival_rps: Floats
    token_rate_tps: Floats
    queue_requests: Floats
    running: Floats
    oldest_wait_s: Floats
    ttft_attainment: Floats
    tpot_attainment: Floats
    ready: Floats
    starting: Floats
    draining: Floats
    target: Ints
    batch_cap: Ints
    usd: Floats
    reasons: Ints
    scaled: Bools

    def __len__(self) -> int:
        """Number of ticks."""
        return len(self.time_s)

    @property
    def usd_per_hour(self) -> Floats:
        """(ticks,) provisioned dollars per hour in the window that ends at `time_s`."""
        if not len(self):
            return np.zeros(0)
        span_s = np.diff(self.time_s, prepend=0.0)
        return np.diff(self.usd, prepend=0.0) / np.maximum(span_s, 1e-9) * 3600.0

    def reason_counts(self) -> dict[str, int]:
        """How many ticks each guardrail changed, by its reason code."""
        return {word: int(((self.reasons & code) != 0).sum()) for code in Reason for word in code.words()}


class TimelineRecorder:
    """Keeps the first service of every decision; satisfies the controller's `Recorder`.

    Args:
        pools: names of the pools.
        spent_usd: the bill of the first service so far, dollars, as of the measurement in the decision.
    """

    def __init__(self, pools: tuple[str, ...], spent_usd: Callable[[], float]) -> None:
        self._pools = pools
        self._spent_usd = spent_usd
        self._service: list[tuple[float, ...]] = []
        self._by_pool: list[npt.NDArray[np.float64]] = []

    def record(self, decision: Decision) -> None:
        """Keep one decision."""
        snapshot = decision.snapshot
        held = decision.outcome[FIRST] == Outcome.HELD
        # A held decision is not carried out: what is in force is what was measured.
        replicas = snapshot.replicas_target[FIRST] if held else decision.settled.replicas[FIRST]
        cap = snapshot.batch_cap[FIRST] if held else decision.settled.batch_cap[FIRST]
        self._service.append((*_service_row(snapshot), self._spent_usd(), float(decision.reasons[FIRST])))
        self._by_pool.append(
            np.stack(
                [
                    snapshot.replicas_ready[FIRST],
                    snapshot.replicas_starting[FIRST],
                    snapshot.replicas_draining[FIRST],
                    np.nan_to_num(replicas).astype(np.float64),
                    np.nan_to_num(cap).astype(np.float64),
                    np.full(len(replicas), float(decision.outcome[FIRST] == Outcome.SCALED)),
                ]
            )
        )

    def conclude(self, decision: Decision) -> None:
        """Nothing more: in the simulated cluster every recorded target is carried out."""

    def timeline(self) -> Timeline:
        """What was recorded so far."""
        service = np.array(self._service, np.float64).reshape(len(self._service), 10)
        pools = np.array(self._by_pool, np.float64).reshape(len(self._by_pool), 6, -1)
        return Timeline(
            pools=self._pools,
            time_s=service[:, 0],
            arrival_rps=service[:, 1],
            token_rate_tps=service[:, 2],
            queue_requests=service[:, 3],
            running=service[:, 4],
            oldest_wait_s=service[:, 5],
            ttft_attainment=service[:, 6],
            tpot_attainment=service[:, 7],
            ready=pools[:, 0],
            starting=pools[:, 1],
            draining=pools[:, 2],
            target=pools[:, 3].astype(np.int64),
            batch_cap=pools[:, 4].astype(np.int64),
            usd=service[:, 8],
            reasons=service[:, 9].astype(np.int64),
            scaled=pools[:, 5, 0] > 0,
        )


def _service_row(snapshot: Snapshot) -> tuple[float, ...]:
    return (
        float(snapshot.time_s[FIRST]),
        float(snapshot.arrival_rps[FIRST]),
        float(snapshot.prompt_tps[FIRST] + snapshot.generation_tps[FIRST]),
        float(snapshot.queue_requests[FIRST] + snapshot.waiting[FIRST].sum()),
        float(snapshot.running[FIRST].sum()),
        float(snapshot.oldest_wait_s[FIRST]),
        float(snapshot.ttft_attainment[FIRST]),
        float(snapshot.tpot_attainment[FIRST]),
    )

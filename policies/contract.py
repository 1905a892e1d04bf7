"""The nouns that every part of Jevons shares: snapshot, observation, target, policy, decision.

All are structs of arrays. The leading axis `n` counts services (live) or environments (training); `P` counts pools,
padded to the widest service. A measurement that is missing is NaN, never 0.
This module must not know where snapshots come from or how targets are carried out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import IntEnum, IntFlag
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Features = npt.NDArray[np.float32]

BOOT_BINS = 3
"""Starting replicas are counted by expected remaining time: under 30 s, 30 to 120 s, longer."""
TTFT_EDGES_S = (
    *(0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5),
    *(2.0, 3.0, 4.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 60.0),
)
"""Upper edges of the TTFT histogram's bins, seconds; one more bin holds what is slower."""
TPOT_EDGES_S = (
    *(0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.06, 0.075),
    *(0.1, 0.125, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.0),
)
"""Upper edges of the TPOT histogram's bins, seconds; one more bin holds what is slower."""


@dataclass(frozen=True, eq=False, slots=True)
class Snapshot:
    """One control window of measurements; the same from Prometheus and from the simulated cluster.

    Shapes are (n,) for the service, (n, P) for its pools. Rates are means over the window. NaN means missing;
    a pool that a service does not have (padding) holds 0, never NaN.

    The histograms count requests per bin, not cumulatively, and add up over windows. A source whose buckets have other
    edges interpolates its cumulative counts linearly at these, which is what PromQL's `histogram_quantile` assumes
    inside a bucket, so that a quantile of either is the same. They may have no bins at all, (n, 0), where nobody reads
    them (training); that means missing, as NaN does.
    """

    time_s: Floats  # (n,) end of the window
    window_s: Floats  # (n,) its length

    arrival_rps: Floats  # (n,) requests that reached the gateway per second
    prompt_tps: Floats  # (n,) prompt tokens that arrived per second
    prefill_tps: Floats  # (n,) prompt tokens computed per second: no prefix hits, with recomputation
    generation_tps: Floats  # (n,) tokens generated per second
    finished_rps: Floats  # (n,) requests finished per second
    prompt_tokens_mean: Floats  # (n,) of the requests that finished
    output_tokens_mean: Floats  # (n,) of the requests that finished
    queue_requests: Floats  # (n,) waiting at the gateway, in front of the batch cap
    oldest_wait_s: Floats  # (n,) age of the oldest request without service, seconds
    ttft_attainment: Floats  # (n,) share of first tokens within the TTFT objective, 0..1
    tpot_attainment: Floats  # (n,) share of finished requests within the TPOT objective, 0..1
    ttft_histogram_rps: Floats  # (n, len(TTFT_EDGES_S) + 1) first tokens per second by TTFT; or (n, 0)
    tpot_histogram_rps: Floats  # (n, len(TPOT_EDGES_S) + 1) finished requests per second by TPOT; or (n, 0)

    replicas_target: Floats  # (n, P) what was last asked for
    replicas_starting: Floats  # (n, P)
    replicas_ready: Floats  # (n, P)
    replicas_draining: Floats  # (n, P)
    boot_pipeline: Floats  # (n, P, BOOT_BINS) starting replicas by expected remaining time
    running: Floats  # (n, P) requests in the engines' batches
    waiting: Floats  # (n, P) requests queued inside the engines
    kv_cache_usage: Floats  # (n, P) mean share of KV blocks in use on ready replicas, 0..1
    batch_cap: Floats  # (n, P) concurrent requests admitted per replica

    def __len__(self) -> int:
        """Number of services."""
        return len(self.time_s)

    def blind(self) -> Bools:
        """(n,) True where what a scaling decision needs most is missing: replica counts, or any sign of load."""
        counts = self.replicas_ready + self.replicas_target + self.replicas_starting + self.running
        return np.isnan(counts.T).any(axis=0) | np.isnan(np.fmax(self.generation_tps, self.arrival_rps))

    def row(self, index: int) -> dict[str, Any]:
        """The measurements of one service as plain numbers and lists; NaN becomes None."""
        plain: dict[str, Any] = {}
        for name in _names(self):
            plain[name] = _none_for_nan(getattr(self, name)[index].tolist())
        return plain


LEAVE_ALONE = -1
"""Replica count of a service that an actuator must not touch, such as one whose decision is held."""


@dataclass(frozen=True, eq=False, slots=True)
class Target:
    """What a policy asks for, per pool, as absolute counts. Absolute, so repeating a tick is harmless."""

    replicas: Ints  # (n, P) starting plus ready
    batch_cap: Ints  # (n, P) concurrent requests admitted per replica

    def __len__(self) -> int:
        """Number of services."""
        return len(self.replicas)


@dataclass(frozen=True, eq=False, slots=True)
class Observation:
    """A snapshot, what it means in replicas, and the encoded features that a learned policy reads."""

    snapshot: Snapshot
    blind: Bools  # (n,) see `Snapshot.blind`
    features: Features  # (n, F), see `policies.observation.FEATURES`
    demand_tokens: Floats  # (n, P) replicas of pool p that the measured token rates and the backlog need
    demand_occupancy: Floats  # (n, P) replicas of pool p that the requests in the system need
    demand: Floats  # (n, P) the larger of both over the short window
    demand_mean: Floats  # (n, P) its mean over about five minutes
    batch_limit: Floats  # (n, P) largest batch that meets the TPOT objective and fits the KV cache
    offered_load: Floats  # (n,) replicas of the first pool that what arrives needs, mean over about five minutes
    offered_load_error: Floats  # (n,) its relative standard error where requests come one by one; inf: unknown


Struct = TypeVar("Struct")


def take_rows(struct: Struct, rows: Ints) -> Struct:
    """The listed services (k,) of a struct of arrays, as copies."""
    return type(struct)(**{name: getattr(struct, name)[rows] for name in _names(struct)})


def put_rows(struct: Struct, rows: Ints, part: Struct) -> None:
    """Overwrite the listed services (k,) of a struct of arrays, in place."""
    for name in _names(struct):
        value = getattr(struct, name)
        if isinstance(value, np.ndarray):
            value[rows] = getattr(part, name)
        else:
            put_rows(value, rows, getattr(part, name))


def _names(struct: Any) -> list[str]:
    return [item.name for item in fields(struct)]


class Policy(Protocol):
    """Proposes a target. State, if any, is per service; `reset` clears the given services."""

    name: str

    def reset(self, services: Bools | None = None) -> None:
        """Forget the history of the services where the mask (n,) is True; of all when None."""
        ...

    def propose(self, observation: Observation) -> Target:
        """The target for the next window, before guardrails."""
        ...


class Reason(IntFlag):
    """Why a settled target differs from the proposed one, or is not carried out; a decision carries any number.

    Up to POLICY_FAILED, and STEADY_TRAFFIC, they come from the decision core, the others from the live controller.
    """

    NONE = 0
    MISSING_METRICS = 1
    BACKLOG = 2
    SLO_BURNING = 4
    REPLICAS_STARTING = 8
    STEP_LIMIT = 16
    COOLDOWN = 32
    GPU_BUDGET = 64
    BOUNDS = 128
    POLICY_FAILED = 256
    ACTUATION_FAILED = 512
    BUNDLE_REFUSED = 1024
    OUT_OF_RANGE = 2048
    PARTLY_BLIND = 4096
    BURNING_WHILE_SHRINKING = 8192
    PAUSED = 16384
    KILL_SWITCH = 32768
    NOT_LEADER = 65536
    FOREIGN_EDIT = 131072
    OTHER_AUTOSCALER = 262144
    REVALIDATING = 524288
    NOT_RECORDED = 1048576
    OVERDUE = 2097152
    OWNER_UNKNOWN = 4194304
    STEADY_TRAFFIC = 8388608
    DRAINING = 16777216

    def words(self) -> list[str]:
        """The set codes in lower case, for records and tables."""
        return [reason.name.lower() for reason in Reason if reason and reason in self and reason.name]


class Outcome(IntEnum):
    """What became of a decision."""

    UNCHANGED = 0
    SCALED = 1
    HELD = 2
    ADVISED = 3


@dataclass(frozen=True, eq=False, slots=True)
class Decision:
    """What was seen, proposed and settled for `n` services at one tick, and why.

    A row whose outcome is held changes nothing and must not be carried out: where the target in force was never seen,
    its settled numbers mean nothing. An advised row says what would have been done, and is not carried out either.
    """

    snapshot: Snapshot
    proposed: Target
    settled: Target
    reasons: Ints  # (n,) of `Reason` flags
    outcome: Ints  # (n,) of `Outcome`
    policy: str
    details: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)  # (n, ...) each: what else explains it


class MetricsUnavailable(RuntimeError):  # noqa: N818 - reads as the state that it reports
    """Raised by a metrics source that has no answer for this tick."""


class ActuationFailed(RuntimeError):  # noqa: N818
    """Raised by an actuator that could not carry out a target."""


def _none_for_nan(value: Any) -> Any:
    """NaN, at any depth of nested lists, replaced by None."""
    if isinstance(value, list):
        return [_none_for_nan(item) for item in value]
    return None if value != value else value

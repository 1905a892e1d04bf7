"""What a published measurement does not say of itself: how it was loaded, and what the engine was told.

This module must not know how one of them is chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from envs.cluster.closed_loop import LoadProtocol
from training.profiling.measurements import LoopLatencyTable, Measured

BUDGETS = (8192, 4096, 2048)
"""Tokens per iteration, the most usual first."""
CACHED_SHARES = (0.0, 0.5, 0.9)
"""Shares of a prompt that a prefix cache may hold."""
KV_SHARES = (1.0, 0.85)
"""Engines leave a part of the estimated KV capacity to graphs and buffers; saturated rows tell."""

Change = Mapping[str, Any]
"""Fields of `Conditions` or of its protocol, and their values."""


@dataclass(frozen=True)
class Conditions:
    """What a file of closed loops does not say about its measurement; chosen by the rows that are fitted."""

    protocol: LoadProtocol | None = None
    max_num_batched_tokens: int | None = None
    kv_share: float = 1.0

    def apply(self, table: Measured) -> Measured:
        """`table` under these conditions."""
        if isinstance(table, LoopLatencyTable):
            return table.under(self.protocol, self.max_num_batched_tokens, self.kv_share)
        return table

    def but(self, change: Change) -> Conditions:
        """These conditions with other values; fields of the protocol and of the engine alike.

        Raises:
            ValueError: when the protocol should change and there is none.
        """
        load = {name: value for name, value in change.items() if name in LoadProtocol.model_fields}
        engine = {name: value for name, value in change.items() if name not in load}
        if not load:
            return replace(self, **engine)
        if self.protocol is None:
            raise ValueError("no protocol to change")
        return replace(self, protocol=self.protocol.model_copy(update=load), **engine)

    def __str__(self) -> str:
        parts = []
        if self.protocol is not None:
            start = f"{self.protocol.start} of {self.protocol.requests_per_client} requests per client"
            if self.protocol.max_requests is not None:
                start += f", {self.protocol.max_requests:,} at most"
            parts.append(start + (f", {self.protocol.waiting} always waiting" if self.protocol.waiting else ""))
            if self.protocol.cached_share:
                parts.append(f"{self.protocol.cached_share:.0%} of each prompt cached")
        if self.max_num_batched_tokens is not None:
            parts.append(f"{self.max_num_batched_tokens:,} tokens per iteration")
        if self.kv_share != 1.0:
            parts.append(f"{self.kv_share:g} of the stated KV capacity")
        return "; ".join(parts) or "as stated"


@dataclass(frozen=True)
class Unknowns:
    """Conditions that may be otherwise: where the search begins, and per unknown what else it may be.

    Attributes:
        usual: what is most usual; kept where the rows do not speak clearly against it.
        axes: per unknown, what it may be, the most usual first.
    """

    usual: Conditions = Conditions()
    axes: tuple[tuple[Change, ...], ...] = ()


AS_STATED = Unknowns()


def unknown_conditions(
    max_num_batched_tokens: int | None = None, requests_per_client: int | None = None, saturated: bool = False
) -> Unknowns:
    """Every way that a published closed-loop measurement may have been run.

    Args:
        max_num_batched_tokens: tokens per iteration, where known.
        requests_per_client: where known.
        saturated: whether rows fill the KV cache, so that they tell its capacity.
    """
    counts = (10, 20) if requests_per_client is None else (requests_per_client,)
    loads: list[Change] = [
        {"start": "burst", "requests_per_client": count, "waiting": waiting} for count in counts for waiting in (0, 1)
    ]
    axes: list[tuple[Change, ...]] = []
    if requests_per_client is None:
        loads.append({"start": "steady", "requests_per_client": 4, "waiting": 0})
        axes.append(({"max_requests": None}, {"max_requests": 1000}))
    axes.insert(0, tuple(loads))
    if max_num_batched_tokens is None:
        axes.append(tuple({"max_num_batched_tokens": budget} for budget in BUDGETS))
    axes.append(tuple({"cached_share": share} for share in CACHED_SHARES))
    if saturated:
        axes.append(tuple({"kv_share": share} for share in KV_SHARES))
    protocol = LoadProtocol(requests_per_client=counts[0])
    return Unknowns(Conditions(protocol, max_num_batched_tokens or BUDGETS[0]), tuple(axes))

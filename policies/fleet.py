"""`n` scaling specs as arrays: what the decision core computes with.

This module must not know about measurements or decisions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from policies.contract import Bools, Floats, Ints
from policies.spec import PoolSpec, ScalingSpec

DEFAULT_LOG_MISS_PRICE = float(np.log(20.0))


@dataclass(frozen=True, eq=False, slots=True)
class Fleet:
    """Objectives, engines, prices and bounds of `n` services with up to `P` pools each.

    Rows of pools that a service does not have are filled with a slow engine that may have no replica.
    Arrays over pools are stored pool by pool (Fortran order): services are many, pools few.
    """

    ttft_slo_s: Floats  # (n,)
    tpot_slo_s: Floats  # (n,)
    attainment_target: Floats  # (n,)
    log_miss_price: Floats  # (n,) natural log of the price of a miss, in mean costs of a request

    exists: Bools  # (n, P)
    is_spot: Bools  # (n, P)
    a: Floats  # (n, P) step coefficients, seconds
    b: Floats
    c: Floats
    d: Floats
    e: Floats
    kv_capacity: Floats  # (n, P) tokens
    max_num_seqs: Floats  # (n, P)
    gpus: Floats  # (n, P) per replica
    usd_per_replica_s: Floats  # (n, P) without overhead
    min_replicas: Ints  # (n, P)
    max_replicas: Ints  # (n, P)
    cold_start_s: Floats  # (n, P) expected

    def __len__(self) -> int:
        """Number of services."""
        return len(self.ttft_slo_s)

    @property
    def pools(self) -> int:
        """Pools per service, padding included."""
        return int(self.exists.shape[1])

    @classmethod
    def from_specs(cls, specs: Sequence[ScalingSpec], pools: int | None = None) -> Fleet:
        """Stack specs; `pools` widens the padding beyond the largest of them."""
        n, width = len(specs), max(pools or 0, max(len(spec.pools) for spec in specs))
        fleet = cls.empty(n, width)
        for row, spec in enumerate(specs):
            fleet.set_row(row, spec)
        return fleet

    @classmethod
    def empty(cls, n: int, pools: int) -> Fleet:
        """`n` services without pools."""

        def service(value: float) -> Floats:
            return np.full(n, value)

        def pool(value: float) -> Floats:
            return np.full((n, pools), value, order="F")

        return cls(
            ttft_slo_s=service(1.0),
            tpot_slo_s=service(0.1),
            attainment_target=service(0.99),
            log_miss_price=service(DEFAULT_LOG_MISS_PRICE),
            exists=np.zeros((n, pools), bool, order="F"),
            is_spot=np.zeros((n, pools), bool, order="F"),
            a=pool(1.0),
            b=pool(0.0),
            c=pool(0.0),
            d=pool(0.0),
            e=pool(0.0),
            kv_capacity=pool(1.0),
            max_num_seqs=pool(1.0),
            gpus=pool(0.0),
            usd_per_replica_s=pool(0.0),
            min_replicas=np.zeros((n, pools), np.int64, order="F"),
            max_replicas=np.zeros((n, pools), np.int64, order="F"),
            cold_start_s=pool(0.0),
        )

    def set_row(self, row: int, spec: ScalingSpec) -> None:
        """Overwrite one service."""
        self.ttft_slo_s[row] = spec.slo.ttft_s
        self.tpot_slo_s[row] = spec.slo.tpot_s
        self.attainment_target[row] = spec.slo.attainment
        self.log_miss_price[row] = np.log(max(spec.objective.miss_price, 1e-3))
        blank = Fleet.empty(1, self.pools)
        for field in fields(self):
            array = getattr(self, field.name)
            if array.ndim == 2:
                array[row] = getattr(blank, field.name)[0]
        for column, pool in enumerate(spec.pools):
            self._set_pool(row, column, pool)

    def _set_pool(self, row: int, column: int, pool: PoolSpec) -> None:
        at = (row, column)
        self.exists[at] = True
        self.is_spot[at] = pool.price_class == "spot"
        self.a[at], self.b[at], self.c[at], self.d[at], self.e[at] = pool.engine.step.seconds
        self.kv_capacity[at] = pool.engine.kv_capacity_tokens
        self.max_num_seqs[at] = pool.engine.max_num_seqs
        self.gpus[at] = pool.engine.gpus_per_replica
        self.usd_per_replica_s[at] = pool.usd_per_replica_hour / 3600.0
        self.min_replicas[at] = pool.min_replicas
        self.max_replicas[at] = pool.max_replicas
        self.cold_start_s[at] = pool.start.total_s

"""Measured step times and closed-loop latencies: read, check, predict.

Two kinds of table, told apart by their columns:

- *step times*: one row per shape of an engine iteration and its duration;
- *closed loops*: one row per (prompt length, output length, concurrency) with the latencies that clients saw.

This module must not know how coefficients are found.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from envs.cluster.closed_loop import ClosedLoops, LoadProtocol
from policies.contract import Floats
from policies.engine import ConfigError, StepModel
from training.profiling.csv_rows import Range, Rows, read_rows

COEFFICIENTS = tuple(StepModel.model_fields)
"""Names of the five coefficients, in the order of `StepModel.seconds`."""
SECONDS_PER_UNIT = np.array([1e-3, 1e-6, 1e-6, 1e-9, 1e-9])
"""From the units of `StepModel`'s fields to seconds per token, sequence or squared token."""

ALIASES = {
    "prompt_tokens": ("prompt_tokens", "isl"),
    "output_tokens": ("output_tokens", "osl"),
    "concurrency": ("concurrency", "silicon_concurrency", "batch_size"),
    "ttft_ms": ("ttft_ms", "silicon_ttft_ms"),
    "ttft_p90_ms": ("ttft_p90_ms",),
    "tpot_ms": ("tpot_ms", "silicon_tpot_ms"),
    "step_ms": ("step_ms", "t_ms"),
    "prefill_tokens": ("prefill_tokens",),
    "prefill_requests": ("prefill_requests", "num_prefill"),
    "prefix_tokens": ("prefix_tokens", "prefill_kv"),
    "decode_requests": ("decode_requests", "decode_batch"),
    "context_tokens": ("context_tokens", "context"),
    "requests_per_client": ("requests_per_client",),
    "length_spread": ("length_spread",),
}
"""Names under which a quantity may stand in a file; a later name serves where an earlier one is blank."""
SET_COLUMNS = (
    "model",
    "model_path",
    "system",
    "backend",
    "backend_version",
    "precision",
    "weight_dtype",
    "gemm_quant_mode",
    "tp",
    "tp_size",
)
"""Columns that say which engine a row was measured on: a fit is for one engine."""
MILLISECONDS = Range(1e-6, 1e9, "a number of milliseconds above 0, a billion at most")
AMOUNT = Range(0.0, 1e9, "a number from 0 to a billion")
COUNT = Range(1.0, 1e9, "a number from 1 to a billion")
CLIENTS = Range(1.0, 65_536.0, "a number from 1 to 65,536")
PER_CLIENT = Range(1.0, 1000.0, "a number from 1 to 1,000")
SPREAD = Range(0.0, 0.9, "a share from 0 to 0.9")
QUANTITIES = {"step": "step time", "tpot": "TPOT mean", "ttft": "TTFT mean", "ttft_p90": "TTFT p90"}


class Measured(Protocol):
    """A table that a model can be fitted to."""

    @property
    def measured(self) -> Mapping[str, Floats]:
        """Per quantity (a key of `QUANTITIES`), (rows,) seconds; NaN where not given."""

    def __len__(self) -> int:
        """Rows."""

    def take(self, rows: NDArray[np.intp]) -> Self:
        """Only these rows."""

    def predict(self, coefficients: Floats) -> dict[str, Floats]:
        """Per quantity, (rows,) seconds by the model; `coefficients` (5,) in the units of `StepModel`."""

    def unidentified(self) -> list[str]:
        """Coefficients that these rows cannot tell, by name."""


@dataclass(frozen=True, eq=False)
class StepTimes:
    """Durations of single iterations.

    Attributes:
        design: (rows, 5) what each coefficient is multiplied with: 1, p, B, KV, and the sum over prefill chunks of
            chunk * (prefix + chunk / 2).
        measured: under "step", (rows,) seconds.
    """

    design: Floats
    measured: Mapping[str, Floats]

    def __len__(self) -> int:
        return len(self.design)

    def take(self, rows: NDArray[np.intp]) -> Self:
        """Only these rows."""
        measured = {name: values[rows] for name, values in self.measured.items()}
        return replace(self, design=self.design[rows], measured=measured)

    def predict(self, coefficients: Floats) -> dict[str, Floats]:
        """Step times, (rows,) seconds."""
        return {"step": self.design @ (coefficients * SECONDS_PER_UNIT)}

    def unidentified(self) -> list[str]:
        """Coefficients whose column is zero, or a combination of the columns before it."""
        scale = np.linalg.norm(self.design, axis=0)
        missing, kept = [], np.empty((len(self), 0))
        for column, name in enumerate(COEFFICIENTS):
            if scale[column] == 0.0:
                missing.append(name)
                continue
            wider = np.column_stack([kept, self.design[:, column] / scale[column]])
            if np.linalg.matrix_rank(wider, tol=1e-6) == wider.shape[1]:
                kept = wider
            else:
                missing.append(name)
        return missing


@dataclass(frozen=True, eq=False)
class LoopLatencyTable:
    """Closed-loop latencies, predicted by running the cluster model at that concurrency.

    Attributes:
        prompt_tokens: (rows,)
        output_tokens: (rows,)
        concurrency: (rows,) clients.
        measured: "tpot", "ttft" and where given "ttft_p90", (rows,) seconds.
        protocols: (rows,) how each row was measured; None where the file does not say.
        kv_capacity_tokens: of the replica.
        max_num_batched_tokens: token budget of an iteration.
        max_num_seqs: largest batch, None: never reached.
    """

    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    concurrency: NDArray[np.int64]
    measured: Mapping[str, Floats]
    protocols: tuple[LoadProtocol, ...] | None
    kv_capacity_tokens: int
    max_num_batched_tokens: int
    max_num_seqs: int | None = None
    _loops: list[ClosedLoops] = field(default_factory=list, repr=False)

    def __len__(self) -> int:
        return len(self.prompt_tokens)

    def take(self, rows: NDArray[np.intp]) -> Self:
        """Only these rows."""
        return replace(
            self,
            prompt_tokens=self.prompt_tokens[rows],
            output_tokens=self.output_tokens[rows],
            concurrency=self.concurrency[rows],
            measured={name: values[rows] for name, values in self.measured.items()},
            protocols=None if self.protocols is None else tuple(self.protocols[row] for row in rows),
            _loops=[],
        )

    def under(
        self,
        protocol: LoadProtocol | None = None,
        max_num_batched_tokens: int | None = None,
        kv_share: float = 1.0,
    ) -> Self:
        """The same rows, measured in another way or on an engine with other limits.

        Args:
            protocol: of every row; unchanged when None.
            max_num_batched_tokens: unchanged when None.
            kv_share: factor on the KV capacity.
        """
        return replace(
            self,
            protocols=self.protocols if protocol is None else (protocol,) * len(self),
            max_num_batched_tokens=max_num_batched_tokens or self.max_num_batched_tokens,
            kv_capacity_tokens=round(self.kv_capacity_tokens * kv_share),
            _loops=[],
        )

    @property
    def saturated(self) -> NDArray[np.bool_]:
        """(rows,) whether the requests in flight, at their full length, exceed the KV cache: most of them queue."""
        full: NDArray[np.bool_] = self.concurrency * (self.prompt_tokens + self.output_tokens) > self.kv_capacity_tokens
        return full

    def predict(self, coefficients: Floats) -> dict[str, Floats]:
        """TPOT and TTFT, (rows,) seconds."""
        if not self._loops:
            self._loops.append(
                ClosedLoops(
                    self.prompt_tokens,
                    self.output_tokens,
                    self.concurrency,
                    self.protocols or (LoadProtocol(),) * len(self),
                    self.max_num_batched_tokens,
                    self.max_num_seqs,
                )
            )
        found = self._loops[0].run(coefficients * SECONDS_PER_UNIT, self.kv_capacity_tokens)
        values = {"tpot": found.tpot_mean_s, "ttft": found.ttft_mean_s, "ttft_p90": found.ttft_p90_s}
        return {name: values[name] for name in self.measured}

    def unidentified(self) -> list[str]:
        """Coefficients that need a second prompt length or concurrency to be told apart."""
        return unidentified(self.prompt_tokens.tolist(), self.concurrency.tolist())


def unidentified(prompt_tokens: Collection[int], concurrency: Collection[int]) -> list[str]:
    """Coefficients that closed loops over these prompt lengths and concurrencies cannot tell, by name."""
    missing = []
    if len(set(prompt_tokens)) < 2:
        missing += ["d_us_per_1k_kv_tokens", "e_ns_per_prefill_token2"]
    if len(set(concurrency)) < 2:
        missing += ["b_us_per_prefill_token", "c_us_per_seq"]
    return missing


@dataclass(frozen=True)
class Limits:
    """What a table of closed loops needs to know of the engine."""

    kv_capacity_tokens: int
    max_num_batched_tokens: int
    max_num_seqs: int | None = None


def read_measurements(path: Path, limits: Limits, where: Mapping[str, str] | None = None) -> Measured:
    """Read a CSV of step times or closed-loop latencies.

    Args:
        path: CSV with a header.
        limits: of the engine measured.
        where: keep rows whose column has this value, to choose one engine of a file that holds several.

    Raises:
        ConfigError: naming the file, and the line and column or the choice that is missing.
    """
    rows = read_rows(path).where(where or {})
    if not any(name in rows.header for kind in ("step_ms", "tpot_ms", "ttft_ms") for name in ALIASES[kind]):
        raise ConfigError(
            f"{path}: holds neither step times (column step_ms) nor closed loops (columns ttft_ms and tpot_ms), "
            f"separated by commas; columns: {', '.join(rows.header)}"
        )
    _check_one_set(rows)
    if any(name in rows.header for name in ALIASES["step_ms"]):
        return _step_times(rows)
    return _loop_table(rows, limits)


def _check_one_set(rows: Rows) -> None:
    for column in SET_COLUMNS:
        values = sorted({row[column] for _, row in rows.lines}) if column in rows.header else []
        if len(values) > 1:
            shown = ", ".join(repr(value) for value in values[:8])
            raise ConfigError(
                f"{rows.path}: column {column}: rows of several engines ({shown}); "
                f"choose one with --where {column}=VALUE"
            )


def _step_times(rows: Rows) -> StepTimes:
    def column(quantity: str, default: float | None = None) -> Floats:
        return rows.numbers(ALIASES[quantity], AMOUNT, default)

    prefill = column("prefill_tokens")
    chunk = prefill / np.maximum(column("prefill_requests", 1.0), 1.0)
    attention = prefill * (column("prefix_tokens", 0.0) + chunk / 2)
    decodes = column("decode_requests")
    design = np.column_stack([np.ones(len(rows)), prefill, decodes, decodes * column("context_tokens"), attention])
    return StepTimes(design, {"step": rows.numbers(ALIASES["step_ms"], MILLISECONDS) * 1e-3})


def _loop_table(rows: Rows, limits: Limits) -> LoopLatencyTable:
    def column(quantity: str, within: Range, default: float | None = None) -> Floats:
        return rows.numbers(ALIASES[quantity], within, default)

    measured = {"tpot": column("tpot_ms", MILLISECONDS) * 1e-3, "ttft": column("ttft_ms", MILLISECONDS) * 1e-3}
    if "ttft_p90_ms" in rows.header:
        measured["ttft_p90"] = column("ttft_p90_ms", MILLISECONDS, math.nan) * 1e-3
    protocols = None
    if "requests_per_client" in rows.header:
        counts = column("requests_per_client", PER_CLIENT)
        spreads = column("length_spread", SPREAD, 0.0)
        protocols = tuple(
            LoadProtocol(requests_per_client=int(count), length_spread=float(spread))
            for count, spread in zip(counts, spreads, strict=True)
        )
    table = LoopLatencyTable(
        prompt_tokens=column("prompt_tokens", COUNT).astype(np.int64),
        output_tokens=column("output_tokens", COUNT).astype(np.int64),
        concurrency=column("concurrency", CLIENTS).astype(np.int64),
        measured=measured,
        protocols=protocols,
        kv_capacity_tokens=limits.kv_capacity_tokens,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_num_seqs=limits.max_num_seqs,
    )
    for row, (line, _) in enumerate(rows.lines):
        needed = int(table.prompt_tokens[row] + table.output_tokens[row])
        if needed > limits.kv_capacity_tokens:
            raise ConfigError(
                f"{rows.path}: line {line}: a request of {needed:,} tokens can never fit the KV cache of "
                f"{limits.kv_capacity_tokens:,} tokens"
            )
    return table

"""Coefficients of an engine profile from measurements: robust, non-negative, judged on rows held out.

The model is whatever the table predicts with: the step-time form itself, or the cluster model run at the measured
concurrency. Residuals are logarithms of predicted over measured, so an error of 10 % counts the same at 5 ms and at
5 s; the soft L1 loss keeps a few odd rows from deciding the fit.
This module must not know about files, plots or the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from policies.contract import Floats
from policies.engine import ConfigError, StepModel
from training.profiling.conditions import AS_STATED, Conditions, Unknowns
from training.profiling.errors import INTERVAL, ErrorRow
from training.profiling.measurements import COEFFICIENTS, Measured

WEIGHTS = {"step": 1.0, "tpot": 1.0, "ttft": 0.5, "ttft_p90": 0.25}
"""Weight of a quantity's residuals. TTFT at a fixed concurrency is mostly queueing, so it counts half."""
SOFT_ERROR = 0.1
"""Relative error past which a row's pull grows linearly, no longer with its square."""
STEP = 0.01
"""Step of the finite differences, relative: the simulation is smooth only in the large."""
COARSE, FINE = (4, 1e-3), (20, 1e-5)
"""Steps of the search and its relative tolerance, while conditions are compared and for the final fit."""
PASSES = 2
"""Times that the unknown conditions are gone through: a later one may change what an earlier one should be."""
MARGIN = 1.0
"""Standard errors by which other conditions must be better than the usual ones."""
DEFAULT_START = np.array([8.0, 30.0, 25.0, 40.0, 1.0])
"""Where the search starts without a base profile, in the units of `StepModel`: a mid-size model on an H100."""

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, eq=False)
class Fit:
    """Coefficients and how good they are.

    Attributes:
        step: fitted on every row.
        low: (5,) lower ends of 90 % bootstrap intervals, units of `StepModel`; NaN without a bootstrap.
        high: (5,) upper ends.
        conditions: chosen on every row.
        table: the rows, under these conditions.
        in_sample: per quantity, (rows,) predicted by `step`, seconds.
        held_out: per quantity, (rows,) predicted by a fit that did not see the row; empty without folds.
        folds: number of folds.
    """

    step: StepModel
    low: Floats
    high: Floats
    conditions: Conditions
    table: Measured
    in_sample: dict[str, Floats]
    held_out: dict[str, Floats]
    folds: int

    def errors(self, held_out: bool, rows: NDArray[np.bool_] | None = None) -> list[ErrorRow]:
        """One row per quantity.

        Args:
            held_out: of the predictions for rows that the fit did not see.
            rows: (rows,) which to count; all when None.
        """
        predictions = self.held_out if held_out else self.in_sample
        chosen = np.ones(len(self.table), np.bool_) if rows is None else rows
        return [
            ErrorRow.of(quantity, predicted[chosen], self.table.measured[quantity][chosen])
            for quantity, predicted in predictions.items()
        ]


def fit_profile(
    table: Measured,
    *,
    unknowns: Unknowns = AS_STATED,
    start: StepModel | None = None,
    fixed: Mapping[str, float] | None = None,
    folds: int = 5,
    bootstrap: int = 40,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Fit:
    """Fit on every row, and once per fold to predict the rows of that fold.

    The conditions, too, are chosen without the rows of the fold.

    Args:
        table: measurements.
        unknowns: conditions of the measurement to choose.
        start: where the search starts.
        fixed: coefficients that are given rather than fitted, by name.
        folds: parts that are held out in turn; 0 for none.
        bootstrap: refits on resampled rows, for the intervals of the coefficients; 0 for none.
        seed: of the folds and the bootstrap.
        on_progress: called with (done, total, label).

    Raises:
        ConfigError: when the rows cannot identify a coefficient, or a fixed coefficient has no such name.
    """
    search = Search(table, start, dict(fixed or {}))
    search.check(folds)
    rng = np.random.default_rng(seed)
    fold_of = rng.permutation(len(table)) % max(folds, 1)
    total = 1 + folds + bootstrap
    tell: Progress = on_progress or (lambda done, total, label: None)

    tell(0, total, "all rows")
    coefficients, conditions = search.choose(table, unknowns)
    held_out: dict[str, Floats] = {name: np.full(len(table), np.nan) for name in table.measured} if folds else {}
    for fold in range(folds):
        tell(1 + fold, total, f"fold {fold + 1} of {folds}")
        unseen = np.flatnonzero(fold_of == fold)
        found, under = search.choose(table.take(np.flatnonzero(fold_of != fold)), unknowns)
        for name, values in under.apply(table.take(unseen)).predict(found).items():
            held_out[name][unseen] = values
    settled = conditions.apply(table)
    samples = np.full((bootstrap, len(COEFFICIENTS)), np.nan)
    for sample in range(bootstrap):
        tell(1 + folds + sample, total, "bootstrap")
        drawn = settled.take(rng.integers(0, len(table), len(table)))
        samples[sample], _ = search.solve(drawn, coefficients, COARSE)
    tell(total, total, "done")
    bounds = np.percentile(samples, INTERVAL, axis=0) if bootstrap else np.full((2, len(COEFFICIENTS)), np.nan)
    return Fit(
        step=step_model(coefficients),
        low=bounds[0],
        high=bounds[1],
        conditions=conditions,
        table=settled,
        in_sample=settled.predict(coefficients),
        held_out=held_out,
        folds=folds,
    )


def step_model(coefficients: Floats) -> StepModel:
    """A `StepModel` of (5,) coefficients, four digits each."""
    return StepModel(**{name: float(f"{value:.4g}") for name, value in zip(COEFFICIENTS, coefficients, strict=True)})


def coefficients_of(step: StepModel) -> Floats:
    """(5,) in the units of `StepModel`."""
    return np.array([getattr(step, name) for name in COEFFICIENTS])


class Search:
    """Least squares over the coefficients that are not fixed."""

    def __init__(self, table: Measured, start: StepModel | None, fixed: dict[str, float]) -> None:
        unknown = sorted(set(fixed) - set(COEFFICIENTS))
        if unknown:
            raise ConfigError(f"unknown coefficient {unknown[0]!r}; coefficients: {', '.join(COEFFICIENTS)}")
        self.table = table
        self.fixed = fixed
        self.free = np.array([name not in fixed for name in COEFFICIENTS])
        self.start = DEFAULT_START.copy() if start is None else coefficients_of(start)
        for column, name in enumerate(COEFFICIENTS):
            self.start[column] = fixed.get(name, max(self.start[column], 1e-3 * DEFAULT_START[column]))

    def check(self, folds: int) -> None:
        """Refuse tables that cannot tell the free coefficients.

        Raises:
            ConfigError: naming what is missing and what helps.
        """
        needed = int(self.free.sum()) + 1
        rows = len(self.table)
        if needed == 1:
            raise ConfigError("every coefficient is given: nothing is left to fit (`validate` compares a profile)")
        if rows < needed:
            raise ConfigError(
                f"{rows} rows are too few to fit {needed - 1} coefficients: at least {needed} are needed "
                "(or fix some with --fix NAME=VALUE)"
            )
        missing = [name for name in self.table.unidentified() if name not in self.fixed]
        if missing:
            raise ConfigError(
                f"the rows cannot identify {', '.join(missing)}: they need more than one prompt length, batch size and "
                "context (or fix it with --fix NAME=VALUE)"
            )
        if folds == 1:
            raise ConfigError("one fold leaves no row to fit: use two or more, or --folds 0")
        if folds and (folds > rows or rows - -(-rows // folds) < needed - 1):
            raise ConfigError(f"{rows} rows are too few for {folds} folds: use fewer, or --folds 0")

    def choose(self, table: Measured, unknowns: Unknowns) -> tuple[Floats, Conditions]:
        """The best coefficients, (5,), and the conditions under which they were found.

        One unknown after the other, from the most usual conditions; another value is taken when it lowers the cost of
        these rows by more than the standard error of the rows' differences.
        """
        if not unknowns.axes:
            return self.solve(unknowns.usual.apply(table), self.start, FINE)[0], unknowns.usual
        conditions = unknowns.usual
        tried = {conditions: self.solve(conditions.apply(table), self.start, COARSE)}
        for axis in unknowns.axes * PASSES:
            coefficients, costs = tried[conditions]
            for other in (conditions.but(change) for change in axis):
                if other not in tried:
                    tried[other] = self.solve(other.apply(table), coefficients, COARSE)
            best = min((conditions.but(change) for change in axis), key=lambda other: float(tried[other][1].sum()))
            gains = costs - tried[best][1]
            if gains.sum() > MARGIN * gains.std(ddof=1) * np.sqrt(len(gains)):
                conditions = best
        return self.solve(conditions.apply(table), tried[conditions][0], FINE)[0], conditions

    def solve(self, table: Measured, start: Floats, effort: tuple[int, float]) -> tuple[Floats, Floats]:
        """Coefficients, (5,) in the units of `StepModel`, and the cost of each row, (rows,)."""
        scale = np.maximum(start, 1e-3 * DEFAULT_START)[self.free]
        logs = {name: np.log(values) for name, values in table.measured.items()}

        def coefficients(x: Floats) -> Floats:
            full = self.start.copy()
            full[self.free] = x * scale
            return full

        latest: dict[bytes, Floats] = {}  # the search asks for the Jacobian where it has just been

        def residuals(x: Floats) -> Floats:
            if x.tobytes() not in latest:
                predicted = table.predict(coefficients(x))
                parts = [WEIGHTS[name] * (np.log(predicted[name]) - known) for name, known in logs.items()]
                latest.clear()
                latest[x.tobytes()] = np.nan_to_num(np.concatenate(parts))
            return latest[x.tobytes()]

        def jacobian(x: Floats) -> Floats:
            here = residuals(x)
            columns = []
            for column in range(len(x)):
                moved = x.copy()
                width = STEP * max(x[column], 0.1)
                moved[column] += width
                columns.append((residuals(moved) - here) / width)
            return np.column_stack(columns)

        # A fixed time of zero would make an empty iteration free: its floor is a thousandth of the typical one.
        floor = np.where(np.array(COEFFICIENTS) == "a_ms", 1e-3 * DEFAULT_START, 0.0)[self.free] / scale
        found = least_squares(
            residuals,
            np.maximum(start[self.free] / scale, floor + 1e-9),
            jac=jacobian,
            bounds=(floor, np.inf),
            loss="soft_l1",
            f_scale=SOFT_ERROR,
            max_nfev=effort[0],
            xtol=effort[1],
            ftol=effort[1],
        )
        by_row = found.fun.reshape(-1, len(table))
        costs: Floats = (SOFT_ERROR**2 * (np.sqrt(1.0 + (by_row / SOFT_ERROR) ** 2) - 1.0)).sum(axis=0)
        return coefficients(found.x), costs

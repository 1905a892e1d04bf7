"""Tables of the pages that are written, and how figures stand in tables, there and on the console."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown, without a line break at its end.

    >>> print(table(("policy", "held"), [("hpa", "3/4")]))
    | policy | held |
    |---|---|
    | hpa | 3/4 |
    """
    names = tuple(headings)
    ruled = [f"| {' | '.join(cells)} |" for cells in (names, *rows)]
    ruled.insert(1, f"|{'---|' * len(names)}")
    return "\n".join(ruled)


def shown(interval: Sequence[float], form: str) -> str:
    """A mean with its interval; alone where there was nothing to draw from.

    >>> shown((1.234, 1.1, 1.4), ".2f"), shown((1.0, 1.0, 1.0), ".2f"), shown((-0.001, -0.4, 0.3), "+.1f")
    ('1.23 (1.10 to 1.40)', '1.00', '+0.0 (-0.4 to +0.3)')
    """
    digits = int(form[-2])
    mean, low, high = (format(round(value, digits) + 0.0, form) for value in interval)  # + 0.0: no -0
    return mean if low == mean == high else f"{mean} ({low} to {high})"


def shown_ratio(interval: Sequence[float] | None) -> str:
    """A cost over another with its interval; a dash where there is none.

    >>> shown_ratio((1.234, 1.1, 1.4)), shown_ratio(None)
    ('1.23 (1.10 to 1.40)', '-')
    """
    return "-" if interval is None else shown(interval, ".2f")


def shown_points(interval: Sequence[float]) -> str:
    """The change of a share with its interval, in percentage points.

    >>> shown_points((0.012, 0.01, 0.02))
    '+1.2 (+1.0 to +2.0)'
    """
    return shown([100 * value for value in interval], "+.1f")

"""What an answer of Prometheus must look like.

Its shape is the server's: another one refuses the whole answer. What is written in its rows comes from whatever is
scraped: what is no number there reads NaN, so it is missing where it belongs and costs no other row anything.
This module must not know what was asked.
"""

from __future__ import annotations

import math
from typing import Any


def names(result: Any) -> list[str]:
    """A list of names.

    Raises:
        ValueError: when it is something else.
    """
    if not isinstance(result, list) or not all(isinstance(name, str) for name in result):
        raise ValueError("the answer is no list of names")
    return result


def samples(result: Any, window: bool) -> list[dict[str, Any]]:
    """Rows of the shape that the API documents: labels, and one sample each, or the samples of a window.

    A row with a histogram has it beside a sample that is no number.

    Raises:
        ValueError, KeyError, TypeError, OverflowError: when it has another shape.
    """
    rows = result if isinstance(result, list) else None
    if rows is None or not all(isinstance(row, dict) and isinstance(row.get("metric"), dict) for row in rows):
        raise ValueError("the answer is no list of series")
    for row in rows:
        metric = row["metric"]
        if not all(isinstance(text, str) for text in metric.values()):
            raise ValueError("the answer has a label that is no text")
        if "le" in metric:
            metric["le"] = _number(metric["le"])
        if window:
            pairs = [(float(at_s), float(value)) for at_s, value in row["values"]]
            times = [at_s for at_s, _ in pairs]
        elif "histogram" in row:
            at_s, histogram = row["histogram"]
            times = [float(at_s)]
            float(histogram["count"])
            for _, lower, upper, count in histogram.get("buckets", ()):
                float(lower), float(upper), float(count)
            row["value"] = [at_s, "NaN"]  # somebody's histogram under the name of a number is none
        else:
            at_s, value = row["value"]
            times = [float(at_s)]
            row["value"] = [at_s, _number(value)]
        if not all(math.isfinite(at_s) for at_s in times):
            raise ValueError("the answer has a sample of no time")
    return rows


def _number(text: Any) -> str:
    """The text of a number; NaN where it is a text of something else."""
    if not isinstance(text, str):
        raise TypeError("the answer has a number that is no text")
    try:
        return "NaN" if math.isnan(float(text)) else text
    except ValueError:
        return "NaN"

"""JSON and numbers that somebody else wrote: an answer of a server, a field of an object, a file.

This module must not know who wrote it, nor what it means.
"""

from __future__ import annotations

import json
import math
from typing import Any

MAX_DIGITS = 20
"""Of an integer of 64 bits and its sign."""


def read_json(text: str | bytes | bytearray, any_number: bool = False) -> Any:
    """What a text says.

    Args:
        text: JSON.
        any_number: take also numbers that no array holds (an integer of more than 64 bits, NaN, an infinite one):
            whoever uses them checks them.

    Raises:
        ValueError: when it is no JSON, has such a number, or is nested deeper than can be read: brackets without end
            are a `RecursionError` elsewhere, and large numbers an `OverflowError` wherever they are used, which those
            who expect broken JSON do not catch.

    >>> read_json('{"spec": {"replicas": 2}}')
    {'spec': {'replicas': 2}}
    >>> read_json("[" * 200_000)
    Traceback (most recent call last):
    ...
    ValueError: it is nested too deeply
    """
    try:
        if any_number:
            return json.loads(text)
        return json.loads(text, parse_int=read_integer, parse_float=_real, parse_constant=_real)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_integer(digits: str) -> int:
    """A whole number that arrays can hold.

    Raises:
        ValueError: when it is something else, or needs more than 64 bits.
    """
    if len(digits) > MAX_DIGITS or not -(2**63) <= (value := int(digits)) < 2**63:
        raise ValueError(f"the number {digits[:MAX_DIGITS]} is too large")
    return value


def _real(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:MAX_DIGITS]} is no number")
    return value

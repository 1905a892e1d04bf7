"""Answers and files that are nearly right: real ones with parts exchanged, cut, doubled or made absurd."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

ODD: list[Any] = [None, True, 0, -1, 2**63, -(2**70), 10**400, 0.5, 1e308, float("nan"), float("inf")]
ODD += ["", "x", "NaN", "-Inf", "1e999", "-3", "1,2", "\x00", "\x1b[2J", "\ud800", "é" * 40, "9" * 400, "9" * 5000, "²"]
ODD += [[], {}, [[]], [{}], {"": None}, {"items": None}, [[1, "2"]], [None] * 3]
TOKENS = [
    b"",
    b"\x00",
    b"\xff\xfe",
    b"\n",
    b"\r",
    b'"',
    b"{",
    b"[" * 3000,
    b",",
    b";",
    b"-1",
    b"nan",
    b"9" * 400,
    b"9" * 5000,
    "²".encode(),
    b"PAR1",
]


@st.composite
def mutated_json(draw: st.DrawFn, *examples: Any) -> Any:
    """One of the examples with up to three parts exchanged, removed or doubled; now and then something else whole."""
    if draw(st.integers(0, 15)) == 0:
        return _odd(draw)
    data = copy.deepcopy(draw(st.sampled_from(examples)))
    for _ in range(draw(st.integers(0, 3))):
        data = _changed(draw, data)
    return data


def _odd(draw: st.DrawFn) -> Any:
    return copy.deepcopy(draw(st.sampled_from(ODD)))


def _changed(draw: st.DrawFn, data: Any) -> Any:
    holder: Any = None
    place: Any = None
    node = data
    while isinstance(node, dict | list) and node and draw(st.integers(0, 5)):
        holder = node
        place = draw(st.sampled_from(sorted(node)) if isinstance(node, dict) else st.integers(0, len(node) - 1))
        node = node[place]
    change = draw(st.integers(0, 3))
    if holder is None:
        return _odd(draw) if change == 0 else data
    if change == 0:
        del holder[place]
    elif change == 1 and isinstance(holder, list):
        holder.append(copy.deepcopy(node))
    else:
        holder[place] = _odd(draw)
    return data


@st.composite
def mutated_bytes(draw: st.DrawFn, *examples: bytes) -> bytes:
    """One of the examples, cut short or with up to four pieces exchanged for others."""
    data = draw(st.sampled_from(examples))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 12)))
        data = data[:start] + draw(st.one_of(st.sampled_from(TOKENS), st.binary(max_size=6))) + data[end:]
    return data[: draw(st.integers(0, len(data)))] if draw(st.integers(0, 7)) == 0 else data


def mutated_text(*examples: str) -> st.SearchStrategy[str]:
    """As `mutated_bytes`."""
    return mutated_bytes(*(text.encode() for text in examples)).map(lambda raw: raw.decode(errors="replace"))


@st.composite
def bodies(draw: st.DrawFn, *examples: Any) -> bytes:
    """What a server may send: mutated JSON, or bytes that are none any more."""
    text = json.dumps(draw(mutated_json(*examples))).encode()
    return draw(mutated_bytes(text)) if draw(st.integers(0, 4)) == 0 else text

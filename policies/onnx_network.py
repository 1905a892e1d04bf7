"""What an ONNX file may be before it is given to a runtime: a small perceptron, and nothing else.

A reader of our own for the few fields of the format (protobuf, `onnx.proto3`), so that nobody who runs a policy needs
the `onnx` package. What is not on the lists below is refused: operators that loop or branch, functions, nested graphs,
weights outside the file, domains of their own. Without those the number of operations is known before anything runs.
This module must not know what the network decides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

MAX_BYTES = 8 * 2**20
MAX_NODES = 128
MAX_WIDTH = 8192
MAX_OPERATIONS = 2_000_000
"""Multiplications and additions for one service: about a millisecond on one core."""
PRODUCTS = ("Gemm", "MatMul")
"""Of what is computed with a matrix of weights, the second input."""
WITH_WEIGHTS = ("Add", "Sub", "Mul")
"""Element by element with a vector of weights, or with another computed value."""
ALONE = ("Tanh", "Relu", "Sigmoid", "Clip", "Identity")
_FLOAT = 1
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

# Numbers of the fields that are read or may be there, by message; every other one is refused.
_MODEL = {"ir_version": 1, "producer": 2, "producer_version": 3, "domain": 4, "model_version": 5, "doc": 6, "graph": 7}
_MODEL |= {"opset": 8, "metadata": 14}
_OPSET = {"domain": 1, "version": 2}
_GRAPH = {"node": 1, "name": 2, "initializer": 5, "doc": 10, "input": 11, "output": 12, "value_info": 13}
_NODE = {"input": 1, "output": 2, "name": 3, "op_type": 4, "attribute": 5, "doc": 6, "domain": 7}
_ATTRIBUTE = {"name": 1, "f": 2, "i": 3, "doc": 13, "type": 20}
_TENSOR = {"dims": 1, "data_type": 2, "float_data": 4, "name": 8, "raw_data": 9, "doc": 12}
_VALUE = {"name": 1, "type": 2, "doc": 3}
_REPEATED = ("opset", "metadata", "node", "initializer", "input", "output", "value_info", "attribute", "dims")

Values = dict[str, list[int | bytes]]


class NetworkRefused(ValueError):  # noqa: N818 - reads as the state that it reports
    """Raised when a file is not a network as Jevons runs them; the message says why."""


def check_network(weights: bytes) -> None:
    """Make sure that a network is small, self-contained, and made of known operators alone.

    Raises:
        NetworkRefused: when it is not.
    """
    if len(weights) > MAX_BYTES:
        raise NetworkRefused(f"the network has {len(weights)} bytes, expected at most {MAX_BYTES}")
    model = _read(weights, _MODEL, "model")
    for opset in model["opset"]:
        domain = _text(_read(_part(opset), _OPSET, "operator set"), "domain")
        if domain not in ("", "ai.onnx"):
            raise NetworkRefused(f"the network uses operators of the domain {domain!r}, expected those of ONNX alone")
    graph = _read(_part(_single(model, "graph")), _GRAPH, "graph")
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor in graph["initializer"]:
        name, shape = _initializer(_part(tensor))
        if name in shapes:
            raise NetworkRefused(f"the network has two sets of weights named {name!r}")
        shapes[name] = shape
    for kind, expected in (("input", "features"), ("output", "")):
        names = [_text(_read(_part(value), _VALUE, kind), "name") for value in graph[kind]]
        if len(names) != 1 or expected not in ("", names[0]):
            raise NetworkRefused(f"the network has the {kind}s {names[:5]!r}, expected {expected or 'one'} alone")
    if not 1 <= len(graph["node"]) <= MAX_NODES:
        raise NetworkRefused(f"the network has {len(graph['node'])} operators, expected 1 to {MAX_NODES}")
    operations = sum(_operations(_part(node), shapes) for node in graph["node"])
    if operations > MAX_OPERATIONS:
        raise NetworkRefused(f"the network takes {operations} operations a service, expected at most {MAX_OPERATIONS}")


def _operations(raw: bytes, shapes: dict[str, tuple[int, ...]]) -> int:
    """Operations of one node for one service, by the weights that it uses; refused unless it is a known one."""
    node = _read(raw, _NODE, "operator")
    kind, inputs = _text(node, "op_type"), [_decoded(value) for value in node["input"]]
    if _text(node, "domain") not in ("", "ai.onnx") or kind not in (*PRODUCTS, *WITH_WEIGHTS, *ALONE):
        raise NetworkRefused(f"the network has an operator {kind!r}, expected only Gemm, Tanh and their like")
    for attribute in node["attribute"]:
        _read(_part(attribute), _ATTRIBUTE, f"attribute of {kind}")
    if any(_decoded(value) in shapes for value in node["output"]):
        raise NetworkRefused(f"the operator {kind!r} overwrites weights")
    ranks = [len(shapes[name]) if name in shapes else None for name in inputs]
    fits = ranks[:1] == [None]
    if kind in PRODUCTS:
        fits = fits and ranks[1:2] == [2] and all(rank in (0, 1) for rank in ranks[2:])
    elif kind in WITH_WEIGHTS:  # a vector of weights adds no rows
        fits = len(ranks) == 2 and None in ranks and all(rank in (None, 0, 1) for rank in ranks)
    else:
        fits = fits and all(rank == 0 for name, rank in zip(inputs[1:], ranks[1:], strict=True) if name)
    if not fits:
        raise NetworkRefused(f"the operator {kind!r} has other inputs than a computed value and weights that fit")
    return MAX_NODES + sum(math.prod(shapes[name]) for name in inputs if name in shapes)


def _initializer(raw: bytes) -> tuple[str, tuple[int, ...]]:
    """Name and shape of a set of weights; its numbers must all be there."""
    tensor = _read(raw, _TENSOR, "set of weights")
    name = _text(tensor, "name")
    # Whole numbers in a row may be written one by one or packed.
    dims = [one for value in tensor["dims"] for one in ([value] if isinstance(value, int) else _varints(value))]
    if len(dims) > 2 or not all(0 < one <= MAX_WIDTH for one in dims):
        raise NetworkRefused(f"the weights {name!r} have shape {dims[:5]}, expected at most 2 axes up to {MAX_WIDTH}")
    if tensor["data_type"] != [_FLOAT]:
        raise NetworkRefused(f"the weights {name!r} are no 32-bit floats")
    held = sum(len(_part(value)) for value in (*tensor["raw_data"], *tensor["float_data"]))
    if held != 4 * math.prod(dims):
        raise NetworkRefused(f"the weights {name!r} hold {held} bytes, expected {4 * math.prod(dims)}")
    return name, tuple(dims)


def _read(message: bytes, known: dict[str, int], what: str) -> Values:
    """The fields of a message by name, each a list; refused where one is unknown, or wrongly there twice."""
    names = {number: name for name, number in known.items()}
    found: Values = {name: [] for name in known}
    for number, value in _fields(message):
        name = names.get(number)
        if name is None:
            raise NetworkRefused(f"the network's {what} has a field {number} that no network of Jevons has")
        if found[name] and name not in _REPEATED:
            raise NetworkRefused(f"the network's {what} has the field {name!r} twice")
        found[name].append(value)
    return found


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        wire = key & 7
        if wire == _VARINT:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if wire == _BYTES:
            length, at = _varint(message, at)
        elif wire in (_FIXED32, _FIXED64):
            length = 4 if wire == _FIXED32 else 8
        else:
            raise NetworkRefused("the network is no ONNX file")
        if length > len(message) - at:
            raise NetworkRefused("the network is cut short")
        yield key >> 3, message[at : at + length]
        at += length


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = 0
    for place, byte in enumerate(message[at : at + 10]):
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value, at + place + 1
    raise NetworkRefused("the network is cut short")


def _varints(packed: bytes) -> list[int]:
    found, at = [], 0
    while at < len(packed):
        value, at = _varint(packed, at)
        found.append(value)
    return found


def _single(values: Values, name: str) -> int | bytes:
    if not values[name]:
        raise NetworkRefused(f"the network has no {name}")
    return values[name][0]


def _part(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise NetworkRefused("the network is no ONNX file")
    return value


def _decoded(value: int | bytes) -> str:
    return _part(value).decode(errors="replace")


def _text(values: Values, name: str) -> str:
    return _decoded(values[name][0]) if values[name] else ""

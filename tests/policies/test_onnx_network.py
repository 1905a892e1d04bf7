"""Only small perceptrons are networks; whatever else ONNX can say is refused before a runtime sees it."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from policies.learned import load_bundle
from policies.lineup import SHIPPED_BUNDLE
from policies.observation import FEATURES
from policies.onnx_network import NetworkRefused, check_network

WIDTH = len(FEATURES)


def matrix(name: str, *shape: int) -> TensorProto:
    return numpy_helper.from_array(np.full(shape, 0.1, np.float32), name)


def network(change: Callable[[Any], None] = lambda model: None) -> bytes:
    """A perceptron of one layer, changed."""
    nodes = [
        helper.make_node("Gemm", ["features", "w", "b"], ["sum"]),
        helper.make_node("Tanh", ["sum"], ["actions"]),
    ]
    graph = helper.make_graph(
        nodes,
        "policy",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", WIDTH])],
        [helper.make_tensor_value_info("actions", TensorProto.FLOAT, ["n", 4])],
        [matrix("w", WIDTH, 4), matrix("b", 4)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    change(model)
    return bytes(model.SerializeToString())


def node(kind: str, inputs: list[str], **attributes: Any) -> Callable[[Any], None]:
    """The last operator is another one."""

    def change(model: Any) -> None:
        del model.graph.node[1:]
        model.graph.node.append(helper.make_node(kind, inputs, ["actions"], **attributes))

    return change


def subgraph() -> Any:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, None)
    return helper.make_graph([helper.make_node("Identity", ["sum"], ["x"])], "body", [], [value])


def function(model: Any) -> None:
    body = [helper.make_node("Identity", ["x"], ["y"])]
    model.functions.append(helper.make_function("own", "Again", ["x"], ["y"], body, model.opset_import))


def external(model: Any) -> None:
    tensor = model.graph.initializer[0]
    onnx.external_data_helper.set_external_data(tensor, "/etc/passwd")
    tensor.ClearField("raw_data")


def claims(model: Any) -> None:
    """Weights of the largest size, of which the file holds none."""
    model.graph.initializer[0].dims[:] = [8192, 8192]


def huge(model: Any) -> None:
    model.graph.initializer[0].CopyFrom(matrix("w", 2048, 2048))


def deep(model: Any) -> None:
    names = ["sum", *(f"x{place}" for place in range(200)), "actions"]
    del model.graph.node[1:]
    model.graph.node.extend(helper.make_node("Tanh", [a], [b]) for a, b in itertools.pairwise(names))


def busy(model: Any) -> None:
    """One set of weights, used again and again."""
    names = ["features", *(f"x{place}" for place in range(100)), "actions"]
    model.graph.initializer.append(matrix("square", 400, 400))
    del model.graph.node[:]
    model.graph.node.extend(helper.make_node("MatMul", [a, "square"], [b]) for a, b in itertools.pairwise(names))


def twice(model: Any) -> None:
    model.graph.initializer.append(matrix("w", WIDTH, 4))


def rows(model: Any) -> None:
    """Weights with an axis of their own make rows, and again, until the memory is full."""
    model.graph.initializer.append(matrix("c", 8000, 1))
    node("Add", ["sum", "c"])(model)


REFUSED: dict[str, tuple[Callable[[Any], None], str]] = {
    "a loop": (node("Loop", ["", ""], body=subgraph()), "operator 'Loop'"),
    "a branch": (node("If", ["sum"], then_branch=subgraph(), else_branch=subgraph()), "operator 'If'"),
    "a scan": (node("Scan", ["sum"], body=subgraph(), num_scan_inputs=1), "operator 'Scan'"),
    "a graph in an attribute": (node("Tanh", ["sum"], body=subgraph()), "attribute of Tanh has a field 6"),
    "a tensor in an attribute": (node("Tanh", ["sum"], value=matrix("x", 9)), "attribute of Tanh has a field 5"),
    "graphs in an attribute": (node("Tanh", ["sum"], all=[subgraph()]), "attribute of Tanh has a field 11"),
    "an operator that repeats": (node("Tile", ["sum", "b"]), "operator 'Tile'"),
    "an operator of a domain": (node("Tanh", ["sum"], domain="com.microsoft"), "operator 'Tanh'"),
    "a domain": (lambda model: model.opset_import.append(helper.make_opsetid("own", 1)), "of the domain 'own'"),
    "a function": (function, "model has a field 25"),
    "training": (lambda model: model.training_info.add(), "model has a field 20"),
    "weights outside": (external, "set of weights has a field 13"),
    "weights that are not there": (claims, "hold 592 bytes, expected 268435456"),
    "too many weights": (huge, "bytes, expected at most"),
    "too many operators": (deep, "202 operators, expected 1 to 128"),
    "too many operations": (busy, "operations a service, expected at most"),
    "the same weights twice": (twice, "two sets of weights named 'w'"),
    "rows of its own": (rows, "'Add' has other inputs"),
    "computed weights": (node("MatMul", ["sum", "sum"]), "'MatMul' has other inputs"),
    "sparse weights": (lambda model: model.graph.sparse_initializer.add(), "graph has a field 15"),
    "another output": (lambda model: model.graph.output.add(name="more"), "outputs ['actions', 'more']"),
    "another input": (lambda model: model.graph.input.add(name="more"), "inputs ['features', 'more']"),
    "no operator": (lambda model: model.graph.ClearField("node"), "0 operators"),
    "no graph": (lambda model: model.ClearField("graph"), "no graph"),
    "weights of text": (
        lambda model: model.graph.initializer.append(helper.make_tensor("t", TensorProto.STRING, [1], [b"x"])),
        "set of weights has a field 6",
    ),
    "weights of another type": (
        lambda model: model.graph.initializer.append(numpy_helper.from_array(np.ones(2), "t")),
        "no 32-bit floats",
    ),
    "weights that are computed over": (
        lambda model: model.graph.node.append(helper.make_node("Tanh", ["sum"], ["w"])),
        "'Tanh' overwrites weights",
    ),
}


@pytest.mark.parametrize(("change", "why"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_small_perceptron_is_refused(change: Callable[[Any], None], why: str) -> None:
    with pytest.raises(NetworkRefused) as found:
        check_network(network(change))
    assert why in str(found.value)


def test_a_second_graph_that_a_reader_would_merge_into_the_first_is_refused() -> None:
    hidden = onnx.ModelProto()
    hidden.graph.node.append(helper.make_node("Loop", [], ["x"]))
    with pytest.raises(NetworkRefused, match="'graph' twice"):
        check_network(network() + hidden.SerializeToString())


def test_perceptrons_are_accepted_the_shipped_one_among_them() -> None:
    check_network(load_bundle(SHIPPED_BUNDLE).weights)
    check_network(network())
    check_network(network(node("Clip", ["sum", "", ""])))
    check_network(network(node("Add", ["sum", "b"])))
    by_number = network(lambda model: model.graph.initializer[1].CopyFrom(helper.make_tensor("b", 1, [4], [0.0] * 4)))
    check_network(by_number)


@given(st.data())
def test_damage_anywhere_is_accepted_or_refused_by_name(data: st.DataObject) -> None:
    content = bytearray(network())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    try:
        check_network(bytes(content[: data.draw(st.integers(1, len(content)))]))
    except NetworkRefused as refused:
        assert str(refused)  # noqa: PT017 - either way is right


def test_loading_a_bundle_needs_no_onnx_package() -> None:
    code = """
import sys
from pathlib import Path
sys.modules["onnx"] = None
from policies.learned import load_bundle
load_bundle(Path(sys.argv[1]))
"""
    subprocess.run([sys.executable, "-c", code, SHIPPED_BUNDLE], check=True)

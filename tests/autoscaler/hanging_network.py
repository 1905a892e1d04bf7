"""A network that passes its warm-up and then computes for ever: a loop whose trip count depends on the features."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from policies.action import ACTIONS
from policies.learned import PolicyBundle, load_bundle
from policies.lineup import SHIPPED_BUNDLE
from policies.observation import FEATURES


def hanging_bundle() -> PolicyBundle:
    """The manifest of the shipped bundle with that network; the warm-up's features are all 0."""
    shipped = load_bundle(SHIPPED_BUNDLE)
    return PolicyBundle(shipped.manifest, _network(), digest="hanging" * 9, source="hanging.zip")


def _network() -> bytes:
    scalar, flag, count = TensorProto.FLOAT, TensorProto.BOOL, TensorProto.INT64
    node, info = helper.make_node, helper.make_tensor_value_info
    body = helper.make_graph(
        [node("Identity", ["go_on"], ["still"]), node("Add", ["x", "x"], ["twice"])],
        "body",
        [info("turn", count, []), info("go_on", flag, []), info("x", scalar, [])],
        [info("still", flag, []), info("twice", scalar, [])],
    )
    nodes = [
        node("Abs", ["features"], ["size"]),
        node("ReduceMax", ["size"], ["largest"], keepdims=0),
        node("Greater", ["largest", "zero"], ["real"]),
        node("Where", ["real", "many", "none"], ["turns"]),
        node("Loop", ["turns", "true", "zero"], ["sum"], body=body),
        node("MatMul", ["features", "weights"], ["raw"]),
        node("Add", ["raw", "sum"], ["shifted"]),
        node("Tanh", ["shifted"], ["actions"]),
    ]
    constants = {
        "zero": np.array(0.0, np.float32),
        "many": np.array(2**62, np.int64),
        "none": np.array(0, np.int64),
        "true": np.array(True),
        "weights": np.zeros((len(FEATURES), len(ACTIONS)), np.float32),
    }
    graph = helper.make_graph(
        nodes,
        "hanging",
        [info("features", scalar, ["n", len(FEATURES)])],
        [info("actions", scalar, ["n", len(ACTIONS)])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    content: bytes = model.SerializeToString()
    return content

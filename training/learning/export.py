"""From a trained Stable-Baselines3 policy to a bundle, checked against the policy itself.

The network is written as an ONNX graph of matrix products by hand: it is a small perceptron, and the graph then holds
nothing but weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import nn

from policies.action import ACTIONS
from policies.observation import FEATURES
from policies.telemetry import turn_off

OPSET = 17
IR_VERSION = 9
TOLERANCE = 1e-5
_ACTIVATIONS: dict[type[nn.Module], str] = {nn.Tanh: "Tanh", nn.ReLU: "Relu"}


class ExportMismatch(ValueError):  # noqa: N818
    """Raised when the exported network does not answer like the trained one."""


def to_onnx(model: BaseAlgorithm) -> bytes:
    """The deterministic policy of `model` as an ONNX graph: features (n, F) -> actions (n, A), clipped to -1..1.

    Raises:
        ExportMismatch: when the policy has layers that the graph cannot hold, or weights that are no finite numbers.
    """
    policy: Any = model.policy
    if type(policy.features_extractor) is not FlattenExtractor:
        raise ExportMismatch(f"cannot export a feature extractor of type {type(policy.features_extractor).__name__}")
    layers = [*policy.mlp_extractor.policy_net, policy.action_net]
    nodes, weights, value = [], [], "features"
    for index, layer in enumerate(layers):
        output = f"layer{index}"
        if isinstance(layer, nn.Linear):
            weights.append(numpy_helper.from_array(layer.weight.detach().numpy(), f"weight{index}"))
            weights.append(numpy_helper.from_array(layer.bias.detach().numpy(), f"bias{index}"))
            nodes.append(helper.make_node("Gemm", [value, f"weight{index}", f"bias{index}"], [output], transB=1))
        elif type(layer) in _ACTIVATIONS:
            nodes.append(helper.make_node(_ACTIVATIONS[type(layer)], [value], [output]))
        else:
            raise ExportMismatch(f"cannot export a layer of type {type(layer).__name__}")
        value = output
    weights.append(numpy_helper.from_array(np.array(-1.0, np.float32), "low"))
    weights.append(numpy_helper.from_array(np.array(1.0, np.float32), "high"))
    nodes.append(helper.make_node("Clip", [value, "low", "high"], ["actions"]))
    graph = helper.make_graph(
        nodes,
        "policy",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", len(FEATURES)])],
        [helper.make_tensor_value_info("actions", TensorProto.FLOAT, ["n", len(ACTIONS)])],
        weights,
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    if not all(np.isfinite(numpy_helper.to_array(weight)).all() for weight in weights):
        raise ExportMismatch("the network's weights are no finite numbers: training has diverged")
    onnx.checker.check_model(proto)
    return bytes(proto.SerializeToString())


def check_equal(model: BaseAlgorithm, weights: bytes, observations: npt.NDArray[np.float32]) -> float:
    """Largest difference between the graph and `model.predict` over observations (m, F).

    Raises:
        ExportMismatch: when it is above 1e-5.
    """
    turn_off()
    import onnxruntime

    session = onnxruntime.InferenceSession(weights, providers=["CPUExecutionProvider"])
    (ours,) = session.run(None, {"features": observations})
    theirs, _ = model.predict(observations, deterministic=True)
    difference = float(np.abs(np.asarray(ours) - theirs).max())
    if not difference <= TOLERANCE:
        raise ExportMismatch(f"the exported network differs from the trained one by {difference:.2g}")
    return difference


def probe_observations(count: int, seed: int = 0, low: Any = -4.0, high: Any = 4.0) -> npt.NDArray[np.float32]:
    """Random observations (count, F) over and beyond the training range, for `check_equal`."""
    rng = np.random.default_rng(seed)
    return rng.uniform(low, high, (count, len(FEATURES))).astype(np.float32)


def finished(folder: Path, *names: str) -> list[Path]:
    """Files that a training run leaves in its folder when it is finished.

    Raises:
        FileNotFoundError: when one of them is not there.
    """
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: no finished training run here: {name} is missing")
    return [folder / name for name in names]


def export(checkpoint: Path, out: Path) -> tuple[str, float]:
    """Re-export a finished training run's folder (`training.learning.train` wrote it) to a bundle.

    Returns:
        The bundle's digest, and the largest difference to `predict` on 10,000 observations.

    Raises:
        FileNotFoundError: when the folder holds no finished run.
        BundleMismatch: when the folder's bundle cannot be trusted.
        ExportMismatch: when the answers differ.
    """
    from autoscaler.versions.registry import BUNDLE_FILE
    from policies.learned import load_bundle, write_bundle
    from training.learning.checkpoint import load_checkpoint

    network, bundle = finished(checkpoint, "best.zip", BUNDLE_FILE)
    manifest = load_bundle(bundle).manifest
    model = load_checkpoint(network)
    weights = to_onnx(model)
    difference = check_equal(model, weights, probe_observations(10_000))
    return write_bundle(out, manifest, weights), difference

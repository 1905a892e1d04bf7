"""From a bundle's weights back to a network that can go on learning: the opposite of `training.learning.export`.

A bundle holds the actor alone. The critic, which only training needs, starts anew.
This module must not know what is learned.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from stable_baselines3 import PPO

from policies.learned import BundleMismatch, PolicyBundle

Layer = tuple[torch.Tensor, torch.Tensor]
"""Weights (out, in) and biases (out,)."""


def actor_layers(bundle: PolicyBundle) -> list[Layer]:
    """The linear layers of a bundle's network, from features to outputs; tanh lies between them.

    Raises:
        BundleMismatch: when the network is anything else than such a perceptron.
    """
    try:
        graph = onnx.load_from_string(bundle.weights).graph
    except Exception as error:  # protobuf's own exceptions have no common base
        raise BundleMismatch(f"{bundle.source}: the network cannot be read: {error}") from None
    kinds = [node.op_type for node in graph.node]
    hidden = (len(kinds) - 2) // 2
    if hidden < 1 or kinds != [*["Gemm", "Tanh"] * hidden, "Gemm", "Clip"]:
        raise BundleMismatch(f"{bundle.source}: the network is no perceptron of tanh layers: it cannot go on learning")
    stored = {item.name: torch.from_numpy(np.array(numpy_helper.to_array(item))) for item in graph.initializer}
    return [(stored[node.input[1]], stored[node.input[2]]) for node in graph.node if node.op_type == "Gemm"]


def hidden_widths(layers: list[Layer]) -> tuple[int, ...]:
    """Widths of the hidden layers."""
    return tuple(len(bias) for _, bias in layers[:-1])


def load_actor(model: PPO, layers: list[Layer]) -> None:
    """Put the layers into the actor of a model of the same widths; its critic stays as it is."""
    policy: Any = model.policy
    actor = [module for module in policy.mlp_extractor.policy_net if isinstance(module, torch.nn.Linear)]
    with torch.no_grad():
        for module, (weight, bias) in zip([*actor, policy.action_net], layers, strict=True):
            module.weight.copy_(weight)
            module.bias.copy_(bias)


def freeze_actor(model: PPO, frozen: bool) -> None:
    """Let only the critic learn, or both again."""
    policy: Any = model.policy
    actor = [*policy.mlp_extractor.policy_net.parameters(), *policy.action_net.parameters(), policy.log_std]
    for parameter in actor:
        parameter.requires_grad_(not frozen)

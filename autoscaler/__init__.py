"""The live controller: reads metrics, asks the decision core, applies the target and records the decision.

It may import ``policies``, and never ``envs``, ``training`` or a trainer (torch, stable_baselines3, gymnasium).
"""

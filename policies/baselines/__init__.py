"""Peers and simple rules, through the same protocol and guardrails as learned policies."""

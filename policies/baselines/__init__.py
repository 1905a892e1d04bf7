"""Peers and simple rules, through the same protocol and guardrails as learned policies.

Must not know clocks, networks or files: a rule sees the observation alone.
"""

"""Requests: traces read, made, scaled and looked at.

Must not know clusters, policies or learners.
"""

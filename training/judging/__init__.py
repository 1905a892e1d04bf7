"""Policies side by side on the same scenarios: evaluations, comparisons, standings.

Must not know how a policy was learned, nor how results are shown.
"""

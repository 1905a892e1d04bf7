"""One policy on one scenario: worlds, disturbances, scores, timelines, and where heavy work runs.

Must not know tuning, judging or learning.
"""

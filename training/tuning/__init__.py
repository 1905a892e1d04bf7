"""The settings of a policy that hold the SLO at the lowest cost, found by studies that resume.

Must not know which policies there are.
"""

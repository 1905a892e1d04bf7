"""From a metrics server to a snapshot: which series an engine has, the queries, and what their answers mean.

Must not know decisions, nor who acts on them.
"""

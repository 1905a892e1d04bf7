"""From a target to the world: one module per place where replicas or batch caps are set.

Must not know who decides, nor how load is measured.
"""

"""Who may act on which service, and why not: leases, modes, the kill switch, other people's edits.

Must not know metrics servers, nor how a configuration is read.
"""

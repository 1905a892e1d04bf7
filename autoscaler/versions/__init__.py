"""Which policy decides from tick to tick: new versions, the fallback, rollback, and peers in the shadow.

Must not know records, nor how a target is carried out.
"""

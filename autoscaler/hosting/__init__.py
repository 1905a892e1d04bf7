"""A live controller put together from its configuration, hosted on Ray or alone, and exposed to others.

Must not know how anything is decided.
"""

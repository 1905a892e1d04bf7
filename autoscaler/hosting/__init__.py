"""A live controller put together from its configuration, hosted on Ray or alone, and exposed to others.

Decides nothing itself.
"""

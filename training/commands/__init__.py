"""The command line: options, progress, errors in one sentence.

Must not know how anything is computed: the commands import what they call when they are called.
"""

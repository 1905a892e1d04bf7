"""The live part of the command line.

Must not know how anything is done: the commands import what they call when they are called.
"""

"""The command line: options, progress, errors in one sentence.

Everything heavy is imported inside the commands; nothing below imports these.
"""

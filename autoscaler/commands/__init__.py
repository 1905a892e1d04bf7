"""The live part of the command line.

Heavy modules are imported inside the commands; nothing imports these but the root command.
"""

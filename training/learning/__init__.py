"""From randomised worlds to a network, and from the network to a bundle.

Must not know pages or the command line.
"""

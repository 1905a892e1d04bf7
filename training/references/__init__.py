"""What nobody can beat and nobody can run: the lower bound, the clairvoyant plan, the best static fleet.

Must not know the policies that are compared with them.
"""

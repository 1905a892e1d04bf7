"""The cluster model: replicas, engines and gateway on a virtual clock, and the compiled kernels beneath it.

Must not know rewards, policies or learners.
"""

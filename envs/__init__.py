"""The plant: traces, the cluster model on a virtual clock, and the Gymnasium environments around it.

It may import ``policies``, and never ``autoscaler`` or ``training``.
"""

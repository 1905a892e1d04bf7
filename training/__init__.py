"""The trainer and the judge: training, evaluation, policy bundles, reports and the ``jevons`` command.

It may import every other package of Jevons; none of them may import it.
"""

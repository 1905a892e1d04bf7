"""The decision core: contract, spec, observation, guardrails, objective and the policies themselves.

It may import no other package of Jevons, no trainer, and nothing that touches the network, a clock or a log.
"""

"""An engine without a GPU: vLLM's interface and metrics at the pace of a profile.

Must not know controllers or policies.
"""

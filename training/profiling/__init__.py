"""Engine profiles from measurements: loads, fits, and how far a profile is from the engine.

Must not know policies or scenarios.
"""

"""What the libraries below would send to their makers: nothing, unless the environment says otherwise.

Each of them looks at its variable once, while it is imported: whoever imports one turns it off first.
"""

from __future__ import annotations

import os

OFF = {
    "ORT_DISABLE_TELEMETRY": "1",  # since ONNX Runtime 1.29: its own settings in Python come after the first event
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""By the variable of the library, what turns it off."""


def turn_off() -> None:
    """For this process and those that it starts. What an operator has set stays."""
    for name, value in OFF.items():
        os.environ.setdefault(name, value)

"""A server or program that a test starts and that is not installed.

It skips the test on a desk and fails it where ``JEVONS_REQUIRE_SERVERS=1`` says that it must be there.
"""

from __future__ import annotations

import os
from typing import NoReturn

import pytest

REQUIRED = os.environ.get("JEVONS_REQUIRE_SERVERS", "") not in {"", "0"}


def missing_server(reason: str) -> NoReturn:
    """End a test because of what is not installed."""
    if REQUIRED:
        pytest.fail(f"{reason} (it must be there: JEVONS_REQUIRE_SERVERS is set)", pytrace=False)
    pytest.skip(reason)

"""``JEVONS_FORBID_SKIPS=1``: nothing may be skipped, for whatever reason; a skip is a failure then."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest

FORBIDDEN = os.environ.get("JEVONS_FORBID_SKIPS", "") not in {"", "0"}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if FORBIDDEN and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"{reason} (a skip is a failure here: JEVONS_FORBID_SKIPS is set)"
    return report

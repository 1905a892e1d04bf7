"""For every folder of tests: databases, and secrets that end with their test.

``JEVONS_FORBID_SKIPS=1``: a skip for whatever reason is a failure then.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from policies import redaction

if TYPE_CHECKING:
    from postgres_server import PostgreSQL

FORBIDDEN = os.environ.get("JEVONS_FORBID_SKIPS", "") not in {"", "0"}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if FORBIDDEN and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"{reason} (a skip is a failure here: JEVONS_FORBID_SKIPS is set)"
    return report


@pytest.fixture(autouse=True)
def no_secrets_of_other_tests() -> Iterator[None]:
    """A secret stays hidden for as long as the process lives; what one test calls secret another may print."""
    redaction._known, redaction._forms = {}, ()
    yield
    redaction._known, redaction._forms = {}, ()


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL]:
    """A real server, in a folder that a user without rights can enter."""
    from postgres_server import PostgreSQL
    from servers import start

    with tempfile.TemporaryDirectory(prefix="jevons-postgresql-") as folder:
        server = start(PostgreSQL, Path(folder))
        yield server
        server.stop()


@pytest.fixture(scope="session", params=["sqlite", pytest.param("postgresql", marks=pytest.mark.integration)])
def new_database(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], str]:
    """Makes URLs of new, empty databases of each kind that Jevons can use."""
    if request.param == "postgresql":
        server: PostgreSQL = request.getfixturevalue("postgresql")
        return server.url
    return lambda: f"sqlite:///{tmp_path_factory.mktemp('database') / 'jevons.db'}"


@pytest.fixture
def database_url(new_database: Callable[[], str]) -> str:
    """Of a new, empty database."""
    return new_database()

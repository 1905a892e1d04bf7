"""The live configuration as an option, and the records that it names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from autoscaler.hosting.config import LiveConfig
    from autoscaler.records.database import Database

ENVVAR = "JEVONS_CONFIG"
Config = Annotated[Path, typer.Option("--config", envvar=ENVVAR, help="Live configuration, YAML.")]
Configs = Annotated[list[Path], typer.Option("--config", envvar=ENVVAR, help="Live configuration, YAML; repeatable.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def opened(path: Path) -> tuple[LiveConfig, Database]:
    """A configuration and its database, with its tables made where they are missing.

    Raises:
        ConfigError: when the configuration cannot be used.
        OSError: when the database cannot be used.
    """
    from autoscaler.controller import RecordsUnavailable
    from autoscaler.hosting.config import load_live_config
    from autoscaler.records.database import Database

    loaded = load_live_config(path).located(Path.cwd())
    database = Database(loaded.database_url)
    try:
        database.create()
    except RecordsUnavailable as error:
        raise OSError(str(error)) from None
    return loaded, database

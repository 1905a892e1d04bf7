"""Whether this host has what a live controller needs: records, policies, ports, files; proved with what `run` uses.

Nothing is started or scaled; in the database tables are made where there are none, as `run` would.
This module must not know about metrics, nor ask a cluster.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from urllib.request import urlopen

from autoscaler.actuators.base import Access, LiveActuator
from autoscaler.authority.controls import kill_file_engaged
from autoscaler.controller import RecordsUnavailable
from autoscaler.hosting.attempts import SPEAKING, sentence
from autoscaler.hosting.config import LiveConfig
from autoscaler.hosting.presence import ALIVE
from autoscaler.hosting.service import LiveService
from autoscaler.hosting.status import own, status_of
from autoscaler.metrics.prometheus import PrometheusSource
from autoscaler.records.database import CONTROLLERS, Database, put
from autoscaler.versions.follower import refuse_untrained
from policies.engine import ConfigError

METRICS = b"jevons_"
"""What the metrics of a controller begin with."""


def check_host(config: LiveConfig, actuator: LiveActuator | None) -> list[Access]:
    """Prove what a controller needs besides metrics and cluster.

    Args:
        config: located, as `run` has it.
        actuator: of all services; None where it could not be made, so that no controller can be put together.
    """
    records, interval = _records(config), _interval(config)
    lines = [records, interval, *_ports(config), *_files(config)]
    if actuator is not None and records.ok and interval.ok:
        for shard in range(config.shards):
            lines += _policies(config, shard, actuator)
    return lines


def _records(config: LiveConfig) -> Access:
    """Make the tables, and write a row that is taken back."""
    where = f"records {config.records.url}"
    row = {"name": f"check@{socket.gethostname()}", "host": "", "pid": os.getpid(), "beat_s": time.time(), "status": {}}
    try:
        database = Database(config.database_url)
        try:
            database.create()
            with database.begin(write=True) as connection:
                put(connection, CONTROLLERS, row)
                connection.execute(CONTROLLERS.delete().where(CONTROLLERS.c.name == row["name"]))
        finally:
            database.close()
    except (ConfigError, RecordsUnavailable) as error:
        return Access(where, False, str(error))
    return Access(where, True, "can be read and written")


def _interval(config: LiveConfig) -> Access:
    try:
        refuse_untrained(config.policy, config.services[0].interface, config.fallback)
    except ConfigError as error:
        return Access("control interval", False, str(error))
    return Access("control interval", True, f"a decision every {config.interval_s:g} s")


def _policies(config: LiveConfig, shard: int, actuator: LiveActuator) -> Iterator[Access]:
    """Put a shard together, and have it look for its policies once."""
    name = config.shard_name(shard)
    try:
        service = LiveService(config, shard, actuator=actuator)
    except SPEAKING as error:
        yield Access(name, False, sentence(error))
        return
    try:
        followers = service.lifecycle.followers
        if not followers:
            yield Access(f"{name}: policy {config.policy.reference}", True, service.lifecycle.version)
        for follower in followers:
            follower.look()
            found = follower.take()
            label = f"{found.label} {found.digest[:12]}" if found else "not there"
            yield Access(f"{name}: policy {follower.reference}", not follower.problem, follower.problem or label)
    finally:
        service.leases.close()
        service.database.close()
        if isinstance(service.source, PrometheusSource):
            service.source.close()


def _ports(config: LiveConfig) -> Iterator[Access]:
    host, first = config.exposition.host, config.exposition.port
    for port in range(first, first + config.shards) if first else ():
        where = f"port {host}:{port}"
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            with socket.socket(family) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port))
            yield Access(where, True, "free for /metrics, /healthz and /readyz")
        except OSError as error:
            taken = f"{error.strerror or error}: set exposition.port to one that is free"
            if not _speaks(host, port):
                yield Access(where, False, taken)
            elif _runs_here(config):
                yield Access(where, True, "this configuration's controller serves there already")
            else:
                yield Access(where, False, f"another configuration's controller serves there: {taken}")


def _speaks(host: str, port: int) -> bool:
    """Whether a controller answers there; one that stands by included."""
    with suppress(OSError, ValueError), urlopen(f"http://{host}:{port}/metrics", timeout=2.0) as answer:
        return METRICS in answer.read(1 << 20)
    return False


def _runs_here(config: LiveConfig) -> bool:
    """Whether a controller of this configuration lives on this host."""
    with suppress(ConfigError, RecordsUnavailable), closing(Database(config.database_url)) as database:
        return any(
            row["doing"] in ALIVE and row["host"] == socket.gethostname()
            for row in own(config, status_of(config, database))
        )
    return False


def _files(config: LiveConfig) -> Iterator[Access]:
    if config.kill_file is not None:
        engaged = kill_file_engaged(config.kill_file)
        yield Access(f"kill file {config.kill_file}", True, engaged or "not there, so it stops nothing")
    folders = {"targets_file": config.targets_file and config.targets_file.parent, "policy.cache": config.policy.cache}
    for field, folder in folders.items():
        if folder is not None:
            problem = _unwritable(folder)
            yield Access(f"{field}: folder {folder}", not problem, problem or "can be written")


def _unwritable(folder: Path) -> str:
    """Why a folder, or what it will be made in, cannot be written; empty where it can."""
    try:
        there = next(one for one in (folder, *folder.parents) if one.exists())
    except OSError as error:  # a folder above it may not be looked into
        return f"it cannot be looked at: {error.strerror}"
    if not there.is_dir():
        return f"{there} is no folder"
    return "" if os.access(there, os.W_OK | os.X_OK) else f"{there} cannot be written by this user"
